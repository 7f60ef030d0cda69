"""Recorded passes of a small model: what a replay gives for the packs after the one that was recorded.

A recording is stood in for by the work itself, done again on the same tensors; attention reads the layout from the
tensors of its plan alone, as the kernels of a GPU do.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_fused_layer import build, difference, oracle, run
from test_packed_attention import dense, dense_backward, segment_mask

from tandem.kernels.attention_blocked import Scoring
from tandem.kernels.attention_plan import Cross, Run, pieces_backward, pieces_forward
from tandem.kernels.pack_layout import PackLayout
from tandem.rl import fused_layer, layer_graphs, layer_run, pack_padding
from tandem.rl.fused_layer import FusedLayers, LayerPlan
from tandem.rl.layer_graphs import Work
from tandem.rl.lora import trainable
from tandem.rl.model import LanguageModel
from tandem.rl.packing import Pack, pack
from tandem.rl.samples import Sequence
from tandem.rl.step import layout_of

CPU = torch.device("cpu")


class Again:
    """A recorder whose recordings are the work itself; `records` counts them."""

    def __init__(self) -> None:
        self.records = self.held = 0

    def record(self, work: Work) -> Work:
        self.records += 1
        self.held += 100
        return work


class ByPlan:
    """Pieces by dense float64, cut as the plan's tensors say now."""

    def causal_forward(self, query, key, value, run: Run, scoring: Scoring):
        return dense(query, key, value, self._causal(run), scoring)

    def causal_backward(self, d_out, query, key, value, out, lse, run: Run, scoring: Scoring):
        return dense_backward(d_out, query, key, value, out, lse, self._causal(run), scoring)

    def cross_forward(self, query, key, value, cross: Cross, scoring: Scoring):
        return dense(query[cross.rows], key[cross.keys], value[cross.keys], self._cross(cross), scoring)

    def cross_backward(self, d_out, query, key, value, out, lse, cross: Cross, scoring: Scoring):
        at = cross.rows
        tensors = (d_out[at], query[at], key[cross.keys], value[cross.keys], out[at], lse[:, at])
        return dense_backward(*tensors, self._cross(cross), scoring)

    def _causal(self, run: Run) -> torch.Tensor:
        offsets = run.offsets.tolist()
        assert max(b - a for a, b in pairwise(offsets)) <= run.longest
        return segment_mask(offsets, offsets, causal=True, window=None)

    def _cross(self, cross: Cross) -> torch.Tensor:
        rows, keys = cross.row_offsets.tolist(), cross.key_offsets.tolist()
        assert max(b - a for a, b in pairwise(rows)) <= cross.longest_rows
        assert max(b - a for a, b in pairwise(keys)) <= cross.longest_keys
        return segment_mask(rows, keys, causal=False, window=None)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(query, key, value, layout, **scoring):
        layout.check(len(query))
        return pieces_forward(ByPlan(), query, key, value, layout, Scoring(**scoring))

    def backward(d_out, query, key, value, out, lse, layout, **scoring):
        return pieces_backward(ByPlan(), d_out, query, key, value, out, lse, layout, Scoring(**scoring))

    monkeypatch.setattr(layer_run, "attention_forward", forward)
    monkeypatch.setattr(layer_run, "attention_backward", backward)
    monkeypatch.setattr(FusedLayers, "_layers_to_keep", lambda self, h, layers, *_: layers)
    monkeypatch.setattr(pack_padding, "_UNIT", 16)
    monkeypatch.setattr(pack_padding, "_MOST_UNIT", 16)


@pytest.fixture
def lm() -> Iterator[LanguageModel]:
    full = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 3}
    lm = build("qwen3", **full)
    yield lm
    lm.fused = None


def one_pack(seed: int, groups: int = 3, completions: int = 2) -> Pack:
    """A pack whose lengths and tokens follow from the seed, of always as many segments."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(1, 60) for _ in range(draw.randint(least, most))]

    sequences = []
    for family in range(groups):
        prompt = ids(2, 5)
        for _ in range(completions):
            answer = ids(2, 3)  # the last token is only looked at
            sequences.append(Sequence(prompt, answer, [True] * len(answer), family=family))
    (made,) = pack(sequences, 400)
    return made


def recorded(lm: LanguageModel, **plan: Any) -> tuple[FusedLayers, Again]:
    recorder = Again()
    return FusedLayers(LayerPlan(recorded=True, **plan), recorder=recorder).attach(lm), recorder


@pytest.mark.parametrize("projections", ["auto", "save"])
def test_replays_equal_autograd_for_packs_of_other_lengths(lm: LanguageModel, projections: str) -> None:
    layers, recorder = recorded(lm, projections=projections)
    for seed in range(6):
        made = [one_pack(seed)]
        expected = oracle(lm, made)
        assert difference(run(lm, made, layers.hidden), expected) < 1e-10
        assert recorder.records == (0 if seed == 0 else 2), "as usual at first, then one recording of each pass"
    lengths = {one_pack(seed).num_tokens for seed in range(6)}
    assert len(lengths) > 3


def test_replays_round_adapters_as_the_plan_says(lm: LanguageModel) -> None:
    layers, recorder = recorded(lm, split_adapters=True)
    for seed in range(3):
        made = [one_pack(seed)]
        assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10
    assert recorder.records == 2
    assert all(linear._split for _, linear in layers._weights._linears.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_replays_with_biases_norms_behind_the_halves_and_stacked_projections(family: str) -> None:
    whole = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
    changes = {"llama": {}, "qwen2": whole | {"use_sliding_window": False}, "phi3": {"sliding_window": None}}
    lm = build(family, **changes.get(family, {"layer_types": ["full_attention"] * 3}))
    layers, recorder = recorded(lm)
    for seed in range(3):
        made = [one_pack(seed)]
        assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10
    assert recorder.records == 2


def test_packs_without_shared_prompts_too(lm: LanguageModel) -> None:
    layers, recorder = recorded(lm)
    for seed in range(4):
        made = [one_pack(seed, groups=2, completions=1)]
        assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10
    assert recorder.records == 2


@pytest.mark.parametrize("left_out", ["plan", "rope", "states"])
def test_a_replay_with_the_pack_of_before_would_be_seen(
    lm: LanguageModel, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = layer_graphs._Record.take

    def forgetful(self: Any, alike: Any, h: torch.Tensor, rope: Any) -> None:
        kept = {"plan": alike._replace(plan=self._plan), "rope": {}, "states": self._h}
        given = {"plan": alike, "rope": rope, "states": h} | {left_out: kept[left_out]}
        take(self, given["plan"], given["states"], given["rope"])

    layers, _ = recorded(lm)
    for seed in (0, 1):
        run(lm, [one_pack(seed)], layers.hidden)
    monkeypatch.setattr(layer_graphs._Record, "take", forgetful)
    made = [one_pack(2)]
    assert difference(run(lm, made, layers.hidden), oracle(lm, made)) > 1e-3


def test_an_update_of_the_adapters_is_seen(lm: LanguageModel) -> None:
    layers, recorder = recorded(lm)
    for seed in range(4):
        made = [one_pack(seed)]
        assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10
        with torch.no_grad():
            for _, parameter in trainable(lm):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    assert recorder.records == 2


@pytest.mark.parametrize("what", ["base", "adapter", "norm"])
def test_weights_that_moved_are_recorded_anew(lm: LanguageModel, what: str) -> None:
    layers, recorder = recorded(lm)
    for seed in range(2):
        run(lm, [one_pack(seed)], layers.hidden)
    name, part = next((n, p) for n, p in lm.model.named_parameters() if ("lora_A" in n) == (what == "adapter"))
    assert name
    if what == "base":
        part = next(p for n, p in lm.model.named_parameters() if n.endswith("base_layer.weight"))
    if what == "norm":
        part = next(p for n, p in lm.model.named_parameters() if n.endswith("input_layernorm.weight"))
    part.data = part.data + 0.1
    for seed in range(2, 5):
        made = [one_pack(seed)]
        assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10
    assert recorder.records == 4


def test_a_reference_pass_leaves_recordings_as_they_are(lm: LanguageModel) -> None:
    layers, recorder = recorded(lm)
    for seed in range(5):
        made = [one_pack(seed)]
        with lm.model.disable_adapter(), torch.no_grad():
            reference = through(layers, made[0])
            lm.fused = None
            with lm.packed():
                expected = lm.packed_hidden(*arguments(made[0]))
            lm.fused = layers
        assert torch.allclose(reference, expected, rtol=1e-10, atol=1e-10)
        assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10
    assert recorder.records == 2


def arguments(one: Pack) -> tuple[torch.Tensor, torch.Tensor, PackLayout]:
    return torch.tensor(one.input_ids), torch.tensor(one.position_ids), layout_of(one)


def through(layers: FusedLayers, one: Pack) -> torch.Tensor:
    return layers.hidden(*arguments(one))


def test_a_second_pass_before_the_first_ones_gradient_runs_as_usual(lm: LanguageModel) -> None:
    layers, recorder = recorded(lm)
    for seed in range(2):
        run(lm, [one_pack(seed)], layers.hidden)
    made = [one_pack(2), one_pack(3)]
    expected = oracle(lm, made)
    replays = counted(layers)
    outputs = [through(layers, one) for one in made]
    for number, out in enumerate(outputs):
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(number), dtype=out.dtype)
        (out * direction).sum().backward()
    grads = {n: p.grad.clone() for n, p in trainable(lm) if p.grad is not None}
    lm.model.zero_grad()
    assert difference(([out.detach() for out in outputs], grads), expected) < 1e-10
    assert (recorder.records, len(replays)) == (2, 1)
    # A pass whose gradient is never asked for does not hold the recording either.
    del out, outputs
    dropped = through(layers, made[0])
    del dropped
    run(lm, made[:1], layers.hidden)
    assert len(replays) == 3


def counted(layers: FusedLayers) -> list[int]:
    """Grows with every replay of a forward pass."""
    assert layers._graphs is not None
    (record,) = layers._graphs._records.values()
    replays: list[int] = []
    forward = record._forward
    record._forward = lambda: replays.append(1) or forward()
    return replays


def test_recordings_end_with_the_memory(lm: LanguageModel) -> None:
    layers, recorder = recorded(lm)
    for seed in range(2):
        run(lm, [one_pack(seed)], layers.hidden)
    layers.abandon()
    assert layers._graphs is None
    for seed in range(2, 5):
        made = [one_pack(seed)]
        assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10
    assert recorder.records == 2, "none since"


def test_the_recordings_of_packs_that_come_most_are_kept(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_graphs, "MOST_RECORDINGS", 2)
    layers, recorder = recorded(lm)

    def passes(groups: int, times: int) -> None:
        for seed in range(times):
            made = [one_pack(seed, groups)]
            assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10

    passes(1, 4)
    passes(2, 2)
    passes(3, 3)
    assert recorder.records == 4, "the third kind has not come more often by two"
    passes(3, 1)
    passes(1, 1)
    assert recorder.records == 6, "it took the place of the second kind"
    passes(2, 1)
    assert recorder.records == 6
    assert layers._graphs is not None
    assert len(layers._graphs._records) == 2


def test_packs_of_many_kinds_in_turn_are_not_recorded_over_and_over(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_graphs, "MOST_RECORDINGS", 2)
    monkeypatch.setattr(layer_graphs, "_COUNTED", 8)
    layers, recorder = recorded(lm)
    for seed in range(6):
        for groups in (1, 2, 3):
            run(lm, [one_pack(seed, groups)], layers.hidden)
    assert recorder.records == 4
    for seed in range(12):  # what came often once does not stay for good
        run(lm, [one_pack(seed, 3)], layers.hidden)
    assert recorder.records == 6


def test_a_recording_that_fails_is_told_once_and_done_without(lm: LanguageModel) -> None:
    class Broken(Again):
        def record(self, work: Work) -> Work:
            super().record(work)
            raise RuntimeError("operation not permitted when stream is capturing")

    recorder = Broken()
    layers = FusedLayers(LayerPlan(recorded=True), recorder=recorder).attach(lm)
    for seed in range(4):
        made = [one_pack(seed)]
        expected = oracle(lm, made)
        if seed == 1:
            with pytest.warns(RuntimeWarning, match="not permitted"):
                found = run(lm, made, layers.hidden)
        else:
            found = run(lm, made, layers.hidden)
        assert difference(found, expected) < 1e-10
    assert recorder.records == 1


def test_a_recording_that_fails_lets_go_of_those_before(lm: LanguageModel) -> None:
    class Later(Again):
        def record(self, work: Work) -> Work:
            if self.records == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().record(work)

    layers = FusedLayers(LayerPlan(recorded=True), recorder=Later()).attach(lm)
    for groups, seed in ((3, 0), (3, 1), (2, 2)):
        run(lm, [one_pack(seed, groups)], layers.hidden)
    assert layers._graphs is not None
    assert layers._graphs._records
    with pytest.warns(RuntimeWarning, match="not permitted"):
        run(lm, [one_pack(3, 2)], layers.hidden)
    assert not layers._graphs._records, "they would hold their memory for nothing"


def test_what_a_pass_under_way_reads_stays(lm: LanguageModel) -> None:
    layers, _ = recorded(lm)
    for seed in range(2):
        run(lm, [one_pack(seed)], layers.hidden)
    (_, linear), *_ = layers._weights._linears.values()
    read = weakref.ref(linear)
    del linear
    made = one_pack(2)
    expected = oracle(lm, [made])
    out = through(layers, made)
    for _, parameter in trainable(lm):
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        through(layers, made)
    assert read() is not None, "a CUDA graph would read memory that is somebody else's"
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)).sum().backward()
    grads = {n: p.grad.clone() for n, p in trainable(lm) if p.grad is not None}
    lm.model.zero_grad()
    assert difference(([out.detach()], grads), expected) < 1e-10
    del out
    assert read() is None


def test_memory_that_ends_in_a_recording_is_the_memory_guards(lm: LanguageModel) -> None:
    class Full(Again):
        def record(self, work: Work) -> Work:
            raise torch.OutOfMemoryError("tried to allocate 1.00 GiB")

    layers = FusedLayers(LayerPlan(recorded=True), recorder=Full()).attach(lm)
    run(lm, [one_pack(0)], layers.hidden)
    with pytest.raises(torch.OutOfMemoryError):
        run(lm, [one_pack(1)], layers.hidden)


def test_what_reads_the_layout_on_the_host_is_not_recorded(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = FusedLayers().attach(lm)
    assert layers._spec is not None
    layer, h = layers._spec.layer(0), torch.zeros(4, 24)
    assert not fused_layer._recordable(layer, h), "attention runs family by family on a CPU"
    monkeypatch.setattr(fused_layer, "takes", lambda query, scoring: scoring.softcap is None)
    assert fused_layer._recordable(layer, h)
    assert not fused_layer._recordable(replace(layer, window=8), h)
    assert not fused_layer._recordable(replace(layer, softcap=2.0), h)
    layer.parameters[0].requires_grad_(False)
    assert not fused_layer._recordable(layer, h)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the packs that layers have run on."""
    found: list[int] = []

    def noted(layer: Any, rope: Any, layout: PackLayout, **options: Any) -> layer_run.LayerRun:
        found.append(layout.length)
        return layer_run.LayerRun(layer, rope, layout, **options)

    monkeypatch.setattr(fused_layer, "LayerRun", noted)
    return found


def test_no_more_is_recorded_than_may_stay(
    lm: LanguageModel, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, recorder = recorded(lm)
    run(lm, [one_pack(0)], layers.hidden)
    padded, rows = lengths[0], one_pack(0).num_tokens
    assert padded > rows
    first = layers._spec.layer(0)  # type: ignore[union-attr]
    row = 3 * fused_layer._row_bytes(torch.zeros(1, 24, dtype=torch.float64), first, True)
    for most, found, records in ((padded * row - 1, rows, 0), (padded * row, padded, 2)):
        monkeypatch.setattr(fused_layer, "MOST_RECORDED_BYTES", most)
        lengths.clear()
        run(lm, [one_pack(0)], layers.hidden)
        assert set(lengths) == {found}
        assert recorder.records == records


def test_what_recordings_hold_is_not_free_to_packs_that_are_not_recorded(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def layers_to_keep(self: Any, h: Any, layers: int, first: Any, inputs: bool, bytes_held: int, _: int) -> int:
        held.append(bytes_held)
        return layers

    monkeypatch.setattr(FusedLayers, "_layers_to_keep", layers_to_keep)
    layers, _ = recorded(lm)
    for seed in range(3):
        run(lm, [one_pack(seed)], layers.hidden)
    monkeypatch.setattr(pack_padding, "MOST_ROWS", 1)
    run(lm, [one_pack(3)], layers.hidden)
    assert held == [0, 0, 0, 200]


def test_layers_that_offload_or_recompute_are_not_recorded(lm: LanguageModel, lengths: list[int]) -> None:
    for options in ({"plan": {"attention": "recompute"}}, {"plan": {"projections": "recompute"}}, {"offload": True}):
        recorder = Again()
        plan = LayerPlan(recorded=True, **options.get("plan", {}))  # type: ignore[arg-type]
        layers = FusedLayers(plan, offload=options.get("offload"), recorder=recorder).attach(lm)  # type: ignore[arg-type]
        for seed in range(3):
            made = [one_pack(seed)]
            lengths.clear()
            assert difference(run(lm, made, layers.hidden), oracle(lm, made)) < 1e-10
            assert set(lengths) == {made[0].num_tokens}, "nor padded"
        assert recorder.records == 0
