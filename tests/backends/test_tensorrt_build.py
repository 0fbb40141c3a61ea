"""Building with TensorRT: what becomes a plan, what is refused and how, and how builds stop.

Runs the real builder of TensorRT for RTX, which needs no GPU.
"""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import unirt
from unirt import (
    BuildCancelled,
    BuildError,
    BuildRequest,
    BuildStep,
    Device,
    OptionError,
    ProfileError,
    ShapeProfile,
)

pytest.importorskip("onnx", reason="onnx, which writes the models of these tests, is missing")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx, whose builder is tested, is missing")

from unirt_tensorrt import _build
from unirt_tensorrt._build import Plan, build
from unirt_tensorrt._layers import from_builder_log
from unirt_tensorrt._library import Library, load
from unirt_tensorrt._options import TensorRTOptions, check

GRAPHS = Path(__file__).with_name("tensorrt_graphs.py")
g: Any = SimpleNamespace(**runpy.run_path(str(GRAPHS)))
text = g.text

GPU = Device("cuda", 0, "a GPU", facts={"compute_capability": "8.9"})
DATA = ((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))


@pytest.fixture(scope="module")
def library() -> Library:
    found = load()
    if not found.is_rtx:
        pytest.skip(f"{found.flavour} {found.version} is in use, whose builder needs a GPU")
    return found


Make = Callable[..., Plan]


@pytest.fixture
def make(library: Library) -> Make:
    def make(
        content: bytes,
        *profiles: ShapeProfile,
        progress: unirt.Progress | None = None,
        file: unirt.ModelFile | None = None,
        **options: object,
    ) -> Plan:
        file = file or model_file(content)
        request = BuildRequest(profiles, progress)
        parsed = TensorRTOptions.parse(options)
        return build(library, file, content, parsed, request, ahead=True)

    return make


def model_file(content: bytes) -> unirt.ModelFile:
    """The file as core reads it; for what core refuses to read, one that is as good as any."""
    try:
        file = unirt.Model(content).file(("onnx",))
    except unirt.ModelError:
        file = unirt.Model(text("(float[4] x) => (float[4] y)", "y = Relu(x)")).file(("onnx",))
    assert file is not None
    return file


def listed(plan: Plan) -> str:
    """The builder's list of the layers."""
    (layers,) = (text for text in plan.log if text.startswith("Layers:"))
    return layers


# What builds


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("network", ["cnn", "transformer"])
def test_builds_networks_in_every_float_type(make: Make, network: str, dtype: str) -> None:
    plan = make(getattr(g, network)(dtype))
    kernel = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}[dtype]
    assert len(plan.blob) > 100_000
    layers = listed(plan)
    assert f"Datatype: {kernel}" in layers
    assert plan.warnings == ()
    assert plan.seconds > 0
    assert plan.timing_cache == b""


def test_computes_quantized_products_in_int8(make: Make) -> None:
    layers = listed(make(g.int8_matmul()))
    assert "Datatype: Int8" in layers


def test_the_plan_shows_which_nodes_a_layer_holds(make: Make) -> None:
    layers = listed(make(g.cnn()))
    assert "[ONNX Layer: conv1]" in layers
    assert "[ONNX Layer: relu1]" in layers


@pytest.mark.parametrize("verbosity", ["detailed", "names"])
def test_at_any_verbosity_the_log_makes_a_report(make: Make, verbosity: str) -> None:
    graph = {"conv1": "Conv", "relu1": "Relu"}
    report = from_builder_log(make(g.cnn(), verbosity=verbosity).log, graph)
    assert report is not None
    assert report.missing == ()
    assert [layer.kind == "region" for layer in report.layers] == (
        [True] if verbosity == "names" else [False] * len(report.layers)
    )
    assert any("conv1" in layer.nodes and len(layer.nodes) > 1 for layer in report.layers)


def test_a_static_model_has_no_profile(make: Make) -> None:
    plan = make(g.cnn(batch="4"), ShapeProfile({"x": (4, 3, 16, 16)}))
    assert plan.profiles == ()
    assert not plan.derived


def test_profiles_are_built_in_order_and_once(make: Make) -> None:
    wide = ShapeProfile({"x": ((1, 3, 16, 16), (8, 3, 16, 16), (64, 3, 16, 16))})
    hot = ShapeProfile({"x": (1, 3, 16, 16)})
    plan = make(g.cnn(), wide, hot, ShapeProfile({"x": ((1, 3, 16, 16),) * 3}), wide)
    assert plan.profiles == (wide, hot)
    assert not plan.derived
    assert len(plan.blob) > 1.5 * len(make(g.cnn(), wide).blob)


def test_equal_builds_give_equal_engines(make: Make) -> None:
    assert make(g.cnn()).blob == make(g.cnn()).blob
    # Names inside a transformer's plan depend on where things lie in memory; its kernels do not.
    first, second = make(g.transformer()), make(g.transformer())
    assert first.log == second.log
    assert len(first.blob) == len(second.blob)


def test_two_threads_build_at_once(make: Make) -> None:
    contents = [g.cnn(), g.transformer()] * 2
    with ThreadPoolExecutor(2) as pool:
        together = [plan.log for plan in pool.map(make, contents)]
    assert together == [make(content).log for content in contents]


def test_prepare_runs_in_the_thread_that_builds(library: Library) -> None:
    content, seen = g.images(), []

    def prepare() -> None:
        seen.append(threading.current_thread())

    build(
        library,
        model_file(content),
        content,
        TensorRTOptions(),
        BuildRequest(),
        ahead=True,
        prepare=prepare,
    )
    assert len(seen) == 1
    assert seen[0] is not threading.current_thread()


def test_weights_beside_the_model_are_found(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(g.external("weights.bin"))
    (tmp_path / "weights.bin").write_bytes(bytes(32))
    file = unirt.Model(path).file(("onnx",))
    assert file is not None
    assert make(file.read(), file=file).blob
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BuildError, match=r"weights\.bin cannot be opened") as failure:
        make(path.read_bytes(), file=file)
    assert "Put that file back" in failure.value.remedy
    assert "model.onnx" in failure.value.what


# What does not build


def one(dtype: str, body: str, **more: Any) -> bytes:
    return bytes(text(f"({dtype}[2,4] x) => ({dtype}[2,4] y)", body, **more))


ZERO_POINT = (
    "s = Constant<value = float {0.5}>() z = Constant<value = int8 {3}>() "
    "q = QuantizeLinear(x,s,z) y = DequantizeLinear(q,s,z)"
)
QLINEAR = (
    "s = Constant<value = float {0.5}>() z = Constant<value = int8 {0}>() "
    "w = Constant<value = int8[4,3] {1,1,1,1,1,1,1,1,1,1,1,1}>() "
    "y = QLinearMatMul(x,s,z,w,s,z,s,z)"
)
# name: content, node, operator, a part of the reason, a part of the remedy
BAD: dict[str, tuple[Callable[[], bytes], str | None, str | None, str, str]] = {
    "unknown operator": (
        lambda: one("float", "y = Frobnicate(x)", names={"y": "frob"}),
        "frob",
        "Frobnicate",
        "does not have the operator Frobnicate",
        "onnxruntime",
    ),
    "unsupported operator": (
        lambda: one("int32", "y = BitwiseAnd(x, x)", opset=18, names={"y": "mask"}),
        "mask",
        "BitwiseAnd",
        "does not have the operator BitwiseAnd",
        "onnxruntime",
    ),
    "a node without a name": (
        lambda: one("int32", "t = Identity(x) y = BitwiseNot(t)", opset=18),
        "node_of_y",
        "BitwiseNot",
        "does not have the operator BitwiseNot",
        "onnxruntime",
    ),
    "two types": (
        lambda: text("(float[4] x, int32[4] z) => (float[4] y)", "y = Add(x, z)"),
        "node_of_y",
        "Add",
        "types Float and Int32",
        "Repair the graph at node 'node_of_y'",
    ),
    "two shapes": (
        lambda: text("(float[2,4] x, float[5,3] z) => (float[2,3] y)", "y = MatMul(x, z)"),
        "node_of_y",
        "MatMul",
        "input0 = 4 and second to last dimension of input1 = 5",
        "Repair the graph at node 'node_of_y'",
    ),
    "a missing attribute": (
        lambda: text("(float[1,1,4,4] x) => (float[1,1,2,2] y)", "y = MaxPool(x)"),
        "node_of_y",
        "MaxPool",
        "onnx.checker says of the file: Required attribute 'kernel_shape' is missing",
        "Repair the graph",
    ),
    "a Reshape to another volume": (
        lambda: text(
            "(float[2,4] x) => (float[3,3] y)",
            "s = Constant<value = int64[2] {3,3}>() y = Reshape(x,s)",
        ),
        "node_of_y",
        "Reshape",
        "Reshaping [2,4] to [3,3]",
        "Change the graph there",
    ),
    "NonZero": (
        lambda: text("(float[4] x) => (int64[1,k] y)", "y = NonZero(x)"),
        "node_of_y",
        "NonZero",
        "no kernels for outputs whose size the data decides",
        "unirt[tensorrt]",
    ),
    "NonMaxSuppression": (
        lambda: text(
            "(float[1,6,4] b, float[1,1,6] s) => (int64[k,3] y)", "y = NonMaxSuppression(b, s)"
        ),
        "node_of_y",
        "NonMaxSuppression",
        "no kernels for outputs whose size the data decides",
        "unirt[tensorrt]",
    ),
    "quantized operators": (
        lambda: text("(int8[2,4] x) => (int8[2,3] y)", QLINEAR),
        "node_of_y",
        "QLinearMatMul",
        "QuantizeLinear and DequantizeLinear around ordinary operators only",
        "Q/DQ",
    ),
    "a zero point": (
        lambda: one("float", ZERO_POINT),
        "node_of_q",
        "QuantizeLinear",
        "symmetric quantization only",
        "every zero point 0",
    ),
    "float64": (
        lambda: one("double", "y = Relu(x)"),
        None,
        None,
        "computes float64 as float32, and input 'x' is float64",
        "Cast the graph to float32",
    ),
    "text": (
        lambda: one("string", "y = Identity(x)"),
        None,
        None,
        "does not take inputs of type string, as 'x' is",
        "onnxruntime",
    ),
    "a sequence": (
        lambda: text(
            "(float[4] x) => (float[4] y)",
            "s = SequenceConstruct(x) i = Constant<value = int64 {0}>() y = SequenceAt(s,i)",
        ),
        "node_of_s",
        "SequenceConstruct",
        "does not have the operator SequenceConstruct",
        "onnxruntime",
    ),
    "a cycle": (
        lambda: text("(float[4] x) => (float[4] y)", "y = Add(x,q) q = Relu(y)"),
        None,
        None,
        "topologically",
        "Repair the graph",
    ),
    "an output that nothing makes": (
        lambda: text("(float[4] x) => (float[4] y)", "z = Relu(x)"),
        None,
        None,
        "Graph output 'y' is not an output of any node",
        "Repair the graph",
    ),
    "a truncated file": (
        lambda: g.cnn()[:-300],
        None,
        None,
        "ends early or is no ONNX model",
        "again",
    ),
    "an empty file": (lambda: b"", None, None, "is empty", "Fetch or export the model again"),
    "garbage": (
        lambda: b"\x00\x01hello world" * 20,
        None,
        None,
        "holds no graph with an output",
        "Fetch or export the model again",
    ),
    "another kind of file": (
        lambda: b"not a model at all, sorry",
        None,
        None,
        "is no ONNX model",
        "Fetch or export the model again",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_cannot_be_built_says_why(make: Make, name: str) -> None:
    content, node, operator, reason, remedy = BAD[name]
    with pytest.raises(BuildError) as failure:
        make(content())
    error = failure.value
    assert type(error) is BuildError
    assert (error.node, error.operator) == (node, operator)
    assert reason in error.why
    assert remedy in error.remedy
    assert error.backend == "tensorrt"
    assert "cudaError" not in str(error)
    assert "/_src/" not in str(error)
    assert "false" not in error.why


def test_the_parsers_own_words_come_along(make: Make) -> None:
    with pytest.raises(BuildError) as failure:
        make(one("int32", "y = BitwiseAnd(x, x)", opset=18))
    assert failure.value.code == "UNSUPPORTED_NODE"
    with pytest.raises(BuildError) as failure:
        make(text("(float[4] x, int32[4] z) => (float[4] y)", "y = Add(x, z)"))
    assert failure.value.code == "INVALID_NODE"
    assert any("must have same input types" in line for line in failure.value.log)


def test_a_model_with_weights_in_float64_says_that_they_are_narrowed(make: Make) -> None:
    wide = g.weight("w", 4, dtype="float64")
    plan = make(
        text(
            "(float[4] x) => (float[4] y)",
            "a = Cast<to=11>(x) b = Add(a, w) y = Cast<to=1>(b)",
            wide,
        )
    )
    assert plan.warnings == ("TensorRT computes with 4 float64 weights as float32",)


def test_a_failure_leaves_the_builder_usable(make: Make) -> None:
    before = make(g.images()).blob
    kept = []
    for name in ("NonZero", "NonMaxSuppression", "two shapes", "a truncated file") * 3:
        with pytest.raises(BuildError) as failure:
            make(BAD[name][0]())
        kept.append(failure.value)
    gc.collect()
    assert make(g.images()).blob == before


# Profiles


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"x": ((1, 3, 8), (4, 3, 8), (8, 3, 8))}, "takes x [n, 3, h, w]"),
        ({"x": ((1, 4, 8, 8), (4, 4, 8, 8), (8, 4, 8, 8))}, "takes x [n, 3, h, w]"),
        ({}, "leaves them open: x [n, 3, h, w]"),
        ({"x": DATA, "q": DATA}, "Its inputs are: x"),
        ({"x": ((1, 3, 8, 8), (4, 3, 8, 8), (1 << 70, 3, 8, 8))}, "It says"),
    ],
    ids=["rank", "fixed size", "missing", "unknown name", "beyond 64 bits"],
)
def test_a_profile_that_does_not_suit_is_refused(
    make: Make, shapes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ProfileError) as failure:
        make(g.images(), ShapeProfile(shapes))
    assert reason in failure.value.why


def test_a_profile_for_another_static_shape_is_refused(make: Make) -> None:
    with pytest.raises(ProfileError, match=r"does not suit 'x'"):
        make(g.cnn(batch="4"), ShapeProfile({"x": (5, 3, 16, 16)}))


def test_an_empty_batch_is_a_shape_like_others(make: Make) -> None:
    profile = ShapeProfile({"x": ((0, 3, 8, 8), *DATA[1:])})
    assert make(g.images(), profile).profiles == (profile,)


def test_a_profile_beyond_what_the_network_can_take_warns(make: Make) -> None:
    plan = make(g.images(), ShapeProfile({"x": (*DATA[:2], (1 << 40, 3, 8, 8))}))
    assert any("not self-consistent" in line for line in plan.warnings)


def test_usual_shapes_that_cannot_be_blame_the_profile(make: Make) -> None:
    content = text("(float[n,m] x, float[k,p] z) => (float[a,b] y)", "y = Add(x,z)")
    x, z = ((1, 1), (4, 5), (8, 9)), ((1, 1), (3, 5), (6, 9))
    with pytest.raises(BuildError, match="3 != 4") as failure:
        make(content, ShapeProfile({"x": x, "z": z}))
    assert "profile" in failure.value.remedy
    assert "derived" not in failure.value.why


def test_profiles_are_derived_where_none_is_given(make: Make) -> None:
    plan = make(g.transformer(), default_range="1:2:4,16:32:64")
    assert plan.derived
    assert plan.profiles == (ShapeProfile({"x": ((1, 16, 64), (2, 32, 64), (4, 64, 64))}),)


def test_derived_profiles_give_equal_symbols_equal_sizes(make: Make) -> None:
    content = text("(float[n,3] x, float[3,n] z) => (float[n,n] y)", "y = MatMul(x,z)")
    (profile,) = make(content, default_range="1:2:4,16:32:64").profiles
    assert profile.shapes["x"] == ((1, 3), (2, 3), (4, 3))
    assert profile.shapes["z"] == ((3, 1), (3, 2), (3, 4))


def test_a_derived_profile_that_fails_says_how_to_give_one(make: Make) -> None:
    content = text("(float[n,m] x) => (float[n,64] y)", "y = MatMul(x,w)", g.weight("w", 48, 64))
    with pytest.raises(BuildError, match="sizes were derived: x ") as failure:
        make(content, default_range="1:8:9")
    assert failure.value.node == "node_of_y"
    assert "ShapeProfile" in failure.value.remedy


SHAPE_INPUTS = {
    "reshape": (
        g.reshape,
        {"x": ((1, 4), (2, 4), (4, 4))},
        {"s": ((1, 1), (2, 4), (16, 16))},
    ),
    "resize": (g.resize, {}, {"s": ((1, 3, 1, 1), (1, 3, 16, 16), (1, 3, 64, 64))}),
    "top_k": (g.top_k, {"x": ((1, 64), (2, 64), (4, 64))}, {"k": (1, 5, 64)}),
}


@pytest.mark.parametrize("name", SHAPE_INPUTS)
def test_inputs_that_decide_shapes_need_values(make: Make, name: str) -> None:
    content, shapes, values = SHAPE_INPUTS[name]
    if name == "top_k":
        values = {"k": ((1,), (5,), (64,))}
    (key,) = values
    profile = ShapeProfile(shapes, values)
    plan = make(content(), replace(profile, shapes={**shapes, key: (len(values[key][0]),)}))
    assert plan.profiles == (profile,)
    with pytest.raises(ProfileError, match=f"no values for '{key}'") as failure:
        make(content(), ShapeProfile(shapes))
    assert f"values={{'{key}': " in failure.value.remedy
    with pytest.raises(BuildError, match=f"content of '{key}' decides shapes") as failure:
        make(content())
    assert f"values={{'{key}': " in failure.value.remedy
    with pytest.raises(ProfileError, match="bounds 9 values"):
        make(content(), ShapeProfile(shapes, {key: (1,) * 9}))


# Progress and stopping


def test_progress_tells_where_the_build_stands(make: Make) -> None:
    steps: list[BuildStep] = []
    threads = set()

    def progress(step: BuildStep) -> None:
        steps.append(step)
        threads.add(threading.current_thread())

    make(g.cnn(), progress=progress)
    assert threads == {threading.current_thread()}
    assert steps[0] == BuildStep("Reading the model", "", 0, 1)
    assert steps[-1].phase == "Building engine"
    assert steps[-1].step == steps[-1].steps
    running: list[str] = []
    for step in steps:
        assert 0 <= step.step <= step.steps
        if step.step == 0:
            assert step.parent in (*running, "")
            running.append(step.phase)
        elif step.step == step.steps:
            running.remove(step.phase)
    assert running == []
    assert len({step.phase for step in steps}) > 5


@pytest.mark.parametrize("when", [0, 2, 30])
def test_false_cancels(make: Make, when: int) -> None:
    steps: list[BuildStep] = []

    def progress(step: BuildStep) -> bool:
        steps.append(step)
        return len(steps) <= when

    with pytest.raises(BuildCancelled, match="was cancelled"):
        make(g.cnn(), progress=progress)
    assert len(steps) == when + 1
    assert make(g.cnn()).blob


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_what_progress_raises_comes_out_as_itself(
    make: Make, error: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    raised = error("mine")

    def progress(step: BuildStep) -> None:
        if step.phase == "Building engine":
            raise raised

    with pytest.raises(error) as failure:
        make(g.cnn(), progress=progress)
    assert failure.value is raised
    assert capfd.readouterr() == ("", "")
    assert make(g.cnn()).blob


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_stopped_build_does_not_run_to_its_end(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    phases = []
    original = _build._monitor

    def watched(trt: Any, steps: Any, cancelled: threading.Event) -> Any:
        monitor = original(trt, steps, cancelled)

        class Watched(type(monitor)):  # type: ignore[misc]
            def phase_start(self, phase: str, parent: str | None, count: int) -> None:
                phases.append(phase)
                super().phase_start(phase, parent, count)
                if phase == "Optimizing graph":
                    cancelled.wait(10)

        return Watched()

    def progress(step: BuildStep) -> bool:
        if step.phase == "Optimizing graph" and error is not None:
            raise error
        return step.phase != "Optimizing graph"

    monkeypatch.setattr(_build, "_monitor", watched)
    with pytest.raises(error or BuildCancelled):
        make(g.cnn(), progress=progress)
    assert phases[-1] == "Optimizing graph"
    assert not _build._building.locked()


def script(*lines: str) -> subprocess.CompletedProcess[str]:
    """Python with the library, the graphs as `g` and `make(content)` at hand."""
    head = [
        "import _thread, os, runpy, signal, sys, threading, unirt",
        "from types import SimpleNamespace",
        "from unirt_tensorrt._build import build",
        "from unirt_tensorrt._library import load",
        "from unirt_tensorrt._options import TensorRTOptions",
        f"g = SimpleNamespace(**runpy.run_path({str(GRAPHS)!r}))",
        "file = unirt.Model(g.images()).file(('onnx',))",
        "def make(content):",
        "    request = unirt.BuildRequest()",
        "    return build(load(), file, content, TensorRTOptions(), request, ahead=True)",
    ]
    source = "\n".join([*head, *lines])
    environment = {**os.environ, "UNIRT_TENSORRT": "tensorrt_rtx"}
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal to send to oneself")
def test_ctrl_c_stops_a_build_that_nobody_watches() -> None:
    done = script(
        "content = g.transformer()",
        "make(content)",
        "over = threading.Event()",
        # Again and again: Python drops an interrupt that falls into a finalizer.
        "def nag():",
        "    while not over.wait(0.3):",
        "        os.kill(os.getpid(), signal.SIGINT)",
        "threading.Thread(target=nag, daemon=True).start()",
        "try:",
        "    while True:",
        "        make(content)",
        "except KeyboardInterrupt:",
        "    over.set()",
        "    print('interrupted', len(make(content).blob) > 0)",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted True\n", "", 0)


def test_a_process_ends_well_with_failures_in_hand() -> None:
    done = script(
        "kept = []",
        "for content in (g.cnn()[:-300], b'', g.top_k(), g.int8_convolution()):",
        "    try:",
        "        kept.append(make(content))",
        "    except unirt.UnirtError as error:",
        "        kept.append(error)",
        "kept.append(make(g.cnn()))",
        "print(len(kept))",
    )
    assert (done.stdout, done.returncode) == ("5\n", 0)


# Options


def test_every_option_says_what_it_means() -> None:
    for info in TensorRTOptions.describe():
        assert info.help.endswith("."), info.name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"optimization_level": 5}, "every level gives the same kernels"),
        ({"tiling": "full"}, "every level gives the same kernels"),
        ({"hardware_compatibility": "ampere_plus"}, "does not support it"),
        ({"timing_cache": "off"}, "times no kernels"),
        ({"timing_iterations": 4}, "times no kernels"),
        ({"tf32": True}, "NVIDIA_TF32_OVERRIDE is 0"),
        ({"specialization": "lazy", "cuda_graphs": "capture"}, "behind the back"),
        ({"dla_core": 0}, "accelerator cores"),
        ({"gpu_fallback": True}, "accelerator cores"),
        ({"version_compatible": True}, "libnvinfer_lean"),
        ({"lean_runtime": True}, "not version compatible"),
        ({"refit": True}, "no GPU to build with"),
        ({"strip_weights": True}, "no GPU to build with"),
        ({"weight_streaming_budget": 1}, "streams no weights"),
        ({"weight_streaming": True, "cuda_graphs": "capture"}, "no CUDA graph"),
        ({"memory_pools": "tactic_dram=much"}, "a number of MiB"),
        ({"memory_pools": "swimming=1"}, "The pools are tactic_dram"),
        ({"default_range": "8:1:2"}, "smallest:usual:largest"),
        ({"default_range": "1:2:3,1:2:3,1:2:3"}, "smallest:usual:largest"),
        ({"compute_capabilities": "sm86,sm12"}, "knows current, sm75"),
        ({"compute_capabilities": "current"}, "there is none"),
    ],
    ids=lambda value: (
        ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_options_that_would_do_nothing_are_refused(
    library: Library, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(OptionError) as failure:
        check(TensorRTOptions.parse(options), library, None)
    assert reason in failure.value.why
    assert failure.value.option in options
    assert failure.value.remedy


def test_defaults_and_what_works_pass_the_check(library: Library) -> None:
    check(TensorRTOptions(), library, None)
    check(TensorRTOptions.parse({"refit": True, "strip_weights": True}), library, GPU)
    check(TensorRTOptions.parse({"compute_capabilities": "8.6,sm89"}), library, GPU)
    check(TensorRTOptions.parse({"compute_capabilities": "current"}), library, GPU)


def test_an_engine_that_would_not_run_on_the_device_is_refused(library: Library) -> None:
    with pytest.raises(OptionError, match=r"compute capability is 8\.9"):
        check(TensorRTOptions.parse({"compute_capabilities": "sm86"}), library, GPU)


def test_options_of_the_other_flavour_are_refused(library: Library) -> None:
    other = replace(library, flavour="tensorrt")
    for options in (
        {"cuda_graphs": "engine"},
        {"specialization": "eager"},
        {"compute_capabilities": "sm86"},
    ):
        with pytest.raises(OptionError):
            check(TensorRTOptions.parse(options), other, GPU)
    check(TensorRTOptions.parse({"optimization_level": 5, "builds": 3}), other, GPU)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_streaming": True},
        {"verbosity": "names"},
        {"memory_pools": "tactic_shared_memory=0.046875"},
        {"compute_capabilities": "sm86"},
    ],
    ids=str,
)
def test_options_reach_the_engine(make: Make, options: dict[str, object]) -> None:
    assert make(g.cnn(), **options).blob != make(g.cnn()).blob


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": 0},
        {"tiling": "full"},
        {"timing_iterations": 8},
        {"timing_cache": "off"},
        {"gpu_fallback": True},
    ],
    ids=str,
)
def test_options_that_are_refused_do_change_nothing(make: Make, options: dict[str, object]) -> None:
    assert make(g.cnn(), **options).blob == make(g.cnn()).blob


def test_too_little_workspace_names_the_option(make: Make) -> None:
    with pytest.raises(BuildError, match="scratch memory it may use, 1 MiB") as failure:
        make(g.cnn(), workspace=1)
    assert "workspace" in failure.value.remedy


def test_a_flag_that_the_builder_refuses_is_an_error(make: Make) -> None:
    with pytest.raises(OptionError, match="DLA disabled") as failure:
        make(g.cnn(), memory_pools="dla_local_dram=4")
    assert failure.value.option == "memory_pools"
    with pytest.raises(OptionError, match="has 0 such cores"):
        make(g.cnn(), dla_core=0)


@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_refitting_without_a_gpu_says_that_it_needs_one(make: Make, option: str) -> None:
    with pytest.raises(BuildError, match="no GPU is here"):
        make(g.cnn(), **{option: True})


def test_a_version_compatible_build_says_what_it_lacks(make: Make) -> None:
    with pytest.raises(BuildError, match="libnvinfer_lean"):
        make(g.cnn(), version_compatible=True, lean_runtime=True)


def test_warnings_come_once_and_without_chatter(make: Make) -> None:
    content, shapes, values = SHAPE_INPUTS["reshape"]
    warnings = make(content(), ShapeProfile(shapes, values)).warnings
    assert len(warnings) == len(set(warnings)) == 2
    assert all("not self-consistent" in line for line in warnings)
