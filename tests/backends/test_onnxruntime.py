"""ONNX Runtime: the shared suite, then what is its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unirt_onnxruntime._backend import OnnxRuntimeBackend
from unirt_onnxruntime._layers import WARM_UP, medians, read_layers, refuse_launch_times

import unirt
from unirt import precision
from unirt.accuracy import snr_db
from unirt.testing import NETWORKS, BackendConformance
from unirt.types import Availability

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits" / "digits.onnx"
IMAGES = np.load(DIGITS.with_name("test.npz"))["image"][:64]


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


# --- layers --------------------------------------------------------------------------------------


@pytest.fixture
def onnx() -> Any:
    return pytest.importorskip("onnx", reason="the onnx package writes and reads these graphs")


def graph_of(
    onnx: Any, nodes: list[Any], weights: dict[str, Any], shapes: dict[str, list[int]]
) -> Any:
    """A model of float32; inputs come first in `shapes`, the last one is the output."""
    values = [onnx.helper.make_tensor_value_info(n, 1, shape) for n, shape in shapes.items()]
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", values[:-1], values[-1:], tensors)
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )


def residual(onnx: Any) -> Any:
    """Conv, Relu, Conv, residual Add, Relu, and a pool: what ONNX Runtime fuses in float."""
    node, pads = onnx.helper.make_node, [1, 1, 1, 1]
    nodes = [
        node("Conv", ["x", "w1", "b"], ["c1"], "conv1", pads=pads),
        node("Relu", ["c1"], ["r1"], "relu1"),
        node("Conv", ["r1", "w2", "b"], ["c2"], "conv2", pads=pads),
        node("Add", ["c2", "r1"], ["a"], "add"),
        node("Relu", ["a"], ["r2"], "relu2"),
        node("GlobalAveragePool", ["r2"], ["y"], "gap"),
    ]
    w1, w2 = np.ones((16, 3, 3, 3), np.float32), np.ones((16, 16, 3, 3), np.float32)
    weights = {"w1": w1, "w2": w2, "b": np.zeros(16, np.float32)}
    return graph_of(onnx, nodes, weights, {"x": [1, 3, 32, 32], "y": [1, 16, 1, 1]})


def q_dq(onnx: Any, dtype: Any) -> Any:
    """A convolution between Q/DQ, whose result is negated in float."""
    node = onnx.helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["x_q"], "x_Q"),
        node("DequantizeLinear", ["x_q", "s", "z"], ["x_dq"], "x_DQ"),
        node("DequantizeLinear", ["w", "s", "zw"], ["w_dq"], "w_DQ"),
        node("Conv", ["x_dq", "w_dq"], ["c"], "conv"),
        node("QuantizeLinear", ["c", "s", "z"], ["c_q"], "c_Q"),
        node("DequantizeLinear", ["c_q", "s", "z"], ["c_dq"], "c_DQ"),
        node("Neg", ["c_dq"], ["y"], "neg"),
    ]
    weights = {"s": np.float32(0.1), "z": dtype(0), "zw": np.int8(0)}
    weights["w"] = np.ones((8, 3, 3, 3), np.int8)
    return graph_of(onnx, nodes, weights, {"x": [1, 3, 16, 16], "y": [1, 8, 14, 14]})


def layers_by_node(report: unirt.EngineReport) -> dict[str, unirt.Layer]:
    return {node: layer for layer in report.layers for node in layer.nodes}


def test_layers_name_the_nodes_that_are_fused_into_them(onnx: Any) -> None:
    with unirt.build(residual(onnx), "onnxruntime") as engine:
        report = engine.inspect()
    assert [layer.nodes for layer in report.fused] == [
        ("conv1", "relu1"),
        ("conv2", "add", "relu2"),
    ]
    assert report.missing == ()
    assert report.source == "optimized graph"
    assert report.precisions == {"float32": len(report.layers) - len(report.reformats)}
    (conv,) = [layer for layer in report.layers if "conv2" in layer.nodes]
    assert conv.tactic == "CPU"
    assert [tensor.shape for tensor in conv.outputs] == [(1, 16, 32, 32)]
    assert [tensor.dtype for tensor in conv.constants] == ["float32", "float32"]


def test_without_optimization_every_node_is_a_layer(onnx: Any) -> None:
    with unirt.build(residual(onnx), "onnxruntime", options={"optimization": "disable"}) as engine:
        report = engine.inspect()
    assert [layer.nodes for layer in report.layers] == [(name,) for name in report.graph]


def test_an_integer_convolution_holds_its_pairs(onnx: Any) -> None:
    with unirt.build(q_dq(onnx, np.uint8), "onnxruntime") as engine:
        report = engine.inspect()
    conv = layers_by_node(report)["conv"]
    assert conv.kind == "QLinearConv"
    assert conv.nodes == ("x_DQ", "w_DQ", "conv", "c_Q")
    assert report.precision(conv) == "uint8"
    assert [one.layer.nodes for one in report.unfused_quantization] == [("x_Q",), ("c_DQ",)]
    assert layers_by_node(report)["neg"].inputs[0].dtype == "float32"


def test_layers_moved_to_channels_last_keep_their_nodes(onnx: Any) -> None:
    """The layout changes rename tensors after nodes; two convolutions in a row pass none back."""
    graph = q_dq(onnx, np.uint8)
    node = onnx.helper.make_node
    graph.graph.node[-1].CopyFrom(node("Conv", ["c_dq", "v_dq"], ["d"], "conv2"))
    graph.graph.node.insert(0, node("DequantizeLinear", ["v", "s", "zw"], ["v_dq"], "v_DQ"))
    graph.graph.node.append(node("QuantizeLinear", ["d", "s", "z"], ["d_q"], "d_Q"))
    graph.graph.node.append(node("DequantizeLinear", ["d_q", "s", "z"], ["y"], "d_DQ"))
    graph.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((8, 8, 1, 1), np.int8), "v")
    )
    with unirt.build(graph, "onnxruntime") as engine:
        report = engine.inspect()
    found = layers_by_node(report)
    assert found["conv"].nodes == ("x_DQ", "w_DQ", "conv", "c_Q")
    assert found["conv2"].nodes == ("v_DQ", "c_DQ", "conv2", "d_Q")
    assert found["conv2"].inputs[0].format == "NHWC"
    moves = [one for one in report.reformats if one.layer.kind == "Transpose"]
    assert all(one.inserted for one in moves)
    assert {one.change for one in moves} == {"uint8 → uint8 NHWC", "uint8 NHWC → uint8"}


def test_nodes_without_names_get_the_one_of_their_output(onnx: Any) -> None:
    graph = residual(onnx)
    for node in graph.graph.node:
        node.name = ""
    with unirt.build(graph, "onnxruntime") as engine, engine.session() as session:
        report = session.profile(np.ones((1, 3, 32, 32), np.float32))
    assert ("node_of_c1", "node_of_r1") in [layer.nodes for layer in report.layers]
    assert all(layer.seconds is not None for layer in report.layers)


def test_profile_times_every_layer(
    onnx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    x = np.ones((1, 3, 32, 32), np.float32)
    with (
        unirt.build(residual(onnx), "onnxruntime", options={"threads": 1}) as engine,
        engine.session() as session,
    ):
        report = session.profile(x)
        assert session.run(x)["y"].shape == (1, 16, 1, 1)
    assert all(layer.seconds and layer.seconds < 1 for layer in report.layers)
    assert report.unmatched == ()
    slowest = max(report.layers, key=lambda layer: layer.seconds or 0)
    assert "conv2" in slowest.nodes
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_profile_knows_the_shapes_of_dynamic_models() -> None:
    case = NETWORKS["heavy"]
    with unirt.build(case.model(("onnx",)), "onnxruntime") as engine:
        assert engine.inspect().layers[0].outputs[0].shape[0] == -1
        with engine.session() as session:
            report = session.profile(case.sample(7, 0))
    assert {layer.outputs[0].shape for layer in report.layers} == {(7, 64)}


def test_what_runs_in_a_loop_counts_as_the_loop(onnx: Any) -> None:
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [
            node("Identity", ["go"], ["go_on"], "hand_on"),
            node("Add", ["s", "s"], ["twice"], "double"),
        ],
        "body",
        [info("i", 7, []), info("go", 9, []), info("s", 1, [4])],
        [info("go_on", 9, []), info("twice", 1, [4])],
    )
    nodes = [node("Loop", ["n", "", "x"], ["l"], "loop", body=body), node("Neg", ["l"], ["y"], "n")]
    graph = graph_of(onnx, nodes, {"n": np.int64(3)}, {"x": [4], "y": [4]})
    with unirt.build(graph, "onnxruntime") as engine, engine.session() as session:
        report = session.profile(np.ones(4, np.float32))
    assert [layer.nodes for layer in report.layers] == [("loop",), ("n",)]
    assert report.unmatched == ()
    assert "inside If, Loop and Scan" in report.notes[0]


def test_a_model_with_weights_beside_it_shows_layers_too(onnx: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(residual(onnx), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    with unirt.build(path, "onnxruntime") as engine, engine.session() as session:
        report = session.profile(np.ones((1, 3, 32, 32), np.float32))
    assert ("conv2", "add", "relu2") in [layer.nodes for layer in report.layers]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.onnx", "w.bin"]


def test_layers_want_the_onnx_package(onnx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with unirt.build(residual(onnx), "onnxruntime") as engine:
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(unirt.BackendUnavailable, match=r"onnx package.*pip install"):
            engine.inspect()


def test_a_provider_that_only_starts_kernels_is_not_timed() -> None:
    with pytest.raises(unirt.BackendUnavailable, match="time to start a kernel"):
        refuse_launch_times("cuda")


def test_a_node_that_became_a_constant_is_in_no_layer(onnx: Any) -> None:
    graph = residual(onnx)
    scale = onnx.helper.make_node("Mul", ["w1", "w1"], ["w1_scaled"], "scale")
    graph.graph.node[0].input[1] = "w1_scaled"
    graph.graph.node.insert(0, scale)
    with unirt.build(graph, "onnxruntime") as engine:
        report = engine.inspect()
    assert report.missing == ("scale",)
    assert layers_by_node(report)["conv1"].nodes == ("conv1", "relu1")


def chain(onnx: Any, *nodes: tuple[str, str, list[str], str]) -> Any:
    """A model of (operator, name, inputs, output) from x to y."""
    made = [onnx.helper.make_node(op, reads, [out], name) for op, name, reads, out in nodes]
    return graph_of(onnx, made, {}, {"x": [4], "y": [4]})


def nodes_in_layers(original: Any, optimized: Any, types: Any = None) -> list[tuple[str, ...]]:
    return [layer.nodes for layer in read_layers(original, optimized, types or {}, {}).layers]


def test_what_is_before_an_unknown_tensor_is_not_guessed(onnx: Any) -> None:
    original = chain(
        onnx,
        ("Abs", "a", ["x"], "t"),
        ("Neg", "b", ["t"], "u"),
        ("Relu", "c", ["u"], "y"),
    )
    optimized = chain(onnx, ("Blob", "new", ["x"], "odd"), ("Relu", "c", ["odd"], "y"))
    assert nodes_in_layers(original, optimized) == [(), ("c",)]


def test_a_node_of_another_layer_is_not_claimed(onnx: Any) -> None:
    original = chain(
        onnx,
        ("Abs", "a", ["x"], "t"),
        ("Neg", "b", ["t"], "u"),
        ("Add", "c", ["u", "x"], "y"),
    )
    optimized = chain(onnx, ("QAbs", "a", ["x"], "odd"), ("Add", "c", ["odd", "x"], "y"))
    types = {"odd": ("uint8", ())}  # no tensor of the file is eight bits wide
    assert nodes_in_layers(original, optimized, types) == [("a",), ("c",)]


def test_an_inserted_move_is_no_node_of_a_similar_name(onnx: Any) -> None:
    original = chain(onnx, ("Abs", "a", ["x"], "t"), ("Transpose", "move", ["t"], "y"))
    optimized = chain(
        onnx,
        ("Transpose", "move_token_7", ["x"], "x_moved"),
        ("Abs", "a", ["x_moved"], "a_moved"),
        ("Transpose", "move", ["a_moved"], "y"),
    )
    assert nodes_in_layers(original, optimized) == [(), ("a",), ("move",)]


def test_layers_of_one_name_have_medians_of_their_own() -> None:
    """The first runs do not count, and an interrupted one does not matter."""
    times = [9.0, 90.0] * WARM_UP + [1.0, 10.0] * 10 + [500.0, 10.0]
    assert medians(times, WARM_UP + 11) == [1.0, 10.0]


# --- fp8 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8() -> Any:
    """The digits network with Q/DQ in fp8, as `onnx` reads it."""
    import onnx

    ranges = precision.calibrate(DIGITS, {"image": IMAGES}, method="max")
    return onnx.load_from_string(precision.quantize(DIGITS, ranges, "fp8").model.primary.read())


def in_nodes(model: Any) -> Any:
    """The same with its fp8 tensors in Constant nodes, which nobody counts as weights."""
    from onnx import ModelProto, TensorProto, helper

    copy = ModelProto()
    copy.CopyFrom(model)
    small = [t for t in copy.graph.initializer if t.data_type == TensorProto.FLOAT8E4M3FN]
    for tensor in small:
        copy.graph.initializer.remove(tensor)
        copy.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    assert small
    return copy


@pytest.mark.parametrize("optimization", ["disable", "basic", "extended", "all"])
@pytest.mark.parametrize("stored", [lambda model: model, in_nodes])
def test_fp8_is_right_however_far_the_graph_was_to_be_optimized(
    fp8: Any, stored: Any, optimization: str
) -> None:
    """ONNX Runtime 1.31 takes fp8 for int8 from `extended` on."""
    content = stored(fp8).SerializeToString()
    chosen = {"optimization": optimization}
    with (
        unirt.load(content, "reference") as oracle,
        unirt.load(content, "onnxruntime", options=chosen) as session,
    ):
        expected, got = oracle.run(IMAGES)["logits"], session.run(IMAGES)["logits"]
        notes = session.engine.notes
    assert snr_db(got, expected) > 40
    assert [note for note in notes if "fp8" in note and "`basic`" in note] == list(notes)
    assert bool(notes) == (optimization in ("extended", "all"))


def test_what_holds_no_fp8_is_optimized_as_asked() -> None:
    ranges = precision.calibrate(DIGITS, {"image": IMAGES})
    with unirt.build(precision.quantize(DIGITS, ranges, "int8", "cpu").model, "onnxruntime") as e:
        assert e.notes == ()
        assert {"QLinearConv"} <= {layer.kind for layer in e.inspect().layers}


def test_another_refusal_is_told_as_it_is() -> None:
    from onnx import helper

    node = helper.make_node("NoSuch", ["x"], ["y"], domain="acme")
    ends = [helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    graph = helper.make_graph([node], "float8", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("acme", 1)]
    model = helper.make_model(graph, ir_version=9, opset_imports=opsets)
    with pytest.raises(unirt.BuildError, match="NoSuch"):
        unirt.build(model, "onnxruntime")


def quantized_product(behind: str, weight: str) -> unirt.Model:
    """A convolution between Q/DQ with a float bias, its weight stored in int8 or in float32."""
    from onnx import numpy_helper, parser

    stored = {
        "int8": ("[w] w = DequantizeLinear <axis = 0> (wq, ws, wz)", "wq", np.int8),
        "float32": ("", "w", np.float32),
    }
    made, name, dtype = stored[weight]
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        net (float[1,8,6,6] x) => (float[1,8,6,6] y) {{
            [xq] xq = QuantizeLinear (x, s, z) [xd] xd = DequantizeLinear (xq, s, z) {made}
            [conv] c = Conv (xd, w, b) {behind} [yq] yq = QuantizeLinear (r, s, z)
            [yd] y = DequantizeLinear (yq, s, z)
        }}""")
    random = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.05),
        "z": np.uint8(0),
        "ws": np.full(8, 0.01, np.float32),
        "wz": np.zeros(8, np.int8),
        name: random.integers(-60, 60, (8, 8, 1, 1)).astype(dtype),
        "b": random.standard_normal(8).astype(np.float32),
    }
    for key, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), key))
    return unirt.Model(model)


@pytest.mark.parametrize("behind", ["[relu] r = Relu (c)", "[same] r = Identity (c)"])
def test_quantized_products_with_float_biases_compute_in_integers(behind: str) -> None:
    model = quantized_product(behind, "int8")
    with unirt.build(model, "onnxruntime@cpu") as engine:
        (product,) = [one for one in engine.inspect().layers if "conv" in one.nodes]
    assert product.kind == "QLinearConv"


def test_products_that_were_left_in_float_between_quantized_ones_stay_so() -> None:
    model = quantized_product("[relu] r = Relu (c)", "float32")
    assert model.primary.has_float_islands
    with unirt.build(model, "onnxruntime@cpu") as engine:
        (product,) = [one for one in engine.inspect().layers if "conv" in one.nodes]
    assert product.kind != "QLinearConv"
    assert not quantized_product("[relu] r = Relu (c)", "int8").primary.has_float_islands
    assert not unirt.Model(DIGITS).primary.has_float_islands
