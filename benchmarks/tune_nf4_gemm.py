"""The decode product's settings (`kernels/nf4_gemm.py`), each timed on the linear layers of a real shape.

    python benchmarks/tune_nf4_gemm.py --rows 1 8 16 32 64 --workers 12

Every setting is captured in a CUDA graph over copies of a weight that exceed the L2 cache together; `ms_per_layer` is
the sum over the four products of a decoder layer. Beside them: unpacking the weight and one cuBLAS product
(`unpack`) and the product alone (`bf16`). Writes `benchmarks/results/nf4_gemm-DEVICE-DATE.json`: for each number of
rows the five best settings, and the best for each product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from update import RESULTS, device_facts, header, result_path, store

from tandem.kernels.nf4 import write_nf4_stack
from tandem.kernels.nf4_gemm import Config, default_config, nf4_linear

# Qwen3-8B: q+k+v, o, gate+up, down; rows of the parts and inputs.
LAYER = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((12288, 12288), 4096),
    "down": ((4096,), 12288),
}
COPIES_BYTES = 160 << 20


def settings(rows: int) -> list[Config]:
    if rows == 1:
        kernels = itertools.product((4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8), ("shuffle", "load"))
        vector = [
            Config(block_n, 1, unroll, warps, 1, lookup, splits)
            for block_n, unroll, warps, lookup in kernels
            # From 8 to 64 bytes a thread: fewer are slow to load, more fill the registers.
            if 8 <= block_n * unroll // warps <= 64
            for splits in (None, 1, 2, 4)
        ]
        return [*vector, Config(128, 16), Config(64, 16)]
    block_m = next((size for size in (16, 32, 64) if rows <= size), 64)
    lookups = [("shuffle", stages) for stages in (2, 3, 4)] + [("load", 1)]
    kernels = itertools.product((32, 64, 128), (1, 2, 4), (2, 4, 8), lookups)
    return [
        Config(block_n, block_m, unroll, warps, stages, lookup, splits)
        for block_n, unroll, warps, (lookup, stages) in kernels
        # Weight rows of a warp: tiles are not much smaller, and registers hold no more.
        if 8 <= block_n // warps <= 64 and block_n * block_m <= 8192
        for splits in (None, 1, 2, 4)
    ]


def weight(parts: tuple[int, ...], width: int) -> tuple[torch.Tensor, ...]:
    """Random bytes: no setting's time depends on the values."""
    rows, blocks = sum(parts), sum(parts) * width // 64
    outer = sum(math.ceil(count * width / 64 / 256) for count in parts)
    return (
        torch.randint(256, (rows * width // 2,), dtype=torch.uint8, device="cuda"),
        torch.randint(256, (blocks,), dtype=torch.uint8, device="cuda"),
        torch.rand(outer, device="cuda") * 0.01,
        torch.linspace(-1, 1, 256, device="cuda"),
        torch.full((len(parts),), 0.02, device="cuda"),
    )


def milliseconds(call: Any, copies: int) -> float:
    """Of one call, the fastest of five replays of a graph that goes through the copies."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    times = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / copies)
    return min(times[1:])


class Product:
    """One of the layer's products, on copies of its weight."""

    def __init__(self, name: str, rows: int, copies: int | None = None) -> None:
        self.parts, width = LAYER[name]
        shape = (sum(self.parts), width)
        copies = copies or math.ceil(COPIES_BYTES / (math.prod(shape) // 2))
        self.weights = [weight(self.parts, width) for _ in range(copies)]
        self.x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty(rows, shape[0], device="cuda", dtype=torch.bfloat16)
        self.dense = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    def fused(self, copy: int, config: Config) -> None:
        nf4_linear(self.x, *self.weights[copy], self.parts, config=config, out=self.out)

    def unpack(self, copy: int) -> None:
        packed, absmax, absmax2, code2, offsets = self.weights[copy]
        write_nf4_stack(self.dense[0], packed, (absmax, absmax2, code2, offsets), self.parts, 64, 256)
        torch.mm(self.x, self.dense[0].t(), out=self.out)

    def bf16(self, copy: int) -> None:
        torch.mm(self.x, self.dense[copy % 4].t(), out=self.out)


def compile_share(share: tuple[int, list[Config]]) -> None:
    """Fills Triton's cache on disk: compilation is what takes the time."""
    rows, configs = share
    products = [Product(name, rows, copies=1) for name in LAYER]
    for config in configs:
        try:
            for product in products:
                product.fused(0, config)
        except Exception as error:  # noqa: BLE001  # too much shared memory: such a setting is left out below
            print(f"{config}: {str(error)[:80]}", flush=True)


def compile_all(all_rows: list[int], workers: int) -> None:
    shares = []
    for rows in all_rows:
        groups: dict[Config, list[Config]] = {}
        for config in settings(rows):
            groups.setdefault(replace(config, splits=None), []).append(config)
        parts = list(groups.values())
        shares += [(rows, [one for group in parts[i::workers] for one in group]) for i in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_share, shares, chunksize=1)


def time_settings(rows: int) -> list[dict[str, Any]]:
    configs = settings(rows)
    default = default_config(rows)
    fused: dict[Config, dict[str, float]] = {config: {} for config in [*configs, default]}
    other: dict[str, dict[str, float]] = {"unpack": {}, "bf16": {}}
    for name in LAYER:
        product = Product(name, rows)
        copies = len(product.weights)
        for config in list(fused):
            try:
                fused[config][name] = milliseconds(partial(product.fused, config=config), copies)
            except Exception as error:  # noqa: BLE001  # a setting that the device has no room for
                fused.pop(config)
                print(f"{config} cannot run: {str(error)[:80]}", flush=True)
        for what, times in other.items():
            times[name] = milliseconds(getattr(product, what), copies)
    found = [{"rows": rows, "what": what, **as_row(times)} for what, times in other.items()]
    found.append({"rows": rows, "what": "default", "config": asdict(default), **as_row(fused[default])})
    for config, times in sorted(fused.items(), key=lambda item: sum(item[1].values()))[:5]:
        found.append({"rows": rows, "what": "best", "config": asdict(config), **as_row(times)})
    for name in LAYER:
        config = min(fused, key=lambda one: fused[one][name])
        found.append({"rows": rows, "what": f"best for {name}", "config": asdict(config), **as_row(fused[config])})
    return found


def as_row(times: dict[str, float]) -> dict[str, Any]:
    return {"ms_per_layer": round(sum(times.values()), 5), "ms": {name: round(ms, 5) for name, ms in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = header("tune_nf4_gemm.py", "nf4_gemm", sys.argv[1:], device_facts()) | {"rows": []}
    target = result_path(arguments.out, result)
    compile_all(arguments.rows, arguments.workers)
    for rows in arguments.rows:
        for row in time_settings(rows):
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
        store(target, result)
    print(target)


if __name__ == "__main__":
    main()
