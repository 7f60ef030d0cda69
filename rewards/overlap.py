"""Rewards of groups that are finished, called while other groups are still generated.

Only rewards of scope `group` are called ahead; the others see the whole batch, once it is there. Synchronous functions
run one after another in a thread of their own, which takes all groups that wait in one call where that cannot be told
from several. Async ones start with every finished group, on the event loop of all async rewards. What comes of it is
put together in the order of the batch, so that values and metrics do not depend on which group was finished first.
A reward that fails ahead is called on the whole batch in the end, as if there were no overlap, and is judged by that.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from tandem.rewards.base import Reward
from tandem.rewards.call import Call, Row, TrainerState
from tandem.rewards.print_limit import limited_prints
from tandem.rewards.time_limit import Started
from tandem.rl.errors import UserError
from tandem.rl.samples import Group


def group_rows(number: int, group: Group, decode: Callable[[list[int]], str]) -> list[Row]:
    """The completions of group `number` of a batch, before they are scored."""
    return [Row(group.prompt, completion, number, decode(completion.ids)) for completion in group.completions]


class CallsAhead:
    """The calls for one batch; a context that gives up what still runs at its end.

    Args:
        rewards: of the batch; those of scope group are called ahead.
        decode: token ids to text without special tokens.
        timeout: seconds that one call of one function may take.

    Attributes:
        rows: of every finished group, by its number.
    """

    def __init__(
        self, rewards: list[Reward], decode: Callable[[list[int]], str], state: TrainerState, timeout: float
    ) -> None:
        self._rewards = [reward for reward in rewards if reward.scope == "group"]
        self._decode, self._state, self._timeout = decode, state, timeout
        self.rows: dict[int, list[Row]] = {}
        self._made: dict[str, list[Call]] = {reward.name: [] for reward in self._rewards}
        self._started: list[tuple[Call, Started]] = []
        self._failed: set[str] = set()
        self._broken: list[BaseException] = []
        self._busy: list[tuple[float, float]] = []
        self._waiting: queue.SimpleQueue[list[Row] | None] = queue.SimpleQueue()
        self._given_up = threading.Event()
        self._worker: threading.Thread | None = None
        self._all_there: float | None = None
        self._open = ExitStack()

    def __enter__(self) -> CallsAhead:
        if self._rewards:
            self._open.enter_context(limited_prints("the rewards of one batch"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up.set()
        self._waiting.put(None)
        for _, started in self._started:
            started.cancel()
        self._open.close()

    @property
    def on_group(self) -> Callable[[int, Group], None] | None:
        """What an engine is to call with every finished group and its number; None: there is nothing to call ahead."""
        return self._add if self._rewards else None

    def _add(self, number: int, group: Group) -> None:
        rows = group_rows(number, group, self._decode)
        for k, row in enumerate(rows):
            row.number = number * len(rows) + k  # engines make groups of one size
        if not self.rows:
            self._begin()
        self.rows[number] = rows
        for reward in self._rewards:
            if reward.is_async and reward.name not in self._failed:
                call = self._call(reward, rows)
                self._started.append((call, Started(self._timeout, [call.start])))
        if self._worker is not None:
            self._waiting.put(rows)

    def _begin(self) -> None:
        for reward in self._rewards:
            try:
                Call(reward, [], self._state, timeout=self._timeout).begin()
            except UserError:
                self._failed.add(reward.name)
        if any(not reward.is_async for reward in self._rewards):
            self._worker = threading.Thread(target=self._work, name="rewards-ahead", daemon=True)
            self._worker.start()

    def _call(self, reward: Reward, rows: list[Row]) -> Call:
        return Call(reward, rows, self._state, timeout=self._timeout, partial=True)

    def _work(self) -> None:
        """The thread of the synchronous functions, until all groups are there or everything is given up."""
        try:
            self._run_what_waits()
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits for the values
            self._broken.append(error)

    def _run_what_waits(self) -> None:
        last = False
        while not last:
            groups = [self._waiting.get()]
            while not self._waiting.empty():
                groups.append(self._waiting.get())
            last = groups[-1] is None
            finished = [rows for rows in groups if rows is not None]
            for reward in self._rewards:
                if not reward.is_async:
                    # What a function logs is averaged over its calls, so these must be the same every time.
                    together = [rows for rows in [[row for rows in finished for row in rows]] if rows]
                    for rows in finished if reward.may_log else together:
                        if not self._given_up.is_set() and reward.name not in self._failed:
                            self._run(self._call(reward, rows))

    def _run(self, call: Call) -> None:
        began = time.perf_counter()
        try:
            call.run(self._timeout)
            self._made[call.reward.name].append(call)
        except UserError:
            self._failed.add(call.reward.name)
        self._busy.append((began, time.perf_counter()))

    def finish(self, groups: list[Group]) -> None:
        """All groups are there: those that no engine handed over are called too; wait for the synchronous functions."""
        self._all_there = time.perf_counter()
        for number, group in enumerate(groups):
            if self._rewards and number not in self.rows:
                self._add(number, group)
        if self._worker is not None:
            self._waiting.put(None)
            self._worker.join()
        if self._broken:
            raise self._broken[0]

    def calls(self) -> dict[str, Call]:
        """One call for the whole batch per reward that did not fail, by its name; waits for the async functions.

        Whoever takes a call has to `end` it.
        """
        for call, started in self._started:
            (outcome,) = started.outcomes()
            self._busy.append((started.began, started.ended or time.perf_counter()))
            try:
                call.finish(outcome, self._timeout)
                self._made[call.reward.name].append(call)
            except UserError:
                self._failed.add(call.reward.name)
        rows = [row for number in sorted(self.rows) for row in self.rows[number]]
        sound = [reward for reward in self._rewards if rows and reward.name not in self._failed]
        return {reward.name: self._joined(reward, rows) for reward in sound}

    def _joined(self, reward: Reward, rows: list[Row]) -> Call:
        """The calls of a reward as if they had been one."""
        whole = Call(reward, rows, self._state, [None] * len(rows), timeout=self._timeout)
        place_of = {id(row): place for place, row in enumerate(rows)}
        for part in sorted(self._made[reward.name], key=lambda call: min(row.group for row in call.rows)):
            places = [place_of[id(row)] for row in part.rows]
            whole.seconds += part.seconds
            whole.notices += [text for text in part.notices if text not in whole.notices]
            for place, value in zip(places, part.values, strict=True):
                whole.values[place] = value
            whole.errors |= {places[index]: error for index, error in part.errors.items()}
            for column, values in part.extras.items():
                own = whole.extras.setdefault(column, [None] * len(rows))
                for place, extra in zip(places, values, strict=True):
                    own[place] = extra
            for name, numbers in part.metrics.items():
                whole.metrics.setdefault(name, []).extend(numbers)
        return whole

    @property
    def hidden_seconds(self) -> float:
        """Time before all groups were there in which at least one reward was at work."""
        return 0.0 if self._all_there is None else covered(self._busy, until=self._all_there)


def covered(intervals: list[tuple[float, float]], until: float) -> float:
    """The length of the union of intervals, as far as they lie before `until`.

    >>> covered([(0.0, 2.0), (1.0, 3.0), (5.0, 9.0)], until=6.0)
    4.0
    """
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        end = min(end, until)
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
