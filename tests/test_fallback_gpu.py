"""A model without fused layers on a CUDA device: memory, bits and time with its layer inputs in host memory.

Run by hand with `pytest -m gpu -s tests/test_fallback_gpu.py`. The last test prints transformers' own offload beside
ours; time is reported, not judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.rl.checkpoint_offload import CheckpointedLayers
from tandem.rl.config import Config, LoraConfig
from tandem.rl.console import Console
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.model import LanguageModel, _register_packed_attention
from tandem.rl.offload import BLOCK_BYTES
from tandem.rl.open_model import open_model
from tandem.rl.step import training_mode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS, WIDTH, VOCAB = 8, 2048, 4096
Pack = tuple[torch.Tensor, torch.Tensor, PackLayout]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    from transformers import AutoModelForCausalLM, Olmo2Config

    _register_packed_attention()
    config = Olmo2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=5632,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        initializer_range=0.03,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16)
    model.requires_grad_(False)
    model.eval()
    lm = LanguageModel(model, SimpleNamespace(), torch.device("cuda"), torch.bfloat16, HeadOptions(), 65536)
    attach_lora(lm, LoraConfig(r=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(lm):  # B = 0 would hide most of the adapter's gradient
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return lm


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Attention's backward kernels add in any order otherwise. It also fills fresh memory with nan."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's keeps its own order even so
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)


def pack_of(total: int) -> Pack:
    """Two families, the second of a prompt with two completions."""
    quarter = total // 4
    ids = torch.randint(1, VOCAB, (total,), generator=torch.Generator().manual_seed(2)).cuda()
    positions = [torch.arange(quarter), torch.arange(quarter), *[torch.arange(quarter, 2 * quarter)] * 2]
    families = [
        Family((0, quarter)),
        Family((quarter, 2 * quarter), ((2 * quarter, 3 * quarter), (3 * quarter, 4 * quarter))),
    ]
    return ids, torch.cat(positions).cuda(), PackLayout(families)


def gradients(lm: LanguageModel, pack: Pack) -> list[torch.Tensor]:
    with training_mode(lm):
        out = lm.packed_hidden(*pack)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
        (out * direction).sum().backward()
    grads = [p.grad.clone() for _, p in trainable(lm) if p.grad is not None]
    assert len(grads) == len(trainable(lm))
    lm.model.zero_grad()
    return grads


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def peak(run: Callable[[], Any]) -> int:
    """Device bytes beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def test_offload_lowers_the_peak_and_keeps_every_bit(lm):
    pack = pack_of(4096)
    layer_input = 4096 * WIDTH * 2
    near = CheckpointedLayers(offload=False).attach(lm)
    expected = gradients(lm, pack)
    assert same(gradients(lm, pack), expected), "the reference itself is not deterministic"
    plain = peak(lambda: gradients(lm, pack))
    near.detach()
    far = CheckpointedLayers(offload=True).attach(lm)
    try:
        for _ in range(4):  # later passes reuse host and device memory
            assert same(gradients(lm, pack), expected)
            assert far.host is not None
            assert far.host.pool.free == far.host.pool.allocated == LAYERS * -(-layer_input // BLOCK_BYTES)
        offloaded = peak(lambda: gradients(lm, pack))
    finally:
        far.detach()
    print(f"\n4096 tokens: peak {plain / 2**20:.0f} MiB with inputs on the device, {offloaded / 2**20:.0f} without")
    # In the last layer's backward pass its own input and the next one are there, of the others nothing.
    assert offloaded <= plain - (LAYERS - 3) * layer_input


def test_two_packs_may_wait_at_once(lm):
    packs = [pack_of(2048), pack_of(4096)]

    def both() -> list[torch.Tensor]:
        with training_mode(lm):
            total = sum(lm.packed_hidden(*pack).float().square().sum() for pack in packs)
            assert isinstance(total, torch.Tensor)
            total.backward()
        grads = [p.grad.clone() for _, p in trainable(lm) if p.grad is not None]
        lm.model.zero_grad()
        return grads

    near = CheckpointedLayers(offload=False).attach(lm)
    expected = both()
    near.detach()
    far = CheckpointedLayers(offload=True).attach(lm)
    try:
        for _ in range(3):
            assert same(both(), expected)
            with training_mode(lm):
                lm.packed_hidden(*packs[0])  # dropped without a backward pass
    finally:
        far.detach()


def test_without_being_asked_a_large_pack_goes_out_and_a_small_one_stays(lm):
    layers = CheckpointedLayers().attach(lm)
    try:
        gradients(lm, pack_of(4096))
        assert layers.host is None
        gradients(lm, pack_of(20480))  # 8 layers × 80 MiB
        assert layers.host is not None
    finally:
        layers.detach()


def test_a_run_of_an_undescribed_family_falls_back(tmp_path: Path, capsys):
    from tokenizers import Tokenizer, models
    from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    Olmo2ForCausalLM(Olmo2Config(**sizes)).bfloat16().save_pretrained(tmp_path)
    vocabulary = {f"w{i}": i for i in range(3, 256)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    inputs: Any = SimpleNamespace(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>"),
        data=SimpleNamespace(prompts=[], eval_prompts=[]),
        environments=None,
    )
    config = Config.model_validate(
        {
            "model": {"model_name_or_path": str(tmp_path)},
            "data": {"dataset_name": "unused.jsonl"},
            "rewards": {"reward_funcs": ["exact_match"]},
            "train": {"offload_activations": True},
        }
    )
    opened, *_ = open_model(config, inputs, Console())
    assert opened.device.type == "cuda"
    assert opened.fused is None
    said = " ".join(capsys.readouterr().err.split())
    assert "layers recomputed in the backward pass" in said
    assert "'olmo2'" in said
    ids = torch.arange(1, 65).cuda()
    pack = (ids, torch.arange(64).cuda(), PackLayout([Family((0, 64))]))
    assert all(g.isfinite().all() for g in gradients(opened, pack))
    assert opened.checkpoints.host.pool.allocated == sizes["num_hidden_layers"]


@pytest.mark.parametrize("tokens", [16384, 65536])
def test_memory_and_time_beside_transformers_offload(lm, tokens):
    torch.use_deterministic_algorithms(False)  # filling fresh memory takes time
    torch.backends.cuda.enable_cudnn_sdp(True)
    pack = pack_of(tokens)
    enable = (
        getattr(lm.causal_lm, "activation_checkpointing_enable", None) or lm.causal_lm.gradient_checkpointing_enable
    )
    disable = (
        getattr(lm.causal_lm, "activation_checkpointing_disable", None) or lm.causal_lm.gradient_checkpointing_disable
    )

    def measure(name: str) -> int:
        gradients(lm, pack)  # host memory is allocated here
        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            gradients(lm, pack)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        bytes_ = peak(lambda: gradients(lm, pack))
        print(f"{tokens} tokens, {name}: {min(seconds):.3f} s, peak {bytes_ / 2**30:.2f} GiB")
        return bytes_

    print()
    peaks = []
    for offload in (False, True):
        layers = CheckpointedLayers(offload=offload).attach(lm)
        peaks.append(measure(f"CheckpointedLayers(offload={offload})"))
        layers.detach()
    enable({"use_reentrant": False}, offload=True)
    measure("transformers' offload=True")
    disable()
    assert peaks[1] < peaks[0]
