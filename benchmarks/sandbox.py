"""Throughput of the code sandbox: many short programs, against the ideal rate of the cores and the bare interpreter.

    python benchmarks/sandbox.py                      # 2,000 programs of 50 ms on 2 cores
    python benchmarks/sandbox.py --programs 200 --cores 4

Two programs: one computes for 50 ms of CPU time, one waits 50 ms. The ideal rate of `--cores` cores is one program per
core and 50 ms, with nothing for starting an interpreter or a sandbox. `bare` starts the same interpreter on the same
program without any protection, as many at a time; it is run in turns with the sandbox, 100 programs each, so that a
machine with other work slows down both. Rates are over the sum of the turns. `cpu_ms` is the CPU time per program of
this process and all that it starts, as a control group of their own counts it (null where none may be made), and
`overhead_cpu_ms` the same without what the program computes: the machine's other work is not in them, and neither is
what the kernel does later in threads of its own, such as taking namespaces apart.

Writes `benchmarks/results/sandbox-cpu-DATE.json` and the table of docs/sandbox.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tandem.rewards.sandbox import Sandbox
from tandem.rewards.sandbox_check import protections
from tandem.rewards.sandbox_job import interpreter

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- sandbox-results -->", "<!-- /sandbox-results -->"
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
    systems: dict[str, Callable[[str, int], None]] = {
        "tandem": lambda source, count: confined(sandbox, source, count),
        "bare": lambda source, count: bare(sandbox.workers, source, count),
    }
    rows = []
    with cpu_clock() as clock:
        sandbox.map(["print(1)"] * sandbox.workers)  # the first one starts the interpreter that the others are forks of
        for name, source in PROGRAMS.items():
            seconds, busy = measure(systems, source, arguments.programs, clock)
            for system in systems:
                spent = seconds[system], busy[system] if clock() is not None else None
                rows.append(row(system, name, arguments.programs, cores, sandbox.workers, *spent))
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
    if target.parent == ROOT / "benchmarks" / "results":
        page = ROOT / "docs" / "sandbox.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n{table(result, target)}\n{END}{after}", encoding="utf-8")


def table(result: dict, target: Path) -> str:
    """The table of docs/sandbox.md."""
    found = {(row["program"], row["system"]): row for row in result["rows"]}
    lines = [
        "| program | sandbox | bare interpreter | CPU beside the program's own: sandbox | bare |",
        "|---|---|---|---|---|",
    ]
    for name in PROGRAMS:
        words = f"{name} {SECONDS * 1e3:.0f} ms"
        pair = [found[words, system] for system in ("tandem", "bare")]
        rates = [f"{row['programs_per_s']:.1f} per second, {row['share_of_ideal']:.0%}" for row in pair]
        costs = ["?" if row["overhead_cpu_ms"] is None else f"{row['overhead_cpu_ms']:.1f} ms" for row in pair]
        lines.append(f"| {words} | {' | '.join(rates)} | {' | '.join(costs)} |")
    first = result["rows"][0]
    load = max(row["load_average"] for row in result["rows"])
    at_a_time = f"{first['programs']:,} programs on {first['cores']} cores, {first['workers']} at a time"
    lines += [
        "",
        f"{at_a_time}, load average up to {load:.1f}; from",
        f"[{target.name}](../benchmarks/results/{target.name}).",
    ]
    return "\n".join(lines)


def measure(
    systems: dict[str, Callable[[str, int], None]], source: str, count: int, clock: Callable[[], float | None]
) -> tuple[dict[str, float], dict[str, float]]:
    """Wall seconds, and CPU seconds by `clock`, of each system on `count` programs, in turns."""
    seconds, busy = dict.fromkeys(systems, 0.0), dict.fromkeys(systems, 0.0)
    for start in range(0, count, TURN):
        for system, run in systems.items():
            began, busy_before = time.perf_counter(), clock() or 0.0
            run(source, min(TURN, count - start))
            seconds[system] += time.perf_counter() - began
            busy[system] += (clock() or 0.0) - busy_before
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


@contextlib.contextmanager
def cpu_clock() -> Iterator[Callable[[], float | None]]:
    """A function that tells the CPU seconds of this process and all that it starts; None where that is not allowed."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()]
    mounted = Path("/sys/fs/cgroup")
    places = [mounted / "cpuacct" / path.strip("/") for _, names, path in lines if "cpuacct" in names.split(",")]
    places += [mounted / path.strip("/") for _, names, path in lines if not names]
    group = places[0] / f"tandem-sandbox-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    except OSError:
        yield lambda: None
        return

    def read() -> float:
        if (group / "cpuacct.usage").exists():
            return int((group / "cpuacct.usage").read_text(encoding="ascii")) / 1e9
        return int((group / "cpu.stat").read_text(encoding="ascii").split()[1]) / 1e6

    try:
        yield read
    finally:
        for pid in (group / "cgroup.procs").read_text(encoding="ascii").split():
            (places[0] / "cgroup.procs").write_text(pid, encoding="ascii")
        group.rmdir()


def row(system: str, program: str, count: int, cores: int, workers: int, seconds: float, busy: float | None) -> dict:
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
        "cpu_ms": None if busy is None else round(busy / count * 1e3, 1),
        "overhead_cpu_ms": None if busy is None else round((busy / count - own) * 1e3, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
