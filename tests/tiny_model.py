"""Random models of a few thousand parameters and tokenizers of whole words, as folders that users have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.rl.model import LanguageModel


def save_words(folder: Path, words: Sequence[str], *, eos: str, unk: str, named: bool = True) -> None:
    """A tokenizer whose tokens are the words of a text, in the order of their ids.

    Args:
        named: the tokenizer knows the token for unknown words by that role.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"eos_token": eos, **({"unk_token": unk} if named else {})}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)


def save_llama(folder: Path, vocab_size: int, **shape: Any) -> None:
    """A Llama of two layers whose weights depend on its shape alone; `shape` says what is different from here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(sizes | shape))).save_pretrained(folder)


def move_adapter(lm: LanguageModel, *, seed: int, scale: float = 0.2) -> None:
    """Give the adapter weights that change the policy visibly."""
    import torch

    from tandem.rl.lora import trainable

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in trainable(lm):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
