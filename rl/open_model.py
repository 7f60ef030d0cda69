"""The model with its adapter and layers, and its engine, as a run starts with them, sized for the GPU."""

from __future__ import annotations

import torch

from tandem.rl import distributed
from tandem.rl.checkpoint_offload import CheckpointedLayers
from tandem.rl.config import Config
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.fused_layer import FusedLayers, LayerPlan
from tandem.rl.inputs import Inputs, with_environments
from tandem.rl.lora import attach_lora
from tandem.rl.model import LanguageModel, check_packing, load_model
from tandem.rl.packing import default_max_tokens
from tandem.rl.plan import changed
from tandem.rl.plan_command import SIZE_HEADER, size_rows, summary, verdict
from tandem.rl.plan_devices import Device, gpu_here
from tandem.rl.plan_engine import engine_of_auto
from tandem.rl.plan_shape import read_shape
from tandem.rl.plan_sizing import Sizing, choose_sizes
from tandem.rl.start_time import StartTime
from tandem.rl.training_data import longest_sequence
from tandem.rl.weights import resolve_model
from tandem.rollout.choose_engine import open_engine
from tandem.rollout.engine import RolloutEngine
from tandem.rollout.vllm_plan import IN_FLIGHT, VllmOptions, rounded_length
from tandem.rollout.vllm_versions import refusal as vllm_refusal


def open_model(
    config: Config, inputs: Inputs, console: Console, start: StartTime | None = None, *, completions: int | None = None
) -> tuple[LanguageModel, RolloutEngine, tuple[int, ...], Config]:
    """The model with its adapter, the engine and the tokens that end a completion; the config with sizes for the GPU
    that is here, if there is one.

    Args:
        start: told when model and engine are there. completions: all that are sampled, where it is not
            those of the config's whole run.
    """
    from tandem.rl.chat import stop_token_ids

    wanted = _wanted_engine(config)
    config = sized(config, wanted, inputs, console, completions=completions)
    lm = load_model(config.model, inputs.tokenizer, shared=wanted != "transformers" and vllm_refusal() is None)
    for note in lm.notes:
        console.note(note)
    attach_lora(lm, config.lora, seed=config.seed)
    attach_layers(lm, config, console)
    if lm.fused is None:
        check_packing(lm)
    if start is not None:
        start.done("model")
    ends = stop_token_ids(lm.tokenizer, lm.causal_lm.generation_config)
    stop = stop_token_ids(lm.tokenizer, lm.causal_lm.generation_config, config.rollout.stop_token_ids)
    engine = open_engine(
        wanted,
        lm,
        store=lm.store,
        source=resolve_model(config.model.model_name_or_path) if config.model.rope_scaling.factor is None else None,
        load_in_4bit=config.model.load_in_4bit,
        options=vllm_options(config, inputs),
        max_in_flight=config.rollout.max_in_flight,
        note=console.note,
        warn=console.warn,
    )
    if start is not None:
        start.done("engine")
    longest = getattr(engine, "max_model_len", None) or lm.max_length
    return lm, with_environments(engine, config, inputs, ends, longest), stop, config


def sized(
    config: Config,
    engine: str,
    inputs: Inputs,
    console: Console,
    device: Device | None = None,
    *,
    completions: int | None = None,
) -> Config:
    """Sizes that the config leaves open, chosen from the plan on a GPU and told; on a CPU nothing is.

    Args:
        device: the card to choose for; None: the one that is here. completions: see `open_model`.

    They are chosen anew at every start and not kept in the run's config, so that a run may go on on another card.
    """
    sizing = _sizing(config, engine, inputs, console, device, completions)
    if sizing is None:
        return config
    device = sizing.plan.device
    if sizing.chosen:
        console.note(f"sizes for {device.name}, {device.memory_gib:.1f} GiB free: {sizing}")
    _tell(sizing, console)
    return changed(config, sizing.changes)


def show_sizes(config: Config, inputs: Inputs, console: Console) -> None:
    """What a run would choose here, and why."""
    sizing = _sizing(config, _wanted_engine(config), inputs, console)
    if sizing is None:
        if gpu_here() is None and (config.model.device == "cuda" or _wanted_engine(config) == "vllm"):
            console.warn("the config asks for a GPU (model.device or rollout.engine), and torch sees none here")
        size = config.train.max_tokens or default_max_tokens("cpu")
        console.note(f"without a GPU no size is chosen: packs have up to {size:,} tokens (rl-train plan --gpu CARD)")
        return
    console.table(f"Sizes for {sizing.plan.device.name}", size_rows(sizing), SIZE_HEADER)
    _tell(sizing, console)


def _sizing(
    config: Config,
    engine: str,
    inputs: Inputs,
    console: Console,
    device: Device | None = None,
    completions: int | None = None,
) -> Sizing | None:
    """The choice for a card, else for the GPU that is here; None without one, and where no plan can be made, which is
    said."""
    if device is None and config.model.device != "cpu":
        device = gpu_here()
    if device is None:
        return None
    data = inputs.data
    try:
        return choose_sizes(
            read_shape(config.model),
            changed(config, {"rollout": {"engine": engine_of_auto(named=False)[0] if engine == "auto" else engine}}),
            device,
            longest=longest_sequence(config, data),
            evaluated=len(data.eval_prompts) * config.eval.num_generations,
            completions=completions,
        )
    except UserError as error:
        console.warn(f"no plan could be made, so that sizes are not chosen for this GPU: {error.problem}")
        return None


def _tell(sizing: Sizing, console: Console) -> None:
    console.note(summary(sizing.plan))
    if not sizing.plan.fits():
        console.warn(f"by the plan this run needs more than there is. {verdict(sizing)}")


def _wanted_engine(config: Config) -> str:
    """The engine to try; auto: vLLM if it can be had, which only a single process on a GPU can hope for."""
    if not config.uses_rollouts:
        return "transformers"
    alone = config.model.device != "cpu" and torch.cuda.is_available() and distributed.world_size() == 1
    return "transformers" if config.rollout.engine == "auto" and not alone else config.rollout.engine


def vllm_options(config: Config, inputs: Inputs) -> VllmOptions:
    rollout = config.rollout
    longest = sum(longest_sequence(config, inputs.data)) if config.uses_rollouts else 1
    return VllmOptions(
        max_model_len=rollout.max_model_len or rounded_length(longest),
        max_num_seqs=rollout.max_in_flight or IN_FLIGHT,
        kv_cache_gib=rollout.kv_cache_gib,
        kv_cache_dtype=rollout.kv_cache_dtype,
        stock_numerics=rollout.numerics == "stock",
        enforce_eager=bool(rollout.enforce_eager),
        torch_compile=rollout.torch_compile is not False,
        seed_per_completion=rollout.seed_per_completion,
        cudagraph_sizes=tuple(rollout.cudagraph_sizes) if rollout.cudagraph_sizes else None,
    )


def attach_layers(lm: LanguageModel, config: Config, console: Console) -> None:
    """Send packs through the fused layers, or through the model's own, recomputed in the backward pass.

    Where fused layers cannot be had and were not asked for, what happens instead and the reason are said once.
    """
    train, on_gpu = config.train, lm.device.type == "cuda"
    refusal = None
    if train.fused_layers or (train.fused_layers is None and on_gpu):
        # What an engine has sampled is compared with; examples and pairs were written by nobody's engine.
        plan = LayerPlan.of(train, split_adapters=config.uses_rollouts)
        try:
            FusedLayers(plan, offload=train.offload_activations).attach(lm)
            return
        except UserError as error:
            if train.fused_layers:
                raise
            refusal = error.problem
    recompute = train.gradient_checkpointing
    if recompute is None:
        recompute = (on_gpu or bool(train.offload_activations)) and lm.causal_lm.supports_gradient_checkpointing
    if recompute:
        CheckpointedLayers(offload=train.offload_activations).attach(lm)
    if refusal:
        how = "layers recomputed in the backward pass" if recompute else "every layer's activations kept"
        console.warn(f"training through the model's own forward, {how}, which needs more memory and time: {refusal}")
