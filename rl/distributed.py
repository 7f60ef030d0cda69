"""Several processes as one trainer: torch.distributed under `torchrun`, or one process alone.

Every rank knows the whole optimiser batch and computes its own share of it. Averages are taken over the whole batch,
gradients are summed over ranks, so the result does not depend on the number of ranks (up to the order of sums).
Rank 0 alone writes files and talks.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tandem.rl.metrics import Meter
from tandem.rl.samples import Sequence

T = TypeVar("T")


def start() -> None:
    """Join the other processes if `torchrun` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def finish() -> None:
    """Leave the others in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its host, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def owned(number: int) -> bool:
    """Whether item `number` of a batch (a group, a pair, an example) is this rank's to compute."""
    return number % world_size() == rank()


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def over_ranks(meter: Meter) -> dict[str, float]:
    """The statistics over all ranks' values."""
    meter.settle()
    whole = Meter()
    for part in gather(meter):
        whole.absorb(part)
    return whole.result()


def broadcast(value: T) -> T:
    """Rank 0's value."""
    return gather(value)[0]


def interleave(parts: list[list[T]]) -> list[T]:
    """Items that were dealt out as `owned` says, back in their order."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def any_rank(flag: bool) -> bool:
    """Whether any rank says so; all get the same answer."""
    return any(gather(flag))


def barrier() -> None:
    # vLLM makes a group of one process, whose barrier would take memory for NCCL and warn.
    if world_size() > 1:
        dist.barrier()


def share(sequences: list[Sequence], unit: int) -> list[Sequence]:
    """The batch with the other ranks' sequences masked out, which leaves them out of this rank's packs.

    Args:
        unit: sequences per item: a group's completions, a pair, 1.
    """
    if world_size() == 1:
        return sequences
    return [s if owned(i // unit) else replace(s, mask=[False] * len(s.mask)) for i, s in enumerate(sequences)]


def merge(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Per-sequence tensors of which every rank has its own and empty ones for the others: all of them, everywhere."""
    if world_size() == 1:
        return values
    parts = gather([v.cpu() for v in values])
    return [max(candidates, key=len).to(values[0].device) for candidates in zip(*parts, strict=True)]


def sum_gradients(parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
    """Add up the ranks' gradients, in one message. Where no rank has any there is none: gradients of zero would let the
    optimiser's momentum and weight decay move what one process leaves as it is."""
    tensors = [p for _, p in parameters]
    if world_size() == 1 or not any_rank(any(p.grad is not None for p in tensors)):
        return
    for p in tensors:
        if p.grad is None:  # a rank without a pack has nothing to add
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in tensors if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
