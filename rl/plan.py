"""What a run will need before it starts: a ledger of memory for rollout and training, what fits, and what it costs.

`ledger` is pure arithmetic over a model's shape, a config and a card. Nothing is loaded and no GPU is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from tandem.rl.config import Config
from tandem.rl.offload import layers_beside
from tandem.rl.packing import default_max_tokens
from tandem.rl.plan_devices import CONTEXT, GIB, Device
from tandem.rl.plan_engine import IN_FLIGHT, STAYS_AWAKE, engine_items
from tandem.rl.plan_memory import (
    FRAGMENTATION,
    LIBRARIES,
    WORKSPACE,
    adapter_bytes,
    kept_weight_bytes,
    kv_bytes,
    optimizer_bytes,
    rollout_items,
    setup_of,
    weight_items,
)
from tandem.rl.plan_pack import Pack, input_bytes, pack_memory, projection_bytes, recorded_bytes
from tandem.rl.plan_setup import Items, Setup
from tandem.rl.plan_shape import ModelShape
from tandem.rl.plan_time import Work, step_seconds

# Prompt tokens that are planned for where neither data.max_prompt_length nor a longest sequence is given.
ASSUMED_PROMPT = 1024
MAX_TOKENS = default_max_tokens("cuda")
# What PyTorch's allocator does not hold.
OUTSIDE = ("CUDA context and libraries", "CUDA graphs")
# What it holds beside tensors.
RESERVE = "allocator's reserve"
# Whose memory PyTorch reserves, and counts as allocated only while they are recorded.
RECORDED = "recorded passes"
# Lengths are searched for up to here, and found to this step.
_LONGEST, _STEP = 1 << 22, 64


class Longest(NamedTuple):
    """Tokens of the longest sequence that there is to learn from."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Phase:
    """Device memory in one phase of a step, in bytes by what it is for."""

    items: Items

    @property
    def bytes(self) -> int:
        return sum(self.items.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by the names that measured ones have (`memory_metrics.Reading`): of tensors, of PyTorch's allocator, of
        the device."""
        reserved = self.bytes - sum(self.items.get(name, 0) for name in OUTSIDE)
        allocated = reserved - self.items.get(RESERVE, 0) - self.items.get(RECORDED, 0)
        return {"peak_allocated": allocated, "reserved": reserved, "device": self.bytes}


@dataclass
class Ledger:
    """A plan.

    Attributes:
        prompt, completion: tokens of the longest sequence that is planned for. assumed: the prompt's are a guess.
        known: the longest sequence, if that was given.
        pack: tokens of the fullest pack.
    """

    shape: ModelShape
    config: Config
    device: Device
    setup: Setup
    work: Work
    pack: int
    assumed: bool
    known: Longest | None = None
    _packs: dict[int, Pack] = field(default_factory=dict, repr=False)

    def again(self, config: Config | None = None, device: Device | None = None) -> Ledger:
        """The plan with another config or card."""
        return ledger(self.shape, config or self.config, device or self.device, self.known)

    # --- memory -------------------------------------------------------------------------------------------------------

    @cached_property
    def fixed(self) -> Items:
        """What is on the device all the time."""
        state, _ = optimizer_bytes(self.setup.adapter, self.setup.optim)
        weights = weight_items(self.setup) | {"weights ready for products": kept_weight_bytes(self.setup)}
        return {
            "CUDA context and libraries": CONTEXT + LIBRARIES,
            **{name: size for name, size in weights.items() if size},
            "LoRA weights, float32": adapter_bytes(self.setup.adapter),
            "optimiser's state": state,
            **(engine_items(self.setup) if self.setup.vllm else {}),
            **self._recordings,
        }

    @property
    def _recordings(self) -> Items:
        size = recorded_bytes(self.setup, self.pack) if self.setup.plan.recorded else 0
        return {RECORDED: size} if size else {}

    def training(self, tokens: int | None = None) -> Phase:
        """The device while a pack of `tokens` (None: the fullest) is at its peak."""
        pack = self._pack_of(self.pack if tokens is None else tokens)
        return _phase(self.fixed | {"workspaces": WORKSPACE} | pack.items | self._awake)

    def rollout(self, in_flight: int | None = None, length: int | None = None) -> Phase | None:
        """The device during generation of sequences of `length` (None: the planned one), longer by their prompt, of
        which `in_flight` (None: as many as wanted and possible) are made at once; None where nothing is generated."""
        if not self.work.generates:
            return None
        given = in_flight
        if in_flight is None:
            # vLLM lets those wait that its cache has no room for.
            wanted = self.work.in_flight
            in_flight = max(min(wanted, self.in_flight), 1) if self.setup.vllm else wanted
        items = self._generation(in_flight, length)
        if self.cache is not None:
            items["KV cache"] = self.cache
        phase = _phase(self.fixed | {"workspaces": WORKSPACE} | items)
        if given is None and self._awake:
            # PyTorch returns what the update has left where the engine goes to sleep, or needs it, and not otherwise.
            held = self.training().sizes["reserved"] - phase.sizes["reserved"]
            phase.items[RESERVE] += max(held, 0)
        return phase

    def cache_needed(self, in_flight: int, length: int | None = None) -> int:
        """Bytes of KV cache that so many sequences fill."""
        return self._generation(in_flight, length)["KV cache"]

    def _generation(self, count: int, length: int | None) -> Items:
        """Of `count` sequences, beside what is there all the time."""
        work = self.work
        length = work.length if length is None else length
        completion = min(work.completion, max(length - 1, 1))
        return rollout_items(
            self.setup,
            prompt=max(length - completion, 1),
            completion=completion,
            in_flight=count,
            # A group has one prompt.
            prompts=min(work.prompts, -(-count * work.prompts // work.sequences)),
            device=self.device,
        )

    @property
    def cache(self) -> int | None:
        """Bytes of vLLM's KV cache, where the config gives its size."""
        given = self.config.rollout.kv_cache_gib
        return int(given * GIB) if self.setup.vllm and given is not None else None

    @property
    def _awake(self) -> Items:
        """The KV cache where it stays during the update, for it is a small one."""
        if not (self.setup.vllm and self.work.generates):
            return {}
        cache = self.cache if self.cache is not None else self.cache_needed(self.work.in_flight, None)
        return {"KV cache, which stays": cache} if cache <= STAYS_AWAKE else {}

    @cached_property
    def peak_pack(self) -> Pack:
        """The fullest pack at its peak."""
        return self._pack_of(self.pack)

    @cached_property
    def spare(self) -> tuple[int, int]:
        """Layers that keep their projections because memory is left, and the bytes that they take, with what a small
        model keeps beside them: time is saved by it, and nothing fits less."""
        each = projection_bytes(self.setup, self.pack)
        if not each or self.setup.plan.projections != "auto":
            return 0, 0
        each += input_bytes(self.setup, self.pack)
        shape = self.shape
        free = self.device.memory - sum(self.fixed.values()) - WORKSPACE
        hidden = self.pack * shape.hidden * self.setup.width
        layers = layers_beside(free, each, shape.layers, hidden, self.peak_pack.left)
        return layers, layers * each

    @property
    def host(self) -> Items:
        """Host memory, in bytes: what offloading, a paged optimiser and the way back from a step take."""
        return {name: size for name, size in self._host_items(self.peak_pack).items() if size}

    def _host_items(self, pack: Pack) -> Items:
        state, paged = optimizer_bytes(self.setup.adapter, self.setup.optim)
        # A rollout that several optimiser steps learn from can be taken back only with a copy of before.
        copy = adapter_bytes(self.setup.adapter) + state + paged if self.work.updates > 1 else 0
        return {
            "layers' inputs for the backward pass": pack.host,
            "optimiser's state, paged": paged,
            "adapter and moments of before the step": copy,
        }

    # --- what fits ----------------------------------------------------------------------------------------------------

    @cached_property
    def limits(self) -> dict[str, int]:
        """The longest prompt + completion that each limit lets through, in tokens."""
        limits = {"training memory": _longest(self._trains)}
        if self.device.host is not None and self._pack_of(_LONGEST).host:
            limits["host memory"] = _longest(self._offloads)
        if self.work.generates:
            limits["KV cache"] = _longest(self._generates)
        wanted = self.config.model.max_length
        limits["the model's context"] = min(wanted or self.shape.max_length, self.shape.max_length)
        if self.setup.vllm and (given := self.config.rollout.max_model_len):
            limits["the engine's context"] = given
        return limits

    @property
    def longest(self) -> int:
        """The longest prompt + completion of a whole step, in tokens; 0: nothing fits."""
        return min(self.limits.values())

    @property
    def binding(self) -> str:
        """The limit that `longest` comes from."""
        return min(self.limits, key=lambda name: self.limits[name])

    @cached_property
    def in_flight(self) -> int:
        """How many sequences of the planned length can be generated at once; 0 where none is, or none fits."""
        if not self.work.generates:
            return 0
        low, high = 0, 1 << 20
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._generates_at_once(middle, self.work.length) else (low, middle - 1)
        return low

    @property
    def at_once(self) -> int:
        """How many of them a step generates at once."""
        return min(self.in_flight, self.work.in_flight)

    def fits(self, tokens: int | None = None) -> bool:
        """Whether a whole step with sequences of `tokens` (None: the planned ones) fits."""
        wanted = self.work.length if tokens is None else tokens
        if self.work.generates and not self.setup.vllm and tokens is None and self.in_flight < self.work.in_flight:
            return False
        return self.trains() and all(wanted <= limit for limit in self.limits.values())

    def records(self) -> bool:
        """Whether passes can be recorded, and both phases fit with what recordings hold."""
        rollout = self.rollout()
        fits = self.trains() and (rollout is None or self._inside(rollout))
        return fits and bool(recorded_bytes(self.setup, self.pack))

    def trains(self) -> bool:
        """Whether the fullest pack fits, on the device and in host memory."""
        return self._inside(self.training()) and self._hosts(self.peak_pack)

    def _trains(self, tokens: int) -> bool:
        return self._inside(self.training(max(tokens, 1)))

    def _offloads(self, tokens: int) -> bool:
        return self._hosts(self._pack_of(tokens))

    def _generates(self, tokens: int) -> bool:
        # vLLM lets sequences wait that its cache has no room for; the embedded engine holds all of a wave.
        return self._generates_at_once(1 if self.setup.vllm else self.work.in_flight, tokens)

    def _generates_at_once(self, count: int, tokens: int) -> bool:
        phase = self.rollout(count, tokens)
        holds = self.cache is None or self.cache_needed(count, tokens) <= self.cache
        return holds and phase is not None and self._inside(phase)

    def _inside(self, phase: Phase) -> bool:
        return phase.bytes <= self.device.memory

    def _hosts(self, pack: Pack) -> bool:
        return self.device.host is None or sum(self._host_items(pack).values()) <= self.device.host

    def _pack_of(self, tokens: int) -> Pack:
        if tokens not in self._packs:
            self._packs[tokens] = pack_memory(self.setup, tokens, device=self.device)
        return self._packs[tokens]

    # --- time ---------------------------------------------------------------------------------------------------------

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Estimated seconds of a step (one rollout and its updates) by part, all sequences being of full length."""
        at_once = self.at_once if self.work.generates else 1
        work = replace(self.work, in_flight=max(at_once, 1))
        return step_seconds(self.setup, work, self.peak_pack, self.pack, self.device)

    @property
    def rollout_seconds(self) -> float:
        """Of these, generation."""
        return sum(seconds for part, seconds in self.seconds.items() if part.startswith("rollout"))

    @property
    def update_seconds(self) -> float:
        """Of these, the passes of the update."""
        return self.seconds["update: forward"] + self.seconds["update: backward"]

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes(self.setup, 1)


def ledger(shape: ModelShape, config: Config, device: Device, longest: Longest | None = None) -> Ledger:
    """The plan of a run on a card.

    Args:
        longest: the longest sequence of the data, where it is known; else what the config says of lengths counts.
    """
    setup = setup_of(shape, config)
    work, assumed = _work(shape, config, setup, longest)
    batch = max(work.tokens // _parts(config), work.length)
    pack = max(work.length, min(config.train.max_tokens or MAX_TOKENS, batch))
    return Ledger(shape, config, device, setup, work, pack, assumed, longest)


def _parts(config: Config) -> int:
    """Optimiser batches that a rollout is divided into, by GRPO alone."""
    return config.train.steps_per_generation if config.algorithm.name == "grpo" else 1


def changed(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """The config with some values replaced, by section."""
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


def _work(shape: ModelShape, config: Config, setup: Setup, longest: Longest | None) -> tuple[Work, bool]:
    rollout, train, algorithm = config.rollout, config.train, config.algorithm
    limit = min(config.model.max_length or shape.max_length, shape.max_length)
    generates = config.uses_rollouts
    completion = rollout.max_completion_length
    bound = rollout.max_model_len if setup.vllm and rollout.max_model_len else config.model.max_length
    prompt = config.data.max_prompt_length or (bound - completion if bound and bound > completion else None)
    if longest is not None:
        prompt, completion = longest.prompt, completion if generates else longest.completion
    assumed = prompt is None
    prompt = max(1, min(prompt or ASSUMED_PROMPT, limit - completion if limit > completion else limit))
    if generates:
        sequences = config.generation_batch_size
        prompts = config.prompts_per_rollout
        updates = _parts(config) * (algorithm.num_iterations if algorithm.name == "grpo" else 1)
    else:
        prompts, updates = train.per_device_train_batch_size, 1
        sequences = prompts * (2 if algorithm.name == "dpo" and config.preference.loss_type != "kto" else 1)
    # Of every group, online DPO learns from the best and the worst.
    learned = 2 * prompts if algorithm.name == "online_dpo" else sequences
    many = updates > 1
    reference = algorithm.beta > 0 if algorithm.name == "grpo" else algorithm.name in ("dpo", "online_dpo")
    waves = IN_FLIGHT if setup.vllm else sequences
    return (
        Work(
            sequences=sequences,
            learned=learned,
            prompts=prompts,
            prompt=prompt,
            completion=completion,
            shared=train.share_prefix and learned > prompts,
            generates=generates,
            in_flight=min(rollout.max_in_flight or waves, sequences),
            passes=int(many) + int(reference),
            iterations=algorithm.num_iterations if algorithm.name == "grpo" else 1,
            updates=updates if algorithm.name == "grpo" else 1,
        ),
        assumed,
    )


def _phase(items: Items) -> Phase:
    allocated = sum(size for name, size in items.items() if name not in OUTSIDE)
    return Phase({n: b for n, b in items.items() if b} | {RESERVE: int(FRAGMENTATION * allocated)})


def _longest(fits: Callable[[int], bool]) -> int:
    """The largest length up to which everything fits, but for lengths at which attention changes its parts.

    Memory grows with length except where attention is cut into more parts, so each such stretch is searched by itself,
    from the longest down.
    """
    borders = [_STEP, 12_288, 24_576, 49_152, 131_072, _LONGEST]
    for start, stop in reversed(list(pairwise(borders))):
        low, high = start // _STEP, stop // _STEP - 1
        if not fits(low * _STEP):
            continue
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
        return low * _STEP
    return 0
