"""Recorded passes as CUDA graphs: `pytest -m gpu -s tests/test_layer_graphs_gpu.py`."""

from __future__ import annotations

import gc
import random
import time
from types import SimpleNamespace

import pytest
import torch
from plan_config import config_of

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.config import AlgorithmConfig, LoraConfig
from tandem.rl.fused_layer import FusedLayers, LayerPlan
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, _register_packed_attention
from tandem.rl.packing import pack
from tandem.rl.plan_memory import setup_of
from tandem.rl.plan_pack import recorded_bytes
from tandem.rl.plan_shape import shape_of
from tandem.rl.samples import Sequence
from tandem.rl.step import PolicyBatch, policy_backward, scored_hidden

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def lm(request) -> LanguageModel:
    import transformers

    _register_packed_attention()
    kind = {"llama": "Llama", "qwen3": "Qwen3"}[request.param]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).cuda().bfloat16().eval().requires_grad_(False)
    lm = LanguageModel(model, SimpleNamespace(), torch.device("cuda", 0), torch.bfloat16, HeadOptions(), 4096)
    attach_lora(lm, LoraConfig(r=16), seed=0)
    for _, parameter in trainable(lm):
        parameter.data.normal_(std=0.02)
    return lm


def batch(seed: int) -> PolicyBatch:
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(1, 4096) for _ in range(draw.randint(least, most))]

    sequences = []
    for family in range(8):
        prompt = ids(40, 60)
        for _ in range(8):
            answer = ids(8, 16)
            sequences.append(Sequence(prompt, answer, [True] * len(answer), family=family))
    return PolicyBatch(sequences, [draw.uniform(-1, 1) for _ in sequences], [[-1.0] * s.num_scored for s in sequences])


def gradients(lm: LanguageModel, one: PolicyBatch) -> dict[str, torch.Tensor]:
    lm.model.zero_grad()
    algorithm = AlgorithmConfig(loss_type="dapo", rollout_correction="none")
    policy_backward(lm, pack(one.sequences, 8192), one, algorithm, lm.head, Meter(), max_completion_length=16)
    return {name: p.grad.clone() for name, p in trainable(lm)}


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([x.flatten() for x in one.values()]).double() for one in (ours, theirs))
    return float((a - b).norm() / b.norm())


def test_replays_give_the_gradients_of_the_layers(lm: LanguageModel) -> None:
    usual, layers = FusedLayers(), FusedLayers(LayerPlan(recorded=True))
    for seed in range(8):
        one = batch(seed)
        usual.attach(lm)
        theirs, again = gradients(lm, one), gradients(lm, one)
        layers.attach(lm)
        ours = gradients(lm, one)
        # Attention's backward kernels add in any order, and padded products may be cut otherwise.
        print(f"seed {seed}: {apart(ours, theirs):.2e} apart, two usual passes {apart(again, theirs):.2e}")
        assert apart(ours, theirs) < 0.02
        with torch.no_grad():
            for _, parameter in trainable(lm):
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    assert layers._graphs is not None
    assert not layers._graphs.off
    assert layers._graphs._records
    other = gradients(lm, batch(99))
    assert apart(other, theirs) > 0.5, "the comparison tells packs apart"


def test_recordings_hold_what_the_plan_says(lm: LanguageModel) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    layers = FusedLayers(LayerPlan(recorded=True)).attach(lm)
    one = batch(0)
    (made,) = pack(one.sequences, 8192)
    for _ in range(3):
        gradients(lm, one)
    assert layers._graphs is not None
    lm.model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    layers._graphs = None
    gc.collect()
    torch.cuda.empty_cache()
    freed = held - torch.cuda.memory_reserved()
    said = recorded_bytes(setup_of(shape_of(lm.model.config), config_of(lora={"r": 16})), made.num_tokens)
    print(f"recordings of {made.num_tokens} rows: planned {said >> 20} MiB, freed {freed >> 20} MiB")
    assert 0.5 * said <= freed <= 1.1 * said


def test_recordings_are_made_anew_in_another_pool(lm: LanguageModel) -> None:
    """PyTorch refuses a pool whose last graph has gone."""
    layers = FusedLayers(LayerPlan(recorded=True)).attach(lm)
    one = batch(0)
    for _ in range(2):
        for _ in range(3):
            ours = gradients(lm, one)
        assert layers._graphs is not None
        assert layers._graphs._records
        assert layers._graphs.held > 0
        with lm.model.disable_adapter(), torch.no_grad(), lm.packed():
            (made,) = pack(one.sequences, 8192)
            scored_hidden(lm, made)
        for _, parameter in trainable(lm):
            parameter.data = parameter.data.clone()
    gradients(lm, one)
    assert not layers._graphs.off
    FusedLayers().attach(lm)
    assert apart(ours, gradients(lm, one)) < 0.02


def test_how_long_an_update_takes(lm: LanguageModel) -> None:
    seconds = {}
    for recorded in (False, True):
        FusedLayers(LayerPlan(recorded=recorded)).attach(lm)
        taken = []
        for seed in range(16):
            one = batch(seed)
            torch.cuda.synchronize()
            started = time.perf_counter()
            gradients(lm, one)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        seconds[recorded] = sorted(taken[-8:])[4]
        print(
            f"recorded {recorded}: {1000 * seconds[recorded]:.1f} ms, memory {torch.cuda.memory_reserved() >> 20} MiB"
        )
    assert all(value > 0 for value in seconds.values())
