"""An engine: a plan and what is known of it, opened on a GPU where there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from unirt import (
    BackendUnavailable,
    Device,
    Engine,
    EngineReport,
    ModelFile,
    Session,
)
from unirt_tensorrt import _layers
from unirt_tensorrt._cache import Compiled, PlanStore, RuntimeStore, write_plan
from unirt_tensorrt._cuda import Cuda
from unirt_tensorrt._lane import Lane
from unirt_tensorrt._library import Library
from unirt_tensorrt._options import TensorRTOptions
from unirt_tensorrt._runtime import Runtime, layers_of, only_dynamic, open_plan
from unirt_tensorrt._session import TensorRTSession
from unirt_tensorrt._unit import Unit


class TensorRTEngine(Engine):
    """Thread-safe. One built ahead of time has no runtime and opens no sessions."""

    def __init__(
        self,
        library: Library,
        file: ModelFile,
        device: Device,
        options: TensorRTOptions,
        compiled: Compiled,
        store: RuntimeStore | None,
    ) -> None:
        self._library, self._options, self._compiled = library, options, compiled
        self._facts, self._notes = _facts(library, options, compiled), compiled.notes
        self._runtime: Runtime | None = None
        self._shared: Unit | None = None
        if device.kind == "cuda":
            cuda = Cuda(device.index or 0)
            with cuda.current():
                self._runtime = Runtime(library, cuda, file, options, compiled.blob, store)
                if options.share_memory:
                    self._shared = Unit(self._runtime, shared=True)

    @property
    def plan(self) -> bytes:
        """The serialized engine, as TensorRT's own tools read it."""
        return self._compiled.blob

    def tell_builds(self, builds: Mapping[str, object]) -> None:
        """Keeps how several builds compared."""
        self._compiled = dataclasses.replace(self._compiled, builds=builds)
        self._facts = _facts(self._library, self._options, self._compiled)

    def store(self, key: str, plans: PlanStore) -> None:
        """Keeps the plan in a cache."""
        plans.store(key, self._compiled, self._library)

    def measure(self, runs: int = 30) -> float:
        """Median seconds of device time of one run at the first profile's common shapes."""
        runtime = self._opened()
        with runtime.cuda.current():
            unit = Unit(runtime)
            lane = Lane(runtime, unit)
            try:
                return lane.seconds(runtime.example(), runs)
            finally:
                lane.close()
                unit.close()

    def _opened(self) -> Runtime:
        if self._runtime is None:
            raise BackendUnavailable(
                "This engine was built ahead of time and cannot run here.",
                "It was compiled for the device `aot`, without a GPU.",
                "Build it with the option cache=folder, and take that folder to a machine with an "
                "NVIDIA GPU: tensorrt@cuda:0 with the same folder finds it there.",
                backend="tensorrt",
            )
        return self._runtime

    def _new_session(self) -> Session:
        runtime = self._opened()
        with runtime.cuda.current():
            return TensorRTSession(runtime, self._shared)

    def _inspect(self) -> EngineReport:
        report = self._compiled.report
        if self._runtime is not None:
            text = self._runtime.layers()
            if text:
                return _layers.from_inspector(text, report.graph if report else {})
        if report is None:
            raise BackendUnavailable(
                "Nobody tells the layers of this engine.",
                "It was built with verbosity=none, or its report was lost.",
                "Build it with verbosity=detailed.",
                backend="tensorrt",
            )
        return report

    def _save(self, path: Path) -> None:
        write_plan(path, self._compiled, self._library)

    def _close(self) -> None:
        if self._runtime is None:
            return
        with self._runtime.cuda.current():
            if self._shared is not None:
                self._shared.close()
            self._runtime.close()


def inspect_plan(library: Library, blob: bytes) -> EngineReport:
    """The layers of a plan that somebody built, as the engine's inspector tells them. Needs a GPU;
    raises BuildError where it does not load here.
    """
    with Cuda(0).current():
        _runtime, native = open_plan(library, blob)
        return _layers.from_inspector(layers_of(library, native), {})


def _facts(library: Library, options: TensorRTOptions, compiled: Compiled) -> dict[str, object]:
    facts: dict[str, object] = {
        "flavour": library.flavour,
        "version": library.version,
        "plan_bytes": len(compiled.blob),
        "profiles": [str(only_dynamic(profile)) for profile in compiled.profiles],
        "cached": compiled.cached,
        "lanes": options.lanes,
    }
    if compiled.repairs:
        facts["repairs"] = list(compiled.repairs)
    if compiled.warnings:
        facts["warnings"] = list(compiled.warnings)
    if compiled.builds:
        facts["builds"] = dict(compiled.builds)
    return facts
