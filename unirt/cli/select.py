"""`unirt select`: the candidates of this machine for a model, ranked, each with its reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from unirt.candidates import select as rank_candidates
from unirt.cli.arguments import (
    Beside,
    Debug,
    Json,
    ModelPath,
    complete_candidate,
    open_model,
    with_beside_hints,
)
from unirt.cli.outcome import NOTHING, OK, reporting
from unirt.cli.terminal import Column, print_heading, print_pairs, print_table, stdout, waiting
from unirt.selector import Selection


def select(
    model: ModelPath,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            "-c",
            help="Rank only these, written backend@device:precision. Repeatable.",
            autocompletion=complete_candidate,
        ),
    ] = None,
    beside: Beside = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rank the candidates for a model, and say why each is in or out. Runs nothing."""
    with reporting(as_json, debug) as report:
        opened = open_model(model, beside)
        with waiting("looking for engines", as_json):
            selection = rank_candidates(opened, candidate or None)
        rows = with_beside_hints(selection.rows, opened, model, beside)
        selection = replace(selection, rows=rows)
        report.document = selection.to_dict()
        report.code = OK if selection.best else NOTHING
        if not as_json:
            show(stdout(), selection)


def show(console: Console, selection: Selection) -> None:
    usable = [row for row in selection.rows if not row.excluded]
    if usable:
        print_table(
            console,
            [
                Column("candidate"),
                Column("points", right=True),
                Column("version"),
                Column("reads"),
            ],
            [
                [
                    str(row.candidate),
                    str(row.points),
                    row.facts.version if row.facts else "",
                    row.facts.format if row.facts else "",
                ]
                for row in usable
            ],
            ["bold green"] + [""] * (len(usable) - 1),
        )
        print_heading(console, "Why")
        print_pairs(
            console,
            [(str(row.candidate), "; ".join(row.reasons) or "no rule applies") for row in usable],
        )
    out = [row for row in selection.rows if row.excluded]
    if out:
        print_heading(console, "Out")
        print_pairs(
            console,
            [
                (str(row.candidate), f"{row.excluded}; {row.hint}" if row.hint else row.excluded)
                for row in out
            ],
        )
    console.print()
    if selection.best:
        console.print(Text(f"Best: {selection.best}", style="bold green"))
        console.print(Text("By rules, not by measuring; `unirt compare` measures."))
    else:
        console.print(Text("No engine of this machine can run this model.", style="bold red"))
