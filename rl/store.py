"""The one copy of a model's frozen weights: loaded once, packed, and lent out as views.

The trainer's transformers model and an embedded engine both compute with these very bytes. Projections of one input
are stacked row by row, as engines want them; Hugging Face's modules are slices of the stacks. Once an engine has been
built on it, a tensor of the store is never replaced, only copied into: graphs hold its address.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tandem.rl.errors import UserError, cause, short
from tandem.rl.model_config import RopeScaling
from tandem.rl.rope_scaling import stretched
from tandem.rl.source_weights import SourceWeights, checkpoint_folder
from tandem.rl.store_cache import StoreCache
from tandem.rl.stored_model import LinearPlan, WeightPlan, assemble, check_embedding_on_host, dense_kind, plan, skeleton
from tandem.rl.weight_formats import DENSE, NF4, WeightFormat, weight_format
from tandem.rl.weights import cache_dir as default_cache_dir


@dataclass(frozen=True, eq=False)
class Stacked:
    """One linear weight: the projections of one input, rows concatenated.

    Attributes:
        name: as vLLM calls it, "model.layers.0.self_attn.qkv_proj".
        parts: rows by Hugging Face's module name, in order.
        bias: `[out]`, zero where a part has none; None where no part has one.
        tensors: what is stored, by the format's names.
        format: how. In an NF4 store it can be the dense one, where a checkpoint left a layer unquantised.
    """

    name: str
    parts: dict[str, slice]
    in_features: int
    bias: torch.Tensor | None
    tensors: dict[str, torch.Tensor]
    format: WeightFormat

    @property
    def out_features(self) -> int:
        return max(rows.stop for rows in self.parts.values())

    def write_weight(self, rows: slice, out: torch.Tensor) -> None:
        """Fill `out` `[rows, in]`, whose rows may lie apart, with these rows in its floating type.

        Raises:
            ValueError: `out` has another shape, or the rows are none that the format can take apart.
        """
        if not 0 <= rows.start < rows.stop <= self.out_features or rows.step not in (None, 1):
            raise ValueError(f"{self.name} has {self.out_features} rows, not {rows}")
        if tuple(out.shape) != (rows.stop - rows.start, self.in_features):
            raise ValueError(f"{self.name}, {rows}: out is {tuple(out.shape)}")
        self.format.write_weight(self.tensors, list(self.parts.values()), rows, out)

    def quant_state(self, part: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        """A bitsandbytes `QuantState` of views for an NF4 part, which dequantises to `dtype`."""
        if self.format is not NF4:
            raise TypeError(f"{self.name} is stored as {self.format.name}, which has no quant_state")
        return NF4.quant_state(
            self.tensors, list(self.parts.values()), list(self.parts).index(part), self.in_features, dtype
        )


@dataclass(eq=False)
class WeightStore:
    """A model's frozen weights on one device.

    Attributes:
        format: "nf4", "bf16" or another key of `FORMATS`.
        linears: the stacks, by name. dense: everything else by Hugging Face's parameter name, in `dtype`: embedding,
            head (absent where it is tied: the embedding is it), norms.
        config: the transformers config, without a quantisation of the checkpoint's.
        dtype: what the model computes in.
        embedding_on_host: the embedding lies in host memory, pinned where there is a GPU.
        folder: the checkpoint.
        notes: what the user should be told of the loading.
    """

    format: str
    linears: dict[str, Stacked]
    dense: dict[str, torch.Tensor]
    config: Any
    device: torch.device
    dtype: torch.dtype
    embedding_on_host: bool
    folder: Path
    plan: WeightPlan
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        format: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        cache_dir: Path | None = None,
        embedding_on_host: bool = False,
        revision: str | None = None,
        rope_scaling: RopeScaling | None = None,
    ) -> WeightStore:
        """Load a checkpoint.

        What quantising makes is kept in `cache_dir` (by default tandem's cache folder); an unquantised store, and a
        checkpoint that is quantised already, load as fast as a cache would.

        Args:
            source: a hub id, a folder in Hugging Face's format, or a GGUF file. dtype: what the model computes in;
                weights are rounded to it before they are quantised. rope_scaling: of the model's context.

        Raises:
            UserError: the checkpoint cannot be found or read, lacks a tensor, has one of a wrong shape, is quantised in
                another way, or its family is not known.
        """
        how = weight_format(format)
        device = _indexed(torch.device(device))
        folder = checkpoint_folder(source, revision)
        config = _config(folder, source, how)
        if rope_scaling is not None:
            config = stretched(config, rope_scaling)
        model = skeleton(config, dtype)
        needs = plan(model)
        if embedding_on_host:
            check_embedding_on_host(model, needs)
        for one in needs.linears:
            for part in one.parts:
                how.check(part, one.shape(part))
        weights = SourceWeights(folder)
        store = cls(how.name, {}, {}, config, device, dtype, embedding_on_host, folder, needs)
        quantised = any(weights.is_nf4(part) for one in needs.linears for part in one.parts)
        if quantised and how is not NF4:
            raise UserError(
                f"{folder} is quantised to NF4, and {how.name} weights are wanted",
                reason="values that were rounded once would be rounded again",
                fix="use the weight format nf4, or this model's bfloat16 checkpoint",
            )
        if quantised or not how.lossy:
            # A checkpoint that is quantised leaves a layer dense on purpose.
            store._load(weights, DENSE if quantised else how)
            return store
        cache = StoreCache(_cache_path(cache_dir, folder, store), _facts(weights, store))
        found = cache.read(store._placed)
        if isinstance(found, dict) and not store._adopt(found, how):
            found = "it lacks tensors of this model"
        if isinstance(found, dict):
            return store
        if found is not None:
            store.notes.append(f"the stored weights in {cache.path} are made anew: {found}")
        store._load(weights, how)
        try:
            cache.write(store._tensors())
        except OSError as error:
            store.notes.append(f"the {how.name} weights could not be kept in {cache.path.parent}: {cause(error)}")
        return store

    def causal_lm(self) -> Any:
        """A frozen transformers model on these weights; adapters may be attached to it. Nothing is copied."""
        from transformers import GenerationConfig

        model = assemble(self)
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model

    def ledger(self) -> dict[str, int]:
        """Bytes by kind: linears, scales, biases, norms, embedding (or embedding_on_host), head where it is its own."""
        sizes: dict[str, int] = {}

        def add(kind: str, tensor: torch.Tensor) -> None:
            sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()

        for stacked in self.linears.values():
            for name, tensor in stacked.tensors.items():
                add("linears" if name == stacked.format.main else "scales", tensor)
            if stacked.bias is not None:
                add("biases", stacked.bias)
        for name, tensor in self.dense.items():
            kind = dense_kind(name, self.plan)
            add("embedding_on_host" if kind == "embedding" and self.embedding_on_host else kind, tensor)
        return sizes

    def _load(self, weights: SourceWeights, how: WeightFormat) -> None:
        """`how`: the format of what is not in NF4 yet."""
        for one in self.plan.linears:
            used, tensors = self._read(weights, one, how)
            bias = self._read_bias(weights, one)
            self.linears[one.name] = Stacked(one.name, one.parts, one.in_features, bias, tensors, used)
        for name, shape in self.plan.dense.items():
            self.dense[name] = self._placed(f"dense/{name}", weights.read(name, shape).to(self.dtype))

    def _read(
        self, weights: SourceWeights, one: LinearPlan, how: WeightFormat
    ) -> tuple[WeightFormat, dict[str, torch.Tensor]]:
        packed = [part for part in one.parts if weights.is_nf4(part)]
        if not packed:
            parts = [weights.read(f"{part}.weight", one.shape(part)) for part in one.parts]
            return how, how.quantise(parts, device=self.device, dtype=self.dtype)
        if len(packed) < len(one.parts):
            rest = ", ".join(part for part in one.parts if part not in packed)
            raise UserError(
                f"{packed[0]} is quantised, and {rest} is not",
                reason="they are one stacked weight here",
                fix="quantise the model anew from its bfloat16 checkpoint",
            )
        adopted = [weights.read_nf4(part, one.shape(part)) for part in one.parts]
        return NF4, NF4.adopt(one.name, adopted, device=self.device)

    def _read_bias(self, weights: SourceWeights, one: LinearPlan) -> torch.Tensor | None:
        if not one.biased:
            return None
        size = sum(one.shape(part)[0] for part in one.parts)
        bias = torch.zeros(size, dtype=self.dtype, device=self.device)
        for part in one.biased:
            bias[one.parts[part]].copy_(weights.read(f"{part}.bias", (one.shape(part)[0],)))
        return bias

    def _placed(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy where it belongs."""
        if self.embedding_on_host and key == f"dense/{self.plan.embedding}":
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda")
        else:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        return kept.copy_(tensor)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything by its key in the cache."""
        tensors = {f"dense/{name}": tensor for name, tensor in self.dense.items()}
        for name, stacked in self.linears.items():
            tensors |= {f"linear/{name}/{key}": tensor for key, tensor in stacked.tensors.items()}
            if stacked.bias is not None:
                tensors[f"bias/{name}"] = stacked.bias
        return tensors

    def _adopt(self, tensors: dict[str, torch.Tensor], how: WeightFormat) -> bool:
        """Take what `_tensors` gave another time; False where it is not this model's."""
        linears: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("linear/"):
                name, _, kind = key.removeprefix("linear/").rpartition("/")
                linears.setdefault(name, {})[kind] = tensor
        dense = {key.removeprefix("dense/"): tensor for key, tensor in tensors.items() if key.startswith("dense/")}
        biases = {key.removeprefix("bias/"): tensor for key, tensor in tensors.items() if key.startswith("bias/")}
        if (
            linears.keys() != {one.name for one in self.plan.linears}
            or biases.keys() != {one.name for one in self.plan.linears if one.biased}
            or {name: tuple(tensor.shape) for name, tensor in dense.items()} != self.plan.dense
        ):
            return False
        for one in self.plan.linears:
            bias = biases.get(one.name)
            self.linears[one.name] = Stacked(one.name, one.parts, one.in_features, bias, linears[one.name], how)
        self.dense |= {name: dense[name] for name in self.plan.dense}
        return True


def _indexed(device: torch.device) -> torch.device:
    """cuda as cuda:0, so that devices compare."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _config(folder: Path, source: str | Path, how: WeightFormat) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the config of {short(str(source))} cannot be read: {cause(error)}") from error
    given = getattr(config, "quantization_config", None)
    if given is None:
        return config
    facts: Mapping[str, Any] = given if isinstance(given, dict) else given.to_dict()
    if not facts.get("load_in_4bit", facts.get("_load_in_4bit")):
        method = facts.get("quant_method", "an unknown method")
        raise UserError(
            f"{short(str(source))} is quantised with {getattr(method, 'value', method)}, and not to 4 bits by "
            "bitsandbytes",
            reason=f"its weights cannot be taken over as {how.name}",
            fix="use the bfloat16 checkpoint of this model, or one that bitsandbytes quantised to NF4",
        )
    # The store's own format is what counts from here on.
    del config.quantization_config
    return config


def _cache_path(cache_dir: Path | None, folder: Path, store: WeightStore) -> Path:
    """One file for each model, format, compute type and kind of device, whose arithmetic may differ in the last bit."""
    key = f"{folder.resolve()}\0{store.dtype}\0{store.device.type}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return (cache_dir or default_cache_dir() / "store") / f"{folder.name}-{store.format}-{digest}.safetensors"


def _facts(weights: SourceWeights, store: WeightStore) -> dict[str, str]:
    return {
        "format": store.format,
        "dtype": str(store.dtype),
        "device": store.device.type,
        "source": weights.fingerprint(),
    }
