"""Files are replaced whole or not at all."""

from __future__ import annotations

import secrets
from pathlib import Path

from unirt.errors import DataError


def save_whole(path: Path, data: bytes, what: str, remedy: str) -> None:
    """Replaces what is there. Raises DataError where it cannot be written: `what` begins its
    sentence, `remedy` is its last.
    """
    # A symbolic link stays one.
    target = path.resolve()
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            with part.open("xb") as file:
                file.write(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{what} cannot be saved to {path}.",
            f"{error.strerror or error}.",
            remedy,
            path=path,
        ) from error
