"""Scoring a rollout batch: every reward function once, the weighted total per completion, and the breakdown kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.rewards.base import Reward
from tandem.rewards.call import Call, Row, TrainerState
from tandem.rewards.time_limit import run_all_within
from tandem.rl.errors import UserError
from tandem.rl.samples import Group, Scored


@dataclass
class Scores:
    """A scored batch.

    Attributes:
        rows: one per completion, in the order of the groups and of their completions.
        metrics: `rewards/NAME/mean` and `rewards/NAME/std` (sample standard deviation, 0 for a single value) over the
            rows to which the reward applies, absent if there is none; and what the rewards logged with `log_metric`
            (the mean if a name was logged several times).
        seconds: run time of each reward by its name; async ones overlap.
        extras: columns that the rewards logged with `log_extra`, one value per row.
    """

    rows: list[Scored] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)


def score(
    groups: list[Group],
    rewards: list[Reward],
    decode: Callable[[list[int]], str],
    *,
    timeout: float,
    global_step: int = 0,
    max_steps: int = 0,
) -> Scores:
    """Call every reward on the whole batch and add them up.

    Synchronous functions run one after another in the calling thread, async ones then concurrently.

    Args:
        groups: prompts with their completions.
        rewards: functions with their weights.
        decode: token ids to text without special tokens.
        timeout: seconds that one call of one function may take.
        global_step: optimiser steps done; max_steps: planned. Rewards see both as `trainer_state`.

    Raises:
        UserError: a function raised, took too long, returned something that is not one finite number or None per
            completion, or no function applies to a row.
    """
    _check_rewards(rewards)
    rows = [
        Row(group.prompt, completion, number, decode(completion.ids))
        for number, group in enumerate(groups)
        for completion in group.completions
    ]
    if not rows:
        return Scores()
    calls = [Call(reward, rows, TrainerState(global_step, max_steps)) for reward in rewards]
    for call in calls:
        if not call.reward.is_async:
            call.run(timeout)
    if waiting := [call for call in calls if call.reward.is_async]:
        for call, outcome in zip(waiting, run_all_within(timeout, [c.start for c in waiting]), strict=True):
            call.finish(outcome, timeout)
    return Scores(
        rows=[_scored(i, row, calls) for i, row in enumerate(rows)],
        metrics=_metrics(calls),
        seconds={call.reward.name: call.seconds for call in calls},
        extras={column: values for call in calls for column, values in call.extras.items()},
    )


def _check_rewards(rewards: list[Reward]) -> None:
    if not rewards:
        raise UserError("there is no reward function", fix="name at least one in rewards.reward_funcs")
    names = [reward.name for reward in rewards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two reward functions are named {twice[0]!r}", fix="give one of them a `name`")


def _scored(index: int, row: Row, calls: list[Call]) -> Scored:
    values = {call.reward.name: call.values[index] for call in calls}
    parts = [call.reward.weight * v for call in calls if (v := call.values[index]) is not None]
    if not parts:
        raise UserError(
            f"no reward applies to row {index}: {', '.join(map(repr, values))} returned None\n{row.describe()}",
            reason="a completion without a reward has no advantage",
            fix="make one reward answer with a number, or leave such rows out of the data set",
        )
    total = sum(parts)
    if not math.isfinite(total):
        raise UserError(
            f"the weighted total of row {index} is {total}: {values}\n{row.describe()}",
            reason="the values are too large to be added",
            fix="scale the rewards or their weights",
        )
    return Scored(row.prompt, row.completion, row.group, row.text, values, total)


def _metrics(calls: list[Call]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    logged: dict[str, list[float]] = {}
    for call in calls:
        for name, numbers in call.metrics.items():
            logged.setdefault(name, []).extend(numbers)
    metrics.update({name: statistics.fmean(numbers) for name, numbers in logged.items()})
    for call in calls:
        values = [v for v in call.values if v is not None]
        if values:
            metrics[f"rewards/{call.reward.name}/mean"] = statistics.fmean(values)
            metrics[f"rewards/{call.reward.name}/std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return metrics
