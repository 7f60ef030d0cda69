"""Threads in which environments work while the engine generates.

Python cannot stop a thread. One that is still busy at its time limit is left behind: its place goes to the next job,
what it may say later is not heard, and, being a daemon, it does not keep the process alive.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Job:
    """One call. Once `Workers.wait` has given it back, either `value` or `error` says how it ended."""

    function: Callable[[], Any]
    seconds: float
    value: Any = None
    error: BaseException | None = None
    started: float = 0.0


@dataclass(frozen=True)
class _Ended:
    """What a thread reports; nobody else writes to a job, so that a late thread changes nothing."""

    job: Job
    value: Any
    error: BaseException | None
    elapsed: float


class Workers:
    """Runs jobs, so many at once, and gives them back as they end. To be used from one thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._ended: queue.SimpleQueue[_Ended] = queue.SimpleQueue()

    @property
    def pending(self) -> int:
        """Jobs that have not been given back."""
        return len(self._waiting) + len(self._running)

    def submit(self, function: Callable[[], Any], seconds: float) -> Job:
        """Start a call, or queue it. Its time limit counts from its start."""
        job = Job(function, seconds)
        self._waiting.append(job)
        self._fill()
        return job

    def wait(self, seconds: float) -> list[Job]:
        """The jobs that have ended since the last call, or that end first within so many seconds.

        A job beyond its limit is given back with a TimeoutError, whether or not it has ended in the meantime.
        """
        until = time.monotonic() + seconds
        jobs: list[Job] = []
        while True:
            with suppress(queue.Empty):
                while True:
                    jobs += self._taken(self._ended.get_nowait())
            jobs += self._expired()
            self._fill()
            now = time.monotonic()
            if jobs or now >= until or not self._running:
                return jobs
            wake = min(until, *(job.started + job.seconds for job in self._running))
            with suppress(queue.Empty):
                jobs += self._taken(self._ended.get(timeout=max(wake - now, 0.001)))

    def drop(self) -> None:
        """Forget all jobs: those that run go on unheard."""
        self._waiting.clear()
        self._running.clear()

    def _taken(self, ended: _Ended) -> list[Job]:
        job = ended.job
        if job not in self._running:
            return []
        self._running.remove(job)
        if ended.elapsed > job.seconds:
            return [_late(job)]
        job.value, job.error = ended.value, ended.error
        return [job]

    def _expired(self) -> list[Job]:
        now = time.monotonic()
        late = [job for job in self._running if now - job.started > job.seconds]
        self._running.difference_update(late)
        return [_late(job) for job in late]

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            job = self._waiting.popleft()
            job.started = time.monotonic()
            self._running.add(job)
            threading.Thread(target=self._work, args=(job,), name="environment", daemon=True).start()

    def _work(self, job: Job) -> None:
        value, failure = None, None
        try:
            value = resolved(job.function())
        except BaseException as error:  # noqa: BLE001  # handed to whoever waits for the job
            failure = error
        self._ended.put(_Ended(job, value, failure, time.monotonic() - job.started))


def _late(job: Job) -> Job:
    job.error = TimeoutError(f"no answer within {job.seconds:g} seconds")
    return job


def resolved(value: Any) -> Any:
    """The value, or what an awaitable comes to.

    All coroutines run on one event loop, in a thread that lives as long as the process, so that a tool's connections,
    which belong to a loop, survive from call to call.
    """
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    coroutine: Coroutine[Any, Any, Any] = wait()
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()


_LOOP_LOCK = threading.Lock()
_LOOPS: list[tuple[asyncio.AbstractEventLoop, threading.Thread]] = []


def _loop() -> asyncio.AbstractEventLoop:
    with _LOOP_LOCK:
        # A forked child inherits the list but not the thread.
        if not _LOOPS or not _LOOPS[-1][1].is_alive():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="async-tools", daemon=True)
            thread.start()
            _LOOPS[:] = [(loop, thread)]
        return _LOOPS[-1][0]
