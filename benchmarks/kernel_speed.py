"""Every kernel against its floor and against what else there is, at the sizes of Qwen3-8B, on one GPU.

    python benchmarks/kernel_speed.py                                    # all; less than a minute of GPU time
    python benchmarks/kernel_speed.py --kernels nf4_dequantize --systems tandem bitsandbytes

Time is that of CUDA events around one call, the median of `--repeats`, each on fresh random inputs and with the L2
cache overwritten before it. The floor is the bytes (or operations) that no method avoids, at the speed of a copy (or a
matrix product) that is measured in the same run; `share` is floor over time. Results are compared with those of plain
PyTorch (system torch): `difference` is ‖x − x_torch‖/‖x_torch‖, the worst of a call's results, and one above 5 % is an
error. `extra_gib` is the memory that the call takes beside its inputs. What fails is a row with its error.
The file is not called kernels.py, because transformers would take that for Hugging Face's package of this name.
Writes `benchmarks/results/kernels-DEVICE-DATE.json`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention_cases import packed_attention_both
from kernel_cases import CASES, QWEN3_8B, SMALL, SYSTEMS, Case, Tensors
from update import GIB, RESULTS, device_facts, header, result_path, store

WARM_UP, WORST_DIFFERENCE = 3, 0.05
KERNELS = CASES | {"packed_attention": packed_attention_both}
COLUMNS = ("seconds", "gb_per_s", "tflop_per_s", "share", "extra_gib", "difference", "error")


class Clock:
    """Times calls on a device; on a CPU only so that the benchmark itself can be tested."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        # Five times the L2 cache of an H100.
        self._flush = torch.empty(256 << 20 if self.cuda else 1, dtype=torch.uint8, device=device)
        # Without first calls, which wait for compilers rather than for the GPU.
        self.total = 0.0

    def seconds(self, call: Callable[[], Tensors]) -> tuple[float, Tensors]:
        if not self.cuda:
            started = time.perf_counter()
            result = call()
            return time.perf_counter() - started, result
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # More than once, so that the GPU is still busy when the call has been queued: the events are to see the
        # kernels, not Python's way to them.
        for _ in range(6):
            self._flush.zero_()
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result

    def allocated(self, *, reset: bool = False) -> float:
        """GiB in use, or the peak since the last reset."""
        if not self.cuda:
            return 0.0
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / GIB
        return torch.cuda.max_memory_allocated() / GIB


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=tuple(KERNELS), default=list(KERNELS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tries the benchmark out")
    parser.add_argument("--small", action="store_true", help="tiny sizes, which say nothing of speed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    clock, sizes = Clock(device), SMALL if arguments.small else QWEN3_8B
    facts = device_facts() if clock.cuda else {"device": f"CPU {platform.machine()}", "driver": None, "total_gib": None}
    result = header("kernel_speed.py", "kernels", argv, facts)
    copy, product = ceilings(clock, small=arguments.small)
    result |= {"copy_gb_per_s": round(copy / 1e9, 1), "product_tflop_per_s": round(product / 1e12, 1), "rows": []}
    target = result_path(arguments.out, result)
    started = time.perf_counter()
    for name in arguments.kernels:
        for case in KERNELS[name](sizes, device):
            rows = measure_case(case, arguments.systems, clock, arguments.repeats, copy, product)
            result["rows"] += [{"kernel": name, "model": sizes.model} | one for one in rows]
            result["gpu_seconds"] = round(clock.total, 2)
            result["wall_seconds"] = round(time.perf_counter() - started, 1)
            store(target, result)
    print(table(result))
    print(target)


def ceilings(clock: Clock, *, small: bool) -> tuple[float, float]:
    """Bytes per second of a copy (read and written), operations per second of a bfloat16 matrix product."""
    count, side = (1 << 20, 128) if small else (1 << 30, 8192)
    source = torch.randint(256, (count,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    copies = [clock.seconds(lambda: (target.copy_(source),))[0] for _ in range(20)]
    products = [clock.seconds(lambda: (a @ b,))[0] for _ in range(20)]
    return 2 * count / statistics.median(copies[3:]), 2 * side**3 / statistics.median(products[3:])


def measure_case(
    case: Case, systems: list[str], clock: Clock, repeats: int, copy: float, product: float
) -> list[dict[str, Any]]:
    """A row for every system of the case that was asked for."""
    unit, ceiling = ("gb_per_s", copy) if case.bound == "bytes" else ("tflop_per_s", product)
    known = {"case": case.shape, "length": case.length, case.bound: round(case.amount), "formula": case.formula}
    known |= {"floor_seconds": case.amount / ceiling, "repeats": repeats}
    expected, unknown = attempt(functools.partial(reference, case))
    rows = []
    for system in (name for name in systems if name in case.systems):
        row: dict[str, Any] = {"system": system} | known | dict.fromkeys(COLUMNS)
        values, error = attempt(functools.partial(measure, case, system, clock, repeats))
        if values is not None:
            seconds, extra, found = values
            speed = case.amount / seconds
            row |= {"seconds": seconds, unit: round(speed / (1e9 if case.bound == "bytes" else 1e12), 2)}
            row |= {"share": round(speed / ceiling, 4), "extra_gib": round(extra, 4)}
            if found and expected is not None:
                row["difference"], error = attempt(functools.partial(difference, found, expected))
        row["error"] = error
        rows.append(row)
        del values
        if clock.cuda:
            gc.collect()
            torch.cuda.empty_cache()
    if unknown:
        rows.append({"system": "torch (reference)"} | known | dict.fromkeys(COLUMNS) | {"error": unknown})
    return rows


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What the call gives, or the last line of what went wrong."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001  # a peer may fail in any way; its row says how, and the others go on
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def reference(case: Case) -> Tensors:
    """What plain PyTorch makes of the first inputs."""
    return tuple(one.detach().clone() for one in case.systems["torch"](*case.inputs(seeded(case, 0)))())


def measure(case: Case, system: str, clock: Clock, repeats: int) -> tuple[float, float, Tensors]:
    """Median seconds, GiB beside the inputs, and the results of the first inputs."""
    times, extra = [], 0.0
    first: Tensors = ()
    for number in range(WARM_UP + repeats):
        call = case.systems[system](*case.inputs(seeded(case, number)))
        before = clock.allocated(reset=True)
        seconds, result = clock.seconds(call)
        if number == 0:
            first = tuple(one.detach().clone() for one in result)
        else:
            extra = max(extra, clock.allocated() - before)
            clock.total += seconds
        del call, result
        if number >= WARM_UP:
            times.append(seconds)
    return statistics.median(times), extra, first


def seeded(case: Case, seed: int) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(seed)


def difference(found: Tensors, expected: Tensors) -> float:
    """The worst relative distance of the results.

    Raises:
        ValueError: it is too large, or not a number.
    """
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        distance = ((a.float() - b.float()).norm() / b.float().norm()).item()
        # Not "greater": that would let nan pass.
        if not distance <= WORST_DIFFERENCE:
            raise ValueError(f"the result differs from that of torch by {distance:.3g}")
        worst = max(worst, distance)
    return worst


def table(result: dict[str, Any]) -> str:
    """One line a row; `times` is against Tandem's time in the same case."""
    base = {(row["kernel"], row["case"]): row["seconds"] for row in result["rows"] if row["system"] == "tandem"}
    copy, product = result["copy_gb_per_s"], result["product_tflop_per_s"]
    head = f"{'kernel':<22}{'case':<26}{'system':<18}{'ms':>9}{'speed':>14}"
    lines = [f"{result['device']}: copy {copy:.0f} GB/s, product {product:.0f} TFLOP/s"]
    lines.append(f"{head}{'share':>7}{'times':>7}{'GiB':>7}{'diff':>9}")
    for row in result["rows"]:
        head = f"{row['kernel']:<22}{row['case']:<26}{row['system']:<18}"
        if row["seconds"] is None:
            lines.append(f"{head} {row['error']}")
            continue
        bytes_bound = row["gb_per_s"] is not None
        speed = f"{row['gb_per_s']:.0f} GB/s" if bytes_bound else f"{row['tflop_per_s']:.0f} TFLOP/s"
        tandem = base.get((row["kernel"], row["case"]))
        times = f"{row['seconds'] / tandem:.2f}" if tandem else "–"
        unlike = "–" if row["difference"] is None else f"{row['difference']:.1e}"
        numbers = (
            f"{row['seconds'] * 1e3:>9.3f}{speed:>14}{row['share']:>7.0%}{times:>7}{row['extra_gib']:>7.2f}{unlike:>9}"
        )
        lines.append(head + numbers + (f" {row['error']}" if row["error"] else ""))
    lines.append(f"{result['gpu_seconds']:.1f} s of GPU time in kernels, {result['wall_seconds']:.0f} s in all")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
