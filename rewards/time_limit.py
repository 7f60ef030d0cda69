"""Time limits on code of other people.

Synchronous functions run in the main thread, because `signal.alarm`, which math-verify and many users rely on, works
only there. A watchdog thread wakes the main thread by a signal that nobody else uses; its handler raises an exception
inside the function. C code that never lets another thread run (a regular expression that backtracks without end) keeps
the watchdog asleep, so that a timer of the system on used processor time sends a signal too, where nobody else has set
one. What cannot be interrupted is one long call into C code that never looks at signals.

Async functions run on one event loop in a thread of its own that lives as long as the process, so that connection
pools which belong to a loop survive from call to call.
"""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_RESEND_SECONDS = 1.0  # A function may swallow the exception (`except:`), so the signal is repeated.
_CLEANUP_SECONDS = 1.0  # What cancelled coroutines get to close their connections.
# Ignored by default, so that not even a stray one can end the process; then the two that are free for applications.
_SIGNALS = ("SIGURG", "SIGUSR1", "SIGUSR2")


class TimeLimitReached(Exception):
    """The function was still running at its time limit. `__cause__` is what it was interrupted with."""


class _TimeUp(BaseException):
    """Raised inside the running function; no Exception, so that `except Exception` does not keep it."""


@dataclass
class Outcome:
    """How one async function ended: its value or its exception, and its run time in seconds."""

    value: Any = None
    error: BaseException | None = None
    seconds: float = 0.0


def run_within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function and give it up after so many seconds.

    Outside the main thread the function runs in a daemon thread, which is left behind when its time is up.

    Raises:
        TimeLimitReached: the time is up. Whatever else the function raises passes through, KeyboardInterrupt included.
    """
    signum = _free_signal() if threading.current_thread() is threading.main_thread() else None
    if signum is None:
        return _run_in_thread(seconds, function)
    return _Interruptible(seconds, signum).run(function)


def run_all_within(seconds: float, functions: Sequence[Callable[[], Awaitable[Any]]]) -> list[Outcome]:
    """Run async functions concurrently; each may take so many seconds.

    Returns one Outcome per function, in order; `error` is a TimeLimitReached for those that did not finish.
    """
    return Started(seconds, functions).outcomes()


class Started:
    """Async functions that run concurrently in the background from now on; each may take so many seconds.

    Attributes:
        began, ended: when they were started and when the last one was done (`time.perf_counter`); None: not yet.
    """

    def __init__(self, seconds: float, functions: Sequence[Callable[[], Awaitable[Any]]]) -> None:
        self.began, self.ended = time.perf_counter(), None  # type: float, float | None
        self._seconds, self._loop = seconds, _BackgroundLoop.get()
        self._outcomes: list[Outcome | None] = [None] * len(functions)
        work = _run_all(seconds, functions, self._outcomes)
        self._future = asyncio.run_coroutine_threadsafe(work, self._loop.loop)
        self._future.add_done_callback(self._note_end)

    def _note_end(self, _: Any) -> None:
        self.ended = time.perf_counter()

    def outcomes(self) -> list[Outcome]:
        """Wait for them; one Outcome per function, in order, with a TimeLimitReached for those that did not finish."""
        left = self.began + self._seconds + 2 * _CLEANUP_SECONDS - time.perf_counter()
        try:
            self._future.result(timeout=max(left, 0.0))
            late = TimeLimitReached()
        except TimeoutError:
            place = self._loop.place()
            self._loop.abandon()
            said = f"the event loop is blocked at {place}, by a call that is not awaited" if place else ""
            late = TimeLimitReached(said)
        except BaseException:
            self.cancel()
            raise
        return [outcome or Outcome(error=late, seconds=self._seconds) for outcome in self._outcomes]

    def cancel(self) -> None:
        """Give up what is not done yet; nobody will ask for the outcomes."""
        self._future.cancel()


class _Interruptible:
    """One call in the main thread under the eye of a watchdog thread."""

    def __init__(self, seconds: float, signum: int) -> None:
        self.seconds, self.signum = seconds, signum
        self.finished = threading.Event()
        self.expired = self.fired = False
        self.deadline = math.inf
        self.frame: FrameType | None = None
        self.thread_id = threading.get_ident()

    def run(self, function: Callable[[], T]) -> T:
        watchdog = threading.Thread(target=self._watch, name="reward-time-limit", daemon=True)
        previous = signal.signal(self.signum, self._on_signal)
        self.deadline = time.monotonic() + self.seconds
        timer = _CpuTimer.free()
        try:
            watchdog.start()
            if timer:
                timer.start(self.seconds, self._on_signal)
            result = self._call(function)
        except BaseException as error:
            # `fired` rather than the exception's type: the function may have turned it into another one.
            if self.fired and not isinstance(error, KeyboardInterrupt):
                raise TimeLimitReached from error
            raise
        finally:
            self.finished.set()
            try:
                if timer:
                    timer.stop()
                # After this no signal can be sent any more, and only then may the handler go.
                watchdog.join()
            finally:
                signal.signal(self.signum, previous)
                self.frame = None
        if self.fired:
            raise TimeLimitReached
        return result

    def _call(self, function: Callable[[], T]) -> T:
        self.frame = sys._getframe()
        return function()

    def _watch(self) -> None:
        if self.finished.wait(self.seconds):
            return
        self.expired = True
        while not self.finished.is_set():
            signal.pthread_kill(self.thread_id, self.signum)
            self.finished.wait(_RESEND_SECONDS)

    def _on_signal(self, _signum: int, frame: FrameType | None) -> None:
        # Raising only where `_call` is on the stack makes the edge safe: the exception starts below the `except` in
        # `run`, and a signal that comes after the function has returned does nothing.
        if not self.expired and time.monotonic() < self.deadline:
            return  # the processor's time of many threads passes faster than the clock's
        while frame is not None:
            if frame is self.frame:
                self.fired = True
                raise _TimeUp
            frame = frame.f_back


class _CpuTimer:
    """The system's timer on the processor time of this process."""

    @classmethod
    def free(cls) -> _CpuTimer | None:
        """The timer, or None where there is none or somebody uses it."""
        if not hasattr(signal, "setitimer") or signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL:
            return None
        return cls() if signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0) else None

    def start(self, seconds: float, handler: Callable[[int, FrameType | None], None]) -> None:
        signal.signal(signal.SIGVTALRM, handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _RESEND_SECONDS)

    def stop(self) -> None:
        """Safe where it was never started. A signal that is on its way is ignored, not fatal."""
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def _free_signal() -> int | None:
    """A signal that has no handler yet, or None (also where threads cannot be signalled)."""
    if not hasattr(signal, "pthread_kill"):
        return None
    for name in _SIGNALS:
        signum = getattr(signal, name)
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.SIG_IGN):
            return int(signum)
    return None


def _run_in_thread(seconds: float, function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            errors.append(error)

    worker = threading.Thread(target=work, name="reward", daemon=True)
    worker.start()
    worker.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeLimitReached
    return results[0]


async def _run_all(
    seconds: float, functions: Sequence[Callable[[], Awaitable[Any]]], outcomes: list[Outcome | None]
) -> None:
    closed = asyncio.Event()

    async def run_one(index: int) -> None:
        start = time.perf_counter()
        outcome = Outcome()
        try:
            outcome.value = await functions[index]()
        except asyncio.CancelledError as error:
            if closed.is_set():
                raise
            outcome.error = error
        except BaseException as error:  # noqa: BLE001  handed to the caller; SystemExit would otherwise stop the loop
            outcome.error = error
        outcome.seconds = time.perf_counter() - start
        if not closed.is_set():
            outcomes[index] = outcome

    tasks = [asyncio.ensure_future(run_one(i)) for i in range(len(functions))]
    try:
        await asyncio.wait(tasks, timeout=seconds)
    finally:
        closed.set()
        unfinished = [task for task in tasks if not task.done()]
        for task in unfinished:
            task.cancel()
    if unfinished:
        await asyncio.wait(unfinished, timeout=_CLEANUP_SECONDS)


class _BackgroundLoop:
    """The event loop of async functions and the daemon thread that it runs in."""

    _current: _BackgroundLoop | None = None

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="async-rewards", daemon=True)
        self.thread.start()

    @classmethod
    def get(cls) -> _BackgroundLoop:
        current = cls._current
        # A forked child inherits the object but not its thread.
        if current is None or not current.thread.is_alive():
            current = cls._current = _BackgroundLoop()
        return current

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def place(self) -> str:
        """`FILE:LINE` of what the thread is doing now."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""

    def abandon(self) -> None:
        """Leave a blocked loop to itself; the next call starts a fresh one. Should it ever go on, it ends its tasks."""
        if _BackgroundLoop._current is self:
            _BackgroundLoop._current = None
        self.loop.call_soon_threadsafe(self._wind_up)

    def _wind_up(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.call_later(_CLEANUP_SECONDS, self.loop.stop)
