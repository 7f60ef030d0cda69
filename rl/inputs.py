"""Everything that a run reads, checked and tokenised before a model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from tandem.rewards.base import load_function, load_reward
from tandem.rl.columns import Kind, check_columns
from tandem.rl.config import AlgorithmConfig, Config, DataConfig, EvalConfig, WarmupConfig
from tandem.rl.console import Console
from tandem.rl.errors import UserError, cause
from tandem.rl.evaluate import Judge
from tandem.rl.examples import load_labelled, load_preferences, load_supervised
from tandem.rl.model import load_tokenizer
from tandem.rl.policy_loss import LossValue, PolicyTokens, custom_policy_loss, policy_loss
from tandem.rl.preference_loss import PreferenceOptions, check_options
from tandem.rl.preference_step import Answers
from tandem.rl.prompts import load_prompts
from tandem.rl.rows import load_rows
from tandem.rl.step import Objective
from tandem.rl.trainer import TrainingData


@dataclass
class Inputs:
    """What a run reads, checked and tokenised, before a model is loaded."""

    tokenizer: Any
    data: TrainingData
    judge: Judge
    objective: Objective


def prepare(config: Config, console: Console) -> Inputs:
    """Read the data sets, load the rewards, tokenise.

    Raises:
        UserError: anything in them that the run would trip over.
    """
    quiet_libraries()
    train_rows = _rows(config.data, config.data.dataset_train_split, "data")
    eval_rows = _rows(config.eval, config.eval.dataset_test_split, "eval") if config.eval.dataset_name else None
    warmup_rows = _rows(config.warmup, config.warmup.dataset_train_split, "warmup") if config.warmup.max_steps else None
    kind = _kind(config)
    check_columns(train_rows, kind, "data.dataset_name")
    if eval_rows is not None:
        check_columns(eval_rows, kind, "eval.dataset_name")
    if warmup_rows is not None:
        check_columns(warmup_rows, "sft", "warmup.dataset_name")
    if kind in ("preference", "labelled") or config.algorithm.name == "online_dpo":
        options = PreferenceOptions(**config.preference.model_dump(exclude={"loss_type"}))
        check_options(config.preference.loss_type, options)
    rewards = [
        load_reward(s.function, name=s.name, weight=s.weight, kwargs=s.kwargs) for s in config.rewards.reward_funcs
    ]
    objective = _objective(config)
    tokenizer = load_tokenizer(config.model)
    data = TrainingData(warmup=_examples(warmup_rows, tokenizer, config, console))
    if kind == "rl":
        data.prompts = _prompts(train_rows, tokenizer, config, console)
        data.eval_prompts = _prompts(eval_rows, tokenizer, config, console)
    elif kind == "sft":
        data.examples = _examples(train_rows, tokenizer, config, console)
        data.eval_examples = _examples(eval_rows, tokenizer, config, console)
    else:
        data.answers = _answers(train_rows, tokenizer, config)
        data.eval_answers = None if eval_rows is None else _answers(eval_rows, tokenizer, config)
    return Inputs(tokenizer, data, Judge(rewards, tokenizer, config.rewards.timeout), objective)


def _kind(config: Config) -> Kind:
    if config.uses_rollouts:
        return "rl"
    if config.algorithm.name == "sft":
        return "sft"
    return "labelled" if config.preference.loss_type == "kto" else "preference"


def _objective(config: Config) -> Objective:
    """The objective of loss_type, or the user's own function with its errors explained."""
    spec = config.algorithm.loss
    if spec is None:
        return policy_loss
    function = load_function(spec, "loss function")

    def own(tokens: PolicyTokens, options: AlgorithmConfig) -> LossValue:
        try:
            return custom_policy_loss(tokens, options, function)
        except Exception as error:
            raise UserError(
                f"loss function {spec!r} failed: {cause(error)}",
                fix="it gets (tokens, algorithm) and returns a scalar tensor that depends on tokens.log_probs",
            ) from error

    return own


def _rows(section: DataConfig | EvalConfig | WarmupConfig, split: str, name: str) -> Any:
    assert section.dataset_name is not None
    return load_rows(
        section.dataset_name,
        config_name=section.dataset_config,
        split=split,
        kwargs=section.dataset_kwargs,
        max_examples=getattr(section, "max_examples", None),
        what=f"{name}.dataset_name",
    )


def _answers(rows: Any, tokenizer: Any, config: Config) -> Answers:
    common: dict[str, Any] = {
        "max_length": config.model.max_length,
        "system_prompt": config.data.system_prompt,
        "chat_template_kwargs": config.model.chat_template_kwargs,
    }
    if _kind(config) == "labelled":
        labelled = load_labelled(rows, tokenizer, **common)
        return Answers([sequence for sequence, _ in labelled], [label for _, label in labelled])
    return Answers([sequence for pair in load_preferences(rows, tokenizer, **common) for sequence in pair])


def _prompts(rows: Any, tokenizer: Any, config: Config, console: Console) -> list:
    if rows is None:
        return []
    limit = config.data.max_prompt_length
    if limit is None and config.model.max_length is not None:
        limit = config.model.max_length - config.rollout.max_completion_length
    prompts, dropped = load_prompts(
        rows,
        tokenizer,
        system_prompt=config.data.system_prompt,
        max_prompt_length=limit,
        chat_template_kwargs=config.model.chat_template_kwargs,
    )
    if dropped:
        console.warn(f"{dropped} prompts are longer than {limit} tokens and left out (data.max_prompt_length)")
    return prompts


def _examples(rows: Any, tokenizer: Any, config: Config, console: Console) -> list:
    if rows is None:
        return []
    examples, changed = load_supervised(
        rows,
        tokenizer,
        completion_only_loss=config.data.completion_only_loss,
        assistant_only_loss=config.data.assistant_only_loss,
        max_length=config.model.max_length,
        system_prompt=config.data.system_prompt,
        chat_template_kwargs=config.model.chat_template_kwargs,
    )
    if changed:
        console.warn(f"{changed} examples are longer than model.max_length and were cut or left out")
    return examples


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries would tear our own live display apart."""
    import warnings

    import datasets
    import transformers

    # Deprecations between transformers and peft are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    datasets.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
