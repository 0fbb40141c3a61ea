"""What a quantized network spends that the same network in floats does not, by node."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unirt.explanation.cures import MATRIX, Cure, Cures, listed
from unirt.explanation.graph import Graph
from unirt.inspection import DEQUANTIZE, FLOATS, LOW, EngineReport, Layer, Placement

Kind = Literal["float", "unfused", "reformat", "slower", "border", "idle"]
"""A node that should compute in few bits and does not; Q/DQ in kernels of its own around other
nodes; a change of format; layers slower than in floats; Q/DQ where the network begins and ends;
Q/DQ that rounds and speeds nothing up.
"""

SLOWER = 1.1
"""Times that differ by less are equal."""
WORTH = 0.02
"""Of all layers' time: what costs less is not worth a line."""


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


def worth(
    found: Iterable[Finding], rounds: Sequence[Iterable[Finding]], total: float | None
) -> list[Finding]:
    """Those to tell, the most expensive first. The others cost too little, or only sometimes:
    `rounds` are the findings by the times of each round, of which three in four have to agree. What
    was to compute in few bits and does not counts even where floats are as fast.
    """
    least = WORTH * (total or 0.0)
    kept = []
    for one in found:
        if one.seconds is not None and one.kind != "float":
            costs = sorted(_seconds_of(one, each) for each in rounds)
            if one.seconds <= least or (costs and costs[len(costs) // 4] <= least / 2):
                continue
        kept.append(one)
    return sorted(kept, key=lambda one: -(one.seconds or 0.0))


def _seconds_of(one: Finding, found: Iterable[Finding]) -> float:
    same = (other for other in found if (other.kind, other.nodes) == (one.kind, one.nodes))
    return next((other.seconds or 0.0 for other in same), 0.0)


@dataclass
class _Island:
    """A node in floats, and the Q/DQ that stand around it because of that, or that only round."""

    node: str
    layer: Layer | None
    around: list[Layer] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    split: Layer | None = None  # that rounds what it gives, or is it, parted from a product
    extra: float = 0.0  # beyond what its nodes take in the other network
    there: str = ""  # what the other network makes of its nodes and those around it


class Diagnosis:
    """Compares two reports. Each second that the first spends more goes into one finding."""

    def __init__(
        self, graph: Graph, quantized: EngineReport, against: EngineReport, cures: Cures
    ) -> None:
        self.graph, self.cures = graph, cures
        first, second = quantized.profiles[0], against.profiles[0]
        self.report = quantized.of_profile(first)
        self.other = against.of_profile(second)
        self.timed = self.report.seconds is not None and self.other.seconds is not None
        self.placed = {id(one.layer): one for one in self.report.unfused_quantization}
        self.moved = {id(one.layer): one for one in self.report.reformats}
        self.homes = self._homes()

    def findings(self) -> list[Finding]:
        """All there are, the most expensive first; `worth` says which of them count."""
        islands = self._islands()
        found = [*self._borders(), *self._reformats(islands), *self._slower(islands)]
        found += self._told(islands)
        return sorted(found, key=lambda one: -(one.seconds or 0.0))

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

    def _homes(self) -> dict[str, Layer]:
        """The layer that computes each node: of a product the one that multiplies."""
        nameless = {
            tensor.name: layer
            for layer in self.report.layers
            if layer.contracts and not layer.nodes
            for tensor in layer.outputs
        }
        homes: dict[str, Layer] = {}
        for layer in self._computing():
            fed = next((nameless[one.name] for one in layer.inputs if one.name in nameless), None)
            for node in self._compute(layer.nodes):
                if not self.graph.contracts(node):
                    homes.setdefault(node, layer)
                elif layer.contracts or not layer.operations:
                    homes.setdefault(node, fed if fed is not None else layer)
        return homes

    def _islands(self) -> dict[str, _Island]:
        islands: dict[str, _Island] = {}

        def island(node: str) -> _Island:
            layer = self.homes.get(node)
            if layer is not None:
                node = self._main(layer, node)
            return islands.setdefault(node, _Island(node, layer))

        for product in filter(self.graph.contracts, self.graph.ops):
            if self._fell_back(product):
                island(product)
            elif (layer := self._rounding_after(product)) is not None:
                island(product).split = layer
        for node, layer in self.homes.items():
            alone = self._is_low(layer) and self._main(layer, node) == node
            if alone and self.cures.moved(node) is not None:
                island(node).split = layer
        for one in self.placed.values():
            if self._border(one):
                continue
            nodes = self._near(one.layer.nodes) or self._beside(one)
            if nodes:
                island(nodes[0]).around.append(one.layer)
        told = {node for one in self.placed.values() for node in one.layer.nodes}
        for node in self.report.idle_quantization:
            if node not in told and (nodes := self._near([node])):
                island(nodes[0]).idle.append(node)
        return islands

    def _main(self, layer: Layer, node: str) -> str:
        """The node that a layer is about: what multiplies matrices, else what was asked for."""
        known = [one for one in self._compute(layer.nodes) if self.homes.get(one) is layer]
        return next((one for one in known if self.graph.contracts(one)), node)

    def _near(self, nodes: Iterable[str]) -> list[str]:
        """Whom Q/DQ nodes of one layer are there for: a reader of floats, or who wrote them. Nodes
        in floats come first.
        """
        graph = self.graph
        own = graph.in_order(node for node in nodes if graph.quantizes(node))
        if not own:
            return []
        written = graph.rounded(own[0]) if graph.ops[own[0]] != DEQUANTIZE else None
        before = [written] if written is not None else []
        after = graph.readers(own[-1])
        while after and graph.quantizes(after[0]):
            after = graph.readers(after[0])
        gives_floats = all(graph.ops[node] == DEQUANTIZE for node in own)
        for side in [after, before] if gives_floats else [before, after]:
            known = [node for node in side if not graph.quantizes(node)]
            if known:
                return sorted(known, key=lambda node: not self._is_float(node))
        return []

    def _beside(self, one: Placement) -> list[str]:
        """The same by the layers around it, where the graph does not know the nodes."""
        near = [node for node in self._compute((*one.before, *one.after)) if node in self.homes]
        return sorted(near, key=lambda node: not self._is_float(node))

    def _is_float(self, node: str) -> bool:
        layer = self.homes.get(node)
        return layer is not None and not self._is_low(layer)

    def _fell_back(self, node: str) -> bool:
        """Whether a product of quantized operands is computed in floats."""
        layer = self.homes.get(node)
        asked = self.graph.contracts(node) and self.graph.is_quantized(node)
        return asked and layer is not None and bool(layer.inputs) and not self._is_low(layer)

    def _rounding_after(self, product: str) -> Layer | None:
        """The layer that rounds what a product in few bits gave in floats, and is not only that."""
        home = self.homes.get(product)
        if home is None or not self.graph.is_quantized(product):
            return None
        quantizer = self.cures.behind(product).quantizer
        if quantizer in home.nodes or all(one.dtype not in FLOATS for one in home.outputs):
            return None
        return next((one for one in self._computing() if quantizer in one.nodes), None)

    def _border(self, one: Placement) -> str:
        """Where a layer only quantizes what the network is given, or dequantizes what it gives."""
        if not any(map(self.graph.quantizes, one.layer.nodes)):
            # The engine's own: it may quantize what an operator gives, instead of what it reads.
            given = {tensor.name for tensor in self.report.inputs}
            gives = {tensor.name for tensor in self.report.outputs}
            first = bool(one.before) and given.issuperset(one.before)
            last = bool(one.after) and gives.issuperset(one.after)
            return "input" if first else "output" if last else ""
        sides = {self.graph.at_border(node) for node in one.layer.nodes}
        kinds = {tensor.dtype in LOW for tensor in (*one.layer.inputs, *one.layer.outputs)}
        return next(filter(None, sides), "") if kinds != {False} or len(sides) == 1 else ""

    # What it costs

    def _seconds(self, layers: Iterable[Layer]) -> float:
        return math.fsum(layer.seconds or 0.0 for layer in layers)

    def _cost(self, seconds: float) -> float | None:
        return seconds if self.timed else None

    def _slower(self, islands: Mapping[str, _Island]) -> Iterator[Finding]:
        """Groups of nodes that take longer here than there: a group is what shares layers."""
        if not self.timed:
            return
        for nodes, ours, theirs in self._groups():
            inside = [
                one
                for one in islands.values()
                if one.node in nodes or any(one.layer is layer for layer in ours)
            ]
            for one in inside:
                if one.split is not None:
                    rest = [layer for layer in theirs if not self._multiplies(layer)]
                    one.extra = max(0.0, (one.split.seconds or 0.0) - self._seconds(rest))
            extra = self._seconds(ours) - self._seconds(theirs)
            if self._seconds(ours) < SLOWER * self._seconds(theirs):
                continue
            if inside:
                # It is slower because of them; the one that takes longest answers for the group.
                chosen = max(inside, key=lambda one: one.layer.seconds or 0.0 if one.layer else 0.0)
                chosen.extra = max(chosen.extra, extra)
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

    def _multiplies(self, layer: Layer) -> bool:
        return layer.contracts or (
            not layer.operations and any(map(self.graph.contracts, layer.nodes))
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
        for names, ours, others in groups.values():
            if ours and others:
                yield self.graph.in_order(names), ours, others

    def _precisions(self, layers: Iterable[Layer], report: EngineReport | None = None) -> str:
        report = report or self.report
        found = dict.fromkeys(filter(None, map(report.precision, layers)))
        return " and ".join(found) or "unknown types"

    # What it is, and what would help

    def _told(self, islands: Mapping[str, _Island]) -> Iterator[Finding]:
        """What one edit cures is one finding."""
        cured: dict[str, list[tuple[_Island, Cure]]] = {}
        for one in islands.values():
            cure = self._cure(one)
            if cure is not None:
                cured.setdefault(cure.edit, []).append((one, cure))
        for edit, members in cured.items():
            yield self._finding(edit, members)

    def _cure(self, one: _Island) -> Cure | None:
        if one.around or one.idle or self._fell_back(one.node):
            return self.cures.of(one.node)
        if one.split is None:
            return None  # a float layer with nothing around it is as the graph wants it
        product = self.graph.contracts(one.node)
        return self.cures.of_split(one.node) if product else self.cures.moved(one.node)

    def _finding(self, edit: str, members: Sequence[tuple[_Island, Cure]]) -> Finding:
        graph = self.graph
        islands = [one for one, _ in members]
        nodes = graph.in_order(one.node for one in islands)
        fallen = list(filter(self._fell_back, nodes))
        around = [layer for one in islands for layer in one.around]
        own = dict.fromkeys(
            name
            for layer in around
            for name in [node for node in layer.nodes if graph.quantizes(node)]
            or [f"a {layer.kind} of the engine's own"]
        )
        idle = [node for one in islands for node in one.idle]
        split = [one.node for one in islands if one.split is not None]
        why = "".join(f": {one}" for one in dict.fromkeys(cure.why for _, cure in members) if one)
        parts = []
        if fallen:
            they = "their" if len(fallen) > 1 else "its"
            parts.append(f"{self._computes(fallen)}, although {they} operands are quantized{why}")
        if own:
            kernels = "have kernels of their own" if len(own) > 1 else "has a kernel of its own"
            rest = [node for node in nodes if node not in fallen]
            where = f" at {self._computes(rest, 'which ')}" if rest else ""
            parts.append(f"{listed(own)} {kernels}{where}")
        if idle:
            rounds = "rounds" if len(idle) == 1 else "round"
            parts.append(f"{listed(idle)} {rounds} numbers that are computed in float")
        if split and not parts:
            several, told = len(split) > 1, self._listed(split)
            if graph.contracts(split[0]):
                gives = "give" if several else "gives"
                parts.append(f"{told} {gives} floats, which a kernel of its own rounds")
            else:
                has = "have kernels of their own" if several else "has a kernel of its own"
                parts.append(f"{told} {has}")
        if not fallen:
            parts[-1] += why
        first = dict.fromkeys(cure.at for _, cure in members)
        seconds = self._seconds(around) + math.fsum(one.extra for one in islands)
        kind: Kind = "float" if fallen else "unfused" if own or split else "idle"
        return Finding(
            kind,
            tuple(dict.fromkeys((*first, *nodes, *filter(graph.quantizes, own), *idle))),
            "; ".join(parts) + "".join(one.there for one in islands),
            edit,
            # Rounding inside of other kernels cannot be timed.
            None if kind == "idle" and not seconds else self._cost(seconds),
        )

    def _computes(self, nodes: Sequence[str], which: str = "") -> str:
        """`Conv 'a' computes in float32`."""
        layers = [self.homes[node] for node in nodes if node in self.homes]
        found = dict.fromkeys(filter(None, map(self.report.precision, layers)))
        comma = ", " if which else " "
        computes = "computes" if len(nodes) == 1 else "compute"
        told = f"{comma}{which}{computes} in {' and '.join(found)}" if found else ""
        return self._listed(nodes) + told

    def _listed(self, nodes: Iterable[str]) -> str:
        return listed(map(self.graph.told, nodes))

    def _edit_of_slow(self, main: str, layers: Sequence[Layer]) -> str:
        if self.graph.ops[main] in MATRIX and _is_vector(layers):
            return f"keep {self.graph.told(main)} in float: its matrix is a vector"
        return self.cures.of_slow(main).edit

    def _borders(self) -> Iterator[Finding]:
        for one in self.placed.values():
            border = self._border(one)
            if not border:
                continue
            first = border == "input"
            beside = self._compute(one.after[:1] if first else one.before[-1:])
            nodes = one.layer.nodes or tuple(beside)
            where = f"{one.layer.kind} {'before' if first else 'behind'} " * (not one.layer.nodes)
            yield Finding(
                "border",
                nodes,
                f"{where}{listed(nodes)} {'quantizes the' if first else 'dequantizes the'} "
                f"network's {border}",
                "nothing, unless the network may "
                + ("take" if first else "give")
                + f" integers: then cut {'it' if len(nodes) == 1 else 'them'} off",
                self._cost(one.layer.seconds or 0.0),
            )

    def _reformats(self, islands: Mapping[str, _Island]) -> Iterator[Finding]:
        # What is one layer there may be several here: the same place has one name.
        heads = {
            node: next(filter(self.graph.contracts, same), same[0])
            for layer in self.other.layers
            if (same := self._compute(layer.nodes))
            for node in same
        }
        there: dict[tuple[str, ...], float] = {}
        for one in self.other.reformats:
            spot = tuple(heads.get(node, node) for node in self._place(one))
            there[spot] = there.get(spot, 0.0) + (one.layer.seconds or 0.0)
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
            saved = there.pop(tuple(heads.get(node, node) for node in place), None)
            if saved is not None and not self.timed:
                continue
            seconds = (one.layer.seconds or 0.0) - (saved or 0.0)
            both = " and ".join(filter(None, place))
            where = f"between {both}" if before and after else f"at {both}" if both else ""
            nodes = tuple(node for node in place if node in self.graph.ops)
            beside = next((node for node in nodes if node in floats), None)
            if len(nodes) < 2 or all(node in floats for node in nodes):
                beside = None
            home = self.homes.get(beside or "")
            own = next((one for one in islands.values() if home and one.layer is home), None)
            if own is not None:
                edit = self.cures.of(own.node).edit
            elif beside is not None:
                edit = f"quantize {self.graph.told(beside)} too, so that the layout can stay"
            elif len(nodes) < 2:
                edit = "nothing: the network's inputs and outputs have a layout of their own"
            else:
                edit = f"nothing: {listed(nodes)} have kernels of different layouts"
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
            near = self.graph.nearest(nodes[place], back=last) if nodes else ""
            if near in self.homes:
                return self._main(self.homes[near], near)
            # Engines have names of their own for what they put in between.
            return near if near in self.graph.inputs | self.graph.outputs else ""

        return main(one.before, True), main(one.after, False)


def _is_vector(layers: Sequence[Layer]) -> bool:
    for layer in layers:
        for tensor in layer.outputs:
            if tensor.shape and math.prod(tensor.shape[:-1]) == 1:
                return True
    return False


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
