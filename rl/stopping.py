"""What Ctrl-C and a notice to end (SIGTERM) do to a run that trains.

Ctrl-C is a person, who gets the step that is under way finished and a checkpoint of it. SIGTERM is a machine that will
be gone in seconds: what is under way is given up wherever it can be taken back (`Rewind`), and the checkpoint is that
of the last finished step. A second signal of either kind stops at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tandem.rl.errors import RunStopped


class Abandoned(KeyboardInterrupt):
    """What is under way is given up for a checkpoint. As an interrupt it passes through rewards and environments, whose
    own errors are caught."""


class Stopping:
    """Asks a run to stop. As long as none of its signals arrives it does nothing.

    Attributes:
        asked: the run is to stop, after the step that is under way or, by `Abandoned`, at once.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.asked = False
        self._quiet, self._notice, self._open = quiet, False, False

    @contextmanager
    def on_signals(self) -> Iterator[Stopping]:
        """While this is open, SIGINT and SIGTERM go here. For the main thread.

        Raises:
            RunStopped: by the second signal.
        """
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        except KeyboardInterrupt as second:
            raise RunStopped(
                "stopped at once, without a checkpoint of what was under way", fix="rl-train resume the run"
            ) from second
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """What happens inside can be taken back: a notice raises `Abandoned` in it."""
        self._open = True
        try:
            self._give_up_if_noticed()
            yield
        finally:
            self._open = False

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What happens inside is not torn: a notice waits for its end."""
        before, self._open = self._open, False
        try:
            yield
        finally:
            self._open = before
        self._give_up_if_noticed()

    def finish(self) -> None:
        """From here on what is under way can no longer be taken back and is finished first."""
        self._open = False

    def _give_up_if_noticed(self) -> None:
        if self._notice and self._open:
            raise Abandoned

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self._notice = True, number == signal.SIGTERM
        self._say("now" if self._notice and self._open else "after this step")
        self._give_up_if_noticed()

    def _say(self, when: str) -> None:
        if not self._quiet:
            # Not by `print`: the signal may have arrived in the middle of one, whose buffer takes no second writer.
            os.write(2, f"stopping {when} with a checkpoint; once more to stop at once\n".encode())
