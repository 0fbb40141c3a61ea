"""`unirt run`: one inference, from files or random inputs, on the best engine or a named one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from unirt.arrays import describe
from unirt.cli.arguments import (
    Beside,
    CalibrationData,
    CalibrationFile,
    Debug,
    Json,
    ModelPath,
    OptionTexts,
    Seed,
    ShapeTexts,
    complete_candidate,
    hinting_beside,
    only_for,
    open_model,
    read_options,
    read_shapes,
)
from unirt.cli.outcome import reporting
from unirt.cli.terminal import Column, building, print_heading, print_pairs, print_table, stdout
from unirt.data import LABELS, load_samples, random_inputs, read_arrays
from unirt.errors import DataError, OptionError
from unirt.loading import Decision, load
from unirt.model import Model
from unirt.types import Array, Candidate

TINY = 16
"""Outputs of at most so many elements are shown whole."""


def run(
    model: ModelPath,
    candidate: Annotated[
        str | None,
        typer.Option(
            "--candidate",
            "-c",
            help="The one to use, written backend@device:precision. Default: the best.",
            autocompletion=complete_candidate,
        ),
    ] = None,
    option: OptionTexts = None,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", metavar="NAME=FILE.NPY", help="One input. Repeatable."),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", metavar="FILE.NPZ", help="All inputs, by name.")
    ] = None,
    shape: ShapeTexts = None,
    seed: Seed = 0,
    calibration: CalibrationFile = None,
    data: CalibrationData = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.NPZ", help="Where to save the outputs.")
    ] = None,
    beside: Beside = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model once, with random inputs unless some are given, and summarize its outputs.

    Without --calibration or --data an int8 or fp8 candidate is calibrated on these very inputs.
    """
    with reporting(as_json, debug) as report:
        opened = open_model(model, beside)
        named = Candidate.parse(candidate) if candidate else None
        options: Any = read_options(option, named.backend if named else None)
        if named:
            options = only_for(options, named.backend)
        if out is not None and out.suffix != ".npz":
            raise OptionError(
                f"--out {out} cannot be written.",
                "Outputs are saved as .npz, an archive of arrays by name.",
                f"Write --out {out.with_suffix('.npz')}.",
            )
        feed, source = _feed(opened, input_ or [], inputs, shape, seed)
        calls, hot = [feed], []
        if data is not None:
            samples = load_samples(opened.inputs, data)
            calls = [batch.inputs for batch in samples.batches(samples.call_size(None))]
            hot = [{name: value.shape for name, value in feed.items()}]
        with (
            building(opened.name, as_json) as progress,
            hinting_beside(opened, model, named, beside),
            load(
                opened,
                named,
                options=options or None,
                hot_shapes=hot,
                samples=calls,
                calibration=calibration,
                progress=progress,
            ) as session,
        ):
            outputs = session.run(feed)
            decision: Decision = session.decision
            seconds = session.engine.build_seconds
        if out is not None:
            _save(out, outputs)
        report.document = {
            "model": opened.name,
            "model_hash": opened.hash,
            "candidate": str(decision.candidate),
            "build_seconds": seconds,
            "inputs_from": source,
            "inputs": {name: _array(value) for name, value in feed.items()},
            "outputs": {name: _summary(value) for name, value in outputs.items()},
            "saved": str(out) if out else None,
            "decision": decision.to_dict(),
        }
        if not as_json:
            _show(stdout(), feed, source, outputs, decision)
            if out is not None:
                stdout().print(Text(f"Saved: {out}"))


def _feed(
    model: Model, singles: list[str], archive: Path | None, shape: list[str] | None, seed: int
) -> tuple[dict[str, Any], str]:
    shapes = read_shapes(shape)
    if not singles and archive is None:
        return random_inputs(model.inputs, seed=seed, shapes=shapes), f"random, seed {seed}"
    if shapes:
        raise OptionError(
            "--shape does not go with --input and --inputs.",
            "It shapes random inputs, and these come from files.",
            "Leave one of them out.",
        )
    feed: dict[str, Any] = {}
    names = [spec.name for spec in model.inputs]
    if archive is not None:
        read = read_arrays(archive)
        feed |= read if isinstance(read, dict) else {_single(names, archive): read}
    for text in singles:
        name, equals, file = text.partition("=")
        if not equals:
            name, file = _single(names, Path(text)), text
        read = read_arrays(Path(file))
        if isinstance(read, dict):
            raise DataError(
                f"{file} holds several arrays.",
                "--input takes a .npy file, which holds one.",
                "Use --inputs for a .npz file.",
            )
        feed[name] = read
    if LABELS not in names:
        feed.pop(LABELS, None)
    return feed, "files"


def _single(names: list[str], file: Path) -> str:
    if len(names) != 1:
        raise DataError(
            f"{file} does not say which input it is for.",
            f"The model has {len(names)}: {', '.join(names) or 'none'}.",
            f"Write --input name={file}.",
        )
    return names[0]


def _save(path: Path, outputs: Mapping[str, Any]) -> None:
    arrays: dict[str, Any] = {}
    for name, value in outputs.items():
        array = np.asarray(value)
        # Text as text: objects would be pickled, and nobody should unpickle.
        arrays[name] = array.astype(str) if array.dtype == object else array
    try:
        with path.open("wb") as stream:
            np.savez(stream, **arrays)
    except (OSError, ValueError) as error:
        raise DataError(
            f"The outputs cannot be saved to {path}.", f"{error}.", "Choose another file."
        ) from error


def _array(value: Any) -> dict[str, Any]:
    return {"dtype": str(value.dtype), "shape": list(value.shape)}


def _summary(value: Any) -> dict[str, Any]:
    """Dtype and shape; extremes and mean of what is finite, how much is not; a tiny one whole."""
    if not isinstance(value, np.ndarray):
        return {"type": type(value).__name__, "values": value}
    told = _array(value)
    if value.dtype.kind not in "OSUc" and value.size:
        numbers = value.astype(np.float64)
        finite = numbers[np.isfinite(numbers)]
        told["not_finite"] = int(value.size - finite.size)
        if finite.size:
            told |= {"min": float(finite.min()), "max": float(finite.max())}
            told["mean"] = float(finite.mean())
    if value.size <= TINY:
        told["values"] = _values(value)
    return told


def _values(value: Array) -> Any:
    exact = value.dtype.kind in "biuOSU"
    return (value if exact else value.astype(np.float64)).tolist()


def _show(
    console: Console,
    feed: Mapping[str, Any],
    source: str,
    outputs: Mapping[str, Any],
    decision: Decision,
) -> None:
    told = ", ".join(f"{name}: {describe(value)}" for name, value in feed.items()) or "none"
    console.print(Text(f"Inputs ({source}): {told}"))
    console.print()
    rows, tiny = [], []
    for name, value in outputs.items():
        summary = _summary(value)
        numbers = [
            f"{summary[key]:.6g}" if key in summary else "" for key in ("min", "max", "mean")
        ]
        rows.append([name, describe(value), *numbers, str(summary.get("not_finite") or "")])
        if "values" in summary and getattr(value, "dtype", None) is not None:
            text = np.array2string(value, separator=", ", max_line_width=10_000, precision=6)
            tiny.append((name, " ".join(text.split())))
    columns = [Column("output"), Column("type")]
    columns += [Column(title, right=True) for title in ("min", "max", "mean")]
    if any(row[-1] for row in rows):
        columns.append(Column("not finite", right=True))
    print_table(console, columns, rows)
    if tiny:
        print_heading(console, "Values")
        print_pairs(console, tiny)
    console.print()
    console.print(Text.assemble(("Engine: ", "bold"), f"{decision.candidate}, {_why(decision)}"))
    for note in decision.notes:
        console.print(Text(f"Note: {note}"))
    for attempt in decision.attempts:
        if attempt.error is not None:
            console.print(Text(f"Fell out: {attempt.candidate}: {attempt.error}", style="yellow"))


def _why(decision: Decision) -> str:
    if decision.how == "named":
        return "as named"
    if decision.how == "environment":
        return "as UNIRT_BACKEND says"
    row = next(row for row in decision.selection.rows if row.candidate == decision.candidate)
    place = "first" if decision.selection.best == decision.candidate else "next"
    return f"{place} of the ranking: {'; '.join(row.reasons) or 'no rule applies'}"
