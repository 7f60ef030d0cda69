"""What a run learns from, read and tokenised."""

from __future__ import annotations

from dataclasses import dataclass, field

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
