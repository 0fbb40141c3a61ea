"""Why a quantized network is not as fast as it should be: what its engine made of it, by node.

The same network in floats is built for the same engine, the layers of both are looked at and timed,
and what the quantized one spends that the other does not is tied to the nodes that cause it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from unirt import plugins
from unirt.backend import Engine, SupportsInspection
from unirt.candidates import backend_of
from unirt.data import DataSource, Shapes, samples_for
from unirt.derivation import Ranges, derived
from unirt.errors import BackendUnavailable, DataError, ModelError
from unirt.explanation.cures import cures_for, listed
from unirt.explanation.diagnosis import WORTH, Diagnosis, Finding, worth
from unirt.explanation.graph import HANDING_ON, Q_DQ, Graph
from unirt.inspection import EngineReport
from unirt.loading import OptionValues, compiled
from unirt.measure import measure
from unirt.model import Model, ModelSource
from unirt.precision.graph import name_nodes
from unirt.precision.source import check_size, find_onnx, read_graph
from unirt.shapes import ShapeProfile
from unirt.types import Candidate

if TYPE_CHECKING:
    import onnx

    from unirt.precision.calibration.ranges import CalibrationSource

Against: TypeAlias = "ModelSource | Model | Candidate | None"
Tell: TypeAlias = Callable[[str, float], None]

SECONDS = 1.0
"""How long whole calls of each of the two are timed."""

ROUNDS, LEAST_ROUNDS, ROUND_SECONDS = 5, 2, 10.0
"""In how many rounds layers are timed, the two networks in turn; fewer where they take long."""

SHOWING = "onnxruntime, openvino or tensorrt"
"""Engines that run ONNX graphs and show their layers."""


@dataclass(frozen=True)
class Side:
    """One of the two networks on its engine. `seconds` is the median of whole calls, untimed None;
    layers are timed one by one, so their sum is more.
    """

    name: str
    candidate: str
    report: EngineReport
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "candidate": self.candidate,
            "seconds": self.seconds,
            "layer_seconds": self.report.seconds,
            "precisions": dict(self.report.precisions),
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True)
class Explanation:
    """Why a quantized network takes as long as it does, the most expensive finding first."""

    quantized: Side
    against: Side
    findings: tuple[Finding, ...]
    data: str
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Time of the quantized network over that of the other; above 1 it is slower."""
        if not self.quantized.seconds or not self.against.seconds:
            return None
        return self.quantized.seconds / self.against.seconds

    @property
    def cost(self) -> float | None:
        """What all findings cost together, in layer time."""
        timed = [one.seconds for one in self.findings if one.seconds is not None]
        return math.fsum(timed) if timed else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantized": self.quantized.to_dict(),
            "against": self.against.to_dict(),
            "ratio": self.ratio,
            "cost": self.cost,
            "findings": [one.to_dict() for one in self.findings],
            "data": self.data,
            "notes": list(self.notes),
        }


def explain(
    model: Model | ModelSource,
    candidate: str | Candidate,
    against: Against = None,
    data: DataSource | None = None,
    *,
    calibration: CalibrationSource | None = None,
    options: OptionValues | None = None,
    profiles: Sequence[ShapeProfile] = (),
    shapes: Shapes | None = None,
    seed: int = 0,
    seconds: float = SECONDS,
    progress: Tell | None = None,
) -> Explanation:
    """What holds a Q/DQ graph back on one engine, with the edit of the graph that would help.

    A candidate with a precision, such as `onnxruntime:int8`, may be given the float network: then
    the graph is explained that `build` makes of it, from `calibration` or all of `data`.

    `against` is the float network as a model or a path, or a candidate that runs the given one; by
    default the given network itself if it has no Q/DQ nodes, else the graph without them
    (`unirt.precision.dequantize`). Layers are timed on the first call of `data`, or on random
    inputs; where the engine cannot run here, or times no layers, findings have no times.

    Raises ModelError for a graph without Q/DQ nodes, or an `against` that is another network;
    BackendUnavailable for an engine that shows no layers or without the onnx package; and what
    `unirt.build` raises.
    """
    tell = progress or (lambda _what, _share: None)
    given, candidate = _named(Model.open(model)), Candidate.parse(candidate)
    refuse_blind(candidate)
    samples = samples_for(
        given.inputs, given.outputs, data, calls=1, seed=seed, batch=None, shapes=shapes
    )
    ranges = Ranges(given, calibration, samples if data is not None else ())
    quantized, notes = _quantized(given, candidate, ranges, data)
    # What the candidate asks for is in the graph now.
    plain = replace(candidate, precision=None)
    graph = Graph(_read(quantized))
    if not any(op in Q_DQ for op in graph.ops.values()):
        raise ModelError(
            f"{given.name} has nothing to explain.",
            "It has no QuantizeLinear and no DequantizeLinear node.",
            "Give the quantized network (the float one goes behind --against), or a precision "
            f"with the engine: {plain}:int8.",
        )
    other, elsewhere, told = _other(given, quantized, against, plain)
    notes += told
    refuse_blind(elsewhere)
    feed = samples.feeds(samples.call_size(None), 1)[0]
    feed = {spec.name: feed[spec.name] for spec in quantized.inputs}
    how: dict[str, Any] = {"options": options, "profiles": profiles, "samples": [feed]}
    theirs = how if elsewhere.backend == candidate.backend else {**how, "options": None}
    tell(f"building {quantized.name} for {candidate}", 0.0)
    with compiled(quantized, plain, ranges, **how) as one:
        tell(f"building {other.name} for {elsewhere}", 0.25)
        with compiled(other, elsewhere, ranges, **theirs) as two:
            tell("timing", 0.5)
            rounds, untimed = _look(one, two, feed)
            notes += untimed
            times = _latencies({"quantized": one, "against": two}, feed, seconds, notes, tell)
        cures = cures_for(candidate.backend, graph, one.device.kind, one.facts)
    first, second = (_middle([pair[place] for pair in rounds]) for place in (0, 1))
    found = Diagnosis(graph, first, second, cures).findings()
    each = [Diagnosis(graph, *pair, cures).findings() for pair in rounds]
    findings = worth(found, each, first.seconds)
    if len(found) > len(findings):
        count = len(found) - len(findings)
        notes.append(
            f"{count} finding{'s' * (count != 1)} left out that cost{'s' * (count == 1)} less than "
            f"{WORTH:.0%} of all layers' time, or not in every round"
        )
    return Explanation(
        Side(quantized.name, str(candidate), first, times.get("quantized")),
        Side(
            "the same graph" if other is quantized else other.name,
            str(elsewhere),
            second,
            times.get("against"),
        ),
        tuple(findings),
        samples.description,
        tuple(dict.fromkeys(notes)),
    )


def refuse_blind(candidate: Candidate) -> None:
    """Raises BackendUnavailable before anything is built, where no engine that the candidate's
    plugin has defined shows its layers. One that defines it later is asked when it is there.
    """
    plugin = plugins.plugin(candidate.backend)
    found = plugin.backend if plugin else None
    if found is None:
        return
    package = type(found).__module__.partition(".")[0]
    own = [kind for kind in _kinds(Engine) if kind.__module__.partition(".")[0] == package]
    if own and not any(issubclass(kind, SupportsInspection) for kind in own):
        raise BackendUnavailable(
            f"{candidate} does not show its layers.",
            "This engine has no interface for it.",
            f"Use another candidate, such as {SHOWING}.",
            backend=candidate.backend,
        )


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)


def _read(model: Model, *, weights: bool = True) -> onnx.ModelProto:
    try:
        file = find_onnx(model, "explained")
    except ModelError as error:
        remedy = f"Give the network as ONNX, and an engine that runs it: {SHOWING}."
        raise ModelError(error.what, error.why, remedy) from error
    return read_graph(file, "explained", weights=weights)


# --- the two networks ----------------------------------------------------------------------------


def _named(model: Model, like: Model | None = None) -> Model:
    """The model with names for its nameless nodes: those that another one has for nodes of the same
    results, else the ones that every transform gives.
    """
    if all(node.name for node in _read(model, weights=False).graph.node):
        return model
    proto = _read(model)
    known = {} if like is None else _by_result(_read(like, weights=False))
    taken = {node.name for node in proto.graph.node}
    for node in proto.graph.node:
        name, op = known.get(node.output[0] if node.output else "", ("", ""))
        if not node.name and op == node.op_type and name not in taken:
            node.name = name
            taken.add(name)
    name_nodes(proto.graph)
    check_size(proto, model.name, "the naming of its nodes")
    return Model(proto.SerializeToString(), name=model.name)


def _by_result(proto: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    return {node.output[0]: (node.name, node.op_type) for node in proto.graph.node if node.output}


def _quantized(
    model: Model, candidate: Candidate, ranges: Ranges, data: DataSource | None
) -> tuple[Model, list[str]]:
    """The graph that a candidate is given for its precision, and notes on how it was made."""
    backend = backend_of(candidate.backend)
    if "onnx" not in backend.formats:
        raise BackendUnavailable(
            f"What {candidate} makes of {model.name} cannot be explained.",
            f"Findings name nodes of an ONNX graph, and it reads {' and '.join(backend.formats)}.",
            f"Use another candidate, such as {SHOWING}; `unirt inspect` shows its layers.",
            backend=candidate.backend,
        )
    try:
        made, _ = derived(model, candidate, backend, ranges)
    except DataError as error:
        if data is not None or ranges.given is not None:
            raise
        raise DataError(
            error.what,
            error.why,
            "Give data (--data FILE.npz), or a calibration, which is what "
            "unirt.precision.calibrate found or a file that it was saved to (--calibration).",
            candidate=str(candidate),
            precision=candidate.precision,
        ) from error
    if made is model:
        return model, []
    content = made.primary.read()
    named = Model(content, name=f"{model.name} in {candidate.precision}")
    return _named(named), list(made.primary.notes)


def _other(
    given: Model, quantized: Model, against: Against, plain: Candidate
) -> tuple[Model, Candidate, list[str]]:
    """What the quantized network is held against, on which engine, and notes about it."""
    if against is None and quantized is not given:
        return given, plain, []
    if against is None:
        from unirt.precision.quantization.dequantize import dequantize

        done = dequantize(quantized)
        floats = Model(done.model.primary.read(), name=f"{quantized.name} without Q/DQ")
        notes = []
        if done.kept:
            notes.append(f"{listed(done.kept)} stay in the float network: not a pair")
        if done.restored:
            notes.append(
                "the float network has an activation where QuantizeLinear cuts off what is "
                f"negative: {listed(done.restored)}"
            )
        return floats, plain, notes
    if isinstance(against, Candidate):
        return given, against, []
    if isinstance(against, str) and not against.lower().endswith(".onnx"):
        path = Path(against)
        if not path.exists() and os.sep not in against:
            return given, Candidate.parse(against), []
    other = _named(Model.open(against), quantized)
    _check_same(quantized, other)
    return other, plain, []


def _check_same(model: Model, other: Model) -> None:
    """Raises ModelError where one is no float network of the other."""
    why = ""
    for word, mine, theirs in (
        ("takes", model.inputs, other.inputs),
        ("gives", model.outputs, other.outputs),
    ):
        names = [sorted(spec.name for spec in specs) for specs in (mine, theirs)]
        if names[0] != names[1]:
            one, two = (", ".join(found) or "nothing" for found in names)
            why = why or f"One {word} {one}, the other {two}."
    if not why:
        nodes, others = _computing(model), _computing(other)
        shared = nodes & others
        if 2 * len(shared) < len(nodes):
            why = (
                f"Of {len(nodes)} nodes that compute, it has {len(shared)} of the same name and "
                "operator."
            )
    if why:
        raise ModelError(
            f"{other.name} cannot be held against {model.name}.",
            why,
            "Give the float network that was quantized, or leave it out.",
        )


def _computing(model: Model) -> set[tuple[str, str]]:
    passive = Q_DQ | HANDING_ON | {"Constant"}
    nodes = _read(model, weights=False).graph.node
    return {(node.name, node.op_type) for node in nodes if node.op_type not in passive}


# --- how long they take --------------------------------------------------------------------------


def _look(
    one: Engine, two: Engine, feed: Mapping[str, Any]
) -> tuple[list[tuple[EngineReport, EngineReport]], list[str]]:
    """The layers of both, in each of several rounds timed where the engines can; else once, and the
    reasons why not.
    """
    started = time.perf_counter()
    (first, untimed), (second, also) = _layers(one, feed), _layers(two, feed)
    rounds = [(first, second)]
    if first.seconds is None or second.seconds is None:
        return rounds, list(filter(None, (untimed, also)))
    for count in range(2, ROUNDS + 1):
        pair = _layers(one, feed)[0], _layers(two, feed)[0]
        names = [[layer.name for layer in report.layers] for report in (*rounds[0], *pair)]
        if names[:2] == names[2:]:
            rounds.append(pair)
        if count >= LEAST_ROUNDS and time.perf_counter() - started > ROUND_SECONDS:
            break
    return rounds, []


def _layers(engine: Engine, feed: Mapping[str, Any]) -> tuple[EngineReport, str]:
    if _is_target(engine):
        return engine.inspect(), f"{engine.candidate} cannot run here, so nothing is timed"
    with engine.session() as session:
        try:
            return session.profile(feed), ""
        except BackendUnavailable as error:
            return engine.inspect(), f"layers are not timed: {error.why}"


def _middle(reports: Sequence[EngineReport]) -> EngineReport:
    """The report with the median of each layer's times."""
    layers = []
    for same in zip(*(report.layers for report in reports), strict=True):
        times = [layer.seconds for layer in same if layer.seconds is not None]
        layers.append(replace(same[0], seconds=statistics.median(times) if times else None))
    return replace(reports[0], layers=tuple(layers))


def _is_target(engine: Engine) -> bool:
    return str(engine.device) in map(str, engine.backend.probe().targets)


def _latencies(
    engines: Mapping[str, Engine],
    feed: Mapping[str, Any],
    seconds: float,
    notes: list[str],
    tell: Tell,
) -> dict[str, float]:
    if any(map(_is_target, engines.values())):
        return {}
    sessions = {name: engine.session() for name, engine in engines.items()}
    try:
        found = measure(
            {name: session.run for name, session in sessions.items()},
            [dict(feed)],
            seconds=seconds,
            progress=lambda share: tell("timing", 0.5 + share / 2),
        )
    finally:
        for session in sessions.values():
            session.close()
    notes += [f"calls of the {name} failed: {error}" for name, error in found.failures.items()]
    return {name: timing.median for name, timing in found.timings.items()}
