"""`unirt build`: a model compiled by one engine for given shapes, saved where the engine can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from unirt.backend import Engine
from unirt.cli.arguments import (
    Beside,
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
from unirt.loading import build as build_engine
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
        with (
            building(opened.name, as_json) as progress,
            hinting_beside(opened, model, named, beside),
            build_engine(
                opened,
                named,
                options=options or None,
                profiles=read_profiles(profile),
                hot_shapes=read_hot_shapes(hot),
                progress=progress,
            ) as engine,
        ):
            saved = engine.save(out) if out is not None else None
            report.document = document(engine, saved)
            if not as_json:
                show(stdout(), engine, saved)


def document(engine: Engine, saved: Path | None = None) -> dict[str, Any]:
    return {
        "model": engine.model.name,
        "model_hash": engine.model.hash,
        "candidate": str(engine.candidate),
        "build_seconds": engine.build_seconds,
        "facts": dict(engine.facts),
        "saved": str(saved) if saved else None,
    }


def show(console: Console, engine: Engine, saved: Path | None = None) -> None:
    took = duration(engine.build_seconds)
    console.print(Text.assemble((str(engine.candidate), "bold"), f", built in {took}"))
    print_pairs(console, list(_facts(engine.facts)), indent=2)
    if saved is not None:
        console.print(Text(f"Saved: {saved}"))


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
