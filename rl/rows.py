"""Rows of a data set: from files, folders, the hub or a Python function."""

from __future__ import annotations

import csv
import difflib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.rl.errors import UserError, cause, short
from tandem.rl.row_function import rows_from_function

if TYPE_CHECKING:
    from datasets import Dataset

_FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")


def load_rows(
    dataset_name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    kwargs: Mapping[str, Any] | None = None,
    max_examples: int | None = None,
    what: str = "data.dataset_name",
) -> Dataset:
    """The rows of a data set.

    Args:
        dataset_name: hub id; .json, .jsonl, .csv or .parquet file (a file is its only split, `split` is not asked);
            folder written by `save_to_disk` or holding data files; or `FILE.py:FUNCTION`, which is called with
            `split` if it takes one and `kwargs`, and returns rows as dicts or a Dataset.
        max_examples: keep only the first so many rows.
        what: the config key that errors name.

    Nothing is cached for local sources: a changed file gives its new rows.

    Raises:
        UserError: nothing there, unreadable, an unknown split, no rows, or the function failed.
    """
    path = Path(dataset_name).expanduser()
    if function := re.fullmatch(r"(.+\.py):(\w+)", dataset_name):
        file = Path(function[1]).expanduser()
        if not file.is_file():
            raise _no_such_source(file, what)
        returned = rows_from_function(file, function[2], split, dict(kwargs or {}), what)
        rows = _pick_split(returned, split, f"{file}:{function[2]}", what)
    else:
        if kwargs:
            raise UserError(f"{what} is {dataset_name!r}, which takes no dataset_kwargs, but {dict(kwargs)!r} is given")
        if path.is_dir():
            rows = _from_folder(path, config_name, split, what)
        elif path.suffix.lower() in _FILE_TYPES and (path.exists() or _is_local_name(dataset_name)):
            rows = _from_file(path, what)
        elif path.exists() or _is_local_name(dataset_name):
            raise _no_such_source(path, what)
        else:
            rows = _from_hub(dataset_name, config_name, split, what)
    if not len(rows):
        raise UserError(
            f"{what}: {dataset_name!r} has no rows (split {split!r})", fix="name data with at least one row"
        )
    return rows.select(range(min(max_examples, len(rows)))) if max_examples else rows


def _is_local_name(name: str) -> bool:
    """Whether a name can only be a path: hub ids are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in (*_FILE_TYPES, ".py")


def _no_such_source(path: Path, what: str) -> UserError:
    if path.suffix == ".py" and path.exists():
        return UserError(f"{what} is {str(path)!r} without a function", fix=f"write {path}:FUNCTION")
    if path.exists():
        return UserError(f"{what}: cannot read {str(path)!r}: unknown file type", fix=f"use {', '.join(_FILE_TYPES)}")
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return UserError(
        f"{what}: there is no file {str(path)!r}",
        fix=f"did you mean {str(path.parent / near[0])!r}?" if near else "paths are relative to the config or to here",
    )


def _from_file(path: Path, what: str) -> Dataset:
    """One data file. JSON and CSV are read here rather than by `datasets`, whose cache can go stale and whose errors
    name no line."""
    if not path.is_file():
        raise _no_such_source(path, what)
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet
            from datasets import Dataset
            from datasets.table import InMemoryTable

            return Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            return _parse_csv(path, text, what)
        return _to_dataset(_parse_json(path, text, what), str(path), what)
    except (OSError, ValueError) as error:  # pyarrow's and pandas's parse errors and UnicodeDecodeError are ValueErrors
        raise UserError(f"{what}: cannot read {str(path)!r}: {type(error).__name__}: {error}") from error


def _parse_json(path: Path, text: str, what: str) -> list[Any]:
    """A list of rows, or one row per line."""
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(text)
            return whole if isinstance(whole, list) else [whole]
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):  # several documents: one row per line
                raise UserError(f"{what}: {path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{what}: {path}, line {number}: not valid JSON: {error.msg}: {short(line)}",
                fix="write one JSON object per line",
            ) from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{what}: {path}, line {number} is {short(rows[-1])}, not an object of columns")
    return rows


def _parse_csv(path: Path, text: str, what: str) -> Dataset:
    import io

    import pandas
    from datasets import Dataset

    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(
                    f"{what}: {path}, line {reader.line_num}: {len(row)} fields, but the header has {len(header)}",
                    fix="quote fields that hold commas or line breaks",
                )
    except csv.Error as error:
        raise UserError(f"{what}: {path}, line {reader.line_num}: not valid CSV: {error}") from error
    if not header:
        raise UserError(f"{what}: {str(path)!r} is empty", fix="name data with at least one row")
    return Dataset.from_pandas(pandas.read_csv(io.StringIO(text)), preserve_index=False)


def _from_folder(path: Path, config_name: str | None, split: str, what: str) -> Dataset:
    import datasets

    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _pick_split(datasets.load_from_disk(str(path)), split, str(path), what)
        # A cache of its own, thrown away at once: the shared one would keep copies of every version of the files.
        with tempfile.TemporaryDirectory() as cache, _quiet_progress():
            return datasets.load_dataset(
                str(path), config_name, split=split, cache_dir=cache, keep_in_memory=True, num_proc=None
            )
    except UserError:
        raise
    except Exception as error:  # builders raise whatever their parsers raise; reported with its cause
        raise UserError(
            f"{what}: cannot load split {split!r} of folder {str(path)!r}: {cause(error)}",
            fix="name an existing split and config; folders hold data files (train.jsonl) or what save_to_disk wrote",
        ) from error


def _from_hub(name: str, config_name: str | None, split: str, what: str) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split)
    except ConnectionError as error:
        raise UserError(
            f"{what}: cannot reach the hub for {name!r}: {cause(error)}",
            reason="there is no such local file or folder either, and no copy in the cache",
            fix="check the name and the connection (HF_HUB_OFFLINE forbids it), or name a local file",
        ) from error
    except Exception as error:  # the hub client's errors have no common base; reported with its cause
        raise UserError(
            f"{what}: cannot load {name!r} (config {config_name!r}, split {split!r}) from the hub: {cause(error)}",
            fix="check the name, dataset_config and the split; private data need `hf auth login`",
        ) from error


def _pick_split(loaded: Any, split: str, source: str, what: str) -> Dataset:
    import datasets

    if isinstance(loaded, datasets.DatasetDict | datasets.IterableDatasetDict):
        if split not in loaded:
            raise UserError(f"{what}: {source} has no split {split!r}", fix=f"its splits are {', '.join(loaded)}")
        loaded = loaded[split]
    if isinstance(loaded, datasets.Dataset):
        return loaded
    return _to_dataset(loaded, source, what)


def _to_dataset(rows: Iterable[Any], source: str, what: str) -> Dataset:
    from datasets import Dataset

    rows = list(rows)
    columns: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            raise UserError(f"{what}: row {number} of {source} is {short(row)}, not a dict of columns")
        columns.update(dict.fromkeys(row))
    if rows:  # the first row decides about the columns
        rows[0] = {**dict.fromkeys(columns), **rows[0]}
    try:
        return Dataset.from_list(rows, on_mixed_types="use_json")
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        raise UserError(f"{what}: the rows of {source} do not form columns: {cause(error)}") from error


@contextmanager
def _quiet_progress() -> Iterator[None]:
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
