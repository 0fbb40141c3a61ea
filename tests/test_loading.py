"""From one line of code to a running session: choice, fallback, and the record of both."""

from __future__ import annotations

import importlib
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unirt
from unirt import plugins
from unirt.plugins import Plugin
from unirt.testing import NETWORKS
from unirt.testing.networks import onnx_bytes

calibrate: Any = importlib.import_module("unirt.precision.calibration.calibrate")
EXAMPLE = Path(__file__).parent.parent / "examples" / "digits"
TEST = np.load(EXAMPLE / "test.npz")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNIRT_BACKEND", raising=False)


class Refuses(unirt.Backend):
    """Ranks first and then cannot compile: a plugin object as real as any."""

    name = "onnxruntime"
    formats = ("onnx",)

    def _probe(self) -> unirt.Availability:
        return unirt.Availability.yes("9.9")

    def _compile(
        self, file: unirt.ModelFile, device: unirt.Device, options: object
    ) -> unirt.Engine:
        raise MemoryError("out of fairy dust")


@pytest.fixture
def onnxruntime_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins._loaded, "onnxruntime", Plugin("onnxruntime", "test", Refuses()))


def accuracy(session: unirt.Session) -> float:
    hits = [
        int(np.argmax(outputs["logits"])) == label
        for outputs, label in zip(
            session.map(image[None] for image in TEST["image"]), TEST["labels"], strict=True
        )
    ]
    return float(np.mean(hits))


def test_one_line_loads_the_best_engine_and_it_reads_digits() -> None:
    with unirt.load(EXAMPLE / "digits.onnx") as session:
        assert accuracy(session) >= 0.97
        assert session.decision.how == "ranked"
        assert not session.decision.fell_back
        assert session.decision.candidate == unirt.select(EXAMPLE / "digits.onnx").best
        assert session.decision.to_dict()["selection"]["candidates"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tflite", "reference"])
def test_every_engine_reads_digits_under_the_same_names(backend: str) -> None:
    model = unirt.Model(EXAMPLE / "digits.onnx", beside=True)
    with unirt.load(model, backend) as session:
        assert session.decision.how == "named"
        assert [spec.name for spec in session.inputs] == ["image"]
        assert accuracy(session) >= 0.97


def test_the_engines_agree() -> None:
    model = unirt.Model(EXAMPLE / "digits.onnx", beside=True)
    answers = {}
    for backend in ("onnxruntime", "openvino", "tflite", "reference"):
        with unirt.load(model, backend) as session:
            answers[backend] = session.run(TEST["image"])["logits"]
    for backend, logits in answers.items():
        scale = np.abs(answers["reference"]).max()
        assert np.abs(logits - answers["reference"]).max() / scale < 1e-5, backend


def test_the_tflite_file_is_found_beside_only_when_asked() -> None:
    assert list(unirt.Model(EXAMPLE / "digits.onnx").formats) == ["onnx"]
    assert "tflite" in unirt.select(EXAMPLE / "digits.onnx").excluded.get("tflite@cpu", "")
    both = unirt.Model(EXAMPLE / "digits.onnx", beside=True)
    assert "tflite@cpu" in map(str, unirt.select(both).candidates)


@pytest.mark.usefixtures("onnxruntime_refuses")
def test_load_falls_to_the_next_with_a_log_line_and_a_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "unirt"), unirt.load(EXAMPLE / "digits.onnx") as session:
        decision = session.decision
        assert session.engine.backend.name != "onnxruntime"
    assert decision.fell_back
    assert str(decision.attempts[0].candidate) == "onnxruntime@cpu"
    assert "out of fairy dust" in str(decision.attempts[0].error)
    assert "out of fairy dust" in caplog.text


@pytest.mark.usefixtures("onnxruntime_refuses")
def test_a_named_candidate_never_falls_back() -> None:
    with pytest.raises(unirt.BuildError, match="out of fairy dust") as caught:
        unirt.load(EXAMPLE / "digits.onnx", "onnxruntime")
    assert isinstance(caught.value.__cause__, MemoryError)


@pytest.mark.usefixtures("onnxruntime_refuses")
def test_a_list_is_tried_in_its_own_order() -> None:
    wanted = ["reference", "openvino"]
    with unirt.load(EXAMPLE / "digits.onnx", wanted) as session:
        assert str(session.decision.candidate) == "reference"
        assert session.decision.how == "listed"
    with unirt.load(EXAMPLE / "digits.onnx", ["onnxruntime", "openvino"]) as session:
        assert session.decision.fell_back


@pytest.mark.usefixtures("onnxruntime_refuses")
def test_no_backend_left_names_every_reason() -> None:
    with pytest.raises(unirt.NoBackend) as caught:
        unirt.load(EXAMPLE / "digits.onnx", ["onnxruntime", "tflite", "openvino@gpu", "nothing"])
    reasons = caught.value.facts["reasons"]
    assert "fairy dust" in reasons["onnxruntime"]  # type: ignore[index]
    assert set(reasons) == {"onnxruntime", "tflite", "openvino@gpu", "nothing"}  # type: ignore[call-overload]


def test_the_environment_overrides_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIRT_BACKEND", "reference@cpu")
    with unirt.load(EXAMPLE / "digits.onnx") as session:
        assert session.engine.backend.name == "reference"
        assert session.decision.how == "environment"
    with unirt.load(EXAMPLE / "digits.onnx", "onnxruntime") as session:
        assert session.engine.backend.name == "onnxruntime"
    monkeypatch.setenv("UNIRT_BACKEND", "Warp 9")
    with pytest.raises(unirt.CandidateError, match="UNIRT_BACKEND"):
        unirt.load(EXAMPLE / "digits.onnx")
    monkeypatch.setenv("UNIRT_BACKEND", "warp@cpu")
    with pytest.raises(unirt.BackendUnavailable, match="warp"):
        unirt.load(EXAMPLE / "digits.onnx")


def test_options_without_a_named_candidate_say_whose_they_are() -> None:
    wanted, options = ["onnxruntime", "openvino"], {"onnxruntime": {"threads": 1}}
    with unirt.load(EXAMPLE / "digits.onnx", wanted, options=options) as session:
        assert session.engine.options.changed() == {"threads": 1}
    with pytest.raises(unirt.OptionError, match="which backend"):
        unirt.load(EXAMPLE / "digits.onnx", options={"threads": 1})
    for backend in ("onnxruntime", "openvino"):  # the one that loses is checked too
        with pytest.raises(unirt.OptionError, match="thread"):
            unirt.load(EXAMPLE / "digits.onnx", options={backend: {"thread": 1}})
    for wrong in ([1], 5, {"onnxruntime": 5}):
        with pytest.raises(unirt.OptionError):
            unirt.load(EXAMPLE / "digits.onnx", options=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [[], 5, "", ["onnxruntime", 7]])
def test_what_is_no_list_of_candidates_is_refused(wrong: Any) -> None:
    for ask in (unirt.load, unirt.select):
        with pytest.raises(unirt.CandidateError):
            ask(EXAMPLE / "digits.onnx", wrong)


def test_a_precision_the_graph_does_not_have_is_refused_with_the_reason() -> None:
    with unirt.load(EXAMPLE / "digits.onnx", "onnxruntime:fp32") as session:
        assert accuracy(session) >= 0.97
    with pytest.raises(unirt.BackendUnavailable, match=r"in float32.* to fp4"):
        unirt.load(EXAMPLE / "digits.onnx", "onnxruntime:fp4")
    wanted = [f"onnxruntime:{name}" for name in ("fp16", "int8", "int4w", "int4", "fp8", "fp7")]
    selection = unirt.select(EXAMPLE / "digits.onnx", wanted)
    assert set(map(str, selection.candidates)) == set(wanted[:3])
    assert "int4w" in selection.excluded["onnxruntime:int4"]
    assert re.search(r"recipe cpu.*, which has no fp8", selection.excluded["onnxruntime:fp8"])
    assert "'fp7' is no precision" in selection.excluded["onnxruntime:fp7"]


# --- quantized on the way ------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["onnxruntime:int8", ["onnxruntime:int8", "onnxruntime"]])
def test_activations_need_data_and_the_error_says_how_to_give_it(wanted: Any) -> None:
    with pytest.raises(unirt.DataError) as caught:
        unirt.load(EXAMPLE / "digits.onnx", wanted)
    for way in ("samples=[", "calibration=", "onnxruntime:int8w"):
        assert way in caught.value.remedy
    assert caught.value.candidate == "onnxruntime:int8"
    with unirt.load(EXAMPLE / "digits.onnx", "onnxruntime:int8w") as session:
        assert accuracy(session) >= 0.97


def test_a_decision_tells_recipe_calibration_and_nodes() -> None:
    images = [image[None] for image in TEST["image"][:50]]
    with unirt.load(EXAMPLE / "digits.onnx", "onnxruntime:int8", samples=images) as session:
        assert accuracy(session) >= 0.97
        told = session.decision.to_dict()
    assert told["quantization"]["recipe"] in ("cpu", "cpu-vnni")
    assert told["quantization"]["calibration"] == {"method": "mse", "samples": 50}
    assert told["quantization"]["nodes"] >= 6
    assert told["quantization"]["kept"] == {}
    assert "by mse of 50 samples" in told["notes"][0]
    with unirt.load(EXAMPLE / "digits.onnx", "onnxruntime") as session:
        assert session.decision.quantization is None
        assert session.decision.notes == ()


def test_all_listed_candidates_share_one_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = Refuses()
    refuses.name = "refuses"  # type: ignore[misc]
    monkeypatch.setitem(plugins._loaded, "refuses", Plugin("refuses", "test", refuses))
    calibrations: list[int] = []
    real = calibrate.observe_with

    def count(*given: Any) -> Any:
        calibrations.append(1)
        return real(*given)

    monkeypatch.setattr(calibrate, "observe_with", count)
    listed = ["refuses:int8", "openvino:int8"]
    images = (image[None] for image in TEST["image"][:8])
    with unirt.load(EXAMPLE / "digits.onnx", listed, samples=images) as session:
        assert session.decision.fell_back
        assert session.decision.quantization["calibration"]["samples"] == 8
    assert len(calibrations) == 1


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(unirt.BackendUnavailable, match="Did you mean 'openvino'"):
        unirt.load(EXAMPLE / "digits.onnx", "openvin")


def test_a_missing_model_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unirt.load(tmp_path / "nothing.onnx")


def test_devices_name_the_engines_that_see_them() -> None:
    cpu = unirt.devices()[0]
    assert str(cpu) == "cpu"
    assert {"onnxruntime", "openvino", "tflite", "reference"} <= set(cpu.facts["engines"])
    assert cpu.facts["usable_cpus"] >= 1


def test_an_error_survives_pickling_with_its_facts() -> None:
    with (
        pytest.raises(unirt.InputError) as caught,
        unirt.load(NETWORKS["affine"].model(["onnx"]), "onnxruntime") as session,
    ):
        session.run({"z": np.zeros(1)})
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.facts == caught.value.facts
    assert again.extra == ["z"]
    assert isinstance(again, ValueError)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "reference"])
def test_weights_beside_the_model_are_found_and_watched(backend: str, tmp_path: Path) -> None:
    import onnx

    case = NETWORKS["heavy"]
    path, weights = tmp_path / "heavy.onnx", tmp_path / "weights.bin"
    onnx.save(
        onnx.load_from_string(onnx_bytes("heavy")),
        path,
        save_as_external_data=True,
        location=weights.name,
        size_threshold=0,
    )
    model = unirt.Model(path)
    before = model.hash
    inputs = case.sample(3, 0)
    with unirt.load(model, backend) as session:
        case.check(inputs, session.run(inputs))
    flipped = bytearray(weights.read_bytes())
    flipped[100] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(unirt.ModelError, match="changed"):
        unirt.load(model, backend)
    assert unirt.Model(path).hash != before
