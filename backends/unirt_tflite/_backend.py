from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unirt import (
    Availability,
    Backend,
    BackendError,
    Device,
    Engine,
    EngineReport,
    InputError,
    ModelFile,
    OptionError,
    Options,
    Pool,
    Session,
    host_devices,
    option,
)
from unirt_tflite import _layers

# Distribution -> the module that holds its Interpreter; the first one that works is used.
LIBRARIES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "tflite-runtime": "tflite_runtime.interpreter",
}
INSTALL = "pip install 'unirt[tflite]'"
# With tens of thousands LiteRT crashes the process instead of failing.
MAX_THREADS = 1024
RESOLVERS = {
    "xnnpack": "BUILTIN",
    "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
    "reference": "BUILTIN_REF",
}
# Hands one float through. With NumPy 2, tflite-runtime imports well and fails when it is used.
IDENTITY = base64.b64decode(
    "GAAAAFRGTDMAAA4AFAAQAAwACAAAAAQADgAAABAAAAAcAAAAqAAAAAMAAAABAAAACAAAAAQABAAEAAAAAQAAABQAAAAA"
    "AA4AGAAUABAADAAIAAQADgAAABQAAAAcAAAAHAAAACAAAAAkAAAABgAAAGdyYXBoMAAAAAAAAAEAAAAAAAAAAQAAAAAA"
    "AAABAAAAHAAAAAAAFgAQAAwAAAAAAAgAAAAAAAAAAAAHABYAAAAAAAABCAAAAAwAAAABAAAAeAAAAAEAAAABAAAAAAAA"
    "AA=="
)


@dataclass(frozen=True)
class TFLiteOptions(Options):
    threads: int | None = option(
        None, "Threads inside one call; default: one per physical core.", minimum=1
    )
    lanes: int | None = option(
        None,
        "Interpreters of one session, so calls that run at once; each has threads, buffers and "
        "packed weights of its own. Default: physical cores divided by threads.",
        minimum=1,
    )
    kernels: Literal["xnnpack", "builtin", "reference"] = option(
        "xnnpack",
        "xnnpack: XNNPACK where it can, then TFLite's own; builtin: TFLite's own only, which give "
        "the largest float for infinity; reference: its slow, plain ones.",
    )
    carry_state: bool = option(
        False,
        "A stateful model goes on from where the session's last run left it, and input shapes stay "
        "those of the first run; a new session or binding starts anew, and bind itself runs "
        "the session once. Default: every run starts from the same state.",
    )
    delegates: tuple[str, ...] = option((), "Libraries of further delegates, applied in order.")
    delegate_options: Mapping[str, str] = option({}, "Passed to every one of `delegates`.")


class TFLiteBackend(Backend):
    name = "tflite"
    formats = ("tflite",)
    options = TFLiteOptions

    def _probe(self) -> Availability:
        try:
            library = _library()
        except ModuleNotFoundError:
            return Availability.no(
                "neither ai-edge-litert nor tflite-runtime is installed", INSTALL
            )
        except _Unusable as error:
            return Availability.no(str(error), INSTALL)
        cpu = next(device for device in host_devices() if device.kind == "cpu")
        return Availability.yes(library.version, cpu)

    def _compile(self, file: ModelFile, device: Device, options: TFLiteOptions) -> Engine:
        if (options.threads or 1) > MAX_THREADS:
            raise OptionError(
                f"tflite cannot take threads={options.threads}.",
                f"More than {MAX_THREADS} may crash LiteRT, and with it the process.",
                "Take as many as there are cores, or leave the option out.",
                option="threads",
                value=options.threads,
            )
        return TFLiteEngine(file, device, options)


class _Unusable(Exception):
    """A library that is installed and does not work, with the reason."""


@dataclass(frozen=True)
class _Library:
    name: str
    version: str
    module: Any


@functools.cache
def _library() -> _Library:
    """The first library whose interpreter works. Raises ModuleNotFoundError, _Unusable."""
    failures = []
    for name, path in LIBRARIES.items():
        try:
            module = importlib.import_module(path)
            _try(module, quiet=name == "tflite-runtime")
        except ModuleNotFoundError as error:
            if error.name != path.partition(".")[0]:
                failures.append(f"{name} lacks a module: {error}")
        except Exception as error:  # noqa: BLE001 - whatever a broken binary raises is its reason
            cause = error.__cause__ or error
            why = f"{name} does not work here: {type(cause).__name__}: {cause}"
            if isinstance(error, SystemError) and int(np.__version__.partition(".")[0]) >= 2:
                why = f"{name} was built for NumPy 1, and this is NumPy {np.__version__}"
            failures.append(why)
        else:
            return _Library(name, importlib.metadata.version(name), module)
    if failures:
        raise _Unusable("; ".join(failures))
    raise ModuleNotFoundError


def _try(module: Any, *, quiet: bool) -> None:
    # NumPy 2 writes a page to stderr when a library built for NumPy 1 asks for its C interface.
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        # Without XNNPACK, which would announce itself on stderr.
        resolver = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = module.Interpreter(
            model_content=IDENTITY, experimental_op_resolver_type=resolver
        )
        interpreter.allocate_tensors()
        interpreter.set_tensor(0, np.ones(1, np.float32))
        interpreter.invoke()
        interpreter.get_tensor(0)


class TFLiteEngine(Engine):
    """The model's bytes, from which every lane makes its own interpreter."""

    def __init__(self, file: ModelFile, device: Device, options: TFLiteOptions) -> None:
        self._library = _library()
        self._file, self._settings = file, options
        # All interpreters read the weights from these bytes without copying them.
        self._content = file.read()
        cores: int = device.facts.get("usable_cpus", 1)
        self._threads = options.threads or cores
        self.lanes = options.lanes or max(1, cores // self._threads)
        self.carries = file.stateful and options.carry_state
        # LiteRT resets variable tensors, but not variables that are resources.
        self.renews = file.stateful and "VAR_HANDLE" in file.op_counts
        self.resets = file.stateful and not self.renews
        first = _Lane(self)
        first.check()
        self._spare = [first]
        self._facts = {
            "library": self._library.name,
            "version": self._library.version,
            "threads": self._threads,
            "lanes": self.lanes,
            "kernels": options.kernels,
            "delegated_parts": first.delegated_parts(),
            "carries_state": self.carries,
        }

    def lane(self) -> _Lane:
        """A lane in the model's first state."""
        try:
            return self._spare.pop()
        except IndexError:
            return _Lane(self)

    def interpreter(self) -> Any:
        module, options = self._library.module, self._settings
        resolver = getattr(module.OpResolverType, RESOLVERS[options.kernels])
        return module.Interpreter(
            model_content=self._content,
            num_threads=self._threads,
            experimental_op_resolver_type=resolver,
            experimental_delegates=[self._delegate(path) for path in options.delegates] or None,
        )

    def _delegate(self, path: str) -> Any:
        try:
            # A library that does not load makes `load_delegate` fail once more in a finalizer.
            ctypes.PyDLL(path).tflite_plugin_create_delegate  # noqa: B018
        except (OSError, AttributeError) as error:
            raise ValueError(f"{path!r} is no library of a TFLite delegate: {error}") from error
        return self._library.module.load_delegate(path, dict(self._settings.delegate_options))

    def _new_session(self) -> Session:
        return TFLiteSession(self)

    def _inspect(self) -> EngineReport:
        return _layers.read_layers(self.interpreter(), self._settings.kernels, self._file)

    def _close(self) -> None:
        self._spare.clear()
        del self._content


class _Lane:
    """One interpreter and the input shapes it is allocated for. One thread at a time."""

    def __init__(self, engine: TFLiteEngine) -> None:
        self._engine = engine
        self._specs = engine._file.inputs, engine._file.outputs
        self._input_names = [spec.name for spec in engine._file.inputs]
        # Asking for the dtypes loads ml_dtypes, without which LiteRT fails on bfloat16.
        dtypes = [spec.numpy_dtype.name for spec in (*engine._file.inputs, *engine._file.outputs)]
        self._narrow = "int4" in dtypes
        self._start()

    def _start(self) -> None:
        interpreter = self._interpreter = self._engine.interpreter()
        self._inputs = [detail["index"] for detail in interpreter.get_input_details()]
        self._outputs = [
            (spec.name, detail["index"])
            for spec, detail in zip(self._specs[1], interpreter.get_output_details(), strict=True)
        ]
        self._set, self._get = interpreter.set_tensor, interpreter.get_tensor
        self._invoke, self._reset = interpreter.invoke, interpreter.reset_all_variables
        self._shapes: list[tuple[int, ...]] | None = None
        self._spent = False

    def check(self) -> None:
        """Raises where the model cannot run at all."""
        try:
            self._interpreter.allocate_tensors()
        except Exception as error:
            text = str(error)
            lacks_operator = "unresolved custom op" in text or "Select TensorFlow op" in text
            # Sizes left open are 1 until a call tells them, and 1 need not suit the network.
            if lacks_operator or all(spec.is_static for spec in self._specs[0]):
                raise
            self._spent = True

    def delegated_parts(self) -> int | None:
        """How many parts of the graph a delegate such as XNNPACK runs; None if nobody tells."""
        try:
            # The only place where LiteRT tells; not part of its promised interface.
            operators = self._interpreter._get_ops_details()
        except (AttributeError, ValueError, KeyError):
            return None
        return [operator["op_name"] for operator in operators].count("DELEGATE")

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        values = [inputs[name] for name in self._input_names]
        shapes = [value.shape for value in values]
        if shapes != self._shapes:
            self.allocate(shapes)
        if self._narrow:  # LiteRT takes and gives a whole byte for each int4
            values = [value.astype(np.int8) if _is_narrow(value) else value for value in values]
        try:
            if self._engine.resets and not self._engine.carries:
                self._reset()
            for index, value in zip(self._inputs, values, strict=True):
                self._set(index, value)
            self._invoke()
            outputs = {name: self._fetch(index) for name, index in self._outputs}
        except BaseException:
            self._retire()
            raise
        if self._engine.renews:
            self._retire()
        return self._narrowed(outputs) if self._narrow else outputs

    def allocate(self, shapes: list[tuple[int, ...]]) -> None:
        """Prepares the interpreter for inputs of these shapes."""
        if self._spent:
            self._start()
        elif self._engine.carries and self._shapes is not None:
            raise InputError(
                f"The inputs' shapes changed to {_listing(self._input_names, shapes)}.",
                "With carry_state they stay those of the first run: LiteRT forgets the state when "
                "it prepares the network for others.",
                "Keep the shapes, or open another session for them.",
            )
        try:
            for index, shape in zip(self._inputs, shapes, strict=True):
                self._interpreter.resize_tensor_input(index, shape)
            self._interpreter.allocate_tensors()
        except Exception as error:
            self._spent, self._shapes = True, None
            remedy = "Check that the network works at these sizes."
            if any(0 in shape for shape in shapes) and self._engine._settings.kernels == "xnnpack":
                remedy = "XNNPACK refuses empty arrays for many operators; kernels=builtin may not."
            raise BackendError(
                f"tflite cannot run this network on {_listing(self._input_names, shapes)}.",
                f"{type(error).__name__}: {str(error).strip().rstrip('.')}.",
                remedy,
                backend="tflite",
                shapes=dict(zip(self._input_names, shapes, strict=True)),
            ) from error
        self._shapes = shapes

    def _retire(self) -> None:
        """Has the next run begin with a new interpreter, unless that would lose carried state."""
        if not self._engine.carries:
            self._spent, self._shapes = True, None

    def _fetch(self, index: int) -> Any:
        try:
            value = self._get(index)
        except ValueError:
            # LiteRT has no memory to copy from where an operator found nothing, as WHERE may.
            detail = next(
                found for found in self._interpreter.get_output_details() if found["index"] == index
            )
            if 0 not in detail["shape"]:
                raise
            return np.empty(tuple(detail["shape"]), detail["dtype"])
        return value if type(value) is np.ndarray else np.asarray(value)

    def _narrowed(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return {spec.name: outputs[spec.name].astype(spec.numpy_dtype) for spec in self._specs[1]}

    def bind(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Callable[[], object] | None:
        """The fastest loop body for one input and one output; None where that is not the case."""
        simple = len(self._inputs) == len(self._outputs) == len(inputs) == 1
        starts_over = (self._engine.resets or self._engine.renews) and not self._engine.carries
        if not simple or starts_over or self._narrow:
            return None
        (source,), (target,) = inputs.values(), outputs.values()
        if target.dtype.hasobject or not target.size:
            return None
        self.allocate([source.shape])
        (given,), ((name, result),) = self._inputs, self._outputs
        set_tensor, invoke, shape = self._set, self._invoke, target.shape
        look = self._interpreter.tensor(result)

        def step() -> None:
            set_tensor(given, source)
            invoke()
            # LiteRT refuses to go on while a view of its memory lives: this one dies with the call.
            view = look()
            if view.shape != shape:
                found = view.shape
                del view
                raise _changed(name, shape, found)
            target[...] = view

        return step


def _is_narrow(value: Any) -> bool:
    return bool(value.dtype.name == "int4")


def _listing(names: list[str], shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))


def _changed(name: str, bound: tuple[int, ...], found: tuple[int, ...]) -> BackendError:
    return BackendError(
        f"Output {name!r} came out as {list(found)}, and the bound buffer is {list(bound)}.",
        "This output's shape depends on the inputs' values.",
        "Use session.run for this network.",
        backend="tflite",
        name=name,
    )


class TFLiteSession(Session):
    """Calls take an interpreter from a pool. One that carries state has a single interpreter."""

    concurrent = True

    def __init__(self, engine: TFLiteEngine) -> None:
        self._native = engine
        self.lanes = 1 if engine.carries else engine.lanes
        self._pool = Pool(engine.lane, self.lanes)

    def _run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        lane = None
        try:
            lane = self._pool.take()
            return lane.run(inputs)
        finally:
            if lane is not None:
                self._pool.give(lane)

    def _bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], object]:
        lane = self._native.lane()
        step = lane.bind(inputs, outputs)
        if step is not None:
            return step

        def run_and_copy() -> None:
            produced = lane.run(inputs)
            for name, buffer in outputs.items():
                value = produced[name]
                if value.shape != buffer.shape:
                    raise _changed(name, buffer.shape, value.shape)
                buffer[...] = value

        return run_and_copy

    def _close(self) -> None:
        self._pool.drain()
