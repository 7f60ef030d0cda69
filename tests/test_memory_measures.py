"""What a guarded pass does with a sequence that cannot be cut: measures in order, and gradients as if nothing had been.

Memory ends where it is made to: in the so-manieth layer, forward or backward.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import move_adapter, save_llama, save_words

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.checkpoint import State
from tandem.rl.config import LoraConfig, ModelConfig, TrainConfig
from tandem.rl.fused_layer import FusedLayers
from tandem.rl.layer_run import LayerRun
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.memory_guard import MemoryGuard, OutOfMemory, is_out_of_memory
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, load_model, load_tokenizer, with_sampling
from tandem.rl.packing import pack
from tandem.rl.samples import Sequence
from tandem.rl.step import supervised_backward

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_words(path, WORDS, eos="<eos>", unk="<unk>")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    save_llama(path, len(WORDS), **sizes, max_position_embeddings=2048, initializer_range=0.3)
    return path


def opened(folder: Path, *, fused: bool, dropout: float = 0.0) -> LanguageModel:
    config = ModelConfig(model_name_or_path=str(folder), device="cpu")
    lm = load_model(config, load_tokenizer(config))
    attach_lora(lm, LoraConfig(r=2, lora_dropout=dropout), seed=0)
    move_adapter(lm, seed=1)
    if fused:
        FusedLayers().attach(lm)
    return lm


def sequences(*lengths: int) -> list[Sequence]:
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(2, len(WORDS), (length,), generator=torch.Generator().manual_seed(number)).tolist()
        made.append(Sequence(ids[:2], ids[2:], [True] * (length - 2)))
    return made


class Bench:
    """A guard over a model, and its gradients of some sequences."""

    def __init__(self, lm: LanguageModel, state: State | None = None, **train: Any) -> None:
        self.lm, self.state, self.said = lm, state or State(), []
        self.optimizer = torch.optim.SGD([p for _, p in trainable(lm)], lr=1.0)
        config = TrainConfig(**train)
        self.guard = MemoryGuard(
            lm, config, self.state, self.optimizer, warn=self.said.append, advice=lambda: "buy a card"
        )

    def gradients(self, rows: list[Sequence]) -> dict[str, torch.Tensor]:
        def attempt(size: int) -> None:
            head = with_sampling(HeadOptions(), temperature=1.0, top_k=0, top_p=1.0, chunk_size=self.guard.chunk_size)
            supervised_backward(self.lm, pack(rows, size), rows, head, Meter())

        self.guard.run(attempt, lambda size: pack(rows, size))
        found = {name: p.grad.clone() for name, p in trainable(self.lm) if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        assert found
        return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert float((ours[name] - grad).abs().max()) <= tolerance * float(grad.abs().max()), name


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Memory ends in a layer wherever `failing["when"](direction, number of the call)` says so."""
    control: dict[str, Any] = {"when": lambda *_: False, "calls": {"forward": 0, "backward": 0}}
    for name in ("forward", "backward"):
        real = getattr(LayerRun, name)

        def limited(self: LayerRun, *arguments: Any, _real: Any = real, _name: str = name, **options: Any) -> Any:
            control["calls"][_name] += 1
            result = _real(self, *arguments, **options)
            if control["when"](_name, control["calls"][_name]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            return result

        monkeypatch.setattr(LayerRun, name, limited)
    return control


def test_a_long_sequence_gets_every_measure_in_order_and_the_same_gradient(folder: Path, failing: Any) -> None:
    plain = Bench(opened(folder, fused=True)).gradients(sequences(700))
    bench = Bench(opened(folder, fused=True))
    failing["when"] = lambda name, _: name == "backward" and bench.lm.fused.plan.groups != 2
    found = bench.gradients(sequences(700))
    changes = [text.rpartition("with ")[2] for text in bench.said]
    assert changes == [
        "train.offload_activations=true",
        "train.attention_memory=recompute",
        "train.mlp_tile_rows=349",
        "train.mlp_tile_rows=256",
        "train.kv_head_groups=2",
    ]
    assert bench.state.halved == 0
    # Sums over tiles and heads are taken in another order.
    same(found, plain, 1e-4)
    # A resumed run starts with all of it; the same bytes from there.
    failing["when"] = lambda name, _: name == "backward" and again.lm.fused.plan.groups != 2
    again = Bench(opened(folder, fused=True), bench.state)
    same(again.gradients(sequences(700)), found)
    assert again.said == []


def test_the_end_of_all_measures_says_what_to_change(folder: Path, failing: Any) -> None:
    bench = Bench(opened(folder, fused=True))
    failing["when"] = lambda *_: True
    with pytest.raises(OutOfMemory, match=r"1.00 GiB asked for[\s\S]*single sequence[\s\S]*buy a card"):
        bench.gradients(sequences(700))
    assert bench.state.reduced["logprob_chunk_size"] == 128
    assert all(p.grad is None for _, p in trainable(bench.lm))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("name", "call"), [("forward", 1), ("forward", 5), ("backward", 1), ("backward", 6)])
def test_memory_that_ends_in_any_layer_leaves_nothing_behind(folder, failing, name, call, offload) -> None:
    """Three layers and two packs: the sixth backward pass of a layer comes when all others have left their sums."""
    rows = sequences(30, 40, 20, 50)
    small = Bench(opened(folder, fused=True), max_tokens=44)
    small.lm.fused.offload = offload
    expected = small.gradients(rows)
    bench = Bench(opened(folder, fused=True), max_tokens=99)
    bench.lm.fused.offload = offload
    failing["calls"].update(forward=0, backward=0)
    failing["when"] = lambda found, number: (found, number) == (name, call)
    same(bench.gradients(rows), expected)
    assert bench.state.reduced == {"max_tokens": 44}
    if offload:
        gc.collect()
        assert bench.lm.fused.host.pool.free == bench.lm.fused.host.pool.allocated


def test_layers_of_the_model_s_own_are_recomputed_and_moved_out(folder: Path) -> None:
    plain = Bench(opened(folder, fused=False)).gradients(sequences(300))
    lm = opened(folder, fused=False)
    bench, handles = Bench(lm), []

    def fail(*_: Any) -> None:
        if lm.checkpoints is None or lm.checkpoints.offload is not True or bench.guard.chunk_size > 149:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    handles.append(lm.backbone.layers[1].register_full_backward_hook(fail))
    same(bench.gradients(sequences(300)), plain, 1e-5)
    assert [text.rpartition("with ")[2] for text in bench.said] == [
        "train.gradient_checkpointing=true",
        "train.offload_activations=true",
        "train.logprob_chunk_size=149",
    ]


def test_what_counts_as_memory_that_has_ended() -> None:
    with pytest.raises(RuntimeError) as of_the_host:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(of_the_host.value)
    wrapped = ValueError("the loss failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_another_error_is_not_held_back(folder: Path) -> None:
    bench = Bench(opened(folder, fused=True))

    def attempt(_: int) -> None:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        bench.guard.run(attempt, lambda size: pack(sequences(8), size))
    assert bench.said == []
