"""`unirt quantize`, `cast` and `sparsify`: the models they write, what they tell, how they exit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

import unirt
from unirt import cli
from unirt.precision import Calibration, calibrate, check_sparsity, quantize

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL, TEST = EXAMPLES / "digits" / "digits.onnx", EXAMPLES / "digits" / "test.npz"
TFLITE = MODEL.with_suffix(".tflite")
STEM = "/features/features.0/Conv"


def unirt_(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "120"})
    assert done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def document(*arguments: object, code: int = 0) -> Any:
    return json.loads(unirt_(*arguments, "--json", code=code).stdout)


def accuracy(model: Path) -> float:
    data = np.load(TEST)
    with unirt.load(model, "onnxruntime", options={"optimization": "disable"}) as session:
        answers = session.run({"image": data["image"]})
    (logits,) = answers.values()
    return float((logits.argmax(1) == data["labels"]).mean())


def quantized_nodes(path: Path) -> set[str]:
    """Those whose weight comes out of a DequantizeLinear."""
    graph = onnx.load(path).graph
    made = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    return {n.name for n in graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] in made}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made.onnx"


# --- quantize ------------------------------------------------------------------------------------


def test_quantize_writes_the_graph_and_tells_what_it_costs(out: Path) -> None:
    told = document("quantize", MODEL, "--data", TEST, "--out", out)
    assert told["saved"] == str(out)
    assert (told["precision"], told["recipe"], told["samples"]) == ("int8", "tensorrt", 450)
    assert told["calibration"]["method"] == "mse"
    assert quantized_nodes(out) == set(told["nodes"])
    assert told["measured"]["accuracy"] == pytest.approx(accuracy(out), abs=0.003)
    assert told["accuracy_fp32"] == pytest.approx(accuracy(MODEL), abs=0.003)
    assert told["measured"]["snr_db"] > 25
    assert told["saved_hash"] == unirt.Model(out).hash
    assert any("other samples" in note for note in told["notes"])


def test_quantize_shows_each_node_and_what_that_costs(out: Path) -> None:
    text = unirt_("quantize", MODEL, "--data", TEST, "-o", out, "--keep", STEM).stdout
    for part in ("recipe    tensorrt, int8", "computes in", "it was told to stay", "Saved: "):
        assert part in text
    assert "Against float32: error" in text
    assert "points)" in text
    assert STEM not in quantized_nodes(out)
    assert len(quantized_nodes(out)) == 5


def test_a_recipe_is_named_or_follows_from_the_engine(out: Path) -> None:
    made = {}
    for choice in (["--recipe", "cpu"], ["--for", "onnxruntime@cpu"], ["--recipe", "auto"]):
        told = document("quantize", MODEL, "--data", TEST, "-o", out, *choice)
        made[choice[1]] = told["recipe"]
        assert (
            out.read_bytes()
            == quantize(MODEL, calibrate(MODEL, TEST), "int8", told["recipe"]).model.primary.read()
        )
    assert made["cpu"] == "cpu"
    assert made["onnxruntime@cpu"] == made["auto"]
    assert made["auto"] in ("cpu", "cpu-vnni")
    told = document("quantize", MODEL, "--data", TEST, "-o", out, "--for", "tensorrt")
    assert told["recipe"].startswith("tensorrt")  # -rtx where that is what is installed


def test_a_calibration_is_saved_and_used_again(out: Path, tmp_path: Path) -> None:
    ranges = tmp_path / "ranges.json"
    common = ["quantize", MODEL, "-o", out]
    document(*common, "--data", TEST, "--method", "max", "--save-calibration", ranges)
    first = out.read_bytes()
    assert Calibration.load(ranges).method == "max"
    told = document(*common, "--calibration", ranges)
    assert out.read_bytes() == first
    assert told["measured"] is None, "there was no data to measure on"
    assert "not measured" in unirt_(*common, "--calibration", ranges).stdout
    told = document(*common, "--calibration", ranges, "--test", TEST)
    assert told["samples"] == 450


def named_strangely(path: Path) -> Path:
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["/a:0/b=c"], "/a:0/MatMul"),
        helper.make_node("MatMul", ["/a:0/b=c", "w"], ["y"], "name with space, =:/"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_names_may_hold_slashes_colons_and_equals_signs(out: Path, tmp_path: Path) -> None:
    model = named_strangely(tmp_path / "strange.onnx")
    ranges = ["--range", "x=-1:1", "--range", "/a:0/b=c=-12.7:6"]
    told = document("quantize", model, *ranges, "--keep", "/a:0/MatMul", "-o", out)
    assert told["nodes"] == ["name with space, =:/"]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert stored["/a:0/b=c__scale"] == np.float32(0.1)
    told = document("quantize", model, *ranges, "--keep", "name with space, =:/", "-o", out)
    assert told["nodes"] == ["/a:0/MatMul"]


def test_weights_alone_need_neither_data_nor_ranges(out: Path) -> None:
    told = document("quantize", MODEL, "--precision", "int8-weights", "-o", out, "--test", TEST)
    assert told["calibration"] is None
    assert told["measured"]["snr_db"] > 30
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(out).graph.node}


def with_a_weak_node(folder: Path) -> tuple[Path, Path]:
    """A classifier of which `c` cannot bear int8: its input has one channel 1,000 times larger."""
    random = np.random.default_rng(0)
    weights = [random.standard_normal((16, 16)).astype(np.float32) / 4 for _ in range(4)]
    weights[1][:, 5] *= 1000
    weights[2][5] /= 1000
    nodes, x = [], "x"
    for name in "abcd":
        nodes.append(helper.make_node("MatMul", [x, f"w{name}"], [f"{name}.out"], name))
        nodes.append(helper.make_node("Tanh" if name == "d" else "Relu", [f"{name}.out"], [name]))
        x = name
    nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(w, f"w{name}") for w, name in zip(weights, "abcd", strict=True)],
    )
    path, data = folder / "weak.onnx", folder / "weak.npz"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    inputs = random.standard_normal((400, 16)).astype(np.float32)
    with unirt.load(path, "onnxruntime") as session:
        labels = session.run({"x": inputs})["y"].argmax(1)
    np.savez(data, x=inputs, labels=labels)
    return path, data


def test_with_a_budget_it_ends_with_a_graph_a_table_and_the_nodes_kept(
    out: Path, tmp_path: Path
) -> None:
    model, data = with_a_weak_node(tmp_path)
    common = ["quantize", model, "--data", data, "--method", "max", "-o", out]
    told = document(*common, "--max-drop", "5%")
    found = told["search"]
    assert found["met"]
    assert found["kept"] == ["c"]
    assert found["budget"]["max_drop"] == 0.05
    assert found["sensitivity"]["nodes"][0]["node"] == "c"
    assert found["sensitivity"]["whole"]["accuracy"] < 0.5
    assert told["measured"]["accuracy"] >= 0.95
    assert told["kept"] == {"c": "kept for the budget"}
    makers = {n.output[0]: n.op_type for n in onnx.load(out).graph.node}
    nodes = {n.name: n for n in onnx.load(out).graph.node}
    assert makers.get(nodes["d"].input[1]) == "DequantizeLinear"
    assert nodes["c"].input[1] == "wc"
    text = unirt_(*common, "--max-drop", "0.05").stdout
    for part in ("falls by at most 5 points", "share", "kept for the budget", "All quantized:"):
        assert part in text
    row = next(line.split() for line in text.splitlines() if line.startswith("c "))
    assert row[1] == "float32"
    assert float(row[2].rstrip("%")) > 90


def test_where_no_graph_meets_the_budget_none_is_written(out: Path, tmp_path: Path) -> None:
    model, data = with_a_weak_node(tmp_path)
    out.write_text("what was there")
    common = ["quantize", model, "--data", data, "-o", out, "--min-snr", "200"]
    text = unirt_(*common, code=1).stdout
    assert "Nothing was saved" in text
    told = document(*common, code=1)
    assert told["saved"] is None
    assert not told["search"]["met"]
    assert out.read_text() == "what was there"


def test_a_tflite_is_quantized_to_a_tflite(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_quantizer")
    made = tmp_path / "made.tflite"
    names = {spec.name for spec in unirt.Model(TFLITE).inputs}
    (name,) = names
    data = np.load(TEST)
    image = data["image"]
    shape = unirt.Model(TFLITE).inputs[0].shape or ()
    images = image if shape[-1] != 1 else np.ascontiguousarray(image.transpose(0, 2, 3, 1))
    np.savez(tmp_path / "nhwc.npz", **{name: images, "labels": data["labels"]})
    told = document("quantize", TFLITE, "--data", tmp_path / "nhwc.npz", "-o", made)
    assert told["recipe"] == "litert"
    assert told["nodes"]
    assert told["engine"] == "tflite@cpu"
    assert told["measured"]["accuracy"] == pytest.approx(told["accuracy_fp32"], abs=0.01)
    assert unirt.Model(made).primary.format == "tflite"
    assert made.stat().st_size < TFLITE.stat().st_size


def test_the_model_itself_is_never_overwritten(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(MODEL, model)
    before = model.read_bytes()
    (tmp_path / "link.onnx").symlink_to(model)
    for same in (model, tmp_path / "link.onnx", tmp_path / "." / "model.onnx"):
        for command in (
            ["quantize", model, "--data", TEST],
            ["cast", model, "fp16"],
            ["sparsify", model],
        ):
            assert "file of the model itself" in unirt_(*command, "-o", same, code=2).stderr
    assert model.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.onnx", "model.onnx"]


def test_weights_in_other_files_are_read_and_not_overwritten(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save_model(
        onnx.load(MODEL), model, save_as_external_data=True, location="w.onnx", size_threshold=0
    )
    before = (tmp_path / "w.onnx").read_bytes()
    unirt_("quantize", model, "--data", TEST, "-o", tmp_path / "w.onnx", code=2)
    assert (tmp_path / "w.onnx").read_bytes() == before
    made = tmp_path / "made.onnx"
    unirt_("quantize", model, "--data", TEST, "-o", made)
    direct = tmp_path / "direct.onnx"
    unirt_("quantize", MODEL, "--data", TEST, "-o", direct)
    assert accuracy(made) == accuracy(direct)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a folder to be refused")
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    unirt_("cast", MODEL, "fp16", "-o", closed / "made.onnx", code=2)


def test_what_was_there_stays_where_the_new_file_cannot_be_written(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_text("what was there")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "No space left" in unirt_("cast", MODEL, "fp16", "-o", out, code=3).stderr
    assert out.read_text() == "what was there"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


# --- cast and sparsify ---------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "stored"), [("fp16", 10), ("bf16", 16)])
def test_cast_writes_the_narrower_model(out: Path, precision: str, stored: int) -> None:
    told = document("cast", MODEL, precision, "-o", out)
    assert told["saved_hash"] == unirt.Model(out).hash
    assert told["bytes"] == out.stat().st_size < 0.6 * MODEL.stat().st_size
    weights = onnx.load(out).graph.initializer
    assert stored in {tensor.data_type for tensor in weights}
    assert [spec.dtype for spec in unirt.Model(out).inputs] == ["float32"]
    document("cast", MODEL, precision, "-o", out, "--io")
    wanted = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert [spec.dtype for spec in unirt.Model(out).inputs] == [wanted]


def test_cast_tells_what_stays(tmp_path: Path, out: Path) -> None:
    quantized = tmp_path / "int8.onnx"
    unirt_("quantize", MODEL, "--data", TEST, "-o", quantized)
    text = unirt_("cast", quantized, "fp16", "-o", out).stdout
    assert "quantization keeps its scales in float32" in text
    assert f"Saved: {out}" in text


def test_sparsify_prunes_and_measures_or_only_checks(out: Path) -> None:
    checked = document("sparsify", MODEL, "--check")
    fit = [layer["node"] for layer in checked["layers"] if layer["qualifies"]]
    assert fit
    assert "qualify" in unirt_("sparsify", MODEL, "--check").stdout
    told = document("sparsify", MODEL, "-o", out, "--data", TEST)
    assert [one["node"] for one in told["nodes"]] == fit
    assert {layer.node for layer in check_sparsity(out) if layer.sparse} == set(fit)
    assert told["measured"]["accuracy"] == pytest.approx(accuracy(out), abs=0.003)
    assert told["measured"]["accuracy"] < told["accuracy_before"]
    text = unirt_("sparsify", MODEL, "-o", out, "--keep", fit[0]).stdout
    assert "it is to be kept" in text
    assert fit[0] not in {layer.node for layer in check_sparsity(out) if layer.sparse}


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["quantize", MODEL], 3, "DataError"),
        (["quantize", "nosuch.onnx", "--data", TEST], 3, "ModelNotFound"),
        (["quantize", MODEL, "--data", "nosuch.npz"], 3, "DataError"),
        (["quantize", MODEL, "--data", TEST, "--precision", "int7"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--recipe", "gpu"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--for", "nosuch"], 1, "BackendUnavailable"),
        (["quantize", MODEL, "--data", TEST, "--for", "Not@One"], 2, "CandidateError"),
        (["quantize", MODEL, "--data", TEST, "--for", "tflite"], 2, "OptionError"),
        (
            ["quantize", MODEL, "--data", TEST, "--for", "onnxruntime", "--recipe", "cpu"],
            2,
            "OptionError",
        ),
        (["quantize", MODEL, "--data", TEST, "--keep", "nosuch"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--range", "image"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--range", "image=1:2:3"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--range", "image=2:1"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--range", "nosuch=0:1"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--max-drop", "half"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--max-drop", "200%"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--max-error", "nan"], 2, "OptionError"),
        (["quantize", MODEL, "--range", "image=0:1", "--min-snr", "9"], 2, "OptionError"),
        (["quantize", MODEL, "--data", TEST, "--calibration", "nosuch.json"], 3, "DataError"),
        (["quantize", MODEL, "--test", TEST, "--method", "max"], 2, "OptionError"),
        (["quantize", MODEL, "--save-calibration", "ranges.json"], 2, "OptionError"),
        (
            ["quantize", MODEL, "--data", TEST, "--method", "max", "--percentile", "99"],
            2,
            "OptionError",
        ),
        (
            ["quantize", MODEL, "--data", TEST, "--save-calibration", "/no/such/r.json"],
            2,
            "OptionError",
        ),
        (
            ["quantize", MODEL, "--precision", "int8-weights", "--range", "image=0:1"],
            2,
            "OptionError",
        ),
        (["quantize", MODEL, "--data", TEST, "--engine", "onnxruntime:int8"], 2, "OptionError"),
        (["quantize", TEST, "--data", TEST], 3, "ModelError"),
        (["cast", "nosuch.onnx", "fp16"], 3, "ModelNotFound"),
        (["cast", TEST, "fp16"], 3, "ModelError"),
        (["sparsify", MODEL, "--node", STEM], 2, "OptionError"),
        (["sparsify", MODEL, "--keep", "nosuch"], 2, "OptionError"),
        (["sparsify", MODEL, "--check"], 2, "OptionError"),
    ],
)
def test_errors_are_three_lines_or_json_and_write_nothing(
    out: Path, arguments: list[object], code: int, told: str
) -> None:
    done = unirt_(*arguments, "-o", out, code=code)
    assert done.stdout == ""
    assert "error: " in done.stderr
    error = document(*arguments, "-o", out, code=code)["error"]
    assert error["type"] == told
    assert all(error[part] for part in ("what", "why", "remedy"))
    assert not any(out.parent.iterdir())


@pytest.mark.parametrize("name", ["made.tflite", "made", "no/such/folder/made.onnx", "."])
def test_an_out_that_cannot_be_is_told_at_once(tmp_path: Path, name: str) -> None:
    for command in (["quantize", MODEL, "--data", TEST], ["cast", MODEL, "fp16"]):
        shown = unirt_(*command, "-o", tmp_path / name, code=2).stderr
        assert "cannot be written" in " ".join(shown.split())
    unirt_("sparsify", MODEL, "-o", tmp_path / name, code=2)


def test_two_files_are_not_written_to_one_place(out: Path) -> None:
    common = ["quantize", MODEL, "--data", TEST, "-o", out]
    assert "same file" in unirt_(*common, "--save-calibration", out, code=2).stderr
    unirt_("quantize", MODEL, "--data", TEST, "-o", TEST, code=2)
    unirt_("sparsify", MODEL, code=2)
    unirt_("cast", MODEL, "fp8", "-o", out, code=2)
    assert not out.exists()


def test_a_tflite_has_no_budget(tmp_path: Path) -> None:
    common = ["quantize", TFLITE, "-o", tmp_path / "made.tflite", "--data", TEST]
    assert "ONNX graph" in unirt_(*common, "--max-drop", "1%", code=2).stderr
    assert "one recipe" in unirt_(*common, "--recipe", "cpu", code=2).stderr
    unirt_(*common, "--for", "tensorrt", code=2)
