"""Carries out a plan: narrow weights, Cast nodes where the two widths meet, types at the border."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Literal

from unirt.precision.casting.plan import Plan
from unirt.precision.casting.verdict import OUTPUT_TYPE, Verdict
from unirt.precision.casting.weights import Low, narrowed
from unirt.precision.graph import FLOAT, captured, name_nodes, rename_captured, tensor_names

if TYPE_CHECKING:
    import onnx

Width = Literal["low", "high"]


class Rewriter:
    """Rewrites a model's main graph in place.

    Each float32 tensor may be wanted in both widths. One of them keeps the tensor's name: that of
    the border for inputs and outputs, else that in which it is produced. The other gets a new name
    and comes from a Cast node, or for a weight from a second copy.
    """

    def __init__(self, model: onnx.ModelProto, plan: Plan, low: Low) -> None:
        self._graph = model.graph
        self._plan = plan
        self._low = low
        self._names = tensor_names(model.graph)
        self._node_names = name_nodes(model.graph)
        self._nodes: list[onnx.NodeProto] = []
        self._spelled: dict[tuple[str, Width], str] = {}
        self._outputs = {value.name for value in self._graph.output}
        self._ends = {value.name for value in self._graph.input} | self._outputs
        self._wanted: dict[str, set[Width]] = defaultdict(set)
        for value in self._graph.output:
            self._wanted[value.name].add(self._end_width(value.name))
        for node, verdict in self._judged():
            for position, name in enumerate(node.input):
                self._wanted[name].add("low" if position in verdict.inputs else "high")
            for name in captured(node):
                self._wanted[name].add("high")

    def run(self) -> None:
        graph = self._graph
        produced: dict[str, Width] = {}
        self._write_initializers()
        for value in graph.input:
            if self._is_float(value.name) and value.name not in self._plan.weights:
                produced[value.name] = self._end_width(value.name)
                self._bridge(value.name, produced[value.name])
        for node, verdict in self._judged():
            if node.op_type == "Constant" and node.output[0] in self._plan.weights:
                self._write_constant(node)
            else:
                self._write_node(node, verdict, produced)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if self._is_float(value.name) and self._owner(value.name, produced) == "low":
                value.type.tensor_type.elem_type = self._low.number
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _judged(self) -> zip[tuple[onnx.NodeProto, Verdict]]:
        return zip(self._graph.node, self._plan.verdicts, strict=True)

    def _is_float(self, name: str) -> bool:
        return self._plan.types.get(name) == FLOAT

    def _end_width(self, name: str) -> Width:
        return "high" if name in self._plan.border else "low"

    def _owner(self, name: str, produced: dict[str, Width]) -> Width:
        """The width that keeps the tensor's own name."""
        if name in self._plan.weights:
            return self._weight_owner(name)
        if name in self._ends:
            return self._end_width(name)
        return produced.get(name, "high")

    def _weight_owner(self, name: str) -> Width:
        if name in self._outputs:
            return self._end_width(name)
        return "low" if self._wanted[name] == {"low"} else "high"

    def _spell(self, name: str, width: Width, owner: Width) -> str:
        if width == owner:
            return name
        key = name, width
        if key not in self._spelled:
            suffix = self._low.name if width == "low" else "fp32"
            self._spelled[key] = self._names.fresh(f"{name}__{suffix}")
        return self._spelled[key]

    def _write_initializers(self) -> None:
        for tensor in list(self._graph.initializer):
            if tensor.name not in self._plan.weights or "low" not in self._wanted[tensor.name]:
                continue
            owner = self._weight_owner(tensor.name)
            name = self._spell(tensor.name, "low", owner)
            low = narrowed(tensor, self._low, name)
            if owner == "high":
                self._graph.initializer.append(low)
                continue
            if "high" in self._wanted[tensor.name]:
                wide = self._graph.initializer.add()
                wide.CopyFrom(tensor)
                wide.name = self._spell(tensor.name, "high", owner)
            tensor.CopyFrom(low)

    def _write_constant(self, node: onnx.NodeProto) -> None:
        from onnx import helper

        name = node.output[0]
        owner = self._weight_owner(name)
        for width in sorted(self._wanted[name] or {owner}, key=lambda w: w != owner):
            copy = helper.make_node("Constant", [], [self._spell(name, width, owner)], node.name)
            copy.CopyFrom(node)
            copy.output[0] = self._spell(name, width, owner)
            if width != owner:
                copy.name = self._node_names.fresh(copy.output[0])
            if width == "low":
                value = narrowed(self._plan.weights[name], self._low, "")
                del copy.attribute[:]
                copy.attribute.append(helper.make_attribute("value", value))
            self._nodes.append(copy)

    def _write_node(
        self, node: onnx.NodeProto, verdict: Verdict, produced: dict[str, Width]
    ) -> None:
        outer = {}
        for name in filter(self._is_float, captured(node)):
            outer[name] = self._spell(name, "high", self._owner(name, produced))
        rename_captured(node, outer)
        for position, name in enumerate(node.input):
            if self._is_float(name):
                width: Width = "low" if position in verdict.inputs else "high"
                node.input[position] = self._spell(name, width, self._owner(name, produced))
        if node.op_type in OUTPUT_TYPE and self._is_float(node.output[0]):
            self._set_output_type(node, 0 in verdict.outputs)
        written = list(node.output)
        for position, name in enumerate(written):
            if self._is_float(name):
                produced[name] = "low" if position in verdict.outputs else "high"
                node.output[position] = self._spell(
                    name, produced[name], self._owner(name, produced)
                )
        self._nodes.append(node)
        for name in filter(self._is_float, written):
            self._bridge(name, produced[name])

    def _set_output_type(self, node: onnx.NodeProto, is_low: bool) -> None:
        from onnx import helper

        name = OUTPUT_TYPE[node.op_type]
        present = next((a for a in node.attribute if a.name == name), None)
        if name == "value":
            if not is_low:
                return
            zero = helper.make_tensor("", FLOAT, [1], [0.0])
            value = narrowed(present.t if present else zero, self._low, "")
            replacement = helper.make_attribute(name, value)
        else:
            replacement = helper.make_attribute(name, self._low.number if is_low else FLOAT)
        if present is not None:
            node.attribute.remove(present)
        node.attribute.append(replacement)

    def _bridge(self, name: str, width: Width) -> None:
        """The Cast node to the other width, where that is wanted."""
        from onnx import helper

        other: Width = "high" if width == "low" else "low"
        if other not in self._wanted[name]:
            return
        owner = self._end_width(name) if name in self._ends else width
        number = self._low.number if other == "low" else FLOAT
        given, made = self._spell(name, width, owner), self._spell(name, other, owner)
        label = self._node_names.fresh(f"{name}__cast")
        self._nodes.append(helper.make_node("Cast", [given], [made], label, to=number))
