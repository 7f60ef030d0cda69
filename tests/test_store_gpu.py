"""The weight store on a CUDA device: bytes, memory while loading, the cache, the host's embedding.

Run by hand with `pytest -m gpu -s tests/test_store_gpu.py`. The checkpoint is random, with layers of Qwen3-8B's shape.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIB = 1 << 20
IDS = torch.arange(3, 67)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        initializer_range=0.02,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    folder = tmp_path_factory.mktemp("store") / "model"
    model.save_pretrained(folder, max_shard_size="1GB")
    del model
    _release()
    return folder


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    _release()
    yield
    _release()


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@dataclass
class Opened:
    """A store, seconds until it was there, bytes on the device then and at most on the way."""

    store: Any
    seconds: float
    final: int
    peak: int


def opened(folder: Path, **more: Any) -> Opened:
    from tandem.rl.store import WeightStore

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, requested, start = torch.cuda.memory_allocated(), _requested(), time.perf_counter()
    options = {"format": "nf4", "device": "cuda", "cache_dir": folder.parent / "cache"} | more
    store = WeightStore.open(folder, **options)
    torch.cuda.synchronize()
    return Opened(
        store,
        time.perf_counter() - start,
        _requested() - requested,
        torch.cuda.max_memory_allocated() - before,
    )


def _requested() -> int:
    """Bytes that tensors asked for. What the allocator counts is up to a MiB more for each large one, by chance."""
    return torch.cuda.memory_stats().get("requested_bytes.all.current", 0)


def four_bit(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=options, device_map={"": "cuda:0"}, attn_implementation="sdpa"
    ).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids.cuda(), use_cache=False).logits.float()


def test_peak_memory_while_opening(checkpoint: Path, tmp_path: Path) -> None:
    one = opened(checkpoint, cache_dir=tmp_path)
    ledger = one.store.ledger()
    largest = max(
        (rows.stop - rows.start) * stacked.in_features * 2
        for stacked in one.store.linears.values()
        for rows in stacked.parts.values()
    )
    print(
        f"\nopen {one.seconds:.1f} s; final {one.final / MIB:.0f} MiB, peak +{(one.peak - one.final) / MIB:.0f} MiB; "
        f"largest linear {largest / MIB:.0f} MiB; ledger { ({k: round(v / MIB, 1) for k, v in ledger.items()}) } MiB"
    )
    assert one.store.notes == []
    # The allocator rounds each tensor up to 512 bytes.
    assert abs(one.final - sum(ledger.values())) < 4 * MIB
    assert one.peak <= one.final + 1.2 * largest + 64 * MIB


def test_bytes_equal_those_of_transformers(checkpoint: Path) -> None:
    store = opened(checkpoint).store
    theirs = four_bit(checkpoint)
    wrong = []
    for stacked in store.linears.values():
        for part in stacked.parts:
            weight = theirs.get_submodule(part).weight
            state, ours = weight.quant_state, stacked.quant_state(part)
            rows, columns = stacked.parts[part], stacked.in_features
            pairs = {
                "packed": (
                    weight.data,
                    stacked.tensors["packed"][rows.start * columns // 2 : rows.stop * columns // 2],
                ),
                "absmax": (state.absmax, ours.absmax),
                "absmax2": (state.state2.absmax, ours.state2.absmax),
                "code2": (state.state2.code, ours.state2.code),
                "offset": (state.offset, ours.offset),
                "code": (state.code, ours.code),
            }
            wrong += [f"{part}.{key}" for key, (a, b) in pairs.items() if not torch.equal(a, b)]
    for name, parameter in theirs.named_parameters():
        if name in store.dense and not torch.equal(parameter, store.dense[name]):
            wrong.append(name)
    print(f"\n{len(store.linears)} stacks, tensors that differ: {len(wrong)} {wrong[:6]}")
    assert not wrong


def test_logits_equal_those_of_transformers(checkpoint: Path) -> None:
    ours = opened(checkpoint).store.causal_lm()
    many, few = logits(ours), logits(ours, IDS[:, :1])
    del ours
    _release()
    theirs = four_bit(checkpoint)
    differences = [(many - logits(theirs)).abs().max().item(), (few - logits(theirs, IDS[:, :1])).abs().max().item()]
    print(f"\nlargest difference of logits: 64 tokens {differences[0]:.2e}, one token {differences[1]:.2e}")
    assert differences == [0, 0]


def test_rows_equal_bitsandbytes_dequantisation(checkpoint: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    store = opened(checkpoint).store
    wrong = []
    for name, stacked in list(store.linears.items())[:4]:
        model_rows = [
            dequantize_4bit(
                stacked.tensors["packed"][r.start * stacked.in_features // 2 : r.stop * stacked.in_features // 2],
                stacked.quant_state(part),
            )
            for part, r in stacked.parts.items()
        ]
        expected, rows = torch.cat(model_rows), stacked.out_features
        wide = torch.full((rows, stacked.in_features + 64), torch.nan, dtype=torch.bfloat16, device="cuda")
        stacked.write_weight(slice(0, rows), wide[:, : stacked.in_features])
        some = slice(rows // 3, rows - 7)
        part = torch.full((some.stop - some.start, stacked.in_features), torch.nan, dtype=torch.bfloat16, device="cuda")
        stacked.write_weight(some, part)
        if not torch.equal(wide[:, : stacked.in_features], expected) or not torch.equal(part, expected[some]):
            wrong.append(name)
    print(f"\nstacks whose rows differ: {wrong}")
    assert not wrong


def test_second_open_equals_the_first(checkpoint: Path, tmp_path: Path) -> None:
    first = opened(checkpoint, cache_dir=tmp_path)
    second = opened(checkpoint, cache_dir=tmp_path)
    different = [
        name
        for name, tensor in first.store._tensors().items()
        if not torch.equal(tensor, second.store._tensors()[name])
    ]
    size = next(tmp_path.glob("*.safetensors")).stat().st_size
    print(
        f"\nfirst {first.seconds:.1f} s, second {second.seconds:.2f} s ({size / MIB:.0f} MiB on disk), peak "
        f"+{(second.peak - second.final) / MIB:.0f} MiB"
    )
    assert second.store.notes == []
    assert not different
    assert second.seconds < first.seconds
    assert second.peak - second.final < 4 * MIB


def test_the_model_allocates_nothing_and_trains(checkpoint: Path) -> None:
    import peft

    store = opened(checkpoint).store
    before = torch.cuda.memory_allocated()
    model = store.causal_lm()
    grown = torch.cuda.memory_allocated() - before
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    wrapped(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
    kinds = {type(m).__name__ for m in wrapped.modules() if hasattr(m, "lora_A")}
    tokens = wrapped.generate(input_ids=IDS.cuda(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    print(f"\nmodel on the store: +{grown / MIB:.3f} MiB; adapters {kinds}, {len(gradients)} gradients")
    assert grown < MIB
    assert kinds == {"Linear4bit"}
    assert len(gradients) == 2 * 7 * 8
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    assert tokens.shape == (1, IDS.shape[1] + 4)


def test_the_embedding_on_the_host(checkpoint: Path) -> None:
    usual = opened(checkpoint)
    expected, embedding = logits(usual.store.causal_lm()), usual.store.ledger()["embedding"]
    usual_size = usual.final
    del usual
    _release()
    one = opened(checkpoint, embedding_on_host=True)
    model = one.store.causal_lm()
    same = torch.equal(logits(model), expected)
    tokens = model.generate(input_ids=IDS.cuda(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    kept = one.store.dense["model.embed_tokens.weight"]
    print(
        f"\ndevice {usual_size / MIB:.0f} -> {one.final / MIB:.0f} MiB, embedding {embedding / MIB:.0f} MiB, pinned "
        f"{kept.is_pinned()}, model on {model.device}, logits equal {same}"
    )
    assert kept.is_pinned()
    assert abs(usual_size - one.final - embedding) < MIB
    assert same
    assert model.device.type == "cuda"
    assert tokens.shape == (1, IDS.shape[1] + 4)


def test_a_dense_store(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    one = opened(checkpoint, format="bf16")
    ours = logits(one.store.causal_lm())
    seconds, extra = one.seconds, one.peak - one.final
    del one
    _release()
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map={"": "cuda:0"}, attn_implementation="sdpa"
    ).eval()
    same = torch.equal(ours, logits(theirs))
    print(f"\nbf16: open {seconds:.1f} s, peak +{extra / MIB:.0f} MiB, logits equal {same}")
    assert extra < MIB
    assert same
