"""The operations of a decoder layer with their derivatives: linear with LoRA, and the kernels on a family's terms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tandem.kernels import glu as kernels_glu
from tandem.kernels import rms_norm as kernels_norm
from tandem.kernels.rope import rope_
from tandem.rl.families import Norm, Part, Projection

_KINDS: dict[str, kernels_glu.Kind] = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}


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


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`x / rms(x)` times the factor over the last dimension, rounded where Hugging Face's module rounds."""
    return kernels_norm.rms_norm(x, norm.weight.detach(), norm.eps, offset=float(norm.unit_offset))[0]


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, norm: Norm, *, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of `x`, added to `into` where that is given."""
    weight, offset = norm.weight.detach(), float(norm.unit_offset)
    return kernels_norm.rms_norm_backward(dy, x, weight, norm.eps, offset=offset, into=into)


def maybe_norm(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return x if norm is None else rms_norm(x, norm)


def normed(h: torch.Tensor, norm: Norm, tile_rows: int) -> torch.Tensor:
    out = torch.empty_like(h)
    for t in tiles(h.shape[0], tile_rows):
        out[t] = rms_norm(h[t], norm)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in place on `[T, heads, D]` by tables `[T, R]`; dimensions from R on pass (partial rotation)."""
    return rope_(x, cos, sin, rotary_dim=cos.shape[-1])


def rotate_backward(dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The transposed rotation, in place."""
    return rope_(dy, cos, sin, inverse=True, rotary_dim=cos.shape[-1])


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`act(gate)·up`."""
    if activation == "gelu":  # the exact one, which no family of weight uses: no kernel of its own
        return (F.gelu(_wide(gate)) * up).to(gate.dtype)
    return kernels_glu.glu(gate, up, _KINDS[activation])


def glu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, written over the two."""
    if activation == "gelu":
        x = _wide(gate)
        slope = 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return (dy * slope * up).to(gate.dtype), (dy * F.gelu(x)).to(up.dtype)
    kernels_glu.glu_backward_(dy, gate, up, _KINDS[activation])
    return gate, up


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tiles(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
