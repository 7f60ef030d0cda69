"""What the plan says of recorded passes (train.cuda_graphs): memory, and when they are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_config import config_of
from transformers import AutoConfig

from tandem.rl.config import Config
from tandem.rl.pack_padding import MOST_ROWS
from tandem.rl.plan import ledger
from tandem.rl.plan_devices import Device, find_device
from tandem.rl.plan_memory import setup_of
from tandem.rl.plan_models import MODELS
from tandem.rl.plan_pack import recorded_bytes
from tandem.rl.plan_shape import ModelShape, shape_of
from tandem.rl.plan_sizing import choose_sizes

ITEM = "recorded passes"


def small_shape(**changes: object) -> ModelShape:
    values = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    return shape_of(AutoConfig.for_model("llama", **values | changes))


def config(**train: object) -> Config:
    return config_of(
        model={"load_in_4bit": False}, train=train, lora={"r": 16}, data={"max_prompt_length": 64},
        rollout={"max_completion_length": 16, "num_generations": 8},
    )  # fmt: skip


def card(gib: float) -> Device:
    return replace(find_device("4090", host_gib=24), memory_gib=gib)


def test_a_small_model_is_recorded_and_both_phases_hold_it() -> None:
    sizing = choose_sizes(small_shape(), config(), card(24))
    assert sizing.config.train.cuda_graphs is True
    plan = sizing.plan
    size = recorded_bytes(plan.setup, plan.pack)
    assert size > 0
    assert plan.training().items[ITEM] == size
    assert plan.rollout().items[ITEM] == size
    without = choose_sizes(small_shape(), config(cuda_graphs=False), card(24)).plan
    assert ITEM not in without.training().items
    assert plan.update_seconds < without.update_seconds / 2
    assert "an update takes" in sizing.reasons["train.cuda_graphs"]


def test_it_is_not_chosen_where_a_phase_would_not_fit() -> None:
    shape = small_shape()
    roomy = choose_sizes(shape, config(), card(24)).plan
    for gib in (2.0, 2.5, 3.0, 4.0, 6.0, 8.0):
        sizing = choose_sizes(shape, config(), card(gib))
        assert sizing.plan.fits() or not sizing.free.fits()
        if sizing.config.train.cuda_graphs is True:
            assert max(sizing.plan.training().bytes, sizing.plan.rollout().bytes) <= gib * (1 << 30)
    tight = choose_sizes(shape, config(), card(roomy.training().bytes / (1 << 30) - 0.3))
    assert tight.config.train.cuda_graphs == "auto"


@pytest.mark.parametrize("value", [True, False])
def test_what_the_config_says_stays(value: bool) -> None:
    sizing = choose_sizes(small_shape(), config(cuda_graphs=value), card(24))
    assert sizing.config.train.cuda_graphs is value
    assert "train.cuda_graphs" not in sizing.chosen


def test_a_large_model_and_one_with_windows_are_not_recorded() -> None:
    large = shape_of(AutoConfig.for_model(**MODELS["Qwen/Qwen3-8B"]))
    for shape in (large, replace(small_shape(), windows=(None, 512) * 15)):
        sizing = choose_sizes(shape, config(), card(80))
        assert sizing.config.train.cuda_graphs == "auto"
        assert ITEM not in ledger(shape, config(cuda_graphs=True), card(80)).training().items


def test_an_update_in_packs_that_are_not_recorded_takes_as_long_as_without() -> None:
    shape = small_shape()

    def seconds(tokens: int, graphs: bool) -> float:
        given = config(cuda_graphs=graphs, max_tokens=tokens, generation_batch_size=2048)
        return ledger(shape, given, card(80)).update_seconds

    assert seconds(2048, True) < seconds(2048, False) / 2
    for tokens in (MOST_ROWS - 1, MOST_ROWS + 1):  # the first would keep more than recordings may
        assert seconds(tokens, True) == seconds(tokens, False)


def test_recordings_grow_up_to_the_largest_pack_that_is_recorded() -> None:
    setup = setup_of(small_shape(), config())
    sizes = [recorded_bytes(setup, rows) for rows in (512, 2048, MOST_ROWS, 4 * MOST_ROWS)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == sizes[-2]
    assert sizes[0] < sizes[1]
