"""The embedded engine: exact log-probs, independent random streams, stops, and one prefill per prompt."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tandem.rl.config import ModelConfig
from tandem.rl.model import LanguageModel, load_model
from tandem.rl.samples import Group, Prompt, Sampling
from tandem.rollout.random_streams import uniform_stream
from tandem.rollout.transformers_engine import TransformersEngine

PROMPTS = [Prompt(i, list(range(2 + i, 5 + 3 * i)), "") for i in range(4)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_model(ModelConfig(model_name_or_path=str(folder), device="cpu"), SimpleNamespace(pad_token_id=0))


def generate(lm: LanguageModel, prompts: list[Prompt], max_in_flight: int | None = None, **options) -> list[Group]:
    settings = {"num_generations": 3, "max_completion_length": 12, "stop_token_ids": (7, 11)} | options
    return TransformersEngine(lm, max_in_flight=max_in_flight).generate(prompts, Sampling(**settings))


def reference_log_probs(lm: LanguageModel, prompt: list[int], ids: list[int], sampling: dict) -> np.ndarray:
    """Log-probs of `ids` by a fresh forward without a cache, restricted and renormalised in numpy."""
    with torch.no_grad():
        logits = lm.causal_lm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double().numpy()
    result = []
    for row, token in zip(logits / (sampling.get("temperature", 1.0) or 1.0), ids, strict=True):
        order = np.argsort(-row)
        if k := sampling.get("top_k", 0):
            order = order[:k]
        p = np.exp(row[order] - row[order].max())
        p /= p.sum()
        kept = order[: np.searchsorted(np.cumsum(p), sampling.get("top_p", 1.0)) + 1]
        z = row[kept]
        assert token in kept
        result.append(row[token] - z.max() - np.log(np.exp(z - z.max()).sum()))
    return np.array(result)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.7},
        {"temperature": 0},
    ],
    ids=str,
)
def test_log_probs_are_those_of_the_distribution_sampled_from(lm, sampling):
    for group in generate(lm, PROMPTS, **sampling):
        for completion in group.completions:
            expected = reference_log_probs(lm, group.prompt.ids, completion.ids, sampling)
            np.testing.assert_allclose(completion.log_probs, expected, atol=1e-5)


def test_greedy_takes_the_likeliest_token(lm):
    for group in generate(lm, PROMPTS, temperature=0):
        ids = group.prompt.ids + group.completions[0].ids
        with torch.no_grad():
            likeliest = lm.causal_lm(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert likeliest[len(group.prompt.ids) - 1 : -1] == group.completions[0].ids


def test_stop_tokens_end_a_completion_and_belong_to_it(lm):
    completions = [c for g in generate(lm, PROMPTS, num_generations=20) for c in g.completions]
    stopped = [c for c in completions if not c.truncated]
    assert stopped
    assert len(stopped) < len(completions)
    for c in completions:
        assert not set(c.ids[:-1]) & {7, 11}
        assert len(c.ids) == len(c.log_probs) <= 12
        assert c.truncated == (c.ids[-1] not in (7, 11))
        assert not c.truncated or len(c.ids) == 12


def test_samples_do_not_depend_on_the_batch(lm):
    together = {g.prompt.index: [c.ids for c in g.completions] for g in generate(lm, PROMPTS)}
    for batch in ([PROMPTS[2]], PROMPTS[::-1], [PROMPTS[1], PROMPTS[3]]):
        for size in (None, 1, 2, 5):
            for group in generate(lm, batch, size):
                assert [c.ids for c in group.completions] == together[group.prompt.index]


def test_seeds_and_numbers_change_the_samples(lm):
    first, second = (generate(lm, PROMPTS, seed=s)[0].completions for s in (0, 1))
    assert [c.ids for c in first] != [c.ids for c in second]
    assert first[0].ids != first[1].ids
    assert not torch.equal(uniform_stream(0, 1, 2, 8), uniform_stream(0, 2, 1, 8))
    assert torch.equal(uniform_stream(3, 1, 2, 8), uniform_stream(3, 1, 2, 8))


def test_a_row_that_comes_again_in_a_batch_is_sampled_anew(lm):
    again = [PROMPTS[0], replace(PROMPTS[0], draw=1), PROMPTS[1], replace(PROMPTS[0], draw=2)]

    def ids_of(prompts: list[Prompt]) -> list[list[list[int]]]:
        return [[c.ids for c in g.completions] for g in generate(lm, prompts, stop_token_ids=())]

    groups = ids_of(again)
    assert [groups[0], groups[2]] == ids_of(PROMPTS[:2])
    ids = [tuple(one) for i in (0, 1, 3) for one in groups[i]]
    assert len(set(ids)) == len(ids)


def test_a_group_is_prefilled_once(lm):
    shapes: list[tuple[int, ...]] = []
    hook = lm.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        generate(lm, PROMPTS, num_generations=6)
    finally:
        hook.remove()
    assert shapes[0] == (len(PROMPTS), max(len(p.ids) for p in PROMPTS))
    assert all(columns == 1 for _, columns in shapes[1:])
    assert shapes[1][0] <= 6 * len(PROMPTS), "no row more than there are completions"
    assert shapes[-1][0] < 6 * len(PROMPTS), "finished completions leave the batch"


def test_sampled_frequencies_follow_the_distribution(lm):
    prompt = PROMPTS[0]
    drawn = [c.ids[0] for c in generate(lm, [prompt], num_generations=4000, max_completion_length=1)[0].completions]
    with torch.no_grad():
        p = lm.causal_lm(torch.tensor([prompt.ids])).logits[0, -1].double().softmax(-1).numpy()
    observed = np.bincount(drawn, minlength=50)
    likely = p * 4000 >= 5
    chi2 = ((observed - 4000 * p)[likely] ** 2 / (4000 * p)[likely]).sum()
    # Mean n, standard deviation sqrt(2n): five deviations above is never chance.
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_no_prompts_give_no_groups(lm):
    assert generate(lm, []) == []
