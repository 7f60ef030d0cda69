"""One-line Python functions described in words, with hidden tests: what `code_reward.yaml` trains on."""

import random

SEED = 0
INPUTS = (-4, -1, 0, 3, 7, 12)

# One worked example shows the format. Its task is in neither split.
EXAMPLE = [
    {"role": "user", "content": "Write f(x): add 100 to x."},
    {"role": "assistant", "content": "```python\ndef f(x):\n    return x + 100\n```"},
]

FIRST = {
    "multiply x by {n}": lambda x, n: x * n,
    "subtract {n} from x": lambda x, n: x - n,
    "subtract x from {n}": lambda x, n: n - x,
    "square x": lambda x, n: x * x,
    "take the remainder of x divided by {n}": lambda x, n: x % n,
}
THEN = {
    "then add {n}": lambda x, n: x + n,
    "then multiply by {n}": lambda x, n: x * n,
    "then subtract {n}": lambda x, n: x - n,
}


def functions(split: str = "train", held_out: int = 24) -> list[dict]:
    """Rows with `prompt` (messages) and `tests` (a function's name with cases); no task is in both splits."""
    draw = random.Random(SEED)
    tasks = sorted(
        {(first, draw.randint(2, 9), then, draw.randint(2, 9)) for first in FIRST for then in THEN for _ in range(8)}
    )
    draw.shuffle(tasks)
    chosen = tasks[:held_out] if split == "test" else tasks[held_out:]
    return [_row(*task) for task in chosen]


def _row(first: str, n: int, then: str, m: int) -> dict:
    words = f"{first.format(n=n)}, {then.format(n=m)}"
    cases = [[[x], THEN[then](FIRST[first](x, n), m)] for x in INPUTS]
    return {
        "prompt": [*EXAMPLE, {"role": "user", "content": f"Write f(x): {words}."}],
        "tests": {"function": "f", "cases": cases},
    }
