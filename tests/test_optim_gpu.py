"""The optimisers on a CUDA device: states through checkpoints, quantisation, clipping, waits for the device.

Run by hand with `pytest -m gpu -s tests/test_optim_gpu.py`. `tests/test_optim.py` holds what a CPU can tell.
"""

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
from tandem.rl.config import LoraConfig, ModelConfig, OptimConfig
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.model import LanguageModel, load_model
from tandem.rl.optim import apply_gradients, make_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


def adapted(seed: int) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.to("cuda", torch.bfloat16)
    model.requires_grad_(False)
    lm = LanguageModel(model, SimpleNamespace(), torch.device("cuda"), torch.bfloat16, HeadOptions(), 64)
    # Rank 64: A has 131,072 elements and more, which bitsandbytes pages (from 100,000 on).
    attach_lora(lm, LoraConfig(r=64), seed=seed)
    # None of these has so few elements that its state stays in 32 bits; this one has.
    lm.model.register_parameter("small", torch.nn.Parameter(torch.linspace(-1, 1, 100, device="cuda")))
    return lm


def step(lm: LanguageModel, optimizer: torch.optim.Optimizer, number: int) -> float:
    generator = torch.Generator("cuda").manual_seed(number)
    for _, p in trainable(lm):
        p.grad = torch.randn(p.shape, generator=generator, device="cuda")
    return apply_gradients(optimizer, trainable(lm), rate=1e-3, max_grad_norm=1.0)


def config_of(name: str) -> OptimConfig:
    return OptimConfig(optim=name, learning_rate=1e-3, weight_decay=0.1)  # type: ignore[arg-type]


def states(lm: LanguageModel, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    torch.cuda.synchronize()  # a paged state is host memory that the device may still be writing
    return [optimizer.state[p] for _, p in trainable(lm)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(tmp_path: Path, name):
    through = adapted(0)
    optimizer = make_optimizer(trainable(through), config_of(name))
    for number in range(3):
        step(through, optimizer, number)
    saved = save_checkpoint(tmp_path, through, optimizer, State(step=3), keep=1)

    resumed = adapted(1)
    # peft saves the adapter alone, which the small tensor is no part of.
    resumed.model.small.data.copy_(through.model.small)
    second = make_optimizer(trainable(resumed), config_of(name))
    restore(saved, resumed, second)
    before, after = states(through, optimizer), states(resumed, second)
    for a, b in zip(before, after, strict=True):
        assert a.keys() == b.keys()
        assert all(same(a[entry], b[entry]) for entry in a)
        if "state1" in a:
            assert getattr(a["state1"], "is_paged", False) == getattr(b["state1"], "is_paged", False)
    if name != "adamw_torch":
        kinds = {state["state1"].dtype for state in after}
        assert kinds == ({torch.float32} if name.endswith("32bit") else {torch.uint8, torch.float32})
        paged = {getattr(state["state1"], "is_paged", False) for state in after}
        assert paged == ({False, True} if name.startswith("paged") else {False})

    for number in range(3, 6):
        step(through, optimizer, number)
        step(resumed, second, number)
    for (key, p), (_, q) in zip(trainable(through), trainable(resumed), strict=True):
        assert torch.equal(p, q), key
    for a, b in zip(states(through, optimizer), states(resumed, second), strict=True):
        assert all(same(a[entry], b[entry]) for entry in a)


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_adamw_in_float64_within_the_states_precision(name):
    lm = adapted(0)
    names = [n for n, _ in trainable(lm)]
    exact = [p.detach().double().clone().requires_grad_() for _, p in trainable(lm)]
    start = [w.detach().clone() for w in exact]
    reference = torch.optim.AdamW(exact, lr=1e-3, weight_decay=0.1)
    optimizer = make_optimizer(trainable(lm), config_of(name))
    for number in range(20):
        generator = torch.Generator("cuda").manual_seed(number % 4)
        grads = [torch.randn(p.shape, generator=generator, device="cuda") for p in exact]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        for w, g in zip(exact, grads, strict=True):
            w.grad = g.double() * min(1.0, 1.0 / norm)
        reference.step()
        assert step(lm, optimizer, number % 4) == pytest.approx(norm, rel=3e-6)
    for key, (_, p), w, s in zip(names, trainable(lm), exact, start, strict=True):
        error = float((p.detach().double() - w.detach()).norm() / (w.detach() - s).norm())
        coarse = "8bit" in name and p.numel() >= 4096
        print(f"{name} {key[-40:]}: {error:.2e}")
        # Weight decay before or behind the step, which is the implementation's choice, is lr·decay = 1e-4 apart.
        assert (1e-3 < error < 0.05) if coarse else error < 3e-4


def test_clipping_waits_for_the_device_once_and_is_exact():
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(16, 4096) if i % 2 else (4096 + i, 16) for i in range(500)]
    parameters = [(str(i), torch.nn.Parameter(torch.zeros(s, device="cuda"))) for i, s in enumerate(shapes)]
    optimizer = make_optimizer(parameters, OptimConfig())
    plain = torch.optim.SGD([p for _, p in parameters], lr=1.0, foreach=True)

    def fill() -> list[torch.Tensor]:
        grads = [torch.randn(s, generator=generator, device="cuda") * 10.0 ** (i % 4 - 2) for i, s in enumerate(shapes)]
        for (_, p), g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        return grads

    fill()
    apply_gradients(optimizer, parameters, rate=0.0, max_grad_norm=1.0)  # makes the state
    for optim in (optimizer, plain):
        for _, p in parameters:
            p.data.zero_()
        grads = fill()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                norm = apply_gradients(optim, parameters, rate=1.0, max_grad_norm=1.0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in seen if "called a synchronizing" in str(w.message)]
        assert len(waits) == 1, waits
    # The gradient of the plain descent, from zero with rate 1, is what is left in the weights.
    exact = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert norm == pytest.approx(exact, rel=3e-6)
    for (_, p), g in zip(parameters, grads, strict=True):
        torch.testing.assert_close(p.detach().double(), -g.double() / exact, rtol=5e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_norm_that_is_not_finite_changes_nothing(name, bad):
    lm = adapted(0)
    optimizer = make_optimizer(trainable(lm), config_of(name))
    step(lm, optimizer, 0)
    weights = [p.detach().clone() for _, p in trainable(lm)]
    before = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for s in states(lm, optimizer)]
    for _, p in trainable(lm):
        p.grad = torch.ones_like(p)
    last = trainable(lm)[-1][1]
    assert last.grad is not None
    last.grad.view(-1)[-1] = bad
    assert not math.isfinite(apply_gradients(optimizer, trainable(lm), rate=1.0, max_grad_norm=1.0))
    assert all(torch.equal(p, w) for (_, p), w in zip(trainable(lm), weights, strict=True))
    for a, b in zip(before, states(lm, optimizer), strict=True):
        assert all(same(a[k], b[k]) for k in a)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_adapter_is_float32_whatever_the_base(tmp_path: Path, quantised):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(tmp_path)
    config = ModelConfig(model_name_or_path=str(tmp_path), device="cuda", load_in_4bit=quantised)
    lm = load_model(config, SimpleNamespace(pad_token_id=0))
    attach_lora(lm, LoraConfig(r=8), seed=0)
    base = {p.dtype for n, p in lm.model.named_parameters() if n.endswith("q_proj.base_layer.weight")}
    assert base == ({torch.uint8} if quantised else {torch.bfloat16})
    assert {p.dtype for _, p in trainable(lm)} == {torch.float32}
