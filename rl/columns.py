"""What the columns of each kind of data must be, and messages as plain role and content."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal

from tandem.rl.errors import UserError, short
from tandem.rl.samples import Messages

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["rl", "sft", "preference", "labelled"]

# What the rows of each kind may consist of; the first alternative whose columns are all there counts.
_SHAPES: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "rl": (("prompt",),),
    "sft": (("prompt", "completion"), ("messages",), ("conversations",), ("text",)),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "labelled": (("prompt", "completion", "label"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
# Names that other data sets give to our columns, the likeliest first.
_ALIASES = {
    "prompt": ("question", "query", "instruction", "input", "problem", "prompts", "messages", "conversations"),
    "completion": ("response", "answer", "output", "solution", "target", "completions"),
    "messages": ("message", "conversation", "chat", "dialog", "dialogue"),
    "text": ("content", "document", "texts"),
    "chosen": ("accepted", "preferred", "response_chosen", "positive", "winner"),
    "label": ("labels", "liked", "desirable", "is_good", "rating"),
    "rejected": ("refused", "dispreferred", "response_rejected", "negative", "loser"),
}
MESSAGE_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")
_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}


def check_columns(dataset: Dataset, kind: Kind, what: str = "data.dataset_name") -> None:
    """Check that the rows are what `kind` needs, before anything slow happens.

    `rl`: `prompt`, a string or messages that do not end with the assistant. `sft`: `prompt` + `completion` (strings or
    messages), `messages` (or ShareGPT's `conversations`), or `text`. `preference`: `chosen` and `rejected` with
    `prompt`, or without it where they are whole conversations or texts that begin alike. `labelled`: `prompt` +
    `completion` and a boolean `label`, or pairs as for `preference`.

    Raises:
        UserError: a column is missing (with the nearest present one), or the first row with a wrong value.
    """
    columns = shape_of(dataset, kind, what)
    conversational: bool | None = None
    number = 0
    for batch in dataset.with_format(None).select_columns(list(columns)).iter(1000):
        for values in zip(*(batch[c] for c in columns), strict=True):
            for column, value in zip(columns, values, strict=True):
                if problem := _problem(column, value):
                    raise UserError(
                        f"{what}: row {number}, column {column!r}: {problem}: {short(value)}",
                        fix="correct or remove that row",
                    )
            is_messages = [isinstance(v, list) for v in values if not isinstance(v, bool)]
            # A string prompt beside whole conversations is what TRL calls an implicit prompt.
            if "chosen" in columns and is_messages == [False, True, True]:
                is_messages = [True]
            if conversational is None:
                conversational = is_messages[0]
            if any(m != conversational for m in is_messages):
                raise UserError(
                    f"{what}: row {number} mixes strings and messages in {', '.join(columns)}: {short(values)}",
                    fix="use strings everywhere or lists of messages everywhere",
                )
            if kind == "rl" and conversational and plain_messages(values[0])[-1]["role"] == "assistant":
                raise UserError(
                    f"{what}: row {number}, column 'prompt' ends with an assistant turn: {short(values[0][-1])}",
                    reason="the model is to write that turn itself",
                    fix="remove it, and keep its text in another column (`answer`, say) for the rewards",
                )
            number += 1


def shape_of(dataset: Dataset, kind: Kind, what: str) -> tuple[str, ...]:
    """The columns that carry the text, or an error that names what is missing and what it may be called here."""
    present = dataset.column_names
    shapes = _SHAPES[kind]
    for shape in shapes:
        if all(column in present for column in shape):
            return shape
    renames = [{c: _nearest(c, present) for c in shape if c not in present} for shape in shapes]
    likely = next((r for r in renames if all(r.values())), None)
    raise UserError(
        f"{what}: {kind} data need {' or '.join(' + '.join(f'`{c}`' for c in shape) for shape in shapes)}, "
        f"but the columns are {', '.join(f'`{c}`' for c in present)}",
        fix=" and ".join(f"rename `{old}` to `{new}`" for new, old in likely.items())
        if likely
        else "rename or build the columns, for example in a FILE.py:FUNCTION that returns the rows",
    )


def _nearest(column: str, present: list[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(present)}
    for name in (column, *_ALIASES.get(column, ())):
        if name in lowered:
            return lowered[name]
    near = difflib.get_close_matches(column, list(lowered), n=1, cutoff=0.75)
    return lowered[near[0]] if near else None


def _problem(column: str, value: Any) -> str:
    """What is wrong with a value, "" if nothing is."""
    if column == "label":
        return "" if isinstance(value, bool) else f"{type(value).__name__} instead of true or false"
    if value is None:
        return "no value"
    if isinstance(value, str):
        if column in ("messages", "conversations"):
            return "a string instead of a list of messages"
        return "" if value.strip() else "an empty string"
    if not isinstance(value, list):
        return f"{type(value).__name__} instead of a string" + ("" if column == "text" else " or a list of messages")
    if column == "text":
        return "a list instead of a string (call the column `messages`)"
    if not value:
        return "an empty list of messages"
    return next((f"message {i} {problem}" for i, m in enumerate(value) if (problem := _message_problem(m))), "")


def _message_problem(message: Any) -> str:
    if not isinstance(message, dict):
        return f"is {type(message).__name__}, not a mapping with role and content"
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or not role:
        return "has no role"
    if isinstance(content, list):
        parts = [p.get("type") if isinstance(p, dict) else type(p).__name__ for p in content]
        other = [p for p in parts if p != "text"]
        return f"holds a part of type {other[0]!r}; only text is supported" if other else ""
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return ""
    return "has no content" if content is None else f"has content of type {type(content).__name__}, not a string"


def plain_messages(value: str | Messages, feature: Any = None) -> Any:
    """Messages without the keys that Arrow fills in where another row has them, and with ShareGPT's from/value and
    speakers turned into roles.

    Args:
        feature: the column's type; None: only the messages' own keys are looked at, not those inside a call, say.
    """
    if not isinstance(value, list):
        return value
    inside = _inside(feature)
    types = inside if isinstance(inside, dict) else {}
    messages = []
    for message in value:
        message = {k: own_keys(v, types.get(k)) for k, v in message.items()}
        if "from" in message and "role" not in message:
            rest = {k: v for k, v in message.items() if k not in ("from", "value")}
            speaker = message["from"]
            message = {"role": _SPEAKERS.get(speaker, speaker), "content": message["value"], **rest}
        messages.append({k: v for k, v in message.items() if v is not None or k in ("role", "content")})
    return messages


def own_keys(value: Any, feature: Any) -> Any:
    """A value without the keys that Arrow fills in at any depth; in columns of JSON, None was written there."""
    if isinstance(value, dict) and isinstance(feature, dict):
        return {k: own_keys(v, feature[k]) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [own_keys(v, _inside(feature)) for v in value]
    return value


def _inside(feature: Any) -> Any:
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def role_of(message: Any) -> str | None:
    return message.get("role") if isinstance(message, dict) else "assistant"  # a string is all the model's own
