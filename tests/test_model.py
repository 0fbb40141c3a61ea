"""Models: what is read from a file, and what is refused before any engine sees it.

The ONNX models are made here with onnx.helper, the TFLite ones with the schema that LiteRT ships.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import unirt.formats
from unirt.errors import ModelError, ModelNotFound, OptionError
from unirt.formats import DEFAULT_MAX_BYTES
from unirt.formats.onnx_proto import Model as OnnxMessage
from unirt.formats.protobuf import WireError, decode
from unirt.model import Model
from unirt.testing.networks import onnx_bytes
from unirt.testing.tflite_networks import tflite_network
from unirt.types import TensorSpec

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
GIB = 2**30
SMALL = 2**20  # a limit low enough that a mistake here does not hurt the machine


# Models to try


def value(name: str, shape: Sequence[Any] | None = (2,), dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def node(op: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    """A node of some inputs and one output."""
    *inputs, output = names
    return helper.make_node(op, inputs, [output], **attributes)


def weight(name: str = "w", data: Any = (1.0, 2.0)) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(data, np.float32), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def make(
    nodes: Sequence[onnx.NodeProto] | None = None,
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    weights: Sequence[onnx.TensorProto] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    ir_version: int = 10,
) -> onnx.ModelProto:
    """`y = x + w`, or what is given instead."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])] if nodes is None else nodes,
        "graph",
        [value("x")] if inputs is None else inputs,
        [value("y")] if outputs is None else outputs,
        [weight()] if weights is None else weights,
    )
    return helper.make_model(
        graph,
        ir_version=ir_version,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        functions=functions,
        producer_name="tests",
    )


def function(
    name: str, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str] = ("a",)
) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, inputs, ["b"], nodes, opsets)


def branches(then: onnx.GraphProto) -> onnx.NodeProto:
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["n"])], "else", [], [value("n")])
    return helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)


def with_external(
    folder: Path, location: str = "weights.bin", data: bytes | None = None, **entries: Any
) -> Path:
    """`y = x + w` with `w` in another file."""
    if data is not None:
        (folder / location).write_bytes(data)
    model = make()
    move_outside(model.graph.initializer[0], location, **entries)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def move_outside(tensor: onnx.TensorProto, location: str, **entries: object) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))


class TFLite:
    """Builds small TFLite models: one ADD of an input and a constant, changed at will."""

    def __init__(self) -> None:
        self.schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated")
        self.flatbuffers: Any = pytest.importorskip("flatbuffers")
        s = self.schema
        self.x = self.tensor("x", (1, 2), signature=(-1, 2))
        self.w = self.tensor("w", (2,), buffer=1)
        self.y = self.tensor("y", (1, 2))
        self.add = s.OperatorT()
        self.add.inputs, self.add.outputs = [0, 1], [2]
        code = s.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = s.BuiltinOperator.ADD
        self.subgraph = s.SubGraphT()
        self.subgraph.tensors = [self.x, self.w, self.y]
        self.subgraph.inputs, self.subgraph.outputs = [0], [2]
        self.subgraph.operators = [self.add]
        self.empty, self.data = s.BufferT(), s.BufferT()
        self.data.data = np.frombuffer(np.ones(2, np.float32).tobytes(), np.uint8)
        self.model = s.ModelT()
        self.model.version = 3
        self.model.operatorCodes = [code]
        self.model.subgraphs = [self.subgraph]
        self.model.buffers = [self.empty, self.data]
        self.model.signatureDefs = []

    def tensor(
        self, name: str, shape: Sequence[int], buffer: int = 0, signature: Sequence[int] = ()
    ) -> Any:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, list(shape), buffer
        tensor.shapeSignature = list(signature) or None
        return tensor

    def signature(self, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        def maps(names: dict[str, int]) -> list[Any]:
            entries = []
            for name, index in names.items():
                entry = self.schema.TensorMapT()
                entry.name, entry.tensorIndex = name, index
                entries.append(entry)
            return entries

        signature = self.schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.inputs, signature.outputs = maps(inputs), maps(outputs)
        self.model.signatureDefs.append(signature)

    def bytes(self) -> bytes:
        builder = self.flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


@pytest.fixture
def tflite() -> TFLite:
    return TFLite()


def refused(source: Any, *words: str, **options: Any) -> ModelError:
    """The ModelError that opening raises; its three sentences hold the words."""
    with pytest.raises(ModelError) as caught:
        Model(source, **options)
    error = caught.value
    assert error.what
    assert error.why
    assert error.remedy
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"
    return error


@contextlib.contextmanager
def cheaply(seconds: float = 5.0, nbytes: int = 64 * 2**20) -> Iterator[None]:
    tracemalloc.start()
    started = time.perf_counter()
    try:
        yield
        took, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < seconds
    assert peak < nbytes


# What is read


def test_an_onnx_model_is_described_without_loading_an_engine(tmp_path: Path) -> None:
    inputs = [value("x", ["batch", 3, None]), value("k", [], INT64), value("any", None)]
    outputs = [value("y", ["batch", 3, 2])]
    path = tmp_path / "sum.onnx"
    nodes = [
        helper.make_node("Add", ["x", "w"], ["s"]),
        helper.make_node("Constant", [], ["c"], value=weight("c")),
        helper.make_node("Add", ["s", "c"], ["y"]),
    ]
    path.write_bytes(make(nodes, inputs, outputs).SerializeToString())
    model = Model(path)
    assert model.name == "sum"
    assert model.path == path
    assert model.inputs == (
        TensorSpec("x", "float32", ("batch", 3, None)),
        TensorSpec("k", "int64", ()),
        TensorSpec("any", "float32", None),
    )
    assert model.outputs == (TensorSpec("y", "float32", ("batch", 3, 2)),)
    assert model.parameters == 2  # the Constant node's are not weights
    assert model.size == path.stat().st_size
    assert dict(model.opset) == {"ai.onnx": 17, "local": 1}
    assert list(model.formats) == ["onnx"]
    file = model.primary
    assert file.format == "onnx"
    assert file.ir_version == 10
    assert file.producer == "tests"
    assert dict(file.op_counts) == {"Add": 2, "Constant": 1}
    assert dict(file.weight_dtypes) == {"float32": 2}
    assert not file.stateful
    assert file.external == ()
    assert file.read() == path.read_bytes()
    assert "sum" in repr(model)
    assert "x: float32 [batch, 3, ?]" in str(model)


def test_a_tflite_model_is_described(tmp_path: Path, tflite: TFLite) -> None:
    path = tmp_path / "sum.tflite"
    path.write_bytes(tflite.bytes())
    model = Model(path)
    assert model.inputs == (TensorSpec("x", "float32", (None, 2)),)
    assert model.outputs == (TensorSpec("y", "float32", (1, 2)),)
    assert model.parameters == 2
    assert dict(model.opset) == {}
    assert dict(model.primary.op_counts) == {"ADD": 1}
    assert not model.primary.stateful
    assert model.hash == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_signature_names_the_ends_of_a_tflite_model_if_it_covers_them_all(tflite: TFLite) -> None:
    tflite.signature({"image": 0}, {"scores": 2})
    model = Model(tflite.bytes())
    assert [spec.name for spec in model.inputs + model.outputs] == ["image", "scores"]
    tflite.signature({"image": 0}, {"other": 2})
    model = Model(tflite.bytes())
    assert [spec.name for spec in model.inputs + model.outputs] == ["x", "y"]


def test_a_signature_that_covers_only_a_part_names_nothing(tflite: TFLite) -> None:
    tflite.signature({}, {"scores": 2})
    assert [spec.name for spec in Model(tflite.bytes()).outputs] == ["y"]


def test_a_tflite_model_with_variables_is_stateful(tflite: TFLite) -> None:
    tflite.x.isVariable = True
    assert Model(tflite.bytes()).primary.stateful


def test_a_tflite_buffer_may_lie_behind_the_tables(tflite: TFLite) -> None:
    tflite.data.data = None
    tflite.data.offset, tflite.data.size = 1024, 8
    data = tflite.bytes().ljust(1024, b"\0") + bytes(8)
    assert Model(data).parameters == 2
    refused(data[:-1], "damaged")


def test_weights_that_old_files_list_as_inputs_are_none() -> None:
    model = make(inputs=[value("x"), value("w")], ir_version=3)
    assert [spec.name for spec in Model(model).inputs] == ["x"]


def test_weights_and_operators_of_nested_graphs_are_counted() -> None:
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "v"], ["t"])], "then", [], [value("t")], [weight("v")]
    )
    model = make([branches(then)], [value("x"), value("c", [], TensorProto.BOOL)], weights=[])
    assert Model(model).parameters == 2
    assert dict(Model(model).primary.op_counts) == {"If": 1, "Add": 1, "Neg": 1}


def test_operators_of_other_domains_carry_them() -> None:
    model = make([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")])
    assert dict(Model(model).primary.op_counts) == {"com.microsoft.Gelu": 1}


@pytest.mark.parametrize("given", [bytes, bytearray, memoryview, onnx.load_model_from_string])
def test_a_model_opens_from_memory(given: Callable[[bytes], Any]) -> None:
    data = make().SerializeToString()
    model = Model(given(data))
    assert model.path is None
    assert model.name == "model"
    assert model.primary.read() == data
    model.primary.verify()


def test_opening_an_open_model_gives_itself() -> None:
    model = Model(make())
    assert Model.open(model) is model
    assert Model.open(make()).hash == model.hash


def test_the_content_and_not_the_ending_decides_the_format(tmp_path: Path, tflite: TFLite) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tflite.bytes())
    assert list(Model(path).formats) == ["tflite"]


def test_a_relative_path_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_bytes(make().SerializeToString())
    monkeypatch.chdir(tmp_path)
    model = Model("model.onnx")
    monkeypatch.chdir("/")
    assert model.primary.read()


# What is legal, if unusual


def typed(dtype: int, dims: Sequence[int], **fields: Any) -> onnx.TensorProto:
    return onnx.TensorProto(name="w", data_type=dtype, dims=dims, **fields)


@pytest.mark.parametrize(
    "tensor",
    [
        typed(FLOAT, [0]),
        typed(FLOAT, [0, 5], raw_data=b""),
        typed(FLOAT, [], float_data=[1]),
        typed(FLOAT, [2], float_data=[1, 2]),
        typed(INT64, [3], int64_data=[-1, 0, 2**62]),
        typed(TensorProto.UINT64, [1], uint64_data=[2**64 - 1]),
        typed(TensorProto.DOUBLE, [1], double_data=[1.5]),
        typed(TensorProto.BOOL, [2], int32_data=[0, 1]),
        typed(TensorProto.FLOAT16, [2], int32_data=[0, 15360]),
        typed(TensorProto.COMPLEX64, [2], float_data=[1, 2, 3, 4]),
        typed(TensorProto.STRING, [2], string_data=[b"a", b"\xff"]),
        typed(TensorProto.INT4, [3], raw_data=b"\x21\x03"),
        typed(TensorProto.INT4, [3], int32_data=[0x21, 0x03]),
        typed(TensorProto.UINT2, [5], raw_data=b"\x21\x03"),
        typed(TensorProto.FLOAT8E4M3FN, [3], raw_data=b"abc"),
    ],
    ids=lambda t: f"{TensorProto.DataType.Name(t.data_type)}{list(t.dims)}",
)
def test_every_way_to_store_a_weight_is_read(tensor: onnx.TensorProto) -> None:
    assert Model(make(weights=[tensor])).parameters == int(np.prod(tensor.dims))


UNUSUAL = {
    "an input handed straight to the output": make([], outputs=[value("x")]),
    "an output that is a weight": make(outputs=[value("y"), value("w")]),
    "no inputs": make([], [], [value("w")]),
    "no nodes and no name": make([], [value("")], [value("")]),
    "optional outputs left out": make([helper.make_node("Dropout", ["x", "", ""], ["y", ""])] * 1),
    "many outputs left out": make(
        [
            helper.make_node("Split", ["x"], ["", "y"]),
            helper.make_node("Split", ["x"], ["", ""]),
        ]
    ),
    "nodes out of order": make(
        [helper.make_node("Neg", ["a"], ["y"]), helper.make_node("Neg", ["x"], ["a"])]
    ),
    "a weight that may be replaced": make(inputs=[value("x"), value("w")]),
    "a size of -1, which exporters write for an unknown one": make(inputs=[value("x", [-1, 2])]),
    "a local function": make(
        [helper.make_node("F", ["x"], ["y"], domain="local")],
        functions=[function("F", [helper.make_node("Neg", ["a"], ["b"])])],
    ),
    "branches that use one name for two values": make(
        [branches(helper.make_graph([node("Neg", "x", "n")], "then", [], [value("n")]))],
        [value("x"), value("c", [], TensorProto.BOOL)],
    ),
}


@pytest.mark.parametrize("model", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_models_are_accepted(model: onnx.ModelProto) -> None:
    Model(model)


def test_outputs_without_a_type_are_left_to_the_engine() -> None:
    model = make()
    model.graph.output[0].ClearField("type")
    assert Model(model).outputs == (TensorSpec("y", "undefined", None),)


def test_values_other_than_tensors_are_described() -> None:
    tensor = helper.make_tensor_type_proto(FLOAT, [2])
    sequence = helper.make_sequence_type_proto(tensor)
    kinds = {
        "sequence": sequence,
        "optional": helper.make_optional_type_proto(sequence),
        "map": helper.make_map_type_proto(INT64, tensor),
        "sparse": helper.make_sparse_tensor_type_proto(FLOAT, [2]),
    }
    model = make(inputs=[helper.make_value_info(kind, type_) for kind, type_ in kinds.items()])
    for spec in Model(model).inputs:
        assert spec == TensorSpec(spec.name, "float32", (2,), spec.name)  # type: ignore[arg-type]


def test_a_sparse_weight_is_read() -> None:
    sparse = helper.make_sparse_tensor(weight("w", [1.0]), ints("i", 1), [2])
    model = make(weights=[])
    model.graph.sparse_initializer.append(sparse)
    assert Model(model).parameters == 1
    model.graph.sparse_initializer[0].dims[0] = 2**40
    refused(model, "larger")


def test_models_of_onnx_itself_are_accepted() -> None:
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    paths = sorted(data.rglob("*.onnx"))
    assert len(paths) > 100
    for path in paths:
        model, reference = Model(path), onnx.load(path)
        weights = {tensor.name for tensor in reference.graph.initializer}
        names = [info.name for info in reference.graph.input if info.name not in weights]
        assert [spec.name for spec in model.inputs] == names
        assert [spec.name for spec in model.outputs] == [v.name for v in reference.graph.output]
        assert sum(model.primary.op_counts.values()) >= len(reference.graph.node)


def test_node_tests_of_onnx_are_accepted() -> None:
    loader = pytest.importorskip("onnx.backend.test.loader")
    with np.errstate(all="ignore"):
        cases = loader.load_model_tests(kind="node")
    assert len(cases) > 1000
    for case in cases:
        Model(case.model)


# What is no model


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    error = refused(tmp_path / "none.onnx", "no model at")
    assert isinstance(error, ModelNotFound)
    assert isinstance(error, FileNotFoundError)
    assert error.path == tmp_path / "none.onnx"
    refused(tmp_path / "none" / "none.onnx", "no folder")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_and_a_device_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe")
    refused("/dev/zero", "device")


def test_a_path_that_cannot_be_is_refused(tmp_path: Path) -> None:
    refused("model\0.onnx", "cannot be read")
    refused(tmp_path / ("x" * 5000), "cannot be read")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    refused(tmp_path / "model.onnx", "empty")
    refused(b"", "empty")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (random.Random(0).randbytes(5000), "not a model"),
        (b"Once upon a time there was a network.\n" * 50, "not a model"),
        (b"PK\x03\x04" + bytes(500), "zip"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\n\n  <html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
        (b"\x18\0\0\0ORTM" + bytes(100), "ONNX Runtime"),
        (b"\x00", "not a model"),
        (b"\xff" * 40, "not a model"),
        (b"\x08\x0a", "no graph"),
    ],
    ids=lambda given: repr(given[:12]),
)
def test_what_is_no_model_is_named(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    refused(path, word, str(path))
    refused(data, word)


def test_other_objects_are_no_models() -> None:
    refused(5, "int")
    with pytest.raises(ModelError):
        Model()


def test_a_truncated_model_is_called_so() -> None:
    data = make().SerializeToString()
    refused(data[: len(data) // 2], "cut short")


def change(edit: Callable[[onnx.ModelProto], object], **given: Any) -> onnx.ModelProto:
    model = make(**given)
    edit(model)
    return model


DAMAGED = {
    "no graph": change(lambda m: m.ClearField("graph")),
    "opset": change(lambda m: m.ClearField("opset_import")),
    "no outputs": make(outputs=[]),
    "'x' is one of its inputs twice": make(inputs=[value("x"), value("x")]),
    "'y' is one of its outputs twice": make(outputs=[value("y"), value("y")]),
    "'w' is the name of two weights": make(weights=[weight(), weight()]),
    "'y' is written again by a Neg": make([helper.make_node("Neg", ["x"], ["y"])] * 2),
    "'x' is written again": make([helper.make_node("Neg", ["x"], ["x"])]),
    "'w' is written again": make([helper.make_node("Neg", ["x"], ["w"])]),
    "'b' is written again": make(
        functions=[function("F", [helper.make_node("Neg", ["a"], ["b"])] * 2)]
    ),
    "two functions": make(functions=[function("F", []), function("F", [])]),
    "circle": make(
        [helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["a"])],
        outputs=[value("a")],
    ),
    "negative": make(weights=[typed(FLOAT, [-1])]),
    "64 bits": make(weights=[typed(FLOAT, [2**40, 2**40])]),
    "64 bits count": make(weights=[typed(FLOAT, [2**40, 2**40, 0])]),
    "its shape is [-3]": change(
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -3)
    ),
    "rank 65": make(weights=[typed(FLOAT, [1] * 65, float_data=[1])]),
    "4 bytes; it has 8": make(weights=[typed(FLOAT, [1], raw_data=bytes(8))]),
    "16 bytes; it has 8": make(weights=[typed(FLOAT, [4], raw_data=bytes(8))]),
    "3 elements in float_data; it has 2": make(weights=[typed(FLOAT, [3], float_data=[1, 2])]),
    "1 elements in float_data; it has 0": make(weights=[typed(FLOAT, [])]),
    "2 elements in string_data": make(weights=[typed(TensorProto.STRING, [2], raw_data=b"abcd")]),
    "element type 99": make(weights=[typed(99, [1])]),
    "not say of what type": change(lambda m: m.graph.input[0].ClearField("type")),
}


@pytest.mark.parametrize(("word", "model"), DAMAGED.items(), ids=DAMAGED.keys())
def test_a_damaged_model_is_refused(word: str, model: onnx.ModelProto) -> None:
    with pytest.raises(ModelError) as caught:
        Model(model)
    assert word.lower() in str(caught.value).lower()


def test_names_are_checked_in_nested_graphs_too() -> None:
    then = helper.make_graph([helper.make_node("Neg", ["x"], ["t"])] * 2, "then", [], [value("t")])
    refused(make([branches(then)]), "'t' is written again")


def test_names_that_are_not_utf8_are_refused() -> None:
    data = make(inputs=[value("name"), value("x")]).SerializeToString()
    refused(data.replace(b"name", b"na\xffe"), "UTF-8")


# External data

GOOD = np.array([1, 2], np.float32).tobytes()


def test_external_data_belongs_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = with_external(tmp_path, "sub/weights.bin", bytes(16) + GOOD, offset=16, length=8)
    model = Model(path)
    assert model.primary.external == (tmp_path / "sub" / "weights.bin",)
    assert model.size == path.stat().st_size + 24
    assert model.parameters == 2


@pytest.mark.parametrize(
    "location",
    [
        "../weights.bin",
        "sub/../../weights.bin",
        "..",
        "/etc/passwd",
        "//etc/passwd",
        "C:/weights.bin",
        "c:weights.bin",
        "..\\weights.bin",
        "\\\\server\\weights.bin",
        "sub\\weights.bin",
        "",
        ".",
        "a\0b",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "weights.bin").write_bytes(GOOD)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    error = refused(with_external(folder, location), "'w'")
    assert error.location == location
    assert error.tensor == "w"


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    refused(with_external(tmp_path), "cannot be found")


def test_external_data_without_a_folder_is_refused(tmp_path: Path) -> None:
    data = with_external(tmp_path, data=GOOD).read_bytes()
    refused(data, "from bytes", "path")


def test_linked_external_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(GOOD)
    folder = tmp_path / "model"
    folder.mkdir()
    path = with_external(folder)
    (folder / "weights.bin").symlink_to("../secret")
    refused(path, "symbolic link")
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").hardlink_to(tmp_path / "secret")
    refused(path, "hard link")


def test_external_data_below_a_linked_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights.bin").write_bytes(GOOD)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").symlink_to("../elsewhere")
    refused(with_external(folder, "sub/weights.bin"), "symbolic link")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_external_data_in_a_pipe_or_folder_is_refused(tmp_path: Path) -> None:
    path = with_external(tmp_path)
    os.mkfifo(tmp_path / "weights.bin")
    refused(path, "not a regular file")
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "weights.bin").mkdir()
    refused(path, "not a regular file")


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"offset": 1}, "beyond the end"),
        ({"offset": 2**60}, "beyond the end"),
        ({"offset": -8}, "count of bytes"),
        ({"offset": "9" * 40}, "count of bytes"),
        ({"offset": "0x0"}, "count of bytes"),
        ({"length": -1}, "count of bytes"),
        ({"length": 4}, "4 bytes"),
        ({"length": 2**40}, "bytes of external data"),
    ],
)
def test_regions_outside_the_external_file_are_refused(
    tmp_path: Path, entries: dict[str, Any], word: str
) -> None:
    refused(with_external(tmp_path, data=GOOD, **entries), word)


def test_short_external_data_is_refused(tmp_path: Path) -> None:
    refused(with_external(tmp_path, data=GOOD[:-1]), "beyond the end")


def outside(name: str = "w") -> onnx.TensorProto:
    tensor = weight(name)
    move_outside(tensor, "../secret")
    return tensor


HIDDEN = {
    "Constant node": make([helper.make_node("Constant", [], ["y"], value=outside())]),
    "list of tensors": make([helper.make_node("Custom", [], ["y"], values=[outside()])]),
    "nested graph": make(
        [branches(helper.make_graph([], "then", [], [value("w")], [outside()]))], weights=[]
    ),
    "function": make(
        functions=[function("F", [helper.make_node("Constant", [], ["b"], value=outside())])]
    ),
    "sparse weight": change(
        lambda m: m.graph.sparse_initializer.append(
            onnx.SparseTensorProto(values=outside("s"), indices=ints("i", 0, 1), dims=[2])
        )
    ),
    "indices": change(
        lambda m: m.graph.sparse_initializer.append(
            onnx.SparseTensorProto(values=weight("s"), indices=outside("i"), dims=[2])
        )
    ),
    "training graph": change(
        lambda m: m.training_info.add().initialization.initializer.append(outside("t"))
    ),
}


@pytest.mark.parametrize("model", HIDDEN.values(), ids=HIDDEN.keys())
def test_hidden_external_data_is_found(tmp_path: Path, model: onnx.ModelProto) -> None:
    (tmp_path / "secret").write_bytes(GOOD)
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert refused(path, "..").location == "../secret"


def test_a_graph_given_twice_is_merged_as_engines_do(tmp_path: Path) -> None:
    """The official parsers merge: what the first one hides must not be lost."""
    first, second = onnx.ModelProto(), make()
    first.graph.initializer.append(outside("hidden"))
    path = tmp_path / "model.onnx"
    path.write_bytes(first.SerializeToString() + second.SerializeToString())
    refused(path, "'hidden'")


def test_an_enum_is_read_with_32_bits_as_engines_do() -> None:
    location = b"\x70"  # field 14, a number
    tensor = outside("w").SerializeToString().replace(location + b"\x01", b"")
    tensor += location + varint(1 + 2**32)
    data = make(weights=[]).SerializeToString() + field(7, field(5, tensor))
    assert onnx.ModelProto.FromString(data).graph.initializer[0].data_location == 1
    refused(data, "'w'", "from bytes")


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def field(number: int, body: bytes) -> bytes:
    """A message in the wire format, for what onnx does not write."""
    return bytes([number << 3 | 2]) + varint(len(body)) + body


# Limits and bombs


def test_the_limit_is_an_argument_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    size = path.stat().st_size
    Model(path, max_bytes=size)
    error = refused(path, "max_bytes=", "UNIRT_MAX_MODEL_BYTES", max_bytes=size - 1)
    assert error.max_bytes == size - 1
    refused(path.read_bytes(), "larger", max_bytes=size - 1)
    monkeypatch.setenv("UNIRT_MAX_MODEL_BYTES", "10")
    refused(path, "larger")
    Model(path, max_bytes=size)
    for wrong in ("lots", "0", "-5"):
        monkeypatch.setenv("UNIRT_MAX_MODEL_BYTES", wrong)
        with pytest.raises(OptionError):
            Model(path)


def sparse_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_a_sparse_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    with cheaply():
        refused(sparse_file(tmp_path / "model.onnx", 256 * GIB), "256.0 GiB")


def test_a_sparse_external_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = with_external(tmp_path)
    sparse_file(tmp_path / "weights.bin", 256 * GIB)
    with cheaply():
        refused(path, "256.0 GiB")


def test_tensors_that_share_a_region_count_each(tmp_path: Path) -> None:
    """An engine loads every one of them."""
    tensors = [typed(FLOAT, [2**20]) for _ in range(100)]
    for index, tensor in enumerate(tensors):
        tensor.name = f"w{index}"
        move_outside(tensor, "weights.bin")
    sparse_file(tmp_path / "weights.bin", 2**22)
    path = tmp_path / "model.onnx"
    path.write_bytes(make(weights=tensors).SerializeToString())
    refused(path, "up to tensor", max_bytes=100 * 2**20)
    started = time.perf_counter()
    assert Model(path).hash
    assert time.perf_counter() - started < 1  # hashed once


HUGE = 2**36  # float32: 256 GiB
SIDE = 2**18  # squared: HUGE


def bomb(
    nodes: Sequence[onnx.NodeProto], *weights: onnx.TensorProto, **given: Any
) -> onnx.ModelProto:
    return make(nodes, weights=weights, **given)


def call(name: str, *names: str) -> onnx.NodeProto:
    return node(name, *names, domain="local")


DOUBLING = [node("Concat", f"v{i}", f"v{i}", f"v{i + 1}", axis=0) for i in range(40)]
BOMBS = {
    "weight without data": make(weights=[typed(FLOAT, [HUGE])]),
    "Constant node without data": make([node("Constant", "y", value=typed(FLOAT, [HUGE]))]),
    "ConstantOfShape": bomb([node("ConstantOfShape", "s", "y")], ints("s", HUGE)),
    "ConstantOfShape of a Constant": bomb(
        [node("Constant", "s", value_ints=[SIDE, SIDE]), node("ConstantOfShape", "s", "y")]
    ),
    "shape that is computed": bomb(
        [
            node("Mul", "a", "a", "b"),
            node("Concat", "b", "a", "s", axis=0),
            node("ConstantOfShape", "s", "y"),
        ],
        ints("a", 2**13),
    ),
    "Expand": bomb([node("Expand", "w", "s", "y")], weight("w", [1.0]), ints("s", SIDE, SIDE)),
    "Tile": bomb([node("Tile", "w", "s", "y")], weight("w", [1.0]), ints("s", HUGE)),
    "Range": bomb(
        [node("Range", "a", "b", "c", "y")],
        *(
            numpy_helper.from_array(np.array(v, np.float32), n)
            for n, v in (("a", 0), ("b", 1e12), ("c", 1))
        ),
    ),
    "Range of typed data": bomb(
        [node("Range", "a", "b", "c", "y")],
        *(helper.make_tensor(n, FLOAT, [], [v]) for n, v in (("a", 0), ("b", 1e12), ("c", 1))),
    ),
    "doubling": bomb(DOUBLING, weight("v0")),
    "doubling, out of order": bomb(DOUBLING[::-1], weight("v0")),
    "RandomNormal": bomb([node("RandomNormal", "y", shape=[SIDE, SIDE])]),
    "Add of a row and a column": bomb(
        [node("Expand", "w", "s", "r"), node("Reshape", "r", "t", "c"), node("Add", "r", "c", "y")],
        weight("w", [1.0]),
        ints("s", SIDE),
        ints("t", -1, 1),
    ),
    "MatMul of a column and a row": bomb(
        [
            node("ConstantOfShape", "s", "c"),
            node("Transpose", "c", "r"),
            node("MatMul", "c", "r", "y"),
        ],
        ints("s", SIDE, 1),
    ),
    "Einsum": bomb(
        [node("ConstantOfShape", "s", "c"), node("Einsum", "c", "c", "y", equation="i,j->ij")],
        ints("s", SIDE),
    ),
    "Pad": bomb([node("Pad", "w", "p", "y")], weight("w", [1.0]), ints("p", HUGE, 0)),
    "Resize": bomb(
        [node("Resize", "w", "", "", "s", "y")], weight("w", [[1.0]]), ints("s", SIDE, SIDE)
    ),
    "OneHot": bomb(
        [node("OneHot", "i", "d", "v", "y")], ints("i", 0), ints("d", HUGE), weight("v")
    ),
    "shape of a static input": bomb(
        [
            node("Shape", "x", "s"),
            node("Concat", "s", "s", "t", axis=0),
            node("Expand", "w", "t", "y"),
        ],
        weight("w", [1.0]),
        inputs=[value("x", [SIDE])],
    ),
    "in a branch": make(
        [
            branches(
                helper.make_graph(
                    [node("Constant", "s", value_ints=[HUGE]), node("ConstantOfShape", "s", "t")],
                    "then",
                    [],
                    [value("t")],
                )
            )
        ]
    ),
    "in a function": bomb(
        [call("F", "w", "y")],
        weight("w"),
        functions=[
            function("F", [call("G", "a", "c"), call("G", "c", "b")]),
            function("G", [node("Tile", "a", "s", "b")], ["a"]),
        ],
    ),
    "input": make(inputs=[value("x", [HUGE])]),
    "output": make(outputs=[value("y", [HUGE])]),
}
# Functions know no outer values: give the one in a function its repeats.
BOMBS["in a function"].functions[1].node.insert(0, node("Constant", "s", value_ints=[2**20]))


@pytest.mark.parametrize("model", BOMBS.values(), ids=BOMBS.keys())
def test_a_constant_of_256_gib_is_refused_without_the_memory(model: onnx.ModelProto) -> None:
    assert model.ByteSize() < 10_000
    data = model.SerializeToString()
    with cheaply():
        refused(data, "larger than models may be")


@pytest.mark.parametrize("name", [name for name in BOMBS if "without data" not in name])
def test_it_is_the_limit_that_refuses_it(name: str) -> None:
    Model(BOMBS[name], max_bytes=2**60)


def test_runtime_sizes_are_no_constants() -> None:
    """What grows from an input is the caller's business."""
    nodes = [node("Tile", "x", "s", "y")]
    Model(bomb(nodes, ints("s", HUGE)))


def test_a_weight_that_callers_may_replace_is_no_constant() -> None:
    model = bomb(
        [node("ConstantOfShape", "s", "y")],
        ints("s", HUGE),
        inputs=[value("s", [1], INT64)],
    )
    Model(model)
    model.ir_version = 3
    refused(model, "larger")


def nest(levels: int, calls: int) -> onnx.ModelProto:
    """Functions that call each other: `calls ** levels` nodes once inlined."""
    functions = [function("F0", [node("Neg", "a", "b")])]
    for level in range(1, levels):
        values = ["a", *(f"v{index}" for index in range(calls - 1)), "b"]
        steps = itertools.pairwise(values)
        functions.append(function(f"F{level}", [call(f"F{level - 1}", *step) for step in steps]))
    return make([call(f"F{levels - 1}", "x", "y")], functions=functions)


def test_functions_that_explode_when_inlined_are_refused() -> None:
    Model(nest(levels=4, calls=10))
    with cheaply():
        refused(nest(levels=30, calls=10), "inlined")
    with cheaply():
        refused(nest(levels=500, calls=1), "deep")


def test_functions_that_call_themselves_are_refused() -> None:
    direct = function("F", [call("F", "a", "b")])
    refused(make([call("F", "x", "y")], functions=[direct]), "calls itself")
    ring = [function("F", [call("G", "a", "b")]), function("G", [call("F", "a", "b")])]
    refused(make([call("F", "x", "y")], functions=ring), "calls itself")
    refused(make(functions=ring), "calls itself")


def test_constants_count_for_every_call_of_their_function() -> None:
    body = [node("Constant", "c", value=weight("c", np.ones(1000))), node("Add", "a", "c", "b")]
    names = [f"v{index}" for index in range(1001)]
    calls = [call("F", *step) for step in itertools.pairwise(names)]
    model = make(calls, [value("v0")], [value("v1000")], functions=[function("F", body)])
    Model(model)
    refused(model, "inlined", max_bytes=SMALL)


def test_graphs_nested_too_deeply_are_refused() -> None:
    graph = b""
    for _ in range(60):  # node, attribute, graph
        graph = field(1, field(5, field(6, graph)))
    refused(b"\x08\x0a" + field(7, graph) + field(8, b"\x10\x11"), "deep")


def test_a_small_file_of_a_great_many_parts_is_bounded() -> None:
    nodes = b"\x0a\x00" * 10_000_000
    data = b"\x08\x0a" + field(7, nodes)
    started = time.perf_counter()
    refused(data, "more parts")
    assert time.perf_counter() - started < 60


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's here")
def test_bombs_stay_within_a_limit_of_the_process(tmp_path: Path) -> None:
    for name, model in BOMBS.items():
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    sparse_file(tmp_path / "sparse.onnx", 256 * GIB)
    child = """
import resource, sys, pathlib
from unirt.errors import ModelError
from unirt.model import Model
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    try:
        Model(path)
    except ModelError:
        print("refused")
"""
    root = Path(unirt.formats.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["refused"] * (len(BOMBS) + 1), done.stderr


# Damaged TFLite


def put(*changes: tuple[Any, str, Any]) -> None:
    for target, name, new in changes:
        setattr(target, name, new)


TFLITE_FLAWS: dict[str, tuple[str, Callable[[TFLite], object]]] = {
    "more elements than data": ("wrong amount", lambda t: setattr(t.w, "shape", [3])),
    "fewer elements than data": ("wrong amount", lambda t: setattr(t.w, "shape", [1])),
    "negative shape": ("impossible shape", lambda t: setattr(t.y, "shape", [-2])),
    "overflowing shape": ("impossible shape", lambda t: setattr(t.y, "shape", [2**31 - 1] * 4)),
    "endless rank": ("impossible shape", lambda t: setattr(t.y, "shape", [1] * 1000)),
    "absurd shape": ("larger than models", lambda t: setattr(t.y, "shape", [2**30, 2**10])),
    "odd signature": ("impossible shape", lambda t: setattr(t.x, "shapeSignature", [-2, 2])),
    "buffer that is not there": ("buffer 7", lambda t: setattr(t.w, "buffer", 7)),
    "unknown type": ("type 99", lambda t: setattr(t.w, "type", 99)),
    "input that is not there": ("tensor 9", lambda t: setattr(t.subgraph, "inputs", [9])),
    "output that is left out": ("tensor -1", lambda t: setattr(t.subgraph, "outputs", [-1])),
    "operand that is not there": ("tensor 3", lambda t: setattr(t.add, "inputs", [0, 3])),
    "operator that is not there": ("code 5", lambda t: setattr(t.add, "opcodeIndex", 5)),
    "no outputs": ("no outputs", lambda t: setattr(t.subgraph, "outputs", [])),
    "no subgraphs": ("no graph", lambda t: setattr(t.model, "subgraphs", [])),
    "one output twice": ("'y' 2 times", lambda t: setattr(t.subgraph, "outputs", [2, 2])),
    "two inputs of one name": (
        "'x' 2 times",
        lambda t: put((t.y, "name", "x"), (t.subgraph, "inputs", [0, 2])),
    ),
    "data behind the end": (
        "buffer ends",
        lambda t: put((t.data, "offset", 2**40), (t.data, "size", 8)),
    ),
}


@pytest.mark.parametrize(("word", "edit"), TFLITE_FLAWS.values(), ids=TFLITE_FLAWS.keys())
def test_a_damaged_tflite_model_is_refused(
    tflite: TFLite, word: str, edit: Callable[[TFLite], object]
) -> None:
    edit(tflite)
    data = tflite.bytes()
    with cheaply():
        refused(data, word)


def test_optional_operands_of_tflite_are_legal(tflite: TFLite) -> None:
    tflite.add.inputs = [0, 1, -1]
    Model(tflite.bytes())


# Nothing but ModelError


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_whatever_bytes_are_damaged_only_model_errors_come_out(kind: str) -> None:
    data = TFLite().bytes() if kind == "tflite" else rich().SerializeToString()
    dice = random.Random(20)
    opened, started = 0, time.perf_counter()
    for _ in range(2000):
        broken = bytearray(data)
        if dice.random() < 0.3:
            del broken[dice.randrange(len(broken)) :]
        for _ in range(dice.choice((1, 1, 2, 8))):
            if broken:
                broken[dice.randrange(len(broken))] = dice.randrange(256)
        with contextlib.suppress(ModelError):
            model = Model(bytes(broken))
            assert model.hash == hashlib.sha256(broken).hexdigest()
            assert str(model)
            opened += 1
    assert time.perf_counter() - started < 30
    assert 0 < opened < 2000


def rich() -> onnx.ModelProto:
    """Some of everything."""
    then = helper.make_graph(
        [node("Add", "x", "v", "t")], "then", [], [value("t")], [weight("v", np.ones(8))]
    )
    sparse = helper.make_sparse_tensor(weight("s", [1.0]), ints("i", 1), [2])
    nodes = [
        branches(then),
        call("F", "y", "z"),
        node("Constant", "k", value_ints=[2, 3]),
        node("ConstantOfShape", "k", "o"),
        node("Range", "a", "b", "b", "r"),
    ]
    weights = [
        ints("a", 0),
        typed(FLOAT, [2], float_data=[1, 2]),
        helper.make_tensor("b", INT64, [], [1]),
        onnx.TensorProto(name="text", data_type=TensorProto.STRING, dims=[1], string_data=[b"abc"]),
    ]
    inputs = [value("x", ["batch", 8]), value("c", [], TensorProto.BOOL)]
    outputs = [value("z", ["batch", 8]), value("o", None), value("r", [None])]
    double = function("F", [node("Add", "a", "a", "b")])
    model = make(nodes, inputs, outputs, weights, [double])
    model.graph.sparse_initializer.append(sparse)
    return model


def test_packed_and_unpacked_numbers_read_the_same() -> None:
    for unpacked in (b"\x08\x02\x08\x03\x08\x80\x01", b"\x0a\x04\x02\x03\x80\x01"):
        graph = b"\x2a" + bytes([len(unpacked)]) + unpacked
        model = decode(memoryview(b"\x3a" + bytes([len(graph)]) + graph), OnnxMessage())
        assert model.graph is not None
        dims = model.graph.initializer[0].dims
        assert dims is not None
        assert (dims.count, dims.values) == (3, [2, 3, 128])


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a\xff\xff\xff\xff\x0f",  # a length far beyond the end
        b"\x08" + b"\xff" * 11,  # a number without end
        b"\x3a",
        b"\x08",
        b"\x0b\x0c",  # a group
        b"\x00\x00",  # field 0
        b"\x3a\x02\x2a\x05abcdef",  # longer than the message around it
        b"\x09abc",
    ],
)
def test_broken_wire_formats_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(memoryview(data), OnnxMessage())


# Hashes and changes


def test_the_hash_of_a_single_file_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    assert Model(path).hash == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Model(path).hash == Model(path.read_bytes()).hash


def test_every_weight_byte_changes_the_hash(tmp_path: Path) -> None:
    path = with_external(tmp_path, data=bytes(16) + GOOD, offset=16)
    before = Model(path).hash
    for index in range(24):
        broken = bytearray(bytes(16) + GOOD)
        broken[index] ^= 1
        (tmp_path / "weights.bin").write_bytes(broken)
        assert (Model(path).hash != before) == (index >= 16)  # the padding decides nothing


def test_the_hash_does_not_know_where_the_model_lies(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path = with_external(tmp_path / "here", data=GOOD)
    before = Model(path).hash
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there" / "model.onnx").rename(tmp_path / "there" / "other.onnx")
    assert Model(tmp_path / "there" / "other.onnx").hash == before


def test_two_tensors_exchanged_in_the_external_file_change_the_hash(tmp_path: Path) -> None:
    model = make(weights=[weight("v"), weight("w")])
    for index, tensor in enumerate(model.graph.initializer):
        move_outside(tensor, "weights.bin", offset=8 * index)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    hashes = set()
    for data in (GOOD + bytes(8), bytes(8) + GOOD):
        (tmp_path / "weights.bin").write_bytes(data)
        hashes.add(Model(tmp_path / "model.onnx").hash)
    assert len(hashes) == 2


def test_the_hash_is_computed_once_for_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make(weights=[weight("w", np.ones(100_000))]).SerializeToString())
    model, calls = Model(path), []
    whole = hashlib.file_digest

    def counted(file: Any, digest: str) -> Any:
        calls.append(digest)
        return whole(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    hashes: list[str] = []
    threads = [threading.Thread(target=lambda: hashes.append(model.hash)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hashes) == 8
    assert len(set(hashes)) == 1
    assert len(calls) == 1


@pytest.mark.parametrize("which", ["model.onnx", "weights.bin"])
@pytest.mark.parametrize("how", ["other bytes", "more bytes", "another file", "gone"])
def test_a_file_that_changed_since_opening_is_noticed(tmp_path: Path, which: str, how: str) -> None:
    model = Model(with_external(tmp_path, data=GOOD))
    model.primary.verify()
    path = tmp_path / which
    data = path.read_bytes()
    if how == "other bytes":
        time.sleep(0.02)  # file times move in steps
        path.write_bytes(data[:-1] + b"?")
    elif how == "more bytes":
        path.write_bytes(data + b"?")
    elif how == "another file":
        (tmp_path / "new").write_bytes(data)
        (tmp_path / "new").replace(path)
    else:
        path.unlink()
    with pytest.raises(ModelError, match="changed"):
        model.primary.verify()
    with pytest.raises(ModelError, match="changed"):
        _ = model.hash
    if which == "model.onnx":
        with pytest.raises(ModelError, match="changed"):
            model.primary.read()


# Several formats


@pytest.fixture
def pair(tmp_path: Path, tflite: TFLite) -> tuple[Path, Path]:
    """One network as ONNX and as TFLite, with other names."""
    onnx_path, tflite_path = tmp_path / "sum.onnx", tmp_path / "sum.tflite"
    model = make(inputs=[value("image", ["n", 2])], outputs=[value("scores", ["n", 2])])
    onnx_path.write_bytes(model.SerializeToString())
    tflite_path.write_bytes(tflite.bytes())
    return onnx_path, tflite_path


def test_one_model_in_two_formats(pair: tuple[Path, Path]) -> None:
    onnx_path, tflite_path = pair
    model = Model(onnx=onnx_path, tflite=tflite_path)
    assert list(model.formats) == ["onnx", "tflite"]
    assert model.primary is model.formats["onnx"]
    assert model.name == "sum"
    other = model.file(["tflite", "onnx"])
    assert other is model.formats["tflite"]
    assert model.file(["pt"]) is None
    assert other is not None
    assert dict(model.input_names(other)) == {"image": "x"}
    assert dict(model.output_names(other)) == {"scores": "y"}
    assert dict(model.input_names(model.primary)) == {"image": "image"}
    hashes = {file.hash for file in model.formats.values()}
    assert model.hash not in hashes
    assert model.hash == Model(tflite_path, onnx=onnx_path).hash
    assert Model(tflite_path, onnx=onnx_path).primary.format == "tflite"


def test_a_file_beside_is_found_only_when_asked(pair: tuple[Path, Path]) -> None:
    onnx_path, tflite_path = pair
    assert list(Model(onnx_path).formats) == ["onnx"]
    assert list(Model(onnx_path, beside=True).formats) == ["onnx", "tflite"]
    assert list(Model(tflite_path, beside=True).formats) == ["tflite", "onnx"]
    tflite_path.unlink()
    assert list(Model(onnx_path, beside=True).formats) == ["onnx"]
    assert list(Model(onnx_path.read_bytes(), beside=True).formats) == ["onnx"]


def test_formats_are_matched_by_name_where_names_agree(tflite: TFLite) -> None:
    tflite.y.name = "a"
    tflite.w.name = "b"
    tflite.subgraph.outputs = [2, 1]
    model = make(inputs=[value("x", ["n", 2])], outputs=[value("b"), value("a")])
    both = Model(model, tflite=tflite.bytes())
    assert dict(both.output_names(both.formats["tflite"])) == {"b": "b", "a": "a"}


@pytest.mark.parametrize(
    ("onnx_model", "words"),
    [
        (make(inputs=[value("x", ["n", 3])]), ("[n, 3]", "[?, 2]")),
        (make(inputs=[value("x", ["n"])]), ("[n]", "[?, 2]")),
        (make(inputs=[value("x", ["n", 2], INT64)]), ("int64", "float32")),
        (make(inputs=[value("x", ["n", 2]), value("z")]), ("2 inputs", "has 1")),
        (
            make(inputs=[value("x", ["n", 2])], outputs=[value("y", ["n", 2], INT64)]),
            ("outputs", "int64"),
        ),
    ],
)
def test_formats_that_disagree_are_refused(
    tflite: TFLite, onnx_model: onnx.ModelProto, words: tuple[str, ...]
) -> None:
    refused(onnx_model, "onnx", "tflite", *words, tflite=tflite.bytes())


def test_output_shapes_may_disagree_because_files_lie_about_them(tflite: TFLite) -> None:
    tflite.y.shape = [1, 1]
    Model(make(inputs=[value("x", ["n", 2])], outputs=[value("y", [5, 2])]), tflite=tflite.bytes())


def test_a_format_under_a_wrong_name_is_refused(tflite: TFLite) -> None:
    with pytest.raises(ModelError, match="not in the format onnx"):
        Model(onnx=tflite.bytes())
    with pytest.raises(ModelError, match="second onnx"):
        Model(make(), onnx=make())


# Speed


def test_ten_thousand_nodes_open_in_about_half_a_second() -> None:
    nodes = [
        node("Conv", f"v{i}", "w", f"v{i + 1}", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        for i in range(10_000)
    ]
    model = make(nodes, [value("v0")], [value("v10000")])
    data = model.SerializeToString()
    started = time.perf_counter()
    Model(data)
    assert time.perf_counter() - started < 3  # on a busy machine, too


def test_the_default_limit_is_32_gib() -> None:
    assert DEFAULT_MAX_BYTES == 32 * GIB


def test_formats_whose_names_differ_are_refused_where_outputs_could_be_swapped() -> None:
    tflite = tflite_network("pair")
    assert tflite is not None
    renamed = tflite.replace(b"total", b"tot_l")
    assert list(Model(onnx=onnx_bytes("pair"), tflite=tflite).formats) == ["onnx", "tflite"]
    with pytest.raises(ModelError, match="could be taken for each other"):
        Model(onnx=onnx_bytes("pair"), tflite=renamed)


def test_a_single_tensor_of_another_name_is_matched_by_position() -> None:
    tflite = tflite_network("affine")
    assert tflite is not None
    renamed = tflite.replace(b"\x01\x00\x00\x00y", b"\x01\x00\x00\x00z")
    both = Model(onnx=onnx_bytes("affine"), tflite=renamed)
    assert both.output_names(both.formats["tflite"]) == {"y": "z"}
