"""The model formats UniRT reads, and the checks a file passes before any engine sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from unirt.formats.content import Content, find, too_large
from unirt.formats.model_file import ModelFile, refusal

__all__ = ["DEFAULT_MAX_BYTES", "FORMATS", "ModelFile", "open_model_file"]

DEFAULT_MAX_BYTES: Final = 32 * 2**30

# Formats by name, which is also the ending that files usually have.
FORMATS: Final = ("onnx", "tflite")

_TFLITE_MARK: Final = b"TFL3"  # the file identifier, at byte 4

# Things that are given by mistake: how they start, what they are, what to do.
_STRANGERS: Final = (
    (b"version https://git-lfs", "a Git LFS pointer", "Run `git lfs pull` to fetch the model."),
    (b"PK\x03\x04", "a zip archive", "Unpack it, or export the checkpoint to ONNX or TFLite."),
    (b"\x1f\x8b", "gzip-compressed", "Unpack it with gunzip."),
    (b"\x89HDF", "an HDF5 file, perhaps of Keras", "Export it to ONNX or TFLite."),
    (b"\x80\x02", "a Python pickle", "Export the model to ONNX or TFLite."),
    (
        b"<",
        "HTML or XML",
        "If it was downloaded, look at it: the server may have sent an error page.",
    ),
    (b"{", "JSON", "Name the .onnx or .tflite file itself."),
    (b"ftrt", "a TensorRT engine", "Give the model it was built from."),
    (b"ptrt", "a TensorRT engine", "Give the model it was built from."),
)


def open_model_file(source: Path | bytes, max_bytes: int) -> ModelFile:
    """Opens and checks one file, or one model in memory; its content says of which format it is.

    Raises ModelError, ModelNotFound among them.
    """
    if isinstance(source, bytes):
        if len(source) > max_bytes:
            raise too_large("The model given as bytes", f"it has {len(source):,}", max_bytes, None)
        content = Content(source)
    else:
        content = Content(find(source.absolute(), max_bytes))
    head = content.head()
    refuse = refusal(content)
    if not head:
        raise refuse("is empty.", "There are no bytes in it.", "Fetch or export the model again.")
    tflite = head[4:8] == _TFLITE_MARK
    if head[4:8] == b"ORTM":
        raise refuse(
            "is in ONNX Runtime's own format.",
            "No other engine reads it.",
            "Give the .onnx file it was made from.",
        )
    for start, what, remedy in _STRANGERS:
        if head.lstrip().startswith(start) and not tflite:
            raise refuse("is not a model that UniRT reads.", f"It is {what}.", remedy)
    # A reader is imported with the first model of its format, not with the package.
    from unirt.formats import onnx_file, tflite_file

    read = tflite_file.read if tflite else onnx_file.read
    try:
        return read(content, max_bytes)
    except RecursionError as error:
        raise refuse(
            "is nested too deeply.",
            "Its graphs and functions stand in each other more levels deep than networks do.",
            "Export the model again without nested functions.",
        ) from error
