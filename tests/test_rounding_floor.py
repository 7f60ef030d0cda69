"""`benchmarks/rounding_floor.py` on a tiny model: the function stays, and what is compared is what it says."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_model import save_llama, save_words

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
rounding_floor = importlib.import_module("rounding_floor")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    folder = tmp_path_factory.mktemp("floor")
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(62))]
    save_words(folder, words, eos="<eos>", unk="<unk>")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    save_llama(folder, len(words), max_position_embeddings=512)
    return Namespace(model=str(folder), device="cpu", prompts=3, tokens=5, nf4=False, no_exact=False)


def test_reordering_leaves_the_function(arguments: Namespace) -> None:
    found = rounding_floor.measure(arguments)
    assert found["float64_difference"] < 1e-4
    reordered = found["log_probs"]["bfloat16, another order of sums"]
    assert reordered["tokens"] == 15
    assert 0 < reordered["mean"] < reordered["max"] < 0.5, "few of so small sums are rounded otherwise"
    assert found["greedy"]["another order of sums"]["prompts"] == 3


def test_a_part_left_out_of_the_order_is_found(arguments: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_floor, "rows", lambda weight, order: None)
    with pytest.raises(AssertionError, match="reordering has changed the function"):
        rounding_floor.measure(arguments)


def test_nf4_rounds_the_decoder_alone(arguments: Namespace) -> None:
    model, _ = rounding_floor.load(arguments)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rounding_floor.round_to_nf4(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith("proj.weight")}


def test_greedy_tokens_are_compared_up_to_the_first_that_differs() -> None:
    found = rounding_floor.equal([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]])
    assert found == {"prompts": 2, "equal": 0.5, "mean_tokens_shared": 2.0}
