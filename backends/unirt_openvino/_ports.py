"""Which port of a compiled model is which input or output of the file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unirt import (
    BuildError,
    ModelFile,
    TensorSpec,
)

Array: TypeAlias = NDArray[Any]


What: TypeAlias = Literal["input", "output"]


# OpenVINO's element types -> ours.
DTYPES = {
    "boolean": "bool",
    "string": "string",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "f4e2m1": "float4_e2m1fn",
    "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "f8e8m0": "float8_e8m0fnu",
    **{f"i{bits}": f"int{bits}" for bits in (4, 8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (4, 8, 16, 32, 64)},
}


PACKED = ("int4", "uint4", "float4_e2m1fn")  # two to a byte in OpenVINO, one in NumPy


# From here on lending an array's memory (10 us of calls) beats copying it. Measured.
LENT_FROM_BYTES = 256 * 1024


@dataclass(frozen=True)
class Port:
    """An input or output of the compiled model, and the file's name for it."""

    name: str
    index: int
    spec: TensorSpec
    element: Any
    shape: tuple[int, ...] | None
    """Its shape where that is static."""
    passes: bool = False
    """An output that is an input: setting its memory would set that input's."""

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return self.spec.numpy_dtype

    @cached_property
    def plain(self) -> bool:
        """Whether OpenVINO lays it out as NumPy does."""
        return self.spec.dtype not in (*PACKED, "string")

    @cached_property
    def presettable(self) -> bool:
        """Whether an output can go into memory of ours. A dynamic one could outgrow it."""
        return self.plain and not self.passes and self.shape is not None

    @cached_property
    def large(self) -> bool:
        nbytes = math.prod(self.shape or ()) * self.dtype.itemsize
        return self.presettable and nbytes >= LENT_FROM_BYTES


def dtype_of(port: Any) -> str:
    name = str(port.get_element_type().get_type_name())
    return DTYPES.get(name, name)


def find_ports(file: ModelFile, what: What, ports: Sequence[Any]) -> list[Port]:
    """The file's inputs or outputs on the ports of the compiled model."""
    specs = file.inputs if what == "input" else file.outputs
    free = dict(enumerate(ports))
    chosen: dict[str, int] = {}
    # OpenVINO names TFLite ports by tensor, the file by signature: there only positions agree.
    if file.format != "tflite":
        for spec in specs:
            index = next((i for i, port in free.items() if spec.name in port.get_names()), None)
            if index is not None:
                chosen[spec.name] = index
                del free[index]
    if not chosen and len(specs) == len(ports):
        chosen = {spec.name: index for index, spec in enumerate(specs)}
    # Inputs that nothing uses are dropped by OpenVINO; outputs never are.
    elif free if what == "input" else len(chosen) < len(specs):
        raise _strange(file, what, ports, "they cannot be told apart")
    return [
        _port(file, what, spec, chosen[spec.name], ports) for spec in specs if spec.name in chosen
    ]


def _port(file: ModelFile, what: What, spec: TensorSpec, index: int, ports: Sequence[Any]) -> Port:
    port = ports[index]
    partial = port.get_partial_shape()
    dtype, rank = dtype_of(port), partial.rank
    wrong = ""
    if spec.kind != "tensor" or dtype not in DTYPES.values():
        wrong = f"{spec.name!r} is a {spec.kind} of {dtype}"
    elif spec.dtype not in (dtype, "undefined"):
        wrong = f"{spec.name!r} is {dtype} instead of {spec.dtype}"
    # TFLite files may declare wrong output shapes; of ONNX, OpenVINO computes something else.
    elif (
        (what == "input" or file.format != "tflite")
        and (spec.shape is not None and rank.is_static)
        and len(partial) != len(spec.shape)
    ):
        wrong = f"{spec.name!r} has rank {len(partial)} instead of {len(spec.shape)}"
    if wrong:
        raise _strange(file, what, ports, wrong)
    shape = tuple(partial.to_shape()) if partial.is_static else None
    if spec.dtype == "undefined":
        known = None
        if rank.is_static:
            known = tuple(d.get_length() if d.is_static else None for d in partial)
        spec = TensorSpec(spec.name, dtype, known)
    return Port(spec.name, index, spec, port.get_element_type(), shape)


def _strange(file: ModelFile, what: What, ports: Sequence[Any], why: str) -> BuildError:
    specs = file.inputs if what == "input" else file.outputs
    there = ", ".join(f"{sorted(port.get_names())} {dtype_of(port)}" for port in ports)
    return BuildError(
        f"What openvino made of this model has other {what}s than the file.",
        f"The file's are {'; '.join(map(str, specs)) or 'none'}; openvino's are {there or 'none'}: "
        f"{why}.",
        "Use another backend or device, or export the model again.",
    )
