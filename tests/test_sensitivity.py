"""What each node costs when it is quantized, and the fewest to leave alone for a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import unirt
from unirt import plugins
from unirt.accuracy import relative_error, snr_db
from unirt.precision import (
    Budget,
    Calibration,
    Search,
    Sensitivity,
    calibrate,
    quantize,
    search,
    sensitivity,
)
from unirt.precision.partial import trial as trial_module
from unirt.precision.partial.trial import EXACT, Trial

EXAMPLES = Path(__file__).parent.parent / "examples"
DIGITS, QAT = EXAMPLES / "digits", EXAMPLES / "qat"
STEM, DEPTHWISE = "/stem/Conv", "/blocks/blocks.0/depthwise/Conv"
WIDTH = 16


def network(
    *nodes: tuple[str, str, Any], end: str = "y", rows: Any = "n", classes: int = WIDTH
) -> onnx.ModelProto:
    """A chain of (name, operator, weight); the weight is None where the operator has none."""
    made, weights, x = [], [], "x"
    for name, operator, weight in nodes:
        inputs = [x]
        if weight is not None:
            weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"))
            inputs.append(f"{name}.weight")
        x = f"{name}.out"
        made.append(helper.make_node(operator, inputs, [x], name))
    made.append(helper.make_node("Identity", [x], [end], "end"))
    graph = helper.make_graph(
        made,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, WIDTH])],
        [helper.make_tensor_value_info(end, TensorProto.FLOAT, [rows, classes])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def matrix(seed: int, columns: int = WIDTH) -> Any:
    return np.random.default_rng(seed).standard_normal((WIDTH, columns)) / 4


def samples(count: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {"x": random.standard_normal((count, WIDTH)).astype(np.float32)}


def with_an_outlier() -> onnx.ModelProto:
    """In front of `/c:2/MatMul` one channel is 1,000 times as large as the others, and its weights
    are as much smaller: in float32 that changes nothing.
    """
    one, two, three = matrix(1), matrix(2), matrix(3)
    two[:, 5] *= 1000
    three[5] /= 1000
    return network(
        ("/a:0/MatMul", "MatMul", one),
        ("/a:0/Relu", "Relu", None),
        ("/b:1/MatMul", "MatMul", two),
        ("/b:1/Relu", "Relu", None),
        ("/c:2/MatMul", "MatMul", three),
        ("/c:2/Relu", "Relu", None),
        ("/d:3/MatMul", "MatMul", matrix(4)),
    )


A, B, C, D = "/a:0/MatMul", "/b:1/MatMul", "/c:2/MatMul", "/d:3/MatMul"


@pytest.fixture(scope="module")
def outlier() -> unirt.Model:
    return unirt.Model(with_an_outlier(), name="outlier")


@pytest.fixture(scope="module")
def ranges(outlier: unirt.Model) -> Calibration:
    return calibrate(outlier, samples(64), method="max")


@pytest.fixture(scope="module")
def table(outlier: unirt.Model, ranges: Calibration) -> Sensitivity:
    subsets = {"ends": [D, A], "all four": [A, B, C, D], "alone": [C]}
    return sensitivity(outlier, ranges, samples(300, 1), subsets=subsets, without=True)


def answers(model: Any, feed: Mapping[str, Any], output: str = "y") -> Any:
    with unirt.load(model, "reference") as session:
        return session.run(feed)[output]


# --- sensitivity ---------------------------------------------------------------------------------


def test_the_node_that_cannot_bear_int8_is_found(table: Sensitivity) -> None:
    assert table.nodes == (A, B, C, D)
    assert table.ranking[0] == C
    assert table.share(C) > 0.95
    assert table.alone[C].snr_db < 10
    assert min(table.alone[name].snr_db for name in (A, B, D)) > 25
    assert sum(map(table.share, table.nodes)) == pytest.approx(1)


def test_each_figure_is_that_of_the_graph_with_only_that_node_quantized(
    outlier: unirt.Model, ranges: Calibration, table: Sensitivity
) -> None:
    feed = samples(300, 1)
    right = answers(outlier, feed)
    pairs = [(table.alone[name], {"only": [name]}) for name in table.nodes]
    pairs += [(table.without[name], {"keep": [name]}) for name in table.nodes]
    pairs += [(table.subsets["ends"], {"only": [A, D]}), (table.whole, {})]
    for measured, choice in pairs:
        got = answers(quantize(outlier, ranges, **choice).model, feed)
        assert measured.error == pytest.approx(relative_error(got, right), rel=1e-3)
        assert measured.snr_db == pytest.approx(snr_db(got, right), abs=0.02)


def test_subsets_are_measured_together(table: Sensitivity) -> None:
    assert table.subsets["all four"] == table.whole
    assert table.subsets["alone"] == table.alone[C]
    assert table.subsets["ends"].noise == pytest.approx(
        table.alone[A].noise + table.alone[D].noise, rel=0.3
    )


def test_the_same_arguments_give_the_same_figures(
    outlier: unirt.Model, ranges: Calibration, table: Sensitivity
) -> None:
    again = sensitivity(outlier, ranges, samples(300, 1), without=True)
    assert again.whole == table.whole
    assert again.alone == table.alone
    assert again.without == table.without


def test_only_some_nodes_are_measured_where_they_are_named(
    outlier: unirt.Model, ranges: Calibration, table: Sensitivity
) -> None:
    some = sensitivity(outlier, ranges, samples(300, 1), nodes=[D, B])
    assert some.nodes == (B, D)
    assert some.alone == {name: table.alone[name] for name in (B, D)}
    assert not some.without


def test_a_node_is_kept_before_anything_is_measured(
    outlier: unirt.Model, ranges: Calibration, table: Sensitivity
) -> None:
    kept = sensitivity(outlier, ranges, samples(300, 1), keep=[C])
    assert kept.nodes == (A, B, D)
    assert kept.whole == table.without[C]
    assert kept.kept[C] == "it was told to stay"


def test_inputs_may_come_one_by_one_and_answers_need_not_fit_into_memory(
    outlier: unirt.Model,
    ranges: Calibration,
    table: Sensitivity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = samples(300, 1)["x"]
    rows = [{"x": whole[at : at + 1]} for at in range(len(whole))]
    listed = sensitivity(outlier, ranges, rows)
    monkeypatch.setattr(trial_module, "_KEPT_BYTES", 1000)  # 15 answers of one row
    monkeypatch.setattr(trial_module, "_ROWS", 7)
    streamed = sensitivity(outlier, ranges, {"x": whole})
    for other in (listed, streamed):
        assert other.samples == 300
        for name in table.nodes:
            assert other.alone[name].snr_db == pytest.approx(table.alone[name].snr_db, abs=0.05)
            assert other.alone[name].error == pytest.approx(table.alone[name].error, rel=0.02)


def test_the_float32_network_is_run_once_where_its_answers_fit(
    outlier: unirt.Model, ranges: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []
    backend = type(plugins.plugin("onnxruntime").backend)  # type: ignore[union-attr]
    compile_ = backend._compile

    def counted(self: Any, file: Any, *rest: Any) -> Any:
        graphs.append("QuantizeLinear" in file.op_counts)
        return compile_(self, file, *rest)

    monkeypatch.setattr(backend, "_compile", counted)
    sensitivity(outlier, ranges, samples(40))
    assert graphs.count(False) == 1
    assert graphs.count(True) == 5  # all of them, and each


def test_an_answer_that_becomes_infinite_is_an_infinite_error() -> None:
    """Rounded to 0, the small values have no logarithm."""
    model = network(
        ("fine", "MatMul", np.diag(np.where(np.arange(WIDTH) == 3, 100.0, 0.01))),
        ("small", "MatMul", np.eye(WIDTH)),
        ("log", "Log", None),
    )
    x = np.random.default_rng(0).uniform(1, 2, (20, WIDTH)).astype(np.float32)
    ranges = calibrate(model, {"x": x}, method="max")
    table = sensitivity(model, ranges, {"x": x})
    assert table.alone["small"].error == math.inf
    assert table.alone["small"].snr_db == -math.inf
    assert table.alone["fine"].error < 0.05
    assert (table.share("small"), table.share("fine")) == (1.0, 0.0)
    assert table.ranking == ("small", "fine")
    labels = np.zeros(20, np.int64)
    found = search(model, ranges, {"x": x, "labels": labels}, max_drop=1.0)
    assert found.kept == ("small",), "no accuracy makes up for infinities"


def test_what_is_quantized_only_beside_others_is_blamed_for_what_its_float32_saves() -> None:
    """The Add of a residual block: its skip branch has an outlier, the convolutions have none."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((random.standard_normal((8, 8, 1, 1)) / 3).astype(np.float32), name)
        for name in ("w1", "w2")
    ]
    nodes = [
        helper.make_node("Mul", ["x", "gains"], ["skip"], "gain"),
        helper.make_node("Conv", ["x", "w1"], ["branch"], "branch"),
        helper.make_node("Add", ["branch", "skip"], ["sum"], "join"),
        helper.make_node("Conv", ["sum", "w2"], ["y"], "behind"),
    ]
    gains = np.ones((1, 8, 1, 1), np.float32)
    gains[0, 0] = 300
    weights.append(numpy_helper.from_array(gains, "gains"))
    spec = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "block",
        [spec("x", TensorProto.FLOAT, ["n", 8, 4, 4])],
        [spec("y", TensorProto.FLOAT, ["n", 8, 4, 4])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = random.standard_normal((32, 8, 4, 4)).astype(np.float32)
    ranges = calibrate(model, {"x": x}, method="max")
    table = sensitivity(model, ranges, {"x": x})
    assert set(table.alone) == {"branch", "behind"}
    assert set(table.without) == {"join"}
    assert table.noise("join") == pytest.approx(table.whole.noise - table.without["join"].noise)
    assert table.noise("join") > 5 * table.noise("branch")
    with pytest.raises(unirt.OptionError, match="only beside others"):
        sensitivity(model, ranges, {"x": x}, subsets={"one": ["join"]})


@pytest.mark.parametrize("recipe", ["tensorrt", "cpu", "cpu-vnni"])
def test_every_recipe_is_measured(recipe: str) -> None:
    model = DIGITS / "digits.onnx"
    ranges = calibrate(model, DIGITS / "test.npz")
    table = sensitivity(model, ranges, DIGITS / "test.npz", recipe=recipe)
    assert table.nodes == quantize(model, ranges, "int8", recipe).nodes
    assert {*table.alone, *table.without} == set(table.nodes)
    assert table.accuracy is not None
    assert table.whole.accuracy == pytest.approx(table.accuracy, abs=0.01)
    assert all(abs(table.drop(name) or 0.0) < 0.01 for name in table.nodes)
    assert all(name in str(table) for name in table.nodes)


def test_weights_alone_need_no_calibration(outlier: unirt.Model) -> None:
    table = sensitivity(outlier, None, samples(50), precision="int4-weights", block=16)
    # By blocks of 16 the smaller row of `c` has no scale of its own; elsewhere all are alike.
    assert table.ranking[0] == C
    assert table.precision == "int4-weights"


def test_labels_of_rows_that_fill_a_fixed_batch_do_not_count() -> None:
    model = network(("a", "MatMul", matrix(1, 10)), rows=4, classes=10)
    data = samples(10)
    right = np.concatenate([data["x"] @ matrix(1, 10)]).argmax(1)
    data["labels"] = np.where(np.arange(10) < 9, right, (right + 1) % 10)
    table = sensitivity(model, calibrate(model, data, method="max"), data)
    assert table.samples == 10
    assert table.accuracy == 0.9


def test_onnxruntime_computes_as_the_graph_says() -> None:
    """Against NumPy, full-range int8 weights and a broad range: fused they overflow 16 bits."""
    random = np.random.default_rng(3)
    weight = random.choice([-1.0, 1.0], (WIDTH, WIDTH)) + random.standard_normal((WIDTH, WIDTH)) / 9
    model = network(("a", "MatMul", np.abs(weight)), ("r", "Relu", None), ("b", "MatMul", weight))
    feed = {"x": np.abs(samples(64)["x"])}
    made = quantize(model, calibrate(model, feed, method="max"), "int8", "tensorrt").model
    with unirt.load(made, "onnxruntime", options=EXACT["onnxruntime"]) as session:
        assert snr_db(session.run(feed)["y"], answers(made, feed)) > 60


# --- which engine measures ------------------------------------------------------------------------


def saturating() -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Quantized over the full range, its sums of two products exceed 16 bits on a CPU without VNNI:
    there an engine's integer kernels answer otherwise than the graph says.
    """
    random = np.random.default_rng(3)
    weight = random.choice([-1.0, 1.0], (WIDTH, WIDTH)) + random.standard_normal((WIDTH, WIDTH)) / 9
    model = network(
        ("a", "MatMul", np.abs(weight)),
        ("r", "Relu", None),
        ("b", "MatMul", weight),
        ("s", "Relu", None),
        ("c", "MatMul", np.abs(weight)),
    )
    return model, {"x": np.abs(samples(64)["x"])}


@pytest.fixture
def options_used(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """The session options that onnxruntime was given, graph by graph."""
    used: list[Mapping[str, str]] = []
    backend = type(plugins.plugin("onnxruntime").backend)  # type: ignore[union-attr]
    compile_ = backend._compile

    def noted(self: Any, file: Any, device: Any, options: Any) -> Any:
        used.append(dict(options.config))
        return compile_(self, file, device, options)

    monkeypatch.setattr(backend, "_compile", noted)
    return used


def test_a_named_engine_is_measured_as_it_runs_for_everybody(
    options_used: list[Mapping[str, str]],
) -> None:
    model, feed = saturating()
    ranges = calibrate(model, feed, method="max")
    options_used.clear()
    table = sensitivity(model, ranges, feed, engine="onnxruntime")
    assert table.engine == "onnxruntime@cpu"
    assert not any(options_used)
    made = quantize(model, ranges, "int8", "tensorrt").model
    with unirt.load(made, "onnxruntime") as low, unirt.load(model, "onnxruntime") as whole:
        expected = snr_db(low.run(feed)["y"], whole.run(feed)["y"])
    assert table.whole.snr_db == pytest.approx(expected, abs=0.01)


def test_what_nobody_named_is_measured_as_the_graph_says(
    options_used: list[Mapping[str, str]],
) -> None:
    model, feed = saturating()
    ranges = calibrate(model, feed, method="max")
    options_used.clear()
    table = sensitivity(model, ranges, feed)
    assert table.engine == "onnxruntime@cpu, Q/DQ as written"
    assert table.to_dict()["engine"] == table.engine
    assert {tuple(config) for config in options_used} == {("session.disable_quant_qdq",)}
    made = quantize(model, ranges, "int8", "tensorrt").model
    as_written = snr_db(answers(made, feed), answers(model, feed))
    assert table.whole.snr_db == pytest.approx(as_written, abs=0.1)
    own = sensitivity(model, ranges, feed, engine="onnxruntime", options={"threads": 1})
    assert own.engine == "onnxruntime@cpu with threads=1"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino@cpu"])
def test_a_search_on_a_named_engine_certifies_what_runs_there(engine: str) -> None:
    model, feed = with_an_outlier(), samples(300, 1)
    ranges = calibrate(model, samples(64), method="max")
    found = search(model, ranges, feed, min_snr=25, recipe="cpu", engine=engine)
    assert found.met
    assert C in found.kept
    assert found.table.engine == f"{engine.partition('@')[0]}@cpu"
    made = found.quantized.model
    with unirt.load(made, engine) as low, unirt.load(model, engine) as whole:
        ratio = snr_db(low.run(feed)["y"], whole.run(feed)["y"])
    assert ratio >= 25
    assert found.measured.snr_db == pytest.approx(ratio, abs=0.01)


def test_an_engine_that_compiles_for_shapes_is_told_those_that_come(
    outlier: unirt.Model, ranges: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    backend = type(plugins.plugin("onnxruntime").backend)  # type: ignore[union-attr]
    compile_ = backend.compile

    def noted(self: Any, *arguments: Any, profiles: Any = (), **others: Any) -> Any:
        told.append([one.shapes for one in profiles])
        return compile_(self, *arguments, profiles=profiles, **others)

    monkeypatch.setattr(backend, "compile", noted)
    whole = samples(300, 1)["x"]
    sensitivity(outlier, ranges, {"x": whole}, engine="onnxruntime", nodes=[A])
    assert told == [[{"x": ((44, WIDTH), (256, WIDTH), (256, WIDTH))}]] * 3
    told.clear()
    rows = [{"x": whole[:2]}, {"x": whole[:7]}]
    sensitivity(outlier, ranges, rows, engine="onnxruntime", nodes=[A])
    ((shapes,), *_) = told
    assert (shapes["x"][0], shapes["x"][2]) == ((2, WIDTH), (7, WIDTH))
    told.clear()
    sensitivity(outlier, ranges, rows, nodes=[A])
    assert not any(told)


# --- labels among the inputs ----------------------------------------------------------------------


class Anew:
    """Makes its inputs again each time it is read."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def __iter__(self) -> Any:
        for at in range(len(self.data["x"])):
            yield {"x": self.data["x"][at : at + 1], "labels": self.data["labels"][at]}


def labelled(count: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Samples of which the network gets nine in ten right."""
    model = network(("a", "MatMul", matrix(1)), ("b", "MatMul", matrix(2)))
    data = samples(count)
    right = (data["x"] @ matrix(1) @ matrix(2)).argmax(1)
    data["labels"] = np.where(np.arange(count) % 10 == 0, (right + 1) % WIDTH, right)
    return model, data


def test_labels_may_stand_beside_the_inputs_of_a_call() -> None:
    model, data = labelled(60)
    ranges = calibrate(model, data, method="max")
    whole = sensitivity(model, ranges, data)
    assert whole.accuracy == pytest.approx(0.9)
    listed = [*Anew(data)]
    threes = [
        {"x": data["x"][at : at + 3], "labels": [*data["labels"][at : at + 3]]}
        for at in range(0, 60, 3)
    ]
    for given in (listed, Anew(data), threes):
        table = sensitivity(model, ranges, given)
        assert table.accuracy == whole.accuracy
        assert table.whole.accuracy == whole.whole.accuracy
    found = search(model, ranges, Anew(data), max_drop=0.01)
    assert found.met
    assert found.table.samples == 60


def test_labels_among_inputs_must_suit() -> None:
    model, data = labelled(6)
    ranges = calibrate(model, data, method="max")
    rows = [*Anew(data)]
    for wrong, told in (
        ([*rows[:3], {"x": rows[3]["x"]}], "Call 3 has no labels"),
        ([{"x": rows[3]["x"]}, *rows], "Call 1 has labels"),
        ([*rows[:5], {**rows[5], "labels": WIDTH}], "has 16 classes"),
        ([{**rows[0], "labels": 0.5}], "an integer from 0"),
        ([{**rows[0], "labels": [1, 2]}], "fit no output"),
    ):
        with pytest.raises(unirt.DataError, match=told):
            sensitivity(model, ranges, wrong)
    with pytest.raises(unirt.DataError, match="has no labels"):
        search(model, ranges, [{"x": row["x"]} for row in rows], max_drop=0.1)


def test_an_input_called_labels_is_an_input() -> None:
    model = network(("a", "MatMul", matrix(1)))
    model.graph.input[0].name = model.graph.node[0].input[0] = "labels"
    rows = [{"labels": samples(2, seed)["x"]} for seed in range(3)]
    table = sensitivity(model, calibrate(model, rows, method="max"), rows)
    assert table.accuracy is None
    assert table.whole.snr_db > 25


def test_a_generator_is_refused_with_what_to_give_instead(
    outlier: unirt.Model, ranges: Calibration
) -> None:
    for measure in (sensitivity, search):
        limit: dict[str, Any] = {"min_snr": 1} if measure is search else {}
        with pytest.raises(unirt.DataError) as caught:
            measure(outlier, ranges, (feed for feed in [samples(1)]), **limit)
        assert "is a generator, which can be read once only" in caught.value.what
        assert "once for each graph" in caught.value.why
        assert "whose __iter__ is the generator" in caught.value.remedy


# --- search --------------------------------------------------------------------------------------


def test_only_the_node_that_cannot_bear_int8_stays(
    outlier: unirt.Model, ranges: Calibration
) -> None:
    found = search(outlier, ranges, samples(300, 1), min_snr=25)
    assert found.met
    assert found.kept == (C,)
    assert found.quantized.nodes == (A, B, D)
    assert found.measured.snr_db >= 25
    assert not found.history[0].met
    feed = samples(300, 1)
    got = answers(found.quantized.model, feed)
    assert snr_db(got, answers(outlier, feed)) == pytest.approx(found.measured.snr_db, abs=0.02)


def test_nothing_stays_where_all_of_it_meets_the_budget(
    outlier: unirt.Model, ranges: Calibration
) -> None:
    found = search(outlier, ranges, samples(100), max_error=10.0)
    assert (found.met, found.kept, len(found.history)) == (True, (), 1)
    assert found.quantized.nodes == (A, B, C, D)


def test_where_nothing_meets_the_budget_the_nearest_graph_comes_back(
    outlier: unirt.Model, ranges: Calibration
) -> None:
    found = search(outlier, ranges, samples(100), min_snr=200.0)
    assert not found.met
    assert not any(step.met for step in found.history)
    assert found.measured.snr_db == max(step.measured.snr_db for step in found.history)
    assert len(found.quantized.nodes) == 1


def test_what_need_not_stay_is_given_back() -> None:
    """`common` makes most of the noise, but adds the same to all classes: only `classes` counts.

    Both read an input of which one channel is 500 times as large as the others.
    """
    classes = matrix(1)
    classes[3] /= 500
    common = np.repeat(50 * matrix(2, 1), WIDTH, axis=1)
    common[3] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["one"], "classes"),
        helper.make_node("MatMul", ["x", "w2"], ["all"], "common"),
        helper.make_node("Add", ["one", "all"], ["y"], "sum"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        [
            numpy_helper.from_array(classes.astype(np.float32), "w1"),
            numpy_helper.from_array(common.astype(np.float32), "w2"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    x = samples(200)["x"]
    x[:, 3] *= 500
    data = {"x": x, "labels": (x @ classes).argmax(1)}
    found = search(model, calibrate(model, {"x": x}, method="max"), data, max_drop=0.05)
    assert found.table.ranking == ("common", "classes")
    assert found.table.share("common") > 0.9
    assert [step.kept for step in found.history] == [(), ("common",), ("classes",)]
    assert found.met
    assert found.kept == ("classes",)
    assert found.quantized.nodes == ("common",)


def test_of_what_stays_nothing_could_be_given_back(
    outlier: unirt.Model, ranges: Calibration
) -> None:
    for floor in (25.0, 33.0, 36.0):
        found = search(outlier, ranges, samples(200, 1), min_snr=floor)
        assert found.met
        tried = {frozenset(step.kept): step.met for step in found.history}
        for name in found.kept:
            assert tried[frozenset(found.kept) - {name}] is False


@pytest.fixture(scope="module")
def photographs() -> Search:
    ranges = calibrate(QAT / "fp32.onnx", QAT / "calibration.npz", method="max")
    data = {name: value[::2] for name, value in np.load(QAT / "test.npz").items()}
    return search(QAT / "fp32.onnx", ranges, data, max_drop=0.02)


def test_the_layers_that_ruin_the_photographs_stay_in_float32(photographs: Search) -> None:
    table, found = photographs.table, photographs
    assert table.ranking[:2] == (DEPTHWISE, STEM)
    assert table.share(DEPTHWISE) + table.share(STEM) > 0.8
    assert table.accuracy is not None
    assert (found.table.drop(DEPTHWISE) or 0) > 0.15
    assert not found.history[0].met, "all of it quantized should miss the budget"
    assert found.met
    assert found.measured.accuracy is not None
    assert found.measured.accuracy >= table.accuracy - 0.02
    assert {STEM, DEPTHWISE} <= set(found.kept)
    assert len(found.kept) < 6
    assert len(found.quantized.nodes) + len(found.kept) == len(table.nodes)


def test_its_accuracy_is_that_of_the_graph_it_gives(photographs: Search) -> None:
    data = np.load(QAT / "test.npz")
    images, labels = data["image"][::2], data["labels"][::2]
    options = {"optimization": "disable"}
    with unirt.load(photographs.quantized.model, "onnxruntime", options=options) as session:
        right = session.run({"image": images})["logits"].argmax(1) == labels
    assert right.mean() == pytest.approx(photographs.measured.accuracy, abs=0.002)


def test_the_graph_has_no_quantized_input_where_a_node_stays(photographs: Search) -> None:
    graph = onnx.load_from_string(photographs.quantized.model.primary.read()).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            quantized = [makers.get(name) == "DequantizeLinear" for name in node.input[:2]]
            assert quantized == [node.name not in photographs.kept] * 2


def test_progress_goes_from_start_to_end(outlier: unirt.Model, ranges: Calibration) -> None:
    told: list[tuple[str, float]] = []
    search(outlier, ranges, samples(64), min_snr=25, progress=lambda *step: told.append(step))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.1
    assert 0.7 < shares[-1] <= 1
    assert any(C in what for what, _ in told)


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"nodes": ["/c:2/MatMu"]}, unirt.OptionError, "Did you mean '/c:2/MatMul'"),
        ({"nodes": "/c:2/MatMul"}, unirt.OptionError, "no collection of names"),
        ({"nodes": []}, unirt.OptionError, "no collection of names"),
        ({"subsets": {"s": ["/a:0/Relu"]}}, unirt.OptionError, "no quantized node"),
        ({"nodes": [C], "keep": [C]}, unirt.OptionError, "it was told to stay"),
        ({"engine": "onnxruntime:int8"}, unirt.OptionError, "without a precision"),
        ({"engine": "nosuch"}, unirt.BackendUnavailable, "no such backend"),
        ({"options": {"threads": 1}}, unirt.OptionError, "Name the engine too"),
        ({"data": iter([])}, unirt.DataError, "can be read once only"),
        ({"data": []}, unirt.DataError, "no data to measure"),
        ({"data": 5}, unirt.DataError, "is a int"),
        ({"data": {"z": np.ones((1, WIDTH), np.float32)}}, unirt.DataError, "do not match"),
        ({"data": {"x": np.full((2, WIDTH), np.nan, np.float32)}}, unirt.DataError, "answers NaN"),
        ({"calibration": None}, unirt.DataError, "without a calibration"),
        ({"precision": "int7"}, unirt.OptionError, "no precision"),
        ({"recipe": "gpu"}, unirt.OptionError, "no recipe"),
    ],
)
def test_what_cannot_be_measured_is_an_error_that_says_why(
    outlier: unirt.Model,
    ranges: Calibration,
    arguments: dict[str, Any],
    error: type[Exception],
    told: str,
) -> None:
    given = {"calibration": ranges, "data": samples(4), **arguments}
    with pytest.raises(error, match=told):
        sensitivity(outlier, **given)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_drop": -0.1},
        {"max_drop": 2},
        {"max_error": math.nan},
        {"min_snr": math.inf},
        {"max_error": True},
        {"max_drop": "1%"},
    ],
)
def test_a_budget_that_is_none_is_an_error(limits: dict[str, Any]) -> None:
    with pytest.raises(unirt.OptionError, match="budget"):
        Budget(**limits)


def test_accuracy_cannot_be_kept_without_labels(outlier: unirt.Model, ranges: Calibration) -> None:
    with pytest.raises(unirt.DataError, match="has no labels"):
        search(outlier, ranges, samples(4), max_drop=0.01)
    labelled = {**samples(4), "labels": np.array([0, 1, 2, WIDTH])}
    with pytest.raises(unirt.DataError, match="has 16 classes"):
        search(outlier, ranges, labelled, max_drop=0.01)


def test_answers_of_another_shape_are_an_infinite_error(outlier: unirt.Model) -> None:
    other = unirt.Model(network(("a", "MatMul", matrix(1, 3)), classes=3))
    with Trial(outlier, samples(4)) as trial:
        measured = trial.measure(other)
    assert measured.error == math.inf
    assert measured.snr_db == -math.inf
    assert "[4, 3]" in measured.mismatch
