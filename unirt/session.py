"""A running engine: run, submit, map, bind and close, written once for every backend."""

from __future__ import annotations

import abc
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, cast, final, runtime_checkable

import numpy as np

from unirt.arrays import DeviceArray, admit, describe, to_array
from unirt.errors import BackendError, BackendUnavailable, ClosedError, InputError, UnirtError
from unirt.types import Array, TensorSpec

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from unirt.backend import Engine
    from unirt.inspection import EngineReport


def closed_error(what: str, engine: Engine) -> ClosedError:
    return ClosedError(
        f"This {what} of {engine.model.name!r} on {engine.candidate} is closed.",
        "close() was called, or its `with` block ended.",
        f"Open a new one: engine.session(), or unirt.load({engine.model.name!r}).",
    )


def failed_error(
    doing: str, engine: Engine, error: BaseException, *, call: bool = True
) -> BackendError:
    """For what a vendor raised; `call` where inputs of the caller's may have caused it."""
    return BackendError(
        f"{engine.candidate} failed to {doing} {engine.model.name!r}.",
        f"{type(error).__name__}: {error}",
        "The session stays usable; check that this input suits the network, or try another "
        "candidate."
        if call
        else "Nothing else of the engine is touched by it; try again, or another candidate.",
        backend=engine.backend.name,
        device=str(engine.device),
    )


class ClosesOnExit(abc.ABC):
    """A `with` block closes it at its end."""

    @abc.abstractmethod
    def close(self) -> None: ...

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def close_once(
    first: bool, in_worker: bool, finish: Callable[[], None], done: threading.Event
) -> None:
    """The first caller finishes, the others wait. A worker can do neither, since what is to be
    finished waits for it: there a thread of its own finishes.
    """
    if in_worker:
        if first:
            threading.Thread(target=finish, name="unirt-close").start()
    elif first:
        finish()
    else:
        done.wait()


class Session(ClosesOnExit):
    """A running engine. Every public method is safe to call from many threads.

    A backend that allows `_run` from several threads at once says `concurrent = True`; otherwise
    core lets one call in at a time. `lanes` is how many calls are worth having in flight.
    """

    concurrent: ClassVar[bool] = False
    lanes: int = 1

    engine: Engine
    decision: Any = None
    """How `unirt.load` came to this engine: a `Decision`; None for a session opened by hand."""

    @abc.abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """One inference. `inputs` holds every input of the file with the right dtype and a shape
        that fits; arrays may be read-only or strided, and must not be kept. The outputs are new
        arrays that nobody else will write to.
        """

    def _close(self) -> None:
        """Free what the session holds. Called once; no `_run` is or will be running."""

    @final
    def _attach(self, engine: Engine) -> None:
        self.engine = engine
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._expected = tuple(
            (spec.name, spec.numpy_dtype if spec.kind == "tensor" else None)
            for spec in engine.inputs
        )
        self._rename_in, self._rename_out = engine._renamed_inputs, engine._renamed_outputs
        self._rename_back = {inner: name for name, inner in self._rename_out.items()}
        self._known_shapes: set[object] = set()
        self._expected_on_device = tuple((spec.name, spec.dtype) for spec in engine.inputs)
        self._known_device_shapes: set[object] = set()
        self._works_on_device = isinstance(self, SupportsDeviceArrays)
        self._gate = threading.Lock()
        self._serial = None if self.concurrent else threading.Lock()
        self._idle = threading.Event()  # only touched once closing: an Event costs more than a run
        self._done = threading.Event()
        self._worker = threading.local()
        self._in_flight = 0
        self._closed = False
        self._executor: ThreadPoolExecutor | None = None
        self._bindings: weakref.WeakSet[Binding] = weakref.WeakSet()
        self._owns_engine = False
        self._direct = self._serial is None and not self._rename_in and not self._rename_back

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @final
    def run(self, inputs: Any = None, *, device_outputs: bool = False) -> dict[str, Any]:
        """One inference: a dict of arrays in, a dict of arrays out.

        A model with one input also takes the bare array. Arrays are NumPy, or anything with
        `__dlpack__`; they are used as they are and never cast. Outputs are new arrays and belong to
        the caller. `device_outputs=True` leaves them on the engine's device, as arrays with
        `__dlpack__` and `__cuda_array_interface__`.

        Raises InputError (the session stays usable), ClosedError, or BackendError with the
        vendor's exception as cause.
        """
        plain = not device_outputs and self._fits(inputs)
        if not plain and not self._fits_on_device(inputs):
            inputs = self._admit(inputs)
        # `_enter` and `_leave`, written out: this is the one path where a microsecond counts.
        gate, entered = self._gate, False
        try:
            # Inside the `try`: a Ctrl-C between counting and trying would never be counted back.
            with gate:
                if self._closed:
                    raise closed_error("session", self.engine)
                self._in_flight += 1
                entered = True
            if plain and self._direct:
                outputs = self._run(inputs)
                return outputs if type(outputs) is dict else dict(outputs)
            return self._execute(inputs, device_outputs)
        except UnirtError:
            raise
        except Exception as error:
            raise failed_error("run", self.engine, error) from error
        finally:
            if entered:
                with gate:
                    self._in_flight -= 1
                    if self._closed and not self._in_flight:
                        self._idle.set()

    @final
    def submit(self, inputs: Any = None, *, device_outputs: bool = False) -> Future[dict[str, Any]]:
        """`run` in the background. Wrong inputs raise here; the future carries everything else.

        At most `lanes` calls run at once, in order of submission. The arrays are not copied: leave
        them unchanged until the future is done.
        """
        feed = dict(inputs) if self._fits(inputs) else self._admit(inputs)
        entered = False
        try:
            self._enter()
            entered = True
            future = self._workers().submit(self._execute_queued, feed, device_outputs)
        except BaseException as error:
            if entered:
                self._leave()
            if isinstance(error, RuntimeError) and not isinstance(error, UnirtError):
                # The interpreter is going down and starts no threads any more.
                raise closed_error("session", self.engine) from error
            raise
        future.add_done_callback(lambda _: self._leave())
        return future

    @final
    def map(
        self, stream: Iterable[Any], *, in_flight: int | None = None, device_outputs: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Outputs for a stream of inputs, in its order, with several calls in flight.

        `stream` is read lazily, at most `in_flight` items ahead (default: one more than `lanes`),
        so it may be endless; each item must stay unchanged until its output is out. An error comes
        out at its item's place and ends the stream.
        """
        self._check_open()
        depth = self.lanes + 1 if in_flight is None else in_flight
        if not isinstance(depth, int) or depth < 1:
            raise InputError(
                f"map cannot keep {depth!r} calls in flight.",
                "in_flight counts the inputs being worked on.",
                "Pass 1 or more, or leave it out.",
            )
        if not isinstance(stream, Iterable):
            raise InputError(
                f"map cannot go through {describe(stream)}.",
                "It takes an iterable of inputs.",
                "Pass a list or generator of what run takes.",
            )
        return self._map(iter(stream), depth, device_outputs)

    def _map(
        self, stream: Iterator[Any], depth: int, device_outputs: bool
    ) -> Iterator[dict[str, Any]]:
        pending: deque[Future[dict[str, Any]]] = deque()
        failure: Exception | None = None
        try:
            while True:
                try:
                    pending.append(self.submit(next(stream), device_outputs=device_outputs))
                except StopIteration:
                    break
                except Exception as error:  # noqa: BLE001 - raised below, at its own place
                    failure = error
                    break
                if len(pending) >= depth:
                    yield pending.popleft().result()
            # What came before a bad item is still owed to the caller.
            while pending:
                yield pending.popleft().result()
            if failure is not None:
                raise failure
        finally:
            for future in pending:
                future.cancel()

    @final
    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> Binding:
        """Fixed buffers for a tight loop: write `inputs`, call `binding.run()`, read `outputs`.

        Buffers are C-contiguous arrays that the caller keeps; missing outputs are allocated, with
        the shapes that one run with these inputs gives. The shapes are fixed from then on. No
        output may overlap an input or another output.
        """
        self._check_open()
        feed = self._admit(inputs)
        if not isinstance(outputs, Mapping | None):
            raise InputError(
                f"The outputs to bind are {describe(outputs)}.",
                "They are found by name.",
                "Pass a dict of arrays by output name, or leave it out.",
            )
        rare = [spec for spec in (*self.inputs, *self.outputs) if spec.kind != "tensor"]
        if rare:
            raise InputError(
                f"{rare[0].name!r} cannot be bound.",
                f"It is a {rare[0].kind}, which has no fixed buffer.",
                "Use run for this model.",
                name=rare[0].name,
            )
        given = dict(outputs or {})
        unknown = sorted(set(given) - {spec.name for spec in self.outputs})
        if unknown:
            names = ", ".join(spec.name for spec in self.outputs)
            raise InputError(
                f"The model has no output {unknown[0]!r}.",
                f"Its outputs are: {names}.",
                "Bind these, or leave outputs out to have them allocated.",
                name=unknown[0],
            )
        specs = {spec.name: spec for spec in self.outputs}
        given = {n: to_array(v, specs[n], self.engine.device.kind) for n, v in given.items()}
        for name, value in feed.items():
            _check_buffer(name, value, writable=False)
        for name, value in given.items():
            if isinstance((outputs or {})[name], np.generic):
                raise _unbindable(name, "It is a NumPy scalar")
            _check_buffer(name, value, writable=True)
            _check_apart(name, value, [*feed.items(), *given.items()])
        on_device = any(type(v) is DeviceArray for v in [*feed.values(), *given.values()])
        sample = self.run(feed, device_outputs=on_device)
        buffers: dict[str, Any] = {}
        for spec in self.outputs:
            produced = sample[spec.name]
            buffer = given.get(spec.name)
            if buffer is None:
                buffer = produced
            elif describe(buffer) != describe(produced):
                raise InputError(
                    f"The buffer for output {spec.name!r} does not fit.",
                    f"This input gives {describe(produced)}; the buffer is {describe(buffer)}.",
                    "Allocate it so, or leave it out.",
                    name=spec.name,
                )
            buffers[spec.name] = buffer
        inner_in = {self._rename_in.get(name, name): value for name, value in feed.items()}
        inner_out = {self._rename_out.get(name, name): value for name, value in buffers.items()}
        step: Callable[[], object] | None = None
        if isinstance(self, SupportsBind):
            try:
                step = self._bind(inner_in, inner_out)
            except UnirtError:
                raise
            except Exception as error:
                raise failed_error("bind buffers of", self.engine, error) from error
        step = step or self._copying_step(inner_in, inner_out)
        binding = Binding(self, feed, buffers, step)
        with self._gate:
            if self._closed:
                raise closed_error("session", self.engine)
            self._bindings.add(binding)
        return binding

    @final
    def profile(self, inputs: Any = None) -> EngineReport:
        """The engine's layers with the time of each, in seconds, measured on these inputs.

        Layers are timed one by one, so their sum is more than a whole run takes. Raises InputError,
        BackendUnavailable where the engine does not tell, ClosedError, BackendError.
        """
        if not isinstance(self, SupportsProfiling):
            raise BackendUnavailable(
                f"{self.engine.candidate} does not time its layers.",
                "This engine has no interface for it.",
                "Time whole calls: unirt compare, or unirt.compare(...).",
                backend=self.engine.backend.name,
            )
        feed = self._admit(inputs)
        if self._rename_in:
            feed = {self._rename_in[name]: value for name, value in feed.items()}
        self._enter()
        try:
            with self._serial or nullcontext():
                return self._profile(feed)
        except UnirtError:
            raise
        except Exception as error:
            raise failed_error("profile", self.engine, error) from error
        finally:
            self._leave()

    def _copying_step(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Callable[[], object]:
        serial = self._serial or nullcontext()

        def step() -> None:
            with serial:
                produced = self._run(inputs)
            for name, buffer in outputs.items():
                if produced[name].shape != buffer.shape:
                    raise ValueError(
                        f"output {name!r} is {describe(produced[name])} now, which the bound "
                        f"buffer of {describe(buffer)} cannot hold"
                    )
                np.copyto(buffer, produced[name], casting="no")

        return step

    @final
    def close(self) -> None:
        """Waits for calls in flight and queued, then frees the session. Idempotent: every caller
        waits. From a callback of its own futures it cannot wait, and is finished in the background.
        """
        with self._gate:
            first, self._closed = not self._closed, True
            if not self._in_flight:
                self._idle.set()
        close_once(first, self._in_own_worker(), self._finish, self._done)

    def _in_own_worker(self) -> bool:
        return getattr(self._worker, "is_mine", False)

    def _finish(self) -> None:
        try:
            for binding in list(self._bindings):
                binding.close()
            self._idle.wait()
            if self._executor is not None:
                self._executor.shutdown(wait=True)
            self._close()
        finally:
            self._done.set()
        if self._owns_engine:
            self.engine.close()

    def __repr__(self) -> str:
        return f"<unirt.Session {self.engine.candidate} of {self.engine.model.name!r}>"

    def _fits(self, inputs: Any) -> bool:
        """Whether these are plain arrays, in dtypes and shapes that were admitted before."""
        expected = self._expected
        if type(inputs) is not dict or len(inputs) != len(expected):
            return False
        if len(expected) == 1:
            ((name, dtype),) = expected
            value = inputs.get(name)
            return (
                type(value) is np.ndarray
                and value.dtype is dtype
                and value.shape in self._known_shapes
            )
        shapes = []
        for name, dtype in expected:
            value = inputs.get(name)
            if type(value) is not np.ndarray or value.dtype is not dtype:
                return False
            shapes.append(value.shape)
        return tuple(shapes) in self._known_shapes

    def _fits_on_device(self, inputs: Any) -> bool:
        """As `_fits`, for arrays that UniRT itself describes."""
        if not self._known_device_shapes or type(inputs) is not dict:
            return False
        expected = self._expected_on_device
        if len(inputs) != len(expected):
            return False
        shapes = []
        for name, dtype in expected:
            value = inputs.get(name)
            if type(value) is not DeviceArray or value.dtype != dtype:
                return False
            shapes.append(value.shape)
        return tuple(shapes) in self._known_device_shapes

    def _admit(self, inputs: Any) -> dict[str, Any]:
        feed = admit(inputs, self.inputs, self.engine.device.kind)
        if all(type(value) is np.ndarray for value in feed.values()):
            if len(self._known_shapes) >= 1024:
                self._known_shapes.clear()
            shapes = tuple(value.shape for value in feed.values())
            self._known_shapes.add(shapes[0] if len(shapes) == 1 else shapes)
        elif all(type(value) is DeviceArray for value in feed.values()):
            if len(self._known_device_shapes) >= 1024:
                self._known_device_shapes.clear()
            self._known_device_shapes.add(tuple(value.shape for value in feed.values()))
        return feed

    def _execute(self, feed: dict[str, Any], device_outputs: bool) -> dict[str, Any]:
        if self._rename_in:
            feed = {self._rename_in[name]: value for name, value in feed.items()}
        if device_outputs or any(type(value) is DeviceArray for value in feed.values()):
            outputs = self._run_on_device(feed, device_outputs)
        elif self._serial is None:
            outputs = self._run(feed)
        else:
            with self._serial:
                outputs = self._run(feed)
        if self._rename_back:
            return {self._rename_back[name]: value for name, value in outputs.items()}
        return outputs if type(outputs) is dict else dict(outputs)

    def _execute_queued(self, feed: dict[str, Any], device_outputs: bool) -> dict[str, Any]:
        self._worker.is_mine = True
        try:
            return self._execute(feed, device_outputs)
        except UnirtError:
            raise
        except Exception as error:
            raise failed_error("run", self.engine, error) from error

    def _run_on_device(self, feed: Mapping[str, Any], keep: bool) -> Mapping[str, Any]:
        if not self._works_on_device:
            raise InputError(
                f"{self.engine.candidate} cannot work on arrays of a device.",
                "This engine takes and gives host memory.",
                "Copy the inputs to the host and leave device_outputs out.",
            )
        runner = cast(SupportsDeviceArrays, self)
        if self._serial is None:
            return runner._run_device(feed, keep)
        with self._serial:
            return runner._run_device(feed, keep)

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error("session", self.engine)

    def _enter(self) -> None:
        with self._gate:
            if self._closed:
                raise closed_error("session", self.engine)
            self._in_flight += 1

    def _leave(self) -> None:
        with self._gate:
            self._in_flight -= 1
            if self._closed and not self._in_flight:
                self._idle.set()

    def _workers(self) -> ThreadPoolExecutor:
        from concurrent.futures import ThreadPoolExecutor

        with self._gate:
            if self._executor is None:
                name = f"unirt-{self.engine.backend.name}"
                self._executor = ThreadPoolExecutor(max(1, self.lanes), thread_name_prefix=name)
            return self._executor


def _check_buffer(name: str, value: Any, *, writable: bool) -> None:
    if isinstance(value, DeviceArray):
        return
    if not isinstance(value, np.ndarray):
        problem = f"It is {describe(value)}"
    elif not value.flags.c_contiguous:
        problem = "It is not C-contiguous"
    elif writable and not value.flags.writeable:
        problem = "It is read-only"
    else:
        return
    raise _unbindable(name, problem)


def _unbindable(name: str, problem: str) -> InputError:
    return InputError(
        f"The buffer for {name!r} cannot be bound.",
        f"{problem}; the engine reads and writes it in place.",
        "Pass np.ascontiguousarray(...) and keep a reference to it.",
        name=name,
    )


def _check_apart(name: str, buffer: Any, others: Iterable[tuple[str, Any]]) -> None:
    """Refuses an output that would overwrite what is still being read, or another's answer."""
    for other, value in others:
        if value is buffer and other == name:
            continue
        if type(buffer) is DeviceArray or type(value) is DeviceArray:
            overlap = (
                type(buffer) is type(value)
                and buffer.pointer < value.pointer + value.nbytes
                and value.pointer < buffer.pointer + buffer.nbytes
            )
        else:
            overlap = np.may_share_memory(buffer, value)
        if overlap:
            raise _unbindable(name, f"It shares memory with {other!r}")


@runtime_checkable
class SupportsProfiling(Protocol):
    """A session that measures its layers."""

    def _profile(self, inputs: Mapping[str, Any]) -> EngineReport:
        """The engine's report, with seconds for each layer. No other call is running."""


class Binding(ClosesOnExit):
    """Fixed input and output buffers of one session. One run at a time; others wait.

    `inputs` and `outputs` hold the buffers themselves: write into the first, read the second after
    `run`. Closing the session closes its bindings.
    """

    def __init__(
        self,
        session: Session,
        inputs: Mapping[str, Any],
        outputs: dict[str, Any],
        step: Callable[[], object],
    ) -> None:
        # Read-only: a new array put in here would never reach the engine.
        self.session, self.inputs = session, MappingProxyType(dict(inputs))
        self.outputs = MappingProxyType(outputs)
        self._step = step
        self._lock = threading.Lock()

    def run(self) -> Mapping[str, Any]:
        """One inference from and into the buffers; returns `outputs`.

        Raises ClosedError, or BackendError with the vendor's exception as cause.
        """
        with self._lock:
            try:
                self._step()
            except UnirtError:
                raise
            except Exception as error:
                raise failed_error("run", self.session.engine, error) from error
        return self.outputs

    def close(self) -> None:
        """Waits for a run in flight and lets go of the engine. The buffers stay the caller's."""
        with self._lock:
            step, self._step = self._step, self._raise_closed
        close = getattr(step, "close", None)
        del step  # it may hold what is freed next
        if close is not None:
            close()

    def _raise_closed(self) -> None:
        raise closed_error("binding", self.session.engine)


@runtime_checkable
class SupportsBind(Protocol):
    """A session that can prepare fixed buffers better than run-and-copy does."""

    def _bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Callable[[], object] | None:
        """A function that runs from `inputs` into `outputs`; core calls it one at a time. None
        where these buffers are better served by run and copy. If it has a `close`, core calls that
        once, when the binding closes.
        """


@runtime_checkable
class SupportsDeviceArrays(Protocol):
    """A session that works on arrays in its device's memory without a host copy."""

    def _run_device(self, inputs: Mapping[str, Any], keep: bool) -> Mapping[str, Any]:
        """`_run` where inputs may be DeviceArray; outputs stay on the device if `keep`."""
