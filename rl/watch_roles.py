"""Which of a run's rewards says what: what counts in the total, what judges form, what judges the answer."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.rl.config import Config
from tandem.rl.reward_config import COMBINATIONS, RewardSpec, WatchSpec

_FORMS = ("tag_format", "boxed_format", "json_schema", "regex_match")
_PENALTIES = ("length_penalty", "overlong_penalty", "repetition_penalty", "language_penalty")


@dataclass(frozen=True)
class Roles:
    """Names of reward functions by what they are for.

    Attributes:
        components: those that count in the total, by themselves or through a combination, with the sign of their
            weight: the direction that training pushes them.
        form: what judges form alone. answer: what judges the answer. watched: what is only watched.
    """

    components: dict[str, float]
    form: list[str]
    answer: list[str]
    watched: list[str]


def roles_of(config: Config) -> Roles:
    """From names and functions, unless the section `watch` says it."""
    trained, watched = config.rewards.reward_funcs, config.rewards.watch_funcs
    combined = {name for spec in trained if spec.function in COMBINATIONS for name in _parts(spec)}
    components = {
        spec.label: -1.0 if spec.weight < 0 else 1.0
        for spec in trained
        if spec.function not in COMBINATIONS and (spec.weight or spec.label in combined)
    }
    form, answer = config.watch.format_rewards, config.watch.answer_rewards
    if form is None:
        form = [spec.label for spec in [*trained, *watched] if _is_form(spec)]
    if answer is None:
        rest = [s.label for s in trained if s.label in components and s.function not in _PENALTIES]
        answer = [name for name in rest if name not in form]
        answer = answer or [s.label for s in watched if s.label not in form and s.function not in _PENALTIES]
    return Roles(components, form, answer, config.watch_names())


def _parts(spec: RewardSpec) -> list[str]:
    """Names that a combination is made from."""
    values = [spec.kwargs[key] for key in ("first", "then", "of") if key in spec.kwargs]
    return [name for value in values for name in (value if isinstance(value, list) else [value])]


def _is_form(spec: WatchSpec) -> bool:
    return spec.function in _FORMS or "format" in spec.label.lower()
