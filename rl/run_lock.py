"""One process at a time in a run folder: `.lock` in it, held through the operating system.

The kernel lets go of the lock when its process ends, however it ends, so a lock that a crash left behind is no lock;
that a file lies there means nothing. What stands in the file is for people: who holds it, where, and since when.
On file systems without locks the owner's process is looked up instead, by its number and its own starting time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.rl.errors import UserError

NAME = ".lock"

# POSIX locks belong to a process: its own second attempt would succeed, and a child does not inherit them.
_HELD: set[Path] = set()
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder.

    Attributes:
        pid: process number on `host`. since: when it took the folder, seconds since 1970.
        started: when the process itself was started, seconds since 1970, which tells it from a later one of its number.
    """

    pid: int
    host: str
    since: float
    started: float

    def __str__(self) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {at} ({_age(time.time() - self.since)})"


@contextmanager
def run_lock(run_dir: Path, *, note: Callable[[str], None] | None = None) -> Iterator[Owner]:
    """Hold a run folder while this is open.

    Args:
        note: told of a lock that was left behind by a process that is no more.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    path = Path(run_dir).resolve() / NAME
    owner = _myself()
    if path in _HELD:
        raise _held(run_dir, owner)
    descriptor = _taken(run_dir, path, note)
    _HELD.add(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(asdict(owner)) + "\n").encode(), 0)
        yield owner
    finally:
        _HELD.discard(path)
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held, so that nobody's lock is removed
        os.close(descriptor)


def _taken(run_dir: Path, path: Path, note: Callable[[str], None] | None) -> int:
    """The lock file, open and locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise UserError(
                f"the run folder {str(run_dir)!r} cannot be written to: {error}",
                fix="make it writable, or choose another output_dir",
            ) from error
        try:
            before = _owner_in(descriptor)
            if not _locked(descriptor, before):
                raise _held(run_dir, before)
            # The holder removes the file when it is done: a lock on a removed file keeps nobody out.
            if not _same_file(descriptor, path):
                os.close(descriptor)
                continue
        except BaseException:
            os.close(descriptor)
            raise
        if before is not None and note is not None:
            note(f"the run folder was left locked by {before}, which is no more")
        return descriptor


def _locked(descriptor: int, before: Owner | None) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return not (before and _alive(before))
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return not (before and _alive(before))
        return False
    return True


def _alive(owner: Owner) -> bool:
    """Whether the owner may still run; of another host nothing is known."""
    import psutil

    if owner.host != socket.gethostname():
        return True
    try:
        return abs(psutil.Process(owner.pid).create_time() - owner.started) < 5
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _held(run_dir: Path, owner: Owner | None) -> UserError:
    return UserError(
        f"the run folder {str(run_dir)!r} is in use by {owner or 'another process'}",
        reason="two runs in one folder would overwrite each other's checkpoints and journal",
        fix="wait for it or stop it, or give this run another run_name"
        + (f"; if that host is gone, remove {run_dir}/{NAME}" if owner and owner.host != socket.gethostname() else ""),
    )


def _myself() -> Owner:
    import psutil

    return Owner(os.getpid(), socket.gethostname(), time.time(), psutil.Process().create_time())


def _owner_in(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _age(seconds: float) -> str:
    """Clocks jump: an age below zero is none."""
    seconds = max(int(seconds), 0)
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
