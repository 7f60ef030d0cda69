"""The folder of a run, as the process that trains has it: a name of its own, held against others, and gone again if
nothing came of the run."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tandem.rl import distributed
from tandem.rl.config import Config
from tandem.rl.config_file import save_config
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.run_lock import run_lock

# What a run's folder holds before its first step.
_RECORDS = ("config.yaml", "data.json", "model.json")
_BEFORE_THE_FIRST_STEP = {".lock", *_RECORDS, *(f"{name}.tmp" for name in _RECORDS)}


def check_folder(run_dir: Path) -> None:
    """Raises UserError: a run's folder could not be made here, as far as can be told without making it."""
    parent = next(one for one in (run_dir, *run_dir.parents) if one.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "is not a folder" if not parent.is_dir() else "cannot be written to"
        raise UserError(f"the run folder {str(run_dir)!r} cannot be made: {parent} {why}", fix="set output_dir")


@contextmanager
def new_folder(config: Config, console: Console, *, copied: tuple[str, ...] = ()) -> Iterator[Config]:
    """Make a folder of the run's own with its config, hold it, and give the config with the name that it got. A run
    never writes into another's folder: the second `demo` becomes `demo-2`, also where both start at once.

    A run that fails before its first step leaves none: what is wrong with a model or an adapter shows only once they
    are loaded.

    Args:
        copied: names of files that the run did not make itself.

    Raises:
        UserError: no folder can be made in `output_dir`.
    """
    config = distributed.broadcast(_with_own_folder(config, console) if distributed.is_main() else config)
    run_dir = config.run_dir
    try:
        with locked(run_dir, console):
            try:
                if distributed.is_main():
                    save_config(config, run_dir / "config.yaml")
                console.note(f"run folder: {run_dir}")
                yield config
            except (UserError, OSError):
                if distributed.is_main() and not _has_begun(run_dir, {*_BEFORE_THE_FIRST_STEP, *copied}):
                    shutil.rmtree(run_dir, ignore_errors=True)  # while it is held, so that nobody resumes it meanwhile
                raise
    except (UserError, OSError):
        if distributed.is_main():
            with contextlib.suppress(OSError):
                run_dir.rmdir()  # empty where it could not be locked, or a network's file system kept the lock
        raise


def _with_own_folder(config: Config, console: Console) -> Config:
    """The config with a name whose folder was not there before and is there now."""
    output_dir, name, number = Path(config.output_dir), config.run_name, 1
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                (output_dir / name).mkdir()  # which of two processes succeeds, the file system decides
                break
            except FileExistsError:
                number += 1
                name = f"{config.run_name}-{number}"
    except OSError as error:
        where = str(output_dir / name)
        raise UserError(f"the run folder {where!r} cannot be made: {error}", fix="set output_dir") from error
    if number > 1:
        console.note(f"{config.run_dir} exists, so this run is named {name}")
    return config.model_copy(update={"run_name": name})


@contextmanager
def locked(run_dir: Path, console: Console) -> Iterator[None]:
    """Hold the run's folder; one of several processes does it for all."""
    if not distributed.is_main():
        yield
        return
    with run_lock(run_dir, note=console.note):
        yield


def _has_begun(run_dir: Path, known: set[str]) -> bool:
    """Whether a run's folder holds anything, empty files aside, that is not `known`."""
    kept = [path for path in run_dir.iterdir() if path.name not in known]
    return any(path.stat().st_size if path.is_file() else True for path in kept)
