"""An adapter's folder, looked at before anything is loaded: is it peft's, is it whole, and is it safe to read?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem.rl.errors import UserError, short

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def check_adapter_files(folder: str | Path, what: str = "lora.init_from") -> None:
    """Refuse a folder that is no LoRA adapter of peft in safetensors.

    Raises:
        UserError: a file is missing or damaged, or it is another kind of adapter.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{what} is {str(folder)!r}, which is no folder", fix="give the `adapter` folder of a run")
    _check_settings(path / SETTINGS, what)
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").exists()
        raise UserError(
            f"{what}: {str(path)!r} has no {WEIGHTS}" + (", but adapter_model.bin" if pickled else ""),
            reason="that file is a pickle, which runs code when it is read" if pickled else "",
            fix="save it in safetensors where you trust it" if pickled else "give the `adapter` folder of a run",
        )
    _check_weights(path / WEIGHTS, what)


def _check_settings(path: Path, what: str) -> None:
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{what}: {str(path)!r} cannot be read: {error}", fix="give the `adapter` folder of a run"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"{what}: {str(path)!r} holds {short(settings)}, not an object of settings")
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(
            f"{what}: {str(path)!r} has the peft_type {short(kind)}", reason="only LoRA is trained", fix="use LoRA"
        )
    rank, targets = settings.get("r"), settings.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{what}: {str(path)!r} has r = {short(rank)}", reason="a rank is a whole number from 1 on")
    if not targets or not isinstance(targets, str | list) or not all(isinstance(t, str) for t in targets):
        raise UserError(
            f"{what}: {str(path)!r} has target_modules = {short(targets)}", reason="they are names of linear layers"
        )
    alpha = settings.get("lora_alpha", 8)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UserError(f"{what}: {str(path)!r} has lora_alpha = {short(alpha)}", reason="it is a number")


def _check_weights(path: Path, what: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{what}: {str(path)!r} is damaged or no safetensors file: {error}", fix="copy the adapter again"
        ) from error
    if not names or not all(".lora_" in name for name in names):
        odd = [name for name in names if ".lora_" not in name]
        raise UserError(
            f"{what}: {str(path)!r} holds no LoRA weights only: "
            + (f"{short(odd[0])} is among its {len(names)} tensors" if odd else "it has no tensors"),
            fix="give an adapter that peft saved without other modules",
        )
