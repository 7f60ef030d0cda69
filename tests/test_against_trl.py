"""Loss and LoRA gradients of a whole step against TRL's GRPOTrainer on the same batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.config import AlgorithmConfig, LoraConfig, ModelConfig
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, load_model, with_sampling
from tandem.rl.packing import pack
from tandem.rl.samples import Sequence
from tandem.rl.step import PolicyBatch, policy_backward, sequence_log_probs

LONGEST = 10


@pytest.fixture
def lm(tmp_path_factory) -> LanguageModel:
    """A fresh one for every test: TRL adds an adapter of its own for the reference policy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    loaded = load_model(ModelConfig(model_name_or_path=str(folder), device="cpu"), SimpleNamespace(pad_token_id=0))
    attach_lora(loaded, LoraConfig(r=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(loaded):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return loaded


@pytest.fixture(scope="module")
def batch() -> PolicyBatch:
    """Two groups of three completions; log-probs of an older policy, near enough that clips act on some tokens."""
    generator = torch.Generator().manual_seed(2)
    sequences = []
    for family in range(2):
        prompt = torch.randint(1, 40, (4 + 3 * family,), generator=generator).tolist()
        for _ in range(3):
            length = int(torch.randint(1, LONGEST + 1, (1,), generator=generator))
            ids = torch.randint(1, 40, (length,), generator=generator).tolist()
            sequences.append(Sequence(prompt, ids, [True] * length, family=family))
    noise = [torch.randn(len(s.completion_ids), generator=generator) * 0.3 for s in sequences]
    advantages = torch.randn(len(sequences), generator=generator).tolist()
    return PolicyBatch(sequences, advantages, [[0.0] * s.num_scored for s in sequences], old_log_probs=noise)


def padded(batch: PolicyBatch, num_items: int) -> dict[str, torch.Tensor]:
    """TRL's layout: prompts padded on the left, completions on the right. `num_items` counts the optimiser batch."""
    sequences = batch.sequences
    width = max(len(s.prompt_ids) for s in sequences)
    length = max(len(s.completion_ids) for s in sequences)

    def right(values: list) -> torch.Tensor:
        rows = [torch.as_tensor(v) for v in values]
        return torch.stack([torch.nn.functional.pad(r, (0, length - len(r))) for r in rows])

    prompt = [[0] * (width - len(s.prompt_ids)) + s.prompt_ids for s in sequences]
    prompt_mask = [[0] * (width - len(s.prompt_ids)) + [1] * len(s.prompt_ids) for s in sequences]
    optional = {"old_per_token_logps": batch.old_log_probs, "ref_per_token_logps": batch.ref_log_probs}
    return {
        "prompt_ids": torch.tensor(prompt),
        "prompt_mask": torch.tensor(prompt_mask),
        "completion_ids": right([s.completion_ids for s in sequences]),
        "completion_mask": right([[int(scored) for scored in s.mask] for s in sequences]),
        "advantages": torch.tensor(batch.advantages),
        "num_items_in_batch": torch.tensor(num_items),
        **{name: right(values) for name, values in optional.items() if values is not None},
    }


@dataclass
class Outcome:
    """What one side made of the batch."""

    loss: float
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]


def trl_step(lm: LanguageModel, micro_batches: list[PolicyBatch], options: dict, folder: Path) -> Outcome:
    """TRL's trainer on the micro-batches of one optimiser step, gradients accumulated as it does."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, 40)}}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="w39")
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=len(micro_batches[0].sequences),
        gradient_accumulation_steps=len(micro_batches),
        num_generations=3,
        max_completion_length=LONGEST,
        gradient_checkpointing=False,
        **({"use_bias_correction_kl": False} | options),
    )
    trainer = GRPOTrainer(
        model=lm.model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w1"] * 6}),
        processing_class=tokenizer,
        reward_funcs=[lambda completions, **columns: [0.0] * len(completions)],
    )
    # transformers' training loop sets this at the start of every optimiser step.
    trainer.current_gradient_accumulation_steps = len(micro_batches)
    trainer.model.train()
    num_items = sum(s.num_scored for b in micro_batches for s in b.sequences)
    losses = [trainer.compute_loss(trainer.model, padded(b, num_items)) for b in micro_batches]
    sum(losses).backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return Outcome(sum(losses).item(), taken_gradients(lm), metrics)


def our_step(lm: LanguageModel, batch: PolicyBatch, options: dict, head: HeadOptions) -> Outcome:
    meter = Meter()
    # TRL corrects for the engine only under vLLM; the batch's rollout log-probs are made up.
    algorithm = AlgorithmConfig(**({"use_bias_correction_kl": False, "rollout_correction": "none"} | options))
    policy_backward(lm, pack(batch.sequences, 30), batch, algorithm, head, meter, max_completion_length=LONGEST)
    metrics = meter.result()
    return Outcome(metrics["loss"], taken_gradients(lm), metrics)


def taken_gradients(lm: LanguageModel) -> dict[str, torch.Tensor]:
    gradients = {n: p.grad.clone() for n, p in trainable(lm)}
    for _, p in trainable(lm):
        p.grad = None
    return gradients


def with_policies(lm: LanguageModel, batch: PolicyBatch, head: HeadOptions, *, reference: bool) -> PolicyBatch:
    """The batch with old (and reference) log-probs at a known distance from the present policy's."""
    assert batch.old_log_probs is not None
    own, _ = sequence_log_probs(lm, pack(batch.sequences, 30), len(batch.sequences), head)
    noise = [n if s.num_scored else n[:0] for s, n in zip(batch.sequences, batch.old_log_probs, strict=True)]
    ref = [p - 0.5 * n for p, n in zip(own, noise, strict=True)] if reference else None
    old = [p + n for p, n in zip(own, noise, strict=True)]
    return replace(batch, old_log_probs=old, ref_log_probs=ref)


def assert_same(ours: Outcome, expected: Outcome) -> None:
    # TRL reports policy and KL term together, and so do we.
    assert ours.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    assert largest > 1e-4
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            ours.gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


OTHERS = [
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "cispo", "epsilon_high": 1.02, "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "sapo"},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.7, "beta": 0.1},
    {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
    {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "entropy_coef": 0.05},
    {"loss_type": "grpo", "top_entropy_quantile": 0.5, "beta": 0.1},
    {"loss_type": "cispo", "epsilon_high": 1.2, "entropy_coef": 0.05, "top_entropy_quantile": 0.3},
]


@pytest.mark.parametrize("options", OTHERS, ids=lambda o: "-".join(map(str, o.values())))
def test_other_objectives_equal_those_of_trl(lm, batch, options, tmp_path):
    same = with_policies(lm, batch, lm.head, reference="beta" in options)
    if "top_entropy_quantile" in options:
        _, entropies = sequence_log_probs(lm, pack(same.sequences, 30), len(same.sequences), lm.head)
        same = replace(same, entropies=entropies)
    assert_same(our_step(lm, same, options, lm.head), trl_step(lm, [same], options, tmp_path))


CLIPS = [
    {},
    {"epsilon": 0.1, "epsilon_high": 0.5},
    {"epsilon": 0.1, "epsilon_high": 0.15, "delta": 1.3},
    {"delta": 1.05},
]
# Every average with every ratio and with and without the KL term; the clip variants take turns.
GRID = [
    {"loss_type": loss, "importance_sampling_level": level, "beta": beta} | CLIPS[(i + j + k) % len(CLIPS)]
    for i, loss in enumerate(("grpo", "bnpo", "dr_grpo", "dapo"))
    for j, level in enumerate(("token", "sequence"))
    for k, beta in enumerate((0.0, 0.1))
]


@pytest.mark.parametrize("options", GRID, ids=lambda o: "-".join(map(str, o.values())))
def test_loss_and_gradients_equal_those_of_trl(lm, batch, options, tmp_path):
    same = with_policies(lm, batch, lm.head, reference=bool(options["beta"]))
    expected = trl_step(lm, [same], options, tmp_path)
    ours = our_step(lm, same, options, lm.head)
    assert_same(ours, expected)
    names = ["entropy", *(["kl"] if options["beta"] else [])]
    if options["importance_sampling_level"] == "token" and options.get("delta") is None:
        # With `delta` TRL counts clipped ratios after the cut, and a sequence's ratio once instead of per token.
        assert expected.metrics["clip_ratio/low_mean"] > 0
        assert expected.metrics["clip_ratio/high_mean"] > 0
        names += ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    for name in names:
        assert ours.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5), name


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_packs_equal_trls_accumulated_micro_batches(lm, batch, loss_type, tmp_path):
    """bnpo is left out: TRL averages it per micro-batch, so that it depends on how the batch is cut."""
    same = with_policies(lm, batch, lm.head, reference=True)
    options = {"loss_type": loss_type, "beta": 0.1}
    # The cut goes across groups, and the two parts hold different numbers of tokens.
    parts = [same.subset([0, 3, 4]), same.subset([1, 2, 5])]
    assert len({sum(s.num_scored for s in part.sequences) for part in parts}) == 2
    assert_same(our_step(lm, same, options, lm.head), trl_step(lm, parts, options, tmp_path))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_a_masked_completion_counts_as_in_trl(lm, batch, loss_type, tmp_path):
    sequences = [replace(s, mask=[False] * len(s.mask)) if i == 2 else s for i, s in enumerate(batch.sequences)]
    rollout = [[0.0] * s.num_scored for s in sequences]
    masked = replace(batch, sequences=sequences, rollout_log_probs=rollout)
    same = with_policies(lm, masked, lm.head, reference=False)
    options = {"loss_type": loss_type}
    assert_same(our_step(lm, same, options, lm.head), trl_step(lm, [same], options, tmp_path))


def test_the_temperature_enters_as_in_trl(lm, batch, tmp_path):
    head = with_sampling(lm.head, temperature=0.6, top_k=0, top_p=1.0, chunk_size=7)
    same = with_policies(lm, batch, head, reference=False)
    expected = trl_step(lm, [same], {"loss_type": "dapo", "temperature": 0.6}, tmp_path)
    ours = our_step(lm, same, {"loss_type": "dapo"}, head)
    assert_same(ours, expected)
    assert ours.metrics["entropy"] == pytest.approx(expected.metrics["entropy"], rel=1e-5)


def test_without_old_log_probs_the_ratio_is_one_as_in_trl(lm, batch, tmp_path):
    same = replace(batch, old_log_probs=None)
    options = {"loss_type": "dapo"}
    assert_same(our_step(lm, same, options, lm.head), trl_step(lm, [same], options, tmp_path))
