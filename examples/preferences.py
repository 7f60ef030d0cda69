"""Preference pairs made from sums: the right answer is preferred to a wrong one that is as well formed."""

import random

from arithmetic import sums


def pairs(split: str = "train") -> list[dict]:
    """Rows with `prompt`, `chosen` and `rejected` as messages; the held-out sums are those of `arithmetic.sums`."""
    rng = random.Random(split)
    rows = []
    for row in sums(split):
        question, right = row["prompt"][-1]["content"], int(row["answer"])
        wrong = rng.choice([n for n in range(max(right - 4, 1), right + 5) if n != right])
        rows.append({"prompt": row["prompt"], "chosen": answer(question, right), "rejected": answer(question, wrong)})
    return rows


def answer(question: str, number: int) -> list[dict]:
    return [{"role": "assistant", "content": f"{question} = \\boxed{{{number}}}"}]


def labelled(split: str = "train") -> list[dict]:
    """The same as single answers with a label, for KTO."""
    rows = []
    for row in pairs(split):
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        rows.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    return rows
