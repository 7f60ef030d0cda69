"""What a reward may do to what it is given, and how much it may print."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from tandem.rewards.base import load_reward
from tandem.rewards.compose import score
from tandem.rewards.own_copies import is_changed, own_copy
from tandem.rewards.print_limit import MAX_CHARACTERS, limited_prints
from tandem.rl.samples import Completion, Episode, Group, Prompt


def scored(rewards: list[Any], **columns: Any) -> Any:
    episode = Episode([{"role": "assistant", "content": "a"}], turns=1, turn_rewards=[0.5], environment=object())
    completions = [Completion([97], [-0.5], False, episode=episode) for _ in range(2)]
    groups = [Group(Prompt(0, [1], [{"role": "user", "content": "q"}], columns), completions)]
    return score(groups, [load_reward(f) for f in rewards], lambda ids: "a" * len(ids), timeout=20), groups


def test_no_change_of_any_argument_reaches_anybody() -> None:
    torch = pytest.importorskip("torch")

    def vandal(prompts, completions, completion_ids, grid, board, names, pair, table, episodes):
        completions[0][0]["content"] = completion_ids[0][0] = grid[0][:] = board[0][:] = 9
        names[0].add("x")
        pair[0][0].append(9)
        table[0]["a"].append(9)
        episodes[0].turn_rewards[0] = episodes[0].reward = 99.0
        episodes[0].messages.clear()
        prompts.clear()
        return [0.0, 0.0]

    seen: dict[str, Any] = {}

    def witness(prompts, completions, completion_ids, grid, board, names, pair, table, episodes):
        seen.update(locals())
        return [0.0, 0.0]

    given = {
        "grid": np.zeros(3),
        "board": torch.zeros(2),
        "names": {"n"},
        "pair": ([1], 2),
        "table": OrderedDict(a=[1]),
    }
    scores, groups = scored([vandal, witness], **given)
    assert seen["prompts"] == [[{"role": "user", "content": "q"}]] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}]] * 2
    assert seen["completion_ids"] == [[97], [97]]
    assert seen["grid"][0].tolist() == [0, 0, 0]
    assert seen["board"][0].tolist() == [0, 0]
    assert (seen["names"][0], seen["pair"][0], seen["table"][0]) == ({"n"}, ([1], 2), OrderedDict(a=[1]))
    assert type(seen["table"][0]) is OrderedDict
    completion = groups[0].completions[0]
    assert completion.ids == [97]
    assert completion.episode == seen["episodes"][0]
    assert completion.episode.turn_rewards == [0.5]
    assert completion.episode.environment is seen["episodes"][0].environment, "it is the one that played"
    (notice,) = scores.notices
    assert notice.startswith("reward 'vandal' changes its arguments 'pair', 'table', 'prompts', 'completions'")


def test_only_changes_are_noticed() -> None:
    nan = float("nan")
    for value in ([1, nan, "x"], {"a": [{"b": nan}], "c": (1, None)}, [np.zeros(2), object()], [[1.5] * 3] * 2):
        assert not is_changed(own_copy(value), value)
    for changed, original in (([1, 2], [1]), ([1, [2]], [1, [3]]), ({"a": 1}, {"a": 2}), ({}, {"a": 1}), ([1], (1,))):
        assert is_changed(changed, original)

    def fine(prompts, completions, answer):
        prompts = [p[-1]["content"] for p in prompts]
        return [float(p == a) for p, a in zip(prompts, answer, strict=True)]

    assert scored([fine], answer="q")[0].notices == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_flood_of_prints_is_cut(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    def flood(completions):
        print("start")
        for _ in range(3000):
            print("x" * 999)
            sys.stderr.write("y" * 1000)
        return [1.0] * len(completions)

    async def flood_later(completions):
        return flood(completions)

    flood_later.__name__ = "flood"
    before = sys.stdout, sys.stderr
    assert [row.reward for row in scored([flood if kind == "sync" else flood_later])[0].rows] == [1.0, 1.0]
    assert (sys.stdout, sys.stderr) == before
    print("after")
    out, err = capfd.readouterr()
    assert out.startswith("start\nxxx")
    assert out.endswith("after\n"), "the next one may speak again"
    notice = f"[reward 'flood' has printed {MAX_CHARACTERS:,} characters in one call: the rest is left out]"
    assert (out + err).count(notice) == 1
    assert len(out) + len(err) == MAX_CHARACTERS + len(f"\n{notice}\n") + len("after\n")


def test_what_is_within_the_limit_comes_as_it_was_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with limited_prints("it", 10):
        print("12345", end="", flush=True)
        print("6789", file=sys.stderr)
        assert sys.stdout.encoding
    assert capsys.readouterr() == ("12345", "6789\n")
    with limited_prints("it", 3):
        print("1234")
    assert capsys.readouterr().out == "123\n[it has printed 3 characters in one call: the rest is left out]\n"
