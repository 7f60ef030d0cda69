"""`linear_logprob` on a CUDA device at a real size: run by hand with `pytest -m gpu -s` and this file.

The oracle is float64 on the device. Errors of the Triton kernels are held against those of the plain path, which runs
the same matrix products. Time and memory are printed; of these only memory is judged.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem.kernels.linear_logprob import HeadAdapter, HeadOptions, TokenScores, linear_logprob
from tandem.kernels.linear_logprob_triton import token_scores_grad_into, token_scores_into

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
VOCAB, WIDTH, ROWS, CHUNK, RANK = 151_936, 1024, 1500, 512, 16
# Rows of the timing and of the float64 oracle's chunks.
MANY, FEW = 8192, 250

# Qwen's matrix has rows beyond its tokenizer; an odd count of real ones is the worst alignment.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "scale": 0.8, "softcap": 30.0, "vocab_size": VOCAB - 267},
]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def problem(rows: int, dtype: torch.dtype, *, vocab: int = VOCAB):
    """Hidden states, weight, targets, adapter: logits of a standard deviation near 4, as of a trained model."""
    hidden = torch.randn(rows, WIDTH, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab, WIDTH, device=DEVICE) * 4 / WIDTH**0.5).to(dtype)
    a = torch.randn(RANK, WIDTH, device=DEVICE) / WIDTH**0.5
    b = torch.randn(vocab, RANK, device=DEVICE) * 0.3
    targets = torch.randint(max(vocab - 300, 1), (rows,), device=DEVICE)
    return hidden, weight, targets, HeadAdapter(a, b, 0.5)


def exact(z: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """By the definitions, differentiable, in the type of `z`."""
    log_p = z.log_softmax(-1)
    return TokenScores(
        log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1), z.mean(-1)
    )


def bent(z: torch.Tensor, o: HeadOptions) -> torch.Tensor:
    z = z * o.scale
    z = z if o.softcap is None else o.softcap * torch.tanh(z / o.softcap)
    return z[:, : o.vocab_size] / o.temperature


def oracle(hidden, weight, targets, o: HeadOptions, adapter: HeadAdapter | None, grads):
    """Scores, and gradients of hidden states, a and b, by autograd in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, *(() if adapter is None else adapter[:2]))]
    wide = weight.double()
    parts = []
    for start in range(0, len(hidden), FEW):
        part = slice(start, start + FEW)
        raw = leaves[0][part] @ wide.T
        if adapter is not None:
            raw = raw + adapter.scale * (leaves[0][part] @ leaves[1].T) @ leaves[2].T
        values = exact(bent(raw, o), targets[part])
        torch.autograd.backward(list(values), [g[part].double() for g in grads])
        parts.append([v.detach() for v in values])
    return TokenScores(*(torch.cat(values) for values in zip(*parts, strict=True))), [t.grad for t in leaves]


def ours(hidden, weight, targets, o: HeadOptions, adapter: HeadAdapter | None, grads, impl):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, *(() if adapter is None else adapter[:2]))]
    adapter = None if adapter is None else HeadAdapter(leaves[1], leaves[2], adapter.scale)
    values = linear_logprob(leaves[0], weight, targets, options=o, adapter=adapter, impl=impl)
    torch.autograd.backward(list(values), grads)
    return TokenScores(*(v.detach() for v in values)), [t.grad for t in leaves]


def largest(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.isfinite().all()
    return (got.double() - want).abs().max().item()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the whole tensor: rounding errors of single elements have no size of their own."""
    assert got.isfinite().all()
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("with_adapter", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_are_no_larger_than_the_plain_paths(dtype, options, with_adapter) -> None:
    hidden, weight, targets, adapter = problem(ROWS, dtype)
    adapter = adapter if with_adapter else None
    o = HeadOptions(**options, chunk_size=CHUNK)
    grads = [torch.randn(ROWS, device=DEVICE) for _ in range(4)]
    want, want_grads = oracle(hidden, weight, targets, o, adapter, grads)
    plain, plain_grads = ours(hidden, weight, targets, o, adapter, grads, "torch")
    fast, fast_grads = ours(hidden, weight, targets, o, adapter, grads, None)
    for name, exact_, slow, quick in zip(TokenScores._fields, want, plain, fast, strict=True):
        errors = largest(quick, exact_), largest(slow, exact_)
        print(f"{name}: largest error {errors[0]:.2e}, plain {errors[1]:.2e}")
        last_place = torch.finfo(torch.float32).eps * exact_.abs().max().item()
        assert errors[0] <= 1.1 * errors[1] + last_place + 1e-6, name
        assert errors[0] <= 2e-4, name
    for name, exact_, slow, quick in zip(("hidden", "a", "b"), want_grads, plain_grads, fast_grads, strict=False):
        errors = relative(quick, exact_), relative(slow, exact_)
        print(f"gradient of {name}: relative error {errors[0]:.2e}, plain {errors[1]:.2e}")
        assert errors[0] <= 1.02 * errors[1] + 1e-6, name
        assert errors[0] <= (1e-2 if dtype == torch.bfloat16 else 1e-4), name


@pytest.mark.parametrize("vocab", [1, 7, 1031, 50_257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_odd_vocabularies_and_few_rows(dtype, vocab) -> None:
    for rows in (0, 1, 5):
        hidden, weight, targets, adapter = problem(rows, dtype, vocab=vocab)
        grads = [torch.randn(rows, device=DEVICE) for _ in range(4)]
        o = HeadOptions(chunk_size=2)
        got, got_grads = ours(hidden, weight, targets, o, adapter, grads, None)
        if rows == 0:
            assert all((g == 0).all() for g in got_grads)
            continue
        want, want_grads = oracle(hidden, weight, targets, o, adapter, grads)
        for name, a, b in zip(TokenScores._fields, got, want, strict=True):
            assert largest(a, b) <= 1e-4, name
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bent"])
def test_the_kernels_alone(options) -> None:
    """From the same float32 logits, without the noise of a matrix product; large and missing logits among them."""
    o = HeadOptions(**options)
    vocab = o.vocab_size or VOCAB
    raw = 5 * torch.randn(64, VOCAB, device=DEVICE)
    raw[0] += 1e4
    raw[1, 17] = 1e4
    raw[2, ::3] = -1e4
    if o.softcap is None:
        raw[3, ::2] = -torch.inf
    raw[:, vocab:] = torch.nan
    targets = torch.randint(vocab // 2, (64,), device=DEVICE) * 2 + 1
    terms = (None, o.scale, o.softcap, o.temperature, vocab)
    outputs = tuple(torch.full((64,), torch.nan, device=DEVICE) for _ in range(4))
    token_scores_into(outputs, raw, targets, *terms)
    log_probs, lse, entropy, mean = outputs

    leaf = raw.double().requires_grad_()
    z = bent(leaf, o)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    want_entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    want_log_probs = log_p.gather(-1, targets[:, None])[:, 0]
    size = z.detach().masked_fill(z == -torch.inf, 0.0).abs().amax(-1)
    assert ((log_probs - want_log_probs).abs() <= 1e-5 + 1e-6 * want_log_probs.abs()).all()
    assert ((entropy - want_entropy).abs() <= 1e-5).all()
    assert ((lse - z.logsumexp(-1)).abs() <= 2e-6 + 2e-7 * size).all()
    known = [i for i in range(64) if i != 3 or o.softcap is not None]
    assert ((mean - z.mean(-1)).abs() <= 2e-6 + 4e-7 * size)[known].all()

    grads = [torch.randn(64, device=DEVICE) for _ in range(2)]
    (want_log_probs @ grads[0].double() + want_entropy @ grads[1].double()).backward()
    out = torch.full_like(raw, torch.nan)
    token_scores_grad_into(out, raw, targets, lse, entropy, (*grads, None, None), *terms)
    assert leaf.grad is not None
    # Relative to the terms, which may cancel; p carries the rounding of the log-sum-exp.
    with torch.no_grad():
        surprise = log_p.masked_fill(p == 0, 0.0).abs() + want_entropy[:, None]
        terms_size = p * (grads[0].abs()[:, None] + grads[1].abs()[:, None] * surprise)
        terms_size.scatter_add_(1, targets[:, None], grads[0].abs().double()[:, None])
    limit = (1e-5 + 3e-7 * size[:, None]) * terms_size * o.scale / o.temperature + 1e-12
    assert ((out.double() - leaf.grad)[:, :vocab].abs() <= limit).all()
    assert (out[:, vocab:] == 0).all()
    rounded = torch.full_like(raw, torch.nan, dtype=torch.bfloat16)
    token_scores_grad_into(rounded, raw, targets, lse, entropy, (*grads, None, None), *terms)
    # bfloat16 has 8 significant bits: rounded to nearest it is off by 2⁻⁸ at most, cut off by 2⁻⁷.
    torch.testing.assert_close(rounded.float(), out, rtol=1.001 * 2**-8, atol=1e-37)
    token_scores_grad_into(raw, raw, targets, lse, entropy, (*grads, None, None), *terms)
    assert torch.equal(raw, out)


def test_beyond_two_to_the_31() -> None:
    """The last rows of one chunk, where offsets need 64 bits, against the same rows alone."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    torch.use_deterministic_algorithms(False)  # filling such buffers takes longer than the kernels
    rows, last = 2**31 // VOCAB + 100, slice(-3, None)
    raw = torch.zeros(rows, VOCAB, device=DEVICE)
    raw[last] = torch.randn(3, VOCAB, device=DEVICE)
    alone = raw[last].clone()
    targets = torch.randint(VOCAB, (rows,), device=DEVICE)
    grads = [torch.randn(rows, device=DEVICE) for _ in range(4)]
    terms = (None, 1.0, None, 1.0, VOCAB)
    outputs = tuple(torch.full((rows,), torch.nan, device=DEVICE) for _ in range(4))
    token_scores_into(outputs, raw, targets, *terms)
    few = tuple(torch.full((3,), torch.nan, device=DEVICE) for _ in range(4))
    token_scores_into(few, alone, targets[last], *terms)
    assert all(torch.equal(a[last], b) for a, b in zip(outputs, few, strict=True))
    out = torch.empty(rows, VOCAB, device=DEVICE, dtype=torch.bfloat16)
    token_scores_grad_into(out, raw, targets, outputs[1], outputs[2], tuple(grads), *terms)
    want = torch.empty(3, VOCAB, device=DEVICE, dtype=torch.bfloat16)
    few_grads = tuple(g[last].contiguous() for g in grads)
    token_scores_grad_into(want, alone, targets[last], few[1], few[2], few_grads, *terms)
    assert torch.equal(out[last], want)


def milliseconds(call: Callable[[], Any], repeats: int = 8) -> float:
    times = []
    for turn in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Beyond what is there before the call."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_time_and_memory() -> None:
    torch.use_deterministic_algorithms(False)
    for width, with_adapter in ((WIDTH, False), (4 * WIDTH, False), (4 * WIDTH, True)):
        hidden = torch.randn(MANY, width, device=DEVICE).bfloat16().requires_grad_()
        weight = (torch.randn(VOCAB, width, device=DEVICE) * 4 / width**0.5).bfloat16()
        a = torch.randn(RANK, width, device=DEVICE, requires_grad=True)
        b = torch.randn(VOCAB, RANK, device=DEVICE, requires_grad=True)
        adapter = HeadAdapter(a, b, 0.01) if with_adapter else None
        targets = torch.randint(VOCAB, (MANY,), device=DEVICE)
        g = torch.randn(2, MANY, device=DEVICE)

        for impl in ("triton", "torch"):
            made: list[TokenScores] = []

            def forward(impl=impl, made=made, problem=(hidden, weight, targets, adapter)) -> None:
                *tensors, lora = problem
                made[:] = [linear_logprob(*tensors, options=HeadOptions(chunk_size=CHUNK), adapter=lora, impl=impl)]

            def backward(made=made, g=g) -> None:
                torch.autograd.backward([made[0].log_probs, made[0].entropy], list(g), retain_graph=True)

            seconds = milliseconds(forward), milliseconds(backward)
            peaks = peak_bytes(forward), peak_bytes(backward)
            print(
                f"{MANY} × {width} × {VOCAB}, chunks of {CHUNK}, lora {with_adapter}, {impl}: "
                f"forward {seconds[0]:.1f} ms, backward {seconds[1]:.1f} ms; "
                f"peak {peaks[0] / 2**20:.0f} and {peaks[1] / 2**20:.0f} MiB"
            )
            if impl == "triton":
                chunk, out = CHUNK * VOCAB, 4 * MANY * 4
                lora = 3 * 4 * RANK * (VOCAB + width) if with_adapter else 0
                small = 2**20 + (8 * CHUNK * width if with_adapter else 0)
                assert peaks[0] <= 4 * chunk + out + small
                # The result, and the sum autograd keeps it in from the passes before.
                assert peaks[1] <= 6 * chunk + 2 * 2 * MANY * width + 2 * lora + 2 * small

        def product(h=hidden, w=weight) -> None:
            torch.mm(h.detach()[:CHUNK], w.t(), out_dtype=torch.float32)

        gemm = milliseconds(product)
        print(f"  the forward pass's matrix products alone: {gemm * MANY / CHUNK:.1f} ms")
