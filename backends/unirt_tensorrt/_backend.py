from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unirt import (
    Availability,
    Backend,
    BackendUnavailable,
    BuildError,
    BuildRequest,
    Device,
    Engine,
    EngineReport,
    ModelFile,
    host_devices,
)
from unirt_tensorrt import _build, _cache, _graph, _layers, _library
from unirt_tensorrt._cuda import Cuda
from unirt_tensorrt._engine import TensorRTEngine, inspect_plan
from unirt_tensorrt._options import TensorRTOptions, check

log = logging.getLogger("unirt.tensorrt")

AHEAD = Device("aot", None, "ahead of time, for NVIDIA GPUs from Ampere on")
"""What TensorRT for RTX compiles for without a GPU."""

# Options that decide how a plan runs and nothing in the plan itself.
RUN_SIDE = {
    "lanes",
    "cuda_graphs",
    "specialization",
    "share_memory",
    "cache",
    "weight_streaming_budget",
}


def _has_int8_convolutions(library: _library.Library) -> bool:
    version = tuple(map(int, library.version.split(".")[:2]))
    return not library.is_rtx or version >= (1, 7)


class TensorRTBackend(Backend):
    name = "tensorrt"
    formats = ("onnx",)
    options = TensorRTOptions
    engine_suffixes = (".plan", ".engine")

    @property
    def quantization(self) -> str:
        try:
            library = _library.load()
        except Exception:  # noqa: BLE001 - the probe says what is wrong with it
            return "tensorrt"
        return "tensorrt" if _has_int8_convolutions(library) else "tensorrt-rtx"

    def _probe(self) -> Availability:
        try:
            library = _library.load()
        except ModuleNotFoundError as error:
            if error.name not in _library.FLAVOURS:
                raise
            return Availability.no(
                f"{error}",
                "pip install 'unirt[tensorrt-rtx]' (RTX and consumer GPUs) or 'unirt[tensorrt]'",
            )
        version = f"{library.version} ({library.flavour})"
        targets = (AHEAD,) if library.is_rtx else ()
        try:
            import cuda.bindings.runtime  # noqa: F401
        except ImportError as error:
            return Availability.no(
                f"cuda-bindings, which carries the CUDA calls, is not usable: {error}",
                "pip install cuda-bindings",
                version=version,
                targets=targets,
            )
        gpus = [device for device in host_devices() if device.kind == "cuda"]
        if not gpus:
            return Availability.no(
                "no NVIDIA GPU is visible here"
                + ("; tensorrt@aot builds and inspects plans without one" if targets else ""),
                "nvidia-smi tells whether the driver sees one",
                version=version,
                targets=targets,
            )
        return Availability.yes(version, *gpus, targets=targets)

    def _compile(self, file: ModelFile, device: Device, options: TensorRTOptions) -> Engine:
        return self._compile_request(file, device, options, BuildRequest())

    def _compile_request(
        self, file: ModelFile, device: Device, options: TensorRTOptions, request: BuildRequest
    ) -> Engine:
        library = _library.load()
        _check_ranks(file)
        ahead = device.kind != "cuda"
        check(options, library, None if ahead else device)
        store = _cache.PlanStore(options.cache) if options.cache else None
        key = _cache.key_of(_key(library, file, device, options, request))
        compiled = store.load(key, library) if store else None
        runtime = None
        if store and library.is_rtx and not ahead:
            runtime = _cache.RuntimeStore(_runtime_path(store, key, device))
        if compiled is not None:
            return TensorRTEngine(library, file, device, options, compiled, runtime)
        engine = self._build(library, file, device, options, request, store, runtime)
        if store:
            try:
                file.verify()  # or the plan of other bytes would answer for these from now on
            except BaseException:
                engine._close()
                raise
            engine.store(key, store)
        return engine

    def _inspect_file(self, path: Path) -> EngineReport:
        """From the description beside the plan, or from the plan itself where a GPU is."""
        about = _cache.beside(path)
        missing, remedy = (
            f"No description lies beside it, and {self.probe().reason}.",
            f"Lay {about.name} beside it, which UniRT wrote with it, or inspect it on a machine "
            "with an NVIDIA GPU.",
        )
        if about.is_file():
            compiled = _cache.read_plan(path)
            if compiled.report is not None:
                return dataclasses.replace(compiled.report, facts=_cache.facts_beside(path))
            missing = f"{about.name} tells no layers, and {self.probe().reason}."
            remedy = "Build it again, or inspect it on a machine with an NVIDIA GPU."
        if not self.probe().available:
            raise BackendUnavailable(
                f"{path} cannot be read here.",
                missing,
                remedy,
                backend=self.name,
                path=path,
            )
        return inspect_plan(_library.load(), path.read_bytes())

    def _build(
        self,
        library: _library.Library,
        file: ModelFile,
        device: Device,
        options: TensorRTOptions,
        request: BuildRequest,
        store: _cache.PlanStore | None,
        runtime: _cache.RuntimeStore | None,
    ) -> TensorRTEngine:
        """One build, or the fastest of several: builders measure, and measurements vary."""
        import onnx

        content = file.read()
        graph = onnx.load_model_from_string(content)
        folder = file.path.parent if file.path else None
        prepared = _graph.prepare(
            graph,
            folder,
            is_rtx=library.is_rtx,
            int8_convolutions=_has_int8_convolutions(library),
        )
        if prepared.changed:
            graph = prepared.model
            content = graph.SerializeToString()
        for text in (*prepared.repairs, *prepared.warnings):
            log.warning("%s: %s", file.path or "the model", text)
        nodes = {
            node.name or f"node_of_{node.output[0]}": node.op_type for node in graph.graph.node
        }
        warnings = list(prepared.warnings)
        if library.rounds_floats and _multiplies_floats(graph):
            warnings.append(
                f"float32 products are rounded to TF32, since {_library.TF32_OVERRIDE} is "
                f"{os.environ.get(_library.TF32_OVERRIDE)!r} here: compare the answers"
            )
        ahead = device.kind != "cuda"
        timing_name = f"{_cache.machine()}-{library.version}-{device.name.replace(' ', '-')}"
        timing = store.read_timing(timing_name) if store and not library.is_rtx else b""
        best: TensorRTEngine | None = None
        seconds: list[float] = []
        blobs: list[bytes] = []
        for _ in range(options.builds):
            plan = _build.build(
                library,
                file,
                content,
                options,
                request,
                ahead=ahead,
                timing_cache=timing,
                prepare=(lambda: None) if ahead else Cuda(device.index or 0).use,
            )
            timing = plan.timing_cache or timing
            if plan.blob in blobs:
                continue  # nothing to measure again
            blobs.append(plan.blob)
            report = _layers.from_builder_log(plan.log, nodes)
            compiled = _cache.Compiled(
                plan.blob,
                plan.profiles,
                report,
                prepared.repairs,
                (*warnings, *plan.warnings),
                notes=(*file.notes, *prepared.notes),
            )
            engine = TensorRTEngine(library, file, device, options, compiled, runtime)
            if options.builds == 1 or ahead:
                best = engine
                break
            seconds.append(engine.measure())
            if best is None or seconds[-1] < min(seconds[:-1]):
                if best is not None:
                    best._close()
                best = engine
            else:
                engine._close()
        assert best is not None
        if store and timing and not library.is_rtx:
            store.write_timing(timing_name, timing)
        if seconds:
            best.tell_builds(
                {
                    "built": options.builds,
                    "different": len(blobs),
                    "seconds": seconds,
                    "spread": max(seconds) / min(seconds),
                }
            )
        return best


def _check_ranks(file: ModelFile) -> None:
    for spec in file.inputs:
        if spec.kind == "tensor" and spec.shape is None:
            raise BuildError(
                f"tensorrt cannot build a model whose input {spec.name!r} has no rank.",
                "The model does not say how many dimensions it has, and TensorRT would take it for "
                "a scalar.",
                "Export the model with its shapes, or name another candidate, such as onnxruntime.",
                backend="tensorrt",
                input=spec.name,
            )


def _multiplies_floats(model: Any) -> bool:
    """Whether the network holds products of float32 matrices."""
    products = {"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum"}
    floats = any(one.data_type == 1 and len(one.dims) > 1 for one in model.graph.initializer)
    return floats and any(node.op_type in products for node in model.graph.node)


def _key(
    library: _library.Library,
    file: ModelFile,
    device: Device,
    options: TensorRTOptions,
    request: BuildRequest,
) -> Mapping[str, object]:
    """All that decides the plan. A plan of tensorrt is for one GPU; one of RTX is for all, unless
    it was asked to be for the current one.
    """
    portable = library.is_rtx and "current" not in map(str.lower, options.compute_capabilities)
    build_side: dict[str, Any] = {
        field.name: str(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in RUN_SIDE
    }
    return {
        "flavour": library.flavour,
        "version": library.version,
        "machine": _cache.machine(),
        "device": None if portable else [device.name, str(device.facts["compute_capability"])],
        "tf32": os.environ.get(_library.TF32_OVERRIDE),  # another value, and it does not load
        "model": file.hash,
        "options": build_side,
        "profiles": [profile.to_dict() for profile in request.profiles],
        "hot": [profile.to_dict() for profile in request.hot],
    }


def _runtime_path(store: _cache.PlanStore, key: str, device: Device) -> Any:
    gpu = _cache.key_of({"gpu": device.name, "driver": str(device.facts.get("driver"))})[:12]
    return store.path(key).with_suffix(f".{gpu}.cache")
