"""Triton kernels of `linear_logprob`: what follows the head's matrix product, in one read of its float32 result.

Twins: `tempered`, `token_scores` and `token_scores_grad` in `tandem.kernels.reference`.
"""

from __future__ import annotations

import torch

from tandem.kernels.reference import ceil_div, power_of_2_from

try:
    import triton
    import triton.language as tl
except ImportError:  # the twins answer where Triton does not exist
    triton = None

_FORWARD_BLOCK = 4096
_BACKWARD_BLOCK = 2048
# Where the running maximum starts: the least finite number, so that differences to it are never inf − inf.
_LEAST = -3.4028234663852886e38


def token_scores_into(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    raw: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
) -> None:
    """Write log-probs of the targets, log-sum-exps, entropies and mean logits, `[N]` float32 each.

    Args:
        raw: `[N, ≥ vocab]` float32, unit stride along the row: hidden states times head.
        targets: `[N]`; outside the first `vocab` columns the log-prob is nan. bias: `[≥ vocab]`.
    """
    count = raw.shape[0]
    if count == 0:
        return
    log_probs, lse, entropy, mean = outputs
    _scores_kernel[(count,)](
        raw, raw if bias is None else bias, targets, log_probs, lse, entropy, mean,
        raw.stride(0), vocab, scale, 1.0 if softcap is None else softcap, temperature,
        HAS_BIAS=bias is not None, SOFTCAP=softcap is not None, LEAST=_LEAST, **_launch(vocab, _FORWARD_BLOCK),
    )  # fmt: skip


def token_scores_grad_into(
    out: torch.Tensor,
    raw: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
) -> None:
    """Write the gradient of `raw`, 0 in the columns from `vocab` on.

    Args:
        out: like `raw`, of any floating type; may be `raw` itself.
        grads: of log-probs, entropies, log-sum-exps and mean logits, `[N]` contiguous; None: not wanted.
    """
    count, width = raw.shape
    if count == 0 or width == 0:
        return
    grad_log_probs, grad_entropy, grad_lse, grad_mean = grads
    launch = _launch(width, _BACKWARD_BLOCK)
    blocks = ceil_div(width, launch["BLOCK"])
    _grad_kernel[(count * blocks,)](
        raw, raw if bias is None else bias, targets, lse, entropy, *(lse if g is None else g for g in grads), out,
        raw.stride(0), out.stride(0), width, blocks, vocab,
        scale, 1.0 if softcap is None else softcap, temperature, scale / temperature,
        HAS_BIAS=bias is not None, SOFTCAP=softcap is not None, HAS_LOG_PROBS=grad_log_probs is not None,
        HAS_ENTROPY=grad_entropy is not None, HAS_LSE=grad_lse is not None, HAS_MEAN=grad_mean is not None, **launch,
    )  # fmt: skip


def _launch(width: int, most: int) -> dict[str, int]:
    """No more threads than elements: with `out` over `raw`, replicas must not read what another has written."""
    block = min(power_of_2_from(width), most)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


if triton is not None:

    @triton.jit
    def _bend(z, scale, softcap, temperature, SOFTCAP: tl.constexpr):
        """The logit, by divisions as exact as the plain path's, and the soft-cap's slope 1 − tanh²."""
        z *= scale
        slope = 1.0
        if SOFTCAP:
            x = tl.div_rn(z, softcap)
            e = tl.exp(-2.0 * tl.abs(x))
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
            far = (1.0 - e) / (1.0 + e)
            # 1 − e cancels near 0; there the fifth convergent of Lambert's continued fraction is exact to 5·10⁻⁸.
            s = x * x
            near = x * (945.0 + s * (105.0 + s)) / (945.0 + s * (420.0 + 15.0 * s))
            z = softcap * tl.where(tl.abs(x) <= 1.0, near, tl.where(x < 0.0, -far, far))
        return tl.div_rn(z, temperature), slope

    @triton.jit
    def _scores_kernel(
        raw, bias, targets, log_probs, lse, entropy, mean, raw_row, vocab, scale, softcap, temperature,
        HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Rows × vocabulary passes 2³¹ at 14K rows of 152K.
        row = tl.program_id(0).to(tl.int64)
        own = raw + row * raw_row
        lane = tl.arange(0, BLOCK)
        # One running sum per lane, so that the loop needs no exchange between threads. With m the lane's maximum:
        # total = Σ e^{z−m}, spread = Σ (z − m)·e^{z−m}, plain = Σ z.
        top = tl.full([BLOCK], LEAST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        spread = tl.zeros([BLOCK], tl.float32)
        plain = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            column = start + lane
            inside = column < vocab
            z = tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            z, _ = _bend(z, scale, softcap, temperature, SOFTCAP)
            # Beyond the vocabulary z is 0 here.
            plain += z
            z = tl.where(inside, z, float("-inf"))
            # Of the old maximum and z the smaller one counts e^gap, the larger one 1.
            gap = -tl.abs(z - top)
            share = tl.exp(gap)
            gap = tl.where(share == 0.0, 0.0, gap)
            rises = z > top
            spread = tl.where(rises, share * (spread + gap * total), spread + gap * share)
            total = tl.where(rises, share * total + 1.0, total + share)
            top = tl.where(rises, z, top)

        best = tl.max(top, axis=0)
        gap = top - best
        share = tl.exp(gap)
        gap = tl.where(share == 0.0, 0.0, gap)
        whole = tl.sum(share * total, axis=0)
        shifted_mean = tl.sum(share * (spread + gap * total), axis=0) / whole
        log_whole = tl.log(whole)
        tl.store(lse + row, best + log_whole)
        tl.store(entropy + row, tl.where(whole == 0.0, 0.0, log_whole - shifted_mean))
        tl.store(mean + row, tl.sum(plain, axis=0) / vocab)

        target = tl.load(targets + row)
        known = (target >= 0) & (target < vocab)
        z = tl.load(own + target, mask=known, other=float("nan")).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
        z, _ = _bend(z, scale, softcap, temperature, SOFTCAP)
        # −inf − −inf, in a row of nothing else, would be nan.
        tl.store(log_probs + row, tl.where(z == float("-inf"), z, z - best - log_whole))

    @triton.jit
    def _grad_kernel(
        raw, bias, targets, lse, entropy, grad_log_probs, grad_entropy, grad_lse, grad_mean, out,
        raw_row, out_row, width, blocks, vocab, scale, softcap, temperature, factor,
        HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_LOG_PROBS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
        HAS_LSE: tl.constexpr, HAS_MEAN: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        row = (program // blocks).to(tl.int64)
        column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = column < vocab
        z = tl.load(raw + row * raw_row + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        z, slope = _bend(z, scale, softcap, temperature, SOFTCAP)
        norm = tl.load(lse + row)
        log_p = z - tl.where(norm == float("-inf"), 0.0, norm)
        p = tl.exp(log_p)
        dz = tl.zeros([BLOCK], tl.float32)
        if HAS_ENTROPY:
            # p·log p is 0 at p = 0, where log p may be −inf.
            dz -= tl.load(grad_entropy + row) * (tl.where(p == 0.0, 0.0, log_p) + tl.load(entropy + row))
        if HAS_LSE:
            dz += tl.load(grad_lse + row)
        if HAS_LOG_PROBS:
            g = tl.load(grad_log_probs + row)
            dz = p * (dz - g) + tl.where(column == tl.load(targets + row), g, 0.0)
        else:
            dz *= p
        if HAS_MEAN:
            dz += tl.load(grad_mean + row) / vocab
        dz = tl.where(inside, dz * slope * factor, 0.0)
        tl.store(out + row * out_row + column, dz.to(out.dtype.element_ty), mask=column < width)
