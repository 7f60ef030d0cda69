"""Reward watch: its measures against other implementations, watched functions, and planted faults that must be seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_server import RunServer
from tiny_run import outcome, write_place

from tandem.rewards.base import load_reward
from tandem.rewards.compose import score
from tandem.rewards.watched import score_watched
from tandem.rl.config_file import parse_config
from tandem.rl.errors import UserError
from tandem.rl.rollout_journal import read_journal
from tandem.rl.samples import Completion, Group, Prompt, Scored

WATCHED = """
import time


def words(completions, log_metric, **columns):
    log_metric("longest", max(len(c) for c in completions))
    return [float(len(c.split())) if c else None for c in completions]


def broken(completions, **columns):
    raise RuntimeError("no luck")


def hangs(completions, **columns):
    time.sleep(30)


def too_few(completions, **columns):
    return [1.0]


def sees(rewards_by_name, **columns):
    assert list(rewards_by_name)[0] == "low", list(rewards_by_name)
    return rewards_by_name["low"]
"""


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- watched functions ------------------------------------------------------------------------------------------------


def rows_of(texts: list[str]) -> list[Scored]:
    completions = [Completion([i, i + 1], [-0.1, -0.1], False) for i in range(len(texts))]
    prompt = Prompt(0, [1], "p")
    names = iter(texts)
    first = load_reward(lambda completions, **columns: [float(len(c)) for c in completions], name="size")
    return score([Group(prompt, completions)], [first], lambda ids: next(names), timeout=5).rows


def test_watched_functions_leave_the_total_alone_and_stop_nothing():
    rows = rows_of(["a", "bb bb", ""])
    before = [(row.reward, dict(row.rewards)) for row in rows]

    def words(completions, log_metric, **columns):
        log_metric("n", len(completions))
        return [float(len(c.split())) if c else None for c in completions]

    def broken(completions, **columns):
        raise RuntimeError("no luck")

    def leaves(completions, **columns):
        raise SystemExit(3)

    def both(rewards_by_name, **columns):
        return [a + (b or 0.0) for a, b in zip(rewards_by_name["size"], rewards_by_name["words"], strict=True)]

    found = score_watched(rows, [load_reward(f) for f in (words, broken, leaves, both)], timeout=5)
    assert [(row.reward, row.rewards) for row in rows] == before
    assert [row.watched["words"] for row in rows] == [1.0, 2.0, None]
    assert [row.watched["both"] for row in rows] == [2.0, 7.0, 0.0]
    assert all(row.watched[name] is None for row in rows for name in ("broken", "leaves"))
    assert set(found.faults) == {"broken", "leaves"}
    assert "no luck" in str(found.faults["broken"])
    failed = {name: found.metrics[f"watch/rewards/{name}/failed"] for name in ("words", "broken", "leaves", "both")}
    assert failed == {"words": 0.0, "broken": 1.0, "leaves": 1.0, "both": 0.0}
    assert found.metrics["watch/n"] == 3.0


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        ({"reward_funcs": ["a"], "watch_funcs": ["m.py:a"]}, "two reward functions are named 'a'"),
        ({"reward_funcs": ["a"], "watch_funcs": [{"function": "b", "weight": 1}]}, "rewards.watch_funcs.0.weight"),
        ({"reward_funcs": [{"function": "minimum", "kwargs": {"of": ["b"]}}], "watch_funcs": ["b"]}, "combines 'b'"),
    ],
)
def test_wrong_watch_funcs_are_refused(rewards: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_config({"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}, "rewards": rewards})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("watch")
    config = write_place(folder)
    (folder / "watched.py").write_text(WATCHED)
    server = RunServer(folder)
    code, said = server.run("run", config, "run_name=plain", no_report=True)
    assert code == 0, said
    yield folder, config, server
    server.close()


def with_watched(folder: Path, config: Path, *functions: str) -> Path:
    settings = yaml.safe_load(config.read_text())
    settings["rewards"]["watch_funcs"] = [f"watched.py:{name}" for name in functions]
    path = folder / f"watch_{'_'.join(functions)}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_with_watched_functions_learns_the_same(place):
    """Watched functions that work, fail, hang and lie: the adapter, and all else that is learned, is the same bytes."""
    folder, config, server = place
    watching = with_watched(folder, config, "words", "broken", "hangs", "too_few", "sees")
    code, said = server.run("run", watching, "run_name=watching", "rewards.timeout=0.4", no_report=True)
    assert code == 0, said
    plain, run = folder / "runs" / "plain", folder / "runs" / "watching"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (plain / "adapter" / name).read_bytes()
    for name in ("broken", "hangs", "too_few"):
        assert said.count(f"{name} is only watched, so training goes on") == 1, said  # once, not at every step
    rewarded = [r for r in records(run) if "reward" in r]
    assert [r["reward"] for r in rewarded] == [r["reward"] for r in records(plain) if "reward" in r]
    for record in rewarded:
        assert record["watch/rewards/words/failed"] == 0.0
        assert record["watch/rewards/broken/failed"] == record["watch/rewards/hangs/failed"] == 1.0
        assert record["watch/rewards/broken/mean"] is None
        assert record["watch/rewards/sees/mean"] == record["rewards/low/mean"]
        assert record["watch/longest"] > 0
    assert "eval/watch/rewards/words/mean" in records(run)[0]
    for rollout in read_journal(run):
        for row in rollout.rows:
            assert row.watched["words"] == (len(row.text.split()) or None)
            assert row.watched["broken"] is None
    lines = [json.loads(line) for line in sorted((run / "rollouts").glob("step_*"))[0].read_text().splitlines()]
    assert all(line["watched"]["words"] == (len(line["completion"].split()) or None) for line in lines)


def test_killed_in_a_run_with_watched_functions(place):
    folder, config, server = place
    watching = with_watched(folder, config, "words", "broken")
    code, said = server.run("run", watching, "run_name=whole", no_report=True, count=str(folder / "touches.txt"))
    assert code == 0, said
    touches = len((folder / "touches.txt").read_text().splitlines())
    code, said = server.run("run", watching, "run_name=killed", no_report=True, kill_at=int(touches * 0.8))
    assert code == -9, said
    code, said = server.run("resume", folder / "runs" / "killed", no_report=True)
    assert code == 0, said
    assert outcome(folder / "runs" / "killed") == outcome(folder / "runs" / "whole")


def test_rewards_command_shows_what_is_watched(place):
    folder, config, server = place
    watching = with_watched(folder, config, "words", "broken")
    rollouts = sorted((folder / "runs" / "plain" / "rollouts").glob("step_*"))[0]
    code, said = server.run("rewards", watching, "--on", rollouts)
    assert code == 2, said  # a reward did not work
    assert "no luck" in said
    (words,) = [line for line in said.splitlines() if line.split()[:2] == ["words", "watched"]]
    rows = [json.loads(line) for line in rollouts.read_text().splitlines()]
    mean = sum(len(row["completion"].split()) for row in rows) / len(rows)
    assert words.split()[2] == f"{mean:.3f}"
    # Of each name the first line: the tables behind it have other columns.
    table = {cells[0]: cells for line in reversed(said.splitlines()) if (cells := line.split())}
    assert table["total"][1] == table["low"][2]  # of equal weight 1; what is watched is no part of it
