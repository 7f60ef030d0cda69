"""Where sandboxed programs come from: one bare interpreter, of which every guard and every program is a fork.

Starting an interpreter and reading the guard's code costs 30 ms of CPU, a fork of one that has done so costs one. The
*starter* is single-threaded and holds nothing but that code, so what is inherited from it is worth nothing to a
program: it never sees a job, only the descriptors of one. It gets them over a socket, and ends when the last process
that holds the other end has ended.
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

from tandem.rewards.sandbox_job import START_ENVIRONMENT, interpreter

# `main` returns in the program's process only, and the last line is then all that is left below the program.
_CODE = """import sys; sys.path.append(sys.argv.pop(1)); import sandbox_interpreter, sandbox_child
source, namespace = sandbox_child.main()
exec(compile(*source), namespace)"""


class _Starter:
    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [interpreter(), "-P", "-s", "-S", "-c", _CODE, str(Path(__file__).parent), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env=START_ENVIRONMENT,
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
