"""The other ways to run a network that benchmarks/gpu.py compares with.

TensorRT by hand, Polygraphy, PyTorch's CUDA graphs and ONNX Runtime with IOBinding.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_lab import DEVICE, Loop, Step, on_device, synchronize


def library() -> Any:
    """TensorRT's module, for RTX first; None without either."""
    for name in ("tensorrt_rtx", "tensorrt"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


_logger: list[Any] = []


def logger() -> Any:
    if not _logger:
        trt = library()
        _logger.append(trt.Logger(trt.Logger.ERROR))
    return _logger[0]


class RawEngine:
    """A plan, deserialized without UniRT."""

    def __init__(self, plan: bytes) -> None:
        self.runtime = library().Runtime(logger())
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise RuntimeError("the plan was refused")

    def loop(self, feed: Mapping[str, Any], *, graphs: bool, eager: bool = True) -> RawLoop:
        return RawLoop(self.engine, feed, graphs, eager)


class RawLoop:
    """The fastest loop an expert writes: own context and stream, addresses set once.

    `graphs` asks for TensorRT-RTX's whole-graph capture, `eager` for kernels specialized up front.
    No return code is looked at in `step`, so that nothing but the two calls is timed.
    """

    def __init__(self, engine: Any, feed: Mapping[str, Any], graphs: bool, eager: bool) -> None:
        from cuda.bindings import runtime as cudart

        trt = library()
        self.cudart = cudart
        _, self.stream = cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)
        self.handle = int(self.stream)
        config = engine.create_runtime_config()
        if hasattr(config, "cuda_graph_strategy"):
            strategy = trt.CudaGraphStrategy
            config.cuda_graph_strategy = (
                strategy.WHOLE_GRAPH_CAPTURE if graphs else strategy.DISABLED
            )
            kernels = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = (
                kernels.EAGER if eager else kernels.LAZY
            )
        self.context = engine.create_execution_context(config)
        profile = self._profile(engine, feed)
        if profile:
            self.context.set_optimization_profile_async(profile, self.handle)
            self.synchronize()
        self.inputs, self.outputs = dict(feed), {}
        for name, tensor in feed.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"shape {tuple(tensor.shape)} of {name} was refused")
        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT32: torch.int32,
            trt.DataType.INT64: torch.int64,
        }
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = dtypes[engine.get_tensor_dtype(name)]
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                tensor = self.inputs[name]
                if tensor.dtype != dtype:
                    raise RuntimeError(f"{name} is {dtype}, the feed has {tensor.dtype}")
            else:
                shape = tuple(self.context.get_tensor_shape(name))
                tensor = self.outputs[name] = torch.empty(shape, dtype=dtype, device=DEVICE)
            self.context.set_tensor_address(name, tensor.data_ptr())
        synchronize()
        self.step = self._step()
        self.step()

    @staticmethod
    def _profile(engine: Any, feed: Mapping[str, Any]) -> int:
        """The index of the tightest profile that these shapes fit."""
        fits = []
        for index in range(engine.num_optimization_profiles):
            spread, inside = 1, True
            for name, tensor in feed.items():
                low, _, high = engine.get_tensor_profile_shape(name, index)
                for least, size, most in zip(low, tensor.shape, high, strict=True):
                    inside &= least <= size <= most
                    spread *= 1 + most - least
            if inside:
                fits.append((spread, index))
        return min(fits)[1]

    def _step(self) -> Step:
        execute, handle, stream = self.context.execute_async_v3, self.handle, self.stream
        wait = self.cudart.cudaStreamSynchronize

        def step() -> None:
            execute(handle)
            wait(stream)

        return step

    def enqueue(self) -> None:
        self.context.execute_async_v3(self.handle)

    def synchronize(self) -> None:
        self.cudart.cudaStreamSynchronize(self.stream)

    def close(self) -> None:
        self.synchronize()
        del self.context, self.step
        self.cudart.cudaStreamDestroy(self.stream)

    def captured(self) -> Step:
        """The same, from a CUDA graph captured by hand. For contexts without their own graphs."""
        cudart = self.cudart
        self.enqueue()
        self.synchronize()
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        (error,) = cudart.cudaStreamBeginCapture(self.stream, mode)
        self.enqueue()
        error, graph = cudart.cudaStreamEndCapture(self.stream)
        if int(error):
            raise RuntimeError(f"capture failed: {error}")
        error, executable = cudart.cudaGraphInstantiate(graph, 0)
        if int(error):
            raise RuntimeError(f"instantiating the graph failed: {error}")
        launch, wait, stream = cudart.cudaGraphLaunch, cudart.cudaStreamSynchronize, self.stream

        def step() -> None:
            launch(executable, stream)
            wait(stream)

        return step

    def from_host(self, feed: Mapping[str, Any]) -> Step:
        """Host arrays in, host arrays out, through pinned memory that is allocated once."""
        pinned = {n: torch.empty_like(t, device="cpu").pin_memory() for n, t in self.inputs.items()}
        views = {name: tensor.numpy() for name, tensor in pinned.items()}
        results = {
            n: torch.empty_like(t, device="cpu").pin_memory() for n, t in self.outputs.items()
        }
        arrays = {name: tensor.numpy() for name, tensor in results.items()}
        copy, kind = self.cudart.cudaMemcpyAsync, self.cudart.cudaMemcpyKind
        to_device, to_host = kind.cudaMemcpyHostToDevice, kind.cudaMemcpyDeviceToHost
        inward = [
            (name, self.inputs[name].data_ptr(), t.data_ptr(), t.nbytes)
            for name, t in pinned.items()
        ]
        outward = [
            (t.data_ptr(), self.outputs[name].data_ptr(), t.nbytes) for name, t in results.items()
        ]
        execute, handle, stream = self.context.execute_async_v3, self.handle, self.stream
        wait = self.cudart.cudaStreamSynchronize

        def step() -> dict[str, Any]:
            for name, target, source, size in inward:
                np.copyto(views[name], feed[name])
                copy(target, source, size, to_device, stream)
            execute(handle)
            for target, source, size in outward:
                copy(target, source, size, to_host, stream)
            wait(stream)
            return {name: array.copy() for name, array in arrays.items()}

        return step


def raw_throughput(loops: Sequence[RawLoop], depth: int = 16) -> Loop:
    """Every stream kept full from one thread: what the device gives at most."""

    def loop(seconds: float) -> int:
        deadline, calls = time.perf_counter() + seconds, 0
        while time.perf_counter() < deadline:
            for _ in range(depth):
                for one in loops:
                    one.enqueue()
            for one in loops:
                one.synchronize()
            calls += depth * len(loops)
        return calls

    return loop


def polygraphy_runner(plan: bytes) -> Any:
    """An active TrtRunner over the plan; the caller deactivates it."""
    is_rtx = library() is not None and library().__name__ == "tensorrt_rtx"
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if is_rtx else "0"
    # Polygraphy looks for libcudart in a few folders, and not where PyTorch's wheels put it.
    found = [
        str(path.parent)
        for root in Path(torch.__file__).parent.parent.glob("nvidia/*/lib")
        for path in root.glob("libcudart.so*")
    ]
    if found and not Path("/usr/local/cuda/lib64/libcudart.so").exists():
        paths = [*found, os.environ.get("LD_LIBRARY_PATH", "")]
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    runner = TrtRunner(EngineFromBytes(plan))
    runner.activate()
    return runner


def torch_step(module: Any, feed: Mapping[str, Any]) -> Step:
    """The module as a CUDA graph, replayed and waited for. Inputs keep the dtypes of `feed`."""
    tensors = tuple(on_device(feed).values())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            module(*tensors)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other libraries' threads may allocate meanwhile; that is no business of this capture.
    capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with torch.inference_mode(), capture:
        output = module(*tensors)
    current = torch.cuda.current_stream()

    def step(_: object = (tensors, output)) -> None:
        graph.replay()
        current.synchronize()

    return step


class Half(torch.nn.Module):
    """A network in fp16 that takes what the fp32 one takes, as the engine does."""

    def __init__(self, module: Any, channels_last: bool) -> None:
        super().__init__()
        module = copy.deepcopy(module).half()
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.module = module.to(memory_format=torch.channels_last) if channels_last else module

    def forward(self, *inputs: Any) -> Any:
        cast = [
            x.half().contiguous(memory_format=self.format) if x.is_floating_point() else x
            for x in inputs
        ]
        return self.module(*cast).float()


def onnxruntime_has_cuda() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def onnxruntime_step(model: bytes, feed: Mapping[str, Any], output: Any, *, graph: bool) -> Step:
    """ONNX Runtime's CUDA provider with IOBinding on device memory."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1" if graph else "0"})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("the CUDA provider did not load")
    tensors = on_device(feed)
    result = torch.empty_like(output)
    binding = session.io_binding()
    for name, tensor in tensors.items():
        dtype = feed[name].dtype.type
        binding.bind_input(name, DEVICE, 0, dtype, tuple(tensor.shape), tensor.data_ptr())
    name = session.get_outputs()[0].name
    dtype = np.float16 if result.dtype == torch.float16 else np.float32
    binding.bind_output(name, DEVICE, 0, dtype, tuple(result.shape), result.data_ptr())

    def step(_: object = (tensors, result)) -> None:
        session.run_with_iobinding(binding)

    return step
