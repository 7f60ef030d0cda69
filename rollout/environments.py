"""Environments: what answers the model in the course of an episode.

An environment is a class with `reset(**row)` and, in one of two ways, something to do:

- `step(message)` gets the assistant's message (`{"role": "assistant", "content": …}`) and returns a `Step`, or the
  tuple `(observation, done)` or `(observation, done, reward)`; an observation is a text (a user message then), a
  message or a list of messages. Methods are not shown to the model; what `tools` names, a list of functions, is.
- TRL's way (`environment_factory`): without a `step(message)`, all public methods but `reset` and `get_reward` are
  tools, and the episode ends with the first turn that calls none.

`reset` gets the row's columns by name, only those it takes. It returns None (the row's prompt stands), a text that is
appended to the prompt's last message, or a list of messages that replaces the prompt. `get_reward()`, where there is
one, gives the episode's reward at its end; otherwise that is the sum of what `step` gave. All of them may be async.
Objects are made once and reset often, one episode at a time; they run in threads other than the main one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tandem.rl.errors import UserError, cause, short
from tandem.rl.samples import Messages, Prompt
from tandem.rollout.tool_calls import BadCall, ParsedTurn, ToolCall
from tandem.rollout.tools import Tool, failed_call, run_calls, text_of, tools_of
from tandem.rollout.workers import resolved

Observation = str | Mapping[str, Any] | list[dict[str, Any]] | None
ROUTE = "environment"
"""The column that says which environment a row wants, where there are several."""


@dataclass(frozen=True)
class Step:
    """What an environment says to an assistant's turn.

    Attributes:
        observation: the answer; None or empty only where `done`.
        done: the episode ends, and the answer is not shown to the model any more.
        reward: of this turn; None: none.
    """

    observation: Observation = None
    done: bool = False
    reward: float | None = None


@dataclass(frozen=True)
class Answer:
    """What came back to one turn, as the episode goes on with it."""

    messages: Messages
    done: bool
    reward: float | None = None
    failed_calls: int = 0


class EnvironmentFault(Exception):
    """An environment raised, or returned something that it may not. `__cause__` is what it raised, if it did."""


@dataclass(eq=False)
class Session:
    """One episode's environment (None: only tools) with the tools that the model may call in it."""

    environment: Any
    tools: dict[str, Tool]
    steps: bool
    routed: bool = False

    @cached_property
    def needed(self) -> list[str]:
        """Columns that `reset` cannot do without."""
        if self.environment is None:
            return []
        parameters = inspect.signature(self.environment.reset).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        return [tool.schema for tool in self.tools.values()] or None

    def reset(self, prompt: Prompt) -> Messages:
        """Start an episode on a row; the conversation that the model is to continue.

        Raises:
            EnvironmentFault: reset raised, or returned something else than None, a text or messages.
        """
        assert not isinstance(prompt.prompt, str)
        if self.environment is None:
            return prompt.prompt
        row = {"prompt": prompt.prompt, **prompt.columns}
        if self.routed:
            del row[ROUTE]
        result = _called(self.environment, "reset", **_taken(self.environment.reset, row))
        return _opening(prompt.prompt, result, self.environment)

    def answer(self, turn: ParsedTurn) -> Answer:
        """Run a turn's calls, or hand the turn to the environment's `step`.

        Raises:
            EnvironmentFault: `step` raised or returned something wrong. What tools do is told to the model instead.
        """
        if turn.calls:
            results = run_calls(turn.calls, self.tools)
            return Answer([r.message for r in results], done=False, failed_calls=sum(r.failed for r in results))
        if not self.steps:
            return Answer([], done=True)
        step = _step(_called(self.environment, "step", turn.message()), self.environment)
        messages = _messages(step.observation, self.environment)
        if not messages and not step.done:
            raise EnvironmentFault(
                f"{_name(self.environment)}.step returned no observation, and the episode is not done"
            )
        return Answer(messages, step.done, step.reward)

    @staticmethod
    def too_late(calls: list[ToolCall | BadCall], seconds: float) -> Answer:
        """The answer to calls of tools without an environment that took too long."""
        results = [failed_call(call, f"no result within {seconds:g} seconds") for call in calls]
        return Answer([r.message for r in results], done=False, failed_calls=len(results))

    def reward(self, turn_rewards: list[float | None]) -> float | None:
        """The episode's reward: what `get_reward` says, or the sum of the turns'; None: there is neither."""
        if hasattr(self.environment, "get_reward"):
            value = _called(self.environment, "get_reward")
            return None if value is None else _number(value, f"{_name(self.environment)}.get_reward")
        given = [value for value in turn_rewards if value is not None]
        return sum(given) if given else None


@dataclass
class Environments:
    """Makes environments, and lends them for an episode at a time.

    Args:
        factories: by name; one without a name is everybody's. Empty: there are only tools.
        tools: functions that every episode may call. kwargs: for the factories.

    Raises:
        UserError: a factory raises, its environment has no `reset` or nothing to do, or a tool cannot be described.
    """

    factories: Mapping[str | None, Callable[..., Any]]
    tools: list[Callable[..., Any]] = field(default_factory=list)
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free: dict[str | None, list[Session]] = {}
        self._lent: list[tuple[str | None, Session]] = []
        for name in self.factories:
            self._free[name] = [self._session(name)]
        if not self.factories:
            self._common = Session(None, tools_of(self.tools), steps=False)

    @property
    def common_schemas(self) -> list[dict[str, Any]] | None:
        """The tools that every row's prompt shows; None where rows differ or there are none."""
        if not self.factories:
            return self._common.schemas
        return self._free[None][0].schemas if self._free.get(None) else None

    @property
    def uses_tools(self) -> bool:
        """Whether any environment lets the model call something."""
        if not self.factories:
            return True
        return any(session.tools for sessions in self._free.values() for session in sessions)

    def check_row(self, prompt: Prompt) -> None:
        """Whether an episode can start on a row.

        Raises:
            UserError: it names no environment that there is, its prompt is no conversation, or its environment's
                `reset` needs a column that it does not have.
        """
        if not prompt.conversational:
            raise UserError(
                f"row {prompt.index}: the prompt is a string: {short(prompt.prompt)}",
                reason="an environment's answers are messages, and so must be what they follow",
                fix="give prompts as lists of messages",
            )
        if self.factories and None not in self.factories and prompt.columns.get(ROUTE) not in self.factories:
            raise UserError(
                f"row {prompt.index}: the column {ROUTE!r} is {short(prompt.columns.get(ROUTE))}",
                fix=f"name one of {', '.join(map(str, self.factories))}, the keys of environment.factory",
            )
        if not self.factories:
            return
        session = self._free[self._name_for(prompt)][0]
        columns = [name for name in ("prompt", *prompt.columns) if not (session.routed and name == ROUTE)]
        if missing := [name for name in session.needed if name not in columns]:
            raise UserError(
                f"{_name(session.environment)}.reset needs an argument {missing[0]!r}, and there is no such column",
                reason=f"row {prompt.index} has the columns {', '.join(columns)}",
                fix="rename a column, or give the parameter a default",
            )

    def lend(self, prompt: Prompt) -> Session:
        """An environment for an episode on this row, until `collect`."""
        if not self.factories:
            return self._common
        name = self._name_for(prompt)
        session = self._free[name].pop() if self._free[name] else self._session(name)
        self._lent.append((name, session))
        return session

    def _name_for(self, prompt: Prompt) -> str | None:
        return None if None in self.factories else prompt.columns[ROUTE]

    def collect(self) -> None:
        """Take back all environments but those that were given up."""
        for name, session in self._lent:
            self._free[name].append(session)
        self._lent.clear()

    def give_up(self, session: Session) -> None:
        """Never lend this one again: a thread may still be busy in it."""
        self._lent = [(name, other) for name, other in self._lent if other is not session]

    def _session(self, name: str | None) -> Session:
        factory = self.factories[name]
        label = getattr(factory, "__name__", repr(factory))
        try:
            environment = factory(**self.kwargs)
        except Exception as error:
            raise UserError(
                f"the environment {label!r} cannot be made: {cause(error)}", fix="correct it, or environment.kwargs"
            ) from error
        if not callable(getattr(environment, "reset", None)):
            raise UserError(f"the environment {label!r} has no method reset", fix="define reset(self, **row)")
        steps = _has_step(environment)
        if steps:
            own = list(getattr(environment, "tools", ()))
        else:
            own = [getattr(environment, method) for method in _tool_methods(type(environment))]
        tools = tools_of([*self.tools, *own])
        if not steps and not tools:
            raise UserError(
                f"the environment {label!r} has neither step(self, message) nor a method that the model may call",
                fix="define step, or public methods with types and docstrings",
            )
        return Session(environment, tools, steps, routed=name is not None)


def _has_step(environment: Any) -> bool:
    """Whether it has our `step(message)`; a method of that name with other parameters is a tool, as in TRL."""
    step = getattr(environment, "step", None)
    return callable(step) and list(inspect.signature(step).parameters) == ["message"]


def _tool_methods(kind: type) -> list[str]:
    # Looked up on the class: on the object, properties would be evaluated.
    names = [name for name, _ in inspect.getmembers(kind, predicate=inspect.isfunction)]
    return [name for name in names if name not in ("reset", "get_reward") and not name.startswith("_")]


def _taken(function: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a row that a function takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(row)
    return {name: value for name, value in row.items() if name in parameters}


def _called(environment: Any, method: str, /, *args: Any, **kwargs: Any) -> Any:
    try:
        return resolved(getattr(environment, method)(*args, **kwargs))
    except (Exception, SystemExit) as error:
        raise EnvironmentFault(f"{_name(environment)}.{method} raised {cause(error)}") from error


def _opening(prompt: Messages, result: Any, environment: Any) -> Messages:
    if result is None:
        return prompt
    if isinstance(result, list) and all(isinstance(m, Mapping) and "role" in m for m in result) and result:
        return [dict(message) for message in result]
    text = text_of(result)
    if text is None:
        raise EnvironmentFault(f"{_name(environment)}.reset returned {short(result)}, not None, a text or messages")
    content = prompt[-1].get("content") or ""
    return [*prompt[:-1], {**prompt[-1], "content": (text_of(content) or "") + text}]


def _step(result: Any, environment: Any) -> Step:
    if isinstance(result, Step):
        step = result
    elif isinstance(result, tuple) and len(result) in (2, 3):
        step = Step(*result)
    else:
        raise EnvironmentFault(
            f"{_name(environment)}.step returned {short(result)}, not a Step or (observation, done[, reward])"
        )
    if not isinstance(step.done, bool) and type(step.done).__name__ not in ("bool", "bool_"):
        raise EnvironmentFault(f"{_name(environment)}.step returned {short(step.done)} for done, not True or False")
    reward = None if step.reward is None else _number(step.reward, f"{_name(environment)}.step")
    return Step(step.observation, bool(step.done), reward)


def _messages(observation: Any, environment: Any) -> Messages:
    if observation is None or observation == "" or observation == []:
        return []
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    messages = [observation] if isinstance(observation, Mapping) else observation
    if isinstance(messages, list) and all(isinstance(m, Mapping) and "role" in m for m in messages):
        return [dict(message) for message in messages]
    raise EnvironmentFault(f"{_name(environment)}.step returned the observation {short(observation)}, not messages")


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number - number != 0:
        raise EnvironmentFault(f"{what} returned the reward {short(value)}, not a finite number")
    return number


def _name(environment: Any) -> str:
    return type(environment).__name__
