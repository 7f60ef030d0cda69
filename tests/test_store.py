"""The weight store on the CPU, against transformers' own 4-bit load and bitsandbytes' own arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("bitsandbytes")

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl import weight_formats
from tandem.rl.errors import UserError
from tandem.rl.families import describe
from tandem.rl.model import LanguageModel, _register_packed_attention
from tandem.rl.preference_step import reference_log_probs
from tandem.rl.reference_cache import cached_log_probs
from tandem.rl.samples import Sequence as Tokens
from tandem.rl.store import Stacked, WeightStore
from tandem.rl.stored_model import HostEmbedding, StoredLinear

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    # 320 blocks of scales in each of gate and up: their outer scales do not end where a block of 256 does.
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-biased": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"tie_word_embeddings": False, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False}),
}
IDS = torch.arange(3, 19)[None]


def make(kind: str, folder: Path, *, seed: int = 0, shard: str = "1GB", **changes: Any) -> Path:
    """A random checkpoint in which every tensor is random, norms and biases too."""
    import transformers

    name, extra = MODELS[kind]
    config = getattr(transformers, name)(**SIZES | extra | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def four_bit(folder: Path, *, dtype: torch.dtype = torch.float32, double: bool = True, **extra: Any) -> Any:
    """transformers' own NF4 load. Its layers may not repack their weights for the CPU, which ours do not either."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if "quantization_config" not in json.loads((folder / "config.json").read_text()):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            **extra,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def opened(folder: Path, tmp_path: Path, *, format: str = "nf4", dtype: torch.dtype = torch.float32, **more: Any):
    return WeightStore.open(folder, format=format, device="cpu", dtype=dtype, cache_dir=tmp_path / "cache", **more)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def quantised_layers(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}


def assert_same_bytes(ours: Any, theirs: Any) -> None:
    expected, found = quantised_layers(theirs), quantised_layers(ours)
    assert expected.keys() == found.keys()
    assert expected
    for name in expected:
        a, b = expected[name].weight, found[name].weight
        p, q = a.quant_state, b.quant_state
        assert torch.equal(a.data, b.data), name
        assert (p.dtype, p.shape, p.blocksize, p.nested) == (q.dtype, q.shape, q.blocksize, q.nested), name
        pairs = [(p.absmax, q.absmax), (p.code, q.code)]
        if p.nested:
            pairs += [(p.state2.absmax, q.state2.absmax), (p.state2.code, q.state2.code), (p.offset, q.offset)]
            assert p.state2.blocksize == q.state2.blocksize, name
        assert all(torch.equal(x, y) for x, y in pairs), name


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_four_bit_load_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / "model")
    theirs = four_bit(folder)
    ours = opened(folder, tmp_path).causal_lm()
    assert_same_bytes(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    buffers = dict(ours.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in theirs.named_buffers())
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.training
    assert ours.config._attn_implementation == theirs.config._attn_implementation


def test_equals_it_in_bfloat16_and_from_shards(tmp_path: Path) -> None:
    folder = make("qwen3", tmp_path / "model", shard="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    theirs = four_bit(folder, dtype=torch.bfloat16)
    ours = opened(folder, tmp_path, dtype=torch.bfloat16).causal_lm()
    assert_same_bytes(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("kind", ["llama", "llama-biased", "phi3"])
def test_dense_store_equals_a_plain_load(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make(kind, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    store = opened(folder, tmp_path, format="bf16")
    assert torch.equal(logits(store.causal_lm()), logits(theirs))
    assert not (tmp_path / "cache").exists()


def test_stacks_have_vllms_names_and_hugging_faces_parts(tmp_path: Path) -> None:
    store = opened(make("qwen2", tmp_path / "model"), tmp_path)
    layer = "model.layers.1."
    assert [name for name in store.linears if name.startswith(layer)] == [
        f"{layer}{leaf}" for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    qkv = store.linears[f"{layer}self_attn.qkv_proj"]
    assert qkv.parts == {
        f"{layer}self_attn.q_proj": slice(0, 64),
        f"{layer}self_attn.k_proj": slice(64, 96),
        f"{layer}self_attn.v_proj": slice(96, 128),
    }
    assert (qkv.out_features, qkv.in_features) == (128, 64)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in qkv.tensors.items()}
    assert shapes == {
        "packed": ((128 * 32, 1), torch.uint8),
        "absmax": ((128,), torch.uint8),
        "absmax2": ((3,), torch.float32),
        "code2": ((256,), torch.float32),
        "offsets": ((3,), torch.float32),
    }
    assert qkv.bias is not None
    assert qkv.bias.shape == (128,)
    assert store.linears[f"{layer}mlp.gate_up_proj"].tensors["absmax2"].shape == (4,)
    assert "lm_head.weight" not in store.dense
    phi = opened(make("phi3", tmp_path / "phi"), tmp_path)
    assert phi.linears["model.layers.0.self_attn.qkv_proj"].parts == {
        "model.layers.0.self_attn.qkv_proj": slice(0, 128)
    }


def test_weights_are_rounded_to_the_compute_type_first(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model")
    _rewrite(folder, lambda tensors: tensors.update({n: t.float() * 1.001 for n, t in tensors.items()}))
    ours = opened(folder, tmp_path, dtype=torch.bfloat16).causal_lm()
    theirs = four_bit(folder, dtype=torch.bfloat16)
    assert_same_bytes(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("format", ["nf4", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_parameters_are_views_of_the_store(kind: str, format: str, tmp_path: Path) -> None:
    store = opened(make(kind, tmp_path / "model"), tmp_path, format=format)
    model = store.causal_lm()
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in store._tensors().values()}
    assert sum(owned.values()) == sum(store.ledger().values())
    used = set()
    for name, parameter in model.named_parameters():
        used.add(parameter.untyped_storage().data_ptr())
        assert used <= owned.keys(), name
    for layer in quantised_layers(model).values():
        state = layer.weight.quant_state
        for tensor in (state.absmax, state.state2.absmax, state.state2.code, state.offset):
            used.add(tensor.untyped_storage().data_ptr())
    assert used == owned.keys()
    for stacked in store.linears.values():
        main = stacked.tensors[stacked.format.main]
        for part, rows in stacked.parts.items():
            ahead = rows.start * stacked.in_features * main.element_size() // (2 if format == "nf4" else 1)
            assert model.get_submodule(part).weight.data_ptr() == main.data_ptr() + ahead
    logits(model)
    after = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert after <= owned.keys(), "a forward pass replaced a parameter"


def test_writing_into_the_store_changes_the_model(tmp_path: Path) -> None:
    store = opened(make("llama", tmp_path / "model"), tmp_path)
    model = store.causal_lm()
    before = logits(model)
    other = opened(make("llama", tmp_path / "other", seed=1), tmp_path)
    for name, tensor in store._tensors().items():
        tensor.copy_(other._tensors()[name])
    assert not torch.equal(before, logits(model))
    assert torch.equal(logits(model), logits(other.causal_lm()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_written_as_bitsandbytes_dequantises_them(dtype: torch.dtype, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    folder = make("llama", tmp_path / "model")
    theirs = quantised_layers(four_bit(folder, dtype=dtype))
    store = opened(folder, tmp_path, dtype=dtype)
    for stacked in store.linears.values():
        expected = torch.cat(
            [dequantize_4bit(theirs[p].weight.data, theirs[p].weight.quant_state) for p in stacked.parts]
        )
        rows = stacked.out_features
        wide = torch.full((rows, stacked.in_features + 24), torch.nan, dtype=dtype)
        stacked.write_weight(slice(0, rows), wide[:, : stacked.in_features])
        assert torch.equal(wide[:, : stacked.in_features], expected)
        assert wide[:, stacked.in_features :].isnan().all()
        # Rows that begin in one part and end in another, or inside one.
        for some in (slice(3, rows - 5), slice(rows // 3, rows // 3 + 1), *stacked.parts.values()):
            out = torch.full((some.stop - some.start, stacked.in_features), torch.nan, dtype=dtype)
            stacked.write_weight(some, out)
            assert torch.equal(out, expected[some])
        double = torch.empty(rows, stacked.in_features, dtype=torch.float64)
        stacked.write_weight(slice(0, rows), double)
        assert torch.allclose(double.to(dtype), expected, rtol=0.01)
    with pytest.raises(ValueError, match="rows"):
        stacked.write_weight(slice(0, rows + 1), torch.empty(rows + 1, stacked.in_features))
    with pytest.raises(ValueError, match="out is"):
        stacked.write_weight(slice(0, rows), torch.empty(rows - 1, stacked.in_features))


def test_rows_that_cut_a_block_are_refused() -> None:
    weight = torch.randn(8, 24)
    tensors = weight_formats.NF4.quantise([weight], device=torch.device("cpu"), dtype=torch.float32)
    stacked = Stacked("w", {"w": slice(0, 8)}, 24, None, tensors, weight_formats.NF4)
    whole = torch.empty(8, 24)
    stacked.write_weight(slice(0, 8), whole)
    assert torch.nn.functional.cosine_similarity(whole.view(-1), weight.view(-1), dim=0) > 0.99
    with pytest.raises(ValueError, match="cut a block"):
        stacked.write_weight(slice(0, 4), torch.empty(4, 24))


def test_quantising_in_chunks_gives_the_bytes_of_quantising_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.functional import quantize_4bit

    monkeypatch.setattr(weight_formats, "_CHUNK", 1024)
    parts = [torch.randn(rows, 192).bfloat16() for rows in (100, 7, 33)]
    tensors = weight_formats.NF4.quantise(parts, device=torch.device("cpu"), dtype=torch.bfloat16)
    wanted = [quantize_4bit(part, blocksize=64, compress_statistics=True, quant_type="nf4") for part in parts]
    assert torch.equal(tensors["packed"], torch.cat([packed for packed, _ in wanted]))
    assert torch.equal(tensors["absmax"], torch.cat([state.absmax for _, state in wanted]))
    assert torch.equal(tensors["absmax2"], torch.cat([state.state2.absmax for _, state in wanted]))
    assert torch.equal(tensors["offsets"], torch.stack([state.offset for _, state in wanted]))
    assert torch.equal(tensors["code2"], wanted[0][1].state2.code)


@pytest.fixture
def never_quantise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("quantised")

    return lambda: monkeypatch.setattr(weight_formats.Nf4Format, "quantise", refuse)


@pytest.mark.parametrize("double", [True, False])
def test_a_quantised_checkpoint_is_taken_over(double: bool, never_quantise, tmp_path: Path) -> None:
    plain = make("qwen2", tmp_path / "plain")
    theirs = four_bit(plain, double=double)
    theirs.save_pretrained(tmp_path / "packed")
    again = four_bit(tmp_path / "packed")
    never_quantise()
    store = opened(tmp_path / "packed", tmp_path)
    ours = store.causal_lm()
    assert_same_bytes(ours, again)
    assert_same_bytes(ours, theirs)
    assert torch.equal(logits(ours), logits(again))
    assert not (tmp_path / "cache").exists()
    kinds = {tuple(stacked.tensors) for stacked in store.linears.values()}
    assert kinds == {("packed", "absmax", "absmax2", "code2", "offsets") if double else ("packed", "absmax")}
    for stacked in store.linears.values():
        out = torch.empty(stacked.out_features, stacked.in_features)
        stacked.write_weight(slice(0, stacked.out_features), out)
        sub = torch.empty(5, stacked.in_features)
        stacked.write_weight(slice(2, 7), sub)
        assert torch.equal(sub, out[2:7])


def test_layers_that_a_quantised_checkpoint_left_dense_stay_so(tmp_path: Path) -> None:
    plain = make("llama", tmp_path / "plain")
    four_bit(plain, llm_int8_skip_modules=["lm_head", "down_proj"]).save_pretrained(tmp_path / "packed")
    store = opened(tmp_path / "packed", tmp_path)
    assert {s.format.name for n, s in store.linears.items() if n.endswith("down_proj")} == {"bf16"}
    assert {s.format.name for n, s in store.linears.items() if not n.endswith("down_proj")} == {"nf4"}
    assert torch.equal(logits(store.causal_lm()), logits(four_bit(tmp_path / "packed")))
    four_bit(plain, llm_int8_skip_modules=["lm_head", "k_proj"]).save_pretrained(tmp_path / "mixed")
    with pytest.raises(UserError, match=r"q_proj is quantised, and model.layers.0.self_attn.k_proj is not"):
        opened(tmp_path / "mixed", tmp_path)


def test_quantised_checkpoints_of_other_kinds_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = make("llama", tmp_path / "plain")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=options).save_pretrained(tmp_path / "fp4")
    with pytest.raises(UserError, match="fp4"):
        opened(tmp_path / "fp4", tmp_path)
    four_bit(plain).save_pretrained(tmp_path / "nf4")
    with pytest.raises(UserError, match="bf16 weights are wanted"):
        opened(tmp_path / "nf4", tmp_path, format="bf16")
    facts = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(facts | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UserError, match="gptq"):
        opened(plain, tmp_path)


def test_the_second_open_reads_the_cache(never_quantise, tmp_path: Path) -> None:
    folder = make("qwen2", tmp_path / "model")
    first = opened(folder, tmp_path)
    never_quantise()
    second = opened(folder, tmp_path)
    assert second.notes == []
    assert first.ledger() == second.ledger()
    for name, tensor in first._tensors().items():
        other = second._tensors()[name]
        assert torch.equal(tensor, other)
        assert tensor.dtype == other.dtype
        assert tensor.shape == other.shape
    assert first._tensors().keys() == second._tensors().keys()
    assert list(first.linears) == list(second.linears)
    assert list(first.dense) == list(second.dense)
    assert torch.equal(logits(first.causal_lm()), logits(second.causal_lm()))


def _truncate(file: Path, folder: Path) -> None:
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 8)


def _exchange_layers(file: Path, folder: Path) -> None:
    """A header that reads well and gives each layer the other's weights."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].replace(b"layers.0.", b"layers.#.").replace(b"layers.1.", b"layers.0.")
    file.write_bytes(content[:8] + header.replace(b"layers.#.", b"layers.1.") + content[end:])


def _spoil_facts(file: Path, folder: Path) -> None:
    file.with_suffix(".json").write_text('{"version": ')


def _lose(file: Path, folder: Path) -> None:
    file.unlink()


def _change_source(file: Path, folder: Path) -> None:
    make("llama", folder, seed=1)


def _other_version(file: Path, folder: Path) -> None:
    facts = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps(facts | {"version": 0}))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_truncate, "bytes, not"),
        (_exchange_layers, "header is not the one"),
        (_spoil_facts, "cannot be read"),
        (_lose, "cannot be read"),
        (_change_source, "another source"),
        (_other_version, "another version"),
    ],
)
def test_a_bad_cache_is_noticed_and_made_anew(damage: Callable, why: str, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model")
    opened(folder, tmp_path)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    damage(file, folder)
    store = opened(folder, tmp_path)
    assert len(store.notes) == 1
    assert why in store.notes[0]
    assert "made anew" in store.notes[0]
    assert torch.equal(logits(store.causal_lm()), logits(four_bit(folder)))
    assert opened(folder, tmp_path).notes == []
    assert len(list((tmp_path / "cache").iterdir())) == 2, "scratch files are left"


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model")
    (tmp_path / "cache").write_text("a file where the folder should be")
    store = opened(folder, tmp_path)
    assert len(store.notes) == 1
    assert "could not be kept" in store.notes[0]
    assert torch.equal(logits(store.causal_lm()), logits(four_bit(folder)))


def test_an_interrupted_write_leaves_nothing_that_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tandem.rl import store_cache

    folder = make("llama", tmp_path / "model")

    def interrupted(file: Any, tensors: Any) -> None:
        file.write(b"12345678")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_cache, "_write_safetensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(folder, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    assert opened(folder, tmp_path).notes == []


def test_cache_keeps_types_and_formats_apart(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):
            store = opened(folder, tmp_path, dtype=dtype)
            assert store.notes == []
            assert store.dense["model.norm.weight"].dtype == dtype


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            r"no tensor 'model.layers.1.self_attn.k_proj.weight'",
        ),
        (lambda t: t.pop("lm_head.weight"), "no tensor 'lm_head.weight'"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), r"model.norm.weight has the shape \(32,\)"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 320)}),
            r"up_proj.weight has the shape \(64, 320\)",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(320, 64, dtype=torch.int8)}),
            "holds torch.int8",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: Callable, message: str, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model")
    _rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        opened(folder, tmp_path)


def test_damaged_and_absent_files_are_refused(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model", shard="60KB")
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(UserError, match=victim.name):
        opened(folder, tmp_path)
    victim.unlink()
    with pytest.raises(UserError, match=victim.name):
        opened(folder, tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        opened(folder, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        opened(tmp_path / "nowhere", tmp_path)


def test_models_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path / "neox")
    with pytest.raises(UserError, match="model family 'gpt_neox'"):
        opened(tmp_path / "neox", tmp_path)
    odd = make("llama", tmp_path / "odd", hidden_size=36, head_dim=18, intermediate_size=50)
    with pytest.raises(UserError, match=r"self_attn.q_proj has 72·36 = 2592 weights"):
        opened(odd, tmp_path)
    opened(odd, tmp_path, format="bf16")
    with pytest.raises(UserError, match="weight format 'int3'"):
        opened(odd, tmp_path, format="int3")


def test_the_embedding_can_stay_on_the_host(never_quantise, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model")
    usual = opened(folder, tmp_path)
    never_quantise()
    store = opened(folder, tmp_path, embedding_on_host=True)
    model = store.causal_lm()
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    assert not list(embedding.parameters())
    assert embedding.weight is store.dense["model.embed_tokens.weight"]
    assert torch.equal(logits(model), logits(usual.causal_lm()))
    ledger, before = store.ledger(), usual.ledger()
    assert ledger.pop("embedding_on_host") == before.pop("embedding") == 96 * 64 * 4
    assert ledger == before
    a, b = gradients(adapted(store.causal_lm())), gradients(adapted(usual.causal_lm()))
    assert len(a) == 28
    assert all(torch.equal(a[name], b[name]) for name in b)
    with pytest.raises(UserError, match="head as well"):
        opened(make("qwen2", tmp_path / "tied"), tmp_path, embedding_on_host=True)


def test_ledger_adds_up(tmp_path: Path) -> None:
    store = opened(make("qwen2", tmp_path / "model"), tmp_path, dtype=torch.bfloat16)
    weights = 2 * (128 * 64 + 64 * 64 + 3 * 320 * 64)
    # Inner scales a byte each; outer ones, an offset for each of seven projections, four tables of 256.
    outer = 3 + 1 + 4 + 2
    assert store.ledger() == {
        "linears": weights // 2,
        "scales": weights // 64 + 2 * 4 * (outer + 7 + 4 * 256),
        "biases": 2 * 128 * 2,
        "norms": (2 * 2 + 1) * 64 * 2,
        "embedding": 96 * 64 * 2,
    }


def adapted(model: Any) -> Any:
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.05)
    return wrapped.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_peft_adapts_the_layers_as_it_does_those_of_transformers(tmp_path: Path) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    folder = make("qwen2", tmp_path / "model")
    store = opened(folder, tmp_path)
    before = {name: tensor.clone() for name, tensor in store._tensors().items()}
    ours, theirs = adapted(store.causal_lm()), adapted(four_bit(folder))
    layers = [m for m in ours.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 14
    assert all(isinstance(m, Linear4bit) for m in layers)
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys()
    assert all("lora" in name for name in a)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert all(torch.equal(tensor, before[name]) for name, tensor in store._tensors().items())


def test_fused_layers_read_the_stores_weights(tmp_path: Path) -> None:
    store = opened(make("qwen2", tmp_path / "model"), tmp_path)
    spec = describe(store.causal_lm())
    assert spec is not None
    for i, layer in enumerate(spec.layers()):
        stack = store.linears[f"model.layers.{i}.self_attn.qkv_proj"]
        expected, found = torch.empty(128, 64), torch.empty(128, 64)
        stack.write_weight(slice(0, 128), expected)
        for one, start in zip(layer.qkv.projections, layer.qkv.starts, strict=True):
            one.write_weight(found[start : start + one.size[0]])
        assert torch.equal(found, expected)
        assert stack.bias is not None
        assert torch.equal(layer.qkv.bias(torch.float32), stack.bias)


class Fixed8Format:
    """A format that no library knows: one byte a weight, one scale for all of a stack."""

    name, main, lossy = "fixed8", "bytes", True

    def check(self, part: str, shape: tuple[int, int]) -> None: ...

    def quantise(self, weights: Sequence[torch.Tensor], *, device: torch.device, dtype: torch.dtype) -> dict:
        stack = torch.cat(list(weights)).float()
        scale = stack.abs().max() / 127
        return {"bytes": (stack / scale).round().to(torch.int8).view(torch.uint8), "scale": scale.view(1)}

    def write_weight(self, tensors: Any, parts: Sequence[slice], rows: slice, out: torch.Tensor) -> None:
        out.copy_(tensors["bytes"].view(torch.int8)[rows].float() * tensors["scale"])


@pytest.mark.parametrize("format", ["fixed8", "fp8"])
def test_other_formats_go_through_a_layer_that_makes_its_matrix(monkeypatch, tmp_path: Path, format: str) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(weight_formats.FORMATS, "fixed8", Fixed8Format())
    monkeypatch.setattr(weight_formats, "_CHUNK", 1024)
    folder = make("qwen2", tmp_path / "model")
    opened(folder, tmp_path, format=format)
    store = opened(folder, tmp_path, format=format)  # from the cache
    assert store.notes == []
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for stacked in store.linears.values():
        for part, rows in stacked.parts.items():
            stacked.write_weight(rows, theirs.get_submodule(part).weight.data)
    ours = store.causal_lm()
    layer = ours.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, StoredLinear)
    out = torch.empty(320, 64)
    layer.write_weight(out)
    assert torch.equal(out, theirs.get_submodule("model.layers.0.mlp.up_proj").weight)
    assert torch.equal(logits(ours), logits(theirs))
    ours, theirs = adapted(ours), adapted(theirs)
    assert len([m for m in ours.modules() if hasattr(m, "lora_A")]) == 14
    assert torch.equal(logits(ours), logits(theirs))
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys()
    assert len(a) == 28
    assert all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-7) for name in b)


def test_a_stored_layer_keeps_no_matrix_for_the_backward_pass(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(weight_formats.FORMATS, "fixed8", Fixed8Format())
    model = opened(make("llama", tmp_path / "model"), tmp_path, format="fixed8").causal_lm()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True)).sum()
    assert all(tensor.numel() < 320 * 64 for tensor in kept)


@pytest.mark.parametrize("format", ["fp8", "nf4"])
def test_reference_log_probs_of_another_checkpoint_are_not_taken(monkeypatch, tmp_path: Path, format: str) -> None:
    """A merged adapter changes linear layers and nothing else."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    folder = make("llama", tmp_path / "model")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += 0.1 * torch.randn(64, 320, generator=torch.manual_seed(1))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    _register_packed_attention()
    sequences, found = [Tokens([1, 2], [3, 4, 5], [True] * 3)], {}
    for path in (folder, other):
        model = adapted(opened(path, tmp_path, format=format, embedding_on_host=True).causal_lm())
        lm = LanguageModel(model, None, torch.device("cpu"), torch.float32, HeadOptions(), 64)
        own = reference_log_probs(lm, sequences, lm.head, 64)
        for _ in range(2):
            found[path] = cached_log_probs(lm, sequences, lambda own=own: own)
            assert torch.equal(found[path][0], own[0])
    assert not torch.equal(found[folder][0], found[other][0])
    assert len(list((tmp_path / "cache").rglob("reference/*.safetensors"))) == 2
