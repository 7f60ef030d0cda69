"""Products with 4-bit weights on a CUDA device: bit for bit the weights of bitsandbytes and of Marlin, and their speed.

Run by hand with `pytest -m gpu -s tests/test_quant_gemm_gpu.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from tandem.kernels.fp8 import dequantize_fp8, quantize_fp8
from tandem.kernels.fp8_gemm import fp8_linear
from tandem.kernels.int4_marlin import (
    MarlinScratch,
    dequantize_int4,
    int4_linear,
    pack_codes,
    pack_scales,
    quantize_int4,
    quantize_marlin,
    stored_rows,
)
from tandem.kernels.nf4 import dequantize_nf4, from_quant_state
from tandem.kernels.nf4_gemm import Config, default_config, nf4_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Qwen3-8B's four stacked weights: rows of each projection, inputs.
SHAPES = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((12288, 12288), 4096),
    "down": ((4096,), 12288),
}
# SmolLM2-135M's: rows and blocks that fill no tile.
SMALL = {"small_qkv": ((576, 192, 192), 576), "small_down": ((576,), 1536)}
ROWS = (1, 8, 16, 32, 64, 128)
# Bytes of different weights that are cycled through, so that none waits in the second-level cache.
COLD = 160 << 20


@pytest.fixture(autouse=True)
def _float32_means_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@dataclass
class Nf4:
    """Arguments of `nf4_linear` and the quant state of every part."""

    arguments: tuple[torch.Tensor, ...]
    states: list[Any]
    pieces: list[torch.Tensor]
    part_rows: tuple[int, ...]

    def linear(self, x: torch.Tensor, **named: Any) -> torch.Tensor:
        return nf4_linear(x, *self.arguments, self.part_rows, **named)

    def dequantized(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        parts = []
        for piece, state in zip(self.pieces, self.states, strict=True):
            state.dtype = dtype
            parts.append(dequantize_4bit(piece, state))
        return torch.cat(parts)


def nf4(part_rows: tuple[int, ...], width: int, seed: int = 0) -> Nf4:
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator("cuda").manual_seed(seed)
    pieces, states = [], []
    for rows in part_rows:
        weight = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, generator=generator) * 0.02
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        pieces.append(packed)
        states.append(state)
    arguments = (
        torch.cat(pieces),
        torch.cat([state.absmax for state in states]),
        torch.cat([state.state2.absmax for state in states]),
        states[0].state2.code.cuda(),
        torch.stack([torch.as_tensor(state.offset, device="cuda").float() for state in states]),
    )
    return Nf4(arguments, states, pieces, part_rows)


def numbers(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype).cuda()


def poisoned(rows: int, width: int) -> torch.Tensor:
    return torch.full((rows, width), torch.nan, dtype=torch.bfloat16, device="cuda")


def excess(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float = 0.0) -> float:
    """Largest error as a part of what one rounding and float32 sums may make of it; at most 1."""
    exact = x.float() @ weight.float().t() + bias
    allowed = exact.abs() * torch.finfo(x.dtype).eps / 2 + 1e-5 * (x.float().abs() @ weight.float().abs().t())
    return float(((got.float() - exact).abs() / allowed).nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize("lookup", ["shuffle", "load"])
@pytest.mark.parametrize("name", [*SHAPES, *SMALL])
def test_nf4_products(name, lookup):
    part_rows, width = (SHAPES | SMALL)[name]
    weight = nf4(part_rows, width)
    dense = weight.dequantized()
    found = {}
    for rows in (1, 3, 16, 17, 32, 64, 100, 128):
        x = numbers(rows, width)
        config = default_config(rows)
        config = Config(config.block_n, config.block_m, 2, config.warps, 3 if lookup == "shuffle" else 1, lookup)
        got = weight.linear(x, out=poisoned(rows, len(dense)), config=config)
        again = weight.linear(x, out=poisoned(rows, len(dense)), config=config)
        found[rows] = excess(got, x, dense), torch.equal(got, again)
    print(f"nf4 {name} {lookup}: " + ", ".join(f"M={rows} {error:.2f}" for rows, (error, _) in found.items()))
    assert all(error <= 1 and same for error, same in found.values()), found


@pytest.mark.parametrize("name", [*SHAPES, *SMALL])
def test_products_in_float16(name):
    part_rows, width = (SHAPES | SMALL)[name]
    weight = nf4(part_rows, width)
    dense = weight.dequantized(torch.float16)
    packed, scales = quantize_fp8(dense.bfloat16())
    eight = dequantize_fp8(packed, scales, torch.empty_like(dense))
    found = {}
    for rows in (1, 3, 16, 17, 32, 64, 128):
        x = numbers(rows, width, torch.float16)
        found[rows] = excess(weight.linear(x), x, dense), excess(fp8_linear(x, packed, scales), x, eight)
    print(f"float16 {name}: " + ", ".join(f"M={rows} {a:.2f} {b:.2f}" for rows, (a, b) in found.items()))
    assert all(max(errors) <= 1 for errors in found.values()), found


@pytest.mark.parametrize("name", [*SHAPES, *SMALL])
def test_fp8_products(name):
    part_rows, width = (SHAPES | SMALL)[name]
    dense = torch.randn(sum(part_rows), width, generator=torch.Generator().manual_seed(5)).bfloat16().cuda()
    packed, scales = quantize_fp8(dense)
    weight = dequantize_fp8(packed, scales)
    assert torch.equal(weight, dequantize_fp8(packed, scales, impl="torch"))
    bias = torch.randn(len(dense), generator=torch.Generator().manual_seed(6)).bfloat16().cuda()
    found = {}
    for rows in (1, 3, 16, 17, 32, 64):
        x = numbers(rows, width)
        got = fp8_linear(x, packed, scales, bias)
        found[rows] = excess(got, x, weight, bias.float()), torch.equal(got, fp8_linear(x, packed, scales, bias))
    print(f"fp8 {name}: " + ", ".join(f"M={rows} {error:.2f}" for rows, (error, _) in found.items()))
    assert all(error <= 1 and same for error, same in found.values()), found


@pytest.mark.parametrize("lookup", ["shuffle", "load"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["qkv", *SMALL])
def test_nf4_weights_are_those_of_bitsandbytes_bit_for_bit(name, splits, lookup):
    part_rows, width = (SHAPES | SMALL)[name]
    weight = nf4(part_rows, width)
    dense = weight.dequantized()
    wrong = 0
    for first in range(0, width, 64):
        x = torch.zeros(64, width, dtype=torch.bfloat16, device="cuda")
        x[torch.arange(64), torch.arange(first, first + 64)] = 1
        config = Config(64, 64, 2, 4, 3 if lookup == "shuffle" else 1, lookup, splits)
        got = weight.linear(x, out=poisoned(64, len(dense)), config=config)
        wrong += int((got != dense[:, first : first + 64].t()).sum())
    print(f"nf4 {name} splits={splits} {lookup}: {wrong} of {dense.numel()} weights differ")
    assert wrong == 0


def replayed(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A captured call, warmed on the side as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", ["qkv", "gate_up"])
def test_nf4_in_a_cuda_graph(name, rows):
    part_rows, width = SHAPES[name]
    weight = nf4(part_rows, width)
    bias = numbers(1, sum(part_rows))[0]
    x = numbers(rows, width)
    graph, out = replayed(lambda: weight.linear(x, bias=bias))
    for seed in range(3):
        x.copy_(numbers(rows + seed, width)[:rows])
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, weight.linear(x, bias=bias))
        assert excess(out, x, weight.dequantized(), bias.float()) <= 1


def int4(part_rows: tuple[int, ...], width: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(width)
    parts = [
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, generator=generator) * 0.02 for rows in part_rows
    ]
    return parts, *quantize_marlin(parts, "cuda")


@pytest.mark.parametrize("name", [*SHAPES, *SMALL])
def test_int4_rows_equal_the_twin_bit_for_bit(name):
    part_rows, width = (SHAPES | SMALL)[name]
    parts, packed, scales = int4(part_rows, width)
    total = sum(part_rows)
    whole = dequantize_int4(packed, scales, impl="torch")
    buffer = torch.full((total + 2, width + 24), 7.0, dtype=torch.bfloat16, device="cuda")
    for rows in (slice(0, total), slice(64, 192), slice(0, part_rows[0]), slice(total - 65, total - 1), slice(5, 6)):
        out = buffer[1 : 1 + rows.stop - rows.start, 8 : 8 + width].fill_(torch.nan)
        dequantize_int4(packed, scales, rows, out, impl="triton")
        assert torch.equal(out, whole[rows]), rows
        out.fill_(7)
        assert (buffer == 7).all(), rows
    error = (whole[:total].float() - torch.cat(parts).float()).norm() / torch.cat(parts).float().norm()
    print(f"int4 {name}: relative error {error:.4f}")
    assert error < 0.085


@pytest.mark.parametrize("name", [*SHAPES, *SMALL])
def test_marlin_multiplies_by_the_weights_we_read_back(name):
    pytest.importorskip("vllm")
    part_rows, width = (SHAPES | SMALL)[name]
    total = sum(part_rows)
    _, packed, scales = int4(part_rows, width)
    dense = dequantize_int4(packed, scales, slice(0, total))
    scratch = MarlinScratch.on("cuda")
    bias = numbers(1, total)[0]
    found = {}
    for rows in ROWS:
        x = numbers(rows, width)
        got = int4_linear(x, packed, scales, scratch, total)
        with_bias = int4_linear(x, packed, scales, scratch, total, bias)
        assert torch.equal(with_bias, got + bias)
        found[rows] = excess(got, x, dense), torch.equal(got, int4_linear(x, packed, scales, scratch, total))
    wrong = 0
    for first in range(0, width, 64):
        x = torch.zeros(64, width, dtype=torch.bfloat16, device="cuda")
        x[torch.arange(64), torch.arange(first, first + 64)] = 1
        got = int4_linear(x, packed, scales, scratch, total)
        wrong += int((got != dense[:, first : first + 64].t()).sum())
    print(f"marlin {name}: {wrong} weights differ; " + ", ".join(f"M={m} {e:.2f}" for m, (e, _) in found.items()))
    assert wrong == 0
    assert all(error <= 1 and same for error, same in found.values()), found


def test_packing_is_that_of_vllm():
    pytest.importorskip("vllm")
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales

    codes, scales = quantize_int4(numbers(384, 256) * 0.02)
    nibbles = codes.t().reshape(32, 8, 384).long()  # [in, out], eight inputs to a word, the first lowest
    words = (nibbles << (4 * torch.arange(8, device="cuda")[None, :, None])).sum(1)
    words = (words - (words >= 2**31).long() * 2**32).to(torch.int32)
    nothing = torch.empty(0, dtype=torch.int32, device="cuda")
    assert torch.equal(pack_codes(codes), ops.gptq_marlin_repack(words, nothing, size_k=256, size_n=384, num_bits=4))
    want = marlin_permute_scales(scales.t().contiguous(), size_k=256, size_n=384, group_size=32)
    assert torch.equal(pack_scales(scales), want)


# ---- speed


def microseconds(call: Callable[[int], object], copies: int) -> float:
    """Per call, in a CUDA graph of one call on each of the copies."""
    graph, _ = replayed(lambda: [call(i) for i in range(copies)])
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = math.inf
    for _ in range(3):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best * 1000 / copies


def candidates(rows: int) -> list[Config]:
    """The sweep for so many rows of x."""
    block_m = next((size for size in (16, 32, 64) if rows <= size), 128)
    small = [
        Config(64, block_m, 2, 4, 3),
        Config(64, block_m, 4, 4, 3),
        Config(64, block_m, 4, 4, 1),
        Config(64, block_m, 2, 4, 5),
        Config(128, block_m, 2, 4, 3),
        Config(128, block_m, 2, 8, 3),
        Config(64, block_m, 2, 4, 3, splits=1),
        Config(64, block_m, 2, 4, 1, "load"),
    ]
    large = [
        Config(64, block_m, 2, 4, 3),
        Config(128, block_m, 2, 4, 3),
        Config(128, block_m, 2, 8, 3),
        Config(128, block_m, 4, 8, 1),
        Config(128, block_m, 2, 8, 4),
        Config(256, block_m, 1, 8, 3),
        Config(128, block_m, 2, 8, 3, splits=1),
    ]
    return small if block_m <= 32 else large


def attempt(call: Callable[[], float]) -> float | str:
    """A number, or why there is none: one failing way must not hide the others."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - printed in the table, and asserted for our own kernels
        return f"{type(error).__name__}: {str(error)[:80]}"


def shown(took: float | str) -> str:
    return took if isinstance(took, str) else f"{took:.1f}"


def marlin_scratch() -> MarlinScratch | None:
    try:
        return MarlinScratch.on("cuda")
    except ImportError:
        return None


def rivals(weights: list[Nf4], dense: list[torch.Tensor], x: torch.Tensor, scratch: MarlinScratch | None) -> dict:
    """Ways to the same product, by name: call(copy), and how many copies there are."""
    import bitsandbytes as bnb

    part_rows, width = weights[0].part_rows, x.shape[1]
    borders = [sum(part_rows[:i]) for i in range(len(part_rows) + 1)]
    buffer = torch.empty(borders[-1], width, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(len(x), borders[-1], dtype=torch.bfloat16, device="cuda")

    def unpacked(i: int) -> None:
        for j, (piece, state) in enumerate(zip(weights[i].pieces, weights[i].states, strict=True)):
            described = from_quant_state(state)
            target = buffer[borders[j] : borders[j + 1]]
            dequantize_nf4(piece, described.absmax, described.shape, described.blocksize, target)
        torch.nn.functional.linear(x, buffer)

    def bitsandbytes(i: int) -> None:
        for j, (piece, state) in enumerate(zip(weights[i].pieces, weights[i].states, strict=True)):
            out[:, borders[j] : borders[j + 1]] = bnb.matmul_4bit(x, piece.t(), state)

    found: dict[str, tuple[Callable[[int], object], int]] = {
        "unpack+cuBLAS": (unpacked, len(weights)),
        "bitsandbytes": (bitsandbytes, len(weights)),
        "bf16": (lambda i: torch.nn.functional.linear(x, dense[i]), len(dense)),
    }
    if scratch is not None:
        stored = stored_rows(borders[-1], width)
        # Speed does not depend on the values.
        codes = [torch.randint(-(2**31), 2**31, (width // 16, 2 * stored), dtype=torch.int32, device="cuda")
                 for _ in weights]  # fmt: skip
        scales = torch.rand(width // 32, stored, device="cuda").bfloat16()
        found["marlin"] = (lambda i: int4_linear(x, codes[i], scales, scratch, borders[-1]), len(weights))
    return found


def ours(weights: list[Nf4], x: torch.Tensor, config: Config | None, i: int) -> torch.Tensor:
    return weights[i].linear(x, config=config)


def test_speed_table():
    scratch, failures, started = marlin_scratch(), [], time.perf_counter()
    print(f"\n{torch.cuda.get_device_name()}: microseconds per product, GB/s of 4-bit weights and scales in brackets")
    for name, (part_rows, width) in SHAPES.items():
        total = sum(part_rows)
        size = total * width // 2 + total * width // 64
        copies = max(COLD // size, 2)
        weights = [nf4(part_rows, width, seed) for seed in range(copies)]
        dense = [
            torch.randn(total, width, device="cuda").bfloat16() for _ in range(max(COLD // (total * width * 2), 2))
        ]
        for rows in ROWS:
            x = numbers(rows, width)
            timed = {}
            for config in candidates(rows):
                timed[config] = attempt(partial(microseconds, partial(ours, weights, x, config), copies))
            failures += [f"{name} M={rows} {c}: {t}" for c, t in timed.items() if isinstance(t, str)]
            good = [(t, c) for c, t in timed.items() if isinstance(t, float)]
            best, config = min(good, key=lambda pair: pair[0], default=(math.nan, None))
            usual = attempt(partial(microseconds, partial(ours, weights, x, None), copies))
            line = [f"nf4 {best:.1f} ({size / best / 1e3:.0f})", f"default {shown(usual)}"]
            for rival, (call, count) in rivals(weights, dense, x, scratch).items():
                took = attempt(partial(microseconds, call, count))
                line.append(f"{rival} {shown(took)}")
            print(f"{name:8} M={rows:<4}" + " | ".join(line) + f" | {config}")
            print("          " + ", ".join(
                f"{c.block_n}/{c.unroll}/{c.warps}/{c.stages}/{c.lookup[0]}/{c.splits or '-'}={t:.1f}" for t, c in good
            ))  # fmt: skip
    print(f"the sweep took {time.perf_counter() - started:.0f} s")
    assert not failures, "\n".join(failures)


def test_speed_of_quantising_and_reading_back():
    for name, (part_rows, width) in SHAPES.items():
        parts, packed, scales = int4(part_rows, width)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        quantize_marlin(parts, "cuda")
        torch.cuda.synchronize()
        took, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() - before
        total = sum(part_rows)
        out = torch.empty(total, width, dtype=torch.bfloat16, device="cuda")
        reading = microseconds(lambda _, a=packed, b=scales, c=out: dequantize_int4(a, b, slice(0, len(c)), c), 8)
        moved = packed.nbytes + scales.nbytes + out.nbytes
        print(
            f"int4 {name}: quantised in {took * 1e3:.0f} ms with {peak / 2**20:.0f} MiB beside it, "
            f"read back in {reading:.0f} µs, {moved / reading / 1e3:.0f} GB/s"
        )
        assert moved / reading / 1e3 > 500
