"""Quantizing graphs: right answers, integer kernels on real engines, a reason for what stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import unirt
from unirt.accuracy import snr_db
from unirt.precision import (
    RECIPES,
    Calibration,
    Quantized,
    Range,
    calibrate,
    cast,
    quantize,
    recipe_for,
)

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
IMAGES = np.load(DIGITS.parent / "test.npz")

Arrays = Mapping[str, Any]

CONVOLVING = [name for name, one in RECIPES.items() if not one.int8_operators]
"""Recipes for targets that have convolutions in int8."""


class Net:
    """Builds a graph node by node; weights as He and others scale them, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int, gain: float = 2.0, fan: int | None = None) -> str:
        size = (gain / (fan or np.prod(shape[1:]))) ** 0.5
        return self.constant((self.random.standard_normal(shape) * size).astype(np.float32))

    def vector(self, size: int, low: float, high: float) -> str:
        return self.constant(self.random.uniform(low, high, size).astype(np.float32))

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def conv(
        self,
        x: str,
        given: int,
        made: int,
        size: int,
        stride: int = 1,
        group: int = 1,
        act: str = "",
    ) -> str:
        weight = self.weight(made, given // group, size, size, gain=2.0 if act else 1.0)
        pads = [size // 2] * 4
        y = self.add("Conv", x, weight, strides=[stride] * 2, pads=pads, group=group)
        parameters = [(0.5, 1.5), (-0.3, 0.3), (-0.1, 0.1), (0.5, 1.5)]
        y = self.add("BatchNormalization", y, *(self.vector(made, *ends) for ends in parameters))
        if act == "Clip":
            ends = (self.constant(np.float32(0)), self.constant(np.float32(6)))
            return self.add("Clip", y, *ends)
        return self.add(act, y) if act else y

    def linear(self, x: str, given: int, made: int) -> str:
        weight = self.weight(given, made, gain=1.0, fan=given)
        return self.add("Add", self.add("MatMul", x, weight), self.vector(made, -0.1, 0.1))

    def head(self, x: str, given: int) -> str:
        x = self.add("Flatten", self.add("GlobalAveragePool", x))
        weight = self.weight(10, given, gain=1.0)
        return self.add("Gemm", x, weight, self.vector(10, -0.1, 0.1), transB=1)

    def model(self, y: str, given: list[Any], made: list[Any], opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [y], ["y"], "end")],
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, made)],
            self.weights,
        )
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def resnet(seed: int = 0) -> onnx.ModelProto:
    net = Net(seed)
    x = net.conv("x", 3, 16, 7, 2, act="Relu")
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    given = 16
    for made, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2)):
        y = net.conv(x, given, made, 3, stride, act="Relu")
        y = net.conv(y, made, made, 3)
        skip = x if given == made else net.conv(x, given, made, 1, stride)
        x, given = net.add("Relu", net.add("Add", y, skip)), made
    return net.model(net.head(x, given), ["n", 3, 64, 64], ["n", 10])


def mobilenet(seed: int = 0) -> onnx.ModelProto:
    net = Net(seed)
    x, given = net.conv("x", 3, 16, 3, 2, act="Clip"), 16
    for expand, made, stride in ((1, 16, 1), (4, 24, 2), (4, 24, 1), (4, 32, 2), (4, 32, 1)):
        wide = given * expand
        y = net.conv(x, given, wide, 1, act="Clip") if expand > 1 else x
        y = net.conv(y, wide, wide, 3, stride, wide, act="Clip")
        y = net.conv(y, wide, made, 1)
        x = net.add("Add", x, y) if stride == 1 and given == made else y
        given = made
    x = net.conv(x, given, 128, 1, act="Clip")
    return net.model(net.head(x, 128), ["n", 3, 64, 64], ["n", 10])


def transformer(width: int = 64, heads: int = 4, length: int = 16) -> onnx.ModelProto:
    net = Net(0)

    def normed(x: str) -> str:
        ones = net.constant(np.ones(width, np.float32))
        zeros = net.constant(np.zeros(width, np.float32))
        return net.add("LayerNormalization", x, ones, zeros)

    split = net.constant(np.array([0, length, heads, width // heads]))
    join = net.constant(np.array([0, length, width]))
    y = normed("x")
    parts = [net.add("Reshape", net.linear(y, width, width), split) for _ in range(3)]
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    query, key, value = (
        net.add("Transpose", part, perm=order) for part, order in zip(parts, orders, strict=True)
    )
    scores = net.add("MatMul", query, key)
    scaled = net.add("Mul", scores, net.constant(np.float32((width // heads) ** -0.5)))
    mixed = net.add("MatMul", net.add("Softmax", scaled, axis=-1), value)
    joined = net.add("Reshape", net.add("Transpose", mixed, perm=[0, 2, 1, 3]), join)
    x = net.add("Add", "x", net.linear(joined, width, width))
    y = net.add("Relu", net.linear(normed(x), width, 4 * width))
    x = net.add("Add", x, net.linear(y, 4 * width, width))
    return net.model(x, ["n", length, width], ["n", length, width])


def graph(text: str, weights: Arrays, opset: int = 17, ir: int = 8) -> onnx.ModelProto:
    """A model from ONNX's text form, with arrays as initializers."""
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]> {text}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pictures(count: int, seed: int, size: int = 64) -> Arrays:
    x = np.random.default_rng(seed).random((count, 3, size, size))
    return {"x": x.astype(np.float32)}


def run(model: Any, feed: Arrays, exactly: bool = False) -> Any:
    """The first output on ONNX Runtime; `exactly` as the graph says, without its fusions."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if exactly:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(_bytes(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))[0]


def _bytes(model: Any) -> bytes:
    if isinstance(model, Quantized):
        return model.model.primary.read()
    return bytes(model.SerializeToString())


def proto(result: Quantized) -> onnx.ModelProto:
    made = onnx.load_from_string(_bytes(result))
    onnx.checker.check_model(made, full_check=True)
    return made


def opset(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if not entry.domain)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def fused(result: Quantized, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime makes of the graph."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "fused.onnx")
    runtime.InferenceSession(_bytes(result), options, providers=["CPUExecutionProvider"])
    return operators(onnx.load(folder / "fused.onnx"))


def openvino(model: Any) -> Any:
    ov = pytest.importorskip("openvino")
    core = ov.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(_bytes(model)), "CPU", hint)


def array(model: onnx.ModelProto, name: str) -> Any:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def quantized_inputs(model: onnx.ModelProto, name: str) -> list[bool]:
    """For each input of a node whether it comes from a DequantizeLinear."""
    made = {out: n.op_type for n in model.graph.node for out in n.output}
    return [made.get(given) == "DequantizeLinear" for given in node(model, name).input]


def by_hand(**ranges: tuple[float, float]) -> Calibration:
    return Calibration({name: Range(*ends) for name, ends in ranges.items()}, "by hand", 0, "")


MLP = "mlp (float[N,8] x) => (float[N,4] y) { [fc] h = Gemm (x, w, b) [act] r = Relu (h) %s }"
DEEP = MLP % "[out] y = MatMul (r, v)"
DEEP_WEIGHTS = {"w": values(8, 16), "b": values(16, seed=1), "v": values(16, 4, seed=2)}


def deep(**changed: Any) -> onnx.ModelProto:
    return graph(DEEP, DEEP_WEIGHTS | changed)


DEEP_RANGES = {"x": (-3.0, 3.0), "r": (0.0, 9.0), "h": (-9.0, 9.0), "y": (-20.0, 20.0)}


# Accuracy and kernels on real engines


@pytest.mark.parametrize("make", [resnet, mobilenet])
def test_the_cpu_recipe_keeps_accuracy_in_the_engines_integer_kernels(
    make: Any, tmp_path: Path
) -> None:
    model = make()
    found = calibrate(model, [pictures(2, seed) for seed in range(4)], method="max")
    result = quantize(model, found, "int8", "cpu")
    feed = pictures(8, 9)
    wanted = run(model, feed)
    exact = snr_db(run(result, feed, exactly=True), wanted)
    for got in (run(result, feed), openvino(result)(dict(feed))[0]):
        # Saturated sums would cost much more than another order of rounding does.
        assert snr_db(got, wanted) > max(35, exact - 1.5)
    convolutions = operators(model)["Conv"]
    made = fused(result, tmp_path)
    assert made["QLinearConv"] == convolutions
    assert made["QLinearAdd"] == operators(model)["Add"]
    assert made["QGemm"] == 1
    assert made["Conv"] + made["FusedConv"] + made["Relu"] + made["Clip"] + made["Gemm"] == 0
    assert made["QuantizeLinear"] == 1, "only the input is quantized by a node of its own"
    assert result.model.primary.size < 0.5 * unirt.Model(model).primary.size


def test_openvino_computes_convolutions_in_8_bits() -> None:
    model = resnet()
    found = calibrate(model, [pictures(2, 0)], method="max")
    compiled = openvino(quantize(model, found, "int8", "cpu"))
    told = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = [(str(i["layerType"].astype(str)), i["runtimePrecision"].astype(str)) for i in told]
    convolutions = [precision for kind, precision in kinds if kind == "Convolution"]
    assert len(convolutions) == operators(model)["Conv"]
    assert set(convolutions) <= {"u8", "i8"}


def test_full_range_weights_saturate_where_the_cpu_adds_in_16_bits() -> None:
    """Why there are two recipes: on a CPU without VNNI the other one loses more than 3 dB."""
    cpu = next(d for d in unirt.devices() if d.kind == "cpu")
    features = cpu.facts["instruction_sets"]
    if recipe_for("onnxruntime", features).name != "cpu" or "avx2" not in features:
        pytest.skip("this CPU adds products in 32 bits")
    model = mobilenet()
    found = calibrate(model, [pictures(2, seed) for seed in range(4)], method="max")
    feed = pictures(8, 9)
    wanted = run(model, feed)
    careful, full = (
        snr_db(run(quantize(model, found, "int8", recipe), feed), wanted)
        for recipe in ("cpu", "cpu-vnni")
    )
    assert careful > full + 3


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "reference"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_digits_are_recognized_as_well_as_in_float32(engine: str, recipe: str) -> None:
    if engine != "reference":
        pytest.importorskip(engine)
    found = calibrate(DIGITS, {"image": IMAGES["image"][:64]})
    result = quantize(DIGITS, found, "int8", recipe)
    count = 100 if engine == "reference" else 450
    correct = []
    made = result.model
    if engine == "reference":
        # The onnx package evaluates Q/DQ nodes from opset 19 on.
        made = unirt.Model(onnx.version_converter.convert_version(proto(result), 19))
    for model in (unirt.Model(DIGITS), made):
        with unirt.load(model, engine) as session:
            logits = session.run({"image": IMAGES["image"][:count]})["logits"]
        correct.append(np.mean(np.asarray(logits).argmax(1) == IMAGES["labels"][:count]))
    assert correct[1] >= correct[0] - 0.01


def test_a_transformer_multiplies_integers_but_for_its_attention(tmp_path: Path) -> None:
    model = transformer()
    feed = {"x": values(4, 16, 64)}
    result = quantize(model, calibrate(model, [feed], method="max"), "int8", "cpu")
    assert fused(result, tmp_path)["MatMulIntegerToFloat"] == 6
    assert snr_db(run(result, feed), run(model, feed)) > 30
    inner = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.input[1][0] != "w"]
    assert set(result.kept) == set(inner)
    assert all("attention" in reason for reason in result.kept.values())


ATTENTIONS = {
    "softmax": "p = Softmax <axis = -1> (a)",
    "exp": "e = Exp (a) t = ReduceSum (e, last) p = Div (e, t)",
    "exp of less": """m = ReduceMax <axes = [-1]> (a) c = Sub (a, m) e = Exp (c)
        t = ReduceSum (e, last) p = Div (e, t)""",
    "sink": """c = Concat <axis = -1> (a, sink) z = Softmax <axis = -1> (c)
        p = Slice (z, i, j, last)""",
    "sigmoid": "p = Sigmoid (a)",
    "relu": "z = Relu (a) p = Mul (z, scale)",
}


@pytest.mark.parametrize("recipe", ["tensorrt", "cpu"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_is_known_however_its_weights_are_made(kind: str, recipe: str) -> None:
    model = graph(
        f"""net (float[2,8,16] x) => (float[2,8,16] y) {{
            [q] q = MatMul (x, w0) [k] s = MatMul (x, w1) k = Transpose <perm = [0, 2, 1]> (s)
            [v] v = MatMul (x, w2)
            [scores] b = MatMul (q, k) a = Mul (b, scale) {ATTENTIONS[kind]} [mix] o = MatMul (p, v)
            [up] h = MatMul (o, w3) r = Relu (h) [down] y = MatMul (r, w4)
        }}""",
        {f"w{at}": values(16, 16, seed=at) for at in range(5)}
        | {"scale": np.float32(0.1), "last": np.array([-1]), "sink": values(2, 8, 1)}
        | {"i": np.array([0]), "j": np.array([8])},
    )
    found = calibrate(model, [{"x": values(2, 8, 16)}], method="max")
    result = quantize(model, found, "int8", recipe)
    assert set(result.nodes) == {"q", "k", "v", "up", "down"}
    assert set(result.kept) == {"scores", "mix"}
    assert all("part of an attention" in reason for reason in result.kept.values())


def test_products_are_no_attention_for_an_activation_between_them() -> None:
    weights = {"w": values(16, 32), "v": values(32, 16), "scale": np.float32(0.1)}
    signature = "net (float[2,8,16] x, float[2,16,16] z) => (float[2,8,16] y)"
    feed = {"x": values(2, 8, 16), "z": values(2, 16, 16)}
    # Weights that nodes make of others; activations behind each other; two computed products.
    for text, nodes in (
        ("a = Mul (w, scale) [m] h = MatMul (x, a) r = Relu (h) [n] y = MatMul (r, v)", {"n"}),
        ("[m] h = MatMul (x, w) r = Sigmoid (h) [n] g = MatMul (r, v) y = MatMul (g, z)", None),
        ("[m] h = MatMul (x, z) s = Mul (h, scale) [n] y = MatMul (s, z)", {"m", "n"}),
    ):
        model = graph(f"{signature} {{ {text} }}", weights)
        result = quantize(model, calibrate(model, [feed], method="max"), "int8")
        assert nodes is None or set(result.nodes) == nodes
        assert not any("attention" in reason for reason in result.kept.values())


@pytest.mark.parametrize("precision", ["int8", "int8-weights"])
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize(
    "text",
    [
        "[one] y = MatMul (x, w)",
        "[one] h = MatMul (x, w) a = Add (h, b) r = Relu (a) [two] y = MatMul (r, v)",
        "[one] h = MatMul (x, w) r = Relu (h) [two] y = MatMul (r, v)",
        """[one] h = MatMul (x, w) t = Transpose <perm = [0, 1, 2]> (h)
            [two] y = MatMul (t, v)""",
    ],
    ids=["alone", "biased", "joined", "moved"],
)
def test_batches_of_matrices_are_right_on_every_engine(
    text: str, recipe: str, precision: Any
) -> None:
    weights = {
        # Columns of different size, so that a scale for each is worth it.
        "w": values(4, 16, 16) * np.geomspace(0.1, 10, 16, dtype=np.float32),
        "v": values(4, 16, 16, seed=1),
        "b": values(16, seed=2),
    }
    model = graph(f"net (float[4,7,16] x) => (float[4,7,16] y) {{ {text} }}", weights)
    feed = {"x": values(4, 7, 16)}
    found = calibrate(model, [feed], method="max")
    result = quantize(model, found, precision, recipe)
    assert len(result.nodes) == text.count("MatMul")
    wanted, exact = run(model, feed), run(result, feed, exactly=True)
    assert snr_db(exact, wanted) > 25
    # Sums of full-range weights may saturate here; what does not fit crashes or is nonsense.
    assert snr_db(run(result, feed), wanted) > 15
    assert snr_db(openvino(result)(dict(feed))[0], wanted) > 15
    if recipe == "cpu":
        assert snr_db(run(result, feed), exact) > 35
    if "two" not in result.nodes:
        made = proto(result)
        assert array(made, maker(made, node(made, "one").input[1]).input[1]).shape == (16,)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("int8", "int8"), ("fp8", "float8_e4m3fn"), ("fp8-conv", "")]
)
def test_tensorrt_chooses_low_precision_kernels(precision: str, dtype: str) -> None:
    if not any(one.name == "tensorrt" for one in unirt.backends()):
        pytest.skip("no TensorRT here")
    if dtype:
        model, feed = transformer(), {"x": values(2, 16, 64)}
        count = 4  # what three projections share is one kernel
    else:
        model, feed = resnet(), dict(pictures(2, 0))
        precision, dtype, count = "fp8", "float8_e4m3fn", 10
    result = quantize(model, calibrate(model, [feed], method="max"), precision)  # type: ignore[arg-type]
    shape = feed["x"].shape
    try:
        engine = unirt.build(
            result.model, "tensorrt@aot", profiles=[unirt.ShapeProfile({"x": shape})]
        )
    except unirt.BackendUnavailable as error:
        pytest.skip(str(error))
    with engine:
        report = engine.inspect()
    assert report.precisions.get(dtype, 0) >= count


# Where Q/DQ stand


def test_weights_are_stored_small_with_a_scale_for_each_output_channel() -> None:
    text = """net (float[N,4,6,6] x) => (float[N,7] y) {
        [conv] c = Conv (x, w1)
        [up] u = ConvTranspose (c, w2)
        [flat] f = GlobalAveragePool (u)
        [two] t = Flatten (f)
        [fc] g = Gemm <transB = 1> (t, w3)
        [plain] h = Gemm (g, w4)
        [mm] y = MatMul (h, w5)
    }"""
    shapes = [(6, 4, 3, 3), (6, 5, 3, 3), (8, 5), (8, 9), (9, 7)]
    channels = {"conv": (0, 6), "up": (1, 5), "fc": (0, 8), "plain": (1, 9), "mm": (1, 7)}
    weights = {f"w{at + 1}": values(*shape, seed=at) for at, shape in enumerate(shapes)}
    model = graph(text, weights)
    feed = {"x": values(2, 4, 6, 6)}
    made = proto(quantize(model, calibrate(model, [feed], method="max"), "int8"))
    stored = {t.name: t.data_type for t in made.graph.initializer}
    for at, (name, (axis, count)) in enumerate(channels.items()):
        dequantize = maker(made, node(made, name).input[1])
        small, scale, zero = (array(made, given) for given in dequantize.input)
        assert stored[dequantize.input[0]] == TensorProto.INT8
        assert helper.get_node_attr_value(dequantize, "axis") == axis
        assert scale.shape == zero.shape == (count,)
        assert not zero.any()
        weight = weights[f"w{at + 1}"]
        spread = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        assert np.abs(small).max() == 127
        assert np.all(np.abs(small * spread - weight) < spread), "none is off by a whole step"
    assert not set(weights) & set(stored)


@pytest.mark.parametrize("precision", ["int8", "int8-weights"])
@pytest.mark.parametrize("each", [1, 2])
def test_a_depthwise_transposed_convolution_has_a_scale_for_each_group(
    precision: Any, each: int
) -> None:
    sizes = np.geomspace(0.01, 10, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    model = graph(
        f"""net (float[2,8,6,6] x) => (float[2,{8 * each},8,8] y) {{
            [up] y = ConvTranspose <group = 8> (x, w)
        }}""",
        {"w": values(8, each, 3, 3) * sizes},
    )
    feed = {"x": values(2, 8, 6, 6)}
    result = quantize(model, calibrate(model, [feed], method="max"), precision)
    made, wanted = proto(result), run(model, feed)
    assert array(made, maker(made, node(made, "up").input[1]).input[1]).shape == (8,)
    assert not result.notes
    for got in (run(result, feed), openvino(result)(dict(feed))[0]):
        assert min(snr_db(got[:, at], wanted[:, at]) for at in range(8 * each)) > 30
    if any(one.name == "tensorrt" and one.availability.targets for one in unirt.backends()):
        unirt.build(result.model, "tensorrt@aot").close()


def test_groups_that_share_scales_and_differ_are_told() -> None:
    weight = values(8, 4, 3, 3)
    text = """net (float[2,8,6,6] x) => (float[2,8,8,8] y) {
        [up] y = ConvTranspose <group = 2> (x, w)
    }"""
    even, uneven = weight.copy(), weight.copy()
    uneven[4:] /= 100
    feed = {"x": values(2, 8, 6, 6)}
    for array_, notes in ((even, 0), (uneven, 1)):
        model = graph(text, {"w": array_})
        found = calibrate(model, [feed], method="max")
        result = quantize(model, found, "int8")
        assert len(result.notes) == notes
        assert snr_db(run(result, feed), run(model, feed)) > 35
        assert not any("scales" in note for note in quantize(model, found, "fp8").notes)
    assert "'up' channels of its 2 groups share scales" in result.notes[0]


def test_tensorrt_gets_symmetric_activations_and_only_skip_branches_of_additions() -> None:
    model = resnet()
    result = quantize(model, calibrate(model, [pictures(2, 0)]), "int8")
    made = proto(result)
    for each in made.graph.node:
        if each.op_type == "QuantizeLinear":
            zero = array(made, each.input[2])
            assert zero.dtype == np.int8
            assert zero == 0
        if each.op_type == "Add":
            before = [maker(made, name) for name in each.input]
            assert sorted(one.op_type for one in before) == ["Conv", "DequantizeLinear"]
        if each.op_type in ("Relu", "GlobalAveragePool"):
            assert maker(made, each.input[0]).op_type != "DequantizeLinear"
        if each.op_type in ("Conv", "Gemm"):
            assert quantized_inputs(made, each.name)[:2] == [True, True]
            assert quantized_inputs(made, each.name)[2:] in ([], [False])


def test_a_tensor_that_several_nodes_read_is_quantized_once() -> None:
    model = resnet()
    result = quantize(model, calibrate(model, [pictures(2, 0)]), "int8")
    sources = [n.input[0] for n in proto(result).graph.node if n.op_type == "QuantizeLinear"]
    assert len(sources) == len(set(sources))
    readers = Counter(
        name
        for n in proto(result).graph.node
        for name in n.input
        if n.op_type != "DequantizeLinear" and name.endswith("__dequantized")
    )
    assert max(readers.values()) > 1


def test_what_only_moves_keeps_its_scale() -> None:
    text = """net (float[N,4,6,6] x) => (float[N,8,9] y) {
        [one] a = Conv (x, w) [two] b = Conv (x, v) [cat] c = Concat <axis = 1> (a, b)
        [pool] p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c)
        [three] t = Conv <pads = [1,1,1,1]> (p, u)
        [out] y = Reshape (t, s)
    }"""
    weights = {
        "w": values(4, 4, 1, 1),
        "v": values(4, 4, 1, 1, seed=1) * 3,
        "u": values(8, 8, 3, 3, seed=2),
        "s": np.array([0, 8, 9]),
    }
    model = graph(text, weights)
    feed = {"x": values(2, 4, 6, 6)}
    made = proto(quantize(model, calibrate(model, [feed], method="max"), "int8", "cpu"))
    scales = {
        n.input[0]: array(made, n.input[1]).item()
        for n in made.graph.node
        if n.op_type == "QuantizeLinear"
    }
    assert scales["a"] == scales["b"] == scales["c"] == scales["p"] != scales["t"]


def test_an_output_that_is_quantized_keeps_its_name_and_its_readers() -> None:
    text = """net (float[N,4,6,6] x) => (float[N,4,6,6] c, float[N,4,6,6] y) {
        [one] c = Conv (x, w) [ok] k = Constant <value = bool {1}> ()
        [branch] d = If (k) <
            then_branch = yes () => (float[N,4,6,6] a) { a = Neg (c) },
            else_branch = no () => (float[N,4,6,6] b) { b = Identity (x) }>
        [two] y = Conv (d, v)
    }"""
    model = graph(text, {"w": values(4, 4, 1, 1), "v": values(4, 4, 1, 1, seed=1)})
    feed = {"x": values(2, 4, 6, 6)}
    for recipe in CONVOLVING:
        found = calibrate(model, [feed], method="max")
        result = quantize(model, found, "int8", recipe)
        assert [spec.name for spec in result.model.outputs] == ["c", "y"]
        assert set(result.nodes) == {"one", "two"}
        proto(result)
        assert snr_db(run(result, feed, exactly=True), run(model, feed)) > 35


def test_rtx_fuses_what_follows_into_products_whose_weights_have_one_scale() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds these networks")
    model = graph(
        """net (float[64,256] x) => (float[64,256] y) {
            [one] a = MatMul (x, w) [active] b = Relu (a) [two] y = MatMul (b, w)
        }""",
        {"w": values(256, 256)},
    )
    feed = {"x": values(64, 256)}
    found = calibrate(model, [feed], method="max")
    fused = {}
    for recipe in ("tensorrt", "tensorrt-rtx"):
        result = quantize(model, found, "int8", recipe)
        assert snr_db(run(result, feed, exactly=True), run(model, feed)) > 30
        with unirt.build(result.model, "tensorrt@aot") as engine:
            products = [one for one in engine.inspect().layers if one.contracts]
        fused[recipe] = any({"one", "active"} <= {*product.nodes} for product in products)
    assert not fused["tensorrt"]
    assert fused["tensorrt-rtx"]


def test_fp8_convolutions_have_a_scale_for_each_channel_where_matrices_have_one() -> None:
    model = graph(
        """net (float[2,8,4,4] x) => (float[2,16] y) {
            [conv] a = Conv (x, w) [pool] b = GlobalAveragePool (a)
            [flat] c = Flatten (b) [fc] y = Gemm (c, v)
        }""",
        {"w": values(16, 8, 1, 1), "v": values(16, 16)},
    )
    found = calibrate(model, [{"x": values(2, 8, 4, 4)}], method="max")
    made = proto(quantize(model, found, "fp8", "tensorrt-rtx"))
    scales = {name: array(made, f"{name}__scale").size for name in "wv"}
    assert scales == {"w": 16, "v": 1}  # one for all makes TensorRT for RTX 1.6 answer wrongly


def test_channels_of_very_different_sizes_keep_their_own_scales_everywhere() -> None:
    weight = values(64, 32)
    model = graph(
        "net (float[4,64] x) => (float[4,32] y) { [mm] y = MatMul (x, w) }",
        {"w": weight * 10.0 ** np.linspace(-2, 0, 32, dtype=np.float32)},
    )
    even = graph("net (float[4,64] x) => (float[4,32] y) { [mm] y = MatMul (x, w) }", {"w": weight})
    sizes = []
    for one in (model, even):
        made = proto(quantize(one, by_hand(x=(-3, 3)), "int8", "tensorrt-rtx"))
        sizes.append(array(made, "w__scale").size)
    assert sizes == [32, 1]


def test_a_target_without_int8_convolutions_gets_none_and_keeps_those_in_fp8() -> None:
    model = mobilenet()
    found = calibrate(model, [pictures(2, 0)], method="max")
    result = quantize(model, found, "int8", "tensorrt-rtx")
    assert result.nodes
    assert not any("conv" in name for name in result.nodes)
    assert any("knows no low-precision Conv" in reason for reason in result.kept.values())
    in_fp8 = quantize(model, found, "fp8", "tensorrt-rtx")
    assert any("conv" in name for name in in_fp8.nodes)


def test_what_stays_in_float32_does_so_on_onnxruntime_too() -> None:
    pytest.importorskip("onnxruntime")
    text = """net (float[1,8,8,8] x) => (float[1,8,8,8] y) {
        [one] a = Conv (x, u) [two] b = Conv (a, v) [three] y = Conv (b, w)
    }"""
    weights = {name: values(8, 8, 1, 1, seed=at) for at, name in enumerate("uvw")}
    weights["v"][0] *= 100  # with one scale for all its channels the others would vanish
    model = graph(text, weights)
    feed = {"x": values(1, 8, 8, 8)}
    result = quantize(model, calibrate(model, [feed]), "int8", "cpu", keep=["two"])
    with unirt.build(result.model, "onnxruntime@cpu") as engine, engine.session() as session:
        (kept,) = [layer for layer in engine.inspect().layers if "two" in layer.nodes]
        assert kept.kind != "QLinearConv"
        fused = session.run(feed)["y"]
    assert snr_db(fused, run(result, feed, exactly=True)) > 30


@pytest.mark.parametrize("recipe", CONVOLVING)
def test_any_single_node_of_a_network_can_stay_in_float32(recipe: str) -> None:
    model = mobilenet()
    found = calibrate(model, [pictures(2, 0)], method="max")
    everything = quantize(model, found, "int8", recipe)
    feed = pictures(2, 9)
    wanted = run(model, feed)
    for name in everything.nodes[:: len(everything.nodes) // 4]:
        result = quantize(model, found, "int8", recipe, keep=[name])
        proto(result)
        assert name not in result.nodes
        assert result.kept[name] == "it was told to stay"
        assert snr_db(run(result, feed, exactly=True), wanted) > 30
        alone = quantize(model, found, "int8", recipe, only=[name]) if "conv" in name else None
        if alone:
            assert alone.nodes == (name,)
            assert snr_db(run(alone, feed, exactly=True), wanted) > 40


def test_a_matrix_times_a_vector_stays_in_float32_for_tensorrt() -> None:
    model = graph(DEEP.replace("float[N,8]", "float[1,8]"), DEEP_WEIGHTS)
    found = by_hand(**DEEP_RANGES)
    with pytest.raises(unirt.ModelError, match="nothing to quantize") as caught:
        quantize(model, found, "int8")
    assert "vector" in str(caught.value)
    assert set(quantize(model, found, "int8", "cpu").nodes) == {"fc", "out"}


# Ranges, and what to leave alone


def test_ranges_given_by_hand_decide_the_scales() -> None:
    found = calibrate(deep(), [{"x": values(4, 8)}]).with_ranges({"x": (-2.54, 1.0), "r": 5.1})
    made = proto(quantize(deep(), found, "int8"))
    scale = {
        n.input[0]: array(made, n.input[1])
        for n in made.graph.node
        if n.op_type == "QuantizeLinear"
    }
    np.testing.assert_allclose(scale["x"], 2.54 / 127, rtol=1e-6)
    np.testing.assert_allclose(scale["r"], 5.1 / 127, rtol=1e-6)
    made = proto(quantize(deep(), found, "int8", "cpu"))
    quantizer = next(n for n in made.graph.node if n.op_type == "QuantizeLinear")
    np.testing.assert_allclose(array(made, quantizer.input[1]), 3.54 / 255, rtol=1e-6)
    assert array(made, quantizer.input[2]) == round(2.54 / 3.54 * 255)
    assert array(made, quantizer.input[2]).dtype == np.uint8


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_what_reads_a_tensor_without_range_stays_in_float32(recipe: str) -> None:
    result = quantize(deep(), by_hand(x=(-3, 3)), "int8", recipe)
    assert result.nodes == ("fc",)
    assert result.kept == {"out": "the calibration has no range for 'r'"}
    assert quantized_inputs(proto(result), "out") == [False, False]


def test_nodes_are_kept_or_chosen_by_name() -> None:
    found = by_hand(**DEEP_RANGES)
    kept = quantize(deep(), found, "int8", keep=["out"])
    chosen = quantize(deep(), found, "int8", only=["fc"])
    assert kept.nodes == chosen.nodes == ("fc",)
    assert kept.kept == chosen.kept == {"out": "it was told to stay"}
    assert _bytes(kept) == _bytes(chosen)
    with pytest.raises(unirt.OptionError, match=r"'fcc'.*Did you mean 'fc'\?"):
        quantize(deep(), found, "int8", keep=["fcc"])
    wrong: Any
    for wrong in ("fc", 3, [3], [["fc"]], (name for name in ["fc"])):
        for option in ("keep", "only"):
            with pytest.raises(unirt.OptionError, match=f"^{option}=.*no collection of names"):
                quantize(deep(), found, "int8", **{option: wrong})


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_what_is_no_product_is_not_quantized_alone(recipe: str) -> None:
    with pytest.raises(unirt.ModelError, match="Relu 'act' is never quantized for itself"):
        quantize(deep(), by_hand(**DEEP_RANGES), "int8", recipe, only=["act"])
    assert quantize(deep(), by_hand(**DEEP_RANGES), only=["act", "fc"]).nodes == ("fc",)


def test_a_constant_that_comes_first_stays_and_is_told_so() -> None:
    text = "net (float[16,4] x) => (float[8,4] y) { [mm] y = %s (w, x) }"
    for operator in ("MatMul", "Gemm"):
        model = graph(text % operator, {"w": values(8, 16)})
        for precision in ("int8", "int8-weights"):
            with pytest.raises(unirt.ModelError, match="'w' is the first factor"):
                quantize(model, by_hand(x=(-3, 3)), precision)  # type: ignore[arg-type]


def test_names_inputs_and_outputs_stay_and_the_file_says_what_it_is() -> None:
    model = resnet()
    result = quantize(model, calibrate(model, [pictures(2, 0)]), "int8", "cpu")
    names = {n.name for n in model.graph.node if n.op_type != "BatchNormalization"}
    assert names <= {n.name for n in proto(result).graph.node}
    before = unirt.Model(model)
    assert result.model.inputs == before.inputs
    assert result.model.outputs == before.outputs
    told = {entry.key: entry.value for entry in proto(result).metadata_props}
    assert told == {"unirt.precision": "int8", "unirt.recipe": "cpu"}
    assert (result.precision, result.recipe) == ("int8", "cpu")


# Before and behind the weights


def test_what_scales_the_channels_of_a_convolution_becomes_part_of_it_exactly() -> None:
    text = """net (float[N,3,5,5] x) => (float[N,6,5,5] y) {
        [conv] c = Conv <pads = [1,1,1,1]> (x, w)
        [bn] n = BatchNormalization (c, scale, shift, mean, var)
        [mul] m = Mul (n, factor)
        [add] y = Add (offset, m)
    }"""
    weights = {
        "w": values(6, 3, 3, 3),
        **{name: values(6, seed=at) for at, name in enumerate(("scale", "shift", "mean"))},
        "var": np.abs(values(6, seed=5)) + 0.5,
        "factor": np.float32(-1.5),
        "offset": values(6, 1, 1, seed=6),
    }
    model = graph(text, weights)
    feed = {"x": values(2, 3, 5, 5)}
    # With weights only, the float32 convolution tells what the folded weights are.
    result = quantize(model, precision="int8-weights")
    made = proto(result)
    assert operators(made) == {"Conv": 1, "DequantizeLinear": 1}
    assert len(result.notes) == 3
    assert "'conv'" not in str(result.notes)
    assert snr_db(run(made, feed), run(model, feed)) > 35
    conv = node(made, "conv")
    np.testing.assert_allclose(
        array(made, conv.input[2]),
        (weights["shift"] - weights["mean"] * weights["scale"] / np.sqrt(weights["var"] + 1e-5))
        * -1.5
        + weights["offset"].reshape(-1),
        rtol=1e-5,
        atol=1e-6,
    )


def test_dead_channels_get_a_scale_that_is_not_0() -> None:
    weight = values(16, 4, seed=2)
    weight[:, 1] = 0
    weight[:, 2] = 1e-38
    result = quantize(deep(v=weight), by_hand(**DEEP_RANGES), "int8")
    made = proto(result)
    dequantize = maker(made, node(made, "out").input[1])
    scale = array(made, dequantize.input[1])
    assert np.all(scale > 1e-4)
    assert not array(made, dequantize.input[0])[:, 1:3].any()
    assert any("2 of 'v'" in note for note in result.notes)
    assert np.isfinite(run(result, {"x": values(3, 8)})).all()


def test_a_large_bias_beside_small_weights_survives_in_integers() -> None:
    weight, bias = values(8, 16), values(16, seed=1)
    weight[:, 3], bias[3] = 1e-9, 50.0
    model = graph(
        "net (float[N,8] x) => (float[N,16] y) { [fc] y = Gemm (x, w, b) }",
        {"w": weight, "b": bias},
    )
    result = quantize(model, by_hand(x=(-3, 3), y=(-60, 60)), "int8", "cpu")
    got = run(result, {"x": values(5, 8)})
    np.testing.assert_allclose(got[:, 3], 50, rtol=1e-4)


def test_zeros_of_a_sparse_weight_stay_zeros() -> None:
    weight = values(64, 64)
    weight.reshape(-1, 4)[:, :2] = 0
    model = graph(
        "net (float[N,64] x) => (float[N,64] y) { [mm] y = MatMul (x, w) }", {"w": weight}
    )
    for recipe in RECIPES:
        made = proto(quantize(model, by_hand(x=(-3, 3)), "int8", recipe))
        small = array(made, maker(made, node(made, "mm").input[1]).input[0])
        assert not small[weight == 0].any()


def test_errors_of_rounding_cancel_out_in_each_channel() -> None:
    weight = values(96, 32)
    model = graph(
        "net (float[N,96] x) => (float[N,32] y) { [mm] y = MatMul (x, w) }", {"w": weight}
    )
    made = proto(quantize(model, by_hand(x=(0, 1)), "int8"))
    dequantize = maker(made, node(made, "mm").input[1])
    small, scale = (array(made, name) for name in dequantize.input[:2])
    assert np.abs((small - weight / scale).sum(axis=0)).max() <= 0.51
    assert np.abs(np.rint(weight / scale) - weight / scale).sum(axis=0).min() > 2
    feed = {"x": np.ones((1, 96), np.float32)}
    plain = np.rint(weight / scale) * scale
    error = np.abs(run(made, feed, exactly=True) - feed["x"] @ weight).max()
    assert error < np.abs(feed["x"] @ plain - feed["x"] @ weight).max() / 2


def test_weights_that_are_transposed_in_the_graph_are_quantized_too() -> None:
    text = """net (float[N,8] x) => (float[N,4] y) {
        [turn] t = Transpose <perm = [1,0]> (w) [mm] y = MatMul (x, t)
    }"""
    model = graph(text, {"w": values(4, 8)})
    feed = {"x": values(3, 8)}
    made = proto(quantize(model, by_hand(x=(-3, 3)), "int8"))
    assert "Transpose" not in operators(made)
    assert snr_db(run(made, feed, exactly=True), run(model, feed)) > 35


# Weights alone, and fp8


@pytest.mark.parametrize(
    ("precision", "block", "floor", "dtype"),
    [
        ("int8-weights", None, 38, TensorProto.INT8),
        ("int8-weights", 16, 41, TensorProto.INT8),
        ("int4-weights", None, 17, TensorProto.INT4),
        ("int4-weights", 16, 18, TensorProto.INT4),
    ],
)
def test_weights_alone_are_quantized_in_blocks(
    precision: Any, block: int | None, floor: float, dtype: int
) -> None:
    text = """net (float[N,64] x) => (float[N,48] y) {
        [fc] h = Gemm <transB = 1> (x, w, b) [mm] y = MatMul (h, v)
    }"""
    weights = {"w": values(96, 64), "b": values(96, seed=1), "v": values(96, 48, seed=2)}
    model = graph(text, weights)
    result = quantize(model, precision=precision, block=block)
    made = proto(result)
    assert result.nodes == ("fc", "mm")
    assert "QuantizeLinear" not in operators(made)
    for name, summed in (("fc", 1), ("mm", 0)):
        dequantize = maker(made, node(made, name).input[1])
        stored = {t.name: t for t in made.graph.initializer}
        assert stored[dequantize.input[0]].data_type == dtype
        if block or "int4" in precision:
            size = block or 32
            assert helper.get_node_attr_value(dequantize, "block_size") == size
            assert helper.get_node_attr_value(dequantize, "axis") == summed
            rows = stored[dequantize.input[0]].dims[summed]
            assert stored[dequantize.input[1]].dims[summed] == rows // size
    feed = {"x": values(5, 64, seed=3)}
    assert snr_db(run(made, feed), run(model, feed)) > floor
    small = len(_bytes(result)) / len(model.SerializeToString())
    assert small < (0.25 if "int4" in precision else 0.4)


def test_what_does_not_divide_into_blocks_stays_in_float32() -> None:
    model = graph(
        "net (float[N,64] x) => (float[N,5] y) { [a] h = MatMul (x, w) [b] y = MatMul (h, v) }",
        {"w": values(64, 40), "v": values(40, 5)},
    )
    result = quantize(model, precision="int4-weights")
    assert result.nodes == ("a",)
    assert "no multiple of blocks of 32" in result.kept["b"]
    model = graph(
        "net (float[4,7,64] x) => (float[4,7,32] y) { [mm] y = MatMul (x, w) }",
        {"w": values(4, 64, 32)},
    )
    with pytest.raises(unirt.ModelError, match="its weight has 3 axes"):
        quantize(model, precision="int4-weights")


def test_fp8_graphs_say_what_fp8_computes() -> None:
    model = resnet()
    found = calibrate(model, [pictures(2, seed) for seed in range(2)], method="max")
    result = quantize(model, found, "fp8")
    made = proto(result)
    types = {t.name: t.data_type for t in made.graph.initializer}
    assert Counter(types.values())[TensorProto.FLOAT8E4M3FN] > operators(model)["Conv"]
    assert opset(made) == 19
    feed = pictures(4, 9)
    # ONNX Runtime's fusions take fp8 for int8, and its CPU kernels then refuse it.
    assert snr_db(run(result, feed, exactly=True), run(model, feed)) > 20
    assert snr_db(openvino(result)(dict(feed))[0], run(model, feed)) > 20


# What cannot be quantized


def test_old_opsets_are_raised_as_far_as_needed() -> None:
    text = """net (float[N,8] x) => (float[N,4] y) {
        [fc] h = Gemm (x, w, b) [act] r = Relu (h) [out] y = MatMul (r, v)
    }"""
    old = graph(text, DEEP_WEIGHTS, opset=9, ir=4)
    for name in DEEP_WEIGHTS:  # as old exporters list them
        dims = list(DEEP_WEIGHTS[name].shape)
        old.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    feed = {"x": values(3, 8)}
    for precision, wanted in (("int8", 13), ("fp8", 19)):
        found = by_hand(**DEEP_RANGES)
        result = quantize(old, found, precision)  # type: ignore[arg-type]
        assert opset(proto(result)) == wanted
        assert [spec.name for spec in result.model.inputs] == ["x"]
        assert [value.name for value in proto(result).graph.input] == ["x"]
        assert snr_db(run(result, feed, exactly=True), run(deep(), feed)) > 20
    assert opset(proto(quantize(deep(), by_hand(**DEEP_RANGES), "int8"))) == 17


def test_an_opset_that_cannot_be_raised_is_an_error() -> None:
    model = graph("net (float[N,8] x) => (float[N,4] y) { y = MatMul (x, w) }", {}, opset=6, ir=3)
    model.graph.initializer.append(numpy_helper.from_array(values(8, 4), "w"))
    for precision in ("int8", "int8-weights"):
        with pytest.raises(unirt.ModelError, match=r"in opset 6.*Export the network") as caught:
            quantize(model, by_hand(x=(-3, 3)), precision)  # type: ignore[arg-type]
        assert caught.value.opset == 6


OLD_TAILS = {
    "upsample": (9, 'y = Upsample <mode = "linear"> (c, scales)'),
    "nearest": (9, "y = Upsample (c, scales)"),
    "resize": (10, 'y = Resize <mode = "linear"> (c, scales)'),
    "softmax": (12, "y = Softmax (c)"),
}


@pytest.mark.parametrize("kind", OLD_TAILS)
def test_raised_graphs_answer_as_before(kind: str) -> None:
    opset_, tail = OLD_TAILS[kind]
    model = graph(
        f"net (float[1,3,8,8] x) => (float[1,4,h,w] y) {{ [conv] c = Conv (x, w) {tail} }}",
        {"w": values(4, 3, 3, 3)}
        | ({"scales": np.float32([1, 1, 2, 2])} if "scales" in tail else {}),
        opset=opset_,
    )
    feed = {"x": values(1, 3, 8, 8)}
    result = quantize(model, calibrate(model, [feed], method="max"), "int8")
    assert result.nodes == ("conv",)
    assert result.notes == (f"the graph was raised from opset {opset_} to 13",)
    assert snr_db(run(result, feed, exactly=True), run(model, feed)) > 25


def test_hardmax_keeps_its_one_winner_for_each_sample() -> None:
    text = "net (float[2,3,8] x) => (float[2,3,5] y) { [mm] m = MatMul (x, w) y = Hardmax (m) }"
    model = graph(text, {"w": values(8, 5)}, opset=12)
    feed = {"x": values(2, 3, 8)}
    result = quantize(model, precision="int8-weights")
    np.testing.assert_array_equal(run(result, feed), run(model, feed))


def test_group_normalization_keeps_its_answers_with_blocks() -> None:
    model = graph(
        """net (float[2,3,64] x) => (float[2,4,48] y) {
            [mm] m = MatMul (x, w) r = Reshape (m, shape)
            y = GroupNormalization <num_groups = 2> (r, scale, shift)
        }""",
        {
            "w": values(64, 64),
            "shape": np.array([2, 4, -1]),
            "scale": np.float32([1, 3]),
            "shift": np.float32([0, 5]),
        },
        opset=18,
    )
    feed = {"x": values(2, 3, 64)}
    assert opset(proto(result := quantize(model, precision="int4-weights"))) == 21
    assert snr_db(run(result, feed), run(model, feed)) > 15


def test_nodes_are_called_alike_whatever_the_opset() -> None:
    text = """net (float[N,8] x) => (float[N,4] y) {
        h = MatMul (x, w) c = Clip <max = 3.0> (h) y = MatMul (c, v)
    }"""
    model = graph(text, {"w": values(8, 16), "v": values(16, 4)}, opset=9)
    found = calibrate(model, [{"x": values(2, 8)}])
    assert quantize(model, found).nodes == ("MatMul_0", "MatMul_2")
    assert quantize(model, found, keep=["MatMul_2"]).nodes == ("MatMul_0",)


def test_a_name_of_several_nodes_chooses_none_of_them() -> None:
    text = """net (float[N,8] x) => (float[N,4] y) {
        [a] h = MatMul (x, w) [a] y = MatMul (h, v)
    }"""
    model = graph(text, {"w": values(8, 16), "v": values(16, 4)})
    for precision in ("int8", "int8-weights"):
        with pytest.raises(unirt.ModelError, match="2 nodes of the network are called 'a'") as no:
            quantize(model, by_hand(x=(-3, 3), h=(-9, 9)), precision, keep=["a"])  # type: ignore[arg-type]
        assert no.value.node == "a"


def test_quantizing_needs_a_float32_graph_that_is_not_quantized_yet() -> None:
    found = by_hand(**DEEP_RANGES)
    with pytest.raises(unirt.ModelError, match=r"quantized already.*QuantizeLinear"):
        quantize(quantize(deep(), found, "int8").model, found, "int8")
    with pytest.raises(unirt.ModelError, match="not in float32"):
        quantize(cast(deep(), "fp16").model, found, "int8")
    broken = values(8, 16)
    broken[1, 2] = np.nan
    with pytest.raises(unirt.ModelError, match="'w' of 'fc'") as caught:
        quantize(deep(w=broken), found, "int8")
    assert caught.value.tensor == "w"
    with pytest.raises(unirt.ModelError, match="It has no convolution"):
        quantize(graph("net (float[N] x) => (float[N] y) { y = Relu (x) }", {}), found, "int8")


def test_activations_need_a_calibration_of_this_model() -> None:
    with pytest.raises(unirt.DataError, match="without a calibration"):
        quantize(deep(), precision="int8")
    with pytest.raises(unirt.ModelError, match="calibration is not one of"):
        quantize(deep(), replace(by_hand(elsewhere=(0, 1)), model="0" * 64), "int8")


def test_a_calibration_may_be_the_path_it_was_saved_to(tmp_path: Path) -> None:
    found = calibrate(deep(), [{"x": values(4, 8)}])
    path = found.save(tmp_path / "deep.json")
    wanted = _bytes(quantize(deep(), found))
    for given in (path, str(path)):
        assert _bytes(quantize(deep(), given)) == wanted
    with pytest.raises(unirt.DataError, match="cannot be read"):
        quantize(deep(), tmp_path / "none.json")
    with pytest.raises(unirt.OptionError, match="of type int"):
        quantize(deep(), 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("int4w", "int4-weights"), ("int4", "int4-weights"), ("int8w", "int8-weights")],
)
def test_a_candidates_precision_is_told_by_its_name_here(given: Any, meant: str) -> None:
    with pytest.raises(unirt.OptionError, match=f"Did you mean '{meant}'"):
        quantize(deep(), precision=given)


def test_unknown_precisions_recipes_and_blocks_are_refused() -> None:
    found = by_hand(**DEEP_RANGES)
    with pytest.raises(unirt.OptionError, match="fp8"):
        quantize(deep(), found, "fp88")  # type: ignore[arg-type]
    with pytest.raises(unirt.OptionError, match=r"Did you mean 'tensorrt'\?"):
        quantize(deep(), found, "int8", "tensort")
    with pytest.raises(unirt.OptionError, match="'cpu' has no fp8"):
        quantize(deep(), found, "fp8", "cpu")
    with pytest.raises(unirt.OptionError, match="block=16"):
        quantize(deep(), found, "int8", block=16)
    wrong: Any
    for wrong in ("32", 32.0, True, 1):
        with pytest.raises(unirt.OptionError, match=f"block={wrong!r} cannot be used"):
            quantize(deep(), precision="int8-weights", block=wrong)
    assert quantize(deep(), precision="int8-weights", block=np.int64(8)).nodes
    for wrong in (5, None, ["cpu"]):
        with pytest.raises(unirt.OptionError, match="There is no recipe"):
            quantize(deep(), found, recipe=wrong)
        with pytest.raises(unirt.OptionError, match="is no precision"):
            quantize(deep(), found, wrong)


def test_each_backend_and_cpu_has_its_recipe() -> None:
    assert recipe_for("tensorrt").name == "tensorrt"
    assert recipe_for("onnxruntime", ("avx2", "fma")).name == "cpu"
    assert recipe_for("openvino", ("avx2", "avx_vnni")).name == "cpu-vnni"
    assert recipe_for("onnxruntime", ("avx512f", "amx_int8")).name == "cpu-vnni"
    assert recipe_for("onnxruntime", ("neon", "dotprod")).name == "cpu-vnni"
    assert recipe_for("some-plugin").name == "cpu", "what is not known to be exact may saturate"


def test_every_process_makes_the_same_file(tmp_path: Path) -> None:
    """Whatever the order of sets of strings, which differs from one process to the next."""
    resnet_, ranges = tmp_path / "net.onnx", tmp_path / "ranges.json"
    onnx.save(resnet(), resnet_)
    calibrate(resnet_, [pictures(2, 0)]).save(ranges)
    code = """
import sys
from unirt.precision import RECIPES, cast, quantize
net, ranges = sys.argv[1:]
made = [quantize(net, ranges, "int8", recipe).model for recipe in RECIPES]
print(*(model.hash for model in [*made, cast(net, "fp16").model, cast(made[0], "bf16").model]))
"""
    told = set()
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(resnet_), str(ranges)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert done.returncode == 0, done.stderr
        told.add(done.stdout)
    assert len(told) == 1
