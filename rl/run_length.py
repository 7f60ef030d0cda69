"""How many optimiser steps a run has."""

from __future__ import annotations

import math

from tandem.rl.config import Config


def total_steps(config: Config, num_rows: int) -> int:
    """Optimiser steps of the whole run."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    rows = config.train.num_train_epochs * num_rows
    if not config.uses_rollouts:
        return max(math.ceil(rows / config.train.per_device_train_batch_size), 1)
    rollouts = max(math.ceil(rows / config.prompts_per_rollout), 1)
    if config.algorithm.name == "online_dpo":
        return rollouts
    return rollouts * config.train.steps_per_generation * config.algorithm.num_iterations
