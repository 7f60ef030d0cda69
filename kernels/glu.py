"""Gated linear units: h = act(gate)·up with act = SiLU (Llama, Qwen) or tanh-GELU (Gemma).

The backward pass needs no memory of its own: it writes both gradients over gate and up, and h over dh, where the
weight gradient of the following projection wants it.
"""

from __future__ import annotations

from typing import Literal

import torch

from tandem.kernels.reference import Impl, ceil_div, glu_backward_into, glu_into, picks_triton, power_of_2_from, rows

try:
    import triton
    import triton.language as tl
except ImportError:  # the twins answer where Triton does not exist
    triton = None

Kind = Literal["swiglu", "geglu_tanh"]
_KINDS = ("swiglu", "geglu_tanh")
_BLOCK = 2048


def glu(
    gate: torch.Tensor, up: torch.Tensor, kind: Kind, *, out: torch.Tensor | None = None, impl: Impl | None = None
) -> torch.Tensor:
    """act(gate)·up, the activation rounded to the tensors' type before the product.

    Args:
        gate, up: `[..., f]` bfloat16, float16 or float32 (float64: `impl="torch"`); halves of one `[..., 2f]` buffer
            are taken as they lie. kind: "swiglu" or "geglu_tanh".
        out: buffer like gate; may be gate or up.

    Returns:
        `out`, or a new tensor like gate.

    Raises:
        ValueError: an unknown kind, shapes that differ, a buffer that cannot be written row by row.
    """
    _check(kind, gate=gate, up=up, out=out)
    h = torch.empty_like(gate, memory_format=torch.contiguous_format) if out is None else out
    if gate.numel() == 0:
        return h
    if picks_triton(gate, impl):
        _forward_triton(gate, up, h, kind)
    else:
        glu_into(h, gate, up, kind)
    return h


def glu_backward_(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: Kind,
    *,
    recompute_h: bool = False,
    impl: Impl | None = None,
) -> None:
    """The backward pass in place: gate becomes dgate, up becomes dup, and dh becomes h if `recompute_h`.

    Args:
        dh: `[..., f]` gradient of h. gate, up: `[..., f]` as in the forward pass.
        recompute_h: write h over dh, bit for bit what `glu` returned.

    Raises:
        ValueError: as `glu`.
    """
    _check(kind, gate=gate, up=up, dh=dh)
    if gate.numel() == 0:
        return
    if picks_triton(gate, impl):
        _backward_triton(dh, gate, up, kind, recompute_h)
    else:
        glu_backward_into(dh, gate, up, kind, recompute_h=recompute_h)


def _check(kind: str, *, gate: torch.Tensor, **others: torch.Tensor | None) -> None:
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(_KINDS)}")
    for name, tensor in others.items():
        if tensor is not None and (tensor.shape != gate.shape or tensor.dtype != gate.dtype):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, unlike gate, {tuple(gate.shape)} {gate.dtype}"
            )


def _grid(tensor: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Rows × column blocks, and the block: no wider than the row needs."""
    block = min(power_of_2_from(tensor.shape[1]), _BLOCK)
    return (tensor.shape[0], ceil_div(tensor.shape[1], block)), {
        "BLOCK": block,
        "num_warps": min(max(block // 256, 1), 8),
    }


def _forward_triton(gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor, kind: str) -> None:
    """Writes h."""
    gate2, up2, h2 = rows(gate), rows(up), rows(h, written=True)
    grid, launch = _grid(gate2)
    _forward_kernel[grid](
        gate2, up2, h2, gate2.stride(0), up2.stride(0), h2.stride(0), gate2.shape[1], SILU=kind == "swiglu", **launch
    )


def _backward_triton(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, recompute_h: bool) -> None:
    """Writes gate and up, and dh if h is wanted."""
    dh2, gate2, up2 = rows(dh, written=recompute_h), rows(gate, written=True), rows(up, written=True)
    grid, launch = _grid(gate2)
    _backward_kernel[grid](
        dh2, gate2, up2, dh2.stride(0), gate2.stride(0), up2.stride(0), gate2.shape[1],
        SILU=kind == "swiglu", RECOMPUTE_H=recompute_h, **launch,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _sigmoid_argument(g, SILU: tl.constexpr):
        """act(g) = g·σ(this): g itself for SiLU, 2·√(2/π)·(g + 0.044715·g³) for tanh-GELU."""
        if SILU:
            return g
        else:
            return 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)

    @triton.jit
    def _forward_kernel(
        gate, up, h, gate_row, up_row, h_row, width, SILU: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        # Rows × width passes 2³¹ at 175K rows of 12288.
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
        act = g / (1.0 + tl.exp(-_sigmoid_argument(g, SILU)))
        act = act.to(h.dtype.element_ty).to(tl.float32)
        tl.store(h + row * h_row + column, (act * u).to(h.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        dh, gate, up, dh_row, gate_row, up_row, width,
        SILU: tl.constexpr, RECOMPUTE_H: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        grad = tl.load(dh + row * dh_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
        growth = 1.0 + tl.exp(-_sigmoid_argument(g, SILU))
        sigma = 1.0 / growth
        # The forward pass divides; the product g·σ would differ from it in the last bit of h.
        act = g / growth
        if SILU:
            inner = 1.0
        else:
            inner = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        # σ·(1 − σ) without cancellation, which the steep argument of tanh-GELU would magnify.
        decay = tl.exp(-tl.abs(_sigmoid_argument(g, SILU)))
        slope = sigma + g * inner * decay / ((1.0 + decay) * (1.0 + decay))
        if RECOMPUTE_H:
            rounded = act.to(dh.dtype.element_ty).to(tl.float32)
            tl.store(dh + row * dh_row + column, (rounded * u).to(dh.dtype.element_ty), mask=inside)
        tl.store(gate + row * gate_row + column, (grad * u * slope).to(gate.dtype.element_ty), mask=inside)
        tl.store(up + row * up_row + column, (grad * act).to(up.dtype.element_ty), mask=inside)
