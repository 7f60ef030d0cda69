"""Examples to imitate and preference pairs as token sequences with their loss masks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tandem.rl.chat import Scored, assistant_examples, encode, render, with_system_prompt
from tandem.rl.columns import MESSAGE_COLUMNS, check_columns, own_keys, plain_messages, role_of, shape_of
from tandem.rl.errors import UserError, short
from tandem.rl.samples import Sequence

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_supervised(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only_loss: bool = True,
    assistant_only_loss: bool = True,
    max_length: int | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Sequence], int]:
    """Sequences to imitate, and how many were cut to `max_length` or dropped because nothing in them is scored.

    `text` is scored from its second token on and ends with the tokenizer's end token. `prompt` + `completion`: the
    completion is scored, from where the tokens of the prompt alone and of both together part. `messages`: the
    assistant's turns with their end-of-turn tokens. With `completion_only_loss` or `assistant_only_loss` off, the
    whole sequence is. The columns `tools` and `chat_template_kwargs` reach the chat template, as in TRL.

    Raises:
        UserError: a row is wrong (see `check_columns`), the template cannot be used, or no example is left.
    """
    check_columns(dataset, "sft")
    shape = shape_of(dataset, "sft", "data.dataset_name")
    rows = [_normalised(row, dataset.features) for row in dataset.with_format(None)]
    template = _Template(tokenizer, system_prompt, chat_template_kwargs or {})
    if shape == ("text",):
        examples = [(ids, [True] * len(ids)) for ids in encode(tokenizer, [_ended(tokenizer, r["text"]) for r in rows])]
    elif shape == ("prompt", "completion"):
        examples = _completion_examples(rows, template, completion_only_loss, assistant_only_loss)
    else:
        examples = _conversation_examples(rows, template, assistant_only_loss)
    sequences = [_sequence(ids[:max_length], mask[:max_length]) for ids, mask in examples]
    kept = [s for s in sequences if s is not None]
    if not kept:
        raise UserError(
            f"none of the {len(rows)} examples has a token to learn from"
            + (f" within max_length {max_length}" if max_length else ""),
            reason="only completions or assistant turns carry loss, and a sequence's first token never does",
            fix="raise model.max_length, or give completions or assistant turns",
        )
    too_long = sum(s is None or len(e[0]) > s.num_tokens for s, e in zip(sequences, examples, strict=True))
    return kept, too_long


def load_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[Sequence, Sequence]]:
    """(chosen, rejected) pairs; both have the row number as `family` and `unit`, and equal `prompt_ids`.

    Strings end with the tokenizer's end token, messages with what the template writes, as in TRL's DPO. Answers are
    cut to `max_length`; rows whose prompt alone fills it are dropped with a warning. Where not even the first token
    is common to both texts, each keeps its own and shares no `family`.

    Raises:
        UserError: a row is wrong (see `check_columns`), its prompt is empty, the template fails, or no pair is left.
    """
    check_columns(dataset, "preference")
    rows = [_with_prompt(_normalised(row, dataset.features), i) for i, row in enumerate(dataset.with_format(None))]
    template = _Template(tokenizer, system_prompt, chat_template_kwargs or {})
    prompts, chosen, rejected = template.split_ids(rows, "chosen", "rejected")
    starts = [min(_common(p, c), _common(p, r)) for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    _warn_moved(tokenizer, prompts, starts)
    pairs = []
    for i, start in enumerate(starts):
        if max_length is None or start < max_length:
            family = i if start else -1
            pairs.append(
                (_answer(chosen[i][:max_length], start, family, i), _answer(rejected[i][:max_length], start, family, i))
            )
    if not pairs:
        raise UserError(
            f"none of the {len(rows)} pairs has room for an answer within max_length {max_length} "
            f"(the longest prompt has {max(starts)} tokens)",
            fix="raise model.max_length or shorten the prompts",
        )
    if len(pairs) < len(rows):
        log.warning(
            "%d of %d pairs dropped: the prompt alone fills max_length %s",
            len(rows) - len(pairs),
            len(rows),
            max_length,
        )
    return pairs


def load_labelled(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[Sequence, bool]]:
    """(prompt with its completion, whether it is a good one), for KTO; tokenised and cut as `load_preferences` does.

    Pairs are taken apart as in TRL: of every thousand first the chosen answers, then the rejected ones.

    Raises:
        UserError: a row is wrong (see `check_columns`), the template fails, or no answer is left.
    """
    check_columns(dataset, "labelled")
    rows = [_normalised(row, dataset.features) for row in dataset.with_format(None)]
    if "chosen" in shape_of(dataset, "labelled", "data.dataset_name"):
        rows = _unpaired([_with_prompt(row, i) for i, row in enumerate(rows)])
    template = _Template(tokenizer, system_prompt, chat_template_kwargs or {})
    prompts, answers = template.split_ids(rows, "completion")
    starts = [_common(p, a) for p, a in zip(prompts, answers, strict=True)]
    _warn_moved(tokenizer, prompts, starts)
    labelled = [
        (_answer(answers[i][:max_length], start, -1, -1), bool(rows[i]["label"]))
        for i, start in enumerate(starts)
        if max_length is None or start < max_length
    ]
    if not labelled:
        raise UserError(
            f"none of the {len(rows)} answers fits within max_length {max_length}",
            fix="raise model.max_length or shorten the prompts",
        )
    if len(labelled) < len(rows):
        log.warning("%d of %d answers dropped: the prompt fills max_length", len(rows) - len(labelled), len(rows))
    return labelled


class _Template:
    """The tokenizer with what the config adds to every conversation."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, kwargs: Mapping[str, Any]
    ) -> None:
        self.tokenizer, self.system_prompt, self._kwargs = tokenizer, system_prompt, kwargs

    def kwargs(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The template's variables: the config's, then the row's own."""
        tools = _decoded(row, "tools", list, number)
        return {
            **self._kwargs,
            **({"tools": tools} if tools else {}),
            **(_decoded(row, "chat_template_kwargs", dict, number) or {}),
        }

    def split_ids(self, rows: list[dict[str, Any]], *answers: str) -> list[list[list[int]]]:
        """Token ids of every row's prompt alone, then, for each answer column, of the prompt with that answer."""
        rendered = not isinstance(rows[0]["prompt"], str)
        texts: list[list[str]] = [[] for _ in range(1 + len(answers))]
        for i, row in enumerate(rows):
            if rendered:
                head, kwargs = with_system_prompt(row["prompt"], self.system_prompt), self.kwargs(row, i)
                texts[0].append(render(self.tokenizer, head, add_generation_prompt=True, kwargs=kwargs, row=i))
                full = [render(self.tokenizer, head + row[a], kwargs=kwargs, row=i) for a in answers]
            else:
                texts[0].append(row["prompt"])
                full = [row["prompt"] + _ended(self.tokenizer, row[a]) for a in answers]
            for column, text in zip(texts[1:], full, strict=True):
                column.append(text)
        return [encode(self.tokenizer, column, rendered=rendered) for column in texts]


def _completion_examples(
    rows: list[dict[str, Any]], template: _Template, completion_only: bool, assistant_only: bool
) -> list[Scored]:
    prompts, both = template.split_ids(rows, "completion")
    starts = [_common(p, b) for p, b in zip(prompts, both, strict=True)]
    if completion_only:
        _warn_moved(template.tokenizer, prompts, starts)
    examples = []
    for i, (row, ids, start) in enumerate(zip(rows, both, starts, strict=True)):
        mask = [not completion_only or t >= start for t in range(len(ids))]
        if completion_only and assistant_only and any(role_of(m) != "assistant" for m in row["completion"]):
            # Tool output and user turns inside the completion are not the model's to learn.
            head = with_system_prompt(row["prompt"], template.system_prompt)
            found = assistant_examples(
                template.tokenizer,
                head + row["completion"],
                kwargs=template.kwargs(row, i),
                row=i,
                first=len(head),
            )
            # Only a whole conversation begins with the prompt as it stands there; marks may score some of it.
            examples += [(own, [m and (own != ids or t >= start) for t, m in enumerate(turn)]) for own, turn in found]
        else:
            examples.append((ids, mask))
    return examples


def _conversation_examples(rows: list[dict[str, Any]], template: _Template, assistant_only: bool) -> list[Scored]:
    conversations = [with_system_prompt(row["messages"], template.system_prompt) for row in rows]
    if not assistant_only:
        texts = [
            render(template.tokenizer, c, kwargs=template.kwargs(r, i), row=i)
            for i, (c, r) in enumerate(zip(conversations, rows, strict=True))
        ]
        return [(ids, [True] * len(ids)) for ids in encode(template.tokenizer, texts, rendered=True)]
    found = [
        assistant_examples(template.tokenizer, c, kwargs=template.kwargs(r, i), row=i)
        for i, (c, r) in enumerate(zip(conversations, rows, strict=True))
    ]
    if split := sum(len(examples) > 1 for examples in found):
        log.warning(
            "the chat template rewrites earlier turns, so %d of %d conversations became one example per assistant "
            "turn; a template with {%% generation %%} markers (model.chat_template) keeps them whole",
            split,
            len(found),
        )
    return [example for examples in found for example in examples]


def _decoded(row: Mapping[str, Any], column: str, kind: type, number: int) -> Any:
    """A value that may be given as JSON text, which keeps Arrow from giving it the keys of other rows."""
    value = row.get(column)
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"row {number}, column {column!r} is no JSON: {error}: {short(value)}") from error
    if value is not None and not isinstance(value, kind):
        raise UserError(f"row {number}, column {column!r} is {short(value)}, not a {kind.__name__}")
    return value


def _sequence(ids: list[int], mask: list[bool]) -> Sequence | None:
    """None where nothing can be scored; the first token never can."""
    first = next((i for i in range(1, len(ids)) if mask[i]), None)
    return None if first is None else Sequence(ids[:first], ids[first:], mask[first:])


def _answer(ids: list[int], start: int, family: int, unit: int) -> Sequence:
    start = max(start, 1)
    return Sequence(ids[:start], ids[start:], [True] * (len(ids) - start), family=family, unit=unit)


def _common(ids: list[int], other: list[int]) -> int:
    """Number of leading tokens that two sequences have in common."""
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))


def _warn_moved(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], starts: list[int]) -> None:
    moved = [i for i, (p, start) in enumerate(zip(prompts, starts, strict=True)) if start < len(p)]
    if moved:
        tail = tokenizer.decode(prompts[moved[0]][starts[moved[0]] :])
        log.warning(
            "in %d of %d rows the prompt's last tokens change once an answer follows (row %d: %r), so these are scored "
            "with the answer; end prompts where a token ends, or use a template that renders prompts alike",
            len(moved),
            len(prompts),
            moved[0],
            tail,
        )


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with the end token's text behind it, unless it is there."""
    end = tokenizer.eos_token
    if end is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token",
            reason="a model trained without it never stops",
            fix="use a tokenizer with eos_token",
        )
    return text if text.endswith(end) else text + end


def _with_prompt(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A preference row whose prompt stands apart."""
    if "prompt" in row and isinstance(row["prompt"], str) == isinstance(row["chosen"], str):
        return row
    from trl.data_utils import maybe_extract_prompt

    parts = {**row, **maybe_extract_prompt({k: row[k] for k in ("prompt", "chosen", "rejected") if k in row})}
    if empty := [name for name in ("prompt", "chosen", "rejected") if not parts[name]]:
        raise UserError(
            f"row {number}: no {empty[0]} is left after taking what `chosen` and `rejected` begin with alike "
            f"as the prompt: {short(row['chosen'])} and {short(row['rejected'])}",
            fix="give a `prompt` column, or conversations that begin alike and then differ",
        )
    return parts


def _unpaired(rows: list[dict[str, Any]], block: int = 1000) -> list[dict[str, Any]]:
    """Preference rows as labelled ones. An answer is not followed by the other one to its prompt: KTO estimates the KL
    divergence from prompts with the answer before their own."""
    return [
        {**row, "completion": row[column], "label": column == "chosen"}
        for start in range(0, len(rows), block)
        for column in ("chosen", "rejected")
        for row in rows[start : start + block]
    ]


def _normalised(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """The row with every list of messages in role/content form, and the template's variables as they were written."""
    row = {key: plain_messages(value, features[key]) if key in MESSAGE_COLUMNS else value for key, value in row.items()}
    row |= {key: own_keys(row[key], features[key]) for key in ("tools", "chat_template_kwargs") if key in row}
    if "conversations" in row and "messages" not in row:
        row["messages"] = row.pop("conversations")
    return row
