"""The fused layers against Hugging Face's and peft's autograd in float64, and what they keep in memory."""

from __future__ import annotations

import gc
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.kernels.lora_linear import LoraLinear
from tandem.rl import fused_layer, layer_ops, layer_run
from tandem.rl.config import AlgorithmConfig, LoraConfig
from tandem.rl.errors import UserError
from tandem.rl.families import FAMILIES, Norm, describe
from tandem.rl.fused_layer import FusedLayers, LayerPlan
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, _register_packed_attention
from tandem.rl.offload import BlockPool, HostStore, Store
from tandem.rl.packing import Pack, pack
from tandem.rl.samples import Sequence
from tandem.rl.step import PolicyBatch, layout_of, policy_backward

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# Each family with what sets it apart switched on; windows are narrower than the packs' families.
CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "layer_types": LAYERS}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 4, "layer_types": LAYERS}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 4, "layer_types": LAYERS, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.0},
    ),
    "gemma3_text": ("Gemma3TextConfig", {"sliding_window": 4, "layer_types": LAYERS, "query_pre_attn_scalar": 11}),
    "phi3": ("Phi3Config", {"sliding_window": 6, "partial_rotary_factor": 2 / 3}),
}


class ExactNorm(torch.nn.Module):
    """Hugging Face's norms round to float32 in between; this one does not."""

    def __init__(self, weight: torch.Tensor, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = torch.nn.Parameter(weight, requires_grad=False), eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * (self.weight + self.offset)


def make_exact(model: Any) -> None:
    for parent in list(model.modules()):
        child: Any
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                eps = getattr(child, "variance_epsilon", None) or child.eps
                offset = 1.0 if "Gemma" in type(child).__name__ else 0.0
                setattr(parent, name, ExactNorm(child.weight.data, eps, offset))


def build(family: str = "qwen3", *, exact: bool = True, lora: LoraConfig | None = None, **changes) -> LanguageModel:
    import transformers

    _register_packed_attention()
    name, own = CONFIGS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SIZES, **own, **changes}))
    model.requires_grad_(False)
    model.eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):  # ones and zeros would hide them
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    if exact:
        make_exact(model)
    lm = LanguageModel(model, SimpleNamespace(), torch.device("cpu"), torch.float64, HeadOptions(), 64)
    attach_lora(lm, lora or LoraConfig(r=3), seed=0)
    lm.model.double()
    for _, parameter in trainable(lm):  # B = 0 would hide most of the gradient
        parameter.data.normal_(std=0.2)
    return lm


def packs(seed: int = 0) -> list[Pack]:
    """Two packs: families with a shared prompt, one with a completion of a single token, and sequences on their own."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 60, (length,), generator=generator).tolist()

    sequences = []
    for family, (prompt, completions) in enumerate([(7, (5, 1, 4)), (3, (6, 2)), (9, (3,)), (2, (11, 5, 7))]):
        prompt_ids = ids(prompt)
        sequences += [Sequence(prompt_ids, ids(n), [True] * n, family=family) for n in completions]
    made = pack(sequences, 40)
    assert len(made) == 2
    return made


def run(lm: LanguageModel, made: list[Pack], hidden) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Hidden states of the packs and the adapter's gradients, summed over the packs, of a fixed random loss."""
    outputs = []
    for number, one in enumerate(made):
        out = hidden(torch.tensor(one.input_ids), torch.tensor(one.position_ids), layout_of(one))
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(number), dtype=out.dtype)
        (out * direction).sum().backward()
        outputs.append(out.detach())
    grads = {n: p.grad.clone() for n, p in trainable(lm) if p.grad is not None}
    lm.model.zero_grad()
    return outputs, grads


def oracle(lm: LanguageModel, made: list[Pack]):
    before = getattr(lm, "fused", None)
    lm.fused = None
    with lm.packed():
        result = run(lm, made, lm.packed_hidden)
    lm.fused = before
    return result


def difference(ours, theirs) -> float:
    """Largest relative difference of hidden states and gradients."""
    assert ours[1].keys() == theirs[1].keys()
    pairs = [*zip(ours[0], theirs[0], strict=True), *((ours[1][n], theirs[1][n]) for n in theirs[1])]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def fused(lm: LanguageModel, made: list[Pack], plan: LayerPlan | None = None, **options):
    return run(lm, made, FusedLayers(plan, **options).attach(lm).hidden)


@pytest.fixture(scope="module")
def qwen():
    lm = build("qwen3")
    made = packs()
    return lm, made, oracle(lm, made)


def test_every_family_is_tried():
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_equals_autograd(family):
    lm = build(family)
    made = packs()
    expected = oracle(lm, made)
    assert all(g.abs().max() > 1e-3 for g in expected[1].values())
    for plan in (LayerPlan(), LayerPlan(7, 4, "recompute"), LayerPlan(16, 2, "save"), LayerPlan(7, 2, "save", "save")):
        assert difference(fused(lm, made, plan), expected) < 1e-10


@pytest.mark.parametrize("family", CONFIGS)
def test_the_unchanged_model_agrees_to_float32(family):
    lm = build(family, exact=False)
    made = packs()
    assert difference(fused(lm, made), oracle(lm, made)) < 1e-4


@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_small_model_keeps_inputs_too(family, kept, monkeypatch):
    """As on a GPU with room: of the last layers nothing but the GLU is computed again."""
    lm = build(family)
    made = packs()
    expected = oracle(lm, made)
    monkeypatch.setattr(FusedLayers, "_layers_to_keep", lambda *_: kept)
    turned = []
    plain = layer_run.rotated
    monkeypatch.setattr(layer_run, "rotated", lambda *a: turned.append(1) or plain(*a))
    for plan in (LayerPlan(), LayerPlan(7, 4, "recompute"), LayerPlan(16, 2, "save")):
        assert difference(fused(lm, made, plan), expected) < 1e-10
    turned.clear()
    fused(lm, made, LayerPlan(groups=1, attention="save"))
    behind = lm.fused._spec.layer(0).attention_post_norm is not None
    again = 3 if behind else 3 - kept
    assert len(turned) == 2 * (3 + again) * len(made)


GRID = [(1, 1, "auto"), (1, 2, "recompute"), (1, 1, "save")]
GRID += [*product([7], [1, 2, 4], ["save", "recompute"]), (4096, 1, "recompute"), (4096, 4, "save")]


@pytest.mark.parametrize("projections", ["recompute", "save"])
def test_split_adapters_change_rounding_alone(qwen, projections):
    lm, made, expected = qwen
    plan = LayerPlan(7, 2, projections=projections, split_adapters=True)
    assert difference(fused(lm, made, plan), expected) < 1e-10


@pytest.mark.parametrize("kept", [False, True])
def test_split_adapters_do_round_otherwise(kept):
    """In bfloat16, whether prepared weights stay from pass to pass or not."""
    lm = build()
    lm.model.bfloat16()
    (made, _) = packs()
    found = []
    for split in (False, True, False):
        layers = FusedLayers(LayerPlan(split_adapters=split)).attach(lm)
        if not kept:
            layers._weights.stop()
        found.append(run(lm, [made], layers.hidden))
    assert difference(found[0], found[2]) == 0
    assert 0 < difference(found[0], found[1]) < 0.2


@pytest.mark.parametrize("projections", ["recompute", "save"])
@pytest.mark.parametrize(("tile_rows", "groups", "attention"), GRID)
def test_tiles_and_groups_change_nothing(qwen, tile_rows, groups, attention, projections):
    lm, made, expected = qwen
    assert difference(fused(lm, made, LayerPlan(tile_rows, groups, attention, projections)), expected) < 1e-10


def test_long_packs_are_run_in_groups(qwen, monkeypatch):
    lm, made, expected = qwen
    calls = []
    plain = layer_run.attention_forward

    def counted(query, key, *rest, **options):
        calls.append(key.shape[1])
        return plain(query, key, *rest, **options)

    monkeypatch.setattr(layer_run, "attention_forward", counted)
    rows = max(one.num_tokens for one in made)
    for borders, heads in ((((rows + 1, 8),), {4}), (((0, 2), (rows + 1, 8)), {2}), (((0, 2), (0, 8)), {1})):
        monkeypatch.setattr(fused_layer, "_GROUPS", borders)
        calls.clear()
        assert difference(fused(lm, made), expected) < 1e-10
        assert set(calls) == heads


@pytest.mark.parametrize(("attention", "times"), [("save", 1), ("recompute", 2)])
def test_a_saved_attention_runs_forward_once(qwen, monkeypatch, attention, times):
    lm, made, _ = qwen
    calls = []
    plain = layer_run.attention_forward
    monkeypatch.setattr(layer_run, "attention_forward", lambda *a, **k: calls.append(1) or plain(*a, **k))
    fused(lm, made, LayerPlan(attention=attention))
    assert len(calls) == times * 3 * len(made)


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=2, target_modules=["down_proj"]),
        LoraConfig(r=4, target_modules=["k_proj", "o_proj", "gate_proj"], use_rslora=True),
    ],
)
def test_an_adapter_on_some_projections(lora):
    lm = build("llama", lora=lora)
    made = packs()
    assert difference(fused(lm, made), oracle(lm, made)) < 1e-10


def test_stacked_projections_with_and_without_an_adapter():
    lm = build("phi3", lora=LoraConfig(r=2, target_modules=["qkv_proj"]))
    made = packs()
    assert difference(fused(lm, made, LayerPlan(5, 2)), oracle(lm, made)) < 1e-10


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_activations(activation):
    lm = build("llama", hidden_act=activation)
    made = packs()
    assert difference(fused(lm, made), oracle(lm, made)) < 1e-10


@pytest.mark.parametrize("rope_type", ["yarn", "linear"])
def test_scaled_rotations_come_from_the_models_own_module(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    lm = build("llama", rope_parameters=rope)
    made = packs()
    assert difference(fused(lm, made), oracle(lm, made)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotations_are_rounded_as_the_models_own(dtype):
    lm = build("llama")
    positions = torch.tensor([0, 3, 900, 70_000])
    spec = describe(lm.model)
    cos, sin = spec.rope(torch.zeros(4, 8, dtype=dtype), positions)[None]
    own = spec.backbone.rotary_emb(torch.zeros(1, dtype=dtype), positions[None])
    assert (cos.dtype, sin.dtype) == (dtype, dtype)
    assert torch.equal(cos, own[0][0])
    assert torch.equal(sin, own[1][0])


def test_one_sequence_alone():
    lm = build("llama")
    made = pack([Sequence([1, 2, 3], [4, 5], [True, True])], 64)
    assert difference(fused(lm, made, LayerPlan(2, 4)), oracle(lm, made)) < 1e-10


def _unrotated(dy, x, norm, rope):
    x.copy_(dy)


def _glu_without_up(dy, gate, up, activation):
    product = layer_ops.glu(gate, up, activation, torch.empty_like(gate))
    gate.copy_(dy * up)
    dy.copy_(product)


FAULTS = {
    "rotated_backward": _unrotated,
    "rms_norm_backward": lambda dy, x, norm, into=None: (torch.zeros_like(dy) if into is None else into).add_(
        dy * norm.weight
    ),
    "glu_backward": _glu_without_up,
    "complete_gradients": lambda self, dys: dys[:, self.out_features :].zero_(),
    "complete_inputs": lambda self, xs: xs[:, self.in_features :].zero_(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_derivative_is_seen(qwen, monkeypatch, name):
    lm, made, expected = qwen
    monkeypatch.setattr(LoraLinear if name.startswith("complete") else layer_run, name, FAULTS[name])
    assert difference(fused(lm, made), expected) > 1e-3


@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm_derivative(unit_offset):
    x = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    norm = Norm(torch.randn(6, dtype=torch.float64), 1e-5, unit_offset)
    d = torch.randn_like(x)
    (expected,) = torch.autograd.grad(layer_ops.rms_norm(x, norm), x, d)
    torch.testing.assert_close(layer_ops.rms_norm_backward(d, x.detach(), norm), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("plan", [LayerPlan(7, 2, "recompute"), LayerPlan(7, 2, "save")])
def test_offload_is_bitwise_the_same_and_reuses_its_memory(plan, late, monkeypatch):
    monkeypatch.setattr(layer_run, "LATE_ROWS", 0 if late else 1 << 30)
    lm = build("qwen3")
    made = packs()
    expected = fused(lm, made, plan, offload=False)
    layers = FusedLayers(plan, offload=True).attach(lm)
    layers.host = HostStore(lm.device, block_bytes=1000)  # several blocks per tensor, the last one part empty
    allocated = []
    for _ in range(3):
        ours = run(lm, made, layers.hidden)
        assert all(torch.equal(a, b) for a, b in zip(ours[0], expected[0], strict=True))
        assert all(torch.equal(ours[1][n], g) for n, g in expected[1].items())
        pool = layers.host.pool
        assert pool.free == pool.allocated
        allocated.append(pool.allocated)
    tokens = max(one.num_tokens for one in made)
    widths = [24, 48, 8] if plan.attention == "save" else [24]
    assert allocated == [3 * sum(-(-tokens * w * 8 // 1000) for w in widths)] * 3


def test_offloaded_graphs_may_wait_for_each_other():
    lm = build("llama")
    made = packs()
    expected = oracle(lm, made)
    layers = FusedLayers(offload=True).attach(lm)
    outputs = []
    for one in made:
        outputs.append(layers.hidden(torch.tensor(one.input_ids), torch.tensor(one.position_ids), layout_of(one)))
    for number, out in enumerate(outputs):
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(number), dtype=out.dtype)
        (out * direction).sum().backward()
    grads = {n: p.grad for n, p in trainable(lm)}
    assert difference(([o.detach() for o in outputs], grads), expected) < 1e-10


def test_a_dropped_graph_gives_its_blocks_back(qwen):
    lm, (one, _), _ = qwen
    layers = FusedLayers(LayerPlan(attention="recompute"), offload=True).attach(lm)
    ids = (torch.tensor(one.input_ids), torch.tensor(one.position_ids), layout_of(one))
    out = layers.hidden(*ids)
    assert layers.host.pool.allocated - layers.host.pool.free == 3
    del out
    layers.host.begin()
    gc.collect()
    assert layers.host.pool.free == layers.host.pool.allocated == 3


def test_the_pool_grows_only_when_it_must():
    pool = BlockPool(pinned=False, block_bytes=64)
    first = pool.acquire(2)
    pool.release(first)
    assert {id(b) for b in pool.acquire(2)} == {id(b) for b in first}
    pool.acquire(1)
    assert (pool.allocated, pool.free) == (3, 0)


class Counting(Store):
    """Counts what the layers ask to be kept."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def put(self, tensors):
        self.sizes += [tuple(t.shape) for t in tensors]
        return super().put(tensors)


def test_only_the_input_of_each_layer_is_kept(qwen):
    lm, (one, _), _ = qwen
    layers = FusedLayers(LayerPlan(tile_rows=8, attention="recompute")).attach(lm)
    layers.near = Counting()
    ids = (torch.tensor(one.input_ids), torch.tensor(one.position_ids), layout_of(one))
    saved: list[torch.Tensor] = []

    def live() -> int:
        gc.collect()
        found = {
            t.untyped_storage().data_ptr()
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.ndim and t.shape[0] == one.num_tokens and t.is_floating_point()
        }
        return len(found)

    before = live()

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
        out = layers.hidden(*ids)
    after = live()
    assert layers.near.sizes == [(one.num_tokens, 24)] * 3
    parameters = {p.data_ptr() for _, p in trainable(lm)}
    activations = [t for t in saved if t.data_ptr() not in parameters]
    # Autograd itself holds the input of the final norm and nothing else.
    assert [tuple(t.shape) for t in activations] == [(one.num_tokens, 24)]
    # Three inputs, the final norm's input, its output, and the rotation's two tables.
    assert after - before <= 7
    saved.clear()
    del out, activations


def test_without_gradients_nothing_is_kept(qwen):
    lm, made, expected = qwen
    layers = FusedLayers().attach(lm)
    layers.near = Counting()
    with torch.no_grad():
        for one, out in zip(made, expected[0], strict=True):
            ours = layers.hidden(torch.tensor(one.input_ids), torch.tensor(one.position_ids), layout_of(one))
            torch.testing.assert_close(ours, out, rtol=1e-10, atol=1e-10)
            assert not ours.requires_grad
    assert layers.near.sizes == []


def test_the_adapter_can_be_switched_off(qwen):
    lm, (one, _), expected = qwen
    layers = FusedLayers().attach(lm)
    ids = (torch.tensor(one.input_ids), torch.tensor(one.position_ids), layout_of(one))
    with torch.no_grad(), lm.model.disable_adapter():
        ours = layers.hidden(*ids)
        lm.fused = None
        with lm.packed():
            theirs = lm.packed_hidden(*ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (ours - expected[0][0]).abs().max() > 1e-3


def test_an_update_between_the_passes_is_an_error(qwen):
    lm, (one, _), _ = qwen
    out = FusedLayers().attach(lm).hidden(torch.tensor(one.input_ids), torch.tensor(one.position_ids), layout_of(one))
    with torch.no_grad():
        trainable(lm)[0][1].mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    lm.model.zero_grad()


def test_no_module_and_no_class_is_touched():
    lm = build("llama")
    layer = lm.backbone.layers[0]
    forward, attributes, modules = type(layer).forward, dict(vars(layer)), [id(m) for m in lm.model.modules()]
    layers = FusedLayers().attach(lm)
    run(lm, packs(), layers.hidden)
    assert lm.fused is layers
    assert type(layer).forward is forward
    assert "forward" not in vars(layer)
    assert vars(layer).keys() == attributes.keys()
    assert [id(m) for m in lm.model.modules()] == modules
    layers.detach()
    assert lm.fused is None


def test_a_policy_step_is_the_same():
    lm = build("qwen3")
    sequences = [Sequence([1, 2, 3], [4 + i, 5, 6], [True] * 3, family=0) for i in range(4)]
    batch = PolicyBatch(sequences, [1.0, -1.0, 0.5, -0.5], [[-1.0] * 3] * 4)

    def step() -> dict[str, torch.Tensor]:
        made = pack(sequences, 8)
        assert len(made) > 1
        policy_backward(lm, made, batch, AlgorithmConfig(), lm.head, Meter(), max_completion_length=3)
        grads = {n: p.grad.clone() for n, p in trainable(lm)}
        lm.model.zero_grad()
        return grads

    expected = step()
    FusedLayers().attach(lm)
    assert difference(([], step()), ([], expected)) < 1e-10


def test_an_unknown_family_has_no_description():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    assert describe(model) is None
    lm = LanguageModel(model, SimpleNamespace(), torch.device("cpu"), torch.float32, HeadOptions(), 16)
    with pytest.raises(UserError, match="'gpt2'"):
        FusedLayers().attach(lm)


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.1}, {"hidden_act": "relu"}])
def test_what_is_not_computed_has_no_description(changes):
    assert describe(build("llama", **changes).model) is None


def test_dropout_is_refused():
    lm = build("llama", lora=LoraConfig(r=2, lora_dropout=0.25))
    with pytest.raises(UserError, match=r"lora_dropout 0\.25"):
        FusedLayers().attach(lm)


def test_groups_must_divide_the_heads(qwen):
    with pytest.raises(UserError, match="1, 2, 4"):
        FusedLayers(LayerPlan(groups=3)).attach(qwen[0])


def test_trainable_base_weights_are_refused():
    lm = build("llama")
    lm.backbone.layers[1].input_layernorm.weight.requires_grad_()
    with pytest.raises(UserError, match=r"1\.input_layernorm\.weight is trainable"):
        FusedLayers().attach(lm)


def test_a_merged_adapter_is_refused():
    lm = build("llama")
    lm.model.merge_adapter()
    with pytest.raises(UserError, match="merged"):
        FusedLayers().attach(lm)


def test_four_bit_weights():
    """Against autograd on the weights that bitsandbytes unpacks: its own product may round to bfloat16 on some CPUs."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import transformers

    _register_packed_attention()
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}

    def quantised(child: torch.nn.Linear) -> torch.nn.Module:
        made = bitsandbytes.nn.Linear4bit(
            child.in_features, child.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        made.load_state_dict(child.state_dict())
        return made.to("cpu")

    def unpacked(child: torch.nn.Linear) -> torch.nn.Module:
        weight = quantised(child).weight
        child.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return child

    def made_with(change) -> LanguageModel:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(parent, name, change(child))
        model.requires_grad_(False)
        lm = LanguageModel(model.eval(), SimpleNamespace(), torch.device("cpu"), torch.float32, HeadOptions(), 64)
        attach_lora(lm, LoraConfig(r=3), seed=0)
        generator = torch.Generator().manual_seed(1)
        for _, parameter in trainable(lm):
            parameter.data.normal_(std=0.1, generator=generator)
        return lm

    lm, reference = made_with(quantised), made_with(unpacked)
    assert lm.backbone.layers[0].mlp.up_proj.weight.quant_state is not None
    made = packs()
    assert difference(fused(lm, made, LayerPlan(16, 2)), oracle(reference, made)) < 1e-4


def test_bfloat16_gradients_are_as_good_as_autograds():
    reference, half = build("llama", exact=False), build("llama", exact=False)
    made = packs()
    exact = oracle(reference, made)[1]
    half.causal_lm.to(torch.bfloat16)
    for _, parameter in trainable(half):
        parameter.data = parameter.data.float()
    for (_, a), (_, b) in zip(trainable(half), trainable(reference), strict=True):
        a.data.copy_(b.data)
    base = {n: p.data for n, p in half.model.named_parameters() if not p.requires_grad}
    for n, p in reference.model.named_parameters():
        if n in base:
            p.data.copy_(base[n])
    exact = oracle(reference, made)[1]

    def error(grads: dict[str, torch.Tensor]) -> float:
        return float(
            sum((grads[n].double() - exact[n]).square().sum() for n in exact).sqrt()
            / sum(exact[n].square().sum() for n in exact).sqrt()
        )

    ours, theirs = error(fused(half, made)[1]), error(oracle(half, made)[1])
    assert all(p.dtype == torch.float32 for _, p in trainable(half))
    assert ours < 1.25 * theirs  # both are noise of the same kind, on few tokens
