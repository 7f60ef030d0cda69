"""Loss and LoRA gradients of a whole preference step against TRL's own trainers, from the same rows of text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.rl.advantages import advantages
from tandem.rl.config import AlgorithmConfig, LoraConfig, ModelConfig
from tandem.rl.examples import load_labelled, load_preferences
from tandem.rl.experience import kl_penalties
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, load_model
from tandem.rl.packing import pack
from tandem.rl.preference_loss import PreferenceOptions, needs_reference
from tandem.rl.preference_step import Answers, preference_backward, reference_log_probs, with_margins
from tandem.rl.samples import Sequence
from tandem.rl.step import PolicyBatch, policy_backward, sequence_log_probs, supervised_backward

VOCABULARY = 40
MAX_TOKENS = 40
LONGEST = 8
BETA = 0.7

# Experimental trainers say on import that they may change.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=39,
        bos_token_id=None,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A word is a token, so that rows can be written at random."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, 39)}, "</s>": 39}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    loaded = load_model(ModelConfig(model_name_or_path=str(folder), device="cpu"), SimpleNamespace(pad_token_id=0))
    attach_lora(loaded, LoraConfig(r=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(loaded):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return loaded


@pytest.fixture(scope="module")
def pairs() -> Any:
    """Six rows of prompt, chosen and rejected, of different lengths."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(3)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(1, 39, (length,), generator=generator).tolist())

    rows = [{"prompt": text(6), "chosen": " " + text(9), "rejected": " " + text(9)} for _ in range(6)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def labelled(pairs) -> Any:
    from datasets import Dataset

    labels = [True, False, True, True, False, True]
    rows = [
        {"prompt": p["prompt"], "completion": p["chosen" if good else "rejected"], "label": good}
        for p, good in zip(pairs, labels, strict=True)
    ]
    return Dataset.from_list(rows)


@dataclass
class Outcome:
    """What one side made of the batch."""

    loss: float
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]


def trl_trainer(lm: LanguageModel, folder: Path, tokenizer, rows, make: Callable, config: type, out: Path, **options):
    """A trainer of TRL's on its own copy of the model. Its adapter is new to it, so that the reference is the model
    with the adapter off, and gets our adapter's weights afterwards."""
    from transformers import LlamaForCausalLM

    trainer = make(
        model=LlamaForCausalLM.from_pretrained(folder),
        args=config(
            output_dir=str(out),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            **({"per_device_train_batch_size": len(rows)} | options),
        ),
        train_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),
        peft_config=copy.deepcopy(lm.model.peft_config["default"]),
    )
    theirs = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert theirs.keys() == dict(trainable(lm)).keys()
    for name, parameter in trainable(lm):
        theirs[name].data.copy_(parameter.data)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def trl_step(trainer) -> Outcome:
    """One backward pass over the whole data set as TRL tokenised and collated it, rows in order."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    return trl_backward(trainer, batch)


def trl_backward(trainer, batch: dict[str, Any]) -> Outcome:
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    logged = trainer._metrics["train"] if hasattr(trainer, "_metrics") else trainer._stored_metrics["train"]
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    return Outcome(loss.item(), gradients, {name: float(values[0]) for name, values in logged.items()})


def our_pairs(lm: LanguageModel, tokenizer, rows, loss_type: str) -> Answers:
    sequences = [answer for pair in load_preferences(rows, tokenizer) for answer in pair]
    ref = reference_log_probs(lm, sequences, lm.head, MAX_TOKENS) if needs_reference(loss_type) else None
    return Answers(sequences, None, ref)


def our_step(lm: LanguageModel, answers: Answers, loss_type: str, options: PreferenceOptions) -> Outcome:
    meter = Meter()
    assert len(pack(answers.sequences, MAX_TOKENS)) > 1
    preference_backward(lm, answers, loss_type, options, lm.head, meter, max_tokens=MAX_TOKENS)
    metrics = with_margins(meter.result())
    return Outcome(metrics["loss"], taken_gradients(lm), metrics)


def taken_gradients(lm: LanguageModel) -> dict[str, torch.Tensor]:
    gradients = {n: p.grad.clone() for n, p in trainable(lm) if p.grad is not None}
    for _, p in trainable(lm):
        p.grad = None
    return gradients


def assert_same_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=f"{name} differs")


def assert_same(ours: Outcome, expected: Outcome, metrics: list[str]) -> None:
    assert ours.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    assert_same_gradients(ours.gradients, expected.gradients)
    for name in metrics:
        assert ours.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-5), name


REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
LOG_PROBS = ["logps/chosen", "logps/rejected"]
PAIR_METRICS = [*REWARDS, *LOG_PROBS, "rewards/accuracies"]


def test_token_ids_are_those_of_trl(lm, folder, tokenizer, pairs, tmp_path):
    from trl import DPOConfig, DPOTrainer

    trainer = trl_trainer(lm, folder, tokenizer, pairs, DPOTrainer, DPOConfig, tmp_path)
    ours = load_preferences(pairs, tokenizer)
    for row, (chosen, rejected) in zip(trainer.train_dataset, ours, strict=True):
        assert row["prompt_ids"] == chosen.prompt_ids == rejected.prompt_ids
        assert (row["chosen_ids"], row["rejected_ids"]) == (chosen.completion_ids, rejected.completion_ids)
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == 39


# --- DPO and its relatives -------------------------------------------------------------------------------------------

DPO: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sigmoid", {}, {}),
    ("ipo", {}, {}),
    ("hinge", {}, {}),
    ("robust", {"label_smoothing": 0.15}, {"label_smoothing": 0.15}),
    ("sigmoid_norm", {}, {}),
    ("sigmoid", {"sft_weight": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
]


@pytest.mark.parametrize(("loss_type", "ours", "theirs"), DPO, ids=lambda v: v if isinstance(v, str) else "".join(v))
def test_dpo_equals_trls(lm, folder, tokenizer, pairs, tmp_path, loss_type, ours, theirs):
    from trl import DPOConfig, DPOTrainer

    options = {"loss_type": [loss_type], "beta": BETA} | theirs
    trainer = trl_trainer(lm, folder, tokenizer, pairs, DPOTrainer, DPOConfig, tmp_path, **options)
    outcome = our_step(lm, our_pairs(lm, tokenizer, pairs, loss_type), loss_type, PreferenceOptions(beta=BETA, **ours))
    assert_same(outcome, trl_step(trainer), [*PAIR_METRICS, "entropy"])


def test_label_smoothing_of_the_plain_loss_is_ours_alone(lm, folder, tokenizer, pairs, tmp_path):
    """TRL's DPO reads label_smoothing for robust and exo_pair only; ours gives conservative DPO, as TRL's CPO does."""
    from trl import DPOConfig, DPOTrainer

    options = {"loss_type": ["sigmoid"], "beta": BETA, "label_smoothing": 0.2}
    expected = trl_step(trl_trainer(lm, folder, tokenizer, pairs, DPOTrainer, DPOConfig, tmp_path, **options))
    answers = our_pairs(lm, tokenizer, pairs, "sigmoid")
    plain = our_step(lm, answers, "sigmoid", PreferenceOptions(beta=BETA))
    smoothed = our_step(lm, answers, "sigmoid", PreferenceOptions(beta=BETA, label_smoothing=0.2))
    assert_same(plain, expected, [])
    # −(1 − ε)·log σ(u) − ε·log σ(−u) = −log σ(u) + ε·u
    assert smoothed.loss == pytest.approx(expected.loss + 0.2 * plain.metrics["rewards/margins"], rel=1e-5)


# --- KTO -------------------------------------------------------------------------------------------------------------


def our_labelled(lm: LanguageModel, tokenizer, rows) -> Answers:
    found = load_labelled(rows, tokenizer)
    sequences = [s for s, _ in found]
    return Answers(sequences, [good for _, good in found], reference_log_probs(lm, sequences, lm.head, MAX_TOKENS))


def test_kto_equals_trls(lm, folder, tokenizer, labelled, tmp_path):
    from trl import KTOConfig, KTOTrainer

    weights = {"beta": BETA, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    trainer = trl_trainer(lm, folder, tokenizer, labelled, KTOTrainer, KTOConfig, tmp_path, **weights)
    expected = trl_step(trainer)
    assert expected.metrics["kl"] > 0.01, "a baseline that is cut at 0 would show nothing"
    outcome = our_step(lm, our_labelled(lm, tokenizer, labelled), "kto", PreferenceOptions(**weights))
    assert_same(outcome, expected, [*REWARDS, *LOG_PROBS, "kl", "entropy"])


def test_kto_takes_pairs_apart_as_trl_does(lm, folder, tokenizer, pairs, tmp_path):
    from trl import KTOConfig, KTOTrainer

    options = {"beta": BETA, "per_device_train_batch_size": 2 * len(pairs)}
    expected = trl_step(trl_trainer(lm, folder, tokenizer, pairs, KTOTrainer, KTOConfig, tmp_path, **options))
    outcome = our_step(lm, our_labelled(lm, tokenizer, pairs), "kto", PreferenceOptions(beta=BETA))
    assert_same(outcome, expected, [*REWARDS, *LOG_PROBS, "kl", "entropy"])


# --- CPO, SimPO and ORPO, which have no reference --------------------------------------------------------------------


CPO: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cpo", {}, {"loss_type": "sigmoid"}),
    (
        "cpo",
        {"label_smoothing": 0.1, "sft_weight": 0.4},
        {"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.4},
    ),
    ("simpo", {"simpo_gamma": 0.9}, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.9}),
    ("simpo", {"sft_weight": 1.0}, {"loss_type": "simpo", "cpo_alpha": 1.0}),
]


@pytest.mark.parametrize(("loss_type", "ours", "theirs"), CPO, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_cpo_and_simpo_equal_trls(lm, folder, tokenizer, pairs, tmp_path, loss_type, ours, theirs):
    cpo = pytest.importorskip("trl.experimental.cpo")
    options = {"beta": BETA, "remove_unused_columns": False} | theirs
    trainer = trl_trainer(lm, folder, tokenizer, pairs, cpo.CPOTrainer, cpo.CPOConfig, tmp_path, **options)
    expected = trl_step(trainer)
    outcome = our_step(lm, our_pairs(lm, tokenizer, pairs, loss_type), loss_type, PreferenceOptions(beta=BETA, **ours))
    likelihood = ["nll_loss"] if options.get("cpo_alpha", 1.0) else []
    assert_same(outcome, expected, [*PAIR_METRICS, *likelihood])


def test_orpo_equals_trls_but_for_the_prompts_likelihood(lm, folder, tokenizer, pairs, tmp_path):
    """TRL's ORPO imitates the prompt too; ours, like all else here, scores answers only. The odds are the same."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    options = {"beta": BETA, "remove_unused_columns": False}
    trainer = trl_trainer(lm, folder, tokenizer, pairs, orpo.ORPOTrainer, orpo.ORPOConfig, tmp_path, **options)
    expected = trl_step(trainer)
    answers = our_pairs(lm, tokenizer, pairs, "orpo")
    odds = our_step(lm, answers, "orpo", PreferenceOptions(beta=BETA, sft_weight=0.0))
    rows = [s.prompt_ids + s.completion_ids for s in answers.sequences[::2]]
    whole = [Sequence(ids[:1], ids[1:], [True] * (len(ids) - 1)) for ids in rows]
    meter = Meter()
    supervised_backward(lm, pack(whole, MAX_TOKENS), whole, lm.head, meter)
    likelihood, gradients = meter.result()["loss"], taken_gradients(lm)
    together = {name: odds.gradients[name] + gradients[name] for name in gradients}
    both = Outcome(odds.loss + likelihood, together, odds.metrics | {"nll_loss": likelihood})
    assert_same(both, expected, [*PAIR_METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen"])
    # With its own weight of 1, ours differs by the likelihood of the prompts alone.
    ours = our_step(lm, answers, "orpo", PreferenceOptions(beta=BETA))
    assert ours.loss - ours.metrics["nll_loss"] == pytest.approx(expected.loss - expected.metrics["nll_loss"], rel=1e-5)
    assert abs(ours.metrics["nll_loss"] - expected.metrics["nll_loss"]) > 1e-3


# --- RLOO ------------------------------------------------------------------------------------------------------------


REWARDS_OF_COMPLETIONS = [0.5, -1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.3, 0.9]


def rollout(seed: int = 2) -> list[Sequence]:
    """Three groups of three completions; rewards of the second are all equal."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for family in range(3):
        prompt = torch.randint(1, 39, (3 + family,), generator=generator).tolist()
        for _ in range(3):
            length = int(torch.randint(1, LONGEST + 1, (1,), generator=generator))
            ids = torch.randint(1, 39, (length,), generator=generator).tolist()
            sequences.append(Sequence(prompt, ids, [True] * length, family=family))
    return sequences


def rloo_trainer(lm: LanguageModel, folder: Path, tokenizer, sequences: list[Sequence], out: Path, beta: float):
    """TRL's trainer with completions that are already there instead of sampled ones."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    def reward(completions: Any, **_: Any) -> list[float | None]:
        return list(REWARDS_OF_COMPLETIONS)

    def make(**arguments: Any) -> RLOOTrainer:
        return RLOOTrainer(reward_funcs=[reward], **arguments)

    trainer = trl_trainer(
        lm,
        folder,
        tokenizer,
        Dataset.from_dict({"prompt": ["w1"] * 9}),
        make,
        RLOOConfig,
        out,
        num_generations=3,
        max_completion_length=LONGEST,
        beta=beta,
    )
    texts = ["" for _ in sequences]
    trainer._generate = lambda prompts: (
        [s.prompt_ids for s in sequences],
        [s.completion_ids for s in sequences],
        texts,
    )
    return trainer


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rloo_equals_trls(lm, folder, tokenizer, tmp_path, beta):
    """Advantages, the KL in the reward and gradients. With old = current policy TRL's ratio of a whole completion and
    our ratios per token have one gradient; dr_grpo divides by max_completion_length, which RLOO does not."""
    sequences = rollout()
    trainer = rloo_trainer(lm, folder, tokenizer, sequences, tmp_path, beta)
    scored = trainer._generate_and_score_completions([{"prompt": "w1"}] * 9)
    expected = trl_backward(trainer, scored)

    algorithm = AlgorithmConfig(
        loss_type="dr_grpo", advantage_estimator="rloo", beta=beta, kl_estimator="k1", rollout_correction="none"
    )
    packs = pack(sequences, MAX_TOKENS)
    old, _ = sequence_log_probs(lm, packs, len(sequences), lm.head)
    ref = reference_log_probs(lm, sequences, lm.head, MAX_TOKENS)
    batch = PolicyBatch(sequences, [0.0] * 9, [p.tolist() for p in old], old, ref if beta else None)
    rewards = np.array(REWARDS_OF_COMPLETIONS)
    penalties = kl_penalties(batch, algorithm)
    assert (penalties is None) == (beta == 0.0)
    if penalties is not None:
        assert max(map(abs, penalties)) > 0.01
        rewards = rewards - np.array(penalties)
    batch.advantages = advantages(rewards.reshape(3, 3), algorithm).reshape(-1).tolist()
    torch.testing.assert_close(torch.tensor(batch.advantages), scored["advantages"], rtol=1e-4, atol=1e-5)

    meter = Meter()
    policy_backward(lm, packs, batch, algorithm, lm.head, meter, max_completion_length=LONGEST)
    ours = {name: gradient * LONGEST for name, gradient in taken_gradients(lm).items()}
    assert_same_gradients(ours, expected.gradients)
    metrics = meter.result()
    assert metrics["entropy"] == pytest.approx(expected.metrics["entropy"], rel=1e-5)
    # The values of the losses differ on purpose: RLOO's is the mean advantage, ours the mean over tokens.
    assert expected.loss == pytest.approx(-np.mean(batch.advantages), abs=1e-5)
    lengths = [s.num_scored for s in sequences]
    assert metrics["loss"] * LONGEST == pytest.approx(-np.mean(np.multiply(batch.advantages, lengths)), rel=1e-5)
