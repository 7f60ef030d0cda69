"""Scoring a rollout batch: every reward function once, the weighted total per completion, and the breakdown kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from tandem.rewards.base import Reward
from tandem.rewards.call import Call, Row, TrainerState, WrongArguments
from tandem.rewards.environment import environment, why_none
from tandem.rewards.faults import OnError, blame
from tandem.rewards.overlap import CallsAhead, group_rows
from tandem.rewards.print_limit import limited_prints
from tandem.rewards.time_limit import run_all_within
from tandem.rl.errors import UserError
from tandem.rl.samples import Group, Scored

OnMissing = Literal["stop", "group_mean"]


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
        notices: what the user should know of the rewards that is no fault.
    """

    rows: list[Scored] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def score(
    groups: list[Group],
    rewards: list[Reward],
    decode: Callable[[list[int]], str],
    *,
    timeout: float,
    global_step: int = 0,
    max_steps: int = 0,
    on_missing: OnMissing = "stop",
    on_error: OnError = "stop",
    ahead: CallsAhead | None = None,
    required: bool = True,
) -> Scores:
    """Call every reward on the whole batch and add them up.

    Synchronous functions run one after another in the calling thread, async ones then concurrently, and then, in order,
    those that combine others' values. A reward of weight 0 is only watched, or part of a combination: it says nothing
    about whether a row has a reward, unless all weights are 0.

    Args:
        groups: prompts with their completions.
        rewards: functions with their weights.
        decode: token ids to text without special tokens.
        timeout: seconds that one call of one function may take.
        global_step: optimiser steps done; max_steps: planned. Rewards see both as `trainer_state`.
        on_missing: what becomes of a row to which no reward applies. stop: an error; group_mean: its total is the mean
            of its group's other totals (0 if there are none), so that its advantage is zero and the others' baseline
            stays; `rewards/missing` counts such rows, and it is still an error if the batch has no other.
        on_error: what becomes of rows on which a function failed: it raised, took too long, or returned something that
            is not one finite number or None per completion. stop: an error; zero: its value is 0 there; skip_group: it
            is None there, and the rows of that group are marked as skipped. `rewards/errors/NAME` counts the rows.
        ahead: calls that were made for finished groups while others were generated.
        required: with group_mean, whether it is an error that no row has a reward.

    Raises:
        UserError: a function failed (see on_error), or no function applies to a row (see on_missing).
        WrongArguments: a function needs an argument that there is not, whatever `on_error` says.
    """
    _check_rewards(rewards)
    if ahead is not None:
        ahead.finish(groups)
    known = ahead.rows if ahead is not None else {}
    rows = [
        row for number, group in enumerate(groups) for row in known.get(number) or group_rows(number, group, decode)
    ]
    if not rows:
        return Scores()
    calls = call_all(rewards, rows, TrainerState(global_step, max_steps), timeout, on_error=on_error, ahead=ahead)
    failed = {i for call in calls for i in call.errors}
    totals = _totals(rows, calls, on_missing, failed if on_error == "skip_group" else set(), required=required)
    skipped = {rows[i].group for i in failed} if on_error == "skip_group" else set()
    metrics = _metrics(calls)
    if on_missing == "group_mean":
        metrics["rewards/missing"] = float(sum(t is None and i not in failed for i, t in enumerate(totals)))
    if on_error != "stop":
        metrics |= {f"rewards/errors/{call.reward.name}": float(len(call.errors)) for call in calls}
    return Scores(
        rows=[
            Scored(
                row.prompt,
                row.completion,
                row.group,
                row.text,
                _values(calls, i),
                total,
                errors={call.reward.name: call.errors[i].short() for call in calls if i in call.errors},
                skipped=row.group in skipped,
                missing=totals[i] is None,
                extra=logged_extra(calls, i),
            )
            for i, (row, total) in enumerate(zip(rows, _filled(rows, totals), strict=True))
        ],
        metrics=metrics,
        seconds={call.reward.name: call.seconds for call in calls},
        extras={column: values for call in calls for column, values in call.extras.items()},
        notices=[text for call in calls for text in call.notices],
    )


def call_all(
    rewards: list[Reward],
    rows: list[Row],
    state: TrainerState,
    timeout: float,
    faults: dict[str, UserError] | None = None,
    known: dict[str, list[float | None]] | None = None,
    *,
    on_error: OnError = "stop",
    find_rows: bool = True,
    ahead: CallsAhead | None = None,
) -> list[Call]:
    """Every reward on the rows; the calls in the order of the rewards, with their values.

    Args:
        faults: where given, a reward's fault is kept here by its name instead of being raised; it has no values then,
            and what combines it is not called on them.
        known: values of other rewards by their name, for functions that combine.
        on_error: what becomes of rows on which a reward failed, see `score`; without `faults`.
        find_rows: where a whole call fails, look for the rows that are to blame, see `blame`.
        ahead: calls of some of the rewards that were made before, and are not made again.

    Raises:
        UserError: a fault of a reward, where `faults` is None and `on_error` is stop.
        WrongArguments: see `score`; where `faults` is None.
    """
    calls = [Call(reward, rows, state, timeout=timeout) for reward in rewards]

    def guarded(call: Call, work: Callable[[], None]) -> None:
        try:
            work()
        except UserError as error:
            call.errors = {0: error}
            if find_rows and not isinstance(error, WrongArguments):
                blame(call, error, on_error=on_error)
            elif on_error != "stop":
                raise
        if not call.errors:
            return
        if faults is not None:
            faults[call.reward.name], call.values = call.errors[min(call.errors)], []
        elif on_error == "stop":
            raise call.errors[min(call.errors)]
        elif on_error == "zero":
            call.values = [0.0 if i in call.errors else value for i, value in enumerate(call.values)]

    done = ahead.calls() if ahead is not None else {}
    for call in done.values():
        guarded(call, call.end)
    plain = [call for call in calls if not call.reward.combines and call.reward.name not in done]
    for call in plain:
        if not call.reward.is_async:
            guarded(call, partial(call.run, timeout))
    if waiting := [call for call in plain if call.reward.is_async]:
        with limited_prints(f"reward {waiting[0].reward.name!r}" if len(waiting) == 1 else "the async rewards"):
            outcomes = run_all_within(timeout, [call.start for call in waiting])
        for call, outcome in zip(waiting, outcomes, strict=True):
            guarded(call, partial(call.finish, outcome, timeout))
    calls = [done.get(call.reward.name, call) for call in calls]
    for call in calls:
        if call.reward.combines:
            call.others = (known or {}) | {other.reward.name: other.values for other in calls if other.values}
            guarded(call, partial(call.run, timeout))
    return calls


def _check_rewards(rewards: list[Reward]) -> None:
    if not rewards:
        raise UserError("there is no reward function", fix="name at least one in rewards.reward_funcs")
    names = [reward.name for reward in rewards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two reward functions are named {twice[0]!r}", fix="give one of them a `name`")


def logged_extra(calls: list[Call], index: int) -> dict[str, Any]:
    """What the rewards logged of a row, as the journal can keep it: what is neither a text nor a number as its text."""
    extra = {}
    for call in calls:
        for column, values in call.extras.items():
            value = values[index]
            value = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
            extra[column] = value if value is None or isinstance(value, (str, int, float)) else str(value)
    return extra


def _values(calls: list[Call], index: int) -> dict[str, float | None]:
    return {call.reward.name: call.values[index] for call in calls}


def _totals(
    rows: list[Row], calls: list[Call], on_missing: OnMissing, failed: set[int], *, required: bool
) -> list[float | None]:
    """The weighted sum of each row, None where no reward applies to it and for the `failed` ones."""
    counted = [call for call in calls if call.reward.weight] or calls
    totals: list[float | None] = []
    for index, row in enumerate(rows):
        parts = [call.reward.weight * v for call in counted if (v := call.values[index]) is not None]
        total = sum(parts) if parts and index not in failed else None
        if total is None and index not in failed and on_missing == "stop":
            raise _no_reward(index, row, counted)
        if total is not None and not math.isfinite(total):
            raise UserError(
                f"the weighted total of row {index} is {total}: {_values(calls, index)}\n{row.describe()}",
                reason="the values are too large to be added",
                fix="scale the rewards or their weights",
            )
        totals.append(total)
    if required and not failed and all(total is None for total in totals):
        raise _no_reward(0, rows[0], counted)
    return totals


def _no_reward(index: int, row: Row, calls: list[Call]) -> UserError:
    names = ", ".join(repr(call.reward.name) for call in calls)
    reason = "a completion without a reward has no advantage"
    fix = "make one reward answer with a number, or leave such rows out of the data set"
    if (episode := row.completion.episode) is not None and any(call.reward.function is environment for call in calls):
        reason, fix = why_none(episode)
    return UserError(
        f"no reward applies to row {index}: {names} returned None\n{row.describe()}", reason=reason, fix=fix
    )


def _filled(rows: list[Row], totals: list[float | None]) -> list[float]:
    """The totals with their group's mean where there is none."""
    groups: dict[int, list[float]] = {}
    for row, total in zip(rows, totals, strict=True):
        if total is not None:
            groups.setdefault(row.group, []).append(total)
    # Rounding must not put the mean beside totals that are all equal: the row would be the best or the worst of them.
    means = {group: min(max(statistics.fmean(known), min(known)), max(known)) for group, known in groups.items()}
    return [means.get(row.group, 0.0) if total is None else total for row, total in zip(rows, totals, strict=True)]


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
