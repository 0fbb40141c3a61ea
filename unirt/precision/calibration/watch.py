"""A copy of a network that shows the tensors inside it, run by one of UniRT's engines."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unirt.backend import Backend
from unirt.data import Feed
from unirt.errors import ModelError, OptionError
from unirt.model import Model, ModelFile
from unirt.precision.engines import first_engine, named_engine
from unirt.precision.graph import (
    FLOAT,
    all_nodes,
    captured,
    main_names,
    name_nodes,
    tensor_names,
)
from unirt.precision.names import check_names
from unirt.precision.opset import check_opset
from unirt.precision.prepare import check_node_names
from unirt.precision.source import find_onnx, read_graph, tensor_types
from unirt.session import Session

if TYPE_CHECKING:
    import onnx

ENGINES: Final = ("onnxruntime", "openvino", "reference")
"""Those that compute a whole graph in float32 on any CPU, the fastest first."""

COMPUTING: Final = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""What quantization is for."""

_LIMIT: Final = 2**31 - 1 - 2**24  # bytes of one protobuf message, less those of the graph itself
_HALVES: Final = frozenset({10, 16})  # onnx.TensorProto.FLOAT16 and BFLOAT16
_FLOAT_BYTES: Final = 4
_INT64: Final = 7  # onnx.TensorProto.INT64


def onnx_file(model: Model) -> ModelFile:
    return find_onnx(model, "calibrated")


@dataclass(frozen=True)
class Watched:
    """Which tensors of a main graph are watched, in its order: of its inputs, inside it, and what
    weights alone make.

    `strict` ones must not hold infinities: what computing nodes read, inputs and outputs of the
    whole, what the caller named. In others -inf says that something is masked.
    """

    inputs: tuple[str, ...]
    inner: tuple[str, ...]
    folded: tuple[str, ...]
    strict: frozenset[str]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, proto: onnx.ModelProto, name: str, wanted: Collection[str] | None) -> Watched:
        """Every float32 tensor that depends on inputs, or the wanted ones of them.

        Raises ModelError for a graph that is quantized, too old for it, computes in half precision
        or has no such tensor, OptionError for a wanted name that is none of them.
        """
        graph = proto.graph
        check_opset(proto, name)
        check_node_names(graph)
        _refuse_quantized(proto, name)
        types = tensor_types(proto, name)
        _refuse_halves(graph, types, name)
        constant = _constants(graph)
        inputs, inner = _variable(graph, constant)
        notes = []
        if unknown := [output for output in inner if output not in types]:
            notes.append(
                f"ONNX does not tell the type of {_listed(unknown)}: not watched, without a range."
            )
        strict = _strict(graph, (*graph.input, *graph.output))
        floats = {tensor for tensor in (*inputs, *inner) if types.get(tensor) == FLOAT}
        if wanted is not None:
            wanted = {wanted} if isinstance(wanted, str) else set(wanted)
            check_names(wanted, {*inputs, *inner, *constant})
            if other := sorted(wanted - floats):
                raise OptionError(
                    f"The tensor {other[0]!r} cannot be calibrated.",
                    "Its values are constant."
                    if other[0] in constant
                    else "It does not hold float32.",
                    "Name float32 tensors that depend on the inputs.",
                    name=other[0],
                )
            floats, notes = wanted, []
            strict |= wanted
        if not floats:
            raise ModelError(
                f"There is nothing to calibrate in {name}.",
                "No float32 tensor was named."
                if wanted is not None
                else "No float32 tensor of its main graph depends on its inputs.",
                "Give the float32 graph of the network; leave `tensors` out to watch all of it.",
            )
        return cls(
            tuple(tensor for tensor in inputs if tensor in floats),
            tuple(tensor for tensor in inner if tensor in floats),
            (),
            frozenset(strict),
            tuple(notes),
        )

    @classmethod
    def all_of(cls, proto: onnx.ModelProto, name: str) -> Watched:
        """Every float32 tensor but the weights, of any graph: quantized, half or integer ones too.
        Inputs may hold -inf, as masks do.

        Raises ModelError where types contradict.
        """
        graph, types = proto.graph, tensor_types(proto, name)
        constant = _constants(graph)
        inputs, inner = _variable(graph, constant)
        folded = [
            output
            for node in graph.node
            for output in node.output
            if node.op_type != "Constant" and output in constant
        ]
        inputs, inner, folded = (
            [tensor for tensor in tensors if types.get(tensor) == FLOAT]
            for tensors in (inputs, inner, folded)
        )
        strict = frozenset(_strict(graph, graph.output))
        return cls(tuple(inputs), tuple(inner), tuple(folded), strict, ())


def _variable(graph: onnx.GraphProto, constant: Collection[str]) -> tuple[list[str], list[str]]:
    """The inputs, and what nodes make that depends on them."""
    inputs = [value.name for value in graph.input if value.name not in constant]
    made = (output for node in graph.node for output in node.output if output)
    return inputs, [output for output in made if output not in constant]


def _strict(graph: onnx.GraphProto, ends: Iterable[onnx.ValueInfoProto]) -> set[str]:
    strict = {value.name for value in ends}
    strict.update(n for node in graph.node if node.op_type in COMPUTING for n in node.input)
    return strict


def _listed(names: Collection[str]) -> str:
    first = ", ".join(repr(name) for _, name in zip(range(3), names, strict=False))
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def _refuse_quantized(proto: onnx.ModelProto, name: str) -> None:
    bodies = [proto.graph.node, *(function.node for function in proto.functions)]
    quantized = [
        node
        for body in bodies
        for node in all_nodes(body)
        if "QuantizeLinear" in node.op_type
        or node.op_type in ("DequantizeLinear", "MatMulNBits")
        or node.op_type.startswith(("QLinear", "QGemm", "QAttention", "DynamicQuantize"))
        or "Integer" in node.op_type
    ]
    if quantized:
        raise ModelError(
            f"{name} is quantized already.",
            f"{quantized[0].op_type} {quantized[0].name!r} is one of {len(quantized)} such nodes: "
            "what flows there are rounded values, whose ranges are settled.",
            "Calibrate the float32 graph that it was made from.",
            nodes=tuple(node.name for node in quantized),
        )


def _refuse_halves(graph: onnx.GraphProto, types: Mapping[str, int], name: str) -> None:
    for node in graph.node:
        if node.op_type in COMPUTING and any(types.get(one) in _HALVES for one in node.input):
            raise ModelError(
                f"{name} computes in half precision.",
                f"{node.op_type} {node.name!r} reads float16 or bfloat16, whose rounding would be "
                "part of every range.",
                "Calibrate the float32 graph, quantize it, and cast what is left afterwards.",
                node=node.name,
            )


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Weights, and what is computed from nothing else."""
    constant = {tensor.name for tensor in graph.initializer}
    constant |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        reads = {name for name in node.input if name} | captured(node)
        if node.op_type == "Constant" or (reads and reads <= constant):
            constant.update(name for name in node.output if name)
    return constant


def choose_engine(engine: str | None) -> tuple[Backend, str]:
    """The backend and device that the caller named, or the first of ENGINES that is here.

    Raises CandidateError, OptionError, NoBackend, BackendUnavailable.
    """
    if engine is not None:
        return named_engine(
            engine, "Calibration cannot run", "It observes the float32 graph as it is."
        )
    return first_engine(
        ENGINES, "No engine is here to calibrate with.", "pip install 'unirt[onnxruntime]'"
    )


class Watcher:
    """Runs a network and shows its watched tensors, as many at a time as memory allows.

    Several engines may be open, each with the weights: one for each group of tensors. Before an
    input larger than any so far, a graph that gives only their sizes is run. Close it.
    """

    def __init__(
        self,
        model: Model,
        wanted: Collection[str] | None,
        engine: str | None,
        memory: int,
        *,
        everything: bool = False,
    ) -> None:
        """With `everything` it shows what `Watched.all_of` names, and nothing is `wanted`.

        Raises ModelError, OptionError, NoBackend, BackendUnavailable.
        """
        self._name, self._memory = model.name, memory
        file = onnx_file(model)
        self._inputs = model.input_names(file)
        self._proto = read_graph(file, "calibrated")
        self.hash, self.tensors = file.hash, main_names(self._proto.graph)
        self.watched = (
            Watched.all_of(self._proto, model.name)
            if everything
            else Watched.of(self._proto, model.name, wanted)
        )
        self._folded = self.watched.folded  # as long as they were not shown
        self._backend, self._device = choose_engine(engine)
        self.engine = f"{self._backend.name}@{self._device}"
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count()
        self._sizes: dict[str, int] = {}
        self._shapes: list[dict[str, tuple[int, ...]]] = []  # of inputs whose sizes were measured
        self._groups: list[tuple[tuple[str, ...], Session]] = []
        self._open_groups = ExitStack()
        self.groups = 0
        """Into how many the tensors had to be split."""
        if sum(tensor.ByteSize() for tensor in self._proto.graph.initializer) > _LIMIT:
            self._move_weights()

    def show(self, feed: Feed) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Each watched tensor of one call, in the order of the graph; arrays are not kept."""
        feed = {self._inputs[name]: value for name, value in feed.items()}
        for name in self.watched.inputs:
            yield name, feed[name]
        if self._folded:
            yield from self._show_folded(feed)
        if not self.watched.inner:
            return
        self._make_room(feed)
        for names, session in self._groups:
            shown = session.run(feed)
            for name in names:
                yield name, shown.pop(name)

    def _show_folded(self, feed: Feed) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """What weights alone make: the same in each call, so that the first shows it."""
        self._sizes.update(self._measured(self._folded, feed))
        for names in self._split(self._folded):
            with ExitStack() as stack:
                shown = self._session(dict.fromkeys(names, FLOAT), stack).run(feed)
            for name in names:
                yield name, shown.pop(name)
        self._folded = ()

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node of the main graph that makes a tensor, with the name that others call it by."""
        name_nodes(self._proto.graph)
        return next((node for node in self._proto.graph.node if name in node.output), None)

    def weight(self, name: str) -> np.ndarray[Any, Any] | None:
        """The values of a tensor that the file holds."""
        from onnx import helper, numpy_helper

        folder = "" if self._folder is None else self._folder.name
        for tensor in self._proto.graph.initializer:
            if tensor.name == name:
                return numpy_helper.to_array(tensor, folder)
        maker = self.maker(name)
        if maker is None or maker.op_type != "Constant" or not maker.attribute:
            return None
        attribute = maker.attribute[0]
        if attribute.HasField("t"):
            return numpy_helper.to_array(attribute.t)
        return np.asarray(helper.get_attribute_value(attribute))

    def close(self) -> None:
        self._open_groups.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _make_room(self, feed: Feed) -> None:
        shapes = {name: np.shape(value) for name, value in feed.items() if value is not None}
        if any(_within(shapes, known) for known in self._shapes):
            return
        self._shapes = [known for known in self._shapes if not _within(known, shapes)] + [shapes]
        for name, size in self._measured(self.watched.inner, feed).items():
            self._sizes[name] = max(size, self._sizes.get(name, 0))
        if self._groups and all(self._fits(names) for names, _ in self._groups):
            return
        self._open_groups.close()
        self._groups = []
        for names in self._split(self.watched.inner):
            self._open(names)
        self.groups = max(self.groups, len(self._groups))

    def _split(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Groups of them that fit the memory, in their order."""
        group: list[str] = []
        for name in names:
            if group and not self._fits((*group, name)):
                yield group
                group = []
            group.append(name)
        yield group

    def _fits(self, names: Collection[str]) -> bool:
        """One tensor alone must fit, whatever it takes."""
        return len(names) == 1 or sum(self._sizes[name] for name in names) <= self._memory

    def _open(self, names: Collection[str]) -> None:
        session = self._session(dict.fromkeys(names, FLOAT), self._open_groups)
        self._groups.append((tuple(names), session))

    def _measured(self, names: Iterable[str], feed: Feed) -> dict[str, int]:
        """The bytes that each tensor takes in this call, whatever its shape depends on."""
        from onnx import helper

        fresh = tensor_names(self._proto.graph)
        sizes = {fresh.fresh(f"{name}__size"): name for name in names}
        nodes = [helper.make_node("Size", [name], [size]) for size, name in sizes.items()]
        count = len(self._proto.graph.node)
        self._proto.graph.node.extend(nodes)
        try:
            with ExitStack() as stack:
                measured = self._session(dict.fromkeys(sizes, _INT64), stack).run(feed)
        finally:
            del self._proto.graph.node[count:]
        return {
            name: _FLOAT_BYTES * math.prod(measured[size].ravel()) for size, name in sizes.items()
        }

    def _session(self, outputs: Mapping[str, int], stack: ExitStack) -> Session:
        """An engine of the graph that gives just these outputs, open as long as the stack."""
        from onnx import helper

        del self._proto.graph.output[:]
        self._proto.graph.output.extend(
            helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()
        )
        graph = Model(self._source(), name=self._name)
        engine = stack.enter_context(self._backend.compile(graph, self._device))
        return stack.enter_context(engine.session())

    def _source(self) -> bytes | Path:
        data: bytes = self._proto.SerializeToString()
        if self._folder is None:
            return data
        path = Path(self._folder.name, f"graph-{next(self._numbers)}.onnx")
        path.write_bytes(data)
        return path

    def _move_weights(self) -> None:
        """Into files of their own: with them the graph is too large for one message."""
        import onnx

        self._folder = tempfile.TemporaryDirectory(prefix="unirt-calibration-")
        path = Path(self._folder.name, "weights.onnx")
        onnx.save_model(
            self._proto, str(path), save_as_external_data=True, location="weights", size_threshold=0
        )
        self._proto = onnx.load(str(path), load_external_data=False)


def _within(shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether no input is larger along any axis."""
    return shapes.keys() == known.keys() and all(
        len(shape) == len(known[name])
        and all(size <= other for size, other in zip(shape, known[name], strict=True))
        for name, shape in shapes.items()
    )
