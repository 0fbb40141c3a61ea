"""What OpenVINO can do here, and how it compiles a model."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from unirt import (
    Availability,
    Backend,
    BuildError,
    Device,
    Engine,
    EngineReport,
    ModelFile,
    OptionError,
    Options,
    Session,
    option,
)
from unirt_openvino import _cache, _layers
from unirt_openvino._library import import_openvino
from unirt_openvino._ports import Port, dtype_of, find_ports
from unirt_openvino._session import OpenVINOSession

log = logging.getLogger("unirt.openvino")


# OpenVINO's device -> ours, and why it is not here when its runtime does not report it.
KINDS = {"CPU": "cpu", "GPU": "gpu", "NPU": "npu"}


MISSING = {
    "gpu": "openvino sees no Intel GPU: there is none, or its OpenCL driver is not installed",
    "npu": "openvino sees no Intel NPU: there is none, or its driver is not installed",
}


# Its plugins compute these in 32 bits. Integers that do not fit would wrap; float64 loses digits,
# and its infinities become the largest float32.
NARROWED = {"int64": "int32", "uint64": "int32", "uint32": "int32", "float64": "float32"}


@dataclass(frozen=True)
class OpenVINOOptions(Options):
    hint: Literal["latency", "throughput", "cumulative_throughput"] = option(
        "latency",
        "What to tune for: one call at a time with all cores, or many calls at a time.",
    )
    threads: int | None = option(
        None, "CPU threads of all streams together; default: all cores.", minimum=1
    )
    streams: int | None = option(
        None, "How many calls run side by side; default: as `hint` wants.", minimum=1
    )
    requests: int | None = option(
        None,
        "Infer requests of a session, the most calls in flight; default: what openvino finds "
        "optimal, and at least 2.",
        minimum=1,
    )
    execution: Literal["accuracy", "performance"] = option(
        "accuracy",
        "accuracy keeps the graph's own types; performance lets openvino compute in lower ones.",
    )
    inference_precision: Literal["f32", "f16", "bf16"] | None = option(
        None, "The floating-point type to compute in; refused where the device does not obey."
    )
    cpu_pinning: bool | None = option(None, "Whether CPU threads are pinned to cores.")
    hyper_threading: bool | None = option(None, "Whether both threads of a core are used.")
    cores: Literal["any", "performance", "efficient"] | None = option(
        None, "Which kind of cores of a hybrid CPU to use."
    )
    cache_dir: Path | None = option(
        None, "Compiled models are kept here, in a folder for each model's hash."
    )
    config: Mapping[str, str] = option({}, "Other OpenVINO properties, passed as they are.")

    def settings(self, file: ModelFile) -> dict[str, Any]:
        """OpenVINO's properties. Raises OptionError for a property that has an option here."""
        cores = {"any": "ANY_CORE", "performance": "PCORE_ONLY", "efficient": "ECORE_ONLY"}
        own = {
            "PERFORMANCE_HINT": ("hint", self.hint.upper()),
            "INFERENCE_NUM_THREADS": ("threads", self.threads),
            "NUM_STREAMS": ("streams", self.streams),
            "EXECUTION_MODE_HINT": ("execution", self.execution.upper()),
            "INFERENCE_PRECISION_HINT": ("inference_precision", self.inference_precision),
            "ENABLE_CPU_PINNING": ("cpu_pinning", self.cpu_pinning),
            "ENABLE_HYPER_THREADING": ("hyper_threading", self.hyper_threading),
            "SCHEDULING_CORE_TYPE": ("cores", cores[self.cores] if self.cores else None),
            # A folder for each model, so that no cache key of the vendor can mix two of them up.
            "CACHE_DIR": ("cache_dir", self.cache_dir and str(self.cache_dir / file.hash)),
        }
        for name in self.config:
            if name in own:
                raise OptionError(
                    f"openvino cannot take {name} through config.",
                    f"The option {own[name][0]!r} sets it.",
                    f"Pass {own[name][0]}=... instead.",
                    option="config",
                    value=name,
                )
        given = {name: value for name, (_, value) in own.items() if value is not None}
        return {**given, **self.config}


class OpenVINOBackend(Backend):
    name = "openvino"
    formats = ("onnx", "tflite")
    options = OpenVINOOptions

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._native: Any = None

    def _probe(self) -> Availability:
        try:
            openvino = import_openvino()
        except ModuleNotFoundError as error:
            if error.name != "openvino":
                raise
            return Availability.no(
                "the openvino package is not installed", "pip install 'unirt[openvino]'"
            )
        core = self._core()
        devices = []
        for name in core.available_devices:
            kind, _, index = name.partition(".")
            if kind in KINDS:
                devices.append(_device(core, name, KINDS[kind], index))
        found = {device.kind for device in devices}
        missing = {kind: reason for kind, reason in MISSING.items() if kind not in found}
        if not devices:
            return Availability.no(
                f"openvino reports no device it can run on: {', '.join(missing.values())}",
                "see https://docs.openvino.ai, system requirements",
            )
        return Availability.yes(openvino.__version__.partition("-")[0], *devices, missing=missing)

    def _compile(self, file: ModelFile, device: Device, options: OpenVINOOptions) -> Engine:
        return OpenVINOEngine(self._core(), file, device, options)

    def _core(self) -> Any:
        with self._lock:
            if self._native is None:
                self._native = import_openvino().Core()
                # Mapped weights would follow whatever is later written into their file.
                self._native.set_property({"ENABLE_MMAP": False})
            return self._native


def _device(core: Any, name: str, kind: str, index: str) -> Device:
    facts: dict[str, object] = {"openvino": name}
    for key in ("OPTIMIZATION_CAPABILITIES", "DEVICE_ARCHITECTURE", "DEVICE_TYPE"):
        value = _readable(core.get_property, name, key)
        if value is not None:
            facts[key.lower()] = value
    memory = _readable(core.get_property, name, "GPU_DEVICE_TOTAL_MEM_SIZE")
    return Device(
        kind,
        None if kind == "cpu" else int(index) if index.isdigit() else 0,
        str(_readable(core.get_property, name, "FULL_DEVICE_NAME") or name),
        memory if isinstance(memory, int) else None,
        facts,
    )


def _readable(get: Callable[..., Any], *key: str) -> object:
    """A property as a JSON-able value; None where the device does not have it."""
    try:
        value = get(*key)
    except (RuntimeError, TypeError):
        return None
    if hasattr(value, "get_type_name"):
        return str(value.get_type_name())
    if isinstance(value, list | tuple | set):
        return [item if isinstance(item, int) else str(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value).rpartition(".")[2]


class OpenVINOEngine(Engine):
    """One compiled model on one device. Its sessions share it."""

    def __init__(
        self, core: Any, file: ModelFile, device: Device, options: OpenVINOOptions
    ) -> None:
        settings = options.settings(file)
        if file.stateful:
            raise BuildError(
                "openvino cannot run this stateful model.",
                "It does not keep the variables of a TFLite model from one run to the next.",
                "Use the tflite backend, or pass the state as inputs and outputs.",
            )
        model = _read_model(core, file)
        _refuse_passed_strings(model)
        native = str(device.facts.get("openvino", device.kind.upper()))
        cache = options.cache_dir and options.cache_dir / file.hash
        if cache:
            _cache.discard_damaged(cache)
        compiled = core.compile_model(model, native, settings)
        if cache:
            _cache.record(cache)
        _check_device(compiled, native)
        _check_precision(compiled, file, device, options)
        inputs = find_ports(file, "input", compiled.inputs)
        outputs = find_ports(file, "output", compiled.outputs)
        aliases = {name for port in compiled.inputs for name in port.get_names()}
        self.ports_in = tuple(inputs)
        self.ports_out = tuple(
            replace(port, passes=not aliases.isdisjoint(compiled.outputs[port.index].get_names()))
            for port in outputs
        )
        if any(spec.dtype == "undefined" for spec in file.outputs):
            self._outputs = tuple(port.spec for port in outputs)
        self.compiled = compiled
        self.operations = _layers.operations(model)
        self._recompile = partial(_recompile, core, file, native, settings)
        self._source = file
        self._facts = _facts(compiled, options, file, inputs)
        self.requests = int(str(self._facts["requests"]))

    def _new_session(self) -> Session:
        return OpenVINOSession(
            self.compiled, self.ports_in, self.ports_out, self.requests, self._counting
        )

    def _inspect(self) -> EngineReport:
        return _layers.read_layers(self.compiled, self._source, self.operations)

    def _counting(self) -> tuple[Any, EngineReport]:
        """The same model compiled once more, with counters, and its layers."""
        compiled = self._recompile()
        return compiled, _layers.read_layers(compiled, self._source, self.operations)

    def _close(self) -> None:
        del self.compiled, self._recompile


def _recompile(core: Any, file: ModelFile, native: str, settings: Mapping[str, Any]) -> Any:
    # The cache knows nothing of counters, and one stream says what a layer takes.
    kept = {name: value for name, value in settings.items() if name != "CACHE_DIR"}
    return core.compile_model(_read_model(core, file), native, {**kept, "PERF_COUNT": True})


def _read_model(core: Any, file: ModelFile) -> Any:
    if file.external:  # found relative to the model's path
        return core.read_model(str(file.path))
    if file.format == "onnx":
        return core.read_model(file.read())
    # Its TFLite reader takes files only.
    if file.path is not None:
        return core.read_model(str(file.path))
    with tempfile.TemporaryDirectory(prefix="unirt-") as folder:
        path = Path(folder, "model.tflite")
        path.write_bytes(file.read())
        return core.read_model(str(path))


def _refuse_passed_strings(model: Any) -> None:
    """OpenVINO 2026.4 frees the strings of an input that goes straight to an output twice, which
    ends the process.
    """
    for result in model.get_results():
        node = result
        while node.get_type_name() in ("Result", "Identity"):
            node = node.input_value(0).get_node()
        if node.get_type_name() == "Parameter" and dtype_of(result.input_value(0)) == "string":
            raise BuildError(
                "openvino cannot run this model.",
                f"It passes the string input {node.get_friendly_name()!r} on as an output, which "
                "crashes openvino 2026.4.",
                "Leave that output out, or use onnxruntime.",
            )


def _check_device(compiled: Any, native: str) -> None:
    used = _readable(compiled.get_property, "EXECUTION_DEVICES")
    names = used if isinstance(used, list) else [used]
    if [_numbered(str(name)) for name in names] != [_numbered(native)]:
        raise BuildError(
            f"openvino does not run this model on {native}.",
            f"It says that it runs on {', '.join(map(str, names))}.",
            "Name the device that you want.",
            devices=names,
        )


def _numbered(name: str) -> str:
    return name if "." in name else f"{name}.0"


def _check_precision(
    compiled: Any, file: ModelFile, device: Device, options: OpenVINOOptions
) -> None:
    """`dynamic` is OpenVINO's word for the graph's own types."""
    used = _readable(compiled.get_property, "INFERENCE_PRECISION_HINT")
    asked = options.inference_precision
    if asked is not None and used != asked:
        raise BuildError(
            f"openvino does not compute in {asked} on {device}.",
            f"It accepts inference_precision={asked} and then reports {used or 'nothing'}.",
            "Leave the option out, or use a device that has this type.",
            asked=asked,
            used=used,
        )
    floats = {spec.dtype for spec in (*file.inputs, *file.outputs)} | set(file.weight_dtypes)
    lowered = used in ("f16", "bf16") and floats & {"float32", "float64"}
    if asked is None and options.execution == "accuracy" and lowered:
        raise BuildError(
            f"openvino does not compute this float32 model in float32 on {device}.",
            f"It reports {used}, and UniRT lowers no precision silently.",
            f"Allow it with inference_precision={used}, or use another device.",
            used=used,
        )


def _facts(
    compiled: Any, options: OpenVINOOptions, file: ModelFile, inputs: Sequence[Port]
) -> dict[str, object]:
    def read(name: str) -> object:
        return _readable(compiled.get_property, name)

    optimal = read("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    # The second request copies inputs and outputs while the first one computes.
    requests = options.requests or max(2, optimal if isinstance(optimal, int) else 1)
    facts = {
        "execution_devices": read("EXECUTION_DEVICES"),
        "inference_precision": read("INFERENCE_PRECISION_HINT"),
        "execution_mode": read("EXECUTION_MODE_HINT"),
        "performance_hint": read("PERFORMANCE_HINT"),
        "threads": read("INFERENCE_NUM_THREADS"),
        "streams": read("NUM_STREAMS"),
        "optimal_requests": optimal,
        "requests": requests,
        "loaded_from_cache": read("LOADED_FROM_CACHE"),
        "computed_as": {
            spec.dtype: NARROWED[spec.dtype]
            for spec in (*file.inputs, *file.outputs)
            if spec.dtype in NARROWED
        },
        "unused_inputs": sorted({s.name for s in file.inputs} - {port.name for port in inputs}),
    }
    if "float64" in {spec.dtype for spec in (*file.inputs, *file.outputs)}:
        log.warning("openvino computes the float64 of this model as float32")
    for name in ("threads", "streams"):
        asked = getattr(options, name)
        if asked is not None and facts[name] is not None and facts[name] != asked:
            log.warning("openvino takes %s=%s instead of %s", name, facts[name], asked)
    return facts
