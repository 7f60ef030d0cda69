"""Sums of two small numbers, split so that no held-out pair is trained on in either order."""

import random

SEED = 0

# One worked example shows the format. Its sum appears in neither split.
EXAMPLE = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "2 + 2 = \\boxed{4}"}]


def sums(split: str = "train", largest: int = 9, held_out: float = 0.25) -> list[dict]:
    """Rows with `prompt` (messages) and `answer`. An unordered pair of numbers belongs to one split as a whole."""
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1) if (a, b) != (2, 2)]
    random.Random(SEED).shuffle(pairs)
    cut = round(len(pairs) * held_out)
    chosen = pairs[:cut] if split == "test" else pairs[cut:]
    ordered = sorted({p for a, b in chosen for p in ((a, b), (b, a))})
    return [{"prompt": [*EXAMPLE, {"role": "user", "content": f"{a} + {b}"}], "answer": str(a + b)} for a, b in ordered]


def worked_sums(split: str = "train") -> list[dict]:
    """The same rows as `messages` with the right answer, for supervised fine-tuning."""
    rows = []
    for row in sums(split):
        question = row["prompt"][-1]["content"]
        answer = {"role": "assistant", "content": f"{question} = \\boxed{{{row['answer']}}}"}
        rows.append({"messages": [*row["prompt"], answer]})
    return rows
