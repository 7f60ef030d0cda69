"""Why a run has stopped that learned nothing any more: what was not a finite number, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from tandem.rl.errors import UserError
from tandem.rl.optim import Named


def divergence_error(
    run_dir: Path, count: int, metrics: Mapping[str, float], parameters: Named, optimizer: torch.optim.Optimizer
) -> UserError:
    """The error that ends a run after `count` updates in a row whose gradient was not finite."""
    weights = [name for name, p in parameters if not bool(torch.isfinite(p).all())]
    moments = [name for name, p in parameters if not _finite_state(optimizer, p)]
    numbers = sorted(name for name, value in metrics.items() if not math.isfinite(value) and name != "grad_norm")
    if weights:
        where = f"{len(weights)} tensors of the adapter itself are not finite, first {weights[0]!r}"
        fix = "start from an earlier checkpoint or another lora.init_from"
    elif moments:
        where = f"the optimiser's state of {moments[0]!r} is not finite"
        fix = "start from an earlier checkpoint"
    elif "loss" in numbers:
        where = f"the loss is not finite either (not finite: {', '.join(numbers)})"
        fix = (
            "look at the completions in rollouts/ and at an own loss function; else lower optim.learning_rate, or set "
            "model.dtype=bfloat16 where it is float16, whose range some models leave"
        )
    else:
        where = "the loss is finite, so the numbers left their range in the backward pass"
        fix = "lower optim.learning_rate, or set model.dtype=float32 (bfloat16 where it is float16)"
    return UserError(
        f"{count} updates in a row were skipped because their gradient was not finite",
        reason=f"{where}; the adapter is as it was before them, in a checkpoint",
        fix=f"{fix}; then rl-train resume {run_dir} (optim.max_skipped_updates sets how many are let pass)",
    )


def _finite_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> bool:
    values = optimizer.state.get(parameter, {}).values()
    return all(bool(torch.isfinite(v).all()) for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
