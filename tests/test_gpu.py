"""The reference path on a CUDA device: run by hand with `pytest -m gpu`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tandem.rl.config import AlgorithmConfig, LoraConfig, ModelConfig
from tandem.rl.fused_layer import FusedLayers
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, load_model, with_sampling
from tandem.rl.packing import pack
from tandem.rl.samples import Prompt, Sampling, Sequence
from tandem.rl.step import PolicyBatch, policy_backward, sequence_log_probs
from tandem.rollout.transformers_engine import TransformersEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.05,
    )
    path = tmp_path_factory.mktemp("model")
    # Saved in bfloat16, so that both precisions compute the same model.
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def load(folder, dtype: str) -> LanguageModel:
    config = ModelConfig(model_name_or_path=str(folder), dtype=dtype, device="cuda")
    lm = load_model(config, SimpleNamespace(pad_token_id=0))
    attach_lora(lm, LoraConfig(r=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(lm):  # B = 0 would hide most of the adapter's gradient
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return lm


def rollouts(lm: LanguageModel):
    generator = torch.Generator().manual_seed(2)
    prompts = [Prompt(i, torch.randint(1, 4096, (64 + 32 * i,), generator=generator).tolist(), "") for i in range(4)]
    return TransformersEngine(lm).generate(prompts, Sampling(8, 128, stop_token_ids=(7,)))


def gradients(lm: LanguageModel, groups, *, share_prefix: bool, max_tokens: int, own: bool = False) -> torch.Tensor:
    sequences = [
        Sequence(g.prompt.ids, c.ids, [True] * len(c.ids), family=i)
        for i, g in enumerate(groups)
        for c in g.completions
    ]
    advantages = torch.randn(len(sequences), generator=torch.Generator().manual_seed(3)).tolist()
    meter = Meter()
    packs = pack(sequences, max_tokens, share_prefix=share_prefix)
    head = with_sampling(lm.head, temperature=1.0, top_k=0, top_p=1.0, chunk_size=1024)
    # On policy, as the plain gradients are: a ratio to the float32 engine's would bring noise of its own.
    old = sequence_log_probs(lm, packs, len(sequences), head)[0] if own else None
    batch = PolicyBatch(
        sequences,
        advantages,
        [x.tolist() for x in old] if old else [c.log_probs for g in groups for c in g.completions],
    )
    policy_backward(lm, packs, batch, AlgorithmConfig(), head, meter, max_completion_length=128)
    grads = torch.cat([p.grad.double().flatten() for _, p in trainable(lm)])
    for _, p in trainable(lm):
        p.grad = None
    gradients.difference = meter.result()["sampling/sampling_logp_difference/mean"]
    return grads


def plain_gradients(lm: LanguageModel, groups) -> torch.Tensor:
    """The same gradients by Hugging Face's own forward, sequence by sequence, and autograd of the plain loss.

    On policy the ratio is 1, so the derivative of the objective is that of −Σ w·A·ℓ.
    """
    completions = [(g.prompt.ids, c.ids) for g in groups for c in g.completions]
    advantages = torch.randn(len(completions), generator=torch.Generator().manual_seed(3)).tolist()
    total = sum(len(ids) for _, ids in completions)
    lm.model.train()
    for (prompt, ids), advantage in zip(completions, advantages, strict=True):
        row = torch.tensor([prompt + ids], device=lm.device)
        logits = lm.causal_lm(input_ids=row).logits[0, len(prompt) - 1 : -1].float()
        log_probs = logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0]
        (-(advantage / total) * log_probs.sum()).backward()
    lm.model.eval()
    grads = torch.cat([p.grad.double().flatten() for _, p in trainable(lm)])
    for _, p in trainable(lm):
        p.grad = None
    return grads


def error(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a - exact).norm() / exact.norm())


@pytest.mark.parametrize("path", ["fused layers", "own forward", "own forward, checkpoints"])
def test_gradients_are_no_worse_than_those_of_the_plain_model(folder, path):
    exact = load(folder, "float32")
    groups = rollouts(exact)
    reference = plain_gradients(exact, groups)
    assert error(gradients(exact, groups, share_prefix=False, max_tokens=2048), reference) < 1e-3
    assert error(gradients(exact, groups, share_prefix=True, max_tokens=8192), reference) < 1e-3
    assert gradients.difference < 1e-4
    half = load(folder, "bfloat16")
    plain = error(plain_gradients(half, groups), reference)
    if path == "fused layers":
        FusedLayers().attach(half)
    elif path == "own forward, checkpoints":
        half.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    ours = error(gradients(half, groups, share_prefix=True, max_tokens=8192, own=True), reference)
    print(f"relative error of bfloat16 gradients, {path}: {ours:.4f}, transformers and peft {plain:.4f}")
    # Both are rounding noise of the same kind; a tenth apart is chance.
    assert ours < 1.1 * plain


def test_engine_and_trainer_agree_in_bfloat16(folder):
    lm = load(folder, "bfloat16")
    gradients(lm, rollouts(lm), share_prefix=True, max_tokens=8192)
    print(f"mean |Δ log-prob| between engine and trainer, bfloat16: {gradients.difference:.4f}")
    assert gradients.difference < 0.05
