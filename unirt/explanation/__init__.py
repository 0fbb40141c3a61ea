"""Why a quantized network is not as fast as it should be: what its engine made of it, by node.

The same network in floats is built for the same engine, the layers of both are looked at and timed,
and what the quantized one spends that the other does not is tied to the nodes that cause it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from unirt import plugins
from unirt.backend import Engine, SupportsInspection
from unirt.data import DataSource, Shapes, samples_for
from unirt.errors import BackendUnavailable, ModelError
from unirt.explanation.diagnosis import Diagnosis, Finding, listed
from unirt.explanation.graph import Q_DQ, Graph
from unirt.inspection import EngineReport
from unirt.loading import OptionValues, build
from unirt.measure import measure
from unirt.model import Model, ModelSource
from unirt.shapes import ShapeProfile
from unirt.types import Candidate

if TYPE_CHECKING:
    import onnx

Against: TypeAlias = "ModelSource | Model | Candidate | None"
Tell: TypeAlias = Callable[[str, float], None]

SECONDS = 1.0
"""How long whole calls of each of the two are timed."""


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
    options: OptionValues | None = None,
    profiles: Sequence[ShapeProfile] = (),
    shapes: Shapes | None = None,
    seed: int = 0,
    seconds: float = SECONDS,
    progress: Tell | None = None,
) -> Explanation:
    """What holds a Q/DQ graph back on one engine, with the edit of the graph that would help.

    `against` is the float network as a model or a path, or a candidate that runs the same graph;
    by default the graph itself without its Q/DQ nodes (`unirt.precision.dequantize`). Layers are
    timed on the first call of `data`, or on random inputs; where the engine cannot run here, or
    times no layers, findings have no times.

    Raises ModelError for a graph without Q/DQ nodes, BackendUnavailable for an engine that shows
    no layers or without the onnx package, and what `unirt.build` raises.
    """
    tell = progress or (lambda _what, _share: None)
    quantized = _named(Model.open(model))
    graph = Graph(_read(quantized))
    if not any(op in Q_DQ for op in graph.ops.values()):
        raise ModelError(
            f"{quantized.name} has nothing to explain.",
            "It has no QuantizeLinear and no DequantizeLinear node.",
            "Give the quantized network; the float one goes behind --against.",
        )
    candidate = Candidate.parse(candidate)
    other, elsewhere, notes = _other(quantized, against, candidate)
    for named in (candidate, elsewhere):
        refuse_blind(named)
    samples = samples_for(
        quantized.inputs, quantized.outputs, data, calls=1, seed=seed, batch=None, shapes=shapes
    )
    feed = samples.feeds(samples.call_size(None), 1)[0]
    feed = {spec.name: feed[spec.name] for spec in quantized.inputs}
    how: dict[str, Any] = {"options": options, "profiles": profiles, "samples": [feed]}
    if elsewhere.backend != candidate.backend:
        how = {**how, "options": None}
    tell(f"building {quantized.name} for {candidate}", 0.0)
    with build(quantized, candidate, options=options, profiles=profiles, samples=[feed]) as one:
        tell(f"building {other.name} for {elsewhere}", 0.25)
        with build(other, elsewhere, **how) as two:
            tell("timing", 0.5)
            (first, untimed), (second, also) = _look(one, feed), _look(two, feed)
            notes += [*dict.fromkeys(filter(None, (untimed, also)))]
            # Another program's turn costs one of both networks; hardly the same layer twice.
            if first.seconds is not None and second.seconds is not None:
                first = _calmer(first, _look(one, feed)[0])
                second = _calmer(second, _look(two, feed)[0])
            times = _latencies({"quantized": one, "against": two}, feed, seconds, notes, tell)
    findings = Diagnosis(graph, first, second, candidate.backend, one.device.kind).findings()
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
        tuple(notes),
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
            "Use another candidate, such as onnxruntime, openvino or tensorrt.",
            backend=candidate.backend,
        )


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)


def _read(model: Model) -> onnx.ModelProto:
    file = model.file(["onnx"])
    if file is None:
        raise ModelError(
            f"{model.name} cannot be explained.",
            f"Findings name nodes of an ONNX graph, and it has {', '.join(model.formats)}.",
            "Give the network as ONNX.",
        )
    try:
        import onnx
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise BackendUnavailable(
            f"{model.name} cannot be explained here.",
            "The onnx package is not installed.",
            "pip install 'unirt[precision]'",
        ) from error
    return onnx.load_model_from_string(file.read())


def _named(model: Model) -> Model:
    """The model with names for its nameless nodes, the same ones that every transform gives."""
    from unirt.precision.graph import name_nodes

    proto = _read(model)
    file = model.file(["onnx"])
    if all(node.name for node in proto.graph.node) or file is None or file.external:
        return model
    name_nodes(proto.graph)
    return Model(proto.SerializeToString(), name=model.name)


def _other(
    model: Model, against: Against, candidate: Candidate
) -> tuple[Model, Candidate, list[str]]:
    """What the quantized network is held against, on which engine, and notes about it."""
    if against is None:
        from unirt.precision.quantization.dequantize import dequantize

        done = dequantize(model)
        plain = Model(done.model.primary.read(), name=f"{model.name} without Q/DQ")
        notes = []
        if done.kept:
            notes.append(f"{listed(done.kept)} stay in the float network: not a pair")
        if done.restored:
            notes.append(
                "the float network has an activation where QuantizeLinear cuts off what is "
                f"negative: {listed(done.restored)}"
            )
        return plain, candidate, notes
    if isinstance(against, Candidate):
        return model, against, []
    if isinstance(against, str) and not against.lower().endswith(".onnx"):
        path = Path(against)
        if not path.exists() and os.sep not in against:
            return model, Candidate.parse(against), []
    other = _named(Model.open(against))
    ins, theirs = ({s.name: s for s in one.inputs} for one in (model, other))
    if ins.keys() != theirs.keys():
        raise ModelError(
            f"{other.name} cannot be held against {model.name}.",
            f"One takes {', '.join(ins) or 'nothing'}, the other {', '.join(theirs) or 'nothing'}.",
            "Give the float network that was quantized, or leave it out.",
        )
    return other, candidate, []


def _look(engine: Engine, feed: Mapping[str, Any]) -> tuple[EngineReport, str]:
    """The layers, timed where the engine can, and otherwise the reason why not."""
    if _is_target(engine):
        return engine.inspect(), f"{engine.candidate} cannot run here, so nothing is timed"
    with engine.session() as session:
        try:
            return session.profile(feed), ""
        except BackendUnavailable as error:
            return engine.inspect(), f"layers are not timed: {error.why}"


def _calmer(first: EngineReport, again: EngineReport) -> EngineReport:
    """The first report with the smaller one of each layer's two times."""
    if [layer.name for layer in first.layers] != [layer.name for layer in again.layers]:
        return first
    layers = []
    for one, other in zip(first.layers, again.layers, strict=True):
        times = [layer.seconds for layer in (one, other) if layer.seconds is not None]
        layers.append(replace(one, seconds=min(times, default=None)))
    return replace(first, layers=tuple(layers))


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
