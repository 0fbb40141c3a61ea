"""ONNX's NumPy evaluator: the shared suite, and that it really is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from unirt_reference._backend import ReferenceBackend

import unirt
from unirt import precision
from unirt.accuracy import snr_db
from unirt.testing import NETWORKS, BackendConformance

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits" / "digits.onnx"


class TestReference(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> unirt.Backend:
        return ReferenceBackend()


def test_gives_the_very_bits_that_numpy_gives() -> None:
    case = NETWORKS["affine"]
    inputs = case.sample(5, 0)
    with unirt.load(case.model(["onnx"]), "reference") as session:
        np.testing.assert_array_equal(session.run(inputs)["y"], case.answer(inputs)["y"])


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 17])
def test_batch_normalization_uses_the_trained_statistics_in_every_opset(opset: int) -> None:
    """onnx 1.23 mixes the batch's own mean and variance in, for opsets before 14."""
    names = ["x", "scale", "bias", "mean", "variance"]
    node = helper.make_node("BatchNormalization", names, ["y"], epsilon=1e-5, momentum=0.9)
    shapes = [["n", 3, 4, 4], [3], [3], [3], [3]]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, 1, s) for n, s in zip(names, shapes, strict=True)],
        [helper.make_tensor_value_info("y", 1, ["n", 3, 4, 4])],
    )
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, ir_version=8, opset_imports=imports)
    random = np.random.default_rng(0)
    feed = {
        name: random.uniform(0.5, 2, (2, 3, 4, 4) if name == "x" else 3).astype(np.float32)
        for name in names
    }
    x, scale, bias, mean, variance = (feed[name] for name in names)
    channels = (3, 1, 1)
    expected = (x - mean.reshape(channels)) / np.sqrt(variance.reshape(channels) + 1e-5)
    expected = expected * scale.reshape(channels) + bias.reshape(channels)
    with unirt.load(model.SerializeToString(), "reference") as session:
        np.testing.assert_allclose(session.run(feed)["y"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, None])
@pytest.mark.parametrize("opset", [10, 13, 17, 18])
def test_quantizes_in_every_opset_as_onnxruntime_does(opset: int, kind: Any) -> None:
    """onnx 1.23 has no DequantizeLinear before opset 19."""
    zero = [] if kind is None else ["zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", *zero], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", *zero], ["y"]),
    ]
    weights = {"scale": np.float32(0.5), "zero": np.array(3, kind or np.uint8)}
    # Halves round to even; what is out of range saturates, infinities too.
    x = np.array([[-1e9, -300, -1.25, -0.75, -0.25, 0, 0.25, 0.75, 64, 1e9, np.inf, -np.inf]])
    assert_agree(nodes, weights, x.astype(np.float32), opset)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("opset", [13, 18])
def test_quantizes_along_an_axis_as_onnxruntime_does(opset: int, axis: int | None) -> None:
    random = np.random.default_rng(0)
    x = random.normal(0, 20, (2, 3, 4)).astype(np.float32)
    size = x.shape[1 if axis is None else axis]
    weights = {
        "scale": random.uniform(0.05, 0.5, size).astype(np.float32),
        "zero": random.integers(-9, 9, size).astype(np.int8),
        "bias": random.integers(-(2**30), 2**30, (2, 3, 4)).astype(np.int32),
    }
    along = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **along),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], **along),
        helper.make_node("DequantizeLinear", ["bias", "scale"], ["b"], **along),
        helper.make_node("Add", ["d", "b"], ["y"]),
    ]
    assert_agree(nodes, weights, x, opset)


def test_a_quantized_network_of_an_old_opset_has_its_oracle() -> None:
    images = np.load(DIGITS.with_name("test.npz"))["image"][:32]
    model = precision.quantize(DIGITS, precision.calibrate(DIGITS, {"image": images})).model
    assert model.opset["ai.onnx"] < 19
    plainly = {"optimization": "disable"}
    with (
        unirt.load(model, "reference") as oracle,
        unirt.load(model, "onnxruntime", options=plainly) as session,
    ):
        got, expected = oracle.run(images)["logits"], session.run(images)["logits"]
    # Sums of another order may round to the next of 255 levels.
    assert snr_db(got, expected) > 40


def assert_agree(nodes: list[Any], weights: dict[str, Any], x: Any, opset: int) -> None:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, list(x.shape))],
        [helper.make_tensor_value_info("y", 1, list(x.shape))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])
    content = model.SerializeToString()
    plainly = {"optimization": "disable"}
    with (
        unirt.load(content, "reference") as oracle,
        unirt.load(content, "onnxruntime", options=plainly) as session,
    ):
        np.testing.assert_array_equal(oracle.run(x)["y"], session.run(x)["y"])
