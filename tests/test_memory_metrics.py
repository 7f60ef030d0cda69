"""Memory by phase, read from a gauge that the test turns."""

from __future__ import annotations

import pytest

from tandem.rl.memory_metrics import MemoryMeter, Reading

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
