"""One process at a time in a run folder."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandem.rl import run_folder
from tandem.rl import run_lock as module
from tandem.rl.config import Config
from tandem.rl.config_file import parse_config
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.run_lock import NAME, Owner, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from tandem.rl.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_it(tmp_path, holder):
    with pytest.raises(UserError) as refused, run_lock(tmp_path):
        pass
    text = str(refused.value)
    assert f"process {holder.pid} on {socket.gethostname()} since " in text
    assert re.search(r"\(\d s ago\)", text)
    assert (tmp_path / NAME).exists()


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said: list[str] = []
    with run_lock(tmp_path, note=said.append) as owner:
        assert owner.pid == os.getpid()
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert len(said) == 1
    assert f"process {holder.pid}" in said[0]
    assert "is no more" in said[0]
    assert not (tmp_path / NAME).exists()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), run_lock(tmp_path / "." / ""):
            pass
        assert (tmp_path / NAME).exists()
    with run_lock(tmp_path):
        pass


def test_a_child_does_not_keep_it(tmp_path):
    """A reward's process that outlives the run must not lock the folder."""
    lock = run_lock(tmp_path)
    lock.__enter__()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        lock.__exit__(None, None, None)
        done = subprocess.run(
            [sys.executable, "-c", HOLDER.replace("60", "0"), str(tmp_path)], capture_output=True, check=False
        )
        assert done.stdout == b"held\n", done.stderr
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff\x00", b"x" * 10_000])
def test_a_lock_file_that_says_nothing_is_no_lock(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with run_lock(tmp_path):
        pass


def test_file_systems_without_locks_go_by_the_process(tmp_path, monkeypatch):
    import errno
    import fcntl

    import psutil

    def unsupported(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    own = psutil.Process().create_time()
    here, now = socket.gethostname(), time.time()
    for owner, held in (
        (Owner(os.getpid(), here, now, own), True),
        (Owner(os.getpid(), here, now, own - 1000), False),  # another process had this number
        (Owner(2**22 + 1, here, now, own), False),
        (Owner(1, "elsewhere", now, own), True),
    ):
        (tmp_path / NAME).write_text(json.dumps(owner.__dict__))
        if held:
            with pytest.raises(UserError, match="in use by process"), run_lock(tmp_path):
                pass
        else:
            with run_lock(tmp_path):
                pass


def test_many_processes_at_once_let_one_in(tmp_path):
    """Each adds one to a counter that only a lock protects."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom tandem.rl.run_lock import run_lock\n"
        "from tandem.rl.errors import UserError\nfolder, done = Path(sys.argv[1]), 0\n"
        "while done < 20:\n    try:\n        with run_lock(folder):\n"
        "            n = int((folder / 'n').read_text())\n            time.sleep(0.001)\n"
        "            (folder / 'n').write_text(str(n + 1))\n            done += 1\n"
        "    except UserError:\n        time.sleep(0.002)\n"
    )
    (tmp_path / "n").write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(4)]
    assert [p.wait(60) for p in running] == [0] * 4
    assert (tmp_path / "n").read_text() == "80"


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written to"), run_lock(tmp_path / "none"):
        pass
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be written to"), run_lock(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_ages_are_for_people():
    assert [module._age(s) for s in (-5, 0, 119, 120, 7300, 200_000)] == [
        "0 s ago",
        "0 s ago",
        "119 s ago",
        "2 min ago",
        "2 h ago",
        "2 days ago",
    ]


STARTS = """
import sys, time
from tandem.rl.config_file import parse_config
from tandem.rl.console import Console
from tandem.rl.run_folder import new_folder
config = parse_config({"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"},
                       "algorithm": {"name": "sft"}, "output_dir": sys.argv[1]})
print("ready", flush=True)
at = float(sys.stdin.readline())
for n in range(20):
    while time.time() < at + n / 50:
        pass
    with new_folder(config.model_copy(update={"run_name": f"n{n}"}), Console.silent()) as own:
        (own.run_dir / "mine").open("x").close()
        print(own.run_name, flush=True)
"""


def test_runs_of_one_name_that_start_at_once_get_folders_of_their_own(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STARTS, str(tmp_path / "runs")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [p.stdout.readline() for p in started if p.stdout] == ["ready\n"] * 2
    at = f"{time.time() + 0.2}\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write(at)
        process.stdin.flush()
    done = [p.communicate(timeout=60) for p in started]
    assert [p.returncode for p in started] == [0, 0], done
    names = [name for out, _ in done for name in out.split()]
    assert sorted(names) == sorted([f"n{n}" for n in range(20)] + [f"n{n}-2" for n in range(20)])


def config_in(folder: Path) -> Config:
    data = {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}, "algorithm": {"name": "sft"}}
    return parse_config(data | {"output_dir": str(folder / "runs")})


def test_a_folder_is_removed_while_it_is_held(tmp_path, monkeypatch):
    """A run that fails at once must not take away what another process has begun to resume."""
    held: list[bool] = []
    remove = run_folder.shutil.rmtree

    def watched(folder: Path, **options: bool) -> None:
        with pytest.raises(UserError, match="in use by"), run_lock(folder):
            pass
        held.append(True)
        remove(folder, **options)

    monkeypatch.setattr(run_folder.shutil, "rmtree", watched)
    with pytest.raises(UserError, match="no model"), run_folder.new_folder(config_in(tmp_path), Console.silent()):
        raise UserError("no model")
    assert held
    assert not list((tmp_path / "runs").iterdir())


def test_a_folder_that_cannot_be_locked_does_not_stay(tmp_path, monkeypatch):

    def full(*_arguments: object) -> int:
        raise UserError("no space left")

    monkeypatch.setattr(module, "_taken", full)
    with pytest.raises(UserError, match="no space"), run_folder.new_folder(config_in(tmp_path), Console.silent()):
        pass
    assert not list((tmp_path / "runs").iterdir())
