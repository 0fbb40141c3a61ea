"""The DLPack ABI by ctypes: read any producer's tensor, hand out a device pointer as one.

Only what NumPy cannot do is here: memory of a device. Layout from dlpack.h, version 0.8 (the
unversioned `dltensor` capsule, which every producer and consumer still speaks).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
HOST_KINDS = (CPU, CUDA_HOST)

# (type code, bits) of DLDataType -> our dtype name
_DTYPES = {
    **{(0, bits): f"int{bits}" for bits in (8, 16, 32, 64)},
    **{(1, bits): f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{(2, bits): f"float{bits}" for bits in (16, 32, 64)},
    **{(5, bits): f"complex{bits}" for bits in (64, 128)},
    (4, 16): "bfloat16",
    (6, 8): "bool",
    (10, 8): "float8_e4m3fn",
    (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz",
    (14, 8): "float8_e8m0fnu",
}
_CODES = {name: code for code, name in _DTYPES.items()}


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = [
    ("tensor", _DLTensor),
    ("context", ctypes.c_void_p),
    ("deleter", _DELETER),
]
_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_api = ctypes.pythonapi
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR]
# The destructor gets a capsule whose count is already zero: it must be handled as a bare pointer.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", _api)
)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _api)
)


@dataclass(frozen=True)
class Imported:
    """A producer's tensor; valid while `owner` is kept: its capsule, or the array itself."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    device_type: int
    device_id: int
    contiguous: bool
    owner: Any


class _ExchangeAPI(ctypes.Structure):
    """DLPackExchangeAPI of dlpack.h 1.3: the same by C functions, without a capsule each time."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", ctypes.c_void_p),
        ("managed_to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
    ]


_TENSOR_FROM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_DLTensor))
_STREAM_OF = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)
_exchanges: dict[type, tuple[Any, Any] | None] = {}


def _exchange(kind: type) -> tuple[Any, Any] | None:
    capsule = vars(kind).get("__dlpack_c_exchange_api__")
    if capsule is None:
        return None
    try:
        address = _api.PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
        functions = _ExchangeAPI.from_address(address)
        if functions.major != 1 or not (functions.tensor_from_object and functions.current_stream):
            return None
        return _TENSOR_FROM(functions.tensor_from_object), _STREAM_OF(functions.current_stream)
    except (TypeError, ValueError):
        return None


def borrow(value: Any) -> Imported | None:
    """The CUDA array `value`, faster, if its own type offers the C functions of DLPack 1.3
    and it was made in the order of the default stream. None: ask `__dlpack__` instead.
    """
    kind = type(value)
    try:
        exchange = _exchanges[kind]
    except KeyError:
        exchange = _exchanges[kind] = _exchange(kind)
    if exchange is None:
        return None
    tensor, stream = _DLTensor(), ctypes.c_void_p()
    if exchange[0](value, tensor) or tensor.device_type != CUDA:
        return None
    if exchange[1](CUDA, tensor.device_id, stream) or stream.value:
        return None
    # A lazily negated tensor of PyTorch's: only its slower way refuses it.
    negated = getattr(value, "is_neg", None)
    if negated is not None and negated():
        return None
    return _described(tensor, value)


def read(capsule: Any) -> Imported:
    """What a `dltensor` capsule describes. Raises TypeError for a dtype without a name here."""
    address = _api.PyCapsule_GetPointer(capsule, b"dltensor")
    return _described(_DLManagedTensor.from_address(address).tensor, capsule)


def _described(tensor: Any, owner: Any) -> Imported:
    shape = tuple(tensor.shape[: tensor.ndim])
    dtype = _DTYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise TypeError(f"DLPack type code {tensor.code}, {tensor.bits} bits x {tensor.lanes}")
    contiguous, expected = True, 1
    if tensor.strides:
        strides = tensor.strides[: tensor.ndim]
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            contiguous &= size == 1 or stride == expected
            expected *= size
    return Imported(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        dtype,
        tensor.device_type,
        tensor.device_id,
        contiguous or 0 in shape,
        owner,
    )


_exported: dict[int, tuple[Any, ...]] = {}


def _delete(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _destroy(capsule: int) -> None:
    if _is_valid(capsule, b"dltensor"):  # a consumer renames the capsule and takes the tensor over
        _exported.pop(_pointer_of(capsule, b"dltensor"), None)


# C holds these for as long as any capsule lives, so they are made once and never freed.
_deleter, _destructor = _DELETER(_delete), _DESTRUCTOR(_destroy)


def export(
    pointer: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int], owner: object
) -> Any:
    """A `dltensor` capsule over C-contiguous memory; `owner` lives until the consumer lets go."""
    if dtype not in _CODES:
        raise BufferError(f"DLPack has no type for {dtype}")
    code, bits = _CODES[dtype]
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    managed = _DLManagedTensor()
    managed.tensor = _DLTensor(
        pointer, device[0], device[1], len(shape), code, bits, 1, sizes, None, 0
    )
    managed.deleter = _deleter
    address = ctypes.addressof(managed)
    _exported[address] = (managed, sizes, owner)
    return _api.PyCapsule_New(address, b"dltensor", _destructor)
