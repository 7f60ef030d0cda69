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
        rewards: `[groups, num_generations]` weighted totals; nan: the completion has none. It is left out of every mean
            and deviation, and its advantage is 0, as in TRL.
        components: `[groups, num_generations, rewards]` each reward's own value, nan where it does not apply;
            weights: `[rewards]`. Only normalize_then_sum needs the two.

    Returns:
        `[groups, num_generations]`; exactly zero throughout a group whose rewards are all equal, except where the
        baseline is the batch's.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    known = ~np.isnan(rewards)
    if options.multi_objective_aggregation == "normalize_then_sum":
        assert components is not None
        assert weights is not None
        return _standardised(np.nansum(_within_groups(components) * weights, axis=-1), known)
    return compared(rewards[:, :, None], known[:, :, None], options)[:, :, 0]


def compared(values: np.ndarray, known: np.ndarray, options: AlgorithmConfig) -> np.ndarray:
    """Advantages of the `known` of `values` `[groups, num_generations, turns]`; 0 for the others."""
    if options.advantage_estimator == "reinforce_plus_plus":
        return _standardised(values, known)
    count = known.sum(axis=1, keepdims=True)
    centred = np.where(known, values - means(values, known), 0.0)
    # The mean of equal numbers can differ from them by rounding; no signal must be exactly no signal.
    centred = np.where(_uniform(values, known), 0.0, centred)
    others = np.maximum(count - 1, 1)
    if options.advantage_estimator == "rloo":
        # r − mean of the others = (r − mean of all)·n/(n − 1)
        return centred * count / others
    if options.scale_rewards == "group":
        return centred / (np.sqrt((centred**2).sum(axis=1, keepdims=True) / others) + STD_EPSILON)
    if options.scale_rewards == "batch":
        return centred / (_deviation(values[known]) + STD_EPSILON)
    return centred


def means(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """`[groups, 1, …]` over a group's completions; 0 where none is known."""
    return np.where(known, values, 0.0).sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)


def uniform_groups(rewards: np.ndarray) -> np.ndarray:
    """`[groups]` whether all rewards of a group are equal: nothing to prefer, no signal. nan: there is none."""
    return _uniform(rewards, ~np.isnan(rewards))[:, 0]


def _uniform(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    largest = np.where(known, values, -np.inf).max(axis=1, keepdims=True)
    return largest <= np.where(known, values, np.inf).min(axis=1, keepdims=True)


def _within_groups(components: np.ndarray) -> np.ndarray:
    values = np.asarray(components, dtype=np.float64)
    known = ~np.isnan(values)
    centred = np.where(known, values - means(values, known), 0.0)
    others = np.maximum(known.sum(axis=1, keepdims=True) - 1, 1)
    # One value has no deviation: it is its own mean, and 0 over anything is 0.
    return centred / (np.sqrt((centred**2).sum(axis=1, keepdims=True) / others) + STD_EPSILON)


def _standardised(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not known.any():
        return np.zeros(values.shape)
    found = values[known]
    return np.where(known, (values - found.mean()) / (_deviation(found) + STD_EPSILON), 0.0)


def _deviation(values: np.ndarray) -> float:
    """Sample standard deviation; 0 of fewer than two values."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
