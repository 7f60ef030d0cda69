"""RL begins with an optimiser of its own, wherever the warm-up before it was interrupted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tandem.rl.checkpoint import State
from tandem.rl.trainer import Trainer


@pytest.mark.parametrize(("step", "kept"), [(0, False), (3, True)])
def test_moments_of_the_warm_up_end_with_it(step: int, kept: bool) -> None:
    """A run that was stopped after the warm-up's last step, or after RL's third, and is resumed."""
    trainer: Any = object.__new__(Trainer)
    trainer._state, trainer._config = (
        State(step=step, warmup_step=2),
        SimpleNamespace(warmup=SimpleNamespace(max_steps=2)),
    )
    trainer._optimizer = SimpleNamespace(state={"a": "moments"})
    assert trainer._warm_up()
    assert bool(trainer._optimizer.state) is kept
