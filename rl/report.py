"""The report of a run: one HTML file that needs nothing beside it, drawn from the files in the run folder.

It can be written at any time, also while the run goes on. Charts are drawn twice, for light and for dark screens; the
light ones also lie under `report/` as PNG files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.rl.errors import UserError
from tandem.rl.journal import read_rollouts, rollout_files, write_whole
from tandem.rl.report_plots import (
    Chart,
    Points,
    draw_charts,
    draw_watch_charts,
    is_alert,
    is_number,
    series,
    visible,
)

# Journals of long runs are large. More files than this are thinned out evenly, and the report says so.
_MAX_ROLLOUT_FILES = 200
_NUM_SHOWN = 5


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
    charts = draw_charts(run.metrics, run.steps)
    watch_charts = draw_watch_charts(run.metrics, run.steps)
    _write_images(run_dir / "report", charts + watch_charts)
    name = str(run.config.get("run_name") or run_dir.resolve().name)
    html = _render(
        name=name,
        state=_state(run),
        facts=_facts(run),
        charts=charts,
        watch_charts=watch_charts,
        watched=any(name.startswith("watch/") for record in run.metrics for name in record),
        alerts=[_alert(record) for record in run.metrics if is_alert(record)],
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
    """Without the token lists, which are most of a journal and not shown; their length stays."""
    kept = {key: value for key, value in record.items() if key not in ("completion_ids", "log_probs")}
    ids = record.get("completion_ids")
    return kept | ({"tokens": len(ids)} if isinstance(ids, list) else {})


def _alert(record: dict[str, Any]) -> dict[str, str]:
    """An alert of reward watch as the page shows it."""
    shown = {key: _shown(record.get(key), ".3g") for key in ("step", "name", "value", "threshold", "message", "fix")}
    return shown | {"about": str(record.get("about") or "")}


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
    if not all(is_number(score) for score in scores):
        scores = [score for _, score in series(run.metrics, "eval/score") or series(run.metrics, "eval_score")]
    if len(scores) > 1:
        facts.append(_change("Held-out score", float(scores[0]), float(scores[-1])))
    for name, label in (("reward", "Reward"), ("loss", "Loss"), ("completions/mean_length", "Completion length")):
        points = series(run.metrics, name)
        if points and not (name == "loss" and series(run.metrics, "reward")):
            window = max(1, len(points) // 10)
            facts.append(_change(label, _mean(points[:window]), _mean(points[-window:])))
    if run.metrics:
        planned = _planned_steps(run)
        facts.append(
            {"label": "Steps", "value": f"{_last_step(run)}" + (f" / {planned}" if planned else ""), "note": ""}
        )
    if times := series(run.metrics, "step_time"):
        facts.append({"label": "Time in steps", "value": _duration(sum(t for _, t in times)), "note": ""})
    if tokens := series(run.metrics, "num_tokens"):
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


def _extremes(run: _Run, best: bool) -> list[dict[str, Any]]:
    """Completions of the highest or the lowest reward, one per prompt; of equal ones the latest."""
    pool = [record for record in run.steps or run.evals if is_number(record.get("reward"))]
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
        if is_number(record.get("reward")):
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
        "watched": [(name, _shown(value, ".4g")) for name, value in (record.get("watched") or {}).items()],
        "extra": [(name, _shown(value, ".4g")) for name, value in (record.get("extra") or {}).items()],
        "truncated": bool(record.get("truncated")),
    }


def _prompt(prompt: Any) -> list[tuple[str, str]]:
    """The prompt as (role, text); a plain string has no role."""
    if isinstance(prompt, list):
        return [(str(m.get("role", "")), _shown(m.get("content", ""))) for m in prompt if isinstance(m, dict)]
    return [("", str(prompt))]


def _write_images(folder: Path, charts: list[Chart]) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):  # charts of an earlier report that this one does not have
        old.unlink()
    for chart in charts:
        (folder / f"{chart.slug}.png").write_bytes(base64.b64decode(chart.light.partition(",")[2]))


def _render(**values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup, a subclass, is our own HTML
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(**values)
