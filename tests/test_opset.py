"""Raising the opset: every operator that ONNX changed answers afterwards as it did before."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import defs, helper, numpy_helper, parser

import unirt
from unirt.precision.graph import all_nodes
from unirt.precision.opset import _STEPS, NEWEST, OLDEST, raise_opset
from unirt.precision.quantization.quantize import _OPSETS


def _floats(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _whole(*values: Any) -> Any:
    return np.array(values, np.int64)


INPUTS = frozenset({"x", "z", "f", "d", "n", "seq", "signal"})

POOL: dict[str, Any] = {
    "x": _floats(2, 4, 6, 6),
    "z": _floats(2, 4, 6, 6, seed=1),
    "f": _floats(3, 4),
    "d": _floats(2, 3, 4).astype(np.float64),
    "n": np.array([1, np.nan, -np.inf, np.inf], np.float32),
    "w": _floats(4, 4, 3, 3),
    "m": _floats(6, 5),
    "v": _floats(4),
    "p": np.abs(_floats(4, seed=3)) + 1,
    "row": _floats(6),
    "q3": _floats(3, seed=11),
    "i1": _whole(2),
    "s24": _whole(2, 4),
    "c": np.array(True),
    "q": np.array([True, False, True]),
    "i": _whole(1, 0),
    "j": _whole([[[1, 0]]]),
    "u": _floats(1, 1, 1, 2, seed=4),
    "ij": _whole([0, 1], [1, 3]),
    "uu": _floats(2, 6, 6, seed=5),
    "zero": _whole(0),
    "axis": np.array(1, np.int64),
    "size": _whole(2, 4, 3, 12),
    "pads": _whole(0, 0, 1, 0, 0, 0, 0, 2),
    "flat": _whole(0, -1),
    "wide": _whole(3, 2, 4, 6, 6),
    "times": _whole(1, 2, 1, 3),
    "k": _whole(3),
    "depth": np.array([5], np.int64),
    "hot": _whole(0, 3, -2, 4),
    "offon": np.float32([0.5, 2]),
    "half": np.float32(0.5),
    "low": np.float32(-0.3),
    "grow": np.float32([1, 1, 2, 1.5]),
    "shrink": np.float32([1, 1, 0.5, 0.4]),
    "both": np.float32([1, 1, 1.7, 0.6]),
    "none": np.float32([]),
    "rois": np.float32([[0, 0, 3, 4], [1, 1, 5, 5], [0.5, 2, 4, 5.5]]),
    "batch": _whole(0, 1, 1),
    "grid": np.random.default_rng(6).uniform(-1.2, 1.2, (2, 3, 3, 2)).astype(np.float32),
    "seq": _floats(5, 2, 3),
    "lw": _floats(1, 16, 3, seed=7),
    "lr": _floats(1, 16, 4, seed=8),
    "gw": _floats(1, 12, 3, seed=7),
    "gr": _floats(1, 12, 4, seed=8),
    "rw": _floats(1, 4, 3, seed=7),
    "rr": _floats(1, 4, 4, seed=8),
    "classes": _whole(0, 3, 1),
    "boxes": np.float32([[[0, 0, 1, 1], [0, 0.1, 1, 1.1], [0, 2, 1, 3]]]),
    "scores": np.float32([[[0.9, 0.75, 0.6]]]),
    "most": _whole(2),
    "over": np.float32([0.5]),
    "many": np.array(3, np.int64),
    "yes": np.array(True),
    "g": _floats(2, seed=9),
    "h": _floats(2, seed=10),
    "signal": _floats(2, 8, 5, 1),
}

UNARY = (
    "Abs",
    "Ceil",
    "Erf",
    "Exp",
    "Floor",
    "Identity",
    "Log",
    "Neg",
    "Reciprocal",
    "Relu",
    "Sigmoid",
    "Sign",
    "Sqrt",
    "Tanh",
)
BINARY = ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum")
REDUCING = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
SOFT = ("Hardmax", "LogSoftmax", "Softmax")
PADDING = ("constant", "edge", "reflect")
COORDINATES = ("align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel")
BRANCHES = """<then_branch = t () => (float[2,4,6,6] e) { e = Relu (x) },
    else_branch = s () => (float[2,4,6,6] e) { e = Neg (x) }>"""
BODY = """<body = b (int64 at, bool ci, float[2,4,6,6] s) => (bool co, float[2,4,6,6] r) {
    co = Identity (ci) r = Mul (s, half) }>"""

# What is compared: from the first to the last opset that has it so.
CASES: list[tuple[int, int, str]] = [
    *((7, 20, f"y = {op} (x)") for op in UNARY),
    *((7, 20, f"y = {op} (x, z)") for op in BINARY),
    *((7, 20, f"y = {op} (x, row)") for op in ("Add", "Div", "Mul", "Sub")),
    (8, 20, "y = Max (x, row, z)"),
    *((7, 20, f"b = {op} (x, z) y = Cast <to = 1> (b)") for op in ("Greater", "Less")),
    *((12, 20, f"b = {op}OrEqual (x, z) y = Cast <to = 1> (b)") for op in ("Greater", "Less")),
    (7, 20, "i = Cast <to = 6> (x) k = Cast <to = 6> (z) b = Equal (i, k) y = Cast <to = 1> (b)"),
    *((7, 12, f"y = Reduce{op} <axes = [1, 3], keepdims = 0> (x)") for op in REDUCING),
    *((11, 17, f"y = Reduce{op} <axes = [-1]> (x)") for op in REDUCING if op != "Sum"),
    *((7, 17, f"y = Reduce{op} (x)") for op in REDUCING),
    *((18, 20, f"y = Reduce{op} (x, i)") for op in ("Max", "Min")),
    *((7, 20, f"y = Arg{op} <axis = 2> (x)") for op in ("Max", "Min")),
    *((12, 20, f"y = Arg{op} <axis = -1, select_last_index = 1> (x)") for op in ("Max", "Min")),
    (7, 20, "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)"),
    (7, 20, 'y = AveragePool <kernel_shape = [2, 2], auto_pad = "SAME_LOWER"> (x)'),
    (7, 20, """y = AveragePool
        <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x)"""),
    (10, 20, "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)"),
    (10, 20, """y = AveragePool <kernel_shape = [2, 3], strides = [4, 4], pads = [1, 1, 1, 1],
        ceil_mode = 1, count_include_pad = 1> (x)"""),
    (7, 20, "y = BatchNormalization <epsilon = 0.1> (x, v, v, v, p)"),
    (7, 8, "y = BatchNormalization <spatial = 1> (x, v, v, v, p)"),
    (7, 20, "b = Cast <to = 7> (x) y = Cast <to = 1> (b)"),
    (15, 20, "b = CastLike (x, i) y = CastLike (b, x)"),
    (7, 10, "y = Clip <max = 0.5> (x)"),
    (7, 10, "y = Clip <min = -0.3, max = 0.5> (x)"),
    (7, 10, "y = Clip (x)"),
    (11, 20, "y = Clip (x, low, half)"),
    (12, 20, "y = Clip (x, half, low)"),
    (9, 20, "y = Compress <axis = 0> (f, q)"),
    (7, 20, "y = Concat <axis = 2> (x, z)"),
    (7, 20, "y = Constant <value = float[3] {1, 2, 3}> ()"),
    (12, 20, "y = Constant <value_floats = [1.0, 2.0]> ()"),
    (9, 20, "y = ConstantOfShape <value = float[1] {2}> (size)"),
    (7, 20, "y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w)"),
    (7, 20, 'y = Conv <auto_pad = "SAME_UPPER", strides = [4, 4]> (x, w)'),
    (7, 20, """y = ConvTranspose
        <pads = [1, 1, 1, 1], strides = [2, 2], output_padding = [1, 1]> (x, w)"""),
    *((7, 20, f'y = ConvTranspose <auto_pad = "SAME_{side}", strides = [2, 2]> (x, w)')
        for side in ("LOWER", "UPPER")),
    (7, 20, "y = ConvTranspose <strides = [2, 2], output_shape = [12, 12]> (x, w)"),
    (11, 20, "y = CumSum <reverse = 1> (x, axis)"),
    (17, 19, "y = DFT (signal)"),
    (17, 19, "y = DFT <axis = 2, onesided = 1> (signal)"),
    (17, 19, "b = DFT (signal) y = DFT <axis = 2, inverse = 1> (b, many)"),
    (7, 20, "y = DepthToSpace <blocksize = 2> (x)"),
    (7, 11, "y = Dropout <ratio = 0.9> (x)"),
    (7, 11, "y, unread = Dropout (x)"),
    (12, 20, "y = Dropout (x, half)"),
    (8, 20, "y = Expand (x, wide)"),
    *((7, 20, f"y = Flatten <axis = {axis}> (x)") for axis in (0, 2)),
    (11, 20, "y = Flatten <axis = -1> (x)"),
    (7, 20, "y, y2 = GRU <hidden_size = 4> (seq, gw, gr)"),
    (7, 20, "y, y2, y3 = LSTM <hidden_size = 4> (seq, lw, lr)"),
    (7, 20, "y, y2 = RNN <hidden_size = 4> (seq, rw, rr)"),
    *((7, 20, f"y = Gather <axis = {axis}> (x, i)") for axis in (0, 2)),
    (11, 20, "y = GatherElements <axis = 3> (x, j)"),
    (11, 20, "y = GatherND (x, ij)"),
    (7, 20, "y = Gemm <transB = 1, alpha = 0.5> (f, f, q3)"),
    (11, 20, "y = Gemm <transB = 1> (f, f)"),
    *((16, 19, f'y = GridSample <mode = "{mode}", align_corners = 1> (x, grid)')
        for mode in ("bicubic", "bilinear", "nearest")),
    (16, 19, 'y = GridSample <padding_mode = "border"> (x, grid)'),
    (18, 20, "y = GroupNormalization <num_groups = 2> (x, g, h)"),
    *((7, 12, f"y = {op} {axis} (x)") for op in SOFT for axis in ("", "<axis = 0>", "<axis = 3>")),
    *((11, 12, f"y = {op} <axis = {axis}> (x)") for op in SOFT for axis in (-1, -2)),
    *((7, 20, f"y = {op} <axis = 1> (f)") for op in SOFT),
    (7, 20, f"y = If (c) {BRANCHES}"),
    (10, 20, "b = IsInf (n) y = Cast <to = 1> (b)"),
    (9, 20, "b = IsNaN (n) y = Cast <to = 1> (b)"),
    (7, 20, "y = LRN <size = 3> (x)"),
    (7, 20, "y = LeakyRelu <alpha = 0.3> (x)"),
    (7, 20, f"y = Loop {BODY} (many, yes, x)"),
    (7, 20, "y = LpPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], p = 3> (x)"),
    (7, 20, 'y = LpPool <kernel_shape = [2, 3], auto_pad = "SAME_UPPER"> (x)'),
    (7, 20, "y = MatMul (x, m)"),
    (7, 20, "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)"),
    (7, 20, 'y = MaxPool <kernel_shape = [2, 2], auto_pad = "SAME_LOWER"> (x)'),
    (8, 20, "y, y2 = MaxPool <kernel_shape = [2, 2]> (x)"),
    (10, 20, """y = MaxPool
        <kernel_shape = [3, 3], strides = [4, 4], ceil_mode = 1, pads = [1, 1, 1, 1]> (x)"""),
    (9, 20, """a, b = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
        y = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]> (a, b)"""),
    (9, 20, "y = MeanVarianceNormalization (x)"),
    (10, 20, "y = Mod <fmod = 1> (x, z)"),
    (12, 20, "y = NegativeLogLikelihoodLoss (f, classes)"),
    (10, 20, "y = NonMaxSuppression (boxes, scores, most, over)"),
    (9, 20, "y = NonZero (x)"),
    (9, 20, "y = OneHot (hot, depth, offon)"),
    (15, 20, "o = Optional (x) y = OptionalGetElement (o)"),
    (15, 20, "o = Optional (x) b = OptionalHasElement (o) y = Cast <to = 1> (b)"),
    (7, 20, "y = PRelu (x, row)"),
    *((7, 10, f'y = Pad <pads = [0, 0, 1, 0, 0, 0, 0, 2], mode = "{mode}", value = 0.5> (x)')
        for mode in PADDING),
    (7, 10, "y = Pad <pads = [0, 1, 0, 0, 0, 2], value = 0.5> (d)"),
    *((11, 20, f'y = Pad <mode = "{mode}"> (x, pads)') for mode in PADDING),
    (11, 20, "y = Pad (x, pads, half)"),
    (7, 20, "y = Reshape (x, flat)"),
    *((10, 10, f'y = Resize <mode = "{mode}"> (x, {scales})')
        for mode in ("linear", "nearest") for scales in ("both", "grow", "shrink")),
    (10, 10, "s = Identity (both) y = Resize (x, s)"),
    *((11, 20, f"""y = Resize
        <mode = "{mode}", coordinate_transformation_mode = "{how}"> (x, none, {scales})""")
        for mode in ("cubic", "linear", "nearest") for scales in ("both", "grow")
        for how in COORDINATES),
    (11, 20, 'y = Resize <mode = "nearest"> (x, none, none, size)'),
    *((11, 12, f"""y = Resize <nearest_mode = "floor",
        coordinate_transformation_mode = "tf_half_pixel_for_nn"> (x, none, {scales})""")
        for scales in ("both", "grow", "shrink")),
    (10, 15, """y = RoiAlign
        <output_height = 2, output_width = 2, sampling_ratio = 2> (x, rois, batch)"""),
    (9, 20, """y = Scan <num_scan_inputs = 1,
        body = b (float[4,6,6] s) => (float[4,6,6] r) { r = Relu (s) }> (x)"""),
    (9, 10, "y = Scatter <axis = 3> (x, j, u)"),
    (11, 20, "y = ScatterElements <axis = 3> (x, j, u)"),
    (16, 20, 'y = ScatterElements <axis = 3, reduction = "add"> (x, j, u)'),
    (11, 20, "y = ScatterND (x, ij, uu)"),
    (16, 20, 'y = ScatterND <reduction = "mul"> (x, ij, uu)'),
    (7, 20, "y = Shape (x)"),
    (15, 20, "y = Shape <start = 1, end = -1> (x)"),
    (7, 20, "y = Size (x)"),
    (7, 9, "y = Slice <starts = [1, -3], ends = [100, -1], axes = [1, 3]> (x)"),
    (7, 9, "y = Slice <starts = [1], ends = [2]> (x)"),
    (10, 20, "y = Slice (x, zero, k, i1)"),
    (12, 20, "y = SoftmaxCrossEntropyLoss (f, classes)"),
    (7, 20, "y = SpaceToDepth <blocksize = 2> (x)"),
    (7, 12, "y, y2 = Split <axis = 2, split = [2, 4]> (x)"),
    (7, 17, "y, y2, y3 = Split <axis = 3> (x)"),
    (13, 20, "y, y2 = Split <axis = 3> (x, s24)"),
    (7, 12, "b = Unsqueeze <axes = [0, 2]> (x) y = Squeeze <axes = [2]> (b)"),
    (7, 20, "y = Squeeze (u)"),
    (13, 20, "b = Unsqueeze (x, zero) y = Squeeze (b, zero)"),
    (7, 20, "y = Tile (x, times)"),
    (7, 9, "y, y2 = TopK <k = 3, axis = 2> (x)"),
    (10, 20, "y, y2 = TopK (x, k)"),
    (7, 20, "y = Transpose <perm = [3, 0, 2, 1]> (x)"),
    *((7, 8, f'y = Upsample <mode = "{mode}", scales = [1.0, 1.0, 2.0, 1.5]> (x)')
        for mode in ("linear", "nearest")),
    *((9, 9, f'y = Upsample <mode = "{mode}"> (x, grow)') for mode in ("linear", "nearest")),
    (9, 20, "b = Less (x, z) y = Where (b, x, z)"),
]  # fmt: skip

QUANTIZED = frozenset({"DequantizeLinear", "QLinearMatMul", "QuantizeLinear"})
"""What has one of them is not quantized again."""


def history() -> dict[str, dict[int, Any]]:
    """The schemas of each operator of ONNX by the opset that began with them."""
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    for schema in defs.get_all_schemas_with_history():
        if not schema.domain and schema.since_version <= NEWEST and schema.name not in QUANTIZED:
            found[schema.name][schema.since_version] = schema
    return {name: dict(sorted(versions.items())) for name, versions in found.items()}


CHANGES = {
    name: [version for version in list(versions)[1:] if version > OLDEST]
    for name, versions in history().items()
}


def build(text: str, opset: int, functions: str = "") -> onnx.ModelProto:
    """A graph of nodes that read what they like of the pool, and whose last node gives y, y2, …"""
    domains = f'["": {opset}, "local": 1, "com.microsoft": 1]'
    model = parser.parse_model(
        f"<ir_version: 8, opset_import: {domains}> net () => () {{ {text} }} {functions}"
    )
    graph = model.graph
    for name in sorted({name for node in all_nodes(graph.node) for name in node.input} & {*POOL}):
        if any(name in node.output for node in graph.node):
            continue
        if name in INPUTS:
            dtype, shape = helper.np_dtype_to_tensor_dtype(POOL[name].dtype), POOL[name].shape
            graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
        else:
            graph.initializer.append(numpy_helper.from_array(POOL[name], name))
    outputs = [name for name in graph.node[-1].output if name != "unread"]
    graph.output.extend(map(helper.make_empty_tensor_value_info, outputs))
    return model


def answers(model: onnx.ModelProto) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    given: list[Any] = session.run(None, {one.name: POOL[one.name] for one in session.get_inputs()})
    return given


def raised(model: onnx.ModelProto, needed: int = 13) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    assert raise_opset(copy, needed, "net")
    return copy


def last_opsets(first: int, last: int, text: str) -> set[int]:
    """Those of a case that are the last before one of its operators changes."""
    operators = set(re.findall(r"= (\w+)", text)) & CHANGES.keys()
    changes = {change - 1 for name in operators for change in CHANGES[name]}
    return {opset for opset in changes if first <= opset <= last}


@pytest.mark.parametrize(("first", "last", "text"), CASES)
def test_answers_stay(first: int, last: int, text: str) -> None:
    opsets = last_opsets(first, last, text)
    assert opsets
    for opset in opsets:
        model = build(text, opset)
        wanted = answers(model)
        for needed in {13, NEWEST} - set(range(opset + 1)):
            for one, other in zip(answers(raised(model, needed)), wanted, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_every_operator_that_changed_is_compared() -> None:
    compared = set()
    for first, last, text in CASES:
        opsets = last_opsets(first, last, text)
        names = set(re.findall(r"= (\w+)", text)) & CHANGES.keys()
        compared |= {(name, opset + 1) for name in names for opset in opsets}
    changes = {(name, change) for name, changes in CHANGES.items() for change in changes}
    assert changes - compared == {("Scan", 9)}  # which is refused
    assert max(_OPSETS.values()) <= NEWEST


def test_what_went_away_and_other_defaults_have_a_step() -> None:
    for name, versions in history().items():
        for old, new in pairwise(versions):
            one, other = versions[old].attributes, versions[new].attributes
            changed = {
                attribute
                for attribute in one.keys() & other.keys()
                if one[attribute].default_value != other[attribute].default_value
            }
            gone = one.keys() - other.keys()
            if new > OLDEST and (gone or changed or versions[new].deprecated):
                assert (name, new) in _STEPS, (name, new)
    for name, opset in _STEPS:
        assert opset in CHANGES[name], (name, opset)


REFUSED = [
    (8, "Scan", """y = Scan <num_scan_inputs = 1,
        body = b (float[4,6,6] s) => (float[4,6,6] r) { r = Relu (s) }> ("", x)"""),
    (8, "each position", "y = BatchNormalization <spatial = 0> (x, v, v, v, p)"),
    (9, "in training", "b, m1, m2, m3, m4 = BatchNormalization (x, v, v, v, p) y = Relu (b)"),
    (11, "mask is read", "b, mask = Dropout (x) y = Cast <to = 1> (mask)"),
    (12, "floor alone", """y = Resize <nearest_mode = "ceil",
        coordinate_transformation_mode = "tf_half_pixel_for_nn"> (x, none, grow)"""),
    (10, "no such 'axes'", "y = Softmax <axes = [1]> (x)"),
    (10, "no such 'axis'", "y = Softmax <axis = 1.5> (x)"),
    (10, "with 'pads' only", "y = Pad (x)"),
    (10, "other inputs", "y = Relu (x, x)"),
    (10, "other outputs", "y, y2 = Relu (x)"),
    (10, "no such operator", "y = Mish (x)"),
    (11, "no such operator", "y = Upsample (x, grow)"),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "why", "text"), REFUSED)
def test_what_has_no_equal_is_refused(opset: int, why: str, text: str) -> None:
    model = build(text, opset)
    with pytest.raises(unirt.ModelError, match=f"opset {opset} to 21.*{why}.*Export") as caught:
        raise_opset(model, 21, "net")
    assert (caught.value.opset, caught.value.needed) == (opset, 21)


def test_groups_of_how_many_channels_nobody_knows_are_refused() -> None:
    model = build("y = GroupNormalization <num_groups = 2> (x, g, h)", 18)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(unirt.ModelError, match="how many channels"):
        raise_opset(model, 21, "net")


def test_an_opset_from_before_onnx_1_2_is_refused() -> None:
    with pytest.raises(unirt.ModelError, match=r"in opset 6.*Export.*opset 13") as caught:
        raise_opset(build("y = Relu (x)", 6), 13, "net")
    assert caught.value.opset == 6


def test_operators_that_onnx_does_not_know_stay_and_are_told() -> None:
    model = build("b = EfficientNMS_TRT (x) y = com.microsoft.Gelu (b)", 17)
    (note,) = raise_opset(model, 21, "net")
    assert note.startswith("the graph was raised from opset 17 to 21; nobody knows")
    assert "EfficientNMS_TRT" in note
    assert "Gelu" not in note
    assert [node.op_type for node in model.graph.node] == ["EfficientNMS_TRT", "Gelu"]


def test_a_new_graph_is_left_as_it_is() -> None:
    model = build("y = Softmax (x)", 13)
    assert raise_opset(model, 13, "net") == []
    assert model == build("y = Softmax (x)", 13)


@pytest.mark.parametrize(
    ("axis", "shape", "flat"),
    [
        (1, (2, 10), False),
        (-1, None, False),
        (1, ("n", 10, 1, 1), False),
        (2, ("n", "k", 8), False),
        (1, ("n", 10, 1, "w"), True),
        (-2, (2, 10, 4), True),
        (1, None, True),
    ],
)
def test_softmax_is_flattened_where_it_must(axis: int, shape: Any, flat: bool) -> None:
    model = build(f"[soft] y = Softmax <axis = {axis}> (x)", 11)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, shape))
    made = raised(model)
    assert ("Flatten" in [node.op_type for node in made.graph.node]) == flat
    (soft,) = [node for node in made.graph.node if node.name == "soft"]
    assert soft.op_type == "Softmax"
    assert helper.get_node_attr_value(soft, "axis") == (-1 if flat else axis)


def test_graphs_inside_nodes_and_functions_are_raised_too() -> None:
    text = """b = Unsqueeze <axes = [0]> (x) e = Relu (x) y = If (c) <
        then_branch = t () => (float[1,2,4,6,6] o) {
            r = Hardmax (e) o = Unsqueeze <axes = [0]> (r) },
        else_branch = s () => (float[1,2,4,6,6] o) { o = Clip <max = 0.5> (b) }>"""
    model = build(text, 9)
    for chosen in (True, False):
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(chosen), "c"))
        np.testing.assert_array_equal(answers(raised(model))[0], answers(model)[0])

    function = """<opset_import: ["": 17], domain: "local"> f (a) => (b) {
        a__axes = Relu (a) [a] m = ReduceMean <axes = [1]> (a__axes) b = Sub (a, m) }"""
    model = build("y = local.f (x)", 17, function)
    made = raised(model, 18)
    np.testing.assert_allclose(answers(made)[0], answers(model)[0], rtol=1e-5, atol=1e-6)
    assert made.functions[0].opset_import[0].version == 18

    given = function.replace("f (a)", "f <ax> (a)").replace("axes = [1]", "axes: ints = @ax")
    model = build("y = local.f <ax = [1]> (x)", 17, given)
    with pytest.raises(unirt.ModelError, match="comes from the call of a function"):
        raise_opset(model, 18, "net")


def test_names_and_what_a_file_says_besides_stay() -> None:
    model = build("a = Clip <max = 0.5> (x) [mid] b = com.microsoft.Gelu (a) y = Neg (b)", 9)
    model.metadata_props.add(key="made by", value="me")
    model.graph.doc_string = model.graph.node[1].doc_string = "what it is"
    model.graph.value_info.append(helper.make_tensor_value_info("a", 1, [2, 4, 6, 6]))
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.float32([1]), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(_whole(2), "at"))
    made = raised(model)
    # Nodes without a name are called by where they stood in the graph that was given.
    names = [node.name for node in made.graph.node if node.op_type != "Constant"]
    assert names == ["Clip_0", "mid", "Neg_2"]
    assert made.metadata_props == model.metadata_props
    assert [node.doc_string for node in made.graph.node if node.name == "mid"] == ["what it is"]
    assert made.graph.doc_string == "what it is"
    assert made.graph.value_info == model.graph.value_info
    assert made.graph.sparse_initializer == model.graph.sparse_initializer
