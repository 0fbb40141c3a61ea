"""A histogram that grows while values stream through it, and the ranges that are found from it."""

from __future__ import annotations

import math
import numbers
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from unirt.errors import OptionError
from unirt.precision.calibration.ranges import Range

Method: TypeAlias = Literal["max", "entropy", "mse", "percentile"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)
BINS: Final = 2048
PERCENTILE: Final = 99.99

LEVELS: Final = 128
"""Of each sign in int8: what entropy merges bins into, and one more than mse's largest level."""

_FINER: Final = 8  # bins kept for each one asked for: what remains after growing is still enough
_CHUNK: Final = 1 << 16  # values counted at a time, so that what is computed of them fits a cache
_SMALLEST: Final = -127  # exponent of float32, zero's
_LEAST: Final = -100  # exponent; below it a scale for the bins would overflow float32
_FAR: Final = 4096  # values that bins need not reach to
_SPARE: Final = 4  # octaves by which bins reach further than they need, so that few values are far
_SMOOTHING: Final = 1e-4  # what empty bins get
_CANDIDATES: Final = 256  # judged at a time
_ORDERS: Final = 10

_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
_Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_Values: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


class Histogram:
    """Counts of float32 values in equal bins, symmetric about zero.

    Bin widths are powers of two, so that growing merges whole pairs of bins: the counts do not
    depend on the order of the values, nor on how they were split into arrays. `low` and `high` are
    the exact extremes, `zeros` counts exact zeros. Takes 64 bytes for each of `bins`, however many
    values; eight times as many are kept, and less than half of them can be beyond the extremes.

    Up to 4096 outliers are kept as they are, in 16 kB more, where bins that reach to them would be
    too wide for all others: percentiles are as exact beside a few as without.
    """

    def __init__(self, bins: int = BINS) -> None:
        """`bins`, a power of two from 256 to 65536, is what entropy sees between +-extreme."""
        if type(bins) is not int or bins & (bins - 1) or not 256 <= bins <= 65536:
            raise OptionError(
                f"A histogram cannot have {bins!r} bins.",
                "Bins are merged in pairs as the values grow, and entropy needs twice 128 of them.",
                "Give a power of two from 256 to 65536, usually 2048.",
                bins=bins,
            )
        self.bins = bins
        self.low, self.high = math.inf, -math.inf
        self.values = self.zeros = 0
        self._half = bins * _FINER // 2
        self._exponent = _LEAST
        self._counts: _Counts = np.zeros(2 * self._half, np.int64)
        self._far: _Values = np.zeros(0, np.float32)  # beyond +-2**exponent

    def add(self, values: np.ndarray[Any, Any]) -> bool:
        """Counts float32 values of any shape. False, with nothing counted, if one is not finite."""
        flat = values.ravel(order="K")
        if flat.size == 0:
            return True
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.values += flat.size
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            self.zeros += int(np.count_nonzero(chunk == 0))  # several times as fast as of floats
            limit = 2.0**self._exponent
            if max(-low, high) >= limit:
                chunk = self._near(chunk, np.flatnonzero((chunk >= limit) | (chunk < -limit)))
            self._counts += self._counted(chunk, self._exponent)
        return True

    def _near(self, values: _Values, far: _Counts) -> _Values:
        """The same without the values at the places `far`, which are kept as they are: zeros stand
        there, whose count is taken off beforehand.
        """
        if not far.size:
            return values
        self._far = np.concatenate([self._far, values[far]])
        if self._exponent > _LEAST or self._far.size > _FAR:
            self._grow()
        self._counts[self._half] -= far.size
        near = values.copy()
        near[far] = 0
        return near

    def _grow(self) -> None:
        """Makes the bins reach as far as they should, a matter of all values and not of their
        order: to the extremes, but no further than 16 times what all but _FAR values keep to.
        """
        exponent = min(self._reach, self._usual() + _SPARE)
        if exponent > self._exponent:
            inside = _exponents(self._far) <= exponent
            counts = merged(self._counts, exponent - self._exponent)
            self._counts = counts + self._counted(self._far[inside], exponent)
            self._far, self._exponent = self._far[~inside], exponent

    def _usual(self) -> int:
        """The exponent that all but _FAR values keep to."""
        if self._far.size > _FAR:
            beyond = np.cumsum(np.bincount(_exponents(self._far) - _SMALLEST)[::-1])
            return _SMALLEST + beyond.size - 1 - int(np.argmax(beyond > _FAR))
        steps, counted = 0, int(self._counts.sum())
        while steps < _SPARE:
            half = self._half >> steps + 1
            near = self._counts[self._half - half : self._half + half]
            if self._far.size + counted - int(near.sum()) > _FAR:
                break
            steps += 1
        return self._exponent - steps

    def _counted(self, values: _Values, exponent: int) -> _Counts:
        """Counts of values between +-2**exponent, in as many bins as are kept."""
        scale = np.float32(self._half * 2.0**-exponent)  # a power of two, so it is exact
        scaled = values * scale
        index = np.floor(scaled, out=scaled).astype(np.int64)
        index += self._half
        return np.bincount(index, minlength=2 * self._half)

    @property
    def size(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    @property
    def width(self) -> float:
        """Of the bins that reach to the extremes: at most size / (2 * bins)."""
        return math.ldexp(1.0, self._reach) / self._half

    @property
    def _reach(self) -> int:
        """The exponent with which all values lie in bins."""
        return max(math.frexp(self.size)[1], _LEAST)

    def _all(self) -> _Counts:
        """Counts of all values, in bins of `width`."""
        counts = merged(self._counts, self._reach - self._exponent)
        return counts + self._counted(self._far, self._reach)

    def coarse(self) -> tuple[_Counts, _Floats]:
        """Counts in `bins` equal bins between +-`size`, and their edges.

        Kept bins that an edge cuts are divided in proportion.
        """
        edges = np.linspace(-self.size, self.size, self.bins + 1)
        below = np.concatenate([[0], np.cumsum(self._all())])
        cut = np.interp(edges / self.width + self._half, np.arange(below.size), below)
        cut[0], cut[-1] = 0, self.values
        return np.diff(np.rint(cut).astype(np.int64)), edges

    def range_by(self, method: Method, percentile: float = PERCENTILE) -> Range:
        """What to represent of these values: `low` to `high` by that method, within the extremes.

        There must be values. Raises OptionError for another method or percentile.
        """
        check_method(method, percentile)
        if method == "max" or self.low == self.high:
            return Range(self.low, self.high)
        if method == "percentile":
            low, high = self._percentile(percentile)
        else:
            threshold = self._entropy() if method == "entropy" else self._mse()
            low, high = -threshold, threshold
        return Range(max(low, self.low), min(high, self.high))

    def _percentile(self, percentile: float) -> tuple[float, float]:
        """Half of what is beyond is cut on each side; linear within a bin."""
        self._grow()
        outside = (100 - percentile) / 200
        if outside == 0:
            return self.low, self.high
        return self._quantile(outside), self._quantile(1 - outside)

    def _quantile(self, share: float) -> float:
        far = np.sort(self._far)
        negative = int(np.searchsorted(far, 0))
        below = negative + np.cumsum(self._counts)
        wanted = share * self.values
        if not negative < wanted <= below[-1]:
            before = 0 if wanted <= negative else int(self._counts.sum())
            return float(far[max(math.ceil(wanted) - before, 1) - 1])
        index = int(np.searchsorted(below, wanted))
        before = int(below[index - 1]) if index else negative
        inside, zeros = int(self._counts[index]), self.zeros if index == self._half else 0
        if wanted <= before + zeros:
            return 0.0  # exact zeros are the first of their bin
        bins = index - self._half + (wanted - before - zeros) / (inside - zeros)
        return bins * math.ldexp(1.0, self._exponent) / self._half

    def _entropy(self) -> float:
        counts, edges = self.coarse()
        middle = self.bins // 2
        return float(edges[min(middle + entropy_half(counts) + 1, self.bins)])

    def _mse(self) -> float:
        """The threshold whose symmetric int8 (-127 to 127, rounded to nearest) errs least.

        As in NVIDIA's calibrators for fake quantization every threshold of a grid is tried, here
        320 in geometric steps down to 1/256 of the extreme and 65 between the best one's
        neighbours. The error is an integral over the histogram: values are spread evenly in a bin,
        exact zeros apart.
        """
        integrals = _Integrals(self._all(), self.zeros, self.width)
        grid = np.geomspace(self.size / 256, self.size, 320)
        best = int(np.argmin(integrals.errors(grid)))
        around = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)], 65)
        return float(around[np.argmin(integrals.errors(around))])


def merged(counts: _Counts, steps: int) -> _Counts:
    """The same counts in bins twice as wide, so many times; there are as many bins, as before."""
    if not steps:
        return counts
    sums = counts.reshape(-1, min(2**steps, counts.size // 2)).sum(axis=1)
    made = np.zeros_like(counts)
    start = (counts.size - sums.size) // 2
    made[start : start + sums.size] = sums
    return made


def _exponents(values: _Values) -> np.ndarray[Any, np.dtype[np.int32]]:
    """With which values lie in bins from -2**exponent up to, and without, 2**exponent."""
    bits = values.view(np.int32)  # several times as fast as np.frexp
    magnitude = (bits & 0x7FFFFFFF) - (bits < 0)
    return np.asarray((magnitude >> 23) - 126)


def check_method(method: str, percentile: float) -> None:
    """Raises OptionError."""
    if not isinstance(method, str) or method not in METHODS:
        raise OptionError(
            f"There is no calibration method {method!r}.",
            f"Ranges are found by one of {', '.join(METHODS)}.",
            "Choose one of them.",
            method=method,
        )
    number = isinstance(percentile, numbers.Real) and not isinstance(percentile, bool)
    if not (number and 50 < percentile <= 100):
        raise OptionError(
            f"{percentile!r} is no percentile to keep.",
            "It is the percentage of values within the range, more than half of them.",
            f"Give for example {PERCENTILE}.",
            percentile=percentile,
        )


class _Integrals:
    """Sums of x**0, x**1 and x**2 over all values below a bound, as functions of that bound."""

    def __init__(self, counts: _Counts, zeros: int, width: float) -> None:
        self._half, self._width = counts.size // 2, width
        density = counts.astype(np.float64)
        density[self._half] -= zeros  # they are exact under every threshold
        left = np.arange(-self._half, self._half, dtype=np.float64)  # in units of the width
        parts = (density, density * (left + 0.5), density * (left * left + left + 1 / 3))
        self._below = [np.concatenate([[0.0], np.cumsum(part)]) for part in parts]
        self._density = np.concatenate([density, [0.0]])

    def errors(self, thresholds: _Floats) -> _Floats:
        """The sum of squared errors, in units of width squared, for each threshold."""
        step = (thresholds / self._width / (LEVELS - 1))[:, None]
        levels = np.arange(-LEVELS + 1, LEVELS)
        inner = np.clip((levels[1:] - 0.5) * step, -self._half, self._half)
        outer = np.full((thresholds.size, 1), float(self._half))
        bounds = np.concatenate([-outer, inner, outer], axis=1)
        index = np.floor(bounds).astype(np.int64) + self._half
        left, density = np.floor(bounds), self._density[index]
        powers = (bounds - left, (bounds**2 - left**2) / 2, (bounds**3 - left**3) / 3)
        n, sum_x, sum_xx = (
            np.diff(below[index] + density * power, axis=1)
            for below, power in zip(self._below, powers, strict=True)
        )
        level = levels * step
        total: _Floats = (sum_xx - 2 * level * sum_x + level * level * n).sum(axis=1)
        return total


def entropy_half(counts: _Counts, levels: int = LEVELS) -> int:
    """How many bins on each side of the middle one to keep: least information is lost by it.

    The search of TensorRT's calibrator (Migacz, "8-bit inference with TensorRT", GTC 2017) in its
    signed form, with MXNet's smoothing of empty bins, to the details of ONNX Runtime's
    HistogramCollector. For each number of bins, P is their counts, with what lies beyond added to
    the outermost ones. Q has `levels` groups of bins, each group's counts without what lies beyond
    spread evenly over it, rounded down; bins left over at the end are empty in Q. The smallest
    Kullback-Leibler divergence KL(P || Q) wins, the first of equals.

    What differs is only how it is computed, from cumulative counts: the sum of (n - e) log(n - e)
    over the bins, from which smoothing takes e, is a series in e, exact to 1e-10 up to e = 0.1.
    """
    middle = counts.size // 2
    halves = np.arange(levels // 2, middle + 1)
    divergences = Divergences(counts)
    found = np.concatenate(
        [
            divergences.of(halves[start : start + _CANDIDATES], levels)
            for start in range(0, halves.size, _CANDIDATES)
        ]
    )
    best = int(np.argmin(found))
    return int(halves[best]) if np.isfinite(found[best]) else middle


class Divergences:
    """What `entropy_half` minimizes, from cumulative sums over the bins of a histogram."""

    def __init__(self, counts: _Counts) -> None:
        self._counts = counts
        self._total = int(counts.sum())
        self._below = np.concatenate([[0], np.cumsum(counts)])
        self._filled = np.concatenate([[0], np.cumsum(counts > 0)])
        filled = counts > 0
        n = np.where(filled, counts, 1).astype(np.float64)
        terms = [n * np.log(n), (np.log(n) + 1) * filled]
        terms += [filled / (order * (order - 1) * n ** (order - 1)) for order in range(2, _ORDERS)]
        self._series = [np.concatenate([[0.0], np.cumsum(term)]) for term in terms]

    def of(self, halves: _Counts, levels: int = LEVELS) -> _Floats:
        """KL(P || Q) of each candidate; infinite where smoothing would take more than there is."""
        counts, below, filled, total = self._counts, self._below, self._filled, self._total
        start = counts.size // 2 - halves
        end = np.minimum(counts.size // 2 + halves + 1, counts.size)
        size = end - start
        first, last = counts[start] + below[start], counts[end - 1] + total - below[end]

        # Groups of bins: their values, without and with outliers, and how many of P are filled.
        merged = size // levels
        border = start[:, None] + np.arange(levels + 1) * merged[:, None]
        inside = np.diff(below[border], axis=1)
        nonzero = np.diff(filled[border], axis=1)
        values = inside.copy()
        values[:, -1] += below[end] - below[border[:, -1]]
        new_first = ((counts[start] == 0) & (first > 0)).astype(np.int64)
        new_last = ((counts[end - 1] == 0) & (last > 0)).astype(np.int64)
        whole = border[:, -1] == end  # no bins left over: the last one belongs to the last group
        nonzero[:, 0] += new_first
        nonzero[:, -1] += new_last * whole
        inside[:, 0] += below[start]
        inside[:, -1] += (total - below[end]) * whole
        filled_p = filled[end] - filled[start] + new_first + new_last

        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.where(nonzero > 0, values // np.maximum(nonzero, 1), 0)
            filled_q = (spread > 0).sum(axis=1) * merged
            taken_p = _SMOOTHING * (size - filled_p) / filled_p
            taken_q = _SMOOTHING * (size - filled_q) / filled_q
            possible = (taken_p < 1) & (taken_q < 1)
            taken_p, taken_q = np.where(possible, taken_p, 0), np.where(possible, taken_q, 0)
            empty = math.log(_SMOOTHING)

            # The sum of P log P: what lies inside, the two outermost bins, the empty ones.
            signs = (1, -1, *(1,) * (_ORDERS - 2))
            p_log_p = (size - filled_p) * _SMOOTHING * empty
            for order, (sign, sums) in enumerate(zip(signs, self._series, strict=True)):
                p_log_p += sign * taken_p**order * (sums[end - 1] - sums[start + 1])
            for outermost in (first, last):
                smooth = np.where(outermost > 0, outermost - taken_p, 1.0)
                p_log_p += smooth * np.log(smooth)

            # The sum of P log Q: over groups, and over what is left at the end.
            smooth = inside - taken_p[:, None] * nonzero
            smooth += _SMOOTHING * (merged[:, None] - nonzero)
            log_q = np.where(spread > 0, np.log(spread - taken_q[:, None]), empty)
            p_log_q = (smooth * log_q).sum(axis=1) + (total - smooth.sum(axis=1)) * empty

            total_q = spread.sum(axis=1) * merged
            found = (p_log_p - p_log_q) / total + np.log(total_q / total)
        return np.where(possible & np.isfinite(found), found, np.inf)
