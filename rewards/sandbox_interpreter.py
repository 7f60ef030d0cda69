"""A forked interpreter that looks like one which was started anew: what a sandboxed program runs in.

Imported first of all by the bare interpreter that all guards are forks of (`sandbox_start`), so that it sees which
modules an interpreter begins with. `become_new` in a fork costs less than half of what starting an interpreter does.
The fork holds the toolkit's code for sandboxes, which is no secret, and no more of any job than its own.
"""

from __future__ import annotations

import gc
import os
import site  # where `exit`, `quit` and `help` come from; under -S it does nothing by itself
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import types
    from collections.abc import Iterable, Mapping
    from typing import Any

_MODULES = set(sys.modules) - {__name__}
_PATH = sys.path[:-1]  # without the folder of this file


def prepare() -> None:
    """What is done once, before the forks."""
    site.setquit()
    site.setcopyright()
    site.sethelper()
    gc.disable()  # a collection would make every fork copy every page
    gc.freeze()


def become_new(folder: str, environment: Mapping[str, str], libraries: Iterable[str]) -> dict[str, Any]:
    """Make this interpreter one that is about to run `main.py` in `folder`, its working folder.

    Returns the namespace for it.
    """
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.orig_argv = ["main.py"], [sys.executable, "-s", "main.py"]
    sys.path[:] = [folder, *libraries, *_PATH]
    sys.path_importer_cache.clear()
    sys.dont_write_bytecode = True
    sys.excepthook = _print_exception
    _open_standard_streams()
    for name in sys.modules.keys() - _MODULES:  # the program imports its own, which may even be files of its folder
        del sys.modules[name]
    old = sys.modules["__main__"].__dict__
    main = type(sys)("__main__")  # the old one is frozen, so that what a program leaves in it would never be deleted
    main.__dict__.update(
        __builtins__=old["__builtins__"],
        __loader__=old["__loader__"],
        __annotations__={},
        __file__=f"{folder}/main.py",
        __cached__=None,
    )
    sys.modules["__main__"] = main
    gc.enable()
    return main.__dict__


def _open_standard_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(number, "w" if number else "r", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        stream.buffer.raw.name = f"<{name}>"  # type: ignore[attr-defined]
        if name == "stderr":
            stream.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _print_exception(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """As Python prints it, without the line that runs the program."""
    trace = trace and trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)
