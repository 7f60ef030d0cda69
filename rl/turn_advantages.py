"""Advantages by turn: how much better an episode went on from a turn than others of its group did from the same turn.

The return of turn k is what follows from it, G_k = Σ_{j≥k} γ^(j−k)·r_j: what came before is no merit of the turn
(Baxter and Bartlett 2001, GPOMDP). Its baseline is the mean return of the group's episodes at the same turn, and it is
scaled as the config says for episodes. That is credit assignment by turn as in MT-GRPO ("Reinforcing Multi-Turn
Reasoning in LLM Agents via Turn-Level Credit Assignment", arXiv 2505.11821), with the return of a turn where that has a
sum of two advantages, the turn's and the outcome's. All tokens of a turn have the turn's advantage. For episodes of a
single turn it is the advantage of `rl.advantages`, number for number.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from tandem.rl.advantages import compared
from tandem.rl.config import AlgorithmConfig
from tandem.rl.samples import Completion


def turns_of(completion: Completion) -> int:
    """Assistant turns; 1 for an episode that broke off before its first one."""
    return 1 if completion.episode is None else max(len(completion.episode.turn_rewards), 1)


def turn_rewards(completion: Completion, total: float, weight: float | None) -> list[float]:
    """What each turn is given of an episode's total reward.

    What the environment's `step` gave goes to its turn, and everything else, which is known only at the end, to the
    last turn. The sum is the total, so that turns share out the reward of the episode and change nothing of it.

    Args:
        total: weighted sum of the episode's rewards.
        weight: of the environment's own reward in it; None: it is no part of it.
    """
    given = [0.0] * turns_of(completion)
    if completion.episode is not None and weight is not None:
        given[: len(completion.episode.turn_rewards)] = [weight * (r or 0.0) for r in completion.episode.turn_rewards]
    given[-1] = total - sum(given[:-1])
    return given


def returns_to_go(rewards: Sequence[float], discount: float) -> list[float]:
    """G_k = r_k + γ·G_{k+1}, for every turn.

    >>> returns_to_go([1.0, 0.0, 4.0], 0.5)
    [2.0, 2.0, 4.0]
    """
    returns: list[float] = []
    following = 0.0
    for reward in reversed(rewards):
        following = reward + discount * following
        returns.append(following)
    return returns[::-1]


def turn_advantages(
    returns: Sequence[Sequence[float] | None], turns: Sequence[int], num_generations: int, options: AlgorithmConfig
) -> list[list[float]]:
    """Advantages of the turns of episodes whose groups stand one after the other.

    A turn that no other episode of its group has reached has nothing to be compared with: it is 0, except where the
    baseline is the batch's.

    Args:
        returns: of each turn of each episode; None: the episode has no reward, takes part in no comparison, and its
            advantages are 0.
        turns: of each episode.
        num_generations: episodes of a group.
    """
    shape = (len(turns) // num_generations, num_generations, max(turns))
    table = np.full(shape, np.nan)
    for row, (known, count) in enumerate(zip(returns, turns, strict=True)):
        if known is not None:
            table[row // num_generations, row % num_generations, :count] = known
    found = compared(table, ~np.isnan(table), options)
    return [row[:count].tolist() for row, count in zip(found.reshape(len(turns), -1), turns, strict=True)]


def turn_numbers(sampled: Sequence[bool]) -> list[int]:
    """The turn of every sampled token, from 0. Between two turns there is always something that was not sampled."""
    numbers: list[int] = []
    turn = 0
    for is_turn, tokens in groupby(sampled):
        if is_turn:
            numbers += [turn] * len(list(tokens))
            turn += 1
    return numbers
