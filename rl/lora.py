"""The adapter: attached by peft, saved and loaded in peft's format, kept in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tandem.rl.config import LoraConfig
from tandem.rl.errors import UserError
from tandem.rl.library_imports import import_peft
from tandem.rl.model import LanguageModel


def attach_lora(language_model: LanguageModel, config: LoraConfig, *, seed: int) -> None:
    """Wrap the model with a fresh adapter (or the one in `init_from`) and make only that trainable.

    A fresh adapter starts as the identity (B = 0) and its A depends on `seed` alone.

    Raises:
        UserError: a target module does not exist, or the head is adapted in a way that is not computed: its weight is
            also the input embedding, or it has something beside plain LoRA without dropout.
    """
    peft = import_peft()
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
    language_model.model = wrapped
    _check_adapted_head(language_model)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    wrapped.eval()


def _check_targets(model: Any, config: LoraConfig) -> None:
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    if targets == ["all-linear"]:
        return
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    for target in targets:
        if head == target or head.endswith("." + target):
            _check_untied(model, model.get_output_embeddings().weight)
        if not any(name == target or name.endswith("." + target) for name, _ in model.named_modules()):
            leaves = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise UserError(
                f"lora.target_modules: the model has no module named {target!r}",
                fix=f"its linear layers are {', '.join(leaves)}",
            )


def _check_adapted_head(language_model: LanguageModel) -> None:
    """What an adapter does to the head is what log-probs are computed with, or it is refused.

    A target may be named by a pattern and an adapter may come from elsewhere, so the wrapped model is what counts.
    """
    adapter = language_model.head_adapter
    head = language_model.causal_lm.get_output_embeddings()
    for name, parameter in head.named_parameters():
        if parameter.requires_grad and (adapter is None or (parameter is not adapter.a and parameter is not adapter.b)):
            raise UserError(
                f"the adapter trains {name!r} of the model's head",
                reason="log-probs have no gradient for it",
                fix="use plain LoRA on the head, or none",
            )
    if adapter is not None:
        _check_untied(language_model.causal_lm, language_model.head_weight)


def _check_untied(model: Any, head_weight: torch.Tensor) -> None:
    """Refuse LoRA on a head whose weight is also the input embedding.

    peft adapts such a head alone, which trains as any other; but merging adds the product to the one shared matrix, so
    that the merged model embeds its input differently too, and is not the model that was trained.
    """
    if model.get_input_embeddings().weight.data_ptr() == head_weight.data_ptr():
        raise UserError(
            "lora.target_modules names the head, whose weight is also the model's input embedding",
            reason="a merged adapter would change the embedding as well, and with it the model",
            fix="leave the head out; all-linear does",
        )


def trainable(language_model: LanguageModel) -> list[tuple[str, torch.nn.Parameter]]:
    """The adapter's parameters by name, in a fixed order."""
    return [(n, p) for n, p in language_model.model.named_parameters() if p.requires_grad]


def save_adapter(language_model: LanguageModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as peft and vLLM read them."""
    # Left to itself, peft stores the base model's embeddings too as soon as the head has an adapter.
    language_model.model.save_pretrained(str(folder), save_embedding_layers=False)
    # peft writes a model card in which nothing is filled in.
    (folder / "README.md").unlink(missing_ok=True)
    # peft keeps these names as a set, whose order differs from process to process.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(language_model: LanguageModel, folder: Path) -> None:
    """Copy a saved adapter's values into the attached one.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(language_model.model, save_embedding_layers=False)
    wrong = sorted(
        k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape
    )
    if wrong:
        raise UserError(
            f"the adapter in {folder} does not fit the configured one: {len(wrong)} tensors differ, first {wrong[0]!r}",
            fix="use the lora section that it was trained with",
        )
    set_peft_model_state_dict(language_model.model, state)
