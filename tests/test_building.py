"""What a caller asks of one build: shapes, precision, progress; and what only some engines do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import unirt
from unirt import BuildStep, EngineReport, Layer, ShapeProfile, plugins, precision
from unirt.plugins import Plugin
from unirt.testing.networks import onnx_bytes

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
TEST = np.load(DIGITS.with_name("test.npz"))
RANGE = ((1, 1, 8, 8), (8, 1, 8, 8), (64, 1, 8, 8))
REPORT = EngineReport((Layer("all of it", "kernel"),), "a test")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNIRT_BACKEND", raising=False)


class PlainSession(unirt.Session):
    def _run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        (image,) = inputs.values()
        return {"logits": np.zeros((len(image), 10), np.float32)}


class PlainEngine(unirt.Engine):
    """Can do nothing but run."""

    def _new_session(self) -> unirt.Session:
        return PlainSession()


class Plain(unirt.Backend):
    name = "plain"
    formats: Any = ("onnx",)

    def __init__(self) -> None:
        self.compiled = 0

    def _probe(self) -> unirt.Availability:
        return unirt.Availability.yes("1.0", targets=(unirt.Device("elsewhere"),))

    def _compile(self, file: unirt.ModelFile, device: unirt.Device, options: Any) -> unirt.Engine:
        self.compiled += 1
        return PlainEngine()


class AbleSession(PlainSession):
    profiled: Mapping[str, Any]

    def _profile(self, inputs: Mapping[str, Any]) -> EngineReport:
        if np.isnan(next(iter(inputs.values()))).any():
            raise ZeroDivisionError("no time")
        type(self).profiled = inputs
        return REPORT.with_times([("all of it", 2e-6)])


class AbleEngine(PlainEngine):
    def _new_session(self) -> unirt.Session:
        return AbleSession()

    def _inspect(self) -> EngineReport:
        return REPORT

    def _save(self, path: Path) -> None:
        path.write_bytes(b"an engine")


class Able(Plain):
    """Can do everything there is a protocol for."""

    name = "able"
    engine_suffixes = (".able",)
    request = unirt.BuildRequest()

    def _compile_request(
        self,
        file: unirt.ModelFile,
        device: unirt.Device,
        options: Any,
        request: unirt.BuildRequest,
    ) -> unirt.Engine:
        self.request = request
        self.compiled += 1
        for step in range(3):
            if request.progress and request.progress(BuildStep("all", "", step, 2)) is False:
                raise unirt.BuildCancelled("Stopped.", "You said so.", "Build again.")
        return AbleEngine()

    def _inspect_file(self, path: Path) -> EngineReport:
        if path.read_bytes() != b"an engine":
            raise ValueError("garbage")
        return REPORT


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Plain:
    return _installed(Plain(), monkeypatch)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> Able:
    return _installed(Able(), monkeypatch)


def _installed(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(plugins._loaded, backend.name, Plugin(backend.name, "test", backend))
    return backend


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"profiles": [ShapeProfile({"img": RANGE})]}, "'img', which is no input"),
        ({"profiles": [ShapeProfile({"image": (1, 8, 8)})]}, "does not suit 'image'"),
        ({"profiles": [ShapeProfile({"image": (1, 3, 8, 8)})]}, "does not suit 'image'"),
        ({"profiles": [ShapeProfile({})]}, "no shapes for 'image'"),
        ({"profiles": [{"image": RANGE}]}, "A dict stands where profiles are expected"),
        ({"profiles": ShapeProfile({"image": RANGE})}, "A ShapeProfile stands where"),
        ({"hot_shapes": [{"img": (1, 1, 8, 8)}]}, "'img', which is no input"),
        ({"hot_shapes": [{"image": (1, 1, 8)}]}, "does not suit 'image'"),
        ({"hot_shapes": [{"image": RANGE}]}, "It is a range"),
        ({"hot_shapes": [{"image": 8}]}, "It is no shape"),
        ({"hot_shapes": [(1, 1, 8, 8)]}, "found by the name"),
    ],
)
def test_a_mistake_in_a_profile_is_found_before_any_engine_sees_the_model(
    asked: dict[str, Any], told: str, able: Able, plain: Plain
) -> None:
    for backend in (able, plain):
        for make in (unirt.build, unirt.load):
            with pytest.raises(unirt.ProfileError, match=re.escape(told)):
                make(DIGITS, backend.name, **asked)
        assert backend.compiled == 0


def test_the_engine_is_asked_for_profiles_then_hot_shapes(able: Able) -> None:
    wide, hot = ShapeProfile({"image": RANGE}), {"image": (1, 1, 8, 8)}
    unirt.build(DIGITS, "able", profiles=[wide], hot_shapes=[hot]).close()
    assert able.request.profiles == (wide,)
    assert able.request.hot == (ShapeProfile(hot),)
    with unirt.load(DIGITS, "able", samples=[TEST["image"][:n] for n in (4, 2, 9, 2)]):
        (derived,) = able.request.profiles
    assert derived.shapes["image"] == ((2, 1, 8, 8), (2, 1, 8, 8), (9, 1, 8, 8))
    unirt.build(DIGITS, "able", profiles=[wide], samples=[TEST["image"][:3]]).close()
    assert able.request.profiles == (wide,)
    unirt.build(DIGITS, "able").close()
    assert able.request == unirt.BuildRequest()


def test_a_profile_speaks_of_the_file_s_own_names(able: Able) -> None:
    renamed = onnx.load(DIGITS)
    renamed.graph.node[0].input[0] = renamed.graph.input[0].name = "pixels"
    tflite = DIGITS.with_suffix(".tflite")
    model = unirt.Model(tflite, onnx=renamed)
    profile = ShapeProfile({"image": RANGE})
    with unirt.build(model, "able", profiles=[profile]) as engine, engine.session() as session:
        assert able.request.profiles == (ShapeProfile({"pixels": RANGE}),)
        session.profile(TEST["image"][:2])
        assert list(AbleSession.profiled) == ["pixels"]


@pytest.mark.parametrize("sample", [{"imag": TEST["image"]}, TEST["image"].astype(float), "text"])
def test_samples_are_checked_as_inputs_are(sample: Any, able: Able) -> None:
    for make in (unirt.build, unirt.load):
        with pytest.raises(unirt.InputError):
            make(DIGITS, "able", samples=[sample])
    assert able.compiled == 0


def test_samples_may_be_read_once_and_serve_every_candidate(able: Able) -> None:
    samples = (TEST["image"][:n] for n in (1, 5))
    with unirt.load(DIGITS, ["onnxruntime:int8", "able"], samples=samples):
        assert able.request.profiles[0].shapes["image"][2] == (5, 1, 8, 8)


# --- progress ------------------------------------------------------------------------------------


def test_progress_hears_of_every_step(able: Able) -> None:
    heard: list[BuildStep] = []
    unirt.build(DIGITS, "able", progress=heard.append).close()
    assert [(one.phase, one.step, one.steps) for one in heard] == [("all", k, 2) for k in range(3)]
    unirt.build(DIGITS, "onnxruntime", progress=heard.append).close()  # tells nothing
    assert len(heard) == 3


def test_a_cancelled_load_tries_no_other_engine(able: Able) -> None:
    with pytest.raises(unirt.BuildCancelled):
        unirt.load(DIGITS, ["able", "onnxruntime"], progress=lambda _: False)


def test_what_progress_raises_comes_out_as_itself(able: Able) -> None:
    def fail(step: BuildStep) -> None:
        raise ValueError("the window is gone")

    for make in (unirt.build, unirt.load):
        with pytest.raises(ValueError, match="the window is gone") as caught:
            make(DIGITS, "able", progress=fail)
        assert not isinstance(caught.value, unirt.UnirtError)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_float32_graph_is_cast_to_the_candidate_s_precision(name: str) -> None:
    backend = "onnxruntime" if name == "fp16" else "openvino"
    with unirt.load(DIGITS, f"{backend}:{name}") as session:
        engine = session.engine
        assert engine.precision == name
        assert str(engine.candidate) == f"{backend}@cpu:{name}"
        assert engine.model.name == "digits"
        assert session.inputs[0].dtype == "float32"
        logits = session.run(TEST["image"])["logits"]
    assert np.mean(logits.argmax(1) == TEST["labels"]) >= 0.97
    with unirt.load(DIGITS, backend) as session:
        assert session.engine.precision is None
        exact = session.run(TEST["image"])["logits"]
    assert 0 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.05


def test_the_engine_says_what_stayed_in_float32() -> None:
    weight = numpy_helper.from_array(np.array([1e30, 1, 2], np.float32), "huge")
    nodes = [
        helper.make_node("Mul", ["x", "huge"], ["t"], "scale"),
        helper.make_node("Relu", ["t"], ["y"], "relu"),
    ]
    with unirt.build(_model(nodes, [weight]), "onnxruntime:fp16") as engine:
        (note,) = (note for note in engine.notes if "float32" in note)
    assert note.startswith("in float32 stay scale")
    assert "beyond fp16" in note
    with unirt.build(DIGITS, "onnxruntime:fp16") as engine:
        assert not [note for note in engine.notes if "in float32 stay" in note]


def test_the_cast_happens_only_where_it_is_read(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    casts: list[str] = []
    real = precision.cast

    def count(model: Any, name: Any, **more: Any) -> Any:
        casts.append(name)
        return real(model, name, **more)

    monkeypatch.setattr(precision, "cast", count)
    with unirt.build(DIGITS, "plain:fp16") as engine:
        hashes = {engine.model.hash, unirt.Model(DIGITS).hash}
        assert casts == []
        first = engine.file.read()
        assert engine.file.read() is first
    assert casts == ["fp16"]
    assert unirt.Model(first).primary.weight_dtypes["float16"] > 0
    for name in ("fp16", "bf16"):
        with unirt.build(unirt.Model(DIGITS.read_bytes()), f"plain:{name}") as engine:
            hashes.add(engine.model.hash)
    assert len(hashes) == 3  # as it is, fp16, bf16: wherever the same bytes came from
    assert casts == ["fp16"]


def test_weights_beside_the_model_are_cast_too_and_watched(plain: Plain, tmp_path: Path) -> None:
    path, weights = tmp_path / "heavy.onnx", tmp_path / "weights.bin"
    onnx.save(
        onnx.load_from_string(onnx_bytes("heavy")),
        path,
        save_as_external_data=True,
        location=weights.name,
        size_threshold=0,
    )
    x = np.ones((2, 64), np.float32)
    with (
        unirt.load(path, "onnxruntime:fp16") as cast,
        unirt.load(path, "onnxruntime") as exact,
        unirt.build(path, "plain:fp16") as before,
    ):
        np.testing.assert_allclose(cast.run(x)["y"], exact.run(x)["y"], rtol=0.02, atol=0.01)
        hashes = {cast.engine.model.hash, exact.engine.model.hash}
        flipped = bytearray(weights.read_bytes())
        flipped[100] ^= 1
        weights.write_bytes(flipped)
        with pytest.raises(unirt.ModelError, match="changed"):
            before.file.read()
        with unirt.build(path, "plain:fp16") as after:
            assert len(hashes | {after.model.hash}) == 3


def test_a_graph_that_is_in_this_precision_runs_as_it_is(plain: Plain) -> None:
    content = precision.cast(DIGITS, "fp16").model.primary.read()
    with unirt.build(content, "plain:fp16") as engine:
        assert engine.file.read() == content
        assert engine.notes == ()
        assert engine.precision == "fp16"
    relu = _model([helper.make_node("Relu", ["x"], ["y"])], [], TensorProto.FLOAT16)
    with unirt.build(relu, "plain:fp16") as engine:
        assert engine.file.read() == relu
    with pytest.raises(unirt.BackendUnavailable, match="in float16"):
        unirt.build(relu, "plain:fp32")


@pytest.mark.parametrize("zero_point", [np.int8(0), np.uint8(128), None])
def test_a_graph_with_quantizing_nodes_is_int8_whatever_its_weights_are_stored_in(
    zero_point: Any, plain: Plain
) -> None:
    weights = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
    tensors = {"scale": np.float32(0.01), "w": weights}
    if zero_point is not None:
        tensors["zero"] = zero_point
    parameters = [name for name in ("scale", "zero") if name in tensors]
    nodes = [
        helper.make_node("QuantizeLinear", ["w", *parameters], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *parameters], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    content = _model(nodes, [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()])
    with unirt.build(content, "plain:int8") as engine:
        assert engine.file.read() == content
    selection = unirt.select(content, ["plain:int8", "plain:fp8", "plain:fp16", "plain:fp32"])
    assert list(selection.excluded) == ["plain:fp8"]
    with unirt.load(content, "onnxruntime:int8") as session:
        assert session.run(np.ones((1, 3), np.float32))["y"].shape == (1, 3)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "fp4"])
def test_a_float_graph_is_not_quantized_on_the_side(name: str, plain: Plain) -> None:
    with pytest.raises(unirt.BackendUnavailable, match=f"in float32.*to {name}") as caught:
        unirt.build(DIGITS, f"plain:{name}")
    assert "name plain." in caught.value.remedy
    assert plain.compiled == 0


def test_only_onnx_is_cast() -> None:
    tflite = DIGITS.with_suffix(".tflite")
    selection = unirt.select(tflite, ["tflite:fp16", "tflite:fp32", "tflite"])
    assert "only an ONNX graph can be cast" in selection.excluded["tflite:fp16"]
    assert list(map(str, selection.candidates)) == ["tflite", "tflite:fp32"]


def _model(nodes: list[Any], weights: list[Any], dtype: int = TensorProto.FLOAT) -> bytes:
    x, y = (helper.make_tensor_value_info(name, dtype, ["n", 3]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    opset = [helper.make_opsetid("", 17)]
    content: bytes = helper.make_model(graph, ir_version=8, opset_imports=opset).SerializeToString()
    return content


# --- what only some engines can do ---------------------------------------------------------------


def test_an_engine_that_cannot_says_so_and_what_to_do(plain: Plain, tmp_path: Path) -> None:
    with unirt.build(DIGITS, "plain") as engine, engine.session() as session:
        for ask in (
            engine.inspect,
            lambda: engine.save(tmp_path / "x"),
            lambda: session.profile(TEST["image"]),
            lambda: plain.inspect_file(tmp_path / "x"),
        ):
            with pytest.raises(unirt.BackendUnavailable, match="plain") as caught:
                ask()
            assert caught.value.why
            assert caught.value.remedy
            assert caught.value.backend == "plain"
    assert not list(tmp_path.iterdir())


def test_an_engine_that_can_shows_saves_and_times(able: Able, tmp_path: Path) -> None:
    path = tmp_path / "engine.able"
    with unirt.build(DIGITS, "able") as engine, engine.session() as session:
        assert engine.inspect() == REPORT
        assert engine.save(str(path)) == path
        assert session.profile({"image": TEST["image"]}).seconds == 2e-6
        with pytest.raises(unirt.InputError):
            session.profile({"wrong": TEST["image"]})
        with pytest.raises(unirt.BackendError, match="ZeroDivisionError: no time"):
            session.profile(np.full((1, 1, 8, 8), np.nan, np.float32))
        with pytest.raises(unirt.BackendError, match=r"cannot be saved to .*folder") as caught:
            engine.save(tmp_path / "no" / "folder" / "engine.able")
        assert isinstance(caught.value.__cause__, OSError)
    for ask in (engine.inspect, lambda: engine.save(path), engine.session, session.profile):
        with pytest.raises(unirt.ClosedError):
            ask(*([TEST["image"]] if ask == session.profile else []))
    assert able.inspect_file(path) == REPORT
    path.write_bytes(b"nonsense")
    with pytest.raises(unirt.BackendError, match="garbage"):
        able.inspect_file(path)
    with pytest.raises(unirt.ModelNotFound):
        able.inspect_file(tmp_path / "none.able")


def test_what_is_built_for_elsewhere_is_no_candidate_here(able: Able) -> None:
    row = unirt.select(DIGITS, ["able@elsewhere"]).excluded["able@elsewhere"]
    assert "run elsewhere" in row
    with unirt.build(DIGITS, "able@elsewhere") as engine:
        assert str(engine.candidate) == "able@elsewhere"
    assert "able@elsewhere" not in map(str, unirt.select(DIGITS).candidates)


# --- arrays on a device --------------------------------------------------------------------------


def test_who_reads_a_device_array_tells_its_owner_on_which_stream() -> None:
    class Owner:
        read_by: list[int] = []

        def read_on(self, stream: int) -> None:
            self.read_by.append(stream)

    owner = Owner()
    array = unirt.DeviceArray(4096, (2, 3), "float32", 0, owner)
    array.__dlpack__(stream=7)
    array.__dlpack__()  # a reader that names none promises to order its work itself
    assert owner.read_by == [7]
    unirt.DeviceArray(4096, (2, 3), "float32", 0, object()).__dlpack__(stream=7)


def test_an_array_that_only_cuda_knows_is_refused_on_the_cpu() -> None:
    class OnlyCuda:
        __cuda_array_interface__ = {
            "shape": (1, 1, 8, 8),
            "typestr": "<f4",
            "data": (4096, False),
            "version": 3,
        }

    with unirt.load(DIGITS, "onnxruntime") as session:
        for given in (OnlyCuda(), {"image": OnlyCuda()}):
            with pytest.raises(unirt.InputError, match=r"runs on cpu.*CUDA memory") as caught:
                session.run(given)
            assert "Copy it to the host" in caught.value.remedy
        assert session.run(TEST["image"][:1])["logits"].shape == (1, 10)
