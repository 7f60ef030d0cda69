"""Everything that a run reads, checked and tokenised before a model is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from tandem.rewards.base import Reward, load_function, load_reward
from tandem.rewards.call import check_required, given_columns
from tandem.rewards.known_answer import ANSWER_COLUMNS, no_known_answers
from tandem.rewards.math_answer import math_answer
from tandem.rewards.text_match import exact_match, fuzzy_match
from tandem.rl.adapter_files import check_adapter_files
from tandem.rl.chat import completion_text, encode, render, with_system_prompt
from tandem.rl.columns import Kind, check_columns
from tandem.rl.config import AlgorithmConfig, Config, DataConfig, EvalConfig, WarmupConfig
from tandem.rl.console import Console
from tandem.rl.context_length import check_context
from tandem.rl.errors import UserError, cause
from tandem.rl.evaluate import Judge
from tandem.rl.examples import load_labelled, load_preferences, load_supervised
from tandem.rl.ignored_keys import say_ignored
from tandem.rl.library_imports import collector_off
from tandem.rl.model import load_tokenizer
from tandem.rl.optim import check_optimizer
from tandem.rl.policy_loss import LossValue, PolicyTokens, custom_policy_loss, policy_loss
from tandem.rl.preference_loss import PreferenceOptions, check_options
from tandem.rl.preference_step import Answers
from tandem.rl.prompts import load_prompts
from tandem.rl.rows import load_rows
from tandem.rl.samples import Prompt
from tandem.rl.step import Objective
from tandem.rl.training_data import TrainingData
from tandem.rollout.chat_turns import ChatTurns
from tandem.rollout.engine import RolloutEngine
from tandem.rollout.environments import Environments
from tandem.rollout.episodes import EpisodeEngine, EpisodeLimits
from tandem.rollout.tool_calls import ParsedTurn, choose_format, parse_turn


@dataclass
class Inputs:
    """What a run reads, checked and tokenised, before a model is loaded."""

    tokenizer: Any
    data: TrainingData
    judge: Judge
    objective: Objective
    environments: Environments | None = None


def prepare(config: Config, console: Console) -> Inputs:
    """Read the data sets, load the rewards, tokenise.

    Raises:
        UserError: anything in them that the run would trip over.
    """
    quiet_libraries()
    say_ignored(config, console)
    check_optimizer(config.optim, on_gpu=config.model.device != "cpu" and torch.cuda.is_available())
    train_rows = _rows(config.data, config.data.dataset_train_split, "data")
    eval_rows = _rows(config.eval, config.eval.dataset_test_split, "eval") if config.eval.dataset_name else None
    kind = _kind(config)
    environments = _environments(config)
    if config.environment.factory is not None:
        train_rows, eval_rows = _with_prompts(train_rows), _with_prompts(eval_rows)
    check_columns(train_rows, kind, "data.dataset_name")
    if eval_rows is not None:
        check_columns(eval_rows, kind, "eval.dataset_name")
    warmup_rows = _warmup_rows(config)
    if kind in ("preference", "labelled") or config.algorithm.name == "online_dpo":
        options = PreferenceOptions(**config.preference.model_dump(exclude={"loss_type"}))
        check_options(config.preference.loss_type, options)
    rewards = [
        load_reward(s.function, name=s.name, weight=s.weight, kwargs=s.kwargs, scope=s.scope)
        for s in config.rewards.reward_funcs
    ]
    watched = [load_reward(s.function, name=s.name, kwargs=s.kwargs) for s in config.rewards.watch_funcs]
    objective = _objective(config)
    if config.lora.init_from:
        check_adapter_files(config.lora.init_from)
    tokenizer = load_tokenizer(config.model)
    data = TrainingData(warmup=_examples(warmup_rows, tokenizer, config, console))
    if kind == "rl":
        data.prompts = _prompts(train_rows, tokenizer, config, console, environments)
        data.eval_prompts = _prompts(eval_rows, tokenizer, config, console, environments)
    elif kind == "sft":
        data.examples = _examples(train_rows, tokenizer, config, console)
        data.eval_examples = _examples(eval_rows, tokenizer, config, console)
    else:
        data.answers = _answers(train_rows, tokenizer, config)
        data.eval_answers = None if eval_rows is None else _answers(eval_rows, tokenizer, config)
    check_context(config, data, console)
    _check_rewards(rewards, data.prompts, "the data set")
    _check_rewards(rewards, data.eval_prompts, "the evaluation data set")
    section = config.rewards
    judge = Judge(
        rewards,
        tokenizer,
        section.timeout,
        on_missing=section.on_missing,
        on_error=section.on_error,
        watched=watched,
        overlap=section.overlap,
        warn=console.warn,
    )
    return Inputs(tokenizer, data, judge, objective, environments)


def _check_rewards(rewards: list[Reward], prompts: list[Prompt], data: str) -> None:
    """Raises UserError where a reward needs a column that the prompts lack; `data` names where they are from."""
    if not prompts:
        return
    columns = given_columns(prompts[0].columns)
    for reward in rewards:
        check_required(reward, columns, data)
        # These take the known answer from any of several columns, and so require none of them.
        known = reward.function in (math_answer, exact_match, fuzzy_match)
        if known and not {*columns, *reward.kwargs}.intersection(ANSWER_COLUMNS):
            raise no_known_answers(reward.name, columns, data)


def _environments(config: Config) -> Environments | None:
    """What the config lets the model play with; None: its completions are single turns."""
    section = config.environment
    if not section.enabled:
        return None
    named: Any = section.factory if isinstance(section.factory, dict) else {None: section.factory}
    factories = {name: load_function(spec, "environment") for name, spec in named.items() if spec is not None}
    return Environments(factories, [load_function(spec, "tool") for spec in section.tools], section.kwargs)


def _with_prompts(rows: Any) -> Any:
    """Rows whose prompt the environment's `reset` writes may have none of their own."""
    if rows is None or "prompt" in rows.column_names:
        return rows
    return rows.add_column("prompt", [[{"role": "user", "content": ""}]] * len(rows))


def with_environments(
    engine: RolloutEngine, config: Config, inputs: Inputs, ends: tuple[int, ...], max_length: int
) -> RolloutEngine:
    """The engine, or one that plays episodes by it where the config has an environment or tools.

    Args:
        ends: tokens by which the model ends a turn. max_length: of prompt and completion, in tokens.
    """
    environments, section, tokenizer = inputs.environments, config.environment, inputs.tokenizer
    if environments is None:
        return engine
    template = tokenizer.get_chat_template(tools=environments.common_schemas)
    kind = choose_format(section.tool_format, template) if environments.uses_tools else None

    def render_turns(messages: Any, *, add_generation_prompt: bool, tools: Any) -> str:
        messages = with_system_prompt(messages, config.data.system_prompt)
        kwargs = config.model.chat_template_kwargs | ({"tools": tools} if tools else {})
        return render(tokenizer, messages, add_generation_prompt=add_generation_prompt, kwargs=kwargs)

    def parse(ids: list[int]) -> ParsedTurn:
        text = completion_text(tokenizer, ids)
        if kind is None:
            return ParsedTurn(text)
        spoken = ids[:-1] if ids and ids[-1] in ends else ids
        return parse_turn(tokenizer.decode(spoken, clean_up_tokenization_spaces=False), text, kind)

    turns = ChatTurns(
        render_turns,
        lambda text: encode(tokenizer, [text], rendered=True)[0],
        {token: tokenizer.decode([token]) for token in ends},
        reasons="</think>" in template,
    )
    limits = EpisodeLimits(
        max_turns=section.max_turns,
        max_turn_tokens=section.max_turn_tokens,
        max_length=max_length,
        step_timeout=section.step_timeout,
        episode_timeout=section.episode_timeout,
        num_workers=section.num_workers,
        stop_on_fault=section.on_error == "stop",
    )
    return EpisodeEngine(engine, environments, turns, parse, limits)


def prepare_replay(config: Config, prompts: list[Prompt], console: Console) -> Inputs:
    """What a replay of journalled rollouts reads: no data set and no rewards, only a warm-up's examples."""
    quiet_libraries()
    say_ignored(config, console)
    warmup_rows = _warmup_rows(config)
    tokenizer = load_tokenizer(config.model)
    data = TrainingData(prompts=prompts, warmup=_examples(warmup_rows, tokenizer, config, console))
    return Inputs(tokenizer, data, Judge([], tokenizer, config.rewards.timeout), _objective(config))


def _warmup_rows(config: Config) -> Any:
    """The examples of the warm-up, checked; None: there is none."""
    if not config.warmup.max_steps:
        return None
    rows = _rows(config.warmup, config.warmup.dataset_train_split, "warmup")
    check_columns(rows, "sft", "warmup.dataset_name")
    return rows


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


def _prompts(
    rows: Any, tokenizer: Any, config: Config, console: Console, environments: Environments | None
) -> list[Prompt]:
    if rows is None:
        return []
    tools = environments.common_schemas if environments else None
    limit, key, completion = config.data.max_prompt_length, "data.max_prompt_length", 0
    if limit is None and config.model.max_length is not None:
        key, completion = "model.max_length", config.rollout.max_completion_length
        limit = config.model.max_length - completion
    prompts, dropped = load_prompts(
        rows,
        tokenizer,
        system_prompt=config.data.system_prompt,
        max_prompt_length=limit,
        limited_by=(key, completion),
        chat_template_kwargs=config.model.chat_template_kwargs | ({"tools": tools} if tools else {}),
    )
    if environments:
        for prompt in prompts:
            environments.check_row(prompt)
    if dropped:
        console.warn(f"{dropped} prompts are longer than {limit} tokens and left out ({key})")
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

    with collector_off():
        import datasets
        import transformers

    # Deprecations between transformers, peft, vLLM and PyTorch are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|vllm)\.")
    # Autograd's thread may multiply before anything else, which makes the context that it says is missing.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    datasets.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # bitsandbytes looks for a kernel on the hub when it is imported, by a model of any precision, and warns without it.
    for name in ("huggingface_hub", "kernels", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
