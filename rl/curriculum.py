"""Which prompts are worth another visit: those that are neither always nor never solved, by a running pass rate."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import cycle, islice

from tandem.rl.metrics import applicable_total
from tandem.rl.prompts import PromptSampler
from tandem.rl.samples import Prompt, Scored
from tandem.rl.sections import CurriculumConfig

Visit = tuple[int, float]
"""A prompt's number and the share of its completions that passed."""


@dataclass
class PassRate:
    """What is known of a prompt: how often it was generated for, and its running pass rate, 0 to 1."""

    visits: int
    rate: float


@dataclass
class Draw:
    """Prompts for one try.

    Attributes:
        prompts: in the order of the stream. rows: of the stream that were looked at, the skipped ones included.
        skipped: prompts that were left out.
    """

    prompts: list[Prompt]
    rows: int
    skipped: int = 0


class Curriculum:
    """Draws prompts from the stream of epochs and passes over those that teach nothing.

    What is drawn follows from the seed, the place in the stream and the pass rates alone, all of which a checkpoint
    holds. Without a curriculum it is the stream itself.

    Args:
        rates: by the prompts' numbers; changed in place by `note`.
    """

    def __init__(
        self,
        options: CurriculumConfig,
        prompts: list[Prompt],
        sampler: PromptSampler,
        rates: dict[int, PassRate],
        *,
        seed: int,
    ) -> None:
        self._options, self._prompts, self._sampler = options, prompts, sampler
        self._rates, self._seed = rates, seed

    def draw(self, position: int, count: int) -> Draw:
        """The next `count` prompts from an absolute position of the stream on.

        As long as there are enough others, no prompt comes twice. Where a whole epoch has too few that are not to be
        skipped, the first of those that are fill up.
        """
        if not self._options.enabled:
            return Draw([self._prompts[i] for i in self._sampler.take(position, count)], count)
        chosen: dict[int, None] = {}
        over: dict[int, None] = {}
        looked = 0
        while len(chosen) < count and looked < count + len(self._prompts):
            (row,) = self._sampler.take(position + looked, 1)
            if row not in chosen and self._skips(row, position + looked):
                over[row] = None
            elif row not in chosen:
                chosen[row] = None
                over.pop(row, None)  # tried again after all, within the same draw
            looked += 1
        fill = list(islice(over, max(count - len(chosen), 0)))
        rows = list(islice(cycle([*chosen, *fill]), count))
        return Draw([self._prompts[row] for row in rows], looked, len(over) - len(fill))

    def _skips(self, row: int, place: int) -> bool:
        options, known = self._options, self._rates.get(self._prompts[row].index)
        if known is None or known.visits < options.min_visits or options.low < known.rate < options.high:
            return False
        # Of `random`, only seeding with a string and random() are promised to stay as they are.
        return random.Random(f"{self._seed}-retry-{place}").random() >= options.retry_probability

    def visits(self, groups: Iterable[list[Scored]]) -> list[Visit]:
        """What generated groups tell of their prompts; nothing where none of a group's completions has a reward."""
        if not self._options.enabled:
            return []
        found: list[Visit] = []
        for group in groups:
            totals = [t for row in group if not math.isnan(t := applicable_total(row))]
            if totals:
                passed = sum(total >= self._options.pass_reward for total in totals)
                found.append((group[0].prompt.index, passed / len(totals)))
        return found

    def note(self, visits: Iterable[Visit]) -> dict[int, PassRate | None]:
        """Take visits into account, in their order; what was known of these prompts before, for `restore`."""
        before: dict[int, PassRate | None] = {}
        for index, share in visits:
            known = self._rates.get(index)
            before.setdefault(index, known and replace(known))
            if known is None:
                self._rates[index] = PassRate(1, share)
            else:
                known.visits += 1
                # In this form, a rate that is met again stays what it is to the bit.
                known.rate += (1 - self._options.decay) * (share - known.rate)
        return before

    def restore(self, before: dict[int, PassRate | None]) -> None:
        """Undo a `note`."""
        for index, known in before.items():
            if known is None:
                self._rates.pop(index, None)
            else:
                self._rates[index] = known
