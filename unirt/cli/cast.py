"""`unirt cast`: a model in fp16 or bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from unirt.cli.arguments import Debug, Json
from unirt.cli.outcome import reporting
from unirt.cli.saving import Out, check_out, save_model
from unirt.cli.terminal import plural, print_heading, print_pairs, size_text, stdout, waiting
from unirt.errors import ModelError
from unirt.model import Model
from unirt.precision.casting.cast import cast as cast_model


def cast(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file.")],
    precision: Annotated[
        Literal["fp16", "bf16"], typer.Argument(metavar="fp16|bf16", help="The narrower float.")
    ],
    out: Out,
    io: Annotated[
        bool,
        typer.Option(
            "--io/--keep-io",
            help="Cast the model's inputs and outputs too, but for those that leave the range. "
            "Default: keep float32.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="A .npz or .npy with samples: nodes, inputs and outputs whose values leave the "
            "range on them stay in float32.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="NODE", help="A node that stays in float32; repeatable."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cast a float32 model to fp16 or bf16, and say which nodes stay in float32 and why.

    Scales of Q/DQ nodes stay, and so do nodes whose constants leave the range; with data, also
    those whose values do.
    """
    with reporting(as_json, debug) as report:
        opened = Model(model)
        if opened.file(["onnx"]) is None:
            raise ModelError(
                f"{opened.name} cannot be cast to {precision}.",
                f"Only ONNX graphs are cast, and it has {', '.join(opened.formats)}.",
                "Export the network to ONNX, and give that file.",
            )
        check_out(out, opened, ".onnx")
        with waiting(f"casting {opened.name}", as_json):
            done = cast_model(opened, precision, keep_io=not io, data=data, keep=keep or ())
            content = done.model.primary.read()
            save_model(out, content)
        report.document = {
            "model": opened.name,
            "model_hash": opened.hash,
            "precision": done.precision,
            "kept": dict(done.kept),
            "notes": list(done.notes),
            "saved": str(out),
            "saved_hash": done.model.hash,
            "bytes": len(content),
        }
        if as_json:
            return
        console = stdout()
        if done.kept:
            print_heading(console, "Stays in float32")
            print_pairs(console, list(done.kept.items()))
        if done.notes:
            print_heading(console, "Notes")
            print_pairs(console, [("-", note) for note in done.notes])
        console.print()
        nodes = plural(len(done.kept), "node")
        console.print(
            Text.assemble(
                (f"Saved: {out}", "bold"),
                f", {precision}, {size_text(len(content))} of {size_text(opened.size)}; "
                f"{nodes} in float32",
            )
        )
