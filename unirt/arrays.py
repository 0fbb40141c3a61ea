"""What goes into a session and comes out: checks of inputs, and arrays in a device's memory."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from unirt import dlpack
from unirt.errors import InputError
from unirt.types import EXTENDED_DTYPES, Array, TensorSpec, numpy_dtype


class DeviceArray:
    """A C-contiguous array in CUDA memory, for `__dlpack__` and `__cuda_array_interface__`.

    Its content is complete when you hold it: whoever made it has synchronised. `owner` keeps the
    memory alive. CuPy, PyTorch and others view it without a copy (`torch.from_dlpack(array)`);
    `numpy()` copies it to the host.
    """

    __slots__ = ("_to_host", "device_id", "dtype", "lent", "owner", "pointer", "shape")

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: str,
        device_id: int,
        owner: object,
        to_host: Callable[[], Array] | None = None,
    ) -> None:
        self.pointer, self.shape, self.dtype = pointer, shape, dtype
        self.device_id, self.owner, self._to_host = device_id, owner, to_host
        self.lent = False  # whether others have its address, and may be writing there

    def numpy(self) -> Array:
        """A copy in host memory."""
        if self._to_host is None:
            raise InputError(
                "This device array cannot be copied to the host by UniRT.",
                "It only borrows memory that another library owns.",
                "Copy it with the library that made it.",
            )
        return self._to_host()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CUDA, self.device_id)

    def __dlpack__(self, *, stream: object = None, **_: object) -> Any:
        self.lent = True
        # Memory that goes back to a pool must not be handed out again before this reader is done.
        read_on = getattr(self.owner, "read_on", None)
        if read_on is not None and isinstance(stream, int):
            read_on(stream)
        return dlpack.export(self.pointer, self.shape, self.dtype, self.__dlpack_device__(), self)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * numpy_dtype(self.dtype).itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self.lent = True
        return {
            "shape": self.shape,
            "typestr": numpy_dtype(self.dtype).str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }

    def __repr__(self) -> str:
        return f"<unirt.DeviceArray {describe(self)} on cuda:{self.device_id}>"


def describe(value: Any) -> str:
    """`float32 [1, 3]` for an array, its type for anything else."""
    if isinstance(value, np.ndarray | np.generic | DeviceArray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def admit(inputs: Any, specs: tuple[TensorSpec, ...], device: str) -> dict[str, Any]:
    """The inputs as NumPy arrays (or DeviceArray), each checked against its spec, in spec order.

    `device` is the kind of device of the session. Raises InputError.
    """
    named = _by_name(inputs, specs)
    expected = {spec.name: spec for spec in specs}
    extra = [name for name in named if name not in expected]
    missing = [s.name for s in specs if s.name not in named and s.kind != "optional"]
    if extra or missing:
        raise _wrong_names(extra, missing, specs)
    sizes: dict[str, tuple[int, str]] = {}
    feed: dict[str, Any] = {}
    for spec in specs:
        value = named.get(spec.name)
        if spec.kind == "tensor":
            value = to_array(value, spec, device)
            _check_dtype(value, spec)
            _check_shape(value, spec, specs, sizes)
        feed[spec.name] = value
    return feed


def _by_name(inputs: Any, specs: tuple[TensorSpec, ...]) -> Mapping[str, Any]:
    if inputs is None:
        return {}
    if isinstance(inputs, Mapping):
        return inputs
    is_array = isinstance(inputs, np.ndarray | np.generic) or any(
        hasattr(inputs, protocol) for protocol in ("__dlpack__", "__cuda_array_interface__")
    )
    if is_array and len(specs) == 1:
        return {specs[0].name: inputs}
    why = f"It takes {_listing(specs)}."
    if is_array:
        raise InputError(
            f"A bare array was given to a model with {len(specs)} inputs.",
            why,
            "Pass a dict of arrays by input name.",
        )
    raise InputError(
        f"The inputs are {describe(inputs)}, not arrays.",
        why,
        "Pass a dict of NumPy or DLPack arrays by input name; for a single input, the bare array.",
    )


def _listing(specs: tuple[TensorSpec, ...]) -> str:
    return "; ".join(map(str, specs)) or "no inputs"


def _wrong_names(extra: list[str], missing: list[str], specs: tuple[TensorSpec, ...]) -> InputError:
    names = [spec.name for spec in specs]
    told = []
    if missing:
        told.append(f"missing: {', '.join(map(repr, missing))}")
    if extra:
        told.append(f"unknown: {', '.join(map(repr, extra))}")
    near = [m for name in extra for m in difflib.get_close_matches(str(name), names, n=1)]
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return InputError(
        f"The inputs do not match the model ({'; '.join(told)}).",
        f"It takes {_listing(specs)}.",
        f"{hint}Pass exactly these names.",
        missing=missing,
        extra=extra,
    )


def to_array(value: Any, spec: TensorSpec, device: str) -> Any:
    """`value` as a NumPy array or a DeviceArray over the same memory. Raises InputError."""
    if type(value) is np.ndarray or isinstance(value, DeviceArray):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(
            f"Input {spec.name!r} is a masked array.",
            "No engine knows masks, and dropping this one would use the values it hides.",
            "Fill it first: array.filled(value).",
            name=spec.name,
        )
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray)
    if isinstance(value, np.generic):
        return np.asarray(value)
    if not hasattr(value, "__dlpack__"):
        if hasattr(value, "__cuda_array_interface__"):
            return _from_cuda(value, spec, device)
        raise InputError(
            f"Input {spec.name!r} is {describe(value)}, not an array.",
            f"The model takes {spec}, and UniRT never guesses a dtype.",
            f"Pass numpy.asarray(value, dtype={spec.dtype!r}), or any array with __dlpack__.",
            name=spec.name,
        )
    try:
        borrowed = dlpack.borrow(value) if device == "cuda" else None
        if borrowed is not None:
            return _on_device(borrowed, spec)
        kind, index = value.__dlpack_device__()
        if kind in dlpack.HOST_KINDS:
            return _from_host(value, spec)
        if kind not in (dlpack.CUDA, dlpack.CUDA_MANAGED) or device != "cuda":
            raise InputError(
                f"Input {spec.name!r} lies in the memory of another device.",
                f"This session runs on {device}; the array's DLPack device is ({int(kind)}, "
                f"{index}), and UniRT makes no silent copies.",
                "Copy it to the host first, or use a candidate on that device.",
                name=spec.name,
            )
        # Stream 1 is CUDA's legacy default stream: the producer orders its work before it.
        return _on_device(dlpack.read(value.__dlpack__(stream=1)), spec)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"Input {spec.name!r} ({type(value).__name__}) cannot be read through DLPack.",
            f"{type(error).__name__}: {error}",
            f"Detach it, make it dense, or convert it to a NumPy array of {spec.dtype}.",
            name=spec.name,
        ) from error


def _on_device(tensor: dlpack.Imported, spec: TensorSpec) -> DeviceArray:
    if not tensor.contiguous:
        raise InputError(
            f"Input {spec.name!r} is a strided device array.",
            "Engines take C-contiguous device memory.",
            "Call .contiguous() (PyTorch) or cupy.ascontiguousarray first.",
            name=spec.name,
        )
    return DeviceArray(tensor.pointer, tensor.shape, tensor.dtype, tensor.device_id, tensor)


def _from_cuda(value: Any, spec: TensorSpec, device: str) -> DeviceArray:
    """Over `__cuda_array_interface__`, for those without DLPack. Its stream, where it names one
    other than the default, must have been synchronised: only CUDA itself could order after it.
    """
    told = value.__cuda_array_interface__
    problem, remedy = "", "Copy it to the host first, or use a candidate on that device."
    dtype, shape = np.dtype(told["typestr"]), tuple(told["shape"])
    strides = told.get("strides")
    dense = tuple(dtype.itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if device != "cuda":
        problem = f"This session runs on {device}, and the array lies in CUDA memory"
    elif not dtype.isnative:
        problem, remedy = "Its bytes are swapped", "Convert it to the machine's own byte order."
    elif told.get("mask") is not None:
        problem, remedy = "It is masked, and no engine knows masks", "Fill it first."
    elif strides is not None and tuple(strides) != dense:
        problem, remedy = "It is strided", "Make it C-contiguous first."
    elif told.get("stream") not in (None, 1):
        problem = f"It may still be written on stream {told['stream']}"
        remedy = "Synchronise that stream, or pass an array with __dlpack__."
    if problem:
        raise InputError(
            f"Input {spec.name!r} cannot be used where it lies.",
            f"{problem}.",
            remedy,
            name=spec.name,
        )
    return DeviceArray(told["data"][0], shape, dtype.name, 0, value)


class _HostMemory:
    """A producer's host tensor of a type that NumPy cannot import itself, as raw integers."""

    def __init__(self, tensor: dlpack.Imported, itemsize: int) -> None:
        self.owner = tensor
        self.__array_interface__ = {
            "shape": tensor.shape,
            "typestr": f"<u{itemsize}" if itemsize > 1 else "|u1",
            "data": (tensor.pointer, False),
            "version": 3,
        }


def _from_host(value: Any, spec: TensorSpec) -> Array:
    if spec.dtype not in EXTENDED_DTYPES:
        return np.from_dlpack(value)
    tensor = dlpack.read(value.__dlpack__())
    dtype = numpy_dtype(tensor.dtype)
    if not tensor.contiguous:
        raise TypeError("it is strided")
    return np.asarray(_HostMemory(tensor, dtype.itemsize)).view(dtype)


def _check_dtype(value: Any, spec: TensorSpec) -> None:
    if isinstance(value, DeviceArray):
        fits = value.dtype == spec.dtype
    elif spec.dtype == "string":
        fits = value.dtype.kind in "OU"
    else:
        fits = value.dtype == spec.numpy_dtype
    if not fits:
        raise InputError(
            f"Input {spec.name!r} is {describe(value)}.",
            f"The model takes {spec}, and UniRT never casts silently.",
            f"Convert it yourself: array.astype({spec.dtype!r}).",
            name=spec.name,
            expected=spec,
        )


def _check_shape(
    value: Any, spec: TensorSpec, specs: tuple[TensorSpec, ...], sizes: dict[str, tuple[int, str]]
) -> None:
    if spec.shape is None:
        return
    shape = tuple(value.shape)
    problem = ""
    if len(shape) != len(spec.shape):
        problem = f"it has rank {len(shape)} instead of {len(spec.shape)}"
    else:
        for axis, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
            if isinstance(wanted, int) and size != wanted:
                problem = f"axis {axis} is {size} instead of {wanted}"
                break
            if isinstance(wanted, str):
                seen, where = sizes.setdefault(wanted, (size, spec.name))
                if seen != size:
                    problem = f"axis {axis} ({wanted!r}) is {size}, but {seen} in {where!r}"
                    break
    if problem:
        raise InputError(
            f"Input {spec.name!r} is {describe(value)}: {problem}.",
            f"The model takes {_listing(specs)}.",
            "Reshape or pad the array, or build the model for this shape.",
            name=spec.name,
            expected=spec,
        )
