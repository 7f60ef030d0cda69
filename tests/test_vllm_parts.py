"""What the vLLM engine is made of, piece by piece and without vLLM."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tandem.kernels.fp8 import dequantize_fp8, quantize_fp8
from tandem.kernels.nf4 import write_nf4_stack
from tandem.rl.errors import UserError
from tandem.rollout import sleep_pools
from tandem.rollout.policy_adapter import InPlacePush, LoraPart, PolicyNames, Stacks, buffer_rank
from tandem.rollout.process_state import knobs, on_stream, preserved
from tandem.rollout.stored_linear import release_scratch, reserve_scratch
from tandem.rollout.vllm_plan import (
    GIB,
    HEADROOM,
    VllmOptions,
    config_folder,
    kv_bytes_per_token,
    kv_cache_bytes,
    sizes_for_prompts,
)
from tandem.rollout.vllm_versions import ACCEPTED, LORA_RANKS, Relied, missing, refusal
from tandem.rollout.weight_binding import WeightBinding

# Versions --------------------------------------------------------------------------------------------------------


class Worker:
    def pool(self, tag: str) -> None: ...
    def passes_on(self, *args, **kwargs) -> None: ...


FAKE = SimpleNamespace(Worker=Worker, Params=SimpleNamespace(__struct_fields__=("n", "seed")))


def fake_module(name: str) -> SimpleNamespace:
    if name != "engine.worker":
        raise ImportError(f"No module named {name!r}")
    return FAKE


def test_a_missing_name_and_a_lost_parameter_are_named():
    good = [
        Relied("engine.worker", "Worker.pool", ("tag",)),
        Relied("engine.worker", "Worker.passes_on", ("anything",)),
        Relied("engine.worker", "Params", ("n", "seed")),
    ]
    bad = [
        Relied("engine.worker", "Worker.gone", ()),
        Relied("engine.worker", "Worker.pool", ("tag", "level")),
        Relied("engine.elsewhere", "Worker"),
        Relied("engine.worker", "Params", ("n", "flat")),
    ]
    assert missing(good, module=fake_module) == []
    assert missing(good + bad, module=fake_module) == [
        "engine.worker.Worker.gone does not exist",
        "engine.worker.Worker.pool has no level",
        "engine.elsewhere cannot be imported (No module named 'engine.elsewhere')",
        "engine.worker.Params has no flat",
    ]


def test_versions_are_accepted_by_the_table_alone():
    table = {"1.2": (Relied("engine.worker", "Worker.pool", ("tag",)),)}

    def ask(version: str, relied=table) -> str | None:
        return refusal(relied, version_of=lambda _: version, module=fake_module)

    assert ask("1.2") is None
    assert ask("1.2+cu130") is None, "a local build part does not matter"
    assert "1.3 is installed" in (ask("1.3") or "")
    assert "has no level" in (ask("1.2", {"1.2": (Relied("engine.worker", "Worker.pool", ("level",)),)}) or "")

    def absent(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    assert refusal(table, version_of=absent) == "vLLM is not installed"


def test_an_unknown_version_is_refused_without_importing_it():
    def touched(name: str) -> SimpleNamespace:
        raise AssertionError(f"{name} was imported")

    assert refusal({"1.2": ACCEPTED["0.24.0"]}, version_of=lambda _: "9", module=touched)


def test_the_installed_vllm_is_accepted():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    assert refusal() is None


# Side effects ----------------------------------------------------------------------------------------------------


def attention() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {name: getattr(cuda, f"{name}_sdp_enabled")() for name in ("cudnn", "flash", "mem_efficient", "math")}


def everything() -> tuple:
    return (
        random.getstate(),
        tuple(np.random.get_state()[1]),
        tuple(torch.get_rng_state().tolist()),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        attention(),
        None if knobs is None else (knobs.runtime.jit_post_compile_hook, knobs.autotuning.print),
        dict(os.environ),
        logging.getLogger("an_engine").level,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was_found(fails, monkeypatch):
    monkeypatch.setenv("ENGINE_SET_BY_USER", "mine")
    monkeypatch.setenv("ENGINE_REMOVED", "back")
    before = everything()

    def meddle() -> None:
        with preserved({"ENGINE_SET_BY_USER": "engine", "ENGINE_SWITCH": "1"}, quiet=("an_engine",)):
            assert os.environ["ENGINE_SWITCH"] == "1"
            assert os.environ["ENGINE_SET_BY_USER"] == "mine"
            assert not logging.getLogger("an_engine").isEnabledFor(logging.WARNING)
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            torch.set_float32_matmul_precision("medium")
            torch.set_default_dtype(torch.bfloat16)
            torch.set_default_device("meta")
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_math_sdp(False)
            if knobs is not None:
                knobs.runtime.jit_post_compile_hook = print
                knobs.autotuning.print = True
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
            del os.environ["ENGINE_REMOVED"]
            if fails:
                raise ValueError("inside")

    if fails:
        with pytest.raises(ValueError, match="inside"):
            meddle()
    else:
        meddle()
    assert everything() == before


@pytest.mark.parametrize("fault", [None, ImportError("no such module")])
@pytest.mark.parametrize("own", [True, False])
def test_cudnns_attention_stays_as_it_was_when_vllm_is_imported(own: bool, fault: Exception | None) -> None:
    """vLLM 0.24 switches it off for the whole process as `vllm.platforms.cuda` is imported."""

    def module(name: str) -> SimpleNamespace:
        torch.backends.cuda.enable_cudnn_sdp(False)
        if fault:
            raise fault
        return SimpleNamespace()

    before = attention()
    try:
        torch.backends.cuda.enable_cudnn_sdp(own)
        said = refusal({"1.2": (Relied("vllm", "LLM"),)}, version_of=lambda _: "1.2", module=module)
        assert said is not None
        assert attention() == {**before, "cudnn": own}
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before["cudnn"])


def test_without_a_stream_nothing_happens():
    with on_stream(None):
        pass


# Adapter ---------------------------------------------------------------------------------------------------------

LAYERS = {"attn.qkv_proj": ["attn.q_proj", "attn.k_proj", "attn.v_proj"], "attn.o_proj": ["attn.o_proj"]}
ROWS = {"attn.q_proj": 8, "attn.k_proj": 4, "attn.v_proj": 4, "attn.o_proj": 6}
WIDTH = 6


def stacks(rank: int = 8, dtype=torch.bfloat16, *, fill: float = 7.0) -> dict[str, Stacks]:
    """As vLLM has them, with rubbish inside."""
    return {
        layer: Stacks(
            tuple(torch.full((1, 1, rank, WIDTH), fill, dtype=dtype) for _ in names),
            tuple(torch.full((1, 1, ROWS[name], rank), fill, dtype=dtype) for name in names),
        )
        for layer, names in LAYERS.items()
    }


def part(name: str, rank: int, scale: float, seed: int = 0) -> LoraPart:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.nn.Parameter(torch.randn(shape, generator=generator))  # noqa: E731
    return LoraPart(draw(rank, WIDTH), draw(ROWS[name], rank), scale)


def test_a_push_fills_its_place_and_leaves_zeros_everywhere_else():
    parts = {"attn.k_proj": part("attn.k_proj", 3, 1.7), "attn.o_proj": part("attn.o_proj", 8, 2.0, seed=1)}
    buffers = stacks()
    addresses = [b.data_ptr() for s in buffers.values() for b in (*s.a, *s.b)]
    push = InPlacePush(parts, LAYERS, buffers)
    for step in range(2):
        with torch.no_grad():
            for one in parts.values():
                one.a.add_(step)
                one.b.mul_(1 + step)
        push()
        qkv, o = buffers["attn.qkv_proj"], buffers["attn.o_proj"]
        for i in (0, 2):
            assert not qkv.a[i].any()
            assert not qkv.b[i].any()
        k = parts["attn.k_proj"]
        assert torch.equal(qkv.a[1][0, 0, :3], k.a.bfloat16())
        assert torch.equal(qkv.b[1][0, 0, :, :3], (k.b * 1.7).bfloat16()), "rounded once, after the scale"
        assert not qkv.a[1][0, 0, 3:].any()
        assert not qkv.b[1][0, 0, :, 3:].any()
        assert torch.equal(o.b[0][0, 0], (parts["attn.o_proj"].b * 2).bfloat16())
    assert addresses == [b.data_ptr() for s in buffers.values() for b in (*s.a, *s.b)]


def test_layers_without_an_adapter_need_no_buffers():
    buffers = stacks()
    del buffers["attn.o_proj"]
    InPlacePush({"attn.q_proj": part("attn.q_proj", 2, 1.0)}, LAYERS, buffers)()
    with pytest.raises(RuntimeError, match=r"no buffers for attn\.o_proj"):
        InPlacePush({"attn.o_proj": part("attn.o_proj", 2, 1.0)}, LAYERS, buffers)


def test_what_does_not_fit_is_refused():
    buffers = stacks(rank=2)
    with pytest.raises(RuntimeError, match=r"attn\.q_proj is a \[3, 6\]"):
        InPlacePush({"attn.q_proj": part("attn.q_proj", 3, 1.0)}, LAYERS, buffers)
    with pytest.raises(RuntimeError, match="no place for the adapters of mlp"):
        InPlacePush({"mlp.up_proj": part("attn.q_proj", 2, 1.0)}, LAYERS, buffers)
    fewer = {**buffers, "attn.qkv_proj": Stacks(buffers["attn.qkv_proj"].a[:1], buffers["attn.qkv_proj"].b[:1])}
    with pytest.raises(RuntimeError, match="buffers for 1 parts"):
        InPlacePush({"attn.q_proj": part("attn.q_proj", 2, 1.0)}, LAYERS, fewer)


def test_ranks_are_rounded_up_to_what_vllm_has():
    assert [buffer_rank(r, LORA_RANKS) for r in (1, 2, 8, 9, 33, 512)] == [1, 8, 8, 16, 64, 512]
    with pytest.raises(UserError, match=r"lora\.r=513"):
        buffer_rank(513, LORA_RANKS)


def test_a_name_is_given_once():
    names = PolicyNames()
    assert [names.new(v) for v in (0, 1, 1, 1, 2)] == ["policy@0", "policy@1", "policy@1#2", "policy@1#3", "policy@2"]


# Sizes -----------------------------------------------------------------------------------------------------------


def config(**changes) -> SimpleNamespace:
    facts = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128} | changes
    made = SimpleNamespace(**facts)
    made.get_text_config = lambda: made
    return made


def test_the_kv_cache_is_what_the_batch_needs_or_what_is_free():
    each = kv_bytes_per_token(config(), "auto")
    assert each == 147456, "Qwen3-8B: 2 · 36 layers · 8 heads · 128 · 2 bytes"
    assert kv_bytes_per_token(config(), "fp8") * 2 == each
    small = VllmOptions(max_num_seqs=4)
    assert kv_cache_bytes(config(), small, 1024, 80 * GIB) == each * (4 * (1024 + 16) + 16)
    assert kv_cache_bytes(config(), VllmOptions(), 8192, 20 * GIB) == 20 * GIB - HEADROOM
    assert kv_cache_bytes(config(), VllmOptions(kv_cache_gib=2.5), 1024, 80 * GIB) == 2.5 * GIB
    with pytest.raises(UserError, match=r"one sequence of 32768 tokens needs a KV cache of 4\.50 GiB"):
        kv_cache_bytes(config(), VllmOptions(kv_cache_gib=4), 32768, 80 * GIB)
    with pytest.raises(UserError, match=r"after the weights there are 1\.00"):
        kv_cache_bytes(config(), VllmOptions(), 32768, 4 * GIB)


def test_graphs_are_captured_up_to_the_largest_batch():
    assert VllmOptions(max_num_seqs=40).capture_sizes == (1, 2, 4, 8, 16, 24, 32, 40)
    assert VllmOptions(max_num_seqs=64).capture_sizes[-1] == 64
    assert VllmOptions(cudagraph_sizes=(1, 8)).capture_sizes == (1, 8)
    assert sizes_for_prompts(8, 100) == [1, 2, 4, 8, 96, 128]
    assert sizes_for_prompts(100, 129) == [*VllmOptions(max_num_seqs=100).capture_sizes, 128, 192]
    assert sizes_for_prompts(8, 2048)[-1] == 2048
    assert sizes_for_prompts(8, 2049) is None, "too many tokens"
    assert sizes_for_prompts(8, 8) is None, "captured as it is"


def test_one_config_has_one_folder(tmp_path, monkeypatch):
    from transformers import AutoConfig, LlamaConfig

    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    made = LlamaConfig(hidden_size=32, num_attention_heads=4, vocab_size=100)
    made.quantization_config = {"quant_method": "bitsandbytes"}
    folder = config_folder(made, "LlamaForCausalLM")
    assert folder == config_folder(made, "LlamaForCausalLM")
    assert made.quantization_config, "the caller's config is left alone"
    made.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    other = config_folder(made, "LlamaForCausalLM")
    assert other != folder
    read = AutoConfig.from_pretrained(other)
    assert read.architectures == ["LlamaForCausalLM"]
    assert read.rope_parameters["rope_type"] == "yarn"
    assert not hasattr(read, "quantization_config")
    assert [p.name for p in Path(other).iterdir()] == ["config.json"]


# Weights ---------------------------------------------------------------------------------------------------------


def nf4(rows: list[int], width: int, *, nested: bool = True) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A stacked weight's tensors, and what bitsandbytes itself makes of every part."""
    functional = pytest.importorskip("bitsandbytes.functional")
    parts, whole = [], []
    for seed, count in enumerate(rows):
        weight = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        packed, state = functional.quantize_4bit(
            weight.bfloat16(), blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        whole.append(functional.dequantize_4bit(packed, state))
        parts.append((packed, state))
    tensors = {
        "packed": torch.cat([packed.view(-1, 1) for packed, _ in parts]),
        "absmax": torch.cat([state.absmax.view(-1) for _, state in parts]),
    }
    if nested:
        tensors["absmax2"] = torch.cat([state.state2.absmax.view(-1) for _, state in parts])
        tensors["code2"] = parts[0][1].state2.code
        tensors["offsets"] = torch.stack([state.offset.view(()) for _, state in parts])
    return tensors, torch.cat(whole)


@pytest.mark.parametrize("nested", [True, False])
def test_the_operator_multiplies_by_what_bitsandbytes_stored(nested):
    # 40 · 2 and 24 · 2 scales: no part fills an outer block, so that a slip between parts shows.
    rows, width = [40, 24, 24], 128
    tensors, weight = nf4(rows, width, nested=nested)
    out = torch.empty_like(weight)
    arguments = [tensors.get(name) for name in ("packed", "absmax", "absmax2", "code2", "offsets")]
    write_nf4_stack(out, arguments[0], tuple(arguments[1:]), rows)
    assert torch.equal(out, weight)
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(9)).bfloat16()
    bias = torch.randn(sum(rows)).bfloat16()
    for b in (None, bias):
        got = torch.ops.tandem.stored_linear(x, *arguments, rows, b)
        assert torch.equal(got, F.linear(x.view(-1, width), weight, b).view(2, 3, -1))
    torch.library.opcheck(
        torch.ops.tandem.stored_linear.default,
        (x, *arguments, rows, bias),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_operator_can_multiply_as_bitsandbytes_does():
    rows, width = [40, 24, 24], 128
    tensors, weight = nf4(rows, width)
    arguments = [tensors.get(name) for name in ("packed", "absmax", "absmax2", "code2", "offsets")]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(9)).bfloat16()
    bias = torch.randn(sum(rows)).bfloat16()
    expected = torch.cat([F.linear(x, part) for part in weight.split(rows)], dim=-1)
    assert torch.equal(torch.ops.tandem.stored_linear(x, *arguments, rows, None, True), expected)
    assert torch.equal(torch.ops.tandem.stored_linear(x, *arguments, rows, bias, True), expected + bias)


def test_the_operator_for_fp8_multiplies_by_what_is_stored():
    packed, scales = quantize_fp8(torch.randn(88, 120, generator=torch.Generator().manual_seed(1)).bfloat16())
    weight = dequantize_fp8(packed, scales)
    x = torch.randn(2, 3, 120, generator=torch.Generator().manual_seed(9)).bfloat16()
    bias = torch.randn(88).bfloat16()
    for b in (None, bias):
        got = torch.ops.tandem.stored_fp8_linear(x, packed, scales, b)
        assert torch.equal(got, F.linear(x.view(-1, 120), weight, b).view(2, 3, -1))
    torch.library.opcheck(
        torch.ops.tandem.stored_fp8_linear.default,
        (x, packed, scales, bias),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_scratch_is_kept_while_it_is_large_enough():
    release_scratch()
    assert reserve_scratch(1000, torch.device("cpu"), torch.bfloat16) == 2000
    assert reserve_scratch(10, torch.device("cpu"), torch.bfloat16) == 2000
    assert reserve_scratch(2000, torch.device("cpu"), torch.bfloat16) == 4000
    release_scratch()


class Shell(torch.nn.Module):
    """What an engine's model looks like before the loader: linear and embedding registered, the rest its own."""

    def __init__(self, store) -> None:
        super().__init__()
        binding = WeightBinding(store)
        self.embed_tokens, self.norm, self.qkv = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
        self.embed_tokens.weight = torch.nn.Parameter(binding.embedding("embed_tokens"), requires_grad=False)
        self.norm.weight = torch.nn.Parameter(torch.zeros(4))
        tensors = binding.linear("qkv").tensors
        self.qkv.weight = torch.nn.Parameter(tensors["packed"], requires_grad=False)
        self.qkv.register_buffer("absmax", tensors["absmax"])
        self.qkv.bias = torch.nn.Parameter(torch.zeros(8))


def small_store(**dense) -> SimpleNamespace:
    stacked = SimpleNamespace(
        tensors={"packed": torch.zeros(16, 1, dtype=torch.uint8), "absmax": torch.ones(1)},
        bias=torch.ones(8),
        out_features=8,
        in_features=4,
        format=SimpleNamespace(name="nf4"),
    )
    tensors = {"embed_tokens.weight": torch.ones(6, 4), "norm.weight": torch.ones(4)} | dense
    return SimpleNamespace(linears={"qkv": stacked}, dense=tensors, config=SimpleNamespace(tie_word_embeddings=True))


def test_binding_makes_every_parameter_the_stores():
    store = small_store()
    model = Shell(store)
    binding = WeightBinding(store)
    assert binding.strangers(model) == ["norm.weight", "qkv.bias"]
    binding.bind(model)
    assert binding.strangers(model) == []
    assert model.norm.weight.data_ptr() == store.dense["norm.weight"].data_ptr()
    assert model.qkv.bias.data_ptr() == store.linears["qkv"].bias.data_ptr()
    assert binding.embedding("lm_head").data_ptr() == store.dense["embed_tokens.weight"].data_ptr(), "tied"
    assert binding.largest_linear("nf4") == 32
    assert binding.largest_linear("int4") == 0
    assert binding.embedding("").data_ptr() == store.dense["embed_tokens.weight"].data_ptr(), "Llama's has no name"
    assert binding.layout_digest() == WeightBinding(small_store()).layout_digest()
    other = small_store()
    other.linears["qkv"].format.name = "int4"
    assert binding.layout_digest() != WeightBinding(other).layout_digest(), "graphs of one format do not fit another"
    store.config.tie_word_embeddings = False
    with pytest.raises(RuntimeError, match="'lm_head'"):
        binding.embedding("lm_head")


def test_binding_refuses_what_is_left_over_on_either_side():
    store = small_store()
    model = Shell(store)
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="do not lie in the weight store: extra"):
        WeightBinding(store).bind(model)
    with pytest.raises(RuntimeError, match="uses no copy of the store's forgotten"):
        WeightBinding(small := small_store(**{"forgotten.weight": torch.ones(2)})).bind(Shell(small))
    with pytest.raises(RuntimeError, match=r"norm.weight is \(4,\) torch.float32 in the engine and \(5,\)"):
        WeightBinding(wide := small_store(**{"norm.weight": torch.ones(5)})).bind(Shell(wide))
    copied = Shell(same := small_store())
    copied.qkv.weight = torch.nn.Parameter(copied.qkv.weight.clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"do not lie in the weight store: qkv\.weight"):
        WeightBinding(same).bind(copied)


# Pools of sleep mode ----------------------------------------------------------------------------------------------


class Pool:
    def __init__(self, used: int) -> None:
        self.used = used

    def snapshot(self) -> list[dict[str, int]]:
        return [{"allocated_size": 0}, {"allocated_size": self.used}]


class Allocator:
    """vLLM's, with one pool for the KV cache."""

    def __init__(self, used: int = 0) -> None:
        self.allocator_and_pools = {"kv_cache": (Pool(used), object())}
        self.pointer_to_data = {4096: "handle"}
        self.slept = 0

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        assert offload_tags == ()
        self.slept += 1


@pytest.mark.parametrize(
    ("used", "asleep", "left", "slept"), [(0, False, 0, 0), (8, False, 1, 1), (0, True, 1, 0), (8, True, 1, 0)]
)
def test_pools_go_unless_they_are_used_or_asleep(monkeypatch, used, asleep, left, slept):
    monkeypatch.setattr(sleep_pools, "_left", [])
    allocator = Allocator(used)
    sleep_pools.release_pools(asleep=asleep, allocator=allocator)
    assert allocator.allocator_and_pools == {}, "the next engine's pool takes nobody's place"
    assert len(sleep_pools._left) == left
    # What goes is looked up once more as PyTorch frees it; what stays must not be woken with the next engine's.
    assert allocator.pointer_to_data == ({} if left else {4096: "handle"})
    assert allocator.slept == slept
