"""An engine that outlives its death once: it is built anew and generates the same batch again with the same seeds.

An engine with memory and compiled graphs of its own can die without the trainer being hurt: its core raises, a worker
process is gone, its memory runs out. Weights and adapter are the trainer's, so a new one needs nothing else. What an
engine dies of a second time is not chance, and the run stops with its checkpoint.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tandem.rl.errors import RunStopped, UserError, cause
from tandem.rl.samples import Group, Prompt, Sampling
from tandem.rollout.engine import OnGroup, Progress, RolloutEngine

T = TypeVar("T")

RESTARTS = 1


class EngineDied(RunStopped):
    """The engine died more often than it is built anew, or cannot be built anew."""


class RestartingEngine:
    """See the module's text. A death in `sleep` or `load_adapter` shows no earlier than at the next `wake` or
    `generate`: by then the step is whole that they belong to, and the trainer's own memory is free again.

    A death is every exception but a `UserError`, which says what is wrong with the request and not with the engine.

    Args:
        engine: the first one. build: makes another, with the adapter as it is at that time.
        warn: told of every death.
    """

    def __init__(self, engine: RolloutEngine, build: Callable[[], RolloutEngine], *, warn: Callable[[str], None]):
        self.name = engine.name
        self.max_model_len: Any = getattr(engine, "max_model_len", None)
        self._engine: RolloutEngine | None = engine
        self._build, self._warn = build, warn
        self._version = 0
        self._deaths: list[str] = []

    @property
    def asleep_bytes(self) -> int:
        return 0 if self._engine is None else self._engine.asleep_bytes

    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        progress: Progress | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See `RolloutEngine`. Groups that were handed over before a death are kept, and the others generated again.

        Raises:
            EngineDied: for good.
        """
        if on_group is None:
            return self._insist("generating", lambda engine: engine.generate(prompts, sampling, progress=progress))
        done: dict[int, Group] = {}

        def others(engine: RolloutEngine) -> list[Group]:
            left = [place for place in range(len(prompts)) if place not in done]

            def take(number: int, group: Group) -> None:
                done[left[number]] = group
                on_group(left[number], group)

            wanted = [prompts[place] for place in left]
            made = engine.generate(wanted, sampling, progress=progress, on_group=take)
            done.update(zip(left, made, strict=True))
            return [done[place] for place in range(len(prompts))]

        return self._insist("generating", others)

    def wake(self) -> None:
        """See `RolloutEngine`. Raises EngineDied: for good."""
        self._insist("waking", lambda engine: engine.wake())

    def load_adapter(self, version: int) -> None:
        self._version = version
        self._attempt("taking the adapter", lambda engine: engine.load_adapter(version))

    def sleep(self) -> None:
        self._attempt("going to sleep", lambda engine: engine.sleep())

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _insist(self, doing: str, action: Callable[[RolloutEngine], T]) -> T:
        while True:
            engine = self._engine or self._built_anew()
            try:
                return action(engine)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001  # engines die in many ways; whichever it was is said
                self._bury(doing, error)

    def _attempt(self, doing: str, action: Callable[[RolloutEngine], None]) -> None:
        if self._engine is None:
            return
        try:
            action(self._engine)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  # as above
            self._bury(doing, error)

    def _built_anew(self) -> RolloutEngine:
        if len(self._deaths) > RESTARTS:
            raise EngineDied(
                f"the {self.name} engine died again after it was built anew",
                reason="; before that: ".join(reversed(self._deaths)),
            )
        gc.collect()  # what is left of the dead one hangs in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            engine = self._build()
            engine.load_adapter(self._version)
        except Exception as error:
            raise EngineDied(
                f"the {self.name} engine died and cannot be built anew",
                reason=f"{' '.join(cause(error).split())}; before that: {self._deaths[-1]}",
            ) from error
        self._engine = engine
        return engine

    def _bury(self, doing: str, error: Exception) -> None:
        """Close what died. Only text is kept of the error: its frames hold the engine's memory, and are emptied."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{' '.join(cause(error).split())} while {doing} ({frame.filename}:{frame.lineno})"
        behind: BaseException | None = error
        while behind is not None:
            traceback.clear_frames(behind.__traceback__)
            behind = behind.__cause__ or behind.__context__
        self._deaths.append(said)
        dead, self._engine = self._engine, None
        follows = "it is built anew, and goes on with the same seeds" if len(self._deaths) <= RESTARTS else "once more"
        self._warn(f"the {self.name} engine died, {follows}: {said}")
        try:
            if dead is not None:
                dead.close()
        except Exception as failed:  # noqa: BLE001  # it is dead: what it could not give back is worth a word
            self._warn(f"the dead {self.name} engine could not be closed: {' '.join(cause(failed).split())}")
