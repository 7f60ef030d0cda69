"""The section of a config that says when training looks like reward hacking."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from tandem.rl.sections import Fraction, Number, Positive, Section

AlertName = Literal[
    "length_hacking", "format_only_gain", "repetition", "collapsed_groups", "components_diverge", "watched_falls"
]


class WatchConfig(Section):
    """Signs of reward hacking in every rollout, as `watch/*` metrics and alerts (docs/reward-watch.md). A trend
    compares the newer half of the last rollouts with the older half."""

    enabled: bool = True
    """Measure and alert. What `rewards.watch_funcs` says is logged in any case."""
    alerts: list[AlertName] = Field(default=list(get_args(AlertName)))
    """Alerts that are raised."""
    alert_steps: Positive = 50
    """The same alert comes at most once in so many optimiser steps."""
    window: Annotated[int, Field(ge=4)] = 40
    """Rollouts that a trend looks back on."""
    min_rollouts: Annotated[int, Field(ge=4)] = 10
    """Rollouts that a trend needs; a level (repetition, collapsed_groups) is the mean of the last half as many."""
    trend_t: Annotated[Number, Field(gt=0)] = 3.0
    """A value rises or falls where Welch's t between the two halves' means per rollout is at least this, and the change
    at least trend_change."""
    trend_change: Annotated[Number, Field(ge=0)] = 0.25
    """Smallest change that counts, in standard deviations of one completion's value."""
    length_correlation: Fraction = 0.3
    """length_hacking: smallest correlation of total reward and length within groups, beside a rise of both."""
    length_growth: Annotated[Number, Field(ge=0)] = 0.2
    """length_hacking: smallest growth of the mean length, as a share of the older half's."""
    repetition: Fraction = 0.5
    """Largest share of a completion's n-grams of tokens that stood in it before, mean over completions."""
    repetition_ngram: Positive = 4
    """Tokens of such an n-gram."""
    collapsed_groups: Fraction = 0.5
    """Largest share of groups whose completions are all the same and whose reward is not near the best seen."""
    component_correlation: Annotated[Number, Field(ge=-1, le=1)] = -0.3
    """components_diverge: two rewards that agreed before and now correlate by this or less within groups."""
    format_rewards: list[str] | None = None
    """Rewards (or watched functions) that judge form alone; None: tag_format, boxed_format, json_schema, regex_match,
    and those with `format` in their name."""
    answer_rewards: list[str] | None = None
    """Rewards (or watched functions) that judge the answer; None: those that count and are no format, penalty or
    combination, and where there are none, what is watched."""
