"""Keys that are set for nothing are said, and they are indeed for nothing."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import outcome, write_lines, write_place

from tandem.rl import cli
from tandem.rl.config_file import all_keys, load_config, parse_config, save_config
from tandem.rl.ignored_keys import _PLANNED_BY, _READERS, ignored_keys, ignored_note

ROOT = Path(__file__).parents[1]
BASE: dict[str, Any] = {
    "model": {"model_name_or_path": "m"},
    "data": {"dataset_name": "d"},
    "rewards": {"reward_funcs": ["length"]},
}

ROLLOUT_KEYS: dict[str, Any] = {
    "data.max_prompt_length": 1,
    "rollout.num_generations": 3,
    "rollout.max_completion_length": 7,
    "rollout.temperature": 0.3,
    "rollout.engine": "transformers",
    "environment.max_turns": 2,
    "rewards.reward_funcs": ["exact_match"],
    "rewards.on_error": "zero",
    "train.generation_batch_size": 12,
    "train.share_prefix": False,
    "eval.num_generations": 5,
    "eval.temperature": 0.7,
    "eval.score": "nobody",
    "parity.action": "off",
    "watch.enabled": False,
    "log.log_completions": False,
    "log.num_completions_to_print": 1,
    "checkpoint.journal": False,
}
GRPO_KEYS: dict[str, Any] = {
    "algorithm.loss_type": "sapo",
    "algorithm.importance_sampling_level": "sequence",
    "algorithm.epsilon": 0.01,
    "algorithm.epsilon_high": 0.02,
    "algorithm.delta": 1.1,
    "algorithm.kl_estimator": "k1",
    "algorithm.entropy_coef": 3.0,
    "algorithm.top_entropy_quantile": 0.2,
    "algorithm.drop_uniform_groups": True,
    "algorithm.num_iterations": 3,
    "algorithm.mask_truncated_completions": True,
    "algorithm.rollout_correction": "sequence_mask",
    "algorithm.rollout_correction_max": 1.001,
    "train.steps_per_generation": 2,
}
ADVANTAGE_KEYS: dict[str, Any] = {
    "algorithm.advantage_estimator": "rloo",
    "algorithm.scale_rewards": "none",
    "algorithm.multi_objective_aggregation": "normalize_then_sum",
}
PREFERENCE_KEYS: dict[str, Any] = {"preference.loss_type": "ipo", "preference.beta": 5.0, "preference.sft_weight": 2.0}
EXAMPLE_KEYS: dict[str, Any] = {
    "data.completion_only_loss": False,
    "data.assistant_only_loss": False,
    "algorithm.label_smoothing_factor": 0.4,
    "algorithm.z_loss_coef": 0.5,
}
FOR_NOTHING = {
    "sft": ROLLOUT_KEYS | GRPO_KEYS | ADVANTAGE_KEYS | PREFERENCE_KEYS | {"algorithm.beta": 0.9},
    "dpo": ROLLOUT_KEYS | GRPO_KEYS | ADVANTAGE_KEYS | EXAMPLE_KEYS,
    "grpo": PREFERENCE_KEYS | EXAMPLE_KEYS,
    "online_dpo": GRPO_KEYS | EXAMPLE_KEYS | {"algorithm.beta": 0.9},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ignored")
    config = yaml.safe_load(write_place(folder).read_text())
    pairs = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2} w3"} for i in range(6)]
    write_lines(folder / "pairs.jsonl", pairs)
    plain = {k: config[k] for k in ("output_dir", "model", "lora", "optim")} | {"train": {"max_steps": 3}}
    rollouts = plain | {k: config[k] for k in ("data", "eval", "rewards", "rollout")}
    # What stands in the journal bears a fingerprint of the whole config.
    rollouts |= {"checkpoint": {"journal": False}, "train": {"max_steps": 3, "generation_batch_size": 16}}
    for name in FOR_NOTHING:
        own = dict(rollouts) if name in ("grpo", "online_dpo") else dict(plain)
        if name in ("sft", "dpo"):
            data = {"dataset_name": "examples.jsonl" if name == "sft" else "pairs.jsonl"}
            own |= {"data": data, "eval": dict(data)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own | {"algorithm": {"name": name}}))
    return folder


def rl_train(*arguments: object) -> str:
    """What a command line that succeeds prints."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", "2000")
        patch.setattr(sys, "argv", ["rl-train", *map(str, arguments)])
        cli.app(standalone_mode=False)
    return out.getvalue()


@pytest.mark.parametrize("name", FOR_NOTHING)
def test_what_is_said_to_have_no_effect_has_none(place: Path, name: str) -> None:
    """A run with every such key set to something else comes to the same bytes, and says each of them once."""
    plain = rl_train("run", place / f"{name}.yaml", f"run_name={name}")
    assert "no effect" not in plain
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in FOR_NOTHING[name].items()]
    said = rl_train("run", place / f"{name}.yaml", f"run_name={name}-other", *overrides)
    (note,) = [line for line in said.splitlines() if "no effect" in line]
    assert f" have no effect with algorithm.name={name}" in note
    for key in FOR_NOTHING[name]:
        assert note.count(f"{key},") + note.count(f"{key} ") == 1, key
    one, other = outcome(place / "runs" / name), outcome(place / "runs" / f"{name}-other")
    for found in (one, other):
        del found["state"]
    assert one == other


def test_a_key_that_was_not_set_is_not_said() -> None:
    for name in FOR_NOTHING:
        assert ignored_note(parse_config(BASE | {"algorithm": {"name": name}, "rewards": BASE["rewards"]})) in (
            "",
            f"rewards.reward_funcs has no effect with algorithm.name={name}",
        )


def test_one_key_in_the_file_or_as_an_override(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in BASE.items() if k != "rewards"} | {"algorithm": {"name": "sft"}}))
    assert not ignored_keys(load_config(path))
    said = "algorithm.epsilon has no effect with algorithm.name=sft"
    assert ignored_note(load_config(path, ["algorithm.epsilon=0.2"])) == said, "set, if to its default"
    path.write_text(path.read_text().replace("name: sft", "name: sft\n  epsilon: 0.3"))
    assert ignored_note(load_config(path)) == said


def test_a_warm_up_reads_what_sft_reads() -> None:
    config = BASE | {"algorithm": {"z_loss_coef": 0.1}, "data": {"dataset_name": "d", "assistant_only_loss": False}}
    assert ignored_keys(parse_config(config)) == ["data.assistant_only_loss", "algorithm.z_loss_coef"]
    assert not ignored_keys(parse_config(config | {"warmup": {"max_steps": 1, "dataset_name": "e"}}))


def test_of_a_config_that_a_run_wrote_what_is_not_at_its_default(tmp_path: Path) -> None:
    config = parse_config(BASE | {"algorithm": {"name": "dpo", "epsilon": 0.3}, "rewards": {}})
    save_config(config, tmp_path / "config.yaml")
    assert ignored_keys(load_config(tmp_path / "config.yaml")) == ["algorithm.epsilon"]


def test_plan_says_it_but_for_the_lengths_that_it_reads(place: Path) -> None:
    overrides = ["data.max_prompt_length=8", "rollout.max_completion_length=8", "preference.beta=0.3"]
    command = ("plan", place / "sft.yaml", "--gpu", "4090", *overrides)
    assert "preference.beta has no effect with algorithm.name=sft" in rl_train(*command)
    assert rl_train(*command, "--json").startswith("{"), "nothing beside the JSON"


@pytest.mark.parametrize("command", [["run", "--dry-run"], ["check"]])
def test_other_commands_say_it_too(place: Path, command: list[str]) -> None:
    said = rl_train(*command, place / "sft.yaml", "algorithm.epsilon=0.1")
    assert said.count("algorithm.epsilon has no effect with algorithm.name=sft") == 1


def test_the_table_names_what_there_is() -> None:
    names = {full for _, full in all_keys()}
    assert set(_READERS) | _PLANNED_BY <= names


def test_no_example_sets_a_key_for_nothing() -> None:
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        assert not ignored_keys(load_config(path)), path
