"""Q/DQ graphs back in floats, and why a quantized network is slow on an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import unirt
from unirt import cli
from unirt.explanation import Explanation, explain
from unirt.explanation.diagnosis import Diagnosis, Finding
from unirt.explanation.graph import Graph
from unirt.precision.quantization.dequantize import dequantize

onnx = pytest.importorskip("onnx", reason="the onnx package writes the graphs of these tests")
quantization = pytest.importorskip(
    "onnxruntime.quantization", reason="ONNX Runtime quantizes the graphs of these tests"
)

FLOAT = 1
IMAGE = (1, 3, 24, 24)
# One thread: the times of layers are compared.
ONE = {"threads": 1}


def node(op: str, inputs: list[str], output: str, name: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(op, inputs, [output], name, **attributes)


def model(
    nodes: list[Any],
    weights: dict[str, Any],
    inputs: dict[str, tuple[int, ...]],
    outputs: dict[str, tuple[int, ...]],
    opset: int = 17,
) -> Any:
    def values(shapes: dict[str, tuple[int, ...]]) -> list[Any]:
        return [onnx.helper.make_tensor_value_info(n, FLOAT, s) for n, s in shapes.items()]

    tensors = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", values(inputs), values(outputs), tensors)
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8
    )
    onnx.checker.check_model(made, full_check=True)
    return made


def weight(*shape: int, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def residual_net() -> Any:
    """Conv, Relu, Conv with a residual Add and Relu, pool, and a classifier of one row."""
    pads = [1, 1, 1, 1]
    nodes = [
        node("Conv", ["x", "w1", "b1"], "c1", "conv1", pads=pads),
        node("Relu", ["c1"], "r1", "relu1"),
        node("Conv", ["r1", "w2", "b2"], "c2", "conv2", pads=pads),
        node("Add", ["c2", "r1"], "a", "add"),
        node("Relu", ["a"], "r2", "relu2"),
        node("MaxPool", ["r2"], "p", "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["p"], "g", "gap"),
        node("Flatten", ["g"], "f", "flat"),
        node("Gemm", ["f", "w3", "b3"], "y", "fc", transB=1),
    ]
    weights = {
        "w1": weight(32, 3, 3, 3),
        "b1": weight(32, 1)[:, 0],
        "w2": weight(32, 32, 3, 3, seed=1),
        "b2": weight(32, 1, seed=2)[:, 0],
        "w3": weight(10, 32, seed=3),
        "b3": weight(10, 1, seed=4)[:, 0],
    }
    return model(nodes, weights, {"x": IMAGE}, {"y": (1, 10)})


def erf_net() -> Any:
    """Two convolutions with an Erf between them, which no engine computes in integers."""
    nodes = [
        node("Conv", ["x", "w1"], "c1", "conv1", pads=[1, 1, 1, 1]),
        node("Erf", ["c1"], "e", "erf"),
        node("Conv", ["e", "w2"], "y", "conv2", pads=[1, 1, 1, 1]),
    ]
    weights = {"w1": weight(16, 3, 3, 3), "w2": weight(16, 16, 3, 3, seed=1)}
    return model(nodes, weights, {"x": IMAGE}, {"y": (1, 16, 24, 24)})


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(5)
        self._rest: Iterator[Any] = iter(
            [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(3)]
        )

    def get_next(self) -> Any:
        return next(self._rest, None)


def quantized(graph: Any, path: Path, kind: str, **how: Any) -> Path:
    """The graph quantized by ONNX Runtime: `s8` around zero, or `u8`."""
    float_path = path.with_suffix(".float.onnx")
    onnx.save(graph, float_path)
    shape = tuple(d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim)
    types = quantization.QuantType
    quantization.quantize_static(
        str(float_path),
        str(path),
        Reader(shape),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=types.QInt8 if kind == "s8" else types.QUInt8,
        weight_type=types.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": kind == "s8"},
        **how,
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def signed(folder: Path) -> Path:
    return quantized(residual_net(), folder / "s8.onnx", "s8")


@pytest.fixture(scope="module")
def unsigned(folder: Path) -> Path:
    return quantized(residual_net(), folder / "u8.onnx", "u8")


@pytest.fixture(scope="module")
def told() -> Callable[..., Explanation]:
    """Explanations by model and engine, each measured once."""
    known: dict[Any, Explanation] = {}

    def get(path: Path, engine: str = "onnxruntime") -> Explanation:
        if (path, engine) not in known:
            known[path, engine] = explain(path, engine, options=ONE, seconds=0.05)
        return known[path, engine]

    return get


def about(found: Explanation, name: str) -> Finding:
    (one,) = [one for one in found.findings if one.nodes[:1] == (name,)]
    return one


def run(source: Any) -> Any:
    x = np.random.default_rng(1).standard_normal(IMAGE).astype(np.float32)
    with unirt.load(source, "onnxruntime") as session:
        return session.run({"x": x})["y"]


def ops(source: unirt.Model) -> dict[str, str]:
    return {n.name: n.op_type for n in onnx.load_from_string(source.primary.read()).graph.node}


# --- back to floats ------------------------------------------------------------------------------


def test_a_graph_without_its_pairs_answers_as_the_float_network_does(signed: Path) -> None:
    done = dequantize(signed)
    names = [one.name for one in residual_net().graph.node]
    assert list(ops(done.model)) == names
    assert done.kept == done.restored == ()
    assert {name for name in done.removed if name.startswith("w2")} == {"w2_DequantizeLinear"}
    rounded = np.abs(run(done.model) - run(residual_net())).max()
    assert rounded < 0.02 * np.abs(run(residual_net())).max()
    onnx.checker.check_model(onnx.load_from_string(done.model.primary.read()), full_check=True)
    graph = onnx.load_from_string(done.model.primary.read()).graph
    assert {one.data_type for one in graph.initializer} == {FLOAT}
    assert len(graph.initializer) == 6


def test_a_relu_that_the_quantizer_left_out_comes_back(unsigned: Path) -> None:
    assert "Relu" not in ops(unirt.Model(unsigned)).values()
    done = dequantize(unsigned)
    assert done.restored == ("r1_QuantizeLinear__clamp", "r2_QuantizeLinear__clamp")
    assert list(ops(done.model).values()).count("Relu") == 2
    answer = run(residual_net())
    assert np.abs(run(done.model) - answer).max() < 0.02 * np.abs(answer).max()


def q_dq(tensor: str, scale: str = "s", zero: str = "z") -> list[Any]:
    """A pair behind a tensor, giving `tensor_dq`."""
    return [
        node("QuantizeLinear", [tensor, scale, zero], f"{tensor}_q", f"{tensor}_Q"),
        node("DequantizeLinear", [f"{tensor}_q", scale, zero], f"{tensor}_dq", f"{tensor}_DQ"),
    ]


SCALES = {"s": np.float32(0.05), "z": np.int8(0)}


@pytest.mark.parametrize("opset", [10, 17])
def test_a_relu6_that_the_quantizer_left_out_comes_back(opset: int) -> None:
    scales = {"s": np.float32(6 / 255), "z": np.uint8(0)}
    nodes = [node("Neg", ["x"], "n", "neg"), *q_dq("n"), node("Neg", ["n_dq"], "y", "again")]
    done = dequantize(model(nodes, scales, {"x": (1, 4)}, {"y": (1, 4)}, opset))
    assert ops(done.model) == {"neg": "Neg", "n_Q__clamp": "Clip", "again": "Neg"}
    x = np.array([[-9, -2, 1, 3]], np.float32)
    with unirt.load(done.model, "onnxruntime") as session:
        assert session.run(x)["y"].tolist() == [[-6, -2, 0, 0]]


def test_an_input_that_is_never_negative_needs_no_relu() -> None:
    nodes = [*q_dq("x"), node("Tanh", ["x_dq"], "y", "tanh")]
    scales = {"s": np.float32(0.1), "z": np.uint8(0)}
    done = dequantize(model(nodes, scales, {"x": (1, 4)}, {"y": (1, 4)}))
    assert ops(done.model) == {"tanh": "Tanh"}


@pytest.mark.parametrize("kind", ["channels", "blocks"])
def test_weights_come_back_with_each_scale_in_its_place(kind: str) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(-7, 8, (8, 6)).astype(np.int8)
    blocks = {"axis": 0, "block_size": 4} if kind == "blocks" else {"axis": 1}
    shape = (2, 6) if kind == "blocks" else (6,)
    scales = rng.uniform(0.1, 1, shape).astype(np.float32)
    nodes = [
        node("DequantizeLinear", ["w", "s"], "w_dq", "w_DQ", **blocks),
        node("MatMul", ["x", "w_dq"], "y", "mm"),
    ]
    graph = model(nodes, {"w": whole, "s": scales}, {"x": (1, 8)}, {"y": (1, 6)}, 21)
    done = dequantize(graph)
    (tensor,) = onnx.load_from_string(done.model.primary.read()).graph.initializer
    wide = np.repeat(scales, 4, axis=0) if kind == "blocks" else scales
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), whole * wide)


def test_inputs_outputs_and_pairs_in_a_row_keep_their_names() -> None:
    nodes = [*q_dq("x"), node("Tanh", ["x_dq"], "t", "tanh"), *q_dq("t")]
    nodes += [node("QuantizeLinear", ["t_dq", "s", "z"], "u_q", "u_Q")]
    nodes += [node("DequantizeLinear", ["u_q", "s", "z"], "y", "u_DQ")]
    done = dequantize(model(nodes, SCALES, {"x": (1, 4)}, {"y": (1, 4)}))
    assert ops(done.model) == {"tanh": "Tanh"}
    assert [spec.name for spec in (*done.model.inputs, *done.model.outputs)] == ["x", "y"]
    x = np.array([[-1, 0, 0.2, 5]], np.float32)
    with unirt.load(done.model, "onnxruntime") as session:
        np.testing.assert_allclose(session.run(x)["y"], np.tanh(x), rtol=1e-5)


def test_an_output_whose_float_is_read_elsewhere_too_is_still_the_output() -> None:
    nodes = [node("Tanh", ["x"], "t", "tanh"), *q_dq("t"), node("Neg", ["t"], "n", "neg")]
    done = dequantize(model(nodes, SCALES, {"x": (1, 4)}, {"t_dq": (1, 4), "n": (1, 4)}))
    assert ops(done.model) == {"tanh": "Tanh", "neg": "Neg"}
    with unirt.load(done.model, "onnxruntime") as session:
        outputs = session.run(np.ones((1, 4), np.float32))
    np.testing.assert_allclose(outputs["n"], -outputs["t_dq"])


def test_a_pair_right_between_input_and_output_hands_it_on() -> None:
    done = dequantize(model(q_dq("x"), SCALES, {"x": (1, 4)}, {"x_dq": (1, 4)}))
    assert list(ops(done.model).values()) == ["Identity"]


def test_what_works_on_integers_stays_as_it_is() -> None:
    nodes = [*q_dq("x"), node("Relu", ["x_dq"], "r", "relu"), *q_dq("r")]
    nodes[4].input[0] = "moved"
    nodes.insert(4, node("Transpose", ["r_q"], "moved", "move"))
    done = dequantize(model(nodes, SCALES, {"x": (2, 4)}, {"r_dq": (4, 2)}))
    assert ops(done.model)["move"] == "Transpose"
    assert done.kept == ("r_Q", "r_DQ")
    assert done.removed == ("x_Q", "x_DQ")


def test_a_pair_of_different_scales_multiplies_and_stays() -> None:
    nodes = q_dq("x")
    nodes[1].input[1] = "other"
    graph = model(nodes, {**SCALES, "other": np.float32(1)}, {"x": (1, 4)}, {"x_dq": (1, 4)})
    with pytest.raises(unirt.ModelError, match="no Q/DQ pair"):
        dequantize(graph)


def test_a_graph_without_pairs_is_refused() -> None:
    with pytest.raises(unirt.ModelError, match=r"no Q/DQ pair.*Nothing of it.*Give the float"):
        dequantize(residual_net())


# --- why it is slow ------------------------------------------------------------------------------


def test_a_node_without_integer_kernel_is_found_with_its_pairs(
    folder: Path, told: Callable[..., Explanation]
) -> None:
    path = folder / "erf.onnx"
    if not path.exists():
        every = ["Conv", "Erf"]
        quantized(erf_net(), path, "u8", op_types_to_quantize=every)
    found = told(path)
    one = about(found, "erf")
    assert one.kind == "unfused"
    assert set(one.nodes) == {"erf", "c1_DequantizeLinear", "e_QuantizeLinear"}
    assert "Erf 'erf'" in one.what
    assert "float32" in one.what
    assert one.edit == "keep Erf 'erf' in float: let it read 'c1' instead of c1_DequantizeLinear"
    assert one.seconds is not None
    assert one.seconds > 0
    inside = [f for f in found.findings if f.kind in ("unfused", "float")]
    assert inside == [one], "the convolutions compute in integers"


def test_findings_stand_in_order_of_what_they_cost(
    signed: Path, told: Callable[..., Explanation]
) -> None:
    found = told(signed)
    costs = [one.seconds or 0.0 for one in found.findings]
    assert costs == sorted(costs, reverse=True)
    assert found.cost == pytest.approx(sum(costs))
    assert found.ratio == pytest.approx(
        (found.quantized.seconds or 0) / (found.against.seconds or 1)
    )


def test_a_convolution_of_signed_integers_is_found_in_float(
    signed: Path, told: Callable[..., Explanation]
) -> None:
    one = about(told(signed), "conv2")
    assert one.kind == "float"
    assert {"r1_DequantizeLinear", "w2_DequantizeLinear", "c2_QuantizeLinear"} <= set(one.nodes)
    assert "although its operands are quantized" in one.what
    assert one.edit == "use the cpu recipe: uint8 activations (here they are int8)"


def test_a_pair_between_a_convolution_and_its_relu_is_to_be_moved(
    signed: Path, told: Callable[..., Explanation]
) -> None:
    one = about(told(signed), "relu1")
    assert one.nodes == ("relu1", "c1_DequantizeLinear", "r1_QuantizeLinear")
    assert one.edit == (
        "put Q/DQ behind Relu 'relu1', not between Conv 'conv1' and it: "
        "take out c1_QuantizeLinear, c1_DequantizeLinear"
    )


def test_unsigned_integers_fuse_and_leave_the_border_only(
    unsigned: Path, told: Callable[..., Explanation]
) -> None:
    found = told(unsigned)
    assert not [one for one in found.findings if one.kind in ("unfused", "float")]
    border = [one for one in found.findings if one.kind == "border"]
    assert {one.nodes for one in border} <= {("x_QuantizeLinear",), ("y_DequantizeLinear",)}
    assert any("activation where QuantizeLinear cuts off" in note for note in found.notes)


def test_an_add_with_one_quantized_input_wants_the_other_one_too() -> None:
    pads = [1, 1, 1, 1]
    nodes = [
        *q_dq("x"),
        node("DequantizeLinear", ["wq", "ws", "z"], "w_dq", "w_DQ"),
        node("Conv", ["x_dq", "w_dq"], "c", "conv", pads=pads),
        *q_dq("c"),
        node("Tanh", ["x"], "t", "tanh"),
        node("Add", ["c_dq", "t"], "a", "add"),
        *q_dq("a"),
        node("MaxPool", ["a_dq"], "y", "pool", kernel_shape=[2, 2]),
    ]
    whole = np.random.default_rng(0).integers(-64, 64, (3, 3, 3, 3)).astype(np.int8)
    scales = {"s": np.float32(0.05), "z": np.int8(0), "ws": np.float32(0.01), "wq": whole}
    graph = model(nodes, scales, {"x": IMAGE}, {"y": (1, 3, 23, 23)})
    one = about(explain(graph, "onnxruntime", options=ONE, seconds=0.02), "add")
    assert one.kind == "unfused"
    assert one.edit == "quantize the other input of Add 'add' too: it comes from Tanh 'tanh'"


def test_a_product_whose_result_is_not_quantized_is_told_so() -> None:
    """ONNX Runtime's integer convolution gives integers: without a pair behind it there is none."""
    nodes = [
        *q_dq("x"),
        node("DequantizeLinear", ["wq", "ws", "zs"], "w_dq", "w_DQ"),
        node("Conv", ["x_dq", "w_dq"], "c", "conv"),
        node("Relu", ["c"], "y", "relu"),
    ]
    whole = np.random.default_rng(0).integers(-64, 64, (8, 3, 3, 3)).astype(np.int8)
    scales = {"s": np.float32(0.05), "z": np.uint8(128), "ws": np.float32(0.01), "wq": whole}
    graph = model(nodes, {**scales, "zs": np.int8(0)}, {"x": IMAGE}, {"y": (1, 8, 22, 22)})
    one = about(explain(graph, "onnxruntime", options=ONE, seconds=0.02), "conv")
    assert one.kind == "float"
    assert set(one.nodes) == {"conv", "x_DQ", "w_DQ"} or set(one.nodes) == {"conv", "x_DQ"}
    assert one.edit.startswith("quantize the output of Relu 'relu' behind it too")


def test_a_reformat_is_named_by_the_nodes_around_it(
    signed: Path, told: Callable[..., Explanation]
) -> None:
    found = [one for one in told(signed).findings if one.kind == "reformat"]
    places = [one.nodes for one in found]
    assert set(places) <= {("conv1",), ("conv1", "relu1")}
    for one in found:
        assert "Transpose inserted" in one.what
        if one.nodes == ("conv1", "relu1"):
            assert one.edit == "quantize Relu 'relu1' too, so that the layout can stay"


def test_openvino_is_explained_too(signed: Path, told: Callable[..., Explanation]) -> None:
    found = told(signed, "openvino")
    assert found.quantized.report.seconds
    assert found.against.report.seconds
    assert any(d in found.quantized.report.precisions for d in ("int8", "uint8"))
    assert "float32" in found.against.report.precisions


def test_without_times_there_are_findings_still() -> None:
    available = [p for p in unirt.backends() if p.name == "tensorrt" and p.availability.targets]
    if not available:
        pytest.skip("no TensorRT here that builds ahead of time")
    nodes = [
        *q_dq("x"),
        node("DequantizeLinear", ["wq", "s", "z"], "w_dq", "w_DQ"),
        node("MatMul", ["x_dq", "w_dq"], "m", "mm"),
        node("Softmax", ["m"], "y", "soft"),
    ]
    whole = np.random.default_rng(0).integers(-64, 64, (64, 64)).astype(np.int8)
    graph = model(nodes, {**SCALES, "wq": whole}, {"x": (64, 64)}, {"y": (64, 64)})
    found = explain(graph, "tensorrt@aot")
    assert found.ratio is found.cost is None
    assert about(found, "x_Q").kind == "border"
    assert any("cannot run here" in note for note in found.notes)


# --- what it costs, exactly ----------------------------------------------------------------------


def split_relu() -> Any:
    """x → Q/DQ → Conv → Q/DQ → Relu → Q/DQ → Conv."""
    nodes = [
        *q_dq("x"),
        node("DequantizeLinear", ["w", "s", "zw"], "w_dq", "w_DQ"),
        node("Conv", ["x_dq", "w_dq"], "c", "conv"),
        *q_dq("c"),
        node("Relu", ["c_dq"], "r", "relu"),
        *q_dq("r"),
        node("Conv", ["r_dq", "w_dq"], "y", "last"),
    ]
    scales = {"s": np.float32(0.05), "z": np.uint8(128), "zw": np.int8(0)}
    whole = {"w": np.ones((3, 3, 3, 3), np.int8)}
    return model(nodes, {**scales, **whole}, {"x": IMAGE}, {"y": (1, 3, 20, 20)})


def layer(
    kind: str, nodes: str, reads: str, writes: str, microseconds: float | None = None
) -> unirt.Layer:
    """`reads` and `writes` are `name:dtype`."""

    def tensor(text: str) -> unirt.LayerTensor:
        return unirt.LayerTensor(*text.split(":"))

    seconds = None if microseconds is None else microseconds * 1e-6
    read, written = (tensor(reads),), (tensor(writes),)
    return unirt.Layer(f"{kind} {nodes}", kind, tuple(nodes.split()), read, written, "", seconds)


def diagnosed(last: float = 4, *, timed: bool = True) -> dict[tuple[str, ...], Finding]:
    graph = Graph(split_relu())

    def report(*layers: unirt.Layer) -> unirt.EngineReport:
        kept = layers if timed else [replace(one, seconds=None) for one in layers]
        return unirt.EngineReport(tuple(kept), "optimized graph", graph.ops)

    ours = report(
        layer("QuantizeLinear", "x_Q", "x:float32", "x_q:uint8", 3),
        layer("QLinearConv", "x_DQ w_DQ conv c_Q", "x_q:uint8", "c1:uint8", 8),
        layer("Transpose", "", "c1:uint8", "c2:uint8", 2),
        layer("DequantizeLinear", "c_DQ", "c2:uint8", "c_dq:float32", 4),
        layer("Relu", "relu", "c_dq:float32", "r:float32", 5),
        layer("QuantizeLinear", "r_Q", "r:float32", "r_q:uint8", 6),
        layer("QLinearConv", "r_DQ last", "r_q:uint8", "y:float32", last),
    )
    theirs = report(
        layer("Conv", "conv relu", "x:float32", "r:float32", 10),
        layer("Conv", "last", "r:float32", "y:float32", 7),
    )
    found = Diagnosis(graph, ours, theirs, "onnxruntime", "cpu").findings()
    return {one.nodes: one for one in found}


def microseconds(one: Finding) -> float:
    return round((one.seconds or 0.0) * 1e6, 6)


def test_every_microsecond_is_in_one_finding() -> None:
    found = diagnosed()
    assert [microseconds(one) for one in found.values()] == [13, 3, 2]
    relu = found["relu", "c_DQ", "r_Q"]
    assert microseconds(relu) == 4 + 6 + (8 + 5 - 10), "Q/DQ, and what fusion saved"
    assert relu.what.endswith("without Q/DQ, conv, relu are one layer")
    assert found["x_Q",].kind == "border"


def test_a_reformat_beside_a_float_layer_says_which_one_to_quantize() -> None:
    one = diagnosed()["conv", "relu"]
    assert one.kind == "reformat"
    assert one.what.startswith("Transpose inserted between conv and relu")
    assert one.edit == "quantize Relu 'relu' too, so that the layout can stay"


def test_a_layer_slower_than_in_floats_is_a_finding_of_its_own() -> None:
    assert ("last",) not in diagnosed(last=7.5), "no difference to speak of"
    one = diagnosed(last=9)["last",]
    assert one.kind == "slower"
    assert microseconds(one) == 2
    assert one.what == "last: 9 µs in uint8, 7 µs in float32"
    assert one.edit == (
        "keep Conv 'last' in float: let it read 'r' instead of r_DQ and float weights"
    )


def test_without_times_nothing_costs_anything() -> None:
    found = diagnosed(timed=False)
    assert set(found) == {("relu", "c_DQ", "r_Q"), ("x_Q",), ("conv", "relu")}
    assert {one.seconds for one in found.values()} == {None}


# --- against something else ----------------------------------------------------------------------


def test_the_float_network_may_be_given(signed: Path) -> None:
    given = signed.with_suffix(".float.onnx")
    found = explain(signed, "onnxruntime", str(given), options=ONE, seconds=0.02)
    assert found.against.name == given.stem
    assert about(found, "conv2").kind == "float"


def test_the_same_graph_on_another_engine_may_be_the_measure(signed: Path) -> None:
    found = explain(signed, "onnxruntime", "openvino", options=ONE, seconds=0.02)
    assert found.against.candidate == "openvino"
    assert any(d in found.against.report.precisions for d in ("int8", "uint8"))
    assert about(found, "relu1").kind == "unfused"


def test_nameless_nodes_get_names_that_findings_use(unsigned: Path) -> None:
    graph = onnx.load(unsigned)
    for one in graph.graph.node:
        one.name = ""
    found = explain(graph, "onnxruntime", options=ONE, seconds=0.02)
    first = graph.graph.node
    place = next(i for i, one in enumerate(first) if one.output[0] == "x_QuantizeLinear_Output")
    assert f"QuantizeLinear_{place}" in found.quantized.report.graph
    assert not found.quantized.report.missing


@pytest.mark.parametrize(
    ("make", "engine", "error", "told"),
    [
        (residual_net, "onnxruntime", unirt.ModelError, "nothing to explain"),
        (None, "reference", unirt.BackendUnavailable, "does not show its layers"),
        (None, "nosuch", unirt.BackendUnavailable, "no backend 'nosuch'"),
        (None, "onnxruntime@", unirt.CandidateError, "onnxruntime@"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    signed: Path, make: Any, engine: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        explain(make() if make else signed, engine, seconds=0.02)


def test_a_network_with_other_inputs_is_no_measure(signed: Path) -> None:
    nodes = [node("Relu", ["z"], "y", "relu")]
    with pytest.raises(unirt.ModelError, match="cannot be held against"):
        explain(signed, "onnxruntime", model(nodes, {}, {"z": (1, 2)}, {"y": (1, 2)}))


def test_data_of_another_shape_is_refused(signed: Path) -> None:
    with pytest.raises(unirt.UnirtError):
        explain(signed, "onnxruntime", data={"x": np.zeros((1, 2, 3), np.float32)})


# --- shown ---------------------------------------------------------------------------------------


def unirt_explain(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli.app, ["explain", *arguments], env={"COLUMNS": "140"})
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_shows_findings_with_time_and_edit(signed: Path) -> None:
    text = unirt_explain(str(signed), "--engine", "onnxruntime", "--seconds", "0.02", "--most", "2")
    lines = text.splitlines()
    assert lines[0].startswith("s8 is ")
    assert " than s8 without Q/DQ on onnxruntime" in lines[0]
    assert "What costs time" in lines
    assert text.count("→") >= 2
    assert "more; --most" in text


def test_the_document_holds_everything(signed: Path) -> None:
    document = json.loads(
        unirt_explain(str(signed), "-c", "onnxruntime", "--seconds", "0.02", "--json")
    )
    one = next(f for f in document["findings"] if f["nodes"][0] == "relu1")
    assert one["kind"] == "unfused"
    assert one["seconds"] > 0
    report = unirt.EngineReport.from_dict(document["quantized"]["report"])
    assert "relu1" in report.graph
    assert document["ratio"] > 0


def test_the_command_refuses_an_engine_that_shows_no_layers_before_it_builds(signed: Path) -> None:
    assert "does not show its layers" in unirt_explain(str(signed), "-c", "reference", code=1)
