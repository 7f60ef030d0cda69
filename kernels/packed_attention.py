"""Attention over a pack: many segments in one row, each seeing only itself and its ancestors' prompt.

A pack is a row of `T` tokens cut into families. A family is one contiguous range: a root segment (a whole sequence,
or a prompt) and, behind it, child segments (the completions of that prompt). A root is causal; a child is causal and
sees its whole root as well, but none of its siblings. That is exactly what separate rows would compute, once.

`attention_forward` and `attention_backward` are an explicit pair: the second uses the first one's output and
log-sum-exp and never runs attention's forward again. `packed_attention` is the pair under autograd. Tensors of 16 bits
on a GPU go to cuDNN and flash attention piece by piece (`attention_pieces`), all else to plain PyTorch
(`attention_blocked`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tandem.kernels.attention_blocked import Gradients, Scoring, blocked_backward, blocked_forward
from tandem.kernels.attention_pieces import CudaPieces, takes
from tandem.kernels.attention_plan import pieces_backward, pieces_forward


@dataclass(frozen=True)
class Family:
    """`root` = (start, end) in the row; `children` = the ranges behind it, contiguous, possibly none."""

    root: tuple[int, int]
    children: tuple[tuple[int, int], ...] = ()

    @property
    def start(self) -> int:
        return self.root[0]

    @property
    def end(self) -> int:
        return self.children[-1][1] if self.children else self.root[1]

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        return (self.root, *self.children)

    @property
    def span(self) -> int:
        """Positions from the root's first token to the end of the longest child: a window so wide hides nothing."""
        return self.root[1] - self.root[0] + max((b - a for a, b in self.children), default=0)


@dataclass
class PackLayout:
    """The families of a pack, and what attention derives from them alone, once for all layers."""

    families: list[Family]
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def length(self) -> int:
        """T, the rows that the families cover."""
        return self.families[-1].end if self.families else 0

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, remembered under `name`."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def mask(self, index: int, window: int | None, device: torch.device) -> torch.Tensor:
        """`[Tf, Tf]` boolean, True where a token of the family may look. For short families."""
        return self.once(("mask", index, window, device), lambda: family_mask(self.families[index], window).to(device))

    def check(self, rows: int) -> None:
        """Raise ValueError unless the families cover exactly `rows` rows, one behind the other."""
        segments = self.once("segments", lambda: [s for family in self.families for s in family.segments])
        gapless = self.once("gapless", lambda: all(a[1] == b[0] for a, b in pairwise(segments)))
        full = self.once("full", lambda: all(a < b for a, b in segments))
        if not segments or not gapless or not full or segments[0][0] != 0 or segments[-1][1] != rows:
            raise ValueError(
                f"a layout must cover its rows without gaps or empty segments: {rows} rows, "
                f"{len(segments)} segments, the last up to {self.length}"
            )


def family_mask(family: Family, window: int | None = None) -> torch.Tensor:
    """The dense mask of one family, by positions: a child's positions go on where its root's end."""
    start, root_end = family.root
    length = family.end - start
    owner = torch.full((length,), -1)
    position = torch.arange(length)
    for number, (a, b) in enumerate(family.children):
        owner[a - start : b - start] = number
        position[a - start : b - start] = torch.arange(root_end - start, root_end - start + b - a)
    same = (owner[:, None] == owner[None, :]) | (owner[None, :] == -1)
    distance = position[:, None] - position[None, :]
    allowed = same & (distance >= 0)
    return allowed & (distance < window) if window else allowed


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every family of `layout` on its own.

    Args:
        query: `[T, Hq, D]`; key, value: `[T, Hkv, D]` with Hq a multiple of Hkv. Views of wider buffers are taken as
            they are, so long as the last dimension is contiguous.
        scale: factor of the scores. window: sliding-window width in tokens, the row's own token included.
        softcap: c·tanh(score/c), Gemma 2.

    Returns:
        out `[T, Hq, D]` and lse `[Hq, T]` float32 (float64 for float64 tensors): the natural log-sum-exp of the scaled
        scores of everything that a row sees.

    Raises:
        ValueError: shapes or types that do not fit together, or a layout that does not cover the T rows.
    """
    _check(query, key, value, layout)
    scoring = Scoring(scale, window or None, softcap)
    if takes(query, scoring):
        return pieces_forward(CudaPieces(), query, key, value, layout, scoring)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(
        (query.shape[1], query.shape[0]),
        dtype=torch.promote_types(query.dtype, torch.float32),
        device=query.device,
    )
    blocked_forward(query, key, value, layout, range(len(layout.families)), scoring, out, lse)
    return out, lse


def attention_backward(
    d_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Gradients:
    """The gradients of `attention_forward`, from what it returned.

    Args:
        d_out: `[T, Hq, D]`, the gradient of out; the others as given to and returned by the forward pass.

    Returns:
        dq `[T, Hq, D]`, dk and dv `[T, Hkv, D]`, in the type of the inputs.

    Raises:
        ValueError: as for the forward pass.
    """
    _check(query, key, value, layout)
    for name, tensor, shape in (("d_out", d_out, query.shape), ("out", out, query.shape)):
        if tensor.shape != shape or tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, query {query.dtype} {tuple(shape)}")
    if lse.shape != (query.shape[1], query.shape[0]):
        raise ValueError(f"lse is {tuple(lse.shape)}, not [heads, rows] of query {tuple(query.shape)}")
    scoring = Scoring(scale, window or None, softcap)
    if takes(query, scoring):
        return pieces_backward(CudaPieces(), d_out, query, key, value, out, lse, layout, scoring)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    families = range(len(layout.families))
    blocked_backward(d_out, query, key, value, out, lse, layout, families, scoring, (dq, dk, dv))
    return dq, dk, dv


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`attention_forward` under autograd, with the heads first as Hugging Face has them.

    Args:
        query: `[Hq, T, D]`; key, value: `[Hkv, T, D]`. The rest as for `attention_forward`.

    Returns:
        `[Hq, T, D]`.
    """
    return _PackedAttention.apply(query, key, value, layout, Scoring(scale, window, softcap))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout, scoring: Scoring
    ) -> torch.Tensor:
        q, k, v = (_last_contiguous(x.transpose(0, 1)) for x in (query, key, value))
        out, lse = attention_forward(q, k, v, layout, **scoring._asdict())
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scoring = layout, scoring
        return out.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d = _last_contiguous(d_out.transpose(0, 1))
        grads = attention_backward(d, q, k, v, out, lse, ctx.layout, **ctx.scoring._asdict())
        return (*(g.transpose(0, 1) for g in grads), None, None)


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2]:
        raise ValueError(f"attention needs query [T, Hq, D] and key, value [T, Hkv, D], not {shapes}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"the query heads are no multiple of the key heads: {shapes}")
    if query.dtype != key.dtype or key.dtype != value.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}")
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        raise ValueError("the last dimension of query, key and value must be contiguous")
    layout.check(query.shape[0])
