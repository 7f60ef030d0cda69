"""Whole runs against a plainly written loop: transformers' forward and peft in float64, autograd, torch's AdamW, one
sequence at a time. Only the completions and their rewards are taken from the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import write_place

from tandem.rl import commands
from tandem.rl.config import Config
from tandem.rl.config_file import load_config
from tandem.rl.console import Console

GROUP, LONGEST, STEPS = 4, 4, 7
Row = dict[str, Any]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]) -> tuple[Config, Path]:
    """A run from a fresh adapter; its config and folder."""
    path = write_place(folder)
    given = yaml.safe_load(path.read_text())
    del given["eval"], given["warmup"]
    base: dict[str, Any] = {
        # Many tokens end a completion, so that some are of one token and some are truncated.
        "rollout": {"max_completion_length": LONGEST, "stop_token_ids": list(range(2, 14))},
        "train": {"max_steps": STEPS, "generation_batch_size": 16},
        "optim": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.1},
    }
    for part in (base, sections):
        for name, values in part.items():
            given[name] = given.get(name, {}) | values
    path.write_text(yaml.safe_dump(given))
    monkeypatch.setattr(commands, "write_report", lambda run_dir: run_dir)  # charts take longer than these runs
    config = load_config(path)
    assert commands.run(config, dry_run=False, console=Console.silent())
    return config, folder / "runs" / "run"


def rollouts(folder: Path) -> list[list[Row]]:
    files = sorted((folder / "rollouts").glob("step_*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in files]


class Loop:
    """The same training, written from the papers' formulas."""

    def __init__(self, config: Config, folder: Path) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        settings = peft.LoraConfig(r=config.lora.r, lora_alpha=2 * config.lora.r, target_modules="all-linear")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = peft.get_peft_model(base, settings).double().eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1, weight_decay=optim.weight_decay)
        self.config, self.step = config, 0
        self.losses: list[float] = []
        self.norms: list[float] = []

    def scores(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of a completion's tokens."""
        prompt = [int(word[1:]) + 2 for word in row["prompt"].split()]
        ids = torch.tensor([prompt + row["completion_ids"]])
        log_p = (self.model(ids).logits[0] / self.config.rollout.temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        return log_p.gather(-1, ids[0, len(prompt) :, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    @torch.no_grad()
    def learn(self, rows: list[Row]) -> None:
        """From one rollout."""
        algorithm, parts = self.config.algorithm, self.config.train.steps_per_generation
        rewards = np.array([row["reward"] for row in rows]).reshape(-1, GROUP)
        deviation = {"group": rewards.std(1, ddof=1, keepdims=True) + 1e-4, "batch": rewards.std(ddof=1) + 1e-4}
        advantages = (rewards - rewards.mean(1, keepdims=True)) / deviation.get(algorithm.scale_rewards, 1.0)
        for row, advantage in zip(rows, advantages.reshape(-1), strict=True):
            row["A"], (row["old"], entropy) = float(advantage), self.scores(row)
            # First tokens of a group have one distribution, and rounding must not choose among them.
            row["entropy"] = entropy.round(decimals=9)
            with self.model.disable_adapter():
                row["ref"] = self.scores(row)[0]
        size = len(rows) // parts
        for _ in range(algorithm.num_iterations):
            for start in range(0, len(rows), size):
                if self.step < STEPS:
                    self.update(rows[start : start + size])

    @torch.enable_grad()
    def update(self, rows: list[Row]) -> None:
        algorithm = self.config.algorithm
        live = [row for row in rows if not (algorithm.mask_truncated_completions and row["truncated"])]
        limit = torch.quantile(torch.cat([row["entropy"] for row in live]), 1 - algorithm.top_entropy_quantile)
        tokens, chosen = sum(len(row["old"]) for row in live), sum(int((r["entropy"] >= limit).sum()) for r in live)
        loss = torch.zeros((), dtype=torch.float64)
        for row in live:
            own, entropy = self.scores(row)
            kept = (row["entropy"] >= limit).double()
            share = {"grpo": 1 / (len(rows) * len(own)), "dr_grpo": 1 / (len(rows) * LONGEST)}
            terms = self.objective(row, own, kept) * share.get(algorithm.loss_type, 1 / tokens)
            loss = loss + terms.sum() - algorithm.entropy_coef * (entropy * kept).sum() / chosen
        self.optimizer.zero_grad()
        loss.backward()
        optim = self.config.optim
        self.norms.append(float(torch.nn.utils.clip_grad_norm_(self.parameters, optim.max_grad_norm)))
        progress = (self.step - optim.warmup_steps) / (STEPS - optim.warmup_steps)
        rise, fall = (self.step + 1) / optim.warmup_steps, 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = optim.learning_rate * (rise if self.step < optim.warmup_steps else fall)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.step += 1

    def objective(self, row: Row, own: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Of each token, with rollout correction and KL."""
        options, advantage = self.config.algorithm, row["A"]
        log_ratio = own - row["old"]
        if options.importance_sampling_level == "sequence":
            log_ratio = log_ratio.mean().expand(len(own))
        ratio = log_ratio.exp()
        if options.loss_type == "cispo":
            surrogate = ratio.clamp(max=options.epsilon_high).detach() * advantage * own
        else:
            clipped = ratio.clamp(1 - options.epsilon, 1 + (options.epsilon_high or options.epsilon))
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        between = row["old"] - torch.tensor(row["log_probs"], dtype=torch.float64)
        if options.rollout_correction.startswith("sequence"):
            between = between.sum().expand(len(own))
        correction, most = between.exp(), options.rollout_correction_max
        cut = correction.clamp(max=most) if options.rollout_correction.endswith("truncate") else correction
        surrogate = surrogate * torch.where(correction > most, cut if cut is not correction else 0.0, correction)
        difference = row["ref"] - own
        kl = difference.exp() - difference - 1
        return -kept * surrogate + options.beta * kl * (ratio if options.use_bias_correction_kl else 1.0)


CASES: dict[str, dict[str, Any]] = {
    "several updates": {
        "algorithm": {"loss_type": "dr_grpo", "num_iterations": 2, "beta": 0.2, "mask_truncated_completions": True},
        "train": {"steps_per_generation": 2, "max_tokens": 12, "fused_layers": True, "logprob_chunk_size": 3},
    },
    "sequence ratios": {
        "algorithm": {
            "loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 3, "epsilon": 0.05,
            "epsilon_high": 0.1, "scale_rewards": "batch", "rollout_correction": "sequence_mask", "beta": 0.1,
        },
        "rollout": {"temperature": 1.3},
    },
    "high entropy": {
        "algorithm": {
            "loss_type": "cispo", "epsilon_high": 1.05, "top_entropy_quantile": 0.5, "entropy_coef": 0.1, "beta": 0.0,
            "scale_rewards": "none",
        },
        "train": {"steps_per_generation": 4, "max_tokens": 12, "share_prefix": False},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_a_plain_loop(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import get_peft_model_state_dict

    config, folder = run(tmp_path, monkeypatch, CASES[case])
    loop = Loop(config, tmp_path)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for rows, metrics in zip(rollouts(folder), logged, strict=True):
        first = loop.step
        assert len({len(row["completion_ids"]) for row in rows}) > 1
        loop.learn(rows)
        # Several updates share a record, and what it says is of one.
        assert metrics["loss"] == pytest.approx(np.mean(loop.losses[first:]), rel=1e-4, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(np.mean(loop.norms[first:]), rel=1e-4)
    assert loop.step == STEPS
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(loop.model)
    assert found.keys() == expected.keys()
    assert max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_B" in name) > 0.05
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_row_that_a_rollout_holds_twice_is_sampled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = run(tmp_path, monkeypatch, {"data": {"max_examples": 2}})
    for rows in rollouts(folder):
        groups = [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]
        assert len({group[0]["prompt"] for group in groups}) == 2
        assert len({json.dumps([row["completion_ids"] for row in group]) for group in groups}) == 4


def test_a_run_in_which_no_rewards_differ_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "same.py").write_text("def same(completions):\n    return [1.0] * len(completions)\n")
    sections = {
        "rewards": {"reward_funcs": ["same.py:same"]},
        "algorithm": {"drop_uniform_groups": True, "loss_type": "dr_grpo", "top_entropy_quantile": 0.5},
    }
    _, folder = run(tmp_path, monkeypatch, sections)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
