"""Plain values as JSON, for the line between a program under test and whoever judges it.

Only data crosses: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict of exactly these
types. Decoding can therefore not run code, and what comes out has no `__eq__` but Python's own. Anything else crosses
as a reference, a number that only its owner can resolve. Standard library only: all three sides import it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TextIO

_MAX_DEPTH = 200
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"l": list, "t": tuple, "s": set, "z": frozenset}
_SEQUENCE_TAGS: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}


class BadValue(Exception):
    """A message that is no value."""


def encode(value: Any, reference: Callable[[Any], dict[str, Any]], depth: int = 0) -> Any:
    """A value as JSON data; `reference` encodes what is not plain."""
    kind: type = type(value)
    if depth > _MAX_DEPTH:
        raise BadValue(f"nested deeper than {_MAX_DEPTH}")
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"f": repr(value)}
    if kind is complex:
        return {"c": [repr(value.real), repr(value.imag)]}
    if kind is bytes:
        return {"b": value.hex()}
    if kind in _SEQUENCE_TAGS:
        return {_SEQUENCE_TAGS[kind]: [encode(item, reference, depth + 1) for item in value]}
    if kind is dict:
        return {"d": [[encode(k, reference, depth + 1), encode(v, reference, depth + 1)] for k, v in value.items()]}
    return reference(value)


def decode(data: Any, resolve: Callable[[str, Any], Any], depth: int = 0) -> Any:
    """The value of JSON data; `resolve(tag, content)` gives what a reference stands for.

    Raises:
        BadValue: the data is no encoded value, whatever it is.
    """
    if depth > _MAX_DEPTH:
        raise BadValue(f"nested deeper than {_MAX_DEPTH}")
    if data is None or type(data) in (bool, int, str):
        return data
    if type(data) is not dict or len(data) != 1:
        raise BadValue("no encoded value")
    ((tag, content),) = data.items()
    try:
        if tag == "f":
            return float(content)
        if tag == "c":
            return complex(float(content[0]), float(content[1]))
        if tag == "b":
            return bytes.fromhex(content)
        if tag in _SEQUENCES:
            return _SEQUENCES[tag]([decode(item, resolve, depth + 1) for item in content])
        if tag == "d":
            return {decode(k, resolve, depth + 1): decode(v, resolve, depth + 1) for k, v in content}
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadValue(f"malformed {tag!r}") from error
    return resolve(tag, content)


class Line:
    """One side of the line: a message is one JSON object on one line."""

    def __init__(self, reading: TextIO, writing: TextIO) -> None:
        self.reading, self.writing = reading, writing

    def send(self, message: dict[str, Any]) -> None:
        self.writing.write(json.dumps(message) + "\n")
        self.writing.flush()

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end.

        Raises:
            BadValue: what arrived is no message.
        """
        text = self.reading.readline()
        return parse_message(text) if text else None


def parse_message(text: str) -> dict[str, Any]:
    """One line as a message; raises BadValue."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadValue("no JSON") from error
    if type(message) is not dict:
        raise BadValue("no message")
    return message
