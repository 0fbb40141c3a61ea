"""The shapes an engine is compiled for: ranges of dynamic inputs, and which range a call fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from unirt.errors import ProfileError
from unirt.types import TensorSpec

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]

Given = Sequence[int] | Sequence[Sequence[int]]
"""A range as a caller writes it: (min, opt, max), or one shape that is all three."""

SIZES = 8
"""No network takes more sizes than that in one input: a shape of so many dimensions."""

ROLES = ("min", "opt", "max")
_NONE: Mapping[str, Given] = MappingProxyType({})


@dataclass(frozen=True, init=False)
class ShapeProfile:
    """Smallest, most common and largest shapes of an engine's dynamic inputs.

    `shapes` maps an input to `(min, opt, max)`, or to one shape that is all three. `values` does
    the same for inputs whose content is a shape (the sizes of a Resize, the k of a TopK): there the
    numbers themselves are bounded. Inputs that are static in the model may be left out. An engine
    may have several profiles; for each call it takes the tightest one that fits.

    ShapeProfile({"x": ((1, 3, 224, 224), (8, 3, 224, 224), (64, 3, 224, 224))})

    Immutable. Raises ProfileError for anything that is no range.
    """

    shapes: Mapping[str, Range]
    values: Mapping[str, Range]

    def __init__(self, shapes: Mapping[str, Given], values: Mapping[str, Given] = _NONE) -> None:
        for kind, given, least in (("shapes", shapes, 0), ("values", values, None)):
            if not isinstance(given, Mapping):
                raise ProfileError(
                    f"A profile's {kind} are {given!r}.",
                    "They are found by the name of the input.",
                    "Pass a dict: ShapeProfile({'x': ((1, 3), (8, 3), (64, 3))}).",
                )
            ranges = {str(name): _range(str(name), one, least) for name, one in given.items()}
            object.__setattr__(self, kind, MappingProxyType(ranges))

    @classmethod
    def from_samples(cls, samples: Iterable[Mapping[str, Any]]) -> Self:
        """The profile that covers these inputs: min and max over all, opt the most frequent sample.

        It bounds the values of short integer inputs too, in case they are sizes: engines take them
        for that only where the network uses them so.

        Raises ProfileError where there is no sample, or one input comes in several ranks.
        """
        seen: dict[str, dict[Shape, None]] = {}
        together: Counter[tuple[tuple[str, Shape], ...]] = Counter()
        values: dict[str, list[Shape]] = {}
        for sample in samples:
            for name, value in sample.items():
                if _may_be_sizes(value):
                    values.setdefault(name, []).append(tuple(map(int, np.ravel(value))))
            shapes_of = {
                name: tuple(int(size) for size in np.shape(value)) for name, value in sample.items()
            }
            for name, shape in shapes_of.items():
                seen.setdefault(name, {})[shape] = None
            together[tuple(shapes_of.items())] += 1
        # Of one sample: inputs with an axis in common must agree.
        usual = dict(together.most_common(1)[0][0]) if together else {}
        if not seen:
            raise ProfileError(
                "There is no sample to derive a profile from.",
                "The samples are empty, or hold no input.",
                "Pass at least one dict of arrays, or give profiles by hand.",
            )
        shapes = {}
        for name, found in seen.items():
            if len({len(shape) for shape in found}) > 1:
                raise ProfileError(
                    f"The samples of {name!r} have different ranks.",
                    f"They come as {', '.join(map(str, found))}.",
                    "A network's input has one rank: check the samples.",
                    name=name,
                )
            columns = list(zip(*found, strict=True))
            shapes[name] = (
                tuple(min(column) for column in columns),
                usual.get(name, next(iter(found))),
                tuple(max(column) for column in columns),
            )
        count = sum(together.values())
        bounded = {
            name: (_each(min, found), max(found, key=found.count), _each(max, found))
            for name, found in values.items()
            if len(found) == count and len({len(one) for one in found}) == 1
        }
        return cls(shapes, bounded)

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Raises ProfileError unless every range belongs to an input of the model and suits it,
        and every dynamic input has one.
        """
        known = {spec.name: spec for spec in specs}
        for name in (*self.shapes, *self.values):
            if name not in known:
                raise ProfileError(
                    f"The profile speaks of {name!r}, which is no input of the model.",
                    f"Its inputs are: {', '.join(known) or 'none'}.",
                    "Name the inputs as the model does.",
                    name=name,
                )
        for name, ranges in self.shapes.items():
            spec = known[name]
            if spec.shape is None:
                continue
            for role, shape in zip(ROLES, ranges, strict=True):
                fits = len(shape) == len(spec.shape) and all(
                    not isinstance(size, int) or size == wanted
                    for size, wanted in zip(spec.shape, shape, strict=True)
                )
                if not fits:
                    raise ProfileError(
                        f"The profile's {role} shape {list(shape)} does not suit {name!r}.",
                        f"The model takes {spec}.",
                        "Give every shape the model's rank and its fixed sizes.",
                        name=name,
                        expected=spec,
                    )
        for index, role in enumerate(ROLES):
            sizes: dict[str, tuple[str, int]] = {}
            for name, ranges in self.shapes.items():
                for symbol, wanted in zip(known[name].shape or (), ranges[index], strict=False):
                    if not isinstance(symbol, str):
                        continue
                    other, have = sizes.setdefault(symbol, (name, wanted))
                    if have != wanted:
                        raise ProfileError(
                            f"The profile's {role} gives {symbol!r} two sizes.",
                            f"It is {have} in {other!r} and {wanted} in {name!r}; the model says "
                            "that they are the same.",
                            "Give equal symbols equal sizes.",
                            name=name,
                        )
        for spec in specs:
            if not spec.is_static and spec.name not in self.shapes:
                raise ProfileError(
                    f"The profile has no shapes for {spec.name!r}.",
                    f"The model leaves its shape open: {spec}.",
                    "Give its min, opt and max, or derive a profile from samples: "
                    "ShapeProfile.from_samples(samples).",
                    name=spec.name,
                )

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes lie inside; inputs without a range always do."""
        for name, shape in shapes.items():
            bounds = self.shapes.get(name)
            if bounds is not None and not _inside(shape, bounds):
                return False
        return True

    @property
    def spread(self) -> float:
        """How wide it is: 1 for a static profile; the smaller, the tighter."""
        return prod(
            (1 + high - low)
            for low_s, _, high_s in (*self.shapes.values(), *self.values.values())
            for low, high in zip(low_s, high_s, strict=True)
        )

    def __hash__(self) -> int:
        return hash(str(self))

    def to_dict(self) -> dict[str, Any]:
        return {
            kind: {name: [list(one) for one in ranges] for name, ranges in found.items()}
            for kind, found in (("shapes", self.shapes), ("values", self.values))
        }

    def __str__(self) -> str:
        parts = [f"{name} {_range_text(ranges)}" for name, ranges in (*self.shapes.items(),)] + [
            f"{name} = {_range_text(ranges)}" for name, ranges in self.values.items()
        ]
        return "; ".join(parts) or "no dynamic inputs"


def checked(profiles: Any, specs: Sequence[TensorSpec]) -> tuple[ShapeProfile, ...]:
    """What a caller gave as profiles, each checked against the model. Raises ProfileError."""
    listed = tuple(profiles) if isinstance(profiles, Iterable) else ()
    wrong = profiles if not isinstance(profiles, Iterable) else None
    wrong = next((one for one in listed if not isinstance(one, ShapeProfile)), wrong)
    if wrong is not None:
        raise ProfileError(
            f"A {type(wrong).__name__} stands where profiles are expected.",
            "They are a list of ShapeProfile.",
            "Write for example profiles=[ShapeProfile({'x': ((1, 3), (8, 3), (64, 3))})].",
        )
    for profile in listed:
        profile.check(specs)
    return listed


def _may_be_sizes(value: Any) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "iu"
        and value.ndim <= 1
        and 0 < value.size <= SIZES
    )


def _each(pick: Callable[[Iterable[int]], int], rows: Sequence[Shape]) -> Shape:
    return tuple(pick(column) for column in zip(*rows, strict=True))


def _range(name: str, given: Any, least: int | None) -> Range:
    problem = _problem(given, least)
    if not problem and all(isinstance(size, int | np.integer) for size in given):
        given = (given, given, given)
    if problem:
        raise ProfileError(
            f"The range of {name!r} is {given!r}.",
            f"{problem}.",
            f"Write ((min), (opt), (max)), for example {{{name!r}: ((1, 3), (8, 3), (64, 3))}}.",
            name=name,
        )
    low, common, high = (tuple(int(size) for size in shape) for shape in given)
    return low, common, high


def _problem(given: Any, least: int | None) -> str:
    def is_shape(value: Any) -> bool:
        return isinstance(value, Sequence) and all(
            isinstance(size, int | np.integer) and not isinstance(size, bool) for size in value
        )

    shapes: Any
    if isinstance(given, str) or not isinstance(given, Sequence):
        return "It is no shape and no (min, opt, max)"
    if is_shape(given):
        shapes = (given,)
    elif len(given) == 3 and all(is_shape(one) for one in given):
        shapes = given
    else:
        return "It is no shape and no (min, opt, max)"
    if len({len(shape) for shape in shapes}) > 1:
        return "Its shapes have different ranks"
    if least is not None and any(size < least for shape in shapes for size in shape):
        return "A size is negative"
    if len(shapes) == 3 and not all(
        low <= common <= high for low, common, high in zip(*shapes, strict=True)
    ):
        return "It is not min <= opt <= max in every dimension"
    return ""


def _inside(shape: Shape, bounds: Range) -> bool:
    low, _, high = bounds
    return len(shape) == len(low) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )


def _range_text(ranges: Range) -> str:
    low, common, high = (list(shape) for shape in ranges)
    return str(low) if low == high else f"{low} to {high}, most often {common}"
