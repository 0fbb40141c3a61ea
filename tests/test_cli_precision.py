"""`unirt calibrate`, `sensitivity`, `quantize`, `cast`, `sparsify`: what they write and what they
tell, and how they exit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

import unirt
from unirt import cli, plugins
from unirt.accuracy import snr_db
from unirt.precision import (
    Calibration,
    calibrate,
    check_sparsity,
    observe,
    quantize,
    recipe_for,
    second_moments,
    sensitivity,
)

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


def best_recipe() -> str:
    """What is taken where neither --recipe nor --for is given."""
    tensorrt = plugins.plugin("tensorrt")
    if tensorrt is not None and tensorrt.availability.available:
        assert tensorrt.backend is not None
        return tensorrt.backend.quantization
    return recipe_for("onnxruntime", unirt.devices()[0].facts["instruction_sets"]).name


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made.onnx"


# --- quantize ------------------------------------------------------------------------------------


def test_quantize_writes_the_graph_and_tells_what_it_costs(out: Path) -> None:
    told = document("quantize", MODEL, "--data", TEST, "--out", out)
    assert told["saved"] == str(out)
    assert (told["precision"], told["recipe"], told["samples"]) == ("int8", best_recipe(), 450)
    assert told["engine"] == "onnxruntime@cpu, Q/DQ as written"
    assert told["calibration"]["method"] == "mse"
    assert quantized_nodes(out) == {name for name in told["nodes"] if "Pool" not in name}
    assert told["measured"]["accuracy"] == pytest.approx(accuracy(out), abs=0.003)
    assert told["accuracy_fp32"] == pytest.approx(accuracy(MODEL), abs=0.003)
    assert told["measured"]["snr_db"] > 25
    assert told["saved_hash"] == unirt.Model(out).hash
    assert any("other samples" in note for note in told["notes"])


def test_quantize_shows_each_node_and_what_that_costs(out: Path) -> None:
    text = unirt_("quantize", MODEL, "--data", TEST, "-o", out, "--keep", STEM).stdout
    for part in (f"recipe     {best_recipe()}, for ", "computes in", "it was told to stay"):
        assert part in text
    assert "on 450 samples by onnxruntime@cpu, Q/DQ as written" in text
    assert "Against float32: error" in text
    assert "points)" in text
    assert STEM not in quantized_nodes(out)
    assert len(quantized_nodes(out)) == 5
    assert f"Saved: {out}" in text.replace("\n", "")


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


def test_weights_are_rounded_on_samples_where_they_are_given(out: Path) -> None:
    common = ["quantize", MODEL, "--data", TEST, "-o", out, "--recipe", "cpu"]
    alone = document(*common)
    told = document(*common, "--round-on", TEST)
    assert told["measured"]["snr_db"] > alone["measured"]["snr_db"] + 0.2
    assert any("errors cancel out on 450 samples" in note for note in told["notes"])
    own = "the samples that its weights were rounded on"
    assert any(own in note for note in told["notes"])
    assert not any(own in note for note in alone["notes"])
    ranges, moments = calibrate(MODEL, TEST), second_moments(MODEL, TEST)
    made = quantize(MODEL, ranges, "int8", "cpu", moments=moments)
    assert out.read_bytes() == made.model.primary.read()
    found = document(*common, "--round-on", TEST, "--min-snr", "20")
    assert found["measured"]["snr_db"] == pytest.approx(told["measured"]["snr_db"])
    table = document("sensitivity", *common[1:4], "--recipe", "cpu", "--round-on", TEST)
    assert table["whole"]["snr_db"] == pytest.approx(told["measured"]["snr_db"])


def test_without_a_name_the_recipe_is_that_of_the_best_engine_here(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["quantize", MODEL, "--data", TEST, "-o", out]
    plugin = plugins.plugin

    def with_devices(*devices: unirt.Device) -> None:
        backend = SimpleNamespace(quantization="tensorrt-rtx")
        found = SimpleNamespace(backend=backend, availability=SimpleNamespace(devices=devices))
        monkeypatch.setattr(
            plugins, "plugin", lambda name: found if name == "tensorrt" else plugin(name)
        )

    with_devices()
    told = document(*common)
    assert told["recipe"] == document(*common, "--recipe", "auto")["recipe"]
    assert told["recipe"].startswith("cpu")
    assert "this CPU, which has" in told["recipe_why"]
    told = document(*common, "--precision", "fp8", "--method", "max")
    assert (told["recipe"], told["recipe_why"]) == ("tensorrt", "since no CPU's has fp8")
    unirt_(*common, "--precision", "fp8", "--recipe", "auto", code=2)
    with_devices(unirt.Device("cuda", 0))
    told = document(*common)
    assert told["recipe"] == "tensorrt-rtx"
    assert told["recipe_why"] == "for tensorrt@cuda:0, which is here"
    assert told["engine"] == "onnxruntime@cpu, Q/DQ as written"
    assert document(*common, "--recipe", "cpu")["recipe_why"] == "as named"


def saturating(folder: Path) -> tuple[Path, Path]:
    """In the full range of int8, sums of two products exceed 16 bits on a CPU without VNNI."""
    random = np.random.default_rng(3)
    weight = random.choice([-1.0, 1.0], (16, 16)) + random.standard_normal((16, 16)) / 9
    weights = [np.abs(weight), weight, np.abs(weight)]
    nodes, x = [], "x"
    for name in "abc":
        nodes.append(helper.make_node("MatMul", [x, f"w{name}"], [f"{name}.out"], name))
        nodes.append(helper.make_node("Relu", [f"{name}.out"], [name]))
        x = name
    nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [
            numpy_helper.from_array(w.astype(np.float32), f"w{name}")
            for w, name in zip(weights, "abc", strict=True)
        ],
    )
    path, data = folder / "saturating.onnx", folder / "saturating.npz"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    np.savez(data, x=np.abs(random.standard_normal((64, 16))).astype(np.float32))
    return path, data


def ratio(model: Path, made: Path, data: Path, engine: str) -> float:
    """The dB that the made graph has on an engine as everybody gets it."""
    feed = {"x": np.load(data)["x"]}
    with unirt.load(made, engine) as low, unirt.load(model, engine) as whole:
        return snr_db(low.run(feed)["y"], whole.run(feed)["y"])


@pytest.mark.parametrize(
    ("choice", "engine"),
    [
        (["--recipe", "tensorrt", "--engine", "onnxruntime"], "onnxruntime@cpu"),
        (["--recipe", "tensorrt", "--engine", "openvino@cpu"], "openvino@cpu"),
        (["--for", "openvino"], "openvino@cpu"),
        (["--for", "onnxruntime:int8", "--rest", "fp16"], "onnxruntime@cpu"),
    ],
)
@pytest.mark.parametrize("budget", [[], ["--min-snr", "2"]])
def test_what_is_told_is_what_that_engine_answers(
    out: Path, tmp_path: Path, choice: list[str], engine: str, budget: list[str]
) -> None:
    model, data = saturating(tmp_path)
    common = ["quantize", model, "--data", data, "--method", "max", "-o", out, *choice, *budget]
    told = document(*common)
    assert told["engine"] == engine
    assert told["measured"]["snr_db"] == pytest.approx(ratio(model, out, data, engine), abs=0.01)
    assert re.search(rf"on 64 samples by {engine} *\n", unirt_(*common).stdout)


def test_no_budget_is_certified_that_the_named_engine_misses(out: Path, tmp_path: Path) -> None:
    model, data = saturating(tmp_path)
    made = tmp_path / "all.onnx"
    common = ["quantize", model, "--data", data, "--method", "max", "--recipe", "tensorrt"]
    unirt_(*common, "-o", made)
    if ratio(model, made, data, "onnxruntime") > 30:
        pytest.skip("this CPU adds int8 products in 32 bits, and is as right as the graph")
    assert document(*common, "-o", out, "--min-snr", "35")["search"]["kept"] == []
    told = document(*common, "-o", out, "--min-snr", "35", "--engine", "onnxruntime")
    assert told["search"]["kept"]
    assert ratio(model, out, data, "onnxruntime") >= 35


def test_where_the_target_is_not_here_another_measures_and_that_is_told(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["quantize", MODEL, "--data", TEST, "-o", out]
    told = document(*common, "--for", "openvino@npu")
    assert told["engine"] == "onnxruntime@cpu, Q/DQ as written"
    (note,) = (note for note in told["notes"] if "was not measured on openvino@npu" in note)
    assert "which shall run it" in note
    backend = type(plugins.plugin("openvino").backend)  # type: ignore[union-attr]
    compile_ = backend._compile

    def refuse(self: Any, file: Any, *rest: Any) -> Any:
        if "QuantizeLinear" in file.op_counts:
            raise RuntimeError("no kernel for that")
        return compile_(self, file, *rest)

    monkeypatch.setattr(backend, "_compile", refuse)
    for budget in ([], ["--min-snr", "10"]):
        told = document(*common, "--for", "openvino", *budget)
        assert told["engine"] == "onnxruntime@cpu, Q/DQ as written"
        assert any("no kernel for that" in note for note in told["notes"])
    assert "no kernel for that" in unirt_(*common, "--engine", "openvino", code=4).stderr
    assert not any("shall run it" in note for note in document(*common)["notes"])


def test_only_the_named_nodes_are_quantized(out: Path) -> None:
    gemm = "/classify/classify.2/Gemm"
    common = ["quantize", MODEL, "--data", TEST, "-o", out]
    told = document(*common, "--only", STEM, "--only", gemm)
    assert told["nodes"] == [STEM, gemm]
    assert quantized_nodes(out) == {STEM, gemm}
    assert "no such node" in unirt_(*common, "--only", "nosuch", code=2).stderr
    assert "budget" in unirt_(*common, "--only", STEM, "--min-snr", "9", code=2).stderr
    assert (
        "ONNX graph"
        in unirt_(
            "quantize", TFLITE, "--data", TEST, "-o", out.with_suffix(".tflite"), "--only", "x",
            code=2,
        ).stderr
    )  # fmt: skip


def test_bins_are_those_of_the_histograms(out: Path, tmp_path: Path) -> None:
    saved = tmp_path / "ranges.json"
    common = ["quantize", MODEL, "--data", TEST, "-o", out, "--method", "entropy"]
    document(*common, "--bins", "512", "--save-calibration", saved)
    ranges = Calibration.load(saved).ranges
    assert ranges == calibrate(MODEL, TEST, method="entropy", bins=512).ranges
    assert ranges != calibrate(MODEL, TEST, method="entropy").ranges
    assert "power of two" in unirt_(*common, "--bins", "0", code=2).stderr


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
    ranges += ["--recipe", "tensorrt"]
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


# --- calibrate and sensitivity ------------------------------------------------------------------


def test_calibrate_shows_four_methods_side_by_side_and_saves_one(tmp_path: Path) -> None:
    saved = tmp_path / "ranges.json"
    common = ["calibrate", MODEL, "--data", TEST]
    told = document(*common, "-o", saved, "--method", "entropy", "--bins", "1024")
    observed = observe(MODEL, TEST, bins=1024)
    assert [one["tensor"] for one in told["tensors"]] == [*observed.histograms]
    for method in ("max", "percentile", "mse", "entropy"):
        wanted = observed.calibration(method).ranges  # type: ignore[arg-type]
        found = {one["tensor"]: tuple(one["ranges"][method]) for one in told["tensors"]}
        assert found == {name: (one.low, one.high) for name, one in wanted.items()}
    assert (told["samples"], told["method"], told["saved"]) == (450, "entropy", str(saved))
    assert Calibration.load(saved).ranges == observed.calibration("entropy").ranges
    text = unirt_(*common, "-o", saved).stdout
    assert "450 samples, run once by onnxruntime@cpu" in text
    assert re.search(r"tensor +max +percentile +mse +entropy", text)
    assert "15 ranges by mse of 450 samples" in " ".join(text.split())
    assert Calibration.load(saved).method == "mse"
    assert "Nothing was saved" in unirt_(*common).stdout


def test_calibrate_shows_those_first_on_which_the_methods_differ_most() -> None:
    common = ["calibrate", MODEL, "--data", TEST]
    text = unirt_(*common, "--most", "3").stdout
    assert "and 12 tensors more, on which the methods differ less; --most 15 shows all" in text
    rows = re.findall(r"^(/\S+|image|logits) +(\S+:\S+) +(\S+) +(\S+) +(\S+:\S+)", text, re.M)
    assert len(rows) == 3
    tensors = document(*common)["tensors"]

    def spread(one: Any) -> float:
        sizes = [max(map(abs, ends)) for ends in one["ranges"].values()]
        return max(sizes) / min(sizes)

    widest = sorted(tensors, key=spread, reverse=True)[:3]
    assert [row[0] for row in rows] == [one["tensor"] for one in widest]
    low, high = widest[0]["ranges"]["max"]
    assert rows[0][1] == f"{low:.4g}:{high:.4g}"
    assert "more" not in unirt_(*common).stdout


def test_what_calibrate_saves_is_what_quantize_takes(out: Path, tmp_path: Path) -> None:
    saved = tmp_path / "ranges.json"
    unirt_("calibrate", MODEL, "--data", TEST, "-o", saved, "--percentile", "99")
    assert Calibration.load(saved).method == "percentile 99"
    assert "percentile 99" in unirt_("calibrate", MODEL, "--data", TEST, "--percentile", 99).stdout
    unirt_("quantize", MODEL, "--calibration", saved, "-o", out)
    direct = out.with_name("direct.onnx")
    unirt_("quantize", MODEL, "--data", TEST, "--percentile", "99", "-o", direct)
    assert out.read_bytes() == direct.read_bytes()


def test_sensitivity_tells_what_each_node_costs(tmp_path: Path) -> None:
    model, data = with_a_weak_node(tmp_path)
    common = ["sensitivity", model, "--data", data, "--method", "max", "--recipe", "tensorrt"]
    told = document(*common)
    ranges = calibrate(model, data, method="max")
    table = sensitivity(model, ranges, data)
    assert told["nodes"] == json.loads(json.dumps(table.to_dict()["nodes"]))
    assert told["engine"] == "onnxruntime@cpu, Q/DQ as written"
    assert (told["recipe"], told["recipe_why"]) == ("tensorrt", "as named")
    assert told["calibration"]["method"] == "max"
    text = unirt_(*common).stdout
    assert re.search(r"node +share +error +SNR dB +accuracy *\nc +(9\d\.\d|100\.0)% ", text)
    assert "on 400 samples by onnxruntime@cpu, Q/DQ as written" in text
    assert "All quantized: error" in text
    assert "other samples" in " ".join(text.split())
    saved = tmp_path / "ranges.json"
    ranges.save(saved)
    some = document(
        "sensitivity", model, "--test", data, "--calibration", saved, "--node", "a", "--node", "c",
        "--for", "openvino",
    )  # fmt: skip
    assert {one["node"] for one in some["nodes"]} == {"a", "c"}
    assert some["engine"] == "openvino@cpu"
    weights = document("sensitivity", model, "--data", data, "--precision", "int8-weights")
    assert weights["precision"] == "int8-weights"
    assert weights["calibration"] is None


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
        (["quantize", MODEL, "--data", TEST, "--round-on", "nosuch.npz"], 3, "DataError"),
        (
            ["quantize", MODEL, "--data", TEST, "--precision", "fp8", "--round-on", TEST],
            2,
            "OptionError",
        ),
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
        (["calibrate", "nosuch.onnx", "--data", TEST], 3, "ModelNotFound"),
        (["calibrate", MODEL, "--data", "nosuch.npz"], 3, "DataError"),
        (["cast", "nosuch.onnx", "fp16"], 3, "ModelNotFound"),
        (["cast", TEST, "fp16"], 3, "ModelError"),
        (["sparsify", MODEL, "--only", STEM], 2, "OptionError"),
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


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["sensitivity", MODEL], 2, "OptionError"),
        (["sensitivity", MODEL, "--test", TEST], 3, "DataError"),
        (["sensitivity", MODEL, "--test", TEST, "--bins", "512"], 2, "OptionError"),
        (["sensitivity", TFLITE, "--data", TEST, "--round-on", TEST], 2, "OptionError"),
        (["sensitivity", TFLITE, "--data", TEST, "--block", "32"], 2, "OptionError"),
        (["sensitivity", MODEL, "--data", TEST, "--node", "nosuch"], 2, "OptionError"),
        (["sensitivity", MODEL, "--data", TEST, "--engine", "nosuch"], 1, "BackendUnavailable"),
        (["calibrate", MODEL, "--data", TEST, "--bins", "1000"], 2, "OptionError"),
        (
            ["calibrate", MODEL, "--data", TEST, "--percentile", "9", "--method", "mse"],
            2,
            "OptionError",
        ),
        (["calibrate", MODEL, "--data", TEST, "--engine", "openvino:int8"], 2, "OptionError"),
    ],
)
def test_errors_of_what_only_tells(arguments: list[object], code: int, told: str) -> None:
    assert "error: " in unirt_(*arguments, code=code).stderr
    assert document(*arguments, code=code)["error"]["type"] == told


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


def test_a_tflite_has_a_budget_and_no_recipe_to_choose(tmp_path: Path) -> None:
    common = ["quantize", TFLITE, "-o", tmp_path / "made.tflite", "--data", TEST]
    assert "one recipe" in unirt_(*common, "--recipe", "cpu", code=2).stderr
    assert "ONNX graph" in unirt_(*common, "--only", "logits", code=2).stderr
    assert "rounded to nearest" in unirt_(*common, "--round-on", TEST, code=2).stderr
    unirt_(*common, "--for", "tensorrt", code=2)
    pytest.importorskip("ai_edge_quantizer")
    table = document("sensitivity", TFLITE, "--data", TEST)
    budget = table["whole"]["snr_db"] + 2
    told = document(*common, "--min-snr", budget)
    assert told["search"]["met"]
    assert told["search"]["kept"][0] in [row["node"] for row in table["nodes"]]
    assert told["measured"]["snr_db"] >= budget
    assert told["kept"][told["search"]["kept"][0]] == "kept for the budget"
    ranges = tmp_path / "ranges.json"
    calibrate(MODEL, TEST).save(ranges)  # of the network beside it
    other = [*common[:4], "--calibration", ranges, "--test", TEST, "--min-snr", "20"]
    assert document(*other)["search"]["met"]
    same = document("sensitivity", TFLITE, "--calibration", ranges, "--test", TEST)
    assert [row["node"] for row in same["nodes"]]
    assert same["whole"]["snr_db"] == pytest.approx(table["whole"]["snr_db"], abs=1)
