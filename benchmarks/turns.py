"""Systems that start at once and measure in turn: each waits, ready, in a folder of its own until it may go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Turn:
    """One system's place to wait.

    Args:
        folder: seen by the system and by whoever calls it up.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ready, self._go = folder / "ready", folder / "go"

    def wait(self) -> None:
        """In the system that is ready: until it may measure."""
        self.ready.touch()
        while not self._go.exists():
            time.sleep(0.02)

    def give(self) -> None:
        """It may measure now, or as soon as it is ready."""
        self._go.touch()


class Ahead(Generic[T]):
    """What a system says, read from its start on, while it measures only once that is asked for.

    Args:
        said: starts the system with its first item, and ends with it. turn: where the system waits.
    """

    def __init__(self, said: Iterator[T], turn: Turn) -> None:
        self._turn = turn
        self._items: SimpleQueue[tuple[T] | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(said,), daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Until the system is ready, or has ended."""
        while self._reader.is_alive() and not self._turn.ready.exists():
            time.sleep(0.1)

    def said(self) -> Iterator[T]:
        """All of it, to the end of the system, which may measure now."""
        self._turn.give()
        while (item := self._items.get()) is not None:
            yield item[0]

    def _read(self, said: Iterator[T]) -> None:
        try:
            for item in said:
                self._items.put((item,))
        finally:
            self._items.put(None)
