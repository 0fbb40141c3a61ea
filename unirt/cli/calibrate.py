"""`unirt calibrate`: which values the tensors of a model take, and the ranges that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from unirt.cli.arguments import Debug, Json, ModelPath, complete_candidate
from unirt.cli.outcome import reporting
from unirt.cli.ranges import Bins, MethodName, Percentile, chosen_method
from unirt.cli.saving import check_apart, check_out
from unirt.cli.terminal import (
    Column,
    plural,
    print_heading,
    print_pairs,
    print_table,
    stdout,
    waiting,
)
from unirt.errors import OptionError
from unirt.model import Model
from unirt.precision.calibration.calibrate import Observations, observe
from unirt.precision.calibration.histogram import BINS, PERCENTILE, Method
from unirt.precision.calibration.ranges import Calibration, Range

SHOWN: tuple[Method, ...] = ("max", "percentile", "mse", "entropy")


def calibrate(
    model: ModelPath,
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE.NPZ", help="Samples by input name, along axis 0."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE.JSON", help="Where to save the ranges."),
    ] = None,
    method: MethodName = None,
    percentile: Percentile = None,
    bins: Bins = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="Runs the network. Default: the first of onnxruntime, openvino and reference that "
            "is here; LiteRT for a .tflite.",
            autocompletion=complete_candidate,
        ),
    ] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="How many tensors to show.")] = 25,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a float32 model over samples once, and show the range of each tensor by four methods.

    Those on which the methods differ most come first. --out saves the ranges of one method, for
    `--calibration` of other commands: readable, and with nothing of the samples in it.
    """
    with reporting(as_json, debug) as report:
        opened = Model(model)
        if percentile is not None and method not in (None, "percentile"):
            raise OptionError(
                "--percentile means nothing here.",
                f"The ranges that are saved are those of the method {method}.",
                "Leave one of them out.",
            )
        if out is not None:
            check_out(out, opened, out.suffix.lower())
            check_apart((("--out", out), ("--data", data)))
        how, share = chosen_method(method, percentile)
        with waiting(f"calibrating {opened.name}", as_json):
            observed = observe(opened, data, bins=BINS if bins is None else bins, engine=engine)
            found = {name: observed.calibration(name, percentile=share) for name in SHOWN}
        chosen = found[how]
        if out is not None:
            chosen.save(out)
        report.document = _document(opened, observed, found, chosen, out)
        if not as_json:
            _show(stdout(), opened, observed, found, chosen, out, most)


def _document(
    model: Model,
    observed: Observations,
    found: dict[Method, Calibration],
    chosen: Calibration,
    out: Path | None,
) -> dict[str, Any]:
    return {
        "model": model.name,
        "model_hash": model.hash,
        "engine": observed.engine,
        "samples": observed.samples,
        "method": chosen.method,
        "tensors": [
            {
                "tensor": name,
                "values": histogram.values,
                "ranges": {
                    method: [ranges.ranges[name].low, ranges.ranges[name].high]
                    for method, ranges in found.items()
                },
            }
            for name, histogram in observed.histograms.items()
        ],
        "notes": list(chosen.notes),
        "saved": str(out) if out else None,
    }


def _show(
    console: Console,
    model: Model,
    observed: Observations,
    found: dict[Method, Calibration],
    chosen: Calibration,
    out: Path | None,
    most: int,
) -> None:
    count = plural(observed.samples, "sample")
    pairs = [("model", f"{model.name} ({model.primary.format})")]
    pairs.append(("data", f"{count}, run once by {observed.engine}"))
    print_pairs(console, pairs, style="bold")
    console.print()
    # Of equal ones the first in the graph comes first.
    names = sorted(observed.histograms, key=lambda name: -_spread(name, found))
    columns = [Column("tensor")]
    for method, ranges in found.items():
        named = method == "percentile" and ranges.method != f"percentile {PERCENTILE:g}"
        columns.append(Column(ranges.method if named else method, right=True))
    rows = [
        [name, *(_range_text(ranges.ranges[name]) for ranges in found.values())]
        for name in names[:most]
    ]
    print_table(console, columns, rows)
    rest = len(names) - most
    if rest > 0:
        console.print(
            Text(
                f"and {plural(rest, 'tensor')} more, on which the methods differ less; "
                f"--most {len(names)} shows all"
            )
        )
    if chosen.notes:
        print_heading(console, "Notes")
        print_pairs(console, [("-", note) for note in chosen.notes])
    console.print()
    if out is None:
        console.print(Text("Nothing was saved: -o FILE.json saves the ranges of one method."))
    else:
        told = f", {plural(len(chosen.ranges), 'range')} by {chosen.method} of {count}"
        console.print(Text.assemble((f"Saved: {out}", "bold green"), told))


def _spread(name: str, found: dict[Method, Calibration]) -> float:
    """By how much the largest of a tensor's ranges is larger than the smallest."""
    sizes = [calibration.ranges[name].size for calibration in found.values()]
    return max(sizes) / min(sizes)


def _range_text(one: Range) -> str:
    """As --range takes it."""
    return f"{one.low:.4g}:{one.high:.4g}"
