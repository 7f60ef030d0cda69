"""Matching, schemas, patterns, penalties, combinations, verl's functions, quantities: against independent oracles."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.rewards.base import BUILT_IN, MAKERS, load_reward
from tandem.rewards.combine import gate, group_ranks, minimum
from tandem.rewards.completion import final_text
from tandem.rewards.compose import Scores, score
from tandem.rewards.json_schema import json_schema
from tandem.rewards.math_answer import math_answer
from tandem.rewards.quantities import close, last_number, unit_of
from tandem.rewards.regex import regex_match
from tandem.rewards.repetition import SCRIPTS, language_penalty, repeated_share, repetition_penalty
from tandem.rewards.text_match import common_length, exact_match, fuzzy_match, similarity
from tandem.rl import inputs
from tandem.rl.config_file import load_config
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.reward_config import RewardsConfig
from tandem.rl.samples import Completion, Group, Prompt

needs_jsonschema = pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="jsonschema is not there")


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def group(*texts: str, prompt: Any = "p", index: int = 0, **columns: Any) -> Group:
    return Group(Prompt(index, [1], prompt, columns), [Completion([ord(c) for c in t], [], False) for t in texts])


def scores_of(groups: list[Group], *entries: dict[str, Any], **options: Any) -> Scores:
    return score(groups, [load_reward(**e) for e in entries], decode, timeout=10, **options)


def values(scores: Scores, name: str) -> list[float | None]:
    return [row.rewards[name] for row in scores.rows]


# Text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Paris ", "Paris"),
        ("<think>a</think> b", "b"),
        ("<think>a</think>", "<think>a</think>"),
        ("<answer>x</answer> so <answer> y </answer>.", "y"),
        ("<think><answer>no</answer></think> yes", "no"),
        ("</answer> <answer>", "</answer> <answer>"),
        ("", ""),
    ],
)
def test_the_answer_is_what_stands_at_the_end(text: str, expected: str) -> None:
    assert final_text(text) == expected


@pytest.mark.parametrize(
    ("gold", "text", "options", "expected"),
    [
        ("Paris", "paris.", {}, 1.0),
        ("Paris", "paris.", {"ignore_case": False}, 0.0),
        ("Paris", "Paris.", {"ignore_punctuation": False}, 0.0),
        ("-5", "5", {}, 0.0),
        ("-5", "It is: (−5).", {}, 0.0),
        ("-5", "(−5).", {}, 1.0),
        ("5", "x = -5", {}, 0.0),
        ("3-4", "3–4", {}, 1.0),
        ("New  York", "<answer>new york</answer>", {}, 1.0),
        ("Paris", "It is Paris", {}, 0.0),
        (["USA", "United States"], "united states", {}, 1.0),
        ("STRASSE", "straße", {}, 1.0),
        ("ﬁne ①", "fine 1", {}, 1.0),
        ("+", "-", {}, 0.0),
        ("+", "+", {}, 1.0),
        (42, "42", {}, 1.0),
        ("3.5", "35", {}, 0.0),
        (None, "x", {}, None),
        ([], "x", {}, None),
    ],
)
def test_exact_match(gold: Any, text: str, options: dict[str, Any], expected: float | None) -> None:
    assert exact_match([text], answer=[gold], **options) == [expected]
    assert exact_match([[{"role": "assistant", "content": text}]], ground_truth=[gold], **options) == [expected]


def test_matching_without_a_column_is_explained() -> None:
    for function in (exact_match, fuzzy_match):
        with pytest.raises(UserError, match="found none of the columns") as caught:
            function(["a"], question=["b"], log_metric=None)
        assert caught.value.reason == "the data set's columns are question"


def slow_common_length(a: str, b: str) -> int:
    @functools.cache
    def length(i: int, j: int) -> int:
        if not i or not j:
            return 0
        if a[i - 1] == b[j - 1]:
            return length(i - 1, j - 1) + 1
        return max(length(i - 1, j), length(i, j - 1))

    return length(len(a), len(b))


def test_common_subsequences_are_those_of_the_textbook() -> None:
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("abcd", k=draw.randrange(30))) for _ in range(2))
        assert common_length(a, b) == common_length(b, a) == slow_common_length(a, b)
        assert similarity(a, a) == 1.0


def test_long_texts_are_compared_in_good_time() -> None:
    draw = random.Random(0)
    a, b = ("".join(draw.choices("abcdefgh ", k=20_000)) for _ in range(2))
    started = time.perf_counter()
    assert 0.4 < similarity(a, b) < 0.9
    assert time.perf_counter() - started < 2.0


def test_fuzzy_match() -> None:
    assert fuzzy_match(["abcd"], answer=["abxd"]) == [0.75]
    assert fuzzy_match(["abcd"], answer=["abxd"], threshold=0.8) == [0.0]
    assert fuzzy_match(["The cat, sat!"], answer=["the cat sat"], unit="words") == [1.0]
    assert fuzzy_match(["cat"], answer=[["dog", "cats"]]) == [6 / 7]
    assert fuzzy_match(["x", ""], answer=[None, "y"]) == [None, 0.0]


# Patterns and schemas


def test_regex_match() -> None:
    assert regex_match(["a1", "1a", "b"], pattern=r"^a\d") == [1.0, 0.0, 0.0]
    assert regex_match([" a1 ", "a1 b"], pattern=r"a\d", full=True) == [1.0, 0.0]
    assert regex_match(["A\nb"], pattern=["a.b", "^b$", "zz"], flags="ism") == [2 / 3]
    with pytest.raises(UserError, match="no regular expression"):
        regex_match(["a"], pattern="(")
    with pytest.raises(UserError, match="no flag 'q'"):
        regex_match(["a"], pattern="a", flags="iq")
    with pytest.raises(UserError, match="pattern is empty"):
        regex_match(["a"], pattern=[])


def test_a_pattern_that_backtracks_without_end_is_interrupted() -> None:
    reward = load_reward("regex_match", kwargs={"pattern": r"(a+)+$"})
    with pytest.raises(UserError, match=r"did not finish within 0\.3 seconds"):
        score([group("a" * 40 + "b")], [reward], decode, timeout=0.3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', 1.0),
        ('<think>{"b"</think>\n{"a": 1}', 1.0),
        ('Here:\n```json\n{"a": 1}\n```\nDone.', 1.0),
        ('```\n{"a": 0}\n```\n```json\n[1,\n```', 0.0),
        ('```python\nx = {}\n```\n```json\n{"a": 1}\n```', 1.0),
        ('```json\n{"a": 1}\n```\n```python title=x\nx = {}\n```\nDone.', 1.0),
        ('So ```json\r\n{"a": 1}\r\n```', 1.0),
        ('```python\n{"a": 1}\n```', 0.0),
        ("3", 1.0),
        ('{"a": 1} trailing', 0.0),
        ("{'a': 1}", 0.0),
        ("[NaN]", 0.0),
        ("[Infinity]", 0.0),
        ('{"a": 1, "a": 2}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 10_000, 0.0),
    ],
)
def test_json_without_a_schema(text: str, expected: float) -> None:
    assert json_schema([text]) == [expected]


PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"minimum": 0}}, "required": ["name"]}


@needs_jsonschema
def test_json_against_a_schema(tmp_path: Path) -> None:
    texts = ['{"name": "Ada"}', '{"name": 3}', '{"age": 3}', '{"name": "Ada", "age": -1}', "no"]
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(PERSON))
    for options in ({"schema": PERSON}, {"schema": json.dumps(PERSON)}, {"schema_file": str(file)}):
        assert json_schema(texts, **options) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert json_schema(texts, schema=PERSON, valid_json=0.25) == [1.0, 0.25, 0.25, 0.25, 0.0]


@needs_jsonschema
def test_a_schema_of_every_row() -> None:
    # As Arrow gives it: every struct has the keys of all rows.
    column = [{"type": "integer", "maxLength": None}, {"type": "string", "maxLength": 2}, None]
    assert json_schema(["1", '"abc"', "x"], schema=column) == [1.0, 0.0, None]


@needs_jsonschema
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"type": "person"}}, "is wrong at"),
        ({"schema": "{"}, "is no JSON"),
        ({"schema": "3"}, "not a mapping"),
        ({"schema_file": "/nowhere.json"}, "cannot read schema_file"),
        ({"schema": {"$ref": "http://127.0.0.1:9/never-fetched"}}, "cannot be applied"),
    ],
)
def test_wrong_schemas_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        json_schema(['{"a": 1}'], **options)


def test_without_the_package_a_schema_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(UserError, match="needs the package jsonschema"):
        json_schema(["no JSON at all"], schema={"title": "not seen before"})


# Penalties


def test_repeated_shares_are_those_of_a_count() -> None:
    draw = random.Random(0)
    for _ in range(200):
        words, n = draw.choices("abc", k=draw.randrange(20)), draw.randrange(1, 5)
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen = [grams[i] in grams[:i] for i in range(len(grams))]
        assert repeated_share(words, n) == pytest.approx(sum(seen) / len(seen) if seen else 0.0)


def test_repetition_penalty() -> None:
    assert repetition_penalty(["one two three four", "", "a"], n=3) == [0.0, 0.0, 0.0]
    assert repetition_penalty(["I am. " * 100], n=2, max_penalty=2.0)[0] == pytest.approx(-2 * (1 - 2 / 199))
    with pytest.raises(UserError, match="n is 0"):
        repetition_penalty(["a"], n=0)


def test_language_penalty() -> None:
    chat = [{"role": "system", "content": "Ответ"}, {"role": "user", "content": "What?"}]
    assert language_penalty([chat], ["да yes"]) == [0.0]
    assert language_penalty(["What?"], ["да yes"]) == [-0.4]
    assert language_penalty(["What?"], ["ａｂｃ 𝐱 = 12 + ½ é ☺"]) == [0.0]
    assert language_penalty(["2+2"], ["четыре"]) == [0.0]
    assert language_penalty(["x"], ["日本語ひらがなカタカナ"], scripts=["cjk", "hiragana", "katakana"]) == [0.0]
    assert language_penalty(["x"] * 2, ["abcdefghi α", "abcd α"], free_share=0.1, max_penalty=0.5) == [0.0, -0.1]
    with pytest.raises(UserError, match="no script 'english'"):
        language_penalty(["x"], ["y"], scripts="english")


def test_scripts_are_those_of_unicode_letters() -> None:
    samples = "aяα日あア가אاकกሀბա"
    names = "latin cyrillic greek cjk hiragana katakana hangul hebrew arabic devanagari thai ethiopic georgian armenian"
    for letter, script in zip(samples, names.split(), strict=True):
        assert language_penalty(["x"], [letter], scripts=script) == [0.0]
        assert language_penalty(["x"], [letter], scripts="tibetan") == [-1.0]
        assert script.upper() in SCRIPTS


# Quantities


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("It took 5 hours.", "5", "hour"),
        (r"5\,\mathrm{cm}^2", "5", "cm^2"),
        (r"$12 \text{ km/h}$", "12", "km/h"),
        (r"\frac{1}{2} \text{ cm}", None, "cm"),
        ("1,234.5 kg", "1,234.5", "kg"),
        ("10\\%", "10", "%"),
        (r"45^\circ", None, "°"),
        ("-3", "-3", ""),
        ("3-4", "4", ""),
        ("x2 then 7", "7", ""),
        ("3 kg of 4 bags", "4", "bag"),
        ("none", None, ""),
        ("9.81 m/s²", "9.81", "m/s^2"),
    ],
)
def test_numbers_and_units(text: str, number: str | None, unit: str) -> None:
    if number is not None or text == "none":
        assert last_number(text) == number
    assert unit_of(text) == unit


@pytest.mark.parametrize(
    ("gold", "text", "options", "expected"),
    [
        (r"5\text{ cm}", r"\boxed{5\,\mathrm{cm}}", {"units": "match"}, 1.0),
        (r"5\text{ cm}", r"\boxed{5\text{ m}}", {"units": "match"}, 0.0),
        (r"5\text{ cm}", r"\boxed{5\text{ m}}", {}, 1.0),
        ("5 cm", r"\boxed{5}", {"units": "match"}, 0.0),
        ("5", r"\boxed{5 cm}", {"units": "match"}, 1.0),
        ("5 hours", "It takes 5 hours.", {"units": "match"}, 1.0),
        ("5 hours", "It takes 5 days.", {"units": "match"}, 0.0),
        ("10 m/s", r"\boxed{10\ \text{m/s}}", {"units": "match"}, 1.0),
        ("10 m/s", r"\boxed{10}", {"units": "match"}, 0.0),
        ("10 m/s", r"\boxed{10}", {}, 1.0),
        ("10 m/s", r"\boxed{11 m/s}", {}, 0.0),
        ("5 cm^2", r"\boxed{5\,\text{cm}^2}", {}, 1.0),
        ("5 cm²", r"\boxed{5 cm²}", {}, 1.0),
        ("9.8 m/s^2", "It is 9.8 m/s^2.", {"units": "match"}, 1.0),
        ("2x", r"\boxed{2y}", {}, 0.0),
        ("2m", r"\boxed{2n}", {}, 0.0),
        ("-3", "The answer is −3", {}, 1.0),
        ("3", "The answer is −3", {"last_number_only": True}, 0.0),
        ("-3", "The answer is −3", {"last_number_only": True}, 1.0),
        ("72", "3 hours, 72 miles", {"last_number_only": True}, 1.0),
        ("3", "3 hours, 72 miles", {"last_number_only": True}, 0.0),
        ("1072", "so 1,072", {"last_number_only": True}, 1.0),
        ("1", r"\boxed{1} or 2", {"last_number_only": True}, 1.0),
        ("1", "no numbers at all", {"last_number_only": True}, 0.0),
        ("100", r"\boxed{101}", {"tolerance": 0.01}, 1.0),
        ("100", r"\boxed{101.01}", {"tolerance": 0.01}, 0.0),
        ("100", r"\boxed{-100}", {"tolerance": 0.5}, 0.0),
        ("3.14159", r"\boxed{\pi}", {"tolerance": 1e-5}, 1.0),
        ("3.14159", r"\boxed{\frac{22}{7}}", {"tolerance": 1e-5}, 0.0),
        ("3.14159", r"\boxed{\frac{22}{7}}", {"tolerance": 1e-3}, 1.0),
        (r"\sqrt{2}", r"\boxed{x = 1.4142}", {"tolerance": 1e-4}, 1.0),
        ("0", r"\boxed{0.001}", {"tolerance": 0.01}, 1.0),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", {}, 1.0),
        (r"\{1, 2\}", r"\boxed{1, 2}", {}, 1.0),
        (r"\{1, 2\}", r"\boxed{\{1, 2, 3\}}", {}, 0.0),
        (r"\{1, 2\}", r"\boxed{\{1, 2.01\}}", {"tolerance": 0.1}, 0.0),
        ("(1, 2)", r"\boxed{(2, 1)}", {}, 0.0),
        ("[1, 2)", r"\boxed{[1, 2)}", {}, 1.0),
        ("[1, 2)", r"\boxed{[1, 2]}", {}, 0.0),
        ("x^2", r"\boxed{x^2}", {"tolerance": 0.1}, 1.0),
        ("5", r"\boxed{10^{10^{10^{10}}}}", {"tolerance": 0.1, "seconds": 1}, 0.0),
    ],
)
def test_math_answers_with_units_sets_and_tolerance(
    gold: str, text: str, options: dict[str, Any], expected: float
) -> None:
    assert math_answer([text], answer=[gold], **options) == [expected]


def test_the_edge_of_the_tolerance() -> None:
    assert close(101, 100, 0.01)
    assert not close(101.0001, 100, 0.01)
    for wrong in ({"tolerance": 1.0}, {"tolerance": -0.1}, {"units": "convert"}):
        with pytest.raises(UserError, match="tolerance is"):
            math_answer(["1"], answer=["1"], **wrong)


# Combinations

A: dict[str, Any] = {"function": lambda completions: [float(len(c)) for c in completions], "name": "a", "weight": 0}
B: dict[str, Any] = {
    "function": lambda completions: [None if "?" in c else float("x" in c) for c in completions],
    "name": "b",
    "weight": 0,
}


def test_a_gate_in_a_batch_keeps_its_parts_in_the_log() -> None:
    groups = [group("x", "yy"), group("x?", "xyz")]
    scores = scores_of(
        groups, {"function": "gate", "kwargs": {"first": "b", "then": "a"}}, A, B, on_missing="group_mean"
    )
    assert values(scores, "a") == [1, 2, 2, 3]
    assert values(scores, "b") == [1, 0, None, 1]
    assert values(scores, "gate") == [1, 0, None, 3]
    assert [row.reward for row in scores.rows] == [1, 0, 3, 3]  # parts of weight 0 give the third row no reward
    assert scores.metrics["rewards/missing"] == 1
    assert scores.metrics["rewards/a/mean"] == 2


def test_gates() -> None:
    given = {"f": [1.0, 0.5, None, 1.0], "g": [1.0, 1.0, 0.0, None], "r": [0.7, 0.7, 0.7, 0.7]}
    assert gate(given, first="f", then="r") == [0.7, 0.0, None, 0.7]
    assert gate(given, first="f", then="r", threshold=0.5, closed=-1.0) == [0.7, 0.7, None, 0.7]
    assert gate(given, first=["f", "g"], then="r", closed=-1.0) == [0.7, -1.0, -1.0, None]


def test_minimum() -> None:
    assert minimum({"a": [1, None, None], "b": [2, 3, None]}, of=["a", "b"]) == [1, 3, None]
    with pytest.raises(UserError, match="give a list"):
        minimum({"a": [1]}, of="a")  # type: ignore[arg-type]


def test_ranks_within_groups_are_the_share_of_the_others_that_are_worse() -> None:
    draw = random.Random(0)
    numbers = [draw.randrange(4) for _ in range(40)]
    given = [None if draw.random() < 0.1 else float(draw.randrange(5)) for _ in numbers]
    ranks = group_ranks({"s": given}, numbers, of="s")
    for i, (group_number, value) in enumerate(zip(numbers, given, strict=True)):
        if value is None:
            assert ranks[i] is None
            continue
        others = [v for j, v in enumerate(given) if j != i and numbers[j] == group_number and v is not None]
        beaten = sum((v < value) + 0.5 * (v == value) for v in others)
        assert ranks[i] == pytest.approx(beaten / len(others))
    assert group_ranks({"s": [3.0]}, [0], of="s") == [0.5]
    scores = scores_of([group("a", "bbb"), group("cc", "c")], A, {"function": "group_ranks", "kwargs": {"of": "a"}})
    assert values(scores, "group_ranks") == [0, 1, 1, 0]


def test_a_combination_of_ones_own_and_of_combinations() -> None:
    def spread(rewards_by_name, group_numbers, completions, factor=1.0):
        assert completions == ["x", "yy"]
        assert group_numbers == [0, 0]
        assert set(rewards_by_name) == {"a", "b", "gate"}
        rewards_by_name["a"].clear()  # its own copy
        return [factor * (g or 0) for g in rewards_by_name["gate"]]

    entries = [A, {"function": "gate", "kwargs": {"first": "b", "then": "a"}, "weight": 0}]
    scores = scores_of([group("x", "yy")], *entries, B, {"function": spread, "kwargs": {"factor": 2}})
    assert values(scores, "spread") == [2, 0]
    assert values(scores, "a") == [1, 2]


def test_columns_of_the_names_given_on_request_stay_the_functions_own() -> None:
    def f(completions, group_numbers, reward_timeout):
        return [float(n) + reward_timeout for n in group_numbers]

    assert values(scores_of([group("a", group_numbers=7)], {"function": f}), "f") == [17.0]

    def g(completions, **kwargs):
        assert not {"group_numbers", "reward_timeout", "rewards_by_name"} & set(kwargs)
        return [1.0] * len(completions)

    scores_of([group("a")], {"function": g})


def test_a_combination_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="no reward 'c' to combine") as caught:
        scores_of([group("x")], A, {"function": "gate", "kwargs": {"first": "c", "then": "a"}})
    assert "a" in caught.value.reason


@pytest.mark.parametrize(
    "entry",
    [
        {"function": "gate", "kwargs": {"first": "tag_formt", "then": "math_answer"}},
        {"function": "gate", "kwargs": {"first": ["tag_format", "gate"], "then": "math_answer"}},
        {"function": "minimum", "kwargs": {"of": ["math_answer", "other"]}},
        {"function": "group_ranks", "kwargs": {"of": "other"}},
    ],
)
def test_a_config_that_combines_what_is_not_there_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which is no other entry of reward_funcs"):
        RewardsConfig(reward_funcs=["tag_format", "math_answer", entry])  # type: ignore[list-item]


def test_a_config_with_combinations_is_accepted() -> None:
    funcs = ["tag_format", "f.py:right", {"function": "gate", "kwargs": {"first": "tag_format", "then": "right"}}]
    assert RewardsConfig(reward_funcs=funcs).on_missing == "group_mean"  # type: ignore[arg-type]


def test_rows_without_a_reward_get_their_groups_mean() -> None:
    def known(completions):
        return [None if c == "?" else float(c) for c in completions]

    groups = [group("1", "?", "3"), group("?", "?"), group("5")]
    scores = scores_of(groups, {"function": known}, on_missing="group_mean")
    assert [row.reward for row in scores.rows] == [1, 2, 3, 0, 0, 5]
    assert scores.metrics["rewards/missing"] == 3
    assert values(scores, "known") == [1, None, 3, None, None, 5]
    with pytest.raises(UserError, match="no reward applies to row 1"):
        scores_of(groups, {"function": known})
    with pytest.raises(UserError, match="no reward applies"):
        scores_of([group("?", "?")], {"function": known}, on_missing="group_mean")


class Letters:
    """As little of a tokenizer as scoring needs: an id is a character."""

    def decode(self, ids: list[int], **_options: Any) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("on_missing", ["group_mean", "stop"])
def test_a_run_does_with_rows_without_a_reward_what_its_config_says(
    on_missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "own.py").write_text(
        "def own(completions):\n    return [None if c == '?' else 1.0 for c in completions]"
    )
    (tmp_path / "config.yaml").write_text(
        "model: {model_name_or_path: no/such-model}\ndata: {dataset_name: data.jsonl}\n"
        f"rewards: {{reward_funcs: ['own.py:own'], on_missing: {on_missing}}}\n"
    )
    monkeypatch.setattr(inputs, "load_tokenizer", lambda _model: Letters())
    monkeypatch.setattr(inputs, "_prompts", lambda *_: [])
    judge = inputs.prepare(load_config(tmp_path / "config.yaml"), Console.silent()).judge
    if on_missing == "stop":
        with pytest.raises(UserError, match="no reward applies to row 1"):
            judge([group("x", "?")], 0)
    else:
        scores = judge([group("x", "?")], 0)
        assert [row.reward for row in scores.rows] == [1.0, 1.0]
        assert scores.metrics["rewards/missing"] == 1


def test_files_that_kwargs_name_lie_beside_the_config(tmp_path: Path) -> None:
    for name in ("rubric.txt", "schema.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.yaml").write_text(
        "model: {model_name_or_path: no/such-model}\ndata: {dataset_name: data.jsonl}\nrewards:\n  reward_funcs:\n"
        "    - {function: judge, kwargs: {rubric_file: rubric.txt}}\n"
        "    - {function: json_schema, kwargs: {schema_file: schema.json}}\n"
    )
    judge, schema = load_config(tmp_path / "config.yaml").rewards.reward_funcs
    assert judge.kwargs["rubric_file"] == str(tmp_path / "rubric.txt")
    assert schema.kwargs["schema_file"] == str(tmp_path / "schema.json")


def test_rewards_of_weight_zero_alone_are_still_computed() -> None:
    assert [row.reward for row in scores_of([group("x", "yy")], A).rows] == [0.0, 0.0]


# verl

VERL_ROW = {
    "data_source": "gsm8k",
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train"},
}


def test_verl_functions_run_unchanged() -> None:
    seen: list[tuple[Any, ...]] = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return float(solution_str == ground_truth)

    scores = scores_of([group("4", "5", **VERL_ROW)], {"function": compute_score})
    assert values(scores, "compute_score") == [1.0, 0.0]
    assert seen == [("gsm8k", text, "4", {"split": "train"}) for text in "45"]


def test_verl_functions_get_text_of_messages_and_other_answer_columns() -> None:
    def compute_score(solution_str, ground_truth):
        return solution_str == ground_truth

    chat = [{"role": "user", "content": "q"}]
    for column in ("answer", "solution", "ground_truth"):
        scores = scores_of([group("4", prompt=chat, **{column: "4"})], {"function": compute_score})
        assert values(scores, "compute_score") == [1.0]


def test_verl_functions_that_return_mappings_log_the_rest() -> None:
    def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0, **kwargs):
        return {"score": bonus + 1, "acc": solution_str == ground_truth} if solution_str != "?" else {"score": 0}

    scores = scores_of([group("4", "?", **VERL_ROW)], {"function": compute_score, "kwargs": {"bonus": 2}})
    assert values(scores, "compute_score") == [3.0, 0.0]
    assert scores.extras == {"acc": [True, None]}


def test_async_verl_functions_work() -> None:
    async def compute_score(data_source, solution_str, ground_truth, extra_info):
        return {"score": 0.5}

    assert values(scores_of([group("a", "b", **VERL_ROW)], {"function": compute_score}), "compute_score") == [0.5, 0.5]


def test_async_verl_functions_are_in_flight_together() -> None:
    waiting = 0

    async def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        nonlocal waiting
        waiting += 1
        while waiting < 3:  # one after the other they would wait for ever
            await asyncio.sleep(0.001)
        return float(solution_str)

    scores = scores_of([group("1", "2", "3", **VERL_ROW)], {"function": compute_score})
    assert values(scores, "compute_score") == [1.0, 2.0, 3.0]


def test_verl_functions_of_batches_run_unchanged() -> None:
    """As verl's batch reward manager calls them."""
    seen: list[tuple[Any, ...]] = []

    def compute_score(data_sources, solution_strs, ground_truths, extra_infos, scale=1.0, **kwargs):
        seen.append((data_sources, solution_strs, ground_truths, extra_infos, kwargs))
        pairs = zip(solution_strs, ground_truths, strict=True)
        return [{"score": scale * (text == truth), "length": len(text)} for text, truth in pairs]

    chat = [{"role": "user", "content": "q"}]
    groups = [
        group("4", "55", **VERL_ROW),
        group("6", prompt=chat, **{**VERL_ROW, "reward_model": {"ground_truth": "6"}}),
    ]
    scores = scores_of(groups, {"function": compute_score, "kwargs": {"scale": 2.0}})
    assert values(scores, "compute_score") == [2.0, 0.0, 2.0]
    assert scores.extras == {"length": [1, 2, 1]}
    assert seen == [(["gsm8k"] * 3, ["4", "55", "6"], ["4", "4", "6"], [{"split": "train"}] * 3, {})]

    def short(solution_strs, ground_truths):
        return [0.0]

    with pytest.raises(UserError, match="returned 1 values for 2"):
        scores_of([group("a", "b", **VERL_ROW)], {"function": short})


def test_faults_of_verl_functions_are_explained() -> None:
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return 1 / (solution_str != "4") if solution_str != "{}" else {"acc": 1}

    entry: dict[str, Any] = {"function": compute_score}
    with pytest.raises(UserError, match="needs a data_source"):
        scores_of([group("5", answer="4")], entry)
    assert values(scores_of([group("5", answer="4")], {**entry, "kwargs": {"data_source": "x"}}), "compute_score") == [
        1
    ]
    with pytest.raises(UserError, match="needs a ground_truth, and row 0 has none"):
        scores_of([group("5", data_source="x")], entry)
    with pytest.raises(UserError, match="mapping without 'score'"):
        scores_of([group("{}", **VERL_ROW)], entry)
    with pytest.raises(UserError, match="raised ZeroDivisionError") as caught:
        scores_of([group("4", **VERL_ROW)], entry)
    assert f"{Path(__file__).name}:" in caught.value.reason  # the line in the user's file, not in ours
    with pytest.raises(UserError, match="takes no argument 'bouns'"):
        load_reward(compute_score, kwargs={"bouns": 1})


# All of them


def test_the_docstrings_examples_hold() -> None:
    import doctest
    import importlib

    for module in sorted({*BUILT_IN.values(), "tandem.rewards.completion", "tandem.rewards.quantities"}):
        result = doctest.testmod(importlib.import_module(module))
        assert result.failed == 0, module


def test_importing_the_library_loads_nothing_heavy() -> None:
    modules = sorted({*BUILT_IN.values(), *MAKERS.values()})
    code = (
        f"import sys\nfor m in {modules!r}: __import__(m)\n"
        "print([n for n in ('torch', 'sympy', 'jinja2', 'jsonschema', 'math_verify') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
