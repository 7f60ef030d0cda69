"""The adapter: attached by peft, saved and loaded in peft's format, kept in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tandem.rl.config import LoraConfig
from tandem.rl.errors import UserError
from tandem.rl.model import LanguageModel


def attach_lora(language_model: LanguageModel, config: LoraConfig, *, seed: int) -> None:
    """Wrap the model with a fresh adapter (or the one in `init_from`) and make only that trainable.

    A fresh adapter starts as the identity (B = 0) and its A depends on `seed` alone.

    Raises:
        UserError: a target module does not exist, or the head is targeted.
    """
    import peft

    model = language_model.model
    if config.init_from:
        try:
            wrapped = peft.PeftModel.from_pretrained(model, config.init_from, is_trainable=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"lora.init_from {config.init_from!r} cannot be loaded: {error}") from error
    else:
        _check_targets(model, config)
        settings = peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it; fractions are fine
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
            use_rslora=config.use_rslora,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(model, settings)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    wrapped.eval()
    language_model.model = wrapped


def _check_targets(model: Any, config: LoraConfig) -> None:
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    if targets == ["all-linear"]:
        return
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    for target in targets:
        if target == head.rpartition(".")[2]:
            raise UserError(
                f"lora.target_modules names the head {target!r}",
                reason="log-probs are computed from the head's frozen weight",
                fix="leave the head out; all-linear does",
            )
        if not any(name == target or name.endswith("." + target) for name, _ in model.named_modules()):
            leaves = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise UserError(
                f"lora.target_modules: the model has no module named {target!r}",
                fix=f"its linear layers are {', '.join(leaves)}",
            )


def trainable(language_model: LanguageModel) -> list[tuple[str, torch.nn.Parameter]]:
    """The adapter's parameters by name, in a fixed order."""
    return [(n, p) for n, p in language_model.model.named_parameters() if p.requires_grad]


def save_adapter(language_model: LanguageModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as peft and vLLM read them."""
    language_model.model.save_pretrained(str(folder))
    # peft writes a model card in which nothing is filled in.
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(language_model: LanguageModel, folder: Path) -> None:
    """Copy a saved adapter's values into the attached one.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(language_model.model)
    wrong = sorted(
        k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape
    )
    if wrong:
        raise UserError(
            f"the adapter in {folder} does not fit the configured one: {len(wrong)} tensors differ, first {wrong[0]!r}",
            fix="use the lora section that it was trained with",
        )
    set_peft_model_state_dict(language_model.model, state)
