"""The sizes of a model, from its config alone: its modules are built without memory and read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tandem.rl.config import LoraConfig, ModelConfig
from tandem.rl.errors import UserError, cause
from tandem.rl.rope_scaling import stretched


@dataclass(frozen=True)
class Linear:
    """A linear layer `[rows, columns]` by its module's name."""

    name: str
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Projections:
    """What a fused layer stacks, by names of the first decoder layer's modules."""

    qkv: tuple[Linear, ...]
    output: tuple[Linear, ...]
    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]


@dataclass(frozen=True)
class ModelShape:
    """A causal language model.

    Attributes:
        linears: every linear layer but the head.
        embedding: elements of the input embedding. head: the head's sizes; `tied`: it is the embedding.
        other: elements of everything else (norms, biases, experts that are no linear layers).
        windows: sliding window of each layer in tokens, None where it sees everything.
        max_length: longest sequence that the config allows.
        quantised: the checkpoint is in 4 bits as it stands.
        projections: of a decoder layer; None: the family has no fused layers.
        rope_tables: how many pairs of tables of cosines and sines a pack needs.
        head_norms: queries and keys are normed by head.
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    embedding: int
    head: Linear
    tied: bool
    other: int
    windows: tuple[int | None, ...]
    max_length: int
    quantised: bool = False
    projections: Projections | None = None
    rope_tables: int = 1
    head_norms: bool = False

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def weights(self) -> int:
        """All of them."""
        return self.linear_elements + self.embedding + self.other + (0 if self.tied else self.head.elements)

    @cached_property
    def linear_elements(self) -> int:
        return sum(one.elements for one in self.linears)


@dataclass(frozen=True)
class AdapterShape:
    """LoRA: its rank and the layers that have it."""

    rank: int
    targets: tuple[Linear, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the layers that have it."""
        return frozenset(one.name for one in self.targets)

    @cached_property
    def tensors(self) -> list[int]:
        """Elements of every a and b."""
        return [self.rank * size for one in self.targets for size in (one.columns, one.rows)]

    @cached_property
    def elements(self) -> int:
        return sum(self.tensors)

    def rank_of(self, block: tuple[Linear, ...]) -> int:
        """Columns that a block's adapters take in a fused layer's buffers."""
        from tandem.kernels.lora_linear import padded_rank

        return padded_rank(self.rank * sum(one.name in self.names for one in block))


def read_shape(config: ModelConfig) -> ModelShape:
    """The shape of `model.model_name_or_path`: a folder, a hub id, or a GGUF file, which is converted as for a run.

    Much used hub ids are known here (`plan_models`); nothing is asked of a hub for them.

    Raises:
        UserError: there is no such model, or transformers does not know its kind.
    """
    from transformers import AutoConfig

    from tandem.rl.plan_models import MODELS
    from tandem.rl.weights import resolve_model

    source = resolve_model(config.model_name_or_path)
    if source in MODELS and config.revision is None:
        return shape_of(stretched(AutoConfig.for_model(**MODELS[source]), config.rope_scaling))
    try:
        found = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        ).get_text_config()
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot read the config of the model {config.model_name_or_path!r}: {first}",
            reason="a plan needs the model's config.json, and nothing else of it",
            fix="give a hub id, a folder that holds config.json, or pkg://PACKAGE/FILE.gguf; without access to a hub, "
            "a folder with that one file is enough",
        ) from error
    return shape_of(stretched(found, config.rope_scaling), trust_remote_code=config.trust_remote_code)


def shape_of(config: Any, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model with this config of transformers'.

    Raises:
        UserError: there is no causal language model of this kind.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tandem.rl.families import describe

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, OSError, NotImplementedError) as error:
        kind = getattr(config, "model_type", type(config).__name__)
        raise UserError(f"transformers cannot build a model of type {kind!r}: {cause(error)}") from error
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linears = tuple(
        Linear(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    tied = head.weight is embedding.weight or bool(getattr(config, "tie_word_embeddings", False))
    # A parameter that stands in two places is one.
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    head_own = 0 if head.weight is embedding.weight else head.weight.numel()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    described = describe(model)
    kinds = getattr(config, "layer_types", None)
    return ModelShape(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        linears=linears,
        embedding=embedding.weight.numel(),
        head=Linear("lm_head", *head.weight.shape),
        tied=tied,
        other=total - sum(one.elements for one in linears) - embedding.weight.numel() - head_own,
        windows=_windows(config, kinds),
        max_length=getattr(config, "max_position_embeddings", None) or 1 << 20,
        quantised=getattr(config, "quantization_config", None) is not None,
        projections=None if described is None else _projections(described.layer(0), linears),
        head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        rope_tables=len(set(kinds)) if described is not None and described.family.rope_by_type and kinds else 1,
    )


def adapter_shape(shape: ModelShape, config: LoraConfig) -> AdapterShape:
    """The adapter that peft would attach for this section, or the one that `init_from` holds.

    Raises:
        UserError: no layer has a name that `target_modules` gives.
    """
    rank, targets = config.r, config.target_modules
    if config.init_from and (file := Path(config.init_from) / "adapter_config.json").is_file():
        given = json.loads(file.read_text(encoding="utf-8"))
        rank, targets = given["r"], given["target_modules"]
    every = (*shape.linears, shape.head)
    if targets == "all-linear" or targets == ["all-linear"]:
        return AdapterShape(rank, shape.linears)
    if isinstance(targets, str):
        chosen = tuple(one for one in every if re.fullmatch(targets, one.name))
    else:
        chosen = tuple(one for one in every if any(one.name == t or one.name.endswith(f".{t}") for t in targets))
    if not chosen:
        leaves = sorted({one.name.rpartition(".")[2] for one in every})
        raise UserError(
            f"lora.target_modules: the model has no linear layer named {targets!r}",
            fix=f"its linear layers are {', '.join(leaves)}",
        )
    return AdapterShape(rank, chosen)


def _projections(layer: Any, linears: tuple[Linear, ...]) -> Projections:
    def of(block: Any) -> tuple[Linear, ...]:
        ends = [f"layers.0.{one.name}" for one in block.projections]
        return tuple(next(one for one in linears if one.name.endswith(end)) for end in ends)

    return Projections(of(layer.qkv), of(layer.output), of(layer.gate_up), of(layer.down))


def _windows(config: Any, kinds: list[str] | None) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        # Qwen2's window counts only where its switch is on.
        window = window if getattr(config, "use_sliding_window", True) else None
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
