"""Each node's share of what quantization costs: measured one at a time, on the graph itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from unirt.errors import ModelError, OptionError
from unirt.model import Model, ModelSource
from unirt.precision.calibration.calibrate import CalibrationData
from unirt.precision.calibration.moments import SecondMoments
from unirt.precision.calibration.ranges import Calibration
from unirt.precision.names import check_names
from unirt.precision.partial.trial import Measured, Progress, Trial
from unirt.precision.quantization.litert import (
    QuantizedTFLite,
    TFLitePrecision,
    quantize_tflite,
)
from unirt.precision.quantization.quantize import Precision, Quantized, quantize
from unirt.precision.quantization.recipes import LITERT, TENSORRT, Recipe
from unirt.precision.source import find_onnx


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing each node of a network costs, against the float32 network on the same data.

    `whole` is the network with all nodes quantized that the recipe quantizes. For each of `nodes`,
    in the order of the graph, `alone` has the network with only that node quantized, `without` that
    with all others. Nodes that low precision reaches only beside others, such as the Add of a
    residual, stand in `without` alone. `subsets` are those that the caller named. `kept` says of
    the other products why they are never quantized. `accuracy` is the float32 network's share of
    right answers, None without labels.

    `engine` is what measured, over `samples` samples: `onnxruntime@cpu` means that engine as it
    runs for everybody, with its own integer kernels; `onnxruntime@cpu, Q/DQ as written` that it was
    kept from them, so that figures are those of the graph and of no engine.
    """

    model: str
    precision: str
    recipe: str
    engine: str
    samples: int
    accuracy: float | None
    nodes: tuple[str, ...]
    whole: Measured
    alone: Mapping[str, Measured]
    without: Mapping[str, Measured]
    subsets: Mapping[str, Measured]
    kept: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def noise(self, node: str) -> float:
        """The noise power at the outputs that the node is to blame for, over the signal's.

        Measured alone; for a node that is never alone what its float32 saves of the whole.
        """
        if node in self.alone:
            return self.alone[node].noise
        rest = self.without[node].noise
        return max(0.0, self.whole.noise - rest) if math.isfinite(rest) else 0.0

    def drop(self, node: str) -> float | None:
        """The share of all samples that the node loses, as `noise` is told; None without labels."""
        if self.accuracy is None:
            return None
        if node in self.alone:
            return self.accuracy - (self.alone[node].accuracy or 0.0)
        return (self.without[node].accuracy or 0.0) - (self.whole.accuracy or 0.0)

    def share(self, node: str) -> float:
        """The node's part of the noise of all nodes, 0 to 1.

        Noise of small errors adds up over layers (Lin, Talathi and Annapureddy, "Fixed Point
        Quantization of Deep Convolutional Networks", 2016); where errors are large it does not.
        """
        noises = {name: self.noise(name) for name in self.nodes}
        ruined = [name for name, noise in noises.items() if math.isinf(noise)]
        if ruined:
            return 1 / len(ruined) if node in ruined else 0.0
        total = sum(noises.values())
        return noises[node] / total if total else 0.0

    @property
    def ranking(self) -> tuple[str, ...]:
        """The nodes by `noise`, the most sensitive first; of equal ones the first in the graph."""
        return tuple(sorted(self.nodes, key=lambda name: -self.noise(name)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "precision": self.precision,
            "recipe": self.recipe,
            "engine": self.engine,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "whole": self.whole.to_dict(),
            "nodes": [
                {
                    "node": name,
                    "share": self.share(name),
                    "alone": self.alone[name].to_dict() if name in self.alone else None,
                    "without": self.without[name].to_dict() if name in self.without else None,
                }
                for name in self.ranking
            ],
            "subsets": {name: one.to_dict() for name, one in self.subsets.items()},
            "kept": dict(self.kept),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("quantized", "share", "error", "SNR dB", "accuracy")]
        rows.append(("all", "", *_cells(self.whole)))
        for name in self.ranking:
            alone = name in self.alone
            cells = _cells(self.alone[name] if alone else self.without[name])
            rows.append((name if alone else f"all but {name}", f"{self.share(name):.1%}", *cells))
        rows += [(name, "", *_cells(one)) for name, one in self.subsets.items()]
        widths = [max(len(row[at]) for row in rows) for at in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if at else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.notes])


def _cells(one: Measured) -> tuple[str, str, str]:
    accuracy = "" if one.accuracy is None else f"{one.accuracy:.2%}"
    return f"{one.error:.1e}", f"{one.snr_db:.1f}", accuracy


def sensitivity(
    model: Model | ModelSource,
    calibration: Calibration | None,
    data: CalibrationData,
    *,
    precision: Precision | TFLitePrecision = "int8",
    recipe: str | Recipe = TENSORRT,
    keep: Collection[str] = (),
    block: int | None = None,
    moments: SecondMoments | None = None,
    nodes: Collection[str] | None = None,
    subsets: Mapping[str, Collection[str]] | None = None,
    without: bool = False,
    engine: str | None = None,
    options: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """What quantizing each node alone costs, and any subset of them, against the float32 network.

    One node at a time is quantized, as by `quantize(..., only=[node])`, and the whole network run:
    the sensitivity analysis of Wu et al., "Integer Quantization for Deep Learning Inference" (2020,
    section 5). `nodes` are those to measure, by default all that the recipe quantizes; `subsets`
    quantizes sets of nodes together, by a label of the caller's; `without` also measures the
    network with all quantized but each node, which shows what a node costs beside the others.
    `precision`, `recipe`, `keep`, `block` and `moments` are those of `quantize`.

    `data` is a .npz or .npy file or a mapping as `load_samples` reads it, with `labels` for task
    accuracy, or inputs as `Session.run` takes them, one by one, where `labels` may stand beside the
    inputs too. It is read once for each graph: a list will do, and any object that can be iterated
    over again, but no generator. One graph is held at a time beside the network, and no
    activations, so that memory does not grow with nodes or data.

    A named `engine` is measured as it runs for everybody, like `unirt.load(graph, engine)`, or with
    these `options`, and so is the float32 network: name the one that shall run the result where
    figures decide. By default Q/DQ are computed as they are written, by ONNX Runtime without its
    integer kernels or by the NumPy reference. Engines may be worse: on a CPU without VNNI sums of
    products overflow 16 bits where the recipe leaves them no room. `Sensitivity.engine` says which.

    A node with which an answer becomes NaN or infinite has an infinite error. The same arguments
    give the same figures. `progress` hears of each graph.

    A model that is a .tflite alone, or has one and the recipe LITERT, is quantized by
    `quantize_tflite`: its nodes are operators by their first outputs, precisions those of that
    function; it has no `block` and no `moments`.

    Raises what `quantize` raises; OptionError for a node that the recipe does not quantize;
    DataError for data that does not fit, cannot be read again, or on which the float32 network
    itself answers NaN; NoBackend, BackendUnavailable, BuildError, BackendError.
    """
    with Workbench(
        model, calibration, data, precision, recipe, keep, block, moments, engine, options
    ) as bench:
        return bench.sensitivity(nodes, subsets or {}, without, progress)


class Workbench:
    """Quantizes chosen nodes of one network and measures what comes out. Close it."""

    def __init__(
        self,
        model: Model | ModelSource,
        calibration: Calibration | None,
        data: CalibrationData,
        precision: Precision | TFLitePrecision,
        recipe: str | Recipe,
        keep: Collection[str],
        block: int | None,
        moments: SecondMoments | None,
        engine: str | None,
        options: Mapping[str, object] | None,
    ) -> None:
        """Raises what `quantize` and `Trial` raise."""
        self.source = Model.open(model)
        self._calibration, self._precision = calibration, precision
        self._recipe, self._block, self._moments = recipe, block, moments
        self._lite = recipe is LITERT or "onnx" not in self.source.formats
        if self._lite and (block is not None or moments is not None):
            raise OptionError(
                f"{self.source.name} is a .tflite, which has neither blocks nor moments.",
                "ai-edge-quantizer gives weights a scale for each channel, and rounds to nearest.",
                "Leave them out, or give the network as ONNX.",
            )
        self.whole = self._quantized(keep=keep)
        self._keep = frozenset(keep)
        if isinstance(self.whole, QuantizedTFLite):
            # Ranges of an ONNX graph beside it were carried over, which is done with.
            self._calibration = self.whole.calibration
            lite = self.source.formats["tflite"].read()
            self.source = Model(lite, name=self.source.name)
        elif calibration is not None:
            # What differs was said once, in the notes of `whole`; not again for each graph.
            digest = find_onnx(self.source, "quantized").hash
            self._calibration = replace(calibration, model=digest)
        self.trial = Trial(self.source, data, engine, options)

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.trial.close()

    def keeping(self, nodes: Iterable[str]) -> Quantized | QuantizedTFLite:
        """The network with all quantized but these, and those that were to be kept anyway."""
        return self._quantized(keep=[*self._keep, *nodes])

    def only(self, nodes: Collection[str]) -> Quantized | QuantizedTFLite | None:
        """The network with just these quantized; None if nothing comes of that."""
        try:
            made = self._quantized(keep=self._keep, only=nodes)
        except ModelError as error:
            if "kept" not in error.facts:
                raise
            return None
        return made if set(made.nodes) >= set(nodes) else None

    def _quantized(
        self, keep: Collection[str] = (), only: Collection[str] | None = None
    ) -> Quantized | QuantizedTFLite:
        precision: Any = self._precision
        if self._lite:
            kept = list(keep)
            if only is not None:
                kept += [name for name in self.whole.nodes if name not in only]
            ranges = self._calibration
            return quantize_tflite(self.source, None, ranges, precision=precision, keep=kept)
        return quantize(
            self.source,
            self._calibration,
            precision,
            self._recipe,
            keep=keep,
            only=only,
            block=self._block,
            moments=self._moments,
        )

    def sensitivity(
        self,
        nodes: Collection[str] | None,
        subsets: Mapping[str, Collection[str]],
        without: bool,
        progress: Progress | None,
    ) -> Sensitivity:
        chosen = self._checked("nodes", nodes) if nodes is not None else self.whole.nodes
        wanted = {label: self._checked(f"subset {label!r}", s) for label, s in subsets.items()}
        total = 1 + len(chosen) * (2 if without else 1) + len(wanted)
        done = 0

        def measured(what: str, made: Quantized | QuantizedTFLite) -> Measured:
            nonlocal done
            tell = _part(progress, f"measuring {what}", done, total)
            done += 1
            return self.trial.measure(made.model, tell)

        whole = measured("all quantized", self.whole)
        alone, others = {}, {}
        for name in chosen:
            made = self.only([name])
            if made is not None:
                alone[name] = measured(name, made)
            if without or made is None:
                rest = self._rest(name)
                if rest is not None:
                    others[name] = measured(f"all but {name}", rest)
                else:
                    # The only node there is: without it nothing is quantized.
                    others[name] = Measured((), self.trial.accuracy)
        told = {}
        for label, subset in wanted.items():
            made = self.only(subset)
            if made is None:
                raise OptionError(
                    f"The subset {label!r} cannot be quantized.",
                    "One of its nodes is quantized only beside others that are not in it.",
                    "Add the convolution in front of that node.",
                    subset=label,
                )
            told[label] = measured(label, made)
        return Sensitivity(
            self.source.name,
            self.whole.precision,
            self.whole.recipe,
            self.trial.engine,
            self.trial.samples,
            self.trial.accuracy,
            tuple(chosen),
            whole,
            MappingProxyType(alone),
            MappingProxyType(others),
            MappingProxyType(told),
            self.whole.kept,
            self.whole.notes,
        )

    def _rest(self, name: str) -> Quantized | QuantizedTFLite | None:
        try:
            return self.keeping([name])
        except ModelError as error:
            if "kept" not in error.facts:
                raise
            return None

    def _checked(self, what: str, nodes: Collection[str]) -> tuple[str, ...]:
        """The nodes in the order of the graph. Raises OptionError for one that is not quantized."""
        if isinstance(nodes, str) or not nodes:
            raise OptionError(
                f"{what} is {nodes!r}, which is no collection of names.",
                "It names one node or several.",
                "Give a list of names, or leave it out.",
            )
        known = self.whole.nodes
        for name in nodes:
            if name in self.whole.kept:
                raise OptionError(
                    f"{what} names {name!r}, which is not quantized.",
                    f"It stays in float32: {self.whole.kept[name]}.",
                    "Leave it out.",
                    node=name,
                )
        check_names(nodes, known, "quantized node")
        wanted = set(nodes)
        return tuple(name for name in known if name in wanted)


def _part(
    progress: Progress | None, what: str, done: int, total: int
) -> Callable[[float], None] | None:
    """Tells the share of one of `total` equal parts as one of all."""
    if progress is None:
        return None
    progress(what, done / total)
    return lambda share: progress(what, (done + share) / total)
