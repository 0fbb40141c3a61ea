"""What a graph is quantized for: by which recipe and why that one, and which engine measures it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import typer

from unirt import plugins
from unirt.backend import Backend
from unirt.candidates import select
from unirt.cli.arguments import complete_candidate
from unirt.derivation import CASTS, QUANTIZATIONS, recipe_of
from unirt.devices import host_devices
from unirt.errors import BackendError, BackendUnavailable, OptionError
from unirt.model import Model
from unirt.precision.quantization.quantize import PRECISIONS
from unirt.precision.quantization.recipes import (
    CPU_VNNI,
    LITERT,
    RECIPES,
    TENSORRT,
    Recipe,
    find_recipe,
    recipe_for,
)
from unirt.types import Candidate

Outcome = TypeVar("Outcome")

PrecisionName = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help=f"One of {', '.join(PRECISIONS)}; for a .tflite int8, int8-dynamic or int8-weights. "
        "Default: that of --for, else int8.",
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help=f"How the target wants it: {', '.join(RECIPES)}, or auto for the CPU of this "
        "machine. Default: TensorRT's own if it is here with a GPU, else auto.",
    ),
]
TargetEngine = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="CANDIDATE",
        help="The engine that shall run it, instead of --recipe.",
        autocompletion=complete_candidate,
    ),
]
MeasuringEngine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="Measures the result, as it runs for everybody. Default: the one of --for if it is "
        "here, else one that computes Q/DQ exactly as written.",
        autocompletion=complete_candidate,
    ),
]


@dataclass
class Target:
    """The `recipe`, `why` that one in a few words, and the `engine` to measure on: None for one
    that computes Q/DQ as written. `notes` say why --for's engine is not the one.
    """

    recipe: Recipe
    why: str
    engine: str | None
    notes: list[str] = field(default_factory=list)
    may_change: bool = False

    def measured(self, run: Callable[[str | None], Outcome]) -> Outcome:
        """What `run` gives on that engine. One that nobody named to measure may fail: then it is
        run on the exact one, with a note.
        """
        try:
            return run(self.engine)
        except (BackendError, BackendUnavailable) as error:
            if not self.may_change:
                raise
            self.notes.append(_measured_elsewhere(str(self.engine), f"{error.what} {error.why}"))
            self.engine, self.may_change = None, False
            return run(None)


def wanted_precision(precision: str | None, for_: str | None) -> str:
    """What --precision says, or the candidate that --for names; int8 by default.

    Raises OptionError where a candidate has one that no graph is quantized to, CandidateError.
    """
    wanted = Candidate.parse(for_).precision if for_ is not None else None
    if precision is not None or wanted is None:
        return precision or "int8"
    if wanted not in QUANTIZATIONS:
        raise OptionError(
            f"Nothing is quantized to {wanted}, which --for {for_} names.",
            f"A graph is quantized for candidates in {', '.join(QUANTIZATIONS)}.",
            f"Use unirt cast for {wanted}." if wanted in CASTS else "Name one of these.",
        )
    return QUANTIZATIONS[wanted]


def find_target(
    model: Model, precision: str, recipe: str | None, for_: str | None, engine: str | None
) -> Target:
    """By what --recipe, --for and --engine say, and else the best engine here that has the
    precision. Raises OptionError, CandidateError, BackendUnavailable.
    """
    if recipe is not None and for_ is not None:
        raise OptionError(
            "--recipe and --for are both given.",
            "The engine that --for names decides on the recipe.",
            "Leave one of them out.",
        )
    if for_ is not None:
        return _of_engine(model, for_, engine)
    if model.primary.format == "tflite":
        if recipe is not None:
            raise OptionError(
                f"--recipe {recipe} does not go with {model.name}.",
                "It is a .tflite, and there is one recipe for those.",
                "Leave it out.",
            )
        return Target(LITERT, "for a .tflite", engine)
    if recipe not in (None, "auto"):
        assert recipe is not None
        return Target(find_recipe(recipe), "as named", engine)
    found, why = (_of_tensorrt() if recipe is None else None) or _of_cpu()
    if recipe is None and precision in TENSORRT.precisions and precision not in found.precisions:
        found, why = TENSORRT, f"since no CPU's has {precision}"
    return Target(found, why, engine)


def _of_tensorrt() -> tuple[Recipe, str] | None:
    with redirect_stdout(sys.stderr):
        plugin = plugins.plugin("tensorrt")
        if plugin is None or plugin.backend is None:
            return None
        gpus = [device for device in plugin.availability.devices if device.kind == "cuda"]
        if not gpus:
            return None
        return _stated(plugin.backend) or find_recipe(
            "tensorrt"
        ), f"for tensorrt@{gpus[0]}, which is here"


def _of_cpu() -> tuple[Recipe, str]:
    recipe = recipe_for("onnxruntime", _features())
    told = "VNNI or its like" if recipe is CPU_VNNI else "no VNNI"
    return recipe, f"for this CPU, which has {told}"


def _of_engine(model: Model, for_: str, engine: str | None) -> Target:
    candidate = Candidate.parse(for_)
    with redirect_stdout(sys.stderr):
        plugin = plugins.plugin(candidate.backend)
        if plugin is None:
            raise BackendUnavailable(
                f"There is no recipe for {for_}.",
                f"There is no such backend; plugins bring {', '.join(plugins.names())}.",
                "Check its name, or name a --recipe.",
                backend=candidate.backend,
            )
        backend = plugin.backend
        if backend is not None and model.file(backend.formats) is None:
            raise OptionError(
                f"{for_} cannot run what becomes of {model.name}.",
                f"It reads {' and '.join(backend.formats)}, and this is "
                f"{model.primary.format}, which stays so.",
                f"Give the network as {backend.formats[0]}.",
            )
        plain = Candidate(candidate.backend, candidate.device)
        (row,) = select(model, plain).rows
        device = row.facts.device if row.facts is not None else None
        if backend is not None and device is not None:
            recipe = recipe_of(backend, device, model.primary)
        else:
            on_cpu = candidate.device in (None, "cpu")
            stated = None if backend is None else _stated(backend)
            recipe = stated or recipe_for(candidate.backend, _features() if on_cpu else ())
    target = Target(recipe, f"for {for_}, as --for says", engine)
    if engine is None and not row.excluded:
        target.engine, target.may_change = f"{candidate.backend}@{device}", True
    elif engine is None:
        target.notes.append(_measured_elsewhere(str(plain), row.excluded))
    return target


def _stated(backend: Backend) -> Recipe | None:
    return find_recipe(backend.quantization) if backend.quantization else None


def _features() -> Sequence[str]:
    features: Sequence[str] = host_devices()[0].facts.get("instruction_sets", ())
    return features


def _measured_elsewhere(candidate: str, why: str) -> str:
    return (
        f"What it costs was not measured on {candidate}, which shall run it, but with Q/DQ "
        f"computed as written: {why.rstrip('.')}."
    )
