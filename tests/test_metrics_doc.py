"""Every number that a run writes has a row in docs/metrics.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny_run import write_lines, write_place

from tandem.rl import commands
from tandem.rl.config_file import load_config
from tandem.rl.console import Console

ROOT = Path(__file__).parents[1]
PREFERENCES = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2}"} for i in range(8)]


def documented() -> re.Pattern[str]:
    """The names in the first column, in which a word in capitals stands for any word."""
    names = []
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    words = [re.sub(r"\b[A-Z]+\b", "[^/]+", re.escape(name)) for name in names if name != "eval/NAME"]
    return re.compile(rf"(eval/)?({'|'.join(words)})")


@pytest.mark.parametrize("algorithm", ["grpo", "online_dpo", "dpo", "sft"])
def test_every_metric_of_a_run_is_described(tmp_path: Path, algorithm: str) -> None:
    path = write_place(tmp_path)
    config = yaml.safe_load(path.read_text(encoding="utf-8")) | {"algorithm": {"name": algorithm}}
    if algorithm == "grpo":
        config["algorithm"] = {"beta": 0.01}
        config["rollout"] |= {"dynamic_sampling": True}
        config["data"]["curriculum"] = {"enabled": True}
        config["rewards"]["watch_funcs"] = ["repetition_penalty"]
    else:
        del config["warmup"]
    if algorithm in ("dpo", "sft"):
        for key in ("rollout", "rewards", "eval"):
            del config[key]
        config["train"] = {"per_device_train_batch_size": 4}
        write_lines(tmp_path / "pairs.jsonl", PREFERENCES)
        config["data"] = {"dataset_name": "pairs.jsonl" if algorithm == "dpo" else "examples.jsonl"}
        config["eval"] = dict(config["data"])
    path.write_text(yaml.safe_dump(config))
    assert commands.run(load_config(path, ["train.max_steps=2"]), dry_run=False, console=Console())
    lines = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    keys = {key for record in map(json.loads, lines) if "event" not in record for key in record} - {"step"}
    assert len(keys) > 8
    known = documented()
    # `low_share` is what the reward itself hands to `log_metric`.
    assert sorted(key for key in keys if not known.fullmatch(key) and not key.endswith("low_share")) == []
