"""An engine's layers on the terminal: what was fused into each, in which types, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from unirt.cli.terminal import GAP, Column, duration, print_heading, print_pairs, print_table
from unirt.inspection import EngineReport, Layer, LayerTensor, Placement

LABEL_CELLS, NODES_CELLS, TACTIC_CELLS = 28, 44, 30
"""How wide these may be in the table; `--json` has them in full."""
LEAST_NODES_CELLS = 20
"""Where the terminal is narrow, the names of nodes make room for the rest."""

NODES = 1  # the column

MOST_LINES = 8
"""Of each topic in the summary."""


def document(report: EngineReport) -> dict[str, Any]:
    """The whole report and what is concluded from it, for `--json`."""
    return {
        **report.to_dict(),
        "seconds": report.seconds,
        "fused": [layer.name for layer in report.fused],
        "reformats": [_placement(one) for one in report.reformats],
        "unfused_quantization": [_placement(one) for one in report.unfused_quantization],
        "idle_quantization": list(report.idle_quantization),
        "missing": list(report.missing),
        "precisions": dict(report.precisions),
    }


def _placement(one: Placement) -> dict[str, Any]:
    return {
        "layer": one.layer.name,
        "nodes": list(one.layer.nodes),
        "profile": one.layer.profile,
        "before": list(one.before),
        "after": list(one.after),
        "change": one.change,
        "inserted": one.inserted,
    }


def show_report(console: Console, report: EngineReport) -> None:
    """A table of the layers for each shape profile, and the findings beneath."""
    for profile in report.profiles:
        if len(report.profiles) > 1:
            print_heading(console, f"profile {profile}")
        _show_table(console, report.of_profile(profile))
    print_heading(console, "summary")
    lines, last = [], ""
    for topic, text in report.findings(MOST_LINES):
        lines.append(("" if topic == last else topic, text))
        last = topic
    if report.seconds is not None:
        lines.append(("time", f"{duration(report.seconds)} in all layers"))
    print_pairs(console, lines, indent=2)


def _show_table(console: Console, report: EngineReport) -> None:
    columns = [
        Column("layer"),
        Column("nodes"),
        Column("in"),
        Column("out"),
        Column("shape", optional=True),
        Column("tactic", optional=True),
    ]
    rows = [
        [
            f"{index:>2} {_shorten(_label(layer), LABEL_CELLS)}",
            "",
            _types(layer.inputs),
            _types(layer.outputs),
            _shape(layer.outputs),
            _shorten(layer.tactic, TACTIC_CELLS),
        ]
        for index, layer in enumerate(report.layers)
    ]
    total = report.seconds
    if total is not None:
        columns[2:2] = [Column("time", right=True), Column("share", right=True)]
        for row, layer in zip(rows, report.layers, strict=True):
            row[2:2] = _time(layer.seconds, total)
    for index in range(len(columns) - 1, 1, -1):
        if not any(row[index] for row in rows):
            del columns[index]
            for row in rows:
                del row[index]
    taken = sum(
        GAP + max([cell_len(column.title), *(cell_len(row[index]) for row in rows)])
        for index, column in enumerate(columns)
        if index != NODES and not column.optional
    )
    room = min(NODES_CELLS, max(LEAST_NODES_CELLS, console.width - taken))
    for row, layer in zip(rows, report.layers, strict=True):
        row[NODES] = _nodes(layer.nodes, room)
    moving = {id(one.layer) for one in (*report.reformats, *report.unfused_quantization)}
    styles = ["yellow" if id(layer) in moving else "" for layer in report.layers]
    print_table(console, columns, rows, styles)


def _label(layer: Layer) -> str:
    """What it does in short: `convolution+mul+add+relu`, else the engine's word for it."""
    return "+".join(layer.operations) or layer.kind or layer.name


def _nodes(names: Sequence[str], cells: int) -> str:
    """As many names as fit, the scope that they share said once: `/block.0/mlp/{fc1, bias}`."""
    if not names:
        return "-"
    scope = _scope(names) if len(names) > 1 else ""
    rest = [name[len(scope) :] for name in names]
    if cell_len(scope) > cells // 2:
        scope = "…/"
    for shown in range(len(rest), 0, -1):
        listed = ", ".join(rest[:shown])
        if shown < len(rest):
            listed += f" +{len(rest) - shown}"
        text = f"{scope}{{{listed}}}" if scope else listed
        if cell_len(text) <= cells:
            return text
    return f"{_shorten(names[0], cells - 5)}{f' +{len(names) - 1}' if names[1:] else ''}"


def _scope(names: Sequence[str]) -> str:
    """What all names start with, up to a slash."""
    first, last = min(names), max(names)
    end = next((i for i in range(len(first)) if first[i] != last[i : i + 1]), len(first))
    return first[: first.rfind("/", 0, end) + 1]


def _types(tensors: Sequence[LayerTensor]) -> str:
    return " + ".join(dict.fromkeys(map(str, tensors)))


def _shape(tensors: Sequence[LayerTensor]) -> str:
    if not tensors:
        return ""
    return "[" + ", ".join("?" if size < 0 else str(size) for size in tensors[0].shape) + "]"


def _time(seconds: float | None, total: float) -> tuple[str, str]:
    if seconds is None:
        return "", ""
    return duration(seconds), f"{100 * seconds / total:.1f} %" if total else ""


def _shorten(text: str, cells: int) -> str:
    """The text, or its two ends: names differ at both."""
    if cell_len(text) <= cells:
        return text
    head = cells // 2
    return f"{text[:head]}…{text[len(text) - (cells - head - 1) :]}"
