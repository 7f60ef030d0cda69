"""LoRA on the head: trainer, engine and saved adapter are all that of peft's own forward, or the adapter is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.config import LoraConfig, ModelConfig
from tandem.rl.errors import UserError
from tandem.rl.fused_layer import FusedLayers
from tandem.rl.lora import attach_lora, load_adapter, save_adapter, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, load_model
from tandem.rl.packing import pack
from tandem.rl.samples import Prompt, Sampling, Sequence
from tandem.rl.step import pack_log_probs, supervised_backward
from tandem.rollout.transformers_engine import TransformersEngine

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
TARGETS = ["lm_head", "q_proj", "down_proj"]


def save_model(path: Path, kind: str = "Llama", **changes) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **changes)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def folder(request, tmp_path_factory) -> Path:
    more = {"head_dim": 8} if request.param == "Qwen3" else {}
    return save_model(tmp_path_factory.mktemp(request.param), request.param, tie_word_embeddings=False, **more)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def load(folder: Path, lora: LoraConfig | None = None, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """With an adapter that has moved: B = 0 would hide the gradient of A."""
    lm = load_model(ModelConfig(model_name_or_path=str(folder), device="cpu"), SimpleNamespace(pad_token_id=0))
    attach_lora(lm, lora or LoraConfig(r=3, target_modules=TARGETS), seed=0)
    lm.model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(lm):
        parameter.data.normal_(std=0.2, generator=generator)
    return lm


class ExactNorm(torch.nn.Module):
    """transformers' norm rounds to float32 in between, differently for every path to the same numbers."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def load_exact(folder: Path, lora: LoraConfig | None = None) -> LanguageModel:
    lm = load(folder, lora)
    for parent in list(lm.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactNorm(child))
    return lm


def sequences() -> list[Sequence]:
    torch.manual_seed(3)
    lengths = [(4, 3, 0), (4, 5, 0), (2, 1, 1), (6, 4, 2)]
    prompts = {family: torch.randint(48, (n,)).tolist() for n, _, family in lengths}
    return [Sequence(prompts[f], torch.randint(48, (c,)).tolist(), [True] * c, family=f) for _, c, f in lengths]


def by_peft(lm: LanguageModel, one: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict a sequence's scored tokens, by peft's own forward, and these tokens."""
    logits = lm.model(torch.tensor([one.prompt_ids + one.completion_ids])).logits[0]
    return logits[len(one.prompt_ids) - 1 : -1], torch.tensor(one.completion_ids)


def grads_of(lm: LanguageModel) -> dict[str, torch.Tensor]:
    grads = {n: p.grad for n, p in trainable(lm)}
    lm.model.zero_grad()
    return grads


def log_probs_by_peft(lm: LanguageModel, one: Sequence) -> torch.Tensor:
    logits, targets = by_peft(lm, one)
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert sum("lm_head" in name for name in want) == 2
    for name, grad in want.items():
        assert grad.abs().max() > 1e-4, name
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_a_step_with_an_adapted_head_is_autograd_through_peft(folder, fused) -> None:
    lm, batch, smoothing, z_loss = load_exact(folder), sequences(), 0.1, 0.01
    total = sum(s.num_scored for s in batch)
    for one in batch:
        logits, _ = by_peft(lm, one)
        lse = logits.logsumexp(-1)
        loss = -(1 - smoothing) * log_probs_by_peft(lm, one) + smoothing * (lse - logits.mean(-1)) + z_loss * lse**2
        (loss.sum() / total).backward()
    want = grads_of(lm)
    if fused:
        FusedLayers().attach(lm)
    head = HeadOptions(chunk_size=5)
    supervised_backward(lm, pack(batch, 16), batch, head, Meter(), label_smoothing=smoothing, z_loss=z_loss)
    same_gradients(grads_of(lm), want)


def test_gradients_of_log_probs_and_entropies_together(folder) -> None:
    lm, batch = load_exact(folder), sequences()
    (one_pack,) = pack(batch, 64)
    count = sum(one_pack.counts)
    g, h = torch.randn(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with lm.packed():
        scores = pack_log_probs(lm, one_pack, HeadOptions(chunk_size=4))
        (scores.log_probs @ g + scores.entropy @ h).backward()
    got = grads_of(lm)
    in_order = [batch[i] for i in one_pack.sequences]
    log_p = torch.cat([by_peft(lm, one)[0] for one in in_order]).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (torch.cat([log_probs_by_peft(lm, one) for one in in_order]) @ g + entropy @ h).backward()
    same_gradients(got, grads_of(lm))


def test_a_head_adapted_alone_trains(folder) -> None:
    """Hidden states then have no gradient of their own."""
    lm = load_exact(folder, LoraConfig(r=2, target_modules=["lm_head"]))
    (one_pack,) = pack(sequences(), 64)
    with lm.packed():
        pack_log_probs(lm, one_pack, HeadOptions()).log_probs.sum().backward()
    got = grads_of(lm)
    torch.cat([log_probs_by_peft(lm, one) for one in sequences()]).sum().backward()
    same_gradients(got, grads_of(lm))


def test_switched_off_the_head_is_the_base_models(folder) -> None:
    lm = load(folder)
    hidden = torch.randn(3, 32, dtype=torch.float64)
    weight = lm.causal_lm.lm_head.base_layer.weight
    assert lm.head_weight is weight
    a, b, scale = lm.head_adapter
    assert scale == 2.0
    torch.testing.assert_close(lm.logits(hidden), hidden @ (weight + scale * b @ a).T)
    with lm.model.disable_adapter():
        assert lm.head_adapter is None
        torch.testing.assert_close(lm.logits(hidden), hidden @ weight.T)


def test_the_engine_draws_from_the_adapted_head(folder) -> None:
    lm = load(folder)
    sampling = Sampling(num_generations=2, max_completion_length=6, temperature=1.0, stop_token_ids=(47,), seed=5)
    (group,) = TransformersEngine(lm).generate([Prompt(0, [5, 6, 7], {})], sampling)
    for completion in group.completions:
        one = Sequence([5, 6, 7], completion.ids, [True] * len(completion.ids), family=0)
        with torch.no_grad():
            want = log_probs_by_peft(lm, one)
            with lm.model.disable_adapter():
                base = log_probs_by_peft(lm, one)
        torch.testing.assert_close(torch.tensor(completion.log_probs, dtype=torch.float64), want, rtol=0, atol=1e-4)
        assert (want - base).abs().max() > 0.05


def test_a_saved_adapter_has_the_heads_share_and_nothing_of_the_base(folder, tmp_path) -> None:
    import peft
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    lm = load(folder, dtype=torch.float32)
    save_adapter(lm, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all("lora_" in key for key in keys)
    assert sum("lm_head" in key for key in keys) == 2
    ids = torch.arange(8)[None]
    fresh = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
    torch.testing.assert_close(fresh(ids).logits, lm.model(ids).logits, rtol=0, atol=1e-5)
    again = load(folder, LoraConfig(init_from=str(tmp_path)), torch.float32)
    load_adapter(again, tmp_path)
    assert again.head_adapter is not None
    for (name, p), (_, q) in zip(trainable(lm), trainable(again), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("target", ["lm_head", "from a folder"])
def test_a_head_that_shares_the_embeddings_weight_is_refused(tied, tmp_path, target) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    config = LoraConfig(target_modules=[target])
    if target == "from a folder":
        settings = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tied), settings)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        config = LoraConfig(init_from=str(tmp_path))
    with pytest.raises(UserError, match="also the model's input embedding"):
        load(tied, config)
    assert load(tied, LoraConfig(target_modules=["q_proj"])).head_adapter is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["lm_head"], "use_dora": True}, "variant of LoRA"),
        ({"target_modules": ["lm_head"], "lora_bias": True}, "bias in its adapter"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trains .* of the model's head"),
    ],
    ids=str,
)
def test_adapters_of_the_head_that_are_not_computed_are_refused(folder, tmp_path, settings, message) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load(folder, LoraConfig(init_from=str(tmp_path)))


def test_dropout_on_the_heads_adapter_is_refused(folder) -> None:
    with pytest.raises(UserError, match=r"lora_dropout 0\.1"):
        load(folder, LoraConfig(target_modules=["lm_head"], lora_dropout=0.1))
