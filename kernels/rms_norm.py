"""RMSNorm with a frozen weight: y = norm(h)·(weight + offset), optionally fused with the residual sum h = x + residual.

Statistics are float32. The order of casts is that of the Hugging Face modules: with offset 0 the normalised row is
rounded before it is scaled (LlamaRMSNorm), with another offset it is scaled in float32 first (GemmaRMSNorm, offset 1).
Nothing but h is needed for the backward pass, which computes the reciprocal root mean square again.
"""

from __future__ import annotations

import torch

from tandem.kernels.reference import Impl, normed, normed_grad, picks_triton, power_of_2_from, rows

try:
    import triton
    import triton.language as tl
except ImportError:  # the twins answer where Triton does not exist
    triton = None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    h_out: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the rows of x, or of x + residual.

    Args:
        x: `[..., d]` bfloat16, float16 or float32 (float64: `impl="torch"`). weight: `[d]`.
        eps: added to the mean square.
        residual: like x, added first; the sum is rounded to x's type before it is normalised.
        out, h_out: buffers for y and h like x; `out` may be x, `h_out` may be x or residual.

    Returns:
        y and h, both in x's shape and type; without a residual h is x itself.

    Raises:
        ValueError: shapes that do not fit, or a buffer that cannot be written row by row.
    """
    _check(x, weight, residual=residual, out=out, h_out=h_out)
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if residual is None:
        if h_out is not None:
            raise ValueError("h_out without residual: h is x itself")
        h = x
    else:
        h = torch.empty_like(x, memory_format=torch.contiguous_format) if h_out is None else h_out
    if x.numel() == 0:
        return y, h
    if picks_triton(x, impl):
        _forward_triton(x, weight, eps, offset, residual, y, h)
    else:
        if residual is not None:
            torch.add(x, residual, out=h)
        y.copy_(normed(h, weight, eps, offset))
    return y, h


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    into: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """The gradient of `rms_norm` with respect to its row h (x, or x + residual: both have this gradient).

    Args:
        dy: `[..., d]` gradient of y. h: `[..., d]` what the forward pass normalised.
        into: a gradient of h that is there already; dx is added to it in float32 and rounded once.

    Returns:
        `into`, or a new tensor like h.
    """
    _check(h, weight, dy=dy, into=into)
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if into is None else into
    if h.numel() == 0:
        return dx
    if picks_triton(h, impl):
        _backward_triton(dy, h, weight, eps, offset, dx, accumulate=into is not None)
    else:
        grad = normed_grad(dy, h, weight, eps, offset)
        dx.copy_(grad if into is None else grad + into)
    return dx


def _check(x: torch.Tensor, weight: torch.Tensor, **others: torch.Tensor | None) -> None:
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} does not fit rows of {x.shape[-1]} elements")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(x.shape)}")


def _launch(width: int) -> dict[str, int]:
    """One row per program. No more threads than elements: replicas must not read what another has written."""
    block = power_of_2_from(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _forward_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    h: torch.Tensor,
) -> None:
    """Writes y, and h where there is a residual."""
    fused = residual is not None
    x2, y2 = rows(x), rows(y, written=True)
    r2, h2 = (rows(residual), rows(h, written=True)) if residual is not None else (x2, x2)
    _forward_kernel[(x2.shape[0],)](
        x2, r2, weight, y2, h2,
        x2.stride(0), r2.stride(0), y2.stride(0), h2.stride(0), x2.shape[1], eps, offset,
        FUSED=fused, CAST_FIRST=offset == 0.0, **_launch(x2.shape[1]),
    )  # fmt: skip


def _backward_triton(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    dx: torch.Tensor,
    *,
    accumulate: bool,
) -> None:
    """Writes dx, or adds to it."""
    dy2, h2, dx2 = rows(dy), rows(h), rows(dx, written=True)
    _backward_kernel[(h2.shape[0],)](
        dy2, h2, weight, dx2, dy2.stride(0), h2.stride(0), dx2.stride(0), h2.shape[1], eps, offset,
        ACCUMULATE=accumulate, **_launch(h2.shape[1]),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _forward_kernel(
        x, residual, weight, y, h, x_row, residual_row, y_row, h_row, width, eps, offset,
        FUSED: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Rows × width passes 2³¹ at 524K rows of 4096.
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        if FUSED:
            value += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(h.dtype.element_ty)
            tl.store(h + row * h_row + column, rounded, mask=inside)
            value = rounded.to(tl.float32)
        unit = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if CAST_FIRST:
            unit = unit.to(y.dtype.element_ty).to(tl.float32)
        else:
            scale += offset
        tl.store(y + row * y_row + column, (unit * scale).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        dy, h, weight, dx, dy_row, h_row, dx_row, width, eps, offset,
        ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(h + row * h_row + column, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
        rstd = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        unit = value * rstd
        grad = rstd * (scaled - unit * (tl.sum(scaled * unit, axis=0) / width))
        target = dx + row * dx_row + column
        if ACCUMULATE:
            grad += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, grad.to(dx.dtype.element_ty), mask=inside)
