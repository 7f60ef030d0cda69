"""Who may import whom, and what may be loaded when: read from the syntax trees and checked in fresh interpreters."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("rl", "rewards", "rollout", "kernels")
MAX_LINES = 500

# What each package may import of ours; inside `rl` only the modules that drive a run see rollout and rewards, and the
# plan the sizes of an engine.
ALLOWED = {
    "kernels": ("tandem.kernels",),
    "rewards": ("tandem.rewards", "tandem.rl.samples", "tandem.rl.errors"),
    "rollout": (
        "tandem.rollout",
        "tandem.kernels",
        "tandem.rl.samples",
        "tandem.rl.config",
        "tandem.rl.errors",
        "tandem.rl.model",
        "tandem.rl.store",
    ),
    "rl": ("tandem.rl", "tandem.kernels"),
}
DRIVERS = {
    "cli",
    "commands",
    "evaluate",
    "held_out",
    "inputs",
    "open_model",
    "plan_engine",
    "reward_watch",
    "rewards_command",
    "rollout_source",
    "trainer",
}

HEAVY = ("torch", "transformers", "vllm", "triton", "wandb", "bitsandbytes", "trl", "peft", "datasets", "matplotlib")
LIGHT = {
    "chat",
    "cli",
    "columns",
    "config",
    "config_file",
    "console",
    "data",
    "errors",
    "examples",
    "journal",
    "library_imports",
    "prompts",
    "row_function",
    "rows",
    "samples",
    "trackers",
}


# Programs of the sandbox, which find their neighbours in the sandbox's folder only.
SANDBOXED = {"code_solution", "sandbox_child", "sandbox_interpreter"}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("tandem", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, wherever in the file; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(source: str, place: str) -> list[str]:
    """What is wrong with the imports of one file; `place` is its path from the root, such as `rl/step.py`."""
    folder, module = place.split("/")[0], place.split("/")[1].removesuffix(".py")
    package = ".".join(("tandem", *place.split("/")[:-1]))
    allowed = ALLOWED[folder]
    if folder == "rl" and module in DRIVERS:
        allowed = ("tandem",)
    found = []
    for line, name in imports(ast.parse(source), package):
        if within(name, FOLDERS):
            found.append(f"{place}:{line}: {name}: top-level name, put `tandem.` before it")
        elif within(name, ("tandem",)) and not within(name, allowed):
            found.append(f"{place}:{line}: {folder} may not import {name}")
    return found


def test_sources_are_found() -> None:
    assert {path.parent.name for path in sources()} >= {"rl"}
    assert ROOT / "rl" / "config.py" in sources()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_the_direction(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_import_by_the_public_names(path: Path) -> None:
    for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), "tests"):
        assert not within(name, ("rl", "rewards", "rollout", "tests")), f"{path.name}:{line}: {name}"


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("import tandem.rl.samples", "kernels/op.py"),
        ("def f():\n    from tandem.rl import config", "rewards/x.py"),
        ("from tandem import rollout", "rl/step.py"),
        ("from tandem.rewards.base import score", "rl/step.py"),
        ("import rl.config", "rl/step.py"),
        ("from kernels import rms_norm", "rl/step.py"),
        ("from ..rewards import base", "rl/step.py"),
        ("from .. import rollout", "kernels/op.py"),
        ("from . import rewards\nfrom tandem.rl import trainer", "rollout/engine.py"),
        ("from tandem.rl.samples_extra import x", "rewards/x.py"),
        ("import tandem", "rewards/x.py"),
    ],
)
def test_forbidden_imports_are_seen(source: str, place: str) -> None:
    assert len(violations(source, place)) == 1


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("from tandem.rewards.base import score", "rl/trainer.py"),
        ("from tandem.rollout.engine import Engine", "rl/commands/run.py"),
        ("from ..rl.samples import Group", "rewards/x.py"),
        ("from tandem.kernels.rms_norm import rms_norm", "rl/step.py"),
        ("import math_verify\nfrom . import base", "rewards/math_answer.py"),
    ],
)
def test_allowed_imports_pass(source: str, place: str) -> None:
    assert violations(source, place) == []


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Names of the heavy packages that a fresh interpreter has loaded after the code."""
    report = f"\nimport json, sys; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code + report, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.strip().splitlines()[-1]))


def light_modules() -> list[str]:
    names = [module_name(path) for path in sources() if path.stem not in SANDBOXED]
    return [n for n in names if n.startswith("tandem.rewards") or n.removeprefix("tandem.rl.") in LIGHT]


def test_light_modules_load_nothing_heavy() -> None:
    """All in one interpreter; only when something is loaded is each module tried alone, to name the culprit."""
    modules = light_modules()
    assert "tandem.rl.config_file" in modules
    if loaded_after("\n".join(f"import {name}" for name in modules)):
        culprits = {name: loaded for name in modules if (loaded := loaded_after(f"import {name}"))}
        pytest.fail(f"imported at the head of a module instead of where they are used: {culprits}")


def test_a_heavy_import_is_seen() -> None:
    assert loaded_after("import matplotlib") >= {"matplotlib"}


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom tandem.rl.cli import main\nsys.argv = ['rl-train', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert loaded_after(code) == set()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "no module docstring"
    assert len(docstring) > 20
