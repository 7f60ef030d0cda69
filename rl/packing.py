"""Packing: sequences of different lengths share one row without padding, and a group's prompt stands in it once.

A pack is a memory limit, never a change of the loss: per-token weights are known before packing, a sequence is never
split, and attention keeps families apart (see `tandem.kernels.packed_attention`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from tandem.rl.samples import Sequence


@dataclass(frozen=True)
class Segment:
    """Tokens `[start, end)` of a pack. `parent` is the index of the segment that holds its prompt, -1 for none."""

    start: int
    end: int
    parent: int = -1


@dataclass
class Pack:
    """One row for the model.

    Attributes:
        input_ids, position_ids: `[T]`. Positions restart at 0 for a root segment and go on from the parent's end for
            a child.
        segments: in the order of the row.
        rows: `[N]` the row of the token that predicts each scored token. targets: `[N]` the scored tokens.
        sequences: indices into the batch, in the order in which their scored tokens stand in `rows`.
        counts: scored tokens of each of `sequences`, so `sum(counts) == N`.
    """

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def add_segment(self, ids: list[int], *, parent: int = -1) -> Segment:
        start = self.num_tokens
        first = 0 if parent < 0 else self.segments[parent].end - self.segments[parent].start
        self.input_ids += ids
        self.position_ids += range(first, first + len(ids))
        self.segments.append(Segment(start, start + len(ids), parent))
        return self.segments[-1]

    def add_scored(self, index: int, sequence: Sequence, rows: list[int]) -> None:
        """`rows[j]` is the row that predicts `completion_ids[j]`; only masked-in tokens are kept."""
        kept = [j for j, scored in enumerate(sequence.mask) if scored]
        self.rows += [rows[j] for j in kept]
        self.targets += [sequence.completion_ids[j] for j in kept]
        self.sequences.append(index)
        self.counts.append(len(kept))


def default_max_tokens(device: str) -> int:
    """Tokens of a pack where the config does not say."""
    return 16384 if device == "cuda" else 4096


def pack(sequences: list[Sequence], max_tokens: int, *, share_prefix: bool = True) -> list[Pack]:
    """Put sequences into as few packs as first-fit-decreasing finds, each of at most `max_tokens` tokens.

    Sequences of one family share their prompt where they meet in a pack; sequences of one unit always meet. A
    sequence (or unit) longer than `max_tokens` gets a pack of its own. Sequences without a scored token carry neither
    loss nor gradient and are left out. The result depends only on the arguments.
    """
    if not share_prefix:
        sequences = [replace(s, family=-1) for s in sequences]
    blocks = [b for family in _families(sequences) for b in _split(sequences, family, max_tokens)]
    blocks.sort(key=lambda block: -_cost(sequences, block))
    bins: list[tuple[int, list[list[int]]]] = []
    for block in blocks:
        cost = _cost(sequences, block)
        for i, (used, members) in enumerate(bins):
            if used + cost <= max_tokens:
                bins[i] = (used + cost, [*members, block])
                break
        else:
            bins.append((cost, [block]))
    packs = []
    for _, members in bins:
        one = Pack()
        for block in sorted(members):
            _lay(one, sequences, block)
        packs.append(one)
    return sorted(packs, key=lambda p: p.sequences)


def _families(sequences: list[Sequence]) -> list[list[list[int]]]:
    """Families as lists of units, a unit being the list of sequences that must stay together."""
    units: dict[object, list[int]] = defaultdict(list)
    for i, sequence in enumerate(sequences):
        if sequence.num_scored:
            units[("alone", i) if sequence.unit < 0 else sequence.unit].append(i)
    families: dict[object, list[list[int]]] = defaultdict(list)
    for unit in units.values():
        family = sequences[unit[0]].family
        families[("alone", unit[0]) if family < 0 else family].append(unit)
    return list(families.values())


def _split(sequences: list[Sequence], family: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Cut a family that does not fit into blocks that do, each paying for the prompt again."""
    blocks: list[list[int]] = []
    # First fit by decreasing size: were two blocks able to share a pack, the second would be in the first already,
    # so a pack never holds one prompt twice.
    for unit in sorted(family, key=lambda unit: -_cost(sequences, unit)):
        for block in blocks:
            if _cost(sequences, block + unit) <= max_tokens:
                block += unit
                break
        else:
            blocks.append(list(unit))
    return [sorted(block) for block in blocks]


def _shares(sequences: list[Sequence], block: list[int]) -> bool:
    first = sequences[block[0]]
    return len(block) > 1 and first.family >= 0 and all(sequences[i].family == first.family for i in block)


def _cost(sequences: list[Sequence], block: list[int]) -> int:
    lengths = [len(_inputs(sequences[i])) for i in block]
    prompt = len(sequences[block[0]].prompt_ids)
    return sum(lengths) + (prompt if _shares(sequences, block) else sum(len(sequences[i].prompt_ids) for i in block))


def _inputs(sequence: Sequence) -> list[int]:
    """The completion tokens that predict something scored: the last scored token and all behind it predict nothing."""
    last = max(j for j, scored in enumerate(sequence.mask) if scored)
    return sequence.completion_ids[:last]


def _lay(one: Pack, sequences: list[Sequence], block: list[int]) -> None:
    if not _shares(sequences, block):
        for i in block:
            sequence = sequences[i]
            segment = one.add_segment(sequence.prompt_ids + _inputs(sequence))
            first = segment.start + len(sequence.prompt_ids) - 1
            one.add_scored(i, sequence, list(range(first, first + len(sequence.completion_ids))))
        return
    root = one.add_segment(sequences[block[0]].prompt_ids)
    parent = len(one.segments) - 1
    for i in block:
        sequence = sequences[i]
        assert sequence.prompt_ids == sequences[block[0]].prompt_ids, "sequences of one family must have equal prompts"
        start = one.num_tokens
        if inputs := _inputs(sequence):
            one.add_segment(inputs, parent=parent)
        # The last prompt token predicts the first completion token of every child.
        rows = [root.end - 1, *range(start, start + len(sequence.completion_ids) - 1)]
        one.add_scored(i, sequence, rows)
