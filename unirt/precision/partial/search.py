"""The smallest set of nodes to leave in float32 so that a quantized network stays in its budget."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

from unirt.accuracy import json_number
from unirt.errors import DataError, ModelError, OptionError
from unirt.model import Model, ModelSource
from unirt.precision.calibration.calibrate import CalibrationData
from unirt.precision.calibration.moments import SecondMoments
from unirt.precision.calibration.ranges import Calibration
from unirt.precision.partial.measure import Sensitivity, Workbench
from unirt.precision.partial.trial import Measured, Progress
from unirt.precision.quantization.litert import QuantizedTFLite, TFLitePrecision
from unirt.precision.quantization.quantize import Precision, Quantized
from unirt.precision.quantization.recipes import TENSORRT, Recipe

_RANKING_SHARE: Final = 0.7
"""Of the time that a search takes, as it is told to the caller's progress function."""
_EXACT: Final = 1e-9  # what rounding of a share or a ratio may add to it


@dataclass(frozen=True)
class Budget:
    """What quantization may cost; None sets no limit.

    `max_drop` is the share of all samples, 0 to 1, by which task accuracy may fall below the
    float32 network's: 0.005 allows 95.5 % for 96 %. `max_error` limits `Measured.error`, relative,
    and `min_snr` is the least `Measured.snr_db`, in dB.
    """

    max_drop: float | None = None
    max_error: float | None = None
    min_snr: float | None = None

    def __post_init__(self) -> None:
        """Raises OptionError where nothing is limited, or a limit is none."""
        checks = (
            ("max_drop", self.max_drop, 0.0, 1.0, "a share of all samples, from 0 to 1"),
            ("max_error", self.max_error, 0.0, math.inf, "a relative error, from 0"),
            ("min_snr", self.min_snr, -math.inf, math.inf, "a ratio in dB"),
        )
        for name, value, low, high, told in checks:
            if value is None:
                continue
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not low <= value <= high:
                raise OptionError(
                    f"{name}={value!r} is no budget.",
                    f"It is {told}.",
                    "Give such a number, or leave it out.",
                    option=name,
                )
        if self.max_drop is None and self.max_error is None and self.min_snr is None:
            raise OptionError(
                "There is no budget to search for.",
                "None of max_drop, max_error and min_snr is given.",
                "Give one of them, or quantize without a search.",
            )

    def excess(self, measured: Measured, accuracy: float | None) -> tuple[float, ...]:
        """By how much each limit is broken, 0 where it is met: infinite for NaN and infinities."""
        excess = []
        if self.max_drop is not None:
            drop = (accuracy or 0.0) - (measured.accuracy or 0.0) - self.max_drop
            # What answers NaN or infinities is broken, however many labels it gets right.
            excess.append(math.inf if math.isinf(measured.error) else drop)
        if self.max_error is not None:
            excess.append(measured.error - self.max_error)
        if self.min_snr is not None:
            excess.append(self.min_snr - measured.snr_db)
        return tuple(0.0 if one <= _EXACT else one for one in excess)

    def __str__(self) -> str:
        told = []
        if self.max_drop is not None:
            told.append(f"accuracy falls by at most {100 * self.max_drop:.3g} points")
        if self.max_error is not None:
            told.append(f"error at most {self.max_error:g}")
        if self.min_snr is not None:
            told.append(f"at least {self.min_snr:g} dB")
        return ", ".join(told)


@dataclass(frozen=True)
class Step:
    """One graph that the search measured: the nodes it left in float32, and whether that met."""

    kept: tuple[str, ...]
    measured: Measured
    met: bool


@dataclass(frozen=True)
class Search:
    """A quantized network within a budget, and how it was found.

    `kept` are the nodes left in float32 for the budget, in the order of the graph; `measured` is
    how far `quantized` is from the float32 network. Where no graph met the budget, `met` is False
    and these are the one that came nearest. `table` has each node's sensitivity, `history` every
    graph that was measured after that, in order; the first is the one with all nodes quantized.
    """

    quantized: Quantized | QuantizedTFLite
    kept: tuple[str, ...]
    measured: Measured
    met: bool
    budget: Budget
    table: Sensitivity
    history: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "met": self.met,
            "budget": {
                "max_drop": json_number(self.budget.max_drop),
                "max_error": json_number(self.budget.max_error),
                "min_snr": json_number(self.budget.min_snr),
            },
            "kept": list(self.kept),
            "measured": self.measured.to_dict(),
            "sensitivity": self.table.to_dict(),
            "history": [
                {"kept": list(step.kept), "met": step.met, "measured": step.measured.to_dict()}
                for step in self.history
            ],
        }


def search(
    model: Model | ModelSource,
    calibration: Calibration | None,
    data: CalibrationData,
    *,
    max_drop: float | None = None,
    max_error: float | None = None,
    min_snr: float | None = None,
    precision: Precision | TFLitePrecision = "int8",
    recipe: str | Recipe = TENSORRT,
    keep: Collection[str] = (),
    block: int | None = None,
    moments: SecondMoments | None = None,
    engine: str | None = None,
    options: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Search:
    """The network quantized but for the fewest nodes that this finds, within a budget.

    The budget is one or several of `max_drop`, the share of all samples by which task accuracy may
    fall, for which `data` needs labels; `max_error`, relative; and `min_snr` in dB. All other
    arguments, and what is raised, are those of `sensitivity`: the budget is met on a named `engine`
    as it runs for everybody, and without one by what the graph says, which an engine may miss.

    Nodes are ranked by `sensitivity` and left in float32 from the top until the budget is met, as
    Wu et al. do ("Integer Quantization for Deep Learning Inference", 2020, section 5), here in
    steps that double, then halve. Since errors do not add up, every decision rests on measuring the
    graph itself. Then each of the nodes, the least sensitive first, is given back where the budget
    allows (one pass of the minimization in Zeller and Hildebrandt, "Simplifying and Isolating
    Failure-Inducing Input", 2002). A smaller set of other nodes may exist. Costs a measurement for
    each node, some for the steps, and one for each node that is tried to be given back.

    Raises OptionError without any budget or for one that cannot be, DataError for `max_drop` on
    data without labels.
    """
    budget = Budget(max_drop, max_error, min_snr)
    with Workbench(
        model, calibration, data, precision, recipe, keep, block, moments, engine, options
    ) as bench:
        return _Searcher(bench, budget, progress).run()


class _Searcher:
    def __init__(self, bench: Workbench, budget: Budget, progress: Progress | None) -> None:
        self._bench, self._budget, self._progress = bench, budget, progress
        self._order = {name: at for at, name in enumerate(bench.whole.nodes)}
        self._steps: dict[frozenset[str], Step] = {}
        self._excess: dict[frozenset[str], tuple[float, ...]] = {}
        self._alone: dict[frozenset[str], Measured] = {}

    def run(self) -> Search:
        bench = self._bench
        if self._budget.max_drop is not None and not bench.trial.has_labels:
            raise DataError(
                f"The accuracy of {bench.source.name} cannot be told on this data.",
                "max_drop is about task accuracy, and the data has no labels.",
                "Store class numbers as 'labels' beside the inputs, or use max_error or min_snr.",
            )
        tell = self._progress
        table = bench.sensitivity(
            None, {}, False, tell and (lambda what, share: tell(what, share * _RANKING_SHARE))
        )
        self._record(frozenset(), table.whole)
        for name, measured in table.alone.items():
            # Keeping all others makes the same graph.
            self._alone[frozenset(table.nodes) - {name}] = measured
        kept = self._fewest(table.ranking)
        for name in reversed(table.ranking):
            if name in kept and self._met(kept - {name}):
                kept = kept - {name}
        if kept not in self._steps:  # all of it stays: then the nearest that is quantized
            kept = min(self._excess, key=lambda key: (self._excess[key], len(key)))
        step = self._steps[kept]
        return Search(
            bench.keeping(step.kept),
            step.kept,
            step.measured,
            step.met,
            self._budget,
            table,
            tuple(self._steps.values()),
        )

    def _fewest(self, ranking: tuple[str, ...]) -> frozenset[str]:
        """The shortest start of the ranking that meets the budget in float32, as far as longer
        ones meet it too; all of it at most.
        """
        if self._met(frozenset()):
            return frozenset()
        low, high = 0, 1
        while high < len(ranking) and not self._met(frozenset(ranking[:high])):
            low, high = high, min(2 * high, len(ranking))
        while high - low > 1:
            middle = (low + high) // 2
            if self._met(frozenset(ranking[:middle])):
                high = middle
            else:
                low = middle
        return frozenset(ranking[:high])

    def _met(self, kept: frozenset[str]) -> bool:
        """Whether the graph that keeps these meets the budget; one that keeps all does."""
        if kept in self._steps:
            return self._steps[kept].met
        if kept in self._alone:
            self._record(kept, self._alone[kept])
            return self._steps[kept].met
        try:
            made = self._bench.keeping(kept)
        except ModelError as error:
            if "kept" not in error.facts:
                raise
            return True  # nothing is left to quantize: that is the float32 network
        if self._progress is not None:
            share = len(self._steps) / (8 + 2 * len(self._order))
            done = min(0.99, _RANKING_SHARE + (1 - _RANKING_SHARE) * share)
            self._progress(f"measuring all but {len(kept)}", done)
        self._record(kept, self._bench.trial.measure(made.model))
        return self._steps[kept].met

    def _record(self, kept: frozenset[str], measured: Measured) -> None:
        excess = self._budget.excess(measured, self._bench.trial.accuracy)
        names = tuple(sorted(kept, key=self._order.__getitem__))
        self._excess[kept] = excess
        self._steps[kept] = Step(names, measured, not any(excess))
