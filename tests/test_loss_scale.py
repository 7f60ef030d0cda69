"""Gradients of passes in float16 against float64, for losses so small that float16 would lose them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl import loss_scale
from tandem.rl.config import AlgorithmConfig, LoraConfig
from tandem.rl.fused_layer import FusedLayers
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, _register_packed_attention
from tandem.rl.packing import pack
from tandem.rl.preference_loss import PreferenceOptions
from tandem.rl.preference_step import Answers, preference_backward
from tandem.rl.samples import Sequence
from tandem.rl.step import PolicyBatch, policy_backward, supervised_backward

HEAD = HeadOptions()
# A token's share of the loss: as in a batch of ten million tokens.
SHARE = 1e-7


def model(dtype: torch.dtype, *, fused: bool) -> LanguageModel:
    """The same weights, which float16 holds exactly, in any type."""
    import transformers

    _register_packed_attention()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config).half().eval().requires_grad_(False)
    lm = LanguageModel(made.to(dtype), SimpleNamespace(), torch.device("cpu"), dtype, HEAD, 64)
    attach_lora(lm, LoraConfig(r=3), seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(lm):
        parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).half().float()
        if dtype == torch.float64:
            parameter.data = parameter.data.double()
    if fused:
        FusedLayers().attach(lm)
    return lm


def sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(2)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 61, (length,), generator=generator).tolist()

    found = []
    for family in range(3):
        prompt = ids(5)
        found += [Sequence(prompt, ids(n), [True] * n, family=family, unit=family) for n in (6, 3)]
    return found


def policy(lm: LanguageModel) -> None:
    made = sequences()
    batch = PolicyBatch(
        made, [SHARE * a for a in (1.0, -1.0, 0.5, -0.5, 2.0, 0.0)], [[-4.0] * s.num_scored for s in made]
    )
    algorithm = AlgorithmConfig(loss_type="dapo", rollout_correction="none", entropy_coef=SHARE)
    policy_backward(lm, pack(made, 20), batch, algorithm, HEAD, Meter(), max_completion_length=8)


def supervised(lm: LanguageModel) -> None:
    """Most tokens of the batch are not in these packs."""
    made = sequences()
    others: list = [SimpleNamespace(num_scored=round(1 / SHARE))]
    supervised_backward(lm, pack(made, 20), made + others, HEAD, Meter(), label_smoothing=0.1, z_loss=1e-3)


def preference(lm: LanguageModel) -> None:
    made = sequences()
    answers = Answers(made, None, [torch.full((s.num_scored,), -4.0, dtype=torch.float64) for s in made])
    preference_backward(lm, answers, "sigmoid", PreferenceOptions(beta=SHARE), HEAD, Meter(), max_tokens=20)


def gradient(lm: LanguageModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for _, p in trainable(lm)])


def apart(lm: LanguageModel, exact: LanguageModel) -> float:
    ours, theirs = gradient(lm), gradient(exact)
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("learn", [policy, supervised, preference])
@pytest.mark.parametrize("fused", [False, True], ids=["own layers", "fused"])
def test_small_losses_keep_their_gradients(fused, learn, monkeypatch):
    exact, ours = model(torch.float64, fused=False), model(torch.float16, fused=fused)
    learn(exact)
    learn(ours)
    assert apart(ours, exact) < 0.01
    unscaled = model(torch.float16, fused=fused)
    monkeypatch.setattr(loss_scale, "_scale", lambda grads: torch.ones(()))
    learn(unscaled)
    assert apart(unscaled, exact) > 0.2, "the comparison sees gradients that are lost"


def test_what_was_there_before_stays_to_the_last_bit():
    lm = model(torch.float16, fused=True)
    before = {}
    for name, parameter in trainable(lm):
        parameter.grad = torch.randn_like(parameter) * 10.0 ** torch.randint(-12, 3, parameter.shape)
        before[name] = parameter.grad.clone()
    for grad in (0.0, -0.0):
        hidden = torch.ones(3, dtype=torch.float16, requires_grad=True)
        root = hidden.float().sum()[None]
        loss_scale.backward([(root, torch.full((1,), grad))], [p for _, p in trainable(lm)], torch.float16)
    for name, parameter in trainable(lm):
        assert torch.equal(parameter.grad, before[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_seen_as_that(value):
    parameter = torch.nn.Parameter(torch.ones(2))
    root = (parameter.half() * 2).float()
    loss_scale.backward([(root, torch.tensor([value, 1.0]))], [parameter], torch.float16)
    assert not bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize("size", [1e-30, 1e-9, 3e-5, 1.0, 1e4, 1e9])
def test_scales_are_powers_of_two_that_bring_the_largest_to_one_size(size):
    scale = float(loss_scale._scale([torch.tensor([size, -size / 3]), torch.zeros(0)]))
    assert scale == 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    assert float(loss_scale._scale([torch.tensor([size, torch.inf])])) == 1
    if 1e-9 <= size <= 1e9:
        assert 8 < scale * size <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_not_scaled(dtype, monkeypatch):
    def never(_):
        raise AssertionError("scaled")

    monkeypatch.setattr(loss_scale, "_scale", never)
    parameter = torch.nn.Parameter(torch.ones(2))
    loss_scale.backward([(parameter * 3, torch.ones(2)), (parameter * 1, None)], [parameter], dtype)
    assert parameter.grad.tolist() == [3.0, 3.0]


def test_parameters_that_are_not_known_are_an_error():
    hidden = torch.ones(2, dtype=torch.float16, requires_grad=True)
    with pytest.raises(ValueError, match="no parameters that learn"):
        loss_scale.backward([(hidden.float(), torch.ones(2))], [], torch.float16)
    loss_scale.backward([(hidden.float(), torch.ones(2))], [], torch.bfloat16)
    assert hidden.grad is not None


def test_nothing_to_learn_from_leaves_everything_as_it_is():
    for dtype in (torch.float16, torch.bfloat16):
        loss_scale.backward([(torch.ones(1), None)], [], dtype)
