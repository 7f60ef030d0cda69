"""The demo's learning curve on several seeds: held-out score before and after, and the reward of every step.

    python benchmarks/demo_seeds.py                     # runs seeds 0, 1, 2 of the demo one after the other
    python benchmarks/demo_seeds.py --collect RUN …     # only collects runs that were made before

Writes `benchmarks/results/demo-cpu-DATE.json` and a plot beside it. Seconds are those of training steps alone.
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
COMMAND = "rl-train run examples/arithmetic.yaml seed=N"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo-seeds")
    parser.add_argument("--collect", type=Path, nargs="+", help="run folders to collect instead of running")
    arguments = parser.parse_args()
    runs = arguments.collect or [train(seed, arguments.output) for seed in arguments.seeds]
    rows = [row_of(run) for run in runs]
    today = datetime.date.today().isoformat()
    target = ROOT / "benchmarks" / "results" / f"demo-cpu-{today}.json"
    names = ("torch", "transformers", "peft", "tandem-rl")
    result = {
        "bench": "demo_seeds",
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}},
        "command": COMMAND,
        "rows": rows,
    }
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, target.with_suffix(".png"))
    write_readme(result, target)
    for row in rows:
        print(f"seed {row['seed']}: {row['score_before']:.3f} -> {row['score_after']:.3f} in {row['seconds']:.0f} s")
    print(target)


def train(seed: int, output: Path) -> Path:
    """Run one seed in a process of its own, as a user would; returns its run folder."""
    command = [sys.executable, "-c", "from tandem.rl.cli import main; main()", "run", "examples/arithmetic.yaml"]
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
        "rewards": [line["reward"] for line in lines if "reward" in line],
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
    axes.set(xlabel="step", ylabel="mean reward of the batch (at most 1.2)", title="GRPO on the demo's sums")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
