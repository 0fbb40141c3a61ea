"""Reading and renaming ONNX graphs: nested graphs, what they capture, types, fresh names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx

FLOAT: Final = 1  # onnx.TensorProto.FLOAT
NOT_A_TENSOR: Final = -1
"""In a mapping of types: a sequence, an optional or a map."""

_SMALL: Final = 1024  # elements of a weight whose values type inference may look at


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def captured(node: onnx.NodeProto) -> set[str]:
    """The names that the node's subgraphs read from the graphs around them."""
    found: set[str] = set()
    for graph in subgraphs(node):
        own = _declared(graph)
        for inner in graph.node:
            found |= {name for name in (*inner.input, *captured(inner)) if name} - own
            own |= set(inner.output)
        found |= {value.name for value in graph.output} - own
    return found


def rename_captured(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Makes the node's subgraphs read other tensors of the graphs around them."""
    for graph in subgraphs(node):
        own = _declared(graph).union(*(inner.output for inner in graph.node))
        outer = {old: new for old, new in names.items() if old not in own}
        for inner in graph.node:
            inner.input[:] = [outer.get(name, name) for name in inner.input]
            rename_captured(inner, outer)
        for value in graph.output:
            value.name = outer.get(value.name, value.name)


def _declared(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    return names | {sparse.values.name for sparse in graph.sparse_initializer}


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes and those of all graphs in them, in the order of the file."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


class Names:
    """Hands out names that nothing in a model has yet."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def fresh(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def tensor_names(graph: onnx.GraphProto) -> Names:
    taken = _declared(graph)
    for node in all_nodes(graph.node):
        taken.update(node.input, node.output, *map(_declared, subgraphs(node)))
    return Names(taken)


def name_nodes(graph: onnx.GraphProto) -> Names:
    """Names the nameless nodes by operator and position. Returns what further nodes may take."""
    nodes = list(all_nodes(graph.node))
    names = Names(node.name for node in nodes)
    for position, node in enumerate(nodes):
        if not node.name:
            node.name = names.fresh(f"{node.op_type}_{position}")
    return names


def main_names(graph: onnx.GraphProto) -> frozenset[str]:
    """Those of all tensors of this graph, without the graphs inside its nodes."""
    names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    names.update(name for node in graph.node for name in node.output if name)
    return frozenset(names)


def infer_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of the main graph's tensors, NOT_A_TENSOR among them; what is unknown lacks.

    Large weights stay out of it, since inference passes the model through one protobuf message.
    """
    from onnx import ModelProto, shape_inference

    skeleton = ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    graph = skeleton.graph
    graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT and _elements(tensor.dims) > _SMALL:
            graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=FLOAT)
        else:
            graph.initializer.append(tensor)
    inferred = shape_inference.infer_shapes(skeleton).graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*inferred.value_info, *inferred.output, *inferred.input):
        kind = value.type.WhichOneof("value")
        if kind == "tensor_type" and value.type.tensor_type.elem_type:
            types[value.name] = value.type.tensor_type.elem_type
        elif kind not in (None, "tensor_type"):
            types[value.name] = NOT_A_TENSOR
    return types


def _elements(dims: Iterable[int]) -> int:
    count = 1
    for dim in dims:
        count *= dim
    return count
