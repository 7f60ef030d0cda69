"""Numbers with units in answers: the last number of a text, the unit after a number, and closeness."""

from __future__ import annotations

import re

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+]?\.\d+"
# Not inside a word or a longer number, and no exponent.
_ANY_NUMBER = re.compile(rf"(?<![\w^.])(?:{_NUMBER})(?!\d)")
_WITH_UNIT = re.compile(rf"(?<![\w^.])(?:{_NUMBER})\s*(?P<unit>[^\W\d_][\w/^·*²³-]*|[°%℃℉][\w/]*)?")
_ONLY_QUANTITY = re.compile(rf"\(?(?:{_NUMBER})\)?\s*(?P<unit>[^\W\d_].*|[°%℃℉].*)?", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{?\s*(\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mbox|textrm|mathit|operatorname|rm)(?![A-Za-z])\s*")
_SPACING = re.compile(r"\\[,;:! ]|~|\\(?:quad|qquad|thinspace)(?![A-Za-z])")
_MEASURE = (
    r"(?:[numµμkcdMG]?(?:m|g|s|N|J|W|V|A|Pa|Hz|L|l|mol|eV|Ω)|K|h|hr|min|ft|in|mi|yd|lb|oz|mph|°[CF]?)(?![A-Za-z])"
    r"(?:\^?-?\d|[²³])?"
)
_QUANTITY = re.compile(rf"(?P<number>{_NUMBER})\s+{_MEASURE}(?:\s*[/·*\s]\s*{_MEASURE})*")


def last_number(text: str) -> str | None:
    """The last number of a text as it is written there; None if there is none.

    >>> last_number("3 hours and 1,072.5 miles (in x2)")
    '1,072.5'
    """
    numbers = _ANY_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def unit_of(answer: str) -> str:
    r"""The unit of a quantity, in LaTeX or in words, without spaces and markup; empty if there is none.

    In a sentence it is the word after the last number. Units are not converted, and a plural s is left out.

    >>> [unit_of(a) for a in (r"5\,\text{cm}^2", "It took 5 hours.", "12", "10%")]
    ['cm^2', 'hour', '', '%']
    """
    text = _FRACTION.sub(r"\1/\2", answer)
    text = _SPACING.sub(" ", _TEXT_COMMAND.sub("", text))
    text = text.replace("\\%", "%").replace("^\\circ", "°").replace("^{\\circ}", "°").replace("\\degree", "°")
    text = re.sub(r"[{}$\\]", "", text).strip().rstrip(".")
    alone = _ONLY_QUANTITY.fullmatch(text)
    if alone and len((alone["unit"] or "").split()) <= 2:
        return _plain(alone["unit"])
    quantities = list(_WITH_UNIT.finditer(text))
    return _plain(quantities[-1]["unit"]) if quantities else ""


def number_of(answer: str) -> str | None:
    r"""The number of a quantity in units of measurement, None for everything else; `2x` and `2m` are algebra.

    >>> [number_of(a) for a in (r"5\,\text{cm}^2", "9.8 m/s²", "12 kg", "2m", "2 x")]
    ['5', '9.8', '12', None, None]
    """
    text = _SPACING.sub(" ", _TEXT_COMMAND.sub(" ", answer))
    found = _QUANTITY.fullmatch(re.sub(r"[{}$]", "", text).strip().rstrip("."))
    return found["number"] if found else None


def close(found: float, known: float, tolerance: float) -> bool:
    """Whether a number is within a share `tolerance` of the known one (of 1, if that is zero)."""
    return abs(found - known) <= tolerance * (abs(known) or 1.0) * (1 + 1e-12)


def _plain(unit: str | None) -> str:
    plain = re.sub(r"\s+", "", unit or "").replace("²", "^2").replace("³", "^3").replace("µ", "μ")
    return plain[:-1] if len(plain) > 3 and plain.endswith("s") and plain.isalpha() else plain
