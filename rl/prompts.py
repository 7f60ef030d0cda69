"""Prompts for reinforcement learning: tokenised once, drawn in a seeded order."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tandem.rl.chat import encode, render, with_system_prompt
from tandem.rl.columns import check_columns, plain_messages
from tandem.rl.errors import UserError
from tandem.rl.samples import Prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    max_prompt_length: int | None = None,
    limited_by: tuple[str, int] = ("data.max_prompt_length", 0),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Prompt], int]:
    """Every row's prompt as token ids, `index` being the row number, and how many were dropped as too long.

    Args:
        limited_by: key that `max_prompt_length` follows from, and the tokens that it counts beside the prompt's.

    Raises:
        UserError: a row is wrong (see `check_columns`), the chat template fails, or every prompt is too long.
    """
    check_columns(dataset, "rl")
    rows = [dict(row) for row in dataset.with_format(None)]
    prompts = [plain_messages(row.pop("prompt"), dataset.features["prompt"]) for row in rows]
    rendered = not isinstance(prompts[0], str)
    texts = [
        p
        if isinstance(p, str)
        else render(
            tokenizer,
            with_system_prompt(p, system_prompt),
            add_generation_prompt=True,
            kwargs=chat_template_kwargs,
            row=i,
        )
        for i, p in enumerate(prompts)
    ]
    ids = encode(tokenizer, texts, rendered=rendered)
    kept = [
        Prompt(index=i, ids=ids[i], prompt=prompts[i], columns=rows[i])
        for i in range(len(rows))
        if max_prompt_length is None or len(ids[i]) <= max_prompt_length
    ]
    if not kept:
        lengths, (key, beside) = [len(i) for i in ids], limited_by
        raise UserError(
            f"all {len(rows)} prompts are longer than {max_prompt_length} tokens "
            f"(the shortest has {min(lengths)}, the longest {max(lengths)})",
            fix=f"set {key} to {max(lengths) + beside} to keep them all, or shorten the prompts",
        )
    return kept, len(rows) - len(kept)


class PromptSampler:
    """The endless order in which rows are drawn: epoch after epoch, each a permutation of all rows.

    The order is a function of (seed, epoch) alone, so a counter of the rows drawn so far is all that a resumed run
    needs. Every row comes exactly once per epoch; a batch that reaches over the end of an epoch takes its rest from
    the next one and may thus hold a row twice.
    """

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        if num_rows < 1:
            raise ValueError(f"a sampler needs at least one row, not {num_rows}")
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self._latest: tuple[int, list[int]] = (-1, [])  # spares a permutation per batch; holds no state of its own

    def take(self, position: int, n: int) -> list[int]:
        """Row numbers of the `n` prompts from the absolute `position` (rows drawn before) on."""
        rows: list[int] = []
        while len(rows) < n:
            epoch, offset = divmod(position + len(rows), self.num_rows)
            rows += self._epoch(epoch)[offset : offset + n - len(rows)]
        return rows

    def _epoch(self, epoch: int) -> list[int]:
        if self._latest[0] != epoch:
            order = list(range(self.num_rows))
            if self.shuffle:
                # Of `random`, only seeding with a string and random() are promised to stay as they are; so rows are
                # sorted by random keys rather than shuffled.
                draw = random.Random(f"{self.seed}-{epoch}").random
                keys = [draw() for _ in order]
                order.sort(key=keys.__getitem__)
            self._latest = (epoch, order)
        return self._latest[1]
