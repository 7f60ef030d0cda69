"""Copies the adapters of many layers beside their weights in one launch.

A small model's pass is bound by the number of calls: two small matrices for each of seven projections in thirty layers,
cast and scaled, are some thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tandem.kernels.reference import Impl, picks_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch copies where Triton does not exist
    triton = None

_TILE = 1024


class Part(NamedTuple):
    """`target` `[n, m]` is to be `scale · source` `[n, m]`; elements of a row are neighbours in both."""

    source: torch.Tensor
    target: torch.Tensor
    scale: float


def copy_parts(parts: Sequence[Part]) -> None:
    """Copy all as they are now, by PyTorch."""
    plain, scaled = [one for one in parts if one.scale == 1], [one for one in parts if one.scale != 1]
    if plain:
        torch._foreach_copy_([one.target for one in plain], [one.source for one in plain])
    if scaled:
        wide = [one.source.to(torch.promote_types(one.source.dtype, one.target.dtype)) for one in scaled]
        torch._foreach_copy_([one.target for one in scaled], torch._foreach_mul(wide, [one.scale for one in scaled]))


class AdapterCopies:
    """The parts of many layers, whose memory stays where it is.

    Args:
        parts: held, and with them their memory.

    Raises:
        ValueError: a part whose two matrices are not alike.
    """

    def __init__(self, parts: Sequence[Part], *, impl: Impl | None = None) -> None:
        for one in parts:
            if one.source.shape != one.target.shape or one.source.dim() != 2:
                raise ValueError(f"{tuple(one.source.shape)} is to be copied to {tuple(one.target.shape)}")
        self._parts = list(parts)
        types = {(one.source.dtype, one.target.dtype, one.target.device) for one in parts}
        self._table: torch.Tensor | None = None
        dense = all(x.stride(1) == 1 for one in parts for x in (one.source, one.target))
        alike = len(types) == 1 and dense
        if alike and picks_triton(parts[0].source, impl) and picks_triton(parts[0].target, impl):
            rows = [(s.data_ptr(), t.data_ptr(), s.shape[0], s.shape[1], s.stride(0), t.stride(0)) for s, t, _ in parts]
            device = parts[0].target.device
            self._table = torch.tensor(rows, dtype=torch.int64).to(device)
            self._scales = torch.tensor([one.scale for one in parts], dtype=torch.float32).to(device)
            self._tiles = max(-(-one.source.numel() // _TILE) for one in parts)

    def run(self) -> None:
        """Copy all as they are now."""
        if self._table is None:
            copy_parts(self._parts)
            return
        source, target, _ = self._parts[0]
        _copy_kernel[(len(self._parts), self._tiles)](
            self._table, self._scales, source, target, TILE=_TILE, num_warps=4
        )


if triton is not None:

    @triton.jit
    def _copy_kernel(table, scales, source_like, target_like, TILE: tl.constexpr):
        part = tl.program_id(0)
        entry = table + part * 6
        source = tl.load(entry).to(tl.pointer_type(source_like.dtype.element_ty))
        target = tl.load(entry + 1).to(tl.pointer_type(target_like.dtype.element_ty))
        rows, columns = tl.load(entry + 2), tl.load(entry + 3)
        place = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = place < rows * columns
        row, column = place // columns, place % columns
        value = tl.load(source + row * tl.load(entry + 4) + column, mask=inside).to(tl.float32)
        scaled = (value * tl.load(scales + part)).to(target_like.dtype.element_ty)
        tl.store(target + row * tl.load(entry + 5) + column, scaled, mask=inside)
