"""Units: execution contexts and the memory they compute in."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unirt_tensorrt._cuda import ALIGNMENT, DeviceMemory, Event, Graph, Stream, aligned, check
from unirt_tensorrt._runtime import Runtime
from unirt_tensorrt._staging import Shape, Slot, Tensor

Addresses = tuple[int, ...]

OWN_CONTEXTS = 8
"""Sets of shapes within a range that get a context of their own, to be captured in."""


class Context:
    """An execution context fixed to one profile, and what it was last told."""

    def __init__(self, runtime: Runtime, profile: int, stream: Stream, plain: bool) -> None:
        self.native = runtime.new_context(plain=plain)
        self.key: object = None
        self.needs = 0
        """Bytes of scratch memory for the shapes it has."""
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        if profile and not self.native.set_optimization_profile_async(profile, stream.number):
            raise RuntimeError(f"TensorRT did not switch to profile {profile}")
        stream.synchronize()

    def place(self, name: str, pointer: int, *, anew: bool = False) -> None:
        """Has the engine find a tensor at `pointer`; `anew` where its content is another."""
        if anew or self._addresses.get(name) != pointer:
            if not self.native.set_tensor_address(name, pointer):
                raise RuntimeError(f"TensorRT did not take the address of {name!r}")
            self._addresses[name] = pointer

    def compute_in(self, memory: DeviceMemory, *, anew: bool) -> None:
        """Has the engine compute there; `anew` where it has to be told again."""
        place = (memory.pointer, memory.size)
        if anew or self._scratch != place:
            self.native.set_device_memory(*place)
            self._scratch = place

    def distrust(self) -> None:
        """Has everything told again: a call broke off somewhere."""
        self.key = None
        self._addresses.clear()


@dataclass(eq=False)
class Prepared:
    """A lane's plan for one set of input shapes. Dies when the lane's staging memory moves.

    `staged` are the addresses of the staging memory, inputs first; `graphs` replay a call from and
    into the addresses that they are kept by, and are void once the unit's memory moved.
    """

    key: object
    context: Context
    shapes: Mapping[str, Shape]
    values: Mapping[str, Any]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    in_bytes: int
    out_bytes: int
    open_outputs: tuple[Tensor, ...]
    profile: int
    capturable: bool
    staged: Addresses = ()
    graphs: dict[Addresses, Graph] = field(default_factory=dict)
    seen: set[Addresses] = field(default_factory=set)
    moves: int = 0
    ran: bool = False


class Unit:
    """What computes: contexts, and one piece of scratch memory for all of them.

    Several lanes may use one unit: whoever holds `lock` and has called `order` may enqueue, and the
    device does the work in that order. So the copies of one call overlap the computing of another.
    """

    def __init__(self, runtime: Runtime, *, plain: bool = False, shared: bool = False) -> None:
        self._runtime, self._plain, self.is_shared = runtime, plain, shared
        self.lock = runtime.unit_lock()
        self.moves = 0
        """How often the scratch memory has moved."""
        self._contexts: dict[int, Context] = {}
        self._own: weakref.WeakSet[Context] = weakref.WeakSet()
        self._memory: DeviceMemory | None = None
        self._last: Stream | None = None
        self._before: Stream | None = None
        self._fence: Event | None = None

    def order(self, stream: Stream) -> None:
        """What `stream` is given from now on runs after all that was enqueued before."""
        last = self._last
        if last is not stream:
            self._before = last
            if last is not None:
                cuda = self._runtime.cuda
                if self._fence is None:
                    self._fence = cuda.event()
                self._fence.record(last.handle)
                check(cuda.stream_waits(stream.handle, self._fence.handle, 0))
            self._last = stream

    def settle(self) -> None:
        """Waits for all that was enqueued."""
        if self._last is not None:
            self._last.synchronize()  # which comes after the streams before it

    def leave(self, stream: Stream) -> None:
        """The stream, which has nothing left to do, will not come again."""
        with self.lock:
            if self._last is stream:
                self._last = None
            if self._before is stream:
                self._before = None

    def context(self, profile: int, stream: Stream, *, alone: bool) -> tuple[Context, bool]:
        """A context of this profile, and whether its work may be captured: a graph is good only as
        long as its context meets no other shapes. `alone` asks for one of its own within a range.
        """
        static = self._runtime.is_static(profile)
        if alone and not static and len(self._own) < OWN_CONTEXTS:
            own = Context(self._runtime, profile, stream, self._plain)
            self._own.add(own)
            return own, True
        if profile not in self._contexts:
            self._contexts[profile] = Context(self._runtime, profile, stream, self._plain)
        return self._contexts[profile], static

    def activate(self, prepared: Prepared) -> None:
        """Readies the context for these shapes. Raises InputError if it does not take them."""
        context = prepared.context
        changed = context.key != prepared.key
        if changed:
            context.key = None
            if self._before is not None:
                self._before.synchronize()  # it may still compute, for other shapes
            for name, shape in prepared.shapes.items():
                if not context.native.set_input_shape(name, shape):
                    raise self._runtime.refused(prepared.shapes, [])
        for name, value in prepared.values.items():
            context.place(name, value.ctypes.data, anew=changed)
        if changed:
            # Asking also lays the memory out for these shapes: needed each time they change.
            context.needs = self._runtime.scratch_size(context.native, prepared.profile)
        # Also where nothing changed: growing it for others may have failed, after it was freed.
        memory = self._memory
        if memory is None or memory.size < context.needs:
            self.moves += 1
            self._memory = None
            if memory is not None:
                memory.close()  # waits for the device
            room = max(aligned(context.needs), ALIGNMENT)
            memory = self._memory = DeviceMemory(self._runtime.cuda, room)
        context.compute_in(memory, anew=changed)
        context.key = prepared.key

    def close(self) -> None:
        with self._runtime.still():
            self._contexts.clear()
        for part in (self._memory, self._fence):
            if part is not None:
                part.close()
