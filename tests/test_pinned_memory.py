"""Host memory on huge pages: where it lies, that it goes back, and what happens where it cannot be had."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.rl import pinned_memory
from tandem.rl.offload import BLOCK_BYTES, BlockPool
from tandem.rl.pinned_memory import HUGE_PAGE, mapped, pinned_blocks

BLOCK = 3 << 20


class Runtime:
    """Stands in for the CUDA runtime: notes what is registered, and may refuse."""

    def __init__(self, code: int = 0) -> None:
        self.code = self.last_error = code
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 0
        if not self.code:
            self.registered[address] = size
        return self.code

    def kernel(self, size: int, *, device: str) -> torch.Tensor:
        """PyTorch asks for the last error behind a kernel, whatever it came from."""
        assert device == "cuda"
        code, self.last_error = self.last_error, 0
        if code:
            raise RuntimeError(f"CUDA error {code}")
        return torch.ones(size)

    def cudaHostUnregister(self, address: int) -> None:
        # It must still be mapped.
        assert any(int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16) for line in maps())
        del self.registered[address]

    def cudaError(self, code: int) -> int:
        return code

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text(encoding="ascii").splitlines()


def use(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = SimpleNamespace(cudart=lambda: runtime, synchronize=lambda: None)
    monkeypatch.setattr(pinned_memory.torch, "cuda", fake)
    monkeypatch.setattr(pinned_memory.torch, "zeros", runtime.kernel)
    return runtime


def system_has_huge_pages() -> bool:
    return Path("/sys/kernel/mm/transparent_hugepage").is_dir()


needs_huge_pages = pytest.mark.skipif(not system_has_huge_pages(), reason="the system has no transparent huge pages")


@needs_huge_pages
def test_blocks_lie_side_by_side_from_a_huge_page_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = use(Runtime(), monkeypatch)
    blocks = pinned_blocks(5, BLOCK)
    begin = blocks[0].data_ptr()
    assert begin % HUGE_PAGE == 0
    assert [block.data_ptr() - begin for block in blocks] == [i * BLOCK for i in range(5)]
    assert runtime.registered == {begin: 5 * BLOCK}
    for i, block in enumerate(blocks):
        block.fill_(i + 1)
    assert [int(block.long().sum()) for block in blocks] == [(i + 1) * BLOCK for i in range(5)]


@needs_huge_pages
def test_memory_is_in_place_and_not_a_childs() -> None:
    size = 4 * HUGE_PAGE
    whole = mapped(size)
    resident, flags = 0, ""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        if "-" in line.split()[0]:
            low, high = (int(one, 16) for one in line.split()[0].split("-"))
            inside = low <= whole.ctypes.data < high
        elif inside and line.startswith("Rss:"):
            resident = int(line.split()[1]) * 1024
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert resident >= size
    assert " dc " in f"{flags} ", "DONTFORK"
    assert " hg " in f"{flags} ", "huge pages"
    child = os.fork()
    if child == 0:
        os._exit(int(any(f"{whole.ctypes.data:x}-" in line for line in maps())))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_huge_pages
def test_memory_is_unpinned_and_unmapped_with_its_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = use(Runtime(), monkeypatch)
    blocks = pinned_blocks(2, BLOCK)
    address, last = blocks[0].data_ptr(), blocks[1]
    del blocks
    gc.collect()
    last.fill_(7)
    assert runtime.registered == {address: 2 * BLOCK}
    del last
    gc.collect()
    assert runtime.registered == {}
    assert not any(line.startswith(f"{address:x}-") for line in maps())


@pytest.mark.parametrize("fault", ["refused", "no huge pages", "no such system"])
def test_small_pages_are_taken_where_there_are_no_others(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = use(Runtime(code=2 if fault == "refused" else 0), monkeypatch)
    if fault == "no huge pages":

        def mapped(size: int) -> Any:
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(pinned_memory, "mapped", mapped)
    elif fault == "no such system":
        monkeypatch.delattr(pinned_memory.mmap, "MAP_PRIVATE")
    made: list[int] = []
    empty = torch.empty

    def recorded(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(pinned_memory.torch, "empty", recorded)
    with pytest.warns(RuntimeWarning, match="small pages"):
        blocks = pinned_blocks(3, BLOCK)
    assert [len(block) for block in blocks] == made == [BLOCK] * 3
    assert runtime.last_error == 0, "or the next kernel would be said to have failed"


def test_a_pinned_pool_grows_by_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def pinned(count: int, size: int) -> list[torch.Tensor]:
        asked.append((count, size))
        return [torch.empty(8, dtype=torch.uint8) for _ in range(count)]

    monkeypatch.setattr("tandem.rl.offload.pinned_blocks", pinned)
    pool = BlockPool(pinned=True)
    first = pool.acquire(1)
    assert (len(first), pool.allocated, pool.free) == (1, 16, 15)
    pool.acquire(40)
    assert asked == [(16, BLOCK_BYTES), (25, BLOCK_BYTES)]
    assert (pool.allocated, pool.free) == (41, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_from_and_to_it() -> None:
    blocks = pinned_blocks(4, BLOCK)
    assert all(block.is_pinned() for block in blocks)
    data = torch.randint(0, 255, (4, BLOCK), dtype=torch.uint8, device="cuda")
    for block, row in zip(blocks, data, strict=True):
        block.copy_(row, non_blocking=True)
    torch.cuda.synchronize()
    back = torch.stack([block.to("cuda", non_blocking=True) for block in blocks])
    assert torch.equal(back, data)
    address, probe = blocks[0].data_ptr(), blocks[3].clone()
    del blocks, block
    gc.collect()
    torch.cuda.synchronize()
    assert torch.equal(probe.cuda(), data[3])
    assert not any(line.startswith(f"{address:x}-") for line in maps())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_refusal_is_not_taken_for_a_failed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    (taken,) = pinned_blocks(1, BLOCK)
    monkeypatch.setattr(pinned_memory, "mapped", lambda size: taken.numpy())
    with pytest.warns(RuntimeWarning, match="small pages"):
        (block,) = pinned_blocks(1, BLOCK)
    assert block.is_pinned()
    assert torch.ones(3, device="cuda").mul_(2).sum() == 6
