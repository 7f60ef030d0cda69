"""Bytes that a pack takes in training, by arithmetic.

They follow the allocations of the code that runs it, moment by moment: a decoder layer forward, the head, the three
stages of a layer's backward pass (`rl/layer_run.py`), each with all that is alive beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tandem.rl.layer_graphs import MOST_RECORDED_BYTES, MOST_RECORDINGS
from tandem.rl.layer_run import LATE_ROWS
from tandem.rl.offload import BLOCK_BYTES, DEVICE_SHARE, HOST_SHARE, STAYS_ON_DEVICE
from tandem.rl.pack_padding import MOST_ROWS, usually_padded
from tandem.rl.plan_devices import CONTEXT, Device
from tandem.rl.plan_engine import engine_items
from tandem.rl.plan_memory import LIBRARIES, WORKSPACE, adapter_bytes, buffer_bytes, kept_weight_bytes, weight_items
from tandem.rl.plan_setup import Items, Setup
from tandem.rl.plan_shape import Linear, Projections

# Ids, positions, rows, targets, log-probs, weights, advantages of a token: int64 and float64 for the most part.
_TOKEN_BYTES = 160
# What recordings of two models held on an H200 beyond their own tensors (about 60 MiB, equal for both): the size of
# cuBLAS's workspace there, for the stream on which passes are recorded. Taken to be that, not traced to it.
_RECORDED_WORKSPACE = 64 << 20


@dataclass(frozen=True)
class Pack:
    """A pack's own memory at its highest moment.

    Attributes:
        moment: which that is. items: what is alive, gradients of the adapter among it.
        host: bytes of layer inputs in host memory. left: those that all layers leave on the device instead.
        saves: attention's output is kept for the backward pass.
        moments: bytes of all moments that were looked at.
    """

    moment: str
    items: Items
    host: int
    left: int
    saves: bool
    groups: int
    moments: Items

    @property
    def bytes(self) -> int:
        return sum(self.items.values())


def pack_memory(setup: Setup, rows: int, *, accumulated: bool = True, device: Device | None = None) -> Pack:
    """A pack of `rows` tokens, forward and backward, nearly all of them scored. Projections that are kept only because
    memory is left (`projection_memory: auto`) are not a part of it.

    Args:
        accumulated: gradients of an earlier pack of the same step are there already.
        device: whose memory and host memory decide whether attention's output is kept; None: it is.
    """
    shape = setup.shape
    hidden, attended = shape.hidden * setup.width, shape.query_heads * (shape.head_dim * setup.width + 4)
    left = shape.layers * rows * (hidden + (attended if setup.fused else 0))
    on_host = setup.offload if setup.offload is not None else left > STAYS_ON_DEVICE
    on_host = on_host and (setup.fused or setup.checkpointed)
    saves = setup.fused and _saves(setup, left, on_host, device)
    kept = rows * (hidden + (attended if saves else 0))
    if not (setup.fused or setup.checkpointed):
        kept = rows * _autograd_bytes(setup)
    groups = setup.plan.groups_for(rows, shape.kv_heads) if setup.fused else 1
    projections = projection_bytes(setup, rows) if setup.plan.projections == "save" else 0
    view = _Moments(setup, rows, groups, on_host, saves, kept, accumulated, projections)
    moments = dict(view.fused() if setup.fused else view.plain())
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Pack(
        moment=moment,
        items={name: size for name, size in moments[moment].items() if size},
        host=shape.layers * _host_blocks(setup, rows, saves) if on_host else 0,
        left=0 if on_host else shape.layers * kept,
        saves=saves,
        groups=groups,
        moments={name: sum(items.values()) for name, items in moments.items()},
    )


def _host_blocks(setup: Setup, rows: int, saves: bool) -> int:
    """Host memory of one layer: whole blocks for each tensor."""
    shape = setup.shape
    tensors = [rows * shape.hidden * setup.width]
    if saves:
        tensors += [rows * shape.query_width * setup.width, rows * shape.query_heads * 4]
    return sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in tensors)


def projection_bytes(setup: Setup, rows: int) -> int:
    """What one layer keeps that keeps its widest projections; 0 without fused layers."""
    blocks = setup.shape.projections
    if not setup.fused or blocks is None:
        return 0
    return rows * setup.width * sum(one.rows for one in (*blocks.qkv, *blocks.gate_up))


def input_bytes(setup: Setup, rows: int) -> int:
    """What it keeps beside them in a small model (`LayerRun.keep_inputs`); with norms behind its halves, less."""
    blocks = setup.shape.projections
    if blocks is None or not kept_weight_bytes(setup):
        return 0
    columns = sum(block[0].columns for block in (blocks.qkv, blocks.output, blocks.gate_up)) + setup.shape.hidden
    if setup.shape.head_norms:
        columns += sum(one.rows for one in blocks.qkv) - blocks.qkv[-1].rows
    return rows * setup.width * columns


def recorded_bytes(setup: Setup, rows: int) -> int:
    """What recorded passes of packs up to `rows` tokens hold on the device from pass to pass; 0 where none can be.

    All recordings share one memory, that of the largest: what its layers keep, and a layer at work. Each has the hidden
    states in which a pass comes and goes and their gradient for itself.
    """
    if not setup.plan.may_keep_all or setup.offload:
        return 0
    if not kept_weight_bytes(setup) or any(window is not None for window in setup.shape.windows):
        return 0
    rows = usually_padded(min(rows, MOST_ROWS))
    rows = min(rows, rows * MOST_RECORDED_BYTES // _kept_in_recording(setup, rows))  # larger packs are not recorded
    alone = replace(setup, plan=replace(setup.plan, projections="recompute", attention="save"), offload=False)
    moments = pack_memory(alone, rows).moments
    most = max(size for name, size in moments.items() if not name.startswith("head"))
    own = MOST_RECORDINGS * 3 * rows * setup.shape.hidden * setup.width
    return _kept_in_recording(setup, rows) + most + own + adapter_bytes(setup.adapter) + _RECORDED_WORKSPACE


def is_recorded(setup: Setup, rows: int) -> bool:
    """Whether passes of packs of `rows` tokens are recorded, where they are to be."""
    if not setup.plan.recorded or rows > MOST_ROWS or not recorded_bytes(setup, rows):
        return False
    return _kept_in_recording(setup, usually_padded(rows)) <= MOST_RECORDED_BYTES


def _kept_in_recording(setup: Setup, rows: int) -> int:
    inputs = input_bytes(setup, rows) if setup.plan.projections == "auto" else 0
    return setup.shape.layers * (projection_bytes(setup, rows) + inputs)


def _free_of_weights(setup: Setup, device: Device) -> int:
    engine = sum(engine_items(setup).values()) if setup.vllm else 0
    weights = sum(weight_items(setup).values()) + kept_weight_bytes(setup)
    return device.memory - CONTEXT - LIBRARIES - WORKSPACE - weights - engine


def _saves(setup: Setup, left: int, on_host: bool, device: Device | None) -> bool:
    if setup.plan.attention != "auto":
        return setup.plan.attention == "save"
    if device is None:
        return True
    if on_host:
        return device.host is None or left <= HOST_SHARE * device.host
    return left <= DEVICE_SHARE * (_free_of_weights(setup, device) - adapter_bytes(setup.adapter))


@dataclass(frozen=True)
class _Moments:
    """Moments of a pack's two passes as (name, what is alive)."""

    setup: Setup
    rows: int
    groups: int
    on_host: bool
    saves: bool
    kept: int
    accumulated: bool
    projections: int

    def fused(self) -> Iterable[tuple[str, Items]]:
        yield from self._head()
        blocks, rank = self._blocks()
        q, k, d, f, e, rows = self._sizes()
        last = self._waiting(0)
        stacked = q + 2 * k
        weights = self._buffers(blocks.qkv)
        raw = rows * e * (stacked + q + q // self.groups)
        yield "forward, attention", last | {
            "hidden states": rows * e * d, "queries, keys, values, attention": raw, "a layer's weights": weights,
            "tile": min(rows, 2 * self.setup.plan.tile_rows) * e * (d + rank["qkv"]),
        }  # fmt: skip
        mlp = self._buffers(blocks.output) + self._buffers(blocks.gate_up) + self._buffers(blocks.down)
        tile = q + rank["output"] + d + 3 * f + 2 * rank["gate_up"] + rank["down"]
        yield "forward, MLP", last | {
            "hidden states": 2 * rows * e * d, "queries, keys, values, attention": rows * e * q,
            "a layer's weights": mlp, "tile": min(rows, 2 * self.setup.plan.tile_rows) * e * tile,
        }  # fmt: skip
        for number in sorted({0, self.setup.shape.layers - 1, max(self.setup.shape.layers - 2, 0)}):
            yield from self._backward(number)

    def _backward(self, number: int) -> Iterable[tuple[str, Items]]:
        """Of the layer that is the `number`-th of the backward pass."""
        blocks, rank = self._blocks()
        q, k, d, f, e, rows = self._sizes()
        heads, layers = self.setup.shape.query_heads, self.setup.shape.layers
        tile_rows = min(rows, self.setup.plan.tile_rows)
        label = f"backward of layer {layers - 1 - number}"
        behind = self._left_behind(number)
        common = {"hidden states and their gradients": 2 * rows * e * d}
        attended = {"attention's output and its gradient": rows * (2 * e * q + 4 * heads)}
        again = 0 if self.saves else self._buffers(blocks.qkv)
        if not self.saves:
            yield f"{label}, attention once more", behind | common | {
                "queries, keys, values, attention": rows * e * (q + 2 * k + q + q // self.groups) + rows * 4 * heads,
                "a layer's weights": again,
            }  # fmt: skip
        mlp = self._buffers(blocks.output) + self._buffers(blocks.gate_up) + self._buffers(blocks.down)
        tile = 3 * d + q + rank["output"] + 3 * f + 2 * rank["gate_up"] + 2 * rank["down"]
        yield f"{label}, MLP", behind | common | attended | {
            "a layer's weights": again + mlp, "tile": tile_rows * e * tile,
            "sums of the adapter's gradients": self._sums(blocks.output, blocks.gate_up, blocks.down),
        }  # fmt: skip
        early = self._returning(number) if rows < LATE_ROWS else 0
        part = (q + k) + (q + 2 * k)
        if self.groups > 1:
            part += 2 * q  # attention's output and gradient lie apart by heads and are copied
        # The kernels sum dQ in float32 and have dK and dV for every query head.
        work = q * 4 + 2 * q * e if e == 2 else 2 * q * e
        stack = {"queries, keys, values and their gradients": rows * e * (q + 2 * k + rank["qkv"])}
        yield f"{label}, attention", behind | common | attended | stack | {
            "a group's attention": rows * (e * part + work + 8 * heads) // self.groups,
            "a layer's weights": self._buffers(blocks.qkv), "the next layer's, coming back": early,
        }  # fmt: skip
        yield f"{label}, projections", behind | common | stack | {
            "a layer's weights": self._buffers(blocks.qkv), "tile": tile_rows * e * (2 * d + rank["qkv"]),
            "the next layer's, coming back": self._returning(number),
            "sums of the adapter's gradients": self._sums(blocks.qkv),
        }  # fmt: skip

    def plain(self) -> Iterable[tuple[str, Items]]:
        yield from self._head()
        layers = self.setup.shape.layers
        widest = max(_layer_linears(self.setup), key=lambda one: one.elements, default=Linear("", 0, 0))
        weight = widest.elements * self.setup.width * (self.setup.format != "dense")
        d, e, rows = self.setup.shape.hidden, self.setup.width, self.rows
        # Gradients of the widest activations, beside what autograd holds.
        flow = rows * (4 * e * d + 3 * self.setup.shape.intermediate * max(e, 4))
        for number in sorted({0, layers - 1, max(layers - 2, 0)}):
            kept = rows * _autograd_bytes(self.setup) if self.setup.checkpointed else 0
            yield f"backward of layer {layers - 1 - number}", self._left_behind(number) | {
                "a layer's activations": kept, "gradients of activations": flow, "a weight, dequantised": weight,
                "the next layer's, coming back": self._returning(number),
            }  # fmt: skip

    def _head(self) -> Iterable[tuple[str, Items]]:
        d, e, rows, setup = self.setup.shape.hidden, self.setup.width, self.rows, self.setup
        vocab, n = setup.shape.head.rows, min(self.rows, setup.chunk)
        waiting = self._waiting(0)
        sorting = 5 if setup.restricted else 0
        adapted = setup.shape.head.name in setup.adapter.names
        low = 6 * setup.adapter.rank * vocab if adapted else 0
        yield "head, forward", waiting | {
            "hidden states": 3 * rows * e * d, "logits of a chunk": 4 * n * vocab * (1 + sorting),
        }  # fmt: skip
        yield "head, backward", waiting | {
            "hidden states": 3 * rows * e * d,
            "logits of a chunk": n * vocab * (4 * (1 + sorting) + (e if e < 4 else 0)) + low,
        }  # fmt: skip
        yield "head's gradient to its rows", waiting | {"hidden states": 3 * rows * e * d + 40 * rows}

    def _waiting(self, number: int) -> Items:
        """Layers' inputs on the device between the passes, rope tables, and the like, but for gradients."""
        shape, rows = self.setup.shape, self.rows
        layers = shape.layers - number
        near = min(layers, 1) if self.on_host else layers
        tables = shape.rope_tables * 2 * rows * self.setup.width * shape.head_dim if self.setup.fused else 0
        gradients = adapter_bytes(self.setup.adapter) if self.accumulated else 0
        return {
            "layers' inputs for the backward pass": near * self.kept,
            "projections for the backward pass": layers * self.projections,
            "positions, ids, log-probs": tables + _TOKEN_BYTES * rows,
            "adapter's gradients": gradients,
        }

    def _left_behind(self, number: int) -> Items:
        """Beside the layer that the backward pass is at: inputs of those before it, gradients of those behind it."""
        items = self._waiting(number)
        layers = self.setup.shape.layers
        items["layers' inputs for the backward pass"] = 0 if self.on_host else (layers - number - 1) * self.kept
        if not self.accumulated:
            items["adapter's gradients"] = adapter_bytes(self.setup.adapter) * (number + 1) // layers
        return items

    def _returning(self, number: int) -> int:
        return self.kept if self.on_host and number < self.setup.shape.layers - 1 else 0

    def _sizes(self) -> tuple[int, int, int, int, int, int]:
        shape = self.setup.shape
        return (
            shape.query_width, shape.kv_width, shape.hidden, shape.intermediate, self.setup.width, self.rows,
        )  # fmt: skip

    def _blocks(self) -> tuple[Projections, dict[str, int]]:
        blocks = self.setup.shape.projections
        assert blocks is not None, "the family has no fused layers"
        of = self.setup.adapter.rank_of
        return blocks, {name: of(getattr(blocks, name)) for name in ("qkv", "output", "gate_up", "down")}

    def _buffers(self, block: tuple[Linear, ...]) -> int:
        """A stacked weight, where it is made for the pass."""
        return 0 if kept_weight_bytes(self.setup) else buffer_bytes(self.setup, block)

    def _sums(self, *blocks: tuple[Linear, ...]) -> int:
        """In float32, of a pack and, one block at a time, of a tile."""
        sizes = [
            4 * self.setup.adapter.rank_of(block) * (block[0].columns + sum(one.rows for one in block))
            for block in blocks
        ]
        return sum(sizes) + max(sizes)


def _layer_linears(setup: Setup) -> list[Linear]:
    """Of an average layer: those of the first, as it is named."""
    return [one for one in setup.shape.linears if ".layers.0." in f".{one.name}"] or list(setup.shape.linears[:7])


def _autograd_bytes(setup: Setup) -> int:
    """Per token, what autograd keeps of one layer of transformers' with peft's adapters.

    Norms keep a float32 copy of their input; attention its rotated queries and keys, values, output and log-sum-exp;
    the MLP gate, its activation, and up; each adapted projection a float32 copy of its input and the low-rank product.
    Frozen weights make no product keep its input.
    """
    shape, e = setup.shape, setup.width
    q, k = shape.query_width, shape.kv_width
    norms = 2 * (4 * shape.hidden + 4)
    if shape.head_norms:
        norms += 4 * (q + k + shape.query_heads + shape.kv_heads)
    attention = e * (2 * q + 2 * k) + 4 * shape.query_heads
    mlp = 3 * shape.intermediate * e
    adapted = setup.adapter.names
    copies = sum(4 * (one.columns + setup.adapter.rank) for one in _layer_linears(setup) if one.name in adapted)
    return norms + attention + mlp + copies
