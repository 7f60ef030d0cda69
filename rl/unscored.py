"""Completions that were generated but not scored, because a reward failed and ended the run: `unscored.jsonl`.

They are those that come next, one rollout in the journal's own format. A resumed run scores them instead of generating
them again, so that it comes to the same end as a run whose reward had been right from the start. The file is gone once
they are in the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tandem.rl.config import Config
from tandem.rl.errors import UserError
from tandem.rl.journal import write_whole
from tandem.rl.rollout_journal import Mark, Rollout, lines_of, source_of, whole_rollouts
from tandem.rl.samples import Group, Prompt, Scored


class RewardsFailed(UserError):
    """A reward failed on a rollout of the training; the run stands before it."""


class Unscored:
    """The unscored completions in a run's folder.

    Args:
        note: told why completions that stand in the file are not given.
    """

    def __init__(self, run_dir: Path, config: Config, note: Callable[[str], None]) -> None:
        self.path = unscored_path(run_dir)
        # The reward is what is going to be changed; nothing that was generated depends on it.
        self._source, self._note = source_of(config, but=("rewards", "watch")), note

    def keep(self, groups: Sequence[Group], *, position: int, step: int) -> None:
        """Bring a rollout to the disk. `position`, `step`: see `Rollout`."""
        rows = [Scored(g.prompt, c, number, "", {}, 0.0) for number, g in enumerate(groups) for c in g.completions]
        rollout = Rollout(0, position, step, self._source, rows, {}, len(groups), [])
        write_whole(self.path, b"".join(lines_of(rollout)))

    def take(self, prompts: Sequence[Prompt], *, position: int, step: int) -> list[Group] | None:
        """What was generated for these prompts, if it is what comes next. It stays in the file until `forget`."""
        if not self.path.exists():
            return None
        rollout = next((found for found, _ in whole_rollouts(self.path, Mark(), self._note)), None)
        if (
            rollout is not None
            and (rollout.source, rollout.step) == (self._source, step)
            and rollout.position > position
        ):
            return None  # a later try of the same rollout
        if rollout is None or (rollout.source, rollout.position, rollout.step) != (self._source, position, step):
            self._note(f"{self.path} holds nothing that comes next in this run: generating anew")
            return None
        groups = [self._group(prompt, [r for r in rollout.rows if r.group == i]) for i, prompt in enumerate(prompts)]
        if any(group is None for group in groups):
            self._note(f"{self.path} holds completions of other prompts: generating anew")
            return None
        self._note(f"scoring {len(rollout.rows)} completions that were generated before: {self.path}")
        return [group for group in groups if group is not None]

    def forget(self) -> None:
        """Remove the file, if there is one."""
        if self.path.exists():
            self.path.unlink()

    @staticmethod
    def _group(prompt: Prompt, rows: list[Scored]) -> Group | None:
        """A prompt's completions with the row's own columns; None: they are another prompt's.

        What an environment's reset has added to a prompt is in the file alone.
        """
        same = bool(rows) and all(
            row.prompt.index == prompt.index and (row.completion.episode is not None or row.prompt.ids == prompt.ids)
            for row in rows
        )
        if not same:
            return None
        shown = replace(prompt, ids=rows[0].prompt.ids, prompt=rows[0].prompt.prompt)
        return Group(shown, [row.completion for row in rows])


def unscored_path(run_dir: Path) -> Path:
    return Path(run_dir) / "unscored.jsonl"
