"""From ONNX bytes to a serialized engine."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

from unirt import (
    BackendUnavailable,
    BuildCancelled,
    BuildError,
    BuildRequest,
    BuildStep,
    ModelFile,
    OptionError,
    ProfileError,
    ShapeProfile,
)
from unirt_tensorrt._errors import (
    Context,
    errors,
    no_builder,
    no_network,
    unbuildable,
    unreadable,
    warnings,
    wide,
)
from unirt_tensorrt._layers import tells_layers
from unirt_tensorrt._library import Library
from unirt_tensorrt._options import TensorRTOptions, capabilities, pool_limits, ranges
from unirt_tensorrt._profiles import NetworkInput, complete, derive, values_example

READING = "Reading the model"
LISTENING_SECONDS = 0.2
"""How long a wait lasts before Python looks for Ctrl-C, where a wait cannot be interrupted."""


class TensorRTError(RuntimeError):
    """What TensorRT itself said about a failed build: it returns nothing and writes to its log."""


_building = threading.Lock()
# Builds run one after another in TensorRT anyway.
_forked_amid = False
"""Whether this process was forked amid a build: TensorRT's own locks are held for ever then."""


def _note_fork() -> None:
    global _forked_amid
    _forked_amid = _forked_amid or _building.locked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@dataclass(frozen=True)
class Plan:
    """A serialized engine and how it came about.

    `profiles` are in TensorRT's own order, with the inputs that need a range and no others; empty
    for a static model. `derived` says that the caller gave none. `log` is what the builder said
    of its layers, `warnings` what a user may want to act on. `timing_cache` is empty for
    TensorRT-RTX.
    """

    blob: bytes
    profiles: tuple[ShapeProfile, ...]
    log: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    timing_cache: bytes = b""
    derived: bool = False


def build(
    library: Library,
    file: ModelFile,
    content: bytes,
    options: TensorRTOptions,
    request: BuildRequest,
    *,
    ahead: bool,
    timing_cache: bytes = b"",
    prepare: Callable[[], object] = lambda: None,
) -> Plan:
    """`content`, which belongs to `file`, as an engine. `ahead` is a build that touches no GPU.

    TensorRT works in a thread of its own, since an exception that reaches its callbacks, Ctrl-C's
    too, is printed and lost; `prepare` runs there first and makes a device current. The progress
    function runs in the calling thread, and what it raises comes out of here. A build that is
    stopped ends with its current step, and this waits for it.

    Raises BuildError, BuildCancelled, ProfileError, OptionError or BackendUnavailable.
    """
    if _forked_amid:
        raise BackendUnavailable(
            f"tensorrt cannot build {file.path.name if file.path else 'this model'} here.",
            "This process was forked while its parent was building, and TensorRT would wait for "
            "that build for ever.",
            "Start processes by spawn: multiprocessing.set_start_method('spawn').",
            backend="tensorrt",
        )
    steps: SimpleQueue[BuildStep | None] = SimpleQueue()
    cancelled = threading.Event()
    worker = _Worker(library, file, content, options, request, ahead, steps, cancelled)

    def work() -> Plan:
        # Taken here, where no Ctrl-C can come between the lock and its release.
        while not _building.acquire(timeout=LISTENING_SECONDS):
            if cancelled.is_set():
                raise _cancelled(worker.context.label)
        try:
            prepare()
            return worker.build(timing_cache)
        finally:
            _building.release()

    executor = ThreadPoolExecutor(1, "unirt-tensorrt-build")
    future = executor.submit(work)
    future.add_done_callback(lambda _: steps.put(None))
    try:
        while (step := _next(steps)) is not None:
            if request.progress and not cancelled.is_set() and request.progress(step) is False:
                cancelled.set()
    except BaseException:
        cancelled.set()
        wait([future])  # not for the queue's end, which may be what was just taken and lost
        raise
    finally:
        executor.shutdown(wait=False)
    error = future.exception()
    if error is not None:
        # The frames hold objects of TensorRT's, which must not outlive this call.
        traceback.clear_frames(error.__traceback__)
    if cancelled.is_set():
        raise _cancelled(worker.context.label)
    if isinstance(error, BuildError) and error.__cause__ is None:
        told = error.facts.get("log")
        raise error from TensorRTError(
            "\n".join(map(str, told)) if isinstance(told, list | tuple) and told else error.why
        )
    if error is not None:
        raise error
    return future.result()


def _cancelled(label: str) -> BuildCancelled:
    return BuildCancelled(
        f"The build of {label} was cancelled.",
        "The progress function returned False.",
        "Nothing was kept; build again to have the engine.",
        backend="tensorrt",
    )


def _next(steps: SimpleQueue[BuildStep | None]) -> BuildStep | None:
    while True:
        try:
            return steps.get(timeout=LISTENING_SECONDS)
        except Empty:
            continue


class _Worker:
    """The part of a build that runs in its own thread."""

    def __init__(
        self,
        library: Library,
        file: ModelFile,
        content: bytes,
        options: TensorRTOptions,
        request: BuildRequest,
        ahead: bool,
        steps: SimpleQueue[BuildStep | None],
        cancelled: threading.Event,
    ) -> None:
        self.library, self.trt = library, library.module
        self.options, self.request, self.ahead = options, request, ahead
        self.steps, self.cancelled = steps, cancelled
        self.context = Context(library, file, content, options, ahead, [])

    def build(self, timing_cache: bytes) -> Plan:
        started = time.perf_counter()
        with self.library.capture() as messages:
            self.context = replace(self.context, messages=messages)
            monitor = _monitor(self.trt, self.steps, self.cancelled)
            try:
                builder = self.trt.Builder(self.library.logger)
            except (TypeError, RuntimeError) as error:
                raise no_builder(self.context) from error
            flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
            network = builder.create_network(0 if flag is None else 1 << int(flag))
            parser = self._parse(network)
            self._check_types(network)
            config = builder.create_builder_config()
            if hasattr(config, "progress_monitor"):
                config.progress_monitor = monitor
            self._configure(builder, config)
            profiles = self._profiles(network)
            for profile in profiles:
                self._add_profile(builder, config, profile)
            cache = self._use_timings(config, timing_cache)
            blob = self._serialize(builder, network, config)
            timings = b"" if cache is None else bytes(memoryview(cache.serialize()))
            # Children before their parents; the monitor has to outlive them all.
            del cache, config, parser, network, builder, monitor
        return Plan(
            blob,
            profiles,
            tuple(m.text for m in messages if tells_layers(m.text)),
            tuple(warnings(messages) + self._wide_weights()),
            time.perf_counter() - started,
            timings,
            bool(self.context.derived),
        )

    def _parse(self, network: Any) -> Any:
        self.steps.put(BuildStep(READING, "", 0, 1))
        content, path = self.context.content, self.context.file.path
        parser = self.trt.OnnxParser(network, self.library.logger)
        # The path is where weights beside the model are looked for.
        good = parser.parse(content, str(path)) if path else parser.parse(content)
        if not good:
            raise unreadable(self.context, parser)
        if network.num_outputs == 0:
            raise no_network(self.context)
        self.steps.put(BuildStep(READING, "", 1, 1))
        return parser

    def _check_types(self, network: Any) -> None:
        """TensorRT says nothing when it narrows float64; whoever passes it wants it."""
        names = {network.get_input(k).name for k in range(network.num_inputs)}
        names |= {network.get_output(k).name for k in range(network.num_outputs)}
        file = self.context.file
        for use, specs in (("input", file.inputs), ("output", file.outputs)):
            for spec in specs:
                if spec.dtype == "float64" and spec.name in names:
                    raise wide(self.context, spec.name, use)

    def _wide_weights(self) -> list[str]:
        count = self.context.file.weight_dtypes.get("float64", 0)
        return [f"TensorRT computes with {count} float64 weights as float32"] if count else []

    def _configure(self, builder: Any, config: Any) -> None:
        trt, options = self.trt, self.options
        for name, wanted in {
            "TF32": options.tf32,
            "SPARSE_WEIGHTS": options.sparse_weights,
            "STRICT_NANS": options.strict_nans,
            "WEIGHT_STREAMING": options.weight_streaming,
            "VERSION_COMPATIBLE": options.version_compatible,
            "EXCLUDE_LEAN_RUNTIME": options.version_compatible and not options.lean_runtime,
            "REFIT": options.refit,
            "STRIP_PLAN": options.strip_weights,
            "GPU_FALLBACK": options.gpu_fallback,
            "EDITABLE_TIMING_CACHE": options.timing_cache == "editable",
            "ERROR_ON_TIMING_CACHE_MISS": options.timing_cache == "require",
            "DISABLE_TIMING_CACHE": options.timing_cache == "off",
        }.items():
            flag = getattr(trt.BuilderFlag, name, None)
            if flag is None:
                if wanted:
                    raise self._option_refused(_OPTION_OF.get(name, name.lower()))
                continue
            (config.set_flag if wanted else config.clear_flag)(flag)
            if bool(config.get_flag(flag)) != wanted:
                raise self._option_refused(_OPTION_OF.get(name, name.lower()))
        for name, size in pool_limits(options).items():
            pool = getattr(trt.MemoryPoolType, name, None)
            if pool is not None:
                with contextlib.suppress(TypeError, RuntimeError):  # no such number; seen below
                    config.set_memory_pool_limit(pool, size)
            if pool is None or config.get_memory_pool_limit(pool) != size:
                raise self._option_refused("workspace" if name == "WORKSPACE" else "memory_pools")
        for member, option, value in self._members():
            if not hasattr(config, member):
                raise self._option_refused(option)
            with contextlib.suppress(TypeError, RuntimeError):
                setattr(config, member, value)
            if getattr(config, member) != value:
                raise self._option_refused(option)
        chosen = capabilities(options, self.library)
        if chosen:
            config.num_compute_capabilities = len(chosen)
            for index, capability in enumerate(chosen):
                if not config.set_compute_capability(capability, index):
                    raise self._option_refused("compute_capabilities")
        if options.dla_core is not None:
            if options.dla_core >= builder.num_DLA_cores:
                raise self._option_refused("dla_core", f"has {builder.num_DLA_cores} such cores")
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = options.dla_core

    def _members(self) -> list[tuple[str, str, Any]]:
        """Attributes of the configuration that differ from TensorRT's own defaults, by option."""
        trt, options = self.trt, self.options
        verbosity = {"detailed": "DETAILED", "names": "LAYER_NAMES_ONLY", "none": "NONE"}
        level = getattr(trt.ProfilingVerbosity, verbosity[options.verbosity])
        members: list[tuple[str, str, Any]] = [("profiling_verbosity", "verbosity", level)]
        if options.auxiliary_streams is not None:
            members.append(("max_aux_streams", "auxiliary_streams", options.auxiliary_streams))
        if options.optimization_level != 3:
            level = options.optimization_level
            members.append(("builder_optimization_level", "optimization_level", level))
        if options.timing_iterations != 1:
            count = options.timing_iterations
            members.append(("avg_timing_iterations", "timing_iterations", count))
        for option, member, kind in (
            ("tiling", "tiling_optimization_level", "TilingOptimizationLevel"),
            (
                "hardware_compatibility",
                "hardware_compatibility_level",
                "HardwareCompatibilityLevel",
            ),
        ):
            name = getattr(options, option)
            if name != "none":
                value = getattr(getattr(trt, kind, None), name.upper(), None)
                if value is None:
                    raise self._option_refused(option)
                members.append((member, option, value))
        return members

    def _option_refused(self, name: str, why: str = "") -> OptionError:
        said = " ".join(errors(self.context.messages)[-1:])
        reason = why or (f"refused it: {said}" if said else "does not have it")
        value = getattr(self.options, name)
        return OptionError(
            f"tensorrt cannot take {name}={value} here.",
            f"{self.context.title} {reason.rstrip('.')}.",
            "Leave the option out.",
            option=name,
            value=value,
            owner="tensorrt",
        )

    def _profiles(self, network: Any) -> tuple[ShapeProfile, ...]:
        inputs = [NetworkInput(network.get_input(index)) for index in range(network.num_inputs)]
        given = complete(self.request.profiles, inputs)
        ranged = given if self.request.profiles else self._derived(inputs)
        # Hot shapes are shapes: what sizes stand in an input is as anywhere else.
        values = dict(ranged[0].values) if ranged else {}
        hot = [ShapeProfile(one.shapes, {**values, **one.values}) for one in self.request.hot]
        self.context = replace(self.context, hot=" | ".join(map(str, hot)))
        return tuple(dict.fromkeys((*ranged, *complete(hot, inputs))))

    def _derived(self, inputs: Sequence[NetworkInput]) -> tuple[ShapeProfile, ...]:
        """What a network gets for which nobody gave a range."""
        unknown = [one for one in inputs if one.needs_values]
        if unknown:
            names = ", ".join(repr(one.name) for one in unknown)
            raise self.context.error(
                f"tensorrt could not build {self.context.label} without a profile.",
                f"The content of {names} decides shapes in the graph, and its range is not known.",
                values_example(unknown[0]),
                inputs=[one.name for one in unknown],
            )
        if not any(one.needs_shapes for one in inputs):
            return ()
        profile = derive(inputs, *ranges(self.options))
        self.context = replace(self.context, derived=str(profile))
        return (profile,)

    def _add_profile(self, builder: Any, config: Any, profile: ShapeProfile) -> None:
        own = builder.create_optimization_profile()
        name = ""
        try:
            for name, shapes in profile.shapes.items():
                own.set_shape(name, *shapes)
            for name, values in profile.values.items():
                own.set_shape_input(name, *values)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise self._profile_refused(profile, name) from error
        if not own or config.add_optimization_profile(own) < 0:
            raise self._profile_refused(profile, None)

    def _profile_refused(self, profile: ShapeProfile, name: str | None) -> ProfileError:
        said = " ".join(errors(self.context.messages)[-1:]) or "its numbers are out of range"
        return ProfileError(
            f"TensorRT refused the profile {profile}.",
            f"It says: {said.rstrip('.')}.",
            "Give min, opt and max that the network can take.",
            name=name,
        )

    def _use_timings(self, config: Any, content: bytes) -> Any:
        """The cache of kernel timings that the build reads and adds to; None for TensorRT-RTX,
        which times nothing.
        """
        unused = self.library.is_rtx or self.options.timing_cache == "off"
        if unused or not hasattr(config, "create_timing_cache"):
            return None
        for data in dict.fromkeys((content, b"")):
            cache = config.create_timing_cache(data)
            # False is a cache of another GPU or release, or a damaged one: start afresh.
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
        return None

    def _serialize(self, builder: Any, network: Any, config: Any) -> bytes:
        memory = None
        if not self.cancelled.is_set():
            memory = builder.build_serialized_network(network, config)
        if memory is not None:
            return bytes(memoryview(memory))
        if self.cancelled.is_set():
            raise _cancelled(self.context.label)
        layers = []
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            layers.append((layer.name, layer.type.name, getattr(layer, "metadata", "")))
        raise unbuildable(self.context, layers)


_OPTION_OF = {
    "EXCLUDE_LEAN_RUNTIME": "lean_runtime",
    "STRIP_PLAN": "strip_weights",
    "EDITABLE_TIMING_CACHE": "timing_cache",
    "ERROR_ON_TIMING_CACHE_MISS": "timing_cache",
    "DISABLE_TIMING_CACHE": "timing_cache",
}


def _monitor(trt: Any, steps: SimpleQueue[BuildStep | None], cancelled: threading.Event) -> Any:
    """TensorRT's progress, told to `steps`; stops the build when `cancelled` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # the base comes with the library
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            # TensorRT may call from several threads, and a phase may run inside its namesake.
            self.lock = threading.Lock()
            self.running: dict[str, list[tuple[str, int]]] = {}

        def phase_start(self, phase: str, parent: str | None, count: int) -> None:
            with self.lock:
                self.running.setdefault(phase, []).append((parent or "", count))
            steps.put(BuildStep(phase, parent or "", 0, count))

        def step_complete(self, phase: str, step: int) -> bool:
            with self.lock:
                parent, count = self.running[phase][-1]
            if step + 1 < count:  # `phase_finish` tells of the last one
                steps.put(BuildStep(phase, parent, step + 1, count))
            return not cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            with self.lock:
                parent, count = self.running[phase].pop()
            steps.put(BuildStep(phase, parent, count, count))

    return Monitor()
