"""One call of one reward function on a batch: its arguments, its time limit, and what can go wrong in it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from tandem.rewards.base import (
    EPISODES,
    ON_REQUEST,
    OTHER_VALUES,
    RESERVED,
    TRAINER_ARGUMENTS,
    Reward,
    locate,
    nearest,
)
from tandem.rewards.own_copies import is_changed, own_copy
from tandem.rewards.print_limit import limited_prints
from tandem.rewards.time_limit import Outcome, TimeLimitReached, run_all_within, run_within
from tandem.rl.errors import UserError
from tandem.rl.samples import Completion, Episode, Prompt

_SHOWN_CHARACTERS = 300


class WrongArguments(UserError):
    """A function needs what no batch of this run has."""


def given_columns(names: Iterable[str]) -> list[str]:
    """Those of a data set's columns that reach rewards, each once, in order."""
    return [name for name in dict.fromkeys(names) if name not in (*RESERVED, "prompt", "completion")]


def check_required(reward: Reward, columns: Iterable[str], data: str = "the data set") -> None:
    """Whether a reward can be called on data with these columns (of `given_columns`), which `data` names in errors.

    Raises:
        WrongArguments: it needs an argument that is neither a column nor in its kwargs.
    """
    columns = list(columns)
    known = {*columns, *reward.kwargs, *RESERVED, *ON_REQUEST}
    missing = next((name for name in reward.required() if name not in known), None)
    if missing is None:
        return
    fix = f"rename a column, or give {missing!r} in the reward's kwargs"
    if missing in ("prompt", "completion"):
        fix = f"write {missing}s: a reward gets a list with an entry per completion, and returns such a list"
    raise WrongArguments(
        f"reward {reward.name!r} needs an argument {missing!r}, and there is no such column{nearest(missing, columns)}",
        reason=f"{data}'s columns are {', '.join(columns)}" if columns else f"{data} has no further columns",
        fix=fix,
    )


@dataclass(frozen=True)
class TrainerState:
    """How far the run is, for rewards that change with it. Both count optimiser steps."""

    global_step: int
    max_steps: int


@dataclass
class Row:
    """One completion before it is scored."""

    prompt: Prompt
    completion: Completion
    group: int
    text: str
    number: int | None = None  # its place in the batch, where a call does not see all of it

    def describe(self) -> str:
        """Prompt and completion, shortened, for error messages."""
        return f"  prompt {self.prompt.index}: {_shorten(self.prompt.prompt)}\n  completion: {_shorten(self.text)}"


@dataclass
class Call:
    """A reward function on a batch.

    Attributes:
        values: what it said, one per row, once it has run; None where it does not apply and where it failed.
        errors: rows on which it failed, and how.
        seconds: how long it took.
        extras: columns that it logged (`log_extra`), one value per row.
        metrics: scalars that it logged (`log_metric`), in order, and what its own `metrics()` says after the call, as
            `rewards/NAME/KEY`.
        timeout: seconds that it may take.
        others: values of the rewards that were called before, for a function that asks for `rewards_by_name`.
        notices: what the user should know of the function that is no fault.
        partial: one of several calls for a batch; whoever joins them begins and ends the batch.
    """

    reward: Reward
    rows: list[Row]
    state: TrainerState
    values: list[float | None] = field(default_factory=list)
    errors: dict[int, UserError] = field(default_factory=dict)
    seconds: float = 0.0
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    timeout: float = 60.0
    others: dict[str, list[float | None]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    _given: dict[str, Any] = field(default_factory=dict)
    partial: bool = False

    def run(self, timeout: float) -> None:
        """Run a synchronous function. Raises UserError for every fault of it but single wrong values."""
        self.timeout = timeout
        if not self.partial:
            self.begin()
        arguments = self.arguments()
        start = time.perf_counter()
        try:
            # Several threads cannot exchange the process's streams; whoever joins the calls limits their prints.
            with nullcontext() if self.partial else limited_prints(f"reward {self.reward.name!r}"):
                result = run_within(timeout, lambda: self.reward.function(**arguments))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._fault(error, timeout) from error
        finally:
            self.seconds = time.perf_counter() - start
        if inspect.isawaitable(result):  # a plain function around an async one
            awaitable = result
            self.finish(run_all_within(timeout, [lambda: awaitable])[0], timeout)
        else:
            self._take(result)

    def start(self) -> Awaitable[Any]:
        """The coroutine of an async function; its Outcome goes to `finish`."""
        if not self.partial:
            self.begin()
        coroutine: Awaitable[Any] = self.reward.function(**self.arguments())
        return coroutine

    def finish(self, outcome: Outcome, timeout: float) -> None:
        """Take over the result of an async function. Raises UserError for every fault of it but single wrong values."""
        self.seconds += outcome.seconds
        if isinstance(outcome.error, KeyboardInterrupt):
            raise outcome.error
        if outcome.error is not None:
            raise self._fault(outcome.error, timeout) from outcome.error
        self._take(outcome.value)

    def _take(self, result: Any) -> None:
        self.values = self._checked(result)
        self._notice_changed_arguments()
        if not self.partial:
            self.end()

    def begin(self) -> None:
        """Tell the function that a batch begins. Raises UserError for every fault of it."""
        self._guarded(self.reward.start_batch)

    def end(self) -> None:
        """Tell it that the batch is over, and take what it says of it. Raises UserError for every fault of it."""
        self._guarded(self.reward.end_batch)
        for key, value in self.reward.metrics().items():
            if math.isfinite(value):
                self.metrics.setdefault(f"rewards/{self.reward.name}/{key}", []).append(value)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            raise self._fault(error, self.timeout) from error

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments, only those which the function takes.

        They are the call's own copies, see `own_copy`; environments alone are the ones that played.

        Raises:
            WrongArguments: the function needs an argument that is neither a column nor in its kwargs.
        """
        taken = self.reward.parameters()
        wanted = None if taken is None else set(taken)
        arguments: dict[str, Any] = {}
        for name in self.columns():
            if name not in self.reward.kwargs and (wanted is None or name in wanted):
                arguments[name] = [own_copy(row.prompt.columns.get(name)) for row in self.rows]
        arguments |= {name: own_copy(value) for name, value in self.reward.kwargs.items()}
        ours: dict[str, Any] = {
            "prompts": lambda: [own_copy(row.prompt.prompt) for row in self.rows],
            "completions": lambda: [_completion(row) for row in self.rows],
            "completion_ids": lambda: [list(row.completion.ids) for row in self.rows],
            "trainer_state": lambda: self.state,
            "log_extra": lambda: self._log_extra,
            "log_metric": lambda: self._log_metric,
            "environments": lambda: self._environments(),
        }
        arguments |= {name: make() for name, make in ours.items() if wanted is None or name in wanted}
        self._given = {name: value for name, value in arguments.items() if name not in TRAINER_ARGUMENTS}
        asked = set(self.reward.named()).intersection(ON_REQUEST)
        on_request: dict[str, Any] = {
            OTHER_VALUES: lambda: {name: list(values) for name, values in self.others.items()},
            "group_numbers": lambda: [row.group for row in self.rows],
            "reward_timeout": lambda: self.timeout,
            EPISODES: lambda: [_episode(row.completion.episode) for row in self.rows],
        }
        # A column of such a name is the function's own business.
        arguments |= {name: on_request[name]() for name in ON_REQUEST if name in asked and name not in arguments}
        check_required(self.reward, self.columns())
        return arguments

    def _notice_changed_arguments(self) -> None:
        given, self._given = self._given, {}
        names = [repr(name) for name, value in given.items() if is_changed(value, self._original(name))]
        if names:
            self.notices.append(
                f"reward {self.reward.name!r} changes its argument{'s' * (len(names) > 1)} {', '.join(names)}: nobody "
                "else sees that, since they are copies"
            )

    def _original(self, name: str) -> Any:
        if name in self.reward.kwargs:
            return self.reward.kwargs[name]
        make: dict[str, Callable[[Row], Any]] = {
            "prompts": lambda row: row.prompt.prompt,
            "completions": _completion,
            "completion_ids": lambda row: row.completion.ids,
        }
        return [make[name](row) if name in make else row.prompt.columns.get(name) for row in self.rows]

    def _environments(self) -> list[Any] | None:
        """What played each completion; None where there are no environments."""
        found = [row.completion.episode and row.completion.episode.environment for row in self.rows]
        return found if any(environment is not None for environment in found) else None

    def columns(self) -> list[str]:
        """Names of the data set's columns that reach rewards, in order of appearance."""
        return given_columns(name for row in self.rows for name in row.prompt.columns)

    def _log_extra(self, column: str, values: Iterable[Any]) -> None:
        listed = list(values)
        if len(listed) != len(self.rows):
            raise UserError(
                f"log_extra({column!r}, …) got {len(listed)} values for {len(self.rows)} completions",
                reason="the column stands beside the completions in the logged table",
                fix="give one value per completion, None where there is none",
            )
        self.extras[str(column)] = listed

    def _log_metric(self, name: str, value: Any) -> None:
        number = _number(value)
        if number is None:
            raise UserError(f"log_metric({name!r}, …) got {_shorten(value)}, which is no number", fix="log one number")
        # As in TRL, a metric that is not defined for this batch does not spoil the mean.
        if math.isfinite(number):
            self.metrics.setdefault(str(name), []).append(number)

    def _fault(self, error: BaseException, timeout: float) -> UserError:
        name = self.reward.name
        if isinstance(error, UserError):
            return UserError(f"reward {name!r}: {error.problem}", reason=error.reason, fix=error.fix)
        if isinstance(error, TimeLimitReached):
            cause = error.__cause__
            place = locate(cause, self.reward.file) if cause is not None else ""
            where = f"it was interrupted at {place}" if place else str(error)
            return UserError(
                f"reward {name!r} did not finish within {timeout:g} seconds for {len(self.rows)} completions",
                reason=where,
                fix="make it faster, give its own requests a time limit, or raise rewards.timeout",
            )
        place = locate(error, self.reward.file)
        fix = "correct the function; return None for a row that it cannot judge"
        if isinstance(error, (AttributeError, TypeError)) and "'list'" in str(error) and self._has_messages():
            fix += (
                "; prompts are conversations here, so that a completion is a list of messages: "
                'its text is completion[0]["content"]'
            )
        return UserError(
            f"reward {name!r} raised {type(error).__name__}: {error}", reason=f"at {place}" if place else "", fix=fix
        )

    def _has_messages(self) -> bool:
        return "completions" in self.reward.named() and any(isinstance(_completion(row), list) for row in self.rows)

    def _checked(self, result: Any) -> list[float | None]:
        name, expected = self.reward.name, len(self.rows)
        per_row = "return a list with one number per completion, None where the reward does not apply"
        if getattr(result, "ndim", None) == 1 and hasattr(result, "tolist"):
            result = result.tolist()
        if not isinstance(result, (list, tuple)):
            forgotten = result is None
            raise UserError(
                f"reward {name!r} returned {'None' if forgotten else type(result).__name__}, not a list",
                reason="a return statement is missing" if forgotten else f"it returned {_shorten(result)}",
                fix=per_row,
            )
        if len(result) != expected:
            raise UserError(
                f"reward {name!r} returned {len(result)} values for {expected} completions",
                reason="a value must belong to its completion",
                fix=per_row,
            )
        return [None if value is None else self._checked_value(i, value) for i, value in enumerate(result)]

    def _checked_value(self, index: int, value: Any) -> float | None:
        number = _number(value)
        if number is not None and math.isfinite(number):
            return number
        self.errors[index] = self._wrong_value(index, value, number)
        return None

    def _wrong_value(self, index: int, value: Any, number: float | None) -> UserError:
        shown = f"{_shorten(value)} ({type(value).__name__})" if number is None else f"{number}"
        return UserError(
            f"reward {self.reward.name!r} returned {shown} for row {self._row_number(index)}\n"
            f"{self.rows[index].describe()}",
            reason="a value must be a number"
            if number is None
            else "one such value spoils every advantage of its group",
            fix="return a finite number, or None where the reward does not apply",
        )

    def _row_number(self, index: int) -> int:
        """The number of a row in the batch."""
        number = self.rows[index].number
        return index if number is None else number


def _number(value: Any) -> float | None:
    """The value as a float, if it is one number (also of numpy or a 0-d tensor); None if it is something else."""
    if isinstance(value, (str, bytes, bytearray)) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def _completion(row: Row) -> str | list[dict[str, Any]]:
    if row.completion.episode is not None:
        copy: list[dict[str, Any]] = own_copy(row.completion.episode.messages)
        return copy
    return [{"role": "assistant", "content": row.text}] if row.prompt.conversational else row.text


def _episode(episode: Episode | None) -> Episode | None:
    if episode is None:
        return None
    return replace(episode, messages=own_copy(episode.messages), turn_rewards=list(episode.turn_rewards))


def _shorten(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        value = value[-1]["content"]
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
