"""Whether a completion's answer is a known text, exactly or nearly."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from tandem.rewards.completion import completion_text, final_text
from tandem.rewards.known_answer import known_answers

_SPACE = re.compile(r"\s+")
# With the sign of a number, but not the hyphen in 3-4.
_WORDS = re.compile(r"(?<!\w)-(?=\d)\w+|\w+")


def exact_match(
    completions: list[Any],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    ground_truth: list[Any] | None = None,
    ignore_case: bool = True,
    ignore_punctuation: bool = True,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's answer is the known text, else 0.0.

    The answer is what stands in the last `<answer>…</answer>`, else after the last `</think>`, else all of the text.
    Spaces at the ends and repeated ones never count; Unicode is compared in form NFKC.

    Args:
        completions: texts or message lists.
        answer, solution, ground_truth: the known texts; the first column with a value counts. A list: any of them is
            right. A row without any gets None.
        ignore_case: compare without regard to case.
        ignore_punctuation: compare letters, digits and the sign of numbers only: `Paris.` is `Paris`, `-5` is not `5`.

    Raises:
        UserError: none of the columns exists.

    >>> exact_match(["<think>…</think> Paris."], answer=["paris"])
    [1.0]
    """
    known = known_answers("exact_match", len(completions), [answer, solution, ground_truth], columns)
    results: list[float | None] = []
    for completion, options in zip(completions, known, strict=True):
        said = _plain(final_text(completion_text(completion)), ignore_case, ignore_punctuation)
        right = [_plain(option, ignore_case, ignore_punctuation) for option in options]
        results.append(float(said in right) if options else None)
    return results


def fuzzy_match(
    completions: list[Any],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    ground_truth: list[Any] | None = None,
    unit: Literal["characters", "words"] = "characters",
    threshold: float = 0.0,
    ignore_case: bool = True,
    **columns: Any,
) -> list[float | None]:
    """How much of the completion's answer and of the known text is common to both, in order: from 0.0 to 1.0.

    2 × (length of the longest common subsequence) / (length of both texts). The answer is found as in `exact_match`.

    Args:
        completions: texts or message lists.
        answer, solution, ground_truth: the known texts; the first column with a value counts. Of a list, the most
            similar text counts. A row without any gets None.
        unit: compare character by character, or word by word without punctuation.
        threshold: similarities below it become 0.0.
        ignore_case: compare without regard to case.

    Raises:
        UserError: none of the columns exists.

    >>> fuzzy_match(["the cat sat"], answer=["the dog sat"], unit="words")
    [0.6666666666666666]
    """
    known = known_answers("fuzzy_match", len(completions), [answer, solution, ground_truth], columns)
    results: list[float | None] = []
    for completion, options in zip(completions, known, strict=True):
        said = _units(final_text(completion_text(completion)), unit, ignore_case)
        values = [similarity(said, _units(option, unit, ignore_case)) for option in options]
        results.append(max((v if v >= threshold else 0.0 for v in values), default=None))
    return results


def similarity(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """2 × LCS / (len(a) + len(b)); 1.0 for two empty sequences."""
    return 2 * common_length(a, b) / (len(a) + len(b)) if a or b else 1.0


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming over a long integer (Hyyrö 2004).

    Bit i of `row` is 0 where the table's column i is one larger than column i - 1.
    """
    places: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for item in b:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _plain(text: str, ignore_case: bool, ignore_punctuation: bool) -> str:
    text = unicodedata.normalize("NFKC", text).replace("−", "-")
    text = text.casefold() if ignore_case else text
    if ignore_punctuation:
        # A text of nothing but punctuation stays what it is: `+` must not equal `-`.
        text = " ".join(_WORDS.findall(text)) or text
    return _SPACE.sub(" ", text).strip()


def _units(text: str, unit: str, ignore_case: bool) -> Sequence[Hashable]:
    plain = _plain(text, ignore_case, ignore_punctuation=unit == "words")
    return plain.split() if unit == "words" else plain
