"""SIGKILL at any moment, then `rl-train resume`: the same end, byte for byte.

A run is killed at a touch of a file (in the middle of a checkpoint, before the journal's rollout, between two renames)
or at a random time (in a rollout, a reward, a backward pass). `TANDEM_KILLS=50` tries so many moments instead of a few.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_server import RunServer
from tiny_run import outcome, write_lines, write_place

from tandem.rl.checkpoint import damage
from tandem.rl.rollout_journal import read_journal

pytestmark = pytest.mark.injects(1)
KILLS = int(os.environ.get("TANDEM_KILLS", "7"))


class Reference:
    """A run that came to its end undisturbed, and how often and how long it touches files."""

    def __init__(self, folder: Path, server: RunServer, *options: str) -> None:
        self.folder, self.server, self.options = folder, server, options
        self.config = write_place(folder)
        write_lines(
            folder / "pairs.jsonl", [{"prompt": f"w{i}", "chosen": " w1", "rejected": " w30"} for i in range(8)]
        )
        code, said = self.run("run", count=str(folder / "touches.txt"))
        assert code == 0, said
        self.outcome = outcome(folder / "runs" / "run")
        self.rollouts = self.journalled(folder / "runs" / "run")
        self.touches = [line.split(" ", 2) for line in (folder / "touches.txt").read_text().splitlines()]

    def run(self, name: str, **job: Any) -> tuple[int, str]:
        return self.server.run("run", self.config, f"run_name={name}", *self.options, **job)

    @staticmethod
    def journalled(run: Path) -> list[list[str]]:
        return [[row.text for row in r.rows] for r in read_journal(run)] if (run / "journal.jsonl").exists() else []

    def check_killed(self, run: Path) -> None:
        """What a killed run left: everything that has the name of something whole is whole."""
        for checkpoint in (run / "checkpoints").glob("step_*"):
            assert damage(checkpoint) is None, checkpoint
        rollouts = self.journalled(run)
        assert rollouts == self.rollouts[: len(rollouts)]
        for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
            if (run / "adapter").exists():
                assert (run / name).read_bytes() == self.outcome["files"][name]

    def check_resumed(self, run: Path) -> None:
        found = outcome(run)
        for part, value in self.outcome.items():
            if part == "files":
                assert found[part].keys() == value.keys()
                assert not [name for name, content in value.items() if found[part][name] != content]
            else:
                assert found[part] == value, part
        assert not list(run.rglob("*.tmp")) + list(run.rglob(".step_*")) + list(run.glob(".lock"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> RunServer:
    return RunServer(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, server: RunServer) -> Reference:
    return Reference(tmp_path_factory.mktemp("kill"), server)


def moments() -> list[tuple[str, float]]:
    """Shares of the run's touches, and of its time."""
    draw = random.Random(7)
    at = [("touch", (i + draw.random()) / (KILLS - KILLS // 3)) for i in range(KILLS - KILLS // 3)]
    return at + [("time", (i + draw.random()) / (KILLS // 3)) for i in range(KILLS // 3)]


@pytest.mark.parametrize(("kind", "share"), moments())
def test_killed_and_resumed_is_as_undisturbed(reference: Reference, kind: str, share: float) -> None:
    run = reference.folder / "runs" / f"killed_{kind}_{share:.4f}"
    touches = reference.touches
    if kind == "touch":
        moment = {"kill_at": 1 + int(share * len(touches))}
    else:
        moment = {"kill_after": share * float(touches[-1][0])}
    code, said = reference.run(run.name, **moment)
    assert code == -9 or kind == "time", said
    if code == -9:
        reference.check_killed(run)
        code, said = reference.server.run("resume", run, no_report=True)
    assert code == 0, said
    reference.check_resumed(run)
    shutil.rmtree(run)


def test_killed_again_and_again(reference: Reference) -> None:
    """A run that dies in every attempt, a little later each time, still comes to its end."""
    run = reference.folder / "runs" / "again"
    # Resumed runs draw no charts here.
    step = max(len([touch for touch in reference.touches if "/report" not in touch[2]]) // 5, 1)
    code, said = reference.run(run.name, kill_at=step)
    attempts = 0
    while code == -9:
        reference.check_killed(run)
        attempts += 1
        code, said = reference.server.run("resume", run, no_report=True, kill_at=(attempts + 1) * step)
    assert code == 0, said
    assert attempts >= 3
    reference.check_resumed(run)


GAME = """
class Game:
    def reset(self, secret):
        self.secret, self.turns = secret, 0
        return f"w{secret} w{secret + 1}"

    def step(self, message):
        self.turns += 1
        return f"w{self.turns}", self.turns == 2, float(f"w{self.secret}" in message["content"]) + self.secret


def games(split="train"):
    return [{"secret": i} for i in range(6)]


def seen(completions, environments, episodes):
    return [e.turns + 0.1 * len(str(game.secret)) for e, game in zip(episodes, environments)]
"""
CHAT = "{% for m in messages %}w1 {{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
EPISODES = ["model.chat_template=chat.jinja", "data.dataset_name=game.py:games", "eval.dataset_name=null"]
EPISODES += ["environment.factory=game.py:Game", "environment.max_turn_tokens=3", "rollout.max_completion_length=20"]
EPISODES += ["rewards.reward_funcs=[environment, game.py:seen]", "warmup.max_steps=0"]

# Runs of other kinds than `tiny_run`'s.
SUPERVISED = ["eval.dataset_name=null", "warmup.max_steps=0", "train.per_device_train_batch_size=3"]
KINDS = {
    "online_dpo": ["algorithm.name=online_dpo", "train.steps_per_generation=1", "parity.action='off'"],
    "dpo": ["algorithm.name=dpo", "algorithm.beta=0", "data.dataset_name=pairs.jsonl", *SUPERVISED],
    "sft": ["algorithm.name=sft", "data.dataset_name=examples.jsonl", *SUPERVISED],
    "episodes": EPISODES,
    "no journal": ["checkpoint.journal=false"],
    "dropout, twice": ["lora.lora_dropout=0.2", "algorithm.num_iterations=2", "optim.lr_scheduler_type=cosine"],
}


@pytest.mark.injects(3)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_any_kind(tmp_path: Path, server: RunServer, kind: str) -> None:
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "chat.jinja").write_text(CHAT)
    reference = Reference(tmp_path, server, *KINDS[kind])
    draw = random.Random(kind)
    for third in range(3):
        run = tmp_path / "runs" / f"killed_{third}"
        share = (third + draw.random()) / 3
        code, said = reference.run(run.name, kill_at=1 + int(share * len(reference.touches)))
        assert code == -9, said
        reference.check_killed(run)
        code, said = server.run("resume", run, no_report=True)
        assert code == 0, said
        reference.check_resumed(run)
