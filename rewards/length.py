"""Rewards on the length of a completion, counted in tokens."""

from __future__ import annotations

from typing import Any

from tandem.rl.errors import UserError


def length_penalty(
    completion_ids: list[list[int]],
    per_token: float = 0.001,
    free_tokens: int = 0,
    max_penalty: float = 1.0,
    **_columns: Any,
) -> list[float]:
    """A price per token: -per_token × (tokens beyond the free ones), at most `max_penalty`.

    Args:
        completion_ids: token ids of each completion.
        per_token: price of a token, ≥ 0.
        free_tokens: tokens that cost nothing.
        max_penalty: largest penalty, ≥ 0.

    Raises:
        UserError: a parameter is negative.

    >>> length_penalty([[7] * 10, [7] * 400], per_token=0.01, free_tokens=20)
    [0.0, -1.0]
    """
    for name, value in (("per_token", per_token), ("free_tokens", free_tokens), ("max_penalty", max_penalty)):
        if value < 0:
            raise UserError(f"{name} is {value}, which is negative", fix=f"give {name} ≥ 0; the result is the penalty")
    # 0.0 - x, not -x: no negative zeros in logs.
    return [0.0 - min(max_penalty, per_token * max(0, len(ids) - free_tokens)) for ids in completion_ids]


def overlong_penalty(
    completion_ids: list[list[int]],
    max_completion_length: int,
    cache_length: int,
    **_columns: Any,
) -> list[float]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    0 up to `max_completion_length - cache_length` tokens, then falling linearly to -1 at `max_completion_length`,
    and -1 beyond it. Used beside a correctness reward; generation should allow `max_completion_length` tokens.

    Args:
        completion_ids: token ids of each completion.
        max_completion_length: L_max in tokens, where the penalty is full.
        cache_length: L_cache in tokens, the width of the slope.

    Raises:
        UserError: not 0 < cache_length <= max_completion_length.

    >>> overlong_penalty([[7] * 80, [7] * 90, [7] * 101], max_completion_length=100, cache_length=20)
    [0.0, -0.5, -1.0]
    """
    if not 0 < cache_length <= max_completion_length:
        raise UserError(
            f"cache_length is {cache_length} and max_completion_length is {max_completion_length}",
            reason="the penalty grows over the last cache_length tokens before max_completion_length",
            fix="give 0 < cache_length <= max_completion_length",
        )
    soft_limit = max_completion_length - cache_length
    return [0.0 - min(1.0, max(0, len(ids) - soft_limit) / cache_length) for ids in completion_ids]
