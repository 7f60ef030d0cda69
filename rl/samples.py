"""The data that passes between the stages of a step: prompts, rollouts, rewards, training sequences.

Plain dataclasses without torch, so that reward code and the command line can use them at no cost.
Token ids are the truth: text is decoded from them for rewards and logs and never tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt data set, tokenised once.

    Attributes:
        index: row number in its data set; seeds the random streams of its completions.
        ids: token ids that the engine continues.
        prompt: the row's `prompt` as the user wrote it, a string or a list of messages; rewards receive it.
        columns: the row's other columns; rewards receive them by name.
        limit: most tokens of its completions, where that is fewer than `Sampling.max_completion_length`.
        draw: how often the batch holds the row before: seeds the streams too, so that none is sampled twice.
    """

    index: int
    ids: list[int]
    prompt: str | Messages
    columns: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    draw: int = 0

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        num_generations: completions per prompt.
        max_completion_length: most tokens per completion, the stop token included.
        temperature: 0 means greedy (log-probs are then those of the temperature-1 distribution).
        top_p: nucleus mass, 1.0 = off. top_k: 0 = off. Both renormalise, and the log-probs are those of the
            renormalised distribution.
        stop_token_ids: ids that end a completion; the stop token belongs to the completion.
        stop: texts that end a completion where they appear in it, special tokens left out; the token that completes
            such a text is the completion's last one, whatever else it holds.
        seed: with the prompt's index and draw and the number of the completion it seeds that completion's own random
            stream.
    """

    num_generations: int = 1
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()

    def longest(self, prompt: Prompt) -> int:
        """Tokens that a completion of this prompt may have."""
        if prompt.limit is None:
            return self.max_completion_length
        return min(prompt.limit, self.max_completion_length)


@dataclass
class Episode:
    """How a completion of several turns came about.

    Attributes:
        messages: everything after the prompt: the assistant's turns and what came back, as rewards receive it.
        turns: of the assistant. calls: tool calls in them; failed_calls: those answered by an error.
        turn_rewards: what the environment gave for each turn; None where it gave nothing.
        reward: the environment's own reward for the episode; None: it has none, or the episode broke off.
        ending: done (by the environment, or a turn without a tool call), tokens, turns, time (limits), or error.
        environment: the object that played it, for rewards that look at its state; it stays in its process.
    """

    messages: Messages = field(default_factory=list)
    turns: int = 0
    calls: int = 0
    failed_calls: int = 0
    turn_rewards: list[float | None] = field(default_factory=list)
    reward: float | None = None
    ending: str = "done"
    environment: Any = None

    def record(self) -> dict[str, Any]:
        """Everything but the environment, as plain data; `Episode(**record)` is its reverse."""
        return {**self.__dict__, "environment": None}

    __getstate__ = record


@dataclass
class Completion:
    """One sampled continuation.

    Attributes:
        ids: token ids after the prompt, the stop token included when there was one.
        log_probs: log-probability of each id under the distribution that it was drawn from, same length as `ids`; 0
            where it was not sampled.
        truncated: ended by the length limit, not by a stop token.
        mask: which of `ids` the policy sampled (the others are tool output and user turns); None: all.
        episode: how it came about, where an environment or tools took part.
    """

    ids: list[int]
    log_probs: list[float]
    truncated: bool
    mask: list[bool] | None = None
    episode: Episode | None = None

    def __post_init__(self) -> None:
        assert self.mask is None or len(self.mask) == len(self.ids)

    @property
    def sampled(self) -> list[bool]:
        """`mask`, spelt out."""
        return [True] * len(self.ids) if self.mask is None else self.mask

    @property
    def num_sampled(self) -> int:
        return len(self.ids) if self.mask is None else sum(self.mask)


@dataclass
class Group:
    """A prompt and the completions drawn for it."""

    prompt: Prompt
    completions: list[Completion]


@dataclass
class Scored:
    """One completion with everything that was said about it.

    Attributes:
        text: the completion decoded without special tokens.
        rewards: each reward function's own value by its name; None where a reward does not apply to this row.
        reward: the weighted total.
        advantage: filled in once the whole batch is scored; where turns have their own, the mean of theirs.
        turn_advantages: of each turn, where the config asks for them (`algorithm.advantage_level`); else empty.
        watched: values of the functions that are only watched, as `rewards`; they are no part of the total.
        extra: what rewards logged of this row (`log_extra`), by column: texts, numbers and None.
        errors: rewards that failed on this row, and how, in a line.
        skipped: a reward failed somewhere in its group, which is therefore not learned from.
        missing: no reward that counts applies to it, and `reward` is the mean of its group's.
    """

    prompt: Prompt
    completion: Completion
    group: int
    text: str
    rewards: dict[str, float | None]
    reward: float
    advantage: float = 0.0
    watched: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    skipped: bool = False
    missing: bool = False
    turn_advantages: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sequence:
    """One sequence to train on.

    Attributes:
        prompt_ids: leading tokens, never scored; at least one token, since nothing predicts the first token.
            Sequences of one `family` have equal prompts, and a pack may hold that prompt once.
        completion_ids: the tokens that follow.
        mask: which of `completion_ids` carry loss, same length (False: tool output, user turns).
        family: sequences with the same number share their prompt; -1 shares with none.
        unit: sequences with the same number must lie in one pack (the two halves of a preference pair); -1: free.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[bool]
    family: int = -1
    unit: int = -1

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a sequence needs at least one prompt token to predict from"
        assert len(self.mask) == len(self.completion_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_scored(self) -> int:
        return sum(self.mask)
