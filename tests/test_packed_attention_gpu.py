"""Attention over packs by cuDNN and flash: run by hand, `pytest -m gpu -s tests/test_packed_attention_gpu.py`.

First every call into PyTorch alone, with what it did instead where it fails; then whole packs against the float64
blocks, with PyTorch's own attention on the same rows as the measure of error. All fresh memory is filled with NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tandem.kernels import attention_pieces, attention_plan
from tandem.kernels.attention_blocked import Scoring
from tandem.kernels.attention_pieces import cudnn_backward, cudnn_forward, cudnn_takes, flash_backward, flash_forward
from tandem.kernels.attention_plan import merge, plan
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.kernels.packed_attention import attention_backward, attention_forward, packed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("out", "lse", "dq", "dk", "dv")
HEADS = [(32, 8), (9, 3), (8, 8)]
Tensors = tuple[torch.Tensor, ...]


@contextmanager
def nan_in_fresh_memory(on: bool) -> Iterator[None]:
    """Only warned about: cuDNN steps aside where determinism is demanded."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.manual_seed(0)
    with nan_in_fresh_memory(True):
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    torch.cuda.empty_cache()


def layout_of(*shapes: tuple[int, ...]) -> PackLayout:
    """A family per tuple: the root's length, then the children's."""
    families, start = [], 0
    for lengths in shapes:
        borders = [start]
        for length in lengths:
            borders.append(borders[-1] + length)
        segments = list(pairwise(borders))
        families.append(Family(segments[0], tuple(segments[1:])))
        start = borders[-1]
    return PackLayout(families)


def inputs(rows: int, heads: tuple[int, int], dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """q, k, v as views of a buffer `[rows, (Hq + 2·Hkv)·D + 32]`, and a contiguous gradient of the output."""
    q_width, kv_width = heads[0] * dim, heads[1] * dim
    buffer = torch.randn(rows, q_width + 2 * kv_width + 32, device="cuda").to(dtype)
    parts = buffer.split([q_width, kv_width, kv_width, 32], dim=1)[:3]
    gradient = torch.randn(rows, heads[0], dim, device="cuda").to(dtype)
    return (*(x.unflatten(1, (-1, dim)) for x in parts), gradient)


def pair(given: Tensors, layout: PackLayout, scoring: Scoring) -> Tensors:
    q, k, v, g = given
    out, lse = attention_forward(q, k, v, layout, **scoring._asdict())
    return out, lse, *attention_backward(g, q, k, v, out, lse, layout, **scoring._asdict())


def exactly(given: Tensors, layout: PackLayout, scoring: Scoring) -> Tensors:
    """The float64 blocks (`tests/test_packed_attention.py` holds them to the definition)."""
    return pair(tuple(x.double() for x in given), layout, scoring)


def relative(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Root mean square and largest error, both in units of the root mean square of the exact result."""
    assert got.shape == want.shape, (got.shape, want.shape)
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
    error, size = got.double() - want, want.square().mean().sqrt()
    return float(error.square().mean().sqrt() / size), float(error.abs().max() / size)


# --- every call alone -------------------------------------------------------------------------------------------------


def lse_diagnosis(lse: torch.Tensor, exact: torch.Tensor) -> str:
    """How far a log-sum-exp is from the natural one, and from what it might be instead."""
    heads, rows = exact.shape
    guesses = {
        "natural": exact,
        "base 2": exact / math.log(2),
        "negated": -exact,
        "rows before heads": exact.t().reshape(heads, rows),
    }
    if lse.numel() != exact.numel():
        return f"shape {tuple(lse.shape)}, not {tuple(exact.shape)}"
    distances = {
        name: float((lse.reshape(heads, rows).double() - guess).abs().max()) for name, guess in guesses.items()
    }
    return f"shape {tuple(lse.shape)} {lse.dtype}; largest distances " + ", ".join(
        f"{name} {d:.2e}" for name, d in distances.items()
    )


def check_forward(name: str, got: tuple[torch.Tensor, torch.Tensor], exact: Tensors) -> None:
    out, lse = got
    report = f"{name}: lse {lse_diagnosis(lse, exact[1])}; out {tuple(out.shape)} strides {out.stride()}"
    print(report)
    assert lse.shape == exact[1].shape, report
    assert (lse.double() - exact[1]).abs().max() < 2e-3, report
    assert relative(out, exact[0])[0] < 6e-3, report


def check_backward(name: str, got: Tensors, exact: Tensors) -> None:
    report = f"{name}: " + ", ".join(
        f"{n} {tuple(a.shape)} "
        + (f"off by {relative(a, b)[0]:.2e}" if a.shape == b.shape else f"not {tuple(b.shape)}")
        for n, a, b in zip(NAMES[2:], got, exact[2:], strict=True)
    )
    print(report)
    for a, b in zip(got, exact[2:], strict=True):
        assert a.shape == b.shape, report
        assert relative(a, b)[0] < 1e-2, report


def needs_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> None:
    if not cudnn_takes(q, k, v, causal=causal):
        from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

        batched = [attention_pieces._batched(x) for x in (q, k, v)]
        params = SDPAParams(*batched, None, 0.0, causal, q.shape[1] != k.shape[1])  # type: ignore[call-arg]
        can_use_cudnn_attention(params, True)  # warns of the reason
        pytest.fail(f"cuDNN {torch.backends.cudnn.version()} does not take {[tuple(x.stride()) for x in batched]}")


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_cudnn_causal(heads: tuple[int, int], dim: int) -> None:
    layout, scoring = layout_of((777,)), Scoring(dim**-0.5)
    given = q, k, v, g = inputs(777, heads, dim)
    needs_cudnn(q, k, v, causal=True)
    exact = exactly(given, layout, scoring)
    out, lse = cudnn_forward(q, k, v, causal=True, scale=scoring.scale)
    check_forward("cuDNN causal", (out, lse), exact)
    grads = cudnn_backward(g, q, k, v, out, lse, causal=True, scale=scoring.scale)
    check_backward("cuDNN causal", grads, exact)


def cross_exactly(given: Tensors, keys: int, scale: float) -> Tensors:
    """Rows from `keys` on against the rows before, without a mask, in float64."""
    q, k, v, g = (x.double().transpose(0, 1) for x in given)
    q, g = q[:, keys:], g[:, keys:]
    k, v = (x[:, :keys].clone().requires_grad_() for x in (k, v))
    q = q.clone().requires_grad_()
    group = len(q) // len(k)
    scores = scale * q @ k.repeat_interleave(group, 0).mT
    out = scores.softmax(-1) @ v.repeat_interleave(group, 0)
    grads = torch.autograd.grad(out, (q, k, v), g)
    return (
        out.detach().transpose(0, 1),
        scores.logsumexp(-1).detach(),
        *(x.transpose(0, 1) for x in grads),
    )


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_cudnn_cross(heads: tuple[int, int]) -> None:
    given = q, k, v, g = inputs(300 + 511, heads, 128)
    exact, scale = cross_exactly(given, 300, 0.09), 0.09
    rows, keys = slice(300, None), slice(0, 300)
    needs_cudnn(q[rows], k[keys], v[keys], causal=False)
    out, lse = cudnn_forward(q[rows], k[keys], v[keys], causal=False, scale=scale)
    check_forward("cuDNN cross", (out, lse), exact)
    grads = cudnn_backward(g[rows], q[rows], k[keys], v[keys], out, lse, causal=False, scale=scale)
    check_backward("cuDNN cross", grads, exact)


def cuts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    offsets = attention_plan._offsets(list(lengths), torch.device("cuda"))
    return offsets, offsets, max(lengths), max(lengths)


@pytest.mark.parametrize("window", [None, 2, 50])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_flash_causal(heads: tuple[int, int], dim: int, window: int | None) -> None:
    lengths = (100, 1, 333, 2, 17, 1, 129)
    layout, scoring = layout_of(*((n,) for n in lengths)), Scoring(dim**-0.5, window)
    given = q, k, v, g = inputs(sum(lengths), heads, dim)
    exact, options = exactly(given, layout, scoring), {"causal": True, "scale": scoring.scale, "window": window}
    out, lse = flash_forward(q, k, v, *cuts(*lengths), **options)
    check_forward(f"flash, window {window}", (out, lse), exact)
    grads = flash_backward(g, q, k, v, out, lse, *cuts(*lengths), **options)
    check_backward(f"flash, window {window}", grads, exact)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_flash_single_tokens(heads: tuple[int, int]) -> None:
    """The case for which PyTorch regroups the heads, were it told that no segment is longer than one."""
    given = q, k, v, g = inputs(37, heads, 64)
    exact = exactly(given, layout_of(*([(1,)] * 37)), Scoring(0.2))
    out, lse = flash_forward(q, k, v, *cuts(*[1] * 37), causal=True, scale=0.2)
    check_forward("flash, single tokens", (out, lse), exact)
    assert torch.equal(out, v.repeat_interleave(heads[0] // heads[1], 1))
    grads = flash_backward(g, q, k, v, out, lse, *cuts(*[1] * 37), causal=True, scale=0.2)
    # One key has all weight, so dq and dk are 0, and relative errors mean nothing.
    want = g.double().unflatten(1, (heads[1], -1)).sum(2)
    assert relative(grads[2], want)[0] < 6e-3
    assert max(float(x.abs().max()) for x in grads[:2]) < 0.1


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_flash_cross(heads: tuple[int, int]) -> None:
    given = q, k, v, g = inputs(300 + 511, heads, 128)
    exact, scale = cross_exactly(given, 300, 0.09), 0.09
    rows, keys = slice(300, None), slice(0, 300)
    offsets = (cuts(511)[0], cuts(300)[0], 511, 300)
    out, lse = flash_forward(q[rows], k[keys], v[keys], *offsets, causal=False, scale=scale)
    check_forward("flash cross", (out, lse), exact)
    grads = flash_backward(g[rows], q[rows], k[keys], v[keys], out, lse, *offsets, causal=False, scale=scale)
    check_backward("flash cross", grads, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (1000, 80), (4099, 256)])
def test_merge_equals_its_twin(rows: int, dim: int, indexed: bool, dtype: torch.dtype) -> None:
    total = rows + 300
    out, other = (torch.randn(n, 7, dim, device="cuda").to(dtype) for n in (total, rows))
    lse, other_lse = 10 * torch.randn(7, total, device="cuda"), 10 * torch.randn(7, rows, device="cuda")
    at = torch.randperm(total, device="cuda")[:rows] if indexed else slice(200, 200 + rows)
    twins = (out.double(), lse.double())
    merge(*twins, other.double(), other_lse.double(), at)
    merge(out, lse, other, other_lse, at)
    assert (lse - twins[1]).abs().max() < 1e-5
    limit = (torch.finfo(dtype).eps / 2 + 1e-5) * twins[0].abs().clamp(min=1.0)
    assert ((out.double() - twins[0]).abs() <= limit).all()


# --- whole packs ------------------------------------------------------------------------------------------------------


def by_sdpa(given: Tensors, layout: PackLayout, scoring: Scoring) -> dict[str, torch.Tensor]:
    """PyTorch's attention on every root and every root + child as a row of its own, in the same type."""
    q, k, v = (x.detach().clone().requires_grad_() for x in given[:3])
    out = torch.empty_like(given[3])
    for family in layout.families:
        for segment in family.segments:
            path = torch.arange(*family.root, device="cuda")
            if segment != family.root:
                path = torch.cat([path, torch.arange(*segment, device="cuda")])
            rows = [x[path].transpose(0, 1)[None] for x in (q, k, v)]
            rows[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in rows[1:]]
            mask = None
            if scoring.window is not None and scoring.window < len(path):
                distance = torch.arange(len(path), device="cuda")[:, None] - torch.arange(len(path), device="cuda")
                mask = (distance >= 0) & (distance < scoring.window)
            found = F.scaled_dot_product_attention(*rows, mask, is_causal=mask is None, scale=scoring.scale)
            found = found[0].transpose(0, 1)[-(segment[1] - segment[0]) :]
            out = torch.cat([out[: segment[0]], found, out[segment[1] :]])
    grads = torch.autograd.grad(out, (q, k, v), given[3])
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def check_pack(given: Tensors, layout: PackLayout, scoring: Scoring) -> None:
    """Errors of out and the gradients at most twice those of PyTorch's attention; lse to float32's last places."""
    exact = dict(zip(NAMES, exactly(given, layout, scoring), strict=True))
    got = dict(zip(NAMES, pair(given, layout, scoring), strict=True))
    theirs = by_sdpa(given, layout, scoring)
    lse_error = float((got.pop("lse").double() - exact.pop("lse")).abs().max())
    errors = {n: (relative(got[n], exact[n]), relative(theirs[n], exact[n])) for n in exact}
    report = f"lse off by {lse_error:.1e}; root mean square and largest error, ours and PyTorch's: " + ", ".join(
        f"{n} {a[0]:.1e} {a[1]:.1e} / {b[0]:.1e} {b[1]:.1e}" for n, (a, b) in errors.items()
    )
    print(report)
    assert lse_error < 2e-3, report
    for ours, reference in errors.values():
        assert ours[0] <= 2 * reference[0], report
        assert ours[1] <= 2 * reference[1], report


def kernels_of(layout: PackLayout, window: int | None) -> str:
    todo = plan(layout, window, torch.device("cuda", torch.cuda.current_device()))
    names = [f"{'cuDNN' if run.long else 'flash'} {run.start}:{run.stop}" for run in todo.runs]
    names += [f"{'cuDNN' if c.long else 'flash'} cross of {len(c.row_offsets) - 1}" for c in todo.crosses]
    return ", ".join(names + [f"blocked family {i}" for i in todo.blocked])


SHORT = [(1 + 37 * i % 211,) for i in range(40)]
PACKS: dict[str, list[tuple[int, ...]]] = {
    "one long segment": [(4096,)],
    "a length that is rounded up": [(3001,)],
    "40 short": SHORT,
    "long and short": [(300,), (2500,), (1,), (2049,), *SHORT[:5], (4000,)],
    "a family of short": [(129, 64, 1, 200, 33)],
    "families of short": [(60, *range(16, 65, 6)), (77,), (1, 1, 5), (300, 17)],
    "a family of long": [(2300, 2100, 700, 2999)],
    "families of all": [(2300, 100, 40), (300, 2100, 5), (3000,), (64, 64, 64)],
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", PACKS)
def test_packs(name: str, heads: tuple[int, int], dim: int) -> None:
    layout = layout_of(*PACKS[name])
    print(name, kernels_of(layout, None))
    check_pack(inputs(layout.length, heads, dim), layout, Scoring(dim**-0.5))


@pytest.mark.parametrize(
    ("dim", "dtype"), [(80, torch.bfloat16), (256, torch.bfloat16), (128, torch.float16), (72, torch.float16)], ids=str
)
@pytest.mark.parametrize("name", ["long and short", "families of all"])
def test_packs_of_other_widths_and_types(name: str, dim: int, dtype: torch.dtype) -> None:
    layout = layout_of(*PACKS[name])
    check_pack(inputs(layout.length, (16, 4), dim, dtype), layout, Scoring(dim**-0.5))


@pytest.mark.parametrize("window", [2, 100, 1024, 2500, 100_000])
@pytest.mark.parametrize("name", ["long and short", "families of all"])
def test_packs_with_a_window(name: str, window: int) -> None:
    layout = layout_of(*PACKS[name])
    print(name, kernels_of(layout, window))
    check_pack(inputs(layout.length, (8, 2), 128), layout, Scoring(0.09, window))


def test_long_cross_pieces_by_cudnn(monkeypatch) -> None:
    monkeypatch.setattr(attention_plan, "LONG_CROSS", 1)
    for name in ("a family of long", "families of all"):
        layout = layout_of(*PACKS[name])
        assert any(cross.long for cross in plan(layout, None, torch.device("cuda", 0)).crosses)
        check_pack(inputs(layout.length, (32, 8), 128), layout, Scoring(0.09))


def test_very_long_segments_and_cross_pieces_are_cut(monkeypatch) -> None:
    monkeypatch.setattr(attention_plan, "EXACT_LENGTH", 2048)
    monkeypatch.setattr(attention_plan, "LONG_CROSS", 1024 * 1024)
    for layout in (layout_of((2301,), (2777,)), layout_of((4500, 700, 2301))):
        made = plan(layout, None, torch.device("cuda", 0))
        assert all(run.stop - run.start in (2048, 2560, 4352) for run in made.runs if run.long)
        check_pack(inputs(layout.length, (32, 8), 128), layout, Scoring(0.09))


def test_misaligned_rows() -> None:
    layout = layout_of((2301,), (300, 20))
    buffer = torch.randn(layout.length, 12 * 64 + 3, device="cuda").bfloat16()
    q, k, v = (x.unflatten(1, (-1, 64)) for x in buffer[:, 1:769].split([512, 128, 128], 1))
    gradient = torch.randn(layout.length, 8, 64, device="cuda").bfloat16()
    check_pack((q, k, v, gradient), layout, Scoring(0.125))


def test_what_is_switched_off_is_not_used(monkeypatch) -> None:
    layout, scoring = layout_of((2301,), (300, 20)), Scoring(0.125)
    given = inputs(layout.length, (8, 2), 64)

    def never(*_, **__):
        raise AssertionError("this kernel is switched off")

    for name in ("cudnn_forward", "cudnn_backward"):
        monkeypatch.setattr(attention_pieces, name, never)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        check_pack(given, layout, scoring)
        for name in ("flash_forward", "flash_backward"):
            monkeypatch.setattr(attention_pieces, name, never)
        torch.backends.cuda.enable_flash_sdp(False)
        check_pack(given, layout, scoring)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(True)


def test_plans_that_others_made_are_not_taken() -> None:
    """PyTorch finds cuDNN's plans by the strides of q, k and v alone: one for other strides of out would be wrong."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layout, scoring = layout_of((2304,)), Scoring(128**-0.5)
    q, k, v, g = (torch.randn(h, 2304, 128, device="cuda").bfloat16() for h in (8, 2, 2, 8))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        theirs = F.scaled_dot_product_attention(
            *(x[None] for x in leaves), is_causal=True, scale=scoring.scale, enable_gqa=True
        )
        torch.autograd.grad(theirs, leaves, g[None])
    out = packed_attention(*leaves, layout, **scoring._asdict())
    grads = torch.autograd.grad(out, leaves, g)
    exact = exactly(tuple(x.transpose(0, 1) for x in (q, k, v, g)), layout, scoring)
    for got, want in zip((out.detach(), *grads), (exact[0], *exact[2:]), strict=True):
        assert relative(got.transpose(0, 1), want)[0] < 1e-2


def test_autograd_equals_the_pair() -> None:
    layout, scoring = layout_of(*PACKS["families of all"]), Scoring(0.09)
    q, k, v, g = inputs(layout.length, (8, 2), 128)
    leaves = [x.transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]
    out = packed_attention(*leaves, layout, **scoring._asdict())
    grads = torch.autograd.grad(out, leaves, g.transpose(0, 1))
    exact = exactly((q, k, v, g), layout, scoring)
    for got, want in zip((out.detach(), *grads), (exact[0], *exact[2:]), strict=True):
        assert relative(got.transpose(0, 1), want)[0] < 1e-2


def test_elements_beyond_int32() -> None:
    """The last group of a long pack lies more than 2³¹ elements into its buffer; its last rows are checked."""
    rows, last, scale = 400_000, 64, 128**-0.5
    width = 48 * 128 + 32
    with nan_in_fresh_memory(False):
        buffer = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)
        for a in range(0, rows, 50_000):
            buffer[a : a + 50_000].normal_()
        assert buffer.numel() > 2**31
        q, k, v = (buffer[:, a * 128 : b * 128].unflatten(1, (-1, 128)) for a, b in ((28, 32), (39, 40), (47, 48)))
        g = torch.randn(rows, 4, 128, device="cuda").bfloat16()
        layout = layout_of((rows,))
        print(kernels_of(layout, None))
        _, lse, dq, dk, dv = pair((q, k, v, g), layout, Scoring(scale))
    q_, g_ = (x[-last:].double().transpose(0, 1) for x in (q, g))
    scores = scale * q_ @ k[:, 0].double().t()
    scores.masked_fill_(torch.ones(last, rows, dtype=torch.bool, device="cuda").triu_(rows - last + 1), -torch.inf)
    exact_lse = scores.logsumexp(-1)
    weights = (scores - exact_lse[..., None]).exp_()
    del scores
    d_weights = g_ @ v[:, 0].double().t()
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
    exact = {
        "dq": ((d_scores @ k[:, 0].double()).transpose(0, 1), dq),
        "dk": ((d_scores[..., -last:].mT @ q_).sum(0)[:, None], dk),
        "dv": ((weights[..., -last:].mT @ g_).sum(0)[:, None], dv),
    }
    assert (lse[:, -last:].double() - exact_lse).abs().max() < 2e-3
    for name, (want, got) in exact.items():
        assert relative(got[-last:], want)[0] < 2e-2, name
