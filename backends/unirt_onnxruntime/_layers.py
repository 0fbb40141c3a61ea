"""The layers ONNX Runtime runs after its graph optimizations, and the graph's nodes in each.

It writes the optimized graph as a model of its own. There most tensors keep their names, and nodes
theirs or derived ones: that is all there is to tell which of the file's nodes became which layer.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unirt import BackendError, BackendUnavailable, EngineReport, Layer, LayerTensor, ModelFile

SOURCE = "optimized graph"

WARM_UP, LEAST_RUNS, MOST_RUNS, SECONDS = 3, 10, 50, 1.0

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
EIGHT_BITS = frozenset({"int8", "uint8"})
# ONNX Runtime inserts these; under a derived name they say nothing of the file's nodes.
MOVES = frozenset(
    {"Transpose", "Cast", "Identity", "ReorderInput", "ReorderOutput", "Squeeze", "Unsqueeze"}
    | {"MemcpyToHost", "MemcpyFromHost", "Reshape"}
)
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})

# What it appends to a node's name for what it makes of that node.
_DERIVED = re.compile(r"(_token_\d+|/duplicated|/MatMulAddFusion)$")
_BLOCKED = "_nchwc"  # to the name of the tensor that the node writes

# As `NodeArg.type` and the profile write them.
DTYPES = {
    "float": "float32",
    "double": "float64",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
    "float4e2m1": "float4_e2m1fn",
}
_TYPE = re.compile(r"^tensor\((\w+)\)$")

Open = Callable[..., Any]
"""The engine's way to open a session: source, then changes to its settings as a function, and
whether the graph is optimized already.
"""
Types = Mapping[str, tuple[str, tuple[int, ...]]]


def inspect(file: ModelFile, open_session: Open, providers: Mapping[str, str]) -> EngineReport:
    """The layers; `providers` names each node's where the engine told."""
    with tempfile.TemporaryDirectory(prefix="unirt-") as folder:
        return _open(file, open_session, providers, Path(folder))[1]


def profile(
    file: ModelFile,
    open_session: Open,
    providers: Mapping[str, str],
    run_with: Callable[[Any], Callable[[], object]],
) -> EngineReport:
    """The layers with the median time of each over at least ten runs, in a session of its own.

    `run_with` gives the function that runs that session once.
    """
    with tempfile.TemporaryDirectory(prefix="unirt-") as folder:
        native, report = _open(file, open_session, providers, Path(folder), timed=True)
        run = run_with(native)
        runs, started = 0, 0.0
        while runs < WARM_UP + LEAST_RUNS or (
            runs < WARM_UP + MOST_RUNS and time.perf_counter() - started < SECONDS
        ):
            if runs == WARM_UP:
                started = time.perf_counter()
            run()
            runs += 1
        written = Path(native.end_profiling())
        try:
            events = json.loads(written.read_text("utf-8", errors="replace"))
        except ValueError as error:
            raise BackendError(
                "onnxruntime's account of the times of its nodes cannot be read.",
                f"{error}.",
                "Please report it with the version of onnxruntime; the engine itself runs.",
                backend="onnxruntime",
            ) from error
        return _timed(report, events, runs)


def _open(
    file: ModelFile,
    open_session: Open,
    providers: Mapping[str, str],
    folder: Path,
    *,
    timed: bool = False,
) -> tuple[Any, EngineReport]:
    """A session of its own of the same model, and what it made of the graph."""
    onnx = import_onnx()
    original = onnx.load_model_from_string(file.read())
    _name_nodes(original.graph)
    target = folder / "optimized.onnx"

    def change(settings: Any) -> None:
        settings.optimized_model_filepath = str(target)
        entries = {
            # The weights are of no interest here, and may be too large for one message.
            "session.optimized_model_external_initializers_file_name": "weights.bin",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        if file.external and file.path:
            entries["session.model_external_initializers_file_folder_path"] = str(file.path.parent)
        for key, value in entries.items():
            settings.add_session_config_entry(key, value)
        if timed:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(folder / "profile")

    native = open_session(original.SerializeToString(), change)
    optimized = onnx.load(str(target), load_external_data=False)
    types = _types(onnx, optimized, open_session, folder)
    return native, read_layers(original, optimized, types, providers)


def import_onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise BackendUnavailable(
            "onnxruntime's layers cannot be read here.",
            "It writes them as an ONNX model, and the onnx package is not installed.",
            "pip install 'unirt[precision]'",
            backend="onnxruntime",
        ) from error
    return onnx


def _name_nodes(graph: Any) -> None:
    taken = {node.name for node in graph.node}
    for index, node in enumerate(graph.node):
        if not node.name and node.output:
            name = f"node_of_{next(filter(None, node.output), index)}"
            node.name = name if name not in taken else f"{name}_{index}"
            taken.add(node.name)


def _types(onnx: Any, optimized: Any, open_session: Open, folder: Path) -> Types:
    """Type and shape of every tensor, as ONNX Runtime infers them: only it knows its operators."""
    probe = onnx.ModelProto()
    probe.CopyFrom(optimized)
    told = {value.name for value in probe.graph.output}
    for node in probe.graph.node:
        for name in filter(None, node.output):
            if name not in told:
                told.add(name)
                probe.graph.output.add(name=name)
    path = folder / "typed.onnx"
    path.write_bytes(probe.SerializeToString())
    native = open_session(str(path), optimized=True)
    return {
        value.name: (_dtype(value.type), _sizes(value.shape))
        for value in (*native.get_inputs(), *native.get_outputs())
    }


def _dtype(text: str) -> str:
    match = _TYPE.match(text)
    return DTYPES.get(match[1], match[1]) if match else text


def _sizes(shape: Iterable[Any] | None) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in shape or ())


# --- nodes ---------------------------------------------------------------------------------------


def read_layers(
    original: Any, optimized: Any, types: Types, providers: Mapping[str, str]
) -> EngineReport:
    """The report from the graph before and after, both as `onnx.ModelProto`."""
    from onnx import TensorProto, helper

    constants = {}
    for tensor in optimized.graph.initializer:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        named = "string" if tensor.data_type == TensorProto.STRING else dtype.name
        constants[tensor.name] = LayerTensor(tensor.name, named, tuple(tensor.dims))
    found = _Origins(original.graph, optimized.graph, types).find()
    layouts = dict(_layouts(optimized.graph.node))

    def tensors(names: Iterable[str]) -> tuple[LayerTensor, ...]:
        return tuple(
            LayerTensor(name, *types.get(name, ("", ())), layouts.get(name, ""))
            for name in names
            if name and name not in constants
        )

    layers = []
    for index, node in enumerate(optimized.graph.node):
        nodes = found[index]
        layers.append(
            Layer(
                node.name or f"{node.op_type}_{index}",
                node.op_type,
                nodes,
                tensors(node.input),
                tensors(node.output),
                next((providers[one] for one in (node.name, *nodes) if one in providers), ""),
                constants=tuple(constants[name] for name in node.input if name in constants),
            )
        )
    inside = any(node.op_type in CONTROL_FLOW for node in optimized.graph.node)
    return EngineReport(
        tuple(layers),
        SOURCE,
        {node.name: node.op_type for node in original.graph.node},
        tensors(value.name for value in optimized.graph.input),
        tensors(value.name for value in optimized.graph.output),
        notes=("What runs inside If, Loop and Scan is a part of that layer here.",)
        if inside
        else (),
    )


def _layouts(nodes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """The layouts that operators themselves tell: blocked channels, or channels last."""
    for node in nodes:
        last = any(one.name == "channels_last" and one.i for one in node.attribute)
        layout = "NHWC" if last or node.op_type.startswith("Nhwc") else ""
        if node.domain == "com.microsoft.nchwc" and node.op_type != "ReorderOutput":
            layout = "NCHWc"
        if layout:
            yield from ((name, layout) for name in node.output)
            if node.op_type in ("QLinearConv", "NhwcMaxPool"):
                yield node.input[0], layout


@dataclass
class _Claim:
    """What is known of one node of the optimized graph."""

    anchor: Any = None  # the file's node that it is named after
    ends: list[str] = field(default_factory=list)  # its outputs as tensors of the file
    along: list[Any] = field(default_factory=list)  # the file's nodes from the anchor to its end


class _Origins:
    """Finds the file's nodes in each node of the optimized graph.

    A tensor that kept its name is the same tensor. One that got a new name is placed by the node
    that writes it: from the node of the file it is named after, over what its own attributes tell
    that it does besides. The nodes of a layer are those between the tensors it reads and writes;
    where a way back leads past them, only what is named counts.
    """

    def __init__(self, original: Any, optimized: Any, types: Types) -> None:
        self.original, self.optimized, self.types = original, optimized, types
        self.producer = {name: node for node in original.node for name in node.output if name}
        self.consumers: dict[str, list[Any]] = {}
        for node in original.node:
            for name in dict.fromkeys(filter(None, node.input)):
                self.consumers.setdefault(name, []).append(node)
        names: dict[str, list[Any]] = {}
        for node in original.node:
            names.setdefault(node.name, []).append(node)
        self.by_name = {name: found[0] for name, found in names.items() if len(found) == 1}
        weights = {tensor.name for tensor in original.initializer}
        self.inputs = {value.name for value in original.input} - weights
        self.varying = set(self.inputs)
        for node in original.node:
            # What stands inside a loop may read anything around it.
            if node.op_type in CONTROL_FLOW or not self.varying.isdisjoint(node.input):
                self.varying.update(filter(None, node.output))
        self.values: dict[str, str] = {name: name for name in self.inputs}

    def find(self) -> list[tuple[str, ...]]:
        claims = [self._claim(node) for node in self.optimized.node]
        owners = {id(one.anchor): place for place, one in enumerate(claims) if one.anchor}
        order = {id(node): place for place, node in enumerate(self.original.node)}
        found = []
        for place, (node, claim) in enumerate(zip(self.optimized.node, claims, strict=True)):
            nodes = self._between(node, claim, owners, place)
            found.append(
                tuple(one.name for one in sorted(nodes.values(), key=lambda one: order[id(one)]))
            )
        return found

    def _claim(self, node: Any) -> _Claim:
        claim = _Claim(self._anchor(node))
        for index, name in enumerate(node.output):
            end = name if name in self.producer else None
            if end is None and index == 0 and claim.anchor is not None:
                end = self._end(claim, node)
            if end is None and node.op_type in MOVES and claim.anchor is None:
                end = self.values.get(node.input[0])
            if end is not None:
                self.values[name] = end
                claim.ends.append(end)
        return claim

    def _anchor(self, node: Any) -> Any:
        name = node.name
        if name in self.by_name:
            return self.by_name[name]
        if node.op_type in MOVES:
            return None
        while True:
            if name in self.by_name:
                return self.by_name[name]
            if name.endswith(_BLOCKED):
                return self.producer.get(name.removesuffix(_BLOCKED))
            shorter = _DERIVED.sub("", name)
            if shorter == name:
                return None
            name = shorter

    def _end(self, claim: _Claim, node: Any) -> str | None:
        """The tensor of the file that the node's first output is, from its anchor onwards."""
        tensor: str = claim.anchor.output[0]
        claim.along.append(claim.anchor)
        eight = self.types.get(node.output[0], ("",))[0] in EIGHT_BITS
        activation = next(
            (one.s.decode() for one in node.attribute if one.name == "activation"), ""
        )
        adds = node.op_type in ("Conv", "FusedConv") and len(node.input) > 3 and node.input[3]
        while True:
            after = self.consumers.get(tensor, [])
            only = after[0] if len(after) == 1 else None
            if eight and self.producer[tensor].op_type != QUANTIZE:
                quantizers = [one for one in after if one.op_type == QUANTIZE]
                only = quantizers[0] if len(quantizers) == 1 else only
                if only is None or only.op_type not in (QUANTIZE, "Relu", "Clip"):
                    return None
            elif only is not None and adds and only.op_type == "Add":
                adds = ""
            elif only is not None and activation and only.op_type == activation:
                activation = ""
            else:
                return tensor
            claim.along.append(only)
            tensor = only.output[0]

    def _between(
        self, node: Any, claim: _Claim, owners: Mapping[int, int], place: int
    ) -> dict[int, Any]:
        stops = {self.values[name] for name in node.input if name in self.values}
        reads = stops | set(node.input)
        named = {id(one): one for one in (claim.along or filter(None, [claim.anchor]))}
        if not claim.ends:
            return named
        found: dict[int, Any] = {}
        queue = [end for end in claim.ends if end not in stops]
        while queue:
            tensor = queue.pop()
            source = self.producer.get(tensor)
            if tensor in reads or id(source) in found:
                continue
            if source is None:
                if tensor in self.inputs:
                    return named
                continue
            if tensor not in self.varying and not self._is_read(source, reads):
                continue  # folded into a constant
            owner = owners.get(id(source), place)
            if owner != place and source.op_type not in (QUANTIZE, DEQUANTIZE):
                return named
            found[id(source)] = source
            queue += filter(None, source.input)
        return found

    def _is_read(self, source: Any, reads: set[str]) -> bool:
        """Whether the layer itself reads what this constant is made of."""
        queue, seen = [source], set()
        while queue:
            node = queue.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if not reads.isdisjoint(node.input[:1]):
                return True
            queue += [self.producer[name] for name in node.input if name in self.producer]
        return False


# --- times ---------------------------------------------------------------------------------------


def _timed(report: EngineReport, events: Any, runs: int) -> EngineReport:
    suffix = "_kernel_time"
    times: dict[str, list[float]] = {layer.name: [] for layer in report.layers}
    shapes: dict[str, list[Any]] = {}
    providers: dict[str, str] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(suffix):
            continue
        name = name.removesuffix(suffix)
        if name in times:  # what is inside a loop counts as the loop
            times[name].append(event["dur"] * 1e-6)
            shapes[name] = event["args"].get("output_type_shape", [])
            providers[name] = short(event["args"].get("provider", ""))
    pairs = [(name, one) for name, all_ in times.items() for one in medians(all_, runs)]
    sizes = {
        tensor.name: tuple(size for one in told.values() for size in one)
        for layer in report.layers
        for tensor, told in zip(layer.outputs, shapes.get(layer.name, []), strict=False)
    }

    def sized(tensors: Iterable[LayerTensor]) -> tuple[LayerTensor, ...]:
        return tuple(replace(one, shape=sizes.get(one.name, one.shape)) for one in tensors)

    layers = tuple(
        replace(
            layer,
            inputs=sized(layer.inputs),
            outputs=sized(layer.outputs),
            tactic=providers.get(layer.name) or layer.tactic,
        )
        for layer in report.layers
    )
    return replace(report, layers=layers).with_times(pairs)


def medians(times: list[float], runs: int) -> list[float]:
    """Of each of the layers of one name, which take turns in every run."""
    layers, rest = divmod(len(times), runs)
    if rest or not layers:  # a branch that not every run takes
        return [sum(times) / runs] if times else []
    return [statistics.median(times[layers * WARM_UP + turn :: layers]) for turn in range(layers)]


def short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def refuse_launch_times(kind: str) -> None:
    """Other providers start a kernel and go on: their times would say nothing of the kernels."""
    if kind != "cpu":
        raise BackendUnavailable(
            f"onnxruntime does not time its layers on {kind}.",
            "What it reports there is the time to start a kernel, not the time it takes.",
            "Look at the layers without times, or at those of onnxruntime@cpu.",
            backend="onnxruntime",
            device=kind,
        )
