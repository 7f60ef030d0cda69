"""The numbers of a step: statistics over micro-batches, and what is known once a rollout batch is scored."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tandem.rl.samples import Scored

How = Literal["mean", "sum", "min", "max", "std"]
_HOWS = ("mean", "sum", "min", "max", "std")

# A group counts as having no spread at or below this, the absolute tolerance of `torch.isclose` that TRL uses.
_ZERO_STD = 1e-8


@dataclass
class _Series:
    how: How
    values: array[float] = field(default_factory=lambda: array("d"))
    weights: array[float] = field(default_factory=lambda: array("d"))
    waiting: list[tuple[Any, Any]] = field(default_factory=list)

    def take(self, name: str, values: Any, weight: Any) -> None:
        numbers = _numbers(values)
        if weight is None:
            self.values.extend(numbers)
            self.weights.extend([1.0] * len(numbers))
            return
        weights = _weights(name, weight, len(numbers))
        kept = [(v, w) for v, w in zip(numbers, weights, strict=True) if w != 0.0]
        self.values.extend(v for v, _ in kept)
        self.weights.extend(w for _, w in kept)

    def settle(self, name: str) -> None:
        for values, weight in self.waiting:
            self.take(name, values, weight)
        self.waiting.clear()


class Meter:
    """Named statistics, fed pack by pack, whose result does not depend on how the data was cut into packs.

    Values are kept in float64 (16 bytes each with their weight) until `result`, and sums are correctly rounded
    (`math.fsum`), so that the order and the number of the calls change no bit of the outcome. Tensors on a GPU are
    read when a result is asked for (`settle`).
    """

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}

    def add(self, name: str, values: Any, how: How = "mean", weight: Any = None) -> None:
        """Take in values under a name.

        Args:
            name: name of the metric; the order of first use is the order of `result`.
            values: a number, a (nested) sequence of numbers, or a tensor or array of any shape.
            how: the statistic. `std` is the sample standard deviation (n - 1), nan for fewer than two values.
            weight: how often a value counts: one number for all, or as many as there are values, for example a loss
                mask [B, L] or the number of tokens behind a mean. Values of weight 0 are left out, nan or not.

        Raises:
            ValueError: an unknown `how`, a name that was used with another one, weights of another size, or a
                negative weight.
        """
        if how not in _HOWS:
            raise ValueError(f"how={how!r} for metric {name!r}; use one of {', '.join(_HOWS)}")
        series = self._series.setdefault(name, _Series(how))
        if series.how != how:
            raise ValueError(f"metric {name!r} was added with how={series.how!r} before and now with how={how!r}")
        if getattr(values, "is_cuda", False):
            # To read it now would wait for all that the device has been given to do.
            series.waiting.append((values.detach(), weight))
        else:
            series.take(name, values, weight)

    def settle(self) -> None:
        """Read what is still on a device."""
        for name, series in self._series.items():
            series.settle(name)

    def absorb(self, other: Meter) -> None:
        """Take in everything that another meter holds, as if it had been added here."""
        self.settle()
        other.settle()
        for name, series in other._series.items():
            own = self._series.setdefault(name, _Series(series.how))
            own.values.extend(series.values)
            own.weights.extend(series.weights)

    def result(self) -> dict[str, float]:
        """Every statistic by its name. Without any value a sum is 0 and everything else nan."""
        self.settle()
        return {name: _statistic(series) for name, series in self._series.items()}


def _numbers(values: Any) -> list[float]:
    # Tensors and arrays know `reshape` and `tolist`; neither torch nor numpy needs to be imported for that.
    if hasattr(values, "tolist"):
        if hasattr(values, "reshape"):
            values = values.reshape(-1)
        values = values.tolist()
        if isinstance(values, list):
            return values  # flat and made of numbers, so there is nothing to convert: tensors are large
    if isinstance(values, Iterable) and not isinstance(values, str):
        return [number for value in values for number in _numbers(value)] if _nested(values) else _floats(values)
    return [float(values)]


def _nested(values: Iterable[Any]) -> bool:
    return isinstance(values, Sequence) and any(not isinstance(v, (int, float)) for v in values)


def _floats(values: Iterable[Any]) -> list[float]:
    return [float(v) for v in values]


def _weights(name: str, weight: Any, count: int) -> list[float]:
    weights = _numbers(weight)
    if len(weights) == 1:
        weights = weights * count
    if len(weights) != count:
        raise ValueError(f"metric {name!r} has {count} values but {len(weights)} weights")
    if any(not w >= 0.0 for w in weights):
        raise ValueError(f"metric {name!r} has a negative or nan weight")
    return weights


def _statistic(series: _Series) -> float:
    values, weights = series.values, series.weights
    if series.how == "sum":
        return _dot(values, weights)
    if not values:
        return math.nan
    if series.how in ("min", "max"):
        if any(math.isnan(v) for v in values):
            return math.nan
        return min(values) if series.how == "min" else max(values)
    count = math.fsum(weights)
    mean = _dot(values, weights) / count
    if series.how == "mean":
        return mean
    if count <= 1.0:
        return math.nan
    return math.sqrt(_dot([(v - mean) ** 2 for v in values], weights) / (count - 1.0))


def _dot(values: Iterable[float], weights: Iterable[float]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        products = np.asarray(values, dtype=np.float64) * np.asarray(weights, dtype=np.float64)
        if np.isfinite(products).all():
            return math.fsum(products.tolist())
        return float(products.sum())  # fsum refuses opposite infinities; the plain sum gives the nan that belongs there


def rollout_metrics(rows: Sequence[Scored]) -> dict[str, float]:
    """Rewards and lengths of one scored batch, by TRL's names and definitions, and what is only watched.

    A row to which no reward applies, or whose group is skipped because one failed there, counts in the lengths and in
    no statistic of the total. Standard deviations are sample deviations (n - 1) and nan for fewer than two values.
    `reward_std` is taken over the whole batch, as TRL logs it; `frac_reward_zero_std` is the share of completions whose
    group's rewards are all equal, thus without advantage (a group of one completion counts as such).

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rollout_metrics needs at least one completion")
    totals = [applicable_total(row) for row in rows]
    metrics = {
        "reward": _nan_mean(totals),
        "reward_std": _nan_std(totals),
        "frac_reward_zero_std": _share_without_spread(rows, totals),
    }
    for name in reward_names(rows):
        values = [_or_nan(row.rewards.get(name)) for row in rows]
        metrics[f"rewards/{name}/mean"] = _nan_mean(values)
        metrics[f"rewards/{name}/std"] = _nan_std(values)
    for name in dict.fromkeys(name for row in rows for name in row.errors):
        metrics[f"rewards/errors/{name}"] = float(sum(name in row.errors for row in rows))
    if skipped := {row.group for row in rows if row.skipped}:
        metrics["rewards/skipped_groups"] = float(len(skipped))
    for name in dict.fromkeys(name for row in rows for name in row.watched):
        values = [_or_nan(row.watched.get(name)) for row in rows]
        metrics[f"watch/rewards/{name}/mean"] = _nan_mean(values)
        metrics[f"watch/rewards/{name}/std"] = _nan_std(values)
    return metrics | _lengths(rows) | _episodes(rows)


def reward_names(rows: Iterable[Scored]) -> list[str]:
    """Names of the reward functions, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.rewards))


def applicable_total(row: Scored) -> float:
    """The total of a row; nan where no reward applies to it, or its group is skipped."""
    # Rollouts from before `missing` was recorded say so by their values alone.
    missing = row.missing or (row.rewards and all(value is None for value in row.rewards.values()))
    return math.nan if row.skipped or missing else row.reward


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _share_without_spread(rows: Sequence[Scored], totals: list[float]) -> float:
    groups: dict[int, list[float]] = {}
    for row, total in zip(rows, totals, strict=True):
        groups.setdefault(row.group, []).append(total)
    flat = sum(len(g) for g in groups.values() if len(g) == 1 or _nan_std(g) <= _ZERO_STD)
    return flat / len(rows)


def _lengths(rows: Sequence[Scored]) -> dict[str, float]:
    lengths = [row.completion.num_sampled for row in rows]
    # TRL reports 0 where no completion ended by itself.
    terminated = [row.completion.num_sampled for row in rows if not row.completion.truncated] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(row.completion.truncated for row in rows) / len(rows),
        "completions/mean_terminated_length": sum(terminated) / len(terminated),
        "completions/min_terminated_length": float(min(terminated)),
        "completions/max_terminated_length": float(max(terminated)),
    }


def _episodes(rows: Sequence[Scored]) -> dict[str, float]:
    """Turns and tool calls, by TRL's names where it has one; nothing where completions are single turns."""
    episodes = [row.completion.episode for row in rows if row.completion.episode is not None]
    if not episodes:
        return {}
    calls = sum(episode.calls for episode in episodes)
    return {
        "tools/call_frequency": calls / len(episodes),
        "tools/failure_frequency": sum(episode.failed_calls for episode in episodes) / calls if calls else 0.0,
        "episodes/mean_turns": sum(episode.turns for episode in episodes) / len(episodes),
        "episodes/done_ratio": sum(episode.ending == "done" for episode in episodes) / len(episodes),
        "episodes/failed_ratio": sum(episode.ending in ("time", "error") for episode in episodes) / len(episodes),
    }


def _nan_mean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else math.nan


def _nan_std(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    if len(known) < 2:
        return math.nan
    mean = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1))
