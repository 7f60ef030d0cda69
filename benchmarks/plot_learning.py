"""The picture of learning curves, from rows that are already measured (see learning_vs_trl.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {"tandem": "C0", "trl": "C1"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Reward of every step (lines) and held-out score (dots), by samples and by seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labelled = set()
    for row in (one for one in result["rows"] if one["curve"]):
        name = f"{row['system']} ({row['engine']})"
        style = "--" if row["system"] == "trl" and row["engine"] == "transformers" else "-"
        for axes, along in zip(panels, ("samples", "seconds"), strict=True):
            label = None if name in labelled else name
            points = [one[along] for one in row["curve"]], [one["reward"] for one in row["curve"]]
            axes.plot(*points, style, color=COLORS[row["system"]], alpha=0.7, linewidth=1.2, label=label)
            dots = [one[along] for one in row["scores"]], [one["score"] for one in row["scores"]]
            axes.plot(*dots, "o", color=COLORS[row["system"]], alpha=0.5, markersize=3.5)
            axes.set(xlabel="completions sampled" if along == "samples" else "seconds of training steps")
            if along == "seconds":
                labelled.add(name)
    panels[0].set(ylabel="mean reward of a step; dots: held-out score")
    for axes in panels:
        axes.axhline(result["target"], color="0.6", linewidth=0.8, linestyle=":")
    panels[0].legend()
    figure.suptitle(f"{', '.join(sorted({one['model'] for one in result['rows']}))} on {result['device']}")
    figure.savefig(path, dpi=120)
