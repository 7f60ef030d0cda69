"""Rewards made from other rewards' values: a gate, the minimum, ranks within a group.

Each is an entry of its own that names others; give those a weight of 0, so that they are logged but count only through
the combination:

    reward_funcs:
      - {function: tag_format, weight: 0}
      - {function: math_answer, weight: 0}
      - {function: gate, kwargs: {first: tag_format, then: math_answer}}

A function of your own combines too if it names the argument `rewards_by_name` (`{name: [value, …]}`); it may also name
`group_numbers` (which completions share a prompt).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from tandem.rl.errors import UserError

Values = dict[str, list[float | None]]


def gate(
    rewards_by_name: Values, first: str | list[str], then: str, threshold: float = 1.0, closed: float = 0.0
) -> list[float | None]:
    """The value of `then` where every reward of `first` reaches the threshold, else `closed`.

    None where a reward of `first` is None and no other one closes the gate, or where the gate is open and `then` is
    None.

    Args:
        rewards_by_name: values of the other rewards.
        first: names of the rewards that must be reached first, such as a format.
        then: name of the reward behind the gate.
        threshold: what each of `first` must reach.
        closed: value behind a closed gate.

    Raises:
        UserError: there is no reward of a name before this one.

    >>> gate({"format": [1.0, 0.0], "right": [0.5, 1.0]}, first="format", then="right")
    [0.5, 0.0]
    """
    names = [first] if isinstance(first, str) else list(first)
    *conditions, behind = _chosen(rewards_by_name, [*names, then])
    results: list[float | None] = []
    for *values, value in zip(*conditions, behind, strict=True):
        if any(v is not None and v < threshold for v in values):
            results.append(closed)
        else:
            results.append(None if None in values else value)
    return results


def minimum(rewards_by_name: Values, of: list[str]) -> list[float | None]:
    """The smallest of the rewards' values, None where none applies: all of them must be good.

    Args:
        rewards_by_name: values of the other rewards.
        of: names of the rewards.

    Raises:
        UserError: there is no reward of a name before this one.

    >>> minimum({"a": [1.0, 0.5], "b": [0.2, None]}, of=["a", "b"])
    [0.2, 0.5]
    """
    return [
        min((v for v in row if v is not None), default=None) for row in zip(*_chosen(rewards_by_name, of), strict=True)
    ]


def group_ranks(rewards_by_name: Values, group_numbers: Sequence[int], of: str) -> list[float | None]:
    """The rank of a reward's value within its group: 0.0 for the worst, 1.0 for the best, equal values share the mean.

    Only the order counts then, not the distances: for judges whose scale drifts. None where the reward is None; 0.5 for
    a value that has no other to compare with.

    Args:
        rewards_by_name: values of the other rewards.
        group_numbers: the group of each completion.
        of: name of the reward.

    Raises:
        UserError: there is no reward of that name before this one.

    >>> group_ranks({"score": [7.0, 9.0, 7.0]}, [0, 0, 0], of="score")
    [0.25, 1.0, 0.25]
    """
    (values,) = _chosen(rewards_by_name, [of])
    groups: dict[int, list[float]] = {}
    for group, value in zip(group_numbers, values, strict=True):
        if value is not None:
            groups.setdefault(group, []).append(value)
    ordered = {group: sorted(known) for group, known in groups.items()}
    return [
        None if value is None else _rank(value, ordered[group])
        for group, value in zip(group_numbers, values, strict=True)
    ]


def _rank(value: float, ordered: list[float]) -> float:
    if len(ordered) == 1:
        return 0.5
    return (bisect_left(ordered, value) + bisect_right(ordered, value) - 1) / 2 / (len(ordered) - 1)


def _chosen(values: Values, names: Any) -> list[list[float | None]]:
    if isinstance(names, str) or not names:
        raise UserError(f"the names of rewards to combine are {names!r}", fix="give a list of names")
    if missing := [name for name in names if name not in values]:
        raise UserError(
            f"there is no reward {missing[0]!r} to combine",
            reason=f"the rewards computed before are {', '.join(values) or 'none'}",
            fix="name an entry of reward_funcs; a combination of combinations comes after them",
        )
    return [values[name] for name in names]
