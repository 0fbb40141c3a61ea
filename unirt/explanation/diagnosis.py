"""What a quantized network spends that the same network in floats does not, by node."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unirt.explanation.graph import Graph
from unirt.inspection import DEQUANTIZE, LOW, QUANTIZE, EngineReport, Layer, Placement

Kind = Literal["float", "unfused", "reformat", "slower", "border", "idle"]
"""A node that should compute in few bits and does not; Q/DQ in kernels of its own around other
nodes; a change of format; layers slower than in floats; Q/DQ where the network begins and ends;
Q/DQ that rounds and speeds nothing up.
"""

ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu"}
    | {"Gelu", "Mish", "Softplus", "Swish"}
)
MATRIX = frozenset({"MatMul", "Gemm"})
TOO_LITTLE = 0.01
"""Of all layers' time: what costs less is not worth a line."""
SLOWER = 1.1
"""Times that differ by less are equal."""


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
                    chosen.there = f"; without Q/DQ, {listed(nodes)} are one layer"
                continue
            main = next((n for n in nodes if self.graph.contracts(n)), nodes[0])
            ordered = (main, *(node for node in nodes if node != main))
            yield Finding(
                "slower",
                ordered,
                f"{listed(nodes)}: {_time(self._seconds(ours))} in {self._precisions(ours)}, "
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
            kernels = f"{listed(around)} {own}"
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
                    f"{listed(filter(None, [graph.pair(pairs[0]), pairs[0]]))}"
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
                f"leave {told} in float: take out {listed(pairs)} and what belongs to it"
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
                f"{listed(one.layer.nodes)} {'quantizes the' if first else 'dequantizes the'} "
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
                    f"keep what is on both sides of it in one precision: {listed(nodes)} want "
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


def listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - FEW
    text = ", ".join(listed[: FEW if more > 1 else None])
    return f"{text} and {more} more" if more > 1 else text


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
