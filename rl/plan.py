"""What a run will need before it starts: a ledger of memory for rollout and training, what fits, and what it costs.

`ledger` is pure arithmetic over a model's shape, a config and a card. Nothing is loaded and no GPU is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from tandem.rl.config import Config
from tandem.rl.plan_devices import Device
from tandem.rl.plan_memory import (
    CONTEXT,
    FRAGMENTATION,
    LIBRARIES,
    WORKSPACE,
    Items,
    Pack,
    Setup,
    adapter_bytes,
    kv_bytes,
    optimizer_bytes,
    pack_memory,
    rollout_items,
    setup_of,
    weight_items,
)
from tandem.rl.plan_shape import ModelShape
from tandem.rl.plan_time import Work, step_seconds

# Prompt tokens that are planned for where neither data.max_prompt_length nor a longest sequence is given.
ASSUMED_PROMPT = 1024
MAX_TOKENS = 16384  # of a pack, on a GPU
_VLLM_IN_FLIGHT = 256
# Lengths are searched for up to here, and found to this step.
_LONGEST, _STEP = 1 << 22, 64


@dataclass(frozen=True)
class Phase:
    """Device memory in one phase of a step, in bytes by what it is for."""

    items: Items

    @property
    def bytes(self) -> int:
        return sum(self.items.values())


@dataclass
class Ledger:
    """A plan.

    Attributes:
        prompt, completion: tokens of the longest sequence that is planned for. assumed: the prompt's are a guess.
        pack: tokens of the fullest pack.
    """

    shape: ModelShape
    config: Config
    device: Device
    setup: Setup
    work: Work
    pack: int
    assumed: bool
    _packs: dict[int, Pack] = field(default_factory=dict, repr=False)

    # --- memory -------------------------------------------------------------------------------------------------------

    @cached_property
    def fixed(self) -> Items:
        """What is on the device all the time."""
        state, _ = optimizer_bytes(self.setup.adapter, self.setup.optim)
        return {
            "CUDA context and libraries": CONTEXT + LIBRARIES,
            **{name: size for name, size in weight_items(self.setup).items() if size},
            "LoRA weights, float32": adapter_bytes(self.setup.adapter),
            "optimiser's state": state,
        }

    def training(self, tokens: int | None = None) -> Phase:
        """The device while a pack of `tokens` (None: the fullest) is at its peak."""
        pack = self._pack_of(self.pack if tokens is None else tokens)
        return _phase(self.fixed | {"workspaces": WORKSPACE} | pack.items)

    def rollout(self, in_flight: int | None = None, length: int | None = None) -> Phase | None:
        """The device during generation of sequences of `length` (None: the planned one), longer by their prompt, of
        which `in_flight` (None: as many as wanted and possible) are made at once; None where nothing is generated."""
        if not self.work.generates:
            return None
        work, count = self.work, in_flight
        if count is None:
            # vLLM lets those wait that its cache has no room for.
            count = max(min(work.in_flight, self.in_flight), 1) if self.setup.vllm else work.in_flight
        length = work.length if length is None else length
        completion = min(work.completion, max(length - 1, 1))
        items = rollout_items(
            self.setup,
            prompt=max(length - completion, 1),
            completion=completion,
            in_flight=count,
            # With one sequence in flight there is one prompt; groups share theirs.
            prompts=min(work.prompts, max(1, -(-count * work.prompts // work.sequences))),
        )
        return _phase(self.fixed | {"workspaces": WORKSPACE} | items)

    @cached_property
    def peak_pack(self) -> Pack:
        """The fullest pack at its peak."""
        return self._pack_of(self.pack)

    @property
    def host(self) -> Items:
        """Host memory, in bytes: what offloading and a paged optimiser take."""
        _, paged = optimizer_bytes(self.setup.adapter, self.setup.optim)
        items = {"layers' inputs for the backward pass": self.peak_pack.host, "optimiser's state, paged": paged}
        return {name: size for name, size in items.items() if size}

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
            phase = self.rollout(middle)
            low, high = (middle, high) if phase is not None and self._inside(phase) else (low, middle - 1)
        return low

    def fits(self, tokens: int | None = None) -> bool:
        """Whether a whole step with sequences of `tokens` (None: the planned ones) fits."""
        wanted = self.work.length if tokens is None else tokens
        if self.work.generates and not self.setup.vllm and tokens is None and self.in_flight < self.work.in_flight:
            return False
        whole = self._inside(self.training()) and self._hosts(self.peak_pack)
        return whole and all(wanted <= limit for limit in self.limits.values())

    def _trains(self, tokens: int) -> bool:
        return self._inside(self.training(max(tokens, 1)))

    def _offloads(self, tokens: int) -> bool:
        return self._hosts(self._pack_of(tokens))

    def _generates(self, tokens: int) -> bool:
        # vLLM lets sequences wait that its cache has no room for; the embedded engine holds all of a wave.
        phase = self.rollout(1 if self.setup.vllm else self.work.in_flight, tokens)
        return phase is not None and self._inside(phase)

    def _inside(self, phase: Phase) -> bool:
        return phase.bytes <= self.device.memory

    def _hosts(self, pack: Pack) -> bool:
        _, paged = optimizer_bytes(self.setup.adapter, self.setup.optim)
        return self.device.host is None or pack.host + paged <= self.device.host

    def _pack_of(self, tokens: int) -> Pack:
        if tokens not in self._packs:
            self._packs[tokens] = pack_memory(self.setup, tokens, device=self.device)
        return self._packs[tokens]

    # --- time ---------------------------------------------------------------------------------------------------------

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Estimated seconds of a step (one rollout and its updates) by part, all sequences being of full length."""
        at_once = min(self.work.in_flight, self.in_flight) if self.work.generates else 1
        work = replace(self.work, in_flight=max(at_once, 1))
        return step_seconds(self.setup, work, self.peak_pack, self.pack, self.device)

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes(self.setup, 1)


def ledger(shape: ModelShape, config: Config, device: Device) -> Ledger:
    """The plan of a run on a card."""
    setup = setup_of(shape, config)
    work, assumed = _work(shape, config, setup)
    batch = max(work.tokens // max(config.train.steps_per_generation, 1), work.length)
    pack = max(work.length, min(config.train.max_tokens or MAX_TOKENS, batch))
    return Ledger(shape, config, device, setup, work, pack, assumed)


def _work(shape: ModelShape, config: Config, setup: Setup) -> tuple[Work, bool]:
    rollout, train, algorithm = config.rollout, config.train, config.algorithm
    limit = min(config.model.max_length or shape.max_length, shape.max_length)
    generates = config.uses_rollouts
    completion = rollout.max_completion_length
    bound = rollout.max_model_len if setup.vllm and rollout.max_model_len else config.model.max_length
    prompt = config.data.max_prompt_length or (bound - completion if bound and bound > completion else None)
    assumed = prompt is None
    prompt = max(1, min(prompt or ASSUMED_PROMPT, limit - completion if limit > completion else limit))
    if generates:
        sequences = config.generation_batch_size
        prompts, updates = config.prompts_per_rollout, train.steps_per_generation * algorithm.num_iterations
    else:
        prompts, updates = train.per_device_train_batch_size, 1
        sequences = prompts * (2 if algorithm.name == "dpo" and config.preference.loss_type != "kto" else 1)
    # Of every group, online DPO learns from the best and the worst.
    learned = 2 * prompts if algorithm.name == "online_dpo" else sequences
    many = algorithm.num_iterations * train.steps_per_generation > 1
    reference = algorithm.beta > 0 if algorithm.name == "grpo" else algorithm.name in ("dpo", "online_dpo")
    waves = _VLLM_IN_FLIGHT if setup.vllm else sequences
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
            passes=int(many and algorithm.name == "grpo") + int(reference),
            iterations=algorithm.num_iterations if algorithm.name == "grpo" else 1,
            updates=updates if algorithm.name == "grpo" else 1,
        ),
        assumed,
    )


def _phase(items: Items) -> Phase:
    allocated = sum(items.values()) - items["CUDA context and libraries"]
    return Phase({n: b for n, b in items.items() if b} | {"allocator's reserve": int(FRAGMENTATION * allocated)})


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
