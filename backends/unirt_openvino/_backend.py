from __future__ import annotations

import logging
import math
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unirt import (
    Availability,
    Backend,
    BuildError,
    Device,
    Engine,
    InputError,
    ModelFile,
    OptionError,
    Options,
    Pool,
    Session,
    TensorSpec,
    option,
)

log = logging.getLogger("unirt.openvino")

Array: TypeAlias = NDArray[Any]

# OpenVINO's device -> ours, and why it is not here when its runtime does not report it.
KINDS = {"CPU": "cpu", "GPU": "gpu", "NPU": "npu"}
MISSING = {
    "gpu": "openvino sees no Intel GPU: there is none, or its OpenCL driver is not installed",
    "npu": "openvino sees no Intel NPU: there is none, or its driver is not installed",
}

# OpenVINO's element types -> ours.
DTYPES = {
    "boolean": "bool",
    "string": "string",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "f4e2m1": "float4_e2m1fn",
    "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "f8e8m0": "float8_e8m0fnu",
    **{f"i{bits}": f"int{bits}" for bits in (4, 8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (4, 8, 16, 32, 64)},
}
PACKED = ("int4", "uint4", "float4_e2m1fn")  # two to a byte in OpenVINO, one in NumPy

# Its plugins compute these in 32 bits. Integers that do not fit would wrap; float64 loses digits,
# and its infinities become the largest float32.
NARROWED = {"int64": "int32", "uint64": "int32", "float64": "float32"}
LIMITS = {"int64": (-(2**31), 2**31 - 1), "uint64": (0, 2**31 - 1)}

# From here on lending an array's memory (10 us of calls) beats copying it. Measured.
LENT_FROM_BYTES = 256 * 1024


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
            openvino = _import_openvino()
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
                self._native = _import_openvino().Core()
                # Mapped weights would follow whatever is later written into their file.
                self._native.set_property({"ENABLE_MMAP": False})
            return self._native


@cache
def _import_openvino() -> Any:
    """The module, without what its import does beside: asking no one, it writes a client id into
    the home folder and reports to Google Analytics, from a child process that it forks.
    """
    name = "openvino_telemetry"
    if "openvino" in sys.modules or name in sys.modules:
        import openvino
    else:
        sys.modules[name] = None  # type: ignore[assignment]  # which openvino takes as not installed
        try:
            import openvino
        finally:
            sys.modules.pop(name, None)
    return openvino


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


@dataclass(frozen=True)
class _Port:
    """An input or output of the compiled model, and the file's name for it."""

    name: str
    index: int
    spec: TensorSpec
    element: Any
    shape: tuple[int, ...] | None
    """Its shape where that is static."""
    passes: bool = False
    """An output that is an input: setting its memory would set that input's."""

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return self.spec.numpy_dtype

    @cached_property
    def plain(self) -> bool:
        """Whether OpenVINO lays it out as NumPy does."""
        return self.spec.dtype not in (*PACKED, "string")

    @cached_property
    def presettable(self) -> bool:
        """Whether an output can go into memory of ours. A dynamic one could outgrow it."""
        return self.plain and not self.passes and self.shape is not None

    @cached_property
    def large(self) -> bool:
        nbytes = math.prod(self.shape or ()) * self.dtype.itemsize
        return self.presettable and nbytes >= LENT_FROM_BYTES


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
        compiled = core.compile_model(model, native, settings)
        _check_device(compiled, native)
        _check_precision(compiled, file, device, options)
        inputs = _ports(file.inputs, compiled.inputs, "input")
        outputs = _ports(file.outputs, compiled.outputs, "output")
        aliases = {name for port in compiled.inputs for name in port.get_names()}
        self.ports_in = tuple(inputs)
        self.ports_out = tuple(
            replace(port, passes=not aliases.isdisjoint(compiled.outputs[port.index].get_names()))
            for port in outputs
        )
        if any(spec.dtype == "undefined" for spec in file.outputs):
            self._outputs = tuple(port.spec for port in outputs)
        self.compiled = compiled
        self._facts = _facts(compiled, options, file, inputs)
        self.requests = int(str(self._facts["requests"]))

    def _new_session(self) -> Session:
        return OpenVINOSession(self)

    def _close(self) -> None:
        del self.compiled


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
        if node.get_type_name() == "Parameter" and _dtype(result.input_value(0)) == "string":
            raise BuildError(
                "openvino cannot run this model.",
                f"It passes the string input {node.get_friendly_name()!r} on as an output, which "
                "crashes openvino 2026.4.",
                "Leave that output out, or use onnxruntime.",
            )


def _dtype(port: Any) -> str:
    name = str(port.get_element_type().get_type_name())
    return DTYPES.get(name, name)


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


def _ports(specs: Sequence[TensorSpec], ports: Sequence[Any], what: str) -> list[_Port]:
    """The file's specs on the compiled model's ports: by name, or else by position."""
    free = dict(enumerate(ports))
    chosen: dict[str, int] = {}
    for spec in specs:
        index = next((i for i, port in free.items() if spec.name in port.get_names()), None)
        if index is not None:
            chosen[spec.name] = index
            del free[index]
    # Inputs that nothing uses are dropped by OpenVINO; outputs never are.
    complete = not free if what == "input" else len(chosen) == len(specs)
    if not complete:
        if len(specs) != len(ports):
            raise _strange(what, specs, ports, f"it has {len(ports)} instead of {len(specs)}")
        chosen = {spec.name: index for index, spec in enumerate(specs)}
    return [
        _port(spec, chosen[spec.name], ports, specs, what) for spec in specs if spec.name in chosen
    ]


def _port(
    spec: TensorSpec, index: int, ports: Sequence[Any], specs: Sequence[TensorSpec], what: str
) -> _Port:
    port = ports[index]
    partial = port.get_partial_shape()
    dtype = _dtype(port)
    if spec.kind != "tensor" or dtype not in DTYPES.values():
        raise _strange(what, specs, ports, f"{spec.name!r} is a {spec.kind} of {dtype}")
    if spec.dtype not in (dtype, "undefined"):
        raise _strange(what, specs, ports, f"{spec.name!r} is {dtype} instead of {spec.dtype}")
    if partial.rank.is_static and spec.shape is not None and len(partial) != len(spec.shape):
        raise _strange(what, specs, ports, f"{spec.name!r} has rank {len(partial)}")
    shape = tuple(partial.to_shape()) if partial.is_static else None
    if spec.dtype == "undefined":
        known = None
        if partial.rank.is_static:
            known = tuple(d.get_length() if d.is_static else None for d in partial)
        spec = TensorSpec(spec.name, dtype, known)
    return _Port(spec.name, index, spec, port.get_element_type(), shape)


def _strange(what: str, specs: Sequence[TensorSpec], ports: Sequence[Any], why: str) -> BuildError:
    there = ", ".join(f"{sorted(port.get_names())} {_dtype(port)}" for port in ports)
    return BuildError(
        f"What openvino made of this model has other {what}s than the file.",
        f"The file's are {'; '.join(map(str, specs)) or 'none'}; openvino's are {there or 'none'}: "
        f"{why}.",
        "Use another backend or device, or export the model again.",
    )


def _facts(
    compiled: Any, options: OpenVINOOptions, file: ModelFile, inputs: Sequence[_Port]
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


class OpenVINOSession(Session):
    """Calls take an infer request from a pool: one of them serves one thread at a time."""

    concurrent = True

    def __init__(self, engine: OpenVINOEngine) -> None:
        self._source = engine
        self._pool = Pool(self._new_lane, engine.requests)
        self._pool.give(self._pool.take())  # a device that cannot make one says so now
        self.lanes = engine.requests

    def _new_lane(self) -> _Lane:
        source = self._source
        return _Lane(source.compiled.create_infer_request(), source.ports_in, source.ports_out)

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        pool = self._pool
        lane = pool.take()
        try:
            return lane.run(inputs)
        finally:
            pool.give(lane)

    def _bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Callable[[], object]:
        return self._new_lane().bound(inputs, outputs)

    def _close(self) -> None:
        self._pool.drain()
        del self._pool, self._source


class _Lane:
    """One infer request with input memory of its own."""

    def __init__(self, request: Any, inputs: tuple[_Port, ...], outputs: tuple[_Port, ...]) -> None:
        openvino = _import_openvino()
        self._request = request
        self._outputs = outputs
        # The Python wrapper above it dispatches on types for three times as long as this takes.
        # Its arguments: inputs, share_outputs, decode_strings; names cost another microsecond.
        self._infer: Any = super(openvino.InferRequest, request).infer  # type: ignore[misc]
        self._slots = [_SLOTS.get(port.spec.dtype, _Slot)(request, port) for port in inputs]
        self._names = [port.name for port in outputs]
        self._direct = [port.index for port in outputs] == [*range(len(request.model_outputs))]
        self._direct &= all(port.plain and port.dtype.isbuiltin == 1 for port in outputs)
        self._large = [
            (port, request.get_output_tensor(port.index)) for port in outputs if port.large
        ]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        lent = None
        try:
            for slot in self._slots:
                if slot.write(inputs[slot.name]):
                    lent = [*lent, slot] if lent else [slot]
            if self._large:
                return self._run_large()
            # Copies of the outputs, in order of the ports.
            values = self._infer({}, False, True).values()
            if self._direct:
                return dict(zip(self._names, values, strict=True))
            return self._taken(list(values))
        finally:
            # OpenVINO keeps no reference to lent memory, which is the caller's again from here.
            if lent:
                for slot in lent:
                    slot.restore()

    def _run_large(self) -> dict[str, Array]:
        """Large outputs are computed into new arrays instead of being copied into them."""
        fresh: dict[int, Array] = {}
        try:
            for port, _ in self._large:
                fresh[port.index] = array = np.empty(port.shape or (), port.dtype)
                self._request.set_output_tensor(port.index, _tensor(array, port))
            views = self._infer({}, True, True).values()
            values = [fresh[i] if i in fresh else view.copy() for i, view in enumerate(views)]
            return self._taken(values)
        finally:
            for port, own in self._large:
                self._request.set_output_tensor(port.index, own)

    def _taken(self, values: Sequence[Array]) -> dict[str, Array]:
        return {port.name: self._take(port, values[port.index]) for port in self._outputs}

    def _take(self, port: _Port, value: Array) -> Array:
        if port.spec.dtype == "string":
            return value.astype(object)
        if port.spec.dtype in PACKED:
            shape = tuple(self._request.get_output_tensor(port.index).shape)
            return _unpacked(value, port.dtype, shape)
        return value if value.dtype == port.dtype else value.view(port.dtype)

    def bound(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Callable[[], object]:
        """A function that runs from and into these buffers, which it keeps alive."""
        request, infer = self._request, self._infer
        keep = []
        written = []
        for slot in self._slots:
            buffer = inputs[slot.name]
            if slot.lendable(buffer):
                slot.lend(buffer)
                keep.append(buffer)
            else:
                written.append((slot, buffer))
        fetched = []
        for port in self._outputs:
            buffer = outputs[port.name]
            if port.presettable:
                request.set_output_tensor(port.index, _tensor(buffer, port))
                keep.append(buffer)
            else:
                fetched.append((port, buffer))

        def step(keep: object = keep) -> None:
            infer({}, True, True)

        def copying_step(keep: object = keep) -> None:
            for slot, buffer in written:
                slot.copy(buffer)
            views = list(infer({}, True, True).values())
            for port, buffer in fetched:
                value = self._take(port, views[port.index])
                if value.shape != buffer.shape:
                    raise ValueError(
                        f"output {port.name!r} has now the shape {list(value.shape)}; bound is "
                        f"{list(buffer.shape)}"
                    )
                buffer[...] = value

        return copying_step if written or fetched else step


class _Slot:
    """One input of one infer request."""

    def __init__(self, request: Any, port: _Port) -> None:
        self.name = port.name
        self._request, self._port = request, port
        self._limits = LIMITS.get(port.spec.dtype)
        self._shape: tuple[int, ...] | None = port.shape
        if port.shape is not None:
            self._own = request.get_input_tensor(port.index)
            self._view = self._own.data.view(port.dtype) if port.plain else self._own.data
        else:
            least = request.model_inputs[port.index].get_partial_shape().get_min_shape()
            self._reshape(tuple(least))

    def write(self, array: Array) -> bool:
        """Puts the array in; True if the request now works on its memory."""
        if array.nbytes >= LENT_FROM_BYTES and self.lendable(array):
            self.lend(array)
            return True
        self.copy(array)
        return False

    def copy(self, array: Array) -> None:
        if self._limits is not None:
            _check_range(array, self._port, self._limits)
        if array.shape != self._shape:
            self._reshape(array.shape)
        self._view[...] = array

    def lendable(self, array: Array) -> bool:
        # OpenVINO takes no read-only memory, although it would not write into it.
        return self._limits is None and array.flags.carray

    def lend(self, array: Array) -> None:
        self._request.set_input_tensor(self._port.index, _tensor(array, self._port))

    def restore(self) -> None:
        self._request.set_input_tensor(self._port.index, self._own)

    def _reshape(self, shape: tuple[int, ...]) -> None:
        # A new tensor: resizing one that an array was lent to corrupts the heap.
        openvino = _import_openvino()
        self._own = openvino.Tensor(self._port.element, openvino.Shape(shape))
        self._request.set_input_tensor(self._port.index, self._own)
        self._view = self._own.data.view(self._port.dtype) if self._port.plain else self._own.data
        self._shape = shape


class _PackedSlot(_Slot):
    def copy(self, array: Array) -> None:
        if array.shape != self._shape:
            self._reshape(array.shape)
        flat = self._view.view(np.uint8).reshape(-1)
        flat[...] = _packed(array)

    def lendable(self, array: Array) -> bool:
        return False


class _TextSlot(_Slot):
    def copy(self, array: Array) -> None:
        openvino = _import_openvino()
        self._own = openvino.Tensor(np.ascontiguousarray(array.astype("U")).reshape(array.shape))
        self._request.set_input_tensor(self._port.index, self._own)

    def lendable(self, array: Array) -> bool:
        return False


_SLOTS: dict[str, type[_Slot]] = {"string": _TextSlot, **dict.fromkeys(PACKED, _PackedSlot)}


def _tensor(array: Array, port: _Port) -> Any:
    """A tensor over the array's memory. It does not keep the array alive."""
    openvino = _import_openvino()
    if port.dtype.isbuiltin != 1:  # NumPy has no number for the types of ml_dtypes
        array = array.view(f"uint{8 * port.dtype.itemsize}")
    return openvino.Tensor(array, openvino.Shape(array.shape), port.element)


def _check_range(array: Array, port: _Port, limits: tuple[int, int]) -> None:
    low, high = limits
    if ((array < low) | (array > high)).any():
        raise InputError(
            f"Input {port.name!r} has values that openvino would change.",
            f"It computes {port.spec.dtype} as int32, and they do not fit: the least is "
            f"{array.min()}, the largest {array.max()}.",
            f"Keep them from {low} to {high}, or use onnxruntime for this model.",
            name=port.name,
        )


def _packed(array: Array) -> Array:
    """Two values to a byte, the first one in the low half."""
    halves = np.ascontiguousarray(array).view(np.uint8).reshape(-1) & 15
    if halves.size % 2:
        halves = np.append(halves, np.uint8(0))
    return halves[0::2] | (halves[1::2] << 4)


def _unpacked(packed: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    halves = np.ascontiguousarray(packed).view(np.uint8).reshape(-1)
    values = np.empty(2 * halves.size, np.uint8)
    values[0::2], values[1::2] = halves & 15, halves >> 4
    if dtype.name == "int4":  # ml_dtypes keeps the sign in the upper half
        values[values > 7] |= 240
    return values[: math.prod(shape)].view(dtype).reshape(shape)
