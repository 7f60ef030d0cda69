"""Which base model a run trains an adapter for: `model.json` in the run folder.

An adapter and its optimiser state mean something on one model only. A resumed run that finds other weights under the
same path would silently become another run, so they are compared by what they are, wherever they lie: a hub's commit,
a GGUF file's digest, or the files of a folder. Of weights, a few bytes of every tensor count beside header and size:
reading all of them would take as long as loading the model, and first and last bytes are often embeddings and norms,
which stay the same in a model with a merged adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from tandem.rl.config import ModelConfig
from tandem.rl.console import Console
from tandem.rl.errors import UserError, cause, short
from tandem.rl.journal import write_whole
from tandem.rl.source_weights import weight_files
from tandem.rl.weights import gguf_digest, gguf_file, resolve_model

NAME = "model.json"

# What the tokens, the stop tokens and the computation follow from, beside the weights.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Read from the middle of every tensor.
_SAMPLE = 256


def model_facts(model: ModelConfig) -> dict[str, str]:
    """What tells a model from others, by file, or by `gguf` or `commit`. The path is no part of it.

    Raises:
        UserError: there is no such model, or its files cannot be read.
    """
    name = model.model_name_or_path
    if (file := gguf_file(name)) is not None:
        return {"gguf": f"sha256 starts with {gguf_digest(file)}"}
    if not (folder := Path(resolve_model(name))).is_dir():
        return {"commit": _commit(name, model.revision)}
    try:
        facts = {file: _whole(folder / file) for file in _SETTINGS if (folder / file).is_file()}
        return facts | {file: _sampled(folder / file) for file in weight_files(folder)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the model in {folder} cannot be read: {cause(error)}", fix="download or copy its files again"
        ) from error


def keep_model(run_dir: Path, facts: dict[str, str]) -> None:
    """Record the model as the run's own."""
    write_whole(run_dir / NAME, (json.dumps(facts, indent=2) + "\n").encode("ascii"))


def other_model(
    run_dir: Path, model: ModelConfig, facts: dict[str, str], console: Console, *, accept_changes: bool = False
) -> bool:
    """Whether a model is another one than a run was started with, which is said. A run from before this was recorded
    is taken at its word, with a note.

    Args:
        facts: of `model`. accept_changes: another model is meant.

    Raises:
        UserError: it is another one and not meant, or the record cannot be read.
    """
    path = run_dir / NAME
    try:
        before = json.loads(path.read_bytes())
        changed = [
            f"{file}: {facts.get(file, 'missing')}; the run was started with {before.get(file, 'none')}"
            for file in sorted(facts.keys() | before.keys())
            if facts.get(file) != before.get(file)
        ]
    except FileNotFoundError:
        console.note(f"{run_dir} has no {NAME}: whether its base model is still the same cannot be told")
        return False
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            reason="it says which base model the run was started with",
            fix=f"remove it if you know that the model is the same: rm {path}",
        ) from error
    if not changed:
        return False
    problem = "\n".join([f"the base model {short(model.model_name_or_path)} has changed", *changed])
    if not accept_changes:
        commit = before.get("commit") if "commit" in facts else None
        back = f"set model.revision={commit}" if commit else "put the old model back or give its folder"
        raise UserError(
            problem,
            reason="the run's adapter was trained for other weights",
            fix=f"{back}, start a new run, or say that this is meant: --changed-model",
        )
    console.warn(problem)
    return True


def _commit(name: str, revision: str | None) -> str:
    """Of a hub id: what its revision stands for at the moment, or stood for where there is no access to a hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"cannot get the model {short(name)}: {cause(error)}") from error


def _whole(path: Path) -> str:
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _sampled(path: Path) -> str:
    """Size, and SHA-256 of a safetensors file's header and of the middle of each of its tensors."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
        digest = hashlib.sha256(header)
        for place in _middles(header):
            digest.update(_bytes_at(file, 8 + length + place))
    return f"{size} bytes, sampled sha256 {digest.hexdigest()}"


def _middles(header: bytes) -> list[int]:
    """Where the samples start, counted from the end of the header, in the order of the file."""
    spans = sorted(
        tuple(tensor["data_offsets"]) for name, tensor in json.loads(header).items() if name != "__metadata__"
    )
    return [max(start, (start + end - _SAMPLE) // 2) for start, end in spans]


def _bytes_at(file: BinaryIO, place: int) -> bytes:
    file.seek(place)
    return file.read(_SAMPLE)
