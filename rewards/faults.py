"""Which completions a reward failed on, and what becomes of them."""

from __future__ import annotations

import inspect
import time
from functools import partial
from typing import Literal

from tandem.rewards.base import Reward
from tandem.rewards.call import Call
from tandem.rewards.print_limit import limited_prints
from tandem.rl.errors import UserError

OnError = Literal["stop", "skip_group", "zero"]

# A row that hangs takes so much of the time that is left, so that those behind it get their turn.
_SHARE_OF_TIME = 0.25


def blame(call: Call, error: UserError, *, on_error: OnError) -> None:
    """Find out on which rows a call failed as a whole, and score the others; the result is in `call`.

    A plain function is called on each row alone, for as long as a call may take, and where that shows some rows at
    fault, once more on the others together: it may compare the rows of its batch. Any other function (async, with a
    state of its own, made from other rewards, in need of whole groups) failed on all rows.

    Args:
        call: the call; `call.errors` gets an error per row, `call.values` the values of the others.
        error: its fault.
        on_error: stop: the first guilty row is enough, and nothing is scored.
    """
    rows = range(len(call.rows))
    first_only = on_error == "stop"
    # An error of ours has said what it has to say; rows matter then only if some of them are to be kept.
    searched = _is_plain(call.reward) and not (first_only and isinstance(error.__cause__, UserError))
    guilty = _guilty_rows(call, first_only=first_only) if searched else {}
    call.values = [None] * len(rows)
    if first_only:
        number = next(iter(guilty), None)
        call.errors = {0 if number is None else number: error if number is None else _with_row(error, call, number)}
        return
    if len(guilty) in (0, len(rows)):
        call.errors = guilty or dict.fromkeys(rows, error)
        return
    rest = [row for row in rows if row not in guilty]
    again = Call(call.reward, [call.rows[row] for row in rest], call.state, timeout=call.timeout)
    try:
        again.run(call.timeout)
    except UserError as fault:
        call.errors = guilty | dict.fromkeys(rest, fault)
        return
    call.errors = guilty | {rest[number]: fault for number, fault in again.errors.items()}
    for number, row in enumerate(rest):
        call.values[row] = again.values[number]
    call.seconds, call.metrics, call.notices = again.seconds, again.metrics, again.notices
    for column, values in again.extras.items():
        whole = dict(zip(rest, values, strict=True))
        call.extras[column] = [whole.get(row) for row in rows]


def _guilty_rows(call: Call, *, first_only: bool) -> dict[int, UserError]:
    """The rows on which the function fails alone, as far as time allows; its values for the others are not kept."""
    found: dict[int, UserError] = {}
    end = time.monotonic() + call.timeout
    with limited_prints(f"reward {call.reward.name!r}"):
        for number, row in enumerate(call.rows):
            left = end - time.monotonic()
            if left <= 0 or (found and first_only):
                break
            alone = Call(call.reward, [row], call.state, timeout=call.timeout)
            try:
                alone.run(left * _SHARE_OF_TIME)
                if alone.errors:
                    found[number] = alone.errors[0]
            except UserError as fault:
                found[number] = fault
    return found


def _is_plain(reward: Reward) -> bool:
    """Whether calls on single rows are likely to be harmless and to tell something."""
    function = reward.function
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        return False
    return not reward.is_async and not reward.combines and "group_numbers" not in reward.named()


def _with_row(error: UserError, call: Call, number: int) -> UserError:
    found = f"called on single completions, it fails on row {number}\n{call.rows[number].describe()}"
    named = UserError(f"{error.problem}\n{found}", reason=error.reason, fix=error.fix)
    named.__cause__ = error.__cause__
    return named
