"""Rewards that fail on some completions, and what `rewards.on_error` makes of that."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from run_server import COUNT_GENERATIONS, RunServer
from tiny_run import outcome, write_place

from tandem.rewards.base import load_reward
from tandem.rewards.call import WrongArguments
from tandem.rewards.compose import Scores, score
from tandem.rl.config import Config
from tandem.rl.config_file import parse_config
from tandem.rl.errors import UserError
from tandem.rl.experience import best_and_worst, learned_from, with_advantages
from tandem.rl.journal import read_rollouts
from tandem.rl.metrics import rollout_metrics
from tandem.rl.reward_errors import errors_in_words, failed_everywhere
from tandem.rl.samples import Completion, Episode, Group, Prompt
from tandem.rl.unscored import Unscored

TEXTS = [["a", "bb", "c"], ["dd", "BAD", "f"], ["g", "hh", "i"]]
BAD = 4  # the row on which the rewards below fail


def batch() -> list[Group]:
    return [
        Group(Prompt(i, [1], f"p{i}"), [Completion([ord(c) for c in text], [0.0] * len(text), False) for text in texts])
        for i, texts in enumerate(TEXTS)
    ]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def scored(*functions: Any, on_error: str = "skip_group", timeout: float = 20.0, **options: Any) -> Scores:
    rewards = [f if hasattr(f, "weight") else load_reward(f) for f in functions]
    return score(batch(), rewards, decode, timeout=timeout, on_error=on_error, on_missing="group_mean", **options)


def length(completions):
    return [float(len(c)) for c in completions]


def raising(completions):
    return [float(len(c)) if c != "BAD" else 1 / 0 for c in completions]


def importing(completions):
    if "BAD" in completions:
        import no_such_library_anywhere  # noqa: F401
    return length(completions)


def hanging(completions):
    for c in completions:
        while c == "BAD":
            time.sleep(0.01)
    return length(completions)


def short(completions):
    return [float(len(c)) for c in completions if c != "BAD"]


def nan(completions):
    return [float(len(c)) if c != "BAD" else math.nan for c in completions]


def text(completions):
    return [float(len(c)) if c != "BAD" else "high" for c in completions]


async def infinite(completions):
    return [float(len(c)) if c != "BAD" else math.inf for c in completions]


FAULTS = [raising, importing, hanging, short, nan, text, infinite]


@pytest.mark.parametrize("function", FAULTS)
def test_the_guilty_row_is_found_and_its_group_left_out(function: Any) -> None:
    scores = scored(function, timeout=0.4 if function is hanging else 20.0)
    name = function.__name__
    assert [set(row.errors) for row in scores.rows] == [{name} if i == BAD else set() for i in range(9)]
    assert repr(name) in scores.rows[BAD].errors[name]
    assert [row.skipped for row in scores.rows] == [i // 3 == 1 for i in range(9)]
    values = [1, 2, 1, 2, None, 1, 1, 2, 1]
    assert [row.rewards[name] for row in scores.rows] == values
    assert [row.reward for row in scores.rows] == [1, 2, 1, 2, 1.5, 1, 1, 2, 1], "the others' mean keeps it a number"
    assert (scores.metrics[f"rewards/errors/{name}"], scores.metrics["rewards/missing"]) == (1.0, 0.0)


@pytest.mark.parametrize("function", FAULTS)
def test_zero_is_zero_for_that_reward_alone(function: Any) -> None:
    scores = scored(
        function, load_reward(length, weight=0.5), on_error="zero", timeout=0.4 if function is hanging else 9
    )
    assert scores.rows[BAD].reward == 0.5 * 3
    assert scores.rows[BAD].rewards == {function.__name__: 0.0, "length": 3.0}
    assert scores.rows[0].reward == 1.5
    assert not any(row.skipped for row in scores.rows)
    assert list(scores.rows[BAD].errors) == [function.__name__]
    assert rollout_metrics(scores.rows)[f"rewards/errors/{function.__name__}"] == 1.0


@pytest.mark.parametrize("function", [raising, importing, hanging, nan, text, infinite])
def test_stop_names_the_row(function: Any) -> None:
    with pytest.raises(UserError) as caught:
        scored(function, on_error="stop", timeout=0.4 if function is hanging else 20.0)
    message = str(caught.value)
    assert f"row {BAD}" in message
    assert "prompt 1: 'p1'" in message
    assert "'BAD'" in message
    if function in (raising, importing, hanging):
        assert __file__ in message


def test_where_rows_cannot_be_told_apart_the_whole_call_failed() -> None:
    calls: list[int] = []

    class Stateful:
        def __call__(self, completions):
            calls.append(len(completions))
            raise KeyError("gone")

    async def later(completions):
        calls.append(len(completions))
        await asyncio.sleep(0)
        raise KeyError("gone")

    def ranks(completions, group_numbers):
        calls.append(len(completions))
        raise KeyError("gone")

    def only_together(completions):
        return [1.0] * len(completions) if len(completions) == 1 else 1 / 0

    for function in (Stateful(), later, ranks):
        scores = scored(function)
        assert all(row.errors and row.skipped for row in scores.rows)
    assert calls == [9, 9, 9], "called once"
    assert all(row.errors and row.skipped for row in scored(only_together).rows)
    with pytest.raises(UserError, match="ZeroDivisionError") as caught:
        scored(only_together, on_error="stop")
    assert "called on single completions" not in str(caught.value)


def test_the_rest_is_scored_together_with_what_it_logs() -> None:
    """A reward that compares its batch, as ranks do, gets the remaining completions at once."""

    def relative(completions, log_extra, log_metric):
        if "BAD" in completions:
            raise ValueError
        log_extra("size", [len(c) for c in completions])
        log_metric("batch", len(completions))
        return [len(c) / len(completions) for c in completions]

    scores = scored(relative)
    assert [row.rewards["relative"] for row in scores.rows if not row.errors] == [
        n / 8 for n in (1, 2, 1, 2, 1, 1, 2, 1)
    ]
    assert scores.metrics["batch"] == 8.0
    assert scores.extras == {"size": [1, 2, 1, 2, None, 1, 1, 2, 1]}


def test_many_rows_that_hang_take_no_longer_than_the_limit_allows() -> None:
    def endless(completions):
        while True:
            time.sleep(0.01)

    start = time.perf_counter()
    assert all(row.errors for row in scored(endless, timeout=0.3).rows)
    assert time.perf_counter() - start < 10, "the call, the search, and no more"


def test_what_combines_sees_no_value_where_a_reward_failed() -> None:
    gate = load_reward("gate", kwargs={"first": "raising", "then": "length"})
    parts = [load_reward(raising, weight=0.0), load_reward(length, weight=0.0)]
    scores = scored(*parts, gate)
    assert [row.rewards["gate"] for row in scores.rows][3:6] == [2.0, None, 1.0]
    assert scores.rows[BAD].skipped
    assert scored(*parts, gate, on_error="zero").rows[BAD].rewards["gate"] == 0.0


def test_an_argument_that_no_batch_has_ends_the_run_in_any_case() -> None:
    def wants(completions, anwser):
        return length(completions)

    with pytest.raises(WrongArguments, match="needs an argument 'anwser'"):
        scored(wants, on_error="zero")


def config(**algorithm: Any) -> Config:
    return Config(
        model={"model_name_or_path": "m"},
        data={"dataset_name": "d"},
        rollout={"num_generations": 3},
        rewards={"reward_funcs": ["x:raising"]},
        train={"generation_batch_size": 9},
        algorithm=algorithm,
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"scale_rewards": "batch"},
        {"advantage_estimator": "reinforce_plus_plus"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"drop_uniform_groups": True},
    ],
)
def test_a_skipped_group_takes_part_in_nothing(algorithm: dict[str, Any]) -> None:
    """Advantages, batch statistics and metrics are those of a batch that never had the group."""
    rows = scored(raising).rows
    without = [row for row in scored(raising).rows if row.group != 1]
    for group, start in ((0, 0), (1, 3)):
        for row in without[start : start + 3]:
            row.group = group
    penalties = [0.1 * i for i in range(9)]
    own = with_advantages(rows, config(**algorithm), penalties)
    other = with_advantages(without, config(**algorithm), penalties[:3] + penalties[6:])
    assert [row.advantage for row in own[:3] + own[6:]] == [row.advantage for row in other]
    assert [row.advantage for row in own[3:6]] == [0.0] * 3
    assert learned_from(rows, config(**algorithm)) == [0, 1, 2, 6, 7, 8]
    found, expected = rollout_metrics(rows), rollout_metrics(without)
    assert (found["reward"], found["reward_std"]) == (expected["reward"], expected["reward_std"])
    assert found["rewards/skipped_groups"] == 1.0
    assert len(best_and_worst(rows, 3).sequences) == 4


def test_a_batch_that_is_skipped_as_a_whole_teaches_nothing() -> None:
    def broken(completions):
        raise RuntimeError("no server")

    rows = with_advantages(scored(broken).rows, config())
    assert [row.advantage for row in rows] == [0.0] * 9
    assert learned_from(rows, config()) == []
    assert failed_everywhere(rows)
    assert not failed_everywhere(scored(raising).rows)
    said = errors_in_words(rows, "step 3")
    assert said.startswith("step 3: rewards failed: broken on 9 of 9 completions (row 0: reward 'broken' raised")
    assert said.endswith("3 groups left out")
    assert errors_in_words(scored(length).rows, "step 3") == ""


# --- whole runs -------------------------------------------------------------------------------------------------------

FAULTY = """
def low(completions, **columns):
    return [sum(int(w[1:]) < 20 for w in c.split() if w[0] == "w") / max(len(c.split()), 1) for c in completions]

def sometimes(completions, **columns):
    if any("w7" in c.split() for c in completions):
        raise KeyError("w7")
    return low(completions)

def never(completions, **columns):
    import no_such_library_anywhere
"""


ONCE_RIGHT = """
def low(completions, trainer_state, log_metric, **columns):
    log_metric("long", max(len(c) for c in completions))
    if BROKEN and trainer_state.global_step == 2:
        raise ZeroDivisionError("not yet")
    return [sum(int(w[1:]) < 20 for w in c.split() if w[0] == "w") / max(len(c.split()), 1) for c in completions]
"""


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, RunServer(folder)
        self.config = write_place(folder)
        (folder / "faulty.py").write_text(FAULTY)

    def run(self, name: str, *options: str, code: int = 0) -> str:
        common = ["eval.dataset_name=null", "warmup.max_steps=0", f"run_name={name}"]
        found, said = self.server.run("run", self.config, *common, *options, no_report=True)
        assert found == code, said
        assert "Traceback" not in said
        return " ".join(said.split())

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line or "reward" in line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("errors"))


@pytest.mark.parametrize("on_error", ["skip_group", "zero"])
def test_a_run_goes_on_and_says_so(place: Place, on_error: str) -> None:
    said = place.run(on_error, f"rewards.on_error={on_error}", "rewards.reward_funcs=[faulty.py:sometimes]")
    folder = place.folder / "runs" / on_error
    records = [record for path in sorted((folder / "rollouts").glob("step_*")) for record in read_rollouts(path)]
    failed = [r for r in records if "errors" in r]
    assert failed
    for record in records:
        assert ("errors" in record) == ("w7" in record["completion"].split())
        assert record["rewards"]["sometimes"] == (None if on_error == "skip_group" else 0.0) or "errors" not in record
    lines = place.metrics(on_error)
    assert sum(line["rewards/errors/sometimes"] for line in lines) == len(failed)
    groups = {(r["step"], r["group"]) for r in failed}
    skipped = {(r["step"], r["group"]) for r in records if r.get("skipped")}
    assert skipped == (groups if on_error == "skip_group" else set())
    assert all(r["advantage"] == 0 for r in records if r.get("skipped"))
    assert said.count("rewards failed: sometimes on") == len({step for step, _ in groups})
    # What lies in the journal says it too, so that a replay learns the same.
    code, out = place.server.run("replay", folder, no_report=True)
    assert code == 0, out
    adapter = "adapter/adapter_model.safetensors"
    assert (folder.with_name(f"{on_error}-replay") / adapter).read_bytes() == (folder / adapter).read_bytes()


def test_a_reward_that_is_out_of_order_ends_the_run(place: Place) -> None:
    options = ["rewards.reward_funcs=[faulty.py:never]", "optim.max_skipped_updates=2", "algorithm.beta=0"]
    said = place.run("broken", "rewards.on_error=skip_group", *options, code=2)
    assert "has failed on every completion of 2 rollouts in a row" in said
    assert "no_such_library_anywhere" in said
    run = place.folder / "runs" / "broken"
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["failed_rollouts"], state["evaluating"]) == (4, 0, True)
    lines = place.metrics("broken")
    assert lines[-1]["step"] == 4, "the step that the checkpoint stands behind is on record"
    assert lines[-1]["rewards/errors/never"] == 16
    code, said = place.server.run("resume", run, f"rewards.reward_funcs=[{place.folder}/faulty.py:low]", no_report=True)
    assert code == 0, said
    assert [line["step"] for line in place.metrics("broken")] == [2, 4, 6]


def test_no_rollout_is_lost_when_a_reward_ends_the_run(place: Place) -> None:
    """The completions are scored by the corrected reward, and the end is that of a run whose reward was never wrong."""
    path = place.folder / "once.py"
    options = ["rewards.reward_funcs=[once.py:low]", "checkpoint.save_total_limit=null", "checkpoint.save_steps=2"]
    path.write_text("BROKEN = False" + ONCE_RIGHT)
    place.run("right", *options)
    path.write_text("BROKEN = True" + ONCE_RIGHT)
    said = place.run("wrong", *options, code=2)
    assert "rl-train resume the run, which scores the 16 completions that are kept" in said
    run = place.folder / "runs" / "wrong"
    kept = (run / "unscored.jsonl").read_bytes()
    assert len(kept.splitlines()) == 16
    # Another try with the same mistake keeps them.
    code, said = place.server.run("resume", run, no_report=True, patch=COUNT_GENERATIONS)
    assert (code, "GENERATES" in said) == (2, False), said
    assert (run / "unscored.jsonl").read_bytes() == kept
    path.write_text("BROKEN = False" + ONCE_RIGHT)
    code, said = place.server.run("resume", run, no_report=True, patch=COUNT_GENERATIONS)
    assert code == 0, said
    assert "scoring 16 completions that were generated before" in " ".join(said.split())
    assert said.count("GENERATES") == 1, "the third rollout"
    assert not (run / "unscored.jsonl").exists()
    found, expected = outcome(run), outcome(place.folder / "runs" / "right")
    for part, value in expected.items():
        assert found[part] == value, part


def test_kept_completions_are_not_scored_where_they_do_not_belong(place: Place) -> None:
    path = place.folder / "once.py"
    path.write_text("BROKEN = True" + ONCE_RIGHT)
    place.run("other", "rewards.reward_funcs=[once.py:low]", code=2)
    path.write_text("BROKEN = False" + ONCE_RIGHT)
    run = place.folder / "runs" / "other"
    before = (run / "unscored.jsonl").read_bytes()
    results = {}
    for change in ("rewards.timeout=50", "rollout.temperature=0.9", ""):
        copy = Path(shutil.copytree(run, run.with_name(f"other-{change.partition('=')[0]}")))
        if not change:  # a torn file, as a disk may give it back
            (copy / "unscored.jsonl").write_bytes(before[:-5])
        arguments = ["resume", copy, change] if change else ["resume", copy]
        code, said = place.server.run(*arguments, no_report=True, patch=COUNT_GENERATIONS)
        assert code == 0, said
        results[change] = said.count("GENERATES")
        assert not (copy / "unscored.jsonl").exists()
    assert results == {"rewards.timeout=50": 1, "rollout.temperature=0.9": 2, "": 2}


def test_kept_episodes_come_back_with_their_rows(tmp_path: Path) -> None:
    """What `reset` added to the prompt is kept; the columns are the data set's."""
    config = parse_config(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "rewards": {"reward_funcs": ["x.py:y"]},
        }
    )
    said: list[str] = []
    chat = [{"role": "user", "content": "q"}]
    row = Prompt(3, [1, 2], chat, {"answer": "a", "image": object()})
    episode = Episode([{"role": "assistant", "content": "\ud800"}], 1, turn_rewards=[0.1 + 0.2], reward=0.3)
    played = Completion([5, 6, 7], [0.0, -0.1 - 0.2, -1e-300], False, [False, True, True], episode)
    opened = Prompt(3, [1, 2, 9], [{"role": "user", "content": "q: 7"}], row.columns)
    unscored = Unscored(tmp_path, config, said.append)
    unscored.keep([Group(opened, [played, played])], position=4, step=2)
    (group,) = Unscored(tmp_path, config, said.append).take([row], position=4, step=2) or []
    assert group == Group(opened, [played, played])
    assert unscored.take([Prompt(4, [1, 2], chat)], position=4, step=2) is None
    assert unscored.take([row], position=5, step=2) is None
    assert unscored.take([row], position=4, step=3) is None
    assert len(said) == 4
    unscored.forget()
    assert unscored.take([row], position=4, step=2) is None
