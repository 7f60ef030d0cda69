"""Rollouts through vLLM inside the trainer's process, on the trainer's own weights where there is a weight store.

What vLLM computes with are the store's tensors. The adapter is copied into its buffers in place before rollouts, under
a name per version, so that a prefix cached for an older policy is never met again. `sleep` gives the KV cache back,
unless it is a small one.

A completion's tokens follow from its prompt, its number in the group, the sampling and the policy, like those of every
engine, but only up to floating point: kernels are chosen by batch size, so another batch around a request may turn a
near tie. vLLM draws from other random numbers than the transformers engine, which gives other completions for the same
seed. Temperature 0 draws nothing: a group's completions are then copies of one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tandem.rl.errors import UserError
from tandem.rl.model import LanguageModel
from tandem.rl.samples import Completion, Group, Prompt, Sampling
from tandem.rollout.engine import OnGroup, Progress
from tandem.rollout.policy_adapter import POLICY_ID, InPlacePush, PolicyNames, buffer_rank, policy_parts
from tandem.rollout.process_state import on_stream, preserved
from tandem.rollout.random_streams import mixed, stream_of
from tandem.rollout.vllm_plan import VllmOptions, config_folder, kv_cache_bytes
from tandem.rollout.vllm_steps import generate_stepwise
from tandem.rollout.vllm_versions import LORA_RANKS

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Its sampler does not report the log-probs that we need.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_LOGGERS = ("vllm", "flashinfer.jit")
# For where the compiler would make norms of its own: vLLM's kernels, which it takes elsewhere, under its names of them.
_OWN_NORMS = {"rms_norm": ["vllm_c"], "fused_add_rms_norm": ["vllm_c"]}


class VllmEngine:
    """See the module's text. The trainer knows it as a `RolloutEngine`.

    Args:
        language_model: the trainer's, with its adapter attached or without one.
        store: the weights that both compute with; None: vLLM loads a copy of its own from `source`.
        options: sizes and switches.
        source: folder or hub id of the checkpoint, for a copy.
        source_quantization: vLLM's name of the quantisation of that copy ("bitsandbytes"); None: as it is.
        api: what is used of vLLM; None: the installed one, whose version must have been checked (`vllm_versions`).

    Raises:
        UserError: an adapter that vLLM cannot serve, or too little memory for the KV cache.
    """

    name = "vllm"

    def __init__(
        self,
        language_model: LanguageModel,
        store: Any,
        options: VllmOptions | None = None,
        *,
        source: str | Path | None = None,
        source_quantization: str | None = None,
        api: Any = None,
    ) -> None:
        if store is None and source is None:
            raise ValueError("without a store, vLLM needs the checkpoint's folder")
        options = options or VllmOptions()
        self._lm = language_model
        self._parts = policy_parts(language_model.causal_lm)
        self.max_model_len = min(options.max_model_len or language_model.max_length, language_model.max_length)
        rank = max((part.a.shape[0] for part in self._parts.values()), default=0)
        self.lora_rank = buffer_rank(rank, LORA_RANKS) if rank else 0
        config = store.config if store is not None else language_model.causal_lm.config
        copy = 0 if store is not None else copy_bytes(language_model)
        free = free_bytes(language_model.device) - copy
        self.kv_cache_bytes = kv_cache_bytes(config, options, self.max_model_len, free)
        self._seed_per_completion = options.seed_per_completion
        self._names = PolicyNames()
        self._sleeps, self._asleep = self.kv_cache_bytes > options.sleep_above, False
        self._stream: Any = None
        with preserved(ENVIRONMENT, quiet=_LOGGERS):
            self._api = api or load_api()
            share: AbstractContextManager[dict[str, Any]] = nullcontext({})
            if store is not None:
                share = self._api.sharing(store, stock_numerics=options.stock_numerics)
            with share as shared:
                model = config_folder(config, type(language_model.causal_lm).__name__) if store is not None else source
                weights = shared or {"quantization": source_quantization}
                arguments = engine_arguments(
                    options,
                    self.max_model_len,
                    self.kv_cache_bytes,
                    self.lora_rank,
                    sorted({name.rpartition(".")[2] for name in self._parts}),
                    language_model.dtype,
                    language_model.device,
                )
                self._llm = self._api.LLM(str(model), **arguments, **weights, worker_cls=self._api.worker)
            if language_model.device.type == "cuda":
                torch.cuda.synchronize()
                self._stream = torch.cuda.current_stream()
            self._push = self._adapter_push(store)
        self.load_adapter(0)

    def _adapter_push(self, store: Any) -> Callable[[str], None] | None:
        if not self._parts:
            return None
        if store is None:
            return FolderPush(self._llm, self._lm, self._api)
        stacks = self._llm.collective_rpc("policy_stacks", args=(min(self.lora_rank, 8),))[0]
        layers = {name: list(stacked.parts) for name, stacked in store.linears.items()}
        push = InPlacePush(self._parts, layers, stacks)
        return lambda name: push()

    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        progress: Progress | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See `RolloutEngine`.

        Raises:
            UserError: a prompt and its longest completion exceed `max_model_len`. RuntimeError: the engine sleeps.
        """
        check_lengths(prompts, sampling, self.max_model_len)
        if self._asleep:
            raise RuntimeError("the vLLM engine is asleep: wake() comes before generate()")
        if not prompts:
            return []
        if self._changed():
            self.load_adapter(self._version)
        if sampling.stop:
            # vLLM is built without a tokenizer: it would load its own from a folder, and the trainer's is here.
            self._llm.llm_engine.output_processor.tokenizer = self._lm.tokenizer
        request = self._api.LoRARequest(self.policy_name, POLICY_ID, self._lora_path) if self._parts else None
        ids = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        params = [self._params(prompt, sampling) for prompt in prompts]
        groups: dict[int, Group] = {}

        def finished(place: int, output: Any) -> None:
            groups[place] = group_of(prompts[place], output, sampling)
            assert on_group is not None
            on_group(place, groups[place])
            if progress:
                progress(len(groups) * sampling.num_generations, len(prompts) * sampling.num_generations)

        with preserved(quiet=_LOGGERS), on_stream(self._stream):
            if not self._seed_per_completion:
                # `preserved` puts the random state back, so without this every call would draw the same numbers.
                torch.manual_seed(request_seed(sampling.seed, prompts[0]))
            if on_group is None:
                bar = ProgressBar.reporting(progress, sampling.num_generations, len(prompts)) if progress else False
                outputs = self._llm.generate(ids, params, use_tqdm=bar, lora_request=request)
            else:
                outputs = generate_stepwise(self._llm, ids, params, lora_request=request, on_output=finished)
        return [groups.get(i) or group_of(prompts[i], output, sampling) for i, output in enumerate(outputs)]

    def _params(self, prompt: Prompt, sampling: Sampling) -> Any:
        greedy = sampling.temperature == 0
        return self._api.SamplingParams(
            n=1 if greedy else sampling.num_generations,
            seed=request_seed(sampling.seed, prompt) if self._seed_per_completion else None,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            max_tokens=sampling.longest(prompt),
            stop_token_ids=list(sampling.stop_token_ids),
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            # Nothing stops a completion but what `sampling` names.
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            # Stop strings are looked for in text, which is of no use otherwise.
            detokenize=bool(sampling.stop),
        )

    def load_adapter(self, version: int) -> None:
        """Copy the adapter as it is now; requests from here on name it `policy@{version}`."""
        self._version = version
        self.policy_name = self._names.new(version)
        self._seen = self._counters()
        if self._push is not None:
            with on_stream(self._stream):
                self._push(self.policy_name)

    def _counters(self) -> tuple[int, ...]:
        return tuple(tensor._version for part in self._parts.values() for tensor in (part.a, part.b))

    def _changed(self) -> bool:
        """Whether somebody wrote to the adapter since it was copied (a checkpoint was restored, for example)."""
        return self._counters() != self._seen

    @property
    def _lora_path(self) -> str:
        return getattr(self._push, "path", None) or "/unused"

    def sleep(self) -> None:
        """Give the KV cache's memory back; a second call does nothing, and neither does one with a small cache."""
        if self._sleeps and not self._asleep:
            with preserved(quiet=_LOGGERS), on_stream(self._stream):
                self._llm.sleep(level=1)
            self._asleep = True

    @property
    def asleep_bytes(self) -> int:
        """See `RolloutEngine`: the memory of vLLM's pool goes, and PyTorch still counts the pool's tensors."""
        return self.kv_cache_bytes if self._asleep else 0

    def wake(self) -> None:
        """Take the KV cache's memory again; a second call does nothing."""
        if self._asleep:
            if self._lm.device.type == "cuda":
                # vLLM asks the driver for memory, not PyTorch, which may still hold what the update used.
                torch.cuda.empty_cache()
            with preserved(quiet=_LOGGERS), on_stream(self._stream):
                self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Give everything back but the store. The engine is of no use afterwards."""
        if self._llm is None:
            return
        try:
            if self._asleep and free_bytes(self._lm.device) > self.kv_cache_bytes:
                self.wake()
            with preserved(quiet=_LOGGERS), on_stream(self._stream):
                self._llm.llm_engine.engine_core.shutdown()
        finally:  # a dead engine may be unable to shut down, and holds memory like any other
            if isinstance(self._push, FolderPush):
                self._push.close()
            self._llm = self._push = self._stream = None
            gc.collect()
            if self._lm.device.type == "cuda":
                self._api.release(asleep=self._asleep)
                torch.cuda.empty_cache()


class FolderPush:
    """Hands the adapter over as a folder in memory (/dev/shm), for a vLLM with weights of its own."""

    def __init__(self, llm: Any, language_model: LanguageModel, api: Any) -> None:
        import tempfile

        root = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-adapter-", dir=root if root.is_dir() else None)
        self._llm, self._lm, self._api = llm, language_model, api
        self.path = self._folder.name

    def __call__(self, name: str) -> None:
        self._lm.model.save_pretrained(self.path, save_embedding_layers=False)
        self._llm.llm_engine.add_lora(self._api.LoRARequest(name, POLICY_ID, self.path, load_inplace=True))

    def close(self) -> None:
        self._folder.cleanup()


@dataclass
class ProgressBar:
    """What `LLM.generate` takes for a progress bar: it is told of every finished prompt."""

    report: Progress
    asked: int
    each: int
    iterable: Iterable[Any] = ()
    n: int = 0
    postfix: str = ""

    @classmethod
    def reporting(cls, report: Progress, each: int, prompts: int) -> Callable[..., ProgressBar]:
        """A maker of bars; `each` completions are done when a prompt is."""

        def make(iterable: Iterable[Any] = (), **_: Any) -> ProgressBar:
            return cls(report, each * prompts, each, iterable)

        return make

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": 1.0}

    def update(self, _: int) -> None:
        self.n += self.each
        self.report(self.n, self.asked)

    def refresh(self) -> None:
        """Nothing is drawn."""

    def close(self) -> None:
        """Nothing is drawn."""


def engine_arguments(
    options: VllmOptions,
    max_model_len: int,
    cache_bytes: int,
    lora_rank: int,
    lora_targets: list[str],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """What `vllm.LLM` is built with, beside its weights and its worker."""
    compilation: dict[str, Any] = {
        # Every request has the adapter: graphs without it would never run.
        "cudagraph_specialize_lora": False,
        "cudagraph_capture_sizes": list(options.capture_sizes),
    }
    kernels: dict[str, Any] = {}
    if not options.torch_compile:
        # The cut of a graph around attention is the compiler's work: without it graphs are whole, and of decoding.
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    elif not options.stock_numerics:
        # The compiler's norms and activations round less often than the trainer's, which vLLM's own agree with.
        compilation["custom_ops"] = ["all"]
        kernels = {"kernel_config": {"ir_op_priority": _OWN_NORMS}}
    lora: dict[str, Any] = {}
    if lora_rank:
        # Without targets, the embedding and the head are wrapped too.
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank, "lora_target_modules": lora_targets}
    return {
        **lora,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "kv_cache_dtype": options.kv_cache_dtype,
        "kv_cache_memory_bytes": cache_bytes,
        # Only checked against what is free, of which another process may take most meanwhile: the KV cache's size is
        # given, and our own sizes are what fits.
        "gpu_memory_utilization": 0.1 * free_share(device),
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",
        "seed": 0,
        **kernels,
        **({"enforce_eager": True} if options.enforce_eager else {"compilation_config": compilation}),
    }


def request_seed(seed: int, prompt: Prompt) -> int:
    """vLLM gives sample k of a group this plus k."""
    return mixed(seed, stream_of(prompt)) >> 2


def check_lengths(prompts: list[Prompt], sampling: Sampling, max_model_len: int) -> None:
    """Raises UserError where a prompt with its longest completion does not fit."""
    longest = max(prompts, key=lambda prompt: len(prompt.ids) + sampling.longest(prompt), default=None)
    if longest is not None and len(longest.ids) + sampling.longest(longest) > max_model_len:
        raise UserError(
            f"a prompt of {len(longest.ids)} tokens and a completion of {sampling.longest(longest)} are "
            f"{len(longest.ids) + sampling.longest(longest)} tokens",
            reason=f"the vLLM engine was built for sequences of {max_model_len} (rollout.max_model_len)",
            fix="raise rollout.max_model_len, or shorten data.max_prompt_length or rollout.max_completion_length",
        )


def group_of(prompt: Prompt, output: Any, sampling: Sampling) -> Group:
    """vLLM's answer to one prompt.

    Raises:
        RuntimeError: log-probs that are not those of the sampled tokens, or a completion that was given up.
    """
    made = [_completion(one, sampling) for one in sorted(output.outputs, key=lambda one: one.index)]
    if sampling.temperature == 0:
        first = made[0]
        made = [
            Completion(list(first.ids), list(first.log_probs), first.truncated) for _ in range(sampling.num_generations)
        ]
    if len(made) != sampling.num_generations:
        raise RuntimeError(
            f"vLLM returned {len(made)} completions of prompt {prompt.index}, not {sampling.num_generations}"
        )
    return Group(prompt, made)


def _completion(output: Any, sampling: Sampling) -> Completion:
    ids, flat = list(output.token_ids), output.logprobs
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM gave a completion up: {output.finish_reason}")
    starts = list(flat.start_indices)
    # The sampled token comes first at every position.
    if [flat.token_ids[i] for i in starts] != ids:
        raise RuntimeError(f"vLLM reports {len(starts)} log-probs that are not those of the {len(ids)} sampled tokens")
    # A stop string that is complete is named as the reason, also where the last token reaches the length limit.
    found = bool(sampling.stop) and isinstance(output.stop_reason, str)
    truncated = not ids or not (found or ids[-1] in sampling.stop_token_ids)
    return Completion(ids, [float(flat.logprobs[i]) for i in starts], truncated)


def free_bytes(device: torch.device) -> int:
    """What a KV cache could take: free on the device, and held by PyTorch without use."""
    if device.type != "cuda":
        return 1 << 40
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def copy_bytes(language_model: LanguageModel) -> int:
    """What a second copy of the model's weights takes."""
    return int(language_model.causal_lm.get_memory_footprint())


def free_share(device: torch.device) -> float:
    """Free memory over all, once PyTorch has given back what it does not use."""
    if device.type != "cuda":
        return 1.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free / total


def load_api() -> Any:
    """The parts of vLLM that the engine uses."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from tandem.rollout import vllm_shared
    from tandem.rollout.sleep_pools import release_pools
    from tandem.rollout.stored_linear import release_scratch

    def release(*, asleep: bool) -> None:
        release_scratch()
        release_pools(asleep=asleep)

    sharing: Callable[..., AbstractContextManager[dict[str, Any]]] = vllm_shared.sharing
    return SimpleNamespace(
        LLM=LLM,
        SamplingParams=SamplingParams,
        LoRARequest=LoRARequest,
        sharing=sharing,
        worker=vllm_shared.WORKER,
        release=release,
    )
