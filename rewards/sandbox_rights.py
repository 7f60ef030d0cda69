"""Giving up rights on Linux: system calls by number, capabilities, Landlock and seccomp.

ctypes is an exception that this file makes: Python 3.11 has no call for namespaces, mounts, Landlock or seccomp, and a
binding of each would be one more package to trust. Every use goes through `call` (a C function) or `syscall` (a system
call by number), whose failure raises OSError. Numbers are those of x86_64 and aarch64; elsewhere a KeyError says so,
and the protection counts as missing.

Imported by `sandbox_child` as a plain file, so it uses nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

TYPE_CHECKING = False  # `typing` is not imported: it would cost as much as all the rest
if TYPE_CHECKING:
    from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
MACHINE = os.uname().machine

CLONE = {
    "user": 0x10000000,
    "pid": 0x20000000,
    "mount": 0x00020000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

# System calls whose numbers are the same on every architecture.
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CAPSET = {"x86_64": 126, "aarch64": 91}
CLOSE_RANGE, MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 436, 442, 444, 445, 446

# Denied to the payload, (x86_64, aarch64). Sockets, the views into other processes, everything that changes mounts,
# namespaces or the kernel, and memory that no limit counts (memfd, System V and POSIX queues).
DENIED = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "fanotify_init": (300, 262),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount_setattr": (442, 442),
    "memfd_secret": (447, 447),
}
SIGNALLING = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
# Changes of mode, which Landlock does not cover: denied where the machine's files are in sight. -1: no such call.
MODES = {"chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)}
CLONE_CALL, CLONE3_CALL = (56, 220), 435


def call(function: Any, *arguments: Any) -> int:
    result = int(function(*arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def syscall(number: int, *arguments: Any) -> int:
    return call(libc.syscall, ctypes.c_long(number), *arguments)


def prctl(option: int, *arguments: int) -> None:
    call(libc.prctl, option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]))


def drop_capabilities() -> None:
    header = struct.pack("Ii", 0x20080522, 0)
    syscall(CAPSET[MACHINE], header, bytes(24))


def close_all_but(kept: list[int]) -> None:
    """Close every descriptor but 0, 1, 2 and these."""
    numbers = sorted({2, *kept})
    for before, after in zip(numbers, [*numbers[1:], 1 << 32], strict=True):
        if after - before > 1:
            try:
                syscall(CLOSE_RANGE, ctypes.c_uint(before + 1), ctypes.c_uint(after - 1), 0)
            except OSError:  # Linux before 5.9
                os.closerange(before + 1, min(after, 1 << 20))


_READ_FILE, _READ_DIR, _EXECUTE, _WRITE_FILE, _TRUNCATE = 1 << 2, 1 << 3, 1 << 0, 1 << 1, 1 << 14


def restrict_files(readable: list[str], devices: list[str], folder: str) -> None:
    """Landlock: reads below the libraries, everything below `folder`, no TCP, no signals to processes outside."""
    abi = syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network = 3 if abi >= 4 else 0
    scopes = 3 if abi >= 6 else 0
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("QQQ", rights, network, scopes)[:size]
    ruleset = syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    rules = [(path, _READ_FILE | _READ_DIR | _EXECUTE) for path in readable]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in devices]
    for path, allowed in [*rules, (folder, rights)]:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            allowed &= _READ_FILE | _WRITE_FILE | _EXECUTE | _TRUNCATE
        syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed & rights, fd), 0)
        os.close(fd)
    syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _DENY, _KILL, _UNKNOWN = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000, 0x00050000 | errno.ENOSYS
_NUMBER, _ARCHITECTURE, _ARGUMENT_0 = 0, 4, 16


def filter_program(machine: str, own_pid: int | None, *, deny_modes: bool = False) -> bytes:
    """The seccomp filter as BPF instructions. `own_pid`: the only process that may be signalled; None: no rule."""
    column = {"x86_64": 0, "aarch64": 1}[machine]
    namespaces = sum(CLONE.values())
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":  # the x32 calls are the same calls under other numbers
        code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for numbers in [*DENIED.values(), *(MODES.values() if deny_modes else ())]:
        if numbers[column] >= 0:
            code += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _DENY)]
    # The C library falls back from clone3, whose flags a filter cannot see, to clone.
    code += [(_EQUAL, 0, 1, CLONE3_CALL), (_RETURN, 0, 0, _UNKNOWN)]
    code += [(_EQUAL, 0, 4, CLONE_CALL[column]), (_LOAD, 0, 0, _ARGUMENT_0)]
    code += [(_ANY_BIT, 0, 1, namespaces), (_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _ALLOW)]
    if own_pid is not None:
        for numbers in SIGNALLING.values():
            code += [(_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _ARGUMENT_0)]
            code += [(_EQUAL, 1, 0, own_pid), (_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def restrict_calls(*, own_signals_only: bool, deny_modes: bool = False) -> None:
    """Install the filter for this process and all that come after it."""
    program = filter_program(MACHINE, os.getpid() if own_signals_only else None, deny_modes=deny_modes)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(header)
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(pointer))
