"""Every cell of a table: networks, precisions, calibrations, engines, by one command.

    python benchmarks/precision.py --out FOLDER [--only digits,resnet50] [--engines onnxruntime]
        [--precisions int8,fp8] [--methods mse,max] [--samples N] [--budget SECONDS] [--quick]
    python benchmarks/precision.py --show results/precision-NAME.json [--page docs/precision.md]

Needs onnxruntime, whose float32 answers are the reference, and onnx; each engine to be measured;
for TensorRT on a GPU, PyTorch, which holds the buffers. A cell has the error against float32, task
accuracy where there are labels, latency as a ratio to float32 on the same engine, the number of
nodes that became quantized, and the size of the file as a ratio.

Graphs are made by UniRT for the recipe of each engine, and handed to `unirt.build` as they are.
Latencies are measured in turns with the engine's own float32 in one process, on one thread of a
CPU; figures are medians over the rounds, ratios the medians of the rounds' ratios. A cell that
fails keeps the error's text. FOLDER/precision.json is written after every cell.

`quantize_static` is no method of UniRT's, but ONNX Runtime's own quantizer beside it: uint8
activations, 7-bit weights by channel, which is the best of its settings on a CPU without VNNI.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import io
import json
import math
import platform
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import precision_networks
from precision_networks import NETWORKS, Feed, Network, size, with_half_scales

import unirt
from unirt.accuracy import relative_error, snr_db
from unirt.precision import (
    Observations,
    Quantized,
    SecondMoments,
    cast,
    observe,
    quantize,
    quantize_tflite,
    recipe_for,
    search,
    second_moments,
    sparsify,
)

Array = np.ndarray[Any, Any]
Step = Callable[[], object]

ALONE: Final = ("int8 rounded alone", "int4-weights rounded alone")
"""Each channel by itself, where weights are else rounded on the calibration data."""
PRECISIONS: Final = (
    *("fp32", "fp16", "bf16", "int8", "fp8", "int8-weights", "int4-weights", "qat"),
    *("int8 + fp16", "fp8 + fp16", "int8-weights + fp16", "int4-weights + fp16"),
    *("int8 convolutions", "int8-dynamic", *ALONE),
    *("int8 with fp16 scales", "fp8 with fp16 scales", "sparse fp16"),
)
METHODS: Final = ("mse", "max", "percentile", "entropy", "quantize_static")
ENGINES: Final = ("onnxruntime", "openvino", "tflite", "tensorrt")
QUANTIZED: Final = (
    "int8",
    ALONE[0],
    "int8 + fp16",
    "int8 convolutions",
    "fp8",
    "fp8 + fp16",
    "qat",
)
MLPS: Final = ("mlp", "mlp-large")
METHOD: Final = "mse"  # UniRT's own choice, for which the targets hold
FP8_METHOD: Final = "max"  # an exponent keeps small values apart as well as large ones

# What a GPU's few minutes are spent on first.
FIRST: Final = (
    ("mlp", ("fp32", "fp16", "int8", "int8 + fp16", "fp8", "fp8 + fp16")),
    ("mlp", ("int8 with fp16 scales", "fp8 with fp16 scales")),
    ("mlp-large", ("fp32", "fp16", "int8 + fp16", "fp8 + fp16")),
    ("resnet50", ("fp32", "fp16", "fp8", "fp8 + fp16", "int8 convolutions")),
    ("transformer", ("fp32", "fp16", "int8", "int8 + fp16", "fp8", "fp8 + fp16")),
    ("transformer", ("int4-weights", "int4-weights + fp16", "int8-weights + fp16")),
    ("digits", ("fp32", "fp16", "int8", "fp8")),
    ("photos", ("fp32", "fp16", "int8", "fp8", "int8 convolutions", "qat")),
    ("mlp", ("int8-weights + fp16", "int4-weights + fp16", "sparse fp16")),
)


@dataclasses.dataclass(frozen=True)
class Wish:
    """A cell to be measured."""

    network: str
    engine: str
    precision: str
    method: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.network, self.engine, self.precision, self.method)))


@dataclasses.dataclass
class Graph:
    """A network in a precision, and what is known of how it became that."""

    model: unirt.Model
    recipe: str = ""
    nodes: int = 0
    kept: int = 0
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Lab:
    """Networks, graphs and references, made when they are first needed and then kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.quick: bool = arguments.quick
        self.threads: int = arguments.threads
        self.samples: int = arguments.samples
        devices = unirt.devices()
        self.cpu = next(device for device in devices if device.kind == "cpu")
        self.gpu = next((device for device in devices if device.kind == "cuda"), None)
        self.batch = 8 if self.gpu is not None else 1
        self.buffers = ""
        self.made: dict[str, float] = {}
        self._networks: dict[str, Network] = {}
        self._observed: dict[str, Observations] = {}
        self._moments: dict[str, SecondMoments] = {}
        self._references: dict[str, Array] = {}
        self._graphs: dict[tuple[Any, ...], Graph | Exception] = {}
        self._written: dict[tuple[str, ...], dict[str, Any]] = {}

    @contextlib.contextmanager
    def clock(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.made[what] = round(time.perf_counter() - started, 2)

    def network(self, name: str) -> Network:
        if name not in self._networks:
            with self.clock(f"{name}: network"):
                self._networks[name] = NETWORKS[name](name, self.batch, self.samples)
        return self._networks[name]

    def observed(self, name: str) -> Observations:
        if name not in self._observed:
            network = self.network(name)
            with self.clock(f"{name}: one pass over the calibration data"):
                self._observed[name] = observe(network.model, network.calibration)
        return self._observed[name]

    def moments(self, name: str) -> SecondMoments:
        if name not in self._moments:
            network = self.network(name)
            with self.clock(f"{name}: second moments of the calibration data"):
                self._moments[name] = second_moments(network.model, network.calibration)
        return self._moments[name]

    def reference(self, name: str) -> Array:
        """The float32 answers of ONNX Runtime on the CPU to all test inputs."""
        if name not in self._references:
            network = self.network(name)
            with unirt.load(network.model, "onnxruntime@cpu") as session:
                self._references[name] = answers(session, network.test)
        return self._references[name]

    def candidate(self, engine: str) -> str:
        if engine == "tensorrt":
            return "tensorrt@aot" if self.gpu is None else f"tensorrt@cuda:{self.gpu.index}"
        return f"{engine}@cpu"

    def options(self, engine: str) -> dict[str, Any]:
        return {} if engine == "tensorrt" else {"threads": self.threads}

    def graph(self, wish: Wish) -> Graph:
        """Raises again what making it raised before."""
        recipe = self._recipe(wish)
        key = (wish.network, wish.precision, wish.method, recipe, wish.engine == "tflite")
        if key not in self._graphs:
            try:
                with self.clock(" ".join(filter(None, map(str, key[:4]))) + ": graph"):
                    self._graphs[key] = self._make(wish, recipe)
            except Exception as error:  # noqa: BLE001 - raised below, and for each engine
                self._graphs[key] = error
        found = self._graphs[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _recipe(self, wish: Wish) -> str:
        if wish.precision in ("fp32", "fp16", "bf16", "qat", "sparse fp16"):
            return ""
        if wish.method == "quantize_static":
            return "onnxruntime"
        if wish.engine == "tflite":
            return "litert"
        if wish.precision == "int8 convolutions":
            return "tensorrt"  # also where UniRT, knowing the library, would not quantize them
        backend = next(p.backend for p in unirt.backends() if p.name == wish.engine)
        stated = backend.quantization if backend is not None else ""
        if wish.precision.startswith("fp8"):
            return stated or "tensorrt"  # recipes for CPUs have no fp8
        return stated or recipe_for(wish.engine, self.cpu.facts["instruction_sets"]).name

    def _make(self, wish: Wish, recipe: str) -> Graph:
        network = self.network(wish.network)
        model, precision = network.model, wish.precision
        if precision == "fp32":
            return Graph(model)
        if wish.engine == "tflite":
            return self._make_tflite(network, wish)
        if precision == "qat":
            if network.trained is None:
                raise LookupError("this network was not trained for int8")
            quantized = _products(network.trained)
            return Graph(network.trained, "learned", quantized, 0)
        if precision in ("fp16", "bf16"):
            found = cast(model, precision)  # type: ignore[arg-type]
            return Graph(found.model, kept=len(found.kept), notes=found.notes)
        if precision == "sparse fp16":
            pruned = sparsify(model)
            half = cast(pruned.model, "fp16")
            options = {"sparse_weights": True} if wish.engine == "tensorrt" else {}
            return Graph(half.model, "2:4", len(pruned.nodes), len(pruned.kept), options=options)
        if precision.endswith(" with fp16 scales"):
            whole = self.graph(dataclasses.replace(wish, precision=precision.split()[0]))
            return dataclasses.replace(whole, model=with_half_scales(whole.model))
        if precision.endswith(" + fp16"):
            whole = self.graph(dataclasses.replace(wish, precision=precision.split()[0]))
            return dataclasses.replace(whole, model=cast(whole.model, "fp16").model)
        if wish.method == "quantize_static":
            return _by_onnxruntime(network)
        if precision == "int8 convolutions":
            precision = "int8"
        calibration = None
        if "-weights" not in precision:
            calibration = self.observed(wish.network).calibration(wish.method)  # type: ignore[arg-type]
        alone = precision in ALONE
        precision = precision.removesuffix(" rounded alone")
        moments = None if alone or precision == "fp8" else self.moments(wish.network)
        made = quantize(model, calibration, precision, recipe, moments=moments)  # type: ignore[arg-type]
        return _graph(made)

    def _make_tflite(self, network: Network, wish: Wish) -> Graph:
        file = network.model.file(["tflite"])
        if file is None:
            raise LookupError("this network is in no .tflite")
        source = unirt.Model(file.read(), name=network.name)
        more: dict[str, Any] = {}
        if wish.precision == "int8":
            more = {"data": network.calibration, "method": wish.method}
        found = quantize_tflite(source, precision=wish.precision, **more)  # type: ignore[arg-type]
        return Graph(found.model, found.recipe, len(found.nodes), len(found.kept), found.notes)

    def as_written(self, wish: Wish) -> dict[str, Any]:
        """The error of the same graph where ONNX Runtime computes each node for itself.

        That is what quantization costs by itself: fused, a kernel may add its own share.
        """
        key = (wish.network, wish.precision, wish.method, self._recipe(wish))
        if key not in self._written:
            network, graph = self.network(wish.network), self.graph(wish)
            options = {"optimization": "disable"}
            with (
                self.clock(f"{' '.join(filter(None, key))}: as written"),
                unirt.load(graph.model, "onnxruntime@cpu", options=options) as session,
            ):
                found = answers(session, network.test)
            self._written[key] = judged(found, self.reference(wish.network), network.labels)
        return self._written[key]


def _graph(found: Quantized) -> Graph:
    return Graph(found.model, found.recipe, len(found.nodes), len(found.kept), found.notes)


def _products(model: unirt.Model) -> int:
    return sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in _nodes(model))


def _nodes(model: unirt.Model) -> list[Any]:
    import onnx

    file = model.file(["onnx"])
    assert file is not None
    return list(onnx.load_from_string(file.read()).graph.node)


def _by_onnxruntime(network: Network) -> Graph:
    """The network as ONNX Runtime's own quantizer makes it."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(network.calibration)

        def get_next(self) -> Any:
            return next(self._feeds, None)

    file = network.model.file(["onnx"])
    assert file is not None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given, ready, made = (str(Path(folder, f"{n}.onnx")) for n in ("given", "ready", "made"))
        Path(given).write_bytes(file.read())
        quantization.quant_pre_process(given, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            made,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        model = unirt.Model(Path(made).read_bytes(), name=network.name)
    return Graph(model, "onnxruntime", _products(model), 0)


def answers(session: Any, feeds: Sequence[Feed]) -> Array:
    return np.concatenate([np.asarray(next(iter(session.run(f).values()))) for f in feeds])


def judged(found: Array, reference: Array, labels: Array | None) -> dict[str, Any]:
    """Errors of answers. What is not finite where the reference is makes each of them infinite."""
    decibels = snr_db(found, reference)
    error: dict[str, Any] = {
        "relative": 10 ** (-decibels / 20),
        "largest_relative": relative_error(found, reference),
        "snr_db": decibels,
        "finite": bool(np.isfinite(found).all()),
    }
    if labels is not None:
        error["accuracy"] = float((found.argmax(1) == labels).mean())
    return error


class Running:
    """An engine and a session, what they answered, and one call of it on fixed buffers."""

    def __init__(self, lab: Lab, wish: Wish, graph: Graph) -> None:
        network = lab.network(wish.network)
        shapes = {name: array.shape for name, array in network.timed.items()}
        profiles = [unirt.ShapeProfile(shapes)] if wish.engine == "tensorrt" else []
        self.candidate = lab.candidate(wish.engine)
        self.graph = graph
        self._stack = contextlib.ExitStack()
        self._lab, self._wish = lab, wish
        started = time.perf_counter()
        self.engine = self._stack.enter_context(
            unirt.build(
                graph.model,
                self.candidate,
                profiles=profiles,
                options={**lab.options(wish.engine), **graph.options},
            )
        )
        self.build_seconds = time.perf_counter() - started
        self.step: Step | None = None

    def open(self) -> Array:
        """The answers to all test inputs."""
        try:
            network = self._lab.network(self._wish.network)
            session = self._stack.enter_context(self.engine.session())
            found = answers(session, network.test)
            self.step = self._bound(session, network.timed)
        except BaseException:
            self.close()
            raise
        return found

    def _bound(self, session: Any, feed: Feed) -> Step:
        if self._wish.engine == "tensorrt":
            try:
                from gpu_lab import bound  # PyTorch's tensors on the device
            except ImportError as error:
                self._lab.buffers = f"host arrays, copied in each call: {error}"
            else:
                self._lab.buffers = "on the device"
                return self._keep(bound(session, feed)[0])
        return self._keep(session.bind(feed))

    def _keep(self, binding: Any) -> Step:
        self._stack.callback(binding.close)
        return binding.run  # type: ignore[no-any-return]

    def layers(self) -> dict[str, Any]:
        """In how many layers the engine says it computes what."""
        try:
            report = self.engine.inspect()
        except unirt.UnirtError as error:
            return {"error": error.what}
        return {
            "layers": len(report.layers),
            "reformats": len(report.reformats),
            **dict(report.precisions),
        }

    def close(self) -> None:
        self._stack.close()


def in_turns(
    steps: Mapping[str, Step], block: float, rounds: int, warm_up: float
) -> dict[str, list[float]]:
    """Median seconds of a call of each step, by rounds: a block each, in alternating order."""
    calls: dict[str, int] = {}
    for name, step in steps.items():
        started, count = time.perf_counter(), 0
        while count < 2 or time.perf_counter() - started < warm_up:
            step()
            count += 1
        started = time.perf_counter()
        step()
        calls[name] = max(2, min(200, int(block / max(time.perf_counter() - started, 1e-7))))
    blocks: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                step = steps[name]
                step()  # caches are another's
                taken = []
                for _ in range(calls[name]):
                    begin = time.perf_counter_ns()
                    step()
                    taken.append(time.perf_counter_ns() - begin)
                blocks[name].append(statistics.median(taken) / 1e9)
            order.reverse()
    finally:
        gc.enable()
    return blocks


def ratio(blocks: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(blocks[name], blocks[other], strict=True))


class Bench:
    """Measures cells and keeps the float32 engine of the last network open, to compare with."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._open: dict[str, Running] = {}
        self._of: tuple[str, str] = ("", "")

    def close(self) -> None:
        for running in self._open.values():
            running.close()
        self._open.clear()
        self._of = ("", "")

    def measure(self, wish: Wish, cell: dict[str, Any]) -> None:
        """Fills in a cell. Raises what goes wrong, and what was found before stays."""
        lab = self._lab
        if self._of != (wish.network, wish.engine):
            self.close()
            self._of = (wish.network, wish.engine)
        graph = lab.graph(wish)
        if cell_runs := lab.candidate(wish.engine) != "tensorrt@aot":
            self._open_others(wish)
        plain = lab.network(wish.network).model
        formats = ["tflite" if wish.engine == "tflite" else "onnx"]
        cell |= {
            "candidate": lab.candidate(wish.engine),
            "recipe": graph.recipe,
            "nodes": graph.nodes,
            "kept": graph.kept,
            "size_ratio": size(graph.model, formats) / size(plain, formats),
            "notes": list(graph.notes),
        }
        running, kept = Running(lab, wish, graph), False
        try:
            cell["build_seconds"] = running.build_seconds
            cell["repairs"] = running.engine.facts.get("repairs", [])
            cell["precisions"] = running.layers()
            if not cell_runs:
                cell["state"] = "built"
                return
            network = lab.network(wish.network)
            found = running.open()
            cell |= judged(found, lab.reference(wish.network), network.labels)
            assert running.step is not None
            cell |= self._timed(wish, running.step)
            if wish.precision in self._baselines(wish):
                self._open[wish.precision] = running
                kept = True
        finally:
            if not kept:
                running.close()
        wants_written = wish.precision in QUANTIZED and wish.method != "quantize_static"
        wants_written &= wish.engine != "tflite"
        if wants_written and not (lab.quick and wish.engine != "tensorrt"):
            # Beside the engine's own answers; a failure here is no failure of the cell.
            try:
                cell["as_written"] = lab.as_written(wish)
            except Exception as error:  # noqa: BLE001 - recorded
                cell["as_written_error"] = told(error)
        cell["state"] = "measured"

    def _baselines(self, wish: Wish) -> tuple[str, ...]:
        """What latencies are told as ratios to."""
        return ("fp32", "fp16") if wish.engine == "tensorrt" else ("fp32",)

    def _open_others(self, wish: Wish) -> None:
        """The baselines, where they were closed since they were measured themselves."""
        for precision in self._baselines(wish):
            if precision == wish.precision:
                return
            if precision in self._open:
                continue
            other = dataclasses.replace(wish, precision=precision, method="")
            # A failure of theirs stands in their own cell; this one then has no ratio to them.
            with contextlib.suppress(unirt.UnirtError):
                running = Running(self._lab, other, self._lab.graph(other))
                running.open()
                self._open[precision] = running

    def _timed(self, wish: Wish, step: Step) -> dict[str, Any]:
        lab = self._lab
        others = {name: r.step for name, r in self._open.items() if r.step is not None}
        steps = {**others, wish.precision: step}
        short = lab.quick or lab.gpu is not None  # of a GPU's minutes the CPU gets few
        if wish.engine == "tensorrt":
            block, rounds, warm_up = 0.02, 7 if lab.quick else 11, 0.3
        else:
            block, rounds, warm_up = 0.05, 3 if short else 7, 0.1
        blocks = in_turns(steps, block, rounds, warm_up)
        found: dict[str, Any] = {"seconds": statistics.median(blocks[wish.precision])}
        for name in others:
            found[f"seconds_{name}"] = statistics.median(blocks[name])
            found["latency_ratio" if name == "fp32" else f"ratio_to_{name}"] = ratio(
                blocks, wish.precision, name
            )
        if wish.precision == "fp32":
            found["latency_ratio"] = 1.0
        found["rounds_seconds"] = blocks
        return found


def told(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"[:1200]


def wishes(arguments: argparse.Namespace, on_gpu: bool) -> list[Wish]:
    """The cells in the order in which they are measured: a GPU's first ones first."""

    def methods(network: str, engine: str, precision: str) -> list[str]:
        if precision.startswith("fp8"):
            return [FP8_METHOD]
        if precision == "int8 convolutions" and network == "photos":
            return ["max", METHOD]  # the first is what QAT is held against
        if precision != "int8":
            return [METHOD if precision.startswith("int8 ") else ""]
        if engine == "tensorrt" and (not on_gpu or network in ("resnet50", "mobilenetv2")):
            return [METHOD]  # whether it builds does not depend on the ranges
        foreign = ("quantize_static",) if engine in ("onnxruntime", "openvino") else ()
        own = [m for m in METHODS if m != "quantize_static" and m in arguments.methods]
        return own + [m for m in foreign if m in arguments.methods]

    def fits(network: str, engine: str, precision: str) -> bool:
        tensorrt = engine == "tensorrt"
        if engine == "tflite":
            kinds = ("fp32", "int8", "int8-dynamic", "int8-weights")
            return network == "digits" and precision in kinds
        if precision == "int8-dynamic":
            return False
        if precision == "qat":
            return network == "photos"
        if precision in ALONE:
            whole = precision.startswith("int8") or network == "transformer"
            return engine in ("onnxruntime", "openvino") and network not in MLPS and whole
        if precision.endswith("with fp16 scales"):
            return tensorrt and network == "mlp"
        if precision.endswith(" + fp16"):
            weights = precision.startswith("int4")
            return tensorrt and network in (
                *MLPS,
                "transformer",
                *(() if weights else ["resnet50"]),
            )
        if precision == "int8 convolutions":
            return tensorrt and network not in (*MLPS, "transformer")
        if precision == "sparse fp16":
            return tensorrt and network in ("mlp", "transformer", "resnet50")
        if precision == "int4-weights":
            return network in ("transformer", "mlp")  # blocks are for matrices
        return network != "mlp-large" or precision in ("fp32", "fp16")

    all_wishes = [
        Wish(network, engine, precision, method)
        for network in arguments.only
        for engine in arguments.engines
        for precision in arguments.precisions
        if fits(network, engine, precision)
        for method in methods(network, engine, precision)
    ]
    if not on_gpu:
        return [w for w in all_wishes if w.network not in MLPS or arguments.mlp]
    first: list[Wish] = []
    for network, precisions in FIRST:
        for precision in precisions:
            first += [
                w
                for w in all_wishes
                if (w.network, w.engine, w.precision) == (network, "tensorrt", precision)
                and w.method in ("", METHOD, FP8_METHOD)
                and not (w.precision == "int8" and w.method != METHOD)
            ]
    rest = [w for w in all_wishes if w not in first and w.engine == "tensorrt"]
    # Beside it the CPU, as far as that takes no minutes: fp8 is emulated there.
    others = [w for w in all_wishes if w.engine != "tensorrt" and w.network not in MLPS]
    others = [w for w in others if w.precision != "fp8"]
    return first + rest + others


def checks(
    cells: Sequence[Mapping[str, Any]], searches: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Figures and their targets. A cell that was not measured meets none; without cells, no check.

    `met` is None where there is nothing to compare: then `why` says what is missing.
    """
    rows: list[dict[str, Any]] = []
    by = {(c["network"], c["engine"], c["precision"], c["method"]): c for c in cells}

    def cell(network: str, engine: str, precision: str, method: str = "") -> Mapping[str, Any]:
        return by.get((network, engine, precision, method), {})

    def check(what: str, value: Any, target: str, cells: Sequence[Mapping[str, Any]]) -> None:
        sign, limit = target.split()
        met = None
        if value is not None:
            met = bool(value <= float(limit) if sign == "<=" else value >= float(limit))
            if sign == "<":
                met = bool(value < float(limit))
        row = {"what": what, "value": value, "target": target, "met": met}
        why = [f"{c['precision']}: {c['error'][:300]}" for c in cells if c.get("error")]
        rows.append({**row, "why": why[0]} if value is None and why else row)

    for engine in dict.fromkeys(c["engine"] for c in cells):
        fp32, int8 = cell("digits", engine, "fp32"), cell("digits", engine, "int8", METHOD)
        if int8 and int8["state"] != "built":
            lost = _difference(fp32.get("accuracy"), int8.get("accuracy"))
            check(f"digits on {engine}: accuracy lost by int8", lost, "<= 0.01", [int8])
        for network in ("resnet50", "mobilenetv2"):
            int8 = cell(network, engine, "int8", METHOD)
            if int8 and engine in ("onnxruntime", "openvino"):
                check(f"{network} on {engine}: int8, dB", int8.get("snr_db"), ">= 35", [int8])
                what = f"{network} on {engine}: int8, latency / fp32"
                check(what, int8.get("latency_ratio"), "< 1", [int8])
        # Where the recipe leaves convolutions in floats, int8 loses nothing that QAT could win.
        whole = "int8 convolutions" if engine == "tensorrt" else "int8"
        fp32, lost_cell = cell("photos", engine, "fp32"), cell("photos", engine, whole, "max")
        qat = cell("photos", engine, "qat")
        if qat and qat["state"] != "built":
            lost = _difference(fp32.get("accuracy"), lost_cell.get("accuracy"))
            won = _difference(qat.get("accuracy"), lost_cell.get("accuracy"))
            share = won / lost if won is not None and lost else None
            check(f"photos on {engine}: share that QAT wins back", share, ">= 0.9", [qat])
    for row in searches:
        what = f"{row['network']} on onnxruntime: int8 but {len(row['kept'])} nodes"
        check(f"{what}, dB", row.get("snr_db"), ">= 35", [])
        for engine in ("onnxruntime", "openvino"):
            latency = row.get(f"latency_ratio_{engine}")
            check(f"{what.replace('onnxruntime', engine)}, latency / fp32", latency, "< 1", [])
    if any(c["engine"] == "tensorrt" and c["state"] == "measured" for c in cells):
        _check_gpu(cell, check)
    measured = [c for c in cells if c["state"] == "measured"]
    wrong = [c for c in measured if not c["finite"]]
    check("cells with answers that are not finite", len(wrong), "<= 0", [])
    if wrong:
        rows[-1]["cells"] = [str(Wish(*(c[k] for k in KEYS))) for c in wrong]
    return rows


KEYS: Final = ("network", "engine", "precision", "method")
COLUMNS: Final = (*KEYS, "error", "dB", "accuracy", "latency", "nodes", "size")


def _check_gpu(cell: Callable[..., Mapping[str, Any]], check: Callable[..., None]) -> None:
    for network, precision, method in (
        ("mlp", "int8", METHOD),
        ("mlp", "fp8", FP8_METHOD),
        ("resnet50", "fp8", FP8_METHOD),
        ("mlp", "int8 + fp16", METHOD),
        ("mlp", "fp8 + fp16", FP8_METHOD),
        ("mlp", "int8 with fp16 scales", METHOD),
        ("mlp", "fp8 with fp16 scales", FP8_METHOD),
    ):
        found = cell(network, "tensorrt", precision, method)
        # The repaired graph is held against the one that needs no repair.
        sound = cell(network, "tensorrt", precision.removesuffix(" with fp16 scales"), method)
        theirs = sound.get("as_written", {}).get("relative")
        value = found["relative"] / theirs if found.get("relative") is not None and theirs else None
        what = f"{network} {precision} on tensorrt: error / the same graph's on onnxruntime"
        check(what, value, "<= 1.2", [found])
        if precision.endswith("scales"):
            repaired = len(found["repairs"]) if "repairs" in found else None
            check(f"{network} {precision} on tensorrt: repairs", repaired, ">= 1", [found])
    for network in MLPS:
        for precision, method in (("int8 + fp16", METHOD), ("fp8 + fp16", FP8_METHOD)):
            found = cell(network, "tensorrt", precision, method)  # what a candidate gets
            what = f"{network} {precision} on tensorrt: latency / fp16"
            check(what, found.get("ratio_to_fp16"), "<= 1", [found])


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a - b, 6)


def amplification(lab: Lab) -> list[dict[str, Any]]:
    """What networks do to a disturbance, and int8 with it: trained ones, and by their random start.

    Noise 50 dB below the input goes in, and how far it is below the output comes out, in float32.
    """
    found = []
    starts: list[tuple[str, str, Network]] = [
        ("digits", "trained", lab.network("digits")),
        ("photos", "trained", lab.network("photos")),
    ]
    for name in ("resnet50", "mobilenetv2"):
        for label, arguments in (("normalizations as here", {}), ("as PyTorch begins", (1.0, 0.0))):
            network = lab.network(name)
            if arguments:
                network = precision_networks.pictures(name, 1, lab.samples, *arguments)
            starts.append((name, label, network))
    random = np.random.default_rng(0)
    recipe = recipe_for("onnxruntime", lab.cpu.facts["instruction_sets"])
    for name, label, network in starts:
        noisy = [
            {
                key: (x + random.standard_normal(x.shape) * x.std() * 10**-2.5).astype(np.float32)
                for key, x in feed.items()
            }
            for feed in network.test
        ]
        row: dict[str, Any] = {"network": name, "start": label, "noise_in_db": 50}
        observed = observe(network.model, network.calibration)
        with unirt.load(network.model, "onnxruntime@cpu") as session:
            reference = answers(session, network.test)
            row["noise_out_db"] = snr_db(answers(session, noisy), reference)
        own = quantize(network.model, observed.calibration(METHOD), "int8", recipe).model
        for key, model in (("int8", own), ("quantize_static", _by_onnxruntime(network).model)):
            with unirt.load(model, "onnxruntime@cpu") as session:
                row[f"{key}_db"] = snr_db(answers(session, network.test), reference)
        found.append(row)
    return found


def searched(lab: Lab, name: str, decibels: float) -> dict[str, Any]:
    """The fewest nodes to leave in float32 for so many dB, as the CPU's engines compute it.

    Searched on one half of the test inputs, and judged on the other: on the calibration data, that
    weights are rounded on, any graph looks better than it is.
    """
    network = lab.network(name)
    half = len(network.test) // 2
    recipe = recipe_for("onnxruntime", lab.cpu.facts["instruction_sets"])
    started = time.perf_counter()
    found = search(
        network.model,
        lab.observed(name).calibration(METHOD),
        network.test[:half],
        min_snr=decibels,
        recipe=recipe,
        moments=lab.moments(name),
        engine="onnxruntime@cpu",
        options={},  # fused, as it will run
    )
    made = found.quantized
    row: dict[str, Any] = {
        "network": name,
        "wanted_db": decibels,
        "seconds": time.perf_counter() - started,
        "met": found.met,
        "kept": list(found.kept),
        "nodes": len(made.nodes),
    }
    with unirt.load(made.model, "onnxruntime@cpu") as session:
        found_answers = answers(session, network.test[half:])
        row |= judged(found_answers, lab.reference(name)[-len(found_answers) :], None)
    for engine in ("onnxruntime", "openvino"):
        options = lab.options(engine)
        with (
            unirt.load(network.model, f"{engine}@cpu", options=options) as whole,
            unirt.load(made.model, f"{engine}@cpu", options=options) as session,
        ):
            steps = {"fp32": whole.bind(network.timed).run, "int8": session.bind(network.timed).run}
            row[f"latency_ratio_{engine}"] = ratio(in_turns(steps, 0.05, 7, 0.1), "int8", "fp32")
    return row


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"unirt": unirt.__version__, "python": platform.python_version()}
    names = "numpy onnx onnxruntime onnxruntime-gpu openvino ai-edge-litert ai-edge-quantizer"
    for name in (*names.split(), "tensorrt", "tensorrt-rtx-cu13", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(lab: Lab) -> dict[str, Any]:
    """The hardware, without anything that names this one machine."""
    sets = lab.cpu.facts["instruction_sets"]
    found = {"cpu": lab.cpu.name, "cores": lab.cpu.facts["usable_cpus"], "instructions": list(sets)}
    if lab.gpu is not None:
        found |= {"gpu": lab.gpu.name}
        found |= {key: lab.gpu.facts.get(key) for key in ("driver", "compute_capability")}
    return found


def plain(value: Any) -> Any:
    """JSON without NaN or infinity, which are written as text; numbers of 6 digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, str | int | bool | None) else str(value)


def markdown(results: Mapping[str, Any]) -> str:
    """All cells of a file of results as a Markdown table, and its checks as another."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += [_row(cell) for cell in results["cells"]]
    return "\n".join(lines)


def _row(cell: Mapping[str, Any]) -> str:
    shown = [cell["network"], cell["engine"], cell["precision"], cell["method"] or "-"]
    if cell["state"] == "measured":
        shown += [_number(cell["relative"], ".2g"), _number(cell["snr_db"], ".1f")]
        shown.append(_number(cell.get("accuracy"), ".2%").replace("%", " %"))
        shown.append(_number(cell.get("latency_ratio"), ".2f"))
    elif cell["state"] == "built":
        shown += ["builds", "-", "-", "-"]
    else:
        shown += [cell["state"], "-", "-", "-"]
    shown += [str(cell.get("nodes") or "-"), _number(cell.get("size_ratio"), ".2f")]
    return f"| {' | '.join(shown)} |"


def _number(value: float | str | None, form: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{float(value):{form}}"


def page(results: Mapping[str, Any]) -> str:
    """What docs/precision.md shows of a file of results, in Markdown."""
    made = results["machine"]
    where = f"{made['cpu']}, {made['cores']} cores, {', '.join(made['instructions'])}"
    if "gpu" in made:
        where = f"{made['gpu']}, driver {made['driver']}; {where}"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [f"{where}. {versions}. {results['date']}, `{results['command']}`:", ""]
    for network, about in results["networks"].items():
        cells = [c for c in results["cells"] if c["network"] == network and c["state"] != "skipped"]
        lines += _pivot(network, about, cells)
    if not results["cells"]:
        return "\n".join([*lines, *_searched(results["searches"])])
    lines += ["| target | measured | wanted | met |", "|---|---|---|---|"]
    for row in results["checks"]:
        met = {True: "yes", False: "**no**", None: "not measured"}[row["met"]]
        figure = _number(row["value"], ".3g")
        lines.append(f"| {row['what']} | {figure} | {row['target']} | {met} |")
    for title, rows in (("amplification", _amplified), ("searches", _searched)):
        if title in results:
            lines += ["", *rows(results[title])]
    return "\n".join(lines)


def _pivot(
    network: str, about: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    candidates = dict.fromkeys(c["candidate"] for c in cells if "candidate" in c)
    yield f"**{network}**, {about['parameters']:,} parameters. {about['describe']}"
    yield ""
    yield f"| {' | '.join(('precision', 'ranges', 'size', *candidates))} |"
    yield "|---" * (3 + len(candidates)) + "|"
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for cell in cells:
        place = next((c["candidate"] for c in cells if c["engine"] == cell["engine"]), "")
        found.setdefault((cell["precision"], cell["method"]), {})[place] = cell
    for (precision, method), row in found.items():
        sizes = [cell["size_ratio"] for cell in row.values() if "size_ratio" in cell]
        shown = [precision, method or "-", _number(sizes[0] if sizes else None, ".2f")]
        shown += [_shown(row.get(candidate)) for candidate in candidates]
        yield f"| {' | '.join(shown)} |"
    yield ""


def _shown(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["state"] != "measured":
        return {"built": "builds"}.get(cell["state"], "**fails**")
    if not cell["finite"]:
        return "**not finite**"
    close = isinstance(cell["snr_db"], str) or cell["snr_db"] > 100  # float32 itself
    parts = [] if close else [f"{cell['snr_db']:.1f} dB"]
    if "accuracy" in cell:
        parts.append(f"{100 * cell['accuracy']:.2f} %")
    if "latency_ratio" in cell:
        parts.append(f"time {cell['latency_ratio']:.2f}")
    if "ratio_to_fp16" in cell and cell["precision"] != "fp16":
        parts.append(f"{cell['ratio_to_fp16']:.2f} of fp16's")
    return ", ".join(parts)


def _amplified(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    keys = ("noise_out_db", "int8_db", "quantize_static_db")
    yield "| network | start | of 50 dB come out | int8, UniRT | int8, `quantize_static` |"
    yield "|---" * 5 + "|"
    for row in rows:
        figures = (f"{row[key]:.1f} dB" for key in keys)
        yield f"| {row['network']} | {row['start']} | {' | '.join(figures)} |"


def _searched(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    engines = ("onnxruntime", "openvino")
    times = " | ".join(f"time on {engine}" for engine in engines)
    yield f"| network | wanted | nodes in float32 | on the test data | {times} |"
    yield "|---" * 6 + "|"
    for row in rows:
        ratios = (_number(row.get(f"latency_ratio_{engine}"), ".2f") for engine in engines)
        kept = f"{len(row['kept'])} beside {row['nodes']} quantized"
        figure = _number(row.get("snr_db"), ".1f")
        shown = (row["network"], f"{row['wanted_db']:g} dB", kept, f"{figure} dB")
        yield f"| {' | '.join((*shown, *ratios))} |"


def written(text: str, name: str, results: Mapping[str, Any]) -> str:
    """A page with what it shows of one file of results, between two marks, made anew."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, marked, rest = text.partition(begin)
    if not marked or end not in rest:
        raise ValueError(f"the page has no place for {name}: {begin.strip()} and {end}")
    return f"{before}{begin}\n{page(results)}\n\n{end}{rest.partition(end)[2]}"


def summary(results: Mapping[str, Any]) -> str:
    lines = []
    for row in results["checks"]:
        value = _number(row["value"], ".4g")
        verdict = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
        lines.append(f"{verdict:12} {row['what']}: {value}, target {row['target']}")
        if row.get("why"):
            lines.append(f"             {row['why'][:200]}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    lab = Lab(arguments)
    command = ["python", "benchmarks/precision.py", *sys.argv[1:]]
    at = next((i for i, word in enumerate(command) if word.startswith("--out")), None)
    if at is not None:  # where it was written is nobody's business
        del command[at : at + (1 if "=" in command[at] else 2)]
    results: dict[str, Any] = {
        "machine": machine(lab),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(command),
        "settings": {
            "threads": lab.threads,
            "batch": lab.batch,
            "samples": lab.samples,
            "reference": "onnxruntime on the CPU in float32",
            "latency": "medians over rounds in turns with float32 on the same engine",
        },
        "networks": {},
        "cells": [],
        "checks": [],
    }
    queue = wishes(arguments, lab.gpu is not None)
    bench = Bench(lab)
    try:
        for at, wish in enumerate(queue):
            cell: dict[str, Any] = {key: getattr(wish, key) for key in KEYS}
            begin = time.perf_counter()
            if begin - started > arguments.budget:
                results["cells"] += [
                    {**{k: getattr(w, k) for k in KEYS}, "state": "skipped", "error": "out of time"}
                    for w in queue[at:]
                ]
                break
            try:
                bench.measure(wish, cell)
            except Exception as error:  # noqa: BLE001 - recorded; the other cells go on
                cell |= {"state": "failed", "error": told(error)}
            cell["cell_seconds"] = time.perf_counter() - begin
            results["cells"].append(plain(cell))
            print(f"{time.perf_counter() - started:5.0f} s  {wish}: {_told_cell(cell)}", flush=True)
            _save(results, lab, arguments.out)
        bench.close()
        if arguments.amplification:
            results["amplification"] = plain(amplification(lab))
        for wanted in arguments.search or ():
            name, decibels = wanted.split(":")
            results.setdefault("searches", []).append(plain(searched(lab, name, float(decibels))))
    finally:
        bench.close()
        results["seconds"] = round(time.perf_counter() - started, 1)
        _save(results, lab, arguments.out)
    return results


def _told_cell(cell: Mapping[str, Any]) -> str:
    if cell["state"] == "measured":
        ratio = _number(cell.get("latency_ratio"), ".3f")
        accuracy = _number(cell.get("accuracy"), ".4f")
        return f"{cell['snr_db']:.1f} dB, accuracy {accuracy}, latency ratio {ratio}"
    error = f", {cell['error'][:160]}" if cell.get("error") else ""
    return f"{cell['state']}{error}"


def _save(results: dict[str, Any], lab: Lab, folder: Path | None) -> None:
    results["checks"] = plain(checks(results["cells"], results.get("searches", ())))
    results["seconds_of_making"] = lab.made
    if lab.buffers:
        results["settings"]["buffers"] = lab.buffers
    for name in dict.fromkeys(cell["network"] for cell in results["cells"]):
        if name not in results["networks"] and name in lab._networks:
            results["networks"][name] = _described(lab.network(name))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "precision.json.new"
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(folder / "precision.json")


def _described(network: Network) -> dict[str, Any]:
    def rows(feeds: Sequence[Feed]) -> int:
        return sum(len(next(iter(feed.values()))) for feed in feeds)

    return {
        "describe": network.describe,
        "parameters": network.parameters,
        "bytes": size(network.model),
        "calibration_samples": rows(network.calibration),
        "test_samples": rows(network.test),
        "timed": {name: list(array.shape) for name, array in network.timed.items()},
    }


def _listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = [part.strip() for part in text.split(";" if ";" in text else ",") if part.strip()]
        unknown = [part for part in found if part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]}; there are {', '.join(known)}")
        return found

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for precision.json")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and no more")
    parser.add_argument("--page", type=Path, help="with --show: put them into this Markdown file")
    parser.add_argument("--only", type=_listed(list(NETWORKS)), help="of " + ", ".join(NETWORKS))
    parser.add_argument("--engines", type=_listed(ENGINES), help="of " + ", ".join(ENGINES))
    parser.add_argument("--precisions", type=_listed(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--methods", type=_listed(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1, help="of an engine on the CPU")
    parser.add_argument("--samples", type=int, default=8, help="to calibrate and to judge, each")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--amplification", action="store_true", help=amplification.__doc__)
    parser.add_argument(
        "--search", nargs="*", metavar="NETWORK:DB", help=str(searched.__doc__).split("\n")[0]
    )
    parser.add_argument("--budget", type=float, default=900.0, help="no cell starts later")
    arguments = parser.parse_args()
    if arguments.show:
        results = json.loads(arguments.show.read_text())
        if arguments.page:
            text = arguments.page.read_text()
            arguments.page.write_text(written(text, arguments.show.name, results))
    else:
        arguments.mlp = not set(MLPS).isdisjoint(arguments.only or ())
        arguments.only = arguments.only or list(NETWORKS)
        arguments.engines = arguments.engines or list(ENGINES)
        results = run(arguments)
    print(f"\n{markdown(results)}\n\n{summary(results)}")
    sys.exit(any(row["met"] is False for row in results["checks"]))


if __name__ == "__main__":
    main()
