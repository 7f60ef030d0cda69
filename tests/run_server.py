"""Runs `rl-train` again and again, each time in a process of its own that a test may kill, without paying for imports.

Started as a script it imports everything once, reads one job per line from standard input, forks, and answers with how
the child ended. A job is JSON:

    arguments: those of `rl-train`. output: file that takes what it prints.
    kill_at: SIGKILL to itself at the so many-th touch of a file in the run folder (open, rename, remove, make).
    kill_after: seconds from the first touch on to a SIGKILL from outside.
    count: file that takes the touches of the run, one line each: seconds since the first, event, path.
    file_limit: largest file in bytes, as a full disk is met. no_report: leave the charts out, which take longest.
    patch: Python source that the child runs first.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
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
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class RunServer:
    """The server as tests use it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TANDEM_CACHE": str(folder / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *arguments: object, **job: Any) -> tuple[int, str]:
        """Exit code, negative for a signal, and what was printed to both streams."""
        self._number += 1
        output = self._folder / f"output_{self._number}.txt"
        job |= {"arguments": [str(a) for a in arguments], "output": str(output)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return code, output.read_text(errors="replace")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _serve() -> None:
    import torch

    for name in ("matplotlib.pyplot", "peft", "transformers.models.llama.modeling_llama", "tandem.rl.commands"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ready)
            _child(job, tell)
        os.close(tell)
        if "kill_after" in job:
            os.read(ready, 1)
            time.sleep(job["kill_after"])
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(ready)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(job: dict[str, Any], tell: int) -> None:
    code = 70
    try:
        handle = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdin.close()
        code = _rl_train(job, tell)
    except BaseException:  # noqa: BLE001 - a child must never return into the server's loop
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rl_train(job: dict[str, Any], tell: int) -> int:
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


def _watch(job: dict[str, Any], tell: int) -> None:
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
        if len(touches) == 1:
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
