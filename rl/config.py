"""The configuration of a run: typed, torch-free, every field documented where it stands.

Keys are TRL's where TRL has one. Unknown keys are refused with the nearest right name, and values are checked
across fields when the file is read, long before a model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from tandem.rl.environment_config import EnvironmentConfig
from tandem.rl.model_config import ModelConfig
from tandem.rl.reward_config import RewardsConfig, RewardSpec, WatchSpec
from tandem.rl.sections import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    OptimConfig,
    ParityConfig,
    PreferenceConfig,
    RolloutConfig,
    Section,
    TrainConfig,
    WarmupConfig,
)
from tandem.rl.watch_config import WatchConfig

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ParityConfig",
    "PreferenceConfig",
    "RewardSpec",
    "RewardsConfig",
    "RolloutConfig",
    "Section",
    "TrainConfig",
    "WarmupConfig",
    "WatchConfig",
    "WatchSpec",
]


class Config(Section):
    """A whole run."""

    run_name: str = "run"
    """Name of the run folder inside `output_dir` and of the run in wandb."""
    output_dir: str = "runs"
    """Folder that holds run folders."""
    seed: int = 0
    """Seeds the adapter's start, the data order and every completion's own random stream."""
    model: ModelConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    rewards: RewardsConfig = Field(default_factory=RewardsConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    parity: ParityConfig = Field(default_factory=ParityConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    warmup: WarmupConfig = Field(default_factory=WarmupConfig)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, value: Any) -> Any:
        """A section whose keys are all commented out reads as null."""
        if not isinstance(value, dict):
            return value
        plain = ("run_name", "output_dir", "seed")
        return {k: {} if v is None and k in cls.model_fields and k not in plain else v for k, v in value.items()}

    @field_validator("run_name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or value in (".", "..") or any(c in value for c in "/\\\0"):
            raise ValueError(f"{value!r} is not a plain folder name; use letters, digits, '.', '_' and '-'")
        return value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Config:
        if self.data.dataset_name is None:
            raise ValueError("data.dataset_name is missing: name a hub data set, a file or FILE.py:FUNCTION")
        if self.model.load_in_4bit and self.model.load_in_8bit:
            raise ValueError("model.load_in_4bit and model.load_in_8bit are both on: leave one of them on")
        if self.model.dtype == "float16" and self.model.quantised_to == "int4":
            raise ValueError(
                "model.dtype is float16, and model.weight_format is int4, whose scales are bfloat16: use nf4, or "
                "model.dtype=bfloat16"
            )
        if self.uses_rollouts:
            self._check_rl()
        elif self.environment.enabled:
            raise ValueError(
                f"the section environment is for rollouts, and algorithm.name is {self.algorithm.name!r}: remove "
                "it, or use grpo or online_dpo"
            )
        if self.data.curriculum.enabled and not self.uses_rollouts:
            name = self.algorithm.name
            raise ValueError(f"data.curriculum is for rollouts, and algorithm.name is {name!r}: remove the section")
        if self.algorithm.name == "online_dpo" and self.preference.loss_type == "kto":
            raise ValueError(
                "preference.loss_type is 'kto', but online_dpo makes pairs: use sigmoid or another loss on pairs"
            )
        if self.algorithm.name == "dpo" and self.algorithm.beta:
            raise ValueError(
                f"algorithm.beta is {self.algorithm.beta:g}, which dpo does not use (it weighs GRPO's KL term): set "
                "preference.beta, and leave algorithm.beta out"
            )
        if self.warmup.max_steps and self.warmup.dataset_name is None:
            raise ValueError(
                f"warmup.max_steps is {self.warmup.max_steps} but warmup.dataset_name is missing: "
                "name the examples to imitate, or set warmup.max_steps to 0"
            )
        return self

    def _check_rl(self) -> None:
        group, batch = self.rollout.num_generations, self.generation_batch_size
        if group < 2:
            raise ValueError(
                f"rollout.num_generations is {group}: an advantage compares the completions of one prompt, "
                "so at least 2 are needed"
            )
        if batch % group:
            below, above = batch // group * group, (batch // group + 1) * group
            raise ValueError(
                f"train.generation_batch_size is {batch}, which is no multiple of rollout.num_generations ({group}): "
                f"groups must be whole, so use {f'{below} or ' if below else ''}{above}"
            )
        size, default = self.train.per_device_train_batch_size, TrainConfig().per_device_train_batch_size
        if size != default:
            raise ValueError(
                f"train.per_device_train_batch_size is {size}, which {self.algorithm.name} does not use: set "
                "train.generation_batch_size (completions of a rollout) and train.steps_per_generation (updates that "
                "share them); memory is bounded by train.max_tokens"
            )
        prompts = batch // group
        if prompts % self.train.steps_per_generation:
            raise ValueError(
                f"train.steps_per_generation is {self.train.steps_per_generation}, but a rollout batch holds {prompts} "
                f"prompts ({batch} completions / {group} generations): use a divisor of {prompts}"
            )
        if self.algorithm.loss_type == "cispo" and (self.algorithm.epsilon_high or 0) < 1:
            raise ValueError(
                f"algorithm.epsilon_high is {self.algorithm.epsilon_high}: for cispo it is the largest ratio, "
                "so it must be at least 1, for example 5"
            )
        self._check_numerics()
        self._check_turns()
        if self.environment.factory is not None and not self.rewards.reward_funcs:
            self.rewards.reward_funcs = [RewardSpec(function="environment")]
        if not self.rewards.reward_funcs:
            raise ValueError("rewards.reward_funcs is empty: RL needs at least one reward function")
        names = self.reward_names()
        every = names + self.watch_names()
        if twice := sorted({n for n in every if every.count(n) > 1}):
            raise ValueError(f"two reward functions are named {twice[0]!r}: give one of them a `name`")
        if self.eval.score is not None and self.eval.score not in names:
            raise ValueError(f"eval.score is {self.eval.score!r}, but the rewards are named {', '.join(names)}")
        for key in ("format_rewards", "answer_rewards"):
            if wrong := [name for name in getattr(self.watch, key) or [] if name not in every]:
                raise ValueError(f"watch.{key} names {wrong[0]!r}, but the rewards are named {', '.join(every)}")
        if self.environment.factory is None and any(s.function == "environment" for s in self.rewards.reward_funcs):
            raise ValueError("the reward 'environment' is the environment's own, and environment.factory is missing")
        limit = self.model.max_length
        if limit is not None and self.rollout.max_completion_length >= limit:
            raise ValueError(
                f"rollout.max_completion_length ({self.rollout.max_completion_length}) leaves no room for a prompt "
                f"within model.max_length ({limit})"
            )

    def _check_numerics(self) -> None:
        """A stock vLLM must be able to compute on these weights, and in this type."""
        format, dtype = self.model.quantised_to, self.model.dtype
        if self.rollout.numerics == "trainer":
            return
        if self.rollout.engine == "transformers":
            reason = "rollout.engine is transformers, which it says nothing of: use vllm"
        elif format in ("int4", "fp8"):
            reason = f"the weights are {format}, which no stock vLLM has: use nf4 or unquantised weights"
        elif format == "nf4" and dtype in ("float16", "float32"):
            reason = f"stock vLLM multiplies 4-bit weights in bfloat16 also where model.dtype is {dtype}: use bfloat16"
        else:
            return
        raise ValueError(f"rollout.numerics is 'stock', and {reason}, or leave it out")

    def _check_turns(self) -> None:
        algorithm = self.algorithm
        if algorithm.advantage_level == "episode":
            if algorithm.turn_discount != 1:
                raise ValueError(
                    f"algorithm.turn_discount is {algorithm.turn_discount:g}, which matters for turns only: set "
                    "algorithm.advantage_level to turn, or leave it out"
                )
            return
        if not self.environment.enabled:
            raise ValueError(
                "algorithm.advantage_level is 'turn', and completions are single turns: set environment.factory or "
                "environment.tools, or use episode"
            )
        if algorithm.name != "grpo":
            raise ValueError(
                f"algorithm.advantage_level is 'turn', and {algorithm.name} compares whole completions: use episode"
            )
        if algorithm.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "algorithm.advantage_level is 'turn', and normalize_then_sum standardises rewards of whole episodes: "
                "set algorithm.multi_objective_aggregation to sum_then_normalize, or use episode"
            )

    def reward_names(self) -> list[str]:
        return [spec.label for spec in self.rewards.reward_funcs]

    def watch_names(self) -> list[str]:
        return [spec.label for spec in self.rewards.watch_funcs]

    @property
    def uses_rollouts(self) -> bool:
        """Whether completions are sampled and rewarded."""
        return self.algorithm.name in ("grpo", "online_dpo")

    @property
    def generation_batch_size(self) -> int:
        """Completions per rollout."""
        return self.train.generation_batch_size or 8 * self.rollout.num_generations

    @property
    def prompts_per_rollout(self) -> int:
        return self.generation_batch_size // self.rollout.num_generations

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.run_name
