"""A layer's projections ready to multiply: frozen weights in the compute type with the adapters beside them.

A large model's are prepared for every pass and dropped behind it. Those of a small model stay from pass to pass: its
passes are bound by the number of calls, of which preparing takes a third, and not by memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tandem.kernels.adapter_copy import AdapterCopies
from tandem.kernels.lora_linear import Branch, LoraLinear, padded_rank
from tandem.rl.families import Block, Layer

# What the prepared weights of all layers may take to stay: those of 600 million parameters in bfloat16.
MOST_KEPT_BYTES = 5 << 28

_Key = tuple[object, ...]


class Weights:
    """A layer's projections in the compute type, each dequantised once and held until it is dropped.

    Args:
        kept: whose weights are taken where they are there, and kept where they are made. split: see `LoraLinear`; what
            is kept was made with its own.
    """

    def __init__(self, dtype: torch.dtype, kept: KeptWeights | None = None, *, split: bool = False) -> None:
        self._dtype, self._kept, self._split = dtype, kept, split
        self._made: dict[Block, LoraLinear] = {}

    def of(self, block: Block) -> LoraLinear:
        if block not in self._made:
            made = None if self._kept is None else self._kept.of(block, self._dtype)
            self._made[block] = made or _prepared(block, self._dtype, self._split)
        return self._made[block]

    def drop(self, *blocks: Block) -> None:
        for block in blocks:
            self._made.pop(block, None)


class KeptWeights:
    """Prepared weights of all layers, which stay for the next pass.

    Args:
        split: see `LoraLinear`.

    Attributes:
        version: another one whenever prepared weights have moved.
    """

    def __init__(self, *, split: bool = False) -> None:
        self.version = 0
        self._split = split
        # By the layers that are multiplied by: what they were prepared from is compared, and only the latest is kept.
        self._linears: dict[_Key, tuple[tuple[_Key, _Key], LoraLinear]] = {}
        # The adapters of all that is kept, copied at once; None: to be made anew.
        self._copies: AdapterCopies | None = None
        self._allowed = True

    def begin(self, layer: Layer, layers: int, dtype: torch.dtype) -> bool:
        """A forward pass begins, before which the adapters may have changed.

        Args:
            layer: one of `layers` equal ones.

        Returns:
            Whether weights are kept: not those of a large model, and none after `stop`.
        """
        if not self._allowed or layers * _prepared_bytes(layer, dtype) > MOST_KEPT_BYTES:
            self._drop()
            return False
        if self._linears:
            if self._copies is None:
                parts = [part for _, linear in self._linears.values() for part in linear.adapter_parts]
                self._copies = AdapterCopies(parts)
            self._copies.run()
        return True

    def prepare(self, layers: Callable[[], list[Layer]], dtype: torch.dtype) -> None:
        """Those of all layers, if there are none yet: side by side, and not among what a pass gives back, from which
        the allocator could then return no whole page."""
        if not self._linears:
            for layer in layers():
                for block in layer.blocks:
                    self.of(block, dtype)

    def of(self, block: Block, dtype: torch.dtype) -> LoraLinear:
        """With the adapters as they were when this pass began. Where they are switched off, as for a reference policy,
        what is kept stays, and the weight of it is taken."""
        bases, origin = tuple(id(one.base) for one in block.projections), _origin(block, dtype)
        had = self._linears[bases][0] if bases in self._linears else None
        if had is not None and had[0] == origin[0] and had[1] and not origin[1]:
            return self._linears[bases][1].without_adapters()
        if had != origin:
            self._linears.pop(bases, None)  # before another one takes as much memory
            self._copies = None
            self.version += 1
            self._linears[bases] = origin, _prepared(block, dtype, self._split)
        return self._linears[bases][1]

    def stop(self) -> None:
        """Memory is needed: drop all, and keep none from now on."""
        self._allowed = False
        self._drop()

    def _drop(self) -> None:
        self.version += 1
        self._linears.clear()
        self._copies = None


def _origin(block: Block, dtype: torch.dtype) -> tuple[_Key, _Key]:
    """What a prepared weight is made of, but for the adapters' values: type, weights, biases; and where which adapters
    lie."""
    base: list[object] = [dtype]
    adapters: list[object] = []
    for number, one in enumerate(block.projections):
        base += [None if t is None else (t.data_ptr(), t._version) for t in (one.base.weight, one.bias)]
        if one.adapter is not None:
            adapters.append((number, one.adapter.a.data_ptr(), one.adapter.b.data_ptr(), one.adapter.scale))
    return tuple(base), tuple(adapters)


def _prepared(block: Block, dtype: torch.dtype, split: bool) -> LoraLinear:
    starts = block.starts
    branches = [
        Branch(one.adapter.a.detach(), one.adapter.b.detach(), start, one.adapter.scale)
        for one, start in zip(block.projections, starts, strict=True)
        if one.adapter is not None
    ]
    device = block.projections[0].device
    made = LoraLinear(*block.size, branches, bias=block.bias(dtype), dtype=dtype, device=device, split=split)
    for one, start in zip(block.projections, starts, strict=True):
        one.write_weight(made.weight[start : start + one.size[0]])
    return made


def _prepared_bytes(layer: Layer, dtype: torch.dtype) -> int:
    total = 0
    for block in layer.blocks:
        rank = padded_rank(sum(one.adapter.a.shape[0] for one in block.projections if one.adapter is not None))
        total += (block.size[0] + rank) * (block.size[1] + rank)
    return total * dtype.itemsize
