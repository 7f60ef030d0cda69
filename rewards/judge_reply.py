"""The score in a judge's reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from tandem.rl.errors import UserError

Parser = Callable[[str], float | None]

DEFAULT_PATTERN = r"(?i)\bscore\b[\s\"'*_`:=]*(?:is\s+)?[*_`\"]*(-?\d+(?:\.\d+)?)"


def by_pattern(pattern: str) -> Parser:
    """Reads the number in the first group of the pattern's last match.

    Raises:
        UserError: the pattern does not compile or has no group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"score_pattern {pattern!r} is no regular expression: {error}", fix="correct it") from None
    if compiled.groups < 1:
        raise UserError(f"score_pattern {pattern!r} has no group", fix="put parentheses around the number")

    def parse(reply: str) -> float | None:
        matches = list(compiled.finditer(reply))
        return _number(matches[-1][1]) if matches else None

    return parse


def by_key(key: str) -> Parser:
    """Reads the number under a key (`score`, or `a.b` for nested ones) of the reply's last JSON object that has it."""
    path = key.split(".")

    def parse(reply: str) -> float | None:
        found = [value for node in _objects(reply) if (value := _at(node, path)) is not None]
        return _number(found[-1]) if found else None

    return parse


def scaled(value: float | None, scale: tuple[float, float] | None) -> float | None:
    """A score of the scale mapped to 0 … 1, None for what lies outside; without a scale the score itself."""
    if value is None or scale is None:
        return value
    low, high = scale
    return (value - low) / (high - low) if low <= value <= high else None


def _objects(text: str) -> list[Any]:
    """The outermost JSON objects in a text."""
    decoder, position, found = json.JSONDecoder(), 0, []
    failures = 0
    while (start := text.find("{", position)) >= 0 and failures < 100:  # a reply of braces must not take long
        try:
            node, position = decoder.raw_decode(text, start)
            found.append(node)
        except (ValueError, RecursionError):
            position, failures = start + 1, failures + 1
    return found


def _at(node: Any, path: list[str]) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
