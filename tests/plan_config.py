"""The config that the tests of the plan start from."""

from __future__ import annotations

from typing import Any

from tandem.rl.config import Config


def config_of(**sections: dict[str, Any]) -> Config:
    """GRPO of a 4-bit Qwen3-8B through vLLM, with `sections` laid over it."""
    given: dict[str, Any] = {
        "model": {"model_name_or_path": "Qwen/Qwen3-8B", "load_in_4bit": True},
        "lora": {"r": 32},
        "data": {"dataset_name": "d.json", "max_prompt_length": 512},
        "rollout": {"engine": "vllm", "max_completion_length": 4096},
        "rewards": {"reward_funcs": ["length"]},
    }
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values
    return Config.model_validate(given)
