"""`unirt sensitivity`: what low precision costs, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from unirt.cli.arguments import Block, Debug, Json, Keep, ModelPath
from unirt.cli.outcome import reporting
from unirt.cli.ranges import (
    Bins,
    MethodName,
    Percentile,
    RangeOptions,
    RangeTexts,
    RoundingFile,
    SampleFile,
    SavedRanges,
    TestFile,
    ranges_document,
    with_onnx,
)
from unirt.cli.sparsify import cost_text
from unirt.cli.target import (
    MeasuringEngine,
    PrecisionName,
    RecipeName,
    Target,
    TargetEngine,
    find_target,
    wanted_precision,
)
from unirt.cli.terminal import (
    Column,
    plural,
    print_heading,
    print_pairs,
    print_table,
    size_text,
    stdout,
    telling,
)
from unirt.errors import OptionError
from unirt.model import Model
from unirt.precision.calibration.ranges import Calibration
from unirt.precision.partial.measure import Sensitivity
from unirt.precision.partial.measure import sensitivity as measure_nodes
from unirt.precision.quantization.quantize import Precision


def sensitivity(
    model: ModelPath,
    data: SampleFile = None,
    test: TestFile = None,
    precision: PrecisionName = None,
    recipe: RecipeName = None,
    for_: TargetEngine = None,
    method: MethodName = None,
    percentile: Percentile = None,
    bins: Bins = None,
    calibration: SavedRanges = None,
    range_: RangeTexts = None,
    round_on: RoundingFile = None,
    keep: Keep = None,
    node: Annotated[
        list[str] | None,
        typer.Option("--node", metavar="NODE", help="Measure only this node. Repeatable."),
    ] = None,
    block: Block = None,
    engine: MeasuringEngine = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what quantizing each node of a model costs, the most sensitive first. Writes nothing.

    One node at a time is quantized and the whole network run, against float32. `share` is the
    node's part of the noise of all. A node that low precision reaches only beside others stands
    there as `all but` it. `unirt quantize --max-drop` looks for the nodes to leave in float32.
    """
    with reporting(as_json, debug) as report:
        opened = Model(model)
        wanted = wanted_precision(precision, for_)
        asked = RangeOptions(
            wanted, data, calibration, method, percentile, bins, range_ or (), round_on
        )
        asked.check(opened)
        target = find_target(opened, wanted, recipe, for_, engine)
        measured_on = test if test is not None else data
        if measured_on is None:
            raise OptionError(
                "There is no data to measure on.",
                "What a node costs, only samples tell.",
                "Add --data FILE.npz, or --test.",
            )
        found = asked.find(opened, as_json)
        ranges = found.ranges
        with telling(as_json) as teller:
            table = target.measured(
                lambda on: measure_nodes(
                    with_onnx(opened, ranges),
                    ranges,
                    measured_on,
                    precision=named_precision(wanted),
                    recipe=target.recipe,
                    keep=keep or (),
                    nodes=node,
                    block=block,
                    moments=found.moments,
                    engine=on,
                    progress=teller,
                )
            )
        notes = [*table.notes, *target.notes, *asked.own(test)]
        notes += [note for note in (ranges.notes if ranges else ()) if note not in notes]
        report.document = {
            **table.to_dict(),
            "model_hash": opened.hash,
            "recipe_why": target.why,
            "calibration": ranges_document(ranges),
            "notes": notes,
        }
        if not as_json:
            _show(stdout(), opened, target, ranges, table, notes)


def named_precision(precision: str) -> Precision:
    """`quantize` refuses what is none."""
    return precision  # type: ignore[return-value]


def how_text(
    model: Model, recipe: str, precision: str, ranges: Calibration | None
) -> list[tuple[str, str]]:
    """What is quantized and how, line by line."""
    pairs = [("model", f"{model.name} ({model.primary.format}), {size_text(model.size)}")]
    pairs += [("recipe", recipe), ("precision", precision)]
    if ranges is not None:
        pairs.append(("ranges", f"{ranges.method}, {plural(ranges.samples, 'sample')}"))
    return pairs


def measured_text(samples: int, engine: str) -> str:
    return f"on {plural(samples, 'sample')} by {engine}"


def _show(
    console: Console,
    model: Model,
    target: Target,
    ranges: Calibration | None,
    table: Sensitivity,
    notes: list[str],
) -> None:
    pairs = how_text(model, f"{table.recipe}, {target.why}", table.precision, ranges)
    pairs.append(("measured", measured_text(table.samples, table.engine)))
    print_pairs(console, pairs, style="bold")
    console.print()
    print_sensitivity(console, table)
    if table.kept:
        print_heading(console, "Stays in float32")
        print_pairs(console, list(table.kept.items()))
    if notes:
        print_heading(console, "Notes")
        print_pairs(console, [("-", note) for note in notes])
    console.print()
    console.print(Text(f"All quantized: {cost_text(table.whole, table.accuracy)}", style="bold"))


def print_sensitivity(
    console: Console, table: Sensitivity, becomes: Mapping[str, str] | None = None
) -> None:
    """A row for each node, the most sensitive first, as it is alone in the low precision; and what
    each `becomes` in a graph, where one was made.
    """
    columns = [Column("node")]
    if becomes is not None:
        columns.append(Column("becomes"))
    columns += [Column(title, right=True) for title in ("share", "error", "SNR dB")]
    if table.accuracy is not None:
        columns.append(Column("accuracy", right=True))
    rows, styles = [], []
    for name in table.ranking:
        alone = name in table.alone
        one = table.alone[name] if alone else table.without[name]
        row = [name if alone else f"all but {name}"]
        if becomes is not None:
            row.append(becomes[name])
        row += [f"{table.share(name):.1%}", f"{one.error:.1e}", f"{one.snr_db:.1f}"]
        if table.accuracy is not None:
            row.append("" if one.accuracy is None else f"{one.accuracy:.2%}")
        rows.append(row)
        styles.append("yellow" if becomes is not None and becomes[name] == "float32" else "")
    print_table(console, columns, rows, styles)
