"""Memory by phase, read from a gauge that the test turns."""

from __future__ import annotations

import pytest
from plan_config import config_of

from tandem.rl.memory_metrics import MemoryMeter, Reading, planned_memory
from tandem.rl.plan import Longest, changed, ledger
from tandem.rl.plan_devices import find_device
from tandem.rl.plan_shape import read_shape

GIB = 1 << 30


class Hand:
    """A gauge whose peaks are set by hand; a reset forgets them, as torch's does."""

    def __init__(self) -> None:
        self.now = Reading(0, 0, 0)

    def reset(self) -> None:
        self.now = Reading(0, 0, self.now.device)

    def read(self) -> Reading:
        return self.now


def test_each_phase_has_its_own_peak_of_the_step_and_of_the_run() -> None:
    hand = Hand()
    meter = MemoryMeter(hand)
    with meter.phase("rollout"):
        hand.now = Reading(2 * GIB, 3 * GIB, 40 * GIB)
    for peak in (5, 4):  # two updates on one rollout
        with meter.phase("update"):
            hand.now = Reading(peak * GIB, 6 * GIB, 8 * GIB)
    assert meter.lap() == {
        "memory/peak_allocated/rollout": 2, "memory/reserved/rollout": 3, "memory/device/rollout": 40,
        "memory/peak_allocated/update": 5, "memory/reserved/update": 6, "memory/device/update": 8,
    }  # fmt: skip
    with meter.phase("update"):
        hand.now = Reading(GIB, GIB, GIB)
    assert meter.lap()["memory/peak_allocated/update"] == 1
    assert meter.lap() == {}
    assert meter.summary()["update"] == {"peak_allocated": 5, "reserved": 6, "device": 8}


def test_a_phase_that_fails_is_not_counted_and_a_cpu_counts_nothing() -> None:
    hand = Hand()
    meter = MemoryMeter(hand)
    with pytest.raises(RuntimeError), meter.phase("update"):
        raise RuntimeError
    assert meter.lap() == {}
    silent = MemoryMeter(None)
    with silent.phase("update"):
        pass
    assert silent.lap() == silent.summary() == {}


def test_the_plan_is_put_beside_it_under_the_same_names() -> None:
    """For the engine that the run has, which `auto` does not say, with what is kept because memory is left."""
    config = config_of(
        model={"model_name_or_path": "Qwen/Qwen3-0.6B"}, rollout={"engine": "auto"}, train={"max_tokens": 8192}
    )
    card, longest = find_device("h100"), Longest(512, 512)
    planned = planned_memory(config, "vllm", longest, card)
    assert planned.keys() == {"update", "rollout"}
    for one in planned.values():
        assert tuple(one) == Reading._fields
        assert one["peak_allocated"] < one["reserved"] < one["device"]
    plan = ledger(read_shape(config.model), changed(config, {"rollout": {"engine": "vllm"}}), card, longest)
    layers, kept = plan.spare
    assert layers == 28
    assert planned["update"]["device"] == pytest.approx((plan.training().bytes + kept) / GIB, abs=1e-3)
    other = planned_memory(config, "transformers", longest, card)
    assert other["rollout"]["device"] != planned["rollout"]["device"]
    assert planned_memory(config, "vllm", longest) == {}, "no card is here"
