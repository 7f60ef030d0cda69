"""The side of the line that runs the code under test; nothing on it is trusted, this file included.

It answers requests to call functions of the solution. The solution shares this process and can send whatever it
likes, which gains it nothing: an answer is only ever a value, and what it is compared with is never here.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from code_values import BadValue, Line, decode, encode  # type: ignore[import-not-found]

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
    "bool": bool,
    "int": int,
    "float": float,
    "get": getattr,
    "set": setattr,
    "item": lambda value, key: value[key],
    "set_item": lambda value, key, item: value.__setitem__(key, item),
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "equal": lambda left, right: left == right,
    "enter": lambda value: value.__enter__(),
    "exit": lambda value: value.__exit__(None, None, None),
    "plain": lambda value: value,
    "call_plain": lambda function, *args: function(*args),
    "function": lambda module, name: _function(module, name),
}
# Their results come as plain data as far as they go, without references to a Counter or a named tuple.
_PLAIN = ("plain", "call_plain")
_KINDS: tuple[type, ...] = (dict, list, tuple, set, frozenset, str, bytes, int, float, complex)
_KEPT = 100_000


class Solution:
    """The loaded solution and the objects of its own that the other side holds references to."""

    def __init__(self, line: Line, source: str) -> None:
        self.line, self.source = line, source
        self.module = types.ModuleType("solution")
        self.objects: list[Any] = [self.module]

    def serve(self) -> Any:
        """Answer requests until the end, or until the result of a callback arrives, which is returned."""
        while (message := self.line.receive()) is not None:
            if "result" in message:
                return self._value(message["result"])
            if "raised" in message:
                raise RuntimeError(message["raised"])
            self.line.send(self._answer(message))
        sys.exit(0)

    def load(self) -> None:
        sys.modules["solution"] = self.module
        exec(compile(self.source, "solution.py", "exec"), self.module.__dict__)

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            if message["do"] == "load":
                self.load()
                return {"value": None}
            args = [self._value(arg) for arg in message["args"]]
            kwargs = {name: self._value(arg) for name, arg in message.get("kwargs", {}).items()}
            value = _OPERATIONS[message["do"]](*args, **kwargs)
            answer = {"value": encode(value, self._plain if message["do"] in _PLAIN else self._reference)}
            if value is None:  # changed in place, by convention
                answer["args"] = [
                    encode(arg, self._reference) if type(arg) in (list, dict, set) else None for arg in args
                ]
            return answer
        except BaseException as error:  # noqa: BLE001  becomes the answer
            return {"error": type(error).__name__, "text": str(error)[:500]}

    def _plain(self, value: Any) -> Any:
        """What an object of a plain type's subclass holds, and a reference for all others."""
        kind = next((kind for kind in _KINDS if isinstance(value, kind)), None)
        return self._reference(value) if kind is None else encode(kind(value), self._plain)

    def _reference(self, value: Any) -> Any:
        if (scalar := _without_numpy(value)) is not value:
            return encode(scalar, self._reference)
        if len(self.objects) >= _KEPT:
            raise BadValue("too many objects")
        self.objects.append(value)
        return {"o": len(self.objects) - 1}

    def _value(self, data: Any) -> Any:
        return decode(data, self._resolve)

    def _resolve(self, tag: str, content: Any) -> Any:
        if tag == "o":
            return self.objects[content]
        if tag == "n":
            return __builtins__[content] if isinstance(__builtins__, dict) else getattr(__builtins__, content)
        if tag == "k":
            return lambda *args: self._call_back(content, args)
        raise BadValue(tag)

    def _call_back(self, number: int, args: tuple[Any, ...]) -> Any:
        self.line.send({"callback": number, "args": [encode(arg, self._reference) for arg in args]})
        return self.serve()


def _without_numpy(value: Any) -> Any:
    """numpy's scalars as Python's, which is what they are compared with."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def _function(module: types.ModuleType, name: str) -> Any:
    """A function of the program's, or a method of its class `Solution`, which is how LeetCode's tasks are written."""
    if not hasattr(module, name) and hasattr(module, "Solution"):
        return getattr(module.Solution(), name)
    return getattr(module, name)


def main(requests: int, replies: int) -> None:
    with open("solution_source.py", encoding="utf-8", newline="") as file:
        source = file.read()
    reading, writing = open(requests, encoding="utf-8"), open(replies, "w", encoding="utf-8")  # noqa: SIM115  kept to the end
    Solution(Line(reading, writing), source).serve()
