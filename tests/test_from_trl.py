"""docs/from-trl.md against TRL itself and against the config: no key without an answer, no answer that is wrong."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

from tandem.rl.config import Config
from tandem.rl.config_file import all_keys, full_name, parse_config
from tandem.rl.errors import UserError
from tandem.rl.trl_keys import INSTEAD

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
OF_ALL_TRAINERS = {field.name for field in dataclasses.fields(TrainingArguments)}
MINIMAL = {
    "model": {"model_name_or_path": "m"},
    "data": {"dataset_name": "d"},
    "rewards": {"reward_funcs": ["math_answer"]},
}


def block(language: str, number: int) -> str:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)[number]


def value_at(config: Config, dotted: str):
    node = config
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def trl_default(key: str):
    field = {f.name: f for f in dataclasses.fields(GRPOConfig)}[key]
    return field.default


@pytest.mark.parametrize("key", sorted({f.name for f in dataclasses.fields(GRPOConfig)} - OF_ALL_TRAINERS))
def test_every_key_of_trls_grpo_has_an_answer(key: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(MINIMAL | {key: None})
    text = str(error.value)
    assert f"did you mean '{full_name(key)}'?" in text or f"for TRL's {key}: " in text


def test_no_answer_is_given_for_a_key_that_keeps_its_name() -> None:
    assert not {name for name, full in all_keys() if "." in full} & INSTEAD.keys() - {"repetition_penalty"}


@pytest.mark.parametrize("text", [TEXT, *INSTEAD.values()], ids=["page", *INSTEAD])
def test_keys_that_are_named_exist(text: str) -> None:
    full_names = {full for _, full in all_keys()}
    sections = {full.partition(".")[0] for full in full_names if "." in full}
    named = re.findall(r"`([a-z_]+\.[a-z0-9_.]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert [name for name in named if name.partition(".")[0] in sections and name not in full_names] == []


def test_the_table_is_that_of_the_errors() -> None:
    spec = importlib.util.spec_from_file_location("make_config_table", ROOT / "docs" / "make_config_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_trl_table(TEXT) == TEXT


def test_before_and_after_say_the_same() -> None:
    calls = {node.func.id: node for node in ast.walk(ast.parse(block("python", 0))) if is_call(node)}
    before = {k.arg: ast.literal_eval(k.value) for k in calls["GRPOConfig"].keywords}
    adapter = {k.arg: ast.literal_eval(k.value) for k in calls["LoraConfig"].keywords}
    after = parse_config(yaml.safe_load(block("yaml", 0)))
    assert set(before) <= {f.name for f in dataclasses.fields(GRPOConfig)}
    batch = math.prod(before.pop(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert after.generation_batch_size == batch
    assert str(after.run_dir) == before.pop("output_dir")
    assert after.log.report_to == [before.pop("report_to")]
    assert [before.pop(key) for key in ("use_vllm", "vllm_mode", "bf16")] == [True, "colocate", True]
    assert [spec.weight for spec in after.rewards.reward_funcs] == before.pop("reward_weights")
    assert {key: value_at(after, full_name(key)) for key in before} == before
    assert {key: value_at(after, f"lora.{key}") for key in adapter} == adapter
    assert after.optim.lr_scheduler_type == trl_default("lr_scheduler_type")
    assert yaml.safe_load(block("yaml", 0))["data"]["dataset_name"] == "sums.py:rows"


def is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def test_the_functions_of_before_and_after_are_the_same() -> None:
    def functions(code: str) -> dict[str, str]:
        return {f.name: ast.dump(f) for f in ast.parse(code).body if isinstance(f, ast.FunctionDef)}

    before, after = functions(block("python", 0)), functions(block("python", 1))
    assert before
    assert before.items() <= after.items()


def read(cell: str) -> float | str:
    return float(cell) if cell[0].isdigit() else cell


def lengths(kind: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.name == "max_length"]


def test_defaults_that_differ_are_as_the_page_says() -> None:
    rows = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in TEXT.splitlines() if row[:2] == "| "]
    table = {row[0]: row[1:] for row in rows if len(row) == 3}
    ours = parse_config(MINIMAL)
    for key in ("learning_rate", "lr_scheduler_type", "num_train_epochs", "seed", "logging_steps"):
        assert [read(cell) for cell in table[key]] == [trl_default(key), value_at(ours, full_name(key))]
    assert (LoraConfig().r, LoraConfig().lora_alpha) == (8, 8)
    assert (trl_default("save_steps"), trl_default("save_total_limit")) == (500, None)
    assert (ours.checkpoint.save_steps, ours.checkpoint.save_total_limit) == (50, 2)
    assert trl_default("vllm_importance_sampling_mode") == "sequence_mask"
    assert trl_default("num_generations_eval") is None
    assert (ours.eval.num_generations, ours.eval.temperature) == (1, 0.0)
    sft = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    assert [read(cell) for cell in table["learning_rate` of SFT"]] == [sft["learning_rate"], ours.optim.learning_rate]
    assert {field.default for kind in (SFTConfig, DPOConfig, KTOConfig) for field in lengths(kind)} == {1024}
    assert (ours.model.max_length, sft["assistant_only_loss"], ours.data.assistant_only_loss) == (None, False, True)
    assert ours.algorithm.rollout_correction == "token_truncate"
