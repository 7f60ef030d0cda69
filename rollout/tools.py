"""Tools: typed Python functions that the model may call, their schema, and what a call gives back.

A tool's schema comes from its type hints and its docstring (transformers' `get_json_schema`) and reaches the model
through the chat template. Nothing that the model writes ends a run: an unknown name, arguments that do not fit and
whatever the function raises go back to the model as `{"error": …}`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem.rl.errors import UserError, cause
from tandem.rollout.tool_calls import BadCall, ToolCall
from tandem.rollout.workers import resolved


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: what the model calls it by. schema: what the chat template shows of it.
    """

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]


@dataclass(frozen=True)
class ToolResult:
    """The answer to one call: a message for the model, and whether it says that the call failed."""

    message: dict[str, Any]
    failed: bool


def tool_of(function: Callable[..., Any]) -> Tool:
    """A tool for a function or a bound method, sync or async.

    Raises:
        UserError: no name, a parameter without type or description, or a docstring that cannot be read.
    """
    from transformers.utils import get_json_schema

    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise UserError(f"a tool must be a named function, and {function!r} is none", fix="define it with def")
    try:
        schema = dict(get_json_schema(function))
    except Exception as error:
        raise UserError(
            f"the tool {name!r} cannot be described to the model: {cause(error)}",
            reason="the model sees a tool by its type hints and its docstring",
            fix="give every parameter a type, and a docstring of the form: what it does, then `Args:` with a line "
            "`name: what it means` per parameter",
        ) from error
    return Tool(name, function, schema)


def tools_of(functions: Iterable[Callable[..., Any]]) -> dict[str, Tool]:
    """Tools by name. Raises UserError where two have one name, or one cannot be described."""
    tools: dict[str, Tool] = {}
    for function in functions:
        tool = tool_of(function)
        if tool.name in tools:
            raise UserError(f"two tools are named {tool.name!r}", fix="rename one of the functions")
        tools[tool.name] = tool
    return tools


def run_calls(calls: Iterable[ToolCall | BadCall], tools: dict[str, Tool]) -> list[ToolResult]:
    """Run a turn's calls one after the other. Never raises for what a call or a tool does."""
    return [_run(call, tools) for call in calls]


def failed_call(call: ToolCall | BadCall, problem: str) -> ToolResult:
    """The answer to a call that came to nothing."""
    name = call.name or "unknown"
    return ToolResult(_message(call, name, json.dumps({"error": problem}, ensure_ascii=False)), failed=True)


def _run(call: ToolCall | BadCall, tools: dict[str, Tool]) -> ToolResult:
    if isinstance(call, BadCall):
        return failed_call(call, call.problem)
    tool = tools.get(call.name)
    if tool is None:
        return failed_call(call, f"there is no tool {call.name!r}; there are {', '.join(tools) or 'none'}")
    try:
        inspect.signature(tool.function).bind(**call.arguments)
    except TypeError as error:
        return failed_call(call, f"{call.name}: {error}; it takes {', '.join(_parameters(tool)) or 'no arguments'}")
    try:
        result = resolved(tool.function(**call.arguments))
        return ToolResult(_message(call, call.name, _content(result)), failed=False)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a tool can raise anything, and the model is to see it
        return failed_call(call, f"{call.name}: {cause(error)}")


def _message(call: ToolCall | BadCall, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": content, "tool_call_id": call.id}


def _parameters(tool: Tool) -> list[str]:
    return list(tool.schema["function"].get("parameters", {}).get("properties", {}))


def text_of(value: Any) -> str | None:
    """A text, or the joined text parts of a list, as TRL's multimodal tools return them; None: it is neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return "".join(str(p.get("text", "")) for p in value)
    return None


def _content(result: Any) -> str:
    text = None if result == [] else text_of(result)
    return str(result) if text is None else text
