"""What a rollout engine is: token ids in, token ids and the log-probs of their own distribution out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tandem.rl.samples import Group, Prompt, Sampling

# Called with (completions finished, completions asked for) as an engine goes along.
Progress = Callable[[int, int], None]
# Called in the thread of `generate` with (place in `prompts`, group) once all completions of that group are finished.
OnGroup = Callable[[int, Group], None]


class RolloutEngine(Protocol):
    """The trainer knows no more of an engine than this.

    Between phases the trainer calls `sleep()` before it trains and `wake()` before it generates, so that an engine
    with memory of its own (a KV cache) can give it back.

    Attributes:
        asleep_bytes: device memory that PyTorch counts as this engine's, and that it has given back at the moment.
    """

    name: str

    @property
    def asleep_bytes(self) -> int: ...

    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        progress: Progress | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """One group of `sampling.num_generations` completions per prompt, in the order of `prompts`.

        A completion's tokens depend on its prompt, its own number within the group, `sampling` and the policy, and
        not on what else is in the batch (up to floating point). `sampling.stop` strings end it with the token that
        completes them; an engine may leave a prompt's own `limit` to its caller.

        `on_group` gets each group at most once, in the order in which they are finished: the very object that is
        returned in the end. An engine that does not know earlier may leave it out.
        """
        ...

    def load_adapter(self, version: int) -> None:
        """Generate with the policy's adapter as it is now. `version` grows with every update."""
        ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...
