"""A guessing game of several turns: the environment answers every guess with higher, lower or right."""

import re

LARGEST = 7

# One worked game shows how to talk, not how to play well.
EXAMPLE = [
    {"role": "user", "content": f"Guess my number, 1 to {LARGEST}."},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "higher"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "right"},
    {"role": "assistant", "content": "Good."},
]


class GuessingGame:
    """One secret number. Every guess costs a little, so that halving the range pays."""

    def reset(self, secret: int) -> None:
        self.secret = secret
        self.guesses = 0

    def step(self, message: dict) -> tuple[str, bool, float]:
        """The answer to a guess, whether the game is over, and the guess's reward."""
        self.guesses += 1
        found = re.search(r"\d+", message["content"])
        guess = int(found[0]) if found else 0
        if guess == self.secret:
            return "right", True, 1.0
        if not 1 <= guess <= LARGEST:
            return f"1 to {LARGEST}, please", False, -0.3
        return "higher" if guess < self.secret else "lower", False, -0.1


def games(split: str = "train") -> list[dict]:
    """Every secret number; a policy sees none of them, so training and evaluation may share them."""
    return [
        {"prompt": [*EXAMPLE, {"role": "user", "content": f"Guess my number, 1 to {LARGEST}."}], "secret": secret}
        for secret in range(1, LARGEST + 1)
    ]


def found(episodes: list) -> list[float]:
    """1 where the number was found; the share of games won, without the price of guesses."""
    return [float(episode.ending == "done") for episode in episodes]
