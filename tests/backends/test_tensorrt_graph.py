"""What TensorRT would bend in a graph: repaired with the same answers, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from unirt_tensorrt._graph import Prepared, prepare
from unirt_tensorrt._library import load

import unirt

RANDOM = np.random.default_rng(0)

Arrays = Mapping[str, Any]


def graph(
    text: str, weights: Arrays | None = None, opset: int = 21, extra: str = ""
) -> onnx.ModelProto:
    domains = f'["": {opset}, "local": 1, "com.microsoft": 1]'
    model = parser.parse_model(f"<ir_version: 10, opset_import: {domains}> {text} {extra}")
    for name, array in (weights or {}).items():
        if not isinstance(array, TensorProto):
            array = numpy_helper.from_array(np.asarray(array))
        array.name = name
        model.graph.initializer.append(array)
    return model


def uniform(*shape: int, to: float = 4.0) -> Any:
    return RANDOM.uniform(-to, to, shape).astype(np.float32)


def repaired(model: onnx.ModelProto, feed: Arrays, *, is_rtx: bool = False) -> Prepared:
    """Prepares the model and checks that it is valid and gives the very same answers."""
    expected = ReferenceEvaluator(model).run(None, dict(feed))
    prepared = prepare(model, is_rtx=is_rtx)
    onnx.checker.check_model(prepared.model, full_check=True)
    got = ReferenceEvaluator(prepared.model).run(None, dict(feed))
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(other.astype(np.float32), one.astype(np.float32))
    return prepared


def built(model: onnx.ModelProto) -> tuple[bool, list[str]]:
    """Whether TensorRT for RTX parses and builds it, and its warnings and errors."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    library = load()  # its logger is the one that a process may have
    trt = library.module
    with library.capture() as messages:
        builder = trt.Builder(library.logger)
        network = builder.create_network(0)
        reader = trt.OnnxParser(network, library.logger)
        plan = None
        parsed = reader.parse(model.SerializeToString())
        if parsed:
            plan = builder.build_serialized_network(network, builder.create_builder_config())
    # What UniRT sets for the process, and this builder would like otherwise.
    said = [m.text for m in messages if m.severity <= 2 and "NVIDIA_TF32_OVERRIDE" not in m.text]
    return plan is not None, said


def constants(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


MATMUL = """
g (float[8,32] x) => (float[8,16] y) {
  [xq] xq = QuantizeLinear (x, s, z)
  [xd] xd = DequantizeLinear (xq, s, z)
  [wd] wd = DequantizeLinear <axis = 1> (w, ws, wz)
  [mm] y = MatMul (xd, wd)
}"""


def matmul_weights(z: Any = None, wz: Any = None, w: Any = None) -> dict[str, Any]:
    return {
        "s": np.float32(1 / 16),  # exact in every float, so that both sides round alike
        "z": np.int8(0) if z is None else z,
        "w": RANDOM.integers(-127, 128, (32, 16)).astype(np.int8) if w is None else w,
        "ws": RANDOM.uniform(0.01, 0.02, 16).astype(np.float32),
        "wz": np.zeros(16, np.int8) if wz is None else wz,
    }


def test_what_is_right_stays_as_it_is() -> None:
    model = graph(MATMUL, matmul_weights())
    before = model.SerializeToString(deterministic=True)
    prepared = prepare(model)
    assert prepared.model.SerializeToString(deterministic=True) == before
    assert prepared.repairs == prepared.warnings == ()
    assert built(prepared.model) == (True, [])


HALF_MATMUL = MATMUL.replace("float[", "float16[")


@pytest.mark.parametrize("opset", [19, 21, 23])
def test_16_bit_scales_become_float32(opset: int) -> None:
    weights = matmul_weights()
    weights |= {name: weights[name].astype(np.float16) for name in ("s", "ws")}
    prepared = repaired(
        graph(HALF_MATMUL, weights, opset), {"x": uniform(8, 32).astype(np.float16)}
    )
    (message,) = prepared.repairs
    assert "16-bit scales" in message
    assert "infinity" in message
    assert "3 nodes ('xq', 'xd', 'wd')" in message
    found = constants(prepared.model)
    assert "s" not in found
    assert {found[name].dtype for name in ("s_float32", "ws_float32")} == {np.dtype(np.float32)}
    assert built(prepared.model)[0]


def test_types_that_a_node_names_itself_follow() -> None:
    text = """
    g (float16[4] x) => (float[4] y) {
      [q] q = QuantizeLinear <precision = 10> (x, s, z)
      [d] y = DequantizeLinear <output_dtype = 1> (q, s, z)
    }"""
    model = graph(text, {"s": np.float16(1 / 16), "z": np.int8(0)}, opset=23)
    prepared = repaired(model, {"x": uniform(4).astype(np.float16)})
    quantize, dequantize = (
        next(n for n in prepared.model.graph.node if n.name == name) for name in ("q", "d")
    )
    assert not quantize.attribute
    assert not dequantize.attribute
    assert built(prepared.model)[0]


def test_bfloat16_scales_become_float32() -> None:
    import ml_dtypes

    weights = matmul_weights()
    weights |= {name: weights[name].astype(ml_dtypes.bfloat16) for name in ("s", "ws")}
    model = graph(MATMUL.replace("float[", "bfloat16["), weights, opset=23)
    prepared = prepare(model)
    onnx.checker.check_model(prepared.model, full_check=True)
    assert "3 nodes" in prepared.repairs[0]
    assert [value.type.tensor_type.elem_type for value in prepared.model.graph.output] == [16]
    assert built(prepared.model)[0]


def test_scales_that_are_computed_are_cast() -> None:
    weights = matmul_weights()
    weights |= {"ws": weights["ws"].astype(np.float16)}
    text = HALF_MATMUL.replace("[xq]", "h = Cast <to = 10> (s) [xq]").replace(", s, z", ", h, z")
    prepared = repaired(graph(text, weights), {"x": uniform(8, 32).astype(np.float16)})
    assert "3 nodes" in prepared.repairs[0]


def test_fp8_with_16_bit_scales_is_repaired_too() -> None:
    import ml_dtypes

    fp8 = ml_dtypes.float8_e4m3fn
    weights = matmul_weights(np.array(0, fp8), np.zeros(16, fp8), uniform(32, 16).astype(fp8))
    weights |= {name: weights[name].astype(np.float16) for name in ("s", "ws")}
    prepared = prepare(graph(HALF_MATMUL, weights))
    assert "3 nodes" in prepared.repairs[0]
    assert built(prepared.model)[0]


def test_four_bit_blocks_with_16_bit_scales_are_left_alone() -> None:
    import ml_dtypes

    text = """
    g (float16[8,32] x) => (float16[8,16] y) {
      [wd] wd = DequantizeLinear <axis = 0, block_size = 16> (w, ws)
      [mm] y = MatMul (x, wd)
    }"""
    weights = {
        "w": RANDOM.integers(-8, 8, (32, 16)).astype(ml_dtypes.int4),
        "ws": np.full((2, 16), 0.1, np.float16),
    }
    prepared = prepare(graph(text, weights))
    assert prepared.repairs == prepared.warnings == ()


def test_uint8_around_128_becomes_int8_around_0() -> None:
    weights = matmul_weights(
        np.uint8(128),
        np.full(16, 128, np.uint8),
        RANDOM.integers(0, 256, (32, 16)).astype(np.uint8),
    )
    model = graph(MATMUL, weights)
    assert not built(model)[0]
    prepared = repaired(model, {"x": uniform(8, 32, to=9)})
    assert len(prepared.repairs) == 2
    found = constants(prepared.model)
    assert {array.dtype.name for array in found.values()} == {"int8", "float32"}
    assert built(prepared.model)[0]


def test_uint8_is_followed_through_nodes_that_only_move_values() -> None:
    text = """
    g (float[1,2,4,4] x) => (float[1,8] y) {
      [q] a = QuantizeLinear (x, s, z)
      [pool] b = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a)
      [flat] c = Flatten (b)
      [d] y = DequantizeLinear (c, s, z)
    }"""
    model = graph(text, {"s": np.float32(0.1), "z": np.uint8(128)})
    model = onnx.shape_inference.infer_shapes(model)  # so that uint8 is written down
    prepared = repaired(model, {"x": uniform(1, 2, 4, 4, to=20)})
    assert "('q')" in prepared.repairs[0]


@pytest.mark.parametrize("zero", [3, 128])
def test_weights_with_a_zero_point_that_they_can_do_without(zero: int) -> None:
    w = RANDOM.integers(zero - 100, zero + 100, (32, 16)).clip(0).astype(np.uint8)
    model = graph(MATMUL, matmul_weights(wz=np.full(16, zero, np.uint8), w=w))
    prepared = repaired(model, {"x": uniform(8, 32)})
    assert "('wd')" in prepared.repairs[0]
    assert built(prepared.model)[0]


def test_uint4_blocks_around_8_become_int4() -> None:
    import ml_dtypes

    text = """
    g (float[8,32] x) => (float[8,24] y) {
      [wd] wd = DequantizeLinear <axis = 0, block_size = 16> (w, ws, wz)
      [mm] y = MatMul (x, wd)
    }"""
    weights = {
        "w": RANDOM.integers(0, 15, (32, 24)).astype(ml_dtypes.uint4),
        "ws": np.full((2, 24), 0.1, np.float32),
        "wz": np.repeat([[8], [7]], 24, 1).astype(ml_dtypes.uint4),
    }
    prepared = repaired(graph(text, weights), {"x": uniform(8, 32)})
    assert {t.data_type for t in prepared.model.graph.initializer} == {
        TensorProto.INT4,
        TensorProto.FLOAT,
    }
    assert built(prepared.model)[0]


def refused(model: onnx.ModelProto, *words: str) -> unirt.BuildError:
    with pytest.raises(unirt.BuildError) as raised:
        prepare(model)
    for word in words:
        assert word in str(raised.value)
    assert raised.value.remedy
    return raised.value


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        (np.uint8(0), ["uint8", "half of the range", "symmetrically"]),
        (np.int8(3), ["zero point is 3", "symmetrically"]),
        (np.uint8(127), ["zero point is 127"]),
        (np.int16(0), ["int16"]),
        (np.uint16(0), ["uint16"]),
    ],
)
def test_other_activations_are_refused(zero: Any, words: list[str]) -> None:
    error = refused(graph(MATMUL, matmul_weights(zero)), *words, "'xq'")
    assert error.facts == {"node": "xq", "operator": "QuantizeLinear"}


def test_a_quantizer_without_zero_point_means_uint8() -> None:
    text = MATMUL.replace("(x, s, z)", "(x, s)").replace("(xq, s, z)", "(xq, s)")
    refused(graph(text, matmul_weights()), "'xq'", "uint8", "half of the range")
    signed = text.replace("[xq] xq = QuantizeLinear", "[xq] xq = QuantizeLinear <output_dtype = 3>")
    assert prepare(graph(signed, matmul_weights())).repairs == ()


def test_weights_that_need_their_zero_point_are_refused() -> None:
    w = np.arange(512).reshape(32, 16).astype(np.uint8)
    error = refused(
        graph(MATMUL, matmul_weights(wz=np.full(16, 3, np.uint8), w=w)), "'wd'", "-3 to 252"
    )
    assert error.operator == "DequantizeLinear"


def test_uint8_that_others_read_as_it_is_is_refused() -> None:
    text = """
    g (float[4] x) => (float[4] y, float[4] v) {
      [q] a = QuantizeLinear (x, s, z)
      [d] y = DequantizeLinear (a, s, z)
      [raw] v = Cast <to = 1> (a)
    }"""
    weights = {"s": np.float32(0.1), "z": np.uint8(128)}
    refused(graph(text, weights), "'q'", "Cast 'raw'")
    text = """
    g (float[4] x) => (uint8[4] y) { [q] y = QuantizeLinear (x, s, z) }"""
    refused(graph(text, weights), "'q'", "'y' is uint8")


def test_uint8_pictures_are_dequantized_by_arithmetic() -> None:
    text = """
    g (uint8[2,8] x) => (float[2,8] y) {
      [d] d = DequantizeLinear (x, s, z)
      [e] e = DequantizeLinear (x, s)
      y = Add (d, e)
    }"""
    model = graph(text, {"s": np.float32(1 / 255), "z": np.uint8(3)})
    assert not built(model)[0]
    picture = RANDOM.integers(0, 256, (2, 8)).astype(np.uint8)
    prepared = repaired(model, {"x": picture})
    assert "2 nodes ('d', 'e')" in prepared.repairs[0]
    assert built(prepared.model)[0]


CONV = """
g (float[1,2,6,6] x) => (float[1,3,6,6] y) {
  [wd] wd = DequantizeLinear <axis = 0> (w, ws, wz)
  [bd] bd = DequantizeLinear <axis = 0> (b, bs, bz)
  [conv] y = Conv <pads = [1,1,1,1]> (x, wd, bd)
}"""
CONV_WEIGHTS = {
    "w": RANDOM.integers(-127, 128, (3, 2, 3, 3)).astype(np.int8),
    "ws": RANDOM.uniform(0.01, 0.02, 3).astype(np.float32),
    "wz": np.zeros(3, np.int8),
    "b": RANDOM.integers(-90000, 90000, 3).astype(np.int32),
    "bs": RANDOM.uniform(1e-5, 2e-5, 3).astype(np.float32),
    "bz": np.zeros(3, np.int32),
}


def test_int32_biases_become_floats() -> None:
    model = graph(CONV, CONV_WEIGHTS)
    assert not built(model)[0]
    prepared = repaired(model, {"x": uniform(1, 2, 6, 6)})
    assert "('bd')" in prepared.repairs[0]
    assert [node.name for node in prepared.model.graph.node] == ["wd", "conv"]
    found = constants(prepared.model)
    assert found["bd"].dtype == np.float32
    assert "b" not in found
    assert built(prepared.model)[0]


def test_biases_in_external_data_are_read(tmp_path: Path) -> None:
    feed = {"x": uniform(1, 2, 6, 6)}
    expected = ReferenceEvaluator(graph(CONV, CONV_WEIGHTS)).run(None, feed)[0]
    path = tmp_path / "m.onnx"
    onnx.save(
        graph(CONV, CONV_WEIGHTS), path, save_as_external_data=True, location="w", size_threshold=0
    )
    prepared = prepare(onnx.load(path, load_external_data=False), tmp_path)
    onnx.load_external_data_for_model(prepared.model, str(tmp_path))
    np.testing.assert_array_equal(ReferenceEvaluator(prepared.model).run(None, feed)[0], expected)


def test_int32_that_is_computed_is_refused() -> None:
    text = "g (int32[4] x) => (float[4] y) { [d] y = DequantizeLinear (x, s) }"
    model = graph(text, {"s": np.float32(0.1)})
    refused(model, "'d'", "int32")


AXES = [
    ("Conv", "1,2,6,6", (3, 2, 3, 3), 1, 0, ""),
    ("ConvTranspose", "1,3,6,6", (3, 2, 3, 3), 0, 1, ""),
    ("MatMul", "8,32", (32, 16), 0, 1, ""),
    ("MatMul", "2,8,32", (2, 32, 16), -2, 2, ""),
    ("Gemm", "8,32", (32, 16), 0, 1, ""),
    ("Gemm", "8,32", (16, 32), 1, 0, "<transB = 1>"),
]


@pytest.mark.parametrize(("operator", "x", "shape", "wrong", "right", "attributes"), AXES)
def test_the_wrong_axis_is_told(
    operator: str, x: str, shape: tuple[int, ...], wrong: int, right: int, attributes: str
) -> None:
    def prepared(axis: int, between: str = "") -> Prepared:
        text = f"""
        g (float[{x}] x) => (float[K] y) {{
          [wd] wd = DequantizeLinear <axis = {axis}> (w, ws)
          {between or "v = Identity (wd)"}
          [use] y = {operator} {attributes} (x, {"v" if between else "wd"})
        }}"""
        scales = np.full(shape[axis], 0.1, np.float32)
        return prepare(graph(text, {"w": np.zeros(shape, np.int8), "ws": scales}))

    assert prepared(right).warnings == ()
    (warning,) = prepared(wrong).warnings
    assert f"axis {wrong % len(shape)}" in warning
    assert f"only axis {right}" in warning
    assert "'use'" in warning
    assert prepared(wrong, "v = Cast <to = 1> (wd)").warnings == (warning,)
    # Between a Transpose and its user the axis has another number.
    assert prepared(wrong, "v = Transpose (wd)").warnings == ()


INTEGER = {
    "DynamicQuantizeLinear": "a, b, c = DynamicQuantizeLinear (x) y = Cast <to = 1> (a)",
    "MatMulInteger": "a = Cast <to = 3> (x) b = MatMulInteger (a, a) y = Cast <to = 1> (b)",
    "QLinearAdd": "a = com.microsoft.QLinearAdd (x, x) y = Cast <to = 1> (a)",
}


@pytest.mark.parametrize("operator", INTEGER)
def test_integer_operators_are_refused(operator: str) -> None:
    error = refused(
        graph(f"g (float[4,4] x) => (float[4,4] y) {{ {INTEGER[operator]} }}"), operator, "Q/DQ"
    )
    assert error.operator == operator


@pytest.mark.parametrize("kind", ["double", "string", "complex64", "uint16", "seq(float[2])"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_types_that_tensorrt_lacks_at_the_border_are_refused(kind: str, side: str) -> None:
    wide = kind if kind.startswith("seq") else f"{kind}[2]"
    ends = (wide, "float[2]") if side == "input" else ("float[2]", wide)
    model = graph(f"g ({ends[0]} x) => ({ends[1]} y) {{ y = Identity (x) }}")
    name = {"seq(float[2])": "sequence"}.get(kind, kind)
    error = refused(model, f"{side} '{'x' if side == 'input' else 'y'}'", name)
    assert error.tensor == ("x" if side == "input" else "y")


@pytest.mark.parametrize(
    "kind", ["float", "float16", "bfloat16", "int64", "int32", "bool", "uint8"]
)
def test_types_that_tensorrt_has_pass(kind: str) -> None:
    model = graph(f"g ({kind}[2] x) => ({kind}[2] y) {{ y = Identity (x) }}")
    assert prepare(model).repairs == ()
    assert built(model)[0]


def test_float64_inside_is_told() -> None:
    text = """
    g (float[2] x) => (float[2] y) {
      [wide] a = Cast <to = 11> (x)
      [sum] b = Add (a, k)
      y = Cast <to = 1> (b)
    }"""
    (warning,) = prepare(graph(text, {"k": np.float64(1)})).warnings
    assert "float64" in warning
    assert "2 nodes ('wide', 'sum')" in warning


def test_branches_are_repaired_with_what_they_read_from_outside() -> None:
    text = """
    g (float[4] x, bool flag) => (float[4] y) {
      [choose] y = If (flag) <
        then_branch = t () => (float[4] t) {
          [q] q = QuantizeLinear (x, s, z)
          [d] t = DequantizeLinear (q, s, z)
        },
        else_branch = e () => (float[4] e) {
          [b] b = DequantizeLinear (k, s)
          e = Add (x, b)
        }>
    }"""
    weights = {
        "s": np.float32(0.1),
        "z": np.uint8(128),
        "k": np.arange(4, dtype=np.int32),
    }
    for flag in (True, False):
        feed = {"x": uniform(4, to=20), "flag": np.array(flag)}
        prepared = repaired(graph(text, weights), feed)
        assert len(prepared.repairs) == 2


def test_functions_that_quantize_are_written_out() -> None:
    text = "g (float[4] x) => (float[4] y) { [call] y = local.quantized (x) }"
    body = """
    <domain: "local", opset_import: ["": 21]> quantized (v) => (r) {
      s = Constant <value = float {0.1}> ()
      z = Constant <value = uint8 {128}> ()
      q = QuantizeLinear (v, s, z)
      r = DequantizeLinear (q, s, z)
    }"""
    prepared = repaired(graph(text, extra=body), {"x": uniform(4, to=20)})
    assert len(prepared.repairs) == 1
    assert "Constant" in {node.op_type for node in prepared.model.graph.node}


def test_a_graph_as_onnxruntime_quantizes_it_becomes_buildable() -> None:
    """Symmetric int8 with int32 biases, the rest of a network around it."""
    text = """
    g (float[8,32] x) => (float[8,16] y) {
      [xq] xq = QuantizeLinear (x, s, z)
      [xd] xd = DequantizeLinear (xq, s, z)
      [wd] wd = DequantizeLinear <axis = 1> (w, ws, wz)
      [bd] bd = DequantizeLinear <axis = 0> (b, bs, bz)
      [fc] a = Gemm (xd, wd, bd)
      [relu] y = Relu (a)
    }"""
    weights = matmul_weights() | {
        "b": RANDOM.integers(-9000, 9000, 16).astype(np.int32),
        "bs": np.full(16, 7e-4, np.float32),
        "bz": np.zeros(16, np.int32),
    }
    model = graph(text, weights)
    assert not built(model)[0]
    prepared = repaired(model, {"x": uniform(8, 32)})
    assert built(prepared.model)[0]


def test_many_nodes_share_one_sentence_and_one_constant() -> None:
    nodes = [
        f"q{i} = QuantizeLinear (x, s, z) [d{i}] y{i} = DequantizeLinear (q{i}, s, z)"
        for i in range(5)
    ]
    outputs = ", ".join(f"float[4] y{i}" for i in range(5))
    model = graph(
        f"g (float[4] x) => ({outputs}) {{ {' '.join(nodes)} }}",
        {"s": np.float32(0.1), "z": np.uint8(128)},
    )
    prepared = repaired(model, {"x": uniform(4, to=20)})
    (message,) = prepared.repairs
    assert message == "uint8 around 128 became int8 around 0: 5 nodes ('q0', 'q1', 'q2', ...)."
    assert set(constants(prepared.model)) == {"s", "z_int8"}


def test_helpers_of_the_test_see_a_wrong_repair() -> None:
    """`repaired` compares answers: shifting a zero point alone must not pass."""
    model = graph(MATMUL, matmul_weights(np.int8(0)))
    broken = helper.make_tensor("z", TensorProto.INT8, [], [5])
    feed = {"x": uniform(8, 32, to=9)}
    expected = ReferenceEvaluator(model).run(None, feed)[0]
    model.graph.initializer[1].CopyFrom(broken)
    assert np.abs(ReferenceEvaluator(model).run(None, feed)[0] - expected).max() > 0.01


FP8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("cast", [False, True])
def test_fp8_convolutions_with_one_scale_get_one_for_each_channel(
    operator: str, cast: bool
) -> None:
    tail = "[wh] wh = Cast <to = 10> (wd) [xh] xh = Cast <to = 10> (xd)" if cast else ""
    w, x = ("wh", "xh") if cast else ("wd", "xd")
    model = graph(
        f"""g (float[1,4,6,6] x) => ({"float16" if cast else "float"}[1,N,H,W] y) {{
            [xq] xq = QuantizeLinear (x, s, z) [xd] xd = DequantizeLinear (xq, s, z)
            [wd] wd = DequantizeLinear (w, ws, z) {tail} [conv] y = {operator} ({x}, {w})
        }}""",
        {
            "s": np.float32(1 / 16),
            "z": numpy_helper.from_array(np.zeros((), FP8)),
            "w": numpy_helper.from_array(
                uniform(4, 8 if operator != "Conv" else 4, 3, 3).astype(FP8)
            ),
            "ws": np.float32(1 / 64),
        },
    )
    assert prepare(graph_copy(model)).repairs == ()
    prepared = repaired(model, {"x": uniform(1, 4, 6, 6)}, is_rtx=True)
    assert "one scale" in prepared.repairs[0]
    (dequantize,) = [n for n in prepared.model.graph.node if n.name == "wd"]
    scale = constants(prepared.model)[dequantize.input[1]]
    assert scale.tolist() == [1 / 64] * (4 if operator == "Conv" else 8)
    activation = next(n for n in prepared.model.graph.node if n.name == "xd")
    assert constants(prepared.model)[activation.input[1]].size == 1


@pytest.mark.parametrize("product", ["MatMul (xd, W)", "Gemm <alpha = 2.0> (xd, W, b)"])
@pytest.mark.parametrize("weight", ["constant", "rounded here", "cast"])
@pytest.mark.parametrize("channels", [False, True])
def test_quantized_matrices_are_turned_for_the_kernels_of_rtx(
    product: str, weight: str, channels: bool
) -> None:
    name = "wh" if weight == "cast" else "wd"
    first = "[wq] wq = QuantizeLinear <axis = 1> (w, ws, wz)" if weight == "rounded here" else ""
    last = "[wc] wc = Cast <to = 10> (wd) [wh] wh = Cast <to = 1> (wc)" if weight == "cast" else ""
    model = graph(
        f"""g (float[8,32] x) => (float[8,16] y) {{
            [xq] xq = QuantizeLinear (x, s, z) [xd] xd = DequantizeLinear (xq, s, z) {first}
            [wd] wd = DequantizeLinear <axis = 1> ({"wq" if first else "w"}, ws, wz) {last}
            [mm] y = {product.replace("W", name)}
        }}""",
        {
            **matmul_weights(),
            **({"w": uniform(32, 16)} if first else {}),
            "ws": np.full(16, 1 / 32, np.float32) if channels else np.float32(1 / 32),
            "wz": np.zeros(16, np.int8) if channels else np.int8(0),
            "b": uniform(16),
        },
    )
    assert prepare(graph_copy(model)).notes == ()
    prepared = repaired(model, {"x": uniform(8, 32)}, is_rtx=True)
    assert "turned" in prepared.notes[0]
    assert prepared.repairs == ()
    dequantize = next(n for n in prepared.model.graph.node if n.name in ("wq" if first else "wd",))
    assert constants(prepared.model)[dequantize.input[0]].shape == (16, 32)
    assert built(prepared.model)[0]


@pytest.mark.parametrize("rounded_here", [False, True])
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_int8_convolutions_compute_in_floats_where_a_release_has_none(
    operator: str, rounded_here: bool
) -> None:
    axis = 0 if operator == "Conv" else 1
    first = f"[wq] wq = QuantizeLinear <axis = {axis}> (w, ws, wz)" if rounded_here else ""
    model = graph(
        f"""g (float[1,4,6,6] x) => (float[1,N,H,W] y) {{
            [xq] xq = QuantizeLinear (x, s, z) [xd] xd = DequantizeLinear (xq, s, z) {first}
            [wd] wd = DequantizeLinear <axis = {axis}> ({"wq" if first else "w"}, ws, wz)
            [conv] y = {operator} (xd, wd)
        }}""",
        {
            "s": np.float32(1 / 16),
            "z": np.int8(0),
            "w": uniform(4, 4, 3, 3)
            if rounded_here
            else RANDOM.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8),
            "ws": RANDOM.uniform(0.01, 0.02, 4).astype(np.float32),
            "wz": np.zeros(4, np.int8),
        },
    )
    feed = {"x": uniform(1, 4, 6, 6)}
    expected = ReferenceEvaluator(model).run(None, feed)[0]
    assert not prepare(graph_copy(model), is_rtx=True).changed
    prepared = prepare(model, is_rtx=True, int8_convolutions=False)
    assert "('conv')" in prepared.warnings[0]
    assert [n.op_type for n in prepared.model.graph.node] == [
        *("QuantizeLinear", "DequantizeLinear", operator)
    ]
    got = ReferenceEvaluator(prepared.model).run(None, feed)[0]
    np.testing.assert_array_equal(got, expected)
    assert built(prepared.model)[0]


def test_matrices_that_others_read_too_or_that_are_as_wanted_are_not_turned() -> None:
    shared = MATMUL.replace("(float[8,16] y)", "(float[8,16] y, float[32,16] t)").replace(
        "[mm]", "[other] t = Neg (wd) [mm]"
    )
    assert prepare(graph(shared, matmul_weights()), is_rtx=True).notes == ()
    gemm = MATMUL.replace("MatMul (xd, wd)", "Gemm <transB = 1> (xd, wd)").replace(
        "<axis = 1>", "<axis = 0>"
    )
    weights = matmul_weights(w=RANDOM.integers(-127, 128, (16, 32)).astype(np.int8))
    assert prepare(graph(gemm, weights), is_rtx=True).notes == ()
    wrong = {**matmul_weights(wz=np.zeros(32, np.int8)), "ws": uniform(32) + 5}
    prepared = prepare(graph(MATMUL.replace("<axis = 1>", "<axis = 0>"), wrong), is_rtx=True)
    assert prepared.notes == ()
    assert "axis 0" in prepared.warnings[0]


def graph_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
