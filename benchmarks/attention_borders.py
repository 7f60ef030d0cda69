"""Where cuDNN's attention begins to pay, call by call: the borders `LONG_SEGMENT`, `LONG_CROSS` and `PLAN_ROWS`.

    python benchmarks/attention_borders.py          # on a GPU; prints

Segments: a pack of equal segments, a cuDNN call for each beside one flash call for all. Cross pieces: rows that all
see all keys, one call each. Plans: cuDNN plans for every new length, so the first call of a length stands beside the
second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from tandem.kernels.attention_pieces import cudnn_backward, cudnn_forward, flash_backward, flash_forward

Tensors = tuple[torch.Tensor, ...]
Offsets = tuple[torch.Tensor, torch.Tensor, int, int]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("attention_borders.py needs a CUDA GPU, and PyTorch sees none here")
    for heads, dim in (((32, 8), 128), ((4, 1), 128), ((9, 3), 64)):
        segments(heads, dim)
    crosses()
    plans()


def inputs(rows: int, heads: tuple[int, int], dim: int) -> Tensors:
    """Queries, keys and values as views of a buffer, and a contiguous gradient of the output."""
    q, k = heads[0] * dim, heads[1] * dim
    parts = torch.randn(rows, q + 2 * k, device="cuda").bfloat16().split([q, k, k], dim=1)
    gradient = torch.randn(rows, heads[0], dim, device="cuda").bfloat16()
    return (*(x.unflatten(1, (-1, dim)) for x in parts), gradient)


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def four_times(given: Tensors, pieces: list[slice], offsets: Offsets, *, causal: bool) -> list[float]:
    """Forward by cuDNN, a call for every piece, and by one flash call; backward likewise."""
    q, k, v, g = given
    scale = q.shape[-1] ** -0.5

    def each() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [cudnn_forward(q[at], k[at], v[at], causal=causal, scale=scale) for at in pieces]

    out, lse = torch.cat([o for o, _ in each()]), torch.cat([x for _, x in each()], dim=1)

    def each_back() -> list[Tensors]:
        given = [(g[at], q[at], k[at], v[at], out[at], lse[:, at]) for at in pieces]
        return [cudnn_backward(*one, causal=causal, scale=scale) for one in given]

    return [
        milliseconds(each),
        milliseconds(lambda: flash_forward(q, k, v, *offsets, causal=causal, scale=scale)),
        milliseconds(each_back),
        milliseconds(lambda: flash_backward(g, q, k, v, out, lse, *offsets, causal=causal, scale=scale)),
    ]


def print_times(title: str, times: list[float], scores: int, heads: int, dim: int) -> None:
    """Milliseconds and TFLOP/s; `scores` of one head, two products forward and five backward."""
    rates = [scores * heads * dim * factor / t / 1e9 for factor, t in zip((4, 4, 10, 10), times, strict=True)]
    print(title, *(f"{t:9.3f} ({r:4.0f})" for t, r in zip(times, rates, strict=True)))


def segments(heads: tuple[int, int], dim: int, rows: int = 16_384) -> None:
    print(f"\n{rows} rows, heads {heads}, {dim} wide; ms (TFLOP/s): forward cuDNN, flash; backward cuDNN, flash")
    given = inputs(rows, heads, dim)
    for length in (256, 512, 1024, 2048, 4096, 8192, 16_384):
        pieces = [slice(a, a + length) for a in range(0, rows, length)]
        cuts = borders([length] * len(pieces))
        times = four_times(given, pieces, (cuts, cuts, length, length), causal=True)
        print_times(f"{length:6d}", times, rows * length // 2, heads[0], dim)


def crosses() -> None:
    print("\nrows × keys, heads (32, 8), 128 wide; ms (TFLOP/s): forward cuDNN, flash; backward cuDNN, flash")
    for rows, keys in ((2048, 512), (8192, 2048), (8192, 8192), (16_384, 16_384)):
        q, k, v, g = inputs(rows + keys, (32, 8), 128)
        offsets = (borders([rows]), borders([keys]), rows, keys)
        times = four_times((q[keys:], k[:keys], v[:keys], g[keys:]), [slice(None)], offsets, causal=False)
        print_times(f"{rows:6d} × {keys:6d}", times, rows * keys, 32, 128)


def plans() -> None:
    def seconds(run: Callable[[], Tensors]) -> tuple[float, Tensors]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        return time.perf_counter() - start, result

    times = []
    q, k, v, g = inputs(8192, (32, 8), 128)
    for length in (5003, 5417, 6011, 6997, 7411):
        q_, k_, v_, g_ = q[:length], k[:length], v[:length], g[:length]
        forward = partial(cudnn_forward, q_, k_, v_, causal=True, scale=0.09)
        new, found = seconds(forward)
        backward = partial(cudnn_backward, g_, q_, k_, v_, *found, causal=True, scale=0.09)
        times.append([new, seconds(forward)[0], seconds(backward)[0], seconds(backward)[0]])
    medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
    words = "\n5,000 to 7,400 rows, ms: new forward {:.1f}, known {:.1f}; new backward {:.1f}, known {:.1f}"
    print(words.format(*medians))


if __name__ == "__main__":
    main()
