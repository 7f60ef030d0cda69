"""What a batch is made of: groups with a signal from several tries, prompts by their pass rate; to the byte again after
an interruption, in a replay."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from run_server import RunServer
from tiny_run import outcome, write_place

from tandem.rl.config_file import parse_config
from tandem.rl.curriculum import Curriculum, PassRate
from tandem.rl.errors import UserError
from tandem.rl.prompts import PromptSampler
from tandem.rl.rollout_journal import read_journal
from tandem.rl.rollout_tries import Tries
from tandem.rl.samples import Completion, Prompt, Scored
from tandem.rl.sections import CurriculumConfig


def group(index: int, *rewards: float, skipped: bool = False, rewarded: bool = True) -> list[Scored]:
    values = {"a": 1.0 if rewarded else None}
    rows = [Scored(Prompt(index, [1], ""), Completion([1], [0.0], False), 0, "", values, r) for r in rewards]
    for row in rows:
        row.skipped = skipped
    return rows


# --- tries ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["signal", "uniform", "skipped"]), min_size=60, max_size=60),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_a_batch_is_the_first_groups_with_a_signal(kinds: list[str], wanted: int, resamples: int) -> None:
    stream: Iterator[tuple[int, str]] = iter(enumerate(kinds))
    tries = Tries(wanted, 2, resamples)
    seen: list[tuple[int, str]] = []
    rounds = 0
    while asked := tries.asked:
        assert 1 <= asked <= wanted
        missing = wanted - sum(kind == "signal" for _, kind in seen)
        assert asked >= missing, "a try that cannot fill the batch is not worth its time"
        new = [next(stream) for _ in range(asked)]
        seen += new
        rounds += 1
        tries.add([row for i, kind in new for row in group(i, 0.0, float(kind == "signal"), skipped=kind == "skipped")])
    found = tries.batch()
    signal = [i for i, kind in seen if kind == "signal"]
    assert rounds <= resamples + 1
    assert len(signal) >= wanted or rounds == resamples + 1
    rest = [i for i, kind in seen if kind == "uniform"] + [i for i, kind in seen if kind == "skipped"]
    assert [row.prompt.index for row in found[::2]] == sorted((signal + rest)[:wanted])
    assert [row.group for row in found] == [n for n in range(wanted) for _ in range(2)]
    assert tries.complete == (len(signal) >= wanted)
    assert tries.metrics()["sampling/generated"] == len(seen)
    assert tries.metrics()["sampling/kept"] == min(len(signal), wanted)
    assert tries.metrics()["sampling/tries"] == rounds


def test_a_signal_is_what_advantages_call_one() -> None:
    """Equal rewards whose mean is another number by rounding are no signal; the smallest difference is one."""
    tries = Tries(3, 3, 1)
    tries.add(group(0, 0.1, 0.1, 0.1) + group(1, 0.1, 0.1, 0.1 + 2e-17 + 1e-16) + group(2, 1.0, 1.0, 1.0))
    assert tries.metrics()["sampling/kept"] == 1


def test_without_dynamic_sampling_the_first_try_is_the_batch() -> None:
    tries = Tries(2, 2, None)
    tries.add(group(0, 1.0, 1.0) + group(1, 1.0, 1.0))
    assert tries.asked == 0
    assert [row.prompt.index for row in tries.batch()] == [0, 0, 1, 1]
    assert tries.metrics() == {}


# --- curriculum -------------------------------------------------------------------------------------------------------


def curriculum(rates: dict[int, PassRate], rows: int = 10, **options: Any) -> Curriculum:
    prompts = [Prompt(100 + i, [i], "") for i in range(rows)]  # the data set's numbers are not the list's
    sampler = PromptSampler(rows, seed=3, shuffle=True)
    return Curriculum(
        CurriculumConfig(**{"enabled": True, "retry_probability": 0.0, **options}), prompts, sampler, rates, seed=5
    )


def test_the_rate_is_a_running_mean_and_can_be_taken_back() -> None:
    rates: dict[int, PassRate] = {7: PassRate(4, 0.5)}
    own = curriculum(rates, decay=0.75)
    before = own.note([(7, 1.0), (8, 0.25), (7, 0.0)])
    assert rates == {7: PassRate(6, 0.75 * (0.75 * 0.5 + 0.25)), 8: PassRate(1, 0.25)}
    own.restore(before)
    assert rates == {7: PassRate(4, 0.5)}


@pytest.mark.parametrize("share", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9])
def test_the_same_share_again_and_again_is_that_rate_to_the_bit(share: float, decay: float) -> None:
    rates: dict[int, PassRate] = {}
    for _ in range(50):
        curriculum(rates, decay=decay).note([(1, share)])
    assert rates[1] == PassRate(50, share)


def test_what_groups_tell_of_their_prompts() -> None:
    own = curriculum({}, pass_reward=0.5)
    groups = [group(3, 0.5, 0.4, 1.0, -1.0), group(4, 1.0, skipped=True), group(5, 1.0, rewarded=False), group(3, 0.0)]
    assert own.visits(groups) == [(3, 0.5), (3, 0.0)]
    assert curriculum({}, enabled=False).visits(groups) == []


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.integers(0, 9), st.tuples(st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))),
    st.integers(0, 40),
    st.integers(1, 12),
)
def test_what_is_drawn(known: dict[int, tuple[int, float]], position: int, count: int) -> None:
    """Against a plain walk along the stream."""
    rates = {100 + row: PassRate(*rate) for row, rate in known.items()}
    dull = {row for row, (visits, rate) in known.items() if visits >= 2 and not 0.05 < rate < 0.95}
    draw = curriculum(rates).draw(position, count)
    stream = PromptSampler(10, seed=3, shuffle=True).take(position, count + 10)
    looked = stream[: draw.rows]
    lively = list(dict.fromkeys(row for row in looked if row not in dull))
    passed = list(dict.fromkeys(row for row in looked if row in dull))
    drawn = [prompt.index - 100 for prompt in draw.prompts]
    assert drawn == ((lively + passed) * count)[:count] if count > len(lively + passed) else (lively + passed)[:count]
    assert len(set(drawn)) == min(count, len(lively + passed))
    assert len(lively) >= count or draw.rows == count + 10
    if len(lively) >= count:
        assert looked[-1] == drawn[-1], "no row is used up behind the last one"
    assert draw.skipped == len(passed) - max(0, min(len(passed), count - len(lively)))


def test_without_a_curriculum_it_is_the_stream_itself() -> None:
    off = curriculum({100: PassRate(9, 1.0)}, enabled=False)
    for position in range(25):
        draw = off.draw(position, 4)
        assert [p.index - 100 for p in draw.prompts] == PromptSampler(10, seed=3, shuffle=True).take(position, 4)
        assert (draw.rows, draw.skipped) == (4, 0)


def test_prompts_are_tried_again_at_the_given_rate_and_the_same_ones_each_time() -> None:
    rates = {100 + i: PassRate(9, 1.0) for i in range(5)}

    def visits() -> list[int]:
        own, position, found = curriculum(rates, retry_probability=0.2), 0, []
        for _ in range(800):
            draw = own.draw(position, 1)
            found.append(draw.prompts[0].index)
            position += draw.rows
        return found

    found = visits()
    assert found == visits()
    # Of the six rows that are visited per epoch on average, one is a second look.
    assert statistics.fmean(index < 105 for index in found) == pytest.approx(1 / 6, abs=0.04)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 0.5, "high": 0.5}, "low is 0.5 and high is 0.5"),
        ({"decay": 1.0}, "data.curriculum.decay"),
        ({"hihg": 1.0}, "did you mean 'data.curriculum.high'"),
    ],
)
def test_a_wrong_section_is_refused(change: dict[str, Any], message: str) -> None:
    raw = {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d", "curriculum": change}}
    with pytest.raises(UserError, match=message):
        parse_config(raw | {"rewards": {"reward_funcs": ["length_penalty"]}})
    with pytest.raises(UserError, match=r"data\.curriculum is for rollouts"):
        parse_config(
            {**raw, "data": {"dataset_name": "d", "curriculum": {"enabled": True}}, "algorithm": {"name": "sft"}}
        )


# --- runs -------------------------------------------------------------------------------------------------------------

# Most groups agree: a completion is right that holds a word which only some prompts call for.
REWARD = """
import pathlib

def right(completions, prompts):
    if len(prompts) in (8, 12) and pathlib.Path(__file__).with_name("broken").exists():  # a later try
        raise ValueError("not yet")
    return [float(int(p.split()[0][1:]) % 3 != 0 and any(int(w[1:]) < 8 for w in c.split() if w[0] == "w"))
            for p, c in zip(prompts, completions)]
"""


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, RunServer(folder)
        self.config: dict[str, Any] = yaml.safe_load(write_place(folder).read_text())
        (folder / "right.py").write_text(REWARD)
        self.config["rewards"] = {"reward_funcs": ["right.py:right"]}
        self.config["rollout"] |= {"dynamic_sampling": True, "max_resamples": 2}
        self.config["data"]["curriculum"] = {"enabled": True, "low": 0.1, "retry_probability": 0.3}
        self.config["train"]["max_steps"] = 12
        (folder / "sampling.yaml").write_text(yaml.safe_dump(self.config))
        code, said = self.server.run("run", folder / "sampling.yaml", count=str(folder / "touches.txt"), no_report=True)
        assert code == 0, said
        self.said, self.run = said, folder / "runs" / "run"
        self.outcome = outcome(self.run)
        self.touches = len((folder / "touches.txt").read_text().splitlines())

    def metrics(self) -> list[dict[str, Any]]:
        return [record for record in self.outcome["metrics"] if "sampling/tries" in record]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("sampling"))


def test_a_run_says_what_it_sampled(place: Place) -> None:
    records = place.metrics()
    assert len(records) == 6
    for record, rollout in zip(records, read_journal(place.run), strict=True):
        by_group = [rollout.rows[i : i + 4] for i in range(0, 16, 4)]
        assert [row.group for row in rollout.rows] == [n for n in range(4) for _ in range(4)]
        kept = sum(len({row.reward for row in rows}) > 1 for rows in by_group)
        assert record["sampling/kept"] == kept
        assert record["sampling/generated"] == len(rollout.visits) >= 4
        assert 1 <= record["sampling/tries"] <= 3
        assert kept == 4 or record["sampling/tries"] == 3
        assert 0 <= record["curriculum/skipped"] < 1
    assert any(record["sampling/tries"] > 1 for record in records)
    assert any(record["curriculum/skipped"] > 0 for record in records)
    short = any(record["sampling/kept"] < 4 for record in records)
    assert ("further tries found too few groups" in place.said) == short


def test_the_state_is_what_the_journal_tells(place: Place) -> None:
    rates: dict[int, PassRate] = {}
    position = 0
    for rollout in read_journal(place.run):
        assert rollout.position == position
        position += rollout.used
        curriculum(rates).note(rollout.visits)
    state = place.outcome["state"]
    assert state["position"] == position
    assert state["curriculum"] == {str(i): {"visits": r.visits, "rate": r.rate} for i, r in rates.items()}


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_killed_and_resumed_is_as_undisturbed(place: Place, share: float) -> None:
    name = f"killed_{share}"
    moment = 1 + int((share + 0.1 * random.Random(share).random()) * place.touches)
    code, said = place.server.run("run", place.folder / "sampling.yaml", f"run_name={name}", kill_at=moment)
    assert code == -9, said
    code, said = place.server.run("resume", place.folder / "runs" / name, no_report=True)
    assert code == 0, said
    assert outcome(place.folder / "runs" / name) == place.outcome


def test_a_replay_learns_the_same(place: Place) -> None:
    code, said = place.server.run("replay", place.run, no_report=True)
    assert code == 0, said
    replayed = place.folder / "runs" / "run-replay"
    name = "adapter/adapter_model.safetensors"
    assert (replayed / name).read_bytes() == place.outcome["files"][name]
    newest = sorted((replayed / "checkpoints").glob("step_*"))[-1]
    state = json.loads((newest / "state.json").read_text())
    assert state["curriculum"] == place.outcome["state"]["curriculum"]
    assert state["position"] == place.outcome["state"]["position"]


def test_a_reward_that_fails_in_a_later_try_loses_nothing(place: Place) -> None:
    broken = place.folder / "broken"
    broken.touch()
    code, said = place.server.run("run", place.folder / "sampling.yaml", "run_name=fails", no_report=True)
    broken.unlink()
    assert code != 0
    assert "not yet" in said
    run = place.folder / "runs" / "fails"
    assert (run / "unscored.jsonl").exists()
    code, said = place.server.run("resume", run, no_report=True)
    assert code == 0, said
    assert "completions that were generated before" in said
    assert outcome(run) == place.outcome
