"""Sizes that a config leaves open, chosen from the plan: tokens of a pack, offloading, sequences in flight, KV cache.

They decide about memory and speed, never about what is learned. What the config sets is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tandem.rl.config import Config
from tandem.rl.plan import MAX_TOKENS, VLLM_IN_FLIGHT, Ledger, Longest, changed, ledger
from tandem.rl.plan_devices import GIB, Device
from tandem.rl.plan_memory import FRAGMENTATION, kv_bytes
from tandem.rl.plan_shape import ModelShape

# Of a card's memory that sizes are chosen for; predictions were within a tenth of what was measured.
USED_SHARE = 0.92
# vLLM's cache comes in blocks of tokens, and its longest sequence is rounded up.
_BLOCK, _LENGTHS = 16, 128


@dataclass(frozen=True)
class Sizing:
    """A config whose sizes are all set.

    Attributes:
        plan: its plan, on the whole card. free: the plan of the config as it was given, whose limits are those of the
            card and not of the sizes that were chosen.
        changes: what was chosen, by section and key.
    """

    plan: Ledger
    free: Ledger
    changes: dict[str, dict[str, Any]]

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def chosen(self) -> dict[str, Any]:
        """The changes by dotted name."""
        return {f"{name}.{key}": value for name, values in self.changes.items() for key, value in values.items()}

    def __str__(self) -> str:
        return " ".join(f"{name}={str(value).lower()}" for name, value in self.chosen.items())


def choose_sizes(
    shape: ModelShape, config: Config, device: Device, *, longest: Longest | None = None, evaluated: int = 0
) -> Sizing:
    """Sizes for a run on `device`.

    The largest pack up to 16,384 tokens that fits is taken, no smaller than the longest sequence; of offloading and
    not, what fits and is estimated to be faster. As many sequences are generated at once as the batch has and, for the
    transformers engine, as fit; vLLM's cache gets what these need, or what is left. Where nothing fits, a size stays
    open, and the plan says so.

    Args:
        longest: the longest sequence, where it is known. evaluated: completions of a held-out evaluation.
    """
    free = ledger(shape, config, device, longest)
    room = free.again(device=replace(device, memory_gib=USED_SHARE * device.memory_gib))
    changes = {"train": _training(room)}
    if free.work.generates:
        changes["rollout"] = _rollout(room.again(changed(config, changes)), evaluated)
    return Sizing(free.again(changed(config, changes)), free, changes)


def _training(room: Ledger) -> dict[str, Any]:
    """Tokens of a pack, and offloading."""
    train, setup, length = room.config.train, room.setup, room.work.length
    packs = [train.max_tokens]
    if train.max_tokens is None:
        size = max(MAX_TOKENS, length)
        packs = [size]
        while size > length:
            size = max(size // 2, length)
            packs.append(size)
    ways = [train.offload_activations]
    if train.offload_activations is None and (setup.fused or setup.checkpointed):
        ways = [False, True]
    for tokens in packs:
        options = [{"max_tokens": tokens, "offload_activations": way} for way in ways]
        plans = [(one, room.again(changed(room.config, {"train": one}))) for one in options]
        fitting = [(one, plan) for one, plan in plans if plan.trains()]
        if fitting:
            best, _ = min(fitting, key=lambda pair: pair[1].update_seconds)
            return _only_open(best, train)
    return _only_open({"max_tokens": packs[-1]}, train)


def _rollout(room: Ledger, evaluated: int) -> dict[str, Any]:
    """Sequences in flight, and vLLM's cache."""
    rollout, setup, work = room.config.rollout, room.setup, room.work
    wanted = max(work.sequences, evaluated)
    if not setup.vllm:
        return {} if rollout.max_in_flight or not 0 < room.in_flight < wanted else {"max_in_flight": room.in_flight}
    wanted = rollout.max_in_flight or min(wanted, VLLM_IN_FLIGHT)
    found: dict[str, Any] = {"max_in_flight": wanted}
    # Of a prompt and of every completion a block is part empty, and one block in all is never used.
    block = kv_bytes(setup, _BLOCK)
    least = kv_bytes(setup, -(-work.length // _LENGTHS) * _LENGTHS) + 2 * block
    without = room.rollout(0)
    assert without is not None
    left = int((room.device.memory - without.bytes) / (1 + FRAGMENTATION))
    size = min(left, max(room.cache_needed(wanted) + (2 * wanted + 1) * block, least))
    if size >= least:
        found["kv_cache_gib"] = -(-size * 100 // GIB) / 100
    return _only_open(found, rollout)


def _only_open(values: dict[str, Any], section: Any) -> dict[str, Any]:
    """Those that the section does not set, and that are known."""
    return {key: value for key, value in values.items() if getattr(section, key) is None and value is not None}
