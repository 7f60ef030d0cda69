"""Rewards: loading, the call, every fault, time limits, the total, and the built-in functions against oracles."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.rewards.base import BUILT_IN, Reward, completion_text, load_reward
from tandem.rewards.compose import Scores, score
from tandem.rewards.length import length_penalty, overlong_penalty
from tandem.rewards.math_answer import extract_answer, math_answer, plain_number
from tandem.rewards.text_format import boxed_contents, boxed_format, tag_format
from tandem.rewards.time_limit import TimeLimitReached, run_within
from tandem.rl.errors import UserError
from tandem.rl.samples import Completion, Group, Prompt


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def completion(text: str) -> Completion:
    return Completion([ord(c) for c in text], [0.0] * len(text), truncated=False)


def group(*texts: str, prompt: Any = "2+2=", index: int = 0, **columns: Any) -> Group:
    return Group(Prompt(index, [1], prompt, columns), [completion(t) for t in texts])


BATCH = [group("4", "5", index=3, answer="4"), group("six", "7", "8", index=9, answer="7")]


def run(function: Any, groups: list[Group] = BATCH, *, timeout: float = 20.0, **kwargs: Any) -> Scores:
    return score(groups, [load_reward(function, name="mine", kwargs=kwargs)], decode, timeout=timeout)


def fault(function: Any, groups: list[Group] = BATCH, *, timeout: float = 20.0) -> str:
    with pytest.raises(UserError) as caught:
        run(function, groups, timeout=timeout)
    return str(caught.value)


def line_of(function: Any, text: str) -> str:
    """`FILE:LINE` of the line of this function that holds the text."""
    code = function.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    number = next(i for i, line in enumerate(lines[code.co_firstlineno - 1 :], code.co_firstlineno) if text in line)
    return f"{code.co_filename}:{number}"


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a Python file into the working directory; `sys.path` is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name: str, source: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    return write


def load_fault(function: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_reward(function, **options)
    return str(caught.value)


def test_built_ins_load_by_name() -> None:
    for name in BUILT_IN:
        reward = load_reward(name, weight=0.5)
        assert (reward.name, reward.function.__name__, reward.weight) == (name, name, 0.5)


def test_a_file_loads_by_relative_and_absolute_path_with_its_helpers(write) -> None:
    write("sub/helper_of_rewards.py", "FACTOR = 3")
    path = write(
        "sub/mine.py",
        """
        from dataclasses import dataclass
        from helper_of_rewards import FACTOR

        @dataclass
        class Box:
            value: int

        def triple(completions, **columns):
            import later_helper
            return [Box(FACTOR * later_helper.ONE).value for _ in completions]
        """,
    )
    write("sub/later_helper.py", "ONE = 1")
    reward = load_reward("sub/mine.py:triple")
    assert reward.name == "triple"
    assert [s.reward for s in score(BATCH, [reward], decode, timeout=20).rows] == [3.0] * 5
    assert load_reward(f"{path}:triple").function is reward.function, "one file is one module"


def test_two_files_of_one_name_do_not_mix_and_a_changed_file_is_read_again(write) -> None:
    write("a/mine.py", "def f(completions): return [1.0 for _ in completions]")
    b = write("b/mine.py", "def f(completions): return [2.0 for _ in completions]")
    assert load_reward("a/mine.py:f").function(["x"]) == [1.0]
    assert load_reward("b/mine.py:f").function(["x"]) == [2.0]
    stat = b.stat()
    b.write_text("def f(completions): return [3.0 for _ in completions]")  # of the same size, in the same second
    os.utime(b, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert load_reward("b/mine.py:f").function(["x"]) == [3.0]


def test_a_module_of_the_working_directory_loads(write) -> None:
    write("reward_module_here.py", "def f(completions): return [1.0 for _ in completions]")
    assert load_reward("reward_module_here:f").function(["x"]) == [1.0]


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("math_anser", ["math_anser", "did you mean 'math_answer'", "tag_format"]),
        ("mine.py", ["names a file but no function", "mine.py:FUNCTION"]),
        ("mypackage.rewards.f", ["write mypackage.rewards:f"]),
        ("mine.py:", ["incomplete"]),
        ("minee.py:good", ["no file", "minee.py", "did you mean 'mine.py'"]),
        ("mine.py:godo", ["has no 'godo'", "did you mean 'good'"]),
        ("mine.py:NUMBER", ["not callable", "int"]),
        ("mine.py:Judge", ["is a class"]),
        ("syntax.py:f", ["syntax error at", "syntax.py:2", "return ["]),
        ("raises.py:f", ["ZeroDivisionError", "raises.py:3"]),
        ("missing.py:f", ["imports 'no_such_library_anywhere'", "missing.py:2", "install"]),
        ("leaves.py:f", ["SystemExit", "leaves.py:1"]),
        ("no_such_module_anywhere:f", ["no module 'no_such_module_anywhere'"]),
        ("missing:f", ["imports 'no_such_library_anywhere'", "missing.py:2"]),
    ],
)
def test_every_loading_fault_says_what_is_wrong(write, spec: str, parts: list[str]) -> None:
    write("mine.py", "NUMBER = 1\nclass Judge: ...\ndef good(completions): return [0.0 for _ in completions]\n")
    write("syntax.py", "def f(completions):\n    return [\n")
    write("raises.py", "\n\nVALUE = 1 / 0\ndef f(completions): ...\n")
    write("missing.py", "\nimport no_such_library_anywhere\n")
    write("leaves.py", "raise SystemExit(0)\n")
    before = list(sys.path)
    message = load_fault(spec)
    assert all(part in message for part in parts), message
    if spec.endswith(".py:f"):
        assert sys.path == before, "a file that failed leaves its folder out of sys.path"


def test_kwargs_and_weights_are_checked_when_loading() -> None:
    def f(completions, bonus=1.0):
        return [bonus for _ in completions]

    assert [s.reward for s in run(f, bonus=2.5).rows] == [2.5] * 5
    assert "did you mean 'bonus'" in load_fault(f, kwargs={"bonsu": 1})
    assert "'completions'" in load_fault(f, kwargs={"completions": []})
    assert "did you mean 'boxed_only'" in load_fault("math_answer", kwargs={"boxed": True})
    assert load_reward("math_answer", kwargs={"boxed_only": True, "answer": ["4"]}).kwargs["boxed_only"]
    assert "weight" in load_fault(f, weight=math.nan)
    assert "weight" in load_fault(f, weight="1")


def test_callable_objects_and_partials_work() -> None:
    class Judge:
        def __call__(self, completions, **columns):
            return [1.0 for _ in completions]

    class AsyncJudge:
        __name__ = "judge"

        async def __call__(self, completions, **columns):
            return [0.5 for _ in completions]

    def scaled(completions, scale):
        return [scale for _ in completions]

    assert load_reward(Judge()).name == "Judge"
    assert load_reward(AsyncJudge()).name == "judge"
    rewards = [
        load_reward(Judge()),
        load_reward(AsyncJudge()),
        load_reward(functools.partial(scaled, scale=2.0), name="p"),
    ]
    assert score(BATCH, rewards, decode, timeout=20).rows[0].rewards == {"Judge": 1.0, "judge": 0.5, "p": 2.0}


# --- arguments and results -------------------------------------------------------------------------------------------


def test_a_reward_receives_what_trl_gives_it() -> None:
    seen: dict[str, Any] = {}

    def f(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [1.0] * len(prompts)

    groups = [group("a", "b", answer="x", level=1), group("c", prompt="hi", index=1, answer="y", hint=None)]
    score(groups, [load_reward(f, kwargs={"level": 9})], decode, timeout=20, global_step=7, max_steps=30)
    assert seen["prompts"] == ["2+2=", "2+2=", "hi"]
    assert seen["completions"] == ["a", "b", "c"]
    assert seen["completion_ids"] == [[97], [98], [99]]
    assert seen["answer"] == ["x", "x", "y"]
    assert seen["hint"] == [None, None, None], "a column that only some rows have is None elsewhere"
    assert seen["level"] == 9, "the config's kwargs win over a column"
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (7, 30)
    assert callable(seen["log_extra"])
    assert callable(seen["log_metric"])
    assert seen["environments"] is None


def test_conversational_rows_get_message_lists_and_mixed_batches_both() -> None:
    seen: list[Any] = []
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]

    def f(prompts, completions):
        seen.extend([prompts, completions])
        return [0.0] * len(prompts)

    run(f, [group("hello", prompt=chat), group("plain")])
    assert seen == [[chat, "2+2="], [[{"role": "assistant", "content": "hello"}], "plain"]]


def test_only_accepted_arguments_are_passed_and_a_missing_one_is_named() -> None:
    def wants_two(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def wants_more(completions, anwser):
        return [0.0 for _ in completions]

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return 1.0

    assert [s.reward for s in run(wants_two).rows] == [1.0, 0.0, 0.0, 1.0, 0.0]
    message = fault(wants_more)
    assert "needs an argument 'anwser'" in message
    assert "did you mean 'answer'" in message
    assert "verl" in fault(compute_score)


def test_a_function_for_one_completion_is_told_that_it_gets_a_list() -> None:
    def single(completion, answer):
        return float(completion == answer)

    def single_prompt(prompt, completions):
        return [0.0 for _ in completions]

    assert "write completions: a reward gets a list" in fault(single)
    assert "write prompts: a reward gets a list" in fault(single_prompt)


def test_a_function_that_takes_messages_for_texts_is_told_where_the_text_is() -> None:
    def words(completions):
        return [float(len(c.split())) for c in completions]

    def matches(completions, **columns):
        return [float(bool(re.match("a", c))) for c in completions]

    chat = [group("hello", prompt=[{"role": "user", "content": "2+2="}])]
    for f in (words, matches):
        with pytest.raises(UserError, match=r"its text is completion\[0\]"):
            run(f, chat)

    def broken(completions):
        return [[].split() for _ in completions]

    assert "completion[0]" not in fault(broken), "plain completions are texts"


def test_a_reward_cannot_change_what_the_next_one_sees() -> None:
    def vandal(prompts, completions, completion_ids, tests, state):
        for argument in (prompts, completions, completion_ids):
            argument[0].clear() if isinstance(argument[0], list) else None
            argument.reverse()
        tests[0]["cases"].append("added")
        state["seen"] = True
        return [0.0] * len(tests)

    seen: dict[str, Any] = {}

    def witness(prompts, completions, completion_ids, tests, state):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, tests=tests, state=state)
        return [0.0] * len(tests)

    state: dict[str, Any] = {}
    chat = [{"role": "user", "content": "q"}]
    groups = [group("a", "b", prompt=chat, tests={"cases": [1, 2]})]
    rewards = [load_reward(vandal, kwargs={"state": state}), load_reward(witness, kwargs={"state": state})]
    rows = score(groups, rewards, decode, timeout=20).rows
    assert seen["prompts"] == [chat, chat]
    assert [completion_text(c) for c in seen["completions"]] == ["a", "b"]
    assert seen["ids"] == [[97], [98]]
    assert seen["tests"] == [{"cases": [1, 2]}] * 2
    assert seen["state"] == {}
    assert rows[0].prompt.prompt == [{"role": "user", "content": "q"}]
    assert rows[0].completion.ids == [97]
    assert rows[0].prompt.columns == {"tests": {"cases": [1, 2]}}


def test_numbers_of_all_kinds_are_taken() -> None:
    torch = pytest.importorskip("torch")
    values = [True, np.float32(0.5), torch.tensor(2.0), 3, np.int64(4)]
    assert [s.reward for s in run(lambda completions: values).rows] == [1.0, 0.5, 2.0, 3.0, 4.0]
    for whole in (tuple(range(5)), np.arange(5.0), torch.arange(5)):
        rewards = [s.reward for s in run(lambda completions, whole=whole: whole).rows]
        assert rewards == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert all(type(r) is float for r in rewards)


def test_totals_rows_metrics_and_extras() -> None:
    def graded(completions, log_extra, log_metric):
        log_extra("length", [len(c) for c in completions])
        log_metric("share", 1.0)
        log_metric("share", 0.0)
        log_metric("undefined", math.nan)
        return [None, 1.0, 2.0, 3.0, 6.0]

    rewards = [load_reward(graded, weight=2.0), load_reward(lambda completions: [1.0] * 5, name="one", weight=-0.5)]
    scores = score(BATCH, rewards, decode, timeout=20)
    assert [s.reward for s in scores.rows] == [-0.5, 1.5, 3.5, 5.5, 11.5]
    assert [s.text for s in scores.rows] == ["4", "5", "six", "7", "8"]
    assert [s.group for s in scores.rows] == [0, 0, 1, 1, 1]
    assert [s.prompt.index for s in scores.rows] == [3, 3, 9, 9, 9]
    assert scores.rows[0].rewards == {"graded": None, "one": 1.0}
    assert scores.metrics == {
        "share": 0.5,
        "rewards/graded/mean": 3.0,
        "rewards/graded/std": pytest.approx(math.sqrt(14 / 3)),
        "rewards/one/mean": 1.0,
        "rewards/one/std": 0.0,
    }
    assert scores.extras == {"length": [1, 1, 3, 1, 1]}
    assert [row.extra for row in scores.rows] == [{"length": n} for n in (1, 1, 3, 1, 1)]
    assert set(scores.seconds) == {"graded", "one"}
    assert all(0 <= s < 5 for s in scores.seconds.values())


def test_what_is_logged_of_a_row_can_be_kept_as_text_or_number() -> None:
    def f(completions, log_extra):
        log_extra("found", [np.float32(0.5), None, [1, 2], "x", np.bool_(True)])
        return [0.0 for _ in completions]

    assert [row.extra["found"] for row in run(f).rows] == [0.5, None, "[1, 2]", "x", True]


def test_an_empty_batch_calls_nothing() -> None:
    assert run(lambda completions: 1 / 0, []) == Scores()


# --- faults ----------------------------------------------------------------------------------------------------------


def test_no_reward_and_equal_names_are_refused() -> None:
    reward = Reward("twin", lambda completions: [1.0] * len(completions))
    with pytest.raises(UserError, match="no reward function"):
        score(BATCH, [], decode, timeout=1)
    with pytest.raises(UserError, match="two reward functions are named 'twin'"):
        score(BATCH, [reward, reward], decode, timeout=1)


def raising(completions):
    def helper():
        return json.loads("{")  # the library raises, this line is the user's

    return helper()


async def raising_later(completions):
    await asyncio.sleep(0)
    raise KeyError("gone")


def leaving(completions):
    sys.exit(3)


@pytest.mark.parametrize(
    ("function", "what", "line"),
    [
        (raising, "JSONDecodeError", 'json.loads("{")'),
        (raising_later, "KeyError: 'gone'", 'raise KeyError("gone")'),
        (leaving, "SystemExit: 3", "sys.exit(3)"),
    ],
)
def test_an_exception_is_reported_with_name_and_line(function: Any, what: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        run(function)
    message = str(caught.value)
    assert "'mine' raised" in message
    assert what in message
    assert line_of(function, line) in message
    assert caught.value.fix
    assert caught.value.__cause__ is not None, "the traceback stays available"


@pytest.mark.parametrize(
    ("result", "parts"),
    [
        (None, ["returned None", "return statement is missing"]),
        (1.0, ["returned float, not a list"]),
        ({0: 1.0}, ["returned dict, not a list"]),
        ("01234", ["returned str, not a list"]),
        ((x for x in range(5)), ["returned generator, not a list"]),
        (np.zeros((5, 1)), ["returned ndarray, not a list"]),
        ([1.0] * 4, ["4 values for 5 completions"]),
        ([], ["0 values for 5 completions"]),
        ([1, 1, "high", 1, 1], ["'high' (str) for row 2", "prompt 9", "'six'"]),
        ([1, 1, 1, [1], 1], ["[1] (list) for row 3", "'7'"]),
        ([1, 1, 1, np.ones(1), 1], ["(ndarray) for row 3"]),
        ([1, 1j, 1, 1, 1], ["1j (complex) for row 1"]),
        ([1, math.nan, 1, 1, 1], ["returned nan for row 1", "prompt 3", "'2+2='", "'5'"]),
        ([1, 1, 1, 1, -math.inf], ["returned -inf for row 4"]),
        ([np.float32("nan"), 1, 1, 1, 1], ["returned nan for row 0"]),
        ([10**400, 1, 1, 1, 1], ["returned inf for row 0"]),
        ([1, None, 1, 1, 1], ["no reward applies to row 1", "'mine' returned None", "prompt 3", "'5'"]),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_wrong_results_are_refused(result: Any, parts: list[str], kind: str) -> None:
    async def later(completions):
        return result

    message = fault((lambda completions: result) if kind == "sync" else later)
    assert all(part in message for part in [*parts, "Fix:"]), message
    assert "mine" in message


def test_an_infinite_total_is_refused() -> None:
    rewards = [load_reward(lambda completions: [1e308] * 5, name="big", weight=10.0)]
    with pytest.raises(UserError, match="weighted total of row 0"):
        score(BATCH, rewards, decode, timeout=5)


def test_long_texts_are_shortened_in_messages() -> None:
    message = fault(lambda completions: [math.nan], [group("c" * 100_000, prompt="p" * 100_000)])
    assert len(message) < 1500


def test_wrong_logging_calls_are_faults_of_the_reward() -> None:
    def extra(completions, log_extra):
        log_extra("note", ["only one"])
        return [0.0] * len(completions)

    def metric(completions, log_metric):
        log_metric("note", "high")
        return [0.0] * len(completions)

    assert "1 values for 5 completions" in fault(extra)
    assert "'high', which is no number" in fault(metric)


# --- time limits -----------------------------------------------------------------------------------------------------


def spinning(completions):
    while True:
        pass


def sleeping(completions):
    time.sleep(1000)  # here it hangs


def stubborn(completions):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(1000)


def swallowing(completions):
    for _ in range(2):
        try:
            time.sleep(1000)
        except BaseException:  # noqa: BLE001  what such functions do
            continue
    time.sleep(1000)


def waiting(completions):
    threading.Event().wait()


async def never(completions):
    await asyncio.sleep(1000)


async def blocking(completions):
    time.sleep(5)


@pytest.mark.parametrize("function", [spinning, sleeping, stubborn, swallowing, waiting, never])
def test_a_hanging_reward_is_interrupted(function: Any) -> None:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGURG, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)}
    start = time.perf_counter()
    message = fault(function, timeout=0.2)
    assert 0.2 <= time.perf_counter() - start < 5
    assert "'mine' did not finish within 0.2 seconds for 5 completions" in message
    assert "rewards.timeout" in message
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    if function is sleeping:
        assert line_of(sleeping, "time.sleep") in message
    assert run(lambda completions: [1.0] * 5).rows[0].reward == 1.0, "the next call works"


def test_an_async_reward_that_blocks_its_loop_is_named_and_the_next_one_works() -> None:
    async def fine(completions):
        return [1.0] * len(completions)

    message = fault(blocking, timeout=0.1)
    assert line_of(blocking, "time.sleep") in message
    assert "not awaited" in message
    assert run(fine).rows[0].reward == 1.0


@pytest.mark.parametrize("function", [spinning, never])
def test_outside_the_main_thread_time_limits_hold_too(function: Any) -> None:
    # `spinning` is left behind in its daemon thread and would slow the other tests, so it runs in a process of its own.
    source = textwrap.dedent(inspect_source(function)) + textwrap.dedent(
        f"""
        import threading
        from tandem.rewards.base import load_reward
        from tandem.rewards.compose import score
        from tandem.rl.errors import UserError
        from tandem.rl.samples import Completion, Group, Prompt
        def work():
            try:
                score([Group(Prompt(0, [1], "p"), [Completion([1], [0.0], False)])], [load_reward({function.__name__})],
                      str, timeout=0.2)
            except UserError as error:
                print(error)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", "import asyncio\n" + source], capture_output=True, text=True, timeout=30, check=True
    )
    assert "did not finish within 0.2 seconds" in done.stdout


def inspect_source(function: Any) -> str:
    import inspect

    return inspect.getsource(function)


def test_an_interrupted_function_that_answers_after_all_is_still_late() -> None:
    def swallows():
        try:
            time.sleep(1000)
        except BaseException:  # noqa: BLE001  what such functions do
            return "partial"

    def renames():
        try:
            time.sleep(1000)
        except BaseException as error:
            raise ValueError("other") from error

    for function in (swallows, renames):
        with pytest.raises(TimeLimitReached):
            run_within(0.05, function)


def test_the_edge_of_the_limit_leaks_nothing() -> None:
    """Functions that end just when their time does: either result, but never an exception after the call."""
    handler, interval = signal.getsignal(signal.SIGURG), sys.getswitchinterval()
    ended = {"in time": 0, "late": 0}
    length, jitter = 0.002, random.Random(0)
    sys.setswitchinterval(1e-4)  # else the watchdog waits 5 ms for its turn
    try:
        for _ in range(400):
            until = time.perf_counter() + length + jitter.uniform(-1e-4, 1e-4)

            def spin(until=until):
                while time.perf_counter() < until:
                    pass
                return 1

            try:
                assert run_within(0.002, spin) == 1
                ended["in time"] += 1
                length += 1e-4  # walk to the edge, wherever this machine has it
            except TimeLimitReached:
                ended["late"] += 1
                length -= 1e-4
            for _ in range(50):
                math.sqrt(2.0)  # bytecode in which a stray exception would surface
    finally:
        sys.setswitchinterval(interval)
    assert min(ended.values()) > 10, f"the race was not tried: {ended}"
    assert signal.getsignal(signal.SIGURG) is handler


def test_a_signal_after_the_function_has_returned_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog is made to fire while the call is being wound up, which is the edge of the edge."""
    sent: list[int] = []
    kill = signal.pthread_kill

    class SlowToSet(threading.Event):
        def set(self) -> None:
            time.sleep(0.2)
            super().set()

    def counting_kill(thread: int, signum: int) -> None:
        sent.append(signum)
        kill(thread, signum)

    def function() -> str:
        time.sleep(0.05)
        return "in time"

    monkeypatch.setattr(signal, "pthread_kill", counting_kill)
    monkeypatch.setattr("tandem.rewards.time_limit.threading.Event", SlowToSet)
    assert run_within(0.1, function) == "in time"
    assert sent == [signal.SIGURG]


def test_alarms_belong_to_the_reward() -> None:
    """SIGALRM works inside a reward, with its own handler, and that handler is left as it was."""
    rang: list[int] = []

    def with_alarm(completions):
        previous = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        deadline = time.perf_counter() + 5
        while not rang and time.perf_counter() < deadline:
            time.sleep(0.01)
        signal.signal(signal.SIGALRM, previous)
        return [1.0] * len(completions)

    assert run(with_alarm).rows[0].reward == 1.0
    assert rang == [1]


def test_signals_in_use_are_left_alone() -> None:
    """Where the application has taken SIGURG and SIGUSR1, the time limit works by another one."""
    got: list[int] = []
    before = [signal.signal(s, lambda n, _: got.append(n)) for s in (signal.SIGURG, signal.SIGUSR1)]
    try:

        def hang():
            signal.raise_signal(signal.SIGURG)
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(1000)

        with pytest.raises(TimeLimitReached):
            run_within(0.1, hang)
        assert got == [signal.SIGURG, signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGURG, before[0])
        signal.signal(signal.SIGUSR1, before[1])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises even where the test process was started with SIGINT ignored, as in a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_keyboard_interrupt_passes_through(kind: str) -> None:
    def interrupt(completions):
        signal.raise_signal(signal.SIGINT)
        time.sleep(5)

    async def hang(completions):
        threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)).start()
        await asyncio.sleep(1000)

    handler = signal.getsignal(signal.SIGURG)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run(interrupt if kind == "sync" else hang)
    assert time.perf_counter() - start < 4
    assert signal.getsignal(signal.SIGURG) is handler


# --- async -----------------------------------------------------------------------------------------------------------


def test_async_rewards_are_in_flight_together_and_share_one_loop() -> None:
    """Each waits until the other has started, which cannot end if they run one after the other."""
    started: dict[str, asyncio.Event] = {}
    loops: list[Any] = []

    def make(own: str, other: str):
        async def f(completions):
            loops.append(asyncio.get_running_loop())
            started.setdefault(own, asyncio.Event()).set()
            await started.setdefault(other, asyncio.Event()).wait()
            return [1.0] * len(completions)

        return load_reward(f, name=own)

    for _ in range(2):  # the same loop again: connection pools that belong to it stay usable
        started.clear()
        assert score(BATCH, [make("a", "b"), make("b", "a")], decode, timeout=10).rows[0].reward == 2.0
    assert len(set(map(id, loops))) == 1


def test_async_rewards_work_inside_a_running_loop() -> None:
    async def f(completions):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook() -> float:
        return run(f).rows[0].reward

    assert asyncio.run(notebook()) == 1.0


def test_a_plain_function_around_an_async_one_works() -> None:
    async def inner(completions):
        await asyncio.sleep(0)
        return [0.25] * len(completions)

    assert run(lambda completions: inner(completions)).rows[0].reward == 0.25


def test_a_late_async_reward_is_cancelled_and_the_finished_one_is_not_blamed() -> None:
    cancelled = threading.Event()

    async def late(completions):
        try:
            await asyncio.sleep(1000)
        finally:
            cancelled.set()

    async def quick(completions):
        return [1.0] * len(completions)

    rewards = [load_reward(quick), load_reward(late)]
    with pytest.raises(UserError, match="'late' did not finish"):
        score(BATCH, rewards, decode, timeout=0.1)
    assert cancelled.is_set()


def test_a_reward_that_cancels_itself_is_a_fault() -> None:
    async def f(completions):
        raise asyncio.CancelledError

    assert "raised CancelledError" in fault(f)


# --- built-in: mathematics -------------------------------------------------------------------------------------------


@functools.cache
def parsed(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=5)


def math_verify_says(gold: str, text: str) -> float:
    """The oracle: math-verify itself, without any shortcut."""
    from math_verify import verify

    return float(verify(parsed(f"\\boxed{{{gold}}}"), parsed(text), timeout_seconds=5))


def numbers_as_written() -> list[str]:
    chance = random.Random(1)
    by_hand = (
        "0 -0 7 -7 007 +7 42 42.0 0.5 0.50 -0.5 0.25 1.0 1 0.0 -0.0 100 1,000 1000 1000.0 -1,000 12,345,678 12345678 "
        "0.000001 0.000002 0.0000001 0.0000002 1.0000004 1.0000001 3 3.000001 3.14 3.140 -3.14 10 0.1 "
        "123456.123456 123456.123457 123456.1234561 100000.1 100000.10 1234567.0000001 1234567.0 999999999999999 "
        "12345678901234567890 12345678901234567891"
    )
    written = by_hand.split()
    for _ in range(20):
        whole = str(chance.randrange(-(10 ** chance.randrange(1, 7)), 10 ** chance.randrange(1, 7)))
        written += [whole, f"{whole}.{chance.randrange(10 ** chance.randrange(1, 7))}"]
    return written


def test_the_fast_path_gives_math_verifys_verdict() -> None:
    written = numbers_as_written()
    assert sum(plain_number(w) is not None for w in written) > 60, "the fast path was not tried"
    chance = random.Random(2)
    pairs = [(a, b) for a, b in itertools.product(written[:46], repeat=2) if chance.random() < 0.12]
    pairs += list(itertools.pairwise(written))
    pairs += [(chance.choice(written), chance.choice(written)) for _ in range(60)] + [(w, w) for w in written]
    pairs += [(a, b) for a, b in itertools.permutations(written, 2) if plain_equal(a, b)]
    assert len(pairs) > 300
    for gold, said in pairs:
        text = f"So the answer is \\boxed{{{said}}}."
        assert math_answer([text], answer=[gold]) == [math_verify_says(gold, text)], (gold, said)
        assert math_answer([said], answer=[gold]) == [math_verify_says(gold, said)], (gold, said, "bare")


def plain_equal(a: str, b: str) -> bool:
    return Decimal(a.replace(",", "")) == Decimal(b.replace(",", ""))


MATHEMATICS = [
    (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", 1.0),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", 0.0),
    (r"2\sqrt{3}", r"$\boxed{\sqrt{12}}$", 1.0),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{2}}", 0.0),
    ("(1,2)", r"\boxed{(1,2)}", 1.0),
    ("(1,2)", r"\boxed{(2,1)}", 0.0),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
    ("x=5", r"\boxed{5}", 1.0),
    ("42", r"\boxed{42\%}", 1.0),
    ("42", r"\boxed{42 \text{ apples}}", 1.0),
    ("(x+1)^2", r"\boxed{x^2+2x+1}", 1.0),
    ("(x+1)^2", r"\boxed{x^2+2x+2}", 0.0),
    ("1/3", r"\boxed{0.333333}", 1.0),
    ("42", "The answer is 42.", 1.0),
    ("42", "first 41, then 42", 1.0),
    ("42", "first 42, then 41", 0.0),
    ("42", "6 * 7 = 42", 1.0),
    ("1234", "It costs $1,234.", 1.0),
    ("0.5", r"We find $\frac{1}{2}$", 1.0),
    ("7", "no idea", 0.0),
    ("7", "", 0.0),
    ("7", r"\boxed{}", 0.0),
]


@pytest.mark.parametrize(("gold", "text", "expected"), MATHEMATICS)
def test_answers_are_judged_as_by_math_verify(gold: str, text: str, expected: float) -> None:
    assert math_verify_says(gold, text) == expected, "the case itself"
    assert math_answer([text], answer=[gold]) == [expected]


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("He has 6 × 7 = <<6*7=42>>42 left.\n#### 42", r"\boxed{42}", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("#### -5", r"\boxed{5}", 0.0),
        (42, "42", 1.0),
        (42.0, "42", 1.0),
        (1e-07, r"\boxed{0.0000001}", 1.0),
        (np.int64(3), "3", 1.0),
        (r"so it is $\boxed{\frac{3}{4}}$", "0.75", 1.0),
        (r"$\frac{3}{4}$", r"\boxed{3/4}", 1.0),
        (r"\frac{\sqrt{3}}{2}", r"<answer>\frac{\sqrt{3}}{2}</answer>", 1.0),
        ("The answer is 42", r"\boxed{42}", 1.0),
        ("42.", r"\boxed{42}", 1.0),
        ("B", r"\boxed{B}", 1.0),
        ("B", r"\boxed{C}", 0.0),
        ("42", "<think>so 41</think><answer>42</answer>", 1.0),
        ("42", "<think>so 42</think><answer>41</answer>", 0.0),
        ("42", r"<think>\boxed{41}</think> so \boxed{42}", 1.0),
        ("42", r"<think>\boxed{42}</think> so 41", 0.0),
        ("42", r"<think>\boxed{42}</think>", 1.0),
        ("42", r"\boxed{41} no, \boxed{42}", 1.0),
        ("42", r"\boxed{42} no, \boxed{41}", 0.0),
        ("42", r"<answer>\boxed{42}</answer>", 1.0),
        ("42", "<answer>It is 42.</answer>", 1.0),
        ("42", "<answer></answer> 42", 0.0),
    ],
)
def test_answers_are_found_where_they_stand(gold: Any, text: str, expected: float) -> None:
    assert math_answer([text], answer=[gold]) == [expected]


@pytest.mark.parametrize(
    ("gold", "said", "expected"),
    [
        ("listen", "silent", 0.0),
        ("listen", "listen", 1.0),
        ("Listen", "listen", 1.0),
        ("cat", "act", 0.0),
        ("12 cats", "12 acts", 0.0),
        ("ann bob", "bob ann", 0.0),
        (r"\text{listen}", "listen", 1.0),
        (r"\text{listen}", r"\text{silent}", 0.0),
        # Mathematics, lists and units stay what they were.
        ("ab", "ba", 1.0),
        ("xyz", "zyx", 1.0),
        ("lwh", "lhw", 1.0),
        ("abc", "cab", 1.0),
        ("eat + 1", "1 + tea", 1.0),
        ("red, blue", "blue, red", 1.0),
        ("red and blue", "blue and red", 1.0),
        ("June 20", "20 June", 1.0),
        ("5 meters", "5 feet", 1.0),
    ],
)
@pytest.mark.parametrize("form", [r"\boxed{%s}", "<answer>%s</answer>", "The answer is $%s$."])
def test_words_are_no_products_of_their_letters(gold: str, said: str, expected: float, form: str) -> None:
    assert math_answer([form % said], answer=[gold]) == [expected]


def test_only_boxed_answers_count_if_asked() -> None:
    texts = [r"\boxed{42}", "42", "<answer>42</answer>", r"\boxed{42"]
    assert math_answer(texts, answer=[42] * 4, boxed_only=True) == [1.0, 0.0, 0.0, 0.0]
    assert extract_answer("42", boxed_only=True) is None


def test_columns_are_tried_in_order_and_rows_without_an_answer_do_not_count() -> None:
    assert math_answer(["1", "2", "3"], solution=["1", None, None], ground_truth=["9", "2", None]) == [1.0, 1.0, None]
    messages = [[{"role": "assistant", "content": r"\boxed{5}"}]]
    assert math_answer(messages, answer=[5]) == [1.0]


@pytest.mark.parametrize("gold", ["", "  ", "####", math.nan, True, ["42"], {}])
def test_an_unreadable_known_answer_is_refused_with_its_row(gold: Any) -> None:
    with pytest.raises(UserError, match="known answer of row 1"):
        math_answer(["1", "2"], answer=["1", gold])


def test_a_missing_column_is_named_with_those_that_exist() -> None:
    with pytest.raises(UserError) as caught:
        score([group("1", result="1", level=2)], [load_reward("math_answer")], decode, timeout=20)
    message = str(caught.value)
    assert "answer, solution, ground_truth" in message
    assert "result, level" in message
    assert "trainer_state" not in message


def test_mathematics_that_takes_too_long_is_wrong_and_only_slow_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    start = time.perf_counter()
    assert math_answer([r"\boxed{9^{9^{9^9}}}"] * 4, answer=["43"] * 4, seconds=1) == [0.0] * 4
    assert time.perf_counter() - start < 3
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_math_answer_works_outside_the_main_thread() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(math_answer([r"\boxed{\frac{4}{8}}"], answer=["1/2"])))
    thread.start()
    thread.join()
    assert results == [1.0]


# --- built-in: form and length ---------------------------------------------------------------------------------------


def naive_boxes(text: str) -> list[tuple[int, int]]:
    """The oracle: from every box, count braces until they balance. (start, end) of each content, outermost only."""
    found: list[tuple[int, int]] = []
    for start in range(len(text)):
        if not text.startswith("\\boxed{", start):
            continue
        depth, i = 0, start + len("\\boxed")
        while i < len(text):
            if text[i] == "\\":
                i += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                found.append((start + len("\\boxed{"), i))
                break
            i += 1
    return [(a, b) for a, b in found if not any(c < a and b < d for c, d in found)]


PIECES = st.lists(st.sampled_from(["\\boxed{", "{", "}", "1", " ", "\\{", "\\}", "\\frac", "x", "\\boxed", "\n"]))


@settings(max_examples=400, deadline=None)
@given(PIECES.map("".join))
@example("\\boxed{1 \\boxed{2} \\boxed{3}}")
@example("\\boxed{1 \\boxed{2}")
@example("\\boxedx{1}")
def test_boxes_are_found_as_by_counting_braces(text: str) -> None:
    expected = naive_boxes(text)
    assert boxed_contents(text) == [text[a:b] for a, b in expected]
    mentions = len([i for i in range(len(text)) if text.startswith("\\boxed", i) and not text[i + 6 : i + 7].isalpha()])
    once = mentions == 1 and len(expected) == 1 and text[slice(*expected[0])].strip() != ""
    assert boxed_format([text]) == [float(once)]


def test_degenerate_completions_take_linear_time() -> None:
    start = time.perf_counter()
    for text in ("\\boxed{" * 50_000, "<answer>" * 50_000, "<think>" * 50_000, "\\boxed{1}" * 30_000):
        boxed_format([text])
        tag_format([text], partial=True)
        extract_answer(text)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("text", "full", "partial"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        (" <think>\na\n</think>\n\n<answer> b </answer>\n", 1.0, 1.0),
        ("x<think>a</think><answer>b</answer>", 0.0, 2 / 3),
        ("<think>a</think>x<answer>b</answer>", 0.0, 2 / 3),
        ("<think>a</think><answer>b</answer>x", 0.0, 2 / 3),
        ("<answer>b</answer><think>a</think>", 0.0, 2 / 3),
        ("<think>a<answer>b</answer></think>", 0.0, 2 / 3),
        ("<think>a</think><answer> </answer>", 0.0, 1 / 3),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0, 1 / 3),
        ("<think>a</think><answer>b", 0.0, 1 / 3),
        ("</think>a<think><answer>b</answer>", 0.0, 1 / 3),
        ("a</think><answer>b</answer>", 0.0, 1 / 3),
        ("a", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_tags(text: str, full: float, partial: float) -> None:
    assert tag_format([text]) == [full]
    assert tag_format([text], partial=True) == [pytest.approx(partial)]


def test_tag_options() -> None:
    assert tag_format(["a</think><answer>b</answer>"], first_tag_in_prompt=True) == [1.0]
    assert tag_format(["<a.b>x</a.b>", "<aXb>x</aXb>"], tags="a.b") == [1.0, 0.0]
    assert tag_format([[{"role": "assistant", "content": "<s>1</s>"}]], tags=["s"]) == [1.0]
    for tags in ([], ["a", "a"]):
        with pytest.raises(UserError, match="tags"):
            tag_format(["x"], tags=tags)


def test_overlong_penalty_is_that_of_the_paper() -> None:
    reference = pytest.importorskip("trl.rewards").get_soft_overlong_punishment(100, 20)
    ids = [[1] * n for n in range(130)]
    assert overlong_penalty(ids, max_completion_length=100, cache_length=20) == pytest.approx(reference(ids))
    with pytest.raises(UserError, match="cache_length"):
        overlong_penalty(ids, max_completion_length=100, cache_length=0)
    with pytest.raises(UserError, match="needs an argument 'max_completion_length'"):
        score(BATCH, [load_reward("overlong_penalty")], decode, timeout=5)


def test_length_penalty() -> None:
    ids = [[1] * n for n in (0, 10, 11, 60, 1000)]
    values = length_penalty(ids, per_token=0.01, free_tokens=10, max_penalty=0.75)
    assert values == pytest.approx([0.0, 0.0, -0.01, -0.5, -0.75])
    assert math.copysign(1.0, values[0]) == 1.0
    with pytest.raises(UserError, match="per_token"):
        length_penalty(ids, per_token=-1)


# --- TRL's own functions ---------------------------------------------------------------------------------------------


def test_trls_own_rewards_run_unchanged() -> None:
    trl_rewards = pytest.importorskip("trl.rewards")
    chat = [{"role": "user", "content": "half?"}]
    groups = [group(r"<think>x</think>\boxed{\frac{1}{2}}", "2", prompt=chat, solution=r"$\frac{1}{2}$")]
    rewards = [load_reward("trl.rewards:accuracy_reward"), load_reward("trl.rewards:think_format_reward")]
    rewards.append(load_reward(trl_rewards.get_soft_overlong_punishment(100, 20)))
    rows = score(groups, rewards, decode, timeout=20).rows
    assert [list(row.rewards.values()) for row in rows] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_all_rewards_that_trl_ships_give_the_values_that_they_give_there(kind: str) -> None:
    """Called here by the toolkit and there as TRL's trainer does: with lists, by keyword."""
    trl_rewards = pytest.importorskip("trl.rewards")
    texts = [r"<think>\na b c a b c\n</think>\n\\boxed{7}", "<think>seven</think> 7 7 7 7", r"so \boxed{7}", ""]
    chat = [{"role": "user", "content": "7?"}] if kind == "chat" else "7?"
    groups = [group(*texts, prompt=chat, solution="$7$")]
    functions = {
        "accuracy_reward": trl_rewards.accuracy_reward,
        "reasoning_accuracy_reward": trl_rewards.reasoning_accuracy_reward,
        "think_format_reward": trl_rewards.think_format_reward,
        "cosine": trl_rewards.get_cosine_scaled_reward(max_len=40),
        "repetition": trl_rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
        "overlong": trl_rewards.get_soft_overlong_punishment(max_completion_len=30, soft_punish_cache=20),
    }
    if kind == "text":  # the others are made for messages, there as here
        functions = {name: functions[name] for name in ("repetition", "overlong")}
    rewards = [load_reward(function, name=name) for name, function in functions.items()]
    rows = score(groups, rewards, decode, timeout=60).rows
    given = {
        "prompts": [chat] * 4,
        "completions": [[{"role": "assistant", "content": t}] for t in texts] if kind == "chat" else texts,
        "completion_ids": [[ord(c) for c in t] for t in texts],
        "solution": ["$7$"] * 4,
    }
    for name, function in functions.items():
        expected = function(**given, trainer_state=None, log_extra=None, log_metric=None, environments=None)
        assert [row.rewards[name] for row in rows] == expected, name
        assert len(set(expected)) > 1, name


TRL_STYLE = """
import asyncio
import re

def by_length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def by_format(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think>", content) else 0.0 for content in contents]

def by_answer(prompts, completions, ground_truth, **kwargs):
    found = [re.search(r"boxed\\{(.*?)\\}", completion[0]["content"]) for completion in completions]
    return [1.0 if match and match.group(1) == truth else 0.0 for match, truth in zip(found, ground_truth)]

def by_task(prompts, completions, task, **kwargs):
    return [None if t != "math" else 0.25 for t in task]

async def later(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(prompts))] * len(completions)

def by_progress(completions, trainer_state=None, log_extra=None, log_metric=None, **kwargs):
    log_extra("seen", [c[0]["content"][:2] for c in completions])
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    return [trainer_state.global_step * 1.0 for _ in completions]
"""


def test_functions_written_as_trls_documentation_shows_run_unchanged(tmp_path: Path) -> None:
    (tmp_path / "trl_style.py").write_text(TRL_STYLE)
    names = ("by_length", "by_format", "by_answer", "by_task", "later", "by_progress")
    rewards = [load_reward(f"{tmp_path}/trl_style.py:{name}") for name in names]
    chat = [{"role": "user", "content": "7?"}]
    good = r"<think>x</think>\boxed{7}"
    groups = [
        group(good, "no", prompt=chat, ground_truth="7", task="math"),
        group("7", prompt=chat, index=1, ground_truth="7", task="code"),
    ]
    scores = score(groups, rewards, decode, timeout=20, global_step=3, max_steps=12)
    assert [list(row.rewards.values()) for row in scores.rows] == [
        [float(len(good)), 1.0, 1.0, 0.25, 3.0, 3.0],
        [2.0, 0.0, 0.0, 0.25, 3.0, 3.0],
        [1.0, 0.0, 0.0, None, 3.0, 3.0],
    ]
    assert scores.rows[2].reward == 7.0, "a reward that does not apply is left out of the sum, as in TRL"
    assert scores.extras == {"seen": ["<t", "no", "7"]}
    assert scores.metrics["progress"] == 0.25


def test_importing_rewards_loads_neither_torch_nor_sympy() -> None:
    source = (
        "import sys, tandem.rewards.compose, tandem.rewards.math_answer, tandem.rewards.length\n"
        "tandem.rewards.math_answer.math_answer(['42'], answer=['42'])\n"
        "print([m for m in ('torch', 'sympy', 'math_verify', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
