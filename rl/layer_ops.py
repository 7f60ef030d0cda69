"""What a decoder layer is computed with: the kernels on a family's terms, and sums of its adapters' gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tandem.kernels import glu as kernels_glu
from tandem.kernels import rms_norm as kernels_norm
from tandem.kernels.lora_linear import LoraLinear
from tandem.kernels.reference import wide
from tandem.kernels.rope import qk_norm_rope, qk_norm_rope_backward, rope_
from tandem.rl.families import Block, Norm

_KINDS: dict[str, kernels_glu.Kind] = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}

Rope = tuple[torch.Tensor, torch.Tensor]


class LoraGrads:
    """Gradients of a layer's adapters, summed over rows in float32 at least."""

    def __init__(self) -> None:
        self._sums: dict[Block, tuple[torch.Tensor, torch.Tensor]] = {}
        self._found: dict[int, torch.Tensor] = {}

    def add(self, block: Block, linear: LoraLinear, dys: torch.Tensor, xs: torch.Tensor) -> None:
        """Some rows' share, from `LoraLinear`'s buffers."""
        if not linear.branches:
            return
        more = linear.adapter_sums(dys, xs)
        if block in self._sums:
            for total, part in zip(self._sums[block], more, strict=True):
                total += part
        else:
            self._sums[block] = more

    def finish(self, block: Block, linear: LoraLinear) -> None:
        """All rows of `block` have been added."""
        if block not in self._sums:
            return
        pairs = linear.adapter_gradients(self._sums.pop(block))
        adapters = [one.adapter for one in block.projections if one.adapter is not None]
        for adapter, (d_a, d_b) in zip(adapters, pairs, strict=True):
            self._found[id(adapter.a)], self._found[id(adapter.b)] = d_a, d_b

    def of(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        found = self._found.get(id(parameter))
        return None if found is None else found.to(parameter.dtype)


def rms_norm(x: torch.Tensor, norm: Norm, out: torch.Tensor | None = None) -> torch.Tensor:
    """`x / rms(x)` times the factor over the last dimension, rounded where Hugging Face's module rounds."""
    return kernels_norm.rms_norm(x, norm.weight, norm.eps, offset=float(norm.unit_offset), out=out)[0]


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, norm: Norm, *, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of `x`, added to `into` where that is given."""
    return kernels_norm.rms_norm_backward(dy, x, norm.weight, norm.eps, offset=float(norm.unit_offset), into=into)


def rotated(x: torch.Tensor, norm: Norm | None, rope: Rope, out: torch.Tensor) -> torch.Tensor:
    """The heads `[T, H, D]` of `x`, normed where there is a norm, then turned, in `out`, which may be `x`."""
    cos, sin = rope
    if norm is not None:
        offset = float(norm.unit_offset)
        return qk_norm_rope(x, norm.weight, norm.eps, cos, sin, offset=offset, rotary_dim=cos.shape[-1], out=out)
    if out is not x:
        out.copy_(x)
    return rope_(out, cos, sin, rotary_dim=cos.shape[-1])


def rotated_backward(dy: torch.Tensor, x: torch.Tensor, norm: Norm | None, rope: Rope) -> None:
    """Write the gradient of `x` over `x`, which `rotated` got; without a norm the values of `x` do not matter."""
    cos, sin = rope
    if norm is not None:
        offset = float(norm.unit_offset)
        qk_norm_rope_backward(dy, x, norm.weight, norm.eps, cos, sin, offset=offset, rotary_dim=cos.shape[-1], out=x)
        return
    x.copy_(dy)
    rope_(x, cos, sin, inverse=True, rotary_dim=cos.shape[-1])


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor) -> torch.Tensor:
    """`act(gate)·up` in `out`."""
    if activation == "gelu":  # the exact one, which no family of weight uses: no kernel of its own
        return out.copy_(F.gelu(wide(gate)) * up)
    return kernels_glu.glu(gate, up, _KINDS[activation], out=out)


def glu_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    """Gradients of gate and up, written over the two, and `act(gate)·up`, written over `dy`."""
    if activation == "gelu":
        x = wide(gate)
        slope = 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        product, d_gate = F.gelu(x) * up, dy * slope * up
        up.copy_(dy * F.gelu(x))
        gate.copy_(d_gate)
        dy.copy_(product)
        return
    kernels_glu.glu_backward_(dy, gate, up, _KINDS[activation], recompute_h=True)


def tiles(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
