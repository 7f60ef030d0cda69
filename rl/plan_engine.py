"""Bytes of a vLLM engine beside weights and KV cache, by arithmetic: what it holds all the time, also while it sleeps,
and what a step of it needs.

After the code of vLLM 0.24 and of our layers in it. One engine has been measured so far, Qwen3-8B in NF4 with rank 32
and graphs of ten sizes on an H100: context, libraries and engine held 1.64 GiB beside weights and adapter while it
slept (`benchmarks/results/rollout-h100-2026-11-24-1828.json`); `BUFFERS` and `GRAPH` are set so that the sum is that.
"""

from __future__ import annotations

from tandem.rl.config import RolloutConfig
from tandem.rl.plan_devices import GIB, Device
from tandem.rl.plan_setup import Items, Setup
from tandem.rl.plan_shape import ModelShape
from tandem.rollout.vllm_plan import BLOCK, IN_FLIGHT, STAYS_AWAKE, VllmOptions, rounded_length, sizes_for_prompts
from tandem.rollout.vllm_versions import ACCEPTED, LORA_RANKS, refusal

__all__ = [
    "BLOCK", "IN_FLIGHT", "STAYS_AWAKE", "captured_graphs", "engine_items", "engine_of_auto", "rounded_length",
    "sizes_for_prompts", "step_bytes", "step_tokens",
]  # fmt: skip

MIB = 1 << 20
# Inputs of a batch, workspaces, kernels; and of a CUDA graph of one layer for one batch size.
BUFFERS, GRAPH = 128 * MIB, int(1.4 * MIB)
# Copies of a batch's logits in float32: as they come, divided by the temperature, as log-probs, as scores; sorted with
# their places where a nucleus is sampled from.
_LOGITS, _SORTED = 4, 4
# Tokens of a step at most, as vLLM sets it for `LLM`: more on large cards that are no A100.
_FEW_TOKENS, _MANY_TOKENS, _LARGE = 8192, 16384, 70 * GIB


def engine_of_auto(*, named: bool) -> tuple[str, str]:
    """What `rollout.engine: auto` is to be planned as, and a sentence that says so.

    Args:
        named: for a card that is not here, with what its user would install; else for this machine.
    """
    refused = None if named else refusal()
    if refused is None:
        wanted = f"vLLM {' or '.join(ACCEPTED)}"
        return "vllm", f"rollout.engine: auto is planned as vLLM, which it is on a GPU where {wanted} is installed"
    return "transformers", f"rollout.engine: auto is planned as transformers, which it is here: {refused}"


def captured_graphs(rollout: RolloutConfig) -> int:
    """Batch sizes that CUDA graphs are made for."""
    given = rollout.cudagraph_sizes
    options = VllmOptions(
        max_num_seqs=rollout.max_in_flight or IN_FLIGHT, cudagraph_sizes=tuple(given) if given else None
    )
    return 0 if rollout.enforce_eager else len(options.capture_sizes)


def engine_items(setup: Setup) -> Items:
    """What an engine on the trainer's weights holds of the device until it is closed."""
    shape, adapter = setup.shape, setup.adapter
    rank = next((r for r in LORA_RANKS if r >= adapter.rank), adapter.rank)
    scratch = _largest_stack(shape) * setup.width if setup.format in ("nf4", "fp8") else 0
    rope = shape.max_length * shape.head_dim * setup.width
    return {
        "adapter's copy in the engine": adapter.elements // adapter.rank * rank * 2,
        "engine's buffers": BUFFERS + scratch + rope,
        "CUDA graphs": setup.graphs * shape.layers * GRAPH,
    }


def step_bytes(setup: Setup, *, tokens: int, sequences: int, device: Device) -> int:
    """The most that one step of the engine has of activations or logits at a time.

    Args:
        tokens: of prompts that wait. sequences: that are sampled from at once.
    """
    shape, rows = setup.shape, min(max(tokens, sequences), step_tokens(device))
    mlp = 3 * shape.intermediate + 3 * shape.hidden
    attention = 2 * (shape.query_width + 2 * shape.kv_width) + 2 * shape.query_width + 3 * shape.hidden
    logits = 4 * sequences * shape.head.rows * (_LOGITS + (_SORTED if setup.restricted else 0))
    return max(rows * setup.width * max(mlp, attention), logits)


def step_tokens(device: Device) -> int:
    """Tokens that vLLM computes at a time, at most."""
    large = device.memory >= _LARGE and "a100" not in device.name.lower()
    return _MANY_TOKENS if large else _FEW_TOKENS


def _largest_stack(shape: ModelShape) -> int:
    """Elements of the largest weight as the engine has it, projections of one input being stacked."""
    blocks = shape.projections
    if blocks is None:
        return max((one.elements for one in shape.linears), default=0)
    stacks = (blocks.qkv, blocks.output, blocks.gate_up, blocks.down)
    return max(sum(one.elements for one in stack) for stack in stacks)
