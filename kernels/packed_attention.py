"""Attention over a pack: many segments in one row, each seeing only itself and its ancestors' prompt.

A pack is a row of `T` tokens cut into families. A family is one contiguous range: a root segment (a whole sequence,
or a prompt) and, behind it, child segments (the completions of that prompt). A root is causal; a child is causal and
sees its whole root as well, but none of its siblings. That is exactly what separate rows would compute, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

# A family with children up to this many tokens is one call with a dense mask; longer ones go child by child, where
# the mask would cost more memory and time than the extra calls.
_DENSE_FAMILY = 4096


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


@dataclass
class PackLayout:
    """The families of a pack, with their masks, which all layers share."""

    families: list[Family]
    _masks: dict[tuple[int, int | None, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)

    def mask(self, index: int, window: int | None, device: torch.device) -> torch.Tensor:
        """`[Tf, Tf]` boolean, True where a token of the family may look."""
        key = (index, window, device)
        if key not in self._masks:
            self._masks[key] = family_mask(self.families[index], window).to(device)
        return self._masks[key]


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
    """Attention of every family of `layout` on its own.

    Args:
        query: `[Hq, T, D]`; key, value: `[Hkv, T, D]` with Hq a multiple of Hkv.
        scale: factor of the scores. window: sliding-window width in tokens. softcap: c·tanh(score/c), Gemma 2.

    Returns:
        `[Hq, T, D]`.
    """
    outputs = []
    for index, family in enumerate(layout.families):
        a, b = family.start, family.end
        q, k, v = query[:, a:b], key[:, a:b], value[:, a:b]
        narrow = window if window is not None and window < b - a else None
        if softcap is not None:
            outputs.append(_softcapped(q, k, v, layout.mask(index, narrow, q.device), scale, softcap))
        elif not family.children and narrow is None:
            outputs.append(_sdpa(q, k, v, scale, causal=True))
        elif narrow is not None or b - a <= _DENSE_FAMILY:
            outputs.append(_sdpa(q, k, v, scale, mask=layout.mask(index, narrow, q.device)))
        else:
            outputs.extend(_child_by_child(query, key, value, family, scale))
    return torch.cat(outputs, dim=1)


def _sdpa(q, k, v, scale, *, mask=None, causal=False) -> torch.Tensor:
    grouped = q.shape[0] != k.shape[0]
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out[0]


def _child_by_child(query, key, value, family: Family, scale: float) -> list[torch.Tensor]:
    from torch.nn.attention.bias import causal_lower_right

    a, b = family.root
    outputs = [_sdpa(query[:, a:b], key[:, a:b], value[:, a:b], scale, causal=True)]
    for c, d in family.children:
        k = torch.cat([key[:, a:b], key[:, c:d]], dim=1)
        v = torch.cat([value[:, a:b], value[:, c:d]], dim=1)
        # Lower-right alignment: the child's first token sees the whole root and itself.
        bias = causal_lower_right(d - c, b - a + d - c)
        repeat = query.shape[0] // key.shape[0]
        out = F.scaled_dot_product_attention(
            query[None, :, c:d],
            k[None].repeat_interleave(repeat, 1),
            v[None].repeat_interleave(repeat, 1),
            bias,
            scale=scale,
        )
        outputs.append(out[0])
    return outputs


def _softcapped(q, k, v, mask, scale, softcap) -> torch.Tensor:
    repeat = q.shape[0] // k.shape[0]
    scores = (q @ k.repeat_interleave(repeat, 0).transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    weights = (
        scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    )
    return weights @ v.repeat_interleave(repeat, 0)
