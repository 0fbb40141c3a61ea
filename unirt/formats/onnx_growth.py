"""Refuses ONNX graphs whose constants grow beyond all bounds when an engine folds them.

A file of a hundred bytes may say: fill a tensor of 256 GiB with zeros, or double this one forty
times. Engines compute such constants while they compile, and die of it. So sizes of constants, not
the constants themselves, are followed through the operators that make large tensors out of small
ones; the values of small ones too, where they may be somebody's shape.

This is a net for bombs, not shape inference: what an operator without a rule makes is unknown, and
never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from math import ceil, isfinite, prod
from typing import Any, Final, TypeAlias

import numpy as np

from unirt.formats.content import Refusal, size_text
from unirt.formats.onnx_proto import ELEMENT_TYPES, Attribute, Function, Graph, Model, Node, Tensor
from unirt.formats.protobuf import KEPT, Numbers
from unirt.types import Array

Shape: TypeAlias = tuple[int, ...]
FunctionKey: TypeAlias = tuple[str, str, str]
MAX_RANK: Final = 64


@dataclass(frozen=True, slots=True)
class Known:
    """A value of known size; `value` is its content if that is small and may be a shape."""

    shape: Shape
    bits: int
    value: Array | None = None
    constant: bool = True


class Scope:
    """What is known by name, in a graph and in those around it."""

    __slots__ = ("known", "outer")

    def __init__(self, outer: Scope | None = None) -> None:
        self.known: dict[str, Known | None] = {}
        self.outer = outer

    def get(self, name: str) -> Known | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.known:
                return scope.known[name]
            scope = scope.outer
        return None


@dataclass(frozen=True, slots=True)
class Call:
    """A node with what is known of its inputs and attributes."""

    op: str
    inputs: Sequence[Known | None]
    attributes: Mapping[str, Attribute]

    def shape(self, index: int = 0) -> Shape:
        return self.known(index).shape

    def known(self, index: int) -> Known:
        known = self.inputs[index]
        if known is None:
            raise Unknown
        return known

    def value(self, index: int) -> Array:
        value = self.known(index).value
        if value is None:
            raise Unknown
        return value

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def integer(self, name: str, default: int) -> int:
        attribute = self.attributes.get(name)
        return default if attribute is None else attribute.i

    def integers(self, name: str) -> list[int] | None:
        attribute = self.attributes.get(name)
        return None if attribute is None else _ints(attribute.ints)

    def axes(self) -> list[int] | None:
        """Axes, as they stand in an attribute or, since opset 13, in the second input."""
        if self.has(1):
            return _ints_of(self.value(1))
        return self.integers("axes")


class Unknown(Exception):
    """Something decisive is not known: the node is passed over."""


def check_growth(
    model: Model, functions: Mapping[FunctionKey, Function], max_bytes: int, refuse: Refusal
) -> None:
    """Raises ModelError if a constant of the graph, once folded, is larger than `max_bytes`."""
    assert model.graph is not None
    growth = _Growth(functions, max_bytes, refuse)
    # Before IR 4 all weights stood among the inputs; since then, one that does may be replaced.
    inputs = {value.name for value in model.graph.input} if model.ir_version >= 4 else set()
    with np.errstate(all="ignore"):
        growth.graph(model.graph, Scope(), {}, inputs)


class _Growth:
    def __init__(
        self, functions: Mapping[FunctionKey, Function], max_bytes: int, refuse: Refusal
    ) -> None:
        self.functions = functions
        self.max_bytes = max_bytes
        self.refuse = refuse

    def graph(
        self, graph: Graph, scope: Scope, given: Mapping[str, Attribute], variable: set[str]
    ) -> None:
        for value in graph.input:
            scope.known[value.name] = _static_input(value.type)
        for tensor in graph.initializer:
            if tensor.name not in variable:
                scope.known[tensor.name] = _tensor(tensor)
        self.nodes(graph.node, scope, given)

    def nodes(self, nodes: Sequence[Node], scope: Scope, given: Mapping[str, Attribute]) -> None:
        for node in self.ordered(nodes):
            attributes = {
                attribute.name: given.get(attribute.ref_attr_name, attribute)
                if attribute.ref_attr_name
                else attribute
                for attribute in node.attribute
            }
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    if graph is not None:
                        self.graph(graph, Scope(scope), given, set())
            inputs = [scope.get(name) if name else None for name in node.input]
            function = None
            if self.functions:
                key = node.domain or "ai.onnx", node.op_type, node.overload
                function = self.functions.get(key)
            if function is not None:
                results = self.call(function, inputs, attributes)
            elif node.domain in ("", "ai.onnx"):
                results = [self.result(node, inputs, attributes)]
            else:
                results = []
            for name, result in zip(node.output, results, strict=False):
                if result is not None:
                    self.check(node, name, result)
                    scope.known[name] = result

    def call(
        self,
        function: Function,
        inputs: Sequence[Known | None],
        attributes: Mapping[str, Attribute],
    ) -> list[Known | None]:
        """The results of a local function, as if inlined; recursion has been excluded before."""
        scope = Scope()
        scope.known.update(zip(function.input, inputs, strict=False))
        defaults = {attribute.name: attribute for attribute in function.attribute_proto}
        self.nodes(function.node, scope, {**defaults, **attributes})
        return [scope.get(name) for name in function.output]

    def result(
        self, node: Node, inputs: Sequence[Known | None], attributes: Mapping[str, Attribute]
    ) -> Known | None:
        rule = _RULES.get(node.op_type)
        if rule is None:
            return None
        only_shape = node.op_type in _OF_SHAPE
        for name, known in zip(node.input, inputs, strict=True):
            if name and (known is None or not (known.constant or only_shape)):
                return None
        call = Call(node.op_type, inputs, attributes)
        try:
            result = rule(call)
            if len(result.shape) > MAX_RANK or min(result.shape, default=0) < 0:
                return None
            if result.value is None and prod(result.shape) <= KEPT:
                return Known(result.shape, result.bits, _evaluate(call))
            return result
        except (Unknown, ArithmeticError, LookupError, TypeError, ValueError):
            return None  # Not a bomb, perhaps not valid: that is for the engine to say.

    def check(self, node: Node, name: str, result: Known) -> None:
        nbytes = prod(result.shape) * max(result.bits, 8) // 8
        if result.constant and nbytes > self.max_bytes:
            raise self.refuse(
                f"has a constant {name!r} larger than models may be.",
                f"The limit is {size_text(self.max_bytes)}, and its {node.op_type} node makes a "
                f"tensor of shape {list(result.shape)} out of constants, {size_text(nbytes)}.",
                "If you trust the file, raise the limit with Model(..., max_bytes=...) or "
                "UNIRT_MAX_MODEL_BYTES.",
                tensor=name,
                max_bytes=self.max_bytes,
            )

    def ordered(self, nodes: Sequence[Node]) -> Iterable[Node]:
        """The nodes with every one after those it reads from, as they usually are already."""
        writer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
        if all(
            writer.get(name, -1) < index for index, node in enumerate(nodes) for name in node.input
        ):
            return nodes
        graph = {
            index: {writer[name] for name in node.input if name in writer}
            for index, node in enumerate(nodes)
        }
        try:
            return [nodes[index] for index in TopologicalSorter(graph).static_order()]
        except CycleError as error:
            raise self.refuse(
                "has a graph that runs in a circle.",
                "Some nodes need, over others, their own results.",
                "Fetch or export the model again.",
            ) from error


# What is known from the file


def _static_input(type_: Any) -> Known | None:
    """A graph input of static shape: not constant, but its shape is."""
    tensor = type_.tensor_type if type_ is not None else None
    if tensor is None or tensor.shape is None or tensor.elem_type not in ELEMENT_TYPES:
        return None
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    if len(sizes) > MAX_RANK or any(size is None or size < 0 for size in sizes):
        return None
    return Known(tuple(sizes), ELEMENT_TYPES[tensor.elem_type].bits, constant=False)


def _tensor(tensor: Tensor) -> Known:
    """A tensor that passed its checks."""
    dtype = ELEMENT_TYPES[tensor.data_type]
    shape = tuple(_ints(tensor.dims))
    value: Array | None = None
    if prod(shape) <= KEPT and dtype.name in _PLAIN:
        numbers = getattr(tensor, dtype.field)
        if tensor.raw_data is not None:
            value = np.frombuffer(tensor.raw_data, np.dtype(dtype.name).newbyteorder("<"))
        elif isinstance(numbers, Numbers) and numbers.complete:
            value = np.array(numbers.values).astype(dtype.name)
        value = value.reshape(shape) if value is not None else None
    return Known(shape, dtype.bits, value)


_PLAIN: Final = frozenset(
    ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
)


def _ints(numbers: Numbers | None) -> list[int]:
    return [int(value) for value in numbers.values] if numbers else []


def _ints_of(value: Array) -> list[int]:
    return [int(size) for size in value.reshape(-1).tolist()]


def _sizes(value: Array) -> Shape:
    sizes = tuple(_ints_of(value))
    if any(size < 0 for size in sizes):
        raise Unknown
    return sizes


def _dtype_bits(number: int) -> int:
    return ELEMENT_TYPES[number].bits


# Rules: the size of a node's first output


def _constant(call: Call) -> Known:
    attribute = next(iter(call.attributes.values()), Attribute())
    match attribute.name:
        case "value" if attribute.t is not None:
            return _tensor(attribute.t)
        case "value_int":
            return Known((), 64, np.array(attribute.i, np.int64))
        case "value_float":
            return Known((), 32, np.array(attribute.f, np.float32))
        case "value_ints" | "value_floats":
            numbers = attribute.ints if attribute.name == "value_ints" else attribute.floats
            if numbers is None or not numbers.complete:
                raise Unknown
            value = np.array(numbers.values, np.int64 if numbers is attribute.ints else np.float32)
            return Known(value.shape, 64, value)
        case "sparse_value" if attribute.sparse_tensor is not None:
            sparse = attribute.sparse_tensor
            assert sparse.values is not None
            return Known(tuple(_ints(sparse.dims)), _dtype_bits(sparse.values.data_type))
    raise Unknown


def _constant_of_shape(call: Call) -> Known:
    fill = call.attributes.get("value")
    bits = _dtype_bits(fill.t.data_type) if fill is not None and fill.t is not None else 32
    return Known(_sizes(call.value(0)), bits)


def _random(call: Call) -> Known:
    shape = call.integers("shape")
    if shape is None or any(size < 0 for size in shape):
        raise Unknown
    return Known(tuple(shape), _dtype_bits(call.integer("dtype", 1)))


def _same(call: Call) -> Known:
    return Known(call.shape(), call.known(0).bits)


def _cast(call: Call) -> Known:
    return Known(call.shape(), _dtype_bits(call.integer("to", call.integer("dtype", 1))))


def _elementwise(call: Call) -> Known:
    known = [item for item in call.inputs if item is not None]
    bits = 8 if call.op in _COMPARISONS else max(item.bits for item in known)
    return Known(_broadcast(*(item.shape for item in known)), bits)


def _broadcast(*shapes: Shape) -> Shape:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    # Of sizes that do not fit the engine will complain.
    return tuple(0 if 0 in sizes else max(sizes) for sizes in zip(*padded, strict=True))


def _expand(call: Call) -> Known:
    return Known(_broadcast(call.shape(), _sizes(call.value(1))), call.known(0).bits)


def _tile(call: Call) -> Known:
    repeats = _sizes(call.value(1))
    sizes = zip(call.shape(), repeats, strict=True)
    return Known(tuple(size * repeat for size, repeat in sizes), call.known(0).bits)


def _range(call: Call) -> Known:
    start, limit, delta = (call.value(index).item() for index in range(3))
    steps = (limit - start) / delta
    if not isfinite(steps):
        raise Unknown
    return Known((max(0, ceil(steps)),), call.known(0).bits)


def _concat(call: Call) -> Known:
    shapes = [call.shape(index) for index in range(len(call.inputs))]
    axis = call.integer("axis", 1)
    shape = list(shapes[0])
    shape[axis] = sum(other[axis] for other in shapes)
    return Known(tuple(shape), call.known(0).bits)


def _matmul(call: Call) -> Known:
    a, b = call.shape(0), call.shape(1)
    left = a if len(a) > 1 else (1, *a)
    right = b if len(b) > 1 else (*b, 1)
    shape = (*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])
    return Known(shape, max(call.known(0).bits, 32 if call.op == "MatMulInteger" else 0))


def _gemm(call: Call) -> Known:
    a, b = call.shape(0), call.shape(1)
    rows = a[1] if call.integer("transA", 0) else a[0]
    columns = b[0] if call.integer("transB", 0) else b[1]
    return Known((rows, columns), call.known(0).bits)


def _einsum(call: Call) -> Known:
    attribute = call.attributes["equation"]
    if attribute.s is None:
        raise Unknown
    left, arrow, right = bytes(attribute.s).decode("ascii").replace(" ", "").partition("->")
    if not arrow or "." in left:
        raise Unknown
    size: dict[str, int] = {}
    for index, letters in enumerate(left.split(",")):
        size.update(zip(letters, call.shape(index), strict=True))
    return Known(tuple(size[letter] for letter in right), call.known(0).bits)


def _transpose(call: Call) -> Known:
    shape = call.shape()
    perm = call.integers("perm") or list(reversed(range(len(shape))))
    return Known(tuple(shape[axis] for axis in perm), call.known(0).bits)


def _reshape(call: Call) -> Known:
    shape = call.shape()
    wanted = _ints_of(call.value(1)) if call.has(1) else call.integers("shape") or []
    if not call.integer("allowzero", 0):
        wanted = [shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if -1 in wanted:
        rest = -prod(wanted)
        wanted[wanted.index(-1)] = prod(shape) // rest if rest else 0
    if prod(wanted) != prod(shape):
        raise Unknown
    return Known(tuple(wanted), call.known(0).bits)


def _unsqueeze(call: Call) -> Known:
    axes = call.axes() or []
    shape = list(call.shape())
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return Known(tuple(shape), call.known(0).bits)


def _squeeze(call: Call) -> Known:
    shape, axes = call.shape(), call.axes()
    if axes is None:
        return Known(tuple(size for size in shape if size != 1), call.known(0).bits)
    gone = {axis % len(shape) for axis in axes}
    sizes = (size for axis, size in enumerate(shape) if axis not in gone)
    return Known(tuple(sizes), call.known(0).bits)


def _shape(call: Call) -> Known:
    sizes = np.array(call.shape(), np.int64)[call.integer("start", 0) :]
    if "end" in call.attributes:
        sizes = np.array(call.shape()[call.integer("start", 0) : call.integer("end", 0)], np.int64)
    return Known(sizes.shape, 64, sizes)


def _size(call: Call) -> Known:
    return Known((), 64, np.array(prod(call.shape()), np.int64))


def _gather(call: Call) -> Known:
    shape, axis = call.shape(), call.integer("axis", 0)
    axis %= len(shape)
    return Known((*shape[:axis], *call.shape(1), *shape[axis + 1 :]), call.known(0).bits)


def _slice(call: Call) -> Known:
    # Only of small values, where it is computed; larger ones it makes smaller.
    value = call.value(0)
    starts, ends = _ints_of(call.value(1)), _ints_of(call.value(2))
    axes = _ints_of(call.value(3)) if call.has(3) else list(range(len(starts)))
    steps = _ints_of(call.value(4)) if call.has(4) else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index: list[slice] = [slice(None)] * value.ndim
        # An end before the beginning, as in reversing slices, means: down to the first.
        stop = None if step < 0 and end < -value.shape[axis] else end
        index[axis] = slice(start, stop, step)
        value = value[tuple(index)]
    return Known(value.shape, call.known(0).bits, value)


def _reduce(call: Call) -> Known:
    value, axes = call.value(0), call.axes()
    reduce: Any = _REDUCTIONS[call.op]
    keep = bool(call.integer("keepdims", 1))
    result = np.asarray(reduce(value, axis=tuple(axes) if axes else None, keepdims=keep))
    return Known(result.shape, call.known(0).bits, result)


def _pad(call: Call) -> Known:
    shape = call.shape()
    pads = _ints_of(call.value(1)) if call.has(1) else call.integers("pads") or []
    axes = _ints_of(call.value(3)) if call.has(3) else list(range(len(shape)))
    sizes = list(shape)
    for position, axis in enumerate(axes):
        sizes[axis] += pads[position] + pads[position + len(axes)]
    return Known(tuple(max(0, size) for size in sizes), call.known(0).bits)


def _one_hot(call: Call) -> Known:
    depth, *_ = _sizes(call.value(1))
    return Known((*call.shape(), depth), call.known(2).bits)


def _resize(call: Call) -> Known:
    sizes_at, scales_at = 3, 1 if call.op == "Upsample" or len(call.inputs) == 2 else 2
    if call.has(sizes_at) and call.shape(sizes_at) != (0,):
        return Known(_sizes(call.value(sizes_at)), call.known(0).bits)
    scales = call.value(scales_at).reshape(-1).tolist()
    sizes = zip(call.shape(), scales, strict=True)
    return Known(tuple(int(size * scale) for size, scale in sizes), call.known(0).bits)


def _eye_like(call: Call) -> Known:
    bits = (
        _dtype_bits(call.integer("dtype", 0)) if "dtype" in call.attributes else call.known(0).bits
    )
    return Known(call.shape(), bits)


def _window(call: Call) -> Known:
    size, *_ = _sizes(call.value(0))
    return Known((size,), _dtype_bits(call.integer("output_datatype", 1)))


_COMPARISONS: Final = frozenset(
    ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not")
)
_OF_SHAPE: Final = frozenset(("Shape", "Size"))
_REDUCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
}
_RULES_OF: Final[Sequence[tuple[Callable[[Call], Known], str]]] = (
    (
        _elementwise,
        "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less "
        "LessOrEqual Max Mean Min Mod Mul Not Or PRelu Pow Sub Sum Where Xor",
    ),
    (
        _same,
        "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Clip Cos Cosh CumSum Elu Erf "
        "Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log LogSoftmax Mish Neg "
        "RandomNormalLike RandomUniformLike Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh "
        "Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Trilu",
    ),
    (_cast, "Cast"),
    (_concat, "Concat"),
    (_constant, "Constant"),
    (_constant_of_shape, "ConstantOfShape"),
    (_einsum, "Einsum"),
    (_expand, "Expand"),
    (_eye_like, "EyeLike"),
    (_gather, "Gather"),
    (_gemm, "Gemm"),
    (_matmul, "MatMul MatMulInteger"),
    (_one_hot, "OneHot"),
    (_pad, "Pad"),
    (_random, "RandomNormal RandomUniform"),
    (_range, "Range"),
    (_reduce, "ReduceMax ReduceMin ReduceProd ReduceSum"),
    (_reshape, "Reshape"),
    (_resize, "Resize Upsample"),
    (_shape, "Shape"),
    (_size, "Size"),
    (_slice, "Slice"),
    (_squeeze, "Squeeze"),
    (_tile, "Tile"),
    (_transpose, "Transpose"),
    (_unsqueeze, "Unsqueeze"),
    (_window, "BlackmanWindow HammingWindow HannWindow"),
)
_RULES: Final = {op: rule for rule, ops in _RULES_OF for op in ops.split()}


# Small values, where a shape may be computed from them


def _evaluate(call: Call) -> Array | None:
    compute = _COMPUTE.get(call.op)
    if compute is None:
        return None
    try:
        values = [call.value(index) for index in range(len(call.inputs)) if call.has(index)]
        return np.asarray(compute(call, *values))
    except (Unknown, ArithmeticError, LookupError, TypeError, ValueError):
        return None


def _divide(_: Call, a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":
        return np.asarray(np.trunc(a / b)).astype(a.dtype)
    return np.asarray(a / b)


def _cast_value(call: Call, value: Array) -> Array:
    name = ELEMENT_TYPES[call.integer("to", 1)].name
    if name not in _PLAIN:
        raise Unknown
    return value.astype(name)


_COMPUTE: Final[Mapping[str, Callable[..., Any]]] = {
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": _divide,
    "Pow": lambda _, a, b: np.power(a, b),
    "Max": lambda _, *values: np.maximum.reduce(values),
    "Min": lambda _, *values: np.minimum.reduce(values),
    "Abs": lambda _, a: np.abs(a),
    "Neg": lambda _, a: -a,
    "Ceil": lambda _, a: np.ceil(a),
    "Floor": lambda _, a: np.floor(a),
    "Sqrt": lambda _, a: np.sqrt(a),
    "Exp": lambda _, a: np.exp(a),
    "Identity": lambda _, a: a,
    "Cast": _cast_value,
    "Equal": lambda _, a, b: a == b,
    "Where": lambda _, test, a, b: np.where(test, a, b),
    "Concat": lambda call, *values: np.concatenate(values, axis=call.integer("axis", 0)),
    "ConstantOfShape": lambda call, shape: np.full(_ints_of(shape), _fill(call)),
    "Expand": lambda _, a, shape: a * np.ones(_ints_of(shape), a.dtype),
    "Gather": lambda call, a, index: np.take(a, index, axis=call.integer("axis", 0)),
    "Range": lambda _, start, limit, delta: np.arange(start, limit, delta),
    "Reshape": lambda call, a, *_: a.reshape(_reshape(call).shape),
    "Squeeze": lambda call, a, *_: a.reshape(_squeeze(call).shape),
    "Tile": lambda _, a, repeats: np.tile(a, _ints_of(repeats)),
    "Transpose": lambda call, a: a.transpose(call.integers("perm")),
    "Unsqueeze": lambda call, a, *_: a.reshape(_unsqueeze(call).shape),
}


def _fill(call: Call) -> Any:
    fill = call.attributes.get("value")
    if fill is None or fill.t is None:
        return np.float32(0)
    value = _tensor(fill.t).value
    if value is None:
        raise Unknown
    return value.reshape(-1)[0]
