"""Weights that stay prepared from pass to pass: the same bits as without, whatever happens to the adapter between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_fused_layer import build
from test_plan import config_of, shape_of
from transformers import LlamaConfig, LlamaForCausalLM

from tandem.kernels.pack_layout import Family, PackLayout
from tandem.rl import lora, plan_memory, prepared_weights
from tandem.rl.config import ModelConfig
from tandem.rl.fused_layer import FusedLayers
from tandem.rl.model import LanguageModel, load_model
from tandem.rl.plan_memory import kept_weight_bytes, setup_of

IDS = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10])
LAYOUT = PackLayout([Family((0, 5)), Family((5, 8))])


@pytest.fixture
def lm() -> LanguageModel:
    made = build("qwen2")
    FusedLayers().attach(made)
    return made


def trainable(lm: LanguageModel) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in lora.trainable(lm)]


def one_pass(lm: LanguageModel) -> list[torch.Tensor]:
    """Hidden states and gradients."""
    parameters = trainable(lm)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    hidden = lm.packed_hidden(IDS, positions, LAYOUT)
    grads = torch.autograd.grad(hidden.square().sum(), parameters, allow_unused=True)
    return [hidden.detach(), *(g for g in grads if g is not None)]


def afresh(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The same where nothing is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(prepared_weights, "MOST_KEPT_BYTES", 0)
        other = FusedLayers().attach(lm)
        found = one_pass(lm)
        assert not other._weights._linears
    return found


def update(lm: LanguageModel) -> None:
    """As a kernel writes that autograd does not know of: through the data."""
    for parameter in trainable(lm):
        parameter.data.add_(0.1)


def move_base(lm: LanguageModel) -> None:
    lm.backbone.layers[1].mlp.down_proj.base_layer.weight.data.mul_(1.5)
    lm.backbone.layers[1].mlp.down_proj.base_layer.weight.add_(0)


def move_bias(lm: LanguageModel) -> None:
    lm.backbone.layers[0].self_attn.v_proj.base_layer.bias.add_(0.5)


def other_memory(lm: LanguageModel) -> None:
    for parameter in trainable(lm):
        parameter.data = parameter.data * 2


def rescale(lm: LanguageModel) -> None:
    lm.backbone.layers[0].self_attn.q_proj.scaling["default"] *= 3


@pytest.mark.parametrize("change", [update, move_base, move_bias, other_memory, rescale])
def test_a_change_between_passes_is_taken(
    lm: LanguageModel, change: Callable[[LanguageModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = lm.fused
    before = one_pass(lm)
    assert layers._weights._linears
    with torch.no_grad():
        change(lm)
    found = one_pass(lm)
    assert not torch.equal(found[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(found, afresh(lm, monkeypatch), strict=True))


def test_weights_are_prepared_once(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    prepared = prepared_weights._prepared
    monkeypatch.setattr(prepared_weights, "_prepared", lambda *a: made.append(a) or prepared(*a))
    first = one_pass(lm)
    assert len(made) == 3 * 4
    again = one_pass(lm)
    assert len(made) == 3 * 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_adapter_that_is_switched_off_and_on(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    update(lm)
    before = one_pass(lm)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    layers = lm.fused
    kept = [id(one) for _, one in layers._weights._linears.values()]
    with lm.model.disable_adapter(), torch.no_grad():
        without = lm.packed_hidden(IDS, positions, LAYOUT)
        assert len(layers._weights._linears) == 3 * 4, "one state at a time takes memory"
        assert [id(one) for _, one in layers._weights._linears.values()] == kept, "and it stays for the next pass"
        lm.fused = None
        with lm.packed():
            own = lm.packed_hidden(IDS, positions, LAYOUT)
        lm.fused = layers
    torch.testing.assert_close(without, own, rtol=1e-10, atol=1e-10)
    assert not torch.equal(without, before[0])
    assert all(torch.equal(a, b) for a, b in zip(before, one_pass(lm), strict=True))


def test_a_base_weight_that_changed_while_the_adapter_is_off_is_taken(lm: LanguageModel) -> None:
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    one_pass(lm)
    layers = lm.fused
    with torch.no_grad(), lm.model.disable_adapter():
        before = lm.packed_hidden(IDS, positions, LAYOUT)
        move_base(lm)
        found = lm.packed_hidden(IDS, positions, LAYOUT)
        lm.fused = None
        with lm.packed():
            own = lm.packed_hidden(IDS, positions, LAYOUT)
        lm.fused = layers
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-10)


def test_an_update_after_the_forward_pass_leaves_its_gradient(lm: LanguageModel) -> None:
    """The backward pass has the adapter of its forward pass, not one that is taken in between."""
    expected = one_pass(lm)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    hidden = lm.packed_hidden(IDS, positions, LAYOUT)
    kept = [p.detach().clone() for p in trainable(lm)]
    update(lm)
    grads = [g for g in torch.autograd.grad(hidden.square().sum(), trainable(lm), allow_unused=True) if g is not None]
    for parameter, value in zip(trainable(lm), kept, strict=True):
        parameter.data.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(expected[1:], grads, strict=True))


def test_a_large_model_keeps_none_and_neither_does_one_out_of_memory(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = lm.fused
    one_pass(lm)
    size = sum(one._buffer.nbytes for _, one in layers._weights._linears.values())
    monkeypatch.setattr(prepared_weights, "MOST_KEPT_BYTES", size)
    one_pass(lm)
    assert layers._weights._linears
    monkeypatch.setattr(prepared_weights, "MOST_KEPT_BYTES", size - 1)
    one_pass(lm)
    assert not layers._weights._linears
    monkeypatch.setattr(prepared_weights, "MOST_KEPT_BYTES", size)
    one_pass(lm)
    layers.abandon()
    one_pass(lm)
    assert not layers._weights._linears


def test_the_plan_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(one).save_pretrained(tmp_path)
    lm = load_model(ModelConfig(model_name_or_path=str(tmp_path), device="cpu"), SimpleNamespace(pad_token_id=0))
    given = config_of(lora={"r": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}, model={"load_in_4bit": False})
    lora.attach_lora(lm, given.lora, seed=0)
    layers = FusedLayers().attach(lm)
    one_pass(lm)
    held = sum(linear._buffer.nbytes for _, linear in layers._weights._linears.values())
    # The plan is about a GPU's type, of two bytes; here the buffers are float32.
    assert kept_weight_bytes(setup_of(shape_of(one), given)) == held // 2
    monkeypatch.setattr(plan_memory, "MOST_KEPT_BYTES", held // 2 - 1)
    assert kept_weight_bytes(setup_of(shape_of(one), given)) == 0
