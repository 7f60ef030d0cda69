"""Grade-school word problems (openai/gsm8k) as prompts with the number that is asked for."""

INSTRUCTION = "Think step by step, then give the final number inside \\boxed{}."


def problems(split: str = "train") -> list[dict]:
    """Rows with `prompt` (messages) and `answer`. The data set is fetched from the hub once."""
    from datasets import load_dataset

    return [row(one) for one in load_dataset("openai/gsm8k", "main", split=split)]


def row(problem: dict) -> dict:
    """A worked answer ends in `#### 1,234`."""
    answer = problem["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"prompt": [{"role": "user", "content": f"{problem['question']}\n\n{INSTRUCTION}"}], "answer": answer}
