"""Which values the tensors of a network take on real inputs, and the ranges made of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np

from unirt.arrays import admit, describe
from unirt.data import LABELS, DataSource, Feed, Samples, load_samples
from unirt.errors import DataError, InputError, OptionError
from unirt.model import Model, ModelSource
from unirt.precision.calibration.histogram import BINS, PERCENTILE, Histogram, Method, check_method
from unirt.precision.calibration.ranges import Calibration, Range
from unirt.precision.calibration.watch import Watcher
from unirt.precision.graph import captured
from unirt.precision.tflite import TFLiteWatcher
from unirt.types import TensorSpec

CalibrationData: TypeAlias = "DataSource | Samples | Iterable[Any]"

MEMORY: Final = 2**30
_POLES: Final = frozenset({"Atanh", "Div", "Log", "Pow", "Reciprocal"})
"""Operators with infinities that are none of an overflow."""

_ROWS: Final = 8  # samples of an array that one call takes, where the model leaves that open


@dataclass(frozen=True)
class Observations:
    """Histograms of a network's tensors over all samples, from which any method's ranges follow.

    They are kept by tensor name, in the order of the graph, and hold no activations. `samples`
    counts those of an array, or calls; `model` is the content hash of the ONNX or .tflite file,
    `tensors` are the names in its main graph, `engine` is what ran it, `groups` in how many runs a
    call.
    """

    histograms: Mapping[str, Histogram]
    samples: int
    model: str
    tensors: frozenset[str]
    engine: str
    groups: int
    notes: tuple[str, ...]

    def calibration(self, method: Method = "mse", *, percentile: float = PERCENTILE) -> Calibration:
        """The range of each tensor by that method; see `calibrate`. Raises OptionError."""
        check_method(method, percentile)
        notes = list(self.notes)
        ranges = {}
        for name, histogram in self.histograms.items():
            found = histogram.range_by(method, percentile)
            if found.empty:
                found, told = _instead(Range(histogram.low, histogram.high))
                notes.append(
                    f"{name!r} is {told}: its range is {found.low:.3g} to {found.high:.3g}, so "
                    "that its scale is none of 0."
                )
            elif histogram.low == histogram.high:
                notes.append(f"{name!r} is {histogram.low:.6g} in every sample.")
            ranges[name] = found
        how = f"percentile {percentile:g}" if method == "percentile" else method
        return Calibration(ranges, how, self.samples, self.model, tuple(notes), self.tensors)


def _instead(whole: Range) -> tuple[Range, str]:
    """What a tensor gets in place of an empty range, and what its values are; `whole` is all."""
    if not whole.empty:
        return whole, "next to 0 but for outliers"
    size = f"at most {whole.size:.3g} in every sample, next to 0"
    return Range(-1.0, 1.0), size if whole.size else "0 in every sample"


def calibrate(
    model: Model | ModelSource,
    data: CalibrationData,
    *,
    method: Method = "mse",
    percentile: float = PERCENTILE,
    tensors: Collection[str] | None = None,
    bins: int = BINS,
    memory: int = MEMORY,
    engine: str | None = None,
) -> Calibration:
    """The range of every float32 tensor of the network's main graph, from its values on `data`.

    - `max`: all of the values.
    - `mse`: between the thresholds +-T for which int8, symmetric and rounded to nearest, has the
      smallest squared error. Searched as NVIDIA's calibrators for fake quantization do.
    - `entropy`: between the thresholds for which a coarser histogram keeps most information:
      TensorRT's published method (Migacz, GTC 2017), in the details ONNX Runtime's. Narrow where
      no value is negative, as behind a ReLU: measure before you use it.
    - `percentile`: that percentage of the values, what is cut being divided between both sides.

    All are limited to the values seen; +-T becomes 0 to T where nothing is negative. For more than
    one method `observe` once; benchmarks/calibration.py shows what each is worth.

    `data`, `tensors`, `bins`, `memory`, `engine` and the errors are those of `observe`.
    """
    check_method(method, percentile)
    observed = observe(model, data, tensors=tensors, bins=bins, memory=memory, engine=engine)
    return observed.calibration(method, percentile=percentile)


def observe(
    model: Model | ModelSource,
    data: CalibrationData,
    *,
    tensors: Collection[str] | None = None,
    bins: int = BINS,
    memory: int = MEMORY,
    engine: str | None = None,
) -> Observations:
    """Histograms of the values that the network's float32 tensors take on `data`, in one pass.

    `data` is an iterable of inputs as `Session.run` takes them, each one sample, of any shapes that
    the model takes; it is read once, so that a generator will do. Or it is what `load_samples`
    reads, a .npz or .npy file or a mapping of arrays with samples along axis 0; labels are ignored,
    and where the model's batch is fixed the last call is filled up with samples from the start.

    Only tensors of the main graph that depend on its inputs are watched, or those of them that
    `tensors` names. Their values are counted and dropped: if those of one call would take more than
    `memory` bytes, each call is run several times, for a part of the tensors each. A histogram
    takes 64 bytes for each of `bins`, a power of two, and up to 16 kB for outliers.

    The network runs on `engine`, a candidate without precision, or on the CPU by the first of
    onnxruntime, openvino and reference that is here. A model that has a .tflite and no ONNX graph
    runs on LiteRT, and its tensors are those of the .tflite.

    Raises DataError without data and for NaN and infinities (`tensor`, `sample` from 0), with one
    exception: -inf in a tensor that neither a convolution nor a matrix product reads, as in masks,
    costs it its range, with a note. InputError for inputs that do not fit; ModelError for a model
    that is quantized, or in half precision; OptionError, NoBackend, BackendUnavailable without the
    onnx package, or LiteRT for a .tflite, BackendError. What `data` itself raises is passed on.
    """
    source = Model.open(model)
    watch = TFLiteWatcher if tuple(source.formats) == ("tflite",) else Watcher
    return observe_with(watch, source, data, tensors, bins, memory, engine)


def observe_with(
    watch: type[Watcher] | type[TFLiteWatcher],
    source: Model,
    data: CalibrationData,
    tensors: Collection[str] | None = None,
    bins: int = BINS,
    memory: int = MEMORY,
    engine: str | None = None,
) -> Observations:
    """`observe`, of the file that this watcher takes from a model with several."""
    if type(memory) is not int or memory < 1:
        raise OptionError(
            f"Calibration cannot do with {memory!r} bytes of memory.",
            "It is how many the watched tensors of one call may take.",
            f"Give a positive whole number, for example {MEMORY}.",
            memory=memory,
        )
    empty = Histogram(bins)  # refuses what cannot be, before anything is run
    calls = read_calls(source.inputs, data)
    watcher = watch(source, tensors, engine, memory)
    with closing(watcher):
        watched = watcher.watched
        histograms = {name: Histogram(empty.bins) for name in (*watched.inputs, *watched.inner)}
        masked: set[str] = set()
        run = Run(source.name, watcher, calls)
        for name, values in run.values():
            if name not in masked and not histograms[name].add(values):
                run.check(name, values)
                masked.add(name)
    notes = list(watched.notes)
    notes += [f"{name!r} holds -inf, as masks do: it has no range." for name in sorted(masked)]
    if not any(histogram.values for histogram in histograms.values()) and not masked:
        raise DataError(
            f"There is no data to calibrate {source.name} on.",
            f"In {run.samples} samples none of its {len(histograms)} tensors has an element.",
            "Give samples that hold something, better some hundred that are like those to come.",
        )
    for name in [name for name, histogram in histograms.items() if not histogram.values]:
        if name not in masked:
            notes.append(f"{name!r} has no element in any sample: it has no range.")
        masked.add(name)
    return Observations(
        MappingProxyType({n: one for n, one in histograms.items() if n not in masked}),
        run.samples,
        watcher.hash,
        watcher.tensors,
        watcher.engine,
        watcher.groups,
        tuple(notes),
    )


@dataclass(frozen=True)
class Extremes:
    """The lowest and the highest finite value of tensors by name, and the largest magnitude of the
    sums that means were made of, by the mean.
    """

    ranges: Mapping[str, Range]
    sums: Mapping[str, float] = field(default_factory=dict)


def extremes(source: Model, data: CalibrationData, means: Mapping[str, str]) -> Extremes:
    """Those of every float32 tensor on `data`: of any ONNX graph, a quantized one too, and of what
    weights alone make. -inf does not count where `observe` lets it pass. `means` are tensors that
    are means over another one each.

    Raises what `observe` does, but no ModelError for what a graph computes in.
    """
    calls = read_calls(source.inputs, data)
    ranges: dict[str, Range] = {}
    sums: dict[str, float] = {}
    sizes: dict[str, int] = {}  # in this call, for what is read comes first
    with closing(Watcher(source, None, None, MEMORY, everything=True)) as watcher:
        run = Run(source.name, watcher, calls)
        for name, values in run.values():
            sizes[name] = values.size
            if not np.isfinite(values).all():
                run.check(name, values)
                values = values[np.isfinite(values)]
            if not values.size:
                continue
            low, high = float(values.min()), float(values.max())
            if (whole := sizes.get(means.get(name, ""))) is not None:
                total = max(-low, high) * whole / sizes[name]
                sums[name] = max(total, sums.get(name, 0.0))
            known = ranges.get(name, Range(low, high))
            ranges[name] = Range(min(low, known.low), max(high, known.high))
    return Extremes(ranges, sums)


class Run:
    """A network that shows its tensors on all of the data, once."""

    def __init__(
        self,
        name: str,
        watcher: Watcher | TFLiteWatcher,
        calls: Iterable[tuple[Feed, int]],
    ) -> None:
        self._name, self._watcher, self._calls = name, watcher, calls
        self._count = 0
        self._seen: set[str] = set()
        self._odd: set[str] = set()  # those that held -inf where it is let pass
        self.samples = 0
        """Of the calls that are done."""

    def values(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Raises DataError, last of all, if there was no data."""
        for feed, count in self._calls:
            self._count = count
            for name, values in self._watcher.show(feed):
                yield name, values
                self._seen.add(name)
            self.samples += count
        if not self.samples:
            raise DataError(
                f"There is no data to run {self._name} on.",
                "The iterable gave no sample. A generator that was used before is empty.",
                "Give at least one sample, better some hundred that are like those to come.",
            )

    def check(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """Raises DataError for values just shown, unless all of them are finite or masked."""
        if name in self._watcher.watched.strict or not _only_masked(values):
            raise self._not_finite(name, values)
        self._odd.add(name)

    def _not_finite(self, name: str, values: np.ndarray[Any, Any]) -> DataError:
        sample, finite = self.samples, np.isfinite(values)
        wrong = values[~finite]
        if self._count > 1 and values.shape[:1] >= (self._count,):  # samples lie along axis 0
            rows = finite.reshape(len(values), -1).all(axis=1)
            sample += int(np.argmin(rows)) % self._count
        found = "NaN" if np.isnan(wrong).any() else str(wrong[0])
        cause = self._cause(name, found)
        return DataError(
            f"The tensor {name!r} holds {found} in sample {sample}.",
            f"{wrong.size:,} of its {values.size:,} values there are not finite, and no range can "
            f"hold them{cause.made}.",
            cause.remedy,
            tensor=name,
            sample=sample,
            node=cause.node,
        )

    def _cause(self, name: str, found: str) -> _Cause:
        """What made a tensor that is not finite, as far as what was seen tells."""
        watcher = self._watcher
        look = "Look at that sample first; samples count from 0."
        if not isinstance(watcher, Watcher) or (node := watcher.maker(name)) is None:
            return _Cause(look)
        called, finite = f"{node.op_type} {node.name!r}", True
        for read in sorted({*node.input, *captured(node)} - {""}):
            weight = watcher.weight(read)
            if weight is None or weight.dtype.kind != "f":
                finite &= weight is not None or read in self._seen - self._odd
            elif not _only_masked(weight):
                return _Cause(
                    "That weight is damaged, whatever the data: export or train the network again.",
                    f"; {called} reads the weight {read!r}, which is not finite itself",
                    node.name,
                )
            else:
                finite &= bool(np.isfinite(weight).all())
        if finite and found != "NaN" and node.op_type not in _POLES:
            remedy = "the network overflows there: its answers cannot be right either."
        else:
            remedy = "the network has no finite answer to it."
        made = f"; {called} made them" + " of finite ones" * finite
        return _Cause(f"{look} If the data is right, {remedy}", made, node.name)


@dataclass(frozen=True)
class _Cause:
    remedy: str
    made: str = ""
    node: str = ""


def read_calls(specs: tuple[TensorSpec, ...], data: CalibrationData) -> Iterator[tuple[Feed, int]]:
    """The inputs of each call, checked, and how many samples they are."""
    if isinstance(data, str | os.PathLike | Mapping | np.ndarray):
        data = load_samples(specs, data)
    if isinstance(data, Samples):
        size = data.call_size(None, min(_ROWS, data.count))
        return ((batch.inputs, batch.count) for batch in data.batches(size))
    if not isinstance(data, Iterable):
        raise DataError(
            f"The calibration data is {describe(data)}.",
            "Inputs of many calls are wanted.",
            "Give an iterable of inputs, a .npz file, or a mapping of arrays.",
        )
    return _admitted(specs, data)


def _admitted(specs: tuple[TensorSpec, ...], data: Iterable[Any]) -> Iterator[tuple[Feed, int]]:
    for sample, inputs in enumerate(data):
        if isinstance(inputs, Mapping) and LABELS not in (spec.name for spec in specs):
            inputs = {name: value for name, value in inputs.items() if name != LABELS}
        try:
            feed = admit(inputs, specs, "cpu")
        except InputError as error:
            facts = {**error.facts, "sample": sample}
            raise InputError(
                f"In sample {sample}: {error.what}", error.why, error.remedy, **facts
            ) from error
        given = [value for value in feed.values() if value is not None]
        if given and not any(np.size(value) for value in given):
            raise DataError(
                f"Sample {sample} is empty.",
                "None of its inputs has an element, so that it tells no range.",
                "Leave it out, and look at how the samples were cut.",
                sample=sample,
            )
        yield feed, 1


def _only_masked(values: np.ndarray[Any, Any]) -> bool:
    return not bool(np.isnan(values).any() or np.isposinf(values).any())
