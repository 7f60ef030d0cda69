"""Episodes: an engine and environments take turns until every completion of a batch has come to its end.

`EpisodeEngine` is itself an engine: prompts in, groups out, so that nothing else of a run needs to know. A completion
then holds everything after the prompt, with a mask that says which of its tokens the policy sampled; nothing is ever
tokenised a second time. The engine generates for whatever episodes are ready, while the other environments work on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from tandem.rl.errors import UserError
from tandem.rl.samples import Completion, Episode, Group, Messages, Prompt, Sampling
from tandem.rollout.chat_turns import ChatTurns
from tandem.rollout.engine import OnGroup, Progress, RolloutEngine
from tandem.rollout.environments import Answer, EnvironmentFault, Environments, Session
from tandem.rollout.finished_groups import FinishedGroups
from tandem.rollout.random_streams import mixed, stream_of
from tandem.rollout.tool_calls import ParsedTurn
from tandem.rollout.workers import Job, Workers

# What the engine waits for further environments at most, beside the time that its last batch took.
_PATIENCE = 0.05
_LONG = 3600.0


@dataclass(frozen=True)
class EpisodeLimits:
    """Where episodes end, and what becomes of faults.

    Attributes:
        max_turns: assistant turns. max_turn_tokens: tokens per turn, None: no limit of its own.
        max_length: longest prompt + completion that the model takes, in tokens.
        step_timeout: seconds for one reset, step or turn's calls. episode_timeout: seconds before the last turn.
        num_workers: environments at work at once.
        stop_on_fault: an environment that raises ends the run; otherwise only its episode.
    """

    max_turns: int = 8
    max_turn_tokens: int | None = None
    max_length: int = 1 << 30
    step_timeout: float = 30.0
    episode_timeout: float | None = None
    num_workers: int = 32
    stop_on_fault: bool = True


@dataclass(eq=False)
class _Play:
    """One episode in the making; `prompt` is the data set's row."""

    prompt: Prompt
    sample: int
    session: Session
    started: float
    opening: Messages = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    turn: ParsedTurn = field(default_factory=lambda: ParsedTurn(""))
    last: int | None = None
    episode: Episode = field(default_factory=Episode)
    stage: str = "reset"

    def work(self) -> Messages | Answer | float | None:
        """What the environment does at this stage, in a thread of its own."""
        if self.stage == "reset":
            return self.session.reset(self.prompt)
        if self.stage == "answer":
            return self.session.answer(self.turn)
        return self.session.reward(self.episode.turn_rewards)

    def add(self, ids: list[int], log_probs: list[float] | None = None) -> None:
        """Tokens of the policy with their log-probs, or tokens that came from elsewhere."""
        self.ids += ids
        self.log_probs += [0.0] * len(ids) if log_probs is None else log_probs
        self.mask += [log_probs is not None] * len(ids)


class _Table:
    """Which episodes' environments are at work, and which episodes wait for their next turn."""

    def __init__(self, workers: Workers, seconds: float) -> None:
        self.workers, self._seconds = workers, seconds
        self._jobs: dict[Job, _Play] = {}
        self.ready: list[_Play] = []

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def put_to_work(self, play: _Play, stage: str) -> None:
        """Let an environment do what comes next: reset, answer or reward."""
        play.stage = stage
        self._jobs[self.workers.submit(play.work, self._seconds)] = play

    def ended(self, patience: float) -> Iterator[tuple[_Play, Job]]:
        """What ends, one after the other, until nothing is at work, or until an episode has been ready so long."""
        until: float | None = None
        while self._jobs:
            now = time.monotonic()
            if until is None and self.ready:
                until = now + patience
            if until is not None and now >= until:
                return
            for job in self.workers.wait(_LONG if until is None else until - now):
                yield self._jobs.pop(job), job


class EpisodeEngine:
    """A rollout engine whose completions are episodes.

    Args:
        engine: generates the turns. environments: answer them. turns: render the answers.
        parse: the tokens of a turn, and which token ended it (None: a limit or a stop string), as text and calls.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        environments: Environments,
        turns: ChatTurns,
        parse: Callable[[list[int]], ParsedTurn],
        limits: EpisodeLimits | None = None,
    ) -> None:
        self._engine, self._environments, self._turns, self._parse = engine, environments, turns, parse
        self._limits = limits or EpisodeLimits()
        self.name = engine.name

    @property
    def asleep_bytes(self) -> int:
        return self._engine.asleep_bytes

    def load_adapter(self, version: int) -> None:
        self._engine.load_adapter(version)

    def sleep(self) -> None:
        self._engine.sleep()

    def wake(self) -> None:
        self._engine.wake()

    def close(self) -> None:
        self._engine.close()

    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        progress: Progress | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See `RolloutEngine`. The environments of the last call are lent anew from here on.

        `sampling.max_completion_length` bounds a whole episode: all turns and what came between them.

        Raises:
            UserError: an environment raised and the run is to stop for it, or the chat template cannot do this.
        """
        self._environments.collect()
        plays = [
            _Play(prompt, sample, self._environments.lend(prompt), time.monotonic())
            for prompt in prompts
            for sample in range(sampling.num_generations)
        ]
        size = sampling.num_generations
        members = [plays[i : i + size] for i in range(0, len(plays), size)]
        groups = FinishedGroups(members, lambda place: _group(prompts[place], members[place]), on_group)

        def over(play: _Play) -> None:
            groups.finish(play)
            if progress:
                progress(len(plays) - groups.unfinished, len(plays))

        self._play(plays, sampling, over)
        return groups.all()

    def _play(self, plays: list[_Play], sampling: Sampling, on_end: Callable[[_Play], None]) -> None:
        table = _Table(Workers(self._limits.num_workers), self._limits.step_timeout)
        for play in plays:
            table.put_to_work(play, "reset")
        patience = _PATIENCE
        try:
            while table.busy:
                for play, job in table.ended(patience):
                    following = self._advance(play, job, sampling)
                    if following == "generate":
                        table.ready.append(play)
                    elif following == "reward":
                        table.put_to_work(play, "reward")
                    else:
                        on_end(play)
                ready, table.ready = table.ready, []
                if not ready:
                    continue
                began = time.monotonic()
                self._generate(ready, sampling)
                # Waiting longer than a batch takes would cost more than a fuller batch saves.
                patience = max(time.monotonic() - began, _PATIENCE)
                for play in ready:
                    table.put_to_work(play, "reward" if play.episode.ending == "tokens" else "answer")
        finally:
            table.workers.drop()

    def _generate(self, plays: list[_Play], sampling: Sampling) -> None:
        """The next turn of each episode, in one batch."""
        prompts = [
            Prompt(
                index=_stream(play.prompt, play.sample, play.episode.turns),
                ids=play.prompt_ids + play.ids,
                prompt=play.opening,
                limit=self._room(play, sampling),
            )
            for play in plays
        ]
        groups = self._engine.generate(prompts, replace(sampling, num_generations=1))
        for play, prompt, group in zip(plays, prompts, groups, strict=True):
            assert prompt.limit is not None
            self._take_turn(play, group.completions[0], prompt.limit, sampling)

    def _take_turn(self, play: _Play, made: Completion, limit: int, sampling: Sampling) -> None:
        # An engine may not know of a prompt's own limit.
        ids, log_probs = made.ids[:limit], made.log_probs[:limit]
        truncated = made.truncated or len(made.ids) > limit
        play.add(ids, log_probs)
        play.turn = self._parse(ids)
        play.last = None if truncated else ids[-1]
        episode = play.episode
        episode.turns += 1
        episode.calls += len(play.turn.calls)
        episode.messages.append(play.turn.message())
        episode.turn_rewards.append(None)
        if truncated and self._room(play, sampling) < 1:
            episode.ending = "tokens"

    def _room(self, play: _Play, sampling: Sampling) -> int:
        """Tokens that the next turn may have."""
        whole = min(sampling.max_completion_length, self._limits.max_length - len(play.prompt_ids)) - len(play.ids)
        return whole if self._limits.max_turn_tokens is None else min(whole, self._limits.max_turn_tokens)

    def _advance(self, play: _Play, job: Job, sampling: Sampling) -> str:
        """Take over what a job said; what comes next: "generate", "reward" or "over"."""
        if isinstance(job.error, TimeoutError):
            if play.stage != "answer" or play.session.environment is not None:
                return self._broken_off(play, "time")
            job.value, job.error = play.session.too_late(play.turn.calls, job.seconds), None
        if job.error is not None:
            if self._limits.stop_on_fault or not isinstance(job.error, EnvironmentFault):
                raise _fault(job.error, play) from job.error
            return self._broken_off(play, "error")
        if play.stage == "reset":
            return self._opened(play, job.value, sampling)
        if play.stage == "answer":
            return self._answered(play, job.value, sampling)
        play.episode.reward = job.value
        return "over"

    def _broken_off(self, play: _Play, ending: str) -> str:
        play.episode.ending = ending
        if play.session.environment is not None:
            self._environments.give_up(play.session)
        return "over"

    def _opened(self, play: _Play, opening: Messages, sampling: Sampling) -> str:
        play.opening = opening
        play.prompt_ids = self._turns.prompt(opening, play.session.schemas)
        if self._room(play, sampling) < 1:
            raise UserError(
                f"row {play.prompt.index}: the prompt has {len(play.prompt_ids)} tokens, tools and all",
                reason=f"the model takes {self._limits.max_length} with the completion",
                fix="shorten it, or raise model.max_length",
            )
        return "generate"

    def _answered(self, play: _Play, answer: Answer, sampling: Sampling) -> str:
        episode, limits = play.episode, self._limits
        episode.turn_rewards[-1] = answer.reward
        episode.failed_calls += answer.failed_calls
        if answer.done:
            # Without a `step` that says so, a turn ends the episode by calling nothing, as one that was cut does too.
            episode.ending = "tokens" if play.last is None and not play.session.steps else "done"
            return "reward"
        if episode.turns >= limits.max_turns:
            episode.ending = "turns"
            return "reward"
        if limits.episode_timeout is not None and time.monotonic() - play.started > limits.episode_timeout:
            episode.ending = "time"
            return "reward"
        ids = self._turns.answer(answer.messages, play.last, play.session.schemas)
        whole = min(sampling.max_completion_length, limits.max_length - len(play.prompt_ids))
        if len(play.ids) + len(ids) >= whole:
            # As in TRL, an answer that leaves the model no token to say is left out.
            episode.ending = "tokens"
            return "reward"
        play.add(ids)
        episode.messages += answer.messages
        return "generate"


def _stream(prompt: Prompt, sample: int, turn: int) -> int:
    """The number that seeds a turn's random stream: one per row, completion and turn."""
    return mixed(stream_of(prompt), sample, turn) >> 2


def _group(prompt: Prompt, plays: list[_Play]) -> Group:
    """A row's episodes. Where `reset` opened them differently, their common beginning is the prompt, and the rest
    belongs to each completion, unscored."""
    opened = [play for play in plays if play.prompt_ids]
    shared = _common([play.prompt_ids for play in opened]) or prompt.ids
    same = all(play.prompt_ids == shared for play in opened)
    shown = replace(prompt, ids=shared, prompt=opened[0].opening if opened and same else prompt.prompt)
    return Group(shown, [_completion(play, len(shared)) for play in plays])


def _completion(play: _Play, shared: int) -> Completion:
    own = play.prompt_ids[shared:]
    episode = play.episode
    episode.environment = play.session.environment
    return Completion(
        ids=own + play.ids,
        log_probs=[0.0] * len(own) + play.log_probs,
        truncated=episode.ending == "tokens",
        mask=[False] * len(own) + play.mask,
        episode=episode,
    )


def _common(rows: list[list[int]]) -> list[int]:
    if not rows:
        return []
    length = 0
    for column in zip(*rows, strict=False):
        if any(token != column[0] for token in column):
            break
        length += 1
    return rows[0][:length]


def _fault(error: BaseException, play: _Play) -> BaseException:
    """What the user is told of an environment's fault; errors of ours stay what they are."""
    if not isinstance(error, EnvironmentFault):
        return error
    where = ""
    if error.__cause__ is not None:
        frames = traceback.extract_tb(error.__cause__.__traceback__)
        frame = frames[-1]
        where = f"at {frame.filename}:{frame.lineno} in {frame.name}"
    return UserError(
        f"{error} (row {play.prompt.index}, completion {play.sample}, turn {play.episode.turns})",
        reason=where,
        fix="correct the environment, or set environment.on_error to end_episode",
    )
