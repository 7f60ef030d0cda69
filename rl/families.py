"""Model families as data: where the parts of a decoder layer lie in Hugging Face's modules and how they compute.

A family is one `LayerSpec` in `FAMILIES`, by `config.model_type`. `describe` binds it to a model; a model without a
description runs through its own Hugging Face forward. Modules are read anew on every pass, so an adapter may be
attached, switched off or exchanged at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch

from tandem.kernels.nf4 import DTYPES as NF4_DTYPES
from tandem.kernels.nf4 import from_quant_state
from tandem.rl.adapters import Adapter, active_adapter
from tandem.rl.errors import UserError


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer: names of submodules, relative to the layer, and facts that are not in the modules.

    Projections that share a name are stacked in one weight, in the order query, key, value or gate, up.

    Attributes:
        attention_norm, mlp_norm: before the two halves.
        attention_post_norm, mlp_post_norm: on what a half adds to the residual stream; None: there is none.
        query_norm, key_norm: over each head before the rotation; None: there is none.
        unit_offset: the norms multiply by 1 + weight, before rounding to the compute type.
        activation: the config's key for it.
        window: where the sliding window stands: nowhere, in the config for all layers, or in each attention module.
        softcap: the config's key for the soft-cap of attention scores; None: there is none.
        rope_by_type: the rotary module wants the layer's type, for a base of its own.
        never: config keys that must be false or zero, because what they switch on is not computed here.
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    unit_offset: bool = False
    activation: str = "hidden_act"
    window: Literal["none", "config", "module"] = "none"
    softcap: str | None = None
    rope_by_type: bool = False
    never: tuple[str, ...] = ("attention_dropout",)

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """Projections by their input: queries, keys and values, output, gate and up, down; each name once."""
        groups = ((self.query, self.key, self.value), (self.output,), (self.gate, self.up), (self.down,))
        return tuple(tuple(dict.fromkeys(names)) for names in groups)


_HEAD_NORMS: dict[str, Any] = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_SANDWICH: dict[str, Any] = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "unit_offset": True,
    "activation": "hidden_activation",
    "window": "module",
}

FAMILIES: dict[str, LayerSpec] = {
    "llama": LayerSpec(),
    "mistral": LayerSpec(window="config"),
    "qwen2": LayerSpec(window="module"),
    "qwen3": LayerSpec(window="module", **_HEAD_NORMS),
    "gemma2": LayerSpec(
        **_SANDWICH, softcap="attn_logit_softcapping", never=("attention_dropout", "use_bidirectional_attention")
    ),
    "gemma3_text": LayerSpec(
        **_SANDWICH, **_HEAD_NORMS, rope_by_type=True, never=("attention_dropout", "use_bidirectional_attention")
    ),
    "phi3": LayerSpec(
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        window="config",
        never=("attention_dropout", "resid_pdrop", "embd_pdrop"),
    ),
}
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer as it stands now: frozen base weight, bias, adapter."""

    name: str
    base: Any
    adapter: Adapter | None

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns: outputs and inputs."""
        return self.base.out_features, self.base.in_features

    @property
    def device(self) -> torch.device:
        weight = self.base.weight if self.base.weight is not None else self.base.qweight
        return weight.device  # type: ignore[no-any-return]

    def write_weight(self, out: torch.Tensor) -> None:
        """Fill `out` `[out, in]`, whose rows may lie apart, with the weight in its type, dequantised from 4 bits."""
        if hasattr(self.base, "write_weight"):  # a format of the weight store
            self.base.write_weight(out)
            return
        weight = self.base.weight
        if (state := getattr(weight, "quant_state", None)) is None:
            out.copy_(weight.detach())
        elif out.dtype in NF4_DTYPES:
            from_quant_state(state).dequantize(weight.data, out)
        else:
            out.copy_(from_quant_state(state).dequantize(weight.data))


@dataclass(frozen=True, eq=False)
class Block:
    """Projections of one input, whose outputs lie side by side."""

    projections: tuple[Projection, ...]

    @property
    def size(self) -> tuple[int, int]:
        return sum(one.size[0] for one in self.projections), self.projections[0].size[1]

    @property
    def starts(self) -> list[int]:
        """The first row of each projection."""
        return list(accumulate((one.size[0] for one in self.projections[:-1]), initial=0))

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """`[out]`, zero where a projection has none; None where no projection has one."""
        if all(one.bias is None for one in self.projections):
            return None
        device = self.projections[0].device
        parts = [
            torch.zeros(one.size[0], dtype=dtype, device=device) if one.bias is None else one.bias.detach().to(dtype)
            for one in self.projections
        ]
        return torch.cat(parts)


class Norm(NamedTuple):
    """RMSNorm over the last dimension. With `unit_offset` the factor is 1 + weight."""

    weight: torch.Tensor
    eps: float
    unit_offset: bool


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer, read: projections by their inputs, norms (None: absent), and the facts of its attention.

    The rows of `qkv` are queries, keys, values; those of `gate_up` the gate, then up.
    """

    qkv: Block
    output: Block
    gate_up: Block
    down: Block
    attention_norm: Norm
    attention_post_norm: Norm | None
    mlp_norm: Norm
    mlp_post_norm: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    activation: str
    rope: str | None

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' a and b, projection by projection."""
        adapters = [one.adapter for block in self.blocks for one in block.projections if one.adapter]
        return [p for adapter in adapters for p in (adapter.a, adapter.b)]


@dataclass(frozen=True)
class ModelSpec:
    """A family bound to a model's body (`backbone`: embed_tokens, layers, norm, rotary_emb)."""

    family: LayerSpec
    backbone: Any

    @property
    def num_layers(self) -> int:
        return self.backbone.config.num_hidden_layers

    def layer(self, index: int) -> Layer:
        """A layer as it stands now.

        Raises:
            UserError: a projection has something beside plain LoRA without dropout.
        """
        return _read(self.family, self.backbone.layers[index], index, self.backbone.config)

    def layers(self) -> list[Layer]:
        return [self.layer(i) for i in range(self.num_layers)]

    def final_norm(self) -> Norm:
        return _norm(self.family, self.backbone, "norm")

    def rope(
        self, hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> dict[str | None, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines `[T, rotary dimensions]` by the layers' rope type, rounded to `hidden`'s type: engines have
        them so, and a trainer that has them more exactly is further from what they sampled."""
        config, rotary = self.backbone.config, self.backbone.rotary_emb
        like = hidden.new_empty(0)  # the module looks at type and device only
        kinds = sorted(set(config.layer_types)) if self.family.rope_by_type else [None]
        tables = {}
        for kind in kinds:
            extra = () if kind is None else (kind,)
            cos, sin = rotary(like, position_ids[None], *extra)
            tables[kind] = (cos[0], sin[0])
        return tables


def describe(model: Any) -> ModelSpec | None:
    """The description of a causal language model (peft's wrapper is looked through), or None where there is none."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config
    family = FAMILIES.get(config.model_type)
    if family is None or getattr(config, family.activation, None) not in ACTIVATIONS:
        return None
    if any(getattr(config, key, None) for key in family.never):
        return None
    return ModelSpec(family, causal.get_decoder())


def _read(family: LayerSpec, module: Any, index: int, config: Any) -> Layer:
    attention = _submodule(module, family.output.rpartition(".")[0])
    head_dim = attention.head_dim
    q, k = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    window = {
        "none": None,
        "config": getattr(config, "sliding_window", None),
        "module": getattr(attention, "sliding_window", None),
    }[family.window]
    rows = (q + 2 * k, config.hidden_size, 2 * config.intermediate_size, config.hidden_size)
    qkv, output, gate_up, down = (_block(module, *one) for one in zip(family.stacks, rows, strict=True))
    return Layer(
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        attention_norm=_norm(family, module, family.attention_norm),
        attention_post_norm=_optional_norm(family, module, family.attention_post_norm),
        mlp_norm=_norm(family, module, family.mlp_norm),
        mlp_post_norm=_optional_norm(family, module, family.mlp_post_norm),
        query_norm=_optional_norm(family, module, family.query_norm),
        key_norm=_optional_norm(family, module, family.key_norm),
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        scale=attention.scaling,
        window=window,
        softcap=getattr(config, family.softcap) if family.softcap else None,
        activation=getattr(config, family.activation),
        rope=config.layer_types[index] if family.rope_by_type else None,
    )


def _block(module: Any, names: tuple[str, ...], rows: int) -> Block:
    """The projections of these names, which give `rows` outputs together."""
    block = Block(tuple(_projection(module, name) for name in names))
    if block.size[0] != rows:
        raise _not_fused(" and ".join(names), f"has {block.size[0]} outputs, not {rows}", "the family's usual shape")
    return block


def _norm(family: LayerSpec, module: Any, name: str) -> Norm:
    norm = _submodule(module, name)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return Norm(norm.weight.detach(), eps, family.unit_offset)


def _optional_norm(family: LayerSpec, module: Any, name: str | None) -> Norm | None:
    return None if name is None else _norm(family, module, name)


def _projection(layer: Any, name: str) -> Projection:
    module = _submodule(layer, name)
    wrapped = "lora_A" in module._modules
    base = module.get_base_layer() if wrapped else module
    if not (isinstance(base, torch.nn.Linear) and (hasattr(base, "write_weight") or _readable(base.weight))):
        what = "" if base.weight is None else f" with a {base.weight.dtype} weight"
        raise _not_fused(name, f"is a {type(base).__name__}{what}", "4-bit or unquantised weights")
    adapter = active_adapter(module, lambda what, fix: _not_fused(name, what, fix)) if wrapped else None
    return Projection(name, base, adapter)


def _submodule(module: Any, name: str) -> Any:
    """As `get_submodule`, which takes ten times as long: every layer is read in every pass."""
    for part in name.split("."):
        module = module._modules[part]
    return module


def _readable(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() or getattr(weight, "quant_state", None) is not None


def _not_fused(name: str, what: str, fix: str) -> UserError:
    return UserError(
        f"{name} {what}",
        reason="the fused layers do not compute that",
        fix=f"use {fix}, or switch the fused layers off",
    )
