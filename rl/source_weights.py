"""The tensors of a Hugging Face checkpoint, read one at a time: safetensors in one file or many, dense or NF4."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from tandem.rl.errors import UserError, cause, short
from tandem.rl.weight_formats import NF4, Nf4Weight
from tandem.rl.weights import resolve_model

_INDEX = "model.safetensors.index.json"
_STATE = ".quant_state.bitsandbytes__"


def checkpoint_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, a GGUF file's converted one, or a hub id's, downloaded where it must be.

    Raises:
        UserError: there is no such model, here or on the hub.
    """
    resolved = resolve_model(str(source))
    if (folder := Path(resolved)).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(resolved, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"cannot get the model {short(resolved)}: {cause(error)}",
            fix="give a hub id, a local folder in Hugging Face's format or pkg://PACKAGE/FILE.gguf; without access to "
            "a hub, download the model first and give its folder",
        ) from error


def weight_files(folder: Path) -> list[str]:
    """The names of a checkpoint's safetensors files: those that its index lists, where it has one.

    Raises:
        UserError: there are none, or the index cannot be read.
    """
    if (folder / _INDEX).is_file():
        try:
            listed = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({str(name) for name in listed})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / _INDEX} cannot be read: {cause(error)}") from error
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} has no .safetensors file",
            reason="weights are read from safetensors, tensor by tensor",
            fix="save the model with save_pretrained(..., safe_serialization=True)",
        )
    return files


class SourceWeights:
    """A checkpoint's tensors by name. Reading maps the file: a tensor takes host memory only while it is copied.

    Raises:
        UserError: no safetensors files, or files that are damaged or missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = weight_files(folder)
        self._shards: dict[str, Any] = {name: self._open(name) for name in self._files}
        self._shard_of = {key: name for name, shard in self._shards.items() for key in shard.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The tensor, on the host.

        Raises:
            UserError: it is missing or, where `shape` is given, has another.
        """
        if name not in self:
            raise UserError(
                f"{self.folder} has no tensor {name!r}",
                reason="the model that its config.json describes has one",
                fix="check that the checkpoint is complete and belongs to this config.json",
            )
        tensor = self._shards[self._shard_of[name]].get_tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.folder}: {name} has the shape {tuple(tensor.shape)}",
                reason=f"the model that its config.json describes has {shape} there",
                fix="use the config.json that belongs to these weights",
            )
        if shape is not None and not tensor.is_floating_point():
            raise UserError(
                f"{self.folder}: {name} holds {tensor.dtype}",
                reason="that is a quantised weight of a kind that is not read here",
                fix="use the bfloat16 checkpoint of this model, or one that bitsandbytes quantised to NF4",
            )
        return tensor

    def is_nf4(self, part: str) -> bool:
        """Whether the linear layer `part` is stored in 4 bits."""
        return any(f"{part}.weight{_STATE}{kind}" in self for kind in ("nf4", "fp4"))

    def read_nf4(self, part: str, shape: tuple[int, int]) -> Nf4Weight:
        """A linear layer that bitsandbytes packed.

        Raises:
            UserError: a tensor is missing, or it is packed in a way that is not read here.
        """
        weight = f"{part}.weight"
        if f"{weight}{_STATE}nf4" not in self:
            raise _unsupported(f"{part} is stored in fp4", "only nf4 is computed with")
        facts = json.loads(self.read(f"{weight}{_STATE}nf4").numpy().tobytes())
        nested = "nested_blocksize" in facts
        stored = {"shape": tuple(facts["shape"]), "blocksize": facts["blocksize"]}
        wanted: dict[str, Any] = {"shape": shape, "blocksize": NF4.blocksize}
        if nested:
            stored["nested_blocksize"], wanted["nested_blocksize"] = facts["nested_blocksize"], NF4.blocksize2
        for key, value in wanted.items():
            if stored[key] != value:
                raise _unsupported(f"{part} is packed with {key} {stored[key]}", f"the model needs {key} {value}")
        self._check_levels(weight)
        count = shape[0] * shape[1]
        packed = self.read(weight).contiguous().view(-1).view(torch.uint8)
        absmax = self.read(f"{weight}.absmax")
        blocks = count // NF4.blocksize
        sizes = {"weight": (packed.numel(), count // 2), "absmax": (absmax.numel(), blocks)}
        extra: dict[str, Any] = {}
        if nested:
            extra["absmax2"] = self.read(f"{weight}.nested_absmax").float()
            extra["code2"] = self.read(f"{weight}.nested_quant_map").float()
            extra["offset"] = float(facts["nested_offset"])
            sizes["nested_absmax"] = (extra["absmax2"].numel(), -(-blocks // NF4.blocksize2))
            sizes["nested_quant_map"] = (extra["code2"].numel(), 256)
        for key, (found, expected) in sizes.items():
            if found != expected:
                raise _unsupported(f"{part}: {key} has {found} entries", f"its shape {shape} needs {expected}")
        kind = torch.uint8 if nested else torch.float32
        if absmax.dtype != kind:
            raise _unsupported(f"{part}: absmax is {absmax.dtype}", f"its quant_state calls for {kind}")
        return Nf4Weight(shape, packed, absmax, **extra)

    def fingerprint(self) -> str:
        """Changes with the config and with any file's name, size or time."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name in self._files:
            facts = (self.folder / name).stat()
            digest.update(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _check_levels(self, weight: str) -> None:
        from tandem.kernels.reference import NF4_LEVELS

        levels = self.read(f"{weight}.quant_map").float()
        if levels.numel() != 16 or not torch.equal(levels, torch.tensor(NF4_LEVELS, dtype=torch.float32)):
            raise _unsupported(f"{weight} has a quant_map of its own", "only NF4's sixteen levels are computed with")

    def _open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / name, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.folder / name} cannot be read: {cause(error)}", fix="download or copy the file again"
            ) from error


def _unsupported(problem: str, reason: str) -> UserError:
    return UserError(problem, reason=reason, fix="quantise the model anew from its bfloat16 checkpoint")
