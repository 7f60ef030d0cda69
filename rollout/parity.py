"""How far the engine's log-probs are from the trainer's: the number that tells a sound pair from a broken one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tandem.rl.samples import Group


class LogProbDifference(NamedTuple):
    """|engine − trainer| over all sampled tokens, in nats."""

    median: float
    p99: float
    largest: float
    tokens: int

    def within(self, *, median: float = 0.01, p99: float = 0.1) -> bool:
        """Whether both computed the same model: the limits are bfloat16's noise on trained weights."""
        return self.median <= median and self.p99 <= p99

    def __str__(self) -> str:
        return f"|Δ log-prob| median {self.median:.4f} p99 {self.p99:.4f} max {self.largest:.3f} ({self.tokens} tokens)"


def log_prob_difference(groups: Sequence[Group], trainer: Sequence[torch.Tensor]) -> LogProbDifference:
    """Compare what an engine reported with the trainer's log-probs of the same tokens.

    Args:
        groups: from the engine. trainer: one `[length]` tensor per completion, in their order.

    Raises:
        ValueError: the two do not speak of the same completions, or a number is not finite.
    """
    completions = [c for group in groups for c in group.completions]
    if len(completions) != len(trainer):
        raise ValueError(f"{len(completions)} completions and {len(trainer)} rows of trainer log-probs")
    for number, (completion, own) in enumerate(zip(completions, trainer, strict=True)):
        if not len(completion.ids) == len(completion.log_probs) == own.numel():
            raise ValueError(
                f"completion {number}: {len(completion.ids)} tokens, {len(completion.log_probs)} log-probs from the "
                f"engine, {own.numel()} from the trainer"
            )
    engine = torch.tensor([value for c in completions for value in c.log_probs], dtype=torch.float64)
    own = torch.cat([row.detach().double().cpu().view(-1) for row in trainer])
    difference = (engine - own).abs()
    if not difference.numel() or not difference.isfinite().all():
        raise ValueError(f"{difference.numel()} differences, of which {(~difference.isfinite()).sum()} are not finite")
    ordered = difference.sort().values  # torch.quantile refuses more than 2²⁴ values

    def quantile(share: float) -> float:
        return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)])

    return LogProbDifference(quantile(0.5), quantile(0.99), float(ordered[-1]), len(ordered))
