"""Where a step's completions come from: what an interrupted run has left in its journal, else engine and rewards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from tandem.rewards.compose import Scores
from tandem.rewards.overlap import CallsAhead
from tandem.rewards.watched import Watched
from tandem.rl import distributed
from tandem.rl.checkpoint import State
from tandem.rl.config import Config
from tandem.rl.console import Console
from tandem.rl.curriculum import Curriculum, PassRate, Visit
from tandem.rl.errors import UserError
from tandem.rl.evaluate import Judge, training_sampling
from tandem.rl.experience import in_order
from tandem.rl.memory_metrics import MemoryMeter
from tandem.rl.metrics import Meter, rollout_metrics
from tandem.rl.prompts import PromptSampler
from tandem.rl.reward_errors import errors_in_words, failed_everywhere
from tandem.rl.rollout_journal import RolloutJournal
from tandem.rl.rollout_tries import Tries
from tandem.rl.samples import Group, Prompt, Sampling, Scored
from tandem.rl.step_time import StepClock
from tandem.rl.unscored import RewardsFailed, Unscored
from tandem.rollout.engine import RolloutEngine


@dataclass
class _Made:
    """A rollout, journalled or new.

    Attributes:
        used: rows of the prompt stream. visits: what it tells of prompts.
        times: metrics that differ from run to run; they are not in the journal.
    """

    rows: list[Scored]
    logged: dict[str, float]
    used: int
    visits: list[Visit]
    times: dict[str, float] = field(default_factory=dict)


class RolloutSource:
    """Scored completions for one batch of prompts after the other; a new one is in the journal before it is given.

    Args:
        journal: of the process that writes files; None in the others, and where no journal is kept.
        console: told when rewards fail and the run goes on, once per rollout, and when a function fails that is only
            watched, once for each.
    """

    def __init__(
        self,
        config: Config,
        prompts: list[Prompt],
        *,
        sampler: PromptSampler,
        engine: RolloutEngine,
        judge: Judge,
        stop_token_ids: tuple[int, ...],
        clock: StepClock,
        memory: MemoryMeter,
        journal: RolloutJournal | None,
        console: Console,
    ) -> None:
        self._config, self._prompts, self._sampler = config, prompts, sampler
        self._engine, self._judge, self._stop_token_ids = engine, judge, stop_token_ids
        self._memory = memory
        self._clock, self._journal, self._warn = clock, journal, console.warn
        self._unscored = Unscored(journal.path.parent, config, console.note) if journal else None
        self._resumed = True  # nothing was generated in this process yet
        self._failed: set[str] = set()
        self._failed_before = 0
        self._before: tuple[int, dict[int, PassRate | None]] = (0, {})

    def next(self, state: State) -> tuple[list[Scored], dict[str, float]]:
        """The rollout that comes next, and what there is to say of it; the state moves on behind it.

        Raises:
            RewardsFailed: a reward failed, and the run is to stop for it. The state stands before the rollout, whose
                completions are kept where there is a journal.
        """
        made = self._journalled(state) or self._generated(state)
        rows, logged = made.rows, made.logged
        self._before = (state.position, self._curriculum(state).note(made.visits))
        state.position += made.used
        self._keep_place(state)
        if said := errors_in_words(rows, f"rollout after {state.step} steps"):
            self._warn(said)
        self._failed_before = state.failed_rollouts
        state.failed_rollouts = state.failed_rollouts + 1 if failed_everywhere(rows) else 0
        return rows, logged | made.times | rollout_metrics(rows)

    def forget(self, state: State) -> None:
        """Go back before the newest rollout, and leave it out of the journal: it must not be learned from."""
        state.position, rates = self._before
        self._curriculum(state).restore(rates)
        state.failed_rollouts = self._failed_before
        if self._journal is not None:
            self._journal.cut(self._journal.before)
        self._keep_place(state)

    def _curriculum(self, state: State) -> Curriculum:
        options = self._config.data.curriculum
        return Curriculum(options, self._prompts, self._sampler, state.curriculum, seed=self._config.seed)

    def _journalled(self, state: State) -> _Made | None:
        rollout = distributed.broadcast(self._journal.take(state.position) if self._journal else None)
        if rollout is None:
            return None
        known = {prompt.index: prompt for prompt in self._prompts}  # with the columns of their rows
        for row in rollout.rows:
            own = known.get(row.prompt.index, row.prompt)
            row.prompt = own if own.ids == row.prompt.ids else row.prompt
        return _Made(rollout.rows, rollout.logged, rollout.used, rollout.visits)

    def _generated(self, state: State) -> _Made:
        config, curriculum = self._config, self._curriculum(state)
        resamples = config.rollout.max_resamples if config.rollout.dynamic_sampling else None
        tries = Tries(config.prompts_per_rollout, config.rollout.num_generations, resamples)
        logged, times = Meter(), Meter()
        used = skipped = 0
        while asked := tries.asked:
            draw = curriculum.draw(state.position + used, asked)
            tries.add(self._one_try(draw.prompts, state, state.position + used, logged, times, first=tries.tries == 0))
            used, skipped = used + draw.rows, skipped + draw.skipped
        if resamples is not None and not tries.complete:
            self._say_once(
                f"rollout.max_resamples ({resamples}) further tries found too few groups whose rewards differ: the "
                "batch is filled with others, from which nothing is learned (sampling/kept counts those with a signal)"
            )
        found = logged.result() | tries.metrics()
        if config.data.curriculum.enabled:
            found["curriculum/skipped"] = skipped / used
        made = _Made(tries.batch(), found, used, curriculum.visits(tries.groups), times.result())
        if self._journal is not None:
            with self._clock.part("log"):
                self._journal.append(
                    made.rows, found, position=state.position, step=state.step, used=used, visits=made.visits
                )
                if self._unscored is not None:
                    self._unscored.forget()
        self._resumed = False
        return made

    def _one_try(
        self, prompts: list[Prompt], state: State, position: int, logged: Meter, times: Meter, *, first: bool
    ) -> list[Scored]:
        """Completions of the prompts with their rewards; `position` is the prompts' place in the stream."""
        config, prompts = self._config, _numbered(prompts)
        sampling = training_sampling(config, self._stop_token_ids, config.seed * 1_000_003 + position)
        left = self._left_unscored(prompts, position, state.step)
        with self._judge.ahead(state.step) as ahead:
            groups = self._sampled(prompts, sampling, ahead) if left is None else left
            with self._clock.part("reward"):
                scores, watched = self._scored(groups, position, state.step, ahead if left is None else None, first)
        if ahead.on_group is not None:
            times.add("perf/hidden_reward_seconds", ahead.hidden_seconds, "sum")
        rows = in_order(distributed.gather(scores.rows), config.rollout.num_generations)
        # What rewards logged themselves is averaged over ranks; what is known of all rows is taken from them.
        for part, faults in distributed.gather((scores.metrics | watched.metrics, watched.faults)):
            for name, value in part.items():
                logged.add(name, value)
            self._say(faults)
        return rows

    def _sampled(self, prompts: list[Prompt], sampling: Sampling, ahead: CallsAhead) -> list[Group]:
        """This rank's groups, from the engine."""
        own = [prompt for i, prompt in enumerate(prompts) if distributed.owned(i)]
        with self._clock.part("wake"):
            self._engine.wake()
        with self._clock.part("generate"), self._memory.phase("rollout"):
            groups = self._engine.generate(own, sampling, on_group=ahead.on_group)
        with self._clock.part("sleep", device=True):
            self._engine.sleep()
        return groups

    def _left_unscored(self, prompts: list[Prompt], position: int, step: int) -> list[Group] | None:
        """This rank's part of what an earlier process has generated for these prompts and could not score.

        Asked for in one rollout: what this process has generated in between was drawn by another policy perhaps.
        """
        if not self._resumed:
            return None
        found = None
        if self._unscored is not None:
            found = self._unscored.take(prompts, position=position, step=step)
        found = distributed.broadcast(found)
        if found is not None and self._needs_environments(found):
            self._warn("what was not scored is generated anew, since rewards want to see its environments")
            return None
        return None if found is None else [group for i, group in enumerate(found) if distributed.owned(i)]

    def _needs_environments(self, groups: list[Group]) -> bool:
        played = any(c.episode is not None for group in groups for c in group.completions)
        return played and any("environments" in reward.named() for reward in self._judge.rewards)

    def _scored(
        self, groups: list[Group], position: int, step: int, ahead: CallsAhead | None, first: bool
    ) -> tuple[Scores, Watched]:
        """The rewards of this rank's groups; where one fails on any rank, all keep what they have and stop."""
        fault: UserError | None = None
        try:
            # A later try may be of a single group, for which no judge's answer can be read.
            scores = self._judge(groups, step, ahead, required=first)
        except UserError as error:
            fault = error
        faults = [error for error in distributed.gather(fault) if error is not None]
        if not faults:
            return scores, self._judge.watch(scores.rows, step)
        then = "rl-train resume the run"
        if self._config.checkpoint.journal:
            whole = distributed.interleave(distributed.gather(groups))
            if self._unscored is not None:
                self._unscored.keep(whole, position=position, step=step)
            then += f", which scores the {sum(len(g.completions) for g in whole)} completions that are kept"
        fix = f"{faults[0].fix}; then {then}" if faults[0].fix else then
        raise RewardsFailed(faults[0].problem, reason=faults[0].reason, fix=fix) from fault

    def _say(self, faults: dict[str, UserError]) -> None:
        for name, error in faults.items():
            if name not in self._failed:
                self._failed.add(name)
                counted = f"watch/rewards/{name}/failed counts it"
                self._warn(f"{name} is only watched, so training goes on ({counted}): {error}")

    def _say_once(self, text: str) -> None:
        if text not in self._failed:
            self._failed.add(text)
            self._warn(text)

    def _keep_place(self, state: State) -> None:
        if self._journal is not None:
            state.journal_rollouts, state.journal_bytes = self._journal.mark.rollouts, self._journal.mark.size


def _numbered(prompts: list[Prompt]) -> list[Prompt]:
    """With how often each row stands before in the list: an epoch that ends, or has fewer rows, brings some again."""
    seen: Counter[int] = Counter()
    found = []
    for prompt in prompts:
        found.append(replace(prompt, draw=seen[prompt.index]) if seen[prompt.index] else prompt)
        seen[prompt.index] += 1
    return found
