"""What one change of a config would buy, and which changes make a plan fit that does not: each one planned anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tandem.rl.plan import MAX_TOKENS, Ledger, Phase, changed
from tandem.rl.plan_devices import DEVICES, Device
from tandem.rl.plan_sizing import choose_sizes

# Changes that shorten what is planned for, and those that cost quality.
_SHORTER = ("rollout.max_completion_length", "model.max_length")
_DEAR = (*_SHORTER, "lora.r", "model.load_in_4bit")
# What a config may set that would else be chosen, or left to a run.
_SIZES = {
    "rollout": ("kv_cache_gib", "max_in_flight", "max_model_len"),
    "train": ("max_tokens", "offload_activations", "mlp_tile_rows", "kv_head_groups", "attention_memory",
              "projection_memory"),
}  # fmt: skip
# Several changes go no further than this: beyond it no run would be worth having.
_LEAST_RANK, _LEAST_COMPLETION = 4, 1 / 8
# Of use only where something does not fit: decoding without graphs is several times slower, which no estimate says.
_FOR_ROOM = (*_SHORTER, "rollout.enforce_eager")


@dataclass(frozen=True)
class Change:
    """One change of the config, and what becomes of the plan with it: the longest that the card lets through, and all
    else with sizes chosen where the config leaves them open. `in_flight`: sequences that a step makes at once."""

    setting: str
    fits: bool
    longest: int
    in_flight: int
    training: int
    rollout: int
    seconds: float

    def helps(self, now: Change) -> bool:
        """Whether any of its numbers is better than without it."""
        gains = (self.fits, self.longest, self.in_flight, -self.training, -self.rollout, -self.seconds)
        before = (now.fits, now.longest, now.in_flight, -now.training, -now.rollout, -now.seconds)
        return any(a > b for a, b in zip(gains, before, strict=True))


def candidates(plan: Ledger) -> list[tuple[str, dict[str, Any]]]:
    """Single changes of the config worth a try, from the cheapest to the dearest, as (setting, {section: {key: …}})."""
    config, setup = plan.config, plan.setup
    train, rollout = config.train, config.rollout
    found: list[tuple[str, str, Any]] = []
    if setup.fused:
        kv = plan.shape.kv_heads
        if (rows := setup.plan.tile_rows) > 512:
            found.append(("train", "mlp_tile_rows", rows // 2))
        if plan.peak_pack.groups < kv:
            found.append(("train", "kv_head_groups", kv))
        if train.offload_activations is False:
            found.append(("train", "offload_activations", True))
        if train.attention_memory != "recompute" and plan.peak_pack.saves:
            found.append(("train", "attention_memory", "recompute"))
    elif plan.shape.projections is not None and config.lora.lora_dropout == 0:
        found.append(("train", "fused_layers", True))
    elif train.gradient_checkpointing is False:
        found.append(("train", "gradient_checkpointing", True))
    if train.logprob_chunk_size > 128:
        found.append(("train", "logprob_chunk_size", train.logprob_chunk_size // 2))
    if config.optim.optim == "adamw_torch":
        found += [("optim", "optim", "adamw_8bit"), ("optim", "optim", "paged_adamw_8bit")]
    if (limit := train.max_tokens or MAX_TOKENS) > plan.work.length and plan.pack > plan.work.length:
        found.append(("train", "max_tokens", max(limit // 2, plan.work.length)))
        found.append(("train", "max_tokens", plan.work.length))
    if plan.work.generates:
        if setup.vllm and rollout.kv_cache_dtype != "fp8":
            found.append(("rollout", "kv_cache_dtype", "fp8"))
        if setup.vllm and not rollout.enforce_eager:
            found.append(("rollout", "enforce_eager", True))
        if plan.work.in_flight > 1:
            found.append(("rollout", "max_in_flight", plan.work.in_flight // 2))
            if 0 < plan.in_flight < plan.work.in_flight // 2:
                found.append(("rollout", "max_in_flight", plan.in_flight))
    if setup.format == "dense" and not plan.shape.quantised:
        found.append(("model", "load_in_4bit", True))
    if config.lora.r > 1 and not config.lora.init_from:
        found.append(("lora", "r", config.lora.r // 2))
    if plan.work.generates and rollout.max_completion_length > 1:
        found.append(("rollout", "max_completion_length", rollout.max_completion_length // 2))
    elif config.data.max_prompt_length or plan.config.model.max_length:
        found.append(("model", "max_length", plan.work.length // 2))
    return [(f"{s}.{k}={_written(v)}", {s: {k: v}}) for s, k, v in found]


def openings(plan: Ledger) -> list[tuple[str, dict[str, Any]]]:
    """Sizes that the config sets, left open again."""
    found = []
    for section, keys in _SIZES.items():
        given = getattr(plan.config, section)
        for key in keys if section == "train" or plan.work.generates else ():
            usual = type(given).model_fields[key].default
            if getattr(given, key) != usual:
                found.append((f"{section}.{key}={_written(usual)}", {section: {key: usual}}))
    return found


def try_changes(plan: Ledger) -> list[Change]:
    """Every single change that betters something, the one that buys most first: whether all fits (with sizes chosen
    where the config leaves them open), then length, then sequences at once, then time, then memory. What is only for
    room comes only where the plan does not fit: a shorter completion is no gain in length, and decoding without graphs
    is slow."""
    now = as_it_is(plan)
    tried = [_tried(plan, name, changes) for name, changes in (*openings(plan), *candidates(plan))]
    kept = [one for one in tried if one.helps(now) and (now.fits or one.fits or not _shortens(one.setting))]
    return sorted(
        (one for one in kept if not (now.fits and one.setting.startswith(_FOR_ROOM))),
        # A time is an estimate, of which a hundredth says nothing.
        key=lambda one: (
            not one.fits, -one.longest, -one.in_flight, float(f"{one.seconds:.2g}"), one.training + one.rollout
        ),
    )  # fmt: skip


def smallest_change(plan: Ledger, given: Ledger | None = None) -> list[str]:
    """Settings that make a plan fit that does not: the first single change that does, in the order of what it costs, or
    several, each halving something, until it fits. Empty where nothing helps.

    Args:
        given: the plan of the config before sizes were chosen. What it sets may be left open, which costs nothing.
    """
    if given is not None:
        for name, changes in openings(given):
            if _tried(given, name, changes).fits:
                return [name]
    for name, changes in candidates(plan):
        if plan.again(changed(plan.config, changes)).fits():
            return [name]
    # First without those that cost quality: a shorter answer, a lower rank, weights in 4 bits.
    for dear in (False, True):
        if settings := _halved(plan, dear=dear):
            return settings
    return []


def _halved(plan: Ledger, *, dear: bool) -> list[str]:
    """Changes one after the other, each the one that helps most."""
    settings: dict[str, str] = {}
    rank = min(_LEAST_RANK, plan.config.lora.r)
    completion = plan.config.rollout.max_completion_length * _LEAST_COMPLETION
    while not plan.fits():
        options = [
            (name, change)
            for name, change in candidates(plan)
            if (dear or not name.startswith(_DEAR))
            and change.get("lora", {}).get("r", rank) >= rank
            and change.get("rollout", {}).get("max_completion_length", completion) >= completion
        ]
        after = [(name, plan.again(changed(plan.config, change))) for name, change in options]
        name, best = min(after, key=lambda one: _need(one[1]), default=("", plan))
        if _need(best) >= _need(plan):
            return []
        settings[name.partition("=")[0]] = name
        plan = best
    return list(settings.values())


def smallest_card(plan: Ledger) -> Device | None:
    """The card of least memory on which the plan fits as it is."""
    cards = sorted(DEVICES.values(), key=lambda one: one.memory_gib)
    with_host = (replace(card, host_gib=plan.device.host_gib) for card in cards)
    return next((card for card in with_host if plan.again(device=card).fits()), None)


def as_it_is(plan: Ledger) -> Change:
    """The plan without a change, to be put beside those with one."""
    return _tried(plan, "as it is", {})


def _tried(plan: Ledger, name: str, changes: dict[str, dict[str, Any]]) -> Change:
    made = choose_sizes(plan.shape, changed(plan.config, changes), plan.device, longest=plan.known)
    sized = made.plan
    return Change(
        setting=name,
        fits=sized.fits(),
        longest=made.roomiest.longest,
        in_flight=sized.at_once,
        training=sized.training().bytes,
        rollout=_bytes(sized.rollout()),
        seconds=sum(sized.seconds.values()),
    )


def _need(plan: Ledger) -> float:
    """Memory above the card's and the host's, in bytes, over both phases; where there is none, tokens too many."""
    device = plan.device
    over = [plan.training().bytes - device.memory, _bytes(plan.rollout()) - device.memory]
    if device.host is not None:
        over.append(sum(plan.host.values()) - device.host)
    missing = sum(max(one, 0) for one in over)
    # The search for the longest takes time, and says nothing new while memory is short.
    return missing or max(0, plan.work.length - plan.longest)


def _bytes(phase: Phase | None) -> int:
    return 0 if phase is None else phase.bytes


def _shortens(setting: str) -> bool:
    return setting.startswith(_SHORTER)


def _written(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
