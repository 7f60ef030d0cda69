"""Tool calls as models write them, by the format of their chat template.

A call that cannot be read is kept as a `BadCall` with what is wrong, which the model is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.rl.errors import UserError

FORMATS = ("hermes", "llama3", "mistral")


@dataclass(frozen=True)
class ToolCall:
    """A call that could be read. `id` is unique within its turn: nine letters and digits, as Mistral wants it."""

    name: str
    arguments: dict[str, Any]
    id: str = "call00000"


@dataclass(frozen=True)
class BadCall:
    """A call that could not be read, `name` being what is known of it, and the reason in words for the model."""

    problem: str
    name: str = ""
    id: str = "call00000"


@dataclass(frozen=True)
class ParsedTurn:
    """An assistant's turn: its text without calls and special tokens, and its calls."""

    content: str
    calls: list[ToolCall | BadCall] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """The turn as a message; calls that could not be read are not in it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if good := [c for c in self.calls if isinstance(c, ToolCall)]:
            message["tool_calls"] = [
                {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": c.arguments}} for c in good
            ]
        return message


def format_of(template: str) -> str | None:
    """The format in which a chat template writes calls; None: it writes none."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    # `<function=` (Qwen3.5) and `<arg_key>` (GLM) mark XML in the same tags, which is another format.
    if "<tool_call>" in template and not any(xml in template for xml in ("<function=", "<arg_key>")):
        return "hermes"
    if "ipython" in template and "parameters" in template:
        return "llama3"
    return None


def choose_format(wanted: str, template: str) -> str:
    """`wanted`, or for "auto" what the template writes.

    Raises:
        UserError: the template writes no calls that are known, or shows the model no tools.
    """
    if wanted != "auto":
        return wanted
    found = format_of(template)
    if found is None or "tools" not in template:
        raise UserError(
            "the chat template knows no tools" if found is None else "the chat template does not show tools",
            reason=f"calls are read in the formats {', '.join(FORMATS)}, and none of them is in it",
            fix="use a model that was trained on tools, give model.chat_template a template that shows `tools`, or "
            "describe them in data.system_prompt and set environment.tool_format",
        )
    return found


def parse_turn(raw: str, text: str, kind: str) -> ParsedTurn:
    """Read a turn.

    Args:
        raw: its text with special tokens, since some formats mark calls by them. text: without.
        kind: one of FORMATS.
    """
    calls, rest = _PARSERS[kind](raw)
    numbered: list[ToolCall | BadCall] = []
    for number, call in enumerate(calls):
        identity = f"call{number:05d}"
        if isinstance(call, ToolCall):
            numbered.append(ToolCall(call.name, call.arguments, identity))
        else:
            numbered.append(BadCall(call.problem, call.name, identity))
    return ParsedTurn(text if rest is None else rest.strip(), numbered)


# The parsers return the calls, and the text around them; None for the text: there was no call in it.
_Calls = tuple[list[ToolCall | BadCall], str | None]
# Reasoning, which the prompt may have begun, or a call; tags of the one inside the other are plain text.
_HERMES = re.compile(
    r"(?P<thought>\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z))"
    r"|<tool_call>(?P<body>.*?)(?:</tool_call>|(?=<tool_call>)|\Z)",
    re.DOTALL,
)
_ARGUMENTS = ("arguments", "parameters")
_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?s>")
_SPECIAL_ENDS = re.compile(rf"\A(?:(?:{_SPECIAL.pattern})\s*)+|(?:(?:{_SPECIAL.pattern})\s*)+\Z")


def _hermes(raw: str) -> _Calls:
    # What a model considers in its reasoning is no call yet.
    bodies = [found["body"] for found in _HERMES.finditer(raw) if found["body"] is not None]
    if not bodies:
        return [], None
    rest = _HERMES.sub(lambda found: found["thought"] or "", raw)
    return [_call(_without_ends(body), "arguments") for body in bodies], _SPECIAL.sub("", rest)


def _without_ends(text: str) -> str:
    """The text without special tokens around it; what looks like one inside is an argument's (`<s>` is HTML, too)."""
    return _SPECIAL_ENDS.sub("", text.strip()).strip()


def _llama3(raw: str) -> _Calls:
    before, marker, after = raw.partition("<|python_tag|>")
    text = _without_ends(after if marker else raw)
    if not (marker or text.startswith("{")):
        return [], None
    values, rest = _values(text)
    # JSON that is no call is an answer; what breaks off on its way to a call is a call.
    is_call = _is_call(values[0]) if values else '"name"' in text
    if not (marker or is_call):
        return [], None
    calls = [_checked(value, "parameters") for value in values]
    if rest.strip(" \n;"):
        calls.append(BadCall(_not_json(rest)))
    return calls, _SPECIAL.sub("", before) if marker else ""


def _is_call(value: Any) -> bool:
    """Whether JSON without a mark is meant as a call: an answer may well be an object that has a name."""
    return isinstance(value, dict) and "name" in value and (len(value) == 1 or not value.keys().isdisjoint(_ARGUMENTS))


def _mistral(raw: str) -> _Calls:
    before, marker, after = raw.partition("[TOOL_CALLS]")
    if not marker:
        return [], None
    body = _without_ends(after)
    if body.startswith("["):
        return _list_of_calls(body), _SPECIAL.sub("", before)
    calls: list[ToolCall | BadCall] = []
    for part in body.split("[TOOL_CALLS]"):
        name, brace, arguments = part.replace("[ARGS]", "", 1).partition("{")
        name = re.sub(r"\[CALL_ID\].*", "", name, flags=re.DOTALL).strip()
        if not brace:
            calls.append(BadCall(_not_json(part), name))
        else:
            calls.append(_with_name(name, brace + arguments))
    return calls, _SPECIAL.sub("", before)


_PARSERS: dict[str, Callable[[str], _Calls]] = {"hermes": _hermes, "llama3": _llama3, "mistral": _mistral}


def _list_of_calls(body: str) -> list[ToolCall | BadCall]:
    try:
        values, _ = json.JSONDecoder().raw_decode(body)
    except ValueError:
        return [BadCall(_not_json(body))]
    return [_checked(value, "arguments") for value in values]


def _with_name(name: str, arguments: str) -> ToolCall | BadCall:
    try:
        value, _ = json.JSONDecoder().raw_decode(arguments)
    except ValueError:
        return BadCall(_not_json(arguments), name)
    return _checked({"name": name, "arguments": value}, "arguments")


def _call(body: str, key: str) -> ToolCall | BadCall:
    try:
        value = json.loads(body)
    except ValueError:
        return BadCall(_not_json(body))
    return _checked(value, key)


def _checked(value: Any, key: str) -> ToolCall | BadCall:
    """A call from its JSON value; the arguments stand under `key`, or under the other name that models use."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return BadCall(f'a call must be an object with "name" and "{key}", not {_shortened(json.dumps(value))}')
    name = value["name"]
    arguments: Any = next((value[k] for k in (key, *_ARGUMENTS) if k in value), {})
    if isinstance(arguments, str):  # some models quote them
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return BadCall(_not_json(arguments), name)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return BadCall(f'"{key}" must be an object, not {_shortened(json.dumps(arguments))}', name)
    return ToolCall(name, arguments)


def _values(text: str) -> tuple[list[Any], str]:
    """JSON values that stand one after the other, with semicolons between, and what follows them."""
    values: list[Any] = []
    decoder, place = json.JSONDecoder(), 0
    while place < len(text):
        if text[place] in " \t\r\n;":
            place += 1
            continue
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError:
            return values, text[place:]
        values.append(value)
    return values, ""


def _not_json(text: str) -> str:
    try:
        json.loads(text)
    except ValueError as error:
        return f"the call is not valid JSON ({error}): {_shortened(text.strip())}"
    return f"the call cannot be read: {_shortened(text.strip())}"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + " …"
