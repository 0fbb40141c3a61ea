"""Staging: pinned host memory and its twin on the device, through which host arrays come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from unirt_tensorrt._cuda import Cuda, DeviceMemory, PinnedMemory, Stream, aligned, check

Shape = tuple[int, ...]

CHUNK = 4 << 20
"""Bytes of one input that are copied while the bytes before travel."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine. `on_host` ones hold shapes, which TensorRT reads and writes
    on the CPU.
    """

    name: str
    is_input: bool
    dtype: str
    numpy_dtype: np.dtype[Any]
    on_host: bool


@dataclass
class Slot:
    """Where a tensor of known shape lies: `view` in the pinned memory, `pointer` on the device, or
    on the host for a tensor that stays there.
    """

    tensor: Tensor
    shape: Shape
    offset: int
    nbytes: int
    view: Any = None
    pointer: int = 0


class Buffer:
    """One direction: a stretch of pinned memory and as much on the device, at equal offsets."""

    def __init__(self, cuda: Cuda, *, to_device: bool) -> None:
        self._cuda = cuda
        self._kind = cuda.to_device if to_device else cuda.to_host
        self._to_device = to_device
        self._pinned: PinnedMemory | None = None
        self._device: DeviceMemory | None = None

    def reserve(self, size: int, stream: Stream) -> bool:
        """Room for so many bytes. Says whether the memory moved, which voids all slots."""
        if self._pinned is not None and self._pinned.size >= size:
            return False
        moved = self._pinned is not None
        if moved:
            stream.synchronize()
            self.close()
        # Half as much again: a stream of slowly growing inputs does not move it each time.
        room = aligned(max(size + size // 2 if moved else size, 1))
        self._pinned, self._device = PinnedMemory(self._cuda, room), DeviceMemory(self._cuda, room)
        return moved

    def lay_out(self, slots: Sequence[Slot]) -> None:
        assert self._pinned is not None
        assert self._device is not None
        for slot in slots:
            tensor = slot.tensor
            slot.view = self._pinned.view(slot.offset, tensor.numpy_dtype, slot.shape)
            base = self._pinned if tensor.on_host else self._device
            slot.pointer = base.pointer + slot.offset

    def copy(self, offset: int, size: int, stream: Stream) -> None:
        """Has the stream move these bytes in this buffer's direction."""
        if not size:
            return
        assert self._pinned is not None
        assert self._device is not None
        there, here = self._device.pointer + offset, self._pinned.pointer + offset
        if not self._to_device:
            there, here = here, there
        check(self._cuda.copy(there, here, size, self._kind, stream.handle))

    def close(self) -> None:
        for memory in (self._pinned, self._device):
            if memory is not None:
                memory.close()
        self._pinned = self._device = None


def slots_for(
    tensors: Sequence[Tensor], shapes: Mapping[str, Shape]
) -> tuple[tuple[Slot, ...], int]:
    """Slots one behind the other, and the bytes of all."""
    slots, end = [], 0
    for tensor in tensors:
        size = prod(shapes[tensor.name]) * int(tensor.numpy_dtype.itemsize)
        slots.append(Slot(tensor, shapes[tensor.name], end, size))
        end += aligned(max(size, 1))
    return tuple(slots), end


def upload(
    buffer: Buffer, slots: Sequence[Slot], total: int, arrays: Mapping[str, Any], stream: Stream
) -> None:
    """Host arrays to the device: small ones in one transfer, large ones piece by piece."""
    if total <= CHUNK:
        for slot in slots:
            np.copyto(slot.view, arrays[slot.tensor.name], casting="no")
        buffer.copy(0, total, stream)
        return
    for slot in slots:
        upload_one(buffer, slot, arrays[slot.tensor.name], stream)


def upload_one(buffer: Buffer, slot: Slot, array: Any, stream: Stream) -> None:
    if slot.nbytes <= CHUNK or not array.flags.c_contiguous:
        np.copyto(slot.view, array, casting="no")
        buffer.copy(slot.offset, slot.nbytes, stream)
        return
    flat, target, itemsize = array.reshape(-1), slot.view.reshape(-1), array.dtype.itemsize
    step = CHUNK // itemsize
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        np.copyto(target[start : start + step], part, casting="no")
        buffer.copy(slot.offset + start * itemsize, part.nbytes, stream)


_ALLOCATORS: dict[str, Any] = {}


def allocator_type(trt: Any) -> Any:
    """A class of output allocators: TensorRT says while it computes how large an output is."""
    if trt.__name__ in _ALLOCATORS:
        return _ALLOCATORS[trt.__name__]

    class OutputAllocator(trt.IOutputAllocator):  # type: ignore[misc] # the library's own base
        def __init__(self, cuda: Cuda) -> None:
            trt.IOutputAllocator.__init__(self)
            self._cuda = cuda
            self._memory: DeviceMemory | None = None
            self._shape: Shape = ()

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            if self._memory is None or self._memory.size < size:
                if self._memory is not None:
                    self._memory.close()
                self._memory = DeviceMemory(self._cuda, aligned(max(size, 1)))
            return self._memory.pointer

        def reallocate_output_async(
            self, name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, name: str, shape: Any) -> None:
            self._shape = tuple(shape)

        def fetch(self, tensor: Tensor) -> Any:
            """The output as a new host array; the stream has been waited for."""
            array = np.empty(self._shape, tensor.numpy_dtype)
            if array.nbytes and self._memory is not None:
                runtime, pointer = self._cuda.runtime, self._memory.pointer
                check(
                    runtime.cudaMemcpy(array.ctypes.data, pointer, array.nbytes, self._cuda.to_host)
                )
            return array

    _ALLOCATORS[trt.__name__] = OutputAllocator
    return OutputAllocator
