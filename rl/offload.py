"""Where a layer's input waits for the backward pass: in place, or in host memory that is allocated once.

Host memory is a pool of equal blocks, pinned where there is a GPU. Pinning takes time, so blocks are never given back
to the system: a pass takes free ones, the pool grows when there are none, and the backward pass frees them. Copies run
on their own stream, out while the next layer computes, back when the backward pass asks for it.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch

from tandem.rl.pinned_memory import pinned_blocks

# A power of two, because torch's pinned allocator rounds up to one; small, because a tensor's last block is part empty.
BLOCK_BYTES = 16 << 20
# Blocks that are pinned at a time, at least: each time costs the host a millisecond.
_LEAST_PINNED = 16
# What a pack may leave on the device between its passes before it goes to host memory.
STAYS_ON_DEVICE = 512 << 20
# The share of free memory that what a pack leaves between its passes may take.
HOST_SHARE, DEVICE_SHARE = 0.6, 0.25
# What may be taken of free device memory to save time alone, and what both passes need before that.
SPARE_SHARE, WORKING_BYTES, WORKING_STATES = 0.8, 3 << 30, 12


def goes_to_host(wanted: bool | None, size: int, device: torch.device) -> bool:
    """Whether `size` bytes wait in host memory between a pack's passes: as wanted; None: on a GPU, if they are many."""
    return device.type == "cuda" and size > STAYS_ON_DEVICE if wanted is None else wanted


def fits(wanted: int, device: torch.device | None, *, already: int = 0) -> bool:
    """Whether `wanted` bytes may be kept on `device`, or in host memory (None), of which `already` are taken."""
    if device is not None and device.type == "cuda":
        return wanted <= DEVICE_SHARE * free_on(device)
    return wanted <= already + HOST_SHARE * psutil.virtual_memory().available


def free_on(device: torch.device) -> int:
    """Bytes that tensors could still take on a CUDA device: free, or held by PyTorch without use, and allowed."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    room, fraction = free + reserved - allocated, torch.cuda.get_per_process_memory_fraction(device)
    # Without a limit, what PyTorch counts says nothing: a sleeping engine's cache is among it.
    return room if fraction >= 1 else min(room, int(total * fraction) - allocated)


def layers_beside(free: int, each: int, layers: int, hidden: int, left: int) -> int:
    """How many of `layers` may keep `each` bytes on a device, from the last one on.

    Args:
        free: what tensors could take. hidden: bytes of a pack's hidden states, of which both passes have some at a
            time, beside a layer's weights and a chunk of logits. left: bytes that all layers leave on the device for
            the backward pass in any case; of many tokens they are more than the part of `free` that is never taken.
    """
    room = min(SPARE_SHARE * free, free - left) - WORKING_BYTES - WORKING_STATES * hidden
    return max(min(int(room // each), layers), 0)


class Stored:
    """Tensors of one layer between its forward and its backward pass."""

    def take(self) -> list[torch.Tensor]:
        """The tensors, on their device, in the order they were put. Once only."""
        raise NotImplementedError

    def prefetch(self) -> None:
        """Begin to bring back what was put before, which the next `take` is for. Where nothing is brought, nothing
        happens; without this call it is brought when it is taken."""


class Store:
    """Keeps tensors where they are."""

    def begin(self) -> None:
        """A new forward pass starts."""

    def put(self, tensors: list[torch.Tensor]) -> Stored:
        """Keep `tensors`; the caller must not write to them any more."""
        return _Kept(tensors)


class _Kept(Stored):
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors: list[torch.Tensor] | None = tensors

    def take(self) -> list[torch.Tensor]:
        assert self._tensors is not None, "taken twice"
        tensors, self._tensors = self._tensors, None
        return tensors


class BlockPool:
    """Host blocks of `block_bytes`; `allocated` counts all that were ever made, `free` those that nobody holds."""

    def __init__(self, *, pinned: bool, block_bytes: int = BLOCK_BYTES) -> None:
        self.pinned, self.block_bytes = pinned, block_bytes
        self.allocated = 0
        self._free: list[torch.Tensor] = []

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self, count: int) -> list[torch.Tensor]:
        missing = count - len(self._free)
        if missing > 0:
            more = max(missing, _LEAST_PINNED) if self.pinned else missing
            self._free += self._make(more)
            self.allocated += more
        blocks, self._free = self._free[:count], self._free[count:]
        return blocks

    def _make(self, count: int) -> list[torch.Tensor]:
        if self.pinned:
            return pinned_blocks(count, self.block_bytes)
        return [torch.empty(self.block_bytes, dtype=torch.uint8) for _ in range(count)]

    def release(self, blocks: list[torch.Tensor]) -> None:
        self._free += blocks


class HostStore(Store):
    """Keeps tensors in host memory.

    The tensors of the latest `put` stay on the device too, since the backward pass wants them first; those of the put
    before are let go of once their copy is done. Works on a CPU as well, copying at once, which is of use in tests.

    Args:
        device: where the tensors live. block_bytes: size of the pool's blocks.
    """

    def __init__(self, device: torch.device, *, block_bytes: int = BLOCK_BYTES) -> None:
        self.pool = BlockPool(pinned=device.type == "cuda", block_bytes=block_bytes)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._latest: _Offloaded | None = None

    def begin(self) -> None:
        self._latest = None

    def put(self, tensors: list[torch.Tensor]) -> Stored:
        if self._latest is not None:
            self._latest.leave_device()
        self._latest = _Offloaded(self, tensors, self._latest)
        return self._latest


class _Offloaded(Stored):
    """A link of the chain of one forward pass; `_before` is the layer whose backward pass comes next."""

    def __init__(self, store: HostStore, tensors: list[torch.Tensor], before: _Offloaded | None) -> None:
        self._pool, self._stream, self._before = store.pool, store.stream, before
        self._shapes = [(t.shape, t.dtype, t.device) for t in tensors]
        # First all that `__del__` reads: memory may end in any line from here on.
        self._blocks: list[list[torch.Tensor]] = []
        self._present: list[torch.Tensor] | None = None
        self._done: Any = None
        self._taken = False
        self._present = [t.contiguous() for t in tensors]
        self._copy(out=True)

    def take(self) -> list[torch.Tensor]:
        assert not self._taken, "taken twice"
        self._taken = True
        self.fetch()
        if self._done is not None:
            torch.cuda.current_stream(self._shapes[0][2]).wait_event(self._done)
        tensors, self._present = self._present, None
        assert tensors is not None
        self._release()
        return tensors

    def prefetch(self) -> None:
        if self._before is not None and not self._before._taken:
            self._before.fetch()
        self._before = None

    def leave_device(self) -> None:
        """Let go of the device tensors; whatever reuses their memory on the compute stream waits for the copy."""
        if self._done is not None:
            torch.cuda.current_stream(self._shapes[0][2]).wait_event(self._done)
        if not self._taken:
            self._present = None

    def fetch(self) -> None:
        """Start the copy back, unless the tensors are on the device."""
        if self._present is None:
            self._present = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._shapes]
            self._copy(out=False)

    def _copy(self, *, out: bool) -> None:
        assert self._present is not None
        if self._stream is None:
            self._copy_blocks(self._present, out=out)
            return
        # What is copied is written by work that the compute stream already has, and so is what the target held before.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._copy_blocks(self._present, out=out)
            self._done = self._stream.record_event()

    def _copy_blocks(self, tensors: list[torch.Tensor], *, out: bool) -> None:
        size = self._pool.block_bytes
        for i, tensor in enumerate(tensors):
            flat = tensor.view(-1).view(torch.uint8)
            if out:
                self._blocks.append(self._pool.acquire(-(-flat.numel() // size)))
            for j, block in enumerate(self._blocks[i]):
                piece = flat[j * size : (j + 1) * size]
                host = block[: piece.numel()]
                if out:
                    host.copy_(piece, non_blocking=True)
                else:
                    piece.copy_(host, non_blocking=True)

    def _release(self) -> None:
        # The copy stream keeps order, so a later copy into these blocks comes after this one out of them.
        for blocks in self._blocks:
            self._pool.release(blocks)
        self._blocks = []

    def __del__(self) -> None:
        # A graph that is dropped without a backward pass gives its blocks back too, and no copy may still be writing
        # when its device memory goes to somebody else.
        if self._present is not None and self._done is not None and not self._taken:
            torch.cuda.current_stream(self._shapes[0][2]).wait_event(self._done)
        self._release()
