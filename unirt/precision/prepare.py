"""What is done to a float graph before it is quantized, and leaves its answers as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unirt.errors import ModelError
from unirt.precision.graph import captured, name_nodes, tensor_names

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

_FOLDABLE: Final = frozenset(
    {"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


def check_node_names(graph: onnx.GraphProto) -> None:
    """Raises ModelError where a name stands for several nodes, so that it chooses none of them."""
    counts = Counter(node.name for node in graph.node if node.name)
    name, count = next(iter(counts.most_common(1)), ("", 0))
    if count > 1:
        raise ModelError(
            f"{count} nodes of the network are called {name!r}.",
            "Nodes are chosen and reported by name, and some engines refuse such a graph.",
            "Give each node a name of its own, or none; exporters do.",
            node=name,
        )


class Graph:
    """The main graph of a model while it is changed: constants, makers and readers of tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        check_node_names(model.graph)
        self.model = model
        self.proto = model.graph
        self.node_names = name_nodes(model.graph)
        self.names = tensor_names(model.graph)
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        inputs = {value.name for value in model.graph.input}
        self.inputs = inputs
        self.outputs = {value.name for value in model.graph.output}
        self._tensors = {t.name: t for t in model.graph.initializer if t.name not in inputs}
        self._arrays: dict[str, Array] = {}
        self.index()

    def index(self) -> None:
        """Finds makers and readers anew, after nodes were changed."""
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self.captured: set[str] = set()
        for node in self.nodes:
            for position, name in enumerate(node.input):
                if name:
                    self.readers.setdefault(name, []).append((node, position))
            self.captured |= captured(node)

    def is_constant(self, name: str) -> bool:
        if name in self._tensors or name in self._arrays:
            return True
        maker = self.makers.get(name)
        return maker is not None and maker.op_type == "Constant" and not maker.domain

    def constant_type(self, name: str) -> int:
        """The element type of a constant, 0 if it is none or not stored as a tensor."""
        if name in self._tensors:
            return int(self._tensors[name].data_type)
        if name in self._arrays:
            return 1 if self._arrays[name].dtype == np.float32 else 0
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "Constant":
            return 0
        for attribute in maker.attribute:
            if attribute.name == "value":
                return int(attribute.t.data_type)
            if attribute.name in ("value_float", "value_floats"):
                return 1
        return 0

    def array(self, name: str) -> Array | None:
        """The value of a constant; None if it is computed, given by the caller or no tensor."""
        from onnx import helper, numpy_helper

        if name in self._arrays:
            return self._arrays[name]
        if name in self._tensors:
            return np.asarray(numpy_helper.to_array(self._tensors[name]))
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "Constant" or maker.domain:
            return None
        attribute = maker.attribute[0]
        value = helper.get_attribute_value(attribute)
        if attribute.name == "value":
            return np.asarray(numpy_helper.to_array(value))
        if attribute.name in ("value_float", "value_floats"):
            return np.array(value, np.float32)
        if attribute.name in ("value_int", "value_ints"):
            return np.array(value, np.int64)
        return None

    def add(self, wanted: str, array: Array) -> str:
        """A new constant, called `wanted` or something like it."""
        name = self.names.fresh(wanted)
        self._arrays[name] = array
        return name

    def add_tensor(self, tensor: onnx.TensorProto) -> str:
        tensor.name = self.names.fresh(tensor.name)
        self._tensors[tensor.name] = tensor
        self.proto.initializer.append(tensor)
        return str(tensor.name)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The node that reads a tensor, if nothing else does."""
        readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self.outputs or name in self.captured:
            return None
        return readers[0][0]

    def remove(self, nodes: list[onnx.NodeProto]) -> None:
        gone = set(map(id, nodes))
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        self.index()

    def finish(self) -> None:
        """Writes nodes and constants back; drops the constants that nothing reads any more."""
        from onnx import numpy_helper

        self.index()
        used = set(self.readers) | self.captured | self.outputs | self.inputs
        self.nodes = [n for n in self.nodes if n.op_type != "Constant" or used & set(n.output)]
        kept = [t for t in self.proto.initializer if t.name in used]
        kept += [numpy_helper.from_array(a, n) for n, a in self._arrays.items() if n in used]
        made = {name for node in self.nodes for name in node.output}
        values = [value for value in self.proto.value_info if value.name in made]
        for field, content in (("node", self.nodes), ("initializer", kept), ("value_info", values)):
            content = [_copy(item) for item in content]
            del getattr(self.proto, field)[:]
            getattr(self.proto, field).extend(content)


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def fold(graph: Graph) -> list[str]:
    """Constants that are only moved, and what scales or shifts the channels of a convolution.

    BatchNormalization becomes part of the weights in front of it: quantized first, each channel
    would carry its scale twice. Computed in float64, so it is exact to float32's rounding. The
    folded node's name goes, its output stays. Returns notes.
    """
    _fold_constants(graph)
    folded: dict[str, list[str]] = {}
    gone: list[onnx.NodeProto] = []
    for node in graph.nodes:
        while (
            node.output
            and (behind := graph.only_reader(node.output[0])) is not None
            and _fold(graph, node, behind)
        ):
            folded.setdefault(behind.op_type, []).append(behind.name)
            node.output[0] = behind.output[0]
            gone.append(behind)
    graph.remove(gone)
    return [
        f"{len(names)} {op} node{'s' * (len(names) > 1)} became part of the weights in front: "
        + ", ".join(names[:3])
        + ("…" if len(names) > 3 else "")
        for op, names in folded.items()
    ]


def join_biases(graph: Graph, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """MatMul of matrices and the Add of a bias behind it become one Gemm, called as the MatMul.

    ONNX Runtime does so itself, but then leaves that Gemm in float32, for its bias is.
    """
    from onnx import helper

    gone = []
    for node in graph.nodes:
        if node.op_type != "MatMul" or node.domain or len(shapes.get(node.input[0], ())) != 2:
            continue
        behind = graph.only_reader(node.output[0])
        weight = graph.array(node.input[1])
        if behind is None or behind.op_type != "Add" or weight is None or weight.ndim != 2:
            continue
        other = behind.input[1] if behind.input[0] == node.output[0] else behind.input[0]
        bias = graph.array(other)
        if bias is None or bias.dtype != np.float32 or bias.size != weight.shape[1]:
            continue
        if bias.ndim > 2:
            continue
        flat = graph.add(f"{other}__bias", bias.reshape(-1))
        inputs, outputs = [*node.input, flat], list(behind.output)
        node.CopyFrom(helper.make_node("Gemm", inputs, outputs, node.name))
        gone.append(behind)
    graph.remove(gone)


def _fold_constants(graph: Graph) -> None:
    """Weights that are transposed or reshaped in the graph, as exporters leave them."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    gone = []
    for node in graph.nodes:
        if node.op_type not in _FOLDABLE or node.domain or node.output[0] in graph.outputs:
            continue
        names = [name for name in node.input if name]
        arrays = [graph.array(name) for name in names]
        if not arrays or any(array is None for array in arrays) or node.output[0] in graph.captured:
            continue
        inner = helper.make_graph(
            [node],
            "constant",
            [helper.make_empty_tensor_value_info(name) for name in names],
            [helper.make_empty_tensor_value_info(node.output[0])],
        )
        model = helper.make_model(inner, opset_imports=graph.model.opset_import)
        (value,) = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
        made = graph.add(node.output[0], np.ascontiguousarray(value))
        for reader, position in graph.readers.get(node.output[0], []):
            reader.input[position] = made
        gone.append(node)
    graph.remove(gone)


def _fold(graph: Graph, node: onnx.NodeProto, behind: onnx.NodeProto) -> bool:
    """Whether `behind` could be folded into the weights of `node`, and was."""
    if node.domain or behind.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return False
    weight = graph.array(node.input[1])
    bias = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    if weight is None or bias is None or weight.dtype != np.float32:
        return False
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "ConvTranspose" and groups(node) != 1:
        return False  # its channels lie in two axes
    if node.op_type == "Gemm":
        factors = {name: attributes[name].f for name in ("alpha", "beta") if name in attributes}
        if any(factor != 1 for factor in factors.values()) or bias.ndim > 1:
            return False
    axis = channel_axis(node, weight.shape)
    channels = weight.shape[axis]
    change = _channel_change(graph, node, behind, channels, weight.ndim)
    if change is None:
        return False
    factor, shift = change
    shape = [channels if at == axis else 1 for at in range(weight.ndim)]
    new_bias = np.broadcast_to(bias.astype(np.float64), channels) * factor + shift
    new_weight = (weight.astype(np.float64) * factor.reshape(shape)).astype(np.float32)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return False
    if (factor != 1).any():
        node.input[1] = graph.add(f"{node.input[1]}__folded", new_weight)
    wanted = f"{node.input[2] if len(node.input) > 2 and node.input[2] else node.name}__bias"
    made = graph.add(wanted, new_bias.astype(np.float32))
    node.input[:] = [node.input[0], node.input[1], made]
    return True


def _channel_change(
    graph: Graph, node: onnx.NodeProto, behind: onnx.NodeProto, channels: int, rank: int
) -> tuple[Array, Array] | None:
    """What `behind` multiplies and adds to each channel of its first input, in float64."""
    if behind.op_type == "BatchNormalization":
        training = any(a.name == "training_mode" and a.i for a in behind.attribute)
        if training or len([name for name in behind.output if name]) != 1:
            return None
        values = [graph.array(name) for name in behind.input[1:5]]
        if behind.input[0] != node.output[0] or any(
            value is None or value.shape != (channels,) for value in values
        ):
            return None
        scale, shift, mean, variance = (np.asarray(value, np.float64) for value in values)
        epsilon = next((a.f for a in behind.attribute if a.name == "epsilon"), 1e-5)
        with np.errstate(invalid="ignore", divide="ignore"):
            factor = scale / np.sqrt(variance + epsilon)
        return factor, shift - mean * factor
    if behind.op_type not in ("Mul", "Add"):
        return None
    other = behind.input[1] if behind.input[0] == node.output[0] else behind.input[0]
    value = graph.array(other)
    if value is None or value.dtype != np.float32:
        return None
    per_channel = _per_channel(value, channels, rank if node.op_type != "Gemm" else 1)
    if per_channel is None:
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    return (per_channel, zeros) if behind.op_type == "Mul" else (ones, per_channel)


def _per_channel(value: Array, channels: int, rank: int) -> Array | None:
    """One value for each channel, if a constant broadcasts so over [batch, channels, ...]."""
    if value.size == 1 and value.ndim <= rank:
        return np.full(channels, value.reshape(()), np.float64)
    shape = (channels,) if rank == 1 else (channels,) + (1,) * (rank - 2)
    if value.shape not in (shape, (1, *shape)):
        return None
    return value.astype(np.float64).reshape(channels)


def channel_axis(node: onnx.NodeProto, shape: Sequence[int]) -> int:
    """The axis of the weight along which the output's channels lie.

    Those of a ConvTranspose in groups lie along two axes: here the one along which its groups do,
    if that is longer and each group has just one input channel, as where it is depthwise.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 0 if groups(node) == shape[0] > shape[1] else 1
    if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
        return 0
    return len(shape) - 1


def groups(node: onnx.NodeProto) -> int:
    """Into how many parts a convolution divides its channels."""
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)
