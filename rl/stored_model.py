"""A transformers model whose parameters are views of stored weights: nothing is loaded, nothing is copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tandem.rl.attention_choice import with_attention
from tandem.rl.errors import UserError, cause, short
from tandem.rl.families import FAMILIES
from tandem.rl.weight_formats import DENSE, NF4

if TYPE_CHECKING:
    from tandem.rl.store import Stacked, WeightStore


@dataclass(frozen=True)
class LinearPlan:
    """A stacked weight that a model needs.

    Attributes:
        parts: rows by Hugging Face's module name, in order. biased: those of them that have a bias.
    """

    name: str
    parts: dict[str, slice]
    in_features: int
    biased: frozenset[str]

    def shape(self, part: str) -> tuple[int, int]:
        rows = self.parts[part]
        return rows.stop - rows.start, self.in_features


@dataclass(frozen=True)
class WeightPlan:
    """All that a model needs: stacked weights, and the shapes of the other parameters by name.

    `head` is the name of the head's weight, also where it is the embedding's and so not among `dense`.
    """

    linears: tuple[LinearPlan, ...]
    dense: dict[str, tuple[int, ...]]
    embedding: str
    head: str
    tied: bool


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a config with parameters on `meta` and true buffers on the CPU.

    Raises:
        UserError: transformers has no such model, or its family is not known here.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    if config.model_type not in FAMILIES:
        raise UserError(
            f"model family {short(config.model_type)}",
            reason="which of its projections share an input is not known here",
            fix=f"shared weights work for {', '.join(FAMILIES)}; use model.load_in_4bit or a plain load for others",
        )
    try:
        with init_empty_weights(include_buffers=False):
            return with_attention(
                lambda attention: AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=dtype, attn_implementation=attention
                )
            )
    except ValueError as error:
        raise UserError(f"transformers cannot build this model: {cause(error)}") from error


def plan(model: Any) -> WeightPlan:
    """What the model of `skeleton` needs."""
    family = FAMILIES[model.config.model_type]
    names = {id(module): name for name, module in model.named_modules()}
    body = names[id(model.get_decoder())]
    stacked_names = ("qkv_proj", None, "gate_up_proj", None)
    linears = []
    for i in range(len(model.get_decoder().layers)):
        for stacked_as, members in zip(stacked_names, family.stacks, strict=True):
            # Projections that the family stacks itself keep their name.
            name = f"{members[0].rpartition('.')[0]}.{stacked_as}" if len(members) > 1 else members[0]
            prefix = f"{body}.layers.{i}."
            linears.append(_linear_plan(model, prefix + name, [prefix + member for member in members]))
    taken = {f"{part}.{kind}" for one in linears for part in one.parts for kind in ("weight", "bias")}
    embedding = f"{names[id(model.get_input_embeddings())]}.weight"
    head = f"{names[id(model.get_output_embeddings())]}.weight"
    tied = bool(model.config.tie_word_embeddings)
    dense = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in taken and not (tied and name == head)
    }
    return WeightPlan(tuple(linears), dense, embedding, head, tied)


def _linear_plan(model: Any, name: str, members: list[str]) -> LinearPlan:
    parts, row = {}, 0
    modules = {member: model.get_submodule(member) for member in members}
    for member, module in modules.items():
        parts[member] = slice(row, row + module.out_features)
        row += module.out_features
    biased = frozenset(member for member, module in modules.items() if module.bias is not None)
    return LinearPlan(name, parts, modules[members[0]].in_features, biased)


def assemble(store: WeightStore) -> Any:
    """The store's model, frozen and in eval mode; what its parameters hold are the store's bytes."""
    model = skeleton(store.config, store.dtype)
    needs = plan(model)
    for one in needs.linears:
        stacked = store.linears[one.name]
        for part in one.parts:
            model.set_submodule(part, _linear(stacked, part, part in one.biased, store.dtype))
    for name in needs.dense:
        owner, _, leaf = name.rpartition(".")
        if name == needs.embedding and store.embedding_on_host:
            model.set_submodule(owner, HostEmbedding(store.dense[name], store.device))
        else:
            setattr(model.get_submodule(owner), leaf, _frozen(store.dense[name]))
    if needs.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(store.device))
    model.is_loaded_in_4bit = store.format == "nf4"  # by which peft knows that bitsandbytes' layers are to be expected
    model.requires_grad_(False)
    return model.eval()


def _linear(stacked: Stacked, part: str, biased: bool, dtype: torch.dtype) -> torch.nn.Linear:
    """One projection as a module on the stacked weight's bytes."""
    rows = stacked.parts[part]
    if stacked.format is NF4:
        made = _linear_4bit(stacked, part, dtype)
    elif stacked.format is DENSE:
        with torch.device("meta"):
            made = torch.nn.Linear(stacked.in_features, rows.stop - rows.start, bias=False)
        made.weight = _frozen(stacked.tensors["weight"][rows])
    else:
        made = StoredLinear(stacked, part)
    if biased:
        assert stacked.bias is not None
        made.bias = _frozen(stacked.bias[rows])
    return made


def _linear_4bit(stacked: Stacked, part: str, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = stacked.parts[part], stacked.in_features
    state = stacked.quant_state(part, dtype)
    with torch.device("meta"):
        made = Linear4bit(
            columns,
            rows.stop - rows.start,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=state.nested,
            quant_type="nf4",
        )
    made.weight = Params4bit(
        stacked.tensors["packed"][rows.start * columns // 2 : rows.stop * columns // 2],
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type="nf4",
        module=made,
        bnb_quantized=True,
    )
    made.quant_state = state
    # On CPUs with bfloat16 units bitsandbytes would replace the weight by one that is packed in another order.
    made.support_avx512bf16_for_cpu = False
    return made


class StoredLinear(torch.nn.Linear):
    """A projection that is made a matrix whenever it multiplies, for formats that no library has a layer for.

    It has no `weight`: nothing could be written to one. `qweight` tells peft where adapters belong.
    """

    def __init__(self, stacked: Stacked, part: str) -> None:
        rows = stacked.parts[part]
        with torch.device("meta"):
            super().__init__(stacked.in_features, rows.stop - rows.start, bias=False)
        self.weight = None  # type: ignore[assignment]
        # In a container, because a module is asked for its tensors, moved and copied, and these are the store's.
        self._stored = (stacked, rows)

    @property
    def qweight(self) -> torch.Tensor:
        """What is stored for the whole stack; no matrix of this projection."""
        stacked, _ = self._stored
        return stacked.tensors[stacked.format.main]

    @property
    def stored_tensors(self) -> Mapping[str, torch.Tensor]:
        """All that is stored for the whole stack, by the format's names."""
        return self._stored[0].tensors

    def write_weight(self, out: torch.Tensor) -> None:
        """Fill `out` `[out_features, in_features]`, whose rows may lie apart."""
        stacked, rows = self._stored
        stacked.write_weight(rows, out)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _StoredProduct.apply(input, self)  # type: ignore[no-any-return]

    def matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """`[out_features, in_features]`, made anew."""
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        self.write_weight(out)
        return out


class _StoredProduct(torch.autograd.Function):
    """x·Wᵀ + b. Kept for the backward pass is nothing: it makes the matrix once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: StoredLinear) -> torch.Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.matrix(x.dtype, x.device), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        (grad,) = grads
        return grad @ ctx.layer.matrix(grad.dtype, grad.device), None


class HostEmbedding(torch.nn.Module):
    """An embedding that stays in host memory; the rows that a batch names are gathered there and sent over.

    Its `weight` is no parameter, so that the model's device is where its layers are. Looking ids up waits for the
    device to give them.
    """

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self._host = (weight,)
        self.device = device

    @property
    def weight(self) -> torch.Tensor:
        """`[V, d]` on the host."""
        return self._host[0]

    @property
    def stored_tensors(self) -> Mapping[str, torch.Tensor]:
        """What is no parameter of this module."""
        return {"weight": self.weight}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(input.cpu(), self.weight)
        if self.weight.is_pinned():
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)


def check_embedding_on_host(model: Any, needs: WeightPlan) -> None:
    """Raises UserError where the embedding cannot stay on the host."""
    kind = type(model.get_input_embeddings())
    if needs.tied:
        raise UserError(
            "the embedding cannot stay on the host",
            reason="it is the model's head as well, which the device multiplies with at every step",
            fix="leave embedding_on_host off for models with tied embeddings",
        )
    if kind is not torch.nn.Embedding:
        raise UserError(
            f"the embedding cannot stay on the host: it is a {kind.__name__}",
            reason="that does more than look rows up",
            fix="leave embedding_on_host off for this model",
        )


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def dense_kind(name: str, needs: WeightPlan) -> str:
    """Under which heading of the ledger a dense parameter goes."""
    kinds: Mapping[str, str] = {needs.embedding: "embedding", needs.head: "head"}
    return kinds.get(name) or ("biases" if name.endswith(".bias") else "norms")
