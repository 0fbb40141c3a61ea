"""Weights as whole numbers: what a kernel adds in 16 bits, and errors that cancel out on data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import unirt
from unirt.accuracy import snr_db
from unirt.precision import (
    Calibration,
    Quantized,
    Range,
    calibrate,
    quantize,
    search,
    second_moments,
    sensitivity,
)
from unirt.precision.calibration.moments import Reading

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
IMAGES = np.load(DIGITS.parent / "test.npz")

SHAPES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1x1": ("Conv", (24, 8, 1, 1), (2, 8, 9, 9), {}),
    "odd channels": ("Conv", (24, 3, 5, 5), (1, 3, 12, 12), {"strides": [2, 2]}),
    "one channel": ("Conv", (24, 1, 3, 3), (1, 1, 9, 9), {"pads": [1, 0, 2, 1]}),
    "dilated": ("Conv", (24, 4, 3, 3), (1, 4, 9, 9), {"dilations": [2, 1]}),
    "groups": ("Conv", (24, 3, 3, 3), (1, 6, 9, 9), {"group": 2}),
    "one channel in each group": ("Conv", (24, 1, 3, 3), (1, 12, 9, 9), {"group": 12}),
    "depthwise": ("Conv", (24, 1, 3, 3), (1, 24, 9, 9), {"group": 24}),
    "1-D": ("Conv", (24, 6, 5), (2, 6, 20), {"strides": [2], "pads": [2, 1]}),
    "3-D": ("Conv", (24, 4, 2, 3, 2), (1, 4, 5, 6, 5), {"dilations": [1, 2, 1]}),
    "matrix": ("MatMul", (33, 24), (7, 33), {}),
    "batch": ("MatMul", (16, 24), (3, 5, 16), {}),
    "Gemm": ("Gemm", (24, 16), (5, 16), {"transB": 1}),
}
"""The shapes of a weight and of what it is multiplied with."""


def product(
    op: str, weight: Any, shape: tuple[int, ...], attributes: Mapping[str, Any]
) -> onnx.ModelProto:
    node = helper.make_node(op, ["x", "w"], ["y"], "product", **attributes)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, *shape[1:]])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph([node], "product", [given], [made], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: Any, x: Any, engine: str = "onnxruntime", **options: Any) -> Any:
    pytest.importorskip(engine)
    with unirt.load(model, f"{engine}@cpu", options={"threads": 1, **options}) as session:
        return np.asarray(next(iter(session.run({"x": x}).values())))


def weights(result: Quantized, node: str) -> tuple[Any, Any]:
    """The whole numbers of a product's weight, and its scale."""
    graph = onnx.load_from_string(result.model.primary.read()).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    read = next(n for n in graph.node if n.name == node).input[1]
    maker = next(n for n in graph.node if read in n.output)
    return stored[maker.input[0]], stored[maker.input[1]]


def together(count: int, length: int, seed: int) -> Any:
    """Samples whose values mostly go together, as those of pictures do."""
    random = np.random.default_rng(seed)
    few = random.standard_normal((count, 3)) @ np.random.default_rng(0).standard_normal((3, length))
    return (few + 0.1 * random.standard_normal((count, length)) + 1).astype(np.float32)


@pytest.fixture(scope="module")
def mixed() -> tuple[onnx.ModelProto, Any, Any]:
    """A matrix product, samples to round it on, and others of the same kind."""
    weight = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    return product("MatMul", weight, (1, 64), {}), together(512, 64, 1), together(512, 64, 2)


# What kernels add in 16 bits


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", SHAPES)
def test_no_two_products_overflow_16_bits(kind: str, engine: str) -> None:
    """Every input is the largest there is, every weight large: sums that saturate would show."""
    op, shape, given, attributes = SHAPES[kind]
    random = np.random.default_rng(0)
    weight = random.choice([-1, 1, 1, 1], shape) * random.uniform(0.1, 1, shape)
    model = product(op, weight.astype(np.float32), given, attributes)
    x = np.full(given, 2, np.float32)
    exact = run(model, x)
    ranges = {"x": Range(0, 2), "y": Range(float(exact.min()), float(exact.max()))}
    for moments in (None, second_moments(model, {"x": x + np.float32(0.01)})):
        result = quantize(
            model, Calibration(ranges, "by hand", 0, ""), "int8", "cpu", moments=moments
        )
        assert result.nodes == ("product",)
        written = run(result.model, x, optimization="disable")
        # One step of the result for another order of sums; what saturates is off by a third.
        step = (ranges["y"].high - min(0.0, ranges["y"].low)) / 255
        np.testing.assert_allclose(run(result.model, x, engine), written, atol=1.01 * step)


def test_weights_that_no_kernel_adds_in_16_bits_have_all_8() -> None:
    """Depthwise convolutions; and pairs are counted from the first, so that these two are none."""
    ranges = Calibration({"x": Range(0, 2), "y": Range(0, 9)}, "by hand", 0, "")
    op, shape, given, attributes = SHAPES["depthwise"]
    model = product(op, np.full(shape, 0.7, np.float32), given, attributes)
    whole, _ = weights(quantize(model, ranges, "int8", "cpu"), "product")
    assert (whole == 127).all()
    column = np.array([0, 1, 1, 0], np.float32)
    model = product("MatMul", np.repeat(column[:, None], 2, 1), (1, 4), {})
    whole, _ = weights(quantize(model, ranges, "int8", "cpu"), "product")
    assert (whole == 126 * column[:, None]).all()
    model = product("MatMul", np.repeat(np.roll(column, 1)[:, None], 2, 1), (1, 4), {})
    whole, _ = weights(quantize(model, ranges, "int8", "cpu"), "product")
    assert (whole == 63 * np.roll(column, 1)[:, None]).all()


# Second moments


@pytest.mark.parametrize("kind", SHAPES)
def test_moments_are_those_of_what_a_product_sums_up(kind: str) -> None:
    """The mean square of each output channel is w'Mw, the mean w'm, for the moments M and m."""
    op, shape, given, attributes = SHAPES[kind]
    random = np.random.default_rng(0)
    weight = random.standard_normal(shape).astype(np.float32)
    x = random.standard_normal(given).astype(np.float32) + np.float32(0.5)
    model = product(op, weight, given, attributes)
    found = second_moments(model, [{"x": x}, {"x": 2 * x}])
    (reading,) = found.readings
    moments = found.readings[reading]
    assert (reading.tensor, reading.groups) == ("x", attributes.get("group", 1))
    made = np.concatenate([run(model, x), run(model, 2 * x)]).astype(np.float64)
    channel = 1 if op == "Conv" else made.ndim - 1
    made = np.moveaxis(made, channel, 0).reshape(made.shape[channel], -1)
    assert moments.rows == made.shape[1]
    rows = weight if op == "Conv" or attributes.get("transB") else weight.T
    if op == "Conv":
        rows = np.moveaxis(rows, 1, -1)  # the channels of one place after those of another
    rows = rows.reshape(reading.groups, -1, moments.means.shape[1]).astype(np.float64)
    squares = np.einsum("gok,gkl,gol->go", rows, moments.squares, rows)
    np.testing.assert_allclose(squares.ravel(), (made**2).mean(axis=1), rtol=1e-4)
    means = np.einsum("gok,gk->go", rows, moments.means)
    np.testing.assert_allclose(means.ravel(), made.mean(axis=1), rtol=1e-4, atol=1e-5)


def test_products_that_read_the_same_share_their_moments() -> None:
    data = {"image": IMAGES["image"][:32]}
    found = second_moments(DIGITS, data)
    assert found.samples == 32
    again = second_moments(DIGITS, data)
    assert list(found.readings) == list(again.readings)
    for reading, moments in found.readings.items():
        assert isinstance(reading, Reading)
        np.testing.assert_array_equal(moments.squares, again.readings[reading].squares)
        np.testing.assert_allclose(moments.squares, moments.squares.transpose(0, 2, 1))
        assert moments.rows <= 8192


def test_what_is_too_wide_or_computed_otherwise_has_none() -> None:
    wide = product("MatMul", np.ones((2049, 2), np.float32), (1, 2049), {})
    odd = product(
        "Conv", np.ones((2, 3, 3, 3), np.float32), (1, 3, 9, 9), {"auto_pad": "SAME_UPPER"}
    )
    turned = product("Gemm", np.ones((4, 2), np.float32), (4, 3), {"transA": 1})
    for model, shape in ((wide, (2, 2049)), (odd, (1, 3, 9, 9)), (turned, (4, 3))):
        x = np.ones(shape, np.float32)
        found = second_moments(model, [{"x": x}])
        assert not found.readings
        made = quantize(model, calibrate(model, [{"x": x}]), moments=found)
        assert made.model.hash == quantize(model, calibrate(model, [{"x": x}])).model.hash
        assert any(note.startswith("0 of 1 weights were rounded") for note in made.notes)


def test_data_that_is_not_finite_is_an_error_with_its_sample() -> None:
    images = IMAGES["image"][:4].copy()
    images[2, 0, 3, 3] = np.nan
    with pytest.raises(unirt.DataError, match="holds NaN in sample 2"):
        second_moments(DIGITS, {"image": images})
    with pytest.raises(unirt.DataError, match="no data"):
        second_moments(DIGITS, [])


# Rounding


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "int4-weights"])
@pytest.mark.parametrize("recipe", ["cpu", "cpu-vnni", "tensorrt"])
def test_errors_cancel_out_on_inputs_that_go_together(
    precision: Any, recipe: str, mixed: tuple[Any, Any, Any]
) -> None:
    model, samples, others = mixed
    moments = second_moments(model, {"x": samples})
    exact = others.astype(np.float64) @ numpy_helper.to_array(model.graph.initializer[0])
    ranges = Calibration({"x": Range(-12, 12), "y": Range(-99, 99)}, "by hand", 0, "")
    errors = []
    for known in (None, moments):
        result = quantize(model, ranges, precision, recipe, moments=known)
        whole, scale = weights(result, "product")
        assert np.abs(whole.astype(int)).max() <= (7 if precision == "int4-weights" else 127)
        scale = np.repeat(scale, 32, 0) if precision == "int4-weights" else scale
        errors.append(snr_db(others @ (whole.astype(np.float64) * scale), exact))
    assert errors[1] > errors[0] + 6, errors


def test_rounding_keeps_zeros_and_scales(mixed: tuple[Any, Any, Any]) -> None:
    _, samples, _ = mixed
    weight = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    weight.reshape(-1, 4, 32)[:, :2] = 0
    model = product("MatMul", weight, (1, 64), {})
    moments = second_moments(model, {"x": samples})
    ranges = Calibration({"x": Range(-12, 12), "y": Range(-99, 99)}, "by hand", 0, "")
    alone, scale = weights(quantize(model, ranges, "int8", "cpu"), "product")
    whole, same = weights(quantize(model, ranges, "int8", "cpu", moments=moments), "product")
    np.testing.assert_array_equal(scale, same)
    assert not whole[weight == 0].any()
    assert (whole != alone).any()


def test_few_samples_do_not_ruin_what_they_do_not_show() -> None:
    """A few tell of few directions; errors in all others must not grow for it by much."""
    weight = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    model = product("MatMul", weight, (1, 64), {})
    moments = second_moments(model, {"x": together(16, 64, 1)})
    others = np.random.default_rng(5).standard_normal((512, 64))
    ranges = Calibration({"x": Range(-12, 12), "y": Range(-99, 99)}, "by hand", 0, "")
    errors = []
    for known in (None, moments):
        whole, scale = weights(quantize(model, ranges, "int8", "cpu", moments=known), "product")
        errors.append(snr_db(others @ (whole.astype(np.float64) * scale), others @ weight))
    assert errors[1] > errors[0] - 0.9, errors


def test_inputs_that_are_always_0_say_nothing() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    model = product("MatMul", weight, (1, 8), {})
    ranges = Calibration({"x": Range(0, 2), "y": Range(-9, 9)}, "by hand", 0, "")
    moments = second_moments(model, {"x": np.zeros((4, 8), np.float32)})
    made = quantize(model, ranges, moments=moments)
    assert made.model.hash == quantize(model, ranges).model.hash
    half = np.ones((4, 8), np.float32)
    half[:, :4] = 0
    whole, scale = weights(
        quantize(model, ranges, moments=second_moments(model, {"x": half})), "product"
    )
    assert np.abs(whole * scale - weight).max() < 4 * scale.max()


def test_moments_of_another_network_are_refused(mixed: tuple[Any, Any, Any]) -> None:
    model, samples, _ = mixed
    moments = second_moments(model, {"x": samples})
    with pytest.raises(unirt.ModelError, match="not those of"):
        quantize(DIGITS, None, "int8-weights", moments=moments)


def test_a_graph_says_what_it_was_rounded_on_and_comes_out_the_same_again() -> None:
    data = {"image": IMAGES["image"][:64]}
    ranges = calibrate(DIGITS, data)
    made = [
        quantize(DIGITS, ranges, "int8", "cpu", moments=second_moments(DIGITS, data))
        for _ in range(2)
    ]
    assert made[0].model.hash == made[1].model.hash
    assert (
        "6 of 6 weights were rounded so that errors cancel out on 64 samples" in made[0].notes[-1]
    )
    again = second_moments(DIGITS, data)
    for _ in range(2):  # the second time what was rounded before is taken
        found = quantize(DIGITS, ranges, "int8", "cpu", moments=again)
        assert found.model.hash == made[0].model.hash


def test_sensitivity_and_search_round_alike() -> None:
    data = {"image": IMAGES["image"][:64]}
    ranges, moments = calibrate(DIGITS, data), second_moments(DIGITS, data)
    table = sensitivity(DIGITS, ranges, data, recipe="cpu")
    rounded = sensitivity(DIGITS, ranges, data, recipe="cpu", moments=moments)
    assert rounded.whole.snr_db > table.whole.snr_db + 0.2
    found = search(DIGITS, ranges, data, min_snr=20, recipe="cpu", moments=moments)
    assert found.met
    assert not found.kept
    made = quantize(DIGITS, ranges, "int8", "cpu", moments=moments)
    assert found.quantized.model.hash == made.model.hash


# In front of a ReLU


def test_what_a_relu_makes_0_anyway_takes_no_steps() -> None:
    """A skip branch is cut where the other one cannot lift it above 0, and no answer changes."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["branch"], "branch"),
        helper.make_node("Conv", ["x", "w"], ["skip"], "skip"),
        helper.make_node("Add", ["branch", "skip"], ["sum"], "add"),
        helper.make_node("Relu", ["sum"], ["y"], "relu"),
    ]
    stored = [
        numpy_helper.from_array(size * random.standard_normal((8, 8, 1, 1), np.float32), name)
        for name, size in (("v", np.float32(0.1)), ("w", np.float32(1)))
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 9, 9]) for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "skip", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = [{"x": random.standard_normal((1, 8, 9, 9), np.float32)} for _ in range(4)]
    ranges = calibrate(model, feeds, method="max")
    result = quantize(model, ranges, "int8", "cpu")
    graph = onnx.load_from_string(result.model.primary.read()).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    of = {n.input[0]: n for n in graph.node if n.op_type == "QuantizeLinear"}
    scale, zero = (stored[name] for name in of["skip"].input[1:])
    lowest = -float(scale) * int(zero)
    high = {name: ranges.ranges[name].high for name in ("branch", "skip")}
    assert lowest == pytest.approx(-high["branch"], abs=float(scale))
    assert float(scale) < 0.8 * (high["skip"] - ranges.ranges["skip"].low) / 255
    # The other way round nothing is to be gained.
    scale, zero = (stored[name] for name in of["branch"].input[1:])
    assert -float(scale) * int(zero) == pytest.approx(ranges.ranges["branch"].low, abs=float(scale))
    got = [run(result.model, feed["x"], optimization="disable") for feed in feeds]
    wanted = [run(model, feed["x"]) for feed in feeds]
    assert snr_db(np.stack(got), np.stack(wanted)) > 38
