"""CUDA as the sessions need it: streams, events, pinned and device memory, captured graphs.

A thin layer over cuda-bindings. Everything here belongs to one device; the caller makes it current.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

LEGACY_STREAM = 1
"""CUDA's default stream: what producers of device arrays order their work before."""

ALIGNMENT = 256
"""What TensorRT asks of scratch memory and cudaMalloc gives."""


_UNSWITCHED = contextlib.nullcontext()


class CudaError(RuntimeError):
    """A CUDA call failed; the text holds CUDA's own name and words for it."""


def _runtime() -> Any:
    from cuda.bindings import runtime

    return runtime


def check(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-bindings call. Raises CudaError unless it succeeded."""
    status = result[0]
    if int(status) != 0:
        runtime = _runtime()
        with contextlib.suppress(Exception):
            text = runtime.cudaGetErrorString(status)[1].decode()
            raise CudaError(f"{status.name}: {text}")
        raise CudaError(str(status))
    if len(result) == 2:
        return result[1]
    return result[1:] if len(result) > 2 else None


def aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def free_memory() -> tuple[int, int]:
    """Free and total bytes of the current device."""
    free, total = check(_runtime().cudaMemGetInfo())
    return int(free), int(total)


class Cuda:
    """The calls of one device, looked up once: a tight loop cannot afford it each time."""

    def __init__(self, index: int) -> None:
        runtime = _runtime()
        self.index = index
        self.runtime = runtime
        self.to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.on_device = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.copy = runtime.cudaMemcpyAsync
        self.wait = runtime.cudaStreamSynchronize
        self.record = runtime.cudaEventRecord
        self.stream_waits = runtime.cudaStreamWaitEvent
        self.legacy = runtime.cudaStream_t(LEGACY_STREAM)
        count = check(runtime.cudaGetDeviceCount())
        self.several = int(count) > 1
        with self.current():
            # Makes the context, so that a later failure is no surprise.
            check(runtime.cudaFree(0))

    def use(self) -> None:
        """Makes the device current for this thread."""
        check(self.runtime.cudaSetDevice(self.index))

    def current(self) -> AbstractContextManager[None]:
        """Makes it so for a moment: threads are the caller's, and so is what they have current."""
        return self._switched() if self.several else _UNSWITCHED

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        before = int(check(self.runtime.cudaGetDevice()))
        if before == self.index:
            yield
            return
        self.use()
        try:
            yield
        finally:
            self.runtime.cudaSetDevice(before)

    def device_of(self, pointer: int) -> int:
        """The device whose memory an address is in; -1 for what CUDA does not know."""
        status, found = self.runtime.cudaPointerGetAttributes(pointer)
        return -1 if int(status) else int(found.device)

    def stream(self) -> Stream:
        return Stream(self)

    def event(self, *, timing: bool = False) -> Event:
        return Event(self, timing)

    def pool(self) -> MemoryPool:
        return MemoryPool(self)


class _Handle:
    """A CUDA object and how it dies; it dies once, at the latest with its Python object."""

    def __init__(self, handle: Any, destroy: Callable[..., Any], *arguments: Any) -> None:
        self.handle = handle
        self._finish = weakref.finalize(self, _quietly, destroy, *(arguments or (handle,)))
        # At exit the driver frees everything, and may be gone already.
        self._finish.atexit = False

    def close(self) -> None:
        self._finish()


def _quietly(destroy: Callable[..., Any], *arguments: Any) -> None:
    destroy(*arguments)


class Stream(_Handle):
    """A stream that does not wait for the default one."""

    def __init__(self, cuda: Cuda) -> None:
        runtime = cuda.runtime
        handle = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        super().__init__(handle, runtime.cudaStreamDestroy)
        self._cuda = cuda
        self.number = int(handle)

    def synchronize(self) -> None:
        check(self._cuda.wait(self.handle))


class Event(_Handle):
    def __init__(self, cuda: Cuda, timing: bool) -> None:
        runtime = cuda.runtime
        flags = 0 if timing else runtime.cudaEventDisableTiming
        handle = check(runtime.cudaEventCreateWithFlags(flags))
        super().__init__(handle, runtime.cudaEventDestroy)
        self._cuda = cuda

    def record(self, stream: Any) -> None:
        check(self._cuda.record(self.handle, stream))

    def seconds_since(self, earlier: Event) -> float:
        """Time between two recorded events; waits for this one."""
        check(self._cuda.runtime.cudaEventSynchronize(self.handle))
        milliseconds = check(self._cuda.runtime.cudaEventElapsedTime(earlier.handle, self.handle))
        return float(milliseconds) / 1000


class PinnedMemory(_Handle):
    """Host memory that copies to and from the device go through without waiting."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        pointer = int(check(cuda.runtime.cudaHostAlloc(max(size, 1), 0)))
        super().__init__(pointer, cuda.runtime.cudaFreeHost)
        self.pointer, self.size = pointer, size

    def view(self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        """A NumPy array over a part of it; it must not outlive this object."""
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if count == 0:
            return np.empty(shape, dtype)
        raw: Any = (ctypes.c_uint8 * count).from_address(self.pointer + offset)
        return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


class DeviceMemory(_Handle):
    """Device memory of a fixed size, aligned for TensorRT."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        pointer = int(check(cuda.runtime.cudaMalloc(max(size, 1))))
        super().__init__(pointer, cuda.runtime.cudaFree)
        self.pointer, self.size = pointer, size


class MemoryPool:
    """Device memory for arrays that callers keep: cheap to take and to give back in stream order.

    It keeps what is given back, for the next, until it is closed. Arrays may outlive that: the pool
    itself goes with the last of them, since the driver crashes where a pool is destroyed first.
    """

    def __init__(self, cuda: Cuda) -> None:
        from cuda.bindings import driver

        runtime = cuda.runtime
        properties = runtime.cudaMemPoolProps()
        properties.allocType = runtime.cudaMemAllocationType.cudaMemAllocationTypePinned
        properties.location.type = runtime.cudaMemLocationType.cudaMemLocationTypeDevice
        properties.location.id = cuda.index
        self.cuda, self.handle = cuda, check(runtime.cudaMemPoolCreate(properties))
        threshold = runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        everything = driver.cuuint64_t(2**64 - 1)
        check(runtime.cudaMemPoolSetAttribute(self.handle, threshold, everything))
        self._lock = threading.RLock()
        self._out = 0
        self._returned: deque[int] = deque()
        self._closed = False

    def allocate(self, size: int, stream: Stream) -> PoolMemory:
        """Memory that may be used by `stream` from now on. The device is current."""
        runtime = self.cuda.runtime
        self._free_returned()
        pointer = check(runtime.cudaMallocFromPoolAsync(max(size, 1), self.handle, stream.handle))
        with self._lock:
            self._out += 1
        return PoolMemory(self, int(pointer), size)

    def take_back(self, pointer: int, readers: set[int] | None) -> None:
        """Has it freed once the default stream and these streams have reached this point."""
        runtime = self.cuda.runtime
        if readers:
            with self.cuda.current():
                for stream in readers:
                    event = self.cuda.event()
                    if int(runtime.cudaEventRecord(event.handle, stream)[0]):
                        runtime.cudaDeviceSynchronize()  # that stream is gone; its work may not be
                    else:
                        runtime.cudaStreamWaitEvent(self.cuda.legacy, event.handle, 0)
        with self._lock:
            self._out -= 1
            # The next call frees it while the device computes: here somebody waits for Python.
            self._returned.append(pointer)
            if self._closed:
                with self.cuda.current():
                    self._free_returned()
                if not self._out:
                    self._destroy()

    def _free_returned(self) -> None:
        while True:
            try:
                pointer = self._returned.popleft()
            except IndexError:
                return
            self.cuda.runtime.cudaFreeAsync(pointer, self.cuda.legacy)

    def close(self) -> None:
        """Gives back to the device what no array holds, and the rest when the arrays go."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with self.cuda.current():
                self._free_returned()
            if self._out:
                self.cuda.runtime.cudaMemPoolTrimTo(self.handle, 0)
            else:
                self._destroy()

    def _destroy(self) -> None:
        with self.cuda.current():
            self.cuda.runtime.cudaStreamSynchronize(self.cuda.legacy)
            self.cuda.runtime.cudaMemPoolDestroy(self.handle)

    def __del__(self) -> None:
        # Of an engine that nobody closed. Not weakref.finalize: among garbage it would come before
        # the arrays' own end.
        with contextlib.suppress(Exception):
            self.close()


class PoolMemory:
    """A piece of a MemoryPool. Dropping it returns the memory once the default stream, and every
    stream that was told of by `read_on`, have reached this point: their readers are done then.
    """

    __slots__ = ("_pool", "_readers", "pointer", "size")

    def __init__(self, pool: MemoryPool, pointer: int, size: int) -> None:
        self._pool, self.pointer, self.size = pool, pointer, size
        self._readers: set[int] | None = None

    def read_on(self, stream: int) -> None:
        """Somebody reads it in the order of this CUDA stream."""
        if stream > LEGACY_STREAM:
            self._readers = (self._readers or set()) | {stream}

    def __del__(self) -> None:
        # While Python shuts down, modules are half gone and the process gives all memory back.
        with contextlib.suppress(Exception):
            self._pool.take_back(self.pointer, self._readers)


class Graph(_Handle):
    """Work of a stream, captured once and launched again as a whole.

    Addresses and shapes are frozen in it; whoever changes them must capture anew.
    """

    def __init__(self, cuda: Cuda, stream: Stream, enqueue: Callable[[], None]) -> None:
        runtime = cuda.runtime
        # Relaxed would let a mistake pass; global would forbid other threads their allocations.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            check(runtime.cudaStreamBeginCapture(stream.handle, mode))
            enqueue()
            graph = check(runtime.cudaStreamEndCapture(stream.handle))
        except BaseException:
            status, graph = runtime.cudaStreamEndCapture(stream.handle)
            if not int(status):
                runtime.cudaGraphDestroy(graph)
            runtime.cudaGetLastError()  # or TensorRT takes it for its own
            raise
        try:
            executable = check(runtime.cudaGraphInstantiate(graph, 0))
        finally:
            runtime.cudaGraphDestroy(graph)
        super().__init__(executable, runtime.cudaGraphExecDestroy)
        self._launch = runtime.cudaGraphLaunch

    def launch(self, stream: Stream) -> None:
        check(self._launch(self.handle, stream.handle))
