"""What the README says about results stands in the results' files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

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


def test_what_is_told_of_whole_steps_learning_peaks_and_rounding_are_those_of_the_stored_results():
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
    newest = sorted((ROOT / "benchmarks" / "results").glob("learning-vs-trl-h*.json"))[-1]
    learning = json.loads(newest.read_text("utf-8"))
    ours, theirs = (
        next(one for one in learning["summary"] if (one["system"], one["engine"]) == which)
        for which in (("tandem", "vllm"), ("trl", "vllm"))
    )
    assert [len(one["seeds"]) for one in (ours, theirs)] == [4, 4]
    assert f"takes Tandem {ours['seconds']:.1f} s for 40 steps and TRL {theirs['seconds']:.1f} s" in text
    assert f"{theirs['seconds_to_target'] / ours['seconds_to_target']:.1f} times as long" in text
    assert 2.9 < theirs["seconds_to_target"] / ours["seconds_to_target"] < 3.3, "a third of TRL's time"
    assert 0.8 < ours["samples_to_target"] / theirs["samples_to_target"] < 1.2, "after as many samples"
    assert f"after {ours['seconds_to_target']:.1f} and {theirs['seconds_to_target']:.1f} s of steps" in text
    early, all_of_it = (
        [
            [fmean(point["reward"] for point in row["curve"][:steps])
             for row in learning["rows"] if row["system"] == system and row["curve"]]
            for system in ("tandem", "trl")
        ]
        for steps in (10, 40)
    )  # fmt: skip
    assert [len(seeds) for seeds in early] == [4, 4]
    words = [f"{fmean(seeds):.2f} ± {stdev(seeds):.2f}" for seeds in early]
    assert f"the first 10 steps is {words[0]} and {words[1]}" in text
    assert f"of 40 steps {fmean(all_of_it[0]):.2f} and {fmean(all_of_it[1]):.2f}" in text
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


def test_what_is_said_of_float16_and_of_a_long_run_is_in_the_results():
    text, plan = (" ".join((ROOT / name).read_text("utf-8").split()) for name in ("README.md", "docs/plan.md"))
    results = ROOT / "benchmarks" / "results"
    stored = json.loads((results / "float16-h200-2026-11-30.json").read_text("utf-8"))
    runs, check = stored["runs"], stored["check"]
    assert f"{check['float16']['p99']:.3f} against {check['bfloat16']['p99']:.2f} at the 99th percentile" in text
    apart = [step["apart"] for run in runs for step in run["steps"]]
    assert [len(run["steps"]) for run in runs] == [20, 20]
    assert f"at most {max(one['p99'] for one in apart):.3f} at the 99th percentile in every step" in text
    assert f"percentile was at most {max(one['p99'] for one in apart):.3f} in each of 20 steps" in plan
    assert max(one["median"] for one in apart) <= 0.0002
    learning = json.loads((results / "learning-vs-trl-h200-2026-11-30-0957.json").read_text("utf-8"))
    (same,) = (row for row in learning["rows"] if (row["system"], row["seed"]) == ("tandem", 0))
    steps = [step["apart"] for step in same["curve"][:20]]
    largest = max(step["p99"] for step in steps), max(step["median"] for step in steps)
    assert f"up to {largest[0]:.2f} and {largest[1]:.3f} in bfloat16" in plan
    long = json.loads((results / "long_run-h200-2026-11-30.json").read_text("utf-8"))
    grown = {name: one["last_quarter"] - one["second_quarter"] for name, one in long["growth"].items()}
    assert long["steps"] == 200
    assert f"the host's by {grown['resident_mib']:.0f} MiB" in text
    assert grown["cuda_allocated_mib"] == grown["cuda_reserved_mib"] == 0
