"""Log-probability and entropy of given tokens straight from hidden states: no [tokens × vocabulary] tensor exists.

Forward, in chunks of rows: logits with float32 output, soft-cap, temperature, log-sum-exp, gather. Saved for the
backward pass: two numbers per token (lse and entropy) and the hidden states. Backward: the chunk's logits again, then
    dz = g·(1_y − p) − g_H·p·(log p + H) + g_lse·p + g_mean/V,
times the derivatives of temperature and soft-cap, times the head's weight. The head is frozen and gets no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tandem.kernels.sampling import restrict


@dataclass(frozen=True)
class HeadOptions:
    """How logits follow from `hidden @ weight.T`.

    Attributes:
        temperature: logits are divided by it last.
        scale: factor of the raw logits (Granite, Cohere). softcap: c·tanh(z/c) (Gemma 2); None: off.
        top_k, top_p: restrict and renormalise the distribution as the sampler did.
        chunk_size: rows of logits that exist at a time.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    chunk_size: int = 1024


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: HeadOptions
) -> torch.Tensor:
    """`[N, d]`, `[V, d]` -> `[N, V]` logits before temperature, in float32 at least.

    bfloat16 logits near 20 carry 0.06 of rounding error, so the product is accumulated and kept in float32.
    """
    if weight.dtype in (torch.bfloat16, torch.float16):
        if hidden.is_cuda:
            logits = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        else:
            logits = hidden.float() @ weight.float().t()
    else:
        logits = hidden.to(weight.dtype) @ weight.t()
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if options.scale != 1.0:
        logits = logits * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits


class TokenScores(NamedTuple):
    """What is known of every target, all `[N]`, float32 or more, differentiable in the hidden states.

    Attributes:
        log_probs: of the targets. entropy: of their distributions, in nats.
        lse: log-sum-exp of the logits (after temperature). mean_logit: mean of the logits over the vocabulary.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    mean_logit: torch.Tensor


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    options: HeadOptions | None = None,
) -> TokenScores:
    """Log-probabilities of `targets`, entropies and normalisers.

    Args:
        hidden: `[N, d]`, the rows that predict a scored token. weight: `[V, d]`. targets: `[N]` token ids.
    """
    return TokenScores(*_LinearLogProb.apply(hidden, weight, targets, bias, options or HeadOptions()))


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, options: HeadOptions):
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        log_probs = torch.empty(hidden.shape[0], dtype=kind, device=hidden.device)
        lse, entropy, mean = (torch.empty_like(log_probs) for _ in range(3))
        for part in _chunks(hidden.shape[0], options.chunk_size):
            z = _tempered(hidden[part], weight, targets[part], bias, options)
            lse[part] = z.logsumexp(-1)
            mean[part] = z.mean(-1)
            log_probs[part] = z.gather(-1, targets[part][:, None])[:, 0] - lse[part]
            probs = (z - lse[part][:, None]).exp_()
            # A restricted distribution has -inf logits at probability 0; their contribution is 0, not nan.
            entropy[part] = lse[part] - z.masked_fill_(probs == 0, 0.0).mul_(probs).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy)
        ctx.options = options
        # Outputs that nobody differentiates give None in the backward pass, which then skips their terms.
        ctx.set_materialize_grads(False)
        return log_probs, entropy, lse, mean

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy, grad_lse, grad_mean):
        hidden, weight, targets, bias, lse, entropy = ctx.saved_tensors
        options: HeadOptions = ctx.options
        grad_hidden = torch.empty_like(hidden)
        for part in _chunks(hidden.shape[0], options.chunk_size):
            raw = head_logits(hidden[part], weight, bias, options)
            z = restrict(raw / options.temperature, top_k=options.top_k, top_p=options.top_p, keep=targets[part])
            log_p = z - lse[part][:, None]
            p = log_p.exp()
            factor = torch.zeros_like(lse[part])[:, None]
            if grad_log_probs is not None:
                factor = factor - grad_log_probs[part][:, None]
            if grad_lse is not None:
                factor = factor + grad_lse[part][:, None]
            if grad_entropy is not None:
                surprise = log_p.masked_fill_(p == 0, 0.0) + entropy[part][:, None]
                factor = factor - grad_entropy[part][:, None] * surprise
            dz = p * factor
            if grad_log_probs is not None:
                dz.scatter_add_(-1, targets[part][:, None], grad_log_probs[part][:, None])
            if grad_mean is not None:
                dz += grad_mean[part][:, None] / dz.shape[-1]
            dz *= options.scale / options.temperature
            if options.softcap is not None:
                dz *= 1 - (raw / options.softcap) ** 2
            grad_hidden[part] = (dz.to(weight.dtype) @ weight).to(hidden.dtype)
        return grad_hidden, None, None, None, None


def _tempered(hidden, weight, targets, bias, options: HeadOptions) -> torch.Tensor:
    z = head_logits(hidden, weight, bias, options)
    if options.temperature != 1.0:
        z = z / options.temperature
    return restrict(z, top_k=options.top_k, top_p=options.top_p, keep=targets)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
