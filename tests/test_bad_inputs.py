"""Whatever a user hands over broken: exit code 2, one clear message, no traceback, nothing left half-written.

The written corpus lies in `bad_inputs/`; the rest is made from good files: every key with a wrong value, files cut,
emptied and overwritten, and what hypothesis thinks of. The last test says how many there were.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import write_place

from tandem.rl import cli
from tandem.rl.config_file import all_keys

CORPUS = Path(__file__).parent / "bad_inputs"
TRIED: Counter[str] = Counter()
TEMPLATED = '{"prompt": [{"role": "user", "content": "w1"}]}\n'
few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Done(NamedTuple):
    code: int
    out: str
    err: str


def rl_train(*arguments: object) -> Done:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["rl-train", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


def corpus(name: str) -> list[dict[str, Any]]:
    return yaml.safe_load((CORPUS / f"{name}.yaml").read_text(encoding="utf-8"))


def content(case: dict[str, Any]) -> bytes:
    return bytes.fromhex(case["hex"]) if "hex" in case else case["text"].encode("utf-8", "surrogatepass")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Place:
    """A folder with everything that a run needs, all of it good."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, write_place(folder)
        self.good = yaml.safe_load(self.config.read_text())
        self.runs = folder / "runs"

    def refused(self, kind: str, says: str, *arguments: object, unchanged: Path | None = None) -> Done:
        """Run a command line and hold its outcome against the contract."""
        TRIED[kind] += 1
        shutil.rmtree(self.runs, ignore_errors=True)
        before = tree(unchanged) if unchanged else None
        done = rl_train(*arguments)
        assert done.code == 2, (done, arguments)
        self.one_message(done)
        assert says in done.err, (says, done.err)
        if unchanged is not None:
            assert tree(unchanged) == before
        else:
            assert not self.runs.exists() or not os.listdir(self.runs), os.listdir(self.runs)
        return done

    def refused_or_fine(self, kind: str, *arguments: object) -> None:
        """For inputs of which nobody knows whether they are wrong."""
        TRIED[kind] += 1
        shutil.rmtree(self.runs, ignore_errors=True)
        done = rl_train(*arguments)
        assert done.code in (0, 2), done
        if done.code == 2:
            self.one_message(done)
        assert not self.runs.exists() or not os.listdir(self.runs)

    @staticmethod
    def one_message(done: Done) -> None:
        assert "Traceback" not in done.out + done.err
        assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1 or "Usage: " in done.err, done.err
        problem = done.err.partition("error: ")[2]
        assert len(problem.split()) >= 3, done.err
        assert len(done.err) < 4000, done.err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("bad")
        patch.setenv("TANDEM_CACHE", str(folder / "cache"))
        yield Place(folder)


def named(cases: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=f"{i}") for i, case in enumerate(cases)]


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", named(corpus("configs")))
def test_configs(place: Place, case: dict[str, Any]) -> None:
    if "set" in case:
        # Beside the good config, so that file names in the overrides mean the same.
        place.refused("config", case["says"], "run", place.config, *case["set"])
        return
    path = place.folder / "case.yaml"
    path.write_bytes(content(case))
    place.refused("config", case["says"], "run", path)


def test_every_key_with_a_wrong_value_and_misspelt(place: Place) -> None:
    from tandem.rl.config_file import parse_config
    from tandem.rl.errors import UserError

    keys = sorted({full for _, full in all_keys() if full.count(".") == 1})
    assert len(keys) > 80
    for key in keys:
        section, name = key.split(".")
        place.refused("config", name, "run", place.config, f"{key}x=1")
        for value in ([{"a": [1]}], {"a": {"b": 1}}, "\x00 no such value", -7.25):
            try:
                parse_config({**place.good, section: {**(place.good.get(section) or {}), name: value}})
            except UserError:
                place.refused("config", section, "run", place.config, f"{key}={json.dumps(value)}")
                break


@few
@given(data=st.data())
def test_damaged_configs(place: Place, data: st.DataObject) -> None:
    path = place.folder / "case.yaml"
    path.write_bytes(data.draw(damaged(place.config.read_bytes())))
    place.refused_or_fine("config", "run", path, "--dry-run")


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file cut, with bytes overwritten, a piece doubled or removed."""
    at = draw(st.integers(0, len(whole)))
    size = draw(st.integers(0, 20))
    way = draw(st.sampled_from(["cut", "bytes", "double", "remove"]))
    if way == "cut":
        return whole[:at]
    if way == "bytes":
        return whole[:at] + draw(st.binary(min_size=1, max_size=8)) + whole[at + size :]
    return whole[: at + size] + whole[at:] if way == "double" else whole[:at] + whole[at + size :]


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", named(corpus("datasets")))
def test_data_sets(place: Place, case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / case["name"]
    path.write_bytes(content(case))
    source = f"{path}:{case['call']}" if "call" in case else str(path)
    options = [f"data.dataset_name={source}", *case.get("with", [])]
    if case.get("with"):
        options += ["eval.dataset_name=null", "warmup.max_steps=0"]
    place.refused("data set", case["says"], "run", place.config, *options)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@few
@given(rows=st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "role"]), JSON_VALUES), max_size=3))
def test_rows_of_anything(place: Place, rows: list[dict[str, Any]]) -> None:
    path = place.folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place.refused_or_fine("data set", "run", place.config, f"data.dataset_name={path}", "--dry-run")


@few
@given(data=st.data())
def test_damaged_data_files(place: Place, data: st.DataObject) -> None:
    path = place.folder / "rows.jsonl"
    path.write_bytes(data.draw(damaged((place.folder / "prompts.jsonl").read_bytes())))
    place.refused_or_fine("data set", "run", place.config, f"data.dataset_name={path}", "--dry-run")


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", named(corpus("templates")))
def test_chat_templates(place: Place, case: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(content(case))
    (tmp_path / "rows.jsonl").write_text(TEMPLATED)
    options = [f"model.chat_template={tmp_path}/chat.jinja", f"data.dataset_name={tmp_path}/rows.jsonl"]
    place.refused("chat template", case["says"], "run", place.config, *options)


# --- models and tokenizers --------------------------------------------------------------------------------------------


def copied(place: Place, name: str, to: Path) -> Path:
    return Path(shutil.copytree(place.folder / name, to / name))


FILE_FAULTS = {
    "missing": None,
    "empty": b"",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "object": b"{}",
    "text": b"not json",
    "bytes": b"\xff\xfe\x00\x01",
    "half": "half",
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_model_files(place: Place, tmp_path: Path, name: str, fault: str) -> None:
    model = copied(place, "model", tmp_path)
    spoil(model / name, FILE_FAULTS[fault])
    place.refused("model or tokenizer", str(model), "run", place.config, f"model.model_name_or_path={model}")


def spoil(path: Path, fault: bytes | str | None) -> None:
    if fault is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if isinstance(fault, str) else fault)


class Malicious:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickled_model_or_adapter_is_not_read(place: Place, tmp_path: Path) -> None:
    import torch

    target, model = tmp_path / "executed", copied(place, "model", tmp_path)
    (model / "model.safetensors").unlink()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings_of_peft = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings_of_peft))
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Malicious(target))),
        lambda path: torch.save({"a": Malicious(target)}, path),
    ):
        write(model / "pytorch_model.bin")
        place.refused("model or tokenizer", str(model), "run", place.config, f"model.model_name_or_path={model}")
        write(adapter / "adapter_model.bin")
        place.refused("adapter", "pickle", "run", place.config, f"lora.init_from={adapter}")
        write(tmp_path / "data.pkl")
        place.refused("data set", "unknown file type", "run", place.config, f"data.dataset_name={tmp_path}/data.pkl")
    assert not target.exists()


@few
@given(data=st.data())
def test_damaged_tokenizers(place: Place, tmp_path_factory, data: st.DataObject) -> None:
    model = copied(place, "model", tmp_path_factory.mktemp("tokenizer"))
    path = model / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    place.refused_or_fine("model or tokenizer", "run", place.config, f"model.model_name_or_path={model}", "--dry-run")


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, elsewhere than where refused ones must leave nothing."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        from tandem.rl import commands

        patch.setattr(commands, "write_report", lambda run_dir: run_dir)
        done = rl_train("run", place.config, f"output_dir={folder}", "checkpoint.save_total_limit=1")
    assert done.code == 0, done.err
    return folder / "run"


ADAPTER_SETTINGS: list[dict[str, Any]] = [
    {"peft_type": None},
    {"peft_type": "IA3"},
    {"peft_type": ["LORA"]},
    {"r": 0},
    {"r": -1},
    {"r": "2"},
    {"r": 2.5},
    {"r": True},
    {"r": None},
    {"r": 3},
    {"r": 10**9},
    {"target_modules": None},
    {"target_modules": []},
    {"target_modules": 3},
    {"target_modules": ["q_prj"]},
    {"target_modules": [3]},
    {"lora_alpha": "x"},
    {"lora_alpha": None},
    {"no_such_setting_of_peft": {"a": 1}, "r": 5},
    {"task_type": "NONSENSE", "r": 4},
    {"modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("change", ADAPTER_SETTINGS, ids=str)
def test_adapter_settings(place: Place, trained: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    place.refused("adapter", str(adapter), "run", place.config, f"lora.init_from={adapter}")


@pytest.mark.parametrize("fault", FILE_FAULTS)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_files(place: Place, trained: Path, tmp_path: Path, name: str, fault: str) -> None:
    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    spoil(adapter / name, FILE_FAULTS[fault])
    place.refused("adapter", str(adapter), "run", place.config, f"lora.init_from={adapter}")


# --- run folders ------------------------------------------------------------------------------------------------------

CHECKPOINT_FILES = ["state.json", "files.json", "optimizer.safetensors", "adapter_model.safetensors"]


@pytest.mark.parametrize("fault", FILE_FAULTS)
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_the_only_checkpoint(place: Place, trained: Path, tmp_path: Path, name: str, fault: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (checkpoint,) = (run / "checkpoints").iterdir()
    spoil(checkpoint / name, FILE_FAULTS[fault])
    place.refused("checkpoint", "whole", "resume", run, unchanged=run)


@pytest.mark.parametrize("where", ["../../outside", "/etc/passwd", "sub/file"])
def test_a_checkpoint_that_names_files_elsewhere(place: Place, trained: Path, tmp_path: Path, where: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (checkpoint,) = (run / "checkpoints").iterdir()
    names = json.loads((checkpoint / "files.json").read_text())
    (checkpoint / "files.json").write_text(json.dumps({**names, where: {"size": 0, "sha256": ""}}))
    place.refused("checkpoint", "no file of the checkpoint", "resume", run, unchanged=run)


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_run_config(place: Place, trained: Path, tmp_path: Path, fault: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    spoil(run / "config.yaml", FILE_FAULTS[fault])
    for command in ("resume", "report", "replay"):
        place.refused("run folder", "", command, run, unchanged=run)


@pytest.mark.parametrize("fault", ["empty", "list", "number", "null", "text", "bytes", "half"])
@pytest.mark.parametrize("name", ["data.json", "model.json"])
def test_fingerprints(place: Place, trained: Path, tmp_path: Path, name: str, fault: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    spoil(run / name, FILE_FAULTS[fault])
    place.refused("run folder", name, "resume", run, unchanged=run)


@pytest.mark.parametrize("fault", ["missing", "empty", "text", "bytes"])
def test_journals_to_replay(place: Place, trained: Path, tmp_path: Path, fault: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    spoil(run / "journal.jsonl", FILE_FAULTS[fault])
    place.refused("run folder", "journal", "replay", run, f"output_dir={place.runs}", unchanged=run)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["rollout.num_generations=8"], "groups of 4"),
        (["train.generation_batch_size=32"], "16 completions"),
        (["algorithm.name=sft", "data.dataset_name=examples.jsonl"], "learns from no rollouts"),
    ],
)
def test_replays_that_do_not_fit(place: Place, trained: Path, options: list[str], says: str) -> None:
    place.refused("run folder", says, "replay", trained, *options, unchanged=trained)


def test_command_lines(place: Place) -> None:
    for arguments in (
        ["run"],
        ["resume"],
        ["replay"],
        ["fly", place.config],
        ["run", place.config, "--fast"],
        ["resume", place.folder],
        ["resume", place.config],
        ["report", place.folder / "nowhere"],
        ["run", place.folder],
        ["check", place.config, "--prompts", "0"],
    ):
        TRIED["command line"] += 1
        done = rl_train(*arguments)
        assert done.code == 2, (arguments, done)
        assert "Traceback" not in done.err


def test_there_are_enough_of_them(request: pytest.FixtureRequest) -> None:
    """Runs last. The count in the README is read from here (`benchmarks/robustness.py`)."""
    request.node.user_properties.append(("inputs", sum(TRIED.values())))
    print(f"\nbad inputs tried: {sum(TRIED.values())} ({', '.join(f'{n} {k}' for k, n in sorted(TRIED.items()))})")
    if set(TRIED) >= {"config", "data set", "chat template", "model or tokenizer", "adapter", "checkpoint"}:
        assert sum(TRIED.values()) >= 300
