"""A quantized graph, asked by node and tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from unirt.inspection import CONTRACTING, DEQUANTIZE, QUANTIZE

if TYPE_CHECKING:
    import onnx

Q_DQ = frozenset({QUANTIZE, DEQUANTIZE})
# Of these inputs the others are shapes, scales or indices, not what is computed with.
ALL_INPUTS = frozenset({"Add", "Sub", "Mul", "Div", "Concat", "Sum", "Min", "Max", "MatMul"})


class Graph:
    """The quantized graph's nodes: what they do, what feeds them, who reads them."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self.ops = {node.name: node.op_type for node in graph.node}
        self._nodes = {node.name: node for node in graph.node}
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(filter(None, node.input)):
                self._readers.setdefault(name, []).append(node)
        self._types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self._types[node.output[0]] = attribute.t.data_type
        self._constant = set(self._types)
        for node in graph.node:
            if node.op_type == "Constant" or (
                node.input and all(name in self._constant for name in node.input if name)
            ):
                self._constant |= set(node.output)
        self.outputs = {value.name for value in graph.output}

    def quantizes(self, name: str) -> bool:
        return self.ops.get(name) in Q_DQ

    def contracts(self, name: str) -> bool:
        return CONTRACTING.search(self.ops.get(name, "")) is not None

    def told(self, name: str) -> str:
        """`Conv 'conv1'`."""
        return f"{self.ops.get(name, 'node')} {name!r}"

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
        """The second operand of a contraction, where that is a constant."""
        node = self._nodes.get(name)
        given = list(node.input[1:2]) if node is not None else []
        return given[0] if given and given[0] in self._constant else None

    def dequantizer(self, tensor: str) -> str | None:
        """The DequantizeLinear that a tensor comes from."""
        node = self._makers.get(tensor)
        return node.name if node is not None and node.op_type == DEQUANTIZE else None

    def maker(self, tensor: str) -> str | None:
        node = self._makers.get(tensor)
        return node.name if node is not None else None

    def source(self, dequantizer: str) -> str | None:
        """The node whose result a Q/DQ pair rounds, from its DequantizeLinear."""
        pair = self._makers.get(self._nodes[dequantizer].input[0])
        if pair is None or pair.op_type != QUANTIZE:
            return None
        return self.maker(pair.input[0])

    def pair(self, dequantizer: str) -> str | None:
        """The QuantizeLinear of a pair."""
        pair = self._makers.get(self._nodes[dequantizer].input[0])
        return pair.name if pair is not None and pair.op_type == QUANTIZE else None

    def readers(self, name: str) -> list[str]:
        node = self._nodes.get(name)
        outputs = node.output if node is not None else []
        return [reader.name for one in outputs for reader in self._readers.get(one, [])]

    def instead(self, name: str) -> tuple[dict[str, str], bool]:
        """The DequantizeLinear nodes that a node reads, each with the tensor it would read in
        floats, and whether weights are among them.
        """
        node = self._nodes.get(name)
        found, weights = {}, False
        for dequantizer in map(self.dequantizer, node.input if node is not None else ()):
            if dequantizer is None:
                continue
            stored = self._nodes[dequantizer].input[0]
            pair = self._makers.get(stored)
            if pair is not None and pair.op_type == QUANTIZE:
                found[dequantizer] = pair.input[0]
            weights |= stored in self._constant
        return found, weights

    def nearest(self, name: str, *, back: bool) -> str:
        """What computes before or behind a Q/DQ node, or the network's input or output there."""
        seen: set[str] = set()
        while name in self._nodes and self.quantizes(name) and name not in seen:
            seen.add(name)
            node = self._nodes[name]
            if back:
                name = self.maker(node.input[0]) or node.input[0]
            else:
                behind = self.readers(name)
                name = behind[0] if behind else node.output[0]
        return name

    def is_quantized(self, name: str) -> bool:
        """Whether a contraction reads both its operands through DequantizeLinear."""
        weight = self.weight(name)
        operands = [*self.data(name), *filter(None, [weight])]
        return len(operands) > 1 and all(self.dequantizer(one) for one in operands)

    def is_weight(self, name: str) -> bool:
        """Whether a DequantizeLinear works on a constant."""
        node = self._nodes.get(name)
        return node is not None and bool(node.input) and node.input[0] in self._constant

    def is_signed(self, name: str) -> bool:
        """Whether a Q/DQ node works on int8 rather than uint8."""
        node = self._nodes.get(name)
        zero = node.input[2] if node is not None and len(node.input) > 2 else ""
        return self._types.get(zero) == 3  # onnx.TensorProto.INT8

    def at_border(self, name: str) -> Literal["input", "output", ""]:
        node = self._nodes.get(name)
        if node is None:
            return ""
        if node.op_type == QUANTIZE and node.input[0] not in self._makers:
            return "input"
        if node.op_type == DEQUANTIZE and not self.outputs.isdisjoint(node.output):
            return "output"
        return ""
