"""Engine and trainer together: both speak of the same numbers, whatever the batch, the adapter or the wave."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import move_adapter, save_llama, save_words

from tandem.rl.config import LoraConfig, ModelConfig
from tandem.rl.errors import OutOfMemory
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.model import LanguageModel, load_model, load_tokenizer, with_sampling
from tandem.rl.packing import pack
from tandem.rl.samples import Completion, Group, Prompt, Sampling, Sequence
from tandem.rl.step import sequence_log_probs
from tandem.rollout.transformers_engine import TransformersEngine

WORDS = ["<pad>", "</s>", *(f"w{i}" for i in range(2, 48))]
STOP = WORDS.index("</s>")
TEXTS = ["w2 w3 w4", "w9", "w5 w6 w7 w8 w9 w10 w11 w12", "w3 w3 w20 w21"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder as users have it: weights, and a word-level tokenizer without a pad token."""
    path = tmp_path_factory.mktemp("model")
    shape = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": STOP}
    save_llama(path, len(WORDS), **shape, initializer_range=0.35)
    save_words(path, WORDS, eos="</s>", unk="<pad>", named=False)
    return path


@pytest.fixture
def lm(folder) -> LanguageModel:
    """With an adapter that changes the policy visibly."""
    config = ModelConfig(model_name_or_path=str(folder), device="cpu")
    loaded = load_model(config, load_tokenizer(config))
    attach_lora(loaded, LoraConfig(r=4), seed=0)
    move_adapter(loaded, seed=1)
    return loaded


def prompts_of(lm: LanguageModel) -> list[Prompt]:
    return [Prompt(i, lm.tokenizer.encode(text), text) for i, text in enumerate(TEXTS)]


def generate(lm: LanguageModel, prompts: list[Prompt], max_in_flight: int | None = None, **options) -> list[Group]:
    settings = {"num_generations": 3, "max_completion_length": 10, "stop_token_ids": (STOP, 7, 30)} | options
    return TransformersEngine(lm, max_in_flight=max_in_flight).generate(prompts, Sampling(**settings))


def flat(groups: list[Group]) -> list[tuple[Prompt, Completion]]:
    return [(g.prompt, c) for g in groups for c in g.completions]


def trainer_log_probs(lm: LanguageModel, groups: list[Group], sampling: dict) -> list[torch.Tensor]:
    """The training side: packed, prompts shared, head in chunks."""
    head = with_sampling(
        lm.head,
        temperature=sampling.get("temperature") or 1.0,
        top_k=sampling.get("top_k", 0),
        top_p=sampling.get("top_p", 1.0),
        chunk_size=5,
    )
    sequences = [Sequence(p.ids, c.ids, [True] * len(c.ids), family=p.index) for p, c in flat(groups)]
    return sequence_log_probs(lm, pack(sequences, 40), len(sequences), head)[0]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7}, {"temperature": 1.2, "top_k": 6, "top_p": 0.8}, {"temperature": 0}],
    ids=str,
)
def test_engine_and_trainer_agree_on_every_log_prob(lm, sampling):
    groups = generate(lm, prompts_of(lm), **sampling)
    for (_, completion), own in zip(flat(groups), trainer_log_probs(lm, groups, sampling), strict=True):
        torch.testing.assert_close(own, torch.tensor(completion.log_probs), rtol=0, atol=1e-5)


def test_an_updated_adapter_is_in_use_at_once(lm):
    engine = TransformersEngine(lm)
    sampling = Sampling(num_generations=2, max_completion_length=8)
    before = engine.generate(prompts_of(lm), sampling)
    move_adapter(lm, seed=2)
    engine.load_adapter(1)
    after = engine.generate(prompts_of(lm), sampling)
    assert [c.ids for _, c in flat(before)] != [c.ids for _, c in flat(after)]
    for (_, completion), own in zip(flat(after), trainer_log_probs(lm, after, {}), strict=True):
        torch.testing.assert_close(own, torch.tensor(completion.log_probs), rtol=0, atol=1e-5)


def test_log_probs_do_not_depend_on_the_batch_either(lm):
    prompts = prompts_of(lm)
    together = {g.prompt.index: g.completions for g in generate(lm, prompts)}
    for batch, size in ([prompts[2:3], None], [prompts[::-1], 3], [prompts, 1]):
        for group in generate(lm, batch, size):
            for ours, theirs in zip(group.completions, together[group.prompt.index], strict=True):
                assert ours.ids == theirs.ids
                assert ours.truncated == theirs.truncated
                assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)


def test_the_stream_follows_the_row_number_and_not_the_place_in_the_batch(lm):
    first = prompts_of(lm)[0]
    renumbered = replace(first, index=17)
    ids = [[c.ids for c in g.completions] for g in generate(lm, [first, renumbered, replace(first)])]
    assert ids[0] == ids[2]
    assert ids[0] != ids[1]


def prefilled_rows(lm: LanguageModel, prompts: list[Prompt], max_in_flight: int | None, **options) -> list[int]:
    """Rows of every forward that reads whole prompts; decoding passes a cache."""
    rows: list[int] = []

    def note(module, args, kwargs):
        if not {"cache", "past_key_values"} & kwargs.keys():
            rows.append(kwargs["input_ids"].shape[0])

    hook = lm.backbone.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate(lm, prompts, max_in_flight, **options)
    finally:
        hook.remove()
    return rows


def test_each_wave_prefills_only_its_own_prompts_once(lm):
    prompts = prompts_of(lm)
    assert prefilled_rows(lm, prompts, None, num_generations=5) == [4]
    assert prefilled_rows(lm, prompts, 5, num_generations=5) == [1, 1, 1, 1]
    # Waves of four cut groups of six as 4 | 2+2 | 4 and again.
    assert prefilled_rows(lm, prompts, 4, num_generations=6) == [1, 2, 1, 1, 2, 1]


def test_decoded_rows_are_the_completions_still_unfinished_or_little_more(lm):
    """No forward follows the last token, and finished rows leave once they are a fifth of the batch."""
    rows: list[int] = []

    def note(module, args, kwargs):
        if {"cache", "past_key_values"} & kwargs.keys():
            rows.append(kwargs["input_ids"].shape[0])

    hook = lm.backbone.register_forward_pre_hook(note, with_kwargs=True)
    try:
        lengths = [len(c.ids) for _, c in flat(generate(lm, prompts_of(lm), num_generations=8))]
    finally:
        hook.remove()
    assert len(set(lengths)) > 3
    assert len(rows) == max(lengths) - 1
    for step, decoded in enumerate(rows, start=1):
        unfinished = sum(length > step for length in lengths)
        assert unfinished <= decoded
        assert unfinished > 0.8 * decoded


def test_a_limit_of_one_token_needs_no_decoding(lm):
    groups = generate(lm, prompts_of(lm), max_completion_length=1, num_generations=40)
    completions = [c for _, c in flat(groups)]
    assert all(len(c.ids) == len(c.log_probs) == 1 for c in completions)
    assert {c.truncated for c in completions} == {True, False}
    assert all(c.truncated == (c.ids[0] not in (STOP, 7, 30)) for c in completions)


def test_without_stop_tokens_everything_runs_to_the_limit(lm):
    completions = [c for _, c in flat(generate(lm, prompts_of(lm), stop_token_ids=()))]
    assert all(c.truncated and len(c.ids) == 10 for c in completions)


def test_nothing_deprecated_is_asked_of_transformers(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(lm, prompts_of(lm), max_completion_length=3, stop_token_ids=())


def test_progress_counts_completions(lm):
    told: list[tuple[int, int]] = []
    engine = TransformersEngine(lm, max_in_flight=5)
    engine.generate(
        prompts_of(lm),
        Sampling(num_generations=3, max_completion_length=2),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(5, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to allocate 2.50 GiB"), MemoryError()], ids=type)
def test_where_memory_ends_fewer_are_generated_at_once(lm, monkeypatch, error):
    """In the middle of a wave, with some of it finished: each group is handed over once, as it would have been."""
    free = flat(generate(lm, prompts_of(lm), seed=5))
    decode, sizes, told, handed = TransformersEngine._decode, [], [], []

    def small(self, batch, tokens):
        sizes.append(len(batch.requests))
        if len(batch.requests) > 3 and len(sizes) > 2:
            raise error
        decode(self, batch, tokens)

    monkeypatch.setattr(TransformersEngine, "_decode", small)
    engine = TransformersEngine(lm, warn=told.append)
    settings = Sampling(num_generations=3, max_completion_length=10, stop_token_ids=(STOP, 7, 30), seed=5)
    groups = engine.generate(prompts_of(lm), settings, on_group=lambda place, group: handed.append(place))
    assert [c.ids for _, c in flat(groups)] == [c.ids for _, c in free]
    assert sorted(handed) == sorted({*handed})
    for (_, one), (_, other) in zip(flat(groups), free, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        assert one.truncated == other.truncated
    assert told
    assert all("out of memory while" in text for text in told)
    # It stays so, and is not said again.
    count = len(told)
    assert [c.ids for _, c in flat(engine.generate(prompts_of(lm), settings))] == [c.ids for _, c in free]
    assert len(told) == count


def test_a_single_completion_without_memory_is_an_error_with_a_fix(lm, monkeypatch):
    def none(self, batch, tokens):
        raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB")

    monkeypatch.setattr(TransformersEngine, "_decode", none)
    with pytest.raises(OutOfMemory, match=r"single completion was generated: Tried to allocate 2\.50 GiB\nFix: lower"):
        generate(lm, prompts_of(lm))


def test_generating_leaves_model_and_random_state_alone(lm):
    before = torch.get_rng_state()
    groups = generate(lm, prompts_of(lm), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not lm.model.training
    assert [n for n, p in trainable(lm) if p.grad is not None] == []
    assert [c.ids for _, c in flat(generate(lm, prompts_of(lm), seed=3))] == [c.ids for _, c in flat(groups)]
    # Parameters touched under inference mode could not be trained afterwards.
    assert not any(p.is_inference() for _, p in trainable(lm))
