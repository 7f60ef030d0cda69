"""Every completion of a run with everything that was said about it: `rollouts/step_000012.jsonl`, one object a line.

The files are plain ASCII JSON lines that `datasets.load_dataset("json", data_files=…)` reads. JSON readers other than
Python's refuse lone surrogates (half a character, as in a prompt that was cut in the middle of an emoji), so these
are written as U+FDD0 and four hexadecimal digits; U+FDD0 is no character and free for such use. `read_rollouts`
gives the text back as it was.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tandem.rl.errors import UserError
from tandem.rl.samples import Messages, Scored

Kind = Literal["step", "eval"]
_KINDS: tuple[Kind, ...] = ("step", "eval")

_ESCAPE = "\ufdd0"
_TO_ESCAPE = re.compile("[\ud800-\udfff\ufdd0]")
_ESCAPED = re.compile("\ufdd0([0-9a-f]{4})")


def write_rollouts(run_dir: Path, step: int, rows: Sequence[Scored], kind: Kind = "step") -> Path:
    """Write the completions of one step, or of the evaluation at that step, and return the file.

    The file appears whole or not at all: it is written beside, brought to the disk, and renamed.
    """
    lines = [json.dumps(_record(step, row), allow_nan=False) + "\n" for row in rows]
    _folder(run_dir).mkdir(parents=True, exist_ok=True)
    return write_whole(_folder(run_dir) / f"{kind}_{step:06d}.jsonl", "".join(lines).encode("ascii"))


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """The records of one file, text as it was generated; a number that was not finite is None.

    Raises:
        UserError: the file cannot be read or a line is no JSON object.
    """
    records = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is no JSON: {error.msg} at character {error.pos}") from None
                if not isinstance(record, dict):
                    raise ValueError(f"line {number} holds {type(record).__name__}, not an object")
                records.append(_map_strings(record, unescaped))
    except (OSError, ValueError) as error:  # JSON and Unicode errors are ValueErrors
        raise UserError(
            f"cannot read the rollouts in {str(path)!r}: {error}",
            fix="give JSON lines, one object with prompt and completion in each, or a run's rollouts/*.jsonl",
        ) from error
    return records


def rollout_files(run_dir: Path, kind: Kind = "step") -> list[tuple[int, Path]]:
    """The files of one kind as (step, path), in order of the steps."""
    pattern = re.compile(rf"{kind}_(\d+)\.jsonl")
    folder = _folder(run_dir)
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return sorted((int(match[1]), folder / name) for name in names if (match := pattern.fullmatch(name)))


def drop_after(run_dir: Path, step: int) -> list[Path]:
    """Remove what a run wrote after `step`, and half-written files; what was removed is returned.

    A resumed run writes these steps again.
    """
    later = [path for kind in _KINDS for number, path in rollout_files(run_dir, kind) if number > step]
    torn = sorted(_folder(run_dir).glob("*.jsonl.tmp"))
    for path in later + torn:
        path.unlink()
    return later + torn


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file so that a crash at any moment leaves the old one or the new one, and return its path."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)
    return path


def prompt_text(prompt: str | Messages) -> str:
    """A prompt as one text to read; messages as `role: content` lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def _folder(run_dir: Path) -> Path:
    return Path(run_dir) / "rollouts"


def _record(step: int, row: Scored) -> dict[str, Any]:
    record = {
        "step": step,
        "group": row.group,
        "prompt_index": row.prompt.index,
        "prompt": row.prompt.prompt,
        "completion": row.text,
        "completion_ids": list(row.completion.ids),
        "log_probs": [_finite(p) for p in row.completion.log_probs],
        "truncated": row.completion.truncated,
        "rewards": {name: _finite(value) for name, value in row.rewards.items()},
        "reward": _finite(row.reward),
        "advantage": _finite(row.advantage),
    }
    if row.turn_advantages:
        episode = row.completion.episode
        record["turn_rewards"] = [_finite(reward) for reward in episode.turn_rewards] if episode else []
        record["turn_advantages"] = [_finite(value) for value in row.turn_advantages]
    if row.extra:
        record["extra"] = {name: _finite(v) if isinstance(v, float) else v for name, v in row.extra.items()}
    if row.errors:
        record["errors"] = "\n".join(f"{name}: {text}" for name, text in row.errors.items())
    if row.skipped:
        record["skipped"] = True
    if row.watched:
        record["watched"] = {name: _finite(value) for name, value in row.watched.items()}
    return _map_strings(record, escaped)


def _finite(value: float | None) -> float | None:
    # Always a float: readers fix a column's type by its first rows, and 1 would make it an integer column.
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def _map_strings(node: Any, change: Any) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, dict):
        return {change(k) if isinstance(k, str) else k: _map_strings(v, change) for k, v in node.items()}
    # Lists of numbers make up most of a record and hold nothing to change.
    if isinstance(node, (list, tuple)) and not (node and isinstance(node[0], (int, float))):
        return [_map_strings(v, change) for v in node]
    return node


def escaped(text: str) -> str:
    """Text that every JSON reader takes: lone surrogates in the spelling of this module."""
    return _TO_ESCAPE.sub(lambda match: f"{_ESCAPE}{ord(match[0]):04x}", text)


def unescaped(text: str) -> str:
    """The text that `escaped` was given."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text) if _ESCAPE in text else text


def sync(path: Path) -> None:
    """Bring a file, or a folder and with it a rename in it, to the disk, where that can be asked for (not on Windows).

    Otherwise a power cut could leave an empty file behind its new name."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
