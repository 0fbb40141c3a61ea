"""The installed TensorRT, whichever flavour it is, and the one logger that a process may have."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

log = logging.getLogger("unirt.tensorrt")

FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""Modules with the same interface, the one that is tried first in front."""

TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
# What TensorRT says to a machine without a GPU, where nothing is wrong.
_NOISE = ("cudaError 35", "cudaError 100", "CUDA initialization failure with error: 35")
_LEVELS = {0: "internal error", 1: "error", 2: "warning", 3: "info", 4: "verbose"}
ERROR, WARNING, INFO, VERBOSE = 1, 2, 3, 4


@dataclass(frozen=True)
class Message:
    """One line of TensorRT's log. `severity` counts from 0, an internal error, to 4, verbose."""

    severity: int
    text: str


@dataclass(frozen=True)
class Library:
    """One flavour: its module, and what tells it from the others.

    10.x, 11.x and RTX share an interface with members missing here and there; code asks for the
    member (`hasattr`), and for `is_rtx` only where the same member means something else.
    """

    module: Any
    flavour: str
    version: str
    logger: Any

    @property
    def is_rtx(self) -> bool:
        return self.flavour == "tensorrt_rtx"

    @property
    def rounds_floats(self) -> bool:
        """Whether float32 products are rounded to TF32 whatever a build asks: RTX heeds only what
        the environment said when it was loaded.
        """
        return self.is_rtx and os.environ.get(TF32_OVERRIDE) != "0"

    @contextmanager
    def capture(self) -> Iterator[list[Message]]:
        """Everything this thread has TensorRT log meanwhile; without it, the log stays quiet but
        for warnings, on `unirt.tensorrt`.
        """
        messages: list[Message] = []
        stack = _captures.__dict__.setdefault("stack", [])
        stack.append(messages)
        try:
            yield messages
        finally:
            stack.remove(messages)


_captures = threading.local()


@cache
def load() -> Library:
    """The first flavour that is installed, or the one in UNIRT_TENSORRT.

    Raises ModuleNotFoundError where none is, and what importing a broken one raises.
    """
    wanted = os.environ.get("UNIRT_TENSORRT", "")
    names = (wanted,) if wanted in FLAVOURS else FLAVOURS
    for name in names:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        if name == "tensorrt_rtx":
            # RTX heeds no build flag for TF32, only this variable, and reads it once. With TF32 its
            # float32 convolutions were wrong in the first digit on an H200 (docs/tensorrt.md).
            os.environ.setdefault(TF32_OVERRIDE, "0")
        return Library(module, name, module.__version__, _logger(module))
    told = " and ".join(names)
    raise ModuleNotFoundError(f"no package {told} is installed here", name=names[0])


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc] # the base comes with the library
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            message = Message(int(severity), text)
            stack = getattr(_captures, "stack", None)
            if stack:
                stack[-1].append(message)
            elif message.severity <= WARNING and not is_noise(message):
                log.warning("%s: %s", _LEVELS[message.severity], text)

    return Logger()


def is_noise(message: Message) -> bool:
    return any(part in message.text for part in _NOISE)
