"""A bound on what rewards print: a forgotten `print` in a loop must not fill the disk that holds the run's log."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

MAX_CHARACTERS = 1_000_000
"""What one call may print to both streams together."""


@contextmanager
def limited_prints(who: str, limit: int = MAX_CHARACTERS) -> Iterator[None]:
    """Pass on what is printed to `sys.stdout` and `sys.stderr` meanwhile, up to a limit; then say so and drop the rest.

    Only what goes through Python's streams is seen, whichever thread it comes from; not what a C library writes.

    Args:
        who: for the notice.
        limit: characters.
    """
    budget = _Budget(who, limit)
    before = sys.stdout, sys.stderr
    # A process without a console has none of them.
    sys.stdout, sys.stderr = (stream and _Limited(stream, budget) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Budget:
    def __init__(self, who: str, limit: int) -> None:
        self._who, self._left, self._limit = who, limit, limit
        self._lock = threading.Lock()

    def take(self, text: str) -> str:
        """What of a text may still be printed, with the notice where it is the first to be cut."""
        with self._lock:
            if self._left < 0:
                return ""
            self._left -= len(text)
            if self._left >= 0:
                return text
            kept, self._left = text[: self._left], -1
        return f"{kept}\n[{self._who} has printed {self._limit:,} characters in one call: the rest is left out]\n"


class _Limited:
    """A stream whose writes are counted; everything else is the stream's own."""

    def __init__(self, stream: TextIO, budget: _Budget) -> None:
        self._stream, self._budget = stream, budget

    def write(self, text: str) -> int:
        if kept := self._budget.take(text):
            self._stream.write(kept)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
