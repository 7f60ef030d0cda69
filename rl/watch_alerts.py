"""When what reward watch has measured is worth a word: six signs that a reward is being hacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from tandem.rl.watch_config import AlertName, WatchConfig
from tandem.rl.watch_measures import Change, change, mean_known, near_best
from tandem.rl.watch_memory import Observation, WatchMemory, pair_key
from tandem.rl.watch_roles import Roles

REWARD, LENGTH = "reward", "length"
# A reward of the answer whose t is below this shows no sign of a rise.
_NO_RISE = 1.0

_FIXES: dict[AlertName, str] = {
    "length_hacking": "read the longest completions; add overlong_penalty or length_penalty, or reward the answer "
    "alone",
    "format_only_gain": "read completions with the format and a wrong answer; lower the weight of the format, or put "
    "the answer behind it with gate",
    "repetition": "read the completions; add repetition_penalty, lower optim.learning_rate or raise algorithm.beta",
    "collapsed_groups": "raise rollout.temperature or algorithm.entropy_coef, lower optim.learning_rate, or use other "
    "prompts",
    "components_diverge": "read completions that are good in one and bad in the other; change the weights, or combine "
    "the rewards with gate or minimum",
    "watched_falls": "read completions with a high reward and a low watched value: the reward misses what the watched "
    "function sees; correct it, and go on from an earlier checkpoint",
}


@dataclass(frozen=True)
class Alert:
    """One sign of reward hacking.

    Attributes:
        name: which of the six. about: the rewards concerned, empty where it is the total.
        value: what was measured. threshold: the limit that it is beyond.
        message: both in words. fix: what to do.
    """

    name: AlertName
    about: str
    value: float
    threshold: float
    message: str

    @property
    def fix(self) -> str:
        return _FIXES[self.name]

    @property
    def key(self) -> str:
        return f"{self.name} {self.about}".strip()

    def record(self) -> dict[str, Any]:
        """As it stands in `metrics.jsonl`."""
        return {**asdict(self), "fix": self.fix}

    def text(self) -> str:
        return f"reward watch, {self.key}: {self.message}. What to do: {self.fix}"


def find_alerts(memory: WatchMemory, roles: Roles, options: WatchConfig) -> list[Alert]:
    """Everything that the rollouts of the memory give reason for, the newest rollout included; said before or not."""
    signs = _Signs(memory, roles, options)
    found = [*signs.length(), *signs.format_only(), *signs.levels(), *signs.components(), *signs.watched()]
    return [alert for alert in found if alert.name in options.alerts]


class _Signs:
    def __init__(self, memory: WatchMemory, roles: Roles, options: WatchConfig) -> None:
        self._rollouts, self._extremes = memory.rollouts, memory.extremes
        self._roles, self._options = roles, options
        self._reward = self._change(REWARD)

    def length(self) -> Iterator[Alert]:
        """Longer is better, and it gets longer, and better: no proof, since thinking longer may be right."""
        length, value = self._change(LENGTH), self._newer(pair_key(REWARD, LENGTH))
        if length is None or value is None or not self._rises(self._reward):
            return
        limit = self._options.length_correlation
        if value >= limit and length.growth >= self._options.length_growth and length.t >= self._options.trend_t:
            yield Alert(
                "length_hacking",
                "",
                value,
                limit,
                f"reward and length rise together ({length.before:.4g} to {length.after:.4g} tokens) and correlate by "
                f"{value:.2f} within groups (limit {limit:g})",
            )

    def format_only(self) -> Iterator[Alert]:
        """A reward for form rises while none for the answer does, unless one is as good as it gets."""
        answers = {name: c for name in self._roles.answer if (c := self._change(f"rewards/{name}"))}
        if not answers or any(c.t >= _NO_RISE or self._is_good(name, c) for name, c in answers.items()):
            return
        for name in self._roles.form:
            form = self._change(f"rewards/{name}")
            if form is not None and self._rises(form):
                others = ", ".join(f"{answer} {c.before:.3g} to {c.after:.3g}" for answer, c in answers.items())
                yield Alert(
                    "format_only_gain",
                    name,
                    form.effect,
                    self._options.trend_change,
                    f"{name} rises from {form.before:.3g} to {form.after:.3g} ({form.effect:.2f} standard deviations, "
                    f"limit {self._options.trend_change:g}), and the answers do not ({others})",
                )

    def levels(self) -> Iterator[Alert]:
        """Shares that are too high by themselves, in the mean of the last rollouts."""
        count = max(self._options.min_rollouts // 2, 1)
        if len(self._rollouts) < count:
            return
        kinds: list[tuple[AlertName, float, str]] = [
            ("repetition", self._options.repetition, "of the n-grams in a completion stood in it before"),
            (
                "collapsed_groups",
                self._options.collapsed_groups,
                "of the groups hold one completion only, over and over, and not a good one",
            ),
        ]
        for name, limit, words in kinds:
            value = mean_known([rollout.levels.get(name) for rollout in self._rollouts[-count:]])
            if value is not None and value >= limit:
                yield Alert(name, "", value, limit, f"{value:.0%} {words} (limit {limit:.0%})")

    def components(self) -> Iterator[Alert]:
        """Two rewards of the total that went together and no longer do, or one that rises while the other falls."""
        for pair in combinations(self._roles.components, 2):
            yield from self._turned(*pair) or self._apart(*pair)

    def _turned(self, first: str, second: str) -> list[Alert]:
        older, newer = self._older(pair_key(first, second)), self._newer(pair_key(first, second))
        limit = self._options.component_correlation
        if older is None or newer is None or older < 0 or newer > limit:
            return []
        words = f"{first} and {second} correlated by {older:.2f} within groups and now by {newer:.2f} (limit {limit:g})"
        return [Alert("components_diverge", f"{first}, {second}", newer, limit, words)]

    def _apart(self, first: str, second: str) -> list[Alert]:
        signs = self._roles.components
        moves = {name: self._change(f"rewards/{name}", signs[name]) for name in (first, second)}
        up = [name for name, move in moves.items() if move and self._rises(move)]
        down = [name for name, move in moves.items() if move and self._falls(move)]
        if not (up and down):
            return []
        return [self._fall("components_diverge", f"{first}, {second}", down[0], signs[down[0]], up[0])]

    def watched(self) -> Iterator[Alert]:
        """The trained total rises, and what only watches falls."""
        if not self._rises(self._reward):
            return
        for name in self._roles.watched:
            move = self._change(f"rewards/{name}")
            if move is not None and self._falls(move):
                yield self._fall("watched_falls", name, name, 1.0, "the trained reward")

    def _fall(self, kind: AlertName, about: str, name: str, sign: float, riser: str) -> Alert:
        move = self._change(f"rewards/{name}")
        assert move is not None
        limit = self._options.trend_change
        words = (
            f"{name} gets worse, from {move.before:.3g} to {move.after:.3g} ({abs(move.effect):.2f} standard "
            f"deviations, limit {limit:g}), while {riser} gets better"
        )
        return Alert(kind, about, sign * move.effect, -limit, words)

    # What the signs are made of

    def _rises(self, move: Change | None) -> bool:
        return move is not None and move.rises(self._options.trend_t, self._options.trend_change)

    def _falls(self, move: Change | None) -> bool:
        return move is not None and move.falls(self._options.trend_t, self._options.trend_change)

    def _change(self, name: str, sign: float = 1.0) -> Change | None:
        return trend(self._rollouts, name, self._options.min_rollouts, sign)

    def _is_good(self, name: str, move: Change) -> bool:
        lowest, highest = self._extremes.get(f"rewards/{name}", (0.0, 0.0))
        return move.after >= near_best(lowest, highest)

    def _older(self, key: str) -> float | None:
        return mean_known(self._half(key)[0])

    def _newer(self, key: str) -> float | None:
        return mean_known(self._half(key)[1])

    def _half(self, key: str) -> tuple[list[float | None], list[float | None]]:
        """A correlation in the older and in the newer half of the rollouts; empty for too few."""
        values = [rollout.correlations.get(key) for rollout in self._rollouts]
        if sum(value is not None for value in values) < self._options.min_rollouts:
            return [], []
        return values[: len(values) // 2], values[-(len(values) // 2) :]


def trend(rollouts: Sequence[Observation], name: str, least: int, sign: float = 1.0) -> Change | None:
    """How a mean moved over the rollouts in which it is known; None for fewer than `least`."""
    known = [
        (sign * mean, spread)
        for rollout in rollouts
        if (mean := rollout.means.get(name)) is not None and (spread := rollout.spreads.get(name)) is not None
    ]
    if len(known) < least:
        return None
    means, spreads = zip(*known, strict=True)
    return change(means, spreads)
