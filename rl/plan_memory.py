"""Bytes of a run, by arithmetic: weights, adapter, optimiser and KV cache. `plan_pack` has what a pack takes."""

from __future__ import annotations

from tandem.rl.config import Config
from tandem.rl.fused_layer import LayerPlan, check_groups
from tandem.rl.plan_devices import GIB, Device
from tandem.rl.plan_engine import captured_graphs, step_bytes
from tandem.rl.plan_setup import Items, Setup
from tandem.rl.plan_shape import AdapterShape, Linear, ModelShape, adapter_shape
from tandem.rl.prepared_weights import MOST_KEPT_BYTES

# Beside torch's allocator and the bare context, measured on an H100: the kernels that libraries load.
LIBRARIES = int(0.33 * GIB)
# Inside it: workspaces of cuBLAS and cuDNN, norms in several types, and other things of no size.
WORKSPACE = int(0.12 * GIB)
# Of what is allocated, reserved above it (measured: 0.7% with expandable segments).
FRAGMENTATION = 0.02
_MODEST_MOMENTS, _BLOCK_8BIT = 4096, 256


def setup_of(shape: ModelShape, config: Config) -> Setup:
    """See `Setup`."""
    train, model, rollout = config.train, config.model, config.rollout
    width = 4 if model.dtype == "float32" else 2
    vllm = config.uses_rollouts and rollout.engine == "vllm"
    fused = shape.projections is not None if train.fused_layers is None else train.fused_layers
    fused = fused and shape.projections is not None and config.lora.lora_dropout == 0
    if fused:
        check_groups(train.kv_head_groups, shape.kv_heads)
    stored = "nf4" if shape.quantised else "dense"
    return Setup(
        shape=shape,
        adapter=adapter_shape(shape, config.lora),
        width=width,
        format=model.quantised_to or stored,  # type: ignore[arg-type]
        optim=config.optim.optim,
        chunk=train.logprob_chunk_size,
        fused=fused,
        checkpointed=not fused and train.gradient_checkpointing is not False,
        offload=train.offload_activations,
        plan=LayerPlan.of(train),
        restricted=config.algorithm.name == "grpo" and (rollout.top_k > 0 or rollout.top_p < 1),
        vllm=vllm,
        kv_width=1 if vllm and rollout.kv_cache_dtype == "fp8" else width,
        graphs=captured_graphs(rollout),
    )


# --- what does not depend on the tokens -------------------------------------------------------------------------------


def linear_bytes(one: Linear, form: str, width: int) -> int:
    """One linear layer's frozen weight.

    nf4: bitsandbytes' double quantisation, half a byte a weight, a byte for 64 weights, four bytes for 256 of these,
    and two small tables. int4: Marlin's layout, two bytes for 32 weights. fp8: a byte a weight, four bytes an output.
    """
    if form == "fp8":
        return one.elements + 4 * one.rows
    if form == "nf4":
        blocks = -(-one.elements // 64)
        return -(-one.elements // 2) + blocks + 4 * -(-blocks // 256) + 4 * (256 + 16 + 1)
    if form == "int4":
        from tandem.kernels.int4_marlin import stored_rows
        from tandem.rl.weight_formats import Int4Format

        Int4Format().check(one.name, (one.rows, one.columns))
        stored = stored_rows(one.rows, one.columns)
        return stored * one.columns // 2 + stored * (one.columns // 32) * 2
    return one.elements * width


def weight_items(setup: Setup) -> Items:
    """The frozen model."""
    shape, width = setup.shape, setup.width
    form = {"nf4": ", NF4", "int4": ", int4", "fp8": ", FP8", "dense": ""}[setup.format]
    name = f"linear layers{form}"
    return {
        name: sum(linear_bytes(one, setup.format, width) for one in shape.linears),
        "embedding and head" if not shape.tied else "embedding, also the head": width
        * (shape.embedding + (0 if shape.tied else shape.head.elements)),
        "norms, biases and other weights": shape.other * width,
    }


def kept_weight_bytes(setup: Setup) -> int:
    """What the fused layers of a small model keep from pass to pass; 0 for others."""
    blocks = setup.shape.projections
    if not setup.fused or blocks is None:
        return 0
    total = setup.shape.layers * sum(
        buffer_bytes(setup, block) for block in (blocks.qkv, blocks.output, blocks.gate_up, blocks.down)
    )
    return total if total <= MOST_KEPT_BYTES else 0


def buffer_bytes(setup: Setup, block: tuple[Linear, ...]) -> int:
    """A stacked weight in the compute type, with the adapters beside it."""
    rank = setup.adapter.rank_of(block)
    return (sum(one.rows for one in block) + rank) * (block[0].columns + rank) * setup.width


def adapter_bytes(adapter: AdapterShape) -> int:
    """LoRA's weights, in float32; its gradients are as large."""
    return 4 * adapter.elements


def optimizer_bytes(adapter: AdapterShape, optim: str) -> tuple[int, int]:
    """The state of AdamW on the device, and in memory that is paged: on the device or the host, as there is room."""
    if optim == "adamw_torch":
        return sum(8 * n + 4 for n in adapter.tensors), 0
    if optim == "paged_adamw_32bit":
        return 0, sum(8 * n for n in adapter.tensors)
    moments = sum(8 * n if n < _MODEST_MOMENTS else 2 * (n + 4 * -(-n // _BLOCK_8BIT)) for n in adapter.tensors)
    return (moments, 0) if optim == "adamw_8bit" else (0, moments)


# --- KV cache ---------------------------------------------------------------------------------------------------------


def kv_bytes(setup: Setup, tokens: int) -> int:
    """Keys and values of one sequence of `tokens`. transformers keeps a window's layers short, vLLM is taken not to."""
    shape = setup.shape
    kept = (tokens if setup.vllm or w is None else min(tokens, w) for w in shape.windows)
    return 2 * shape.kv_width * setup.kv_width * sum(kept)


def rollout_items(setup: Setup, *, prompt: int, completion: int, in_flight: int, prompts: int, device: Device) -> Items:
    """The device during generation of `in_flight` sequences, beside what is there all the time."""
    shape, width, tokens = setup.shape, setup.width, prompt + completion
    cache = in_flight * kv_bytes(setup, tokens)
    if setup.vllm:
        # Completions of a group read one copy of their prompt's.
        cache = prompts * kv_bytes(setup, prompt) + in_flight * kv_bytes(setup, completion)
        step = step_bytes(setup, tokens=prompts * prompt, sequences=in_flight, device=device)
        return {"KV cache": cache, "engine's activations": step}
    # A layer's cache is copied when a token joins it, and its keys and values are repeated for the query heads.
    joined = in_flight * tokens * width * (shape.kv_width + 2 * shape.query_width)
    prefill = prompts * prompt * (width * (3 * shape.hidden + 4 * shape.intermediate) + 8 * shape.hidden)
    largest = max((one.elements for one in shape.linears), default=0) * width * (setup.format != "dense")
    return {
        "KV cache": cache,
        "attention of a layer, prefill": max(joined, prefill) + largest,
        "logits and their distribution": 4 * 4 * in_flight * shape.head.rows,
    }
