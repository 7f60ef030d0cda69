"""The measures of reward watch: correlations within groups, equal completions, and trends over rollouts.

Pure functions of numbers; what they mean for a run is in `watch_alerts`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

# What is left of a constant after its mean was taken away is rounding, not variation.
_ROUNDING = 1e-9


def correlation(first: Sequence[float | None], second: Sequence[float | None], groups: Sequence[int]) -> float | None:
    """Pearson's correlation of what two values differ by from their means in the group, over all rows where both are
    known: whether the one that gets more than its siblings also has more of the other. Groups that are hard, and thus
    long and badly rewarded throughout, make none.

    Args:
        first, second: a value per row, None where there is none.
        groups: number of the group of each row.

    Returns:
        A number in [-1, 1]; None where one of them does not vary within any group.
    """
    known = [(a, b, g) for a, b, g in zip(first, second, groups, strict=True) if a is not None and b is not None]
    if len(known) < 2:
        return None
    a, b, numbers = (np.array(column) for column in zip(*known, strict=True))
    _, group = np.unique(numbers, return_inverse=True)
    x, y = _centred(a.astype(np.float64), group), _centred(b.astype(np.float64), group)
    if x is None or y is None:
        return None
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _centred(values: np.ndarray, group: np.ndarray) -> np.ndarray | None:
    """Differences from the group's mean, scaled to at most 1; None if there are none."""
    means = np.bincount(group, weights=values) / np.bincount(group)
    rest = values - means[group]
    largest = float(np.abs(rest).max())
    return None if largest <= _ROUNDING * float(np.abs(values).max()) else rest / largest


def duplicate_share(completions: Sequence[Hashable], groups: Sequence[int]) -> float | None:
    """The share of completions that are not the first of their kind in their group, mean over groups.

    0 where all differ, 1 where all of a group are the same: of n completions at most n - 1 are repeats. None where no
    group has two.
    """
    shares = [(len(members) - len(set(members))) / (len(members) - 1) for members in _several(completions, groups)]
    return math.fsum(shares) / len(shares) if shares else None


def collapsed_share(
    completions: Sequence[Hashable], rewards: Sequence[float | None], groups: Sequence[int], best: float
) -> float | None:
    """The share of groups whose completions are all the same and whose reward is below `best`: sampling has nothing to
    choose from there. A group that is all the same and good has merely been learned. None where no group has two."""
    pairs = list(zip(completions, (-math.inf if r is None else r for r in rewards), strict=True))
    collapsed = [
        len({completion for completion, _ in members}) == 1 and max(reward for _, reward in members) < best
        for members in _several(pairs, groups)
    ]
    return sum(collapsed) / len(collapsed) if collapsed else None


def _several(items: Sequence, groups: Sequence[int]) -> list[list]:
    """The members of every group that has more than one."""
    members: dict[int, list] = {}
    for item, group in zip(items, groups, strict=True):
        members.setdefault(group, []).append(item)
    return [found for found in members.values() if len(found) > 1]


def near_best(lowest: float, highest: float, share: float = 0.9) -> float:
    """From where on a value counts as good, when these are the smallest and the largest seen: 90% of the way up. 0
    belongs to every scale: a reward that never gave more is not good, a penalty that never applied is.

    Returns:
        The value; infinite for a reward that has been 0 throughout.
    """
    low, high = min(lowest, 0.0), max(highest, 0.0)
    return low + share * (high - low) if high > low else math.inf


@dataclass(frozen=True)
class Change:
    """How a value moved from the older to the newer half of some rollouts.

    Attributes:
        before, after: means of the halves.
        effect: the difference in standard deviations of one completion's value (Cohen's d).
        t: Welch's t of the difference, from the means per rollout.
    """

    before: float
    after: float
    effect: float
    t: float

    @property
    def growth(self) -> float:
        """The difference as a share of `before`; infinite from nothing."""
        difference = self.after - self.before
        return difference / abs(self.before) if self.before else math.copysign(math.inf, difference or -1.0)

    def rises(self, t: float, effect: float) -> bool:
        return self.t >= t and self.effect >= effect

    def falls(self, t: float, effect: float) -> bool:
        return -self.t >= t and -self.effect >= effect


def change(means: Sequence[float], spreads: Sequence[float]) -> Change | None:
    """Compare the newer half of a series with the older half; the middle one of an odd number is left out.

    Args:
        means: mean per rollout, oldest first. spreads: standard deviation over the completions of each.

    Returns:
        None for fewer than four rollouts.
    """
    half = len(means) // 2
    if half < 2:
        return None
    old, new = np.array(means[:half], dtype=np.float64), np.array(means[-half:], dtype=np.float64)
    difference = float(new.mean() - old.mean())
    between = float(old.var(ddof=1) + new.var(ddof=1))
    within = float(np.mean(np.square(np.array(spreads, dtype=np.float64))))
    return Change(
        before=float(old.mean()),
        after=float(new.mean()),
        effect=_ratio(difference, math.sqrt(within + between / 2)),
        t=_ratio(difference, math.sqrt(between / half)),
    )


def _ratio(difference: float, deviation: float) -> float:
    if deviation > 0.0:
        return difference / deviation
    return math.copysign(math.inf, difference) if difference else 0.0


def mean_known(values: Sequence[float | None]) -> float | None:
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
