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


def _qwen25(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, *, vocab: int, context: int = 32768
) -> dict[str, Any]:
    """Qwen 2.5, whose smaller models have the smaller vocabulary and no head of their own."""
    sizes = _sizes(layers, hidden, intermediate, heads, kv_heads, hidden // heads, vocab, vocab == 151936, context)
    return sizes | {"model_type": "qwen2"}


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
    "Qwen/Qwen2.5-0.5B": _qwen25(24, 896, 4864, 14, 2, vocab=151936),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen25(24, 896, 4864, 14, 2, vocab=151936),
    "Qwen/Qwen2.5-1.5B": _qwen25(28, 1536, 8960, 12, 2, vocab=151936, context=131072),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen25(28, 1536, 8960, 12, 2, vocab=151936),
    "Qwen/Qwen2.5-3B": _qwen25(36, 2048, 11008, 16, 2, vocab=151936),
    "Qwen/Qwen2.5-3B-Instruct": _qwen25(36, 2048, 11008, 16, 2, vocab=151936),
    "Qwen/Qwen2.5-7B": _qwen25(28, 3584, 18944, 28, 4, vocab=152064, context=131072),
    "Qwen/Qwen2.5-7B-Instruct": _qwen25(28, 3584, 18944, 28, 4, vocab=152064),
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
}
