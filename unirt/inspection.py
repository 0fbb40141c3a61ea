"""What an engine made of a graph: its layers, the graph's nodes fused into each, and their cost.

Backends fill in `EngineReport`; everything that is concluded from the layers is concluded here, the
same way for every engine. All values are immutable and may be shared between threads; times are
seconds; sizes in shapes are -1 where they are only known when the engine runs.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from unirt.errors import DataError

# What only changes how numbers are stored or ordered, as engines call it in kinds and operations.
MOVEMENT = frozenset(
    {"move", "copy", "cast", "transpose", "reshape", "reformat", "shuffle", "concat", "pad"}
    | {"identity", "noop", "reorder", "reorderinput", "reorderoutput"}
    | {"convert", "memcpytohost", "memcpyfromhost"}
)
# Nodes that ask for just that.
MOVING_NODES = frozenset(
    {"Cast", "CastLike", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
    | {"Concat", "Pad", "DepthToSpace", "SpaceToDepth"}
)
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
QUANTIZING_KINDS = frozenset({"quantize", "dequantize", "quantizelinear", "dequantizelinear"})
# What multiplies matrices, and so has a precision of its own.
CONTRACTIONS = frozenset({"convolution", "deconvolution", "matmul", "attention"})
CONTRACTING = re.compile(
    r"conv(?!ert)|gemm|matmul|fully_?connected|einsum|attention|correlation", re.IGNORECASE
)

BYTES = frozenset({"int8", "uint8"})
"""They multiply each other: activations are often the one, weights the other."""

LOW = (
    "float4_e2m1fn",
    "int4",
    "uint4",
    "int8",
    "uint8",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
FLOATS = ("float16", "bfloat16", "float32", "float64")  # the widest last

NESTED = " > "
"""Between the names of nodes that stand inside each other: `block1 > matmul` in a function."""

REGION = "region"
"""The kind of a layer that stands for a part of the graph whose layers the engine does not tell."""

CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})

FEW = 6
"""Up to so many nodes are named in a sentence; more are counted by their operators."""

FORMAT = 1  # of `to_dict`


@dataclass(frozen=True)
class LayerTensor:
    """A tensor as one layer reads or writes it.

    `dtype` is UniRT's name (`float16`, `float8_e4m3fn`) or the engine's own text where it has none;
    `format` is the engine's word for the layout in memory, "" where it tells none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    format: str = ""

    def __str__(self) -> str:
        return f"{self.dtype} {self.format}".strip()


@dataclass(frozen=True)
class Layer:
    """One step of an engine.

    `nodes` are the names of the graph's nodes computed here, in the graph's order; a node may be
    spread over several layers. `kind` (but for `REGION`) and `tactic` are the engine's own words,
    `operations` what the layer does one after the other, where the engine tells. `constants` are
    weights and scales. An engine built for several shape profiles has layers for each: `profile`
    counts them. `seconds` is the time measured for one run, None where none was.
    """

    name: str
    kind: str
    nodes: tuple[str, ...] = ()
    inputs: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    tactic: str = ""
    seconds: float | None = None
    constants: tuple[LayerTensor, ...] = ()
    operations: tuple[str, ...] = ()
    profile: int = 0

    @property
    def moves_only(self) -> bool:
        """Whether it computes nothing: it changes type, format or order only."""
        if self.operations:
            return MOVEMENT.issuperset(self.operations)
        return self.kind.casefold() in MOVEMENT

    @property
    def contracts(self) -> bool:
        """Whether it multiplies matrices, as far as its operations or else its kind tell."""
        if self.operations:
            return not CONTRACTIONS.isdisjoint(self.operations)
        return CONTRACTING.search(self.kind) is not None


@dataclass(frozen=True)
class Placement:
    """A layer, and where it stands.

    `before` and `after` are the nodes of the nearest layers around it that have any, or the
    network's inputs and outputs. `inserted` says that no node of the graph asks for what it does.
    """

    layer: Layer
    before: tuple[str, ...]
    after: tuple[str, ...]
    inserted: bool

    @property
    def change(self) -> str:
        """`float32 Linear → float16 NHWC`; one side where both are equal."""
        sides = [
            " + ".join(dict.fromkeys(str(tensor) for tensor in tensors))
            for tensors in (self.layer.inputs, self.layer.outputs)
        ]
        return " → ".join(dict.fromkeys(side for side in sides if side))

    @property
    def where(self) -> str:
        """`between conv1 and relu1`: the nearest node on each side."""
        before, after = "".join(self.before[-1:]), "".join(self.after[:1])
        if before and after:
            return f"between {before} and {after}"
        return f"after {before}" if before else f"before {after}" if after else ""


@dataclass(frozen=True)
class EngineReport:
    """The layers of one engine, in the order in which they run.

    `source` says who told: "engine inspector" or "builder log". `graph` maps the names of the
    graph's nodes to their operators, in the graph's order, and may be empty. `inputs` and `outputs`
    are the network's. `unmatched` are measured times of which nobody knows the layer. `notes` are
    sentences for the user about what is missing here. `facts` are what an engine file says of
    itself besides, such as its version and profiles.
    """

    layers: tuple[Layer, ...]
    source: str
    graph: Mapping[str, str] = field(default_factory=dict, hash=False)
    inputs: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    unmatched: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict, hash=False, compare=False)

    @property
    def profiles(self) -> tuple[int, ...]:
        """The shape profiles that have layers."""
        return tuple(sorted({layer.profile for layer in self.layers})) or (0,)

    def of_profile(self, profile: int) -> EngineReport:
        """The same with the layers of one shape profile only."""
        return replace(self, layers=tuple(one for one in self.layers if one.profile == profile))

    # What became of the nodes

    @property
    def fused(self) -> tuple[Layer, ...]:
        """Layers that compute more than one node."""
        return tuple(
            layer for layer in self.layers if len(layer.nodes) > 1 and layer.kind != REGION
        )

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Nodes that appear in no layer: folded into constants, or with nothing to compute."""
        seen = {
            part for layer in self.layers for node in layer.nodes for part in (node, *_path(node))
        }
        # Loops and branches are there as what is inside them.
        return tuple(
            node for node, op in self.graph.items() if node not in seen and op not in CONTROL_FLOW
        )

    @property
    def node_count(self) -> int:
        """The graph's nodes, or where the graph is not known, those that layers name."""
        named = {node for layer in self.layers for node in layer.nodes}
        return len(self.graph) or len(named)

    @cached_property
    def reformats(self) -> tuple[Placement, ...]:
        """Layers that compute nothing, but change the type, format or order of a tensor."""
        return tuple(self._place(layer) for layer in self.layers if self._reformats(layer))

    @cached_property
    def unfused_quantization(self) -> tuple[Placement, ...]:
        """Layers that do nothing but quantize or dequantize."""
        return tuple(self._place(layer) for layer in self.layers if self._only_quantizes(layer))

    @cached_property
    def idle_quantization(self) -> tuple[str, ...]:
        """Q/DQ nodes whose layers hold no low-precision tensor at all: they round numbers and
        speed nothing up. Only told where the engine tells what its layers do.
        """
        layers: dict[str, list[Layer]] = {}
        for layer in self.layers:
            for node in layer.nodes:
                if self._quantizing(node):
                    layers.setdefault(node, []).append(layer)
        return tuple(node for node, found in layers.items() if all(map(_all_float, found)))

    @cached_property
    def precisions(self) -> Mapping[str, int]:
        """How many layers compute in each dtype, the most frequent first.

        A layer computes in a low precision where it multiplies two tensors of it, else in the
        widest float that it reads. Layers that only reformat or quantize do not count.
        """
        counts = Counter(
            dtype
            for layer in self.layers
            if not (self._reformats(layer) or self._only_quantizes(layer))
            and (dtype := self.precision(layer))
        )
        return dict(counts.most_common())

    def precision(self, layer: Layer) -> str:
        """The dtype that a layer computes in; "" where it reads nothing, or is not told."""
        read = [tensor.dtype for tensor in layer.inputs]
        if not read or layer.kind == REGION:
            return ""
        operands = Counter(read)
        operands.update(one.dtype for one in layer.constants if len(one.shape) > 1)
        if layer.contracts or (
            not layer.operations
            and any(CONTRACTING.search(self.op_type(node)) for node in layer.nodes)
        ):
            for low in LOW:
                # An engine may not tell its weights.
                alone = len(read) == 1 and not layer.constants
                pairs = BYTES if low in BYTES else {low}
                if low in read and (sum(operands[one] for one in pairs) > 1 or alone):
                    return low
        for dtypes in (read, [tensor.dtype for tensor in layer.outputs]):
            for wide in reversed(FLOATS):
                if wide in dtypes:
                    return wide
        return read[0]

    def op_type(self, node: str) -> str:
        """The node's operator; "" where the graph does not say."""
        return self.graph.get(node) or self.graph.get(_path(node)[-1], "")

    # Time

    @property
    def seconds(self) -> float | None:
        """The sum of all measured times, those of unknown layers included; None without any."""
        times = [layer.seconds for layer in self.layers if layer.seconds is not None]
        times += [seconds for _, seconds in self.unmatched]
        return math.fsum(times) if times else None

    def with_times(self, pairs: Iterable[tuple[str, float]]) -> EngineReport:
        """The same with times (layer name, seconds) in place of those it has.

        A name that several layers have goes to them in turn, and several times of one layer add up.
        A name that differs in punctuation, or was cut off, goes to the one layer it can mean. What
        fits no layer stays in `unmatched`. Raises DataError for a time that is no number.
        """
        waiting: dict[str, list[float]] = {}
        for name, seconds in pairs:
            if not _is_number(seconds):
                raise _damaged(f"the time of {name!r} is {seconds!r}")
            waiting.setdefault(str(name), []).append(float(seconds))
        by_name: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            by_name.setdefault(layer.name, []).append(index)
        times: dict[int, float] = {}
        for name, layer_name in _matches(waiting, by_name):
            indices = by_name[layer_name]
            for turn, seconds in enumerate(waiting.pop(name)):
                index = indices[turn % len(indices)]
                times[index] = times.get(index, 0.0) + seconds
        layers = tuple(
            replace(layer, seconds=times.get(index)) for index, layer in enumerate(self.layers)
        )
        unmatched = tuple((name, one) for name, found in waiting.items() for one in found)
        return replace(self, layers=layers, unmatched=unmatched)

    # To be read, and to be kept

    def findings(self, most: int | None = None) -> list[tuple[str, str]]:
        """What there is to know as (topic, text), at most `most` lines of each topic."""
        found: list[tuple[str, str]] = []
        for profile in self.profiles:
            part = self.of_profile(profile) if len(self.profiles) > 1 else self
            if part is not self:
                found.append((f"profile {profile}", ""))
            found += part._findings(most)
        found += [
            ("time", f"{seconds * 1e6:.1f} µs in {name}, which is no layer here")
            for name, seconds in self.unmatched
        ]
        found += [("note", note) for note in self.notes]
        return found

    def _findings(self, most: int | None) -> Iterator[tuple[str, str]]:
        yield (
            "layers",
            f"{_count(self.node_count, 'node')} → {_count(len(self.layers), 'layer')} "
            f"({self.source})",
        )
        fusions = Counter(self._recipe(layer) for layer in self.fused)
        regions = [layer for layer in self.layers if layer.kind == REGION]
        lists: list[tuple[str, list[str]]] = [
            (REGION, [f"{_count(len(one.nodes), 'node')} in {one.name}" for one in regions]),
            (
                "fused",
                [
                    f"{recipe} ({_count(n, 'layer')})" if n > 1 else recipe
                    for recipe, n in fusions.most_common()
                ],
            ),
            (
                "reformat",
                [
                    *(f"inserted {_told(one)}" for one in self.reformats if one.inserted),
                    *(
                        f"{self._recipe(one.layer)} {_told(one)}"
                        for one in self.reformats
                        if not one.inserted
                    ),
                ],
            ),
            (
                "unfused Q/DQ",
                [f"{', '.join(one.layer.nodes)} {_told(one)}" for one in self.unfused_quantization],
            ),
            ("idle Q/DQ", [f"{node}: computed in float" for node in self.idle_quantization]),
        ]
        for topic, lines in lists:
            shown = lines if most is None else lines[:most]
            yield from ((topic, line) for line in shown)
            if len(lines) > len(shown):
                yield topic, f"and {len(lines) - len(shown)} more"
        counts = ", ".join(
            f"{dtype} in {_count(n, 'layer')}" for dtype, n in self.precisions.items()
        )
        if counts:
            yield "precision", counts
        if self.missing:
            ops = Counter(self.graph[node] for node in self.missing)
            yield (
                "in no layer",
                ", ".join(self.missing)
                if len(self.missing) <= FEW
                else ", ".join(f"{op} {n:,}" for op, n in ops.most_common()),
            )

    def summary(self) -> str:
        """All findings, one on each line."""
        return "\n".join(f"{topic}: {text}" if text else topic for topic, text in self.findings())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it; `from_dict` reads it."""
        whole = {"format": FORMAT, **asdict(self), "graph": dict(self.graph)}
        return {**whole, "facts": dict(self.facts)}

    @classmethod
    def from_dict(cls, document: object) -> EngineReport:
        """The report that `to_dict` wrote. Raises DataError for anything else."""
        try:
            whole = _mapping(document)
            if whole["format"] != FORMAT:
                raise TypeError(f"it has format {whole['format']!r}, not {FORMAT}")
            return cls(
                tuple(_layer(one) for one in _list(whole["layers"])),
                _text(whole["source"]),
                {_text(name): _text(op) for name, op in _mapping(whole["graph"]).items()},
                _tensors(whole["inputs"]),
                _tensors(whole["outputs"]),
                tuple((_text(name), _seconds(one)) for name, one in _list(whole["unmatched"])),
                tuple(map(_text, _list(whole["notes"]))),
                dict(_mapping(whole.get("facts", {}))),
            )
        except KeyError as error:
            raise _damaged(f"it has no {error}") from error
        except (TypeError, ValueError) as error:
            raise _damaged(str(error)) from error

    # How it is concluded

    def _quantizing(self, node: str) -> bool:
        op = self.op_type(node)
        # Exporters name a node after its operator; that is all there is without the graph.
        return op in (QUANTIZE, DEQUANTIZE) if op else QUANTIZE.casefold()[1:] in node.casefold()

    def _only_quantizes(self, layer: Layer) -> bool:
        if layer.kind.casefold() in QUANTIZING_KINDS:
            return True
        return bool(layer.nodes) and all(map(self._quantizing, layer.nodes))

    def _reformats(self, layer: Layer) -> bool:
        return layer.moves_only and not self._only_quantizes(layer)

    def _recipe(self, layer: Layer) -> str:
        return " + ".join(self.op_type(node) or _path(node)[-1] for node in layer.nodes)

    @cached_property
    def _producers(self) -> Mapping[tuple[int, str], list[Layer]]:
        found: dict[tuple[int, str], list[Layer]] = {}
        for layer in self.layers:
            for tensor in layer.outputs:
                found.setdefault((layer.profile, tensor.name), []).append(layer)
        return found

    @cached_property
    def _consumers(self) -> Mapping[tuple[int, str], list[Layer]]:
        found: dict[tuple[int, str], list[Layer]] = {}
        for layer in self.layers:
            for tensor in layer.inputs:
                found.setdefault((layer.profile, tensor.name), []).append(layer)
        return found

    def _place(self, layer: Layer) -> Placement:
        inserted = not any(self.op_type(node) in MOVING_NODES for node in layer.nodes)
        return Placement(layer, self._around(layer, back=True), self._around(layer), inserted)

    def _around(self, layer: Layer, *, back: bool = False) -> tuple[str, ...]:
        """The nodes next to a layer, looking through layers that have none."""
        links = self._producers if back else self._consumers
        border = {tensor.name for tensor in (self.inputs if back else self.outputs)}
        found: dict[str, None] = {}
        queue, seen = [layer], {id(layer)}
        while queue:
            current = queue.pop(0)
            for tensor in current.inputs if back else current.outputs:
                near = links.get((layer.profile, tensor.name), [])
                if tensor.name in border or not (near or border):
                    found[tensor.name] = None
                for other in near:
                    if id(other) in seen:
                        continue
                    seen.add(id(other))
                    if other.nodes:
                        found.update(dict.fromkeys(other.nodes))
                    else:
                        queue.append(other)
        return tuple(found)


# --- words ---------------------------------------------------------------------------------------


def _path(node: str) -> list[str]:
    return node.split(NESTED)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _told(one: Placement) -> str:
    return f"{one.where}: {one.change}" if one.where else one.change or one.layer.name


def _all_float(layer: Layer) -> bool:
    tensors = (*layer.inputs, *layer.outputs, *layer.constants)
    known = bool(layer.operations) and not layer.contracts
    return known and not any(tensor.dtype in LOW for tensor in tensors)


# --- names of layers and of times ----------------------------------------------------------------

SHORTEST_CUT = 8
"""Fewer letters than this are no name that was cut off."""


def _matches(names: Iterable[str], layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each name with the layer it means: equal, equal but for punctuation, or one cut off."""
    waiting, free = dict.fromkeys(names), dict.fromkeys(layers)
    for alike in (_equal, _same_letters, _cut_off):
        candidates = alike(list(waiting), list(free))
        wanted = Counter(layer for found in candidates.values() for layer in found)
        for name, found in candidates.items():
            if len(found) == 1 and wanted[found[0]] == 1:
                del waiting[name], free[found[0]]
                yield name, found[0]


def _equal(names: Sequence[str], layers: Sequence[str]) -> dict[str, list[str]]:
    return {name: [name] for name in set(names) & set(layers)}


def _same_letters(names: Sequence[str], layers: Sequence[str]) -> dict[str, list[str]]:
    by_letters = _by_letters(layers)
    return {name: by_letters.get(_letters(name), []) for name in names}


def _cut_off(names: Sequence[str], layers: Sequence[str]) -> dict[str, list[str]]:
    by_letters = _by_letters(layers)
    ordered = sorted(by_letters)
    found: dict[str, list[str]] = {}
    for name in names:
        key = _letters(name)
        if len(key) < SHORTEST_CUT:
            continue
        near = [key[:end] for end in range(SHORTEST_CUT, len(key)) if key[:end] in by_letters]
        for longer in ordered[bisect_left(ordered, key) :]:
            if not longer.startswith(key):
                break
            near.append(longer)
        found[name] = [layer for one in near if _cuts(one, key) for layer in by_letters[one]]
    return found


def _cuts(one: str, other: str) -> bool:
    """Whether the shorter is cut off between numbers: layer_1 is not layer_12 cut off."""
    short, long = sorted((one, other), key=len)
    return not (short[-1].isdigit() and long[len(short) : len(short) + 1].isdigit())


def _by_letters(layers: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for layer in layers:
        if letters := _letters(layer):
            found.setdefault(letters, []).append(layer)
    return found


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


# --- reading what was kept -----------------------------------------------------------------------


def _damaged(why: str) -> DataError:
    return DataError(
        "This is no report of an engine's layers.",
        f"{why[0].upper()}{why[1:]}." if why else "",
        "Build the engine again; its report is written beside it.",
    )


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]


def _layer(document: object) -> Layer:
    one = _mapping(document)
    seconds = one["seconds"]
    return Layer(
        _text(one["name"]),
        _text(one["kind"]),
        tuple(map(_text, _list(one["nodes"]))),
        _tensors(one["inputs"]),
        _tensors(one["outputs"]),
        _text(one["tactic"]),
        None if seconds is None else _seconds(seconds),
        _tensors(one["constants"]),
        tuple(map(_text, _list(one["operations"]))),
        _whole(one["profile"]),
    )


def _tensors(document: object) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(
            _text(one["name"]),
            _text(one["dtype"]),
            tuple(map(_whole, _list(one["shape"]))),
            _text(one["format"]),
        )
        for one in map(_mapping, _list(document))
    )


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"an object is expected where {type(value).__name__} stands")
    return value


def _list(value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"a list is expected where {type(value).__name__} stands")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is expected where {type(value).__name__} stands")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"a whole number is expected where {type(value).__name__} stands")
    return value


def _seconds(value: Any) -> float:
    if not _is_number(value):
        raise TypeError(f"seconds are expected where {value!r} stands")
    return float(value)
