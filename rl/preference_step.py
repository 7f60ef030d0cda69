"""Preference tuning of one optimiser batch: answers through the model, the objective's gradient per token, backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.distributed import share
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel
from tandem.rl.packing import Pack, pack
from tandem.rl.preference_loss import (
    LabelledTokens,
    PreferenceOptions,
    PreferenceTokens,
    needs_pairs,
    needs_reference,
    preference_loss,
)
from tandem.rl.samples import Sequence
from tandem.rl.step import add_gradients, pack_log_probs, sequence_log_probs, training_mode


@dataclass
class Answers:
    """Answers to learn from: pairs as chosen, rejected, chosen, rejected, … or single answers with labels.

    Attributes:
        sequences: each with at least one scored token.
        labels: for single answers whether each is a good one; None: the answers are pairs.
        ref_log_probs: the reference policy's, `[scored tokens]` each; None where the objective has no reference.
    """

    sequences: list[Sequence]
    labels: list[bool] | None = None
    ref_log_probs: list[torch.Tensor] | None = None

    @property
    def unit(self) -> int:
        """Answers per example."""
        return 2 if self.labels is None else 1

    def __len__(self) -> int:
        """Examples: pairs, or single answers."""
        return len(self.sequences) // self.unit

    def subset(self, examples: list[int]) -> Answers:
        chosen = [self.unit * e + k for e in examples for k in range(self.unit)]
        return Answers(
            [self.sequences[i] for i in chosen],
            None if self.labels is None else [self.labels[i] for i in chosen],
            None if self.ref_log_probs is None else [self.ref_log_probs[i] for i in chosen],
        )


def reference_log_probs(
    lm: LanguageModel, sequences: list[Sequence], head: HeadOptions, max_tokens: int
) -> list[torch.Tensor]:
    """Log-probs under the reference policy: the same model with the adapter off."""
    with lm.model.disable_adapter():
        return sequence_log_probs(lm, pack(sequences, max_tokens), len(sequences), head)[0]


def preference_backward(
    lm: LanguageModel,
    answers: Answers,
    loss_type: str,
    options: PreferenceOptions,
    head: HeadOptions,
    meter: Meter,
    *,
    max_tokens: int,
) -> None:
    """Add the gradient of the batch's objective to the adapter's `.grad`; log what happened in `meter`."""
    batch = _Batch(lm, answers, loss_type, head, max_tokens)
    with training_mode(lm):
        for one in pack(share(answers.sequences, answers.unit), max_tokens):
            log_probs, entropy, *_ = pack_log_probs(lm, one, head)
            value = preference_loss(loss_type, batch.tokens(one, log_probs.detach()), options)
            add_gradients(lm, [(log_probs, value.grad)])
            _log(meter, value)
            meter.add("entropy", entropy.detach())


@torch.no_grad()
def preference_metrics(
    lm: LanguageModel,
    answers: Answers,
    loss_type: str,
    options: PreferenceOptions,
    head: HeadOptions,
    *,
    max_tokens: int,
) -> dict[str, float]:
    """Loss and metrics of held-out answers."""
    meter, batch = Meter(), _Batch(lm, answers, loss_type, head, max_tokens)
    with lm.packed():
        for one in pack(answers.sequences, max_tokens):
            log_probs = pack_log_probs(lm, one, head).log_probs
            _log(meter, preference_loss(loss_type, batch.tokens(one, log_probs), options))
    return with_margins(meter.result())


def with_margins(metrics: dict[str, float]) -> dict[str, float]:
    """Single answers have no margin each; that of their means belongs to the whole batch."""
    if "rewards/margins" not in metrics and {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


class _Batch:
    """What a pack's tokens need to know of the whole optimiser batch."""

    def __init__(self, lm: LanguageModel, answers: Answers, loss_type: str, head: HeadOptions, max_tokens: int) -> None:
        assert needs_pairs(loss_type) == (answers.labels is None)
        assert answers.ref_log_probs is not None or not needs_reference(loss_type)
        self._answers = answers
        self._chosen_tokens = sum(s.num_scored for s in answers.sequences[::2])
        self._kl = 0.0 if answers.labels is None else mismatched_kl(lm, answers.sequences, head, max_tokens)

    def tokens(self, one: Pack, log_probs: torch.Tensor) -> PreferenceTokens | LabelledTokens:
        """A pack's tokens, answers numbered within the pack in the order of the batch."""
        answers, device = self._answers, log_probs.device
        number = {index: rank for rank, index in enumerate(sorted(one.sequences))}
        counts = torch.tensor(one.counts, device=device)
        sequence = torch.tensor([number[i] for i in one.sequences], device=device).repeat_interleave(counts)
        ref = answers.ref_log_probs
        ref_log_probs = None if ref is None else torch.cat([ref[i].to(device) for i in one.sequences])
        if answers.labels is None:
            assert all(i ^ 1 in number for i in number), "both answers of a pair lie in one pack"
            return PreferenceTokens(
                log_probs,
                sequence,
                num_pairs=len(number) // 2,
                total_pairs=len(answers),
                total_chosen_tokens=self._chosen_tokens,
                ref_log_probs=ref_log_probs,
            )
        return LabelledTokens(
            log_probs,
            sequence,
            desirable=torch.tensor([answers.labels[i] for i in sorted(number)], device=device),
            total_sequences=len(answers),
            kl=self._kl,
            ref_log_probs=ref_log_probs,
        )


def mismatched_kl(lm: LanguageModel, sequences: list[Sequence], head: HeadOptions, max_tokens: int) -> float:
    """KTO's estimate of the KL divergence: the mean of Σ(ℓ − ℓ_ref) over every prompt with the answer before its own.

    The same rotation of the batch as TRL's, so that the number is the same.
    """
    others = sequences[-1:] + sequences[:-1]
    mismatched = [
        Sequence(s.prompt_ids, other.completion_ids, other.mask) for s, other in zip(sequences, others, strict=True)
    ]
    own, _ = sequence_log_probs(lm, pack(mismatched, max_tokens), len(mismatched), head)
    ref = reference_log_probs(lm, mismatched, head, max_tokens)
    return sum(float((a.double() - b.double()).sum()) for a, b in zip(own, ref, strict=True)) / len(sequences)


def _log(meter: Meter, value) -> None:
    meter.add("loss", value.loss, how="sum")
    for name, values in value.metrics.items():
        meter.add(name, values)
