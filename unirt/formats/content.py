"""The bytes of a model: where they are, whether they are still the same, and their hash."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final, TypeAlias

from unirt.errors import ModelError, ModelNotFound

# Up to here a file is read rather than mapped: as fast, and nobody who truncates it meanwhile can
# kill this process with SIGBUS.
_MAP_ABOVE: Final = 16 * 2**20

Refusal: TypeAlias = Callable[..., ModelError]


@dataclass(frozen=True)
class DiskFile:
    """A regular file, and the state in which it was found."""

    path: Path
    size: int
    state: tuple[int, ...]

    @classmethod
    def found(cls, path: Path, status: os.stat_result) -> DiskFile:
        return cls(path, status.st_size, _state(status))

    def open(self) -> BufferedReader:
        """Opens the file for reading. Raises ModelError if it is not the one that was found."""
        # A pipe put in its place must not make this wait.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            file = os.fdopen(os.open(self.path, flags), "rb")
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error
        try:
            self.verify(file)
        except ModelError:
            file.close()
            raise
        return file

    def verify(self, file: BufferedReader | None = None) -> None:
        """Raises ModelError if the file, or the open `file`, changed since it was found."""
        try:
            status = self.path.stat() if file is None else os.fstat(file.fileno())
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error
        if _state(status) != self.state:
            raise self._changed("its size, time or identity is another")

    def _changed(self, how: str) -> ModelError:
        return ModelError(
            f"{self.path} changed after it was opened.",
            f"UniRT checked and hashed another file: {how}.",
            "Open the model again, and replace model files by renaming new ones over them.",
            path=self.path,
        )


@dataclass(frozen=True)
class Region:
    """A stretch of a file outside the model file that belongs to the model."""

    file: DiskFile
    start: int
    stop: int


class Content:
    """All bytes of one model: the model file, or bytes in memory, and the regions of other files.

    Immutable and thread-safe; the hash is computed once, when first asked for.
    """

    def __init__(self, source: DiskFile | bytes, regions: Sequence[Region] = ()) -> None:
        self.source = source
        self.regions = merged(regions)
        self._lock = threading.Lock()
        self.notes: tuple[str, ...] = ()
        self._digest: bytes | None = None
        self._hash: str | None = None

    @property
    def path(self) -> Path | None:
        return self.source.path if isinstance(self.source, DiskFile) else None

    @property
    def external(self) -> tuple[DiskFile, ...]:
        return tuple(dict.fromkeys(region.file for region in self.regions))

    @property
    def size(self) -> int:
        own = self.source.size if isinstance(self.source, DiskFile) else len(self.source)
        return own + sum(file.size for file in self.external)

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the model file; with external data, of its digest and each region's.

        Knows no paths: the model file itself says which region is which weight.
        """
        with self._lock:
            if self._hash is None:
                digest = self._digest or self._sha256()
                if self.regions:
                    parts = [digest, *map(_region_sha256, self.regions)]
                    self._hash = hashlib.sha256(b"".join(parts)).hexdigest()
                else:
                    self._hash = digest.hex()
                self._digest = digest
            return self._hash

    def head(self) -> bytes:
        """The first bytes of the model file, enough to tell what it is."""
        if isinstance(self.source, bytes):
            return self.source[:64]
        with self.source.open() as file:
            return file.read(64)

    def view(self) -> memoryview:
        """The model file's bytes, mapped where they are many; valid as long as it is referenced."""
        if isinstance(self.source, bytes):
            return memoryview(self.source)
        with self.source.open() as file:
            if self.source.size <= _MAP_ABOVE:
                return memoryview(file.read())
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def read(self) -> bytes:
        """The model file's bytes. Raises ModelError if they are not those that were opened."""
        if isinstance(self.source, bytes):
            return self.source
        with self.source.open() as file:
            data = file.read()
            self.source.verify(file)
        digest = hashlib.sha256(data).digest()
        with self._lock:
            if self._digest not in (None, digest):
                raise self.source._changed("its bytes are others")
            self._digest = digest
        return data

    def verify(self) -> None:
        """Raises ModelError if any file of the model changed on disk since it was opened."""
        if isinstance(self.source, DiskFile):
            self.source.verify()
        for file in self.external:
            file.verify()

    def _sha256(self) -> bytes:
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).digest()
        with self.source.open() as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            self.source.verify(file)
        return digest


class Derived(Content):
    """What a transform makes of another model's content, made when somebody first reads it.

    Its hash is known before: that of the content it comes from, and of what the transform is.
    """

    def __init__(
        self, base: Content, make: Callable[[], tuple[bytes, tuple[str, ...]]], how: str
    ) -> None:
        super().__init__(b"")
        self._base, self._make, self._how = base, make, how

    @property
    def path(self) -> Path | None:
        return None

    @property
    def size(self) -> int:
        return self._base.size

    @property
    def hash(self) -> str:
        return hashlib.sha256(f"{self._base.hash} {self._how}".encode()).hexdigest()

    def head(self) -> bytes:
        return self.read()[:64]

    def view(self) -> memoryview:
        return memoryview(self.read())

    def read(self) -> bytes:
        with self._lock:
            if not self.source:
                self.source, self.notes = self._make()
            assert isinstance(self.source, bytes)
            return self.source

    def verify(self) -> None:
        self._base.verify()


def find(path: Path, max_bytes: int) -> DiskFile:
    """The regular file at `path`. Raises ModelError for anything else, and when it is too large."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFound(
            f"There is no model at {path}.",
            "No such file exists." if path.parent.is_dir() else f"{path.parent} is no folder.",
            "Check the path; a relative one starts at the current folder.",
            path=path,
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ModelError(
            f"{path} is {kind}.",
            "A model is read from a regular file.",
            "Name the .onnx or .tflite file itself.",
            path=path,
        )
    if status.st_size == 0:
        raise ModelError(
            f"{path} is empty.",
            "Perhaps a download or an export was interrupted.",
            "Fetch or export the model again.",
            path=path,
        )
    if status.st_size > max_bytes:
        raise too_large(str(path), f"the file has {size_text(status.st_size)}", max_bytes, path)
    if not os.access(path, os.R_OK):
        raise _unreadable(path, PermissionError("permission denied"))
    return DiskFile.found(path, status)


def too_large(
    label: str, why: str, max_bytes: int, path: Path | None, **facts: object
) -> ModelError:
    """The error for a model, file or tensor over the limit."""
    return ModelError(
        f"{label} is larger than models may be.",
        f"The limit is {size_text(max_bytes)}, and {why}.",
        "If you trust the file, raise the limit with Model(..., max_bytes=...) or "
        "UNIRT_MAX_MODEL_BYTES.",
        path=path,
        max_bytes=max_bytes,
        **facts,
    )


def size_text(size: int) -> str:
    """Bytes for people: `1.2 MiB`."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{size} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"


def merged(regions: Sequence[Region]) -> tuple[Region, ...]:
    """The regions without overlaps, file by file in order of first mention.

    Thousands of tensors may name the same gigabyte; it is hashed once.
    """
    by_file: dict[DiskFile, list[tuple[int, int]]] = {}
    for region in regions:
        by_file.setdefault(region.file, []).append((region.start, region.stop))
    return tuple(
        Region(file, start, stop)
        for file, spans in by_file.items()
        for start, stop in _without_overlaps(spans)
    )


def _without_overlaps(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    spans.sort()
    start, stop = spans[0]
    for next_start, next_stop in spans[1:]:
        if next_start > stop:
            yield start, stop
            start = next_start
        stop = max(stop, next_stop)
    yield start, stop


def _region_sha256(region: Region) -> bytes:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    left = region.stop - region.start
    with region.file.open() as file:
        file.seek(region.start)
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                break  # Cut off meanwhile: the next line says so.
            digest.update(buffer[:count])
            left -= count
        region.file.verify(file)
    return digest.digest()


def _state(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_dev,
        status.st_ino,
        stat.S_IFMT(status.st_mode),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _unreadable(path: Path, error: Exception) -> ModelError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ModelError(
        f"{path} cannot be read.",
        f"The system says: {reason}.",
        "Check the path and its permissions.",
        path=path,
    )
