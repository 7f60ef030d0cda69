"""Long prompts with one right answer: a ledger of many accounts, of which one is asked for."""

import random

_SEEDS = {"train": 1, "test": 2}


def balances(split: str = "train", rows: int = 512, entries: int = 1200, accounts: int = 60) -> list[dict]:
    """Rows with `prompt` (messages) and `answer`, the sum of one account's entries. An entry takes about 17 tokens."""
    draw = random.Random(_SEEDS[split])
    return [_row(draw, entries, accounts) for _ in range(rows)]


def _row(draw: random.Random, entries: int, accounts: int) -> dict:
    names = [f"A{number:03d}" for number in draw.sample(range(1000), accounts)]
    booked = [(draw.choice(names), draw.randint(-99, 99)) for _ in range(entries)]
    asked = draw.choice(names)
    lines = [f"entry {number}: account {name}, amount {amount}" for number, (name, amount) in enumerate(booked, 1)]
    question = f"What is the sum of all amounts of account {asked}? Give the number inside \\boxed{{}}."
    return {
        "prompt": [{"role": "user", "content": "\n".join([*lines, "", question])}],
        "answer": str(sum(amount for name, amount in booked if name == asked)),
    }
