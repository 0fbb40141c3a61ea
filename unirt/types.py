"""The small values everything else speaks in: tensors, devices, candidates, availability."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from unirt.errors import CandidateError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"
Dim: TypeAlias = int | str | None

# Types NumPy lacks; ml_dtypes, which every package that meets them brings, names them so.
EXTENDED_DTYPES = frozenset(
    {
        "bfloat16",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn",
        "float6_e2m3fn",
        "float6_e3m2fn",
        "int4",
        "uint4",
        "int2",
        "uint2",
    }
)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype for a dtype name; `string` is object, extended types come from ml_dtypes.

    Raises ImportError where the name needs ml_dtypes and that is not installed.
    """
    if name == "string":
        return np.dtype(object)
    if name not in EXTENDED_DTYPES:
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one input or output.

    `dtype` is a name such as `float32`, `bfloat16`, `int4` or `string`. In `shape` an int is a
    static size, a str a symbol (equal symbols mean equal sizes), None an unknown size; a `shape` of
    None means that the rank itself is unknown. `kind` is `tensor` for all but ONNX's rarer values.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None
    kind: Literal["tensor", "sequence", "optional", "map", "sparse"] = "tensor"

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return numpy_dtype(self.dtype)

    @property
    def is_static(self) -> bool:
        return self.shape is not None and all(isinstance(size, int) for size in self.shape)

    def shape_text(self) -> str:
        if self.shape is None:
            return "[?rank]"
        return "[" + ", ".join("?" if size is None else str(size) for size in self.shape) + "]"

    def __str__(self) -> str:
        kind = "" if self.kind == "tensor" else f"{self.kind} of "
        return f"{self.name}: {kind}{self.dtype} {self.shape_text()}"


@dataclass(frozen=True)
class Device:
    """A piece of hardware of this machine.

    `kind` is `cpu`, `cuda`, `gpu` (OpenCL or other), `npu` or what a plugin calls its own; `index`
    counts devices of a kind from 0 and is None for the CPU. `memory_bytes` is what a process may
    use, container limits included; None where nobody tells. `facts` holds JSON-able details.
    """

    kind: str
    index: int | None = None
    name: str = ""
    memory_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

    def answers_to(self, wanted: str) -> bool:
        """Whether `wanted` (`cuda`, `cuda:0`) names this device; a bare kind means index 0."""
        return wanted == str(self) or (wanted == self.kind and self.index in (None, 0))


CPU = Device("cpu")

_CANDIDATE = re.compile(
    r"(?P<backend>[a-z][a-z0-9_-]*)"
    r"(?:@(?P<device>[a-z][a-z0-9_]*(?::[0-9]+)?))?"
    r"(?::(?P<precision>[a-z][a-z0-9_]*))?"
)


@dataclass(frozen=True)
class Candidate:
    """One way to run a model, written `backend[@device][:precision]`.

    No device means the backend's first one here; no precision means: as the graph says.
    """

    backend: str
    device: str | None = None
    precision: str | None = None

    @classmethod
    def parse(cls, text: str | Candidate) -> Candidate:
        """Reads `tensorrt@cuda:0:fp16` and the like. Raises CandidateError."""
        if isinstance(text, Candidate):
            return text
        match = _CANDIDATE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise CandidateError(
                f"{text!r} is not a candidate.",
                "A candidate is written backend[@device][:precision] in lower case, and a "
                "precision starts with a letter.",
                "Write for example onnxruntime, openvino@cpu or tensorrt@cuda:0:fp16.",
                text=text,
            )
        return cls(match["backend"], match["device"], match["precision"])

    def __str__(self) -> str:
        device = f"@{self.device}" if self.device else ""
        precision = f":{self.precision}" if self.precision else ""
        return f"{self.backend}{device}{precision}"


@dataclass(frozen=True)
class Availability:
    """What a backend found when it looked: usable or not, and why.

    `devices` are those it can run on here, its default first. `missing` maps a device kind it could
    serve, but not here, to the reason. `reason` and `hint` (a command or a page) explain a no.
    `targets` are what it can compile for although nothing of the kind runs here; such an engine can
    be inspected and saved, and opens no session.
    """

    available: bool
    version: str = ""
    devices: tuple[Device, ...] = ()
    reason: str = ""
    hint: str = ""
    missing: Mapping[str, str] = field(default_factory=dict, hash=False)
    targets: tuple[Device, ...] = ()

    @classmethod
    def yes(
        cls,
        version: str,
        *devices: Device,
        missing: Mapping[str, str] | None = None,
        targets: tuple[Device, ...] = (),
    ) -> Availability:
        return cls(True, version, devices or (CPU,), missing=missing or {}, targets=targets)

    @classmethod
    def no(
        cls, reason: str, hint: str = "", *, version: str = "", targets: tuple[Device, ...] = ()
    ) -> Availability:
        return cls(False, version, reason=reason, hint=hint, targets=targets)

    def find(self, device: str | None) -> Device | None:
        """The device that `device` names, the default one for None, or None if it is not here."""
        if device is None:
            return self.devices[0] if self.devices else None
        return next((have for have in self.devices if have.answers_to(device)), None)

    def target(self, device: str | None) -> Device | None:
        """The device to compile for that `device` names: one that is here, or one of `targets`."""
        if device is not None:
            for have in self.targets:
                if have.answers_to(device):
                    return have
        return self.find(device) if self.available else None
