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
