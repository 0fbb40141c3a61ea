"""TensorRT's own accounts of an engine's layers, read into an EngineReport.

Two tell: the EngineInspector as JSON, which needs a GPU, and the builder's verbose log, which does
not. Both come in two schemas. Up to 10.x and RTX 1.4 a tensor has one text for type and layout and
the network's tensors are a list of names; since 11 and RTX 1.5 these are fields of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from unirt import BackendError, EngineReport, Layer, LayerTensor

INSPECTOR, BUILDER = "engine inspector", "builder log"

NAMES_ONLY = (
    "TensorRT tells names only, not what is fused into a layer; build with verbosity=detailed."
)

# As TensorRT writes types, alone or inside a text about the layout. Longer words come first.
DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "fp8": "float8_e4m3fn",
    "fp4": "float4_e2m1fn",
    "e8m0": "float8_e8m0fnu",
    "uint8": "uint8",
    "int64": "int64",
    "int32": "int32",
    "int8": "int8",
    "int4": "int4",
    "bool": "bool",
}
_DTYPE = re.compile(rf"\b({'|'.join(DTYPES)})\b", re.IGNORECASE)

# What RTX calls its kernels after: the first letters of what they do, one after the other.
OPERATIONS = {
    "Addr": "add",
    "Attn": "attention",
    "Conc": "concat",
    "Conv": "convolution",
    "Corr": "convolution",
    "Fc": "matmul",
    "Gath": "gather",
    "Gemm": "matmul",
    "Matm": "matmul",
    "Maxr": "max",
    "Minr": "min",
    "Padd": "pad",
    "Repl": "broadcast",
    "Resh": "reshape",
    "Roun": "round",
    "Sele": "select",
    "Sigm": "sigmoid",
    "Slic": "slice",
    "Tran": "transpose",
}
KINDS = {"gemm": ("matmul",), "correlation": ("convolution",)}
_KERNEL = re.compile(r"__myl_((?:[A-Z][a-z0-9]*)+)(?:_|$)")

_PROFILE = re.compile(r" \[profile (\d+)\]")
_REGION = re.compile(r"_myl(\d+)(?:_\d+)?$")

NODE = "[ONNX Layer: "
# Items stand next to each other in the log, and behind control characters in JSON.
_NODE_END = re.compile(r"\][\x1e\x1f\s]*(?:\[[A-Z][A-Za-z ]*: .*)?$", re.DOTALL)
_NESTED = re.compile(r" \([^()]*\)$")


def from_inspector(text: str | bytes, graph: Mapping[str, str]) -> EngineReport:
    """The report in the inspector's JSON. Raises BackendError where that cannot be read."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    try:
        # Names and metadata hold control characters as they are.
        document = json.loads(text, strict=False)
        layers, around = _top(document)
        listed = [_json_layer(one, graph) for one in layers]
    except (ValueError, TypeError, RecursionError) as error:
        raise BackendError(
            "TensorRT's account of this engine's layers cannot be read.",
            f"{type(error).__name__}: {error}",
            "Please report it with the version of TensorRT; the engine itself runs.",
            backend="tensorrt",
        ) from error
    border = around.get("I/O Tensors", around.get("Bindings")) or []
    return _report(listed, _borders(_objects(border)), INSPECTOR, graph)


def tells_layers(message: str) -> bool:
    """Whether `from_builder_log` has a use for what a builder logged."""
    return message.startswith((LAYERS, NAMED_LAYERS)) or _METADATA.match(message) is not None


def from_builder_log(messages: Iterable[str], graph: Mapping[str, str]) -> EngineReport | None:
    """The report in what a builder logged, the last engine's; None where it tells no layers."""
    found = names = None
    metadata: dict[str, str] = {}
    for message in messages:
        if message.startswith(LAYERS):
            found = message
        elif message.startswith(NAMED_LAYERS):
            names = message
        elif match := _METADATA.match(message):
            metadata[match["name"]] = match["metadata"]
    if found is not None:
        return _from_layers(found, graph)
    if names is not None:
        return _from_names(names, metadata, graph)
    return None


# --- JSON ----------------------------------------------------------------------------------------


def _top(document: Any) -> tuple[list[Any], Mapping[str, Any]]:
    """The layers, and the object around them."""
    if isinstance(document, list):
        if len(document) == 1 and isinstance(document[0], dict) and "Layers" in document[0]:
            return _top(document[0])
        return document, {}
    if isinstance(document, dict):
        layers = document.get("Layers")
        if isinstance(layers, list):
            return layers, document
        if "Name" in document:
            return [document], {}
        for value in document.values():
            if isinstance(value, dict) and isinstance(value.get("Layers"), list):
                return _top(value)
    raise TypeError("there is no list of layers in it")


def _json_layer(one: Any, graph: Mapping[str, str]) -> Layer:
    if isinstance(one, str):
        return _named_layer(one, graph)
    if not isinstance(one, dict):
        raise TypeError(f"a layer is {type(one).__name__}")
    return _layer(one, graph)


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """Tensors as objects, whether they come so or as names."""
    listed = value if isinstance(value, list) else []
    return [one if isinstance(one, dict) else {"Name": one} for one in listed]


# --- one layer, from whichever source ------------------------------------------------------------


def _layer(fields: Mapping[str, Any], graph: Mapping[str, str]) -> Layer:
    name, kind = str(fields.get("Name", "")), str(fields.get("LayerType", ""))
    kind = _kind(name, kind)
    inputs, outputs, constants = (
        tuple(map(_tensor, _objects(fields.get(key)))) for key in ("Inputs", "Outputs", "Constants")
    )
    tactic = str(fields.get("TacticName") or fields.get("TacticValue") or "")
    if "Metadata" in fields:
        nodes = _nodes(str(fields["Metadata"] or ""), graph)
    else:
        nodes = _nodes_of_name(name, graph)
    return Layer(
        name,
        kind,
        nodes,
        inputs,
        outputs,
        # What a builder without a GPU writes where a library's kernel is chosen later.
        "" if tactic == "__myelin_CASK_STUB" else tactic,
        constants=constants,
        operations=_operations(name, kind, len(inputs)),
        profile=_profile([name, *(str(one.get("Name", "")) for one in _tensors_of(fields))]),
    )


def _named_layer(name: str, graph: Mapping[str, str]) -> Layer:
    return Layer(name, _kind(name, ""), _nodes_of_name(name, graph), profile=_profile([name]))


def _kind(name: str, told: str) -> str:
    """A foreign node is what TensorRT's compiler turns into layers, not a layer."""
    return "region" if name.startswith("{ForeignNode[") else told


def _tensors_of(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in ("Inputs", "Outputs", "Constants"):
        yield from _objects(fields.get(key))


def _tensor(fields: Mapping[str, Any]) -> LayerTensor:
    text = str(fields.get("Format") or "")
    dtype = str(fields.get("Datatype") or fields.get("DataType") or "")
    both = str(fields.get("Format/Datatype") or "")
    if both:
        match = _DTYPE.search(both)
        dtype, text = (match[0], both) if match else (both, "")
    return LayerTensor(
        _PROFILE.sub("", str(fields.get("Name", ""))),
        DTYPES.get(dtype.casefold(), dtype),
        _sizes(fields.get("Dimensions")),
        _layout(text),
    )


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = [int(size) for size in re.findall(r"-?\d{1,18}", value)]
    listed = value if isinstance(value, list) else []
    return tuple(int(size) if isinstance(size, int) else -1 for size in listed)


def _layout(text: str) -> str:
    """`(NHWC) Channel major format` is NHWC; older texts lose the type and keep the rest."""
    text = text.strip().rstrip(".")
    if text.startswith("(") and ")" in text:
        return text[1 : text.index(")")]
    text = re.sub(r"\(k([A-Z0-9]+)\)$", r"", _DTYPE.sub("", text))
    text = re.sub(r"\bformat\b", "", text)
    return " ".join(text.split())


def _nodes(metadata: str, graph: Mapping[str, str]) -> tuple[str, ...]:
    """The nodes that metadata lists, in the graph's order, each once."""
    names = [_node(_NODE_END.sub("", item)) for item in metadata.split(NODE)[1:]]
    return _ordered(dict.fromkeys(_known(name, graph) for name in names), graph)


def _known(name: str, graph: Mapping[str, str]) -> str:
    """RTX puts words behind the bracket where it made one operator of another."""
    before = name.rpartition("]")[0]
    return before if name not in graph and before in graph else name


def _node(text: str) -> str:
    """`inner | block (Function)` stands for a node inside a function's."""
    if " | " not in text:
        return text
    inner, *around = text.split(" | ")
    return " > ".join([*(_NESTED.sub("", one) for one in reversed(around)), inner])


def _ordered(names: Iterable[str], graph: Mapping[str, str]) -> tuple[str, ...]:
    places = {name: place for place, name in enumerate(graph)}
    return tuple(
        sorted(names, key=lambda name: places.get(name.split(" > ")[0], len(places)))
        if places
        else names
    )


def _nodes_of_name(name: str, graph: Mapping[str, str]) -> tuple[str, ...]:
    """The graph's nodes that a name is put together from: `conv1 + relu1`, `PWN(a, b)`.

    Names that span nodes (`{ForeignNode[first...last]}`) say nothing of what is between.
    """
    plain = _PROFILE.sub("", name)
    if plain in graph:
        return (plain,)
    parts = re.split(r" \+ |\+|, ", plain)
    stripped = (re.sub(r"^(?:PWN\()+|\)+$", "", part) for part in parts)
    return _ordered(dict.fromkeys(part for part in stripped if part in graph), graph)


def _operations(name: str, kind: str, inputs: int) -> tuple[str, ...]:
    match = _KERNEL.match(name)
    if match:
        words = re.findall(r"[A-Z][a-z0-9]*", match[1])
        known = [OPERATIONS.get(word, word.casefold()) for word in words]
        # Channels filled up to what a kernel wants: there is nothing else to join.
        return tuple("pad" if one == "concat" and inputs == 1 else one for one in known)
    if "_mha" in name and name.startswith("_"):
        return ("attention",)
    return KINDS.get(kind, ())


def _profile(names: Iterable[str]) -> int:
    for name in names:
        match = _PROFILE.search(name)
        if match:
            return int(match[1])
    return 0


def _report(
    layers: Sequence[Layer],
    border: tuple[tuple[LayerTensor, ...], tuple[LayerTensor, ...]],
    source: str,
    graph: Mapping[str, str],
) -> EngineReport:
    # Only some layers of a region bear the mark of its profile.
    regions = {
        region[1]: layer.profile
        for layer in layers
        if layer.profile and (region := _REGION.search(layer.name))
    }
    placed = tuple(
        replace(layer, profile=regions.get(region[1], layer.profile))
        if (region := _REGION.search(layer.name))
        else layer
        for layer in layers
    )
    told = any(layer.inputs or layer.outputs for layer in placed)
    notes = () if told and not any(layer.kind == "region" for layer in placed) else (NAMES_ONLY,)
    return EngineReport(placed, source, dict(graph), *border, notes=notes)


def _borders(
    tensors: Iterable[Mapping[str, Any]],
) -> tuple[tuple[LayerTensor, ...], tuple[LayerTensor, ...]]:
    """The network's inputs and outputs. Old schemas list names without saying which is which."""
    inputs, outputs = [], []
    for fields in tensors:
        mode = str(fields.get("IOMode", "")).casefold()
        if mode != "output":
            inputs.append(_tensor(fields))
        if mode != "input":
            outputs.append(_tensor(fields))
    return tuple(inputs), tuple(outputs)


# --- the builder's log ---------------------------------------------------------------------------

# `Layers:` has one line for each layer and each of the network's tensors:
#
#     line   = field {", " field}        field = KEY ": " value
#     value  = text | "[" sizes "]" | "[" [object {"," object}] "]"
#     object = " { " field {", " field} " }"
#
# Names are not quoted and may hold any of these characters, so a name reaches up to the key that
# follows a name, and any other value up to the next key.
_KEY = re.compile(r"([A-Z][A-Za-z/]*): ?")
_NEXT_KEY = re.compile(r", (?=[A-Z][A-Za-z/]*: ?)")
_AFTER_NAME = re.compile(r", (?=(?:LayerType|Location|Dimensions|Format/Datatype|IOMode): ?)")
_OBJECT_END = re.compile(r"\s*\}(?=\s*[,\]])")

LAYERS, NAMED_LAYERS = "Layers:", "Engine Layer Information:"
_METADATA = re.compile(r"ForeignNode (?P<name>\{.*?\]\}) metadata: (?P<metadata>.*)", re.DOTALL)


class _Reader:
    """Reads one line of fields from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fields(self, *, inside: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while key := _KEY.match(self.text, self.at):
            self.at = key.end()
            found.setdefault(key[1], self._value(key[1], inside))
            if not self.text.startswith(", ", self.at):
                break
            self.at += 2
        return found

    def _value(self, key: str, inside: bool) -> Any:
        if key != "Name" and re.match(r"\[ ?[{\]]", self.text[self.at : self.at + 3]):
            return self._objects()
        # Nothing but nodes follows Metadata, and their names may look like keys.
        if key == "Metadata" and not inside:
            return self._until(len(self.text))
        stop = (_AFTER_NAME if key == "Name" else _NEXT_KEY).search(self.text, self.at)
        end = stop.start() if stop else len(self.text)
        if inside and key != "Name":
            closing = _OBJECT_END.search(self.text, self.at)
            end = min(end, closing.start() if closing else end)
        return self._until(end)

    def _until(self, end: int) -> str:
        start, self.at = self.at, end
        return self.text[start:end].strip()

    def _objects(self) -> list[dict[str, Any]]:
        self.at += 1
        found = []
        while opening := re.compile(r",?\s*\{\s*").match(self.text, self.at):
            self.at = opening.end()
            found.append(self.fields(inside=True))
            closing = _OBJECT_END.match(self.text, self.at)
            if closing is None:
                break
            self.at = closing.end()
        closing = re.compile(r"\s*\]").match(self.text, self.at)
        self.at = closing.end() if closing else self.at
        return found


def _from_layers(message: str, graph: Mapping[str, str]) -> EngineReport:
    layers: list[Layer] = []
    border: list[Mapping[str, Any]] = []
    section = ""
    for line in message.splitlines():
        if line.rstrip() in ("Layers:", "I/O Tensors:", "Bindings:", "Engine Metadata:"):
            section = line.rstrip()
        elif not line.strip():
            continue
        elif section == "Layers:":
            is_object = line.startswith("Name: ")
            layers.append(
                _layer(_Reader(line).fields(), graph) if is_object else _named_layer(line, graph)
            )
        elif section == "I/O Tensors:":
            border.append(_Reader(line.strip()).fields())
        elif section == "Bindings:":
            border.append({"Name": line})
    return _report(layers, _borders(border), BUILDER, graph)


_NAMED = re.compile(
    r"Layer\((?P<kind>[^)]*)\): (?P<name>.*?), Tactic: (?P<tactic>0x[0-9a-f]+)"
    r"[^,]*, (?P<inputs>.*) -> (?P<outputs>.*)"
)
_NAMED_TENSOR = re.compile(r"(?:^|, )(.*?) ?\(([A-Za-z0-9]+)\[([-\d,]*)\][^)]*\)|(?:^|, )([^,(]+)$")


def _from_names(
    message: str, metadata: Mapping[str, str], graph: Mapping[str, str]
) -> EngineReport | None:
    """What the builder tells at any verbosity: its layers before the compiler merges them."""
    layers = []
    for line in message.splitlines()[1:]:
        match = _NAMED.match(line)
        if match is None:
            continue
        name = match["name"]
        told = metadata.get(_PROFILE.sub("", name))
        nodes = _nodes_of_name(name, graph) if told is None else _nodes(told, graph)
        inputs, outputs = (
            tuple(
                LayerTensor(
                    _PROFILE.sub("", one[1]), DTYPES.get(one[2].casefold(), one[2]), _sizes(one[3])
                )
                for one in _NAMED_TENSOR.finditer(match[side])
                if one[1] is not None
            )
            for side in ("inputs", "outputs")
        )
        tactic = match["tactic"] if int(match["tactic"], 16) else ""
        layers.append(
            Layer(
                name,
                _kind(name, match["kind"]),
                nodes,
                inputs,
                outputs,
                tactic,
                profile=_profile([name]),
            )
        )
    if not layers:
        return None
    return _report(layers, ((), ()), BUILDER, graph)
