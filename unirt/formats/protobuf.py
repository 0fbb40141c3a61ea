"""Reads protobuf's wire format straight from a buffer, by tables of the fields one cares about.

Why not the protobuf package: it costs an import, copies every weight, and hands a hostile file to
native code. Here nothing is allocated from a size that a file declares, every length is checked
against the message around it, payloads stay views, and what is not in a table is stepped over.

Like the official parsers, which must not see another model than we do: a field given twice keeps
the last scalar but *merges* messages, repeated numbers may be packed or not, and a known field with
an unexpected wire type counts as unknown.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias, TypeVar

import numpy as np

# Deeper nesting is refused, as by the official parsers.
MAX_DEPTH: Final = 100
# Fields become Python objects, so this bounds memory and time. A field costs one, a message four; a
# graph of 10,000 nodes costs some 350,000.
MAX_COST: Final = 5_000_000
# How many elements of a repeated number are kept: of use are only small ones, such as shapes.
KEPT: Final = 1024

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are not what they claim to be."""

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(f"{why} at byte {offset:,}")


class Numbers:
    """A repeated number: how many there are, and the values of the first few."""

    __slots__ = ("count", "values")

    def __init__(self) -> None:
        self.count = 0
        self.values: list[int | float] = []

    @property
    def complete(self) -> bool:
        return self.count == len(self.values)


# `int` is 64 bits wide. Of an `int32`, and of enums, parsers drop the upper half of what the file
# says. `counted` are payloads of which only the number matters.
Number: TypeAlias = Literal["int", "int32", "float32", "float64", "counted"]
_UNPACKED: Final[Mapping[str, int]] = {
    "int": VARINT,
    "int32": VARINT,
    "float32": FIXED32,
    "float64": FIXED64,
}
_FIXED: Final[Mapping[str, struct.Struct]] = {
    "float32": struct.Struct("<f"),
    "float64": struct.Struct("<d"),
}


@dataclass(frozen=True, slots=True)
class _Field:
    """Where the value of one wire tag goes, and what it is."""

    name: str
    kind: Any  # str, bytes, a Message subclass, or a Number
    many: bool = False
    # For unpacked repeated numbers: matches a whole run of them, at the speed of `re`.
    run: re.Pattern[bytes] | None = None


class Message:
    """Base of message classes: class attributes are the defaults, `FIELDS` says what is read."""

    FIELDS: ClassVar[Mapping[int, _Field]] = {}


M = TypeVar("M", bound=Message)


def one(name: str, kind: Any) -> tuple[str, Any, bool]:
    """Table entry of a field that stands once."""
    return name, kind, False


def many(name: str, kind: Any) -> tuple[str, Any, bool]:
    """Table entry of a repeated field: a list, or `Numbers` for numbers."""
    return name, kind, True


def table(entries: Mapping[int, tuple[str, Any, bool]]) -> Mapping[int, _Field]:
    """`FIELDS` from field number -> `one(...)` or `many(...)`, keyed by the whole wire tag."""
    fields: dict[int, _Field] = {}
    for number, (name, kind, repeated) in entries.items():
        wire = _UNPACKED.get(kind, BYTES) if isinstance(kind, str) else BYTES
        tag = number << 3 | wire
        if kind in _UNPACKED and repeated:
            fields[number << 3 | BYTES] = _Field(name, kind, True)
            fields[tag] = _Field(name, kind, True, _run_pattern(tag, wire))
        else:
            fields[tag] = _Field(name, kind, repeated)
    return fields


def _run_pattern(tag: int, wire: int) -> re.Pattern[bytes]:
    prefix = re.escape(bytes([tag]) if tag < 0x80 else bytes([tag & 0x7F | 0x80, tag >> 7]))
    value = {VARINT: rb"[\x80-\xff]{0,9}[\x00-\x7f]", FIXED32: rb".{4}", FIXED64: rb".{8}"}[wire]
    # Possessive: without it, `re` would remember every element in case it had to go back.
    return re.compile(rb"(?:" + prefix + value + rb")++", re.DOTALL)


def decode(data: memoryview, message: M) -> M:
    """Fills `message` from a whole buffer. Raises WireError."""
    try:
        _Decoder(data).message(message, 0, len(data), MAX_DEPTH)
    except (IndexError, struct.error) as error:
        raise WireError("a field runs past the end", len(data)) from error
    except UnicodeDecodeError as error:
        raise WireError(f"a name is not UTF-8 ({error.reason})", error.start) from error
    return message


class _Decoder:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.cost_left = MAX_COST

    def message(self, message: Message, pos: int, end: int, depth: int) -> None:
        if depth == 0:
            raise WireError("messages are nested too deeply", pos)
        data, fields = self.data, message.FIELDS
        self.cost_left -= 4
        while pos < end:
            self.cost_left -= 1
            if self.cost_left < 0:
                raise WireError("there are more parts than networks have", pos)
            start = pos
            tag = data[pos]
            pos += 1
            if tag > 0x7F:
                tag, pos = self.varint(start)
            field = fields.get(tag)
            wire = tag & 7
            if wire == BYTES:
                size = data[pos]
                pos += 1
                if size > 0x7F:
                    size, pos = self.varint(pos - 1)
                stop = pos + size
                if stop > end:
                    raise WireError("a field runs past the end of its message", start)
                if field is not None:
                    self.payload(message, field, pos, stop, depth)
                pos = stop
            elif field is not None and field.run is not None:
                pos = self.unpacked(message, field, start, end)
            elif wire == VARINT:
                number, pos = self.varint(pos)
                if field is not None:
                    setattr(message, field.name, _signed(number, field.kind))
            elif wire in (FIXED32, FIXED64):
                if field is not None:
                    setattr(message, field.name, _FIXED[field.kind].unpack_from(data, pos)[0])
                pos += 4 if wire == FIXED32 else 8
            else:
                raise WireError(f"wire type {wire} is none that models use", start)
            if tag < 8:
                raise WireError("a field has number 0", start)
        if pos != end:
            raise WireError("a field runs past the end of its message", end)

    def varint(self, pos: int) -> tuple[int, int]:
        data, value, shift = self.data, 0, 0
        while True:
            byte = data[pos]
            pos += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, pos
            shift += 7
            if shift == 70:
                raise WireError("a number has more than ten bytes", pos)

    def payload(self, message: Message, field: _Field, start: int, stop: int, depth: int) -> None:
        kind = field.kind
        value: Any
        if kind is str:
            value = str(self.data[start:stop], "utf-8")
        elif kind is bytes:
            value = self.data[start:stop]
        elif isinstance(kind, str):
            self.packed(_numbers(message, field.name), field.kind, start, stop)
            return
        else:
            # A message that stands once but is given twice is merged, hence the one already there.
            value = None if field.many else getattr(message, field.name)
            value = kind() if value is None else value
            self.message(value, start, stop, depth - 1)
        if field.many:
            values = getattr(message, field.name)
            if values:
                values.append(value)
            else:
                setattr(message, field.name, [value])
        else:
            setattr(message, field.name, value)

    def packed(self, numbers: Numbers, kind: Number, start: int, stop: int) -> None:
        if kind == "counted":
            numbers.count += 1
            return
        if kind in _FIXED:
            fixed = _FIXED[kind]
            count, rest = divmod(stop - start, fixed.size)
            if rest:
                raise WireError("packed numbers end in the middle of one", start)
            keep = start + fixed.size * max(0, min(count, KEPT - len(numbers.values)))
            numbers.values += [value for (value,) in fixed.iter_unpack(self.data[start:keep])]
            numbers.count += count
            return
        if stop > start and self.data[stop - 1] > 0x7F:
            raise WireError("packed numbers end in the middle of one", start)
        numbers.count += _last_bytes(self.data[start:stop])
        while start < stop and len(numbers.values) < KEPT:
            number, start = self.varint(start)
            numbers.values.append(_signed(number, kind))

    def unpacked(self, message: Message, field: _Field, start: int, end: int) -> int:
        assert field.run is not None
        match = field.run.match(self.data, start, end)
        if match is None:
            raise WireError("a number runs past the end of its message", start)
        numbers, stop, data = _numbers(message, field.name), match.end(), self.data
        prefix = 1 if data[start] < 0x80 else 2
        if field.kind not in _FIXED:
            while start < stop and len(numbers.values) < KEPT:
                number, start = self.varint(start + prefix)
                numbers.values.append(_signed(number, field.kind))
                numbers.count += 1
            # Each element has two bytes below 0x80: the last of its tag and the last of its value.
            numbers.count += _last_bytes(data[start:stop]) // 2
        else:
            fixed = _FIXED[field.kind]
            step = prefix + fixed.size
            numbers.count += (stop - start) // step
            while start < stop and len(numbers.values) < KEPT:
                numbers.values.append(fixed.unpack_from(data, start + prefix)[0])
                start += step
        return stop


def _numbers(message: Message, name: str) -> Numbers:
    numbers: Numbers | None = getattr(message, name)
    if numbers is None:
        numbers = Numbers()
        setattr(message, name, numbers)
    return numbers


def _signed(number: int, kind: Number) -> int:
    if kind == "int32":
        number &= 0xFFFF_FFFF
        return number - (1 << 32) if number >> 31 else number
    return number - (1 << 64) if number >> 63 else number


def _last_bytes(data: memoryview) -> int:
    """How many bytes end a varint: those below 0x80."""
    if len(data) < 64:
        return sum(byte < 0x80 for byte in data)
    return sum(int(np.count_nonzero(np.frombuffer(chunk, np.int8) >= 0)) for chunk in _chunks(data))


def _chunks(data: memoryview, size: int = 1 << 20) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
