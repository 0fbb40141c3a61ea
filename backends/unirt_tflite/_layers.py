"""The layers of an engine: a network's operators, and who computes each, as the interpreter lists
them.

Once it has handed parts of the network to delegates, the list still holds all operators, and behind
them one DELEGATE for each part, of which it tells no more than what the part reads and gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unirt import BackendUnavailable, EngineReport, Layer, LayerTensor, ModelFile

SOURCE = "interpreter's list of operators"
DELEGATE = "DELEGATE"

KERNELS = {"xnnpack": "TFLite", "builtin": "TFLite", "reference": "TFLite's reference"}
"""Who computes what no delegate took, by the option `kernels`."""

# Reports draw conclusions from ONNX's names of operators; all others keep those of TFLite.
ONNX = {
    "QUANTIZE": "QuantizeLinear",
    "DEQUANTIZE": "DequantizeLinear",
    "FULLY_CONNECTED": "Gemm",
    "RESHAPE": "Reshape",
    "TRANSPOSE": "Transpose",
    "CAST": "Cast",
    "CONCATENATION": "Concat",
    "PAD": "Pad",
    "PADV2": "Pad",
    "SQUEEZE": "Squeeze",
    "EXPAND_DIMS": "Unsqueeze",
    "DEPTH_TO_SPACE": "DepthToSpace",
    "SPACE_TO_DEPTH": "SpaceToDepth",
}
# Given floats and weights of few bits, they round the floats to int8 by themselves.
ROUNDING = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"}
)
BYTES = frozenset({"int8", "uint8"})  # also what the interpreter calls types below a byte
CALLING = frozenset({"IF", "WHILE", "CALL", "CALL_ONCE"})

FEW = 3
"""Up to so many layers are named in a note."""

UNPREPARED = (
    "LiteRT cannot prepare this network at the sizes that its file declares, with 1 for those that "
    "are open: at other sizes delegates may take other parts."
)
ROUNDED = (
    "Layers that read floats and have int8 weights round the floats to int8 while they run: that "
    "copy, shown among their inputs, follows from the types, since LiteRT does not name it."
)
BELOW_A_BYTE = (
    "The file has weights of less than 8 bits, which LiteRT, and so this table, tells as int8."
)
INSIDE = "What runs inside IF, WHILE and CALL is a part of that layer here."


@dataclass(frozen=True)
class Operator:
    """One entry of the interpreter's list, without the inputs that were left out."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read_layers(interpreter: Any, kernels: str, file: ModelFile) -> EngineReport:
    """The report of an interpreter that was just made, and is allocated here.

    Raises BackendUnavailable where this version of LiteRT does not list its operators.
    """
    # Further delegates take their parts at once, XNNPACK takes its own when tensors are allocated.
    others = sum(one.kind == DELEGATE for one in _listed(interpreter))
    notes = []
    try:
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError):
        notes.append(UNPREPARED)
    listed = _listed(interpreter)
    operators = [one for one in listed if one.kind != DELEGATE]
    parts = [one for one in listed if one.kind == DELEGATE]
    tensors = _tensors(interpreter)
    inputs, outputs = (
        tuple(detail["index"] for detail in found)
        for found in (interpreter.get_input_details(), interpreter.get_output_details())
    )
    computed = {*inputs, *(index for one in operators for index in one.outputs)}
    constant = {index for one in operators for index in one.inputs} - computed
    names = _names(operators, tensors)
    takers = _takers(operators, parts)
    layers = []
    for number, (name, one) in enumerate(zip(names, operators, strict=True)):
        # Weights that are stored in few bits are unpacked once, before the first run.
        if one.kind == "DEQUANTIZE" and constant.issuperset(one.inputs):
            constant.update(one.outputs)
            continue
        part = takers.get(number)
        read = [tensors[index] for index in one.inputs if index not in constant]
        weights = [tensors[index] for index in one.inputs if index in constant]
        layers.append(
            Layer(
                name,
                one.kind,
                (name,),
                (*read, *_rounded(one.kind, read, weights)),
                tuple(tensors[index] for index in one.outputs),
                KERNELS[kernels] if part is None else _part(part, others),
                constants=tuple(weights),
            )
        )
        if len(layers[-1].inputs) > len(read) and ROUNDED not in notes:
            notes.append(ROUNDED)
    left = [layer for layer in layers if layer.tactic == KERNELS["xnnpack"]]
    if kernels == "xnnpack" and left:
        notes.append(_left(left, len(layers)))
    if any(dtype.startswith(("int4", "int2", "uint4")) for dtype in file.weight_dtypes):
        notes.append(BELOW_A_BYTE)
    if any(one.kind in CALLING for one in operators):
        notes.append(INSIDE)
    return EngineReport(
        tuple(layers),
        SOURCE,
        {name: ONNX.get(one.kind, one.kind) for name, one in zip(names, operators, strict=True)},
        tuple(tensors[index] for index in inputs),
        tuple(tensors[index] for index in outputs),
        notes=tuple(notes),
    )


def _listed(interpreter: Any) -> list[Operator]:
    try:
        # The only place where LiteRT tells; not part of its promised interface.
        return [
            Operator(
                str(one["op_name"]),
                tuple(int(index) for index in one["inputs"] if index >= 0),
                tuple(int(index) for index in one["outputs"] if index >= 0),
            )
            for one in interpreter._get_ops_details()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackendUnavailable(
            "tflite does not show its layers here.",
            f"This interpreter does not list its operators: {type(error).__name__}: {error}.",
            "pip install 'unirt[tflite]', or use another candidate to look at layers.",
            backend="tflite",
        ) from error


def _tensors(interpreter: Any) -> Mapping[int, LayerTensor]:
    """All tensors by index, each with a name of its own; sizes that are open are -1."""
    details = interpreter.get_tensor_details()
    times = Counter(detail["name"] for detail in details)
    found = _Told()
    for detail in details:
        name, index = str(detail["name"]), int(detail["index"])
        if not name or times[name] > 1:
            name = f"{name or 'tensor'} {index}"
        sizes, open_sizes = ([int(n) for n in detail[k]] for k in ("shape", "shape_signature"))
        shape = open_sizes if len(open_sizes) == len(sizes) else sizes
        found[index] = LayerTensor(name, _dtype(detail["dtype"]), tuple(shape))
    return found


class _Told(dict[int, LayerTensor]):
    """LiteRT leaves out tensors of which it does not know everything."""

    def __missing__(self, index: int) -> LayerTensor:
        return LayerTensor(f"tensor {index}", "")


def _dtype(kind: Any) -> str:
    if kind is np.object_:
        return "resource"
    return "string" if kind in (np.bytes_, np.str_) else np.dtype(kind).name


def _names(operators: Iterable[Operator], tensors: Mapping[int, LayerTensor]) -> list[str]:
    """Operators have no names of their own: they go by that of their first output."""
    return [
        tensors[one.outputs[0]].name if one.outputs else f"operator {number}"
        for number, one in enumerate(operators)
    ]


def _takers(operators: Sequence[Operator], parts: Sequence[Operator]) -> Mapping[int, int]:
    """Which of the parts each operator belongs to, for those that a delegate took.

    A tensor that a part needs and does not read was computed inside it, and who reads one that it
    does not give stands inside it too.
    """
    makers = {index: number for number, one in enumerate(operators) for index in one.outputs}
    readers: dict[int, list[int]] = {}
    for number, one in enumerate(operators):
        for index in one.inputs:
            readers.setdefault(index, []).append(number)
    found: dict[int, int] = {}
    for place, part in enumerate(parts):
        given, taken = set(part.inputs), set(part.outputs)
        waiting = [makers[index] for index in part.outputs if index in makers]
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found[number] = place
            one = operators[number]
            waiting += [makers[i] for i in one.inputs if i not in given and i in makers]
            waiting += [r for i in one.outputs if i not in taken for r in readers.get(i, ())]
    return found


def _part(place: int, others: int) -> str:
    """Its number among those of the same delegate: what lies in one is handed over once."""
    return (
        f"delegate, part {place + 1}" if place < others else f"XNNPACK, part {place - others + 1}"
    )


def _left(layers: Sequence[Layer], count: int) -> str:
    listed = ", ".join(f"{layer.kind} {layer.name}" for layer in layers[:FEW])
    more = f" and {len(layers) - FEW} more" if len(layers) > FEW else ""
    return f"XNNPACK leaves {len(layers)} of {count} layers to TFLite's kernels: {listed}{more}."


def _rounded(
    kind: str, read: Iterable[LayerTensor], weights: Iterable[LayerTensor]
) -> Iterator[LayerTensor]:
    """What an operator makes of floats before it multiplies them with weights of few bits."""
    if kind in ROUNDING and any(one.dtype in BYTES and len(one.shape) > 1 for one in weights):
        for one in read:
            if one.dtype == "float32":
                yield LayerTensor(f"{one.name}, rounded", "int8", one.shape)
