"""A GPU that really has no memory left, because the process may only have a share of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model import move_adapter, save_llama, save_words

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.checkpoint import State
from tandem.rl.config import LoraConfig, ModelConfig, TrainConfig
from tandem.rl.fused_layer import FusedLayers, LayerPlan
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.memory_guard import MemoryGuard, OutOfMemory
from tandem.rl.memory_metrics import CudaGauge
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, load_model, load_tokenizer
from tandem.rl.packing import pack
from tandem.rl.samples import Sequence
from tandem.rl.step import supervised_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(4094))]
LENGTH, COUNT = 1024, 16


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder: Path = tmp_path_factory.mktemp("model")
    save_words(folder, WORDS, eos="<eos>", unk="<unk>")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    save_llama(folder, len(WORDS), **sizes, **heads, max_position_embeddings=65536)
    config = ModelConfig(model_name_or_path=str(folder), device="cuda")
    made = load_model(config, load_tokenizer(config))
    attach_lora(made, LoraConfig(r=8), seed=0)
    move_adapter(made, seed=1, scale=0.02)
    return made


@pytest.fixture(autouse=True)
def whole_card() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def batch(length: int, count: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(WORDS), (count, length), generator=generator).tolist()
    return [Sequence(row[:4], row[4:], [True] * (length - 4)) for row in ids]


def gradients(lm: LanguageModel, rows: list[Sequence], max_tokens: int, said: list[str]) -> dict[str, torch.Tensor]:
    # Nothing is kept to save time, so that a pack's memory follows from its tokens alone.
    FusedLayers(LayerPlan(attention="save", projections="recompute"), offload=False).attach(lm)
    optimizer = torch.optim.SGD([p for _, p in trainable(lm)], lr=1.0)
    guard = MemoryGuard(
        lm, TrainConfig(max_tokens=max_tokens), State(), optimizer, warn=said.append, advice=lambda: "buy a card"
    )

    def attempt(size: int) -> None:
        supervised_backward(lm, pack(rows, size), rows, HeadOptions(), Meter())

    guard.run(attempt, lambda size: pack(rows, size))
    found = {name: p.grad.float().cpu() for name, p in trainable(lm) if p.grad is not None}
    optimizer.zero_grad(set_to_none=True)
    return found


def taken(lm: LanguageModel, rows: list[Sequence], max_tokens: int) -> int:
    """Bytes that the allocator holds at most."""
    gc.collect()
    torch.cuda.empty_cache()
    gauge = CudaGauge(lm.device)
    gauge.reset()
    gradients(lm, rows, max_tokens, [])
    return gauge.read().reserved


def allow(size: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)


def test_packs_are_halved_until_they_fit(lm: LanguageModel) -> None:
    rows = batch(LENGTH, COUNT)
    gradients(lm, rows, LENGTH, [])  # kernels are loaded and compiled
    large, small = taken(lm, rows, LENGTH * COUNT), taken(lm, rows, LENGTH * COUNT // 4)
    assert large > 2 * small - torch.cuda.memory_allocated()
    expected = gradients(lm, rows, LENGTH * COUNT // 4, [])
    before = torch.cuda.memory_allocated()
    allow((taken(lm, rows, LENGTH * COUNT // 2) + small) // 2)
    said: list[str] = []
    found = gradients(lm, rows, LENGTH * COUNT, said)
    assert len(said) == 2
    assert all("GiB free" in text for text in said)
    assert torch.cuda.memory_allocated() <= before
    for name, grad in expected.items():
        # Atomic sums of the backward pass come in any order.
        assert float((found[name] - grad).norm() / grad.norm()) < 0.02, name


def test_a_sequence_that_cannot_be_cut_moves_to_the_host(lm: LanguageModel) -> None:
    rows = batch(LENGTH * COUNT, 1)
    expected, large = gradients(lm, rows, LENGTH, []), taken(lm, rows, LENGTH)
    allow(int(0.8 * large))
    said: list[str] = []
    found = gradients(lm, rows, LENGTH, said)
    assert said
    assert "train.offload_activations=true" in said[0]
    for name, grad in expected.items():
        assert float((found[name] - grad).norm() / grad.norm()) < 0.02, name


def test_the_end_says_what_is_there(lm: LanguageModel) -> None:
    rows = batch(LENGTH * COUNT, 1)
    allow(torch.cuda.memory_allocated() + (32 << 20))
    with pytest.raises(OutOfMemory, match=r"asked for, .* GiB free[\s\S]*buy a card"):
        gradients(lm, rows, LENGTH, [])
    assert all(p.grad is None for _, p in trainable(lm))
