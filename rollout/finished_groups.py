"""A call's groups, each made and handed over once the last of its completions is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tandem.rl.samples import Group
from tandem.rollout.engine import OnGroup


class FinishedGroups:
    """Counts what is unfinished of each group.

    Args:
        members: what becomes the completions of each group, in the order of the prompts.
        make: the group at such a place, from its members as they then are.
        on_group: told of each group that is made because its last member is finished.
    """

    def __init__(
        self, members: Sequence[Sequence[object]], make: Callable[[int], Group], on_group: OnGroup | None
    ) -> None:
        self._make, self._on_group = make, on_group
        self._place = {id(one): place for place, group in enumerate(members) for one in group}
        self._unfinished = [len(group) for group in members]
        self._made: dict[int, Group] = {}

    @property
    def unfinished(self) -> int:
        """Members that are not finished."""
        return sum(self._unfinished)

    def finish(self, member: object) -> None:
        """To be called once for each."""
        place = self._place[id(member)]
        self._unfinished[place] -= 1
        if self._unfinished[place] == 0:
            self._made[place] = self._make(place)
            if self._on_group is not None:
                self._on_group(place, self._made[place])

    def all(self) -> list[Group]:
        """In the order of the prompts. Groups of which not all were reported are made here."""
        return [self._made.get(place) or self._make(place) for place in range(len(self._unfinished))]
