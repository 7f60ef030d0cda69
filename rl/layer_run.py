"""One decoder layer on one pack: its forward pass, and its backward pass written by hand.

The backward pass computes the layer once more, but for projections that were kept, and its gradients beside that:
- rows pass the output projection and the MLP in tiles, whose intermediates never exist for the whole pack;
- attention runs by groups of KV heads, which are independent of each other, from its stored or recomputed output and
  log-sum-exp: its forward pass is never run for the sake of a graph;
- a 4-bit weight is dequantised once, for the recomputation and for its gradients together;
- frozen weights get no gradient; LoRA's are summed over tiles in float32;
- gradients are written over what they no longer need: those of queries, keys and values over these, dH over the
  incoming gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tandem.kernels.lora_linear import LoraLinear
from tandem.kernels.pack_layout import PackLayout
from tandem.kernels.packed_attention import attention_backward, attention_forward
from tandem.kernels.row_copy import copy_rows
from tandem.rl.families import Layer, Norm
from tandem.rl.layer_ops import (
    LoraGrads,
    Rope,
    glu,
    glu_backward,
    rms_norm,
    rms_norm_backward,
    rotated,
    rotated_backward,
    tiles,
)
from tandem.rl.prepared_weights import KeptWeights, Weights

# What the layer before has stored comes back while the last group's attention runs, which takes about as long. From
# these rows on it waits until attention's memory is free: the device then stands still for a hundredth of the time.
LATE_ROWS = 131_072


class Attended(NamedTuple):
    """Attention's output before its projection `[T, q]`, and the log-sum-exp of its scores `[query heads, T]`."""

    output: torch.Tensor
    lse: torch.Tensor


class Projected(NamedTuple):
    """What the two widest projections gave, with columns for their adapters behind: before the heads are turned
    `[T, q + 2k (+ rank)]`, gate and up `[T, 2f (+ rank)]`. The backward pass writes their gradients over them."""

    qkv: torch.Tensor
    gate_up: torch.Tensor


class Inputs(NamedTuple):
    """The residual stream `[T, d]` between the halves, and what went into the projections `[T, columns (+ rank)]`."""

    middle: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor


Turned = tuple[torch.Tensor, torch.Tensor]


class Kept(NamedTuple):
    """What the backward pass need not compute once more; `turned`: queries and keys `[T, heads, D]`, as attention had
    them, kept with `inputs`."""

    projected: Projected
    inputs: Inputs | None
    turned: Turned | None


class LayerRun:
    """One layer on one pack.

    Args:
        rope: cosines and sines of the pack's positions. tile_rows: rows that pass the MLP at a time.
        groups: parts in which the KV heads are run; a divisor of their number.
        keep: `forward` keeps its widest projections for `backward`, which then need not be computed once more.
        keep_inputs: with `keep`, all else that `backward` would compute again, but the GLU's product: fewer calls, for
            a model that is bound by them. Not of layers with norms behind their halves.
        kept: prepared weights that stay from pass to pass. split_adapters: see `LoraLinear`.
    """

    def __init__(
        self,
        layer: Layer,
        rope: Rope,
        layout: PackLayout,
        *,
        tile_rows: int,
        groups: int,
        keep: bool = False,
        keep_inputs: bool = False,
        kept: KeptWeights | None = None,
        split_adapters: bool = False,
    ) -> None:
        self.layer, self.rope, self.layout, self.groups, self.keep = layer, rope, layout, groups, keep
        self.keep_inputs = keep and keep_inputs and layer.attention_post_norm is None and layer.mlp_post_norm is None
        self._kept_weights, self._split = kept, split_adapters
        self.tiles = tiles(rope[0].shape[0], tile_rows)
        # There is less beside them in memory, and with half as many calls the host keeps ahead of the device.
        self.forward_tiles = tiles(rope[0].shape[0], 2 * tile_rows)
        self.q_width = layer.query_heads * layer.head_dim
        self.k_width = layer.kv_heads * layer.head_dim

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, Attended, Kept | None]:
        """`[T, d]` -> the layer's output `[T, d]`, what attention gave on the way, and what is kept."""
        layer, weights, rows = self.layer, self._weights(h.dtype), h.shape[0]
        projected = inputs = None
        if self.keep:
            projected = Projected(*(weights.of(block).gradients(rows) for block in (layer.qkv, layer.gate_up)))
        if self.keep_inputs:
            blocks = layer.qkv, layer.output, layer.gate_up
            inputs = Inputs(torch.empty_like(h), *(weights.of(block).inputs(rows) for block in blocks))
        raw = self._heads_of(h, weights, projected and projected.qkv, inputs and inputs.qkv)
        # With norms the backward pass wants queries and keys as they were before.
        turned = self._turned(raw, free=projected is None or (inputs is not None and layer.query_norm is None))
        attended = self._attend(*turned, self._heads(raw)[2])
        kept = projected and Kept(projected, inputs, turned if inputs else None)
        del raw, turned
        weights.drop(layer.qkv)
        out = torch.empty_like(h)
        gate_up, down = weights.of(layer.gate_up), weights.of(layer.down)
        for t in self.forward_tiles:
            end = out[t]
            start = end if inputs is None else inputs.middle[t]
            self._middle(h[t], attended.output[t], weights, start, _rows(inputs and inputs.output, t))
            both = gate_up.gradients(end.shape[0]) if projected is None else projected.gate_up[t]
            xs = _normed(start, layer.mlp_norm, gate_up, _rows(inputs and inputs.gate_up, t))
            gate_up.forward(xs, both[:, : gate_up.out_features])
            del xs
            width = gate_up.out_features // 2
            products = down.inputs(both.shape[0])
            glu(both[:, :width], both[:, width : 2 * width], layer.activation, products[:, :width])
            del both
            down.complete_inputs(products)
            if layer.mlp_post_norm is None:
                down.add_forward(products, end, to=start)
            else:
                end += rms_norm(down.forward(products), layer.mlp_post_norm)
        return out, attended, kept

    def _weights(self, dtype: torch.dtype) -> Weights:
        return Weights(dtype, self._kept_weights, split=self._split)

    def _heads_of(
        self, h: torch.Tensor, weights: Weights, into: torch.Tensor | None = None, xs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries, keys and values before they are turned, `[T, q + 2k (+ more)]`, in `into` where that is given; `xs`
        takes what goes into the projection."""
        block = weights.of(self.layer.qkv)
        raw = h.new_empty(h.shape[0], block.out_features) if into is None else into
        for t in self.forward_tiles:
            inputs = _normed(h[t], self.layer.attention_norm, block, _rows(xs, t))
            block.forward(inputs, raw[t][:, : block.out_features])
        return raw

    def _turned(self, raw: torch.Tensor, *, free: bool) -> Turned:
        """Queries and keys `[T, heads, D]`, turned; `free`: `raw` may be written over."""
        layer, (query, key, _) = self.layer, self._heads(raw)
        return (
            rotated(query, layer.query_norm, self.rope, query if free else _like(query)),
            rotated(key, layer.key_norm, self.rope, key if free else _like(key)),
        )

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Attended:
        """Attention's output and log-sum-exp."""
        layer, rows = self.layer, query.shape[0]
        if self.groups == 1:
            out, lse = self._attention(query, key, value)
            return Attended(out.flatten(1), lse)
        output = query.new_empty(rows, self.q_width)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = torch.empty(layer.query_heads, rows, dtype=wide, device=query.device)
        for q, k in self._groups():
            out, lse[q] = self._attention(query[:, q], key[:, k], value[:, k])
            columns = slice(q.start * layer.head_dim, q.stop * layer.head_dim)
            copy_rows(output[:, columns], out.flatten(1))
        return Attended(output, lse)

    def backward(
        self,
        h: torch.Tensor,
        stored: list[torch.Tensor],
        kept: Kept | None,
        grad: torch.Tensor,
        grads: LoraGrads,
        *,
        need_input: bool,
        when_free: Callable[[], None],
    ) -> None:
        """Turn `grad` `[T, d]`, the gradient of the output, into that of the input `h`, in place.

        Args:
            stored: attention's output and log-sum-exp, where they were kept; emptied, so that memory is free when it
                can be. kept: what `forward` gave; for this call to write over.
            need_input: without it `grad` is left useless, and only `grads` is filled.
            when_free: called when what the layer before has stored may come back.
        """
        layer, weights = self.layer, self._weights(h.dtype)
        projected, inputs, turned = kept or (None, None, None)
        del kept
        if stored:
            attended = Attended(*stored)
        else:
            raw = self._heads_of(h, weights) if projected is None else projected.qkv
            attended = self._attend(*(turned or self._turned(raw, free=projected is None)), self._heads(raw)[2])
            del raw
        stored.clear()
        d_output = torch.empty_like(attended.output)
        for t in self.tiles:
            gate_up = _rows(projected and projected.gate_up, t)
            had = None if inputs is None else (inputs.output[t], inputs.middle[t], inputs.gate_up[t])
            self._rows_backward(h[t], attended.output[t], gate_up, had, grad[t], d_output[t], weights, grads)
            del gate_up, had
        qkv, xs_qkv = projected and projected.qkv, inputs and inputs.qkv
        del projected, inputs
        for block in (layer.output, layer.gate_up, layer.down):
            grads.finish(block, weights.of(block))
            weights.drop(block)
        rows = h.shape[0]
        before_last = None if rows >= LATE_ROWS else when_free
        both = self._attention_backward(h, qkv, turned, attended, d_output, weights, before_last)
        del attended, d_output, turned
        if rows >= LATE_ROWS:
            when_free()
        linear = weights.of(layer.qkv)
        for t in self.tiles:
            xs = _normed(h[t], layer.attention_norm, linear) if xs_qkv is None else xs_qkv[t]
            linear.complete_gradients(both[t])
            grads.add(layer.qkv, linear, both[t], xs)
            if need_input:
                rms_norm_backward(linear.backward(both[t]), h[t], layer.attention_norm, into=grad[t])
        grads.finish(layer.qkv, linear)

    def _middle(
        self,
        h: torch.Tensor,
        output: torch.Tensor,
        weights: Weights,
        out: torch.Tensor,
        into: torch.Tensor | None = None,
    ) -> tuple:
        """The residual stream between the halves, in `out`; returns the projection's inputs, in `into` where that is
        given, and its result where a norm stands behind it."""
        block, norm = weights.of(self.layer.output), self.layer.attention_post_norm
        xs = block.inputs(output, into=into)
        if norm is None:
            block.add_forward(xs, out, to=h)
            return xs, None
        projected = block.forward(xs)
        torch.add(h, rms_norm(projected, norm), out=out)
        return xs, projected

    def _rows_backward(self, h, output, both, had, grad, d_output, weights: Weights, grads: LoraGrads) -> None:
        """Output projection and MLP of some rows: `grad` becomes the gradient of `h` along the residual stream, and
        `d_output` that of attention's output. `both`: gate and up, where they were kept; `had`: so for what went into
        the output projection, the residual stream behind it, and what went into gate and up."""
        layer = self.layer
        proj, gate_up, down = weights.of(layer.output), weights.of(layer.gate_up), weights.of(layer.down)
        if had is None:
            middle = torch.empty_like(h)
            outputs, projected = self._middle(h, output, weights, middle)
            xs = _normed(middle, layer.mlp_norm, gate_up)
        else:
            (outputs, middle, xs), projected = had, None
        if both is None:
            both = gate_up.gradients(middle.shape[0])
            gate_up.forward(xs, both[:, : gate_up.out_features])
        width = gate_up.out_features // 2
        gate, up = both[:, :width], both[:, width : 2 * width]
        products = down.inputs(h.shape[0])
        product = products[:, :width]
        d_down = grad
        if layer.mlp_post_norm is not None:
            glu(gate, up, layer.activation, product)
            down.complete_inputs(products)
            d_down = rms_norm_backward(grad, down.forward(products), layer.mlp_post_norm)
        dys = down.gradients(d_down)
        down.backward(dys, product)
        # Leaves the product itself where its gradient was.
        glu_backward(product, gate, up, layer.activation)
        down.complete_inputs(products)
        grads.add(layer.down, down, dys, products)
        del products, product, dys
        gate_up.complete_gradients(both)
        grads.add(layer.gate_up, gate_up, both, xs)
        dx = gate_up.backward(both)
        del both, gate, up, xs
        rms_norm_backward(dx, middle, layer.mlp_norm, into=grad)
        d_projected = grad
        if layer.attention_post_norm is not None:
            d_projected = rms_norm_backward(grad, projected, layer.attention_post_norm)
        dys = proj.gradients(d_projected)
        grads.add(layer.output, proj, dys, outputs)
        proj.backward(dys, d_output)

    def _attention_backward(
        self,
        h: torch.Tensor,
        both: torch.Tensor | None,
        turned: Turned | None,
        attended: Attended,
        d_output: torch.Tensor,
        weights: Weights,
        before_last: Callable[[], None] | None,
    ) -> torch.Tensor:
        """The gradients of queries, keys and values, in a buffer `[T, q + 2k (+ rank)]`; in `both`, where these were
        kept in it. `turned`: queries and keys, where they were kept."""
        block = weights.of(self.layer.qkv)
        if both is None:
            both = block.gradients(h.shape[0])
            for t in self.tiles:
                block.forward(_normed(h[t], self.layer.attention_norm, block), both[t][:, : block.out_features])
        heads = self._heads(both)
        for number, (q, k) in enumerate(self._groups(), 1):
            if before_last is not None and number == self.groups:
                before_last()
            self._group_backward(
                heads[0][:, q], heads[1][:, k], None if turned is None else (turned[0][:, q], turned[1][:, k]),
                heads[2][:, k],
                self._by_head(attended.output)[:, q], attended.lse[q], self._by_head(d_output)[:, q],
            )  # fmt: skip
        return both

    def _group_backward(self, raw_query, raw_key, turned, value, output, lse, d_output) -> None:
        """Turn a group's queries, keys and values into their gradients, in place. All `[T, heads, D]`."""
        layer = self.layer
        if turned is None:
            query = rotated(raw_query, layer.query_norm, self.rope, _like(raw_query))
            key = rotated(raw_key, layer.key_norm, self.rope, _like(raw_key))
        else:
            query, key = turned
        d_query, d_key, d_value = attention_backward(
            d_output, query, key, value, output, lse,
            self.layout, scale=layer.scale, window=layer.window, softcap=layer.softcap,
        )  # fmt: skip
        rotated_backward(d_query, raw_query, layer.query_norm, self.rope)
        rotated_backward(d_key, raw_key, layer.key_norm, self.rope)
        value.copy_(d_value)

    def _attention(self, query, key, value) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layer
        return attention_forward(
            query, key, value, self.layout, scale=layer.scale, window=layer.window, softcap=layer.softcap
        )

    def _groups(self) -> list[tuple[slice, slice]]:
        """Query and KV heads of each group."""
        q, k = self.layer.query_heads // self.groups, self.layer.kv_heads // self.groups
        return [(slice(g * q, (g + 1) * q), slice(g * k, (g + 1) * k)) for g in range(self.groups)]

    def _heads(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[T, heads, D]` of `[T, q + 2k (+ more)]`."""
        q, k = self.q_width, self.k_width
        return tuple(self._by_head(columns[:, a:b]) for a, b in ((0, q), (q, q + k), (q + k, q + 2 * k)))  # type: ignore[return-value]

    def _by_head(self, columns: torch.Tensor) -> torch.Tensor:
        return columns.unflatten(1, (-1, self.layer.head_dim))


def _rows(x: torch.Tensor | None, t: slice) -> torch.Tensor | None:
    return None if x is None else x[t]


def _normed(x: torch.Tensor, norm: Norm, block: LoraLinear, into: torch.Tensor | None = None) -> torch.Tensor:
    """What goes into the projections of a normed input: its rows, and LoRA's part behind them; in `into` where that is
    given."""
    xs = block.inputs(x.shape[0]) if into is None else into
    rms_norm(x, norm, out=xs[:, : block.in_features])
    block.complete_inputs(xs)
    return xs


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def normed(h: torch.Tensor, norm: Norm, tile_rows: int) -> torch.Tensor:
    out = torch.empty_like(h)
    for t in tiles(h.shape[0], tile_rows):
        rms_norm(h[t], norm, out=out[t])
    return out


def norm_backward(grad: torch.Tensor, h: torch.Tensor, norm: Norm, tile_rows: int) -> torch.Tensor:
    """The gradient of `normed`'s `h`."""
    out = torch.empty_like(h)
    for t in tiles(h.shape[0], tile_rows):
        out[t] = rms_norm_backward(grad[t], h[t], norm)
    return out
