"""`rl-train replay`: learn anew from the rollouts of a run, without generating or rewarding anything.

What is learned from is the run's journal alone; neither the data set nor the reward functions are read (only a warm-up
reads its examples). With the run's own config the outcome is the run's own; with other values of `algorithm`, `optim`
or `train` it shows what they make of the same rollouts. The result is a run folder like any other, with a report.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tandem.rl import data_identity
from tandem.rl.config import Config
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.rollout_journal import Mark, RolloutJournal, journal_path, read_journal, source_of
from tandem.rl.samples import Prompt


@dataclass
class Recorded:
    """What a journal holds.

    Attributes:
        rollouts: whole ones. completions: in each. group: completions of one prompt. prompts: each one once.
    """

    rollouts: int = 0
    completions: int = 0
    group: int = 0
    prompts: list[Prompt] = field(default_factory=list)


def survey(run_dir: Path, console: Console) -> Recorded:
    """What a run's journal holds.

    Raises:
        UserError: no whole rollout, or the first ones are missing.
    """
    found, prompts = Recorded(), dict[int, Prompt]()
    for rollout in read_journal(run_dir, console.warn):
        if rollout.number != found.rollouts:
            raise UserError(
                f"the journal of {run_dir} lacks rollout {found.rollouts}",
                reason="a replay learns from all of them, in their order",
            )
        if not found.rollouts:
            found.completions = len(rollout.rows)
            found.group = sum(row.group == rollout.rows[0].group for row in rollout.rows)
        found.rollouts += 1
        prompts |= {row.prompt.index: row.prompt for row in rollout.rows}
    if not found.rollouts:
        raise UserError(f"the journal of {run_dir} holds no whole rollout", fix="replay a run that has finished a step")
    found.prompts = [prompts[index] for index in sorted(prompts)]
    return found


def replay_config(config: Config, run_dir: Path, recorded: Recorded) -> Config:
    """The config of a replay: as many steps as the journal reaches, under a name of its own.

    Raises:
        UserError: the config does not fit the journal.
    """
    if not config.uses_rollouts:
        raise UserError(
            f"algorithm.name is {config.algorithm.name!r}, which learns from no rollouts",
            fix="replay with grpo or online_dpo",
        )
    wanted = (config.generation_batch_size, config.rollout.num_generations)
    if (recorded.completions, recorded.group) != wanted:
        raise UserError(
            f"the journal's rollouts hold {recorded.completions} completions in groups of {recorded.group}, "
            f"but the config says {wanted[0]} in groups of {wanted[1]}",
            fix="leave train.generation_batch_size and rollout.num_generations as they were in the run",
        )
    per_rollout = 1
    if config.algorithm.name == "grpo":
        per_rollout = config.train.steps_per_generation * config.algorithm.num_iterations
    steps = min(recorded.rollouts * per_rollout, config.train.max_steps or recorded.rollouts * per_rollout)
    changes: dict[str, dict[str, object]] = {
        "rollout": {"engine": "transformers"},  # it is opened for its name alone
        "train": {"max_steps": steps},
        "parity": {"action": "off"},  # once anything is changed, it is another policy that drew the tokens
        "eval": {"dataset_name": None},
        "checkpoint": {"journal": True},
    }
    update = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update={**update, "run_name": f"{run_dir.resolve().name}-replay"})


def fill(run_dir: Path, target: Path, config: Config) -> None:
    """Give the replay in `target` the run's journal, from which it then learns as a resumed run does."""
    journal = RolloutJournal(target, Mark(), source=source_of(config))
    position = 0
    for rollout in read_journal(run_dir, note=lambda text: None):  # said by `survey`
        used, visits = rollout.used, rollout.visits
        journal.append(rollout.rows, rollout.logged, position=position, step=rollout.step, used=used, visits=visits)
        position += used
    if (run_dir / data_identity.NAME).is_file():
        shutil.copyfile(run_dir / data_identity.NAME, target / data_identity.NAME)
    assert journal_path(target).is_file()
