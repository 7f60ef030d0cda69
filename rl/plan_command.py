"""`rl-train plan`: what a run needs, what fits, what one change would buy, and how long a step takes. Loads nothing."""

from __future__ import annotations

import json
import math
from typing import Any

from tandem.rl.config import Config
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.plan import RESERVE, Ledger, Longest, changed
from tandem.rl.plan_changes import Change, as_it_is, smallest_card, smallest_change, try_changes
from tandem.rl.plan_devices import GIB, Device, find_device, local_device
from tandem.rl.plan_engine import engine_of_auto
from tandem.rl.plan_shape import read_shape
from tandem.rl.plan_sizing import Sizing, choose_sizes
from tandem.rl.plan_time import seconds_text

_SHOWN_CHANGES = 6
# Seconds of a step from which on it is said what bounds it.
_LONG = 60
SIZE_HEADER = ("", "value", "why")


def plan(config: Config, *, gpu: str | None, host_gib: float | None, as_json: bool, console: Console) -> Sizing:
    """Print the plan of a run on a card: the one named, or the one that is here. Sizes that the config leaves open are
    chosen as a run would choose them there.

    Raises:
        UserError: the card is unknown, or the model's config cannot be read.
    """
    device, said = _device(gpu, host_gib), ""
    if config.uses_rollouts and config.rollout.engine == "auto":
        engine, said = engine_of_auto(named=gpu is not None)
        config = changed(config, {"rollout": {"engine": engine}})
    made = choose_sizes(read_shape(config.model), config, device)
    if as_json:
        print(json.dumps(as_dict(made), indent=1))
        return made
    show(made, console, engine=said)
    return made


def as_dict(sizing: Sizing) -> dict[str, Any]:
    """Everything in the plan as plain values: bytes, tokens, seconds."""
    plan, free, roomiest, longest = sizing.plan, sizing.free, sizing.roomiest, at_longest(sizing)
    rollout = plan.rollout()
    return {
        "device": {
            "name": plan.device.name,
            "memory": plan.device.memory,
            "host_memory": plan.device.host,
        },
        "model": {"name": plan.config.model.model_name_or_path, "type": plan.shape.model_type},
        "engine": ("vllm" if plan.setup.vllm else "transformers") if plan.work.generates else None,
        "fits": plan.fits(),
        "sequence": {
            "prompt": plan.work.prompt,
            "completion": plan.work.completion,
            "prompt_is_assumed": plan.assumed,
        },
        "pack_tokens": plan.pack,
        "memory": {
            "rollout": None if rollout is None else rollout.items,
            "training": plan.training().items,
            "training_moment": plan.peak_pack.moment,
            "spare": {"layers": plan.spare[0], "bytes": plan.spare[1]},
            "host": plan.host,
            "kv_bytes_per_token": plan.kv_bytes_per_token if plan.work.generates else None,
        },
        "chosen": sizing.chosen,
        "reasons": sizing.reasons,
        "longest": roomiest.longest,
        "limits": roomiest.limits,
        "binding": roomiest.binding,
        "in_flight": {"wanted": free.work.in_flight, "at_once": plan.at_once, "fits": free.in_flight}
        if free.work.generates
        else None,
        "seconds": plan.seconds,
        "generated": {"tokens": plan.work.generated, "seconds": plan.rollout_seconds} if plan.work.generates else None,
        "at_longest": None if longest is None else {"seconds": _total(longest), "generating": longest.rollout_seconds},
        "changes": [vars(change) for change in _changes(sizing)],
        "smallest_change": [] if plan.fits() else smallest_change(plan, free),
    }


def show(sizing: Sizing, console: Console, *, engine: str = "") -> None:
    """The plan as tables, and in a sentence whether it fits and how long it takes. `engine`: why it is this one."""
    plan = sizing.plan
    console.note(_subject(plan) + (f"\n{engine}" if engine else ""))
    console.table("Device memory, GiB", _memory_rows(plan), ("", "rollout", "training"))
    console.note(f"The peak of training is at: {plan.peak_pack.moment}, with a pack of {plan.pack:,} tokens.")
    layers, size = plan.spare
    if layers:
        console.note(
            f"What is left keeps projections of {layers} of {plan.shape.layers} layers for the backward pass, "
            f"{_gib(size)} GiB, to save time (train.projection_memory)."
        )
    if sizing.chosen:
        console.table("Sizes that the config leaves open, as a run chooses them here", size_rows(sizing), SIZE_HEADER)
    console.table("What fits", [*_limit_rows(sizing), *_longest_rows(sizing)])
    console.table(
        f"Seconds a step, estimated (all sequences of full length; {plan.work.learned:,} to learn from)",
        _second_rows(plan),
        ("", "seconds", "share"),
    )
    changes = _changes(sizing)
    if changes:
        header = ("", "fits", "longest", "at once", "peak, GiB", "seconds")
        rows = [_change_row(change, plan) for change in (as_it_is(sizing.free), *changes[:_SHOWN_CHANGES])]
        console.table("What one change would buy", rows, header)
    console.note(verdict(sizing))


def size_rows(sizing: Sizing) -> list[tuple[str, str, str]]:
    """What was chosen, and why."""
    return [(name, str(value).lower(), sizing.reasons[name]) for name, value in sizing.chosen.items()]


def _changes(sizing: Sizing) -> list[Change]:
    """But for what is chosen anyway."""
    return [one for one in try_changes(sizing.free) if one.setting.partition("=")[0] not in sizing.chosen]


def _device(gpu: str | None, host_gib: float | None) -> Device:
    import psutil

    if host_gib is not None and not 0 <= host_gib < math.inf:
        raise UserError(f"--host-gib is {host_gib:g}", fix="give the machine's memory in GiB")
    host = psutil.virtual_memory().total / GIB if host_gib is None else host_gib
    return local_device(host_gib=host) if gpu is None else find_device(gpu, host_gib=host)


def _subject(plan: Ledger) -> str:
    shape, setup, work = plan.shape, plan.setup, plan.work
    how = "fused layers" if setup.fused else "recomputed layers" if setup.checkpointed else "whole autograd graph"
    guess = " (a guess: set data.max_prompt_length)" if plan.assumed else ""
    engine = f", {'vllm' if setup.vllm else 'transformers'} engine" if work.generates else ""
    host = "" if plan.device.host_gib is None else f", {plan.device.host_gib:.0f} GiB of host memory"
    return "\n".join(
        (
            f"{plan.config.model.model_name_or_path}: {shape.model_type}, {shape.layers} layers, "
            f"{shape.weights / 1e9:.2f} B weights, LoRA rank "
            f"{setup.adapter.rank} on {len(setup.adapter.targets)} layers, {how}{engine}",
            f"{plan.device.name}: {plan.device.memory_gib:.1f} GiB{host}",
            f"planned for {work.prompt:,} prompt tokens{guess} and {work.completion:,} of completion, "
            f"{work.sequences:,} sequences a step",
        )
    )


def _memory_rows(plan: Ledger) -> list[tuple[str, str, str]]:
    rollout = plan.rollout()
    first = {} if rollout is None else rollout.items
    second = plan.training().items
    # What both have comes first, then what only one has.
    names = sorted(
        {**first, **second}, key=lambda n: ((n in first) + (n in second) < 2, n in second and n not in first)
    )
    names = [n for n in names if n != RESERVE] + [RESERVE]
    rows = [(name, _gib(first.get(name)), _gib(second.get(name))) for name in names]
    rows.append(("all", _gib(None if rollout is None else rollout.bytes), _gib(plan.training().bytes)))
    rows.append(("of", *(f"{plan.device.memory_gib:.2f}",) * 2))
    for name, size in plan.host.items():
        rows.append((f"host memory: {name}", "", _gib(size)))
    return rows


def _limit_rows(sizing: Sizing) -> list[tuple[str, str]]:
    plan, roomiest = sizing.free, sizing.roomiest
    rows = [("longest prompt + completion", f"{roomiest.longest:,} tokens, limited by {roomiest.binding}")]
    rows += [(f"  by {name}", f"{tokens:,}") for name, tokens in roomiest.limits.items()]
    if plan.work.generates:
        rows.append(
            (
                f"sequences of {plan.work.length:,} at once",
                f"{sizing.plan.at_once:,} of {plan.work.in_flight:,}; the whole card would hold {plan.in_flight:,}",
            )
        )
        rows.append(("KV cache of a token", f"{plan.kv_bytes_per_token / 1024:.0f} KiB"))
    return rows


def at_longest(sizing: Sizing) -> Ledger | None:
    """The plan of a step whose sequences are all as long as the card lets through, by longer prompts; None where that
    is no longer than what is planned for."""
    free, work = sizing.free, sizing.plan.work
    if not work.generates or sizing.roomiest.longest <= work.length:
        return None
    longest = Longest(sizing.roomiest.longest - work.completion, work.completion)
    return choose_sizes(free.shape, free.config, free.device, longest=longest).plan


def _longest_rows(sizing: Sizing) -> list[tuple[str, str]]:
    plan = at_longest(sizing)
    if plan is None:
        return []
    seconds = f"{seconds_text(_total(plan))} seconds, of which {seconds_text(plan.rollout_seconds)} generate"
    return [(f"a step with {plan.work.prompt:,} + {plan.work.completion:,} tokens", seconds)]


def _second_rows(plan: Ledger) -> list[tuple[str, str, str]]:
    total = _total(plan)
    rows = [(name, seconds_text(value), f"{value / total:.0%}") for name, value in plan.seconds.items()]
    return [*rows, ("all", seconds_text(total), "")]


def _change_row(change: Change, plan: Ledger) -> tuple[str, ...]:
    at_once = f"{change.in_flight:,}" if plan.work.generates else ""
    peak = _gib(max(change.training, change.rollout))
    fits, seconds = ("yes", seconds_text(change.seconds)) if change.fits else ("no", "")
    return change.setting, fits, f"{change.longest:,}", at_once, peak, seconds


def summary(plan: Ledger) -> str:
    """What a run will take, in a sentence."""
    slow = max(plan.seconds, key=lambda name: plan.seconds[name])
    rollout = f", a rollout at {_gib(_rollout(plan))}" if plan.work.generates else ""
    host = f", with {_gib(size)} GiB of host memory" if (size := sum(plan.host.values())) else ""
    return (
        f"by the plan training peaks at {_gib(plan.training().bytes)} GiB{rollout}{host}; a step of full length takes "
        f"{seconds_text(_total(plan))} s, of which {plan.seconds[slow] / _total(plan):.0%} in {slow}"
    )


def verdict(sizing: Sizing) -> str:
    """Whether it fits, and if not, why, and what would help."""
    plan = sizing.plan
    if plan.fits():
        binding = sizing.roomiest.binding
        text = f"It fits. {binding[0].upper()}{binding[1:]} is the first limit of length. {_time(plan)}"
        if plan.work.generates and plan.at_once < sizing.free.work.in_flight:
            text += f" Only {plan.at_once:,} of {sizing.free.work.in_flight:,} are made at once, so that others wait."
        return text
    reason = _reason(plan)
    if settings := smallest_change(plan, sizing.free):
        return f"It does not fit: {reason}. The smallest change that makes it fit: {' '.join(settings)}"
    card = smallest_card(plan)
    bigger = f"; the smallest card that it fits as it is: {card.name}" if card else ""
    return f"It does not fit: {reason}. No change that was tried makes it fit{bigger}."


def _time(plan: Ledger) -> str:
    """What a step takes, and what of it the sampled tokens do."""
    work, total, generating = plan.work, _total(plan), plan.rollout_seconds
    if not work.generates:
        slow = max(plan.seconds, key=lambda name: plan.seconds[name])
        return f"A step takes {seconds_text(total)} s, most of it in {slow}."
    text = (
        f"A step takes {seconds_text(total)} s, {seconds_text(generating)} of them to generate {work.sequences:,} × "
        f"{work.completion:,} = {work.generated:,} tokens, {seconds_text(work.generated / generating)} a second"
    )
    bound = total >= _LONG and generating >= total / 2
    return f"{text}: generation time is what bounds it." if bound else f"{text}."


def _reason(plan: Ledger) -> str:
    device = plan.device
    if plan.work.length > (limit := plan.limits["the model's context"]):
        return f"sequences of {plan.work.length:,} tokens are longer than the model's {limit:,}"
    if (need := plan.training().bytes) > device.memory:
        return f"training needs {_gib(need)} GiB of {device.memory_gib:.1f}"
    if (need := _rollout(plan)) > device.memory:
        return f"the rollout needs {_gib(need)} GiB of {device.memory_gib:.1f}"
    if device.host is not None and (need := sum(plan.host.values())) > device.host:
        return f"host memory of {_gib(need)} GiB is needed, of {device.host_gib:.1f}"
    return f"{plan.binding} lets {plan.longest:,} tokens through, and {plan.work.length:,} are planned for"


def _rollout(plan: Ledger) -> int:
    phase = plan.rollout()
    return 0 if phase is None else phase.bytes


def _total(plan: Ledger) -> float:
    return sum(plan.seconds.values())


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"
