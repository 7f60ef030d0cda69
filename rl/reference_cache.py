"""Reference log-probs of a data set, computed once and kept on disk for later runs with the same model and data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tandem.rl.model import LanguageModel
from tandem.rl.samples import Sequence
from tandem.rl.weights import cache_dir

# Values of every tensor that enter the model's fingerprint, evenly spread: enough to tell two models apart.
_SAMPLES = 64


def cached_log_probs(
    lm: LanguageModel, sequences: list[Sequence], compute: Callable[[], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """`compute()`, or what it gave before for the same frozen weights and the same tokens.

    A file that is damaged or of another size is computed anew.
    """
    path = cache_dir() / "reference" / f"{_key(lm, sequences)}.safetensors"
    counts = [s.num_scored for s in sequences]
    if path.is_file():
        try:
            flat = load_file(path)["log_probs"]
        except (SafetensorError, KeyError, OSError):
            flat = torch.empty(0)
        if len(flat) == sum(counts):
            return list(flat.to(lm.device).split(counts))
    log_probs = compute()
    _write(path, torch.cat(log_probs).cpu())
    return log_probs


def _key(lm: LanguageModel, sequences: list[Sequence]) -> str:
    # How it is computed (rotations, windows) stands in the config, beside where it was loaded from and by what.
    other = ("_name_or_path", "transformers_version")
    config = {key: value for key, value in lm.causal_lm.config.to_dict().items() if key not in other}
    digest = hashlib.sha256(f"{lm.dtype} {lm.head} {sorted(config.items())}".encode())
    for name, tensor in _frozen(lm.model):
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(len(flat) // _SAMPLES, 1)].cpu()
        # As bytes, since numpy knows no bfloat16.
        values = picked.contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values)
    for sequence in sequences:
        digest.update(f"{sequence.prompt_ids}{sequence.completion_ids}{sequence.mask}".encode())
    return digest.hexdigest()[:32]


def _frozen(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All that the reference policy is computed with, by name: layers on the weight store have no parameters."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    for name, module in model.named_modules():
        for key, tensor in getattr(module, "stored_tensors", {}).items():
            yield f"{name}.{key}", tensor


def _write(path: Path, flat: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({"log_probs": flat}, beside)
    os.replace(beside, path)
