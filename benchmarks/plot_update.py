"""What follows from the rows of the update benchmark: bytes per token, ratios to Tandem, and their picture.

`benchmarks/update.py` calls this; `python benchmarks/update.py --plot FILE.json …` draws stored results again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
REFERENCE = "tandem"
GIB = 2**30
# Okabe and Ito's palette, which colour-blind readers tell apart, and a grey; markers say the same once more.
STYLES = {
    "tandem": ("#0072B2", "o"),
    "tandem-no-offload": ("#56B4E9", "D"),
    "tandem-recompute": ("#009E73", "P"),
    "tandem-save-attention": ("#F0E442", "X"),
    "tandem-plain": ("#000000", "v"),
    "tandem-no-projections": ("#999999", "h"),
    "trl": ("#D55E00", "s"),
    "trl-offload": ("#E69F00", "d"),
    "unsloth": ("#CC79A7", "^"),
}
OTHER_STYLE = ("#777777", "*")
DASHES = ("-", "--", ":", "-.")


class Series(NamedTuple):
    """Rows that belong on one line."""

    system: str
    label: str | None
    model: str
    cap_gib: float | None


def series(rows: Iterable[Row]) -> dict[Series, list[Row]]:
    """Rows by line, by length; rows that never came to a length are left out."""
    found: dict[Series, list[Row]] = {}
    for row in rows:
        if row["length"] is not None:
            found.setdefault(Series(row["system"], row.get("label"), row["model"], row["cap_gib"]), []).append(row)
    return {key: sorted(members, key=lambda row: row["length"]) for key, members in found.items()}


def slopes(rows: Iterable[Row]) -> list[Row]:
    """GPU memory as a line over the length, by least squares, for every system with two lengths of one cap or more."""
    found = []
    for key, members in series(rows).items():
        points = [(row["length"], row["peak_allocated_gib"] * GIB) for row in members if measured(row)]
        mean_x = sum(x for x, _ in points) / len(points) if points else 0.0
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        if not spread:
            continue
        mean_y = sum(y for _, y in points) / len(points)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
        fixed = round((mean_y - slope * mean_x) / GIB, 3)
        lengths = [x for x, _ in points]
        found.append(key._asdict() | {"lengths": lengths, "bytes_per_token": round(slope), "fixed_gib": fixed})
    return found


def ratios(rows: Iterable[Row]) -> list[Row]:
    """Seconds of every system over Tandem's of the same length, model and cap; give the rows of one run only."""
    found: dict[tuple[str, float | None, int], dict[str, float]] = {}
    for row in rows:
        if measured(row):
            found.setdefault((row["model"], row["cap_gib"], row["length"]), {})[row["system"]] = row["seconds"]
    result = []
    for (model, cap, length), seconds in sorted(found.items(), key=lambda item: (item[0][0], item[0][2])):
        if (base := seconds.get(REFERENCE)) is not None:
            others = {name: round(value / base, 3) for name, value in seconds.items() if name != REFERENCE}
            result.append({"model": model, "cap_gib": cap, "length": length, "ratio_to_tandem": others})
    return result


def summary(result: Row) -> list[str]:
    """The slopes and ratios of a stored result, a line each."""
    lines = []
    for one in result["slopes"]:
        name = title(Series(one["system"], one["label"], one["model"], one["cap_gib"]), with_cap=True)
        span = f"{short(one['lengths'][0])} to {short(one['lengths'][-1])} tokens"
        lines.append(f"{name}: {one['bytes_per_token'] / 1e3:.1f} KB per token + {one['fixed_gib']:.2f} GiB ({span})")
    for one in result["ratios"]:
        cap = "" if one["cap_gib"] is None else f", cap {one['cap_gib']:g} GiB"
        others = " · ".join(f"{name} {value:.2f}" for name, value in one["ratio_to_tandem"].items())
        lines.append(f"ratio to tandem at {short(one['length'])} tokens{cap}: {others or 'nothing to compare'}")
    return lines


def merged(paths: list[Path]) -> Row:
    """One result of several files; where two hold the same measurement, that of the file named later stays.

    Raises:
        ValueError: the files come from different devices or are of another benchmark.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if result.get("bench") != "update":
            raise ValueError(f"{path.name} holds no results of the update benchmark")
        if result["device"] != results[0]["device"]:
            raise ValueError(
                f"{paths[0].name} was measured on {results[0]['device']} and {path.name} on {result['device']}: "
                "times of different devices do not belong into one picture"
            )
    rows: dict[Any, Row] = {}
    for row in (row for result in results for row in result["rows"]):
        rows[(row["system"], row.get("label"), row["model"], row["cap_gib"], row["length"])] = row
    return results[-1] | {"rows": list(rows.values())}


def draw(result: Row, target: Path) -> None:
    """Write the picture: seconds over tokens on the left, peak memory over tokens on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = series(result["rows"])
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    seconds, memory = figure.subplots(1, 2)
    handles = []
    crosses: Counter[int] = Counter()
    for key, members in lines.items():
        style = style_of(key, lines) | {"label": title(key, with_cap=several(lines, "cap_gib"))}
        if several(lines, "model"):
            style["label"] += f", {key.model}"
        good = [row for row in members if measured(row)]
        x = [row["length"] for row in good]
        seconds.plot(x, [row["seconds"] for row in good], **style)
        memory.plot(x, [row["peak_allocated_gib"] for row in good], **style)
        handles.append(Line2D([], [], **style))
        for row in members:
            if out_of_memory(row):
                limit = key.cap_gib or result.get("total_gib")
                cross(seconds, row["length"], None, style["color"], crosses[row["length"]])
                cross(memory, row["length"], limit, style["color"], crosses[row["length"]])
                crosses[row["length"]] += 1
    if any(out_of_memory(row) for row in result["rows"]):
        handles.append(Line2D([], [], color="#444444", linestyle="", marker="x", mew=2, label="out of memory"))
    handles += [Line2D([], [], linestyle="", label=note) for note in failures(result["rows"])]
    for cap in sorted({key.cap_gib for key in lines if key.cap_gib is not None}):
        memory.axhline(cap, color="#444444", linestyle=(0, (6, 3)), linewidth=1, zorder=1)
        memory.annotate(f"cap {cap:g} GiB", (0.01, cap), xycoords=memory.get_yaxis_transform(), va="bottom", fontsize=9)
    dress(seconds, lines, "seconds for one update")
    dress(memory, lines, "peak GPU memory allocated (GiB)")
    if any(measured(row) for row in result["rows"]):
        seconds.set_yscale("log")
        plain_numbers(seconds.yaxis)
    memory.set_ylim(0, memory.get_ylim()[1] * 1.2)
    models = ", ".join(dict.fromkeys(key.model for key in lines))
    figure.suptitle(f"One GRPO update (forward + backward) of {models or 'nothing'} on {result['device']}")
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    figure.savefig(target, dpi=120, format="png")


def cross(axes: Any, x: float, y: float | None, color: str, number: int) -> None:
    """Mark a length that ran out of memory, at the upper edge or above the limit; `number` lie there already."""
    where, coords, offset = (
        ((x, 0.97), axes.get_xaxis_transform(), -number) if y is None else ((x, y), "data", number + 1)
    )
    axes.annotate(
        "✕", where, xycoords=coords, xytext=(0, 11 * offset), textcoords="offset points",
        color=color, fontsize=13, fontweight="bold", ha="center", va="center", annotation_clip=False,
    )  # fmt: skip
    if y is not None:
        # An annotation moves no limits, a point does.
        axes.plot([x], [y], alpha=0)


def dress(axes: Any, lines: dict[Series, list[Row]], label: str) -> None:
    """Length axis, grid and frame."""
    lengths = sorted({row["length"] for members in lines.values() for row in members})
    axes.set_xscale("log", base=2)
    if lengths:
        axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens in the update", ylabel=label)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plain_numbers(axis: Any) -> None:
    """0.5, 1, 20 instead of powers of ten, also where less than a decade is shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def style_of(key: Series, lines: Iterable[Series]) -> dict[str, Any]:
    """Colour and marker of the system; dashes tell its lines of other caps, labels and models apart."""
    color, marker = STYLES.get(key.system, OTHER_STYLE)
    dash = [other for other in lines if other.system == key.system].index(key) % len(DASHES)
    return {"color": color, "marker": marker, "linestyle": DASHES[dash], "linewidth": 1.8, "markersize": 6}


def title(key: Series, *, with_cap: bool) -> str:
    cap = "no cap" if key.cap_gib is None else f"cap {key.cap_gib:g} GiB"
    return ", ".join([key.system, *([key.label] if key.label else []), *([cap] if with_cap else [])])


def several(lines: Iterable[Series], name: str) -> bool:
    return len({getattr(key, name) for key in lines}) > 1


def failures(rows: Iterable[Row]) -> list[str]:
    """What no mark of the picture shows: systems that stopped for another reason than memory."""
    failed = [row for row in rows if row["error"] and not out_of_memory(row)]
    where = {id(row): "" if row["length"] is None else f" at {short(row['length'])}" for row in failed}
    return [f"{row['system']}{where[id(row)]}: {row['error'].strip().splitlines()[-1][:120]}" for row in failed]


def measured(row: Row) -> bool:
    return not row["error"] and row["length"] is not None and row["seconds"] is not None


def out_of_memory(row: Row) -> bool:
    return bool(row["error"]) and row["length"] is not None and "out of memory" in row["error"].lower()


def short(tokens: int) -> str:
    """8192 as 8K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
