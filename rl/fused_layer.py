"""The decoder layer as one autograd node: packed rows in, packed rows out, a backward pass written by hand.

Of the forward pass only the layer's input stays (see `tandem.rl.offload`). The backward pass computes the layer once
more and its gradients beside that, with these departures from running autograd over a checkpointed layer:
- rows go through the MLP and the output projection in tiles, whose intermediates never exist for the whole pack;
- attention runs by groups of KV heads, which are independent of each other;
- a 4-bit weight is dequantised once, for the recomputation and for its gradient together;
- frozen weights get no gradient; LoRA's are summed over tiles in float32;
- gradients are written over what they no longer need: dQ over dO over O, dH over the incoming gradient.
The operations and their derivatives are in `tandem.rl.layer_ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tandem.kernels.packed_attention import PackLayout, packed_attention
from tandem.rl.errors import UserError
from tandem.rl.families import Layer, ModelSpec, Norm, describe
from tandem.rl.layer_ops import (
    LoraGrads,
    Weights,
    adapter_backward,
    glu,
    glu_backward,
    linear,
    linear_backward,
    maybe_norm,
    normed,
    rms_norm,
    rms_norm_backward,
    rotate,
    rotate_backward,
    tiles,
)
from tandem.rl.model import LanguageModel
from tandem.rl.offload import HostStore, Store

# From this many tokens on, attention costs the same in groups as at once, and memory matters more than launches.
LONG_PACK = 32_768

Rope = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """How a layer spends memory and time; the results are the same up to rounding.

    Attributes:
        tile_rows: rows that pass the MLP at a time.
        groups: parts that the KV heads are run in; None: 1, and as many as there are KV heads from 32,768 tokens on.
        attention: what the backward pass does for attention's output. keep: the recomputation's graph waits while
            the MLP's gradient is computed (4q + 4k bytes per token in bfloat16, q and k the widths of queries and
            keys); recompute: attention runs forward once more, group by group; offload: the forward pass's output is
            stored with the layer's input, and only its graph is rebuilt, group by group.
    """

    tile_rows: int = 4096
    groups: int | None = None
    attention: Literal["keep", "recompute", "offload"] = "keep"


class FusedLayers:
    """Runs the body of a described model through one autograd node per layer.

    It lies beside the model (`lm.fused`) and changes neither the model's modules nor any class.

    Args:
        plan: tiles, groups, attention. offload: keep layer inputs in host memory; None: on a GPU only.
    """

    def __init__(self, plan: Plan | None = None, *, offload: bool | None = None) -> None:
        self.plan = plan or Plan()
        self._offload = offload
        self.store = Store()
        self._lm: Any = None
        self._spec: ModelSpec | None = None
        if self.plan.tile_rows < 1:
            raise UserError(f"tile_rows is {self.plan.tile_rows}", fix="give a positive number of rows")

    def attach(self, lm: LanguageModel) -> FusedLayers:
        """Serve `lm`. An adapter may be attached to it before or after.

        Raises:
            UserError: the model's family is not described, or it has something that the layers do not compute.
        """
        spec = describe(lm.model)
        if spec is None:
            config = lm.causal_lm.config
            raise UserError(
                f"there are no fused layers for this model (model_type {config.model_type!r})",
                reason="its family is not described, or its config asks for dropout or an unknown activation",
                fix="switch the fused layers off; the model then runs through its own forward",
            )
        layers = spec.layers()
        _check_groups(self.plan.groups, layers[0].kv_heads)
        _check_trainable(spec, layers)
        on_host = lm.device.type == "cuda" if self._offload is None else self._offload
        self.store = HostStore(lm.device) if on_host else Store()
        self._lm, self._spec = lm, spec
        lm.fused = self
        return self

    def detach(self) -> None:
        """Leave the model as it was before `attach`, and free the host memory."""
        if self._lm is not None:
            self._lm.fused = None
        self._lm, self._spec, self.store = None, None, Store()

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, layout: PackLayout) -> torch.Tensor:
        """Last hidden states `[T, d]` of a pack `[T]`, after the final norm; differentiable in the adapter.

        Raises:
            UserError: the adapter is no longer one that the layers compute.
        """
        assert self._spec is not None, "attach first"
        spec, plan = self._spec, self.plan
        h = spec.backbone.embed_tokens(input_ids[None])[0]
        rope = spec.rope(h, position_ids)
        self.store.begin()
        for layer in spec.layers():
            run = _LayerRun(layer, rope[layer.rope], layout, plan)
            parameters = layer.parameters
            if torch.is_grad_enabled() and (h.requires_grad or any(p.requires_grad for p in parameters)):
                h = _LayerNode.apply(h, run, self.store, *parameters)
            else:
                h, _ = run.forward(h)
        return _NormNode.apply(h, spec.final_norm(), plan.tile_rows)


def _check_groups(groups: int | None, kv_heads: int) -> None:
    if groups is not None and (groups < 1 or kv_heads % groups):
        divisors = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
        raise UserError(
            f"groups is {groups}, but the model has {kv_heads} KV heads",
            reason="groups must hold equally many heads",
            fix=f"use one of {', '.join(map(str, divisors))}",
        )


def _check_trainable(spec: ModelSpec, layers: list[Layer]) -> None:
    known = {id(p) for layer in layers for p in layer.parameters}
    for owner in (spec.backbone.layers, spec.backbone.norm):
        for name, parameter in owner.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise UserError(
                    f"{name} is trainable",
                    reason="the fused layers compute gradients of LoRA parameters only",
                    fix="freeze the base model, or switch the fused layers off",
                )


class _LayerNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: torch.Tensor, run: _LayerRun, store: Store, *parameters: torch.Tensor) -> torch.Tensor:
        with_output = run.plan.attention == "offload"
        if not with_output:
            # Before the layer runs, so that the copy hides behind it.
            ctx.stored = store.put([h])
        out, attended = run.forward(h)
        if with_output:
            ctx.stored = store.put([h, attended])
        # Holds no memory of its own, and lets autograd see an update between the passes.
        ctx.save_for_backward(*parameters)
        ctx.run = run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        parameters = ctx.saved_tensors
        h, *rest = ctx.stored.take()
        grads = LoraGrads()
        # The gradient is the sole property of this node: its only consumer is a node of this file, which made it.
        grad = grad.contiguous()
        ctx.run.backward(h, rest[0] if rest else None, grad, grads, need_input=ctx.needs_input_grad[0])
        by_parameter = grads.by_parameter()
        lora = [by_parameter[id(p)].to(p.dtype) if id(p) in by_parameter else None for p in parameters]
        return (grad if ctx.needs_input_grad[0] else None, None, None, *lora)


class _NormNode(torch.autograd.Function):
    """The final norm; autograd of its steps would keep several float32 copies."""

    @staticmethod
    def forward(ctx, h: torch.Tensor, norm: Norm, tile_rows: int) -> torch.Tensor:
        ctx.save_for_backward(h)
        ctx.norm, ctx.tile_rows = norm, tile_rows
        return normed(h, norm, tile_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (h,) = ctx.saved_tensors
        out = torch.empty_like(h)
        for t in tiles(h.shape[0], ctx.tile_rows):
            out[t] = rms_norm_backward(grad[t], h[t], ctx.norm)
        return out, None, None


class _Group(NamedTuple):
    """One group's attention, run with a local graph: its leaves, the edge into it, and the heads before their norms."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    edge: GradientEdge
    query_before: torch.Tensor | None
    key_before: torch.Tensor | None


class _LayerRun:
    """One layer on one pack."""

    def __init__(self, layer: Layer, rope: Rope, layout: PackLayout, plan: Plan) -> None:
        self.layer, self.rope, self.layout, self.plan = layer, rope, layout, plan
        rows = rope[0].shape[0]
        self.tiles = tiles(rows, plan.tile_rows)
        self.groups = plan.groups or (1 if rows < LONG_PACK else layer.kv_heads)
        self.kv_width = (layer.key.stop - layer.key.start) // self.groups
        self.q_width = (layer.query.stop - layer.query.start) // self.groups

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, d]` -> the layer's output `[T, d]` and attention's output before its projection `[T, q]`."""
        layer, weights = self.layer, Weights(h.dtype)
        x = normed(h, layer.attention_norm, self.plan.tile_rows)
        attended = self._attended(x, weights)
        del x
        weights.drop(layer.query, layer.key, layer.value)
        out = torch.empty_like(h)
        for t in self.tiles:
            middle = h[t] + maybe_norm(linear(attended[t], layer.output, weights), layer.attention_post_norm)
            x = rms_norm(middle, layer.mlp_norm)
            product = glu(linear(x, layer.gate, weights), linear(x, layer.up, weights), layer.activation)
            out[t] = middle.add_(maybe_norm(linear(product, layer.down, weights), layer.mlp_post_norm))
        return out, attended

    def backward(
        self,
        h: torch.Tensor,
        attended: torch.Tensor | None,
        grad: torch.Tensor,
        grads: LoraGrads,
        *,
        need_input: bool,
    ) -> None:
        """Turn `grad` `[T, d]`, the gradient of the output, into that of the input `h`, in place.

        Args:
            attended: attention's output where it was stored; it is overwritten. need_input: without it `grad` is left
                useless, and only `grads` is filled.
        """
        layer, weights = self.layer, Weights(h.dtype)
        kept: list[_Group] | None = None
        if attended is None:
            x = normed(h, layer.attention_norm, self.plan.tile_rows)
            kept = [] if self.plan.attention == "keep" else None
            attended = self._attended(x, weights, kept)
            del x
        for t in self.tiles:
            self._rows_backward(h[t], attended[t], grad[t], weights, grads)
        weights.drop(layer.output, layer.gate, layer.up, layer.down)
        self._attention_backward(h, attended, grad, kept, weights, grads, need_input=need_input)

    def _rows_backward(self, h, attended, grad, weights: Weights, grads: LoraGrads) -> None:
        """Output projection and MLP of some rows: `grad` becomes the gradient of `h` along the residual stream, and
        `attended` becomes its own gradient."""
        layer = self.layer
        projected = linear(attended, layer.output, weights)
        middle = h + maybe_norm(projected, layer.attention_post_norm)
        x = rms_norm(middle, layer.mlp_norm)
        gate, up = linear(x, layer.gate, weights), linear(x, layer.up, weights)
        product = glu(gate, up, layer.activation)
        d_down = grad
        if layer.mlp_post_norm is not None:
            d_down = rms_norm_backward(grad, linear(product, layer.down, weights), layer.mlp_post_norm)
        d_product = linear_backward(d_down, product, layer.down, weights, grads)
        del product
        d_gate, d_up = glu_backward(d_product, gate, up, layer.activation)
        del gate, up, d_product
        dx = linear_backward(d_gate, x, layer.gate, weights, grads)
        linear_backward(d_up, x, layer.up, weights, grads, into=dx)
        del d_gate, d_up
        rms_norm_backward(dx, middle, layer.mlp_norm, into=grad)
        d_projected = grad
        if layer.attention_post_norm is not None:
            d_projected = rms_norm_backward(grad, projected, layer.attention_post_norm)
        attended.copy_(linear_backward(d_projected, attended, layer.output, weights, grads))

    def _attention_backward(
        self, h, d_attended, grad, kept: list[_Group] | None, weights: Weights, grads: LoraGrads, *, need_input: bool
    ) -> None:
        """Add to `grad` what reaches `h` through attention. `d_attended` `[T, q]` is overwritten by dQ."""
        layer = self.layer
        x = normed(h, layer.attention_norm, self.plan.tile_rows)
        rows, k = h.shape[0], layer.key.stop - layer.key.start
        d_key, d_value = h.new_empty(rows, k), h.new_empty(rows, k)
        for g in range(self.groups):
            group = kept.pop(0) if kept else self._run_group(x, g, weights)[1]
            q, kv = self._columns(g)
            self._group_backward(group, d_attended[:, q], d_key[:, kv], d_value[:, kv])
            del group
        for t in self.tiles:
            parts = ((d_attended[t], layer.query), (d_key[t], layer.key), (d_value[t], layer.value))
            if not need_input:
                for d_part, part in parts:
                    adapter_backward(d_part, x[t], part, weights, grads)
                continue
            dx = None
            for d_part, part in parts:
                dx = linear_backward(d_part, x[t], part, weights, grads, into=dx)
            assert dx is not None
            rms_norm_backward(dx, h[t], layer.attention_norm, into=grad[t])

    def _columns(self, g: int) -> tuple[slice, slice]:
        q, k = self.q_width, self.kv_width
        return slice(g * q, (g + 1) * q), slice(g * k, (g + 1) * k)

    def _attended(self, x: torch.Tensor, weights: Weights, kept: list[_Group] | None = None) -> torch.Tensor:
        """Attention's output `[T, q]`, before its projection; the groups' graphs go to `kept`, where it is given."""
        attended = x.new_empty(x.shape[0], self.q_width * self.groups)
        for g in range(self.groups):
            if kept is None:
                query, key, value, *_ = self._project(x, g, weights)
                out = self._attend(query, key, value)
            else:
                out, group = self._run_group(x, g, weights)
                kept.append(group)
            attended[:, self._columns(g)[0]].view(x.shape[0], -1, self.layer.head_dim).copy_(
                out.detach().transpose(0, 1)
            )
        return attended

    def _run_group(self, x: torch.Tensor, g: int, weights: Weights) -> tuple[torch.Tensor, _Group]:
        query, key, value, query_before, key_before = self._project(x, g, weights)
        for leaf in (query, key, value):
            leaf.requires_grad_()
        with torch.enable_grad():
            out = self._attend(query, key, value)
        # The edge, not the output: what the output's memory held is in `attended` already.
        return out, _Group(query, key, value, get_gradient_edge(out), query_before, key_before)

    def _attend(self, query, key, value) -> torch.Tensor:
        """`[T, heads, D]` -> `[heads, T, D]`."""
        layer = self.layer
        return packed_attention(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            self.layout,
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
        )

    def _project(self, x: torch.Tensor, g: int, weights: Weights) -> tuple[torch.Tensor, ...]:
        """A group's rotated queries and keys, its values, and where heads have norms, what these norms got."""
        layer, (q, kv) = self.layer, self._columns(g)
        heads: list[Any] = [
            x.new_empty(x.shape[0], (c.stop - c.start) // layer.head_dim, layer.head_dim) for c in (q, kv, kv)
        ]
        before: list[Any] = [None, None]
        norms = (layer.query_norm, layer.key_norm)
        for i, norm in enumerate(norms):
            if norm is not None:
                before[i] = torch.empty_like(heads[i])
        for t in self.tiles:
            for i, (part, columns) in enumerate(((layer.query, q), (layer.key, kv), (layer.value, kv))):
                y = linear(x[t], part.rows(columns.start, columns.stop), weights).view_as(heads[i][t])
                if i < 2:
                    if (norm := norms[i]) is not None:
                        before[i][t] = y
                        y = rms_norm(y, norm)
                    y = rotate(y, self.rope[0][t], self.rope[1][t])
                heads[i][t] = y
        return (*heads, *before)

    def _group_backward(self, group: _Group, d_out, d_key, d_value) -> None:
        """Write dQ over `d_out` and fill `d_key`, `d_value`, `[T, columns of the group]` each."""
        layer, rows = self.layer, d_out.shape[0]
        by_head = [t.view(rows, -1, layer.head_dim) for t in (d_out, d_key, d_value)]
        leaves = (group.query, group.key, group.value)
        rotated = torch.autograd.grad((group.edge,), leaves, (by_head[0].transpose(0, 1),))
        by_head[2].copy_(rotated[2])
        norms = (layer.query_norm, layer.key_norm)
        for i, before in enumerate((group.query_before, group.key_before)):
            for t in self.tiles:
                d = rotate_backward(rotated[i][t], self.rope[0][t], self.rope[1][t])
                if before is not None and (norm := norms[i]) is not None:
                    d = rms_norm_backward(d, before[t], norm)
                by_head[i][t] = d
