"""Checkpoints: adapter, optimiser, random state and counters, in safetensors and JSON; whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tandem.rl.errors import UserError
from tandem.rl.lora import load_adapter, save_adapter, trainable
from tandem.rl.model import LanguageModel
from tandem.rl.optim import optimizer_tensors, restore_optimizer

_NAME = re.compile(r"step_(\d+)$")


@dataclass
class State:
    """Where a run stands. Everything that the next step depends on beside weights and optimiser.

    Attributes:
        warmup_step: finished steps of the supervised warm-up. step: finished optimiser steps of the main phase.
        position: rows of the endless stream of epochs that are used up.
        num_tokens: prompt and completion tokens trained on so far.
        skipped_updates: updates left out because the gradient was not finite.
        seconds: time spent in finished steps.
        scores: held-out score by step.
    """

    warmup_step: int = 0
    step: int = 0
    position: int = 0
    num_tokens: int = 0
    skipped_updates: int = 0
    seconds: float = 0.0
    scores: dict[int, float] = field(default_factory=dict)


def save_checkpoint(
    run_dir: Path, lm: LanguageModel, optimizer: torch.optim.Optimizer, state: State, *, keep: int | None
) -> Path:
    """Write `checkpoints/step_N`, then remove all but the newest `keep`."""
    target = run_dir / "checkpoints" / f"step_{state.step:06d}"
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_adapter(lm, beside)
    tensors = optimizer_tensors(optimizer, trainable(lm))
    save_file(tensors | _random_state(), beside / "optimizer.safetensors")
    (beside / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    for path in beside.iterdir():
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    _sync(target.parent)
    if keep is not None:
        for _, old in _checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    return target


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = _checkpoints(run_dir)
    return found[-1][1] if found else None


def read_state(checkpoint: Path) -> State:
    """The counters of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        raw = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        raw["scores"] = {int(step): float(score) for step, score in raw["scores"].items()}
        return State(**raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {error}",
            fix="remove that folder to resume from the one before it",
        ) from error


def restore(checkpoint: Path, lm: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Put adapter, optimiser and random state back as they were saved.

    Raises:
        UserError: a file is missing or damaged, or belongs to another configuration.
    """
    from safetensors import SafetensorError

    try:
        load_adapter(lm, checkpoint)
        saved = load_file(checkpoint / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {error}",
            fix="remove that folder to resume from the one before it",
        ) from error
    torch.set_rng_state(saved.pop("random/cpu"))
    if (cuda := saved.pop("random/cuda", None)) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    restore_optimizer(optimizer, trainable(lm), saved)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def _checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    folder = run_dir / "checkpoints"
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := _NAME.match(p.name))] if folder.is_dir() else []
    return sorted(found)


def _sync(path: Path) -> None:
    """Bring a file or folder to the disk, so that a rename never shows an empty file after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
