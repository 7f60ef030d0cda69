"""`rl-train`: the command line. Nothing heavy is imported before a config is read and found right.

Exit codes: 0 done; 2 a mistake that the user can fix; 1 anything else, a stopped run included.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from tandem.rl.allocator import growing_segments
from tandem.rl.errors import RunStopped, UserError
from tandem.rl.library_imports import collector_off

if TYPE_CHECKING:
    from tandem.rl.config import Config

# A disk that is full or a folder that is not the user's to write: nothing is wrong with the program.
_NO_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

app = typer.Typer(
    name="rl-train",
    help="Reinforcement learning, preference tuning and supervised fine-tuning of language models on one GPU or a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="A YAML config.", metavar="CONFIG")]
RunPath = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
ChangedModel = Annotated[
    bool, typer.Option("--changed-model", help="Go on although the base model is not the one of the run's start.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that replace the config's.", metavar="section.key=value …")
]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check config, data and rewards, and show the plan; no model is loaded."),
    ] = False,
) -> None:
    """Train what a config describes."""
    checked = load_config(config, overrides)
    if not _commands().run(checked, dry_run=dry_run, console=_console()):
        raise typer.Exit(1)


@app.command()
def resume(
    run: RunPath,
    overrides: Overrides = None,
    changed_data: Annotated[
        bool, typer.Option("--changed-data", help="Go on although the data set is not the one of before.")
    ] = False,
    changed_model: ChangedModel = False,
) -> None:
    """Go on with a run from its newest whole checkpoint."""
    config = load_run_config(run, overrides)
    if not _commands().resume(
        run, config, console=_console(), accept_changed_data=changed_data, accept_changed_model=changed_model
    ):
        raise typer.Exit(1)


@app.command()
def replay(run: RunPath, overrides: Overrides = None, changed_model: ChangedModel = False) -> None:
    """Train anew from a run's journal alone: the same rollouts, another objective."""
    config = load_run_config(run, overrides)
    if not _commands().replay(run, config, console=_console(), accept_changed_model=changed_model):
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    target: Annotated[
        Path, typer.Argument(help="A run folder, or a config for the untrained model.", metavar="RUN|CONFIG")
    ],
    overrides: Overrides = None,
    changed_model: ChangedModel = False,
) -> None:
    """Held-out score of a run's adapter, or of a config's model before training."""
    run = target if target.is_dir() else None
    config = load_run_config(run, overrides) if run else load_config(target, overrides)
    _commands().evaluate_run(config, run, console=_console(), accept_changed_model=changed_model)


@app.command()
def report(run: RunPath) -> None:
    """Write a run's report.html with its curves and completions."""
    load_run_config(run)
    _commands().report(run, console=_console())


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(help="How many prompts to sample completions for.", min=1)] = 2,
) -> None:
    """Load config, data and rewards, sample and score a few completions, print them; no training."""
    _commands().check(load_config(config, overrides), num_prompts=prompts, console=_console())


@app.command()
def rewards(
    config: ConfigPath,
    overrides: Overrides = None,
    on: Annotated[
        Path | None,
        typer.Option("--on", help="Completions: JSON lines, or a run's rollouts/*.jsonl.", metavar="FILE.jsonl"),
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="Without --on: the data's column that is taken as completions.", metavar="COLUMN")
    ] = None,
    show: Annotated[int, typer.Option(help="How many completions to show with their values.", min=0)] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Again whenever a reward's file changes.")] = False,
) -> None:
    """Compute the config's rewards on existing completions and show their statistics; no model is loaded."""
    from tandem.rl import rewards_command

    checked = load_config(config, overrides)
    if watch:
        command = ["rewards", str(config), *(overrides or []), f"--show={show}"]
        command += [f"--on={on}"] if on else []
        command += [f"--answers={answers}"] if answers else []
        rewards_command.watch(command, checked, [config, *([on] if on else [])], _console())
    elif not rewards_command.show_rewards(checked, _console(), on=on, answers=answers, examples=show):
        raise typer.Exit(2)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="A card (4090, a10, h100, …) or its memory in GiB; without it the one here.", metavar="CARD"),
    ] = None,
    host_gib: Annotated[
        float | None, typer.Option(help="Host memory in GiB; without it this machine's.", metavar="GIB")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """What a run needs and what fits on a card, from the config alone; loads no weights, needs no GPU."""
    checked = load_config(config, overrides)
    with collector_off():
        from tandem.rl import plan_command
        from tandem.rl.ignored_keys import say_ignored

    console = _console()
    if not as_json:
        say_ignored(checked, console, plan=True)
    plan_command.plan(checked, gpu=gpu, host_gib=host_gib, as_json=as_json, console=console)


def main() -> None:
    """Entry point: turns a user's mistake into one clear message and exit code 2."""
    os.environ.update(growing_segments())
    try:
        _main()
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave(end)
        raise


def _leave(end: SystemExit) -> NoReturn:
    """End one of several processes without clearing its modules: what is left there of a process group now and then
    ends the process with an abort, for which `torchrun` then kills the others while they write their report."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _main() -> None:
    try:
        _refuse_dashes(sys.argv[1:])
        app()
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except RunStopped as stop:
        _say(f"error: {stop}")
        sys.exit(1)
    except OSError as error:
        if error.errno not in _NO_WRITE:
            raise
        _say(f"error: cannot write: {error}\nFix: make room or the folder writable; then rl-train resume the run")
        sys.exit(2)


def _refuse_dashes(arguments: list[str]) -> None:
    """`--train.max_steps=3` or `--max_steps 3`, as other trainers write it, is told how it is written here."""
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        # No option of ours holds a dot or an underscore.
        if not argument.startswith("--") or not ("." in name or "_" in name):
            continue
        from tandem.rl.config_file import all_keys, full_name

        if "." in name or name in dict(all_keys()):
            key = name if "." in name else full_name(name)
            raise UserError(
                f"--{name} is no option",
                fix=f"values of the config stand without dashes: {key}={value if equals else 'VALUE'}",
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load_config(path: Path, overrides: list[str] | None) -> Config:
    """See `tandem.rl.config_file`, which is imported only now: pydantic would double the time of `--help`."""
    from tandem.rl import config_file

    return config_file.load_config(path, overrides)


def load_run_config(run: Path, overrides: list[str] | None = None) -> Config:
    from tandem.rl import config_file

    return config_file.load_run_config(run, overrides)


def _commands():
    with collector_off():
        from tandem.rl import commands

    return commands


def _console():
    from tandem.rl.console import Console

    return Console()


if __name__ == "__main__":
    main()
