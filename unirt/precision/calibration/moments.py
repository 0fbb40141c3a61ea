"""What the inputs of each product have in common over data: their second moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unirt.model import Model, ModelSource
from unirt.precision.calibration.calibrate import MEMORY, CalibrationData, Run, read_calls
from unirt.precision.calibration.watch import Watched, Watcher, onnx_file
from unirt.precision.prepare import Graph, channel_axis, fold, groups
from unirt.precision.source import drop_weight_inputs, read_graph

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

_MOST: Final = 2048  # that are summed up: what is beyond takes long, and errs little in each
_ROWS: Final = 8192  # of one product, over all data
_CALL_ROWS: Final = 1024  # and in one call


@dataclass(frozen=True)
class Reading:
    """How a product reads a tensor: what it sums up lies in windows, or along the last axis."""

    tensor: str
    groups: int = 1
    window: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    def rows(self, values: Array, most: int, random: np.random.Generator) -> Array:
        """Some of what is summed up, float32 [rows, groups, values], in a kernel's order: the
        channels of one place of the window after those of another.
        """
        if not self.window:
            rows = values.reshape(-1, 1, values.shape[-1])
            return rows[_some(len(rows), most, random)]
        axes = len(self.window)
        sides = list(zip(self.pads[:axes], self.pads[axes:], strict=True))
        spans = [(k - 1) * d + 1 for k, d in zip(self.window, self.dilations, strict=True)]
        padded = np.pad(values, [(0, 0), (0, 0), *sides])
        view: Any = np.lib.stride_tricks.sliding_window_view(
            padded, spans, tuple(range(2, 2 + axes))
        )
        steps = [slice(None, None, step) for step in (*self.strides, *self.dilations)]
        view = view[(slice(None), slice(None), *steps)]
        batch, channels, *places = view.shape[: 2 + axes]
        chosen = _some(batch * int(np.prod(places)), most, random)
        where = np.unravel_index(chosen, (batch, *places))
        found = view[(where[0], slice(None), *where[1:])]  # [rows, channels, *window]
        found = found.reshape(len(found), self.groups, channels // self.groups, -1)
        return np.asarray(found.transpose(0, 1, 3, 2).reshape(len(found), self.groups, -1))


def _some(count: int, most: int, random: np.random.Generator) -> Array:
    if count <= most:
        return np.arange(count)
    return random.choice(count, most, replace=False, shuffle=False)


@dataclass(frozen=True)
class Moments:
    """Means of the products of each two inputs, [groups, values, values], and of each input."""

    squares: Array
    means: Array
    rows: int

    def damped(self, share: float) -> Array | None:
        """The means of products, of which few rows tell less than they seem to: what each two
        have in common beyond their means shrinks to 0 the more values there are for a row. None
        where all inputs are 0.
        """
        values = self.squares.shape[1]
        at = np.arange(values)
        common = self.means[:, :, None] * self.means[:, None, :]
        kept = self.rows / (self.rows + values)
        found = common + kept * (self.squares - common)
        found[:, at, at] = self.squares[:, at, at]
        size = found[:, at, at].mean(axis=1)
        if not (np.isfinite(size).all() and (size > 0).any()):
            return None
        # A group that never gets anything may round as it likes.
        found[:, at, at] += share * np.where(size > 0, size, size.max())[:, None]
        return np.asarray(found)


@dataclass(frozen=True)
class SecondMoments:
    """What the inputs of a network's products have in common: `quantize` rounds weights by it.

    `readings` has them by how a product reads a tensor, `model` is the content hash of the ONNX
    file, `samples` counts those of an array, or calls. Holds the square of the number of inputs
    that a product sums up, for each that has at most 2,048. `rounded` are weights that were rounded
    so before. Not to be used by several threads at once.
    """

    readings: Mapping[Reading, Moments]
    model: str
    samples: int
    rounded: dict[tuple[Any, ...], Array | None] = field(
        default_factory=dict, repr=False, compare=False
    )

    def of(self, node: onnx.NodeProto, shape: Sequence[int]) -> Moments | None:
        """Those of a product with a weight of this shape, if they are known."""
        reading = reading_of(node, shape)
        return None if reading is None else self.readings.get(reading)


def reading_of(node: onnx.NodeProto, shape: Sequence[int]) -> Reading | None:
    """How a product reads its first input; None where that is not looked at."""
    from onnx import helper

    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv":
        window = tuple(shape[2:])
        axes, parts = len(window), groups(node)
        if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return None
        if shape[1] * int(np.prod(window)) > _MOST or shape[0] % parts:
            return None
        return Reading(
            node.input[0],
            parts,
            window,
            tuple(given.get("strides", (1,) * axes)),
            tuple(given.get("pads", (0,) * 2 * axes)),
            tuple(given.get("dilations", (1,) * axes)),
        )
    if node.op_type not in ("Gemm", "MatMul") or len(shape) != 2 or given.get("transA"):
        return None
    return Reading(node.input[0]) if shape[1 - channel_axis(node, shape)] <= _MOST else None


def second_moments(
    model: Model | ModelSource,
    data: CalibrationData,
    *,
    memory: int = MEMORY,
    engine: str | None = None,
) -> SecondMoments:
    """Means of the products of each two values that a network's products sum up, on `data`.

    For `quantize`, `search` and `sensitivity`, which round weights by them where they are given:
    errors of weights whose inputs go together can cancel out. Up to 8,192 rows of each product
    count, at most 1,024 of a call. Takes memory as `SecondMoments` says, whatever the data.

    The arguments and the errors are those of `observe`.
    """
    source = Model.open(model)
    file = onnx_file(source)
    proto = read_graph(file, "calibrated")
    watched = Watched.of(proto, source.name, None)
    known = {*watched.inputs, *watched.inner}
    wanted: dict[str, dict[Reading, _Sums]] = {}
    drop_weight_inputs(proto, always=True)
    graph = Graph(proto)
    fold(graph)
    for node in graph.nodes:
        weight = graph.array(node.input[1]) if len(node.input) > 1 else None
        if weight is None or node.domain or weight.dtype != np.float32 or weight.ndim < 2:
            continue
        reading = reading_of(node, weight.shape)
        if reading is not None and reading.tensor in known:
            wanted.setdefault(reading.tensor, {})[reading] = _Sums()
    if not wanted:
        return SecondMoments(MappingProxyType({}), file.hash, 0)
    with closing(Watcher(source, tuple(wanted), engine, memory)) as watcher:
        run = Run(source.name, watcher, read_calls(source.inputs, data))
        for name, values in run.values():
            if not np.isfinite(values).all():
                run.check(name, values)
            for reading, sums in wanted[name].items():
                sums.add(reading, values)
    readings = {
        reading: sums.moments()
        for found in wanted.values()
        for reading, sums in found.items()
        if sums.rows
    }
    return SecondMoments(MappingProxyType(readings), file.hash, run.samples)


class _Sums:
    def __init__(self) -> None:
        self.rows = 0
        self._squares: Array = np.zeros(())
        self._sum: Array = np.zeros(())
        self._random = np.random.default_rng(0)  # the same rows each time

    def add(self, reading: Reading, values: Array) -> None:
        most = min(_CALL_ROWS, _ROWS - self.rows)
        if not most or not values.size:
            return
        rows = reading.rows(values, most, self._random)
        parts = rows.transpose(1, 2, 0)
        self._squares = self._squares + (parts @ parts.transpose(0, 2, 1)).astype(np.float64)
        self._sum = self._sum + rows.sum(axis=0, dtype=np.float64)
        self.rows += len(rows)

    def moments(self) -> Moments:
        return Moments(self._squares / self.rows, self._sum / self.rows, self.rows)
