"""Attention over a pack in plain PyTorch, a block of query rows at a time: any device, any dtype, every feature.

The oracle of the CUDA pieces, and the path of everything that they do not take: CPUs, float32 and float64, soft-caps,
and sliding windows over shared prompts. The scores of one block are all that exists at a time, so memory does not grow
with the square of the length. The forward pass leaves the log-sum-exp of every row; with it the backward pass makes
the weights P = exp(S − lse) again block by block (FlashAttention-2, Dao 2023, algorithm 2):

    δ = rowsum(dO ∘ O)    dV = Pᵀ·dO    dS = P ∘ (dO·Vᵀ − δ)    dQ = scale · dS·K    dK = scale · dSᵀ·Q

A soft-cap c makes S = c·tanh(scale·Q·Kᵀ/c), and dS gains the factor 1 − (S/c)². Tensors of 16 bits are computed in
float32, and every result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from tandem.kernels.pack_layout import Family, PackLayout
from tandem.kernels.reference import wide

# Scores of one block, all heads together: what a CPU's caches hold, and what keeps a GPU busy (128 MiB of float32).
CPU_TILE = 1 << 19
CUDA_TILE = 1 << 25

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Scoring(NamedTuple):
    """How scores are made: the factor of the products, the window's width in tokens, the soft-cap."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class Block(NamedTuple):
    """Query rows (start, end) of the pack, and the ranges of key rows that some of them see, the last one up to `end`.

    `whole`: it is a whole family. `triangle`: the rows see all of these keys but those that lie behind themselves.
    """

    rows: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    whole: bool
    triangle: bool


def blocks(family: Family, heads: int, window: int | None, limit: int) -> Iterator[Block]:
    """Cut a family into blocks of at most `limit` scores (or one row), each with every key that its rows see.

    A family that fits is one block. In a longer one a block stays within a segment, whose rows share their ancestors.
    """
    root_start, root_end = family.root
    length = family.end - family.start
    if heads * length * length <= limit:
        whole = (family.start, family.end)
        yield Block(whole, (whole,), whole=True, triangle=not family.children and not window)
        return
    for start, end in family.segments:
        above = 0 if start == root_start else root_end - root_start
        a = start
        while a < end:
            # Positions count from the root's first token. `lowest` is the first that row a sees, and no row b > a
            # sees a lower one.
            position = above + a - start
            lowest = max(0, position - window + 1) if window else 0
            before = position - lowest
            # The most rows r with heads · r · (before + r) scores within the limit.
            most = int((math.sqrt(before * before + 4 * limit / heads) - before) / 2)
            b = min(end, a + max(1, most))
            own = (start + max(0, lowest - above), b)
            keys = ((root_start + lowest, root_end), own) if lowest < above else (own,)
            yield Block((a, b), keys, whole=False, triangle=not window)
            a = b


def blocked_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    families: Iterable[int],
    scoring: Scoring,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fill the rows of `families` (indices into the layout's list) of `out` `[T, Hq, D]` and `lse` `[Hq, T]`."""
    heads, kv_heads = query.shape[1], key.shape[1]
    for index in families:
        for block in blocks(layout.families[index], heads, scoring.window, _tile(query)):
            a, b = block.rows
            q, k = _grouped(query[a:b], kv_heads).mul(scoring.scale), _seen(key, block)
            scores, _ = _scores(q, k, scoring.softcap, slope=False)
            _hide(scores, layout, index, block, scoring.window)
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            out[a:b] = _by_row((weights @ _seen(value, block)).div_(total), b - a)
            lse[:, a:b] = total.log_().add_(top).view(heads, b - a)


def blocked_backward(
    d_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: PackLayout,
    families: Iterable[int],
    scoring: Scoring,
    grads: Gradients,
) -> None:
    """Fill the rows of `families` of the gradients dq `[T, Hq, D]`, dk and dv `[T, Hkv, D]`."""
    heads, kv_heads = query.shape[1], key.shape[1]
    dq, dk, dv = grads
    for index in families:
        family = layout.families[index]
        first, last = family.start, family.end
        # Summed over blocks in the precision of the arithmetic, one family at a time.
        sums = [wide(x[:0]).new_zeros(kv_heads, last - first, x.shape[2]) for x in (key, value)]
        for block in blocks(family, heads, scoring.window, _tile(query)):
            a, b = block.rows
            q, k = _grouped(query[a:b], kv_heads).mul(scoring.scale), _seen(key, block)
            d, o = _grouped(d_out[a:b], kv_heads), _grouped(out[a:b], kv_heads)
            scores, slope = _scores(q, k, scoring.softcap, slope=True)
            _hide(scores, layout, index, block, scoring.window)
            weights = scores.sub_(lse[:, a:b].reshape(kv_heads, -1, 1)).exp_()
            d_value = weights.transpose(1, 2) @ d
            delta = d.mul(o).sum(-1, keepdim=True)
            d_scores = (d @ _seen(value, block).transpose(1, 2)).sub_(delta).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            dq[a:b] = _by_row((d_scores @ k).mul_(scoring.scale), b - a)
            d_key = d_scores.transpose(1, 2) @ q
            done = 0
            for c, e in block.keys:
                for total, part in zip(sums, (d_key, d_value), strict=True):
                    total[:, c - first : e - first] += part[:, done : done + e - c]
                done += e - c
        dk[first:last] = sums[0].transpose(0, 1)
        dv[first:last] = sums[1].transpose(0, 1)


def _tile(tensor: torch.Tensor) -> int:
    return CUDA_TILE if tensor.is_cuda else CPU_TILE


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[r, Hq, D]` -> `[Hkv, (Hq/Hkv)·r, D]`, widened: rows of the query heads that share a key head lie together."""
    return wide(x).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).reshape(kv_heads, -1, x.shape[2])


def _by_row(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`[Hkv, (Hq/Hkv)·r, D]` -> `[r, Hq, D]`, a view."""
    return x.view(-1, rows, x.shape[-1]).transpose(0, 1)


def _seen(x: torch.Tensor, block: Block) -> torch.Tensor:
    """The block's rows of keys or values `[T, Hkv, D]`, as `[Hkv, n, D]`, widened."""
    parts = [x[a:b] for a, b in block.keys]
    return wide(parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _scores(
    q: torch.Tensor, k: torch.Tensor, softcap: float | None, *, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores before the mask, and where there is a soft-cap and `slope` asks for it, d(score)/d(product)."""
    scores = q @ k.transpose(1, 2)
    if softcap is None:
        return scores, None
    scores.div_(softcap).tanh_()
    derivative = scores.square().neg_().add_(1) if slope else None
    return scores.mul_(softcap), derivative


def _hide(scores: torch.Tensor, layout: PackLayout, index: int, block: Block, window: int | None) -> None:
    """−inf where a row must not look. Added, because a CPU adds a tensor ten times faster than it fills by a mask."""
    rows, device = block.rows[1] - block.rows[0], scores.device
    if block.triangle:
        hidden = torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1)
    elif block.whole:
        hidden = ~layout.mask(index, window, device)
    else:
        assert window is not None, "within a segment only a window hides more than what lies behind a row"
        # Numbered from the last key backwards, as if the root lay directly before the segment: so positions run.
        seen = torch.arange(scores.shape[-1], device=device)
        row = torch.arange(scores.shape[-1] - rows, scores.shape[-1], device=device)
        distance = row[:, None] - seen
        hidden = (distance < 0) | (distance >= window)
    bias = scores.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    scores.view(-1, rows, scores.shape[-1])[..., -hidden.shape[1] :] += bias
