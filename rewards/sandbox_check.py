"""Which protections of the sandbox hold on this machine: found by running a program under it."""

from __future__ import annotations

import functools
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tandem.rewards.sandbox import LAYERS, Run
from tandem.rewards.sandbox_job import Program
from tandem.rl.errors import UserError


@dataclass(frozen=True)
class Protection:
    """One layer: whether it is in force on this machine, and if not, why."""

    name: str
    in_force: bool
    why: str


_PROBE = """
import os, socket
def tries(action):
    try:
        action()
    except BaseException as error:
        return type(error).__name__
    return "possible"
print("reads", tries(lambda: open({secret!r}).read()))
print("connects", tries(lambda: socket.create_connection(("127.0.0.1", 9), 1)))
print("signals", tries(lambda: os.kill({parent}, 0)))
print("writes", tries(lambda: open({folder!r} + "/written", "w")))
"""


@functools.lru_cache(maxsize=1)
def protections() -> list[Protection]:
    """Every layer of the sandbox on this machine, found by running a program under it.

    Two checks from inside come last: that the program cannot read, write or signal what this process can, and that it
    cannot connect anywhere. They are attempts, not deductions.
    """
    if sys.platform != "linux":
        return [Protection(name, False, f"needs Linux, this is {platform.system()}") for name in LAYERS]
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.write_text("readable", encoding="utf-8")
        os.chmod(folder, 0o755)  # so that only the sandbox can be what stops the program
        run = Run(Program(_PROBE.format(secret=str(secret), folder=folder, parent=os.getpid())), required=())
        try:
            outcome = run.wait()
        except UserError as error:
            return [Protection(name, False, error.reason or error.problem) for name in LAYERS]
    layers = [
        Protection(name, run.layers.get(name, "not reached") == "", run.layers.get(name, "not reached") or what)
        for name, what in LAYERS.items()
    ]
    tried = dict(line.split(" ", 1) for line in outcome.stdout.splitlines())
    checks = {"attempt: outside": ("reads", "writes", "signals"), "attempt: network": ("connects",)}
    for name, keys in checks.items():
        found = ", ".join(f"{key}: {tried.get(key, outcome.stderr[-200:])}" for key in keys)
        refused = all(tried.get(key, "possible") not in ("possible", "ConnectionRefusedError") for key in keys)
        layers.append(Protection(name, refused, found))
    return layers
