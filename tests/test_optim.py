"""The optimiser: AdamW and clipping against float64 definitions, bitsandbytes' states through checkpoints."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.checkpoint import State, restore, save_checkpoint
from tandem.rl.config import LoraConfig, OptimConfig
from tandem.rl.errors import UserError
from tandem.rl.lora import attach_lora, load_adapter, save_adapter, trainable
from tandem.rl.model import LanguageModel
from tandem.rl.optim import _bitsandbytes_optimizer, apply_gradients, make_optimizer, restore_optimizer

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def adapted(seed: int, dtype: torch.dtype = torch.float32) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.requires_grad_(False)
    lm = LanguageModel(model, SimpleNamespace(), torch.device("cpu"), dtype, HeadOptions(), 64)
    # Rank 64: some tensors have 4096 elements or more, which bitsandbytes then keeps in 8 bits, and some fewer.
    attach_lora(lm, LoraConfig(r=64, target_modules=["q_proj", "k_proj", "down_proj"]), seed=seed)
    return lm


def bitsandbytes_optimizer(lm: LanguageModel, name: str) -> Any:
    """make_optimizer refuses them on a CPU, where they work all the same, though without paging."""
    return _bitsandbytes_optimizer([p for _, p in trainable(lm)], name, SETTINGS)


def step(lm: LanguageModel, optimizer: torch.optim.Optimizer, number: int) -> float:
    generator = torch.Generator().manual_seed(number)
    for _, p in trainable(lm):
        p.grad = torch.randn(p.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        return apply_gradients(optimizer, trainable(lm), rate=1e-2, max_grad_norm=1.0)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_adamw_with_clipping_is_the_textbooks(max_grad_norm):
    config = OptimConfig(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (2, 4)]
    parameters = [
        (str(i), torch.nn.Parameter(torch.randn(s, generator=generator).float())) for i, s in enumerate(shapes)
    ]
    exact = [p.detach().double() for _, p in parameters]
    first = [torch.zeros_like(w) for w in exact]
    second = [torch.zeros_like(w) for w in exact]
    optimizer = make_optimizer(parameters, config)
    for t in range(1, 9):
        rate = 0.05 / t
        grads = [torch.randn(s, generator=generator) * 0.1 * t for s in shapes]
        for (_, p), g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        scale = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
        assert apply_gradients(optimizer, parameters, rate=rate, max_grad_norm=max_grad_norm) == pytest.approx(norm)
        for i, g in enumerate(grads):
            g = g.double() * scale
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.95 * second[i] + 0.05 * g * g
            direction = first[i] / (1 - 0.8**t) / ((second[i] / (1 - 0.95**t)).sqrt() + 1e-6)
            exact[i] = exact[i] * (1 - rate * 0.1) - rate * direction
    for (_, p), w in zip(parameters, exact, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)
        assert p.grad is None


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 50.0, 1e4])
def test_clipping_is_exact(max_grad_norm):
    generator = torch.Generator().manual_seed(1)
    # Many tensors of very different sizes; one parameter got no gradient.
    shapes = [(16, 64 + i) for i in range(60)] + [(1,), (2, 3, 4)]
    parameters = [(str(i), torch.nn.Parameter(torch.zeros(s))) for i, s in enumerate(shapes)]
    parameters.append(("idle", torch.nn.Parameter(torch.ones(3))))
    grads = [torch.randn(s, generator=generator) * 10.0 ** ((i % 5) - 3) for i, s in enumerate(shapes)]
    for (_, p), g in zip(parameters, grads, strict=False):
        p.grad = g.clone()
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    # Plain descent with rate 1 from zero leaves exactly the negative of the gradient that it was given.
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=1.0)
    assert apply_gradients(optimizer, parameters, rate=1.0, max_grad_norm=max_grad_norm) == pytest.approx(
        norm, rel=1e-6
    )
    clipped = 0 < max_grad_norm < norm
    for (_, p), g in zip(parameters, grads, strict=False):
        if clipped:
            torch.testing.assert_close(p.detach().double(), -g.double() * max_grad_norm / norm, rtol=2e-6, atol=0)
        else:
            assert torch.equal(p.detach(), -g)
    assert torch.equal(parameters[-1][1].detach(), torch.ones(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["adamw_torch", *NAMES])
def test_a_norm_that_is_not_finite_changes_nothing(name, bad):
    lm = adapted(0)
    optimizer = make_optimizer(trainable(lm), OptimConfig()) if name == "adamw_torch" else None
    optimizer = optimizer or bitsandbytes_optimizer(lm, name)
    step(lm, optimizer, 1)
    weights = [p.detach().clone() for _, p in trainable(lm)]
    state = snapshot(lm, optimizer)
    for _, p in trainable(lm):
        p.grad = torch.ones_like(p)
    last = trainable(lm)[-1][1]
    assert last.grad is not None
    last.grad.view(-1)[-1] = bad
    assert not math.isfinite(apply_gradients(optimizer, trainable(lm), rate=1.0, max_grad_norm=1.0))
    assert all(torch.equal(p, w) for (_, p), w in zip(trainable(lm), weights, strict=True))
    assert same(state, snapshot(lm, optimizer))
    assert last.grad is None


def snapshot(lm: LanguageModel, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for _, p in trainable(lm)
    ]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return all(x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes_goes_on_from_a_checkpoint_as_if_never_interrupted(tmp_path, name):
    through = adapted(0)
    optimizer = bitsandbytes_optimizer(through, name)
    for number in range(3):
        step(through, optimizer, number)
    kinds = {optimizer.state[p]["state1"].dtype for _, p in trainable(through)}
    assert kinds == ({torch.float32} if name.endswith("32bit") else {torch.uint8, torch.float32})
    saved = save_checkpoint(tmp_path, through, optimizer, State(step=3), keep=1)

    resumed = adapted(1)
    second = bitsandbytes_optimizer(resumed, name)
    buffers = record_buffers(second)
    restore(saved, resumed, second)
    assert same(snapshot(through, optimizer), snapshot(resumed, second))
    # What the optimiser allocates is what it goes on with: pageable memory stays so.
    for _, p in trainable(resumed):
        assert any(second.state[p]["state1"] is buffer for buffer in buffers)
        assert any(second.state[p]["state2"] is buffer for buffer in buffers)

    for number in range(3, 6):
        step(through, optimizer, number)
        step(resumed, second, number)
    for (_, a), (_, b) in zip(trainable(through), trainable(resumed), strict=True):
        assert torch.equal(a, b)
    assert same(snapshot(through, optimizer), snapshot(resumed, second))


def record_buffers(optimizer: Any) -> list[torch.Tensor]:
    buffers: list[torch.Tensor] = []
    allocate = optimizer.get_state_buffer

    def get_state_buffer(*args, **kwargs):
        buffers.append(allocate(*args, **kwargs))
        return buffers[-1]

    optimizer.get_state_buffer = get_state_buffer
    return buffers


def test_a_checkpoint_of_the_8bit_optimiser_serves_its_paged_kind_too(tmp_path):
    lm = adapted(0)
    optimizer = bitsandbytes_optimizer(lm, "adamw_8bit")
    step(lm, optimizer, 0)
    saved = save_checkpoint(tmp_path, lm, optimizer, State(step=1), keep=1)
    other = adapted(1)
    paged = bitsandbytes_optimizer(other, "paged_adamw_8bit")
    restore(saved, other, paged)
    assert same(snapshot(lm, optimizer), snapshot(other, paged))


def checkpoint_of(folder: Path, name: str) -> Path:
    lm = adapted(0)
    torch_one = name == "adamw_torch"
    optimizer = make_optimizer(trainable(lm), OptimConfig()) if torch_one else bitsandbytes_optimizer(lm, name)
    step(lm, optimizer, 0)
    return save_checkpoint(folder, lm, optimizer, State(step=1), keep=1)


@pytest.mark.parametrize(
    ("saved", "now"),
    [("adamw_torch", "adamw_8bit"), ("adamw_8bit", "adamw_torch"), ("adamw_8bit", "paged_adamw_32bit")],
)
def test_the_state_of_another_optimiser_is_refused(tmp_path, saved, now):
    checkpoint = checkpoint_of(tmp_path, saved)
    lm = adapted(0)
    torch_one = now == "adamw_torch"
    optimizer = make_optimizer(trainable(lm), OptimConfig()) if torch_one else bitsandbytes_optimizer(lm, now)
    with pytest.raises(UserError, match="not one of") as caught:
        restore(checkpoint, lm, optimizer)
    assert "optim.optim" in (caught.value.fix or "")


def test_the_state_of_unknown_parameters_is_refused():
    lm = adapted(0)
    optimizer = make_optimizer(trainable(lm), OptimConfig())
    with pytest.raises(UserError, match=r"'layers\.7\.lora_A\.weight'"):
        restore_optimizer(optimizer, trainable(lm), {"layers.7.lora_A.weight/exp_avg": torch.zeros(2)})


def test_parameters_without_an_update_have_no_state(tmp_path):
    lm = adapted(0)
    optimizer = make_optimizer(trainable(lm), OptimConfig())
    first = trainable(lm)[0][1]
    first.grad = torch.ones_like(first)
    apply_gradients(optimizer, trainable(lm), rate=1e-3, max_grad_norm=1.0)
    saved = save_checkpoint(tmp_path, lm, optimizer, State(step=1), keep=1)
    other = adapted(1)
    second = make_optimizer(trainable(other), OptimConfig())
    restore(saved, other, second)
    assert [bool(second.state.get(p)) for _, p in trainable(other)] == [True] + [False] * (len(trainable(other)) - 1)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_updates_are_those_of_adamw_within_quantisation(name):
    exact, coarse = adapted(0), adapted(0)
    start = [p.detach().clone() for _, p in trainable(exact)]
    optimizers = [torch.optim.AdamW([p for _, p in trainable(exact)], **SETTINGS), bitsandbytes_optimizer(coarse, name)]
    for number in range(20):
        step(exact, optimizers[0], number % 4)
        step(coarse, optimizers[1], number % 4)
    apart = [(a - b).norm() for (_, a), (_, b) in zip(trainable(exact), trainable(coarse), strict=True)]
    moved = [(a - s).norm() for (_, a), s in zip(trainable(exact), start, strict=True)]
    small = [p.numel() < 4096 for _, p in trainable(exact)]
    errors = [(d / m).item() for d, m in zip(apart, moved, strict=True)]
    assert {False, True} == set(small)
    print(name, errors)
    # Small tensors are kept in 32 bits; the others' moments have 8 bits in blocks of 256.
    assert all((e < 1e-5) if s else (1e-4 < e < 0.05) for e, s in zip(errors, small, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_adapter_is_float32_whatever_the_base(tmp_path, dtype):
    lm = adapted(0, dtype)
    assert {p.dtype for p in lm.model.parameters() if not p.requires_grad} == {dtype}
    assert {p.dtype for _, p in trainable(lm)} == {torch.float32}
    with torch.no_grad():
        for _, p in trainable(lm):
            p.add_(1e-7)  # too little for 16 bits to tell
    save_adapter(lm, tmp_path)
    other = adapted(1, dtype)
    load_adapter(other, tmp_path)
    for (_, a), (_, b) in zip(trainable(lm), trainable(other), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)
    optimizer = make_optimizer(trainable(other), OptimConfig())
    step(other, optimizer, 0)
    assert {v.dtype for state in snapshot(other, optimizer) for v in state.values()} == {torch.float32}
