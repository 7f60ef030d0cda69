"""Rollouts with rewards, for training batches and for the held-out score: the same engine, the same functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.rewards.base import Reward
from tandem.rewards.call import TrainerState
from tandem.rewards.compose import OnMissing, Scores, score
from tandem.rewards.faults import OnError
from tandem.rewards.overlap import CallsAhead
from tandem.rewards.watched import Watched, score_watched
from tandem.rl.chat import completion_text
from tandem.rl.config import Config
from tandem.rl.errors import UserError
from tandem.rl.metrics import rollout_metrics
from tandem.rl.reward_errors import errors_in_words
from tandem.rl.samples import Group, Prompt, Sampling, Scored
from tandem.rollout.engine import RolloutEngine

# Evaluation draws from a stream of its own, the same one every time, so that scores before and after compare.
_EVAL_SEED = -1


@dataclass
class Judge:
    """The reward functions of a run with what they need to be called.

    Attributes:
        rewards: in the order of the config.
        tokenizer: decodes completions.
        timeout: seconds per call of one function. max_steps: steps of the whole run, for `trainer_state`.
        on_missing: what becomes of a completion to which no reward applies; see `compose.score`.
        on_error: what becomes of completions on which a reward failed; likewise.
        watched: functions whose values are only watched.
        warn: told what the user should know of the rewards.
        overlap: call rewards of scope group while other groups are still generated.
    """

    rewards: list[Reward]
    tokenizer: Any
    timeout: float
    max_steps: int = 0
    on_missing: OnMissing = "stop"
    on_error: OnError = "stop"
    watched: list[Reward] = field(default_factory=list)
    warn: Callable[[str], None] | None = None
    overlap: bool = False

    def ahead(self, step: int) -> CallsAhead:
        """A context for the generation of one batch: its `on_group` takes finished groups."""
        rewards = self.rewards if self.overlap else []
        return CallsAhead(rewards, self._decode, TrainerState(step, self.max_steps), self.timeout)

    def _decode(self, ids: list[int]) -> str:
        return completion_text(self.tokenizer, ids)

    def __call__(
        self, groups: list[Group], step: int, ahead: CallsAhead | None = None, *, required: bool = True
    ) -> Scores:
        scores = score(
            groups,
            self.rewards,
            self._decode,
            timeout=self.timeout,
            global_step=step,
            max_steps=self.max_steps,
            on_missing=self.on_missing,
            on_error=self.on_error,
            ahead=ahead if self.overlap else None,
            required=required,
        )
        if self.warn is not None:
            for text in scores.notices:
                self.warn(text)
        return scores

    def watch(self, rows: list[Scored], step: int) -> Watched:
        """Fill in what is only watched, once a whole batch is scored; no fault in it is raised."""
        return score_watched(rows, self.watched, timeout=self.timeout, global_step=step, max_steps=self.max_steps)


def training_sampling(config: Config, stop_token_ids: tuple[int, ...], seed: int) -> Sampling:
    rollout = config.rollout
    return Sampling(
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=stop_token_ids,
        stop=tuple(rollout.stop),
        seed=seed,
    )


def eval_sampling(config: Config, stop_token_ids: tuple[int, ...]) -> Sampling:
    return Sampling(
        num_generations=config.eval.num_generations,
        max_completion_length=config.rollout.max_completion_length,
        temperature=config.eval.temperature,
        stop_token_ids=stop_token_ids,
        stop=tuple(config.rollout.stop),
        seed=_EVAL_SEED,
    )


def evaluate(
    engine: RolloutEngine, prompts: list[Prompt], judge: Judge, sampling: Sampling, step: int, score_name: str | None
) -> tuple[dict[str, float], list[Scored]]:
    """Metrics under `eval/` and the scored completions. `eval/score` is the mean of the reward `score_name`, or of
    the weighted total, over the completions that have one.

    Raises:
        UserError: a reward failed, where that ends the run, or failed on every completion.
    """
    with judge.ahead(step) as ahead:
        rows = judge(engine.generate(prompts, sampling, on_group=ahead.on_group), step, ahead).rows
    watched = judge.watch(rows, step)
    metrics = {f"eval/{name}": value for name, value in (watched.metrics | rollout_metrics(rows)).items()}
    metrics["eval/score"] = metrics[f"eval/rewards/{score_name}/mean"] if score_name else metrics["eval/reward"]
    if said := errors_in_words(rows, f"evaluation after {step} steps"):
        if math.isnan(metrics["eval/score"]):
            raise UserError(said, reason="no completion has a score", fix="correct the reward")
        if judge.warn:
            judge.warn(said)
    return metrics, rows
