"""The side of the line that runs assert-style tests, in a sandbox of its own that no solution can reach.

Names that the tests use and do not define stand for the solution's: calling one sends the arguments over the line and
gets a plain value back, so every comparison happens here. What is not plain data stays over there behind a `Remote`.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

try:
    from code_values import BadValue, Line, decode, encode  # type: ignore[import-not-found]
except ModuleNotFoundError:  # imported as a module of the package, for `count_units`
    from tandem.rewards.code_values import BadValue, Line, decode, encode

# Functions that tests hand over by name; anything that could open a way back (eval, getattr, open, …) is left out.
_SHARED = (
    "abs",
    "bool",
    "float",
    "int",
    "len",
    "list",
    "max",
    "min",
    "ord",
    "chr",
    "pow",
    "repr",
    "round",
    "set",
    "sorted",
    "str",
    "sum",
    "tuple",
)

# Yes-or-no questions that tests put to a string, set or number: an object in its stead could just say yes.
_PREDICATES = {
    name
    for kind in (str, bytes, set, float)
    for name in dir(kind)
    if name.startswith("is") or name in ("startswith", "endswith")
}

_KINDS = (dict, list, tuple, set, frozenset, str, bytes, int, float, complex)


class RemoteError(Exception):
    """An exception of the solution's that is not one of Python's own."""


class Remote:
    """An object in the solution's process: it can be called, iterated, indexed and asked for attributes.

    It has no arithmetic, no order and no equality of the solution's making: `assert f(x) == 3` or
    `abs(f(x) - 3) < 1e-6` would otherwise hand the verdict to the solution. With `trust_objects`, two objects of the
    solution's are compared by its own `__eq__`. With plain data, one of them is compared here, by what it holds as an
    object of a plain type's subclass (a Counter is a dict, a named tuple a tuple); one of any other class is unequal.
    What tests ask its methods is the solution's to answer, except for predicates that belong to Python's own types.
    """

    def __init__(self, judge: Judge, number: int) -> None:
        self.__dict__["_judge"], self.__dict__["_number"] = judge, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._judge.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _PREDICATES and not self._judge.trust_objects:
            raise AttributeError(f"{name}: only Python's own types may answer that")
        return self._judge.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._judge.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._judge.ask("set_item", self, key, value)

    def __iter__(self) -> Iterator[Any]:
        return self._judge.expect("iter", Remote, self)

    def __next__(self) -> Any:
        return self._judge.ask("next", self)

    def __len__(self) -> int:
        return self._judge.expect("len", int, self)

    def __bool__(self) -> bool:
        return self._judge.expect("bool", bool, self)

    def __int__(self) -> int:
        return self._judge.expect("int", int, self)

    def __float__(self) -> float:
        return self._judge.expect("float", float, self)

    def __str__(self) -> str:
        return self._judge.expect("str", str, self)

    def __repr__(self) -> str:
        return self._judge.expect("repr", str, self)

    def __enter__(self) -> Any:
        return self._judge.ask("enter", self)

    def __exit__(self, *error: object) -> None:
        self._judge.ask("exit", self)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, Remote):
            return self._judge.trust_objects and self._judge.expect("equal", bool, self, other)
        held = self._judge.ask("plain", self) if isinstance(other, _KINDS) else self
        return not isinstance(held, Remote) and held == other

    def __hash__(self) -> int:
        return id(self)


class Named:
    """A name of the solution's, looked up when it is used."""

    def __init__(self, judge: Judge, name: str) -> None:
        self._judge, self._name = judge, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._judge.ask("call", self.value(), *args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.value(), attribute)

    def value(self) -> Any:
        return self._judge.ask("get", Remote(self._judge, 0), self._name)


class Judge:
    """Asks the solution for values, and never for a verdict."""

    def __init__(self, line: Line, trust_objects: bool) -> None:
        self.line, self.trust_objects = line, trust_objects
        self.calls = 0
        self.callbacks: list[Any] = []

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """The result of an operation there; an exception there becomes one here."""
        self.calls += operation == "call"
        self.line.send(
            {
                "do": operation,
                "args": [self._encode(arg) for arg in args],
                "kwargs": {name: self._encode(arg) for name, arg in kwargs.items()},
            }
        )
        while (message := self.line.receive()) is not None:
            if "callback" not in message:
                return self._answer(operation, message, args)
            self._call_back(message)
        raise RemoteError("the solution has ended")

    def expect(self, operation: str, kind: type, *args: Any) -> Any:
        """`ask`, and the result is exactly of this type."""
        value = self.ask(operation, *args)
        if type(value) is not kind:
            raise TypeError(f"{operation} gave {type(value).__name__}")
        return value

    def _answer(self, operation: str, message: dict[str, Any], args: tuple[Any, ...]) -> Any:
        if "error" in message:
            kind: Any = getattr(builtins, str(message["error"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)
            if known and issubclass(kind, (StopIteration, StopAsyncIteration)):
                known = operation == "next"  # elsewhere it would end a loop of the tests early: all(map(f, cases))
            raise (kind if known else RemoteError)(str(message.get("text")))  # type: ignore[misc]
        value = decode(message.get("value"), self._resolve)
        if value is None and type(message.get("args")) is list:
            for ours, theirs in zip(args, message["args"], strict=False):
                _take_over(ours, None if theirs is None else decode(theirs, self._resolve))
        return value

    def _call_back(self, message: dict[str, Any]) -> None:
        try:
            function = self.callbacks[message["callback"]]
            value = function(*(decode(arg, self._resolve) for arg in message["args"]))
            self.line.send({"result": self._encode(value)})
        except Exception as error:  # noqa: BLE001  raised again over there, inside the solution's call
            self.line.send({"raised": f"{type(error).__name__}: {error}"})

    def _encode(self, value: Any) -> Any:
        return encode(value, self._reference)

    def _reference(self, value: Any) -> dict[str, Any]:
        if type(value) is Named:
            value = value.value()
        if type(value) is Remote:
            return {"o": value._number}
        if getattr(value, "__name__", None) in _SHARED and getattr(builtins, value.__name__) is value:
            return {"n": value.__name__}
        if type(value) in (types.FunctionType, types.MethodType):
            self.callbacks.append(value)
            return {"k": len(self.callbacks) - 1}
        if isinstance(value, _KINDS):  # a subclass, such as a Counter
            base: Any = next(kind for kind in _KINDS if isinstance(value, kind))
            return encode(base(value), self._reference)
        raise BadValue(f"tests cannot pass {type(value).__name__} to the solution")

    def _resolve(self, tag: str, content: Any) -> Any:
        if tag == "o" and type(content) is int:
            return Remote(self, content)
        raise BadValue(tag)


def _take_over(ours: Any, theirs: Any) -> None:
    """What a function that returned None made of a list, dict or set."""
    if type(ours) is not type(theirs) or ours == theirs:
        return
    if type(ours) is list:
        ours[:] = theirs
    elif type(ours) in (dict, set):
        ours.clear()
        ours.update(theirs)


def count_units(source: str) -> int:
    """How many tests a text holds: its top-level asserts, test functions and methods; without any of these, one.

    Raises:
        SyntaxError: the text is no Python.
    """
    tree = ast.parse(source)
    count = sum(isinstance(node, ast.Assert) or _is_test_function(node) for node in tree.body)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            count += len(_test_methods(node))
    return max(count, 1)


def _is_test_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test") and not node.args.args


def _test_methods(node: ast.ClassDef) -> list[str]:
    return [part.name for part in node.body if isinstance(part, ast.FunctionDef) and part.name.startswith("test")]


class Tests:
    """One text of tests, run against the solution; a unit passes if it raised nothing and the solution was called."""

    def __init__(self, judge: Judge, source: str, entry_point: str | None) -> None:
        self.judge, self.tree, self.entry_point = judge, ast.parse(source), entry_point
        self.namespace: dict[str, Any] = {"__name__": "tests"}
        self._bind_names()

    def run(self) -> Iterator[bool]:
        """One verdict per unit of `count_units`, in order."""
        single = True
        body: list[ast.stmt] = self.tree.body
        for node in body:
            if isinstance(node, ast.Assert):
                single = False
                yield self._passes(lambda node=node: self._execute(node))  # type: ignore[misc]
            else:
                # An error of what comes between the tests ends them: what follows may rest on it.
                self._execute(node)
            if _is_test_function(node):
                single = False
                yield self._passes(self.namespace[node.name])  # type: ignore[attr-defined]
            if isinstance(node, ast.ClassDef):
                for name in _test_methods(node):
                    single = False
                    yield self._passes(lambda node=node, name=name: self._run_method(node.name, name))  # type: ignore[misc]
        if single:
            if "check" in self.namespace and self.entry_point and not _calls(self.tree, "check"):
                self.namespace["check"](self.namespace[self.entry_point])
            yield self.judge.calls > 0

    def _passes(self, test: Any) -> bool:
        try:
            test()
        except BaseException:  # noqa: BLE001  whatever it raises, the test has failed
            return False
        return self.judge.calls > 0

    def _execute(self, node: ast.stmt) -> None:
        exec(compile(ast.Module([node], []), "tests.py", "exec"), self.namespace)

    def _run_method(self, class_name: str, name: str) -> None:
        import unittest  # costs as much as the start of the interpreter, and few tests need it

        kind = self.namespace[class_name]
        if isinstance(kind, type) and issubclass(kind, unittest.TestCase):
            result = unittest.TestResult()
            kind(name).run(result)
            if not result.wasSuccessful() or result.testsRun != 1 or result.skipped:
                raise AssertionError(name)
        else:
            getattr(kind(), name)()

    def _bind_names(self) -> None:
        loads = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        as_module = {
            n.value.id for n in ast.walk(self.tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        }
        called = {n.func.id for n in ast.walk(self.tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        names = {n.id for n in loads if not hasattr(builtins, n.id)} | (
            {self.entry_point} if self.entry_point else set()
        )
        for name in names:
            if (
                name in sys.stdlib_module_names
                and name in as_module
                and name not in called
                and name != self.entry_point
            ):
                self.namespace[name] = importlib.import_module(name)
            else:
                self.namespace[name] = Named(self.judge, name)
        module = types.ModuleType("solution")
        module.__getattr__ = lambda name: Named(self.judge, name)  # type: ignore[method-assign]
        for name in ("solution", *(["candidate"] if "candidate" in self.namespace and not self.entry_point else [])):
            sys.modules[name] = module
        if "candidate" in self.namespace and self.entry_point:
            self.namespace["candidate"] = Named(self.judge, self.entry_point)


def _calls(tree: ast.Module, name: str) -> bool:
    """Whether the top level calls this function."""
    return any(
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == name
        for node in tree.body
    )


def main(requests: int, replies: int, verdicts: int, nonce: str, entry_point: str | None, trust_objects: bool) -> None:
    """Run the tests; every verdict goes to `verdicts` at once as `NONCE 0|1`, so that a hang costs only the rest."""
    reading, writing = open(replies, encoding="utf-8"), open(requests, "w", encoding="utf-8")  # noqa: SIM115  kept to the end
    line = Line(reading, writing)
    with open("tests_source.py", encoding="utf-8", newline="") as file:
        source = file.read()
    judge = Judge(line, trust_objects)
    judge.ask("load")
    judge.calls = 0
    for passed in Tests(judge, source, entry_point).run():
        os.write(verdicts, f"{nonce} {int(passed)}\n".encode())
