"""The training loop. One rollout iteration is `_policy_iteration`, and it reads from top to bottom.

Departures from the textbook algorithm, all configurable: the base model is frozen and an adapter is trained; the
reference policy is the same model with the adapter off; a group's prompt is computed once; advantages and averages
are taken over the whole batch before it is cut into packs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from tandem.rl import distributed
from tandem.rl.checkpoint import State, save_checkpoint, save_final_adapter
from tandem.rl.config import Config
from tandem.rl.console import Console
from tandem.rl.divergence import divergence_error
from tandem.rl.errors import OutOfMemory, RunStopped, UserError
from tandem.rl.evaluate import Judge
from tandem.rl.experience import (
    advantages_to,
    best_and_worst,
    kl_penalties,
    learned_from,
    policy_batch,
    with_advantages,
)
from tandem.rl.guarded_passes import GuardedPasses
from tandem.rl.held_out import SCORES, held_out
from tandem.rl.journal import write_rollouts
from tandem.rl.lora import trainable
from tandem.rl.memory_advice import memory_advice
from tandem.rl.memory_guard import MemoryGuard
from tandem.rl.memory_metrics import MemoryMeter
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel
from tandem.rl.optim import allocate_moments, apply_gradients, learning_rate
from tandem.rl.parity import ParityGate
from tandem.rl.policy_loss import policy_loss
from tandem.rl.preference_loss import needs_reference
from tandem.rl.preference_step import Answers, with_margins
from tandem.rl.prompts import PromptSampler
from tandem.rl.reference_cache import cached_log_probs
from tandem.rl.reward_errors import out_of_order
from tandem.rl.reward_watch import RewardWatch
from tandem.rl.rewind import Rewind
from tandem.rl.rollout_journal import RolloutJournal
from tandem.rl.rollout_source import RolloutSource
from tandem.rl.run_length import total_steps
from tandem.rl.samples import Scored, Sequence
from tandem.rl.start_time import StartTime
from tandem.rl.step import Objective, PolicyBatch, split_evenly
from tandem.rl.step_time import StepClock
from tandem.rl.stopping import Abandoned, Stopping
from tandem.rl.trackers import Trackers
from tandem.rl.training_data import TrainingData, longest_sequence
from tandem.rl.unscored import RewardsFailed
from tandem.rollout.engine import RolloutEngine
from tandem.rollout.restart import EngineDied


class Trainer:
    """Trains an adapter from where `state` stands to the end of the run, or to the step after which it is stopped.

    Args:
        stopping: ends the run with a checkpoint, after a step or in the middle of one.
        journal: takes every rollout before it is learned from, and gives those that were not yet; None: none is kept.
        start: told when the first step can begin, and then said.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        lm: LanguageModel,
        engine: RolloutEngine,
        data: TrainingData,
        judge: Judge,
        stop_token_ids: tuple[int, ...],
        optimizer: torch.optim.Optimizer,
        state: State,
        trackers: Trackers,
        console: Console,
        stopping: Stopping,
        objective: Objective = policy_loss,
        journal: RolloutJournal | None = None,
        start: StartTime | None = None,
    ) -> None:
        self._config, self._run_dir = config, run_dir
        self._lm, self._engine, self._data, self._judge = lm, engine, data, judge
        self._stop_token_ids = stop_token_ids
        self._optimizer, self._parameters = optimizer, trainable(lm)
        self._state, self._trackers, self._console, self._stopping = state, trackers, console, stopping
        self._start = start
        self._rewind = Rewind(lm, optimizer, state)
        advice = partial(memory_advice, config, longest_sequence(config, data))
        self._guard = MemoryGuard(lm, config.train, state, optimizer, warn=console.warn, advice=advice)
        self._passes = GuardedPasses(config, lm, self._guard, objective)
        self._sampler = PromptSampler(data.num_rows, seed=config.seed, shuffle=config.data.shuffle_dataset)
        self._clock = StepClock(torch.cuda.synchronize if lm.device.type == "cuda" else None, on_part=console.part)
        self.memory = MemoryMeter.of(lm.device, lambda: engine.asleep_bytes)
        self._rollouts = RolloutSource(
            config,
            data.prompts,
            sampler=self._sampler,
            engine=engine,
            judge=judge,
            stop_token_ids=stop_token_ids,
            clock=self._clock,
            memory=self.memory,
            journal=journal,
            console=console,
        )
        self._watch = RewardWatch(config)
        self._rewards_out: UserError | None = None  # the end of the run, once a reward has failed too often
        self._parity = ParityGate(lm, config, self._passes.head, engine=engine.name)
        self.total_steps = total_steps(config, data.num_rows)
        judge.max_steps = self.total_steps

    # The loop

    def fit(self) -> bool:
        """Train. Returns False if the run was stopped before its end.

        Raises:
            RunStopped: the engine is dead. RewardsFailed: a reward is. Both leave a checkpoint.
        """
        try:
            return self._fit()
        except RewardsFailed:
            self._save()
            raise
        except Abandoned:
            self._console.stop()
            self._rewind.back()
            self._save()
            save_final_adapter(self._run_dir, self._lm)
            return False
        except EngineDied as death:
            self._rewind.back()
            self._save()
            fix = f"a checkpoint after step {self._state.step} is kept: rl-train resume {self._run_dir}"
            raise RunStopped(death.problem, reason=death.reason, fix=fix) from death

    def _fit(self) -> bool:
        state, config = self._state, self._config
        self._try_largest_pack()
        if self._start is not None:
            self._start.done("trial")
            self._console.note(str(self._start))
        if not self._warm_up():
            return False
        with self._undoable():
            self._load_reference()
        if state.evaluating or (config.eval.eval_on_start and state.step == 0 and 0 not in state.scores):
            self._evaluate()
        self._console.start(self.total_steps, state.step)
        iteration = {
            "grpo": self._policy_iteration,
            "online_dpo": self._online_iteration,
            "dpo": self._preference_iteration,
            "sft": self._supervised_iteration,
        }[config.algorithm.name]
        self._clock.lap()
        while state.step < self.total_steps and not distributed.any_rank(self._stopping.asked):
            before = state.step
            with self._undoable():
                metrics = self._timed(iteration)
            if self._due(before, config.log.logging_steps) or state.step >= self.total_steps:
                metrics |= self._clock.record() | self.memory.lap()
                with self._clock.part("log"):
                    self._trackers.log(state.step, metrics)
                    self._console.step(state.step, metrics)
            # Known before the run may stop, so that a resumed one takes it.
            state.evaluating = bool(config.eval.eval_steps and self._due(before, config.eval.eval_steps))
            self._stop_if_nothing_is_learned(metrics)
            if state.evaluating:
                with self._clock.part("evaluate"):
                    self._evaluate()
            if config.checkpoint.save_steps and self._due(before, config.checkpoint.save_steps):
                with self._clock.part("checkpoint"):
                    self._save()
        self._console.stop()
        finished = state.step >= self.total_steps
        if finished and state.step not in state.scores:
            self._evaluate()
        self._save()
        if distributed.is_main():
            save_final_adapter(self._run_dir, self._lm)
        return finished

    def _try_largest_pack(self) -> None:
        """Whether memory is enough for the largest pack that can come, before anything is spent on the run."""
        wanted = self._config.train.worst_case_first
        if not wanted or (wanted == "auto" and self._lm.device.type != "cuda"):
            return
        self._engine.sleep()
        longest = longest_sequence(self._config, self._data)
        with self.memory.phase("trial"):
            tokens = self._passes.trial(longest, self._optimizer)
        taken = self.memory.lap().get("memory/peak_allocated/trial")
        peak = "" if taken is None else f", with {taken:.2f} GiB at its peak"
        self._console.note(f"the largest pack that can come, of {tokens:,} tokens, fits{peak}")

    def _warm_up(self) -> bool:
        """Supervised steps on the same adapter before RL; False if stopped on the way."""
        state, warmup = self._state, self._config.warmup
        if state.step or not warmup.max_steps:
            return True
        sampler = PromptSampler(len(self._data.warmup), seed=self._config.seed, shuffle=True)
        self._console.start(warmup.max_steps, state.warmup_step, label="warm-up")
        batch = warmup.per_device_train_batch_size
        while state.warmup_step < warmup.max_steps:
            if distributed.any_rank(self._stopping.asked):
                self._save()
                return False
            meter = Meter()
            rows = sampler.take(state.warmup_step * batch, batch)
            examples = [self._data.warmup[i] for i in rows]
            with self._undoable(abandonable=False):
                self._supervised_update(examples, warmup.learning_rate, meter)
            state.warmup_step += 1
            metrics = distributed.over_ranks(meter)
            self._console.step(state.warmup_step, metrics)
            self._stop_if_nothing_is_learned(metrics)
        self._console.stop()
        # RL starts with moments of its own: the two objectives' gradients have nothing to do with each other. A run
        # that ended with the warm-up's last step has left them in its checkpoint.
        self._optimizer.state.clear()
        return True

    # Reinforcement learning

    def _policy_iteration(self) -> dict[str, float]:
        """One rollout batch and its optimiser steps."""
        config, algorithm, meter, before = self._config, self._config.algorithm, Meter(), self._state.step
        rows, measured = self._rollouts.next(self._state)
        batch = policy_batch(rows, mask_truncated=algorithm.mask_truncated_completions)
        with self._update_part("log_probs"):
            batch = self._passes.with_stored_log_probs(batch)
        rows = with_advantages(rows, config, kl_penalties(batch, algorithm))
        advantages_to(batch, rows)
        if batch.old_log_probs is not None:
            measured |= self._compared(batch, batch.old_log_probs, rows)
        batch = batch.subset(learned_from(rows, config))
        for part in self._updates(batch):
            if algorithm.num_iterations * config.train.steps_per_generation > 1:
                self._rewind.keep()
            measured |= self._policy_update(part, meter, rows)
        self._stopping.finish()
        measured |= self._finish_rollout(rows)
        metrics = distributed.over_ranks(meter)
        if "loss" in metrics:  # a sum over packs, of all updates together
            metrics["loss"] /= self._state.step - before
        return measured | metrics

    def _online_iteration(self) -> dict[str, float]:
        """One rollout batch and one step of preference tuning on the best and the worst of every group."""
        meter = Meter()
        rows, measured = self._rollouts.next(self._state)
        measured |= self._compared_apart(rows)
        answers = best_and_worst(rows, self._config.rollout.num_generations)
        with self._update_part("log_probs"):
            if answers.sequences and needs_reference(self._config.preference.loss_type):
                answers.ref_log_probs = self._passes.reference(answers.sequences)
        self._preference_update(answers, meter)
        measured |= self._finish_rollout(with_advantages(rows, self._config))
        return measured | with_margins(distributed.over_ranks(meter))

    def _finish_rollout(self, rows: list[Scored]) -> dict[str, float]:
        """Hand the new adapter to the engine, look at the completions that it was learned from, and keep them."""
        config, state = self._config, self._state
        with self._clock.part("adapter", device=True):
            self._engine.load_adapter(state.step)
        state.num_tokens += sum(len(r.prompt.ids) + len(r.completion.ids) for r in rows)
        with self._clock.part("log"):
            if config.log.log_completions and distributed.is_main():
                write_rollouts(self._run_dir, state.step, rows)
                self._trackers.completions(state.step, rows)
            self._console.print_completions(rows, config.log.num_completions_to_print)
        if state.failed_rollouts >= config.optim.max_skipped_updates:
            self._rewards_out = out_of_order(rows, state.failed_rollouts, self._run_dir)
        return self._watched(rows) if config.watch.enabled else {}

    def _watched(self, rows: list[Scored]) -> dict[str, float]:
        """What reward watch measures on a rollout; its alerts are recorded and said."""
        step = self._state.step
        with self._clock.part("watch"):
            metrics, alerts = self._watch.take(rows, self._state.watch, step)
        for alert in alerts:
            self._trackers.alert(step, alert)
            self._console.warn(f"step {step}: {alert.text()}")
        return metrics

    def _updates(self, batch: PolicyBatch) -> Iterator[PolicyBatch]:
        """The optimiser batches of a rollout batch; the run's last one may hold more than there are steps left."""
        config = self._config
        for _ in range(config.algorithm.num_iterations):
            for part in split_evenly(batch, config.train.steps_per_generation, config.rollout.num_generations):
                if self._state.step < self.total_steps:
                    yield part

    def _policy_update(self, batch: PolicyBatch, meter: Meter, rows: list[Scored]) -> dict[str, float]:
        """One optimiser step; returns how far engine and trainer are apart, where this step is the first to know."""
        with self._update_part("backward"):
            log_probs = self._passes.policy(batch, meter)
        measured: dict[str, float] = {}
        if batch.old_log_probs is None:
            measured = self._compared(batch, distributed.merge(log_probs), rows)
        self._update(learning_rate(self._state.step, self.total_steps, self._config.optim), meter)
        self._state.step += 1
        return measured

    def _compared(self, batch: PolicyBatch, own: list[torch.Tensor], rows: list[Scored]) -> dict[str, float]:
        """How far engine and trainer are apart on a rollout that was not learned from yet.

        Raises:
            ParityError: too far. A checkpoint from before the rollout and the rollout itself are kept.
        """
        config, step = self._config, self._state.step
        stop = config.parity.action == "stop"
        kept = f"A checkpoint from before this step is kept: rl-train resume {self._run_dir}. " if stop else ""
        with self._clock.part("parity"):
            result = self._parity.compare(batch, own, step=step, place=f"at step {step + 1}", kept=kept)
        if result.failure is not None:
            if stop:
                self._rollouts.forget(self._state)
                if distributed.is_main():
                    write_rollouts(self._run_dir, step + 1, rows)
                self._save()
                raise result.failure
            self._console.warn(str(result.failure))
        if result.note is not None:
            self._console.warn(result.note)
        return result.metrics

    def _compared_apart(self, rows: list[Scored]) -> dict[str, float]:
        """The same where the step has no use for the log-probs: due steps compute them for this alone."""
        step = self._state.step
        if not self._parity.due(step):
            return {}
        batch = policy_batch(rows, mask_truncated=False)
        with self._clock.part("parity"):
            own, _ = self._passes.log_probs(batch.sequences)
        metrics = self._compared(batch, distributed.merge(own), rows)
        return metrics if self._parity.regular(step) else {}

    # Preference tuning

    def _preference_iteration(self) -> dict[str, float]:
        state, meter, answers = self._state, Meter(), self._data.answers
        assert answers is not None
        rows = self._sampler.take(state.position, self._config.train.per_device_train_batch_size)
        batch = answers.subset(rows)
        self._preference_update(batch, meter)
        state.position += len(rows)
        state.num_tokens += sum(s.num_tokens for s in batch.sequences)
        return with_margins(distributed.over_ranks(meter))

    def _preference_update(self, answers: Answers, meter: Meter) -> None:
        if answers.sequences:
            with self._update_part("backward"):
                self._passes.preference(answers, meter)
        self._update(learning_rate(self._state.step, self.total_steps, self._config.optim), meter)
        self._state.step += 1

    def _load_reference(self) -> None:
        """Reference log-probs of the preference data, from the cache where they are known."""
        if self._config.algorithm.name != "dpo" or not needs_reference(self._config.preference.loss_type):
            return
        for answers in (self._data.answers, self._data.eval_answers):
            if answers is not None:
                sequences = answers.sequences
                answers.ref_log_probs = cached_log_probs(
                    self._lm, sequences, partial(self._passes.reference, sequences)
                )

    # Supervised fine-tuning

    def _supervised_iteration(self) -> dict[str, float]:
        state, config, meter = self._state, self._config, Meter()
        rows = self._sampler.take(state.position, config.train.per_device_train_batch_size)
        examples = [self._data.examples[i] for i in rows]
        rate = learning_rate(state.step, self.total_steps, config.optim)
        self._supervised_update(examples, rate, meter)
        state.step += 1
        state.position += len(rows)
        state.num_tokens += sum(e.num_tokens for e in examples)
        return distributed.over_ranks(meter)

    def _supervised_update(self, examples: list[Sequence], rate: float, meter: Meter) -> None:
        with self._update_part("backward"):
            self._passes.supervised(examples, meter)
        self._update(rate, meter)

    # Shared

    @contextmanager
    def _update_part(self, name: str) -> Iterator[None]:
        with self._clock.part(name, device=True), self.memory.phase("update"):
            yield

    def _update(self, rate: float, meter: Meter) -> None:
        with self._update_part("optimizer"):
            self._guard.once(partial(allocate_moments, self._optimizer), "the optimiser's state")
            if not self._rewind.has_weights:
                self._stopping.finish()
        with self._stopping.whole(), self._update_part("optimizer"):
            norm = apply_gradients(
                self._optimizer, self._parameters, rate=rate, max_grad_norm=self._config.optim.max_grad_norm
            )
        if math.isfinite(norm):
            self._state.skipped_in_a_row = 0
        else:
            self._state.skipped_updates += 1
            self._state.skipped_in_a_row += 1
            self._console.warn(f"gradient norm {norm} at step {self._state.step + 1}: the update is skipped")
        meter.add("grad_norm", norm)
        meter.add("learning_rate", rate)

    @contextmanager
    def _undoable(self, *, abandonable: bool = True) -> Iterator[None]:
        """What happens inside is taken back, and the state of before saved, where memory is too small for it whatever
        is done, and where it is given up for a notice to end. That is left out where other ranks take part.

        Raises:
            OutOfMemory: see `MemoryGuard` and `TransformersEngine`; where only some ranks are out of memory, nothing is
                saved. Abandoned: see `Stopping`; `fit` saves what was before.
        """
        self._rewind.mark()
        alone = abandonable and distributed.world_size() == 1
        try:
            with self._stopping.abandonable() if alone else nullcontext():
                yield
        except OutOfMemory as error:
            if self._rewind.possible and (error.together or distributed.world_size() == 1):
                self._rewind.back()
                self._save()
                self._console.note(f"a checkpoint from before this step is kept: rl-train resume {self._run_dir}")
            raise

    def _stop_if_nothing_is_learned(self, metrics: dict[str, float]) -> None:
        """After a whole iteration, so that the checkpoint lies between two rollouts, and its steps are on record."""
        limit = self._config.optim.max_skipped_updates
        if self._rewards_out is not None:
            self._state.failed_rollouts = 0
            self._save()
            raise self._rewards_out
        if self._state.skipped_in_a_row >= limit:
            count, self._state.skipped_in_a_row = self._state.skipped_in_a_row, 0
            self._save()
            raise divergence_error(self._run_dir, count, metrics, self._parameters, self._optimizer)

    def _evaluate(self) -> None:
        """Take the held-out score. One that is given up is taken when the run is resumed."""
        state = self._state
        state.evaluating = True
        with self._undoable():
            metrics, rows = held_out(
                self._passes, self._engine, self._judge, self._data, self._config, self._stop_token_ids, state.step
            )
            self._stopping.finish()
            state.evaluating = False
            if rows and distributed.is_main():
                write_rollouts(self._run_dir, state.step, rows, kind="eval")
            for key, name, form in [score for score in SCORES if score[0] in metrics][:1]:
                state.scores[state.step] = metrics[key]
                self._console.note(f"held-out {name} after {state.step} steps: {metrics[key]:{form}}")
                self._trackers.log(state.step, metrics)

    def _save(self) -> None:
        keep = self._config.checkpoint.save_total_limit
        if distributed.is_main():
            self._trackers.sync()
            save_checkpoint(self._run_dir, self._lm, self._optimizer, self._state, keep=keep)
        distributed.barrier()

    def _due(self, before: int, every: int) -> bool:
        """Whether a multiple of `every` was reached by the steps since `before`."""
        return self._state.step // every > before // every

    def _timed(self, iteration: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The iteration's metrics with its tokens per second."""
        tokens, started = self._state.num_tokens, time.perf_counter()
        metrics = iteration()
        elapsed = time.perf_counter() - started
        self._state.seconds += elapsed
        metrics["num_tokens"] = float(self._state.num_tokens)
        metrics["perf/throughput"] = (self._state.num_tokens - tokens) / elapsed
        if self._state.halved:
            metrics["memory/halved"] = float(self._state.halved)
        return metrics
