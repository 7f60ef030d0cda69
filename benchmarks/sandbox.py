"""Throughput of the code sandbox: many short programs, against the ideal rate of the cores and the bare interpreter.

    python benchmarks/sandbox.py                      # 2,000 programs of 50 ms on 2 cores
    python benchmarks/sandbox.py --programs 200 --cores 4

Two programs: one computes for 50 ms of CPU time, one waits 50 ms. The ideal rate of `--cores` cores is one program per
core and 50 ms, with nothing for starting an interpreter or a sandbox. `bare` starts the same interpreter on the same
program without any protection, as many at a time; it is run in turns with the sandbox, 100 programs each, so that a
machine with other work slows down both. Rates are over the sum of the turns. `machine_cpu_ms` is the CPU time of the
whole machine per program, `overhead_cpu_ms` the same without what the program computes: meaningful on a quiet machine.

Writes `benchmarks/results/sandbox-cpu-DATE.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tandem.rewards.sandbox import Sandbox
from tandem.rewards.sandbox_check import protections
from tandem.rewards.sandbox_job import interpreter

ROOT = Path(__file__).parents[1]
SECONDS = 0.05
TURN = 100
PROGRAMS = {
    "computes": "from time import process_time as now\n"
    f"end = now() + {SECONDS}\nwhile now() < end:\n    pass\nprint(1)",
    "waits": f"import time\ntime.sleep({SECONDS})\nprint(1)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--cores", type=int, default=2, help="cores that this process and its programs may use")
    parser.add_argument("--workers", type=int, help="programs at a time; without it the sandbox's default")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    cores = len(os.sched_getaffinity(0))
    sandbox = Sandbox(arguments.workers)
    sandbox.map(["print(1)"] * sandbox.workers)  # the first one starts the interpreter that the others are forked from
    systems: dict[str, Callable[[str, int], None]] = {
        "tandem": lambda source, count: confined(sandbox, source, count),
        "bare": lambda source, count: bare(sandbox.workers, source, count),
    }
    rows = []
    for name, source in PROGRAMS.items():
        seconds, busy = measure(systems, source, arguments.programs)
        for system in systems:
            rows.append(row(system, name, arguments.programs, cores, sandbox.workers, seconds[system], busy[system]))
            print(json.dumps(rows[-1]))
    result = {
        "bench": "sandbox",
        "device": f"CPU, {cores} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "linux": platform.release()},
        "protections": {p.name: p.in_force for p in protections()},
        "command": "python benchmarks/sandbox.py " + " ".join(sys.argv[1:]),
        "rows": rows,
    }
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    target = arguments.results / f"sandbox-cpu-{today}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(target)


def measure(
    systems: dict[str, Callable[[str, int], None]], source: str, count: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Wall seconds, and CPU seconds of the whole machine, of each system on `count` programs, in turns."""
    seconds, busy = dict.fromkeys(systems, 0.0), dict.fromkeys(systems, 0.0)
    for start in range(0, count, TURN):
        for system, run in systems.items():
            began, busy_before = time.perf_counter(), machine_cpu()
            run(source, min(TURN, count - start))
            seconds[system] += time.perf_counter() - began
            busy[system] += machine_cpu() - busy_before
    return seconds, busy


def confined(sandbox: Sandbox, source: str, count: int) -> None:
    failed = [outcome for outcome in sandbox.map([source] * count) if (outcome.status, outcome.stdout) != ("ok", "1\n")]
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} programs failed, such as {failed[0]}")


def bare(workers: int, source: str, count: int) -> None:
    def run(_: int) -> None:
        command = [interpreter(), "-I", "-S", "-c", source]
        done = subprocess.run(command, env={}, capture_output=True, text=True, check=True)
        assert done.stdout == "1\n"

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(count)))


def machine_cpu() -> float:
    """CPU seconds that all processes of the machine have used; on a quiet machine those are ours."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def row(system: str, program: str, count: int, cores: int, workers: int, seconds: float, busy: float) -> dict:
    ideal = cores / SECONDS
    own = SECONDS if program == "computes" else 0.0
    return {
        "system": system,
        "program": f"{program} {SECONDS * 1e3:.0f} ms",
        "programs": count,
        "cores": cores,
        "workers": workers,
        "seconds": round(seconds, 3),
        "programs_per_s": round(count / seconds, 2),
        "share_of_ideal": round(count / seconds / ideal, 3),
        "machine_cpu_ms": round(busy / count * 1e3, 1),
        "overhead_cpu_ms": round((busy / count - own) * 1e3, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
