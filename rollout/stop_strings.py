"""Stop strings: texts that end a completion, found while its tokens come in one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Tokens of the prompt that a completion's first tokens are decoded after: some tokenizers drop a leading space.
_CONTEXT = 6
_INCOMPLETE = "\ufffd"


class StopStrings:
    """Watches one completion.

    A text counts wherever it stands: across the borders of tokens, or in the middle of the last one. Text is decoded
    without special tokens, and a character is looked at once all of its bytes are there.

    Args:
        decode: token ids to text. prompt: ids before the completion. stop: the texts.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._overlap = max(map(len, self._stop)) - 1
        self._ids = list(prompt[-_CONTEXT:])
        self._known = len(self._ids)
        self._tail = ""

    def push(self, token: int) -> bool:
        """Take in the next token. Returns whether a stop string is complete with it."""
        self._ids.append(token)
        before, text = self._decode(self._ids[: self._known]), self._decode(self._ids)
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return False
        # The last decoded tokens stay as the context of what comes next.
        self._ids = self._ids[self._known :] if self._known < len(self._ids) else self._ids
        self._known = len(self._ids)
        seen = self._tail + text[len(before) :]
        self._tail = seen[max(len(seen) - self._overlap, 0) :]
        return any(text in seen for text in self._stop)
