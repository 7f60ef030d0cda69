"""A notice to end (SIGTERM) in every phase of a step: a checkpoint at once, and resumed the run is as undisturbed.

The signal comes from another process while the phase is held up; a phase that is not given up ends after a while and
says so. The adapter has dropout, so that a random state that is not put back shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_server import RunServer
from tiny_run import outcome, write_place

from tandem.rl.checkpoint import damage
from tandem.rl.rollout_journal import read_journal

pytestmark = pytest.mark.injects(1)

HOLD = """
import os, signal, subprocess, time
import tandem.rl.trainer as trainer, tandem.rl.held_out as held_out, tandem.rl.guarded_passes as passes
import tandem.rewards.call as call
from tandem.rollout.transformers_engine import TransformersEngine as Engine

def notice(number=signal.SIGTERM):
    subprocess.run(["kill", f"-{number:d}", str(os.getpid())], check=True)

def held():
    notice()
    for _ in range(500):
        time.sleep(0.02)
    print("NOT GIVEN UP", flush=True)

def swallowed():
    try:
        held()
    except BaseException:
        print("SWALLOWED", flush=True)

def in_reward(what):
    real = call.run_within
    def within(seconds, function):
        def called():
            if len(STARTED) == 2 and not COUNTS.get("reward"):
                COUNTS["reward"] = 1
                what()
            return function()
        return real(seconds, called)
    call.run_within = within

STARTED = []
real_start = trainer.Trainer._policy_iteration
def start(self):
    STARTED.append(self._state.step)
    COUNTS.clear()
    return real_start(self)
trainer.Trainer._policy_iteration = start
COUNTS = {}

def at(place, nth, name, what):
    \"\"\"Do `what` before the nth call of a function in the second rollout's step.\"\"\"
    real = getattr(place, name)
    def wrapped(*arguments, **more):
        COUNTS[name] = COUNTS.get(name, 0) + 1
        if len(STARTED) == 2 and COUNTS[name] == nth:
            what()
        return real(*arguments, **more)
    setattr(place, name, wrapped)
"""
PHASES = {
    "rollout": "at(Engine, 2, '_decode', held)",
    "reward": "in_reward(held)",
    "reward that swallows it": "in_reward(swallowed)",
    "log-probs": "at(passes, 2, 'sequence_log_probs', held)",
    "first update": "at(passes, 1, 'policy_backward', held)",
    "first optimiser step": "at(trainer, 1, 'apply_gradients', notice)",
    "second update": "at(passes, 2, 'policy_backward', held)",
    "evaluation": "at(held_out, 1, 'evaluate', held)",
}
JOURNALLED = {"reward that swallows it", "log-probs", "first update", "first optimiser step", "second update"}


class Bench:
    """A run that nobody disturbed, and a server that starts others."""

    def __init__(self, folder: Path, server: RunServer, *options: str) -> None:
        self.folder, self.server, self.options = folder, server, ["lora.lora_dropout=0.2", *options]
        self.config = write_place(folder)
        code, said = self.start("run", "")
        assert code == 0, said
        self.outcome = outcome(folder / "runs" / "run")

    def start(self, name: str, patch: str) -> tuple[int, str]:
        return self.server.run(
            "run", self.config, f"run_name={name}", *self.options, patch=HOLD + patch, no_report=True
        )

    def stopped(self, name: str, patch: str) -> tuple[Path, str]:
        code, said = self.start(name, patch)
        assert code == 1, said
        assert "Traceback" not in said
        assert "NOT GIVEN UP" not in said
        return self.folder / "runs" / name, said

    def same_end(self, run: Path) -> None:
        code, said = self.server.run("resume", run, no_report=True)
        assert code == 0, said
        found = outcome(run)
        for part in self.outcome.keys() - {"checkpoints", "files"}:
            assert found[part] == self.outcome[part], part
        assert not [name for name, content in self.outcome["files"].items() if found["files"].get(name) != content]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> RunServer:
    return RunServer(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, server: RunServer) -> Bench:
    return Bench(tmp_path_factory.mktemp("notice"), server)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, server: RunServer) -> Bench:
    """One update for each rollout. Dropout sets the log-probs of its only forward pass apart from the engine's."""
    options = ["train.steps_per_generation=1", "train.max_steps=4", "parity.action='off'"]
    return Bench(tmp_path_factory.mktemp("single"), server, *options)


def newest(run: Path) -> str:
    found = sorted((run / "checkpoints").iterdir())[-1]
    assert damage(found) is None
    return found.name


@pytest.mark.parametrize("phase", PHASES)
def test_a_notice_in_the_middle_of_a_step(bench: Bench, phase: str) -> None:
    run, said = bench.stopped(phase.replace(" ", "_"), PHASES[phase])
    step = 4 if phase == "evaluation" else 2
    assert f"stopping {'after this step' if phase == 'first optimiser step' else 'now'} with a checkpoint" in said
    assert f"stopped after step {step} with a checkpoint; go on with: rl-train resume {run}" in " ".join(said.split())
    assert newest(run) == f"step_{step:06d}"
    assert json.loads((run / "checkpoints" / newest(run) / "state.json").read_text())["evaluating"] is (step == 4)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert len(list(read_journal(run))) == (2 if phase in JOURNALLED or step == 4 else 1)
    bench.same_end(run)


def test_a_notice_when_the_step_is_all_but_done(bench: Bench) -> None:
    run, said = bench.stopped("done", "at(trainer, 1, 'write_rollouts', notice)")
    assert "stopping after this step" in said
    assert newest(run) == "step_000004"
    bench.same_end(run)


@pytest.mark.parametrize("phase", ["rollout", "first update", "only optimiser step"])
def test_a_step_of_one_update_is_finished_once_it_moves_weights(single: Bench, phase: str) -> None:
    moved = phase == "only optimiser step"
    patch = "at(trainer, 1, 'apply_gradients', notice)" if moved else PHASES[phase]
    run, _ = single.stopped(phase.replace(" ", "_"), patch)
    assert newest(run) == f"step_{2 if moved else 1:06d}"
    single.same_end(run)


def test_the_warm_up_stops_between_two_steps(bench: Bench) -> None:
    run, _ = bench.stopped("warm", "at(passes, 1, 'supervised_backward', notice)\nSTARTED += [0, 0]")
    assert newest(run) == "step_000000"
    bench.same_end(run)


def test_ctrl_c_has_the_step_finished(bench: Bench) -> None:
    run, said = bench.stopped("interrupt", "at(Engine, 2, '_decode', lambda: notice(signal.SIGINT))")
    assert "stopping after this step" in said
    assert newest(run) == "step_000004"
    bench.same_end(run)


def test_a_second_signal_stops_at_once(bench: Bench) -> None:
    run, said = bench.stopped("twice", "at(trainer, 2, 'apply_gradients', lambda: (notice(), notice()))")
    assert "error: stopped at once" in said
    assert not (run / "checkpoints").exists()
    bench.same_end(run)


def test_supervised_steps_are_given_up_too(bench: Bench) -> None:
    options = ["algorithm.name=sft", "data.dataset_name=examples.jsonl", "eval.dataset_name=null", "warmup.max_steps=0"]
    options += ["lora.lora_dropout=0.2", "train.per_device_train_batch_size=4"]
    runs = [bench.folder / "runs" / name for name in ("sft", "sft_stopped")]
    hold = HOLD + "STARTED += [0, 0]\nat(passes, 3, 'supervised_backward', held)"
    for run, patch, code in zip(runs, ("", hold), (0, 1), strict=True):
        found, said = bench.server.run(
            "run", bench.config, *options, f"run_name={run.name}", patch=patch, no_report=True
        )
        assert found == code, said
    assert newest(runs[1]) == "step_000002"
    code, said = bench.server.run("resume", runs[1], no_report=True)
    assert code == 0, said
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step_000006/optimizer.safetensors"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
