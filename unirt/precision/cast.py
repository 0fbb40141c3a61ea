"""The float32 part of an ONNX graph in fp16 or bf16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from unirt.errors import BackendUnavailable, ModelError, OptionError
from unirt.model import Model, ModelFile, ModelSource
from unirt.precision.graph import infer_types, name_nodes
from unirt.precision.plan import make_plan
from unirt.precision.rewrite import Rewriter
from unirt.precision.weights import LOWS

if TYPE_CHECKING:
    import onnx

LIMIT: Final = 2**31 - 1
"""Bytes that one protobuf message may have, and so an ONNX model without external data."""


@dataclass(frozen=True)
class Cast:
    """A model in a narrower float, and what of it is not.

    `kept` says for each node that stays in float32 why it does. `notes` are sentences on what the
    cast changed beyond types. Nodes keep their names; nameless ones got a name from operator and
    position.
    """

    model: Model
    precision: str
    kept: Mapping[str, str]
    notes: tuple[str, ...]


def cast(
    model: Model | ModelSource, precision: Literal["fp16", "bf16"], *, keep_io: bool = True
) -> Cast:
    """The model with its float32 part in `precision`, held in memory.

    Inputs and outputs stay float32, with Cast nodes behind and before them, unless `keep_io` is
    False. Q/DQ nodes keep float32 scales. Nodes with subgraphs, calls of the model's own functions,
    nodes of unknown types and those whose constants do not survive stay in float32. Constants that
    only switch something off, such as masks of -1e9, are clamped to the range.

    Raises ModelError if there is nothing to cast or the result exceeds 2 GiB, OptionError for
    another precision, BackendUnavailable without the onnx package.
    """
    if precision not in LOWS:
        raise OptionError(
            f"{precision!r} is no precision to cast to.",
            "A cast goes to a narrower float.",
            f"Choose from {', '.join(LOWS)}.",
        )
    source = Model.open(model)
    file = source.file(["onnx"])
    if file is None:
        raise ModelError(
            f"{source.name} cannot be cast to {precision}.",
            f"Casting works on ONNX graphs, and it has {', '.join(source.formats)}.",
            "Export the network to ONNX too, and open both as one Model.",
        )
    low = LOWS[precision]
    proto = _read(file)
    name_nodes(proto.graph)
    plan = make_plan(proto, _types(proto, source.name), low, keep_io)
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
    _drop_weight_inputs(proto)
    Rewriter(proto, plan, low).run()
    _check_size(proto, source.name)
    result = Model(proto.SerializeToString(), name=source.name)
    return Cast(result, precision, MappingProxyType(kept), tuple(plan.notes))


def _read(file: ModelFile) -> onnx.ModelProto:
    """The model with all its weights in memory."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise BackendUnavailable(
            "The precision of this model cannot be changed here.",
            "The onnx package is not installed.",
            "pip install 'unirt[precision]'",
        ) from error
    if not file.external:
        return onnx.load_from_string(file.read())
    file.verify()
    return onnx.load(str(file.path))


def _types(proto: onnx.ModelProto, name: str) -> dict[str, int]:
    from onnx.shape_inference import InferenceError

    try:
        return infer_types(proto)
    except InferenceError as error:
        raise ModelError(
            f"The types in {name} cannot be told.",
            f"onnx says: {error}.",
            "Check the model with onnx.checker.check_model(model, full_check=True).",
        ) from error


def _drop_weight_inputs(proto: onnx.ModelProto) -> None:
    """Before IR version 4 each weight was listed as an input too; now that means something else."""
    if proto.ir_version >= 4:
        return
    proto.ir_version = 4
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)


def _check_size(proto: onnx.ModelProto, name: str) -> None:
    total = sum(tensor.ByteSize() for tensor in proto.graph.initializer)
    if total > LIMIT:
        raise ModelError(
            f"{name} is too large after the cast.",
            f"Its weights have {total:,} bytes, and a model in memory may have {LIMIT:,}.",
            "Split the network into several models, and cast each.",
            bytes=total,
        )
