"""One optimiser step: packs through the model, the objective's gradient per token, the backward pass, the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import overload

import torch

from tandem.kernels.linear_logprob import HeadOptions, TokenScores, linear_logprob
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.rl import loss_scale
from tandem.rl.config import AlgorithmConfig
from tandem.rl.metrics import How, Meter
from tandem.rl.model import LanguageModel
from tandem.rl.packing import Pack, pack
from tandem.rl.policy_loss import LossValue, PolicyTokens, policy_loss, token_weights
from tandem.rl.rollout_correction import correction_weights
from tandem.rl.samples import Sequence

Objective = Callable[[PolicyTokens, AlgorithmConfig], LossValue]

# Entropies so near to each other, in nats, are equal up to float32's rounding: the first tokens of a group have one
# distribution, and which pack they lie in must not choose among them.
_SAME_ENTROPY = 1e-5


@dataclass
class PolicyBatch:
    """What one optimiser step learns from. All lists go by sequence.

    Attributes:
        sequences: prompt and sampled tokens; masked-out sequences have no scored token but still count in averages.
        advantages: one per sequence.
        token_advantages: `[scored tokens]` each, where the tokens of a sequence differ in it; None: they do not.
        rollout_log_probs: the engine's log-probs of the scored tokens.
        old_log_probs: the trainer's log-probs at the time of the rollout, `[scored tokens]` each; None: this is the
            first step after the rollout, so they are those that the step itself computes.
        ref_log_probs: the reference policy's; None: no KL term.
        entropies: of the scored tokens at rollout time, for the top-entropy mask; None where it is off.
    """

    sequences: list[Sequence]
    advantages: list[float]
    rollout_log_probs: list[list[float]]
    old_log_probs: list[torch.Tensor] | None = None
    ref_log_probs: list[torch.Tensor] | None = None
    entropies: list[torch.Tensor] | None = None
    token_advantages: list[torch.Tensor] | None = None

    def subset(self, indices: list[int]) -> PolicyBatch:
        def pick(values):
            return None if values is None else [values[i] for i in indices]

        return PolicyBatch(
            pick(self.sequences),
            pick(self.advantages),
            pick(self.rollout_log_probs),
            pick(self.old_log_probs),
            pick(self.ref_log_probs),
            pick(self.entropies),
            pick(self.token_advantages),
        )


def layout_of(pack: Pack) -> PackLayout:
    """The families of a pack as its attention wants them."""
    families: list[Family] = []
    for segment in pack.segments:
        if segment.parent < 0:
            families.append(Family((segment.start, segment.end)))
        else:
            families[-1] = Family(families[-1].root, (*families[-1].children, (segment.start, segment.end)))
    return PackLayout(families)


def pack_log_probs(lm: LanguageModel, pack: Pack, head: HeadOptions) -> TokenScores:
    """Log-probs and entropies `[N]` of a pack's scored tokens. Must run inside `lm.packed()`."""
    return _scores(lm, pack, scored_hidden(lm, pack), head)


def scored_hidden(lm: LanguageModel, pack: Pack) -> torch.Tensor:
    """Last hidden states `[N, d]` that a pack's scored tokens are predicted from."""
    hidden = lm.packed_hidden(
        torch.tensor(pack.input_ids, device=lm.device),
        torch.tensor(pack.position_ids, device=lm.device),
        layout_of(pack),
    )
    return hidden[torch.tensor(pack.rows, device=lm.device)]


def _scores(lm: LanguageModel, pack: Pack, hidden: torch.Tensor, head: HeadOptions) -> TokenScores:
    targets = torch.tensor(pack.targets, device=lm.device)
    return linear_logprob(hidden, lm.head_weight, targets, bias=lm.head_bias, options=head, adapter=lm.head_adapter)


@torch.no_grad()
def sequence_log_probs(
    lm: LanguageModel, packs: list[Pack], num_sequences: int, head: HeadOptions
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probs and entropies of every sequence's scored tokens, without gradients."""
    return log_probs_of_heads(lm, packs, num_sequences, [head])[0]


@torch.no_grad()
def log_probs_of_heads(
    lm: LanguageModel, packs: list[Pack], num_sequences: int, heads: list[HeadOptions]
) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The same for each of several heads, on one pass through the layers."""
    empty = torch.empty(0, device=lm.device)
    found = [([empty] * num_sequences, [empty] * num_sequences) for _ in heads]
    with lm.packed():
        for pack in packs:
            hidden = scored_hidden(lm, pack)
            for (log_probs, entropies), head in zip(found, heads, strict=True):
                scores = _scores(lm, pack, hidden, head)
                parts = [values.split(pack.counts) for values in (scores.log_probs, scores.entropy)]
                for index, log_prob, entropy in zip(pack.sequences, *parts, strict=True):
                    log_probs[index], entropies[index] = log_prob, entropy
    return found


def add_gradients(lm: LanguageModel, roots: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """Add to the adapter's `.grad` what follows from the loss's gradients by `roots`, a pack's values by token."""
    loss_scale.backward(roots, (p for p in lm.model.parameters() if p.requires_grad), lm.dtype)


def policy_backward(
    lm: LanguageModel,
    packs: list[Pack],
    batch: PolicyBatch,
    algorithm: AlgorithmConfig,
    head: HeadOptions,
    meter: Meter,
    *,
    max_completion_length: int,
    objective: Objective = policy_loss,
) -> None:
    """Add the gradient of the batch's objective to the adapter's `.grad`; log what happened in `meter`."""
    counts = [s.num_scored for s in batch.sequences]
    weights = token_weights(algorithm.loss_type, counts, max_completion_length=max_completion_length)
    chosen = None if batch.entropies is None else top_entropy_masks(batch.entropies, algorithm.top_entropy_quantile)
    entropy_tokens = sum(counts) if chosen is None else int(sum(c.sum() for c in chosen))
    with training_mode(lm):
        for pack in packs:
            # All that is known goes to the device before the forward pass: a copy behind it would wait for its end.
            known = _policy_tokens(pack, batch, weights, lm.device)
            rollout = _joined([torch.tensor(x, dtype=torch.float64) for x in batch.rollout_log_probs], pack, lm.device)
            chosen_here = _joined(chosen, pack, lm.device)
            log_probs, entropy, *_ = pack_log_probs(lm, pack, head)
            tokens = known(log_probs.detach())
            correction, metrics = correction_weights(
                tokens.old_log_probs, rollout, tokens.sequence, tokens.num_sequences, algorithm
            )
            tokens = replace(
                tokens,
                correction=correction,
                chosen=chosen_here,
                entropy=entropy.detach(),
                entropy_tokens=entropy_tokens,
            )
            value = objective(tokens, algorithm)
            add_gradients(lm, [(log_probs, value.grad), (entropy, value.entropy_grad)])
            _log_correction(metrics, meter)
            meter.add("loss", value.loss, how="sum")
            meter.add("entropy", entropy.detach())
            for name, values in value.metrics.items():
                meter.add(name, values)


def supervised_backward(
    lm: LanguageModel,
    packs: list[Pack],
    sequences: list[Sequence],
    head: HeadOptions,
    meter: Meter,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Cross-entropy over all scored tokens of the batch, by the log-prob kernel.

    L = 1/T·Σ (1 − ε)·(−ℓ) + ε·(lse − mean logit) + c·lse²: label smoothing ε spreads a part of the target evenly over
    the vocabulary (arXiv 1512.00567 §7); the z-loss c holds the normaliser near 1 (PaLM, arXiv 2204.02311 §5).
    """
    total = sum(s.num_scored for s in sequences)
    with training_mode(lm):
        for pack in packs:
            log_probs, entropy, lse, mean_logit = pack_log_probs(lm, pack, head)
            loss = -(1 - label_smoothing) * log_probs
            if label_smoothing:
                loss = loss + label_smoothing * (lse - mean_logit)
            if z_loss:
                loss = loss + z_loss * lse**2
            add_gradients(lm, [(loss, torch.full_like(loss, 1 / total))])
            meter.add("loss", loss.detach())
            meter.add("entropy", entropy.detach())


def _policy_tokens(
    pack: Pack, batch: PolicyBatch, weights: list[float], device: torch.device
) -> Callable[[torch.Tensor], PolicyTokens]:
    """A pack's tokens, but for the log-probs that the step is about to compute."""
    counts = torch.tensor(pack.counts, device=device)

    def per_token(values: list[float]) -> torch.Tensor:
        chosen = torch.tensor([values[i] for i in pack.sequences], dtype=torch.float64, device=device)
        return chosen.repeat_interleave(counts, output_size=sum(pack.counts))

    old, ref = _joined(batch.old_log_probs, pack, device), _joined(batch.ref_log_probs, pack, device)
    token_weight = per_token(weights)
    by_token = _joined(batch.token_advantages, pack, device)
    advantages = per_token(batch.advantages) if by_token is None else by_token
    numbers = torch.arange(len(pack.counts), device=device)
    sequence = numbers.repeat_interleave(counts, output_size=sum(pack.counts))

    def complete(log_probs: torch.Tensor) -> PolicyTokens:
        return PolicyTokens(
            log_probs=log_probs,
            old_log_probs=log_probs if old is None else old,
            advantages=advantages,
            weights=token_weight,
            sequence=sequence,
            num_sequences=len(pack.counts),
            ref_log_probs=ref,
        )

    return complete


@overload
def _joined(values: list[torch.Tensor], pack: Pack, device: torch.device) -> torch.Tensor: ...


@overload
def _joined(values: list[torch.Tensor] | None, pack: Pack, device: torch.device) -> torch.Tensor | None: ...


def _joined(values: list[torch.Tensor] | None, pack: Pack, device: torch.device) -> torch.Tensor | None:
    """What is known by sequence, in the order of the pack's scored tokens."""
    return None if values is None else torch.cat([values[i] for i in pack.sequences]).to(device)


def _log_correction(metrics: dict[str, torch.Tensor], meter: Meter) -> None:
    """How far engine and trainer are apart, by TRL's names."""
    for name, values in metrics.items():
        how: How = "min" if name.endswith("/min") else "max" if name.endswith("/max") else "mean"
        meter.add(name, values, how=how)


def top_entropy_masks(entropies: list[torch.Tensor], share: float) -> list[torch.Tensor]:
    """Which tokens belong to the given share of highest entropy in the whole batch (arXiv 2506.01939), by sequence."""
    if not sum(map(len, entropies)):  # all masked out, or no sequence at all
        return [torch.zeros(0, dtype=torch.bool, device=e.device) for e in entropies]
    everything = torch.cat(entropies).double()
    # torch.quantile refuses more than 2^24 values; interpolation between order statistics is the same definition.
    ordered = everything.sort().values
    place = (1 - share) * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    threshold = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
    return [e.double() >= threshold - _SAME_ENTROPY for e in entropies]


@contextmanager
def training_mode(lm: LanguageModel) -> Iterator[None]:
    """Train mode (dropout, checkpointing) and packed attention for the duration of a backward pass. Fused layers have
    neither dropout nor another way to compute, and are not told."""
    with lm.packed():
        if lm.fused is not None:
            yield
            return
        lm.model.train()
        try:
            yield
        finally:
            lm.model.eval()


def split_evenly(batch: PolicyBatch, parts: int, num_generations: int) -> Iterator[PolicyBatch]:
    """Cut a rollout batch into `parts` optimiser batches of whole groups, as equal as the number of groups allows."""
    groups = len(batch.sequences) // num_generations
    borders = [groups * i // parts * num_generations for i in range(parts + 1)]
    for start, end in pairwise(borders):
        yield batch.subset(list(range(start, end)))


def supervised_loss(lm: LanguageModel, examples: list[Sequence], max_tokens: int, head: HeadOptions) -> float:
    """Mean cross-entropy over all scored tokens, nats per token."""
    parts, _ = sequence_log_probs(lm, pack(examples, max_tokens), len(examples), head)
    return -float(torch.cat(parts).double().mean())
