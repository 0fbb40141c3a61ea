"""2:4 sparsity: of each four weights along the axis that is summed over, two are zero.

Tensor cores since Ampere skip such zeros. They want the four in a row where products are added up:
a convolution's input channels, for each output channel and position of the kernel, and the rows of
a MatMul's weight. TensorRT uses them with its option `sparse_weights`, where it finds that faster:
rarely under some 256 input and output channels. Other engines compute a pruned graph like any.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unirt.errors import ModelError, OptionError
from unirt.model import Model, ModelSource
from unirt.precision.graph import all_nodes, captured, name_nodes, subgraphs
from unirt.precision.names import check_option
from unirt.precision.source import drop_weight_inputs, find_onnx, read_graph

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

LAYERS: Final = frozenset({"Conv", "Gemm", "MatMul"})
GROUP: Final = 4
"""Of so many weights in a row, two may differ from zero."""

# Other operators that sum over a weight, and which input that is. TensorRT documents sparse kernels
# for convolutions and matrix products, and its own tools make no other weights sparse.
_OTHERS: Final = {
    **dict.fromkeys(("ConvInteger", "ConvTranspose", "DeformConv", "Einsum", "MatMulInteger"), 1),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), 3),
}
_KERNELS: Final = "Conv, Gemm and MatMul"
_WHERE: Final = "`unirt sparsify --check`, or check_sparsity() in Python,"

_CHANNELS: Final = 8  # a sparse kernel computes multiples of so many outputs
_SMALL: Final = 1024  # weights: fewer are done with before a sparse kernel has started
_SPARSE_TYPES: Final = frozenset(
    {"float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"}
)
_LINKS: Final = 16  # nodes between a stored weight and its layer; a chain of more is no weight's
_NO_NUMBERS: Final = frozenset({0, 8, 9, 14, 15})  # undefined, string, bool, complex

# What may stand between a stored weight and the layer: it treats each value by itself.
_PASSING: Final = frozenset({"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose"})


@dataclass(frozen=True)
class Pruned:
    """What a layer lost: `l1_lost` of the sum of its weights' magnitudes, `l2_lost` of their root
    sum of squares, both from 0 to 1. `axis` is that of `weight`, as it is stored.
    """

    node: str
    operator: str
    weight: str
    shape: tuple[int, ...]
    axis: int
    l1_lost: float
    l2_lost: float


@dataclass(frozen=True)
class Sparsified:
    """A model whose `nodes` have 2:4 sparse weights, and for all other layers why they have not.

    `notes` are sentences on what else is to know.
    """

    model: Model
    nodes: tuple[Pruned, ...]
    kept: Mapping[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("node", "operator", "weight", "L1 lost", "L2 lost")]
        rows += [
            (p.node, p.operator, _shape(p.shape), f"{p.l1_lost:.1%}", f"{p.l2_lost:.1%}")
            for p in self.nodes
        ]
        lines = _aligned(rows)
        lines += [f"kept {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class LayerSparsity:
    """A layer, and whether a sparse kernel can compute it.

    `sparse`: the weight is 2:4 already. `qualifies`: `sparsify` would prune it by itself; if not,
    `reason` says why. `zeros` is the share of weights that are zero. A layer whose weight is not a
    constant has neither `weight` nor `shape` nor `axis`, and an operator without sparse kernels has
    no `axis`.
    """

    node: str
    operator: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    axis: int | None
    zeros: float
    sparse: bool
    qualifies: bool
    reason: str


@dataclass(frozen=True)
class SparsityTable:
    """All layers of a model's main graph that multiply by a weight, in its order."""

    model: str
    layers: tuple[LayerSparsity, ...]

    def __iter__(self) -> Iterator[LayerSparsity]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("node", "operator", "weight", "type", "zeros", "2:4", "qualifies")
        ]
        rows += [
            (
                layer.node,
                layer.operator,
                _shape(layer.shape),
                layer.dtype or "-",
                f"{layer.zeros:.0%}" if layer.weight else "-",
                "yes" if layer.sparse else "no",
                "yes" if layer.qualifies else f"no: {layer.reason}",
            )
            for layer in self.layers
        ]
        return "\n".join(_aligned(rows))


def sparsify(
    model: Model | ModelSource,
    *,
    keep: Collection[str] = (),
    only: Collection[str] | None = None,
) -> Sparsified:
    """The model with the weights of Conv, Gemm and MatMul pruned to 2:4, held in memory.

    Of four weights in a row along the summed axis the two of largest magnitude stay as they are;
    of equal ones the first. That is the one-shot magnitude pruning of Mishra et al., "Accelerating
    Sparse Deep Neural Networks" (2021), without the training after it that wins accuracy back:
    compare answers before you use the result. Weights are float32, float16, bfloat16, fp8 or int8,
    as initializers or Constant nodes, directly or behind Q/DQ, Cast and Transpose; quantized ones
    are judged by what they stand for and set to their zero point. A weight of several layers is
    pruned once, if all of its readers want the same.

    Nodes named in `keep` stay as they are, and with `only` all others but these, which are pruned
    also where sparse kernels would not pay. Layers in subgraphs and functions stay too. For speed,
    build with TensorRT's option `sparse_weights`.

    Raises OptionError for unknown names and for one in `only` that cannot be pruned, ModelError if
    there is nothing to prune, BackendUnavailable without the onnx package.
    """
    source = Model.open(model)
    graph = _open(source, "made sparse")
    _check_names(graph, "keep", keep)
    if only is not None:
        _check_names(graph, "only", only)
    kept: dict[str, str] = {}
    chosen: list[_Layer] = []
    for layer in graph.layers:
        if layer.name in keep:
            kept[layer.name] = "it is to be kept"
        elif only is not None and layer.name not in only:
            kept[layer.name] = "it is not among the nodes to prune"
        elif reason := layer.obstacle:
            kept[layer.name] = reason
        elif only is None and layer.doubt and not layer.sparse:
            kept[layer.name] = layer.doubt
        else:
            chosen.append(layer)
    chosen = _agreeing(chosen, kept)
    for name in only or ():
        if name in kept and name not in keep:
            raise OptionError(
                f"The node {name!r} cannot be pruned to 2:4.",
                f"It was named, but {kept[name]}.",
                f"Do not name it; {_WHERE} says what qualifies.",
                node=name,
            )
    if not chosen:
        raise _nothing(source.name, graph, kept)
    pruned = _prune(chosen)
    notes = graph.notes()
    if count := sum(layer.sparse for layer in chosen):
        notes.append(f"{_layers(count)} had 2:4 sparse weights before.")
    result = Model(graph.proto, name=source.name)
    kept = {layer.name: kept[layer.name] for layer in graph.layers if layer.name in kept}
    return Sparsified(result, pruned, MappingProxyType(kept), tuple(notes))


def check_sparsity(model: Model | ModelSource) -> SparsityTable:
    """Which layers are 2:4 already, and which qualify or why they do not.

    Listed are Conv, Gemm and MatMul, and what else multiplies by a weight, such as ConvTranspose,
    which has no sparse kernels. A layer qualifies if its weight is a constant that nothing else
    needs as it is, it has one group, and its sizes are multiples of what sparse kernels compute at
    once: 16 summed inputs (32 with 8 bits) and 8 outputs.

    Raises ModelError for a model without an ONNX graph, BackendUnavailable without onnx.
    """
    source = Model.open(model)
    graph = _open(source, "checked for sparsity")
    refused: dict[str, str] = {}
    _agreeing([layer for layer in graph.layers if not layer.obstacle], refused)
    rows = []
    for layer in graph.layers:
        reason = layer.obstacle or refused.get(layer.name, "") or layer.doubt
        weight = layer.weight
        rows.append(
            LayerSparsity(
                layer.name,
                layer.node.op_type,
                weight.name if weight else "",
                weight.shape if weight else (),
                weight.dtype if weight else "",
                _stored_axis(layer) if layer.prunable else None,
                layer.zeros,
                layer.sparse,
                not reason,
                reason,
            )
        )
    return SparsityTable(source.name, tuple(rows))


def pruned_groups(weight: Array, axis: int) -> Array:
    """What 2:4 pruning takes: True for two of each four along `axis`, those of least magnitude.

    `weight` is a float array whose size along `axis` is a multiple of four; of equal magnitudes the
    first stay. Each of the four counts how many beat it: six comparisons, no sorting.
    """
    four = _quarters(np.abs(weight), axis)
    beaten = [np.zeros(part.shape, np.int8) for part in four]
    for first in range(GROUP):
        for second in range(first + 1, GROUP):
            wins = four[first] >= four[second]
            beaten[second] += wins
            beaten[first] += ~wins
    taken = np.stack([count >= GROUP // 2 for count in beaten], axis % weight.ndim + 1)
    return taken.reshape(weight.shape)


def is_sparse(weight: Array, axis: int) -> bool:
    """Whether of each four along `axis` at most two differ from zero."""
    if weight.ndim == 0 or weight.shape[axis] % GROUP:
        return False
    used = sum(part.astype(np.int8) for part in _quarters(weight != 0, axis))
    return bool(np.max(used, initial=0) <= GROUP // 2)


def _quarters(array: Array, axis: int) -> list[Array]:
    """The first of each four along `axis`, the second, the third and the last."""
    axis %= array.ndim
    groups = array.shape[axis] // GROUP
    split = array.reshape(*array.shape[:axis], groups, GROUP, *array.shape[axis + 1 :])
    return [split[(slice(None),) * (axis + 1) + (at,)] for at in range(GROUP)]


@dataclass(frozen=True)
class _Weight:
    """A stored constant, and what the nodes between it and a layer make of it."""

    name: str
    tensor: onnx.TensorProto
    values: Callable[[], Array]
    """Computes what the layer sees, in float32: not kept, since models may be large."""
    axes: tuple[int, ...]
    """For each axis that the layer sees, which of the stored ones it is."""
    zero: Array | None = None
    """What stands for zero where that is not 0, so that it broadcasts over what is stored."""
    quantized: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.dims)

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape as the layer sees it."""
        return tuple(self.tensor.dims[axis] for axis in self.axes)

    @property
    def dtype(self) -> str:
        from onnx import helper

        return str(np.dtype(helper.tensor_dtype_to_np_dtype(self.tensor.data_type)))


@dataclass
class _Layer:
    """What multiplies by a weight. `obstacle`: why it cannot be pruned; `doubt`: why it hardly
    pays.
    """

    node: onnx.NodeProto
    weight: _Weight | None = None
    axis: int = 0
    """The summed axis of the weight as the layer sees it."""
    obstacle: str = ""
    doubt: str = ""
    sparse: bool = False
    zeros: float = 0.0
    sharing: frozenset[str] = frozenset()
    """The layers with this weight, this one among them."""

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def prunable(self) -> bool:
        """Whether it is of those that have sparse kernels, and its weight has an axis for them."""
        return _is_layer(self.node) and self.weight is not None and len(self.weight.seen) > 1


class _Graph:
    """The main graph of a model, its layers and who reads its tensors."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        name_nodes(proto.graph)
        self._constants = _constants(proto)
        self._makers = {name: node for node in proto.graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in proto.graph.node:
            for name in {*node.input, *captured(node)} - {""}:
                self._readers[name].append(node)
        self._outputs = {value.name for value in proto.graph.output}
        nodes = proto.graph.node
        self.layers = [self._layer(node) for node in nodes if _is_layer(node) or _is_other(node)]

    def notes(self) -> list[str]:
        notes = []
        inner = [n for node in self.proto.graph.node for g in subgraphs(node) for n in g.node]
        for where, nodes in (
            ("subgraphs", inner),
            ("functions", [node for f in self.proto.functions for node in f.node]),
        ):
            if count := sum(map(_is_layer, all_nodes(nodes))):
                stay = "stays as it is" if count == 1 else "stay as they are"
                notes.append(f"{_layers(count)} in {where} {stay}.")
        return notes

    def _layer(self, node: onnx.NodeProto) -> _Layer:
        layer = _Layer(node)
        if _is_other(node):
            weight = layer.weight = self._weight(node.input[_OTHERS[node.op_type]])
            layer.zeros = _zeros(weight.values()) if weight else 0.0
            layer.obstacle = f"sparse kernels are for {_KERNELS}, not for {node.op_type}"
            return layer
        found = [self._weight(name) for name in node.input[:2]]
        if node.op_type == "Conv":
            found[0] = None
        elif all(found):
            layer.obstacle = "both of its inputs are constants"
            return layer
        position = 0 if found[0] else 1
        weight = layer.weight = found[position]
        if weight is None:
            layer.obstacle = "its weight is no constant, or more is done to it than a conversion"
            return layer
        if len(weight.seen) < 2:
            layer.obstacle = "its weight is a vector"
            return layer
        layer.axis, channels = _axes(node, position, len(weight.seen))
        values = weight.values()
        layer.sparse = is_sparse(values, layer.axis)
        layer.zeros = _zeros(values)
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        layer.obstacle = _obstacle(weight, values, layer.axis, groups)
        layer.doubt = _doubt(weight, values.shape[layer.axis], values.shape[channels])
        readers = list(self._final_readers(weight.name))
        layer.sharing = frozenset(reader.name for reader in readers if reader is not None)
        for reader in readers:
            if reader is None:
                layer.obstacle = layer.obstacle or "its weight is an output of the model"
            elif not _is_layer(reader):
                also = f"{reader.op_type} {reader.name!r} reads its weight too"
                layer.obstacle = layer.obstacle or also
        return layer

    def _final_readers(self, name: str, depth: int = 0) -> Iterator[onnx.NodeProto | None]:
        """Who sees a constant at the end of all conversions; None for the caller of the model."""
        if name in self._outputs:
            yield None
        for reader in self._readers[name]:
            if reader.op_type in _PASSING and reader.input[0] == name and depth < _LINKS:
                for output in reader.output:
                    yield from self._final_readers(output, depth + 1)
            else:
                yield reader

    def _weight(self, name: str, depth: int = 0) -> _Weight | None:
        """The constant behind a tensor, if only what treats each value by itself lies between."""
        tensor = self._constants.get(name)
        if tensor is not None:
            if tensor.data_type in _NO_NUMBERS:
                return None
            return _Weight(name, tensor, partial(_wide, tensor), tuple(range(len(tensor.dims))))
        node = self._makers.get(name)
        if node is None or node.op_type not in _PASSING or node.domain not in ("", "ai.onnx"):
            return None
        weight = self._weight(node.input[0], depth + 1) if depth < _LINKS else None
        if weight is None:
            return None
        if node.op_type == "Transpose":
            order = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), ())
            order = order or tuple(reversed(range(len(weight.axes))))
            if sorted(order) != list(range(len(weight.axes))):
                return None
            values, axes = weight.values, tuple(weight.axes[axis] for axis in order)
            return replace(weight, values=lambda: values().transpose(order), axes=axes)
        # QuantizeLinear takes a float zero to what DequantizeLinear behind it takes back to zero,
        # so such a pair is none of our business.
        if node.op_type == "QuantizeLinear":
            return replace(weight, quantized=True)
        if node.op_type == "DequantizeLinear" and not weight.quantized:
            return self._dequantized(weight, node)
        return weight

    def _dequantized(self, weight: _Weight, node: onnx.NodeProto) -> _Weight | None:
        scale, point = (self._parameter(node, position, weight) for position in (1, 2))
        if scale is None or point is None:
            return None
        values = weight.values
        back = tuple(np.argsort(weight.axes))
        zero = point.transpose(back) if point.ndim == len(back) else point
        return replace(weight, values=lambda: (values() - point) * scale, zero=zero, quantized=True)

    def _parameter(self, node: onnx.NodeProto, position: int, weight: _Weight) -> Array | None:
        """A scale or zero point so that it broadcasts over the weight; None if that is not told."""
        if position == 2 and not "".join(node.input[2:]):
            return np.zeros((), np.float32)
        tensor = self._constants.get(node.input[position]) if len(node.input) > position else None
        if tensor is None:
            return None
        values = _wide(tensor)
        if values.size == 1:
            return values.reshape(())
        given = {attribute.name: attribute.i for attribute in node.attribute}
        rank = len(weight.seen)
        axis = given.get("axis", 1) % rank
        if (block := given.get("block_size", 0)) > 0 and values.ndim == rank:
            values = values.repeat(block, axis)
            index = [slice(weight.seen[axis]) if at == axis else slice(None) for at in range(rank)]
            values = values[tuple(index)]
            return values if values.shape == weight.seen else None
        if values.shape != (weight.seen[axis],):
            return None
        return values.reshape([-1 if at == axis else 1 for at in range(rank)])


def _agreeing(layers: list[_Layer], refused: dict[str, str]) -> list[_Layer]:
    """Those whose weight all layers that have it want pruned alike. Why not goes to `refused`."""
    by_name = {layer.name: layer for layer in layers}
    agreeing = []
    for layer in layers:
        shared = sorted(layer.sharing - {layer.name})
        against = next((name for name in shared if name not in by_name), "")
        across = next(
            (n for n in shared if n in by_name and _stored_axis(by_name[n]) != _stored_axis(layer)),
            "",
        )
        if against:
            refused[layer.name] = f"it shares its weight with {against!r}, which stays"
        elif across:
            refused[layer.name] = f"it shares its weight with {across!r}, which sums another axis"
        else:
            agreeing.append(layer)
    return agreeing


def _prune(layers: list[_Layer]) -> tuple[Pruned, ...]:
    """Changes the stored weights of the layers, each once."""
    lost: dict[str, tuple[float, float]] = {}
    pruned = []
    for layer in layers:
        weight = layer.weight
        assert weight is not None
        if weight.name not in lost:
            lost[weight.name] = (0.0, 0.0) if layer.sparse else _prune_weight(weight, layer.axis)
        axis = _stored_axis(layer)
        row = (layer.name, layer.node.op_type, weight.name, weight.shape, axis)
        pruned.append(Pruned(*row, *lost[weight.name]))
    return tuple(pruned)


def _prune_weight(weight: _Weight, axis: int) -> tuple[float, float]:
    """Zeros the stored values. Returns the shares of the L1 and the L2 norm that this took."""
    from onnx import numpy_helper

    values = weight.values()
    taken = pruned_groups(values, axis)
    stored: Array = numpy_helper.to_array(weight.tensor)
    zero = np.zeros((), stored.dtype) if weight.zero is None else weight.zero.astype(stored.dtype)
    made = np.where(taken.transpose(np.argsort(weight.axes)), zero, stored)
    weight.tensor.CopyFrom(numpy_helper.from_array(made, weight.tensor.name))
    size = np.abs(values)
    size /= max(float(size.max(initial=0)), np.finfo(np.float32).tiny)  # so that squares fit
    gone, total = (float(part.sum(dtype=np.float64)) for part in (size[taken], size))
    np.square(size, out=size, dtype=np.float64, casting="same_kind")
    lost, energy = (float(part.sum(dtype=np.float64)) for part in (size[taken], size))
    return gone / total if total else 0.0, math.sqrt(lost / energy) if energy else 0.0


def _obstacle(weight: _Weight, values: Array, axis: int, groups: int) -> str:
    if groups > 1:
        kind = "is depthwise" if weight.seen[1] == 1 else f"has {groups} groups"
        return f"it {kind}, and sparse kernels sum over all inputs"
    if weight.dtype not in _SPARSE_TYPES:
        return f"its weight is {weight.dtype}, which tensor cores do not take sparse"
    if not values.size:
        return "its weight is empty"
    if not np.isfinite(values).all():
        return "its weight has values that are not finite"
    if values.shape[axis] % GROUP:
        return f"its summed axis has size {values.shape[axis]}, which is no multiple of {GROUP}"
    return ""


def _doubt(weight: _Weight, summed: int, outputs: int) -> str:
    count = math.prod(weight.seen)
    if count < _SMALL:
        return f"it has only {count} weights, too few to gain by it"
    multiple = 32 if weight.quantized else 16
    if summed % multiple:
        return f"its summed axis has size {summed}, and sparse kernels take multiples of {multiple}"
    if outputs % _CHANNELS:
        return f"it has {outputs} outputs, and sparse kernels take multiples of {_CHANNELS}"
    return ""


def _axes(node: onnx.NodeProto, position: int, rank: int) -> tuple[int, int]:
    """The axes of a layer's weight: the one that is summed over, and that of the outputs."""
    if node.op_type == "Conv":
        return 1, 0
    transposed = {attribute.name for attribute in node.attribute if attribute.i}
    turned = ("transB" if position else "transA") in transposed
    rows, columns = rank - 2, rank - 1
    return (rows, columns) if (position == 1) != turned else (columns, rows)


def _stored_axis(layer: _Layer) -> int:
    return layer.weight.axes[layer.axis] if layer.weight else 0


def _constants(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The tensors of initializers and Constant nodes, to be changed in place."""
    from onnx import numpy_helper

    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        for attribute in node.attribute:
            if attribute.name == "value":
                found[node.output[0]] = attribute.t
            elif attribute.name in ("value_float", "value_floats"):
                value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                found[node.output[0]] = numpy_helper.from_array(np.array(value, np.float32))
    return found


def _wide(tensor: onnx.TensorProto) -> Array:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)


def _zeros(values: Array) -> float:
    """The share of values that are zero."""
    return 1 - float(np.count_nonzero(values)) / max(values.size, 1)


def _is_layer(node: onnx.NodeProto) -> bool:
    return node.op_type in LAYERS and node.domain in ("", "ai.onnx") and len(node.input) > 1


def _is_other(node: onnx.NodeProto) -> bool:
    position = _OTHERS.get(node.op_type, len(node.input))
    return node.domain in ("", "ai.onnx") and len(node.input) > position


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "-"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _open(source: Model, what: str) -> _Graph:
    """The graph of a model. Weights that are inputs too are constants: UniRT never feeds them."""
    proto = read_graph(find_onnx(source, what), what)
    drop_weight_inputs(proto, always=True)
    return _Graph(proto)


def _check_names(graph: _Graph, option: str, given: Collection[str]) -> None:
    check_option(
        option,
        given,
        [layer.name for layer in graph.layers],
        "nodes",
        "that is no layer of the model",
        f"2:4 sparsity is about {_KERNELS} outside of subgraphs and functions.",
        f"{_WHERE} lists them.",
    )


def _nothing(name: str, graph: _Graph, kept: Mapping[str, str]) -> ModelError:
    example = next(iter(kept.items()), None)
    forced = next((one.name for one in graph.layers if one.doubt and not one.obstacle), "")
    named = f" What hardly pays is pruned if `only` names it, for example {forced!r}."
    return ModelError(
        f"{name} has no layer to prune to 2:4.",
        f"{example[0]!r} stays, for one: {example[1]}."
        if example
        else f"It has none of {_KERNELS} outside of subgraphs and functions.",
        f"{_WHERE} tells of all layers." + (named if forced else ""),
        kept=dict(kept),
    )
