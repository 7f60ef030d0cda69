"""What a run learns from, as fingerprints: `data.json` in the run folder.

A resumed run draws row numbers from where it stopped. With other rows under these numbers it would silently become
another run, so the data are compared by what they are once read and tokenised: rows, their order, the columns that
rewards get, and the tokens, which also change with the tokenizer and the chat template.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

from tandem.rl.errors import UserError
from tandem.rl.journal import write_whole
from tandem.rl.samples import Prompt, Sequence
from tandem.rl.training_data import TrainingData

NAME = "data.json"


def fingerprints(data: TrainingData) -> dict[str, dict[str, Any]]:
    """Number of rows and SHA-256 of everything that a run reads, by the part of the config that names it."""
    parts: dict[str, list[Any]] = {
        "data": data.prompts or data.examples or (data.answers.sequences if data.answers else []),
        "eval": data.eval_prompts or data.eval_examples or (data.eval_answers.sequences if data.eval_answers else []),
        "warmup": data.warmup,
    }
    found = {}
    for name, rows in parts.items():
        digest = hashlib.sha256()
        for row in rows:
            _add(digest, row)
        if rows:
            found[name] = {"rows": len(rows), "sha256": digest.hexdigest()}
    return found


def keep_or_compare(run_dir: Path, data: TrainingData, *, accept_changes: bool = False) -> list[str]:
    """Write the fingerprints of a run that has none yet; compare with them otherwise.

    Args:
        accept_changes: take the new data as the run's own.

    Returns:
        What has changed and was accepted, in words.

    Raises:
        UserError: the training or warm-up data are not those that the run was started with.
    """
    path, own = run_dir / NAME, fingerprints(data)
    try:
        before = json.loads(path.read_bytes())
        changed = [_change(name, before.get(name), own.get(name)) for name in ("data", "eval", "warmup")]
    except FileNotFoundError:
        before, changed = None, []
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            reason="it says which data the run was started with",
            fix=f"remove it if you know that the data are the same: rm {path}",
        ) from error
    differences = [text for text in changed if text]
    if differences and not accept_changes:
        raise UserError(
            "\n".join(differences),
            reason="the run would go on with other rows than it counted so far",
            fix="put the old data back, start a new run, or say that this is meant: rl-train resume --changed-data",
        )
    # What was switched on since is recorded from now on, and what was switched off stays known.
    if (known := {**(before or {}), **own}) != before:
        write_whole(path, (json.dumps(known, indent=2) + "\n").encode("ascii"))
    return differences


def _change(name: str, before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    if before is None or now is None:
        # A warm-up or an evaluation that is switched on or off is a change of the config, and visible there.
        return ""
    if before["sha256"] == now["sha256"]:
        return ""
    return (
        f"the rows of {name}.dataset_name have changed: {now['rows']} rows with sha256 {now['sha256']}, "
        f"the run was started with {before['rows']} rows with sha256 {before['sha256']}"
    )


def _add(digest: Any, row: Prompt | Sequence) -> None:
    if isinstance(row, Prompt):
        ids, others = [row.ids], [row.prompt, row.columns]
    else:
        ids, others = [row.prompt_ids, row.completion_ids, [int(m) for m in row.mask]], []
    for numbers in ids:
        digest.update(len(numbers).to_bytes(8, "little"))
        digest.update(array("q", numbers).tobytes())
    if others:
        text = json.dumps(others, sort_keys=True, default=_plain).encode("ascii")
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)


def _plain(value: Any) -> str:
    """Values that JSON has no word for, by what they print as, unless that is where they lie in memory."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)
