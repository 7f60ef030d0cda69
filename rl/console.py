"""What a person sees in the terminal: live progress, notes, warnings, completions and tables.

On a terminal the progress of training is one live bar; anywhere else (a file, a pipe, a job log) each logged step is
one plain line. Text that is not ours, such as completions and prompts, is never read as markup.
"""

from __future__ import annotations

import io
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from tandem.rl.journal import prompt_text
from tandem.rl.samples import Scored

# What a progress line shows, in this order, as (metric, label, format); only what a run has.
_SHOWN = (
    ("reward", "reward", ".3f"),
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", ".3f"),
    ("completions/mean_length", "length", ".0f"),
    ("kl", "kl", ".4f"),
)
_TOKENS_PER_SECOND = ("tokens_per_second", "tokens_per_s", "perf/throughput")
_HIDDEN_BESIDE_REWARD = "loss"  # the policy loss hovers about zero and says little; for SFT it is the number to watch

_TIME = "time/"
_SHOWN_PARTS = 2
_SMALLEST_SHARE = 0.05

_MAX_SHOWN_CHARACTERS = 1200

_TERMINAL_MOVES = re.compile("[\r\v\f\x1c-\x1f\x85]")  # white space that is no plain blank, line end or tab
_JOINERS = "\u200c\u200d"  # invisible, yet part of how emoji and Persian are written


class Console:
    """Output of one command.

    Args:
        stdout: None: the process's. stderr: likewise; warnings go there.
        live: None: live progress if stdout is a terminal; True or False to decide.
        width: columns; None: the terminal's, and as long as need be for plain step lines.
    """

    def __init__(
        self,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        *,
        live: bool | None = None,
        width: int | None = None,
    ) -> None:
        self._stdout, self._stderr = stdout or sys.stdout, stderr or sys.stderr
        self._live = self._stdout.isatty() if live is None else live
        self._out = RichConsole(file=self._stdout, width=width, markup=False, highlight=False, emoji=False)
        self._err = RichConsole(file=self._stderr, width=width, markup=False, highlight=False, emoji=False)
        self._warned: set[str] = set()
        self._total, self._first = 0, 0
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""

    def start(self, total: int, done: int = 0, label: str = "training") -> None:
        """Begin showing progress over `total` steps, of which `done` were made in an earlier process."""
        self.stop()
        self._total, self._first, self._started, self._label = total, done, time.monotonic(), label
        if self._live:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}", markup=False),
                console=self._out,
                expand=True,
                redirect_stdout=True,
                redirect_stderr=self._stderr.isatty(),
                transient=True,
            )
            self._task = self._progress.add_task(label, total=total, completed=done, line="")
            self._progress.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics after step number `step` (from 1): on the live bar, or as one plain line."""
        parts = _shown(metrics)
        if left := self._time_left(step):
            parts.append(f"{left} left")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, line="  ".join(parts))
        else:
            total = str(self._total) if self._total else "?"
            self._line(self._out, self._text("  ".join([f"step {step:>{len(total)}}/{total}", *parts])))

    def part(self, name: str) -> None:
        """Show on the live bar which part of a step goes on; an empty name: none in particular."""
        if self._progress is not None and self._task is not None:
            text = f"{self._label}: {name.replace('_', '-')}" if name else self._label
            self._progress.update(self._task, description=text)

    def stop(self) -> None:
        """Take the live bar away. Safe to call at any time."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def note(self, text: str) -> None:
        """A line of information."""
        self._line(self._out, self._text(text))

    def warn(self, text: str) -> None:
        """A warning on stderr. The same text is said once."""
        if text in self._warned:
            return
        self._warned.add(text)
        line = Text.assemble(("warning: ", "bold yellow"), self._text(text))
        # Beside a live bar both streams are the same screen, and only the bar's own console can write above it.
        target = self._out if self._progress is not None and self._stderr.isatty() else self._err
        self._line(target, line)

    def table(self, title: str, rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
        """Rows of equal length under a title, with column names if there is a header."""
        columns = max([len(header), *(len(row) for row in rows)], default=0)
        table = Table(
            title=self._text(title),
            title_justify="left",
            title_style="bold",
            show_header=bool(header),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for index in range(columns):
            name = header[index] if index < len(header) else ""
            table.add_column(self._text(name), overflow="fold")
        for row in rows:
            table.add_row(*(self._text(_cell(value)) for value in row))
        self._out.print(table)

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """The closing table of a run: (what, value)."""
        self.stop()
        self.table("Summary", rows)

    def print_completions(self, rows: Sequence[Scored], n: int) -> None:
        """Show the first `n` completions with their prompts, rewards and advantages."""
        for row in rows[: max(n, 0)]:
            values = [f"{name} {_number(value)}" for name, value in row.rewards.items()]
            title = f"reward {_number(row.reward)}  advantage {row.advantage:+.3f}"
            ending = "cut by the length limit" if row.completion.truncated else "ended"
            values += [f"{name} {_shortened(str(value))}" for name, value in row.extra.items()]
            facts = "  ".join([*values, f"{len(row.completion.ids)} tokens, {ending}"])
            body = Text("\n").join(
                [
                    self._text(_shortened(prompt_text(row.prompt.prompt), head=False), style="dim"),
                    self._text(_shortened(row.text)),
                    self._text(facts, style="italic"),
                ]
            )
            self._out.print(Panel(body, title=Text(title), title_align="left", box=box.ROUNDED))

    @classmethod
    def silent(cls) -> Console:
        """Says nothing: for processes other than the first of several."""
        return cls(stdout=io.StringIO(), stderr=io.StringIO(), live=False)

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _time_left(self, step: int) -> str:
        made, remaining = step - self._first, self._total - step
        if made <= 0 or remaining <= 0:
            return ""
        return _duration((time.monotonic() - self._started) / made * remaining)

    def _text(self, text: str, style: str = "") -> Text:
        return Text(_printable(text, getattr(self._stdout, "encoding", None)), style=style)

    def _line(self, console: RichConsole, text: Text) -> None:
        # Where lines are read by programs they must stay whole; a terminal wraps by itself at words.
        console.print(text, soft_wrap=not console.is_terminal)


def _shown(metrics: Mapping[str, float]) -> list[str]:
    parts = []
    for name, label, form in _SHOWN:
        if name == _HIDDEN_BESIDE_REWARD and "reward" in metrics:
            continue
        if name in metrics:
            parts.append(f"{label} {metrics[name]:{form}}")
    rate = next((metrics[name] for name in _TOKENS_PER_SECOND if name in metrics), None)
    if rate is not None:
        parts.append(f"{_quantity(rate)} tok/s")
    if times := _times(metrics):
        parts.append(times)
    return parts


def _times(metrics: Mapping[str, float]) -> str:
    """A step's seconds and the parts that took most of them: `12.3 s (generate 61%, backward 30%)`."""
    seconds = metrics.get("step_time", 0.0)
    if not seconds > 0:
        return ""
    shares = {n.removeprefix(_TIME): s / seconds for n, s in metrics.items() if n.startswith(_TIME)}
    largest = sorted(shares, key=lambda name: -shares[name])[:_SHOWN_PARTS]
    shown = ", ".join(f"{name} {shares[name]:.0%}" for name in largest if shares[name] >= _SMALLEST_SHARE)
    return f"{seconds:.3g} s" + (f" ({shown})" if shown else "")


def _quantity(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _cell(value: object) -> str:
    return _number(value) if value is None or isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _shortened(text: str, head: bool = True) -> str:
    """Long text cut to its beginning, or for a prompt to its end, where the question stands."""
    if len(text) <= _MAX_SHOWN_CHARACTERS:
        return text
    hidden = len(text) - _MAX_SHOWN_CHARACTERS
    if head:
        return f"{text[:_MAX_SHOWN_CHARACTERS]} … ({hidden} more characters)"
    return f"({hidden} characters) … {text[-_MAX_SHOWN_CHARACTERS:]}"


def _printable(text: str, encoding: str | None) -> str:
    """Control characters, which could move the cursor or hide text, and whatever the stream's encoding lacks, as
    visible escapes."""
    visible = "".join(c if c.isprintable() or c.isspace() or c in _JOINERS else _escaped(c) for c in text)
    visible = _TERMINAL_MOVES.sub(lambda match: _escaped(match[0]), visible)
    encoding = encoding or "utf-8"
    return visible.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
