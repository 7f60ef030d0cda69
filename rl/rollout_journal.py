"""The journal of a run: every rollout, on the disk before anything is learned from it. `journal.jsonl`.

One line per completion, plain ASCII JSON that `datasets.load_dataset("json", data_files=…)` reads. The file only ever
grows: a rollout is appended and brought to the disk as a whole, and a checkpoint names the place up to which it has
learned. A resumed run takes what lies behind that place instead of generating it again, and `rl-train replay` learns
from the file alone.

Every line ends with the SHA-256 of what stands before it in the line, and counts itself among the lines of its
rollout. So a line that was torn by a kill, a flipped bit or a lost line is noticed, and the rollout it belongs to is
not used. Floats are written so that they are read as the same number; what JSON has no word for (NaN, infinities)
stands in `not_finite`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from tandem.rl.config import Config
from tandem.rl.errors import UserError
from tandem.rl.journal import escaped, sync, unescaped
from tandem.rl.samples import Completion, Episode, Prompt, Scored

_CHECKSUM = b', "sha256": "'
_TAIL = len(_CHECKSUM) + 64 + len(b'"}\n')

# Settings that change neither what is generated nor what is learned from it.
_IRRELEVANT = {"run_name", "output_dir", "log", "checkpoint", "eval", "watch"}


@dataclass(frozen=True)
class Mark:
    """A place in the journal, between two rollouts: how many stand before it, and in how many bytes."""

    rollouts: int = 0
    size: int = 0


@dataclass
class Rollout:
    """One journalled rollout.

    Attributes:
        number: counted from 0. position: rows of the prompt stream that were used before it.
        step: optimiser steps that were finished before it. source: fingerprint of the config that it was made with.
        rows: its completions with their rewards, in the order in which they are learned from; no advantages.
        logged: what the reward functions logged themselves, averaged, and what there is to say of the sampling.
        used: rows of the prompt stream that it used up. visits: what it told of prompts, see `curriculum`, those of
            groups included that are no part of it.
    """

    number: int
    position: int
    step: int
    source: str
    rows: list[Scored]
    logged: dict[str, float]
    used: int
    visits: list[tuple[int, float]]


class RolloutJournal:
    """The journal of a run that is training: first gives what is left behind `mark`, then takes what is new.

    Args:
        mark: the place up to which the run's checkpoint has learned.
        source: fingerprint of the run's config; rollouts of another one are not given.
        note: told why rollouts that stand in the file are not given.
    """

    def __init__(self, run_dir: Path, mark: Mark, *, source: str, note: Any = print) -> None:
        self.path = journal_path(run_dir)
        self._source, self._note = source, note
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < mark.size:
            note(f"{self.path} has lost rollouts: it holds {size} bytes, and the checkpoint knew of {mark.size}")
            whole = whole_rollouts(self.path, Mark(), lambda text: None) if size else ()
            mark = Mark(mark.rollouts, max((end for _, end in whole), default=0))
        self.mark = self.before = mark  # behind the rollout that was taken or appended last, and before it
        self._left: Iterator[tuple[Rollout, int]] | None = None
        if size > mark.size:
            self._left = whole_rollouts(self.path, mark, note)

    def take(self, position: int) -> Rollout | None:
        """The next rollout that was generated but not learned from, if it is the one that comes next."""
        if self._left is None:
            return None
        rollout, end = next(self._left, (None, 0))
        if rollout is not None and rollout.source != self._source:
            self._note("the rollouts behind the checkpoint were made with another config and are generated anew")
            rollout = None
        if rollout is not None and (rollout.number, rollout.position) != (self.mark.rollouts, position):
            self._note(f"the journal goes on with rollout {rollout.number}, not {self.mark.rollouts}: generating anew")
            rollout = None
        if rollout is None:
            self.cut(self.mark)
            return None
        self.before, self.mark = self.mark, Mark(self.mark.rollouts + 1, end)
        return rollout

    def append(
        self,
        rows: Sequence[Scored],
        logged: dict[str, float],
        *,
        position: int,
        step: int,
        used: int | None = None,
        visits: Sequence[tuple[int, float]] = (),
    ) -> Mark:
        """Bring a rollout to the disk; returns the place behind it. `used`: None: one row of the stream per group.

        Raises:
            UserError: it cannot be written. The file is then as it was before.
        """
        self.cut(self.mark)  # what the run has not asked for will not be asked for, and a torn line must not go on
        used = _groups(rows) if used is None else used
        number = self.mark.rollouts
        rollout = Rollout(number, position, step, self._source, list(rows), logged, used, list(visits))
        created = not self.path.exists()
        try:
            with self.path.open("ab") as file:
                self._write(file, rollout)
            if created:
                sync(self.path.parent)
        except OSError as error:
            raise UserError(
                f"the rollout after step {step} cannot be written to {str(self.path)!r}: {error}",
                reason="nothing is learned from a rollout that is not on the disk",
                fix="make room or the folder writable, then `rl-train resume` the run",
            ) from error
        return self.mark

    def _write(self, file: BinaryIO, rollout: Rollout) -> None:
        start = os.fstat(file.fileno()).st_size
        try:
            for line in lines_of(rollout):
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), start)
            raise
        self.before, self.mark = self.mark, Mark(rollout.number + 1, os.fstat(file.fileno()).st_size)

    def cut(self, mark: Mark) -> None:
        """Forget what stands behind `mark`: rollouts that must not be learned from, and torn lines."""
        self._left = None
        self.mark = self.before = mark
        if self.path.exists() and self.path.stat().st_size > mark.size:
            with self.path.open("r+b") as file:
                file.truncate(mark.size)
                os.fsync(file.fileno())


def journal_path(run_dir: Path) -> Path:
    return Path(run_dir) / "journal.jsonl"


def read_journal(run_dir: Path, note: Any = print) -> Iterator[Rollout]:
    """The rollouts of a run from the first one on, up to the first that is damaged or was never finished.

    Raises:
        UserError: the run has no journal.
    """
    path = journal_path(run_dir)
    if not path.is_file():
        raise UserError(
            f"{run_dir} has no journal.jsonl", fix="only runs with rollouts and checkpoint.journal=true have one"
        )
    for rollout, _ in whole_rollouts(path, Mark(), note):
        yield rollout


def source_of(config: Config, *, but: Collection[str] = ()) -> str:
    """Fingerprint of everything in a config that rollouts and what is learned from them depend on.

    Args:
        but: further sections that do not matter.
    """
    left_out = _IRRELEVANT.union(but)
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in left_out}
    if "rewards" in settings:
        del settings["rewards"]["overlap"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _groups(rows: Sequence[Scored]) -> int:
    return len({row.group for row in rows})


# --- lines ------------------------------------------------------------------------------------------------------------


def lines_of(rollout: Rollout) -> Iterator[bytes]:
    """A rollout as it stands in the file."""
    for number in range(len(rollout.rows)):
        yield _line(rollout, number)


def _line(rollout: Rollout, number: int) -> bytes:
    row = rollout.rows[number]
    not_finite: dict[str, str] = {}

    def number_of(value: float | None, place: str) -> float | None:
        if value is None or math.isfinite(value):
            return None if value is None else float(value)
        not_finite[place] = repr(float(value))
        return None

    record = {
        "rollout": rollout.number,
        "row": number,
        "rows": len(rollout.rows),
        "position": rollout.position,
        "used": rollout.used,
        "step": rollout.step,
        "source": rollout.source,
        "group": row.group,
        "prompt_index": row.prompt.index,
        "prompt_ids": [int(i) for i in row.prompt.ids],
        "prompt": json.dumps(row.prompt.prompt),
        "completion": escaped(row.text),
        "completion_ids": [int(i) for i in row.completion.ids],
        "log_probs": [number_of(p, f"log_probs/{i}") for i, p in enumerate(row.completion.log_probs)],
        "truncated": bool(row.completion.truncated),
        "reward": number_of(row.reward, "reward"),
        "rewards": json.dumps({n: number_of(v, f"rewards/{n}") for n, v in row.rewards.items()}),
        "logged": json.dumps({n: float(v) for n, v in rollout.logged.items()}) if number == 0 else "{}",
        "visits": json.dumps(rollout.visits if number == 0 else []),
        "more": json.dumps([_unnamed(row.completion, _COMPLETION), _unnamed(row, _SCORED)]),
    }
    body = json.dumps({**record, "not_finite": json.dumps(not_finite)}, allow_nan=False).encode("ascii")[:-1]
    return body + _CHECKSUM + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


_COMPLETION = {"ids", "log_probs", "truncated"}
_SCORED = {"prompt", "completion", "group", "text", "rewards", "reward", "advantage", "turn_advantages"}


def _unnamed(value: Completion | Scored, named: set[str]) -> dict[str, Any]:
    """Fields that have no column of their own, where they are not at their default."""
    found = {}
    for field in fields(value):
        if field.name in named:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if (own := getattr(value, field.name)) != default:
            found[field.name] = own.record() if isinstance(own, Episode) else own
    return found


def _record_of(line: bytes) -> dict[str, Any] | None:
    """The record of a line that is whole; else None."""
    body, rest = line[:-_TAIL], line[-_TAIL:]
    digest = hashlib.sha256(body).hexdigest().encode()
    return json.loads(body + b"}") if rest == _CHECKSUM + digest + b'"}\n' else None


def _row_of(record: dict[str, Any]) -> Scored:
    not_finite = {place: float(text) for place, text in json.loads(record["not_finite"]).items()}
    completion, scored = json.loads(record["more"])
    if "episode" in completion:
        completion["episode"] = Episode(**completion["episode"])
    return Scored(
        prompt=Prompt(record["prompt_index"], record["prompt_ids"], json.loads(record["prompt"])),
        completion=Completion(
            ids=record["completion_ids"],
            log_probs=[not_finite.get(f"log_probs/{i}", p) for i, p in enumerate(record["log_probs"])],
            truncated=record["truncated"],
            **completion,
        ),
        group=record["group"],
        text=unescaped(record["completion"]),
        rewards={n: not_finite.get(f"rewards/{n}", v) for n, v in json.loads(record["rewards"]).items()},
        reward=not_finite.get("reward", record["reward"]),
        **scored,
    )


def whole_rollouts(path: Path, mark: Mark, note: Any) -> Iterator[tuple[Rollout, int]]:
    """Rollouts from `mark` on with the place behind each, up to the first that is not whole."""
    end, rows = mark.size, 0
    rollout: Rollout | None = None
    with path.open("rb") as file:
        file.seek(mark.size)
        while line := file.readline():
            record = _record_of(line)
            if record is None:
                if line.endswith(b"\n"):
                    note(f"{path} is damaged at byte {end}: what follows is not used")
                return
            if record["row"] == 0 and rollout is None:
                rows = record["rows"]
                logged = json.loads(record["logged"])
                place = (record["rollout"], record["position"], record["step"], record["source"])
                visits = [(index, share) for index, share in json.loads(record.get("visits", "[]"))]
                rollout = Rollout(*place, [], logged, record.get("used", -1), visits)
            if rollout is None or (record["rollout"], record["row"]) != (rollout.number, len(rollout.rows)):
                note(f"{path} lacks lines near byte {end}: what follows is not used")
                return
            rollout.rows.append(_row_of(record))
            end += len(line)
            if len(rollout.rows) == rows:
                if rollout.used < 0:  # from before rollouts could use more
                    rollout.used = _groups(rollout.rows)
                yield rollout, end
                rollout = None
