"""Advantages: how much better a completion is than what was to be expected.

group: the group's mean is the baseline (GRPO, arXiv 2402.03300, §4.1), divided by the group's standard deviation, by
the batch's ("Tricks or Traps?", arXiv 2508.08221) or by nothing (Dr. GRPO, arXiv 2503.20783). rloo: the mean of the
other completions is the baseline (arXiv 2402.14740). reinforce_plus_plus: standardised over the batch (REINFORCE++,
arXiv 2501.03262). normalize_then_sum: each reward standardised within its group, weighted, summed and standardised
over the batch (GDPO, arXiv 2601.05242). All standard deviations are sample deviations.
"""

from __future__ import annotations

import numpy as np

from tandem.rl.config import AlgorithmConfig

# Added to the standard deviation, as in TRL: a group of nearly equal rewards must not blow up its noise.
STD_EPSILON = 1e-4


def advantages(
    rewards: np.ndarray,
    options: AlgorithmConfig,
    *,
    components: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Advantages of completions by group.

    Args:
        rewards: `[groups, num_generations]` weighted totals.
        components: `[groups, num_generations, rewards]` each reward's own value, nan where it does not apply;
            weights: `[rewards]`. Only normalize_then_sum needs the two.

    Returns:
        `[groups, num_generations]`; exactly zero throughout a group whose rewards are all equal, except where the
        baseline is the batch's.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if options.multi_objective_aggregation == "normalize_then_sum":
        assert components is not None
        assert weights is not None
        return _standardised(np.nansum(_within_groups(components) * weights, axis=-1))
    if options.advantage_estimator == "reinforce_plus_plus":
        return _standardised(rewards)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    # The mean of equal numbers can differ from them by rounding; no signal must be exactly no signal.
    centred[uniform_groups(rewards)] = 0.0
    if options.advantage_estimator == "rloo":
        # r − mean of the others = (r − mean of all)·n/(n − 1)
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    if options.scale_rewards == "group":
        return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON)
    if options.scale_rewards == "batch":
        return centred / (rewards.std(ddof=1) + STD_EPSILON)
    return centred


def uniform_groups(rewards: np.ndarray) -> np.ndarray:
    """`[groups]` whether all rewards of a group are equal: nothing to prefer, no signal."""
    return np.ptp(rewards, axis=1) == 0


def _within_groups(components: np.ndarray) -> np.ndarray:
    values = np.asarray(components, dtype=np.float64)
    known = ~np.isnan(values)
    count = known.sum(axis=1, keepdims=True)
    mean = np.nansum(values, axis=1, keepdims=True) / np.maximum(count, 1)
    squares = np.nansum((values - mean) ** 2, axis=1, keepdims=True)
    # One value has no deviation: it is its own mean, and 0 over anything is 0.
    return (values - mean) / (np.sqrt(squares / np.maximum(count - 1, 1)) + STD_EPSILON)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std(ddof=1) + STD_EPSILON)
