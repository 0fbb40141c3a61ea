"""Weights as whole numbers: which of its neighbours each becomes, so that errors cancel out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from unirt.precision.calibration.moments import Moments
from unirt.precision.prepare import groups
from unirt.precision.quantization.placement import Weight

Array = np.ndarray[Any, Any]

_DAMPING: Final = 0.01  # of the mean square of an input, as GPTQ's authors have it
_CHANNELS: Final = 4096  # that are rounded at a time, so that memory is bounded
_COLUMNS: Final = 32  # that are rounded before what is right of them all hears of it


@dataclass(frozen=True)
class Order:
    """How kernels go through the weights of one output channel: from place to place of a window,
    and at each through the input channels; or down the rows of a matrix.

    On a CPU without VNNI each two of one place, counted from the first channel, are added in 16
    bits. ONNX Runtime counts on into the next place where channels are odd. What is depthwise is
    added in 32 bits. So found with onnxruntime 1.31.1 and openvino 2026.4.1, in windows of 1 to 3
    axes, with groups, strides and dilations; tests/test_rounding.py tries it again.
    """

    shape: tuple[int, ...]
    axis: int
    window: bool
    depthwise: bool

    def rows(self, array: Array) -> Array:
        """A weight as [output channels, what is summed up]."""
        first = np.moveaxis(array, self.axis, 0)
        if self.window:
            first = np.moveaxis(first, 1, -1)
        return first.reshape(len(first), -1)

    def array(self, rows: Array) -> Array:
        """`rows` undone."""
        shape = self._summed
        if self.window:
            shape = (*shape[1:], shape[0])
        first = rows.reshape(len(rows), *shape)
        if self.window:
            first = np.moveaxis(first, -1, 1)
        return np.moveaxis(first, 0, self.axis)

    @property
    def _summed(self) -> tuple[int, ...]:
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    @property
    def joined(self) -> Array:
        """Of each in a row, whether a kernel may add its product to that of the one before it."""
        shape = self._summed
        at = np.arange(math.prod(shape))
        if self.depthwise:
            return np.zeros(at.size, bool)
        channels = max(1, shape[0] if self.window else shape[-1])
        return np.asarray((at % 2 == 1) | (at % channels % 2 == 1))

    def largest_pair(self, array: Array) -> Array:
        """The largest magnitude, for each channel, of the sum of two weights that are added so."""
        rows = self.rows(array).astype(np.float64)
        sums = np.abs(rows[:, 1:] + rows[:, :-1])[:, self.joined[1:]]
        return np.asarray(sums.max(axis=1, initial=0.0))


def order_of(weight: Weight, array: Array) -> Order:
    node = weight.node
    window = node.op_type in ("Conv", "ConvTranspose")
    parts = groups(node) if node.op_type == "Conv" else 1
    depthwise = 1 < parts == array.shape[0] and array.shape[1] == 1
    return Order(array.shape, weight.axis, window, depthwise)


def balanced(values: Array, axis: int, limit: float) -> Array:
    """Whole numbers beside `values`, whose errors cancel out within each channel along `axis`.

    Behind a ReLU all inputs are positive, so that errors of one sign would add up to a shift of
    the whole channel. First within each kernel of a convolution, then within each channel, as many
    values as the sum of the errors says are rounded the other way: those nearest to the middle.
    Published as SQuant (Guo et al., 2022), which needs no data.
    """
    wanted = np.moveaxis(values, axis, 0)
    whole = np.rint(wanted)
    kernel = int(np.prod(wanted.shape[2:], dtype=np.int64))
    for width in (kernel, wanted[0].size):
        if width > 1:
            rows = wanted.reshape(-1, width)
            whole = _balanced(rows, whole.reshape(-1, width), limit).reshape(wanted.shape)
    return np.moveaxis(whole, 0, axis)


def _balanced(wanted: Array, whole: Array, limit: float) -> Array:
    """Moves as many numbers of each row by 1 as its errors add up to, each towards its own value
    and at most to the other side of it.
    """
    error = whole - wanted
    total = np.rint(error.sum(axis=1, keepdims=True))
    step = -np.sign(total)
    # Its new error; what would leave the range, is exact or was moved already stays as it is, so
    # that zeros of a sparse weight remain.
    cost = np.abs(error + step)
    cost[(np.abs(whole + step) > limit) | (cost >= 1)] = np.inf
    count = np.abs(total).astype(np.int64)
    most = min(int(count.max(initial=0)), cost.shape[1])
    moved = np.zeros(cost.shape, bool)
    if most:
        # The cheapest of each row in order; to sort whole rows would take several times as long.
        first = np.argpartition(cost, most - 1, axis=1)[:, :most]
        near = np.take_along_axis(cost, first, axis=1)
        order = np.argsort(near, axis=1, kind="stable")
        first, near = (np.take_along_axis(array, order, axis=1) for array in (first, near))
        chosen = (np.arange(most) < count) & np.isfinite(near)
        np.put_along_axis(moved, first, chosen, axis=1)
    return np.asarray(whole + step * moved)


def compensated(
    array: Array, steps: Array, order: Order, moments: Moments, limit: float, pair: int | None
) -> Array | None:
    """Whole numbers for a weight in `steps`, whose errors cancel out on data; None where the data
    says nothing.

    One input after another is rounded, and the weights of those that follow take over what is
    expected to be lost: GPTQ (Frantar et al. 2022), by the Cholesky factor of the inverse second
    moments of the inputs. Zeros stay, so that a sparse weight is one afterwards. No two that a
    kernel adds in 16 bits go beyond `pair` together.
    """
    factor = _factor(moments)
    if factor is None:
        return None
    weights, step = (
        rows.reshape(len(factor), -1, rows.shape[1])
        for rows in (order.rows(array), order.rows(steps))
    )
    whole = np.empty(weights.shape, np.float32)
    joined = order.joined if pair is not None else np.zeros(weights.shape[2], bool)
    for begin in range(0, weights.shape[1], _CHANNELS):  # each stands alone
        some = slice(begin, begin + _CHANNELS)
        whole[:, some] = _one_by_one(
            weights[:, some], step[:, some], factor, joined, limit, pair or math.inf
        )
    return order.array(whole.reshape(-1, whole.shape[2]))


def _one_by_one(
    weights: Array, step: Array, factor: Array, joined: Array, limit: float, pair: float
) -> Array:
    """Rounds [groups, output channels, what is summed up]. Works in columns: what is summed up
    comes before the channels, so that each step goes through memory in order.
    """
    weights, step = (
        np.ascontiguousarray(one.transpose(0, 2, 1), np.float64) for one in (weights, step)
    )
    parts, count, channels = weights.shape
    zeros = weights == 0
    whole = np.zeros_like(weights)
    for begin in range(0, count, _COLUMNS):
        end = min(begin + _COLUMNS, count)
        lost = np.empty((parts, end - begin, channels))
        for at in range(begin, end):
            low, high = np.asarray(-limit), np.asarray(limit)
            if joined[at]:
                low = np.maximum(low, -pair - whole[:, at - 1])
                high = np.minimum(high, pair - whole[:, at - 1])
            found = np.clip(np.rint(weights[:, at] / step[:, at]), low, high)
            whole[:, at] = np.where(zeros[:, at], 0.0, found)
            error = (weights[:, at] - whole[:, at] * step[:, at]) / factor[:, at, at, None]
            weights[:, at:end] -= factor[:, at, at:end, None] * error[:, None]
            lost[:, at - begin] = error
        weights[:, end:] -= factor[:, begin:end, end:].transpose(0, 2, 1) @ lost
    return whole.transpose(0, 2, 1)


def _factor(moments: Moments) -> Array | None:
    """Upper triangles U with U'U the inverse of the damped second moments."""
    squares = moments.damped(_DAMPING)
    if squares is None:
        return None
    try:
        return np.asarray(np.linalg.cholesky(np.linalg.inv(squares)).transpose(0, 2, 1))
    except np.linalg.LinAlgError:
        return None
