"""Log-probability and entropy of given tokens straight from hidden states: no [tokens × vocabulary] tensor exists.

Forward, in chunks of rows: logits with float32 output, then one pass over them: soft-cap, temperature, log-sum-exp,
gather, E[z]. Saved for the backward pass: two numbers per token (lse and entropy) and the hidden states. Backward: the
chunk's logits again, then one pass that turns them into
    dz = g·(1_y − p) − g_H·p·(log p + H) + g_lse·p + g_mean/V,
times the derivatives of temperature and soft-cap, and this times the head's weight. The head is frozen and gets no
gradient; LoRA beside it does.

Memory beside inputs and outputs, for a chunk of n rows and V columns: 4·n·V bytes forward, and in the backward pass
the gradient's 2·n·V more with a 16-bit head, nothing more with a float32 one. LoRA of rank r adds 6·r·V in the
backward pass, beside its gradient. The plain path (a CPU, float64, top-k or top-p, which sort) needs a handful of
temporaries of n·V elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from tandem.kernels.linear_logprob_triton import token_scores_grad_into, token_scores_into
from tandem.kernels.reference import Impl, picks_triton, tempered, token_scores, token_scores_grad, wide_product
from tandem.kernels.sampling import restrict

# Rows of the logits buffer start at multiples of this many elements: odd vocabularies slow matrix products down.
_ALIGNMENT = 16


@dataclass(frozen=True)
class HeadOptions:
    """How logits follow from `hidden @ weight.T`.

    Attributes:
        temperature: logits are divided by it last.
        scale: factor of the raw logits (Granite, Cohere). softcap: c·tanh(z/c) (Gemma 2); None: off.
        top_k, top_p: restrict and renormalise the distribution as the sampler did.
        chunk_size: rows of logits that exist at a time.
        vocab_size: rows of the weight that are tokens; those from there on are padding, which is never drawn and has
            probability 0. None: all.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    chunk_size: int = 1024
    vocab_size: int | None = None

    @property
    def restricted(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0

    def vocab(self, weight: torch.Tensor) -> int:
        """Tokens among the rows of the head's weight."""
        return weight.shape[0] if self.vocab_size is None else min(self.vocab_size, weight.shape[0])


class HeadAdapter(NamedTuple):
    """LoRA on the head: `scale·(h·aᵀ)·bᵀ` is added to the logits `h·weightᵀ`. `a [r, d]`, `b [V, r]`."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


# Log-probs, log-sum-exps, entropies, mean logits; and their gradients by the order of `TokenScores`.
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
OutputGrads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class TokenScores(NamedTuple):
    """What is known of every target, all `[N]`, float32 or more, differentiable in the hidden states and the adapter.

    Attributes:
        log_probs: of the targets. entropy: of their distributions, in nats.
        lse: log-sum-exp of the logits (after temperature). mean_logit: mean of the logits over the vocabulary.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    mean_logit: torch.Tensor


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    options: HeadOptions,
    adapter: HeadAdapter | None = None,
) -> torch.Tensor:
    """`[N, d]`, `[V, d]` -> `[N, vocab_size]` logits before temperature, in float32 at least."""
    raw = _raw_logits(hidden, weight, adapter)
    return tempered(raw, bias, options.scale, options.softcap, 1.0, options.vocab(weight))[0]


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    options: HeadOptions | None = None,
    adapter: HeadAdapter | None = None,
    impl: Impl | None = None,
) -> TokenScores:
    """Log-probabilities of `targets`, entropies and normalisers.

    Args:
        hidden: `[N, d]`, the rows that predict a scored token. weight: `[V, d]`, frozen. targets: `[N]` int64 ids.
        bias: `[V]`, frozen. adapter: LoRA on the head; its two matrices get gradients.
        impl: which kernels run; None: Triton's on a GPU. A distribution restricted by top-k or top-p needs a sort and
            runs as plain PyTorch.

    Raises:
        ValueError: the weight requires a gradient, or `impl` cannot compute in these types.
    """
    a, b, factor = adapter or (None, None, 0.0)
    values = _LinearLogProb.apply(hidden, weight, targets, bias, a, b, factor, options or HeadOptions(), impl)
    return TokenScores(*values)


def _of(values: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if values is None else values[part]


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        factor: float,
        options: HeadOptions,
        impl: Impl | None,
    ) -> tuple[torch.Tensor, ...]:
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            raise ValueError("the head is frozen: its weight and bias get no gradient, so they must not require one")
        rows = _Rows(hidden, weight, targets, bias, _adapter(a, b, factor), options, impl)
        log_probs = torch.empty(hidden.shape[0], dtype=rows.logits.dtype, device=hidden.device)
        lse, entropy, mean = (torch.empty_like(log_probs) for _ in range(3))
        for part in rows.parts():
            rows.score(part, (log_probs[part], lse[part], entropy[part], mean[part]))
        ctx.save_for_backward(hidden, weight, targets, bias, a, b, lse, entropy)
        ctx.factor, ctx.options, ctx.impl = factor, options, impl
        # Outputs that nobody differentiates give None in the backward pass, which then skips their terms.
        ctx.set_materialize_grads(False)
        return log_probs, entropy, lse, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, bias, a, b, lse, entropy = ctx.saved_tensors
        adapter = _adapter(a, b, ctx.factor)
        rows = _Rows(hidden, weight, targets, bias, adapter, ctx.options, ctx.impl)
        # A gradient of a sum is one number seen N times.
        log_prob, of_entropy, of_lse, mean = (None if g is None else g.contiguous() for g in grads)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_adapter = None if adapter is None else _AdapterGradient(adapter, rows.logits.dtype, weight.dtype)
        out = rows.logits if weight.dtype == rows.logits.dtype else rows.buffer(weight.dtype)
        for part in rows.parts():
            wanted = (_of(log_prob, part), _of(of_entropy, part), _of(of_lse, part), _of(mean, part))
            dz = rows.grad(part, lse[part], entropy[part], wanted, out)
            low = None if d_adapter is None else d_adapter.add(dz, hidden[part])
            if d_hidden is not None:
                _hidden_gradient(d_hidden[part], dz, weight, low, adapter)
        d_a, d_b = (None, None) if d_adapter is None else d_adapter.finish()
        return d_hidden, None, None, None, d_a, d_b, None, None, None


class _Rows:
    """The head applied to chunks of rows, in one buffer of logits that every chunk writes anew."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        adapter: HeadAdapter | None,
        options: HeadOptions,
        impl: Impl | None,
    ) -> None:
        self._hidden, self._weight, self._targets, self._bias = hidden, weight, targets.contiguous(), bias
        self._adapter, self._options = adapter, options
        self._terms = (bias, options.scale, options.softcap, options.temperature, options.vocab(weight))
        self.logits = self.buffer(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        self._triton = picks_triton(self.logits, impl) and not options.restricted

    def parts(self) -> list[slice]:
        rows, size = self._hidden.shape[0], self._options.chunk_size
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]

    def buffer(self, dtype: torch.dtype) -> torch.Tensor:
        """`[rows of a chunk, V]`."""
        rows, vocab = min(self._hidden.shape[0], self._options.chunk_size), self._weight.shape[0]
        width = -(-vocab // _ALIGNMENT) * _ALIGNMENT
        return torch.empty(rows, width, dtype=dtype, device=self._hidden.device)[:, :vocab]

    def score(self, part: slice, outputs: Outputs) -> None:
        """Write log-probs, log-sum-exps, entropies and mean logits."""
        raw, targets = self._raw(part), self._targets[part]
        if self._triton:
            token_scores_into(outputs, raw, targets, *self._terms)
            return
        for out, values in zip(outputs, token_scores(self._restricted(raw, targets)[0], targets), strict=True):
            out.copy_(values)

    def grad(
        self,
        part: slice,
        lse: torch.Tensor,
        entropy: torch.Tensor,
        grads: OutputGrads,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient `[n, V]` of `h·weightᵀ`, in the first rows of `out`. `grads` by the order of `TokenScores`."""
        raw, targets, out = self._raw(part), self._targets[part], out[: lse.shape[0]]
        if self._triton:
            token_scores_grad_into(out, raw, targets, lse, entropy, grads, *self._terms)
            return out
        z, slope = self._restricted(raw, targets)
        dz = token_scores_grad(z, targets, lse, entropy, *grads)
        vocab = dz.shape[1]
        out[:, :vocab] = dz.mul_(slope)
        out[:, vocab:] = 0
        return out

    def _raw(self, part: slice) -> torch.Tensor:
        hidden = self._hidden[part]
        return _raw_logits(hidden, self._weight, self._adapter, self.logits[: hidden.shape[0]])

    def _restricted(self, raw: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        z, slope = tempered(raw, *self._terms)
        return restrict(z, top_k=self._options.top_k, top_p=self._options.top_p, keep=targets), slope


class _AdapterGradient:
    """d_a and d_b, summed over chunks in the type of the logits."""

    def __init__(self, adapter: HeadAdapter, wide: torch.dtype, narrow: torch.dtype) -> None:
        self._adapter, self._scale = adapter, adapter.scale
        self._a = adapter.a.to(wide)
        # dz is in the head's type, and so must be what it is multiplied with.
        self._b = adapter.b.to(narrow)
        self._d_a, self._d_b = (torch.zeros(m.shape, dtype=wide, device=m.device) for m in (adapter.a, adapter.b))

    def add(self, dz: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Count a chunk; returns the gradient `[n, r]` of its h·aᵀ."""
        hidden = hidden.to(self._a.dtype)
        d_low = wide_product(dz, self._b).mul_(self._scale)
        self._d_a.addmm_(d_low.t(), hidden)
        self._d_b.add_(wide_product(dz.t(), (hidden @ self._a.t()).to(dz.dtype)), alpha=self._scale)
        return d_low

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._d_a.to(self._adapter.a.dtype), self._d_b.to(self._adapter.b.dtype)


def _adapter(a: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> HeadAdapter | None:
    return None if a is None or b is None else HeadAdapter(a, b, scale)


def _raw_logits(
    hidden: torch.Tensor, weight: torch.Tensor, adapter: HeadAdapter | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`h·weightᵀ`, LoRA added, `[N, V]` in float32 at least (`out`: where).

    bfloat16 logits near 20 carry 0.06 of rounding error, so the product is accumulated and kept in float32. LoRA's
    share is a thin product, so it is computed in float32 altogether.
    """
    raw = wide_product(hidden.to(weight.dtype), weight.t(), out)
    if adapter is None:
        return raw
    a, b = adapter.a.to(raw.dtype), adapter.b.to(raw.dtype)
    low = hidden.to(raw.dtype) @ a.t()
    if out is None:
        return torch.addmm(raw, low, b.t(), alpha=adapter.scale)
    return out.addmm_(low, b.t(), alpha=adapter.scale)


def _hidden_gradient(
    out: torch.Tensor, dz: torch.Tensor, weight: torch.Tensor, low: torch.Tensor | None, adapter: HeadAdapter | None
) -> None:
    """Write `dz·weight + low·a`."""
    if adapter is None and out.dtype == dz.dtype:
        torch.mm(dz, weight, out=out)
        return
    total = wide_product(dz, weight)
    if adapter is not None and low is not None:
        total.addmm_(low, adapter.a.to(total.dtype))
    out.copy_(total)
