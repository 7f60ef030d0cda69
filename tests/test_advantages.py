"""Advantages against their definitions, written as loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tandem.rewards.base import load_reward
from tandem.rewards.compose import score
from tandem.rl.advantages import STD_EPSILON, advantages, uniform_groups
from tandem.rl.config import AlgorithmConfig, Config
from tandem.rl.experience import best_and_worst, learned_from, with_advantages
from tandem.rl.metrics import rollout_metrics
from tandem.rl.samples import Completion, Group, Prompt, Scored


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


# --- completions without a reward -------------------------------------------------------------------------------------

GIVEN = [[1.0, None, 2.5, 0.5], [0.1, 0.1, None, 0.1], [None, None, 3.0, None], [None] * 4, [0.3, 2.0, 1.0, 1.5]]
ESTIMATORS: list[dict[str, Any]] = [
    {},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"advantage_estimator": "rloo"},
    {"advantage_estimator": "reinforce_plus_plus"},
    {"multi_objective_aggregation": "normalize_then_sum"},
]


def config(**algorithm: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "rollout": {"num_generations": 4},
            "rewards": {"reward_funcs": ["x.py:own", {"function": "x.py:watched", "weight": 0}]},
            "algorithm": algorithm,
        }
    )


def scored() -> list[Scored]:
    """Completions scored by the values of `GIVEN`, and by a reward of weight 0 that has one for all of them."""
    flat = [value for group in GIVEN for value in group]
    rewards = [
        load_reward(lambda completions: flat, name="own"),
        load_reward(lambda completions: [7.0] * len(completions), name="watched", weight=0.0),
    ]
    groups = [Group(Prompt(i, [1], "p"), [Completion([2], [-0.5], False) for _ in g]) for i, g in enumerate(GIVEN)]
    return score(groups, rewards, str, timeout=5, on_missing="group_mean").rows


def by_hand(options: dict[str, Any]) -> list[float]:
    """What those with a reward get where the others had never been sampled."""
    known = [[value for value in group if value is not None] for group in GIVEN]
    everything = np.array([value for group in known for value in group])
    found = []
    if "multi_objective_aggregation" in options:
        parts = [[(v - np.mean(g)) / (np.std(g, ddof=1) + 1e-4) if len(g) > 1 else 0.0 for v in g] for g in known]
        sums = np.array([value for group in parts for value in group])
        return list((sums - sums.mean()) / (sums.std(ddof=1) + 1e-4))
    for group in known:
        for i, value in enumerate(group):
            others = group[:i] + group[i + 1 :]
            if options.get("advantage_estimator") == "reinforce_plus_plus":
                found.append((value - everything.mean()) / (everything.std(ddof=1) + 1e-4))
            elif not others:
                found.append(0.0)
            elif options.get("advantage_estimator") == "rloo":
                found.append(value - np.mean(others))
            else:
                divisor = {"group": np.std(group, ddof=1) + 1e-4, "batch": everything.std(ddof=1) + 1e-4, "none": 1.0}
                found.append((value - np.mean(group)) / divisor[options.get("scale_rewards", "group")])
    return found


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
def test_a_completion_without_a_reward_moves_nothing(options: dict[str, Any]) -> None:
    rows = with_advantages(scored(), config(**options))
    has = [row.rewards["own"] is not None for row in rows]
    assert [row.advantage for row, known in zip(rows, has, strict=True) if not known] == [0.0] * has.count(False)
    ours = [row.advantage for row, known in zip(rows, has, strict=True) if known]
    np.testing.assert_allclose(ours, by_hand(options), rtol=1e-9, atol=1e-12)


def test_a_completion_without_a_reward_makes_no_difference_in_its_group() -> None:
    """The mean of three times 0.1 is more than 0.1."""
    rows = scored()
    assert [row.reward for row in rows[4:8]] == [0.1] * 4
    assert learned_from(rows, config(drop_uniform_groups=True)) == [0, 1, 2, 3, 16, 17, 18, 19]
    assert len(best_and_worst(rows, 4).sequences) == 4
    known = [value for group in GIVEN for value in group if value is not None]
    assert rollout_metrics(rows)["reward"] == pytest.approx(np.mean(known))


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
def test_no_reward_at_all_is_no_advantage(options: dict[str, Any]) -> None:
    nothing = np.full((2, 3), np.nan)
    found = advantages(nothing, AlgorithmConfig(**options), components=nothing[..., None], weights=np.ones(1))
    assert found.tolist() == [[0.0] * 3] * 2
