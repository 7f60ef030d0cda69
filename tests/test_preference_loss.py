"""Preference losses against autograd of plainly written formulas and against TRL's own trainers."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.rl import preference_loss as module
from tandem.rl.errors import UserError
from tandem.rl.policy_loss import LossValue
from tandem.rl.preference_loss import (
    PREFERENCE_LOSSES,
    LabelledTokens,
    PairLoss,
    Pairwise,
    PreferenceOptions,
    PreferenceTokens,
    check_options,
    needs_pairs,
    needs_reference,
    preference_loss,
)

PAIRWISE = [name for name in PREFERENCE_LOSSES if needs_pairs(name)]
# Not TRL's defaults, so that a number that is not used shows.
OPTIONS = PreferenceOptions(beta=0.7, simpo_gamma=0.9, desirable_weight=1.3, undesirable_weight=0.6)


def options_for(loss_type: str) -> PreferenceOptions:
    return replace(OPTIONS, label_smoothing=0.15 if PREFERENCE_LOSSES[loss_type].smoothing else 0.0)


def draw(num_pairs: int, seed: int = 0, *, ref: bool = True) -> PreferenceTokens:
    """Pairs of random lengths in random token order within the flat layout."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2 * num_pairs,), generator=generator)
    sequence = torch.arange(2 * num_pairs).repeat_interleave(lengths)
    log_probs, ref_log_probs = (
        -torch.rand(len(sequence), generator=generator, dtype=torch.float64) * 2 - 0.01 for _ in range(2)
    )
    return PreferenceTokens(
        log_probs,
        sequence,
        num_pairs,
        num_pairs,
        int(lengths[0::2].sum()),
        ref_log_probs=ref_log_probs if ref else None,
    )


def labelled(tokens: PreferenceTokens, kl: float = 0.4, seed: int = 0) -> LabelledTokens:
    """The same answers with random labels, one of each kind at least."""
    size = 2 * tokens.num_pairs
    desirable = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    desirable[0], desirable[-1] = True, False
    return LabelledTokens(tokens.log_probs, tokens.sequence, desirable, size, kl, ref_log_probs=tokens.ref_log_probs)


def tokens_for(loss_type: str, num_pairs: int, seed: int = 0) -> PreferenceTokens | LabelledTokens:
    tokens = draw(num_pairs, seed)
    return tokens if needs_pairs(loss_type) else labelled(tokens, seed=seed)


# The oracle: one answer at a time, textbook formulas with plain log and exp, nothing from the module


def plain_pair(loss_type: str, c, r, ref_c, ref_r, o: PreferenceOptions):
    """Loss of one pair from its answers' token log-probs."""
    eps, beta = o.label_smoothing, o.beta

    def sigma(x):
        return 1 / (1 + torch.exp(-x))

    def dpo(u):
        return -(1 - eps) * torch.log(sigma(u)) - eps * torch.log(1 - sigma(u))

    ratio = (c.sum() - ref_c.sum()) - (r.sum() - ref_r.sum())
    mean_ratio = (c - ref_c).mean() - (r - ref_r).mean()
    if loss_type == "sigmoid":
        return dpo(beta * ratio)
    if loss_type == "sigmoid_norm":
        return dpo(beta * mean_ratio)
    if loss_type == "robust":
        clean, flipped = -torch.log(sigma(beta * ratio)), -torch.log(sigma(-beta * ratio))
        return ((1 - eps) * clean - eps * flipped) / (1 - 2 * eps)
    if loss_type == "ipo":
        return (mean_ratio - 0.5 / beta) ** 2
    if loss_type == "hinge":
        return torch.relu(1 - beta * ratio)
    if loss_type == "simpo":
        return dpo(beta * c.mean() - beta * r.mean() - o.simpo_gamma)
    if loss_type == "cpo":
        return dpo(beta * (c.sum() - r.sum()))
    assert loss_type == "orpo"
    p_c, p_r = c.mean().exp(), r.mean().exp()
    return -beta * torch.log(sigma(torch.log((p_c / (1 - p_c)) / (p_r / (1 - p_r)))))


def plain_loss(loss_type: str, tokens, log_probs, o: PreferenceOptions):
    answers = [log_probs[tokens.sequence == i] for i in range(tokens.num_sequences)]
    refs = [tokens.ref_log_probs[tokens.sequence == i] for i in range(tokens.num_sequences)]
    if loss_type == "kto":
        total = torch.zeros((), dtype=torch.float64)
        for answer, ref, good in zip(answers, refs, tokens.desirable.tolist(), strict=True):
            advantage = o.beta * (answer.sum() - ref.sum() - tokens.kl)
            if good:
                total = total + o.desirable_weight * (1 - 1 / (1 + torch.exp(-advantage)))
            else:
                total = total + o.undesirable_weight * (1 - 1 / (1 + torch.exp(advantage)))
        return total / len(answers)
    chosen, rejected = answers[0::2], answers[1::2]
    pairs = [
        plain_pair(loss_type, c, r, ref_c, ref_r, o)
        for c, r, ref_c, ref_r in zip(chosen, rejected, refs[0::2], refs[1::2], strict=True)
    ]
    default = 1.0 if loss_type in ("orpo", "cpo") else 0.0
    weight = default if o.sft_weight is None else o.sft_weight
    return torch.stack(pairs).mean() - weight * torch.cat(chosen).mean()


def gap_to_autograd(loss_type: str, tokens, o: PreferenceOptions) -> float:
    """Largest difference of loss or gradient to the oracle."""
    value = preference_loss(loss_type, tokens, o)
    log_probs = tokens.log_probs.clone().requires_grad_()
    loss = plain_loss(loss_type, tokens, log_probs, o)
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert grad.abs().max() > 1e-3, "nothing to compare"
    return max((value.loss - loss).abs().item(), (value.grad - grad).abs().max().item())


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
@pytest.mark.parametrize("num_pairs", [1, 7])
def test_loss_and_gradient_are_those_of_the_plain_formula(loss_type, num_pairs):
    for seed in range(5):
        assert gap_to_autograd(loss_type, tokens_for(loss_type, num_pairs, seed), options_for(loss_type)) < 1e-12


@pytest.mark.parametrize("loss_type", PAIRWISE)
def test_any_pairwise_loss_takes_a_likelihood_term(loss_type):
    tokens = draw(4)
    for weight in (0.0, 0.35):
        assert gap_to_autograd(loss_type, tokens, replace(options_for(loss_type), sft_weight=weight)) < 1e-12
    assert ("nll_loss" in preference_loss(loss_type, tokens, options_for(loss_type)).metrics) == (
        loss_type in ("orpo", "cpo")
    )


def negated(result: PairLoss) -> PairLoss:
    return replace(result, by_rejected=-result.by_rejected)


@pytest.mark.parametrize("loss_type", PAIRWISE)
def test_a_wrong_sign_is_noticed(loss_type, monkeypatch):
    right = PREFERENCE_LOSSES[loss_type]
    assert isinstance(right, Pairwise)
    wrong = replace(right, function=lambda *args: negated(right.function(*args)))
    monkeypatch.setitem(module.PREFERENCE_LOSSES, loss_type, wrong)
    assert gap_to_autograd(loss_type, draw(7), options_for(loss_type)) > 1e-3


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_descent_prefers_the_chosen_answer(loss_type):
    tokens = tokens_for(loss_type, 3)
    grad = preference_loss(loss_type, tokens, replace(options_for(loss_type), sft_weight=0.0)).grad
    good = tokens.desirable[tokens.sequence] if isinstance(tokens, LabelledTokens) else tokens.sequence % 2 == 0
    if loss_type == "hinge":  # flat for pairs that are far enough apart
        assert (grad[good] <= 0).all()
        assert (grad[~good] >= 0).all()
        assert grad[good].min() < 0 < grad[~good].max()
    elif loss_type != "ipo":  # IPO pulls margins that are too large back
        assert (grad[good] < 0).all()
        assert (grad[~good] > 0).all()


# Packs


def part(tokens: Any, start: int, stop: int):
    """The answers from `start` to `stop`, numbered from 0, with the whole batch's totals."""
    inside = (tokens.sequence >= start) & (tokens.sequence < stop)
    common: dict[str, Any] = {
        "log_probs": tokens.log_probs[inside],
        "sequence": tokens.sequence[inside] - start,
        "ref_log_probs": tokens.ref_log_probs[inside],
    }
    if isinstance(tokens, LabelledTokens):
        return replace(tokens, desirable=tokens.desirable[start:stop], **common)
    return replace(tokens, num_pairs=(stop - start) // 2, **common)


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_pairs_in_several_calls_sum_to_the_whole(loss_type):
    tokens, o = tokens_for(loss_type, 6), options_for(loss_type)
    whole = preference_loss(loss_type, tokens, o)
    parts = [preference_loss(loss_type, part(tokens, *cut), o) for cut in ((0, 2), (2, 8), (8, 12))]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, atol=1e-13, rtol=0)
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), whole.grad, atol=1e-15, rtol=0)
    for name, values in whole.metrics.items():
        torch.testing.assert_close(torch.cat([p.metrics[name] for p in parts]), values, atol=1e-13, rtol=0)


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_the_order_of_tokens_and_float32_input_do_not_matter(loss_type):
    tokens, o = tokens_for(loss_type, 5), options_for(loss_type)
    assert tokens.ref_log_probs is not None
    order = torch.randperm(len(tokens.log_probs), generator=torch.Generator().manual_seed(3))
    moved = replace(
        tokens,
        log_probs=tokens.log_probs[order].float(),
        sequence=tokens.sequence[order],
        ref_log_probs=tokens.ref_log_probs[order].float(),
    )
    value, other = preference_loss(loss_type, tokens, o), preference_loss(loss_type, moved, o)
    assert other.grad.dtype == torch.float64
    torch.testing.assert_close(other.grad, value.grad[order], atol=1e-6, rtol=0)


# Extremes


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
@pytest.mark.parametrize("chosen", [0.0, -1e-12, -1e-3, -50.0, -1e4])
@pytest.mark.parametrize("rejected", [0.0, -1e-12, -1e-3, -50.0, -1e4])
def test_extreme_margins_stay_finite(loss_type, chosen, rejected):
    sequence = torch.tensor([0, 0, 0, 1, 1])
    log_probs = torch.tensor([chosen] * 3 + [rejected] * 2, dtype=torch.float64)
    tokens = PreferenceTokens(log_probs, sequence, 1, 1, 3, ref_log_probs=torch.full((5,), -1.0))
    value = preference_loss(
        loss_type,
        tokens
        if needs_pairs(loss_type)
        else LabelledTokens(log_probs, sequence, torch.tensor([True, False]), 2, ref_log_probs=tokens.ref_log_probs),
        options_for(loss_type),
    )
    assert value.loss.isfinite()
    assert value.grad.isfinite().all()
    assert all(values.isfinite().all() for values in value.metrics.values())


def test_a_lost_pair_has_its_asymptotic_loss_and_full_slope():
    """−log σ(−x) = x for large x: not infinity, and not a vanished gradient."""
    log_probs = torch.tensor([-5000.0, -1.0], dtype=torch.float64)
    tokens = PreferenceTokens(log_probs, torch.tensor([0, 1]), 1, 1, 1, ref_log_probs=torch.tensor([-1.0, -1.0]))
    value = preference_loss("sigmoid", tokens, PreferenceOptions(beta=0.5))
    assert value.loss.item() == pytest.approx(0.5 * 4999, rel=1e-12)
    torch.testing.assert_close(value.grad, torch.tensor([-0.5, 0.5], dtype=torch.float64))


def test_orpo_lowers_a_rejected_answer_of_which_the_model_is_certain():
    tokens = PreferenceTokens(torch.tensor([-2.0, 0.0]), torch.tensor([0, 1]), 1, 1, 1)
    grad = preference_loss("orpo", tokens, replace(OPTIONS, sft_weight=0.0)).grad
    assert grad[1] > 1
    assert grad[0] < 0


def test_orpo_keeps_its_digits_next_to_certainty():
    """log(1 − e^x) = log(−x) + x/2 + O(x²), where 1 − e^x itself has lost ten digits."""
    tokens = PreferenceTokens(
        torch.tensor([-1.0, -2e-6], dtype=torch.float64), torch.tensor([0, 1]), num_pairs=1, total_pairs=1
    )
    value = preference_loss("orpo", tokens, PreferenceOptions(beta=1.0, sft_weight=0.0))
    expected = (-1.0 - math.log(1 - math.exp(-1.0))) - (-2e-6 - math.log(2e-6) + 1e-6)
    assert value.metrics["log_odds_chosen"].item() == pytest.approx(expected, abs=2e-12)


def test_an_answer_without_tokens_counts_as_zero():
    """A pair whose rejected answer was cut away still counts."""
    tokens = PreferenceTokens(
        torch.tensor([-1.0, -2.0]), torch.tensor([0, 0]), 1, 1, 2, ref_log_probs=torch.tensor([-1.5, -1.5])
    )
    value = preference_loss("sigmoid_norm", tokens, PreferenceOptions(beta=1.0))
    assert value.loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(value.grad, torch.tensor([-0.25, -0.25], dtype=torch.float64))


# Special cases with known answers


def test_at_the_reference_dpo_is_log_two_and_ipo_its_target():
    tokens = draw(5)
    tokens = replace(tokens, ref_log_probs=tokens.log_probs)
    for loss_type, expected in (("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", (0.5 / 0.2) ** 2)):
        value = preference_loss(loss_type, tokens, PreferenceOptions(beta=0.2))
        assert value.loss.item() == pytest.approx(expected, rel=1e-12)
        assert (value.metrics["rewards/margins"] == 0).all()


def test_robust_dpo_is_unbiased_under_swapped_labels():
    """Averaged over the label noise that it assumes, its gradient is that of DPO on the true labels."""
    tokens, flip = draw(1), 0.2
    swapped = replace(tokens, sequence=1 - tokens.sequence)
    o = PreferenceOptions(beta=0.5, label_smoothing=flip)
    true = preference_loss("sigmoid", tokens, replace(o, label_smoothing=0.0))
    kept, other = (preference_loss("robust", t, o) for t in (tokens, swapped))
    torch.testing.assert_close((1 - flip) * kept.grad + flip * other.grad, true.grad, atol=1e-14, rtol=0)


def test_kto_cuts_a_negative_baseline():
    tokens = labelled(draw(4), kl=-3.0)
    value = preference_loss("kto", tokens, OPTIONS)
    assert (value.metrics["kl"] == 0).all()
    assert value.loss == preference_loss("kto", replace(tokens, kl=0.0), OPTIONS).loss


# What is refused, and what each needs


def test_which_losses_need_a_reference():
    assert {name for name in PREFERENCE_LOSSES if not needs_reference(name)} == {"simpo", "orpo", "cpo"}
    for loss_type in ("simpo", "orpo", "cpo"):
        assert preference_loss(loss_type, draw(2, ref=False), options_for(loss_type)).loss.isfinite()
    with pytest.raises(AssertionError, match="reference"):
        preference_loss("sigmoid", draw(2, ref=False), OPTIONS)
    with pytest.raises(AssertionError, match="labelled"):
        preference_loss("kto", draw(2), OPTIONS)
    with pytest.raises(AssertionError, match="pairs"):
        preference_loss("sigmoid", labelled(draw(2)), OPTIONS)


@pytest.mark.parametrize(
    ("loss_type", "changes", "message"),
    [
        ("dpo", {}, "'dpo'"),
        ("sigmoid", {"beta": 0.0}, "beta is 0.0"),
        ("sigmoid", {"beta": math.inf}, "beta is inf"),
        ("robust", {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ("sigmoid", {"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ("hinge", {"label_smoothing": 0.1}, "hinge has none"),
        ("kto", {"label_smoothing": 0.1}, "kto has none"),
        ("kto", {"sft_weight": 0.5}, "sft_weight is 0.5"),
        ("kto", {"undesirable_weight": -1.0}, "undesirable_weight is -1.0"),
        ("simpo", {"simpo_gamma": math.nan}, "simpo_gamma is nan"),
    ],
)
def test_options_without_sense_are_refused(loss_type, changes, message):
    with pytest.raises(UserError, match=message):
        check_options(loss_type, replace(OPTIONS, **changes))


# TRL: the trainers' own loss methods, on a stand-in for the trainer


def means(value: LossValue) -> dict[str, float]:
    return {name: values.mean().item() for name, values in value.metrics.items()}


def stand_in(**attributes) -> Any:
    """What TRL's loss methods read from their trainer."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=OPTIONS.beta,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def as_rows(tokens, values, order: list[int]) -> torch.Tensor:
    """`[N]` -> `[S, L]`, padded with zeros on the right; row k is the answer `order[k]`."""
    rows = [values[tokens.sequence == i] for i in order]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def trl_inputs(tokens, order: list[int], log_probs: torch.Tensor):
    """A batch in TRL's layout, one prompt token before every answer, and a model that returns these log-probs."""
    mask = as_rows(tokens, torch.ones(len(log_probs)), order)
    full = torch.cat([torch.zeros(len(mask), 1), mask], dim=1).long()
    rows = as_rows(tokens, log_probs, order)
    outputs = SimpleNamespace(
        log_probs=rows,
        entropy=torch.zeros_like(rows),
        mean_logits=torch.zeros_like(rows),
        is_top1=torch.zeros_like(rows).bool(),
    )
    batch = {"input_ids": torch.zeros_like(full), "attention_mask": torch.ones_like(full), "completion_mask": full}
    return batch, (lambda **_: outputs)


def assert_same(value: LossValue, loss: torch.Tensor, log_probs: torch.Tensor, *, atol: float) -> None:
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert value.loss.item() == pytest.approx(loss.item(), abs=atol)
    torch.testing.assert_close(value.grad, grad, atol=atol, rtol=0)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge"])
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_against_trl_dpo(loss_type, sft_weight):
    from trl import DPOTrainer

    tokens = draw(6, seed=5)
    # TRL's loss "sigmoid" has no label smoothing (its CPO's has)
    smoothing = 0.15 if loss_type == "robust" else 0.0
    o = replace(OPTIONS, label_smoothing=smoothing, sft_weight=sft_weight)
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    log_probs = tokens.log_probs.clone().requires_grad_()
    batch, model = trl_inputs(tokens, order, log_probs)
    ref = as_rows(tokens, tokens.ref_log_probs, order).sum(1)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref.chunk(2)
    trainer = stand_in(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type, "sft"],
        loss_weights=[1.0, sft_weight],
        label_smoothing=smoothing,
        use_weighting=False,
    )
    loss = DPOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    value = preference_loss(loss_type, tokens, o)
    assert_same(value, loss, log_probs, atol=1e-12)
    theirs, ours = trainer._metrics["train"], means(value)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert ours[f"rewards/{name}"] == pytest.approx(theirs[f"rewards/{name}"][0], abs=1e-6)
    for name in ("chosen", "rejected"):
        assert ours[f"logps/{name}"] == pytest.approx(theirs[f"logps/{name}"][0], abs=1e-6)


def reference_free(trainer_class, tokens: PreferenceTokens, *, average: bool, **attributes):
    """Loss, metrics and the leaf of TRL's CPO or ORPO trainer, whose forward pass gives our log-probs."""
    log_probs = tokens.log_probs.clone().requires_grad_()
    answers = [log_probs[tokens.sequence == i] for i in range(tokens.num_sequences)]
    scores = torch.stack([a.mean() if average else a.sum() for a in answers])
    nll = -log_probs[tokens.sequence % 2 == 0].mean()
    trainer = stand_in(**attributes)
    logits = torch.zeros(1)
    trainer.concatenated_forward = lambda model, batch: (scores[0::2], scores[1::2], logits, logits, nll)
    for name in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, name):
            setattr(trainer, name, getattr(trainer_class, name).__get__(trainer))
    loss, metrics = trainer_class.get_batch_loss_metrics(trainer, None, {})
    return loss, metrics, log_probs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss_type", "theirs", "sft_weight"), [("cpo", "sigmoid", None), ("simpo", "simpo", None), ("simpo", "simpo", 1.0)]
)
def test_against_trl_cpo(loss_type, theirs, sft_weight):
    from trl.experimental.cpo import CPOTrainer

    tokens, o = draw(6, seed=6), replace(options_for(loss_type), sft_weight=sft_weight)
    loss, metrics, log_probs = reference_free(
        CPOTrainer,
        tokens,
        average=loss_type == "simpo",
        loss_type=theirs,
        alpha=0.0,
        cpo_alpha=1.0 if loss_type == "cpo" else (sft_weight or 0.0),
        simpo_gamma=o.simpo_gamma,
        label_smoothing=o.label_smoothing,
    )
    value = preference_loss(loss_type, tokens, o)
    assert_same(value, loss, log_probs, atol=1e-12)
    ours = means(value)
    for name in ours:
        assert ours[name] == pytest.approx(metrics[name], abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_against_trl_orpo():
    """TRL takes the odds in float32; its likelihood also covers the prompt, which this stand-in's does not."""
    from trl.experimental.orpo import ORPOTrainer

    tokens = draw(6, seed=7)
    loss, metrics, log_probs = reference_free(ORPOTrainer, tokens, average=True)
    value = preference_loss("orpo", tokens, OPTIONS)
    assert_same(value, loss, log_probs, atol=2e-6)
    ours = means(value)
    assert {"nll_loss", "log_odds_ratio", "log_odds_chosen"} <= set(ours)
    for name in ours:
        assert ours[name] == pytest.approx(metrics[name], abs=2e-6)


@pytest.mark.parametrize("kl", [0.4, -1.0])
def test_against_trl_kto(kl):
    from trl import KTOTrainer

    tokens = labelled(draw(6, seed=8), kl=kl, seed=8)
    log_probs = tokens.log_probs.clone().requires_grad_()
    order = list(range(12))
    batch, model = trl_inputs(tokens, order, log_probs)
    batch["label"] = tokens.desirable
    batch["ref_logps"] = as_rows(tokens, tokens.ref_log_probs, order).sum(1)
    mismatched = torch.linspace(-2, 2, 12, dtype=torch.float64)
    batch["ref_KL_logps"] = mismatched - kl
    trainer = stand_in(
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=OPTIONS.desirable_weight,
        undesirable_weight=OPTIONS.undesirable_weight,
        _compute_kl_logps=lambda model, batch: mismatched,
    )
    loss = KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    value = preference_loss("kto", tokens, OPTIONS)
    assert_same(value, loss, log_probs, atol=1e-12)
    ours = means(value)
    for name in ours:
        assert ours[name] == pytest.approx(trainer._metrics["train"][name][0], abs=1e-6)
