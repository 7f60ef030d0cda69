"""The journal of rollouts: what was generated is read back to the bit, and only what is whole is read back."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.rl import rollout_journal
from tandem.rl.config_file import parse_config
from tandem.rl.errors import UserError
from tandem.rl.journal import read_rollouts, write_rollouts
from tandem.rl.rollout_journal import Mark, RolloutJournal, journal_path, read_journal, source_of
from tandem.rl.samples import Completion, Episode, Prompt, Scored

SOURCE = "0123456789abcdef"
START = Mark()
# Every code point may come out of a tokenizer: halves of surrogate pairs, nulls, non-characters, line separators.
TEXT = st.text(st.characters(codec=None, categories=None), max_size=20) | st.sampled_from(
    ["\ud800", "\udfff\ud800", "\ufdd0", "\ufdd0d800", "\x00", "\u2028\n\r\x85", '"}\n{"sha256": "', "🙂"[0]]
)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)


def scored(i: int = 0, text: str = "w1 w2", log_probs: list[float] | None = None, **rewards: float | None) -> Scored:
    log_probs = [-0.1, -0.2] if log_probs is None else log_probs
    return Scored(
        prompt=Prompt(index=i, ids=[5, i], prompt=f"p{i}"),
        completion=Completion(ids=list(range(len(log_probs))), log_probs=log_probs, truncated=bool(i % 2)),
        group=i // 2,
        text=text,
        rewards=rewards or {"a": 1.0},
        reward=0.5,
    )


def journal(folder: Path, mark: Mark = START, said: list[str] | None = None, source: str = SOURCE) -> RolloutJournal:
    return RolloutJournal(folder, mark, source=source, note=(said if said is not None else []).append)


def filled(folder: Path, rollouts: int = 3, rows: int = 4) -> list[Mark]:
    """A journal with some rollouts; the places between them, the first one included."""
    book, marks = journal(folder), [Mark()]
    for n in range(rollouts):
        made = [scored(i, text=f"rollout {n} row {i}") for i in range(rows)]
        marks.append(book.append(made, {"x": n / 3}, position=2 * n, step=n))
    return marks


def bits(value: float | None) -> bytes | None:
    """NaN is not equal to itself; its sign and payload are no part of what is kept."""
    return None if value is None else b"nan" if math.isnan(value) else struct.pack("d", value)


def test_an_episode_is_read_back(tmp_path):
    episode = Episode([{"role": "tool", "content": "4"}], 2, 1, 0, [None, 0.5], 0.5, "turns", environment=object())
    played = replace(scored(), completion=Completion([1, 2], [-0.5, 0.0], False, [True, False], episode))
    journal(tmp_path).append([played], {}, position=0, step=0)
    ((back,),) = ([*rollout.rows] for rollout in read_journal(tmp_path))
    assert back.completion == replace(played.completion, episode=replace(episode, environment=None))


def test_what_rewards_logged_is_read_back_and_written_for_people(tmp_path):
    row = replace(scored(), extra={"found": "4", "share": 0.5, "nothing": None})
    journal(tmp_path).append([row], {}, position=0, step=0)
    ((back,),) = ([*rollout.rows] for rollout in read_journal(tmp_path))
    assert back.extra == row.extra
    ((record,), (bare,)) = (read_rollouts(write_rollouts(tmp_path, n, [r])) for n, r in enumerate((row, scored())))
    assert record["extra"] == row.extra
    assert "extra" not in bare


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(TEXT, TEXT, st.lists(NUMBERS, max_size=5), st.none() | NUMBERS, NUMBERS), min_size=1, max_size=4
    )
)
def test_any_rollout_is_read_back_to_the_bit(tmp_path, rows):
    journal_path(tmp_path).unlink(missing_ok=True)
    made = [
        replace(
            scored(i, text, log_probs, **{"a": value, name: 1.0}),
            reward=total,
            prompt=Prompt(i, [1, 2], [{"role": "user", "content": name}]),
        )
        for i, (text, name, log_probs, value, total) in enumerate(rows)
        if name != "a"
    ]
    if not made:
        return
    journal(tmp_path).append(made, {"m": 0.1 + 0.2}, position=3, step=4)
    (back,) = read_journal(tmp_path)
    assert (back.number, back.position, back.step, back.logged) == (0, 3, 4, {"m": 0.1 + 0.2})
    for a, b in zip(made, back.rows, strict=True):
        assert b.text == a.text
        assert (b.prompt.ids, b.prompt.prompt, b.prompt.index) == (a.prompt.ids, a.prompt.prompt, a.prompt.index)
        assert (b.completion.ids, b.completion.truncated, b.group) == (
            a.completion.ids,
            a.completion.truncated,
            a.group,
        )
        assert [bits(p) for p in b.completion.log_probs] == [bits(p) for p in a.completion.log_probs]
        assert {n: bits(v) for n, v in b.rewards.items()} == {n: bits(v) for n, v in a.rewards.items()}
        assert bits(b.reward) == bits(a.reward)


def test_ten_megabyte_completions(tmp_path):
    text = "".join(random.Random(0).choices('ab \n"\\é🙂\ud800', k=100_000)) * 100
    made = [scored(0, text), scored(1, "short")]
    journal(tmp_path).append(made, {}, position=0, step=0)
    (back,) = read_journal(tmp_path)
    assert back.rows[0].text == text
    assert back.rows[1].text == "short"


def test_datasets_reads_it(tmp_path):
    import datasets

    filled(tmp_path)
    table = datasets.load_dataset(
        "json", data_files=str(journal_path(tmp_path)), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == 12
    assert table[5]["completion"] == "rollout 1 row 1"
    assert table[5]["log_probs"] == [-0.1, -0.2]
    assert json.loads(table[5]["rewards"]) == {"a": 1.0}


def test_a_resumed_run_gets_what_it_had_not_learned_from(tmp_path):
    marks = filled(tmp_path)
    whole = journal_path(tmp_path).read_bytes()
    book = journal(tmp_path, marks[1])
    for n in (1, 2):
        taken = book.take(2 * n)
        assert taken is not None
        assert [row.text for row in taken.rows] == [f"rollout {n} row {i}" for i in range(4)]
        assert taken.logged == {"x": n / 3}
        assert book.mark == marks[n + 1]
    assert book.take(6) is None
    assert journal_path(tmp_path).read_bytes() == whole, "taking changes nothing"
    book.append([scored()], {}, position=6, step=3)
    assert [r.number for r in read_journal(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.injects(1)
def test_a_torn_end_anywhere(tmp_path):
    """Wherever a kill cuts the last rollout short, the ones before are given and it is not; then it is written anew."""
    marks = filled(tmp_path, rollouts=2, rows=2)
    whole = journal_path(tmp_path).read_bytes()
    for cut in (*range(marks[1].size, len(whole), 23), len(whole) - 1):
        journal_path(tmp_path).write_bytes(whole[:cut])
        said: list[str] = []
        book = journal(tmp_path, Mark(), said)
        assert book.take(0) is not None
        assert book.take(2) is None
        assert not said, "a torn end is what a kill leaves; no damage"
        book.append([scored(i, text=f"rollout 1 row {i}") for i in range(2)], {"x": 1 / 3}, position=2, step=1)
        assert journal_path(tmp_path).read_bytes() == whole


@pytest.mark.injects(300)
def test_no_flipped_bit_passes(tmp_path):
    marks = filled(tmp_path, rollouts=3, rows=2)
    whole = journal_path(tmp_path).read_bytes()
    draw = random.Random(1)
    places = draw.sample(range(marks[1].size, marks[2].size), 300)
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << draw.randrange(8)
        journal_path(tmp_path).write_bytes(broken)
        said: list[str] = []
        assert [r.number for r in read_journal(tmp_path, said.append)] == [0], place
        assert len(said) == 1


@pytest.mark.injects(4)
def test_lost_and_doubled_lines_are_noticed(tmp_path):
    marks = filled(tmp_path)
    lines = journal_path(tmp_path).read_bytes().splitlines(keepends=True)
    for changed in (lines[:5] + lines[6:], lines[:5] + [lines[4]] + lines[5:], lines[:4] + lines[5:]):
        journal_path(tmp_path).write_bytes(b"".join(changed))
        said: list[str] = []
        assert [r.number for r in read_journal(tmp_path, said.append)] == [0]
        assert "lacks lines" in said[0]
    # A whole rollout that is gone shows by the numbers of those that follow.
    journal_path(tmp_path).write_bytes(b"".join(lines[:4] + lines[8:]))
    said = []
    book = journal(tmp_path, marks[1], said)
    assert book.take(2) is None
    assert "rollout 2, not 1" in said[0]


def test_rollouts_of_another_config_are_not_given(tmp_path):
    filled(tmp_path)
    said: list[str] = []
    book = journal(tmp_path, Mark(), said, source="f" * 16)
    assert book.take(0) is None
    assert "another config" in said[0]
    assert journal_path(tmp_path).stat().st_size == 0


def test_the_source_is_what_rollouts_depend_on():
    base = {
        "model": {"model_name_or_path": "m"},
        "data": {"dataset_name": "d"},
        "rewards": {"reward_funcs": ["length"]},
    }
    own = source_of(parse_config(base))
    for same in ({"run_name": "b"}, {"output_dir": "c"}, {"checkpoint": {"save_steps": 1}}, {"log": {}}):
        assert source_of(parse_config({**base, **same})) == own
    for other in ({"seed": 1}, {"optim": {"learning_rate": 1.0}}, {"rollout": {"temperature": 0.5}}):
        assert source_of(parse_config({**base, **other})) != own


@pytest.mark.injects(1)
@pytest.mark.parametrize("lost", [1, 300, 1500])
def test_nothing_is_glued_to_a_line_that_is_torn_before_the_checkpoint_s_place(tmp_path, lost):
    """A disk that lost the end of the file, which the checkpoint already knew of."""
    marks = filled(tmp_path)
    os.truncate(journal_path(tmp_path), marks[3].size - lost)
    book = journal(tmp_path, marks[3])
    assert book.take(6) is None
    after = book.append([scored(text="after")], {}, position=6, step=3)
    assert journal_path(tmp_path).stat().st_size == after.size
    said: list[str] = []
    assert [r.number for r in read_journal(tmp_path, said.append)] == [0, 1, 3]
    assert not said
    again = journal(tmp_path, replace(marks[3], size=marks[2].size)).take(6)
    assert again is not None
    assert [row.text for row in again.rows] == ["after"]


@pytest.mark.injects(1)
def test_nothing_is_glued_to_what_an_append_that_was_given_up_has_left(tmp_path, monkeypatch):
    """A notice to end may come while a rollout is written."""
    book, whole = journal(tmp_path), rollout_journal.lines_of

    def given_up(rollout):
        yield next(whole(rollout))[:100]
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout_journal, "lines_of", given_up)
    with pytest.raises(KeyboardInterrupt):
        book.append([scored()], {}, position=0, step=0)
    monkeypatch.undo()
    book.append([scored(text="anew")], {}, position=0, step=0)
    ((back,),) = ([*rollout.rows] for rollout in read_journal(tmp_path))
    assert back.text == "anew"


@pytest.mark.injects(1)
def test_a_shorter_journal_than_the_checkpoint_knew(tmp_path):
    marks = filled(tmp_path)
    os.truncate(journal_path(tmp_path), marks[2].size)
    said: list[str] = []
    book = journal(tmp_path, marks[3], said)
    assert "has lost rollouts" in said[0]
    assert book.take(6) is None
    book.append([scored()], {}, position=6, step=3)
    assert [r.number for r in read_journal(tmp_path)] == [0, 1, 3]


def test_what_must_not_be_learned_from_is_forgotten(tmp_path):
    marks = filled(tmp_path)
    book = journal(tmp_path, marks[3])
    book.cut(marks[2])
    assert [r.number for r in read_journal(tmp_path)] == [0, 1]
    book.append([scored()], {}, position=4, step=2)
    assert [r.number for r in read_journal(tmp_path)] == [0, 1, 2]


@pytest.mark.injects(1)
def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    """A limit on the file's size, as the kernel enforces it, strikes in the middle of a rollout."""
    import resource
    import signal

    marks = filled(tmp_path, rollouts=1)
    before = journal_path(tmp_path).read_bytes()
    book = journal(tmp_path, marks[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20_000, limits[1]))
        with pytest.raises(UserError, match="cannot be written") as stopped:
            book.append([scored(i, text="x" * 9000) for i in range(8)], {}, position=2, step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert "rl-train resume" in stopped.value.fix
    assert journal_path(tmp_path).read_bytes() == before
    book.append([scored()], {}, position=2, step=1)
    assert [r.number for r in read_journal(tmp_path)] == [0, 1]


def test_a_run_without_a_journal(tmp_path):
    with pytest.raises(UserError, match=r"no journal\.jsonl"):
        list(read_journal(tmp_path))
