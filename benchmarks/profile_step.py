"""Where the time of whole steps of a run goes, in Python and in operators: `rl-train run` of a config, in this process.

    python benchmarks/profile_step.py CONFIG [KEY=VALUE ...] --skip 5 --steps 10

After the first `--skip` steps, `--steps` are looked at in thirds, so that no profiler disturbs another: first without
one (`parts`: mean seconds by part of a step; `collections` of Python's garbage collector), then with cProfile, then
with PyTorch's profiler. `seconds` of each third show what its profiler adds. A step is what lies between two records of
`metrics.jsonl`: a rollout with all its updates. Evaluations and checkpoints that are due fall into it
(`eval.eval_steps=0 checkpoint.save_steps=0` leaves them out). The run's length is set here, and its folder is removed
in the end.

Everything is per step. Own time is that spent in a function or an operator itself, not in what it calls. cProfile sees
the main thread, from Python 3.12 on all threads. `launches`: calls that give the GPU kernels, a CUDA graph being one.
`busy_ms`: milliseconds in which something ran on it, copies from and to host memory aside. Writes
`benchmarks/results/profile-step-DEVICE-DATE.json`.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from grpo_step import facts
from profile_update import busy_and_idle
from update import RESULTS, ROOT, header, result_path, store

LISTED = 40
PARTS = ("plain", "python", "torch")
THREADS = (
    "all threads; own times of those that run at once are mixed"
    if sys.version_info >= (3, 12)
    else "the main thread alone, before Python 3.12: autograd's threads, a GPU's backward passes in them, are not seen"
)
_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    profiled = Profiled(arguments.skip, arguments.steps)
    run(arguments, profiled)
    if not profiled.done:
        raise SystemExit(f"the run ended before {arguments.skip + arguments.steps} steps were made")
    result = header("profile_step.py", "profile-step", argv, facts()) | profiled.result()
    target = result_path(arguments.out or RESULTS, result)
    store(target, result)
    show(result)
    print(target)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="of a run, as for rl-train run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the config's")
    parser.add_argument("--skip", type=int, default=5, help="steps before those that are looked at")
    parser.add_argument("--steps", type=int, default=10, help="steps that are looked at, a third in each way")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.skip < 1 or arguments.steps < len(PARTS):
        parser.error(f"--skip must be at least 1 and --steps at least {len(PARTS)}")
    return arguments


# --- the run ----------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, profiled: Profiled) -> None:
    """The command that a user types; `profiled` is told of every record.

    Raises:
        SystemExit: the command failed. It has said why.
    """
    from tandem.rl.allocator import growing_segments

    os.environ.update(growing_segments())  # as the command does, before PyTorch is imported
    from tandem.rl import cli, commands
    from tandem.rl.config_file import load_config
    from tandem.rl.errors import UserError
    from tandem.rl.trackers import Trackers

    class Told(Trackers):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            super().log(step, metrics)
            if "step_time" in metrics:  # not those of an evaluation
                profiled.step(metrics)

    try:
        per_record = steps_per_record(load_config(arguments.config, arguments.overrides))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    length = (arguments.skip + arguments.steps) * per_record
    with tempfile.TemporaryDirectory() as folder, profiled.open():
        settings = [f"train.max_steps={length}", "log.logging_steps=1", f"output_dir={folder}", "run_name=run"]
        words = ["rl-train", "run", str(arguments.config), *arguments.overrides, *settings]
        with mock.patch.object(sys, "argv", words), mock.patch.object(commands, "Trackers", Told):
            try:
                cli.main()
            except SystemExit as end:
                if end.code:
                    raise


def steps_per_record(config: Any) -> int:
    """Optimiser steps between two records."""
    if config.algorithm.name != "grpo":
        return 1
    return config.train.steps_per_generation * config.algorithm.num_iterations


class Profiled:
    """Switches what looks at the steps, at the end of each.

    Args:
        skip: steps that nothing looks at. steps: those after them, divided among `PARTS`; the first ones get more.
    """

    def __init__(self, skip: int, steps: int) -> None:
        each, more = divmod(steps, len(PARTS))
        self.lengths = {name: each + (i < more) for i, name in enumerate(PARTS)}
        self._plan = [None] * skip + [name for name in PARTS for _ in range(self.lengths[name])]
        self._records: dict[str, list[dict[str, float]]] = {name: [] for name in PARTS}
        self._collector, self._python = Collector(), cProfile.Profile()
        self._torch: Any = None
        self._looking = ExitStack()
        self._at, self._switching = 0, 0.0

    @property
    def done(self) -> bool:
        return self._at >= len(self._plan)

    def step(self, metrics: Mapping[str, float]) -> None:
        """A step has ended, and the next one begins."""
        if self.done:
            return
        before = self._plan[self._at]
        self._at += 1
        after = None if self.done else self._plan[self._at]
        if before is not None:
            # PyTorch's profiler takes seconds to start on a GPU, which the trainer counts in the step behind it.
            self._records[before].append({**metrics, "step_time": metrics["step_time"] - self._switching})
        started = time.perf_counter()
        if before != after:
            self._looking.close()
            if after is not None:
                self._looking.enter_context(self._profiler(after))
        self._switching = time.perf_counter() - started

    @contextmanager
    def open(self) -> Iterator[None]:
        """Nothing looks on after it, whatever happened."""
        with self._looking:
            yield

    def result(self) -> dict[str, Any]:
        """Everything per step: by part, by Python function, by operator, on the GPU, of the garbage collector."""
        counts, plain = self.lengths, self._records["plain"]
        names = dict.fromkeys(name for record in plain for name in record if name.startswith("time/"))
        seconds = {name: [record["step_time"] for record in self._records[name]] for name in PARTS}
        return {
            "steps": counts,
            "seconds": {name: round(statistics.fmean(values), 4) for name, values in seconds.items()},
            "parts": {n[5:]: round(statistics.fmean(r.get(n, 0.0) for r in plain), 4) for n in names},
            "collections": self._collector.per_step(counts["plain"]),
            "threads": THREADS,
            "functions": functions(self._python, counts["python"]),
            "operators": operators(self._torch, counts["torch"]),
            **on_gpu(self._torch.events(), counts["torch"]),
        }

    def _profiler(self, name: str) -> AbstractContextManager[Any]:
        """What looks on while it is open."""
        if name == "torch":
            self._torch = make_torch_profiler()
        looks: dict[str, AbstractContextManager[Any]] = {
            "plain": self._collector.counting(), "python": self._python, "torch": self._torch
        }  # fmt: skip
        return looks[name]


# --- what looks on ----------------------------------------------------------------------------------------------------


class Collector:
    """Counts Python's garbage collections and their time, by generation, while it is one of `gc.callbacks`."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self._started: float | None = None

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        elif self._started is not None:
            self._count[info["generation"]] += 1
            self._seconds[info["generation"]] += time.perf_counter() - self._started
            self._started = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        gc.callbacks.append(self)
        try:
            yield
        finally:
            gc.callbacks.remove(self)

    def per_step(self, steps: int) -> list[dict[str, float]]:
        return [
            {
                "generation": generation,
                "collections": round(self._count[generation] / steps, 2),
                "ms": round(1e3 * self._seconds[generation] / steps, 3),
            }
            for generation in range(3)
        ]


def make_torch_profiler() -> Any:
    import torch
    from torch.profiler import ProfilerActivity, profile

    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(activities=[ProfilerActivity.CPU, *gpu])


def functions(profiler: cProfile.Profile, steps: int) -> list[dict[str, Any]]:
    """The Python functions that take most time themselves, the longest first; `ms` with what they call."""
    entries = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    longest = sorted(entries, key=lambda entry: -entry[1][2])[:LISTED]
    return [
        {
            "function": function_name(*where),
            "own_ms": round(1e3 * own / steps, 3),
            "ms": round(1e3 * whole / steps, 3),
            "calls": round(calls / steps, 1),
        }
        for where, (_, calls, own, whole, _) in longest
    ]


def function_name(file: str, line: int, name: str) -> str:
    """Without what differs between machines and between runs: where packages lie, and addresses."""
    name = re.sub(r" at 0x[0-9a-fA-F]+", "", name)
    return name if file == "~" else f"{short(file)}:{line} {name}"


def short(file: str) -> str:
    """A file's path from the folder that it is imported from; its last two parts where that is not known."""
    path = Path(file)
    roots = sorted((Path(one) for one in (*sys.path, str(ROOT)) if one), key=lambda root: -len(root.parts))
    root = next((one for one in roots if path.is_relative_to(one)), None)
    return path.relative_to(root).as_posix() if root else "/".join(path.parts[-2:])


def operators(profiler: Any, steps: int) -> list[dict[str, Any]]:
    """The operators that take most time of a processor themselves, calls of the CUDA runtime among them."""
    import torch

    entries = [one for one in profiler.key_averages() if one.device_type == torch.autograd.DeviceType.CPU]
    longest = sorted(entries, key=lambda one: -one.self_cpu_time_total)[:LISTED]
    return [
        {
            "operator": one.key,
            "own_ms": round(one.self_cpu_time_total / 1e3 / steps, 3),
            "gpu_ms": round(one.self_device_time_total / 1e3 / steps, 3),
            "calls": round(one.count / steps, 1),
        }
        for one in longest
    ]


def on_gpu(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Launches by name, and milliseconds in which the GPU had something to do; None where there was none."""
    import torch

    launches: Counter[str] = Counter()
    spans = []
    for one in events:
        if one.device_type == torch.autograd.DeviceType.CPU:
            launches.update([one.name] if _LAUNCH.match(one.name) else [])
        # A range that the program has named is on the GPU's time line as well, gaps between kernels included.
        elif not one.is_user_annotation and not one.name.startswith(("Memcpy DtoH", "Memcpy HtoD")):
            spans.append((one.time_range.start, one.time_range.end))
    return {
        "launches": {name: round(count / steps, 1) for name, count in launches.most_common()},
        "busy_ms": round(busy_and_idle(spans)["busy_ms"] / steps, 3) if spans else None,
    }


# --- on the console ---------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    """Tables of what a result holds."""
    print("\nseconds of a step by part:", json.dumps(result["parts"]))
    print("seconds of a step:", json.dumps(result["seconds"]))
    for one in result["collections"]:
        print(f"collections of generation {one['generation']}: {one['collections']} a step, {one['ms']} ms")
    print("\ncProfile sees", result["threads"])
    print(f"{'own ms':>10} {'ms':>10} {'calls':>10}  Python function")
    for one in result["functions"]:
        print(f"{one['own_ms']:10.3f} {one['ms']:10.3f} {one['calls']:10.1f}  {one['function']}")
    print(f"\n{'own ms':>10} {'GPU ms':>10} {'calls':>10}  operator")
    for one in result["operators"]:
        print(f"{one['own_ms']:10.3f} {one['gpu_ms']:10.3f} {one['calls']:10.1f}  {one['operator']}")
    print("\nlaunches a step:", json.dumps(result["launches"]))
    print("busy ms of the GPU a step:", result["busy_ms"])


if __name__ == "__main__":
    main()
