"""Tools: schemas, calls in every model's format, and what becomes of bad ones."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest

from tandem.rl.errors import UserError
from tandem.rollout.tool_calls import BadCall, ToolCall, choose_format, format_of, parse_turn
from tandem.rollout.tools import run_calls, tool_of, tools_of
from tandem.rollout.workers import Workers


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


async def slowly(text: str) -> str:
    """Says it later.

    Args:
        text: what to say
    """
    await asyncio.sleep(0.01)
    return f"{text} in {threading.current_thread().name}"


def leave() -> str:
    """Leaves the program."""
    raise SystemExit(3)


TOOLS = tools_of([add, slowly, leave])


def test_schema_names_types_and_descriptions():
    function = tool_of(add).schema["function"]
    assert function["name"] == "add"
    assert function["parameters"]["properties"]["a"] == {"type": "integer", "description": "the first"}
    assert function["parameters"]["required"] == ["a"]


@pytest.mark.parametrize("function", [lambda a: a, len], ids=["lambda", "without types"])
def test_function_that_cannot_be_described_is_refused(function):
    with pytest.raises(UserError, match="tool"):
        tool_of(function)


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(UserError, match="two tools are named 'add'"):
        tools_of([add, add])


def results(*calls):
    return [(r.message["content"], r.failed) for r in run_calls(calls, TOOLS)]


def test_results_are_texts_and_async_tools_share_one_loop():
    first, second = results(ToolCall("slowly", {"text": "a"}), ToolCall("slowly", {"text": "b"}))
    assert first[0].startswith("a in ")
    assert first[0][2:] == second[0][2:]
    assert results(ToolCall("add", {"a": 2, "b": 3})) == [("5", False)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (ToolCall("subtract", {}), "no tool 'subtract'; there are add, slowly, leave"),
        (ToolCall("add", {"b": 1}), "missing a required argument: 'a'; it takes a, b"),
        (ToolCall("add", {"a": 1, "c": 1}), "unexpected keyword argument 'c'"),
        (ToolCall("add", {"a": "x", "b": 1}), "TypeError"),
        (ToolCall("leave", {}), "SystemExit"),
        (BadCall("the call is not valid JSON"), "not valid JSON"),
    ],
    ids=str,
)
def test_bad_calls_become_errors_for_the_model(call, words):
    ((content, failed),) = results(call)
    assert failed
    assert words in json.loads(content)["error"]


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("hermes", 'so <tool_call>\n{"name": "f", "arguments": {"x": 1, "s": "y"}}\n</tool_call>'),
        ("hermes", 'so <tool_call>{"name": "f", "arguments": "{\\"x\\": 1, \\"s\\": \\"y\\"}"}'),
        (
            "hermes",
            '<think>or <tool_call>{"no": 1}</tool_call>?</think><tool_call>{"name":"f","arguments":{"x":1,"s":"y"}}',
        ),
        ("llama3", '{"name": "f", "parameters": {"x": 1, "s": "y"}}'),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"x": 1, "s": "y"}}<|eom_id|>'),
        ("mistral", 'so [TOOL_CALLS][{"name": "f", "arguments": {"x": 1, "s": "y"}, "id": "abcdefghi"}]</s>'),
        ("mistral", 'so [TOOL_CALLS]f[ARGS]{"x": 1, "s": "y"}</s>'),
        ("mistral", 'so [TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1, "s": "y"}'),
    ],
)
def test_calls_are_read(kind, raw):
    turn = parse_turn(raw, "text", kind)
    assert turn.calls == [ToolCall("f", {"x": 1, "s": "y"}, "call00000")]
    assert 'tool_call>{"name' not in turn.content
    assert "TOOL_CALLS" not in turn.content
    (call,) = turn.message()["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"x": 1, "s": "y"}}


@pytest.mark.parametrize("text", ["<s>old</s> new", "<|x|>", "<think>", "<think>a</think>"])
@pytest.mark.parametrize(
    ("kind", "frame"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": %s}</tool_call><|im_end|>'),
        ("llama3", '{"name": "f", "parameters": %s}<|eom_id|>'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": %s}]</s>'),
        ("mistral", "[TOOL_CALLS]f[ARGS]%s</s>"),
    ],
)
def test_arguments_may_hold_what_looks_like_special_tokens(kind, frame, text):
    assert parse_turn(frame % json.dumps({"s": text}), "", kind).calls == [ToolCall("f", {"s": text})]


def test_text_around_calls_is_kept():
    thought = '<think>one of <tool_call>s</think>\nso <tool_call>{"name": "f"}</tool_call>'
    assert parse_turn(thought, "", "hermes").content == "<think>one of <tool_call>s</think>\nso"
    turn = parse_turn('Let me see. <|python_tag|>{"name": "f", "parameters": {}}<|eom_id|>', "", "llama3")
    assert (turn.content, turn.calls) == ("Let me see.", [ToolCall("f", {})])


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("hermes", '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g", "arguments": null}</tool_call>'),
        ("llama3", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'),
        ("mistral", "[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}"),
    ],
)
def test_several_calls_keep_their_order_and_get_ids(kind, raw):
    calls = parse_turn(raw, "", kind).calls
    assert [(c.name, c.id) for c in calls] == [("f", "call00000"), ("g", "call00001")]
    assert all(isinstance(c, ToolCall) for c in calls)


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {</tool_call>'),
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>["f"]</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("llama3", '{"name": "f", "parameters": {'),
        ("llama3", "<|python_tag|>f(1)"),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral", '[TOOL_CALLS][{"name": "f"'),
        ("mistral", "[TOOL_CALLS]f[ARGS]{1}"),
    ],
)
def test_broken_calls_are_kept_with_the_reason(kind, raw):
    turn = parse_turn(raw, "text", kind)
    assert [type(c) for c in turn.calls] == [BadCall]
    assert turn.calls[0].problem
    assert "tool_calls" not in turn.message()


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("hermes", 'The answer is {"name": "f"}.'),
        ("llama3", '{"answer": 4}'),
        ("llama3", "It is {4}."),
        ("llama3", "{4}"),
        ("llama3", '{"name": "Ada", "age": 36}'),
        ("hermes", 'maybe <tool_call>{"name": "f"}</tool_call>, no</think>It is 4.'),
        ("mistral", "No call."),
    ],
)
def test_text_without_calls_has_none(kind, raw):
    turn = parse_turn(raw, "as it was", kind)
    assert (turn.content, turn.calls) == ("as it was", [])


def test_the_format_follows_from_the_template():
    assert format_of("… <tool_call> …") == "hermes"
    assert format_of("[TOOL_CALLS] … <tool_call>") == "mistral"
    assert format_of("message.role == 'ipython' … \"parameters\"") == "llama3"
    assert format_of("<tool_call><function=x>") is None
    assert format_of("<tool_call>f<arg_key>x</arg_key>") is None
    assert choose_format("llama3", "") == "llama3"
    assert choose_format("auto", "tools <tool_call>") == "hermes"
    for template in ("{{ messages }}", "<tool_call>"):
        with pytest.raises(UserError, match="tools"):
            choose_format("auto", template)


# Workers


def test_jobs_run_side_by_side_up_to_the_limit():
    running, most, lock = [0], [0], threading.Lock()

    def work() -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return 7

    workers = Workers(3)
    jobs = {workers.submit(work, 5.0) for _ in range(9)}
    done = set()
    while workers.pending:
        done.update(workers.wait(1.0))
    assert done == jobs
    assert {job.value for job in done} == {7}
    assert most[0] == 3


def test_a_late_job_gives_its_place_to_the_next_and_is_not_heard_again():
    release = threading.Event()
    workers = Workers(1)
    late = workers.submit(lambda: release.wait(10) and "late", 0.05)
    following = workers.submit(lambda: "next", 5.0)
    assert workers.wait(2.0) == [late]
    assert isinstance(late.error, TimeoutError)
    release.set()
    assert workers.wait(2.0) == [following]
    assert following.value == "next"
    time.sleep(0.05)
    assert workers.wait(0.0) == []
    assert late.value is None


def test_waiting_ends_at_its_own_limit_and_errors_are_handed_over():
    workers = Workers(2)
    held = threading.Event()
    workers.submit(held.wait, 5.0)
    started = time.monotonic()
    assert workers.wait(0.05) == []
    assert 0.04 < time.monotonic() - started < 2
    failing = workers.submit(lambda: 1 / 0, 5.0)
    assert workers.wait(2.0) == [failing]
    assert isinstance(failing.error, ZeroDivisionError)
    held.set()
