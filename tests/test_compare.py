"""Candidates side by side, with real engines and with real plugins whose answers are off."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import unirt
from unirt import accuracy, cli, plugins, precision
from unirt.comparison import Comparison, compare
from unirt.testing import NETWORKS

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
TEST = DIGITS / "test.npz"
with np.load(TEST) as _arrays:
    FEW = {name: array[:40] for name, array in _arrays.items()}
ENGINES = ("onnxruntime", "openvino", "tflite", "reference")

# A plugin as a stranger would publish it: onnxruntime's answers, bent as its option says.
BENT = """
import numpy as np
import unirt
from dataclasses import dataclass
from typing import Literal
from unirt import Options, option

@dataclass(frozen=True)
class BentOptions(Options):
    how: Literal["scaled", "nan", "shape", "dtype", "name", "raises", "late", "batch", "exact"] = (
        option("exact", "What is wrong with its answers.")
    )

class BentBackend(unirt.Backend):
    name = "bent"
    formats = ("onnx",)
    options = BentOptions

    def _probe(self):
        return unirt.Availability.yes("0.1", unirt.CPU)

    def _compile(self, file, device, options):
        print("bent compiles")
        return BentEngine(file.read(), options.how)

class BentEngine(unirt.Engine):
    def __init__(self, data, how):
        import onnxruntime
        self.runner = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self.how = how

    def _new_session(self):
        return BentSession(self.runner, self.how)

class BentSession(unirt.Session):
    concurrent = True

    def __init__(self, runner, how):
        self.runner, self.how, self.calls = runner, how, 0

    def _run(self, inputs):
        self.calls += 1
        names = [output.name for output in self.runner.get_outputs()]
        outputs = dict(zip(names, self.runner.run(names, dict(inputs))))
        first = outputs[names[0]]
        if self.how == "scaled":
            first *= np.float32(1.5)
        elif self.how == "nan":
            first.flat[0] = np.nan
        elif self.how == "shape":
            outputs[names[0]] = first[..., None]
        elif self.how == "dtype":
            outputs[names[0]] = first.astype(np.float64)
        elif self.how == "name":
            outputs["other"] = outputs.pop(names[0])
        elif self.how == "raises" or (self.how == "late" and self.calls > 20):
            raise RuntimeError("the vendor is out of luck")
        elif self.how == "batch" and len(first) > 1:
            first[1:] = 0
        return outputs

@unirt.hookimpl
def unirt_backend():
    return BentBackend()
"""


@pytest.fixture
def bent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The bent plugin, installed as pip leaves it, for this process."""
    site = tmp_path / "site"
    info = site / "unirt_bent-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "unirt_bent.py").write_text(BENT)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unirt-bent\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[unirt.backends]\nbent = unirt_bent\n")
    monkeypatch.syspath_prepend(site)
    yield site
    plugins._loaded.pop("bent", None)
    sys.modules.pop("unirt_bent", None)


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """How fast NumPy is on this machine decides nothing here, where a test does not say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unirt.comparison.ORACLE_SECONDS", 1e9)
        yield


@pytest.fixture(scope="module")
def model() -> unirt.Model:
    return unirt.Model(DIGITS / "digits.onnx", beside=True)


@pytest.fixture(scope="module")
def everyone(model: unirt.Model) -> Comparison:
    told: list[tuple[str, float]] = []
    comparison = compare(
        model, data=FEW, seconds=0.3, progress=lambda what, share: told.append((what, share))
    )
    assert {"building onnxruntime@cpu", "judging answers", "timing calls"} <= {w for w, _ in told}
    assert all(0 <= share <= 1 for _, share in told)
    return comparison


def row_of(comparison: Comparison, backend: str) -> Any:
    (row,) = [row for row in comparison.rows if row.candidate.backend == backend]
    return row


# --- real engines --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ENGINES)
def test_every_engine_reads_digits_and_they_agree(everyone: Comparison, backend: str) -> None:
    row = row_of(everyone, backend)
    assert not row.excluded
    assert row.task_accuracy >= 0.97
    assert row.task_accuracy == row_of(everyone, "reference").task_accuracy
    assert 0 < row.latency.best <= row.latency.median
    assert (row.latency.p95 is None) == (row.latency.calls < 20)
    assert row.latency.calls >= row.latency.rounds >= 2
    assert row.throughput > 0
    assert row.ratio >= 1
    assert row.build_seconds > 0
    assert row.version
    if backend == "reference":
        assert row.is_reference
        assert row.errors == ()
    else:
        (output,) = row.errors
        assert output.name == "logits"
        assert output.elements == 400
        assert 0 < output.relative < 1e-5
        assert output.snr_db > 100


def test_the_winner_is_the_fastest_and_says_why(everyone: Comparison) -> None:
    assert str(everyone.reference) == "reference@cpu"
    assert everyone.winner == everyone.rows[0].candidate
    medians = [row.latency.median for row in everyone.rows if row.latency]
    assert medians == sorted(medians)
    assert everyone.rows[0].ratio == 1
    assert str(everyone.rows[1].candidate) in everyone.why
    lead = medians[1] / medians[0]
    assert ("a lead below 15% is a tie here" in everyone.why) == (lead < 1.15)
    assert everyone.batch == 1
    assert "40 samples of the data with labels" in everyone.data
    assert "40 samples a call" in everyone.notes[0]


def test_a_comparison_is_json_and_text(everyone: Comparison) -> None:
    told = json.loads(json.dumps(everyone.to_dict(), allow_nan=False))
    assert told["winner"] == str(everyone.winner)
    assert told["machine"]["numpy"] == np.__version__
    rows = {row["candidate"]: row for row in told["candidates"]}
    assert all(rows[f"{name}@cpu"]["latency"]["calls"] > 0 for name in ENGINES)
    text = str(everyone)
    assert f"winner: {everyone.winner}" in text
    assert "accuracy 9" in text


def test_who_cannot_take_part_keeps_the_reason() -> None:
    comparison = compare(DIGITS / "digits.onnx", seconds=0.05)
    row = row_of(comparison, "tflite")
    assert "the model is there as onnx only" in row.excluded
    assert row.latency is None
    assert row.build_seconds is None
    assert comparison.data.startswith("random inputs, seed 0: image [1, 1, 8, 8]")
    assert row_of(comparison, "onnxruntime").task_accuracy is None


def test_listed_candidates_fail_one_by_one(model: unirt.Model) -> None:
    listed = ["nosuch", "openvino@npu:int8", "onnxruntime@cpu", "onnxruntime"]
    comparison = compare(model, listed, seconds=0.05)
    assert len(comparison.rows) == 3
    assert str(comparison.winner) == "onnxruntime@cpu"
    assert "the only eligible candidate" in comparison.why
    nosuch = row_of(comparison, "nosuch")
    assert isinstance(nosuch.error, unirt.BackendUnavailable)
    assert "There is no backend 'nosuch'." in nosuch.excluded
    assert isinstance(row_of(comparison, "openvino").error, unirt.BackendUnavailable)


def test_nobody_left_means_no_winner(model: unirt.Model) -> None:
    comparison = compare(model, ["nosuch", "openvino@npu"], TEST)
    assert comparison.winner is None
    assert comparison.reference is None
    assert comparison.why.startswith("none of the 2 candidates is eligible")


def test_a_batch_counts_in_samples(model: unirt.Model) -> None:
    comparison = compare(model, ["onnxruntime"], TEST, batch=30, seconds=0.1)
    (row,) = comparison.rows
    assert comparison.batch == 30
    assert comparison.notes == ()
    assert row.throughput >= 30 / row.latency.mean * 0.999
    randomly = compare(model, ["onnxruntime"], batch=3, seconds=0.05)
    assert randomly.batch == 3
    assert "image [3, 1, 8, 8]" in randomly.data
    with pytest.raises(unirt.DataError, match="batches of 3"):
        compare(model, ["onnxruntime"], {"image": np.zeros((2, 1, 1, 8, 8), "f4")}, batch=3)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_every_network_of_the_conformance_suite_compares(network: str) -> None:
    case = NETWORKS[network]
    listed = ["onnxruntime", "openvino", "reference"]
    comparison = compare(case.model(("onnx",)), listed, seconds=0.03)
    for row in comparison.rows:
        assert row.latency, row.excluded
        assert not row.excluded
    assert comparison.winner


def test_options_reach_their_engine_and_wrong_ones_are_the_callers_mistake(
    model: unirt.Model,
) -> None:
    chosen = {"onnxruntime": {"threads": 1}}
    assert compare(model, ["onnxruntime"], seconds=0.03, options=chosen).winner
    for options, told in (
        ({"onnxruntime": {"thread": 1}}, "Did you mean 'threads'"),
        ({"openvino": {}}, "options for 'openvino'"),
        ({"onnxruntime": 3}, "takes a mapping"),
    ):
        with pytest.raises(unirt.OptionError, match=told):
            compare(model, ["onnxruntime"], options=options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_error": -1},
        {"max_error": float("nan")},
        {"max_error": "x"},
        {"batch": 0},
        {"batch": 1.5},
        {"seconds": 0},
        {"seed": -1},
        {"seed": 1.5},
        {"data": TEST, "shapes": {"nosuch": 3}},
    ],
)
def test_arguments_are_checked(model: unirt.Model, wrong: Mapping[str, Any]) -> None:
    with pytest.raises(unirt.OptionError):
        compare(model, ["onnxruntime"], **wrong)


def test_an_empty_list_of_candidates_is_told_as_that(model: unirt.Model) -> None:
    with pytest.raises(unirt.OptionError, match="list of candidates is empty"):
        compare(model, [])


def test_a_batch_larger_than_the_data_is_refused(model: unirt.Model) -> None:
    with pytest.raises(unirt.DataError, match="fewer samples than the 1000"):
        compare(model, ["onnxruntime"], TEST, batch=1000)


def test_a_bad_model_bad_data_and_a_bad_candidate_raise(model: unirt.Model) -> None:
    with pytest.raises(unirt.ModelNotFound):
        compare("nosuch.onnx")
    with pytest.raises(unirt.CandidateError):
        compare(model, ["Not A Candidate"])
    with np.load(TEST) as arrays:
        image, labels = arrays["image"], arrays["labels"]
    for data, told in (
        ({"image": image, "labels": labels + 1}, "A label is 10.*has 10 classes"),
        ({"image": image, "labels": np.stack([labels, labels], 1)}, "fit no output"),
        ({"image": image[:9], "labels": labels}, "unequal length"),
        ({"image": image[:2], "labels": [[1], [1, 2]]}, "they are no array"),
        (DIGITS / "digits.onnx", "no .npz or .npy file"),
    ):
        with pytest.raises(unirt.DataError, match=told):
            compare(model, ["onnxruntime"], data)


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("scaled", r"not eligible: error 5\.0e-01 > 0\.01 against reference@cpu"),
        ("nan", "not eligible: error inf > 0.01"),
        ("shape", r"'logits' is float32 \[1, 10, 1\], and the reference's is float32 \[1, 10\]"),
        ("dtype", r"'logits' is float64"),
        ("name", "its outputs are other, and the reference's are logits"),
        ("raises", "the vendor is out of luck"),
    ],
)
def test_wrong_answers_cannot_win(bent: Path, model: unirt.Model, how: str, told: str) -> None:
    listed, options = ["bent", "onnxruntime"], {"bent": {"how": how}}
    comparison = compare(model, listed, FEW, seconds=0.05, options=options)
    row = row_of(comparison, "bent")
    assert str(comparison.winner) == "onnxruntime@cpu"
    assert row is comparison.rows[1]
    assert not row.to_dict()["eligible"]
    assert comparison.rows[0].ratio == 1
    assert re.search(told, row.excluded)
    assert (row.latency is not None) == (how in ("scaled", "nan"))
    if how == "raises":
        assert isinstance(row.error, unirt.BackendError)
        assert isinstance(row.error.__cause__, RuntimeError)


def test_the_limit_decides(bent: Path, model: unirt.Model) -> None:
    options = {"bent": {"how": "scaled"}}
    loose = compare(model, ["bent"], FEW, seconds=0.05, options=options, max_error=0.51)
    assert str(loose.winner) == "bent@cpu"
    assert "is within 0.51" in loose.why
    strict = compare(model, ["bent"], FEW, seconds=0.05, options=options, max_error=0.49)
    assert strict.winner is None
    assert strict.rows[0].ratio is None
    # Scaling all of an image's logits changes no decision, and the labels tell.
    assert strict.rows[0].task_accuracy >= 0.97


def test_answers_are_judged_as_timed_where_larger_calls_go_wrong(
    bent: Path, model: unirt.Model
) -> None:
    options = {"bent": {"how": "batch"}}
    comparison = compare(model, ["bent", "onnxruntime"], FEW, seconds=0.05, options=options)
    assert row_of(comparison, "bent").excluded == ""
    assert row_of(comparison, "bent").task_accuracy >= 0.97
    batched = compare(model, ["bent"], FEW, seconds=0.05, options=options, batch=2)
    assert "not eligible" in batched.rows[0].excluded


def test_one_that_fails_while_timed_is_out(bent: Path, model: unirt.Model) -> None:
    options = {"bent": {"how": "late"}}
    comparison = compare(model, ["bent", "onnxruntime"], FEW, seconds=0.05, options=options)
    assert "out of luck" in row_of(comparison, "bent").excluded
    assert str(comparison.winner) == "onnxruntime@cpu"


def test_no_limit_is_wide_enough_for_what_is_not_finite(bent: Path, model: unirt.Model) -> None:
    options = {"bent": {"how": "nan"}}
    wide = compare(
        model, ["bent", "onnxruntime"], FEW, seconds=0.05, options=options, max_error=float("inf")
    )
    assert "not finite" in row_of(wide, "bent").excluded
    assert str(wide.winner) == "onnxruntime@cpu"


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "complex64", "bfloat16"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("share", [1, 1000])
def test_nan_and_inf_fail_by_every_measure(kind: str, wrong: float, share: int) -> None:
    reference = np.linspace(1, 2, share).astype(unirt.TensorSpec("y", kind, ()).numpy_dtype)
    got = reference.copy()
    got[share // 2] = wrong
    for given, wanted in ((got, reference), (reference, got)):
        assert accuracy.max_abs_error(given, wanted) == np.inf
        assert accuracy.relative_error(given, wanted) == np.inf
        assert accuracy.snr_db(given, wanted) == -np.inf
        assert accuracy.share_differing(given, wanted) == 1 / share
        meter = accuracy.ErrorMeter()
        meter.add({"y": wanted}, {"y": wanted})
        assert meter.result()[0].error == 0, "the same in both is no error"
        meter.add({"y": given}, {"y": wanted})
        meter.add({"y": wanted}, {"y": wanted})
        (output,) = meter.result()
        assert (output.error, output.max_abs, output.snr_db) == (np.inf, np.inf, -np.inf)


@pytest.fixture(scope="module")
def fragile() -> tuple[bytes, dict[str, Any]]:
    """A classifier that int8 ruins, and samples on which its float32 is always right: one input
    channel is 1,000 times as large as the others, and counts as little.
    """
    random = np.random.default_rng(0)
    weight = random.standard_normal((16, 16)).astype(np.float32)
    weight[3] /= 1000
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "classes")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    x = random.standard_normal((200, 16)).astype(np.float32)
    x[:, 3] *= 1000
    return made.SerializeToString(), {"x": x, "labels": (x @ weight).argmax(1)}


def test_with_labels_low_precision_is_judged_by_accuracy(
    fragile: tuple[bytes, dict[str, Any]],
) -> None:
    listed = ["onnxruntime", "onnxruntime:int8", "openvino:int8"]
    kind = compare(DIGITS / "digits.onnx", listed, FEW, seconds=0.05)
    for row in kind.rows:
        assert row.excluded == ""
        assert row.gate == ("accuracy" if row.candidate.precision else "error")
    assert max(row.output_error for row in kind.rows) > 0.01
    assert (kind.max_error, kind.max_drop) == (0.01, 0.005)
    (note,) = (note for note in kind.notes if "decided by accuracy" in note)
    assert "openvino@cpu:int8" in note
    assert f"0.5 points below the reference's {kind.reference_accuracy:.2%}" in note
    model, data = fragile
    for name in ("onnxruntime:int8", "openvino:int8"):
        ruined = compare(model, ["onnxruntime", name], data, seconds=0.05)
        assert str(ruined.winner) == "onnxruntime@cpu"
        (row,) = (row for row in ruined.rows if row.candidate.precision)
        assert ruined.reference_accuracy == 1
        assert row.task_accuracy < 0.9
        assert re.search(
            r"its accuracy is \d+\.\d\d points below the 100\.00%.*0\.5 are allowed", row.excluded
        )


def test_the_winner_by_accuracy_says_so() -> None:
    comparison = compare(DIGITS / "digits.onnx", ["onnxruntime:int8"], FEW, seconds=0.05)
    assert str(comparison.winner) == "onnxruntime@cpu:int8"
    assert "is at most 0.5 points below the 97.50% of reference@cpu" in comparison.why
    assert "which is its gate" in str(comparison)
    told = json.loads(json.dumps(comparison.to_dict()))
    assert told["max_drop"] == 0.005
    assert told["reference_accuracy"] == 0.975
    assert told["candidates"][0]["gate"] == "accuracy"


def test_a_limit_that_was_given_rules_and_without_labels_the_error_does() -> None:
    listed = ["onnxruntime", "onnxruntime:int8"]
    strict = compare(DIGITS / "digits.onnx", listed, FEW, seconds=0.05, max_error=0.01)
    assert "error" in strict.rows[1].excluded
    assert {row.gate for row in strict.rows} == {"error"}
    assert strict.max_drop is None
    image = {"image": FEW["image"]}
    bare = compare(DIGITS / "digits.onnx", listed, image, seconds=0.05)
    assert "> 0.01 against" in bare.rows[1].excluded
    assert "judged by accuracy where the data has labels" in bare.rows[1].hint
    assert strict.rows[1].hint == ""


def test_a_graph_in_int8_is_judged_by_accuracy_too() -> None:
    made = precision.quantize(
        DIGITS / "digits.onnx", precision.calibrate(DIGITS / "digits.onnx", FEW), "int8", "cpu"
    ).model
    comparison = compare(made, ["onnxruntime", "openvino"], FEW, seconds=0.05)
    assert [row.gate for row in comparison.rows] == ["accuracy", "accuracy"]
    assert comparison.winner


def test_no_accuracy_makes_up_for_values_that_are_not_finite(
    bent: Path, model: unirt.Model
) -> None:
    """All answers are wrong by these labels, so that accuracy cannot fall."""
    data = {"image": FEW["image"], "labels": (FEW["labels"] + 1) % 10}
    options = {"bent": {"how": "nan"}}
    comparison = compare(model, ["bent:fp16"], data, seconds=0.05, options=options)
    (row,) = comparison.rows
    assert row.gate == "accuracy"
    assert row.task_accuracy <= comparison.reference_accuracy < 0.1
    assert "values are not finite" in row.excluded
    assert comparison.winner is None


# --- quantized on the way ------------------------------------------------------------------------


def test_all_are_quantized_from_one_calibration_on_the_data(calibrations: list[int]) -> None:
    listed = ["onnxruntime", "onnxruntime:int8", "openvino:int8", "openvino:int8w"]
    comparison = compare(DIGITS / "digits.onnx", listed, FEW, seconds=0.05, max_error=0.1)
    assert len(calibrations) == 1
    rows = {str(row.candidate): row for row in comparison.rows}
    assert rows["onnxruntime@cpu"].quantization is None
    for name in ("onnxruntime@cpu:int8", "openvino@cpu:int8"):
        row = rows[name]
        assert row.excluded == ""
        assert 1e-3 < row.output_error < 0.1
        assert row.quantization["recipe"].startswith("cpu")
        assert row.quantization["calibration"] == {"method": "mse", "samples": 40}
        assert "by mse of 40 samples" in row.notes[0]
    assert rows["openvino@cpu:int8w"].quantization["calibration"] is None
    text = str(comparison)
    assert text.count("quantized by cpu") == 3
    assert any("one calibration, by mse on 40 samples" in note for note in comparison.notes)
    assert any("what was calibrated on" in note for note in comparison.notes)
    told = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    by_name = {row["candidate"]: row for row in told["candidates"]}
    assert by_name["openvino@cpu:int8"]["quantization"]["nodes"] >= 6
    assert by_name["onnxruntime@cpu"]["notes"] == []


def test_ranges_of_random_inputs_are_told_as_that() -> None:
    comparison = compare(DIGITS / "digits.onnx", ["onnxruntime:int8"], seconds=0.05)
    assert any("random inputs" in note for note in comparison.notes)
    assert any("nor their errors are those of real data" in note for note in comparison.notes)
    plainly = compare(DIGITS / "digits.onnx", ["onnxruntime:int8w"], seconds=0.05)
    assert not any("calibrat" in note for note in plainly.notes)


def test_a_calibration_that_is_given_serves_instead(
    calibrations: list[int], tmp_path: Path
) -> None:
    found = precision.calibrate(DIGITS / "digits.onnx", FEW, method="percentile")
    path = found.save(tmp_path / "ranges.json")
    calibrations.clear()
    comparison = compare(
        DIGITS / "digits.onnx", ["onnxruntime:int8"], FEW, seconds=0.05, calibration=path
    )
    assert calibrations == []
    assert any("the calibration given, by percentile 99" in note for note in comparison.notes)
    command = ["compare", str(DIGITS / "digits.onnx"), "onnxruntime:int8", "--seconds", "0.05"]
    command += ["--calibration", str(path), "--data", str(TEST), "--max-error", "0.5"]
    done = CliRunner().invoke(cli.app, command, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert re.search(r"onnxruntime@cpu:int8 +quantized to int8 by the recipe cpu", done.stdout)


def test_data_that_nobody_can_calibrate_on_costs_only_those_who_must(
    calibrations: list[int],
) -> None:
    image = FEW["image"].copy()
    image[3, 0, 0, 0] = np.nan
    listed = ["onnxruntime", "onnxruntime:int8", "openvino:int8", "onnxruntime:int8w"]
    comparison = compare(DIGITS / "digits.onnx", listed, {"image": image}, seconds=0.05)
    assert len(calibrations) == 1
    for row in comparison.rows:
        if row.candidate.precision == "int8":
            assert isinstance(row.error, unirt.DataError)
            assert "holds NaN in sample 3" in row.excluded
        else:
            assert row.latency is not None


def test_a_quantized_engine_is_not_taken_for_the_trusted_one() -> None:
    wide = {"image": np.tile(FEW["image"], (60, 1, 1, 1))}  # too much for NumPy
    listed = ["onnxruntime:int8w", "openvino"]
    comparison = compare(DIGITS / "digits.onnx", listed, wide, seconds=0.05)
    assert str(comparison.reference) == "onnxruntime@cpu"
    assert row_of(comparison, "onnxruntime").output_error > 1e-3
    assert row_of(comparison, "openvino").output_error < 1e-5
    named = compare(
        DIGITS / "digits.onnx", ["onnxruntime"], FEW, reference="onnxruntime:int8w", seconds=0.05
    )
    assert str(named.reference) == "onnxruntime@cpu:int8w"
    assert named.rows[0].output_error > 1e-3


# --- the reference -------------------------------------------------------------------------------


def test_a_named_reference_need_not_take_part(model: unirt.Model) -> None:
    comparison = compare(model, ["onnxruntime"], FEW, reference="tflite", seconds=0.05)
    assert str(comparison.reference) == "tflite@cpu"
    assert len(comparison.rows) == 1
    assert 0 < comparison.rows[0].output_error < 1e-5


def test_a_named_reference_that_fails_is_an_error(bent: Path, model: unirt.Model) -> None:
    told: list[str] = []
    with pytest.raises(unirt.BackendUnavailable):
        compare(
            model,
            ["onnxruntime"],
            reference="openvino@npu",
            progress=lambda what, _: told.append(what),
        )
    assert told == []
    options = {"bent": {"how": "raises"}}
    for listed in (["onnxruntime"], ["onnxruntime", "bent"]):
        with pytest.raises(unirt.BackendError, match="out of luck"):
            compare(model, listed, FEW, reference="bent", options=options)


def test_a_model_too_large_for_numpy_is_judged_by_onnxruntime() -> None:
    wide = {"image": np.ones((3_000, 1, 8, 8), np.float32)}
    comparison = compare(DIGITS / "digits.onnx", ["openvino"], wide, seconds=0.05)
    assert str(comparison.reference) == "onnxruntime@cpu"
    assert 0 < comparison.rows[0].output_error < 1e-5
    everyone = compare(DIGITS / "digits.onnx", data=wide, seconds=0.05)
    assert "NumPy takes too long" in row_of(everyone, "reference").excluded


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """NumPy as it is on a busy machine, at 30 ms a sample; how many each of its calls held."""
    monkeypatch.setattr("unirt.comparison.ORACLE_SECONDS", 3.0)
    calls: list[int] = []
    with unirt.load(DIGITS / "digits.onnx", "reference") as session:
        numpy = type(session)
    with unirt.load(DIGITS / "digits.onnx", "onnxruntime") as fast:

        def slowly(_: Any, inputs: Mapping[str, Any]) -> Any:
            calls.append(len(inputs["image"]))
            time.sleep(0.03 * calls[-1])
            return fast.run(dict(inputs))

        monkeypatch.setattr(numpy, "_run", slowly)
        yield calls


def test_where_numpy_would_take_too_long_another_is_the_reference(
    slow: list[int], model: unirt.Model
) -> None:
    comparison = compare(model, ["openvino"], TEST, seconds=0.05)
    assert sum(slow) <= 9, "some calls tell how long all would take"
    assert str(comparison.reference) == "onnxruntime@cpu"
    (note,) = (note for note in comparison.notes if "NumPy" in note)
    assert re.search(r"NumPy would take some \d+ s for all answers; .*--reference", note)
    slow.clear()
    everyone = compare(model, data=TEST, seconds=0.05)
    assert sum(slow) <= 9
    row = row_of(everyone, "reference")
    assert "NumPy would take some" in row.excluded
    assert "Name it" in row.hint
    assert everyone.winner
    slow.clear()
    named = compare(model, data=TEST, reference="openvino", seconds=0.05)
    assert sum(slow) <= 9
    assert "NumPy would take some" in row_of(named, "reference").excluded


def test_numpy_is_not_asked_sample_by_sample_because_one_candidate_is_off(
    slow: list[int], bent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In calls of many it is fast, in calls of one it is not."""
    monkeypatch.setattr(time, "sleep", lambda seconds, wait=time.sleep: wait(0.02))
    options = {"bent": {"how": "scaled"}}
    comparison = compare(DIGITS / "digits.onnx", ["bent"], TEST, seconds=0.05, options=options)
    assert slow.count(1) <= 3
    assert str(comparison.reference) == "onnxruntime@cpu"
    assert "not eligible" in comparison.rows[0].excluded


def test_who_is_named_is_waited_for(
    slow: list[int], model: unirt.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unirt.comparison.ORACLE_SECONDS", 1.0)
    named = compare(model, ["openvino"], FEW, reference="reference", seconds=0.05)
    assert str(named.reference) == "reference@cpu"
    slow.clear()
    listed = compare(model, ["openvino", "reference"], FEW, seconds=0.05)
    assert str(listed.reference) == "reference@cpu"
    assert sum(slow) >= 40
    unnamed = compare(model, ["openvino"], FEW, seconds=0.05)
    assert str(unnamed.reference) == "onnxruntime@cpu"
    quick = compare(model, ["openvino"], {"image": FEW["image"][:5]}, seconds=0.05)
    assert str(quick.reference) == "reference@cpu"


def test_without_a_trusted_engine_the_first_that_runs_is_the_reference() -> None:
    comparison = compare(DIGITS / "digits.tflite", ["openvino", "tflite"], FEW, seconds=0.05)
    assert len(comparison.notes) == 1
    assert comparison.reference in {row.candidate for row in comparison.rows}
    assert comparison.winner
