"""A pass that runs out of memory is undone and run again with less, so that what is lost is the time of the attempt.

First what only saves time is given up, then packs are halved. Where the largest pack is a single sequence, which
cannot be cut, the measures of `tandem.rl.memory_measures` follow, and when none is left, an error that says what to
change. What was found to be needed is kept in the run's state, so that neither later steps nor a resumed run try
again what does not fit.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from tandem.rl import distributed
from tandem.rl.checkpoint import State
from tandem.rl.config import TrainConfig
from tandem.rl.errors import OutOfMemory, is_out_of_memory
from tandem.rl.memory_measures import next_measure, spare, take_measures
from tandem.rl.model import LanguageModel
from tandem.rl.packing import Pack, default_max_tokens

T = TypeVar("T")
Packs = Callable[[int], list[Pack]]
Gather = Callable[[Any], list[Any]]

_GIB = 1 << 30


class MemoryGuard:
    """Runs the passes of one run.

    Args:
        state: keeps what was reduced; what it holds from before counts if it comes from a device of the same kind.
        optimizer: whose gradients a failed pass must not leave behind.
        warn: told of every reduction. advice: what to change if nothing helps, asked only then.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: TrainConfig,
        state: State,
        optimizer: torch.optim.Optimizer,
        *,
        warn: Callable[[str], None],
        advice: Callable[[], str],
    ) -> None:
        self._lm, self._state, self._optimizer = lm, state, optimizer
        self._warn, self._advice = warn, advice
        self.max_tokens = config.max_tokens or default_max_tokens(lm.device.type)
        self.chunk_size = config.logprob_chunk_size
        self._device = device_label(lm.device)
        if state.reduced and state.reduced_on != self._device:
            warn(f"sizes that were reduced on {state.reduced_on} are forgotten: this is {self._device}")
            state.reduced = {}
        self._take(state.reduced)

    def run(self, attempt: Callable[[int], T], packs: Packs, *, place: str = "", alone: bool = False) -> T:
        """`attempt(max_tokens)`, if need be with fewer tokens per pack and with more measures, until it fits.

        Args:
            attempt: adds gradients at most, and waits for no other rank. Gradients and random state of one that fails
                are put back.
            packs: the packs of this rank for a number of tokens. place: where in the run this is, for messages.
            alone: other ranks may not be here; else all are, and all do it again if one must.

        Raises:
            OutOfMemory: nothing is left to reduce. Gradients and random state are those of before.
        """
        place = place or f"in step {self._state.step + 1}"
        gather: Gather = (lambda value: [value]) if alone else distributed.gather
        while True:
            random = _Random(self._lm.device)
            result, failure = self._try(attempt)
            failures = [text for text in gather(failure) if text]
            if not failures:
                return result  # type: ignore[return-value]  # there is one where nothing failed
            self._undo(random)
            self._reduce(packs, failures[0], place, gather, together=not alone)

    def once(self, attempt: Callable[[], object], what: str) -> None:
        """`attempt()`, which nothing here could do with less memory.

        Raises:
            OutOfMemory: it does not fit.
        """
        _, failure = self._try(lambda _: attempt())
        if distributed.any_rank(failure is not None):
            raise OutOfMemory(
                f"out of memory in step {self._state.step + 1}, for {what}: {failure or 'in another process'}",
                fix=self._advice(),
                together=True,
            )

    def _try(self, attempt: Callable[[int], T]) -> tuple[T | None, str | None]:
        """The result, or what was asked for and what there is. When this returns, nothing holds on to the frames of a
        failed attempt, and so to its tensors."""
        try:
            return attempt(self.max_tokens), None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None, _asked(error, self._lm.device)

    def _undo(self, random: _Random) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        for layers in (self._lm.fused, self._lm.checkpoints):
            if layers is not None:
                layers.abandon()
        gc.collect()
        if self._lm.device.type == "cuda":
            torch.cuda.empty_cache()
        random.restore()

    def _reduce(self, packs: Packs, failure: str, place: str, gather: Gather, *, together: bool) -> None:
        """Make the next attempt a smaller one, the same on all ranks."""
        rows = max(gather(_largest(packs(self.max_tokens))))
        half = max(rows // 2, 1)
        change: dict[str, Any] = next(filter(None, gather(spare(self._lm))), {})
        if not change and max(gather(_largest(packs(half)))) < rows:
            change = {"max_tokens": half}
            self._state.halved += 1
        change = change or next_measure(self._lm, rows, self.chunk_size)
        if not change:
            raise OutOfMemory(
                f"out of memory {place}: {failure}",
                reason=f"the largest pack, of {rows:,} tokens, is a single sequence, which cannot be cut, "
                "and everything that saves memory in its layers and at the head is on",
                fix=self._advice(),
                together=together,
            )
        self._state.reduced |= change
        self._state.reduced_on = self._device
        self._take(change)
        written = " ".join(f"train.{key}={str(value).lower()}" for key, value in change.items())
        self._warn(
            f"out of memory {place} with a pack of {rows:,} tokens: {failure}. It is done again from its start, and "
            f"the run goes on, with {written}"
        )

    def _take(self, values: dict[str, Any]) -> None:
        self.max_tokens = min(values.get("max_tokens", self.max_tokens), self.max_tokens)
        self.chunk_size = min(values.get("logprob_chunk_size", self.chunk_size), self.chunk_size)
        take_measures(self._lm, values)


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """What draws random numbers inside leaves the random state as it was."""
    random = _Random(device)
    try:
        yield
    finally:
        random.restore()


class _Random:
    """The random state that dropout draws from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)


def device_label(device: torch.device) -> str:
    """What kind of device this is: its name and memory."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / _GIB:.1f} GiB"


def _largest(packs: list[Pack]) -> int:
    return max((one.num_tokens for one in packs), default=0)


def _asked(error: BaseException, device: torch.device) -> str:
    """What was asked for, and on a GPU what is there."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    found = re.search(r"[Tt]ried to allocate (\d[\d.]* \w+)", "\n".join(texts))
    asked = f"{found[1]} asked for" if found else (texts[-1].strip().splitlines() or [type(error).__name__])[0]
    if device.type != "cuda":
        return asked
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_allocated(device)
    return f"{asked}, {free / _GIB:.2f} of {total / _GIB:.2f} GiB free, {own / _GIB:.2f} GiB held by this process"
