"""The stacked linear layer with LoRA against float64 autograd of its definition, projection by projection."""

from __future__ import annotations

import pytest
import torch

from tandem.kernels.lora_linear import Branch, LoraLinear

IN, ROWS = 10, 13
# Outputs of each projection, and the rank of its adapter (0: none).
STACKS = [
    [(6, 3), (4, 3), (4, 3)],
    [(6, 0), (4, 5), (7, 0)],
    [(9, 8)],
    [(5, 0)],
    [(1, 1), (1, 12)],
]


def build(stack: list[tuple[int, int]], dtype: torch.dtype, *, biased: bool, split: bool = False):
    """The layer with poisoned buffers filled, its weights, adapters and bias."""
    torch.manual_seed(0)
    outs = [out for out, _ in stack]
    weight = torch.randn(sum(outs), IN, dtype=dtype)
    bias = torch.randn(sum(outs), dtype=dtype) if biased else None
    branches, start = [], 0
    for i, (out, rank) in enumerate(stack):
        if rank:
            branches.append(Branch(torch.randn(rank, IN), torch.randn(out, rank), start, 0.5 + i))
        start += out
    layer = LoraLinear(sum(outs), IN, branches, bias=bias, dtype=dtype, device=torch.device("cpu"), split=split)
    layer.weight.copy_(weight)
    return layer, weight, bias, branches


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def exact(x, weight, bias, branches, adapters):
    y = x @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    parts = [torch.zeros_like(y)]
    for one, (a, b) in zip(branches, adapters, strict=True):
        part = torch.zeros_like(y)
        part[:, one.start : one.start + len(b)] = one.scale * (x @ a.t()) @ b.t()
        parts.append(part)
    return y + sum(parts)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_values_and_gradients(stack, biased, split):
    layer, weight, bias, branches = build(stack, torch.float64, biased=biased, split=split)
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
    adapters = [(one.a.double().requires_grad_(), one.b.double().requires_grad_()) for one in branches]
    want = exact(x, weight, bias, branches, adapters)
    dy = torch.randn_like(want)
    wanted = torch.autograd.grad(want, [x, *(t for pair in adapters for t in pair)], dy)

    xs = layer.inputs(x.detach())
    torch.testing.assert_close(layer.forward(xs), want, rtol=1e-12, atol=1e-12)
    rows = slice(1, layer.out_features)
    torch.testing.assert_close(layer.forward(xs, rows=rows), want[:, rows], rtol=1e-12, atol=1e-12)
    start = torch.randn_like(want)
    total = start.detach().clone()
    layer.add_forward(xs, total, to=total)
    torch.testing.assert_close(total, start + want, rtol=1e-12, atol=1e-12)
    beside = torch.full_like(want, torch.nan)
    layer.add_forward(xs, beside, to=start)
    torch.testing.assert_close(beside, start + want, rtol=1e-12, atol=1e-12)
    bare = layer.without_adapters()
    torch.testing.assert_close(bare.forward(xs[:, :IN]), exact(x, weight, bias, [], []), rtol=1e-12, atol=1e-12)

    dys = layer.gradients(dy)
    torch.testing.assert_close(layer.backward(dys), wanted[0], rtol=1e-12, atol=1e-12)
    # In two parts, as tiles are.
    sums = [layer.adapter_sums(dys[part], xs[part]) for part in (slice(0, 5), slice(5, ROWS))]
    found = layer.adapter_gradients((sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]))
    flat = [t for pair in found for t in pair]
    assert len(flat) == len(wanted) - 1
    for ours, theirs in zip(flat, wanted[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_results_go_where_they_are_wanted():
    layer, *_ = build(STACKS[0], torch.float64, biased=True)
    xs = layer.inputs(ROWS)
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    xs[:, :IN] = x
    layer.complete_inputs(xs)
    assert torch.equal(xs, layer.inputs(x))
    both = layer.gradients(ROWS)
    layer.forward(xs, both[:, : layer.out_features])
    assert torch.equal(both[:, : layer.out_features], layer.forward(xs))
    layer.complete_gradients(both)
    dx = torch.full((ROWS, IN + 2), torch.nan, dtype=torch.float64)
    layer.backward(both, dx[:, :IN])
    assert torch.equal(dx[:, :IN], layer.backward(both))
    assert dx[:, IN:].isnan().all()


def test_sums_are_wider_than_the_computation():
    """Thousands of bfloat16 terms of 1 in a bfloat16 sum stop at 256."""
    ones = torch.ones(1, 1)
    layer = LoraLinear(1, 1, [Branch(ones, ones, 0, 1.0)], dtype=torch.bfloat16, device=torch.device("cpu"))
    layer.weight.fill_(1)
    column = torch.ones(5000, 1, dtype=torch.bfloat16)
    ((d_a, d_b),) = layer.adapter_gradients(layer.adapter_sums(layer.gradients(column), layer.inputs(column)))
    assert d_a.dtype == d_b.dtype == torch.float32
    assert d_a.item() == d_b.item() == 5000


def test_bfloat16_is_as_good_as_separate_products():
    layer, weight, _, branches = build(STACKS[0], torch.bfloat16, biased=False)
    x = torch.randn(200, IN).bfloat16()
    adapters = [(one.a.bfloat16(), one.b.bfloat16()) for one in branches]
    want = exact(x.double(), weight, None, branches, [(a.double(), b.double()) for a, b in adapters])
    separate = x @ weight.t()
    for one, (a, b) in zip(branches, adapters, strict=True):
        separate[:, one.start : one.start + len(b)] += one.scale * ((x @ a.t()) @ b.t())
    ours = layer.forward(layer.inputs(x))
    assert (ours.double() - want).norm() < 1.05 * (separate.double() - want).norm()


def test_split_products_are_rounded_before_the_adapter_is_added():
    """257 and 1 in bfloat16, whose neighbours there are 256 and 258: together 258, one after the other 256."""
    one = torch.ones(1, 1)
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    found = []
    for split in (False, True):
        branch = Branch(torch.tensor([[1.0, 0.0]]), one, 0, 1.0)
        layer = LoraLinear(1, 2, [branch], dtype=torch.bfloat16, device=torch.device("cpu"), split=split)
        layer.weight.copy_(torch.tensor([[256.0, 1.0]]))
        xs = layer.inputs(x)
        total = torch.zeros(1, 1, dtype=torch.bfloat16)
        layer.add_forward(xs, total, to=total)
        found.append((layer.forward(xs).item(), total.item()))
    assert found == [(258, 258), (256, 256)]
