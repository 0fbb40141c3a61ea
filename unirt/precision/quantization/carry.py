"""The ranges of an ONNX graph, carried over to the .tflite that was converted from it.

Converters rename, fuse and transpose; names prove nothing. What both files compute does: a tensor
that is in both holds the same values, in whatever order and with or without zeros around them. So
both are run on the same random inputs, and tensors are told apart by sums of their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, Final

import numpy as np

from unirt.data import Feed, random_inputs
from unirt.model import Model
from unirt.precision.calibration.calibrate import MEMORY
from unirt.precision.calibration.ranges import Calibration, Range
from unirt.precision.calibration.watch import Watcher
from unirt.precision.tflite import TFLiteWatcher
from unirt.types import TensorSpec

SCALES: Final = (1.0, 3.0, 10.0)
"""Of the random inputs, one run for each: what cuts values off does so in one of them."""

CLOSE: Final = 1e-4
"""Engines differ by about 1e-6, tensors by 1e-2 and more."""


def carry_over(calibration: Calibration, model: Model) -> Calibration:
    """A calibration of the model's ONNX file, with the names of its .tflite.

    A tensor that several ONNX tensors equal gets what holds all their ranges; one that equals none
    gets no range. Raises what running the two raises: UnirtError.
    """
    specs = [_closed(spec, model) for spec in model.inputs]
    feeds = [_scaled(random_inputs(specs, seed=n), one) for n, one in enumerate(SCALES)]
    with closing(Watcher(model, None, None, MEMORY)) as watcher:
        known = _marks(watcher, feeds)
    known = {name: mark for name, mark in known.items() if name in calibration.ranges}
    with closing(TFLiteWatcher(model, None, None, MEMORY)) as watcher:
        wanted = _marks(watcher, feeds)
        digest, names = watcher.hash, watcher.tensors
    ranges = {}
    for name, mark in wanted.items():
        equal = [calibration.ranges[one] for one, other in known.items() if _equal(mark, other)]
        if equal:
            ranges[name] = Range(min(one.low for one in equal), max(one.high for one in equal))
    told = (
        f"{len(ranges)} of {len(wanted)} tensors of the .tflite have the ranges of ONNX tensors "
        "that hold the same values on random inputs."
    )
    notes = (*calibration.notes, told)
    return replace(calibration, ranges=ranges, model=digest, tensors=names, notes=notes)


def _closed(spec: TensorSpec, model: Model) -> TensorSpec:
    """An input with the sizes that any of the files declares: converters fix what was open."""
    shapes = []
    for file in model.formats.values():
        theirs = model.input_names(file)[spec.name]
        shapes += [one.shape for one in file.inputs if one.name == theirs and one.shape is not None]
    sizes = zip(*shapes, strict=True)
    shape = [next((size for size in one if isinstance(size, int)), one[0]) for one in sizes]
    return replace(spec, shape=tuple(shape)) if shapes else spec


def _scaled(feed: Feed, scale: float) -> Feed:
    return {
        name: (value * scale).astype(value.dtype) if value.dtype.kind == "f" else value
        for name, value in feed.items()
    }


def _marks(watcher: Watcher | TFLiteWatcher, feeds: Iterable[Feed]) -> Mapping[str, Any]:
    """For each tensor and run: both ends, the sum, that of magnitudes, and the root of squares."""
    found: dict[str, list[list[float]]] = {}
    for feed in feeds:
        for name, values in watcher.show(feed):
            exact = np.asarray(values, np.float64)
            size = np.abs(exact)
            ends = exact.min(initial=0), exact.max(initial=0)
            with np.errstate(invalid="ignore", over="ignore"):
                norm = np.sqrt(np.square(exact).sum())
                found.setdefault(name, []).append([*ends, exact.sum(), size.sum(), norm])
    return {name: np.array(rows) for name, rows in found.items()}


def _equal(one: Any, other: Any) -> bool:
    """Whether all sums agree. Nothing equals what is 0 or not finite: that tells nothing."""
    low, high, _, total, norm = one.T
    largest = np.maximum(-low, high)
    scale = np.stack([largest, largest, total, total, norm], axis=1)
    if not (np.isfinite(one).all() and np.isfinite(other).all() and largest.all()):
        return False
    return bool((np.abs(one - other) <= CLOSE * scale).all())
