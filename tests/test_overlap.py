"""Rewards called ahead: the same values whatever is finished first, in time, and with every fault seen."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from run_server import RunServer
from tiny_run import outcome, write_place

from tandem.rewards.base import Reward, load_reward
from tandem.rewards.call import TrainerState
from tandem.rewards.compose import Scores, score
from tandem.rewards.overlap import CallsAhead, covered
from tandem.rl.errors import UserError
from tandem.rl.samples import Completion, Group, Prompt, Sampling
from tandem.rollout.restart import RestartingEngine
from tandem.rollout.vllm_steps import generate_stepwise

SIZE = 3


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def batch(count: int, seed: int = 0) -> list[Group]:
    draw = random.Random(seed)

    def completion() -> Completion:
        ids = [draw.randrange(97, 123) for _ in range(draw.randrange(1, 9))]
        return Completion(ids, [0.0] * len(ids), draw.random() < 0.3)

    return [Group(Prompt(i, [1], f"p{i}", {"answer": i}), [completion() for _ in range(SIZE)]) for i in range(count)]


def length(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
    log_extra("first", [c[0] for c in completions])
    return [len(c) / 7 for c in completions]


def logged(completions: list[str], log_metric: Any) -> list[float | None]:
    log_metric("vowels", sum(c.count("a") for c in completions) / 3)
    return [None if c[0] < "e" else ord(c[0]) / 3 for c in completions]


async def slow(completions: list[str], answer: list[int], log_metric: Any) -> list[float]:
    await asyncio.sleep(0.001 * (7 - answer[0] % 7))
    log_metric("answer", answer[0] / 3)
    return [a + len(c) / 11 for a, c in zip(answer, completions, strict=True)]


def spread(completions: list[str]) -> list[float]:
    """Sees the batch."""
    longest = max(map(len, completions))
    return [len(c) / longest for c in completions]


def rewards_of() -> list[Reward]:
    return [
        load_reward(length, weight=0.3, scope="group"),
        load_reward(spread, weight=0.1),
        load_reward(slow, weight=0.7, scope="group"),
        load_reward(logged, scope="group"),
        load_reward("group_ranks", kwargs={"of": "slow"}),
    ]


def scored(rewards: list[Reward], groups: list[Group], order: list[int] | None = None, **options: Any) -> Scores:
    """Scored at once, or with groups handed over in the order in which they are finished."""
    timeout = options.pop("timeout", 20.0)
    if order is None:
        return score(groups, rewards, decode, timeout=timeout, **options)
    with CallsAhead(rewards, decode, TrainerState(0, 0), timeout) as ahead:
        assert ahead.on_group is not None
        for number in order:
            ahead.on_group(number, groups[number])
        return score(groups, rewards, decode, timeout=timeout, ahead=ahead, **options)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 7), st.integers(0, 10**6))
def test_the_order_of_the_groups_changes_no_bit(order: list[int], handed: int, seed: int) -> None:
    """Also where an engine hands over only some of them."""
    groups = batch(7, seed)
    at_once, ahead = scored(rewards_of(), groups), scored(rewards_of(), groups, order[:handed])
    assert ahead.rows == at_once.rows
    assert ahead.extras == at_once.extras
    # What is logged is averaged over calls: one for the batch, or one for each group, in their order.
    own = ("vowels", "answer")
    assert {k: v for k, v in ahead.metrics.items() if k not in own} == {
        k: v for k, v in at_once.metrics.items() if k not in own
    }
    again = scored(rewards_of(), groups, order[::-1])
    assert {k: again.metrics[k] for k in own} == {k: ahead.metrics[k] for k in own}


def test_what_each_function_gets_to_see() -> None:
    seen: dict[str, list[tuple[int, ...]]] = {"plain": [], "logs": [], "whole": []}
    started, go_on = threading.Event(), threading.Event()

    def plain(completions: list[str], answer: list[int], group_numbers: list[int]) -> list[float]:
        assert group_numbers == answer
        seen["plain"].append(tuple(answer))
        started.set()
        assert go_on.wait(10)
        return [1.0] * len(completions)

    def logs(completions: list[str], answer: list[int], log_metric: Any) -> list[float]:
        seen["logs"].append(tuple(answer))
        return [1.0] * len(completions)

    def whole(completions: list[str], answer: list[int]) -> list[float]:
        seen["whole"].append(tuple(answer))
        return [1.0] * len(completions)

    rewards = [load_reward(plain, scope="group"), load_reward(logs, scope="group"), load_reward(whole)]
    groups = batch(4)
    with CallsAhead(rewards, decode, TrainerState(0, 0), 20) as ahead:
        assert ahead.on_group is not None
        ahead.on_group(2, groups[2])
        assert started.wait(10)
        for number in (0, 3, 1):  # while the first call goes on
            ahead.on_group(number, groups[number])
        assert not seen["whole"]
        go_on.set()
        score(groups, rewards, decode, timeout=20, ahead=ahead)
    assert seen["plain"] == [(2,) * 3, (0,) * 3 + (3,) * 3 + (1,) * 3]  # what waited is one call
    assert seen["logs"] == [(2,) * 3, (0,) * 3, (3,) * 3, (1,) * 3]
    assert seen["whole"] == [tuple(i for i in range(4) for _ in range(3))]


def test_without_such_rewards_an_engine_is_told_nothing() -> None:
    assert CallsAhead([load_reward(spread)], decode, TrainerState(0, 0), 1).on_group is None
    assert load_reward("code_tests").scope == "group"
    assert load_reward("math_answer").scope == load_reward("environment").scope == "batch"


def test_a_combination_cannot_be_called_ahead() -> None:
    with pytest.raises(UserError, match="needs the other rewards' values"):
        load_reward("minimum", kwargs={"of": ["a"]}, scope="group")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_works_while_the_engine_does(kind: str) -> None:
    """The engine waits for the reward of its first group before it makes the second."""
    done = threading.Event()

    def sync(completions: list[str]) -> list[float]:
        done.set()
        return [1.0] * len(completions)

    async def later(completions: list[str]) -> list[float]:
        await asyncio.sleep(0.01)
        return sync(completions)

    groups, reward = batch(2), load_reward(sync if kind == "sync" else later, scope="group")
    with CallsAhead([reward], decode, TrainerState(0, 0), 20) as ahead:
        assert ahead.on_group is not None
        ahead.on_group(0, groups[0])
        assert done.wait(10)
        ahead.on_group(1, groups[1])
        assert len(score(groups, [reward], decode, timeout=20, ahead=ahead).rows) == 2 * SIZE
        assert ahead.hidden_seconds > 0


def sleeps(completions: list[str]) -> list[float]:
    time.sleep(30)
    return []


async def sleeps_async(completions: list[str]) -> list[float]:
    await asyncio.sleep(30)
    return []


async def blocks_the_loop(completions: list[str]) -> list[float]:
    time.sleep(4)
    return []


def raises(completions: list[str], answer: list[int]) -> list[float]:
    if 1 in answer:
        raise KeyError("gone")
    return [1.0] * len(completions)


def not_finite(completions: list[str], answer: list[int]) -> list[float]:
    return [float("nan") if a == 1 and k % SIZE == 2 else 1.0 for k, a in enumerate(answer)]


FAULTS: list[tuple[Callable[..., Any], str]] = [
    (sleeps, "did not finish within 0.2 seconds"),
    (sleeps_async, "did not finish within 0.2 seconds"),
    (blocks_the_loop, "event loop is blocked at .*test_overlap.py"),
    (raises, "raised KeyError: 'gone'"),
    (not_finite, "returned nan for row 5"),
    (lambda completions, nowhere: [], "needs an argument 'nowhere'"),
]


@pytest.mark.parametrize("on_error", ["zero", "skip_group"])
@pytest.mark.parametrize("function", [raises, not_finite])
def test_what_becomes_of_faults_is_the_same(function: Callable[..., Any], on_error: Any) -> None:
    """A function that may be called on single rows is searched for the guilty ones either way."""
    rewards = [load_reward(function, scope="group"), load_reward(length, scope="group")]
    options: dict[str, Any] = {"on_error": on_error, "on_missing": "group_mean"}
    ahead, at_once = (scored(rewards, batch(3), order, **options) for order in ([2, 1, 0], None))
    assert ahead.rows == at_once.rows
    assert ahead.metrics == at_once.metrics
    assert any(row.errors for row in ahead.rows)


@pytest.mark.parametrize(("function", "message"), FAULTS)
def test_faults_are_those_of_a_batch(function: Callable[..., Any], message: str) -> None:
    timeout = 0.2 if "sleeps" in function.__name__ or "blocks" in function.__name__ else 20.0
    reward = load_reward(function, name="mine", scope="group")
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        scored([reward], batch(3), [1, 0, 2], timeout=timeout)
    assert time.monotonic() - began < 15
    assert scored(rewards_of(), batch(2), [1, 0]).rows == scored(rewards_of(), batch(2)).rows, "the next batch is whole"


def test_an_engine_that_fails_leaves_nothing_at_work() -> None:
    calls: list[int] = []
    release = threading.Event()

    def held(completions: list[str], answer: list[int], log_metric: Any) -> list[float]:
        calls.append(answer[0])
        release.wait(10)
        return [1.0] * len(completions)

    groups = batch(3)

    def engine() -> None:
        with CallsAhead([load_reward(held, scope="group")], decode, TrainerState(0, 0), 20) as ahead:
            assert ahead.on_group is not None
            for number in range(3):
                ahead.on_group(number, groups[number])
            while not calls:
                time.sleep(0.01)
            raise UserError("the engine failed")

    with pytest.raises(UserError, match="the engine failed"):
        engine()
    release.set()
    ends = time.monotonic() + 10
    while any(t.name == "rewards-ahead" for t in threading.enumerate()) and time.monotonic() < ends:
        time.sleep(0.01)
    assert calls == [0]
    assert not any(t.name == "rewards-ahead" for t in threading.enumerate())


class Counting:
    """A reward with a state: what it says of a batch does not depend on the calls that the batch was cut into."""

    def start_batch(self) -> None:
        self.rows = 0

    def end_batch(self) -> None:
        if self.rows == SIZE:
            raise ValueError("one group only")

    def __call__(self, completions: list[str]) -> list[float]:
        self.rows += len(completions)
        return [1.0] * len(completions)

    def metrics(self) -> dict[str, float]:
        return {"rows": self.rows}


@pytest.mark.parametrize("order", [None, [3, 1, 0, 2]])
def test_an_object_is_told_where_a_batch_begins_and_ends(order: list[int] | None) -> None:
    reward = load_reward(Counting(), name="c", scope="group")
    for _ in range(2):
        assert scored([reward], batch(4), order).metrics["rewards/c/rows"] == 4 * SIZE
    with pytest.raises(UserError, match="reward 'c' raised ValueError: one group only"):
        scored([reward], batch(1), order and [0])


def test_covered_is_the_measure_of_the_union() -> None:
    draw = random.Random(3)
    for _ in range(200):
        spans = [(a, a + draw.randrange(6)) for a in (draw.randrange(30) for _ in range(draw.randrange(6)))]
        until = draw.randrange(40)
        points = {p for a, b in spans for p in range(a, b) if p < until}
        assert covered([(float(a), float(b)) for a, b in spans], float(until)) == len(points)


# --- vLLM's steps -----------------------------------------------------------------------------------------------------


class FakeLLM:
    """Requests end in the order of `ending`, by the numbers that a counter gave them."""

    def __init__(self, ending: list[int], first: int = 17, inner: Callable[[int], str] = "{}-ab12".format) -> None:
        self.ending, self.first, self.inner = ending, first, inner
        self.llm_engine = self
        self.left: list[int] = []

    def enqueue(self, prompts: list, params: list, *, lora_request: Any, use_tqdm: bool) -> list[str]:
        self.left = list(self.ending)
        return [self.inner(self.first + i) for i in range(len(prompts))]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> Iterator[Any]:
        name = str(self.first + self.left.pop(0))
        return iter([SimpleNamespace(request_id="x", finished=False), SimpleNamespace(request_id=name, finished=True)])


def stepwise(llm: FakeLLM, count: int) -> tuple[list[int], list[int]]:
    handed: list[tuple[int, Any]] = []
    outputs = generate_stepwise(
        llm, [None] * count, [None] * count, lora_request=None, on_output=lambda *pair: handed.append(pair)
    )
    assert all(outputs[place] is output for place, output in handed)
    return [place for place, _ in handed], [int(output.request_id) - llm.first for output in outputs]


def test_vllm_outputs_are_handed_over_as_they_end() -> None:
    ending = [3, 0, 4, 1, 2]
    assert stepwise(FakeLLM(ending), 5) == (ending, [0, 1, 2, 3, 4])
    assert stepwise(FakeLLM(ending, inner=str), 5) == (ending, [0, 1, 2, 3, 4])
    # Where the names say nothing, all come at the end.
    assert stepwise(FakeLLM(ending, inner=lambda i: f"r{i}"), 5) == ([], [0, 1, 2, 3, 4])


def test_vllm_outputs_under_wrong_names_are_refused() -> None:
    with pytest.raises(RuntimeError, match="names that are not theirs"):
        stepwise(FakeLLM([1, 0], inner=lambda i: f"{35 - i}"), 2)
    with pytest.raises(RuntimeError, match="answered 1 of 2 prompts"):
        stepwise(FakeLLM([1]), 2)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    config = yaml.safe_load(write_place(tmp_path).read_text())
    (tmp_path / "quiet.py").write_text("def low(completions): return [len(set(c.split())) / 3 for c in completions]")
    config["rewards"] = {"reward_funcs": [{"function": "quiet.py:low", "scope": "group"}]}
    server = RunServer(tmp_path)
    found = {}
    for overlap in (True, False):
        config |= {"run_name": f"run-{overlap}", "rewards": {**config["rewards"], "overlap": overlap}}
        path = tmp_path / f"{overlap}.yaml"
        path.write_text(yaml.safe_dump(config))
        code, said = server.run("run", path, no_report=True)
        assert code == 0, said
        found[overlap] = outcome(tmp_path / "runs" / f"run-{overlap}")
        metrics = (tmp_path / "runs" / f"run-{overlap}" / "metrics.jsonl").read_text()
        assert ("perf/hidden_reward_seconds" in metrics) == overlap
    assert found[True] == found[False]


def test_groups_from_before_an_engines_death_are_kept() -> None:
    groups, handed, asked = batch(4), [], []

    class Dies:
        name = "frail"

        def generate(self, prompts: list[Prompt], sampling: Sampling, *, progress: Any, on_group: Any) -> list[Group]:
            asked.append([prompt.index for prompt in prompts])
            made = [replace(groups[prompt.index]) for prompt in prompts]
            for number in range(len(prompts))[::-1][:2]:
                on_group(number, made[number])
            if len(asked) == 1:
                raise OSError("gone")
            return made

        def load_adapter(self, version: int) -> None: ...

        def close(self) -> None: ...

    engine: Any = RestartingEngine(Dies(), Dies, warn=lambda text: None)  # type: ignore[arg-type]
    prompts = [group.prompt for group in groups]
    made = engine.generate(prompts, Sampling(), on_group=lambda *pair: handed.append(pair))
    assert asked == [[0, 1, 2, 3], [0, 1]]
    assert [place for place, _ in handed] == [3, 2, 1, 0]
    assert made == groups
    assert all(made[place] is group for place, group in handed)
