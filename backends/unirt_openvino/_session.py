"""Running a compiled model: one infer request a lane, its memory and the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unirt import (
    EngineReport,
    InputError,
    Pool,
    Session,
)
from unirt_openvino import _layers
from unirt_openvino._library import import_openvino
from unirt_openvino._ports import LENT_FROM_BYTES, PACKED, Array, Port

LIMITS = {
    "int64": (-(2**31), 2**31 - 1),
    "uint64": (0, 2**31 - 1),
    "uint32": (0, 2**31 - 1),
}


class OpenVINOSession(Session):
    """Calls take an infer request from a pool: one of them serves one thread at a time."""

    concurrent = True

    def __init__(
        self,
        compiled: Any,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        requests: int,
        counting: Callable[[], tuple[Any, EngineReport]],
    ) -> None:
        def new_lane() -> _Lane:
            return _Lane(compiled.create_infer_request(), inputs, outputs)

        # Not a method: a pool that knew its session would keep a dropped one until the next
        # collection of cycles.
        self._new_lane = new_lane
        self._pool = Pool(new_lane, requests)
        self._pool.give(self._pool.take())  # a device that cannot make one says so now
        self.lanes = requests
        self._counting, self._ports = counting, (inputs, outputs)

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        pool, lane = self._pool, None
        try:
            lane = pool.take()
            return lane.run(inputs)
        finally:
            if lane is not None:
                pool.give(lane)

    def _bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Callable[[], object]:
        return self._new_lane().bound(inputs, outputs)

    def _profile(self, inputs: Mapping[str, Any]) -> EngineReport:
        compiled, report = self._counting()
        request = compiled.create_infer_request()
        lane = _Lane(request, *self._ports)
        times = _layers.measure(lambda: lane.run(inputs), lambda: request.profiling_info)
        return report.with_times(times.items())

    def _close(self) -> None:
        self._pool.drain()
        del self._pool, self._new_lane, self._counting


class _Lane:
    """One infer request with input memory of its own."""

    def __init__(self, request: Any, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
        openvino = import_openvino()
        self._request = request
        self._outputs = outputs
        # The Python wrapper above it dispatches on types for three times as long as this takes.
        # Its arguments: inputs, share_outputs, decode_strings; names cost another microsecond.
        self._infer: Any = super(openvino.InferRequest, request).infer  # type: ignore[misc]
        self._slots = [_SLOTS.get(port.spec.dtype, _Slot)(request, port) for port in inputs]
        self._names = [port.name for port in outputs]
        self._direct = [port.index for port in outputs] == [*range(len(request.model_outputs))]
        self._direct &= all(port.plain and port.dtype.isbuiltin == 1 for port in outputs)
        # Strings cannot be viewed, and a warning says so at every call.
        self._viewable = all(port.spec.dtype != "string" for port in outputs)
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
            views = self._infer({}, self._viewable, True).values()
            values = [fresh[i] if i in fresh else view.copy() for i, view in enumerate(views)]
            return self._taken(values)
        finally:
            for port, own in self._large:
                self._request.set_output_tensor(port.index, own)

    def _taken(self, values: Sequence[Array]) -> dict[str, Array]:
        return {port.name: self._take(port, values[port.index]) for port in self._outputs}

    def _take(self, port: Port, value: Array) -> Array:
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
            views = list(infer({}, self._viewable, True).values())
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
    """One input of one infer request, with memory of its own."""

    def __init__(self, request: Any, port: Port) -> None:
        self.name = port.name
        self._request, self._port = request, port
        self._limits = LIMITS.get(port.spec.dtype)
        self._shape: tuple[int, ...] | None = None
        if port.shape is not None:
            self._adopt(request.get_input_tensor(port.index), port.shape)

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
            self._renew(array.shape)
        self._view[...] = array

    def lendable(self, array: Array) -> bool:
        # OpenVINO takes no read-only memory, although it would not write into it.
        return self._limits is None and array.flags.carray

    def lend(self, array: Array) -> None:
        self._request.set_input_tensor(self._port.index, _tensor(array, self._port))

    def restore(self) -> None:
        """Takes a lent array's memory out again."""
        if self._shape is None:
            least = self._request.model_inputs[self._port.index].get_partial_shape()
            self._renew(tuple(least.get_min_shape()))
        else:
            self._request.set_input_tensor(self._port.index, self._own)

    def _renew(self, shape: tuple[int, ...]) -> None:
        # Never by resizing: that writes beyond, and frees, memory that was lent.
        self._shape = None  # a Ctrl-C may come at any line below: then it is renewed again
        openvino = import_openvino()
        own = openvino.Tensor(self._port.element, openvino.Shape(shape))
        self._request.set_input_tensor(self._port.index, own)
        self._adopt(own, shape)

    def _adopt(self, own: Any, shape: tuple[int, ...]) -> None:
        self._own, self._view = own, self._see(own)
        self._shape = shape

    def _see(self, own: Any) -> Any:
        return own.data.view(self._port.dtype)


class _PackedSlot(_Slot):
    def copy(self, array: Array) -> None:
        if array.shape != self._shape:
            self._renew(array.shape)
        self._view[...] = _packed(array)

    def lendable(self, array: Array) -> bool:
        return False

    def _see(self, own: Any) -> Any:
        return own.data.view(np.uint8).reshape(-1)


class _TextSlot(_Slot):
    def copy(self, array: Array) -> None:
        openvino = import_openvino()
        own = openvino.Tensor(np.ascontiguousarray(array.astype("U")).reshape(array.shape))
        self._request.set_input_tensor(self._port.index, own)

    def lendable(self, array: Array) -> bool:
        return False

    def _see(self, own: Any) -> Any:
        return None


_SLOTS: dict[str, type[_Slot]] = {"string": _TextSlot, **dict.fromkeys(PACKED, _PackedSlot)}


def _tensor(array: Array, port: Port) -> Any:
    """A tensor over the array's memory. It does not keep the array alive."""
    openvino = import_openvino()
    if port.dtype.isbuiltin != 1:  # NumPy has no number for the types of ml_dtypes
        array = array.view(f"uint{8 * port.dtype.itemsize}")
    return openvino.Tensor(array, openvino.Shape(array.shape), port.element)


def _check_range(array: Array, port: Port, limits: tuple[int, int]) -> None:
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
