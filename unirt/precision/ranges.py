"""A calibration: the range of values that each tensor of a network takes on real inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Range:
    """What a quantized tensor must represent: `low` to `high`; what lies beyond is clipped."""

    low: float
    high: float

    @property
    def size(self) -> float:
        """The largest magnitude: what symmetric quantization scales by."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Calibration:
    """Portable between engines: the Q/DQ graph of each target is derived from it.

    `ranges` go by tensor name. `method` says how they were found, `samples` from how many calls,
    `model` is the content hash of the graph they belong to.
    """

    ranges: Mapping[str, Range]
    method: str
    samples: int
    model: str
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", MappingProxyType(dict(self.ranges)))
