"""A small model's layers, forward and backward, recorded once for packs that are alike and replayed for the next.

A small model's pass is bound by its thousands of calls, each of which takes the host longer than the device. Recorded
as a CUDA graph they are one. What a recording reads and writes stays where it is: the pack's hidden states, rotations
and layout are copied to it, the adapters are copied to prepared weights as for any pass (`KeptWeights`), and gradients
leave it in one buffer. A pack is padded to sizes that come again (`pack_padding`), runs once as usual, so that every
kernel is there, and is recorded when its sizes come for the second time; those that come most often stay recorded.

One recording at a time is between its forward and its backward pass: all share one pool of memory.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from tandem.kernels.lora_linear import LoraLinear
from tandem.rl.families import Layer, Norm
from tandem.rl.layer_ops import LoraGrads, Rope
from tandem.rl.layer_run import LayerRun, norm_backward, normed
from tandem.rl.library_imports import collector_off
from tandem.rl.pack_padding import Alike
from tandem.rl.prepared_weights import KeptWeights

# Recordings that are kept. Making one costs more than a pass as usual: of many kinds of packs others are not recorded.
MOST_RECORDINGS = 8
# When so many passes are counted, each counts half from then on: what matters is which packs come most often lately.
_COUNTED = 512
# What the layers may keep in a recording, whose memory stays on the device.
MOST_RECORDED_BYTES = 2 << 30

Work = Callable[[], None]
Ropes = dict[str | None, Rope]


class Recorder(Protocol):
    """Turns work into something that does the same work again.

    Attributes:
        held: bytes on the device that nothing else can use.
    """

    held: int

    def record(self, work: Work) -> Work: ...


class CudaRecorder:
    """CUDA graphs in one pool of memory. Every kernel of the work must have run once before."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self.held = 0
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(self, work: Work) -> Work:
        if not self._graphs:
            # PyTorch lets nobody into a pool again whose last graph has gone. Its memory, and what the allocator holds
            # without use, cannot be had while a graph is recorded.
            self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()
            self.held = 0
        before = torch.cuda.memory_reserved(self._stream.device)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        # Not torch.cuda.graph, which collects garbage and empties the allocator's cache at each recording. Garbage that
        # waits for a copy or for the device when it goes would end this one, so none is collected.
        with torch.cuda.stream(self._stream), collector_off():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                # What went wrong is told, not that the recording has not come to its end.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(self._stream)
        self.held += torch.cuda.memory_reserved(self._stream.device) - before
        self._graphs.add(graph)
        return graph.replay


@dataclass(frozen=True)
class Stack:
    """The layers of a padded pass and how they are run; `make`: a `LayerRun` that keeps all that it can, of a layer and
    its rotations."""

    layers: list[Layer]
    norm: Norm
    tile_rows: int
    make: Callable[[Layer, Rope], LayerRun]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for layer in self.layers for p in layer.parameters]

    @property
    def norms_at(self) -> list[int]:
        """Where the norms' weights lie, which are read there."""
        found = [self.norm]
        for one in self.layers:
            norms = one.attention_norm, one.attention_post_norm, one.mlp_norm, one.mlp_post_norm
            found += [norm for norm in (*norms, one.query_norm, one.key_norm) if norm is not None]
        return [norm.weight.data_ptr() for norm in found]


class _Lease:
    """One pass through a recording, from forward to backward. It ends with the graph that holds it.

    Args:
        weights: what the recording reads; another pass in between may prepare others.
    """

    def __init__(self, record: _Record, weights: list[LoraLinear]) -> None:
        self.record, self._weights = record, weights


class LayerGraphs:
    """The recordings of one model.

    Args:
        kept: prepared weights, whose memory recordings read. recorder: None: CUDA graphs on `device`.

    Attributes:
        off: a recording has failed, which was said; no other one is tried.
    """

    def __init__(self, device: torch.device, kept: KeptWeights, recorder: Recorder | None = None) -> None:
        self._recorder = recorder or CudaRecorder(device)
        self._kept = kept
        # What recordings read beside their own memory, by version and place.
        self._read: tuple[int, list[int]] | None = None
        self.off = False
        # How often packs of a kind have come.
        self._times: Counter[tuple[Any, ...]] = Counter()
        self._records: dict[tuple[Any, ...], _Record] = {}
        # What all recordings leave the adapters' gradients in.
        self._grads: torch.Tensor | None = None
        self._lease: weakref.ref[_Lease] | None = None

    @property
    def held(self) -> int:
        """Bytes on the device that only recordings can use."""
        return self._recorder.held

    def hidden(self, alike: Alike, h: torch.Tensor, rope: Ropes, stack: Stack) -> torch.Tensor | None:
        """Hidden states `[T, d]` behind the final norm, differentiable in the adapters, of padded rows `h`; None where
        there is no recording yet, or one is under way, and the layers are to be run as usual."""
        weights = [self._kept.of(block, h.dtype) for layer in stack.layers for block in layer.blocks]
        read = self._kept.version, stack.norms_at
        if read != self._read:
            self._records.clear()
            self._read = read
        if self._lease is not None and self._lease() is not None:
            return None
        key = (*alike.key, h.dtype)
        self._count(key)
        if key not in self._records:
            if not self._makes_room(key):
                return None
            try:
                self._records[key] = _Record(alike, h, rope, stack, self._recorder, self._buffer(stack.parameters))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"passes are not recorded (train.cuda_graphs): {error}", RuntimeWarning, 2)
                self.off = True
                self._records.clear()
                return None
        lease = _Lease(self._records[key], weights)
        self._lease = weakref.ref(lease)
        lease.record.take(alike, h, rope)
        out: torch.Tensor = _Replayed.apply(lease, *stack.parameters)
        return out

    def _buffer(self, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        size, first = sum(p.numel() for p in parameters), parameters[0]
        if self._grads is None or self._grads.numel() != size:
            self._grads = torch.empty(size, dtype=first.dtype, device=first.device)
        return self._grads

    def _count(self, key: tuple[Any, ...]) -> None:
        self._times[key] += 1
        if self._times.total() >= _COUNTED:
            self._times = Counter({one: times // 2 for one, times in self._times.items() if times > 1})

    def _makes_room(self, key: tuple[Any, ...]) -> bool:
        """Whether packs of this kind are to be recorded: not at first, and later in place of those that come less."""
        if self._times[key] < 2:
            return False
        if len(self._records) >= MOST_RECORDINGS:
            rarest = min(self._records, key=self._times.__getitem__)
            if self._times[key] <= self._times[rarest] + 1:  # kinds that come alike are not to take turns
                return False
            del self._records[rarest]
        return True


class _Record:
    """Both passes of packs that are alike; all tensors of it stay where they are.

    Args:
        grads: of all parameters together, which only hold what the last replay has found.
    """

    def __init__(
        self, alike: Alike, h: torch.Tensor, rope: Ropes, stack: Stack, recorder: Recorder, grads: torch.Tensor
    ) -> None:
        self._h, self._out, self._grad = torch.empty_like(h), torch.empty_like(h), torch.empty_like(h)
        self._rope = {kind: (cos.clone(), sin.clone()) for kind, (cos, sin) in rope.items()}
        # The layout's plan is what attention finds in it: its tensors are this recording's from now on.
        self._plan = alike.plan
        parameters = stack.parameters
        self._sizes = [p.numel() for p in parameters]
        self._shapes = [p.shape for p in parameters]
        self._grads = grads
        places = [x.view(s) for x, s in zip(self._grads.split(self._sizes), self._shapes, strict=True)]
        runs = [stack.make(layer, self._rope[layer.rope]) for layer in stack.layers]
        between: list[tuple[torch.Tensor, Any, Any]] = []
        last: list[torch.Tensor] = []

        def forward() -> None:
            between.clear()
            x = self._h
            for run in runs:
                out, attended, kept = run.forward(x)
                between.append((x, attended, kept))
                x = out
            last[:] = [x]
            self._out.copy_(normed(x, stack.norm, stack.tile_rows))

        def backward() -> None:
            grad = norm_backward(self._grad, last.pop(), stack.norm, stack.tile_rows)
            place = len(places)
            for number in reversed(range(len(runs))):
                x, attended, kept = between.pop()
                of_layer = LoraGrads()
                runs[number].backward(
                    x, [*attended], kept, grad, of_layer, need_input=number > 0, when_free=lambda: None
                )  # fmt: skip
                for p in reversed(stack.layers[number].parameters):
                    place -= 1
                    found = of_layer.of(p)
                    assert found is not None, "every adapter has a gradient"
                    places[place].copy_(found)

        with torch.no_grad():
            self._forward = recorder.record(forward)
            self._backward = recorder.record(backward)

    def take(self, alike: Alike, h: torch.Tensor, rope: Ropes) -> None:
        """A pack's own values."""
        self._h.copy_(h)
        for kind, tables in rope.items():
            for mine, new in zip(self._rope[kind], tables, strict=True):
                mine.copy_(new)
        if alike.plan is not self._plan:
            for mine, new in zip(self._plan.tensors, alike.plan.tensors, strict=True):
                mine.copy_(new)

    def forward(self) -> torch.Tensor:
        self._forward()
        return self._out.clone()

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """The parameters' gradients, in memory of their own."""
        self._grad.copy_(grad)
        self._backward()
        parts = self._grads.clone().split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lease: _Lease, *parameters: torch.Tensor) -> torch.Tensor:
        # Holds no memory of its own, and lets autograd see an update between the passes.
        ctx.save_for_backward(*parameters)
        ctx.lease = lease
        return lease.record.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _ = ctx.saved_tensors
        lease, ctx.lease = ctx.lease, None
        return (None, *lease.record.backward(grad))
