"""The contract between UniRT and an inference engine.

Core owns the public methods here: it validates, maps errors, counts calls in flight and closes. A
plugin fills in the underscored ones, four required and two optional:

    Backend._probe() -> Availability
    Backend._compile(file, device, options) -> Engine
    Engine._new_session() -> Session
    Session._run(inputs) -> outputs
    Engine._close(), Session._close()

What only some engines can do stands in small protocols (`SupportsBuildRequest`, `SupportsSave`,
`SupportsInspection`; for sessions `SupportsBind`, `SupportsDeviceArrays`, `SupportsProfiling`).
"""

from __future__ import annotations

import abc
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, final, runtime_checkable

from unirt.errors import (
    BackendError,
    BackendUnavailable,
    BuildError,
    ModelNotFound,
    OptionError,
    UnirtError,
    sentence,
)
from unirt.guard import guarded, limit
from unirt.inspection import EngineReport
from unirt.model import Model, ModelFile, ModelSource
from unirt.options import Options
from unirt.session import ClosesOnExit, Session, close_once, closed_error, failed_error
from unirt.shapes import ShapeProfile, checked
from unirt.types import Availability, Candidate, Device, TensorSpec

PROBE_SECONDS = 30.0
"""How long a backend may look for its library; UNIRT_PROBE_TIMEOUT says otherwise."""


@dataclass(frozen=True)
class BuildStep:
    """Where a build stands: `step` of `steps` in `phase`, which is a part of `parent` ("" at the
    top). `step == steps` ends the phase.
    """

    phase: str
    parent: str
    step: int
    steps: int


Progress = Callable[[BuildStep], object]
"""Called from the thread that builds; returning False, or raising, cancels the build."""


@dataclass(frozen=True)
class BuildRequest:
    """What a caller asks of one build beyond the backend's options.

    `profiles` and `hot` are checked against the model and speak of the file's own input names. Each
    of `hot` is one set of shapes, besides the ranges or, without any, what the engine takes anyway.
    """

    profiles: tuple[ShapeProfile, ...] = ()
    progress: Progress | None = None
    hot: tuple[ShapeProfile, ...] = ()


class _Teller:
    """A caller's progress function, and what it raised: that is no failure of the engine."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.error: BaseException | None = None

    def __call__(self, step: BuildStep) -> object:
        try:
            return self._progress(step)
        except BaseException as error:
            self.error = error
            raise


class Backend(abc.ABC):
    """An inference engine as a plugin: what it can do here, and how it compiles a model.

    One instance per process; every method may be called from any thread.
    """

    name: ClassVar[str]
    """What a candidate calls it; equal to the entry point's name."""
    formats: ClassVar[tuple[str, ...]]
    """Model formats it reads (`onnx`, `tflite`), the preferred one first."""
    options: ClassVar[type[Options]] = Options
    """Its options, a frozen dataclass."""
    _availability: Availability | None = None

    @property
    def quantization(self) -> str:
        """By which of `unirt.precision.RECIPES` graphs are quantized for it: `tensorrt` for an
        engine that takes int8 around zero only and fuses as TensorRT does. Empty: the one of its
        own name, else one for the CPU, by its instruction sets.
        """
        return ""

    @abc.abstractmethod
    def _probe(self) -> Availability:
        """Look for the vendor library and its devices. May raise; core turns that into a no."""

    @abc.abstractmethod
    def _compile(self, file: ModelFile, device: Device, options: Any) -> Engine:
        """Compile one model file, in one of `formats`, for a device that `_probe` offered.

        `options` is an instance of `self.options`. Any exception becomes a BuildError.
        """

    @final
    def probe(self, *, refresh: bool = False) -> Availability:
        """Whether this engine is usable here, where, and if not why. Never raises; remembered."""
        if self._availability is None or refresh:
            seconds = limit("UNIRT_PROBE_TIMEOUT", PROBE_SECONDS)
            found = guarded(self._probe, seconds, f"probe-{self.name}")
            if isinstance(found.value, Availability):
                self._availability = found.value
            else:
                failure = found.failure or f"returned {type(found.value).__name__}"
                self._availability = Availability.no(
                    f"looking for its vendor library {failure}",
                    f"reinstall that library: pip install --force-reinstall 'unirt[{self.name}]'",
                )
        return self._availability

    @final
    def compile(
        self,
        model: Model | ModelSource,
        device: str | None = None,
        options: Mapping[str, object] | Options | None = None,
        *,
        profiles: Sequence[ShapeProfile] = (),
        hot: Sequence[ShapeProfile] = (),
        progress: Progress | None = None,
    ) -> Engine:
        """The model compiled for `device`, or for this backend's default one.

        Engines that take any shape have no use for `profiles`, nor for `hot`, static ones besides
        those; they are checked all the same.
        `progress` hears of the steps where the engine tells them, and cancels by returning False;
        what it raises comes out of here.

        Raises BackendUnavailable, OptionError, ProfileError, ModelError, BuildCancelled, or
        BuildError with the vendor's own exception as its cause. The engine belongs to the caller.
        """
        model = Model.open(model)
        parsed = self.options.parse(options, owner=self.name)
        target = self.find_device(device)
        file = model.file(self.formats)
        if file is None:
            raise BuildError(
                f"{self.name} cannot read {model.name!r}.",
                f"It reads {' and '.join(self.formats)}; this model is there as "
                f"{' and '.join(model.formats)}.",
                f"Pass the same network as {self.formats[0]} too: "
                f"unirt.Model({model.primary.format}=..., {self.formats[0]}=...).",
                backend=self.name,
                formats=tuple(model.formats),
            )
        wanted = checked(profiles, model.inputs)
        tell = _Teller(progress) if progress is not None else None
        names = model.input_names(file)
        hot = _renamed(checked(hot, model.inputs), names)
        request = BuildRequest(_renamed(wanted, names), tell, hot)
        started = time.perf_counter()
        try:
            if isinstance(self, SupportsBuildRequest):
                engine = self._compile_request(file, target, parsed, request)
            else:
                engine = self._compile(file, target, parsed)
            if not isinstance(engine, Engine):
                raise TypeError(f"_compile returned {type(engine).__name__}, not an Engine")
        except UnirtError:
            raise
        except (Exception, SystemExit) as error:
            if tell is not None and tell.error is error:
                raise
            raise BuildError(
                f"{self.name} could not compile {model.name!r} for {target}.",
                f"{type(error).__name__}: {error}",
                "Try another candidate, or see the engine's message above for what to change.",
                backend=self.name,
                device=str(target),
            ) from error
        file.verify()
        engine._attach(self, model, file, target, parsed, time.perf_counter() - started)
        return engine

    @final
    def inspect_file(self, path: str | Path) -> EngineReport:
        """The layers of an engine that was saved as a file, by UniRT or by the vendor's tools.

        Raises BackendUnavailable where this engine has no such files or cannot read them here,
        ModelError for a damaged file, ModelNotFound, BackendError.
        """
        path = Path(path)
        if not isinstance(self, SupportsEngineFiles):
            raise BackendUnavailable(
                f"{self.name} has no engine files.",
                "It compiles a model each time.",
                "Inspect the model itself.",
                backend=self.name,
            )
        if not path.is_file():
            raise ModelNotFound(
                f"There is no file {path}.",
                "The path does not exist, or is no file.",
                "Check the path.",
                path=path,
            )
        try:
            return self._inspect_file(path)
        except UnirtError:
            raise
        except Exception as error:
            raise BackendError(
                f"{self.name} could not read {path}.",
                f"{type(error).__name__}: {error}",
                "Build the engine again with this version.",
                backend=self.name,
                path=path,
            ) from error

    @final
    def find_device(self, wanted: str | None) -> Device:
        """The device that `wanted` names, or the default one. Raises BackendUnavailable."""
        availability = self.probe()
        candidate = Candidate(self.name, wanted)
        target = availability.target(wanted)
        if target is not None:
            return target
        if not availability.available:
            raise BackendUnavailable(
                f"{candidate} cannot be used here.",
                sentence(availability.reason),
                availability.hint,
                backend=self.name,
                device=wanted,
            )
        kind = str(wanted).partition(":")[0]
        offered = ", ".join(map(str, (*availability.devices, *availability.targets)))
        raise BackendUnavailable(
            f"{candidate} cannot be used here.",
            sentence(availability.missing.get(kind, f"{self.name} reports no such device")),
            f"It offers: {offered}.",
            backend=self.name,
            device=wanted,
        )


class Engine(ClosesOnExit):
    """A compiled model. Opens sessions; closing it closes them.

    Thread-safe. A backend may set `_inputs`, `_outputs` where its own specs know more than the
    model file's (same names), and `_facts` with JSON-able details for reports.
    """

    _inputs: tuple[TensorSpec, ...] | None = None
    _outputs: tuple[TensorSpec, ...] | None = None
    _facts: Mapping[str, object] = {}

    backend: Backend
    model: Model
    file: ModelFile
    device: Device
    options: Options
    build_seconds: float
    precision: str | None = None
    """The candidate's: the graph has it, or was brought to it. None: as the graph says."""
    _notes: tuple[str, ...] = ()
    _quantization: Callable[[], Mapping[str, object]] | None = None

    @abc.abstractmethod
    def _new_session(self) -> Session:
        """A running instance of this engine."""

    def _close(self) -> None:
        """Free what the engine holds. Called once, after all its sessions are closed."""

    @final
    def _attach(
        self,
        backend: Backend,
        model: Model,
        file: ModelFile,
        device: Device,
        options: Options,
        seconds: float,
    ) -> None:
        self.backend, self.model, self.file = backend, model, file
        self.device, self.options, self.build_seconds = device, options, seconds
        inputs, outputs = model.input_names(file), model.output_names(file)
        # What users write is the model's own names; `_renamed_*` leads to this file's where
        # another format of the same network calls them differently.
        self._renamed_inputs = {} if all(k == v for k, v in inputs.items()) else dict(inputs)
        self._renamed_outputs = {} if all(k == v for k, v in outputs.items()) else dict(outputs)
        self.inputs = _rename(self._inputs or file.inputs, inputs)
        self.outputs = _rename(self._outputs or file.outputs, outputs)
        self._lock = threading.Lock()
        self._closed = False
        self._done = threading.Event()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.backend.name, str(self.device), self.precision)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the graph for the candidate's precision, and which nodes it left; what
        the backend adds.

        A backend puts its own in `_notes`, and those of the file where it keeps compiled engines.
        """
        return tuple(dict.fromkeys((*self.file.notes, *self._notes)))

    @property
    def quantization(self) -> Mapping[str, object] | None:
        """How UniRT quantized the graph for this engine: precision, recipe, calibration, how many
        nodes, and which it kept for what reason. None if it did not.
        """
        return None if self._quantization is None else self._quantization()

    @property
    def facts(self) -> Mapping[str, object]:
        """What the backend reports about this engine: providers in use, threads, caches; and its
        `quantization`, if there is one.
        """
        quantization = self.quantization
        return (
            self._facts if quantization is None else {**self._facts, "quantization": quantization}
        )

    @final
    def inspect(self) -> EngineReport:
        """The layers this engine runs, with the graph's nodes fused into each.

        Raises BackendUnavailable where the engine does not tell, ClosedError, BackendError.
        """
        if not isinstance(self, SupportsInspection):
            raise BackendUnavailable(
                f"{self.candidate} does not show its layers.",
                "This engine has no interface for it.",
                "Use another candidate to look at fusion, such as tensorrt.",
                backend=self.backend.name,
            )
        with self._lock:
            if self._closed:
                raise closed_error("engine", self)
            try:
                return self._inspect()
            except UnirtError:
                raise
            except Exception as error:
                raise failed_error("inspect the engine of", self, error, call=False) from error

    @final
    def save(self, path: str | Path) -> Path:
        """Writes the compiled engine to `path`, replacing what is there; returns the path.

        Raises BackendUnavailable where the engine cannot be saved, ClosedError, BackendError.
        """
        if not isinstance(self, SupportsSave):
            raise BackendUnavailable(
                f"{self.candidate} cannot be saved.",
                "This engine has no file form of its own.",
                "Keep the model file; it compiles again when it is loaded.",
                backend=self.backend.name,
            )
        if not isinstance(path, str | Path):
            raise OptionError(
                f"The engine of {self.model.name!r} cannot be saved to {path!r}.",
                f"A path is text or a Path, and this is {type(path).__name__}.",
                "Name a file, for example engine.save('model.plan').",
            )
        path = Path(path)
        with self._lock:
            if self._closed:
                raise closed_error("engine", self)
            try:
                self._save(path)
            except UnirtError:
                raise
            except OSError as error:
                raise BackendError(
                    f"The engine of {self.model.name!r} cannot be saved to {path}.",
                    sentence(str(error)),
                    "Choose a file in a folder that can be written to.",
                    backend=self.backend.name,
                    path=path,
                ) from error
            except Exception as error:
                raise failed_error("save the engine of", self, error, call=False) from error
        return path

    @final
    def session(self) -> Session:
        """A new session; it belongs to the caller. Raises ClosedError, BackendError."""
        with self._lock:
            if self._closed:
                raise closed_error("engine", self)
            try:
                session = self._new_session()
                session._attach(self)
            except UnirtError:
                raise
            except Exception as error:
                raise failed_error("open a session of", self, error, call=False) from error
            self._sessions.add(session)
        return session

    @final
    def close(self) -> None:
        """Closes every session, waiting for calls in flight, then the engine. Idempotent: every
        caller waits.
        """
        with self._lock:
            first, self._closed = not self._closed, True
        in_worker = any(session._in_own_worker() for session in list(self._sessions))
        close_once(first, in_worker, self._finish, self._done)

    def _finish(self) -> None:
        try:
            for session in list(self._sessions):
                session.close()
            self._close()
        finally:
            self._done.set()

    def __repr__(self) -> str:
        return f"<unirt.Engine {self.candidate} of {self.model.name!r}>"


@runtime_checkable
class SupportsBuildRequest(Protocol):
    """A backend that compiles for given shapes, or tells how far it is."""

    def _compile_request(
        self, file: ModelFile, device: Device, options: Any, request: BuildRequest
    ) -> Engine:
        """`_compile`, for these profiles. Core calls it instead of `_compile`."""


@runtime_checkable
class SupportsEngineFiles(Protocol):
    """A backend whose engines are files."""

    engine_suffixes: ClassVar[tuple[str, ...]]
    """How their names end, the usual one first: `.plan`."""

    def _inspect_file(self, path: Path) -> EngineReport: ...


@runtime_checkable
class SupportsInspection(Protocol):
    """An engine that shows its layers."""

    def _inspect(self) -> EngineReport: ...


@runtime_checkable
class SupportsSave(Protocol):
    """An engine with a file form."""

    def _save(self, path: Path) -> None:
        """Writes it to `path`, whole or not at all."""


def _renamed(
    profiles: Sequence[ShapeProfile], names: Mapping[str, str]
) -> tuple[ShapeProfile, ...]:
    return tuple(
        replace(
            profile,
            shapes={names[name]: shape for name, shape in profile.shapes.items()},
            values={names[name]: value for name, value in profile.values.items()},
        )
        for profile in profiles
    )


def _rename(specs: tuple[TensorSpec, ...], canonical: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    """Engine specs under the model's own names, in the model's own order."""
    by_name = {spec.name: spec for spec in specs}
    return tuple(
        spec if name == spec.name else TensorSpec(name, spec.dtype, spec.shape, spec.kind)
        for name, spec in ((name, by_name[inner]) for name, inner in canonical.items())
    )
