"""`unirt explain`: what makes a quantized network slow on one engine, and the edit that helps."""

from __future__ import annotations

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
    ProfileTexts,
    Seed,
    ShapeTexts,
    complete_candidate,
    only_for,
    read_options,
    read_profiles,
    read_shapes,
)
from unirt.cli.outcome import reporting
from unirt.cli.terminal import (
    duration,
    plural,
    print_heading,
    print_pairs,
    stdout,
    telling,
    three_digits,
)
from unirt.explanation import SECONDS, Explanation
from unirt.explanation import explain as explain_model
from unirt.explanation.diagnosis import Finding
from unirt.model import Model
from unirt.types import Candidate

TITLES = {
    "float": "computed in float",
    "unfused": "unfused Q/DQ",
    "reformat": "reformat",
    "slower": "slower",
    "border": "at the border",
    "idle": "idle Q/DQ",
}


def explain(
    model: ModelPath,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            "--candidate",
            "-c",
            help="The engine to look into, written backend@device:precision: onnxruntime, openvino "
            "or tensorrt. With a precision, such as onnxruntime:int8, the float network may be "
            "given: it is quantized first, as for that engine.",
            autocompletion=complete_candidate,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL|CANDIDATE",
            help="The float network, as an .onnx file; or another engine for MODEL. Default: MODEL "
            "itself if it is in floats, else without its Q/DQ nodes.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE.NPZ",
            help="Samples by input name. The first call of them is timed, and where a precision "
            "needs ranges, all are calibrated on. Default: random inputs, and no ranges.",
        ),
    ] = None,
    calibration: CalibrationFile = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="How long to time whole calls of each.")
    ] = SECONDS,
    most: Annotated[int, typer.Option("--most", min=1, help="How many findings to show.")] = 12,
    option: OptionTexts = None,
    profile: ProfileTexts = None,
    shape: ShapeTexts = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Why is int8 slower? Show what holds a quantized network back on an engine, by ONNX node.

    The network with its QuantizeLinear and DequantizeLinear nodes and the same one in floats are
    built, their layers looked at and timed, and what costs more in the first one is listed with the
    nodes that cause it and the edit of the graph that helps, the most expensive first. What costs
    little, or not in every round, is left out. It takes ONNX graphs, no .tflite.
    """
    with reporting(as_json, debug) as report:
        named = Candidate.parse(engine)
        opened = Model(model)
        with telling(as_json) as teller:
            found = explain_model(
                opened,
                named,
                against,
                data,
                calibration=calibration,
                options=only_for(read_options(option, named.backend), named.backend) or None,
                profiles=read_profiles(profile),
                shapes=read_shapes(shape),
                seed=seed,
                seconds=seconds,
                progress=teller,
            )
        report.document = found.to_dict()
        if not as_json:
            show(stdout(), found, most)


def show(console: Console, found: Explanation, most: int) -> None:
    """The two times, the findings, and beneath each what to do."""
    console.print(Text(_headline(found), style="bold"))
    pairs = []
    for side in (found.quantized, found.against):
        parts = [side.candidate]
        if side.seconds is not None:
            parts.append(f"{duration(side.seconds)} a call")
        layers = side.report.seconds
        timed = f", {duration(layers)} one by one" if layers is not None else ""
        parts.append(f"{plural(len(side.report.layers), 'layer')}{timed}")
        parts.append(", ".join(f"{dtype} {n}" for dtype, n in side.report.precisions.items()))
        pairs.append((side.name, "; ".join(filter(None, parts))))
    pairs.append(("data", found.data))
    print_pairs(console, pairs, indent=2)
    if found.findings:
        print_heading(console, "What costs time" if found.cost is not None else "What was found")
    else:
        print_heading(console, "Nothing was found that costs time.")
    for one in found.findings[:most]:
        lines = [(_cost(one), f"{TITLES[one.kind]}: {one.what}"), ("", f"→ {one.edit}")]
        print_pairs(console, lines, indent=2)
    rest = len(found.findings) - most
    if rest > 0:
        console.print(
            f"  and {plural(rest, 'finding')} more; --most {len(found.findings)} shows all"
        )
    if found.notes:
        print_heading(console, "Notes")
        for note in found.notes:
            print_pairs(console, [("-", note)])


def _cost(one: Finding) -> str:
    return f"{duration(one.seconds) if one.seconds is not None else '-':>8}"


def _headline(found: Explanation) -> str:
    ratio = found.ratio
    if ratio is None:
        return f"{found.quantized.name} on {found.quantized.candidate}: not timed"
    words = f"{three_digits(max(ratio, 1 / ratio))}x {'slower' if ratio > 1 else 'faster'}"
    return (
        f"{found.quantized.name} is {words} than {found.against.name} on {found.against.candidate}"
    )
