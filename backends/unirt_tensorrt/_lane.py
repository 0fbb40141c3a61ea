"""Lanes: the way of one call.

A lane is what one call at a time uses: a stream, and staging memory. Host inputs are copied into
pinned memory and travel while the call before still computes; the unit computes; the outputs come
back in one transfer. Device arrays are used where they lie. A lane prepares each set of input
shapes once and then only compares a key; where a call comes from the same addresses again, and its
context meets no other shapes, it is captured and replayed as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from unirt import DeviceArray
from unirt_tensorrt._cuda import ALIGNMENT, Graph, PoolMemory, check
from unirt_tensorrt._runtime import Runtime
from unirt_tensorrt._staging import (
    Buffer,
    Shape,
    Slot,
    allocator_type,
    slots_for,
    upload,
    upload_one,
)
from unirt_tensorrt._unit import Addresses, Prepared, Unit

log = logging.getLogger("unirt.tensorrt")

PROFILE_RUNS = 10
GRAPHS = 8
"""Sets of addresses for which a lane keeps the graph of one set of shapes."""
SHAPES = 256
"""Sets of shapes that a lane keeps prepared."""


class Lane:
    """One call at a time. Thread-safe only in that different lanes do not meet. Whoever calls has
    made the device current.
    """

    def __init__(self, runtime: Runtime, unit: Unit) -> None:
        self._runtime, self._unit, self._cuda = runtime, unit, runtime.cuda
        with unit.lock:
            self.stream = runtime.cuda.stream()
            self._fence = runtime.cuda.event()
        self._into = Buffer(runtime.cuda, to_device=True)
        self._back = Buffer(runtime.cuda, to_device=False)
        self._prepared: dict[object, Prepared] = {}
        self._spare: tuple[Prepared, dict[str, PoolMemory]] | None = None
        self._refusals = 0  # captures that failed
        self._names = [tensor.name for tensor in runtime.tensors if tensor.is_input]
        self._shape_inputs = [t.name for t in runtime.tensors if t.is_input and t.on_host]

    # The way of a call

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Host arrays in, new host arrays out."""
        prepared = self._prepare(inputs)
        if prepared.open_outputs:
            return self._run_open(prepared, inputs)
        try:
            upload(self._into, prepared.inputs, prepared.in_bytes, inputs, self.stream)
            replayed = self._launch(prepared, prepared.staged)
            self._fetch(prepared)
            check(self._cuda.wait(self.stream.handle))
        except BaseException:
            self._recover(prepared)
            raise
        outputs = {slot.tensor.name: slot.view.copy() for slot in prepared.outputs}
        if not replayed:
            self._remember(prepared, prepared.staged)
        return outputs

    def run_device(self, inputs: Mapping[str, Any], keep: bool) -> dict[str, Any]:
        """As `run`, where inputs may lie on the device and outputs stay there if `keep`."""
        prepared = self._prepare(inputs)
        if prepared.open_outputs:
            return self._run_open(prepared, inputs)
        try:
            kept = self._outputs_for(prepared) if keep else {}
            addresses = self._addresses(prepared, inputs, kept)
            replayed = self._launch(prepared, addresses)
            # The device computes meanwhile: what the caller gets, and memory for the next call.
            outputs = {
                slot.tensor.name: self._device_array(slot, kept[slot.tensor.name])
                for slot in prepared.outputs
                if slot.tensor.name in kept
            }
            if keep:
                self._spare = (prepared, self._allocate(prepared))
            else:
                self._fetch(prepared)
            check(self._cuda.wait(self.stream.handle))
        except BaseException:
            self._recover(prepared)
            raise
        if len(outputs) < len(prepared.outputs):
            for slot in prepared.outputs:
                outputs.setdefault(slot.tensor.name, slot.view.copy())
        if not replayed:
            self._remember(prepared, addresses)
        return outputs

    def bind(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Callable[[], object] | None:
        """A function that runs from and into these buffers, which the lane serves alone from now
        on; None where it cannot.
        """
        prepared = self._prepare(inputs)
        device = {n: b for n, b in {**inputs, **outputs}.items() if isinstance(b, DeviceArray)}
        on_host = self._shape_inputs or any(slot.tensor.on_host for slot in prepared.outputs)
        if prepared.open_outputs or on_host or any(b.pointer % ALIGNMENT for b in device.values()):
            return None
        places = [*prepared.inputs, *prepared.outputs]
        addresses = tuple(
            device[slot.tensor.name].pointer if slot.tensor.name in device else slot.pointer
            for slot in places
        )
        staged = [slot for slot in prepared.inputs if slot.tensor.name not in device]
        fetched = [slot for slot in prepared.outputs if slot.tensor.name not in device]
        back = [(outputs[slot.tensor.name], slot.view) for slot in fetched]
        stream, handle, wait = self.stream, self.stream.handle, self._cuda.wait
        record, stream_waits = self._cuda.record, self._cuda.stream_waits
        fence, legacy, waits = self._fence.handle, self._cuda.legacy, bool(device)

        def launch() -> None:
            self._launch(prepared, addresses)

        def step() -> None:
            try:
                for slot in staged:
                    upload_one(self._into, slot, inputs[slot.tensor.name], stream)
                if waits:
                    record(fence, legacy)
                    stream_waits(handle, fence, 0)
                launch()
                for slot in fetched:
                    self._back.copy(slot.offset, slot.nbytes, stream)
                status = wait(handle)
                if int(status[0]):
                    check(status)
            except BaseException:
                self._recover(prepared)
                raise
            for buffer, view in back:
                buffer[...] = view

        step()
        prepared.ran = True
        if self._runtime.captures and not self._unit.is_shared:
            # No other shape and no other lane will ever come to this context.
            graph = self._capture(prepared, addresses)
            if graph is not None:

                def launch() -> None:
                    graph.launch(stream)

        return step

    def profile(self, inputs: Mapping[str, Any]) -> list[tuple[str, float]]:
        """Median seconds of each layer, in the order in which they run. The unit is a plain one."""
        trt = self._runtime.library.module
        times: dict[str, list[float]] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, name: str, milliseconds: float) -> None:
                times.setdefault(name, []).append(milliseconds / 1000)

        for _ in range(3):
            self.run(inputs)
        prepared, profiler = self._prepare(inputs), Profiler()
        prepared.context.native.profiler = profiler
        for _ in range(PROFILE_RUNS):
            with self._runtime.still():
                self._enqueue(prepared, prepared.staged)
            self.stream.synchronize()
        return [(name, statistics.median(values)) for name, values in times.items()]

    def seconds(self, inputs: Mapping[str, Any], runs: int) -> float:
        """Median device time of one run, by CUDA events; inputs are sent once, before."""
        for _ in range(max(3, runs // 4)):
            self.run(inputs)
        prepared = self._prepare(inputs)
        start, stop = self._cuda.event(timing=True), self._cuda.event(timing=True)
        times = []
        for _ in range(runs):
            start.record(self.stream.handle)
            self._launch(prepared, prepared.staged)
            stop.record(self.stream.handle)
            times.append(stop.seconds_since(start))
        return statistics.median(times)

    def close(self) -> None:
        """Frees the lane's memory, once its work is done."""
        with contextlib.suppress(Exception):
            self.stream.synchronize()
        self._unit.leave(self.stream)
        self._spare = None
        with self._runtime.still():
            self._prepared.clear()
        for part in (self._into, self._back, self._fence, self.stream):
            part.close()

    # Preparing

    def _prepare(self, inputs: Mapping[str, Any]) -> Prepared:
        key: object
        if self._shape_inputs:
            key = (
                tuple(inputs[name].shape for name in self._names),
                tuple(_on_host(inputs[name]).tobytes() for name in self._shape_inputs),
            )
        elif len(self._names) == 1:
            key = inputs[self._names[0]].shape
        else:
            key = tuple([inputs[name].shape for name in self._names])
        prepared = self._prepared.get(key)
        if prepared is None:
            with self._runtime.still():
                if len(self._prepared) >= SHAPES:
                    self._prepared.clear()
                prepared = self._new_prepared(inputs, key)
            self._prepared[key] = prepared
        return prepared

    def _new_prepared(self, inputs: Mapping[str, Any], key: object) -> Prepared:
        runtime = self._runtime
        shapes: dict[str, Shape] = {name: tuple(inputs[name].shape) for name in self._names}
        # Copies: TensorRT reads them with every call, and the caller's may have changed by then.
        values = {name: np.array(_on_host(inputs[name]), order="C") for name in self._shape_inputs}
        profile = runtime.choose(shapes, values)
        alone = runtime.captures_ranges and not values
        context, capturable = self._unit.context(profile, self.stream, alone=alone)
        self._unit.settle()  # it may still compute, for other shapes
        native, context.key = context.native, None
        with runtime.library.capture() as messages:
            for name, shape in shapes.items():
                if not native.set_input_shape(name, shape):
                    raise runtime.refused(shapes, messages)
            for name, value in values.items():
                context.place(name, value.ctypes.data, anew=True)
            missing = native.infer_shapes()
        if missing:
            raise runtime.refused(shapes, messages)
        taken = [t for t in runtime.tensors if t.is_input and not t.on_host]
        given = [t for t in runtime.tensors if not t.is_input]
        found = {t.name: tuple(native.get_tensor_shape(t.name)) for t in given}
        open_outputs = tuple(tensor for tensor in given if min(found[tensor.name], default=0) < 0)
        inputs_, in_bytes = slots_for(taken, shapes)
        outputs, out_bytes = slots_for([t for t in given if t not in open_outputs], found)
        try:
            moved = self._into.reserve(in_bytes, self.stream)
            moved = self._back.reserve(out_bytes, self.stream) or moved
        except BaseException:
            self._forget()  # it may be freed without having come back
            raise
        if moved:
            self._forget()
        self._into.lay_out(inputs_)
        self._back.lay_out(outputs)
        on_host = any(slot.tensor.on_host for slot in outputs)
        return Prepared(
            key,
            context,
            shapes,
            values,
            inputs_,
            outputs,
            in_bytes,
            out_bytes,
            open_outputs,
            profile,
            capturable and runtime.captures and not (values or open_outputs or on_host),
            tuple(slot.pointer for slot in (*inputs_, *outputs)),
        )

    def _forget(self) -> None:
        """Voids all that was laid out in the staging memory."""
        self._prepared.clear()
        self._spare = None

    # Steps on the stream

    def _launch(self, prepared: Prepared, addresses: Addresses) -> bool:
        """Brings a call's computing to the stream. Says whether it was replayed from a graph."""
        unit, stream = self._unit, self.stream
        with self._turn(prepared):
            unit.order(stream)
            graph = None
            if prepared.moves == unit.moves:
                graph = prepared.graphs.get(addresses)
            if graph is not None:
                graph.launch(stream)
                return True
            self._enqueue(prepared, addresses)
        return False

    def _turn(self, prepared: Prepared) -> AbstractContextManager[object]:
        """The unit for this call alone; all of the engine's where kernels may be compiled."""
        return self._unit.lock if prepared.ran else self._runtime.still()

    def _activate(self, prepared: Prepared) -> None:
        """Readies the unit for these shapes, and drops graphs of where its memory was before."""
        self._unit.activate(prepared)
        if prepared.moves != self._unit.moves:
            prepared.graphs.clear()
            prepared.moves = self._unit.moves

    def _enqueue(self, prepared: Prepared, addresses: Addresses) -> None:
        context = prepared.context
        self._activate(prepared)
        for slot, pointer in zip((*prepared.inputs, *prepared.outputs), addresses, strict=True):
            context.place(slot.tensor.name, pointer)
        if not context.native.execute_async_v3(self.stream.number):
            raise RuntimeError("TensorRT did not enqueue the network; its log says why")

    def _remember(self, prepared: Prepared, addresses: Addresses) -> None:
        """Captures what came from and went to the same places before."""
        if not prepared.ran:
            prepared.ran = True
            self._runtime.ran_first()
        if not prepared.capturable:
            return
        if addresses not in prepared.seen:
            if len(prepared.seen) >= 4 * GRAPHS:
                prepared.seen.clear()
            prepared.seen.add(addresses)
            return
        graph = self._capture(prepared, addresses)
        if graph is not None:
            if len(prepared.graphs) >= GRAPHS:
                prepared.graphs.pop(next(iter(prepared.graphs)))
            prepared.graphs[addresses] = graph

    def _capture(self, prepared: Prepared, addresses: Addresses) -> Graph | None:
        """The computing of one call as a graph; None where it cannot be one."""
        with self._unit.lock:
            if self._refusals >= 3:
                return None
            try:
                # Before the capture, in which nothing may be allocated or waited for.
                self._unit.order(self.stream)
                self._activate(prepared)
                ask = getattr(prepared.context.native, "is_stream_capturable", None)
                if ask is not None and not ask(self.stream.number):
                    return None
                return Graph(self._cuda, self.stream, lambda: self._enqueue(prepared, addresses))
            except Exception as error:  # noqa: BLE001 - what cannot be captured runs uncaptured
                log.info("not captured into a CUDA graph: %s", error)
                self._refusals += 1
                self._recover(prepared)
                return None
            except BaseException:
                self._recover(prepared)
                raise

    def _fetch(self, prepared: Prepared) -> None:
        if not any(slot.tensor.on_host for slot in prepared.outputs):
            self._back.copy(0, prepared.out_bytes, self.stream)
            return
        for slot in prepared.outputs:  # what TensorRT wrote on the host is there already
            if not slot.tensor.on_host:
                self._back.copy(slot.offset, slot.nbytes, self.stream)

    def _recover(self, prepared: Prepared) -> None:
        """After a failure: nothing of this call is still running, nothing of it is trusted."""
        with contextlib.suppress(Exception):
            self.stream.synchronize()
        with self._unit.lock:
            prepared.context.distrust()

    # Arrays on the device

    def _addresses(
        self, prepared: Prepared, inputs: Mapping[str, Any], kept: Mapping[str, PoolMemory]
    ) -> Addresses:
        """Where the call reads and writes: in place where it can be, else in the staging memory,
        into which it is copied here.
        """
        places = []
        waited = False
        for slot in prepared.inputs:
            value = inputs[slot.tensor.name]
            if type(value) is not DeviceArray:
                upload_one(self._into, slot, value, self.stream)
                places.append(slot.pointer)
                continue
            if not waited and (value.lent or type(value.owner) is not PoolMemory):
                # Whoever made it, or writes into it, has ordered that before the default stream.
                self._cuda.record(self._fence.handle, self._cuda.legacy)
                check(self._cuda.stream_waits(self.stream.handle, self._fence.handle, 0))
                waited = True
            if value.pointer % ALIGNMENT or not value.pointer:
                self._copy(slot, value)
                places.append(slot.pointer)
            else:
                places.append(value.pointer)
        for slot in prepared.outputs:
            memory = kept.get(slot.tensor.name)
            places.append(slot.pointer if memory is None else memory.pointer)
        return tuple(places)

    def _copy(self, slot: Slot, value: DeviceArray) -> None:
        if slot.nbytes:
            cuda = self._cuda
            kind, handle = cuda.on_device, self.stream.handle
            check(cuda.copy(slot.pointer, value.pointer, slot.nbytes, kind, handle))

    def _outputs_for(self, prepared: Prepared) -> dict[str, PoolMemory]:
        """Memory that the caller will own: what was laid aside during the last call, if it fits."""
        spare, self._spare = self._spare, None
        if spare is not None and spare[0] is prepared:
            return spare[1]
        return self._allocate(prepared)

    def _allocate(self, prepared: Prepared) -> dict[str, PoolMemory]:
        arrays, stream = self._runtime.arrays, self.stream
        return {
            slot.tensor.name: arrays.allocate(slot.nbytes, stream)
            for slot in prepared.outputs
            if not slot.tensor.on_host
        }

    def _device_array(self, slot: Slot, memory: PoolMemory) -> DeviceArray:
        cuda, tensor = self._cuda, slot.tensor

        def to_host() -> Any:
            array = np.empty(slot.shape, tensor.numpy_dtype)
            if array.nbytes:
                source, copy = memory.pointer, cuda.runtime.cudaMemcpy
                with cuda.current():
                    check(copy(array.ctypes.data, source, array.nbytes, cuda.to_host))
            return array

        return DeviceArray(memory.pointer, slot.shape, tensor.dtype, cuda.index, memory, to_host)

    # Outputs whose size the network decides

    def _run_open(self, prepared: Prepared, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A run where TensorRT asks for output memory while it computes."""
        native = prepared.context.native
        make = allocator_type(self._runtime.library.module)
        allocators = {tensor.name: make(self._cuda) for tensor in prepared.open_outputs}
        try:
            addresses = self._addresses(prepared, inputs, {})
            with self._turn(prepared):
                self._unit.order(self.stream)
                try:
                    for name, allocator in allocators.items():
                        if not native.set_output_allocator(name, allocator):
                            raise RuntimeError(f"TensorRT did not take an allocator for {name!r}")
                    self._enqueue(prepared, addresses)
                    self._fetch(prepared)
                    self.stream.synchronize()
                finally:
                    for name in allocators:
                        native.set_output_allocator(name, None)
            prepared.ran = True
            outputs = {slot.tensor.name: slot.view.copy() for slot in prepared.outputs}
            for tensor in prepared.open_outputs:
                outputs[tensor.name] = allocators[tensor.name].fetch(tensor)
        except BaseException:
            self._recover(prepared)
            raise
        return {name: outputs[name] for name in self._runtime.output_names}


def _on_host(value: Any) -> Any:
    """A shape input, which TensorRT reads on the CPU."""
    return value.numpy() if isinstance(value, DeviceArray) else np.asarray(value)
