"""Which keys of a config an algorithm reads, so that the ones that were set for nothing can be said."""

from __future__ import annotations

from typing import get_args

from tandem.rl.config import Config
from tandem.rl.console import Console
from tandem.rl.sections import AlgorithmConfig, Section

_ALL = set(get_args(AlgorithmConfig.model_fields["name"].annotation))
_ROLLOUTS = {"grpo", "online_dpo"}
_EXAMPLES = {"sft", "warm-up"}  # a run of any algorithm may begin with a warm-up

# Who reads a section, or a key for which that is not what holds for its section. All read what is not here.
_READERS: dict[str, set[str]] = {
    "rollout": _ROLLOUTS,
    "environment": _ROLLOUTS,
    "rewards": _ROLLOUTS,
    "parity": _ROLLOUTS,
    "watch": _ROLLOUTS,
    "preference": {"dpo", "online_dpo"},
    "algorithm": {"grpo"},
    "algorithm.name": _ALL,
    "algorithm.label_smoothing_factor": _EXAMPLES,
    "algorithm.z_loss_coef": _EXAMPLES,
    # Advantages, which stand in what online_dpo records of its completions.
    "algorithm.advantage_estimator": _ROLLOUTS,
    "algorithm.scale_rewards": _ROLLOUTS,
    "algorithm.multi_objective_aggregation": _ROLLOUTS,
    "data.max_prompt_length": _ROLLOUTS,
    "data.curriculum": _ROLLOUTS,
    "data.completion_only_loss": _EXAMPLES,
    "data.assistant_only_loss": _EXAMPLES,
    "train.generation_batch_size": _ROLLOUTS,
    "train.steps_per_generation": {"grpo"},
    "train.per_device_train_batch_size": {"sft", "dpo"},
    "train.share_prefix": _ROLLOUTS,
    "eval.num_generations": _ROLLOUTS,
    "eval.temperature": _ROLLOUTS,
    "eval.score": _ROLLOUTS,
    "log.log_completions": _ROLLOUTS,
    "log.num_completions_to_print": _ROLLOUTS,
    "checkpoint.journal": _ROLLOUTS,
}
# What a plan, which reads no data, takes the length of sequences from whatever the algorithm.
_PLANNED_BY = {"data.max_prompt_length", "rollout.max_completion_length"}


def ignored_keys(config: Config) -> list[str]:
    """Dotted names of the keys that were set and that the config's algorithm does not read, in the config's order."""
    name = config.algorithm.name
    running = {name, "warm-up"} if config.warmup.max_steps else {name}
    found = []
    for section_name in type(config).model_fields:
        section = getattr(config, section_name)
        if not isinstance(section, Section):
            continue
        for key in _set_in(section):
            full = f"{section_name}.{key}"
            readers = _READERS.get(full, _READERS.get(section_name, _ALL))
            if readers.isdisjoint(running):
                found.append(full)
    return found


def ignored_note(config: Config, *, plan: bool = False) -> str:
    """What to tell the user of such keys; empty where there are none.

    Args:
        plan: nothing but a plan is made of the config.
    """
    keys = [key for key in ignored_keys(config) if not (plan and key in _PLANNED_BY)]
    if not keys:
        return ""
    names = f"{', '.join(keys[:-1])} and {keys[-1]} have" if len(keys) > 1 else f"{keys[0]} has"
    return f"{names} no effect with algorithm.name={config.algorithm.name}"


def say_ignored(config: Config, console: Console, *, plan: bool = False) -> None:
    """Tell the user, where there is something to tell."""
    if said := ignored_note(config, plan=plan):
        console.note(said)


def _set_in(section: Section) -> list[str]:
    """Keys that the user has set. Where every key is written out, as in a run's own config.yaml, it is those that are
    not at their default."""
    fields = type(section).model_fields
    if section.model_fields_set < fields.keys():
        return [key for key in fields if key in section.model_fields_set]
    return [k for k, field in fields.items() if getattr(section, k) != field.get_default(call_default_factory=True)]
