"""Loss and LoRA gradients of a whole step against TRL's GRPOTrainer on the same batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tandem.rl.config import AlgorithmConfig, LoraConfig, ModelConfig
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, load_model
from tandem.rl.packing import pack
from tandem.rl.samples import Sequence
from tandem.rl.step import PolicyBatch, policy_backward

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


def padded(batch: PolicyBatch, columns: dict[str, list[torch.Tensor] | None]) -> dict[str, torch.Tensor]:
    """TRL's layout: prompts padded on the left, completions on the right."""
    sequences = batch.sequences
    width = max(len(s.prompt_ids) for s in sequences)
    length = max(len(s.completion_ids) for s in sequences)

    def right(values: list) -> torch.Tensor:
        rows = [torch.as_tensor(v) for v in values]
        return torch.stack([torch.nn.functional.pad(r, (0, length - len(r))) for r in rows])

    prompt = [[0] * (width - len(s.prompt_ids)) + s.prompt_ids for s in sequences]
    prompt_mask = [[0] * (width - len(s.prompt_ids)) + [1] * len(s.prompt_ids) for s in sequences]
    return {
        "prompt_ids": torch.tensor(prompt),
        "prompt_mask": torch.tensor(prompt_mask),
        "completion_ids": right([s.completion_ids for s in sequences]),
        "completion_mask": right([[1] * len(s.completion_ids) for s in sequences]),
        "advantages": torch.tensor(batch.advantages),
        "num_items_in_batch": torch.tensor(sum(s.num_scored for s in sequences)),
        **{name: right(values) for name, values in columns.items() if values is not None},
    }


def trl_step(lm: LanguageModel, batch: PolicyBatch, options: dict, folder) -> tuple[float, dict[str, torch.Tensor]]:
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
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=LONGEST,
        gradient_checkpointing=False,
        use_bias_correction_kl=False,
        **options,
    )
    trainer = GRPOTrainer(
        model=lm.model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w1"] * 6}),
        processing_class=tokenizer,
        reward_funcs=[lambda completions, **columns: [0.0] * len(completions)],
    )
    trainer.current_gradient_accumulation_steps = 1
    inputs = padded(batch, {"old_per_token_logps": batch.old_log_probs, "ref_per_token_logps": batch.ref_log_probs})
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), taken_gradients(lm)


def taken_gradients(lm: LanguageModel) -> dict[str, torch.Tensor]:
    gradients = {n: p.grad.clone() for n, p in trainable(lm)}
    for _, p in trainable(lm):
        p.grad = None
    return gradients


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo"},
        {"loss_type": "bnpo", "epsilon_high": 0.5},
        {"loss_type": "dr_grpo", "delta": 1.5},
        {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3},
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "dapo", "beta": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": 0.1},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_loss_and_gradients_equal_those_of_trl(lm, batch, options, tmp_path):
    from tandem.rl.step import sequence_log_probs

    packs = pack(batch.sequences, 30)
    own = sequence_log_probs(lm, packs, len(batch.sequences), lm.head)
    old = [p + n for p, n in zip(own, batch.old_log_probs, strict=True)]
    ref = [p - 0.5 * n for p, n in zip(own, batch.old_log_probs, strict=True)] if "beta" in options else None
    same = PolicyBatch(batch.sequences, batch.advantages, batch.rollout_log_probs, old, ref)
    loss, expected = trl_step(lm, same, options, tmp_path)

    algorithm = AlgorithmConfig(**options)
    meter = Meter()
    policy_backward(lm, packs, same, algorithm, lm.head, meter, max_completion_length=LONGEST)
    ours = taken_gradients(lm)
    # TRL reports policy and KL term together, and so do we.
    assert meter.result()["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
