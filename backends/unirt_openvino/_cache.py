"""OpenVINO's compiled blobs on disk, trusted only while they are what was written.

OpenVINO loads a blob with a flipped byte and answers wrongly (3 of 14 tried, 2026.4.1), so a
digest of each stands beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path

log = logging.getLogger("unirt.openvino")

INDEX = "sha256.json"


def discard_damaged(folder: Path) -> None:
    """Deletes every blob that is not as `record` found it; OpenVINO then compiles anew."""
    try:
        known = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        known = {}
    for blob in _blobs(folder):
        if not isinstance(known, dict) or known.get(blob.name) != _digest(blob):
            log.warning("%s is damaged or unknown: it is compiled again", blob)
            blob.unlink(missing_ok=True)


def record(folder: Path) -> None:
    """Writes down the digests of what a compilation left here."""
    known = {blob.name: _digest(blob) for blob in _blobs(folder)}
    with contextlib.suppress(OSError):  # a read-only cache is used for what it holds
        fresh = folder / f"{INDEX}.{os.getpid()}"
        fresh.write_text(json.dumps(known))
        fresh.replace(folder / INDEX)


def _blobs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(INDEX)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
