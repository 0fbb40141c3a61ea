"""ONNX Runtime: the shared suite, then what is its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from unirt_onnxruntime._backend import OnnxRuntimeBackend

import unirt
from unirt.testing import NETWORKS, BackendConformance
from unirt.types import Availability


class TestOnnxRuntime(BackendConformance):
    device = "cpu"

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> unirt.Backend:
        return OnnxRuntimeBackend()


class TestOnnxRuntimeParallelUnoptimized(BackendConformance):
    device = "cpu"
    options = {
        "threads": 1,
        "execution": "parallel",
        "inter_op_threads": 2,
        "optimization": "disable",
        "memory_arena": False,
        "spin": False,
        "lanes": 4,
    }

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> unirt.Backend:
        return OnnxRuntimeBackend()


def test_a_session_asked_for_cuda_fails_where_cuda_is_missing() -> None:
    availability = OnnxRuntimeBackend().probe()
    if availability.find("cuda") is not None:
        pytest.skip("this machine has CUDA; benchmarks/gpu_onnxruntime.py tests it there")
    with pytest.raises(unirt.BackendUnavailable, match=r"onnxruntime-gpu|NVIDIA"):
        unirt.load(NETWORKS["affine"].model(["onnx"]), "onnxruntime@cuda:0")


def test_a_provider_that_does_not_load_is_an_error_and_not_a_fallback() -> None:
    """Asks for CUDA behind the probe's back, as on a machine whose probe saw a GPU too many."""
    backend = OnnxRuntimeBackend()
    backend._availability = Availability.yes("1", unirt.Device("cuda", 0), unirt.CPU)
    with pytest.raises(unirt.BuildError, match="CUDAExecutionProvider"):
        backend.compile(NETWORKS["affine"].model(["onnx"]), "cuda:0")


def test_facts_name_the_provider_that_runs_the_nodes() -> None:
    with unirt.build(NETWORKS["heavy"].model(["onnx"]), "onnxruntime") as engine:
        assert engine.facts["provider"] == "CPUExecutionProvider"
        assert sum(engine.facts["nodes"].values()) > 0  # type: ignore[attr-defined]


def test_bfloat16_goes_in_and_comes_out() -> None:
    import ml_dtypes
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["wide"], to=1), helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value("x", TensorProto.BFLOAT16, ["n", 4])],
        [value("y", TensorProto.BFLOAT16, ["n", 4]), value("wide", 1, ["n", 4])],
    )
    opset = [helper.make_opsetid("", 19)]
    model = helper.make_model(graph, ir_version=9, opset_imports=opset).SerializeToString()
    x = np.arange(8).reshape(2, 4).astype(ml_dtypes.bfloat16)
    with unirt.load(model, "onnxruntime") as session:
        outputs = session.run(x[:, ::-1])
        np.testing.assert_array_equal(outputs["y"], x[:, ::-1])
        assert outputs["y"].dtype == x.dtype
        np.testing.assert_array_equal(outputs["wide"], x[:, ::-1].astype(np.float32))
        binding = session.bind({"x": x})
        x[:] = 3
        np.testing.assert_array_equal(binding.run()["y"], x)


def test_weights_beside_the_model_are_found(tmp_path: Path) -> None:
    import onnx

    model = onnx.load_from_string(NETWORKS["heavy"].model(["onnx"]).primary.read())
    path = tmp_path / "heavy.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    case = NETWORKS["heavy"]
    inputs = case.sample(3, 0)
    with unirt.load(path, "onnxruntime") as session:
        case.check(inputs, session.run(inputs))


def test_config_reaches_onnxruntime() -> None:
    model = NETWORKS["affine"].model(["onnx"])
    with pytest.raises(unirt.BuildError, match="Processor id must consist of only digits"):
        unirt.build(
            model,
            "onnxruntime",
            options={"threads": 2, "config": "session.intra_op_thread_affinities=nonsense"},
        )
