"""Every second before the first step belongs to a part."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import write_place

from tandem.rl.start_time import StartTime


def test_parts_sum_to_the_time_that_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([104.0, 104.5, 103.0, 110.0])
    monkeypatch.setattr(time, "time", lambda: next(now))
    start = StartTime(began=100.0)
    for part in ("imports", "model", "clock set back", "engine"):
        start.done(part)
    assert start.parts == {"imports": 4.0, "model": 0.5, "clock set back": 0.0, "engine": 7.0}
    assert str(start) == (
        "ready for the first step after 11.5 s: imports 4.0, model 0.5, clock set back 0.0, engine 7.0"
    )


def test_a_run_says_where_its_start_went(tmp_path: Path) -> None:
    config = write_place(tmp_path)
    command = [sys.executable, "-c", "from tandem.rl.cli import main; main()", "run", str(config), "train.max_steps=1"]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole = time.time() - started
    assert done.returncode == 0, done.stderr
    (summary,) = tmp_path.rglob("summary.json")
    parts = json.loads(summary.read_text(encoding="utf-8"))["startup_seconds"]
    assert list(parts) == ["imports and data", "model", "engine", "trial"]
    assert 0 < sum(parts.values()) < whole
    said = re.search(r"ready for the first step after ([\d.]+) s", (done.stdout + done.stderr).replace("\n", " "))
    assert said is not None
    assert float(said[1]) == pytest.approx(sum(parts.values()), abs=0.1)
