"""The float32 part of an ONNX graph in int8, fp8 or int4, as Q/DQ pairs that say so explicitly."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, get_args

from unirt.errors import DataError, ModelError, OptionError
from unirt.model import Model, ModelSource
from unirt.precision.calibration.moments import SecondMoments
from unirt.precision.calibration.ranges import (
    Calibration,
    CalibrationSource,
    Range,
    find_calibration,
)
from unirt.precision.graph import all_nodes
from unirt.precision.names import check_nodes, nearest
from unirt.precision.opset import raise_opset
from unirt.precision.prepare import Graph, fold, join_biases
from unirt.precision.quantization.placement import (
    BY_HAND,
    CONTRACTIONS,
    Choice,
    Placement,
    place,
    place_weights,
)
from unirt.precision.quantization.qdq import FP8, INT4, INT8, UINT8, write
from unirt.precision.quantization.recipes import TENSORRT, Recipe, find_recipe
from unirt.precision.source import (
    check_size,
    drop_weight_inputs,
    find_onnx,
    known_shapes,
    read_graph,
)

if TYPE_CHECKING:
    import onnx

Precision = Literal["int8", "fp8", "int8-weights", "int4-weights"]

PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)
_OPSETS: Final[Mapping[str, int]] = {"int8": 13, "int8-weights": 13, "fp8": 19, "int4-weights": 21}
_BLOCKED_OPSET: Final = 21
_INT4_BLOCK: Final = 32  # what TensorRT's kernels take
_HALF: Final = (10, 16)  # float16 and bfloat16
_QUANTIZED_OPS: Final = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
    | {"QGemm", "QAttention", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
)


@dataclass(frozen=True)
class Quantized:
    """A model whose products are computed in a low precision, and what of it is not.

    `nodes` are the names of those that compute in it, in the order of the graph; `kept` says for
    each other product, and for each node that was told to stay, why it stays in float32. `notes`
    are sentences on what else was changed. All nodes keep their names, but for those that became
    part of the weights in front of them.
    """

    model: Model
    precision: str
    recipe: str
    nodes: tuple[str, ...]
    kept: Mapping[str, str]
    notes: tuple[str, ...]


def quantize(
    model: Model | ModelSource,
    calibration: CalibrationSource | None = None,
    precision: Precision = "int8",
    recipe: str | Recipe = TENSORRT,
    *,
    keep: Collection[str] = (),
    only: Collection[str] | None = None,
    block: int | None = None,
    moments: SecondMoments | None = None,
) -> Quantized:
    """The model with explicit Q/DQ, held in memory; its weights stored in the low precision.

    `int8` and `fp8` (E4M3) quantize weights, by output channel, and activations, by tensor, to the
    ranges of `calibration`, itself or the path it was saved to; the `-weights` precisions only
    weights, by output channel or, where `block` is given (int4: 32 by default), by blocks of so
    many values that are summed up. `recipe` says where the target wants it (`RECIPES`,
    `recipe_for`). Nodes named in `keep` stay in float32, and with `only` all others but these.
    Products in subgraphs and functions stay too. Biases stay float32, or become int32 where the
    recipe says so. Weights are scaled by their largest value, and rounded so that errors cancel
    out: on data where its `moments` are given (GPTQ, Frantar et al. 2022), else within each channel
    (SQuant, Guo et al. 2022). Inputs, outputs and their types do not change; the opset rises where
    Q/DQ need it.

    Raises OptionError for an unknown precision, recipe or node; DataError without the calibration
    that is needed, and for a path that cannot be read; ModelError for one of other tensors, for
    moments of another model, and for a graph that is quantized already, is not float32, holds
    damaged weights, has nothing to quantize, cannot be raised to the opset needed or exceeds 2 GiB;
    BackendUnavailable without the onnx package.
    """
    recipe = find_recipe(recipe).of(precision)
    block = _checked(precision, recipe, block)
    found = None if calibration is None else find_calibration(calibration)
    source = Model.open(model)
    file = find_onnx(source, f"quantized to {precision}")
    if moments is not None and moments.model != file.hash:
        raise ModelError(
            f"These second moments are not those of {source.name}.",
            "They were found on another file, and say nothing of how the inputs of this one go "
            "together.",
            "Find them anew, by second_moments(model, data), or leave moments out.",
        )
    weights_only = precision.endswith("-weights")
    proto = read_graph(file, "quantized")
    _check_graph(proto, source.name)
    drop_weight_inputs(proto, always=True)
    ranges, notes = ({}, []) if weights_only else _ranges(found, source, precision)
    needed = max(_OPSETS[precision], _BLOCKED_OPSET if block else 0)
    notes += raise_opset(proto, needed, source.name)
    graph = Graph(proto)
    choice = _choice(graph, keep, only)
    notes += fold(graph)
    if recipe.integer_bias and not weights_only:
        join_biases(graph, known_shapes(proto))
    if weights_only:
        bits = 4 if precision == "int4-weights" else 8
        placement = place_weights(graph, recipe, bits, block, choice)
    else:
        placement = place(graph, recipe, ranges, known_shapes(proto), choice)
    for node in graph.nodes:
        if node.name in choice.keep:
            placement.kept.setdefault(node.name, BY_HAND)
    if not placement.nodes:
        raise _nothing(source.name, precision, placement, graph, choice)
    activation = FP8 if precision == "fp8" else UINT8 if recipe.asymmetric else INT8
    weight = {"fp8": FP8, "int4-weights": INT4, "int8": INT8}
    notes += write(
        graph,
        placement,
        recipe,
        weight.get(precision, INT8),
        None if weights_only else activation,
        block,
        moments,
    )
    graph.finish()
    _tell(proto, precision, recipe)
    check_size(proto, source.name, "quantization")
    result = Model(proto.SerializeToString(), name=source.name)
    return Quantized(
        result,
        precision,
        recipe.name,
        tuple(placement.nodes),
        MappingProxyType(placement.kept),
        tuple(notes),
    )


def _checked(precision: str, recipe: Recipe, block: int | None) -> int | None:
    """The block size to use, None for none."""
    if precision not in PRECISIONS:
        raise OptionError(
            f"{precision!r} is no precision to quantize to.",
            f"A graph is quantized to {', '.join(PRECISIONS)}; cast goes to fp16 and bf16.",
            nearest(_as_called_here(str(precision)), PRECISIONS, "Choose one of them."),
            precision=precision,
        )
    if precision not in recipe.precisions:
        raise OptionError(
            f"The recipe {recipe.name!r} has no {precision}.",
            f"It is for engines that compute in {', '.join(recipe.precisions)}.",
            f"Choose one of these, or a recipe with {precision}.",
            precision=precision,
            recipe=recipe.name,
        )
    if block is None:
        return _INT4_BLOCK if precision == "int4-weights" else None
    whole = isinstance(block, numbers.Integral) and not isinstance(block, bool)
    if not precision.endswith("-weights") or not whole or block < 2:
        raise OptionError(
            f"block={block!r} cannot be used with {precision}.",
            "Blocks are at least 2 values of a weight that share a scale, a whole number; only the "
            "-weights precisions have them.",
            "Leave block out, or quantize weights only, in blocks of for example 32.",
            block=block,
        )
    return int(block)


def _as_called_here(precision: str) -> str:
    """Candidates write int4w, and some write int4, where int4-weights is meant."""
    weights = f"{precision.removesuffix('w')}-weights"
    known = precision in PRECISIONS or weights not in PRECISIONS
    return precision if known else weights


def _ranges(
    calibration: Calibration | None, source: Model, precision: str
) -> tuple[Mapping[str, Range], list[str]]:
    """What a calibration knows of this model, and notes on whether they belong together."""
    if calibration is None:
        raise DataError(
            f"{source.name} cannot be quantized to {precision} without a calibration.",
            "Activations are quantized too, and only data tells their ranges.",
            "Calibrate the model first, or quantize weights only, with int8-weights.",
        )
    return calibration.ranges, list(calibration.check(source))


def _check_graph(proto: onnx.ModelProto, name: str) -> None:
    functions = [node for function in proto.functions for node in function.node]
    for node in all_nodes([*proto.graph.node, *functions]):
        if node.op_type in _QUANTIZED_OPS or node.op_type.startswith("QLinear"):
            raise ModelError(
                f"{name} is quantized already.",
                f"It has {node.op_type} {node.name or node.output[0]!r}.",
                "Use it as it is, or quantize the float32 network that it was made from.",
                node=node.name,
            )
    halves = [t.name for t in proto.graph.initializer if t.data_type in _HALF and t.dims]
    if halves:
        raise ModelError(
            f"{name} is not in float32.",
            f"Its weight {halves[0]!r}, for one, has 16 bits, and Q/DQ around it need float32.",
            "Quantize the float32 network; cast the result to fp16 where that helps.",
            tensor=halves[0],
        )


def _choice(graph: Graph, keep: Collection[str], only: Collection[str] | None) -> Choice:
    check_nodes("keep", keep, graph.nodes)
    if only is not None:
        check_nodes("only", only, graph.nodes)
    return Choice(frozenset(keep), None if only is None else frozenset(only))


def _nothing(
    name: str, precision: str, placement: Placement, graph: Graph, choice: Choice
) -> ModelError:
    example = next(iter(placement.kept.items()), None)
    named = [node for node in graph.nodes if choice.only is not None and node.name in choice.only]
    if named and not any(node.op_type in CONTRACTIONS for node in named):
        return ModelError(
            f"{name} has nothing to quantize to {precision} of what `only` names.",
            f"{named[0].op_type} {named[0].name!r} is never quantized for itself, only beside "
            f"products, which are {', '.join(CONTRACTIONS)}.",
            "Name those that shall be quantized.",
            kept=dict(placement.kept),
        )
    return ModelError(
        f"{name} has nothing to quantize to {precision}.",
        f"All its products must stay in float32: {example[0]!r}, for one, since {example[1]}."
        if example
        else "It has no convolution, Gemm or MatMul.",
        "Use the model as it is.",
        kept=dict(placement.kept),
    )


def _tell(proto: onnx.ModelProto, precision: str, recipe: Recipe) -> None:
    """Writes into the file what it is, for those who find it later."""
    told = {"unirt.precision": precision, "unirt.recipe": recipe.name}
    others = [entry for entry in proto.metadata_props if entry.key not in told]
    del proto.metadata_props[:]
    for entry in others:
        proto.metadata_props.add(key=entry.key, value=entry.value)
    for key, value in told.items():
        proto.metadata_props.add(key=key, value=value)
