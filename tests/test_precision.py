"""Casting to fp16 and bf16: right answers, right types, and a reason for what stays."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner, Result

import unirt
from unirt import DataError, Model, ModelError, OptionError, UnirtError, cli
from unirt.precision import Calibration, Cast, Range, cast, observe

EXAMPLES = Path(__file__).parent.parent / "examples"
DIGITS = EXAMPLES / "digits" / "digits.onnx"
RANDOM = np.random.default_rng(0)

Arrays = Mapping[str, Any]


def weight(*shape: int, scale: float = 1.0) -> Any:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def graph(
    text: str, weights: Arrays | None = None, opset: int = 17, ir: int = 8, extra: str = ""
) -> onnx.ModelProto:
    """A model from ONNX's text form, with arrays as initializers."""
    domains = f'["": {opset}, "local": 1, "acme": 1]'
    model = parser.parse_model(f"<ir_version: {ir}, opset_import: {domains}> {text} {extra}")
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def proto(result: Cast) -> onnx.ModelProto:
    return onnx.load_from_string(result.model.primary.read())


def run(model: onnx.ModelProto, feed: Arrays) -> list[Any]:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feed)))


def narrow(
    model: onnx.ModelProto, feed: Arrays, error: float, **options: Any
) -> tuple[onnx.ModelProto, Cast]:
    """Casts to fp16 and checks it: valid in full, answers within `error` of the largest value."""
    result = cast(model, "fp16", **options)
    made = proto(result)
    onnx.checker.check_model(made, full_check=True)
    low = {
        name: np.asarray(value).astype(np.float16)
        if not options.get("keep_io", True) and np.asarray(value).dtype == np.float32
        else value
        for name, value in feed.items()
    }
    for expected, got in zip(run(model, feed), run(made, low), strict=True):
        scale = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), expected, rtol=0, atol=error * scale
        )
    return made, result


def casts(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "Cast" for node in model.graph.node)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of all tensors as ONNX infers them, without believing the file's own."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def input_types(model: onnx.ModelProto, name: str) -> list[int]:
    known = types(model)
    return [known[tensor] for tensor in node(model, name).input if tensor]


HALF, FLOAT, BFLOAT16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16

CNN = """
cnn (float[N,3,8,8] x) => (float[N,5] y) {
  [conv] c = Conv <pads = [1,1,1,1]> (x, w, b)
  [bn] n = BatchNormalization (c, scale, shift, mean, var)
  [relu] r = Relu (n)
  [pool] p = GlobalAveragePool (r)
  [flat] f = Flatten (p)
  [fc] y = Gemm <transB = 1> (f, wf, bf)
}"""
CNN_WEIGHTS = {
    "w": weight(6, 3, 3, 3, scale=0.3),
    "b": weight(6),
    "scale": weight(6),
    "shift": weight(6),
    "mean": weight(6),
    "var": np.abs(weight(6)) + 0.5,
    "wf": weight(5, 6),
    "bf": weight(5),
}


def test_a_convolutional_network_computes_in_fp16_between_float32_ends() -> None:
    model = graph(CNN, CNN_WEIGHTS)
    made, result = narrow(model, {"x": weight(2, 3, 8, 8)}, 5e-3)
    assert result.kept == {}
    assert result.notes == ()
    assert casts(made) == 2
    known = types(made)
    assert [known["x"], known["y"]] == [FLOAT, FLOAT]
    assert {known[name] for name in (*CNN_WEIGHTS, "c", "n", "r", "p", "f")} == {HALF}
    assert {n.name for n in model.graph.node} <= {n.name for n in made.graph.node}
    assert result.model.primary.size < 0.75 * unirt.Model(model).size


def test_inputs_and_outputs_become_narrow_when_told_so() -> None:
    made, result = narrow(graph(CNN, CNN_WEIGHTS), {"x": weight(2, 3, 8, 8)}, 5e-3, keep_io=False)
    assert casts(made) == 0
    assert [str(s.dtype) for s in (*result.model.inputs, *result.model.outputs)] == ["float16"] * 2
    assert [s.name for s in (*result.model.inputs, *result.model.outputs)] == ["x", "y"]


def test_a_model_keeps_its_name_and_its_answers() -> None:
    result = cast(DIGITS, "fp16")
    assert result.model.name == "digits"
    assert result.precision == "fp16"
    images = np.load(DIGITS.with_name("test.npz"))
    image = next(images[key] for key in images.files if images[key].ndim == 4)[:32]
    expected = run(onnx.load(DIGITS), {"image": image})[0]
    got = run(proto(result), {"image": image})[0]
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())
    assert (got.argmax(1) == expected.argmax(1)).all()


TRANSFORMER = """
block (float[N,T,16] x, bool[N,1,T,T] mask) => (float[N,T,16] y) {
  [norm] n = LayerNormalization <axis = -1> (x, g1, b1)
  [q] q0 = MatMul (n, wq)
  [k] k0 = MatMul (n, wk)
  [v] v0 = MatMul (n, wv)
  heads = Constant <value_ints = [0, 0, 2, 8]> ()
  [qr] q1 = Reshape (q0, heads)
  [kr] k1 = Reshape (k0, heads)
  [vr] v1 = Reshape (v0, heads)
  [qt] q2 = Transpose <perm = [0,2,1,3]> (q1)
  [kt] k2 = Transpose <perm = [0,2,3,1]> (k1)
  [vt] v2 = Transpose <perm = [0,2,1,3]> (v1)
  [scores] s0 = MatMul (q2, k2)
  scale = Constant <value_float = 0.35355339> ()
  [scaled] s1 = Mul (s0, scale)
  lowest = Constant <value = float {-3.4028235e38}> ()
  zero = Constant <value = float {0}> ()
  [bias] m = Where (mask, zero, lowest)
  [masked] s2 = Add (s1, m)
  [softmax] p = Softmax <axis = -1> (s2)
  [context] c0 = MatMul (p, v2)
  [ct] c1 = Transpose <perm = [0,2,1,3]> (c0)
  flat = Constant <value_ints = [0, 0, 16]> ()
  [cr] c2 = Reshape (c1, flat)
  [out] c3 = MatMul (c2, wo)
  [residual] y = Add (x, c3)
}"""
TRANSFORMER_WEIGHTS = {name: weight(16, 16, scale=0.2) for name in ("wq", "wk", "wv", "wo")} | {
    "g1": weight(16),
    "b1": weight(16),
}


def test_a_transformer_block_masks_with_the_lowest_number_that_fp16_has() -> None:
    mask = np.tril(np.ones((1, 1, 6, 6), bool)).repeat(2, 0)
    feed = {"x": weight(2, 6, 16), "mask": mask}
    made, result = narrow(graph(TRANSFORMER, TRANSFORMER_WEIGHTS), feed, 5e-3)
    assert result.kept == {}
    assert len(result.notes) == 1
    assert "'lowest'" in result.notes[0]
    assert "65504" in result.notes[0]
    assert set(input_types(made, "softmax")) == {HALF}
    mask[1, 0, 0] = False  # all of a row: with -inf in place of the lowest it would be NaN
    assert np.isfinite(run(made, feed)[0]).all()


@pytest.mark.parametrize("opset", [11, 13, 18, 19])
def test_resize_keeps_float32_scales(opset: int) -> None:
    text = """
    g (float[1,2,5,5] x) => (float[1,2,10,10] y) {
      [a] a = Relu (x)
      [resize] r = Resize <mode = "linear"> (a, roi, scales)
      [b] y = Sigmoid (r)
    }"""
    weights = {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    made, result = narrow(graph(text, weights, opset), {"x": weight(1, 2, 5, 5)}, 5e-3)
    assert input_types(made, "resize") == [HALF, FLOAT, FLOAT]
    assert casts(made) == 2
    assert result.kept == {}


def test_an_operator_that_takes_no_fp16_stays_with_its_reason() -> None:
    text = """
    g (float[1,4,4] boxes, float[1,1,4] scores, float[4] z) => (int64[K,3] y, float[4] v) {
      [nms] y = NonMaxSuppression (boxes, scores)
      [v] v = Exp (z)
    }"""
    feed = {"boxes": np.abs(weight(1, 4, 4)), "scores": weight(1, 1, 4), "z": weight(4)}
    _, result = narrow(graph(text), feed, 5e-3)
    assert result.kept == {"nms": "NonMaxSuppression has no fp16 form in opset 17"}


@pytest.mark.parametrize("keep_io", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_branches_read_captured_values_in_float32(keep_io: bool, flag: bool) -> None:
    text = """
    g (float[4] x, bool flag) => (float[4] y, float[4] z) {
      [a] a = Exp (x)
      [z] z = Mul (a, w)
      [choose] i = If (flag) <
        then_branch = t () => (float[4] t) {
          [inner] t1 = Mul (a, w)
          t2 = Add (t1, x)
          [nested] t = If (flag) <
            then_branch = u () => (float[4] u) { u = Add (t2, a) },
            else_branch = v () => (float[4] v) { v = Sub (t2, z) }>
        },
        else_branch = e () => (float[4] e) { e = Add (a, z) }>
      [c] y = Sqrt (i)
    }"""
    model = graph(text, {"w": np.abs(weight(4))})
    feed = {"x": np.abs(weight(4)), "flag": np.array(flag)}
    made, result = narrow(model, feed, 5e-3, keep_io=keep_io)
    assert set(result.kept) == {"choose"}
    assert "subgraph" in result.kept["choose"]
    assert input_types(made, "c") == [HALF]


def test_a_loop_carries_float32_and_reads_captured_values() -> None:
    text = """
    g (float[3] x) => (float[3] y, float[T,3] all) {
      [a] a = Sigmoid (x)
      n = Constant <value_int = 5> ()
      on = Constant <value = bool {1}> ()
      [loop] s, all = Loop (n, on, a) <
        body = b (int64 i, bool c, float[3] v) => (bool c2, float[3] v2, float[3] o) {
          c2 = Identity (c)
          v1 = Mul (v, w)
          v2 = Add (v1, a)
          o = Neg (v2)
        }>
      [end] y = Tanh (s)
    }"""
    made, result = narrow(graph(text, {"w": weight(3)}), {"x": weight(3)}, 5e-3)
    assert set(result.kept) == {"loop"}
    assert input_types(made, "end") == [HALF]


def test_the_models_own_functions_stay_in_float32() -> None:
    text = """
    g (float[4] x) => (float[4] y) {
      [a] a = Exp (x)
      [call] b = local.twice (a)
      [c] y = Sqrt (b)
    }"""
    body = """
    <domain: "local", opset_import: ["": 17]> twice (v) => (r) { r = Add (v, v) }"""
    made, result = narrow(graph(text, extra=body), {"x": weight(4)}, 5e-3)
    assert set(result.kept) == {"call"}
    assert "function" in result.kept["call"]
    assert input_types(made, "c") == [HALF]


QDQ = """
g (float[1,4,8,8] x) => (float[1,4,4,4] y) {
  [xq] xq = QuantizeLinear (x, s, z)
  [xd] xd = DequantizeLinear (xq, s, z)
  [wd] wd = DequantizeLinear <axis = 0> (wq, ws, wz)
  [conv] c = Conv <pads = [1,1,1,1]> (xd, wd, b)
  [relu] r = Relu (c)
  [rq] rq = QuantizeLinear (r, s, z)
  [rd] rd = DequantizeLinear (rq, s, z)
  [pool] p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (rd)
  [pq] pq = QuantizeLinear (p, s, z)
  [pd] y = DequantizeLinear (pq, s, z)
}"""
QDQ_WEIGHTS = {
    "s": np.float32(0.03),
    "z": np.int8(0),
    "wq": RANDOM.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8),
    "ws": np.full(4, 2e-3, np.float32),
    "wz": np.zeros(4, np.int8),
    "b": weight(4),
}


@pytest.mark.parametrize("opset", [13, 17, 21, 23])  # from 19 on, scales might be fp16
def test_quantization_and_what_stands_between_stay_in_float32(opset: int) -> None:
    ir = 8 if opset < 19 else 10
    made, result = narrow(graph(QDQ, QDQ_WEIGHTS, opset, ir), {"x": weight(1, 4, 8, 8)}, 0.03)
    known = types(made)
    assert [known["s"], known["ws"]] == [FLOAT, FLOAT]
    assert input_types(made, "conv") == [HALF, HALF, HALF]
    assert set(result.kept) == {"xq", "xd", "wd", "rq", "rd", "pool", "pq", "pd"}
    # Behind xd and wd, and before rq: none around the pool, none at the ends.
    assert casts(made) == 3


def test_a_weight_shared_by_both_widths_is_there_in_both() -> None:
    text = """
    g (float[4] x, float[4] z) => (float[4] y, float[4] v) {
      k = Constant <value_floats = [1.5, 2.5, 0.5, 3.0]> ()
      [low] l0 = Mul (x, w)
      [low2] y = Mul (l0, k)
      [high0] h0 = Mul (z, big)
      [high] h1 = Div (h0, big)
      [unknown] h2 = acme.Strange (w, k)
      [v] v = Mul (h1, w)
    }"""
    weights = {"w": weight(4), "big": np.full(4, 1e5, np.float32)}
    made = proto(cast(graph(text, weights), "fp16"))
    by_name = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    assert by_name == {"w": FLOAT, "w__fp16": HALF, "big": FLOAT}
    assert node(made, "low").input[1] == "w__fp16"
    assert node(made, "low2").input[1] == "k__fp16"
    assert list(node(made, "unknown").input) == ["w", "k"]


def test_constants_in_nodes_are_cast_in_every_form() -> None:
    text = """
    g (float[3] x, int64[1] shape, int64[3] i) => (float[3] y) {
      a = Constant <value_float = 2.5> ()
      b = Constant <value_floats = [1.0, 2.0, 3.0]> ()
      c = Constant <value = float[3] {4.0, 5.0, 6.0}> ()
      d0 = ConstantOfShape (shape)
      d1 = ConstantOfShape <value = float[1] {7.0}> (shape)
      e = Cast <to = 1> (i)
      s0 = Add (x, a)
      s1 = Add (s0, b)
      s2 = Add (s1, c)
      s3 = Add (s2, d0)
      s4 = Add (s3, d1)
      y = Add (s4, e)
    }"""
    feed = {"x": weight(3), "shape": np.array([3]), "i": np.arange(3)}
    made, result = narrow(graph(text), feed, 5e-3)
    known = types(made)
    assert {known[name] for name in ("a", "b", "c", "d0", "d1", "e")} == {HALF}
    assert result.kept == {}


def test_generators_make_the_narrow_type_or_say_that_they_do_not() -> None:
    text = """
    g (float[2,2] x) => (float[2,2] y) {
      [eye] a = EyeLike (x)
      [noise] b = RandomNormalLike (x)
      [free] c = RandomUniform <shape = [2, 2], low = 1.0> ()
      s0 = Add (a, b)
      s1 = Add (s0, c)
      y = Add (s1, x)
    }"""
    made = proto(cast(graph(text), "fp16"))
    onnx.checker.check_model(made, full_check=True)
    assert {types(made)[name] for name in ("a", "b", "c")} == {HALF}
    (y,) = ReferenceEvaluator(made).run(None, {"x": weight(2, 2)})
    assert np.isfinite(y).all()


def test_weights_beyond_the_range_keep_their_node_in_float32() -> None:
    text = (
        "g (float[4] x) => (float[4] y) { [big] a = Mul (x, w) [back] b = Mul (a, v) y = Exp (b) }"
    )
    weights = {"w": np.array([1, 2, 1e5, 70000], np.float32), "v": np.full(4, 1e-5, np.float32)}
    made, result = narrow(graph(text, weights), {"x": np.full(4, 0.5, np.float32)}, 5e-3)
    assert set(result.kept) == {"big"}
    assert "2 of 4 values of 'w' are beyond fp16" in result.kept["big"]
    assert types(made)["w"] == FLOAT
    assert not cast(graph(text, weights), "bf16").kept


def test_weights_that_would_vanish_keep_their_node_in_float32() -> None:
    text = """
    g (float[4] x) => (float[4] y) {
      [tiny] a = Mul (x, w)
      [safe] b = Add (a, epsilon)
      [root] c = Sqrt (b)
      [sum] y = Add (c, dead)
    }"""
    weights = {
        "w": np.full(4, 1e-9, np.float32),
        "epsilon": np.float32(1e-12),
        "dead": np.array([1e-20, 1e-21, 1e-22, 0.5], np.float32),
    }
    _, result = narrow(graph(text, weights), {"x": np.zeros(4, np.float32)}, 5e-3)
    assert set(result.kept) == {"tiny", "safe"}  # but no dead channels beside living ones
    assert "4 of 4 values of 'w' become 0" in result.kept["tiny"]


LOUD = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 8] x) => (float[N, 8] y) {
  gain = Constant <value_float = 200.0> ()
  [up] big = Mul (x, gain)
  [square] squared = Mul (big, big)
  axes = Constant <value_ints = [1]> ()
  [total] sum = ReduceSum (squared, axes)
  [share] part = Div (squared, sum)
  [down] y = Sqrt (part)
}"""


def test_values_that_leave_the_range_keep_their_nodes_in_float32() -> None:
    model = Model(parser.parse_model(LOUD))
    x = np.linspace(-4, 4, 64, dtype=np.float32).reshape(8, 8)
    with unirt.load(model, "reference") as session:
        right = session.run(x)["y"]
        blind, seeing = cast(model, "fp16"), cast(model, "fp16", data=[x[:4], x[4:]])
    assert not blind.kept
    assert set(seeing.kept) == {"square", "total", "share"}
    assert "'squared' reaches 640000, and fp16 65504" in seeing.kept["square"]
    for done, holds in ((blind, False), (seeing, True)):
        # Not onnxruntime, which computes all of this in float32 on a CPU.
        with unirt.load(done.model, "reference") as session, np.errstate(all="ignore"):
            assert np.allclose(session.run(x)["y"], right, atol=2e-3) is holds


def test_values_too_small_for_the_range_keep_their_nodes_in_float32() -> None:
    text = LOUD.replace("200.0", "0.0001")
    done = cast(Model(parser.parse_model(text)), "fp16", data=[np.ones((2, 8), np.float32)])
    assert "'squared' is at most 1e-08, where fp16 has few digits left" in done.kept["square"]
    assert not cast(Model(parser.parse_model(text)), "bf16", data=[np.ones((2, 8), "f4")]).kept


def test_what_a_mask_switches_off_is_no_value_out_of_range() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[2, 4] x, bool[2, 4] off) => (float[2, 4] y) {
      low = Constant <value_float = -1e9> ()
      zero = Constant <value_float = 0.0> ()
      mask = Where (off, low, zero)
      scores = Add (x, mask)
      y = Softmax (scores)
    }"""
    off = np.array([[False, True, False, False], [True, False, False, True]])
    feed = {"x": np.ones((2, 4), np.float32), "off": off}
    assert not cast(Model(parser.parse_model(text)), "fp16", data=[feed]).kept


# --- values that were seen: ends, constants, quantized graphs ------------------------------------


def seen(model: onnx.ModelProto, feed: Arrays, error: float = 5e-3, **options: Any) -> Cast:
    """Casts to fp16 with these values as data, and holds the answers, computed in fp16, against
    those of float32.
    """
    done = cast(model, "fp16", data=[feed], **options)
    made = proto(done)
    onnx.checker.check_model(made, full_check=True)
    named = {value.name: value.type.tensor_type.elem_type for value in made.graph.input}
    low = {k: v.astype(np.float16) if named[k] == HALF else v for k, v in feed.items()}
    expected = ReferenceEvaluator(model).run(None, dict(feed))
    with np.errstate(all="ignore"):
        got = ReferenceEvaluator(made).run(None, low)
    for right, answer in zip(expected, got, strict=True):
        scale = np.abs(right[np.isfinite(right)]).max(initial=0)
        np.testing.assert_allclose(np.asarray(answer, "f8"), right, rtol=0, atol=error * scale)
    return done


def test_an_input_out_of_range_stays_float32_whatever_was_wished() -> None:
    text = """
    g (float[4] x, float[4] small) => (float[4] y) {
      [mul] a = Mul (x, w)
      [add] y = Add (a, small)
    }"""
    x = np.array([233965, 1, -2, 3], np.float32)
    model, feed = graph(text, {"w": np.full(4, 1e-3, np.float32)}), {"x": x, "small": weight(4)}
    done = seen(model, feed, keep_io=False)
    assert done.notes == ("'x' stays float32: it reaches 233965, and fp16 65504",)
    assert set(done.kept) == {"mul"}
    ends = (*done.model.inputs, *done.model.outputs)
    assert {spec.name: str(spec.dtype) for spec in ends} == {
        "x": "float32",
        "small": "float16",
        "y": "float16",
    }
    assert cast(model, "fp16", data=[feed]).notes == ()
    ranges = observe(Model(model), [feed]).calibration("max")
    assert cast(model, "fp16", ranges=ranges, keep_io=False).notes == done.notes


def test_an_output_out_of_range_stays_float32_also_where_others_read_it() -> None:
    text = """
    g (float[4] x) => (float[4] y, float[4] v, float[4] z) {
      [up] v = Mul (x, w)
      [more] y = Mul (v, w)
      [down] a = Mul (v, s)
      [end] z = Tanh (a)
    }"""
    weights = {"w": np.full(4, 5e4, np.float32), "s": np.full(4, 1e-5, np.float32)}
    done = seen(graph(text, weights), {"x": np.ones(4, np.float32)}, keep_io=False)
    assert {str(spec.dtype) for spec in done.model.outputs if spec.name in "yv"} == {"float32"}
    assert [str(spec.dtype) for spec in done.model.outputs if spec.name == "z"] == ["float16"]
    assert done.notes == (
        "'y' stays float32: it reaches 2.5e+09, and fp16 65504",
        "'v' stays float32: it reaches 50000, and fp16 65504",
    )


def test_values_too_small_keep_an_end_in_float32_too() -> None:
    text = "g (float[2] x) => (float[2] y) { [up] a = Mul (x, w) y = Tanh (a) }"
    feed = {"x": np.full(2, 3e-6, np.float32)}
    done = seen(graph(text, {"w": np.full(2, 4e4, np.float32)}), feed, keep_io=False)
    assert done.notes == ("'x' stays float32: it is at most 3e-06, where fp16 has few digits left",)


@pytest.mark.parametrize("moved", [False, True])
def test_an_output_that_is_a_weight_out_of_range_stays_float32_without_data(moved: bool) -> None:
    """Of masks too: as an output they are numbers."""
    text = """
    g (float[2] x) => (float[2] y, float[2] big, float[2] fine) {
      y = Add (x, fine)
      NODE
    }""".replace("NODE", "big = Identity (w)" if moved else "")
    weights = {"w" if moved else "big": np.array([-1e9, 0], np.float32), "fine": weight(2)}
    done = cast(graph(text, weights), "fp16", keep_io=False)
    y, big, fine = ReferenceEvaluator(proto(done)).run(None, {"x": np.ones(2, np.float16)})
    assert (y.dtype, big.dtype, fine.dtype) == (np.float16, np.float32, np.float16)
    assert big.tolist() == [-1e9, 0]
    (note,) = done.notes
    assert note.startswith("'big' stays float32: 1 of 2 values")


def test_what_weights_make_together_is_seen_too() -> None:
    text = """
    g (float[4] x) => (float[4] y) {
      [fold] c = Mul (w, w)
      [use] a = Div (x, c)
      [back] b = Mul (a, w)
      y = Mul (b, w)
    }"""
    model = graph(text, {"w": np.full(4, 2000, np.float32)})
    done = seen(model, {"x": weight(4)})
    assert "'c' reaches 4e+06" in done.kept["fold"]
    assert {"fold", "use"} <= set(done.kept)


def test_what_weights_make_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from unirt.precision.calibration import watch

    shown: list[tuple[str, ...]] = []
    real = watch.Watcher._session

    def count(self: watch.Watcher, outputs: Any, stack: Any) -> Any:
        shown.append(tuple(outputs))
        return real(self, outputs, stack)

    monkeypatch.setattr(watch.Watcher, "_session", count)
    text = "g (float[4] x) => (float[4] y) { c = Mul (w, w) y = Add (x, c) }"
    cast(graph(text, {"w": weight(4)}), "fp16", data=[{"x": weight(4)}] * 3)
    assert shown.count(("c",)) == 1
    assert shown.count(("y",)) == 1


def test_finite_values_beside_minus_infinity_count() -> None:
    text = """
    g (float[2, 4] x, bool[2, 4] off) => (float[2, 4] y) {
      low = Constant <value = float {-inf}> ()
      [mask] m = Where (off, low, x)
      [twice] t = Add (m, m)
      [again] f = Add (t, t)
      [soft] y = Softmax (f)
    }"""
    model = graph(text.replace("{-inf}", "{0}"))
    model.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32(-np.inf)))
    x = np.array([[30000, 30000, 0, 3], [1, 2, 3, 4]], np.float32)
    off = np.array([[False, False, True, False], [True, False, False, True]])
    done = seen(model, {"x": x, "off": off})
    assert set(done.kept) == {"twice", "again", "soft"}
    assert "'t' reaches 60000, and fp16 65504" in done.kept["twice"]


def test_a_mask_that_the_caller_gives_may_hold_minus_infinity() -> None:
    text = "g (float[1, 4] x, float[1, 4] m) => (float[1, 4] y) { a = Add (x, m) y = Softmax (a) }"
    mask = np.array([[0, -np.inf, 0, 0]], np.float32)
    assert not seen(graph(text), {"x": weight(1, 4), "m": mask}).kept


def test_a_mask_hides_no_scores_that_are_out_of_range_themselves() -> None:
    text = """
    g (float[2, 4] x, bool[2, 4] off) => (float[2, 4] y) {
      low = Constant <value_float = -1e9> ()
      zero = Constant <value_float = 0.0> ()
      [mask] m = Where (off, low, zero)
      [sum] s = Add (x, m)
      [soft] y = Softmax (s)
    }"""
    x = np.array([[3e5, 1, 3e5 - 1, 3e5], [1, 2, 3, 4]], np.float32)
    off = np.array([[False, True, False, False], [True, False, False, True]])
    assert set(seen(graph(text), {"x": x, "off": off}).kept) == {"sum", "soft"}


def test_a_constant_that_only_float32_reads_is_not_told_as_clamped() -> None:
    text = """
    g (float[4] x) => (float[4] y) {
      [masked] a = Min (x, high)
      y = Tanh (a)
    }"""
    model = graph(text, {"high": np.float32(1e9)})
    assert "clamped" in cast(model, "fp16").notes[0]
    assert cast(model, "fp16", keep=["masked"]).notes == ()


def test_values_that_subgraphs_read_are_seen() -> None:
    text = """
    g (float[4] x, bool flag) => (float[4] y) {
      [up] a = Mul (x, w)
      [choose] i = If (flag) <
        then_branch = t () => (float[4] t) { t = Mul (a, s) },
        else_branch = e () => (float[4] e) { e = Div (a, w) }>
      y = Tanh (i)
    }"""
    weights = {"w": np.full(4, 6e4, np.float32), "s": np.full(4, 1e-6, np.float32)}
    for flag in (True, False):
        feed = {"x": np.full(4, 3, np.float32), "flag": np.array(flag)}
        assert set(seen(graph(text, weights), feed, keep_io=False).kept) == {"up", "choose"}


@pytest.mark.parametrize(
    "node",
    [
        "ReduceL2 <axes = [1]> (x)",
        "ReduceLogSumExp <axes = [1]> (x)",
        "LpNormalization <axis = 1> (x)",
        "LpPool <kernel_shape = [2]> (x)",
        "GlobalLpPool (x)",
        "LRN <size = 3> (x)",
        "Mean (x, x)",
        "ReduceLogSum <axes = [1]> (x)",
    ],
)
def test_sums_inside_an_operator_stay_in_float32(node: str) -> None:
    ends = "(float[2, 8, 4] x) => (float[2, 8, 4] z, float[a, b, c] y)"
    text = f"g {ends} {{ [sum] y = {node} z = Sigmoid (x) }}"
    result = cast(graph(text), "fp16")
    assert result.kept == {"sum": "what it sums up inside soon leaves fp16"}
    assert not cast(graph(text), "bf16").kept


@pytest.mark.parametrize(
    ("node", "times"), [("GlobalAveragePool (x)", 256), ("ReduceMean <axes = [1]> (x)", 4)]
)
def test_sums_inside_a_mean_are_seen(node: str, times: int) -> None:
    text = f"""
    g (float[N, 4, H, 16] x) => (float[a, b, c, d] y, float[N, 4, H, 16] z) {{
      [mean] m = {node}
      [small] s = Mul (m, w)
      y = Tanh (s)
      z = Tanh (x)
    }}"""
    model = graph(text, {"w": np.float32(1e-4)})
    for peak, stays in ((0.9 * 32752 / times, False), (1.1 * 32752 / times, True)):
        feed = {"x": np.full((1, 4, 16, 16), -peak, np.float32)}
        assert ("mean" in seen(model, feed).kept) == stays
    assert seen(model, feed).kept["mean"].startswith("the sums that it makes means of reach 36027")


LEVELS = """
g (float[2, 8] x) => (float[2, 4] y) {
  [xq] xq = QuantizeLinear (x, s, z)
  [xd] xd = DequantizeLinear (xq, s, z)
  [wd] wd = DequantizeLinear <axis = 1> (wq, ws, wz)
  [m] m = MatMul (xd, wd)
  [scale] r = Mul (m, down)
  [act] y = Tanh (r)
}"""
LEVELS_WEIGHTS = {
    "s": np.float32(0.03),
    "z": np.int8(0),
    "wq": np.tile(np.array([[127], [-3]], np.int8), (4, 4)),
    "ws": np.array([1e-2, 2e-2, 1e-2, 2e-2], np.float32),
    "wz": np.zeros(4, np.int8),
    "down": np.float32(0.1),
}


def test_a_quantized_graph_is_cast_with_data() -> None:
    model, feed = graph(LEVELS, LEVELS_WEIGHTS, 19, 9), {"x": weight(2, 8)}
    assert set(seen(model, feed).kept) == {"xq", "xd", "wd"}
    loud = LEVELS_WEIGHTS | {"s": np.float32(1000), "down": np.float32(1e-5)}
    done = seen(graph(LEVELS, loud, 19, 9), {"x": np.full((2, 8), 1e5, np.float32)}, keep_io=False)
    assert "'xd' reaches 100000, and fp16 65504" in done.kept["m"]
    assert {"m", "scale"} <= set(done.kept)
    assert "act" not in done.kept
    assert [str(spec.dtype) for spec in done.model.inputs] == ["float32"]


def test_a_network_that_was_trained_for_int8_is_cast_with_its_data() -> None:
    folder = EXAMPLES / "qat"
    done = cast(folder / "qat.onnx", "fp16", data=folder / "calibration.npz")
    stays = {node.name for node in proto(done).graph.node if "antizeLinear" in node.op_type}
    assert set(done.kept) == stays


def test_half_of_a_graph_may_be_narrow_already() -> None:
    text = """
    g (float[4, 4] x) => (float[4, 4] y) {
      h = Cast <to = 10> (x)
      p = MatMul (h, h)
      f = Cast <to = 1> (p)
      [up] a = Mul (f, w)
      [down] b = Mul (a, v)
      y = Tanh (b)
    }"""
    weights = {"w": np.float32(1e4), "v": np.float32(1e-4)}
    done = seen(graph(text, weights), {"x": np.full((4, 4), 2, np.float32)})
    assert set(done.kept) == {"up", "down"}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("data", [False, True])
def test_quantized_weights_out_of_range_keep_their_node_in_float32(moved: bool, data: bool) -> None:
    weights = LEVELS_WEIGHTS | {"ws": np.full(4, 1e3, np.float32), "down": np.float32(1e-6)}
    if moved:
        text = LEVELS.replace("<axis = 1> (wq", "<axis = 0> (wq").replace("xd, wd)", "xd, wt)")
        text = text.replace("  [m]", "  [turn] wt = Transpose <perm = [1, 0]> (wd)\n  [m]")
        weights["wq"] = np.ascontiguousarray(LEVELS_WEIGHTS["wq"].T)
    else:
        text = LEVELS
    model, feed = graph(text, weights, 19, 9), {"x": np.full((2, 8), 0.3, np.float32)}
    done = seen(model, feed) if data else cast(model, "fp16")
    assert done.kept["m"] == "'wd' goes to 127000, and fp16 to 65504"
    assert "m" not in cast(graph(LEVELS, LEVELS_WEIGHTS), "fp16").kept
    assert "m" not in cast(model, "bf16").kept


def test_quantized_weights_are_judged_channel_by_channel_and_by_zero_point() -> None:
    dead = {"ws": np.array([1e-9, 1e3, 1e3, 1e3], np.float32), "wq": np.ones((8, 4), np.int8)}
    dead["wq"][:, 0] = 127
    assert "m" not in cast(graph(LEVELS, LEVELS_WEIGHTS | dead), "fp16").kept
    shifted = {"wz": np.full(4, -100, np.int8), "ws": np.full(4, 400, np.float32)}
    kept = cast(graph(LEVELS, LEVELS_WEIGHTS | shifted), "fp16").kept
    assert kept["m"] == "'wd' goes to 90800, and fp16 to 65504"
    gone = {"ws": np.full(4, 1e-12, np.float32)}
    kept = cast(graph(LEVELS, LEVELS_WEIGHTS | gone), "fp16").kept
    assert kept["m"] == "'wd' is at most 1.27e-10, which becomes 0 in fp16"
    text = LEVELS.replace("<axis = 1> (wq", "<axis = 0, block_size = 4> (wq")
    blocks = {"ws": np.full((2, 4), 1e-2, np.float32), "wz": np.zeros((2, 4), np.int8)}
    assert "m" not in cast(graph(text, LEVELS_WEIGHTS | blocks, 21, 10), "fp16").kept
    blocks["ws"][1, 2] = 1e3
    kept = cast(graph(text, LEVELS_WEIGHTS | blocks, 21, 10), "fp16").kept
    assert kept["m"] == "'wd' goes to 127000, and fp16 to 65504"


@pytest.mark.parametrize(
    ("text", "x", "told"),
    [
        ("g (float[2] x) => (float[2] y) { a = Exp (x) y = Tanh (a) }", 100, "'a' holds inf"),
        ("g (float[2] x) => (float[2] y) { a = Log (x) y = Tanh (a) }", -1, "'a' holds NaN"),
        ("g (float[2] x) => (float[2] y) { y = Neg (x) }", np.nan, "'x' holds NaN"),
    ],
)
def test_a_network_that_overflows_by_itself_is_told(text: str, x: float, told: str) -> None:
    good, bad = (np.full(2, value, np.float32) for value in (0.5, x))
    with pytest.raises(DataError, match=f"{told} in sample 1.*not finite") as raised:
        cast(graph(text), "fp16", data=[good, bad])
    assert raised.value.sample == 1


def test_data_of_a_graph_without_floats_changes_nothing() -> None:
    model = graph("g (int64[4] x) => (int64[4] y) { y = Add (x, x) }")
    with pytest.raises(ModelError, match="nothing to cast to fp16"):
        cast(model, "fp16", data=[{"x": np.arange(4)}])
    with pytest.raises(DataError, match="no data to run"):
        cast(graph(CNN, CNN_WEIGHTS), "fp16", data=[])


def test_ranges_come_from_a_file_too(tmp_path: Path) -> None:
    model = Model(parser.parse_model(LOUD))
    ranges = observe(model, [np.full((2, 8), 4, np.float32)])
    path = ranges.calibration("max").save(tmp_path / "ranges.json")
    for given in (path, str(path), Calibration.load(path)):
        done = cast(model, "fp16", ranges=given)
        assert set(done.kept) == {"square", "total", "share"}
        assert done.notes == ()
    (note,) = cast(model, "fp16", ranges=ranges.calibration("mse")).notes
    assert note.startswith("the ranges are by mse, which may leave out the largest values")
    assert not cast(model, "bf16", ranges=ranges.calibration("mse")).notes
    path.write_text("{}")
    with pytest.raises(DataError, match="no calibration"):
        cast(model, "fp16", ranges=path)


def test_ranges_of_another_network_are_refused() -> None:
    other = Calibration({"elsewhere": Range(-1, 1)}, "max", 1, "0" * 64)
    with pytest.raises(ModelError, match=r"not those of digits.*'elsewhere'"):
        cast(DIGITS, "fp16", ranges=other)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": 3}, "keep=3 is no collection"),
        ({"keep": None}, "keep=None is no collection"),
        ({"keep": "up"}, r"keep=\['up'\]"),
        ({"keep": [["up"]]}, "no collection of names"),
        ({"keep": [3]}, "no collection of names"),
        ({"keep": (name for name in ["up"])}, "no collection of names"),
        ({"data": 5}, "data is"),
        ({"data": [5]}, "sample 0"),
        ({"data": "nosuch.npz"}, "nosuch.npz"),
        ({"data": {"x": "text"}}, "x"),
        ({"data": object()}, "data is"),
        ({"ranges": 5}, "type int, is no calibration"),
        ({"ranges": {"x": (0, 1)}}, "type dict, is no calibration"),
        ({"ranges": "nosuch.json"}, "nosuch.json cannot be read"),
        ({"ranges": b"nosuch.json"}, "type bytes, is no calibration"),
    ],
)
def test_wrong_types_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UnirtError, match=told):
        cast(Model(parser.parse_model(LOUD)), "fp16", **options)


@pytest.mark.parametrize("precision", [16, None, ["fp16"], b"fp16"])
def test_what_is_no_name_is_no_precision(precision: Any) -> None:
    with pytest.raises(OptionError, match="is no precision to cast to"):
        cast(DIGITS, precision)


def unirt_(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "120"})
    assert done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_command_tells_which_ends_stay(tmp_path: Path) -> None:
    path, data, out = tmp_path / "up.onnx", tmp_path / "x.npz", tmp_path / "h.onnx"
    onnx.save(
        graph(
            "g (float[N, 4] x) => (float[N, 4] y) { a = Tanh (x) y = Mul (a, w) }",
            {"w": np.float32(6e4)},
        ),
        path,
    )
    np.savez(data, x=np.ones((2, 4), np.float32))
    shown = unirt_("cast", path, "fp16", "-o", out, "--io", "--data", data).stdout
    assert "'y' stays float32: it reaches 45695.7, and fp16 65504" in " ".join(shown.split())
    made = Model(out)
    assert [str(spec.dtype) for spec in (*made.inputs, *made.outputs)] == ["float16", "float32"]


def test_the_command_casts_a_quantized_graph_with_data(tmp_path: Path) -> None:
    folder, out = EXAMPLES / "qat", tmp_path / "h.onnx"
    unirt_("cast", folder / "qat.onnx", "fp16", "-o", out, "--data", folder / "calibration.npz")
    assert Model(out).outputs == Model(folder / "qat.onnx").outputs


def test_the_command_says_of_a_tflite_that_only_onnx_is_cast(tmp_path: Path) -> None:
    tflite = DIGITS.with_suffix(".tflite")
    for name in ("h.tflite", "h.onnx"):
        shown = unirt_("cast", tflite, "fp16", "-o", tmp_path / name, code=3).stderr
        assert "Only ONNX graphs are cast, and it has tflite" in " ".join(shown.split())
    assert not any(tmp_path.iterdir())
    assert ".tflite" not in unirt_("cast", "--help").stdout


def test_the_command_says_who_takes_bf16_in_an_old_opset(tmp_path: Path) -> None:
    path = tmp_path / "cnn.onnx"
    onnx.save(graph(CNN, CNN_WEIGHTS), path)
    shown = " ".join(unirt_("cast", path, "bf16", "-o", tmp_path / "b.onnx").stdout.split())
    assert "opset 17 has no bfloat16 yet for Conv, GlobalAveragePool, opset 22 does" in shown
    assert "TensorRT, OpenVINO and the reference take the graph" in shown
    assert "ONNX Runtime and the full check of onnx.checker refuse it" in shown


@pytest.mark.parametrize("engine", ["openvino", "reference", "onnxruntime"])
def test_who_takes_bf16_in_an_old_opset_is_true(engine: str) -> None:
    made = cast(graph(CNN, CNN_WEIGHTS), "bf16").model
    feed = {"x": weight(2, 3, 8, 8)}
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
        with pytest.raises(unirt.BackendError, match="bfloat16"):
            unirt.load(made, engine)
        with pytest.raises(onnx.shape_inference.InferenceError):
            onnx.checker.check_model(onnx.load_from_string(made.primary.read()), full_check=True)
        return
    pytest.importorskip("openvino" if engine == "openvino" else "onnx")
    with unirt.load(made, engine) as session, unirt.load(graph(CNN, CNN_WEIGHTS), engine) as whole:
        right = whole.run(feed)["y"]
        np.testing.assert_allclose(session.run(feed)["y"], right, atol=0.04 * np.abs(right).max())


def test_nodes_stay_in_float32_when_told_so() -> None:
    model = Model(parser.parse_model(LOUD))
    done = cast(model, "fp16", keep=["share"])
    assert done.kept == {"share": "it was told to stay"}
    with pytest.raises(OptionError, match="Did you mean 'share'"):
        cast(model, "fp16", keep=["shar"])


def test_a_huge_divisor_is_no_mask() -> None:
    text = """
    g (float[1] x) => (float[1] y) {
      [div] a = Div (x, huge)
      [up] b = Mul (a, huge)
      y = Exp (b)
    }"""
    feed = {"x": np.ones(1, np.float32)}
    _, result = narrow(graph(text, {"huge": np.float32(1e9)}), feed, 5e-3)
    assert set(result.kept) == {"div", "up"}


def test_a_weight_that_is_moved_first_is_judged_where_it_is_used() -> None:
    text = """
    g (float[2,2] x) => (float[2,2] y) {
      [move] a = Transpose (w)
      [copy] b = Identity (a)
      [use] c = Mul (x, b)
      [down] d = Mul (c, v)
      y = Exp (d)
    }"""
    weights = {"w": np.array([[1, 2], [3, 1e5]], np.float32), "v": np.float32(1e-5)}
    _, result = narrow(graph(text, weights), {"x": np.full((2, 2), 0.5, np.float32)}, 5e-3)
    assert {"move", "copy", "use"} <= set(result.kept)


def test_a_moved_weight_that_is_wanted_in_both_widths_is_whole_in_float32() -> None:
    text = """
    g (float[2] x) => (float[2] y, float[2] z) {
      [move] a = Identity (w)
      [div] b = Div (a, huge)
      [mask] y = Min (x, a)
      z = Exp (b)
    }"""
    weights = {"w": np.array([0, 1e9], np.float32), "huge": np.float32(1e9)}
    made = proto(cast(graph(text, weights), "fp16"))
    y, z = run(made, {"x": np.ones(2, np.float32)})
    np.testing.assert_allclose(y, [0, 1])
    np.testing.assert_allclose(z, np.exp([0, 1]), rtol=2e-3)


def test_types_written_down_in_the_file_follow() -> None:
    model = onnx.shape_inference.infer_shapes(graph(CNN, CNN_WEIGHTS))
    made, _ = narrow(model, {"x": weight(2, 3, 8, 8)}, 5e-3)
    written = {value.name: value.type.tensor_type.elem_type for value in made.graph.value_info}
    assert written == dict.fromkeys(("c", "n", "r", "p", "f"), HALF)


def test_infinity_stays_infinity() -> None:
    text = "g (float[3] x) => (float[3] y) { a = Max (x, low) y = Min (a, high) }"
    weights = {"low": np.float32(-np.inf), "high": np.array([np.inf, 1, 2], np.float32)}
    made, result = narrow(graph(text, weights), {"x": weight(3)}, 5e-3)
    arrays = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    assert arrays["low"] == -np.inf
    assert arrays["high"][0] == np.inf
    assert result.notes == ()


def test_sizes_are_computed_exactly() -> None:
    text = """
    g (float[N] x) => (float[M] y, int64[1] m) {
      [shape] s = Shape (x)
      [float] f = Cast <to = 1> (s)
      [half] h = Mul (f, half)
      [floor] i = Floor (h)
      [int] m = Cast <to = 7> (i)
      zero = Constant <value_ints = [0]> ()
      [part] p = Slice (x, zero, m)
      [exp] y = Exp (p)
    }"""
    feed = {"x": weight(8198)}  # half of it, 4099, is no fp16 number
    made, result = narrow(graph(text, {"half": np.float32(0.5)}), feed, 5e-3)
    assert run(made, feed)[1] == [4099]
    assert {"float", "half", "floor", "int"} <= set(result.kept)
    assert "2,048" in result.kept["half"]
    assert input_types(made, "exp") == [HALF]


def test_angles_of_positions_are_computed_exactly() -> None:
    text = """
    g (float[P,4] x, int64[P,1] positions) => (float[P,4] y) {
      [float] f = Cast <to = 1> (positions)
      [angle] a = Mul (f, frequencies)
      [cos] c = Cos (a)
      [turn] y = Mul (x, c)
    }"""
    frequencies = np.array([1, 0.1, 0.01, 0.001], np.float32)
    feed = {"x": weight(3, 4), "positions": np.array([[5], [4097], [30001]])}
    made, result = narrow(graph(text, {"frequencies": frequencies}), feed, 5e-3)
    assert set(result.kept) == {"float", "angle", "cos"}
    assert input_types(made, "turn") == [HALF, HALF]


def test_float64_parts_are_left_alone() -> None:
    text = """
    g (float[4] x, double[4] d) => (float[4] y, double[4] e) {
      [a] a = Exp (x)
      [wide] b = Cast <to = 11> (x)
      [sum] e = Add (b, d)
      [y] y = Sqrt (a)
    }"""
    feed = {"x": weight(4), "d": np.full(4, 1e-9)}
    made, _ = narrow(graph(text), feed, 5e-3)
    expected = feed["x"].astype(np.float64) + feed["d"]
    np.testing.assert_array_equal(run(made, feed)[1], expected)


@pytest.mark.parametrize(
    "text",
    [
        "g (int64[4] x) => (int64[4] y) { y = Add (x, x) }",
        "g (float16[4] x) => (float16[4] y) { y = Exp (x) }",
        "g (float[4] x) => (float[4] y) { [odd] y = acme.Strange (x) }",
    ],
)
def test_a_graph_with_nothing_to_cast_says_so(text: str) -> None:
    with pytest.raises(unirt.ModelError, match="nothing to cast to fp16") as raised:
        cast(graph(text), "fp16")
    assert ("odd" in str(raised.value)) == ("odd" in text)


def test_trees_stay_in_float32() -> None:
    text = """
    g (float[4,2] x) => (float[4,2] y) {
      [a] a = Exp (x)
      [scale] y = ai.onnx.ml.Scaler <offset = [0.5, 0.5], scale = [2.0, 3.0]> (a)
    }"""
    model = graph(text)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    _, result = narrow(model, {"x": weight(4, 2)}, 5e-3)
    assert result.kept == {"scale": "Scaler is no operator of ONNX's opset 17"}


def test_statistics_of_a_layer_norm_keep_the_type_that_it_computes_in() -> None:
    text = """
    g (float[2,8] x) => (float[2,8] y, float[2,1] m) {
      [norm] y, m = LayerNormalization <axis = -1> (x, w)
    }"""
    for keep_io in (True, False):
        made, _ = narrow(graph(text, {"w": weight(8)}), {"x": weight(2, 8)}, 1e-2, keep_io=keep_io)
        assert (types(made)["m"] == FLOAT) == keep_io


def test_an_output_follows_its_input_where_only_inference_tells() -> None:
    text = """
    g (float[4] x) => (float[4] y) {
      [a] a = Exp (x)
      [get] b = OptionalGetElement (a)
      [y] y = Sqrt (b)
    }"""
    made, result = narrow(graph(text, opset=18), {"x": weight(4)}, 5e-3)
    assert result.kept == {}
    assert casts(made) == 2


def test_what_follows_an_unknown_operator_stays_with_its_reason() -> None:
    text = """
    g (float[4] x) => (float[4] y, float[4] z) {
      [odd] a = acme.Strange (x)
      [after] y = Exp (a)
      [beside] z = Exp (x)
    }"""
    result = cast(graph(text), "fp16")
    assert set(result.kept) == {"odd", "after"}
    assert "type of 'a' is unknown" in result.kept["after"]
    assert list(node(proto(result), "beside").input) == ["x__fp16"]


def test_sequences_stay_in_float32() -> None:
    text = """
    g (float[2] x) => (float[4] y) {
      [a] a = Exp (x)
      [pack] s = SequenceConstruct (a, a)
      [join] j = ConcatFromSequence <axis = 0> (s)
      [y] y = Sqrt (j)
    }"""
    _, result = narrow(graph(text), {"x": weight(2)}, 5e-3)
    assert set(result.kept) == {"pack", "join"}


def test_neighbours_in_float32_pass_their_values_without_a_round_trip() -> None:
    text = """
    g (float[4] x) => (float[4] y) {
      a = Exp (x)
      b = acme.First (a)
      c = acme.Second (b)
      y = acme.Third (c)
    }"""
    model = graph(text)
    for name in ("b", "c"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, FLOAT, [4]))
    made = proto(cast(model, "fp16"))
    assert [n.op_type for n in made.graph.node].count("Cast") == 2
    assert [n.op_type for n in made.graph.node][-3:] == ["First", "Second", "Third"]


def test_nameless_nodes_get_names_that_nothing_else_has() -> None:
    text = "g (float[2] x) => (float[2] y) { [Exp_1] a = Exp (x) b = Exp (a) [last] y = Exp (b) }"
    first, second = (proto(cast(graph(text), "fp16")) for _ in range(2))
    names = [n.name for n in first.graph.node]
    assert all(count == 1 for count in Counter(names).values())
    assert {"Exp_1", "Exp_1_2", "last"} < set(names)
    assert first == second


def test_new_tensor_names_avoid_those_that_are_there() -> None:
    text = "g (float[2] x) => (float[2] y) { x__fp16 = Exp (x) y = Exp (x__fp16) }"
    narrow(graph(text), {"x": weight(2)}, 5e-3)


def test_an_output_that_others_read_too() -> None:
    text = """
    g (float[2] x) => (float[2] a, float[2] y, float[2] z) {
      a = Exp (x)
      y = Exp (a)
      z = Identity (x)
    }"""
    for keep_io in (True, False):
        narrow(graph(text), {"x": weight(2)}, 1e-2, keep_io=keep_io)


def test_weights_listed_as_inputs_are_weights() -> None:
    """As every file of IR version 3 has them."""
    model = graph(CNN, CNN_WEIGHTS, opset=8, ir=3)
    for name, array in CNN_WEIGHTS.items():
        model.graph.input.append(helper.make_tensor_value_info(name, FLOAT, array.shape))
    made, result = narrow(model, {"x": weight(2, 3, 8, 8)}, 5e-3)
    assert [spec.name for spec in result.model.inputs] == ["x"]
    assert casts(made) == 2
    # From version 4 on it would mean that callers may replace them.
    assert made.ir_version >= 4
    assert [value.name for value in made.graph.input] == ["x"]


@pytest.mark.parametrize("opset", range(7, 27))
def test_casts_in_every_opset(opset: int) -> None:
    model = graph(CNN, CNN_WEIGHTS, opset, ir=8 if opset < 20 else 10)
    result = cast(model, "fp16")
    onnx.checker.check_model(proto(result), full_check=True)
    assert not result.kept
    result = cast(model, "bf16")
    onnx.checker.check_model(proto(result))
    assert not result.kept
    assert ("Conv" in "".join(result.notes)) == (opset < 22)


def test_bf16_gives_its_answers() -> None:
    model = graph(CNN, CNN_WEIGHTS, opset=22, ir=10)
    result = cast(model, "bf16")
    made = proto(result)
    onnx.checker.check_model(made, full_check=True)
    assert types(made)["c"] == BFLOAT16
    feed = {"x": weight(2, 3, 8, 8)}
    expected = ReferenceEvaluator(model).run(None, feed)[0]
    got = ReferenceEvaluator(made).run(None, feed)[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=0.04 * np.abs(expected).max())
    assert np.abs(got - expected).max() > 0


def test_bf16_clamps_the_lowest_float32() -> None:
    made = proto(cast(graph(TRANSFORMER, TRANSFORMER_WEIGHTS), "bf16"))
    (lowest,) = (n for n in made.graph.node if "lowest" in n.output)
    value = numpy_helper.to_array(lowest.attribute[0].t).astype(np.float32)
    assert np.isfinite(value)
    assert value < -3e38


@pytest.mark.parametrize(
    ("network", "precision"),
    [("cnn", "bf16"), ("transformer", "fp16"), ("transformer", "bf16"), ("quantized", "fp16")],
)
def test_tensorrt_builds_it(network: str, precision: Any) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    if network == "cnn":
        model = graph(CNN.replace("[N", "[2"), CNN_WEIGHTS)
    elif network == "transformer":
        text = TRANSFORMER.replace("[N", "[2").replace("T,", "6,").replace("T]", "6]")
        model = graph(text, TRANSFORMER_WEIGHTS)
    else:
        text = """
        g (float[8,16] x) => (float[8,16] y) {
          xq = QuantizeLinear (x, s, z)
          xd = DequantizeLinear (xq, s, z)
          wd = DequantizeLinear <axis = 1> (wq, ws, wz)
          m = MatMul (xd, wd)
          y = Relu (m)
        }"""
        matrix = RANDOM.integers(-127, 128, (16, 16)).astype(np.int8)
        channels = {"ws": np.full(16, 1e-2, np.float32), "wz": np.zeros(16, np.int8)}
        model = graph(text, {"s": np.float32(0.05), "z": np.int8(0), "wq": matrix} | channels)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network_ = builder.create_network(0)
    reader = trt.OnnxParser(network_, logger)
    assert reader.parse(cast(model, precision).model.primary.read()), reader.get_error(0).desc()
    assert builder.build_serialized_network(network_, builder.create_builder_config()) is not None


def test_external_data_comes_along(tmp_path: Path) -> None:
    model = graph(CNN, CNN_WEIGHTS)
    feed = {"x": weight(2, 3, 8, 8)}
    expected = run(model, feed)[0]
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    result = cast(path, "fp16")
    assert result.model.path is None
    np.testing.assert_allclose(
        run(proto(result), feed)[0], expected, atol=5e-3 * np.abs(expected).max()
    )


def test_a_result_beyond_two_gigabytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["unirt.precision.casting.cast"], "LIMIT", 300)
    with pytest.raises(unirt.ModelError, match="too large after the cast"):
        cast(graph(CNN, CNN_WEIGHTS), "fp16")


def test_other_precisions_and_formats_are_refused() -> None:
    wrong: Any = "fp8"
    with pytest.raises(unirt.OptionError, match="fp16, bf16"):
        cast(DIGITS, wrong)
    tflite = DIGITS.with_suffix(".tflite")
    with pytest.raises(unirt.ModelError, match="ONNX graphs, and it has tflite"):
        cast(tflite, "fp16")


def test_without_onnx_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(unirt.BackendUnavailable, match=r"pip install 'unirt\[precision\]'"):
        cast(DIGITS, "fp16")


def test_importing_it_loads_no_onnx() -> None:
    code = "import unirt.precision, sys; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
