from __future__ import annotations

import ctypes
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from unirt import (
    CPU,
    Availability,
    Backend,
    BuildError,
    Device,
    DeviceArray,
    Engine,
    EngineReport,
    InputError,
    Model,
    ModelFile,
    Options,
    Session,
    TensorSpec,
    host_devices,
    option,
)
from unirt_onnxruntime import _layers

log = logging.getLogger("unirt.onnxruntime")

# Device kind -> the execution provider that serves it. What ONNX Runtime calls them is its own.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rocm": "MIGraphXExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
INSTALL = {
    "cuda": "this onnxruntime was built without CUDA: pip uninstall onnxruntime, then "
    "pip install 'unirt[onnxruntime-gpu]'",
    "coreml": "CoreML needs macOS",
    "dml": "DirectML needs Windows and onnxruntime-directml",
}

# onnx.TensorProto.DataType numbers of the types that NumPy itself lacks.
EXTENDED = {
    "bfloat16": 16,
    "float8_e4m3fn": 17,
    "float8_e4m3fnuz": 18,
    "float8_e5m2": 19,
    "float8_e5m2fnuz": 20,
}
CUDA_LEGACY_STREAM = 1

ISLANDS = ["WeightBiasQuantization"]
"""It makes float biases of quantized products int32, without which their kernels are not fused. But
it also quantizes the weights of float32 nodes between Q/DQ, which were left so for their answers.
"""
FLOAT8 = (
    "the graph holds fp8, so it is optimized as far as `basic` only, and its Q/DQ are left alone: "
    "ONNX Runtime takes them for int8, and then refuses the graph or answers wrong"
)


@dataclass(frozen=True)
class OnnxRuntimeOptions(Options):
    threads: int | None = option(
        None, "Threads inside one operator; default: one per physical core.", minimum=1
    )
    inter_op_threads: int | None = option(
        None, "Threads across operators; only used with execution=parallel.", minimum=1
    )
    spin: bool | None = option(
        None, "Whether idle threads spin for work: lower latency, a busy CPU. Default: they do."
    )
    execution: Literal["sequential", "parallel"] = option(
        "sequential", "Whether independent branches of the graph run at the same time."
    )
    optimization: Literal["disable", "basic", "extended", "layout", "all"] = option(
        "all", "How far the graph is rewritten before it runs."
    )
    memory_arena: bool = option(True, "Keep freed CPU memory for the next call.")
    deterministic: bool = option(False, "Only kernels that give the same bits every time.")
    tf32: bool = option(
        False, "Let CUDA round float32 matrix products to TF32: faster, about 3 digits right."
    )
    lanes: int = option(2, "How many calls submit and map keep running at once.", minimum=1)
    other_nodes: Literal["warn", "refuse"] = option(
        "warn", "What to do when a GPU provider leaves some of the nodes to the CPU."
    )
    provider_options: Mapping[str, str] = option(
        {}, "Passed to the execution provider as they are (cudnn_conv_algo_search=HEURISTIC …)."
    )
    config: Mapping[str, str] = option({}, "Session configuration entries, passed as they are.")


class OnnxRuntimeBackend(Backend):
    name = "onnxruntime"
    formats = ("onnx",)
    options = OnnxRuntimeOptions

    def _probe(self) -> Availability:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            if error.name != "onnxruntime":
                raise
            return Availability.no(
                "the onnxruntime package is not installed", "pip install 'unirt[onnxruntime]'"
            )
        built = onnxruntime.get_available_providers()
        devices = [CPU]
        missing = {kind: text for kind, text in INSTALL.items() if PROVIDERS[kind] not in built}
        if PROVIDERS["cuda"] in built:
            gpus = [device for device in host_devices() if device.kind == "cuda"]
            if gpus:
                devices = [*gpus, CPU]
            else:
                missing["cuda"] = "no NVIDIA GPU is visible here"
        for kind, provider in PROVIDERS.items():
            if kind not in ("cpu", "cuda") and provider in built:
                devices.append(Device(kind, 0, provider.removesuffix("ExecutionProvider")))
        return Availability.yes(onnxruntime.__version__, *devices, missing=missing)

    def _compile(self, file: ModelFile, device: Device, options: OnnxRuntimeOptions) -> Engine:
        return OnnxRuntimeEngine(file, device, options)


class OnnxRuntimeEngine(Engine):
    """One InferenceSession, which ONNX Runtime lets many threads use at once."""

    def __init__(self, file: ModelFile, device: Device, options: OnnxRuntimeOptions) -> None:
        import onnxruntime

        provider = PROVIDERS[device.kind]
        self._check_provider(provider, device, onnxruntime.get_available_providers())
        if device.kind == "cuda" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        own = dict(options.provider_options)
        if device.kind == "cuda":
            own["device_id"] = str(device.index or 0)
            own.setdefault("use_tf32", str(int(options.tf32)))
        self._providers: list[Any] = [(provider, own)]
        if device.kind != "cpu":
            self._providers.append(PROVIDERS["cpu"])
        self._settings, self._target, self._source = options, device, file
        # Weights beside the model are found relative to its path, so such a model goes in by path.
        content = str(file.path) if file.external else file.read()
        self._unwanted = ISLANDS if _has_islands(file, content) else None
        types = [*file.weight_dtypes, *(spec.dtype for spec in (*file.inputs, *file.outputs))]
        self._careful = any(name.startswith("float8") for name in types)
        try:
            self.native = self._open(content)
        except Exception as error:
            # Where only nodes know of fp8, the refusal tells.
            if self._careful or "float8" not in str(error):
                raise
            self._careful = True
            self.native = self._open(content)
        if self._careful and options.optimization not in ("disable", "basic"):
            self._notes = (FLOAT8,)
        self._check_provider(provider, device, self.native.get_providers())
        nodes = self._count_nodes(provider, device, options)
        self._facts = {
            "provider": provider,
            "providers": list(self.native.get_providers()),
            "nodes": nodes,
            "threads": options.threads,
        }
        self._file_inputs, self._file_outputs = file.inputs, file.outputs

    def _open(
        self,
        source: str | bytes,
        change: Callable[[Any], None] | None = None,
        *,
        optimized: bool = False,
    ) -> Any:
        """A session of its own, `change` having had its settings; `optimized` ones stay as is."""
        import onnxruntime

        settings = _session_options(onnxruntime, self._settings, self._careful)
        if optimized:
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if change is not None:
            change(settings)
        native = onnxruntime.InferenceSession(
            source,
            settings,
            providers=self._providers,
            enable_fallback=0,
            disabled_optimizers=self._unwanted,
        )
        native.disable_fallback()
        return native

    def _check_provider(self, provider: str, device: Device, active: list[str]) -> None:
        # A provider whose libraries do not load is dropped with a line on stderr, nothing more.
        if provider not in active:
            raise BuildError(
                f"onnxruntime cannot run on {device}.",
                f"{provider} did not load; it would have run on {', '.join(active)} instead.",
                "See its message above for the library that is missing; for CUDA, install the "
                "CUDA and cuDNN versions that this onnxruntime was built for.",
                backend="onnxruntime",
                device=str(device),
                providers=active,
            )

    def _count_nodes(
        self, provider: str, device: Device, options: OnnxRuntimeOptions
    ) -> dict[str, int]:
        """Nodes per provider; a GPU that leaves work to the CPU is said aloud or refused."""
        nodes: Counter[str] = Counter()
        for part in self.native.get_provider_graph_assignment_info():
            nodes[part.ep_name] += len(part.get_nodes())
        elsewhere = {name: count for name, count in nodes.items() if name != provider}
        if device.kind != "cpu" and elsewhere:
            told = ", ".join(f"{count} on {name}" for name, count in elsewhere.items())
            if options.other_nodes == "refuse" or not nodes.get(provider):
                raise BuildError(
                    f"onnxruntime does not run the whole model on {device}.",
                    f"{nodes.get(provider, 0)} nodes are on {provider}, {told}.",
                    "Set other_nodes=warn to allow a part elsewhere, or name onnxruntime@cpu.",
                    backend="onnxruntime",
                    device=str(device),
                    nodes=dict(nodes),
                )
            log.warning("of this model, %s runs %s nodes; %s", provider, nodes[provider], told)
        return dict(nodes)

    def _new_session(self) -> Session:
        return OnnxRuntimeSession(self, self.native)

    def _inspect(self) -> EngineReport:
        return _layers.inspect(self._source, self._open, self._placed())

    def _placed(self) -> dict[str, str]:
        """The provider of each node that has a name."""
        return {
            node.name: _layers.short(part.ep_name)
            for part in self.native.get_provider_graph_assignment_info()
            for node in part.get_nodes()
            if node.name
        }

    def _close(self) -> None:
        del self.native


def _has_islands(file: ModelFile, content: str | bytes) -> bool:
    if isinstance(content, str) or b"DequantizeLinear" not in content:
        return file.has_float_islands
    # What was derived from a file is told of that file, not of itself.
    return Model(content, max_bytes=sys.maxsize).primary.has_float_islands


def _session_options(onnxruntime: Any, options: OnnxRuntimeOptions, careful: bool) -> Any:
    """`careful` ones leave fp8 as it is in the graph."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # its warnings go to stderr; what matters is checked here
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if options.inter_op_threads is not None:
        settings.inter_op_num_threads = options.inter_op_threads
    mode = onnxruntime.ExecutionMode
    parallel = options.execution == "parallel"
    settings.execution_mode = mode.ORT_PARALLEL if parallel else mode.ORT_SEQUENTIAL
    level = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = {
        "disable": level.ORT_DISABLE_ALL,
        "basic": level.ORT_ENABLE_BASIC,
        "extended": level.ORT_ENABLE_EXTENDED,
        "layout": level.ORT_ENABLE_LAYOUT,
        "all": level.ORT_ENABLE_ALL,
    }["basic" if careful and options.optimization != "disable" else options.optimization]
    settings.enable_cpu_mem_arena = options.memory_arena
    settings.use_deterministic_compute = options.deterministic
    entries = {"session.record_ep_graph_assignment_info": "1"}
    if careful:
        entries["session.disable_quant_qdq"] = "1"
    if options.spin is not None:
        value = "1" if options.spin else "0"
        entries["session.intra_op.allow_spinning"] = value
        entries["session.inter_op.allow_spinning"] = value
    for key, value in (entries | dict(options.config)).items():  # set twice, one is warned of
        settings.add_session_config_entry(key, value)
    return settings


class OnnxRuntimeSession(Session):
    concurrent = True

    def __init__(self, engine: OnnxRuntimeEngine, native: Any) -> None:
        self._native = native
        # The C session beneath: the public `run` checks the names again, which core has done, and
        # retries on the CPU when a provider fails, which UniRT never does.
        self._call = getattr(native, "_sess", native).run
        self._specs = {s.name: s for s in (*engine._file_inputs, *engine._file_outputs)}
        self._names = [spec.name for spec in engine._file_outputs]
        self._target = engine._target
        self.lanes = engine._settings.lanes
        self._extended = any(spec.dtype in EXTENDED for spec in self._specs.values())

    def _run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._extended:
            return self._run_extended(inputs)
        names = self._names
        return dict(zip(names, self._call(names, inputs, None)))  # noqa: B905 - strict costs 0.1 µs

    def _profile(self, inputs: Mapping[str, Any]) -> EngineReport:
        engine = self.engine
        assert isinstance(engine, OnnxRuntimeEngine)
        _layers.refuse_launch_times(self._target.kind)

        def run_with(native: Any) -> Callable[[], object]:
            timed = OnnxRuntimeSession(engine, native)
            return lambda: timed._run(inputs)

        return _layers.profile(engine._source, engine._open, engine._placed(), run_with)

    def _run_extended(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """bfloat16 and float8 pass as OrtValues: the binding knows no NumPy type for them."""
        values = {name: self._ort_value(name, array) for name, array in inputs.items()}
        outputs = self._native.run_with_ort_values(self._names, values)
        return dict(zip(self._names, map(self._to_numpy, self._names, outputs), strict=True))

    def _ort_value(self, name: str, array: Any) -> Any:
        from onnxruntime import OrtValue

        dtype = self._specs[name].dtype
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        if dtype in EXTENDED:
            raw = array.view(f"uint{8 * array.dtype.itemsize}")
            return OrtValue.ortvalue_from_numpy_with_onnx_type(raw, EXTENDED[dtype])
        return OrtValue.ortvalue_from_numpy(array)

    def _to_numpy(self, name: str, value: Any) -> Any:
        spec = self._specs[name]
        if spec.dtype not in EXTENDED:
            return value.numpy()
        shape = tuple(value.shape())
        result = np.empty(shape, spec.numpy_dtype)
        if result.nbytes:
            ctypes.memmove(result.ctypes.data, value.data_ptr(), result.nbytes)
        return result

    def _bind(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Callable[[], object] | None:
        if any(spec.dtype == "string" for spec in self._specs.values()):
            return None  # there is no OrtValue over text of NumPy's
        native, binding, keep = self._native, self._native.io_binding(), []
        for name, buffer in inputs.items():
            if isinstance(buffer, DeviceArray):
                self._bind_device(binding.bind_input, name, buffer)
            elif self._target.kind == "cpu":
                keep.append(self._ort_value(name, buffer))
                binding.bind_ortvalue_input(name, keep[-1])
        for name, buffer in outputs.items():
            if isinstance(buffer, DeviceArray):
                self._bind_device(binding.bind_output, name, buffer)
            else:
                keep.append(self._ort_value(name, buffer))
                binding.bind_ortvalue_output(name, keep[-1])
        run = native.run_with_iobinding
        if self._target.kind == "cpu":
            return lambda: run(binding)
        staged = {n: b for n, b in inputs.items() if not isinstance(b, DeviceArray)}

        def step() -> None:
            for name, buffer in staged.items():
                binding.bind_cpu_input(name, buffer)
            self._order_after_producers(len(staged) < len(inputs))
            run(binding)  # returns when the provider's stream is done

        return step

    def _bind_device(self, bind: Callable[..., None], name: str, array: DeviceArray) -> None:
        dtype = self._specs[name].dtype
        element = EXTENDED.get(dtype) or self._specs[name].numpy_dtype
        bind(name, "cuda", array.device_id, element, array.shape, array.pointer)

    def _run_device(self, inputs: Mapping[str, Any], keep: bool) -> Mapping[str, Any]:
        if self._target.kind != "cuda":
            raise InputError(
                f"onnxruntime@{self._target} cannot work on arrays of a device.",
                "This provider takes and gives host memory.",
                "Copy the inputs to the host and leave device_outputs out.",
            )
        binding = self._native.io_binding()
        on_device = False
        for name, value in inputs.items():
            if isinstance(value, DeviceArray):
                on_device = True
                self._bind_device(binding.bind_input, name, value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in self._names:
            binding.bind_output(name, "cuda" if keep else "cpu", self._target.index or 0)
        self._order_after_producers(on_device)
        self._native.run_with_iobinding(binding)
        values = binding.get_outputs()
        if not keep:
            return dict(zip(self._names, map(self._to_numpy, self._names, values), strict=True))
        return {
            name: self._device_array(self._specs[name], value)
            for name, value in zip(self._names, values, strict=True)
        }

    def _device_array(self, spec: TensorSpec, value: Any) -> Any:
        if value.device_name() != "cuda":  # a node that the CPU ran leaves its result there
            return self._to_numpy(spec.name, value)
        shape = tuple(value.shape())
        device = self._target.index or 0
        return DeviceArray(value.data_ptr(), shape, spec.dtype, device, value, value.numpy)

    def _order_after_producers(self, needed: bool) -> None:
        """Waits for the legacy default stream, behind which DLPack producers queued their work:
        the provider's own stream does not wait for it.
        """
        if not needed:
            return
        runtime = _cuda_runtime()
        runtime.cudaSetDevice(self._target.index or 0)
        status = runtime.cudaStreamSynchronize(ctypes.c_void_p(CUDA_LEGACY_STREAM))
        if status:
            raise RuntimeError(f"cudaStreamSynchronize failed with CUDA error {status}")

    def _close(self) -> None:
        del self._native, self._call


@cache
def _cuda_runtime() -> Any:
    """The CUDA runtime that the provider itself has loaded."""
    import sys

    import onnxruntime

    major = str(onnxruntime.cuda_version).partition(".")[0]
    name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
    return ctypes.CDLL(name)
