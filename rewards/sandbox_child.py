"""The trusted program around untrusted programs: `main()` in a bare interpreter with the number of a socket.

For every program three processes, so that none that the untrusted program can touch has anything to give away:

    guard    (this program) counts memory and time of the whole tree, and kills all of it at the end
    `- init  first process of the new namespaces; builds the private root and waits
       `- payload  gives up every right, then becomes the untrusted program

It imports nothing but the standard library, and little of that, because every guard is a fork of it.
The job comes as a marshalled dict (see `sandbox_job.job`), the report goes back as lines of `key value`.
"""

from __future__ import annotations

import _socket
import ctypes
import fcntl
import marshal
import os
import resource
import select
import struct
import sys
import time

# Plain files beside this one: the interpreter that runs this sees no packages.
from sandbox_interpreter import become_new, prepare  # type: ignore[import-not-found]
from sandbox_rights import (  # type: ignore[import-not-found]
    CLONE,
    MACHINE,
    MOUNT_SETATTR,
    PIVOT_ROOT,
    PR_CAPBSET_DROP,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    call,
    close_all_but,
    drop_capabilities,
    libc,
    prctl,
    restrict_calls,
    restrict_files,
    syscall,
)

TYPE_CHECKING = False  # `typing`, `signal`, `socket` and `functools` would be in the memory of every program
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Source = tuple[tuple[bytes, str, str, int, bool], dict[str, Any]]
    """A program, as `compile` takes it, and the namespace that it runs in."""

_SIGKILL, _SIGCHLD = 9, 17
_SIG_DFL, _SIG_IGN = 0, 1
_NOBODY = 65534
_MOST_DESCRIPTORS = 64
_SAMPLING_MS = 25
_PRIVATE_UIDS = 0x60000000  # far above any account; plus the process id, so that runs cannot meet each other


class Report:
    """Lines of `key value` to the parent process; whole lines under PIPE_BUF are written at once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def say(self, key: str, value: object) -> None:
        os.write(self.fd, f"{key} {' '.join(str(value).split())[:500]}\n".encode())

    def layer(self, name: str, action: Callable[[], None]) -> bool:
        """Try to put one protection in force, and report how that went."""
        try:
            action()
        except (OSError, KeyError, ValueError) as error:
            self.say("missing", f"{name} {type(error).__name__}: {error}")
            return False
        self.say("layer", name)
        return True


# ---------------------------------------------------------------- guard


def guard(job: dict[str, Any], report: Report, cancel: int) -> Source:
    """Start the tree, watch it, kill it, and report how it ended. Returns only in the payload."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    _write_if_possible("/proc/self/oom_score_adj", "1000")
    root = os.getuid() == 0
    outside = os.getuid(), os.getgid()
    flags = CLONE["pid"] if root else CLONE["pid"] | CLONE["user"]

    def separate() -> None:
        call(libc.unshare, flags)
        if not root:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{_NOBODY} {outside[0]} 1")
            _write("/proc/self/gid_map", f"{_NOBODY} {outside[1]} 1")

    separated = {"process"} if report.layer("process namespace", separate) else set()
    started = time.monotonic()
    guard_pid = os.getpid()
    end_read, end_write = os.pipe()
    init_pid = os.fork()
    if init_pid == 0:
        return init(job, report, separated, guard_pid, end_write)
    os.close(end_write)
    for fd in (0, 1, 2, *job["channels"]):
        os.close(fd)
    watch = Watch(job, init_pid, cancel, started)
    reason = watch.until_end()
    end = os.read(end_read, 64).decode() if reason == "ended" else ""
    kill_tree(init_pid)
    report.say("seconds", f"{time.monotonic() - started:.4f}")
    report.say("peak", watch.peak)
    report.say("end", end or ("killed" if reason == "ended" else reason))
    os._exit(0)


class Watch:
    """Waits for the end of init, sampling memory and CPU of all that runs below it."""

    def __init__(self, job: dict[str, Any], init_pid: int, cancel: int, started: float) -> None:
        self.memory, self.cpu, self.wall = job["memory"], job["cpu"], job["wall"]
        self.init_pid, self.cancel, self.started = init_pid, cancel, started
        self.peak = 0
        self.finished_cpu: dict[int, float] = {}

    def until_end(self) -> str:
        """`ended` (init is gone), `timeout`, `memory` or `cancelled`."""
        poll = select.poll()
        handle = os.pidfd_open(self.init_pid)
        poll.register(handle, select.POLLIN)
        poll.register(self.cancel, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(_SAMPLING_MS)]
            if handle in ready:
                return "ended"
            if self.cancel in ready:
                return "cancelled"
            if time.monotonic() - self.started > self.wall:
                return "timeout"
            used, seconds = self.sample()
            self.peak = max(self.peak, used)
            if used > self.memory:
                return "memory"
            if seconds > self.cpu:
                return "timeout"

    def sample(self) -> tuple[int, float]:
        """Resident private and shared memory in bytes, and CPU seconds, of the payload and all processes below it.

        CPU seconds of processes that have ended stay counted at their last sample.
        """
        total = 0
        for pid in descendants(self.init_pid)[1:]:
            used, seconds = _usage(pid)
            total += used
            self.finished_cpu[pid] = max(seconds, self.finished_cpu.get(pid, 0.0))
        return total, sum(self.finished_cpu.values())


_TICKS = os.sysconf("SC_CLK_TCK")


def _usage(pid: int) -> tuple[int, float]:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = file.read().split(b"\n")
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0, 0.0  # it has ended
    used = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith((b"RssAnon:", b"RssShmem:")))
    return used, (int(fields[11]) + int(fields[12])) / _TICKS


def descendants(root: int) -> list[int]:
    """`root` and every process below it. In the namespace, or below a subreaper, a daemon cannot leave this tree."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                    waiting.extend(int(child) for child in file.read().split())
        except OSError:
            continue  # it has ended
    return found


def kill_tree(init_pid: int) -> None:
    """Kill everything below this process. Killing the first process of a namespace ends the namespace at once;
    without one, the orphans come to this process (it is their subreaper) and are killed until none is left."""
    _kill(init_pid)
    while True:
        below = [pid for pid in descendants(os.getpid()) if pid != os.getpid()]
        for pid in below:
            _kill(pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, _SIGKILL)
    except ProcessLookupError:
        return


# ---------------------------------------------------------------- init


def init(job: dict[str, Any], report: Report, separated: set[str], guard_pid: int, end: int) -> Source:
    """First process of the namespaces: builds the payload's world, starts it, and tells the guard how it ended.

    Returns only in the payload.
    """
    prctl(PR_SET_PDEATHSIG, _SIGKILL)
    if "process" not in separated and os.getppid() != guard_pid:
        os._exit(125)  # the guard died before this line
    prctl(PR_SET_DUMPABLE, 0)
    os.setsid()
    for name in ("network", "ipc", "uts", "cgroup"):
        if report.layer(f"{name} namespace", _leaving(CLONE[name])):
            separated |= {name}
    root = os.geteuid() == 0
    uid = _private_uid(guard_pid) if root else None
    if "process" in separated and report.layer("private root", lambda: build_root(job, uid)):
        separated |= {"root"}
    else:
        libc.umount2(os.fsencode(job["folder"]), _MNT_DETACH)  # what a failure may have left of the root
        write_files(job["folder"], job["files"], uid)
        os.chdir(job["folder"])
    payload_pid = os.fork()
    if payload_pid == 0:
        return payload(job, report, uid, separated)
    os.close(report.fd)
    for fd in (0, 1, 2, *job["channels"]):
        os.close(fd)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == payload_pid:
            os.write(end, f"exit {os.waitstatus_to_exitcode(status)}".encode())
            os._exit(0)


def _leaving(namespace: int) -> Callable[[], None]:
    def leave() -> None:
        call(libc.unshare, namespace)

    return leave


def _private_uid(number: int) -> int:
    """A user id that nobody else has, if this process may take it; else nobody's."""
    candidate = _PRIVATE_UIDS + number
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [[int(field) for field in line.split()] for line in file]
    return candidate if any(start <= candidate < start + length for start, _, length in ranges) else _NOBODY


_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4


def build_root(job: dict[str, Any], uid: int | None) -> None:
    """Leave the machine's files for a root of our own: read-only libraries, a few devices, and one folder to write.

    The folder is a tmpfs of limited size, so that what the payload writes never reaches a disk and ends with it.
    There is no /proc: nothing in it is needed, and much in it tells of others.
    """
    call(libc.unshare, CLONE["mount"])
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    new = job["folder"]
    _mount("tmpfs", new, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    for path in job["readable"]:
        _show(path, new)
    for path in job["hidden"]:
        if os.path.isdir(new + path):
            _mount("tmpfs", new + path, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4k,mode=555")
    for device in job["devices"]:
        _show(device, new, read_only=False)
    os.mkdir(new + "/box")
    _mount("tmpfs", new + "/box", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={job['disk']},nr_inodes=20k,mode=700")
    for place in ("/tmp", "/dev/shm"):
        if not os.path.lexists(new + place):  # it is there if a library lies in it
            os.symlink("/box/tmp", new + place)
    write_files(new + "/box", job["files"], uid)
    os.chdir(new)
    syscall(PIVOT_ROOT[MACHINE], b".", b".")
    call(libc.umount2, b".", _MNT_DETACH)
    _set_attributes("/", _ATTR_RDONLY, recursive=False)
    os.chdir("/box")


def _show(path: str, root: str, *, read_only: bool = True) -> None:
    """Make a path of the machine visible at the same place below `root`."""
    target = root + path
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _MS_BIND | _MS_REC)
    _set_attributes(target, (_ATTR_RDONLY | _ATTR_NODEV if read_only else 0) | _ATTR_NOSUID, recursive=True)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    try:
        call(libc.mount, encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"mount {target}") from error


def _set_attributes(target: str, attributes: int, *, recursive: bool) -> None:
    request = struct.pack("QQQQ", attributes, 0, 0, 0)
    at_fdcwd, at_recursive = -100, 0x8000
    flags = at_recursive if recursive else 0
    syscall(MOUNT_SETATTR, at_fdcwd, os.fsencode(target), flags, request, ctypes.c_size_t(len(request)))


def write_files(folder: str, files: dict[str, bytes], uid: int | None) -> None:
    """The program and its files, owned by the payload's user; also its temporary folder."""
    for name in ("tmp", *(os.path.dirname(name) for name in files)):
        os.makedirs(os.path.join(folder, name), mode=0o700, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    if uid is not None:
        for place, _, names in os.walk(folder):
            for path in (place, *(os.path.join(place, name) for name in names)):
                os.chown(path, uid, uid)


# ---------------------------------------------------------------- payload


def payload(job: dict[str, Any], report: Report, uid: int | None, separated: set[str]) -> Source:
    """Give up every right, in the order in which rights are needed to do so, and become the program."""
    os.setsid()
    os.umask(0o077)
    folder = "/box" if "root" in separated else job["folder"]
    for limit, value in job["limits"]:
        resource.setrlimit(limit, (value, value))
    report.say("layer", "resource limits")
    _become_unprivileged(uid)
    report.say("layer", "unprivileged user")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    report.say("layer", "no new privileges")
    if report.layer("landlock", lambda: restrict_files(job["readable"], job["devices"], folder)):
        separated |= {"landlock"}
    rules = {"own_signals_only": "process" not in separated, "deny_modes": "root" not in separated}
    if report.layer("seccomp", lambda: restrict_calls(**rules)):
        separated |= {"seccomp"}
    missing = set(job["required"]) - _in_force(separated, uid)
    if missing:
        report.say("refused", ", ".join(sorted(missing)))
        os._exit(125)
    os.close(os.open(os.__file__, os.O_RDONLY))  # a standard library that this user cannot read is no program's fault
    environment = {name: value.replace("{folder}", folder) for name, value in job["environment"].items()}
    namespace = become_new(folder, environment, job["libraries"])
    report.say("started", 1)
    close_all_but(job["channels"])
    return (job["files"]["main.py"], f"{folder}/main.py", "exec", 0, True), namespace


def _become_unprivileged(uid: int | None) -> None:
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last one, or not allowed to, and then there is nothing to drop
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    drop_capabilities()


def _in_force(separated: set[str], uid: int | None) -> set[str]:
    """Which of the protections that a job may require hold for this process."""
    found = {"privileges"}
    if separated & {"network", "seccomp"}:
        found.add("network")
    if separated & {"root", "landlock"}:
        found.add("files")
    if uid is not None or separated & {"process", "seccomp"}:
        found.add("processes")
    return found


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _write_if_possible(path: str, text: str) -> None:
    try:
        _write(path, text)
    except OSError:
        return  # only lowers the chance that the machine, out of memory, kills the wrong process


# ---------------------------------------------------------------- starter


def main() -> Source:
    """Fork a guard for every message until the other end of the socket is closed. Returns only in payloads."""
    prepare()
    libc.signal(_SIGCHLD, ctypes.c_void_p(_SIG_IGN))  # nobody waits for the guards
    requests = _socket.socket(fileno=int(sys.argv[1]))
    while True:
        message, ancillary, _, _ = requests.recvmsg(1 << 16, _socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS))
        if not message:
            os._exit(0)
        fds = [fd for _, _, data in ancillary for (fd,) in struct.iter_unpack("i", data)]
        if os.fork() == 0:
            requests.close()
            libc.signal(_SIGCHLD, ctypes.c_void_p(_SIG_DFL))
            os.setsid()
            return _guard_of(fds, marshal.loads(message))
        for fd in fds:
            os.close(fd)


def _guard_of(fds: list[int], channels: list[int]) -> Source:
    """Run a job in this new process; whatever fails is reported, and nothing untrusted starts after it."""
    job_fd, report_fd, cancel = place(fds, channels)
    report = Report(report_fd)
    try:
        report.say("guard", os.getpid())
        with open(job_fd, "rb") as file:
            job = marshal.loads(file.read())
        return guard(job, report, cancel)
    except BaseException as error:  # noqa: BLE001  reported; nobody above could do anything with it
        try:
            report.say("failed", f"{type(error).__name__}: {error}")
        finally:
            os._exit(125)


def place(fds: list[int], channels: list[int]) -> list[int]:
    """Give the descriptors of a message their numbers; returns those of job, report and cancel.

    Only 0, 1, 2 and the channels are left inheritable: everything else closes when the program starts.
    """
    wanted = [0, 1, 2, *channels]
    above = max(*wanted, *fds) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
    for fd in fds:
        os.close(fd)
    own, given = moved[: -len(wanted)], moved[-len(wanted) :]
    for fd, number in zip(given, wanted, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    return own
