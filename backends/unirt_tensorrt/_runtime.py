"""A plan at work: what all contexts of one engine share, and when they must stand still."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from unirt import BuildError, InputError, ModelFile, ShapeProfile, TensorSpec
from unirt_tensorrt._cache import RuntimeStore
from unirt_tensorrt._cuda import Cuda
from unirt_tensorrt._library import ERROR, WARNING, Library, Message
from unirt_tensorrt._options import TensorRTOptions
from unirt_tensorrt._staging import Shape, Tensor

log = logging.getLogger("unirt.tensorrt")

_compiling = threading.RLock()

SAVE_SECONDS = 5.0
"""How seldom the runtime cache is saved while new shapes keep coming; closing saves the rest."""

# trt.DataType -> UniRT's name. Four-bit types never cross the border of an engine.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
}


class Runtime:
    """A deserialized plan on one device, which the caller has made current.

    Thread-safe: contexts are made under a lock, and everything else is read-only.
    """

    engine_graphs = False
    """Whether contexts capture and replay CUDA graphs by themselves."""
    captures = False
    """Whether lanes do it for them, where a context meets one set of shapes only."""
    captures_ranges = False
    """Whether they also do it for shapes within a range, each in a context of its own."""

    def __init__(
        self,
        library: Library,
        cuda: Cuda,
        file: ModelFile,
        options: TensorRTOptions,
        blob: bytes,
        store: RuntimeStore | None,
    ) -> None:
        self.library, self.cuda, self.settings = library, cuda, options
        self._store = store
        self._making = threading.Lock()
        self._turns = threading.RLock()
        self._saving = threading.RLock()
        self._saved = -SAVE_SECONDS
        self._locks: weakref.WeakSet[Any] = weakref.WeakSet()
        self._native_runtime, self.native = open_plan(library, blob)
        self.tensors = self._read_tensors(file)
        self.output_names = [tensor.name for tensor in self.tensors if not tensor.is_input]
        # Outputs that are allocated while the network runs, besides those whose shape stays open.
        self.open_outputs: frozenset[str] = frozenset()
        self._set_weight_budget()
        self._config, self._runtime_cache = self._runtime_config(plain=False)
        self._plain_config, _ = self._runtime_config(plain=True)
        self._ranges = self._read_ranges()
        # The tightest profile that fits a call is the first one here.
        self._by_spread = sorted(
            range(len(self._ranges)), key=lambda index: self._ranges[index].spread
        )
        self.arrays = cuda.pool()

    def _read_tensors(self, file: ModelFile) -> tuple[Tensor, ...]:
        trt, native = self.library.module, self.native
        specs = {spec.name: spec for spec in (*file.inputs, *file.outputs)}
        tensors = []
        for index in range(native.num_io_tensors):
            name = native.get_tensor_name(index)
            kind = native.get_tensor_dtype(name).name
            dtype = DTYPES.get(kind)
            declared = specs[name].dtype if name in specs else dtype
            if dtype is None or declared not in (dtype, "undefined"):
                raise BuildError(
                    f"TensorRT has no {declared} for {name!r}.",
                    f"It would use {dtype or kind} there without a word.",
                    f"Cast {name!r} inside the model, or use another engine such as onnxruntime.",
                    backend="tensorrt",
                    name=name,
                )
            tensors.append(
                Tensor(
                    name,
                    native.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                    dtype,
                    TensorSpec(name, dtype, ()).numpy_dtype,
                    native.get_tensor_location(name) == trt.TensorLocation.HOST,
                )
            )
        # Callers' names stand in the model's own order.
        order = {name: position for position, name in enumerate(specs)}
        return tuple(sorted(tensors, key=lambda tensor: order.get(tensor.name, len(order))))

    def _read_ranges(self) -> tuple[ShapeProfile, ...]:
        native = self.native
        found = []
        for index in range(native.num_optimization_profiles):
            shapes, values = {}, {}
            for tensor in self.tensors:
                if not tensor.is_input:
                    continue
                bounds = native.get_tensor_profile_shape(tensor.name, index)
                shapes[tensor.name] = tuple(tuple(shape) for shape in bounds)
                if tensor.on_host:
                    # By position: the binding calls its two parameters by each other's name.
                    limits = native.get_tensor_profile_values(index, tensor.name)
                    if limits and all(len(one) for one in limits):
                        values[tensor.name] = tuple(tuple(one) for one in limits)
            found.append(ShapeProfile(shapes, values))
        return tuple(found)

    def _runtime_config(self, *, plain: bool) -> tuple[Any, Any]:
        """How contexts are made, and the kernels compiled for this GPU so far (RTX only).

        `plain` contexts run without the engine's own CUDA graphs, so that layers can be timed.
        """
        trt, native, options = self.library.module, self.native, self.settings
        self.captures = options.cuda_graphs in ("auto", "capture")
        self.captures_ranges = options.cuda_graphs == "capture"
        if options.specialization == "lazy" or options.weight_streaming:
            # Kernels are exchanged behind a graph's back; streaming weights synchronizes.
            self.captures = False
        if not hasattr(native, "create_runtime_config"):
            return None, None
        config = native.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if hasattr(config, "cuda_graph_strategy"):
            whole = self.engine_graphs = options.cuda_graphs == "engine"
            strategy = trt.CudaGraphStrategy
            config.cuda_graph_strategy = (
                strategy.WHOLE_GRAPH_CAPTURE if whole and not plain else strategy.DISABLED
            )
        name = "dynamic_shapes_kernel_specialization_strategy"
        if hasattr(config, name):
            # Lazily compiled kernels arrive while calls run, which doubles the time of some; the
            # first call of a shape costs about the same either way (docs/tensorrt.md).
            wanted = "EAGER" if options.specialization == "auto" else options.specialization.upper()
            setattr(config, name, getattr(type(getattr(config, name)), wanted))
        cache = None
        if hasattr(config, "create_runtime_cache") and self._store is not None and not plain:
            cache = config.create_runtime_cache()
            known = self._store.load()
            if known:
                with self.library.capture() as messages:
                    if cache.deserialize(known):
                        # The first calls compile little then, and writing it all would delay them.
                        self._saved = time.monotonic()
                    else:
                        log.info("the runtime cache does not fit here: %s", told(messages))
            config.set_runtime_cache(cache)
        elif plain and getattr(self, "_runtime_cache", None) is not None:
            config.set_runtime_cache(self._runtime_cache)
        return config, cache

    def _set_weight_budget(self) -> None:
        budget = self.settings.weight_streaming_budget
        if not self.settings.weight_streaming:
            return
        name = "weight_streaming_budget_v2"
        name = name if hasattr(self.native, name) else "weight_streaming_budget"
        if budget is None:
            automatic = getattr(self.native, "get_weight_streaming_automatic_budget", None)
            if automatic is None:
                return
            setattr(self.native, name, int(automatic()))
            return
        setattr(self.native, name, budget << 20)

    def new_context(self, *, plain: bool = False) -> Any:
        """An execution context that computes in memory it is given. Raises RuntimeError."""
        trt = self.library.module
        with self._making, self.library.capture() as messages:
            config = self._plain_config if plain else self._config
            if config is not None:
                context = self.native.create_execution_context(config)
            else:
                context = self.native.create_execution_context(
                    trt.ExecutionContextAllocationStrategy.USER_MANAGED
                )
        if context is None:
            raise RuntimeError(f"no execution context: {told(messages) or 'no reason given'}")
        return context

    def scratch_size(self, context: Any, profile: int) -> int:
        """Bytes that the context computes in, for the shapes it has now.

        Where the engine replays graphs of its own, for the largest shapes: a graph holds addresses,
        so this memory must never move.
        """
        if self.engine_graphs:
            name = "device_memory_size_v2"
            return int(getattr(self.native, name if hasattr(self.native, name) else name[:-3]))
        if hasattr(context, "update_device_memory_size_for_shapes"):
            return int(context.update_device_memory_size_for_shapes())
        if hasattr(self.native, "get_device_memory_size_for_profile_v2"):
            return int(self.native.get_device_memory_size_for_profile_v2(profile))
        return int(self.native.device_memory_size)

    def choose(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> int:
        """The tightest profile for these inputs. Raises InputError that names every range."""
        for index in self._by_spread:
            profile = self._ranges[index]
            if profile.fits(shapes) and _within(profile, values):
                return index
        raise self.refused(shapes, [])

    def refused(self, shapes: Mapping[str, Shape], messages: Sequence[Message]) -> InputError:
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        ranges = " | ".join(str(only_dynamic(profile)) for profile in self._ranges)
        reason = told(messages)
        return InputError(
            f"No profile of this engine takes {given}.",
            f"It was built for: {ranges}.{' ' + reason if reason else ''}",
            "Build it for this shape too: unirt.build(..., profiles=[...]) or hot_shapes=[...].",
            shapes=dict(shapes),
            profiles=self._ranges,
        )

    def example(self) -> dict[str, Any]:
        """Inputs of the first profile's most common shapes, all ones where no values are known."""
        profile = self._ranges[0] if self._ranges else ShapeProfile({})
        inputs = {}
        for tensor in self.tensors:
            if not tensor.is_input:
                continue
            shape = profile.shapes[tensor.name][1] if tensor.name in profile.shapes else ()
            value = np.ones(shape, tensor.numpy_dtype)
            if tensor.name in profile.values:
                value = np.array(profile.values[tensor.name][1], tensor.numpy_dtype)
                value = value.reshape(shape)
            inputs[tensor.name] = value
        return inputs

    def is_static(self, profile: int) -> bool:
        """Whether a profile holds one set of shapes only."""
        return self._ranges[profile].spread == 1

    # What is kept

    def ran_first(self) -> None:
        """A set of shapes ran for the first time: kernels may have been compiled for it."""
        if self._runtime_cache is None or self.settings.specialization == "lazy":
            return  # lazy kernels come from threads that nobody can hold
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._saved = time.monotonic()
            self.save_runtime_cache()

    def unit_lock(self) -> Any:
        """A lock for a unit of contexts, which `still` takes too as long as it lives."""
        # RTX captures its own graphs while nobody in the process may allocate or capture: several
        # at once crash it. There all units take turns.
        lock = self._turns if self.engine_graphs else threading.RLock()
        with self._saving:
            self._locks.add(lock)
        return lock

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """No unit of this engine enqueues meanwhile, and no other engine of the process compiles.

        RTX compiles kernels when a context is made and when shapes are new, into a cache that all
        contexts share: with several threads in there, or one that reads it, the process crashes.
        Whoever holds a unit must not ask for this.
        """
        with _compiling, self._saving:
            held = []
            try:
                for lock in list(self._locks):
                    held.append(lock)  # before: a Ctrl-C may come right after
                    lock.acquire()
                yield
            finally:
                for lock in reversed(held):
                    with contextlib.suppress(RuntimeError):  # not acquired
                        lock.release()

    def save_runtime_cache(self) -> None:
        if self._store is None or self._runtime_cache is None:
            return
        try:
            with self.still():
                content = bytes(self._runtime_cache.serialize())
            self._store.save(content)
        except Exception as error:  # noqa: BLE001 - a cache that cannot be kept costs time only
            log.warning("the runtime cache cannot be saved: %s", error)

    def layers(self) -> str:
        """The engine's own account of its layers, as JSON; empty where it gives none."""
        with self.cuda.current(), self.still():
            return layers_of(self.library, self.native)

    def close(self) -> None:
        """Frees all of it, once no context is left."""
        self.save_runtime_cache()
        self.arrays.close()
        # In this order: contexts are gone with their lanes, and an engine needs its runtime.
        del self._config, self._plain_config, self._runtime_cache
        del self.native
        del self._native_runtime


def open_plan(library: Library, blob: bytes) -> tuple[Any, Any]:
    """TensorRT's runtime and the engine it made of a plan. Raises BuildError."""
    trt = library.module
    with library.capture() as messages:
        runtime = trt.Runtime(library.logger)
        native = runtime.deserialize_cuda_engine(blob)
    if native is None:
        raise BuildError(
            f"{library.flavour} {library.version} cannot load this plan.",
            told(messages) or "It gave no reason.",
            "Build it on this machine with this version, or try another candidate.",
            backend="tensorrt",
            log=[message.text for message in messages if message.severity <= ERROR],
        )
    return runtime, native


def layers_of(library: Library, native: Any) -> str:
    inspector = native.create_engine_inspector()
    return str(inspector.get_engine_information(library.module.LayerInformationFormat.JSON) or "")


def told(messages: Sequence[Message]) -> str:
    errors = [message.text.strip() for message in messages if message.severity <= WARNING]
    return " ".join(dict.fromkeys(errors))


def _within(profile: ShapeProfile, values: Mapping[str, Any]) -> bool:
    for name, value in values.items():
        bounds = profile.values.get(name)
        if bounds is not None:
            flat = tuple(int(one) for one in np.asarray(value).reshape(-1))
            if len(flat) != len(bounds[0]) or not all(
                low <= one <= high
                for low, one, high in zip(bounds[0], flat, bounds[2], strict=True)
            ):
                return False
    return True


def only_dynamic(profile: ShapeProfile) -> ShapeProfile:
    """Without the inputs that have one shape only, unless there is nothing else to say."""
    shapes = {name: one for name, one in profile.shapes.items() if one[0] != one[2]}
    return ShapeProfile(shapes, profile.values) if shapes or profile.values else profile
