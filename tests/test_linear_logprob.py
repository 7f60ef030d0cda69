"""`linear_logprob`: its kernels and their twins against float64 definitions written here.

Every kernel test runs on the twin in this process and on the kernel in a second one, where Triton's interpreter is
switched on before Triton is imported (`test_the_triton_code_in_a_fresh_process`). All fresh memory is filled with NaN.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from itertools import product
from typing import Any

import pytest
import torch
from interpreted_run import outcomes_interpreted

from tandem.kernels.linear_logprob import HeadAdapter, HeadOptions, TokenScores, head_logits, linear_logprob
from tandem.kernels.linear_logprob_triton import token_scores_grad_into, token_scores_into
from tandem.kernels.reference import tempered, token_scores, token_scores_grad

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
impls = pytest.mark.parametrize(
    "impl", [pytest.param("triton", id="interpreted") if INTERPRETED else pytest.param("torch", id="plain")]
)

# bias, scale, soft-cap, temperature
TERMS = [(False, 1.0, None, 1.0), (True, 0.4, None, 0.7), (True, 1.7, 2.5, 1.3), (False, 1.0, 8.0, 1.0)]
PLAIN = (None, 1.0, None, 1.0)
terms_ = pytest.mark.parametrize("terms", TERMS, ids=str)
# Rows and columns; the last spans two blocks of the forward kernel.
SHAPES = [(0, 7), (1, 1), (5, 7), (1, 1031), (5, 5000)]
COMBINATIONS = [used for used in product([False, True], repeat=4) if any(used)]
NAMES = TokenScores._fields


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def exact_logits(raw: torch.Tensor, bias, scale: float, softcap: float | None, temperature: float) -> torch.Tensor:
    z = raw.double() if bias is None else raw.double() + bias.double()
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / temperature


def exact(z: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """By the definitions, differentiable also where a logit is −inf."""
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return TokenScores(log_p.gather(-1, targets[:, None])[:, 0], entropy, z.logsumexp(-1), z.mean(-1))


def scores(impl: str, raw, targets, terms, vocab: int) -> TokenScores:
    outputs = tuple(torch.full((len(raw),), torch.nan) for _ in range(4))
    if impl == "triton":
        token_scores_into(outputs, raw, targets, *terms, vocab)
    else:
        z, _ = tempered(raw, *terms, vocab)
        for out, value in zip(outputs, token_scores(z, targets), strict=True):
            out.copy_(value)
    log_probs, lse, entropy, mean = outputs
    return TokenScores(log_probs, entropy, lse, mean)


def gradient(impl: str, raw, targets, found: TokenScores, grads, terms, vocab: int, out) -> None:
    if impl == "triton":
        token_scores_grad_into(out, raw, targets, found.lse, found.entropy, grads, *terms, vocab)
        return
    z, slope = tempered(raw, *terms, vocab)
    out[:, vocab:] = 0
    out[:, :vocab] = token_scores_grad(z, targets, found.lse, found.entropy, *grads) * slope


def framed(rows: int, width: int, columns: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A window of a buffer of NaN: whoever reads beyond the window shows it, whoever writes there as well."""
    buffer = torch.full((rows + 2, width + columns), torch.nan)
    return buffer[1:-1, 2 : 2 + width], buffer


def outside_is_nan(window: torch.Tensor, buffer: torch.Tensor) -> bool:
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:-1, 2 : 2 + window.shape[1]] = False
    return bool(buffer[outside].isnan().all())


def close(got: TokenScores, want: TokenScores, z: torch.Tensor) -> None:
    """Log-sum-exp and mean to float32's resolution of the logits; what is relative to the maximum far better."""
    spans = (z.amax(-1, keepdim=True) - z).masked_fill(z == -torch.inf, 0.0)
    size = {"log_probs": spans.amax(-1), "entropy": 1.0, "lse": z.abs().amax(-1), "mean_logit": z.abs().amax(-1)}
    for name, a, b in zip(NAMES, got, want, strict=True):
        limit = 4e-6 + 4e-7 * torch.as_tensor(size[name], dtype=torch.float64)
        error = (a.double() - b).abs()
        assert a.dtype == torch.float32
        assert ((error <= limit) | (a == b)).all(), f"{name}: {error.max()} of {limit}"


# ---- one chunk of logits


@impls
@terms_
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(impl, shape, terms) -> None:
    rows, vocab = shape
    biased, *rest = terms
    raw, buffer = framed(rows, vocab)
    raw.copy_(3 * torch.randn(rows, vocab))
    bias = torch.randn(vocab) if biased else None
    targets = torch.randint(vocab, (rows,))
    got = scores(impl, raw, targets, (bias, *rest), vocab)
    z = exact_logits(raw, bias, *rest)
    close(got, exact(z, targets), z)
    assert outside_is_nan(raw, buffer)


@impls
@pytest.mark.parametrize("terms", TERMS[:3:2], ids=str)
@pytest.mark.parametrize("used", COMBINATIONS, ids=lambda u: "".join("01"[x] for x in u))
def test_every_combination_of_gradients(impl, used, terms) -> None:
    biased, *rest = terms
    rows, vocab = 3, 2049  # one column more than a block of the backward kernel
    raw = (3 * torch.randn(rows, vocab)).requires_grad_()
    bias = torch.randn(vocab) if biased else None
    targets = torch.randint(vocab, (rows,))
    grads = [torch.randn(rows) if one else None for one in used]
    want = exact(exact_logits(raw, bias, *rest), targets)
    sum((w * g.double()).sum() for w, g in zip(want, grads, strict=True) if g is not None).backward()
    assert raw.grad is not None

    out, buffer = framed(rows, vocab)
    with torch.no_grad():
        found = scores(impl, raw, targets, (bias, *rest), vocab)
        gradient(impl, raw, targets, found, grads, (bias, *rest), vocab, out)
    torch.testing.assert_close(out, raw.grad, rtol=2e-5, atol=2e-7)
    assert outside_is_nan(out, buffer)


@impls
@terms_
def test_padded_columns_do_not_exist(impl, terms) -> None:
    """Whatever stands in them, results are bit for bit those without them, and their gradient is 0."""
    biased, *rest = terms
    rows, vocab, width = 4, 1031, 1100
    raw = torch.randn(rows, width)
    raw[:, vocab:] = torch.tensor([torch.nan, torch.inf, 1e30, -torch.inf])[:, None]
    bias = torch.randn(width) if biased else None
    targets = torch.randint(vocab, (rows,))
    narrow = raw[:, :vocab].clone(), targets, None if bias is None else bias[:vocab].clone()
    alone = scores(impl, *narrow[:2], (narrow[2], *rest), vocab)
    padded = scores(impl, raw, targets, (bias, *rest), vocab)
    assert all(torch.equal(a, b) for a, b in zip(alone, padded, strict=True))
    grads = [torch.randn(rows) for _ in range(4)]
    out, buffer = framed(rows, width)
    want = torch.full((rows, vocab), torch.nan)
    gradient(impl, raw, targets, padded, grads, (bias, *rest), vocab, out)
    gradient(impl, narrow[0], targets, alone, grads, (narrow[2], *rest), vocab, want)
    assert torch.equal(out[:, :vocab], want)
    assert (out[:, vocab:] == 0).all()
    assert outside_is_nan(out, buffer)


@impls
def test_extreme_logits(impl) -> None:
    """At logits of 10⁴ the entropy still has all its digits, which lse − E[z] in float32 has not."""
    vocab = 4500
    raw = torch.zeros(6, vocab)
    raw[0] = 1e4
    raw[1] = -1e4
    raw[2, 3] = 1e4
    raw[3, :2] = 1e4
    raw[4] = 1e4 + torch.randn(vocab).round(decimals=2)
    raw[5] = torch.linspace(-1e4, 1e4, vocab)
    targets = torch.tensor([0, vocab - 1, 4, 1, 7, vocab - 2])
    got = scores(impl, raw, targets, PLAIN, vocab)
    z = raw.double()
    close(got, exact(z, targets), z)
    assert got.entropy[0].item() == pytest.approx(math.log(vocab), abs=2e-6)
    assert got.log_probs[2].item() == -1e4
    assert got.entropy[2].item() == 0.0
    assert got.entropy[3].item() == pytest.approx(math.log(2), abs=1e-6)
    grads = [torch.randn(6) for _ in range(4)]
    raw.requires_grad_()
    sum((w * g.double()).sum() for w, g in zip(exact(raw.double(), targets), grads, strict=True)).backward()
    out = torch.full_like(raw, torch.nan)
    gradient(impl, raw.detach(), targets, got, grads, PLAIN, vocab, out)
    # The log-sum-exp of 10⁴ has a last place of 10⁻³, and p carries it.
    torch.testing.assert_close(out, raw.grad, rtol=3e-3, atol=1e-6)


@impls
def test_the_largest_number_as_a_logit(impl) -> None:
    raw = torch.randn(1, 5000)
    raw[0, 3] = torch.finfo(torch.float32).max
    got = scores(impl, raw, torch.tensor([3]), PLAIN, 5000)
    assert (got.log_probs.item(), got.entropy.item(), got.lse.item()) == (0.0, 0.0, raw[0, 3].item())


@impls
def test_minus_infinity_is_probability_zero(impl) -> None:
    vocab = 300
    raw = 2 * torch.randn(6, vocab)
    raw[0, ::2] = -torch.inf
    raw[1, 1:] = -torch.inf
    raw[2, :50] = -torch.inf  # and with it the target
    raw[3] = -torch.inf
    raw[4] = torch.finfo(torch.float32).min  # a mask as some models write it: a uniform distribution
    targets = torch.tensor([1, 0, 7, 5, 9, 2])
    got = scores(impl, raw, targets, PLAIN, vocab)
    assert all(not value.isnan().any() for value in got)
    keep = [0, 1, 2, 5]
    close(TokenScores(*(v[keep] for v in got)), exact(raw[keep].double(), targets[keep]), raw[keep].double())
    assert got.log_probs[2:4].eq(-torch.inf).all()
    assert (got.entropy[3].item(), got.lse[3].item()) == (0.0, -math.inf)
    assert got.entropy[4].item() == pytest.approx(math.log(vocab), rel=1e-6)
    assert got.mean_logit[:4].eq(-torch.inf).all()

    grads = [torch.randn(6) for _ in range(3)]
    inner = raw[keep].double().requires_grad_()
    want = exact(inner, targets[keep])
    sum((w * g[keep].double()).sum() for w, g in zip(want, grads, strict=False)).backward()
    out = torch.full_like(raw, torch.nan)
    gradient(impl, raw, targets, got, [*grads, None], PLAIN, vocab, out)
    assert not out.isnan().any()
    torch.testing.assert_close(out[keep].double(), inner.grad, rtol=2e-5, atol=2e-7)
    assert (out[0, ::2] == 0).all()


@impls
def test_what_is_not_a_number_stays_visible(impl) -> None:
    raw, targets = torch.randn(2, 50), torch.tensor([4, 5])
    raw[0, 30] = torch.nan
    got = scores(impl, raw, targets, PLAIN, 50)
    assert all(value[0].isnan() and value[1].isfinite() for value in got)


@impls
@pytest.mark.parametrize("target", [-1, 40, 49, 50, 2**40])
def test_a_target_outside_the_vocabulary_gives_no_number(impl, target) -> None:
    raw, targets = torch.randn(1, 50), torch.tensor([target])
    if impl == "torch":
        with pytest.raises((IndexError, RuntimeError)):
            scores(impl, raw, targets, PLAIN, 40)
    else:
        assert scores(impl, raw, targets, PLAIN, 40).log_probs.isnan().all()


@impls
def test_rows_beyond_two_to_the_31(impl) -> None:
    """The third row starts 2³¹ elements behind the first; the address space is reserved, but hardly any is touched."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs memory that is reserved without being backed")
    # Python names the flag from 3.12 on.
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    stride, vocab = 2**30, 70
    near = torch.randn(3, vocab)
    far, out = (
        torch.frombuffer(mmap.mmap(-1, 4 * (2 * stride + vocab), flags=lazily), dtype=torch.float32).as_strided(
            (3, vocab), (stride, 1)
        )
        for _ in range(2)
    )
    far.copy_(near)
    targets, grads = torch.randint(vocab, (3,)), [torch.randn(3) for _ in range(4)]
    found = scores(impl, far, targets, PLAIN, vocab)
    assert all(map(torch.equal, found, scores(impl, near, targets, PLAIN, vocab)))
    want = torch.full_like(near, torch.nan)
    for raw, into in ((near, want), (far, out)):
        gradient(impl, raw, targets, found, grads, PLAIN, vocab, into)
    assert torch.equal(out, want)


# ---- from hidden states


def problem(rows: int, vocab: int, dtype: torch.dtype, *, width: int = 24, rank: int = 3):
    """Hidden states, weight, targets, bias, adapter."""
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocab, width).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = torch.randn(rank, width, dtype=wide) / 5, torch.randn(vocab, rank, dtype=wide) / 2
    return hidden, weight, torch.randint(min(vocab, 37), (rows,)), torch.randn(vocab).to(dtype), HeadAdapter(a, b, 0.7)


def reference(hidden, weight, targets, bias, o: HeadOptions, adapter: HeadAdapter | None, grads):
    """Scores, and gradients of hidden states, a and b, by autograd in float64."""
    leaves = [hidden, *(() if adapter is None else adapter[:2])]
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    raw = leaves[0] @ weight.double().T
    if adapter is not None:
        raw = raw + adapter.scale * (leaves[0] @ leaves[1].T) @ leaves[2].T
    z = exact_logits(raw, bias, o.scale, o.softcap, o.temperature)[:, : o.vocab_size]
    values = exact(z, targets)
    sum((v * g.double()).sum() for v, g in zip(values, grads, strict=True)).backward()
    return values, [t.grad for t in leaves]


def ours(hidden, weight, targets, bias, o: HeadOptions, adapter: HeadAdapter | None, grads, impl):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, *(() if adapter is None else adapter[:2]))]
    adapter = None if adapter is None else HeadAdapter(leaves[1], leaves[2], adapter.scale)
    values = linear_logprob(leaves[0], weight, targets, bias=bias, options=o, adapter=adapter, impl=impl)
    torch.autograd.backward(list(values), [g.to(v.dtype) for g, v in zip(grads, values, strict=True)])
    return values, [t.grad for t in leaves]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "scale": 0.5, "vocab_size": 37},
    {"softcap": 4.0, "temperature": 1.2, "vocab_size": 50},
]


@impls
@pytest.mark.parametrize("with_adapter", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_hidden_states(impl, dtype, options, with_adapter) -> None:
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")
    for rows, chunk in ((1, 4), (5, 2), (5, 8)):
        hidden, weight, targets, bias, adapter = problem(rows, 41, dtype)
        adapter = adapter if with_adapter else None
        o = HeadOptions(**options, chunk_size=chunk)
        grads = [torch.randn(rows) for _ in range(4)]
        want, want_grads = reference(hidden, weight, targets, bias, o, adapter, grads)
        got, got_grads = ours(hidden, weight, targets, bias, o, adapter, grads, impl)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        for name, a, b in zip(NAMES, got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=name)
        # The gradient of the logits is rounded to the head's type, of which the products are sums.
        tolerance = 2e-2 if dtype == torch.bfloat16 else tolerance
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@impls
def test_no_rows(impl) -> None:
    hidden, weight, targets, _, adapter = problem(0, 11, torch.float32)
    values, grads = ours(hidden, weight, targets, None, HeadOptions(), adapter, [torch.empty(0)] * 4, impl)
    assert [v.shape for v in values] == [(0,)] * 4
    assert grads[0].shape == (0, 24)
    assert all((g == 0).all() for g in grads[1:])


@impls
def test_gradients_of_a_sum_and_of_the_adapter_alone(impl) -> None:
    """Autograd hands a sum's gradient over as one number seen N times; frozen hidden states get none."""
    hidden, weight, targets, _, adapter = problem(6, 41, torch.float32)
    targets = torch.stack((targets, targets + 1), dim=1)[:, 0]  # rows apart
    a, b = (m.clone().requires_grad_() for m in adapter[:2])
    linear_logprob(
        hidden, weight, targets, adapter=HeadAdapter(a, b, 0.7), options=HeadOptions(chunk_size=4), impl=impl
    ).log_probs.sum().backward()
    grads = [torch.ones(6), *[torch.zeros(6)] * 3]
    _, want = reference(hidden, weight, targets, None, HeadOptions(), adapter, grads)
    torch.testing.assert_close(a.grad.double(), want[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.grad.double(), want[2], rtol=1e-5, atol=1e-5)
    assert hidden.grad is None


@impls
def test_restricted_distributions_ignore_the_padding(impl) -> None:
    hidden, weight, targets, _, adapter = problem(6, 41, torch.float32)
    narrow = HeadAdapter(adapter.a, adapter.b[:37], adapter.scale)
    grads = [torch.randn(6) for _ in range(2)] + [torch.zeros(6)] * 2
    for more in ({"top_k": 5}, {"top_p": 0.8}):
        o = HeadOptions(**more, vocab_size=37, chunk_size=4)
        got, got_grads = ours(hidden, weight, targets, None, o, adapter, grads, impl)
        o = HeadOptions(**more)
        want, want_grads = ours(hidden, weight[:37], targets, None, o, narrow, grads, "torch")
        torch.testing.assert_close(list(got)[:3], list(want)[:3])
        torch.testing.assert_close(got_grads[:2], want_grads[:2])
        assert (got_grads[2][37:] == 0).all()


def test_logits_have_the_adapter_and_no_padding() -> None:
    hidden, weight, _, bias, adapter = problem(3, 41, torch.float64)
    o = HeadOptions(scale=0.5, softcap=3.0, vocab_size=37, temperature=9.0)
    raw = hidden @ (weight + adapter.scale * adapter.b @ adapter.a).T
    want = exact_logits(raw, bias, 0.5, 3.0, 1.0)[:, :37]
    torch.testing.assert_close(head_logits(hidden, weight, bias, o, adapter), want, rtol=1e-12, atol=1e-12)


def test_a_trainable_head_is_refused() -> None:
    hidden, weight, targets, *_ = problem(3, 11, torch.float32)
    with pytest.raises(ValueError, match="frozen"):
        linear_logprob(hidden, weight.requires_grad_(), targets)


def test_the_triton_code_in_a_fresh_process() -> None:
    assert outcomes_interpreted(__file__)["passed"] > 75
