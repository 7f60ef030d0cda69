"""What is said of rewards that fail now and then while a run goes on (`rewards.on_error`)."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.rl.errors import UserError
from tandem.rl.samples import Scored


def errors_in_words(rows: Sequence[Scored], place: str) -> str:
    """One message about everything that failed on a batch; empty where nothing did.

    Args:
        place: which batch, as in `step 12`.
    """
    parts = []
    for name in dict.fromkeys(name for row in rows for name in row.errors):
        found = [i for i, row in enumerate(rows) if name in row.errors]
        first = f"row {found[0]}: {rows[found[0]].errors[name]}"
        parts.append(f"{name} on {len(found)} of {len(rows)} completions ({first})")
    if not parts:
        return ""
    skipped = len({row.group for row in rows if row.skipped})
    rest = f"; {skipped} group{'s' * (skipped != 1)} left out" if skipped else "; counted as 0"
    return f"{place}: rewards failed: {'; '.join(parts)}{rest}"


def failed_everywhere(rows: Sequence[Scored]) -> bool:
    """Whether a reward failed on every completion of a batch, as one does that is out of order."""
    return bool(rows) and any(all(name in row.errors for row in rows) for name in rows[0].errors)


def out_of_order(rows: Sequence[Scored], count: int, run_dir: object) -> UserError:
    """The end of a run whose rewards have failed on `count` whole rollouts in a row."""
    name, text = next(iter(rows[0].errors.items()))
    return UserError(
        f"reward {name!r} has failed on every completion of {count} rollouts in a row; the last time: {text}",
        reason="such a reward is out of order, and nothing is learned from it; optim.max_skipped_updates is the limit",
        fix=f"correct it, then: rl-train resume {run_dir}",
    )
