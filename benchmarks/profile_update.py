"""Where the time of one update goes on a GPU: kernels by name, and how long the device stands still between them.

    python benchmarks/profile_update.py /tmp/qwen3-8b-nf4 --lengths 8192 32768

The same update as `benchmarks/update.py` measures, the third of its kind in the process, under PyTorch's profiler.
Copies to and from host memory run beside the kernels, so they do not count as busy time. Writes
`benchmarks/results/profile-DEVICE-DATE.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import update

HERE = Path(__file__).parent
_LISTED = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    _, settings = update.parse([arguments.model])
    loaded = update.tandem("tandem", settings)
    rows = [row for length in arguments.lengths for row in profiled(loaded, length)]
    result = update.header("profile_update.py", "profile", sys.argv[1:], update.device_facts()) | {"rows": rows}
    target = update.result_path(arguments.out, result)
    update.store(target, result)
    print(target)


def profiled(loaded: Any, length: int) -> list[dict[str, Any]]:
    """One row for the whole update, then one for each kernel, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    ids = torch.randint(10, 150_000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for _ in range(2):
        loaded.step(ids)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        loaded.step(ids)
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    whole = {"length": length, "kernel": None} | busy_and_idle(
        [(start, end) for name, start, end in spans if not name.startswith(("Memcpy DtoH", "Memcpy HtoD"))]
    )
    totals: dict[str, list[float]] = defaultdict(list)
    for name, start, end in spans:
        totals[name].append((end - start) / 1000)
    longest = sorted(totals, key=lambda name: -sum(totals[name]))[:_LISTED]
    kernels = [{"length": length, "kernel": n, "ms": sum(totals[n]), "calls": len(totals[n])} for n in longest]
    for row in [whole, *kernels[:15]]:
        print(json.dumps(row), flush=True)
    return [whole, *kernels]


def busy_and_idle(spans: list[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds from the first start to the last end, with something running, and idle by the length of the gap."""
    busy, end, gaps = 0.0, 0.0, []
    ordered = sorted(spans)
    for start, stop in ordered:
        if start > end:
            if end:
                gaps.append(start - end)
            busy, end = busy + stop - start, stop
        elif stop > end:
            busy, end = busy + stop - end, stop
    return {
        "ms": (end - ordered[0][0]) / 1000,
        "busy_ms": busy / 1000,
        "idle_below_50us_ms": sum(gap for gap in gaps if gap < 50) / 1000,
        "idle_below_1ms_ms": sum(gap for gap in gaps if 50 <= gap < 1000) / 1000,
        "idle_above_1ms_ms": sum(gap for gap in gaps if gap >= 1000) / 1000,
    }


if __name__ == "__main__":
    main()
