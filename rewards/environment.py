"""The environment's own reward, as a component among others."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.rl.errors import UserError
from tandem.rl.samples import Episode


def environment(episodes: Sequence[Episode | None]) -> list[float | None]:
    """What each completion's environment gave it: its `get_reward()`, or the sum of what its `step` gave.

    None where the episode broke off (a time limit, an error), and where the environment gives no rewards.

    Args:
        episodes: how each completion came about.

    Raises:
        UserError: completions that no environment took part in.
    """
    if any(episode is None for episode in episodes):
        raise UserError(
            "these completions have no environment",
            reason="its reward is known only where it played, in a run's own rollouts",
            fix="set environment.factory, or leave this reward out here",
        )
    return [episode.reward for episode in episodes if episode is not None]


def why_none(episode: Episode) -> tuple[str, str]:
    """Why an episode has no reward, and what to change."""
    if episode.ending == "time":
        return (
            "its episode took longer than environment.step_timeout or environment.episode_timeout allows",
            "make the environment faster, or raise the limit",
        )
    if episode.ending == "error":
        return "its environment raised, which ends an episode without its reward", "correct the environment"
    return (
        "its environment gave no reward",
        "return (observation, done, reward) from step, or a number from get_reward()",
    )
