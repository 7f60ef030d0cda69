"""Rewards that are only watched: scored like the others on the same completions, never part of the total."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from tandem.rewards.base import Reward
from tandem.rewards.call import Row, TrainerState
from tandem.rewards.compose import call_all, logged_extra
from tandem.rl.errors import UserError
from tandem.rl.samples import Scored


@dataclass
class Watched:
    """What is said beside the values, which are in the rows.

    Attributes:
        metrics: `watch/rewards/NAME/failed` (1 where the function failed on this batch, else 0), and what the functions
            logged themselves, each name with `watch/` before it.
        faults: what went wrong, by the name of the function.
        seconds: run time of each function by its name.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    faults: dict[str, UserError] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def score_watched(
    rows: list[Scored], rewards: list[Reward], *, timeout: float, global_step: int = 0, max_steps: int = 0
) -> Watched:
    """Call every watched function on a scored batch and fill in `Scored.watched`.

    A function that raises, takes too long or returns something wrong leaves None on every row. Functions that combine
    see the values of the trained rewards too; those never see what is watched.

    Args:
        rows: completions with their rewards.
        rewards: the functions.
        timeout: seconds that one call of one function may take.
        global_step: optimiser steps done; max_steps: planned.
    """
    found = Watched()
    if not rows or not rewards:
        return found
    trained = {name: [row.rewards.get(name) for row in rows] for name in rows[0].rewards}
    plain = [Row(row.prompt, row.completion, row.group, row.text) for row in rows]
    state = TrainerState(global_step, max_steps)
    for call in call_all(rewards, plain, state, timeout, found.faults, known=trained, find_rows=False):
        name = call.reward.name
        failed = name in found.faults
        for index, row in enumerate(rows):
            row.watched[name] = None if failed else call.values[index]
            row.extra |= {} if failed else logged_extra([call], index)
        found.metrics[f"watch/rewards/{name}/failed"] = float(failed)
        for own, numbers in ({} if failed else call.metrics).items():
            found.metrics[f"watch/{own}"] = statistics.fmean(numbers)
        found.seconds[name] = call.seconds
    return found
