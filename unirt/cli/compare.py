"""`unirt compare`: every candidate side by side on this machine, the winner, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from unirt.cli.arguments import (
    CalibrationFile,
    Debug,
    Json,
    ModelPath,
    OptionTexts,
    Seed,
    ShapeTexts,
    complete_candidate,
    open_model,
    read_options,
    read_shapes,
    with_beside_hints,
)
from unirt.cli.outcome import NOTHING, OK, reporting
from unirt.cli.terminal import (
    Column,
    duration,
    plural,
    print_heading,
    print_pairs,
    print_table,
    size_text,
    stdout,
    telling,
    three_digits,
)
from unirt.comparison import MAX_DROP, MAX_ERROR, Comparison, Result
from unirt.comparison import compare as measure_candidates
from unirt.model import Model
from unirt.types import Candidate


def compare(
    model: ModelPath,
    candidates: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CANDIDATE",
            help="Written backend@device:precision, of which only the backend is needed. "
            "Default: all that can run it.",
            autocompletion=complete_candidate,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE.NPZ",
            help="Samples by input name, along axis 0; with `labels`, accuracy too. "
            "Default: random inputs.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="Whose answers are taken as right. Default: the NumPy oracle where it answers "
            "within seconds, else onnxruntime@cpu.",
            autocompletion=complete_candidate,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            min=0,
            help=f"Relative error above which none can win. Default: {MAX_ERROR:g}; but where the "
            "data has labels, low precisions may win while accuracy falls by at most "
            f"{100 * MAX_DROP:g} points.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Samples a call. Default: 1.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="How long to measure each candidate.")
    ] = 3.0,
    seed: Seed = 0,
    shape: ShapeTexts = None,
    option: OptionTexts = None,
    calibration: CalibrationFile = None,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside/--no-beside",
            help="Let engines use the same network in other formats beside the model.",
        ),
    ] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the candidates side by side: how fast, how right, and which one wins.

    Candidates take turns in short rounds. Latency is of single calls; samples/s is what they give,
    or a stream with several calls in flight if that gives more; error is relative to the answers of
    the reference. Candidates in int8 or fp8 are quantized from one calibration: of --calibration,
    else made of the data.
    """
    with reporting(as_json, debug) as report:
        notes: list[str] = []
        opened = open_model(model, beside, notes)
        named = [Candidate.parse(text) for text in candidates or ()]
        alone = named[0].backend if len(named) == 1 else None
        with telling(as_json) as teller:
            comparison = measure_candidates(
                opened,
                named or None,
                data,
                reference=reference,
                max_error=max_error,
                batch=batch,
                seconds=seconds,
                seed=seed,
                shapes=read_shapes(shape),
                options=read_options(option, alone),
                calibration=calibration,
                progress=teller,
            )
        rows = with_beside_hints(comparison.rows, opened, model, beside)
        comparison = replace(comparison, rows=rows)
        report.document = comparison.to_dict()
        report.document["notes"] += notes
        report.code = OK if comparison.winner else NOTHING
        if not as_json:
            show(stdout(), opened, comparison, notes)


def show(console: Console, model: Model, comparison: Comparison, notes: list[str]) -> None:
    machine = comparison.machine
    cores = machine["physical_cores"]
    parts = [
        machine["cpu"],
        plural(cores, "core") if cores else "",
        size_text(machine["memory_bytes"]),
        *machine["gpus"],
        machine["os"],
        f"Python {machine['python']}",
        f"UniRT {machine['unirt']}",
    ]
    print_pairs(
        console,
        [
            ("machine", ", ".join(filter(None, parts))),
            (
                "model",
                f"{comparison.model} ({' + '.join(model.formats)}), "
                f"{plural(model.parameters, 'parameter')}, sha256 {comparison.model_hash[:12]}…",
            ),
            ("data", f"{comparison.data}, {plural(comparison.batch, 'sample')} a call"),
        ],
        style="bold",
    )
    measured = [row for row in comparison.rows if row.latency]
    if measured:
        console.print()
        styles = [
            "bold green" if row.candidate == comparison.winner else "yellow" if row.excluded else ""
            for row in measured
        ]
        print_table(
            console, _columns(measured), [_cells(row, measured) for row in measured], styles
        )
    noted = [row for row in comparison.rows if row.notes]
    if noted:
        print_heading(console, "Graphs")
        print_pairs(
            console,
            [
                (str(row.candidate) if not at else "", note)
                for row in noted
                for at, note in enumerate(row.notes)
            ],
        )
    out = [row for row in comparison.rows if row.excluded]
    if out:
        print_heading(console, "Out")
        print_pairs(console, [(str(row.candidate), _reason(row)) for row in out])
    if comparison.notes or notes:
        print_heading(console, "Notes")
        for note in (*comparison.notes, *notes):
            print_pairs(console, [("-", note)])
    console.print()
    if comparison.winner:
        console.print(
            Text.assemble((f"Winner: {comparison.winner}", "bold green"), f", {comparison.why}.")
        )
    else:
        console.print(Text.assemble(("No winner: ", "bold red"), f"{comparison.why}."))


def _reason(row: Result) -> str:
    reason = row.excluded.rstrip(".")
    return f"{reason}. {row.hint}" if row.hint else f"{reason}."


def _columns(rows: list[Result]) -> list[Column]:
    titles = ["median", "p95", "ratio", "samples/s", "error"]
    if any(row.task_accuracy is not None for row in rows):
        titles.append("accuracy")
    gates = {row.gate for row in rows if row.gate is not None}
    return [
        Column("candidate"),
        *(Column(title, right=True) for title in titles),
        *([Column("judged by", optional=True)] if "accuracy" in gates else []),
        Column("calls", right=True, optional=True),
        Column("build", right=True, optional=True),
        Column("version", optional=True),
    ]


def _cells(row: Result, rows: list[Result]) -> list[str]:
    assert row.latency is not None
    error = "" if row.output_error is None else f"{row.output_error:.1e}"
    cells = [
        str(row.candidate),
        duration(row.latency.median),
        "\N{EN DASH}" if row.latency.p95 is None else duration(row.latency.p95),
        "" if row.ratio is None else f"{three_digits(row.ratio)}x",
        "" if row.throughput is None else three_digits(row.throughput),
        "reference" if row.is_reference else error,
    ]
    if any(other.task_accuracy is not None for other in rows):
        cells.append("" if row.task_accuracy is None else f"{row.task_accuracy:.2%}")
    if any(other.gate == "accuracy" for other in rows):
        cells.append(row.gate or "")
    cells += [
        f"{row.latency.calls:,}",
        "" if row.build_seconds is None else duration(row.build_seconds),
        row.version,
    ]
    return cells
