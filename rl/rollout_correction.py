"""Correcting for the engine's log-probs not being the trainer's: importance weights between the two.

Rollouts are drawn from π_rollout (another implementation, another precision); the objective wants samples of π_old.
The weight ω = π_old/π_rollout, per token or per sequence, truncated (TIS, "Your efficient RL framework secretly
brings you off-policy RL training", Yao et al. 2025) or masked where it leaves a range (MIS, Liu et al. 2025).
"""

from __future__ import annotations

import torch

from tandem.rl.config import AlgorithmConfig

_MAX_LOG_RATIO = 60.0


def correction_weights(
    old_log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    sequence: torch.Tensor,
    num_sequences: int,
    options: AlgorithmConfig,
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """ω for every token `[N]` (None when switched off) and what to log, per token `[N]`.

    Args:
        sequence: `[N]` number of each token's sequence.

    The metrics are those of the token ratio, whatever is done with it: how far the two policies are apart.
    """
    difference = old_log_probs.double() - rollout_log_probs.double()
    token_ratio = difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    metrics = {
        "sampling/sampling_logp_difference/mean": difference.abs(),
        "sampling/sampling_logp_difference/max": difference.abs(),
        **{f"sampling/importance_sampling_ratio/{how}": token_ratio for how in ("min", "mean", "max")},
        # k3 estimate of KL(rollout ‖ old), samples being the rollout's
        "sampling/kl": token_ratio - difference - 1,
    }
    if options.rollout_correction == "none":
        return None, metrics
    level, _, kind = options.rollout_correction.partition("_")
    ratio = token_ratio
    if level == "sequence":
        total = torch.zeros(num_sequences, dtype=torch.float64, device=difference.device)
        total.index_add_(0, sequence, difference)
        ratio = total.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()[sequence]
    low = options.rollout_correction_min or 0.0
    outside = (ratio < low) | (ratio > options.rollout_correction_max)
    metrics["sampling/clipped_fraction"] = outside.double()
    if kind == "truncate":
        return ratio.clamp(low, options.rollout_correction_max), metrics
    return ratio.masked_fill(outside, 0.0), metrics
