"""Checkpoints: adapter, optimiser, random state and counters, in safetensors and JSON; whole or absent.

A checkpoint is written beside, brought to the disk and renamed; the last file in it, `files.json`, holds the size and
the SHA-256 of the others. So a folder that a crash, a full disk or a bad sector left is told from a whole one, and a
run goes on from the newest that is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tandem.rl.curriculum import PassRate
from tandem.rl.errors import UserError
from tandem.rl.journal import sync, write_whole
from tandem.rl.lora import load_adapter, save_adapter, trainable
from tandem.rl.model import LanguageModel
from tandem.rl.optim import optimizer_tensors, restore_optimizer
from tandem.rl.watch_memory import WatchMemory

_NAME = re.compile(r"step_(\d+)$")
_MANIFEST = "files.json"
_REQUIRED = {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"}


@dataclass
class State:
    """Where a run stands. Everything that the next step depends on beside weights and optimiser.

    Attributes:
        warmup_step: finished steps of the supervised warm-up. step: finished optimiser steps of the main phase.
        position: rows of the endless stream of epochs that are used up.
        num_tokens: prompt and completion tokens trained on so far.
        skipped_updates: updates left out because the gradient was not finite. skipped_in_a_row: the latest of them,
            with no good one since.
        failed_rollouts: the latest rollouts in a row on all of whose completions a reward failed.
        journal_rollouts: rollouts that were learned from. journal_bytes: where they end in the journal.
        seconds: time spent in finished steps.
        scores: held-out score by step.
        evaluating: the evaluation that is due after `step` has not come to its end.
        watch: what reward watch remembers.
        curriculum: pass rates by the prompts' row numbers, of those that were visited with a curriculum.
        reduced: keys of the section `train` that memory was too small for, with the values that fitted on the device
            `reduced_on`. halved: how often packs were halved.
    """

    warmup_step: int = 0
    step: int = 0
    position: int = 0
    num_tokens: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    failed_rollouts: int = 0
    journal_rollouts: int = 0
    journal_bytes: int = 0
    seconds: float = 0.0
    scores: dict[int, float] = field(default_factory=dict)
    evaluating: bool = False
    watch: WatchMemory = field(default_factory=WatchMemory)
    curriculum: dict[int, PassRate] = field(default_factory=dict)
    reduced: dict[str, Any] = field(default_factory=dict)
    reduced_on: str = ""
    halved: int = 0


def save_checkpoint(
    run_dir: Path, lm: LanguageModel, optimizer: torch.optim.Optimizer, state: State, *, keep: int | None
) -> Path:
    """Write `checkpoints/step_N`, then remove all but the newest `keep`.

    Raises:
        UserError: it cannot be written. The checkpoints of before are then as they were.
    """
    target = run_dir / "checkpoints" / f"step_{state.step:06d}"
    beside = target.with_name(f".{target.name}.tmp")
    try:
        _write_whole_folder(beside, lm, optimizer, state)
        _replace(beside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"the checkpoint {str(target)!r} cannot be written: {error}",
            reason="the checkpoint before it is untouched",
            fix="make room or the folder writable, then `rl-train resume` the run",
        ) from error
    if keep is not None:
        for _, old in _checkpoints(run_dir)[:-keep]:
            _remove(old)
    return target


def _write_whole_folder(folder: Path, lm: LanguageModel, optimizer: torch.optim.Optimizer, state: State) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_adapter(lm, folder)
    tensors = optimizer_tensors(optimizer, trainable(lm))
    save_file(tensors | random_state(), folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    files = sorted(folder.iterdir())
    for path in files:
        sync(path)
    manifest = {path.name: {"size": path.stat().st_size, "sha256": _digest(path)} for path in files}
    write_whole(folder / _MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode("ascii"))


def _replace(beside: Path, target: Path) -> None:
    """Give a whole folder its name. Between removing one of that name and renaming, `beside` is the checkpoint:
    `_finish_saves` completes what a kill interrupts there."""
    if target.exists():
        _remove(target)
    beside.rename(target)
    sync(target.parent)
    sync(target.parent.parent)  # the first checkpoint's folder is new itself


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that no half-removed one is ever seen under its name."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _finish_saves(run_dir: Path) -> None:
    """Complete or remove what a kill left of a save."""
    folder = run_dir / "checkpoints"
    for path in sorted(folder.glob(".step_*.tmp")) if folder.is_dir() else ():
        target = folder / path.name.removeprefix(".").removesuffix(".tmp")
        if not target.exists() and damage(path) is None:
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*.gone") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def save_final_adapter(run_dir: Path, lm: LanguageModel) -> Path:
    """Write the run's `adapter`, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    target, beside = run_dir / "adapter", run_dir / ".adapter.tmp"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        save_adapter(lm, beside)
        for path in beside.iterdir():
            sync(path)
        _replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the adapter {str(target)!r} cannot be written: {error}",
            reason="the newest checkpoint has the same adapter",
            fix="make room or the folder writable, then `rl-train resume` the run",
        ) from error
    return target


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run; see `whole_checkpoint` for one that was verified."""
    found = _checkpoints(run_dir)
    return found[-1][1] if found else None


def whole_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, for a run that goes on; None if the run has not written any.

    Damaged ones are set aside as `damaged_step_N`, and `warn` is told. Call it only while holding the run's lock.

    Raises:
        UserError: there are checkpoints and none of them is whole.
    """
    _finish_saves(run_dir)
    found = [path for _, path in reversed(_checkpoints(run_dir))]
    bad: list[tuple[Path, str]] = []
    for path in found:
        if (reason := damage(path)) is None:
            for damaged, why in bad:
                aside = damaged.with_name(f"damaged_{damaged.name}")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)
                warn(f"the checkpoint {damaged} is damaged ({why}); going on from {path.name}, it is kept as {aside}")
            return path
        bad.append((path, reason))
    if bad:
        raise UserError(
            f"none of the {len(bad)} checkpoints of {run_dir} is whole: "
            + "; ".join(f"{path.name}: {why}" for path, why in bad),
            fix=f"put a good copy back, or remove {run_dir / 'checkpoints'} to start from the beginning",
        )
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if it is whole."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_bytes())
        expected = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in manifest.items()}
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {type(error).__name__}"
    if missing := _REQUIRED - expected.keys():
        return f"{_MANIFEST} does not name {', '.join(sorted(missing))}"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if Path(name).name != name:
            return f"{_MANIFEST} names {name!r}, which is no file of the checkpoint"
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if _digest(path) != digest:
                return f"{name} has other bytes than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def read_state(checkpoint: Path) -> State:
    """The counters of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        raw = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        raw["scores"] = {int(step): float(score) for step, score in raw["scores"].items()}
        raw["watch"] = WatchMemory.of(raw.get("watch", {}))
        raw["curriculum"] = {int(i): PassRate(**rate) for i, rate in raw.get("curriculum", {}).items()}
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
    try:
        load_adapter(lm, checkpoint)
        saved = load_file(checkpoint / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {error}",
            fix="remove that folder to resume from the one before it",
        ) from error
    set_random_state({name: saved.pop(name) for name in list(saved) if name.startswith("random/")})
    restore_optimizer(optimizer, trainable(lm), saved)


def random_state() -> dict[str, torch.Tensor]:
    """Of PyTorch's generators, by `random/DEVICE`."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave. A GPU's is left out where there is none."""
    torch.set_rng_state(state["random/cpu"])
    if "random/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random/cuda"])


def _checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    folder = run_dir / "checkpoints"
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := _NAME.match(p.name))] if folder.is_dir() else []
    return sorted(found)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
