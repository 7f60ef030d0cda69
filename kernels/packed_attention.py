"""Attention over a pack (`pack_layout`): every family on its own, completions looking back at their shared prompt.

`attention_forward` and `attention_backward` are an explicit pair: the second uses the first one's output and
log-sum-exp and never runs attention's forward again. `packed_attention` is the pair under autograd. Tensors of 16 bits
on a GPU go to cuDNN and flash attention piece by piece (`attention_pieces`), all else to plain PyTorch
(`attention_blocked`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tandem.kernels.attention_blocked import Gradients, Scoring, blocked_backward, blocked_forward
from tandem.kernels.attention_pieces import CudaPieces, takes
from tandem.kernels.attention_plan import pieces_backward, pieces_forward
from tandem.kernels.pack_layout import PackLayout


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every family of `layout` on its own.

    Args:
        query: `[T, Hq, D]`; key, value: `[T, Hkv, D]` with Hq a multiple of Hkv. Views of wider buffers are taken as
            they are, so long as the last dimension is contiguous.
        scale: factor of the scores. window: sliding-window width in tokens, the row's own token included.
        softcap: c·tanh(score/c), Gemma 2.

    Returns:
        out `[T, Hq, D]` and lse `[Hq, T]` float32 (float64 for float64 tensors): the natural log-sum-exp of the scaled
        scores of everything that a row sees.

    Raises:
        ValueError: shapes or types that do not fit together, or a layout that does not cover the T rows.
    """
    _check(query, key, value, layout)
    scoring = Scoring(scale, window or None, softcap)
    if takes(query, scoring):
        return pieces_forward(CudaPieces(), query, key, value, layout, scoring)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(
        (query.shape[1], query.shape[0]),
        dtype=torch.promote_types(query.dtype, torch.float32),
        device=query.device,
    )
    blocked_forward(query, key, value, layout, range(len(layout.families)), scoring, out, lse)
    return out, lse


def attention_backward(
    d_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Gradients:
    """The gradients of `attention_forward`, from what it returned.

    Args:
        d_out: `[T, Hq, D]`, the gradient of out; the others as given to and returned by the forward pass.

    Returns:
        dq `[T, Hq, D]`, dk and dv `[T, Hkv, D]`, in the type of the inputs.

    Raises:
        ValueError: as for the forward pass.
    """
    _check(query, key, value, layout)
    for name, tensor, shape in (("d_out", d_out, query.shape), ("out", out, query.shape)):
        if tensor.shape != shape or tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, query {query.dtype} {tuple(shape)}")
    if lse.shape != (query.shape[1], query.shape[0]):
        raise ValueError(f"lse is {tuple(lse.shape)}, not [heads, rows] of query {tuple(query.shape)}")
    scoring = Scoring(scale, window or None, softcap)
    if takes(query, scoring):
        return pieces_backward(CudaPieces(), d_out, query, key, value, out, lse, layout, scoring)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    families = range(len(layout.families))
    blocked_backward(d_out, query, key, value, out, lse, layout, families, scoring, (dq, dk, dv))
    return dq, dk, dv


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`attention_forward` under autograd, with the heads first as Hugging Face has them.

    Args:
        query: `[Hq, T, D]`; key, value: `[Hkv, T, D]`. The rest as for `attention_forward`.

    Returns:
        `[Hq, T, D]`.
    """
    return _PackedAttention.apply(query, key, value, layout, Scoring(scale, window, softcap))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout, scoring: Scoring
    ) -> torch.Tensor:
        q, k, v = (_last_contiguous(x.transpose(0, 1)) for x in (query, key, value))
        out, lse = attention_forward(q, k, v, layout, **scoring._asdict())
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scoring = layout, scoring
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d = _last_contiguous(d_out.transpose(0, 1))
        grads = attention_backward(d, q, k, v, out, lse, ctx.layout, **ctx.scoring._asdict())
        return (*(g.transpose(0, 1) for g in grads), None, None)


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2]:
        raise ValueError(f"attention needs query [T, Hq, D] and key, value [T, Hkv, D], not {shapes}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"the query heads are no multiple of the key heads: {shapes}")
    if query.dtype != key.dtype or key.dtype != value.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}")
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        raise ValueError("the last dimension of query, key and value must be contiguous")
    layout.check(query.shape[0])
