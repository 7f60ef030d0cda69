"""The sandbox against hostile programs, and the code reward against solutions that try to pass without solving."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_programs import ESCAPES, FORGERIES

from tandem.rewards import sandbox, sandbox_job, sandbox_rights, sandbox_start
from tandem.rewards.base import load_reward
from tandem.rewards.code_judge import count_units
from tandem.rewards.code_tests import code_tests, last_python_block, parse_tests, same
from tandem.rewards.code_values import BadValue, decode, encode
from tandem.rewards.sandbox import Outcome, Run, Sandbox, run_python
from tandem.rewards.sandbox_check import protections
from tandem.rewards.sandbox_job import Limits, Program
from tandem.rl.errors import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the sandbox needs Linux")

IN_FORCE = {p.name for p in protections() if p.in_force} if hasattr(os, "memfd_create") else set()
SMALL = Limits(seconds=1.5, memory_mib=128, output_kib=64)


def processes() -> set[int]:
    """Sandboxed programs and guards that exist now on the whole machine, but for those of other living programs."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path("/proc", entry, "cmdline").read_bytes()
            if b"sandbox_child.main()" in command:
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
    return {pid for pid in parents if not _of_another(pid, parents)}


def _of_another(pid: int, parents: dict[int, int]) -> bool:
    """Whether the first of these processes above `pid` was started by another Python, which still runs."""
    while pid in parents:
        pid = parents[pid]
    try:
        return pid not in (1, os.getpid()) and b"python" in Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return False


class Surroundings:
    """A secret file, a folder, a TCP server and a Unix socket, all open to anybody but a sandboxed program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = folder / "secret"
        self.secret.write_text("the secret", encoding="utf-8")
        self.secret.chmod(0o666)
        for place in (folder, *folder.parents):
            if place.stat().st_uid == os.getuid() and place != Path("/"):
                place.chmod(place.stat().st_mode | 0o055)
        folder.chmod(0o777)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.abstract = f"tandem-{os.getpid()}"
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(f"\0{self.abstract}")
        self.unix.listen()

    def fill(self, source: str) -> str:
        words = {"SECRET_PATH": self.secret, "OUTSIDE": self.folder, "PARENT": os.getpid(), "ABSTRACT": self.abstract}
        for word, value in {**words, "PORT": self.server.getsockname()[1]}.items():
            source = source.replace(word, str(value))
        return source

    def touched(self) -> list[str]:
        found = [] if self.secret.read_text(encoding="utf-8") == "the secret" else ["secret"]
        found += [] if [path.name for path in self.folder.iterdir()] == ["secret"] else ["folder"]
        with pytest.raises(BlockingIOError):
            self.server.accept()
        return found


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    made = Surroundings(tmp_path_factory.mktemp("open"))
    yield made
    made.server.close()
    made.unix.close()


@pytest.fixture(scope="module")
def escapes(surroundings: Surroundings) -> dict[str, Outcome]:
    """All hostile programs, eight at a time; a stray signal or a survivor is noticed by the tests that follow."""
    os.environ["TANDEM_TEST_SECRET"] = "hidden"
    received: list[int] = []
    previous = {s: signal.signal(s, lambda n, _: received.append(n)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    before = processes()
    try:
        programs = [Program(surroundings.fill(source), limits=SMALL) for source in ESCAPES.values()]
        outcomes = dict(zip(ESCAPES, Sandbox(8).map(programs), strict=True))
    finally:
        del os.environ["TANDEM_TEST_SECRET"]
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert received == []
    assert processes() <= before
    return outcomes


@pytest.mark.parametrize("name", ESCAPES)
def test_no_program_gets_out(name: str, escapes: dict[str, Outcome]) -> None:
    outcome = escapes[name]
    assert "ESCAPED" not in outcome.stdout, outcome
    assert outcome.seconds < SMALL.seconds + 2


def test_what_is_outside_is_untouched(escapes: dict[str, Outcome], surroundings: Surroundings) -> None:
    assert surroundings.touched() == []


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("computes for ever", "timeout"),
        ("computes for ever in C", "memory timeout"),
        ("forks from every child", "memory timeout"),
        ("burns time in short-lived children", "timeout"),
        ("sleeps", "timeout"),
        ("stops itself", "timeout"),
        ("ignores every signal and goes on", "timeout"),
        ("closes its output and sleeps", "timeout"),
        ("takes all memory", "memory timeout"),
        ("takes memory in many processes", "memory"),
        ("prints without end", "output"),
        ("prints errors without end", "output"),
        ("leaves a daemon", "ok"),
        ("deletes its own folder", "ok"),
        ("recurses for ever", "error memory timeout"),
        ("crashes the interpreter", "error"),
        ("holds NUL bytes", "error"),
        ("prints bytes that are no text", "ok"),
    ],
)
def test_the_outcome_says_what_happened(name: str, status: str, escapes: dict[str, Outcome]) -> None:
    assert escapes[name].status in status.split(), escapes[name]


def test_the_programs_do_escape_without_a_sandbox(surroundings: Surroundings) -> None:
    """The oracle of the tests above: what prints ESCAPED there does so where nothing stops it."""
    for name in ("reads a file of the parent", "connects to the parent", "signals the parent", "runs a shell"):
        source = surroundings.fill(ESCAPES[name]).replace(f"os.kill({os.getpid()}, 10)", "None")
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=20, check=False)
        assert "ESCAPED" in done.stdout, name
    surroundings.server.accept()[0].close()


def test_benign_programs() -> None:
    assert run_python("print(input()[::-1])", stdin="abc").stdout == "cba\n"
    assert run_python("import helper\nprint(helper.x)", files={"helper.py": "x = 5"}).stdout == "5\n"
    assert run_python("print(open('data/a.txt').read())", files={"data/a.txt": b"hi"}).stdout == "hi\n"
    failed = run_python("import sys\nprint('a')\nsys.exit(3)")
    assert (failed.status, failed.exit_code, failed.stdout) == ("error", 3, "a\n")
    imports = "import ssl, sqlite3, decimal, zoneinfo, tempfile, hashlib, asyncio, ctypes, lzma, bz2, uuid\n"
    work = "with tempfile.TemporaryFile() as f:\n    f.write(b'x')\nasyncio.run(asyncio.sleep(0))\nprint('é', exit)"
    assert run_python(imports + work).status == "ok", run_python(imports + work)
    children = (
        "from concurrent.futures import ProcessPoolExecutor as P\nwith P(2) as p:\n    print(list(p.map(abs, [-1, 2])))"
    )
    assert run_python(children).stdout == "[1, 2]\n", run_python(children)


def test_a_program_finds_its_interpreter_as_if_newly_started() -> None:
    """Compared with a real start. Each of these would show the fork, or change what a program means."""
    source = """
import sys
print(sorted(name for name in globals() if name != "sys"), __name__, __builtins__ is sys.modules["builtins"])
print(sys.argv, sys.getrecursionlimit(), sys.exc_info(), hash("a"), sys.stdin.encoding, sys.stderr.line_buffering)
print(sys.stdout.name, sys.stdout.errors, sys.stdin.errors, sys.stderr.errors, sys.stdout is sys.__stdout__)
import gc, signal, struct
print(struct.__file__, gc.isenabled(), signal.getsignal(signal.SIGCHLD), sys.flags.optimize)
sys.setrecursionlimit(200)
def depth(n):
    try:
        return depth(n + 1)
    except RecursionError:
        return n
print(abs(depth(0) - 197) <= 1)
print(sorted(name for name in sys.modules if "sandbox" in name or "ctypes" in name or "socket" in name))
1 / 0
"""
    ours = run_python(source, files={"struct.py": ""})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "main.py").write_text(source, encoding="utf-8")
        Path(folder, "struct.py").touch()
        command = [sandbox_job.interpreter(), "-s", "main.py"]
        environment = {**sandbox_job.START_ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}
        real = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found, expected = (re.sub(r"/\S*/", "", run.stdout + run.stderr) for run in (ours, real))
    assert found == expected
    assert ours.exit_code == real.returncode == 1


def test_the_end_of_a_program_is_that_of_any_python() -> None:
    source = """
import atexit, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
class Last:
    def __del__(self):
        print("deleted")
last = Last()
raise SystemExit(5)
"""
    outcome = run_python(source)
    assert (outcome.stdout, outcome.exit_code) == ("thread\nat exit\ndeleted\n", 5)
    assert run_python("x =").stderr.splitlines()[0].endswith('main.py", line 1')


@pytest.mark.skipif(os.getuid() != 0, reason="reads another process's memory")
def test_what_programs_are_forked_from_has_never_seen_another_program() -> None:
    """Whatever is in that process can be read by every later program."""
    marker = os.urandom(16).hex()
    program = Program(f"secret = '{marker}'\nprint(input())", stdin=marker[::-1], files={"a.txt": marker})
    assert Run(program).wait().stdout == marker[::-1] + "\n"
    current = sandbox_start._current
    assert current is not None
    found, read = False, 0
    with open(f"/proc/{current.process.pid}/mem", "rb") as memory:
        for line in Path(f"/proc/{current.process.pid}/maps").read_text(encoding="utf-8").splitlines():
            span, rights = line.split()[:2]
            if rights.startswith("rw"):
                start, end = (int(part, 16) for part in span.split("-"))
                memory.seek(start)
                content = memory.read(end - start)
                read += len(content)
                found |= any(text.encode() in content for text in (marker, marker[::-1]))
    assert read > 1 << 20
    assert not found


def test_the_users_packages_are_reached_only_when_named(tmp_path: Path) -> None:
    (tmp_path / "some_package.py").write_text("x = 7", encoding="utf-8")
    tmp_path.chmod(0o755)
    source = "import some_package\nprint(some_package.x)"
    assert "ModuleNotFoundError" in run_python(source).stderr
    for place in tmp_path.parents:
        if place.stat().st_uid == os.getuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o055)
    assert run_python(source, limits=Limits(libraries=(str(tmp_path),))).stdout == "7\n"


def test_a_pool_keeps_order_and_runs_side_by_side() -> None:
    start = time.monotonic()
    outcomes = Sandbox(8).map([f"import time\ntime.sleep(0.5)\nprint({n})" for n in range(8)])
    assert [outcome.stdout for outcome in outcomes] == [f"{n}\n" for n in range(8)]
    assert time.monotonic() - start < 3.5


def test_an_interrupted_pool_ends_its_programs() -> None:
    def fail(program: Program, stop: threading.Event) -> Outcome:
        if program.source == "":
            raise RuntimeError("given up")
        return Run(program, stop=stop).wait()

    before, start = processes(), time.monotonic()
    sleeping = Program("import time\ntime.sleep(60)", limits=Limits(seconds=30))
    with pytest.raises(RuntimeError, match="given up"):
        Sandbox(2).each(fail, [Program(""), sleeping])
    assert time.monotonic() - start < 5
    assert processes() <= before


def test_the_program_dies_with_the_process_that_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = processes()
    child = os.fork()
    if child == 0:
        Run(Program("import time\ntime.sleep(60)", limits=Limits(seconds=60)))
        time.sleep(0.3)
        os._exit(0)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 5
    while not processes() <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes() <= before


def test_a_starter_that_was_killed_is_replaced_and_its_guards_go_on() -> None:
    starter = sandbox_start._current
    assert starter is not None
    running = Run(Program("import time\ntime.sleep(0.5)\nprint('went on')"))
    time.sleep(0.2)
    starter.process.kill()
    starter.process.wait()
    assert run_python("print('anew')").stdout == "anew\n"
    assert sandbox_start._current is not starter
    assert running.wait().stdout == "went on\n"


def test_descriptors_keep_their_numbers_whatever_they_are() -> None:
    """A program's channel may have the number that another descriptor gets on the way to the guard."""
    made = [os.pipe() for _ in range(12)]
    try:
        for read, write in made:
            source = f"import os\nos.write({write}, b'through')"
            run = Run(Program(source), capture=(read, write))
            assert run.wait().status == "ok", write
            assert run.captured == b"through"
    finally:
        for read, _ in made:
            os.close(read)


def test_nothing_is_left_on_disk_or_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(list(tmp_path.iterdir()))

    before = state()
    run_python("open('x', 'w').write('y')")
    code_tests(
        ["```python\ndef f(x):\n    return x\n```"] * 2, ["assert f(1) == 1", {"function": "f", "cases": [[[1], 1]]}]
    )
    assert state() == before


def test_a_folder_is_deleted_whatever_was_made_of_it(tmp_path: Path) -> None:
    victim, kept = tmp_path / "victim", tmp_path / "kept"
    victim.mkdir()
    kept.mkdir()
    (kept / "file").touch()
    (victim / "link").symlink_to(kept)
    (victim / "closed").mkdir(mode=0)
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(victim)
        for _ in range(3000):  # deeper than a path and than Python's recursion
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.fchdir(here)
        os.close(here)
    sandbox._remove(str(victim))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    assert (kept / "file").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "", "a/../../b", "main.py", "a\0b"])
def test_file_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="no name for a file"):
        run_python("pass", files={name: ""})


@pytest.mark.parametrize("values", [{"seconds": 0}, {"memory_mib": -1}, {"processes": float("inf")}, {"seconds": True}])
def test_impossible_limits_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Limits(**values)  # type: ignore[arg-type]


def test_a_missing_protection_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Program("print('ran')"), required=("files", "something that no machine has"))
    with pytest.raises(UserError, match="cannot confine"):
        run.wait()


def test_protections_are_told_with_reasons() -> None:
    found = {p.name: p for p in protections()}
    assert found["attempt: outside"].in_force
    assert found["attempt: network"].in_force
    assert all(p.why for p in found.values())


def test_system_call_numbers_are_those_of_the_kernel_headers() -> None:
    for column, header in enumerate(
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    ):
        if not Path(header).exists():
            continue
        text = Path(header).read_text(encoding="utf-8")
        known = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
        ours = {
            **sandbox_rights.DENIED,
            **sandbox_rights.SIGNALLING,
            **sandbox_rights.MODES,
            "clone": sandbox_rights.CLONE_CALL,
        }
        assert {n: v[column] for n, v in ours.items() if n in known and v[column] >= 0} == {
            n: known[n] for n, v in ours.items() if n in known and v[column] >= 0
        }


def run_filter(program: bytes, number: int, argument: int, architecture: int = 0xC000003E) -> int:
    """What the BPF program returns: an interpreter of the four instructions that it uses."""
    code = [struct.unpack_from("HBBI", program, at) for at in range(0, len(program), 8)]
    data = {0: number, 4: architecture, 16: argument & 0xFFFFFFFF}
    at, value = 0, 0
    while True:
        operation, yes, no, operand = code[at]
        at += 1
        if operation == 0x06:
            return operand
        if operation == 0x20:
            value = data[operand]
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[operation]
            at += yes if holds else no


def test_the_filter_decides_as_its_tables_say() -> None:
    program = sandbox_rights.filter_program("x86_64", own_pid=77)
    allowed, denied, killed = 0x7FFF0000, 0x00050001, 0x80000000
    assert run_filter(program, 0, 0) == allowed  # read
    assert run_filter(program, 41, 2) == denied  # socket
    assert run_filter(program, 0x40000000 + 41, 2) == killed  # by its x32 number
    assert run_filter(program, 0, 0, architecture=0x40000003) == killed  # a 32-bit call
    assert run_filter(program, 56, 17) == allowed  # fork
    assert run_filter(program, 56, 0x10000000 | 17) == denied  # clone(CLONE_NEWUSER)
    assert run_filter(program, 435, 0) == 0x00050000 | 38  # clone3
    assert run_filter(program, 62, 77) == allowed  # kill(itself)
    assert run_filter(program, 62, 78) == denied
    assert run_filter(program, 62, -1) == denied
    assert run_filter(sandbox_rights.filter_program("x86_64", None), 62, 78) == allowed
    assert run_filter(program, 90, 0) == allowed  # chmod
    assert run_filter(sandbox_rights.filter_program("x86_64", None, deny_modes=True), 90, 0) == denied


# ---------------------------------------------------------------- the reward

ASSERTS = """
import math
values = [(1, 2, 3), (2, 40, 42)]
assert add(1, 2) == 3
assert add(2, 2) == 4 and add(5, 5) == 10
assert abs(add(1, 2) - 3) < 1e-6
assert math.isclose(add(0.5, 0.25), 0.75)
assert all(add(a, b) == c for a, b, c in values)
assert all(map(lambda case: add(case[0], case[1]) == case[2], values))
assert list(map(add, [1, 2], [3, 4])) == [4, 6]
assert add(3, 4) in (7, 8)
assert 7 in [add(3, 4)]
assert not add(3, 4) != 7
assert 6 < add(3, 4) < 8
assert isinstance(add(1, 1), int) and add(1, 1) == 2
assert str(add(1, 1)) == "2"
assert add("x", "y").startswith("xy") and add("1", "2").isdigit()
assert 3 in add([1, 2], [3])
def test_function():
    assert add(7, 7) == 14
"""
UNITTEST = """
import unittest
class Case(unittest.TestCase):
    def test_method(self):
        self.assertEqual(add(8, 8), 16)
"""
CALLS = {"function": "add", "cases": [[[1, 2], 3], [[[1], [2]], [1, 2]], [["a", "b"], "ab"]]}
IO = [["1 2", "3\n"], ["40 2", "42"]]
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(4, 5) == 9\n"


def block(source: str) -> str:
    return f"Here it is:\n```python\n{source}\n```\n"


RIGHT = "import sys\ndef add(a, b):\n    return a + b\nprint(sum(map(int, (sys.stdin.read() or '0').split())))"


@pytest.fixture(scope="module")
def forged() -> dict[str, list[float | None]]:
    """Rewards of every forgery, and of one right solution, under three kinds of tests."""
    sources = {**FORGERIES, "is right": RIGHT}
    completions = [block(source) for source in sources.values() for _ in range(3)]
    before = processes()
    values = code_tests(completions, [ASSERTS, CALLS, IO[:1]] * len(sources), seconds=2.5, workers=8, memory_mib=128)
    assert processes() <= before
    return {name: values[3 * i : 3 * i + 3] for i, name in enumerate(sources)}


def test_a_right_solution_passes_among_the_forgeries(forged: dict[str, list[float | None]]) -> None:
    assert forged["is right"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes_anything(name: str, forged: dict[str, list[float | None]]) -> None:
    assert forged[name] == [0.0, 0.0, 0.0]


def test_other_kinds_of_asserts_cannot_be_forged() -> None:
    names = ["returns what is equal to everything", "replaces the harness", "replaces unittest", "raises SkipTest"]
    for tests in (CHECK, UNITTEST):
        assert code_tests([block(FORGERIES[name]) for name in names], [tests] * 4, "add") == [0.0] * 4


def test_right_solutions_pass_everything() -> None:
    good = block("def add(a, b):\n    return a + b")
    assert code_tests([good] * 4, [ASSERTS, CALLS, CHECK, UNITTEST], "add") == [1.0] * 4
    assert code_tests([block("print(sum(map(int, input().split())))")], [IO]) == [1.0]


def test_value_is_the_share_or_all_or_nothing() -> None:
    half = block("def add(a, b):\n    return 3")
    tests = ["assert add(1, 2) == 3\nassert add(2, 2) == 4"]
    assert code_tests([half], tests) == [0.5]
    assert code_tests([half], tests, all_or_nothing=True) == [0.0]
    assert code_tests([half], [None]) == [None]
    assert code_tests(["no code", [{"role": "assistant", "content": half}]], tests * 2) == [0.0, 0.5]
    assert code_tests(["def add(a, b):\n    return a + b"], tests, whole_text=True) == [1.0]


def test_a_hang_or_a_crash_costs_the_rest_only() -> None:
    hang = block("def f(x):\n    while x == 2:\n        pass\n    return x")
    crash = block("import os\ndef f(x):\n    if x == 2:\n        os._exit(0)\n    return x")
    asserts, calls = (
        "\n".join(f"assert f({n}) == {n}" for n in range(4)),
        {"function": "f", "cases": [[[n], n] for n in range(4)]},
    )
    assert code_tests([hang, hang, crash, crash], [asserts, calls] * 2, seconds=1.5) == [0.5] * 4


CLASSES = """
class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
    def pop(self):
        if not self.items:
            raise IndexError("empty")
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __iter__(self):
        return iter(self.items)
    def __eq__(self, other):
        return self.items == other.items
class Full(Exception):
    pass
def apply(function, *values):
    return function(*values)
def reverse(values):
    values.reverse()
def numbers():
    yield from range(3)
def swap(pair):
    return pair[1], pair[0]
"""
USES = """
import collections
stack = Stack([1])
stack.push(2)
assert len(stack) == 2 and stack
assert stack.pop() == 2 and stack.items == [1]
assert list(stack) == [1] and [*numbers()] == [0, 1, 2]
try:
    Stack().pop()
    raised = False
except IndexError as error:
    raised = str(error) == "empty"
assert raised
assert apply(lambda a, b: a * b, 6, 7) == 42 and apply(len, [1, 2]) == 2
values = [1, 2, 3]
reverse(values)
assert values == [3, 2, 1]
assert swap((1, 2)) == (2, 1) and type(swap((1, 2))) is tuple
assert collections.Counter(apply(sorted, "abca")) == {"a": 2, "b": 1, "c": 1}
from solution import swap as other
assert other([1, None]) == (None, 1)
"""


def test_classes_callbacks_exceptions_and_changes_in_place() -> None:
    assert code_tests([block(CLASSES)], [USES]) == [1.0]


def test_equality_of_the_programs_own_objects_needs_trust() -> None:
    tests = ["assert Stack([1]) == Stack([1])"]
    assert code_tests([block(CLASSES)], tests) == [0.0]
    assert code_tests([block(CLASSES)], tests, trust_objects=True) == [1.0]


SUBCLASSES = """
import collections
Point = collections.namedtuple("Point", "x y")
def count(text):
    return collections.Counter(text)
def places(text):
    found = collections.defaultdict(list)
    for place, letter in enumerate(text):
        found[letter].append(place)
    return found
def point():
    return Point(1, 2)
def nested(text):
    return [point(), {"count": count(text)}]
"""


def test_objects_of_plain_types_subclasses_are_compared_as_what_they_hold() -> None:
    asserts = [
        "import collections",
        "assert count('aab') == {'a': 2, 'b': 1} and {'a': 2, 'b': 1} == count('aab')",
        "assert count('aab') == collections.Counter('baa') and count('aab').most_common(1) == [('a', 2)]",
        "assert count('aab') != {'a': 2} and not count('aab') == {'a': 2}",
        "assert places('aba') == {'a': [0, 2], 'b': [1]}",
        "assert point() == (1, 2) and point().x == 1 and point() != [1, 2]",
        "assert nested('aa') == [(1, 2), {'count': {'a': 2}}]",
    ]
    calls = {"function": "nested", "cases": [[["aa"], [[1, 2], {"count": {"a": 2}}]], [["aa"], [[1, 2], {}]]]}
    assert code_tests([block(SUBCLASSES)] * 2, [asserts, calls]) == [1.0, 0.5]


def test_calls_may_be_of_a_method_of_solution() -> None:
    program = block("class Solution:\n    def add(self, a, b):\n        return a + b")
    assert code_tests([program], [{"fn_name": "add", "inputs": [[1, 2], ["a", "b"]], "outputs": [3, "ab"]}]) == [1.0]


def test_tests_that_do_not_call_the_program_do_not_pass() -> None:
    assert code_tests([block("x = 1")], ["assert 1 == 1"]) == [0.0]
    assert code_tests([block("def add(a, b):\n    return a + b")], ["import no_such\nassert add(1, 1) == 2"]) == [0.0]


@pytest.mark.parametrize(
    "entry", ["assert (", 5, [], {}, {"function": "f", "cases": []}, [["a"]], {"inputs": [1], "outputs": []}]
)
def test_unknown_tests_are_refused(entry: object) -> None:
    with pytest.raises(UserError):
        code_tests([block("x = 1")], [entry])


def test_forms_of_tests() -> None:
    assert len(parse_tests('[{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]')) == 2
    assert len(parse_tests({"inputs": ["1\n", "2\n"], "outputs": ["1", "2"]})) == 2
    assert len(parse_tests({"inputs": [[1], [2]], "outputs": [1, 2], "fn_name": "f"})) == 1
    assert count_units(ASSERTS) == 16
    assert count_units(UNITTEST) == 1
    assert last_python_block("```python\na\n```\n```text\nb\n```\n```py\nc\n```\n```python\nunfinished") == "c\n"


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        ((1, 2), [1, 2], True),
        (True, 1, False),
        (0.1 + 0.2, 0.3, True),
        (1, 1.0, True),
        (float("nan"), 1.0, False),
        ({1: "a"}, {"1": "a"}, True),
        (10**400, 1.0, False),
        ("1", 1, False),
        ([1], [1, 1], False),
        (None, None, True),
    ],
)
def test_results_are_compared_as_json_sees_them(found: object, expected: object, equal: bool) -> None:
    assert same(found, expected, 1e-9) is equal


def test_plain_values_survive_the_line_and_nothing_else_does() -> None:
    def refuse(*arguments: object) -> dict[str, object]:
        raise BadValue(str(arguments))

    value = [
        None,
        True,
        2**70,
        -0.5,
        float("inf"),
        1 + 2j,
        "ü\0",
        b"\0",
        (1, [2]),
        {3},
        frozenset({4}),
        {(1,): {"x": 2}},
    ]
    assert decode(encode(value, refuse), refuse) == value
    for bad in ({}, {"l": 5}, {"f": "x"}, {"s": [{"l": []}]}, {"x": 1}, {"d": [[1]]}, 1.5, [1], {"l": [], "t": []}):
        with pytest.raises(BadValue):
            decode(bad, refuse)


def test_it_is_a_reward_of_a_config() -> None:
    reward = load_reward("tandem.rewards.code_tests:code_tests", kwargs={"all_or_nothing": True, "workers": 2})
    assert reward.required() == ["completions", "tests"]
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] != -2  # the parent's limits are its own
