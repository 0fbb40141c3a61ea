"""A quantized graph, asked by node and tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from unirt.inspection import CONTRACTING, DEQUANTIZE, QUANTIZE

if TYPE_CHECKING:
    import onnx

Q_DQ = frozenset({QUANTIZE, DEQUANTIZE})
UINT8, INT8 = 2, 3  # of onnx.TensorProto.DataType
# Of these inputs the others are shapes, scales or indices, not what is computed with.
ALL_INPUTS = frozenset({"Add", "Sub", "Mul", "Div", "Concat", "Sum", "Min", "Max", "MatMul"})
# What these give is what they were given, in another type or order: Q/DQ work through them.
HANDING_ON = frozenset(
    {"Cast", "CastLike", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
)


class Graph:
    """The quantized graph's nodes: what they do, what feeds them, who reads them.

    Who feeds and who reads is told through nodes that only hand on: through the casts of a graph
    that is half in fp16, the Transpose that exporters put behind a weight, and their like.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self.ops = {node.name: node.op_type for node in graph.node}
        self._nodes = {node.name: node for node in graph.node}
        self._places = {name: place for place, name in enumerate(self.ops)}
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(filter(None, node.input)):
                self._readers.setdefault(name, []).append(node)
        stored = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    stored[node.output[0]] = attribute.t
        self._stored = stored
        self._constant = set(stored)
        for node in graph.node:
            if node.op_type == "Constant" or (
                node.input and all(name in self._constant for name in node.input if name)
            ):
                self._constant |= set(node.output)
        self.inputs = {value.name for value in graph.input} - set(stored)
        self.outputs = {value.name for value in graph.output}

    # What a node is

    def quantizes(self, name: str) -> bool:
        return self.ops.get(name) in Q_DQ

    def hands_on(self, name: str) -> bool:
        return self.ops.get(name) in HANDING_ON

    def contracts(self, name: str) -> bool:
        return CONTRACTING.search(self.ops.get(name, "")) is not None

    def is_constant(self, name: str) -> bool:
        """Whether what a node gives depends on no input: weights, and their fake quantization."""
        node = self._nodes.get(name)
        return node is not None and self._constant.issuperset(node.output)

    def told(self, name: str) -> str:
        """`Conv 'conv1'`."""
        return f"{self.ops.get(name, 'node')} {name!r}"

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Each once, as they stand in the file."""
        return sorted(set(names), key=self._places.__getitem__)

    # What it reads

    def data(self, name: str) -> list[str]:
        """The inputs that a node computes with and that are no constants."""
        node = self._nodes.get(name)
        if node is None:
            return []
        given = [one for one in node.input if one]
        if node.op_type not in ALL_INPUTS:
            given = given[:1]
        return [one for one in given if one not in self._constant]

    def weight(self, name: str) -> str | None:
        """The constant operand of a node, if it has one."""
        node = self._nodes.get(name)
        if node is None or not (self.contracts(name) or node.op_type in ALL_INPUTS):
            return None
        return next((one for one in reversed(node.input[:2]) if one in self._constant), None)

    def bias(self, name: str) -> str | None:
        """The constant that a product adds itself, or that an Add behind a MatMul does."""
        node = self._nodes.get(name)
        if node is None:
            return None
        given = node.input[2] if len(node.input) > 2 else ""
        if not given and (behind := self.readers(name)) and self.adds_bias(behind[0]):
            given = self.weight(behind[0]) or ""
        return given if given in self._constant else None

    def adds_bias(self, name: str) -> bool:
        """Whether a node adds a constant to what a MatMul gives, Q/DQ between them or not."""
        if self.ops.get(name) != "Add" or self.weight(name) is None:
            return False
        (given,) = self.data(name) or ("",)
        before = self.maker(given)
        if before is not None and self.ops[before] == DEQUANTIZE:
            before = self.source(before)
        return before is not None and self.ops[before] == "MatMul"

    def is_quantized(self, name: str) -> bool:
        """Whether a contraction reads both its operands through DequantizeLinear."""
        node = self._nodes.get(name)
        operands = [one for one in node.input[:2] if one] if node is not None else []
        return len(operands) > 1 and all(self.dequantizer(one) for one in operands)

    def limits(self, name: str) -> tuple[float, float]:
        """Where a Relu or Clip cuts off; without end where that is not known."""
        node = self._nodes[name]
        low, high = -float("inf"), float("inf")
        if node.op_type == "Relu":
            return 0.0, high
        given = {one.name: one.f for one in node.attribute}
        ends = [given.get("min", low), given.get("max", high)]
        for place, tensor in enumerate(node.input[1:3]):
            value = self._array(tensor) if tensor else None
            if value is not None and value.size == 1:
                ends[place] = float(value.reshape(()))
        return ends[0], ends[1]

    # Around it

    def origin(self, tensor: str) -> str:
        """The tensor whose values these are, in another type or order."""
        while (maker := self._makers.get(tensor)) is not None and maker.op_type in HANDING_ON:
            tensor = maker.input[0]
        return tensor

    def maker(self, tensor: str) -> str | None:
        node = self._makers.get(self.origin(tensor))
        return node.name if node is not None else None

    def dequantizer(self, tensor: str) -> str | None:
        """The DequantizeLinear that a tensor comes from."""
        name = self.maker(tensor)
        return name if name is not None and self.ops[name] == DEQUANTIZE else None

    def pair(self, dequantizer: str) -> str | None:
        """The QuantizeLinear of a pair."""
        name = self.maker(self._nodes[dequantizer].input[0])
        return name if name is not None and self.ops[name] == QUANTIZE else None

    def source(self, dequantizer: str) -> str | None:
        """The node whose result a Q/DQ pair rounds, from its DequantizeLinear."""
        pair = self.pair(dequantizer)
        return None if pair is None else self.maker(self._nodes[pair].input[0])

    def rounded(self, quantizer: str) -> str | None:
        """The node whose result a QuantizeLinear rounds."""
        return self.maker(self._nodes[quantizer].input[0])

    def readers(self, name: str) -> list[str]:
        node = self._nodes.get(name)
        found: set[str] = set()
        tensors = list(node.output) if node is not None else []
        while tensors:
            tensor = tensors.pop()
            for reader in self._readers.get(tensor, []):
                if reader.op_type in HANDING_ON:
                    tensors += reader.output if reader.input[0] == tensor else ()
                else:
                    found.add(reader.name)
        return self.in_order(found)

    def given_out(self, name: str) -> list[str]:
        """The network's outputs that are what a node gives."""
        node = self._nodes.get(name)
        made = set(node.output) if node is not None else set()
        return [one for one in self.outputs if one in made or self.origin(one) in made]

    def instead(self, name: str) -> tuple[dict[str, str], bool]:
        """The DequantizeLinear nodes of the activations that a node reads, each with the tensor
        that it would read in floats, and whether there are weights to be floats too.
        """
        node = self._nodes.get(name)
        found, weights = {}, False
        for tensor in node.input if node is not None else ():
            dequantizer = self.dequantizer(tensor)
            if dequantizer is None:
                continue
            pair = self.pair(dequantizer)
            if tensor in self._constant:
                weights = True
            elif pair is not None:
                found[dequantizer] = self._nodes[pair].input[0]
        return found, weights

    def nearest(self, name: str, *, back: bool) -> str:
        """What computes before or behind a Q/DQ node, or the network's input or output there."""
        seen: set[str] = set()
        while name in self._nodes and self.quantizes(name) and name not in seen:
            seen.add(name)
            node = self._nodes[name]
            if back:
                name = self.maker(node.input[0]) or self.origin(node.input[0])
            else:
                behind = self.readers(name)
                name = behind[0] if behind else next(iter(self.given_out(name)), node.output[0])
        return name

    def at_border(self, name: str) -> Literal["input", "output", ""]:
        node = self._nodes.get(name)
        if node is None:
            return ""
        if node.op_type == QUANTIZE and self.origin(node.input[0]) in self.inputs:
            return "input"
        if node.op_type == DEQUANTIZE and self.given_out(name):
            return "output"
        return ""

    # How Q/DQ round

    def scales(self, name: str) -> int:
        """How many scales a Q/DQ node has; 1 where that is not known."""
        scale = self._array(self._nodes[name].input[1])
        return 1 if scale is None else int(scale.size)

    def scale(self, name: str) -> float | None:
        """The one scale of a Q/DQ node; None where it has several, or it is not known."""
        scale = self._array(self._nodes[name].input[1])
        return float(scale.reshape(())) if scale is not None and scale.size == 1 else None

    def has_zero(self, name: str) -> bool:
        """Whether a Q/DQ node is given a zero point, which may be left out for 0."""
        node = self._nodes[name]
        return len(node.input) > 2 and bool(node.input[2])

    def zero(self, name: str) -> Any | None:
        """The one zero point of a Q/DQ node, as a NumPy scalar of its type. None as for `scale`."""
        import numpy as np

        if not self.has_zero(name):
            return np.uint8(0) if self._type(name) == UINT8 else None
        zero = self._array(self._nodes[name].input[2])
        if zero is None or not zero.size or (zero != zero.flat[0]).any():
            return None
        return zero.reshape(-1)[0]

    def is_signed(self, name: str) -> bool:
        """Whether a Q/DQ node works on int8 rather than uint8."""
        return self._type(name) == INT8

    def is_byte(self, name: str) -> bool:
        return self._type(name) in (INT8, UINT8)

    def _type(self, name: str) -> int:
        """Of the numbers that a Q/DQ node stores; 0 where that is not known."""
        node = self._nodes[name]
        stored = self._stored.get(self.origin(node.input[2])) if self.has_zero(name) else None
        if stored is None and node.op_type == DEQUANTIZE:
            pair = self.pair(name)
            stored = self._stored.get(self.origin(node.input[0]))
            return self._type(pair) if pair is not None else getattr(stored, "data_type", 0)
        if stored is None:
            told = (one.i for one in node.attribute if one.name == "output_dtype")
            return next(told, UINT8)
        return int(stored.data_type)

    def _array(self, tensor: str) -> Any | None:
        """A constant's values, where the file has them."""
        from onnx import TensorProto, numpy_helper

        stored = self._stored.get(self.origin(tensor))
        if stored is None or stored.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(stored)
