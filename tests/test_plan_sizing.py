"""Sizes chosen from the plan: they fit, they are no smaller than they must be, and what the config sets stays."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_config import config_of
from transformers import AutoConfig

from tandem.rl import open_model
from tandem.rl.config import Config
from tandem.rl.config_file import load_config
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.packing import pack
from tandem.rl.plan import MAX_TOKENS, Longest, changed, ledger
from tandem.rl.plan_command import as_dict, show
from tandem.rl.plan_devices import CONTEXT, GIB, Device, find_device, gpu_here
from tandem.rl.plan_models import MODELS
from tandem.rl.plan_shape import ModelShape, read_shape, shape_of
from tandem.rl.plan_sizing import USED_SHARE, Sizing, choose_sizes
from tandem.rl.plan_time import Work
from tandem.rl.samples import Prompt, Sequence
from tandem.rl.training_data import TrainingData
from tandem.rollout.vllm_plan import VllmOptions, kv_cache_bytes

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted([*(ROOT / "examples").glob("*_24gb.yaml"), *(ROOT / "examples").glob("*_80gb.yaml")])
# Weights in millions, from the models' cards and the sizes of their published files.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596, "Qwen/Qwen3-1.7B": 1721, "Qwen/Qwen3-4B": 4022, "Qwen/Qwen3-4B-Instruct-2507": 4022,
    "Qwen/Qwen3-8B": 8191, "Qwen/Qwen3-14B": 14768, "Qwen/Qwen3-32B": 32762, "meta-llama/Llama-3.1-8B": 8030,
    "meta-llama/Llama-3.2-3B": 3213, "meta-llama/Llama-3.2-1B": 1236,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return shape_of(AutoConfig.for_model(**MODELS["Qwen/Qwen3-8B"]))


def sized(shape: ModelShape, card: str, *, host: float = 64, **sections: dict[str, Any]) -> Sizing:
    return choose_sizes(shape, config_of(**sections), find_device(card, host_gib=host))


# --- models that are known --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_as_many_weights_as_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_a, **_k: pytest.fail("a hub was asked"))
    shape = read_shape(config_of(model={"model_name_or_path": name}).model)
    assert round(shape.weights / 1e6) == PUBLISHED[name]


def test_a_revision_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    known = AutoConfig.for_model(**MODELS["Qwen/Qwen3-0.6B"])
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, revision, **_: asked.append(revision) or known)
    read_shape(config_of(model={"model_name_or_path": "Qwen/Qwen3-8B", "revision": "abc"}).model)
    assert asked == ["abc"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_for_cards_fit_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_a, **_k: pytest.fail("a hub was asked"))
    config = load_config(path)
    assert config.run_name == path.stem
    cards = ["3090", "4090"] if "24gb" in path.stem else ["a100", "h100"]
    for card in cards:
        sizing = choose_sizes(read_shape(config.model), config, find_device(card, host_gib=64))
        assert sizing.plan.fits(), card
        assert sizing.chosen.keys() == {
            "train.max_tokens", "train.offload_activations", "train.attention_memory", "train.mlp_tile_rows",
            "rollout.max_in_flight", "rollout.kv_cache_gib",
        }  # fmt: skip


def test_there_are_examples_for_both_cards() -> None:
    models = {path.stem.rpartition("_")[0] for path in EXAMPLES}
    assert models == {"qwen3_8b", "llama31_8b", "qwen3_4b_long", "qwen3_14b"}
    assert len(EXAMPLES) == 2 * len(models)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("card", ["14", "16", "24", "48", "80"])
def test_what_is_chosen_fits_with_room_to_spare(qwen: ModelShape, card: str, engine: str) -> None:
    sizing = sized(qwen, card, rollout={"engine": engine})
    plan, limit = sizing.plan, USED_SHARE * find_device(card).memory
    assert plan.fits()
    assert plan.training().bytes <= limit
    rollout = plan.rollout()
    assert rollout is not None
    assert rollout.bytes <= limit + 0.02 * GIB


def test_what_the_config_sets_stays(qwen: ModelShape) -> None:
    layers = {"offload_activations": False, "attention_memory": "recompute", "mlp_tile_rows": 1000}
    given = {"train": {"max_tokens": 3000, **layers}, "rollout": {"max_in_flight": 7}}
    sizing = sized(qwen, "24", **given, data={"max_prompt_length": 100})
    assert sizing.chosen.keys() == {"rollout.kv_cache_gib"}
    again = sized(qwen, "24", rollout={"kv_cache_gib": 3.0})
    assert again.config.rollout.kv_cache_gib == 3.0
    assert again.plan.rollout().items["KV cache"] == 3 * GIB  # type: ignore[union-attr]
    assert "rollout.kv_cache_gib" not in again.chosen


def test_packs_are_halved_where_a_full_one_does_not_fit(qwen: ModelShape) -> None:
    short = {"data": {"max_prompt_length": 256}, "rollout": {"engine": "transformers", "max_completion_length": 256}}
    for gib in ("9.9", "10.0"):
        sizing, room = sized(qwen, gib, **short), USED_SHARE * find_device(gib).memory
        size = sizing.config.train.max_tokens
        assert size is not None
        assert 512 < size < 16384
        assert sizing.plan.training().bytes <= room
        # The next larger pack would not have fitted, in host memory or out of it.
        for way in (True, False):
            larger = {"train": {"max_tokens": 2 * size, "offload_activations": way}}
            assert sized(qwen, gib, **short, **larger).plan.training().bytes > room
    assert sized(qwen, "24", **short).config.train.max_tokens == 16384


def test_smaller_tiles_come_before_smaller_packs(qwen: ModelShape) -> None:
    sizing = sized(qwen, "11.4")
    chosen = sizing.config.train
    assert (chosen.max_tokens, chosen.mlp_tile_rows, chosen.kv_head_groups) == (16384, 2048, None)
    usual = sized(qwen, "11.4", train={"mlp_tile_rows": 4096, "kv_head_groups": 2})
    assert usual.config.train.max_tokens < 16384  # type: ignore[operator]
    assert sizing.reasons["train.mlp_tile_rows"].startswith("with 4096 training needs ")


def test_every_choice_has_a_reason_that_its_plan_bears_out(qwen: ModelShape) -> None:
    for card in ("9.5", "11", "11.2", "11.4", "14", "24", "80"):
        sizing = sized(qwen, card)
        assert sizing.reasons.keys() == sizing.chosen.keys()
        limit = USED_SHARE * find_device(card).memory_gib
        for name, reason in sizing.reasons.items():
            if found := re.search(r"training needs ([\d.]+) GiB of ([\d.]+)$", reason):
                assert float(found[2]) == pytest.approx(limit, abs=0.01)
                assert float(found[1]) >= limit - 0.01, name
        if sizing.plan.training().bytes > limit * GIB:
            assert "does not fit either" in sizing.reasons["train.max_tokens"]


def test_long_sequences_have_a_pack_of_their_own_length(qwen: ModelShape) -> None:
    sizing = sized(qwen, "80", data={"max_prompt_length": 30_000}, train={"share_prefix": False})
    assert sizing.config.train.max_tokens == 30_000 + 4096


def test_a_long_prompt_has_its_group_in_a_pack(qwen: ModelShape) -> None:
    alone = sized(qwen, "80", data={"max_prompt_length": 30_000}, train={"max_tokens": 30_000 + 4096})
    sizing = sized(qwen, "80", data={"max_prompt_length": 30_000})
    assert sizing.config.train.max_tokens == 30_000 + 8 * 4096
    assert sizing.plan.update_seconds < 0.4 * alone.plan.update_seconds
    assert "a long prompt once for its group: with 34,096 an update takes" in sizing.reasons["train.max_tokens"]
    small = sized(qwen, "24", host=16, data={"max_prompt_length": 30_000})
    assert small.plan.trains()
    assert small.config.train.max_tokens == 30_000 + 4 * 4096, "half of the group is what the host has room for"
    # Of a short prompt there is little to save.
    assert sized(qwen, "80", data={"max_prompt_length": 512}).config.train.max_tokens == MAX_TOKENS


@pytest.mark.parametrize("rows", [16, 40, 50, 51, 64, 75, 100, 140, 1000])
@pytest.mark.parametrize(("prompt", "completion", "group"), [(40, 10, 8), (9, 12, 4), (30, 1, 5), (3, 13, 2)])
def test_the_tokens_of_an_update_are_those_of_its_packs(prompt: int, completion: int, group: int, rows: int) -> None:
    work = Work(2 * group, 2 * group, 2, prompt, completion, True, True, 1, 0, 1, 1)
    sequences = [
        Sequence(list(range(prompt)), [1] * (completion + 1), [True] * (completion + 1), family=i // group)
        for i in range(2 * group)
    ]
    packs = pack(sequences, rows)
    assert work.in_packs(rows).tokens == sum(one.num_tokens for one in packs)


def test_layers_inputs_leave_the_device_only_where_that_is_of_use(qwen: ModelShape) -> None:
    assert sized(qwen, "24").config.train.offload_activations is True
    assert sized(qwen, "80").config.train.offload_activations is False
    # Without host memory for them they stay, and attention is recomputed.
    poor = sized(qwen, "24", host=4)
    assert poor.plan.host == {}
    assert poor.plan.fits()


def test_the_cache_holds_the_batch_where_there_is_room_and_one_sequence_at_least(qwen: ModelShape) -> None:
    roomy, tight = sized(qwen, "80"), sized(qwen, "16")
    batch = roomy.plan.cache_needed(64)
    assert batch <= roomy.config.rollout.kv_cache_gib * GIB <= 1.02 * batch  # type: ignore[operator]
    assert roomy.plan.in_flight >= 64
    assert 1 <= tight.plan.in_flight < 64
    assert (roomy.config.rollout.max_in_flight, tight.config.rollout.max_in_flight) == (64, 64)
    # The engine's own check of what it is given takes it.
    for sizing in (roomy, tight):
        rollout = sizing.config.rollout
        options = VllmOptions(max_num_seqs=rollout.max_in_flight, kv_cache_gib=rollout.kv_cache_gib)  # type: ignore[arg-type]
        config = AutoConfig.for_model(**MODELS["Qwen/Qwen3-8B"])
        assert kv_cache_bytes(config, options, 4608, free=0) == int(rollout.kv_cache_gib * GIB)  # type: ignore[operator]


def test_one_very_long_sequence_gets_what_the_engine_asks_for(qwen: ModelShape) -> None:
    """No room for more than one: the size must still pass the engine's check."""
    config = config_of(
        data={"max_prompt_length": 40_000}, rollout={"max_completion_length": 960, "num_generations": 2},
        train={"generation_batch_size": 2},
    )  # fmt: skip
    longest = Longest(40_000, 960)
    sizing = choose_sizes(qwen, config, find_device("24", host_gib=64), longest=longest)
    options = VllmOptions(max_num_seqs=2, kv_cache_gib=sizing.config.rollout.kv_cache_gib)
    assert kv_cache_bytes(AutoConfig.for_model(**MODELS["Qwen/Qwen3-8B"]), options, 40_960, free=0)


def test_a_short_run_is_not_compiled_for(qwen: ModelShape) -> None:
    def chosen(completion: int, steps: int | None, **rollout: Any) -> Sizing:
        sections = {"rollout": {"engine": "vllm", "max_completion_length": completion, **rollout}}
        return sized(qwen, "h100", train={"max_steps": steps}, **sections)

    short = chosen(16, 10)
    assert short.config.rollout.enforce_eager is True
    assert short.config.rollout.torch_compile is None
    reason = "capturing graphs takes about 15 s, and would spare 13.7 s of rollouts"
    assert short.reasons["rollout.enforce_eager"] == reason
    assert "CUDA graphs" not in short.plan.rollout().items
    long, unknown, set_so = chosen(1024, 200), chosen(16, None), chosen(16, 10, enforce_eager=False)
    for other in (long, unknown, set_so, chosen(64, 30)):
        assert not other.config.rollout.enforce_eager
        assert "rollout.enforce_eager" not in other.chosen
        assert "CUDA graphs" in other.plan.rollout().items
    own = sized(qwen, "h100", train={"max_steps": 1}, rollout={"engine": "transformers"})
    assert (own.config.rollout.enforce_eager, own.config.rollout.torch_compile) == (None, None), "vLLM's alone"


def test_a_long_run_is_compiled_for_and_a_shorter_one_gets_graphs(qwen: ModelShape) -> None:
    def chosen(steps: int | None, **rollout: Any) -> Sizing:
        sections = {"rollout": {"engine": "vllm", "max_completion_length": 1024, **rollout}}
        return sized(qwen, "h100", train={"max_steps": steps}, **sections)

    shorter = chosen(20)
    assert shorter.config.rollout.torch_compile is False
    assert shorter.config.rollout.enforce_eager is None
    decoding = shorter.plan.seconds["rollout: completions"]
    saved = float(re.search(r"spare ([\d.]+) s", shorter.reasons["rollout.torch_compile"])[1])  # type: ignore[index]
    assert saved == pytest.approx(0.014 * 20 * decoding, rel=0.1)
    takes = 17 + 2e-9 * qwen.linear_elements
    assert f"compiling takes about {takes:.0f} s" in shorter.reasons["rollout.torch_compile"]
    assert saved < takes
    enough = int(takes / (0.014 * decoding)) + 2
    assert chosen(enough - 4).config.rollout.torch_compile is False
    for other in (chosen(enough), chosen(None), chosen(enough - 4, torch_compile=True)):
        assert "rollout.torch_compile" not in other.chosen
    assert "rollout.torch_compile" not in chosen(20, enforce_eager=True).chosen, "there is nothing to compile for"
    assert "rollout.torch_compile" not in chosen(20, numerics="stock").chosen, "stock vLLM compiles"


USUAL = [1, 2, 4, 8, 16, 24, 32, 48, 64]


def of_short_completions(shape: ModelShape, card: str = "h100", **changes: Any) -> Sizing:
    """8 prompts of 40 tokens, and a block for each of the other 56 completions, of 16."""
    sections: dict[str, Any] = {
        "rollout": {"engine": "vllm", "num_generations": 8, "max_completion_length": 16},
        "data": {"max_prompt_length": 40},
        "train": {"max_steps": 2000, "generation_batch_size": 64},
    }
    for name, values in changes.items():
        sections[name] |= values
    return sized(shape, card, **sections)


def test_graphs_take_in_prompts_where_completions_are_short(qwen: ModelShape) -> None:
    def chosen(**changes: Any) -> Sizing:
        return of_short_completions(qwen, **changes)

    short = chosen()
    assert short.config.rollout.cudagraph_sizes == [*USUAL, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    assert "up to 1,216 tokens" in short.reasons["rollout.cudagraph_sizes"]
    assert "rollout.cudagraph_sizes=[1,2,4,8,16,24,32,48,64,96," in str(short)
    graphs = short.plan.rollout().items["CUDA graphs"]
    assert graphs == 2 * chosen(rollout={"max_completion_length": 1024}).plan.rollout().items["CUDA graphs"]
    assert chosen(train={"max_steps": None}).config.rollout.cudagraph_sizes == short.config.rollout.cudagraph_sizes
    for other in (
        chosen(rollout={"max_completion_length": 1024}),  # a small part of the rollout
        chosen(data={"max_prompt_length": 400}),  # 4,096 tokens
        chosen(train={"max_steps": 100}),  # not compiled for
        chosen(rollout={"torch_compile": False}),
        chosen(rollout={"enforce_eager": True}),
    ):
        assert "rollout.cudagraph_sizes" not in other.chosen
    assert chosen(rollout={"cudagraph_sizes": [8]}).config.rollout.cudagraph_sizes == [8]
    many = chosen(rollout={"max_in_flight": 100}).config.rollout.cudagraph_sizes
    assert many is not None
    assert {*USUAL, 96, 100} < set(many), "all that may be decoded at once"


def test_graphs_of_prompts_take_no_memory_from_anything_else(qwen: ModelShape) -> None:
    captured = []
    for gib in ("9.8", "10.4", "11.5", "12", "13", "24"):
        open_sizes = of_short_completions(qwen, gib)
        usual = of_short_completions(qwen, gib, rollout={"cudagraph_sizes": USUAL})
        assert open_sizes.changes["train"] == usual.changes["train"], gib
        assert open_sizes.plan.fits() == usual.plan.fits(), gib
        assert open_sizes.config.rollout.kv_cache_gib == usual.config.rollout.kv_cache_gib, gib
        captured.append(open_sizes.config.rollout.cudagraph_sizes is not None)
    assert captured == sorted(captured), "with more memory, not with less"
    assert (captured[0], captured[-1]) == (False, True)


def test_what_the_config_asks_of_a_start_is_done(qwen: ModelShape) -> None:
    for given in ({"torch_compile": True}, {"cudagraph_sizes": [8, 64]}, {"enforce_eager": False}):
        made = of_short_completions(qwen, train={"max_steps": 3}, rollout=given).config.rollout
        assert not made.enforce_eager
        assert all(getattr(made, key) == value for key, value in given.items())
    assert of_short_completions(qwen, train={"max_steps": 3}).config.rollout.enforce_eager is True


def decoded() -> list[tuple[str, int, float]]:
    """Weight format, sequences and seconds a token of Qwen3-8B's shape on an H200, as they are stored."""
    found = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("rollout-h200-2*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            system, _, weights = row["system"].partition("-")
            if row["kind"] == "decode" and system == "tandem" and row["batch"] > 1:
                found.append((weights, row["batch"], row["batch"] / row["decode_tokens_per_s"]))
    return found


@pytest.mark.parametrize(("weights", "sequences", "seconds"), decoded())
def test_decoding_takes_as_long_as_was_measured(qwen: ModelShape, weights: str, sequences: int, seconds: float) -> None:
    config = config_of(
        model={"load_in_4bit": True, "weight_format": weights}, lora={"r": 32},
        train={"generation_batch_size": sequences},
        rollout={"engine": "vllm", "num_generations": 2, "max_completion_length": 128, "enforce_eager": False},
    )  # fmt: skip
    plan = choose_sizes(qwen, config, find_device("h200", host_gib=64), longest=Longest(64, 128)).plan
    assert plan.seconds["rollout: completions"] / 128 == pytest.approx(seconds, rel=1 / 3)


def test_a_whole_step_takes_as_long_as_was_measured(qwen: ModelShape) -> None:
    path = ROOT / "benchmarks" / "results" / "grpo-step-h200-2026-11-29-1358.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    measured = next(row["parts"] for row in rows if row["system"] == "tandem" and row["step"])
    config = config_of(
        lora={"r": 32}, train={"generation_batch_size": 64},
        rollout={"engine": "vllm", "num_generations": 8, "max_completion_length": 4096, "enforce_eager": False},
    )  # fmt: skip
    seconds = choose_sizes(qwen, config, find_device("h200", host_gib=64), longest=Longest(512, 4096)).plan.seconds
    rollout, update = (sum(v for name, v in seconds.items() if name.startswith(part)) for part in ("rollout", "update"))
    assert rollout == pytest.approx(measured["generate"], rel=0.1)
    assert update == pytest.approx(measured["backward"], rel=0.1)


def test_groups_share_the_cache_of_their_prompt(qwen: ModelShape) -> None:
    plan = sized(qwen, "80", rollout={"num_generations": 8}).plan
    token = plan.kv_bytes_per_token
    assert plan.cache_needed(8) == token * (512 + 8 * 4096)
    assert plan.cache_needed(64) == token * (8 * 512 + 64 * 4096)
    assert plan.cache_needed(1) == token * (512 + 4096)


def test_as_many_are_generated_at_once_as_the_batch_or_the_evaluation_has(qwen: ModelShape) -> None:
    device = find_device("80", host_gib=64)
    flights = [
        choose_sizes(qwen, config_of(), device, evaluated=count).config.rollout.max_in_flight
        for count in (0, 100, 5000)
    ]
    assert flights == [64, 100, 256]
    # The transformers engine makes all of a batch at once, unless that does not fit.
    assert "rollout.max_in_flight" not in sized(qwen, "80", rollout={"engine": "transformers"}).chosen
    few = sized(qwen, "24", rollout={"engine": "transformers"}).config.rollout.max_in_flight
    assert few is not None
    assert 1 <= few < 64


def test_what_does_not_fit_is_left_open_and_said(qwen: ModelShape) -> None:
    sizing = sized(qwen, "5")
    assert not sizing.plan.fits()
    assert sizing.config.train.max_tokens == 512 + 4096
    assert sizing.config.rollout.kv_cache_gib is None


def test_lengths_of_the_data_count_before_those_of_the_config(qwen: ModelShape) -> None:
    device, config = find_device("80"), config_of(algorithm={"name": "sft"})
    work = ledger(qwen, config, device, Longest(700, 300)).work
    assert (work.prompt, work.completion) == (700, 300)
    work = ledger(qwen, config_of(), device, Longest(700, 300)).work
    assert (work.prompt, work.completion) == (700, 4096)


# --- in a run ---------------------------------------------------------------------------------------------------------


def started(
    config: Config, data: TrainingData, monkeypatch: pytest.MonkeyPatch, device: Device | None, **how: Any
) -> tuple:
    monkeypatch.setattr(open_model, "gpu_here", lambda: device)
    file = io.StringIO()
    console = Console(file, file)
    inputs: Any = SimpleNamespace(data=data)
    return open_model.sized(config, open_model._wanted_engine(config), inputs, console, **how), file


def test_a_run_chooses_and_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    data = TrainingData(prompts=[Prompt(0, [1] * 300, "")], eval_prompts=[Prompt(0, [1] * 90, "")] * 70)
    config = config_of(data={"max_prompt_length": 9000})
    made, said = started(config, data, monkeypatch, find_device("24", host_gib=64))
    assert config.train.max_tokens is None
    assert made.train.max_tokens == 16384
    assert made.rollout.max_in_flight == 70
    assert made.data == config.data
    text = " ".join(said.getvalue().split())
    assert (
        "train.max_tokens=16384 train.offload_activations=true train.attention_memory=save train.mlp_tile_rows=4096 "
        "rollout.max_in_flight=70 "
        f"rollout.kv_cache_gib={made.rollout.kv_cache_gib}" in text
    )
    assert "training peaks at" in text
    assert "a rollout at" in text
    assert "needs more than there is" not in text
    options = open_model.vllm_options(made, SimpleNamespace(data=data))  # type: ignore[arg-type]
    assert options.kv_cache_gib == made.rollout.kv_cache_gib
    assert not options.stock_numerics
    stock = changed(made, {"rollout": {"numerics": "stock"}})
    assert open_model.vllm_options(stock, SimpleNamespace(data=data)).stock_numerics  # type: ignore[arg-type]


def test_a_check_starts_no_longer_than_one_rollout_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config's whole run would be compiled for."""
    data = TrainingData(prompts=[Prompt(0, [1] * 300, "")], eval_prompts=[])
    config = config_of(rollout={"engine": "vllm", "max_completion_length": 64}, train={"max_steps": 10_000})
    card = find_device("h100", host_gib=64)
    whole, _ = started(config, data, monkeypatch, card)
    assert (whole.rollout.enforce_eager, whole.rollout.torch_compile) == (None, None)
    check, _ = started(config, data, monkeypatch, card, completions=32)
    assert check.rollout.enforce_eager is True
    assert check.train == whole.train, "nothing else is chosen otherwise, and the run is as long as it is"
    # 5.5 s for 64 tokens of 36 layers without graphs, as often as all are begun: an evaluation of many is worth them.
    many, _ = started(config, data, monkeypatch, card, completions=6 * check.rollout.max_in_flight)
    assert (many.rollout.enforce_eager, many.rollout.torch_compile) == (None, False)
    updates = config_of(
        rollout={"engine": "vllm", "max_completion_length": 64}, train={"max_steps": 10_000, "steps_per_generation": 4}
    )
    four, _ = started(updates, data, monkeypatch, card, completions=6 * check.rollout.max_in_flight)
    assert four.rollout.enforce_eager is None, "whatever a run does with a rollout"


def test_a_dry_run_shows_sizes_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    inputs = SimpleNamespace(data=TrainingData(prompts=[Prompt(0, [1] * 300, "")]))
    for device, expected in (
        (find_device("24", host_gib=64), "train.mlp_tile_rows 4096 the usual size; it fits"),
        (None, "without a GPU no size is chosen: packs have up to 4,096 tokens"),
    ):
        monkeypatch.setattr(open_model, "gpu_here", lambda device=device: device)
        said = io.StringIO()
        open_model.show_sizes(config_of(), inputs, Console(said, said))  # type: ignore[arg-type]
        assert expected in " ".join(said.getvalue().replace("│", " ").split())


def test_a_run_that_does_not_fit_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TrainingData(prompts=[Prompt(0, [1] * 300, "")])
    _, said = started(config_of(), data, monkeypatch, find_device("4", host_gib=64))
    assert "needs more than there is. It does not fit: training needs" in " ".join(said.getvalue().split())


def test_examples_of_sft_give_their_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Sequence([1] * 20_000, [2] * 1_000, [True] * 1_000)
    data = TrainingData(examples=[Sequence([1], [2], [True]), long])
    made, _ = started(config_of(algorithm={"name": "sft"}), data, monkeypatch, find_device("24", host_gib=64))
    assert made.train.max_tokens == 21_000


@pytest.mark.parametrize(
    ("host", "sections"),
    [
        # Offloading, which is left open, would want more of the host than there is.
        (1, {"algorithm": {"name": "sft"}, "rollout": {"engine": "transformers"}, "data": {"max_prompt_length": 4096}}),
        # Of a wave, which is left open, the whole batch does not fit.
        (64, {"rollout": {"engine": "transformers"}, "train": {"generation_batch_size": 4096}}),
    ],
)
def test_what_fits_is_no_longer_than_the_longest_that_fits(
    qwen: ModelShape, host: float, sections: dict[str, Any]
) -> None:
    made = sized(qwen, "h200", host=host, **sections)
    said = as_dict(made)
    assert said["fits"]
    assert said["longest"] >= made.plan.work.length > made.free.longest
    assert said["longest"] == min(said["limits"].values()) == said["limits"][said["binding"]]
    out = io.StringIO()
    show(made, Console(out, out, live=False))
    assert f"{said['longest']:,} tokens, limited by {said['binding']}" in " ".join(out.getvalue().split())


def test_a_reason_does_not_speak_for_the_other_value() -> None:
    """Attention's output is computed again, faster though it would be to save it: for what memory, is said."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    widths = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "vocab_size": 256_000}
    shape = shape_of(AutoConfig.for_model("gemma2", sliding_window=4096, **heads, **widths))
    sections = {"algorithm": {"name": "sft"}, "data": {"max_prompt_length": 4096}, "lora": {"r": 64}}
    made = sized(shape, "3090", host=1, model={"load_in_4bit": False, "dtype": "float32"}, **sections)
    assert made.chosen["train.attention_memory"] == "recompute"
    said = re.fullmatch(
        r"with save an update takes ([\d.]+) s in place of ([\d.]+), for ([\d.]+) GiB more",
        made.reasons["train.attention_memory"],
    )
    assert said is not None
    assert float(said[1]) < float(said[2])
    assert float(said[3]) > 0


def test_a_model_that_int4_cannot_hold_is_a_user_s_mistake() -> None:
    shape = shape_of(AutoConfig.for_model("llama", hidden_size=96, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(UserError, match="96 × 96"):
        sized(shape, "24", model={"weight_format": "int4"})


def test_nothing_changes_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TrainingData(prompts=[Prompt(0, [1] * 300, "")])
    for config, device in ((config_of(), None), (config_of(model={"device": "cpu"}), find_device("24"))):
        made, said = started(config, data, monkeypatch, device)
        assert made is config
        assert "sizes" not in said.getvalue()


def test_a_model_that_cannot_be_planned_runs_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model={"model_name_or_path": "nobody/nothing"})
    data = TrainingData(prompts=[Prompt(0, [1] * 300, "")])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made, said = started(config, data, monkeypatch, find_device("24", host_gib=64))
    assert made is config
    assert "no plan could be made" in said.getvalue()


def test_memory_that_others_hold_is_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=int(23.5 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * GIB, int(23.5 * GIB)))
    here = gpu_here()
    assert here is not None
    assert here.memory == 10 * GIB + CONTEXT
    assert here.bandwidth == find_device("4090").bandwidth
    assert 0 < here.host_gib < 1 << 14  # type: ignore[operator]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(23.5 * GIB), int(23.5 * GIB)))
    assert gpu_here().memory == int(23.5 * GIB)  # type: ignore[union-attr]


def test_the_table_of_the_examples_is_that_of_their_plans() -> None:
    spec = importlib.util.spec_from_file_location("make_plan_table", ROOT / "docs" / "make_plan_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table().count("\n") == len(EXAMPLES) + 1
    for target in module.TARGETS:
        assert target.read_text(encoding="utf-8") == module.render(target)
