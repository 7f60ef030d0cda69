"""Sizes and switches of a vLLM engine, and what follows from them before one is built."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.rl.errors import UserError

GIB = 1 << 30
# What is left to vLLM beside weights, adapter and a KV cache of no given size: graphs, activations, logits of a batch.
HEADROOM = 3 * GIB
# Completions decoded at a time, where nothing else is said.
IN_FLIGHT = 256
# Tokens that the KV cache is given out in.
BLOCK = 16
# Sizes of batches beyond these, for steps that compute prompts; the last is the largest that graphs are made for.
_WITH_PROMPTS = (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_CAPTURED = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


# A KV cache of at most this size stays through the updates: giving it back and taking it again, and with it all that
# PyTorch has in its cache, takes longer than a small model's update gains by it.
STAYS_AWAKE = 512 << 20


@dataclass(frozen=True)
class VllmOptions:
    """How a vLLM engine is built.

    Attributes:
        max_model_len: longest prompt with completion in tokens; None: the model's own limit.
        max_num_seqs: completions decoded at a time.
        kv_cache_gib: size of the KV cache; None: what `max_num_seqs` longest sequences need, or what is free.
        kv_cache_dtype: auto (the model's type) or fp8, which halves it and adds mismatch: keep a rollout correction on.
        stock_numerics: on shared weights, products and logits are rounded as in a stock vLLM.
        enforce_eager: no compilation and no CUDA graphs: starts in seconds, decodes several times slower.
        torch_compile: the model is compiled before graphs are captured; without it graphs hold vLLM's own kernels, and
            serve decoding alone.
        seed_per_completion: a random stream for each completion; else one for each call of `generate`.
        sleep_above: bytes of KV cache from which `sleep` gives it back.
        cudagraph_sizes: batch sizes that graphs are captured for; None: a ladder up to `max_num_seqs`.
    """

    max_model_len: int | None = None
    max_num_seqs: int = IN_FLIGHT
    kv_cache_gib: float | None = None
    kv_cache_dtype: str = "auto"
    stock_numerics: bool = False
    enforce_eager: bool = False
    torch_compile: bool = True
    seed_per_completion: bool = True
    sleep_above: int = STAYS_AWAKE
    cudagraph_sizes: tuple[int, ...] | None = None

    @property
    def capture_sizes(self) -> tuple[int, ...]:
        if self.cudagraph_sizes is not None:
            return self.cudagraph_sizes
        ladder = [size for size in _CAPTURED if size <= self.max_num_seqs]
        return tuple(ladder) if ladder[-1] == self.max_num_seqs else (*ladder, self.max_num_seqs)


def sizes_for_prompts(max_num_seqs: int, tokens: int) -> list[int] | None:
    """Batch sizes to capture so that also a step of `tokens`, most of them of prompts, replays a graph; None where the
    usual sizes do, or none may."""
    usual = VllmOptions(max_num_seqs=max_num_seqs).capture_sizes
    enough = next((size for size in _WITH_PROMPTS if size >= tokens), None)
    if enough is None or tokens <= usual[-1]:
        return None
    return [*usual, *(size for size in _WITH_PROMPTS if usual[-1] < size <= enough)]


def rounded_length(tokens: int) -> int:
    """The longest sequence that an engine is built for where the data's is of `tokens`: its compiled code goes by it,
    and serves data that is a little longer, too."""
    return -(-tokens // 128) * 128


def kv_bytes_per_token(config: Any, kv_cache_dtype: str) -> int:
    """Of all layers together, keys and values."""
    config = config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * (1 if kv_cache_dtype.startswith("fp8") else 2)


def kv_cache_bytes(config: Any, options: VllmOptions, max_model_len: int, free: int) -> int:
    """How large the KV cache is made.

    Args:
        free: bytes that the device has for it and for `HEADROOM`.

    Raises:
        UserError: not even one longest sequence fits.
    """
    each = kv_bytes_per_token(config, options.kv_cache_dtype)
    # One block more per sequence: its last one is seldom full, and one block is never used.
    sequence = each * (-(-max_model_len // BLOCK) + 1) * BLOCK
    room = int(options.kv_cache_gib * GIB) if options.kv_cache_gib is not None else free - HEADROOM
    if room < sequence + each * BLOCK:
        given = "rollout.kv_cache_gib is" if options.kv_cache_gib is not None else "after the weights there are"
        raise UserError(
            f"one sequence of {max_model_len} tokens needs a KV cache of {sequence / GIB:.2f} GiB, "
            f"and {given} {max(room, 0) / GIB:.2f}",
            fix="lower rollout.max_model_len or set rollout.kv_cache_dtype=fp8, which halves the cache",
        )
    return room if options.kv_cache_gib is not None else min(room, sequence * options.max_num_seqs + each * BLOCK)


def config_folder(config: Any, architecture: str) -> Path:
    """A folder that holds only the model's config, for an engine that reads no weights.

    The same config has the same folder in every run, since vLLM's cache of compiled code goes by it.
    """
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    content = json.dumps(json.loads(config.to_json_string(use_diff=False)), sort_keys=True, indent=1)
    root = os.environ.get("TANDEM_CACHE")
    cache = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
    folder = cache / "vllm-configs" / hashlib.sha256(content.encode()).hexdigest()[:16]
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            file.write(content)
        os.replace(file.name, folder / "config.json")
    return folder
