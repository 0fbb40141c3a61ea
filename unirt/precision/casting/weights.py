"""Constants in a narrower float: what of them survives, and the conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unirt.precision.graph import FLOAT

if TYPE_CHECKING:
    import onnx

HUGE: Final = 1e6
"""No network scales by this; such a constant switches something off."""

_NEGLIGIBLE: Final = 2**11
"""A value so much smaller than the largest of its tensor is rounded away where fp16 adds them."""

# They turn a huge constant into a tiny result, or the other way round, so its size matters.
_BY_SIZE: Final = frozenset({"Div", "Pow", "Mod", "Reciprocal", "Log", "Sqrt"})


@dataclass(frozen=True)
class Low:
    """A narrower float: its names, its type in ONNX, and up to where it counts exactly."""

    name: str
    dtype: str
    number: int
    exact: int

    @property
    def type(self) -> str:
        return f"tensor({self.dtype})"

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        from onnx import helper

        return np.dtype(helper.tensor_dtype_to_np_dtype(self.number))

    @cached_property
    def limit(self) -> float:
        """The largest finite value."""
        top = np.array(0x7BFF if self.name == "fp16" else 0x7F7F, np.uint16)
        return float(top.view(self.numpy).astype(np.float32))

    @property
    def normal(self) -> float:
        """The smallest magnitude that has all its digits."""
        return 2.0**-14 if self.name == "fp16" else 2.0**-126

    def loss(self, name: str, size: float) -> str:
        """What is wrong with a tensor of this largest magnitude; empty if nothing is."""
        if size > self.limit:
            return f"{name!r} goes to {size:.6g}, and {self.name} to {self.limit:.6g}"
        if size and not float(np.float32(size).astype(self.numpy)):
            return f"{name!r} is at most {size:.6g}, which becomes 0 in {self.name}"
        return ""


LOWS: Final[Mapping[str, Low]] = {
    low.name: low for low in (Low("fp16", "float16", 10, 2048), Low("bf16", "bfloat16", 16, 256))
}


@dataclass(frozen=True)
class Fit:
    """How a constant's values fare in a narrower float."""

    low: Low
    values: int
    nonzero: int
    flushed: int
    over: int
    largest: float
    largest_flushed: float
    switches: bool
    raises: bool

    @classmethod
    def of(cls, array: np.ndarray[Any, np.dtype[np.float32]], low: Low) -> Fit:
        with np.errstate(over="ignore", under="ignore"):
            narrow = array.astype(low.numpy).astype(np.float32)
        finite = array[np.isfinite(array)]
        flushed = array[(narrow == 0) & (array != 0)]
        over = array[np.isinf(narrow) & np.isfinite(array)]
        return cls(
            low,
            array.size,
            int(np.count_nonzero(array)),
            flushed.size,
            over.size,
            float(np.max(np.abs(finite), initial=0)),
            float(np.max(np.abs(flushed), initial=0)),
            bool(np.all((finite == 0) | (np.abs(finite) >= HUGE))),
            bool(np.any(over > 0)),
        )

    def loss(self, name: str, op: str) -> str:
        """Why an operator that reads this constant must stay in float32; empty if it need not."""
        if self.over and not self.clamped(op):
            return (
                f"{self.over:,} of {self.values:,} values of {name!r} are beyond "
                f"{self.low.name}, the largest is {self.largest:.6g}"
            )
        # Dead channels hold next to nothing beside the others, and may vanish.
        mostly = self.flushed * 2 > self.nonzero
        if (self.flushed and op in _BY_SIZE) or (
            mostly and self.largest_flushed > self.largest / _NEGLIGIBLE
        ):
            lost = f"{self.flushed:,} of {self.values:,} values of {name!r}"
            return f"{lost} become 0 in {self.low.name}"
        return ""

    def clamped(self, op: str) -> bool:
        """Whether what is beyond the range only switches something off: the limit will do."""
        by_size = op in _BY_SIZE or (op == "Mul" and self.raises)
        return bool(self.over) and self.switches and not by_size


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """What a Constant node holds, if that is float32 and dense."""
    from onnx import numpy_helper

    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type == FLOAT:
            tensor: onnx.TensorProto = attribute.t
            return tensor
        if attribute.name == "value_float":
            return numpy_helper.from_array(np.array(attribute.f, np.float32))
        if attribute.name == "value_floats":
            return numpy_helper.from_array(np.array(attribute.floats, np.float32))
    return None


def constant_tensors(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and what stands as a tensor in Constant nodes; of any type."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                found[node.output[0]] = attribute.t
    return found


def dequantized_size(node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto]) -> float:
    """The largest magnitude of what a DequantizeLinear makes of constants. Where its scales are for
    blocks, that which the largest scale could make.
    """
    from onnx import numpy_helper

    levels, scale, *zero = (
        numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input if name
    )
    if not levels.size:
        return 0.0
    axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
    others: tuple[int, ...] | None = None
    if scale.ndim == 1 and scale.size > 1:
        others = tuple(one for one in range(levels.ndim) if one != axis % levels.ndim)
    if scale.ndim > 1:
        zero = [zero[0].min(), zero[0].max()] if zero else []
        scale = np.abs(scale).max()
    middles = zero or [np.zeros(1, np.float32)]
    ends = (levels.min(others), levels.max(others))
    return float(max(np.max(np.abs((end - one) * scale)) for end in ends for one in middles))


def narrowed(tensor: onnx.TensorProto, low: Low, name: str) -> onnx.TensorProto:
    """The tensor in the narrower float, what is finite but beyond its range at its limit."""
    from onnx import numpy_helper

    array = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore", under="ignore"):
        narrow = array.astype(low.numpy)
    overflown = np.isinf(narrow.astype(np.float32)) & np.isfinite(array)
    if overflown.any():
        narrow = np.where(overflown, np.copysign(low.limit, array).astype(low.numpy), narrow)
    return numpy_helper.from_array(narrow, name)
