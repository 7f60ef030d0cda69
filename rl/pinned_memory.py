"""Host memory that a GPU copies from and to directly, made fast: on huge pages, put in place by several threads.

PyTorch pins each block by itself, page after page of 4 KiB: about 2 GiB a second (`benchmarks/pinned_memory.py`), which
the first step of a long run waits for. Pages of 2 MiB are a five-hundredth as many.
"""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch

HUGE_PAGE, _PAGE = 2 << 20, 4096
_THREADS = 8


def pinned_blocks(count: int, block_bytes: int) -> list[torch.Tensor]:
    """`count` pinned blocks `[block_bytes]` of bytes; the memory goes back to the system with the last of them.

    As PyTorch makes them, and said once, where the system has no huge pages to ask for or CUDA refuses them.
    """
    try:
        whole = mapped(count * block_bytes)
        _register(whole)
    except (OSError, AttributeError, RuntimeError) as error:
        warnings.warn(f"host memory is pinned in small pages, which takes longer: {error}", RuntimeWarning, 2)
        return [torch.empty(block_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
    return list(torch.from_numpy(whole).split(block_bytes))


def mapped(size: int) -> np.ndarray:
    """`size` bytes at a border of huge pages, on such pages where the system grants them, all of them in place.

    Raises:
        OSError, AttributeError: the system has no transparent huge pages. OSError: or no memory.
    """
    # Private: a shared mapping, which is Python's default, has huge pages only where those of tmpfs are switched on.
    mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    # A child would be given other pages than those that the GPU writes to, or a copy of all of them.
    mapping.madvise(mmap.MADV_DONTFORK)
    memory = np.frombuffer(mapping, dtype=np.uint8)
    begin = -memory.ctypes.data % HUGE_PAGE
    whole = memory[begin : begin + size]
    threads = min(_THREADS, os.cpu_count() or 1)
    part = -(-size // threads // HUGE_PAGE) * HUGE_PAGE
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_touch, [whole[at : at + part] for at in range(0, size, part)]))
    return whole


def _touch(part: np.ndarray) -> None:
    """Have every page of it put in place. numpy lets other threads run meanwhile."""
    part[::_PAGE] = 0


def _register(whole: np.ndarray) -> None:
    """Pin memory for as long as anything refers to it.

    Raises:
        RuntimeError: CUDA refuses it.
    """
    runtime, address = torch.cuda.cudart(), whole.ctypes.data
    code = int(runtime.cudaHostRegister(address, whole.nbytes, 0))
    if code:
        _forget_error()
        raise RuntimeError(f"cudaHostRegister: {runtime.cudaGetErrorString(runtime.cudaError(code))} ({code})")
    weakref.finalize(whole, _unregister, address).atexit = False


def _forget_error() -> None:
    """CUDA remembers a refusal until it is asked, and PyTorch asks behind its next kernel, which then seems to have
    failed: let that be this one."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


def _unregister(address: int) -> None:
    torch.cuda.synchronize()  # copies may still be under way
    torch.cuda.cudart().cudaHostUnregister(address)
