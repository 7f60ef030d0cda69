"""A whole preference step on a small model: loss, metrics and gradients against padded rows and autograd, whatever the
packs; reference log-probs and their cache; pairs from rollouts; label smoothing and z-loss of the supervised step."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid, relu, sigmoid

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl import preference_step as module
from tandem.rl.experience import best_and_worst
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, _register_packed_attention
from tandem.rl.packing import pack
from tandem.rl.preference_loss import PREFERENCE_LOSSES, PreferenceOptions, needs_pairs, needs_reference
from tandem.rl.preference_step import (
    Answers,
    mismatched_kl,
    preference_backward,
    preference_metrics,
    reference_log_probs,
    with_margins,
)
from tandem.rl.reference_cache import cached_log_probs
from tandem.rl.samples import Completion, Prompt, Scored, Sequence
from tandem.rl.step import supervised_backward

VOCABULARY = 48
TEMPERATURE = 0.8
HEAD = HeadOptions(temperature=TEMPERATURE, chunk_size=7)
# Not the defaults, so that a number that is not used shows.
OPTIONS = PreferenceOptions(beta=0.6, simpo_gamma=0.9, desirable_weight=1.3, undesirable_weight=0.7)
PAIRWISE = [name for name in PREFERENCE_LOSSES if needs_pairs(name)]


def options_for(loss_type: str) -> PreferenceOptions:
    return replace(OPTIONS, label_smoothing=0.15 if PREFERENCE_LOSSES[loss_type].smoothing else 0.0)


class Models(NamedTuple):
    """The policy, and the same transformer as it was before an adapter came near it."""

    lm: LanguageModel
    base: torch.nn.Module


@pytest.fixture(scope="module")
def models() -> Models:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    config._attn_implementation = "sdpa"
    base = LlamaForCausalLM(config).double().eval()
    for parent in list(base.modules()):
        for name, child in parent.named_children():
            # transformers' RMSNorm works in float32, whose rounding would hide errors up to 1e-7.
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, torch.nn.RMSNorm(32, eps=config.rms_norm_eps, dtype=torch.float64))
    base.requires_grad_(False)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    model.eval()
    _register_packed_attention()
    return Models(LanguageModel(model, None, torch.device("cpu"), torch.float64, HeadOptions(), 128), base)


def draw(seed: int, num_pairs: int = 6) -> list[Sequence]:
    """Pairs of answers to one prompt; tool output in some is not scored, and pair 1 shares no prompt."""
    rng = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]

    sequences = []
    for pair in range(num_pairs):
        prompt = ids(9)
        for _ in range(2):
            answer = ids(9)
            mask = [rng.random() < 0.8 for _ in answer]
            mask[rng.randrange(len(mask))] = True
            own, family = (ids(4), -1) if pair == 1 else (prompt, pair)
            sequences.append(Sequence(own, answer, mask, family=family, unit=pair))
    return sequences


def answers_for(models: Models, loss_type: str, seed: int = 0) -> Answers:
    sequences, labels = draw(seed), None
    if not needs_pairs(loss_type):
        sequences = [replace(s, family=-1, unit=-1) for s in sequences]
        labels = [True, False, False, True, True, True, False, True, False, True, True, False]
    ref = reference_log_probs(models.lm, sequences, HEAD, 30) if needs_reference(loss_type) else None
    return Answers(sequences, labels, ref)


# --- the oracle: padded rows, autograd, one answer at a time ---------------------------------------------------------


def padded_log_probs(model: torch.nn.Module, sequences: list[Sequence]) -> list[torch.Tensor]:
    """transformers' own forward over right-padded rows, one per sequence: log-probs of the scored tokens."""
    rows = [s.prompt_ids + s.completion_ids for s in sequences]
    longest = max(map(len, rows))
    # Padding stands behind every real token, so the causal mask alone hides it.
    ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
    log_p = (model(input_ids=ids, use_cache=False).logits / TEMPERATURE).log_softmax(-1)
    return [
        torch.stack([log_p[i, len(s.prompt_ids) + j - 1, s.completion_ids[j]] for j, on in enumerate(s.mask) if on])
        for i, s in enumerate(sequences)
    ]


def plain_pair(loss_type: str, c: Any, r: Any, ref_c: Any, ref_r: Any, o: PreferenceOptions) -> torch.Tensor:
    def smoothed(u: torch.Tensor) -> torch.Tensor:
        return -(1 - o.label_smoothing) * logsigmoid(u) - o.label_smoothing * logsigmoid(-u)

    if loss_type == "simpo":
        return smoothed(o.beta * (c.mean() - r.mean()) - o.simpo_gamma)
    if loss_type == "cpo":
        return smoothed(o.beta * (c.sum() - r.sum()))
    if loss_type == "orpo":
        p_c, p_r = c.mean().exp(), r.mean().exp()
        return -o.beta * logsigmoid((p_c / (1 - p_c)).log() - (p_r / (1 - p_r)).log())
    total, mean = (c - ref_c).sum() - (r - ref_r).sum(), (c - ref_c).mean() - (r - ref_r).mean()
    if loss_type == "sigmoid_norm":
        return smoothed(o.beta * mean)
    if loss_type == "ipo":
        return (mean - 1 / (2 * o.beta)) ** 2
    if loss_type == "hinge":
        return relu(1 - o.beta * total)
    if loss_type == "robust":
        eps, u = o.label_smoothing, o.beta * total
        return (-(1 - eps) * logsigmoid(u) + eps * logsigmoid(-u)) / (1 - 2 * eps)
    assert loss_type == "sigmoid"
    return smoothed(o.beta * total)


def plain_kl(models: Models, sequences: list[Sequence]) -> float:
    """Every prompt with the answer that stands before its own in the batch."""
    mixed = [
        Sequence(s.prompt_ids, sequences[i - 1].completion_ids, sequences[i - 1].mask) for i, s in enumerate(sequences)
    ]
    with torch.no_grad():
        own, ref = padded_log_probs(models.lm.model, mixed), padded_log_probs(models.base, mixed)
    return float(sum((a - b).sum() for a, b in zip(own, ref, strict=True)) / len(mixed))


def plain_result(models: Models, answers: Answers, loss_type: str, o: PreferenceOptions) -> tuple[dict, dict]:
    """Metrics and LoRA gradients."""
    own = padded_log_probs(models.lm.model, answers.sequences)
    with torch.no_grad():
        ref = padded_log_probs(models.base, answers.sequences)
    ratios = torch.stack([(a - b).sum() for a, b in zip(own, ref, strict=True)])
    sums, means = torch.stack([a.sum() for a in own]), torch.stack([a.mean() for a in own])
    metrics: dict[str, Any] = {}
    good: Any
    bad: Any
    if answers.labels is None:
        quads = zip(own[::2], own[1::2], ref[::2], ref[1::2], strict=True)
        loss = torch.stack([plain_pair(loss_type, *quad, o) for quad in quads]).mean()
        weight = o.sft_weight if o.sft_weight is not None else float(loss_type in ("orpo", "cpo"))
        if weight:
            metrics["nll_loss"] = -torch.cat(own[::2]).mean()
            loss = loss + weight * metrics["nll_loss"]
        scores = means if loss_type in ("simpo", "orpo") else sums
        rewards = o.beta * (ratios if needs_reference(loss_type) else scores)
        good, bad = slice(0, None, 2), slice(1, None, 2)
        metrics["rewards/accuracies"] = (rewards[good] > rewards[bad]).double().mean()
        if loss_type == "orpo":
            odds = means - (1 - means.exp()).log()
            metrics["log_odds_chosen"] = (odds[good] - odds[bad]).mean()
            metrics["log_odds_ratio"] = logsigmoid(odds[good] - odds[bad]).mean()
    else:
        labels = torch.tensor(answers.labels)
        metrics["kl"] = max(plain_kl(models, answers.sequences), 0.0)
        margin = o.beta * (ratios - metrics["kl"])
        losses = torch.where(
            labels, o.desirable_weight * (1 - sigmoid(margin)), o.undesirable_weight * (1 - sigmoid(-margin))
        )
        loss, scores, rewards, good, bad = losses.mean(), sums, o.beta * ratios, labels, ~labels
    loss.backward()
    metrics |= {
        "loss": loss,
        "rewards/chosen": rewards[good].mean(),
        "rewards/rejected": rewards[bad].mean(),
        "rewards/margins": rewards[good].mean() - rewards[bad].mean(),
        "logps/chosen": scores[good].mean(),
        "logps/rejected": scores[bad].mean(),
    }
    return {
        name: float(torch.as_tensor(value, dtype=torch.float64).detach()) for name, value in metrics.items()
    }, gradients(models.lm)


def gradients(lm: LanguageModel) -> dict[str, torch.Tensor]:
    """The adapter's gradients, taken away from the model."""
    taken = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    return taken


def our_result(
    models: Models, answers: Answers, loss_type: str, o: PreferenceOptions, max_tokens: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    meter = Meter()
    preference_backward(models.lm, answers, loss_type, o, HEAD, meter, max_tokens=max_tokens)
    return with_margins(meter.result()), gradients(models.lm)


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == expected.keys()
    assert len(ours) == 2 * 7 * 2, "every linear layer's A and B has a gradient"
    assert max(g.abs().max().item() for g in expected.values()) > 1e-3
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=tolerance, atol=tolerance, msg=f"{name} differs")


# --- loss, metrics, gradients ----------------------------------------------------------------------------------------


# KTO's baseline is cut at 0 in the first batch and counts in the second.
@pytest.mark.parametrize(("loss_type", "seed"), [*((name, 0) for name in PREFERENCE_LOSSES), ("kto", 1)])
def test_loss_metrics_and_gradients_equal_padded_rows_in_any_packs(models: Models, loss_type: str, seed: int) -> None:
    answers, o = answers_for(models, loss_type, seed), options_for(loss_type)
    metrics, expected = plain_result(models, answers, loss_type, o)
    if loss_type == "kto":
        assert (metrics["kl"] > 0.1) == (seed == 1)
    cuts = {n: len(pack(answers.sequences, n)) for n in (1, 40, 1000)}
    assert cuts[1] == len(answers) > cuts[40] > cuts[1000] == 1
    for max_tokens in cuts:
        ours, grads = our_result(models, answers, loss_type, o, max_tokens)
        assert ours.pop("entropy") > 0
        assert ours == pytest.approx(metrics, abs=1e-10)
        assert_same(grads, expected)


def test_labels_stay_with_their_answers_where_prompts_are_shared(models: Models) -> None:
    """Answers to one prompt stand together in a pack, and thus not in the order of the batch."""
    answers = answers_for(models, "kto", 1)
    prompts = [[1, 2, 3], [4, 5]]
    sequences = [replace(s, prompt_ids=prompts[i % 2], family=i % 2) for i, s in enumerate(answers.sequences)]
    (one,) = pack(sequences, 1000)
    assert one.sequences != sorted(one.sequences)
    answers = Answers(sequences, answers.labels, reference_log_probs(models.lm, sequences, HEAD, 40))
    metrics, expected = plain_result(models, answers, "kto", OPTIONS)
    for max_tokens in (1, 40, 1000):
        ours, grads = our_result(models, answers, "kto", OPTIONS, max_tokens)
        assert ours["loss"] == pytest.approx(metrics["loss"], abs=1e-10)
        assert_same(grads, expected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_chosen_answers_likelihood_is_averaged_over_the_batch(models: Models, loss_type: str) -> None:
    answers, o = answers_for(models, loss_type, 1), replace(options_for(loss_type), sft_weight=0.4)
    metrics, expected = plain_result(models, answers, loss_type, o)
    for max_tokens in (1, 1000):
        ours, grads = our_result(models, answers, loss_type, o, max_tokens)
        assert ours.items() >= {"nll_loss": pytest.approx(metrics["nll_loss"], abs=1e-10)}.items()
        assert ours["loss"] == pytest.approx(metrics["loss"], abs=1e-10)
        assert_same(grads, expected)


@pytest.mark.parametrize("loss_type", PAIRWISE)
def test_the_order_of_pairs_does_not_matter(models: Models, loss_type: str) -> None:
    answers, o = answers_for(models, loss_type, 2), options_for(loss_type)
    metrics, expected = our_result(models, answers, loss_type, o, 40)
    permuted, ours = our_result(models, answers.subset([3, 0, 5, 1, 4, 2]), loss_type, o, 40)
    assert permuted == pytest.approx(metrics, abs=1e-10)
    assert_same(ours, expected)


def test_swapped_answers_are_noticed(models: Models) -> None:
    """What the comparisons above would see if a pack handed over its answers in a wrong order."""
    answers, o = answers_for(models, "sigmoid"), options_for("sigmoid")
    _, expected = plain_result(models, answers, "sigmoid", o)
    order = [1, 0, *range(2, 12)]
    assert answers.ref_log_probs is not None
    swapped = Answers([answers.sequences[i] for i in order], None, [answers.ref_log_probs[i] for i in order])
    with pytest.raises(AssertionError):
        assert_same(our_result(models, swapped, "sigmoid", o, 40)[1], expected)


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_parts_of_a_batch_add_up_to_it(models: Models, loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts know what belongs to the whole batch: the number of examples, of chosen tokens, and KTO's baseline."""
    answers, o = answers_for(models, loss_type, 1), options_for(loss_type)
    metrics, expected = our_result(models, answers, loss_type, o, 40)
    whole = module._Batch(models.lm, answers, loss_type, HEAD, 40)
    half = len(answers) // 2
    parts = [answers.subset(list(range(half))), answers.subset(list(range(half, len(answers))))]

    class WithTotals(module._Batch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._chosen_tokens, self._kl = whole._chosen_tokens, whole._kl

        def tokens(self, one: Any, log_probs: torch.Tensor) -> Any:
            tokens = super().tokens(one, log_probs)
            total: dict[str, Any] = {"total_pairs" if needs_pairs(loss_type) else "total_sequences": len(answers)}
            return replace(tokens, **total)

    monkeypatch.setattr(module, "_Batch", WithTotals)
    results = [our_result(models, part, loss_type, o, 40) for part in parts]
    assert sum(r["loss"] for r, _ in results) == pytest.approx(metrics["loss"], abs=1e-10)
    assert_same({name: results[0][1][name] + results[1][1][name] for name in expected}, expected)


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_evaluation_says_what_the_step_logs(models: Models, loss_type: str) -> None:
    answers, o = answers_for(models, loss_type, 4), options_for(loss_type)
    logged, _ = our_result(models, answers, loss_type, o, 40)
    found = preference_metrics(models.lm, answers, loss_type, o, HEAD, max_tokens=25)
    del logged["entropy"]
    assert found == pytest.approx(logged, abs=1e-10)
    assert gradients(models.lm) == {}


def test_a_model_is_left_in_evaluation_mode_and_with_its_adapter(models: Models) -> None:
    answers = answers_for(models, "kto")
    before = padded_log_probs(models.lm.model, answers.sequences)
    our_result(models, answers, "kto", OPTIONS, 40)
    assert not models.lm.model.training
    after = padded_log_probs(models.lm.model, answers.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- the reference policy --------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_before_it_had_an_adapter(models: Models) -> None:
    sequences = draw(5)
    with torch.no_grad():
        expected = padded_log_probs(models.base, sequences)
        policy = padded_log_probs(models.lm.model, sequences)
    assert (torch.cat(policy) - torch.cat(expected)).abs().max() > 0.1
    for max_tokens in (1, 40, 1000):
        for a, b in zip(reference_log_probs(models.lm, sequences, HEAD, max_tokens), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
def test_the_mismatched_kl_is_that_of_other_prompts_answers(models: Models, max_tokens: int) -> None:
    seen = [plain_kl(models, draw(seed)) for seed in range(4)]
    assert len({round(kl, 3) for kl in seen}) == 4
    for seed, expected in enumerate(seen):
        assert mismatched_kl(models.lm, draw(seed), HEAD, max_tokens) == pytest.approx(expected, abs=1e-10)


class Counting:
    """Reference log-probs, and how often they were computed."""

    def __init__(self, models: Models, sequences: list[Sequence]) -> None:
        self.models, self.sequences, self.calls = models, sequences, 0

    def __call__(self) -> list[torch.Tensor]:
        self.calls += 1
        return reference_log_probs(self.models.lm, self.sequences, HEAD, 40)

    def cached(self) -> list[torch.Tensor]:
        return cached_log_probs(self.models.lm, self.sequences, self)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.rglob("*.tmp")), "a half-written file is left"


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_second_run_reads_what_the_first_computed(models: Models, cache: Path) -> None:
    compute = Counting(models, draw(6))
    expected = reference_log_probs(models.lm, compute.sequences, HEAD, 40)
    assert_equal(compute.cached(), expected)
    assert_equal(compute.cached(), expected)
    assert compute.calls == 1
    assert len(files(cache)) == 1
    # The adapter is none of the reference's business.
    parameter = next(p for p in models.lm.model.parameters() if p.requires_grad)
    before = parameter.data
    parameter.data = before + 1.0
    try:
        assert_equal(compute.cached(), expected)
    finally:
        parameter.data = before
    assert compute.calls == 1


LAST = Sequence([1, 2], [3, 4, 5], [True, True, False])
CHANGES = {
    "token": replace(LAST, completion_ids=[3, 6, 5]),
    "prompt": replace(LAST, prompt_ids=[1, 3]),
    # As many scored tokens, so that the file of the one would fit the other.
    "mask": replace(LAST, mask=[False, True, True]),
    "border": Sequence([1, 2, 3], [4, 5], [True, True]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_computed_anew(models: Models, cache: Path, change: str) -> None:
    compute = Counting(models, [*draw(6), LAST])
    compute.cached()
    other = Counting(models, [*draw(6), CHANGES[change]])
    assert_equal(other.cached(), other())
    assert other.calls == 2
    assert len(files(cache)) == 2


def test_the_order_of_the_data_matters(models: Models, cache: Path) -> None:
    compute = Counting(models, draw(6))
    compute.cached()
    other = Counting(models, compute.sequences[::-1])
    assert_equal(other.cached(), other())


def test_other_weights_are_computed_anew(models: Models, cache: Path) -> None:
    compute = Counting(models, draw(6))
    before = compute.cached()
    weight = models.lm.causal_lm.model.layers[1].self_attn.o_proj.base_layer.weight
    original = weight.data
    weight.data = original * 1.1
    try:
        after = compute.cached()
    finally:
        weight.data = original
    assert compute.calls == 2
    assert (torch.cat(before) - torch.cat(after)).abs().max() > 1e-3
    assert len(files(cache)) == 2


def test_other_rotations_are_computed_anew(models: Models, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights under another config are another model."""
    compute = Counting(models, draw(6))
    compute.cached()
    monkeypatch.setattr(models.lm.causal_lm.config, "rope_parameters", {"rope_type": "default", "rope_theta": 77.0})
    compute.cached()
    assert compute.calls == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "other tensor", "too few", "too many"])
def test_a_damaged_file_is_computed_anew(models: Models, cache: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    compute = Counting(models, draw(6))
    expected = compute.cached()
    (path,) = files(cache)
    whole, flat = path.read_bytes(), load_file(path)["log_probs"]
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) - 5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"\xff" * len(whole))
    elif damage == "other tensor":
        save_file({"entropy": flat}, path)
    else:
        save_file({"log_probs": flat[:-1] if damage == "too few" else torch.cat([flat, flat[:1]])}, path)
    assert_equal(compute.cached(), expected)
    assert compute.calls == 2
    # The file is whole again.
    assert_equal(compute.cached(), expected)
    assert compute.calls == 2


# --- pairs from rollouts ---------------------------------------------------------------------------------------------


def scored(rewards: list[list[float]]) -> list[Scored]:
    """Groups of completions, each with tokens of its own."""
    return [
        Scored(
            Prompt(group, [group + 1], "p"), Completion([10 * group + i, 1], [-1.0, -1.0], False), group, "", {}, reward
        )
        for group, values in enumerate(rewards)
        for i, reward in enumerate(values)
    ]


def test_the_best_and_the_worst_of_a_group_make_a_pair() -> None:
    answers = best_and_worst(scored([[0.1, 0.9, -0.5, 0.2], [3.0, 2.0, 2.5, 4.0]]), 4)
    assert answers.labels is None
    assert len(answers) == 2
    assert [s.completion_ids[0] for s in answers.sequences] == [1, 2, 13, 11]
    assert [s.prompt_ids for s in answers.sequences] == [[1], [1], [2], [2]]
    for chosen, rejected in zip(answers.sequences[::2], answers.sequences[1::2], strict=True):
        assert chosen.mask == rejected.mask == [True, True]
        assert chosen.unit == rejected.unit >= 0
        assert chosen.family == rejected.family >= 0
    assert answers.sequences[0].unit != answers.sequences[2].unit


def test_the_first_of_equals_is_taken_and_groups_without_a_difference_are_not() -> None:
    answers = best_and_worst(scored([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]), 3)
    assert [s.completion_ids[0] for s in answers.sequences] == [11, 10, 22, 20]
    nothing = best_and_worst(scored([[1.0, 1.0], [0.0, 0.0]]), 2)
    assert nothing.sequences == []
    assert len(nothing) == 0


def test_pairs_of_rollouts_go_through_a_step(models: Models) -> None:
    answers = best_and_worst(scored([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 0.3, 0.1]]), 3)
    answers.ref_log_probs = reference_log_probs(models.lm, answers.sequences, HEAD, 40)
    metrics, expected = plain_result(models, answers, "sigmoid", OPTIONS)
    ours, grads = our_result(models, answers, "sigmoid", OPTIONS, 5)
    assert ours["loss"] == pytest.approx(metrics["loss"], abs=1e-10)
    assert_same(grads, expected)


# --- the supervised step's regularisers ------------------------------------------------------------------------------


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.05), (0.1, 0.02)])
def test_label_smoothing_and_z_loss_equal_those_of_torch(models: Models, label_smoothing: float, z_loss: float) -> None:
    sequences = [replace(s, unit=-1) for s in draw(7)]
    rows = [s.prompt_ids + s.completion_ids for s in sequences]
    ids = torch.tensor([r + [0] * (max(map(len, rows)) - len(r)) for r in rows])
    logits = models.lm.model(input_ids=ids, use_cache=False).logits / TEMPERATURE
    labels = torch.full_like(ids, -100)
    for i, s in enumerate(sequences):
        for j, on in enumerate(s.mask):
            if on:
                labels[i, len(s.prompt_ids) + j] = s.completion_ids[j]
    logits, labels = logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
    lse = logits[labels != -100].exp().sum(-1).log()
    loss = cross_entropy(logits, labels, label_smoothing=label_smoothing) + z_loss * (lse**2).mean()
    loss.backward()
    expected = gradients(models.lm)
    for max_tokens in (1, 30, 1000):
        meter = Meter()
        supervised_backward(
            models.lm,
            pack(sequences, max_tokens),
            sequences,
            HEAD,
            meter,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        assert meter.result()["loss"] == pytest.approx(loss.item(), abs=1e-10)
        assert_same(gradients(models.lm), expected)
