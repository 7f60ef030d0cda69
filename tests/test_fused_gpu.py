"""The fused layers on a CUDA device: precision, offload, memory and time beside transformers' checkpointing.

Run by hand with `pytest -m gpu -s tests/test_fused_gpu.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.rl.config import LoraConfig
from tandem.rl.fused_layer import FusedLayers, LayerPlan
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.model import LanguageModel, _register_packed_attention
from tandem.rl.offload import HostStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def build(dtype: torch.dtype) -> LanguageModel:
    from transformers import AutoModelForCausalLM, LlamaConfig

    _register_packed_attention()
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        initializer_range=0.03,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    # Rounded to bfloat16 in both cases, so that both precisions compute the same model.
    model = AutoModelForCausalLM.from_config(config).bfloat16().to("cuda", dtype)
    model.requires_grad_(False)
    model.eval()
    lm = LanguageModel(model, SimpleNamespace(), torch.device("cuda"), dtype, HeadOptions(), 65536)
    attach_lora(lm, LoraConfig(r=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(lm):  # B = 0 would hide most of the adapter's gradient
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return lm


def inputs(total: int, shared: bool) -> tuple[torch.Tensor, torch.Tensor, PackLayout]:
    """One sequence, or two families of a prompt with three completions each."""
    ids = torch.randint(1, 4096, (total,), generator=torch.Generator().manual_seed(2)).cuda()
    if not shared:
        return ids, torch.arange(total, device="cuda"), PackLayout([Family((0, total))])
    quarter = total // 8
    families, positions = [], []
    for start in (0, 4 * quarter):
        borders = [start + i * quarter for i in range(5)]
        families.append(Family((borders[0], borders[1]), tuple(pairwise(borders[1:]))))
        positions += [torch.arange(quarter), *[torch.arange(quarter, 2 * quarter)] * 3]
    return ids, torch.cat(positions).cuda(), PackLayout(families)


def gradients(lm: LanguageModel, hidden, pack) -> dict[str, torch.Tensor]:
    out = hidden(*pack)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    (out * direction).sum().backward()
    grads = {n: p.grad.clone() for n, p in trainable(lm)}
    lm.model.zero_grad()
    return grads


def plain(lm: LanguageModel, pack) -> dict[str, torch.Tensor]:
    lm.fused = None
    with lm.packed():
        return gradients(lm, lm.packed_hidden, pack)


def error(grads: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    wrong = sum(float((grads[n].double() - exact[n].double()).square().sum()) for n in exact)
    return (wrong / sum(float(exact[n].double().square().sum()) for n in exact)) ** 0.5


@pytest.fixture(scope="module")
def exact() -> LanguageModel:
    return build(torch.float32)


@pytest.fixture(scope="module")
def half() -> LanguageModel:
    return build(torch.bfloat16)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_no_worse_than_those_of_autograd(exact, half, shared):
    pack = inputs(2048, shared)
    reference = plain(exact, pack)
    assert error(gradients(exact, FusedLayers().attach(exact).hidden, pack), reference) < 1e-4
    theirs = error(plain(half, pack), reference)
    for plan in (LayerPlan(), LayerPlan(512, 4, "recompute"), LayerPlan(512, 2, "save")):
        ours = error(gradients(half, FusedLayers(plan).attach(half).hidden, pack), reference)
        print(f"relative error of bfloat16 gradients: {plan} {ours:.5f}, transformers and peft {theirs:.5f}")
        assert ours < 1.1 * theirs


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Attention's backward kernels add in any order otherwise. It also fills fresh memory with nan."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's keeps its own order even so
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("attention", ["save", "recompute"])
def test_offload_is_bitwise_the_same(half, attention):
    pack = inputs(8192, True)
    plan = LayerPlan(1024, 4, attention)
    expected = gradients(half, FusedLayers(plan, offload=False).attach(half).hidden, pack)
    layers = FusedLayers(plan, offload=True).attach(half)
    allocated = []
    for _ in range(4):  # later passes reuse host and device memory
        ours = gradients(half, layers.hidden, pack)
        assert all(torch.equal(ours[n], g) for n, g in expected.items())
        assert isinstance(layers.host, HostStore)
        assert layers.host.pool.free == layers.host.pool.allocated
        allocated.append(layers.host.pool.allocated)
    assert len(set(allocated)) == 1


def measure(lm: LanguageModel, hidden, pack) -> tuple[float, float]:
    """Seconds of the faster of two passes after a first, and peak GiB beyond what stays."""
    gradients(lm, hidden, pack)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, seconds = torch.cuda.memory_allocated(), []
    for _ in range(2):
        began = time.perf_counter()
        gradients(lm, hidden, pack)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds), (torch.cuda.max_memory_allocated() - start) / 2**30


@pytest.mark.parametrize("tokens", [16384, 65536])
def test_memory_and_time_beside_checkpointing(half, tokens):
    pack = inputs(tokens, False)
    half.fused = None
    half.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    half.model.train()
    with half.packed():
        theirs = measure(half, half.packed_hidden, pack)
    half.causal_lm.gradient_checkpointing_disable()
    half.model.eval()
    print(f"\n{tokens} tokens, 8 layers: checkpointing {theirs[0]:.3f} s, {theirs[1]:.2f} GiB")
    best = float("inf")
    # Projections that are kept wherever memory is free would fill any card.
    lean = partial(LayerPlan, projections="recompute")
    for plan, offload in [
        (lean(), False),
        (lean(), True),
        (lean(groups=4), True),
        (lean(2048, 4, "recompute"), True),
        (lean(2048, 4, "save"), True),
    ]:
        seconds, gib = measure(half, FusedLayers(plan, offload=offload).attach(half).hidden, pack)
        print(f"{plan} offload={offload}: {seconds:.3f} s, {gib:.2f} GiB")
        best = min(best, gib)
    half.fused = None
    assert best < theirs[1]
