"""Linear layers with LoRA as single matrix products, by putting frozen weight and adapters side by side in one buffer.

    [ W   sB ]      W [out, in]: the frozen weights of all projections that share an input, stacked
    [ A    0 ]      A [R, in]: their adapters' A, stacked; sB [out, R]: their scaled B, block by block

With xs = [x, xAᵀ] and dys = [dy, dy·sB], rows of their own in slightly wider buffers:
    y  = xs·[W, sB]ᵀ        dx = dys·[W; A]        dA = (dy·sB)ᵀ·x        dB = s·dyᵀ·(xAᵀ)
so x·A is computed once for all projections, and no wide tensor is read and written again to add the adapter's share;
unless that is asked for (`split`), because engines do it so.
The adapter is never merged into W, where rounding would lose most of an update (LoRA: Hu et al., arXiv 2106.09685).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from tandem.kernels.adapter_copy import Part, copy_parts
from tandem.kernels.reference import wide_product
from tandem.kernels.row_copy import copy_rows

# Tensor cores want rows of 16 bytes; the rest of the rank is zero.
_RANK_MULTIPLE = 8


def padded_rank(total: int) -> int:
    """Columns that adapters of `total` ranks take beside a weight."""
    return -(-total // _RANK_MULTIPLE) * _RANK_MULTIPLE


@dataclass(frozen=True)
class Branch:
    """One projection's adapter: `a [r, in]`, `b [rows, r]`, the first of its rows in the stack, and its factor."""

    a: torch.Tensor
    b: torch.Tensor
    start: int
    scale: float


class LoraLinear:
    """Stacked projections `[out, in]` of one input, in one buffer.

    Args:
        out_features, in_features: of the stack. branches: adapters, in any number. bias: `[out]` or None.
        dtype, device: of the computation.
        split: x·Wᵀ is rounded before the adapters' share is added (on CUDA rounded, too), as vLLM and peft do it. In
            bfloat16 that brings log-probs nearer to theirs, by a quarter with random weights and 2% with SmolLM2's; the
            forward product is a tenth slower, a small one up to two thirds.

    Attributes:
        weight: `[out, in]`, a part of the buffer for the caller to fill. rank: columns that the adapters take.
        adapter_parts: where each branch's a and b belong in the buffer. They are there as they were when this was made,
            and are to be copied again where they have changed.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        branches: list[Branch],
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype,
        device: torch.device,
        split: bool = False,
    ) -> None:
        self.out_features, self.in_features, self.branches, self.bias = out_features, in_features, branches, bias
        total = sum(one.a.shape[0] for one in branches)
        self.rank = padded_rank(total)
        self._split = split and self.rank > 0
        self._buffer = torch.empty(out_features + self.rank, in_features + self.rank, dtype=dtype, device=device)
        self.weight = self._buffer[:out_features, :in_features]
        self._a, self._b = self._buffer[out_features:, :in_features], self._buffer[:out_features, in_features:]
        if self.rank > total or len(branches) > 1 or any(one.b.shape[0] < out_features for one in branches):
            self._b.zero_()
            self._a[total:].zero_()
        self.adapter_parts, column = [], 0
        for one in branches:
            stop = column + one.a.shape[0]
            b = self._b[one.start : one.start + one.b.shape[0], column:stop]
            self.adapter_parts += [Part(one.a, self._a[column:stop], 1.0), Part(one.b, b, one.scale)]
            column = stop
        copy_parts(self.adapter_parts)

    def without_adapters(self) -> LoraLinear:
        """The stack alone, in the same memory."""
        made = copy.copy(self)
        made.branches, made.adapter_parts, made.rank, made._split = [], [], 0, False
        made._buffer = self.weight
        made._a, made._b = self.weight[self.out_features :], self.weight[:, self.in_features :]
        return made

    def inputs(self, x: torch.Tensor | int, *, into: torch.Tensor | None = None) -> torch.Tensor:
        """`xs` `[N, in + rank]` for `x` `[N, in]`; for a number of rows, a buffer whose columns `:in` are to be filled,
        and then `complete_inputs` called. `into`: such a buffer."""
        count = x if isinstance(x, int) else x.shape[0]
        xs = self._buffer.new_empty(count, self.in_features + self.rank) if into is None else into
        if not isinstance(x, int):
            copy_rows(xs[:, : self.in_features], x)
            self.complete_inputs(xs)
        return xs

    def complete_inputs(self, xs: torch.Tensor) -> None:
        """Write `x·Aᵀ` into the last columns of `xs`."""
        if self.rank:
            torch.mm(xs[:, : self.in_features], self._a.t(), out=xs[:, self.in_features :])

    def gradients(self, dy: torch.Tensor | int) -> torch.Tensor:
        """`dys` `[N, out + rank]`, as `inputs` makes `xs`."""
        count = dy if isinstance(dy, int) else dy.shape[0]
        dys = self._buffer.new_empty(count, self.out_features + self.rank)
        if not isinstance(dy, int):
            copy_rows(dys[:, : self.out_features], dy)
            self.complete_gradients(dys)
        return dys

    def complete_gradients(self, dys: torch.Tensor) -> None:
        """Write `dy·sB` into the last columns of `dys`."""
        if self.rank:
            torch.mm(dys[:, : self.out_features], self._b, out=dys[:, self.out_features :])

    def forward(self, xs: torch.Tensor, out: torch.Tensor | None = None, *, rows: slice | None = None) -> torch.Tensor:
        """`y` `[N, out]`, or those of its columns that `rows` of the stack give; written to `out` where it is given."""
        rows = slice(0, self.out_features) if rows is None else rows
        width = self.in_features if self._split else self._buffer.shape[1]
        weight = self._buffer[rows, :width].t()
        if self.bias is None:
            y = torch.mm(xs[:, :width], weight, out=out)
        else:
            y = torch.addmm(self.bias[rows], xs[:, :width], weight, out=out)
        if self._split:
            y.addmm_(xs[:, width:], self._b[rows].t())
        return y

    def add_forward(self, xs: torch.Tensor, into: torch.Tensor, *, to: torch.Tensor) -> None:
        """Write `to + y` `[N, out]` to `into`, which may be `to`. On CUDA y is rounded before the sum, too."""
        if self._split:
            torch.add(to, self.forward(xs), out=into)
            return
        weight = self._buffer[: self.out_features].t()
        if to is into:
            into.addmm_(xs, weight)
        else:
            torch.addmm(to, xs, weight, out=into)
        if self.bias is not None:
            into.add_(self.bias)

    def backward(self, dys: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`dx` `[N, in]`."""
        return torch.mm(dys, self._buffer[:, : self.in_features], out=out)

    def adapter_sums(self, dys: torch.Tensor, xs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This batch of rows' `[R, in]` and `[out, R]` sums, in float32 at least, for `adapter_gradients`.

        They may be added up over batches of rows; the sum over all rows of a pack does not fit bfloat16.
        """
        d_a = wide_product(dys[:, self.out_features :].t(), xs[:, : self.in_features])
        d_b = wide_product(dys[:, : self.out_features].t(), xs[:, self.in_features :])
        return d_a, d_b

    def adapter_gradients(self, sums: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Gradients of every branch's a and b, which hold no more memory than they need."""
        found, column = [], 0
        for one in self.branches:
            stop = column + one.a.shape[0]
            d_a = sums[0] if stop - column == self.rank else sums[0][column:stop].clone()
            found.append((d_a, sums[1][one.start : one.start + one.b.shape[0], column:stop] * one.scale))
            column = stop
        return found
