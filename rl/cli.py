"""`rl-train`: the command line. Nothing heavy is imported before a command runs.

Exit codes: 0 done; 2 a mistake that the user can fix; 1 anything else, a stopped run included.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tandem.rl.errors import UserError

app = typer.Typer(
    name="rl-train",
    help="Reinforcement learning, preference tuning and supervised fine-tuning of language models on one GPU or a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="A YAML config.", metavar="CONFIG")]
RunPath = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that replace the config's.", metavar="section.key=value …")
]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; no training.")
    ] = False,
) -> None:
    """Train what a config describes."""
    commands = _commands()
    if not commands.run(config, overrides or [], dry_run=dry_run, console=_console()):
        raise typer.Exit(1)


@app.command()
def resume(run: RunPath, overrides: Overrides = None) -> None:
    """Go on with a run from its newest checkpoint."""
    if not _commands().resume(run, overrides or [], console=_console()):
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    target: Annotated[
        Path, typer.Argument(help="A run folder, or a config for the untrained model.", metavar="RUN|CONFIG")
    ],
    overrides: Overrides = None,
) -> None:
    """Held-out score of a run's adapter, or of a config's model before training."""
    _commands().evaluate_run(target, overrides or [], console=_console())


@app.command()
def report(run: RunPath) -> None:
    """Write a run's report.html with its curves and completions."""
    _commands().report(run, console=_console())


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(help="How many prompts to sample completions for.", min=1)] = 2,
) -> None:
    """Load config, data and rewards, sample and score a few completions, print them; no training."""
    _commands().check(config, overrides or [], num_prompts=prompts, console=_console())


def main() -> None:
    """Entry point: turns a user's mistake into one clear message and exit code 2."""
    try:
        app()
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("stopped at once")
        sys.exit(1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _commands():
    from tandem.rl import commands

    return commands


def _console():
    from tandem.rl.console import Console

    return Console()
