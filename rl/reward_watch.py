"""Reward watch: looks at every rollout that was learned from for signs that the reward is being hacked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from tandem.rewards.repetition import repeated_share
from tandem.rl.config import Config
from tandem.rl.metrics import applicable_total
from tandem.rl.samples import Scored
from tandem.rl.watch_alerts import LENGTH, REWARD, Alert, find_alerts, trend
from tandem.rl.watch_config import WatchConfig
from tandem.rl.watch_measures import collapsed_share, correlation, duplicate_share, mean_known, near_best
from tandem.rl.watch_memory import Observation, WatchMemory, pair_key
from tandem.rl.watch_roles import Roles, roles_of

Values = dict[str, list[float | None]]


class RewardWatch:
    """The watch of one run; what it remembers is handed to it, since a checkpoint keeps that."""

    def __init__(self, config: Config) -> None:
        self._options, self._roles = config.watch, roles_of(config)

    def take(self, rows: Sequence[Scored], memory: WatchMemory, step: int) -> tuple[dict[str, float], list[Alert]]:
        """Measure a rollout batch and remember it.

        Args:
            rows: the whole batch, of all ranks. step: optimiser steps that are finished.

        Returns:
            Metrics under `watch/`, nan where one is not known (yet), and the alerts that are due.
        """
        values = _values(rows)
        for name, column in values.items():
            known = [v for v in column if v is not None]
            if known:
                low, high = memory.extremes.get(name, [math.inf, -math.inf])
                memory.extremes[name] = [min(low, *known), max(high, *known)]
        seen = observe(rows, values, self._roles, self._options, memory.extremes)
        memory.rollouts = [*memory.rollouts, seen][-self._options.window :]
        alerts = []
        for alert in find_alerts(memory, self._roles, self._options):
            if step - memory.said.get(alert.key, -self._options.alert_steps) >= self._options.alert_steps:
                memory.said[alert.key] = step
                memory.raised += 1
                alerts.append(alert)
        return self._metrics(seen, memory), alerts

    def _metrics(self, seen: Observation, memory: WatchMemory) -> dict[str, float]:
        least = self._options.min_rollouts
        reward, length = (trend(memory.rollouts, name, least) for name in (REWARD, LENGTH))
        pairs = [seen.correlations[pair_key(*pair)] for pair in combinations(self._roles.components, 2)]
        agreement = {"component_correlation": min((c for c in pairs if c is not None), default=None)} if pairs else {}
        found: dict[str, float | None] = {
            "length_correlation": seen.correlations[pair_key(REWARD, LENGTH)],
            "length_growth": length.growth if length else None,
            "reward_change": reward.effect if reward else None,
            **seen.levels,
            **agreement,
            **{
                f"rewards/{name}/correlation": seen.correlations[pair_key(REWARD, name)] for name in self._roles.watched
            },
            "alerts": float(memory.raised),
        }
        return {f"watch/{name}": math.nan if value is None else value for name, value in found.items()}


def observe(
    rows: Sequence[Scored], values: Values, roles: Roles, options: WatchConfig, extremes: dict[str, list[float]]
) -> Observation:
    """What is remembered of one rollout batch.

    Args:
        values: of `reward`, `length` and `rewards/NAME` by row. extremes: of the run so far, this batch included.
    """
    groups = [row.group for row in rows]
    ids = [tuple(row.completion.ids) for row in rows]
    best = near_best(*extremes.get(REWARD, [0.0, 0.0]))
    nothing: list[float | None] = [None] * len(rows)

    def between(first: str, second: str) -> float | None:
        return correlation(values.get(first, nothing), values.get(second, nothing), groups)

    correlations = {pair_key(REWARD, LENGTH): between(REWARD, LENGTH)}
    for name in roles.watched:
        correlations[pair_key(REWARD, name)] = between(REWARD, f"rewards/{name}")
    for first, second in combinations(roles.components, 2):
        found = between(f"rewards/{first}", f"rewards/{second}")
        sign = roles.components[first] * roles.components[second]
        correlations[pair_key(first, second)] = None if found is None else sign * found
    return Observation(
        means={name: mean_known(column) for name, column in values.items()},
        spreads={name: _spread(column) for name, column in values.items()},
        correlations=correlations,
        levels={
            "repetition": mean_known([repeated_share(_sampled(row), options.repetition_ngram) for row in rows]),
            "duplicates": duplicate_share(ids, groups),
            "collapsed_groups": collapsed_share(ids, values[REWARD], groups, best),
        },
    )


def _values(rows: Sequence[Scored]) -> Values:
    """What trends and correlations are about, by row."""
    totals = [applicable_total(row) for row in rows]
    values: Values = {
        REWARD: [None if math.isnan(total) else total for total in totals],
        LENGTH: [float(row.completion.num_sampled) for row in rows],
    }
    for name in dict.fromkeys(name for row in rows for name in [*row.rewards, *row.watched]):
        values[f"rewards/{name}"] = [row.rewards.get(name, row.watched.get(name)) for row in rows]
    return values


def _sampled(row: Scored) -> Sequence[int]:
    completion = row.completion
    if completion.mask is None:
        return completion.ids
    return [token for token, sampled in zip(completion.ids, completion.mask, strict=True) if sampled]


def _spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation over the completions."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known))
