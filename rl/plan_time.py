"""Seconds of a step, estimated from a card's data sheet and a handful of measured efficiencies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem.rl.plan_devices import Device
from tandem.rl.plan_memory import adapter_bytes, kv_bytes, linear_bytes, optimizer_bytes
from tandem.rl.plan_pack import Pack, is_recorded
from tandem.rl.plan_setup import Setup

# Shares of the data sheet that are reached. The first two are what an H100 does in an update of Qwen3-8B's shape with
# all that stands around its products (0.85 s at 8,192 tokens, 4.8 s at 32,768); the others are taken to be so.
PRODUCTS, ATTENTION = 0.51, 0.53
# transformers keeps what autograd wants and casts for the adapters: TRL's update takes 1.5 times as long.
PLAIN = 0.36
COPY, PCIE, DEQUANTISE = 0.7, 0.8, 0.6
# Of memory's rate while decoding: products of a few rows in NF4, in Marlin's int4, in FP8 (assumed, not measured) and
# dense ones, and reading a KV cache. With the host's part below, what vLLM does on an H200 for Qwen3-8B's shape and
# SmolLM2, 1 to 256 sequences: two thirds of the estimates are within 15%, all within a third.
DECODE = {"nf4": 0.2, "int4": 0.6, "fp8": 0.6, "dense": 0.75}
DECODE_PRODUCTS, DECODE_CACHE = 0.3, 0.7
# Seconds of the host at each token, before or behind the device's: vLLM's scheduler, once and for every sequence.
VLLM_HOST, VLLM_SEQUENCE = 1.8e-3, 3.0e-5
# Seconds that a layer costs the host at each token: transformers with peft in eager mode, vLLM with an adapter without
# graphs, both beside the device's work, and replaying a graph.
EAGER, VLLM_EAGER, GRAPHS = 1.8e-3, 2.4e-3, 2.5e-5
# Seconds that a fused layer's passes cost the host for each pack, beside the device's work (SmolLM2, an H200's host),
# and the share that is left of them where they are recorded.
FORWARD_HOST, BACKWARD_HOST, RECORDED = 2.0e-3, 3.5e-3, 0.15


@dataclass(frozen=True)
class Work:
    """What a step computes, every sequence being of the longest kind.

    Attributes:
        sequences, prompt, completion: how many, and of how many tokens; `prompts`: distinct ones.
        learned: sequences that are learned from.
        shared: sequences of a group that meet in a pack have one prompt there. blocks: packs that a group comes in.
        generates: completions are sampled first. passes: forward passes for log-probs (old policy, reference).
        iterations: how often the batch is learned from. updates: optimiser steps of it all.
    """

    sequences: int
    learned: int
    prompts: int
    prompt: int
    completion: int
    shared: bool
    generates: bool
    in_flight: int
    passes: int
    iterations: int
    updates: int
    blocks: int = 1

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def generated(self) -> int:
        """Tokens that are sampled."""
        return self.sequences * self.completion

    @property
    def tokens(self) -> int:
        """That pass the model once for a gradient."""
        prompts = self.blocks * self.prompts if self.shared else self.learned
        return prompts * self.prompt + self.learned * self.completion

    @property
    def group(self) -> int:
        """Sequences of a prompt that are learned from."""
        return -(-self.learned // max(self.prompts, 1))

    def family(self, sequences: int) -> int:
        """Tokens of so many sequences of a group in one pack."""
        return self.prompt + sequences * self.completion

    def in_packs(self, rows: int) -> Work:
        """The same in packs of `rows` tokens, where a prompt stands once in each that its group comes in."""
        if not self.shared:
            return self
        together = max((rows - self.prompt) // max(self.completion, 1), 1)
        return replace(self, blocks=-(-self.group // together))


def seconds_text(value: float) -> str:
    """Three digits at most."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def step_seconds(setup: Setup, work: Work, pack: Pack, rows: int, device: Device) -> dict[str, float]:
    """Parts of a step: one rollout (where there is one) and all updates on it, in packs of `rows` tokens."""
    parts: dict[str, float] = {}
    work = work.in_packs(rows)
    if work.generates:
        parts["rollout: prompts"] = _forward(setup, work.prompts * work.prompt, work.prompt, device)
        parts["rollout: completions"] = _decode(setup, work, device)
    once = _forward(setup, work.tokens, work.length, device) + _head(setup, work, device, products=1)
    packs = max(1, -(-work.tokens // rows))
    unpack = packs * _unpacked(setup, device)
    if work.passes:
        parts["log-probs"] = work.passes * (once + unpack)
    forward = once + unpack
    backward = _backward(setup, work, pack, device) + unpack
    if pack.host:
        # Copies run beside the computation and are waited for where they are slower.
        copied = pack.host / rows * work.tokens / (device.pcie * 1e9 * PCIE)
        forward, backward = max(forward, copied), max(backward, copied)
    host = packs * setup.shape.layers * (RECORDED if is_recorded(setup, rows) else 1.0)
    forward, backward = max(forward, host * FORWARD_HOST), max(backward, host * BACKWARD_HOST)
    parts["update: forward"] = work.iterations * forward
    parts["update: backward"] = work.iterations * backward
    parts["optimiser"] = work.updates * _optimizer(setup, device)
    return parts


def _rate(setup: Setup, device: Device) -> float:
    return device.tflops * 1e12 * (PRODUCTS if setup.fused else PLAIN)


def _attention(setup: Setup, tokens: int, length: int) -> float:
    """Operations of causal attention's forward pass."""
    shape = setup.shape
    seen = sum(length / 2 if w is None else min(length / 2, w) for w in shape.windows)
    return 4 * shape.query_width * seen * tokens


def _forward(setup: Setup, tokens: int, length: int, device: Device) -> float:
    operations = 2 * tokens * (setup.shape.linear_elements + setup.adapter.elements)
    attention = _attention(setup, tokens, length) / (device.tflops * 1e12 * ATTENTION)
    return operations / _rate(setup, device) + attention


def _head(setup: Setup, work: Work, device: Device, *, products: int) -> float:
    return products * 2 * work.learned * work.completion * setup.shape.head.elements / _rate(setup, device)


def _backward(setup: Setup, work: Work, pack: Pack, device: Device) -> float:
    """Forward once more, gradients of activations, gradients of the adapter."""
    shape = setup.shape
    again = shape.linear_elements
    if setup.fused and shape.projections is not None:
        again -= shape.layers * sum(one.elements for one in shape.projections.down)  # whose output nobody needs
    elif not setup.checkpointed:
        again = 0
    operations = 2 * work.tokens * (again + shape.linear_elements + 3 * setup.adapter.elements)
    attention = 2.5 if pack.saves or not (setup.fused or setup.checkpointed) else 3.5
    seconds = attention * _attention(setup, work.tokens, work.length) / (device.tflops * 1e12 * ATTENTION)
    return operations / _rate(setup, device) + seconds + _head(setup, work, device, products=2)


def _unpacked(setup: Setup, device: Device) -> float:
    """All 4-bit weights written out once."""
    if setup.format == "dense":
        return 0.0
    moved = sum(
        linear_bytes(one, setup.format, setup.width) + one.elements * setup.width for one in setup.shape.linears
    )
    return moved / (device.bandwidth * 1e9 * DEQUANTISE)


def _decode(setup: Setup, work: Work, device: Device) -> float:
    """Token by token: weights and caches are read, or products computed, and the host waited for."""
    shape, bandwidth = setup.shape, device.bandwidth * 1e9
    at_once = min(work.in_flight, work.sequences)
    weights = sum(linear_bytes(one, setup.format, setup.width) for one in shape.linears)
    read = weights / (bandwidth * DECODE[setup.format]) + shape.head.elements * setup.width / (
        bandwidth * DECODE["dense"]
    )
    operations = 2 * at_once * (shape.linear_elements + shape.head.elements)
    products = operations / (device.tflops * 1e12 * DECODE_PRODUCTS)
    cache = at_once * kv_bytes(setup, work.prompt + work.completion // 2) / (bandwidth * DECODE_CACHE)
    if not setup.vllm:
        cache *= 3  # every token copies the cache it joins
    device_seconds = max(read, products) + cache
    waves = work.sequences / at_once if setup.vllm else -(-work.sequences // at_once)
    host = VLLM_HOST + at_once * VLLM_SEQUENCE
    if not setup.vllm:
        token = max(shape.layers * EAGER, device_seconds)
    elif setup.eager:
        token = host + max(shape.layers * VLLM_EAGER, device_seconds)
    else:
        token = host + shape.layers * GRAPHS + device_seconds
    return waves * work.completion * token


def _optimizer(setup: Setup, device: Device) -> float:
    """Weights, gradients and moments are read and written once, and the gradients' norm taken before."""
    on_device, paged = optimizer_bytes(setup.adapter, setup.optim)
    moved = 4 * adapter_bytes(setup.adapter) + 2 * (on_device + paged)
    return moved / (device.bandwidth * 1e9 * COPY)
