"""Advantages by turn: against loops and numbers worked out by hand, on tokens, in a step, and in a whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_environments import CHATML, END, SPECIAL, lm, tokenizer  # noqa: F401  fixtures
from tiny_model import move_adapter

from tandem.rl.advantages import STD_EPSILON
from tandem.rl.config import AlgorithmConfig, Config
from tandem.rl.config_file import parse_config
from tandem.rl.errors import UserError
from tandem.rl.experience import advantages_to, learned_from, policy_batch, with_advantages
from tandem.rl.journal import read_rollouts
from tandem.rl.metrics import Meter
from tandem.rl.model import with_sampling
from tandem.rl.packing import pack
from tandem.rl.samples import Completion, Episode, Prompt, Scored
from tandem.rl.step import policy_backward
from tandem.rl.turn_advantages import returns_to_go, turn_advantages, turn_numbers, turn_rewards


def config(size: int, name: str = "environment", weight: float = 1.0, **algorithm: Any) -> Config:
    level = {"advantage_level": "turn"} | algorithm
    return parse_config(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "environment": {"factory": "game.py:Game"},
            "rollout": {"num_generations": size},
            "rewards": {
                "reward_funcs": [
                    {"function": "environment", "name": name, "weight": weight},
                    {"function": "x.py:style"},
                ]
            },
            "train": {"generation_batch_size": size},
            "algorithm": level,
        }
    )


def played(
    rewards: list[float | None], total: float, *, group: int = 0, length: int = 2, **parts: float | None
) -> Scored:
    """An episode whose turns have `length` tokens each, with one of the environment between them."""
    ids, mask = [], []
    for turn in range(len(rewards)):
        ids += [10 + turn] * length + [9]
        mask += [True] * length + [False]
    ids, mask = ids[:-1] or [8], mask[:-1] or [False]
    episode = Episode(turns=len(rewards), turn_rewards=rewards)
    completion = Completion(ids, [-0.5 * m for m in mask], False, mask, episode)
    return Scored(Prompt(group, [1, 2], "p"), completion, group, "", parts or {"environment": total}, total)


def scaled(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return [(v - mean) / (deviation + STD_EPSILON) for v in values]


def test_two_turns_by_hand() -> None:
    """Turn rewards (1, 2), (0, 4), (3, 0) with γ = 1/2: returns (2, 2), (2, 4), (3, 0)."""
    rows = [played([1.0, 2.0], 3.0), played([0.0, 4.0], 4.0), played([3.0, 0.0], 3.0)]
    with_advantages(rows, config(3, turn_discount=0.5))
    first, second = scaled([2.0, 2.0, 3.0]), scaled([2.0, 4.0, 0.0])
    for row, expected in zip(rows, zip(first, second, strict=True), strict=True):
        assert row.turn_advantages == pytest.approx(expected, rel=1e-12)
        assert row.advantage == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert rows[0].turn_advantages[1] == 0.0
    batch = policy_batch(rows, mask_truncated=False)
    advantages_to(batch, rows)
    assert batch.token_advantages is not None
    for row, tokens in zip(rows, batch.token_advantages, strict=True):
        a, b = row.turn_advantages
        assert tokens.tolist() == [a, a, b, b]


def test_what_is_known_only_at_the_end_belongs_to_the_last_turn() -> None:
    completion = played([0.5, None, 1.0], 0.0).completion
    assert turn_rewards(completion, 7.0, 2.0) == [1.0, 0.0, 6.0], "2·1.0 and the 4.0 of other rewards"
    assert turn_rewards(completion, 7.0, None) == [0.0, 0.0, 7.0], "its reward is no part of the total"
    assert sum(turn_rewards(completion, 0.1, 0.3)) == pytest.approx(0.1)
    assert returns_to_go([1.0, 0.0, 6.0], 1.0) == [7.0, 6.0, 6.0]
    assert turn_rewards(Completion([1], [0.0], False), 3.0, None) == [3.0]
    assert turn_rewards(played([], 0.0).completion, 3.0, None) == [3.0], "it broke off before its first turn"
    # Under another name, with a weight, beside another reward; and where the environment gave nothing after all.
    rows = [
        played([1.0, 1.0], 2 * 2.0 + 0.25, game=2.0, style=0.25),
        played([1.0, 1.0], 2 * 2.0 + 0.75, game=2.0, style=0.75),
        played([1.0, 5.0], 0.5, game=None, style=0.5),
    ]
    with_advantages(rows, config(3, name="game", weight=2.0, scale_rewards="none"))
    first, second = np.array([4.25, 4.75, 0.5]), np.array([2.25, 2.75, 0.5])
    expected = np.stack([first - first.mean(), second - second.mean()], axis=1)
    np.testing.assert_allclose([row.turn_advantages for row in rows], expected, rtol=1e-12)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"advantage_estimator": "rloo"},
    {"advantage_estimator": "reinforce_plus_plus"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_single_turns_have_the_very_numbers_of_episodes(options: dict[str, Any], beta: float) -> None:
    rng = np.random.default_rng(3)

    def rows() -> list[Scored]:
        totals = rng.normal(size=20)
        totals[5:10] = 0.1 + 0.2
        made = [played([float(t)], float(t), group=i // 5, length=1 + i % 3) for i, t in enumerate(totals)]
        made[12].rewards["environment"] = None  # no reward: its total is made up from its group
        made[0] = played([], made[0].reward)
        for row in made[15:]:
            row.skipped = True
        return made

    state = rng.bit_generator.state
    by_turn, rng.bit_generator.state = rows(), state
    by_episode = rows()
    penalties = [beta * i for i in range(20)] if beta else None
    for drop in (False, True):
        turn = config(5, drop_uniform_groups=drop, **options)
        episode = config(5, drop_uniform_groups=drop, advantage_level="episode", **options)
        with_advantages(by_turn, turn, penalties)
        with_advantages(by_episode, episode, penalties)
        assert [row.advantage for row in by_turn] == [row.advantage for row in by_episode]
        assert learned_from(by_turn, turn) == learned_from(by_episode, episode)
    batch = policy_batch(by_turn, mask_truncated=False)
    advantages_to(batch, by_turn)
    assert batch.token_advantages is not None
    for row, tokens in zip(by_episode, batch.token_advantages, strict=True):
        assert tokens.tolist() == [row.advantage] * row.completion.num_sampled


@pytest.mark.parametrize("options", OPTIONS)
def test_turns_are_compared_with_the_same_turn_of_others(options: dict[str, Any]) -> None:
    """Episodes of different lengths, against a loop over groups and turns."""
    rng = np.random.default_rng(4)
    turns = [1, 3, 2, 4, 2, 2, 2, 2, 5, 1, 1, 5]
    returns = [rng.normal(size=n).tolist() for n in turns]
    for row in (4, 5, 6, 7):
        returns[row][1] = 0.7
    algorithm = AlgorithmConfig(**options)
    found = turn_advantages(returns, turns, 4, algorithm)
    everything = [value for row in returns for value in row]
    for start in (0, 4, 8):
        for turn in range(5):
            there = [row for row in range(start, start + 4) if turns[row] > turn]
            values = [returns[row][turn] for row in there]
            for row in there:
                own, mean = returns[row][turn], sum(values) / len(values)
                if options.get("advantage_estimator") == "reinforce_plus_plus":
                    expected = (own - np.mean(everything)) / (np.std(everything, ddof=1) + STD_EPSILON)
                elif len(values) == 1:
                    expected = 0.0
                elif options.get("advantage_estimator") == "rloo":
                    expected = own - (sum(values) - own) / (len(values) - 1)
                else:
                    divisor = {"group": np.std(values, ddof=1), "batch": np.std(everything, ddof=1)}
                    by = options.get("scale_rewards", "group")
                    expected = (own - mean) / (divisor[by] + STD_EPSILON if by in divisor else 1.0)
                assert found[row][turn] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if options.get("advantage_estimator") != "reinforce_plus_plus":
        assert [found[row][1] for row in (4, 5, 6, 7)] == [0.0] * 4, "no signal is exactly none"
    assert [len(row) for row in found] == turns


def test_an_episode_without_a_reward_teaches_nothing_at_any_turn() -> None:
    rows = [played([1.0, 0.0], 1.0), played([0.0, 3.0], 3.0), played([0.0, 2.0, 2.0], 2.0)]
    rows[2].rewards = {"environment": None}
    with_advantages(rows, config(3, turn_discount=0.9, scale_rewards="none"))
    assert rows[2].turn_advantages == pytest.approx([0.0] * 3, abs=1e-15)
    assert rows[0].turn_advantages == pytest.approx([1.0 - (1.0 + 2.7) / 2, -1.5])


def test_groups_that_differ_only_on_the_way_are_learned_from() -> None:
    rows = [played([1.0, 0.0], 1.0), played([0.0, 1.0], 1.0), played([1.0], 1.0, group=1), played([1.0], 1.0, group=1)]
    options = config(2, drop_uniform_groups=True)
    with_advantages(rows, options)
    assert learned_from(rows, options) == [0, 1]


def test_turns_are_told_apart_by_what_was_not_sampled() -> None:
    assert turn_numbers([False, True, True, False, True, False, False, True]) == [0, 0, 1, 2]
    assert turn_numbers([True, True]) == [0, 0]
    assert turn_numbers([False]) == []
    rows = [played([1.0, 2.0], 3.0), played([2.0, 1.0], 3.0)]
    rows[0].completion.truncated = True
    with_advantages(rows, config(2))
    batch = policy_batch(rows, mask_truncated=True)
    advantages_to(batch, rows)
    assert [len(a) for a in batch.token_advantages or []] == [0, 4]
    assert [len(a) for a in batch.subset([1]).token_advantages or []] == [4]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"environment": {}}, "completions are single turns"),
        ({"algorithm": {"advantage_level": "turn", "name": "online_dpo"}}, "compares whole completions"),
        (
            {"algorithm": {"advantage_level": "turn", "multi_objective_aggregation": "normalize_then_sum"}},
            "standardises rewards of whole episodes",
        ),
        ({"algorithm": {"turn_discount": 0.5}}, "matters for turns only"),
    ],
)
def test_what_does_not_fit_together_is_refused(sections: dict[str, Any], words: str) -> None:
    raw = {
        "model": {"model_name_or_path": "m"},
        "data": {"dataset_name": "d"},
        "environment": {"factory": "game.py:Game"},
        "rewards": {"reward_funcs": ["x.py:style"]},
        "algorithm": {"advantage_level": "turn"},
    }
    with pytest.raises(UserError, match=words):
        parse_config(raw | sections)


@pytest.mark.parametrize("share", [True, False])
def test_the_gradient_is_that_of_each_turn_s_own_advantage(lm: Any, share: bool) -> None:  # noqa: F811
    """Two turns with advantages of opposite signs: against −Σ A·ℓ / N by autograd over the plain forward pass."""
    move_adapter(lm, seed=1)
    rows = [played([1.0, 2.0], 3.0), played([0.0, 4.0], 4.0, length=3), played([3.0, 0.0], 3.0)]
    options = config(3, turn_discount=0.5, loss_type="reinforce", rollout_correction="none")
    with_advantages(rows, options)
    batch = policy_batch(rows, mask_truncated=False)
    advantages_to(batch, rows)
    head = with_sampling(lm.head, temperature=1.0, top_k=0, top_p=1.0, chunk_size=5)
    packs = pack(batch.sequences, 20, share_prefix=share)
    policy_backward(lm, packs, batch, options.algorithm, head, Meter(), max_completion_length=20)
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    ours = [p.grad.clone() for p in parameters]
    lm.model.zero_grad(set_to_none=True)
    count = sum(row.completion.num_sampled for row in rows)
    loss = torch.zeros(())
    for row in rows:
        prompt, completion = row.prompt.ids, row.completion
        log_probs = lm.model(torch.tensor([prompt + completion.ids])).logits[0].log_softmax(-1)
        turn = 0
        for j, (token, sampled) in enumerate(zip(completion.ids, completion.sampled, strict=True)):
            if sampled:
                loss = loss - row.turn_advantages[turn] * log_probs[len(prompt) + j - 1, token] / count
            else:
                turn += 1
    loss.backward()
    assert max(float(g.abs().max()) for g in ours) > 1e-4
    for own, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-6)
    lm.model.zero_grad(set_to_none=True)


GAME = """
class Game:
    def reset(self, secret):
        self.turns = 0
        return f"Guess {secret}."

    def step(self, message):
        self.turns += 1
        return "no", self.turns == 2, float(len(message["content"]))


def games(split="train"):
    return [{"secret": i} for i in range(4)]
"""


def test_a_run_learns_by_turns(lm: Any, tmp_path: Any) -> None:  # noqa: F811
    from tandem.rl.commands import replay, run
    from tandem.rl.console import Console

    (tmp_path / "game.py").write_text(GAME)
    sections = {
        "model": {"model_name_or_path": lm.causal_lm.name_or_path, "device": "cpu"},
        "output_dir": str(tmp_path / "runs"),
        "data": {"dataset_name": f"{tmp_path}/game.py:games"},
        "environment": {"factory": f"{tmp_path}/game.py:Game", "max_turn_tokens": 4},
        "rollout": {"num_generations": 4, "max_completion_length": 60},
        "train": {"max_steps": 2, "generation_batch_size": 8, "steps_per_generation": 2},
        "algorithm": {"advantage_level": "turn", "turn_discount": 0.5},
        "optim": {"learning_rate": 0.01},
    }
    options = parse_config(sections)
    assert run(options, dry_run=False, console=Console.silent())
    (file,) = (options.run_dir / "rollouts").glob("step_*.jsonl")
    records = read_rollouts(file)
    for start in (0, 4):
        group = records[start : start + 4]
        returns = [returns_to_go(r["turn_rewards"], 0.5) for r in group]
        for turn in range(2):
            own = [r["turn_advantages"][turn] for r in group]
            values = [g[turn] for g in returns]
            assert own == pytest.approx(scaled(values) if len(set(values)) > 1 else [0.0] * 4)
        assert [r["reward"] for r in group] == [sum(r["turn_rewards"]) for r in group]
    # The journal holds the rewards of turns: from it alone comes the same adapter.
    assert replay(options.run_dir, options, console=Console.silent())
    adapter = "adapter/adapter_model.safetensors"
    again = options.run_dir.with_name("run-replay")
    assert (again / adapter).read_bytes() == (options.run_dir / adapter).read_bytes()
