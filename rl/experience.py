"""From scored completions to what an optimiser step learns from."""

from __future__ import annotations

import math

import numpy as np
import torch

from tandem.rl.advantages import advantages, uniform_groups
from tandem.rl.config import AlgorithmConfig, Config
from tandem.rl.distributed import interleave
from tandem.rl.metrics import applicable_total
from tandem.rl.preference_step import Answers
from tandem.rl.samples import Scored, Sequence
from tandem.rl.step import PolicyBatch
from tandem.rl.turn_advantages import returns_to_go, turn_advantages, turn_numbers, turn_rewards, turns_of


def in_order(parts: list[list[Scored]], num_generations: int) -> list[Scored]:
    """The ranks' scored completions as one batch, groups in the order of its prompts and numbered anew."""
    groups = [[rows[i : i + num_generations] for i in range(0, len(rows), num_generations)] for rows in parts]
    whole = interleave(groups)
    for number, group in enumerate(whole):
        for row in group:
            row.group = number
    return [row for group in whole for row in group]


def with_advantages(rows: list[Scored], config: Config, penalties: list[float] | None = None) -> list[Scored]:
    """Fill in the advantages of a scored batch whose groups stand one after the other; 0 in groups that are skipped.

    Args:
        penalties: subtracted from each row's reward first (KL in the reward).
    """
    shape = (-1, config.rollout.num_generations)
    kept = [row for row in rows if not row.skipped]
    if not kept:
        return rows
    rewards = np.array([applicable_total(row) for row in kept], dtype=np.float64)
    if penalties is not None:
        rewards -= np.array([penalty for penalty, row in zip(penalties, rows, strict=True) if not row.skipped])
    if config.algorithm.advantage_level == "turn":
        _fill_in_by_turn(kept, rewards, config)
        return rows
    names = config.reward_names()
    values = [[np.nan if (v := row.rewards.get(n)) is None else v for n in names] for row in kept]
    result = advantages(
        rewards.reshape(shape),
        config.algorithm,
        components=np.array(values, dtype=np.float64).reshape(*shape, len(names)),
        weights=np.array([spec.weight for spec in config.rewards.reward_funcs]),
    )
    for row, advantage in zip(kept, result.reshape(-1), strict=True):
        row.advantage = float(advantage)
    return rows


def _fill_in_by_turn(rows: list[Scored], totals: np.ndarray, config: Config) -> None:
    """The same for every turn. `totals`: `[rows]` rewards of whole episodes, nan where there is none."""
    turns = [turns_of(row.completion) for row in rows]
    own = {spec.label: spec.weight for spec in config.rewards.reward_funcs if spec.function == "environment"}
    returns: list[list[float] | None] = []
    for row, total in zip(rows, totals, strict=True):
        if math.isnan(total):
            returns.append(None)
            continue
        weight = next((weight for name, weight in own.items() if row.rewards.get(name) is not None), None)
        given = turn_rewards(row.completion, float(total), weight)
        returns.append(returns_to_go(given, config.algorithm.turn_discount))
    found = turn_advantages(returns, turns, config.rollout.num_generations, config.algorithm)
    for row, values in zip(rows, found, strict=True):
        row.turn_advantages = values
        row.advantage = math.fsum(values) / len(values)


def advantages_to(batch: PolicyBatch, rows: list[Scored]) -> None:
    """Hand the rows' advantages to their sequences, by token where turns have their own."""
    batch.advantages = [row.advantage for row in rows]
    if not any(row.turn_advantages for row in rows):
        return
    batch.token_advantages = []
    for row, sequence in zip(rows, batch.sequences, strict=True):
        known = row.turn_advantages or [0.0] * turns_of(row.completion)  # of a group that is skipped
        numbers = turn_numbers(row.completion.sampled) if sequence.num_scored else []
        batch.token_advantages.append(torch.tensor([known[n] for n in numbers], dtype=torch.float64))


def learned_from(rows: list[Scored], config: Config) -> list[int]:
    """Rows whose group takes part in the batch: not where a reward failed that leaves its group out, nor, where the
    config says so, where no rewards differ."""
    size = config.rollout.num_generations
    uniform = uniform_groups(np.array([applicable_total(row) for row in rows]).reshape(-1, size))
    if config.algorithm.advantage_level == "turn":  # equal in the whole, and yet different on the way
        differs = [len(row.turn_advantages) > 1 and any(row.turn_advantages) for row in rows]
        uniform &= ~np.array(differs).reshape(-1, size).any(axis=1)
    left_out = uniform & config.algorithm.drop_uniform_groups
    return [i for i, row in enumerate(rows) if not row.skipped and not left_out[i // size]]


def kl_penalties(batch: PolicyBatch, algorithm: AlgorithmConfig) -> list[float] | None:
    """β·Σ(ℓ_old − ℓ_ref) of every completion, the k1 estimate of its KL, where it belongs in the reward."""
    if not algorithm.beta or algorithm.kl_estimator != "k1":
        return None
    assert batch.old_log_probs is not None
    assert batch.ref_log_probs is not None
    pairs = zip(batch.old_log_probs, batch.ref_log_probs, strict=True)
    return [algorithm.beta * float((old.double() - ref.double()).sum()) for old, ref in pairs]


def policy_batch(rows: list[Scored], *, mask_truncated: bool) -> PolicyBatch:
    """Sequences to train on, with loss on sampled tokens; a truncated completion carries none if `mask_truncated`."""
    sequences, log_probs = [], []
    for row in rows:
        completion = row.completion
        scored = not (mask_truncated and completion.truncated)
        mask = [scored and sampled for sampled in completion.sampled]
        sequences.append(Sequence(row.prompt.ids, completion.ids, mask, family=row.group))
        log_probs.append([value for value, kept in zip(completion.log_probs, mask, strict=True) if kept])
    return PolicyBatch(sequences, [row.advantage for row in rows], log_probs)


def best_and_worst(rows: list[Scored], num_generations: int) -> Answers:
    """A pair from every group whose rewards differ, but for skipped ones: its best completion against its worst, the
    first of equals."""
    sequences: list[Sequence] = []
    for start in range(0, len(rows), num_generations):
        group = rows[start : start + num_generations]
        if group[0].skipped:
            continue
        best, worst = max(group, key=lambda r: r.reward), min(group, key=lambda r: r.reward)
        if best.reward > worst.reward:
            for row in (best, worst):
                ids, mask = row.completion.ids, row.completion.sampled
                sequences.append(Sequence(row.prompt.ids, ids, mask, family=row.group, unit=row.group))
    return Answers(sequences)
