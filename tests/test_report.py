"""The report: one file that holds everything, from any state of a run, with model output as text only."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tandem.rl.errors import UserError
from tandem.rl.journal import write_rollouts
from tandem.rl.report import write_report
from tandem.rl.samples import Completion, Prompt, Scored

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, the text, and the text of every <pre>."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.pres = "", []
        self._open: list[str] = []
        self.source = path.read_bytes().decode("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link"):
            self._open.append(tag)
        if tag == "pre":
            self.pres.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        if self._open and self._open[-1] == "pre":
            self.pres[-1] += data
        self.text += data

    def charts(self) -> list[str | None]:
        return [a["alt"] for tag, a in self.tags if tag == "img" and a["class"] == "light"]

    def between(self, start: str, end: str) -> str:
        return self.text.split(start, 1)[1].split(end, 1)[0]


def scored(index: int, text: str, reward: float, group: int = 0, prompt: Any = None) -> Scored:
    prompt = Prompt(index, [1], f"question {index}" if prompt is None else prompt)
    return Scored(prompt, Completion([5], [-0.1], False), group, text, {"right": reward, "other": None}, reward, 0.25)


def write_metrics(run_dir: Path, *records: dict[str, Any], tail: str = "") -> None:
    text = "".join(json.dumps(record) + "\n" for record in records) + tail
    (run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_config(run_dir: Path, text: str = "run_name: trial\ntrain:\n  max_steps: 40\n") -> None:
    (run_dir / "config.yaml").write_text(text, encoding="utf-8")


def full_run(run_dir: Path) -> None:
    write_config(run_dir, "run_name: trial\nseed: 3\ntrain:\n  max_steps: 40\noptim:\n  learning_rate: 1.0e-05\n")
    records = [
        {
            "step": step,
            "reward": step / 40,
            "rewards/right/mean": step / 40,
            "rewards/$x_{/mean": 0.5,
            "rewards/_under/mean": 0.25,
            "completions/mean_length": 50 + step,
            "completions/min_length": 10,
            "completions/max_length": 90,
            "kl": None,
            "entropy": 1.0,
            "step_time": 30.0,
            "num_tokens": step * 1000,
            "perf/throughput": 2000.0,
            "sampling/sampling_logp_difference/mean": 0.0,
        }
        for step in range(1, 41)
    ]
    write_metrics(run_dir, {"step": 0, "eval/score": 0.1}, *records, {"step": 40, "eval/score": 0.9})
    for step in (1, 20, 40):
        rows = [scored(i, f"train {step} {i}", reward=float(i + (step == 40) * (i == 3))) for i in range(8)]
        write_rollouts(run_dir, step, rows)
    for step, answers in ((0, [0.0, 1.0, 0.0, 0.5]), (20, [1.0] * 4), (40, [1.0, 0.0, 0.0, 0.75])):
        write_rollouts(run_dir, step, [scored(i, f"eval {step} {i}", r) for i, r in enumerate(answers)], kind="eval")
    (run_dir / "summary.json").write_text(json.dumps({"score_before": 0.1, "score_after": 0.9, "time": {"train_s": 7}}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder with its report."""
    run_dir = tmp_path_factory.mktemp("finished")
    full_run(run_dir)
    assert write_report(run_dir) == run_dir / "report.html"
    return run_dir


def test_a_finished_run(finished):
    page = Page(finished / "report.html")
    assert page.charts() == [
        "Held-out score",
        "Reward",
        "Each reward",
        "Completion length",
        "Reward distribution",
        "Entropy",
        "Trainer and rollout log-probs",
        "Speed",
        "Step time",
    ]  # and none for kl, which has no value at all
    assert "finished" in page.text
    for fact in ("0.1 → 0.9", "40 / 40", "20 min 00 s", "40,000", "time.train_s", "learning_rate", "1e-05"):
        assert fact in page.text
    # The reward moves from the mean of its first tenth (1/40 … 4/40) to that of its last (37/40 … 40/40).
    assert f"{2.5 / 40:.3g} → {38.5 / 40:.3g}" in page.text


def test_the_file_needs_nothing_beside_it(finished):
    page = Page(finished / "report.html")
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * len(page.charts())
    for image in images:
        head, _, data = image.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(PNG)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import", page.source)
    files = {path.read_bytes() for path in (finished / "report").glob("*.png")}
    assert files == {base64.b64decode(images[i].partition(",")[2]) for i in range(0, len(images), 2)}


def test_most_changed_best_and_worst(finished):
    page = Page(finished / "report.html")
    changed = page.between("Most changed", "Best completions")
    # Prompts 0 (+1), 1 (-1) and 3 (+0.25) of the first and the last evaluation; prompt 2 did not change.
    positions = [changed.index(t) for t in ("eval 0 0", "eval 40 0", "eval 0 1", "eval 40 1", "eval 0 3", "eval 40 3")]
    assert positions == sorted(positions)
    assert "eval 0 2" not in changed
    assert "eval 20" not in page.text
    # One completion per prompt, of equal ones the latest; prompt 3 got as much as prompt 4 in step 40 only.
    best = page.between("Best completions", "Worst completions")
    assert re.findall(r"train \d+ \d", best) == [f"train 40 {i}" for i in (7, 6, 5, 3, 4)]
    worst = page.between("Worst completions", "Summary")
    assert re.findall(r"train \d+ \d", worst) == [
        f"train {s} {i}" for s, i in ((40, 0), (40, 1), (40, 2), (20, 3), (40, 4))
    ]


def test_training_prompts_stand_in_where_nothing_was_evaluated(tmp_path):
    write_rollouts(tmp_path, 1, [scored(7, "poor", 0.0), scored(7, "fair", 0.5), scored(8, "once", 1.0, group=1)])
    write_rollouts(tmp_path, 9, [scored(7, "good", 1.0), scored(7, "good too", 1.0)])
    changed = Page(write_report(tmp_path)).between("Most changed", "Best")
    assert "training prompts" in changed
    assert "0.25 → 1" in changed
    assert "+0.75" in changed
    assert "once" not in changed


NASTY = [
    "<script>alert(1)</script>",
    "</pre></article><img src=x onerror=alert(1)>",
    '"><b onmouseover="x">',
    "{{ 7 * 7 }} {% raw %}",
    "lone \ud800 half \udfff",
    "nul \x00 bell \x07 esc \x1b[2J",
    "é😀‮עברית\u2028\ufdd0 &amp;",
]


def test_model_output_stays_text(tmp_path):
    for i, text in enumerate(NASTY):
        prompt = [{"role": text, "content": text}]
        row = Scored(Prompt(i, [1], prompt), Completion([1], [0.0], True), 0, text, {text: 1.0}, float(i < 5), 0.0)
        write_rollouts(tmp_path, i, [row])
    (tmp_path / "summary.json").write_text(json.dumps({t: t for t in NASTY}))
    write_metrics(tmp_path, *({"step": i, f"rewards/{text}/mean": 0.5, "reward": 1.0} for i, text in enumerate(NASTY)))
    write_config(tmp_path, "run_name: '<script>x</script>'\ntrain: {'<i>': '<u>'}\n")
    page = Page(write_report(tmp_path))
    assert not {"script", "i", "u"} & {tag for tag, _ in page.tags}
    assert all(set(attributes) <= {"class"} for tag, attributes in page.tags if tag == "b")  # only the template's own
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = set(page.pres)
    for text in NASTY:
        visible = re.sub("[\x00-\x08\x1b\ud800-\udfff]", lambda m: m[0].encode("unicode_escape").decode(), text)
        assert visible in shown
    assert "\x00" not in page.source


def test_every_code_point_and_ten_megabytes(tmp_path):
    everything, long = "".join(map(chr, range(0x110000))), "wörd🙂 <b>&\\n" * 700_000
    for step, text in ((1, everything), (2, long)):
        write_rollouts(tmp_path, step, [scored(step, text, 1.0), scored(step + 1, "beside it", 0.0)])
    write_metrics(tmp_path, {"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.5})
    write_config(tmp_path)
    page = Page(write_report(tmp_path))  # reads strict UTF-8
    assert "beside it" in page.pres
    assert "<b>&" not in page.source
    longest = max(page.pres, key=len)
    assert longest.startswith(long[:1000])
    assert any("🙂" in pre and "\\ud800" in pre for pre in page.pres), "half characters are written out"


def test_a_supervised_run_without_rollouts(tmp_path):
    write_config(tmp_path)
    write_metrics(
        tmp_path, *({"step": s, "loss": 3.0 / s, "learning_rate": 1e-4, "eval/loss": 2.0} for s in range(1, 41))
    )
    page = Page(write_report(tmp_path))
    assert page.charts() == ["Loss", "Learning rate"]
    assert "Best completions" not in page.text
    assert "recorded nothing" not in page.text


@pytest.mark.parametrize("prepare", [lambda d: None, write_config, lambda d: write_metrics(d)])
def test_an_empty_run_says_so(tmp_path, prepare):
    prepare(tmp_path)
    page = Page(write_report(tmp_path))
    assert "recorded nothing yet" in page.text
    assert page.charts() == []


def test_a_run_in_progress(tmp_path):
    write_config(tmp_path)
    write_metrics(tmp_path, {"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.5}, tail='{"step": 3, "rew')
    page = Page(write_report(tmp_path))
    assert "in progress or stopped at step 2 of 40" in page.text
    assert page.charts() == ["Reward"]


def test_a_second_report_replaces_the_first(tmp_path):
    write_metrics(tmp_path, {"step": 1, "entropy": 0.5})
    write_report(tmp_path)
    write_metrics(tmp_path, {"step": 1, "reward": 0.5})
    assert Page(write_report(tmp_path)).charts() == ["Reward"]
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["reward.png"]


def test_long_runs_are_thinned_and_say_so(tmp_path):
    for step in range(1, 404):
        write_rollouts(tmp_path, step, [scored(step, f"text of step {step}.", float(step))])
    page = Page(write_report(tmp_path))
    assert "from 200 of 403 journalled steps" in page.text
    assert "text of step 403." in page.text  # both ends are kept
    assert "text of step 1." in page.text


def test_damage_is_named(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_report(tmp_path)


def test_matplotlib_is_left_as_it_was(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    write_metrics(tmp_path, {"step": 1, "reward": 0.5})
    write_rollouts(tmp_path, 1, [scored(1, "text", 1.0)])
    write_report(tmp_path)
    assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)) == before


# --- reward watch


def watched_run(run_dir: Path) -> None:
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "reward": step / 20,
            "rewards/right/mean": step / 20,
            "watch/rewards/judge/mean": 7 - step / 10,
            "watch/repetition": 0.1,
            "watch/duplicates": 0.0,
            "watch/collapsed_groups": 0.0,
            "watch/length_correlation": 0.5,
        }
        for step in range(1, 21)
    ]
    alert = {
        "step": 15,
        "event": "alert",
        "name": "watched_falls",
        "about": "judge",
        "value": -0.75,
        "threshold": -0.25,
        "message": "judge gets worse",
        "fix": "read them",
    }
    write_metrics(run_dir, *records[:14], alert, *records[14:])
    for step in (1, 20):
        rows = [scored(i, f"text {step} {i}", float(i)) for i in range(4)]
        for i, row in enumerate(rows):
            row.completion.ids = [1] * (i + step)
            row.watched = {"judge": 0.5}
            row.extra = {"verdict": "polite", "share": float("nan")}
        write_rollouts(run_dir, step, rows)


def test_reward_watch_has_its_charts_and_alerts(tmp_path):
    watched_run(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.charts()[-4:] == [
        "Reward against length",
        "Trained and watched rewards",
        "Repetition and duplicates",
        "Correlations within groups",
    ]
    section = page.between("Reward watch", "Reward against length")
    for part in ("step 15", "watched_falls", "judge gets worse", "value -0.75, limit -0.25", "read them"):
        assert part in section
    assert "judge (watched) 0.5" in page.text
    assert "verdict polite" in page.text
    assert "no alert so far" not in page.text
    assert {f"watch_{name}.png" for name in ("length", "rewards", "repeats", "correlations")} <= {
        path.name for path in (tmp_path / "report").iterdir()
    }


def test_a_watched_run_without_alerts_says_so(tmp_path):
    write_metrics(tmp_path, {"step": 1, "watch/repetition": 0.5})
    page = Page(write_report(tmp_path))
    assert "no alert so far" in page.text
    assert page.charts() == ["Repetition and duplicates"]


def test_what_an_alert_is_about_stays_text(tmp_path):
    alert = {"event": "alert", "name": "watched_falls", "value": 1.0, "threshold": 0.5, "fix": "read them"}
    write_metrics(tmp_path, *({"step": i, **alert, "about": t, "message": t} for i, t in enumerate(NASTY)))
    page = Page(write_report(tmp_path))
    assert not {"script", "onerror"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(set(attributes) <= {"class"} for tag, attributes in page.tags if tag == "b")
