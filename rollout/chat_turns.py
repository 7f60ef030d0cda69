"""Turns as token ids: what is put between two assistant turns, without tokenising anything a second time.

An answer's tokens are found by rendering a stand-in conversation twice, up to the assistant's turn and on to the next
one; what the second text has beyond the first is what the answer adds. That is right only where adding a message leaves
the text before it as it was, which is checked for every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from tandem.rl.errors import UserError
from tandem.rl.samples import Messages

# Stands for the assistant's turn, and is found again in the text: letters only, so that no template changes it.
_MARK = "standinturn"


class Render(Protocol):
    """A chat template with the run's own variables: messages to text. Raises UserError where it refuses them."""

    def __call__(
        self, messages: Messages, *, add_generation_prompt: bool, tools: list[dict[str, Any]] | None
    ) -> str: ...


class ChatTurns:
    """Prompts and answers as the chat template writes them.

    Args:
        render: the template. encode: rendered text to token ids, which adds no special tokens.
        stops: the tokens that end a turn, with their text.
        reasons: whether the template knows `</think>`; the stand-in then has some reasoning too.
    """

    def __init__(
        self,
        render: Render,
        encode: Callable[[str], list[int]],
        stops: Mapping[int, str],
        *,
        reasons: bool = False,
    ) -> None:
        self._render, self._encode, self._stops = render, encode, dict(stops)
        self._thought = f"<think>\n{_MARK}\n</think>\n\n" if reasons else ""

    def prompt(self, messages: Messages, tools: list[dict[str, Any]] | None) -> list[int]:
        """Ids of a conversation up to where the assistant's turn begins."""
        return self._encode(self._render(messages, add_generation_prompt=True, tools=tools))

    def answer(self, messages: Messages, last: int | None, tools: list[dict[str, Any]] | None) -> list[int]:
        """Ids that follow an assistant's turn: its end where it has none, the messages, and the next turn's beginning.

        Args:
            messages: what came back, at least one. last: the turn's last token; None: it ended otherwise.

        Raises:
            UserError: the template refuses the messages, or changes earlier text when messages are added.
        """
        after, end, token = self._following(messages, tools)
        ids = self._encode(after[end:])
        # The model wrote the end itself, perhaps by another of its tokens. In a template whose turns end where the next
        # one's header begins, that is the header.
        written = last in self._stops and ids[:1] == [last if token is None else token]
        return ids[1:] if written else ids

    def _following(self, messages: Messages, tools: list[dict[str, Any]] | None) -> tuple[str, int, int | None]:
        """The stand-in conversation with the messages, where in it the assistant's text ends, and by which token."""
        problem: UserError | None = None
        for turn in self._stand_ins(messages):
            conversation: Messages = [{"role": "user", "content": "?"}, turn]
            try:
                before = self._render(conversation, add_generation_prompt=False, tools=tools)
                after = self._render([*conversation, *messages], add_generation_prompt=True, tools=tools)
            except UserError as error:
                problem = problem or error
                continue
            if (place := before.rfind(_MARK)) < 0:
                continue
            found = [
                (at, -len(text), token) for token, text in self._stops.items() if (at := before.find(text, place)) >= 0
            ]
            start, length, token = min(found, default=(len(before), 0, None))
            # What the template puts behind the turn where nothing follows (Phi-3: an end of text) is not the turn's.
            if after.startswith(before[: start - length]):
                return after, start, token
            problem = _unstable(before, after, messages)
        assert problem is not None
        raise problem

    def _stand_ins(self, messages: Messages) -> Iterator[dict[str, Any]]:
        answered = [m for m in messages if m.get("role") == "tool"]
        if messages[0].get("role") == "tool":
            # Some templates write the calls' names into the answers, and some know one call a turn only.
            calls = [_call(message) for message in answered]
            for some in [calls, calls[:1]] if calls[1:] else [calls]:
                yield {"role": "assistant", "content": self._thought, "tool_calls": some}
        yield {"role": "assistant", "content": self._thought + _MARK}


def _call(answer: dict[str, Any]) -> dict[str, Any]:
    function = {"name": answer.get("name") or _MARK, "arguments": {_MARK: 0}}
    return {"type": "function", "id": answer.get("tool_call_id") or "call00000", "function": function}


def _unstable(before: str, after: str, messages: Messages) -> UserError:
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    return UserError(
        f"the chat template rewrites an assistant's turn once a message of role {messages[0].get('role')!r} follows: "
        f"{before[max(same - 20, 0) : same + 40]!r} becomes {after[max(same - 20, 0) : same + 40]!r}",
        reason="the tokens of earlier turns stay as they were sampled, so the model would be trained on conversations "
        "that the template never writes",
        fix="give model.chat_template a template that leaves earlier turns as they are (many that drop reasoning have "
        "a switch for it: model.chat_template_kwargs)",
    )
