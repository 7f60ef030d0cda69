"""The columns that hold a row's known answer, as texts."""

from __future__ import annotations

from typing import Any

from tandem.rl.errors import UserError

ANSWER_COLUMNS = ("answer", "solution", "ground_truth")
"""Columns that may hold the known answer; the first that has a value counts."""


def known_answers(
    reward: str, num_rows: int, candidates: list[list[Any] | None], columns: dict[str, Any]
) -> list[list[str]]:
    """Per row the texts that are right; empty where no column has a value.

    Args:
        reward: name of the reward, for the error.
        candidates: the columns of ANSWER_COLUMNS, None for those that do not exist.
        columns: the other columns, for the error.

    Raises:
        UserError: none of the columns exists.
    """
    present = [column for column in candidates if column is not None]
    if not present:
        ours = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
        raise no_known_answers(reward, [name for name in columns if name not in ours])
    rows = [next((c[row] for c in present if c[row] is not None), None) for row in range(num_rows)]
    return [_texts(value) for value in rows]


def no_known_answers(reward: str, columns: list[str], data: str = "the data set") -> UserError:
    """The error for data, named in words, that have these columns and none of ANSWER_COLUMNS."""
    return UserError(
        f"{reward} found none of the columns {', '.join(ANSWER_COLUMNS)}",
        reason=f"{data}'s columns are {', '.join(columns)}" if columns else f"{data} has no further columns",
        fix=f"rename the column of known answers to {ANSWER_COLUMNS[0]!r}",
    )


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(v) for v in value if v is not None] if isinstance(value, (list, tuple)) else [str(value)]
