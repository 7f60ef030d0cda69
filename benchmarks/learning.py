"""Learning curves of an example on several seeds: held-out score before and after, and the reward of every step.

    python benchmarks/learning.py                     # runs seeds 0, 1, 2 of the demo one after the other
    python benchmarks/learning.py --collect RUN …     # only collects runs that were made before

On a GPU, and with two ways to compute, three runs at a time:

    python benchmarks/learning.py --variant tandem= --variant tandem-plain=train.fused_layers=false --parallel 3

With `--example preferences_dpo --seeds 0` the same for another config of examples/; preference tuning has the held-out
margin as its score. Writes `benchmarks/results/NAME-DEVICE-DATE.json` (NAME is demo for the demo) and a plot beside it.
Seconds are those of training steps alone; runs that share the machine slow each other down.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo-results -->", "<!-- /demo-results -->"
DEMO = "arithmetic"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", default=DEMO)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo-seeds")
    parser.add_argument("--variant", action="append", metavar="NAME=[KEY=VALUE,…]", help="a name and config overrides")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--collect", type=Path, nargs="+", help="run folders to collect instead of running")
    arguments = parser.parse_args()
    if arguments.collect:
        runs = [(run.name.rpartition("-seed")[0] or "tandem", run) for run in arguments.collect]
    else:
        variants = [variant.partition("=")[::2] for variant in arguments.variant or ["tandem="]]
        jobs = [(name, options, seed) for name, options in variants for seed in arguments.seeds]
        with ThreadPool(arguments.parallel) as pool:
            runs = pool.starmap(lambda *job: (job[0], train(arguments.example, *job, arguments.output)), jobs)
    rows = [{"system": name} | row_of(run) for name, run in runs]
    name = "demo" if arguments.example == DEMO else arguments.example
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    short, device = device_names()
    target = arguments.results / f"{name}-{short}-{today}.json"
    names = ("torch", "transformers", "peft", "tandem-rl")
    result = {
        "bench": name,
        "device": device,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
        "command": "python benchmarks/learning.py " + " ".join(sys.argv[1:]),
        "rows": rows,
    }
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, target.with_suffix(".png"))
    if arguments.example == DEMO and short == "cpu":
        write_readme(result, target)
    for row in rows:
        gain = f"{row['score_before']:.3f} -> {row['score_after']:.3f}"
        print(f"{row['system']} seed {row['seed']}: {gain} in {row['seconds']:.0f} s")
    print(target)


def device_names() -> tuple[str, str]:
    """Short, for a file's name, and in words."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return name.split()[1].lower(), name
    return "cpu", f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def train(example: str, system: str, options: str, seed: int, output: Path) -> Path:
    """Run one seed in a process of its own, as a user would; returns its run folder."""
    run = f"{system}-seed{seed}"
    command = [sys.executable, "-c", "from tandem.rl.cli import main; main()", "run", f"examples/{example}.yaml"]
    overrides = [f"seed={seed}", f"output_dir={output}", f"run_name={run}", *filter(None, options.split(","))]
    subprocess.run([*command, *overrides], check=True, cwd=ROOT)
    return output / run


def row_of(run: Path) -> dict:
    """One flat row of the result, with the reward of every step."""
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("score_before", "score_after", "steps", "seconds", "tokens_per_second", "num_tokens")
    return {
        "model": config["model"]["model_name_or_path"],
        "seed": config["seed"],
        **{key: summary[key] for key in keys},
        "rewards": [line.get("reward", line.get("rewards/margins")) for line in lines if "step_time" in line],
    }


def table(result: dict, target: Path) -> str:
    """The README's table of a result."""
    lines = [
        "| seed | held-out score before | after | seconds of training | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        scores = f"{row['score_before']:.2f} | {row['score_after']:.2f}"
        lines.append(f"| {row['seed']} | {scores} | {row['seconds']:.0f} | {row['tokens_per_second']:.0f} |")
    name = target.relative_to(ROOT).as_posix()
    lines += ["", f"{result['device']}, torch {result['versions']['torch']}; from [{target.name}]({name})."]
    return "\n".join(lines)


def write_readme(result: dict, target: Path) -> None:
    """Put the table between the README's markers, so that its numbers are those of the file."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{table(result, target)}\n{END}{after}", encoding="utf-8")


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        gain = f"held-out {row['score_before']:.2f} → {row['score_after']:.2f}"
        label = f"{row.get('system', 'tandem')}, seed {row['seed']}: {gain}"
        axes.plot(range(1, len(row["rewards"]) + 1), row["rewards"], label=label)
    axes.set(xlabel="step", ylabel="mean reward (or margin) of the batch")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
