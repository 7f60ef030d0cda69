"""RL begins with an optimiser of its own, wherever the warm-up before it was interrupted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tandem.rl.checkpoint import State
from tandem.rl.console import Console
from tandem.rl.trainer import Trainer


@pytest.mark.parametrize(("step", "kept"), [(0, False), (3, True)])
def test_moments_of_the_warm_up_end_with_it(step: int, kept: bool) -> None:
    """A run that was stopped after the warm-up's last step, or after RL's third, and is resumed."""
    warmup = SimpleNamespace(max_steps=2, per_device_train_batch_size=1)
    trainer: Any = object.__new__(Trainer)
    trainer._state, trainer._config = State(step=step, warmup_step=2), SimpleNamespace(warmup=warmup, seed=0)
    trainer._data, trainer._console = SimpleNamespace(warmup=["an example"]), Console.silent()
    trainer._optimizer = SimpleNamespace(state={"a": "moments"})
    assert trainer._warm_up()
    assert bool(trainer._optimizer.state) is kept
