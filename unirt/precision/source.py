"""The ONNX graph that a transform starts from: found, read and typed; and the limit of its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from unirt.errors import BackendUnavailable, ModelError
from unirt.model import Model, ModelFile
from unirt.precision.graph import FLOAT, infer_types, main_names
from unirt.precision.tflite import read_graphs

if TYPE_CHECKING:
    import onnx

LIMIT: Final = 2**31 - 1
"""Bytes that one protobuf message may have, and so an ONNX model without external data."""


def find_onnx(model: Model, what: str) -> ModelFile:
    """The model's ONNX file. Raises ModelError without one: it cannot be `what`."""
    file = model.file(["onnx"])
    if file is None:
        raise ModelError(
            f"{model.name} cannot be {what}.",
            f"That works on ONNX graphs, and it has {', '.join(model.formats)}.",
            "Export the network to ONNX too, and open both as one Model.",
        )
    return file


def read_graph(file: ModelFile, what: str, *, weights: bool = True) -> onnx.ModelProto:
    """The model with all its weights in memory, or without those that lie in other files.

    Raises BackendUnavailable without the onnx package: no model can be `what` here; ModelError if a
    file changed since it was opened.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise BackendUnavailable(
            f"No model can be {what} here.",
            "The onnx package is not installed.",
            "pip install 'unirt[precision]'",
        ) from error
    if not (file.external and weights):
        return onnx.load_from_string(file.read())
    file.verify()
    return onnx.load(str(file.path))


def tensor_types(proto: onnx.ModelProto, name: str) -> dict[str, int]:
    """Element types as `infer_types` finds them. Raises ModelError where they contradict."""
    from onnx.shape_inference import InferenceError

    try:
        return infer_types(proto)
    except InferenceError as error:
        raise ModelError(
            f"The types in {name} cannot be told.",
            f"onnx says: {error}.",
            "Check the model with onnx.checker.check_model(model, full_check=True).",
        ) from error


def drop_weight_inputs(proto: onnx.ModelProto, *, always: bool = False) -> None:
    """Before IR version 4 each weight was listed as an input too. Now that makes it one that may
    be fed, which UniRT never does: `always` drops those as well.
    """
    if proto.ir_version >= 4 and not always:
        return
    proto.ir_version = max(proto.ir_version, 4)
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)


def check_size(proto: onnx.ModelProto, name: str, step: str, limit: int = LIMIT) -> None:
    """Raises ModelError for a graph that a `step`, such as a cast, made too large for memory."""
    total = sum(tensor.ByteSize() for tensor in proto.graph.initializer)
    if total > limit:
        raise ModelError(
            f"{name} is too large after {step}.",
            f"Its weights have {total:,} bytes, and a model in memory may have {limit:,}.",
            f"Split the network into several models, and repeat {step} on each.",
        )


def graph_names(model: Model) -> tuple[str, frozenset[str]]:
    """The content hash of the model's ONNX file, or of its .tflite where it has none, and the names
    of all tensors of its main graph.

    Raises ModelError, BackendUnavailable.
    """
    if tuple(model.formats) == ("tflite",):
        file = model.formats["tflite"]
        (graph, *_) = read_graphs(file.read(), model.name)
        return file.hash, frozenset(tensor.name for tensor in graph.tensors if tensor.name)
    file = find_onnx(model, "calibrated")
    return file.hash, main_names(read_graph(file, "calibrated", weights=False).graph)


def known_shapes(model: Any) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the main graph's tensors as ONNX infers them; sizes that vary are None."""
    from onnx import ModelProto, shape_inference

    skeleton = ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    graph = skeleton.graph
    graph.name = model.graph.name
    for name in ("node", "input", "output", "value_info"):
        getattr(graph, name).extend(getattr(model.graph, name))
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT:  # only integers tell shapes
            graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=FLOAT)
        else:
            graph.initializer.append(tensor)
    inferred = shape_inference.infer_shapes(skeleton).graph
    found = {}
    for value in (*inferred.value_info, *inferred.output, *inferred.input):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            found[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim
            )
    return found
