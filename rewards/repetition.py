"""Penalties on degenerate text: repeated n-grams, and letters of another script than was wanted."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import Any

from tandem.rewards.completion import completion_text
from tandem.rl.errors import UserError

# fmt: off
SCRIPTS = (
    "ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "ETHIOPIC",
    "GEORGIAN", "GREEK", "GUJARATI", "GURMUKHI", "HANGUL", "HEBREW", "HIRAGANA",
    "KANNADA", "KATAKANA", "KHMER", "LAO", "LATIN", "MALAYALAM", "MONGOLIAN",
    "MYANMAR", "ORIYA", "SINHALA", "TAMIL", "TELUGU", "THAI", "TIBETAN",
)
# fmt: on
"""Scripts that `language_penalty` knows by name, as the names of their letters in Unicode begin."""


def repetition_penalty(
    completions: list[Any],
    n: int = 4,
    max_penalty: float = 1.0,
    **_columns: Any,
) -> list[float]:
    """-max_penalty × the share of word n-grams that stood in the completion before; 0 for fewer than n words.

    A text that repeats one sentence comes near -max_penalty; ordinary prose of a page near 0.

    Args:
        completions: texts or message lists.
        n: words of an n-gram, ≥ 1.
        max_penalty: largest penalty, ≥ 0.

    Raises:
        UserError: n or max_penalty is out of range.

    >>> repetition_penalty(["a b a b a b", "a b c d e f"], n=2)
    [-0.6, 0.0]
    """
    if n < 1 or max_penalty < 0:
        raise UserError(f"n is {n} and max_penalty is {max_penalty}", fix="give n ≥ 1 and max_penalty ≥ 0")
    # 0.0 - x, not -x: no negative zeros in logs.
    return [0.0 - max_penalty * repeated_share(completion_text(c).lower().split(), n) for c in completions]


def repeated_share(words: Sequence[Any], n: int) -> float:
    """The share of n-grams that are not the first of their kind."""
    total = len(words) - n + 1
    if total < 1:
        return 0.0
    return 1 - len(set(zip(*(words[i:] for i in range(n)), strict=False))) / total


def language_penalty(
    prompts: list[Any],
    completions: list[Any],
    scripts: str | list[str] | None = None,
    free_share: float = 0.0,
    max_penalty: float = 1.0,
    **_columns: Any,
) -> list[float]:
    """-max_penalty × the share of letters in other scripts than the wanted ones, against mixing languages.

    It tells scripts apart (Latin from Cyrillic or Chinese), not languages of one script. Digits, punctuation and
    symbols are no letters.

    Args:
        prompts: texts or message lists.
        completions: texts or message lists.
        scripts: wanted scripts, such as latin, cyrillic, cjk (Chinese characters), hiragana; None: those that the
            prompt's messages are written in.
        free_share: share of foreign letters that costs nothing, for names and for Greek letters of formulas; beyond it
            the whole share counts.
        max_penalty: largest penalty, ≥ 0.

    Raises:
        UserError: an unknown script, or a parameter out of range.

    >>> language_penalty(["Why?"] * 2, ["Because", "Bec因为"])
    [0.0, -0.4]
    """
    if not 0 <= free_share <= 1 or max_penalty < 0:
        raise UserError(
            f"free_share is {free_share} and max_penalty is {max_penalty}",
            fix="give 0 ≤ free_share ≤ 1 and max_penalty ≥ 0",
        )
    named = (
        None if scripts is None else frozenset(_known(s) for s in ([scripts] if isinstance(scripts, str) else scripts))
    )
    results = []
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = set(_scripts(_prompt_text(prompt))) if named is None else named
        letters = _scripts(completion_text(completion))
        # A prompt without letters (a sum, say) asks for no script.
        foreign = sum(script not in wanted for script in letters) if wanted else 0
        share = foreign / len(letters) if letters else 0.0
        results.append(0.0 - max_penalty * share if share > free_share else 0.0)
    return results


def _known(script: str) -> str:
    if script.upper() not in SCRIPTS:
        raise UserError(f"there is no script {script!r}", fix=f"use of {', '.join(SCRIPTS).lower()}")
    return script.upper()


def _prompt_text(prompt: Any) -> str:
    """What is said in a prompt, by whomever: `completion_text` would take the assistant's turns only."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(completion_text([{**message, "role": "assistant"}]) for message in prompt)


def _scripts(text: str) -> list[str]:
    # NFKC turns full-width and mathematical letters into plain ones.
    return [s for c in unicodedata.normalize("NFKC", text) if c.isalpha() and (s := _script(c))]


@functools.lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").replace("-", " ").partition(" ")[0]
