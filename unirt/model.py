"""A network in one or more formats, opened, checked and described without any engine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias

from unirt.errors import ModelError, OptionError
from unirt.formats import DEFAULT_MAX_BYTES, FORMATS, ModelFile, open_model_file
from unirt.formats.content import Derived, size_text
from unirt.types import Dim, TensorSpec

__all__ = ["DEFAULT_MAX_BYTES", "Model", "ModelFile", "ModelSource"]

LIMIT_VARIABLE: Final = "UNIRT_MAX_MODEL_BYTES"


class Serializable(Protocol):
    """An `onnx.ModelProto`, without importing onnx."""

    def SerializeToString(self) -> bytes: ...


ModelSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Serializable"


class Model:
    """One network in one or more formats. Cheap to open: loads no engine and no weights.

    Opening checks every file, so that what is damaged, hostile or over the limit raises ModelError
    before an engine sees it. The first format given is the primary one: its names are those that
    callers use for inputs and outputs, whichever format an engine takes. Immutable and thread-safe.
    """

    def __init__(
        self,
        source: ModelSource | None = None,
        *,
        onnx: ModelSource | None = None,
        tflite: ModelSource | None = None,
        beside: bool = False,
        name: str = "",
        max_bytes: int | None = None,
    ) -> None:
        """Opens paths, bytes or `onnx.ModelProto`s; `source` may be of any format.

        `beside` also takes files of other formats with the same name in the same folder. `name` is
        what messages call it (default: the file's name without its ending, or `model`).
        `max_bytes` bounds each model's files and what its tensors declare (default:
        UNIRT_MAX_MODEL_BYTES, or 32 GiB).
        """
        limit = _limit(max_bytes)
        files: dict[str, ModelFile] = {}
        for wanted, given in ((None, source), ("onnx", onnx), ("tflite", tflite)):
            if given is not None:
                _add(files, open_model_file(_source(given), limit), wanted)
        if not files:
            raise ModelError(
                "No model was given.",
                "Model() takes a path, bytes or an onnx.ModelProto.",
                'Write for example Model("model.onnx").',
            )
        self._files: Mapping[str, ModelFile] = MappingProxyType(files)
        self._primary = next(iter(files.values()))
        self._name = name or (self.path.stem if self.path else "model")
        if beside and self.path is not None:
            for wanted in FORMATS:
                path = self.path.with_suffix(f".{wanted}")
                if wanted not in files and path.exists():
                    _add(files, open_model_file(path, limit), wanted)
        self._input_names = {
            f: _matched(self._primary, file, "inputs") for f, file in files.items()
        }
        self._output_names = {
            f: _matched(self._primary, file, "outputs") for f, file in files.items()
        }

    @classmethod
    def derived(
        cls,
        file: ModelFile,
        make: Callable[[], tuple[bytes, tuple[str, ...]]],
        how: str,
        name: str,
    ) -> Model:
        """A model that `make` makes of `file` when somebody reads it: a transform that keeps names,
        shapes and types of inputs and outputs, and gives bytes and notes on them. `how` names the
        transform in the hash.
        """
        model = cls.__new__(cls)
        file = replace(file, content=Derived(file.content, make, how))
        model._files = MappingProxyType({file.format: file})
        model._primary, model._name = file, name
        model._input_names = {file.format: _matched(file, file, "inputs")}
        model._output_names = {file.format: _matched(file, file, "outputs")}
        return model

    @classmethod
    def open(cls, model: Model | ModelSource) -> Model:
        """The model itself, or the one opened from a path, bytes or `onnx.ModelProto`."""
        return model if isinstance(model, Model) else cls(model)

    @property
    def formats(self) -> Mapping[str, ModelFile]:
        """Its files by format, the primary one first."""
        return self._files

    @property
    def primary(self) -> ModelFile:
        return self._primary

    @property
    def path(self) -> Path | None:
        return self._primary.path

    @property
    def name(self) -> str:
        return self._name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._primary.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._primary.outputs

    @property
    def size(self) -> int:
        return self._primary.size

    @property
    def parameters(self) -> int:
        return self._primary.parameters

    @property
    def opset(self) -> Mapping[str, int]:
        return self._primary.opset

    @property
    def hash(self) -> str:
        """Hex SHA-256 over all bytes of all formats; with one format, the hash of its file."""
        if len(self._files) == 1:
            return self._primary.hash
        lines = sorted(f"{format_}:{file.hash}\n" for format_, file in self._files.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def file(self, formats: Sequence[str]) -> ModelFile | None:
        """The first of the formats, in an engine's order of preference, that this model has."""
        return next((self._files[name] for name in formats if name in self._files), None)

    def input_names(self, file: ModelFile) -> Mapping[str, str]:
        """The model's input names -> those of the same inputs in `file`."""
        return self._input_names[file.format]

    def output_names(self, file: ModelFile) -> Mapping[str, str]:
        """The model's output names -> those of the same outputs in `file`."""
        return self._output_names[file.format]

    def __repr__(self) -> str:
        formats = "+".join(self._files)
        return f"<unirt.Model {self.name!r} {formats} {self.parameters:,} parameters>"

    def __str__(self) -> str:
        size = size_text(self.size)
        lines = [f"{self.name} ({' + '.join(self._files)}, {self.parameters:,} parameters, {size})"]
        lines += [f"  in   {spec}" for spec in self.inputs]
        lines += [f"  out  {spec}" for spec in self.outputs]
        return "\n".join(lines)


def _limit(max_bytes: int | None) -> int:
    given: object = max_bytes
    name = "max_bytes"
    if given is None:
        given, name = os.environ.get(LIMIT_VARIABLE) or DEFAULT_MAX_BYTES, LIMIT_VARIABLE
    try:
        limit = int(str(given))
    except ValueError:
        limit = 0
    if limit <= 0:
        raise OptionError(
            f"{name} is {given!r}.",
            "It is the number of bytes that a model may have.",
            f"Give a positive whole number, for example {DEFAULT_MAX_BYTES}.",
        )
    return limit


def _source(given: ModelSource) -> Path | bytes:
    if isinstance(given, bytes):
        return given
    if isinstance(given, bytearray | memoryview):
        return bytes(given)
    if isinstance(given, str | os.PathLike):
        return Path(given)
    serialize = getattr(given, "SerializeToString", None)
    if serialize is None:
        raise ModelError(
            f"A {type(given).__name__} is no model.",
            "Models are opened from a path, from bytes or from an onnx.ModelProto.",
            "Save or export it to an .onnx or .tflite file first.",
        )
    try:
        return bytes(serialize())
    except Exception as error:  # protobuf has its own, for example beyond 2 GiB
        raise ModelError(
            f"The {type(given).__name__} cannot be serialized.",
            f"It says: {error}.",
            "Save it with external data, and open the file.",
        ) from error


def _add(files: dict[str, ModelFile], file: ModelFile, wanted: str | None) -> None:
    label = file.path or "The model given as bytes"
    if wanted not in (None, file.format):
        raise ModelError(
            f"{label} is not in the format {wanted}.",
            f"Its content is {file.format}.",
            f"Give it as {file.format}=..., or without naming a format.",
            path=file.path,
        )
    if file.format in files:
        raise ModelError(
            f"{label} is a second {file.format} model.",
            "A Model holds one network, in each format once.",
            "Open the two as two Models.",
            path=file.path,
        )
    files[file.format] = file


def _matched(primary: ModelFile, other: ModelFile, what: str) -> Mapping[str, str]:
    """The primary's names -> the other's: by name where the same names stand, else by position."""
    ours: tuple[TensorSpec, ...] = getattr(primary, what)
    theirs: tuple[TensorSpec, ...] = getattr(other, what)
    if len(ours) != len(theirs):
        raise _disagreement(
            primary,
            other,
            f"{primary.format} has {len(ours)} {what} and {other.format} has {len(theirs)}",
        )
    by_name = {spec.name: spec for spec in theirs}
    if by_name.keys() == {spec.name for spec in ours}:
        theirs = tuple(by_name[spec.name] for spec in ours)
    elif twins := _exchangeable(ours, what):
        raise _disagreement(
            primary,
            other,
            f"the {what} are named differently ({', '.join(by_name)}), and "
            f"{' and '.join(map(repr, twins))} could be taken for each other",
            tensor=twins[0],
        )
    for our, their in zip(ours, theirs, strict=True):
        # TFLite files may declare wrong output shapes; engines find the right ones.
        agree = what == "outputs" or _shapes_agree(our.shape, their.shape)
        if not agree or not _dtypes_agree(our.dtype, their.dtype):
            raise _disagreement(
                primary,
                other,
                f"of the {what}, {primary.format} has {our} and {other.format} has {their}",
                tensor=our.name,
            )
    return MappingProxyType({our.name: their.name for our, their in zip(ours, theirs, strict=True)})


def _exchangeable(specs: tuple[TensorSpec, ...], what: str) -> tuple[str, str] | None:
    """Two tensors that only a name could tell apart: by position they might be swapped unseen."""
    for one, other in combinations(specs, 2):
        alike = what == "outputs" or _shapes_agree(one.shape, other.shape)
        if alike and _dtypes_agree(one.dtype, other.dtype):
            return one.name, other.name
    return None


def _dtypes_agree(ours: str, theirs: str) -> bool:
    return ours == theirs or "undefined" in (ours, theirs)


def _shapes_agree(ours: tuple[Dim, ...] | None, theirs: tuple[Dim, ...] | None) -> bool:
    if ours is None or theirs is None:
        return True
    return len(ours) == len(theirs) and all(
        our == their
        for our, their in zip(ours, theirs, strict=True)
        if isinstance(our, int) and isinstance(their, int)
    )


def _disagreement(primary: ModelFile, other: ModelFile, why: str, **facts: object) -> ModelError:
    return ModelError(
        f"The {primary.format} and {other.format} files are not the same network.",
        f"To run either for the other their inputs and outputs must agree, but {why}.",
        "Convert one from the other and keep names, types and layout.",
        path=other.path,
        formats=(primary.format, other.format),
        **facts,
    )
