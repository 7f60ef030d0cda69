"""Makes another engine's parameters be the store's tensors, and proves that nothing was left out or held twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class WeightBinding:
    """The store's tensors by an engine's module names.

    Layers ask for their tensors while the engine builds its model; `bind` does the rest (norms, biases) and checks all.

    Args:
        store: a `tandem.rl.store.WeightStore`.
        stock_numerics: the engine is to round as one that has loaded the weights itself.
    """

    def __init__(self, store: Any, *, stock_numerics: bool = False) -> None:
        self.store, self.stock_numerics = store, stock_numerics
        self._shared: dict[str, Any] = {}

    def linear(self, name: str) -> Any:
        """The stacked weight of the layer `name`.

        Raises:
            RuntimeError: the store has none.
        """
        if name not in self.store.linears:
            raise RuntimeError(f"the engine builds a linear layer {name!r} that the weight store does not have")
        return self.store.linears[name]

    def embedding(self, name: str) -> torch.Tensor:
        """`[V, d]` of the embedding or the head `name`; for a tied head that of the embedding.

        Llama's classes in vLLM give the embedding no name at all: "" is the embedding.

        Raises:
            RuntimeError: the store has none.
        """
        dense = self.store.dense
        found = dense.get(f"{name}.weight")
        if found is None and (not name or getattr(self.store.config, "tie_word_embeddings", False)):
            found = next((t for key, t in dense.items() if key.endswith("embed_tokens.weight")), None)
        if found is None:
            raise RuntimeError(f"the engine builds an embedding {name!r} that the weight store does not have")
        return found

    def largest_linear(self, format: str) -> int:
        """Elements of the largest stacked weight that is stored so; 0: none is."""
        fitting = [one for one in self.store.linears.values() if one.format.name == format]
        return max((one.out_features * one.in_features for one in fitting), default=0)

    def layout_digest(self) -> str:
        """Equal for stores whose tensors have the same names, types and shapes in the same formats."""
        layout = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in self._tensors())
        formats = sorted((name, one.format.name) for name, one in self.store.linears.items())
        return hashlib.sha256(repr((layout, formats)).encode()).hexdigest()

    def shared(self, key: str, make: Callable[[], Any]) -> Any:
        """Something that all layers use together, made when the first asks."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def bind(self, model: torch.nn.Module) -> None:
        """Point the remaining parameters to the store, and check that every parameter and every tensor is used.

        Raises:
            RuntimeError: a parameter is not in the store or has another shape or type, or a tensor of the store is used
                by no parameter.
        """
        mine = self._addresses()
        for name, parameter in model.named_parameters():
            if parameter.data_ptr() in mine:
                continue
            tensor = self._dense(name)
            if tensor is None:
                continue
            if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                raise RuntimeError(
                    f"{name} is {tuple(parameter.shape)} {parameter.dtype} in the engine and "
                    f"{tuple(tensor.shape)} {tensor.dtype} in the weight store"
                )
            parameter.data = tensor
        if strangers := self.strangers(model):
            raise RuntimeError(f"parameters that do not lie in the weight store: {', '.join(strangers[:5])}")
        held = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
        if unused := sorted(name for name, tensor in self._tensors() if tensor.data_ptr() not in held):
            raise RuntimeError(f"the engine uses no copy of the store's {', '.join(unused[:5])}")

    def strangers(self, model: torch.nn.Module) -> list[str]:
        """Parameters whose memory is not the store's; adapters' own buffers are none."""
        mine = self._addresses()
        return [name for name, p in model.named_parameters() if p.numel() and p.data_ptr() not in mine]

    def _dense(self, name: str) -> torch.Tensor | None:
        name = name.replace(".base_layer", "")
        if name in self.store.dense:
            return self.store.dense[name]
        layer, _, leaf = name.rpartition(".")
        stacked = self.store.linears.get(layer)
        return stacked.bias if stacked is not None and leaf == "bias" else None

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.store.dense.items()
        for name, stacked in self.store.linears.items():
            yield from ((f"{name}.{key}", tensor) for key, tensor in stacked.tensors.items())
            if stacked.bias is not None:
                yield f"{name}.bias", stacked.bias

    def _addresses(self) -> set[int]:
        return {tensor.data_ptr() for _, tensor in self._tensors()}
