"""What to change in a config that has run out of memory with everything on that costs no quality."""

from __future__ import annotations

from tandem.rl.config import Config
from tandem.rl.errors import UserError
from tandem.rl.plan import Longest, changed, ledger
from tandem.rl.plan_changes import candidates
from tandem.rl.plan_devices import GIB, Device, gpu_here
from tandem.rl.plan_shape import read_shape

GENERAL = (
    "shorten rollout.max_completion_length or model.max_length, lower lora.r, or set model.load_in_4bit=true; "
    "`rl-train plan` says what each would save"
)
_SHOWN = 4


def memory_advice(config: Config, longest: Longest, device: Device | None = None) -> str:
    """The changes that by the plan save most in training; in general words where no plan can be made.

    Args:
        device: the card; None: the one that is here.
    """
    device = device or gpu_here()
    if device is None:
        return GENERAL
    try:
        plan = ledger(read_shape(config.model), config, device, longest)
    except UserError:
        return GENERAL
    tokens = plan.work.length  # of the one sequence that is too long
    now = plan.training(tokens).bytes
    saved: dict[str, int] = {}
    for setting, change in candidates(plan):
        if not {"train", "rollout"} & change.keys():  # those of `train` are on by now, engines sleep in an update
            saved[setting] = now - plan.again(changed(config, change)).training(tokens).bytes
    if config.uses_rollouts:
        half = max(plan.work.completion // 2, 1)
        saved[f"rollout.max_completion_length={half}"] = now - plan.training(plan.work.prompt + half).bytes
    best = sorted((name for name in saved if saved[name] > 0), key=lambda name: -saved[name])[:_SHOWN]
    if not best:
        return GENERAL
    listed = ", ".join(f"{name} ({saved[name] / GIB:.2f} GiB)" for name in best)
    return f"by the plan these save most: {listed}"
