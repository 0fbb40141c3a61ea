"""A calibration: the range of values that each tensor of a network takes on real inputs."""

from __future__ import annotations

import json
import logging
import numbers
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from unirt.errors import DataError, ModelError, OptionError, sentence
from unirt.model import Model, ModelSource
from unirt.precision.names import check_names
from unirt.precision.source import graph_names
from unirt.saving import save_whole

FORMAT: Final = "unirt-calibration"
VERSION: Final = 1
BY_HAND: Final = "by hand"
"""The method of a calibration that holds nothing but ranges given by hand."""

_LARGEST: Final = 3.4028234663852886e38  # finite in float32, in which scales are kept
_SMALLEST: Final = 2.0**-100  # a scale made of less comes near to what float32 flushes to zero
_MAX_BYTES: Final = 64 * 2**20  # of a file; a range takes about 60

logger = logging.getLogger("unirt")


@dataclass(frozen=True)
class Range:
    """What a quantized tensor must represent: `low` to `high`; what lies beyond is clipped.

    0 need not lie between them, but has a code in any quantized tensor: asymmetric quantization
    extends the range to it. Raises OptionError unless both are finite in float32 and in order.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for end in ("low", "high"):
            value: Any = getattr(self, end)
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not (number and abs(value) <= _LARGEST):
                raise OptionError(
                    f"No range can begin or end at {value!r}.",
                    "Its ends are finite numbers that float32 holds.",
                    "Give two such numbers.",
                    low=self.low,
                    high=self.high,
                )
            object.__setattr__(self, end, float(value))
        if self.low > self.high:
            raise OptionError(
                f"{self.low!r} to {self.high!r} is no range.",
                "It ends before it begins.",
                "Give the lower end first.",
                low=self.low,
                high=self.high,
            )

    @property
    def size(self) -> float:
        """The largest magnitude: what symmetric quantization scales by."""
        return max(abs(self.low), abs(self.high))

    @property
    def empty(self) -> bool:
        """Whether next to nothing but 0 lies in it, so that no scale can be made of it."""
        return self.size < _SMALLEST


RangeLike: TypeAlias = "Range | float | tuple[float, float]"
CalibrationSource: TypeAlias = "Calibration | str | os.PathLike[str]"


@dataclass(frozen=True)
class Calibration:
    """Portable between engines: the Q/DQ graph of each target is derived from it.

    `ranges` go by tensor name, none of them is empty. `method` says how they were found, `samples`
    from how many calls, `model` is the content hash of the graph they belong to, and `tensors` are
    the names in its main graph, as far as they are known. `notes` are sentences on what was odd.
    """

    ranges: Mapping[str, Range]
    method: str
    samples: int
    model: str
    notes: tuple[str, ...] = field(default=())
    tensors: frozenset[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", MappingProxyType(dict(self.ranges)))
        object.__setattr__(self, "tensors", frozenset(self.tensors))

    @classmethod
    def from_ranges(
        cls, model: Model | ModelSource, ranges: Mapping[str, RangeLike]
    ) -> Calibration:
        """Ranges given by hand for tensors of a network: (low, high), or the largest magnitude.

        Raises OptionError for a name that its main graph lacks and for what is no range, ModelError
        for a model without ONNX graph, BackendUnavailable without the onnx package.
        """

        digest, names = graph_names(Model.open(model))
        return cls({}, BY_HAND, 0, digest, tensors=names).with_ranges(ranges)

    def with_ranges(self, ranges: Mapping[str, RangeLike]) -> Calibration:
        """The same with these ranges in place of what was found: (low, high), or the largest
        magnitude.

        Raises OptionError for what is no range, for an empty one, and for names that the network
        lacks where its names are known.
        """
        if not isinstance(ranges, Mapping):
            raise OptionError(
                f"What was given, of type {type(ranges).__name__}, are no ranges by tensor name.",
                "Each range belongs to a tensor of the network.",
                "Write for example {'logits': (-1.5, 4.0)}.",
            )
        given = {name: _given(name, value) for name, value in ranges.items()}
        if self.tensors:
            check_names(given, self.tensors)
        notes = self.notes
        if self.method != BY_HAND and given:
            listed = ", ".join(map(repr, given))
            notes += (f"Given by hand, not found by {self.method}: the range of {listed}.",)
        notes += tuple(
            f"The range of {name!r} was given as the one value {one.low:.6g}: others are cut off."
            for name, one in given.items()
            if one.low == one.high
        )
        return replace(self, ranges={**self.ranges, **given}, notes=notes)

    def check(self, model: Model | ModelSource) -> tuple[str, ...]:
        """Sentences on why these ranges may not suit that model; logged too. None for its own.

        A network that was exported again or simplified keeps most names, so that another content
        hash alone is no error. Raises ModelError if the model has less than half of the names.
        """

        source = Model.open(model)
        file = source.file(["onnx", "tflite"])
        if file is not None and file.hash == self.model:
            return ()
        _, names = graph_names(source)
        missing = [name for name in self.ranges if name not in names]
        if 2 * len(missing) > len(self.ranges):
            raise ModelError(
                f"The calibration is not one of {source.name}.",
                f"It has ranges of {len(self.ranges)} tensors, and {len(missing)} of them, such as "
                f"{missing[0]!r}, are not in the model.",
                "Calibrate this model, or use the one that was calibrated.",
                missing=tuple(missing),
            )
        notes = [f"The ranges were found on another version of {source.name}: its hash differs."]
        if missing:
            notes.append(
                f"{len(missing)} of {len(self.ranges)} calibrated tensors are not in "
                f"{source.name}, such as {missing[0]!r}."
            )
        for note in notes:
            logger.warning("%s", note)
        return tuple(notes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a readable JSON file, a line for each range, and returns its path.

        Replaces what is there, whole or not at all. Raises DataError where it cannot be written.
        """
        path = _path(path)
        head = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "samples": self.samples,
            "model": self.model,
            "notes": list(self.notes),
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        ranges = (
            f"    {json.dumps(name)}: [{float(one.low)!r}, {float(one.high)!r}]"
            for name, one in self.ranges.items()
        )
        names = (f"    {json.dumps(name)}" for name in sorted(self.tensors))
        blocks = [
            '  "ranges": {\n' + ",\n".join(ranges) + "\n  },",
            '  "tensors": [\n' + ",\n".join(names) + "\n  ]",
        ]
        text = "\n".join(["{", *lines, *blocks, "}"]) + "\n"
        remedy = "Choose a file in a folder that can be written to."
        save_whole(path, text.encode(), "The calibration", remedy)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """What `save` wrote, every value checked. Raises DataError, OptionError for no path."""
        path = _path(path)
        return _Reader(path).calibration(_read(path))


def find_calibration(given: CalibrationSource) -> Calibration:
    """The calibration itself, or the one that was saved to this path.

    Raises DataError for what cannot be loaded, OptionError for what is neither.
    """
    if isinstance(given, Calibration):
        return given
    if isinstance(given, str | os.PathLike):
        return Calibration.load(given)
    raise OptionError(
        f"What was given, of type {type(given).__name__}, is no calibration.",
        "It is what unirt.precision.calibrate gives, or the path of a file that it was saved to.",
        "Pass one of them, or inputs (samples=, data=) to have their ranges found.",
    )


def _path(given: str | os.PathLike[str]) -> Path:
    if isinstance(given, str | os.PathLike):
        return Path(given)
    raise OptionError(
        f"What was given, of type {type(given).__name__}, is no path.",
        "A calibration is saved to a file, and loaded from one.",
        "Give the path as text or pathlib.Path.",
    )


def _given(name: str, given: RangeLike) -> Range:
    value = _plain(given)
    if isinstance(value, int | float) and -_LARGEST <= value < 0:
        raise OptionError(
            f"The range of {name!r} is {value!r}.",
            "A single number is the largest magnitude, and none is negative.",
            f"Give {-value!r} for {value!r} to {-value!r}; or both ends.",
            name=name,
        )
    if isinstance(value, Range):
        found = value
    elif not isinstance(value, tuple | list):
        size = Range(0, value).high
        found = Range(-size, size)
    elif len(value) == 2:
        found = Range(_plain(value[0]), _plain(value[1]))
    else:
        raise OptionError(
            f"The range of {name!r} is {value!r}.",
            "A range is a lower and an upper end, or one number: the largest magnitude.",
            f"Write for example {{{name!r}: (-1.5, 4.0)}}.",
            name=name,
        )
    if found.empty:
        raise OptionError(
            f"The range of {name!r} is {found.low!r} to {found.high!r}.",
            "Nothing but 0 lies in it, so that no scale can be made of it.",
            "Give the values that the tensor may take.",
            name=name,
        )
    return found


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's; others as they are, for Range to judge."""
    plain = getattr(value, "tolist", None)
    return plain() if callable(plain) else value


def _read(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands in it twice")
        return found

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        return json.loads(data.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except OSError as error:
        raise DataError(
            f"The calibration {path} cannot be read.",
            f"{error.strerror or error}.",
            "Check the path, or calibrate again and save to it.",
            path=path,
        ) from error
    except (ValueError, RecursionError) as error:  # of Unicode and of JSON too
        raise DataError(
            f"{path.name} is no calibration.",
            f"It is not the JSON that Calibration.save writes, or it is damaged: {error}.",
            "Calibrate again, and save.",
            path=path,
        ) from error


class _Reader:
    """Judges what a file holds, piece by piece."""

    _KEYS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
        "format": (lambda value: value == FORMAT, repr(FORMAT)),
        "version": (lambda value: value is not True and value == VERSION, str(VERSION)),
        "method": (lambda value: isinstance(value, str) and value != "", "a text"),
        "samples": (lambda value: type(value) is int and value >= 0, "a count"),
        "model": (
            lambda value: (
                isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
            ),
            "a SHA-256 of 64 digits",
        ),
        "notes": (lambda value: _texts(value), "a list of texts"),
        "ranges": (lambda value: isinstance(value, dict), "ranges by tensor name"),
        "tensors": (lambda value: _texts(value), "a list of tensor names"),
    }

    def __init__(self, path: Path) -> None:
        self._path = path

    def calibration(self, content: Any) -> Calibration:
        if not isinstance(content, dict):
            raise self._wrong("The whole of it is no JSON object")
        for key, (fits, wanted) in self._KEYS.items():
            if key not in content:
                raise self._wrong(f"{key!r} is missing")
            if not fits(content[key]):
                raise self._wrong(f"{key!r} is {str(content[key])[:60]!r}, not {wanted}")
        if extra := content.keys() - self._KEYS.keys():
            raise self._wrong(f"{min(extra)!r} means nothing")
        tensors = frozenset(content["tensors"])
        ranges = {name: self._range(name, value) for name, value in content["ranges"].items()}
        if tensors and (strange := ranges.keys() - tensors):
            raise self._wrong(f"{min(strange)!r} has a range, and is not among the tensors")
        notes = tuple(content["notes"])
        method, samples, model = content["method"], content["samples"], content["model"]
        return Calibration(ranges, method, samples, model, notes, tensors)

    def _range(self, name: str, value: Any) -> Range:
        if not isinstance(value, list) or len(value) != 2:
            raise self._wrong(f"the range of {name!r} is no pair of numbers")
        try:
            return _given(name, (value[0], value[1]))
        except OptionError as error:
            raise self._wrong(f"the range of {name!r} is {str(value)[:60]}: {error}") from error

    def _wrong(self, why: str) -> DataError:
        return DataError(
            f"{self._path.name} is no calibration that can be used.",
            sentence(why),
            "Calibrate again, and save; a file of a newer UniRT needs that version.",
            path=self._path,
        )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
