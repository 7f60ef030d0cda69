"""Writes the table of what the examples for GPUs need, from their plans, in `plan.md` and the README; needs no GPU.

Run it after a change of the plan or of an example (`make docs`); a test compares.
"""

from __future__ import annotations

from pathlib import Path

from tandem.rl.config_file import load_config
from tandem.rl.plan_devices import GIB, find_device
from tandem.rl.plan_shape import read_shape
from tandem.rl.plan_sizing import choose_sizes

TARGETS = (Path(__file__).parent / "plan.md", Path(__file__).parents[1] / "README.md")
BEGIN, END = "<!-- example-plans -->", "<!-- /example-plans -->"
EXAMPLES = Path(__file__).parents[1] / "examples"
# Ending of an example's name: the card that it is planned for, and host memory in GiB.
CARDS = {"_24gb": ("4090", 64), "_80gb": ("h100", 256)}


def table() -> str:
    """One row an example: prompt + completion, peaks, sequences at once, pack, the longest that would fit, seconds."""
    lines = [
        "| example | card | prompt + completion | training, GiB | rollout, GiB | host, GiB | pack | at once | longest "
        "| s a step (rollout) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ending, (card, host) in CARDS.items():
        for path in sorted(EXAMPLES.glob(f"*{ending}.yaml")):
            config = load_config(path)
            sizing = choose_sizes(read_shape(config.model), config, find_device(card, host_gib=host))
            plan, roomiest = sizing.plan, sizing.roomiest
            rollout = plan.rollout()
            assert rollout is not None, f"{path.name} generates nothing"
            cells = [
                f"[{path.stem}](../examples/{path.name})",
                card,
                f"{plan.work.prompt:,} + {plan.work.completion:,}",
                f"{plan.training().bytes / GIB:.1f}",
                f"{rollout.bytes / GIB:.1f}",
                f"{sum(plan.host.values()) / GIB:.1f}",
                f"{plan.config.train.max_tokens:,}",
                f"{min(plan.in_flight, plan.work.in_flight)} of {plan.work.in_flight}",
                f"{roomiest.longest:,} ({roomiest.binding})",
                f"{sum(plan.seconds.values()):,.0f} ({plan.rollout_seconds:,.0f})",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render(target: Path) -> str:
    """The text of `target` with the table of today."""
    before, _, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    rows = table() if target.parent == Path(__file__).parent else table().replace("(../", "(")
    return f"{before}{BEGIN}\n{rows}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for target in TARGETS:
        target.write_text(render(target), encoding="utf-8")
        print(f"wrote {target}")
