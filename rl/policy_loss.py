"""Policy objectives as pure functions of log-probs.

ℓ = log π(token), r = e^(ℓ − ℓ_old), A = advantage, w = weight of the token in the average. Each objective returns the
loss and its derivative with respect to every ℓ; the model's backward pass starts from that derivative. Everything is
computed in float64 on the few numbers there are per token.

The weights come from the whole optimiser batch before anything is packed, so the loss does not depend on packs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tandem.rl.config import AlgorithmConfig

# exp() of more than this would overflow once multiplied; no ratio beyond e^60 means anything.
_MAX_LOG_RATIO = 60.0


@dataclass(frozen=True)
class PolicyTokens:
    """The scored tokens of some sequences, flat.

    Attributes:
        log_probs: `[N]` under the current policy.
        old_log_probs: `[N]` under the policy at the time of the rollout.
        advantages: `[N]`, each token's own.
        weights: `[N]` from `token_weights`.
        sequence: `[N]` number of the sequence that each token belongs to, 0 … num_sequences − 1.
        ref_log_probs: `[N]` under the reference policy, or None.
    """

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    sequence: torch.Tensor
    num_sequences: int
    ref_log_probs: torch.Tensor | None = None

    def sequence_sum(self, values: torch.Tensor) -> torch.Tensor:
        """`[N]` -> `[num_sequences]`."""
        return torch.zeros(self.num_sequences, dtype=values.dtype, device=values.device).index_add_(
            0, self.sequence, values
        )

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.sequence_sum(values) / self.sequence_sum(torch.ones_like(values)).clamp(min=1)


@dataclass
class LossValue:
    """A loss, its gradient per token (∂L/∂ℓ, `[N]`), and per-token `[N]` quantities to be averaged for the log."""

    loss: torch.Tensor
    grad: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def token_weights(loss_type: str, counts: list[int], *, max_completion_length: int) -> list[float]:
    """Weight of every token of each sequence of an optimiser batch.

    Args:
        counts: scored tokens of each sequence, 0 for one that is masked out (it still counts as a sequence).

    grpo: 1/(B·|o_i|), arXiv 2402.03300 eq. 3 · dapo, bnpo: 1/Σ|o_i|, arXiv 2503.14476 eq. 8 (TRL's bnpo divides by the
    micro-batch's tokens, which depends on padding and batch layout; here the two are the same) · dr_grpo:
    1/(B·L_max), arXiv 2503.20783.
    """
    batch, total = len(counts), sum(counts)
    if loss_type == "grpo":
        return [1.0 / (batch * max(n, 1)) for n in counts]
    if loss_type in ("dapo", "bnpo"):
        return [1.0 / max(total, 1)] * batch
    if loss_type == "dr_grpo":
        return [1.0 / (batch * max_completion_length)] * batch
    raise ValueError(f"unknown loss_type {loss_type!r}")


def policy_loss(tokens: PolicyTokens, algorithm: AlgorithmConfig) -> LossValue:
    """The configured objective plus its KL term."""
    if algorithm.importance_sampling_level == "sequence":
        value = clipped_sequence_ratio(tokens, algorithm.epsilon_low, algorithm.epsilon_upper, algorithm.delta)
    else:
        value = clipped_token_ratio(tokens, algorithm.epsilon_low, algorithm.epsilon_upper, algorithm.delta)
    if algorithm.beta:
        kl = kl_k3(tokens)
        value.loss = value.loss + algorithm.beta * kl.loss
        value.grad = value.grad + algorithm.beta * kl.grad
        value.metrics |= kl.metrics
    return value


def clipped_token_ratio(tokens: PolicyTokens, low: float, high: float, delta: float | None = None) -> LossValue:
    """PPO's clipped surrogate per token (arXiv 1707.06347 eq. 7), clip-higher (DAPO), dual clip (arXiv 1912.09729).

    L = −Σ w·min(min(r, δ)·A, clip(r, 1−low, 1+high)·A).
    """
    ratio = _ratio(tokens.log_probs.double() - tokens.old_log_probs.double())
    advantage, weight = tokens.advantages.double(), tokens.weights.double()
    surrogate, active = _clip(ratio, advantage, low, high, delta)
    return LossValue(
        loss=-(weight * surrogate).sum(),
        grad=-(weight * advantage * ratio * active),
        metrics=_clip_metrics(ratio, advantage, low, high),
    )


def clipped_sequence_ratio(tokens: PolicyTokens, low: float, high: float, delta: float | None = None) -> LossValue:
    """GSPO (arXiv 2507.18071 eq. 5): one ratio per sequence, s = exp(mean(ℓ − ℓ_old)), clipped like PPO's.

    L = −Σ_i W_i·min(s_i·A_i, clip(s_i)·A_i) with W_i the sum of the sequence's token weights, and
    ∂L/∂ℓ_it = −W_i·A_i·s_i·[active]/|o_i|.
    """
    difference = tokens.log_probs.double() - tokens.old_log_probs.double()
    ratio = _ratio(tokens.sequence_mean(difference))
    advantage = tokens.sequence_mean(tokens.advantages.double())
    weight = tokens.sequence_sum(tokens.weights.double())
    length = tokens.sequence_sum(torch.ones_like(difference)).clamp(min=1)
    surrogate, active = _clip(ratio, advantage, low, high, delta)
    per_sequence = -(weight * advantage * ratio * active) / length
    metrics = _clip_metrics(ratio, advantage, low, high)
    return LossValue(
        loss=-(weight * surrogate).sum(),
        grad=per_sequence[tokens.sequence],
        metrics={name: values[tokens.sequence] for name, values in metrics.items()},
    )


def kl_k3(tokens: PolicyTokens) -> LossValue:
    """KL to the reference by the k3 estimator, e^D − D − 1 with D = ℓ_ref − ℓ (Schulman 2020; GRPO eq. 4)."""
    assert tokens.ref_log_probs is not None, "beta > 0 needs reference log-probs"
    difference = (tokens.ref_log_probs.double() - tokens.log_probs.double()).clamp(max=_MAX_LOG_RATIO)
    weight, ratio = tokens.weights.double(), difference.exp()
    kl = ratio - difference - 1
    return LossValue(loss=(weight * kl).sum(), grad=weight * (1 - ratio), metrics={"kl": kl})


def _ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _clip(
    ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float, delta: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pessimistic surrogate and where its unclipped branch, the only one with a gradient, is in force."""
    free = ratio if delta is None else ratio.clamp(max=delta)
    surrogate = torch.minimum(free * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    top = 1 + high
    up = (advantage > 0) & (ratio < (top if delta is None else min(delta, top)))
    down = (advantage < 0) & (ratio > 1 - low)
    if delta is not None:
        down &= ratio < max(delta, top)
    return surrogate, (up | down).double()


def _clip_metrics(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> dict[str, torch.Tensor]:
    below = ((ratio < 1 - low) & (advantage < 0)).double()
    above = ((ratio > 1 + high) & (advantage > 0)).double()
    return {"clip_ratio/low_mean": below, "clip_ratio/high_mean": above, "clip_ratio/region_mean": below + above}
