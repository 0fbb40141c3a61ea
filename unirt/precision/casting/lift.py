"""Back to float32: what only stands between float32 nodes, and integers that must stay exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from unirt.precision.casting.verdict import MOVING, OUTPUT_TYPE, Verdict
from unirt.precision.casting.weights import Low
from unirt.precision.graph import FLOAT, captured

if TYPE_CHECKING:
    import onnx

_INTEGERS: Final = frozenset({2, 3, 4, 5, 6, 7, 12, 13})  # (u)int8 to (u)int64


@dataclass
class _Origins:
    """What is known of tensors, and so of nodes, from where their values come.

    `wide` tensors are there in float32; `free` ones in either width, for they are weights;
    `constant` ones come from weights alone, `counting` ones from integers and perhaps weights.
    """

    wide: set[str]
    free: set[str]
    constant: set[str]
    counting: set[str] = field(default_factory=set)
    moving_nodes: set[int] = field(default_factory=set)
    counting_nodes: set[int] = field(default_factory=set)

    def see(
        self, index: int, node: onnx.NodeProto, verdict: Verdict, types: Mapping[str, int]
    ) -> None:
        floats = {name for name in node.input if types.get(name) == FLOAT}
        outputs = {name for name in node.output if types.get(name) == FLOAT}
        if node.op_type in MOVING and verdict.inputs == {0}:
            for known in (self.free, self.wide):
                if node.input[0] in known:
                    self.moving_nodes.add(index)
                    known |= outputs
                    break
        if node.op_type != "Constant":
            self.wide |= {n for at, n in enumerate(node.output) if at not in verdict.outputs}
        from_integers = node.op_type == "Cast" and types.get(node.input[0]) in _INTEGERS
        if from_integers or (floats & self.counting and floats <= self.counting | self.constant):
            self.counting_nodes.add(index)
            self.counting |= outputs
        elif floats and floats <= self.constant:
            self.constant |= outputs


def lift(
    graph: onnx.GraphProto,
    types: Mapping[str, int],
    weights: set[str],
    verdicts: Sequence[Verdict],
    border: set[str],
    low: Low,
) -> None:
    """Changes verdicts: forward to see where values come from, backward to see who wants them.

    `border` names the inputs and outputs that stay float32.
    """
    inputs = {value.name for value in graph.input} & border
    origins = _Origins(inputs, set(weights), set(weights))
    for index, (node, verdict) in enumerate(zip(graph.node, verdicts, strict=True)):
        origins.see(index, node, verdict, types)

    narrow: Counter[str] = Counter()  # how many want a tensor in that width
    wide: Counter[str] = Counter()
    for value in graph.output:
        (wide if value.name in border else narrow)[value.name] += 1
    for index in reversed(range(len(verdicts))):
        node, verdict = graph.node[index], verdicts[index]
        if verdict.inputs or verdict.outputs:
            wanted = any(wide[name] for name in node.output)
            only = wanted and not any(narrow[name] for name in node.output)
            _reconsider(index, node, verdict, origins, low, wanted=wanted, only=only)
        for position, name in enumerate(node.input):
            (narrow if position in verdict.inputs else wide)[name] += 1
        wide.update(captured(node))


def _reconsider(
    index: int,
    node: onnx.NodeProto,
    verdict: Verdict,
    origins: _Origins,
    low: Low,
    *,
    wanted: bool,
    only: bool,
) -> None:
    """`wanted`: somebody reads the node's outputs in float32; `only`: nobody reads them narrow."""
    leaves = node.op_type == "Cast" and not verdict.outputs  # the floats, for integers or others
    if index in origins.counting_nodes and (leaves or only or node.op_type in ("Sin", "Cos")):
        verdict.stay(f"it counts, which {low.name} does exactly only to {low.exact:,}")
    elif index in origins.moving_nodes:
        if node.input[0] in origins.free and wanted:
            verdict.stay("it moves a weight that is wanted in float32")
        elif only:
            verdict.stay("it only moves what stays in float32 before and after it")
    elif (node.op_type in OUTPUT_TYPE and not verdict.inputs and wanted) or (
        leaves and node.input[0] in origins.wide
    ):
        verdict.stay("")  # nothing is lost or kept by it
