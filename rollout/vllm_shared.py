"""vLLM on the trainer's weights: a quantisation config whose layers register the store's tensors, a loader that binds
the rest, and a worker that keeps them through sleep. All of it goes through vLLM's own registries and arguments.

Imports vLLM; `rollout.vllm_engine` imports this file only once an engine is to be built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker.gpu_worker import Worker

from tandem.kernels.int4_marlin import MarlinScratch
from tandem.kernels.reference import wide_product
from tandem.rollout.policy_adapter import POLICY_ID, Stacks
from tandem.rollout.stored_linear import reserve_scratch
from tandem.rollout.weight_binding import WeightBinding

QUANTIZATION = LOAD_FORMAT = "tandem_shared"
WORKER = "tandem.rollout.vllm_shared.StoreWorker"

# The store of the engine that is being built: vLLM makes its layers deep inside its constructor.
_binding: WeightBinding | None = None


@contextmanager
def sharing(store: Any, *, stock_numerics: bool = False) -> Iterator[dict[str, Any]]:
    """While this is open, an engine built with the arguments that it yields has the store's tensors as its weights.

    Args:
        stock_numerics: products and logits as in a vLLM that loads the checkpoint itself.
    """
    global _binding
    assert _binding is None, "one engine at a time can be built on a store"
    _binding = WeightBinding(store, stock_numerics=stock_numerics)
    try:
        yield {
            "quantization": QUANTIZATION,
            "load_format": LOAD_FORMAT,
            # Part of the name under which vLLM keeps compiled graphs: those of another format do not fit.
            "additional_config": {"stored_weights": _binding.layout_digest(), "stock_numerics": stock_numerics},
        }
    finally:
        _binding = None


def _current() -> WeightBinding:
    if _binding is None:
        raise RuntimeError("vLLM builds layers on shared weights, but no store is being shared")
    return _binding


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _stacked(prefix: str, sizes: list[int], in_features: int) -> Any:
    stacked = _current().linear(prefix)
    if (stacked.out_features, stacked.in_features) != (sum(sizes), in_features):
        raise RuntimeError(
            f"{prefix} is [{sum(sizes)}, {in_features}] in vLLM and "
            f"[{stacked.out_features}, {stacked.in_features}] in the weight store"
        )
    return stacked


def _register(layer: torch.nn.Module, tensors: dict[str, torch.Tensor], main: str) -> None:
    """The weights themselves as `weight`, where vLLM looks for a layer's device; scales as buffers beside it."""
    layer.register_parameter("weight", _frozen(tensors[main]))
    for name, tensor in tensors.items():
        if name != main:
            layer.register_buffer(name, tensor, persistent=False)


class _StoredLinearMethod:
    """What vLLM asks a linear layer's method to make: here the store's tensors, for the layer of this name."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._bind(layer, _stacked(self._prefix, output_partition_sizes, input_size_per_partition))

    def _bind(self, layer: Any, stacked: Any) -> None:
        raise NotImplementedError


class Nf4LinearMethod(_StoredLinearMethod, LinearMethodBase):
    """NF4 with whatever scales the store has, through `tandem::stored_linear`."""

    def _bind(self, layer: Any, stacked: Any) -> None:
        _register(layer, stacked.tensors, "packed")
        # Rows of the parts as they were quantised: vLLM's own are the same or finer.
        layer.part_rows = [rows.stop - rows.start for rows in stacked.parts.values()]
        layer.nested = "absmax2" in stacked.tensors
        layer.as_bitsandbytes = _current().stock_numerics

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        outer = (layer.absmax2, layer.code2, layer.offsets) if layer.nested else (None, None, None)
        return torch.ops.tandem.stored_linear(
            x, layer.weight, layer.absmax, *outer, layer.part_rows, bias, layer.as_bitsandbytes
        )


class Int4LinearMethod(_StoredLinearMethod, LinearMethodBase):
    """int4 in Marlin's layout, through vLLM's own Marlin product."""

    def _bind(self, layer: Any, stacked: Any) -> None:
        scratch = _current().shared("marlin", lambda: MarlinScratch.on(stacked.tensors["packed"].device))
        _register(layer, {**stacked.tensors, "workspace": scratch.workspace, "empty": scratch.empty}, "packed")
        layer.out_rows = stacked.out_features

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.tandem.stored_int4_linear(
            x, layer.weight, layer.scales, layer.workspace, layer.empty, layer.out_rows, bias
        )


class Fp8LinearMethod(_StoredLinearMethod, LinearMethodBase):
    """FP8 with a scale per output, through `tandem::stored_fp8_linear`."""

    def _bind(self, layer: Any, stacked: Any) -> None:
        _register(layer, stacked.tensors, "packed")

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.tandem.stored_fp8_linear(x, layer.weight, layer.scales, bias)


class DenseLinearMethod(_StoredLinearMethod, UnquantizedLinearMethod):
    """vLLM's own product on the store's matrix."""

    def _bind(self, layer: Any, stacked: Any) -> None:
        _register(layer, stacked.tensors, "weight")


class StoredEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Embedding and head on the store's matrix.

    vLLM would pad the vocabulary to a multiple of 64, which only tensor parallelism needs: on one GPU it looks rows up
    by token id and cuts logits to the true vocabulary, so the matrix is bound as it is. One that the trainer keeps in
    pinned host memory is read over the bus, row by row.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._rounded = _current().stock_numerics

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        weight = _current().embedding(self._prefix)
        padded, width = sum(output_partition_sizes), input_size_per_partition
        if weight.shape[1] != width or not layer.org_vocab_size <= weight.shape[0] <= padded:
            raise RuntimeError(
                f"{self._prefix} is [{layer.org_vocab_size}, {width}] in vLLM, {list(weight.shape)} in the weight store"
            )
        if weight.device.type == "cpu":
            from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

            weight = get_accelerator_view_from_cpu_tensor(weight)
        layer.register_parameter("weight", _frozen(weight))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits in float32, as the trainer computes them: rounded to bfloat16, as vLLM has them, a logit of 20 is off
        by up to 0.06."""
        if self._rounded:
            return super().apply(layer, x, bias)
        logits = wide_product(x.reshape(-1, x.shape[-1]), layer.weight.t()).view(*x.shape[:-1], -1)
        return logits if bias is None else logits + bias


_LINEAR_METHODS = {
    "nf4": Nf4LinearMethod,
    "int4": Int4LinearMethod,
    "fp8": Fp8LinearMethod,
    "bf16": DenseLinearMethod,
}


@register_quantization_config(QUANTIZATION)
class StoreConfig(QuantizationConfig):
    """Says how each layer is stored: as the store says."""

    @classmethod
    def get_name(cls) -> str:
        return QUANTIZATION

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StoreConfig:
        return cls()

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> str | None:
        """A checkpoint's own quantisation does not count when ours is asked for."""
        return QUANTIZATION if user_quant == QUANTIZATION else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return _LINEAR_METHODS[_current().linear(prefix).format.name](prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return StoredEmbeddingMethod(prefix)
        return None


@register_model_loader(LOAD_FORMAT)
class StoreLoader(BaseModelLoader):
    """Binds what the layers did not register themselves; nothing is read from disk."""

    def download_model(self, model_config: Any) -> None:
        """The store is there already."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        binding = _current()
        binding.bind(model)
        if elements := max(binding.largest_linear(name) for name in ("nf4", "fp8")):
            reserve_scratch(elements, binding.store.device, model_config.dtype)


class StoreWorker(Worker):
    """Leaves weights and adapter buffers out of the memory that sleep takes away: only the KV cache goes."""

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return nullcontext() if tag == "weights" else super()._maybe_get_memory_pool_context(tag)

    def sleep(self, level: int = 1) -> None:
        """vLLM asserts at the end that the device has more free memory than before, which another process on the card
        may just have taken."""
        try:
            super().sleep(level)
        except AssertionError as error:
            if "increased after sleeping" not in str(error):
                raise

    def policy_stacks(self, rank: int) -> dict[str, Stacks]:
        """Make the policy's adapter known, active and empty; returns the buffers that hold it, by layer."""
        manager = self.model_runner.lora_manager
        manager.add_dummy_lora(LoRARequest("policy", POLICY_ID, "/unused"), rank=rank)
        manager._adapter_manager.activate_adapter(POLICY_ID)
        modules = manager._adapter_manager.modules
        return {name: Stacks(module.lora_a_stacked, module.lora_b_stacked) for name, module in modules.items()}
