"""What a caller asks of one build: shapes, precision, progress; and what only some engines do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import unirt
from unirt import BuildStep, EngineReport, Layer, ShapeProfile, cli, plugins, precision
from unirt.accuracy import snr_db
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
    quantization = ""  # type: ignore[assignment] # so that tests can set it

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
    with unirt.load(DIGITS, ["onnxruntime:int4", "able"], samples=samples):
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


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("int4", "in float32, and only its weights can be quantized to int4: int4w"),
        ("fp4", "in float32, and neither a cast nor quantization leads from there to fp4"),
        ("fp8", "by the recipe cpu, which has no fp8, only int8, int8w, int4w"),
        ("fp7", "'fp7' is no precision; they are fp32, "),
    ],
)
def test_a_precision_that_a_float_graph_cannot_get_is_refused(
    name: str, told: str, plain: Plain
) -> None:
    with pytest.raises(unirt.BackendUnavailable, match=re.escape(told)) as caught:
        unirt.build(DIGITS, f"plain:{name}", samples=[TEST["image"]])
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


# --- quantizing ----------------------------------------------------------------------------------

IMAGES = [image[None] for image in TEST["image"][:40]]


@pytest.fixture(scope="module")
def found() -> precision.Calibration:
    return precision.calibrate(DIGITS, {"image": TEST["image"][:40]}, method="max")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("name", "least"), [("int8", 20), ("int8w", 35), ("int4w", 20)])
def test_a_float32_graph_is_quantized_to_the_candidate_s_precision(
    backend: str, name: str, least: float
) -> None:
    with unirt.load(DIGITS, f"{backend}:{name}", samples=IMAGES) as session:
        engine = session.engine
        assert str(engine.candidate) == f"{backend}@cpu:{name}"
        assert session.inputs[0].dtype == "float32"
        assert engine.facts["quantization"] == engine.quantization
        assert engine.quantization is not None
        assert engine.quantization["precision"] == name
        assert engine.quantization["nodes"] >= 1  # type: ignore[operator]
        wanted = {"method": "mse", "samples": 40} if name == "int8" else None
        assert engine.quantization["calibration"] == wanted
        logits = session.run(TEST["image"])["logits"]
    assert np.mean(logits.argmax(1) == TEST["labels"]) >= 0.97
    with unirt.load(DIGITS, backend) as session:
        exact = session.run(TEST["image"])["logits"]
    assert least < snr_db(logits, exact) < 70


def test_the_engine_says_what_was_quantized_from_what_and_what_stays_why(plain: Plain) -> None:
    with unirt.build(DIGITS, "plain:int4w") as engine:
        assert engine.quantization is not None
        assert engine.quantization["nodes"] is None, "nobody has read the graph"
        engine.file.read()
        told, stays, raised = engine.notes
        kept = engine.quantization["kept"]
        assert engine.quantization["nodes"] == 1
    assert told.startswith("quantized to int4w by the recipe cpu")
    assert "raised from opset 18 to 21" in raised
    assert len(kept) == 5  # type: ignore[arg-type]
    assert set(kept.values()) == {stays.partition("more: ")[2]}  # type: ignore[attr-defined]


def test_a_calibration_is_given_as_it_is_or_as_the_file_it_was_saved_to(
    found: precision.Calibration, plain: Plain, tmp_path: Path, calibrations: list[int]
) -> None:
    path = found.save(tmp_path / "ranges.json")
    hashes = set()
    for given in (found, path, str(path)):
        with unirt.build(DIGITS, "plain:int8", calibration=given, samples=IMAGES[:2]) as engine:
            hashes.add(engine.model.hash)
            engine.file.read()
            assert "by max of 40 samples" in engine.notes[0]
    assert len(hashes) == 1
    assert calibrations == []


def test_what_is_no_calibration_is_refused_before_anything_is_compiled(
    plain: Plain, tmp_path: Path
) -> None:
    other: Any = {"image": (0, 1)}
    with pytest.raises(unirt.OptionError, match="of type dict, is no calibration"):
        unirt.build(DIGITS, "plain:int8", calibration=other)
    with pytest.raises(unirt.DataError, match=r"nothing\.json cannot be read"):
        unirt.build(DIGITS, "plain", calibration=tmp_path / "nothing.json")
    assert plain.compiled == 0
    relu = _model([helper.make_node("Relu", ["x"], ["y"], "act")], [])
    strange = precision.Calibration({"elsewhere": precision.Range(0, 1)}, "max", 1, "0" * 64)
    with pytest.raises(unirt.ModelError, match="not one of digits"):
        unirt.build(DIGITS, "onnxruntime:int8", calibration=strange)
    with pytest.raises(unirt.ModelError, match="nothing to quantize"):
        unirt.build(relu, "onnxruntime:int8", samples=[np.ones((1, 3), np.float32)])


def test_nobody_calibrates_for_a_build_that_cannot_be(calibrations: list[int]) -> None:
    for candidate, asked, error in (
        ("onnxruntime@npu:int8", {}, unirt.BackendUnavailable),
        ("onnxruntime:int8", {"options": {"thread": 1}}, unirt.OptionError),
        ("onnxruntime:int8", {"hot_shapes": [{"img": (1,)}]}, unirt.ProfileError),
        ("onnxruntime:fp8", {}, unirt.BackendUnavailable),
    ):
        with pytest.raises(error):
            unirt.build(DIGITS, candidate, samples=IMAGES, **asked)  # type: ignore[arg-type]
    assert calibrations == []
    with pytest.raises(unirt.DataError, match="holds NaN in sample 1"):
        unirt.build(DIGITS, "onnxruntime:int8", samples=[IMAGES[0], IMAGES[1] * np.nan])


def test_other_ranges_methods_recipes_and_precisions_make_other_models(
    found: precision.Calibration, plain: Plain
) -> None:
    def hash_of(name: str, given: precision.Calibration, recipe: str = "") -> str:
        plain.quantization = recipe  # type: ignore[misc]
        with unirt.build(DIGITS, f"plain:{name}", calibration=given) as engine:
            return engine.model.hash

    nearly = found.with_ranges({"image": (0, np.nextafter(found.ranges["image"].high, 2))})
    hashes = [
        unirt.Model(DIGITS).hash,
        hash_of("int8", found),
        hash_of("int8", nearly),
        hash_of("int8", replace(found, method="entropy")),
        hash_of("int8", replace(found, samples=41)),
        hash_of("int8", found, "tensorrt"),
        hash_of("fp8", found, "tensorrt"),
        hash_of("int8w", found),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of("int8", precision.Calibration(**vars(found))) == hashes[1]
    assert hash_of("int8w", nearly) == hashes[7], "weights alone have no use for ranges"


def test_a_backend_states_by_which_recipe_graphs_are_quantized_for_it(
    found: precision.Calibration, plain: Plain
) -> None:
    plain.quantization = "tensorrt"
    with unirt.build(DIGITS, "plain:int8", calibration=found) as engine:
        weights = unirt.Model(engine.file.read()).primary.weight_dtypes
        assert engine.quantization is not None
        assert engine.quantization["recipe"] == "tensorrt"
    assert "uint8" not in weights  # every zero point is an int8
    plain.quantization = ""
    with unirt.build(DIGITS, "plain:int8", calibration=found) as engine:
        assert unirt.Model(engine.file.read()).primary.weight_dtypes["uint8"] > 0
    plain.quantization = "tensort"  # type: ignore[misc]
    assert "Did you mean 'tensorrt'?" in unirt.select(DIGITS, ["plain:int8"]).excluded["plain:int8"]
    with pytest.raises(unirt.BackendUnavailable, match="states a recipe that is not there"):
        unirt.build(DIGITS, "plain:int8", calibration=found)


@pytest.mark.parametrize("name", ["int8", "fp8", "int8w", "int4w"])
def test_a_graph_that_is_quantized_so_runs_as_it_is(
    name: str, found: precision.Calibration, plain: Plain, calibrations: list[int]
) -> None:
    full: Any = {"int8w": "int8-weights", "int4w": "int4-weights"}.get(name, name)
    content = precision.quantize(DIGITS, found, full).model.primary.read()
    with unirt.build(content, f"plain:{name}", samples=IMAGES) as engine:
        assert engine.file.read() == content
        assert engine.quantization is None
        assert engine.notes == ()
    assert calibrations == []
    others = {"int8", "fp8", "int8w", "int4w"} - {name}
    # Weights in int8 are int8, whatever is done to activations.
    others -= {"int8"} if name == "int8w" else set()
    refused = unirt.select(content, [f"plain:{other}" for other in others]).excluded
    assert {text.partition(":")[2] for text in refused} == others


def test_a_half_precision_graph_is_not_quantized(plain: Plain) -> None:
    half = precision.cast(DIGITS, "fp16").model
    with pytest.raises(unirt.BackendUnavailable, match="The graph is in float16"):
        unirt.build(half, "plain:int8", samples=IMAGES)


def test_two_calibrations_never_share_a_plan(found: precision.Calibration, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

    def cached(given: precision.Calibration) -> bool:
        asked: Any = {"options": {"cache": tmp_path}, "calibration": given}
        with unirt.build(DIGITS, "tensorrt@aot:fp8", **asked) as engine:
            assert engine.notes[0].startswith("quantized to fp8 by the recipe tensorrt")
            assert f"by {given.method} of {given.samples} samples" in engine.notes[0]
            assert engine.facts["quantization"]
            return bool(engine.facts["cached"])

    assert not cached(found)
    assert cached(found)
    narrower = found.with_ranges({"image": found.ranges["image"].high / 2})
    assert not cached(narrower)
    assert cached(narrower)
    assert not cached(replace(found, method="mse")), "its notes would tell of another"
    assert len(list(tmp_path.glob("*.plan"))) == 3


def test_a_tflite_is_quantized_as_such(found: precision.Calibration) -> None:
    pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed")
    both = unirt.Model(DIGITS, beside=True)
    # A calibration of the ONNX graph is carried over to the tensors of the .tflite.
    for given, method in ((None, "mse"), (found, found.method)):
        with unirt.load(both, "tflite:int8", samples=IMAGES, calibration=given) as session:
            assert session.decision.quantization["recipe"] == "litert"
            assert session.decision.quantization["calibration"]["method"] == method
            logits = session.run(TEST["image"])["logits"]
        assert np.mean(logits.argmax(1) == TEST["labels"]) >= 0.97
    with pytest.raises(unirt.DataError, match="needs the ranges"):
        unirt.build(both, "tflite:int8")
    assert "no fp8, only int8, int8w" in unirt.select(both, "tflite:fp8").excluded["tflite:fp8"]


def test_samples_may_be_a_file_or_a_mapping_of_arrays() -> None:
    arrays = ({"image": TEST["image"]}, TEST["image"])
    for samples in (DIGITS.with_name("test.npz"), *arrays):
        with unirt.load(DIGITS, "onnxruntime:int8", samples=samples) as session:
            assert session.decision.quantization["calibration"]["samples"] == 450
            assert session.run(TEST["image"][:3])["logits"].shape == (3, 10)
    with pytest.raises(unirt.DataError, match="picture"):
        unirt.load(DIGITS, "onnxruntime:int8", samples={"picture": TEST["image"]})


def overflowing() -> onnx.ModelProto:
    """The middle of it reaches 465,000 or so, and its answers are small."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        net (float[n,4] x) => (float[n,4] y) {
            [one] a = Gemm (x, w) [two] b = Gemm (a, v) [three] y = Gemm (b, v)
        }""")
    for name, size in (("w", 5e4), ("v", 1e-2)):
        weight = (np.eye(4) * size).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return model


def test_a_cast_candidate_keeps_in_float32_what_overflows_on_the_samples() -> None:
    x = np.linspace(-9, 9, 32, dtype=np.float32).reshape(8, 4)
    with unirt.load(overflowing(), "reference:fp16") as unseen:
        assert not np.isfinite(unseen.run(x)["y"]).all()
    for samples in ([x], [{"x": x}]):
        with unirt.load(overflowing(), "reference:fp16", samples=samples) as session:
            assert np.isfinite(session.run(x)["y"]).all()
            assert "stay one, two: 'a' reaches 450000" in session.decision.notes[0]


def test_a_cast_of_other_samples_is_another_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds it")

    def cached(x: np.ndarray[Any, Any]) -> bool:
        options = {"cache": tmp_path}
        with unirt.build(
            overflowing(), "tensorrt@aot:fp16", samples=[x], options=options
        ) as engine:
            return bool(engine.facts["cached"])

    one = np.ones((8, 4), np.float32)
    assert not cached(one)
    assert cached(one.copy())
    assert not cached(2 * one)


def test_what_tensorrt_does_not_quantize_it_computes_in_fp16() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds it")
    with unirt.build(DIGITS, "tensorrt@aot:int8", samples=IMAGES[:1]) as engine:
        assert engine.facts["quantization"]["rest"] == "fp16"
        assert "what is not quantized was cast to fp16" in engine.notes
        precisions = engine.inspect().precisions
    assert precisions["float16"] > precisions.get("float32", 0)
    assert precisions["int8"]
    with unirt.build(DIGITS, "onnxruntime:int8", samples=IMAGES[:1]) as engine:
        assert engine.facts["quantization"]["rest"] == "fp32"


def test_a_tflite_wants_the_package_that_quantizes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ai_edge_quantizer", "ai_edge_quantizer.quantizer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(unirt.BackendUnavailable, match="ai-edge-quantizer"):
        unirt.build(DIGITS.with_suffix(".tflite"), "tflite:int8w")


def test_build_calibrates_on_data_or_takes_a_calibration(
    found: precision.Calibration, tmp_path: Path
) -> None:
    path = found.save(tmp_path / "ranges.json")
    run = CliRunner().invoke
    command = ["build", str(DIGITS), "-c", "onnxruntime:int8"]
    for given, told in (
        (["--data", str(DIGITS.with_name("test.npz"))], {"method": "mse", "samples": 450}),
        (["--calibration", str(path)], {"method": "max", "samples": 40}),
    ):
        done = run(cli.app, [*command, *given, "--json"])
        assert done.exit_code == 0, done.output
        document = json.loads(done.stdout)
        assert document["facts"]["quantization"]["calibration"] == told
        assert f"of {told['samples']} samples" in document["notes"][0]
        text = run(cli.app, [*command, *given], env={"COLUMNS": "200"}).stdout
        assert text.count("quantized to int8") == 1
    done = run(cli.app, [*command, "--json"])
    assert done.exit_code == 3
    assert "--calibration" in json.loads(done.stdout)["error"]["remedy"]
    ran = ["run", str(DIGITS), "-c", "onnxruntime:int8", "--calibration", str(path), "--json"]
    decision = json.loads(run(cli.app, ran).stdout)["decision"]
    assert decision["quantization"]["calibration"] == {"method": "max", "samples": 40}


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
