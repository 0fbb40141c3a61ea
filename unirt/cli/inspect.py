"""`unirt inspect`: what stands in a model, and the layers an engine makes of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from unirt.cli.arguments import (
    Beside,
    CalibrationData,
    CalibrationFile,
    Debug,
    Json,
    OptionTexts,
    ProfileTexts,
    Seed,
    ShapeTexts,
    complete_candidate,
    engine_backend,
    hinting_beside,
    only_for,
    open_model,
    read_options,
    read_profiles,
    read_shapes,
)
from unirt.cli.build import document as built_document
from unirt.cli.build import show as show_built
from unirt.cli.layers import document as layers_document
from unirt.cli.layers import show_report
from unirt.cli.outcome import reporting
from unirt.cli.terminal import (
    Column,
    building,
    plural,
    print_heading,
    print_pairs,
    print_table,
    size_text,
    stdout,
)
from unirt.data import load_samples, random_inputs
from unirt.derivation import Ranges
from unirt.errors import OptionError
from unirt.explanation import refuse_blind
from unirt.loading import compiled
from unirt.model import Model, ModelFile
from unirt.types import Candidate, TensorSpec


def inspect(
    model: Annotated[
        Path, typer.Argument(metavar="FILE", help="A model, or an engine such as a .plan.")
    ],
    candidate: Annotated[
        str | None,
        typer.Option(
            "--candidate",
            "-c",
            help="Compile the model with this engine, backend@device:precision, and show its "
            "layers.",
            autocompletion=complete_candidate,
        ),
    ] = None,
    times: Annotated[
        bool, typer.Option("--times", help="Also measure each layer, on random inputs.")
    ] = False,
    option: OptionTexts = None,
    profile: ProfileTexts = None,
    shape: ShapeTexts = None,
    seed: Seed = 0,
    calibration: CalibrationFile = None,
    data: CalibrationData = None,
    beside: Beside = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model: inputs, outputs, operators, weights, and the hash of all its bytes.

    With a candidate, or for an engine file, show the engine's layers too: which nodes it fused into
    each, their types and formats, what it put between them, and what each takes.
    """
    with reporting(as_json, debug) as report:
        backend = engine_backend(model)
        made = {
            "times": times,
            "option": option,
            "profile": profile,
            "shape": shape,
            "calibration": calibration,
            "data": data,
        }
        if backend is not None:
            _refuse(
                {"candidate": candidate, **made, "beside": beside},
                f"{model.name} is an engine already.",
                "Leave it out, or name the model.",
            )
            with redirect_stdout(sys.stderr):
                layers = backend.inspect_file(model)
            report.document = {"engine": str(model), "layers": layers_document(layers)}
            if not as_json:
                print_pairs(stdout(), [(key, _fact(value)) for key, value in layers.facts.items()])
                show_report(stdout(), layers)
            return
        opened = open_model(model, beside)
        report.document = document(opened)
        if candidate is None:
            _refuse(
                made,
                "Without a candidate, inspect reads the model file alone.",
                "Add --candidate, for example -c tensorrt.",
            )
            if not as_json:
                show(stdout(), opened)
            return
        named = Candidate.parse(candidate)
        with redirect_stdout(sys.stderr):
            refuse_blind(named)
        options = only_for(read_options(option, named.backend), named.backend)
        shapes = read_shapes(shape)
        profiles = read_profiles(profile)
        feeds = []
        if times or (shapes and not profiles):
            feeds = [random_inputs(opened.inputs, seed=seed, shapes=shapes)]
        samples = load_samples(opened.inputs, data) if data is not None else feeds
        ranges = Ranges(opened, calibration, samples)
        with (
            building(opened.name, as_json) as progress,
            hinting_beside(opened, model, named, beside),
        ):
            engine = compiled(
                opened,
                named,
                ranges,
                options=options or None,
                profiles=profiles,
                samples=feeds,
                progress=progress,
            )
        with engine, redirect_stdout(sys.stderr):
            if times:
                with engine.session() as session:
                    layers = session.profile(feeds[0])
            else:
                layers = engine.inspect()
        report.document |= {"engine": built_document(engine), "layers": layers_document(layers)}
        if not as_json:
            show(stdout(), opened)
            stdout().print()
            show_built(stdout(), engine)
            stdout().print()
            show_report(stdout(), layers)


def _fact(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _refuse(given: Mapping[str, object], why: str, remedy: str) -> None:
    for name, value in given.items():
        if value:
            raise OptionError(
                f"--{name} says how an engine is made, and none is made here.",
                why,
                remedy,
                option=name,
            )


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
