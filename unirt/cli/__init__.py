"""The command line: `unirt doctor`, `inspect`, `select`, `build`, `run`, `compare`, `explain`;
`calibrate` and `sensitivity`, which tell what low precision would do; and those that make another
model of one: `quantize`, `cast`, `sparsify`.

Engines load only in commands that run them, and only then.
"""

from __future__ import annotations

import logging
import re
from importlib.metadata import version
from inspect import getdoc
from typing import Annotated

import typer
from rich.console import Console

from unirt.cli import outcome
from unirt.cli.build import build
from unirt.cli.calibrate import calibrate
from unirt.cli.cast import cast
from unirt.cli.compare import compare
from unirt.cli.doctor import doctor
from unirt.cli.explain import explain
from unirt.cli.inspect import inspect
from unirt.cli.outcome import EXIT_CODES
from unirt.cli.quantize import quantize
from unirt.cli.run import run
from unirt.cli.select import select
from unirt.cli.sensitivity import sensitivity
from unirt.cli.sparsify import sparsify
from unirt.cli.terminal import leave_quietly, prepare_streams, safe, stdout

__all__ = ["app", "main"]

app = typer.Typer(
    name="unirt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
COMMANDS = (
    *(doctor, inspect, select, build, run, compare, explain),
    *(calibrate, sensitivity, quantize, cast, sparsify),
)
for command in COMMANDS:
    # Typer keeps the line breaks of all paragraphs but the first.
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", getdoc(command) or "")
    app.command(help=text, epilog=EXIT_CODES)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        stdout().print(f"unirt {version('unirt')}")
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


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return safe(super().format(record))


def main() -> None:
    """The `unirt` command."""
    prepare_streams()
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_SafeFormatter())
    outcome.Process.is_ours = True
    # Help is printed by a console of Typer's.
    Console.on_broken_pipe = lambda _: leave_quietly()  # type: ignore[assignment, method-assign]
    app()
