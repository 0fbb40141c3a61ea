"""A quantized ONNX graph without its Q/DQ nodes: the same network in the floats it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unirt.errors import ModelError
from unirt.model import Model, ModelSource
from unirt.precision.graph import captured, name_nodes, rename_captured
from unirt.precision.source import (
    check_size,
    drop_weight_inputs,
    find_onnx,
    read_graph,
    tensor_types,
)

if TYPE_CHECKING:
    import onnx

QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
_EVALUATED: Final = 23
"""The opset in which constants are evaluated: it has every type that can be dequantized."""

_NOT_NEGATIVE: Final = frozenset(
    {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Sqrt"}
)
_KEEPING_SIGN: Final = frozenset(
    {
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Flatten",
        "Reshape",
        "Squeeze",
    }
    | {"Transpose", "Unsqueeze", "Identity", "Slice", "Dropout", "Gather", "Clip"}
)
_SIX: Final = 6.0  # where Relu6, the activation of mobile networks, ends


@dataclass(frozen=True)
class Dequantized:
    """A model in floats. `removed` names the Q/DQ nodes that are gone, `kept` those that are not:
    between them and their partner stands something that works on integers. Other nodes keep names.

    Quantizers leave out a Relu where QuantizeLinear cuts off what is negative anyway; `restored`
    names the nodes that do it now.
    """

    model: Model
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    restored: tuple[str, ...] = ()


def dequantize(model: Model | ModelSource) -> Dequantized:
    """The network without the rounding of its Q/DQ pairs, and with quantized weights as floats,
    held in memory. What rounding did to the weights stays, where the file has them as integers.

    Raises ModelError if there is no pair to remove or the result exceeds 2 GiB, BackendUnavailable
    without the onnx package.
    """
    source = Model.open(model)
    proto = read_graph(find_onnx(source, "brought back to floats"), "brought back to floats")
    name_nodes(proto.graph)
    drop_weight_inputs(proto)
    stripper = _Stripper(proto, tensor_types(proto, source.name))
    removed = stripper.run()
    if not removed:
        integer = sorted({node.op_type for node in proto.graph.node if _is_integer(node)})
        raise ModelError(
            f"{source.name} has no Q/DQ pair to take out.",
            f"Its quantized operators are {', '.join(integer)}, which have no float inside."
            if integer
            else "Nothing of it is quantized by QuantizeLinear and DequantizeLinear.",
            "Give the float network itself.",
        )
    check_size(proto, source.name, "the removal of its Q/DQ")
    kept = tuple(node.name for node in proto.graph.node if node.op_type in (QUANTIZE, DEQUANTIZE))
    restored = tuple(node.name for node in stripper.restored)
    return Dequantized(Model(proto.SerializeToString(), name=source.name), removed, kept, restored)


def _is_integer(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("QLinear") or node.op_type.endswith("Integer")


class _Stripper:
    """Works on a model's main graph in place."""

    def __init__(self, proto: onnx.ModelProto, types: dict[str, int]) -> None:
        self.proto, self.graph = proto, proto.graph
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        for node in self.graph.node:
            value = next((one for one in node.attribute if one.name == "value"), None)
            if node.op_type == "Constant" and value is not None:
                self.constants[node.output[0]] = value.t
            elif node.op_type == "Identity" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.types = types
        self.inputs = {value.name for value in self.graph.input}
        self.outputs = {value.name for value in self.graph.output}
        self.restored: list[onnx.NodeProto] = []

    def run(self) -> tuple[str, ...]:
        """Names of the nodes that were taken out."""
        gone: dict[int, onnx.NodeProto] = {}
        same: dict[str, str] = {}  # what a pair gives -> what it was given
        clamped: dict[str, str] = {}  # what QuantizeLinear gives -> the same without rounding
        instead: dict[int, onnx.NodeProto] = {}
        for node in self.graph.node:
            if node.op_type != DEQUANTIZE or not self._fixed(node):
                continue
            given, made = node.input[0], node.output[0]
            pair = self.makers.get(given)
            if given in self.constants and made not in self.outputs:
                self._write(node)
            elif pair is not None and self._are_partners(pair, node):
                if given in clamped:
                    same[made] = clamped[given]
                elif (clamp := self._clamp(pair, made)) is not None:
                    instead[id(node)], clamped[given] = clamp, made
                else:
                    same[made] = pair.input[0]
            else:
                continue
            gone[id(node)] = node
        left = [node for node in self.graph.node if id(node) not in gone]
        wanted = self.outputs.union(*(node.input for node in left), *map(captured, left))
        gone |= {
            id(node): node
            for node in left
            if node.op_type == QUANTIZE
            and node.output[0] not in wanted
            and self._paired(node, gone)
        }
        names = tuple(node.name for node in self.graph.node if id(node) in gone)
        left = [
            instead.get(id(node), node)
            for node in self.graph.node
            if id(node) in instead or id(node) not in gone
        ]
        self.makers |= {node.output[0]: node for node in instead.values()}
        self.restored = list(instead.values())
        self._connect(left, same)
        self._drop_unread(list(gone.values()))
        return names

    def _fixed(self, node: onnx.NodeProto) -> bool:
        return all(name in self.constants for name in node.input[1:] if name)

    def _are_partners(self, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
        """Whether the second undoes the first, but for rounding."""
        if one.op_type != QUANTIZE or not self._fixed(one):
            return False
        attributes = [
            {a.name: a.i for a in node.attribute if a.name in ("axis", "block_size")}
            for node in (one, other)
        ]
        scales = [self._values(node, 1) for node in (one, other)]
        zeros = [self._values(node, 2) for node in (one, other)]
        before, after = self.types.get(one.input[0]), self.types.get(other.output[0])
        return (
            attributes[0] == attributes[1]
            and scales[0] == scales[1]
            and zeros[0] == zeros[1]
            and (before == after or None in (before, after))
        )

    def _clamp(self, node: onnx.NodeProto, made: str) -> onnx.NodeProto | None:
        """What does to the numbers what this QuantizeLinear does besides rounding: a Relu, or a
        Clip to 6, where its range begins at 0 and nothing before it keeps to that.
        """
        from onnx import helper, numpy_helper

        if len(node.input) < 3 or not node.input[2] or self._is_positive(node.input[0]):
            return None
        zero = numpy_helper.to_array(self.constants[node.input[2]])
        if zero.dtype.kind not in "iu" or zero.size != 1 or zero != np.iinfo(zero.dtype).min:
            return None
        scale = numpy_helper.to_array(self.constants[node.input[1]])
        top = float(scale.astype(np.float64).item()) * (2 ** (8 * zero.dtype.itemsize) - 1)
        name = f"{node.name}__clamp"
        if abs(top - _SIX) > 1e-3:
            return helper.make_node("Relu", [node.input[0]], [made], name)
        opset = next((one.version for one in self.proto.opset_import if not one.domain), 0)
        if opset < 11:
            return helper.make_node("Clip", [node.input[0]], [made], name, min=0.0, max=_SIX)
        ends = []
        for value in (0.0, _SIX):
            ends.append(f"{made}__{value:g}")
            self.graph.initializer.append(
                numpy_helper.from_array(np.array(value, scale.dtype), ends[-1])
            )
        return helper.make_node("Clip", [node.input[0], *ends], [made], name)

    def _is_positive(self, name: str) -> bool:
        while (maker := self.makers.get(name)) is not None:
            if maker.op_type in _NOT_NEGATIVE or maker.op_type in (QUANTIZE, DEQUANTIZE):
                # What is behind another pair was clamped there.
                return maker.op_type in _NOT_NEGATIVE or self._quantizes_from_zero(maker)
            if maker.op_type not in _KEEPING_SIGN:
                return False
            name = maker.input[0]
        return name in self.inputs  # before an input nothing was left out

    def _quantizes_from_zero(self, node: onnx.NodeProto) -> bool:
        from onnx import numpy_helper

        tensor = self.constants.get(node.input[2] if len(node.input) > 2 else "")
        if tensor is None:
            return False
        zero = numpy_helper.to_array(tensor)
        return zero.dtype.kind in "iu" and bool((zero == np.iinfo(zero.dtype).min).all())

    def _values(self, node: onnx.NodeProto, place: int) -> Any:
        from onnx import numpy_helper

        name = node.input[place] if len(node.input) > place else ""
        # A zero point that is left out is zero.
        values = numpy_helper.to_array(self.constants[name]).tolist() if name else 0
        flat = values if isinstance(values, list) else [values]
        return 0 if place == 2 and not any(flat) else flat

    def _paired(self, node: onnx.NodeProto, gone: dict[int, onnx.NodeProto]) -> bool:
        return any(node.output[0] == other.input[0] for other in gone.values())

    def _write(self, node: onnx.NodeProto) -> None:
        """The constant behind a DequantizeLinear, as a weight of its output's name."""
        from onnx import ModelProto, ValueInfoProto, helper, numpy_helper
        from onnx.reference import ReferenceEvaluator

        made = helper.make_node(DEQUANTIZE, list(node.input), list(node.output))
        made.attribute.extend(node.attribute)
        graph = helper.make_graph([made], "constant", [], [ValueInfoProto()])
        graph.output[0].name = node.output[0]
        for name in dict.fromkeys(filter(None, node.input)):
            tensor = graph.initializer.add()
            tensor.CopyFrom(self.constants[name])
            tensor.name = name
        alone = ModelProto(ir_version=10)
        alone.graph.CopyFrom(graph)
        alone.opset_import.append(helper.make_opsetid("", _EVALUATED))
        (value,) = ReferenceEvaluator(alone).run(None, {})
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), node.output[0]))

    def _connect(self, left: list[onnx.NodeProto], same: dict[str, str]) -> None:
        from onnx import helper

        def origin(name: str) -> str:
            while name in same:
                name = same[name]
            return name

        new = {name: origin(name) for name in same}
        ends = []
        for name in self.outputs & set(new):
            start = new[name]
            if (
                start in self.inputs | self.outputs | set(self.constants)
                or start not in self.makers
            ):
                # It cannot change its name, so somebody must hand it on.
                node_name = self.makers[name].name
                ends.append(helper.make_node("Identity", [start], [name], node_name))
                continue
            new = {old: name if one == start else one for old, one in new.items()}
            new[start] = name
            self.outputs.add(start)  # a second output of the same tensor is handed on
            maker = self.makers[start]
            maker.output[:] = [name if one == start else one for one in maker.output]
        new = {old: one for old, one in new.items() if old != one}
        for node in left:
            node.input[:] = [new.get(one, one) for one in node.input]
            rename_captured(node, new)
        for node in ends:
            node.input[0] = new.get(node.input[0], node.input[0])
        infos = [one for one in self.graph.value_info if one.name not in new]
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend([*left, *ends])
        self.graph.value_info.extend(infos)

    def _drop_unread(self, gone: list[onnx.NodeProto]) -> None:
        """Weights and Constants that only what is gone has read."""
        nodes = list(self.graph.node)
        read = self.outputs.union(*(node.input for node in nodes), *map(captured, nodes))
        loose = {name for node in gone for name in node.input} - read
        tensors = [one for one in self.graph.initializer if one.name not in loose]
        made = {name for node in gone for name in node.output}
        infos = [one for one in self.graph.value_info if one.name not in made | loose]
        kept = [node for node in nodes if node.op_type != "Constant" or node.output[0] not in loose]
        del self.graph.initializer[:], self.graph.node[:], self.graph.value_info[:]
        self.graph.initializer.extend(tensors)
        self.graph.node.extend(kept)
        self.graph.value_info.extend(infos)
