"""Metrics, trackers, the journal and the console: what a run records and shows."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.rl.config import Config
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.journal import drop_after, read_rollouts, rollout_files, write_rollouts
from tandem.rl.metrics import Meter, rollout_metrics
from tandem.rl.samples import Completion, Prompt, Scored
from tandem.rl.trackers import Trackers
from tandem.rl.watch_alerts import Alert


def make_config(**log: Any) -> Config:
    return Config.model_validate(
        {
            "run_name": "trial",
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "rewards": {"reward_funcs": ["math_answer"]},
            "log": log,
        }
    )


def make_row(group=0, reward=1.0, rewards=None, length=3, truncated=False, text="out", prompt="in", advantage=0.5):
    rewards = {"a": reward} if rewards is None else rewards
    completion = Completion(list(range(length)), [-0.25] * length, truncated)
    return Scored(Prompt(group + 100, [1, 2], prompt), completion, group, text, rewards, reward, advantage)


# --- metrics


def test_meter_agrees_with_numpy_however_the_data_is_cut():
    values = np.random.default_rng(0).normal(size=240) * 10.0 ** np.random.default_rng(1).integers(-8, 8, 240)
    weights = np.random.default_rng(2).integers(0, 3, 240).astype(float)
    repeated = np.repeat(values, weights.astype(int))
    expected = {
        "mean": repeated.mean(),
        "sum": repeated.sum(),
        "min": repeated.min(),
        "max": repeated.max(),
        "std": repeated.std(ddof=1),
    }
    results = []
    for cuts in ([], [1, 2, 77], list(range(10, 240, 10))):
        meter = Meter()
        pieces = list(zip(np.split(values, cuts), np.split(weights, cuts), strict=True))
        for part, weight in pieces[::-1] if len(cuts) > 3 else pieces:
            for how in expected:
                meter.add(how, torch.tensor(part), how=how, weight=torch.tensor(weight))
        results.append(meter.result())
    assert list(results[0]) == list(expected)
    for how, value in expected.items():
        assert results[0][how] == pytest.approx(value, rel=1e-12)
    assert results[0] == results[1] == results[2]  # to the last bit


def test_meter_takes_numbers_lists_tensors_and_masks():
    meter = Meter()
    meter.add("mixed", 1)
    meter.add("mixed", [2.0, [3.0, torch.tensor(4.0)]])
    meter.add("mixed", torch.tensor([[5.0, 6.0]], dtype=torch.bfloat16, requires_grad=True))
    meter.add("mixed", np.float32(7.0))
    meter.add("masked", torch.tensor([[1.0, math.nan], [3.0, 100.0]]), weight=torch.tensor([[1, 0], [1, 0]]).bool())
    meter.add("by_tokens", 2.0, weight=3)
    meter.add("by_tokens", 6.0, weight=1)
    assert meter.result() == {"mixed": 4.0, "masked": 2.0, "by_tokens": 3.0}


def test_meter_edges():
    meter = Meter()
    for how in ("mean", "sum", "min", "max", "std"):
        meter.add(how, [], how=how)
    meter.add("one", 3.0, how="std")
    meter.add("nan", [1.0, math.nan], how="max")
    meter.add("infinite", [math.inf, -math.inf], how="sum")
    result = meter.result()
    assert result.pop("sum") == 0.0
    assert all(math.isnan(value) for value in result.values())
    with pytest.raises(ValueError, match="before"):
        meter.add("mean", 1.0, how="max")
    with pytest.raises(ValueError, match="2 values but 3 weights"):
        meter.add("w", [1.0, 2.0], weight=[1, 1, 1])
    with pytest.raises(ValueError, match="negative"):
        meter.add("w", 1.0, weight=-1)
    with pytest.raises(ValueError, match="median"):
        meter.add("w", 1.0, how="median")  # type: ignore[arg-type]


def test_rollout_metrics_agree_with_numpy():
    a = np.array([1.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1])
    b = np.array([np.nan, 2.0, 3.0, np.nan] + [1.0] * 4 + [np.nan] * 4)
    lengths = np.array([3, 9, 4, 5, 9, 1, 2, 8, 9, 9, 7, 6])
    truncated = lengths == 9
    total = a + 0.5 * np.nan_to_num(b)
    rows = [
        make_row(i // 4, total[i], {"a": a[i], "b": None if np.isnan(b[i]) else b[i]}, lengths[i], bool(truncated[i]))
        for i in range(12)
    ]
    ended = lengths[~truncated]
    assert rollout_metrics(rows) == pytest.approx(
        {
            "reward": total.mean(),
            "reward_std": total.std(ddof=1),
            "frac_reward_zero_std": 2 / 3,
            "rewards/a/mean": a.mean(),
            "rewards/a/std": a.std(ddof=1),
            "rewards/b/mean": np.nanmean(b),
            "rewards/b/std": np.nanstd(b, ddof=1),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": 1,
            "completions/max_length": 9,
            "completions/clipped_ratio": truncated.mean(),
            "completions/mean_terminated_length": ended.mean(),
            "completions/min_terminated_length": 1,
            "completions/max_terminated_length": 8,
        },
        rel=1e-12,
    )


def test_rows_without_any_applicable_reward_do_not_count():
    """As in TRL: a row that no function scored is left out of `reward` and its spread, not counted as zero."""
    table = np.array([[1.0, 2.0], [np.nan, 3.0], [np.nan, np.nan], [0.0, 0.0]])
    rows = []
    for group, (x, y) in zip((0, 0, 1, 1), table, strict=True):
        values = {name: None if np.isnan(v) else float(v) for name, v in (("x", x), ("y", y))}
        rows.append(make_row(group, sum(v for v in values.values() if v is not None), values))
    metrics = rollout_metrics(rows)
    totals = np.array([3.0, 3.0, np.nan, 0.0])
    assert metrics["reward"] == pytest.approx(np.nanmean(totals))
    assert metrics["reward_std"] == pytest.approx(np.nanstd(totals, ddof=1))
    assert metrics["rewards/x/std"] == pytest.approx(np.nanstd(table[:, 0], ddof=1))
    assert metrics["rewards/y/std"] == pytest.approx(np.nanstd(table[:, 1], ddof=1))
    assert metrics["frac_reward_zero_std"] == 0.5  # the spread of one value is unknown, not zero


def test_rollout_metrics_where_nothing_ended_and_groups_of_one():
    metrics = rollout_metrics([make_row(0, 1.0, truncated=True), make_row(1, 2.0, truncated=True)])
    assert metrics["completions/mean_terminated_length"] == 0.0
    assert metrics["frac_reward_zero_std"] == 1.0
    assert math.isnan(rollout_metrics([make_row()])["reward_std"])
    with pytest.raises(ValueError, match="at least one"):
        rollout_metrics([])


# --- metrics.jsonl


def strict_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_is_strict_json_and_there_at_once(tmp_path):
    trackers = Trackers(make_config(), tmp_path)
    trackers.log(1, {"reward": 0.5, "kl": math.nan, "up": math.inf, "num_tokens": 7, "t": torch.tensor(2.0)})
    expected = {"step": 1, "reward": 0.5, "kl": None, "up": None, "num_tokens": 7, "t": 2.0}
    assert strict_lines(tmp_path / "metrics.jsonl") == [expected]  # before it is closed
    trackers.summary({"score_after": math.nan, "parts": {"a": [1, math.inf]}, "text": "x"})
    trackers.close()
    trackers.close()
    assert strict_lines(tmp_path / "metrics.jsonl") == [expected]
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "score_after": None,
        "parts": {"a": [1, None]},
        "text": "x",
    }


def log_steps(trackers: Trackers, first: int, last: int) -> None:
    for step in range(first, last + 1):
        trackers.log(step, {"reward": step / 7, "naïve": step})
        if step % 2 == 0:
            trackers.log(step, {"eval/score": step / 3})


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    with Trackers(make_config(), tmp_path / "whole") as trackers:
        log_steps(trackers, 1, 9)
    with Trackers(make_config(), tmp_path / "cut") as trackers:
        log_steps(trackers, 1, 7)
    path = tmp_path / "cut" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 8, "rew')  # torn by a crash
    with Trackers(make_config(), tmp_path / "cut", resume_step=4) as trackers:
        log_steps(trackers, 5, 9)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert not list((tmp_path / "cut").glob("*.tmp"))


def test_a_metric_named_step_is_not_the_step(tmp_path):
    with Trackers(make_config(), tmp_path) as trackers:
        trackers.log(3, {"step": 0.5, "loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    assert json.loads(path.read_text()) == {"step": 3, "loss": 1.0}
    said: list[str] = []
    Trackers(make_config(), tmp_path, resume_step=3, warn=said.append).close()
    assert json.loads(path.read_text())["step"] == 3
    assert not said


def test_resume_removes_a_torn_line_even_where_nothing_else_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    Trackers(make_config(), tmp_path, resume_step=5).close()
    assert path.read_text() == '{"step": 1, "a": 1}\n'


def test_a_bad_line_in_the_middle_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 2}\n')
    said: list[str] = []
    Trackers(make_config(), tmp_path, resume_step=2, warn=said.append).close()
    assert [line["step"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert len(said) == 1
    assert "line 2" in said[0]


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="already holds"):
        Trackers(make_config(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


# --- wandb


class FakeRun:
    def __init__(self, fault: BaseException | None = None, hold: threading.Event | None = None) -> None:
        self.fault, self.hold = fault, hold
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.alerts: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self.hold is not None:
            self.hold.wait()
        if self.fault is not None:
            raise self.fault
        self.logged.append((step, metrics))

    def alert(self, **said: Any) -> None:
        self.alerts.append(said)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb:
    """Stands for the module; `faults` maps a mode to the exception that `init` raises in it."""

    def __init__(self, run: FakeRun | None = None, faults: dict[str, BaseException] | None = None) -> None:
        self.run, self.faults = run or FakeRun(), faults or {}
        self.inits: list[dict[str, Any]] = []
        self.held: str | None = None

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def Table(self, columns: list[str], data: list[list[Any]]) -> SimpleNamespace:
        return SimpleNamespace(columns=columns, data=data)

    def init(self, **values: Any) -> FakeRun:
        self.inits.append(values)
        if values["id"] == self.held:
            raise RuntimeError(f"run ID {self.held} is in use")
        self.held = values["id"]
        if values["mode"] in self.faults:
            raise self.faults[values["mode"]]
        return self.run

    def teardown(self) -> None:
        self.held = None


def wandb_config(mode: str = "online") -> Config:
    return make_config(report_to="wandb", wandb_mode=mode, wandb_project="proj")


def test_wandb_gets_what_the_file_gets(tmp_path):
    fake, said = FakeWandb(), []
    trackers = Trackers(wandb_config(), tmp_path, wandb=fake, warn=said.append, timeout=5)
    trackers.log(3, {"reward": 1.0})
    rows = [
        make_row(rewards={"a": 1.0, "b": None}, text="t\ud800"),
        make_row(rewards={"a": 0.0, "b": 2.0}, prompt=[{"role": "user", "content": "q"}]),
    ]
    rows[0].extra["seen"] = "s\ud800"
    trackers.completions(3, rows)
    trackers.summary({"score_after": 1.0})
    trackers.close()
    (step, metrics), (table_step, table) = fake.run.logged
    assert (step, metrics, table_step) == (3, {"reward": 1.0}, 3)
    assert table["completions"].columns == ["step", "prompt", "completion", "a", "b", "reward", "advantage", "seen"]
    assert table["completions"].data == [
        [3, "in", "t\ufffd", 1.0, None, 1.0, 0.5, "s\ufffd"],
        [3, "user: q", "out", 0.0, 2.0, 1.0, 0.5, None],
    ]
    assert fake.run.summary == {"score_after": 1.0}
    assert fake.run.exit_code == 0
    init = fake.inits[0]
    assert (init["project"], init["name"], init["mode"], init["resume"]) == ("proj", "trial", "online", "allow")
    assert init["dir"] == str(tmp_path.resolve())
    assert init["config"] == wandb_config().model_dump(mode="json")
    assert not said


def test_an_alert_is_a_line_of_its_own_and_wandb_gets_it(tmp_path):
    fake = FakeWandb()
    alert = Alert("watched_falls", "judge", -math.inf, -0.25, "judge gets worse")
    with Trackers(wandb_config(), tmp_path, wandb=fake, timeout=5) as trackers:
        trackers.alert(3, alert)
        trackers.log(3, {"reward": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "step": 3,
        "event": "alert",
        "name": "watched_falls",
        "about": "judge",
        "value": None,
        "threshold": -0.25,
        "message": "judge gets worse",
        "fix": alert.fix,
    }
    assert lines[1] == {"step": 3, "reward": 1.0}
    (sent,) = fake.run.alerts
    assert sent["level"] == "WARN"
    assert "watched_falls judge" in sent["title"]
    assert "step 3" in sent["text"]
    assert alert.fix in sent["text"]
    Trackers(wandb_config("disabled"), tmp_path, resume_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # a step that is done again says it again


def test_resume_continues_the_same_wandb_run(tmp_path):
    first, second, third = FakeWandb(), FakeWandb(), FakeWandb()
    Trackers(wandb_config(), tmp_path, wandb=first).close()
    Trackers(wandb_config(), tmp_path, wandb=second, resume_step=0).close()
    Trackers(wandb_config(), tmp_path, wandb=third).close()
    assert first.inits[0]["id"] == second.inits[0]["id"] != third.inits[0]["id"]
    assert json.loads((tmp_path / "wandb_run.json").read_text())["id"] == third.inits[0]["id"]


def test_unreachable_wandb_falls_back_to_offline(tmp_path):
    fake, said = FakeWandb(faults={"online": ConnectionError("no route")}), []
    with Trackers(wandb_config(), tmp_path, wandb=fake, warn=said.append) as trackers:
        trackers.log(1, {"a": 1.0})
    assert [init["mode"] for init in fake.inits] == ["online", "offline"]
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert fake.run.logged == [(1, {"a": 1.0})]
    assert len(said) == 1
    assert "no route" in said[0]
    assert "wandb sync" in said[0]


def test_wandb_that_cannot_start_at_all_is_said_and_left(tmp_path):
    fake, said = FakeWandb(faults={"offline": OSError("disk full")}), []
    with Trackers(wandb_config("offline"), tmp_path, wandb=fake, warn=said.append) as trackers:
        trackers.log(1, {"a": 1.0})
    assert len(said) == 1
    assert "disk full" in said[0]
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


def test_failing_calls_are_said_once(tmp_path):
    said: list[str] = []
    fake = FakeWandb(FakeRun(fault=RuntimeError("boom\nsecond line")))
    with Trackers(wandb_config(), tmp_path, wandb=fake, warn=said.append) as trackers:
        for step in range(5):
            trackers.log(step, {"a": 1.0})
    assert said == ["wandb failed, training goes on and metrics.jsonl is complete: RuntimeError: boom second line"]
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 5
    assert fake.run.exit_code == 0  # the run is still finished


def test_hanging_wandb_blocks_nothing(tmp_path):
    said: list[str] = []
    hold = threading.Event()
    trackers = Trackers(wandb_config(), tmp_path, wandb=FakeWandb(FakeRun(hold=hold)), warn=said.append, timeout=0.1)
    began = time.monotonic()
    for step in range(50):
        trackers.log(step, {"a": 1.0})
    trackers.close()
    took = time.monotonic() - began
    hold.set()
    assert took < 5.0  # the fake never returns by itself, so only a bounded wait gets here at all
    assert len(said) == 1
    assert "0 s" in said[0]
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 50


def test_hanging_start_blocks_nothing(tmp_path):
    hold, said = threading.Event(), []
    fake = FakeWandb()
    started = fake.init
    fake.init = lambda **values: hold.wait() and started(**values)  # type: ignore[method-assign]
    trackers = Trackers(wandb_config(), tmp_path, wandb=fake, warn=said.append, timeout=0.1)
    trackers.log(1, {"a": 1.0})
    assert "not started" in said[0]
    hold.set()  # it comes up late: nothing is lost
    trackers._wandb._timeout = 5.0  # type: ignore[union-attr]
    trackers.close()
    assert fake.run.logged == [(1, {"a": 1.0})]


def test_a_failed_run_is_marked(tmp_path):
    fake = FakeWandb()
    with pytest.raises(ZeroDivisionError), Trackers(wandb_config(), tmp_path, wandb=fake):
        raise ZeroDivisionError
    assert fake.run.exit_code == 1


def test_missing_wandb_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does for a module that cannot be imported
    with pytest.raises(UserError, match="pip install"):
        Trackers(wandb_config(), tmp_path)
    Trackers(wandb_config("disabled"), tmp_path).close()  # needs no wandb


def test_real_wandb_offline(tmp_path):
    """In a process of its own, which must also end by itself."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_trackers as t
said = []
with t.Trackers(t.wandb_config("offline"), Path({str(tmp_path)!r}), warn=said.append) as trackers:
    trackers.log(1, {{"reward": 1.0, "kl": float("nan")}})
    trackers.completions(1, [t.make_row(text="t\\ud800")])
    trackers.summary({{"score_after": 1.0}})
assert not said, said
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    identity = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    assert b"score_after" in content
    assert b"completions" in content


def test_real_wandb_without_its_server(tmp_path):
    """The run goes on while wandb still tries, and what was recorded until it gives up is in the offline run too."""
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_trackers as t
said = []
with t.Trackers(t.wandb_config(), Path({str(tmp_path)!r}), warn=said.append, timeout=6.0) as trackers:
    first = list(said)
    for step in range(1, 21):
        trackers.log(step, {{f"value_{{step}}": 1.0}})
    trackers.summary({{"score_after": 1.0}})
assert ["not started within 5 s" in text for text in first] == [True], first
assert len(said) == 2 and "cannot be reached" in said[1] and "kept offline" in said[1], said
print("\\nclosed", flush=True)
"""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)  # connections are taken by the system, and nobody ever answers them
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "a" * 40}
        command = [sys.executable, "-c", program]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as running:
            kill = threading.Timer(120, running.kill)
            kill.start()
            said = []
            for line in running.stdout:
                said.append(line)
                if line == "closed\n":  # what is left is wandb's: its usage reports, 22 s of them for a silent server
                    server.close()
            kill.cancel()
    assert running.returncode == 0, "".join(said)
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 20
    identity = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    (kept,) = (tmp_path / "wandb").glob(f"offline-run-*-{identity}/*.wandb")
    content = kept.read_bytes()
    assert not [step for step in range(1, 21) if f"value_{step}".encode() not in content]
    assert b"score_after" in content


# --- journal


ODD_TEXTS = [
    "a\ud800b",
    "\udc00\ud800",
    "\ud83d\ude00",
    "😀é\u2028\x00\x1b",
    "\ufdd0fdd0 \ufdd0",
    '"\\n\n',
    "",
    "‮עברית",
]


def test_journal_round_trip_keeps_any_text(tmp_path):
    rows = [
        make_row(i, reward=i, text=text, prompt=[{"role": "user", "content": text}], rewards={"a": i, f"é{i}": None})
        for i, text in enumerate(ODD_TEXTS)
    ]
    rows[0].completion.log_probs[0] = -math.inf
    path = write_rollouts(tmp_path, 12, rows)
    assert path == tmp_path / "rollouts" / "step_000012.jsonl"
    records = read_rollouts(path)
    assert [r["completion"] for r in records] == ODD_TEXTS
    assert [r["prompt"][0]["content"] for r in records] == ODD_TEXTS
    assert records[0]["log_probs"] == [None, -0.25, -0.25]
    assert records[1] == {
        "step": 12,
        "group": 1,
        "prompt_index": 101,
        "prompt": [{"role": "user", "content": ODD_TEXTS[1]}],
        "completion": ODD_TEXTS[1],
        "completion_ids": [0, 1, 2],
        "log_probs": [-0.25] * 3,
        "truncated": False,
        "rewards": {"a": 1.0, "é1": None},
        "reward": 1.0,
        "advantage": 0.5,
    }
    strict_lines(path)
    assert not list(path.parent.glob("*.tmp"))


def test_journal_is_read_by_datasets(tmp_path):
    import datasets

    for step in (1, 2):
        rewards = {"a": 1, "b": None if step == 2 else 0.5}
        write_rollouts(tmp_path, step, [make_row(i, text=text, rewards=rewards) for i, text in enumerate(ODD_TEXTS)])
    files = [str(path) for _, path in rollout_files(tmp_path)]
    table = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == 2 * len(ODD_TEXTS)
    assert table[3]["completion"] == ODD_TEXTS[3]
    assert table[0]["completion"] == "a\ufdd0d800b"  # as the file says
    assert table[-1]["rewards"] == {"a": 1.0, "b": None}
    assert table[0]["completion_ids"] == [0, 1, 2]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_rollouts(tmp_path, 1, [make_row(text="old")])
    with pytest.raises(TypeError):
        write_rollouts(tmp_path, 1, [make_row(text="new"), make_row(prompt=[{"content": object()}])])
    assert [r["completion"] for r in read_rollouts(path)] == ["old"]


def test_drop_after_leaves_earlier_files_only(tmp_path):
    for step in (1, 2, 10, 1_000_001):
        write_rollouts(tmp_path, step, [make_row()])
    for step in (0, 10):
        write_rollouts(tmp_path, step, [make_row()], kind="eval")
    (tmp_path / "rollouts" / "step_000003.jsonl.tmp").write_text("half")
    (tmp_path / "rollouts" / "notes.txt").write_text("mine")
    assert [step for step, _ in rollout_files(tmp_path)] == [1, 2, 10, 1_000_001]
    drop_after(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == [
        "eval_000000.jsonl",
        "notes.txt",
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]
    assert rollout_files(tmp_path / "nowhere") == []


def test_a_damaged_journal_is_named(tmp_path):
    path = write_rollouts(tmp_path, 1, [make_row()])
    path.write_text(path.read_text() + "{")
    with pytest.raises(UserError, match="step_000001"):
        read_rollouts(path)


# --- console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal():
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    console.start(200, done=10)
    console.step(
        12, {"reward": 0.5, "loss": 0.1, "completions/mean_length": 103.4, "kl": 0.003, "perf/throughput": 1234}
    )
    console.step(200, {"loss": 1.5, "kl": math.nan})
    console.stop()
    first, last = out.getvalue().splitlines()
    assert first.startswith("step  12/200  reward 0.500  length 103  kl 0.0030  1.2k tok/s  ")
    assert first.endswith(" left")
    assert last == "step 200/200  loss 1.5000  kl nan"
    assert "\x1b" not in out.getvalue()
    assert not err.getvalue()


def test_a_live_bar_on_a_terminal():
    out = Terminal()
    with Console(out, io.StringIO(), live=True, width=100) as console:
        console.start(20)
        console.step(5, {"reward": 0.25})
        console.note("in between [red]")
        console.step(6, {"reward": 0.75})
    text = out.getvalue()
    assert "reward 0.750" in text
    assert "6/20" in text
    assert "in between [red]" in text


def test_each_warning_is_said_once_and_on_stderr():
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    for text in ("slow [path]", "slow [path]", "other"):
        console.warn(text)
    assert err.getvalue().splitlines() == ["warning: slow [path]", "warning: other"]
    assert not out.getvalue()


@pytest.mark.parametrize("width", [12, 80, 300])
def test_user_text_is_no_markup_at_any_width(width):
    out = io.StringIO()
    console = Console(out, io.StringIO(), width=width)
    nasty = "[/red] [bold]x :smile: \x1b[2J \ud800 😀 [link=a]"
    console.print_completions([make_row(text=nasty, prompt=nasty), make_row(text="never shown")], 1)
    console.table("T [/x]", [(nasty, None, 0.123456), ("short",)], header=["[/h]"])
    console.summary([("score [/b]", nasty)])
    console.note(nasty)
    text = out.getvalue()
    assert "\x1b" not in text
    assert "never shown" not in text
    assert "[/red] [bold]x :smile: \\x1b[2J \\ud800 😀 [link=a]" in text.splitlines()[-1]
    text.encode("utf-8")
    if width == 300:
        assert text.count("[/red] [bold]x :smile:") == 5
        assert all(part in text for part in ("T [/x]", "[/h]", "score [/b]", "0.1235", "advantage +0.500"))


def test_a_stream_that_lacks_a_character_does_not_stop_the_run():
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii", write_through=True), io.StringIO(), width=60)
    console.print_completions([make_row(text="é😀" + "x" * 5000)], 1)
    console.note("naïve")
    console.summary([("a", "→")])
    assert rb"na\xefve" in raw.getvalue()
    words = raw.getvalue().decode("ascii").replace("|", " ").split()
    assert rb"\u2026".decode() in words
    assert "characters)" in words
