"""The numbers: statistics and errors against brute force, samples in and out of files."""

from __future__ import annotations

import gc
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unirt import BackendError, DataError, TensorSpec
from unirt.accuracy import (
    ErrorMeter,
    classification_output,
    max_abs_error,
    mismatch,
    relative_error,
    share_differing,
    snr_db,
    top1,
)
from unirt.data import load_samples, random_inputs, random_samples, read_arrays
from unirt.measure import Timing, garbage_kept, machine, measure, measure_throughput

RNG = np.random.default_rng(0)
IMAGE = TensorSpec("image", "float32", ("batch", 2))
FIXED = TensorSpec("image", "float32", (4, 2))


def rows(count: int) -> np.ndarray:
    return np.arange(2 * count, dtype=np.float32).reshape(count, 2)


# --- timing --------------------------------------------------------------------------------------


def test_a_timing_holds_what_sorting_the_calls_gives() -> None:
    rounds = [[int(n) for n in RNG.integers(1_000, 9_000, size)] for size in (7, 1, 20)]
    timing = Timing.of(rounds)
    every = sorted(n for calls in rounds for n in calls)
    assert timing.calls == 28
    assert timing.rounds == 3
    assert timing.best == pytest.approx(every[0] * 1e-9)
    assert timing.mean == pytest.approx(sum(every) / 28 * 1e-9)
    assert timing.median == pytest.approx((every[13] + every[14]) / 2 * 1e-9)
    place = 0.95 * 27
    low, high = every[math.floor(place)], every[math.ceil(place)]
    assert timing.p95 == pytest.approx((low + (high - low) * (place - math.floor(place))) * 1e-9)
    assert timing.round_medians[1] == pytest.approx(rounds[1][0] * 1e-9)


def test_fewer_than_20_calls_have_no_p95() -> None:
    assert Timing.of([[1_000] * 19]).p95 is None
    assert Timing.of([[1_000] * 19]).to_dict()["p95_seconds"] is None
    assert Timing.of([[1_000] * 20]).p95 == pytest.approx(1e-6)


def test_candidates_take_turns_and_one_that_fails_costs_only_itself() -> None:
    calls: list[str] = []
    shares: list[float] = []
    seen: list[int] = []

    def slow(feed: Any) -> None:
        seen.append(feed["n"])
        calls.append("slow")
        time.sleep(0.002)

    def fails(feed: Any) -> None:
        calls.append("fails")
        if calls.count("fails") > 60:
            raise BackendError("It broke.")

    feeds = [{"n": n} for n in range(3)]
    found = measure(
        {"slow": slow, "fails": fails, "quick": lambda feed: calls.append("quick")},
        feeds,  # type: ignore[arg-type]
        seconds=0.2,
        progress=shares.append,
    )
    assert set(found.timings) == {"slow", "quick"}
    assert str(found.failures["fails"]) == "It broke."
    for timing in found.timings.values():
        assert 0 < timing.best <= timing.median
        assert timing.rounds >= 2
    assert found.timings["slow"].median > 0.002
    assert seen[:5] == [0, 1, 2, 0, 1]
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert len(turns) > 8
    # Warm-up and the first calls of a block are made, and do not count.
    assert calls.count("slow") > found.timings["slow"].calls + found.timings["slow"].rounds
    assert shares == sorted(shares)
    assert shares[-1] <= 1


def test_throughput_counts_what_a_stream_answers() -> None:
    def stream(feeds: Any) -> Any:
        for feed in feeds:
            time.sleep(0.001)
            yield feed

    def fails(feeds: Any) -> Any:
        yield from ()
        raise BackendError("It broke.")

    found = measure_throughput({"a": stream, "b": fails}, [{}], seconds=0.2)
    assert 0 < found.calls_per_second["a"] < 1_000
    assert set(found.failures) == {"b"}


def test_garbage_collection_waits_while_timing() -> None:
    with garbage_kept():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_machine_is_told_with_every_number() -> None:
    told = machine()
    assert {"cpu", "physical_cores", "memory_bytes", "os", "python", "numpy", "unirt"} <= set(told)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_errors_of_floats_are_those_of_their_formulas(dtype: str) -> None:
    reference = RNG.standard_normal((5, 7)).astype(dtype)
    got = (reference + RNG.standard_normal((5, 7)) * 0.01).astype(dtype)
    pairs = [(float(a), float(b)) for a, b in zip(got.flat, reference.flat, strict=True)]
    largest = max(abs(a - b) for a, b in pairs)
    assert max_abs_error(got, reference) == pytest.approx(largest)
    assert relative_error(got, reference) == pytest.approx(largest / max(abs(b) for _, b in pairs))
    noise = sum((a - b) ** 2 for a, b in pairs)
    decibels = 10 * math.log10(sum(b * b for _, b in pairs) / noise)
    assert snr_db(got, reference) == pytest.approx(decibels)


def test_equal_answers_have_no_error_whatever_they_hold() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, 1e300])
    assert relative_error(odd, odd.copy()) == 0
    assert snr_db(odd, odd.copy()) == math.inf
    assert share_differing(np.array([True, False]), np.array([True, True])) == 0.5
    empty = np.empty((0, 3), np.float32)
    assert (relative_error(empty, empty), snr_db(empty, empty)) == (0, math.inf)
    zeros = np.zeros(3)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros + 1e-9, zeros) == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_only_one_side_has_not_finite_is_infinitely_wrong(bad: float) -> None:
    good = np.ones(4, np.float32)
    wrong = good.copy()
    wrong[2] = bad
    for got, reference in ((wrong, good), (good, wrong), (wrong, -wrong + np.nan)):
        assert relative_error(got, reference) == math.inf
    assert snr_db(wrong, good) == -math.inf


def test_integers_are_subtracted_exactly() -> None:
    ends = np.array([-(2**63), 2**62], np.int64)
    assert max_abs_error(ends, np.array([2**63 - 1, 2**62 + 1], np.int64)) == float(2**64 - 1)
    assert max_abs_error(ends, np.array([-(2**63), 2**62 + 1], np.int64)) == 1
    small, large = np.array([250, 3], np.uint8), np.array([3, 250], np.uint8)
    assert max_abs_error(small, large) == 247


def test_a_meter_over_many_calls_says_what_one_call_would() -> None:
    reference = {"y": RNG.standard_normal((9, 4)), "n": RNG.integers(0, 5, (9, 2))}
    got = {"y": reference["y"] + 0.01, "n": reference["n"] + (reference["n"] == 3)}
    whole, parts = ErrorMeter(), ErrorMeter()
    whole.add(got, reference)
    for start in range(0, 9, 2):
        cut = slice(start, start + 2)
        parts.add({k: v[cut] for k, v in got.items()}, {k: v[cut] for k, v in reference.items()})
    for one, other in zip(whole.result(), parts.result(), strict=True):
        assert one.name == other.name
        assert one.error == pytest.approx(other.error)
        assert one.max_abs == other.max_abs
    floats, integers = whole.result()
    assert floats.snr_db == pytest.approx(snr_db(got["y"], reference["y"]))
    assert floats.differing is None
    assert integers.snr_db is None
    assert integers.differing == np.mean(reference["n"] == 3)


def test_each_kind_of_output_is_judged_by_what_suits_it() -> None:
    meter = ErrorMeter()
    labels = np.zeros(100, np.int64)
    once_wrong = labels.copy()
    once_wrong[0] = 900
    levels = np.full(100, 100, np.int8)
    meter.add(
        {"class": once_wrong, "level": levels + np.int8(1), "text": np.array(["a", "b"], object)},
        {"class": labels + 0, "level": levels, "text": np.array(["a", "c"])},
    )
    by_name = {found.name: found for found in meter.result()}
    assert by_name["class"].error == 0.01
    assert by_name["level"].error == 0.01
    assert by_name["text"].error == 0.5
    assert by_name["text"].max_abs is None
    assert by_name["class"].to_dict()["relative"] == "inf"


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_names_of_classes_that_are_all_off_by_one_are_all_wrong(dtype: Any) -> None:
    meter = ErrorMeter()
    meter.add({"y": np.full(9, 50_001, dtype)}, {"y": np.full(9, 50_000, dtype)})
    assert meter.result()[0].error == 1


def test_outputs_that_cannot_be_compared_say_why() -> None:
    x = np.ones((2, 3), np.float32)
    assert mismatch({"y": x}, {"y": x}) == ""
    assert "z" in mismatch({"y": x}, {"z": x})
    assert "float32 [2, 3]" in mismatch({"y": x}, {"y": x.astype(np.float64)})
    assert "[3, 2]" in mismatch({"y": x}, {"y": x.T})
    assert mismatch({"y": [x, x]}, {"y": [x, x]}) == ""
    assert "y[1]" in mismatch({"y": [x, x]}, {"y": [x]})


# --- task accuracy -------------------------------------------------------------------------------


def test_top1_is_what_a_loop_finds_and_nan_is_a_miss() -> None:
    scores = RNG.standard_normal((50, 6)).astype(np.float32)
    labels = RNG.integers(0, 6, 50)
    scores[3, labels[3]] = np.nan
    expected = [n != 3 and max(range(6), key=s.__getitem__) == labels[n]
                for n, s in enumerate(scores)]  # fmt: skip
    assert top1(scores, labels).tolist() == expected


def test_the_output_that_labels_are_about_is_found_by_its_shape() -> None:
    labels = np.array([0, 2])
    scores, other = np.zeros((2, 3), np.float32), np.zeros((2, 4, 4), np.float32)
    assert classification_output({"a": other, "b": scores}, labels) == "b"
    assert classification_output({"a": scores, "my_Logits": scores}, labels) == "my_Logits"
    assert classification_output({"a": other}, np.zeros((2, 4), np.int64)) == "a"
    with pytest.raises(DataError, match="several outputs"):
        classification_output({"a": scores, "b": scores}, labels)
    with pytest.raises(DataError, match="no output"):
        classification_output({"a": other}, labels)
    with pytest.raises(DataError, match="A label is 3, and the output 'b' has 3 classes"):
        classification_output({"b": scores}, np.array([0, 3]))


# --- samples -------------------------------------------------------------------------------------


def test_every_sample_is_met_once_and_a_fixed_batch_is_filled_up() -> None:
    data = {"image": rows(10), "labels": np.arange(10)}
    free = list(load_samples([IMAGE], data).batches(4))
    assert [batch.count for batch in free] == [4, 4, 2]
    assert [len(batch.inputs["image"]) for batch in free] == [4, 4, 2]
    samples = load_samples([FIXED], data)
    assert samples.call_size(None) == 4
    fixed = list(samples.batches(4))
    assert [batch.count for batch in fixed] == [4, 4, 2]
    assert [len(batch.inputs["image"]) for batch in fixed] == [4, 4, 4]
    np.testing.assert_array_equal(fixed[2].labels, [8, 9, 0, 1])
    np.testing.assert_array_equal(fixed[2].inputs["image"], rows(10)[[8, 9, 0, 1]])
    with pytest.raises(DataError, match="batches of 3"):
        samples.call_size(3)


def test_fewer_samples_than_a_batch_are_repeated() -> None:
    (feed,) = load_samples([FIXED], {"image": rows(3)}).feeds(4, 16)
    np.testing.assert_array_equal(feed["image"], rows(3)[[0, 1, 2, 0]])


def test_samples_are_views_and_one_rank_more_means_whole_inputs() -> None:
    image, scale = rows(12).reshape(3, 4, 2), np.arange(3, dtype=np.float32)
    specs = [FIXED, TensorSpec("scale", "float32", ())]
    samples = load_samples(specs, {"image": image, "scale": scale})
    batches = list(samples.batches(samples.call_size(None)))
    assert len(batches) == 3
    assert batches[2].inputs["scale"].shape == ()
    assert float(batches[2].inputs["scale"]) == 2
    assert np.shares_memory(batches[1].inputs["image"], image)


def test_a_value_without_axes_goes_into_every_call() -> None:
    specs = [IMAGE, TensorSpec("scale", "float32", ())]
    data = {"image": rows(2), "scale": np.array(7, np.float32)}
    assert [float(b.inputs["scale"]) for b in load_samples(specs, data).batches(1)] == [7, 7]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"img": rows(2)}, "missing: image; unknown: img.*It holds img; the model takes image"),
        ({"image": rows(2), "label": [1, 2]}, "unknown: label"),
        ({"image": rows(2).astype(np.float64)}, "float64.*never casts"),
        ({"image": rows(2), "labels": np.arange(3)}, "unequal length.*image 2, labels 3"),
        ({"image": rows(0), "labels": np.arange(0)}, "no samples"),
        ({"image": rows(2), "labels": [1.0, np.nan]}, "1 of them are NaN"),
        ({"image": rows(2), "labels": [1.0, 2.0]}, "they are float64"),
        ({"image": rows(2), "labels": [1, -100]}, "one is -100"),
        ({"image": rows(2), "labels": 1}, "without an axis"),
        ({"image": np.zeros(3, np.float32)}, "rank 2, or rank 3"),
        ({"image": np.zeros((2, 3), np.float32)}, "axis 1 is 3 instead of 2"),
        ({"image": [[1.0, 2.0]]}, "a list, not an array"),
        ({"image": np.array([[1, None]], object)}, "object"),
    ],
)
def test_data_that_does_not_fit_says_so(data: Any, told: str) -> None:
    with pytest.raises(DataError, match=f"(?s){told}") as caught:
        load_samples([IMAGE], data)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.remedy


def test_files_are_read_and_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", image=rows(3), labels=np.arange(3))
    samples = load_samples([IMAGE], tmp_path / "good.npz")
    assert samples.count == 3
    assert "good.npz" in samples.description
    np.save(tmp_path / "one.npy", rows(3))
    assert load_samples([IMAGE], str(tmp_path / "one.npy")).labels is None
    objects = np.array([[1, "two"]], object)
    np.savez(tmp_path / "objects.npz", image=objects)
    np.save(tmp_path / "objects.npy", objects)
    for name in ("objects.npz", "objects.npy"):
        with pytest.raises(DataError, match="unpickling"):
            load_samples([IMAGE], tmp_path / name)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "good.npz", image=rows(300))
    whole = (tmp_path / "good.npz").read_bytes()
    for number in range(60):
        broken = bytearray(whole)
        if number % 2:
            del broken[int(RNG.integers(len(whole))) :]
        else:
            broken[int(RNG.integers(len(whole)))] ^= 1 << int(RNG.integers(8))
        (tmp_path / "bad.npz").write_bytes(broken)
        try:
            found = load_samples([IMAGE], tmp_path / "bad.npz")
        except DataError:
            continue
        np.testing.assert_array_equal(found.inputs["image"], rows(300))
    for name in ("no such.npz", "."):
        with pytest.raises(DataError, match="no data file"):
            load_samples([IMAGE], tmp_path / name)


def test_an_archive_that_unpacks_to_more_than_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez(path, **{f"array{n}": rows(2) for n in range(4_000)})
    with zipfile.ZipFile(path) as archive:
        size, directory = archive.getinfo("array0.npy").file_size, archive.start_dir
    data = path.read_bytes()
    # 4 GiB each, by the directory at the end of the archive.
    records = data[directory:].replace(size.to_bytes(4, "little"), b"\xfe\xff\xff\xff")
    path.write_bytes(data[:directory] + records)
    with pytest.raises(DataError, match="does not fit into memory"):
        read_arrays(path)


def test_bfloat16_survives_a_npy_file(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = rows(3).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "data.npz", image=values)
    spec = TensorSpec("image", "bfloat16", ("batch", 2))
    read = load_samples([spec], tmp_path / "data.npz").inputs["image"]
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.astype(np.float32), rows(3))


# --- random inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "int8", "uint8", "int64", "bool", "string", "complex64"],
)
def test_random_inputs_come_from_spec_and_seed(dtype: str) -> None:
    spec = TensorSpec("x", dtype, ("batch", 3, None))
    first = random_inputs([spec], seed=1, shapes={"batch": 4})["x"]
    again = random_inputs([spec], seed=1, shapes={"batch": 4})["x"]
    other = random_inputs([spec], seed=2, shapes={"batch": 4})["x"]
    assert first.shape == (4, 3, 1)
    assert first.dtype == spec.numpy_dtype
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    if first.dtype.kind in "iu":
        assert first.min() >= 0
        assert first.max() < 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "int4", "uint2"])
def test_random_inputs_of_types_that_numpy_lacks(dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    spec = TensorSpec("x", dtype, (2, 3))
    value = random_inputs([spec])["x"]
    assert value.dtype == spec.numpy_dtype
    assert np.isfinite(value.astype(np.float32)).all()


def test_random_inputs_take_shapes_by_symbol_and_by_input() -> None:
    specs = [TensorSpec("a", "float32", ("n", 2)), TensorSpec("b", "int64", ("n",))]
    made = random_inputs(specs, shapes={"n": 5})
    assert made["a"].shape == (5, 2)
    assert made["b"].shape == (5,)
    assert random_inputs(specs, shapes={"a": (3, 2), "b": 3})["b"].shape == (3,)
    assert random_inputs([TensorSpec("s", "float32", ())])["s"].shape == ()
    unknown = TensorSpec("u", "float32", None)
    assert random_inputs([unknown], shapes={"u": (2, 3)})["u"].shape == (2, 3)
    for shapes, told in (
        ({"m": 5}, "no symbol 'm'"),
        ({"a": (3, 9)}, r"cannot have the shape \[3, 9\]"),
        ({"n": -1}, "cannot be -1"),
    ):
        with pytest.raises(DataError, match=told):
            random_inputs(specs, shapes=shapes)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"--shape u=1,3"):
        random_inputs([unknown])
    with pytest.raises(DataError, match="sequence"):
        random_inputs([TensorSpec("q", "float32", (1,), "sequence")])
    with pytest.raises(DataError, match="Give smaller shapes"):
        random_inputs([TensorSpec("h", "float32", (2**40, 2**40))])


def test_random_samples_know_how_many_rows_a_call_holds() -> None:
    out = [TensorSpec("y", "float32", ("batch", 10))]
    samples = random_samples([IMAGE], out, calls=3, batch=5)
    assert (samples.count, samples.rows) == (3, 5)
    assert samples.feeds(samples.call_size(5), 16)[0]["image"].shape == (5, 2)
    assert random_samples([FIXED], [TensorSpec("y", "float32", (4, 9))], calls=2).rows == 4
    assert random_samples([FIXED], [TensorSpec("y", "float32", (1, 9))], calls=2).rows == 1
    with pytest.raises(DataError, match="batches of 2"):
        random_samples([FIXED], [TensorSpec("y", "float32", (4, 9))], calls=2, batch=2)
