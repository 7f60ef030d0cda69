"""The section of a config that says what is rewarded, and what is only watched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tandem.rl.sections import Number, Section

# Built-in rewards that are made from other rewards' values, which their kwargs name.
COMBINATIONS = ("gate", "minimum", "group_ranks")


class WatchSpec(Section):
    """One function that is only watched."""

    function: str
    """Built-in name, `FILE.py:function` or `module:function`, with TRL's signature or verl's `compute_score`."""
    name: str | None = None
    """Name in metrics; None: the function's own."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments passed to every call."""

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name or self.function.rpartition(":")[2]


class RewardSpec(WatchSpec):
    """One reward function."""

    weight: Number = 1.0
    """Factor of this reward in the total."""
    scope: Literal["group", "batch"] | None = None
    """What a call must see. group: the completions of one prompt are enough, so that finished groups are rewarded while
    others are generated (`rewards.overlap`), sync functions in a thread; None: group for judge and code_tests, else
    batch."""


class RewardsConfig(Section):
    """What is rewarded. The total is the weighted sum of the functions' values (None counts as not applicable). What
    `gate`, `minimum` or `group_ranks` combine stands here too, with weight 0."""

    reward_funcs: list[RewardSpec] = Field(default_factory=list)
    """Functions: names, `FILE.py:function`, or mappings with function, weight, name, kwargs."""
    watch_funcs: list[WatchSpec] = Field(default_factory=list)
    """Functions whose values are only watched (docs/reward-watch.md): they have no weight and never reach the
    advantage, and an error in one is counted and said but stops nothing."""
    reward_weights: list[Number] | None = None
    """Weights in the order of `reward_funcs`, as in TRL; instead of a weight in each entry."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that one call of one reward function may take."""
    overlap: bool = True
    """Call rewards of scope group for finished groups while others are still generated (docs/sampling.md)."""
    on_missing: Literal["stop", "group_mean"] = "group_mean"
    """A completion to which no reward applies (a judge's answer that cannot be read). group_mean: it gets its group's
    mean, so that nothing is learned from it, and `rewards/missing` counts it; stop: the run ends. A batch without any
    reward ends the run in both cases."""
    on_error: Literal["stop", "skip_group", "zero"] = "stop"
    """A completion on which a reward fails: it raises, takes longer than `timeout`, or returns something wrong. stop:
    the run ends, and `rl-train resume` goes on with the same completions once the reward is corrected; skip_group: its
    group is left out of the batch; zero: this reward's value is 0 there. `rewards/errors/NAME` counts them; a reward
    that fails on all of them in optim.max_skipped_updates rollouts in a row ends the run."""

    @field_validator("reward_funcs", "watch_funcs", mode="before")
    @classmethod
    def _names_are_specs(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            value = [value]
        return [{"function": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _weights_fit(self) -> RewardsConfig:
        if self.reward_weights is not None:
            if len(self.reward_weights) != len(self.reward_funcs):
                raise ValueError(
                    f"reward_weights has {len(self.reward_weights)} values for {len(self.reward_funcs)} reward_funcs; "
                    "give one weight per function"
                )
            for spec, weight in zip(self.reward_funcs, self.reward_weights, strict=True):
                spec.weight = weight
            self.reward_weights = None
        return self

    @model_validator(mode="after")
    def _combined_rewards_exist(self) -> RewardsConfig:
        trained = [spec.label for spec in self.reward_funcs]
        both = trained + [spec.label for spec in self.watch_funcs]
        for spec, names in [*((s, trained) for s in self.reward_funcs), *((s, both) for s in self.watch_funcs)]:
            if spec.function not in COMBINATIONS:
                continue
            own = spec.label
            for key in ("first", "then", "of"):
                value = spec.kwargs.get(key)
                for part in value if isinstance(value, list) else [value] if value is not None else []:
                    if part not in names or part == own:
                        others = ", ".join(name for name in names if name != own)
                        raise ValueError(
                            f"reward {own!r} combines {part!r}, which is no other entry of reward_funcs "
                            f"(these are {others or 'none'}): add it with weight 0"
                        )
        return self
