"""What is decided about a node, and the operators that need a word of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

# The attribute that says of which type the first output is, where inputs do not.
OUTPUT_TYPE: Final[Mapping[str, str]] = {
    "Cast": "to",
    "ConstantOfShape": "value",
    "Bernoulli": "dtype",
    "EyeLike": "dtype",
    "RandomNormal": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniform": "dtype",
    "RandomUniformLike": "dtype",
    "BlackmanWindow": "output_datatype",
    "HammingWindow": "output_datatype",
    "HannWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
}
MOVING: Final = frozenset(
    {
        *("DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape"),
        *("Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""They compute nothing: values come out as they went in."""


@dataclass
class Verdict:
    """The positions of a node's inputs and outputs that become narrow, or why none does."""

    inputs: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)
    reason: str = ""

    def stay(self, reason: str) -> None:
        self.inputs, self.outputs, self.reason = set(), set(), reason
