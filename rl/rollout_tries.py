"""Dynamic sampling: a batch of groups that teach something, from as many tries as that takes and as are allowed.

As in DAPO (arXiv 2503.14476, §3.2), groups whose rewards are all equal are put aside and further prompts tried in their
place. A try asks for no more than what is missing, at the rate at which groups had a signal so far.
"""

from __future__ import annotations

import math
from itertools import islice

import numpy as np

from tandem.rl.advantages import uniform_groups
from tandem.rl.metrics import applicable_total
from tandem.rl.samples import Scored


class Tries:
    """The groups of one batch, try by try.

    Args:
        wanted: groups of a batch. size: completions of a group.
        max_resamples: tries after the first one; None: no dynamic sampling, the first try is the batch.
    """

    def __init__(self, wanted: int, size: int, max_resamples: int | None) -> None:
        self._wanted, self._size, self._resamples = wanted, size, max_resamples
        self.groups: list[list[Scored]] = []
        self._signal: list[bool] = []
        self.tries = 0

    @property
    def asked(self) -> int:
        """Groups that the next try is to bring; 0: there is none."""
        if self.tries == 0:
            return self._wanted
        kept = sum(self._signal)
        if self._resamples is None or kept >= self._wanted or self.tries > self._resamples:
            return 0
        missing = self._wanted - kept
        return min(self._wanted, math.ceil(missing * len(self.groups) / kept)) if kept else self._wanted

    def add(self, rows: list[Scored]) -> None:
        """What a try brought, group after group."""
        made = [rows[i : i + self._size] for i in range(0, len(rows), self._size)]
        self.groups += made
        self._signal += [has_signal(group) for group in made]
        self.tries += 1

    def batch(self) -> list[Scored]:
        """The first groups with a signal; where they are too few, the first of the others with them. All in the order
        in which they were generated, and numbered anew."""
        with_signal = [i for i, signal in enumerate(self._signal) if signal]
        others = sorted(
            (i for i, signal in enumerate(self._signal) if not signal), key=lambda i: self.groups[i][0].skipped
        )
        if self._resamples is None:
            with_signal, others = list(range(len(self.groups))), []
        chosen = sorted(islice([*with_signal, *others], self._wanted))
        for number, i in enumerate(chosen):
            for row in self.groups[i]:
                row.group = number
        return [row for i in chosen for row in self.groups[i]]

    @property
    def complete(self) -> bool:
        """Whether every group of the batch has a signal."""
        return sum(self._signal) >= self._wanted

    def metrics(self) -> dict[str, float]:
        """`sampling/*`; empty without dynamic sampling. kept: groups of the batch with a signal. reward: mean over all
        that was generated, which the batch's own mean is not."""
        if self._resamples is None:
            return {}
        totals = [t for group in self.groups for row in group if not math.isnan(t := applicable_total(row))]
        return {
            "sampling/tries": float(self.tries),
            "sampling/generated": float(len(self.groups)),
            "sampling/with_signal": float(sum(self._signal)),
            "sampling/kept": float(min(sum(self._signal), self._wanted)),
            "sampling/reward": math.fsum(totals) / len(totals) if totals else math.nan,
        }


def has_signal(group: list[Scored]) -> bool:
    """Whether the rewards of a group differ, as `advantages` sees it, and none of them failed."""
    if any(row.skipped for row in group):
        return False
    return not bool(uniform_groups(np.array([[row.reward for row in group]], dtype=np.float64))[0])
