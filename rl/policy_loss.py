"""Policy objectives as pure functions of log-probs.

ℓ = log π(token), r = e^(ℓ − ℓ_old), A = advantage, w = weight of the token in the average, ω = rollout correction.

    L = −Σ w·ω·s(r, A) + β·Σ w·κ − c·mean(H)

`s` is the surrogate of the objective, κ the KL estimate, H the entropy. Each function returns values and analytic
derivatives per token; the model's backward pass starts from them. Everything is computed in float64 on the few
numbers there are per token. The weights come from the whole optimiser batch before anything is packed, so the loss
does not depend on packs. To add an objective: one function and one line in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

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
        correction: `[N]` ω, a constant factor of the surrogate (see `tandem.rl.rollout_correction`), or None for 1.
        chosen: `[N]` which tokens take part in surrogate and entropy bonus (top-entropy mask), or None for all.
        entropy: `[N]` of the current policy's distribution, in nats, or None.
        entropy_tokens: number of tokens of the whole optimiser batch that the entropy bonus is a mean over.
    """

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    sequence: torch.Tensor
    num_sequences: int
    ref_log_probs: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    entropy_tokens: int = 0

    @cached_property
    def lengths(self) -> torch.Tensor:
        """`[num_sequences]` scored tokens of each sequence, at least 1."""
        return self.sequence_sum(torch.ones_like(self.weights, dtype=torch.float64)).clamp(min=1)

    def sequence_sum(self, values: torch.Tensor) -> torch.Tensor:
        """`[N]` -> `[num_sequences]`."""
        zeros = torch.zeros(self.num_sequences, dtype=values.dtype, device=values.device)
        return zeros.index_add_(0, self.sequence, values)

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        """`[N]` -> `[N]`: every token gets its sequence's mean."""
        return (self.sequence_sum(values) / self.lengths)[self.sequence]


@dataclass
class LossValue:
    """A loss with its gradients per token, and per-token quantities to be averaged for the log.

    Attributes:
        loss: scalar. grad: `[N]` ∂L/∂ℓ. entropy_grad: `[N]` ∂L/∂H, or None where the loss has no entropy term.
    """

    loss: torch.Tensor
    grad: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    entropy_grad: torch.Tensor | None = None


@dataclass
class Surrogate:
    """What is to be maximised, per token `[N]`.

    Attributes:
        value: s. by_ratio: ∂s/∂(log r). by_log_prob: ∂s/∂ℓ with the ratio held constant, or None for 0.
    """

    value: torch.Tensor
    by_ratio: torch.Tensor
    by_log_prob: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


# Surrogates: (ratio, advantage, log-prob, options) -> Surrogate, all `[N]` float64


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, _: torch.Tensor, options: AlgorithmConfig) -> Surrogate:
    """PPO's clipped surrogate (arXiv 1707.06347 eq. 7), clip-higher (DAPO), dual clip δ (arXiv 1912.09729).

    s = min(min(r, δ)·A, clip(r, 1 − ε_low, 1 + ε_high)·A).
    """
    low, top, delta = 1 - options.epsilon_low, 1 + options.epsilon_upper, options.delta
    free = ratio if delta is None else ratio.clamp(max=delta)
    value = torch.minimum(free * advantage, ratio.clamp(low, top) * advantage)
    # The slope is that of the unclipped branch, where that one is in force.
    up = (advantage > 0) & (ratio < (top if delta is None else min(delta, top)))
    down = (advantage < 0) & (ratio > low)
    if delta is not None:
        down &= ratio < max(delta, top)
    below = ((ratio < low) & (advantage < 0)).double()
    above = ((ratio > top) & (advantage > 0)).double()
    metrics = {"clip_ratio/low_mean": below, "clip_ratio/high_mean": above, "clip_ratio/region_mean": below + above}
    return Surrogate(value, advantage * ratio * (up | down), metrics=metrics)


def cispo(ratio: torch.Tensor, advantage: torch.Tensor, log_prob: torch.Tensor, options: AlgorithmConfig) -> Surrogate:
    """CISPO (MiniMax-M1, arXiv 2506.13585 eq. 4): a truncated ratio as a constant weight of the log-prob.

    s = sg(min(r, ε_max))·A·ℓ with ε_max = epsilon_high, a bound on the ratio itself as in TRL.
    """
    assert options.epsilon_high is not None
    weight = ratio.clamp(max=options.epsilon_high) * advantage
    cut = ((ratio > options.epsilon_high) & (advantage > 0)).double()
    return Surrogate(weight * log_prob, torch.zeros_like(weight), weight, {"cispo_clip_ratio": cut})


def sapo(ratio: torch.Tensor, advantage: torch.Tensor, _: torch.Tensor, options: AlgorithmConfig) -> Surrogate:
    """SAPO (arXiv 2511.20347): a sigmoid gate in place of the clip, s = A·σ(τ(r − 1))·4/τ, with τ by the sign of A."""
    positive = torch.full_like(ratio, options.sapo_temperature_pos)
    tau = torch.where(advantage > 0, positive, torch.full_like(ratio, options.sapo_temperature_neg))
    gate = torch.sigmoid(tau * (ratio - 1))
    return Surrogate(advantage * gate * 4 / tau, advantage * 4 * gate * (1 - gate) * ratio)


def reinforce(ratio: torch.Tensor, advantage: torch.Tensor, log_prob: torch.Tensor, _: AlgorithmConfig) -> Surrogate:
    """REINFORCE (Williams 1992): s = A·ℓ, no ratio."""
    return Surrogate(advantage * log_prob, torch.zeros_like(ratio), advantage)


SurrogateFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AlgorithmConfig], Surrogate]

# loss_type -> (surrogate, how tokens are averaged)
OBJECTIVES: dict[str, tuple[SurrogateFunction, str]] = {
    "grpo": (clipped, "sequence"),
    "bnpo": (clipped, "token"),
    "dapo": (clipped, "token"),
    "dr_grpo": (clipped, "constant"),
    "cispo": (cispo, "token"),
    "sapo": (sapo, "sequence"),
    "reinforce": (reinforce, "token"),
}


def token_weights(loss_type: str, counts: list[int], *, max_completion_length: int) -> list[float]:
    """Weight of every token of each sequence of an optimiser batch.

    Args:
        counts: scored tokens of each sequence, 0 for one that is masked out (it still counts as a sequence). There is
            none where every group was left out.

    sequence: 1/(B·|o_i|), arXiv 2402.03300 eq. 3 · token: 1/Σ|o_i|, arXiv 2503.14476 eq. 8 (TRL's bnpo divides by the
    micro-batch's tokens, which depends on the batch layout; here it is the same as dapo) · constant: 1/(B·L_max),
    arXiv 2503.20783.
    """
    average = OBJECTIVES[loss_type][1]
    batch, total = len(counts), sum(counts)
    if average == "sequence":
        return [1.0 / (batch * max(n, 1)) for n in counts]
    if average == "token":
        return [1.0 / max(total, 1)] * batch
    return [1.0 / (max(batch, 1) * max_completion_length)] * batch


def policy_loss(tokens: PolicyTokens, options: AlgorithmConfig) -> LossValue:
    """The configured objective with its KL and entropy terms."""
    ratio = importance_ratio(tokens, options.importance_sampling_level)
    surrogate = OBJECTIVES[options.loss_type][0](ratio, tokens.advantages.double(), tokens.log_probs.double(), options)
    weight = tokens.weights.double()
    factor = weight
    for extra in (tokens.correction, tokens.chosen):
        factor = factor if extra is None else factor * extra.double()
    grad = _through_ratio(tokens, -factor * surrogate.by_ratio, options.importance_sampling_level)
    if surrogate.by_log_prob is not None:
        grad = grad - factor * surrogate.by_log_prob
    value = LossValue(-(factor * surrogate.value).sum(), grad, surrogate.metrics)
    if options.beta and options.kl_estimator != "k1":  # k1 stands in the reward
        _add_kl(value, tokens, ratio, options)
    if options.entropy_coef:
        _add_entropy_bonus(value, tokens, options.entropy_coef)
    return value


def custom_policy_loss(
    tokens: PolicyTokens,
    options: AlgorithmConfig,
    function: Callable[[PolicyTokens, AlgorithmConfig], torch.Tensor],
) -> LossValue:
    """A user's objective: a function of `PolicyTokens` that returns a scalar; autograd finds the gradient per token.

    Raises:
        ValueError: it returns no scalar that depends on `tokens.log_probs`.
    """
    from dataclasses import replace

    log_probs = tokens.log_probs.detach().double().requires_grad_()
    entropy = None if tokens.entropy is None else tokens.entropy.detach().double().requires_grad_()
    loss = function(replace(tokens, log_probs=log_probs, entropy=entropy), options)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"the loss function returned {loss!r}, not a scalar tensor that depends on tokens.log_probs")
    inputs = [log_probs] if entropy is None else [log_probs, entropy]
    grads = torch.autograd.grad(loss.reshape(()), inputs, allow_unused=True)
    grad = grads[0] if grads[0] is not None else torch.zeros_like(log_probs)
    return LossValue(loss.detach().reshape(()), grad, entropy_grad=grads[1] if entropy is not None else None)


def importance_ratio(tokens: PolicyTokens, level: str) -> torch.Tensor:
    """`[N]` r, or for every token its sequence's s = exp(mean(ℓ − ℓ_old)) (GSPO, arXiv 2507.18071 eq. 4)."""
    difference = tokens.log_probs.double() - tokens.old_log_probs.double()
    if level != "token":
        difference = tokens.sequence_mean(difference)
    return difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _through_ratio(tokens: PolicyTokens, slope: torch.Tensor, level: str) -> torch.Tensor:
    """∂L/∂ℓ from ∂L/∂(log ratio). GSPO-token (eq. 14) has the sequence's ratio but passes each token its own slope."""
    if level == "sequence":
        return tokens.sequence_mean(slope)
    return slope


def _add_kl(value: LossValue, tokens: PolicyTokens, ratio: torch.Tensor, options: AlgorithmConfig) -> None:
    """β·Σ w·κ with D = ℓ_ref − ℓ (Schulman, "Approximating KL divergence", 2020): k2 = D²/2; k3 = e^D − D − 1.

    With `use_bias_correction_kl` k3 is multiplied by r, which makes its gradient that of the KL divergence
    (DeepSeek-V3.2, arXiv 2512.02556).
    """
    assert tokens.ref_log_probs is not None, "beta > 0 needs reference log-probs"
    weight = options.beta * tokens.weights.double()
    difference = (tokens.ref_log_probs.double() - tokens.log_probs.double()).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if options.kl_estimator == "k2":
        kl, direct = difference**2 / 2, -difference
    else:
        kl, direct = difference.exp() - difference - 1, 1 - difference.exp()
    value.metrics["kl"] = kl
    if options.kl_estimator == "k3" and options.use_bias_correction_kl:
        slope = _through_ratio(tokens, weight * ratio * kl, options.importance_sampling_level)
        value.loss = value.loss + (weight * ratio * kl).sum()
        value.grad = value.grad + slope + weight * ratio * direct
    else:
        value.loss = value.loss + (weight * kl).sum()
        value.grad = value.grad + weight * direct


def _add_entropy_bonus(value: LossValue, tokens: PolicyTokens, coefficient: float) -> None:
    """−c times the mean entropy of the optimiser batch's (chosen) tokens."""
    assert tokens.entropy is not None, "the entropy bonus needs entropies"
    share = torch.full_like(value.grad, coefficient / max(tokens.entropy_tokens, 1))
    if tokens.chosen is not None:
        share = share * tokens.chosen.double()
    value.loss = value.loss - (share * tokens.entropy.double()).sum()
    value.entropy_grad = -share
