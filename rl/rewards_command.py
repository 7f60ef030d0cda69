"""`rl-train rewards`: the configured rewards on completions that exist already, for writing and debugging them.

The completions come from a file of JSON lines (`prompt`, `completion` and the columns that the rewards need), from a
run's `rollouts/*.jsonl` (the columns are then taken from the config's data set, by row number), or from a column of the
data set that holds the known answers.
"""

from __future__ import annotations

import functools
import inspect
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.rewards.base import Reward, load_reward
from tandem.rewards.call import Call, Row, TrainerState
from tandem.rewards.completion import completion_text
from tandem.rewards.compose import call_all, logged_extra
from tandem.rl.columns import plain_messages
from tandem.rl.config import Config, DataConfig, EvalConfig
from tandem.rl.console import Console
from tandem.rl.errors import UserError, short
from tandem.rl.journal import prompt_text, read_rollouts, rollout_files
from tandem.rl.rows import load_rows
from tandem.rl.samples import Completion, Prompt

_BARS = "▁▂▃▄▅▆▇█"
_BINS = 12
_POLL_SECONDS = 0.5
# What the journal writes beside prompt and completion; everything else in a line is a column.
_JOURNAL = (
    "step",
    "group",
    "prompt_index",
    "completion_ids",
    "log_probs",
    "truncated",
    "rewards",
    "reward",
    "advantage",
    "turn_rewards",
    "turn_advantages",
    "extra",
    "errors",
    "skipped",
    "watched",
)


def show_rewards(config: Config, console: Console, *, on: Path | None, answers: str | None, examples: int) -> bool:
    """Compute the rewards and show their tables. Returns whether every reward worked.

    Args:
        on: a file of completions; None: the data set's rows.
        answers: the column of the data set that holds completions, where there is no file.
        examples: how many completions to show with their values.

    Raises:
        UserError: there are no rewards or no completions, or a file or a reward cannot be read.
    """
    if not config.rewards.reward_funcs:
        raise UserError("the config names no rewards", fix="set rewards.reward_funcs")
    rewards = [
        load_reward(s.function, name=s.name, weight=s.weight, kwargs=s.kwargs, scope=s.scope)
        for s in config.rewards.reward_funcs
    ]
    watched = [load_reward(s.function, name=s.name, kwargs=s.kwargs) for s in config.rewards.watch_funcs]
    rows = _rows_of_file(on, config) if on is not None else _rows_of_data(config, answers)
    if any("completion_ids" in reward.named() for reward in rewards + watched):
        _tokenise(rows, config)
    faults: dict[str, UserError] = {}
    state, timeout = TrainerState(0, 0), config.rewards.timeout
    trained = call_all(rewards, rows, state, timeout, faults)
    known = {call.reward.name: call.values for call in trained if call.values}
    calls = trained + call_all(watched, rows, state, timeout, faults, known=known)
    totals = _totals(trained)
    groups = len({row.group for row in rows})
    console.table(
        f"Rewards on {_many(len(rows), 'completion')} of {_many(groups, 'prompt')}",
        [
            *(_line(call, faults, f"{call.reward.weight:g}") for call in trained),
            *(_line(call, faults, "watched") for call in calls[len(trained) :]),
            ("total", "", *_spread(totals), ""),
        ],
        header=("reward", "weight", "mean", "std", "None", "seconds"),
    )
    series = [*((call.reward.name, call.values) for call in calls if call.values), ("total", totals)]
    console.table(
        "Distributions",
        [(name, *_bars(values)) for name, values in series],
        header=("reward", "smallest", "", "largest"),
    )
    _show_correlations(calls, console)
    metrics = {name: statistics.fmean(v) for call in calls for name, v in call.metrics.items()}
    if metrics:
        console.table("Metrics of the rewards", list(metrics.items()))
    _show_examples(calls, rows[:examples], console)
    for text in [*(notice for call in calls for notice in call.notices), *map(str, faults.values())]:
        console.warn(text)
    return not faults


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def show_protections(rewards: Sequence[Reward], console: Console) -> None:
    """What the sandbox protects from on this machine, where a reward uses it; otherwise nothing."""
    users = [reward.name for reward in rewards if uses_sandbox(reward)]
    if not users:
        return
    from tandem.rewards.sandbox_check import protections

    found = protections()
    console.table(
        f"Sandbox of {', '.join(users)}",
        [(p.name, "in force" if p.in_force else "missing", p.why) for p in found],
        header=("protection", "", "what it does, or why it is missing"),
    )
    if any(not p.in_force for p in found if p.name.startswith("attempt:")):
        console.warn("a program in the sandbox got at something outside it; see the table")


def uses_sandbox(reward: Reward) -> bool:
    """Whether the module that defines the function has taken something from the sandbox or from `code_tests`."""
    function = reward.function
    while isinstance(function, functools.partial):
        function = function.func
    module = sys.modules.get(getattr(inspect.unwrap(function), "__module__", None) or type(function).__module__)
    origins = {
        str(getattr(value, attribute, ""))
        for value in (vars(module) if module else {}).values()
        for attribute in ("__module__", "__name__")
    }
    return any(origin.startswith(("tandem.rewards.sandbox", "tandem.rewards.code_tests")) for origin in origins)


def watch(command: Sequence[str], config: Config, files: Sequence[Path], console: Console) -> None:
    """Run `rl-train` with these arguments, and again when a reward's file, one beside it, or one of `files` changes.

    Every run is a process of its own, so that changed helper modules are read anew too. Ends with Ctrl-C.
    """
    specs = [*config.rewards.reward_funcs, *config.rewards.watch_funcs]
    watched = [Path(s.function.rpartition(":")[0]) for s in specs if ".py:" in s.function]
    folders = sorted({path.expanduser().resolve().parent for path in watched})
    try:
        while True:
            before = _versions(folders, files)
            subprocess.run([sys.executable, "-m", "tandem.rl.cli", *command], check=False)
            console.note("watching; Ctrl-C ends")
            while _versions(folders, files) == before:
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        console.note("no longer watching")


def _versions(folders: Sequence[Path], files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Time of change and size of everything that is watched."""
    found = {}
    for path in [*files, *(p for folder in folders for p in folder.glob("*.py"))]:
        try:
            stat = path.stat()
        except OSError:
            continue  # an editor replaces files; it is back in a moment, and counts as changed then
        found[path] = (stat.st_mtime_ns, stat.st_size)
    return found


# Completions


def _rows_of_file(path: Path, config: Config) -> list[Row]:
    if path.is_dir():  # a run's, or its rollouts/
        files = rollout_files(path) or rollout_files(path.parent)
        path = files[-1][1] if files else path
    records = read_rollouts(path)
    if not records:
        raise UserError(f"{path} holds no completions", fix="give a file with a line of JSON per completion")
    for number, record in enumerate(records, 1):
        for key in ("prompt", "completion"):
            if not isinstance(record.get(key), (str, list)) or (key == "prompt" and not record[key]):
                raise UserError(
                    f"{path}, line {number}: {key!r} is {short(record.get(key))}",
                    fix="a line needs `prompt` and `completion`, texts or lists of messages, and further columns",
                )
    source = _DataRows(config, path) if all("prompt_index" in record for record in records) else None
    groups: dict[tuple[Any, ...], int] = {}
    rows = []
    for number, record in enumerate(records):
        prompt = plain_messages(record["prompt"])
        columns = {k: v for k, v in record.items() if k not in ("prompt", "completion", *(_JOURNAL if source else ()))}
        if source:
            columns = source.columns(record, number + 1) | columns
        group = groups.setdefault((record.get("step"), record.get("group"), prompt_text(prompt)), len(groups))
        ids = record.get("completion_ids") if source else None
        completion = Completion(list(ids or []), [], bool(record.get("truncated")) if source else False)
        index = record["prompt_index"] if source else number
        rows.append(Row(Prompt(index, [], prompt, columns), completion, group, _text(record["completion"])))
    return rows


class _DataRows:
    """The data set that a run's rollouts were drawn from: their columns are not in the rollout files."""

    def __init__(self, config: Config, path: Path) -> None:
        self._path = path
        part: DataConfig | EvalConfig
        if path.name.startswith("eval_") and config.eval.dataset_name:
            self._name, part, split = "eval.dataset_name", config.eval, config.eval.dataset_test_split
        else:
            self._name, part, split = "data.dataset_name", config.data, config.data.dataset_train_split
        assert part.dataset_name is not None
        self._rows = load_rows(
            part.dataset_name,
            config_name=part.dataset_config,
            split=split,
            kwargs=part.dataset_kwargs,
            max_examples=getattr(part, "max_examples", None),
            what=self._name,
        ).with_format(None)

    def columns(self, record: dict[str, Any], line: int) -> dict[str, Any]:
        index = record["prompt_index"]
        row = dict(self._rows[index]) if isinstance(index, int) and 0 <= index < len(self._rows) else {}
        prompt = plain_messages(row.pop("prompt", ""), self._rows.features.get("prompt"))
        if prompt != plain_messages(record["prompt"]):
            raise UserError(
                f"{self._path}, line {line}: its prompt is not that of row {index} of {self._name}",
                reason="rollouts hold no columns, so these are looked up in the data set",
                fix="use the config that the run was made with (its own config.yaml)",
            )
        return row


def _rows_of_data(config: Config, answers: str | None) -> list[Row]:
    data = config.data
    assert data.dataset_name is not None
    dataset = load_rows(
        data.dataset_name,
        config_name=data.dataset_config,
        split=data.dataset_train_split,
        kwargs=data.dataset_kwargs,
        max_examples=data.max_examples,
    ).with_format(None)
    columns = [name for name in dataset.column_names if name != "prompt"]
    if answers is None or answers not in columns or "prompt" not in dataset.column_names:
        problem = "there are no completions to judge" if answers is None else f"there is no column {answers!r}"
        raise UserError(
            problem,
            reason=f"the data set's columns are {', '.join(dataset.column_names)}",
            fix="name a file with --on, or with --answers the column whose texts are taken as completions",
        )
    rows = []
    for index, record in enumerate(dict(row) for row in dataset):
        if record[answers] is not None:
            messages = plain_messages(record.pop("prompt"), dataset.features["prompt"])
            prompt = Prompt(index, [], messages, record)
            rows.append(Row(prompt, Completion([], [], False), index, _text(record[answers])))
    if not rows:
        raise UserError(f"the column {answers!r} has no values", fix="name another column with --answers")
    return rows


def _text(completion: Any) -> str:
    return completion_text(completion) if isinstance(completion, (str, list)) else str(completion)


def _tokenise(rows: list[Row], config: Config) -> None:
    """Token ids for completions that have none, for rewards that count them."""
    missing = [row for row in rows if not row.completion.ids and row.text]
    if missing:
        from tandem.rl.model import load_tokenizer

        tokenizer = load_tokenizer(config.model)
        for row in missing:
            row.completion.ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]


# Tables


def _line(call: Call, faults: dict[str, UserError], weight: str) -> tuple[object, ...]:
    spread = ("error", "-", "-") if call.reward.name in faults else _spread(call.values)
    return (call.reward.name, weight, *spread, f"{call.seconds:.3f}")


def _totals(calls: list[Call]) -> list[float | None]:
    """The weighted sums of the rewards that worked; None where none applies."""
    counted = [c for c in calls if c.values and c.reward.weight] or [c for c in calls if c.values]
    rows = zip(*(call.values for call in counted), strict=True)
    weights = [call.reward.weight for call in counted]
    parts = [[w * v for w, v in zip(weights, row, strict=True) if v is not None] for row in rows]
    return [sum(row) if row else None for row in parts]


def _spread(values: list[float | None]) -> tuple[str, ...]:
    """Mean and standard deviation, and how many are None."""
    known = [v for v in values if v is not None]
    missing = str(len(values) - len(known))
    if not known:
        return "-", "-", missing
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.fmean(known):.3f}", f"{deviation:.3f}", missing


def _bars(values: list[float | None]) -> tuple[str, str, str]:
    known = [v for v in values if v is not None]
    return (f"{min(known):.3f}", histogram(known), f"{max(known):.3f}") if known else ("-", "", "-")


def histogram(values: Sequence[float | None]) -> str:
    """Bars of the counts in equal parts between smallest and largest value; a dot where a part is empty."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    if low == high:
        return "all equal"
    counts = [0] * _BINS
    for value in known:
        counts[min(int((value - low) / (high - low) * _BINS), _BINS - 1)] += 1
    most = max(counts)
    return "".join(_BARS[math.ceil(c / most * len(_BARS)) - 1] if c else "·" for c in counts)


def correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """Pearson's correlation over the rows where both apply; None where one of them does not vary."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if len(pairs) < 2 or any(min(side) == max(side) for side in zip(*pairs, strict=True)):
        return None
    return statistics.correlation(*zip(*pairs, strict=True))


def _show_correlations(calls: list[Call], console: Console) -> None:
    series = [(call.reward.name, call.values) for call in calls if call.values]
    if len(series) < 2:
        return
    series.append(("characters", [float(len(row.text)) for row in calls[0].rows]))
    lines = []
    for number, (name, values) in enumerate(series):
        cells = [correlation(values, other) for _, other in series[:number]]
        lines.append(
            (
                f"{number + 1} {name}",
                *("-" if c is None else f"{c:+.2f}" for c in cells),
                *[""] * (len(series) - 1 - number),
            )
        )
    console.table("Correlations", lines, header=("", *map(str, range(1, len(series)))))


def _show_examples(calls: list[Call], rows: list[Row], console: Console) -> None:
    for index, row in enumerate(rows):
        values = [
            f"{call.reward.name} {'None' if (v := call.values[index]) is None else f'{v:g}'}"
            for call in calls
            if call.values
        ]
        values += [f"{column} {value}" for column, value in logged_extra(calls, index).items()]
        console.table(f"completion {index}", [("prompt", prompt_text(row.prompt.prompt)), ("completion", row.text)])
        console.note("  ".join(values))
