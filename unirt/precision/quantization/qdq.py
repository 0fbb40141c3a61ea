"""Writes a placement into a graph: weights as small integers or floats, Q/DQ pairs around tensors.

Everything follows ONNX's definitions of QuantizeLinear and DequantizeLinear: q = round(x / scale) +
zero point, saturated to the type. Scales are float32, and never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unirt.precision.calibration.moments import SecondMoments
from unirt.precision.calibration.ranges import Range
from unirt.precision.prepare import Graph, groups
from unirt.precision.quantization.placement import ACTIVATIONS, MOVING, Placement, Weight
from unirt.precision.quantization.recipes import Recipe
from unirt.precision.quantization.rounding import balanced, compensated, order_of

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

# Numbers of onnx.TensorProto.
_UINT8, _INT8, _INT32, _FP8, _INT4 = 2, 3, 6, 17, 22
_TINY: Final = 1e-30
"""Weights and values below this are none: their scale would leave float32's normal numbers."""
_ONE_SCALE_NOISE: Final = 4.0  # times the power of rounding errors: one bit of a weight's eight
_UNEVEN: Final = 8.0  # channels that share a scale differ by so much: the small ones lose 3 bits
_BIAS_LIMIT: Final = 2.0**30  # half of what int32 holds, so that a sum still fits


@dataclass(frozen=True)
class Kind:
    """A type to quantize to: its number in ONNX, its name in names, and its largest value."""

    number: int
    name: str
    limit: float


FP8: Final = Kind(_FP8, "fp8", 448.0)
INT4: Final = Kind(_INT4, "int4", 7.0)
UINT8: Final = Kind(_UINT8, "uint8", 255.0)
INT8: Final = Kind(_INT8, "int8", 127.0)


def write(
    graph: Graph,
    placement: Placement,
    recipe: Recipe,
    weight_kind: Kind,
    activation_kind: Kind | None,
    block: int | None,
    moments: SecondMoments | None = None,
) -> list[str]:
    """Changes the graph. Returns notes on what could not be quantized as it should."""
    writer = _Writer(graph, placement, recipe, weight_kind, activation_kind, block, moments)
    writer.run()
    return writer.notes


class _Writer:
    def __init__(
        self,
        graph: Graph,
        placement: Placement,
        recipe: Recipe,
        weight_kind: Kind,
        activation_kind: Kind | None,
        block: int | None,
        moments: SecondMoments | None,
    ) -> None:
        self._graph = graph
        self._placement = placement
        self._recipe = recipe
        self._weight_kind = weight_kind
        self._activation_kind = activation_kind
        self._block = block
        self._moments = moments
        self._rounded_on_data = 0
        self._parameters: dict[str, tuple[np.float32, int]] = {}
        self._pairs: dict[str, list[onnx.NodeProto]] = {}  # by the tensor they quantize
        self._before: dict[str, list[onnx.NodeProto]] = {}  # by the node that reads them first
        self._written: dict[tuple[str, int, int | None, bytes], str] = {}
        self.notes: list[str] = []

    def run(self) -> None:
        for name, range_ in self._placement.ranges.items():
            self._parameters[name] = self._activation_parameters(name, range_)
        dead: list[str] = []
        for weight in self._placement.weights:
            self._write_weight(weight, dead)
        if dead:
            shown = ", ".join(dead[:3]) + ("…" if len(dead) > 3 else "")
            self.notes.append(
                f"output channels whose weights are all 0 got the scale of the others: {shown}"
            )
        if self._moments is not None and self._weight_kind is not FP8:
            self.notes.append(
                f"{self._rounded_on_data} of {len(self._written)} weights were rounded so that "
                f"errors cancel out on {self._moments.samples:,} samples"
            )
        for name, readers in self._placement.readers.items():
            self._write_pair(name, readers)
        self._order()

    # Weights

    def _write_weight(self, weight: Weight, dead: list[str]) -> None:
        array = self._graph.array(weight.name)
        assert array is not None
        if weight.blocked is None:
            scale, count = self._channel_scales(weight, array)
        else:
            scale, count = self._block_scales(weight, array)
        one = self._recipe.one_scale and self._takes_one_scale(weight, scale)
        if one or self._must_have_one_scale(weight, array):
            scale = np.asarray(scale.max())
        elif weight.blocked is None:
            self._tell_shared(weight, array)
        if count:
            dead.append(f"{count} of {weight.name!r}")
        key = weight.name, weight.axis, weight.blocked, scale.tobytes()
        if key not in self._written:
            self._written[key] = self._dequantized(weight, array, scale)
        weight.node.input[weight.position] = self._written[key]
        if self._recipe.integer_bias and weight.blocked is None:
            self._write_bias(weight.node, scale)

    def _takes_one_scale(self, weight: Weight, scale: Array) -> bool:
        """Whether one for all channels costs little: much noise would come into those that need
        less. fp8 keeps its digits whatever the scale.
        """
        if self._activation_kind is None or weight.node.op_type not in ("Gemm", "MatMul"):
            return False
        noise = float(np.mean(scale.astype(np.float64) ** 2))
        return self._weight_kind is FP8 or float(scale.max()) ** 2 <= _ONE_SCALE_NOISE * noise

    def _must_have_one_scale(self, weight: Weight, array: Array) -> bool:
        """Whether it is a batch of matrices in a product that may be computed with the quantization
        of its result: ONNX Runtime does so, and then refuses a scale for each column.
        """
        if self._activation_kind is None or not _is_batched(weight, array):
            return False
        names = list(weight.node.output)
        for name in names:
            if name in self._placement.ranges:
                return True
            for reader, _ in self._graph.readers.get(name, []):
                if reader.op_type in MOVING | ACTIVATIONS:
                    names += [one for one in reader.output if one]
        return False

    def _tell_shared(self, weight: Weight, array: Array) -> None:
        """A note if channels of a ConvTranspose share the scale of much larger ones. fp8 keeps its
        digits whatever the scale.
        """
        parts = groups(weight.node)
        if weight.node.op_type != "ConvTranspose" or parts == 1 or self._weight_kind is FP8:
            return
        grouped = np.abs(array).reshape(parts, -1, *array.shape[1:])
        sizes = grouped.max(axis=(1, *range(3, grouped.ndim)))  # by group and channel inside it
        sharing = 1 - weight.axis
        smallest = np.where(sizes < _TINY, np.inf, sizes).min(axis=sharing)
        factor = float((sizes.max(axis=sharing) / smallest).max())
        if factor >= _UNEVEN:
            self.notes.append(
                f"in {weight.node.name!r} channels of its {parts} groups share scales, and weights "
                f"of some are {factor:,.0f} times as large as of others, which lose precision"
            )

    def _write_bias(self, node: onnx.NodeProto, scale: Array) -> None:
        """The bias as int32 in multiples of activation scale times weight scale, where it is one
        value for each channel: the sums of integers that it is added to count in these.
        """
        from onnx import helper

        parameters = self._parameters.get(node.input[0])
        factors = {a.name: a.f for a in node.attribute if a.name in ("alpha", "beta")}
        place = self._bias(node, scale.size)
        bias = None if place is None else self._graph.array(place[0].input[place[1]])
        if place is None or bias is None or parameters is None or bias.shape != scale.shape:
            return
        if any(factor != 1 for factor in factors.values()) or not np.isfinite(bias).all():
            return
        unit = (scale * parameters[0]).astype(np.float32)
        if not (unit > 0).all():
            return
        whole = np.rint(bias.astype(np.float64) / unit)
        reader, position = place
        name = reader.input[position]
        inputs = [
            self._graph.add_tensor(_tensor(f"{name}__int32", whole, _INT32)),
            self._graph.add(f"{name}__scale", unit),
        ]
        made = self._graph.names.fresh(f"{name}__dequantized")
        label = self._graph.node_names.fresh(f"{name}__dequantize")
        dequantize = helper.make_node("DequantizeLinear", inputs, [made], label, axis=0)
        self._before.setdefault(node.name, []).append(dequantize)
        reader.input[position] = made

    def _bias(self, node: onnx.NodeProto, channels: int) -> tuple[onnx.NodeProto, int] | None:
        """Who reads the bias of a product, and at which position.

        That of a MatMul is added behind it. ONNX Runtime makes one Gemm of the two whatever their
        shape, and leaves it in float32 where the bias is not int32.
        """
        if node.op_type != "MatMul":
            return (node, 2) if len(node.input) > 2 and node.input[2] else None
        behind = self._graph.only_reader(node.output[0])
        if behind is None or behind.op_type != "Add" or behind.domain:
            return None
        position = 1 if behind.input[0] == node.output[0] else 0
        bias = self._graph.array(behind.input[position])
        if bias is None or bias.dtype != np.float32 or bias.shape != (channels,):
            return None
        return None if node.output[0] in self._parameters else (behind, position)

    def _channel_scales(self, weight: Weight, array: Array) -> tuple[Array, int]:
        others = tuple(at for at in range(array.ndim) if at != weight.axis)
        largest = np.abs(array).max(axis=others).astype(np.float64)
        dead = largest < _TINY
        # A dead channel still has a bias, which some engines write in multiples of this scale.
        largest[dead] = largest.max() if not dead.all() else 1.0
        scale = largest / self._weight_kind.limit
        if self._recipe.pair_limit and self._activation_kind is not None:
            # Rounding, the balanced one included, adds less than 1 to each of the two.
            largest = order_of(weight, array).largest_pair(array)
            scale = np.maximum(scale, largest / (self._recipe.pair_limit - 2))
        scale = np.maximum(scale, self._bias_floor(weight, scale.size))
        return scale.astype(np.float32), int(dead.sum())

    def _bias_floor(self, weight: Weight, channels: int) -> Array:
        """Scales below these would make the biases overflow int32, where they become that."""
        node = weight.node
        floor = np.zeros(channels)
        place = self._bias(node, channels)
        if not self._recipe.integer_bias or place is None:
            return floor
        bias = self._graph.array(place[0].input[place[1]])
        parameters = self._parameters.get(node.input[0])
        if bias is None or parameters is None or not np.isfinite(bias).all():
            return floor
        size = np.broadcast_to(np.abs(bias.astype(np.float64)).max(initial=0), channels)
        if bias.shape == (channels,):
            size = np.abs(bias.astype(np.float64))
        return size / (float(parameters[0]) * _BIAS_LIMIT)

    def _block_scales(self, weight: Weight, array: Array) -> tuple[Array, int]:
        assert self._block is not None
        assert weight.blocked is not None
        axis, block = weight.blocked, self._block
        shape = list(array.shape)
        shape[axis : axis + 1] = [shape[axis] // block, block]
        largest = np.abs(array.reshape(shape)).max(axis=axis + 1).astype(np.float64)
        largest[largest < _TINY] = max(float(largest.max()), 1.0 if not largest.any() else _TINY)
        return (largest / self._weight_kind.limit).astype(np.float32), 0

    def _dequantized(self, weight: Weight, array: Array, scale: Array) -> str:
        """The name of the tensor that a DequantizeLinear makes of the small weight."""
        from onnx import helper

        kind = self._weight_kind
        axis = weight.axis if weight.blocked is None else weight.blocked
        spread = scale
        if weight.blocked is not None:
            spread = np.repeat(scale, self._block or 1, axis)
        elif scale.ndim:
            spread = scale.reshape([-1 if at == axis else 1 for at in range(array.ndim)])
        values = self._rounded(weight, array, scale, spread)
        small = self._graph.add_tensor(_tensor(f"{weight.name}__{kind.name}", values, kind.number))
        inputs = [small, self._graph.add(f"{weight.name}__scale", scale)]
        attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        if weight.blocked is not None:
            attributes["block_size"] = self._block or 1
        elif not (scale.ndim and _is_batched(weight, array)):
            zeros = np.zeros(scale.shape, np.float32)
            zero = _tensor(f"{weight.name}__zero_point", zeros, kind.number)
            inputs.append(self._graph.add_tensor(zero))
        made = self._graph.names.fresh(f"{weight.name}__dequantized")
        label = self._graph.node_names.fresh(f"{weight.name}__dequantize")
        node = helper.make_node("DequantizeLinear", inputs, [made], label, **attributes)
        self._before.setdefault(weight.node.name, []).append(node)
        return made

    def _rounded(self, weight: Weight, array: Array, scale: Array, spread: Array) -> Array:
        """The weight in multiples of its scale, which `spread` has for each value, rounded."""
        kind, moments = self._weight_kind, self._moments
        found = None
        if moments is not None and kind is not FP8:
            found = moments.of(weight.node, array.shape)
        if moments is not None and found is not None:
            pair = self._recipe.pair_limit if self._activation_kind is not None else None
            key = weight.name, weight.axis, weight.blocked, kind.name, pair, scale.tobytes()
            if key not in moments.rounded:
                steps, order = np.broadcast_to(spread, array.shape), order_of(weight, array)
                moments.rounded[key] = compensated(array, steps, order, found, kind.limit, pair)
            whole = moments.rounded[key]
            if whole is not None:
                self._rounded_on_data += 1
                return whole
        near = np.clip(array / spread, -kind.limit, kind.limit)
        return near if kind is FP8 else balanced(near, weight.axis, kind.limit)

    # Activations

    def _activation_parameters(self, name: str, range_: Range) -> tuple[np.float32, int]:
        """Scale and zero point of a tensor."""
        assert self._activation_kind is not None
        low, high = range_.low, range_.high
        low, high = min(low, 0.0), max(high, 0.0)  # 0 must be exact: it pads
        if range_.empty:
            self.notes.append(f"{name!r} is 0 throughout its range, so its scale is 1")
            return np.float32(1), 0
        if self._activation_kind.number != _UINT8:
            return np.float32(max(-low, high) / self._activation_kind.limit), 0
        scale = (high - low) / 255
        return np.float32(scale), int(np.clip(np.rint(-low / scale), 0, 255))

    def _write_pair(self, name: str, readers: list[tuple[onnx.NodeProto, int]]) -> None:
        from onnx import helper

        kind = self._activation_kind
        assert kind is not None
        graph = self._graph
        scale, zero = self._parameters[name]
        source, result = name, graph.names.fresh(f"{name}__dequantized")
        if name in graph.outputs and self._recipe.outputs and name in graph.makers:
            # The output keeps its name, and what makes it gives integers like everything else.
            source, result = graph.names.fresh(f"{name}__float"), name
            maker = graph.makers[name]
            maker.output[:] = [source if n == name else n for n in maker.output]
        else:
            for reader, position in readers:
                reader.input[position] = result
        small = graph.names.fresh(f"{name}__{kind.name}")
        parameters = [
            graph.add(f"{name}__scale", np.array(scale)),
            graph.add_tensor(_tensor(f"{name}__zero_point", np.array(float(zero)), kind.number)),
        ]
        self._pairs[name] = [
            helper.make_node(
                "QuantizeLinear",
                [source, *parameters],
                [small],
                graph.node_names.fresh(f"{name}__quantize"),
            ),
            helper.make_node(
                "DequantizeLinear",
                [small, *parameters],
                [result],
                graph.node_names.fresh(f"{name}__dequantize"),
            ),
        ]

    def _order(self) -> None:
        """Puts each new node behind what makes its input, in front of what reads it."""
        nodes: list[onnx.NodeProto] = []
        behind = {pair[0].input[0]: pair for pair in self._pairs.values()}
        made = {name for node in self._graph.nodes for name in node.output}
        for source, pair in behind.items():
            if source not in made:
                nodes += pair
        for node in self._graph.nodes:
            nodes += self._before.get(node.name, [])
            nodes.append(node)
            for name in node.output:
                nodes += behind.get(name, [])
        self._graph.nodes = nodes


def _is_batched(weight: Weight, array: Array) -> bool:
    """Whether it is a batch of matrices. ONNX Runtime multiplies by one with a scale for each
    column, but by none with a zero point for each.
    """
    return weight.node.op_type == "MatMul" and array.ndim > 2


def _tensor(name: str, values: Array, number: int) -> onnx.TensorProto:
    """A tensor of a small type. int4 is packed two to a byte, the first in the lower half."""
    from onnx import TensorProto, helper, numpy_helper

    if number == _INT4:
        nibbles = values.astype(np.int8).reshape(-1).view(np.uint8) & 0xF
        nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
        packed = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)
        tensor = TensorProto(name=name, dims=values.shape, data_type=number)
        tensor.raw_data = packed.tobytes()
        return tensor
    dtype = helper.tensor_dtype_to_np_dtype(number)
    wide = values if number == _INT32 else values.astype(np.float32)
    return numpy_helper.from_array(wide.astype(dtype), name)
