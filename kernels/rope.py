"""Rotary position embedding in place, alone or behind a per-head RMSNorm (Qwen3's q_norm and k_norm).

Half-split layout as in Hugging Face: entries i and i + R/2 of a head form a plane that turns by position·inv_freq[i];
entries from R on (partial rotary) are not turned. Angles and products are float32; the tables may be of another type.
"""

from __future__ import annotations

import torch

from tandem.kernels.reference import Impl, ceil_div, normed, normed_grad, picks_triton, power_of_2_from, rotated

try:
    import triton
    import triton.language as tl
except ImportError:  # the twins answer where Triton does not exist
    triton = None

# Elements of half a head, times heads, that one program holds.
_TILE = 2048


def rope_tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, `[T, R/2]` float32 each, for the given positions.

    Args:
        positions: `[T]` every token's own place in its sequence: in a pack that is not its row.
        inv_freq: `[R/2]` radians per token. scaling: the attention factor of YaRN and the like; both tables carry it.

    The angle is a float32 product, as in Hugging Face and vLLM: at position 128K it is off by up to 4e-3 rad, and the
    trainer has to be off by the same.
    """
    angle = positions.float()[:, None] * inv_freq.to(device=positions.device, dtype=torch.float32)
    return angle.cos() * scaling, angle.sin() * scaling


def rope_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
    rotary_dim: int | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Turn the heads of x in place.

    Args:
        x: `[T, H, D]`, last dimension contiguous; a slice of the QKV buffer is taken as it lies.
        cos, sin: `[T, R/2]`, or `[T, R]` with equal halves; of any floating type.
        inverse: turn back by the transposed map, which is the backward pass (with tables that carry a scaling s, the
            result is s times the gradient of the turn, not its inverse).
        rotary_dim: R. Default: D if the tables have D columns, else twice their columns.

    Returns:
        x.

    Raises:
        ValueError: shapes that do not fit.
    """
    half = _half(x, cos, sin, rotary_dim)
    if x.numel() == 0:
        return x
    if picks_triton(x, impl):
        _rope_triton(x, cos, sin, half, inverse)
    else:
        x.copy_(rotated(x, cos, sin, half, inverse=inverse))
    return x


def qk_norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    offset: float = 0.0,
    rotary_dim: int | None = None,
    out: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """RMSNorm of every head, then the turn, in one pass; rounded in between as `rms_norm` rounds.

    Args:
        x: `[T, H, D]`, last dimension contiguous. weight: `[D]`. eps, offset: as in `rms_norm`.
        cos, sin, rotary_dim: as in `rope_`.
        out: buffer like x; x itself where no backward pass follows, which needs x as it was.

    Returns:
        `out`, or a new tensor like x.
    """
    half = _half(x, cos, sin, rotary_dim)
    _check_norm(x, weight, out)
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel() == 0:
        return y
    if picks_triton(x, impl):
        _norm_rope_triton(x, weight, eps, offset, cos, sin, half, y)
    else:
        y.copy_(rotated(normed(x, weight, eps, offset), cos, sin, half, inverse=False))
    return y


def qk_norm_rope_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    offset: float = 0.0,
    rotary_dim: int | None = None,
    out: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """dx of `qk_norm_rope`; the weight is frozen.

    Args:
        dy: `[T, H, D]` gradient of the result. x: what went into the norm.
        out: buffer like x for dx; may be dy or x.

    Returns:
        `out`, or a new tensor like x.
    """
    half = _half(x, cos, sin, rotary_dim)
    _check_norm(x, weight, out, dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel() == 0:
        return dx
    if picks_triton(x, impl):
        _norm_rope_backward_triton(dy, x, weight, eps, offset, cos, sin, half, dx)
    else:
        dx.copy_(normed_grad(rotated(dy, cos, sin, half, inverse=True), x, weight, eps, offset))
    return dx


def _half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int | None) -> int:
    """R/2, after checking the tables."""
    if x.dim() != 3 or x.stride(2) != 1:
        raise ValueError(f"x must be [T, H, D] with contiguous heads, not {tuple(x.shape)} with strides {x.stride()}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != x.shape[0]:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [T, ·] with T = {x.shape[0]}")
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        raise ValueError("cos and sin must have contiguous rows")
    head_dim, columns = x.shape[2], cos.shape[1]
    rotary = rotary_dim if rotary_dim is not None else head_dim if columns == head_dim else 2 * columns
    if rotary % 2 or not 0 < rotary <= head_dim or columns not in (rotary, rotary // 2):
        raise ValueError(f"rotary dimension {rotary}: heads have {head_dim} entries and the tables {columns} columns")
    return rotary // 2


def _check_norm(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> None:
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} does not fit heads of {x.shape[-1]} entries")
    for tensor in others:
        if tensor is not None and (tensor.shape != x.shape or tensor.stride(2) != 1):
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not like x")


def _grid(x: torch.Tensor, half: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Tokens × blocks of heads. No more threads than elements: replicas must not read what another has written."""
    tokens, heads, head_dim = x.shape
    columns = power_of_2_from(half)
    block = max(min(power_of_2_from(heads), _TILE // columns), 1)
    rest = head_dim - 2 * half
    return (tokens, ceil_div(heads, block)), {
        "HEADS": block,
        "HALF": columns,
        "REST": power_of_2_from(rest) if rest else 0,
        "num_warps": min(max(block * columns // 256, 1), 8),
    }


def _rope_triton(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int, inverse: bool) -> None:
    """Turns x in place."""
    grid, launch = _grid(x, half)
    del launch["REST"]
    _rope_kernel[grid](
        x, cos, sin, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), x.shape[1], half,
        INVERSE=inverse, **launch,
    )  # fmt: skip


def _norm_rope_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    half: int,
    y: torch.Tensor,
) -> None:
    """Writes y."""
    grid, launch = _grid(x, half)
    _norm_rope_kernel[grid](
        x, weight, cos, sin, y, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), y.stride(0), y.stride(1),
        x.shape[1], x.shape[2], half, eps, offset, CAST_FIRST=offset == 0.0, **launch,
    )  # fmt: skip


def _norm_rope_backward_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    half: int,
    dx: torch.Tensor,
) -> None:
    """Writes dx."""
    grid, launch = _grid(x, half)
    _norm_rope_backward_kernel[grid](
        dy, x, weight, cos, sin, dx, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
        cos.stride(0), sin.stride(0), dx.stride(0), dx.stride(1), x.shape[1], x.shape[2], half, eps, offset, **launch,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _load(pointer, mask):
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _rope_kernel(
        x, cos, sin, x_token, x_head, cos_token, sin_token, heads, half,
        INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        # Tokens × heads × entries passes 2³¹ at 524K tokens of 32 × 128.
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        column = tl.arange(0, HALF)
        c = _load(cos + token * cos_token + column, column < half)[None, :]
        s = _load(sin + token * sin_token + column, column < half)[None, :]
        if INVERSE:
            s = -s
        inside = (head < heads)[:, None] & (column < half)[None, :]
        place = x + token * x_token + head.to(tl.int64)[:, None] * x_head + column[None, :]
        first, second = _load(place, inside), _load(place + half, inside)
        tl.store(place, (first * c - second * s).to(x.dtype.element_ty), mask=inside)
        tl.store(place + half, (second * c + first * s).to(x.dtype.element_ty), mask=inside)

    @triton.jit
    def _scaled(value, rstd, weight, offset, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
        """One part of a normed head, rounded as RMSNorm rounds, back in float32."""
        unit = value * rstd
        if CAST_FIRST:
            result = unit.to(dtype).to(tl.float32) * weight
        else:
            result = unit * (weight + offset)
        return result.to(dtype).to(tl.float32)

    @triton.jit
    def _norm_rope_kernel(
        x, weight, cos, sin, y, x_token, x_head, cos_token, sin_token, y_token, y_head,
        heads, head_dim, half, eps, offset,
        CAST_FIRST: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        dtype: tl.constexpr = y.dtype.element_ty
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        column = tl.arange(0, HALF)
        turned = column < half
        inside = (head < heads)[:, None] & turned[None, :]
        x_base = x + token * x_token + head.to(tl.int64)[:, None] * x_head
        y_base = y + token * y_token + head.to(tl.int64)[:, None] * y_head
        first = _load(x_base + column[None, :], inside)
        second = _load(x_base + half + column[None, :], inside)
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        if REST > 0:
            tail = 2 * half + tl.arange(0, REST)
            tail_inside = (head < heads)[:, None] & (tail < head_dim)[None, :]
            rest = _load(x_base + tail[None, :], tail_inside)
            square += tl.sum(rest * rest, axis=1)
        rstd = tl.rsqrt(square / head_dim + eps)[:, None]
        if REST > 0:
            w_rest = _load(weight + tail, tail < head_dim)[None, :]
            rest = _scaled(rest, rstd, w_rest, offset, dtype, CAST_FIRST)
            tl.store(y_base + tail[None, :], rest.to(dtype), mask=tail_inside)
        first = _scaled(first, rstd, _load(weight + column, turned)[None, :], offset, dtype, CAST_FIRST)
        second = _scaled(second, rstd, _load(weight + half + column, turned)[None, :], offset, dtype, CAST_FIRST)
        c = _load(cos + token * cos_token + column, turned)[None, :]
        s = _load(sin + token * sin_token + column, turned)[None, :]
        tl.store(y_base + column[None, :], (first * c - second * s).to(dtype), mask=inside)
        tl.store(y_base + half + column[None, :], (second * c + first * s).to(dtype), mask=inside)

    @triton.jit
    def _norm_rope_backward_kernel(
        dy, x, weight, cos, sin, dx, dy_token, dy_head, x_token, x_head, cos_token, sin_token, dx_token, dx_head,
        heads, head_dim, half, eps, offset, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        dtype: tl.constexpr = dx.dtype.element_ty
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        column = tl.arange(0, HALF)
        turned = column < half
        inside = (head < heads)[:, None] & turned[None, :]
        dy_base = dy + token * dy_token + head.to(tl.int64)[:, None] * dy_head
        x_base = x + token * x_token + head.to(tl.int64)[:, None] * x_head
        dx_base = dx + token * dx_token + head.to(tl.int64)[:, None] * dx_head
        c = _load(cos + token * cos_token + column, turned)[None, :]
        s = _load(sin + token * sin_token + column, turned)[None, :]
        first, second = _load(x_base + column[None, :], inside), _load(x_base + half + column[None, :], inside)
        d_first, d_second = _load(dy_base + column[None, :], inside), _load(dy_base + half + column[None, :], inside)
        w_first = _load(weight + column, turned)[None, :] + offset
        w_second = _load(weight + half + column, turned)[None, :] + offset
        # Turned back and scaled: the gradient of the unit vector.
        g_first = (d_first * c + d_second * s) * w_first
        g_second = (d_second * c - d_first * s) * w_second
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        along = tl.sum(g_first * first, axis=1) + tl.sum(g_second * second, axis=1)
        if REST > 0:
            tail = 2 * half + tl.arange(0, REST)
            tail_inside = (head < heads)[:, None] & (tail < head_dim)[None, :]
            rest = _load(x_base + tail[None, :], tail_inside)
            g_rest = _load(dy_base + tail[None, :], tail_inside)
            g_rest *= _load(weight + tail, tail < head_dim)[None, :] + offset
            square += tl.sum(rest * rest, axis=1)
            along += tl.sum(g_rest * rest, axis=1)
        rstd = tl.rsqrt(square / head_dim + eps)
        share = (along * rstd * rstd / head_dim)[:, None]
        rstd = rstd[:, None]
        if REST > 0:
            tl.store(dx_base + tail[None, :], (rstd * (g_rest - rest * share)).to(dtype), mask=tail_inside)
        tl.store(dx_base + column[None, :], (rstd * (g_first - first * share)).to(dtype), mask=inside)
        tl.store(dx_base + half + column[None, :], (rstd * (g_second - second * share)).to(dtype), mask=inside)
