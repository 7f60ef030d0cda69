"""Attention over packs as an explicit pair, against a dense float64 definition written here.

What runs on a GPU only is replaced: the pieces by plain ones, which leaves the plan, the merge and the sums to be
tested, or single calls by dense ones, which leaves the padding around them. All fresh memory is filled with NaN.
"""

from __future__ import annotations

import os
import random
from itertools import pairwise

import pytest
import torch
from interpreted_run import outcomes_interpreted

from tandem.kernels import attention_blocked, attention_pieces, attention_plan, pack_layout, packed_attention
from tandem.kernels.attention_blocked import Scoring, blocks
from tandem.kernels.attention_pieces import CudaPieces
from tandem.kernels.attention_plan import merge, pieces_backward, pieces_forward, plan
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.kernels.packed_attention import attention_backward, attention_forward

CPU = torch.device("cpu")
HEADS, DIM = 4, 8
SCALE = 0.4

# Root length, then the children's: every shape that a family can have, of one token and up.
SHAPES = [(5,), (4, 3, 1, 7), (1, 6), (1,), (9, 2, 5), (12,), (3, 1), (2, 11, 1)]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def layout_of(shapes: list[tuple[int, ...]]) -> PackLayout:
    families, start = [], 0
    for lengths in shapes:
        borders = [start]
        for length in lengths:
            borders.append(borders[-1] + length)
        segments = list(pairwise(borders))
        families.append(Family(segments[0], tuple(segments[1:])))
        start = borders[-1]
    return PackLayout(families)


def visible(layout: PackLayout, window: int | None) -> torch.Tensor:
    """`[T, T]`, by the definition: a row's path is its root and its own segment; it sees the last of it."""
    seen = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for family in layout.families:
        root = list(range(*family.root))
        for path in [root] + [root + list(range(*child)) for child in family.children]:
            for i, row in enumerate(path):
                seen[row, path[max(0, i + 1 - (window or len(path))) : i + 1]] = True
    return seen


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """out `[n, Hq, D]`, lse `[Hq, n]` in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = scoring.scale * q @ k.transpose(1, 2)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


def dense_backward(d_out, q, k, v, out, lse, seen, scoring: Scoring) -> tuple[torch.Tensor, ...]:
    """Gradients from a given out and lse, which may cover more keys than are here; no soft-cap."""
    group = q.shape[1] // k.shape[1]
    d, q_, o = (x.transpose(0, 1) for x in (d_out, q, out))
    k_, v_ = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    weights = ((scoring.scale * q_ @ k_.transpose(1, 2)) - lse[..., None]).masked_fill(~seen, -torch.inf).exp()
    d_scores = weights * (d @ v_.transpose(1, 2) - (d * o).sum(-1, keepdim=True)) * scoring.scale
    dk, dv = (x.unflatten(0, (-1, group)).sum(1).transpose(0, 1) for x in (d_scores.mT @ q_, weights.mT @ d))
    return (d_scores @ k_).transpose(0, 1), dk, dv


def expected(q, k, v, g, layout: PackLayout, scoring: Scoring) -> list[torch.Tensor]:
    """out, lse and by autograd dq, dk, dv of the dense definition."""
    leaves = [x.detach().double().clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, visible(layout, scoring.window), scoring)
    grads = torch.autograd.grad((out * g.double()).sum(), leaves)
    return [out.detach(), lse.detach(), *grads]


def inputs(layout: PackLayout, kv_heads: int = 2, dtype: torch.dtype = torch.float64, dim: int = DIM):
    """q, k, v as strided views of one wider buffer, and a gradient of the output."""
    buffer = torch.randn(layout.length, (HEADS + 2 * kv_heads) * dim + 32, dtype=torch.float64).to(dtype)
    q, k, v, _ = buffer.split([HEADS * dim, kv_heads * dim, kv_heads * dim, 32], dim=1)
    return (
        *(x.unflatten(1, (-1, dim)) for x in (q, k, v)),
        torch.randn(layout.length, HEADS, dim, dtype=torch.float64).to(dtype),
    )


def pair(q, k, v, g, layout: PackLayout, scoring: Scoring) -> list[torch.Tensor]:
    out, lse = attention_forward(q, k, v, layout, **scoring._asdict())
    return [out, lse, *attention_backward(g, q, k, v, out, lse, layout, **scoring._asdict())]


def assert_same(got, want, tolerance: float = 1e-11) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert a.shape == b.shape, name
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


SCORINGS = [
    Scoring(SCALE, window, softcap)
    for window, softcap in [(None, None), (1, None), (3, None), (9, None), (100, None), (None, 1.5), (4, 1.5)]
]


# --- blocked ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 60, 250, 900, 10**6])
def test_blocks_of_any_size_equal_the_definition(tile: int, kv_heads: int, scoring: Scoring, monkeypatch) -> None:
    monkeypatch.setattr(attention_blocked, "CPU_TILE", tile)
    layout = layout_of(SHAPES)
    given = inputs(layout, kv_heads)
    assert_same(pair(*given, layout, scoring), expected(*given, layout, scoring))


@pytest.mark.parametrize("window", [None, 1, 4, 7, 50])
@pytest.mark.parametrize("limit", [1, 64, 300, 2000, 10**6])
def test_blocks_hold_every_pair_once_and_stay_small(limit: int, window: int | None) -> None:
    layout = layout_of(SHAPES)
    seen = visible(layout, window)
    held = torch.zeros_like(seen, dtype=torch.int)
    for family in layout.families:
        for block in blocks(family, HEADS, window, limit):
            (a, b), keys = block.rows, [i for span in block.keys for i in range(*span)]
            assert b - a == 1 or HEADS * (b - a) * len(keys) <= limit
            assert keys[-1] == b - 1
            for row in range(a, b):
                held[row, keys] += 1
    assert (held[seen] == 1).all()
    assert held.max() == 1


def test_long_families_need_no_dense_mask(monkeypatch) -> None:
    def never(*_):
        raise AssertionError("a dense mask")

    monkeypatch.setattr(pack_layout, "family_mask", never)
    monkeypatch.setattr(attention_blocked, "CPU_TILE", 1000)
    layout = layout_of([(40, 30, 20), (50,)])
    given = inputs(layout)
    for scoring in SCORINGS:
        assert_same(pair(*given, layout, scoring), expected(*given, layout, scoring))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_rounded_once(dtype: torch.dtype, softcap: float | None, monkeypatch) -> None:
    monkeypatch.setattr(attention_blocked, "CPU_TILE", 250)
    layout, scoring = layout_of(SHAPES), Scoring(SCALE, None, softcap)
    given = inputs(layout, 2, dtype)
    got, want = pair(*given, layout, scoring), expected(*given, layout, scoring)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    assert (got[1].double() - want[1]).abs().max() < 2e-6
    # δ comes from the rounded output, so an error of the gradients is of the size of δ's: |dO|·|O| of a row.
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i != 1:
            error = (a.double() - b).abs() / b.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1)
            assert error.max() < (2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), i


def test_large_scores_neither_overflow_nor_vanish() -> None:
    layout = layout_of([(6, 3)])
    q, k, v, g = inputs(layout, 4, torch.float32)
    given = (60 * q, 60 * k, v, g)
    got = pair(*given, layout, Scoring(1.0))
    assert all(x.isfinite().all() for x in got)
    want = expected(*given, layout, Scoring(1.0))
    # A product of DIM terms is as far off as they are large, in whatever order a processor adds them.
    terms = float((given[0].abs().amax(dim=(1, 2)) * given[1].abs().max()).max()) * DIM
    torch.testing.assert_close(got[1].double(), want[1], rtol=0.0, atol=torch.finfo(torch.float32).eps * terms)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-2, atol=1e-2)


def test_a_wrong_mask_would_be_seen(monkeypatch) -> None:
    layout = layout_of([(4, 3, 2)])
    given = inputs(layout)
    original = pack_layout.family_mask
    monkeypatch.setattr(
        pack_layout, "family_mask", lambda *a: torch.ones_like(original(*a)).tril()
    )  # a child sees its siblings
    with pytest.raises(AssertionError, match="out"):
        assert_same(pair(*given, layout, SCORINGS[0]), expected(*given, layout, SCORINGS[0]))


# --- the pair and autograd --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_autograd_gives_what_the_pair_gives(scoring: Scoring) -> None:
    layout = layout_of(SHAPES)
    given = inputs(layout)
    leaves = [x.transpose(0, 1).contiguous().requires_grad_() for x in given[:3]]
    out = packed_attention.packed_attention(*leaves, layout, **scoring._asdict())
    grads = torch.autograd.grad(out, leaves, given[3].transpose(0, 1))
    want = expected(*given, layout, scoring)
    for got, exact in zip((out.detach(), *grads), (want[0], *want[2:]), strict=True):
        torch.testing.assert_close(got.transpose(0, 1), exact, rtol=1e-11, atol=1e-11)
    # A gradient that is expanded, or lies with its last dimension outside, is taken as well.
    for shape in (
        torch.ones(1, 1, 1).double().expand(out.shape),
        given[3].permute(2, 1, 0).contiguous().permute(1, 2, 0),
    ):
        again = packed_attention.packed_attention(*leaves, layout, **scoring._asdict())
        got = torch.autograd.grad(again, leaves, shape)
        exact = expected(*given[:3], shape.transpose(0, 1), layout, scoring)[2:]
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.transpose(0, 1), b, rtol=1e-11, atol=1e-11)


def test_backward_runs_no_forward(monkeypatch) -> None:
    layout = layout_of(SHAPES)
    given = inputs(layout)
    want = expected(*given, layout, SCORINGS[0])

    def never(*_, **__):
        raise AssertionError("attention's forward")

    monkeypatch.setattr(packed_attention, "blocked_forward", never)
    q, k, v, g = given
    grads = attention_backward(g, q, k, v, want[0], want[1], layout, scale=SCALE)
    assert_same([*want[:2], *grads], want)


def test_misfits_are_refused() -> None:
    layout = layout_of([(4, 3)])
    q, k, v, g = inputs(layout)
    out, lse = attention_forward(q, k, v, layout, scale=1.0)
    cases = [
        (lambda: attention_forward(q, k, v, layout_of([(4, 2)]), scale=1.0), "7 rows"),
        (lambda: attention_forward(q, k, v, PackLayout([Family((0, 3)), Family((4, 7))]), scale=1.0), "gaps"),
        (lambda: attention_forward(q, k, v, PackLayout([Family((0, 0)), Family((0, 7))]), scale=1.0), "empty"),
        (lambda: attention_forward(q[:, :3], k, v, layout, scale=1.0), "no multiple"),
        (lambda: attention_forward(q, k, v[:, :1], layout, scale=1.0), "Hkv"),
        (lambda: attention_forward(q, k.float(), v, layout, scale=1.0), "float32"),
        (lambda: attention_forward(q.mT.contiguous().mT, k, v, layout, scale=1.0), "contiguous"),
        (lambda: attention_backward(g[:6], q, k, v, out, lse, layout, scale=1.0), "d_out"),
        (lambda: attention_backward(g, q, k, v, out, lse[:1], layout, scale=1.0), "lse"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()


# --- the pieces -------------------------------------------------------------------------------------------------------


def segment_mask(rows: list[int], keys: list[int], *, causal: bool, window: int | None) -> torch.Tensor:
    """`[n, m]` of pieces cut at the offsets `rows`, `keys`."""
    seen = torch.zeros(rows[-1], keys[-1], dtype=torch.bool)
    for (a, b), (c, d) in zip(pairwise(rows), pairwise(keys), strict=True):
        part = torch.ones(b - a, d - c, dtype=torch.bool)
        if causal:
            part = part.tril().triu(-(window or b - a) + 1)
        seen[a:b, c:d] = part
    return seen


class PlainPieces:
    """The protocol by dense float64, which also checks what a plan promises; `calls` names the pieces computed."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _causal(self, run: attention_plan.Run, scoring: Scoring) -> tuple[slice, torch.Tensor]:
        offsets = run.offsets.tolist()
        lengths = [b - a for a, b in pairwise(offsets)]
        assert run.offsets.dtype == torch.int32
        assert (offsets[0], offsets[-1], run.longest) == (0, run.stop - run.start, max(lengths))
        if run.long:
            assert len(lengths) == 1
            assert scoring.window is None or scoring.window >= run.longest
        self.calls.append(f"{'long' if run.long else 'run'} {run.start}:{run.stop}")
        return slice(run.start, run.stop), segment_mask(offsets, offsets, causal=True, window=scoring.window)

    def causal_forward(self, query, key, value, run, scoring):
        at, seen = self._causal(run, scoring)
        return dense(query[at], key[at], value[at], seen, scoring)

    def causal_backward(self, d_out, query, key, value, out, lse, run, scoring):
        at, seen = self._causal(run, scoring)
        return dense_backward(d_out[at], query[at], key[at], value[at], out[at], lse[:, at], seen, scoring)

    def _cross(self, cross: attention_plan.Cross) -> torch.Tensor:
        rows, keys = cross.row_offsets.tolist(), cross.key_offsets.tolist()
        assert cross.longest_rows == max(b - a for a, b in pairwise(rows))
        assert cross.longest_keys == max(b - a for a, b in pairwise(keys))
        self.calls.append(f"{'long ' if cross.long else ''}cross {len(rows) - 1}")
        return segment_mask(rows, keys, causal=False, window=None)

    def cross_forward(self, query, key, value, cross, scoring):
        return dense(query[cross.rows], key[cross.keys], value[cross.keys], self._cross(cross), scoring)

    def cross_backward(self, d_out, query, key, value, out, lse, cross, scoring):
        at, seen = cross.rows, self._cross(cross)
        tensors = (d_out[at], query[at], key[cross.keys], value[cross.keys], out[at], lse[:, at])
        return dense_backward(*tensors, seen, scoring)


def by_pieces(pieces, q, k, v, g, layout: PackLayout, scoring: Scoring) -> list[torch.Tensor]:
    out, lse = pieces_forward(pieces, q, k, v, layout, scoring)
    return [out, lse, *pieces_backward(pieces, g, q, k, v, out, lse, layout, scoring)]


LAYOUTS: dict[str, list[tuple[int, ...]]] = {
    "one sequence": [(20,)],
    "short sequences": [(3,), (1,), (5,), (2,)],
    "one family": [(6, 3, 1, 4)],
    "all": SHAPES,
    "families in front and behind": [(2, 3), (30,), (7, 9, 2), (1,), (3, 3)],
}


@pytest.mark.parametrize("window", [None, 2, 6, 10, 100])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(("segment", "scores"), [(1, 1), (5, 20), (5, 10**6), (10**6, 20), (10**6, 10**6)])
@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_equal_the_definition(
    name: str, unit: int, segment: int, scores: int, kv_heads: int, window: int | None, monkeypatch
) -> None:
    monkeypatch.setattr(attention_plan, "LONG_SEGMENT", segment)
    monkeypatch.setattr(attention_plan, "LONG_CROSS", scores)
    monkeypatch.setattr(attention_plan, "PLAN_ROWS", unit)
    monkeypatch.setattr(attention_plan, "EXACT_LENGTH", 5)
    layout, scoring = layout_of(LAYOUTS[name]), Scoring(SCALE, window)
    given = inputs(layout, kv_heads)
    pieces = PlainPieces()
    assert_same(by_pieces(pieces, *given, layout, scoring), expected(*given, layout, scoring))
    forward = len(pieces.calls) // 2
    assert pieces.calls[:forward] == pieces.calls[forward:]


def test_a_plan_has_few_calls(monkeypatch) -> None:
    monkeypatch.setattr(attention_plan, "LONG_SEGMENT", 8)
    monkeypatch.setattr(attention_plan, "LONG_CROSS", 60)
    monkeypatch.setattr(attention_plan, "PLAN_ROWS", 1)
    layout = layout_of([(5,), (3, 2), (9,), (1,), (4, 2, 2), (7, 9), (2, 1)])
    given = inputs(layout)

    def calls(window: int | None) -> list[str]:
        pieces = PlainPieces()
        pieces_forward(pieces, *given[:3], layout, Scoring(SCALE, window))
        return pieces.calls

    assert calls(None) == ["run 0:10", "long 10:19", "run 19:35", "long 35:44", "run 44:47", "long cross 1", "cross 3"]
    # A segment wider than the window is no longer one for cuDNN; the family (7, 9) goes to the blocks.
    assert calls(8) == ["run 0:28", "run 44:47", "cross 3"]
    assert calls(4) == ["run 0:5", "run 10:20", "run 44:47", "cross 1"]


def test_a_plan_is_made_once() -> None:
    layout = layout_of(SHAPES)
    assert plan(layout, 4, CPU) is plan(layout, 4, CPU)
    assert plan(layout, 4, CPU) is not plan(layout, None, CPU)
    assert plan(layout_of([(5,), (3,)]), None, CPU).whole
    assert not plan(layout_of([(5, 3)]), None, CPU).whole


class Base2(PlainPieces):
    def cross_forward(self, *args):
        out, lse = super().cross_forward(*args)
        return out, lse / torch.log(torch.tensor(2.0))


class OwnLse(PlainPieces):
    """A backward pass that takes no account of the other pieces' keys."""

    def causal_backward(self, d_out, query, key, value, out, lse, run, scoring):
        out, lse = out.clone(), lse.clone()
        at = slice(run.start, run.stop)
        out[at], lse[:, at] = self.causal_forward(query, key, value, run, scoring)
        return super().causal_backward(d_out, query, key, value, out, lse, run, scoring)


@pytest.mark.parametrize(("broken", "first"), [(Base2, "out"), (OwnLse, "dq")])
def test_a_broken_piece_would_be_seen(broken: type[PlainPieces], first: str) -> None:
    layout = layout_of([(6, 3, 1, 4)])
    given = inputs(layout)
    with pytest.raises(AssertionError, match=first):
        assert_same(by_pieces(broken(), *given, layout, SCORINGS[0]), expected(*given, layout, SCORINGS[0]))


# --- the calls --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dense_calls(monkeypatch) -> list[tuple[str, int, int]]:
    """cuDNN and flash by dense float64; a list of (kernel, rows, keys)."""
    seen: list[tuple[str, int, int]] = []

    def mask(q, k, causal: bool) -> torch.Tensor:
        return segment_mask([0, len(q)], [0, len(k)], causal=causal, window=None)

    def cudnn_forward(q, k, v, *, causal, scale):
        seen.append(("cudnn", len(q), len(k)))
        return dense(q, k, v, mask(q, k, causal), Scoring(scale))

    def cudnn_backward(d, q, k, v, out, lse, *, causal, scale):
        seen.append(("cudnn", len(q), len(k)))
        assert len(d) == len(out) == lse.shape[1] == len(q)
        return dense_backward(d, q, k, v, out, lse, mask(q, k, causal), Scoring(scale))

    def flash_mask(cuts) -> torch.Tensor:
        rows, keys, window = cuts["row_offsets"].tolist(), cuts["key_offsets"].tolist(), cuts["window"]
        assert cuts["longest_rows"] == max(b - a for a, b in pairwise(rows))
        assert cuts["longest_keys"] == max(b - a for a, b in pairwise(keys))
        assert window is None or (window < cuts["longest_rows"] and cuts["causal"])
        return segment_mask(rows, keys, causal=cuts["causal"], window=window)

    def flash_forward(q, k, v, **cuts):
        seen.append(("flash", len(q), len(k)))
        return dense(q, k, v, flash_mask(cuts), Scoring(cuts["scale"]))

    def flash_backward(d, q, k, v, out, lse, **cuts):
        seen.append(("flash", len(q), len(k)))
        return dense_backward(d, q, k, v, out, lse, flash_mask(cuts), Scoring(cuts["scale"]))

    for call in (cudnn_forward, cudnn_backward, flash_forward, flash_backward):
        monkeypatch.setattr(attention_pieces, call.__name__, call)
    return seen


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("name", LAYOUTS)
def test_cuda_pieces_around_their_calls(name, window, cudnn, dense_calls, monkeypatch) -> None:
    monkeypatch.setattr(attention_pieces, "cudnn_takes", lambda *_, causal: cudnn)
    monkeypatch.setattr(attention_plan, "PLAN_ROWS", 8)
    monkeypatch.setattr(attention_plan, "EXACT_LENGTH", 30)
    monkeypatch.setattr(attention_plan, "LONG_SEGMENT", 5)
    monkeypatch.setattr(attention_plan, "LONG_CROSS", 20)
    layout, scoring = layout_of(LAYOUTS[name]), Scoring(SCALE, window)
    given = inputs(layout)
    assert_same(by_pieces(CudaPieces(), *given, layout, scoring), expected(*given, layout, scoring))
    planned = {rows for kernel, rows, _ in dense_calls if kernel == "cudnn"}
    assert all(rows % 8 == 0 for rows in planned)
    assert bool(planned) == (cudnn and any(run.long for run in plan(layout, window, CPU).runs))


def test_pieces_are_cut_to_few_lengths() -> None:
    """Whatever the lengths of prompts and completions are: PyTorch keeps what cuDNN plans for each size."""
    draw = random.Random(0)
    runs, crosses = set(), set()
    for _ in range(3000):
        prompt, completions = draw.randint(2048, 262_144), [draw.randint(100, 8192) for _ in range(draw.randint(1, 8))]
        made = plan(layout_of([(prompt, *completions), (draw.randint(2048, 262_144),)]), None, CPU)
        runs |= {attention_pieces.planned_rows(run.stop - run.start) for run in made.runs if run.long}
        for one in made.crosses:
            rows, keys = (side.stop - side.start for side in (one.rows, one.keys))
            if one.long:
                crosses.add((attention_pieces.planned_rows(rows), keys))
                assert rows * keys > 0.7 * attention_plan.LONG_CROSS
    assert len(runs) < 128 + 3 * 16 + 2
    lengths = [{pair[side] for pair in crosses} for side in (0, 1)]
    assert all(len(one) < 7 * 16 for one in lengths)
    assert min(map(len, lengths)) > 16, "the lengths drawn are many"


def test_what_is_cut_off_is_little() -> None:
    for length in (256, 300, 4096, 5000, 32_768, 32_769, 129_024, 262_143, 1_000_000):
        cut = attention_plan.cut_length(length)
        assert cut % attention_plan.PLAN_ROWS == 0
        assert 0 <= length - cut < max(length / 16, attention_plan.PLAN_ROWS)
    assert attention_plan.cut_length(255) == 0


def test_lengths_are_rounded_up_only_where_it_is_cheap() -> None:
    assert [attention_pieces.planned_rows(n) for n in (2048, 2049, 2304, 32767, 32768, 32769)] == [
        2048, 2304, 2304, 32768, 32768, 32769,
    ]  # fmt: skip


def test_the_operators_take_our_arguments() -> None:
    """As far as shapes and signatures go, which the meta device checks."""
    q, d = torch.empty(2, 70, 6, 64, dtype=torch.bfloat16, device="meta")
    k, v = torch.empty(2, 70, 2, 64, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    cuts = (offsets, offsets, 30, 30)
    for window in (None, 7):
        out, lse = attention_pieces.flash_forward(q, k, v, *cuts, causal=True, scale=SCALE, window=window)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (6, 70), torch.float32)
        grads = attention_pieces.flash_backward(d, q, k, v, out, lse, *cuts, causal=True, scale=SCALE, window=window)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    for causal in (True, False):
        out, lse = attention_pieces.cudnn_forward(q, k, v, causal=causal, scale=SCALE)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (6, 70), torch.float32)
        grads = attention_pieces.cudnn_backward(d, q, k, v, out, lse, causal=causal, scale=SCALE)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_misaligned_rows_are_copied() -> None:
    buffer = torch.zeros(6, 3 * 8 + 8, dtype=torch.bfloat16)
    fine = buffer[:, 8:].unflatten(1, (3, 8))
    assert attention_pieces._aligned(fine) is fine
    shifted = buffer[:, 1:25].unflatten(1, (3, 8))
    odd = torch.zeros(6, 3 * 8 + 1, dtype=torch.bfloat16)[:, :24].unflatten(1, (3, 8))
    for x in (shifted, odd):
        assert attention_pieces._aligned(x).is_contiguous()


def test_the_cpu_and_float64_go_to_the_blocks() -> None:
    assert not attention_pieces.takes(torch.zeros(3, 2, 64, dtype=torch.bfloat16), Scoring(1.0))


# --- the merge --------------------------------------------------------------------------------------------------------

IMPL = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (16, 80), (37, 64)])
def test_merge(rows: int, dim: int, dtype: torch.dtype, indexed: bool, monkeypatch) -> None:
    monkeypatch.setattr(attention_plan, "_MERGE_ROWS", 10)
    total = rows + 9
    out = torch.randn(total, 3, dim).to(dtype)
    other = torch.randn(3, rows, dim).to(dtype).transpose(0, 1)
    lse, other_lse = 20 * torch.randn(3, total), 20 * torch.randn(rows, 3).t()
    at: slice | torch.Tensor = torch.randperm(total)[:rows] if indexed else slice(4, 4 + rows)
    first, second = lse[:, at].double(), other_lse.double()
    want_lse = torch.logaddexp(first, second)
    share = (first - want_lse).exp().t()[..., None], (second - want_lse).exp().t()[..., None]
    want = out[at].double() * share[0] + other.double() * share[1]
    size = out[at].double().abs() * share[0] + other.double().abs() * share[1]
    others = torch.ones(total, dtype=torch.bool).index_fill(0, torch.arange(total)[at], False)
    before = out[others].clone(), lse[:, others].clone()
    merge(out, lse, other, other_lse, at, impl=IMPL)
    assert (lse[:, at].double() - want_lse).abs().max() < 1e-5
    # The interpreter cuts bfloat16 off: a whole last place. float32 carries the roundings of lse, up to 80 large.
    assert ((out[at].double() - want).abs() <= (1e-5 if dtype == torch.float32 else 2**-7) * size + 1e-30).all()
    assert torch.equal(out[others], before[0])
    assert torch.equal(lse[:, others], before[1])


@pytest.mark.skipif(IMPL == "triton", reason="is the fresh process")
def test_the_triton_merge_in_a_fresh_process() -> None:
    pytest.importorskip("triton")
    assert outcomes_interpreted(__file__, "test_merge") == {"passed": 12}
