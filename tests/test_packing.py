"""Packing: what lies in a pack, and that neither loss nor gradient of a whole model depends on how packs were cut."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kernels import attention_blocked, pack_layout
from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.config import AlgorithmConfig
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, _register_packed_attention
from tandem.rl.packing import Pack, pack
from tandem.rl.policy_loss import token_weights
from tandem.rl.samples import Sequence
from tandem.rl.step import PolicyBatch, policy_backward, sequence_log_probs, split_evenly, supervised_backward

VOCABULARY = 64


def random_sequences(
    seed: int, *, groups: int = 3, generations: int = 4, longest: int = 9, paired: bool = False
) -> list[Sequence]:
    """Groups of completions of one prompt; masks have holes, some are empty, one has its first token scored alone."""
    rng = random.Random(seed)
    sequences = []
    for group in range(groups):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]
        for member in range(generations):
            completion = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]
            mask = [rng.random() < 0.75 for _ in completion]
            if member == 0:
                mask = [True] + [False] * (len(mask) - 1)
            if group == 1 and member == 1:
                mask = [False] * len(mask)
            unit = group * generations + member // 2 if paired else -1
            sequences.append(Sequence(prompt, completion, mask, family=group, unit=unit))
    return sequences


# --- what lies in a pack --------------------------------------------------------------------------------------------


def visible(one: Pack, row: int) -> list[int]:
    """The tokens that stand before and at `row` for the segment that it lies in, its prompt first."""
    segment = next(s for s in one.segments if s.start <= row < s.end)
    before = (
        []
        if segment.parent < 0
        else one.input_ids[one.segments[segment.parent].start : one.segments[segment.parent].end]
    )
    return before + one.input_ids[segment.start : row + 1]


def check_packs(sequences: list[Sequence], packs: list[Pack]) -> None:
    """Every scored token is predicted exactly once, from exactly its own context, at the right position."""
    seen: Counter[int] = Counter()
    for one in packs:
        assert [s.start for s in one.segments] == [0, *(s.end for s in one.segments[:-1])]
        assert one.segments[-1].end == one.num_tokens == len(one.position_ids)
        assert len(one.rows) == len(one.targets) == sum(one.counts)
        at = 0
        for index, count in zip(one.sequences, one.counts, strict=True):
            seen[index] += 1
            sequence = sequences[index]
            scored = [j for j, s in enumerate(sequence.mask) if s]
            assert len(scored) == count
            for j in scored:
                context = sequence.prompt_ids + sequence.completion_ids[:j]
                assert visible(one, one.rows[at]) == context
                assert one.position_ids[one.rows[at]] == len(context) - 1
                assert one.targets[at] == sequence.completion_ids[j]
                at += 1
    assert seen == Counter(i for i, s in enumerate(sequences) if s.num_scored)


def least_cost(members: list[Sequence], share: bool) -> int:
    """Tokens that sequences need together, by the definition of sharing."""
    lengths = [max(j for j, s in enumerate(m.mask) if s) for m in members]
    prompts = {m.family: len(m.prompt_ids) for m in members} if share else {}
    return sum(lengths) + (sum(prompts.values()) if share else sum(len(m.prompt_ids) for m in members))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 4),
    generations=st.integers(1, 6),
    max_tokens=st.integers(1, 120),
    share=st.booleans(),
    paired=st.booleans(),
)
def test_packs_keep_their_promises(
    seed: int, groups: int, generations: int, max_tokens: int, share: bool, paired: bool
) -> None:
    sequences = random_sequences(seed, groups=groups, generations=generations, paired=paired)
    packs = pack(sequences, max_tokens, share_prefix=share)
    check_packs(sequences, packs)
    home = {index: number for number, one in enumerate(packs) for index in one.sequences}
    units: dict[int, set[int]] = {}
    for index, number in home.items():
        units.setdefault(sequences[index].unit if paired else -1 - index, set()).add(number)
    assert all(len(numbers) == 1 for numbers in units.values()), "a unit is split"
    for one in packs:
        members = [sequences[i] for i in one.sequences]
        single = len({m.unit for m in members}) == 1 if paired else len(members) == 1
        assert one.num_tokens <= max_tokens or single
        if one.num_tokens > max_tokens:
            assert one.num_tokens == least_cost(members, share), "an oversized unit wastes tokens"


def test_a_prompt_stands_once_in_a_pack_that_holds_its_group() -> None:
    sequences = random_sequences(1, groups=2)
    (one,) = pack(sequences, 1000)
    scored = [s for s in sequences if s.num_scored]
    assert one.num_tokens == least_cost(scored, share=True) < least_cost(scored, share=False)
    (apart,) = pack(sequences, 1000, share_prefix=False)
    assert apart.num_tokens == least_cost(scored, share=False)


def test_nothing_scored_gives_no_pack() -> None:
    assert pack([], 10) == []
    assert pack([Sequence([1, 2], [3], [False], family=0), Sequence([1], [], [])], 10) == []


def test_unequal_prompts_in_one_family_are_refused() -> None:
    with pytest.raises(AssertionError, match="equal prompts"):
        pack([Sequence([1], [2], [True], family=0), Sequence([3], [2], [True], family=0)], 10)


def test_packing_does_not_change_its_arguments() -> None:
    sequences = random_sequences(2)
    before = copy.deepcopy(sequences)
    assert pack(sequences, 20) == pack(sequences, 20)
    assert sequences == before


# --- a whole model --------------------------------------------------------------------------------------------------


def double_norms(model: torch.nn.Module) -> None:
    """transformers' RMSNorm works in float32, whose rounding would hide errors up to 1e-7."""
    child: Any
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm") and not type(child).__name__.startswith("Gemma"):
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight.data = child.weight.data.double()
                setattr(module, name, norm)


def tiny_model(kind: str = "llama", **options: Any) -> LanguageModel:
    """A random float64 transformer with a LoRA adapter that is not the identity."""
    import peft
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    prefix = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2"}[kind]
    config = getattr(transformers, f"{prefix}Config")(**sizes, **options)
    # Eager attention has a float32 softmax; the float64 path is SDPA, which knows no soft-cap.
    config._attn_implementation = "eager" if kind == "gemma2" else "sdpa"
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).double()
    double_norms(model)
    model.requires_grad_(False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
    model.eval()
    _register_packed_attention()
    head = HeadOptions(softcap=options.get("final_logit_softcapping"))
    return LanguageModel(model, None, torch.device("cpu"), torch.float64, head, 128)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_model()


ALGORITHMS: list[dict[str, Any]] = [
    {"loss_type": "dapo"},
    {"loss_type": "grpo", "beta": 0.2, "epsilon_high": 0.3},
    {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", "delta": 2.0},
]


def random_batch(sequences: list[Sequence], seed: int = 0) -> PolicyBatch:
    generator = torch.Generator().manual_seed(seed)

    def log_probs() -> list[torch.Tensor]:
        return [-4 * torch.rand(s.num_scored, dtype=torch.float64, generator=generator) - 1 for s in sequences]

    advantages = torch.randn(len(sequences), dtype=torch.float64, generator=generator).tolist()
    return PolicyBatch(sequences, advantages, [x.tolist() for x in log_probs()], log_probs(), log_probs())


def gradients(lm: LanguageModel) -> dict[str, torch.Tensor]:
    """The adapter's gradients, taken away from the model."""
    taken = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    return taken


def packed_result(
    lm: LanguageModel, batch: PolicyBatch, algorithm: AlgorithmConfig, max_tokens: int, share: bool = True
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    meter = Meter()
    packs = pack(batch.sequences, max_tokens, share_prefix=share)
    head = replace(lm.head, temperature=0.8, chunk_size=7)
    policy_backward(lm, packs, batch, algorithm, head, meter, max_completion_length=10)
    return meter.result(), gradients(lm)


def padded_log_probs(lm: LanguageModel, sequences: list[Sequence]) -> list[torch.Tensor]:
    """transformers' own forward over right-padded rows, one per sequence: log-probs of the scored tokens."""
    rows = [s.prompt_ids + s.completion_ids for s in sequences]
    longest = max(map(len, rows))
    ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
    # Padding stands behind every real token, so the causal mask alone hides it.
    log_p = (lm.model(input_ids=ids, use_cache=False).logits / 0.8).log_softmax(-1)
    return [
        torch.stack([log_p[i, len(s.prompt_ids) + j - 1, s.completion_ids[j]] for j in range(len(s.mask)) if s.mask[j]])
        if s.num_scored
        else log_p.new_empty(0)
        for i, s in enumerate(sequences)
    ]


def plain_result(lm: LanguageModel, batch: PolicyBatch, a: AlgorithmConfig) -> tuple[float, dict[str, torch.Tensor]]:
    assert batch.old_log_probs is not None
    assert batch.ref_log_probs is not None
    weights = token_weights(a.loss_type, [s.num_scored for s in batch.sequences], max_completion_length=10)
    high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    loss = torch.zeros((), dtype=torch.float64)
    for i, log_probs in enumerate(padded_log_probs(lm, batch.sequences)):
        if not len(log_probs):
            continue
        log_ratio = log_probs - batch.old_log_probs[i]
        if a.importance_sampling_level == "sequence":
            log_ratio = log_ratio.mean().expand(len(log_probs))
        ratio = log_ratio.exp()
        free = ratio if a.delta is None else ratio.clamp(max=a.delta)
        clipped = ratio.clamp(1 - a.epsilon, 1 + high)
        terms = -torch.min(free * batch.advantages[i], clipped * batch.advantages[i])
        d = batch.ref_log_probs[i] - log_probs
        rollout = torch.tensor(batch.rollout_log_probs[i], dtype=torch.float64)
        correction = (batch.old_log_probs[i] - rollout).exp().clamp(max=a.rollout_correction_max)
        kl = ratio * (d.exp() - d - 1)
        loss = loss + weights[i] * (correction * terms + a.beta * kl).sum()
    loss.backward()
    return loss.item(), gradients(lm)


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == expected.keys()
    assert len(ours) == 2 * 7 * 2, "every linear layer's A and B has a gradient"
    assert max(g.abs().max().item() for g in expected.values()) > 1e-3
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=tolerance, atol=tolerance, msg=f"{name} differs")


@pytest.mark.parametrize("options", ALGORITHMS, ids=str)
def test_loss_and_gradient_equal_padded_rows(llama: LanguageModel, options: dict[str, Any], monkeypatch) -> None:
    algorithm = AlgorithmConfig.model_validate(options)
    batch = random_batch(random_sequences(4))
    loss, expected = plain_result(llama, batch, algorithm)
    metrics: list[dict[str, float]] = []
    for max_tokens, share in [(1, True), (14, True), (30, True), (1000, True), (1, False), (30, False), (1000, False)]:
        result, ours = packed_result(llama, batch, algorithm, max_tokens, share)
        assert result["loss"] == pytest.approx(loss, abs=1e-10)
        assert_same(ours, expected)
        metrics.append(result)
    # Long families go block by block.
    monkeypatch.setattr(attention_blocked, "CPU_TILE", 100)
    assert_same(packed_result(llama, batch, algorithm, 1000)[1], expected)
    for result in metrics[1:]:
        assert result == pytest.approx(metrics[0], abs=1e-9)


def test_a_leak_between_siblings_would_be_seen(llama: LanguageModel, monkeypatch) -> None:
    batch, algorithm = random_batch(random_sequences(4)), AlgorithmConfig()
    _, expected = plain_result(llama, batch, algorithm)
    original = pack_layout.family_mask

    def leaky(family, window=None):
        return torch.ones_like(original(family, window)).tril()

    monkeypatch.setattr(pack_layout, "family_mask", leaky)
    with pytest.raises(AssertionError):
        assert_same(packed_result(llama, batch, algorithm, 1000)[1], expected)


def test_the_order_of_the_batch_does_not_matter(llama: LanguageModel) -> None:
    batch, algorithm = random_batch(random_sequences(5)), AlgorithmConfig.model_validate(ALGORITHMS[1])
    result, expected = packed_result(llama, batch, algorithm, 40)
    order = list(range(len(batch.sequences)))
    random.Random(0).shuffle(order)
    permuted, ours = packed_result(llama, batch.subset(order), algorithm, 40)
    assert permuted["loss"] == pytest.approx(result["loss"], abs=1e-10)
    assert_same(ours, expected)


def test_parts_of_a_batch_add_up_to_it(llama: LanguageModel) -> None:
    """dr_grpo divides by the number of sequences alone, so equal parts average to the whole."""
    batch, algorithm = random_batch(random_sequences(6, groups=4)), AlgorithmConfig(loss_type="dr_grpo")
    result, expected = packed_result(llama, batch, algorithm, 50)
    parts = [packed_result(llama, part, algorithm, 50) for part in split_evenly(batch, 2, 4)]
    assert sum(r["loss"] for r, _ in parts) / 2 == pytest.approx(result["loss"], abs=1e-10)
    assert_same({name: sum(g[name] for _, g in parts) / 2 for name in expected}, expected)  # type: ignore[misc]


def test_first_step_takes_its_own_log_probs_as_old(llama: LanguageModel) -> None:
    batch, algorithm = random_batch(random_sequences(7)), AlgorithmConfig()
    with torch.no_grad():
        batch.old_log_probs = padded_log_probs(llama, batch.sequences)
    _, expected = packed_result(llama, batch, algorithm, 40)
    batch.old_log_probs = None
    assert_same(packed_result(llama, batch, algorithm, 40)[1], expected)


def test_log_probs_come_back_by_sequence(llama: LanguageModel) -> None:
    sequences = random_sequences(8)
    with torch.no_grad():
        expected = padded_log_probs(llama, sequences)
    packs = pack(sequences, 25)
    ours, _ = sequence_log_probs(llama, packs, len(sequences), HeadOptions(temperature=0.8))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-10, atol=1e-10)
    assert llama.causal_lm.config._attn_implementation == "sdpa"


def test_supervised_gradient_equals_padded_rows(llama: LanguageModel) -> None:
    sequences = [replace(s, family=-1) for s in random_sequences(9)]
    (-torch.cat(padded_log_probs(llama, sequences)).mean()).backward()
    expected = gradients(llama)
    for max_tokens in (1, 20, 1000):
        supervised_backward(llama, pack(sequences, max_tokens), sequences, HeadOptions(temperature=0.8), Meter())
        assert_same(gradients(llama), expected)


WINDOWED: list[Any] = [
    ("mistral", {"sliding_window": 4}, 1e-10),
    # Its norms and its eager attention work in float32.
    (
        "gemma2",
        {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 3.0},
        2e-5,
    ),
]


@pytest.mark.parametrize(("kind", "options", "tolerance"), WINDOWED, ids=["mistral", "gemma2"])
def test_sliding_windows_equal_padded_rows(kind: str, options: dict[str, Any], tolerance: float) -> None:
    lm = tiny_model(kind, **options)
    batch, algorithm = random_batch(random_sequences(10)), AlgorithmConfig()
    loss, expected = plain_result(lm, batch, algorithm)
    for max_tokens, share in [(1, True), (1000, True), (1000, False)]:
        result, ours = packed_result(lm, batch, algorithm, max_tokens, share)
        assert result["loss"] == pytest.approx(loss, abs=tolerance)
        assert_same(ours, expected, tolerance)
