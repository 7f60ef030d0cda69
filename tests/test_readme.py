"""What the README says about results stands in the results' files."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_table_is_that_of_the_newest_result():
    module = benchmark("learning")
    newest = sorted((ROOT / "benchmarks" / "results").glob("demo-cpu-*.json"))[-1]
    table = module.table(json.loads(newest.read_text(encoding="utf-8")), newest)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(module.BEGIN)[2].partition(module.END)[0].strip() == table


def test_the_tables_of_updates_and_rollouts_are_those_of_the_stored_results():
    module = benchmark("readme_tables")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(module.BEGIN)[2].partition(module.END)[0].strip() == module.update_table()
    rollouts = text.partition(module.ROLLOUT_BEGIN)[2].partition(module.ROLLOUT_END)[0].strip()
    assert rollouts == module.rollout_table()
    assert text.partition(module.LONG_BEGIN)[2].partition(module.LONG_END)[0].strip() == module.long_table()
    kernels = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    table = kernels.partition(module.KERNELS_BEGIN)[2].partition(module.KERNELS_END)[0].strip()
    assert table == module.kernel_table()


def test_what_is_told_of_whole_steps_and_peaks_is_in_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    steps = [
        json.loads(p.read_text("utf-8")) for p in sorted((ROOT / "benchmarks" / "results").glob("grpo-step-h*.json"))
    ]
    for peer, ours_said in (("unsloth", "takes {:.1f} s on an H200"), ("trl-awake", "it took {:.1f} s and TRL")):
        summaries = [{row["system"]: row for row in one["summary"]} for one in steps]
        summary = next(one for one in reversed(summaries) if peer in one)
        ours, theirs = summary["tandem"], summary[peer]
        assert ours_said.format(ours["seconds"]) in text
        assert f"{theirs['seconds']:.1f} s: {theirs['seconds'] / ours['seconds']:.2f} times as long" in text
        if peer == "unsloth":
            assert f"{ours['parts']['generate']:.1f} of them in rollout" in text
        else:
            assert f"in {ours['seconds']:.0f} s, where TRL with vLLM takes {theirs['seconds']:.0f} s" in text
    newest = sorted((ROOT / "benchmarks" / "results").glob("plan-peaks-h*.json"))[-1]
    peaks = json.loads(newest.read_text("utf-8"))["summary"]
    assert peaks["failed"] == 0
    assert peaks["configurations"] == 10
    assert f"within {peaks['peak_allocated']['worst'][2]}% of it" in text
    newest = sorted((ROOT / "benchmarks" / "results").glob("rollout-h200-2*.json"))[-1]
    assert newest.name in text
    rates = {
        (row["system"], row["batch"]): row["decode_tokens_per_s"]
        for row in json.loads(newest.read_text("utf-8"))["rows"]
        if row["kind"] == "decode"
    }
    assert f"{rates['tandem-int4', 64] / rates['vllm-bnb', 64]:.2f} times the rate of stock vLLM" in text


def test_what_is_told_of_learning_beside_trl_is_in_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    runs = [stored(f"learning-vs-trl-h200-2026-11-30-{time}.json") for time in ("0957", "1510")]
    ours, theirs = (
        [next(one for one in run["summary"] if one["system"] == system) for run in runs] for system in ("tandem", "trl")
    )
    assert [one["seeds"] for one in (*ours, *theirs)] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    for key, words in (
        (
            "seconds",
            "{:.1f} and {:.1f} s for 40 steps and TRL {:.1f} and {:.1f} s (means of four seeds each), {:.1f} times",
        ),
        ("seconds_to_target", "after {:.1f} and {:.1f} s of steps, and {:.1f} and {:.1f} s: {:.1f} times as long"),
    ):
        numbers = [one[key] for one in (*ours, *theirs)]
        assert words.format(*numbers, sum(numbers[2:]) / sum(numbers[:2])) in text, key
    means = {
        (row["system"], row["seed"]): fmean(point["reward"] for point in row["curve"])
        for run in runs
        for row in run["rows"]
        if row["curve"]
    }
    apart = [means["tandem", seed] - means["trl", seed] for seed in range(8)]
    assert f"mean reward is {fmean(apart):.3f} ± {stdev(apart) / 8**0.5:.3f} (standard error) above TRL's" in text
    reached = [fmean(one["samples_to_target"] for one in both) for both in (ours, theirs)]
    assert reached[0] / reached[1] == pytest.approx(1, abs=0.05), "after as many samples"
    profiles = [stored(f"profile-step-h200-2026-11-30-{time}.json") for time in ("1524", "1525")]
    before, after = (profile["parts"]["generate"] for profile in profiles)
    assert f"generation takes {after:.2f} in place of {before:.2f} s of a step" in text


def stored(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def digits(value: float) -> str:
    """Two that say something."""
    return f"{value:.2g}" if value < 0.0095 else f"{value:.3f}" if value < 0.095 else f"{value:.2f}"


def test_what_is_told_of_engine_and_trainer_apart_is_in_the_results():
    text = (ROOT / "docs" / "rounding.md").read_text(encoding="utf-8").replace("\n", " ")
    found = {}
    for name, dtype in (("smollm2-2026-11-30-1500", "bfloat16"), ("smollm2-float16-2026-11-30-1503", "float16")):
        for row in stored(f"rollout-h200-{name}.json")["rows"]:
            if row["kind"] == "parity":
                found[dtype, row["system"], row["what"]] = row
    for label, dtype, format in (
        ("bfloat16", "bfloat16", "bf16"),
        ("NF4, in bfloat16", "bfloat16", "nf4"),
        ("float16", "float16", "bf16"),
        ("NF4, in float16", "float16", "nf4"),
    ):
        system, stock = f"tandem-{format}", "vllm-bf16" if format == "bf16" else "vllm-bnb"
        first, moved = (found[dtype, system, what] for what in ("first step", "after an update"))
        line = f"| {label} | {digits(first['median'])} | {digits(first['p99'])} | "
        line += f"{digits(moved['median'])}, {digits(moved['p99'])} | "
        assert line in text, line
        if (dtype, format) != ("float16", "nf4"):
            theirs = found[dtype, system, f"{stock} against transformers, same weights"]
            assert f"{line}{digits(theirs['median'])}, {digits(theirs['p99'])} |" in text
        if dtype == "float16":
            assert max(first["median"], moved["median"]) <= 0.01
            assert max(first["p99"], moved["p99"]) <= 0.1
    bare = found["bfloat16", "tandem-bf16", "first step"]
    within: dict[str, list[float]] = {}
    medians: dict[str, list[float]] = {}
    for dtype, name in (("float16", "learning16-h200"), ("bfloat16", "learning-vs-trl-h200")):
        (path,) = (ROOT / "benchmarks" / "results").glob(f"{name}-2026-11-30-151*.json")
        rows = [row for row in stored(path.name)["rows"] if row["system"] == "tandem" and row["curve"]]
        within[dtype] = [step["apart"]["p99"] for row in rows for step in row["curve"]]
        medians[dtype] = [step["apart"]["median"] for row in rows for step in row["curve"]]
    assert [len(steps) for steps in within.values()] == [160, 160]
    largest = max(within["float16"]), max(medians["float16"])
    assert "at most {:.3f} and the median at most {:.5f} in each of 40 steps".format(*largest) in text
    largest = max(within["bfloat16"]), max(medians["bfloat16"])
    assert "up to {:.2f} and {:.4f} in bfloat16".format(*largest) in text
    assert f"within 0.1 in {sum(one <= 0.1 for one in within['bfloat16'])} of 160 steps" in text
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    halves = found["float16", "tandem-bf16", "first step"]
    assert f"{digits(bare['median'])} in the median in bfloat16 and by {digits(halves['median'])} in float16" in readme


def test_what_is_told_of_rounding_alike_is_in_the_results():
    text = (ROOT / "docs" / "rounding.md").read_text(encoding="utf-8").replace("\n", " ")
    probe = stored("rounding-alike-h200-2026-11-30.json")

    def of(model: str, engine: str, what: str, places: int = 3) -> tuple[str, str]:
        (one,) = (
            p["found"][what]
            for p in probe["probes"]
            if (p["model"], p["engine"], p["dtype"]) == (model, engine, "bfloat16") and what in p["found"]
        )
        return f"{one['median']:.{places}f}", f"{one['p99']:.3f}"

    def told(words: str, pairs: list[tuple[str, str]]) -> bool:
        return words.format(*(" and ".join(pair) for pair in pairs)) in text

    large, small, own = "qwen3-8b random", "smollm2", "graphs of vLLM's own kernels"
    pairs = [
        of(model, engine, f"first step: tables in {where}")
        for model in (large, small)
        for engine, where in (("compiled, the compiler's norms", "float32"), (own, "the compute type"))
    ]
    shape = "on Qwen3-8B's shape with random weights in NF4"
    assert told(f"take {{}} (median, 99th percentile) to {{}} {shape}, and {{}} to {{}} on SmolLM2", pairs)
    pairs = [
        of(model, own, f"B of 0.01: {how}", places)
        for model, places in ((large, 3), (small, 4))
        for how in ("one product", "split adapters")
    ]
    assert told("takes {} after an update to {} on the random shape, and {} to {} on SmolLM2", pairs)
    pairs = [of(model, own, "B of 0.01: transformers") for model in (large, small)]
    assert told("peft's model is {}, {} from the same engines", pairs)
    ranges: list[float] = []
    for is_small in (False, True):
        longer = []
        for rows in (512, 4096, 16384):
            one_ms = split_ms = 0.0
            for one in probe["products"]:
                if one["rows"] == rows and ("small" in one["projection"]) == is_small:
                    kind = "" if one["projection"].removeprefix("small ") in ("qkv", "gate_up") else "_and_residual"
                    one_ms += one[f"one_product{kind}_ms"]
                    split_ms += one[f"split{kind}_ms"]
            longer.append(100 * (split_ms / one_ms - 1))
        ranges += [min(longer), max(longer)]
    said = re.search(r"by (\d+) to (\d+)% on that shape and by (\d+) to (\d+)% on SmolLM2's", text)
    assert said is not None
    assert [int(number) for number in said.groups()] == pytest.approx(ranges, abs=0.6)
    after, before = (
        {row["what"]: row for row in stored(f"rollout-h200-{name}.json")["rows"] if row["system"] == "tandem-nf4"}
        for name in ("own-kernels-2026-11-30-1519", "stock-2026-11-30-1500")
    )
    now = after["first step"]
    assert (f"{now['median']:.3f}", f"{now['p99']:.3f}") == of(large, own, "first step: split adapters")
    ratio = after["after an update"]["median"] / before["after an update"]["median"]
    assert ratio == pytest.approx(1, abs=0.02), "they alone gain nothing"


def test_what_is_told_of_greedy_tokens_is_in_the_results():
    text = (ROOT / "docs" / "rounding.md").read_text(encoding="utf-8").replace("\n", " ")
    files = [stored(f"rollout-h200-{name}-2026-11-30-1500.json")["rows"] for name in ("smollm2", "stock")]
    shares = [
        {(row["system"], row["batch"]): row["share"] for row in rows if row["kind"] == "agreement"} for rows in files
    ]
    stock = [share for one in shares for (system, _), share in one.items() if system.endswith("-stock")]
    assert stock == [1.0] * 6
    usual = sorted(shares[0][system, 64] for system in ("tandem-nf4", "tandem-bf16"))
    assert f"{usual[0] * 100:.0f} to {usual[1]:.0%} of 64 prompts on SmolLM2, none on the random shape" in text
    assert shares[1]["tandem-nf4", 64] == 0
    rates = {row["system"]: row["decode_tokens_per_s"] for row in files[1] if row["kind"] == "decode"}
    assert f"at {rates['tandem-nf4-stock'] / rates['vllm-bnb']:.2f} times its rate for 32 sequences" in text


def test_the_floor_of_bfloat16_is_in_the_results():
    text = (ROOT / "docs" / "rounding.md").read_text(encoding="utf-8").replace("\n", " ")
    found = []
    for name in ("rounding-floor-h*.json", "rounding-floor-nf4-h*.json"):
        path = sorted((ROOT / "benchmarks" / "results").glob(name))[-1]
        assert path.name in text
        floor = json.loads(path.read_text(encoding="utf-8"))
        apart = floor["log_probs"]["bfloat16, another order of sums"]
        found.append((apart["median"], apart["p99"], floor["greedy"]["another order of sums"]["equal"]))
    (median, p99, equal), (nf4_median, nf4_p99, nf4_equal) = found
    assert f"is {median:.3f} from itself ({nf4_median:.3f} after NF4), {p99:.2f} ({nf4_p99:.2f}) at the 99th" in text
    assert f"on {equal:.0%} ({nf4_equal:.0%}) of prompts" in text


def test_the_table_of_the_sandbox_is_that_of_the_newest_result():
    module = benchmark("sandbox")
    newest = sorted((ROOT / "benchmarks" / "results").glob("sandbox-cpu-*.json"))[-1]
    result = json.loads(newest.read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "sandbox.md").read_text(encoding="utf-8")
    assert text.partition(module.BEGIN)[2].partition(module.END)[0].strip() == module.table(result, newest)
    assert all(row["programs"] >= 2000 and row["cores"] == 2 for row in result["rows"])


def test_the_scores_of_examples_are_those_of_their_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for example in ("code_reward", "calculator_tool", "guessing_game"):
        newest = sorted((ROOT / "benchmarks" / "results").glob(f"{example}-cpu-*.json"))[-1]
        (row,) = json.loads(newest.read_text(encoding="utf-8"))["rows"]
        told = text.partition(f"examples/{example}.yaml")[2].partition(newest.name)[0]
        for words in (f"from {row['score_before']:.2f} to {row['score_after']:.2f}", f"{row['seconds']:.0f} s"):
            assert words in " ".join(told.split()), example
        assert row["seconds"] < 600


def test_the_demo_on_a_gpu_learns_alike_in_both_ways():
    newest = sorted((ROOT / "benchmarks" / "results").glob("demo-h100-*.json"))[-1]
    rows = json.loads(newest.read_text(encoding="utf-8"))["rows"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for system in ("tandem", "tandem-plain"):
        scores = [row["score_after"] for row in rows if row["system"] == system]
        assert ", ".join(f"{score:.2f}" for score in scores) in text


def test_every_seed_of_the_demo_gains_a_quarter():
    newest = sorted((ROOT / "benchmarks" / "results").glob("demo-cpu-*.json"))[-1]
    rows = json.loads(newest.read_text(encoding="utf-8"))["rows"]
    assert len({row["seed"] for row in rows}) >= 3
    assert all(row["score_after"] - row["score_before"] >= 0.25 for row in rows)


def test_what_is_tried_and_injected_is_what_a_run_of_the_tests_reported():
    module = benchmark("robustness")
    newest = sorted((ROOT / "benchmarks" / "results").glob("robustness-cpu-*.json"))[-1]
    result = json.loads(newest.read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(module.BEGIN)[2].partition(module.END)[0].strip() == module.sentence(result, newest)
    assert result["failed"] == []
    assert result["faults"] == sum(result["faults_by_file"].values())


def test_what_is_said_of_a_long_run_is_in_the_results():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    long = stored("long_run-h200-2026-11-30.json")
    grown = {name: one["last_quarter"] - one["second_quarter"] for name, one in long["growth"].items()}
    assert long["steps"] == 200
    assert f"the host's by {grown['resident_mib']:.0f} MiB" in text
    assert grown["cuda_allocated_mib"] == grown["cuda_reserved_mib"] == 0
