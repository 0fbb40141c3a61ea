"""`unirt sparsify`: a model with 2:4 sparse weights, or which of its layers qualify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from unirt.cli.arguments import Debug, Json, ModelPath
from unirt.cli.outcome import reporting
from unirt.cli.saving import check_out, save_model
from unirt.cli.terminal import (
    Column,
    plural,
    print_heading,
    print_pairs,
    print_table,
    stdout,
    telling,
)
from unirt.errors import OptionError
from unirt.model import Model
from unirt.precision.partial.trial import Measured, Trial
from unirt.precision.sparsity import LayerSparsity, Sparsified, SparsityTable, check_sparsity
from unirt.precision.sparsity import sparsify as sparsify_model


@dataclass(frozen=True)
class _Cost:
    """What pruning costs on data: `accuracy` is the model's before."""

    measured: Measured
    accuracy: float | None
    engine: str
    samples: int


def sparsify(
    model: ModelPath,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to save the model that is made."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; show which layers qualify and why.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="NODE", help="A node to leave as it is. Repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NODE",
            help="Prune only this node, also where it would not pay. Repeatable. Default: all "
            "that qualify.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE.NPZ",
            help="Samples by input name, to measure what pruning costs; with `labels`, accuracy.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune the weights of a model to 2:4, of each four the two of largest magnitude staying.

    Tensor cores skip such zeros: build with `-o tensorrt.sparse_weights=true`. Without training
    afterwards it costs accuracy: give --data to see how much.
    """
    with reporting(as_json, debug) as report:
        opened = Model(model)
        if check:
            if out is not None or keep or only or data is not None:
                raise OptionError(
                    "--check goes with no other option.",
                    "It changes nothing, so that there is nothing to save or measure.",
                    "Leave --check out to prune.",
                )
            table = check_sparsity(opened)
            report.document = {
                "model": opened.name,
                "model_hash": opened.hash,
                "layers": [vars(layer) for layer in table],
            }
            if not as_json:
                _show_layers(stdout(), table)
            return
        if out is None:
            raise OptionError(
                "There is no file to save the model to.",
                "Pruning makes a new one.",
                "Add -o FILE.onnx, or --check to see which layers qualify.",
            )
        check_out(out, opened, ".onnx")
        cost = None
        with telling(as_json) as teller:
            teller(f"building {opened.name} with 2:4 weights", 0.0)
            done = sparsify_model(opened, keep=keep or (), only=only or None)
            if data is not None:
                with Trial(opened, data) as trial:
                    measured = trial.measure(
                        done.model, lambda share: teller("measuring the pruned graph", share)
                    )
                    cost = _Cost(measured, trial.accuracy, trial.engine, trial.samples)
            save_model(out, done.model.primary.read())
        report.document = _document(opened, done, out, cost)
        if not as_json:
            _show(stdout(), done, out, cost)


def _document(model: Model, done: Sparsified, out: Path, cost: _Cost | None) -> dict[str, Any]:
    return {
        "model": model.name,
        "model_hash": model.hash,
        "nodes": [vars(one) for one in done.nodes],
        "kept": dict(done.kept),
        "engine": cost.engine if cost else None,
        "samples": cost.samples if cost else None,
        "measured": cost.measured.to_dict() if cost else None,
        "accuracy_before": cost.accuracy if cost else None,
        "notes": list(done.notes),
        "saved": str(out),
        "saved_hash": done.model.hash,
    }


def _show_layers(console: Console, table: SparsityTable) -> None:
    columns = [Column("node"), Column("operator", optional=True), Column("weight")]
    columns += [Column("type", optional=True), Column("zeros", right=True), Column("2:4")]
    print_table(console, columns, [_layer_row(layer) for layer in table])
    if reasons := [(layer.node, layer.reason) for layer in table if layer.reason]:
        print_heading(console, "Why not")
        print_pairs(console, reasons)
    console.print()
    fit = sum(layer.qualifies for layer in table)
    console.print(Text(f"{fit} of {plural(len(table), 'layer')} qualify", style="bold"))


def _layer_row(layer: LayerSparsity) -> list[str]:
    state = "sparse" if layer.sparse else "qualifies" if layer.qualifies else "no"
    if not layer.weight:
        return [layer.node, layer.operator, "-", "-", "-", state]
    zeros = f"{layer.zeros:.0%}"
    return [layer.node, layer.operator, _shape(layer.shape), layer.dtype, zeros, state]


def _show(console: Console, done: Sparsified, out: Path, cost: _Cost | None) -> None:
    columns = [Column("node"), Column("operator", optional=True), Column("weight", optional=True)]
    columns += [Column("L1 lost", right=True), Column("L2 lost", right=True)]
    rows = [
        [one.node, one.operator, _shape(one.shape), f"{one.l1_lost:.1%}", f"{one.l2_lost:.1%}"]
        for one in done.nodes
    ]
    print_table(console, columns, rows)
    if done.kept:
        print_heading(console, "Stays as it is")
        print_pairs(console, list(done.kept.items()))
    if done.notes:
        print_heading(console, "Notes")
        print_pairs(console, [("-", note) for note in done.notes])
    print_heading(console, "What it costs")
    if cost is None:
        console.print(Text("Not measured: give --data FILE.npz, with `labels` for accuracy."))
    else:
        console.print(Text(cost_text(cost.measured, cost.accuracy)))
        console.print(Text(f"of {plural(cost.samples, 'sample')} on {cost.engine}"))
    console.print()
    console.print(Text(f"Saved: {out}", style="bold"))


def cost_text(measured: Measured, accuracy: float | None) -> str:
    """What a changed graph costs, in a line; `accuracy` is that of the graph it was made from."""
    if measured.mismatch:
        return measured.mismatch
    told = f"error {measured.error:.1e}, {measured.snr_db:.1f} dB"
    if accuracy is None or measured.accuracy is None:
        return told
    points = 100 * (measured.accuracy - accuracy)
    return f"{told}, accuracy {measured.accuracy:.2%} for {accuracy:.2%} ({points:+.2f} points)"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
