"""What tells base models apart: any tensor that differs, and nothing that does not. Whole runs: test_faults.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_model import save_llama, save_words

from tandem.rl.config import ModelConfig
from tandem.rl.errors import UserError
from tandem.rl.model_identity import model_facts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_words(tmp_path / "model", ["<unk>", "<eos>", "a", "b"], eos="<eos>", unk="<unk>")
    save_llama(tmp_path / "model", 4)
    return tmp_path / "model"


def facts_of(path: Path | str, revision: str | None = None) -> dict[str, str]:
    return model_facts(ModelConfig(model_name_or_path=str(path), revision=revision))


def test_any_tensor_that_differs_is_noticed(model: Path) -> None:
    weights, before = model / "model.safetensors", facts_of(model)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= before.keys()
    tensors = load_file(weights)
    assert len(tensors) > 15
    for name, tensor in tensors.items():
        # As a merged adapter does: one matrix moves, sizes and header stay.
        save_file(tensors | {name: tensor + 1e-4}, weights, metadata={"format": "pt"})
        after = facts_of(model)
        assert [file for file in before if after[file] != before[file]] == ["model.safetensors"], name
    save_file(tensors, weights, metadata={"format": "pt"})
    assert facts_of(model) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_other_settings_are_noticed(model: Path, name: str) -> None:
    before = facts_of(model)
    settings = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**settings, "changed": 1}))
    after = facts_of(model)
    assert [file for file in before if after[file] != before[file]] == [name]


def test_place_time_and_other_files_do_not_count(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "elsewhere" / "another-name", copy_function=shutil.copyfile))
    (copy / "README.md").write_text("new")
    assert facts_of(copy) == facts_of(model)


def test_every_shard_counts(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, model / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    before = facts_of(model)
    for file, part in shards.items():
        whole = (model / file).read_bytes()
        save_file({name: tensors[name] * 1.01 for name in part}, model / file)
        after = facts_of(model)
        assert [name for name in before if after[name] != before[name]] == [file]
        (model / file).write_bytes(whole)


def test_weights_are_not_read_whole(model: Path) -> None:
    """A file with a tensor of 64 GiB, all but its header a hole."""
    weights, count = model / "model.safetensors", 1 << 34
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * count)
    assert facts_of(model)["model.safetensors"].startswith(f"{8 + len(header) + 4 * count} bytes")


def test_a_gguf_file_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF one")
    (tmp_path / "renamed.gguf").write_bytes(b"GGUF one")
    (tmp_path / "b.gguf").write_bytes(b"GGUF two")
    assert facts_of(tmp_path / "a.gguf") == facts_of(tmp_path / "renamed.gguf")
    assert facts_of(tmp_path / "a.gguf") != facts_of(tmp_path / "b.gguf")


def test_a_hub_id_is_told_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    old, new = "1" * 40, "2" * 40
    kept = tmp_path / "models--org--name"
    for commit in (old, new):
        (kept / "snapshots" / commit).mkdir(parents=True)
        (kept / "snapshots" / commit / "config.json").write_text("{}")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(new)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert facts_of("org/name") == {"commit": new}
    assert facts_of("org/name", revision=old) == {"commit": old}
    with pytest.raises(UserError, match="org/other"):
        facts_of("org/other")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_damaged_weights_are_one_message(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"{model} cannot be read"):
        facts_of(model)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "gone.safetensors"}}', "x"])
def test_a_damaged_index_is_one_message(model: Path, index: str) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="cannot be read"):
        facts_of(model)
