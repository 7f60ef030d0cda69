"""What is shipped: the wheel's contents, the version, and that Hugging Face's `kernels` is not shadowed."""

from __future__ import annotations

import email.parser
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "rewards", "rl", "rollout")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built by the declared backend from a copy of what goes into it, without a network."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in (*FOLDERS, "tests", "docs", "examples", "benchmarks"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(copy / "out")],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "out").glob("*.whl")
    return zipfile.ZipFile(built)


def shipped_files(folder: Path) -> set[str]:
    """What a folder should ship, named as in the wheel: its modules, the type marker and the report's template."""
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {f"tandem/{p.relative_to(ROOT).as_posix()}" for p in files}


# --- the mapping of folders to packages -------------------------------------------------------------------------------


def test_declared_packages_are_the_folders(project: dict[str, Any]) -> None:
    """Every folder with Python code in it is declared, at its place under `tandem`, and nothing else is."""
    folders = {p.parent.relative_to(ROOT) for f in FOLDERS for p in (ROOT / f).rglob("*.py")} | set(map(Path, FOLDERS))
    setuptools = project["tool"]["setuptools"]
    assert set(setuptools["packages"]) == {".".join(("tandem", *folder.parts)) for folder in folders}
    assert len(set(setuptools["packages"])) == len(setuptools["packages"])
    assert setuptools["package-dir"] == {f"tandem.{folder}": folder for folder in FOLDERS}
    assert set(setuptools["package-data"]) >= {f"tandem.{folder}" for folder in FOLDERS}


def test_wheel_holds_only_the_namespace(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"tandem"}
    assert {name.split("/")[1] for name in wheel.namelist() if name.startswith("tandem/")} == set(FOLDERS)
    assert "tandem/__init__.py" not in wheel.namelist(), "tandem is a namespace"


@pytest.mark.parametrize("folder", FOLDERS)
def test_wheel_holds_every_file_of_a_package(wheel: zipfile.ZipFile, folder: str) -> None:
    expected = shipped_files(ROOT / folder)
    assert f"tandem/{folder}/py.typed" in expected
    assert {name for name in wheel.namelist() if name.startswith(f"tandem/{folder}/")} == expected


def test_wheel_ships_the_reports_template(wheel: zipfile.ZipFile) -> None:
    assert "tandem/rl/report.html" in wheel.namelist()


def test_wheel_metadata(wheel: zipfile.ZipFile, project: dict[str, Any]) -> None:
    (place,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.parser.Parser().parsestr(wheel.read(place).decode())
    assert metadata["Name"] == "tandem-rl"
    assert metadata["Version"] == project["project"]["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    entry_points = wheel.read(place.replace("METADATA", "entry_points.txt")).decode()
    assert "rl-train = tandem.rl.cli:main" in entry_points


def test_the_sandbox_works_from_an_installed_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Its guard and the code judge are plain files beside the modules; they must be found where a wheel puts them."""
    installed = tmp_path / "site-packages"
    wheel.extractall(installed)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tandem.rewards import code_tests, sandbox\n"
        "assert sandbox.__file__.startswith(sys.argv[1]), sandbox.__file__\n"
        "block = '```python\\ndef f(x):\\n    return x + 1\\n```'\n"
        "tests = ['assert f(1) == 2', {'function': 'f', 'cases': [[[1], 2], [[2], 4]]}]\n"
        "assert code_tests.code_tests([block] * 2, tests) == [1.0, 0.5]\n"
    )
    done = run_python("-S", "-c", code, str(installed), cwd=tmp_path)  # -S: nothing else is installed
    assert done.returncode == 0, done.stderr


def test_console_script_resolves() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="rl-train")
    assert callable(script.load())


# --- no shadows -------------------------------------------------------------------------------------------------------


def test_no_files_that_would_shadow_or_import_by_the_wrong_name() -> None:
    unwanted = ["kernels/__init__.py", "conftest.py", "tests/__init__.py", "tandem", "__init__.py", "setup.py"]
    assert [name for name in unwanted if (ROOT / name).exists()] == []


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


LLAMA = """
import importlib.metadata
import kernels
from transformers.models.llama.modeling_llama import LlamaForCausalLM
import tandem.rl.config
assert importlib.metadata.version("kernels")
assert hasattr(kernels, "get_kernel"), f"`kernels` is not Hugging Face's: {kernels.__path__}"
"""


def test_llama_imports_from_the_root_beside_hugging_face_kernels() -> None:
    assert importlib.util.find_spec("kernels") is not None, "the test extra installs Hugging Face's `kernels`"
    done = run_python("-c", LLAMA, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_llama_imports_under_pytest(tmp_path: Path) -> None:
    """As `python -m pytest` runs from the root, which puts the root on the path."""
    (tmp_path / "test_llama.py").write_text("def test_llama():\n" + LLAMA.replace("\n", "\n    "), encoding="utf-8")
    config = ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = run_python("-m", "pytest", *config, str(tmp_path / "test_llama.py"), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_kernels_package_at_the_root_would_be_seen(tmp_path: Path) -> None:
    """The guard works: where the root has a regular package `kernels`, the same lines fail."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    done = run_python("-c", LLAMA, cwd=tmp_path)
    assert done.returncode != 0
    assert "kernels" in done.stderr


# --- files that belong to a release -----------------------------------------------------------------------------------


def test_changelog_begins_with_the_version(project: dict[str, Any]) -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?v?(\d+\.\d+\.\d+[^\s\]]*)", text, flags=re.MULTILINE)
    assert versions, "CHANGELOG.md has no heading such as `## 0.1.0`"
    assert versions[0] == project["project"]["version"]


def test_licence_is_the_declared_one(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("target", ["demo", "test", "check", "dev", "docs", "clean", "help"])
def test_makefile_has_its_targets(target: str) -> None:
    make = shutil.which("make")
    assert make, "make is needed"
    done = subprocess.run([make, "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    described = subprocess.run([make, "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert f"make {target} " in described.stdout


def test_the_installed_command_runs_as_it_is_typed(tmp_path: Path) -> None:
    """The script that an installation puts beside the interpreter, away from the checkout."""
    script = Path(sys.executable).with_name("rl-train")
    assert script.is_file(), "tests run in an environment with Tandem in it: make test sets it up"

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    done = typed("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in ("run", "resume", "plan", "rewards"))
    done = typed("run", "nowhere.yaml")
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert "Traceback" not in done.stderr
