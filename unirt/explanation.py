"""Why a quantized network is not as fast as it should be: what its engine made of it, by node.

The same network in floats is built for the same engine, the layers of both are looked at and timed,
and what the quantized one spends that the other does not is tied to the nodes that cause it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from unirt import plugins
from unirt.backend import Engine, SupportsInspection
from unirt.data import DataSource, Shapes, samples_for
from unirt.errors import BackendUnavailable, ModelError
from unirt.inspection import (
    CONTRACTING,
    DEQUANTIZE,
    LOW,
    QUANTIZE,
    EngineReport,
    Layer,
    Placement,
)
from unirt.loading import OptionValues, build
from unirt.measure import measure
from unirt.model import Model, ModelSource
from unirt.shapes import ShapeProfile
from unirt.types import Candidate

if TYPE_CHECKING:
    import onnx

Kind = Literal["float", "unfused", "reformat", "slower", "border", "idle"]
"""A node that should compute in few bits and does not; Q/DQ in kernels of its own around other
nodes; a change of format; layers slower than in floats; Q/DQ where the network begins and ends;
Q/DQ that rounds and speeds nothing up.
"""

Against: TypeAlias = "ModelSource | Model | Candidate | None"
Tell: TypeAlias = Callable[[str, float], None]

Q_DQ = frozenset({QUANTIZE, DEQUANTIZE})
ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu"}
    | {"Gelu", "Mish", "Softplus", "Swish"}
)
MATRIX = frozenset({"MatMul", "Gemm"})
# Of these inputs the others are shapes, scales or indices, not what is computed with.
ALL_INPUTS = frozenset({"Add", "Sub", "Mul", "Div", "Concat", "Sum", "Min", "Max", "MatMul"})
TOO_LITTLE = 0.01
"""Of all layers' time: what costs less is not worth a line."""
SLOWER = 1.1
"""Times that differ by less are equal."""
SECONDS = 1.0
"""How long whole calls of each of the two are timed."""


@dataclass(frozen=True)
class Finding:
    """One thing that costs time. `nodes` are the graph's nodes it is about, the one to change
    first; `seconds` is what it costs a run, None where nothing could be timed.
    """

    kind: Kind
    nodes: tuple[str, ...]
    what: str
    edit: str
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "nodes": list(self.nodes),
            "what": self.what,
            "edit": self.edit,
            "seconds": self.seconds,
        }


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
        from unirt.precision.dequantize import dequantize

        done = dequantize(model)
        plain = Model(done.model.primary.read(), name=f"{model.name} without Q/DQ")
        notes = []
        if done.kept:
            notes.append(f"{_listed(done.kept)} stay in the float network: not a pair")
        if done.restored:
            notes.append(
                "the float network has an activation where QuantizeLinear cuts off what is "
                f"negative: {_listed(done.restored)}"
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


# --- the graph -----------------------------------------------------------------------------------


class Graph:
    """The quantized graph's nodes: what they do, what feeds them, who reads them."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self.ops = {node.name: node.op_type for node in graph.node}
        self._nodes = {node.name: node for node in graph.node}
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(filter(None, node.input)):
                self._readers.setdefault(name, []).append(node)
        self._types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self._types[node.output[0]] = attribute.t.data_type
        self._constant = set(self._types)
        for node in graph.node:
            if node.op_type == "Constant" or (
                node.input and all(name in self._constant for name in node.input if name)
            ):
                self._constant |= set(node.output)
        self.outputs = {value.name for value in graph.output}

    def quantizes(self, name: str) -> bool:
        return self.ops.get(name) in Q_DQ

    def contracts(self, name: str) -> bool:
        return CONTRACTING.search(self.ops.get(name, "")) is not None

    def told(self, name: str) -> str:
        """`Conv 'conv1'`."""
        return f"{self.ops.get(name, 'node')} {name!r}"

    def data(self, name: str) -> list[str]:
        """The inputs that a node computes with and that are no constants."""
        node = self._nodes.get(name)
        if node is None:
            return []
        given = [one for one in node.input if one]
        if node.op_type not in ALL_INPUTS:
            given = given[:1]
        return [one for one in given if one not in self._constant]

    def weight(self, name: str) -> str | None:
        """The second operand of a contraction, where that is a constant."""
        node = self._nodes.get(name)
        given = list(node.input[1:2]) if node is not None else []
        return given[0] if given and given[0] in self._constant else None

    def dequantizer(self, tensor: str) -> str | None:
        """The DequantizeLinear that a tensor comes from."""
        node = self._makers.get(tensor)
        return node.name if node is not None and node.op_type == DEQUANTIZE else None

    def maker(self, tensor: str) -> str | None:
        node = self._makers.get(tensor)
        return node.name if node is not None else None

    def source(self, dequantizer: str) -> str | None:
        """The node whose result a Q/DQ pair rounds, from its DequantizeLinear."""
        pair = self._makers.get(self._nodes[dequantizer].input[0])
        if pair is None or pair.op_type != QUANTIZE:
            return None
        return self.maker(pair.input[0])

    def pair(self, dequantizer: str) -> str | None:
        """The QuantizeLinear of a pair."""
        pair = self._makers.get(self._nodes[dequantizer].input[0])
        return pair.name if pair is not None and pair.op_type == QUANTIZE else None

    def readers(self, name: str) -> list[str]:
        node = self._nodes.get(name)
        outputs = node.output if node is not None else []
        return [reader.name for one in outputs for reader in self._readers.get(one, [])]

    def instead(self, name: str) -> tuple[dict[str, str], bool]:
        """The DequantizeLinear nodes that a node reads, each with the tensor it would read in
        floats, and whether weights are among them.
        """
        node = self._nodes.get(name)
        found, weights = {}, False
        for dequantizer in map(self.dequantizer, node.input if node is not None else ()):
            if dequantizer is None:
                continue
            stored = self._nodes[dequantizer].input[0]
            pair = self._makers.get(stored)
            if pair is not None and pair.op_type == QUANTIZE:
                found[dequantizer] = pair.input[0]
            weights |= stored in self._constant
        return found, weights

    def nearest(self, name: str, *, back: bool) -> str:
        """What computes before or behind a Q/DQ node, or the network's input or output there."""
        seen: set[str] = set()
        while name in self._nodes and self.quantizes(name) and name not in seen:
            seen.add(name)
            node = self._nodes[name]
            if back:
                name = self.maker(node.input[0]) or node.input[0]
            else:
                behind = self.readers(name)
                name = behind[0] if behind else node.output[0]
        return name

    def is_quantized(self, name: str) -> bool:
        """Whether a contraction reads both its operands through DequantizeLinear."""
        weight = self.weight(name)
        operands = [*self.data(name), *filter(None, [weight])]
        return len(operands) > 1 and all(self.dequantizer(one) for one in operands)

    def is_weight(self, name: str) -> bool:
        """Whether a DequantizeLinear works on a constant."""
        node = self._nodes.get(name)
        return node is not None and bool(node.input) and node.input[0] in self._constant

    def is_signed(self, name: str) -> bool:
        """Whether a Q/DQ node works on int8 rather than uint8."""
        node = self._nodes.get(name)
        zero = node.input[2] if node is not None and len(node.input) > 2 else ""
        return self._types.get(zero) == 3  # onnx.TensorProto.INT8

    def at_border(self, name: str) -> Literal["input", "output", ""]:
        node = self._nodes.get(name)
        if node is None:
            return ""
        if node.op_type == QUANTIZE and node.input[0] not in self._makers:
            return "input"
        if node.op_type == DEQUANTIZE and not self.outputs.isdisjoint(node.output):
            return "output"
        return ""


# --- the diagnosis -------------------------------------------------------------------------------


@dataclass
class _Island:
    """A layer in floats, and the Q/DQ layers that stand around it because of that."""

    layer: Layer
    node: str
    around: list[Layer] = field(default_factory=list)
    extra: float = 0.0  # beyond what its nodes take in the other network
    there: str = ""  # what the other network makes of its nodes and those around it


class Diagnosis:
    """Compares two reports. Each second that the first spends more goes into one finding."""

    def __init__(
        self,
        graph: Graph,
        quantized: EngineReport,
        against: EngineReport,
        backend: str,
        device: str,
    ) -> None:
        self.graph = graph
        first, second = quantized.profiles[0], against.profiles[0]
        self.report = quantized.of_profile(first)
        self.other = against.of_profile(second)
        self.timed = self.report.seconds is not None and self.other.seconds is not None
        self.backend, self.on_cpu = backend, device == "cpu"
        self.placed = {id(one.layer): one for one in self.report.unfused_quantization}
        self.moved = {id(one.layer): one for one in self.report.reformats}

    def findings(self) -> list[Finding]:
        islands = self._islands()
        found = [*self._borders(), *self._reformats(), *self._idle()]
        found += self._slower(islands)
        found += [self._told(one) for one in islands.values() if self._counts(one)]
        total = self.report.seconds or 0.0
        kept = [one for one in found if one.seconds is None or one.seconds > TOO_LITTLE * total]
        return sorted(kept, key=lambda one: -(one.seconds or 0.0))

    # What there is

    def _computing(self) -> Iterator[Layer]:
        for layer in self.report.layers:
            if id(layer) not in self.placed and id(layer) not in self.moved:
                yield layer

    def _compute(self, nodes: Iterable[str]) -> list[str]:
        return [one for one in nodes if one in self.graph.ops and not self.graph.quantizes(one)]

    def _is_low(self, layer: Layer) -> bool:
        read = [one.dtype for one in layer.inputs]
        return self.report.precision(layer) in LOW or (bool(read) and set(read) <= set(LOW))

    def _islands(self) -> dict[int, _Island]:
        homes: dict[str, Layer] = {}
        for layer in self._computing():
            for node in self._compute(layer.nodes):
                homes.setdefault(node, layer)
        islands: dict[int, _Island] = {}

        def island(layer: Layer, node: str) -> _Island:
            return islands.setdefault(id(layer), _Island(layer, self._main(layer, node)))

        for layer in self._computing():
            contracting = filter(self.graph.contracts, self._compute(layer.nodes))
            product = next(filter(self.graph.is_quantized, contracting), None)
            if product and layer.inputs and not self._is_low(layer):
                island(layer, product)
        for one in self.placed.values():
            if self._border(one):
                continue
            for nodes in self._sides(one):
                known = [node for node in self._compute(nodes) if node in homes]
                floats = [node for node in known if not self._is_low(homes[node])]
                chosen = (floats or known)[:1]
                if chosen:
                    island(homes[chosen[0]], chosen[0]).around.append(one.layer)
                    break
        return islands

    def _main(self, layer: Layer, node: str) -> str:
        """The node that a layer is about: what multiplies matrices, else what was asked for."""
        known = self._compute(layer.nodes)
        return next((one for one in known if self.graph.contracts(one)), node)

    def _sides(self, one: Placement) -> list[tuple[str, ...]]:
        """Who a Q/DQ layer is there for first: a reader of floats, or who wrote them."""
        gives_floats = all(self.graph.ops.get(node) == DEQUANTIZE for node in one.layer.nodes)
        return [one.after, one.before] if gives_floats else [one.before, one.after]

    def _border(self, one: Placement) -> str:
        return next(filter(None, map(self.graph.at_border, one.layer.nodes)), "")

    def _counts(self, island: _Island) -> bool:
        """A float layer with nothing around it is as the graph wants it."""
        return bool(island.around) or self._fell_back(island)

    def _fell_back(self, island: _Island) -> bool:
        """Whether a product of quantized operands is computed in floats."""
        asked = self.graph.contracts(island.node) and self.graph.is_quantized(island.node)
        return asked and bool(island.layer.inputs) and not self._is_low(island.layer)

    # What it costs

    def _seconds(self, layers: Iterable[Layer]) -> float:
        return math.fsum(layer.seconds or 0.0 for layer in layers)

    def _cost(self, seconds: float) -> float | None:
        return seconds if self.timed else None

    def _slower(self, islands: Mapping[int, _Island]) -> Iterator[Finding]:
        """Groups of nodes that take longer here than there: a group is what shares layers."""
        if not self.timed:
            return
        for nodes, ours, theirs in self._groups():
            extra = self._seconds(ours) - self._seconds(theirs)
            if self._seconds(ours) < SLOWER * self._seconds(theirs):
                continue
            inside = [islands[id(layer)] for layer in ours if id(layer) in islands]
            if inside:
                # It is slower because of them; the one that takes longest answers for the group.
                chosen = max(inside, key=lambda one: one.layer.seconds or 0.0)
                chosen.extra += extra
                if len(theirs) < len(ours) and len(theirs) == 1:
                    chosen.there = f"; without Q/DQ, {_listed(nodes)} are one layer"
                continue
            main = next((n for n in nodes if self.graph.contracts(n)), nodes[0])
            ordered = (main, *(node for node in nodes if node != main))
            yield Finding(
                "slower",
                ordered,
                f"{_listed(nodes)}: {_time(self._seconds(ours))} in {self._precisions(ours)}, "
                f"{_time(self._seconds(theirs))} in {self._precisions(theirs, self.other)}"
                + (" and one layer" if len(theirs) == 1 < len(ours) else ""),
                self._edit_of_slow(main, ours),
                extra,
            )

    def _groups(self) -> Iterator[tuple[list[str], list[Layer], list[Layer]]]:
        """Nodes with their layers in both networks, so that both compute just these."""
        leader: dict[str, str] = {}

        def find(name: str) -> str:
            while leader.setdefault(name, name) != name:
                name = leader[name]
            return name

        mine = list(self._computing())
        quantizing = {id(one.layer) for one in self.other.unfused_quantization}
        theirs = [
            layer
            for layer in self.other.layers
            if not (layer.moves_only and not layer.nodes) and id(layer) not in quantizing
        ]
        sides = [
            [(layer, self._compute(layer.nodes)) for layer in layers] for layers in (mine, theirs)
        ]
        for side in sides:
            for _, nodes in side:
                for node in nodes[1:]:
                    leader[find(node)] = find(nodes[0])
        groups: dict[str, tuple[dict[str, None], list[Layer], list[Layer]]] = {}
        for place, side in enumerate(sides, 1):
            for layer, nodes in side:
                if nodes:
                    group = groups.setdefault(find(nodes[0]), ({}, [], []))
                    group[0].update(dict.fromkeys(nodes))
                    group[place].append(layer)  # type: ignore[union-attr]
        order = {name: place for place, name in enumerate(self.graph.ops)}
        for names, ours, others in groups.values():
            if ours and others:
                yield sorted(names, key=order.__getitem__), ours, others

    def _precisions(self, layers: Iterable[Layer], report: EngineReport | None = None) -> str:
        report = report or self.report
        found = dict.fromkeys(filter(None, map(report.precision, layers)))
        return " and ".join(found) or "unknown types"

    # What it is, and what would help

    def _told(self, island: _Island) -> Finding:
        around = list(dict.fromkeys(node for one in island.around for node in one.nodes))
        told = self.graph.told(island.node)
        precision = self.report.precision(island.layer)
        kernels = ""
        if around:
            own = "have kernels of their own" if len(around) > 1 else "has a kernel of its own"
            kernels = f"{_listed(around)} {own}"
        if self._fell_back(island):
            what = f"{told} computes in {precision}, although its operands are quantized"
            what += f"; {kernels}" if kernels else ""
        else:
            what = f"{kernels} at {told}"
            what += f", which computes in {precision}" if precision else ""
        what += island.there
        return Finding(
            "float" if self._fell_back(island) else "unfused",
            (island.node, *around),
            what,
            self._edit(island.node),
            self._cost(self._seconds(island.around) + island.extra),
        )

    def _edit(self, node: str) -> str:
        graph = self.graph
        told = graph.told(node)
        given = graph.data(node)
        pairs = [name for name in map(graph.dequantizer, given) if name]
        after = graph.readers(node)
        is_quantized_after = any(graph.ops[one] == QUANTIZE for one in after)
        if pairs and len(pairs) < len(given):
            rest = [one for one in given if not graph.dequantizer(one)]
            where = graph.maker(rest[0])
            return f"quantize the other input of {told} too" + (
                f": it comes from {graph.told(where)}" if where else f": {rest[0]!r}"
            )
        if graph.ops[node] in ACTIVATIONS and pairs:
            source = graph.source(pairs[0])
            if source and graph.ops[source] not in ACTIVATIONS:
                return (
                    f"put Q/DQ behind {told}, not between {graph.told(source)} and it: take out "
                    f"{_listed(filter(None, [graph.pair(pairs[0]), pairs[0]]))}"
                )
        weight = graph.weight(node)
        if pairs and weight is not None and not graph.dequantizer(weight):
            return f"quantize the weight {weight!r} of {told} too"
        signed = pairs and self.on_cpu and any(map(graph.is_signed, pairs))
        if pairs and is_quantized_after and signed and self.backend == "onnxruntime":
            return "use the cpu recipe: uint8 activations (here they are int8)"
        if pairs and not is_quantized_after and after:
            active = [one for one in after if graph.ops[one] in ACTIVATIONS]
            behind = f"{graph.told(active[0])} behind it" if active else told
            return (
                f"quantize the output of {behind} too, since integer kernels give integers; or "
                f"leave {told} in float: take out {_listed(pairs)} and what belongs to it"
            )
        if pairs:
            return self._keep(node)
        if is_quantized_after:
            return (
                f"nothing at this place: {told} is not quantized, and what follows is; quantize "
                "its inputs too, or leave in float what follows"
            )
        return f"nothing at this place: {told} is not quantized, and what is before it is"

    def _edit_of_slow(self, main: str, layers: Sequence[Layer]) -> str:
        told = self.graph.told(main)
        if self.graph.ops[main] in MATRIX and _is_vector(layers):
            return f"keep {told} in float: its matrix is a vector"
        names = [name for name in map(self.graph.dequantizer, self.graph.data(main)) if name]
        signed = self.on_cpu and any(map(self.graph.is_signed, names))
        faster_unsigned = self.graph.contracts(main) or self.graph.ops[main] == "MaxPool"
        if signed and faster_unsigned and self.backend == "onnxruntime":
            return "use the cpu recipe: uint8 activations (here they are int8)"
        return self._keep(main)

    def _keep(self, node: str) -> str:
        read, weights = self.graph.instead(node)
        parts = [f"{tensor!r} instead of {name}" for name, tensor in read.items()]
        parts += ["float weights"] * weights
        which = f": let it read {' and '.join(parts)}" if parts else ""
        return f"keep {self.graph.told(node)} in float{which}"

    def _borders(self) -> Iterator[Finding]:
        for one in self.placed.values():
            border = self._border(one)
            if not border:
                continue
            first = border == "input"
            yield Finding(
                "border",
                one.layer.nodes,
                f"{_listed(one.layer.nodes)} {'quantizes the' if first else 'dequantizes the'} "
                f"network's {border}",
                "nothing, unless the network may "
                + ("take" if first else "give")
                + f" integers: then cut {'it' if len(one.layer.nodes) == 1 else 'them'} off",
                self._cost(one.layer.seconds or 0.0),
            )

    def _reformats(self) -> Iterator[Finding]:
        there: dict[tuple[str, str], float] = {}
        for one in self.other.reformats:
            place = self._place(one)
            there[place] = there.get(place, 0.0) + (one.layer.seconds or 0.0)
        floats = {
            node
            for layer in self._computing()
            if not self._is_low(layer)
            for node in self._compute(layer.nodes)
        }
        for one in self.report.reformats:
            if not one.inserted:
                continue  # the graph itself asks for it, in floats too
            before, after = place = self._place(one)
            saved = there.pop(place, None)
            if saved is not None and not self.timed:
                continue
            seconds = (one.layer.seconds or 0.0) - (saved or 0.0)
            both = " and ".join(filter(None, place))
            where = f"between {both}" if before and after else f"at {both}" if both else ""
            nodes = tuple(node for node in place if node in self.graph.ops)
            beside = next((node for node in nodes if node in floats), None)
            if beside is not None:
                edit = f"quantize {self.graph.told(beside)} too, so that the layout can stay"
            elif len(nodes) < 2:
                edit = "nothing: the network's inputs and outputs have a layout of their own"
            else:
                edit = (
                    f"keep what is on both sides of it in one precision: {_listed(nodes)} want "
                    "different layouts"
                )
            yield Finding(
                "reformat",
                nodes,
                f"{one.layer.kind} inserted {where}: {one.change}".replace("  ", " "),
                edit,
                self._cost(seconds),
            )

    def _place(self, one: Placement) -> tuple[str, str]:
        """The nearest nodes that compute, or the network's inputs and outputs."""

        def main(nodes: Sequence[str], last: bool) -> str:
            known = self._compute(nodes)
            main_ = [node for node in known if self.graph.contracts(node)]
            place = -1 if last else 0
            if main_ or known:
                return (main_ or known)[place]
            return self.graph.nearest(nodes[place], back=last) if nodes else ""

        return main(one.before, True), main(one.after, False)

    def _idle(self) -> Iterator[Finding]:
        for node in self.report.idle_quantization:
            yield Finding(
                "idle",
                (node,),
                f"{self.graph.told(node)} rounds numbers that are computed in float",
                f"take {node!r} and its partner out",
                None,
            )


def _is_vector(layers: Sequence[Layer]) -> bool:
    for layer in layers:
        for tensor in layer.outputs:
            if tensor.shape and math.prod(tensor.shape[:-1]) == 1:
                return True
    return False


FEW = 4


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - FEW
    text = ", ".join(listed[: FEW if more > 1 else None])
    return f"{text} and {more} more" if more > 1 else text


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
