"""Chat templates: from messages to token ids, and which of those tokens the assistant wrote.

Text is rendered by the tokenizer's own template, which already writes the special tokens, so rendered text is
tokenised without adding them a second time; plain strings get the tokenizer's usual special tokens, as in TRL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.rl.errors import UserError
from tandem.rl.samples import Messages

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Tokens that end a turn in widespread templates; some models list only their end-of-text token as `eos`.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
# Texts per tokenizer call: enough for its threads to share, little enough to keep the encodings' memory small.
_ENCODE_BATCH = 1000

Scored = tuple[list[int], list[bool]]
"""Token ids and, for each, whether it carries loss."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    *,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids that a model continues: a string as it stands, messages up to where the assistant's turn begins.

    `system_prompt` is put before messages that have no system message; strings never get one.

    Raises:
        UserError: messages but no chat template, or the template refuses them.
    """
    if isinstance(prompt, str):
        return encode(tokenizer, [prompt])[0]
    text = render(
        tokenizer, with_system_prompt(prompt, system_prompt), add_generation_prompt=True, kwargs=chat_template_kwargs
    )
    return encode(tokenizer, [text], rendered=True)[0]


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of sampled ids without special tokens, spaces as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def with_system_prompt(messages: Messages, system_prompt: str | None) -> Messages:
    """The messages, begun by `system_prompt` unless there is none or they begin with a system message already."""
    if not system_prompt or (messages and messages[0].get("role") in ("system", "developer")):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    row: int | None = None,
) -> str:
    """The text of a conversation.

    Args:
        kwargs: further variables for the template (`tools` among them).
        row: named in errors.

    Raises:
        UserError: no chat template, or the template raised.
    """
    require_chat_template(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(
                _texts(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **(kwargs or {})
            )
        )
    except Exception as error:  # a template is the user's program: it can raise anything
        raise _template_error(error, messages, row) from error


def _texts(messages: Messages) -> Messages:
    """The messages with lists of text parts as one text: a template may leave such a list out (Qwen3) or print it."""

    def text(content: Any) -> Any:
        return "".join(part["text"] for part in content) if isinstance(content, list) else content

    return [{**m, "content": text(m["content"])} if "content" in m else m for m in messages]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, rendered: bool = False) -> list[list[int]]:
    """Token ids of each text; `rendered` text holds its special tokens already."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _ENCODE_BATCH):
        batch = list(texts[start : start + _ENCODE_BATCH])
        # Plain text goes through the tokenizer's defaults, which decide about the begin token.
        ids.extend((tokenizer(batch, add_special_tokens=False) if rendered else tokenizer(batch))["input_ids"])
    return ids


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where conversational data meets a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the data are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template",
            reason="messages become text through a template, and a base model has none",
            fix="set model.chat_template to a Jinja file, use an instruct model, or give prompts as plain strings",
        )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Replace this tokenizer's chat template by the Jinja file at `path`.

    Raises:
        UserError: the file cannot be read, is empty, or is not valid Jinja (with the line).
    """
    import jinja2

    try:
        template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the chat template {str(path)!r}: {error}", fix="point model.chat_template at a Jinja file"
        ) from error
    if not template.strip():
        raise UserError(f"the chat template {str(path)!r} is empty", fix="point model.chat_template at a Jinja file")
    try:
        # transformers' own tag, which plain Jinja does not know, leaves the rest of the syntax as it is.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template {str(path)!r} is not valid Jinja, line {error.lineno}: {error.message}",
            fix="correct that line",
        ) from error
    tokenizer.chat_template = template


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    extra: Sequence[int] = (),
) -> tuple[int, ...]:
    """Ids that end a completion, ascending: the generation config's and the tokenizer's end tokens, the end-of-turn
    tokens that the chat template writes, and `extra`.

    Raises:
        UserError: an extra id lies outside the vocabulary.
    """
    ids = set(extra)
    if wrong := sorted(i for i in ids if not 0 <= i < len(tokenizer)):
        raise UserError(
            f"rollout.stop_token_ids names {wrong[0]}, but the vocabulary has {len(tokenizer)} tokens",
            fix=f"give ids from 0 to {len(tokenizer) - 1}",
        )
    eos = getattr(generation_config, "eos_token_id", None)
    ids.update([eos] if isinstance(eos, int) else eos or [])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if template := _template_text(tokenizer):
        # Only tokens of their own count: where the vocabulary lacks one, its text is several tokens.
        added = tokenizer.get_added_vocab()
        ids.update(added[token] for token in _END_OF_TURN if token in added and token in template)
    return tuple(sorted(ids))


def assistant_examples(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    kwargs: Mapping[str, Any] | None = None,
    row: int | None = None,
    first: int = 0,
) -> list[Scored]:
    """The conversation's tokens, of which only the assistant's turns with their end-of-turn tokens are scored.

    A template that marks the assistant's text with `{% generation %}` is believed. Otherwise a turn is what the
    rendered text gains from the generation prompt before it to its own end. A template that rewrites earlier turns
    (dropping their reasoning, say) gives no text in which every turn stands as the model would write it; then each
    turn becomes an example of its own, with the history that the model sees when it writes that turn.

    Returns:
        One example, or one per assistant turn where the template rewrites history; no mask bit is set where the
        conversation has no assistant turn.

    Raises:
        UserError: the template is missing, raises, or renders a turn so that it does not follow its prompt.
    """
    require_chat_template(tokenizer)
    if not tokenizer.is_fast:
        raise UserError(
            f"loss on assistant turns needs a fast tokenizer, and {tokenizer.name_or_path!r} has none",
            reason="only fast tokenizers say which characters a token covers",
            fix="set data.assistant_only_loss to false, or give the data as prompt + completion",
        )
    if _GENERATION_TAG.search(_template_text(tokenizer)):
        return [_marked_example(tokenizer, messages, kwargs, row)]
    full = render(tokenizer, messages, kwargs=kwargs, row=row)
    turns = list(_turns(tokenizer, messages, kwargs, row, first))
    # Some templates put more behind a turn that nothing follows (Phi-3: an end of text), which then is not in `full`.
    inside = [next((end for end in ends if full.startswith(text[:end])), None) for text, _, ends in turns]
    spans = [(start, end) for (_, start, _), end in zip(turns, inside, strict=True) if end is not None]
    if len(spans) == len(turns):
        return [_example(tokenizer, full, spans)]
    return [_example(tokenizer, text, [(start, ends[0])]) for text, start, ends in turns]


def _turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    kwargs: Mapping[str, Any] | None,
    row: int | None,
    first: int,
) -> Iterator[tuple[str, int, list[int]]]:
    """For each assistant turn the text up to its end, and where in it the assistant's own begins and may end."""
    for i, message in enumerate(messages):
        if i < first or message["role"] != "assistant":
            continue
        if i == 0:
            raise UserError(
                f"{_where(row)}the conversation begins with an assistant turn",
                reason="without a turn before it, nothing tells its text from the template's header",
                fix="begin it with a user or system message, set data.system_prompt, or mark the assistant's text "
                "with {% generation %} in model.chat_template",
            )
        before = render(tokenizer, messages[:i], add_generation_prompt=True, kwargs=kwargs, row=row)
        text = render(tokenizer, messages[: i + 1], kwargs=kwargs, row=row)
        if not text.startswith(before):
            raise UserError(
                f"{_where(row)}the chat template renders assistant turn {i} so that it does not continue its prompt: "
                f"the prompt ends in {before[-40:]!r}, the turn's text is {text[-80:]!r}",
                reason="loss on assistant turns needs to know where the assistant's own text begins",
                fix="give model.chat_template a template that marks it with {% generation %} … {% endgeneration %}, "
                "try model.chat_template_kwargs (enable_thinking: false), or set data.assistant_only_loss to false",
            )
        yield text, len(before), _turn_ends(tokenizer, text, len(before))


def _turn_ends(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> list[int]:
    """Where a turn may end: behind each of its last special tokens, the last one first, without the line break that
    templates put there."""
    tokens, ends, stripped = tuple(tokenizer.get_added_vocab()), [], text.rstrip()
    while len(stripped) > start and (token := next((t for t in tokens if stripped.endswith(t)), None)):
        ends.append(len(stripped))
        stripped = stripped[: -len(token)].rstrip()
    # A template without such tokens may end a turn by the line break alone, which then must be learnt.
    return ends or [len(text)]


def _example(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]) -> Scored:
    """Ids of `text`, scored where a token covers a character of one of the spans."""
    encoding = tokenizer(text, add_special_tokens=False)
    mask = [False] * len(encoding["input_ids"])
    for start, end in spans:
        tokens = [t for t in (encoding.char_to_token(c) for c in (start, end - 1)) if t is not None]
        if len(tokens) < 2:  # a tokenizer may drop the white space at an edge: then look at every character
            tokens = [t for t in (encoding.char_to_token(c) for c in range(start, end)) if t is not None]
        if tokens:
            mask[tokens[0] : tokens[-1] + 1] = [True] * (tokens[-1] + 1 - tokens[0])
    _complete_characters(encoding, mask)
    return list(encoding["input_ids"]), mask


def _complete_characters(encoding: Any, mask: list[bool]) -> None:
    """Extend every scored run to the end of its last character, of which an emoji, say, takes several tokens while
    `char_to_token` names the first."""
    for i in range(1, len(mask)):
        if mask[i - 1] and not mask[i]:
            before, here = encoding.token_to_chars(i - 1), encoding.token_to_chars(i)
            mask[i] = before is not None and here is not None and here.start < before.end


def _marked_example(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any] | None, row: int | None
) -> Scored:
    try:
        encoding: Any = tokenizer.apply_chat_template(
            _texts(messages), return_dict=True, return_assistant_tokens_mask=True, **(kwargs or {})
        )
    except Exception as error:  # a template is the user's program: it can raise anything
        raise _template_error(error, messages, row) from error
    ids, mask = list(encoding["input_ids"]), [bool(m) for m in encoding["assistant_masks"]]
    _complete_characters(encoding, mask)
    stops = stop_token_ids(tokenizer)
    for i in range(1, len(ids)):
        # Some templates close the marker before the end-of-turn token; a model that never learns it never stops.
        if mask[i - 1] and not mask[i] and ids[i] in stops and ids[i - 1] not in stops:
            mask[i] = True
    return ids, mask


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template in use, "" where there is none; a tokenizer may carry several by name."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or ""


def _template_error(error: Exception, messages: Messages, row: int | None) -> UserError:
    roles = ", ".join(str(m.get("role")) for m in messages)
    return UserError(
        f"{_where(row)}the chat template cannot render a conversation of {roles or 'no messages'}: "
        f"{type(error).__name__}: {error}",
        fix="change the row, model.chat_template or model.chat_template_kwargs",
    )


def _where(row: int | None) -> str:
    return "" if row is None else f"row {row}: "
