r"""Whether a completion's answer equals the known one, as math-verify judges it.

math-verify takes milliseconds per answer and half a second to import, so two plain numbers are compared directly,
in a domain where that gives math-verify's own verdict.
"""

from __future__ import annotations

import math
import numbers
import re
import threading
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

from tandem.rewards.base import RESERVED, completion_text
from tandem.rewards.known_answer import no_known_answers
from tandem.rewards.quantities import close, last_number, number_of, unit_of
from tandem.rewards.text_format import boxed_contents
from tandem.rl.errors import UserError

_INTEGER = re.compile(r"-?(?:0|[1-9]\d{0,14})", re.ASCII)
_THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3}){1,4}", re.ASCII)
# math-verify rounds to six places in about 15 significant digits; below that, equal means equal.
_DECIMAL = re.compile(r"-?(?:0|[1-9]\d{0,5})\.\d{1,6}", re.ASCII)
_DELIMITED = re.compile(r"\$|\\\(|\\\[")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
# A text without any sign of mathematics, and its words: a run of letters without a vowel, or of the first and the last
# of the alphabet alone, is a product of variables (lwh, abc, xyz).
_TEXT = re.compile(r"(?:[^\W_]|[\s.,;:'’-])+")
_WHOLE_WORD = re.compile(r"(?<![^\W\d_])(?=[^\W\d_]*[aeiou])(?![abcdxyz]+(?![^\W\d_]))[^\W\d_]{3,}", re.IGNORECASE)
_LIST = re.compile(r",|\band\b")
# Without one of these math-verify finds nothing to extract.
_EXTRACTABLE = re.compile(r"[\d$\\\[]")

Place = Literal["boxed", "tag", "text"]


def math_answer(
    completions: list[Any],
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    ground_truth: list[Any] | None = None,
    boxed_only: bool = False,
    last_number_only: bool = False,
    tolerance: float = 0.0,
    units: Literal["ignore", "match"] = "ignore",
    seconds: int = 2,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the completion's answer equals the known one, 0.0 where it does not or there is none.

    The completion's answer is looked for after its reasoning (in the last `<answer>…</answer>`, else after the last
    `</think>`, else in all of it): the last `\boxed{…}`, else the last expression.

    Args:
        completions: texts or message lists.
        answer, solution, ground_truth: the known answers; the first column with a value counts: a number, `"0.5"`,
            LaTeX, a text with `\boxed{…}` or `$…$`, or GSM8K's `… #### 42`. A row without any gets None.
        boxed_only: only an answer inside `\boxed{…}` counts.
        last_number_only: where nothing is boxed or tagged, the last number of the text is the answer (as for GSM8K),
            instead of the expression that math-verify picks.
        tolerance: a number is right within this share of the known one, 0.01 for one percent (of 1 if the known answer
            is 0). 0: equal, as math-verify rounds. Sets, intervals and formulas are never nearly right.
        units: ignore: `5 cm` equals `5`, and `5 m`; match: where the known answer has a unit, the completion's must be
            written the same way (case counts, spaces, LaTeX and a plural s do not; nothing is converted).
        seconds: time limit of math-verify for reading one answer and for comparing it; what takes longer is wrong. It
            needs the main thread; elsewhere only the limit of the whole reward counts.

    Raises:
        UserError: none of the columns exists, a known answer cannot be read, or a parameter is out of range.

    Sets and lists are right in any order (`\{1, 2\}` or `2, 1`), tuples and intervals in theirs. Words are no
    products of their letters: `silent` is not `listen`, though `ba` is `ab`.

    >>> math_answer([r"6 × 7 = \boxed{42}", "It is 41."], answer=["42", "#### 42"])
    [1.0, 0.0]
    >>> math_answer(["<think>…</think><answer>1,000</answer>"], solution=[1000])
    [1.0]
    """
    golds = [column for column in (answer, solution, ground_truth) if column is not None]
    if not golds:
        raise no_known_answers("math_answer", [name for name in columns if name not in RESERVED])
    if not 0 <= tolerance < 1 or units not in ("ignore", "match") or (boxed_only and last_number_only):
        raise UserError(
            f"tolerance is {tolerance!r}, units is {units!r}, boxed_only {boxed_only}, last_number_only "
            f"{last_number_only}",
            fix="give 0 ≤ tolerance < 1, units: ignore or match, and at most one of boxed_only and last_number_only",
        )
    limit = seconds if threading.current_thread() is threading.main_thread() else None
    results: list[float | None] = []
    for row, completion in enumerate(completions):
        gold = next((column[row] for column in golds if column[row] is not None), None)
        if gold is None:
            results.append(None)
            continue
        known = _gold_text(gold, row, limit)
        found = extract_answer(completion_text(completion), boxed_only=boxed_only)
        if found is None:
            results.append(0.0)
            continue
        said, place = found
        right = units == "ignore" or not (unit := unit_of(known)) or unit_of(said) == unit
        if right and last_number_only and place == "text":
            said, place = last_number(said) or "", "boxed"
        results.append(float(right and bool(said) and _right_quantity(known, said, place, tolerance, limit)))
    return results


def extract_answer(text: str, *, boxed_only: bool = False) -> tuple[str, Place] | None:
    r"""The part of a completion that holds its answer, and where it was found; None if there is none.

    >>> extract_answer(r"<think>\boxed{1}?</think> So \boxed{2}.")
    ('2', 'boxed')
    """
    text = text.replace("−", "-")  # U+2212, which would be lost before a number
    before, closing, _ = text.rpartition("</answer>")
    _, tagged, content = before.rpartition("<answer>")
    if closing and tagged:
        text = content
    else:
        after_reasoning = text.rpartition("</think>")[2]
        text = after_reasoning if after_reasoning.strip() else text
    if boxed := boxed_contents(text):
        return boxed[-1].strip(), "boxed"
    if boxed_only or not text.strip():
        return None
    if tagged:
        return text.strip(), "tag"
    return (text.strip(), "text") if _EXTRACTABLE.search(text) else None


def _gold_text(gold: Any, row: int, limit: int | None) -> str:
    """The known answer as LaTeX or text. Raises UserError if math-verify cannot read it."""
    text = _written(gold).rpartition("####")[2].strip()
    if boxed := boxed_contents(text):
        text = boxed[-1].strip()
    if plain_number(text) is None and not _parse_gold(text, limit):
        raise UserError(
            f"the known answer of row {row} is {gold!r}, which cannot be read as a mathematical answer",
            reason="nothing could ever equal it",
            fix="give a number, LaTeX, or a text that ends in '#### ANSWER'; leave out or correct such rows",
        )
    return text


def _written(gold: Any) -> str:
    """A known answer as text; empty for what is neither a text nor a finite number."""
    if isinstance(gold, str):
        return gold
    if isinstance(gold, bool):
        return ""
    if isinstance(gold, numbers.Rational):
        return str(gold)
    if isinstance(gold, (numbers.Real, Decimal)) and math.isfinite(gold):
        return format(Decimal(str(gold)), "f")  # not 1e-07, which mathematics reads as a product
    return ""


def _right_quantity(gold: str, answer: str, place: Place, tolerance: float, limit: int | None) -> bool:
    if _right(gold, answer, place, tolerance, limit):
        return True
    # math-verify reads many units as variables, m/s for example; then the numbers alone are compared.
    known, found = number_of(gold), number_of(answer)
    return bool(known or found) and _right(known or gold, found or answer, place, tolerance, limit)


def _right(gold: str, answer: str, place: Place, tolerance: float, limit: int | None) -> bool:
    if _equal(gold, answer, place, limit):
        return True
    if not tolerance:
        return False
    known = plain_number(gold)
    known_value = float(known) if known is not None else _value(gold, "tag", limit)
    found_value = _value(answer, place, limit)
    return known_value is not None and found_value is not None and close(found_value, known_value, tolerance)


def _equal(gold: str, answer: str, place: Place, limit: int | None) -> bool:
    known, found = plain_number(gold), plain_number(answer)
    if known is not None and found is not None:
        return known == found
    return _verified(gold, answer, place, limit)


def plain_number(text: str) -> Decimal | None:
    """The value of a plain integer or decimal (`-12`, `1,234`, `0.50`) that needs no mathematics to compare.

    None for everything else, and for numbers with so many digits that math-verify's rounding would matter.
    """
    if _INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text):
        return Decimal(text)
    if _THOUSANDS.fullmatch(text):
        return Decimal(text.replace(",", ""))
    return None


# A group's completions share their known answer and often their own, and a slow one should be slow only once.
@lru_cache(maxsize=16384)
def _verified(gold: str, answer: str, place: Place, limit: int | None) -> bool:
    from math_verify import verify

    known, found = _parse_gold(gold, limit), _read(answer, place, limit)
    equal = bool(found) and bool(verify(list(known), found, timeout_seconds=limit))
    return equal and not _other_words(_source(known), _source(found))


def _source(items: Sequence[Any]) -> str:
    """The text that math-verify found an expression in, which it gives beside it."""
    return next((item for item in reversed(items) if isinstance(item, str)), "")


def _other_words(known: str, found: str) -> bool:
    """Whether two texts have the same letters in other words: as products of their letters they would be equal."""
    if not (_TEXT.fullmatch(known) and _TEXT.fullmatch(found)):
        return False
    words = [[word.casefold() for word in _WHOLE_WORD.findall(text)] for text in (known, found)]
    if _LIST.search(known) and _LIST.search(found):
        words = [sorted(part) for part in words]
    first, second = words
    return first != second and sorted("".join(first)) == sorted("".join(second))


@lru_cache(maxsize=16384)
def _value(answer: str, place: Place, limit: int | None) -> float | None:
    """The real number that an answer is (also as `x = …`), None if it is something else or takes too long."""
    plain = plain_number(answer)
    if plain is not None:
        return float(plain)
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    items = _read(answer, place, limit)

    def evaluate() -> float | None:
        for item in items:
            side = getattr(item, "rhs", item)
            if getattr(side, "is_number", False) and getattr(side, "is_real", False):
                value = float(side)
                return value if math.isfinite(value) else None
        return None

    try:
        return timeout(limit)(evaluate)()
    except (TimeoutException, TypeError, ValueError, OverflowError):  # numbers that are no float
        return None


def _read(answer: str, place: Place, limit: int | None) -> list[Any]:
    if place == "tag":
        return _parse_answer(answer, limit)
    return _parse(f"\\boxed{{{answer}}}" if place == "boxed" else answer, limit)


@lru_cache(maxsize=16384)
def _parse_gold(text: str, limit: int | None) -> tuple[Any, ...]:
    return tuple(_parse_answer(text, limit)) if text else ()


def _parse_answer(text: str, limit: int | None) -> list[Any]:
    """Read an answer that may be LaTeX without delimiters, or a sentence that contains an expression."""
    if _DELIMITED.search(text):
        return _parse(text, limit)
    boxed = f"\\boxed{{{text}}}"
    sentence_first = len(_WORD.findall(text)) > 1
    first, second = (text, boxed) if sentence_first else (boxed, text)
    found = _parse(first, limit)
    # A lone string is math-verify's way to say that it found something but could not read it.
    if any(not isinstance(item, str) for item in found):
        return found
    return _parse(second, limit) or found


def _parse(text: str, limit: int | None) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=limit))
