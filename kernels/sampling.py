"""The distribution that tokens are drawn from, shared by rollout and trainer so that both speak of the same numbers."""

from __future__ import annotations

import torch


def restrict(
    logits: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Set logits outside the top-k and the nucleus to -inf.

    Args:
        logits: `[N, V]`, already divided by the temperature.
        top_k: number of tokens kept, 0 = all. top_p: smallest set of likeliest tokens with at least this mass.
        keep: `[N]` ids that stay whatever the rule says: tokens that were sampled once, which rounding must not
            push out of the set when the trainer computes it again.
    """
    if top_k <= 0 and top_p >= 1.0:
        return logits
    vocabulary = logits.shape[-1]
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < vocabulary:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        kept &= logits >= kth
    if top_p < 1.0:
        masked = logits.masked_fill(~kept, -torch.inf)
        ordered, order = masked.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # A token stays while the mass before it is below top_p, so the likeliest always stays.
        before = probs.cumsum(-1) - probs
        kept = torch.zeros_like(kept).scatter_(-1, order, before < top_p) & kept
    if keep is not None:
        kept.scatter_(-1, keep[:, None], True)
    return logits.masked_fill(~kept, -torch.inf)


def draw(log_probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling: `[N, V]` log-probs and one uniform number in [0, 1) per row give `[N]` token ids.

    One number per token makes a request's random stream independent of the batch around it: the same request draws
    the same numbers whoever its neighbours are. The sum runs in float64, where 1e-9 of tail mass still counts.
    """
    cdf = log_probs.to(torch.float64, copy=True).exp_().cumsum_(-1)
    # Scaled by the row's own total, so that rounding can never leave u beyond the end of the table.
    point = uniform.to(cdf)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, point, right=True).squeeze(-1).clamp_(max=log_probs.shape[-1] - 1)
