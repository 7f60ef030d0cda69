"""Configs: reading, overriding, saving, the errors for every kind of mistake, and the written reference."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tandem.rl.config import Config, OptimConfig, ParityConfig, RolloutConfig, Section, TrainConfig
from tandem.rl.config_file import all_keys, load_config, parse_config, save_config
from tandem.rl.errors import UserError

ROOT = Path(__file__).parents[1]
SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


def all_models() -> dict[str, type[BaseModel]]:
    """Every model of a config by its dotted place, those in lists included."""
    models: dict[str, type[BaseModel]] = {"": Config, **SECTIONS}
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            for arg in (field.annotation, *get_args(field.annotation)):
                if isinstance(arg, type) and issubclass(arg, BaseModel):
                    models[f"{name}.{key}"] = arg
    return models


def raw(**sections: Any) -> dict[str, Any]:
    """A small valid RL config as a mapping; each argument is merged into its section or replaces a plain value."""
    base: dict[str, Any] = {
        "model": {"model_name_or_path": "some/model"},
        "data": {"dataset_name": "some/data"},
        "rewards": {"reward_funcs": ["exact"]},
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return base


def problem(**sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(raw(**sections))
    return str(caught.value)


def write(folder: Path, mapping: Any, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(mapping if isinstance(mapping, str) else yaml.safe_dump(mapping), encoding="utf-8")
    return path


# --- round trips ------------------------------------------------------------------------------------------------------


def test_saved_config_loads_as_the_same_config(tmp_path: Path) -> None:
    config = parse_config(
        raw(
            run_name="größe σ",
            seed=-3,
            lora={"target_modules": ["q_proj", "v_proj"], "lora_alpha": 7},
            rewards={
                "reward_funcs": [{"function": "a", "kwargs": {"x": [1, {"y": None}]}}, "m:b"],
                "reward_weights": [2, 0.5],
            },
            algorithm={"scale_rewards": False, "epsilon_high": "3e-4"},
            optim={"learning_rate": 1e-7, "adam_epsilon": 1e-12},
            train={"max_steps": None, "max_tokens": 1},
            checkpoint={"save_total_limit": None},
        )
    )
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.optim.learning_rate == 1e-7
    assert [spec.weight for spec in again.rewards.reward_funcs] == [2.0, 0.5]
    save_config(again, tmp_path / "second.yaml")
    assert (tmp_path / "second.yaml").read_bytes() == (tmp_path / "config.yaml").read_bytes()


positive = st.integers(1, 10**9)
# The first part keeps a random name from being that of a file, which loading would make absolute.
hub_names = st.text(min_size=1).map(lambda text: f"nobody/{text}")
RANDOM_CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(-(2**63), 2**63),
        "run_name": st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_. ~:#-]{0,20}[a-z0-9]", fullmatch=True),
        "model": st.fixed_dictionaries(
            {"model_name_or_path": hub_names},
            optional={"chat_template_kwargs": st.dictionaries(st.text(), st.booleans())},
        ),
        "lora": st.fixed_dictionaries({}, optional={"r": positive, "lora_alpha": st.none() | st.floats(1e-9, 1e9)}),
        "data": st.fixed_dictionaries(
            {"dataset_name": hub_names},
            optional={"system_prompt": st.none() | st.text(), "max_examples": st.none() | positive},
        ),
        "rollout": st.fixed_dictionaries(
            {}, optional={"num_generations": st.integers(2, 64), "top_p": st.floats(0.01, 1.0)}
        ),
        "optim": st.fixed_dictionaries(
            {}, optional={"learning_rate": st.floats(1e-12, 1.0), "warmup_steps": st.integers(0, 9)}
        ),
        "log": st.fixed_dictionaries(
            {}, optional={"report_to": st.sampled_from([[], ["wandb"], "wandb", "none", None])}
        ),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(RANDOM_CONFIGS)
def test_any_valid_config_survives_saving(tmp_path_factory: pytest.TempPathFactory, sections: dict[str, Any]) -> None:
    config = parse_config(raw(**sections))
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    save_config(config, path)
    assert load_config(path) == config


# --- unknown keys -----------------------------------------------------------------------------------------------------


def misspelt(key: str) -> str:
    """The key with its middle letter lost."""
    return key[: len(key) // 2] + key[len(key) // 2 + 1 :]


@pytest.mark.parametrize("place", [place for place in all_models() if place.count(".") == 0 and place])
def test_misspelt_key_of_a_section_is_refused_with_the_right_name(place: str) -> None:
    long_enough = [key for key in all_models()[place].model_fields if len(key) > 3]
    for key in long_enough:
        text = problem(**{place: {misspelt(key): 1}})
        assert f"unknown key '{place}.{misspelt(key)}'" in text
        assert f"did you mean '{place}.{key}'" in text


def test_misspelt_key_at_the_top_or_in_a_reward_is_refused_with_the_right_name() -> None:
    assert "unknown key 'trian'; did you mean 'train'?" in problem(trian={"max_steps": 1})
    assert "unknown key 'run_nmae'; did you mean 'run_name'?" in problem(run_nmae="x")
    text = problem(rewards={"reward_funcs": ["a", {"function": "b", "wieght": 2}]})
    assert "unknown key 'rewards.reward_funcs.1.wieght'; did you mean 'rewards.reward_funcs.weight'?" in text


@pytest.mark.parametrize(
    ("given_at", "right"),
    [
        ({"learning_rate": 1e-5}, "optim.learning_rate"),
        ({"num_generations": 4}, "rollout.num_generations"),
        ({"train": {"learning_rate": 1e-5}}, "optim.learning_rate"),
        ({"algorithm": {"num_generations": 4}}, "rollout.num_generations"),
        ({"model": {"lora_alpha": 4}}, "lora.lora_alpha"),
    ],
)
def test_key_in_the_wrong_section_is_told_its_own(given_at: dict[str, Any], right: str) -> None:
    assert f"did you mean '{right}'?" in problem(**given_at)


@pytest.mark.parametrize("key", ["beta", "loss_type"])
def test_key_of_two_sections_is_told_the_one_that_the_algorithm_reads(key: str) -> None:
    for wrong in ({key: 0.2}, {"train": {key: 0.2}}):
        assert f"did you mean 'algorithm.{key}'?" in problem(**wrong)
        assert f"did you mean 'preference.{key}'?" in problem(algorithm={"name": "dpo"}, **wrong)
    assert "did you mean 'algorithm.beta'?" in problem(algorithm={"name": "dpo", "btea": 0.2})


@pytest.mark.parametrize("key", ["qqqqzzzz", "rank"])
def test_key_that_resembles_nothing_gets_the_list_of_keys(key: str) -> None:
    text = problem(checkpoint={key: 1})
    assert "did you mean" not in text
    assert "save_steps, save_total_limit" in text


def test_every_problem_is_reported_at_once() -> None:
    text = problem(train={"max_stps": 1}, optim={"learning_rate": -1}, rollout={"top_p": 2})
    assert all(part in text for part in ("train.max_steps", "optim.learning_rate", "rollout.top_p"))


def test_all_keys_lists_every_field_once() -> None:
    listed = sorted(full for _, full in all_keys())
    expected = sorted(
        f"{place}.{key}".strip(".") for place, model in all_models().items() for key in model.model_fields
    )
    assert listed == expected


# --- values and how fields fit together -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"dataset_name": None}}, ["data.dataset_name is missing"]),
        ({"rewards": {"reward_funcs": []}}, ["rewards.reward_funcs is empty"]),
        ({"rollout": {"num_generations": 1}}, ["rollout.num_generations is 1", "at least 2"]),
        ({"train": {"generation_batch_size": 20}}, ["is 20", "num_generations (8)", "use 16 or 24"]),
        ({"train": {"generation_batch_size": 3}}, ["is 3", "so use 8"]),
        ({"train": {"steps_per_generation": 3}}, ["steps_per_generation is 3", "64 completions", "divisor of 8"]),
        ({"rewards": {"reward_funcs": ["m:f", "FILE.py:f"]}}, ["two reward functions are named 'f'"]),
        ({"rewards": {"reward_funcs": ["a", "b"], "reward_weights": [1]}}, ["1 values for 2 reward_funcs"]),
        ({"eval": {"score": "speed"}}, ["eval.score is 'speed'", "exact"]),
        ({"model": {"max_length": 512}}, ["max_completion_length (512)", "model.max_length (512)"]),
        ({"warmup": {"max_steps": 5}}, ["warmup.max_steps is 5", "warmup.dataset_name is missing"]),
        ({"run_name": "a/b"}, ["run_name", "'a/b'", "plain folder name"]),
        ({"run_name": ".."}, ["run_name", "'..'"]),
        ({"optim": {"learning_rate": 0}}, ["optim.learning_rate", "greater than 0", "given: 0"]),
        ({"optim": {"learning_rate": "fast"}}, ["optim.learning_rate", "'fast'"]),
        ({"optim": {"learning_rate": float("nan")}}, ["optim.learning_rate", "finite"]),
        ({"algorithm": {"epsilon": float("nan")}}, ["algorithm.epsilon"]),
        ({"rollout": {"temperature": 0}}, ["rollout.temperature", "greater than 0"]),
        ({"rollout": {"temperature": float("inf")}}, ["rollout.temperature", "finite"]),
        ({"train": {"num_train_epochs": float("inf")}}, ["train.num_train_epochs", "finite"]),
        ({"rollout": {"top_p": 1.5}}, ["rollout.top_p", "given: 1.5"]),
        ({"train": {"max_steps": 2.5}}, ["train.max_steps", "given: 2.5"]),
        ({"algorithm": {"name": "ppo"}}, ["algorithm.name", "'grpo'", "'ppo'"]),
        ({"algorithm": {"loss_type": "ipo"}}, ["'ipo'", "algorithm.name: dpo with preference.loss_type: ipo"]),
        ({"algorithm": {"name": "dpo", "beta": 0.2}}, ["algorithm.beta is 0.2", "preference.beta"]),
        ({"model": "some/model"}, ["model", "'some/model'"]),
        ({"model": {"load_in_4bit": True, "load_in_8bit": True}}, ["load_in_4bit and model.load_in_8bit are both on"]),
        (
            {"model": {"dtype": "float16", "load_in_4bit": True, "weight_format": "int4"}},
            ["model.dtype is float16", "model.weight_format is int4", "nf4"],
        ),
        (
            {"model": {"load_in_4bit": True, "weight_format": "int4"}, "rollout": {"numerics": "stock"}},
            ["rollout.numerics is 'stock'", "int4", "nf4"],
        ),
        (
            {"model": {"load_in_8bit": True}, "rollout": {"numerics": "stock"}},
            ["rollout.numerics is 'stock'", "fp8"],
        ),
        (
            {"model": {"load_in_4bit": True, "dtype": "float16"}, "rollout": {"numerics": "stock"}},
            ["rollout.numerics is 'stock'", "model.dtype is float16", "bfloat16"],
        ),
        (
            {"rollout": {"numerics": "stock", "engine": "transformers"}},
            ["rollout.numerics is 'stock'", "rollout.engine is transformers", "use vllm"],
        ),
        ({"log": {"report_to": ["wandb", "tensorboard"]}}, ["log.report_to.1", "'tensorboard'"]),
    ],
)
def test_mistake_is_refused_with_its_value(sections: dict[str, Any], words: list[str]) -> None:
    text = problem(**sections)
    assert all(word in text for word in words), text


def test_model_is_required() -> None:
    with pytest.raises(UserError, match=r"model is missing"):
        parse_config({"data": {"dataset_name": "d"}, "rewards": {"reward_funcs": ["f"]}})
    with pytest.raises(UserError, match=r"model\.model_name_or_path is missing"):
        parse_config({**raw(), "model": {}})


def test_rl_checks_do_not_bind_sft() -> None:
    config = parse_config(raw(algorithm={"name": "sft"}, rewards={"reward_funcs": []}, rollout={"num_generations": 1}))
    assert config.algorithm.name == "sft"


def test_batch_arithmetic() -> None:
    config = parse_config(raw(rollout={"num_generations": 6}))
    assert (config.generation_batch_size, config.prompts_per_rollout) == (48, 8)
    config = parse_config(raw(train={"generation_batch_size": 24, "steps_per_generation": 3}))
    assert (config.generation_batch_size, config.prompts_per_rollout) == (24, 3)
    assert config.lora.alpha == 32.0
    assert config.algorithm.epsilon_upper == config.algorithm.epsilon_low == 0.2
    assert config.run_dir == Path("runs/run")


def test_defaults_of_one_config_are_not_shared_with_another() -> None:
    first, second = parse_config(raw()), parse_config(raw())
    first.rewards.reward_funcs.clear()
    first.data.dataset_kwargs["split"] = "train"
    assert len(second.rewards.reward_funcs) == 1
    assert second.data.dataset_kwargs == {}


# --- YAML as people write it ------------------------------------------------------------------------------------------

HEAD = "model: {model_name_or_path: m}\ndata: {dataset_name: d}\nrewards: {reward_funcs: exact}\n"


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("optim: {learning_rate: 1e-5}", "optim", "learning_rate", 1e-5),
        ("optim: {learning_rate: 1E-5}", "optim", "learning_rate", 1e-5),
        ("optim: {learning_rate: 2}", "optim", "learning_rate", 2.0),
        ("optim: {adam_epsilon: 1e-8}", "optim", "adam_epsilon", 1e-8),
        ("optim: {adam_beta1: 9e-1}", "optim", "adam_beta1", 0.9),
        ("algorithm: {epsilon: 3e-4}", "algorithm", "epsilon", 3e-4),
        ("algorithm: {beta: 1e-3}", "algorithm", "beta", 1e-3),
        ("warmup: {learning_rate: 1e-4}", "warmup", "learning_rate", 1e-4),
        ("algorithm: {scale_rewards: none}", "algorithm", "scale_rewards", "none"),
        ("algorithm: {scale_rewards: false}", "algorithm", "scale_rewards", "none"),
        ("algorithm: {scale_rewards: no}", "algorithm", "scale_rewards", "none"),
        ("algorithm: {scale_rewards: null}", "algorithm", "scale_rewards", "none"),
        ("algorithm: {scale_rewards: true}", "algorithm", "scale_rewards", "group"),
        ("algorithm: {scale_rewards: batch}", "algorithm", "scale_rewards", "batch"),
        ("log: {report_to: none}", "log", "report_to", []),
        ("log: {report_to: null}", "log", "report_to", []),
        ("log: {report_to: }", "log", "report_to", []),
        ("log: {report_to: wandb}", "log", "report_to", ["wandb"]),
        ("log: {report_to: [wandb]}", "log", "report_to", ["wandb"]),
        ("lora: {target_modules: [q_proj]}", "lora", "target_modules", ["q_proj"]),
    ],
)
def test_yaml_spellings(tmp_path: Path, text: str, section: str, key: str, value: Any) -> None:
    config = load_config(write(tmp_path, HEAD + text + "\n"))
    assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize("value", [True, 3, "all", ["wandb", "none"], {"wandb": True}])
def test_wrong_report_to_is_refused(value: Any) -> None:
    assert "log.report_to" in problem(log={"report_to": value})


@pytest.mark.parametrize("value", ["false", "std", 7, [], ["group"], {"group": 1}])
def test_wrong_scale_rewards_is_refused(value: Any) -> None:
    assert "algorithm.scale_rewards" in problem(algorithm={"scale_rewards": value})


def test_section_without_keys_means_its_defaults(tmp_path: Path) -> None:
    """A section whose keys are all commented out reads as null."""
    config = load_config(write(tmp_path, HEAD + "train:\n  # max_steps: 3\nrollout:\n"), ["rollout.top_k=4"])
    assert config.train == TrainConfig()
    assert config.rollout == RolloutConfig(top_k=4)


@pytest.mark.parametrize(
    "text", ["train: {max_steps: 1}\ntrain: {max_tokens: 5}", "train:\n  max_steps: 1\n  max_steps: 2"]
)
def test_key_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    """YAML would silently keep the last one."""
    with pytest.raises(UserError, match=r"(train|max_steps).* twice"):
        load_config(write(tmp_path, HEAD + text + "\n"))


def test_reward_funcs_may_be_a_name_a_mapping_or_a_list(tmp_path: Path) -> None:
    for value in ("exact", ["exact"], {"function": "exact"}, [{"function": "exact"}]):
        config = parse_config({**raw(), "rewards": {"reward_funcs": value}})
        assert [spec.function for spec in config.rewards.reward_funcs] == ["exact"]
        assert config.reward_names() == ["exact"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty, not a mapping of sections"),
        ("- a\n- b\n", "list"),
        ("just words", "str"),
        ("model: [", "not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(write(tmp_path, text))


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run_name: größe".encode("latin-1"))
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path / "latin.yaml")


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.max_steps=20", "train", "max_steps", 20),
        ("train.max_tokens=null", "train", "max_tokens", None),
        ("optim.learning_rate=2e-5", "optim", "learning_rate", 2e-5),
        ("optim.learning_rate=0.5", "optim", "learning_rate", 0.5),
        ("rollout.stop_token_ids=[2, 3]", "rollout", "stop_token_ids", [2, 3]),
        ("train.share_prefix=false", "train", "share_prefix", False),
        ("data.dataset_kwargs.size=7", "data", "dataset_kwargs", {"size": 7}),
        ("data.dataset_kwargs={size: 7, name: a=b}", "data", "dataset_kwargs", {"size": 7, "name": "a=b"}),
        (" model.revision = v1 ", "model", "revision", "v1"),
        ("data.system_prompt=", "data", "system_prompt", None),
        ('data.system_prompt="null"', "data", "system_prompt", "null"),
    ],
)
def test_override(tmp_path: Path, override: str, section: str, key: str, value: Any) -> None:
    config = load_config(write(tmp_path, raw(train={"max_tokens": 5})), [override])
    assert getattr(getattr(config, section), key) == value


def test_overrides_apply_in_order_and_keep_the_rest_of_the_section(tmp_path: Path) -> None:
    path = write(tmp_path, raw(train={"max_tokens": 5}))
    config = load_config(path, ["train.max_steps=1", "train.max_steps=2", "seed=9", "train={max_steps: 3}"])
    assert (config.seed, config.train) == (9, TrainConfig(max_steps=3))
    config = load_config(path, ["train.max_steps=1", "rollout.temperature=0.5"])
    assert (config.train.max_tokens, config.train.max_steps) == (5, 1)
    assert config.rollout == RolloutConfig(temperature=0.5)
    assert yaml.safe_load(path.read_text())["train"] == {"max_tokens": 5}


def test_override_leaves_a_section_alone_that_is_the_same_by_an_alias(tmp_path: Path) -> None:
    text = "data: &rows {dataset_name: d}\neval: *rows\nmodel: {model_name_or_path: m}\nalgorithm: {name: sft}\n"
    config = load_config(write(tmp_path, text), ["data.max_examples=5", "data.dataset_name=e"])
    assert (config.data.max_examples, config.data.dataset_name) == (5, "e")
    assert (config.eval.max_examples, config.eval.dataset_name) == (None, "d")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_steps", "is not of the form section.key=value"),
        ("=3", "is not of the form"),
        ("train.max_steps=[", "not valid YAML"),
        ("train.max_stps=3", r"unknown key 'train\.max_stps'; did you mean 'train\.max_steps'"),
        ("trian.max_steps=3", "unknown key 'trian'; did you mean 'train'"),
        ("seed.x=3", "'seed'"),
        ("train.max_tokens.x=3", "'max_tokens' is not a section"),
        ("train=3", "train: .*given: 3"),
        ("train.max_steps=many", "train.max_steps: .*'many'"),
        ("rollout.num_generations=1", "at least 2"),
    ],
)
def test_wrong_override_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(write(tmp_path, raw(train={"max_tokens": 5}, seed=1)), [override])


# --- file names -------------------------------------------------------------------------------------------------------


def test_names_of_files_beside_the_config_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    for folder in (home / "weights", home / "adapter", elsewhere):
        folder.mkdir(parents=True)
    for name in ("rows.jsonl", "rewards.py", "rows.py", "chat.jinja", "held out.csv"):
        (home / name).touch()
    mapping = raw(
        output_dir="out",
        model={"model_name_or_path": "weights", "chat_template": "chat.jinja"},
        lora={"init_from": "adapter"},
        data={"dataset_name": "rows.jsonl"},
        eval={"dataset_name": "held out.csv"},
        warmup={"dataset_name": "rows.py:make"},
        rewards={"reward_funcs": ["rewards.py:right", {"function": "rewards.py:short"}, "exact"]},
    )
    path = write(home, mapping)
    monkeypatch.chdir(elsewhere)
    config = load_config(Path("../configs/run.yaml"))
    assert config.model.model_name_or_path == str(home / "weights")
    assert config.model.chat_template == str(home / "chat.jinja")
    assert config.lora.init_from == str(home / "adapter")
    assert config.data.dataset_name == str(home / "rows.jsonl")
    assert config.eval.dataset_name == str(home / "held out.csv")
    assert config.warmup.dataset_name == f"{home / 'rows.py'}:make"
    assert [s.function for s in config.rewards.reward_funcs] == [
        f"{home / 'rewards.py'}:right",
        f"{home / 'rewards.py'}:short",
        "exact",
    ]
    assert config.reward_names() == ["right", "short", "exact"]
    assert config.output_dir == "out"
    save_config(config, elsewhere / "config.yaml")
    assert load_config(elsewhere / "config.yaml") == config == load_config(path)


def test_names_that_are_no_files_stay(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    mapping = raw(
        model={"model_name_or_path": "pkg://m/FILE.gguf"},
        data={"dataset_name": "absent.jsonl"},
        rewards={"reward_funcs": ["absent.py:f", "pkg.module:g"]},
    )
    config = load_config(write(tmp_path, mapping))
    assert config.model.model_name_or_path == "pkg://m/FILE.gguf"
    assert config.data.dataset_name == "absent.jsonl"
    assert [s.function for s in config.rewards.reward_funcs] == ["absent.py:f", "pkg.module:g"]


@pytest.mark.parametrize("name", ["~no-such-user/rows.jsonl", "x" * 5000, "a\0b", "~nobody-at-all.py:f"])
def test_names_that_no_file_can_have_stay(tmp_path: Path, name: str) -> None:
    config = load_config(write(tmp_path, raw(data={"dataset_name": name})))
    assert config.data.dataset_name == name


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_config_table", ROOT / "docs" / "make_config_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", list(all_models()))
def test_every_field_says_what_it_means(place: str) -> None:
    model = all_models()[place]
    assert model.__doc__
    assert model.__doc__.strip()
    for key, field in model.model_fields.items():
        if key not in SECTIONS or place:
            assert field.description, f"{place}.{key} has no docstring"
            assert field.description.rstrip().endswith((".", "`")), f"{place}.{key}: {field.description!r}"


def test_written_reference_is_up_to_date(table: ModuleType) -> None:
    assert table.TARGET.read_text(encoding="utf-8") == table.render(), "run `make docs`"


def test_written_reference_has_every_key_with_its_own_default() -> None:
    """Read back from the file without the renderer: each default in it, as YAML, is the model's."""
    rows: dict[tuple[str, str], str] = {}
    place = ""
    for line in (ROOT / "docs" / "config.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            place = "" if line == "## Top level" else line.split("`")[1]
        elif line.startswith("| `"):
            key, _, default, meaning = (cell.strip() for cell in line.strip("|").split(" | ", 3))
            assert meaning, f"{place}.{key} has no meaning"
            rows[place, key.strip("` ")] = default
    expected = {
        (place, key): field
        for place, model in all_models().items()
        for key, field in model.model_fields.items()
        if place or key not in SECTIONS
    }
    assert rows.keys() == expected.keys()
    for where, field in expected.items():
        if field.is_required():
            assert rows[where] == "(required)"
            continue
        written, default = yaml.safe_load(rows[where].strip("`")), field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):  # a section within a section
            written = type(default).model_validate(written)
        assert (float(written) if isinstance(default, float) else written) == default, where


def test_reference_changes_with_the_models(table: ModuleType) -> None:
    """The renderer reads the models: a field with other values renders as another row."""

    class Odd(Section):
        """An odd
        section."""

        width: int = 3
        """Wide | narrow."""

    text = table._section("`odd`", Odd)
    assert "An odd section." in text
    assert "| `width` | integer | `3` | Wide \\| narrow. |" in text
    assert "number > 0" in table._section("`optim`", OptimConfig)
    assert "| `max_mean` | number > 0 or null |" in table._section("`parity`", ParityConfig)


def test_every_example_loads() -> None:
    examples = sorted((ROOT / "examples").rglob("*.yaml"))
    assert examples, "examples/ holds no config"
    names = [load_config(path).run_name for path in examples]
    assert len(set(names)) == len(names), f"two examples write the same run folder: {names}"


def test_off_without_quotes_is_a_word(tmp_path):
    base = {
        "model": {"model_name_or_path": "m"},
        "data": {"dataset_name": "d"},
        "rewards": {"reward_funcs": ["length"]},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(base)[:-1] + ', "parity": {action: off}}')
    assert load_config(tmp_path / "c.yaml").parity.action == "off"
    assert load_config(tmp_path / "c.yaml", ["parity.action=off"]).parity.action == "off"
