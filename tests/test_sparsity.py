"""2:4 sparsity: what is pruned, what stays and why, and what it costs."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser
from typer.testing import CliRunner

import unirt
from unirt import cli
from unirt.precision import check_sparsity, sparsify
from unirt.precision.sparsity import is_sparse, pruned_groups

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "sparsity.py"
RANDOM = np.random.default_rng(0)

Arrays = Mapping[str, Any]


def weight(*shape: int, dtype: str = "float32") -> Any:
    return RANDOM.standard_normal(shape).astype(dtype)


def graph(text: str, weights: Arrays, opset: int = 21, ir: int = 10) -> onnx.ModelProto:
    domains = f'["": {opset}, "acme": 1, "local": 1]'
    model = parser.parse_model(f"<ir_version: {ir}, opset_import: {domains}> {text}")
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def made(result: Any) -> onnx.ModelProto:
    model = onnx.load_from_string(result.model.primary.read())
    onnx.checker.check_model(model, full_check=True)
    return model


def constant(model: onnx.ModelProto, name: str) -> Any:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    node = next(node for node in model.graph.node if name in node.output)
    return numpy_helper.to_array(node.attribute[0].t)


def run(model: onnx.ModelProto, feed: Arrays) -> Any:
    with unirt.load(model, "reference") as session:
        return next(iter(session.run(dict(feed)).values()))


def nonzero_of_four(array: Any, axis: int, zero: Any = 0) -> Any:
    """How many of each four in a row differ from `zero`, counted one by one."""
    rows = np.moveaxis(np.asarray(array) != zero, axis, -1).reshape(-1, np.shape(array)[axis])
    return [int(row[at : at + 4].sum()) for row in rows for at in range(0, len(row), 4)]


def test_of_four_weights_the_two_largest_stay_and_of_equal_ones_the_first() -> None:
    rows = np.array([[1, -3, 2, 0.5], [2, 2, 2, 2], [0, 0, 0, 7], [-1, 5, -5, 5]], np.float32)
    expected = np.array([[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1]], bool)
    np.testing.assert_array_equal(pruned_groups(rows, 1), expected)
    np.testing.assert_array_equal(pruned_groups(rows.T.copy(), 0), expected.T)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_other_pair_of_the_four_keeps_more(axis: int) -> None:
    array = weight(8, 8, 8)
    kept = np.where(pruned_groups(array, axis), 0, array)
    rows = np.moveaxis(array, axis, -1).reshape(-1, 4)
    left = np.moveaxis(kept, axis, -1).reshape(-1, 4)
    for row, chosen in zip(rows, left, strict=True):
        best = max(abs(row[i]) + abs(row[j]) for i, j in itertools.combinations(range(4), 2))
        assert np.abs(chosen).sum() == pytest.approx(best)
        assert set(chosen) - {0} <= set(row)


CNN = """
cnn (float[N,32,8,8] x) => (float[N,32] y) {
  [conv] c = Conv <pads = [1,1,1,1]> (x, w, b)
  [relu] r = Relu (c)
  [pool] p = GlobalAveragePool (r)
  [flat] f = Flatten (p)
  [gemm] g = Gemm <transB = 1> (f, wg)
  [matmul] y = MatMul (g, wm)
}"""
CNN_WEIGHTS = {"w": weight(64, 32, 3, 3), "b": weight(64), "wg": weight(32, 64)}
CNN_WEIGHTS["wm"] = weight(32, 32)


def test_each_layer_is_pruned_along_the_axis_that_it_sums_over() -> None:
    model = graph(CNN, CNN_WEIGHTS)
    result = sparsify(model)
    sparse = made(result)
    assert result.kept == {}
    assert result.notes == ()
    assert [(p.node, p.weight, p.axis) for p in result.nodes] == [
        ("conv", "w", 1),
        ("gemm", "wg", 1),
        ("matmul", "wm", 0),
    ]
    for pruned in result.nodes:
        before, after = CNN_WEIGHTS[pruned.weight], constant(sparse, pruned.weight)
        assert set(nonzero_of_four(after, pruned.axis)) == {2}
        np.testing.assert_array_equal(after[after != 0], before[after != 0])
        gone = np.abs(before[after == 0]).astype(np.float64)
        whole = np.abs(before).astype(np.float64)
        assert pruned.l1_lost == pytest.approx(gone.sum() / whole.sum())
        lost = np.sqrt(np.square(gone).sum() / np.square(whole).sum())
        assert pruned.l2_lost == pytest.approx(lost)
        assert 0.1 < pruned.l1_lost < pruned.l2_lost < 0.5  # of normally distributed weights
    np.testing.assert_array_equal(constant(sparse, "b"), CNN_WEIGHTS["b"])
    assert model.graph.initializer[0].raw_data == CNN_WEIGHTS["w"].tobytes()


def test_what_is_pruned_computes_with_the_pruned_weights() -> None:
    sparse = made(sparsify(graph(CNN, CNN_WEIGHTS)))
    pruned = {t.name: numpy_helper.to_array(t) for t in sparse.graph.initializer}
    feed = {"x": weight(2, 32, 8, 8)}
    expected = run(graph(CNN, pruned), feed)
    np.testing.assert_array_equal(run(sparse, feed), expected)
    assert not np.allclose(expected, run(graph(CNN, CNN_WEIGHTS), feed))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_narrow_floats_are_pruned_as_they_are_stored(dtype: str) -> None:
    import ml_dtypes

    array = weight(64, 64).astype(getattr(ml_dtypes, dtype, dtype))
    number = helper.np_dtype_to_tensor_dtype(array.dtype)
    text = "g (float[N,64] x) => (float[N,64] y) { v = Cast <to = 1> (w) [fc] y = MatMul (x, v) }"
    result = sparsify(graph(text, {"w": array}))
    after = constant(made(result), "w")
    assert helper.np_dtype_to_tensor_dtype(after.dtype) == number
    wide, before = after.astype(np.float32), array.astype(np.float32)
    assert max(nonzero_of_four(wide, 0)) == 2
    np.testing.assert_array_equal(wide[wide != 0], before[wide != 0])


def test_constant_nodes_and_transposed_weights_are_pruned_where_they_are_stored() -> None:
    values = numpy_helper.from_array(weight(48, 64), "value")
    text = """g (float[N,64] x) => (float[N,48] y) {
      v = Transpose <perm = [1,0]> (w)
      [fc] y = MatMul (x, v)
    }"""
    model = graph(text, {})
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=values))
    result = sparsify(model)
    assert [(p.weight, p.axis) for p in result.nodes] == [("w", 1)]
    assert set(nonzero_of_four(constant(made(result), "w"), 1)) == {2}


def test_a_weight_on_the_left_is_summed_over_its_columns() -> None:
    text = """g (float[64,N] x) => (float[48,N] z) {
      [first] y = MatMul (w, x)
      [second] z = Gemm <transA = 1> (u, y)
    }"""
    result = sparsify(graph(text, {"w": weight(64, 64), "u": weight(64, 48)}))
    assert [(p.node, p.axis) for p in result.nodes] == [("first", 1), ("second", 0)]


QDQ = """
g (float[N,64,4,4] x) => (float[N,32,4,4] y) {
  xq = QuantizeLinear (x, s, z)
  xd = DequantizeLinear (xq, s, z)
  wd = DequantizeLinear <axis = 0> (wq, ws, wz)
  [conv] y = Conv (xd, wd)
}"""


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_quantized_weights_become_their_zero_point(dtype: str) -> None:
    zeros = np.arange(32) % 7 + (120 if dtype == "uint8" else -3)
    weights = {
        "s": np.float32(0.05),
        "z": np.int8(0),
        "wq": RANDOM.integers(0, 256, (32, 64, 1, 1)).astype(np.uint8).view(dtype),
        "ws": np.linspace(0.001, 0.1, 32, dtype=np.float32),
        "wz": zeros.astype(dtype),
    }
    model = graph(QDQ, weights)
    result = sparsify(model)
    after = constant(made(result), "wq")
    assert after.dtype == dtype
    points = weights["wz"].reshape(32, 1, 1, 1)
    assert max(nonzero_of_four(after, 1, points)) == 2
    before = weights["wq"].astype(int) - points
    left = after.astype(int) - points
    kept = left.reshape(-1, 4), before.reshape(-1, 4)
    np.testing.assert_array_equal(
        np.sort(np.abs(kept[0]), 1)[:, 2:], np.sort(np.abs(kept[1]), 1)[:, 2:]
    )
    assert check_sparsity(result.model).layers[0].sparse
    for name in ("ws", "wz", "s"):
        np.testing.assert_array_equal(constant(made(result), name), weights[name])


def test_blocks_of_a_quantized_weight_are_compared_by_what_they_stand_for() -> None:
    scales = np.ones((32, 32), np.float32)
    scales[::2] = 100  # of rows 0 and 1, 4 and 5, ...: blocks of two along the summed axis
    text = """g (float[N,64] x) => (float[N,32] y) {
      w = DequantizeLinear <axis = 0, block_size = 2> (wq, ws)
      [fc] y = MatMul (x, w)
    }"""
    levels = RANDOM.integers(1, 100, (64, 32)).astype(np.int8)
    after = constant(made(sparsify(graph(text, {"wq": levels, "ws": scales}))), "wq")
    expected = np.where((np.arange(64) % 4 < 2)[:, None], levels, 0)
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize(
    ("scale", "attributes"),
    [
        (np.ones(7, np.float32), "axis = 0"),
        (np.ones((7, 32), np.float32), "axis = 0, block_size = 2"),
        (np.ones(64, np.float32), "axis = 1"),
    ],
)
def test_a_scale_that_does_not_fit_its_weight_is_not_guessed(scale: Any, attributes: str) -> None:
    text = f"""g (float[N,64] x) => (float[N,32] y) {{
      w = DequantizeLinear <{attributes}> (wq, ws)
      [fc] y = MatMul (x, w)
    }}"""
    model = graph(text, {"wq": np.ones((64, 32), np.int8), "ws": scale})
    assert "more is done to it" in check_sparsity(model).layers[0].reason


def test_a_long_chain_of_conversions_is_no_weight() -> None:
    chain = "".join(f"v{at + 1} = Identity (v{at}) " for at in range(2000))
    text = f"g (float[N,64] x) => (float[N,64] y) {{ {chain} [fc] y = MatMul (x, v2000) }}"
    assert "no constant" in check_sparsity(graph(text, {"v0": weight(64, 64)})).layers[0].reason


def test_a_float_weight_before_its_quantizer_is_pruned() -> None:
    text = """g (float[N,64] x) => (float[N,32] y) {
      q = QuantizeLinear <axis = 1> (w, s, z)
      d = DequantizeLinear <axis = 1> (q, s, z)
      [fc] y = MatMul (x, d)
    }"""
    given = {"w": weight(64, 32), "s": np.full(32, 0.02, np.float32), "z": np.zeros(32, np.int8)}
    sparse = made(sparsify(graph(text, given)))
    assert set(nonzero_of_four(constant(sparse, "w"), 0)) == {2}
    seen = run(sparse, {"x": np.eye(64, dtype=np.float32)})
    assert max(nonzero_of_four(seen, 0)) == 2


REASONS = """
g (float[N,64,4,4] x, float[64,64] given) => (float[N,A,B,C] y, float[64,64] shown) {
  [odd] a = Conv (x, w_odd)
  [depthwise] b = Conv <group = 64> (x, w_dw)
  [grouped] c = Conv <group = 2> (x, w_group)
  [ragged] d = Conv (x, w_ragged)
  [tiny] e = Conv (x, w_tiny)
  [dynamic] f = MatMul (x, given)
  [nan] h = MatMul (x, w_nan)
  [shown] i = MatMul (x, w_shown)
  shown = Identity (w_shown)
  [tied] j = MatMul (x, w_tied)
  [embedding] k = Gather (w_tied, ids)
  [wide] l = MatMul (x, w_double)
  [computed] m = Abs (w_computed)
  [fed] n = MatMul (x, m)
  [vector] o = MatMul (x, w_vector)
  [fine] y = MatMul (x, w_fine)
}"""
REASONS_WEIGHTS = {
    "w_odd": weight(64, 30, 1, 1),
    "w_dw": weight(64, 1, 3, 3),
    "w_group": weight(64, 32, 1, 1),
    "w_ragged": weight(64, 20, 1, 1),
    "w_tiny": weight(8, 16, 1, 1),
    "w_nan": np.full((64, 64), np.nan, np.float32),
    "w_shown": weight(64, 64),
    "w_tied": weight(64, 64),
    "w_double": weight(64, 64).astype(np.float64),
    "w_computed": weight(64, 64),
    "w_vector": weight(64),
    "w_fine": weight(64, 64),
    "ids": np.array([1]),
}
EXPECTED = {
    "odd": "its summed axis has size 30, which is no multiple of 4",
    "depthwise": "it is depthwise, and sparse kernels sum over all inputs",
    "grouped": "it has 2 groups, and sparse kernels sum over all inputs",
    "ragged": "its summed axis has size 20, and sparse kernels take multiples of 16",
    "tiny": "it has only 128 weights, too few to gain by it",
    "dynamic": "its weight is no constant, or more is done to it than a conversion",
    "nan": "its weight has values that are not finite",
    "shown": "its weight is an output of the model",
    "tied": "Gather 'embedding' reads its weight too",
    "wide": "its weight is float64, which tensor cores do not take sparse",
    "fed": "its weight is no constant, or more is done to it than a conversion",
    "vector": "its weight is a vector",
}


def test_a_layer_that_stays_has_its_reason() -> None:
    model = graph(REASONS, REASONS_WEIGHTS)
    result = sparsify(model)
    assert dict(result.kept) == EXPECTED
    assert [p.node for p in result.nodes] == ["fine"]
    table = {layer.node: layer for layer in check_sparsity(model)}
    assert {name: row.reason for name, row in table.items() if not row.qualifies} == EXPECTED
    assert table["fine"].qualifies
    assert table["depthwise"].shape == (64, 1, 3, 3)
    assert "ragged" in str(result)
    assert "no multiple of 4" in str(check_sparsity(model))


def test_eight_bit_weights_want_32_inputs() -> None:
    text = """g (float[N,48] x) => (float[N,64] y) {
      w = DequantizeLinear (wq, s)
      [fc] y = MatMul (x, w)
    }"""
    levels = RANDOM.integers(-127, 128, (48, 64)).astype(np.int8)
    model = graph(text, {"wq": levels, "s": np.float32(0.1)})
    row = check_sparsity(model).layers[0]
    assert row.reason == "its summed axis has size 48, and sparse kernels take multiples of 32"
    assert not row.qualifies


def test_named_nodes_alone_are_pruned_even_where_it_hardly_pays() -> None:
    result = sparsify(graph(REASONS, REASONS_WEIGHTS), only=["tiny", "ragged"])
    assert [p.node for p in result.nodes] == ["ragged", "tiny"]
    assert result.kept["fine"] == "it is not among the nodes to prune"


def test_kept_nodes_stay() -> None:
    result = sparsify(graph(CNN, CNN_WEIGHTS), keep=["conv", "matmul"])
    assert [p.node for p in result.nodes] == ["gemm"]
    assert dict(result.kept) == {"conv": "it is to be kept", "matmul": "it is to be kept"}
    np.testing.assert_array_equal(constant(made(result), "w"), CNN_WEIGHTS["w"])


SHARED = """
g (float[N,64] x) => (float[N,64] z) {
  [one] y = MatMul (x, w)
  [other] z = Gemm <transB = TURNED> (y, w)
}"""


def test_a_shared_weight_is_pruned_once() -> None:
    shared = {"w": weight(64, 64)}
    result = sparsify(graph(SHARED.replace("TURNED", "0"), shared))
    assert [(p.node, p.weight) for p in result.nodes] == [("one", "w"), ("other", "w")]
    assert result.nodes[0].l1_lost == result.nodes[1].l1_lost > 0.1
    after = constant(made(result), "w")
    assert set(nonzero_of_four(after, 0)) == {2}


def test_a_shared_weight_stays_where_its_layers_do_not_agree() -> None:
    turned = graph(SHARED.replace("TURNED", "1"), {"w": weight(64, 64)})
    with pytest.raises(unirt.ModelError, match="no layer to prune") as caught:
        sparsify(turned)
    assert caught.value.kept == {
        "one": "it shares its weight with 'other', which sums another axis",
        "other": "it shares its weight with 'one', which sums another axis",
    }
    assert not any(layer.qualifies for layer in check_sparsity(turned))
    with pytest.raises(unirt.ModelError) as caught:
        sparsify(graph(SHARED.replace("TURNED", "0"), {"w": weight(64, 64)}), keep=["one"])
    assert caught.value.kept["other"] == "it shares its weight with 'one', which stays"
    with pytest.raises(unirt.OptionError, match="it shares its weight with 'one', which stays"):
        sparsify(graph(SHARED.replace("TURNED", "0"), {"w": weight(64, 64)}), only=["other"])


def test_pruning_again_changes_nothing_and_says_so() -> None:
    once = sparsify(graph(CNN, CNN_WEIGHTS))
    assert all(layer.sparse for layer in check_sparsity(once.model))
    assert [layer.zeros for layer in check_sparsity(once.model)] == [0.5, 0.5, 0.5]
    again = sparsify(once.model)
    assert again.model.hash == once.model.hash
    assert [p.l1_lost for p in again.nodes] == [0, 0, 0]
    assert again.notes == ("3 layers had 2:4 sparse weights before.",)
    assert not any(layer.sparse for layer in check_sparsity(graph(CNN, CNN_WEIGHTS)))


def test_layers_in_subgraphs_and_functions_stay_and_are_counted() -> None:
    text = """g (float[N,64] x, bool flag) => (float[N,64] z) {
      [main] y = MatMul (x, w)
      [choose] z = If (flag) <
        then_branch = t () => (float[N,64] t) { [inner] t = MatMul (y, v) },
        else_branch = e () => (float[N,64] e) { e = Neg (y) }>
    }"""
    given = {"w": weight(64, 64), "v": weight(64, 64)}
    result = sparsify(graph(text, given))
    assert [p.node for p in result.nodes] == ["main"]
    assert result.notes == ("1 layer in subgraphs stays as it is.",)
    np.testing.assert_array_equal(constant(made(result), "v"), given["v"])
    shared = graph(text.replace("(y, v)", "(y, w)"), {"w": weight(64, 64)})
    assert check_sparsity(shared).layers[0].reason == "If 'choose' reads its weight too"


@pytest.mark.parametrize(("opset", "ir"), [(8, 3), (9, 4), (17, 8)])
def test_weights_that_are_listed_as_inputs_are_pruned(opset: int, ir: int) -> None:
    """As older exporters do it, some of them with IR version 4 too."""
    text = "g (float[N,64] x, float[64,64] w) => (float[N,64] y) { [fc] y = MatMul (x, w) }"
    given = {"w": weight(64, 64)}
    model = graph(text, given, opset=opset, ir=ir)
    (row,) = check_sparsity(model)
    assert (row.weight, row.shape, row.dtype, row.qualifies) == ("w", (64, 64), "float32", True)
    result = sparsify(model)
    sparse = made(result)
    assert [value.name for value in sparse.graph.input] == ["x"]
    assert set(nonzero_of_four(constant(sparse, "w"), 0)) == {2}
    assert [spec.name for spec in result.model.inputs] == ["x"]
    feed = {"x": weight(2, 64)}
    pruned = np.where(pruned_groups(given["w"], 0), 0, given["w"])
    np.testing.assert_allclose(run(sparse, feed), feed["x"] @ pruned, rtol=1e-4, atol=1e-4)
    assert [value.name for value in model.graph.input] == ["x", "w"], "the caller's stays"


OTHERS = """
g (float[N,64,8,8] x, int8[N,64] q) => (float[N,32,8,8] y, int32[N,64] z) {
  [conv] c = Conv (x, w)
  [up] d = ConvTranspose (c, t)
  [down] y = Conv (d, u)
  [integer] z = MatMulInteger (q, i)
}"""
OTHERS_WEIGHTS = {
    "w": weight(64, 64, 1, 1),
    "t": weight(64, 32, 1, 1),
    "u": weight(32, 32, 1, 1),
    "i": RANDOM.integers(-9, 9, (64, 64)).astype(np.int8),
}


def test_other_layers_with_weights_are_listed_with_the_reason() -> None:
    model = graph(OTHERS, OTHERS_WEIGHTS)
    table = {layer.node: layer for layer in check_sparsity(model)}
    assert list(table) == ["conv", "up", "down", "integer"]
    up = table["up"]
    assert up.reason == "sparse kernels are for Conv, Gemm and MatMul, not for ConvTranspose"
    assert (up.operator, up.weight, up.shape, up.axis) == (
        "ConvTranspose",
        "t",
        (64, 32, 1, 1),
        None,
    )
    assert not up.qualifies
    assert not up.sparse
    assert table["integer"].reason.endswith("not for MatMulInteger")
    result = sparsify(model)
    assert [p.node for p in result.nodes] == ["conv", "down"]
    assert dict(result.kept) == {"up": up.reason, "integer": table["integer"].reason}
    np.testing.assert_array_equal(constant(made(result), "t"), OTHERS_WEIGHTS["t"])
    assert "up" in sparsify(model, keep=["up"]).kept
    with pytest.raises(unirt.OptionError, match=r"'up' cannot be pruned.*not for ConvTranspose"):
        sparsify(model, only=["up"])
    tied = graph(OTHERS.replace("(c, t)", "(c, w)"), {**OTHERS_WEIGHTS, "u": weight(32, 64, 1, 1)})
    assert check_sparsity(tied).layers[0].reason == "ConvTranspose 'up' reads its weight too"


def test_external_weights_are_pruned_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "cnn.onnx"
    onnx.save(graph(CNN, CNN_WEIGHTS), path, save_as_external_data=True, size_threshold=0)
    result = sparsify(path)
    expected = made(sparsify(graph(CNN, CNN_WEIGHTS)))
    for name in CNN_WEIGHTS:
        np.testing.assert_array_equal(constant(made(result), name), constant(expected, name))
    assert result.model.name == "cnn"


def test_what_is_wrong_is_said() -> None:
    model = graph(REASONS, REASONS_WEIGHTS)
    with pytest.raises(unirt.OptionError, match=r"'fin', and that is no layer.*mean 'fine'"):
        sparsify(model, keep=["fin"])
    with pytest.raises(unirt.OptionError, match="that is no layer"):
        sparsify(model, only=["embedding"])
    with pytest.raises(unirt.OptionError, match=r"Write only=\['fine'\]"):
        sparsify(model, only="fine")
    with pytest.raises(unirt.OptionError, match=r"'depthwise' cannot be pruned.*depthwise"):
        sparsify(model, only=["fine", "depthwise"])
    with pytest.raises(unirt.ModelError, match=r"'odd' stays.*it is not among the nodes"):
        sparsify(model, only=[])
    empty = graph("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }", {})
    with pytest.raises(unirt.ModelError, match="has none of Conv, Gemm and MatMul"):
        sparsify(empty)
    assert len(check_sparsity(empty)) == 0
    with pytest.raises(unirt.ModelError, match="it has tflite"):
        check_sparsity(DIGITS.with_suffix(".tflite"))


def remedies() -> dict[str, str]:
    """Of the errors that send their reader to the checker."""
    model = graph(REASONS, REASONS_WEIGHTS)
    one = "g (float[N,16,8,8] x) => (float[N,16,6,6] y) { [one] y = Conv <group = GROUPS> (x, w) }"
    tiny = graph(one.replace("GROUPS", "1"), {"w": weight(16, 16, 1, 1)})
    depthwise = graph(one.replace("GROUPS", "16"), {"w": weight(16, 1, 3, 3)})
    found = {}
    for name, given, only in (
        ("unknown", model, ["quite another"]),
        ("unfit", model, ["depthwise"]),
        ("tiny", tiny, None),
        ("depthwise", depthwise, None),
    ):
        with pytest.raises(unirt.UnirtError) as caught:
            sparsify(given, only=only)
        found[name] = caught.value.remedy
    return found


def test_errors_are_understood_in_python_and_on_the_command_line() -> None:
    found = remedies()
    for text in found.values():
        assert "`unirt sparsify --check`" in text
        assert "check_sparsity()" in text
    assert found["tiny"].endswith("is pruned if `only` names it, for example 'one'.")
    assert "only" not in found["depthwise"], "to name it would not help"


def test_the_command_names_nodes_as_the_function_does(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "sparse.onnx"
    onnx.save(graph(REASONS, REASONS_WEIGHTS), path)
    common = ["sparsify", path, "-o", out]
    document = told(*common, "--only", "fine", "--only", "tiny", "--keep", "tiny")
    assert [node["node"] for node in document["nodes"]] == ["fine"]
    assert document["kept"]["tiny"] == "it is to be kept"
    assert document["kept"]["ragged"] == "it is not among the nodes to prune"
    assert [layer.node for layer in check_sparsity(out) if layer.sparse] == ["fine"]
    error = told(*common, "--only", "fin", code=2)["error"]
    assert error["remedy"] == "Did you mean 'fine'?"


def test_the_command_shows_the_cost_or_how_to_see_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    out, data = tmp_path / "sparse.onnx", DIGITS.with_name("test.npz")
    measured = shown("sparsify", DIGITS, "-o", out, "--data", data)
    assert "accuracy 96.00% for 98.89% (-2.89 points)" in measured
    assert "of 450 samples on onnxruntime@cpu" in measured
    document = told("sparsify", DIGITS, "-o", out, "--data", data)
    assert document["samples"] == 450
    assert document["engine"].startswith("onnxruntime@cpu")
    assert document["accuracy_before"] == pytest.approx(0.9889, abs=1e-4)
    assert document["measured"]["accuracy"] == pytest.approx(0.96, abs=1e-4)
    assert "Not measured: give --data FILE.npz" in shown("sparsify", DIGITS, "-o", out)
    assert told("sparsify", DIGITS, "-o", out)["measured"] is None


def test_the_command_shows_no_numbers_of_a_weight_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graph(REASONS, REASONS_WEIGHTS), path)
    lines = [line.split() for line in shown("sparsify", path, "--check").splitlines()]
    rows = {cells[0]: cells for cells in lines if cells[1:2] == ["MatMul"]}
    assert rows["dynamic"][:6] == ["dynamic", "MatMul", "-", "-", "-", "no"]
    assert rows["fine"][:6] == ["fine", "MatMul", "64x64", "float32", "0%", "qualifies"]
    (line,) = (one for one in str(check_sparsity(path)).splitlines() if one.startswith("dynamic"))
    assert line.split()[1:7] == ["MatMul", "-", "-", "-", "no", "no:"]


def shown(*arguments: object, code: int = 0) -> str:
    """What a command prints."""
    done = CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "120"})
    assert done.exit_code == code, done.stderr
    return done.stdout


def told(*arguments: object, code: int = 0) -> Any:
    """The JSON document of a command."""
    return json.loads(shown(*arguments, "--json", code=code))


def test_a_dense_weight_is_not_taken_for_sparse() -> None:
    array = np.zeros((8, 8), np.float32)
    array[0, [0, 1]] = 1
    assert is_sparse(array, 1)
    array[0, 2] = 1
    assert not is_sparse(array, 1)
    assert is_sparse(array, 0)
    assert not is_sparse(np.zeros((8, 6), np.float32), 1)


def test_half_of_two_layers_costs_the_digits_three_points() -> None:
    """Pruned once and not trained again: 98.9 % of the images become 96.0 %."""
    pytest.importorskip("onnxruntime")
    data = np.load(DIGITS.with_name("test.npz"))

    def accuracy(model: Any) -> float:
        with unirt.load(model, "onnxruntime") as session:
            logits = session.run({"image": data["image"]})["logits"]
        return float((logits.argmax(1) == data["labels"]).mean())

    assert accuracy(DIGITS) == pytest.approx(0.9889, abs=1e-4)
    result = sparsify(DIGITS)
    first, second = (pruned.node for pruned in result.nodes)
    assert (first, second) == ("/features/features.6/Conv", "/features/features.13/Conv")
    assert accuracy(result.model) == pytest.approx(0.96, abs=0.005)
    # The layer that lost the larger share of its weights is the one that costs.
    assert accuracy(sparsify(DIGITS, keep=[first]).model) == pytest.approx(0.9867, abs=0.005)
    assert accuracy(sparsify(DIGITS, keep=[second]).model) == pytest.approx(0.9667, abs=0.005)
    assert result.nodes[0].l2_lost > result.nodes[1].l2_lost


def test_the_published_cost_is_what_pruning_costs() -> None:
    """`benchmarks/results/sparsity.json`, recomputed; a few images may fall otherwise elsewhere."""
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location("sparsity_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    text = (BENCHMARK.parent / "results" / "sparsity.json").read_text()
    published = json.loads(text)["networks"]
    assert list(published) == list(benchmark.NETWORKS) == ["digits", "photos"]
    for name, old in published.items():
        new = json.loads(json.dumps(benchmark.measure(name)))
        for key in ("model", "model_hash", "samples", "kept"):
            assert new[key] == old[key]
        assert new["accuracy"] == pytest.approx(old["accuracy"], abs=0.003)
        pairs = [(new["all"], old["all"]), *zip(new["layers"], old["layers"], strict=True)]
        for now, then in pairs:
            assert now.get("node") == then.get("node")
            assert now.get("l2_lost") == pytest.approx(then.get("l2_lost"), abs=1e-4)
            assert now["snr_db"] == pytest.approx(then["snr_db"], abs=0.1)
            assert now["accuracy"] == pytest.approx(then["accuracy"], abs=0.005)


def test_tensorrt_has_the_option_that_makes_use_of_it() -> None:
    from unirt_tensorrt._options import TensorRTOptions

    option = "sparse_weights"
    assert "2:4" in TensorRTOptions.__dataclass_fields__[option].metadata["help"]
    assert f"`{option}`" in (sparsify.__doc__ or "")


def test_tensorrt_builds_a_sparse_graph_with_that_option() -> None:
    pytest.importorskip("tensorrt_rtx")
    from unirt_tensorrt._library import load

    if not load().is_rtx:
        pytest.skip("another TensorRT is in use, whose builder needs a GPU")
    sparse = sparsify(graph(CNN, CNN_WEIGHTS, opset=17, ir=8)).model
    unirt.build(sparse, "tensorrt@aot", options={"sparse_weights": True}).close()
