"""What the plan says a vLLM engine holds beside weights and KV cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_config import config_of
from tiny_model import save_llama
from transformers import AutoConfig

from tandem.rl.plan import OUTSIDE, ledger
from tandem.rl.plan_devices import CONTEXT, GIB, find_device
from tandem.rl.plan_engine import engine_items, step_bytes
from tandem.rl.plan_memory import LIBRARIES, setup_of
from tandem.rl.plan_models import MODELS
from tandem.rl.plan_setup import Setup
from tandem.rl.plan_shape import ModelShape, shape_of
from tandem.rl.store import WeightStore
from tandem.rollout.weight_binding import WeightBinding

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "rollout-h100-2026-11-24-1828.json"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return shape_of(AutoConfig.for_model(**MODELS["Qwen/Qwen3-8B"]))


def setup(shape: ModelShape, **rollout: Any) -> Setup:
    return setup_of(shape, config_of(lora={"r": 32, "target_modules": SEVEN}, rollout=rollout))


def test_an_engine_asleep_is_as_large_as_the_one_that_was_measured(qwen: ModelShape) -> None:
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    measured = {row["what"]: row["gib"] for row in rows if row.get("kind") == "ledger" and "nf4" in row["system"]}
    shape = replace(qwen, max_length=32768)  # of the checkpoint that was measured
    items = engine_items(setup(shape, cudagraph_sizes=[1, 2, 4, 8, 16, 32, 64, 96, 128, 256]))
    copy = items.pop("adapter's copy in the engine")
    assert copy / GIB == measured["adapter: engine's buffers"]
    beside = measured["context and libraries"] + measured["engine beside weights, adapter and KV cache"]
    assert (CONTEXT + LIBRARIES + sum(items.values())) / GIB == pytest.approx(beside, rel=0.02)


def test_weights_are_written_out_into_a_scratch_as_large_as_the_largest_of_the_store(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_llama(tmp_path / "model", 256, **sizes)
    store = WeightStore.open(tmp_path / "model", format="nf4", device="cpu", cache_dir=tmp_path / "cache")
    shape = shape_of(AutoConfig.from_pretrained(tmp_path / "model"))
    nf4, int4 = (setup_of(shape, config_of(model={"weight_format": name})) for name in ("nf4", "int4"))
    buffers = [engine_items(one)["engine's buffers"] for one in (nf4, int4)]
    assert buffers[0] - buffers[1] == 2 * WeightBinding(store).largest_linear("nf4") > 0
    assert torch.bfloat16.itemsize == nf4.width == 2


def test_what_an_engine_holds_stays_while_the_trainer_trains(qwen: ModelShape) -> None:
    for engine, held in (("vllm", True), ("transformers", False)):
        plan = ledger(qwen, config_of(rollout={"engine": engine}), find_device("h100"))
        assert ("engine's buffers" in plan.training().items) is held
    plan = ledger(qwen, config_of(rollout={"engine": "vllm"}), find_device("h100"))
    eager = ledger(qwen, config_of(rollout={"engine": "vllm", "enforce_eager": True}), find_device("h100"))
    graphs = plan.training().items["CUDA graphs"]
    assert plan.training().bytes - eager.training().bytes == graphs, "the driver has them: no reserve is added"
    assert "CUDA graphs" in OUTSIDE
    few = ledger(qwen, config_of(rollout={"engine": "vllm", "max_in_flight": 8}), find_device("h100"))
    assert few.training().items["CUDA graphs"] < graphs


def test_a_step_of_the_engine_has_prompts_up_to_what_vllm_takes_at_a_time(qwen: ModelShape) -> None:
    one = setup(qwen)

    def step(card: str, tokens: int, sequences: int = 4) -> int:
        return step_bytes(one, tokens=tokens, sequences=sequences, device=find_device(card))

    assert step("4090", 8192) == 2 * step("4090", 4096) == step("4090", 100_000)
    assert step("h100", 16384) == 2 * step("h100", 8192) == step("h100", 100_000)
    assert step("a100", 100_000) == step("4090", 8192), "vLLM takes fewer at a time on an A100"
    # Many sequences with short prompts: their logits are more.
    assert step("4090", 64, 256) == 4 * 4 * 256 * 151936


def test_a_small_cache_counts_in_training_too(qwen: ModelShape) -> None:
    def stays(gib: float) -> int:
        config = config_of(rollout={"engine": "vllm", "kv_cache_gib": gib})
        return ledger(qwen, config, find_device("h100")).training().items.get("KV cache, which stays", 0)

    assert (stays(0.5), stays(0.51)) == (GIB // 2, 0)
