"""Rewards on the form of a completion: tags in order, one boxed answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tandem.rewards.completion import completion_text
from tandem.rl.errors import UserError

_BOXED = re.compile(r"\\boxed(?![A-Za-z])")
# A box (models also write `\\boxed`), an escaped character, or a brace.
_TOKEN = re.compile(r"(?P<box>\\+boxed\{)|\\.|(?P<brace>[{}])", re.DOTALL)


def tag_format(
    completions: list[Any],
    tags: Sequence[str] = ("think", "answer"),
    partial: bool = False,
    first_tag_in_prompt: bool = False,
    **_columns: Any,
) -> list[float]:
    """1.0 where the completion is exactly the tags in order, each with content and nothing but space around; else 0.0.

    Args:
        completions: texts or message lists.
        tags: tag names in order; each must appear once, and no tag inside another one.
        partial: give credit on the way, to teach a format that the model rarely gets right by chance: one point for
            every tag that appears once, closed and with content, one for the whole, divided by the number of points.
        first_tag_in_prompt: the prompt already ends with the first opening tag (as chat templates of reasoning models
            do), so that the completion starts inside it.

    Raises:
        UserError: `tags` is empty, or names a tag twice.

    >>> tag_format(["<think>6 × 7</think> <answer>42</answer>", "<think>6 × 7</think> 42"])
    [1.0, 0.0]
    >>> tag_format(["<answer>42</answer>"], partial=True)
    [0.3333333333333333]
    """
    names = [tags] if isinstance(tags, str) else list(tags)
    if not names or len(set(names)) != len(names):
        raise UserError(f"tags is {tags!r}", fix="name at least one tag, and each only once")
    start = f"<{names[0]}>" if first_tag_in_prompt else ""
    return [_tag_score(start + completion_text(c), names, partial) for c in completions]


def boxed_format(completions: list[Any], **_columns: Any) -> list[float]:
    r"""1.0 where exactly one `\boxed{...}` is present, with balanced braces and content; else 0.0.

    >>> boxed_format([r"so \boxed{\frac{1}{2}}", r"\boxed{}", r"\boxed{1} or \boxed{2}", r"\boxed{1"])
    [1.0, 0.0, 0.0, 0.0]
    """
    return [float(_is_boxed_once(completion_text(c))) for c in completions]


def boxed_contents(text: str) -> list[str]:
    r"""What stands inside each `\boxed{...}` with balanced braces, in order; of nested ones only the outer.

    A brace after a backslash (`\{`) is a character, not a group.

    >>> boxed_contents(r"\boxed{1}, \boxed{\{2\}}, \boxed{3")
    ['1', '\\{2\\}']
    """
    # One pass with a stack: a degenerate completion may open thousands of boxes and close none.
    spans: list[tuple[int, int]] = []
    open_groups: list[int | None] = []  # where a box's content starts; None for other groups
    for token in _TOKEN.finditer(text):
        if token["box"]:
            open_groups.append(token.end())
        elif token["brace"] == "{":
            open_groups.append(None)
        elif token["brace"] == "}" and open_groups:
            start = open_groups.pop()
            if start is not None:
                while spans and spans[-1][0] > start:
                    spans.pop()
                spans.append((start, token.start()))
    return [text[start:end] for start, end in spans]


def _is_boxed_once(text: str) -> bool:
    contents = boxed_contents(text)
    return len(_BOXED.findall(text)) == 1 and len(contents) == 1 and bool(contents[0].strip())


def _tag_score(text: str, tags: list[str], partial: bool) -> float:
    exact = _is_exact(text, tags)
    if exact or not partial:
        return float(exact)
    return sum(_is_well_formed(text, tag) for tag in tags) / (len(tags) + 1)


def _is_exact(text: str, tags: list[str]) -> bool:
    if not all(_is_well_formed(text, tag) for tag in tags):
        return False
    # Each tag appears once, so that the greedy pattern has one way to match.
    pattern = r"\s*".join(f"<{re.escape(tag)}>.*</{re.escape(tag)}>" for tag in tags)
    return re.fullmatch(pattern, text.strip(), re.DOTALL) is not None


def _is_well_formed(text: str, tag: str) -> bool:
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return False
    start, end = text.index(opening) + len(opening), text.index(closing)
    return start <= end and bool(text[start:end].strip())
