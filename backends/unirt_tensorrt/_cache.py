"""Plans and runtime caches on disk: keyed by all that decides them, locked, checked when read.

Beside `name.plan`, which any TensorRT tool of the same version reads, stands `name.plan.json`: what
the plan is, its SHA-256, its profiles and the builder's account of its layers. Kernels that RTX
compiles for a GPU are kept in `name.<gpu>.cache`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unirt import EngineReport, ModelError, ShapeProfile
from unirt_tensorrt._library import Library

log = logging.getLogger("unirt.tensorrt")

LOCK_SECONDS = 60.0
FORMAT = 3


@dataclass(frozen=True)
class Compiled:
    """A plan and what is known of it: made by the builder just now, or found in the cache.

    `report` is the builder's own account of the layers; `repairs` and `warnings` are sentences for
    the user; `builds` tells of each build, where several competed.
    """

    blob: bytes
    profiles: tuple[ShapeProfile, ...]
    report: EngineReport | None
    repairs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    builds: Mapping[str, object] | None = None
    cached: bool = False
    notes: tuple[str, ...] = ()


def key_of(parts: Mapping[str, object]) -> str:
    """A name for everything that decides a plan; equal only where all of it is equal."""
    text = json.dumps({**parts, "unirt": version("unirt"), "format": FORMAT}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def machine() -> str:
    return f"{platform.system().lower()}-{platform.machine().lower()}"


class PlanStore:
    """A folder of plans. Safe for several processes: writers lock, and replace files whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: str) -> Path:
        return self._folder / f"{key}.plan"

    def load(self, key: str, library: Library) -> Compiled | None:
        """What was stored under this key; None if nothing, or nothing that can be trusted."""
        path = self.path(key)
        try:
            return read_plan(path, library, cached=True)
        except FileNotFoundError:
            return None
        except (OSError, ModelError) as error:
            log.warning("%s is not used: %s", path, error)
            return None

    def store(self, key: str, compiled: Compiled, library: Library) -> None:
        try:
            with _locked(self.path(key)):
                write_plan(self.path(key), compiled, library)
        except OSError as error:
            log.warning("the plan cannot be kept in %s: %s", self._folder, error)

    def read_timing(self, name: str) -> bytes:
        """The timing cache of a GPU and version (tensorrt only); empty if there is none."""
        return _read_sealed(self._folder / f"{name}.timing")

    def write_timing(self, name: str, content: bytes) -> None:
        path = self._folder / f"{name}.timing"
        try:
            with _locked(path):
                _write_sealed(path, content)
        except OSError as error:
            log.warning("the timing cache cannot be kept in %s: %s", self._folder, error)


class RuntimeStore:
    """Kernels that RTX compiled for one plan on one GPU, driver and version."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = b""

    def load(self) -> bytes:
        content = _read_sealed(self._path)
        self._digest = hashlib.sha256(content).digest() if content else b""
        return content

    def save(self, content: bytes) -> None:
        """Writes it if it changed. Raises OSError."""
        digest = hashlib.sha256(content).digest()
        if not content or digest == self._digest:
            return
        with _locked(self._path):
            _write_sealed(self._path, content)
        self._digest = digest


def write_plan(path: Path, compiled: Compiled, library: Library) -> None:
    """The plan and, beside it, what it is. Raises OSError."""
    about: dict[str, object] = {
        "format": FORMAT,
        "flavour": library.flavour,
        "version": library.version,
        "sha256": hashlib.sha256(compiled.blob).hexdigest(),
        "profiles": [profile.to_dict() for profile in compiled.profiles],
        "report": compiled.report.to_dict() if compiled.report else None,
        "repairs": list(compiled.repairs),
        "warnings": list(compiled.warnings),
        "builds": dict(compiled.builds) if compiled.builds else None,
        "notes": list(compiled.notes),
    }
    about["digest"] = _digest(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, compiled.blob)
    _replace(beside(path), json.dumps(about).encode())


def read_plan(path: Path, library: Library | None = None, *, cached: bool = False) -> Compiled:
    """A plan that `write_plan` wrote. Raises ModelError where the two files do not belong together
    or are damaged, OSError where they cannot be read.
    """
    blob, about = path.read_bytes(), read_about(path)
    if hashlib.sha256(blob).hexdigest() != about.get("sha256"):
        raise _damaged(path, "Its bytes are not those it was written with")
    if library is not None and (about.get("flavour"), about.get("version")) != (
        library.flavour,
        library.version,
    ):
        raise _damaged(
            path,
            f"It was built by {about.get('flavour')} {about.get('version')}, and here is "
            f"{library.flavour} {library.version}",
        )
    try:
        profiles = tuple(
            ShapeProfile(profile["shapes"], profile["values"]) for profile in about["profiles"]
        )
        report = EngineReport.from_dict(about["report"]) if about["report"] else None
        return Compiled(
            blob,
            profiles,
            report,
            tuple(about["repairs"]),
            tuple(about["warnings"]),
            about["builds"],
            cached,
            tuple(about["notes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"Its description is damaged: {error}") from error


def read_about(path: Path) -> dict[str, Any]:
    """What `write_plan` wrote beside a plan. Raises ModelError, OSError."""
    try:
        about = json.loads(beside(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"Its description is damaged: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise _damaged(path, "Its description is of another format")
    if about.pop("digest", None) != _digest(about):
        raise _damaged(path, "Its description is not what was written")
    return about


def facts_beside(path: Path) -> dict[str, object]:
    """What a plan's description says of it, for a reader. Raises ModelError, OSError."""
    about = read_about(path)
    profiles = [ShapeProfile(one["shapes"], one["values"]) for one in about["profiles"]]
    found = {key: about[key] for key in ("flavour", "version", "sha256")}
    found["profiles"] = [str(profile) for profile in profiles]
    lists = {key: about[key] for key in ("repairs", "warnings", "notes", "builds") if about[key]}
    return {**found, **lists}


def _digest(about: Mapping[str, object]) -> str:
    """Over the description itself; what is kept beside a plan is as much input as the plan."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path} is no plan to trust.",
        f"{why}.",
        "Delete it; it is built again from the model.",
        path=path,
    )


def _locked(path: Path) -> Any:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", timeout=LOCK_SECONDS)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    # Not by `tempfile`, whose files nobody else may read: plans are made to be passed on.
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with new.open("xb") as file:
            file.write(content)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _write_sealed(path: Path, content: bytes) -> None:
    _replace(path, hashlib.sha256(content).digest() + content)


def _read_sealed(path: Path) -> bytes:
    """Content that is what was written; empty where there is none. TensorRT trusts these bytes."""
    try:
        sealed = path.read_bytes()
    except OSError:
        return b""
    content = sealed[32:]
    if hashlib.sha256(content).digest() != sealed[:32]:
        log.warning("%s is damaged and is not used", path)
        return b""
    return content
