"""Preference objectives as pure functions of log-probs.

ℓ = log π(token); the score of an answer y is S = Σ (ℓ − ℓ_ref), or Σ ℓ for objectives without a reference, or that sum
divided by the answer's number of tokens.

    L = (1/P)·Σ f(S_chosen, S_rejected) + (w/T)·Σ −ℓ      P pairs, T tokens of chosen answers

`f` is the objective, the second sum the negative log-likelihood of the chosen answers (ORPO, CPO). Each function
returns values and analytic derivatives; the model's backward pass starts from ∂L/∂ℓ of every token. Everything is
computed in float64. P and T count the whole optimiser batch, so the loss does not depend on packs, as long as a pair
lies in one pack. To add an objective: one function and one line in `PREFERENCE_LOSSES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn.functional import logsigmoid

from tandem.rl.errors import UserError
from tandem.rl.policy_loss import LossValue

# ORPO's odds p/(1 − p) have a pole at p = 1. Mean log-probs nearer to 0 than float32 is exact count as this.
_LARGEST_MEAN_LOG_PROB = -1e-6


@dataclass(frozen=True)
class PreferenceOptions:
    """Numbers of the objectives, by TRL's names where TRL has one.

    Attributes:
        beta: factor of the scores; IPO's τ, ORPO's λ.
        label_smoothing: ε, the share of labels that are thought to be swapped; see `Pairwise.smoothing`.
        simpo_gamma: SimPO's target margin γ of the rewards β·S.
        sft_weight: w, weight of the chosen answers' negative log-likelihood (TRL's `cpo_alpha`, DPO's loss "sft"), for
            any objective on pairs; None: what the objective's paper has, 1 for orpo and cpo, 0 for the others.
        desirable_weight, undesirable_weight: KTO's λ_D and λ_U.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    sft_weight: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def gamma_beta_ratio(self) -> float:
        """SimPO's γ/β, the number that its paper tunes."""
        return self.simpo_gamma / self.beta


@dataclass(frozen=True)
class AnswerTokens(ABC):
    """The scored tokens of some answers, flat.

    Attributes:
        log_probs: `[N]` under the current policy.
        sequence: `[N]` number of the answer that each token belongs to, 0 … S − 1.
        ref_log_probs: `[N]` under the reference policy, or None for objectives without one.
    """

    log_probs: torch.Tensor
    sequence: torch.Tensor
    ref_log_probs: torch.Tensor | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def num_sequences(self) -> int:
        """S."""

    @cached_property
    def lengths(self) -> torch.Tensor:
        """`[S]` scored tokens of each answer, at least 1."""
        return self.sums(torch.ones_like(self.log_probs, dtype=torch.float64)).clamp(min=1)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """`[N]` -> `[S]`."""
        zeros = torch.zeros(self.num_sequences, dtype=torch.float64, device=values.device)
        return zeros.index_add_(0, self.sequence, values.double())

    def scores(self, *, reference: bool, average: bool) -> torch.Tensor:
        """`[S]` sum or mean of the log-probs, less the reference's."""
        values = self.log_probs.double()
        if reference:
            assert self.ref_log_probs is not None, "this objective needs reference log-probs"
            values = values - self.ref_log_probs.double()
        return self.sums(values) / self.lengths if average else self.sums(values)

    def spread(self, slopes: torch.Tensor, *, average: bool) -> torch.Tensor:
        """∂L/∂S `[S]` -> ∂L/∂ℓ `[N]`."""
        return (slopes / self.lengths if average else slopes)[self.sequence]


@dataclass(frozen=True)
class PreferenceTokens(AnswerTokens):
    """Answers in pairs: number 2i is the chosen answer of pair i, 2i + 1 the rejected one.

    Attributes:
        num_pairs: pairs in these tokens.
        total_pairs: pairs of the whole optimiser batch.
        total_chosen_tokens: scored tokens of the whole optimiser batch's chosen answers; only the negative
            log-likelihood needs it.
    """

    num_pairs: int
    total_pairs: int
    total_chosen_tokens: int | None = None

    @property
    def num_sequences(self) -> int:
        return 2 * self.num_pairs

    @property
    def of_chosen(self) -> torch.Tensor:
        """`[N]` which tokens belong to chosen answers."""
        return self.sequence % 2 == 0


@dataclass(frozen=True)
class LabelledTokens(AnswerTokens):
    """Answers that each have a label of their own.

    Attributes:
        desirable: `[S]` bool.
        total_sequences: answers of the whole optimiser batch.
        kl: KTO's z before it is cut at 0: the mean over the optimiser batch of Σ (ℓ − ℓ_ref) of mismatched pairs, that
            is of prompts with the answers of other prompts. A constant, nothing is learned through it.
    """

    desirable: torch.Tensor
    total_sequences: int
    kl: float = 0.0

    @property
    def num_sequences(self) -> int:
        return len(self.desirable)


@dataclass
class PairLoss:
    """An objective's values for some pairs, all `[P]`.

    Attributes:
        value: f. by_chosen: ∂f/∂S_chosen. by_rejected: ∂f/∂S_rejected.
    """

    value: torch.Tensor
    by_chosen: torch.Tensor
    by_rejected: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


PairFunction = Callable[[torch.Tensor, torch.Tensor, PreferenceOptions], PairLoss]


# Objectives: (score of the chosen answer, of the rejected answer, options) -> PairLoss, all `[P]` float64


def logistic(chosen: torch.Tensor, rejected: torch.Tensor, options: PreferenceOptions) -> PairLoss:
    """DPO (arXiv 2305.18290 eq. 7): f = −log σ(u), u = β·(S_c − S_r).

    With label smoothing it is conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023):
    f = −(1 − ε)·log σ(u) − ε·log σ(−u).
    """
    return _smoothed(options.beta * (chosen - rejected), options)


def robust(chosen: torch.Tensor, rejected: torch.Tensor, options: PreferenceOptions) -> PairLoss:
    """Robust DPO (arXiv 2403.00409): unbiased where a share ε of the labels is swapped.

    f = (−(1 − ε)·log σ(u) + ε·log σ(−u)) / (1 − 2ε).
    """
    margin, flip = options.beta * (chosen - rejected), options.label_smoothing
    value = (-(1 - flip) * logsigmoid(margin) + flip * logsigmoid(-margin)) / (1 - 2 * flip)
    slope = (-(1 - flip) * torch.sigmoid(-margin) - flip * torch.sigmoid(margin)) / (1 - 2 * flip)
    return _of_difference(value, options.beta * slope)


def ipo(chosen: torch.Tensor, rejected: torch.Tensor, options: PreferenceOptions) -> PairLoss:
    """IPO (arXiv 2310.12036 eq. 17): f = (S_c − S_r − 1/(2β))², on scores per token."""
    error = chosen - rejected - 1 / (2 * options.beta)
    return _of_difference(error**2, 2 * error)


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, options: PreferenceOptions) -> PairLoss:
    """SLiC's hinge (arXiv 2305.10425) on the log-ratios (RSO, arXiv 2309.06657): f = max(0, 1 − u)."""
    short = 1 - options.beta * (chosen - rejected)
    return _of_difference(short.clamp(min=0), -options.beta * (short > 0).double())


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, options: PreferenceOptions) -> PairLoss:
    """SimPO (arXiv 2405.14734 eq. 6): f = −log σ(β·(S_c − S_r) − γ) on mean log-probs, with TRL's label smoothing."""
    return _smoothed(options.beta * (chosen - rejected - options.gamma_beta_ratio), options)


def odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor, options: PreferenceOptions) -> PairLoss:
    """ORPO (arXiv 2403.07691 eq. 6–7): f = −β·log σ(z), z = log odds(p_c) − log odds(p_r), p = e^S on mean log-probs.

    Where p counts as 1 the slope is that at the bound, so that a rejected answer the model is certain of still falls.
    """
    chosen, rejected = (s.clamp(max=_LARGEST_MEAN_LOG_PROB) for s in (chosen, rejected))
    log_odds = (chosen - _log_complement(chosen)) - (rejected - _log_complement(rejected))
    slope = -options.beta * torch.sigmoid(-log_odds)
    ratio = logsigmoid(log_odds)
    # d(log odds)/dS = 1/(1 − e^S)
    by_chosen, by_rejected = slope / -torch.expm1(chosen), slope / torch.expm1(rejected)
    metrics = {"log_odds_ratio": ratio, "log_odds_chosen": log_odds}
    return PairLoss(-options.beta * ratio, by_chosen, by_rejected, metrics)


def _smoothed(margin: torch.Tensor, options: PreferenceOptions) -> PairLoss:
    flip = options.label_smoothing
    value = -(1 - flip) * logsigmoid(margin) - flip * logsigmoid(-margin)
    return _of_difference(value, options.beta * (flip * torch.sigmoid(margin) - (1 - flip) * torch.sigmoid(-margin)))


def _of_difference(value: torch.Tensor, slope: torch.Tensor) -> PairLoss:
    """An objective that depends on S_c − S_r alone, with its derivative by it."""
    return PairLoss(value, slope, -slope)


def _log_complement(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 − p) of log p < 0, without the cancellation in 1 − e^x near p = 1."""
    return torch.log(-torch.expm1(log_p))


@dataclass(frozen=True)
class Pairwise:
    """An objective on pairs.

    Attributes:
        reference: scores are relative to the reference policy. average: scores are per token.
        sft_weight: w where the options leave it open. smoothing: label smoothing means something here.
    """

    function: PairFunction
    reference: bool = True
    average: bool = False
    sft_weight: float = 0.0
    smoothing: bool = False

    def __call__(self, tokens: PreferenceTokens, options: PreferenceOptions) -> LossValue:
        """The loss of these tokens' pairs, and per-pair metrics by TRL's names."""
        assert isinstance(tokens, PreferenceTokens)
        scores = tokens.scores(reference=self.reference, average=self.average)
        pairs = self.function(scores[0::2], scores[1::2], options)
        slopes = torch.stack((pairs.by_chosen, pairs.by_rejected), dim=1).reshape(-1) / tokens.total_pairs
        value = LossValue(
            pairs.value.sum() / tokens.total_pairs,
            tokens.spread(slopes, average=self.average),
            {**self._metrics(tokens, options), **pairs.metrics},
        )
        weight = self.sft_weight if options.sft_weight is None else options.sft_weight
        if weight:
            _add_likelihood(value, tokens, weight)
        return value

    def _metrics(self, tokens: PreferenceTokens, options: PreferenceOptions) -> dict[str, torch.Tensor]:
        """Rewards are β times the score. As in TRL both are sums, or means if a loss without reference uses means."""
        average = self.average and not self.reference
        log_probs = tokens.scores(reference=False, average=average)
        rewards = options.beta * tokens.scores(reference=self.reference, average=average)
        chosen, rejected = rewards[0::2], rewards[1::2]
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).double(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": log_probs[0::2],
            "logps/rejected": log_probs[1::2],
        }


def _add_likelihood(value: LossValue, tokens: PreferenceTokens, weight: float) -> None:
    """w times the mean of −ℓ over the optimiser batch's chosen tokens."""
    assert tokens.total_chosen_tokens, "the chosen answers' likelihood needs the batch's number of chosen tokens"
    nll = -tokens.log_probs.double()[tokens.of_chosen]
    share = weight / tokens.total_chosen_tokens
    value.loss = value.loss + share * nll.sum()
    value.grad = value.grad - share * tokens.of_chosen.double()
    value.metrics["nll_loss"] = nll


@dataclass(frozen=True)
class KahnemanTversky:
    """KTO (arXiv 2402.01306 eq. 8) on answers with labels: L = (1/S)·Σ λ·(1 − σ(±β·(Σ(ℓ − ℓ_ref) − z)))."""

    reference: bool = True
    smoothing: bool = False

    def __call__(self, tokens: LabelledTokens, options: PreferenceOptions) -> LossValue:
        """The loss of these answers. Metrics have a value per desirable (chosen) or undesirable (rejected) answer;
        `rewards/margins`, the difference of the two means, belongs to the whole batch and is not among them."""
        assert isinstance(tokens, LabelledTokens)
        ratios = tokens.scores(reference=True, average=False)
        desirable, baseline = tokens.desirable.bool(), max(tokens.kl, 0.0)
        sign = desirable.double() * 2 - 1
        weight = options.desirable_weight * desirable.double() + options.undesirable_weight * (~desirable).double()
        margin = sign * options.beta * (ratios - baseline)
        miss = torch.sigmoid(-margin)
        slopes = -weight * sign * options.beta * miss * torch.sigmoid(margin) / tokens.total_sequences
        log_probs, rewards = tokens.scores(reference=False, average=False), options.beta * ratios
        metrics = {
            "rewards/chosen": rewards[desirable],
            "rewards/rejected": rewards[~desirable],
            "logps/chosen": log_probs[desirable],
            "logps/rejected": log_probs[~desirable],
            "kl": torch.full_like(ratios, baseline),
        }
        return LossValue((weight * miss).sum() / tokens.total_sequences, tokens.spread(slopes, average=False), metrics)


# loss_type -> objective, by TRL's names (those of its DPO, CPO, ORPO and KTO trainers)
PREFERENCE_LOSSES: dict[str, Pairwise | KahnemanTversky] = {
    "sigmoid": Pairwise(logistic, smoothing=True),
    "sigmoid_norm": Pairwise(logistic, average=True, smoothing=True),
    "robust": Pairwise(robust, smoothing=True),
    "ipo": Pairwise(ipo, average=True),
    "hinge": Pairwise(hinge),
    "simpo": Pairwise(simpo, reference=False, average=True, smoothing=True),
    "orpo": Pairwise(odds_ratio, reference=False, average=True, sft_weight=1.0),
    "cpo": Pairwise(logistic, reference=False, sft_weight=1.0, smoothing=True),  # arXiv 2401.08417
    "kto": KahnemanTversky(),
}


def needs_reference(loss_type: str) -> bool:
    """Whether the objective compares with a reference policy."""
    return objective(loss_type).reference


def needs_pairs(loss_type: str) -> bool:
    """Whether the objective takes `PreferenceTokens`; otherwise it takes `LabelledTokens`."""
    return isinstance(objective(loss_type), Pairwise)


def objective(loss_type: str) -> Pairwise | KahnemanTversky:
    """The objective of a name.

    Raises:
        UserError: there is none.
    """
    found = PREFERENCE_LOSSES.get(loss_type)
    if found is None:
        raise UserError(
            f"loss_type is {loss_type!r}, which is no preference loss", fix=f"use one of {', '.join(PREFERENCE_LOSSES)}"
        )
    return found


def check_options(loss_type: str, options: PreferenceOptions) -> None:
    """Refuse numbers with which an objective makes no sense or that it would not use.

    Raises:
        UserError: an unknown loss, a number out of range, or one that this loss ignores.
    """
    loss = objective(loss_type)
    if not (math.isfinite(options.beta) and options.beta > 0):
        raise UserError(f"beta is {options.beta}", reason="it scales the scores", fix="use a number above 0, as 0.1")
    if not 0 <= options.label_smoothing < 0.5:
        raise UserError(
            f"label_smoothing is {options.label_smoothing}",
            reason="it is the share of swapped labels; from one half on the labels say nothing or the opposite",
            fix="use a number from 0 to below 0.5",
        )
    if options.label_smoothing and not loss.smoothing:
        able = ", ".join(name for name, other in PREFERENCE_LOSSES.items() if other.smoothing)
        raise UserError(
            f"label_smoothing is {options.label_smoothing}, but the loss {loss_type} has none",
            fix=f"set it to 0 or use one of {able}",
        )
    for name in ("simpo_gamma", "sft_weight", "desirable_weight", "undesirable_weight"):
        number = getattr(options, name)
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise UserError(f"{name} is {number}", fix="use a number of at least 0")
    if options.sft_weight and not isinstance(loss, Pairwise):
        raise UserError(
            f"sft_weight is {options.sft_weight}, but {loss_type} has no chosen answers to imitate",
            fix="set it to 0 or use a loss on pairs",
        )


def preference_loss(loss_type: str, tokens: PreferenceTokens | LabelledTokens, options: PreferenceOptions) -> LossValue:
    """The named objective: loss, ∂L/∂ℓ `[N]` float64, and metrics to be averaged over the calls of a step.

    Raises UserError where `check_options` does.
    """
    check_options(loss_type, options)
    loss = objective(loss_type)
    if isinstance(loss, Pairwise):
        assert isinstance(tokens, PreferenceTokens), f"{loss_type} needs pairs"
        return loss(tokens, options)
    assert isinstance(tokens, LabelledTokens), f"{loss_type} needs labelled answers"
    return loss(tokens, options)
