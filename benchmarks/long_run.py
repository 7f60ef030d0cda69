"""What grows in a long run: memory, open files, journal and metrics by step, and how long a resume takes after it.

    python benchmarks/long_run.py                            # 2,000 steps of GRPO on a model of a few thousand weights
    python benchmarks/long_run.py --steps 200 --device cuda  # the same on a GPU, with its memory
    python benchmarks/long_run.py --model Qwen/Qwen3-0.6B --steps 200 --device cuda

Everything is read from inside the run: its reward function logs resident memory, threads, open files and, on a GPU,
what PyTorch has allocated, once a step and at the same place in it, so that `metrics.jsonl` holds them. `growth`
compares the means of the last quarter and the second one (the first holds warm-up of allocators and caches), per step.
Seconds to the first step are those from the start of the command to the line that it prints after a step, imports
included; where other work shares the machine, the processor's seconds say more.

Writes `benchmarks/results/long_run-DEVICE-DATE.json`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from tiny_run import write_place  # noqa: E402
from update import store  # noqa: E402

REWARD = """
import os
from pathlib import Path

import torch


def measured(completions, log_metric, **columns):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    log_metric("memory/resident_mib", int(status["VmRSS"].split()[0]) / 1024)
    log_metric("memory/threads", int(status["Threads"]))
    log_metric("memory/open_files", len(os.listdir("/proc/self/fd")))
    if torch.cuda.is_available():
        log_metric("memory/cuda_allocated_mib", torch.cuda.memory_allocated() / 2**20)
        log_metric("memory/cuda_reserved_mib", torch.cuda.memory_reserved() / 2**20)
    return [float(len(set(text.split()))) for text in completions]
"""
MEASURED = ("resident_mib", "threads", "open_files", "cuda_allocated_mib", "cuda_reserved_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="another model than the tests' random one")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further values of the config")
    parser.add_argument("--folder", type=Path, help="where to keep the run; without it, it is removed")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if arguments.steps < 8:
        parser.error("a growth can be seen from 8 steps on")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, arguments)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    target = arguments.results / f"long_run-{device_name(arguments.device)[0]}-{today}.json"
    store(target, result)
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))
    print(target)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run, resume for one step more, write the report; what was seen."""
    steps, config = arguments.steps, config_of(folder, arguments)
    run = folder / "runs" / "long"
    first = timed(["run", config, *arguments.set], until=f"step {' ' * (len(str(steps)) - 1)}1/{steps}")
    size = {name: (run / name).stat().st_size for name in ("journal.jsonl", "metrics.jsonl")}
    files = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "step_time" in record]
    assert len(records) == steps, "a record is missing"
    resumed = timed(["resume", run, f"train.max_steps={steps + 1}"], until=f"step {steps + 1}/{steps + 1}")
    report = timed(["report", run])
    return {
        "bench": "long_run",
        "device": device_name(arguments.device)[1],
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "peft")}},
        "command": " ".join(["python benchmarks/long_run.py", *sys.argv[1:]]),
        "model": arguments.model or "tests/tiny_run.py",
        "steps": steps,
        "mean_step_seconds": mean([r["step_time"] for r in records]),
        "run": first,
        "resume": resumed,
        "report": report,
        "run_folder": {"files": len(files), "bytes": sum(files)},
        "bytes_per_step": {name: round(value / steps, 1) for name, value in size.items()},
        "growth": growth(records),
        "load_average": round(os.getloadavg()[0], 2),
        "samples": samples(records),
    }


def config_of(folder: Path, arguments: argparse.Namespace) -> Path:
    path = write_place(folder)
    (folder / "measured.py").write_text(REWARD, encoding="utf-8")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = arguments.steps
    config |= {"run_name": "long", "warmup": {"max_steps": 0}}
    config["model"] |= {"device": arguments.device} | (
        {"model_name_or_path": arguments.model} if arguments.model else {}
    )
    config["rewards"] = {"reward_funcs": ["measured.py:measured"]}
    config["train"] = {"max_steps": steps, "generation_batch_size": 16}
    config["optim"] = {"learning_rate": 1e-4}
    config["eval"]["eval_steps"] = max(steps // 4, 1)
    config["checkpoint"] = {"save_steps": max(steps // 20, 1), "save_total_limit": 2}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def timed(arguments: list[object], until: str | None = None) -> dict[str, float]:
    """Run `rl-train`; seconds until a line that begins so, and until its end."""
    command = [sys.executable, "-m", "tandem.rl.cli", *map(str, arguments)]
    started, used, found, said = time.monotonic(), cpu_seconds(), {}, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if until and line.startswith(until) and not found:
                times = psutil.Process(process.pid).cpu_times()
                found["first_step_after_seconds"] = round(time.monotonic() - started, 2)
                found["first_step_after_cpu_seconds"] = round(times.user + times.system, 2)
    if process.returncode or (until and not found):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said[-30:])}")
    spent = {"seconds": time.monotonic() - started, "cpu_seconds": cpu_seconds() - used}
    return found | {name: round(value, 2) for name, value in spent.items()}


def cpu_seconds() -> float:
    """Of the commands that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def growth(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each measured number: its mean in the second and in the last quarter, and the difference per step."""
    quarter = len(records) // 4
    found = {}
    for name in MEASURED:
        values = [record[f"memory/{name}"] for record in records if f"memory/{name}" in record]
        if values:
            early, late = mean(values[quarter : 2 * quarter]), mean(values[-quarter:])
            steps = len(records) - 2 * quarter  # between the middles of the two
            found[name] = {"second_quarter": early, "last_quarter": late, "per_step": round((late - early) / steps, 6)}
    return found


def samples(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured numbers at some twenty steps."""
    every = max(len(records) // 20, 1)
    return [
        {"step": r["step"], **{n: r[f"memory/{n}"] for n in MEASURED if f"memory/{n}" in r}}
        for r in [records[0], *records[every - 1 :: every]]
    ]


def mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def device_name(device: str) -> tuple[str, str]:
    """Of a file, and in full."""
    if device == "cpu":
        return "cpu", f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    name = torch.cuda.get_device_name()
    return next((card for card in ("h100", "h200", "a100", "4090") if card in name.lower()), "gpu"), name


def version(name: str) -> str:
    return importlib.metadata.version(name)


if __name__ == "__main__":
    main()
