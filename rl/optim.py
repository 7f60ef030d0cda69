"""The optimiser of the adapter and its learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch

from tandem.rl.config import OptimConfig
from tandem.rl.distributed import sum_gradients
from tandem.rl.errors import UserError


def make_optimizer(parameters: list[tuple[str, torch.nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over named parameters (names make its state restorable).

    Raises:
        UserError: an 8-bit optimiser without a GPU or without bitsandbytes.
    """
    tensors = [p for _, p in parameters]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(tensors, **settings)
    if not tensors[0].is_cuda:
        raise UserError(f"optim.optim {config.optim!r} needs a GPU", fix="set optim.optim=adamw_torch")
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise UserError(
            f"optim.optim {config.optim!r} needs bitsandbytes", fix="pip install 'tandem-rl[quantization]'"
        ) from error
    kind = bnb.optim.PagedAdamW8bit if config.optim == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    return kind(tensors, **settings)


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Learning rate of optimiser step `step`, counted from 0, of `total`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = min((step - config.warmup_steps) / max(total - config.warmup_steps, 1), 1.0)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: list[tuple[str, torch.nn.Parameter]],
    *,
    rate: float,
    max_grad_norm: float,
) -> float:
    """Sum over ranks, clip, step, clear. Returns the gradient's norm before clipping.

    A norm that is not finite leaves the weights alone: one bad batch must not ruin the adapter.
    """
    sum_gradients(parameters)
    tensors = [p for _, p in parameters]
    norm = float(torch.nn.utils.clip_grad_norm_(tensors, max_grad_norm or math.inf))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
