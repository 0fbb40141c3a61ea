"""What stands in a .tflite, and a copy of one that shows the tensors inside it."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from unirt import plugins
from unirt.backend import Backend
from unirt.data import Feed
from unirt.errors import BackendUnavailable, ModelError, OptionError, sentence
from unirt.formats.flatbuffer import FlatBuffer, FlatBufferError, Table
from unirt.formats.tflite_file import (
    TYPES,
    BufferFields,
    ModelFields,
    OperatorFields,
    SubGraphFields,
    TensorFields,
    operator_name,
)
from unirt.model import Model, ModelFile
from unirt.precision.names import check_names
from unirt.session import Session
from unirt.types import Array, Candidate

ENGINE: Final = "tflite"

PRODUCTS: Final = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"}
    | {"CONV_3D", "CONV_3D_TRANSPOSE"}
)
"""What quantization is for."""

_QUANTIZATION: Final = 4  # slot of a tensor
_SCALE: Final = 2  # slot of its quantization
_FLOAT_BYTES: Final = 4
_LARGEST: Final = 2**31 - 1  # where offsets within a file end


@dataclass(frozen=True)
class TFLiteTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    constant: bool
    scales: tuple[float, ...]
    buffer: int


@dataclass(frozen=True)
class TFLiteOperator:
    """`name` is that of its first output, since operators have none of their own."""

    kind: str
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class TFLiteGraph:
    """One subgraph of a file. Tensors that an operator leaves out have the index -1."""

    tensors: tuple[TFLiteTensor, ...]
    operators: tuple[TFLiteOperator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def computed(self) -> frozenset[int]:
        """The inputs, and the tensors that depend on them."""
        found = set(self.inputs)
        for operator in self.operators:
            if not found.isdisjoint(operator.inputs):
                found.update(operator.outputs)
        return frozenset(found)

    @property
    def quantized(self) -> TFLiteTensor | None:
        """The first tensor with a scale; None if the graph is in floating point."""
        return next((tensor for tensor in self.tensors if tensor.scales), None)


def tflite_file(model: Model) -> ModelFile:
    """Raises ModelError for a model without one."""
    file = model.file(["tflite"])
    if file is None:
        raise ModelError(
            f"{model.name} has no .tflite file.",
            f"LiteRT runs .tflite files only, and it has {', '.join(model.formats)}.",
            "Convert the network to TFLite, for example with onnx2tf or litert-torch.",
        )
    return file


def read_graphs(data: bytes, name: str) -> tuple[TFLiteGraph, ...]:
    """The subgraphs of a file that was opened as a Model before. Raises ModelError."""
    try:
        model = FlatBuffer(memoryview(data)).root()
        kinds = [operator_name(code) for code in model.tables(ModelFields.OPERATOR_CODES)]
        filled = [
            bool(buffer.length(BufferFields.DATA)) or buffer.scalar(BufferFields.OFFSET, "Q") > 1
            for buffer in model.tables(ModelFields.BUFFERS)
        ]
        return tuple(_graph(table, kinds, filled) for table in model.tables(ModelFields.SUBGRAPHS))
    except FlatBufferError as error:
        raise ModelError(
            f"{name} is damaged.", sentence(str(error)), "Fetch or convert the model again."
        ) from error


def _graph(table: Table, kinds: list[str], filled: list[bool]) -> TFLiteGraph:
    tensors = tuple(_tensor(one, filled) for one in table.tables(SubGraphFields.TENSORS))
    operators = []
    for operator in table.tables(SubGraphFields.OPERATORS):
        outputs = operator.ints(OperatorFields.OUTPUTS)
        first = next((index for index in outputs if index >= 0), None)
        name = "" if first is None else tensors[first].name
        kind = kinds[operator.scalar(OperatorFields.CODE, "I")]
        operators.append(TFLiteOperator(kind, name, operator.ints(OperatorFields.INPUTS), outputs))
    ends = table.ints(SubGraphFields.INPUTS), table.ints(SubGraphFields.OUTPUTS)
    return TFLiteGraph(tensors, tuple(operators), *ends)


def _tensor(table: Table, filled: list[bool]) -> TFLiteTensor:
    buffer = table.scalar(TensorFields.BUFFER, "I")
    return TFLiteTensor(
        table.text(TensorFields.NAME),
        TYPES[table.scalar(TensorFields.TYPE, "B")][0],
        table.ints(TensorFields.SHAPE),
        buffer < len(filled) and filled[buffer],
        _scales(table),
        buffer,
    )


def _scales(table: Table) -> tuple[float, ...]:
    at = table.field(_QUANTIZATION)
    if at is None:
        return ()
    bits = Table(table.buffer, table.buffer.offset(at)).ints(_SCALE)
    return struct.unpack(f"<{len(bits)}f", struct.pack(f"<{len(bits)}i", *bits))


def read_constant(data: bytes, tensor: TFLiteTensor) -> Array:
    """The values of a constant of 8 bits or more."""
    table = FlatBuffer(memoryview(data)).root().tables(ModelFields.BUFFERS)[tensor.buffer]
    start, size = table.scalar(BufferFields.OFFSET, "Q"), table.scalar(BufferFields.SIZE, "Q")
    if start <= 1:  # not behind the tables
        field = table.field(BufferFields.DATA)
        assert field is not None
        start, size = table.buffer.vector(table.buffer.offset(field), 1)
    return np.frombuffer(data[start : start + size], tensor.dtype)


def with_outputs(data: bytes, outputs: Collection[int]) -> bytes:
    """The file with other outputs of its main graph: their list is appended, and pointed to.

    Its signatures do not fit any more, so that outputs go by their tensors' names.
    """
    subgraph = FlatBuffer(memoryview(data)).root().tables(ModelFields.SUBGRAPHS)[0]
    field = subgraph.field(SubGraphFields.OUTPUTS)
    if field is None:
        raise ModelError("The model has no outputs.", "Its main graph lists none.")
    start = (len(data) + 3) // 4 * 4
    if start > _LARGEST:
        raise ModelError(
            "The .tflite file is too large to be calibrated.",
            f"It has {len(data):,} bytes, and offsets in it reach 2 GiB.",
            "Quantize its weights only, with int8-weights.",
        )
    copy = bytearray(data)
    copy += bytes(start - len(data))
    copy += struct.pack(f"<I{len(outputs)}i", len(outputs), *outputs)
    struct.pack_into("<I", copy, field, start - field)
    return bytes(copy)


@dataclass(frozen=True)
class WatchedTFLite:
    """As `Watched`: the names of what is observed, and which of it must be finite."""

    inputs: tuple[str, ...]
    inner: tuple[str, ...]
    strict: frozenset[str]
    notes: tuple[str, ...]


class TFLiteWatcher:
    """Runs a .tflite on LiteRT and shows its tensors, as many at a time as memory allows.

    As `Watcher`, with copies of the file that have the watched tensors for outputs. Their sizes are
    those that the file declares, in proportion to the inputs.
    """

    def __init__(
        self, model: Model, wanted: Collection[str] | None, engine: str | None, memory: int
    ) -> None:
        """Raises ModelError, OptionError, BackendUnavailable."""
        self._name, self._memory = model.name, memory
        file = tflite_file(model)
        self.hash = file.hash
        self._data = file.read()
        self._graph = read_graphs(self._data, model.name)[0]
        refuse_quantized(self._graph, model.name, "Calibrate")
        tensors = self._graph.tensors
        self.tensors = frozenset(tensor.name for tensor in tensors if tensor.name)
        # Inputs of a file stand in the order of its graph, by whatever name a signature calls them.
        ours = {their: our for our, their in model.input_names(file).items()}
        self._inputs = [ours[spec.name] for spec in file.inputs]
        self.watched, self._index = _watched(self._graph, self.tensors, wanted, model.name)
        self._backend = litert(engine)
        self.engine = f"{ENGINE}@cpu"
        self._declared = max(1, sum(prod(tensors[i].shape) for i in self._graph.inputs))
        self._scale = 0.0
        self._groups: list[tuple[tuple[str, ...], Session]] = []
        self._open_groups = ExitStack()
        self.groups = 0

    def show(self, feed: Feed) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Each watched tensor of one call, in the order of the graph; arrays are not kept."""
        values = [feed[name] for name in self._inputs]
        for index, value in zip(self._graph.inputs, values, strict=True):
            name = self._graph.tensors[index].name
            if name in self.watched.inputs:
                yield name, value
        if not self.watched.inner:
            return
        self._make_room(sum(np.size(value) for value in values) / self._declared)
        for names, session in self._groups:
            given = (spec.name for spec in session.engine.inputs)
            shown = dict(session.run(dict(zip(given, values, strict=True))))
            for name in names:
                yield name, shown.pop(name)

    def close(self) -> None:
        self._open_groups.close()

    def _make_room(self, scale: float) -> None:
        if scale <= self._scale:
            return
        self._scale = scale
        self._open_groups.close()
        self._groups = []
        group: list[str] = []
        size = 0.0
        for name in self.watched.inner:
            shape = self._graph.tensors[self._index[name]].shape
            needed = _FLOAT_BYTES * prod(shape) * scale
            if group and size + needed > self._memory:
                self._open(group)
                group, size = [], 0.0
            group.append(name)
            size += needed
        self._open(group)
        self.groups = max(self.groups, len(self._groups))

    def _open(self, names: list[str]) -> None:
        data = with_outputs(self._data, [self._index[name] for name in names])
        compiled = self._backend.compile(Model(data, name=self._name), "cpu")
        session = self._open_groups.enter_context(
            self._open_groups.enter_context(compiled).session()
        )
        self._groups.append((tuple(names), session))


def _watched(
    graph: TFLiteGraph, known: Collection[str], wanted: Collection[str] | None, name: str
) -> tuple[WatchedTFLite, Mapping[str, int]]:
    """What to observe of a graph, and the index of each such tensor by its name."""
    tensors, computed = graph.tensors, graph.computed()
    times = Counter(tensor.name for tensor in tensors)
    floats = [
        index
        for index, tensor in enumerate(tensors)
        if index in computed and tensor.dtype == "float32" and not tensor.constant
    ]
    notes = []
    nameless = [
        index for index in floats if not tensors[index].name or times[tensors[index].name] > 1
    ]
    if nameless:
        notes.append(
            f"{len(nameless)} tensors have no name of their own, the first of them "
            f"{tensors[nameless[0]].name!r}: not watched, without a range."
        )
    index = {tensors[i].name: i for i in floats if i not in nameless}
    strict = {tensors[i].name for i in (*graph.inputs, *graph.outputs)}
    for operator in graph.operators:
        if operator.kind in PRODUCTS:
            strict.update(tensors[i].name for i in operator.inputs if i >= 0)
    if wanted is not None:
        wanted = {wanted} if isinstance(wanted, str) else set(wanted)
        check_names(wanted, known)
        if other := sorted(wanted - index.keys()):
            raise OptionError(
                f"The tensor {other[0]!r} cannot be calibrated.",
                "It is constant, does not hold float32, or shares its name with another.",
                "Name float32 tensors that depend on the inputs.",
                name=other[0],
            )
        index = {one: i for one, i in index.items() if one in wanted}
        strict, notes = strict | wanted, []
    if not index:
        raise ModelError(
            f"There is nothing to calibrate in {name}.",
            "No float32 tensor that was asked for depends on its inputs.",
            "Give the float32 network; leave `tensors` out to watch all of it.",
        )
    order = {
        i: position
        for position, i in enumerate(i for operator in graph.operators for i in operator.outputs)
    }
    inputs = tuple(one for one, i in index.items() if i in graph.inputs)
    inner = sorted((one for one in index if one not in inputs), key=lambda one: order[index[one]])
    return WatchedTFLite(inputs, tuple(inner), frozenset(strict), tuple(notes)), index


def refuse_quantized(graph: TFLiteGraph, name: str, verb: str) -> None:
    """Raises ModelError."""
    tensor = graph.quantized
    if tensor is not None:
        raise ModelError(
            f"{name} is quantized already.",
            f"Its tensor {tensor.name!r}, for one, holds {tensor.dtype} with a scale.",
            f"{verb} the float32 .tflite that it was made from.",
            tensor=tensor.name,
        )


def litert(engine: str | None = None) -> Backend:
    """The backend that runs .tflite files.

    Raises CandidateError, OptionError, BackendUnavailable.
    """
    if engine is not None:
        candidate = Candidate.parse(engine)
        if candidate.backend != ENGINE or candidate.precision is not None:
            raise OptionError(
                f"A .tflite cannot be calibrated on {engine}.",
                "What runs it is LiteRT, on the CPU, and it observes the float32 graph as it is.",
                f"Leave `engine` out, or name {ENGINE!r}.",
                engine=engine,
            )
    plugin = plugins.plugin(ENGINE)
    if plugin is None or plugin.backend is None or not plugin.availability.available:
        reason = "no plugin brings it" if plugin is None else plugin.availability.reason
        raise BackendUnavailable(
            "LiteRT, which runs .tflite files, is not here.",
            sentence(reason),
            "pip install 'unirt[tflite]'",
            backend=ENGINE,
        )
    return plugin.backend
