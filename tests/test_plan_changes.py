"""What a plan says of length and of single changes, done as it says: the gain is there, and nothing else is said."""

from __future__ import annotations

import io
from typing import Any

import pytest
from plan_config import config_of
from transformers import AutoConfig

from tandem.rl import plan_changes
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.plan import Longest, changed
from tandem.rl.plan_changes import as_it_is, candidates, openings, smallest_change, try_changes
from tandem.rl.plan_command import as_dict, show, verdict
from tandem.rl.plan_devices import GIB, find_device
from tandem.rl.plan_models import MODELS
from tandem.rl.plan_shape import ModelShape, shape_of
from tandem.rl.plan_sizing import Sizing, choose_sizes

SHORT = {"max_completion_length": 1024}


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return shape_of(AutoConfig.for_model(**MODELS["Qwen/Qwen3-8B"]))


@pytest.fixture(scope="module")
def long_qwen() -> ModelShape:
    return shape_of(AutoConfig.for_model(**MODELS["Qwen/Qwen3-4B-Instruct-2507"]))


def sized(shape: ModelShape, card: str, *, host: float = 24, **sections: dict[str, Any]) -> Sizing:
    return choose_sizes(shape, config_of(**sections), find_device(card, host_gib=host))


def shown(sizing: Sizing) -> str:
    out = io.StringIO()
    show(sizing, Console(out, out, live=False))
    return " ".join(out.getvalue().split())


# --- the longest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["16", "a10", "4090", "h100"])
@pytest.mark.parametrize("host", [4, 24, 256])
def test_a_step_of_the_longest_fits_and_a_longer_one_does_not(long_qwen: ModelShape, card: str, host: float) -> None:
    """On a large card beside a small host, neither what is left open, which offloads, nor the cache of the planned
    length says how much fits."""
    deep = {"data": {"max_prompt_length": 32768}, "rollout": {"max_completion_length": 2048}}
    made = sized(long_qwen, card, host=host, **deep)
    longest = made.roomiest.longest

    def step(tokens: int) -> Sizing:
        return choose_sizes(long_qwen, made.free.config, made.free.device, longest=Longest(tokens - 2048, 2048))

    assert step(longest).plan.fits()
    if made.roomiest.binding != "the model's context":
        # Where attention changes its parts memory falls for a while: the longest stands before such a border or beyond.
        assert not step(longest + 256).plan.fits()


def test_the_engine_s_own_context_is_a_limit(qwen: ModelShape) -> None:
    made = sized(qwen, "4090", rollout=SHORT | {"max_model_len": 1000})
    said = verdict(made)
    assert said.startswith("It does not fit: the engine's context lets 1,000 tokens through, and 1,536 are planned for")
    assert said.endswith("rollout.max_model_len=null")
    assert "the engine's context" not in sized(qwen, "4090", rollout=SHORT | {"engine": "transformers"}).free.limits


# --- sequences at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("card", ["16", "4090", "h100"])
def test_sequences_at_once_are_the_same_wherever_they_are_said(qwen: ModelShape, card: str, engine: str) -> None:
    made = sized(qwen, card, rollout=SHORT | {"engine": engine}, train={"generation_batch_size": 64})
    said = as_dict(made)["in_flight"]
    at_once = said["at_once"]
    assert 0 < at_once <= said["wanted"] == 64
    assert at_once == min(said["fits"], at_once) == as_it_is(made.free).in_flight
    text = shown(made)
    assert f"sequences of 1,536 at once {at_once} of 64; the whole card would hold {said['fits']:,}" in text
    assert (f"Only {at_once} of 64 are made at once" in text) == (at_once < 64)
    assert all(one.in_flight <= 64 for one in try_changes(made.free))


# --- single changes ---------------------------------------------------------------------------------------------------


def numbers(sizing: Sizing) -> tuple[bool, int, int, int, int, float]:
    plan = sizing.plan
    rollout = plan.rollout()
    at_once = min(plan.in_flight, sizing.free.work.in_flight)
    seconds = sum(plan.seconds.values())
    assert rollout is not None
    return plan.fits(), sizing.roomiest.longest, at_once, -plan.training().bytes, -rollout.bytes, -seconds


@pytest.mark.parametrize("card", ["6", "16", "4090", "h100"])
def test_every_change_that_is_named_gains_what_is_said(qwen: ModelShape, card: str) -> None:
    made = sized(qwen, card, rollout=SHORT)
    now = numbers(made)
    settings = dict([*openings(made.free), *candidates(made.free)])
    for change in try_changes(made.free):
        config = changed(made.free.config, settings[change.setting])
        after = numbers(choose_sizes(qwen, config, made.free.device))
        fits, longest, at_once, training, rollout, seconds = after
        assert (change.fits, change.longest, change.in_flight) == (fits, longest, at_once)
        assert (change.training, change.rollout, change.seconds) == (-training, -rollout, -seconds)
        assert any(a > b for a, b in zip(after, now, strict=True)), f"{change.setting} gains nothing"


@pytest.mark.parametrize(
    ("section", "key", "value", "gain"),
    [
        ("rollout", "max_in_flight", 4, lambda now, one: one.seconds < now.seconds / 5),
        ("train", "max_tokens", 1536, lambda now, one: one.seconds < 0.9 * now.seconds),
        ("train", "projection_memory", "save", lambda now, one: one.longest > 2 * now.longest),
        ("rollout", "kv_cache_gib", 0.5, lambda now, one: one.in_flight > 2 * now.in_flight),
    ],
)
def test_a_size_that_the_config_sets_too_small_may_be_left_open(
    qwen: ModelShape, section: str, key: str, value: Any, gain: Any
) -> None:
    made = sized(
        qwen, "4090", **({"rollout": SHORT} | {section: {**(SHORT if section == "rollout" else {}), key: value}})
    )
    best = try_changes(made.free)[0]
    assert best.setting == f"{section}.{key}={'auto' if key == 'projection_memory' else 'null'}"
    assert gain(as_it_is(made.free), best)
    assert not openings(sized(qwen, "4090").free), "nothing is set there"


@pytest.mark.parametrize("gib", [0.001, 60])
def test_a_cache_of_the_wrong_size_is_to_be_left_open(qwen: ModelShape, gib: float) -> None:
    made = sized(qwen, "4090", rollout=SHORT | {"kv_cache_gib": gib})
    assert verdict(made).endswith("The smallest change that makes it fit: rollout.kv_cache_gib=null")
    assert sized(qwen, "4090", rollout=SHORT).plan.fits()


def test_no_run_is_shrunk_to_nothing(monkeypatch) -> None:
    """A rank of 1 and completions of one token would fit, and teach nothing."""
    shape = shape_of(AutoConfig.for_model(**MODELS["Qwen/Qwen3-4B"]))
    deep = {"data": {"max_prompt_length": 32768}, "rollout": {"max_completion_length": 2048}}

    def proposed() -> set[str]:
        made = [sized(shape, card, **deep) for card in ("5", "6", "7", "8")]
        return {setting for one in made for setting in smallest_change(one.plan, one.free)}

    least = {"lora.r": 4, "rollout.max_completion_length": 256}
    for setting in proposed():
        name, _, value = setting.partition("=")
        assert name not in least or int(value) >= least[name], setting
    monkeypatch.setattr(plan_changes, "_LEAST_RANK", 1)
    monkeypatch.setattr(plan_changes, "_LEAST_COMPLETION", 0)
    assert {"lora.r=1", "rollout.max_completion_length=1"} <= proposed(), "these cards would come to that"


@pytest.mark.parametrize("groups", [3, 100])
def test_groups_that_a_run_would_refuse_are_refused_by_the_plan(qwen: ModelShape, groups: int) -> None:
    with pytest.raises(UserError, match=f"train.kv_head_groups is {groups}, but the model has 8 KV heads"):
        sized(qwen, "4090", train={"kv_head_groups": groups})


# --- what is left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["16", "l4", "a10", "3090", "4090", "5090", "a40", "a100", "h100", "h200"])
@pytest.mark.parametrize("offload", [False, True])
def test_projections_take_no_more_than_what_is_left(long_qwen: ModelShape, card: str, offload: bool) -> None:
    """Beside layers' inputs that stay on the device, of which a long pack has many GiB."""
    deep = {"data": {"max_prompt_length": 32768}, "rollout": {"max_completion_length": 2048}}
    plan = sized(long_qwen, card, **deep, train={"offload_activations": offload}).plan
    if plan.fits():
        assert plan.training().bytes + plan.spare[1] <= plan.device.memory, f"{plan.spare[1] / GIB:.2f} GiB"
