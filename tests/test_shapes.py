"""Shape profiles: what is a range, which calls fit, and what a model makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from unirt import ProfileError, ShapeProfile, TensorSpec

IMAGE = TensorSpec("x", "float32", ("n", 3, None, None))
BATCH = ((1, 3, 32, 32), (8, 3, 224, 224), (64, 3, 512, 512))


def test_one_shape_is_min_opt_and_max() -> None:
    profile = ShapeProfile({"x": (1, 3)})
    assert profile.shapes["x"] == ((1, 3), (1, 3), (1, 3))
    assert profile == ShapeProfile({"x": [(1, 3), [1, 3], np.array([1, 3]).tolist()]})


def test_the_usual_shapes_are_those_of_one_sample() -> None:
    # Most often x has one row, and y two: together they would be no input of the model.
    shapes = [((1, 3), (1, 5)), ((1, 3), (1, 6)), ((2, 4), (2, 7)), ((2, 9), (2, 7))]
    specs = [TensorSpec(name, "float32", ("n", None)) for name in "xy"]
    samples = [{"x": np.zeros(x), "y": np.zeros(y)} for x, y in shapes]
    profile = ShapeProfile.from_samples([*samples, samples[2]])
    profile.check(specs)
    assert (profile.shapes["x"][1], profile.shapes["y"][1]) == ((2, 4), (2, 7))
    ShapeProfile.from_samples(samples).check(specs)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (((8,), (1,), (64,)), "min <= opt <= max"),
        (((1,), (8,)), "no shape"),
        (((1, 3), (8, 3), (64,)), "different ranks"),
        ((-1, 3), "negative"),
        ("1x3", "no shape"),
        (((1,), (2.5,), (3,)), "no shape"),
        (7, "no shape"),
        ((True, 3), "no shape"),
    ],
)
def test_what_is_no_range_is_refused_with_the_reason(given: Any, told: str) -> None:
    with pytest.raises(ProfileError, match=told) as caught:
        ShapeProfile({"x": given})
    assert caught.value.name == "x"


def test_a_profile_without_names_is_refused() -> None:
    with pytest.raises(ProfileError, match="name"):
        ShapeProfile([(1, 3)])  # type: ignore[arg-type]


def test_samples_give_the_range_they_cover_and_their_most_frequent_shape() -> None:
    sizes = [1, 4, 4, 16, 2]
    profile = ShapeProfile.from_samples({"x": np.zeros((n, 3))} for n in sizes)
    assert profile.shapes["x"] == ((1, 3), (4, 3), (16, 3))
    for n in sizes:
        assert profile.fits({"x": (n, 3)})
    assert not profile.fits({"x": (17, 3)})


def test_samples_that_tell_nothing_or_differ_in_rank_are_refused() -> None:
    with pytest.raises(ProfileError, match="no sample"):
        ShapeProfile.from_samples([])
    with pytest.raises(ProfileError, match="ranks"):
        ShapeProfile.from_samples([{"x": np.zeros(3)}, {"x": np.zeros((3, 1))}])


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"image": BATCH}, "no input of the model"),
        ({"x": (1, 3, 32)}, "does not suit"),
        ({"x": (1, 4, 32, 32)}, "does not suit"),
        ({}, "no shapes for 'x'"),
    ],
)
def test_a_profile_that_does_not_suit_the_model_is_refused(shapes: Any, told: str) -> None:
    with pytest.raises(ProfileError, match=told):
        ShapeProfile(shapes).check([IMAGE])


def test_equal_symbols_need_equal_sizes() -> None:
    specs = [TensorSpec("a", "float32", ("n", 3)), TensorSpec("b", "float32", ("n",))]
    ShapeProfile({"a": ((1, 3), (2, 3), (4, 3)), "b": ((1,), (2,), (4,))}).check(specs)
    with pytest.raises(ProfileError, match="two sizes"):
        ShapeProfile({"a": ((1, 3), (2, 3), (4, 3)), "b": ((1,), (3,), (4,))}).check(specs)


def test_static_inputs_may_be_left_out() -> None:
    ShapeProfile({}).check([TensorSpec("x", "float32", (1, 3))])
    assert ShapeProfile({}).fits({"x": (1, 3)})


def test_a_static_profile_is_tighter_than_a_range() -> None:
    static, wide = ShapeProfile({"x": (1, 3)}), ShapeProfile({"x": ((1, 3), (8, 3), (64, 3))})
    assert static.spread == 1 < wide.spread


def test_a_profile_cannot_be_changed_and_reads_as_a_sentence() -> None:
    profile = ShapeProfile({"x": ((1, 3), (8, 3), (64, 3))}, {"k": ((1,), (5,), (9,))})
    with pytest.raises(TypeError):
        profile.shapes["x"] = ()  # type: ignore[index]
    assert str(profile) == (
        "x [1, 3] to [64, 3], most often [8, 3]; k = [1] to [9], most often [5]"
    )


def test_short_integer_inputs_are_bounded_by_value_too() -> None:
    samples = [
        {"x": np.zeros((2, 3), np.float32), "k": np.array([k, 7]), "ids": np.arange(40)}
        for k in (5, 2, 5)
    ]
    profile = ShapeProfile.from_samples(samples)
    assert dict(profile.values) == {"k": ((2, 7), (5, 7), (5, 7))}
