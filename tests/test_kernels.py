"""The numeric pieces of a step against plain oracles in float64: head, attention, sampling, objectives, advantages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tandem.kernels import attention_blocked
from tandem.kernels.linear_logprob import HeadOptions, linear_logprob
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.kernels.packed_attention import packed_attention
from tandem.kernels.sampling import draw, restrict


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


# --- the head -------------------------------------------------------------------------------------------------------


def numpy_kept(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens of one row survive, by the definition: the k likeliest, of these the smallest set of mass top_p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    mass = np.exp(logits[order] - logits.max())
    mass /= mass.sum()
    kept, total = np.zeros(len(logits), dtype=bool), 0.0
    for token, probability in zip(order, mass, strict=True):
        if total >= top_p:
            break
        kept[token] = True
        total += probability
    return kept


def plain_head(hidden, weight, targets, bias, o: HeadOptions) -> tuple[torch.Tensor, torch.Tensor]:
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * o.scale
    z = z if o.softcap is None else o.softcap * torch.tanh(z / o.softcap)
    z = z / o.temperature
    kept = np.stack([numpy_kept(row, o.top_k, o.top_p) for row in z.detach().numpy()])
    kept[np.arange(len(kept)), targets.numpy()] = True
    z = z.masked_fill(~torch.from_numpy(kept), -1e300)
    log_p = z.log_softmax(-1)
    entropy = -torch.where(torch.from_numpy(kept), log_p.exp() * log_p, 0.0).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


HEADS = [
    {},
    {"temperature": 0.7},
    {"scale": 0.3, "temperature": 1.3},
    {"softcap": 2.5},
    {"softcap": 1.5, "scale": 1.7, "temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_k": 9, "top_p": 0.7, "temperature": 0.9, "softcap": 3.0, "scale": 1.2},
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_head_equals_autograd(options: dict[str, Any], biased: bool, generator: torch.Generator) -> None:
    n, d, v = 13, 6, 29
    hidden = torch.randn(n, d, dtype=torch.float64, generator=generator)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator)
    bias = torch.randn(v, dtype=torch.float64, generator=generator) if biased else None
    targets = torch.randint(v, (n,), generator=generator)
    g, h = torch.randn(2, n, dtype=torch.float64, generator=generator)

    def run(function, **more):
        x = hidden.clone().requires_grad_()
        log_probs, entropy, *_ = function(x, **more)
        (log_probs @ g + entropy @ h).backward()
        return log_probs.detach(), entropy.detach(), x.grad

    expected = run(lambda x: plain_head(x, weight, targets, bias, HeadOptions(**options)))
    for chunk in (1, 5, 13, 1000):
        o = HeadOptions(**options, chunk_size=chunk)
        ours = run(lambda x, o=o: linear_logprob(x, weight, targets, bias=bias, options=o))
        for name, a, b in zip(("log-probs", "entropy", "gradient"), ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=f"{name} with chunks of {chunk}")


@pytest.mark.parametrize("options", [o for o in HEADS if not {"top_k", "top_p"} & o.keys()], ids=str)
def test_normalisers_equal_autograd(options: dict[str, Any], generator: torch.Generator) -> None:
    """The log-partition function and the mean logit, alone and together with the log-probs."""
    hidden = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(29, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(29, (9,), generator=generator)
    factors = torch.randn(3, 9, dtype=torch.float64, generator=generator)
    o = HeadOptions(**options, chunk_size=4)
    for used in ([1], [2], [0, 1, 2]):
        ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        scores = linear_logprob(ours, weight, targets, options=o)
        z = plain @ weight.T * o.scale
        z = (z if o.softcap is None else o.softcap * torch.tanh(z / o.softcap)) / o.temperature
        expected = (z.log_softmax(-1).gather(-1, targets[:, None])[:, 0], z.logsumexp(-1), z.mean(-1))
        found = (scores.log_probs, scores.lse, scores.mean_logit)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        sum(found[i] @ factors[i] for i in used).backward()
        sum(expected[i] @ factors[i] for i in used).backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_head_takes_a_gradient_of_the_log_probs_alone(generator: torch.Generator) -> None:
    hidden = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    targets = torch.tensor([0, 3, 6, 6])
    linear_logprob(hidden, weight, targets)[0].sum().backward()
    plain = hidden.detach().clone().requires_grad_()
    plain_head(plain, weight, targets, None, HeadOptions())[0].sum().backward()
    torch.testing.assert_close(hidden.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_bfloat16_head_keeps_float32_logits(generator: torch.Generator) -> None:
    hidden = (3 * torch.randn(8, 64, generator=generator)).bfloat16()
    weight = torch.randn(50, 64, generator=generator).bfloat16()
    targets = torch.randint(50, (8,), generator=generator)
    ours = linear_logprob(hidden, weight, targets).log_probs
    exact, _ = plain_head(hidden.double(), weight.double(), targets, None, HeadOptions())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_head_with_probability_underflow_is_finite() -> None:
    hidden = torch.tensor([[2000.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=torch.float64)
    log_probs, entropy, *_ = linear_logprob(hidden, weight, torch.tensor([1]))
    (log_probs + entropy).sum().backward()
    assert log_probs.item() == -4000.0
    assert entropy.item() == 0.0
    # d/dh (z_1 − max z) = −1 − 1.
    assert hidden.grad is not None
    assert hidden.grad.item() == -2.0


# --- attention over packs -------------------------------------------------------------------------------------------

FAMILIES = [
    Family((0, 5)),
    Family((5, 9), ((9, 12), (12, 13), (13, 20))),
    Family((20, 21), ((21, 27),)),
    Family((27, 28)),
    Family((28, 37), ((37, 39), (39, 44))),
]


def separate_rows(q, k, v, families, scale, window=None, softcap=None) -> torch.Tensor:
    """Every root and every root + child as a row of its own, one token and one head at a time."""
    out = torch.zeros_like(q)
    repeat = q.shape[0] // k.shape[0]
    for family in families:
        root = list(range(*family.root))
        rows = [(root, 0)] + [(root + list(range(*child)), len(root)) for child in family.children]
        for row, first in rows:
            for i in range(first, len(row)):
                seen = row[max(0, i + 1 - window) if window else 0 : i + 1]
                for head in range(q.shape[0]):
                    scores = scale * (k[head // repeat][seen] @ q[head, row[i]])
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    out[head, row[i]] = scores.softmax(0) @ v[head // repeat][seen]
    return out


@pytest.mark.parametrize("tile", [10_000, 100], ids=["dense", "in blocks"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (1, None), (3, None), (9, None), (100, None), (None, 1.5), (4, 1.5)]
)
def test_packed_attention_equals_separate_rows(
    tile: int, kv_heads: int, window: int | None, softcap: float | None, generator, monkeypatch
) -> None:
    monkeypatch.setattr(attention_blocked, "CPU_TILE", tile)
    q = torch.randn(4, 44, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, kv_heads, 44, 8, dtype=torch.float64, generator=generator)
    g = torch.randn(4, 44, 8, dtype=torch.float64, generator=generator)

    def run(function):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        (out * g).sum().backward()
        return [out.detach(), *(x.grad for x in inputs)]

    ours = run(
        lambda q, k, v: packed_attention(q, k, v, PackLayout(FAMILIES), scale=0.4, window=window, softcap=softcap)
    )
    expected = run(lambda q, k, v: separate_rows(q, k, v, FAMILIES, 0.4, window, softcap))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 1, 4, 11, 12, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-9])
def test_restrict_equals_the_definition(top_k: int, top_p: float, generator: torch.Generator) -> None:
    logits = 2 * torch.randn(40, 12, dtype=torch.float64, generator=generator)
    ours = restrict(logits, top_k=top_k, top_p=top_p)
    expected = np.stack([numpy_kept(row, top_k, top_p) for row in logits.numpy()])
    np.testing.assert_array_equal(torch.isfinite(ours).numpy(), expected)
    assert torch.equal(ours[torch.from_numpy(expected)], logits[torch.from_numpy(expected)])


def test_restrict_keeps_the_sampled_token() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    kept = torch.isfinite(restrict(logits, top_k=1, top_p=0.5, keep=torch.tensor([3])))
    assert kept.tolist() == [[True, False, False, True]]


def test_draw_has_the_right_frequencies(generator: torch.Generator) -> None:
    logits = torch.tensor([0.0, 1.5, -2.0, -torch.inf, 0.7, -0.1, -torch.inf])
    log_probs = logits.log_softmax(-1)
    n = 200_000
    ids = draw(log_probs.expand(n, -1).contiguous(), torch.rand(n, generator=generator))
    counts = torch.bincount(ids, minlength=7).double()
    expected = log_probs.double().exp() * n
    assert counts[[3, 6]].tolist() == [0, 0]
    live = expected > 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum()
    p_value = torch.special.gammaincc((live.sum().double() - 1) / 2, statistic / 2)
    assert p_value > 1e-4, (counts, expected)


def test_draw_never_takes_an_impossible_token_at_the_ends() -> None:
    log_probs = torch.tensor([[-torch.inf, 0.3, -1.0, -torch.inf]]).log_softmax(-1).expand(2, -1)
    ends = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(log_probs, ends).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_leaves_its_input_alone(dtype: torch.dtype) -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]], dtype=dtype).log()
    before = log_probs.clone()
    draw(log_probs, torch.tensor([0.6]))
    assert torch.equal(log_probs, before)
