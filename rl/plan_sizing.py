"""Sizes that a config leaves open, chosen from the plan: packs, tiles, offloading, sequences in flight, KV cache.

They decide about memory and speed, never about what is learned. What the config sets is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tandem.rl.config import Config
from tandem.rl.fused_layer import TILE_ROWS
from tandem.rl.plan import MAX_TOKENS, Ledger, Longest, changed, ledger
from tandem.rl.plan_devices import GIB, Device
from tandem.rl.plan_engine import BLOCK, IN_FLIGHT, rounded_length, step_bytes, step_tokens
from tandem.rl.plan_memory import FRAGMENTATION, kv_bytes
from tandem.rl.plan_shape import ModelShape
from tandem.rl.plan_start import Start
from tandem.rl.plan_time import seconds_text

# Of a card's memory that sizes are chosen for; predictions were within a tenth of what was measured.
USED_SHARE = 0.92
# A pack beyond the usual size takes more memory, for which an update is to take no more than this part of its time.
WORTH = 0.95
_OPEN = (None, "auto")


@dataclass(frozen=True)
class Sizing:
    """A config whose sizes are all set.

    Attributes:
        plan: its plan, on the whole card. free: the plan of the config as it was given, whose limits are those of the
            card and not of the sizes that were chosen.
        changes: what was chosen, by section and key. reasons: why, by dotted name.
    """

    plan: Ledger
    free: Ledger
    changes: dict[str, dict[str, Any]]
    reasons: dict[str, str]

    @property
    def config(self) -> Config:
        return self.plan.config

    @cached_property
    def roomiest(self) -> Ledger:
        """Of all ways to set the sizes that are open, the one that lets the longest sequences through. That is not what
        is chosen for the planned length, for which vLLM's cache is no larger than that needs, nor what is left open:
        offloading takes more of a small host, and the transformers engine more at once, than would be chosen."""
        engine = {key: value for key, value in self.changes.get("rollout", {}).items() if key != "kv_cache_gib"}
        room = self.free.again(changed(self.free.config, {"rollout": engine}))
        least = _rungs(room)[-1]
        ways = (_with(room, _only_open({**way, **least}, room.config.train)) for way in _ways(room))
        return max((self.free, self.plan, *ways), key=lambda plan: plan.longest)

    @property
    def chosen(self) -> dict[str, Any]:
        """The changes by dotted name."""
        return {f"{name}.{key}": value for name, values in self.changes.items() for key, value in values.items()}

    def __str__(self) -> str:
        return " ".join(f"{name}={_written(value)}" for name, value in self.chosen.items())


def choose_sizes(
    shape: ModelShape,
    config: Config,
    device: Device,
    *,
    longest: Longest | None = None,
    evaluated: int = 0,
    completions: int | None = None,
) -> Sizing:
    """Sizes for a run on `device`.

    The largest pack up to 16,384 tokens that fits is taken, no smaller than the longest sequence, and a larger one
    where sequences of a long prompt are then computed with that prompt once; with the usual tiles and groups, or
    smaller tiles and more groups where it does not fit with these; of offloading and not, and of
    attention's output saved and computed again, what fits and is estimated to be faster. As many sequences are
    generated at once as the batch has and, for the transformers engine, as fit; vLLM's cache gets what these need, or
    what is left. All this is to fit 92% of the card; what fits no more than the whole of it is taken where nothing else
    does. Where nothing fits, a size stays open, and the plan says so.

    Args:
        longest: the longest sequence, where it is known. evaluated: completions of a held-out evaluation.
        completions: all that are sampled, where it is not those of the config's whole run.
    """
    free = ledger(shape, config, device, longest)
    room = free.again(device=replace(device, memory_gib=USED_SHARE * device.memory_gib))
    rollout: dict[str, dict[str, Any]] = {}
    start = None
    if free.work.generates:
        rollout["rollout"], start = _rollout(room, evaluated, completions)
    config_made = changed(config, rollout)
    changes = {"train": _training(room.again(config_made), free.again(config_made)), **rollout}
    if start is not None and (captured := start.captured(config_made.rollout)):
        # Whatever else was chosen goes before it.
        more = {**changes, "rollout": changes["rollout"] | captured}
        changes = more if room.again(changed(config, more)).fits() else changes
    made = free.again(changed(config, changes))
    found = {"train": _train_reasons(room, changes, made)}
    if rollout:
        found["rollout"] = {key: _rollout_reason(made, key, start) for key in changes["rollout"]}
    reasons = {f"{section}.{key}": reason for section, by_key in found.items() for key, reason in by_key.items()}
    return Sizing(made, free, changes, reasons)


def _training(room: Ledger, whole: Ledger) -> dict[str, Any]:
    """Tokens of a pack, offloading, and how fused layers spend memory.

    Args:
        room: on the part of the card that sizes are chosen for. whole: on all of it, for what does not fit there.
    """
    train, length = room.config.train, room.work.length
    packs, wider = [train.max_tokens or max(MAX_TOKENS, length)], []
    if train.max_tokens is None:
        wider = _wider(room, packs[0])
        while packs[-1] > length:
            packs.append(max(packs[-1] // 2, length))
    usual = next(filter(None, (_fitting(room, tokens) for tokens in packs)), None) or _fitting(whole, packs[-1])
    if usual is None:
        return _only_open({"max_tokens": packs[-1], **_rungs(room)[-1]}, train)
    best, seconds = usual[0], WORTH * usual[1].update_seconds
    for found in filter(None, (_fitting(room, tokens) for tokens in wider)):
        if found[1].update_seconds < seconds:
            best, seconds = found[0], found[1].update_seconds
    if train.cuda_graphs == "auto":
        best["cuda_graphs"] = True if _with(room, best | {"cuda_graphs": True}).records() else "auto"
    return _only_open(best, train)


def _wider(room: Ledger, size: int) -> list[int]:
    """Packs beyond `size` in which more sequences of a group have their prompt together, down from the whole group."""
    work = room.work
    if not work.shared:
        return []
    found, together = [], work.group
    while together > 1 and (tokens := work.family(together)) > size:
        found.append(tokens)
        together = -(-together // 2)
    return found


def _fitting(room: Ledger, tokens: int) -> tuple[dict[str, Any], Ledger] | None:
    """The fastest way to fit packs of so many tokens, and its plan; None where there is none."""
    ways, rungs = _ways(room), _rungs(room)
    # The most frugal tell whether it is worth looking.
    if not any(_with(room, {"max_tokens": tokens, **way, **rungs[-1]}).trains() for way in ways):
        return None
    for rung in rungs:
        options = [{"max_tokens": tokens, **way, **rung} for way in ways]
        fitting = [(one, plan) for one in options if (plan := _with(room, one)).trains()]
        if fitting:
            best, plan = min(fitting, key=lambda pair: pair[1].update_seconds)
            if room.setup.fused:
                best["attention_memory"] = "save" if plan.peak_pack.saves else "recompute"
            return best, plan
    return None


def _ways(room: Ledger) -> list[dict[str, Any]]:
    """Where what the backward pass needs waits, and whether attention is a part of it; the most frugal is the last."""
    train, setup = room.config.train, room.setup
    offload: list[Any] = [train.offload_activations]
    if train.offload_activations is None and (setup.fused or setup.checkpointed):
        offload = [False, True]
    attention: list[Any] = [train.attention_memory]
    if train.attention_memory == "auto" and setup.fused:
        attention = ["auto", "recompute"]  # the first saves where that takes a modest share of memory
    return [{"offload_activations": one, "attention_memory": other} for one in offload for other in attention]


def _rungs(room: Ledger) -> list[dict[str, Any]]:
    """Rows of a tile and groups of KV heads, from the usual ones, which cost least, to the most frugal."""
    train = room.config.train
    if not room.setup.fused:
        return [{}]
    rows = [train.mlp_tile_rows] if train.mlp_tile_rows else [TILE_ROWS, TILE_ROWS // 2, TILE_ROWS // 4, TILE_ROWS // 8]
    found: list[dict[str, Any]] = [{"mlp_tile_rows": one} for one in rows]
    if train.kv_head_groups is None:
        heads = room.shape.kv_heads
        found += [{"mlp_tile_rows": one, "kv_head_groups": heads} for one in rows]
    return found


def _with(room: Ledger, train: dict[str, Any]) -> Ledger:
    return room.again(changed(room.config, {"train": train}))


def _rollout(room: Ledger, evaluated: int, completions: int | None) -> tuple[dict[str, Any], Start | None]:
    """Sequences in flight, vLLM's start and cache; and by what its start was chosen."""
    rollout, setup, work = room.config.rollout, room.setup, room.work
    wanted = max(work.sequences, evaluated)
    if not setup.vllm:
        fewer = not rollout.max_in_flight and 0 < room.in_flight < wanted
        return {"max_in_flight": room.in_flight} if fewer else {}, None
    wanted = rollout.max_in_flight or min(wanted, IN_FLIGHT)
    found: dict[str, Any] = {"max_in_flight": wanted}
    room = room.again(changed(room.config, {"rollout": found}))
    start = Start.of(room, evaluated=evaluated, completions=completions)
    if start is not None:
        found |= start.left_out(rollout)
        room = room.again(changed(room.config, {"rollout": found}))
    # Of a prompt and of every completion a block is part empty, and one block in all is never used.
    block = kv_bytes(setup, BLOCK)
    least = kv_bytes(setup, rounded_length(work.length)) + 2 * block
    phase = room.rollout(wanted)
    assert phase is not None
    # An evaluation may have more prompts than a batch: as many as the engine takes at a time.
    step = step_bytes(setup, tokens=step_tokens(room.device), sequences=wanted, device=room.device)
    more = step - phase.items["engine's activations"] if evaluated else 0
    left = int((room.device.memory - phase.bytes) / (1 + FRAGMENTATION)) + phase.items["KV cache"] - more
    size = min(left, max(room.cache_needed(wanted) + (2 * wanted + 1) * block, least))
    if size >= least:
        found["kv_cache_gib"] = -(-size * 100 // GIB) / 100
    return _only_open(found, rollout), start


def _only_open(values: dict[str, Any], section: Any) -> dict[str, Any]:
    """Those that the section does not set, and that are known."""
    known = {key: value for key, value in values.items() if value not in _OPEN}
    return {key: value for key, value in known.items() if getattr(section, key) in _OPEN}


def _train_reasons(room: Ledger, changes: dict[str, dict[str, Any]], made: Ledger) -> dict[str, str]:
    """Why each value was chosen: what the next larger or the other one would need, or take."""
    values = changes["train"]
    plan = room.again(changed(room.config, changes))
    if not plan.trains():
        fits = f"which fits, but not in {USED_SHARE:.0%} of the card" if made.trains() else "which does not fit either"
        return dict.fromkeys(values, f"the least there is, {fits}")
    found = {}
    for key, value in values.items():
        other = {**values, key: _instead(key, value)}
        if key == "offload_activations":
            other.pop("attention_memory", None)  # where there is more room, it may be another
        usual = max(MAX_TOKENS, plan.work.length)
        if key == "max_tokens" and value > usual:
            less = _with(room, {**values, key: usual})
            found[key] = f"a long prompt once for its group: {_against(plan, less, f'with {usual:,}')}"
        elif key == "max_tokens" and value >= MAX_TOKENS:
            found[key] = "the longest sequence, which is never cut" if value > MAX_TOKENS else "the usual size; it fits"
        elif key == "mlp_tile_rows" and value >= TILE_ROWS:
            found[key] = "the usual size; it fits"
        else:
            found[key] = _against(plan, _with(room, other), f"with {_shown(other[key])}")
    return found


def _instead(key: str, value: Any) -> Any:
    """The value that a chosen one was preferred to."""
    if key == "kv_head_groups":
        return None
    if key == "attention_memory":
        return "recompute" if value == "save" else "save"
    return not value if isinstance(value, bool) else 2 * value


def _against(plan: Ledger, other: Ledger, label: str) -> str:
    if not other.trains():
        need, have = other.training().bytes / GIB, other.device.memory_gib
        if need <= have:
            return f"{label} the host is too small"
        return f"{label} training needs {need:.2f} GiB of {have:.2f}"
    if _seconds(other) == _seconds(plan):
        return f"{label} an update is no faster"
    text = f"{label} an update takes {_seconds(other)} s in place of {_seconds(plan)}"
    if other.update_seconds < plan.update_seconds:  # what the slower one was taken for
        text += f", for {(other.training().bytes - plan.training().bytes) / GIB:.2f} GiB more"
    return text


def _seconds(plan: Ledger) -> str:
    return seconds_text(plan.update_seconds)


def _rollout_reason(made: Ledger, key: str, start: Start | None) -> str:
    """Why a value of the plan that was made is what it is."""
    if start is not None and key in ("enforce_eager", "torch_compile", "cudagraph_sizes"):
        return start.reason(key)
    wanted, fit = made.work.in_flight, made.in_flight
    if key == "max_in_flight":
        return "as many as fit, or as the engine takes" if wanted < made.work.sequences else "the whole batch"
    if fit < wanted:
        return f"what is left, for {fit:,} of {wanted:,} sequences at once"
    return f"what {wanted:,} sequences at once need"


def _written(value: Any) -> str:
    """As an override on the command line."""
    return str(value).lower().replace(" ", "")


def _shown(value: Any) -> str:
    return "groups by length" if value is None else str(value).lower()
