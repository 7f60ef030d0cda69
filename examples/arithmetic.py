"""Sums of two small numbers, split so that no held-out pair is trained on in either order."""

import random

SEED = 0


def sums(split: str = "train", largest: int = 9, held_out: float = 0.25) -> list[dict]:
    """Rows with `prompt` (messages) and `answer`. An unordered pair of numbers belongs to one split as a whole."""
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1)]
    random.Random(SEED).shuffle(pairs)
    cut = round(len(pairs) * held_out)
    chosen = pairs[:cut] if split == "test" else pairs[cut:]
    ordered = sorted({p for a, b in chosen for p in ((a, b), (b, a))})
    return [{"prompt": [{"role": "user", "content": question(a, b)}], "answer": str(a + b)} for a, b in ordered]


def question(a: int, b: int) -> str:
    return f"What is {a} + {b}? Put the answer in \\boxed{{}}."
