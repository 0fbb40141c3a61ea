"""Calibration: the ranges of a network's tensors, found in one pass and checked by other means."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

import unirt
from unirt.errors import BackendUnavailable, DataError, InputError, ModelError, OptionError
from unirt.precision import Calibration, Observations, Range, calibrate, observe
from unirt.precision.calibration.histogram import METHODS, Divergences, Histogram, entropy_half

DIGITS = Path(__file__).parent.parent / "examples" / "digits" / "digits.onnx"
TEST = DIGITS.with_name("test.npz")
BINS = 2048


def values_of(kind: str, count: int = 100_000) -> Any:
    random = np.random.default_rng(3)
    made = {
        "normal": lambda: random.standard_normal(count),
        "relu": lambda: np.maximum(random.standard_normal(count), 0),
        "laplace": lambda: random.laplace(size=count),
        "outliers": lambda: random.standard_t(3, count),
        "relu outliers": lambda: np.maximum(random.standard_t(3, count), 0),
        "uniform": lambda: random.random(count),
        "shifted": lambda: random.standard_normal(count) + 3,
        "few": lambda: random.standard_normal(300),
    }
    return made[kind]().astype(np.float32)


KINDS = [
    *("normal", "relu", "laplace", "outliers", "relu outliers", "uniform", "shifted", "few"),
]


def histogram_of(values: Any, parts: int = 1, bins: int = BINS) -> Histogram:
    histogram = Histogram(bins)
    for part in np.array_split(values, parts):
        assert histogram.add(part)
    return histogram


def int8_error(values: Any, threshold: float) -> float:
    """The mean squared error of symmetric int8, straight from its definition."""
    scale = threshold / 127
    exact = values.astype(np.float64)
    return float(np.square(np.clip(np.rint(exact / scale), -127, 127) * scale - exact).mean())


def graph(
    text: str, weights: Mapping[str, Any] | None = None, opset: int = 17, ir: int = 8
) -> onnx.ModelProto:
    """A model from ONNX's text form, with arrays as initializers."""
    domains = f'["": {opset}, "com.microsoft": 1]'
    model = parser.parse_model(f"<ir_version: {ir}, opset_import: {domains}> {text}")
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def scaling(operator: str = "Relu") -> onnx.ModelProto:
    """x, any number of rows of 4 -> y = operator(2 x)."""
    return graph(
        f"g (float[n, 4] x) => (float[n, 4] y) {{ h = Mul (x, two) y = {operator} (h) }}",
        {"two": np.float32(2)},
    )


def rows(*values: float) -> dict[str, Any]:
    return {"x": np.array([values], np.float32)}


def activations(model: Path, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor that a node makes, from ONNX Runtime itself."""
    runtime = pytest.importorskip("onnxruntime")
    proto = onnx.load(model)
    names = [name for node in proto.graph.node for name in node.output]
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(names, session.run(None, dict(feed)), strict=True)) | dict(feed)


@pytest.fixture(scope="module")
def images() -> Any:
    with np.load(TEST) as arrays:
        return arrays["image"]


@pytest.fixture(scope="module")
def digits() -> Observations:
    return observe(DIGITS, TEST)


# --- histograms ----------------------------------------------------------------------------------


def test_a_histogram_depends_on_neither_order_nor_arrays() -> None:
    values = values_of("outliers", 30_000)
    whole = histogram_of(values)
    growing = values[np.argsort(np.abs(values))]
    for other in (histogram_of(growing, 200), histogram_of(growing[::-1], 3)):
        np.testing.assert_array_equal(other.coarse()[0], whole.coarse()[0])
        for method in METHODS:
            assert other.range_by(method) == whole.range_by(method)


@pytest.mark.parametrize("kind", KINDS)
def test_a_histogram_counts_as_numpy_does(kind: str) -> None:
    values = values_of(kind)
    counts, edges = histogram_of(values, 5).coarse()
    size = np.abs(values).max()
    expected, _ = np.histogram(values.astype(np.float64), BINS, range=(-size, size))
    assert counts.sum() == values.size
    np.testing.assert_allclose(edges[[0, BINS // 2, -1]], [-size, 0, size])
    # What an edge cuts in proportion may be off by some of one bin's values, never by the zeros.
    usual = np.delete(expected, BINS // 2).max()
    assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 3 + usual / 8


def test_extremes_are_exact_however_far_apart() -> None:
    histogram = Histogram()
    # Nothing smaller than float32's normal values: engines have threads take those for 0.
    for values in ([2e-38, -3e-38], [-0.0], [3e-30], [-7.25, 1e-3], [3.4e38], []):
        assert histogram.add(np.array(values, np.float32))
    assert (histogram.low, histogram.high) == (-7.25, float(np.float32(3.4e38)))
    assert (histogram.values, histogram.zeros) == (7, 1)
    assert histogram.coarse()[0].sum() == 7
    for method in METHODS:
        found = histogram.range_by(method)
        assert -7.25 <= found.low <= found.high <= histogram.high


def test_what_is_not_finite_is_not_counted() -> None:
    histogram = histogram_of(np.float32([1, 2]))
    for wrong in (np.nan, np.inf, -np.inf):
        assert not histogram.add(np.float32([0, wrong, 9]))
    assert (histogram.values, histogram.high) == (2, 2.0)


@pytest.mark.parametrize("bins", [0, 128, 300, 2**17, 2048.0, True, None])
def test_bins_are_a_power_of_two(bins: Any) -> None:
    with pytest.raises(OptionError, match="power of two"):
        Histogram(bins)


# --- methods -------------------------------------------------------------------------------------


def collector(method: str, percentile: float = 99.99) -> Any:
    calibration = pytest.importorskip("onnxruntime.quantization.calibrate")
    return calibration.HistogramCollector(method, False, BINS, 128, percentile, "same")


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_onnxruntimes_on_the_same_histogram(kind: str) -> None:
    values = values_of(kind)
    size = np.abs(values).max()
    counts, edges = np.histogram(values, 512, range=(-size, size))
    wide = (counts, edges, np.float32(-99), np.float32(99), size)
    low, high = collector("entropy").get_entropy_threshold(wide, 128)
    half = entropy_half(counts.astype(np.int64))
    assert (edges[256 - half], edges[min(256 + half + 1, 512)]) == (low, high)


def test_entropy_is_onnxruntimes_with_all_bins() -> None:
    values = values_of("relu outliers")
    theirs, ours = collector("entropy"), histogram_of(values)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.collect({"x": values})
        low, high = theirs.compute_collection_result()["x"][:2]
    found = ours.range_by("entropy")
    assert found.low == low == 0
    assert found.high == pytest.approx(high, abs=2 * 2 * ours.size / BINS)
    assert found.high < 0.5 * ours.high


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_counts_lose_next_to_no_entropy(kind: str) -> None:
    # It may lead to another threshold, as good but for 0.002 nats; the narrowest loses more.
    values = values_of(kind)
    streamed = histogram_of(values, 9)
    counts, _ = np.histogram(values, BINS, range=(-streamed.size, streamed.size))
    halves = np.array([entropy_half(counts), entropy_half(streamed.coarse()[0])])
    best, found, worst = Divergences(counts).of(np.append(halves, 64))
    assert found <= best + 0.002
    assert kind == "relu outliers" or worst > best + 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_mse_finds_what_a_search_on_the_values_finds(kind: str) -> None:
    values = values_of(kind, 40_000)
    size = float(np.abs(values).max())
    best = min(int8_error(values, one) for one in np.linspace(size / 400, size, 400))
    found = histogram_of(values, 9).range_by("mse")
    assert int8_error(values, found.size) <= 1.01 * best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [90, 99.9, 99.99])
def test_percentiles_are_numpys_to_one_bin(kind: str, percentile: float) -> None:
    values = values_of(kind)
    histogram = histogram_of(values, 3)
    found = histogram.range_by("percentile", percentile)
    outside = (100 - percentile) / 2
    # Between neighbouring values any is a percentile.
    lows = [np.percentile(values, outside, method=m) for m in ("lower", "higher", "inverted_cdf")]
    highs = [
        np.percentile(values, 100 - outside, method=m) for m in ("lower", "higher", "inverted_cdf")
    ]
    assert min(lows) - histogram.width <= found.low <= max(lows) + histogram.width
    assert min(highs) - histogram.width <= found.high <= max(highs) + histogram.width


@pytest.mark.parametrize("outliers", [[1e5], [-1e5, 3e3], [1e30] * 20, [-3e38]])
def test_some_outliers_cost_percentiles_nothing(outliers: list[float]) -> None:
    usual = values_of("normal", 320_000)
    values = np.append(usual, np.float32(outliers))
    found = histogram_of(values, 3).range_by("percentile")
    lows, highs = np.percentile(values, [0.005, 99.995], method="inverted_cdf")
    assert found.low == pytest.approx(lows, rel=0.01)
    assert found.high == pytest.approx(highs, rel=0.01)
    # However they come, and among the first too, from which bins begin.
    for other in (values[::-1], np.random.default_rng(1).permutation(values)):
        assert histogram_of(other, 70).range_by("percentile") == found


def test_more_outliers_than_are_kept_are_counted_all_the_same() -> None:
    random = np.random.default_rng(2)
    values = random.standard_normal(50_000).astype(np.float32)
    values[:6000] *= 1e4
    values[:3] = -(2.0**17)  # on the edge of bins
    orders = (values, values[::-1], values[np.argsort(np.abs(values))])
    whole, *others = (histogram_of(order, 40) for order in orders)
    for other in others:
        np.testing.assert_array_equal(other.coarse()[0], whole.coarse()[0])
        for percentile in (80, 99, 99.99):
            found = other.range_by("percentile", percentile)
            assert found == whole.range_by("percentile", percentile)
            outside = (100 - percentile) / 2
            ends = np.percentile(values, [outside, 100 - outside], method="inverted_cdf")
            np.testing.assert_allclose([found.low, found.high], ends, atol=whole.width)


def test_the_hundredth_percentile_is_max() -> None:
    histogram = histogram_of(values_of("outliers"))
    assert histogram.range_by("percentile", 100) == histogram.range_by("max")


@pytest.mark.parametrize("percentile", [50, 0, -1, 100.1, float("nan"), "a", None, True])
def test_a_percentile_keeps_most(percentile: Any) -> None:
    with pytest.raises(OptionError, match="percentile"):
        histogram_of(values_of("few")).range_by("percentile", percentile)


def test_the_methods_differ() -> None:
    histogram = histogram_of(values_of("outliers"))
    sizes = sorted(histogram.range_by(method, 99.9).size for method in METHODS)
    assert all(b > 1.02 * a for a, b in itertools.pairwise(sizes)), sizes


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(OptionError, match=r"'kld'.*max, entropy, mse, percentile"):
        calibrate(DIGITS, TEST, method="kld")  # type: ignore[arg-type]
    for wrong in (5, ["max"], np.array(["max", "mse"])):
        with pytest.raises(OptionError, match="no calibration method"):
            calibrate(DIGITS, TEST, method=wrong)  # type: ignore[arg-type]


# --- networks ------------------------------------------------------------------------------------


def test_max_is_the_extremes_of_every_activation(digits: Observations, images: Any) -> None:
    expected = activations(DIGITS, {"image": images})
    found = digits.calibration("max")
    assert list(found.ranges) == ["image", *(name for name in expected if name != "image")]
    assert (found.samples, found.method, found.notes) == (450, "max", ())
    assert found.model == unirt.Model(DIGITS).hash
    for name, range_ in found.ranges.items():
        np.testing.assert_allclose(
            [range_.low, range_.high], [expected[name].min(), expected[name].max()], rtol=1e-4
        )


def test_calibrators_of_onnxruntime_agree(
    digits: Observations, images: Any, tmp_path: Path
) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._feeds = iter([{"image": images}])

        def get_next(self) -> Any:
            return next(self._feeds, None)

    inferred = onnx.shape_inference.infer_shapes(onnx.load(DIGITS))
    onnx.save(inferred, tmp_path / "digits.onnx")

    def theirs(method: str, **options: Any) -> dict[str, tuple[float, float]]:
        with contextlib.redirect_stdout(io.StringIO()):
            calibrator = quantization.create_calibrator(
                tmp_path / "digits.onnx",
                ["MaxPool", "AveragePool"],
                str(tmp_path / f"{method}.onnx"),
                getattr(quantization.CalibrationMethod, method),
                extra_options={"symmetric": False, **options},
            )
            calibrator.collect_data(Reader())
            ranges = calibrator.compute_data()
        return {name: ranges[name].range_value for name in ranges.data}

    entropy = {"num_bins": BINS, "num_quantized_bins": 128}
    for method, own, options, bins in (
        ("MinMax", digits.calibration("max"), {}, 0),
        ("Percentile", digits.calibration("percentile"), {"percentile": 99.99}, 1),
        ("Entropy", digits.calibration("entropy"), entropy, 2),
    ):
        found = theirs(method, **options)
        assert len(found) >= 3
        for name, (lowest, highest) in found.items():
            low, high = float(np.min(lowest)), float(np.max(highest))
            bin_width = 2 * digits.histograms[name].size / BINS
            tolerance = 1e-4 * abs(high) + bins * bin_width
            assert own.ranges[name].low == pytest.approx(low, abs=tolerance), (method, name)
            assert own.ranges[name].high == pytest.approx(high, abs=tolerance), (method, name)


def test_all_kinds_of_data_give_the_same(digits: Observations, images: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images)
    expected = digits.calibration("max").ranges
    for data, samples in (
        ({"image": images}, 450),
        (images, 450),
        (tmp_path / "images.npy", 450),
        (({"image": part} for part in np.array_split(images, 7)), 7),
        (list(np.array_split(images, 3)), 3),
    ):
        found = calibrate(DIGITS, data, method="max")
        assert found.samples == samples
        assert found.ranges.keys() == expected.keys()
        for name, range_ in found.ranges.items():
            assert range_.low == pytest.approx(expected[name].low, rel=1e-4)
            assert range_.high == pytest.approx(expected[name].high, rel=1e-4)


@pytest.mark.parametrize("engine", ["reference", "openvino", "onnxruntime@cpu"])
def test_engines_agree(engine: str, images: Any) -> None:
    plugin = unirt.plugins.plugin(engine.split("@")[0])
    if plugin is None or not plugin.availability.available:
        pytest.skip(f"{engine} is not here")
    some = images[::64]
    expected = observe(DIGITS, some)
    found = observe(DIGITS, some, engine=engine)
    assert (expected.engine, found.engine) == ("onnxruntime@cpu", f"{engine.split('@')[0]}@cpu")
    for method in ("max", "percentile"):
        theirs = expected.calibration(method).ranges  # type: ignore[arg-type]
        for name, range_ in found.calibration(method).ranges.items():  # type: ignore[arg-type]
            width = expected.histograms[name].width
            assert range_.low == pytest.approx(theirs[name].low, rel=1e-4, abs=2 * width)
            assert range_.high == pytest.approx(theirs[name].high, rel=1e-4, abs=2 * width)


@pytest.mark.parametrize("engine", ["reference", "onnxruntime"])
def test_little_memory_means_more_runs_and_the_same_counts(engine: str, images: Any) -> None:
    some = {"image": images[: 24 if engine == "onnxruntime" else 2]}
    whole = observe(DIGITS, some, engine=engine)
    parts = observe(DIGITS, some, engine=engine, memory=len(some["image"]) * 4000)
    single = observe(DIGITS, some, engine=engine, memory=1)
    assert whole.groups == 1 < parts.groups < single.groups == len(whole.histograms) - 1
    for other in (parts, single):
        assert other.calibration("max").ranges.keys() == whole.calibration("max").ranges.keys()
        for name, range_ in other.calibration("max").ranges.items():
            expected = whole.calibration("max").ranges[name]
            assert range_.low == pytest.approx(expected.low, rel=1e-5)
            assert range_.high == pytest.approx(expected.high, rel=1e-5)
            assert other.histograms[name].values == whole.histograms[name].values


def test_shapes_may_vary_and_larger_ones_split_the_runs() -> None:
    lengths = [3, 1, 40, 7, 500, 2]
    arrays = [np.arange(4 * n, dtype=np.float32).reshape(n, 4) - 6 for n in lengths]
    runs: list[int] = []

    def feeds() -> Iterator[dict[str, Any]]:
        for array in arrays:
            runs.append(len(array))
            yield {"x": array}

    found = observe(scaling(), feeds(), memory=10_000)
    assert runs == lengths
    assert found.groups == 2  # only the 500 rows take 8,000 bytes for each of h and y
    assert observe(scaling(), iter([{"x": a} for a in arrays[:4]]), memory=10_000).groups == 1
    flat = np.concatenate([array.ravel() for array in arrays])
    for name, values in (("x", flat), ("h", 2 * flat), ("y", np.maximum(2 * flat, 0))):
        histogram = found.histograms[name]
        assert histogram.values == values.size
        np.testing.assert_array_equal(histogram.coarse()[0], histogram_of(values).coarse()[0])


def test_a_shape_that_depends_on_values_is_measured_too() -> None:
    model = graph(
        "g (float[n] x) => (float[m] y)"
        "{ where = NonZero (x) at = Squeeze (where, axes) found = Gather (x, at) y = Neg (found) }",
        {"axes": np.array([0])},
    )
    values = np.float32([0, 3, 0, -5])
    found = observe(model, [values], memory=8)
    assert found.groups == 2
    assert found.calibration("max").ranges["y"] == Range(-3, 5)
    assert found.histograms["found"].values == 2


def test_only_what_depends_on_inputs_is_watched() -> None:
    model = graph(
        "g (float[n, 3] x, int64[n] i) => (float[n, 2] y, int64[n] j)"
        "{ moved = Transpose (w) c = Constant <value = float {2.0}> () s = Mul (moved, c)"
        "  m = MatMul (x, s) y = Relu (m) j = Add (i, i) }",
        {"w": np.eye(2, 3, dtype=np.float32)},
    )
    feed = {"x": np.ones((2, 3), np.float32), "i": np.array([1, 2])}
    found = calibrate(model, [feed], method="max")
    assert set(found.ranges) == {"x", "m", "y"}
    assert found.tensors == {*"xiwcsmyj", "moved"}
    assert found.ranges["y"] == Range(2, 2)


def test_subgraphs_run_and_are_not_watched() -> None:
    model = graph(
        "g (float[n] x, bool b) => (float[n] y)"
        "{ h = Neg (x) r = If (b) <"
        "  then_branch = t () => (float[n] a) { a = Mul (h, h) },"
        "  else_branch = e () => (float[n] c) { c = Identity (h) }> y = Abs (r) }"
    )
    feeds = [{"x": np.float32([1, 3]), "b": np.array(flag)} for flag in (True, False)]
    found = calibrate(model, feeds, method="max")
    assert found.ranges.keys() == {"x", "h", "r", "y"}
    assert found.ranges["r"] == Range(-3, 9)


def test_weights_that_are_listed_as_inputs_stay_weights() -> None:
    model = graph(
        "g (float[n, 2] x, float[2, 2] w) => (float[n, 2] y) { y = MatMul (x, w) }",
        {"w": np.eye(2, dtype=np.float32) * 3},
        opset=8,
        ir=3,
    )
    found = calibrate(model, [{"x": np.float32([[1, -2]])}], method="max")
    assert found.ranges == {"x": Range(-2, 1), "y": Range(-6, 3)}


def test_weights_beside_the_model_are_found(tmp_path: Path, images: Any) -> None:
    path = tmp_path / "digits.onnx"
    onnx.save(onnx.load(DIGITS), path, save_as_external_data=True, size_threshold=0)
    found = calibrate(path, images[:8], method="max")
    assert found.ranges == calibrate(DIGITS, images[:8], method="max").ranges
    assert found.model == unirt.Model(path).hash != unirt.Model(DIGITS).hash


def test_weights_too_large_for_one_message_go_to_files(
    monkeypatch: pytest.MonkeyPatch, images: Any
) -> None:
    monkeypatch.setattr("unirt.precision.calibration.watch._LIMIT", 1000)
    found = observe(DIGITS, images[:8], memory=20_000)
    assert found.groups > 1
    monkeypatch.undo()
    expected = observe(DIGITS, images[:8], memory=20_000)
    assert found.calibration("max").ranges == expected.calibration("max").ranges


def test_tensors_can_be_chosen(images: Any) -> None:
    found = calibrate(DIGITS, images[:4], tensors=["logits"], method="max")
    assert found.ranges.keys() == {"logits"}
    with pytest.raises(OptionError, match="Did you mean 'logits'") as caught:
        calibrate(DIGITS, images[:4], tensors=["logit"])
    assert caught.value.name == "logit"
    with pytest.raises(OptionError, match="constant"):
        calibrate(DIGITS, images[:4], tensors=["classify.2.weight"])
    with pytest.raises(ModelError, match="nothing to calibrate"):
        calibrate(DIGITS, images[:4], tensors=[])


def test_a_tensor_of_unknown_type_is_told() -> None:
    model = graph(
        "g (float[n, 4] x) => (float[n, 4] y) { h = com.microsoft.Gelu (x) y = Relu (h) }"
    )
    found = calibrate(model, [rows(1, 2, -3, 4)], method="max")
    assert found.ranges.keys() == {"x", "y"}
    assert "'h'" in found.notes[0]


# --- what is odd or wrong in the data ------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_constant_activations_are_told_and_have_a_scale(method: Any) -> None:
    feeds = [rows(-2, -2, -2, -2)] * 2
    found = calibrate(scaling(), feeds, method=method)
    assert found.ranges == {"x": Range(-2, -2), "h": Range(-4, -4), "y": Range(-1, 1)}
    assert [note.split("'")[1] for note in found.notes] == ["x", "h", "y"]
    assert "is 0 in every sample" in found.notes[2]


def test_what_is_next_to_0_is_not_called_0() -> None:
    # Normal numbers: engines may leave a thread that flushes smaller ones to 0.
    feeds = [rows(1e-36, 0, 0, -1e-37)] * 2
    found = calibrate(scaling(), feeds, method="max")
    assert found.ranges == dict.fromkeys(("x", "h", "y"), Range(-1, 1))
    assert found.notes[0].startswith("'x' is at most 1e-36 in every sample, next to 0")
    many = np.zeros((1, 100_000), np.float32)
    many[0, 3] = 5
    model = graph("g (float[n, m] x) => (float[n, m] y) { y = Relu (x) }")
    found = calibrate(model, [{"x": many}], method="percentile")
    assert found.ranges["x"] == Range(0, 5)
    assert "'x' is next to 0 but for outliers: its range is 0 to 5" in found.notes[0]


def test_a_tensor_without_elements_has_no_range() -> None:
    model = graph(
        "g (float[n, 4] x, float[k, 4] z) => (float[m, 4] y)"
        "{ h = Mul (x, two) r = Relu (z) y = Concat <axis = 0> (h, r) }",
        {"two": np.float32(2)},
    )
    empty = np.empty((0, 4), np.float32)
    found = calibrate(model, [{"x": empty, "z": np.ones((1, 4), np.float32)}])
    assert found.ranges.keys() == {"z", "r", "y"}
    assert {note.split("'")[1] for note in found.notes if "no element" in note} == {"x", "h"}


def test_samples_without_elements_are_no_data() -> None:
    empty = {"x": np.empty((0, 4), np.float32)}
    with pytest.raises(DataError, match="Sample 0 is empty"):
        calibrate(scaling(), [empty])
    with pytest.raises(DataError, match="Sample 1 is empty") as caught:
        calibrate(scaling(), [rows(1, 2, 3, 4), empty])
    assert caught.value.sample == 1
    model = graph("g (float[n] x, int64 k) => (float[n] y) { y = Relu (x) }")
    with pytest.raises(DataError, match=r"no data.*In 1 samples none of its 2 tensors"):
        calibrate(model, [{"x": np.empty(0, np.float32), "k": np.array(3)}])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_is_named(wrong: float) -> None:
    feeds = [rows(1, 2, 3, 4), rows(1, wrong, 3, 4)]
    with pytest.raises(DataError, match=f"(?i)'x' holds {wrong}.* in sample 1") as caught:
        calibrate(scaling(), feeds)
    assert (caught.value.tensor, caught.value.sample) == ("x", 1)


def test_the_sample_is_found_within_a_batch() -> None:
    array = np.ones((30, 4), np.float32)
    array[21, 2] = np.nan
    with pytest.raises(DataError) as caught:
        calibrate(scaling(), array)
    assert (caught.value.tensor, caught.value.sample) == ("x", 21)


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    with pytest.raises(DataError, match="'y' holds NaN") as caught:
        calibrate(scaling("Sqrt"), [rows(1, 1, 1, 1), rows(1, 1, 1, 1), rows(1, -1, 1, 1)])
    assert (caught.value.tensor, caught.value.sample) == ("y", 2)
    with pytest.raises(DataError, match="'h' holds inf"):
        calibrate(scaling(), [rows(3e38, 1, 1, 1)])


NOT_FINITE = {
    "log": ("y = Log (x)", -1, "Log 'Log_0' made them of finite ones", "no finite answer"),
    "pole": ("y = Log (x)", 0, "Log 'Log_0' made them of finite ones", "no finite answer"),
    "sum": ("[mul] y = Mul (x, huge)", 1e30, "Mul 'mul' made them of finite ones", "overflows"),
    "below": ("c = Constant <value_float = -1e30> () [m] y = Mul (x, c)", 1e30, "'m'", "overflows"),
    "nan": ("y = MatMul (x, bad)", 1, "MatMul 'MatMul_0' reads the weight 'bad'", "damaged"),
    "inf": ("y = Add (x, worse)", 1, "Add 'Add_0' reads the weight 'worse'", "damaged"),
    "masked": ("s = Add (x, mask) y = Softmax (s)", 1, "Softmax 'Softmax_1' made them. ", "answer"),
    "whole": ("c = Cast <to = 7> (x) e = Cast <to = 1> (c) y = Div (x, e)", 0, "Div 'Div_2'", "no"),
}


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_the_node_that_made_it_is_named_with_what_it_made_it_of(kind: str) -> None:
    text, value, made, remedy = NOT_FINITE[kind]
    wrong = np.eye(4, dtype=np.float32)
    wrong[1, 2] = np.nan
    weights = {
        "huge": np.float32(1e30),
        "bad": wrong,
        "worse": np.float32([1, np.inf, 1, 1]),
        "mask": np.full(4, -np.inf, np.float32),
    }
    used = {name: array for name, array in weights.items() if name in text}
    model = graph(f"g (float[n, 4] x) => (float[n, 4] y) {{ {text} }}", used)
    with pytest.raises(DataError, match=made) as caught:
        calibrate(model, [rows(value, 1, 2, 3)])
    assert remedy in caught.value.remedy
    assert ("overflow" in str(caught.value)) == (remedy == "overflows")
    assert caught.value.node
    assert repr(caught.value.node) in made
    assert caught.value.tensor == "y"


def test_what_was_not_seen_is_not_called_finite() -> None:
    model = graph("g (float[n, 4] x) => (float[n, 4] y) { h = Exp (x) y = Mul (h, h) }")
    with pytest.raises(DataError, match=r"Mul 'Mul_1' made them\. Look") as caught:
        calibrate(model, [rows(80, 1, 2, 3)], tensors=["y"])
    assert "overflow" not in str(caught.value)
    with pytest.raises(DataError, match=r"'x' holds inf in sample 0.*can hold them\. Look"):
        calibrate(model, [rows(np.inf, 1, 2, 3)])


def test_a_graph_that_cannot_be_quantized_is_refused_before_it_runs() -> None:
    old = graph("g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }", opset=6, ir=3)
    with pytest.raises(ModelError, match="in opset 6, which cannot be quantized"):
        calibrate(old, [rows(1, 2, 3, 4)])
    twice = graph("g (float[n, 4] x) => (float[n, 4] y) { [a] h = Relu (x) [a] y = Exp (h) }")
    with pytest.raises(ModelError, match="2 nodes of the network are called 'a'"):
        calibrate(twice, [rows(1, 2, 3, 4)])


def test_a_mask_of_infinities_costs_only_its_own_range() -> None:
    model = graph(
        "g (float[n, 4] x, bool[n, 4] keep) => (float[n, 4] y)"
        "{ s = Where (keep, x, never) p = Softmax (s) y = MatMul (p, w) }",
        {"never": np.float32(-np.inf), "w": np.eye(4, dtype=np.float32)},
    )
    feed = {"x": np.float32([[1, 2, 3, 4]]), "keep": np.array([[True, True, False, True]])}
    found = calibrate(model, [feed], method="max")
    assert found.ranges.keys() == {"x", "p", "y"}
    assert "'s' holds -inf" in found.notes[0]
    with pytest.raises(DataError, match="'s' holds -inf"):
        calibrate(model, [feed], tensors=["s"])


def test_no_data_is_an_error(tmp_path: Path) -> None:
    used = iter([rows(1, 2, 3, 4)])
    assert calibrate(scaling(), used).samples == 1
    for empty in ([], used, {"x": np.empty((0, 4), np.float32)}):
        with pytest.raises(DataError, match=r"no data|no sample"):
            calibrate(scaling(), empty)
    for wrong in (3, None, tmp_path / "none.npz"):
        with pytest.raises(DataError):
            calibrate(scaling(), wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"z": np.ones((1, 4), np.float32)},
        {},
        {"x": np.ones((1, 5), np.float32)},
        {"x": np.ones(4, np.float32)},
        {"x": np.ones((1, 4))},
        "text",
        3,
    ],
    ids=["name", "missing", "shape", "rank", "dtype", "text", "number"],
)
def test_inputs_that_do_not_fit_are_errors_with_their_sample(wrong: Any) -> None:
    with pytest.raises(InputError, match="In sample 1") as caught:
        calibrate(scaling(), [rows(1, 2, 3, 4), wrong])
    assert caught.value.sample == 1
    if isinstance(wrong, dict):
        with pytest.raises(DataError):
            calibrate(scaling(), wrong | {"z": np.ones((1, 4), np.float32)})


def test_what_the_data_raises_comes_through() -> None:
    def broken() -> Iterator[Any]:
        yield rows(1, 2, 3, 4)
        raise LookupError("the disk is gone")

    with pytest.raises(LookupError, match="the disk is gone"):
        calibrate(scaling(), broken())


# --- models and engines that cannot be calibrated ------------------------------------------------


def test_a_quantized_graph_is_refused() -> None:
    pair = graph(
        "g (float[n, 4] x) => (float[n, 4] y)"
        "{ q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) y = Relu (d) }",
        {"s": np.float32(0.1)},
    )
    integers = graph(
        "g (uint8[n, 4] a, uint8[4, 2] b) => (float[n, 2] y)"
        "{ i = MatMulInteger (a, b) y = Cast <to = 1> (i) }"
    )
    for model, name in ((pair, "QuantizeLinear"), (integers, "MatMulInteger")):
        with pytest.raises(ModelError, match=f"quantized already.*{name}"):
            calibrate(model, [rows(1, 2, 3, 4)])


def test_half_precision_is_refused(images: Any) -> None:
    half = unirt.precision.cast(DIGITS, "fp16").model
    with pytest.raises(ModelError, match=r"half precision.*float32 graph"):
        calibrate(half, images)


def test_a_graph_without_float32_is_refused() -> None:
    model = graph("g (int64[n] x) => (int64[n] y) { y = Add (x, x) }")
    with pytest.raises(ModelError, match="nothing to calibrate"):
        calibrate(model, [{"x": np.array([1])}])


def test_engines_that_cannot_be_are_refused(images: Any) -> None:
    with pytest.raises(BackendUnavailable, match="no such backend"):
        calibrate(DIGITS, images, engine="nothing")
    with pytest.raises(OptionError, match="without a precision"):
        calibrate(DIGITS, images, engine="openvino:fp16")
    # LiteRT reads no ONNX graph, or is not here at all.
    with pytest.raises((unirt.BackendError, BackendUnavailable), match="tflite"):
        calibrate(DIGITS, images, engine="tflite")


def test_an_engine_calibrates_on_the_device_that_it_takes_itself(images: Any) -> None:
    """Not on a CPU that TensorRT, for one, does not have."""
    plugin = unirt.plugins.plugin("tensorrt")
    if plugin is None or plugin.backend is None:
        pytest.skip("TensorRT is not here")
    if plugin.availability.available:
        assert observe(DIGITS, images[:4], engine="tensorrt").engine.startswith("tensorrt@cuda")
    else:
        with pytest.raises(BackendUnavailable, match="No NVIDIA GPU"):
            observe(DIGITS, images[:4], engine="tensorrt")


@pytest.mark.parametrize("memory", [0, -1, 1.5, None])
def test_memory_is_a_count_of_bytes(memory: Any) -> None:
    with pytest.raises(OptionError, match="memory"):
        calibrate(DIGITS, TEST, memory=memory)


# --- calibrations --------------------------------------------------------------------------------


def test_a_saved_calibration_comes_back_and_can_be_read(
    digits: Observations, tmp_path: Path
) -> None:
    saved = digits.calibration("percentile", percentile=99.9)
    path = saved.save(tmp_path / "digits.json")
    loaded = Calibration.load(path)
    assert loaded == saved
    assert loaded.tensors == saved.tensors
    text = path.read_text()
    assert json.loads(text)["method"] == "percentile 99.9"
    low, high = saved.ranges["logits"].low, saved.ranges["logits"].high
    assert f'    "logits": [{low!r}, {high!r}]\n' in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits.json"]


@pytest.mark.skipif(os.name != "posix", reason="files have no such modes")
def test_others_can_read_a_saved_calibration_as_they_can_other_files(
    digits: Observations, tmp_path: Path
) -> None:
    path = tmp_path / "digits.json"
    before = os.umask(0o027)
    try:
        digits.calibration().save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link.json"
    link.symlink_to(path)
    digits.calibration("max").save(link)
    assert link.is_symlink()
    assert Calibration.load(path).method == "max"


def test_a_file_that_cannot_be_written_is_an_error(digits: Observations, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be saved"):
        digits.calibration().save(tmp_path / "none" / "digits.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be saved"):
        digits.calibration().save(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    path = calibrate(scaling(), [rows(1, 2, 3, 4)]).save(tmp_path / "whole.json")
    data = path.read_bytes()
    for length in range(len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"whole\.json is no calibration"):
            Calibration.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"),
        ("version", 2),
        ("version", True),
        ("method", ""),
        ("method", 3),
        ("samples", -1),
        ("samples", 1.5),
        ("samples", True),
        ("model", "abc"),
        ("model", "g" * 64),
        ("model", None),
        ("notes", "text"),
        ("notes", [1]),
        ("tensors", ["x"]),
        ("tensors", {}),
        ("extra", 1),
        ("ranges", []),
        ("ranges", {"x": [1]}),
        ("ranges", {"x": [1, 2, 3]}),
        ("ranges", {"x": 1}),
        ("ranges", {"x": ["1", "2"]}),
        ("ranges", {"x": [2, 1]}),
        ("ranges", {"x": [0, 0]}),
        ("ranges", {"x": [True, 2]}),
        ("ranges", {"x": [None, 2]}),
        ("ranges", {"x": [0, 1e39]}),
        ("ranges", {"x": [0, 10**400]}),
        ("ranges", {"strange": [0, 1]}),
    ],
)
def test_every_value_of_a_file_is_checked(key: str, value: Any, tmp_path: Path) -> None:
    path = calibrate(scaling(), [rows(1, 2, 3, 4)]).save(tmp_path / "c.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError):
        Calibration.load(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{" * 10_000,
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "binary", "list", "number", "braces", "brackets", "nan", "twice", "digits"],
)
def test_a_hostile_file_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match="no calibration"):
        Calibration.load(path)
    for wrong in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(DataError, match="cannot be read"):
            Calibration.load(wrong)


def test_ranges_can_be_given_by_hand(digits: Observations) -> None:
    found = digits.calibration("max")
    changed = found.with_ranges({"logits": 8, "image": (-1, 2.5), "classify.2.weight": Range(0, 1)})
    assert changed.ranges["logits"] == Range(-8, 8)
    assert changed.ranges["image"] == Range(-1, 2.5)
    assert changed.ranges["classify.2.weight"] == Range(0, 1)
    untouched = set(found.ranges) - {"logits", "image"}
    assert all(changed.ranges[name] == found.ranges[name] for name in untouched)
    assert "by hand" in changed.notes[-1]
    assert "'logits', 'image'" in changed.notes[-1]
    assert found.ranges["logits"] != changed.ranges["logits"]
    numbers = found.with_ranges({"logits": np.float32(0.5), "image": np.array([0, 2])[:2]})
    assert numbers.ranges["logits"] == Range(-0.5, 0.5)


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), -1.0, 0, 0.0, 1e39, "1", None, True, [1], (1, 2, 3)),
        *((2, 1), (0, 0), (float("nan"), 1), (-float("inf"), 1), ("0", "1"), 1e-35),
    ],
    ids=str,
)
def test_what_is_no_range_is_refused(value: Any, digits: Observations) -> None:
    with pytest.raises(OptionError):
        digits.calibration("max").with_ranges({"logits": value})


def test_what_are_no_ranges_and_no_path_is_refused(digits: Observations) -> None:
    found = digits.calibration("max")
    wrong: Any
    for wrong in (5, None, ["logits"], "logits"):
        with pytest.raises(OptionError, match="no ranges by tensor name"):
            found.with_ranges(wrong)
        with pytest.raises(OptionError, match="no ranges by tensor name"):
            Calibration.from_ranges(DIGITS, wrong)
    for wrong in (5, None, b"there"):
        for use in (Calibration.load, found.save):
            with pytest.raises(OptionError, match=r"of type .* is no path"):
                use(wrong)


def test_a_range_of_one_value_is_told(digits: Observations) -> None:
    found = digits.calibration("max").with_ranges({"logits": (5, 5), "image": (0, 1)})
    assert found.ranges["logits"] == Range(5, 5)
    assert found.notes[-1].startswith("The range of 'logits' was given as the one value 5")
    assert not any("image" in note for note in found.notes[-1:])


def test_a_negative_magnitude_is_called_so(digits: Observations) -> None:
    with pytest.raises(OptionError, match=r"'logits' is -1\.5.*largest magnitude.*Give 1\.5 for"):
        digits.calibration("max").with_ranges({"logits": -1.5})


def test_names_are_checked_where_they_are_known(digits: Observations) -> None:
    known = digits.calibration("max")
    with pytest.raises(OptionError, match="Did you mean 'logits'"):
        known.with_ranges({"logit": 1})
    unknown = Calibration(known.ranges, "max", 1, known.model)
    assert unknown.with_ranges({"logit": 1}).ranges["logit"] == Range(-1, 1)


def test_a_calibration_can_be_made_by_hand_alone(tmp_path: Path) -> None:
    made = Calibration.from_ranges(DIGITS, {"image": (0, 1), "logits": 9})
    assert made.ranges == {"image": Range(0, 1), "logits": Range(-9, 9)}
    assert (made.method, made.samples, made.notes) == ("by hand", 0, ())
    assert made.model == unirt.Model(DIGITS).hash
    assert Calibration.load(made.save(tmp_path / "hand.json")) == made
    with pytest.raises(OptionError, match="'imag'"):
        Calibration.from_ranges(DIGITS, {"imag": (0, 1)})


def test_a_calibration_knows_its_model(
    digits: Observations, caplog: pytest.LogCaptureFixture
) -> None:
    found = digits.calibration("max")
    assert found.check(DIGITS) == ()
    again = onnx.load(DIGITS)
    again.producer_name = "another exporter"
    (note,) = found.check(again)
    assert "hash differs" in note
    assert note in caplog.text
    again.graph.node[0].output[0] = again.graph.node[1].input[0] = "renamed"
    assert "/features/features.0/Conv_output_0" in found.check(again)[1]
    with pytest.raises(ModelError, match="not one of"):
        found.check(scaling())


def test_a_calibration_that_shares_less_than_half_of_its_tensors_is_another_models() -> None:
    names = dict.fromkeys(("x", "h", "elsewhere", "lost"), Range(-1, 1))
    half = Calibration(names, "max", 1, "0" * 64)
    assert "2 of 4 calibrated tensors are not in" in half.check(scaling())[1]
    less = Calibration(names | {"third": Range(-1, 1)}, "max", 1, "0" * 64)
    with pytest.raises(ModelError, match="ranges of 5 tensors, and 3 of them") as caught:
        less.check(scaling())
    assert caught.value.missing == ("elsewhere", "lost", "third")
    assert "hash differs" in Calibration({}, "max", 1, "0" * 64).check(scaling())[0]


def test_importing_calibration_costs_no_more_than_unirt() -> None:
    code = "import unirt.precision, sys; print({'onnx', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_labels_beside_the_inputs_of_a_call_are_ignored_as_in_a_file() -> None:
    feeds = [rows(1, 0, 0, -1)]
    labelled = [{**feed, "labels": np.array([3])} for feed in feeds]
    assert calibrate(scaling(), labelled, method="max") == calibrate(scaling(), feeds, method="max")
    with pytest.raises(InputError, match="label"):
        calibrate(scaling(), [{**feeds[0], "label": np.array([3])}])
