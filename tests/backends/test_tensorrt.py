"""TensorRT: the conformance suite, and what is its own. Without a GPU, what is built ahead of time;
with one (UNIRT_REQUIRE=tensorrt makes its absence a failure), everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import unirt
from unirt import Backend, BackendUnavailable, InputError, ShapeProfile
from unirt.cli import app
from unirt.testing import NETWORKS, BackendConformance

pytest.importorskip("unirt_tensorrt._library").load.cache_clear()
try:
    from unirt_tensorrt import _library

    _library.load()
except ModuleNotFoundError as error:
    pytest.skip(f"TensorRT is not installed: {error}", allow_module_level=True)

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


def tensorrt() -> Backend:
    backend = next(p.backend for p in unirt.backends() if p.name == "tensorrt")
    assert backend is not None
    return backend


class TestTensorRT(BackendConformance):
    options = {"default_range": ("0:8:1024", "1:8:64")}

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return tensorrt()


@pytest.fixture
def gpu() -> Backend:
    """The backend where it can run; otherwise a skip with the reason, or a failure if required."""
    backend = tensorrt()
    found = backend.probe()
    if not found.available:
        if "tensorrt" in os.environ.get("UNIRT_REQUIRE", "").split(","):
            pytest.fail(f"required, but unavailable: {found.reason}")
        pytest.skip(f"tensorrt: {found.reason}")
    return backend


def _ahead(**keywords: Any) -> unirt.Engine:
    return unirt.build(DIGITS / "digits.onnx", "tensorrt@aot", **keywords)


# Ahead of time, without a GPU


def test_an_engine_built_ahead_of_time_shows_its_layers_and_opens_no_session() -> None:
    with _ahead() as engine:
        report = engine.inspect()
        assert any(len(layer.nodes) > 1 for layer in report.layers)
        assert "→" in report.summary()
        with pytest.raises(BackendUnavailable, match="ahead of time"):
            engine.session()


def test_a_saved_engine_is_a_plan_with_its_description_beside_it(tmp_path: Path) -> None:
    with _ahead() as engine:
        path = engine.save(tmp_path / "digits.plan")
        told = tensorrt().inspect_file(path)
        assert told == engine.inspect()
        assert told.facts["version"] == engine.facts["version"]
        assert told.facts["profiles"] == engine.facts["profiles"]
        assert path.read_bytes() == engine.plan  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(unirt.ModelError, match="bytes"):
        tensorrt().inspect_file(path)


def test_a_plan_given_as_a_model_is_called_what_it_is(tmp_path: Path) -> None:
    with _ahead() as engine:
        path = engine.save(tmp_path / "digits.plan")
    shown = CliRunner().invoke(app, ["run", str(path), "--json"])
    assert shown.exit_code == 3
    assert "is a compiled engine" in json.loads(shown.output)["error"]["what"]


def test_a_cache_answers_for_the_same_model_options_and_shapes_only(tmp_path: Path) -> None:
    def cached(**keywords: Any) -> bool:
        options = {"cache": tmp_path, **keywords.pop("options", {})}
        with _ahead(options=options, **keywords) as engine:
            return bool(engine.facts["cached"])

    assert not cached()
    assert cached()
    assert cached(options={"lanes": 2}), "how it runs is no part of the plan"
    assert not cached(options={"verbosity": "names"})
    assert not cached(hot_shapes=[{"image": (1, 1, 8, 8)}])
    with unirt.build(DIGITS / "digits.onnx", "tensorrt@aot:fp16", options={"cache": tmp_path}) as e:
        assert not e.facts["cached"], "the cast graph is another model"


def test_a_damaged_plan_in_the_cache_is_built_again(tmp_path: Path) -> None:
    with _ahead(options={"cache": tmp_path}) as engine:
        good = engine.plan  # type: ignore[attr-defined]
    (plan,) = tmp_path.glob("*.plan")
    for damage in (lambda b: b[: len(b) // 2], lambda b: b[:99] + b"\xff" + b[100:], lambda b: b""):
        plan.write_bytes(damage(good))
        with _ahead(options={"cache": tmp_path}) as engine:
            assert not engine.facts["cached"]
            assert engine.plan == good  # type: ignore[attr-defined]
        assert plan.read_bytes() == good
    about = plan.with_name(f"{plan.name}.json")
    altered = json.dumps({**json.loads(about.read_text()), "profiles": []})
    for text in ("", "{", "[]", "[" * 100_000, json.dumps({"format": 1}), altered):
        about.write_text(text)
        with _ahead(options={"cache": tmp_path}) as engine:
            assert not engine.facts["cached"]


def test_a_model_that_changes_while_it_is_built_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx package writes the model")
    from onnx import helper, numpy_helper

    weights = np.ones((64, 64), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 64])],
        [helper.make_tensor_value_info("y", 1, [1, 64])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path, beside, cache = tmp_path / "m.onnx", tmp_path / "w.bin", tmp_path / "cache"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    changed: list[object] = []

    def change(step: object) -> None:
        if not changed:
            changed.append(step)
            beside.write_bytes((2 * weights).tobytes())

    with pytest.raises(unirt.ModelError, match="changed"):
        unirt.build(path, "tensorrt@aot", options={"cache": cache}, progress=change)
    assert changed
    assert not list(cache.glob("*.plan"))


FORKS = """
import os, sys, unirt
children = []
def fork_once(step):
    if not children:
        children.append(os.fork())
        if not children[0]:
            try:
                unirt.build(sys.argv[1], "tensorrt@aot")
            except unirt.BackendUnavailable as error:
                os._exit(7 if "spawn" in error.remedy else 1)
            os._exit(2)
unirt.build(sys.argv[1], "tensorrt@aot", progress=fork_once).close()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_forked_during_a_build_says_so_instead_of_hanging() -> None:
    command = [sys.executable, "-c", FORKS, str(DIGITS / "digits.onnx")]
    assert subprocess.run(command, timeout=120).returncode == 7


def test_an_input_without_a_rank_is_refused() -> None:
    pytest.importorskip("onnx", reason="the onnx package writes the model")
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, None)],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(unirt.BuildError, match="no rank"):
        unirt.build(model, "tensorrt@aot")


def test_a_machine_without_a_gpu_says_so_and_what_it_can_do() -> None:
    found = tensorrt().probe()
    if found.available:
        pytest.skip("there is a GPU here")
    assert "GPU" in found.reason
    assert found.version
    selection = unirt.select(DIGITS / "digits.onnx")
    assert "tensorrt" in selection.excluded
    assert all("aot" not in str(candidate) for candidate in selection.candidates)
    assert all(device.kind != "aot" for device in unirt.devices())
    with pytest.raises(BackendUnavailable, match="GPU"):
        unirt.load(DIGITS / "digits.onnx", "tensorrt")


def test_hot_shapes_are_added_to_what_the_engine_takes_anyway() -> None:
    with _ahead(hot_shapes=[{"image": (1, 1, 8, 8)}]) as engine:
        profiles = engine.facts["profiles"]
        assert isinstance(profiles, list)
        assert len(profiles) == 2
        assert any("512" in text for text in profiles)


def test_a_cast_candidate_builds_in_that_precision() -> None:
    for precision, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        with unirt.build(DIGITS / "digits.onnx", f"tensorrt@aot:{precision}") as engine:
            assert engine.candidate.precision == precision
            assert engine.inspect().precisions.get(dtype, 0) > 0


# On a GPU


def _digits() -> tuple[Any, Any]:
    with np.load(DIGITS / "test.npz") as data:
        return data["image"], data["labels"]


@pytest.mark.parametrize("precision", ["", ":fp16", ":bf16"])
def test_digits_are_read_right_in_each_precision(gpu: Backend, precision: str) -> None:
    images, labels = _digits()
    with unirt.load(
        DIGITS / "digits.onnx", f"tensorrt{precision}", samples=[{"image": images}]
    ) as session:
        (scores,) = session.run({"image": images}).values()
        assert np.isfinite(scores).all()
        assert (scores.argmax(1) == labels).mean() >= 0.97


PROFILES = [
    ShapeProfile({"x": ((1, 64), (4, 64), (16, 64))}),
    ShapeProfile({"x": ((1, 64), (64, 64), (256, 64))}),
]


@pytest.fixture
def heavy(gpu: Backend) -> Iterator[unirt.Engine]:
    with unirt.build(
        NETWORKS["heavy"].model(["onnx"]),
        "tensorrt",
        profiles=PROFILES,
        hot_shapes=[{"x": (1, 64)}],
    ) as engine:
        yield engine


def _close(got: Any, inputs: dict[str, Any]) -> None:
    expected = NETWORKS["heavy"].answer(inputs)["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_tightest_profile_that_fits_is_taken(heavy: Any) -> None:
    chosen = [heavy._runtime.choose({"x": (n, 64)}, {}) for n in (1, 2, 16, 17, 256)]
    ranges = [heavy._runtime._ranges[index].shapes["x"] for index in chosen]
    assert [(low[0], high[0]) for low, _, high in ranges] == [
        (1, 1),
        (1, 16),
        (1, 16),
        (1, 256),
        (1, 256),
    ]


def test_shapes_may_change_with_every_call(heavy: Any) -> None:
    with heavy.session() as session:
        for n in (1, 5, 256, 1, 17, 16, 2, 1, 200):
            inputs = NETWORKS["heavy"].sample(n, n)
            _close(session.run(inputs)["y"], inputs)


def test_a_shape_outside_every_profile_names_the_ranges_and_loses_nothing(heavy: Any) -> None:
    good = NETWORKS["heavy"].sample(3, 0)
    with heavy.session() as session:
        with pytest.raises(InputError, match=r"\[257, 64\]") as caught:
            session.run(NETWORKS["heavy"].sample(257, 0))
        for size in ("16", "256"):
            assert size in str(caught.value)
        _close(session.run(good)["y"], good)


@pytest.mark.parametrize("mode", ["off", "engine", "capture", "auto"])
@pytest.mark.parametrize("share", [False, True])
def test_cuda_graphs_and_shared_memory_change_no_answer(
    gpu: Backend, mode: str, share: bool
) -> None:
    with (
        unirt.build(
            NETWORKS["heavy"].model(["onnx"]),
            "tensorrt",
            profiles=PROFILES,
            options={"cuda_graphs": mode, "share_memory": share, "lanes": 3},
        ) as engine,
        engine.session() as session,
    ):
        for k in range(40):
            inputs = NETWORKS["heavy"].sample((3, 7, 100)[k % 3], k)
            _close(session.run(inputs)["y"], inputs)
        feeds = [NETWORKS["heavy"].sample(1 + k % 9, k) for k in range(60)]
        for inputs, outputs in zip(feeds, session.map(feeds), strict=True):
            _close(outputs["y"], inputs)


def test_sixteen_threads_with_changing_shapes_get_their_own_answers(heavy: Any) -> None:
    with heavy.session() as session:

        def work(thread: int) -> None:
            for call in range(60):
                inputs = NETWORKS["heavy"].sample(
                    1 + (7 * thread + call) % 40, 1000 * thread + call
                )
                _close(session.run(inputs)["y"], inputs)

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(work, range(16)))


def test_layers_are_timed_and_join_the_inspection(heavy: Any) -> None:
    with heavy.session() as session:
        report = session.profile(NETWORKS["heavy"].sample(64, 0))
    assert report.source == "engine inspector"
    timed = [layer for layer in report.layers if layer.seconds is not None]
    assert timed
    assert all(0 < layer.seconds < 0.1 for layer in timed if layer.seconds is not None)


def test_a_plan_built_without_a_gpu_is_found_by_a_machine_with_one(
    gpu: Backend, tmp_path: Path
) -> None:
    with _ahead(options={"cache": tmp_path}):
        pass
    model, options = DIGITS / "digits.onnx", {"cache": tmp_path}
    with np.load(DIGITS / "test.npz") as data:
        images, labels = data["image"], data["labels"]
    with unirt.build(model, "tensorrt", options=options) as engine, engine.session() as session:
        assert engine.facts["cached"]
        scores = next(iter(session.run(images).values()))
    assert np.mean(scores.argmax(axis=1) == labels) > 0.9


def test_layers_are_told_while_calls_run(heavy: Any) -> None:
    inputs = NETWORKS["heavy"].sample(8, 0)
    with heavy.session() as session:
        calls = [session.submit(inputs) for _ in range(200)]
        for _ in range(5):
            assert heavy.inspect().layers
        for call in calls:
            _close(call.result()["y"], inputs)


@pytest.fixture
def second_gpu(gpu: Backend) -> str:
    if len(gpu.probe().devices) < 2:
        pytest.skip("there is one GPU here")
    return "tensorrt@cuda:1"


def test_calls_on_a_second_gpu_leave_the_first_one_current(second_gpu: str) -> None:
    from cuda.bindings import runtime

    after: dict[str, int] = {}

    def note(what: str) -> None:
        after[what] = int(runtime.cudaGetDevice()[1])

    runtime.cudaSetDevice(0)
    inputs = NETWORKS["heavy"].sample(8, 0)
    model = NETWORKS["heavy"].model(["onnx"])
    with unirt.build(model, second_gpu, profiles=PROFILES) as engine:
        note("build")
        with engine.session() as session:
            note("session")
            _close(session.run(inputs)["y"], inputs)
            note("run")
            y = session.run(inputs, device_outputs=True)["y"]
            assert y.device_id == 1
            _close(y.numpy(), inputs)
            del y
            note("device_outputs")
            found = np.zeros((8, 64), np.float32)
            with session.bind(inputs, {"y": found}) as binding:
                binding.run()
                _close(found, inputs)
                note("bind")
            note("unbind")
            assert session.profile(inputs).seconds
            note("profile")
            assert engine.inspect().layers
            note("inspect")
        note("session closed")
    note("engine closed")
    assert set(after.values()) == {0}, after


def test_an_array_of_another_gpu_is_refused_however_it_comes(second_gpu: str, torch: Any) -> None:
    inputs = NETWORKS["heavy"].sample(8, 0)
    near = torch.from_numpy(inputs["x"]).to("cuda:1")
    far = near.to("cuda:0")
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    model = NETWORKS["heavy"].model(["onnx"])
    with unirt.build(model, second_gpu, profiles=PROFILES) as engine, engine.session() as session:
        for array in (far, OnlyCuda(far)):
            with pytest.raises(InputError, match="cuda:0"):
                session.run({"x": array})
        for array in (near, OnlyCuda(near)):
            _close(session.run({"x": array})["y"], inputs)


def test_several_builds_are_compared(gpu: Backend) -> None:
    with unirt.build(
        NETWORKS["heavy"].model(["onnx"]), "tensorrt", profiles=PROFILES, options={"builds": 3}
    ) as engine:
        told = engine.facts["builds"]
        assert isinstance(told, dict)
        assert told["built"] == 3
        assert told["spread"] >= 1


def test_compiled_kernels_are_kept_for_the_next_process(gpu: Backend, tmp_path: Path) -> None:
    for _ in range(2):
        with (
            unirt.build(
                NETWORKS["heavy"].model(["onnx"]),
                "tensorrt",
                profiles=PROFILES,
                options={"cache": tmp_path},
            ) as engine,
            engine.session() as session,
        ):
            inputs = NETWORKS["heavy"].sample(4, 0)
            _close(session.run(inputs)["y"], inputs)
    assert engine.facts["cached"]
    (kept,) = tmp_path.glob("*.cache")
    assert kept.stat().st_size > 1000
    kept.write_bytes(kept.read_bytes()[:-10])
    with (
        unirt.build(
            NETWORKS["heavy"].model(["onnx"]),
            "tensorrt",
            profiles=PROFILES,
            options={"cache": tmp_path},
        ) as engine,
        engine.session() as session,
    ):
        _close(session.run(inputs)["y"], inputs)


def test_closing_frees_device_memory(gpu: Backend) -> None:
    from unirt_tensorrt._cuda import free_memory

    def cycle() -> None:
        with (
            unirt.build(NETWORKS["heavy"].model(["onnx"]), "tensorrt", profiles=PROFILES) as engine,
            engine.session() as session,
        ):
            session.run(NETWORKS["heavy"].sample(200, 0))

    for _ in range(3):
        cycle()
    before, _ = free_memory()
    for _ in range(20):
        cycle()
    after, _ = free_memory()
    assert before - after < 20 << 20


def test_float32_products_keep_their_digits(gpu: Backend) -> None:
    inputs = NETWORKS["heavy"].sample(64, 0)
    expected = NETWORKS["heavy"].answer({"x": inputs["x"].astype(np.float64)})["y"]
    with unirt.load(NETWORKS["heavy"].model(["onnx"]), "tensorrt", samples=[inputs]) as session:
        got = session.run(inputs)["y"]
    assert np.linalg.norm(got - expected) < 2e-5 * np.linalg.norm(expected)


# Arrays on the device


@pytest.fixture
def torch(gpu: Backend) -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


def test_torch_and_cupy_arrays_are_read_where_they_lie(heavy: Any, torch: Any) -> None:
    inputs = NETWORKS["heavy"].sample(8, 0)
    x = torch.from_numpy(inputs["x"]).cuda()
    with heavy.session() as session:
        _close(session.run({"x": x})["y"], inputs)
        outputs = session.run({"x": x}, device_outputs=True)["y"]
        assert isinstance(outputs, unirt.DeviceArray)
        _close(torch.from_dlpack(outputs).cpu().numpy(), inputs)
        _close(outputs.numpy(), inputs)
        _close(torch.as_tensor(outputs, device="cuda").cpu().numpy(), inputs)
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        _close(session.run({"x": cupy.asarray(inputs["x"])})["y"], inputs)
        _close(cupy.asnumpy(cupy.from_dlpack(outputs)), inputs)


class OnlyCuda:
    """An array of some other library: nothing but CUDA's array interface."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    @property
    def __cuda_array_interface__(self) -> Any:
        return self._tensor.__cuda_array_interface__


def test_an_array_with_the_cuda_array_interface_alone_is_taken(heavy: Any, torch: Any) -> None:
    inputs = NETWORKS["heavy"].sample(8, 0)
    x = torch.from_numpy(inputs["x"]).cuda()
    torch.cuda.synchronize()
    with heavy.session() as session:
        _close(session.run({"x": OnlyCuda(x)})["y"], inputs)


def test_a_run_waits_for_the_stream_that_makes_its_input(heavy: Any, torch: Any) -> None:
    inputs = NETWORKS["heavy"].sample(200, 0)
    source = torch.from_numpy(inputs["x"]).cuda()
    busy = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    with heavy.session() as session:
        session.run(inputs)
        for _ in range(5):
            x = torch.zeros_like(source)
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                for _ in range(30):
                    busy = (busy @ busy).clamp(-1, 1)
                x.copy_(source)
                got = session.run({"x": x}, device_outputs=True)["y"]
                result = torch.from_dlpack(got) * 1
            torch.cuda.synchronize()
            _close(result.cpu().numpy(), inputs)


def test_outputs_on_the_device_outlive_their_session(heavy: Any, torch: Any) -> None:
    inputs = NETWORKS["heavy"].sample(8, 0)
    session = heavy.session()
    kept = [session.run(inputs, device_outputs=True)["y"] for _ in range(3)]
    viewed = torch.from_dlpack(kept.pop())
    session.close()
    heavy.close()
    for array in kept:
        _close(array.numpy(), inputs)
    _close(viewed.cpu().numpy(), inputs)


def test_device_buffers_are_bound_in_place(heavy: Any, torch: Any) -> None:
    first, second = NETWORKS["heavy"].sample(8, 0), NETWORKS["heavy"].sample(8, 1)
    x = torch.from_numpy(first["x"]).cuda()
    y = torch.zeros(8, 64, device="cuda")
    with heavy.session() as session, session.bind({"x": x}, {"y": y}) as binding:
        binding.run()
        _close(y.cpu().numpy(), first)
        x.copy_(torch.from_numpy(second["x"]))
        binding.run()
        _close(y.cpu().numpy(), second)


def test_what_lies_off_the_boundary_is_copied_not_misread(heavy: Any, torch: Any) -> None:
    inputs = NETWORKS["heavy"].sample(4, 0)
    flat = torch.zeros(4 * 64 + 1, device="cuda")
    x = flat[1:].view(4, 64)
    x.copy_(torch.from_numpy(inputs["x"]))
    with heavy.session() as session:
        _close(session.run({"x": x})["y"], inputs)


# Outputs whose size the network decides: RTX cannot build such networks, so its ordinary outputs go
# the same way here.


def test_outputs_of_open_size_are_allocated_as_they_come(heavy: Any) -> None:
    heavy._runtime.open_outputs = frozenset({"y"})
    with heavy.session() as session:
        for n in (1, 5, 200, 1):
            inputs = NETWORKS["heavy"].sample(n, n)
            _close(session.run(inputs)["y"], inputs)
