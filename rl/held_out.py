"""The score of a policy on the data that were held out, whatever it is trained on."""

from __future__ import annotations

from tandem.rl.config import Config
from tandem.rl.evaluate import Judge, eval_sampling, evaluate
from tandem.rl.guarded_passes import GuardedPasses
from tandem.rl.samples import Scored
from tandem.rl.training_data import TrainingData
from tandem.rollout.engine import RolloutEngine

# The metric that is a run's held-out score, its name and how it is shown; the first that there is counts.
SCORES = (("eval/score", "score", ".3f"), ("eval/rewards/margins", "margin", ".3f"), ("eval/loss", "loss", ".4f"))


def held_out(
    passes: GuardedPasses,
    engine: RolloutEngine,
    judge: Judge,
    data: TrainingData,
    config: Config,
    stop_token_ids: tuple[int, ...],
    step: int,
) -> tuple[dict[str, float], list[Scored]]:
    """Metrics under `eval/` and the completions that were scored; empty where nothing was held out.

    Args:
        step: optimiser steps so far, for rewards that change with it.
    """
    if data.eval_prompts:
        sampling = eval_sampling(config, stop_token_ids)
        engine.wake()
        found = evaluate(engine, data.eval_prompts, judge, sampling, step, config.eval.score)
        engine.sleep()
        return found
    if data.eval_answers is not None:
        metrics = passes.preference_metrics(data.eval_answers)
        return {f"eval/{name}": value for name, value in metrics.items()}, []
    if data.eval_examples:
        return {"eval/loss": passes.supervised_loss(data.eval_examples)}, []
    return {}, []
