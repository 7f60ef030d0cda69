"""The operations of a decoder layer with their derivatives, in plain torch: linear with LoRA, RMSNorm, RoPE, gate.

Statistics, rotation and gate are computed in float32 at least and rounded to the type of the input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tandem.rl.families import Norm, Part, Projection


class Weights:
    """A layer's frozen weights and adapters in the compute type, each made once and held until it is dropped."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._base: dict[Projection, torch.Tensor] = {}
        self._adapters: dict[Projection, tuple[torch.Tensor, torch.Tensor]] = {}

    def base(self, part: Part) -> torch.Tensor:
        if part.projection not in self._base:
            self._base[part.projection] = part.projection.weight(self.dtype)
        return self._base[part.projection][part.start : part.stop]

    def adapter(self, part: Part) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """`a [r, in]`, the part's rows of `b [out, r]`, and the scale."""
        if (adapter := part.projection.adapter) is None:
            return None
        if part.projection not in self._adapters:
            self._adapters[part.projection] = (adapter.a.detach().to(self.dtype), adapter.b.detach().to(self.dtype))
        a, b = self._adapters[part.projection]
        return a, b[part.start : part.stop], adapter.scale

    def drop(self, *parts: Part) -> None:
        for part in parts:
            self._base.pop(part.projection, None)


class LoraGrads:
    """Gradients of adapters, summed in float32 at least."""

    def __init__(self) -> None:
        self._sums: dict[Projection, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, part: Part, d_a: torch.Tensor, d_b: torch.Tensor) -> None:
        """`d_a` `[r, in]`; `d_b` `[rows of the part, r]`."""
        if part.projection not in self._sums:
            adapter = part.projection.adapter
            assert adapter is not None
            self._sums[part.projection] = (
                d_a.new_zeros(adapter.a.shape),
                d_b.new_zeros(adapter.b.shape),
            )
        sum_a, sum_b = self._sums[part.projection]
        sum_a += d_a
        sum_b[part.start : part.stop] += d_b

    def by_parameter(self) -> dict[int, torch.Tensor]:
        found = {}
        for projection, (d_a, d_b) in self._sums.items():
            assert projection.adapter is not None
            found[id(projection.adapter.a)], found[id(projection.adapter.b)] = d_a, d_b
        return found


def linear(x: torch.Tensor, part: Part, weights: Weights) -> torch.Tensor:
    """`x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ`, `[N, in]` -> `[N, out]`."""
    bias = part.projection.bias
    y = F.linear(x, weights.base(part), None if bias is None else bias.detach()[part.start : part.stop].to(x.dtype))
    if (adapter := weights.adapter(part)) is not None:
        a, b, scale = adapter
        y.addmm_(x @ a.t(), b.t(), alpha=scale)
    return y


def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    part: Part,
    weights: Weights,
    grads: LoraGrads,
    *,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of `x`, added to `into` where that is given; the adapter's gradients go to `grads`."""
    base = weights.base(part)
    dx = dy @ base if into is None else into.addmm_(dy, base)
    if (inner := adapter_backward(dy, x, part, weights, grads)) is not None:
        a, _, scale = weights.adapter(part)  # type: ignore[misc]  # there is an inner gradient, so there is an adapter
        dx.addmm_(inner, a, alpha=scale)
    return dx


def adapter_backward(
    dy: torch.Tensor, x: torch.Tensor, part: Part, weights: Weights, grads: LoraGrads
) -> torch.Tensor | None:
    """Add the adapter's gradients to `grads`; returns `dy·B` `[N, r]`, or None where there is no adapter."""
    if (adapter := weights.adapter(part)) is None:
        return None
    a, b, scale = adapter
    inner = dy @ b
    grads.add(part, _wide_product(inner.t(), x) * scale, _wide_product(dy.t(), x @ a.t()) * scale)
    return inner


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` kept in float32 at least: the sum over all rows of a pack does not fit bfloat16."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`x / rms(x)` times the factor over the last dimension, rounded where Hugging Face's module rounds."""
    wide = _wide(x)
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.unit_offset:
        return (unit * (1 + norm.weight.to(wide.dtype))).to(x.dtype)
    return norm.weight.to(x.dtype) * unit.to(x.dtype)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`dx = (g − x̂·mean(g·x̂)) / rms(x)`, where x̂ is the normed row and g = dy times the factor."""
    wide = _wide(x)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    unit = wide * inverse
    factor = norm.weight.to(wide.dtype)
    g = dy.to(wide.dtype) * (1 + factor if norm.unit_offset else factor)
    return ((g - unit * (g * unit).mean(-1, keepdim=True)) * inverse).to(x.dtype)


def maybe_norm(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return x if norm is None else rms_norm(x, norm)


def normed(h: torch.Tensor, norm: Norm, tile_rows: int) -> torch.Tensor:
    out = torch.empty_like(h)
    for t in tiles(h.shape[0], tile_rows):
        out[t] = rms_norm(h[t], norm)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on `[T, heads, D]` by tables `[T, R]`; dimensions from R on pass (partial rotation)."""
    width = cos.shape[-1]
    head = x[..., :width].to(cos.dtype)
    turned = (head * cos[:, None] + _half_turn(head) * sin[:, None]).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def rotate_backward(dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The transposed rotation."""
    width = cos.shape[-1]
    head = dy[..., :width].to(cos.dtype)
    turned = (head * cos[:, None] - _half_turn(head * sin[:, None])).to(dy.dtype)
    return turned if width == dy.shape[-1] else torch.cat([turned, dy[..., width:]], -1)


def _half_turn(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`act(gate)·up`."""
    return (_act(_wide(gate), activation) * up).to(gate.dtype)


def glu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up."""
    wide = _wide(gate)
    d_up = (dy * _act(wide, activation)).to(up.dtype)
    return (dy * _act_slope(wide, activation).mul_(up)).to(gate.dtype), d_up


def _act(x: torch.Tensor, name: str) -> torch.Tensor:
    return F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


def _act_slope(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if name == "gelu":
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(root * (x + cubic * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * cubic * x * x)


def tiles(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
