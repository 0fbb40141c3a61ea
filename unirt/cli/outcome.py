"""How a command ends: its exit code, its one JSON document, its errors in three lines."""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

import typer
from rich.text import Text

from unirt.cli.terminal import leave_quietly, safe, stderr
from unirt.errors import (
    BackendUnavailable,
    CandidateError,
    DataError,
    InputError,
    ModelError,
    NoBackend,
    OptionError,
    ProfileError,
    UnirtError,
)

OK, NOTHING, USAGE, INPUT, ENGINE = range(5)

EXIT_CODES = (
    "Exit codes: 0 done; 1 no engine or no winner; 2 wrong usage, candidate, option or profile; "
    "3 the model, an input or the data is at fault; 4 an engine failed, or UniRT itself."
)


def exit_code(error: BaseException) -> int:
    """What the shell gets for an error."""
    if isinstance(error, NoBackend | BackendUnavailable):
        return NOTHING
    if isinstance(error, CandidateError | OptionError | ProfileError):
        return USAGE
    if isinstance(error, ModelError | InputError | DataError):
        return INPUT
    return ENGINE


@dataclass
class Report:
    """What a command has to say: text it prints itself, or `document` if `json` is wanted."""

    json: bool
    document: Mapping[str, Any] = field(default_factory=dict)
    code: int = OK


@contextmanager
def reporting(as_json: bool, debug: bool = False) -> Iterator[Report]:
    """The frame around every command: afterwards it exits with the report's code.

    Errors become three lines on stderr, or {"error": ...} on stdout; `debug` adds the traceback.
    """
    report = Report(as_json)
    try:
        with _one_document(as_json) as document_out:
            try:
                yield report
            except (typer.Exit, typer.Abort, KeyboardInterrupt, BrokenPipeError):
                raise
            except Exception as error:  # noqa: BLE001 - the user gets three lines; --debug the rest
                if debug:
                    sys.stderr.write(safe(traceback.format_exc()))
                told = told_as_unirt(error)
                report.code = exit_code(error)
                report.document = {"error": error_document(told, type(error).__name__)}
                if not as_json:
                    _print_error(told)
            if document_out is not None:
                json.dump(plain(report.document), document_out, indent=2, allow_nan=False)
                document_out.write("\n")
                document_out.flush()
    except BrokenPipeError:
        leave_quietly()
    raise typer.Exit(report.code)


def told_as_unirt(error: Exception) -> UnirtError:
    if isinstance(error, UnirtError):
        return error
    return UnirtError(
        "UniRT met an error that it did not expect.",
        f"{type(error).__name__}: {error}",
        "Run it again with --debug, and report what that prints.",
    )


def error_document(error: UnirtError, kind: str) -> dict[str, Any]:
    return {
        "type": kind,
        "what": error.what,
        "why": error.why,
        "remedy": error.remedy,
        "facts": error.facts,
    }


def plain(value: Any) -> Any:
    """The value as JSON has it: infinities and NaN as text, everything unknown as its `str`."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _print_error(error: UnirtError) -> None:
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), error.what))
    for line in (error.why, error.remedy):
        if line:
            console.print(Text(line))


class Process:
    """Whether this process ends with the command: then stdout need not be given back."""

    is_ours = False


@contextmanager
def _one_document(wanted: bool) -> Iterator[TextIO | None]:
    """Where the JSON document goes; whatever else writes to stdout meanwhile lands on stderr.

    Engines print from C to file descriptor 1, so that is what moves, not only `sys.stdout`.
    """
    if not wanted:
        yield None
        return
    python_stdout, saved = sys.stdout, -1
    with suppress(OSError):
        python_stdout.flush()
        saved = os.dup(1)
        os.dup2(2, 1)
    out = python_stdout
    with suppress(OSError, ValueError, io.UnsupportedOperation):
        if saved >= 0 and python_stdout.fileno() == 1:
            out = os.fdopen(os.dup(saved), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    try:
        yield out
    finally:
        sys.stdout = python_stdout
        if out is not python_stdout:
            out.close()
        if saved >= 0:
            # Left as it is in a process of our own, so that what engines print at exit cannot
            # follow the document either.
            if not Process.is_ours:
                with suppress(OSError, AttributeError, TypeError):  # Windows: TypeError
                    ctypes.CDLL(None).fflush(None)
                os.dup2(saved, 1)
            os.close(saved)
