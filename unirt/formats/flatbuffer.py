"""Reads FlatBuffers tables from a buffer; every offset and length is checked before its use."""

from __future__ import annotations

import struct
from typing import Final

# Tables and texts may be shared, so that a small file can mean a huge tree: this bounds the work,
# counted in numbers read. A table costs four, and networks have one per tensor and per operator.
MAX_WORK: Final = 8_000_000

_SIZES: Final = {code: struct.calcsize("<" + code) for code in "bBiIQ?"}


class FlatBufferError(ValueError):
    """An offset or a length leads out of the buffer."""


class FlatBuffer:
    """The buffer, and how much work may still be spent on it."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.work_left = MAX_WORK

    def root(self) -> Table:
        return Table(self, self.offset(0))

    def scalar(self, code: str, pos: int) -> int:
        # `unpack_from` would count a negative position from the end.
        if pos < 0 or pos + _SIZES[code] > len(self.data):
            raise FlatBufferError(f"a value at byte {pos} lies outside the file")
        value: int = struct.unpack_from("<" + code, self.data, pos)[0]
        return value

    def offset(self, pos: int) -> int:
        """Where the offset at `pos` leads to."""
        return pos + self.scalar("I", pos)

    def vector(self, pos: int, size: int) -> tuple[int, int]:
        """Start and length of the vector at `pos`, whose elements have `size` bytes."""
        count = self.scalar("I", pos)
        if pos + 4 + count * size > len(self.data):
            raise FlatBufferError(f"the {count:,} elements at byte {pos} reach beyond the file")
        return pos + 4, count

    def spend(self, work: int) -> None:
        self.work_left -= work
        if self.work_left < 0:
            raise FlatBufferError("it means more tables and texts than networks have")


class Table:
    """One table; fields are asked for by their slot, the position in the schema from 0."""

    __slots__ = ("buffer", "pos", "size", "vtable")

    def __init__(self, buffer: FlatBuffer, pos: int) -> None:
        buffer.spend(4)
        self.buffer = buffer
        self.pos = pos
        self.vtable = pos - buffer.scalar("i", pos)
        self.size = int.from_bytes(self._span(self.vtable, 2), "little")
        self._span(self.vtable, self.size)

    def _span(self, pos: int, size: int) -> memoryview:
        if pos < 0 or pos + size > len(self.buffer.data):
            raise FlatBufferError(f"the table at byte {self.pos} has its fields outside the file")
        return self.buffer.data[pos : pos + size]

    def field(self, slot: int) -> int | None:
        """Where the field is; None if it is left out."""
        entry = 4 + 2 * slot
        if entry + 2 > self.size:
            return None
        at = self.vtable + entry
        offset = int.from_bytes(self.buffer.data[at : at + 2], "little")
        return self.pos + offset if offset else None

    def scalar(self, slot: int, code: str, default: int = 0) -> int:
        pos = self.field(slot)
        return default if pos is None else self.buffer.scalar(code, pos)

    def text(self, slot: int) -> str:
        pos = self.field(slot)
        if pos is None:
            return ""
        start, count = self.buffer.vector(self.buffer.offset(pos), 1)
        self.buffer.spend(1 + count // 64)
        try:
            return str(self.buffer.data[start : start + count], "utf-8")
        except UnicodeDecodeError as error:
            raise FlatBufferError(f"the text at byte {start} is not UTF-8") from error

    def ints(self, slot: int) -> tuple[int, ...]:
        """A vector of 32-bit integers."""
        pos = self.field(slot)
        if pos is None:
            return ()
        start, count = self.buffer.vector(self.buffer.offset(pos), 4)
        self.buffer.spend(count)
        return struct.unpack_from(f"<{count}i", self.buffer.data, start)

    def length(self, slot: int) -> int | None:
        """How many bytes a vector of bytes has; None if it is left out."""
        pos = self.field(slot)
        return None if pos is None else self.buffer.vector(self.buffer.offset(pos), 1)[1]

    def tables(self, slot: int) -> list[Table]:
        pos = self.field(slot)
        if pos is None:
            return []
        start, count = self.buffer.vector(self.buffer.offset(pos), 4)
        at = range(start, start + 4 * count, 4)
        return [Table(self.buffer, self.buffer.offset(entry)) for entry in at]

    def has(self, slot: int) -> bool:
        return self.field(slot) is not None
