"""Every second of a step has a name: by a clock that is wound by hand, in a run, in the console and in the report."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_llama, save_words

from tandem.rl import commands, open_model
from tandem.rl.config import Config
from tandem.rl.console import Console
from tandem.rl.report import write_report
from tandem.rl.report_plots import time_bins
from tandem.rl.samples import Group, Prompt, Sampling
from tandem.rl.step_time import PARTS, StepClock
from tandem.rollout.transformers_engine import TransformersEngine

WORDS = ["<pad>", "</s>", *(f"w{i}" for i in range(2, 32))]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


# --- the clock --------------------------------------------------------------------------------------------------------


def test_parts_within_parts_are_counted_once():
    hand = Hand()
    clock = StepClock(now=hand)
    hand.move(1)
    with clock.part("generate"):
        hand.move(2)
        with clock.part("reward"):
            hand.move(4)
        hand.move(8)
    hand.move(16)
    with clock.part("generate"):
        hand.move(32)
    assert clock.lap() == {"generate": 42, "reward": 4, "idle": 17}
    assert clock.lap() == {"idle": 0}


def test_a_lap_within_a_part_divides_it():
    hand = Hand()
    clock = StepClock(now=hand)
    with clock.part("log"):
        hand.move(3)
        assert clock.lap() == {"log": 3, "idle": 0}
        hand.move(5)
    assert clock.lap() == {"log": 5, "idle": 0}


def test_a_part_that_fails_ends_nevertheless():
    hand = Hand()
    clock = StepClock(now=hand)

    def fail() -> None:
        hand.move(2)
        raise RuntimeError

    with pytest.raises(RuntimeError), clock.part("reward"):
        fail()
    hand.move(1)
    assert clock.lap() == {"reward": 2, "idle": 1}


def test_the_order_is_that_of_a_step_and_other_names_are_refused():
    hand = Hand()
    clock = StepClock(now=hand)
    for name in ("checkpoint", "backward", "wake"):
        with clock.part(name):
            hand.move(1)
    assert list(clock.lap()) == ["wake", "backward", "checkpoint", "idle"]
    with pytest.raises(ValueError, match="'coffee' is no part"), clock.part("coffee"):
        pass


def test_the_device_is_waited_for_only_where_a_part_says_so_and_within_that_part():
    hand, waits = Hand(), 0

    def wait() -> None:
        nonlocal waits
        waits += 1
        hand.move(10)

    clock = StepClock(wait, now=hand)
    with clock.part("generate"):
        hand.move(1)
    with clock.part("backward", device=True):
        hand.move(1)
    with pytest.raises(RuntimeError), clock.part("optimizer", device=True):
        raise RuntimeError  # a device that failed must not hide why
    assert clock.lap() == {"generate": 1, "backward": 11, "optimizer": 0, "idle": 0}
    assert waits == 1


# --- a run ------------------------------------------------------------------------------------------------------------

SLEEPS = {"wake": 0.05, "sleep": 0.06, "adapter": 0.07, "generate": 0.08, "reward": 0.09}
REWARD = f"""
import time

def low(completions, **_):
    time.sleep({SLEEPS["reward"]})
    return [float(c.count("w1")) for c in completions]
"""


class SlowEngine(TransformersEngine):
    def generate(self, prompts: list[Prompt], sampling: Sampling, **more: Any) -> list[Group]:
        time.sleep(SLEEPS["generate"])
        return super().generate(prompts, sampling, **more)

    def load_adapter(self, version: int) -> None:
        time.sleep(SLEEPS["adapter"])

    def sleep(self) -> None:
        time.sleep(SLEEPS["sleep"])

    def wake(self) -> None:
        time.sleep(SLEEPS["wake"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("accounting")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
    save_llama(folder / "model", len(WORDS), **shape)
    save_words(folder / "model", WORDS, eos="</s>", unk="<pad>", named=False)
    (folder / "rewards.py").write_text(REWARD)
    rows = "".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(2, 10))
    (folder / "prompts.jsonl").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, float]:
    """A run of four steps with a checkpoint and an evaluation after the second, and its wall time in `Trainer.fit`."""
    return timed_run(place)


def timed_run(place: Path, **log: Any) -> tuple[Path, float]:
    config = Config.model_validate(
        {
            "output_dir": str(place / "runs"),
            "model": {"model_name_or_path": str(place / "model"), "device": "cpu"},
            "lora": {"r": 2},
            "data": {"dataset_name": str(place / "prompts.jsonl")},
            "eval": {"dataset_name": str(place / "prompts.jsonl"), "eval_steps": 2, "eval_on_start": False},
            "rollout": {"num_generations": 4, "max_completion_length": 4},
            "rewards": {"reward_funcs": [f"{place / 'rewards.py'}:low"]},
            "algorithm": {"beta": 0.01},
            "train": {"max_steps": 4, "generation_batch_size": 16},
            "checkpoint": {"save_steps": 2},
            "log": log,
        }
    )
    seconds = 0.0
    fit = commands.Trainer.fit

    def timed(self) -> bool:
        nonlocal seconds
        started = time.perf_counter()
        done = fit(self)
        seconds = time.perf_counter() - started
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_model, "open_engine", lambda wanted, lm, **_: SlowEngine(lm))
        patch.setattr(commands.Trainer, "fit", timed)
        assert commands.run(config, dry_run=False, console=Console(io.StringIO(), io.StringIO(), live=False))
    return sorted(config.run_dir.parent.iterdir(), key=lambda run: run.stat().st_mtime)[-1], seconds


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "step_time" in line]


def parts(record: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("time/"): value for key, value in record.items() if key.startswith("time/")}


def test_the_parts_of_a_step_are_its_wall_time(finished):
    run, wall = finished
    records = steps(run)
    assert len(records) == 4
    for record in records:
        assert sum(parts(record).values()) == pytest.approx(record["step_time"], rel=1e-9)
        assert set(parts(record)) <= set(PARTS)
        assert all(value >= 0 for value in parts(record).values())
    # All that lies between the records: nothing is counted twice, and only what follows the last one is missing.
    total = sum(record["step_time"] for record in records)
    assert total < wall
    after = wall - total  # the last record, an evaluation, a checkpoint and the adapter: about one step's time
    assert after < wall / 2


def test_each_part_holds_what_was_done_in_it(finished):
    for record in steps(finished[0]):
        spent = parts(record)
        for name, seconds in SLEEPS.items():
            # Other work on the machine may make a part longer, and never shorter.
            assert seconds <= spent[name] + 1e-3, name
        for name in ("log_probs", "backward", "optimizer", "parity", "log"):
            assert 0 < spent[name] < record["step_time"], name
        assert spent["idle"] < 0.5 * record["step_time"]


def test_what_follows_a_record_is_in_the_next_one(finished):
    names = [set(parts(record)) for record in steps(finished[0])]
    assert ["checkpoint" in n for n in names] == [False, False, True, False]
    assert ["evaluate" in n for n in names] == [False, False, True, False]
    evaluation = parts(steps(finished[0])[2])["evaluate"]
    assert evaluation >= SLEEPS["wake"] + SLEEPS["generate"] + SLEEPS["reward"] + SLEEPS["sleep"] - 1e-3


def test_no_time_is_lost_where_steps_have_no_record(place):
    run, wall = timed_run(place, logging_steps=3)
    records = steps(run)
    assert [record["step"] for record in records] == [3, 4]
    for record, count in zip(records, (3, 1), strict=True):
        assert sum(parts(record).values()) == pytest.approx(record["step_time"], rel=1e-9)
        for name, seconds in SLEEPS.items():
            assert count * (seconds - 1e-3) <= parts(record)[name], name
    assert {"evaluate", "checkpoint"} <= set(parts(records[0]))
    assert wall / 2 < sum(record["step_time"] for record in records) < wall


# --- shown ------------------------------------------------------------------------------------------------------------


def test_the_report_of_a_run_has_the_chart(finished):
    page = write_report(finished[0])
    assert "Where the time goes" in page.read_text()
    assert (finished[0] / "report" / "time.png").read_bytes().startswith(b"\x89PNG")


def test_bars_are_steps_or_means_over_equally_many():
    records = [{"step": s, "time/generate": float(s), "time/idle": 1.0} for s in range(1, 11)]
    records[4]["time/checkpoint"] = 6.0
    single = time_bins(records, 10)
    assert single.width == 1
    assert single.centres == [float(s) for s in range(1, 11)]
    assert single.seconds["generate"] == [float(s) for s in range(1, 11)]
    assert single.seconds["checkpoint"] == [0, 0, 0, 0, 6, 0, 0, 0, 0, 0]
    few = time_bins(records, 4)  # three steps each, the last one alone
    assert few.width == 3
    assert few.centres == [2, 5, 8, 11]
    assert few.seconds["generate"] == [2, 5, 8, 10]
    assert few.seconds["checkpoint"] == [0, 2, 0, 0]
    assert few.seconds["idle"] == [1, 1, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 500])
def test_the_chart_of_any_length_is_drawn(tmp_path, count):
    records = [
        {"step": s + 1, "step_time": 9.0} | {f"time/{name}": 1.0 + i for i, name in enumerate(PARTS)}
        for s in range(count)
    ]
    records[0] = {key: None if key == "time/generate" else value for key, value in records[0].items()}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = write_report(tmp_path).read_text()
    assert "Where the time goes" in text
    assert ("means over" in text) == (count == 500)


def test_a_line_of_the_console_says_what_took_the_time():
    out = io.StringIO()
    console = Console(out, io.StringIO(), live=False)
    console.start(9)
    metrics = {"reward": 0.5, "step_time": 20.0, "time/wake": 0.4, "time/generate": 12.0, "time/backward": 7.6}
    console.step(1, metrics)
    console.step(2, {"reward": 0.5, "step_time": 20.0, "time/generate": 19.5, "time/idle": 0.5})
    console.step(3, {"reward": 0.5})
    first, second, third = out.getvalue().splitlines()
    assert "20 s (generate 60%, backward 38%)" in first
    assert "20 s (generate 98%)" in second
    assert "%" not in third


def test_the_live_bar_names_the_part_that_goes_on():
    out = Terminal()
    hand = Hand()
    with Console(out, io.StringIO(), live=True, width=120) as console:
        clock = StepClock(on_part=console.part, now=hand)
        with clock.part("log_probs"):  # before there is a bar: nothing happens
            pass
        console.start(5)
        with clock.part("generate"):
            refresh(console)
            with clock.part("reward"):
                refresh(console)
        refresh(console)
    text = out.getvalue()
    assert "training: generate" in text
    assert text.index("training: generate") < text.index("training: reward")
    assert "log-probs" not in text


def refresh(console: Console) -> None:
    """Draw the bar now; by itself it does so ten times a second."""
    assert console._progress is not None
    console._progress.refresh()
