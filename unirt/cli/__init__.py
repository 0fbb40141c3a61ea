"""The command line: `unirt doctor`, `inspect`, `select`, `run`, `compare`.

Engines load only in commands that run them, and only then.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated

import typer

from unirt.cli import outcome
from unirt.cli.compare import compare
from unirt.cli.doctor import doctor
from unirt.cli.inspect import inspect
from unirt.cli.outcome import EXIT_CODES
from unirt.cli.run import run
from unirt.cli.select import select
from unirt.cli.terminal import prepare_streams

__all__ = ["app", "main"]

app = typer.Typer(
    name="unirt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
for command in (doctor, inspect, select, run, compare):
    app.command(epilog=EXIT_CODES)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unirt {version('unirt')}")
        raise typer.Exit


@app.callback()
def _unirt(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run one neural network on whichever inference engine is best here, and see why."""


def main() -> None:
    """The `unirt` command."""
    prepare_streams()
    outcome.Process.is_ours = True
    try:
        app()
    except BrokenPipeError:
        # The reader (`| head`) has enough. Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
