"""Where Q/DQ pairs go: decided from the graph, a recipe and the known ranges; changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from unirt.errors import ModelError
from unirt.precision.calibration.ranges import Range
from unirt.precision.graph import FLOAT, captured
from unirt.precision.prepare import Graph, channel_axis
from unirt.precision.quantization.recipes import Recipe

if TYPE_CHECKING:
    import onnx

CONTRACTIONS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTIONS: Final = ("Conv", "ConvTranspose")
ACTIVATIONS: Final = frozenset({"Clip", "Relu"})
# Values come out as they went in: what goes in quantized comes out so, by the same scale.
MOVING: Final = frozenset(
    {
        *("DepthToSpace", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    }
)
_AVERAGING: Final = frozenset({"AveragePool", "GlobalAveragePool"})
# What stands between the two products of an attention: something that makes weights of scores,
_WEIGHING: Final = frozenset(
    {"Elu", "Exp", "Gelu", "HardSigmoid", "Hardmax", "LeakyRelu", "LogSoftmax", "Relu", "Sigmoid"}
    | {"Softmax", "Softplus", "Tanh"}
)
# and what scales, masks, normalizes or moves them.
_WITHIN_ATTENTION: Final = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Concat", "Div", "Dropout", "Expand", "Flatten", "Gather"}
    | {"GatherElements", "Identity", "IsNaN", "Max", "Min", "Mul", "Neg", "Pad", "Pow", "Reshape"}
    | {"Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Trilu", "Unsqueeze"}
    | {"Where"}
)
_FAR: Final = 24  # nodes between the two products

BY_HAND: Final = "it was told to stay"
NO_RANGE: Final = "the calibration has no range for {!r}"


@dataclass(frozen=True)
class Choice:
    """What the caller says about nodes: `keep` stay in float32, with `only` so do all others."""

    keep: frozenset[str]
    only: frozenset[str] | None

    def computes(self, name: str) -> bool:
        """Whether a node may compute in the low precision."""
        return self.passes(name) and (self.only is None or name in self.only)

    def passes(self, name: str) -> bool:
        """Whether a node that computes nothing may pass on what is quantized."""
        return name not in self.keep


@dataclass(frozen=True)
class Weight:
    """A constant to be quantized, where it is read, and along which axis its channels lie."""

    node: onnx.NodeProto
    position: int
    name: str
    axis: int
    blocked: int | None = None
    """The axis that is summed over, where scales go by blocks along it."""


@dataclass
class Placement:
    """What becomes of a graph.

    `readers` maps each tensor that gets a Q/DQ pair to those who read the pair's result, as (node,
    input position). `ranges` are those of the tensors, equal where values only move. `nodes` are
    computed in the low precision; `kept` says of the others why not.
    """

    weights: list[Weight] = field(default_factory=list)
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def place(
    graph: Graph,
    recipe: Recipe,
    ranges: Mapping[str, Range],
    shapes: Mapping[str, tuple[int | None, ...]],
    choice: Choice,
) -> Placement:
    """Q/DQ for weights and activations."""
    return _Placer(graph, recipe, ranges, shapes, choice).run()


def place_weights(
    graph: Graph, recipe: Recipe, bits: int, block: int | None, choice: Choice
) -> Placement:
    """Q/DQ for weights alone, by channels or by blocks of `block` values that are summed up."""
    placement = Placement()
    for node in _contractions(graph):
        reason = "" if choice.computes(node.name) else BY_HAND
        reason = reason or _no_operator(node, recipe) or _no_weight(graph, node)
        weight = _weight(graph, node) if not reason else None
        if weight is not None and (block or bits == 4):
            weight, reason = _blocked(graph, weight, block or 0)
        if weight is None:
            placement.kept[node.name] = reason
        else:
            placement.weights.append(weight)
            placement.nodes.append(node.name)
    return placement


def _blocked(graph: Graph, weight: Weight, block: int) -> tuple[Weight | None, str]:
    array = graph.array(weight.name)
    assert array is not None
    if weight.node.op_type in _CONVOLUTIONS:
        return None, "blocks are for the matrices of Gemm and MatMul only"
    if array.ndim != 2:
        return None, f"its weight has {array.ndim} axes, and blocks are for matrices only"
    summed = 1 - weight.axis
    if array.shape[summed] % block:
        return None, f"it sums over {array.shape[summed]} values, no multiple of blocks of {block}"
    return Weight(weight.node, weight.position, weight.name, weight.axis, summed), ""


def _contractions(graph: Graph) -> Iterator[onnx.NodeProto]:
    return (n for n in graph.nodes if n.op_type in CONTRACTIONS and n.domain in ("", "ai.onnx"))


def _no_operator(node: onnx.NodeProto, recipe: Recipe) -> str:
    if node.op_type in recipe.operators:
        return ""
    return f"the recipe {recipe.name} knows no low-precision {node.op_type}"


def _no_weight(graph: Graph, node: onnx.NodeProto) -> str:
    """Why a node has no weight that could be quantized. Raises ModelError for a damaged one."""
    first, name = node.input[:2]
    if not graph.is_constant(name):
        if graph.is_constant(first) and node.op_type not in _CONVOLUTIONS:
            return (
                f"its constant {first!r} is the first factor, and a weight has to be the second "
                "one: exchange both, transposed, to have it quantized"
            )
        if name in graph.inputs:
            return f"its weight {name!r} is an input of the model"
        if node.op_type in _CONVOLUTIONS:
            return f"its weight {name!r} is computed"
        return "neither of its factors is a constant"
    if graph.constant_type(name) != FLOAT:
        return f"its weight {name!r} is not float32"
    array = graph.array(name)
    assert array is not None
    if array.ndim < 2 or not array.size:
        return f"its weight {name!r} is no matrix"
    finite = np.isfinite(array)
    if not finite.all():
        raise ModelError(
            f"The weight {name!r} of {node.name!r} cannot be quantized.",
            f"{array.size - int(finite.sum()):,} of its {array.size:,} values are NaN or infinite.",
            "Train or export the network again, or check how its weights were changed.",
            tensor=name,
            node=node.name,
        )
    return ""


def _weight(graph: Graph, node: onnx.NodeProto) -> Weight:
    array = graph.array(node.input[1])
    assert array is not None
    return Weight(node, 1, node.input[1], channel_axis(node, array.shape))


class _Placer:
    """Finds what computes in the low precision; then the tensors, until nothing more joins."""

    def __init__(
        self,
        graph: Graph,
        recipe: Recipe,
        ranges: Mapping[str, Range],
        shapes: Mapping[str, tuple[int | None, ...]],
        choice: Choice,
    ) -> None:
        self._graph = graph
        self._recipe = recipe
        self._ranges = ranges
        self._shapes = shapes
        self._choice = choice
        self._order = {node.name: at for at, node in enumerate(graph.nodes)}
        self._tied = _Ties()
        self._tensors: set[str] = set()  # that get a Q/DQ pair
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self._computing: set[str] = set()
        self._kept: dict[str, str] = {}

    def run(self) -> Placement:
        attention = _attention(self._graph)
        chosen = []
        for node in _contractions(self._graph):
            reason = self._reason(node, attention)
            if reason:
                self._kept[node.name] = reason
            else:
                chosen.append(node)
                self._computing.add(node.name)
        for node in chosen:
            self._read(node, 0)
            if node.input[1] not in self._tensors and not self._graph.is_constant(node.input[1]):
                self._read(node, 1)
            if self._recipe.outputs and node.op_type in _CONVOLUTIONS:
                self._tensors.add(self._head(node))
        if self._recipe.residual == "skip":
            self._place_skips()
        if self._recipe.outputs:
            self._spread()
            for name in sorted(self._tensors):
                # What computes on integers gives nothing else, so all read what was quantized.
                self._readers[name] = list(self._graph.readers.get(name, []))
        weights = [_weight(self._graph, n) for n in chosen if self._graph.is_constant(n.input[1])]
        return Placement(
            weights,
            self._readers,
            self._useful({name: self._range(name) for name in sorted(self._tensors)}),
            sorted(self._computing, key=self._order.__getitem__),
            self._kept,
        )

    def _reason(self, node: onnx.NodeProto, attention: Collection[str]) -> str:
        """Why a product stays in float32; empty if it does not."""
        if not self._choice.computes(node.name):
            return BY_HAND
        if reason := _no_operator(node, self._recipe):
            return reason
        if node.name in attention:
            return "it is part of an attention, which engines compute as a whole"
        both = node.op_type == "MatMul" and not any(map(self._graph.is_constant, node.input))
        reason = "" if both else _no_weight(self._graph, node)
        if reason:
            return reason
        if self._graph.is_constant(node.input[0]):
            return "its first factor is a constant"
        if not self._recipe.matrix_vector and self._is_vector(node):
            return "it multiplies a matrix by a vector, which reads more than it computes"
        needed = list(node.input[: 2 if both else 1])
        if self._recipe.outputs and node.op_type in _CONVOLUTIONS:
            needed.append(self._head(node))
        missing = [name for name in needed if not self._known(name)]
        return NO_RANGE.format(missing[0]) if missing else ""

    def _is_vector(self, node: onnx.NodeProto) -> bool:
        if node.op_type in _CONVOLUTIONS:
            return False
        rows = self._shapes.get(node.input[0], (None, None))
        columns = self._graph.array(node.input[1])
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        count = rows[-1] if transposed else rows[-2] if len(rows) > 1 else 1
        width = None if columns is None else columns.shape[channel_axis(node, columns.shape)]
        return count == 1 or width == 1

    def _read(self, node: onnx.NodeProto, position: int) -> None:
        name = node.input[position]
        self._tensors.add(name)
        self._readers.setdefault(name, []).append((node, position))

    def _known(self, name: str) -> bool:
        """Whether a tensor's range is known, or that of the tensor whose values it has."""
        seen = set()
        while name not in self._ranges and name not in seen:
            seen.add(name)
            maker = self._graph.makers.get(name)
            if maker is None or maker.op_type not in MOVING or maker.domain:
                return False
            name = maker.input[0]
        return name in self._ranges

    def _head(self, node: onnx.NodeProto) -> str:
        """The tensor that holds a node's result after its activation."""
        name = str(node.output[0])
        behind = self._graph.only_reader(name)
        fits = (
            behind is not None
            and behind.op_type in ACTIVATIONS
            and self._choice.passes(behind.name)
        )
        if fits and behind is not None and behind.output[0] in self._ranges:
            return str(behind.output[0])
        return name

    # Symmetric: the skip branch of a residual Add

    def _place_skips(self) -> None:
        for node in self._graph.nodes:
            if node.op_type != "Add" or any(map(self._graph.is_constant, node.input)):
                continue
            makers = [self._graph.makers.get(name) for name in node.input]
            fused = [
                position
                for position, maker in enumerate(makers)
                if maker is not None
                and maker.op_type in _CONVOLUTIONS
                and maker.name in self._computing
                and self._graph.only_reader(node.input[position]) is node
            ]
            if not fused or node.input[0] == node.input[1]:
                continue
            # The convolution that runs last is the one that the Add fuses into.
            branch = max(fused, key=lambda at: self._order[getattr(makers[at], "name", "")])
            skip = 1 - branch
            if not self._choice.computes(node.name):
                self._kept[node.name] = BY_HAND
            elif not self._known(node.input[skip]):
                self._kept[node.name] = NO_RANGE.format(node.input[skip])
            else:
                self._read(node, skip)
                self._computing.add(node.name)

    # Integers in, integers out

    def _spread(self) -> None:
        size = -1
        while size != len(self._tensors):
            size = len(self._tensors)
            for node in self._graph.nodes:
                if node.domain or not node.output or not node.input:
                    continue
                if node.op_type in MOVING:
                    self._spread_moving(node)
                elif node.op_type == "Concat":
                    self._spread_concat(node)
                elif node.op_type == "Add":
                    self._spread_add(node)
                elif node.op_type in _AVERAGING:
                    ends = {node.input[0], node.output[0]}
                    if ends <= self._tensors and self._choice.computes(node.name):
                        self._computing.add(node.name)

    def _spread_moving(self, node: onnx.NodeProto) -> None:
        source = node.input[0]
        if self._graph.is_constant(source) or not self._choice.passes(node.name):
            return
        made = [name for name in node.output if name]
        if node.op_type == "MaxPool":
            made = made[:1]  # the other one holds places
        if any(name in self._tensors for name in made) and self._known(source):
            self._tensors.add(source)
        if source in self._tensors and not any(name in self._graph.outputs for name in made):
            self._tensors.update(made)
            for name in made:
                self._tied.tie(source, name)

    def _spread_concat(self, node: onnx.NodeProto) -> None:
        if not self._choice.computes(node.name) or any(map(self._graph.is_constant, node.input)):
            return
        names = [*node.input, node.output[0]]
        some = any(name in self._tensors for name in node.input)
        whole = all(name in self._tensors for name in node.input)
        needed = node.output[0] in self._tensors and some
        if (whole or needed) and all(map(self._known, names)):
            self._tensors.update(names)
            self._computing.add(node.name)
            for name in names:
                self._tied.tie(names[0], name)

    def _spread_add(self, node: onnx.NodeProto) -> None:
        if self._recipe.residual != "both" or any(map(self._graph.is_constant, node.input)):
            return
        if not any(self._comes_from_convolution(name) for name in node.input):
            return
        names = [*node.input, self._head(node)]
        missing = [name for name in names if not self._known(name)]
        if not self._choice.computes(node.name):
            self._kept[node.name] = BY_HAND
        elif missing:
            self._kept[node.name] = NO_RANGE.format(missing[0])
        else:
            self._tensors.update(names)
            self._computing.add(node.name)

    def _comes_from_convolution(self, name: str) -> bool:
        maker = self._graph.makers.get(name)
        if maker is not None and maker.op_type in ACTIVATIONS:
            maker = self._graph.makers.get(maker.input[0])
        return (
            maker is not None
            and maker.op_type in (*_CONVOLUTIONS, "Add")
            and maker.name in self._computing
        )

    def _range(self, name: str) -> Range:
        known = [self._ranges[n] for n in self._tied.group(name) if n in self._ranges]
        while not known:
            name = self._graph.makers[name].input[0]  # `_known` has found one further up
            known = [self._ranges[name]] if name in self._ranges else []
        return Range(min(one.low for one in known), max(one.high for one in known))

    def _useful(self, ranges: dict[str, Range]) -> dict[str, Range]:
        """The ranges, less what comes to nothing: where a ReLU follows an Add, and what the other
        branch has at most leaves it below 0. The steps between are smaller for it.
        """
        found = dict(ranges)
        if self._recipe.residual != "both":
            return found
        for name, one in ranges.items():
            add = self._graph.only_reader(name)
            if add is None or add.op_type != "Add" or len(self._tied.group(name)) > 1:
                continue
            behind = self._graph.only_reader(add.output[0])
            others = [other for other in add.input if other != name and other in ranges]
            if behind is None or behind.op_type != "Relu" or len(others) != 1:
                continue
            least = -max(0.0, ranges[others[0]].high)
            found[name] = Range(max(one.low, least), max(one.high, least))
        return found


class _Ties:
    """Tensors that must have the same scale."""

    def __init__(self) -> None:
        self._groups: dict[str, set[str]] = {}

    def tie(self, one: str, other: str) -> None:
        joined = self.group(one) | self.group(other)
        for name in joined:
            self._groups[name] = joined

    def group(self, name: str) -> set[str]:
        return self._groups.get(name, {name})


def _attention(graph: Graph) -> set[str]:
    """The names of two products, each of two computed factors, of which the second one reads
    weights that are made of what the first one gives.
    """
    varying = _varying(graph)
    products = {
        node.name
        for node in graph.nodes
        if node.op_type in ("Einsum", "Gemm", "MatMul")
        and not any(map(graph.is_constant, node.input[:2]))
        and varying.issuperset(node.input[1:2])
    }
    found = set()
    for node in graph.nodes:
        if node.name in products and (behind := set(_weighed(graph, node, products))):
            found |= behind | {node.name}
    return found


def _varying(graph: Graph) -> set[str]:
    """The tensors that depend on inputs: others are weights, even where nodes make them."""
    found = set(graph.inputs)
    for node in graph.nodes:
        if not found.isdisjoint(node.input) or not found.isdisjoint(captured(node)):
            found.update(name for name in node.output if name)
    return found


def _weighed(graph: Graph, start: onnx.NodeProto, products: Collection[str]) -> Iterator[str]:
    """The nearest products that read weights made of a product's result."""
    near, seen = [(reader, False) for reader in _taking(graph, start)], set()
    for _ in range(_FAR + 1):
        further: list[tuple[onnx.NodeProto, bool]] = []
        for node, weighed in near:
            if (node.name, weighed) in seen:
                continue
            seen.add((node.name, weighed))
            if node.name in products:
                if weighed:
                    yield node.name
            elif node.op_type in _WEIGHING or node.op_type in _WITHIN_ATTENTION:
                weighed |= node.op_type in _WEIGHING
                further += [(reader, weighed) for reader in _taking(graph, node)]
        near = further


def _taking(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [reader for name in node.output for reader, _ in graph.readers.get(name, [])]
