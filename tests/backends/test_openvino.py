"""OpenVINO: the shared suite, then what is its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from unirt_openvino import _backend
from unirt_openvino._backend import OpenVINOBackend
from unirt_openvino._layers import measure
from unirt_openvino._ports import LENT_FROM_BYTES

import unirt
from unirt.testing import NETWORKS, BackendConformance

WRAPS = "openvino computes int64 in 32 bits; UniRT refuses what does not fit"


class TestOpenVINO(BackendConformance):
    device = "cpu"
    known_failures = {
        "answers_as_numpy_does[wide]": WRAPS,
        "bind_runs_from_and_into_fixed_buffers[wide]": WRAPS,
    }

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> unirt.Backend:
        return OpenVINOBackend()


class TestOpenVINOThroughput(TestOpenVINO):
    options = {"hint": "throughput", "streams": 2, "requests": 3, "cpu_pinning": False}


class TestOpenVINOGPU(TestOpenVINO):
    device = "gpu:0"


class TestOpenVINONPU(TestOpenVINO):
    device = "npu:0"
    options = {"inference_precision": "f16"}


FLOAT, INT64, STRING, DOUBLE, INT4, BFLOAT16 = 1, 7, 8, 11, 22, 16
Value = tuple[str, int, list[Any] | None]


def onnx_model(
    nodes: list[Any], inputs: list[Value], outputs: list[Value], opset: int = 21
) -> bytes:
    helper = pytest.importorskip("onnx").helper
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "quirk",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])
    return bytes(model.SerializeToString())


def add(dtype: int = FLOAT, shape: list[Any] | None = None) -> bytes:
    shape = [4] if shape is None else shape
    return onnx_model([("Add", ["x", "x"], ["y"])], [("x", dtype, shape)], [("y", dtype, shape)])


@pytest.fixture(scope="module")
def backend() -> OpenVINOBackend:
    backend = OpenVINOBackend()
    availability = backend.probe()
    if not availability.available:
        pytest.skip(availability.reason)
    return backend


@pytest.fixture
def opened(backend: OpenVINOBackend) -> Callable[..., unirt.Session]:
    def opened(model: Any, **options: object) -> unirt.Session:
        return backend.compile(model, "cpu", options).session()

    return opened


Opened = Callable[..., unirt.Session]


# Probe and import


def test_probe_names_devices_and_says_why_others_are_missing(backend: OpenVINOBackend) -> None:
    availability = backend.probe()
    cpu = availability.find("cpu")
    assert cpu is not None
    assert "FP32" in cpu.facts["optimization_capabilities"]
    for kind in ("gpu", "npu"):
        assert (availability.find(kind) is None) == (kind in availability.missing)


def test_import_sends_no_telemetry(tmp_path: Path) -> None:
    """OpenVINO's own import writes a client id into the home folder and reports home."""
    code = (
        "import sys; from unirt_openvino._backend import OpenVINOBackend; "
        "print(OpenVINOBackend().probe().available, 'openvino_telemetry' in sys.modules, "
        "hasattr(sys.modules['openvino'], 'convert_model'))"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["True", "False", "True"]
    assert list(tmp_path.iterdir()) == []


def test_not_installed_is_a_reason_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'openvino'", name="openvino")

    monkeypatch.setattr(_backend, "import_openvino", missing)
    availability = OpenVINOBackend().probe()
    assert not availability.available
    assert availability.hint == "pip install 'unirt[openvino]'"


# Options


def test_facts_tell_what_reads_back(opened: Opened) -> None:
    with opened(add(), threads=1, requests=5) as session:
        facts = session.engine.facts
        assert facts["execution_devices"] == ["CPU"]
        assert facts["threads"] == 1
        assert facts["execution_mode"] == "ACCURACY"
        assert facts["loaded_from_cache"] is False
        assert session.lanes == facts["requests"] == 5


def test_a_number_that_openvino_changes_is_logged(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "unirt.openvino"), opened(add(), threads=100_000):
        pass
    assert "threads=" in caplog.text


def test_precision_that_the_device_does_not_obey_is_refused(backend: OpenVINOBackend) -> None:
    with backend.compile(add(), "cpu", {"inference_precision": "f32"}) as engine:
        assert engine.facts["inference_precision"] == "f32"
    cpu = backend.probe().find("cpu")
    assert cpu is not None
    if "BF16" in cpu.facts["optimization_capabilities"]:
        pytest.skip("this CPU computes in bf16")
    with pytest.raises(unirt.BuildError, match="does not compute in bf16"):
        backend.compile(add(), "cpu", {"inference_precision": "bf16"})


def test_a_device_that_lowers_precision_by_itself_is_refused(
    backend: OpenVINOBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _backend._readable

    def lowering(get: Any, *key: str) -> object:
        return "f16" if key == ("INFERENCE_PRECISION_HINT",) else real(get, *key)

    monkeypatch.setattr(_backend, "_readable", lowering)
    with pytest.raises(unirt.BuildError, match="lowers no precision silently"):
        backend.compile(add(), "cpu")
    backend.compile(add(), "cpu", {"inference_precision": "f16"}).close()
    backend.compile(add(), "cpu", {"execution": "performance"}).close()


def test_another_device_than_asked_is_refused(
    backend: OpenVINOBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _backend._readable

    def elsewhere(get: Any, *key: str) -> object:
        return ["GPU.1"] if key == ("EXECUTION_DEVICES",) else real(get, *key)

    monkeypatch.setattr(_backend, "_readable", elsewhere)
    with pytest.raises(unirt.BuildError, match=r"GPU\.1"):
        backend.compile(add(), "cpu")


def test_config_passes_what_has_no_option(backend: OpenVINOBackend) -> None:
    backend.compile(add(), "cpu", {"config": {"CPU_DENORMALS_OPTIMIZATION": "YES"}}).close()
    with pytest.raises(unirt.BuildError, match="NO_SUCH"):
        backend.compile(add(), "cpu", {"config": {"NO_SUCH": "1"}})
    with pytest.raises(unirt.OptionError, match="threads"):
        backend.compile(add(), "cpu", {"config": {"INFERENCE_NUM_THREADS": "1"}})


def test_cache_has_a_folder_for_each_model(backend: OpenVINOBackend, tmp_path: Path) -> None:
    models = [unirt.Model(add()), unirt.Model(add(shape=[5]))]
    loaded = [
        backend.compile(model, "cpu", {"cache_dir": tmp_path}).facts["loaded_from_cache"]
        for model in models * 2
    ]
    assert loaded == [False, False, True, True]
    assert {path.name for path in tmp_path.iterdir()} == {model.hash for model in models}


# Names and ports


def test_input_that_is_an_output(opened: Opened) -> None:
    """OpenVINO takes such an output's memory for the input's."""
    both: list[Value] = [("y", FLOAT, [4]), ("x", FLOAT, [4])]
    model = onnx_model([("Add", ["x", "x"], ["y"])], [("x", FLOAT, [4])], both)
    x = np.arange(4, dtype=np.float32)
    with opened(model) as session:
        outputs = session.run({"x": x})
        assert outputs["x"].tolist() == x.tolist()
        assert not np.shares_memory(outputs["x"], x)
        binding = session.bind({"x": x})
        for value in (3, 4):
            x[:] = value
            outputs = binding.run()
            assert outputs["x"].tolist() == [value] * 4
            assert outputs["y"].tolist() == [2 * value] * 4


def test_two_outputs_of_one_tensor_are_two_arrays(opened: Opened) -> None:
    nodes = [("Add", ["x", "x"], ["a"]), ("Identity", ["a"], ["b"]), ("Identity", ["a"], ["c"])]
    names = ["c", "a", "b"]
    model = onnx_model(nodes, [("x", FLOAT, [4])], [(name, FLOAT, [4]) for name in names])
    with opened(model) as session:
        outputs = session.run(np.ones(4, np.float32))
        assert list(outputs) == names
        outputs["a"][:] = 9
        assert outputs["b"].tolist() == outputs["c"].tolist() == [2] * 4


def test_unused_input_is_taken_and_told(opened: Opened) -> None:
    inputs: list[Value] = [("unused", FLOAT, [3]), ("x:0", FLOAT, [4])]
    model = onnx_model([("Add", ["x:0", "x:0"], ["y:0"])], inputs, [("y:0", FLOAT, [4])])
    with opened(model) as session:
        assert session.engine.facts["unused_inputs"] == ["unused"]
        feed = {"unused": np.zeros(3, np.float32), "x:0": np.ones(4, np.float32)}
        assert session.run(feed)["y:0"].tolist() == [2] * 4
        assert session.bind(feed).run()["y:0"].tolist() == [2] * 4


def test_tflite_signature_names_go_by_position(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO knows tensor names only, and a signature may call the tensor b `a`."""
    pytest.importorskip("flatbuffers")
    networks = pytest.importorskip("unirt.testing.tflite_networks")
    original = networks.Graph._signature
    swapped = {"a": "b", "b": "a", "total": "difference", "difference": "total"}

    def signature(graph: Any, inputs: Any, outputs: Any) -> Any:
        made = original(graph, inputs, outputs)
        for item in (*made.inputs, *made.outputs):
            item.name = swapped[item.name]
        return made

    monkeypatch.setattr(networks.Graph, "_signature", signature)
    write = getattr(networks.tflite_network, "__wrapped__", networks.tflite_network)
    with opened(unirt.Model(tflite=write("pair"))) as session:
        feed = {"b": np.full((1, 3), 10, np.float32), "a": np.ones((1, 3), np.float32)}
        outputs = session.run(feed)
    assert outputs["difference"].tolist() == [[11] * 3]
    assert outputs["total"].tolist() == [[9] * 3]


def test_stateful_tflite_is_refused(backend: OpenVINOBackend) -> None:
    networks = pytest.importorskip("unirt.testing.tflite_networks")
    pytest.importorskip("flatbuffers")
    with pytest.raises(unirt.BuildError, match="stateful"):
        backend.compile(unirt.Model(tflite=networks.tflite_network("counter")), "cpu")


# Types


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype", "fits", "not_"),
    [
        (INT64, np.int64, [2**31 - 1, -(2**31), 0], 2**31),
        (13, np.uint64, [2**31 - 1, 1, 0], 2**31),
    ],
)
def test_wide_integers_that_would_wrap_are_refused(
    opened: Opened, dtype: int, numpy_dtype: Any, fits: list[int], not_: int
) -> None:
    model = onnx_model(
        [("Neg" if dtype == INT64 else "Identity", ["x"], ["y"])],
        [("x", dtype, [3])],
        [("y", dtype, [3])],
    )
    with opened(model) as session:
        x = np.array([0, 1, 2], numpy_dtype)
        binding = session.bind({"x": x})
        assert session.engine.facts["computed_as"] == {x.dtype.name: "int32"}
        session.run(np.array(fits, numpy_dtype))
        with pytest.raises(unirt.InputError, match="would change"):
            session.run(np.array([0, 1, not_], numpy_dtype))
        x[0] = not_
        with pytest.raises(unirt.InputError, match="would change"):
            binding.run()
        x[0] = 5
        binding.run()


def test_float64_is_said_to_be_float32(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    with opened(add(DOUBLE)) as session:
        assert session.engine.facts["computed_as"] == {"float64": "float32"}
        y = session.run(np.full(4, 1 / 3))["y"]
        assert y.dtype == np.float64
        assert np.allclose(y, 2 / 3)
    assert "float64" in caplog.text


@pytest.mark.parametrize("count", [0, 1, 4, 5])
@pytest.mark.parametrize("name", ["int4", "uint4", "float4_e2m1fn"])
def test_two_to_a_byte(opened: Opened, name: str, count: int) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    number = {"int4": 22, "uint4": 21, "float4_e2m1fn": 23}[name]
    dtype = np.dtype(getattr(ml_dtypes, name))
    there = onnx_model(
        [("Cast", ["x"], ["y"], {"to": FLOAT})], [("x", number, ["n"])], [("y", FLOAT, ["n"])], 23
    )
    back = onnx_model(
        [("Cast", ["x"], ["y"], {"to": number})], [("x", FLOAT, ["n"])], [("y", number, ["n"])], 23
    )
    values = np.array([1, 6, 0, 2, 4], np.float32)[:count]
    if name != "uint4":
        values[1:2] *= -1
    with opened(there) as session:
        x = values.astype(dtype)
        assert session.run(x)["y"].tolist() == values.tolist()
        assert session.bind({"x": x}).run()["y"].tolist() == values.tolist()
    with opened(back) as session:
        y = session.run(values)["y"]
        assert y.dtype == dtype
        assert y.astype(np.float32).tolist() == values.tolist()
        assert session.bind({"x": values}).run()["y"].astype(np.float32).tolist() == values.tolist()


def test_bfloat16_goes_in_and_out_bit_by_bit(opened: Opened) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model = onnx_model(
        [("Concat", ["x", "x"], ["y"], {"axis": 0})],
        [("x", BFLOAT16, ["n"])], [("y", BFLOAT16, ["m"])],
    )  # fmt: skip
    with opened(model) as session:
        for count in (3, LENT_FROM_BYTES):  # copied, then lent
            x = np.arange(count).astype(np.float32).astype(ml_dtypes.bfloat16)
            y = session.run(x)["y"]
            assert y.dtype == x.dtype
            assert y.tobytes() == x.tobytes() * 2
            assert session.bind({"x": x}).run()["y"].tobytes() == x.tobytes() * 2


def test_strings(opened: Opened) -> None:
    model = onnx_model(
        [("Gather", ["x", "i"], ["y"])],
        [("x", STRING, ["n"]), ("i", INT64, ["m"])], [("y", STRING, ["m"])],
    )  # fmt: skip
    with opened(model) as session:
        for words in (["hé", "", "日本" * 30], ["a", "b"]):
            x = np.array(words, object)
            i = np.arange(len(words))[::-1].copy()
            for _ in range(3):
                y = session.run({"x": x, "i": i})["y"]
                assert y.dtype == object
                assert y.tolist() == words[::-1]
            assert session.bind({"x": x, "i": i}).run()["y"].tolist() == words[::-1]


def test_strings_passed_through_are_refused(backend: OpenVINOBackend) -> None:
    """OpenVINO would free them twice."""
    for nodes, output in (([("Identity", ["x"], ["y"])], "y"), ([], "x")):
        model = onnx_model(nodes, [("x", STRING, [2])], [(output, STRING, [2])])
        with pytest.raises(unirt.BuildError, match="crashes"):
            backend.compile(model, "cpu")


# Memory

LARGE = LENT_FROM_BYTES // 4 + 3


@pytest.mark.parametrize("shape", [[LARGE], ["n"]], ids=["static", "dynamic"])
def test_large_arrays_are_lent_and_given_back(opened: Opened, shape: list[Any]) -> None:
    with opened(add(shape=shape), requests=1) as session:
        rng = np.random.default_rng(0)
        kept = []
        for step in range(6):
            size = LARGE if shape == [LARGE] else (LARGE + step, 3)[step % 2]
            x = rng.standard_normal(2 * size).astype(np.float32)
            x = x[::2] if step == 2 else x[:size]
            if step == 3:
                x.flags.writeable = False
            before = x.copy()
            kept.append((before, session.run(x)["y"]))
            assert np.array_equal(x, before)
            if x.flags.writeable:
                x[:] = np.nan  # the caller's again: no later call may see it
        for before, y in kept:
            assert np.array_equal(y, before + before)
            assert y.flags.owndata
            assert y.flags.writeable


def test_large_and_small_outputs_together(opened: Opened) -> None:
    nodes = [("Add", ["x", "x"], ["big"]), ("ReduceMax", ["x"], ["small"], {"keepdims": 0})]
    outputs: list[Value] = [("small", FLOAT, []), ("big", FLOAT, [LARGE])]
    with opened(onnx_model(nodes, [("x", FLOAT, [LARGE])], outputs), requests=1) as session:
        results = [session.run(np.full(LARGE, value, np.float32)) for value in (1, 2, 3)]
        for value, result in zip((1, 2, 3), results, strict=True):
            assert result["small"] == value
            assert (result["big"] == 2 * value).all()


def test_bound_buffers_outlive_the_caller_s_references(opened: Opened) -> None:
    with opened(add(shape=[LARGE])) as session:
        binding = session.bind({"x": np.ones(LARGE, np.float32)})
        step = binding._step
        del binding
        for _ in range(3):
            step()


def test_bind_reads_a_read_only_buffer_anew(opened: Opened) -> None:
    base = np.ones(4, np.float32)
    x = base.view()
    x.flags.writeable = False
    with opened(add()) as session:
        binding = session.bind({"x": x})
        assert binding.run()["y"].tolist() == [2] * 4
        base[:] = 5
        assert binding.run()["y"].tolist() == [10] * 4


def test_bound_output_that_changes_its_shape_is_an_error(opened: Opened) -> None:
    model = onnx_model([("NonZero", ["x"], ["y"])], [("x", FLOAT, [6])], [("y", INT64, [1, "n"])])
    x = np.array([1, 0, 1, 0, 0, 0], np.float32)
    with opened(model) as session:
        binding = session.bind({"x": x})
        assert binding.run()["y"].tolist() == [[0, 2]]
        x[:] = 1
        with pytest.raises(unirt.BackendError, match="shape"):
            binding.run()
        x[:] = [0, 1, 0, 1, 0, 0]
        assert binding.run()["y"].tolist() == [[1, 3]]


def test_a_failed_run_leaves_the_request_usable(opened: Opened) -> None:
    inputs: list[Value] = [("a", FLOAT, ["n", "k"]), ("b", FLOAT, ["l", "m"])]
    model = onnx_model([("MatMul", ["a", "b"], ["y"])], inputs, [("y", FLOAT, ["n", "m"])])

    def feed(*shapes: tuple[int, int]) -> Mapping[str, Any]:
        return {n: np.ones(s, np.float32) for n, s in zip("ab", shapes, strict=True)}

    with opened(model, requests=1) as session:
        for _ in range(3):
            assert session.run(feed((2, 3), (3, 4)))["y"].shape == (2, 4)
            with pytest.raises(unirt.BackendError, match="incompatible"):
                session.run(feed((2, 3), (4, 4)))


def test_weights_do_not_follow_their_file(backend: OpenVINOBackend, tmp_path: Path) -> None:
    """OpenVINO maps external weights unless told otherwise."""
    onnx = pytest.importorskip("onnx")
    weights = np.ones((1000, 64), np.float32)
    model = onnx.load_model_from_string(
        onnx_model([("Gather", ["w", "i"], ["y"])], [("i", INT64, [1])], [("y", FLOAT, [1, 64])])
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    with backend.compile(path, "cpu").session() as session:
        with (tmp_path / "w.bin").open("r+b") as file:
            file.write((weights * 5).tobytes())
        assert (session.run(np.zeros(1, np.int64))["y"] == 1).all()


def test_threads_share_a_session(opened: Opened) -> None:
    """OpenVINO's own infer request raises when it is busy."""
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            x = rng.standard_normal(int(rng.integers(0, 7))).astype(np.float32)
            if not np.array_equal(session.run(x)["y"], x + x):
                wrong.append(x)

    with opened(add(shape=["n"])) as session:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_damaged_cache_is_compiled_anew_and_answers_right(tmp_path: Path) -> None:
    """OpenVINO itself loads most blobs with a flipped byte, and some then answer wrongly."""
    case = NETWORKS["heavy"]
    inputs = case.sample(3, 0)
    options = {"cache_dir": tmp_path}
    with unirt.load(case.model(["onnx"]), "openvino@cpu", options=options) as session:
        case.check(inputs, session.run(inputs))
    with unirt.load(case.model(["onnx"]), "openvino@cpu", options=options) as session:
        assert session.engine.facts["loaded_from_cache"] is True
    (blob,) = tmp_path.glob("*/*.blob")
    for place in np.random.default_rng(0).integers(0, blob.stat().st_size, 12):
        damaged = bytearray(blob.read_bytes())
        damaged[place] ^= 0xFF
        blob.write_bytes(damaged)
        with unirt.load(case.model(["onnx"]), "openvino@cpu", options=options) as session:
            assert session.engine.facts["loaded_from_cache"] is False
            case.check(inputs, session.run(inputs))


# Layers


def residual(opset: int = 17) -> Any:
    """Conv, Relu, Conv, residual Add, and Q/DQ around a third convolution."""
    onnx = pytest.importorskip("onnx", reason="the onnx package writes and reads these graphs")
    node, pads = onnx.helper.make_node, [1, 1, 1, 1]
    nodes = [
        node("Conv", ["x", "w1"], ["c1"], "conv1", pads=pads),
        node("Relu", ["c1"], ["r1"], "relu1"),
        node("Conv", ["r1", "w2"], ["c2"], "conv2", pads=pads),
        node("Add", ["c2", "r1"], ["a"], "add"),
        node("QuantizeLinear", ["a", "s", "z"], ["a_q"], "a_Q"),
        node("DequantizeLinear", ["a_q", "s", "z"], ["a_dq"], "a_DQ"),
        node("DequantizeLinear", ["w3", "s", "zw"], ["w3_dq"], "w3_DQ"),
        node("Conv", ["a_dq", "w3_dq"], ["y"], "conv3", pads=pads),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((32, 3, 3, 3)).astype(np.float32),
        "w2": rng.standard_normal((32, 32, 3, 3)).astype(np.float32),
        "w3": rng.integers(-60, 60, (32, 32, 3, 3)).astype(np.int8),
        "s": np.float32(0.1),
        "z": np.uint8(0),
        "zw": np.int8(0),
    }
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 3, 64, 64])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 32, 64, 64])],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def layers_by_node(report: unirt.EngineReport) -> dict[str, unirt.Layer]:
    return {node: layer for layer in report.layers for node in layer.nodes}


def test_layers_name_the_nodes_that_are_fused_into_them(opened: Opened) -> None:
    report = opened(residual()).engine.inspect()
    found = layers_by_node(report)
    assert report.source == "runtime model"
    assert found["conv1"] is found["relu1"]
    assert found["conv1"].kind == "Convolution"
    assert report.precision(found["conv1"]) == "float32"
    assert report.precision(found["conv3"]) == "uint8"
    assert found["conv3"].outputs[0].shape == (1, 32, 64, 64)
    assert set(report.missing) <= {"a_DQ", "w3_DQ"}
    assert not any(layer.kind in ("Const", "Input", "Output") for layer in report.layers)
    assert all(set(layer.nodes) <= set(report.graph) for layer in report.layers)


def test_reorders_are_layers_without_nodes(opened: Opened) -> None:
    report = opened(residual()).engine.inspect()
    reorders = [one for one in report.reformats if one.layer.kind == "Reorder"]
    assert reorders
    assert all(one.inserted for one in reorders)
    assert ("x", "conv1") in [(one.before[-1], one.after[0]) for one in reorders]


def test_a_convolution_keeps_its_node_where_its_scale_took_the_name(opened: Opened) -> None:
    """A BatchNormalization becomes weights; the layer is named after nothing in the file."""
    onnx = pytest.importorskip("onnx", reason="the onnx package writes and reads these graphs")
    graph = residual()
    names = [f"bn_{i}" for i in range(4)]
    extra = onnx.helper.make_node("BatchNormalization", ["c1", *names], ["n1"], "norm")
    graph.graph.node.insert(1, extra)
    graph.graph.node[2].input[0] = "n1"
    for name in names:
        ones = onnx.numpy_helper.from_array(np.full(32, 2, np.float32), name)
        graph.graph.initializer.append(ones)
    found = layers_by_node(opened(graph).engine.inspect())
    assert found["conv1"].nodes == ("conv1", "norm", "relu1")


def test_nodes_without_names_get_the_one_of_their_output(opened: Opened) -> None:
    graph = residual()
    for node in graph.graph.node:
        node.name = ""
    found = layers_by_node(opened(graph).engine.inspect())
    assert found["node_of_c1"] is found["node_of_r1"]
    assert "node_of_y" in found


def test_profile_times_layers_and_leaves_the_session_as_it_was(opened: Opened) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    with opened(residual(), threads=1) as session:
        before = session.run(x)["y"]
        report = session.profile(x)
        np.testing.assert_array_equal(session.run(x)["y"], before)
    found = layers_by_node(report)
    assert report.unmatched == ()
    assert (found["conv2"].seconds or 0) > (found["conv1"].seconds or 0) > 0
    assert (report.seconds or 0) < 1


def test_a_model_with_a_cache_is_profiled_too(opened: Opened, tmp_path: Path) -> None:
    x = np.zeros((1, 3, 64, 64), np.float32)
    for _ in range(2):
        with opened(residual(), cache_dir=tmp_path) as session:
            assert layers_by_node(session.profile(x))["conv2"].seconds
            assert "conv2" in layers_by_node(session.engine.inspect())


def test_without_the_onnx_package_names_are_openvino_s(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = residual().SerializeToString()
    monkeypatch.setitem(sys.modules, "onnx", None)
    report = opened(model).engine.inspect()
    assert "conv1" in layers_by_node(report)
    assert report.graph["conv1"] != "Conv"
    assert "the onnx package is not installed" in report.notes[0]


def test_layers_of_a_tflite_model_have_openvino_s_names(opened: Opened) -> None:
    report = opened(NETWORKS["heavy"].model(("tflite",))).engine.inspect()
    assert report.layers
    assert all(set(layer.nodes) <= set(report.graph) for layer in report.layers)
    assert any("FullyConnected" in layer.kind for layer in report.layers)


class AveragingRequest:
    """Counts as OpenVINO does: the mean over all runs in whole microseconds."""

    def __init__(self, first: float, rest: float) -> None:
        self.times, self.first, self.rest = list[float](), first, rest

    def run(self) -> None:
        self.times.append(self.rest if self.times else self.first)

    def counters(self) -> list[Any]:
        mean = timedelta(microseconds=int(sum(self.times) / len(self.times)))
        told = [("conv", mean, "Status.EXECUTED"), ("skipped", timedelta(), "Status.NOT_RUN")]
        return [
            SimpleNamespace(node_name=name, real_time=time, status=status)
            for name, time, status in told
        ]


def test_a_slow_first_run_is_not_in_the_time_of_a_layer() -> None:
    request = AveragingRequest(5_000_000, 200)
    times = measure(request.run, request.counters)
    assert set(times) == {"conv"}
    assert times["conv"] == pytest.approx(200e-6, abs=2e-6)


def test_an_interrupt_while_an_input_changes_its_shape_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unirt_openvino import _session

    see, case, interrupts = _session._Slot._see, NETWORKS["affine"], [KeyboardInterrupt()]

    def interrupted(slot: Any, own: Any) -> Any:
        if interrupts:
            raise interrupts.pop()
        return see(slot, own)

    with unirt.load(case.model(["onnx"]), "openvino") as session:
        case.check(case.sample(2, 0), session.run(case.sample(2, 0)))
        monkeypatch.setattr(_session._Slot, "_see", interrupted)
        inputs = case.sample(3, 1)
        with pytest.raises(KeyboardInterrupt):
            session.run(inputs)
        case.check(inputs, session.run(inputs))
