"""Learning curves of an example on several seeds: held-out score before and after, and the reward of every step.

    python benchmarks/learning.py                     # runs seeds 0, 1, 2 of the demo one after the other
    python benchmarks/learning.py --collect RUN …     # only collects runs that were made before

With `--example preferences_dpo --seeds 0` the same for another config of examples/; preference tuning has the held-out
margin as its score. Writes `benchmarks/results/NAME-cpu-DATE.json` (NAME is demo for the demo) and a plot beside it.
Seconds are those of training steps alone.
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
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo-results -->", "<!-- /demo-results -->"
DEMO = "arithmetic"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", default=DEMO)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo-seeds")
    parser.add_argument("--collect", type=Path, nargs="+", help="run folders to collect instead of running")
    arguments = parser.parse_args()
    runs = arguments.collect or [train(arguments.example, seed, arguments.output) for seed in arguments.seeds]
    rows = [row_of(run) for run in runs]
    name = "demo" if arguments.example == DEMO else arguments.example
    today = datetime.date.today().isoformat()
    target = ROOT / "benchmarks" / "results" / f"{name}-cpu-{today}.json"
    names = ("torch", "transformers", "peft", "tandem-rl")
    result = {
        "bench": name,
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}},
        "command": f"rl-train run examples/{arguments.example}.yaml seed=N",
        "rows": rows,
    }
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, target.with_suffix(".png"))
    if arguments.example == DEMO:
        write_readme(result, target)
    for row in rows:
        print(f"seed {row['seed']}: {row['score_before']:.3f} -> {row['score_after']:.3f} in {row['seconds']:.0f} s")
    print(target)


def train(example: str, seed: int, output: Path) -> Path:
    """Run one seed in a process of its own, as a user would; returns its run folder."""
    command = [sys.executable, "-c", "from tandem.rl.cli import main; main()", "run", f"examples/{example}.yaml"]
    subprocess.run([*command, f"seed={seed}", f"output_dir={output}", f"run_name=seed{seed}"], check=True, cwd=ROOT)
    return output / f"seed{seed}"


def row_of(run: Path) -> dict:
    """One flat row of the result, with the reward of every step."""
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("score_before", "score_after", "steps", "seconds", "tokens_per_second", "num_tokens")
    return {
        "system": "tandem",
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
        label = f"seed {row['seed']}: held-out {row['score_before']:.2f} → {row['score_after']:.2f}"
        axes.plot(range(1, len(row["rewards"]) + 1), row["rewards"], label=label)
    axes.set(xlabel="step", ylabel="mean reward (or margin) of the batch")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
