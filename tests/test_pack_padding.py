"""Packs padded to be alike: what the layers may take from one recording to the next, and how often sizes come again."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from tandem.kernels import attention_plan
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.rl import pack_padding
from tandem.rl.pack_padding import made_alike

CPU = torch.device("cpu")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_padding, "_UNIT", 16)
    monkeypatch.setattr(pack_padding, "_MOST_UNIT", 16)


def random_layout(draw: random.Random) -> PackLayout:
    families, place = [], 0
    for _ in range(draw.randint(1, 6)):
        borders = [place]
        for _ in range(1 + draw.randint(0, 3)):
            borders.append(borders[-1] + draw.randint(1, 40))
        root, *children = pairwise(borders)
        families.append(Family(root, tuple(children)))
        place = borders[-1]
    return PackLayout(families)


@pytest.mark.usefixtures("small_units")
def test_packs_of_one_key_differ_in_nothing_but_tensors_of_one_shape() -> None:
    draw = random.Random(0)
    by_key: dict[tuple[int, ...], Any] = {}
    met = 0
    for _ in range(3000):
        layout = random_layout(draw)
        made = made_alike(layout, CPU)
        assert made is not None
        made.layout.check(layout.length + made.more)
        assert made.layout.families[: len(layout.families)] == layout.families
        assert made.plan is attention_plan.plan(made.layout, None, CPU)
        longest = [(one.start, one.stop, one.longest) for one in made.plan.runs]
        longest += [(one.longest_rows, one.longest_keys, 0) for one in made.plan.crosses]
        same = (longest, [(x.shape, x.dtype) for x in made.plan.tensors], made.layout.length)
        met += made.key in by_key
        assert by_key.setdefault(made.key, same) == same
    assert met > 300


def test_sizes_come_again_and_cost_a_quarter_at_most() -> None:
    for rows in range(1, 20_000):
        more = pack_padding._missing(rows)
        assert 1 <= more <= max(256, rows // 4 + 1)
    assert len({rows + pack_padding._missing(rows) for rows in range(1, 8192)}) < 30


def test_long_packs_and_segments_are_left_alone() -> None:
    assert made_alike(PackLayout([Family((0, pack_padding.MOST_ROWS + 1))]), CPU) is None
    assert made_alike(PackLayout([Family((0, attention_plan.LONG_SEGMENT))]), CPU) is None
    assert made_alike(PackLayout([Family((0, attention_plan.LONG_SEGMENT - 1))]), CPU) is not None
