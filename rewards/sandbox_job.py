"""What the guard of a sandbox is told: the program, its limits, and what of the machine it may see."""

from __future__ import annotations

import functools
import math
import os
import resource
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tandem.rl.errors import UserError, short

_MIB = 1 << 20

START_ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8", "PYTHONHASHSEED": "0"}
"""What an interpreter looks at when it starts: text is UTF-8, and sets are in the same order in every run."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall time from start to end, the start of the sandbox (about 0.02 s) included.
        cpu_seconds: CPU time, of all its processes together; None: as much as `seconds`.
        memory_mib: memory in MiB, of each process as address space and of all together as resident memory.
        file_mib: size of one file. disk_mib: size of all its files together (they lie in memory).
        output_kib: bytes in KiB that are kept of each of stdout and stderr; a program that prints more is ended.
        processes: processes and threads at a time.
        open_files: open files per process.
        libraries: folders with packages that it may import (read-only), such as a `site-packages`.
    """

    seconds: float = 5.0
    cpu_seconds: float | None = None
    memory_mib: int = 512
    file_mib: int = 16
    disk_mib: int = 32
    output_kib: int = 256
    processes: int = 32
    open_files: int = 64
    libraries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_mib", "file_mib", "disk_mib", "output_kib", "processes", "open_files"):
            check_positive(name, getattr(self, name))
        if self.cpu_seconds is not None:
            check_positive("cpu_seconds", self.cpu_seconds)
        for folder in self.libraries:
            if not Path(folder).is_dir():
                raise UserError(f"there is no folder {folder!r} of libraries", fix="name a folder with packages")


@dataclass(frozen=True)
class Program:
    """A program and what it gets: text on stdin, and files by relative name in its working folder."""

    source: str
    stdin: str = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


def job(program: Program, folder: str, channels: Sequence[int], required: Sequence[str]) -> dict[str, Any]:
    limits = program.limits
    cpu = limits.seconds if limits.cpu_seconds is None else limits.cpu_seconds
    memory = limits.memory_mib * _MIB
    libraries = [os.path.realpath(path) for path in limits.libraries]
    files = {"main.py": program.source.encode("utf-8", "surrogatepass")}
    for name, content in program.files.items():
        files[_file_name(name)] = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    environment = {
        **START_ENVIRONMENT,
        "PATH": "/usr/bin:/bin",
        "HOME": "{folder}",
        "TMPDIR": "{folder}/tmp",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if libraries:
        environment["PYTHONPATH"] = os.pathsep.join(libraries)
    return {
        "folder": folder,
        "files": files,
        "channels": list(channels),
        "required": list(required),
        "memory": memory,
        "cpu": float(cpu),
        "wall": float(limits.seconds),
        "disk": limits.disk_mib * _MIB,
        "limits": [
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CPU, math.ceil(cpu) + 1),
            (resource.RLIMIT_FSIZE, limits.file_mib * _MIB),
            (resource.RLIMIT_NPROC, limits.processes),
            (resource.RLIMIT_NOFILE, limits.open_files),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ],
        "readable": [*_readable(), *libraries],
        "hidden": [path for path in _packages() if path not in libraries],
        "devices": ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"],
        "libraries": libraries,
        "environment": environment,
    }


def _file_name(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name or str(path) in (".", "main.py"):
        raise UserError(
            f"{short(name)} is no name for a file of a sandboxed program",
            fix="give a relative path that stays in the folder and is not main.py",
        )
    return str(path)


@functools.lru_cache(maxsize=1)
def interpreter() -> str:
    """The interpreter behind a virtual environment, so that nothing of the environment is needed inside."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.lru_cache(maxsize=1)
def _readable() -> tuple[str, ...]:
    """The interpreter, its standard library and shared libraries; the system's shared libraries and time zones."""
    stdlib = os.path.realpath(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    shared = sysconfig.get_config_var("LDLIBRARY") or ""
    own = Path(sysconfig.get_config_var("LIBDIR") or "/nonexistent")
    own_libraries = [str(path) for path in own.glob("libpython*") if path.exists()] if shared.endswith(".so") else []
    system = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    paths = [*system, interpreter(), stdlib, *own_libraries, *map(os.path.realpath, own_libraries)]
    kept: list[str] = []
    for path in dict.fromkeys(paths):
        inside = any(path.startswith(f"{parent}/") for parent in kept if not os.path.islink(parent))
        if os.path.exists(path) and not inside:
            kept.append(path)
    return tuple(kept)


@functools.lru_cache(maxsize=1)
def _packages() -> tuple[str, ...]:
    """Folders with installed packages that lie inside the readable ones."""
    stdlib = os.path.realpath(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    candidates = [f"{stdlib}/site-packages", f"{stdlib}/dist-packages", "/usr/lib/python3/dist-packages"]
    return tuple(path for path in candidates if os.path.isdir(path))


def check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name} is {short(value)}", fix="give a number above 0")
