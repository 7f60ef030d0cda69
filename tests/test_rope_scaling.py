"""A stretched context: the model is Hugging Face's with the same values in its config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_config import config_of
from run_server import RunServer
from tiny_run import write_place
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from tandem.rl.config import LoraConfig, ModelConfig
from tandem.rl.config_file import load_config, parse_config
from tandem.rl.errors import UserError
from tandem.rl.fused_layer import FusedLayers
from tandem.rl.lora import attach_lora
from tandem.rl.model import load_model
from tandem.rl.model_config import RopeScaling
from tandem.rl.packing import pack
from tandem.rl.plan_shape import read_shape
from tandem.rl.rope_scaling import stretched
from tandem.rl.samples import Sequence
from tandem.rl.step import scored_hidden

CONTEXT = 32
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("rope")).parent


def by_hand(model: Path, to: Path, scaling: dict[str, Any]) -> Any:
    """transformers' model of a folder whose config.json was edited as model cards say."""
    shutil.copytree(model, to)
    content = json.loads((to / "config.json").read_text())
    original = scaling.get("original_max_position_embeddings", CONTEXT)
    content["max_position_embeddings"] = int(scaling["factor"] * original)
    content["rope_parameters"] |= {"original_max_position_embeddings": original, **scaling}
    (to / "config.json").write_text(json.dumps(content))
    return AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32).eval()


@pytest.mark.parametrize("shared", [False, True], ids=["transformers", "store"])
@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8.0, "beta_slow": 2.0},
        {"rope_type": "linear", "factor": 3.0},
    ],
    ids=["yarn", "its curve", "linear"],
)
@torch.no_grad()
def test_trainer_and_hugging_face_agree_beyond_the_context(place, tmp_path, scaling, shared):
    theirs = by_hand(place / "model", tmp_path / "edited", scaling)
    config = ModelConfig(model_name_or_path=str(place / "model"), device="cpu", rope_scaling=scaling)
    lm = load_model(config, SimpleNamespace(pad_token_id=0), shared=shared)
    assert (lm.store is not None) == shared
    assert lm.max_length == theirs.config.max_position_embeddings > CONTEXT
    ids = [2 + i % 37 for i in range(lm.max_length)]
    expected = theirs.model(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(lm.backbone(torch.tensor([ids])).last_hidden_state[0], expected, rtol=1e-5, atol=1e-5)
    attach_lora(lm, LoraConfig(r=2), seed=0)
    FusedLayers().attach(lm)
    (one,) = pack([Sequence(ids[:1], ids[1:], [True] * (len(ids) - 1))], len(ids))
    with lm.packed():
        torch.testing.assert_close(scored_hidden(lm, one), expected[:-1], rtol=1e-5, atol=1e-5)
    plain = load_model(
        ModelConfig(model_name_or_path=str(place / "model"), device="cpu"), SimpleNamespace(pad_token_id=0)
    )
    assert not torch.allclose(plain.backbone(torch.tensor([ids])).last_hidden_state[0], expected, atol=1e-3)


def test_a_run_goes_beyond_the_models_context_and_is_resumed_there(place, tmp_path):
    server = RunServer(tmp_path)
    longer = ["rollout.max_completion_length=40", "warmup.max_steps=0", "train.max_steps=2", "run_name=long"]
    code, said = server.run("run", place / "run.yaml", *longer)
    assert code == 2
    assert "stretch the context with model.rope_scaling.factor" in " ".join(said.split())
    code, said = server.run("run", place / "run.yaml", *longer, "model.rope_scaling.factor=2")
    assert code == 0, said
    run = place / "runs" / "long"
    assert load_config(run / "config.yaml").model.rope_scaling == RopeScaling(factor=2)
    code, said = server.run("resume", run, "train.max_steps=4")
    assert code == 0, said
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    lengths = [record["completions/max_length"] for record in records if "reward" in record]
    assert len(lengths) == 2  # two steps learn from one rollout
    assert max(lengths) > CONTEXT


def test_the_plan_knows_the_longer_context():
    known = {"model_name_or_path": "Qwen/Qwen3-8B"}
    before = read_shape(ModelConfig(**known)).max_length
    scaling = {"factor": 4, "original_max_position_embeddings": 32768}
    assert read_shape(ModelConfig(**known, rope_scaling=scaling)).max_length == 131_072 > before
    config = config_of(model={"model_name_or_path": "Qwen/Qwen3-8B", "rope_scaling": scaling})
    assert config.model.rope_scaling.factor == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Gemma3TextConfig(), "its layers have different rotations"),
        (LlamaConfig(rope_parameters=LLAMA3), "type llama3"),
        (GPT2Config(), "no rotations"),
        (LlamaConfig(max_position_embeddings=40_000), r"10,000 × 4 = 40,000 tokens long.*is 40,000 already"),
    ],
)
def test_models_that_cannot_be_stretched_are_left_alone(config, words):
    before = config.to_dict()
    assert stretched(config, RopeScaling()) is config
    with pytest.raises(UserError, match=f"(?s){words}"):
        stretched(config, RopeScaling(factor=4, original_max_position_embeddings=10_000))
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2}, ["rope_type", "'yarn'", "'dynamic'"]),
        ({"factor": 0.5}, ["factor", "0.5"]),
        ({"beta_fast": 8}, ["beta_fast", "factor"]),
        ({"rope_type": "linear"}, ["rope_type", "factor"]),
        ({"rope_type": "linear", "factor": 2, "beta_slow": 2}, ["beta_slow", "linear"]),
        ({"faktor": 2}, ["faktor", "factor"]),
    ],
)
def test_mistakes_are_named(given, words):
    sections = {"data": {"dataset_name": "rows.jsonl"}, "rewards": {"reward_funcs": ["math_answer"]}}
    with pytest.raises(UserError) as error:
        parse_config({"model": {"model_name_or_path": "any", "rope_scaling": given}, **sections})
    assert all(word in str(error.value) for word in words), str(error.value)
