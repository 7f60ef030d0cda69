"""How fast host memory is pinned, by how it is allocated, and how fast it is copied from and to the GPU afterwards.

    python benchmarks/pinned_memory.py --gib 8

A first step whose activations wait in host memory pins tens of GiB. Each way has a process of its own and makes as many
blocks: `pool` as `rl/offload.py` does, a quarter of a GiB at a time on pages of 2 MiB where the system grants them;
`torch` as PyTorch does, block by block; `torch-registered` the same with its allocator told to touch pages in 8 threads
and to register them. `allocate_gib_per_s` is for all of that; `huge_gib` is what the process has on huge pages. Copies
are of 64 MiB, four blocks one behind the other; medians of 20, by CUDA events. Writes
`benchmarks/results/pinned-memory-DEVICE-DATE.json`, anew after every way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from update import GIB, RESULTS, device_facts, header, lines_of, result_path, store

from tandem.rl.offload import BLOCK_BYTES, BlockPool

# What PyTorch's allocators are told. Growing segments are what the command sets; they are about the GPU's memory alone.
WAYS = {
    "pool": "expandable_segments:True",
    "torch": "expandable_segments:True",
    "torch-registered": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
}
COPIED_BYTES, COPIES = 64 << 20, 20
COLUMNS = ("allocate_gib_per_s", "to_host_gib_per_s", "to_device_gib_per_s", "huge_gib", "error")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("pinned_memory.py needs a CUDA GPU, and PyTorch sees none here")
    if arguments.worker:
        print("\nROW " + json.dumps(measure(arguments.worker, round(arguments.gib * GIB) // BLOCK_BYTES)), flush=True)
    else:
        compare(arguments, argv)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="host memory to pin, each way")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for one way")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results)")
    parser.add_argument("--worker", choices=tuple(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.gib * GIB >= COPIED_BYTES:
        parser.error(f"--gib must be at least {COPIED_BYTES / GIB}: what is copied at a time")
    return arguments


def compare(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Measure way after way; whatever is measured is stored at once."""
    result = header("pinned_memory.py", "pinned-memory", argv, device_facts())
    result |= {"block_bytes": BLOCK_BYTES, "rows": []}
    target = result_path(arguments.out or RESULTS, result)
    for way in arguments.ways:
        result["rows"].append(row_of(way, arguments, argv))
        print(json.dumps(result["rows"][-1]), flush=True)
        store(target, result)
    print(target)


def row_of(way: str, arguments: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """What a fresh process measures, or what went wrong with it."""
    row = {"way": way, "allocator": WAYS[way], "gib": arguments.gib} | dict.fromkeys(COLUMNS)
    settings = {"PYTORCH_CUDA_ALLOC_CONF": WAYS[way]}
    for line in lines_of(way, [*argv, "--worker", way], arguments.timeout, script=__file__, settings=settings):
        kind, _, rest = line.partition(" ")
        if kind == "ROW":
            row |= json.loads(rest)
        elif kind == "FAILED":
            row["error"] = json.loads(rest)
    return row


# --- in a process of its own ------------------------------------------------------------------------------------------


def measure(way: str, count: int) -> dict[str, Any]:
    """Allocate `count` blocks, then copy."""
    torch.zeros(1, device="cuda")  # the context is not what is measured
    torch.cuda.synchronize()
    started = time.perf_counter()
    if way == "pool":
        pool = BlockPool(pinned=True)
        blocks = [block for _ in range(count) for block in pool.acquire(1)]
    else:
        blocks = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
    seconds = time.perf_counter() - started
    assert all(block.is_pinned() for block in blocks), "memory that is not pinned would be copied in other ways"
    found = {"allocate_gib_per_s": round(count * BLOCK_BYTES / GIB / seconds, 3)}
    for name, out in (("to_host_gib_per_s", True), ("to_device_gib_per_s", False)):
        found[name] = round(COPIED_BYTES / GIB / statistics.median(copy_seconds(blocks, out=out)), 2)
    return found | {"huge_gib": huge_gib()}


def copy_seconds(blocks: list[torch.Tensor], *, out: bool) -> Iterator[float]:
    """Seconds of each of `COPIES` copies of `COPIED_BYTES`, each to or from other blocks as long as there are some."""
    device, each = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda"), COPIED_BYTES // BLOCK_BYTES
    pieces = device.split(BLOCK_BYTES)
    for i in range(COPIES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for j, piece in enumerate(pieces):
            host = blocks[(i * each + j) % len(blocks)]
            (host if out else piece).copy_(piece if out else host, non_blocking=True)
        end.record()
        end.synchronize()
        yield begin.elapsed_time(end) / 1e3


def huge_gib() -> float | None:
    """What this process has on transparent huge pages; None where the system does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("AnonHugePages:")), None)
    return None if kib is None else round(int(kib) * 1024 / GIB, 3)


if __name__ == "__main__":
    main()
