"""Which tensors of which nodes become narrow, decided before anything is rewritten.

ONNX's own schemas say what an operator takes; above that stand the rules of this module: Q/DQ keep
float32, so does what loses its meaning in a narrower float, and what lies between two such nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from unirt.precision.calibration.calibrate import Extremes
from unirt.precision.casting.lift import lift
from unirt.precision.casting.verdict import MOVING, OUTPUT_TYPE, Verdict
from unirt.precision.casting.weights import (
    Fit,
    Low,
    constant_tensor,
    constant_tensors,
    dequantized_size,
)
from unirt.precision.graph import FLOAT, NOT_A_TENSOR, subgraphs

if TYPE_CHECKING:
    import onnx

SCALES: Final = "quantization keeps its scales in float32"
_STAYING: Final[Mapping[str, str]] = {
    "QuantizeLinear": SCALES,
    "DequantizeLinear": SCALES,
    "BitCast": "it reads bits, not numbers",
    "Range": "it counts",
    "MeanVarianceNormalization": "ONNX defines it by float32 constants",
}
_SUMMING: Final = frozenset(
    {
        *("GlobalLpPool", "LRN", "LpNormalization", "LpPool", "Mean"),
        *("ReduceL2", "ReduceLogSum", "ReduceLogSumExp"),
    }
)
"""What they sum up neither goes in nor comes out, so that no range tells of it."""

_AVERAGING: Final = frozenset({"GlobalAveragePool", "ReduceMean"})
HEADROOM: Final = 2
"""Times what was seen that has to be in range: data to come may go further."""
BY_HAND: Final = "it was told to stay"

# What a mask goes through, from the constant to the Softmax that it switches something off in.
_PASSING: Final = MOVING | {"Add", "Sub", "Where", "Min", "Max", "Concat"}
_STAYING_INPUTS: Final = frozenset({("Resize", 1)})  # the region of interest: coordinates


def means(graph: onnx.GraphProto) -> dict[str, str]:
    """The tensors that are means over another one, and over which."""
    return {node.output[0]: node.input[0] for node in graph.node if node.op_type in _AVERAGING}


@dataclass
class Plan:
    """A verdict for each node of the main graph, and what it rests on."""

    types: Mapping[str, int]
    weights: Mapping[str, onnx.TensorProto]
    verdicts: list[Verdict]
    notes: list[str]
    border: set[str]
    """Inputs and outputs that stay float32."""


def make_plan(
    model: onnx.ModelProto,
    types: Mapping[str, int],
    low: Low,
    keep_io: bool,
    seen: Extremes,
    keep: Collection[str],
) -> Plan:
    """`seen` is what values were, of no tensor if nothing was run."""
    graph = model.graph
    weights = {t.name: t for t in graph.initializer if t.data_type == FLOAT}
    for node in graph.node:
        if node.op_type == "Constant" and (tensor := constant_tensor(node)) is not None:
            weights[node.output[0]] = tensor
    planner = _Planner(model, types, weights, low, seen)
    verdicts = []
    for node in graph.node:
        verdict = planner.verdict(node)
        narrow = verdict.inputs | verdict.outputs
        if narrow and (reason := BY_HAND if node.name in keep else planner.beyond(node)):
            verdict.stay(reason)
        verdicts.append(verdict)
    staying = planner.staying_ends(graph)
    ends = {value.name for value in (*graph.input, *graph.output)}
    border = {name for name in ends if types.get(name) == FLOAT and (keep_io or name in staying)}
    lift(graph, types, set(weights), verdicts, border, low)
    notes = planner.notes(verdicts)
    if not keep_io:
        notes += [f"{name!r} stays float32: {reason}" for name, reason in staying.items()]
    return Plan(types, weights, verdicts, notes, border)


class _Planner:
    """Judges one node after the other, in the order of the graph."""

    def __init__(
        self,
        model: onnx.ModelProto,
        types: Mapping[str, int],
        weights: Mapping[str, onnx.TensorProto],
        low: Low,
        seen: Extremes,
    ) -> None:
        self._types = types
        self._seen = seen
        self._low = low
        self._nodes = model.graph.node
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._opsets[""] = self._opsets.get("", self._opsets.get("ai.onnx", 1))
        self._functions = {(function.domain, function.name) for function in model.functions}
        self._weights = dict(weights)
        self._tensors = constant_tensors(model.graph)
        self._dequantizing: dict[str, onnx.NodeProto] = {}  # by the weight that they make
        self._origin = {name: name for name in weights}  # also through nodes that only move values
        self._fits: dict[str, Fit] = {}
        self._sizes: dict[str, float] = {}
        self._clamped: dict[str, Fit] = {}
        self._switched: set[str] = set()  # tensors that clamped constants lead out of the range
        self._ahead: set[str] = set()  # operators that take the type only in a later opset

    def verdict(self, node: onnx.NodeProto) -> Verdict:
        verdict = Verdict()
        names = [name for name in (*node.input, *node.output) if name]
        here = [self._types.get(name) for name in names]
        if node.op_type == "Constant":
            return verdict
        if any(True for _ in subgraphs(node)):
            verdict.reason = "it holds a subgraph, which stays in float32 with all that it reads"
        elif (node.domain, node.op_type) in self._functions:
            verdict.reason = "it calls a function of the model, which stays in float32"
        elif FLOAT not in here and None not in here and NOT_A_TENSOR not in here:
            return verdict
        elif reason := _STAYING.get(node.op_type):
            verdict.reason = reason
            given = {name for name in node.input if name}
            if node.op_type == "DequantizeLinear" and given <= self._tensors.keys():
                self._dequantizing[node.output[0]] = node
                self._origin[node.output[0]] = node.output[0]
        elif node.op_type in _SUMMING and self._low.name == "fp16" and not _foreign(node):
            verdict.reason = "what it sums up inside soon leaves fp16"
        elif None in here:
            verdict.reason = f"the type of {names[here.index(None)]!r} is unknown"
        elif NOT_A_TENSOR in here:
            verdict.reason = f"{names[here.index(NOT_A_TENSOR)]!r} is no tensor but holds tensors"
        else:
            self._by_schema(node, verdict)
        return verdict

    def _by_schema(self, node: onnx.NodeProto, verdict: Verdict) -> None:
        opset = self._opsets[""]
        schema = None if _foreign(node) else _schema(node.op_type, opset)
        if schema is None:
            verdict.reason = f"{node.op_type} is no operator of ONNX's opset {opset}"
            return
        tied = set()
        for position, name in enumerate(node.input):
            formal = _formal(schema.inputs, position)
            wanted = (
                self._types.get(name) == FLOAT and (node.op_type, position) not in _STAYING_INPUTS
            )
            if wanted and self._takes(node, "inputs", position, formal):
                verdict.inputs.add(position)
                tied.add(formal.type_str)
        floats = {at for at, name in enumerate(node.output) if self._types.get(name) == FLOAT}
        for position in floats:
            formal = _formal(schema.outputs, position)
            free = position == 0 and node.op_type in OUTPUT_TYPE
            if (free or formal.type_str in tied) and self._takes(node, "outputs", position, formal):
                verdict.outputs.add(position)
        if verdict.inputs and node.op_type not in OUTPUT_TYPE and floats - verdict.outputs:
            verdict.outputs |= floats & self._following(node, schema, verdict.inputs)
        if not verdict.inputs and not verdict.outputs:
            verdict.reason = f"{node.op_type} has no {self._low.name} form in opset {opset}"
        elif loss := self._loss(node, verdict):
            verdict.stay(loss)

    def _following(self, node: onnx.NodeProto, schema: Any, narrow: set[int]) -> set[int]:
        """The outputs that ONNX infers to be narrow, where no type variable says so."""
        from onnx import checker, helper, shape_inference

        # In the place of bfloat16, which older schemas lack, float16 tells the same.
        types = {
            name: helper.make_tensor_type_proto(10 if at in narrow else self._types[name], None)
            for at, name in enumerate(node.input)
            if name
        }
        opsets = [helper.make_opsetid(*entry) for entry in self._opsets.items()]
        try:
            made = shape_inference.infer_node_outputs(schema, node, types, opset_imports=opsets)
        except (checker.ValidationError, shape_inference.InferenceError):
            return set()
        return {
            at
            for at, name in enumerate(node.output)
            if name in made and made[name].tensor_type.elem_type == 10
        }

    def _takes(self, node: onnx.NodeProto, side: str, position: int, formal: Any) -> bool:
        if self._low.type in formal.types:
            return True
        if self._low.name != "bf16":
            return False
        # Engines take bfloat16 in older opsets than ONNX, which added it bit by bit.
        newest = _schema(node.op_type)
        later = getattr(newest, side)
        if not later or self._low.type not in _formal(later, position).types:
            return False
        self._ahead.add(node.op_type)
        return True

    def _loss(self, node: onnx.NodeProto, verdict: Verdict) -> str:
        if node.op_type == "ConstantOfShape":
            for attribute in node.attribute:
                self._weights[node.output[0]] = attribute.t
                return self._weight_loss(node.output[0], node.op_type)
            return ""
        for position in sorted(verdict.inputs):
            origin = self._origin.get(node.input[position])
            if origin is None:
                continue
            if node.op_type in MOVING and position == 0:
                # Judged where it is used, so that it is known for what.
                self._origin.update((name, origin) for name in node.output)
            elif loss := self._weight_loss(origin, node.op_type):
                return loss
        return ""

    def beyond(self, node: onnx.NodeProto) -> str:
        """Why values that were seen keep the node in float32; empty if they do not."""
        switched = any(self._origin.get(name) in self._clamped for name in node.input) or (
            node.op_type in _PASSING and not self._switched.isdisjoint(node.input)
        )
        for name in (*node.input, *(() if switched else node.output)):
            if self._types.get(name) == FLOAT and (leaving := self._leaving(name)):
                return f"{name!r} {leaving}"
        total = self._seen.sums.get(node.output[0], 0.0)
        if total * HEADROOM > self._low.limit:
            limit = f"{self._low.name} {self._low.limit:.6g}"
            return f"the sums that it makes means of reach {total:.6g}, and {limit}"
        if switched:
            self._switched.update(node.output)
        return ""

    def _leaving(self, name: str) -> str:
        """Weights are judged elsewhere, and clamped constants lead out of the range on purpose."""
        ranges = self._seen.ranges
        if name not in ranges or name in self._origin or name in self._switched:
            return ""
        size = ranges[name].size
        if size * HEADROOM > self._low.limit:
            return f"reaches {size:.6g}, and {self._low.name} {self._low.limit:.6g}"
        if 0 < size < self._low.normal:
            return f"is at most {size:.6g}, where {self._low.name} has few digits left"
        return ""

    def staying_ends(self, graph: onnx.GraphProto) -> dict[str, str]:
        """The inputs and outputs that cannot be narrow, and why."""
        found = {}
        inputs = (value.name for value in graph.input if value.name not in self._weights)
        for name in (*inputs, *(value.name for value in graph.output)):
            if self._types.get(name) != FLOAT:
                continue
            origin = self._origin.get(name, name)
            if origin in self._dequantizing:
                reason = self._weight_loss(origin, "")
            elif origin in self._weights:
                reason = replace(self._fit(origin), switches=False).loss(origin, "")
            else:
                leaving = self._leaving(name)
                reason = leaving and f"it {leaving}"
            if reason:
                found[name] = reason
        return found

    def _weight_loss(self, name: str, op: str) -> str:
        if name in self._dequantizing:
            if name not in self._sizes:
                self._sizes[name] = dequantized_size(self._dequantizing[name], self._tensors)
            return self._low.loss(name, self._sizes[name])
        fit = self._fit(name)
        loss = fit.loss(name, op)
        if not loss and fit.clamped(op):
            self._clamped[name] = fit
        return loss

    def _fit(self, name: str) -> Fit:
        from onnx import numpy_helper

        if name not in self._fits:
            self._fits[name] = Fit.of(numpy_helper.to_array(self._weights[name]), self._low)
        return self._fits[name]

    def notes(self, verdicts: list[Verdict]) -> list[str]:
        limit = f"±{self._low.limit:.6g}"
        narrow: set[str] = set()
        used = set()
        for node, verdict in zip(self._nodes, verdicts, strict=True):
            names = [node.input[at] for at in verdict.inputs]
            names += [node.output[at] for at in verdict.outputs]
            narrow.update(self._origin.get(name, name) for name in names)
            if names:
                used.add(node.op_type)
        notes = [
            f"{name!r} goes to {fit.largest:.6g} and was clamped to {limit}, the end of "
            f"{self._low.name}"
            for name, fit in self._clamped.items()
            if name in narrow
        ]
        if ahead := sorted(self._ahead & used):
            has = max(_schema(op).since_version for op in ahead)
            notes.append(
                f"opset {self._opsets['']} has no bfloat16 yet for {', '.join(ahead)}, opset {has} "
                "does: TensorRT, OpenVINO and the reference take the graph all the same, ONNX "
                "Runtime and the full check of onnx.checker refuse it"
            )
        return notes


def _foreign(node: onnx.NodeProto) -> bool:
    """Of another domain, ai.onnx.ml among them: its trees hold float32 in attributes."""
    return node.domain not in ("", "ai.onnx")


@cache
def _schema(op: str, opset: int | None = None) -> Any:
    """An operator as of an opset, or as of the newest; None if it is not there."""
    from onnx import defs

    try:
        return defs.get_schema(op) if opset is None else defs.get_schema(op, opset)
    except defs.SchemaError:
        return None


def _formal(formals: Any, position: int) -> Any:
    return formals[min(position, len(formals) - 1)]
