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
NAMES = {
    "tandem": "Tandem",
    "tandem-no-offload": "Tandem, nothing in host memory",
    "trl": "TRL",
    "trl-offload": "TRL, checkpoints in host memory",
    "unsloth": "Unsloth",
}


def main() -> None:
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{update_table()}\n{END}{after}", encoding="utf-8")


def results() -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("update-h100-*.json"))]


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


def _measured(result: dict[str, Any]) -> set[str]:
    return {row["system"] for row in result["rows"] if not row["error"]}


def _counts(row: dict[str, Any]) -> bool:
    return bool(row["system"] == "tandem" and row["cap_gib"] and not row["error"])


def _link(path: Path) -> str:
    return f"[{path.name}]({path.relative_to(ROOT).as_posix()})"


if __name__ == "__main__":
    main()
