"""TRL's GRPOTrainer with Tandem's clock: whole steps by a callback, and their parts by a subclass.

Import it after Unsloth, where that is measured: Unsloth replaces the trainer as it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from tandem.rl.step_time import StepClock

Say = Callable[[int, dict[str, float], dict[str, Any]], None]


class StepRows(TrainerCallback):
    """Tells of every optimiser step once its numbers are logged.

    Args:
        say: gets the step's number from 1, its seconds by part, and what the trainer logged.
    """

    def __init__(self, clock: StepClock, say: Say) -> None:
        self._clock, self._say = clock, say
        self._parts: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock.lap()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._parts = self._clock.lap()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._say(state.global_step, self._parts, logs)
        self._clock.lap()


class TimedTrainer(GRPOTrainer):
    """Parts as Tandem names them: adapter (weights handed to vLLM, awake), generate (with vLLM's sleep), log_probs (the
    pass before the update, which TRL makes where vLLM samples), reward, backward; idle is the rest, the optimiser with
    it."""

    def __init__(self, *args: Any, clock: StepClock, **options: Any) -> None:
        self.clock = clock
        super().__init__(*args, **options)

    def training_step(self, *args: Any, **options: Any) -> Any:
        with self.clock.part("backward", device=True):
            return super().training_step(*args, **options)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self.clock.part("idle", device=True):
            return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        if self.use_vllm and self.state.global_step != self._last_loaded_step:
            # What the method below does first, by itself for the clock.
            with self.clock.part("adapter", device=True):
                self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        with self.clock.part("generate", device=True):
            return super()._generate_single_turn(*args, **options)

    def _calculate_rewards(self, *args: Any, **options: Any) -> Any:
        with self.clock.part("reward"):
            return super()._calculate_rewards(*args, **options)

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **options)
        with self.clock.part("log_probs", device=True):
            return super()._get_per_token_logps_and_entropies(*args, **options)
