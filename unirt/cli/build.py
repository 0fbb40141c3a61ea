"""`unirt build`: a model compiled by one engine for given shapes, saved where the engine can be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from unirt import plugins
from unirt.backend import Engine, SupportsEngineFiles
from unirt.cli.arguments import (
    Beside,
    CalibrationData,
    CalibrationFile,
    Debug,
    HotTexts,
    Json,
    ModelPath,
    OptionTexts,
    ProfileTexts,
    complete_candidate,
    hinting_beside,
    only_for,
    open_model,
    read_hot_shapes,
    read_options,
    read_profiles,
)
from unirt.cli.outcome import reporting
from unirt.cli.terminal import building, duration, print_pairs, size_text, stdout
from unirt.data import load_samples
from unirt.derivation import Ranges
from unirt.errors import OptionError
from unirt.loading import compiled
from unirt.types import Candidate


def build(
    model: ModelPath,
    candidate: Annotated[
        str,
        typer.Option(
            "--candidate",
            "-c",
            help="The one to build for, written backend@device:precision. It never falls back.",
            autocompletion=complete_candidate,
        ),
    ],
    option: OptionTexts = None,
    profile: ProfileTexts = None,
    hot: HotTexts = None,
    calibration: CalibrationFile = None,
    data: CalibrationData = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to save the engine.")
    ] = None,
    beside: Beside = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile a model with one engine, and save the compiled engine.

    `unirt inspect FILE` shows the layers of what was saved.
    """
    with reporting(as_json, debug) as report:
        opened = open_model(model, beside)
        named = Candidate.parse(candidate)
        options = only_for(read_options(option, named.backend), named.backend)
        profiles, hot_shapes = read_profiles(profile), read_hot_shapes(hot)
        if out is not None:
            _check_out(out, model, named.backend)
        samples = load_samples(opened.inputs, data) if data is not None else ()
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
                hot_shapes=hot_shapes,
                progress=progress,
            )
        with engine, redirect_stdout(sys.stderr):
            saved = engine.save(out) if out is not None else None
        report.document = document(engine) | {"saved": str(saved) if saved else None}
        if not as_json:
            show(stdout(), engine)
            if saved is not None:
                stdout().print(Text(f"Saved: {saved}"))


def _check_out(out: Path, model: Path, backend: str) -> None:
    """Before a build that may take minutes. Raises OptionError."""
    plugin = plugins.plugin(backend)
    found = plugin.backend if plugin else None
    problem, remedy = "", "Name a file that need not exist."
    if out.is_dir():
        problem = "It is a folder"
    elif out.exists() and out.samefile(model):
        problem = "It is the model itself"
    elif isinstance(found, SupportsEngineFiles) and out.suffix.lower() not in found.engine_suffixes:
        problem = f"Engines of {backend} are called {' or '.join(found.engine_suffixes)}"
        remedy = f"Write --out {out.with_suffix(found.engine_suffixes[0])}."
    if problem:
        raise OptionError(f"--out {out} cannot be written.", f"{problem}.", remedy)


def document(engine: Engine) -> dict[str, Any]:
    return {
        "model": engine.model.name,
        "model_hash": engine.model.hash,
        "candidate": str(engine.candidate),
        "build_seconds": engine.build_seconds,
        "facts": dict(engine.facts),
        "notes": list(engine.notes),
    }


def show(console: Console, engine: Engine) -> None:
    took = duration(engine.build_seconds)
    console.print(Text.assemble((str(engine.candidate), "bold"), f", built in {took}"))
    # The notes say what was done to the graph, with all that its `quantization` holds.
    told = {name: value for name, value in engine.facts.items() if name != "quantization"}
    print_pairs(console, _facts({**told, "notes": engine.notes}), indent=2)


def _facts(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    told = []
    for name, value in facts.items():
        label = name.removesuffix("_bytes").replace("_", " ")
        if isinstance(value, list | tuple):
            told += [(label if not k else "", str(one)) for k, one in enumerate(value)]
        elif name.endswith("_bytes") and isinstance(value, int):
            told.append((label, size_text(value)))
        elif isinstance(value, Mapping):
            told.append((label, ", ".join(f"{key} {one}" for key, one in value.items())))
        elif isinstance(value, bool):
            told.append((label, "yes" if value else "no"))
        elif value not in (None, ""):
            told.append((label, str(value)))
    return told
