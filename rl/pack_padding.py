"""Packs made alike: padded to sizes that come again, so that what was recorded of one serves the next."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tandem.kernels.attention_plan import Plan, rounded_plan
from tandem.kernels.pack_layout import Family, PackLayout

# Packs of more rows keep a GPU busy without being recorded.
MOST_ROWS = 8192
# What sizes are rounded up to: a quarter of the power of two below them, between these.
_UNIT, _MOST_UNIT = 256, 1024


class Alike(NamedTuple):
    """A padded pack.

    Attributes:
        layout: with a family of padding behind the others. plan: of its attention. more: rows of padding.
        key: equal for packs that differ in nothing but what lies on the device.
    """

    layout: PackLayout
    plan: Plan
    more: int
    key: tuple[int, ...]

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, …]` -> `[T + more, …]`, with zeros."""
        return torch.cat([x, x.new_zeros(self.more, *x.shape[1:])])


def made_alike(layout: PackLayout, device: torch.device, most: int | None = None) -> Alike | None:
    """The padded pack, for layers without a window; None where it is large, with more than `most` rows when it is
    padded, or a segment is long."""
    rows = layout.length
    if rows > MOST_ROWS:
        return None
    shared = [family for family in layout.families if family.children]
    roots = sum(family.root[1] - family.root[0] for family in shared)
    behind = sum(family.end - family.root[1] for family in shared)
    if shared:
        middle = rows + _missing(roots)
        last = Family((rows, middle), ((middle, middle + _missing(behind)),))
    else:
        last = Family((rows, rows + _missing(rows)))
    padded = PackLayout([*layout.families, last])
    if most is not None and padded.length > most:
        return None
    plan = rounded_plan(padded, device, _UNIT)
    if plan is None:
        return None
    longest = [one.longest for one in plan.runs]
    longest += [size for one in plan.crosses for size in (one.longest_rows, one.longest_keys)]
    segments = sum(len(family.segments) for family in padded.families)
    # Where prompts are shared, the padded sizes of prompts and completions follow from these and the number of rows.
    alone = rows - roots - behind if shared else 0
    key = (padded.length, segments, len(shared), alone, roots + _missing(roots) if shared else 0, *longest)
    return Alike(padded, plan, padded.length - rows, key)


def usually_padded(rows: int) -> int:
    """The rows that a pack of `rows` has when it is padded, which may be half as many more or fewer."""
    return rows + _missing(rows)


def _missing(rows: int) -> int:
    """At least one row more, up to the next size that comes again."""
    unit = min(max((1 << rows.bit_length()) // 8, _UNIT), _MOST_UNIT)
    return (rows // unit + 1) * unit - rows
