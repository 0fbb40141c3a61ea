"""Finds the external data of ONNX models, and lets none be read from where it has no business.

A location is trusted only if it is a plain relative path to a regular file with one name, inside
the model's folder and reached through no link. Else a downloaded model could make an engine read,
and through its outputs give away, any file of this machine.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from unirt.formats.content import DiskFile, Refusal, Region, size_text
from unirt.formats.onnx_proto import StringStringEntry

_DRIVE: Final = re.compile(r"[A-Za-z]:")


class ExternalData:
    """Collects the regions that a model's tensors name; each is checked as it is added."""

    def __init__(self, path: Path | None, refuse: Refusal) -> None:
        self.regions: list[Region] = []
        self._folder = path.parent if path else None
        self._refuse = refuse
        self._files: dict[str, DiskFile] = {}

    def add(self, tensor: str, entries: Sequence[StringStringEntry], nbytes: int) -> None:
        """Checks and notes where the `nbytes` of `tensor` lie. Raises ModelError."""
        facts = {entry.key: entry.value for entry in entries}
        location = facts.get("location", "")
        file = self._files.get(location)
        if file is None:
            file = self._files[location] = self._find(tensor, location)
        offset = self._number(tensor, location, facts, "offset") or 0
        length = self._number(tensor, location, facts, "length") or nbytes
        if length != nbytes:
            raise self._refuse(
                f"has {length:,} bytes of external data for tensor {tensor!r}.",
                f"Its shape and type need {nbytes:,}.",
                "Export the model again.",
                tensor=tensor,
                location=location,
            )
        if offset + nbytes > file.size:
            raise self._refuse(
                f"has external data for tensor {tensor!r} beyond the end of {location!r}.",
                f"It should end at byte {offset + nbytes:,}, and the file has {file.size:,} bytes.",
                "Fetch or export both files again; one of them is incomplete or another version.",
                tensor=tensor,
                location=location,
            )
        self.regions.append(Region(file, offset, offset + nbytes))

    def _number(self, tensor: str, location: str, facts: dict[str, str], key: str) -> int | None:
        text = facts.get(key)
        if text is None:
            return None
        if not re.fullmatch("[0-9]{1,19}", text):
            raise self._refuse(
                f"has external data with {key} {text[:40]!r} for tensor {tensor!r}.",
                f"The {key} must be a count of bytes.",
                "Export the model again.",
                tensor=tensor,
                location=location,
            )
        return int(text)

    def _find(self, tensor: str, location: str) -> DiskFile:
        def refuse(why: str, remedy: str) -> Exception:
            return self._refuse(
                f"keeps tensor {tensor!r} in the external file {location!r}.",
                why,
                remedy,
                tensor=tensor,
                location=location,
            )

        inside = "Put the file into the model's folder and name it there by a plain relative path."
        if self._folder is None:
            raise refuse(
                "A model opened from bytes has no folder in which that file could be.",
                "Open the model by its path, or save it with its weights inside.",
            )
        parts = location.split("/")
        if not location or "\0" in location or len(location) > 4096:
            raise refuse("That is no path.", inside)
        if location.startswith("/") or _DRIVE.match(location):
            raise refuse("That path is absolute, and may point outside the model's folder.", inside)
        if "\\" in location:
            raise refuse(
                "A backslash means a folder on some systems, and a name on others.", inside
            )
        if ".." in parts:
            raise refuse("With '..' that path may leave the model's folder.", inside)
        path = self._folder
        for index, part in enumerate(parts):
            if part in ("", "."):
                continue
            path = path / part
            try:
                status = os.lstat(path)
            except OSError as error:
                raise refuse(
                    f"{path} cannot be found ({error.strerror}).",
                    "Fetch the file that belongs to the model, and keep both together.",
                ) from error
            if stat.S_ISLNK(status.st_mode):
                raise refuse(
                    f"{path} is a symbolic link, which may point anywhere.",
                    "Put a copy of the file in its place.",
                )
            if index < len(parts) - 1 and not stat.S_ISDIR(status.st_mode):
                raise refuse(f"{path} is no folder.", inside)
        if path == self._folder or not stat.S_ISREG(status.st_mode):
            raise refuse(f"{path} is not a regular file.", inside)
        if status.st_nlink > 1:
            raise refuse(
                f"{path} is a hard link: the same file has another name elsewhere.",
                "Put a copy of the file in its place.",
            )
        if not os.access(path, os.R_OK):
            raise refuse(f"{path} may not be read.", "Check its permissions.")
        return DiskFile.found(path, status)

    def check_total(self, own: int, max_bytes: int) -> None:
        """Raises ModelError if the files together, sparse or not, are over the limit."""
        total = own + sum(file.size for file in set(self._files.values()))
        if total > max_bytes:
            raise self._refuse(
                "is larger than models may be.",
                f"The limit is {size_text(max_bytes)}, and with its external data the model has "
                f"{size_text(total)}.",
                "If you trust the files, raise the limit with Model(..., max_bytes=...) or "
                "UNIRT_MAX_MODEL_BYTES.",
                max_bytes=max_bytes,
            )
