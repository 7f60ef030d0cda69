"""The report of a run: one HTML file that needs nothing beside it, drawn from the files in the run folder.

It can be written at any time, also while the run goes on. Charts are drawn twice, for light and for dark screens; the
light ones also lie under `report/` as PNG files.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from tandem.rl.errors import UserError
from tandem.rl.journal import read_rollouts, rollout_files, write_whole

_TEMPLATES = Path(__file__).parent / "templates"

# Journals of long runs are large. More files than this are thinned out evenly, and the report says so.
_MAX_ROLLOUT_FILES = 200
_NUM_SHOWN = 5
_SMOOTH_FROM = 30  # points; a shorter curve is drawn as it is
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

Points = list[tuple[float, float]]


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


_HELD_OUT = "eval/score", "eval/reward", "eval_score", "eval_reward"
_MEAN_LENGTHS = "completions/mean_length", "completions/mean_terminated_length"
_SHORTEST, _LONGEST = "completions/min_length", "completions/max_length"
_CLIPS = "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"
_MISMATCH = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"
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
    _Plot("learning_rate", "Learning rate", ("learning_rate", "lr"), smooth=False),
    _Plot("tokens_per_second", "Speed", _SPEED, "tokens per second"),
    _Plot("step_time", "Step time", ("step_time",), "seconds"),
)


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


@dataclass
class _Run:
    """What the run folder holds."""

    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)  # journalled completions, in order of the steps
    evals: list[dict[str, Any]] = field(default_factory=list)  # those of the first and of the last evaluation
    thinned: str = ""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `report/*.png` into a run folder and return the HTML file.

    Raises:
        UserError: there is no such folder, or one of its files is damaged (a last line that is still being written is
            not).
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder {str(run_dir)!r}", fix="give the folder that holds metrics.jsonl")
    run = _read_run(run_dir)
    charts = _charts(run)
    _write_images(run_dir / "report", charts)
    name = str(run.config.get("run_name") or run_dir.resolve().name)
    html = _render(
        name=name,
        state=_state(run),
        facts=_facts(run),
        charts=charts,
        changed=_most_changed(run),
        best=_extremes(run, best=True),
        worst=_extremes(run, best=False),
        thinned=run.thinned,
        summary=[(key, _shown(value)) for key, value in _flat(run.summary)],
        config=_config_sections(run.config),
        empty=not run.metrics and not run.steps and not run.evals,
    )
    return write_whole(run_dir / "report.html", html.encode("utf-8", "backslashreplace"))


def _read_run(run_dir: Path) -> _Run:
    import yaml

    run = _Run(
        config=_read_mapping(run_dir / "config.yaml", yaml.safe_load),
        metrics=_read_metrics(run_dir / "metrics.jsonl"),
        summary=_read_mapping(run_dir / "summary.json", json.loads),
    )
    files = rollout_files(run_dir, "step")
    chosen = _evenly(files, _MAX_ROLLOUT_FILES)
    if len(chosen) < len(files):
        run.thinned = f"from {len(chosen)} of {len(files)} journalled steps, evenly spaced"
    run.steps = [_slim(record) for _, path in chosen for record in read_rollouts(path)]
    evaluations = rollout_files(run_dir, "eval")
    for _, path in evaluations[:1] + evaluations[1:][-1:]:
        run.evals += [_slim(record) for record in read_rollouts(path)]
    return run


def _read_mapping(path: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}") from error
    return content if isinstance(content, dict) else {}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):  # without a line end: the run is writing it, or was killed while it did
                continue
            raise UserError(f"{path} line {number} is no JSON: {line[:80]!r}", reason=str(error)) from error
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    """Without the token lists, which are most of a journal and not shown."""
    return {key: value for key, value in record.items() if key not in ("completion_ids", "log_probs")}


def _evenly(items: list[Any], limit: int) -> list[Any]:
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _state(run: _Run) -> str:
    done, planned = _last_step(run), _planned_steps(run)
    if run.summary:
        return "finished"
    if not run.metrics:
        return "nothing recorded yet"
    return f"in progress or stopped at step {done}" + (f" of {planned}" if planned else "")


def _last_step(run: _Run) -> int:
    return max((record["step"] for record in run.metrics), default=0)


def _planned_steps(run: _Run) -> int | None:
    train = run.config.get("train")
    return train.get("max_steps") if isinstance(train, dict) else None


def _facts(run: _Run) -> list[dict[str, str]]:
    """The large numbers at the top."""
    facts = []
    scores: list[Any] = [run.summary.get("score_before"), run.summary.get("score_after")]
    if not all(_is_number(score) for score in scores):
        scores = [score for _, score in _series(run, "eval/score") or _series(run, "eval_score")]
    if len(scores) > 1:
        facts.append(_change("Held-out score", float(scores[0]), float(scores[-1])))
    for name, label in (("reward", "Reward"), ("loss", "Loss"), ("completions/mean_length", "Completion length")):
        points = _series(run, name)
        if points and not (name == "loss" and _series(run, "reward")):
            window = max(1, len(points) // 10)
            facts.append(_change(label, _mean(points[:window]), _mean(points[-window:])))
    if run.metrics:
        planned = _planned_steps(run)
        facts.append(
            {"label": "Steps", "value": f"{_last_step(run)}" + (f" / {planned}" if planned else ""), "note": ""}
        )
    if times := _series(run, "step_time"):
        facts.append({"label": "Time in steps", "value": _duration(sum(t for _, t in times)), "note": ""})
    if tokens := _series(run, "num_tokens"):
        facts.append({"label": "Tokens", "value": f"{tokens[-1][1]:,.0f}", "note": ""})
    return facts


def _change(label: str, before: float, after: float) -> dict[str, str]:
    return {"label": label, "value": f"{before:.3g} → {after:.3g}", "note": f"{after - before:+.3g}"}


def _mean(points: Points) -> float:
    return sum(value for _, value in points) / len(points)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _config_sections(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    general = [(key, _shown(value)) for key, value in config.items() if not isinstance(value, dict)]
    sections = [
        (key, [(k, _shown(v)) for k, v in value.items()]) for key, value in config.items() if isinstance(value, dict)
    ]
    return ([("run", general)] if general else []) + sections


def _flat(node: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any, form: str = ".6g") -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:{form}}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _extremes(run: _Run, best: bool) -> list[dict[str, Any]]:
    """Completions of the highest or the lowest reward, one per prompt; of equal ones the latest."""
    pool = [record for record in run.steps or run.evals if _is_number(record.get("reward"))]
    pool.sort(key=lambda r: (r["reward"] if best else -r["reward"], r.get("step", 0)), reverse=True)
    chosen: dict[Any, dict[str, Any]] = {}
    for record in pool:
        chosen.setdefault(record.get("prompt_index"), record)
        if len(chosen) == _NUM_SHOWN:
            break
    return [_row(record) for record in chosen.values()]


def _most_changed(run: _Run) -> dict[str, Any] | None:
    """Prompts whose mean reward moved most between their first and their last completions: those of the evaluation if
    it ran twice, else training prompts that came up in more than one step."""
    for title, records in (("evaluation prompts", run.evals), ("training prompts", run.steps)):
        pairs = [pair for pair in _first_and_last(records) if pair["difference"] != 0.0]
        if pairs:
            pairs.sort(key=lambda pair: -abs(pair["difference"]))
            return {"title": title, "pairs": pairs[:_NUM_SHOWN]}
    return None


def _first_and_last(records: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    by_prompt: dict[Any, dict[int, list[dict[str, Any]]]] = {}
    for record in records:
        if _is_number(record.get("reward")):
            by_prompt.setdefault(record.get("prompt_index"), {}).setdefault(record.get("step", 0), []).append(record)
    for by_step in by_prompt.values():
        if len(by_step) > 1:
            early, late = by_step[min(by_step)], by_step[max(by_step)]
            means = [sum(record["reward"] for record in group) / len(group) for group in (early, late)]
            shown = [_nearest(early, means[0]), _nearest(late, means[1])]
            yield {
                "prompt": _prompt(shown[0].get("prompt")),
                "difference": means[1] - means[0],
                "early": _row(shown[0]) | {"mean": f"{means[0]:.4g}", "count": len(early)},
                "late": _row(shown[1]) | {"mean": f"{means[1]:.4g}", "count": len(late)},
            }


def _nearest(group: list[dict[str, Any]], mean: float) -> dict[str, Any]:
    """The one completion that stands for its group: its reward is nearest to the group's mean."""
    return min(group, key=lambda record: abs(record["reward"] - mean))


def _row(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": record.get("step"),
        "prompt": _prompt(record.get("prompt")),
        "completion": str(record.get("completion", "")),
        "reward": _shown(record.get("reward"), ".4g"),
        "advantage": _shown(record.get("advantage"), ".3g"),
        "rewards": [(name, _shown(value, ".4g")) for name, value in (record.get("rewards") or {}).items()],
        "truncated": bool(record.get("truncated")),
    }


def _prompt(prompt: Any) -> list[tuple[str, str]]:
    """The prompt as (role, text); a plain string has no role."""
    if isinstance(prompt, list):
        return [(str(m.get("role", "")), _shown(m.get("content", ""))) for m in prompt if isinstance(m, dict)]
    return [("", str(prompt))]


def _visible(text: str) -> str:
    """Control characters and lone surrogates, which HTML cannot hold, as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _series(run: _Run, name: str) -> Points:
    return [(r["step"], float(r[name])) for r in run.metrics if _is_number(r.get(name))]


def _charts(run: _Run) -> list[Chart]:
    names = list(dict.fromkeys(name for record in run.metrics for name in record))
    charts = []
    for plot in _PLOTS:
        lines = {name: points for name in _matching(plot.metrics, names) if (points := _series(run, name))}
        if lines:
            band = [_series(run, name) for name in plot.bounds] if plot.bounds else []
            charts.append(_draw(plot, lines, band))
    if run.steps:
        charts.insert(min(len(charts), 4), _distribution(run.steps))
    return charts


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    expressions = [re.escape(pattern).replace(r"\*", ".+") for pattern in patterns]
    return list(dict.fromkeys(name for e in expressions for name in names if re.fullmatch(e, name)))


def _draw(plot: _Plot, lines: dict[str, Points], band: list[Points]) -> Chart:
    def draw(axes: Any, theme: _Theme) -> None:
        for (name, points), colour in zip(lines.items(), theme.colours * (1 + len(lines) // 6), strict=False):
            _curve(axes, points, colour, _label(name, plot), plot.smooth)
        if len(band) == 2 and band[0] and [x for x, _ in band[0]] == [x for x, _ in band[1]]:
            xs, low = zip(*band[0], strict=True)
            axes.fill_between(xs, low, [y for _, y in band[1]], color=theme.colours[0], alpha=0.12, linewidth=0)
        if plot.log and all(y > 0 for points in lines.values() for _, y in points):
            axes.set_yscale("log")
        if plot.from_zero and not plot.log and axes.get_ylim()[0] >= 0:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
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
    return " " * short.startswith("_") + _visible(short).replace("$", r"\$")


def _distribution(records: list[dict[str, Any]]) -> Chart:
    """Rewards per step as a heat map; every column adds up to one."""
    import numpy as np

    scored = [(r.get("step", 0), r["reward"]) for r in records if _is_number(r.get("reward"))]
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


def _chart(slug: str, title: str, note: str, draw: Any) -> Chart:
    images = [_image(draw, theme) for theme in (_LIGHT, _DARK)]
    light, dark = ("data:image/png;base64," + base64.b64encode(image).decode("ascii") for image in images)
    return Chart(slug, title, note, light, dark)


def _image(draw: Any, theme: _Theme) -> bytes:
    """A PNG. The figure is made without pyplot, so that nothing global is touched and no window can open."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 2.9), dpi=144, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    draw(axes, theme)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel("step", color=theme.ink, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    return buffer.getvalue()


def _write_images(folder: Path, charts: list[Chart]) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):  # charts of an earlier report that this one does not have
        old.unlink()
    for chart in charts:
        (folder / f"{chart.slug}.png").write_bytes(base64.b64decode(chart.light.partition(",")[2]))


def _render(**values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: _visible(value) if type(value) is str else value,  # Markup, a subclass, is our own HTML
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(**values)
