"""The optimiser of the adapter, its state as named tensors, and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tandem.rl.config import OptimConfig
from tandem.rl.distributed import sum_gradients
from tandem.rl.errors import UserError

Named = list[tuple[str, torch.nn.Parameter]]

# Classes of `bitsandbytes.optim` by the names that transformers and TRL give them.
_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}
_ADAMW_ENTRIES = {"step", "exp_avg", "exp_avg_sq"}


def make_optimizer(parameters: Named, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over named parameters (names make its state restorable).

    Raises:
        UserError: one of bitsandbytes' optimisers without a GPU or without bitsandbytes.
    """
    tensors = [p for _, p in parameters]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_torch":
        # One kernel for many tensors on a GPU; on a CPU four times as fast as the loop over tensors, which foreach is.
        return torch.optim.AdamW(tensors, fused=True, **settings)
    check_optimizer(config, on_gpu=tensors[0].is_cuda)
    return _bitsandbytes_optimizer(tensors, config.optim, settings)


def _bitsandbytes_optimizer(
    tensors: list[torch.nn.Parameter], name: str, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    import bitsandbytes

    return getattr(bitsandbytes.optim, _BITSANDBYTES[name])(tensors, **settings)


def check_optimizer(config: OptimConfig, *, on_gpu: bool) -> None:
    """Raises UserError: one of bitsandbytes' optimisers without a GPU or without bitsandbytes."""
    if config.optim == "adamw_torch":
        return
    if not on_gpu:
        raise UserError(f"optim.optim {config.optim!r} needs a GPU", fix="set optim.optim=adamw_torch")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"optim.optim {config.optim!r} needs bitsandbytes", fix="pip install 'tandem-rl[quantization]'"
        ) from error


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


def apply_gradients(optimizer: torch.optim.Optimizer, parameters: Named, *, rate: float, max_grad_norm: float) -> float:
    """Sum over ranks, clip, step, clear. Returns the gradient's norm before clipping.

    Clipping multiplies by max_grad_norm / (norm + 1e-6) where the norm is larger, as TRL does; 0: none. A norm that is
    not finite leaves the weights alone: one bad batch must not ruin the adapter.
    """
    sum_gradients(parameters)
    tensors = [p for _, p in parameters]
    total = torch.nn.utils.get_total_norm([p.grad for p in tensors if p.grad is not None])
    norm = float(total)  # the only wait for the device
    if math.isfinite(norm):
        if 0 < max_grad_norm < norm:
            torch.nn.utils.clip_grads_with_norm_(tensors, max_grad_norm, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of parameters that have none yet, as the first step would, and change none: where memory ends
    here, no parameter has been updated before others."""
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if optimizer.state.get(parameter):
                continue
            if hasattr(optimizer, "init_state"):  # bitsandbytes'
                optimizer.init_state(group, parameter, g, i)
                continue
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Named) -> dict[str, torch.Tensor]:
    """The optimiser's state as host tensors of their own, by `PARAMETER/ENTRY`; counters become tensors without a
    dimension. Parameters that had no update yet have no state."""
    tensors = {}
    for name, parameter in parameters:
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            # A paged tensor calls itself a host tensor, so that `cpu` alone would hand out the optimiser's own memory.
            tensors[f"{name}/{entry}"] = tensor.detach().cpu().contiguous().clone()
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, parameters: Named, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, in the types and places that the optimiser made it in.

    Raises:
        UserError: the state is that of other parameters or of another optimiser.
    """
    known = dict(parameters)
    saved: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in known:
            raise UserError(
                f"there is optimiser state for {name!r}, which is no parameter of this adapter",
                fix="resume with the lora section that the run was started with",
            )
        saved.setdefault(known[name], {})[entry] = tensor
    # bitsandbytes' own `load_state_dict` would make ordinary tensors of paged ones.
    if hasattr(optimizer, "init_state"):
        _fill_bitsandbytes(optimizer, saved)
    else:
        _load_adamw(optimizer, saved)


def _load_adamw(optimizer: torch.optim.Optimizer, saved: dict[torch.nn.Parameter, dict[str, torch.Tensor]]) -> None:
    for parameter, entries in saved.items():
        moments = [t.shape for entry, t in entries.items() if entry != "step"]
        if entries.keys() != _ADAMW_ENTRIES or any(shape != parameter.shape for shape in moments):
            raise _other_optimizer(optimizer, entries)
    order = [p for group in optimizer.param_groups for p in group["params"]]
    state = {index: saved[p] for index, p in enumerate(order) if p in saved}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _fill_bitsandbytes(optimizer: Any, saved: dict[torch.nn.Parameter, dict[str, torch.Tensor]]) -> None:
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if (entries := saved.get(parameter)) is None:
                continue
            optimizer.init_state(group, parameter, g, i)
            state = optimizer.state[parameter]
            if state.keys() != entries.keys():
                raise _other_optimizer(optimizer, entries)
            for entry, value in entries.items():
                own = state[entry]
                if not isinstance(own, torch.Tensor):
                    state[entry] = value.item()
                elif (own.shape, own.dtype) == (value.shape, value.dtype):
                    own.copy_(value)
                else:
                    raise _other_optimizer(optimizer, entries)


def _other_optimizer(optimizer: torch.optim.Optimizer, entries: Mapping[str, torch.Tensor]) -> UserError:
    found = ", ".join(f"{entry} {tuple(t.shape)} {str(t.dtype)[6:]}" for entry, t in sorted(entries.items()))
    return UserError(
        f"the saved optimiser state is not one of {type(optimizer).__name__}",
        reason=f"a parameter has {found}",
        fix="resume with the optim.optim that the run was started with",
    )
