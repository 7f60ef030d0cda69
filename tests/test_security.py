"""What comes from outside stays data: no pickles, no foreign code, no secrets written, no path out."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import write_place

from tandem.rl import cli
from tandem.rl.config_file import load_config, parse_config
from tandem.rl.errors import UserError
from tandem.rl.journal import write_rollouts
from tandem.rl.report import write_report
from tandem.rl.samples import Completion, Prompt, Scored

ROOT = Path(__file__).parents[1]
FOLDERS = ("rl", "rewards", "rollout", "kernels")
# Modules that run what they read, or unpack archives. `marshal` goes through the sandbox's own pipes only.
FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "tarfile", "zipfile", "marshal"}
EXCUSED = {"marshal": {"sandbox.py", "sandbox_child.py", "sandbox_start.py"}}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_that_runs_what_it_reads_is_used() -> None:
    found, seen = [], 0
    for path, tree in trees():
        seen += 1
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            found += [(path.name, n) for n in names if n in FORBIDDEN and path.name not in EXCUSED.get(n, ())]
            if isinstance(node, ast.Call):
                call, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if call in ("torch.load", "torch.save", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive"):
                    found.append((path.name, call))
                if call == "yaml.load" and keywords.get("Loader") != "_UniqueKeys":
                    found.append((path.name, call))
                if keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code") == "True":
                    found.append((path.name, str(keywords)))
                loads = call.endswith("AutoModelForCausalLM.from_pretrained") and "gguf_file" not in keywords
                if loads and keywords.get("use_safetensors") != "True":
                    found.append((path.name, "from_pretrained without use_safetensors=True"))
    assert seen > 80
    assert not found


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    for text in (
        f"model: !!python/object/apply:os.system ['touch {target}']",
        f"model: !!python/object/new:os.system ['touch {target}']",
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{target}']]",
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="not valid YAML"):
            load_config(tmp_path / "config.yaml")
    (tmp_path / "good.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "good.yaml", [f"model=!!python/object/apply:os.system ['touch {target}']"])
    assert not target.exists()


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "model": (
        "config.json",
        {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
    ),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}},
    ),
}


@pytest.mark.parametrize("part", FOREIGN)
def test_foreign_code_is_off_unless_asked_for(tmp_path: Path, part: str) -> None:
    """A model or tokenizer that brings its own code is refused, and the code is not run."""
    config = write_place(tmp_path)
    target, (name, own) = tmp_path / "executed", FOREIGN[part]
    code = f"open({str(target)!r}, 'w')\nclass C: pass\nclass M: pass\nclass OwnTokenizer: pass\n"
    (tmp_path / "model" / "own.py").write_text(code)
    settings = json.loads((tmp_path / "model" / name).read_text())
    (tmp_path / "model" / name).write_text(json.dumps({**settings, **own}))
    done = rl_train("run", config)
    assert done[0] == 2, done
    assert not target.exists()
    assert load_config(config).model.trust_remote_code is False
    # Asked for, it runs: so it would have been seen above.
    command = [sys.executable, "-m", "tandem.rl.cli", "run", config, "model.trust_remote_code=true"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(command, capture_output=True, env=environment, check=False)
    assert target.exists()


# --- secrets ----------------------------------------------------------------------------------------------------------

BASE = {
    "model": {"model_name_or_path": "m"},
    "data": {"dataset_name": "d"},
    "rewards": {"reward_funcs": [{"function": "f.py:f", "kwargs": {}}]},
}


def rl_train(*arguments: object) -> tuple[int, str]:
    said, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["rl-train", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return code, said.getvalue()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"api_key": "abc123"},
        {"openai_api_key": "abc123"},
        {"headers": {"x-auth-token": "abc123"}},
        {"password": "abc123"},
        {"note": "sk-abcdefghijklmnopqrstu"},
        {"note": ["hf_abcdefghijklmnopqrstuvwxyz"]},
        {"url": "https://me:abc123@judge.example/v1"},
        {"AWS_SECRET_KEY": "abc123"},
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_shown(kwargs: dict) -> None:
    raw = {**BASE, "rewards": {"reward_funcs": [{"function": "f.py:f", "kwargs": kwargs}]}, "seed": "wrong"}
    with pytest.raises(UserError, match="looks like a secret") as refused:
        parse_config(raw)
    text = str(refused.value)
    assert "rewards.reward_funcs[0].kwargs." in text
    for secret in ("abc123", "abcdefghij"):
        assert secret not in text


def test_what_is_no_secret_passes() -> None:
    kwargs = {
        "api_key_env": "MY_KEY",
        "eos_token": "</s>",
        "max_tokens": "5",
        "tokens": "hf_short",
        "url": "http://localhost:8000/v1",
        "task": "find the password of sk-ill",
        "api_key": None,
    }
    raw = {**BASE, "rewards": {"reward_funcs": [{"function": "f.py:f", "kwargs": kwargs}]}}
    assert parse_config(raw).rewards.reward_funcs[0].kwargs == kwargs


WANDB = ["log.report_to=wandb", "log.wandb_mode=offline"]


def test_secrets_of_the_environment_reach_no_file_and_no_screen(tmp_path: Path, monkeypatch) -> None:
    config = write_place(tmp_path)
    names = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_OWN"]
    for name in names:
        monkeypatch.setenv(name, f"VERY-SECRET-{name}")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-m", "tandem.rl.cli", "run", config, "train.max_steps=2", *WANDB],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert {"report.html", "config.yaml", "journal.jsonl", "metrics.jsonl", "adapter_config.json"} <= {
        p.name for p in files
    }
    assert not [p for p in files if b"VERY-SECRET" in p.read_bytes()]
    assert "VERY-SECRET" not in said
    code, said = rl_train(
        "run", config, "rewards.reward_funcs=[{function: rewards.py:low, kwargs: {api_key: hidden1}}]"
    )
    assert code == 2
    assert "hidden1" not in said


# --- the report -------------------------------------------------------------------------------------------------------

ATTACK = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    "<svg onload=\"document.title='taken'\">"
)


def test_a_completion_with_a_script_stays_text_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium here (Debian, Ubuntu: apt-get install chromium)")
    row = Scored(Prompt(0, [1], ATTACK), Completion([1], [0.0], False), 0, ATTACK, {ATTACK: 1.0}, 1.0, 0.0)
    write_rollouts(tmp_path, 1, [row])
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "reward": 1.0, f"rewards/{ATTACK}/mean": 1.0}) + "\n"
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run_name": ATTACK}))
    (tmp_path / "summary.json").write_text(json.dumps({ATTACK: ATTACK}))
    page = write_report(tmp_path)
    control = tmp_path / "control.html"
    control.write_text(f"<html><title>own</title><body>{ATTACK}</body></html>")

    def shown(path: Path) -> str:
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            f"--user-data-dir={tmp_path}/b",
        ]
        done = subprocess.run(
            [*command, path.as_uri()],
            capture_output=True,
            timeout=120,
            check=False,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        return done.stdout.decode("utf-8", "replace")

    if "<title>taken</title>" not in shown(control):
        pytest.skip(f"{browser} shows no page here (on Ubuntu it may be a stand-in for a snap)")
    dom = shown(page)
    assert "<title>taken</title>" not in dom
    assert "&lt;script&gt;document.title='taken'" in dom


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", ".", "../x", "/x", "a/b", "a\\b", "", "a\0b"])
def test_a_run_name_is_no_path(name: str) -> None:
    with pytest.raises(UserError, match="plain folder name"):
        parse_config({**BASE, "run_name": name})


def test_a_run_folder_s_name_in_its_config_counts_for_nothing(tmp_path: Path) -> None:
    """A run folder from elsewhere writes where it lies, whatever its config says."""
    from tandem.rl.config_file import load_run_config, save_config

    run = tmp_path / "foreign"
    run.mkdir()
    save_config(parse_config({**BASE, "output_dir": "/etc", "run_name": "cron.d"}), run / "config.yaml")
    assert load_run_config(run).run_dir == run
