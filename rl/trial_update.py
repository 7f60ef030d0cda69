"""The largest pack that a run can come to, once forward and backward before anything is learned.

Whether a run fits then shows in its first minute, and not when the first long completions come. Weights, gradients and
random state are afterwards what they were before; the optimiser's moments are there, all zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.config import Config
from tandem.rl.lora import trainable
from tandem.rl.model import LanguageModel
from tandem.rl.optim import allocate_moments
from tandem.rl.packing import Pack, pack
from tandem.rl.plan import Longest
from tandem.rl.samples import Sequence
from tandem.rl.step import pack_log_probs, training_mode


@dataclass(frozen=True)
class WorstBatch:
    """The most that one optimiser step can be given.

    Attributes:
        longest: tokens of the longest sequence. count: sequences. group: how many have one prompt.
        shared: a group's prompt is computed once.
    """

    longest: Longest
    count: int
    group: int
    shared: bool

    @classmethod
    def of(cls, config: Config, longest: Longest) -> WorstBatch:
        train = config.train
        if config.algorithm.name == "grpo":
            group = config.rollout.num_generations
            return cls(longest, config.generation_batch_size // train.steps_per_generation, group, train.share_prefix)
        if config.algorithm.name == "sft":
            return cls(longest, train.per_device_train_batch_size, 1, False)
        pairs = config.prompts_per_rollout if config.uses_rollouts else train.per_device_train_batch_size
        return cls(longest, 2 * pairs, 2, True)

    def pack(self, max_tokens: int) -> Pack:
        """The fullest pack of at most `max_tokens` tokens: sequences of full length, and one to fill it up. It is
        larger where one sequence is, and smaller where the whole batch is."""
        prompt, completion = self.longest
        inputs = completion - 1  # the last token predicts nothing and is left out
        length = prompt + inputs
        prompts = -(-self.count // self.group) if self.shared else self.count
        room = max(length, min(max_tokens, prompts * prompt + self.count * inputs))
        sequences: list[Sequence] = []
        while room and (cost := inputs if self.shared and len(sequences) % self.group else length) <= room:
            sequences.append(_sequence(prompt, completion, family=len(sequences) // self.group if self.shared else -1))
            room -= cost
        if room:
            sequences.append(_sequence(1, room))
        (one,) = pack(sequences, max(length, max_tokens))
        return one


def trial_update(
    lm: LanguageModel, optimizer: torch.optim.Optimizer, one: Pack, head: HeadOptions, *, entropy: bool
) -> None:
    """`one` forward and backward, beside moments and the gradients of an earlier pack, which are then removed.

    Args:
        entropy: the objective has a gradient of the entropy too.
    """
    allocate_moments(optimizer)
    for _, parameter in trainable(lm):
        parameter.grad = torch.zeros_like(parameter)
    with training_mode(lm):
        scores = pack_log_probs(lm, one, head)
        roots = [scores.log_probs, scores.entropy] if entropy else [scores.log_probs]
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    optimizer.zero_grad(set_to_none=True)


def _sequence(prompt: int, completion: int, *, family: int = -1) -> Sequence:
    """All of it scored. The first tokens of a vocabulary are in every one."""
    return Sequence([0] * prompt, [1] * completion, [True] * completion, family=family)
