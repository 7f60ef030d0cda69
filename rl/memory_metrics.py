"""What the phases of a step take of a GPU, measured, beside what the plan says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from tandem.rl import distributed
from tandem.rl.config import Config
from tandem.rl.errors import UserError
from tandem.rl.plan import Longest, Phase, changed, ledger
from tandem.rl.plan_devices import Device, local_device
from tandem.rl.plan_shape import read_shape

_GIB = 1 << 30


class Reading(NamedTuple):
    """Bytes: the highest that tensors and that PyTorch's allocator held since the last reset, without what a sleeping
    engine has given back, and what all processes and libraries hold of the device now."""

    peak_allocated: int
    reserved: int
    device: int


class Gauge(Protocol):
    """Where readings come from."""

    def reset(self) -> None: ...

    def read(self) -> Reading: ...


class CudaGauge:
    """The gauge of one CUDA device.

    Args:
        asleep: bytes that PyTorch counts and that are not there: vLLM gives its cache back behind PyTorch's back.
    """

    def __init__(self, device: torch.device, asleep: Callable[[], int] = lambda: 0) -> None:
        self._device, self._asleep = device, asleep

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> Reading:
        free, total = torch.cuda.mem_get_info(self._device)
        peak, reserved = torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
        asleep = self._asleep()
        return Reading(peak - asleep, reserved - asleep, total - free)


class MemoryMeter:
    """The highest readings of each phase, of a step and of the whole run.

    Args:
        gauge: None: nothing is measured, as on a CPU.
    """

    def __init__(self, gauge: Gauge | None) -> None:
        self._gauge = gauge
        self._step: dict[str, Reading] = {}
        self.run: dict[str, Reading] = {}

    @classmethod
    def of(cls, device: torch.device, asleep: Callable[[], int]) -> MemoryMeter:
        """Of a run with an engine that neither falls asleep nor wakes within a phase; `asleep`: see `CudaGauge`."""
        return cls(CudaGauge(device, asleep) if device.type == "cuda" else None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is reached inside belongs to the phase; phases do not lie within each other. What does not come to its
        end is not counted."""
        if self._gauge is None:
            yield
            return
        self._gauge.reset()
        yield
        found = self._gauge.read()
        for known in (self._step, self.run):
            known[name] = Reading(*map(max, found, known.get(name, found)))

    def lap(self) -> dict[str, float]:
        """Metrics since the last lap, in GiB: `memory/peak_allocated/PHASE` and so on."""
        step, self._step = self._step, {}
        return {
            f"memory/{kind}/{phase}": size / _GIB
            for phase, reading in step.items()
            for kind, size in reading._asdict().items()
        }

    def summary(self) -> dict[str, dict[str, float]]:
        """The highest of the whole run by phase, in GiB."""
        return {
            phase: {kind: round(size / _GIB, 3) for kind, size in reading._asdict().items()}
            for phase, reading in self.run.items()
        }


def planned_memory(
    config: Config, engine: str, longest: Longest, device: Device | None = None
) -> dict[str, dict[str, float]]:
    """What the plan says of the phases, in GiB, as `MemoryMeter.summary` has what was measured; empty without a GPU, or
    without a plan. Projections that are kept because memory is left are a part of the update.

    Args:
        config: with the sizes that the run has. engine: the one that it has. device: None: the card that is here.
    """
    if device is None:
        if not torch.cuda.is_available():
            return {}
        device = local_device(index=distributed.local_rank())
    try:
        plan = ledger(read_shape(config.model), changed(config, {"rollout": {"engine": engine}}), device, longest)
    except UserError:
        return {}
    phases = {"update": Phase(plan.training().items | {"projections kept": plan.spare[1]})}
    if (rollout := plan.rollout()) is not None:
        phases["rollout"] = rollout
    return {name: {kind: round(size / _GIB, 3) for kind, size in phase.sizes.items()} for name, phase in phases.items()}
