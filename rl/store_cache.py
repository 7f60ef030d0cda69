"""Quantised weights on disk, so that the next start only copies them: one safetensors file and one of facts about it.

Both are written beside and renamed, the facts last. A file that is not what its facts say, or that belongs to another
state of the source, is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

# Of the layout of these files. Another number makes all of them anew.
VERSION = 1
_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.int32: "I32"}


@dataclass(frozen=True)
class StoreCache:
    """Where one model's stored weights lie, and what they must be made from.

    Attributes:
        path: of the safetensors file; its facts are beside it, in `.json`.
        facts: values that must all be the same as when the file was written.
    """

    path: Path
    facts: Mapping[str, str]

    def read(self, place: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor] | str | None:
        """The tensors, each copied where `place` puts it; None where nothing was written; else why it is of no use."""
        from safetensors import SafetensorError, safe_open

        facts_file = self.path.with_suffix(".json")
        if not facts_file.is_file():
            return None
        try:
            found = json.loads(facts_file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                return "its facts are no object"
            wrong = [key for key, value in self._all_facts().items() if found.get(key) != value]
            if wrong:
                return f"it was made with another {', '.join(wrong)}"
            if found.get("size") != self.path.stat().st_size:
                return f"it has {self.path.stat().st_size} bytes, not {found.get('size')}"
            if found.get("header") != _header_digest(self.path):
                return "its header is not the one that was written"
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return {name: place(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            return f"it cannot be read ({type(error).__name__}: {error})"

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep `tensors`, one at a time on the host.

        Raises:
            OSError: there is no room, or the folder cannot be written to.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file without facts does not count, so at no time is a new file described by old facts.
        self.path.with_suffix(".json").unlink(missing_ok=True)
        with _renamed(self.path) as file:
            _write_safetensors(file, tensors)
        facts = self._all_facts() | {"size": self.path.stat().st_size, "header": _header_digest(self.path)}
        with _renamed(self.path.with_suffix(".json")) as file:
            file.write(json.dumps(facts, indent=1).encode())

    def _all_facts(self) -> dict[str, object]:
        return {"version": VERSION, **self.facts}


def _write_safetensors(file: IO[bytes], tensors: Mapping[str, torch.Tensor]) -> None:
    """The format is a length, a JSON header, and the tensors' bytes; widest types first keeps all of them aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, start = {}, 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _header_digest(path: Path) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 1 << 27:
            raise ValueError(f"a header of {length} bytes")
        return hashlib.sha256(file.read(length)).hexdigest()


@contextmanager
def _renamed(target: Path) -> Iterator[IO[bytes]]:
    """A file that bears its name only once it is whole."""
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
