"""The memory pools behind vLLM's sleep mode, given back with the engine that they were made for.

vLLM keeps them as long as the process lives. The next engine's would take their place while PyTorch allocates from it,
and PyTorch aborts a process that lets go of a pool at such a moment.
"""

from __future__ import annotations

from typing import Any

# Pools that cannot go: their tensors are still referred to, or their memory is away. They hold addresses only.
_left: list[Any] = []


def release_pools(*, asleep: bool, allocator: Any = None) -> None:
    """Give the pools' memory back. Nothing may be allocated from them meanwhile, and no engine be in use.

    Args:
        asleep: their memory has been given back already.
        allocator: vLLM's; None: the one of this process.
    """
    if allocator is None:
        from vllm.device_allocator.cumem import CuMemAllocator

        allocator = CuMemAllocator.instance
    if allocator is None:  # no engine of this process can sleep
        return
    pools = dict(allocator.allocator_and_pools)
    used = any(segment["allocated_size"] for pool, _ in pools.values() for segment in pool.snapshot())
    if asleep or used:
        if not asleep:
            allocator.sleep(offload_tags=())
        _left.append((pools, dict(allocator.pointer_to_data)))
        # Else the next engine would wake them, too.
        allocator.pointer_to_data.clear()
    allocator.allocator_and_pools.clear()
