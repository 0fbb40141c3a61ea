"""Lanes of execution contexts, and the way of one call through one.

A lane is what one call at a time uses: a stream, an execution context per profile, pinned staging
memory and its twin on the device. Host inputs are copied into the pinned memory, go over in one
transfer, the context runs, and the outputs come back in one transfer. Device arrays are used where
they lie. A lane prepares each set of input shapes once and then only compares a key.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from unirt import DeviceArray
from unirt_tensorrt._cuda import (
    ALIGNMENT,
    LEGACY_STREAM,
    DeviceMemory,
    Graph,
    PinnedMemory,
    PoolMemory,
    aligned,
    check,
)

if TYPE_CHECKING:
    from unirt_tensorrt._engine import TensorRTEngine

log = logging.getLogger("unirt.tensorrt")

Shape = tuple[int, ...]
PROFILE_RUNS = 10
CHUNK = 4 << 20
"""Bytes of one input that are staged while the bytes before travel."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine. `on_host` ones hold shapes, which TensorRT reads on the
    CPU; `itemsize` is in bytes.
    """

    name: str
    is_input: bool
    dtype: str
    numpy_dtype: np.dtype[Any]
    on_host: bool

    @property
    def itemsize(self) -> int:
        return int(self.numpy_dtype.itemsize)


@dataclass
class Slot:
    """Where a tensor of known shape lies in a lane's staging memory."""

    tensor: Tensor
    shape: Shape
    offset: int
    nbytes: int
    view: Any


@dataclass(eq=False)
class Prepared:
    """A lane's plan for one set of input shapes. Dies when the lane's memory moves."""

    context: Context
    shapes: Mapping[str, Shape]
    values: Mapping[str, Any]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    open_outputs: tuple[Tensor, ...]
    scratch: int
    graph: Graph | None = None
    runs: int = 0
    capturable: bool = True
    in_bytes: int = 0
    out_bytes: int = 0


class Context:
    """An execution context fixed to one profile, and what it was last told."""

    def __init__(self, engine: TensorRTEngine, profile: int, stream: Any, **options: Any) -> None:
        self.native = engine.new_context(**options)
        self.profile = profile
        self.current: Prepared | None = None
        self.staged = False  # whether every address is the lane's staging memory
        self.addresses: dict[str, int] = {}
        self.scratch = 0
        if profile and not self.native.set_optimization_profile_async(profile, stream.number):
            raise RuntimeError(f"TensorRT did not switch to profile {profile}")
        stream.synchronize()

    def place(self, name: str, pointer: int) -> None:
        """Has the engine find a tensor at `pointer`."""
        if self.addresses.get(name) != pointer:
            if not self.native.set_tensor_address(name, pointer):
                raise RuntimeError(f"TensorRT did not take the address of {name!r}")
            self.addresses[name] = pointer


@dataclass(eq=False)
class Scratch:
    """The memory that contexts compute in: of one lane, or (`shared`) of all lanes of an engine."""

    engine: TensorRTEngine
    shared: bool
    memory: DeviceMemory | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    done: Any = None

    @contextlib.contextmanager
    def held(self, stream: Any) -> Iterator[None]:
        """Nobody else's work touches the memory from the first to the last call inside."""
        if not self.shared:
            yield
            return
        with self.lock:
            cuda = self.engine.cuda
            if self.done is None:
                self.done = cuda.event()
            else:
                check(cuda.stream_waits(stream.handle, self.done.handle, 0))
            try:
                yield
            finally:
                self.done.record(stream.handle)

    def give(self, context: Context, size: int) -> bool:
        """Has `context` compute here, in at least `size` bytes. Says whether the memory moved."""
        moved = False
        if self.memory is None or self.memory.size < size:
            if self.memory is not None:
                moved = True
                self.memory.close()  # waits for the device
            self.memory = None
            self.memory = DeviceMemory(self.engine.cuda, max(aligned(size), ALIGNMENT))
        if context.scratch != self.memory.pointer:
            context.native.set_device_memory(self.memory.pointer, self.memory.size)
            context.scratch = self.memory.pointer
        return moved

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()


class Lane:
    """One call at a time: a stream, contexts, and staging memory that grows to what is needed."""

    def __init__(self, engine: TensorRTEngine) -> None:
        engine.cuda.use()
        self._engine = engine
        self._cuda = engine.cuda
        self.stream = engine.cuda.stream()
        self._scratch = engine.shared_scratch or Scratch(engine, shared=False)
        self._contexts: dict[int, Context] = {}
        self._prepared: dict[object, Prepared] = {}
        self._pinned_in: PinnedMemory | None = None
        self._pinned_out: PinnedMemory | None = None
        self._device_in: DeviceMemory | None = None
        self._device_out: DeviceMemory | None = None
        self._fence = engine.cuda.event()
        self._names = [tensor.name for tensor in engine.tensors if tensor.is_input]
        self._host_inputs = [t.name for t in engine.tensors if t.is_input and t.on_host]
        self._captures = engine.captures
        self._several = engine.cuda.several

    # The way of a call

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Host arrays in, new host arrays out."""
        if self._several:
            self._cuda.use()
        prepared = self._prepare(inputs)
        if prepared.open_outputs:
            return self._run_open(prepared, inputs)
        try:
            if prepared.graph is not None:
                for slot in prepared.inputs:
                    np.copyto(slot.view, inputs[slot.tensor.name], casting="no")
                prepared.graph.launch(self.stream)
            else:
                with self._scratch.held(self.stream):
                    self._activate(prepared)
                    self._place_staged(prepared)
                    self._stage(prepared, inputs)
                    self._execute(prepared)
                    self._fetch(prepared)
            check(self._cuda.wait(self.stream.handle))
        except BaseException:
            self._recover(prepared)
            raise
        outputs = {slot.tensor.name: slot.view.copy() for slot in prepared.outputs}
        self._after(prepared)
        return outputs

    def run_device(self, inputs: Mapping[str, Any], keep: bool) -> dict[str, Any]:
        """As `run`, where inputs may lie on the device and outputs stay there if `keep`."""
        if self._several:
            self._cuda.use()
        prepared = self._prepare(inputs)
        if prepared.open_outputs:
            return self._run_open(prepared, inputs)
        context, stream = prepared.context, self.stream
        kept: dict[str, PoolMemory] = {}
        try:
            with self._scratch.held(stream):
                self._activate(prepared)
                self._wait_for_producers(inputs)
                context.staged = False
                for slot in prepared.inputs:
                    self._take(slot, inputs[slot.tensor.name], context)
                for slot in prepared.outputs:
                    if keep and not slot.tensor.on_host:
                        memory = self._engine.arrays.allocate(slot.nbytes, stream)
                        kept[slot.tensor.name] = memory
                        context.place(slot.tensor.name, memory.pointer)
                    else:
                        self._place_output(slot, context)
                self._execute(prepared)
                if not keep:
                    self._fetch(prepared)
            check(self._cuda.wait(stream.handle))
        except BaseException:
            self._recover(prepared)
            raise
        self._after(prepared)
        return {
            slot.tensor.name: self._device_array(slot, kept[slot.tensor.name])
            if slot.tensor.name in kept
            else slot.view.copy()
            for slot in prepared.outputs
        }

    def bind(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Callable[[], object] | None:
        """A function that runs from and into these buffers; the lane is its own from now on."""
        prepared = self._prepare(inputs)
        if prepared.open_outputs or self._host_inputs or self._scratch.shared:
            return None
        context, stream = prepared.context, self.stream
        self._activate(prepared)
        self._place_staged(prepared)
        staged: list[tuple[Any, Any]] = []
        fetched: list[tuple[Any, Any]] = []
        waits = False
        for slot in prepared.inputs:
            buffer = inputs[slot.tensor.name]
            if isinstance(buffer, DeviceArray):
                waits = True
                if buffer.pointer % ALIGNMENT:
                    return None
                context.place(slot.tensor.name, buffer.pointer)
            else:
                staged.append((slot.view, buffer))
        for slot in prepared.outputs:
            buffer = outputs[slot.tensor.name]
            if isinstance(buffer, DeviceArray):
                if buffer.pointer % ALIGNMENT:
                    return None
                context.place(slot.tensor.name, buffer.pointer)
            else:
                fetched.append((buffer, slot.view))
        copy_in = prepared.in_bytes if staged else 0
        copy_out = prepared.out_bytes if fetched else 0

        def enqueue() -> None:
            if copy_in:
                self._upload(0, copy_in)
            self._execute(prepared)
            if copy_out:
                self._download(copy_out)

        enqueue()
        self.stream.synchronize()
        graph = self._capture(enqueue) if self._captures and prepared.capturable else None
        launch = enqueue
        if graph is not None:
            launch = lambda: graph.launch(stream)  # noqa: E731
        elif not staged and not fetched:
            execute, number = context.native.execute_async_v3, stream.number

            def launch() -> None:
                if not execute(number):
                    raise self._failure()

        wait, handle, record = self._cuda.wait, stream.handle, self._cuda.record
        fence, stream_waits = self._fence.handle, self._cuda.stream_waits
        several, use = self._several, self._cuda.use

        def step() -> None:
            if several:
                use()
            for view, buffer in staged:
                view[...] = buffer
            if waits:
                record(fence, LEGACY_STREAM)
                stream_waits(handle, fence, 0)
            launch()
            status = wait(handle)
            if int(status[0]):
                check(status)
            for buffer, view in fetched:
                buffer[...] = view

        step.lane = self  # type: ignore[attr-defined] # what it works on lives as long as it does
        return step

    def profile(self, inputs: Mapping[str, Any]) -> list[tuple[str, float]]:
        """Median seconds of each layer, in the order in which they run."""
        trt = self._engine.library.module
        times: dict[str, list[float]] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, name: str, milliseconds: float) -> None:
                times.setdefault(name, []).append(milliseconds / 1000)

        index, _, _ = self._choice(inputs)
        # Its own context: a profiler keeps work from being captured, and stays with its context.
        context = Context(self._engine, index, self.stream, plain=True)
        self._contexts[index] = context
        self._captures = False
        prepared = self._prepare(inputs)
        self._activate(prepared)
        self._place_staged(prepared)
        self._stage(prepared, inputs)
        for _ in range(3):
            self._execute(prepared)
        self.stream.synchronize()
        profiler = Profiler()
        context.native.profiler = profiler
        for _ in range(PROFILE_RUNS):
            self._execute(prepared)
            self.stream.synchronize()
        return [(name, statistics.median(values)) for name, values in times.items()]

    def seconds(self, inputs: Mapping[str, Any], runs: int) -> float:
        """Median device time of one run, by CUDA events; inputs are sent once, before."""
        prepared = self._prepare(inputs)
        self._activate(prepared)
        self._place_staged(prepared)
        self._stage(prepared, inputs)
        for _ in range(max(3, runs // 4)):
            self._execute(prepared)
        self.stream.synchronize()
        start, stop = self._cuda.event(timing=True), self._cuda.event(timing=True)
        times = []
        for _ in range(runs):
            start.record(self.stream.handle)
            self._execute(prepared)
            stop.record(self.stream.handle)
            times.append(stop.seconds_since(start))
        return statistics.median(times)

    def close(self) -> None:
        """Frees the lane's memory, once its work is done."""
        with contextlib.suppress(Exception):
            self.stream.synchronize()
        self._prepared.clear()
        self._contexts.clear()
        for part in (self._pinned_in, self._pinned_out, self._device_in, self._device_out):
            if part is not None:
                part.close()
        if not self._scratch.shared:
            self._scratch.close()
        self._fence.close()
        self.stream.close()

    # Preparing

    def _prepare(self, inputs: Mapping[str, Any]) -> Prepared:
        key: object
        if self._host_inputs:
            key = (
                tuple(inputs[name].shape for name in self._names),
                tuple(np.asarray(inputs[name]).tobytes() for name in self._host_inputs),
            )
        elif len(self._names) == 1:
            key = inputs[self._names[0]].shape
        else:
            key = tuple([inputs[name].shape for name in self._names])
        prepared = self._prepared.get(key)
        if prepared is None:
            if len(self._prepared) >= 256:
                self._prepared.clear()
            prepared = self._prepared[key] = self._new_prepared(inputs, key)
        return prepared

    def _choice(self, inputs: Mapping[str, Any]) -> tuple[int, dict[str, Shape], dict[str, Any]]:
        shapes = {name: tuple(inputs[name].shape) for name in self._names}
        values = {
            name: np.ascontiguousarray(inputs[name]).reshape(np.shape(inputs[name]))
            for name in self._host_inputs
        }
        return self._engine.choose(shapes, values), shapes, values

    def _new_prepared(self, inputs: Mapping[str, Any], key: object) -> Prepared:
        index, shapes, values = self._choice(inputs)
        context = self._contexts.get(index)
        if context is None:
            context = self._contexts[index] = Context(self._engine, index, self.stream)
        native = context.native
        context.current = None
        with self._engine.library.capture() as messages:
            for name, shape in shapes.items():
                if not native.set_input_shape(name, shape):
                    raise self._engine.refused(shapes, messages)
            for name, value in values.items():
                context.place(name, value.ctypes.data)
            missing = native.infer_shapes()
        if missing:
            raise self._engine.refused(shapes, messages)
        inputs_, in_bytes, outputs, out_bytes, open_outputs = [], 0, [], 0, []
        for tensor in self._engine.tensors:
            if tensor.is_input:
                slot = Slot(tensor, shapes[tensor.name], in_bytes, 0, None)
                if not tensor.on_host:
                    inputs_.append(slot)
                    slot.nbytes = int(np.prod(slot.shape, dtype=np.int64)) * tensor.itemsize
                    in_bytes += aligned(max(slot.nbytes, 1))
                continue
            shape = tuple(native.get_tensor_shape(tensor.name))
            if any(size < 0 for size in shape) or tensor.name in self._engine.data_dependent:
                open_outputs.append(tensor)
                continue
            size = int(np.prod(shape, dtype=np.int64)) * tensor.itemsize
            outputs.append(Slot(tensor, shape, out_bytes, size, None))
            out_bytes += aligned(max(size, 1))
        need = self._engine.scratch_size(context.native, index)
        self._grow(in_bytes, out_bytes)
        assert self._pinned_in is not None
        assert self._pinned_out is not None
        for slots, memory in ((inputs_, self._pinned_in), (outputs, self._pinned_out)):
            for slot in slots:
                slot.view = memory.view(slot.offset, slot.tensor.numpy_dtype, slot.shape)
        host_outputs = any(slot.tensor.on_host for slot in outputs)
        return Prepared(
            context,
            shapes,
            values,
            tuple(inputs_),
            tuple(outputs),
            tuple(open_outputs),
            need,
            capturable=not (open_outputs or values or host_outputs),
            in_bytes=in_bytes,
            out_bytes=out_bytes,
        )

    def _grow(self, in_bytes: int, out_bytes: int) -> None:
        """Staging memory for so many bytes; where it moves, all that was prepared is void."""
        cuda = self._cuda
        moved = False
        for pinned, device, size in (
            ("_pinned_in", "_device_in", in_bytes),
            ("_pinned_out", "_device_out", out_bytes),
        ):
            have = getattr(self, pinned)
            if have is not None and have.size >= size:
                continue
            moved = moved or have is not None
            self.stream.synchronize()
            for name in (pinned, device):
                if getattr(self, name) is not None:
                    getattr(self, name).close()
                    setattr(self, name, None)
            # Half as much again: a stream of slowly growing inputs does not move each time.
            wanted = aligned(max(size, 1)) if have is None else aligned(size + size // 2)
            setattr(self, pinned, PinnedMemory(cuda, wanted))
            setattr(self, device, DeviceMemory(cuda, wanted))
        if moved:
            self._prepared.clear()
            for context in self._contexts.values():
                context.current = None

    def _activate(self, prepared: Prepared) -> None:
        context = prepared.context
        if context.current is prepared and not self._scratch.shared:
            return
        if self._scratch.give(context, prepared.scratch):
            for other in self._prepared.values():
                other.graph = None  # it computes where the memory was
        if context.current is prepared:
            return
        native = context.native
        for name, shape in prepared.shapes.items():
            if not native.set_input_shape(name, shape):
                raise self._engine.refused(prepared.shapes, [])
        for name, value in prepared.values.items():
            context.place(name, value.ctypes.data)
        context.current, context.staged = prepared, False

    def _place_staged(self, prepared: Prepared) -> None:
        context = prepared.context
        if context.staged:
            return
        for slot in prepared.inputs:
            self._place_input(slot, context)
        for slot in prepared.outputs:
            self._place_output(slot, context)
        context.staged = True

    def _place_input(self, slot: Slot, context: Context) -> None:
        assert self._device_in is not None
        context.place(slot.tensor.name, self._device_in.pointer + slot.offset)

    def _place_output(self, slot: Slot, context: Context) -> None:
        assert self._device_out is not None
        on_host = slot.tensor.on_host
        pointer = slot.view.ctypes.data if on_host else self._device_out.pointer + slot.offset
        context.place(slot.tensor.name, pointer)

    # Steps on the stream

    def _stage(self, prepared: Prepared, inputs: Mapping[str, Any]) -> None:
        if prepared.in_bytes <= CHUNK:
            for slot in prepared.inputs:
                np.copyto(slot.view, inputs[slot.tensor.name], casting="no")
            if prepared.in_bytes:
                self._upload(0, prepared.in_bytes)
            return
        for slot in prepared.inputs:
            source = inputs[slot.tensor.name]
            if slot.nbytes <= CHUNK or not source.flags.c_contiguous:
                np.copyto(slot.view, source, casting="no")
                if slot.nbytes:
                    self._upload(slot.offset, slot.nbytes)
                continue
            flat, target = source.reshape(-1), slot.view.reshape(-1)
            step = CHUNK // slot.tensor.itemsize
            for start in range(0, flat.size, step):
                part = flat[start : start + step]
                np.copyto(target[start : start + step], part, casting="no")
                self._upload(slot.offset + start * slot.tensor.itemsize, part.nbytes)

    def _upload(self, offset: int, size: int) -> None:
        assert self._device_in is not None
        assert self._pinned_in is not None
        cuda = self._cuda
        status = cuda.copy(
            self._device_in.pointer + offset,
            self._pinned_in.pointer + offset,
            size,
            cuda.to_device,
            self.stream.handle,
        )
        check(status)

    def _download(self, size: int) -> None:
        assert self._device_out is not None
        assert self._pinned_out is not None
        cuda = self._cuda
        status = cuda.copy(
            self._pinned_out.pointer,
            self._device_out.pointer,
            size,
            cuda.to_host,
            self.stream.handle,
        )
        check(status)

    def _fetch(self, prepared: Prepared) -> None:
        if prepared.out_bytes and not any(slot.tensor.on_host for slot in prepared.outputs):
            self._download(prepared.out_bytes)
            return
        for slot in prepared.outputs:  # what TensorRT wrote on the host already stays as it is
            if not slot.tensor.on_host and slot.nbytes:
                assert self._device_out is not None
                assert self._pinned_out is not None
                cuda = self._cuda
                check(
                    cuda.copy(
                        self._pinned_out.pointer + slot.offset,
                        self._device_out.pointer + slot.offset,
                        slot.nbytes,
                        cuda.to_host,
                        self.stream.handle,
                    )
                )

    def _execute(self, prepared: Prepared) -> None:
        if not prepared.context.native.execute_async_v3(self.stream.number):
            raise self._failure()

    def _failure(self) -> Exception:
        return RuntimeError("TensorRT did not enqueue the network; its log says why")

    def _take(self, slot: Slot, value: Any, context: Context) -> None:
        """One input of a call with device arrays: in place where it can be."""
        name = slot.tensor.name
        if isinstance(value, DeviceArray):
            if value.pointer % ALIGNMENT == 0 and value.pointer:
                context.place(name, value.pointer)
                return
            assert self._device_in is not None
            self._place_input(slot, context)
            cuda = self._cuda
            if slot.nbytes:
                check(
                    cuda.copy(
                        self._device_in.pointer + slot.offset,
                        value.pointer,
                        slot.nbytes,
                        cuda.on_device,
                        self.stream.handle,
                    )
                )
            return
        self._place_input(slot, context)
        np.copyto(slot.view, value, casting="no")
        if slot.nbytes:
            self._upload(slot.offset, slot.nbytes)

    def _wait_for_producers(self, inputs: Mapping[str, Any]) -> None:
        """Producers have ordered their work before the default stream; ours goes after it."""
        for value in inputs.values():
            if isinstance(value, DeviceArray) and not isinstance(value.owner, PoolMemory):
                self._fence.record(LEGACY_STREAM)
                check(self._cuda.stream_waits(self.stream.handle, self._fence.handle, 0))
                return

    def _after(self, prepared: Prepared) -> None:
        """Once a call is done: what the next one of this kind profits from."""
        if prepared.runs > 1:
            return
        prepared.runs += 1
        if prepared.runs == 1:
            self._engine.ran_first()
        elif self._captures and prepared.capturable and prepared.context.staged:

            def enqueue() -> None:
                if prepared.in_bytes:
                    self._upload(0, prepared.in_bytes)
                self._execute(prepared)
                if prepared.out_bytes:
                    self._download(prepared.out_bytes)

            if not self._scratch.shared:
                prepared.graph = self._capture(enqueue)

    def _capture(self, enqueue: Callable[[], None]) -> Graph | None:
        try:
            return Graph(self._cuda, self.stream, enqueue)
        except Exception as error:  # noqa: BLE001 - work that cannot be captured runs uncaptured
            log.info("not captured into a CUDA graph: %s", error)
            self._captures = False
            with contextlib.suppress(Exception):
                self.stream.synchronize()
            return None

    def _recover(self, prepared: Prepared) -> None:
        """After a failure: nothing of this call is still running, nothing of it is trusted."""
        prepared.context.current = None
        with contextlib.suppress(Exception):
            self.stream.synchronize()

    def _device_array(self, slot: Slot, memory: PoolMemory) -> DeviceArray:
        cuda, tensor = self._cuda, slot.tensor

        def to_host() -> Any:
            array = np.empty(slot.shape, tensor.numpy_dtype)
            if array.nbytes:
                cuda.use()
                check(
                    cuda.runtime.cudaMemcpy(
                        array.ctypes.data, memory.pointer, array.nbytes, cuda.to_host
                    )
                )
            return array

        return DeviceArray(memory.pointer, slot.shape, tensor.dtype, cuda.index, memory, to_host)

    # Outputs whose size the network decides

    def _run_open(self, prepared: Prepared, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A run where TensorRT asks for output memory while it computes."""
        context, cuda = prepared.context, self._cuda
        allocator_type = self._engine.allocator_type()
        allocators = {tensor.name: allocator_type(cuda) for tensor in prepared.open_outputs}
        try:
            with self._scratch.held(self.stream):
                self._activate(prepared)
                self._wait_for_producers(inputs)
                context.staged = False
                for slot in prepared.inputs:
                    self._take(slot, inputs[slot.tensor.name], context)
                for slot in prepared.outputs:
                    self._place_output(slot, context)
                for name, allocator in allocators.items():
                    if not context.native.set_output_allocator(name, allocator):
                        raise RuntimeError(f"TensorRT did not take an allocator for {name!r}")
                self._execute(prepared)
                self._fetch(prepared)
            self.stream.synchronize()
            outputs = {slot.tensor.name: slot.view.copy() for slot in prepared.outputs}
            for tensor in prepared.open_outputs:
                outputs[tensor.name] = allocators[tensor.name].fetch(tensor)
        except BaseException:
            self._recover(prepared)
            raise
        finally:
            for name in allocators:
                context.native.set_output_allocator(name, None)
        return {name: outputs[name] for name in self._engine.output_names}
