"""Products that are too large for a small model's head, and a calculator that it may call."""

import ast
import operator
import random
import re

SEED = 0
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def worked(question: str, answer: str) -> list[dict]:
    """A conversation that shows how a call looks and what comes back."""
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": question}}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculate", "content": answer},
        {"role": "assistant", "content": answer},
    ]


EXAMPLES = [*worked("31 * 12", "372"), *worked("17 * 45", "765")]


class Calculator:
    """An environment in TRL's way: its public methods are tools, and the episode ends with a turn that calls none."""

    def reset(self, answer: str) -> None:
        self.answer = answer
        self.used = False

    def calculate(self, expression: str) -> str:
        """Works out an expression.

        Args:
            expression: numbers with +, - and *
        """
        self.used = True
        return str(value(ast.parse(expression, mode="eval").body))


def value(node: ast.expr) -> int:
    """The value of an expression's syntax tree. Raises ValueError for anything but whole numbers with +, - and *."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    raise ValueError(f"{ast.unparse(node)!r} is no number with +, - and *")


def products(split: str = "train", held_out: int = 16) -> list[dict]:
    """Rows with `prompt` (messages) and `answer`; no pair of numbers belongs to both splits."""
    pairs = [(a, b) for a in range(11, 100) for b in range(a, 100)]
    random.Random(SEED).shuffle(pairs)
    chosen = pairs[:held_out] if split == "test" else pairs[held_out : held_out + 400]
    return [{"prompt": [*EXAMPLES, {"role": "user", "content": f"{a} * {b}"}], "answer": str(a * b)} for a, b in chosen]


def right(completions: list, answer: list[str]) -> list[float]:
    """1 where the last message says the right number and no other, 0.2 for the right number among others."""
    scores = []
    for messages, gold in zip(completions, answer, strict=True):
        last = messages[-1]
        numbers = re.findall(r"\d+", last["content"]) if last["role"] == "assistant" else []
        scores.append(1.0 if set(numbers) == {gold} else 0.2 if gold in numbers else 0.0)
    return scores


def used(environments: list) -> list[float]:
    """1 where the calculator was called with something that it can read."""
    return [float(environment.used) for environment in environments]
