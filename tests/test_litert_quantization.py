"""A .tflite in int8: calibrated by UniRT on LiteRT, written by ai-edge-quantizer, run on LiteRT."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unirt
from unirt.errors import (
    BackendUnavailable,
    BuildError,
    DataError,
    InputError,
    ModelError,
    OptionError,
)
from unirt.precision import (
    Calibration,
    Range,
    calibrate,
    observe,
    quantize_tflite,
    search,
    second_moments,
    sensitivity,
)
from unirt.precision.tflite import read_constant, read_graphs
from unirt.testing.tflite_networks import Graph, tflite_network

interpreters = pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.tflite"
ONNX = DIGITS.with_suffix(".onnx")
TEST = DIGITS.with_name("test.npz")
METHODS = ("max", "mse", "entropy", "percentile")


@pytest.fixture(scope="module", autouse=True)
def _quantizer() -> None:
    pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed")


@pytest.fixture(scope="module")
def images() -> Any:
    with np.load(TEST) as arrays:
        return arrays["image"]


@pytest.fixture(scope="module")
def labels() -> Any:
    with np.load(TEST) as arrays:
        return arrays["labels"]


def answers(model: Any, **inputs: Any) -> Any:
    """The first output, from LiteRT itself."""
    content = unirt.Model.open(model).formats["tflite"].read()
    interpreter = interpreters.Interpreter(model_content=content)
    found = interpreter.get_input_details()
    for detail, value in zip(found, inputs.values(), strict=True):
        interpreter.resize_tensor_input(detail["index"], value.shape)
    interpreter.allocate_tensors()
    for detail, value in zip(found, inputs.values(), strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def decibels(reference: Any, found: Any) -> float:
    wanted = reference.astype(np.float64)
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))


def layers(
    *weights: Any, change: Callable[[Any, int], None] | None = None, signature: bool = True
) -> bytes:
    """x, rows of values -> y, through fully connected layers with a bias of 1 each."""
    graph = Graph()
    first = last = graph.tensor("x", "float32", [None, weights[0].shape[1]])
    for number, weight in enumerate(weights):
        kernel = graph.constant(f"kernel{number}", np.asarray(weight, np.float32))
        bias = graph.constant(f"bias{number}", np.ones(len(weight), np.float32))
        name = "y" if number == len(weights) - 1 else f"layer{number}"
        out = graph.tensor(name, "float32", [None, len(weight)])
        graph.op("FULLY_CONNECTED", [last, kernel, bias], [out], "FullyConnectedOptions")
        last = out
    if change is not None:
        change(graph, last)
    return graph.write([first], [last], signature=signature)


def two_layers(**options: Any) -> bytes:
    random = np.random.default_rng(1)
    shapes = (16, 8), (4, 16)
    return layers(*(random.standard_normal(shape) for shape in shapes), **options)


def rows(count: int = 64, size: int = 8) -> Any:
    return np.random.default_rng(2).standard_normal((count, size)).astype(np.float32)


def tensor(model: unirt.Model, name: str) -> Any:
    (graph, *_) = read_graphs(model.formats["tflite"].read(), "it")
    return next(one for one in graph.tensors if one.name == name)


# --- calibration on LiteRT -----------------------------------------------------------------------


def test_a_tflite_is_calibrated_as_an_onnx_graph_is(images: Any) -> None:
    images = images[:48]
    observed = observe(DIGITS, {"image": images})
    assert observed.engine == "tflite@cpu"
    assert observed.model == unirt.Model(DIGITS).hash
    assert observed.samples == len(images)
    # onnx2tf gave the tensors other names; those that both networks compute have the same ranges.
    same = {"image": "image", "logits": "logits"}
    same["/classify/classify.0/Flatten_output_0"] = "wa/classify/classify.0/Flatten_output_0"
    other = observe(ONNX, {"image": images})
    for method in METHODS:
        ours, theirs = observed.calibration(method), other.calibration(method)
        for theirs_name, our_name in same.items():
            one, two = ours.ranges[our_name], theirs.ranges[theirs_name]
            assert (one.low, one.high) == pytest.approx((two.low, two.high), rel=1e-2, abs=1e-3)


def test_every_tensor_that_depends_on_the_input_has_the_range_litert_computes(images: Any) -> None:
    found = calibrate(DIGITS, {"image": images[:8]}, method="max").ranges
    interpreter = interpreters.Interpreter(
        str(DIGITS),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=interpreters.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.resize_tensor_input(0, images[:8].shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, images[:8])
    interpreter.invoke()
    operators = interpreter._get_ops_details()
    details = {detail["index"]: detail["name"] for detail in interpreter.get_tensor_details()}
    computed = {0, *(index for operator in operators for index in operator["outputs"])}
    assert found.keys() == {details[index] for index in computed}
    for index in computed:
        values = interpreter.get_tensor(index)
        one = found[details[index]]
        wanted = (values.min(), values.max())
        assert (one.low, one.high) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_little_memory_takes_more_runs_and_finds_the_same(images: Any) -> None:
    whole = observe(DIGITS, {"image": images[:16]})
    parts = observe(DIGITS, {"image": images[:16]}, memory=50_000)
    assert whole.groups == 1
    assert parts.groups > 2
    ranges = whole.calibration("mse").ranges
    for name, one in parts.calibration("mse").ranges.items():
        assert (one.low, one.high) == pytest.approx((ranges[name].low, ranges[name].high), rel=1e-4)


def test_a_generator_of_several_shapes_calibrates(images: Any) -> None:
    calls = ({"image": images[:count]} for count in (1, 5, 2))
    found = calibrate(DIGITS, calls, method="max")
    assert found.samples == 3
    assert found.ranges == calibrate(DIGITS, [{"image": images[:5]}], method="max").ranges


def test_a_calibration_of_a_tflite_is_saved_loaded_and_checked(tmp_path: Path) -> None:
    found = calibrate(two_layers(), {"x": rows()})
    path = found.save(tmp_path / "ranges.json")
    loaded = Calibration.load(path)
    assert loaded == found
    assert loaded.check(two_layers()) == ()
    with pytest.raises(ModelError, match="not one of"):
        loaded.check(DIGITS)
    by_hand = Calibration.from_ranges(two_layers(), {"layer0": (-1, 2)})
    assert by_hand.ranges == {"layer0": Range(-1, 2)}
    with pytest.raises(OptionError, match="Did you mean 'layer0'"):
        Calibration.from_ranges(two_layers(), {"layer00": 1})


def test_only_named_tensors_are_watched() -> None:
    assert calibrate(two_layers(), {"x": rows()}, tensors=["layer0"]).ranges.keys() == {"layer0"}
    with pytest.raises(OptionError, match="kernel0"):
        calibrate(two_layers(), {"x": rows()}, tensors=["kernel0"])


def test_other_engines_do_not_run_a_tflite() -> None:
    with pytest.raises(OptionError, match="onnxruntime"):
        calibrate(two_layers(), {"x": rows()}, engine="onnxruntime")
    assert calibrate(two_layers(), {"x": rows()}, engine="tflite").ranges


# --- quantization --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["max", "mse", "percentile"])
def test_digits_in_int8_answer_as_in_float32(images: Any, labels: Any, method: Any) -> None:
    reference = answers(DIGITS, image=images)
    result = quantize_tflite(DIGITS, {"image": images[::2]}, method=method)
    found = answers(result.model, image=images)
    accuracy = [np.mean(one.argmax(1) == labels) for one in (reference, found)]
    assert accuracy[1] >= accuracy[0] - 0.01
    assert decibels(reference, found) >= 35
    assert (result.precision, result.recipe) == ("int8", "litert")
    assert result.calibration is not None
    assert result.calibration.method.startswith(method)
    assert not result.kept


def test_every_product_has_int8_weights_by_channel_and_int8_activations(images: Any) -> None:
    result = quantize_tflite(DIGITS, {"image": images})
    content = result.model.formats["tflite"].read()
    (graph, *_) = read_graphs(content, "digits")
    products = [one for one in graph.operators if len(one.inputs) == 3]
    assert len(products) == 6
    for product in products:
        given, weights, bias = (graph.tensors[index] for index in product.inputs)
        assert [one.dtype for one in (given, weights, bias)] == ["int8", "int8", "int32"]
        assert len(given.scales) == 1
        assert len(weights.scales) == max(
            weights.shape[0], weights.shape[-1] * (weights.shape[0] == 1)
        )
        assert np.abs(read_constant(content, weights).astype(int)).max() == 127
    assert len(result.nodes) == 11
    assert "logits" in result.nodes


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-weights"])
def test_weights_alone_need_no_data(images: Any, labels: Any, precision: Any) -> None:
    reference = answers(DIGITS, image=images)
    result = quantize_tflite(DIGITS, precision=precision)
    found = answers(result.model, image=images)
    assert np.mean(found.argmax(1) == labels) >= np.mean(reference.argmax(1) == labels) - 0.01
    assert decibels(reference, found) >= 35
    assert result.model.size < 0.4 * DIGITS.stat().st_size
    assert result.calibration is None
    assert len(result.nodes) == 6


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weights"])
@pytest.mark.parametrize("signature", [True, False])
def test_inputs_and_outputs_do_not_change(precision: Any, signature: bool) -> None:
    source = unirt.Model(two_layers(signature=signature))
    data = {"x": rows()} if precision == "int8" else None
    result = quantize_tflite(source, data, precision=precision).model
    assert (result.inputs, result.outputs) == (source.inputs, source.outputs)
    with unirt.load(result, "tflite") as session:
        for count in (1, 5):
            found = session.run({"x": rows(count)})["y"]
            assert decibels(answers(source, x=rows(count)), found) > 30


def test_the_ranges_of_a_calibration_are_those_in_the_file() -> None:
    ranges = {"x": (-2, 3), "layer0": (-5, 20.5), "y": (0, 51)}
    given = Calibration.from_ranges(two_layers(), ranges)
    result = quantize_tflite(two_layers(), calibration=given)
    assert tensor(result.model, "layer0").scales == pytest.approx([25.5 / 255])
    assert tensor(result.model, "x_quantized").scales == pytest.approx([5 / 255])
    assert result.calibration is given


def test_with_both_files_the_names_of_the_primary_are_used_for_data(images: Any) -> None:
    random = np.random.default_rng(1)
    kernel = random.standard_normal((4, 8)).astype(np.float32)
    onnx = pytest.importorskip("onnx")
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[n, 8] data) => (float[n, 4] y) '
    text += "{ h = MatMul (data, w) y = Add (h, one) }"
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(kernel.T.copy(), "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "one"))
    both = unirt.Model(onnx=proto, tflite=layers(kernel))
    result = quantize_tflite(both, {"data": rows()})
    assert result.calibration is not None
    assert result.calibration.ranges.keys() == {"x", "y"}
    assert decibels(answers(both, x=rows()), answers(result.model, x=rows())) > 35


def test_the_ranges_of_the_onnx_graph_are_carried_over_to_the_tflite(
    images: Any, labels: Any
) -> None:
    """onnx2tf gave nearly all tensors other names, and other layouts."""
    both = unirt.Model(ONNX, beside=True)
    data = {"image": images[::4]}
    of_onnx, of_tflite = calibrate(ONNX, data), calibrate(DIGITS, data)
    result = quantize_tflite(both, calibration=of_onnx)
    assert result.calibration is not None
    assert (result.calibration.model, result.calibration.method) == (of_tflite.model, "mse")
    assert result.calibration.check(DIGITS) == ()
    carried = result.calibration.ranges
    assert carried.keys() == of_tflite.ranges.keys()
    for name, one in of_tflite.ranges.items():
        wanted = pytest.approx((one.low, one.high), rel=1e-3, abs=1e-5)
        assert (carried[name].low, carried[name].high) == wanted
    assert not result.kept
    assert result.notes == (
        "12 of 12 tensors of the .tflite have the ranges of ONNX tensors that hold the same values "
        "on random inputs.",
    )
    found = answers(result.model, image=images)
    assert np.mean(found.argmax(1) == labels) >= 0.97
    with unirt.load(both, "tflite:int8", calibration=of_onnx) as session:
        assert np.array_equal(session.run(images)["logits"], found)


def onnx_of(text: str, **weights: Any) -> Any:
    onnx = pytest.importorskip("onnx")
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return proto


def kernel(rows: int, columns: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def test_a_batch_that_the_converter_fixed_is_that_of_the_random_inputs() -> None:
    def fix(graph: Graph, last: int) -> None:
        for one in (graph.tensors[0], graph.tensors[last]):
            one.shape, one.shapeSignature = np.array([3, one.shape[1]], np.int32), None

    proto = onnx_of(
        "(float[n, 8] data) => (float[n, 4] out) { h = MatMul (data, w) out = Add (h, one) }",
        w=kernel(4, 8).T.copy(),
        one=np.ones(4, np.float32),
    )
    both = unirt.Model(onnx=proto, tflite=layers(kernel(4, 8), change=fix))
    given = Calibration.from_ranges(proto, {"data": (-3, 2), "h": 40, "out": (-8, 9)})
    result = quantize_tflite(both, calibration=given)
    assert result.calibration is not None
    assert result.calibration.ranges == {"x": Range(-3, 2), "y": Range(-8, 9)}
    assert result.nodes == ("y",)


def test_a_tensor_that_equals_several_gets_what_holds_all_their_ranges() -> None:
    proto = onnx_of(
        "(float[n, 8] data) => (float[n, 4] out)"
        "{ same = Identity (data) h = MatMul (same, w) out = Add (h, one) }",
        w=kernel(4, 8).T.copy(),
        one=np.ones(4, np.float32),
    )
    both = unirt.Model(onnx=proto, tflite=layers(kernel(4, 8)))
    given = Calibration.from_ranges(proto, {"data": (-1, 4), "same": (-2, 3), "out": 9})
    result = quantize_tflite(both, calibration=given)
    assert result.calibration is not None
    assert result.calibration.ranges == {"x": Range(-2, 4), "y": Range(-9, 9)}


def test_zeros_around_a_tensor_do_not_hide_it() -> None:
    """PAD stands before CONV_2D in a .tflite, and inside Conv in ONNX."""
    weights = np.random.default_rng(1).standard_normal((2, 3, 3, 1)).astype(np.float32)
    graph = Graph()
    shapes = {"x": [1, 1, 4, 4], "last": [1, 4, 4, 1], "padded": [1, 6, 6, 1], "y": [1, 4, 4, 2]}
    x, last, padded, y = (graph.tensor(name, "float32", shapes[name]) for name in shapes)
    shape = graph.constant("shape", np.array(shapes["last"], np.int32))
    zeros = graph.constant("zeros", np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
    constants = graph.constant("w", weights), graph.constant("b", np.ones(2, np.float32))
    valid = graph.schema.Padding.VALID
    graph.op("RESHAPE", [x, shape], [last], "ReshapeOptions", newShape=shapes["last"])
    graph.op("PAD", [last, zeros], [padded], "PadOptions")
    graph.op(
        "CONV_2D", [padded, *constants], [y], "Conv2DOptions", padding=valid, strideW=1, strideH=1
    )
    proto = onnx_of(
        "(float[1, 1, 4, 4] image) => (float[1, 2, 4, 4] out)"
        "{ out = Conv <pads = [1, 1, 1, 1]> (image, w, b) }",
        w=weights.transpose(0, 3, 1, 2).copy(),
        b=np.ones(2, np.float32),
    )
    both = unirt.Model(onnx=proto, tflite=graph.write([x], [y]))
    given = Calibration.from_ranges(proto, {"image": (-1, 2), "out": 9})
    result = quantize_tflite(both, calibration=given)
    assert result.calibration is not None
    assert result.calibration.ranges["padded"] == Range(-1, 2)
    assert "y" in result.nodes


def test_ranges_are_not_carried_over_to_another_network() -> None:
    proto = onnx_of(
        "(float[n, 8] x) => (float[n, 4] y) { y = MatMul (x, w) }", w=kernel(8, 4, seed=7)
    )
    both = unirt.Model(onnx=proto, tflite=layers(kernel(4, 8)))
    given = Calibration.from_ranges(proto, {"x": 3, "y": 9})
    with pytest.raises(DataError, match="1 of 2 tensors") as caught:
        quantize_tflite(both, calibration=given)
    assert caught.value.missing == ("y",)


def test_random_inputs_that_a_network_does_not_take_carry_nothing_over() -> None:
    proto = onnx_of(
        "(float[rows, 8] x) => (float[rows, 4] y)"
        "{ two = Reshape (x, shape) h = MatMul (two, w) y = Add (h, one) }",
        shape=np.array([2, 8]),
        w=kernel(4, 8).T.copy(),
        one=np.ones(4, np.float32),
    )
    both = unirt.Model(onnx=proto, tflite=layers(kernel(4, 8)))
    given = Calibration.from_ranges(proto, {"x": 3, "y": 9})
    with pytest.raises(DataError, match="random inputs, and that fails") as caught:
        quantize_tflite(both, calibration=given)
    assert isinstance(caught.value.__cause__, unirt.UnirtError)


def test_ranges_of_the_onnx_graph_alone_are_refused_and_their_names_told(images: Any) -> None:
    """Only the ends have one name in both."""
    given = calibrate(ONNX, {"image": images[:8]})
    assert {"image", "logits"} <= given.ranges.keys()
    with pytest.raises(DataError, match=given.model[:12]) as caught:
        quantize_tflite(DIGITS, calibration=given)
    text = str(caught.value)
    assert "'/features/features.0/Conv_output_0'" in text
    assert "'wa/features/features.0/Conv_input_nhwc'" in text
    assert "data" in caught.value.remedy
    assert "logits" not in caught.value.missing
    assert len(caught.value.missing) == 10


def test_ranges_that_are_missing_are_told() -> None:
    own = Calibration.from_ranges(two_layers(), {"x": 4, "layer0": 20})
    (note,) = quantize_tflite(two_layers(), calibration=own).notes
    assert note.startswith("Without a range: 'y'.")
    with pytest.raises(DataError, match="'layer0', for one, has none") as caught:
        quantize_tflite(two_layers(), calibration=Calibration.from_ranges(two_layers(), {"x": 4}))
    assert caught.value.missing == ("layer0", "y")
    whole = own.with_ranges({"y": (-9, 50)})
    assert quantize_tflite(two_layers(), calibration=whole).notes == ()


def test_ranges_by_hand_work_beside_an_onnx_graph_of_other_names() -> None:
    proto = onnx_of(
        "(float[n, 8] data) => (float[n, 4] out) { h = MatMul (data, w) out = Add (h, one) }",
        w=kernel(4, 8).T.copy(),
        one=np.ones(4, np.float32),
    )
    content = layers(kernel(4, 8))
    both = unirt.Model(onnx=proto, tflite=content)
    given = Calibration.from_ranges(content, {"x": (-2, 3), "y": 9})
    result = quantize_tflite(both, calibration=given)
    assert (result.nodes, result.notes) == (("y",), ())
    assert tensor(result.model, "x_quantized").scales == pytest.approx([5 / 255])


def test_kept_operators_stay_in_float32(images: Any) -> None:
    reference = answers(DIGITS, image=images)
    every = quantize_tflite(DIGITS, {"image": images})
    first = "wa/features/features.3/Conv_input_nhwc"
    partly = quantize_tflite(DIGITS, {"image": images}, keep=[first, "logits"])
    assert partly.kept.keys() == {first, "logits"}
    assert set(partly.nodes) == set(every.nodes) - {first, "logits"}
    assert tensor(partly.model, "wa/features/features.0/Conv_conv_filter").dtype == "float32"
    assert decibels(reference, answers(partly.model, image=images)) > decibels(
        reference, answers(every.model, image=images)
    )


def test_what_has_no_range_stays_in_float32_and_says_so() -> None:
    partial = Calibration.from_ranges(two_layers(), {"x": 4, "layer0": 20})
    result = quantize_tflite(two_layers(), calibration=partial)
    assert result.nodes == ("layer0",)
    assert "'y' has no range" in result.kept["y"]


def test_a_bias_that_int32_cannot_hold_keeps_its_operator_in_float32() -> None:
    weights = np.random.default_rng(1).standard_normal((4, 8))
    weights[2] = 0  # its scale is as small as scales get, and that of the bias smaller still
    model = layers(np.eye(8), weights)
    result = quantize_tflite(model, {"x": rows()})
    assert result.kept.keys() == {"y"}
    assert "int32" in result.kept["y"]
    assert decibels(answers(model, x=rows()), answers(result.model, x=rows())) > 35


def test_files_of_the_older_schema_are_quantized_too() -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(two_layers()))
    model.signatureDefs = None
    for code in model.operatorCodes:
        code.builtinCode = 0  # a field that they did not have
    old = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    result = quantize_tflite(old, {"x": rows()})
    assert tensor(result.model, "bias0").dtype == "int32"
    assert decibels(answers(old, x=rows()), answers(result.model, x=rows())) > 30


def test_nothing_is_printed(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(two_layers())
    np.savez(tmp_path / "data.npz", x=rows())
    code = "from unirt.precision import quantize_tflite as q; q('model.tflite', 'data.npz')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert (
        done.stderr.replace("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.", "").strip()
        == ""
    )


# --- what cannot be ------------------------------------------------------------------------------


def test_without_the_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer.quantizer", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'unirt\[litert-quantizer\]'"):
        quantize_tflite(two_layers(), {"x": rows()})


def test_a_quantized_file_is_refused() -> None:
    done = quantize_tflite(two_layers(), {"x": rows()}).model
    with pytest.raises(ModelError, match="quantized already"):
        quantize_tflite(done, {"x": rows()})
    with pytest.raises(ModelError, match="quantized already"):
        calibrate(done, {"x": rows()})


def test_int8_needs_data_or_a_calibration_and_not_both() -> None:
    with pytest.raises(DataError, match="without data"):
        quantize_tflite(two_layers())
    with pytest.raises(DataError, match="no data"):
        quantize_tflite(two_layers(), [])
    given = calibrate(two_layers(), {"x": rows()})
    with pytest.raises(OptionError, match="Both"):
        quantize_tflite(two_layers(), {"x": rows()}, given)


def test_data_of_other_names_and_shapes_is_refused() -> None:
    with pytest.raises(DataError, match="unknown: z"):
        quantize_tflite(two_layers(), {"z": rows()})
    with pytest.raises(InputError, match="In sample 1"):
        quantize_tflite(two_layers(), [{"x": rows()}, {"x": rows(size=9)}])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_their_sample(value: float) -> None:
    data = rows()
    data[11, 3] = value
    with pytest.raises(DataError) as caught:
        quantize_tflite(two_layers(), {"x": data})
    assert (caught.value.tensor, caught.value.sample) == ("x", 11)


def test_a_calibration_of_another_network_is_refused(images: Any) -> None:
    with pytest.raises(DataError, match="found on another file"):
        quantize_tflite(two_layers(), calibration=calibrate(DIGITS, {"image": images[:8]}))


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="Did you mean 'layer0'"):
        quantize_tflite(two_layers(), {"x": rows()}, keep=["layer1"])
    with pytest.raises(OptionError, match="collection"):
        quantize_tflite(two_layers(), {"x": rows()}, keep="layer0")
    with pytest.raises(OptionError, match="Did you mean 'int8-weights'"):
        quantize_tflite(two_layers(), {"x": rows()}, precision="int8-weight")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="calibration method"):
        quantize_tflite(two_layers(), {"x": rows()}, method="minmax")  # type: ignore[arg-type]


def test_a_model_without_a_tflite_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no \.tflite"):
        quantize_tflite(ONNX, TEST)


def test_a_network_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to quantize"):
        quantize_tflite(tflite_network("affine"), precision="int8-weights")
    with pytest.raises(ModelError, match="told to stay"):
        quantize_tflite(two_layers(), {"x": rows()}, keep=["layer0", "y"])


def test_weights_with_nan_are_refused() -> None:
    weights = np.ones((4, 8))
    weights[1, 1] = np.nan
    with pytest.raises(ModelError, match="kernel0"):
        quantize_tflite(layers(weights), precision="int8-weights")


def test_tensors_of_one_name_are_refused() -> None:
    def rename(graph: Graph, last: int) -> None:
        graph.tensors[1].name = graph.tensors[2].name

    with pytest.raises(ModelError, match="bias0"):
        quantize_tflite(two_layers(change=rename), {"x": rows()})


def test_an_operator_that_litert_lacks_is_an_error_of_the_engine() -> None:
    with pytest.raises(BuildError):
        quantize_tflite(tflite_network("unknown"), precision="int8-weights")


def test_a_damaged_file_gives_an_error_of_unirt_or_a_model_that_runs() -> None:
    random = np.random.default_rng(4)
    good = two_layers()
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        for position in random.integers(8, len(bad), 3):
            bad[position] = random.integers(256)
        try:
            quantize_tflite(bytes(bad), {"x": rows(4)})
        except unirt.UnirtError:
            refused += 1
    assert refused > 5


def test_the_operators_that_cost_most_are_found_and_left_in_float32(
    images: Any, labels: Any
) -> None:
    data = {"image": images, "labels": labels}
    ranges = calibrate(DIGITS, {"image": images[:128]})
    table = sensitivity(DIGITS, ranges, data)
    whole = quantize_tflite(DIGITS, calibration=ranges)
    assert table.nodes == whole.nodes
    assert (table.engine, table.recipe, table.samples) == ("tflite@cpu", "litert", len(images))
    wanted = decibels(answers(DIGITS, image=images), answers(whole.model, image=images))
    assert table.whole.snr_db == pytest.approx(wanted, abs=0.5)
    assert all(table.alone[name].snr_db > table.whole.snr_db for name in table.alone)
    found = search(DIGITS, ranges, data, min_snr=table.whole.snr_db + 2)
    assert found.met
    assert 0 < len(found.kept) < len(table.nodes) / 2
    assert found.measured.snr_db >= table.whole.snr_db + 2
    assert set(found.kept).isdisjoint(found.quantized.nodes)
    made = quantize_tflite(DIGITS, calibration=ranges, keep=found.kept)
    assert found.quantized.model.hash == made.model.hash


def test_a_search_takes_weights_alone_too_but_neither_blocks_nor_moments(images: Any) -> None:
    data = {"image": images[:64]}
    found = search(DIGITS, None, data, max_error=1e-9, precision="int8-weights")
    assert not found.met
    table = found.table
    assert table.precision == "int8-weights"
    with pytest.raises(OptionError, match="neither blocks nor moments"):
        sensitivity(DIGITS, None, data, precision="int8-weights", block=32)
    with pytest.raises(OptionError, match="neither blocks nor moments"):
        search(DIGITS, None, data, min_snr=20, moments=second_moments(ONNX, data))
