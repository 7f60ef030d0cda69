"""The text of a completion, and the part of it that rewards judge: what comes after the reasoning."""

from __future__ import annotations

from typing import Any


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion as rewards receive it: the string itself, or what its assistant messages say."""
    if isinstance(completion, str):
        return completion
    texts = [_content_text(m.get("content")) for m in completion if m.get("role", "assistant") == "assistant"]
    return "\n".join(texts)


def final_text(text: str) -> str:
    """What a completion says in the end: the last `<answer>…</answer>`, else what follows `</think>`, else all of it.

    >>> final_text("<think>6 × 7</think> It is <answer> 42 </answer>.")
    '42'
    """
    before, closing, _ = text.rpartition("</answer>")
    _, tagged, content = before.rpartition("<answer>")
    if closing and tagged:
        return content.strip()
    after = text.rpartition("</think>")[2]
    return (after if after.strip() else text).strip()


def _content_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
