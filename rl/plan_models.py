"""Published sizes of much used models, so that a plan for their hub ids needs no network and no download."""

from __future__ import annotations

from typing import Any


def _llama(
    layers: int, hidden: int, intermediate: int, heads: int, head_dim: int, *, tied: bool = False
) -> dict[str, Any]:
    """Llama 3.1 and 3.2."""
    return _sizes(layers, hidden, intermediate, heads, 8, head_dim, 128256, tied, 131072) | {"model_type": "llama"}


def _qwen3(
    layers: int, hidden: int, intermediate: int, heads: int, *, tied: bool = False, context: int = 40960
) -> dict[str, Any]:
    return _sizes(layers, hidden, intermediate, heads, 8, 128, 151936, tied, context) | {"model_type": "qwen3"}


def _sizes(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool,
    context: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
    }


_LLAMA_8B = _llama(32, 4096, 14336, 32, 128)
_LLAMA_3B = _llama(28, 3072, 8192, 24, 128, tied=True)
_LLAMA_1B = _llama(16, 2048, 8192, 32, 64, tied=True)

# transformers' config by hub id. Base and instruct models have the same sizes.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(36, 2560, 9728, 32, tied=True, context=262144),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12288, 32),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 17408, 40),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 25600, 64),
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
}
