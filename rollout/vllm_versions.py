"""The vLLM releases that the shared engine runs on, and the names inside vLLM that it relies on beyond the manual.

A release is accepted once the GPU tests have passed on it. The names are looked up and their parameters compared
before an engine is built, so that a changed vLLM is a sentence and not a crash half an hour later.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tandem.rollout.process_state import attention_preserved


@dataclass(frozen=True)
class Relied:
    """Something of vLLM's: `module`, dotted `name` in it, and parameters (or fields) that it must have."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_LAYERS = "vllm.model_executor.layers"
_CREATE_WEIGHTS = (
    "layer",
    "input_size_per_partition",
    "output_partition_sizes",
    "input_size",
    "output_size",
    "params_dtype",
)
_COMMON = (
    Relied("vllm", "LLM.generate", ("prompts", "sampling_params", "use_tqdm", "lora_request")),
    Relied("vllm", "LLM.enqueue", ("prompts", "sampling_params", "lora_request", "use_tqdm")),
    Relied("vllm.v1.engine.llm_engine", "LLMEngine.step"),
    Relied("vllm.v1.engine.llm_engine", "LLMEngine.has_unfinished_requests"),
    Relied("vllm", "LLM.sleep", ("level",)),
    Relied("vllm", "LLM.wake_up", ("tags",)),
    Relied("vllm", "LLM.collective_rpc", ("method", "args")),
    Relied("vllm", "LLM.apply_model", ("func",)),
    Relied(
        "vllm",
        "SamplingParams",
        ("n", "seed", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos", "max_tokens", "logprobs")
        + ("flat_logprobs", "detokenize", "stop", "include_stop_str_in_output"),
    ),
    Relied("vllm.v1.engine.output_processor", "OutputProcessor", ("tokenizer",)),
    Relied("vllm.logprobs", "FlatLogprobs", ("start_indices", "token_ids", "logprobs")),
    Relied("vllm.lora.request", "LoRARequest", ("lora_name", "lora_int_id", "lora_path", "load_inplace")),
    Relied("vllm.v1.engine.llm_engine", "LLMEngine.add_lora", ("lora_request",)),
    Relied("vllm.v1.engine.core_client", "InprocClient.shutdown"),
    Relied("vllm.device_allocator.cumem", "CuMemAllocator.sleep", ("offload_tags",)),
    Relied("vllm.v1.worker.gpu_worker", "Worker._maybe_get_memory_pool_context", ("tag",)),
    Relied("vllm.lora.worker_manager", "WorkerLoRAManager.add_dummy_lora", ("lora_request", "rank")),
    Relied("vllm.lora.model_manager", "LoRAModelManager.activate_adapter", ("lora_id",)),
    Relied("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.create_lora_weights", ("max_loras", "lora_config")),
    Relied(f"{_LAYERS}.quantization", "register_quantization_config", ("quantization",)),
    Relied(
        f"{_LAYERS}.quantization.base_config",
        "QuantizationConfig.override_quantization_method",
        ("hf_quant_cfg", "user_quant", "hf_config"),
    ),
    Relied(f"{_LAYERS}.quantization.base_config", "QuantizationConfig.get_quant_method", ("layer", "prefix")),
    Relied(f"{_LAYERS}.linear", "LinearMethodBase.create_weights", _CREATE_WEIGHTS),
    Relied(f"{_LAYERS}.linear", "UnquantizedLinearMethod.apply", ("layer", "x", "bias")),
    Relied(f"{_LAYERS}.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.create_weights", _CREATE_WEIGHTS),
    Relied(f"{_LAYERS}.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.embedding", ("layer", "input_")),
    Relied("vllm.model_executor.model_loader", "register_model_loader", ("load_format",)),
    Relied("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_weights", ("model", "model_config")),
    Relied("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.download_model", ("model_config",)),
    Relied("vllm.config.compilation", "CompilationConfig", ("custom_ops", "mode", "cudagraph_mode")),
    Relied("vllm.config.kernel", "KernelConfig", ("ir_op_priority",)),
    Relied("vllm.config.kernel", "IrOpPriorityConfig", ("rms_norm", "fused_add_rms_norm")),
    Relied("vllm.utils.torch_utils", "get_accelerator_view_from_cpu_tensor", ("cpu_tensor",)),
)
ACCEPTED: dict[str, tuple[Relied, ...]] = {"0.24.0": _COMMON}
# Ranks that vLLM allocates adapter buffers for.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def refusal(
    accepted: dict[str, tuple[Relied, ...]] = ACCEPTED,
    *,
    version_of: Callable[[str], str] = importlib.metadata.version,
    module: Callable[[str], ModuleType | Any] = importlib.import_module,
) -> str | None:
    """Why the installed vLLM cannot be used, in one sentence; None: it can.

    vLLM is imported only when its version is an accepted one.
    """
    try:
        version = version_of("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vLLM is not installed"
    # A build's local part ("+cu130") says nothing of the source.
    relied = accepted.get(version.partition("+")[0])
    if relied is None:
        return f"vLLM {version} is installed, and only {' and '.join(accepted)} has been tried"
    with attention_preserved():
        wrong = missing(relied, module=module)
    if wrong:
        return f"vLLM {version} lacks what the engine relies on: {'; '.join(wrong)}"
    return None


def missing(
    relied: Sequence[Relied], *, module: Callable[[str], ModuleType | Any] = importlib.import_module
) -> list[str]:
    """One phrase for every name that is not there or has lost a parameter."""
    wrong = []
    for one in relied:
        try:
            found: Any = module(one.module)
            for part in one.name.split("."):
                found = getattr(found, part)
        except ImportError as error:
            wrong.append(f"{one.module} cannot be imported ({error})")
            continue
        except AttributeError:
            wrong.append(f"{one} does not exist")
            continue
        have = _parameters(found)
        if have is not None and (lost := [name for name in one.parameters if name not in have]):
            wrong.append(f"{one} has no {' and no '.join(lost)}")
    return wrong


def _parameters(found: Any) -> set[str] | None:
    """Names of a function's parameters or a class's fields; None where anything is taken."""
    if fields := getattr(found, "__struct_fields__", None):
        return set(fields)
    parameters = inspect.signature(found).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return None  # a wrapper that passes everything on
    return set(parameters)
