"""What a reward is, and how its name in a config becomes a function.

A reward is a plain Python function with TRL's signature, called once for a whole batch:

    def f(prompts, completions, completion_ids, **columns) -> list[float | None]

It may name only the arguments that it wants, may be `async def`, and returns one number per completion (None: does
not apply to this row). `trainer_state`, `log_extra` and `log_metric` are passed to functions that ask for them. verl's
`compute_score` functions are known by their parameters and are called in verl's way.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal

from tandem.rewards.completion import completion_text
from tandem.rewards.verl import VerlScore, is_verl
from tandem.rl.errors import UserError

__all__ = ["BUILT_IN", "RESERVED", "Reward", "completion_text", "load_function", "load_reward", "locate", "nearest"]

BUILT_IN: dict[str, str] = {
    "math_answer": "tandem.rewards.math_answer",
    "tag_format": "tandem.rewards.text_format",
    "boxed_format": "tandem.rewards.text_format",
    "length_penalty": "tandem.rewards.length",
    "overlong_penalty": "tandem.rewards.length",
    "exact_match": "tandem.rewards.text_match",
    "fuzzy_match": "tandem.rewards.text_match",
    "json_schema": "tandem.rewards.json_schema",
    "regex_match": "tandem.rewards.regex",
    "repetition_penalty": "tandem.rewards.repetition",
    "language_penalty": "tandem.rewards.repetition",
    "code_tests": "tandem.rewards.code_tests",
    "gate": "tandem.rewards.combine",
    "minimum": "tandem.rewards.combine",
    "group_ranks": "tandem.rewards.combine",
    "environment": "tandem.rewards.environment",
}
"""Rewards that a config may name without a module, and where each is defined."""

Scope = Literal["group", "batch"]
GROUP_SCOPE = frozenset(("judge", "code_tests"))
"""Built-in rewards that spend their time waiting for somebody else, and judge each completion by itself: they are
called for finished groups while others are generated. The rest would take the processor away from the engine."""

MAKERS: dict[str, str] = {"judge": "tandem.rewards.judge"}
"""Built-in rewards with a state of their own (a cache, counters): made once, from the kwargs of the config's entry."""

TEXT_ARGUMENTS = ("prompts", "completions", "completion_ids")
TRAINER_ARGUMENTS = ("trainer_state", "log_extra", "log_metric", "environments")
RESERVED = (*TEXT_ARGUMENTS, *TRAINER_ARGUMENTS)
"""Arguments that the toolkit fills; neither a column nor a config's kwargs may replace them."""
OTHER_VALUES = "rewards_by_name"
"""A reward that names this argument is called after those without it and gets their values: `{name: [value, …]}`."""
EPISODES = "episodes"
ON_REQUEST = (OTHER_VALUES, "group_numbers", "reward_timeout", EPISODES)
"""Arguments that the toolkit fills only where a function names them: the other rewards' values, which completions share
a prompt (one number per completion), the seconds that the call may take, and how completions of several turns came
about (`rl.samples.Episode`, None for those of one turn)."""


@dataclass
class Reward:
    """One reward function as a config uses it.

    Attributes:
        name: key of its values in `Scored.rewards` and in metrics.
        function: callable with TRL's reward signature, sync or async.
        weight: factor of its values in the total.
        kwargs: keyword arguments that every call receives; they win over columns of the same name.
        scope: what a call needs to see. batch: all completions of a rollout; group: all completions of a prompt, so
            that it can be called for groups that are finished while others are generated (see `overlap`).
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    scope: Scope = "batch"

    @property
    def is_async(self) -> bool:
        """Whether a call returns a coroutine."""
        function = _without_partials(self.function)
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)

    @property
    def combines(self) -> bool:
        """Whether it is computed from other rewards' values."""
        return OTHER_VALUES in self.named()

    @property
    def file(self) -> str | None:
        """The Python file that defines the function; None for functions written in C."""
        function = inspect.unwrap(_without_partials(self.function))
        for candidate in (function, type(function).__call__):
            code = getattr(candidate, "__code__", None)
            if code is not None:
                return str(code.co_filename)
        return None

    def parameters(self) -> dict[str, inspect.Parameter] | None:
        """Named parameters; None if the function takes any keyword (or does not say what it takes)."""
        try:
            parameters = dict(inspect.signature(self.function).parameters)
        except (TypeError, ValueError):
            return None
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return None
        return {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    def required(self) -> list[str]:
        """Names of the parameters without a default."""
        return [name for name, p in self.named().items() if p.default is p.empty]

    def named(self) -> dict[str, inspect.Parameter]:
        """The parameters that the function names, whether or not it takes others too."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            return {}
        return {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    @property
    def may_log(self) -> bool:
        """Whether a call can say anything beside its values that is averaged (`log_metric`)."""
        taken = self.parameters()
        return taken is None or "log_metric" in taken

    def start_batch(self) -> None:
        """Tell the function that a batch begins, if it has a method of that name."""
        self._tell("start_batch")

    def end_batch(self) -> None:
        """Tell the function that a batch is over, likewise; what it raises is a fault of the reward."""
        self._tell("end_batch")

    def _tell(self, what: str) -> None:
        method = getattr(_without_partials(self.function), what, None)
        if callable(method):
            method()

    def metrics(self) -> dict[str, float]:
        """What the function's own `metrics()` tells about its latest batch, if it has such a method."""
        method = getattr(_without_partials(self.function), "metrics", None)
        return {str(name): float(value) for name, value in method().items()} if callable(method) else {}


def load_reward(
    function: str | Callable[..., Any],
    *,
    name: str | None = None,
    weight: float = 1.0,
    kwargs: dict[str, Any] | None = None,
    scope: Scope | None = None,
) -> Reward:
    """Find a reward function and check that it can be called.

    Args:
        function: a built-in name (`BUILT_IN`), `FILE.py:function` (relative to the working directory),
            `module:function`, or a callable. The folder of a FILE.py goes to the front of `sys.path`, as Python does
            for a script, so that its helper modules import, also later from inside the function.
        name: name in metrics; None: what stands after the colon (for a callable, its `__name__` or class name).
        weight: factor in the total.
        kwargs: passed to every call.
        scope: see `Reward`; None: group for the built-in rewards of `GROUP_SCOPE`, else batch.

    Raises:
        UserError: nothing of that name, an error while importing it, not callable, kwargs that it does not take, or
            scope group for a reward that combines others.
    """
    if isinstance(function, str):
        found, label = _find(function, "reward function"), function
        name = name or function.rpartition(":")[2]
    else:
        found, label = function, repr(function)
        name = name or getattr(function, "__name__", None) or type(function).__name__
    made = isinstance(function, str) and function in MAKERS
    if not made:
        _check_callable(found, label)
    if is_verl(found):
        found = VerlScore(found)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise UserError(f"the weight of reward {name!r} is {weight!r}", fix="give a finite number")
    if scope is None:
        scope = "group" if isinstance(function, str) and function in GROUP_SCOPE else "batch"
    reward = Reward(name, found, float(weight), dict(kwargs or {}), scope)
    _check_kwargs(reward, built_in=isinstance(function, str) and function in BUILT_IN)
    if made:
        return Reward(reward.name, _made(reward), reward.weight, scope=scope)
    if scope == "group" and reward.combines:
        raise UserError(
            f"reward {name!r} has scope group and names {OTHER_VALUES!r}",
            reason="it needs the other rewards' values, which are complete only with the batch",
            fix="leave its scope out",
        )
    return reward


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """A function of the user, given as `FILE.py:function` or `module:function`; `what` names its role in errors.

    Raises:
        UserError: nothing of that name, an error while importing it, or not callable.
    """
    if ":" not in spec:
        raise UserError(f"{what} {spec!r} is incomplete", fix="write FILE.py:FUNCTION or MODULE:FUNCTION")
    found = _find(spec, what)
    if not callable(found):
        raise UserError(f"{what} {spec!r} is not callable: it is {type(found).__name__}", fix="name a function")
    return found


def locate(error: BaseException, file: str | None) -> str:
    """Where an exception happened: `FILE:LINE in FUNCTION`, the deepest place inside `file` if there is one.

    Empty if the traceback never left the toolkit.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own_folder = str(Path(__file__).parent)
    inside = [f for f in frames if file is not None and f.filename == file]
    outside = [f for f in frames if not f.filename.startswith((own_folder, "<frozen"))]
    for choice in (inside, outside):
        if choice:
            return f"{choice[-1].filename}:{choice[-1].lineno} in {choice[-1].name}"
    return ""


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the most similar of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class _SourceLoader(SourceFileLoader):
    """Always compiles: cached bytecode is matched by size and whole seconds, and would hide a quick edit."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _find(spec: str, what: str) -> Any:
    where, colon, attribute = spec.rpartition(":")
    if not colon:
        return _find_built_in(spec)
    if not where or not attribute:
        raise UserError(f"{what} {spec!r} is incomplete", fix="write FILE.py:FUNCTION or MODULE:FUNCTION")
    if where.endswith(".py") or "/" in where:
        module = _load_file(where, spec, what)
    else:
        module = _import_module(where, spec, what)
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(
            f"{what} {spec!r}: {where} has no {attribute!r}{nearest(attribute, names)}",
            fix=f"it defines {', '.join(sorted(names))}" if names else "define the function in it",
        ) from None


def _find_built_in(name: str) -> Any:
    known = BUILT_IN | MAKERS
    if name in known:
        return getattr(importlib.import_module(known[name]), name)
    if name.endswith(".py"):
        raise UserError(f"reward function {name!r} names a file but no function", fix=f"write {name}:FUNCTION")
    module, dot, attribute = name.rpartition(".")
    hint = f"write {module}:{attribute}" if dot and module else "write FILE.py:FUNCTION or MODULE:FUNCTION"
    raise UserError(
        f"there is no built-in reward {name!r}{nearest(name, known)}",
        reason=f"built-in rewards are {', '.join(known)}",
        fix=f"for a function of your own {hint}",
    )


def _load_file(where: str, spec: str, what: str) -> ModuleType:
    """The module of a Python file; one file is loaded once, and again after it was changed."""
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(
            f"{what} {spec!r}: there is no file {str(path)!r}{nearest(path.name, siblings)}",
            fix="give the path from the working directory, or an absolute one",
        )
    stat = path.stat()
    identity = hashlib.sha256(f"{path}\0{stat.st_mtime_ns}\0{stat.st_size}".encode()).hexdigest()[:12]
    name = f"tandem_reward_{path.stem}_{identity}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _SourceLoader(name, str(path))
    module_spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    folder = str(path.parent)
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if added and folder in sys.path:
            sys.path.remove(folder)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_problem(spec, what, error, str(path)) from error
    return module


def _import_module(where: str, spec: str, what: str) -> ModuleType:
    # A console script, unlike `python -m`, does not see the working directory.
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(where)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{where}.".startswith(f"{error.name}."):
            raise UserError(
                f"{what} {spec!r}: there is no module {error.name!r}",
                fix="install it, start from the folder that holds it, or write FILE.py:FUNCTION",
            ) from None
        found = sys.modules.get(where)
        raise _import_problem(spec, what, error, getattr(found, "__file__", None)) from error


def _import_problem(spec: str, what: str, error: BaseException, file: str | None) -> UserError:
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
        line = (error.text or "").strip()
        return UserError(f"{what} {spec!r}: syntax error at {place}: {error.msg}" + (f": {line}" if line else ""))
    place = locate(error, file) or str(file)
    if isinstance(error, ModuleNotFoundError):
        return UserError(
            f"{what} {spec!r}: {place} imports {error.name!r}, which is not installed",
            fix=f"install {error.name!r} in this environment, or put its file beside that one",
        )
    return UserError(
        f"{what} {spec!r} cannot be imported: {type(error).__name__}: {error}",
        reason=f"raised at {place}",
        fix="the file must import without errors; try it with python",
    )


def _check_callable(found: Any, label: str) -> None:
    if inspect.isclass(found):
        raise UserError(
            f"reward function {label!r} is a class",
            reason="calling it would build an object, not compute rewards",
            fix="name a function, or an instance of the class that has __call__",
        )
    if not callable(found):
        raise UserError(
            f"reward function {label!r} is not callable: it is {type(found).__name__}", fix="name a function"
        )


def _check_kwargs(reward: Reward, *, built_in: bool) -> None:
    # The built-in rewards take any column, so that every data set suits them, but no option that they do not name.
    taken = reward.named() if built_in else reward.parameters()
    for key in reward.kwargs:
        if key in RESERVED:
            raise UserError(
                f"reward {reward.name!r}: kwargs may not contain {key!r}",
                reason="the toolkit fills this argument for every batch",
                fix="give the parameter another name",
            )
        if taken is not None and key not in taken:
            own = [n for n in taken if n not in RESERVED]
            raise UserError(
                f"reward {reward.name!r} takes no argument {key!r}{nearest(key, own)}",
                fix=f"it takes {', '.join(own)}" if own else "remove it from kwargs",
            )


def _made(maker: Reward) -> Any:
    if missing := [n for n in maker.required() if n not in maker.kwargs]:
        raise UserError(f"reward {maker.name!r} needs {missing[0]!r}", fix="give it in the reward's kwargs")
    try:
        return maker.function(**maker.kwargs)
    except UserError as error:
        raise UserError(f"reward {maker.name!r}: {error.problem}", reason=error.reason, fix=error.fix) from error


def _without_partials(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function
