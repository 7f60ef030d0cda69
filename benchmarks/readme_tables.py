"""Puts the figures of stored GPU results between the README's markers, so that what it says is what was measured.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- update-results -->", "<!-- /update-results -->"
KERNELS_BEGIN, KERNELS_END = "<!-- kernel-results -->", "<!-- /kernel-results -->"
LONG_BEGIN, LONG_END = "<!-- long-results -->", "<!-- /long-results -->"
ROLLOUT_BEGIN, ROLLOUT_END = "<!-- rollout-results -->", "<!-- /rollout-results -->"
NAMES = {
    "tandem": "Tandem, in the memory that is free",
    "tandem-no-offload": "Tandem, nothing in host memory",
    "tandem-no-projections": "Tandem, as little memory as possible",
    "trl": "TRL",
    "trl-offload": "TRL, checkpoints in host memory",
    "unsloth": "Unsloth",
}


def main() -> None:
    fill(ROOT / "README.md", BEGIN, END, update_table())
    fill(ROOT / "README.md", LONG_BEGIN, LONG_END, long_table())
    fill(ROOT / "README.md", ROLLOUT_BEGIN, ROLLOUT_END, rollout_table())
    fill(ROOT / "docs" / "kernels.md", KERNELS_BEGIN, KERNELS_END, kernel_table())


def fill(path: Path, begin: str, end: str, table: str) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    path.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def results() -> list[tuple[Path, dict[str, Any]]]:
    return [
        (path, json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(RESULTS.glob("update-*.json"), key=_date)
    ]


def update_table() -> str:
    """The newest run in which peers stand beside Tandem, and the longest update of any run under a cap."""
    found = results()
    path, newest = [one for one in found if {"tandem", "trl", "unsloth"} <= _measured(one[1])][-1]
    rows = [row for row in newest["rows"] if not row["error"]]
    lengths = sorted({row["length"] for row in rows})
    slopes = {one["system"]: one["bytes_per_token"] for one in newest["slopes"]}
    lines = ["| | " + " | ".join(f"{length:,} tokens" for length in lengths) + " | memory per token |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for system in dict.fromkeys(row["system"] for row in rows):
        by_length = {row["length"]: row for row in rows if row["system"] == system}
        cells = [
            f"{by_length[n]['seconds']:.2f} s, {by_length[n]['peak_allocated_gib']:.1f} GiB" if n in by_length else "–"
            for n in lengths
        ]
        name, release = NAMES.get(system, system), newest["versions"].get(system)
        cells.append(f"{slopes[system] / 1000:.0f} KB" if system in slopes else "–")
        lines.append(f"| {name} {release or ''}".rstrip() + " | " + " | ".join(cells) + " |")
    lines += ["", f"{newest['device']}, torch {newest['versions']['torch']}; from {_link(path)}."]
    long_path, long = max(
        ((p, row) for p, result in found for row in result["rows"] if _counts(row)), key=lambda one: one[1]["length"]
    )
    lines += [
        "",
        f"The longest update measured so far with the allocator capped at {long['cap_gib']:.0f} GiB: "
        f"{long['length']:,} tokens in {long['seconds']:.0f} s, {long['peak_allocated_gib']:.1f} GiB at the peak "
        f"({_link(long_path)}).",
    ]
    return "\n".join(lines)


def kernel_table() -> str:
    """Each kernel of the newest run: milliseconds and the share of the floor that is reached, ours beside others."""
    path = max(RESULTS.glob("kernels-*.json"), key=_date)
    result = json.loads(path.read_text(encoding="utf-8"))
    systems = ["tandem", "torch", "torch.compile", "liger", "other"]
    lines = ["| kernel | sizes | " + " | ".join(systems) + " |", "|---" * (len(systems) + 2) + "|"]
    cases = dict.fromkeys((row["kernel"], row["case"]) for row in result["rows"])
    for kernel, case in cases:
        cells = dict.fromkeys(systems, "–")
        for row in result["rows"]:
            if (row["kernel"], row["case"]) != (kernel, case) or not row.get("seconds"):
                continue
            known = row["system"] in systems
            text = f"{row['seconds'] * 1e3:.2f} ({row['share']:.0%})" + ("" if known else f" {row['system']}")
            name = row["system"] if known else "other"
            cells[name] = text if cells[name] == "–" else f"{cells[name]}, {text}"
        lines.append(f"| {kernel} | {case} | " + " | ".join(cells.values()) + " |")
    rates = f"{result['copy_gb_per_s']:,.0f} GB/s copied, {result['product_tflop_per_s']:.0f} TFLOP/s multiplied"
    relative = path.relative_to(ROOT).as_posix()
    return "\n".join([*lines, "", f"{result['device']}, {rates}; from [{path.name}](../{relative})."])


def rollout_table() -> str:
    """Decoding of the newest run with stock vLLM beside two weight formats, and the phases of a step."""
    for path in sorted(RESULTS.glob("rollout-*.json"), key=_date, reverse=True):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rates = {(r["system"], r["batch"]): r["decode_tokens_per_s"] for r in rows if r["kind"] == "decode"}
        if {"vllm-bnb", "tandem-nf4", "tandem-int4"} <= {system for system, _ in rates}:
            break
    batches = sorted({batch for _, batch in rates})
    lines = ["| sequences | " + " | ".join(map(str, batches)) + " |", "|---" * (len(batches) + 1) + "|"]
    names = {"vllm-bnb": "vLLM, bitsandbytes", "tandem-nf4": "Tandem, NF4", "tandem-int4": "Tandem, int4"}
    for system, name in names.items():
        cells = []
        for batch in batches:
            rate, stock = rates[system, batch], rates["vllm-bnb", batch]
            cells.append(f"{rate:,.0f}" + ("" if system == "vllm-bnb" else f" ({rate / stock:.2f}×)"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    phases = next(r for r in rows if r["kind"] == "phases" and r["system"] == "tandem-nf4")
    lines += [
        "",
        f"Between rollout and update: {phases['sleep_ms']:.1f} ms to sleep, {phases['wake_ms']:.1f} ms to wake, "
        f"{phases['push_ms']:.1f} ms to hand the adapter over (medians of {phases['cycles']} cycles, after which "
        f"{phases['drift_mib']:.0f} MiB more were in use).",
    ]
    return "\n".join(lines)


def long_table() -> str:
    """Of every cap the longest whole step that came to its end, the newest of several."""
    found: dict[float, tuple[Path, dict[str, Any], dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("grpo-step-*.json"), key=_date):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            cap, before = row["cap_gib"], found.get(row["cap_gib"])
            if cap and row["step"] and not row["error"] and (not before or row["context"] >= before[2]["context"]):
                found[cap] = path, result, row
    lines = [
        "| memory | prompt + completions | KV cache | device, at the peak | rollout | check | update | whole step |"
    ]
    lines.append("|---" * 8 + "|")
    for cap, (path, result, row) in sorted(found.items()):
        parts, cache = row["parts"], "fp8" if "kv_cache_dtype=fp8" in result["command"] else "bf16"
        cells = [
            f"{cap:.0f} GiB", f"{row['prompt_tokens']:,} + {row['generations']} × {row['completion_tokens']:,}", cache,
            f"{row['device_gib']:.1f} GiB", *(f"{parts[name]:.0f} s" for name in ("generate", "parity", "backward")),
            f"{row['seconds']:.0f} s ({_link(path)})",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _date(path: Path) -> str:
    """BENCHMARK-DEVICE[-MODEL]-YEAR-MONTH-DAY-TIME.json: the newest last, whatever the device."""
    return "-".join(path.stem.split("-")[-4:])


def _measured(result: dict[str, Any]) -> set[str]:
    return {row["system"] for row in result["rows"] if not row["error"]}


def _counts(row: dict[str, Any]) -> bool:
    return bool(row["system"] == "tandem" and row["cap_gib"] and not row["error"])


def _link(path: Path) -> str:
    return f"[{path.name}]({path.relative_to(ROOT).as_posix()})"


if __name__ == "__main__":
    main()
