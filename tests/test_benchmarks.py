"""The benchmarks as far as they need no GPU: what follows from rows, the picture, failing systems, arguments."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
GIB = 2**30


def module(name: str) -> ModuleType:
    """A script of benchmarks/, imported as it imports its neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


update, plot_update, kernel_speed = module("update"), module("plot_update"), module("kernel_speed")
grpo_step, learning_vs_trl = module("grpo_step"), module("learning_vs_trl")
plan_peaks, profile_step = module("plan_peaks"), module("profile_step")
pinned_memory = module("pinned_memory")


def row(system: str, length: int | None, **values: Any) -> dict[str, Any]:
    known = {"system": system, "label": None, "model": "m", "length": length, "cap_gib": 23.0}
    return known | dict.fromkeys(update.COLUMNS) | values


def result(rows: list[dict[str, Any]], device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    return {"bench": "update", "device": device, "total_gib": 79.0, "rows": rows}


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


ROWS = [
    row("tandem", 1024, seconds=2.0, peak_allocated_gib=8.0),
    row("tandem", 2048, seconds=3.0, peak_allocated_gib=9.0),
    row("tandem", 4096, seconds=8.0, peak_allocated_gib=11.0),
    row("trl", 1024, seconds=3.0, peak_allocated_gib=10.0),
    row("trl", 2048, seconds=4.5, peak_allocated_gib=14.0),
    row("trl", 4096, error="out of memory: tried to allocate 2 GiB"),
    row("unsloth", 1024, seconds=2.5, peak_allocated_gib=9.0),
    row("unsloth", None, error="Traceback\nRuntimeError: it broke"),
]


# --- slopes and ratios ------------------------------------------------------------------------------------------------


def test_slopes_on_a_line() -> None:
    found = {one["system"]: one for one in plot_update.slopes(ROWS)}
    # 1 GiB per 1024 tokens, 7 GiB at none; 4 GiB per 1024 tokens, 6 GiB at none. One length has no slope.
    assert set(found) == {"tandem", "trl"}
    assert found["tandem"] == {
        "system": "tandem", "label": None, "model": "m", "cap_gib": 23.0,
        "lengths": [1024, 2048, 4096], "bytes_per_token": GIB // 1024, "fixed_gib": 7.0,
    }  # fmt: skip
    assert found["trl"]["bytes_per_token"] == 4 * GIB // 1024
    assert (found["trl"]["fixed_gib"], found["trl"]["lengths"]) == (6.0, [1024, 2048])


def test_slope_is_that_of_least_squares() -> None:
    # Points (0, 0), (1, 2), (2, 1) in units of 1000 tokens and GiB: slope 0.5, intercept 0.5.
    points = [(1000, 0.0), (2000, 2.0), (3000, 1.0)]
    (one,) = plot_update.slopes([row("x", n, seconds=1.0, peak_allocated_gib=y) for n, y in points])
    assert one["bytes_per_token"] == round(0.5 * GIB / 1000)
    assert one["fixed_gib"] == 0.0


def test_slopes_keep_caps_and_labels_apart() -> None:
    rows = [row("x", 1000, seconds=1.0, peak_allocated_gib=1.0), row("x", 2000, seconds=1.0, peak_allocated_gib=2.0)]
    assert len(plot_update.slopes(rows)) == 1
    assert plot_update.slopes([rows[0], rows[1] | {"cap_gib": None}]) == []
    assert plot_update.slopes([rows[0], rows[1] | {"label": "other"}]) == []


def test_ratios_to_tandem() -> None:
    found = {one["length"]: one["ratio_to_tandem"] for one in plot_update.ratios(ROWS)}
    assert found == {1024: {"trl": 1.5, "unsloth": 1.25}, 2048: {"trl": 1.5}, 4096: {}}
    assert plot_update.ratios([one for one in ROWS if one["system"] != "tandem"]) == []
    other_cap = [one | {"cap_gib": None} if one["system"] == "trl" else one for one in ROWS]
    assert plot_update.ratios(other_cap)[0]["ratio_to_tandem"] == {"unsloth": 1.25}


def test_summary_says_both() -> None:
    lines = plot_update.summary({"slopes": plot_update.slopes(ROWS), "ratios": plot_update.ratios(ROWS)})
    assert "tandem, cap 23 GiB: 1048.6 KB per token + 7.00 GiB (1K to 4K tokens)" in lines
    assert "ratio to tandem at 1K tokens, cap 23 GiB: trl 1.50 · unsloth 1.25" in lines


# --- the picture ------------------------------------------------------------------------------------------------------


def test_plot_is_a_picture_and_shows_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    shown: list[Any] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **options: Any) -> None:
        shown.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    plot_update.draw(result(ROWS), tmp_path / "plot.png")
    assert is_png(tmp_path / "plot.png")
    (figure,) = shown
    seconds, memory = figure.axes
    lines = {line.get_label(): line for line in seconds.get_lines()}
    assert list(lines["tandem"].get_xdata()) == [1024, 2048, 4096]
    assert list(lines["tandem"].get_ydata()) == [2.0, 3.0, 8.0]
    assert (seconds.get_xscale(), seconds.get_yscale(), memory.get_xscale()) == ("log", "log", "log")
    peaks = {line.get_label(): list(line.get_ydata()) for line in memory.get_lines()}
    assert peaks["trl"] == [10.0, 14.0]
    assert any(list(line.get_ydata()) == [23.0, 23.0] for line in memory.get_lines()), "the cap"
    (cross,) = [text for text in memory.texts if text.get_text() == "✕"]
    assert cross.xy == (4096, 23.0)
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"tandem", "trl", "unsloth", "out of memory", "unsloth: RuntimeError: it broke"} <= set(entries)


@pytest.mark.parametrize("rows", [[], [row("trl", 1024, error="out of memory")], [row("trl", None, error="x")]])
def test_plot_of_next_to_nothing(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_update.draw(result(rows), tmp_path / "plot.png")
    assert is_png(tmp_path / "plot.png")


def test_colours_are_all_different() -> None:
    assert set(plot_update.STYLES) == set(update.SYSTEMS)
    assert len({color for color, _ in plot_update.STYLES.values()}) == len(update.SYSTEMS)
    assert len({marker for _, marker in plot_update.STYLES.values()}) == len(update.SYSTEMS)


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_stored_results_are_drawn_again(tmp_path: Path, device: str) -> None:
    stored = sorted((BENCHMARKS / "results").glob(f"update-{device}-*.json"))
    assert stored
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "update.py"), "--plot", *map(str, stored), "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    target = Path(done.stdout.strip())
    assert target.parent == tmp_path
    assert is_png(target)


def test_plot_lies_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "update-x.json").write_text(json.dumps(result(ROWS)), encoding="utf-8")
    update.main(["--plot", str(tmp_path / "update-x.json")])
    assert is_png(tmp_path / "update-x.png")


def test_merging_takes_the_later_file_and_refuses_other_devices(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = [tmp_path / f"{name}.json" for name in "abc"]
    newer = [row("tandem", 1024, seconds=1.0, peak_allocated_gib=7.0)]
    for file, content in zip(files, (result(ROWS), result(newer), result(newer, "NVIDIA A100")), strict=True):
        file.write_text(json.dumps(content), encoding="utf-8")
    rows = plot_update.merged(files[:2])["rows"]
    assert len(rows) == len(ROWS)
    assert [one["seconds"] for one in rows if one["system"] == "tandem"] == [1.0, 3.0, 8.0]
    with pytest.raises(SystemExit):
        update.main(["--plot", *map(str, files)])
    assert "A100" in capsys.readouterr().err


# --- workers ----------------------------------------------------------------------------------------------------------


def arguments(*more: str) -> tuple[argparse.Namespace, list[str]]:
    argv = ["/nowhere/model", "--lengths", "1024", "2048", "--timeout", "60", *more]
    return update.parse(argv)[1], argv


def worker_is(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(update, "worker_command", lambda _: [sys.executable, "-c", "import json, sys\n" + code])


def test_a_real_worker_that_dies_leaves_its_error() -> None:
    # No device, no such model: it dies of one or the other.
    (one,) = update.run_worker("tandem", *arguments("--cap-gib", "23"))
    assert (one["system"], one["model"], one["length"], one["cap_gib"]) == ("tandem", "model", None, 23.0)
    assert one["seconds"] is None
    assert "Error" in one["error"]
    assert set(update.COLUMNS) <= set(one)


def test_rows_before_the_death_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    good = row("trl", 1024, seconds=1.0, peak_allocated_gib=2.0)
    worker_is(
        monkeypatch,
        f"print('noise'); print('BEGIN 1024'); print('ROW', {json.dumps(good)!r}); print('BEGIN 2048')\n"
        "sys.stdout.flush(); raise ValueError('the last words')",
    )
    first, second = update.run_worker("trl", *arguments())
    assert first == good
    assert second["length"] == 2048
    assert second["error"].endswith("ValueError: the last words")


def test_a_silent_death_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    worker_is(monkeypatch, "sys.exit(3)")
    (one,) = update.run_worker("trl", *arguments())
    assert one["error"] == "trl ended with code 3"


def test_a_worker_that_hangs_is_stopped_and_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    good = row("trl", 1024, seconds=1.0, peak_allocated_gib=2.0)
    said = f"print('BEGIN 1024'); print('ROW', {json.dumps(good)!r}); print('BEGIN 2048', flush=True)"
    worker_is(monkeypatch, f"import time; {said}; time.sleep(60)")
    known, argv = arguments("--timeout", "2")
    first, second = update.run_worker("trl", known, argv)
    assert first == good
    assert (second["length"], second["error"]) == (2048, "stopped after 2 s")


def test_every_row_is_stored_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"device": "NVIDIA GeForce RTX 4090", "driver": "580", "total_gib": 23.5}
    states: list[list[str]] = []

    def lines_of(system: str, argv: list[str], timeout: float) -> Any:
        if system == "device":
            yield f"DEVICE {json.dumps(facts)}"
            return
        for length, seconds in ((1024, 1.0), (2048, 2.0)):
            values = row(system, length, seconds=seconds * (2 if system == "trl" else 1), peak_allocated_gib=seconds)
            yield f"ROW {json.dumps(values)}"
            (stored,) = tmp_path.glob("update-*.json")
            content = json.loads(stored.read_text(encoding="utf-8"))
            states.append([f"{one['system']} {one['length']}" for one in content["rows"]])

    monkeypatch.setattr(update, "lines_of", lines_of)
    update.main(["/nowhere/model", "--systems", "tandem", "trl", "--lengths", "1024", "2048", "--out", str(tmp_path)])
    order = ["tandem 1024", "tandem 2048", "trl 1024", "trl 2048"]
    assert states == [order[:n] for n in range(1, 5)]
    (stored,) = tmp_path.glob("update-rtx-4090-*.json")
    content = json.loads(stored.read_text(encoding="utf-8"))
    assert {name: content[name] for name in facts} == facts
    assert content["ratios"][1]["ratio_to_tandem"] == {"trl": 2.0}
    assert content["slopes"][0]["bytes_per_token"] == GIB // 1024
    assert content["commands"][1].endswith("--worker trl")
    assert content["date"][:4].isdigit()
    assert is_png(stored.with_suffix(".png"))


def test_no_device_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker_is(monkeypatch, "sys.exit('no card in this box')")
    with pytest.raises(SystemExit, match="no card in this box"):
        update.main(["/nowhere/model", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# --- arguments, systems -----------------------------------------------------------------------------------------------


def test_arguments() -> None:
    known = update.parse(["model", "--lengths", "4096", "1024", "4096", "--label", "a", "--offload", "off"])[1]
    assert known.lengths == [1024, 4096]
    assert (known.attention, known.offload, known.label, known.timeout) == ("auto", "off", "a", 500.0)
    assert update.row("tandem", known, 1024)["label"] == "a"
    assert update.row("tandem", known, 1024)["cap_gib"] is None


@pytest.mark.parametrize(
    "argv",
    [[], ["m", "--attention", "keep"], ["m", "--offload", "maybe"], ["m", "--systems", "nothing"],
     ["m", "--repeats", "0"], ["m", "--lengths", "64"]],
)  # fmt: skip
def test_wrong_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        update.parse(argv)


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "rtx-4090"),
     ("CPU x86_64", "cpu-x86_64"), ("NVIDIA H200", "h200")],
)  # fmt: skip
def test_result_files_bear_the_device(device: str, name: str, tmp_path: Path) -> None:
    facts = {"bench": "update", "device": device, "date": "2026-11-24T12:03:07+00:00"}
    path = update.result_path(tmp_path, facts)
    assert path.name == f"update-{name}-2026-11-24-1203.json"
    update.store(path, facts)
    assert json.loads(path.read_text(encoding="utf-8")) == facts
    assert list(tmp_path.iterdir()) == [path]
    assert update.result_path(tmp_path, facts).name == f"update-{name}-2026-11-24-120307.json"


def test_every_tandem_system_computes_the_same_gradient(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.5,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.randint(96, (80,)).tolist()
    gradients, host = {}, dict.fromkeys(update.VARIANTS, 0)
    for system in (*update.VARIANTS, "tandem-plain"):
        loaded = update.tandem(system, update.parse([str(tmp_path), "--offload", "on"])[1])
        loaded.step(ids)
        gradients[system] = torch.cat([p.grad.flatten() for p in loaded.parameters])
        if system in host:
            host[system] = loaded.host_bytes()
    assert gradients["tandem"].norm() > 0
    for system, found in gradients.items():
        assert (found - gradients["tandem"]).norm() <= 0.03 * gradients["tandem"].norm(), system
    assert host["tandem"] > 0
    assert host["tandem-no-offload"] == 0


# --- whole steps ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_model import save_llama, save_words

    folder = tmp_path_factory.mktemp("words")
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(62))]
    save_words(folder, words, eos="<eos>", unk="<unk>")
    save_llama(folder, len(words), max_position_embeddings=64)
    return folder


def test_whole_steps_of_each_system(words_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tandem and TRL make their steps; a system that is not here leaves its error."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "unsloth.py").write_text("raise ImportError('no such card')")
    shape = [
        "--prompts",
        "2",
        "--generations",
        "4",
        "--prompt-tokens",
        "12",
        "--completion-tokens",
        "6",
        "--steps",
        "2",
        "--warmup-tokens",
        "3",
    ]
    more = ["--set", "optim.learning_rate=1e-3", "--out", str(tmp_path)]
    grpo_step.main(["--model", str(words_model), *shape, *more, "--systems", "tandem", "trl", "--together"])
    (path,) = tmp_path.glob("grpo-step-cpu-*.json")
    grpo_step.main(["--model", str(words_model), *shape, "--systems", "unsloth", "--into", str(path)])
    content = json.loads(path.read_text(encoding="utf-8"))
    assert ["--systems unsloth" in command for command in content["more_commands"]] == [True]
    assert content["command"].startswith("python benchmarks/grpo_step.py --model")
    for system in ("tandem", "trl"):
        start, *steps = [one for one in content["rows"] if one["system"] == system]
        assert (start["step"], [one["step"] for one in steps]) == (0, [1, 2]), start["error"]
        for one in steps:
            assert (one["context"], one["error"]) == (18, None)
            lengths = {one["logged"][f"completions/{name}_length"] for name in ("min", "mean", "max")}
            assert lengths == {6}, "every completion has its full length"
            assert sum(one["parts"].values()) == pytest.approx(one["seconds"], abs=1e-3)
            assert {"generate", "backward"} <= set(one["parts"])
            assert one["tokens_per_s"] == pytest.approx(48 / one["seconds"], rel=0.01, abs=0.06), "both are rounded"
            assert one["logged"]["grad_norm"] > 0
            assert one["tokens"] == 8 * 18
    assert not any("tokens of prompts" in note for notes in content["notes"].values() for note in notes)
    rates = [one for one in content["summary"] if one["system"] == "unsloth"]
    assert (rates[0]["steps"], rates[0]["error"].partition(" (in")[0]) == (0, "ImportError: no such card")


def test_prompts_have_the_length_that_was_asked_for(words_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(words_model)
    rows = grpo_step.questions(str(words_model), 5, 33)
    assert [len(tokenizer(one["prompt"])["input_ids"]) for one in rows] == [33] * 5
    assert len({one["prompt"] for one in rows}) == 5
    assert rows == grpo_step.questions(str(words_model), 5, 33)
    assert len(grpo_step.questions(str(words_model), 1, 7)) == 1


def test_longest_asks_for_one_shape_after_the_other() -> None:
    argv = ["--model", "m", "--longest", "8192", "4096", "--cap", "24"]
    found = list(grpo_step.jobs(grpo_step.parse(argv), argv))
    assert [system for system, _ in found] == ["tandem", "tandem"]
    first = grpo_step.parse([*argv, *found[0][1]])
    assert (first.prompts, first.generations, first.prompt_tokens, first.completion_tokens) == (1, 2, 2048, 2048)
    assert (first.steps, first.micro_batch) == (1, 2)
    assert grpo_step.parse([*argv, *found[1][1]]).prompt_tokens == 8192 - 2048


@pytest.mark.parametrize(
    "more",
    [
        ["--generations", "1"],
        ["--longest", "2048"],
        ["--longest", "4096", "--systems", "trl"],
        ["--longest", "4096", "--together"],
        ["--cap", "24", "--together"],
        ["--steps", "0"],
    ],
)
def test_wrong_steps_are_refused(more: list[str]) -> None:
    with pytest.raises(SystemExit):
        grpo_step.parse(["--model", "m", *more])


def test_a_step_beside_others_that_takes_more_than_its_card_has_failed() -> None:
    known = grpo_step.parse(["--model", "m", "--beside", "--cap", "24"])
    lines = [("ROW", json.dumps({"step": n, "device_gib": gib})) for n, gib in ((1, 23.9), (2, 24.1))]
    fits, exceeds = grpo_step.rows_of("tandem", known, iter(lines), None, [])
    assert fits["error"] is None
    assert exceeds["error"] == "24.1 GiB of the device, more than the cap of 24"


def test_sizes_are_those_of_the_card_that_stands_in_for_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandem.rl.config_file import load_config

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=110 * GIB))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    shape_of_model = module("random_checkpoint").SHAPES["qwen3-8b"] | {"max_position_embeddings": 140_000}
    (tmp_path / "config.json").write_text(json.dumps(shape_of_model))
    argv = ["--model", str(tmp_path), "--longest", "131072", "--cap", "24", "--beside"]
    ((system, shape),) = grpo_step.jobs(grpo_step.parse(argv), argv)
    settings = grpo_step.tandem_config(system, grpo_step.parse([*argv, *shape]), str(tmp_path))
    (tmp_path / "step.yaml").write_text(json.dumps(settings))
    config = load_config(tmp_path / "step.yaml", ["rollout.kv_cache_dtype=fp8"])
    data = SimpleNamespace(prompts=[SimpleNamespace(ids=[0] * 129_024)], eval_prompts=[])
    sized = grpo_step.sized_for(24.0, config, SimpleNamespace(data=data))
    assert sized.train.projection_memory == "recompute", "what is free on the larger card is not taken"
    assert sized.train.max_tokens == 129_024 + 2 * 2048, "the prompt once for its group"
    assert sized.train.offload_activations
    assert 9 < sized.rollout.kv_cache_gib < 16


def test_the_summary_takes_medians_of_the_steps() -> None:
    known = grpo_step.parse(["--model", "m"])
    steps = [(1, 9.0, 8.0), (2, 2.0, 1.0), (3, 4.0, 3.0)]
    rows = [grpo_step.row("trl", known, step=0, seconds=60.0, device_gib=3.0)]
    for step, seconds, part in steps:
        parts = {"generate": part, "idle": seconds - part}
        values = {"seconds": seconds, "parts": parts, "tokens_per_s": 1 / seconds}
        logged = {"sampling/sampling_logp_difference/mean": 0.01 * step}
        rows.append(grpo_step.row("trl", known, step=step, **values, logged=logged))
    rows.append(grpo_step.row("unsloth", known, error="it broke"))
    trl, unsloth = grpo_step.summary(rows)
    assert (trl["seconds"], trl["parts"]["generate"], trl["steps"], trl["device_gib"]) == (4.0, 3.0, 3, 3.0)
    assert trl["logp_difference"] == 0.03
    assert (unsloth["steps"], unsloth["seconds"], unsloth["error"]) == (0, None, "it broke")
    assert grpo_step.summary(rows[:2])[0]["seconds"] == 9.0


def test_a_batch_of_another_size_is_said(capsys: pytest.CaptureFixture) -> None:
    shape = ["--prompts", "2", "--generations", "2", "--prompt-tokens", "3", "--completion-tokens", "2"]
    lines = grpo_step.StepLines(grpo_step.parse(["--model", "m", *shape]))
    lines(1, {"generate": 2.0}, {"num_tokens": 20.0, "completions/mean_length": 2.0})
    lines(2, {"generate": 2.0}, {"num_tokens": 60.0, "completions/mean_length": 2.0})
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.partition(" ")[0] for line in said] == ["ROW", "NOTE", "ROW"]
    assert said[1] == 'NOTE "step 2 had 40 tokens of prompts and completions, not 20"'
    assert json.loads(said[0].partition(" ")[2])["tokens_per_s"] == 4.0


def test_memory_cannot_be_held_back_without_a_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError, match="cannot be held back"):
        module("device_watch").DeviceWatch(1.0)


# --- where a step's time goes -----------------------------------------------------------------------------------------


def test_a_step_s_time_by_function_and_by_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two updates a rollout, in this process, which is left as it was."""
    from tiny_run import write_place

    from tandem.rl import commands

    monkeypatch.setattr(profile_step, "LISTED", 10_000)  # the order is chance in so short a step
    config, before = write_place(tmp_path), (commands.Trackers, list(sys.argv), len(gc.callbacks))
    argv = [str(config), "optim.learning_rate=0.01", "--skip", "1", "--steps", "4", "--out", str(tmp_path)]
    profile_step.main([*argv, "checkpoint.save_steps=0"])
    assert (commands.Trackers, sys.argv, len(gc.callbacks)) == before
    assert not (tmp_path / "runs").exists(), "the run's folder was a temporary one"
    (path,) = tmp_path.glob("profile-step-cpu-*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["steps"] == {"plain": 2, "python": 1, "torch": 1}
    assert {"generate", "backward"} <= set(content["parts"])
    assert sum(content["parts"].values()) == pytest.approx(content["seconds"]["plain"], abs=2e-3), "both are rounded"
    functions = {one["function"].partition(" ")[2]: one for one in content["functions"]}
    assert functions["apply_gradients"]["calls"] == 2
    assert functions["apply_gradients"]["ms"] > functions["apply_gradients"]["own_ms"] > 0
    assert sum(one["own_ms"] for one in content["functions"]) > 500 * content["seconds"]["python"], "most of a step"
    operators = {one["operator"]: one for one in content["operators"]}
    assert operators["Optimizer.step#AdamW.step"]["calls"] == 2
    for found in (content["functions"], content["operators"]):
        assert found == sorted(found, key=lambda one: -one["own_ms"])
    assert [one["generation"] for one in content["collections"]] == [0, 1, 2]
    assert (content["launches"], content["busy_ms"]) == ({}, None)
    assert ("autograd's threads" in content["threads"]) == (sys.version_info < (3, 12))


def test_the_gpu_is_busy_while_kernels_run() -> None:
    def event(name: str, start: float = 0, end: float = 0, *, on: str = "CUDA", named: bool = False) -> SimpleNamespace:
        device, span = getattr(torch.autograd.DeviceType, on), SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=named)

    calls = ["cudaLaunchKernel", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaLaunchHostFunc"]
    events = [event(name, on="CPU") for name in [*calls, "aten::mm"]]
    events += [event("gemm", 1000, 3000), event("norm", 2000, 4000), event("rope", 6000, 7000)]
    events += [
        event("Memcpy DtoH (Device -> Pinned)", 0, 9000),
        event("Optimizer.step#AdamW.step", 0, 9000, named=True),
    ]
    assert profile_step.on_gpu(events, 2) == {
        "launches": {"cudaLaunchKernel": 1.0, "cuLaunchKernelEx": 0.5, "cudaGraphLaunch": 0.5},
        "busy_ms": 2.0,
    }


def test_collections_are_counted_by_generation() -> None:
    collector = profile_step.Collector()
    collector("stop", {"generation": 0})  # had begun before
    for generation in (2, 1, 2):
        collector("start", {"generation": generation})
        collector("stop", {"generation": generation})
    found = collector.per_step(2)
    assert [one["collections"] for one in found] == [0.0, 0.5, 1.0]
    assert found[0]["ms"] == 0.0


def test_names_of_functions_are_those_of_every_machine() -> None:
    name = profile_step.function_name
    assert name("~", 0, "<built-in method f of type object at 0x7f3a>") == "<built-in method f of type object>"
    assert name(torch.nn.__file__, 3, "f") == "torch/nn/__init__.py:3 f"
    assert name("/home/somebody/rewards/mine.py", 7, "reward") == "rewards/mine.py:7 reward"
    assert name("<string>", 2, "__init__") == "<string>:2 __init__"


@pytest.mark.parametrize("more", [["--steps", "2"], ["--skip", "0"], []])
def test_steps_that_cannot_be_profiled_are_refused(more: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        profile_step.main([str(tmp_path / "none.yaml"), *more, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# --- learning beside TRL ----------------------------------------------------------------------------------------------


def test_both_learn_the_same_task(tmp_path: Path) -> None:
    from tiny_run import write_place

    config = write_place(tmp_path)
    learning_vs_trl.main(
        ["--model", str(tmp_path / "model"), "--config", str(config), "--seeds", "0", "--steps", "4", "--eval-steps",
         "2", "--target", "0.1", "--out", str(tmp_path), "--set", "train.steps_per_generation=1", "algorithm.beta=0",
         "eval.temperature=0", "--together"]
    )  # fmt: skip
    (path,) = tmp_path.glob("learning-vs-trl-cpu-*.json")
    assert is_png(path.with_suffix(".png"))
    content = json.loads(path.read_text(encoding="utf-8"))
    tandem, trl = content["rows"]
    assert (tandem["system"], trl["system"], tandem["error"], trl["error"]) == ("tandem", "trl", None, None)
    for one in (tandem, trl):
        assert [(p["step"], p["samples"]) for p in one["curve"]] == [(1, 16), (2, 32), (3, 48), (4, 64)]
        assert [p["step"] for p in one["scores"]] == [0, 2, 4]
        assert one["curve"][-1]["seconds"] == one["seconds"] > 0
        assert one["reached"]["samples"] >= 48
    assert tandem["wall_seconds"] is trl["wall_seconds"] is None, "they have waited for their turns"
    # The same model, prompts and greedy completions before the first step.
    assert tandem["score_before"] == trl["score_before"]
    assert [one["system"] for one in content["summary"]] == ["tandem", "trl"]


def test_trl_s_engines_start_alone_and_go_on_without_vllm_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are made up: their order, what is under way beside what, and nothing measured before the gate."""
    events: list[tuple[str, str]] = []
    both_there, gate = threading.Barrier(2, timeout=30), tmp_path / "gate"

    def lines_of(system: str, argv: list[str], timeout: float, **_: Any) -> Iterator[str]:
        if system == "device":
            yield f"DEVICE {json.dumps({'device': 'NVIDIA H200', 'driver': '580', 'total_gib': 140.0})}"
            return
        known = learning_vs_trl.parse(argv)
        name = f"{system} {known.seeds[0]}" + " without" * (known.engine == "transformers")
        events.append(("start", name))
        if system == "tandem":
            both_there.wait()
        if name == "trl 0":
            yield 'ERROR "No available memory for the cache blocks"'
        else:
            events.append(("ready", name))
            if known.turn:
                if name == "trl 1":
                    threading.Timer(0.5, gate.touch).start()
                module("turns").Turn(known.turn).wait()
                assert gate.exists()
            if system == "trl":
                yield f"ROW {json.dumps({'step': 1, 'samples': 8, 'seconds': 1.0, 'reward': 0.5})}"
        events.append(("end", name))

    monkeypatch.setattr(learning_vs_trl, "lines_of", lines_of)
    learning_vs_trl.main(
        ["--model", "m", "--systems", "trl", "tandem", "--seeds", "0", "1", "--together", "--gate", str(gate),
         "--out", str(tmp_path)]
    )  # fmt: skip
    assert {name for _, name in events[:2]} == {name for _, name in events[2:4]} == {"tandem 0", "tandem 1"}
    assert [event for event, _ in events[:4]] == ["start", "start", "ready", "ready"]
    assert events[4:] == [
        ("start", "trl 0"), ("end", "trl 0"), ("start", "trl 1"), ("ready", "trl 1"),
        ("end", "tandem 0"), ("end", "trl 1"), ("end", "tandem 1"),
        ("start", "trl 0 without"), ("ready", "trl 0 without"), ("end", "trl 0 without"),
    ]  # fmt: skip
    (path,) = tmp_path.glob("learning-vs-trl-h200-*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    known = [(one["system"], one["seed"], one["engine"], one["steps"]) for one in rows]
    assert known == [
        ("trl", 0, "vllm", 0), ("tandem", 0, "vllm", 0), ("trl", 1, "vllm", 1), ("tandem", 1, "vllm", 0),
        ("trl", 0, "transformers", 1),
    ]  # fmt: skip
    assert [one["error"] for one in rows] == ["No available memory for the cache blocks", None, None, None, None]


def test_time_to_a_reward_is_that_of_three_steps_together() -> None:
    rewards = [0.0, 2.0, 0.4, 0.6, 1.1]
    curve = [{"step": i, "samples": 8 * i, "seconds": i / 2, "reward": r} for i, r in enumerate(rewards, start=1)]
    assert learning_vs_trl.reached(curve, 0.75) == {"step": 3, "samples": 24, "seconds": 1.5}
    assert learning_vs_trl.reached(curve, 0.9) == {"step": 4, "samples": 32, "seconds": 2.0}
    assert learning_vs_trl.reached(curve, 1.2) is None
    assert learning_vs_trl.reached(curve[:2], 0.0) is None


def test_the_mean_over_seeds_leaves_failures_out() -> None:
    known = learning_vs_trl.parse(["--model", "m", "--target", "0.5"])
    steps = [{"step": 0, "samples": 0, "score": 0.1}]
    steps += [{"step": i, "samples": i, "seconds": 1.0, "parts": {"generate": 0.5}, "reward": 0.5} for i in (1, 2, 3)]
    good = learning_vs_trl.make_row(known, "trl", 0, "vllm", [*steps, {"step": 3, "samples": 3, "score": 0.7}])
    assert (good["score_before"], good["score_after"], good["seconds"], good["parts"]) == (
        0.1,
        0.7,
        3.0,
        {"generate": 1.5},
    )
    other = learning_vs_trl.make_row(known, "trl", 1, "vllm", steps[:3])
    failed = learning_vs_trl.make_row(known, "trl", 2, "vllm", [], error="it broke")
    (line,) = learning_vs_trl.summary([good, failed])
    assert (line["seeds"], line["seconds_to_target"], line["error"]) == ([0], 3.0, "it broke")
    (line,) = learning_vs_trl.summary([good, other])
    assert (line["seconds"], line["seconds_to_target"]) == (2.5, None)


# --- pinned memory ----------------------------------------------------------------------------------------------------


def test_memory_is_pinned_only_where_there_is_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "pinned_memory.py"), "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("pinned_memory.py needs a CUDA GPU, and PyTorch sees none here\n")
    assert not list(tmp_path.iterdir())


def test_arguments_of_pinned_memory() -> None:
    known = pinned_memory.parse([])
    assert (known.gib, known.ways) == (8.0, ["pool", "torch", "torch-registered"])
    assert pinned_memory.parse(["--gib", "0.0625", "--ways", "pool"]).ways == ["pool"]


@pytest.mark.parametrize("argv", [["--gib", "0"], ["--gib", "nan"], ["--gib", "0.06"], ["--ways", "malloc"]])
def test_wrong_arguments_of_pinned_memory_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        pinned_memory.parse(argv)
    assert refused.value.code == 2


def test_each_way_has_its_allocator_and_a_failure_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines_of(way: str, argv: list[str], timeout: float, *, script: str, settings: dict[str, str]) -> Iterator[str]:
        known = pinned_memory.parse(argv)
        assert (known.worker, known.gib, timeout) == (way, 2.0, 180.0)
        if way == "pool":
            yield f"ROW {json.dumps({'allocate_gib_per_s': 1.3})}"
        else:
            yield f"FAILED {json.dumps(settings['PYTORCH_CUDA_ALLOC_CONF'])}"

    monkeypatch.setattr(pinned_memory, "lines_of", lines_of)
    argv = ["--gib", "2"]
    found = [pinned_memory.row_of(way, pinned_memory.parse(argv), argv) for way in ("pool", "torch-registered")]
    assert [one["allocate_gib_per_s"] for one in found] == [1.3, None]
    assert [one["error"] for one in found] == [None, "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"]


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_kernel_speed_runs_and_records_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes an import fail, whether Liger is installed or not.
    for name in ("rms_norm", "rope", "swiglu", "fused_linear_cross_entropy"):
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    kernel_speed.main(
        ["--device", "cpu", "--small", "--repeats", "1", "--out", str(tmp_path), "--systems", "tandem", "torch",
         "liger", "rows"]
    )  # fmt: skip
    (path,) = tmp_path.glob("kernels-cpu-*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    ours = [one for one in rows if one["system"] == "tandem"]
    assert {one["kernel"] for one in ours} == set(kernel_speed.KERNELS)
    for one in rows:
        if one["system"] == "liger":
            assert "liger" in one["error"]
            assert one["seconds"] is None
            continue
        assert one["error"] is None, one
        assert one["seconds"] > 0
        assert (one["gb_per_s"] is None) != (one["tflop_per_s"] is None)
        assert one["system"] == "rows" or one["difference"] <= kernel_speed.WORST_DIFFERENCE
    assert [one["system"] for one in rows].count("rows") == 1


def test_a_wrong_result_is_an_error_and_says_so() -> None:
    case = kernel_speed.CASES["swiglu"](kernel_speed.SMALL, torch.device("cpu"))[0]
    systems = kernel_speed.CASES["swiglu"](kernel_speed.SMALL, torch.device("cpu"))[0].systems
    broken = {
        "torch": systems["torch"],
        "tandem": lambda gate, up: lambda: (gate * up,),
        "liger": lambda gate, up: lambda: (gate * torch.nan,),
        "flex": lambda gate, up: lambda: 1 / 0,
    }
    case = kernel_speed.Case(**{**vars(case), "systems": broken})
    clock = kernel_speed.Clock(torch.device("cpu"))
    rows = kernel_speed.measure_case(case, list(kernel_speed.SYSTEMS), clock, 1, 1e12, 1e15)
    errors = {one["system"]: one["error"] for one in rows}
    assert errors.pop("torch") is None
    assert "differs" in errors["tandem"]
    assert "differs from that of torch by nan" in errors["liger"]
    assert errors["flex"].startswith("ZeroDivisionError")


def test_floor_and_share() -> None:
    case = kernel_speed.CASES["rms_norm"](kernel_speed.SMALL, torch.device("cpu"))[0]
    rows, width = kernel_speed.SMALL.rows, kernel_speed.SMALL.hidden
    assert case.amount == 2 * (2 * rows * width)
    clock = kernel_speed.Clock(torch.device("cpu"))
    (one,) = kernel_speed.measure_case(case, ["torch"], clock, 3, copy=1e9, product=1e12)
    assert one["floor_seconds"] == case.amount / 1e9
    assert one["share"] == pytest.approx(one["floor_seconds"] / one["seconds"], rel=1e-2, abs=1e-4)


def test_attention_floor_counts_the_pairs_of_the_mask() -> None:
    attention = module("attention_cases")
    family = attention.pack_layout.Family((3, 8), ((8, 10), (10, 14)))
    families = [attention.pack_layout.Family((0, 3)), family]
    index = torch.arange(14)
    mask = attention._owners(families, torch.device("cpu")).sees(index[:, None], index[None, :])
    # By hand: 3 causal, 5 causal, children of 2 and 4 that see 5 more each.
    assert int(mask.sum()) == 6 + 15 + (3 + 2 * 5) + (10 + 4 * 5)
    assert sum(attention._pairs(one) for one in families) == int(mask.sum())
    assert mask[9].tolist() == [False] * 3 + [True] * 5 + [True, True] + [False] * 4
    assert mask[13].tolist() == [False] * 3 + [True] * 5 + [False, False] + [True] * 4


def test_no_script_bears_the_name_of_a_package() -> None:
    """The folder of a script comes first on the path: transformers would import benchmarks/kernels.py as kernels."""
    taken = {"kernels", "torch", "triton", "transformers", "peft", "trl", "datasets", "wandb", "rl", "rewards"}
    assert not taken & {path.stem for path in BENCHMARKS.glob("*.py")}


# Long runs, counts of faults


def test_growth_is_that_of_the_last_quarter_over_the_second():
    long_run = module("long_run")
    records = [{"memory/resident_mib": 100.0 + 2 * step, "memory/threads": 3} for step in range(1, 101)]
    found = long_run.growth(records)
    assert found["resident_mib"] == {"second_quarter": 176.0, "last_quarter": 276.0, "per_step": 2.0}
    assert found["threads"]["per_step"] == 0.0
    assert "cuda_allocated_mib" not in found


def test_faults_count_where_their_test_passed():
    import xml.etree.ElementTree as ET

    def case(name: str, faults: int, inside: str = "") -> str:
        properties = f'<properties><property name="faults" value="{faults}"/></properties>'
        return f'<testcase classname="tests.test_kill" name="{name}">{properties}{inside}</testcase>'

    tried = '<properties><property name="inputs" value="7"/></properties>'
    bad = f'<testcase classname="tests.test_bad_inputs" name="n">{tried}</testcase>'
    report = ET.fromstring(
        f"<testsuites><testsuite>{case('a', 1)}{case('b', 300)}{case('c', 5, '<failure/>')}"
        f"{case('d', 9, '<skipped/>')}{bad}</testsuite></testsuites>"
    )
    found = module("robustness").counted(report)
    assert (found["inputs"], found["faults"], found["faults_by_file"]) == (7, 301, {"kill": 301})
    assert (found["tests"], found["failed"], found["skipped"]) == (5, ["c"], ["d"])


def test_peaks_are_compared_like_with_like() -> None:
    """The allocator's peaks with the plan's but for what the allocator does not hold, in percent of the measured."""
    plan = {"CUDA context and libraries": GIB, "weights": 4 * GIB, "KV cache": 4 * GIB, "allocator's reserve": GIB // 2}
    from tandem.rl.plan import Phase

    phase = SimpleNamespace(training=lambda: Phase(plan), rollout=lambda: Phase(plan | {"CUDA graphs": GIB}))
    predicted = plan_peaks.predictions(phase)
    assert predicted["update"] == {"peak_allocated": 8, "reserved": 8.5, "device": 9.5}
    assert predicted["rollout"] == {"peak_allocated": 8, "reserved": 8.5, "device": 10.5}
    measured = {
        "update": {"peak_allocated": 7.5, "reserved": 10.0},
        "rollout": {"peak_allocated": 8.0, "reserved": 8.5},
    }
    row = {"case": 0, "name": "one", "error": None, "measured_gib": measured}
    row["predicted_gib"] = predicted
    row |= plan_peaks.errors(row)
    assert row["error_percent"] == {
        "update": {"peak_allocated": 6.7, "reserved": -15.0},
        "rollout": {"peak_allocated": 0.0, "reserved": 0.0},
    }
    failed = {"case": 1, "name": "two", "error": "out of memory"}
    found = plan_peaks.summary([row, failed | plan_peaks.errors(failed)])
    assert (found["configurations"], found["failed"]) == (2, 1)
    assert found["reserved"] == {"peaks": 2, "within_10_percent": 1, "worst": ["one", "update", -15.0]}
    assert found["device"] == {"peaks": 0, "within_10_percent": 0, "worst": None}


def test_the_plan_still_says_what_was_measured() -> None:
    """Peaks of ten configurations on a GPU, stored; whoever changes the plan sees here what that does to them."""
    newest = sorted((BENCHMARKS / "results").glob("plan-peaks-h*.json"))[-1]
    rows = json.loads(newest.read_text(encoding="utf-8"))["rows"]
    assert sorted(row["case"] for row in rows) == list(range(len(plan_peaks.CASES)))
    for row in rows:
        case = plan_peaks.CASES[row["case"]]
        assert row["name"] == case.name
        predicted = plan_peaks.predictions(plan_peaks.plan_on(case, "h200"))
        assert predicted == row["predicted_gib"], "python benchmarks/plan_peaks.py --again FILE puts them into the file"
        for by_kind in plan_peaks.errors(row)["error_percent"].values():
            assert max(abs(by_kind["reserved"]), abs(by_kind["peak_allocated"])) <= plan_peaks.LIMIT


def test_what_a_run_took_is_put_beside_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a GPU's worker does after its steps, on a plan of the true config and peaks that are made up."""
    from tandem.rl import plan_devices
    from tandem.rl.config_file import load_config
    from tandem.rl.plan import Longest
    from tandem.rl.plan_shape import read_shape
    from tandem.rl.plan_sizing import choose_sizes

    monkeypatch.setattr(plan_devices, "local_device", lambda: plan_devices.find_device("h200", host_gib=64))
    case = plan_peaks.CASES[1]
    (tmp_path / "config.json").write_text(json.dumps(module("random_checkpoint").SHAPES["qwen3-8b"]))
    settings, overrides = plan_peaks.settings_of(case, tmp_path, str(tmp_path), on_gpu=True)
    (tmp_path / "step.yaml").write_text(json.dumps(settings))
    config = load_config(tmp_path / "step.yaml", overrides)
    longest = Longest(case.prompt, case.completion)
    sized = choose_sizes(read_shape(config.model), config, plan_devices.local_device(), longest=longest).config
    sizes = {"trial": 9, "update": 8, "rollout": 12}
    peaks = {name: {"peak_allocated": size, "reserved": size + 1, "device": 50} for name, size in sizes.items()}
    run = SimpleNamespace(
        config=sized,
        inputs=SimpleNamespace(data=SimpleNamespace(prompts=[SimpleNamespace(ids=[0] * case.prompt)], eval_prompts=[])),
        engine=SimpleNamespace(asleep_bytes=5 * GIB),
        lm=SimpleNamespace(fused=SimpleNamespace(host_bytes=19 * GIB)),
    )
    found = plan_peaks.compared(run, peaks)
    assert found["measured_gib"]["update"] == {"peak_allocated": 9, "reserved": 10, "device": 50}, (
        "the trial's, the higher"
    )
    assert found["measured_gib"]["rollout"]["peak_allocated"] == 12
    assert found["pack_tokens"] == case.prompt + case.generations * case.completion, "the prompt once for its group"
    assert found["host_gib"]["predicted"] == pytest.approx(19, rel=0.05)
    assert (found["host_gib"]["measured"], found["kv_pool_gib"]) == (19, 5)
    for phase, one in found["predicted_gib"].items():
        assert one["device"] == pytest.approx(sum(found["items"][phase].values()), abs=0.02)
        assert one["peak_allocated"] < one["reserved"] < one["device"]
    json.dumps(found)


def test_configurations_run_at_once_as_far_as_the_card_holds_them() -> None:
    room, events = plan_peaks.Room(10.0), []

    def late(gib: float) -> None:
        with room.lent(gib):
            events.append(gib)

    with room.lent(4), room.lent(6):
        waiting = [threading.Thread(target=late, args=(gib,)) for gib in (1.0, 50.0)]
        for thread in waiting:
            thread.start()
        waiting[0].join(0.2)
        assert events == []
    for thread in waiting:
        thread.join(10)
    assert sorted(events) == [1.0, 50.0], "more than all there is means alone"


def test_a_checkpoint_that_cannot_be_made_is_said_and_not_waited_for(tmp_path: Path) -> None:
    plan_peaks.make_checkpoint(("tiny", "bf17", 64), tmp_path / "tiny")
    with pytest.raises(RuntimeError, match=r"(?s)no checkpoint tiny: .*invalid choice: 'bf17'"):
        plan_peaks.wait_for(tmp_path / "tiny")
    plan_peaks.make_checkpoint(("tiny", "bf16", 64), tmp_path / "whole")
    plan_peaks.wait_for(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_plan_peaks_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    """Its checkpoint is made, two steps are run in a process of their own, and nothing is claimed of memory."""
    plan_peaks.main(["--cases", "9", "--together", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("plan-peaks-cpu-*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    (row,) = content["rows"]
    assert (row["error"], row["engine"], len(row["step_seconds"])) == (None, "transformers", 2)
    assert content["summary"]["reserved"]["peaks"] == 0
    assert "predicted_gib" not in row
