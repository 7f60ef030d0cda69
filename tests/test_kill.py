"""SIGKILL at any moment, then `rl-train resume`: the same end, byte for byte.

A run is killed at a touch of a file (in the middle of a checkpoint, before the journal's rollout, between two renames)
or at a random time (in a rollout, a reward, a backward pass). `TANDEM_KILLS=50` tries so many moments instead of a few.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from run_server import RunServer
from tiny_run import outcome, write_place

from tandem.rl.checkpoint import damage
from tandem.rl.rollout_journal import read_journal

pytestmark = pytest.mark.injects(1)
KILLS = int(os.environ.get("TANDEM_KILLS", "7"))


class Reference:
    """A run that came to its end undisturbed, and how often and how long it touches files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, RunServer(folder)
        self.config = write_place(folder)
        code, said = self.server.run("run", self.config, count=str(folder / "touches.txt"))
        assert code == 0, said
        self.outcome = outcome(folder / "runs" / "run")
        self.rollouts = [[row.text for row in r.rows] for r in read_journal(folder / "runs" / "run")]
        self.touches = [line.split(" ", 2) for line in (folder / "touches.txt").read_text().splitlines()]

    def check_killed(self, run: Path) -> None:
        """What a killed run left: everything that has the name of something whole is whole."""
        for checkpoint in (run / "checkpoints").glob("step_*"):
            assert damage(checkpoint) is None, checkpoint
        rollouts = [[row.text for row in r.rows] for r in read_journal(run)] if (run / "journal.jsonl").exists() else []
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
def reference(tmp_path_factory: pytest.TempPathFactory):
    made = Reference(tmp_path_factory.mktemp("kill"))
    yield made
    made.server.close()


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
    code, said = reference.server.run("run", reference.config, f"run_name={run.name}", **moment)
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
    code, said = reference.server.run("run", reference.config, f"run_name={run.name}", kill_at=step)
    attempts = 0
    while code == -9:
        reference.check_killed(run)
        attempts += 1
        code, said = reference.server.run("resume", run, no_report=True, kill_at=(attempts + 1) * step)
    assert code == 0, said
    assert attempts >= 3
    reference.check_resumed(run)
