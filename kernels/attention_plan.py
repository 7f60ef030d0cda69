"""Attention over a pack cut into pieces that fast kernels compute, and the pieces put together again.

Every root and every child is a causal segment. A family with children needs one piece more, the rows of all its
children against the root's keys, without a mask; the two results of a child's row are merged by their log-sum-exps:

    lse = log(e^l₁ + e^l₂)    O = O₁·e^(l₁ − lse) + O₂·e^(l₂ − lse)

The backward pass of every piece gets the merged O and lse, with which its weights are the true ones; dQ is the sum of
both pieces, and a root's dK and dV are those of its own segment plus those of the cross piece. Each sum has a few
terms, so adding them in the tensors' own type rounds once or twice.

Long pieces go to cuDNN, for which PyTorch builds a plan for every new size and keeps it for good. So that a run of many
lengths meets few sizes, very long ones are cut to lengths that come again: a segment's last rows, a sixteenth at most,
look back at the rows before them as a child looks back at its root.

Which segments go where depends on the layout alone: `plan` works it out once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch

from tandem.kernels.attention_blocked import Gradients, Scoring, blocked_backward, blocked_forward
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.kernels.reference import Impl, ceil_div, picks_triton, power_of_2_from, wide

try:
    import triton
    import triton.language as tl
except ImportError:  # the twin answers where Triton does not exist
    triton = None

# Segments from this length on are long: a call each, to cuDNN.
LONG_SEGMENT = 2048
# Cross pieces of so many scores a head are long. Higher than a segment's, because pairs of lengths come again less
# often, and only work of this size earns a plan back over the layers of a model.
LONG_CROSS = 16384 * 16384
# A long segment is padded to a multiple of this; from EXACT_LENGTH on, where that would cost memory, it is cut.
PLAN_ROWS = 256
EXACT_LENGTH = 32768
# Lengths between a power of two and the next, of those that pieces are cut to.
_LENGTHS = 16
# Rows of a merge at a time, where it is plain PyTorch.
_MERGE_ROWS = 4096

Rows = slice | torch.Tensor
_Range = tuple[int, int]
# Rows and keys.
_Pair = tuple[_Range, _Range]


@dataclass(frozen=True)
class Run:
    """Causal segments in a row: the rows, and where each segment begins and the last one ends, from `start`.

    `offsets`: `[segments + 1]` int32 on the device. `long`: it is one segment, for cuDNN.
    """

    start: int
    stop: int
    offsets: torch.Tensor
    longest: int
    long: bool


@dataclass(frozen=True)
class Cross:
    """Rows against keys that all of them see, without a mask: children against their root, family by family, or the end
    of a segment that was cut against its beginning.

    rows, keys: slices of the pack, or where several families share the call, int64 indices on the device.
    """

    rows: Rows
    keys: Rows
    row_offsets: torch.Tensor
    key_offsets: torch.Tensor
    longest_rows: int
    longest_keys: int
    long: bool


@dataclass(frozen=True)
class Plan:
    """`blocked`: families that the kernels do not take, by index. `whole`: one run is all there is."""

    runs: list[Run]
    crosses: list[Cross]
    blocked: list[int]

    @property
    def whole(self) -> bool:
        return len(self.runs) == 1 and not self.crosses and not self.blocked

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that lies on the device, in an order that does not depend on the pack."""
        found = [run.offsets for run in self.runs]
        for one in self.crosses:
            found += [x for x in (one.rows, one.keys, one.row_offsets, one.key_offsets) if isinstance(x, torch.Tensor)]
        return found


class Pieces(Protocol):
    """What the pieces are computed by. Tensors are those of the whole pack; results are the rows of the piece."""

    def causal_forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, run: Run, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out `[n, Hq, D]`, lse `[Hq, n]` of the run's n rows."""
        ...

    def causal_backward(
        self,
        d_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        run: Run,
        scoring: Scoring,
    ) -> Gradients:
        """dq, dk and dv of the run's rows."""
        ...

    def cross_forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cross: Cross, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out `[n, Hq, D]`, lse `[Hq, n]` of the n rows of the piece."""
        ...

    def cross_backward(
        self,
        d_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cross: Cross,
        scoring: Scoring,
    ) -> Gradients:
        """dq of the rows of the piece, dk and dv of its keys."""
        ...


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(layout: PackLayout, window: int | None, device: torch.device) -> Plan:
    """The pieces of a layout; made once for all layers that have this window."""
    return layout.once(_name(window, device), lambda: _plan(layout.families, window, device))


def rounded_plan(layout: PackLayout, device: torch.device, unit: int) -> Plan | None:
    """The plan of a layout that has none yet, for layers without a window, with its longest pieces rounded up to
    multiples of `unit`: all that is not on the device is then the same for many packs.

    Returns:
        None where a piece is long, which PyTorch plans for by its length.
    """

    def up(longest: int) -> int:
        return ceil_div(longest, unit) * unit

    def make() -> Plan:
        made = _plan(layout.families, None, device)
        return Plan(
            [replace(one, longest=up(one.longest)) for one in made.runs],
            [
                replace(one, longest_rows=up(one.longest_rows), longest_keys=up(one.longest_keys))
                for one in made.crosses
            ],
            made.blocked,
        )

    made: Plan = layout.once(_name(None, device), make)
    long = [run.long for run in made.runs] + [cross.long for cross in made.crosses]
    return None if any(long) else made


def _name(window: int | None, device: torch.device) -> tuple[object, ...]:
    return "pieces", window, device, LONG_SEGMENT, LONG_CROSS, PLAN_ROWS, EXACT_LENGTH


def _plan(families: list[Family], window: int | None, device: torch.device) -> Plan:
    runs: list[Run] = []
    blocked: list[int] = []
    crossed: list[_Pair] = []
    cut: list[_Pair] = []
    short: list[tuple[int, int]] = []

    def flush() -> None:
        if short:
            runs.append(_run(short, device, long=False))
            short.clear()

    for index, family in enumerate(families):
        # Flash attention's backward pass gives infinities for a window of a single token.
        if window == 1 or (family.children and window is not None and window < family.span):
            flush()
            blocked.append(index)
            continue
        if family.children:
            crossed.append(((family.root[1], family.end), family.root))
        for a, b in family.segments:
            if b - a >= LONG_SEGMENT and (window is None or window >= b - a):
                flush()
                middle = a + cut_length(b - a) if b - a >= EXACT_LENGTH else b
                runs.append(_run([(a, middle)], device, long=True))
                if middle < b:
                    cut.append(((middle, b), (a, middle)))
                    short.append((middle, b))
            else:
                short.append((a, b))
    flush()
    crosses = [one for pair in cut for one in _crosses(pair, device)]
    long = [pair for pair in crossed if _scores(pair) >= LONG_CROSS]
    crosses += [one for pair in long for one in _crosses(pair, device)]
    # Of different families neither rows nor keys come twice, as they must not in one call.
    if together := [pair for pair in crossed if _scores(pair) < LONG_CROSS]:
        crosses.append(_cross(together, device, long=False))
    return Plan(runs, crosses, blocked)


def _crosses(pair: _Pair, device: torch.device) -> list[Cross]:
    """The pair; where it is long, the part of it whose lengths come again, and the rest of the keys and of the rows."""
    (a, b), (c, d) = pair
    rows, keys = a + cut_length(b - a), c + cut_length(d - c)
    if _scores(pair) < LONG_CROSS or rows == a or keys == c:
        return [_cross([pair], device, long=False)]
    rest = [((a, rows), (keys, d)), ((rows, b), (c, d))]
    return [
        _cross([((a, rows), (c, keys))], device, long=True),
        *(_cross([one], device, long=False) for one in rest if all(start < stop for start, stop in one)),
    ]


def _scores(pair: _Pair) -> int:
    (a, b), (c, d) = pair
    return (b - a) * (d - c)


def cut_length(length: int) -> int:
    """The longest length of those that pieces are cut to that is no longer."""
    unit = max((1 << (length.bit_length() - 1)) // _LENGTHS, PLAN_ROWS)
    return length // unit * unit


def _run(segments: list[tuple[int, int]], device: torch.device, *, long: bool) -> Run:
    lengths = [b - a for a, b in segments]
    return Run(segments[0][0], segments[-1][1], _offsets(lengths, device), max(lengths), long)


def _cross(pairs: list[_Pair], device: torch.device, *, long: bool) -> Cross:
    rows, keys = ([pair[side] for pair in pairs] for side in (0, 1))
    row_lengths, key_lengths = ([b - a for a, b in ranges] for ranges in (rows, keys))
    return Cross(
        _rows(rows, device),
        _rows(keys, device),
        _offsets(row_lengths, device),
        _offsets(key_lengths, device),
        max(row_lengths),
        max(key_lengths),
        long,
    )


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> Rows:
    if len(ranges) == 1:
        return slice(*ranges[0])
    return torch.cat([torch.arange(a, b) for a, b in ranges]).to(device)


def _offsets(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


# --- putting the pieces together --------------------------------------------------------------------------------------


def pieces_forward(
    pieces: Pieces,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_forward` by pieces: out `[T, Hq, D]` and lse `[Hq, T]`."""
    todo = plan(layout, scoring.window, query.device)
    if todo.whole:
        whole, lse = pieces.causal_forward(query, key, value, todo.runs[0], scoring)
        return whole.contiguous(), lse.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    kind = torch.promote_types(query.dtype, torch.float32)
    lse = torch.empty((query.shape[1], query.shape[0]), dtype=kind, device=query.device)
    for run in todo.runs:
        out[run.start : run.stop], lse[:, run.start : run.stop] = pieces.causal_forward(query, key, value, run, scoring)
    for cross in todo.crosses:
        merge(out, lse, *pieces.cross_forward(query, key, value, cross, scoring), cross.rows)
    blocked_forward(query, key, value, layout, todo.blocked, scoring, out, lse)
    return out, lse


def pieces_backward(
    pieces: Pieces,
    d_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: PackLayout,
    scoring: Scoring,
) -> Gradients:
    """`attention_backward` by pieces."""
    todo = plan(layout, scoring.window, query.device)
    given = (d_out, query, key, value, out, lse)
    if todo.whole:
        return pieces.causal_backward(*given, todo.runs[0], scoring)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    for run in todo.runs:
        at = slice(run.start, run.stop)
        dq[at], dk[at], dv[at] = pieces.causal_backward(*given, run, scoring)
    for cross in todo.crosses:
        d_query, d_key, d_value = pieces.cross_backward(*given, cross, scoring)
        dq[cross.rows] += d_query
        dk[cross.keys] += d_key
        dv[cross.keys] += d_value
    blocked_backward(*given, layout, todo.blocked, scoring, (dq, dk, dv))
    return dq, dk, dv


def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    rows: Rows,
    *,
    impl: Impl | None = None,
) -> None:
    """Merge attention of `rows` to further keys into what these rows have, in place.

    Args:
        out: `[T, H, D]`, contiguous; lse: `[H, T]`. other: `[n, H, D]`; other_lse: `[H, n]`.
        rows: the n rows of out and lse, a slice or int64 indices that do not repeat.
    """
    if picks_triton(out, impl):
        _merge_triton(out, lse, other, other_lse, rows)
        return
    first = lse[:, rows]
    total = torch.logaddexp(first, other_lse)
    here, there = ((x - total).exp_().t()[..., None] for x in (first, other_lse))
    lse[:, rows] = total
    for start in range(0, other.shape[0], _MERGE_ROWS):
        part = slice(start, min(start + _MERGE_ROWS, other.shape[0]))
        at = slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]
        out[at] = (wide(out[at]) * here[part] + wide(other[part]) * there[part]).to(out.dtype)


def _merge_triton(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, rows: Rows
) -> None:
    count, heads, dim = other.shape
    index, start = (rows, 0) if isinstance(rows, torch.Tensor) else (None, rows.start)
    # The kernel must not write what it reads: threads that share a value would see the new one.
    first = lse[:, rows]
    total = torch.logaddexp(first, other_lse)
    _merge_kernel[(ceil_div(count, 16), heads)](
        out, first, total, other, other_lse, index, start, count, dim,
        out.stride(0), out.stride(1), first.stride(0), first.stride(1), total.stride(0), total.stride(1),
        other.stride(0), other.stride(1), other_lse.stride(0), other_lse.stride(1),
        INDEXED=index is not None, ROWS=16, BLOCK=power_of_2_from(dim), num_warps=4,
    )  # fmt: skip
    lse[:, rows] = total


if triton is not None:

    @triton.jit
    def _merge_kernel(
        out, first_lse, total_lse, other, other_lse, index, start, count, dim,
        out_row, out_head, first_head, first_row, total_head, total_row,
        other_row, other_head, other_lse_head, other_lse_row,
        INDEXED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Rows × heads × dim passes 2³¹ at 524K rows of 4096.
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        head = tl.program_id(1).to(tl.int64)
        live = row < count
        if INDEXED:
            at = tl.load(index + row, mask=live, other=0)
        else:
            at = row + start
        first = tl.load(first_lse + head * first_head + row * first_row, mask=live, other=0.0)
        second = tl.load(other_lse + head * other_lse_head + row * other_lse_row, mask=live, other=0.0)
        total = tl.load(total_lse + head * total_head + row * total_row, mask=live, other=0.0)
        column = tl.arange(0, BLOCK)
        inside = live[:, None] & (column < dim)[None, :]
        target = out + (at * out_row + head * out_head)[:, None] + column[None, :]
        added = other + (row * other_row + head * other_head)[:, None] + column[None, :]
        value = tl.load(target, mask=inside, other=0.0).to(tl.float32) * tl.exp(first - total)[:, None]
        value += tl.load(added, mask=inside, other=0.0).to(tl.float32) * tl.exp(second - total)[:, None]
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)
