"""`unirt inspect`: what stands in a model file, without any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from unirt.cli.arguments import Beside, Debug, Json, ModelPath, open_model
from unirt.cli.outcome import reporting
from unirt.cli.terminal import (
    Column,
    plural,
    print_heading,
    print_pairs,
    print_table,
    size_text,
    stdout,
)
from unirt.model import Model, ModelFile
from unirt.types import TensorSpec


def inspect(
    model: ModelPath, beside: Beside = False, as_json: Json = False, debug: Debug = False
) -> None:
    """Show a model: inputs, outputs, operators, weights, and the hash of all its bytes."""
    with reporting(as_json, debug) as report:
        opened = open_model(model, beside)
        report.document = document(opened)
        if not as_json:
            show(stdout(), opened)


def document(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "hash": model.hash,
        "size_bytes": model.size,
        "parameters": model.parameters,
        "inputs": [_spec(spec) for spec in model.inputs],
        "outputs": [_spec(spec) for spec in model.outputs],
        "formats": {name: _file(file) for name, file in model.formats.items()},
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    shape = None if spec.shape is None else list(spec.shape)
    return {"name": spec.name, "dtype": spec.dtype, "shape": shape, "kind": spec.kind}


def _file(file: ModelFile) -> dict[str, Any]:
    return {
        "path": str(file.path) if file.path else None,
        "hash": file.hash,
        "size_bytes": file.size,
        "parameters": file.parameters,
        "opset": dict(file.opset),
        "ir_version": file.ir_version,
        "producer": file.producer,
        "stateful": file.stateful,
        "operators": dict(file.op_counts),
        "weight_dtypes": dict(file.weight_dtypes),
        "external": [str(path) for path in file.external],
        "inputs": [_spec(spec) for spec in file.inputs],
        "outputs": [_spec(spec) for spec in file.outputs],
    }


def show(console: Console, model: Model) -> None:
    console.print(Text(model.name, style="bold"))
    rows = [
        (
            role,
            spec.name,
            spec.dtype if spec.kind == "tensor" else f"{spec.kind} of {spec.dtype}",
            spec.shape_text(),
        )
        for role, specs in (("input", model.inputs), ("output", model.outputs))
        for spec in specs
    ]
    print_table(console, [Column(""), Column("name"), Column("type"), Column("shape")], rows)
    for file in model.formats.values():
        print_heading(console, f"{file.format}{f', {file.path}' if file.path else ''}")
        print_pairs(console, [pair for pair in _facts(file) if pair[1]], indent=2)


def _facts(file: ModelFile) -> list[tuple[str, str]]:
    opset = ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in file.opset.items())
    return [
        ("sha256", file.hash),
        ("size", f"{size_text(file.size)} ({file.size:,} bytes)"),
        ("parameters", f"{file.parameters:,}"),
        ("weights", _counts(file.weight_dtypes)),
        ("operators", f"{sum(file.op_counts.values()):,}: {_counts(file.op_counts)}"),
        ("opset", opset),
        ("IR version", str(file.ir_version or "")),
        ("producer", file.producer),
        ("state", "carries values from one run to the next" if file.stateful else ""),
        (
            "external",
            f"{plural(len(file.external), 'file')}: {', '.join(map(str, file.external))}"
            if file.external
            else "",
        ),
    ]


def _counts(counts: Mapping[str, int]) -> str:
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in order)
