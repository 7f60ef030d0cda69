"""Every policy objective raises the reward of a small policy on a bandit, and a wrong sign lowers it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tandem.rl.advantages import advantages
from tandem.rl.config import AlgorithmConfig
from tandem.rl.policy_loss import OBJECTIVES, PolicyTokens, policy_loss, token_weights

GROUPS, SIZE, LENGTH, ARMS = 4, 8, 3, 5


def mean_reward(logits: torch.Tensor) -> float:
    """The share of arm 2, which is what pays."""
    return float(logits.detach().softmax(-1)[:, 2].mean())


def train(options: dict[str, Any], *, sign: float = 1.0, steps: int = 40, iterations: int = 2) -> tuple[float, float]:
    """Sequences of independent tokens, one categorical per position; reward is the share of arm 2 in a sequence."""
    if options.get("loss_type") == "cispo":
        options = {"epsilon_high": 2.0} | options
    algorithm = AlgorithmConfig.model_validate(options)
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(LENGTH, ARMS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    before, count = mean_reward(logits), GROUPS * SIZE
    sequence = torch.arange(count).repeat_interleave(LENGTH)
    weight = token_weights(algorithm.loss_type, [LENGTH] * count, max_completion_length=LENGTH)
    for _ in range(steps):
        drawn = torch.multinomial(logits.detach().softmax(-1), count, replacement=True, generator=generator).T
        rewards = (drawn == 2).double().mean(1).reshape(GROUPS, SIZE).numpy()
        gain = torch.as_tensor(
            advantages(rewards, algorithm, components=rewards[..., None], weights=torch.ones(1).numpy())
        )
        old = None
        for _ in range(iterations):
            log_probs = logits.log_softmax(-1).expand(count, -1, -1).gather(-1, drawn[..., None]).reshape(-1)
            old = log_probs.detach() if old is None else old
            tokens = PolicyTokens(
                log_probs=log_probs.detach(),
                old_log_probs=old,
                advantages=sign * gain.reshape(-1).repeat_interleave(LENGTH),
                weights=torch.tensor(weight).double().repeat_interleave(LENGTH),
                sequence=sequence,
                num_sequences=count,
            )
            optimizer.zero_grad()
            log_probs.backward(policy_loss(tokens, algorithm).grad)
            optimizer.step()
    return before, mean_reward(logits)


VARIANTS: list[dict[str, Any]] = [
    *({"loss_type": name} for name in OBJECTIVES),
    {"importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence_token"},
    {"delta": 2.0, "epsilon_high": 0.28},
    {"advantage_estimator": "rloo"},
    {"advantage_estimator": "reinforce_plus_plus"},
    {"scale_rewards": "none"},
    {"scale_rewards": "batch"},
    {"multi_objective_aggregation": "normalize_then_sum"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_reward_rises_and_a_wrong_sign_is_seen(options: dict[str, Any]) -> None:
    before, after = train(options)
    assert before == pytest.approx(0.2)
    assert after > 0.6
    assert train(options, sign=-1.0)[1] < 0.1
