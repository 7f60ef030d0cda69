"""The section of a config that says what the model plays with: an environment, tools, and their limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tandem.rl.sections import Positive, Section


class EnvironmentConfig(Section):
    """Multi-turn rollouts: an environment that answers the model, or tools that it may call (docs/environments.md)."""

    factory: str | dict[str, str] | None = None
    """`FILE.py:CLASS` or `module:CLASS`, TRL's `environment_factory`: builds one environment per completion. Several by
    name: a row's column `environment` says which. None: no environment."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the factory."""
    tools: list[str] = Field(default_factory=list)
    """Functions that the model may call, `FILE.py:function` or `module:function`, with types and a docstring."""
    tool_format: Literal["auto", "hermes", "llama3", "mistral"] = "auto"
    """How the model writes calls; auto: as its chat template does. hermes (Qwen too): JSON in `<tool_call>` tags;
    llama3: bare JSON; mistral: after `[TOOL_CALLS]`."""
    max_turns: Positive = 8
    """Assistant turns per episode."""
    max_turn_tokens: Positive | None = None
    """Longest assistant turn in tokens; None: what is left of rollout.max_completion_length, which bounds all turns and
    answers of an episode together."""
    step_timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that one reset, one step or the tool calls of one turn may take."""
    episode_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which an episode gets no further turn; None: no limit."""
    num_workers: Positive = 32
    """Environments that work at the same time, each in a thread."""
    on_error: Literal["stop", "end_episode"] = "stop"
    """An environment that raises. stop: the run ends with its name, row and line; end_episode: the episode ends without
    a reward from it. What a tool raises goes back to the model as an error."""

    @property
    def enabled(self) -> bool:
        return self.factory is not None or bool(self.tools)
