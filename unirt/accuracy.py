"""How far answers are from a reference's, and how often they are right. Pure NumPy.

An element counts as equal where both sides are NaN or the same infinity. Where only one side is
not finite, or they are different infinities, every error is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unirt.arrays import describe
from unirt.errors import DataError
from unirt.types import Array


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference's, over all samples.

    `max_abs` is max |got - reference|, in units of the output; None for strings. `relative` is
    max |got - reference| / max |reference|; None for strings. `snr_db` is the ratio of signal to
    noise, 10 log10(sum reference^2 / sum (got - reference)^2), in dB: infinite for equal answers;
    None for what is not a float. `differing` is the share of elements, 0 to 1, that are not equal;
    None for floats. `levels` is true for integers of up to 16 bits, which may be levels of a scale.
    """

    name: str
    elements: int
    max_abs: float | None
    relative: float | None
    snr_db: float | None
    differing: float | None
    levels: bool = False

    @property
    def error(self) -> float:
        """The one number that a gate looks at, 0 for equal answers.

        The relative error for floats; the share of differing elements for bools, strings and
        integers, which may be names such as classes; the smaller of the two for `levels`.
        """
        judged_by = (self.relative, self.differing)
        if self.differing is not None and not self.levels:
            judged_by = (None, self.differing)
        return min((value for value in judged_by if value is not None), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "elements": self.elements,
            "error": json_number(self.error),
            "max_abs": json_number(self.max_abs),
            "relative": json_number(self.relative),
            "snr_db": json_number(self.snr_db),
            "differing": json_number(self.differing),
        }


def json_number(value: float | None) -> float | str | None:
    """The number; `inf`, `-inf` and `nan` as text, which JSON has no numbers for."""
    return value if value is None or math.isfinite(value) else str(value)


def max_abs_error(got: Array, reference: Array) -> float:
    """max |got - reference|, in units of the output; 0 for empty arrays."""
    return _difference(got, reference).max_abs


def relative_error(got: Array, reference: Array) -> float:
    """max |got - reference| / max |reference|; 0 if equal, infinite if only the reference is 0."""
    return _difference(got, reference).relative


def snr_db(got: Array, reference: Array) -> float:
    """10 log10(sum reference^2 / sum (got - reference)^2) in dB, over finite elements."""
    return _difference(got, reference).snr_db


def share_differing(got: Array, reference: Array) -> float:
    """The share of elements, 0 to 1, that are not equal; 0 for empty arrays."""
    return _difference(got, reference).share


def mismatch(outputs: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Why two sets of outputs cannot be compared: names, types or shapes; empty if they can."""
    got, wanted = dict(_leaves(outputs)), dict(_leaves(reference))
    if got.keys() != wanted.keys():
        return f"its outputs are {', '.join(got)}, and the reference's are {', '.join(wanted)}"
    for name, value in got.items():
        ours, theirs = np.asarray(value), np.asarray(wanted[name])
        text = ours.dtype.kind in "OSU" and theirs.dtype.kind in "OSU"
        if ours.shape != theirs.shape or (ours.dtype != theirs.dtype and not text):
            return (
                f"its output {name!r} is {describe(value)}, and the reference's is "
                f"{describe(wanted[name])}"
            )
    return ""


class ErrorMeter:
    """Adds up the errors of many calls; `result` is as if all outputs had been one array each."""

    def __init__(self) -> None:
        self._differences: dict[str, _Difference] = {}

    def add(self, outputs: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """One call's outputs, between which and the reference's there is no `mismatch`."""
        wanted = dict(_leaves(reference))
        for name, value in _leaves(outputs):
            difference = _difference(value, wanted[name])
            seen = self._differences.get(name)
            self._differences[name] = seen.joined(difference) if seen else difference

    def result(self) -> tuple[OutputError, ...]:
        return tuple(
            OutputError(
                name,
                found.elements,
                None if found.kind == "name" else found.max_abs,
                None if found.kind in ("name", "bool") else found.relative,
                found.snr_db if found.kind == "float" else None,
                None if found.kind == "float" else found.share,
                found.kind == "level",
            )
            for name, found in self._differences.items()
        )


@dataclass(frozen=True)
class _Difference:
    kind: str
    elements: int
    unequal: int
    max_abs: float
    max_reference: float
    signal: float
    noise: float

    @property
    def relative(self) -> float:
        if self.max_abs == 0:
            return 0.0
        return self.max_abs / self.max_reference if self.max_reference else math.inf

    @property
    def snr_db(self) -> float:
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or math.isinf(self.noise):
            return -math.inf
        return 10 * (math.log10(self.signal) - math.log10(self.noise))

    @property
    def share(self) -> float:
        return self.unequal / self.elements if self.elements else 0.0

    def joined(self, other: _Difference) -> _Difference:
        return _Difference(
            self.kind,
            self.elements + other.elements,
            self.unequal + other.unequal,
            max(self.max_abs, other.max_abs),
            max(self.max_reference, other.max_reference),
            self.signal + other.signal,
            self.noise + other.noise,
        )


def _difference(got: Array, reference: Array) -> _Difference:
    narrow = np.asarray(reference).dtype.itemsize <= 2
    got, reference = _comparable(got), _comparable(reference)
    kind, size = got.dtype.kind, int(got.size)
    if kind in "OSU":
        unequal = int(np.count_nonzero(got != reference))
        return _Difference("name", size, unequal, float(unequal > 0), 1.0, 0.0, float(unequal))
    if kind in "biu":
        unequal = int(np.count_nonzero(got != reference))
        if kind == "b":
            got, reference = got.astype(np.int8), reference.astype(np.int8)
        # Modulo 2^64 the larger less the smaller is exact, even from -2^63 to 2^63 - 1.
        high, low = np.maximum(got, reference), np.minimum(got, reference)
        distance = (high.astype(np.uint64) - low.astype(np.uint64)).astype(np.float64)
        size_of = np.abs(reference.astype(np.float64))
        name = "bool" if kind == "b" else "level" if narrow else "int"
        return _summed(name, size, unequal, distance, size_of)
    with np.errstate(all="ignore"):
        same = (got == reference) | (np.isnan(got) & np.isnan(reference))
        finite = np.isfinite(got) & np.isfinite(reference)
        distance = np.where(same, 0.0, np.where(finite, np.abs(got - reference), np.inf))
        size_of = np.abs(np.where(np.isfinite(reference), reference, 0))
        return _summed("float", size, int(np.count_nonzero(~same)), distance, size_of)


def _summed(kind: str, size: int, unequal: int, distance: Array, size_of: Array) -> _Difference:
    with np.errstate(all="ignore"):
        return _Difference(
            kind,
            size,
            unequal,
            float(distance.max(initial=0)),
            float(size_of.max(initial=0)),
            float(np.square(size_of).sum()),
            float(np.square(distance).sum()),
        )


def _comparable(value: Any) -> Array:
    """Floats of every width as float64 or complex128; text as objects."""
    array = np.asarray(value)
    if array.dtype.kind in "biuO":
        return array
    if array.dtype.kind in "SU":
        return array.astype(object)
    if array.dtype.kind == "c":
        return array.astype(np.complex128)
    if array.dtype.kind == "V" and "int" in array.dtype.name:
        return array.astype(np.int64)
    return array.astype(np.float64)


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays by name; those in a sequence or map under `name[key]`."""
    items: Any
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, list | tuple):
        items = enumerate(values)
    else:
        yield name, values
        return
    for key, value in items:
        yield from _leaves(value, f"{name}[{key}]" if name else str(key))


def classification_output(outputs: Mapping[str, Any], labels: Array) -> str:
    """The name of the output that the labels are about. Raises DataError if that is not clear.

    It is numeric, and its shape is that of the labels and one last axis of at least two classes;
    axes of size 1 do not matter. Of several such outputs, the one with `logits` in its name.
    """
    fitting = [name for name, value in outputs.items() if _classifies(value, labels)]
    chosen = fitting
    if len(fitting) > 1:
        chosen = [name for name in fitting if "logits" in name.lower()]
    if len(chosen) != 1:
        told = "; ".join(f"{name}: {describe(value)}" for name, value in outputs.items())
        raise DataError(
            f"The labels fit {'several outputs' if fitting else 'no output'} of the model.",
            f"For labels of shape {list(labels.shape)} that is one of shape "
            f"{[*labels.shape, 'classes']}, named logits if there are several; it gives {told}.",
            "Leave the labels out to compare without task accuracy, or give them one class number "
            "for each answer.",
        )
    classes = np.asarray(outputs[chosen[0]]).shape[-1]
    if labels.size and int(labels.max()) >= classes:
        raise DataError(
            f"A label is {int(labels.max())}, and the output {chosen[0]!r} has {classes} classes.",
            f"Labels are numbers of classes, from 0 to {classes - 1}.",
            "Renumber the labels, or check that they belong to this model.",
            label=int(labels.max()),
            classes=classes,
        )
    return chosen[0]


def top1(output: Array, labels: Array) -> Array:
    """For each label, whether it is the largest along the last axis of `output`. NaN is a miss."""
    scores = _comparable(output)
    hits: Array = scores.argmax(axis=-1).reshape(labels.shape) == labels
    if scores.dtype.kind == "f":
        hits &= ~np.isnan(scores).any(axis=-1).reshape(labels.shape)
    return hits


def _classifies(value: Any, labels: Array) -> bool:
    if not isinstance(value, np.ndarray) or value.ndim == 0 or value.shape[-1] < 2:
        return False
    numeric = _comparable(value).dtype.kind in "iuf"
    rows, wanted = ([s for s in shape if s != 1] for shape in (value.shape[:-1], labels.shape))
    return numeric and rows == wanted
