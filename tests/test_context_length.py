"""What is longer than the model's context is refused, or said, before anything is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tandem.rl.config_file import parse_config
from tandem.rl.console import Console
from tandem.rl.context_length import check_context
from tandem.rl.errors import UserError
from tandem.rl.samples import Prompt, Sequence
from tandem.rl.training_data import TrainingData

CONTEXT = 64


@pytest.fixture
def model(tmp_path: Path) -> str:
    LlamaConfig(max_position_embeddings=CONTEXT).save_pretrained(tmp_path)
    return str(tmp_path)


def config_of(model: str, completion: int = 16, **sections: Any):
    given = {
        "model": {"model_name_or_path": model},
        "data": {"dataset_name": "rows.jsonl"},
        "rewards": {"reward_funcs": ["math_answer"]},
        "rollout": {"max_completion_length": completion},
    }
    return parse_config(given | sections)


def prompts_of(*lengths: int) -> TrainingData:
    return TrainingData(prompts=[Prompt(i, [1] * n, "") for i, n in enumerate(lengths)])


def problem(config, data: TrainingData) -> str:
    with pytest.raises(UserError) as error:
        check_context(config, data, Console.silent())
    return str(error.value)


def test_a_prompt_and_a_completion_that_just_fit_are_taken(model: str) -> None:
    check_context(config_of(model), prompts_of(3, CONTEXT - 16), Console.silent())
    text = problem(config_of(model), prompts_of(3, CONTEXT - 15))
    assert "a prompt of 49 tokens and rollout.max_completion_length 16 are 65 tokens" in text
    assert "set rollout.max_completion_length=15, or set data.max_prompt_length=48" in text


def test_held_out_prompts_count_too(model: str) -> None:
    data = prompts_of(3)
    data.eval_prompts = prompts_of(CONTEXT).prompts
    text = problem(config_of(model), data)
    assert "rollout.max_completion_length=0" not in text
    assert "data.max_prompt_length=48" in text


def test_a_lower_limit_of_the_config_counts(model: str) -> None:
    config = config_of(model)
    config.model.max_length = 40
    assert "the model takes 40" in problem(config, prompts_of(30))


def test_episodes_end_by_themselves(model: str) -> None:
    check_context(config_of(model, environment={"tools": ["tools.py:t"]}), prompts_of(60), Console.silent())


def test_long_examples_are_said(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = TrainingData(examples=[Sequence([1] * 60, [2] * 10, [True] * 10)])
    check_context(config_of(model, algorithm={"name": "sft"}), data, Console())
    said = " ".join("".join(capfd.readouterr()).split())
    assert "the longest example has 70 tokens, and the model takes 64" in said


def test_a_model_that_cannot_be_read_is_left_to_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    check_context(config_of(str(tmp_path)), prompts_of(10_000), Console.silent())


def test_stretching_is_proposed_where_it_helps(model: str, tmp_path: Path) -> None:
    words = "model.rope_scaling.factor"
    assert words in problem(config_of(model, completion=60), prompts_of(8))
    limited = config_of(model, completion=60)
    limited.model.max_length = 32
    assert words not in problem(limited, prompts_of(8))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    LlamaConfig(max_position_embeddings=CONTEXT, rope_parameters=scaled).save_pretrained(tmp_path / "scaled")
    assert words not in problem(config_of(str(tmp_path / "scaled"), completion=60), prompts_of(8))
