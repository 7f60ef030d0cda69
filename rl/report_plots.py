"""The charts of a report: which curves a run gets, and how they are drawn, for light and for dark screens."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from tandem.rl.step_time import IDLE, PARTS

_TIME = "time/"
_MAX_BARS = 120  # longer runs show means over several steps
_SMOOTH_FROM = 30  # points; a shorter curve is drawn as it is
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

Points = list[tuple[float, float]]
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class _Plot:
    """What one chart shows: a file name, a title, and the metrics that are drawn, where a run has them."""

    slug: str
    title: str
    metrics: tuple[str, ...]  # a `*` stands for any name
    note: str = ""
    bounds: tuple[str, str] | None = None  # metrics that bound a band about the curve
    log: bool = False
    smooth: bool = True  # long curves get a running mean
    from_zero: bool = True  # unless values are negative
    scaled: bool = False  # every curve from its own smallest to its own largest value


_HELD_OUT = "eval/score", "eval/reward", "eval_score", "eval_reward"
_MEAN_LENGTHS = "completions/mean_length", "completions/mean_terminated_length"
_SHORTEST, _LONGEST = "completions/min_length", "completions/max_length"
_CLIPS = "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"
_MISMATCH = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"
_SAMPLE_SIZES = "parity/effective_sample_size/token", "parity/effective_sample_size/sequence"
_LENGTH_NOTE = "tokens; the band spans the shortest and the longest"
_WASTED = "completions/clipped_ratio", "frac_reward_zero_std"
_SPEED = "tokens_per_second", "tokens_per_s", "perf/throughput"

_PLOTS = (
    _Plot("score", "Held-out score", _HELD_OUT, "before, during and after training", from_zero=False),
    _Plot("reward", "Reward", ("reward",), "mean weighted total of each rollout batch", from_zero=False),
    _Plot("rewards", "Each reward", ("rewards/*/mean",), "mean of each reward function", from_zero=False),
    _Plot("length", "Completion length", _MEAN_LENGTHS, _LENGTH_NOTE, bounds=(_SHORTEST, _LONGEST)),
    _Plot("shares", "Wasted completions", _WASTED, "share cut by the length limit; share in groups of equal rewards"),
    _Plot("loss", "Loss", ("loss", "eval/loss"), from_zero=False),
    _Plot("kl", "KL to the reference policy", ("kl",), "nats per token"),
    _Plot("entropy", "Entropy", ("entropy",), "nats per token"),
    _Plot("grad_norm", "Gradient norm", ("grad_norm",)),
    _Plot("clip_ratio", "Clipped tokens", _CLIPS, "share of tokens whose ratio left the trust region"),
    _Plot("mismatch", "Trainer and rollout log-probs", _MISMATCH, "absolute difference per token", log=True),
    _Plot("sample_size", "Effective sample size", _SAMPLE_SIZES, "share left by the ratios of trainer and rollout"),
    _Plot("learning_rate", "Learning rate", ("learning_rate", "lr"), smooth=False),
    _Plot("tokens_per_second", "Speed", _SPEED, "tokens per second"),
    _Plot("step_time", "Step time", ("step_time",), "seconds"),
)


_REWARDS = "reward", "rewards/*/mean", "watch/rewards/*/mean"
_REPEATS = "watch/repetition", "watch/duplicates", "watch/collapsed_groups"
_REPEATS_NOTE = "repeated n-grams; equal completions in a group; groups of one bad completion; shares"
_CORRELATIONS = "watch/length_correlation", "watch/component_correlation", "watch/rewards/*/correlation"
_CORRELATIONS_NOTE = "total reward with length and with what is watched; the lowest of two rewards"

_WATCH_PLOTS = (
    _Plot("watch_rewards", "Trained and watched rewards", _REWARDS, "each on its own scale", scaled=True),
    _Plot("watch_repeats", "Repetition and duplicates", _REPEATS, _REPEATS_NOTE),
    _Plot("watch_correlations", "Correlations within groups", _CORRELATIONS, _CORRELATIONS_NOTE, from_zero=False),
)
_MAX_POINTS = 4000


@dataclass(frozen=True)
class _Theme:
    paper: str
    ink: str
    grid: str
    colours: tuple[str, ...]


_LIGHT = _Theme("#ffffff", "#46505c", "#e6e9ed", ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2"))
_DARK = _Theme("#1a1f27", "#aab4c0", "#303844", ("#6aa5ff", "#fbbf24", "#34d399", "#f472b6", "#b69cff", "#22d3ee"))


@dataclass(frozen=True)
class Chart:
    """One drawn chart; the images are base64 PNG data URIs."""

    slug: str
    title: str
    note: str
    light: str
    dark: str


def draw_charts(metrics: Records, completions: Records) -> list[Chart]:
    """Every chart that a run has the numbers for.

    Args:
        metrics: the records of `metrics.jsonl`. completions: journalled ones, in order of the steps.
    """
    names = list(dict.fromkeys(name for record in metrics for name in record))
    charts = []
    for plot in _PLOTS:
        lines = {name: points for name in _matching(plot.metrics, names) if (points := series(metrics, name))}
        if lines:
            band = [series(metrics, name) for name in plot.bounds] if plot.bounds else []
            charts.append(_draw(plot, lines, band))
    if completions:
        charts.insert(min(len(charts), 4), _distribution(completions))
    if shares := [record for record in metrics if any(f"{_TIME}{name}" in record for name in PARTS)]:
        charts.append(_time_chart(shares))
    return charts


def draw_watch_charts(metrics: Records, completions: Records) -> list[Chart]:
    """The charts of reward watch: rewards against length, all rewards beside each other, what repeats, correlations.
    Steps with an alert are marked.

    Args:
        metrics: the records of `metrics.jsonl`, alerts included. completions: journalled ones with `tokens`.
    """
    names = list(dict.fromkeys(name for record in metrics for name in record))
    marks = sorted({record["step"] for record in metrics if is_alert(record)})
    charts = [chart] if (chart := _scatter(completions)) else []
    if any(name.startswith("watch/") for name in names):
        for plot in _WATCH_PLOTS:
            lines = {name: points for name in _matching(plot.metrics, names) if (points := series(metrics, name))}
            if lines:
                charts.append(_draw(plot, lines, [], marks))
    return charts


def is_alert(record: dict[str, Any]) -> bool:
    """Whether a record of `metrics.jsonl` is an alert of reward watch."""
    return record.get("event") == "alert"


def series(metrics: Records, name: str) -> Points:
    """(step, value) wherever a metric has one."""
    return [(r["step"], float(r[name])) for r in metrics if is_number(r.get(name))]


def visible(text: str) -> str:
    """Control characters and lone surrogates, which HTML cannot hold, as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    expressions = [re.escape(pattern).replace(r"\*", ".+") for pattern in patterns]
    return list(dict.fromkeys(name for e in expressions for name in names if re.fullmatch(e, name)))


def _draw(plot: _Plot, lines: dict[str, Points], band: list[Points], marks: Sequence[int] = ()) -> Chart:
    def draw(axes: Any, theme: _Theme) -> None:
        for mark in marks:
            axes.axvline(mark, color=theme.colours[3], linewidth=0.9, linestyle=":")
        for (name, points), colour in zip(lines.items(), theme.colours * (1 + len(lines) // 6), strict=False):
            label = _label(name, plot)
            if plot.scaled:
                points, label = _scaled(points, label)
            _curve(axes, points, colour, label, plot.smooth)
        if plot.scaled:
            axes.set_yticks([])
        if len(band) == 2 and band[0] and [x for x, _ in band[0]] == [x for x, _ in band[1]]:
            xs, low = zip(*band[0], strict=True)
            axes.fill_between(xs, low, [y for _, y in band[1]], color=theme.colours[0], alpha=0.12, linewidth=0)
        if plot.log and all(y > 0 for points in lines.values() for _, y in points):
            axes.set_yscale("log")
        if plot.from_zero and not plot.log and axes.get_ylim()[0] >= 0:
            axes.set_ylim(bottom=0)
        if len(lines) > 1 or plot in _WATCH_PLOTS:  # these titles do not say which one is there
            axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink, loc="best")

    return _chart(plot.slug, plot.title, plot.note, draw)


def _curve(axes: Any, points: Points, colour: str, label: str, smooth: bool) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(points) < _SMOOTH_FROM:
        axes.plot(xs, ys, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)
    elif not smooth:
        axes.plot(xs, ys, color=colour, linewidth=1.9, label=label)
    else:
        axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(xs, _smoothed(ys), color=colour, linewidth=1.9, label=label)


def _scaled(points: Points, label: str) -> tuple[Points, str]:
    """A curve between 0 and 1, and its label with the values that these stand for."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    scaled = [(x, (y - low) / (high - low) if high > low else 0.5) for x, y in points]
    return scaled, f"{label} ({low:.3g} … {high:.3g})"


def _scatter(completions: Records) -> Chart | None:
    """Total reward against length, coloured by the step."""
    points = [
        (float(r["tokens"]), float(r["reward"]), float(r.get("step", 0)))
        for r in completions
        if is_number(r.get("tokens")) and is_number(r.get("reward"))
    ]
    if len({length for length, _, _ in points}) < 2:
        return None
    points = points[:: math.ceil(len(points) / _MAX_POINTS)]
    lengths, rewards, steps = zip(*points, strict=True)

    def draw(axes: Any, theme: _Theme) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("steps", [theme.colours[5], theme.colours[0], theme.colours[3]])
        axes.scatter(lengths, rewards, c=steps, cmap=colours, s=9, alpha=0.7, linewidths=0)

    return _chart(
        "watch_length",
        "Reward against length",
        f"a dot per completion; from blue-green at step {min(steps):.0f} to pink at step {max(steps):.0f}",
        draw,
        across="tokens",
    )


def _smoothed(values: list[float]) -> list[float]:
    """Mean over a centred window, which unlike a running average does not lag behind."""
    half = max(1, len(values) // 40)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _label(name: str, plot: _Plot) -> str:
    """A metric's name without what all of the chart have in common, and not read as a formula by matplotlib."""
    for pattern in plot.metrics:
        head, star, tail = pattern.partition("*")
        if star and name.startswith(head) and name.endswith(tail):
            name = name[len(head) : len(name) - len(tail)]
    short = name.rpartition("/")[2] if name in plot.metrics and plot.slug != "loss" else name
    return " " * short.startswith("_") + visible(short).replace("$", r"\$")


def _distribution(records: Records) -> Chart:
    """Rewards per step as a heat map; every column adds up to one."""
    import numpy as np

    scored = [(r.get("step", 0), r["reward"]) for r in records if is_number(r.get("reward"))]
    steps = sorted({step for step, _ in scored})
    column = {step: i * min(len(steps), 80) // len(steps) for i, step in enumerate(steps)}
    low, high = min((y for _, y in scored), default=0.0), max((y for _, y in scored), default=1.0)
    pad = 0.02 * (high - low) or 0.5
    edges = np.linspace(low - pad, high + pad, 25)
    counts = np.zeros((24, max(column.values(), default=0) + 1))
    for step, reward in scored:
        counts[min(int(np.searchsorted(edges, reward, side="right")) - 1, 23), column[step]] += 1
    shares = counts / np.maximum(counts.sum(axis=0, keepdims=True), 1)
    first, last = (steps[0], steps[-1]) if steps else (0, 1)

    def draw(axes: Any, theme: _Theme) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("share", [theme.paper, theme.colours[0]])
        extent = (first - 0.5, last + 0.5, float(edges[0]), float(edges[-1]))
        axes.imshow(
            shares, origin="lower", aspect="auto", extent=extent, cmap=colours, vmin=0.0, interpolation="nearest"
        )
        axes.grid(False)

    return _chart(
        "reward_distribution",
        "Reward distribution",
        "share of each step's completions; a stronger colour is more",
        draw,
    )


def _time_chart(records: Records) -> Chart:
    """Seconds of each record, stacked by what they were spent on; bars of long runs are means over several steps."""
    bins = time_bins(records, _MAX_BARS)
    largest = sorted(bins.seconds, key=lambda name: -sum(bins.seconds[name]))
    named = [name for name in PARTS if name in largest[:6] and name != IDLE]

    def draw(axes: Any, theme: _Theme) -> None:
        bottom = [0.0] * len(bins.centres)
        rest = [sum(values) for values in zip(*(v for n, v in bins.seconds.items() if n not in named), strict=True)]
        layers = [
            (name.replace("_", "-"), bins.seconds[name], c) for name, c in zip(named, theme.colours, strict=False)
        ]
        for label, values, colour in [*layers, ("idle and other", rest, theme.grid)]:
            if any(values):
                axes.bar(bins.centres, values, width=bins.width, bottom=bottom, color=colour, label=label, linewidth=0)
                bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink, loc="best", ncols=2)

    note = "seconds from record to record" + (f", means over {bins.width:.0f} steps" if bins.width > 1 else "")
    return _chart("time", "Where the time goes", note, draw)


@dataclass
class TimeBins:
    """Seconds per step by part, `seconds[part][bin]`; bins of `width` steps about their `centres`."""

    centres: list[float]
    width: float
    seconds: dict[str, list[float]]


def time_bins(records: Records, limit: int) -> TimeBins:
    """The `time/…` metrics by step, put together into at most `limit` bins of equal width."""
    first, last = records[0]["step"], records[-1]["step"]
    width = max(math.ceil((last - first + 1) / limit), 1)
    by_bin: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_bin.setdefault((record["step"] - first) // width, []).append(record)
    parts = [name for name in PARTS if any(is_number(r.get(_TIME + name)) for r in records)]
    seconds = {
        name: [
            sum(float(v) for r in group if is_number(v := r.get(_TIME + name))) / len(group)
            for group in by_bin.values()
        ]
        for name in parts
    }
    return TimeBins([first + (number + 0.5) * width - 0.5 for number in by_bin], float(width), seconds)


def _chart(slug: str, title: str, note: str, draw: Any, across: str = "step") -> Chart:
    light_image, place = _image(draw, _LIGHT, across)
    dark_image, _ = _image(draw, _DARK, across, place)
    light, dark = (
        "data:image/png;base64," + base64.b64encode(image).decode("ascii") for image in (light_image, dark_image)
    )
    return Chart(slug, title, note, light, dark)


def _image(draw: Any, theme: _Theme, across: str, place: Any = None) -> tuple[bytes, Any]:
    """A PNG, and where the axes lie in it. The figure is made without pyplot, so that nothing global is touched and no
    window can open.

    Args:
        place: of the same chart in other colours; finding it anew takes longer than drawing the chart.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 2.9), dpi=144, facecolor=theme.paper, layout="constrained" if place is None else None)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    if place is not None:
        axes.set_position(place)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    draw(axes, theme)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel(across, color=theme.ink, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    return buffer.getvalue(), axes.get_position()
