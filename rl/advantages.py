"""Advantages: how much better a completion is than its group.

The group's mean is the baseline (GRPO, DeepSeekMath, arXiv 2402.03300, §4.1). Dividing by the group's standard
deviation is GRPO's normalisation; by the batch's, as in "Tricks or Traps?" (arXiv 2508.08221); by nothing, Dr. GRPO
(arXiv 2503.20783).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

# Added to the standard deviation, as in TRL: a group of nearly equal rewards must not blow up its noise.
STD_EPSILON = 1e-4


def group_advantages(
    rewards: list[float], num_generations: int, scale_rewards: Literal["group", "batch", "none"]
) -> list[float]:
    """Advantages of completions that stand group after group.

    Args:
        rewards: `[groups × num_generations]`.

    Returns:
        The same length; zero throughout a group whose rewards are all equal.
    """
    table = np.asarray(rewards, dtype=np.float64).reshape(-1, num_generations)
    centred = table - table.mean(axis=1, keepdims=True)
    if scale_rewards == "group":
        centred = centred / (table.std(axis=1, ddof=1, keepdims=True) + STD_EPSILON)
    elif scale_rewards == "batch":
        centred = centred / (table.std(ddof=1) + STD_EPSILON)
    # The mean of equal numbers can differ from them by rounding; no signal must be exactly no signal.
    centred[np.ptp(table, axis=1) == 0] = 0.0
    return [float(a) for a in centred.reshape(-1)]
