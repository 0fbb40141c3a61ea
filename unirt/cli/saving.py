"""Where commands put the model files they make: checked before the work, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from unirt.errors import OptionError
from unirt.model import Model
from unirt.saving import save_whole

Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="Where to save the model that is made.")
]


def check_out(out: Path, model: Model, suffix: str, flag: str = "--out") -> None:
    """Before work that may take minutes. Raises OptionError."""
    problem, remedy = "", "Name a file that need not exist, in a folder that does."
    own = [path for file in model.formats.values() for path in (file.path, *file.external) if path]
    if out.is_dir():
        problem = "It is a folder"
    elif not out.parent.is_dir():
        problem = f"There is no folder {out.parent}"
    elif not os.access(out.parent, os.W_OK):
        problem = f"The folder {out.parent} cannot be written to"
    elif out.exists() and any(out.samefile(path) for path in own if path.exists()):
        problem = "It is a file of the model itself"
    elif out.suffix.lower() != suffix:
        problem = f"Such a file is called {suffix}, by which engines know it"
        remedy = f"Write {flag} {out.with_suffix(suffix)}."
    if problem:
        raise OptionError(f"{flag} {out} cannot be written.", f"{problem}.", remedy, path=out)


def check_apart(paths: Sequence[tuple[str, Path | None]]) -> None:
    """Raises OptionError where two of the files, each with its flag, are the same."""
    seen: dict[Path, str] = {}
    for flag, path in paths:
        if path is None:
            continue
        other = seen.setdefault(path.resolve(), flag)
        if other != flag:
            raise OptionError(
                f"{flag} and {other} are the same file {path}.",
                "One would overwrite the other.",
                "Name two files.",
                path=path,
            )


def save_model(out: Path, data: bytes) -> Path:
    """Replaces what is there, whole or not at all. Raises DataError where it cannot be written."""
    remedy = "Choose a file in a folder that can be written to, on a disk with room for it."
    save_whole(out, data, "The model", remedy)
    return out
