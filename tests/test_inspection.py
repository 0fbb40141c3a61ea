"""What is concluded from an engine's layers, and how it is shown."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import pytest

from unirt.cli.layers import document, show_report
from unirt.cli.terminal import SafeConsole
from unirt.errors import DataError
from unirt.inspection import EngineReport, Layer, LayerTensor


def tensor(name: str, dtype: str = "float32", layout: str = "Linear") -> LayerTensor:
    return LayerTensor(name, dtype, (1, 8, 4, 4), layout)


def layer(
    name: str,
    *nodes: str,
    kind: str = "kernel",
    reads: tuple[LayerTensor, ...] = (),
    writes: tuple[LayerTensor, ...] = (),
    **more: Any,
) -> Layer:
    return Layer(name, kind, nodes, reads, writes, **more)


WEIGHTS = tensor("w", "int8")
X, Y = tensor("x"), tensor("y")
GRAPH = {
    "q": "QuantizeLinear",
    "dq": "DequantizeLinear",
    "dq_w": "DequantizeLinear",
    "conv": "Conv",
    "relu": "Relu",
    "flat": "Flatten",
    "half": "Cast",
}
# x is quantized, goes through an int8 convolution, and is cast; formats change twice on the way.
REPORT = EngineReport(
    (
        layer("quantize", "q", reads=(X,), writes=(tensor("xq", "int8"),)),
        layer(
            "into",
            kind="Reformat",
            reads=(tensor("xq", "int8"),),
            writes=(tensor("xq32", "int8", "CHW32"),),
        ),
        layer(
            "conv",
            *("dq", "dq_w", "conv", "relu"),
            kind="CaskConvolution",
            reads=(tensor("xq32", "int8", "CHW32"),),
            writes=(tensor("c", "float32", "NHWC"),),
            constants=(WEIGHTS,),
            tactic="sm80_xmma_fprop",
        ),
        layer(
            "out_of",
            kind="Reformat",
            reads=(tensor("c", "float32", "NHWC"),),
            writes=(tensor("c_linear"),),
        ),
        layer(
            "cast",
            "half",
            kind="Cast",
            reads=(tensor("c_linear"),),
            writes=(tensor("y", "float16"),),
        ),
    ),
    "engine inspector",
    GRAPH,
    (X,),
    (tensor("y", "float16"),),
)


# --- nodes and layers ----------------------------------------------------------------------------


def test_layers_of_several_nodes_are_fused() -> None:
    assert [one.name for one in REPORT.fused] == ["conv"]


def test_nodes_that_no_layer_computes_are_missing() -> None:
    assert REPORT.missing == ("flat",)


def test_a_function_is_not_missing_where_its_inside_is_there() -> None:
    report = EngineReport((layer("l", "block > mm"),), "builder log", {"block": "Block"})
    assert report.missing == ()


def test_control_flow_is_not_missing() -> None:
    report = EngineReport((layer("l", "body"),), "builder log", {"loop": "Loop", "a": "Add"})
    assert report.missing == ("a",)


def test_a_region_is_no_fusion_and_has_no_precision() -> None:
    region = layer("{ForeignNode[a...b]}", "a", "b", kind="region", reads=(X,), writes=(Y,))
    report = EngineReport((region,), "builder log", {"a": "Add", "b": "Relu"})
    assert report.fused == ()
    assert report.precisions == {}
    assert ("region", "2 nodes in {ForeignNode[a...b]}") in report.findings()


# --- reformats -----------------------------------------------------------------------------------


def test_reformats_say_where_they_stand_and_who_wanted_them() -> None:
    found = {one.layer.name: one for one in REPORT.reformats}
    assert set(found) == {"into", "out_of", "cast"}
    assert found["into"].before == ("q",)
    assert found["into"].after == ("dq", "dq_w", "conv", "relu")
    assert found["into"].change == "int8 Linear → int8 CHW32"
    assert found["into"].inserted
    assert found["out_of"].where == "between relu and half"
    assert not found["cast"].inserted
    assert found["cast"].after == ("y",)


def test_the_neighbours_of_a_reformat_are_found_behind_other_reformats() -> None:
    chain = tuple(
        layer(f"r{i}", kind="Reformat", reads=(tensor(f"t{i}"),), writes=(tensor(f"t{i + 1}"),))
        for i in range(3)
    )
    first = layer("first", "a", reads=(X,), writes=(tensor("t0"),))
    last = layer("last", "b", reads=(tensor("t3"),), writes=(Y,))
    report = EngineReport((first, *chain, last), "builder log")
    assert [(one.before, one.after) for one in report.reformats] == [(("a",), ("b",))] * 3


def test_tensors_from_outside_are_neighbours_where_the_network_s_own_are_not_known() -> None:
    alone = layer("r", kind="Reformat", reads=(X,), writes=(Y,))
    (found,) = EngineReport((alone,), "builder log").reformats
    assert found.where == "between x and y"


def test_layers_in_a_circle_are_looked_at_once() -> None:
    loop = layer("r", kind="Reformat", reads=(X,), writes=(X,))
    (found,) = EngineReport((loop,), "builder log").reformats
    assert found.before == found.after == ()


@pytest.mark.parametrize(
    ("operations", "moves"),
    [(("move",), True), (("cast", "transpose"), True), (("cast", "mul"), False)],
)
def test_operations_decide_whether_a_layer_only_moves(
    operations: tuple[str, ...], moves: bool
) -> None:
    assert layer("l", kind="kgen", operations=operations).moves_only is moves


def test_profiles_do_not_mix() -> None:
    two = tuple(
        one
        for index in range(2)
        for one in (
            layer(f"r{index}", kind="Reformat", reads=(X,), writes=(tensor("t"),), profile=index),
            layer(f"c{index}", f"n{index}", reads=(tensor("t"),), writes=(Y,), profile=index),
        )
    )
    report = EngineReport(two, "builder log")
    assert report.profiles == (0, 1)
    assert [one.after for one in report.reformats] == [("n0",), ("n1",)]
    assert len(report.of_profile(1).layers) == 2
    assert ("profile 1", "") in report.findings()


# --- quantization and precision ------------------------------------------------------------------


def test_quantization_in_a_layer_of_its_own_is_unfused() -> None:
    (found,) = REPORT.unfused_quantization
    assert found.layer.nodes == ("q",)
    assert found.where == "between x and dq"


def test_without_a_graph_quantization_is_known_by_its_name_or_kind() -> None:
    report = EngineReport(
        (
            layer("a", "/conv1/input_QuantizeLinear"),
            layer("b", "x_DequantizeLinear_1"),
            layer("c", kind="Quantize"),
            layer("d", "conv1"),
        ),
        "builder log",
    )
    assert [one.layer.name for one in report.unfused_quantization] == ["a", "b", "c"]


def test_a_cast_that_quantizes_is_no_reformat() -> None:
    report = EngineReport((layer("l", "q", operations=("cast",)),), "builder log", GRAPH)
    assert report.reformats == ()
    assert len(report.unfused_quantization) == 1


def test_quantization_that_speeds_nothing_up_is_idle() -> None:
    reads, writes = (tensor("a"),), (tensor("b"),)
    softmax = layer("s", "q", "dq", reads=reads, writes=writes, operations=("mul", "round", "exp"))
    assert EngineReport((softmax,), "builder log", GRAPH).idle_quantization == ("q", "dq")


def test_quantization_is_not_idle_where_nobody_can_tell() -> None:
    reads, writes = (tensor("a"),), (tensor("b"),)
    untold = layer("s", "q", "dq", reads=reads, writes=writes)
    inside = layer("s", "q", "dq", reads=reads, writes=writes, operations=("round", "matmul"))
    for one in (untold, inside):
        assert EngineReport((one,), "builder log", GRAPH).idle_quantization == ()


def test_reformats_and_quantizing_layers_have_no_precision() -> None:
    assert REPORT.precisions == {"int8": 1}


@pytest.mark.parametrize(
    ("reads", "constants", "expected"),
    [
        (["int8"], ["int8"], "int8"),
        (["int8", "float16"], ["int8"], "int8"),  # a residual in float16 is added afterwards
        (["float8_e4m3fn", "float8_e4m3fn"], [], "float8_e4m3fn"),
        (["float16"], ["int8"], "float16"),  # weights only
        (["int8", "float16"], ["float16"], "float16"),
        (["float16"], ["float16"], "float16"),
        (["float16", "float32"], [], "float32"),
        (["int8"], [], "int8"),  # an engine that does not tell its weights
        (["int64"], [], "float32"),  # by what it writes
    ],
)
def test_a_contraction_computes_in_what_both_its_operands_have(
    reads: list[str], constants: list[str], expected: str
) -> None:
    one = layer(
        "l",
        kind="gemm",
        reads=tuple(tensor(f"x{i}", dtype) for i, dtype in enumerate(reads)),
        writes=(Y,),
        constants=tuple(tensor("w", dtype) for dtype in constants),
    )
    assert EngineReport((one,), "builder log").precision(one) == expected


def test_a_scale_is_no_operand() -> None:
    constants = (LayerTensor("zero", "int8", (1,)), tensor("w"))
    reads = (tensor("x", "int8"),)
    one = layer("l", kind="gemm", reads=reads, writes=(Y,), constants=constants)
    assert EngineReport((one,), "builder log").precision(one) == "float32"


def test_what_multiplies_no_matrices_computes_in_float() -> None:
    both = (tensor("a", "int8"), tensor("b", "int8"))
    one = layer("l", kind="kgen", reads=both, writes=(Y,), operations=("cast", "add"))
    assert EngineReport((one,), "builder log").precision(one) == "float32"


# --- times ---------------------------------------------------------------------------------------


def times(report: EngineReport) -> list[float | None]:
    return [one.seconds for one in report.layers]


def named(*names: str) -> EngineReport:
    return EngineReport(tuple(layer(name) for name in names), "builder log")


def test_times_join_by_name() -> None:
    report = named("a", "b").with_times([("b", 2e-6), ("a", 1e-6)])
    assert times(report) == [1e-6, 2e-6]
    assert report.seconds == pytest.approx(3e-6)


def test_an_unmeasured_layer_has_no_time() -> None:
    assert times(named("a", "b").with_times([("b", 2e-6)])) == [None, 2e-6]
    assert named("a").seconds is None


def test_layers_of_one_name_take_turns() -> None:
    report = named("a", "b", "a").with_times([("a", 1.0), ("a", 2.0), ("b", 5.0)])
    assert times(report) == [1.0, 5.0, 2.0]


def test_several_times_of_one_layer_add_up() -> None:
    assert times(named("a").with_times([("a", 1.0), ("a", 2.0)])) == [3.0]


def test_names_that_differ_in_punctuation_still_meet() -> None:
    report = named("conv1 + relu1", "fc").with_times([("conv1+relu1", 1.0), ("fc", 2.0)])
    assert times(report) == [1.0, 2.0]


def test_a_name_that_was_cut_off_means_the_one_layer_it_can_mean() -> None:
    report = named("convolution_one_a", "pooling_first").with_times([("pooling_fi", 1.0)])
    assert times(report) == [None, 1.0]


def test_an_ambiguous_name_is_not_guessed() -> None:
    report = named("convolution_1", "convolution_2").with_times([("convolution", 1.0)])
    assert times(report) == [None, None]
    assert report.unmatched == (("convolution", 1.0),)
    report = named("conv1 + relu1").with_times([("conv1+relu1", 1.0), ("conv1 relu1", 2.0)])
    assert times(report) == [None]


@pytest.mark.parametrize(
    ("name", "other"),
    [("__myl_Move_myl0_1", "__myl_Move_myl0_12"), ("gemm_1_2", "gemm_12"), ("conv", "convolve")],
)
def test_a_name_with_another_number_or_too_short_is_another_layer(name: str, other: str) -> None:
    for one, two in ((name, other), (other, name)):
        assert named(one).with_times([(two, 1.0)]).unmatched == ((two, 1.0),)


def test_a_time_without_a_layer_is_kept_and_counted() -> None:
    report = named("a").with_times([("a", 1e-6), ("ghost", 2e-6)])
    assert report.unmatched == (("ghost", 2e-6),)
    assert report.seconds == pytest.approx(3e-6)
    assert "2.0 µs in ghost" in report.summary()


def test_new_times_replace_old_ones() -> None:
    report = named("a", "b").with_times([("a", 1.0), ("ghost", 1.0)]).with_times([("b", 2.0)])
    assert times(report) == [None, 2.0]
    assert report.unmatched == ()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), "1", None])
def test_a_time_that_is_no_number_is_refused(seconds: Any) -> None:
    with pytest.raises(DataError, match="is no report"):
        named("a").with_times([("a", seconds)])


# --- kept and read again -------------------------------------------------------------------------


def test_a_report_survives_json_and_pickling() -> None:
    timed = REPORT.with_times([("conv", 1e-5), ("ghost", 1e-6)])
    assert EngineReport.from_dict(json.loads(json.dumps(timed.to_dict()))) == timed
    assert pickle.loads(pickle.dumps(timed)) == timed


DAMAGE: list[Any] = [
    None,
    [],
    {},
    "text",
    {"format": 2},
    {"layers": None},
    {"layers": [1]},
    {"layers": [{"name": "a"}]},
    {"source": 3},
    {"graph": {"a": 1}},
    {"inputs": [{"name": "x", "dtype": "float32", "shape": ["n"], "format": ""}]},
    {"unmatched": [["a"]]},
    {"unmatched": [["a", "soon"]]},
    {"notes": "text"},
]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_damaged_report_is_refused(damage: Any) -> None:
    if isinstance(damage, dict) and damage:
        damage = {**REPORT.to_dict(), **damage}
    with pytest.raises(DataError, match=r"is no report of an engine's layers\. .+ Build the"):
        EngineReport.from_dict(damage)


@pytest.mark.parametrize("key", sorted(REPORT.to_dict()["layers"][0]))
def test_a_layer_that_lacks_something_is_refused(key: str) -> None:
    damaged = json.loads(json.dumps(REPORT.to_dict()))
    del damaged["layers"][0][key]
    with pytest.raises(DataError, match=key):
        EngineReport.from_dict(damaged)


# --- shown ---------------------------------------------------------------------------------------


def shown(report: EngineReport, width: int = 160) -> str:
    file = io.StringIO()
    show_report(SafeConsole(file=file, width=width, highlight=False, markup=False), report)
    return file.getvalue()


def test_the_summary_tells_everything_in_lines() -> None:
    assert REPORT.summary().splitlines() == [
        "layers: 7 nodes → 5 layers (engine inspector)",
        "fused: DequantizeLinear + DequantizeLinear + Conv + Relu",
        "reformat: inserted between q and dq: int8 Linear → int8 CHW32",
        "reformat: inserted between relu and half: float32 NHWC → float32 Linear",
        "reformat: Cast between relu and y: float32 Linear → float16 Linear",
        "unfused Q/DQ: q between x and dq: float32 Linear → int8 Linear",
        "precision: int8 in 1 layer",
        "in no layer: flat",
    ]


def test_the_table_has_a_line_for_each_layer_with_its_nodes_and_types() -> None:
    lines = shown(REPORT).splitlines()
    (conv,) = [line for line in lines if "CaskConvolution" in line]
    assert conv.split("  ")[0].strip() == "2 CaskConvolution"
    assert "dq, dq_w, conv, relu" in conv
    assert "int8 CHW32" in conv
    assert "float32 NHWC" in conv
    assert "sm80_xmma_fprop" in conv
    assert "time" not in lines[0]


def test_measured_layers_show_time_and_share() -> None:
    text = shown(REPORT.with_times([("conv", 7.5e-6), ("cast", 2.5e-6)]))
    (conv,) = [line for line in text.splitlines() if "CaskConvolution" in line]
    assert "7.50 µs" in conv
    assert "75.0 %" in conv
    assert text.splitlines()[0].split()[:5] == ["layer", "nodes", "time", "share", "in"]
    assert "10.0 µs in all layers" in text


def test_many_nodes_are_shortened_in_the_table_and_whole_in_json() -> None:
    nodes = tuple(f"/model/layers.0/attention/part{i}" for i in range(40))
    big = layer("big", *nodes, reads=(X,), writes=(Y,), operations=("mul", "add") * 30)
    report = EngineReport((big,), "builder log")
    assert max(map(len, shown(report).splitlines()[:2])) < 125
    assert "+3" in shown(report)
    assert document(report)["layers"][0]["nodes"] == nodes
    assert json.loads(json.dumps(document(report)))["fused"] == ["big"]


def test_long_lists_of_findings_end_in_a_count() -> None:
    many = tuple(
        layer(f"r{i}", kind="Reformat", reads=(tensor(f"a{i}"),), writes=(tensor(f"b{i}"),))
        for i in range(30)
    )
    report = EngineReport(many, "builder log")
    assert "and 22 more" in shown(report)
    assert report.summary().count("inserted") == 30


def test_names_cannot_drive_the_terminal_or_break_a_line() -> None:
    report = EngineReport((layer("\x1b[2J", "a\nb\x1b]0;t\x07", kind="k\rk"),), "builder log")
    text = shown(report)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "a�b" in text


def test_an_empty_report_is_shown_too() -> None:
    assert "0 nodes → 0 layers" in shown(EngineReport((), "builder log"))


def test_a_narrow_terminal_loses_no_layer() -> None:
    text = shown(REPORT, 40)
    assert text.count("2 CaskConvolution") >= 2
    assert "float32 NHWC" in text


# --- what other engines tell ---------------------------------------------------------------------


def test_signed_weights_and_unsigned_activations_multiply_in_eight_bits() -> None:
    one = layer(
        "l",
        kind="QLinearConv",
        reads=(tensor("x", "uint8"), tensor("residual", "float32")),
        writes=(Y,),
        constants=(tensor("w", "int8"),),
    )
    assert EngineReport((one,), "optimized graph").precision(one) == "uint8"


@pytest.mark.parametrize("kind", ["Reorder", "ReorderInput", "ReorderOutput", "MemcpyToHost"])
def test_what_engines_call_moving_is_a_reformat(kind: str) -> None:
    one = layer("l", kind=kind, reads=(X,), writes=(Y,))
    assert [found.inserted for found in EngineReport((one,), "runtime model").reformats] == [True]


@pytest.mark.parametrize("kind", ["FullyConnected", "FULLY_CONNECTED", "Convolution", "QGemm"])
def test_a_layer_that_names_no_node_multiplies_by_its_kind(kind: str) -> None:
    one = layer("l", kind=kind, reads=(tensor("x", "uint8"),), writes=(Y,))
    assert one.contracts
    assert EngineReport((one,), "runtime model").precision(one) == "uint8"


def test_nodes_are_not_all_onnx() -> None:
    report = EngineReport((layer("l", "CONV_2D"),), "interpreter", {"CONV_2D": "CONV_2D"})
    assert report.summary().startswith("layers: 1 node → 1 layer (interpreter)")
