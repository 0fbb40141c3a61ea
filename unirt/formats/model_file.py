"""One network in one format: what every reader of a format hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from unirt.errors import ModelError
from unirt.formats.content import Content, Refusal, size_text
from unirt.types import TensorSpec


def frozen(mapping: Mapping[str, int] | None = None) -> Mapping[str, int]:
    return MappingProxyType(dict(mapping or {}))


@dataclass(frozen=True, eq=False, repr=False)
class ModelFile:
    """One network in one format, checked. Immutable and thread-safe; holds no file open.

    `inputs` and `outputs` keep the order of the file. An output whose type only the engine knows
    has dtype `undefined`. `op_counts`, `parameters` and `weight_dtypes` (dtype -> elements) include
    nested graphs and functions; weights are counted, not constants written into nodes. `opset` maps
    domain to version. `stateful` networks carry values from one run to the next. With
    `has_float_islands` a product with float32 weights stands in the middle of quantized tensors.
    """

    format: str
    content: Content
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    op_counts: Mapping[str, int] = field(default_factory=frozen)
    weight_dtypes: Mapping[str, int] = field(default_factory=frozen)
    opset: Mapping[str, int] = field(default_factory=frozen)
    ir_version: int | None = None
    producer: str = ""
    stateful: bool = False
    has_float_islands: bool = False

    @property
    def path(self) -> Path | None:
        """Where the file is; None for a model opened from bytes."""
        return self.content.path

    @property
    def external(self) -> tuple[Path, ...]:
        """The other files that hold weights of this one."""
        return tuple(file.path for file in self.content.external)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the transform that made this file has to say; empty until the file was read."""
        return self.content.notes

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return self.content.size

    @property
    def parameters(self) -> int:
        return sum(self.weight_dtypes.values())

    @property
    def hash(self) -> str:
        """Hex SHA-256 over every byte that decides the answer; the same wherever the files lie.

        Computed when first asked for. Raises ModelError if a file changed since it was opened.
        """
        return self.content.hash

    def read(self) -> bytes:
        """The bytes of the model file. Raises ModelError if it changed since it was opened."""
        return self.content.read()

    def verify(self) -> None:
        """Raises ModelError if any of its files changed on disk since it was opened."""
        self.content.verify()

    def __repr__(self) -> str:
        return f"<unirt.ModelFile {self.format} {self.path or 'from bytes'} {size_text(self.size)}>"


def refusal(content: Content) -> Refusal:
    """Makes errors that begin with the model's name, by `refuse("has no graph.", why, remedy)`."""
    label = str(content.path) if content.path else "The model given as bytes"

    def refuse(what: str, why: str, remedy: str, **facts: object) -> ModelError:
        return ModelError(f"{label} {what}", why, remedy, path=content.path, **facts)

    return refuse
