"""Runs `rl-train` again and again, each time in a process of its own that a test may kill, without paying for imports.

Started as a script it imports everything once, reads one job per line from standard input, forks, and answers with how
the child ended. A job is JSON:

    arguments: those of `rl-train`. output: file that takes what it prints.
    kill_at: SIGKILL to itself at the so many-th touch of a file in the run folder (open, rename, remove, make).
    kill_after: seconds from the first touch on to a SIGKILL from outside.
    count: file that takes the touches of the run, one line each: seconds since the first, event, path.
    file_limit: largest file in bytes, as a full disk is met. no_report: leave the charts out, which take longest.
    patch: Python source that the child runs first.
    environment: variables that the child has beside those of its `RunServer`.
    processes: so many ranks of one run, with the variables that `torchrun` gives them. When one fails or `seconds`
        have passed, the others are killed, as its users see it. Each rank prints into a file of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# A job's `patch` that prints the seed of every generation.
COUNT_GENERATIONS = """
from tandem.rollout.transformers_engine import TransformersEngine as Engine
generate = Engine.generate
def counted(self, prompts, sampling, *rest, **more):
    print("GENERATES", sampling.seed, flush=True)
    return generate(self, prompts, sampling, *rest, **more)
Engine.generate = counted
"""
_FIXED = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# What libraries read at their import is that of all tests, not what one test has set for itself when the server starts.
_AT_FIRST = dict(os.environ)
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for all tests of a pytest process, as imports take seconds and jobs leave nothing in it. It ends with its
    standard input, so with pytest at the latest."""
    command, environment = [sys.executable, __file__], _AT_FIRST | _FIXED
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


class RunServer:
    """The server as tests use it. Runs have a cache of their own, and the variables of the moment when it was made."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._environment = {**os.environ, **_FIXED, "TANDEM_CACHE": str(folder / "cache")}

    def run(self, *arguments: object, **job: Any) -> tuple[int, str]:
        """Exit code, negative for a signal, and what was printed to both streams. Of several ranks: the code of the one
        that failed first, and what all printed, in the order of ranks."""
        self._number += 1
        output = self._folder / f"output_{self._number}.txt"
        job |= {"arguments": [str(a) for a in arguments], "output": str(output), "cwd": os.getcwd()}
        job["environment"] = self._environment | job.get("environment", {})
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        outputs = [output, *(_output(str(output), rank) for rank in range(1, job.get("processes", 1)))]
        return code, "".join(Path(path).read_text(errors="replace") for path in outputs)


def _serve() -> None:
    import torch

    names = ["matplotlib.pyplot", "peft", "datasets", "transformers.models.llama.modeling_llama", "tandem.rl.commands"]
    for name in names:
        importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):  # a second of patterns for the first model
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        if job.get("processes", 1) > 1:
            print(_ranks(job), flush=True)
            continue
        ready, tell = os.pipe()
        child = _fork(job, tell)
        os.close(tell)
        if "kill_after" in job:
            os.read(ready, 1)
            time.sleep(job["kill_after"])
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(ready)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _ranks(job: dict[str, Any]) -> int:
    """Several processes of one run, as `torchrun` starts them on one host."""
    size = job["processes"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = set()
    for rank in range(size):
        own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        part = {"output": _output(job["output"], rank), "environment": job["environment"] | own}
        running.add(_fork(job | part))
    code, end = 0, time.monotonic() + job.get("seconds", 200)
    while running:
        ended, status = os.waitpid(-1, os.WNOHANG)
        running.discard(ended)
        code = code or (os.waitstatus_to_exitcode(status) if ended else 0)
        if running and (code or time.monotonic() > end):
            for child in running:
                os.kill(child, signal.SIGKILL)
            while running:
                running.discard(os.waitpid(-1, 0)[0])
            return code or -signal.SIGKILL
        if not ended:
            time.sleep(0.02)
    return code


def _output(path: str, rank: int) -> str:
    return f"{path}.{rank}" if rank else path


def _fork(job: dict[str, Any], tell: int | None = None) -> int:
    child = os.fork()
    if child == 0:
        _child(job, tell)
    return child


def _child(job: dict[str, Any], tell: int | None) -> None:
    code = 70
    try:
        handle = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdin.close()
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        code = _rl_train(job, tell)
    except BaseException:  # noqa: BLE001 - a child must never return into the server's loop
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rl_train(job: dict[str, Any], tell: int | None) -> int:
    from tandem.rl import cli, commands

    if job.get("no_report"):
        commands.write_report = lambda run_dir: run_dir / "report.html"
    exec(job.get("patch", ""), {"__name__": "patch"})
    if "file_limit" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    _watch(job, tell)
    sys.argv = ["rl-train", *job["arguments"]]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _watch(job: dict[str, Any], tell: int | None) -> None:
    touches: list[tuple[float, str, str]] = []
    counting = job.get("count")
    log = os.open(counting, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if counting else None

    started: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if "/runs/" not in path or (event == "open" and not _writes(arguments)):
            return
        if not started:  # a run can be resumed from when its config is there, which is renamed into place
            if path.endswith("config.yaml.tmp") and event == "os.rename":
                started.append(path)
            return
        touches.append((time.monotonic(), event, path))
        if len(touches) == 1 and tell is not None:
            os.write(tell, b"x")
        if log is not None:
            os.write(log, f"{touches[-1][0] - touches[0][0]:.4f} {event} {path}\n".encode())
        if len(touches) == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    _serve()
