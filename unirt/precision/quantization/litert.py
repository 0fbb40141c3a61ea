"""A float32 .tflite in int8: the recipe of LiteRT, in a file that ai-edge-quantizer writes."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import numpy as np

from unirt.errors import (
    BackendError,
    BackendUnavailable,
    DataError,
    ModelError,
    OptionError,
    UnirtError,
)
from unirt.model import Model, ModelSource
from unirt.precision.calibration.calibrate import CalibrationData, observe_with
from unirt.precision.calibration.histogram import PERCENTILE, Method, check_method
from unirt.precision.calibration.ranges import Calibration, Range
from unirt.precision.names import check_option, nearest
from unirt.precision.quantization.carry import carry_over
from unirt.precision.quantization.placement import BY_HAND
from unirt.precision.tflite import (
    PRODUCTS,
    TFLiteGraph,
    TFLiteOperator,
    TFLiteWatcher,
    litert,
    read_constant,
    read_graphs,
    refuse_quantized,
    tflite_file,
)

TFLitePrecision = Literal["int8", "int8-dynamic", "int8-weights"]

TFLITE_PRECISIONS: Final[tuple[str, ...]] = get_args(TFLitePrecision)
RECIPE: Final = "litert"
INSTALL: Final = "pip install 'unirt[litert-quantizer]'"

_FULL: Final = 2**31 - 1
_INSERTED: Final = frozenset({"QUANTIZE", "DEQUANTIZE"})
_LISTED: Final = 3  # tensors without a range that are named
_SCOPE: Final = 10_000  # characters of an operator's scope that ai-edge-quantizer looks at


@dataclass(frozen=True)
class QuantizedTFLite:
    """A .tflite of which operators compute in int8, and what of it stays in float32.

    Operators of TFLite have no names: they go by that of their first output. `nodes` are those with
    int8 weights or activations, in the order of the graph; `kept` says for each other product, and
    for each operator that was told to stay, why it stays. `notes` are sentences on what was odd.
    `calibration` holds the ranges, None where none were needed.
    """

    model: Model
    precision: str
    recipe: str
    nodes: tuple[str, ...]
    kept: Mapping[str, str]
    notes: tuple[str, ...]
    calibration: Calibration | None = None


def quantize_tflite(
    model: Model | ModelSource,
    data: CalibrationData | None = None,
    calibration: Calibration | None = None,
    *,
    precision: TFLitePrecision = "int8",
    method: Method = "mse",
    percentile: float = PERCENTILE,
    keep: Collection[str] = (),
) -> QuantizedTFLite:
    """The model's .tflite in int8, held in memory; inputs, outputs and their types do not change.

    `int8` quantizes weights, by output channel, and activations, asymmetric and by tensor, to the
    ranges of `calibration`, or to those that `calibrate` finds by `method` on `data`: give one of
    the two. If the model has both files, a calibration of its ONNX graph is carried over to the
    tensors of the .tflite that hold the same values. `int8-dynamic` stores weights in int8 and has
    LiteRT find each activation's range while it runs, `int8-weights` stores weights in int8 and
    computes in float32; neither needs data. Operators named in `keep`, by their first output, stay
    in float32, and so do those in subgraphs, those that read or give a tensor without a range, and
    those whose bias int32 cannot hold.

    Raises OptionError for an unknown precision, method or operator, and for data with a
    calibration; DataError and InputError for data that cannot be used, and without any that is
    needed, DataError for a calibration of other tensors (`missing`: those without a range);
    ModelError for a model without .tflite, a quantized or damaged one, and one with nothing to
    quantize; BackendUnavailable without LiteRT or ai-edge-quantizer; BackendError where they refuse
    the model.
    """
    _check(precision, data, calibration)
    check_method(method, percentile)
    whole = Model.open(model)
    file = tflite_file(whole)
    content = file.read()
    graphs = read_graphs(content, whole.name)
    for graph in graphs:
        refuse_quantized(graph, whole.name, "Quantize")
    _refuse_twins(graphs, whole.name)
    main = graphs[0]
    _check_keep(keep, main)
    keep = tuple(keep)
    vendor = _quantizer()
    # LiteRT verifies the file, which ai-edge-quantizer would parse without.
    source = Model(content, name=whole.name)
    runs = _runs(source, main)
    notes: list[str] = []
    if precision != "int8":
        calibration = None
    elif calibration is None and data is not None:
        seen = observe_with(TFLiteWatcher, whole, data)
        calibration = seen.calibration(method, percentile=percentile)
        notes += calibration.notes
    elif calibration is not None:
        calibration, told = _fitting(calibration, whole, source, main, keep)
        notes += told
    else:
        raise DataError(
            f"{whole.name} cannot be quantized to int8 without data.",
            "Activations are quantized too, and only data tells their ranges.",
            "Give data or a calibration, or choose int8-dynamic or int8-weights.",
        )
    ranges = {} if calibration is None else calibration.ranges
    kept = dict.fromkeys(keep, BY_HAND)
    if precision == "int8":
        for operator in main.operators:
            for lacking in _lacking(operator, main, ranges):
                kept.setdefault(operator.name, f"its tensor {lacking!r} has no range")
    while True:
        result = _written(vendor, content, graphs, precision, ranges, kept, whole.name)
        (made, *_) = read_graphs(result, whole.name)
        _refuse_broken_scales(made, whole.name)
        full = _with_full_biases(result, main, made)
        if not full:
            break
        kept |= dict.fromkeys(full, "its bias is beyond int32 at the scale of its products")
    quantized = Model(result, name=whole.name)
    _check_ends(source, quantized)
    if not _runs(quantized, main) and runs:
        raise BackendError(
            f"What ai-edge-quantizer made of {whole.name} does not run on LiteRT.",
            "Inputs of the declared shapes went through the network before, and fail now.",
            "Choose another precision, or report this model to the maintainers of UniRT.",
            backend="tflite",
        )
    pairs = _paired(main, made)
    nodes = tuple(one.name for one, other in pairs if _is_quantized(other, made))
    stays = {
        operator.name: kept.get(operator.name, "ai-edge-quantizer does not quantize it")
        for operator in main.operators
        if operator.name not in nodes and (operator.kind in PRODUCTS or operator.name in keep)
    }
    if not nodes:
        name, why = next(iter(stays.items()), ("", ""))
        raise ModelError(
            f"{whole.name} has nothing to quantize to {precision}.",
            f"All its products must stay in float32: {name!r}, for one, since {why}."
            if stays
            else "ai-edge-quantizer quantizes none of its operators.",
            "Use the model as it is.",
            kept=stays,
        )
    return QuantizedTFLite(
        quantized, precision, RECIPE, nodes, MappingProxyType(stays), tuple(notes), calibration
    )


def _runs(model: Model, graph: TFLiteGraph) -> bool:
    """Whether LiteRT computes it on zeros of the shapes that the file declares.

    Where sizes are open the declared ones need not suit the network. Raises BuildError for a file
    that LiteRT refuses, and BackendUnavailable without it.
    """
    with litert().compile(model, "cpu") as engine, engine.session() as session:
        shapes = [graph.tensors[index].shape for index in graph.inputs]
        try:
            session.run(
                {
                    spec.name: np.zeros(shape, spec.numpy_dtype)
                    for spec, shape in zip(model.inputs, shapes, strict=True)
                }
            )
        except UnirtError:
            return False
    return True


def _check(precision: str, data: object, calibration: object) -> None:
    if precision not in TFLITE_PRECISIONS:
        raise OptionError(
            f"{precision!r} is no precision to quantize a .tflite to.",
            f"It is quantized to {', '.join(TFLITE_PRECISIONS)}.",
            nearest(str(precision), TFLITE_PRECISIONS, "Choose one of them."),
            precision=precision,
        )
    if data is not None and calibration is not None:
        raise OptionError(
            "Both data and a calibration were given.",
            "The ranges come from one of them.",
            "Leave one out; Calibration.with_ranges changes single ranges.",
        )


def _check_keep(keep: Collection[str], graph: TFLiteGraph) -> None:
    names = [operator.name for operator in graph.operators]
    check_option(
        "keep",
        keep,
        names,
        "operators",
        "no operator gives such a tensor",
        f"The main graph has {len(names):,} operators, named by their first output.",
        "Look at the names of its tensors.",
    )


def _refuse_twins(graphs: tuple[TFLiteGraph, ...], name: str) -> None:
    seen: set[str] = set()
    for tensor in (tensor for graph in graphs for tensor in graph.tensors):
        if tensor.name in seen:
            raise ModelError(
                f"{name} cannot be quantized.",
                f"Two of its tensors are called {tensor.name!r}, and ai-edge-quantizer tells "
                "tensors apart by their names.",
                "Convert the model again with names of their own.",
                tensor=tensor.name,
            )
        seen.add(tensor.name)


def _quantizer() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("ai_edge_quantizer.quantizer")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "ai_edge_quantizer"
        raise BackendUnavailable(
            "A .tflite cannot be quantized here.",
            "The ai-edge-quantizer package is not installed."
            if missing
            else f"The ai-edge-quantizer package does not load: {error}.",
            INSTALL,
        ) from error


def _lacking(
    operator: TFLiteOperator, graph: TFLiteGraph, ranges: Mapping[str, Range]
) -> Iterator[str]:
    """The float32 tensors of an operator that are not constant and have no range."""
    for index in (*operator.inputs, *operator.outputs):
        if index < 0:
            continue
        tensor = graph.tensors[index]
        if tensor.dtype == "float32" and not tensor.constant and tensor.name not in ranges:
            yield tensor.name


def _fitting(
    calibration: Calibration,
    whole: Model,
    source: Model,
    graph: TFLiteGraph,
    keep: Collection[str],
) -> tuple[Calibration, list[str]]:
    """The calibration by the names in the .tflite, and sentences on what of it fits.

    One of the model's ONNX file is carried over. Raises DataError where no product has what it
    needs.
    """
    onnx = whole.file(["onnx"])
    names = {tensor.name for tensor in graph.tensors}
    notes: list[str] = []
    if onnx is not None and calibration.model == onnx.hash:
        try:
            calibration = carry_over(calibration, whole)
        except UnirtError as error:
            raise DataError(
                f"The ranges of {whole.name}'s ONNX file cannot be carried over to its .tflite.",
                "Which tensors they belong to is found by running both on random inputs, and that "
                f"fails: {error.what} {error.why}",
                "Give data instead of the calibration: the ranges are found on the .tflite then.",
            ) from error
        notes += calibration.notes[-1:]
    operators = [one for one in graph.operators if one.name not in keep]
    products = [one for one in operators if one.kind in PRODUCTS]
    lacking = {one.name: list(_lacking(one, graph, calibration.ranges)) for one in operators}
    missing = tuple(dict.fromkeys(name for found in lacking.values() for name in found))
    strange = [name for name in calibration.ranges if name not in names]
    none = len(strange) == len(calibration.ranges)
    if missing and (none or (products and all(lacking[one.name] for one in products))):
        raise _unfitting(calibration, source, missing, strange, "".join(notes))
    notes += calibration.check(source)
    if missing:
        listed = ", ".join(map(repr, missing[:_LISTED]))
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        notes.append(
            f"Without a range: {listed}{more}. Operators that read or give them stay in float32."
        )
    return calibration, notes


def _unfitting(
    calibration: Calibration,
    source: Model,
    missing: Sequence[str],
    strange: Sequence[str],
    carried: str,
) -> DataError:
    why = "None of its products has ranges for all that it reads and gives"
    remedy = "Give data (--data) instead of a calibration, so that the ranges are found on it"
    if strange:
        why += (
            f": they were found on another file (sha256 {calibration.model[:12]}…), on tensors "
            f"such as {strange[0]!r}, and its own are called otherwise, such as {missing[0]!r}."
        )
        remedy += (
            "; or, if that file is the same network as ONNX, open both as one "
            "Model(onnx=…, tflite=…), and they are carried over."
        )
    else:
        why = f"{why}; {missing[0]!r}, for one, has none. {carried}".rstrip()
        remedy += ", or ranges for these tensors too."
    return DataError(
        f"{source.name} cannot be quantized to int8 with these ranges.",
        why,
        remedy,
        missing=tuple(missing),
    )


def _written(
    vendor: Any,
    content: bytes,
    graphs: tuple[TFLiteGraph, ...],
    precision: str,
    ranges: Mapping[str, Range],
    kept: Collection[str],
    name: str,
) -> bytes:
    """What ai-edge-quantizer makes of the file. Raises BackendError."""
    try:
        # A progress bar goes to stderr whatever one asks for.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            quantizer = vendor.Quantizer(_prepared(content))
            every: Any = "*"
            if precision == "int8":
                quantizer.add_static_config(".*", every, 8, 8)
            elif precision == "int8-dynamic":
                quantizer.add_dynamic_config(".*", every, 8)
            else:
                quantizer.add_weight_only_config(".*", every, 8)
            never = vendor.AlgorithmName.NO_QUANTIZE
            for end in ("INPUT", "OUTPUT"):
                quantizer.update_quantization_recipe(".*", end, None, never)
            for graph in graphs:
                for operator in graph.operators:
                    if graph is not graphs[0] or operator.name in kept:
                        scope = _scope(operator, graph)
                        quantizer.update_quantization_recipe(scope, every, None, never)
            found = {
                name: {
                    "min": np.array([one.low], np.float32),
                    "max": np.array([one.high], np.float32),
                }
                for name, one in ranges.items()
            }
            result = quantizer.quantize(
                found or None, enable_progress_bar=False, enable_progress_report=False
            )
            return _with_own_ends(result.quantized_model, graphs[0])
    except Exception as error:
        raise BackendError(
            f"ai-edge-quantizer cannot quantize {name} to {precision}.",
            f"{type(error).__name__}: {str(error).strip().rstrip('.')}.",
            "Keep the operator that it names in float32, or choose another precision.",
            backend="tflite",
        ) from error


def _flatbuffers() -> Any:
    return importlib.import_module("ai_edge_litert.tools.flatbuffer_utils")


def _prepared(content: bytes) -> bytes:
    """The file as ai-edge-quantizer expects it: it fails without a list of signatures, be it empty,
    and takes every operator for an ADD whose code stands in the field of older files only.
    """
    tools = _flatbuffers()
    model = tools.read_model_from_bytearray(bytearray(content))
    if model.signatureDefs is None:
        model.signatureDefs = []
    for code in model.operatorCodes:
        code.builtinCode = max(code.builtinCode, code.deprecatedBuiltinCode)
    return bytes(tools.convert_object_to_bytearray(model))


def _with_own_ends(result: Any, graph: TFLiteGraph) -> bytes:
    """The file with the names and open sizes that it had.

    Where ai-edge-quantizer inserts an operator, its tensor has neither: outputs get another name,
    and seem to have a fixed batch.
    """
    tools = _flatbuffers()
    model = tools.read_model_from_bytearray(bytearray(result))
    main = model.subgraphs[0]
    for operator in main.operators:
        made = main.tensors[operator.outputs[0]] if len(operator.outputs) else None
        if made is not None and operator.outputs[0] >= len(graph.tensors):
            made.shapeSignature = main.tensors[operator.inputs[0]].shapeSignature
    for before, after in zip(graph.outputs, main.outputs, strict=True):
        if before != after:
            inner, outer = main.tensors[before], main.tensors[after]
            inner.name, outer.name = outer.name, inner.name
    return bytes(tools.convert_object_to_bytearray(model))


def _scope(operator: TFLiteOperator, graph: TFLiteGraph) -> str:
    """The expression that fits this operator alone, as ai-edge-quantizer calls it."""
    for indices in (operator.outputs, operator.inputs):
        names = [graph.tensors[index].name for index in indices if index >= 0]
        if names := [name for name in names if name]:
            text = "".join(f"{name};" for name in names)[:_SCOPE]
            return rf"\A{re.escape(text)}\Z"
    return r"\A\Z"


def _paired(graph: TFLiteGraph, made: TFLiteGraph) -> list[tuple[TFLiteOperator, TFLiteOperator]]:
    """Each operator with itself after quantization, which inserts others and keeps the order."""
    rest = iter(made.operators)
    pairs = []
    for operator in graph.operators:
        for other in rest:
            if other.kind == operator.kind or other.kind not in _INSERTED:
                pairs.append((operator, other))
                break
    return pairs


def _is_quantized(operator: TFLiteOperator, made: TFLiteGraph) -> bool:
    sources = {
        o: one.inputs for one in made.operators if one.kind in _INSERTED for o in one.outputs
    }
    for index in operator.inputs:
        if index >= 0:
            through = sources.get(index, (index,))[0]
            weights = made.tensors[through]
            if made.tensors[index].scales or (weights.constant and weights.scales):
                return True
    return any(made.tensors[index].scales for index in operator.outputs if index >= 0)


def _with_full_biases(result: bytes, graph: TFLiteGraph, made: TFLiteGraph) -> list[str]:
    """Operators whose bias was cut: at a channel of tiny weights, its scale is tiny too."""
    found = []
    for operator, other in _paired(graph, made):
        if operator.kind not in PRODUCTS or len(other.inputs) < 3:
            continue
        bias = made.tensors[other.inputs[2]]
        if other.inputs[2] >= 0 and bias.constant and bias.dtype == "int32":
            values = read_constant(result, bias).astype(np.int64)
            if (np.abs(values) >= _FULL).any():
                found.append(operator.name)
    return found


def _refuse_broken_scales(made: TFLiteGraph, name: str) -> None:
    for tensor in made.tensors:
        if not all(math.isfinite(scale) and scale > 0 for scale in tensor.scales):
            raise ModelError(
                f"{name} cannot be quantized.",
                f"The values of {tensor.name!r} give no scale: some are NaN or infinite.",
                "Fetch or convert the model again; its weights are damaged.",
                tensor=tensor.name,
            )


def _check_ends(source: Model, quantized: Model) -> None:
    for what in ("inputs", "outputs"):
        before, after = getattr(source, what), getattr(quantized, what)
        if before != after:
            raise BackendError(
                f"ai-edge-quantizer changed the {what} of {source.name}.",
                f"They were {', '.join(map(str, before))} and are {', '.join(map(str, after))}.",
                "Report this model to the maintainers of UniRT.",
                backend="tflite",
            )
