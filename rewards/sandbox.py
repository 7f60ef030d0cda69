"""Untrusted Python in a process that can do nothing but compute.

    outcome = run_python("print(input()[::-1])", stdin="abc")
    outcome.status, outcome.stdout            # "ok", "cba\n"

Around every program stand, each where the machine allows it (`protections()` in `tandem.rewards.sandbox_check` tries
them and says which hold):

- **no privileges**: a user of its own (where the toolkit runs as root), no capabilities, no way to regain any;
- **no network**: a network namespace without devices, and no `socket` call (seccomp);
- **no files** but its own folder, the interpreter with its standard library and the system's shared libraries, all of
  them read-only: a root of its own without /proc, /home or /etc, whose one writable folder is in memory and limited;
  Landlock on top, or instead where mounts are not allowed;
- **no other processes**: a process namespace; it can neither see, signal nor trace anything outside;
- **limits** on memory (per process, and summed over its tree), CPU time, wall time, processes, open files, size of a
  file, size of all its files and size of its output;
- **nothing survives**: the whole tree is killed at the end, daemons included.

If one of the four that matter most (`REQUIRED`) cannot be had, nothing runs and a UserError says why.

What it does not protect from: a hole in the kernel that both sides share, and what a program can learn from time
itself (how busy the machine is). It may read the processor's and the kernel's version. It may use its memory and time
limits in full: a pool of 8 needs 8 times `Limits.memory_mib` in the worst case. Where `protections` reports no
private root, the size of all files together is not limited, only that of each, and installed packages can be read.

Linux only. What a run costs is measured in docs/sandbox.md.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import secrets
import selectors
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from tandem.rewards.sandbox_job import Limits, Program, check_positive, job
from tandem.rewards.sandbox_start import kill_guard, start_guard
from tandem.rl.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]

REQUIRED = ("files", "network", "privileges", "processes")
"""Protections without which nothing is run."""

LAYERS = {
    "process namespace": "cannot see, signal or trace other processes; all of its own end with it",
    "network namespace": "no network device at all",
    "ipc namespace": "no shared memory or queues of others",
    "uts namespace": "no host name to change",
    "cgroup namespace": "does not see the machine's control groups",
    "private root": "no files but its own and read-only libraries; limited size; no /proc",
    "resource limits": "memory, CPU time, processes, open files, file size",
    "unprivileged user": "no root, no capabilities",
    "no new privileges": "set-user-id programs stay powerless",
    "landlock": "files outside its folder stay closed; no TCP; no signals to others",
    "seccomp": "no sockets, tracing, mounts, namespaces, kernel keys, uncounted memory",
}
"""Every layer and what it does."""

_MIB = 1 << 20
_GRACE_SECONDS = 5.0  # What the guard gets, after the wall limit, to end the tree and report.


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: ok (exit code 0), error (another exit code, or a signal of its own), timeout (wall or CPU time),
            memory, output (it printed more than it may), killed (ended from outside).
        stdout, stderr: what it printed, undecodable bytes replaced, cut at the limit.
        exit_code: as it exited; negative: number of the signal that ended it; None where it was ended by the sandbox.
        seconds: wall time. peak_mib: highest sampled memory of its tree (0 for runs too short to be sampled).
    """

    status: Status
    stdout: str
    stderr: str
    exit_code: int | None
    seconds: float
    peak_mib: float = 0.0


def run_python(
    program: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None, limits: Limits | None = None
) -> Outcome:
    """Run one Python program, as `main.py` in an empty folder of its own, and wait for its end.

    Raises:
        UserError: a file name that leaves the folder, or a machine on which the program cannot be confined.
    """
    return Run(Program(program, stdin, files or {}, limits or Limits())).wait()


class Sandbox:
    """Up to `workers` programs at a time.

    Args:
        workers: programs at a time; None: twice the cores that this process may use, at least 2.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None:
            check_positive("workers", workers)
        self.workers = workers or max(2, 2 * len(os.sched_getaffinity(0)))

    def map(self, programs: Iterable[str | Program]) -> list[Outcome]:
        """Run all programs; outcomes in the order of the programs."""
        whole = [program if isinstance(program, Program) else Program(program) for program in programs]
        return self.each(lambda program, stop: Run(program, stop=stop).wait(), whole)

    def each(self, function: Callable[[T, threading.Event], R], items: Sequence[T]) -> list[R]:
        """`function(item, stop)` for all items, so many at a time; `stop` is set when the caller gives up.

        Whatever interrupts the waiting caller (a time limit, control-C) or the first error of a function ends the
        programs that are running.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(min(self.workers, max(1, len(items))), thread_name_prefix="sandbox") as pool:
            futures = [pool.submit(function, item, stop) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class Run:
    """One program being run: `Run(program)` starts it and `wait()` ends it.

    Args:
        channels: file descriptors that the program inherits under the same numbers.
        capture: a further descriptor of the program's, whose bytes are in `captured` at the end.
        stop: the program is ended when this is set.
    """

    def __init__(
        self,
        program: Program,
        *,
        channels: Sequence[int] = (),
        capture: tuple[int, int] | None = None,
        stop: threading.Event | None = None,
        required: Sequence[str] = REQUIRED,
    ) -> None:
        self.limits, self.stop = program.limits, stop
        self.layers: dict[str, str] = {}
        self.report: dict[str, str] = {}
        self.captured = b""
        self._capture = capture
        self.folder = tempfile.mkdtemp(prefix="tandem-sandbox-")
        self.started = time.monotonic()
        opened: list[int] = []
        self._reading: dict[str, int] = {}
        try:
            os.chmod(self.folder, 0o700)
            channels = [*channels, *([capture[1]] if capture else [])]
            job_fd = _memory_file(marshal.dumps(job(program, self.folder, channels, required)))
            text = _memory_file(program.stdin.encode("utf-8", "surrogatepass"))
            pipes = {name: os.pipe() for name in ("report", "stdout", "stderr")}
            self._reading = {name: ends[0] for name, ends in pipes.items()}
            cancel_read, self.cancel = os.pipe()
            writing = {name: ends[1] for name, ends in pipes.items()}
            opened = [job_fd, text, cancel_read, *writing.values()]
            start_guard(job_fd, writing["report"], cancel_read, [text, writing["stdout"], writing["stderr"]], channels)
        except BaseException:
            _remove(self.folder)
            raise
        finally:
            for fd in opened:
                os.close(fd)
        self._killed_for: Status | None = None
        self._lock = threading.Lock()  # between `end` and the closing of its pipe, which may be in another thread
        self._closed = False

    def end(self, reason: Status = "killed") -> None:
        """Have the whole tree killed; `wait` then returns soon."""
        with self._lock:
            if self._closed or self._killed_for is not None:
                return
            self._killed_for = reason
            try:
                os.write(self.cancel, b"x")
            except BrokenPipeError:
                return  # the guard has ended already

    def wait(self) -> Outcome:
        """Read the output until the program ends, and clean up after it."""
        try:
            streams = self._collect()
        except BaseException:
            self.end()
            raise
        finally:
            self._close()
        return self._outcome(streams)

    def _collect(self) -> dict[str, bytes]:
        fds = dict(self._reading)
        if self._capture:
            fds["captured"] = self._capture[0]
            os.close(self._capture[1])
        found = {name: bytearray() for name in fds}
        selector = selectors.DefaultSelector()
        for name, fd in fds.items():
            selector.register(fd, selectors.EVENT_READ, name)
        limit = self.limits.output_kib * 1024
        deadline = self.started + self.limits.seconds + _GRACE_SECONDS
        with selector:
            while selector.get_map():
                for key, _ in selector.select(0.1):
                    part = os.read(key.fd, 65536)
                    kept = found[key.data]
                    if not part:
                        selector.unregister(key.fd)
                    elif len(kept) + len(part) > limit:
                        kept += part[: limit - len(kept)]
                        self.end("output")
                    else:
                        kept += part
                if self.stop is not None and self.stop.is_set():
                    self.end()
                if time.monotonic() > deadline:
                    self.end("timeout")
                    if time.monotonic() > deadline + _GRACE_SECONDS:
                        self._kill_guard(bytes(found["report"]))
                        break
        return {name: bytes(kept) for name, kept in found.items()}

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self.cancel)
        for fd in self._reading.values():
            os.close(fd)
        _remove(self.folder)

    def _kill_guard(self, report: bytes) -> None:
        """The guard itself hangs."""
        lines = [line.split() for line in report.splitlines()]
        for pid in (int(line[1]) for line in lines if line[0] == b"guard"):
            kill_guard(pid)

    def _outcome(self, streams: dict[str, bytes]) -> Outcome:
        for line in streams["report"].decode("utf-8", "replace").splitlines():
            key, _, value = line.partition(" ")
            if key in ("layer", "missing"):
                self._note_layer(key, value)
            else:
                self.report[key] = value
        unfinished = self._killed_for is None and self.report.get("end") != "timeout"
        if "failed" in self.report or ("started" not in self.report and unfinished):
            self._refuse(streams["stderr"].decode("utf-8", "replace"))
        self.captured = streams.get("captured", b"")
        stdout, stderr = (streams[name].decode("utf-8", "replace") for name in ("stdout", "stderr"))
        status, code = self._status(stderr)
        seconds = float(self.report.get("seconds", time.monotonic() - self.started))
        return Outcome(status, stdout, stderr, code, seconds, int(self.report.get("peak", 0)) / _MIB)

    def _note_layer(self, key: str, value: str) -> None:
        if key == "layer":
            self.layers[value] = ""
        else:
            name = next((n for n in LAYERS if value.startswith(n)), value)
            self.layers[name] = value[len(name) :].strip()

    def _status(self, stderr: str) -> tuple[Status, int | None]:
        if self._killed_for is not None:
            return self._killed_for, None
        end = self.report.get("end", "killed")
        if end == "timeout":
            return "timeout", None
        if end == "memory":
            return "memory", None
        if not end.startswith("exit "):
            return "killed", None
        code = int(end.split()[1])
        if code == 0:
            return "ok", 0
        if code == -24:  # SIGXCPU
            return "timeout", code
        last = stderr.rstrip().rpartition("\n")[2]
        return ("memory" if last.startswith("MemoryError") else "error"), code

    def _refuse(self, stderr: str) -> None:
        missing = "; ".join(f"{name}: {why}" for name, why in self.layers.items() if why)
        what = self.report.get("refused")
        if what is not None:
            raise UserError(
                f"the sandbox cannot confine programs on this machine: {what}",
                reason=missing,
                fix="`rl-train check` lists the protections; allow user namespaces, or use a kernel with Landlock",
            )
        reason = self.report.get("failed") or stderr.strip()[-500:] or "its guard did not begin"
        raise UserError(
            "the sandbox could not start a program",
            reason=f"{reason}; {missing}".strip("; "),
            fix="where it cannot read the interpreter, install one that every user can read",
        )


def _memory_file(content: bytes) -> int:
    """A sealed file in memory, at its start."""
    fd = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(os.dup(fd), "wb") as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _remove(folder: str) -> None:
    """Delete a folder, whatever its owner made of it: rights taken away, or nested deeper than a path can say.

    What lies in a subfolder is moved to the top before the subfolder is deleted, so that nothing is ever deep. Links
    are deleted, never followed.
    """
    os.chmod(folder, 0o700)
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    moved = 0
    prefix = f".{secrets.token_hex(8)}-"
    try:
        while names := os.listdir(top):
            for name in names:
                if not _make_open(name, top):
                    os.unlink(name, dir_fd=top)
                    continue
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    for child in os.listdir(below):
                        _make_open(child, below)
                        os.rename(child, f"{prefix}{moved}", src_dir_fd=below, dst_dir_fd=top)
                        moved += 1
                finally:
                    os.close(below)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(folder)


def _make_open(name: str, parent: int) -> bool:
    """Whether an entry is a folder; one is given back the rights that its deletion needs."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        return False
    os.chmod(name, 0o700, dir_fd=parent)
    return True
