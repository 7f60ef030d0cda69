"""How a pack is cut: many segments in one row, each seeing only itself and its ancestors' prompt.

A pack is a row of `T` tokens cut into families. A family is one contiguous range: a root segment (a whole sequence,
or a prompt) and, behind it, child segments (the completions of that prompt). A root is causal; a child is causal and
sees its whole root as well, but none of its siblings. That is exactly what separate rows would compute, once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch


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
