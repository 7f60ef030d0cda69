"""The LoRA adapter of one linear layer, read from the module that peft has put around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tandem.rl.errors import UserError, short


class Adapter(NamedTuple):
    """LoRA's parameters: `a [r, in]`, `b [out, r]`, and the factor of `x·aᵀ·bᵀ`."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float


def active_adapter(module: Any, refuse: Callable[[str, str], UserError]) -> Adapter | None:
    """The adapter that is in use; None where none is or adapters are switched off.

    Dropout is refused: it would act on the adapter's input, which is computed once for value and gradient.

    Args:
        module: peft's layer. refuse: the error for what the layer has and for what it should have instead.

    Raises:
        UserError: there is something beside plain LoRA without dropout.
    """
    if module.merged:
        raise refuse("has its adapter merged into the base weight", "an unmerged adapter")
    a, b = module.lora_A, module.lora_B
    active = [name for name in module.active_adapters if name in a]
    if module.disable_adapters or not active:
        return None
    if len(active) > 1:
        raise refuse(f"has several active adapters, {short(active)}", "one adapter")
    name = active[0]
    if (rate := getattr(module.lora_dropout[name], "p", 0.0)) != 0:
        raise refuse(f"has lora_dropout {rate}", "lora.lora_dropout=0")
    if name in getattr(module, "lora_variant", {}) or b[name].bias is not None:
        raise refuse("has a variant of LoRA or a bias in its adapter", "plain LoRA")
    return Adapter(a[name].weight, b[name].weight, float(module.scaling[name]))
