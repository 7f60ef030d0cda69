"""The way back from a step that is under way to the end of the last one, in memory."""

from __future__ import annotations

from copy import deepcopy

import torch

from tandem.rl.checkpoint import State, random_state, set_random_state
from tandem.rl.lora import trainable
from tandem.rl.model import LanguageModel
from tandem.rl.optim import optimizer_tensors, restore_optimizer


class Rewind:
    """Remembers where a run stood, so that an unfinished step can be taken back to the byte.

    Counters and random states are copied at every mark. Weights and moments change in optimiser steps alone, so they
    need copying only where a step under way has more than one: `keep` takes them to host memory, about 12 bytes for
    each of the adapter's parameters.
    """

    def __init__(self, lm: LanguageModel, optimizer: torch.optim.Optimizer, state: State) -> None:
        self._parameters, self._optimizer, self._state = trainable(lm), optimizer, state
        self.mark()

    def mark(self) -> None:
        """Everything is whole here."""
        self._then = deepcopy(vars(self._state))
        self._random = random_state()
        self._weights: dict[str, torch.Tensor] | None = None
        self._moments: dict[str, torch.Tensor] = {}

    @property
    def has_weights(self) -> bool:
        """Whether `back` also undoes optimiser steps."""
        return self._weights is not None

    @property
    def possible(self) -> bool:
        """Whether there is a way back: no optimiser step was finished since the mark, or `keep` came before it."""
        return self.has_weights or self._state.step == self._then["step"]

    def keep(self) -> None:
        """Copy weights and moments. To be called before the first optimiser step since the mark."""
        if self._weights is None:
            self._moments = optimizer_tensors(self._optimizer, self._parameters)
            self._weights = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters}

    def back(self) -> None:
        """Return to the mark. Without `keep` there must not have been an optimiser step since."""
        for name, value in self._then.items():
            setattr(self._state, name, value)
        if self._weights is not None:
            with torch.no_grad():
                for name, parameter in self._parameters:
                    parameter.copy_(self._weights[name])
            self._optimizer.state.clear()  # what the first optimiser step made was not there before
            restore_optimizer(self._optimizer, self._parameters, self._moments)
        set_random_state(dict(self._random))
        self.mark()
