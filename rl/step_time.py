"""Where the time of a step goes: every second belongs to exactly one named part, so the parts sum to the wall time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IDLE = "idle"

# In the order of a step. What no other part claims is idle: packing, advantages, waiting for other processes.
PARTS = (
    "wake",
    "generate",
    "sleep",
    "reward",
    "log_probs",
    "parity",
    "backward",
    "optimizer",
    "adapter",
    "watch",
    "log",
    "evaluate",
    "checkpoint",
    IDLE,
)


class StepClock:
    """A stop watch that is always running, on behalf of the part that was entered last.

    A part within a part takes its time away from the outer one. What follows a step's record (evaluation, checkpoint,
    the record itself) counts in the next lap, so that nothing is left out between two records.

    Args:
        synchronize: waits for the device. Called at the end of parts that give work to it without waiting for it.
        on_part: told the name of the part that is entered, or returned to.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        *,
        on_part: Callable[[str], None] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize, self._on_part, self._now = synchronize, on_part, now
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._last = now()

    @contextmanager
    def part(self, name: str, *, device: bool = False) -> Iterator[None]:
        """Time spent inside belongs to `name`.

        Args:
            device: work given to the device inside has to be waited for, to be counted here and not further down.

        Raises:
            ValueError: there is no such part.
        """
        if name not in PARTS:
            raise ValueError(f"{name!r} is no part of a step; they are {', '.join(PARTS)}")
        self._mark()
        self._open.append(name)
        self._tell()
        try:
            yield
            if device and self._synchronize is not None:
                self._synchronize()
        finally:
            self._mark()
            self._open.pop()
            self._tell()

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap, those that occurred, in the order of `PARTS`; a new lap begins."""
        self._mark()
        seconds, self._seconds = self._seconds, {}
        return {name: seconds[name] for name in PARTS if name in seconds}

    def record(self) -> dict[str, float]:
        """A lap as metrics: `step_time`, which is all since the last record, and `time/PART`."""
        seconds = self.lap()
        return {"step_time": math.fsum(seconds.values())} | {f"time/{name}": s for name, s in seconds.items()}

    def _mark(self) -> None:
        now = self._now()
        name = self._open[-1] if self._open else IDLE
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _tell(self) -> None:
        if self._on_part is not None:
            self._on_part(self._open[-1] if self._open else "")
