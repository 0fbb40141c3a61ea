"""ONNX Runtime: the shared suite, then what is its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


class TestOnnxRuntimeCUDA(BackendConformance):
    device = "cuda:0"

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> unirt.Backend:
        return OnnxRuntimeBackend()

    @pytest.fixture
    def torch(self, available: unirt.Backend) -> Any:
        return pytest.importorskip("torch", reason="PyTorch makes the CUDA arrays of these tests")

    @pytest.fixture
    def pair(self, engines: dict[str, unirt.Engine]) -> Iterator[unirt.Session]:
        with engines["pair"].session() as session:
            yield session

    def test_cuda_tensors_go_in_and_stay_out_there(self, pair: unirt.Session, torch: Any) -> None:
        case = NETWORKS["pair"]
        for n in (2, 64, 3):
            inputs = case.sample(n, n)
            tensors = {name: torch.from_numpy(value).cuda() for name, value in inputs.items()}
            outputs = pair.run(tensors, device_outputs=True)
            assert all(isinstance(value, unirt.DeviceArray) for value in outputs.values())
            views = {name: torch.from_dlpack(value) for name, value in outputs.items()}
            assert all(view.is_cuda for view in views.values())
            assert views["total"].data_ptr() == outputs["total"].pointer
            case.check(inputs, {name: view.cpu().numpy() for name, view in views.items()})
            case.check(inputs, {name: value.numpy() for name, value in outputs.items()})
            mixed = {"a": tensors["a"], "b": inputs["b"]}
            case.check(inputs, pair.run(mixed))

    def test_no_byte_of_a_device_run_passes_the_host(
        self, engines: dict[str, unirt.Engine], torch: Any
    ) -> None:
        """Counts copies between host and device as the CUDA driver records them."""
        from torch.profiler import ProfilerActivity, profile

        x = torch.randn(4096, 64, device="cuda")
        with engines["heavy"].session() as session:
            session.run({"x": x}, device_outputs=True)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                outputs = session.run({"x": x}, device_outputs=True)
                torch.cuda.synchronize()
            events = [event.name for event in seen.events()]
            assert events, "the profiler saw nothing"
            assert not [name for name in events if "HtoD" in name or "DtoH" in name]
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                session.run({"x": x})
                torch.cuda.synchronize()
            assert [event.name for event in seen.events() if "DtoH" in event.name]
            expected = NETWORKS["heavy"].answer({"x": x.cpu().numpy()})["y"]
            np.testing.assert_allclose(outputs["y"].numpy(), expected, rtol=2e-2, atol=2e-3)

    def test_cupy_views_outputs_by_the_cuda_array_interface(
        self, pair: unirt.Session, available: unirt.Backend
    ) -> None:
        cupy = pytest.importorskip("cupy", reason="CuPy is the consumer of this test")
        case = NETWORKS["pair"]
        inputs = case.sample(5, 0)
        outputs = pair.run(
            {name: cupy.asarray(value) for name, value in inputs.items()}, device_outputs=True
        )
        views = {name: cupy.asarray(value) for name, value in outputs.items()}
        assert views["total"].data.ptr == outputs["total"].pointer
        case.check(inputs, {name: cupy.asnumpy(view) for name, view in views.items()})

    def test_a_run_waits_for_the_work_that_makes_its_input(
        self, pair: unirt.Session, torch: Any
    ) -> None:
        big = torch.randn(4096, 4096, device="cuda")
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            for k in range(5):
                with torch.cuda.stream(stream):
                    late = big
                    for _ in range(20):
                        late = (late @ big).clamp(-1, 1)
                    a = torch.full((8, 3), float(k), device="cuda") + 0 * late[:8, :3]
                    b = torch.ones(8, 3, device="cuda")
                    outputs = pair.run({"a": a, "b": b})
                np.testing.assert_array_equal(outputs["total"], np.full((8, 3), k + 1, np.float32))

    def test_bound_device_buffers_are_read_and_written_in_place(
        self, pair: unirt.Session, torch: Any
    ) -> None:
        a, b, total = (torch.zeros(8, 3, device="cuda") for _ in range(3))
        with pair.bind({"a": a, "b": b}, {"total": total}) as binding:
            for k in range(4):
                a.fill_(k)
                b.fill_(10)
                binding.run()
                assert total.cpu().tolist() == [[k + 10.0] * 3] * 8
                assert binding.outputs["difference"].numpy().tolist() == [[k - 10.0] * 3] * 8

    def test_a_device_array_that_does_not_fit_is_refused(
        self, pair: unirt.Session, torch: Any
    ) -> None:
        good = torch.zeros(8, 3, device="cuda")
        for bad in (
            good.double(),
            torch.zeros(8, 4, device="cuda"),
            torch.zeros(3, 8, device="cuda").T,
        ):
            with pytest.raises(unirt.InputError):
                pair.run({"a": bad, "b": good})
        with (
            unirt.load(NETWORKS["pair"].model(["onnx"]), "onnxruntime@cpu") as host,
            pytest.raises(unirt.InputError, match="another device"),
        ):
            host.run({"a": good, "b": good})

    def test_many_threads_share_a_session_with_device_arrays(
        self, pair: unirt.Session, torch: Any
    ) -> None:
        case = NETWORKS["pair"]

        def work(thread: int) -> None:
            for call in range(50):
                inputs = case.sample(1 + call % 5, 1000 * thread + call)
                tensors = {name: torch.from_numpy(v).cuda() for name, v in inputs.items()}
                outputs = pair.run(tensors, device_outputs=True)
                case.check(inputs, {name: value.numpy() for name, value in outputs.items()})

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))


def test_a_session_asked_for_cuda_fails_where_cuda_is_missing() -> None:
    availability = OnnxRuntimeBackend().probe()
    if availability.find("cuda") is not None:
        pytest.skip("this machine has CUDA; TestOnnxRuntimeCUDA runs instead")
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
        [
            helper.make_node("Cast", ["x"], ["wide"], to=1),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
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


def test_config_reaches_onnxruntime() -> None:
    model = NETWORKS["affine"].model(["onnx"])
    with pytest.raises(unirt.BuildError, match="Processor id must consist of only digits"):
        unirt.build(
            model,
            "onnxruntime",
            options={"threads": 2, "config": "session.intra_op_thread_affinities=nonsense"},
        )
