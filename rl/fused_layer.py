"""Packs through decoder layers of which each is one autograd node.

Of the forward pass only the layer's input stays, and where there is room attention's output: in host memory for packs
that are worth it (`tandem.rl.offload`). Where the device has room to spare, the widest projections of the last layers
stay on it too. The backward pass is written by hand, in `tandem.rl.layer_run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from tandem.kernels.attention_blocked import Scoring
from tandem.kernels.attention_pieces import takes
from tandem.kernels.pack_layout import PackLayout
from tandem.rl.config import TrainConfig
from tandem.rl.errors import UserError
from tandem.rl.families import Layer, ModelSpec, Norm, describe
from tandem.rl.layer_graphs import MOST_RECORDED_BYTES, LayerGraphs, Recorder, Stack
from tandem.rl.layer_ops import LoraGrads
from tandem.rl.layer_run import LayerRun, norm_backward, normed
from tandem.rl.model import LanguageModel
from tandem.rl.offload import HostStore, Store, fits, free_on, goes_to_host, layers_beside
from tandem.rl.pack_padding import made_alike
from tandem.rl.prepared_weights import KeptWeights

# Rows that pass the MLP at a time, where nothing else is said.
TILE_ROWS = 4096
# Attention in parts costs little time where each part is long: from these lengths on in two, in four, one by one.
_GROUPS = ((12_288, 2), (24_576, 4), (49_152, 1 << 30))


@dataclass(frozen=True)
class LayerPlan:
    """How a layer spends memory and time; the results are the same up to rounding.

    Attributes:
        tile_rows: rows that pass the MLP at a time.
        groups: parts that the KV heads are run in; None: 1, 2 from 12,288 tokens on, 4 from 24,576 on, and each head
            alone from 49,152 on.
        attention: what the backward pass has of attention. save: its output and log-sum-exp, stored with the layer's
            input (twice the memory, a fifth less time in attention); recompute: nothing, attention runs forward once
            more; auto: save where the store has room for it.
        projections: whether the backward pass finds queries, keys, values, gate and up, two thirds of what it would
            compute again. save: of all layers, on the device; recompute: of none; auto: on a GPU of as many layers,
            from the last, as fit beside everything else. A small model, which is bound by calls, then keeps all else
            too that would be computed again.
        recorded: a small model's passes are recorded and replayed, for packs that are padded to be alike
            (`layer_graphs`).
        split_adapters: the adapters' share is added to rounded products, as engines do it (`LoraLinear`).
    """

    tile_rows: int = TILE_ROWS
    groups: int | None = None
    attention: Literal["auto", "save", "recompute"] = "auto"
    projections: Literal["auto", "save", "recompute"] = "auto"
    recorded: bool = False
    split_adapters: bool = False

    @classmethod
    def of(cls, train: TrainConfig, *, split_adapters: bool = False) -> LayerPlan:
        """As a config says."""
        return cls(
            train.mlp_tile_rows or TILE_ROWS,
            train.kv_head_groups,
            train.attention_memory,
            train.projection_memory,
            train.cuda_graphs is True,
            split_adapters,
        )

    @property
    def may_keep_all(self) -> bool:
        """Whether a layer may keep all that its backward pass wants, as recorded passes do."""
        return "recompute" not in (self.projections, self.attention)

    def groups_for(self, rows: int, kv_heads: int) -> int:
        if self.groups is not None:
            return self.groups
        wanted = max((groups for length, groups in _GROUPS if rows >= length), default=1)
        return max(n for n in range(1, min(wanted, kv_heads) + 1) if kv_heads % n == 0)


class FusedLayers:
    """Runs the body of a described model through one autograd node per layer.

    It lies beside the model (`lm.fused`) and changes neither the model's modules nor any class.

    Args:
        plan: tiles, groups, attention, projections. offload: keep what the backward pass needs in host memory; None: on
            a GPU, for packs that would leave more than 512 MiB. recorder: of passes, in place of CUDA graphs.

    Attributes:
        layers_kept: layers whose projections the latest pack kept.
    """

    def __init__(
        self, plan: LayerPlan | None = None, *, offload: bool | None = None, recorder: Recorder | None = None
    ) -> None:
        self.plan = plan or LayerPlan()
        self.offload = offload
        self.host: HostStore | None = None
        self.near = Store()
        self.layers_kept = 0
        self._weights = KeptWeights(split=self.plan.split_adapters)
        self._recorder = recorder
        self._graphs: LayerGraphs | None = None
        self._lm: Any = None
        self._spec: ModelSpec | None = None
        if self.plan.tile_rows < 1:
            raise UserError(f"tile_rows is {self.plan.tile_rows}", fix="give a positive number of rows")

    @property
    def kv_heads(self) -> int:
        """Of a layer: the largest number of groups."""
        assert self._spec is not None, "attach first"
        return self._spec.layer(0).kv_heads

    @property
    def host_bytes(self) -> int:
        """Host memory that layer inputs have taken so far; it is kept for the next steps."""
        return 0 if self.host is None else self.host.pool.allocated * self.host.pool.block_bytes

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
        check_groups(self.plan.groups, layers[0].kv_heads)
        _check_trainable(spec, layers)
        self._lm, self._spec = lm, spec
        lm.fused = self
        return self

    def detach(self) -> None:
        """Leave the model as it was before `attach`, and free the host memory."""
        if self._lm is not None:
            self._lm.fused = None
        self._lm, self._spec, self.host, self._graphs = None, None, None, None
        self._weights = KeptWeights(split=self.plan.split_adapters)

    def abandon(self) -> None:
        """Let go of what the latest pack has left, which did not come to its end for want of memory."""
        self._weights.stop()
        self._graphs = None
        if self.host is not None:
            self.host.begin()

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, layout: PackLayout) -> torch.Tensor:
        """Last hidden states `[T, d]` of a pack `[T]`, after the final norm; differentiable in the adapter.

        Raises:
            UserError: the adapter is no longer one that the layers compute.
        """
        assert self._spec is not None, "attach first"
        spec, plan = self._spec, self.plan
        h = spec.backbone.embed_tokens(input_ids[None])[0]
        rows, first = h.shape[0], spec.layer(0)
        kept = self._weights if self._weights.begin(first, spec.num_layers, h.dtype) else None
        if kept is not None:
            kept.prepare(spec.layers, h.dtype)
        inputs = kept is not None and plan.projections == "auto"
        layers = None if kept is None else self._layers_to_record(h)
        alike = None
        if layers is not None:
            # A pack that is not recorded is not to be padded either.
            most = MOST_RECORDED_BYTES // (spec.num_layers * _row_bytes(h, first, inputs))
            alike = made_alike(layout, h.device, most)
        if alike is not None:
            h, position_ids, layout = alike.padded(h), alike.padded(position_ids), alike.layout
        rope = spec.rope(h, position_ids)
        store, save, left = self._store_for(h, spec.num_layers, first)
        groups = plan.groups_for(h.shape[0], first.kv_heads)
        self.layers_kept = 0
        if torch.is_grad_enabled():
            # PyTorch counts as free what only recordings can use.
            held = 0 if alike is not None or self._graphs is None else self._graphs.held
            self.layers_kept = self._layers_to_keep(h, spec.num_layers, first, inputs, held, left)
        make = partial(
            LayerRun, layout=layout, tile_rows=plan.tile_rows, groups=groups, keep_inputs=inputs, kept=kept,
            split_adapters=plan.split_adapters,
        )  # fmt: skip
        whole = save and store is self.near and self.layers_kept == spec.num_layers
        if layers is not None and alike is not None and whole:
            stack = Stack(layers, spec.final_norm(), plan.tile_rows, partial(make, keep=True))
            if self._graphs is None:
                self._graphs = LayerGraphs(h.device, self._weights, self._recorder)
            found = self._graphs.hidden(alike, h, rope, stack)
            if found is not None:
                return found[:rows]
        for index in range(spec.num_layers):
            # Read as late as this, so that the device has work meanwhile.
            layer = spec.layer(index)
            keep = index >= spec.num_layers - self.layers_kept
            run = make(layer, rope[layer.rope], keep=keep)
            parameters = layer.parameters
            if torch.is_grad_enabled() and (h.requires_grad or any(p.requires_grad for p in parameters)):
                h = _LayerNode.apply(h, run, store, save, *parameters)
            else:
                h = run.forward(h)[0]
        out: torch.Tensor = _NormNode.apply(h, spec.final_norm(), plan.tile_rows)
        return out if alike is None else out[:rows]

    def _layers_to_record(self, h: torch.Tensor) -> list[Layer] | None:
        """All layers, where a pass is to be recorded and they allow it."""
        assert self._spec is not None
        if not (self.plan.recorded and self.plan.may_keep_all) or self.offload:
            return None
        if not torch.is_grad_enabled() or h.requires_grad:
            return None
        if self._graphs is not None and self._graphs.off:
            return None
        layers = self._spec.layers()
        allowed = self._recorder is not None or all(_recordable(layer, h) for layer in layers)
        return layers if allowed else None

    def _store_for(self, h: torch.Tensor, num_layers: int, layer: Layer) -> tuple[Store, bool, int]:
        """Where this pack's layers keep what they keep, whether attention's output is a part of it, and how many bytes
        of it stay on the device."""
        rows, width = h.shape
        inputs = num_layers * rows * width * h.element_size()
        attended = num_layers * rows * layer.query_heads * (layer.head_dim * h.element_size() + 4)
        everything = inputs + attended
        on_host = goes_to_host(self.offload, everything, h.device)
        if on_host and self.host is None:
            self.host = HostStore(h.device)
        store = self.host if on_host and self.host is not None else self.near
        store.begin()
        save = self.plan.attention == "save"
        if self.plan.attention == "auto":
            save = fits(everything, None if on_host else h.device, already=self.host_bytes if on_host else 0)
        return store, save, 0 if on_host else inputs + (attended if save else 0)

    def _layers_to_keep(
        self, h: torch.Tensor, num_layers: int, layer: Layer, inputs: bool, held: int, left: int
    ) -> int:
        if self.plan.projections != "auto":
            return num_layers if self.plan.projections == "save" else 0
        if h.device.type != "cuda":
            return 0
        each = h.shape[0] * _row_bytes(h, layer, inputs)
        return layers_beside(free_on(h.device) - held, each, num_layers, h.numel() * h.element_size(), left)


def _row_bytes(h: torch.Tensor, layer: Layer, inputs: bool) -> int:
    """What a layer keeps of a row beside its input and attention's output."""
    columns = layer.qkv.size[0] + layer.gate_up.size[0]
    if inputs:
        columns += h.shape[1] + sum(block.size[1] for block in (layer.qkv, layer.output, layer.gate_up))
        columns += 0 if layer.query_norm is None else (layer.query_heads + layer.kv_heads) * layer.head_dim
    return h.element_size() * columns


def _recordable(layer: Layer, h: torch.Tensor) -> bool:
    """Whether attention is kernels that read the pack's layout on the device, and every adapter is trained."""
    scoring = Scoring(layer.scale, layer.window, layer.softcap)
    trained = layer.parameters and all(p.requires_grad for p in layer.parameters)
    return bool(trained) and layer.window is None and takes(h.view(-1, 1, h.shape[1])[..., : layer.head_dim], scoring)


def check_groups(groups: int | None, kv_heads: int) -> None:
    """Raises UserError where KV heads cannot be divided into so many groups."""
    if groups is not None and (groups < 1 or kv_heads % groups):
        divisors = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
        raise UserError(
            f"train.kv_head_groups is {groups}, but the model has {kv_heads} KV heads",
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
    def forward(ctx, h: torch.Tensor, run: LayerRun, store: Store, save: bool, *parameters: torch.Tensor):
        if not save:
            # Before the layer runs, so that the copy hides behind it.
            ctx.stored = store.put([h])
        out, attended, ctx.kept = run.forward(h)
        if save:
            ctx.stored = store.put([h, *attended])
        # Holds no memory of its own, and lets autograd see an update between the passes.
        ctx.save_for_backward(*parameters)
        ctx.run = run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        parameters = ctx.saved_tensors
        h, *attended = ctx.stored.take()
        kept, ctx.kept = ctx.kept, None
        grads = LoraGrads()
        # The gradient is the sole property of this node: its only consumer is a node of this file, which made it.
        grad = grad.contiguous()
        need_input, when_free = ctx.needs_input_grad[0], ctx.stored.prefetch
        ctx.run.backward(h, attended, kept, grad, grads, need_input=need_input, when_free=when_free)
        return (grad if ctx.needs_input_grad[0] else None, None, None, None, *(grads.of(p) for p in parameters))


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
        return norm_backward(grad, h, ctx.norm, ctx.tile_rows), None, None
