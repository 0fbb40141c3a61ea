"""Arguments that commands share, how they are read, and how a shell completes them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from unirt import plugins
from unirt.backend import Backend, SupportsEngineFiles
from unirt.comparison import Result
from unirt.devices import host_devices
from unirt.errors import ModelError, OptionError, ProfileError, UnirtError, sentence
from unirt.model import Model
from unirt.selector import Row
from unirt.shapes import ShapeProfile
from unirt.types import Candidate

Hinted = TypeVar("Hinted", Row, Result)


def complete_candidate(incomplete: str) -> list[str]:
    """Backends by name, and behind an @ the devices of this machine. Loads no engine."""
    backend, at, _ = incomplete.partition("@")
    devices = host_devices() if at else ()
    offered = [f"{backend}@{device}" for device in devices] or plugins.names()
    return [name for name in offered if name.startswith(incomplete)]


def complete_option(incomplete: str) -> list[str]:
    """`backend.option=` for every option of every backend. Loads no engine."""
    offered = []
    for name in plugins.names():
        with redirect_stdout(sys.stderr):
            plugin = plugins.plugin(name)
        if plugin is not None and plugin.backend is not None:
            offered += [f"{name}.{info.name}=" for info in plugin.backend.options.describe()]
    return [text for text in offered if text.startswith(incomplete)]


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx or .tflite file.")]
Beside = Annotated[
    bool, typer.Option("--beside", help="Also use the same network in other formats beside it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
OptionTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="[BACKEND.]KEY=VALUE",
        help="An option of an engine; `unirt doctor --options` lists them. Repeatable.",
        autocompletion=complete_option,
    ),
]
ShapeTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=SIZES",
        help="For random inputs: batch=4 for a symbol, image=1,3,224,224 for an input. Repeatable.",
    ),
]
ProfileTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="NAME=MIN:OPT:MAX",
        help="Shapes to compile for, such as x=1x3x224x224:8x3x224x224:64x3x224x224; several "
        "inputs with ; between them. Repeatable: each is one profile.",
    ),
]
HotTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--hot",
        metavar="NAME=SIZES",
        help="A shape to compile for alone, such as x=1x3x224x224; several inputs with ; between "
        "them. Repeatable.",
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Ranges from which int8 and fp8 candidates are quantized, as "
        "`unirt quantize --save-calibration` saves them.",
    ),
]
CalibrationData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE.NPZ",
        help="Samples by input name, along axis 0, to calibrate on for int8 and fp8.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="NODE", help="A node to leave in float32. Repeatable."),
]
Block = Annotated[
    int | None,
    typer.Option("--block", help="For weights only: how many share a scale. Default: 32."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of random inputs.")]


def engine_backend(path: Path) -> Backend | None:
    """The backend whose engine files are named like this one, if it is no model."""
    if path.suffix.lower() in (".onnx", ".tflite", ""):
        return None
    for name in plugins.names():
        plugin = plugins.plugin(name)
        found = plugin.backend if plugin else None
        if isinstance(found, SupportsEngineFiles) and path.suffix.lower() in found.engine_suffixes:
            return plugin.backend if plugin else None
    return None


def open_model(path: Path, beside: bool, notes: list[str] | None = None) -> Model:
    """The model, with its other formats if `beside`. Where those do not fit and there are `notes`,
    they are left out with a note; otherwise that is an error.
    """
    if path.is_file() and engine_backend(path) is not None:
        raise ModelError(
            f"{path} is a compiled engine, and no model.",
            "UniRT runs models: an engine fits one machine and version, and holds no checks.",
            "Name the model, with the option cache=FOLDER to find the engine again; "
            "`unirt inspect` shows an engine.",
            path=path,
        )
    if not beside or notes is None:
        return Model(path, beside=beside)
    try:
        return Model(path, beside=True)
    except ModelError as error:
        model = Model(path)
        notes.append(f"the file beside it is left out. {error.what} {error.why}")
        return model


def beside_hint(model: Model, path: Path, candidate: Candidate, beside: bool) -> str:
    """What gives the candidate a format that it reads; empty if it has one."""
    plugin = plugins.plugin(candidate.backend)
    if plugin is None or plugin.backend is None or model.file(plugin.backend.formats):
        return ""
    files = [path.with_suffix(f".{name}") for name in plugin.backend.formats]
    there = next((file.name for file in files if file.is_file()), None)
    if there:
        return "" if beside else f"add --beside, since {there} is there"
    return f"lay {files[0].name} beside it" + ("" if beside else " and add --beside")


def with_beside_hints(
    rows: Iterable[Hinted], model: Model, path: Path, beside: bool
) -> tuple[Hinted, ...]:
    """The rows, those that are out with the `beside_hint` where that would bring them in."""
    return tuple(
        replace(row, hint=beside_hint(model, path, row.candidate, beside) or row.hint)
        if row.excluded
        else row
        for row in rows
    )


@contextmanager
def hinting_beside(
    model: Model, path: Path, candidate: Candidate | None, beside: bool
) -> Iterator[None]:
    """Adds to an error of a named candidate the `beside_hint`, which only the command line has."""
    try:
        yield
    except UnirtError as error:
        if candidate and (hint := beside_hint(model, path, candidate, beside)):
            error.remedy = " ".join(filter(None, (error.remedy, sentence(hint))))
        raise


def only_for(options: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """The options of one backend. Raises OptionError where there are some of another."""
    others = [name for name in options if name != backend]
    if others:
        raise OptionError(
            f"There are options for {others[0]!r}.",
            f"The candidate is {backend}, and it never falls back.",
            f"Write -o {backend}.key=value, or leave the candidate out.",
        )
    return dict(options.get(backend, {}))


def read_profiles(texts: Sequence[str] | None) -> list[ShapeProfile]:
    """`x=1x3:8x3:64x3` texts as profiles; one shape instead of three is all of them."""
    profiles = []
    for text in texts or ():
        ranges = _ranges(text, "--profile", (1, 3))
        try:
            profiles.append(ShapeProfile(ranges))
        except ProfileError as error:
            raise _unreadable("--profile", text, error.why) from error
    return profiles


def read_hot_shapes(texts: Sequence[str] | None) -> list[dict[str, tuple[int, ...]]]:
    """`x=1x3x224x224` texts as shapes by input."""
    return [
        {name: shapes[0] for name, shapes in _ranges(text, "--hot", (1,)).items()}
        for text in texts or ()
    ]


def _ranges(text: str, flag: str, counts: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, sizes = part.rpartition("=")
        shapes = [shape.replace(",", "x").split("x") for shape in sizes.split(":")]
        well = all(size.strip().isdecimal() for shape in shapes for size in shape)
        if not equals or not name or not well or len(shapes) not in counts:
            several = "one shape, or three with : between them"
            form = several if 3 in counts else "a shape"
            raise _unreadable(flag, text, f"It is the name of an input, =, and {form}.")
        if name in found:
            raise _unreadable(flag, text, f"{name!r} is there twice.")
        sizes_of = [tuple(int(size) for size in shape) for shape in shapes]
        found[name] = sizes_of * 3 if 3 in counts and len(shapes) == 1 else sizes_of
    if not found:
        raise _unreadable(flag, text, "It names no input.")
    return found


def _unreadable(flag: str, text: str, why: str) -> OptionError:
    example = "1x3x224x224" + (":8x3x224x224:64x3x224x224" if flag == "--profile" else "")
    return OptionError(
        f"{flag} {text} cannot be used.", why, f"Write for example {flag} x={example}.", text=text
    )


def read_options(texts: Sequence[str] | None, backend: str | None = None) -> dict[str, Any]:
    """`backend.key=value` texts as nested options. A bare key is meant for `backend`."""
    options: dict[str, dict[str, str]] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        owner, dot, name = key.partition(".")
        if not dot and backend is not None:
            owner, name = backend, key
        if not equals or not owner or not name:
            raise OptionError(
                f"-o {text} cannot be read.",
                "An option is written backend.key=value"
                + (f", or key=value for {backend}." if backend else "."),
                "Write for example -o onnxruntime.threads=4.",
                text=text,
            )
        options.setdefault(owner, {})[name] = value
    return options


def read_shapes(texts: Sequence[str] | None) -> Mapping[str, int | tuple[int, ...]]:
    """`batch=4` and `image=1,3,224,224` (or 1x3x224x224) as sizes by name."""
    shapes: dict[str, int | tuple[int, ...]] = {}
    for text in texts or ():
        # Input names may hold an = themselves, sizes never do.
        name, equals, sizes = text.rpartition("=")
        numbers = [size.strip() for size in sizes.replace("x", ",").split(",") if size.strip()]
        if not equals or not name or not all(number.isdecimal() for number in numbers):
            raise OptionError(
                f"--shape {text} cannot be read.",
                "A shape is the name of a symbol or an input, =, and whole numbers.",
                "Write for example --shape batch=4 or --shape image=1,3,224,224.",
                text=text,
            )
        given = tuple(map(int, numbers))
        shapes[name] = given[0] if len(given) == 1 and "," not in sizes else given
    return shapes
