"""The passes of a run's model over a batch: cut into packs, with the run's heads, each done again with smaller packs
where memory ends (`tandem.rl.memory_guard`)."""

from __future__ import annotations

import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl import distributed
from tandem.rl.config import Config
from tandem.rl.memory_guard import MemoryGuard, random_kept
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, with_sampling
from tandem.rl.packing import Pack, pack
from tandem.rl.parity import Recorder
from tandem.rl.plan import Longest
from tandem.rl.preference_loss import PreferenceOptions
from tandem.rl.preference_step import Answers, preference_backward, preference_metrics
from tandem.rl.samples import Sequence
from tandem.rl.step import (
    Objective,
    PolicyBatch,
    policy_backward,
    sequence_log_probs,
    supervised_backward,
    supervised_loss,
)
from tandem.rl.trial_update import WorstBatch, trial_update


class GuardedPasses:
    """Passes of one run. None of them waits for another rank before it is through, so that all can do it again."""

    def __init__(self, config: Config, lm: LanguageModel, guard: MemoryGuard, objective: Objective) -> None:
        self._config, self._lm, self._guard, self._objective = config, lm, guard, objective
        self._preferences = PreferenceOptions(**config.preference.model_dump(exclude={"loss_type"}))

    @property
    def head(self) -> HeadOptions:
        """For the distribution that completions are drawn from."""
        rollout = self._config.rollout
        return self._sampled(temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p)

    @property
    def plain_head(self) -> HeadOptions:
        """For the model's own distribution."""
        return self._sampled(temperature=1.0, top_k=0, top_p=1.0)

    def _sampled(self, *, temperature: float, top_k: int, top_p: float) -> HeadOptions:
        size = self._guard.chunk_size
        return with_sampling(self._lm.head, temperature=temperature, top_k=top_k, top_p=top_p, chunk_size=size)

    def trial(self, longest: Longest, optimizer: torch.optim.Optimizer) -> int:
        """The largest pack that can come, forward and backward for nothing; returns its tokens."""
        config, lm = self._config, self._lm
        completion = max(min(longest.completion, lm.max_length - longest.prompt), 1)
        worst = WorstBatch.of(config, longest._replace(completion=completion))
        policy = config.algorithm.name == "grpo"
        entropy = policy and config.algorithm.entropy_coef > 0

        def attempt(size: int) -> int:
            one = worst.pack(size)
            trial_update(lm, optimizer, one, self.head if policy else self.plain_head, entropy=entropy)
            return one.num_tokens

        place = "in the trial of the largest pack"
        with random_kept(lm.device):
            return self._guard.run(attempt, lambda size: [worst.pack(size)], place=place)

    # Rollouts

    def log_probs(self, sequences: list[Sequence]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Log-probs and entropies of a rollout's sequences, those of other ranks' groups empty."""
        return self._guard.run(
            lambda size: sequence_log_probs(self._lm, self._own_packs(sequences, size), len(sequences), self.head),
            lambda size: self._own_packs(sequences, size),
        )

    def with_stored_log_probs(self, batch: PolicyBatch) -> PolicyBatch:
        """Log-probs of the policy at rollout time, where later steps need them, and of the reference policy."""
        config, algorithm = self._config, self._config.algorithm
        several = algorithm.num_iterations * config.train.steps_per_generation > 1
        in_reward = algorithm.beta > 0 and algorithm.kl_estimator == "k1"
        if several or in_reward or algorithm.top_entropy_quantile < 1:
            log_probs, entropies = self.log_probs(batch.sequences)
            if several or in_reward:
                batch.old_log_probs = distributed.merge(log_probs)
            if algorithm.top_entropy_quantile < 1:
                batch.entropies = distributed.merge(entropies)
        if algorithm.beta:
            with self._lm.model.disable_adapter():
                reference, _ = self.log_probs(batch.sequences)
            batch.ref_log_probs = distributed.merge(reference)
        return batch

    def policy(self, batch: PolicyBatch, meter: Meter) -> list[torch.Tensor]:
        """Add the gradient of the objective; returns the policy's log-probs, those of other ranks' groups empty."""
        config, lm = self._config, self._lm

        def attempt(size: int) -> tuple[list[torch.Tensor], Meter]:
            packs, recorder, own = self._own_packs(batch.sequences, size), Recorder(self._objective), Meter()
            policy_backward(
                lm,
                packs,
                batch,
                config.algorithm,
                self.head,
                own,
                max_completion_length=config.rollout.max_completion_length,
                objective=recorder,
            )
            return recorder.by_sequence(packs, len(batch.sequences), lm.device), own

        log_probs, own = self._guard.run(attempt, lambda size: self._own_packs(batch.sequences, size))
        meter.absorb(own)
        return log_probs

    def _own_packs(self, sequences: list[Sequence], size: int) -> list[Pack]:
        """The packs of this rank's groups."""
        config = self._config
        own = distributed.share(sequences, config.rollout.num_generations)
        return pack(own, size, share_prefix=config.train.share_prefix)

    # Preferences

    def preference(self, answers: Answers, meter: Meter) -> None:
        """Add the gradient of the preference objective."""

        def attempt(size: int) -> Meter:
            own, loss_type = Meter(), self._config.preference.loss_type
            preference_backward(
                self._lm, answers, loss_type, self._preferences, self.plain_head, own, max_tokens=size
            )  # fmt: skip
            return own

        shared = distributed.share(answers.sequences, answers.unit)
        meter.absorb(self._guard.run(attempt, lambda size: pack(shared, size)))

    def preference_metrics(self, answers: Answers) -> dict[str, float]:
        """Loss and metrics of held-out answers."""
        loss_type = self._config.preference.loss_type
        return self._guard.run(
            lambda size: preference_metrics(
                self._lm, answers, loss_type, self._preferences, self.plain_head, max_tokens=size
            ),
            lambda size: pack(answers.sequences, size),
        )

    def reference(self, sequences: list[Sequence]) -> list[torch.Tensor]:
        """Log-probs of a preference data set under the reference policy."""
        with self._lm.model.disable_adapter():
            return self._guard.run(
                lambda size: sequence_log_probs(self._lm, pack(sequences, size), len(sequences), self.plain_head),
                lambda size: pack(sequences, size),
                alone=True,  # another rank may have found them on disk
            )[0]

    # Examples

    def supervised(self, examples: list[Sequence], meter: Meter) -> None:
        """Add the gradient of the cross-entropy."""
        algorithm, shared = self._config.algorithm, distributed.share(examples, 1)

        def attempt(size: int) -> Meter:
            own = Meter()
            supervised_backward(
                self._lm,
                pack(shared, size),
                examples,
                self.plain_head,
                own,
                label_smoothing=algorithm.label_smoothing_factor,
                z_loss=algorithm.z_loss_coef,
            )
            return own

        meter.absorb(self._guard.run(attempt, lambda size: pack(shared, size)))

    def supervised_loss(self, examples: list[Sequence]) -> float:
        """Mean cross-entropy of held-out examples, nats per token."""
        return self._guard.run(
            lambda size: supervised_loss(self._lm, examples, size, self.plain_head), lambda size: pack(examples, size)
        )
