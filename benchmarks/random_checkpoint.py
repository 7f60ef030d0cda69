"""Random checkpoints of real shapes: what a benchmark of time and memory needs when no hub is at hand.

    python benchmarks/random_checkpoint.py qwen3-8b /tmp/qwen3-8b-nf4      # NF4 with double quantisation, on a GPU
    python benchmarks/random_checkpoint.py qwen3-8b /tmp/qwen3-8b --dtype bf16 --layers 12

Weights are random, so nothing can be said of learning with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tandem.rl.plan_models import MODELS

_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
# transformers' config of each; tiny is for trying a benchmark out on a CPU.
SHAPES: dict[str, dict[str, Any]] = {name.partition("/")[2].lower(): sizes for name, sizes in MODELS.items()}
SHAPES["tiny"] = MODELS["Qwen/Qwen3-0.6B"] | _TINY
LONGEST = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=["nf4", "bf16"], default="nf4")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--context", type=int, default=LONGEST, help="tokens that the config allows")
    arguments = parser.parse_args()
    if not (arguments.target / "config.json").is_file():
        make(arguments.shape, arguments.target, arguments.dtype, arguments.layers, arguments.context)


def make(shape: str, target: Path, dtype: str, layers: int | None, context: int) -> None:
    from transformers import BitsAndBytesConfig

    model = build(shape, layers, context)
    if dtype == "nf4":
        quantise(model)
        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=model.dtype,
        )
    model.save_pretrained(target, max_shard_size="4GB")
    tokenizer(model.config.vocab_size).save_pretrained(target)


def build(shape: str, layers: int | None, context: int) -> Any:
    """The model in bfloat16, on a GPU if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    made = {"max_position_embeddings": context, "rope_theta": 1e6, "dtype": "bfloat16"}
    config = AutoConfig.for_model(**(sizes | made))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(before)
    return model


def quantise(model) -> None:
    """Turn the decoder's linear layers into bitsandbytes' one by one, so that a model that fits in bfloat16 will do."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is not torch.nn.Linear:
                    continue
                made = Linear4bit(1, 1, bias=False, compute_dtype=child.weight.dtype, quant_type="nf4")
                made.in_features, made.out_features = child.in_features, child.out_features
                device, weight = child.weight.device, child.weight.data.cpu()
                setattr(module, name, made)
                del child
                made.weight = Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
                ).to(device)


def tokenizer(vocab_size: int):
    """A word-level tokenizer, which the peers' trainers want to see; the benchmark feeds token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab_size)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


if __name__ == "__main__":
    main()
