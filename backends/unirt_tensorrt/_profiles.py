"""Shape profiles as the builder wants them: complete for its network, or derived where none is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unirt import ProfileError, ShapeProfile
from unirt_tensorrt._options import Range

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
ROLES = ("min", "opt", "max")


class NetworkInput:
    """What a network's input asks of a profile."""

    def __init__(self, tensor: Any) -> None:
        self.name: str = tensor.name
        self.sizes: tuple[int, ...] = tuple(tensor.shape)
        self.needs_values: bool = tensor.is_shape_tensor
        self.needs_shapes = -1 in self.sizes
        self.symbols = [tensor.get_dimension_name(axis) or "" for axis in range(len(self.sizes))]

    def check(self, profile: ShapeProfile) -> None:
        """Raises ProfileError where the profile does not suit this input."""
        for role, shape in zip(ROLES, profile.shapes.get(self.name, ()), strict=False):
            fits = len(shape) == len(self.sizes) and all(
                have in (-1, wanted) for have, wanted in zip(self.sizes, shape, strict=True)
            )
            if not fits:
                raise ProfileError(
                    f"The profile's {role} shape {list(shape)} does not suit {self.name!r}.",
                    f"The network takes {self}.",
                    "Give every shape the network's rank and its fixed sizes.",
                    name=self.name,
                )
        if self.needs_shapes and self.name not in profile.shapes:
            raise ProfileError(
                f"The profile has no shapes for {self.name!r}.",
                f"The network leaves them open: {self}.",
                "Give its min, opt and max.",
                name=self.name,
            )
        if not self.needs_values:
            return
        if self.name not in profile.values:
            raise ProfileError(
                f"The profile has no values for {self.name!r}.",
                "Its content decides shapes in the graph, so TensorRT needs a range of it.",
                values_example(self),
                name=self.name,
            )
        count = len(profile.values[self.name][0])
        if -1 not in self.sizes and count != (self.sizes or (1,))[0]:
            raise ProfileError(
                f"The profile bounds {count} values of {self.name!r}.",
                f"The network takes {self}.",
                values_example(self),
                name=self.name,
            )

    def __str__(self) -> str:
        sizes = (
            symbol or ("?" if size < 0 else str(size))
            for size, symbol in zip(self.sizes, self.symbols, strict=True)
        )
        return f"{self.name} [{', '.join(sizes)}]"


def values_example(one: NetworkInput) -> str:
    count = one.sizes[0] if one.sizes and one.sizes[0] > 0 else 1
    low, usual, high = ((number,) * count for number in (1, 8, 64))
    return (
        "Give its smallest, usual and largest content: "
        f"ShapeProfile({{...}}, values={{{one.name!r}: ({low}, {usual}, {high})}})."
    )


def complete(
    given: Sequence[ShapeProfile], inputs: Sequence[NetworkInput]
) -> tuple[ShapeProfile, ...]:
    """The given profiles, each once, reduced to what the network needs of them. Raises
    ProfileError.
    """
    known = {one.name for one in inputs}
    found: list[ShapeProfile] = []
    for profile in given:
        for name in (*profile.shapes, *profile.values):
            if name not in known:
                raise ProfileError(
                    f"The profile speaks of {name!r}, which is no input of the network.",
                    f"Its inputs are: {', '.join(sorted(known)) or 'none'}.",
                    "Name the inputs as the model does.",
                    name=name,
                )
        for one in inputs:
            one.check(profile)
        reduced = ShapeProfile(
            {one.name: profile.shapes[one.name] for one in inputs if one.needs_shapes},
            {one.name: profile.values[one.name] for one in inputs if one.needs_values},
        )
        if (reduced.shapes or reduced.values) and reduced not in found:
            found.append(reduced)
    return tuple(found)


def derive(inputs: Sequence[NetworkInput], first: Range, other: Range) -> ShapeProfile:
    """A profile by axis; equal symbols get equal sizes, those of the first axis before others."""
    leading = {one.symbols[0] for one in inputs if one.sizes[:1] == (-1,)} - {""}

    def sizes(one: NetworkInput, role: int) -> tuple[int, ...]:
        return tuple(
            size
            if size >= 0
            else (first if axis == 0 or one.symbols[axis] in leading else other)[role]
            for axis, size in enumerate(one.sizes)
        )

    return ShapeProfile(
        {
            one.name: (sizes(one, 0), sizes(one, 1), sizes(one, 2))
            for one in inputs
            if one.needs_shapes
        }
    )
