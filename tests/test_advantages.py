"""Advantages against their definitions, written as loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tandem.rl.advantages import STD_EPSILON, advantages, uniform_groups
from tandem.rl.config import AlgorithmConfig


def sample_std(values: np.ndarray) -> float:
    return float(np.sqrt(((values - values.sum() / len(values)) ** 2).sum() / (len(values) - 1)))


@pytest.fixture
def rewards() -> np.ndarray:
    table = np.random.default_rng(5).normal(size=(6, 4))
    table[1] = 0.1 + 0.2
    return table


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_baseline(rewards: np.ndarray, scale: Any) -> None:
    ours = advantages(rewards, AlgorithmConfig(scale_rewards=scale))
    for group, row in zip(rewards, ours, strict=True):
        divisor = {"group": sample_std(group) + STD_EPSILON, "batch": sample_std(rewards.ravel()) + STD_EPSILON}
        np.testing.assert_allclose(row, (group - group.sum() / 4) / divisor.get(scale, 1.0), rtol=1e-12, atol=1e-12)
    assert ours[1].tolist() == [0.0] * 4
    assert uniform_groups(rewards).tolist() == [False, True, False, False, False, False]


def test_leave_one_out(rewards: np.ndarray) -> None:
    ours = advantages(rewards, AlgorithmConfig(advantage_estimator="rloo"))
    for group, row in zip(rewards, ours, strict=True):
        for i in range(4):
            others = [group[j] for j in range(4) if j != i]
            assert row[i] == pytest.approx(group[i] - sum(others) / 3, abs=1e-12)


def test_standardised_over_the_batch(rewards: np.ndarray) -> None:
    ours = advantages(rewards, AlgorithmConfig(advantage_estimator="reinforce_plus_plus"))
    flat = rewards.ravel()
    np.testing.assert_allclose(ours.ravel(), (flat - flat.mean()) / (sample_std(flat) + STD_EPSILON), rtol=1e-12)


def test_each_reward_is_normalised_before_weighting() -> None:
    rng = np.random.default_rng(6)
    components = rng.normal(size=(3, 4, 2)) * [1.0, 100.0]
    components[0, 1, 1] = np.nan  # does not apply to this completion
    components[2, :, 0] = 5.0
    weights = np.array([1.0, 0.5])
    options = AlgorithmConfig(multi_objective_aggregation="normalize_then_sum")
    ours = advantages(np.zeros((3, 4)), options, components=components, weights=weights)
    total = np.zeros((3, 4))
    for g in range(3):
        for k in range(2):
            known = [i for i in range(4) if not np.isnan(components[g, i, k])]
            values = components[g, known, k]
            for i in known:
                total[g, i] += weights[k] * (components[g, i, k] - values.mean()) / (sample_std(values) + STD_EPSILON)
    expected = (total - total.mean()) / (sample_std(total.ravel()) + STD_EPSILON)
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)
