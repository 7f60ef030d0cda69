"""Models without fused layers: recomputed layers with inputs in host memory, and how commands choose them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tandem.rl import offload
from tandem.rl.checkpoint_offload import CheckpointedLayers
from tandem.rl.config import AlgorithmConfig, Config, LoraConfig, ModelConfig
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, check_packing, load_model
from tandem.rl.offload import HostStore, Stored
from tandem.rl.open_model import attach_layers, open_model
from tandem.rl.packing import Pack, pack
from tandem.rl.plan import changed
from tandem.rl.samples import Prompt, Sampling, Sequence
from tandem.rl.step import PolicyBatch, layout_of, policy_backward, sequence_log_probs, training_mode

LAYERS, WIDTH, VOCAB = 4, 24, 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Families that `rl.families` does not describe, and Gemma 2, which it does.
CONFIGS: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "stablelm": {"partial_rotary_factor": 2 / 3},
    "deepseek_v3": {  # its values have fewer elements than its queries and keys
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "moe_intermediate_size": 16,
    },
    "gemma2": {"head_dim": 6, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 6},
}
UNDESCRIBED = ["olmo2", "granite", "stablelm", "deepseek_v3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    """The folder of a tiny random model of a family, with a tokenizer."""

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | CONFIGS[family])).save_pretrained(
                path
            )
            tokenizer().save_pretrained(path)
        return path

    root = tmp_path_factory.mktemp("models")
    return folder


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(3, VOCAB)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


def load(folder: Path, dropout: float = 0.0) -> LanguageModel:
    lm = load_model(ModelConfig(model_name_or_path=str(folder), device="cpu"), SimpleNamespace(pad_token_id=0))
    attach_lora(lm, LoraConfig(r=4, lora_dropout=dropout), seed=0)
    spread(lm)
    return lm


def spread(lm: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(lm):  # B = 0 would hide most of the adapter's gradient
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def batch() -> tuple[PolicyBatch, list[Pack]]:
    """Two groups whose prompts are shared, over two packs."""
    generator = torch.Generator().manual_seed(2)

    def draw(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    prompts = [draw(7), draw(4)]
    sequences = [Sequence(prompts[i // 3], draw(3 + i), [True] * (3 + i), family=i // 3) for i in range(6)]
    values = torch.randn(6, generator=generator).tolist()
    return PolicyBatch(sequences, values, [[-1.0] * (3 + i) for i in range(6)]), pack(sequences, 32, share_prefix=True)


def gradients(lm: LanguageModel) -> list[torch.Tensor]:
    content, packs = batch()
    assert len(packs) > 1
    torch.manual_seed(3)  # of dropout
    policy_backward(lm, packs, content, AlgorithmConfig(), lm.head, Meter(), max_completion_length=8)
    found = [p.grad for _, p in trainable(lm)]
    assert all(g is not None and g.abs().sum() > 0 for g in found)
    for _, p in trainable(lm):
        p.grad = None
    return [g for g in found if g is not None]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Recorder(HostStore):
    """A store that says what was put into it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), block_bytes=1024)
        self.shapes: list[tuple[int, ...]] = []

    def put(self, tensors: list[torch.Tensor]) -> Stored:
        self.shapes += [tuple(t.shape) for t in tensors]
        return super().put(tensors)


@pytest.mark.parametrize("family", [*UNDESCRIBED, "gemma2"])
def test_gradients_are_bitwise_those_without_offload(folders, family):
    lm = load(folders(family))
    plain = gradients(lm)
    recomputed = CheckpointedLayers(offload=False).attach(lm)
    assert same(gradients(lm), plain)
    assert recomputed.host is None
    recomputed.detach()
    layers = CheckpointedLayers(offload=True).attach(lm)
    store = layers.host = Recorder()
    lengths = [len(p.input_ids) for p in batch()[1]]
    allocated = []
    for _ in range(3):
        store.shapes.clear()
        assert same(gradients(lm), plain)
        # Nothing but the layers' inputs went out.
        assert store.shapes == [(1, n, WIDTH) for n in lengths for _ in range(LAYERS)]
        assert store.pool.free == store.pool.allocated
        allocated.append(store.pool.allocated)
    assert len(set(allocated)) == 1, "the blocks of the first step serve the later ones"
    layers.detach()
    assert lm.checkpoints is None
    assert not any(getattr(module, "gradient_checkpointing", False) for module in lm.model.modules())
    assert same(gradients(lm), plain)


def test_dropout_is_drawn_again_as_it_was(folders):
    lm = load(folders("olmo2"), dropout=0.5)
    plain = gradients(lm)
    without = load(folders("olmo2"))
    assert not same(gradients(without), plain)
    CheckpointedLayers(offload=True).attach(lm)
    assert same(gradients(lm), plain)


def forward(lm: LanguageModel, which: int = 0) -> torch.Tensor:
    row = batch()[1][which]
    return lm.packed_hidden(torch.tensor(row.input_ids), torch.tensor(row.position_ids), layout_of(row))


@pytest.mark.parametrize("offload", [False, True])
def test_layer_inputs_leave_the_device(folders, offload):
    lm = load(folders("granite"))
    CheckpointedLayers(offload=offload).attach(lm)
    inputs: list[StorageWeakRef] = []
    need_gradients: list[bool] = []

    def see(module, args):
        inputs.append(StorageWeakRef(args[0].untyped_storage()))
        need_gradients.append(args[0].requires_grad)

    hooks = [layer.register_forward_pre_hook(see) for layer in lm.backbone.layers]
    with training_mode(lm):
        out = forward(lm)
        there = [not storage.expired() for storage in inputs]
        # The latest stays, since the backward pass wants it at once.
        assert there == [not offload] * (LAYERS - 1) + [True]
        # Embeddings are frozen: a gradient of theirs would be computed and kept for nothing.
        assert need_gradients == [False] + [True] * (LAYERS - 1)
        for hook in hooks:
            hook.remove()
        out.sum().backward()
    assert all(storage.expired() for storage in inputs)


@pytest.mark.parametrize("family", ["olmo2", "stablelm"])  # StableLM does not hand the layout on to its layers
def test_two_passes_may_wait_at_once_and_one_may_be_dropped(folders, family):
    lm = load(folders(family))

    def both() -> list[torch.Tensor]:
        with training_mode(lm):
            first, second = forward(lm, 0), forward(lm, 1)
            (first.square().sum() + second.square().sum()).backward()
        grads = [p.grad for _, p in trainable(lm)]
        lm.model.zero_grad()
        return [g for g in grads if g is not None]

    plain = both()
    layers = CheckpointedLayers(offload=True).attach(lm)
    assert same(both(), plain)
    with training_mode(lm):
        forward(lm)
    assert same(both(), plain)
    assert layers.host is not None
    assert layers.host.pool.free == layers.host.pool.allocated


@pytest.mark.parametrize("family", ["olmo2", "stablelm"])
def test_layers_can_be_recomputed_twice_where_their_inputs_stay(folders, family):
    lm = load(folders(family))
    CheckpointedLayers(offload=False).attach(lm)
    with training_mode(lm):
        out = forward(lm).square().sum()
        out.backward(retain_graph=True)
        once = [p.grad.clone() for _, p in trainable(lm) if p.grad is not None]
        out.backward()
    assert same([p.grad for _, p in trainable(lm) if p.grad is not None], [2 * g for g in once])


def test_only_training_passes_use_host_memory(folders):
    lm = load(folders("olmo2"))
    layers = CheckpointedLayers(offload=True).attach(lm)
    content, packs = batch()
    sequence_log_probs(lm, packs, len(content.sequences), lm.head)
    assert layers.host is None
    store = layers.host = Recorder()
    with lm.packed():
        forward(lm).sum().backward()  # in eval mode, where nothing is recomputed
    assert not store.shapes


def test_without_being_asked_only_large_packs_on_a_gpu_go_out(folders, monkeypatch):
    lm = load(folders("olmo2"))
    layers = CheckpointedLayers().attach(lm)
    gradients(lm)
    assert layers.host is None
    on_gpu = CheckpointedLayers().attach(replace(lm, device=torch.device("cuda")))
    rows = 1000
    monkeypatch.setattr(offload, "STAYS_ON_DEVICE", LAYERS * WIDTH * 4 * rows)
    assert not on_gpu._offloads(rows)
    assert on_gpu._offloads(rows + 1)
    assert not layers._offloads(rows + 1)


def test_a_layer_that_writes_to_its_input_is_refused(folders):
    lm = load(folders("granite"))
    CheckpointedLayers(offload=True).attach(lm)

    def write(module, args):
        args[0].mul_(1.0)

    lm.backbone.layers[2].input_layernorm.register_forward_pre_hook(write)
    with pytest.raises(RuntimeError, match="changes its input in place"):
        gradients(lm)


def test_a_model_that_cannot_recompute_is_refused(folders):
    lm = load(folders("olmo2"))
    lm.causal_lm.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="Olmo2ForCausalLM cannot recompute") as caught:
        CheckpointedLayers().attach(lm)
    assert "train.gradient_checkpointing=false" in (caught.value.fix or "")
    assert lm.checkpoints is None


def config_for(folder: Path, **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"model_name_or_path": str(folder), "device": "cpu"},
            "data": {"dataset_name": "unused.jsonl"},
            "rewards": {"reward_funcs": ["exact_match"]},
            "lora": {"r": 4},
            "train": train,
        }
    )


@pytest.fixture
def opened(folders) -> Any:
    def open_family(family: str, **train: Any) -> tuple[LanguageModel, Any]:
        folder = folders(family)
        data = SimpleNamespace(prompts=[], eval_prompts=[])
        inputs: Any = SimpleNamespace(tokenizer=tokenizer(), data=data, environments=None)
        lm, engine, *_ = open_model(config_for(folder, **train), inputs, Console.silent())
        spread(lm)
        return lm, engine

    return open_family


def test_a_run_uses_what_the_config_says(opened):
    lm, _ = opened("olmo2")
    assert lm.fused is None
    assert lm.checkpoints is None
    lm, _ = opened("olmo2", gradient_checkpointing=True)
    plain = gradients(lm)
    assert lm.checkpoints.host is None
    lm, _ = opened("olmo2", offload_activations=True)
    assert same(gradients(lm), plain)
    assert lm.checkpoints.host.pool.allocated > 0
    lm, _ = opened("olmo2", gradient_checkpointing=False, offload_activations=True)
    assert lm.checkpoints is None


def test_the_fallback_is_said_once(folders, capsys):
    config, console = config_for(folders("olmo2")), Console()
    for _ in range(2):
        lm = replace(load(folders("olmo2")), device=torch.device("cuda"))
        attach_layers(lm, config, console)
        assert lm.fused is None
        assert lm.checkpoints is not None
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("training through the model's own forward, layers recomputed in the backward pass") == 1
    assert "'olmo2'" in said
    with pytest.raises(UserError, match="no fused layers for this model"):
        attach_layers(lm, config_for(folders("olmo2"), fused_layers=True), console)


def test_a_model_that_can_neither_is_said_to_keep_everything(folders, capsys):
    lm = replace(load(folders("olmo2")), device=torch.device("cuda"))
    lm.causal_lm.supports_gradient_checkpointing = False
    attach_layers(lm, config_for(folders("olmo2")), Console())
    assert lm.checkpoints is None
    assert "every layer's activations kept" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("algorithm", "split"), [("grpo", True), ("sft", False)])
def test_adapters_are_rounded_as_an_engine_does_where_one_is_compared_with(folders, algorithm, split):
    lm, config = load(folders("gemma2")), config_for(folders("gemma2"), fused_layers=True)
    attach_layers(lm, changed(config, {"algorithm": {"name": algorithm}}), Console.silent())
    assert lm.fused.plan.split_adapters is split


@pytest.mark.parametrize("fused", [False, True])
def test_gemma_2_opens_though_it_refuses_sdpa(opened, fused):
    lm, engine = opened("gemma2", fused_layers=fused)
    assert lm.causal_lm.config._attn_implementation == "eager"
    assert (lm.fused is not None) == fused
    prompts = [Prompt(i, torch.arange(3 + i, 12 + 2 * i).tolist(), "") for i in range(2)]
    groups = engine.generate(prompts, Sampling(2, 6, stop_token_ids=(2,)))
    sequences = [
        Sequence(g.prompt.ids, c.ids, [True] * len(c.ids), i) for i, g in enumerate(groups) for c in g.completions
    ]
    packs = pack(sequences, 64, share_prefix=True)
    ours, _ = sequence_log_probs(lm, packs, len(sequences), lm.head)
    theirs = [torch.tensor(c.log_probs) for g in groups for c in g.completions]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=1e-4)


def test_a_model_that_says_no_for_another_reason_is_not_tried_again(folders, monkeypatch):
    from transformers import AutoModelForCausalLM

    tried = []

    def refuse(source, **options):
        tried.append(options["attn_implementation"])
        raise ValueError("no such thing")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match="no such thing"):
        load(folders("olmo2"))
    assert tried == ["sdpa"]


@pytest.mark.parametrize("family", UNDESCRIBED)
def test_packs_of_the_models_own_forward_are_checked(folders, family):
    check_packing(load(folders(family)))


def test_a_model_with_sinks_is_refused_before_anything_is_generated(opened):
    with pytest.raises(UserError, match=r"GptOssForCausalLM cannot run several sequences in one row.*sinks"):
        opened("gpt_oss")


def test_a_model_whose_tokens_see_other_sequences_is_refused(folders, monkeypatch):
    lm = load(folders("olmo2"))
    attend = lm.packed_hidden

    def mixed(ids, positions, layout):
        layout.families[:] = [replace(layout.families[0], root=(0, len(ids)))]
        return attend(ids, positions, layout)

    monkeypatch.setattr(lm, "packed_hidden", mixed)
    with pytest.raises(UserError, match="computes something else when several sequences share a row"):
        check_packing(lm)
