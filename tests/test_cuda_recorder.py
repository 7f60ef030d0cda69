"""Pools of CUDA graphs and what surrounds a recording, on a stand-in for PyTorch's graphs and allocator."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from tandem.rl import layer_graphs
from tandem.rl.layer_graphs import CudaRecorder

CPU = torch.device("cpu")


class FakeGraph:
    """A CUDA graph as the allocator treats it: a pool is held by its graphs, and closed with the last of them."""

    pools: ClassVar[dict[int, int]] = {}
    closed: ClassVar[set[int]] = set()

    def capture_begin(self, *, pool: int, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        if pool in self.closed:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.pools[pool] = self.pools.get(pool, 0) + 1
        weakref.finalize(self, self._release, pool)

    @classmethod
    def _release(cls, pool: int) -> None:
        cls.pools[pool] -= 1
        if not cls.pools[pool]:
            cls.closed.add(pool)

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


@pytest.fixture
def cuda_recorder(monkeypatch: pytest.MonkeyPatch) -> CudaRecorder:
    numbers = count()
    stream = SimpleNamespace(device=CPU, wait_stream=lambda other: None)
    fake = SimpleNamespace(
        CUDAGraph=FakeGraph, Stream=lambda device: stream, current_stream=lambda device: stream,
        graph_pool_handle=lambda: next(numbers), stream=lambda one: nullcontext(), empty_cache=lambda: None,
        memory_reserved=lambda device: 50 + 7 * sum(FakeGraph.pools.values()),
    )  # fmt: skip
    monkeypatch.setattr(FakeGraph, "pools", {})
    monkeypatch.setattr(FakeGraph, "closed", set())
    monkeypatch.setattr(layer_graphs.torch, "cuda", fake)
    return CudaRecorder(CPU)


def test_graphs_share_a_pool_and_take_another_when_all_are_gone(cuda_recorder: CudaRecorder) -> None:
    held = [cuda_recorder.record(lambda: None) for _ in range(3)]
    assert FakeGraph.pools == {0: 3}
    del held[0]
    held.append(cuda_recorder.record(lambda: None))
    assert FakeGraph.pools == {0: 3}
    assert cuda_recorder.held == 28
    held.clear()
    held.append(cuda_recorder.record(lambda: None))
    assert FakeGraph.pools == {0: 0, 1: 1}
    assert cuda_recorder.held == 7


def test_no_garbage_is_collected_while_a_graph_is_recorded(cuda_recorder: CudaRecorder) -> None:
    seen = []
    cuda_recorder.record(lambda: seen.append(gc.isenabled()))
    assert seen == [False]
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_recorder.record(failing)
    assert gc.isenabled()


def failing() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")
