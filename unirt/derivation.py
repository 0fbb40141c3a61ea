"""Which graph an engine is given for a candidate's precision: the model's own, or one made of it.

Precision lives in the graph. One that is typed as the candidate says runs as it is. A float32 graph
is cast, or quantized by the recipe of the target, as is a float32 .tflite; that happens when an
engine reads it, so that one that is found compiled never does it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from unirt.arrays import admit
from unirt.backend import Backend
from unirt.data import Samples
from unirt.devices import host_devices
from unirt.errors import (
    BackendUnavailable,
    DataError,
    InputError,
    ModelError,
    OptionError,
    UnirtError,
    sentence,
)
from unirt.model import Model, ModelFile
from unirt.types import Candidate, Device

if TYPE_CHECKING:
    from unirt.precision import Calibration, Quantized, QuantizedTFLite, Recipe
    from unirt.precision.calibration.ranges import CalibrationSource

# How a candidate's precision is called in the tensors of a graph.
DTYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "int8w": "int8",
    "int4w": "int4",
    "int4": "int4",
    "fp4": "float4_e2m1fn",
}
CASTS = ("fp16", "bf16")
_CAST_CALLS = 32  # samples of an array, or calls: what comes next is measured on all of them
# What `unirt.precision.quantize` calls them.
QUANTIZATIONS = {
    "int8": "int8",
    "fp8": "fp8",
    "int8w": "int8-weights",
    "int4w": "int4-weights",
}
WEIGHTS_ONLY = frozenset({"int8w", "int4w"})
QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear"})
# What a graph with such nodes computes in, by the dtypes of its weights and zero points.
QUANTIZED = {
    "int8": "int8",
    "uint8": "int8",
    "float8_e4m3fn": "fp8",
    "int4": "int4",
    "uint4": "int4",
    "float4_e2m1fn": "fp4",
}


class Ranges:
    """The calibration that all candidates of one call are quantized from.

    It was given, or is made of the data when the first candidate needs it; if that fails, then for
    every candidate. The tensors of a .tflite are others than those of the ONNX graph, so that it
    has a calibration of its own, of the same data, unless that of the ONNX graph was given, which
    is carried over. `used` are those that served, by format, and `seen` all that values were, so
    far as it is known.
    """

    def __init__(
        self,
        model: Model,
        given: CalibrationSource | None = None,
        data: Samples | Sequence[Any] = (),
    ) -> None:
        """Raises DataError for a file that holds no calibration, OptionError for what is none."""
        self.given = _found(given) if given is not None else None
        self.used: dict[str, Calibration] = {}
        self.seen: dict[str, Calibration] = {}
        self._model, self._data = model, data
        self._errors: dict[str, UnirtError] = {}

    def for_candidate(self, candidate: Candidate, file: ModelFile) -> Calibration:
        """Raises DataError if there is neither a calibration nor data, and what calibrating raises.

        A calibration that was given is taken as it is, but for a .tflite, where there is data too
        and it is of neither of the model's files.
        """
        kind = file.format
        if kind in self._errors:
            raise self._errors[kind]
        if kind not in self.used:
            files = {one.hash for one in self._model.formats.values()} if self.given else set()
            own = kind == "onnx" or not self._data
            if self.given is not None and (own or self.given.model in files):
                self.used[kind] = self.seen[kind] = self.given
            elif self._data:
                self._calibrate(kind)
            else:
                raise self._missing(candidate)
        return self.used[kind]

    @property
    def first(self) -> Samples | Sequence[Any]:
        """As much of the data as casts look at."""
        data = self._data
        if not isinstance(data, Samples):
            return data[:_CAST_CALLS]
        count = min(data.count, max(_CAST_CALLS, data.fixed_batch or 0))
        arrays = data.inputs.items()
        inputs = {name: a if name in data.shared else a[:count] for name, a in arrays}
        return replace(data, inputs=inputs, count=count, labels=None)

    def _calibrate(self, kind: str) -> None:
        from unirt.precision.calibration.calibrate import observe_with
        from unirt.precision.calibration.watch import Watcher
        from unirt.precision.tflite import TFLiteWatcher

        watch = TFLiteWatcher if kind == "tflite" else Watcher
        try:
            observed = observe_with(watch, self._model, self._data)
            self.used[kind], self.seen[kind] = observed.calibration(), observed.calibration("max")
        except UnirtError as error:
            self._errors[kind] = error
            raise

    def _missing(self, candidate: Candidate) -> DataError:
        return DataError(
            f"{candidate} needs the ranges of {self._model.name!r}.",
            f"In {candidate.precision} activations are quantized too, and only data tells which "
            "values they take.",
            "Give inputs as samples=[...], or as calibration=... what unirt.precision.calibrate "
            "found, or a file that it was saved to (--data, --calibration). "
            f"{replace(candidate, precision='int8w')} quantizes weights only and needs neither.",
            candidate=str(candidate),
            precision=candidate.precision,
        )


def _found(given: CalibrationSource) -> Calibration:
    from unirt.precision.calibration.ranges import find_calibration

    return find_calibration(given)


def _content(calibration: Calibration | None) -> object:
    """All of it that can change a graph."""
    if calibration is None:
        return None
    ends = sorted((name, one.low, one.high) for name, one in calibration.ranges.items())
    return [calibration.method, calibration.samples, calibration.model, calibration.notes, ends]


def told_ranges(calibration: Calibration) -> str:
    """By which method, and of how many samples where there were some."""
    count = calibration.samples
    samples = f" of {count:,} sample{'s' * (count != 1)}" if count else ""
    return f"{calibration.method}{samples}"


class Quantization:
    """How a graph is quantized for a target, and, once an engine has read it, what came of it.

    `seen` has the ranges of all values; where they leave that of the recipe's `rest`, nodes stay in
    float32.
    """

    def __init__(
        self,
        model: Model,
        precision: str,
        recipe: Recipe,
        calibration: Calibration | None = None,
        seen: Calibration | None = None,
    ) -> None:
        self._model, self._precision, self._recipe = model, precision, recipe
        self._calibration, self._seen = calibration, seen
        self._nodes: int | None = None
        self._kept: Mapping[str, str] | None = None

    @property
    def how(self) -> str:
        """Names the transform: equal only where the same graph comes out of the same model."""
        known = [_content(self._calibration), _content(self._seen)]
        told = json.dumps([self._precision, repr(self._recipe), *known])
        return f"quantized by {hashlib.sha256(told.encode()).hexdigest()}"

    def make(self) -> tuple[bytes, tuple[str, ...]]:
        """The graph, and sentences on it."""
        from unirt import precision
        from unirt.precision.quantization.recipes import LITERT

        wanted: Any = QUANTIZATIONS[self._precision]
        done: Quantized | QuantizedTFLite
        if self._recipe is LITERT:
            done = precision.quantize_tflite(self._model, None, self._calibration, precision=wanted)
        else:
            done = precision.quantize(self._model, self._calibration, wanted, self._recipe)
        self._nodes, self._kept = len(done.nodes), done.kept
        notes = self._notes(done)
        rest = self._recipe.rest
        if rest == "fp32":
            return done.model.primary.read(), notes
        try:
            cast = precision.cast(done.model, rest, ranges=self._seen)
        except ModelError as error:
            if "kept" in error.facts:  # nothing is left to cast
                return done.model.primary.read(), notes
            cast = precision.cast(done.model, rest)  # the ranges are another network's, as is told
        told = f"what is not quantized was cast to {rest}"
        return cast.model.primary.read(), (*notes, told, *cast.notes, *_kept(cast.wide))

    def to_dict(self) -> dict[str, object]:
        """`nodes` are how many compute in the precision, `kept` says of others why not; both None
        if the engine was found compiled: its notes tell.
        """
        ranges = self._calibration
        return {
            "precision": self._precision,
            "recipe": self._recipe.name,
            "rest": self._recipe.rest,
            "calibration": ranges and {"method": ranges.method, "samples": ranges.samples},
            "nodes": self._nodes,
            "kept": None if self._kept is None else dict(self._kept),
        }

    def _notes(self, done: Quantized | QuantizedTFLite) -> tuple[str, ...]:
        ranges = self._calibration
        source = f", with ranges by {told_ranges(ranges)}" if ranges is not None else ""
        return (
            f"quantized to {self._precision} by the recipe {self._recipe.name}{source}; nodes that "
            f"compute so: {len(done.nodes)}, that might and stay: {len(done.kept)}",
            *_kept(done.kept),
            *done.notes,
            *(ranges.notes if ranges is not None else ()),
        )


def derived(
    model: Model, candidate: Candidate, backend: Backend, ranges: Ranges
) -> tuple[Model, Quantization | None]:
    """The model whose graph has the candidate's precision, and how it was quantized if it was.

    Raises BackendUnavailable where the candidate cannot have it or the device is not here, and what
    `Ranges.for_candidate` raises.
    """
    file = model.file(backend.formats)
    if file is None or candidate.precision is None:
        return model, None
    device = backend.find_device(candidate.device)
    reason = problem(candidate.precision, file, backend, device)
    if reason:
        plain = Candidate(candidate.backend, candidate.device)
        raise BackendUnavailable(
            f"{candidate} cannot run {model.name!r}.",
            sentence(reason),
            f"To run the graph as it is, name {plain}.",
            backend=candidate.backend,
            precision=candidate.precision,
        )
    way = _way(candidate.precision, file)
    if way == "cast":
        first = ranges.first
        digest = _digest(model, first) if first else ""
        make = partial(_cast, model, candidate.precision, first if digest else ())
        how = f"cast to {candidate.precision}{f' on {digest}' if digest else ''}"
        return Model.derived(file, make, how, model.name), None
    if way == "quantize":
        needed = candidate.precision not in WEIGHTS_ONLY
        calibration = ranges.for_candidate(candidate, file) if needed else None
        recipe = recipe_of(backend, device, file)
        seen = ranges.seen.get(file.format) if needed else None
        quantization = Quantization(model, candidate.precision, recipe, calibration, seen)
        return Model.derived(file, quantization.make, quantization.how, model.name), quantization
    return model, None


def problem(precision: str | None, file: ModelFile, backend: Backend, device: Device) -> str:
    """Why a backend cannot run this file in that precision; empty if it can."""
    if precision is None:
        return ""
    if precision not in DTYPES:
        return f"{precision!r} is no precision; they are {', '.join(DTYPES)}"
    way = _way(precision, file)
    if way == "quantize":
        try:
            recipe = recipe_of(backend, device, file)
        except OptionError as error:
            return f"{backend.name} states a recipe that is not there: {error}"
        theirs = [name for name, told in QUANTIZATIONS.items() if told in recipe.precisions]
        if precision not in theirs:
            return (
                f"a graph is quantized for it by the recipe {recipe.name}, which has no "
                f"{precision}, only {', '.join(theirs)}; one that is in {precision} already runs "
                "as it is"
            )
    if way is not None:
        return ""
    if file.format != "onnx" and precision in CASTS:
        return f"only an ONNX graph can be cast to {precision}; this is {file.format}"
    if precision == "int4":
        return (
            f"the graph is in {_dtype(file)}, and only its weights can be quantized to int4: int4w"
        )
    return (
        f"the graph is in {_dtype(file)}, and neither a cast nor quantization leads from there to "
        f"{precision}: it takes a float32 graph, or one that is typed so (QuantizeLinear and "
        "DequantizeLinear for int8 and fp8)"
    )


def recipe_of(backend: Backend, device: Device, file: ModelFile) -> Recipe:
    """The recipe by which a file is quantized for that target.

    Raises OptionError where the backend states one that is not there.
    """
    from unirt.precision.quantization.recipes import LITERT, find_recipe, recipe_for

    if file.format == "tflite":
        return LITERT
    if backend.quantization:
        return find_recipe(backend.quantization)
    # The engines' own devices tell nothing of the CPU.
    features = host_devices()[0].facts.get("instruction_sets") if device.kind == "cpu" else ()
    return recipe_for(backend.name, features or ())


def _way(precision: str, file: ModelFile) -> Literal["as it is", "cast", "quantize"] | None:
    """How the file comes to a known precision; None if it cannot."""
    if _is_in(file, precision):
        return "as it is"
    floats = [spec.dtype for spec in (*file.inputs, *file.outputs)]
    if "float32" not in (*file.weight_dtypes, *floats):
        return None
    if precision in CASTS:
        return "cast" if file.format == "onnx" else None
    quantized = QUANTIZING | {"QUANTIZE", "DEQUANTIZE"}  # of a .tflite
    whole = _dtype(file) not in ("float16", "bfloat16") and quantized.isdisjoint(file.op_counts)
    return "quantize" if whole and precision in QUANTIZATIONS else None


def _dtype(file: ModelFile) -> str:
    """The dtype that most of the weights have; without weights, that of the first input."""
    counts = file.weight_dtypes or {spec.dtype: 1 for spec in (*file.inputs, *file.outputs)}
    return max(counts, key=lambda name: counts[name], default="undefined")


def _is_in(file: ModelFile, precision: str) -> bool:
    """Whether a graph is typed so: by its Q/DQ nodes, before which weights may be stored as floats,
    or by most of its weights.
    """
    if not QUANTIZING.isdisjoint(file.op_counts):
        if precision in WEIGHTS_ONLY and "QuantizeLinear" in file.op_counts:
            return False
        # Zero points written into nodes are not told, and most often int8.
        told = {QUANTIZED[name] for name in file.weight_dtypes if name in QUANTIZED}
        if precision.removesuffix("w") in (told or {"int8"}):
            return True
    return DTYPES[precision] == _dtype(file) and precision not in WEIGHTS_ONLY


def _cast(model: Model, precision: Any, data: Any) -> tuple[bytes, tuple[str, ...]]:
    """The graph, and sentences on it. What leaves the range on the data stays in float32."""
    from unirt.precision import cast

    unseen: tuple[str, ...] = ()
    try:
        done = cast(model, precision, data=data or None)
    except UnirtError as error:
        if not data or "kept" in error.facts:
            raise
        done = cast(model, precision)
        unseen = (f"which values leave the range of {precision} was not found out: {error}",)
    return done.model.primary.read(), (*done.notes, *unseen, *_kept(done.kept))


def _digest(model: Model, data: Samples | Sequence[Any]) -> str:
    """Of all values, by name; empty for what cannot be read from here."""
    found = hashlib.sha256()
    try:
        feeds = (
            [data.inputs]
            if isinstance(data, Samples)
            else [admit(feed, model.inputs, "cpu") for feed in data]
        )
    except InputError:
        return ""
    for feed in feeds:
        for name, array in feed.items():
            found.update(f"{name} {array.dtype} {array.shape} ".encode())
            is_text = array.dtype.kind in "OU"
            found.update(repr(array.tolist()).encode() if is_text else array.tobytes())
    return found.hexdigest()


def _kept(kept: Mapping[str, str]) -> Iterable[str]:
    """A line for each reason, with the first of the nodes that stay for it."""
    reasons: dict[str, list[str]] = {}
    for node, reason in kept.items():
        reasons.setdefault(reason, []).append(node)
    for reason, nodes in reasons.items():
        more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
        yield f"in float32 stay {', '.join(nodes[:3])}{more}: {reason}"
