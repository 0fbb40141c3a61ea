"""The float32 part of an ONNX graph in fp16 or bf16."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from unirt.errors import ModelError, OptionError
from unirt.model import Model, ModelSource
from unirt.precision.calibration.calibrate import CalibrationData, Extremes, extremes
from unirt.precision.calibration.ranges import (
    BY_HAND,
    Calibration,
    CalibrationSource,
    find_calibration,
)
from unirt.precision.casting.plan import SCALES, make_plan, means
from unirt.precision.casting.rewrite import Rewriter
from unirt.precision.casting.weights import LOWS
from unirt.precision.graph import main_names, name_nodes
from unirt.precision.names import check_nodes
from unirt.precision.source import (
    LIMIT,
    check_size,
    drop_weight_inputs,
    find_onnx,
    read_graph,
    tensor_types,
)

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Cast:
    """A model in a narrower float, and what of it is not.

    `kept` says for each node that stays in float32 why it does. `notes` are sentences on what the
    cast changed beyond types, and on inputs and outputs that stay against the caller's wish. Nodes
    keep their names; nameless ones got a name from operator and position.
    """

    model: Model
    precision: str
    kept: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def wide(self) -> Mapping[str, str]:
        """`kept` without Q/DQ nodes, which always stay."""
        return {name: why for name, why in self.kept.items() if why != SCALES}


def cast(
    model: Model | ModelSource,
    precision: Literal["fp16", "bf16"],
    *,
    keep_io: bool = True,
    data: CalibrationData | None = None,
    ranges: CalibrationSource | None = None,
    keep: Collection[str] = (),
) -> Cast:
    """The model with its float32 part in `precision`, held in memory.

    Inputs and outputs stay float32, with Cast nodes behind and before them, unless `keep_io` is
    False; even then those do that leave the range, each with a note. Q/DQ nodes keep float32
    scales. Nodes with subgraphs, calls of the model's own functions, nodes of unknown types and
    those whose constants do not survive stay in float32, and so do those named in `keep`. Constants
    that only switch something off, such as masks of -1e9, are clamped to the range.

    With `data`, inputs as `unirt.precision.observe` takes them, the network is run, a quantized one
    too, and nodes stay whose values come within a factor of two of the end of the range or are all
    too small for it. `ranges` says the same without running anything: what
    `observe(...).calibration("max")` found, or a file that it was saved to, for a network that was
    quantized since too. Only data tells of sums inside means.

    Raises ModelError if there is nothing to cast, the result exceeds 2 GiB or the ranges are of
    another network, OptionError for another precision, an unknown node, or both data and ranges,
    BackendUnavailable without the onnx package; DataError for a file that holds no calibration;
    with `data` what `observe` raises, DataError for one where the network itself gives NaN or
    infinity.
    """
    if not isinstance(precision, str) or precision not in LOWS:
        raise OptionError(
            f"{precision!r} is no precision to cast to.",
            "A cast goes to a narrower float.",
            f"Choose from {', '.join(LOWS)}.",
        )
    if data is not None and ranges is not None:
        raise OptionError(
            "There are both data and ranges.",
            "Data is run to find the ranges that values have.",
            "Give one of them.",
        )
    given = None if ranges is None else find_calibration(ranges)
    source = Model.open(model)
    low = LOWS[precision]
    proto = read_graph(find_onnx(source, f"cast to {precision}"), "cast")
    name_nodes(proto.graph)
    check_nodes("keep", keep, proto.graph.node)
    seen = Extremes({})
    if data is not None:
        seen = extremes(source, data, means(proto.graph))
    elif given is not None:
        seen = _seen(proto, given, source.name)
    plan = make_plan(proto, tensor_types(proto, source.name), low, keep_io, seen, keep)
    kept = {
        node.name: verdict.reason
        for node, verdict in zip(proto.graph.node, plan.verdicts, strict=True)
        if verdict.reason
    }
    if not any(verdict.inputs | verdict.outputs for verdict in plan.verdicts):
        example = next(iter(kept.items()), None)
        raise ModelError(
            f"{source.name} has nothing to cast to {precision}.",
            f"All its float32 nodes must stay: {example[0]!r}, for one, since {example[1]}."
            if example
            else "No node of it computes in float32.",
            "Use the model as it is.",
            kept=kept,
        )
    drop_weight_inputs(proto)
    Rewriter(proto, plan, low).run()
    check_size(proto, source.name, "the cast", LIMIT)
    result = Model(proto.SerializeToString(), name=source.name)
    notes = plan.notes
    if given is not None and given.method not in ("max", BY_HAND) and precision == "fp16":
        notes.append(
            f"the ranges are by {given.method}, which may leave out the largest values: only those "
            "by max tell of all that leaves fp16"
        )
    return Cast(result, precision, MappingProxyType(kept), tuple(notes))


def _seen(proto: onnx.ModelProto, ranges: Calibration, name: str) -> Extremes:
    """Ranges by tensor: Q/DQ pass on what they are given, under other names.

    Raises ModelError if they are of nothing in the graph.
    """
    seen = dict(ranges.ranges)
    if seen and seen.keys().isdisjoint(main_names(proto.graph)):
        raise ModelError(
            f"The ranges are not those of {name}.",
            f"They are of {len(seen)} tensors, such as {next(iter(seen))!r}, and the model has no "
            "tensor of any of these names.",
            "Give those of this model, or of the one that it was quantized from.",
        )
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] in seen:
            seen[node.output[0]] = seen[node.input[0]]
    return Extremes(seen)
