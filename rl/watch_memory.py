"""What reward watch remembers of earlier rollouts; a checkpoint keeps it, so that a resumed run says the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Observation:
    """One rollout, in a few numbers. None: not known for it.

    Attributes:
        means: mean of `reward` (the total), `length` (sampled tokens) and `rewards/NAME` (trained or watched).
        spreads: standard deviation over the completions, likewise.
        correlations: within groups, by `pair_key`.
        levels: shares by the name of their metric: repetition, duplicates, collapsed_groups.
    """

    means: dict[str, float | None] = field(default_factory=dict)
    spreads: dict[str, float | None] = field(default_factory=dict)
    correlations: dict[str, float | None] = field(default_factory=dict)
    levels: dict[str, float | None] = field(default_factory=dict)


@dataclass
class WatchMemory:
    """Everything that is remembered.

    Attributes:
        rollouts: the newest ones, oldest first.
        extremes: smallest and largest value of one completion since the start of the run, by the names of
            `Observation.means`.
        said: step at which each alert was last raised. raised: alerts since the start.
    """

    rollouts: list[Observation] = field(default_factory=list)
    extremes: dict[str, list[float]] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    raised: int = 0

    @classmethod
    def of(cls, raw: dict[str, Any]) -> WatchMemory:
        """From what `dataclasses.asdict` gave."""
        return cls(**{**raw, "rollouts": [Observation(**rollout) for rollout in raw.get("rollouts", [])]})


def pair_key(first: str, second: str) -> str:
    return f"{first} ~ {second}"
