"""How far a graph made of a float32 network is from it, over data that need not fit into memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np

from unirt.accuracy import ErrorMeter, OutputError, classification_output, json_number, top1
from unirt.accuracy import mismatch as find_mismatch
from unirt.arrays import admit, describe
from unirt.backend import Backend
from unirt.data import LABELS, Feed, Samples, load_samples
from unirt.errors import DataError, OptionError
from unirt.model import Model
from unirt.precision.calibration.calibrate import CalibrationData
from unirt.precision.engines import first_engine, named_engine
from unirt.session import Session
from unirt.shapes import ShapeProfile
from unirt.types import Array, TensorSpec

Progress: TypeAlias = Callable[[str, float], None]
"""Told what is being measured, and the share of all that is done, 0 to 1."""

EXACT: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType(
    {
        "onnxruntime": MappingProxyType(
            {"config": {"session.disable_quant_qdq": "1"}, "spin": False}
        ),
        "reference": MappingProxyType({}),
    }
)
"""Engines that compute Q/DQ as they are written, and by which options; the fastest first.

Only what no caller named runs so: a named engine is measured as it runs for everybody. ONNX Runtime
computes what is written without its rewriting of Q/DQ into integer kernels, which overflow 16 bits
on some CPUs; other rewriting only reorders sums, as every engine does. Its threads sleep while they
wait: many short graphs follow each other, on a machine that may have other work.
"""

_ROWS: Final = 256  # samples of an array that one call takes, where the model leaves that open
_ELEMENTS: Final = 2**22  # of a call's inputs: what goes on inside takes some hundred times that
_KEPT_BYTES: Final = 2**28  # of the float32 network's answers; what is beyond is computed again


@dataclass(frozen=True)
class Measured:
    """How far a graph's answers are from the float32 network's on the same data.

    `outputs` are those of `unirt.accuracy`, by output. `accuracy` is the share of labels, 0 to 1,
    that it gets right; None without labels. `mismatch` says why answers cannot be compared, where
    their shapes differ; then every error is infinite.
    """

    outputs: tuple[OutputError, ...]
    accuracy: float | None = None
    mismatch: str = ""

    @property
    def error(self) -> float:
        """The largest relative error of an output, `OutputError.error`: infinite where only one of
        both is NaN or infinite.
        """
        return math.inf if self.mismatch else max((one.error for one in self.outputs), default=0.0)

    @property
    def snr_db(self) -> float:
        """The lowest signal-to-noise ratio of a float output in dB; infinite for equal answers."""
        if self.mismatch:
            return -math.inf
        ratios = (one.snr_db for one in self.outputs if one.snr_db is not None)
        return min(ratios, default=math.inf)

    @property
    def noise(self) -> float:
        """The noise power over the signal's, what `snr_db` is made of."""
        return math.inf if self.snr_db == -math.inf else 10 ** (-self.snr_db / 10)

    def to_dict(self) -> dict[str, Any]:
        return {
            "error": json_number(self.error),
            "snr_db": json_number(self.snr_db),
            "accuracy": self.accuracy,
            "mismatch": self.mismatch,
            "outputs": [one.to_dict() for one in self.outputs],
        }


class Trial:
    """A float32 network on data, against which graphs made of it are measured. Close it.

    One graph is open at a time beside the network; the network's answers are kept up to a limit and
    computed again beyond it, so that memory does not grow with the data.
    """

    def __init__(
        self,
        model: Model,
        data: CalibrationData,
        engine: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        """Raises DataError, CandidateError, OptionError, NoBackend, BackendUnavailable, ModelError,
        BuildError.
        """
        self._float, self._data = model, _Calls(model.inputs, data)
        if engine is None and "onnx" not in model.formats:
            engine = "tflite"
        self._target = _named(engine, options) if engine is not None else _exact(options)
        self.engine = self._target.told
        """What measures: a named engine as it runs for everybody, or one with Q/DQ as written."""
        file = model.file(self._target.backend.formats) or model.primary  # which compiling refuses
        self._inputs, self._outputs = model.input_names(file), model.output_names(file)
        self._shapes = self._profiles()
        self._open = ExitStack()
        self._session: Session | None = self._opened(model, self._shapes[0], self._open)
        self._answers: list[dict[str, Any]] = []
        self._room = _KEPT_BYTES
        self._classifier = ""
        self.samples = 0
        """Of an array, or calls; 0 before the first measurement."""
        self.accuracy: float | None = None
        """The float32 network's own share of right answers, None without labels and before."""

    @property
    def has_labels(self) -> bool:
        return self._data.has_labels

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def measure(self, model: Model, tell: Callable[[float], None] | None = None) -> Measured:
        """How far a graph made of the network's file is from it; `tell` hears the share.

        Raises DataError for data that gives no sample, is used up or does not suit the network,
        and where the network itself answers NaN; InputError, BuildError, BackendError.
        """
        meter, hits, own, asked, samples = ErrorMeter(), 0, 0, 0, 0
        mismatch = ""
        with ExitStack() as stack:
            session = self._opened(model, self._shapes[1], stack)
            for number, call in enumerate(self._data):
                wanted = self._answer(number, call.feed, samples)
                feed = {self._inputs[name]: value for name, value in call.feed.items()}
                found = session.run(feed)
                found = {ours: found[theirs] for ours, theirs in self._outputs.items()}
                problem = find_mismatch(found, wanted)
                mismatch = mismatch or problem
                if not problem:
                    meter.add(found, wanted)
                if call.labels is not None:
                    largest = self._data.largest_label
                    if largest is None or not self._classifier:
                        # The largest of all: a bad one shows at once, not at the end.
                        asked_for = call.labels
                        if largest is not None:
                            asked_for = np.full_like(call.labels, largest)
                        self._classifier = classification_output(wanted, asked_for)
                    right = call.counted(top1(wanted[self._classifier], call.labels))
                    own, asked = own + int(right.sum()), asked + right.size
                    if not problem:
                        got = call.counted(top1(found[self._classifier], call.labels))
                        hits += int(got.sum())
                samples += call.count
                if tell is not None and self._data.count:
                    tell(samples / self._data.count)
        self._settle(samples)
        self.accuracy = own / asked if asked else None
        return Measured(meter.result(), hits / asked if asked else None, mismatch)

    def _settle(self, samples: int) -> None:
        if not samples or (self.samples and samples != self.samples):
            raise DataError(
                f"There is no data to measure {self._float.name} with."
                if not samples
                else f"The data gave {self.samples} samples first, and then {samples}.",
                "It is read once for each graph that is measured, and must give the same each "
                "time; a generator that was used before is empty.",
                "Give a list, a mapping of arrays or a file.",
            )
        self.samples = samples
        if self._session is not None and self._room >= 0:  # all answers are kept
            self._open.close()
            self._session = None

    def _answer(self, number: int, feed: Feed, sample: int) -> dict[str, Any]:
        """The float32 network's answer to a call."""
        if number < len(self._answers):
            return self._answers[number]
        if self._session is None:
            raise DataError(
                "The data gives more calls than when it was read first.",
                "It is read once for each graph that is measured, and must give the same.",
                "Give a list, a mapping of arrays or a file.",
            )
        answer = self._session.run(feed)
        for name, value in answer.items():
            if _has_nan(value):
                raise DataError(
                    f"The float32 network answers NaN in {name!r} from sample {sample} on.",
                    "Nothing can be measured against that.",
                    "Look at that sample; samples count from 0. If the data is right, the network "
                    "overflows in float32 already.",
                    tensor=name,
                    sample=sample,
                )
        if self._room >= 0 and number == len(self._answers):
            self._room -= sum(np.asarray(value).nbytes for value in answer.values())
            if self._room >= 0:
                self._answers.append(answer)
        return answer

    def _profiles(self) -> tuple[list[ShapeProfile], list[ShapeProfile]]:
        """The shapes that will come, for engines that compile for them: by the network's names of
        its inputs, and by those of the file that graphs are made of.
        """
        specs = self._float.inputs
        fixed = all(spec.shape and all(isinstance(n, int) for n in spec.shape) for spec in specs)
        if self._target.exact or fixed or any(spec.kind != "tensor" for spec in specs):
            return [], []
        profile = ShapeProfile.from_samples(call.feed for call in self._data)
        shapes = {self._inputs[name]: shape for name, shape in profile.shapes.items()}
        values = {self._inputs[name]: value for name, value in profile.values.items()}
        return [profile], [ShapeProfile(shapes, values)]

    def _opened(self, model: Model, profiles: Sequence[ShapeProfile], stack: ExitStack) -> Session:
        target = self._target
        engine = target.backend.compile(model, target.device, target.options, profiles=profiles)
        return stack.enter_context(stack.enter_context(engine).session())


def _has_nan(value: Any) -> bool:
    array = np.asarray(value)
    if array.dtype.kind not in "fcV" or "int" in array.dtype.name:
        return False
    wide = array if array.dtype.kind == "c" else array.astype(np.float64)
    return bool(np.isnan(wide).any())


@dataclass(frozen=True)
class _Call:
    feed: Feed
    labels: Array | None
    count: int
    stacked: bool

    def counted(self, right: Array) -> Array:
        """Of each label whether it was hit, without those of rows that only fill the batch up."""
        right = np.atleast_1d(right)
        return right if self.stacked else right[: self.count]


class _Calls:
    """The calls that data stands for, the same ones each time it is iterated over."""

    def __init__(self, specs: tuple[TensorSpec, ...], data: CalibrationData) -> None:
        self._specs = specs
        self._samples: Samples | None = None
        self._listed: Iterable[Any] = ()
        self.count, self.has_labels = 0, False
        self.largest_label: int | None = None
        """Of all, where they are known beforehand."""
        if isinstance(data, str | os.PathLike | Mapping | np.ndarray):
            data = load_samples(specs, data)
        if isinstance(data, Samples):
            self._samples, self.count = data, data.count
            if data.labels is not None and data.labels.size:
                self.has_labels = True
                self.largest_label = int(data.labels.max())
        elif not isinstance(data, Iterable):
            raise DataError(
                f"The data to measure on is {describe(data)}.",
                "Inputs of many calls are wanted.",
                "Give a .npz file, a mapping of arrays, or a list of inputs.",
            )
        elif iter(data) is data:
            raise DataError(
                f"The data to measure on is a {type(data).__name__}, which can be read once only.",
                "It is read once for each graph that is measured.",
                "Give a list of what it yields, a .npz file, or where that does not fit into "
                "memory an object that begins anew each time: of a class whose __iter__ is the "
                "generator.",
            )
        else:
            self._listed = data
            self.count = len(data) if isinstance(data, Sized) else 0
            self.has_labels = self._labelled(next(iter(data), None))

    def __iter__(self) -> Iterator[_Call]:
        if self._samples is None:
            for number, inputs in enumerate(self._listed):
                yield self._call(number, inputs)
            return
        samples = self._samples
        elements = sum(value.size // samples.count for value in samples.inputs.values())
        rows = max(1, min(_ROWS, samples.count, _ELEMENTS // max(1, elements)))
        for batch in samples.batches(samples.call_size(None, rows)):
            yield _Call(batch.inputs, batch.labels, batch.count, samples.stacked)

    def _labelled(self, inputs: object) -> bool:
        """Whether labels stand beside the inputs of a call, as they do in a .npz file."""
        own = any(spec.name == LABELS for spec in self._specs)
        return isinstance(inputs, Mapping) and LABELS in inputs and not own

    def _call(self, number: int, inputs: Any) -> _Call:
        labels = None
        if self._labelled(inputs):
            given = inputs[LABELS]
            scalar = getattr(given, "shape", None) == () or not isinstance(given, Iterable)
            labels = load_samples((), {LABELS: [given] if scalar else given}).labels
            inputs = {name: value for name, value in inputs.items() if name != LABELS}
        if (labels is not None) != self.has_labels:
            raise DataError(
                f"Call {number} has {'no labels' if labels is None else 'labels'}.",
                f"The first one has {'some' if self.has_labels else 'none'}, and an accuracy is "
                "that of all calls; they count from 0.",
                f"Give {LABELS!r} with each, or with none.",
                call=number,
            )
        return _Call(admit(inputs, self._specs, "cpu"), labels, 1, True)


@dataclass(frozen=True)
class _Target:
    """Where graphs are measured, and how that is told."""

    backend: Backend
    device: str
    options: Mapping[str, object]
    told: str
    exact: bool = False


def _named(engine: str, options: Mapping[str, object] | None) -> _Target:
    """The engine as everybody gets it who loads a graph on it, or with the options of a caller."""
    backend, device = named_engine(
        engine,
        "Graphs cannot be measured",
        "They are measured as they are, and say themselves what is computed how.",
    )
    told = f"{backend.name}@{device}"
    if options:
        told += f" with {', '.join(f'{name}={value}' for name, value in options.items())}"
    return _Target(backend, device, options or {}, told)


def _exact(options: Mapping[str, object] | None) -> _Target:
    """The first of EXACT that is here."""
    if options is not None:
        raise OptionError(
            "There are options, and no engine that they are for.",
            "Options differ from engine to engine.",
            "Name the engine too, for example engine='onnxruntime'.",
        )
    backend, device = first_engine(
        EXACT,
        "No engine is here that computes quantized graphs exactly as they are written.",
        "pip install 'unirt[onnxruntime]', or name another engine.",
    )
    told = f"{backend.name}@{device}, Q/DQ as written"
    return _Target(backend, device, EXACT[backend.name], told, exact=True)
