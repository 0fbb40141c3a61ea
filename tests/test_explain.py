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
from unirt.explanation.cures import cures_for
from unirt.explanation.diagnosis import Diagnosis, Finding, worth
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
        "put Q/DQ behind Relu 'relu1' with zero point 0 (uint8), as the cpu recipe does, not "
        "between Conv 'conv1' and it: take out c1_QuantizeLinear, c1_DequantizeLinear"
    )
    assert "r1_QuantizeLinear behind Relu 'relu1' has zero point 0, not the lowest int8" in one.what


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
            assert one.edit == about(told(signed), "relu1").edit


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


# --- the true cause, and an edit that helps ------------------------------------------------------


LOWEST = np.uint8(0)


class Net:
    """A quantized network, node by node. Tensors are called after the node that gives them."""

    def __init__(self, channels: int = 8, floats: Any = np.float32) -> None:
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self.channels, self.floats = channels, floats
        self.rng = np.random.default_rng(0)

    def op(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(node(op, list(inputs), name, name, **attributes))
        return name

    def keep(self, name: str, value: Any) -> str:
        self.weights[name] = value
        return name

    def scale(self, name: str, value: float, by_channel: bool) -> str:
        several = self.rng.uniform(value / 2, value, self.channels)
        return self.keep(name, several.astype(self.floats) if by_channel else self.floats(value))

    def q_dq(
        self, of: str, zero: Any = LOWEST, scale: float = 0.05, by_channel: bool = False
    ) -> str:
        how = {"axis": 1} if by_channel else {}
        zeros = np.full(self.channels, zero) if by_channel else zero
        given = [self.scale(f"{of}_s", scale, by_channel), self.keep(f"{of}_z", zeros)]
        self.op("QuantizeLinear", f"{of}_Q", of, *given, **how)
        return self.op("DequantizeLinear", f"{of}_DQ", f"{of}_Q", *given, **how)

    def quantized(
        self, of: str, shape: tuple[int, ...], axis: int, by_channel: bool, zero: bool = True
    ) -> str:
        whole = self.keep(f"{of}_w", self.rng.integers(-63, 64, shape).astype(np.int8))
        given = [whole, self.scale(f"{of}_ws", 0.004, by_channel)]
        if zero:
            zeros = np.zeros(self.channels, np.int8) if by_channel else np.int8(0)
            given.append(self.keep(f"{of}_wz", zeros))
        how = {"axis": axis} if by_channel else {}
        return self.op("DequantizeLinear", f"{of}_WDQ", *given, **how)

    def bias(self, of: str) -> str:
        return self.keep(f"{of}_b", self.rng.normal(0, 0.1, self.channels).astype(self.floats))

    def integer_bias(self, of: str) -> str:
        whole = self.rng.integers(-500, 500, self.channels).astype(np.int32)
        scale = 0.05 * self.weights[f"{of}_ws"].astype(np.float32)
        given = [self.keep(f"{of}_bq", whole), self.keep(f"{of}_bs", scale)]
        return self.op("DequantizeLinear", f"{of}_BDQ", *given, axis=0)

    def conv(self, name: str, given: str, *, low: bool = True, bias: str = "") -> str:
        shape = (self.channels, self.channels, 3, 3)
        if low:
            weight = self.quantized(name, shape, 0, by_channel=True)
        else:
            weight = self.keep(f"{name}_w", self.rng.normal(0, 0.1, shape).astype(np.float32))
        biases = {"": (), "float": (self.bias,), "int32": (self.integer_bias,)}[bias]
        more = [one(name) for one in biases]
        return self.op("Conv", name, given, weight, *more, pads=[1, 1, 1, 1])

    def matmul(self, name: str, given: str, *, by_channel: bool = True, zero: bool = True) -> str:
        weight = self.quantized(name, (self.channels, self.channels), 1, by_channel, zero)
        return self.op("MatMul", name, given, weight)

    def add(self, name: str, given: str) -> str:
        return self.op("Add", name, given, self.bias(name))

    def model(self, *outputs: str, image: bool = True, opset: int = 17) -> Any:
        shape = (1, self.channels, 12, 12) if image else (4, self.channels)
        return model(self.nodes, self.weights, {"x": shape}, dict.fromkeys(outputs, shape), opset)


def seen(graph: Any, engine: str = "onnxruntime") -> list[Finding]:
    """What is found by inspection alone, without times."""
    asked = Graph(graph)
    with (
        unirt.build(graph, engine, options=ONE) as one,
        unirt.build(dequantize(graph).model, engine, options=ONE) as two,
    ):
        cures = cures_for(engine, asked, "cpu", one.facts)
        return Diagnosis(asked, one.inspect(), two.inspect(), cures).findings()


def cause(graph: Any, name: str, engine: str = "onnxruntime") -> tuple[str, str]:
    """What is told of a node, and the edit."""
    (one,) = [one for one in seen(graph, engine) if name in one.nodes and one.kind != "reformat"]
    return one.what, one.edit


def types(graph: Any, engine: str = "onnxruntime") -> dict[str, str]:
    """What each node of the graph is computed in."""
    with unirt.build(graph, engine, options=ONE) as built:
        report = built.inspect()
    return {node: report.precision(layer) for layer in report.layers for node in layer.nodes}


def is_integer(graph: Any, *names: str, engine: str = "onnxruntime") -> bool:
    """Whether all these nodes are computed in integers, and no Q/DQ but the border's are left."""
    found = types(graph, engine)
    inside = [one for one in seen(graph, engine) if one.kind in ("float", "unfused", "idle")]
    return not inside and all(found[name] in ("uint8", "int8") for name in names)


def behind_relu(zero: Any, between: bool = False, by_channel: bool = False) -> Any:
    net = Net()
    rounded = net.conv("conv", net.q_dq("x", zero, by_channel=by_channel))
    if between:
        rounded = net.q_dq(rounded, zero)
    relu = net.q_dq(net.op("Relu", "relu", rounded), zero, by_channel=by_channel)
    return net.model(net.q_dq(net.conv("last", relu), zero))


FROM_ZERO = "quantize behind Relu 'relu' with zero point 0 (uint8), as the cpu recipe does"


@pytest.mark.parametrize("zero", [np.uint8(128), np.int8(0), np.int8(-17)])
def test_a_relu_joins_a_product_only_where_rounding_does_the_same(zero: Any) -> None:
    what, edit = cause(behind_relu(zero), "conv")
    told = f"relu_Q behind Relu 'relu' has zero point {zero}, not the lowest {zero.dtype}, so that"
    assert what.startswith("Conv 'conv' computes in float32, although its operands are quantized: ")
    assert f"{told} the Relu cannot become part of it" in what
    assert edit == FROM_ZERO
    assert is_integer(behind_relu(LOWEST), "conv", "last")


def test_the_lowest_zero_point_of_a_signed_type_is_fine() -> None:
    assert is_integer(behind_relu(np.int8(-128)), "conv", "last")


def test_a_pair_before_a_relu_is_moved_together_with_its_zero_point() -> None:
    what, edit = cause(behind_relu(np.uint8(128), between=True), "relu")
    assert "relu_Q behind Relu 'relu' has zero point 128, not the lowest uint8" in what
    assert edit == (
        "put Q/DQ behind Relu 'relu' with zero point 0 (uint8), as the cpu recipe does, not "
        "between Conv 'conv' and it: take out conv_Q, conv_DQ"
    )
    assert types(behind_relu(np.uint8(128)))["conv"] == "float32", "half of the edit is worse"
    assert is_integer(behind_relu(LOWEST), "conv", "last")


def test_a_pair_before_a_relu_parts_it_from_its_product_in_integers_too() -> None:
    what, edit = cause(behind_relu(np.uint8(128), between=True), "relu", "openvino")
    assert what == "Relu 'relu' has a kernel of its own"
    assert edit == (
        "put Q/DQ behind Relu 'relu', not between Conv 'conv' and it: take out conv_Q, conv_DQ"
    )


def test_a_pair_that_others_read_too_is_not_taken_out() -> None:
    net = Net()
    pair = net.q_dq(net.conv("conv", net.q_dq("x")), np.uint8(99))
    relu = net.q_dq(net.op("Relu", "relu", pair), np.uint8(128))
    graph = net.model(net.q_dq(net.op("Add", "add", pair, relu), np.uint8(99)))
    assert (
        cause(graph, "relu")[1]
        == "keep Relu 'relu' in float: let it read 'conv' instead of conv_DQ"
    )


def test_openvino_takes_any_zero_point_behind_a_relu() -> None:
    assert is_integer(behind_relu(np.uint8(128)), "conv", "last", engine="openvino")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_activations_with_a_scale_per_channel_are_the_cause(engine: str) -> None:
    what, edit = cause(behind_relu(LOWEST, by_channel=True), "conv", engine)
    assert "its activations have a scale per channel, and kernels take one per tensor" in what
    assert edit == "give x_Q, x_DQ, relu_Q, relu_DQ one scale for all channels"
    assert is_integer(behind_relu(LOWEST), "conv", "last", engine=engine)


def test_two_causes_are_both_told() -> None:
    what, edit = cause(behind_relu(np.uint8(128), by_channel=True), "conv")
    assert "a scale per channel" in what
    assert "has zero point 128" in what
    assert edit == f"give x_Q, x_DQ, relu_Q, relu_DQ one scale for all channels; {FROM_ZERO}"


def beside_a_float_convolution(bias: str) -> Any:
    """With a float product between Q/DQ, UniRT keeps ONNX Runtime from quantizing biases."""
    net = Net()
    first = net.conv("conv", net.q_dq("x"), bias=bias)
    middle = net.conv("middle", net.q_dq(net.op("Relu", "relu", first)), low=False)
    return net.model(net.q_dq(net.conv("last", net.q_dq(middle))))


def test_a_float_bias_is_the_cause_where_all_else_is_quantized() -> None:
    what, edit = cause(beside_a_float_convolution("float"), "conv")
    assert "although its operands are quantized: its bias 'conv_b' is float32" in what
    assert edit == (
        "quantize the bias 'conv_b' too, to int32 with the scale of the activations times that of "
        "the weight, as the cpu recipe does"
    )
    found = types(beside_a_float_convolution("int32"))
    assert [found["conv"], found["middle"]] == ["uint8", "float32"]


def behind_clip(top: float) -> Any:
    net = Net()
    limits = net.keep("low", np.float32(0)), net.keep("high", np.float32(6))
    clip = net.op("Clip", "clip", net.conv("conv", net.q_dq("x")), *limits)
    return net.model(net.q_dq(net.conv("last", net.q_dq(clip, scale=top / 255))))


def test_a_clip_joins_a_product_only_where_rounding_reaches_no_further() -> None:
    what, edit = cause(behind_clip(8), "conv")
    assert "clip_Q behind Clip 'clip' has a wider range, so that the Clip cannot" in what
    assert edit == "quantize behind Clip 'clip' with a range within 0 to 6, as the cpu recipe does"
    assert is_integer(behind_clip(6), "conv", "last")


def behind_leaky_relu(between: bool) -> Any:
    net = Net()
    given = net.conv("conv", net.q_dq("x"))
    leaky = net.op("LeakyRelu", "leaky", net.q_dq(given, np.uint8(9)) if between else given)
    return net.model(net.q_dq(net.conv("last", net.q_dq(leaky, np.uint8(9)))))


def test_an_activation_that_joins_no_product_wants_q_dq_before_it() -> None:
    what, edit = cause(behind_leaky_relu(between=False), "conv")
    assert "ONNX Runtime makes only Relu and Clip part of a product" in what
    assert edit == "put Q/DQ between Conv 'conv' and LeakyRelu 'leaky' too"
    assert is_integer(behind_leaky_relu(between=True), "conv", "leaky", "last")
    assert is_integer(behind_leaky_relu(between=False), "conv", "last", engine="openvino")


def read_twice(by: str, rounded: bool) -> Any:
    net = Net()
    relu = net.op("Relu", "relu", net.conv("conv", net.q_dq("x")))
    quantized = net.q_dq(relu)
    last = net.q_dq(net.conv("last", quantized))
    again = quantized if rounded else relu
    if by == "output":
        return net.model(last, again)
    return net.model(last, net.op("Erf", "erf", again))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("by", "told"), [("output", "the network's output 'relu'"), ("erf", "Erf 'erf'")]
)
def test_a_result_that_is_wanted_in_floats_too_may_be_the_rounded_one(
    by: str, told: str, engine: str
) -> None:
    what, edit = cause(read_twice(by, rounded=False), "relu_Q", engine)
    assert f"what Relu 'relu' gives is wanted in floats too, by {told}" in what
    assert edit == f"let {told} take what relu_DQ gives instead"
    found = types(read_twice(by, rounded=True), engine)
    assert found["conv"] in ("uint8", "int8")
    left = [one for one in seen(read_twice(by, True), engine) if one.kind != "reformat"]
    assert not [one for one in left if "conv" in one.nodes]


def test_a_product_in_integers_is_not_told_to_be_in_floats() -> None:
    """OpenVINO names the Convolution itself after no node here, but only what follows it."""
    kinds = {one.kind for one in seen(read_twice("output", rounded=False), "openvino")}
    assert "float" not in kinds


def before_bias(between: bool, relu: bool) -> Any:
    net = Net(16)
    given = net.matmul("mm", net.q_dq("x"))
    last = net.add("add", net.q_dq(given, np.uint8(128)) if between else given)
    if relu:
        last = net.op("Relu", "relu", last)
    return net.model(net.q_dq(net.matmul("last", net.q_dq(last))), image=False)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("relu", [False, True])
def test_a_pair_between_a_product_and_its_bias_is_in_the_way(relu: bool, engine: str) -> None:
    _, edit = cause(before_bias(True, relu), "add", engine)
    behind, between = ("Relu 'relu'", "Add 'add'") if relu else ("Add 'add'", "it")
    assert edit == (
        f"put Q/DQ behind {behind}, not between MatMul 'mm' and {between}: take out mm_Q, mm_DQ"
    )
    assert is_integer(before_bias(False, relu), "mm", "last", engine=engine)


def without_zero_point(zero: bool) -> Any:
    net = Net(16)
    return net.model(
        net.q_dq(net.add("add", net.matmul("mm", net.q_dq("x"), zero=zero))), image=False
    )


def test_a_weight_without_zero_point_keeps_a_product_and_its_bias_apart() -> None:
    what, edit = cause(without_zero_point(zero=False), "mm")
    assert "mm_WDQ has no zero point, which ONNX Runtime's integer Gemm wants" in what
    assert edit == "give mm_WDQ a zero point, which is 0"
    assert is_integer(without_zero_point(zero=True), "mm", "add")


def as_torch_exports(moved: bool) -> Any:
    """Eager fake quantization: a pair behind each convolution, none behind its ReLU."""
    net = Net()
    last = net.q_dq("x")
    for name in ("one", "two", "three"):
        last = net.conv(name, last, bias="float")
        if not moved:
            last = net.q_dq(last, np.uint8(70))
        last = net.op("Relu", f"relu_{name}", last)
        if moved:
            last = net.q_dq(last)
    return net.model(last if moved else net.q_dq(last))


def test_a_convolution_without_quantized_input_is_traced_to_the_pair_before_the_relu() -> None:
    found = [one for one in seen(as_torch_exports(moved=False)) if one.kind in ("float", "unfused")]
    by_first = {one.nodes[0]: one for one in found}
    one = by_first["relu_one"]
    assert set(one.nodes) == {"relu_one", "two", "one_DQ", "two_Q", "two_WDQ"}
    assert one.edit == (
        "put Q/DQ behind Relu 'relu_one' with zero point 0 (uint8), as the cpu recipe does, not "
        "between Conv 'one' and it: take out one_Q, one_DQ"
    )
    assert by_first.keys() == {"relu_one", "relu_two", "relu_three"}
    assert not any("nothing at this place" in one.edit for one in found)
    assert is_integer(as_torch_exports(moved=True), "one", "two", "three")


def test_a_product_with_quantized_weights_only_wants_its_input_quantized() -> None:
    net = Net(16)
    soft = net.op("Softmax", "soft", net.matmul("mm", net.q_dq("x")))
    graph = net.model(net.q_dq(net.matmul("last", soft)), image=False)
    _, edit = cause(graph, "last")
    assert edit == "quantize the input of MatMul 'last' too: it comes from Softmax 'soft'"


# --- on TensorRT ---------------------------------------------------------------------------------

needs_tensorrt = pytest.mark.skipif(
    not any(p.name == "tensorrt" and p.availability.targets for p in unirt.backends()),
    reason="no TensorRT here that builds ahead of time",
)


def perceptron(*, by_channel: bool, bias: bool) -> Any:
    net = Net(64)
    last = "x"
    for name in ("one", "two"):
        last = net.matmul(name, net.q_dq(last, np.int8(0)), by_channel=by_channel)
        if bias:
            last = net.add(f"add_{name}", last)
        last = net.op("Relu", f"relu_{name}", last)
    return net.model(last, image=False)


def split(graph: Any) -> Finding | None:
    found = explain(graph, "tensorrt@aot").findings
    assert not [one for one in found if one.kind == "float"]
    return next((one for one in found if one.kind == "unfused"), None)


@needs_tensorrt
def test_rounding_behind_a_product_needs_one_scale_to_be_part_of_it() -> None:
    one = split(perceptron(by_channel=True, bias=False))
    assert one is not None
    assert one.nodes == ("one",)
    assert one.what == (
        "MatMul 'one' gives floats, which a kernel of its own rounds: the weight has a scale per "
        "channel"
    )
    assert one.edit == (
        "give the weight one scale, as the tensorrt-rtx recipe does: product, activation and "
        "rounding become one kernel"
    )
    assert split(perceptron(by_channel=False, bias=False)) is None


@needs_tensorrt
def test_a_bias_keeps_rounding_out_of_the_product_too() -> None:
    one = split(perceptron(by_channel=True, bias=True))
    assert one is not None
    assert one.what.endswith("the weight has a scale per channel, and there is a bias")
    assert one.edit.endswith("become one kernel where there is no bias either")
    one = split(perceptron(by_channel=False, bias=True))
    assert one is not None
    assert one.edit.startswith("nothing while there is a bias")


@needs_tensorrt
def test_fake_quantization_of_weights_is_not_that_of_the_input() -> None:
    """As torch.ao exports: TensorRT for RTX computes all of it in floats, which is one finding."""
    net = Net(16)
    last = net.q_dq("x", np.int8(0))
    for name in ("one", "two"):
        weight = net.keep(f"{name}_w", net.rng.normal(0, 0.1, (16, 16, 3, 3)).astype(np.float32))
        last = net.op("Conv", name, last, net.q_dq(weight, np.int8(0), 0.01), pads=[1, 1, 1, 1])
        last = net.op("Relu", f"relu_{name}", net.q_dq(last, np.int8(0)))
    (one,) = explain(net.model(last), "tensorrt@aot").findings
    assert one.kind == "float"
    assert one.nodes[:2] == ("one", "two")
    assert {"x_Q", "one_Q", "two_DQ", "two_w_Q", "two_w_DQ"} <= set(one.nodes)
    assert "TensorRT for RTX has no int8 convolution" in one.what
    assert one.edit == "take out the Q/DQ around convolutions, as the tensorrt-rtx recipe does"


@needs_tensorrt
def test_a_candidate_in_fp16_besides_is_seen_through_its_casts(tmp_path: Path) -> None:
    net = Net(64)
    weight = net.keep("w", net.rng.normal(0, 0.1, (64, 64)).astype(np.float32))
    relu = net.op("Relu", "relu", net.op("MatMul", "mm", "x", weight))
    graph = net.model(net.op("MatMul", "last", relu, weight), image=False)
    data = {"x": np.ones((4, 64), np.float32)}
    found = explain(graph, "tensorrt@aot:int8", data=data)
    assert any("Cast" in op for op in found.quantized.report.graph.values())
    (border,) = found.findings
    assert border.kind == "border"
    assert border.what == "x__quantize quantizes the network's input"


# --- a graph, through what only hands on ---------------------------------------------------------


def through(*ops: str) -> Graph:
    """A product with nodes between it and each of its Q/DQ."""
    attributes: dict[str, Any] = {"Cast": {"to": 10}, "Transpose": {"perm": [1, 0]}}

    def pass_on(name: str, back: bool = False) -> str:
        for op in ops:
            how = {"to": 1} if back and op == "Cast" else attributes.get(op, {})
            name = net.op(op, f"{name}_{op}{back}", name, **how)
        return name

    net = Net(8, np.float32)
    net.q_dq("x", np.int8(0))
    weight = net.quantized("mm", (8, 8), 1, by_channel=True)
    net.op("MatMul", "mm", pass_on("x_DQ"), pass_on(weight))
    net.op("Relu", "relu", "mm")
    net.q_dq(pass_on("relu", back=True), np.int8(0))
    end = net.nodes[-1].output[0]
    out = net.op("Identity", "out", end)
    values = [onnx.helper.make_tensor_value_info(n, FLOAT, (8, 8)) for n in ("x", out)]
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in net.weights.items()]
    graph = onnx.helper.make_graph(net.nodes, "g", values[:1], values[1:], tensors)
    return Graph(onnx.helper.make_model(graph))


@pytest.mark.parametrize("ops", [(), ("Cast",), ("Transpose",), ("Identity", "Cast", "Transpose")])
def test_a_graph_is_asked_through_casts_and_moves(ops: tuple[str, ...]) -> None:
    graph = through(*ops)
    assert graph.is_quantized("mm")
    (given,) = graph.data("mm")
    assert graph.dequantizer(given) == "x_DQ"
    assert graph.pair("x_DQ") == "x_Q"
    assert graph.at_border("x_Q") == "input"
    (quantizer,) = [name for name in graph.ops if graph.rounded(name) == "relu"][-1:]
    assert graph.readers("relu") == [quantizer]
    (dequantizer,) = graph.readers(quantizer)
    assert graph.source(dequantizer) == "relu"
    assert graph.at_border(dequantizer) == "output"
    assert graph.is_constant("mm_WDQ")
    assert graph.at_border("mm_WDQ") == ""
    assert graph.is_signed(quantizer)
    assert (graph.scales("mm_WDQ"), graph.scales("x_DQ")) == (8, 1)


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
    cures = cures_for("onnxruntime", graph, "cpu")
    return {one.nodes: one for one in Diagnosis(graph, ours, theirs, cures).findings()}


def microseconds(one: Finding) -> float:
    return round((one.seconds or 0.0) * 1e6, 6)


def test_every_microsecond_is_in_one_finding() -> None:
    found = diagnosed()
    assert [microseconds(one) for one in found.values()] == [13, 3, 2]
    relu = found["relu", "c_DQ", "r_Q"]
    assert microseconds(relu) == 4 + 6 + (8 + 5 - 10), "Q/DQ, and what fusion saved"
    assert "without Q/DQ, conv, relu are one layer" in relu.what
    assert found["x_Q",].kind == "border"


def test_a_reformat_beside_a_float_layer_goes_with_the_edit_of_that() -> None:
    found = diagnosed()
    one = found["conv", "relu"]
    assert one.kind == "reformat"
    assert one.what.startswith("Transpose inserted between conv and relu")
    assert one.edit == found["relu", "c_DQ", "r_Q"].edit
    assert one.edit.endswith("not between Conv 'conv' and it: take out c_Q, c_DQ")


def test_a_layer_slower_than_in_floats_is_a_finding_of_its_own() -> None:
    assert ("last",) not in diagnosed(last=7.5), "no difference to speak of"
    one = diagnosed(last=9)["last",]
    assert one.kind == "slower"
    assert microseconds(one) == 2
    assert one.what == "last: 9 µs in uint8, 7 µs in float32"
    assert one.edit == (
        "keep Conv 'last' in float: let it read 'r' instead of r_DQ and float weights"
    )


def test_rounding_in_a_kernel_of_its_own_costs_what_floats_do_not_spend() -> None:
    net = Net(16)
    given = net.matmul("mm", net.q_dq("x", np.int8(0)))
    graph = Graph(net.model(net.q_dq(net.op("Relu", "relu", given), np.int8(0)), image=False))

    def report(*layers: unirt.Layer) -> unirt.EngineReport:
        return unirt.EngineReport(layers, "engine inspector", graph.ops)

    product = layer("gemm", "x_DQ mm_WDQ mm", "x_Q:int8", "m:float32", 5)
    rounding = layer("kgen", "x_DQ mm_WDQ mm relu relu_Q", "m:float32", "q:int8", 4)
    ours = report(
        replace(product, operations=("matmul",)),
        replace(rounding, operations=("mul", "relu", "round", "cast")),
    )
    cures = cures_for("tensorrt", graph, "cuda", {"flavour": "tensorrt_rtx"})
    for theirs in ((30.0, 0.0), (20.0, 1.0), (6.0, 1.0)):
        against = report(
            layer("gemm", "mm", "x:float32", "m:float32", theirs[0]),
            layer("kgen", "relu", "m:float32", "y:float32", theirs[1]),
        )
        (one,) = Diagnosis(graph, ours, against, cures).findings()
        assert one.nodes == ("mm",)
        assert microseconds(one) == 4 - theirs[1]


def test_without_times_nothing_costs_anything() -> None:
    found = diagnosed(timed=False)
    assert set(found) == {("relu", "c_DQ", "r_Q"), ("x_Q",), ("conv", "relu")}
    assert {one.seconds for one in found.values()} == {None}


# --- what is worth a line ------------------------------------------------------------------------


def finding(name: str, microseconds: float | None, kind: Any = "slower") -> Finding:
    return Finding(kind, (name,), "", "", None if microseconds is None else microseconds * 1e-6)


def names(found: list[Finding]) -> list[str]:
    return [one.nodes[0] for one in found]


def test_what_costs_a_fiftieth_or_less_is_left_out() -> None:
    found = [finding("small", 2), finding("large", 30), finding("just", 2.1)]
    assert names(worth(found, [found] * 5, 100e-6)) == ["large", "just"]


def test_what_costs_only_sometimes_is_left_out() -> None:
    steady, noise = finding("steady", 10), finding("noise", 10)
    calm = [finding("steady", 6)]
    assert names(worth([steady, noise], [[steady, noise], calm, calm], 100e-6)) == ["steady"]
    once = [[noise]] * 4 + [calm]
    assert names(worth([noise], once, 100e-6)) == ["noise"], "one round in five may differ"


def test_without_times_and_in_floats_all_is_told() -> None:
    found = [finding("untimed", None, "unfused"), finding("float", 0, "float")]
    assert sorted(names(worth(found, [], 100e-6))) == ["float", "untimed"]
    assert sorted(names(worth(found, [found] * 3, None))) == ["float", "untimed"]


def test_layers_are_timed_in_rounds_of_which_the_middle_counts(
    unsigned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = unirt.Session.profile, []

    def profile(self: unirt.Session, inputs: Any) -> unirt.EngineReport:
        asked.append(self.engine.model.name)
        report = real(self, inputs)
        factor = {1: 1.0, 2: 9.0}.get(asked.count(asked[-1]), 3.0)
        layers = tuple(replace(one, seconds=factor * 1e-3) for one in report.layers)
        return replace(report, layers=layers)

    monkeypatch.setattr(unirt.Session, "profile", profile)
    found = explain(unsigned, "onnxruntime", options=ONE, seconds=0.02)
    assert asked == [found.quantized.name, found.against.name] * 5
    assert {one.seconds for one in found.quantized.report.layers} == {3e-3}


# --- a candidate that quantizes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def floats(folder: Path) -> Path:
    path = folder / "floats.onnx"
    onnx.save(residual_net(), path)
    return path


@pytest.fixture(scope="module")
def samples(folder: Path) -> Path:
    path = folder / "samples.npz"
    rng = np.random.default_rng(2)
    np.savez(path, x=rng.standard_normal((4, *IMAGE[1:])).astype(np.float32))
    return path


def test_a_candidate_with_a_precision_is_explained_against_the_float_model(
    floats: Path, samples: Path
) -> None:
    found = explain(
        floats, "onnxruntime:int8", data=samples, options=ONE, shapes=None, seconds=0.02
    )
    assert (found.quantized.name, found.quantized.candidate) == (
        "floats in int8",
        "onnxruntime:int8",
    )
    assert (found.against.name, found.against.candidate) == ("floats", "onnxruntime")
    assert "uint8" in found.quantized.report.precisions
    assert set(found.against.report.precisions) == {"float32"}
    assert any("by the recipe cpu" in note for note in found.notes)
    assert found.data.startswith("4 samples")


def test_a_calibration_is_enough(floats: Path, samples: Path, tmp_path: Path) -> None:
    from unirt.precision import calibrate

    path = tmp_path / "ranges.json"
    calibrate(floats, samples).save(path)
    found = explain(floats, "onnxruntime:int8", calibration=path, options=ONE, seconds=0.02)
    assert "uint8" in found.quantized.report.precisions
    assert found.data.startswith("random inputs")


def test_weights_alone_need_no_ranges(floats: Path) -> None:
    found = explain(floats, "onnxruntime:int8w", options=ONE, seconds=0.02)
    (one,) = [one for one in found.findings if "conv2" in one.nodes and one.kind == "unfused"]
    assert one.edit == "quantize the input of Conv 'conv2' too: it comes from Relu 'relu1'"


def test_a_precision_that_the_graph_has_is_the_graph(unsigned: Path) -> None:
    found = explain(unsigned, "onnxruntime:int8", options=ONE, seconds=0.02)
    assert found.quantized.name == "u8"
    assert found.against.candidate == "onnxruntime"


def test_another_candidate_runs_the_model_that_was_given(floats: Path, samples: Path) -> None:
    found = explain(floats, "onnxruntime:int8", "openvino:int8", samples, options=ONE, seconds=0.02)
    assert (found.against.name, found.against.candidate) == ("floats", "openvino:int8")
    assert "uint8" in found.against.report.precisions


def test_without_ranges_it_is_said_how_to_give_them(floats: Path) -> None:
    with pytest.raises(unirt.DataError, match=r"needs the ranges.* Give data \(--data FILE.npz\)"):
        explain(floats, "onnxruntime:int8")


def test_a_float_network_is_refused_with_the_candidate_that_quantizes_it(floats: Path) -> None:
    with pytest.raises(unirt.ModelError, match="or a precision with the engine: onnxruntime:int8"):
        explain(floats, "onnxruntime")


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


def test_a_network_with_other_outputs_is_no_measure(signed: Path) -> None:
    other = residual_net()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "z"
    with pytest.raises(unirt.ModelError, match=r"One gives y, the other z\."):
        explain(signed, "onnxruntime", other)


def test_a_network_of_other_nodes_is_no_measure(signed: Path) -> None:
    other = residual_net()
    for one in other.graph.node[2:]:
        one.name += "_of_another"
    with pytest.raises(unirt.ModelError, match=r"Of 8 nodes that compute, it has 2 of the same"):
        explain(signed, "onnxruntime", other)


def test_nameless_nodes_of_the_float_network_are_known_by_their_results(signed: Path) -> None:
    other = residual_net()
    for one in other.graph.node:
        one.name = ""
    found = explain(signed, "onnxruntime", other, options=ONE, seconds=0.02)
    assert "conv2" in found.against.report.graph


def test_a_tflite_is_refused_with_the_engines_that_work() -> None:
    path = Path(__file__).parent.parent / "examples" / "digits" / "digits.tflite"
    told = "it has tflite. Give the network as ONNX, and an engine that runs it: onnxruntime, open"
    with pytest.raises(unirt.ModelError, match=told):
        explain(path, "tflite")


def test_an_engine_of_another_format_is_refused_with_those_that_work(signed: Path) -> None:
    told = r"it reads tflite\. Use another candidate, such as onnxruntime, openvino or tensorrt"
    with pytest.raises(unirt.BackendUnavailable, match=told):
        explain(signed, "tflite")


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


def test_the_command_quantizes_first_where_the_candidate_has_a_precision(
    floats: Path, samples: Path
) -> None:
    given = [str(floats), "--engine", "onnxruntime:int8", "--data", str(samples)]
    text = unirt_explain(*given, "--seconds", "0.02")
    assert text.splitlines()[0].startswith("floats in int8 is ")
    assert " than floats on onnxruntime" in text.splitlines()[0]
    assert "quantized to int8 by the recipe cpu" in text


def test_the_command_takes_a_calibration_and_says_who_shows_layers() -> None:
    text = " ".join(unirt_explain("--help").replace("│", " ").split())
    assert "--calibration" in text
    assert "onnxruntime, openvino or tensorrt" in text
    assert "no .tflite" in text


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
