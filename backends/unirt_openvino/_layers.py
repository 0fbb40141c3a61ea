"""The layers of a compiled model, as OpenVINO's runtime model and its performance counters tell."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from unirt import EngineReport, Layer, LayerTensor, ModelFile
from unirt_openvino._ports import dtype_of

SOURCE = "runtime model"
NO_ONNX = (
    "Nodes bear OpenVINO's names, since the onnx package is not installed to read the graph; "
    "pip install 'unirt[precision]'."
)

# What computes nothing when the model runs.
ENDS, CONSTANT = frozenset({"Input", "Output"}), "Const"

# What OpenVINO appends to the name of a node that it split.
_SPLIT = re.compile(r"/(WithoutBiases|Dequantization(Multiply|Subtract))$")
_COPY = re.compile(r"\.\d+$")  # to that of a node before which it converts types
PRODUCTS = {
    "Convolution": ("Conv",),
    "Deconvolution": ("ConvTranspose",),
    "FullyConnected": ("MatMul", "Gemm"),
    "MatMul": ("MatMul", "Gemm"),
}

# Its counters are averages in whole microseconds over all runs of a request: the difference of two
# averages leaves the first runs out, and rounding matters little after many.
WARM_UP, LEAST_RUNS, MOST_RUNS, SECONDS = 5, 20, 200, 1.0


def read_layers(compiled: Any, file: ModelFile, source_names: Mapping[str, str]) -> EngineReport:
    """The report of a compiled model. `source_names` are the operations of the model before it was
    compiled, name to type, for files whose graph cannot be read here.
    """
    source, notes = _source(file)
    graph, aliases, feeders = _graph(source) if source is not None else ({}, {}, {})
    if not graph:
        graph = dict(source_names)
    ops = list(compiled.get_runtime_model().get_ordered_ops())
    facts = {id_of(op): _facts(op) for op in ops}
    constant = _constants(ops, facts)
    tensors = {
        (id_of(op), index): _tensor(op, index, facts[id_of(op)], one)
        for op in ops
        for index, one in enumerate(op.outputs())
    }
    order = {name: place for place, name in enumerate(graph)}.__getitem__
    layers = []
    for op in ops:
        told = facts[id_of(op)]
        if told["layerType"] in ENDS or id_of(op) in constant:
            continue
        sources = [(one.get_source_output(), one) for one in op.inputs()]
        read = [
            (tensors[id_of(output.get_node()), output.get_index()], id_of(output.get_node()))
            for output, _ in sources
        ]
        kind = told["layerType"]
        copies = kind != "Convert"
        names = _names(told["originalLayersNames"], graph, aliases, copies=copies)
        names |= _product(kind, sorted(names, key=order), graph, feeders)
        layers.append(
            Layer(
                op.get_friendly_name(),
                kind,
                tuple(sorted(names, key=order)),
                tuple(one for one, owner in read if owner not in constant),
                tuple(tensors[id_of(op), index] for index in range(len(op.outputs()))),
                told["primitiveType"],
                constants=tuple(
                    one for one, owner in read if owner in constant and one.dtype != "dynamic"
                ),
            )
        )
    return EngineReport(
        tuple(layers),
        SOURCE,
        graph,
        tuple(tensors[id_of(op), 0] for op in ops if facts[id_of(op)]["layerType"] == "Input"),
        tuple(
            tensors[id_of(one.get_source_output().get_node()), one.get_source_output().get_index()]
            for op in ops
            if facts[id_of(op)]["layerType"] == "Output"
            for one in op.inputs()
        ),
        notes=notes,
    )


def measure(run: Callable[[], object], counters: Callable[[], Sequence[Any]]) -> dict[str, float]:
    """Seconds of each layer, the mean of at least 20 runs behind the first ones.

    `run` runs a request once, `counters` are its. What takes less than a microsecond is counted as
    not executed, and left out.
    """
    for _ in range(WARM_UP):
        run()
    before = _read(counters())
    runs, started = 0, time.perf_counter()
    while runs < LEAST_RUNS or (runs < MOST_RUNS and time.perf_counter() - started < SECONDS):
        run()
        runs += 1
    return {
        name: max(0.0, ((WARM_UP + runs) * mean - WARM_UP * before.get(name, 0.0)) / runs)
        for name, mean in _read(counters()).items()
    }


def _read(counters: Iterable[Any]) -> dict[str, float]:
    return {
        one.node_name: one.real_time.total_seconds()
        for one in counters
        if str(one.status).endswith("EXECUTED")
    }


def operations(model: Any) -> dict[str, str]:
    """What stands in a model that is not compiled yet, by name."""
    return {
        op.get_friendly_name(): str(op.get_type_name())
        for op in model.get_ordered_ops()
        if op.get_type_name() not in ("Parameter", "Constant", "Result")
    }


def id_of(op: Any) -> str:
    """Names are unique in a runtime model; its Python objects are made anew at every look."""
    return str(op.get_friendly_name())


def _facts(op: Any) -> dict[str, str]:
    told = op.get_rt_info()

    def text(key: str) -> str:
        value = told[key] if key in told else ""  # noqa: SIM401 - no dict
        return str(getattr(value, "value", value) or "")

    return {
        key: text(key)
        for key in ("layerType", "originalLayersNames", "outputLayouts", "primitiveType")
    }


def _constants(ops: Sequence[Any], facts: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Constants, and what is computed from them alone, once."""
    found: set[str] = set()
    for op in ops:
        sources = [one.get_source_output().get_node() for one in op.inputs()]
        if facts[id_of(op)]["layerType"] == CONSTANT or (
            sources and all(id_of(one) in found for one in sources)
        ):
            found.add(id_of(op))
    return found


def _tensor(op: Any, index: int, told: Mapping[str, str], port: Any) -> LayerTensor:
    partial = port.get_partial_shape()
    shape = (
        tuple(one.get_length() if one.is_static else -1 for one in partial)
        if partial.rank.is_static
        else ()
    )
    layouts = told["outputLayouts"].split(",")
    layout = layouts[index] if index < len(layouts) else ""
    plain = layout in ("undef", "".join(map(chr, range(97, 97 + len(shape)))))
    name = op.get_friendly_name()
    return LayerTensor(
        f"{name}:{index}" if index else name, dtype_of(port), shape, "" if plain else layout
    )


def _source(file: ModelFile) -> tuple[Any, tuple[str, ...]]:
    """The file's graph, and what is to be said where it cannot be read."""
    if file.format != "onnx":
        return None, ()
    try:
        import onnx
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        return None, (NO_ONNX,)
    return onnx.load_model_from_string(file.read()).graph, ()


def _graph(graph: Any) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Its nodes with their operators, OpenVINO's other names for some of them, and for each node
    the one that it reads first, where nobody else reads that.
    """
    ends = {value.name for value in graph.output}
    reads = Counter(name for node in graph.node for name in node.input)
    nodes: dict[str, str] = {}
    aliases: dict[str, str] = {}
    makers: dict[str, str] = {}
    feeders: dict[str, str] = {}
    for node in graph.node:
        outputs = [name for name in node.output if name]
        name = node.name or f"node_of_{next(iter(outputs), '')}"
        nodes[name] = node.op_type
        first = node.input[0] if node.input else ""
        if first in makers and reads[first] == 1 and first not in ends:
            feeders[name] = makers[first]
        for output in outputs:
            makers[output] = name
            # It names after the tensor what has no name, and what writes an output of the network.
            if not node.name or output in ends:
                aliases[output] = name
    return nodes, {one: name for one, name in aliases.items() if one not in nodes}, feeders


def _product(
    kind: str, names: Sequence[str], graph: Mapping[str, str], feeders: Mapping[str, str]
) -> dict[str, None]:
    """The product in a layer where its name got lost: the one that only this layer's nodes read."""
    wanted = PRODUCTS.get(kind, ())
    if not wanted or not names or any(graph[name] in wanted for name in names):
        return {}
    before = feeders.get(names[0])
    return {before: None} if before is not None and graph[before] in wanted else {}


def _names(
    told: str, graph: Mapping[str, str], aliases: Mapping[str, str], *, copies: bool
) -> dict[str, None]:
    """The graph's nodes in a list of names, which may themselves hold commas."""
    found: dict[str, None] = {}
    parts = told.split(",") if told else []
    while parts:
        for end in range(len(parts), 0, -1):
            name = ",".join(parts[:end])
            endings = (_SPLIT, _COPY) if copies else (_SPLIT,)
            for ending in endings:
                while name not in graph and name not in aliases and ending.search(name):
                    name = ending.sub("", name)
            name = aliases.get(name, name)
            if name in graph:
                found[name] = None
                break
        del parts[:end]
    return found
