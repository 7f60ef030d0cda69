"""What the engines of a benchmark are asked."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

PROMPT = 64


def prompts(count: int, *, seed: int) -> list[Any]:
    from tandem.rl.samples import Prompt

    draw = random.Random(seed)
    return [Prompt(i, [draw.randrange(10, 30_000) for _ in range(PROMPT)], "") for i in range(count)]


def questions(model: Path, count: int, *, seed: int, tokenizer: Any = None) -> list[Any]:
    """Chat prompts where there is a tokenizer (the checkpoint's, unless it is given), random tokens elsewhere."""
    from transformers import AutoTokenizer

    from tandem.rl.samples import Prompt

    if tokenizer is None:
        if not (model / "tokenizer.json").is_file():
            return prompts(count, seed=seed)
        tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(seed)
    things = [
        "a rainbow",
        "the tide",
        "a bridge",
        "bread",
        "an echo",
        "the moon",
        "a clock",
        "a river",
        "glass",
        "salt",
    ]
    tasks = ["Explain {} to a child", "Write a short story about {}", "Give three facts about {}", "Where is {} found"]
    found = []
    for number in range(count):
        text = draw.choice(tasks).format(draw.choice(things)) + f", in {draw.randrange(20, 90)} words."
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        found.append(Prompt(number, list(ids), text))
    return found
