"""Whole runs on the weight store, as a user starts them: both kinds of 4-bit weights, engines that cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import save_words

from tandem.rl import cli

REWARDS = """
def low(completions, **columns):
    return [sum(int(w[1:]) < 48 for w in c.split() if w[0] == "w") / max(len(c.split()), 1) for c in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("stored")
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(96))]
    save_words(folder / "model", words, eos="<eos>", unk="<unk>")
    torch.manual_seed(0)
    # Sizes that both formats can store: rows in multiples of 64, columns of 128.
    shape = Qwen3Config(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
        initializer_range=0.15,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(shape).save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(8)))
    config: dict[str, Any] = {
        "run_name": "run",
        "output_dir": "runs",
        "model": {"model_name_or_path": "model", "load_in_4bit": True},
        "lora": {"r": 4},
        "data": {"dataset_name": "prompts.jsonl"},
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "rewards": {"reward_funcs": ["rewards.py:low"]},
        "train": {"max_steps": 3, "generation_batch_size": 16},
        "optim": {"learning_rate": 0.01},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def rl_train(place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(place)
    monkeypatch.setenv("TANDEM_CACHE", str(place / "cache"))
    monkeypatch.setattr("sys.argv", ["rl-train", "run", "run.yaml", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def steps(place: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("weight_format", "options"),
    [
        ("nf4", ["model.weight_format=nf4"]),
        ("int4", ["model.weight_format=int4"]),
        ("fp8", ["model.load_in_4bit=false", "model.load_in_8bit=true"]),
    ],
)
def test_a_run_on_few_bits(place, monkeypatch, weight_format, options):
    assert rl_train(place, monkeypatch, *options, f"run_name={weight_format}") == 0
    assert [path for path in (place / "cache" / "store").iterdir() if f"-{weight_format}-" in path.name]
    assert rl_train(place, monkeypatch, *options, f"run_name={weight_format}-fused", "train.fused_layers=true") == 0
    own, fused = steps(place, weight_format), steps(place, f"{weight_format}-fused")
    assert len(own) == len(fused) == 3
    # The same rollouts through the model's own forward and through the fused layers.
    for a, b in zip(own, fused, strict=True):
        assert a["grad_norm"] > 0
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["sampling/sampling_logp_difference/max"] < 1e-3
        assert b["sampling/sampling_logp_difference/max"] < 1e-3


def test_an_engine_that_cannot_be_had_ends_the_run(place, monkeypatch, capsys):
    assert rl_train(place, monkeypatch, "rollout.engine=vllm", "run_name=vllm") == 2
    said = capsys.readouterr().err
    assert "rollout.engine=vllm" in said
    assert "rollout.engine=transformers" in said
    assert "Traceback" not in said
