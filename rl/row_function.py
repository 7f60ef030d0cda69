"""Rows from a Python function of the user: `FILE.py:FUNCTION`."""

from __future__ import annotations

import difflib
import inspect
import json
import linecache
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.rl.errors import UserError, short

if TYPE_CHECKING:
    pass


def rows_from_function(path: Path, name: str, split: str, kwargs: dict[str, Any], what: str) -> Any:
    """What the function returns: a Dataset, a mapping of splits, or a list of dicts whose values are plain data.

    Raises:
        UserError: there is no such function, it fails, or it returns something else; with the line in its file.
    """
    source = f"{path}:{name}"
    with _user_code(path, what), _importable(path.resolve().parent):
        module = _run_module(path)
        function = getattr(module, name, None)
        if not callable(function):
            raise _no_such_function(path, name, module, what)
        result = function(**_arguments(function, split, kwargs, source, what))
        if not hasattr(result, "column_names") and not hasattr(result, "keys"):  # rows, perhaps still to be generated
            if not isinstance(result, Iterable) or isinstance(result, str | bytes):
                raise UserError(f"{what}: {source} returned {short(result)}", fix="return a list of dicts or a Dataset")
            result = list(result)
            for number, row in enumerate(result):
                _refuse_opaque(row, number, source, what)
    return result


def _run_module(path: Path) -> types.ModuleType:
    """Run the file under a name of its own; compiled here, since Python's bytecode cache misses quick edits."""
    module = types.ModuleType(f"_tandem_data_{path.stem}_{abs(hash(str(path.resolve())))}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    linecache.checkcache(str(path))
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _arguments(function: Callable, split: str, kwargs: dict[str, Any], source: str, what: str) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if "split" not in kwargs and ("split" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())):
        kwargs = {"split": split, **kwargs}
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise UserError(
            f"{what}: {source} cannot be called with {kwargs!r}: {error}",
            fix=f"change dataset_kwargs; it takes ({', '.join(map(str, parameters.values()))})",
        ) from error
    return kwargs


def _no_such_function(path: Path, name: str, module: types.ModuleType, what: str) -> UserError:
    own = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
    near = difflib.get_close_matches(name, own, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"its functions are {', '.join(own) or 'none'}"
    return UserError(f"{what}: {path} has no function {name!r}", fix=fix)


def _refuse_opaque(row: Any, number: int, source: str, what: str) -> None:
    """Objects that are no data would silently become empty columns."""
    import datetime

    def check(value: Any) -> Any:
        if isinstance(value, datetime.date | datetime.time | bytes) or type(value).__module__ == "numpy":
            return None
        raise TypeError(f"{short(value)} of type {type(value).__name__} is no data")

    try:
        json.dumps(row, default=check)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what}: row {number} of {source}: {error}", fix="give strings, numbers, lists and dicts"
        ) from error


@contextmanager
def _user_code(path: Path, what: str) -> Iterator[None]:
    """Report what the user's file raises, with its line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's program can raise anything, and may call exit
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise UserError(f"{what}: {where}: {type(error).__name__}: {error}", fix="correct the function") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside the user's file can be imported, as when Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
