"""Reward watch: its measures against other implementations, watched functions, and planted faults that must be seen."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
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
from tandem.rl.reward_watch import RewardWatch
from tandem.rl.rollout_journal import read_journal
from tandem.rl.samples import Completion, Group, Prompt, Scored
from tandem.rl.watch_alerts import Alert
from tandem.rl.watch_memory import WatchMemory
from tandem.rl.watch_roles import roles_of

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


def tokens(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def brief(completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


def never(completions, **columns):
    return [0.0] * len(completions)


def sees(rewards_by_name, **columns):
    assert list(rewards_by_name)[0] == "low", list(rewards_by_name)
    return rewards_by_name["low"]
"""


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- planted faults ---------------------------------------------------------------------------------------------------

Value = Callable[[int, random.Random], float | None]
FORMS: dict[str, Any] = {"reward_funcs": ["m.py:right", "m.py:format"], "watch_funcs": ["m.py:judge"]}
HEALTHY: dict[str, Value] = {
    "right": lambda n, draw: float(draw.random() < 0.1 + n / 60),
    "format": lambda n, draw: float(draw.random() < 0.5 + n / 100),
    "judge": lambda n, draw: draw.gauss(5 + n / 20, 1.0),
}


def watched_run(
    values: dict[str, Value],
    *,
    ids: Callable[[int, random.Random], list[int]] | None = None,
    rewards: dict[str, Any] = FORMS,
    rollouts: int = 40,
    seed: int = 0,
    **options: Any,
) -> list[tuple[int, Alert]]:
    """Alerts of a run of 8 groups of 8 completions per rollout, whose values are drawn by the name of the reward."""
    config = parse_config(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "rewards": rewards,
            "watch": options,
        }
    )
    watch, memory, draw = RewardWatch(config), WatchMemory(), random.Random(seed)
    said = []
    for n in range(rollouts):
        rows = []
        for number in range(64):
            tokens = ids(n, draw) if ids else [draw.randrange(1000) for _ in range(draw.randrange(20, 40))]
            given = {name: value(n, draw) for name, value in values.items()}
            trained = {name: given[name] for name in config.reward_names()}
            total = sum(s.weight * (trained[s.label] or 0.0) for s in config.rewards.reward_funcs)
            watched = {name: given[name] for name in config.watch_names()}
            completion = Completion(tokens, [-1.0] * len(tokens), False)
            rows.append(
                Scored(Prompt(number // 8, [1], "p"), completion, number // 8, "", trained, total, 0.0, watched)
            )
        # Through the form in which a checkpoint keeps it, after every rollout.
        memory = WatchMemory.of(json.loads(json.dumps(asdict(memory), allow_nan=False)))
        metrics, alerts = watch.take(rows, memory, n + 1)
        assert all(name.startswith("watch/") for name in metrics)
        said += [(n + 1, alert) for alert in alerts]
    return said


def names(said: list[tuple[int, Alert]]) -> set[str]:
    return {alert.key for _, alert in said}


@pytest.mark.parametrize("seed", range(6))
def test_a_healthy_run_raises_no_alert(seed: int) -> None:
    assert watched_run(HEALTHY, seed=seed) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_stands_still_raises_no_alert(seed: int) -> None:
    still: dict[str, Value] = {
        "right": lambda n, draw: float(draw.random() < 0.3),
        "format": lambda n, draw: float(draw.random() < 0.9),
        "judge": lambda n, draw: draw.gauss(5, 1.0),
    }
    assert watched_run(still, rollouts=120, seed=seed) == []


def test_a_solved_task_with_equal_answers_raises_no_alert() -> None:
    """Answers of few tokens: all the same once they are right, with a few that stay wrong."""
    solved: dict[str, Value] = {
        **HEALTHY,
        "right": lambda n, draw: float(draw.random() < 0.97),
        "format": lambda n, _: 1.0,
    }
    assert watched_run(solved, ids=lambda n, draw: [1, 2, 3]) == []


def test_length_hacking_is_seen() -> None:
    lengths: list[int] = []

    def longer(n: int, draw: random.Random) -> list[int]:
        lengths.append(max(5, round(draw.gauss(50 + 3 * n, 15))))
        return [draw.randrange(1000) for _ in range(lengths[-1])]

    hacked: dict[str, Value] = {
        **HEALTHY,
        "right": lambda n, draw: lengths[-1] / 100 + draw.gauss(0, 0.1),
        "format": lambda n, draw: 1.0,
    }
    said = watched_run(hacked, ids=longer, alert_steps=1000)
    assert names(said) == {"length_hacking"}
    ((step, alert),) = said
    assert 10 <= step <= 20
    # Deviations of 0.15 by the length and of 0.1 by chance.
    assert alert.value == pytest.approx(0.15 / math.hypot(0.15, 0.1), abs=0.1)
    assert alert.threshold == 0.3
    assert "tokens" in alert.message
    assert "length_penalty" in alert.fix
    assert watched_run(hacked, ids=longer, alerts=["repetition"]) == []
    # Longer and better without one following the other within a group: thinking longer may be right.
    assert watched_run(HEALTHY, ids=longer) == []


def test_a_format_only_gain_is_seen() -> None:
    flat: dict[str, Value] = {**HEALTHY, "right": lambda n, draw: float(draw.random() < 0.2)}
    said = watched_run(flat)
    assert names(said) == {"format_only_gain format"}
    assert "right 0." in said[0][1].message
    # Good answers need not get better.
    good: dict[str, Value] = {**HEALTHY, "right": lambda n, draw: float(draw.random() < 0.96)}
    assert watched_run(good) == []
    assert watched_run(flat, format_rewards=[]) == []
    never: dict[str, Value] = {**HEALTHY, "right": lambda n, draw: 0.0}
    assert "format_only_gain format" in names(watched_run(never))


def test_collapsed_groups_are_seen() -> None:
    collapsed: dict[str, Value] = {
        "right": lambda n, draw: float(draw.random() < 0.3) if n < 10 else 0.0,
        "format": lambda n, draw: 0.0,
        "judge": lambda n, draw: None,
    }
    said = watched_run(collapsed, ids=lambda n, draw: [1, 2, 3] if n >= 10 else [draw.randrange(99)])
    assert names(said) == {"collapsed_groups"}
    assert said[0][0] == 13  # the first at which the mean of five is over a half: 3 of 5


def test_repetition_is_seen() -> None:
    said = watched_run(
        HEALTHY, ids=lambda n, draw: [draw.randrange(99)] * 50 if n > 5 else [draw.randrange(999) for _ in range(50)]
    )
    assert names(said) == {"repetition"}
    assert said[0][1].value == pytest.approx(3 / 5 * 46 / 47)


def test_a_watched_reward_that_falls_is_seen() -> None:
    falling: dict[str, Value] = {**HEALTHY, "judge": lambda n, draw: draw.gauss(5 - n / 15, 1.0)}
    assert names(watched_run(falling)) == {"watched_falls judge"}
    # Beside a reward that does not rise it is no sign of hacking.
    still: dict[str, Value] = {**falling, "right": lambda n, draw: float(draw.random() < 0.3)}
    assert watched_run({**still, "format": lambda n, draw: 1.0}) == []


def test_components_that_part_are_seen() -> None:
    parting: dict[str, Value] = {**HEALTHY, "format": lambda n, draw: float(draw.random() < 0.9 - n / 60)}
    said = watched_run(parting)
    assert names(said) == {"components_diverge right, format"}
    assert "format gets worse" in said[0][1].message
    last: list[float] = []

    def right(n: int, draw: random.Random) -> float:
        last.append(float(draw.random() < 0.5))
        return last[-1]

    turning: dict[str, Value] = {
        "right": right,
        "format": lambda n, draw: last[-1] if draw.random() < 0.7 else 1 - last[-1],
        "judge": lambda n, draw: 0.0,
    }
    assert watched_run(turning) == []
    turning["format"] = lambda n, draw: last[-1] if (draw.random() < 0.9) == (n < 20) else 1 - last[-1]
    assert names(watched_run(turning)) == {"components_diverge right, format"}
    # A weight below zero turns the direction: what is to go down goes down.
    rewards = {
        "reward_funcs": ["m.py:right", {"function": "m.py:format", "weight": -0.1}],
        "watch_funcs": ["m.py:judge"],
    }
    assert watched_run(parting, rewards=rewards) == []


def test_an_alert_is_repeated_only_after_its_time() -> None:
    flat: dict[str, Value] = {**HEALTHY, "right": lambda n, draw: float(draw.random() < 0.2)}
    steps = [step for step, _ in watched_run(flat, alert_steps=7)]
    assert len(steps) > 2
    assert min(b - a for a, b in pairwise(steps)) >= 7


@pytest.mark.parametrize("key", ["format_rewards", "answer_rewards"])
def test_roles_must_be_rewards(key: str) -> None:
    with pytest.raises(UserError, match=r"'wrong'.*right, format, judge"):
        watched_run(HEALTHY, **{key: ["wrong"]})


def test_roles_are_read_from_names_and_functions() -> None:
    config = parse_config(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "rewards": {
                "reward_funcs": [
                    {"function": "tag_format", "weight": 0, "name": "tags"},
                    {"function": "math_answer", "weight": 0},
                    {"function": "gate", "kwargs": {"first": "tags", "then": "math_answer"}},
                    {"function": "length_penalty", "weight": 0.1},
                    {"function": "m.py:slips", "weight": -1},
                    {"function": "m.py:seen", "weight": 0},
                ],
                "watch_funcs": ["m.py:other", "m.py:other_format"],
            },
        }
    )
    roles = roles_of(config)
    assert roles.components == {"tags": 1.0, "math_answer": 1.0, "length_penalty": 1.0, "slips": -1.0}
    assert roles.form == ["tags", "other_format"]
    assert roles.answer == ["math_answer", "slips"]
    assert roles.watched == ["other", "other_format"]


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
    return folder, config, server


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


# --- whole runs -------------------------------------------------------------------------------------------------------

LONGER = (
    "eval.dataset_name=null",
    "warmup.max_steps=0",
    "train.steps_per_generation=1",
    "train.generation_batch_size=32",
    "train.max_steps=20",
    "rollout.num_generations=8",
)


def alerts_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if record.get("event") == "alert"]


def test_a_run_that_is_paid_for_length_says_so_once_killed_or_not(place):
    """The tiny model learns to never end; a function that likes short answers only watches."""
    folder, config, server = place
    paid = [*LONGER, "rollout.max_completion_length=29", f"rewards.reward_funcs=['{folder}/watched.py:tokens']"]
    paid += ["train.max_steps=28", "rollout.stop_token_ids=[1,2,3,4,5,6,7,8]"]  # so that it begins short
    paid += [f"rewards.watch_funcs=['{folder}/watched.py:brief']"]
    code, said = server.run("run", config, "run_name=paid", *paid, no_report=True, count=str(folder / "touches.txt"))
    assert code == 0, said
    found = alerts_of(folder / "runs" / "paid")
    assert {alert["name"] for alert in found} >= {"length_hacking", "watched_falls"}
    assert len({(alert["name"], alert["about"]) for alert in found}) == len(found)
    for alert in found:
        assert set(alert) == {"step", "event", "name", "about", "value", "threshold", "message", "fix"}
        assert f"step {alert['step']}: reward watch, {alert['name']}" in said
        assert alert["message"] in said
    assert [r["watch/alerts"] for r in records(folder / "runs" / "paid") if "reward" in r][-1] == len(found)
    touches = len((folder / "touches.txt").read_text().splitlines())
    run = folder / "runs" / "paid_killed"
    code, said = server.run("run", config, f"run_name={run.name}", *paid, no_report=True, kill_at=int(0.9 * touches))
    assert code == -9, said
    assert alerts_of(run)
    code, said = server.run("resume", run, no_report=True)
    assert code == 0, said
    assert outcome(run) == outcome(folder / "runs" / "paid")


def test_a_run_whose_answers_stay_wrong_says_that_only_the_format_gains(place):
    folder, config, server = place
    funcs = f"[{{function: '{folder}/rewards.py:low', name: format}}, '{folder}/watched.py:never']"
    code, said = server.run("run", config, "run_name=form", *LONGER, f"rewards.reward_funcs={funcs}", no_report=True)
    assert code == 0, said
    assert [(a["name"], a["about"]) for a in alerts_of(folder / "runs" / "form")] == [("format_only_gain", "format")]
    assert "the answers do not (never 0 to 0)" in said


def test_a_sound_run_has_no_alert_and_without_watch_the_same_adapter(place):
    folder, config, server = place
    length = "rollout.max_completion_length=6"
    code, said = server.run("run", config, "run_name=sound", *LONGER, length, no_report=True)
    assert code == 0, said
    code, said = server.run("run", config, "run_name=unwatched", *LONGER, length, "watch.enabled=false", no_report=True)
    assert code == 0, said
    sound, off = folder / "runs" / "sound", folder / "runs" / "unwatched"
    rewards = [r["reward"] for r in records(sound) if "reward" in r]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1  # it did learn
    assert alerts_of(sound) == []
    assert "reward watch" not in said
    assert all("time/watch" in r for r in records(sound) if "reward" in r)
    assert not any(name.startswith(("watch/", "time/watch")) for r in records(off) for name in r)
    one, other = (run / "adapter" / "adapter_model.safetensors" for run in (sound, off))
    assert one.read_bytes() == other.read_bytes()
