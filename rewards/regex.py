"""Rewards by regular expressions."""

from __future__ import annotations

import functools
import re
from typing import Any

from tandem.rewards.completion import completion_text
from tandem.rl.errors import UserError

_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE, "a": re.ASCII}


def regex_match(
    completions: list[Any],
    pattern: str | list[str],
    full: bool = False,
    flags: str = "",
    **_columns: Any,
) -> list[float]:
    r"""The share of the patterns that match the completion; with one pattern 1.0 or 0.0.

    A pattern that backtracks without end is interrupted by the reward's time limit.

    Args:
        completions: texts or message lists.
        pattern: a regular expression of Python's `re`, or several.
        full: a pattern must match the whole completion (spaces at the ends aside), not a part of it.
        flags: letters: i ignore case, m `^` and `$` at lines, s `.` matches line ends, x verbose, a ASCII only.

    Raises:
        UserError: no pattern, a pattern that does not compile, or an unknown flag.

    >>> regex_match(["Answer: 42", "42"], pattern=r"^Answer: \d+$")
    [1.0, 0.0]
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise UserError("pattern is empty", fix="give a regular expression")
    compiled = [_compiled(p, flags) for p in patterns]
    results = []
    for completion in completions:
        text = completion_text(completion).strip() if full else completion_text(completion)
        found = sum(bool(p.fullmatch(text) if full else p.search(text)) for p in compiled)
        results.append(found / len(compiled))
    return results


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str, flags: str) -> re.Pattern[str]:
    if unknown := [letter for letter in flags if letter not in _FLAGS]:
        raise UserError(f"flags is {flags!r}: there is no flag {unknown[0]!r}", fix=f"use of {''.join(_FLAGS)}")
    combined = functools.reduce(lambda a, b: a | b, (_FLAGS[letter] for letter in flags), re.RegexFlag(0))
    try:
        return re.compile(pattern, combined)
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is no regular expression: {error}", fix="correct it") from None
