"""Every policy objective's analytic gradient against float64 autograd of a plainly written loss."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.rl.config import AlgorithmConfig
from tandem.rl.policy_loss import OBJECTIVES, LossValue, PolicyTokens, custom_policy_loss, policy_loss, token_weights
from tandem.rl.rollout_correction import correction_weights
from tandem.rl.step import top_entropy_masks

LEVELS = ["token", "sequence", "sequence_token"]


def options_of(**options: Any) -> AlgorithmConfig:
    if options.get("loss_type") == "cispo":
        options.setdefault("epsilon_high", 1.3)
    return AlgorithmConfig.model_validate(options)


def random_tokens(seed: int, loss_type: str = "grpo", spread: float = 0.6) -> PolicyTokens:
    """Sequences of random lengths, some of one token, with everything that an objective may need."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (int(torch.randint(1, 7, (1,), generator=g)),), generator=g).tolist()
    n, counts = sum(lengths), torch.tensor(lengths)
    log_probs = -torch.rand(n, dtype=torch.float64, generator=g) * 3

    def near() -> torch.Tensor:
        return log_probs + spread * torch.randn(n, dtype=torch.float64, generator=g)

    weights = torch.tensor(token_weights(loss_type, lengths, max_completion_length=8), dtype=torch.float64)
    chosen = torch.rand(n, generator=g) < 0.7
    return PolicyTokens(
        log_probs=log_probs,
        old_log_probs=near(),
        advantages=torch.randn(len(lengths), dtype=torch.float64, generator=g).repeat_interleave(counts),
        weights=weights.repeat_interleave(counts),
        sequence=torch.arange(len(lengths)).repeat_interleave(counts),
        num_sequences=len(lengths),
        ref_log_probs=near(),
        correction=torch.rand(n, dtype=torch.float64, generator=g) * 2,
        chosen=chosen,
        entropy=torch.rand(n, dtype=torch.float64, generator=g) * 2,
        entropy_tokens=int(chosen.sum()) + 3,
    )


def plain_loss(log_probs: torch.Tensor, entropy: torch.Tensor, t: PolicyTokens, a: AlgorithmConfig) -> torch.Tensor:
    """The objective token by token with torch's own operations, for autograd."""
    loss = torch.zeros((), dtype=torch.float64)
    high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    for i, owner in enumerate(t.sequence.tolist()):
        mine = [j for j, other in enumerate(t.sequence.tolist()) if other == owner]
        mean = sum(log_probs[j] - t.old_log_probs[j] for j in mine) / len(mine)
        own = log_probs[i] - t.old_log_probs[i]
        log_ratio = {
            "token": own,
            "sequence": mean,
            "sequence_token": mean.detach() + log_probs[i] - log_probs[i].detach(),
        }[a.importance_sampling_level]
        r, advantage = log_ratio.exp(), t.advantages[i]
        if a.loss_type == "cispo":
            s = r.clamp(max=high).detach() * advantage * log_probs[i]
        elif a.loss_type == "reinforce":
            s = advantage * log_probs[i]
        elif a.loss_type == "sapo":
            tau = a.sapo_temperature_pos if advantage > 0 else a.sapo_temperature_neg
            s = advantage * 4 / tau / (1 + torch.exp(-tau * (r - 1)))
        else:
            free = r if a.delta is None else r.clamp(max=a.delta)
            s = torch.min(free * advantage, r.clamp(1 - a.epsilon, 1 + high) * advantage)
        factor = t.weights[i]
        factor = factor if t.correction is None else factor * t.correction[i]
        factor = factor if t.chosen is None else factor * t.chosen[i]
        loss = loss - factor * s
        if a.beta and a.kl_estimator != "k1":
            difference = t.ref_log_probs[i] - log_probs[i]  # type: ignore[index]
            kl = difference**2 / 2 if a.kl_estimator == "k2" else difference.exp() - difference - 1
            if a.kl_estimator == "k3" and a.use_bias_correction_kl:
                kl = kl * r
            loss = loss + a.beta * t.weights[i] * kl
        if a.entropy_coef and (t.chosen is None or t.chosen[i]):
            loss = loss - a.entropy_coef * entropy[i] / t.entropy_tokens
    return loss


def check(tokens: PolicyTokens, algorithm: AlgorithmConfig, value: LossValue | None = None) -> None:
    log_probs = tokens.log_probs.clone().requires_grad_()
    entropy = tokens.entropy.clone().requires_grad_()  # type: ignore[union-attr]
    expected = plain_loss(log_probs, entropy, tokens, algorithm)
    expected.backward()
    value = value or policy_loss(tokens, algorithm)
    torch.testing.assert_close(value.loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value.grad, log_probs.grad, rtol=1e-12, atol=1e-12)
    if algorithm.entropy_coef:
        torch.testing.assert_close(value.entropy_grad, entropy.grad, rtol=1e-12, atol=1e-12)
    else:
        assert value.entropy_grad is None


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_gradients_equal_autograd(loss_type: str, level: str) -> None:
    for seed in range(8):
        check(random_tokens(seed, loss_type), options_of(loss_type=loss_type, importance_sampling_level=level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_high": 0.5},
        {"delta": 1.6},
        # delta below the upper clip: it ends the gradient of positive advantages, the upper clip that of negative ones
        {"epsilon": 0.6, "delta": 1.2},
        {"beta": 0.3, "use_bias_correction_kl": False},
        {"beta": 0.3},
        {"beta": 0.3, "kl_estimator": "k2"},
        {"beta": 0.3, "kl_estimator": "k1"},
        {"entropy_coef": 0.2},
        {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0, "beta": 0.05, "entropy_coef": 0.01},
    ],
    ids=str,
)
def test_options_equal_autograd(options: dict[str, Any], level: str) -> None:
    for seed, bare in itertools.product(range(6), (False, True)):
        tokens = random_tokens(seed)
        if bare:
            tokens = replace(tokens, correction=None, chosen=None)
        check(tokens, options_of(importance_sampling_level=level, **options))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "reinforce"])
def test_the_first_step_is_the_policy_gradient(loss_type: str, level: str) -> None:
    tokens = replace(random_tokens(1, loss_type, spread=0.0), correction=None, chosen=None)
    value = policy_loss(tokens, options_of(loss_type=loss_type, importance_sampling_level=level))
    torch.testing.assert_close(value.grad, -tokens.weights * tokens.advantages, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize("shift", [-1e4, -200.0, 200.0, 1e4])
def test_extreme_ratios_stay_finite(loss_type: str, level: str, shift: float) -> None:
    for estimator, delta in itertools.product(("k2", "k3"), (None, 2.0)):
        tokens = random_tokens(2, loss_type)
        tokens.old_log_probs.add_(shift)
        tokens.ref_log_probs.add_(shift)  # type: ignore[union-attr]
        options = {"importance_sampling_level": level, "delta": delta, "beta": 0.1, "kl_estimator": estimator}
        value = policy_loss(tokens, options_of(loss_type=loss_type, **options))
        assert torch.isfinite(value.loss)
        assert torch.isfinite(value.grad).all()
        assert all(torch.isfinite(m).all() for m in value.metrics.values())


def test_clip_metrics_count_only_tokens_that_lose_their_gradient() -> None:
    ratios = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5], dtype=torch.float64)
    tokens = PolicyTokens(
        log_probs=ratios.log(),
        old_log_probs=torch.zeros(5),
        advantages=torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]),
        weights=torch.ones(5),
        sequence=torch.arange(5),
        num_sequences=5,
    )
    value = policy_loss(tokens, AlgorithmConfig())
    assert value.metrics["clip_ratio/low_mean"].tolist() == [0, 1, 0, 0, 0]
    assert value.metrics["clip_ratio/high_mean"].tolist() == [0, 0, 0, 1, 0]
    assert value.metrics["clip_ratio/region_mean"].tolist() == [0, 1, 0, 1, 0]
    torch.testing.assert_close(value.grad, torch.tensor([-0.5, 0.0, -1.0, 0.0, 1.5], dtype=torch.float64))


@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize("counts", [[4, 1, 7], [4, 0, 7], [0, 0], []], ids=str)
def test_token_weights_are_those_of_the_average(loss_type: str, counts: list[int]) -> None:
    rng = np.random.default_rng(3)
    losses = [rng.normal(size=n) for n in counts]
    weights = token_weights(loss_type, counts, max_completion_length=9)
    ours = sum(w * x.sum() for w, x in zip(weights, losses, strict=True))
    if loss_type in ("grpo", "sapo"):
        expected = np.mean([x.mean() if len(x) else 0.0 for x in losses] or [0.0])
    elif loss_type == "dr_grpo":
        expected = np.mean([np.pad(x, (0, 9 - len(x))).mean() for x in losses] or [0.0])
    else:
        flat = np.concatenate([[], *losses])
        expected = flat.mean() if len(flat) else 0.0
    assert ours == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("low", [None, 0.8])
def test_rollout_correction_is_the_bounded_ratio(mode: str, low: float | None) -> None:
    tokens = random_tokens(4)
    rollout = tokens.old_log_probs + 0.5 * torch.randn(
        len(tokens.log_probs), generator=torch.Generator().manual_seed(7)
    )
    options = options_of(rollout_correction=mode, rollout_correction_max=1.4, rollout_correction_min=low)
    ours, metrics = correction_weights(tokens.old_log_probs, rollout, tokens.sequence, tokens.num_sequences, options)
    owner, cut = tokens.sequence.tolist(), 0
    for i in range(len(owner)):
        group = [i] if mode.startswith("token") else [j for j, o in enumerate(owner) if o == owner[i]]
        ratio = math.exp(sum(float(tokens.old_log_probs[j]) - float(rollout[j]) for j in group))
        outside = ratio > 1.4 or ratio < (low or 0)
        cut += outside
        bounded = min(max(ratio, low or 0.0), 1.4) if mode.endswith("truncate") else (0.0 if outside else ratio)
        assert float(ours[i]) == pytest.approx(bounded, rel=1e-12)  # type: ignore[index]
    assert float(metrics["sampling/clipped_fraction"].mean()) == pytest.approx(cut / len(owner))
    assert 0 < cut < len(owner)


def test_rollout_correction_is_off_only_by_choice() -> None:
    tokens = random_tokens(4)
    assert AlgorithmConfig().rollout_correction != "none"
    off = options_of(rollout_correction="none")
    weights, metrics = correction_weights(
        tokens.old_log_probs, tokens.log_probs, tokens.sequence, tokens.num_sequences, off
    )
    assert weights is None
    assert metrics["sampling/sampling_logp_difference/max"].max() > 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_top_entropy_masks_equal_the_quantile_of_the_batch(share: float) -> None:
    parts = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (5, 1, 9, 0, 6)]
    threshold = np.quantile(np.concatenate([p.numpy() for p in parts]).astype(np.float64), 1 - share)
    for mask, part in zip(top_entropy_masks(parts, share), parts, strict=True):
        assert mask.tolist() == (part.numpy().astype(np.float64) >= threshold).tolist()
    same = [torch.tensor([0.9 + 2e-7 * i, 0.1 * i, 0.2]) for i in range(4)]
    chosen = torch.stack(top_entropy_masks(same, share))
    assert chosen[:, 0].all(), "rounding does not choose among equals"
    assert chosen[:, 1:].all() == (share == 1.0)
    assert [mask.tolist() for mask in top_entropy_masks([torch.empty(0)] * 2, share)] == [[], []]
    assert top_entropy_masks([], share) == [], "every group was left out"


def test_a_users_loss_gets_its_gradient_from_autograd() -> None:
    algorithm = options_of(loss_type="grpo", entropy_coef=0.1, beta=0.2)
    tokens = random_tokens(5)

    def own(t: PolicyTokens, a: AlgorithmConfig) -> torch.Tensor:
        assert t.entropy is not None
        return plain_loss(t.log_probs, t.entropy, t, a)

    check(tokens, algorithm, custom_policy_loss(tokens, algorithm, own))


@pytest.mark.parametrize("result", [1.0, None, torch.ones(2), torch.ones(())], ids=str)
def test_a_users_loss_that_is_no_loss_is_refused(result: Any) -> None:
    with pytest.raises(ValueError, match="not a scalar tensor"):
        custom_policy_loss(random_tokens(5), AlgorithmConfig(), lambda tokens, algorithm: result)
