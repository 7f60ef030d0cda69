"""Where the numbers of a run go: `metrics.jsonl` in the run folder always, Weights & Biases when configured.

The file is the record; a tracker is a copy of it. So nothing that wandb does can stop or hold up training: every
call to it runs on one background thread, and each kind of trouble is said once.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tandem.rl.config import Config
from tandem.rl.errors import UserError
from tandem.rl.journal import prompt_text, write_whole
from tandem.rl.metrics import reward_names
from tandem.rl.samples import Scored
from tandem.rl.sections import LogConfig
from tandem.rl.watch_alerts import Alert

Warn = Callable[[str], None]

_QUEUE_LIMIT = 10_000  # calls that may wait for wandb; beyond that they are left out of the tracker
_GREETING = 5.0  # seconds for wandb to come up and say where its run is, ahead of the first step


class Trackers:
    """Writes metrics, completions and the summary of one run.

    Args:
        config: the resolved config; it is stored with the wandb run.
        run_dir: the run folder, made if it is missing.
        resume_step: the step that the run resumes from. Lines of `metrics.jsonl` after it are removed, so that an
            interrupted and resumed run leaves the same file as one that ran through, and the wandb run of before is
            continued. The summary of an earlier end goes: it is that of fewer steps. None: a fresh run.
        warn: told once about each kind of trouble; None: printed to stderr.
        wandb: a module to use in place of the installed `wandb`.
        timeout: seconds that wandb has to come up before the run is kept offline, and `close` waits for it to send what
            is left.

    Raises:
        UserError: wandb is configured and not installed, or the run is fresh and the folder already has metrics.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        resume_step: int | None = None,
        warn: Warn | None = None,
        wandb: Any = None,
        timeout: float = 30.0,
    ) -> None:
        self._run_dir = Path(run_dir)
        warn = warn or _print_warning
        wanted = _wants_wandb(config.log)
        module = (wandb or _import_wandb()) if wanted else None
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = _open_metrics(self._run_dir / "metrics.jsonl", resume_step, warn)
        if resume_step is not None:
            (self._run_dir / "summary.json").unlink(missing_ok=True)
        self._wandb = _Wandb(module, config, self._run_dir, resume_step is not None, warn, timeout) if module else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step. Numbers that are not finite become null in the file."""
        # A reward may log a metric of that name; a resumed run and the report go by the step.
        record = {"step": int(step)} | {name: _json_number(v) for name, v in metrics.items() if name != "step"}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({name: float(value) for name, value in metrics.items()}, step)

    def alert(self, step: int, alert: Alert) -> None:
        """Record an alert of reward watch as a line of its own, `event: alert`, and send it to the tracker."""
        record = {"step": int(step), "event": "alert"} | _json_value(alert.record())
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.alert(f"{self._run_dir.name}: {alert.key}", f"step {step}: {alert.text()}")

    def sync(self) -> None:
        """Bring what was recorded to the disk: a resumed run takes the lines up to its checkpoint for granted."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def completions(self, step: int, rows: Sequence[Scored]) -> None:
        """Send a table of completions: step, prompt, completion, a column per reward, reward, advantage, and
        what rewards logged (`log_extra`)."""
        if self._wandb is not None and rows:
            self._wandb.table(step, *_completions_table(step, rows))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json`, whole or not at all, and put the same into the tracker's summary."""
        plain = {name: _json_value(value) for name, value in values.items()}
        text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
        write_whole(self._run_dir / "summary.json", text.encode("ascii"))
        if self._wandb is not None:
            self._wandb.summary(plain)

    def close(self, *, failed: bool = False) -> None:
        """Close the file and let the tracker send what is left, for at most `timeout` seconds. Safe to call twice.

        Args:
            failed: the tracker shows the run as failed.
        """
        self._file.close()
        if self._wandb is not None:
            self._wandb.close(failed)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


class NoTrackers(Trackers):
    """For processes other than the first of several: records nothing."""

    def __init__(self) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def alert(self, step: int, alert: Alert) -> None: ...

    def sync(self) -> None: ...

    def completions(self, step: int, rows: Sequence[Scored]) -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def close(self, *, failed: bool = False) -> None: ...


class _Wandb:
    """One wandb run behind a queue and a thread of its own."""

    def __init__(self, module: Any, config: Config, run_dir: Path, resume: bool, warn: Warn, timeout: float) -> None:
        self._module, self._config, self._run_dir = module, config, run_dir.resolve()
        self._resume, self._warn, self._timeout = resume, warn, timeout
        self._run: Any = None
        self._said: set[str] = set()
        self._broken, self._closed, self._failed = False, False, False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUE_LIMIT)
        started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(started,), name="wandb", daemon=True)
        self._thread.start()
        patience = min(timeout, _GREETING)
        if not started.wait(patience):
            self._trouble(
                "slow start",
                f"wandb has not started within {patience:.0f} s; training goes on, and wandb gets the records later",
            )
        self._started = started

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._put(lambda: self._run.log(metrics, step=step))

    def alert(self, title: str, text: str) -> None:
        self._put(lambda: self._run.alert(title=title, text=text, level="WARN"))

    def table(self, step: int, columns: list[str], data: list[list[Any]]) -> None:
        def send() -> None:
            self._run.log({"completions": self._module.Table(columns=columns, data=data)}, step=step)

        self._put(send)

    def summary(self, values: dict[str, Any]) -> None:
        self._put(lambda: self._run.summary.update(values))

    def close(self, failed: bool) -> None:
        if self._closed:
            return
        self._closed, self._failed = True, failed
        # The thread takes the end mark last; with a full queue behind a stuck call nothing can be put or waited for.
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)
            # A run that was shorter than wandb's start: online it may give up after `timeout`, and then starts offline.
            patience = self._timeout if self._started.is_set() else 3 * self._timeout
            self._thread.join(patience)
        if self._thread.is_alive():
            self._trouble(
                "unsent",
                f"wandb has not sent everything within {patience:.0f} s; metrics.jsonl is complete, and "
                f"`wandb sync` can send what lies in {self._run_dir / 'wandb'}",
            )

    def _put(self, call: Callable[[], None]) -> None:
        if self._broken or self._closed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._trouble("slow", "wandb is too slow: records are left out of it; metrics.jsonl has them all")

    def _work(self, started: threading.Event) -> None:
        try:
            self._run = self._start()
        except Exception as error:  # noqa: BLE001 - whatever fails in a tracker is said and must not stop a run
            self._broken = True
            self._trouble("start", f"wandb could not be started, so only metrics.jsonl is written: {_one_line(error)}")
        started.set()
        while (call := self._calls.get()) is not None:
            self._attempt(call)
        if self._run is not None:
            self._attempt(lambda: self._run.finish(exit_code=int(self._failed)))

    def _attempt(self, call: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 - as above
            self._trouble("call", f"wandb failed, training goes on and metrics.jsonl is complete: {_one_line(error)}")

    def _start(self) -> Any:
        mode = self._config.log.wandb_mode
        identity = _run_identity(self._run_dir / "wandb_run.json", self._config, self._resume)
        try:
            return self._init(mode, identity)
        except Exception as error:
            if mode != "online":
                raise
            self._trouble(
                "offline",
                f"wandb cannot be reached ({_one_line(error)}); this run is kept offline in "
                f"{self._run_dir / 'wandb'} until `wandb sync`",
            )
            self._module.teardown()  # its service still holds the id of the run that failed, and would refuse it
            return self._init("offline", identity)

    def _init(self, mode: str, identity: str) -> Any:
        return self._module.init(
            project=self._config.log.wandb_project,
            name=self._config.run_name,
            id=identity,
            resume="allow",
            mode=mode,
            dir=str(self._run_dir),
            config=self._config.model_dump(mode="json"),
            allow_val_change=True,  # a resumed run may train for more steps than it was started with
            settings=self._settings(),
        )

    def _settings(self) -> Any:
        """Bounds on every wait, and no capture of the console, whose live progress is noise in a log."""
        wanted = {
            "init_timeout": self._timeout,
            "login_timeout": self._timeout,
            "finish_timeout": self._timeout,
            "console": "off",
        }
        known = getattr(self._module.Settings, "model_fields", wanted)  # older releases lack some of them
        return self._module.Settings(**{name: value for name, value in wanted.items() if name in known})

    def _trouble(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._warn(text)


def check_trackers(log: LogConfig) -> None:
    """Raises UserError: a tracker is not installed. Looked up and not imported, so that it costs nothing."""
    if _wants_wandb(log) and sys.modules.get("wandb") is None and importlib.util.find_spec("wandb") is None:
        raise _no_wandb("it is not installed")


def _wants_wandb(log: LogConfig) -> bool:
    return "wandb" in log.report_to and log.wandb_mode != "disabled"


def _no_wandb(reason: str) -> UserError:
    return UserError(
        "log.report_to names wandb, which cannot be imported",
        reason=reason,
        fix="pip install 'tandem-rl[wandb]', or set log.report_to to none",
    )


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise _no_wandb(str(error)) from error


def _run_identity(path: Path, config: Config, resume: bool) -> str:
    """The id of the wandb run: the one of before when resuming, else a new one, kept in the run folder."""
    if resume and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return str(kept["id"])
    identity = uuid.uuid4().hex[:12]
    record = {"id": identity, "project": config.log.wandb_project, "name": config.run_name}
    write_whole(path, (json.dumps(record) + "\n").encode("ascii"))
    return identity


def _open_metrics(path: Path, resume_step: int | None, warn: Warn) -> TextIO:
    if resume_step is not None and path.exists():
        _cut_metrics(path, resume_step, warn)
    elif resume_step is None and path.exists() and path.stat().st_size:
        raise UserError(
            f"{path} already holds the metrics of a run",
            reason="a second run in the same folder would be mixed with the first",
            fix="resume the run, or choose another run_name",
        )
    return path.open("a", encoding="ascii", newline="\n")


def _cut_metrics(path: Path, resume_step: int, warn: Warn) -> None:
    """Keep whole lines up to `resume_step`. The last line may be torn by a crash; another bad one is worth a word."""
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # what follows the last line end: nothing, or a line that was never finished
    kept: list[bytes] = []
    for number, line in enumerate(lines, 1):
        step = _step_of(line)
        if step is None:
            warn(f"{path} line {number} is no metrics record and was removed")
        elif step <= resume_step:
            kept.append(line)
    if torn or len(kept) != len(lines):
        write_whole(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> int | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def _json_number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json_value(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(inner) for inner in value]
    return value if value is None or isinstance(value, str) else _json_number(value)


def _completions_table(step: int, rows: Sequence[Scored]) -> tuple[list[str], list[list[Any]]]:
    names = reward_names(rows)
    logged = list(dict.fromkeys(name for row in rows for name in row.extra))
    columns = ["step", "prompt", "completion", *names, "reward", "advantage", *logged]
    data = [
        [step, _encodable(prompt_text(row.prompt.prompt)), _encodable(row.text)]
        + [row.rewards.get(name) for name in names]
        + [row.reward, row.advantage]
        + [_encodable(v) if isinstance(v := row.extra.get(name), str) else v for name in logged]
        for row in rows
    ]
    return columns, data


def _encodable(text: str) -> str:
    """wandb writes UTF-8, which has no lone surrogates; a replacement mark stands for them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
