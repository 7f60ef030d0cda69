"""What a run learns from, read and tokenised."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.rl.config import Config
from tandem.rl.plan import Longest
from tandem.rl.preference_step import Answers
from tandem.rl.samples import Prompt, Sequence


@dataclass
class TrainingData:
    """Everything to learn from, tokenised: `prompts` for rollouts, `examples` for SFT, `answers` for preference tuning,
    `warmup` for the SFT before the rest."""

    prompts: list[Prompt] = field(default_factory=list)
    eval_prompts: list[Prompt] = field(default_factory=list)
    examples: list[Sequence] = field(default_factory=list)
    eval_examples: list[Sequence] = field(default_factory=list)
    answers: Answers | None = None
    eval_answers: Answers | None = None
    warmup: list[Sequence] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows of the main phase."""
        return len(self.prompts or self.examples or self.answers or ())


def longest_sequence(config: Config, data: TrainingData) -> Longest:
    """The longest sequence of the data; completions that are yet to be sampled count in full."""
    if config.uses_rollouts:
        prompts = [len(p.ids) for p in (*data.prompts, *data.eval_prompts)]
        return Longest(max(prompts, default=1), config.rollout.max_completion_length)
    examples = [*(data.answers.sequences if data.answers else data.examples), *data.warmup]
    one = max(examples, key=lambda e: e.num_tokens)
    return Longest(len(one.prompt_ids), len(one.completion_ids))
