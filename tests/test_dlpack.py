"""DLPack by ctypes: what goes out can be read back, by us and by NumPy, and is freed once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from unirt import DeviceArray, InputError, TensorSpec, dlpack
from unirt.arrays import admit


class Owner:
    """Host memory, exported as a device array would be, so that NumPy can check it."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CPU, 0)

    def __dlpack__(self, **_: object) -> Any:
        array = self.array
        return dlpack.export(array.ctypes.data, array.shape, array.dtype.name, (1, 0), self)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3)])
def test_numpy_reads_what_is_exported(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape)), dtype=np.int8).reshape(shape).astype(dtype)
    view = np.from_dlpack(Owner(array))  # type: ignore[arg-type]
    np.testing.assert_array_equal(view, array)
    assert view.dtype == array.dtype


def test_the_owner_lives_until_the_consumer_lets_go() -> None:
    owner = Owner(np.arange(6, dtype=np.float32))
    alive = weakref.ref(owner)
    view = np.from_dlpack(owner)  # type: ignore[arg-type]
    del owner
    gc.collect()
    assert alive() is not None
    assert view[5] == 5
    del view
    gc.collect()
    assert alive() is None


def test_a_capsule_nobody_takes_frees_its_owner() -> None:
    owner = Owner(np.zeros(3, np.float32))
    alive = weakref.ref(owner)
    capsule = owner.__dlpack__()
    del owner
    gc.collect()
    assert alive() is not None
    del capsule
    gc.collect()
    assert alive() is None


def test_reading_tells_address_shape_dtype_and_strides() -> None:
    array = np.zeros((4, 6), np.int16)
    read = dlpack.read(array.__dlpack__())
    assert (read.pointer, read.shape, read.dtype) == (array.ctypes.data, (4, 6), "int16")
    assert (read.device_type, read.contiguous) == (dlpack.CPU, True)
    assert not dlpack.read(array[:, ::2].__dlpack__()).contiguous
    assert not dlpack.read(array.T.__dlpack__()).contiguous
    assert dlpack.read(array[1:2].T.T.__dlpack__()).pointer == array[1:2].ctypes.data


def test_a_device_array_describes_itself_to_cuda_libraries() -> None:
    array = DeviceArray(4096, (2, 3), "float16", 1, owner=None)
    assert array.__dlpack_device__() == (dlpack.CUDA, 1)
    assert array.__cuda_array_interface__["typestr"] == "<f2"
    assert array.__cuda_array_interface__["data"] == (4096, False)
    read = dlpack.read(array.__dlpack__())
    assert (read.pointer, read.shape, read.dtype, read.device_id) == (4096, (2, 3), "float16", 1)


def test_a_device_array_knows_that_others_have_its_address() -> None:
    first, second = (DeviceArray(4096, (2, 3), "float16", 0, owner=None) for _ in range(2))
    assert not first.lent
    first.__dlpack__(stream=1)
    assert first.lent
    assert second.__cuda_array_interface__
    assert second.lent


def test_a_cuda_array_with_swapped_bytes_is_refused() -> None:
    class OnlyCuda:
        def __init__(self, typestr: str) -> None:
            self.__cuda_array_interface__ = {
                "shape": (2, 3),
                "typestr": typestr,
                "data": (4096, False),
                "version": 3,
            }

    specs = (TensorSpec("x", "float32", (2, 3)),)
    assert admit({"x": OnlyCuda("<f4")}, specs, "cuda")["x"].pointer == 4096
    with pytest.raises(InputError, match="swapped"):
        admit({"x": OnlyCuda(">f4")}, specs, "cuda")
