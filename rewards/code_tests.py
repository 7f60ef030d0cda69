"""Reward for code: the share of tests that a completion's program passes.

The program never meets what it is judged by. Three kinds of tests, each in the sandbox of `tandem.rewards.sandbox`:

- **stdin and stdout**: the program gets the input; what it printed is compared in this process.
- **a function and cases**: a process loads the program and calls the function; its return values come back as plain
  data (`code_values`) and are compared in this process.
- **asserts** (a text of asserts, test functions, unittest classes, or HumanEval's `check(candidate)`): two sandboxes.
  One runs the tests and knows the expected values; the other runs the program and is asked to call its functions, with
  plain data going over and coming back. Verdicts leave the first by a pipe that the other does not have, under a
  secret that is new for every run.

So printing "all tests passed", `os._exit(0)`, replacing builtins, `assert` or unittest, searching frames, the garbage
collector or /proc, exit handlers, threads and signals change only the program's own process, which has neither the
expected values nor a say. What a program can still do:

- return values of its choice: a program that knows the tests from elsewhere (its training data) passes them;
- see the inputs of all cases, also of later ones, and keep state from one case to the next;
- where tests compare two objects of the program's own classes, only its own `__eq__` can tell; such a comparison fails
  unless `trust_objects` is set, and with it the program decides. Objects of a plain type's subclass (a Counter, a named
  tuple) are compared with plain data as what they hold. Arithmetic and order on its objects always fail, and
  so do `startswith`, `isdigit`, `issubset` and their like; other methods of its objects answer as they please
  (`assert f(x).equals(y)` asks the program), so tests should look at data;
- a function that works in place (returns None) may change the lists, dicts and sets that it was given, and tests see
  that.

Names that the tests use without defining them are the program's, except Python's builtins, and standard modules used
as `module.name`. A test passes only if the program was called before or in it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tandem.rewards.base import completion_text
from tandem.rewards.code_judge import count_units
from tandem.rewards.code_values import BadValue, decode, encode, parse_message
from tandem.rewards.sandbox import Run, Sandbox
from tandem.rewards.sandbox_job import Limits, Program
from tandem.rl.errors import UserError, short

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)[ \t]*\r?\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


@dataclass(frozen=True)
class IoCase:
    """What the program reads and what it must print."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallCases:
    """A function's name, and arguments with the value that it must return."""

    function: str
    cases: tuple[tuple[list[Any], Any], ...]


@dataclass(frozen=True)
class Asserts:
    """A text of tests; `entry_point` is the function that a `check(candidate)` is called with."""

    source: str
    entry_point: str | None


@dataclass(frozen=True)
class _Rules:
    limits: Limits
    trust_objects: bool
    tolerance: float


_Verdicts = Callable[[threading.Event], list[bool]]


def code_tests(
    completions: Sequence[str | list[dict[str, Any]]],
    tests: Sequence[Any],
    entry_point: Sequence[str | None] | str | None = None,
    *,
    all_or_nothing: bool = False,
    whole_text: bool = False,
    seconds: float = 10.0,
    memory_mib: int = 512,
    workers: int | None = None,
    libraries: Sequence[str] = (),
    trust_objects: bool = False,
    tolerance: float = 1e-9,
) -> list[float | None]:
    """The share of tests passed, 0 to 1, for each completion; None where its row has no tests.

    Args:
        completions: texts or message lists; the program is the last complete ```python block.
        tests: one entry per completion, in one of these forms (or one of the structured ones as JSON text):
            a text of tests; a list of such texts; a list of `(stdin, stdout)` pairs or `{"input", "output"}` dicts;
            `{"function": name, "cases": [[arguments, expected], …]}`; `{"inputs", "outputs"}`, with `fn_name` for
            calls and without for stdin and stdout. A function may be a method of the program's class `Solution`.
        entry_point: name of the function for `check(candidate)`, one for all or one per completion.
        all_or_nothing: 1.0 if all tests pass, else 0.0.
        whole_text: the program is the whole completion, not a block in it.
        seconds: wall time of one run (for asserts and calls all tests of a row together). memory_mib: in MiB.
        workers: runs at a time; see `Sandbox`.
        libraries: folders with packages that programs and tests may import, such as a `site-packages`.
        trust_objects: let the program's own objects answer comparisons with each other, and predicates.
        tolerance: relative (and near 0 absolute) difference that floats of calls may have.

    Raises:
        UserError: tests of no known form or that are no Python, or a machine on which programs cannot be confined.
    """
    if len(tests) != len(completions):
        raise UserError(f"there are {len(completions)} completions and {len(tests)} entries of tests")
    rules = _Rules(Limits(seconds=seconds, memory_mib=memory_mib, libraries=tuple(libraries)), trust_objects, tolerance)
    names = [entry_point] * len(tests) if isinstance(entry_point, str) or entry_point is None else list(entry_point)
    runs: list[tuple[int, _Verdicts]] = []
    totals: list[int | None] = []
    for index, (completion, entry) in enumerate(zip(completions, tests, strict=True)):
        if entry is None:
            totals.append(None)
            continue
        parsed = parse_tests(entry, names[index])
        totals.append(sum(_count(test) for test in parsed))
        text = completion_text(completion)
        program = text if whole_text else last_python_block(text)
        if program is not None:
            runs += [(index, _verdicts_of(program, test, rules)) for test in parsed]
    passed = [0] * len(tests)
    results = Sandbox(workers).each(lambda run, stop: run[1](stop), runs)
    for (index, _), verdicts in zip(runs, results, strict=True):
        passed[index] += sum(verdicts)
    return [_value(count, total, all_or_nothing) for count, total in zip(passed, totals, strict=True)]


def last_python_block(text: str) -> str | None:
    """The content of the last complete ```python block; None without one."""
    blocks = _BLOCK.findall(text)
    return str(blocks[-1]) if blocks else None


def parse_tests(entry: Any, entry_point: str | None = None) -> list[IoCase | CallCases | Asserts]:
    """The tests of one row; see `code_tests` for the forms.

    Raises:
        UserError: no known form, no tests at all, or asserts that are no Python.
    """
    if isinstance(entry, str) and entry.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):  # then it is a text of Python that begins with a bracket
            entry = json.loads(entry)
    if isinstance(entry, str):
        return [_asserts(entry, entry_point)]
    if isinstance(entry, dict):
        return _from_dict(entry)
    if isinstance(entry, (list, tuple)) and entry:
        if all(isinstance(part, str) for part in entry):
            return [_asserts("\n".join(entry), entry_point)]
        return [_io_case(part) for part in entry]
    raise _unknown(entry)


def _from_dict(entry: dict[str, Any]) -> list[IoCase | CallCases | Asserts]:
    if "cases" in entry and isinstance(entry.get("function"), str):
        function, pairs = entry["function"], entry["cases"]
    elif "inputs" in entry and "outputs" in entry and len(entry["inputs"]) == len(entry["outputs"]):
        function, pairs = entry.get("fn_name"), list(zip(entry["inputs"], entry["outputs"], strict=True))
    else:
        raise _unknown(entry)
    if not pairs:
        raise _unknown(entry)
    if function is None:
        return [_io_case(pair) for pair in pairs]
    cases = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], (list, tuple)):
            raise _unknown(pair)
        cases.append((list(pair[0]), pair[1]))
    return [CallCases(function, tuple(cases))]


def _io_case(part: Any) -> IoCase:
    if isinstance(part, dict) and "input" in part and "output" in part:
        part = (part["input"], part["output"])
    if isinstance(part, (list, tuple)) and len(part) == 2:
        stdin, stdout = ("\n".join(side) if _is_lines(side) else side for side in part)
        if isinstance(stdin, str) and isinstance(stdout, str):
            return IoCase(stdin, stdout)
    raise _unknown(part)


def _is_lines(side: Any) -> bool:
    return isinstance(side, (list, tuple)) and all(isinstance(line, str) for line in side)


def _asserts(source: str, entry_point: str | None) -> Asserts:
    try:
        count_units(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"tests {short(source)} are no Python: {error}", fix="correct this row's tests") from None
    if not source.strip():
        raise _unknown(source)
    return Asserts(source, entry_point)


def _unknown(entry: Any) -> UserError:
    return UserError(
        f"tests {short(entry)} have no known form",
        reason="tests are asserts, (stdin, stdout) pairs, or a function with cases of arguments and result",
        fix="see the docstring of tandem.rewards.code_tests; None means that a row has no tests",
    )


def _count(test: IoCase | CallCases | Asserts) -> int:
    if isinstance(test, Asserts):
        return count_units(test.source)
    return len(test.cases) if isinstance(test, CallCases) else 1


def _value(passed: int, total: int | None, all_or_nothing: bool) -> float | None:
    if total is None:
        return None
    return float(passed == total) if all_or_nothing else passed / total


def _verdicts_of(program: str, test: IoCase | CallCases | Asserts, rules: _Rules) -> _Verdicts:
    if isinstance(test, IoCase):
        return lambda stop: [_passes_io(program, test, rules, stop)]
    if isinstance(test, CallCases):
        return lambda stop: _passes_calls(program, test, rules, stop)
    return lambda stop: _passes_asserts(program, test, rules, stop)


def _passes_io(program: str, case: IoCase, rules: _Rules, stop: threading.Event) -> bool:
    outcome = Run(Program(program, case.stdin, limits=rules.limits), stop=stop).wait()
    return outcome.status == "ok" and _lines(outcome.stdout) == _lines(case.stdout)


def _lines(text: str) -> list[str]:
    """Lines without what cannot be seen: blanks at their ends, and empty ones at the end of all."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _passes_calls(program: str, test: CallCases, rules: _Rules, stop: threading.Event) -> list[bool]:
    """Ask for all results at once: requests in a pipe that a thread fills, replies in one that is read to its end."""
    requests_read, requests_write = os.pipe()
    replies_read, replies_write = os.pipe()
    try:
        run = Run(
            _solution(program, requests_read, replies_write, rules),
            channels=[requests_read],
            capture=(replies_read, replies_write),
            stop=stop,
        )
        os.close(requests_read)
        feeder = threading.Thread(target=_feed, args=(requests_write, _requests(test)), daemon=True)
        feeder.start()
        run.wait()
        feeder.join()
    finally:
        os.close(replies_read)
    replies = run.captured.decode("utf-8", "replace").splitlines()[2:]
    verdicts = [
        _is_result(reply, expected, rules.tolerance)
        for reply, (_, expected) in zip(replies[::1], test.cases, strict=False)
    ]
    return verdicts + [False] * (len(test.cases) - len(verdicts))


def _requests(test: CallCases) -> bytes:
    """Load the program, look the function up (it becomes object 1), and call it."""
    messages: list[dict[str, Any]] = [
        {"do": "load"},
        {"do": "function", "args": [{"o": 0}, test.function]},
        *({"do": "call_plain", "args": [{"o": 1}, *(_plain(arg) for arg in args)]} for args, _ in test.cases),
    ]
    return "".join(json.dumps(message) + "\n" for message in messages).encode()


def _feed(fd: int, content: bytes) -> None:
    with open(fd, "wb") as file:
        try:
            file.write(content)
            file.flush()
        except BrokenPipeError:
            return  # the program has ended before it read everything


def _plain(value: Any) -> Any:
    return encode(value, _no_reference)


def _no_reference(value: Any) -> dict[str, Any]:
    raise UserError(f"tests hold {short(value)}, which is no plain data", fix="use JSON values")


def _is_result(reply: str, expected: Any, tolerance: float) -> bool:
    def unknown(tag: str, _content: Any) -> Any:
        raise BadValue(tag)

    try:
        message = parse_message(reply)
        return (
            "error" not in message
            and "value" in message
            and same(decode(message["value"], unknown), expected, tolerance)
        )
    except (BadValue, RecursionError):
        return False


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """Equality of plain data as JSON sees it: tuples are lists, keys may be their text, floats are nearly equal."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        try:
            return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return False
    if isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(same(f, e, tolerance) for f, e in zip(found, expected, strict=True))
    if isinstance(found, dict) and isinstance(expected, dict):
        if found.keys() != expected.keys():
            found = {str(key): value for key, value in found.items()}
        return found.keys() == expected.keys() and all(same(found[key], expected[key], tolerance) for key in expected)
    return type(found) is type(expected) and bool(found == expected)


def _passes_asserts(program: str, test: Asserts, rules: _Rules, stop: threading.Event) -> list[bool]:
    """Two sandboxes joined by two pipes; the judge's verdicts come back by a third pipe, which the solution has not."""
    total = count_units(test.source)
    nonce = secrets.token_hex(16)
    requests_read, requests_write = os.pipe()
    replies_read, replies_write = os.pipe()
    verdicts_read, verdicts_write = os.pipe()
    solution = Run(
        _solution(program, requests_read, replies_write, rules), channels=[requests_read, replies_write], stop=stop
    )
    _close(requests_read, replies_write)
    waiting = threading.Thread(target=_wait_quietly, args=(solution,), daemon=True)
    waiting.start()
    try:
        arguments = (requests_write, replies_read, verdicts_write, nonce, test.entry_point, rules.trust_objects)
        files = {"tests_source.py": test.source, **_own_files("code_judge.py", "code_values.py")}
        main = f"import code_judge\ncode_judge.main(*{arguments!r})\n"
        judge = Run(
            Program(main, files=files, limits=rules.limits),
            channels=[requests_write, replies_read],
            capture=(verdicts_read, verdicts_write),
            stop=stop,
        )
        _close(requests_write, replies_read)
        judge.wait()
    finally:
        os.close(verdicts_read)
        solution.end()
        waiting.join()
    lines = judge.captured.decode("utf-8", "replace").splitlines()
    verdicts = [line == f"{nonce} 1" for line in lines[:total]]
    return verdicts + [False] * (total - len(verdicts))


def _wait_quietly(run: Run) -> None:
    try:
        run.wait()
    except UserError:
        return  # it was not started; the judge's own run meets the same machine and says so


def _solution(program: str, requests: int, replies: int, rules: _Rules) -> Program:
    files = {"solution_source.py": program, **_own_files("code_solution.py", "code_values.py")}
    main = f"import code_solution\ncode_solution.main({requests}, {replies})\n"
    return Program(main, files=files, limits=rules.limits)


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


@lru_cache(maxsize=1)
def _sources() -> dict[str, str]:
    folder = Path(__file__).parent
    return {
        name: (folder / name).read_text(encoding="utf-8")
        for name in ("code_judge.py", "code_solution.py", "code_values.py")
    }


def _own_files(*names: str) -> dict[str, str]:
    return {name: _sources()[name] for name in names}
