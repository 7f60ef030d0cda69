"""Where the guards of sandboxed programs come from: one bare interpreter that forks a guard for every program.

Reading the guard's code anew costs 17 ms of CPU, a fork of a process that has read it costs one. The *starter* is
single-threaded and holds nothing but that code, so what a guard inherits from it is worth nothing to a program. It gets
every program's descriptors over a socket, and ends when the last process that holds the other end has ended.
"""

from __future__ import annotations

import marshal
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from tandem.rewards.sandbox_job import interpreter

_CODE = "import sys; sys.path.append(sys.argv.pop(1)); import sandbox_child; sandbox_child.main()"


class _Starter:
    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [interpreter(), "-I", "-S", "-c", _CODE, str(Path(__file__).parent), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env={},
                start_new_session=True,
            )

    def send(self, message: bytes, fds: Sequence[int]) -> None:
        socket.send_fds(self.ours, [message], list(fds))


_current: _Starter | None = None
_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


def start_guard(job: int, report: int, cancel: int, standard: Sequence[int], channels: Sequence[int]) -> None:
    """A guard with these descriptors: `standard` become its 0, 1 and 2, `channels` keep their numbers.

    Raises:
        OSError: no guard can be started.
    """
    global _current
    message = marshal.dumps(list(channels))
    fds = [job, report, cancel, *standard, *channels]
    with _lock:
        if _current is not None:
            try:
                return _current.send(message, fds)
            except ConnectionError:  # somebody has killed it
                _current.ours.close()
                _current.process.poll()
        _current = _Starter()
        _current.send(message, fds)


def kill_guard(pid: int) -> None:
    """End a guard that does not end by itself; its death ends its tree."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
