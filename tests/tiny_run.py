"""A model of a few thousand weights with data, rewards and a config, for tests that need many short runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tiny_model import save_llama, save_words

REWARDS = """
def low(completions, log_metric, **columns):
    values = [sum(int(w[1:]) < 20 for w in c.split() if w[0] == "w") / max(len(c.split()), 1) for c in completions]
    log_metric("low_share", sum(values) / len(values))
    return values
"""


def write_place(folder: Path) -> Path:
    """Model, data, rewards and `run.yaml` in a folder; returns the config's path."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(40))]
    save_words(folder / "model", words, eos="<eos>", unk="<unk>")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32}
    save_llama(folder / "model", len(words), **shape, initializer_range=0.3)
    (folder / "rewards.py").write_text(REWARDS)
    write_lines(folder / "prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(6)])
    write_lines(folder / "held_out.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(20, 22)])
    write_lines(folder / "examples.jsonl", [{"prompt": f"w{i}", "completion": f" w{i + 1}"} for i in range(8)])
    config: dict[str, Any] = {
        "run_name": "run",
        "output_dir": str(folder / "runs"),
        "model": {"model_name_or_path": "model", "device": "cpu"},
        "lora": {"r": 2},
        "data": {"dataset_name": "prompts.jsonl"},
        "eval": {"dataset_name": "held_out.jsonl", "num_generations": 2, "temperature": 1.0, "eval_steps": 4},
        "rollout": {"num_generations": 4, "max_completion_length": 3},
        "rewards": {"reward_funcs": ["rewards.py:low"]},
        "algorithm": {"beta": 0.01},
        "train": {"max_steps": 6, "generation_batch_size": 16, "steps_per_generation": 2},
        "optim": {"learning_rate": 0.05, "lr_scheduler_type": "linear"},
        "checkpoint": {"save_steps": 4, "save_total_limit": 2},
        "warmup": {
            "max_steps": 1,
            "dataset_name": "examples.jsonl",
            "learning_rate": 0.001,
            "per_device_train_batch_size": 4,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


_TIMES_AND_PLACES = ("seconds", "tokens_per_second", "startup_seconds", "adapter")


def outcome(run: Path) -> dict[str, Any]:
    """Everything in a run folder that does not tell the time; two runs that are the same have the same."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    state = json.loads((newest / "state.json").read_text())
    state.pop("seconds")
    files = [*(run / "adapter").iterdir(), *(run / "rollouts").glob("*"), *newest.glob("*.safetensors")]
    files += [path for path in (run / "journal.jsonl", run / "data.json", run / "model.json") if path.exists()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "files": {str(p.relative_to(run)): p.read_bytes() for p in sorted(files)},
        "state": state,
        "checkpoints": sorted(p.name for p in (run / "checkpoints").iterdir()),
        "metrics": [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "summary": {k: v for k, v in summary.items() if k not in _TIMES_AND_PLACES},
    }


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not k.startswith(("step_time", "time/", "perf/"))}
