"""ONNX's NumPy evaluator: the shared suite, and that it really is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from unirt_reference._backend import ReferenceBackend

import unirt
from unirt.testing import NETWORKS, BackendConformance


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
    from onnx import helper

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
