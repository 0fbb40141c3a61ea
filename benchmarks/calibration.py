"""Calibration against ONNX Runtime's: how fast, how far apart, and what each method is worth.

    python benchmarks/calibration.py [--network digits|mobile] [--calls N] [--out results.json]

Both calibrate the same tensors, every float32 one of the main graph, on the same calls in one
process: UniRT's `observe` and then each method, and `create_calibrator` with 2,048 bins and 128
quantized bins. Printed are the ranges of the four methods beside each other, ONNX Runtime's
entropy, the times, and what quantizing activations alone by each method costs: int8, symmetric, at
the inputs of Conv, Gemm and MatMul, weights in float32, on samples that did not calibrate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnxruntime import quantization

from unirt.accuracy import snr_db
from unirt.precision import Calibration, observe
from unirt.precision.calibration.histogram import METHODS, PERCENTILE

ROOT = Path(__file__).parent.parent
BINS, LEVELS = 2048, 128


def digits(calls: int) -> tuple[bytes, list[Any], Any, Any]:
    folder = ROOT / "examples" / "digits"
    with np.load(folder / "test.npz") as arrays:
        images, labels = arrays["image"], arrays["labels"]
    half = len(images) // 2
    feeds = [{"image": part} for part in np.split(images[: half // calls * calls], calls)]
    held_out = {"image": images[half:]}
    return (folder / "digits.onnx").read_bytes(), feeds, held_out, labels[half:]


def mobile(calls: int) -> tuple[bytes, list[Any], Any, Any]:
    sys.path.insert(0, str(Path(__file__).parent))
    from overhead import mobile_onnx

    model = mobile_onnx()
    shape = [
        d.dim_value for d in onnx.load_from_string(model).graph.input[0].type.tensor_type.shape.dim
    ]
    random = np.random.default_rng(0)
    feeds = [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(calls + 1)]
    return model, feeds[:-1], feeds[-1], None


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[Any]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self._feeds, None)


def theirs(model: bytes, feeds: list[Any], method: str, **options: Any) -> tuple[Any, float, float]:
    """Ranges by tensor, and the seconds of the whole and of the search alone."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "model.onnx")
        onnx.save(inferred, path)
        started = time.perf_counter()
        calibrator = quantization.create_calibrator(
            path,
            augmented_model_path=str(Path(folder, "augmented.onnx")),
            calibrate_method=getattr(quantization.CalibrationMethod, method),
            extra_options={"symmetric": False, **options},
        )
        calibrator.collect_data(Reader(feeds))
        collected = time.perf_counter()
        found = calibrator.compute_data()
        ended = time.perf_counter()
    ranges = {
        name: (float(np.min(found[name].range_value[0])), float(np.max(found[name].range_value[1])))
        for name in found.data
    }
    return ranges, ended - started, ended - collected


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def with_rounded_inputs(model: bytes, calibration: Calibration) -> onnx.ModelProto:
    """Q/DQ in front of what computes, by symmetric int8."""
    proto = onnx.load_from_string(model)
    nodes: list[Any] = []
    done: set[str] = set()
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            for position, name in enumerate(node.input):
                if name not in calibration.ranges:
                    continue
                if name not in done:
                    done.add(name)
                    scale = np.float32(calibration.ranges[name].size / (LEVELS - 1))
                    zero = np.int8(0)
                    for suffix, value in (("scale", scale), ("zero", zero)):
                        tensor = numpy_helper.from_array(np.asarray(value), f"{name}__{suffix}")
                        proto.graph.initializer.append(tensor)
                    given = [f"{name}__scale", f"{name}__zero"]
                    nodes.append(helper.make_node("QuantizeLinear", [name, *given], [f"{name}__q"]))
                    nodes.append(
                        helper.make_node("DequantizeLinear", [f"{name}__q", *given], [f"{name}__d"])
                    )
                node.input[position] = f"{name}__d"
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def measure(network: str, calls: int) -> dict[str, Any]:
    model, feeds, held_out, labels = {"digits": digits, "mobile": mobile}[network](calls)
    started = time.perf_counter()
    observed = observe(model, feeds)
    times = {"observe": time.perf_counter() - started}
    calibrations: dict[str, Calibration] = {}
    for method in METHODS:
        started = time.perf_counter()
        calibrations[method] = observed.calibration(method)
        times[method] = time.perf_counter() - started
    entropy = theirs(model, feeds, "Entropy", num_bins=BINS, num_quantized_bins=LEVELS)
    percentile = theirs(model, feeds, "Percentile", num_bins=BINS, percentile=PERCENTILE)
    extremes = theirs(model, feeds, "MinMax")

    (expected,) = session(onnx.load_from_string(model)).run(None, held_out)
    worth = {}
    for method, calibration in calibrations.items():
        (got,) = session(with_rounded_inputs(model, calibration)).run(None, held_out)
        worth[method] = {"snr_db": snr_db(got, expected)}
        if labels is not None:
            worth[method]["accuracy"] = float((got.argmax(1) == labels).mean())
    apart = {}
    for method, (ranges, *_) in (
        ("max", extremes), ("entropy", entropy), ("percentile", percentile)
    ):  # fmt: skip
        own = calibrations[method].ranges
        apart[method] = {
            name: max(abs(own[name].low - low), abs(own[name].high - high))
            / (2 * observed.histograms[name].size / BINS)
            for name, (low, high) in ranges.items()
        }
    return {
        "network": network,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("numpy", "onnxruntime")},
        "samples": observed.samples,
        "tensors": len(observed.histograms),
        "values": sum(histogram.values for histogram in observed.histograms.values()),
        "seconds": times,
        "onnxruntime_seconds": {"entropy": entropy[1], "entropy search": entropy[2]},
        "ratio": entropy[1] / (times["observe"] + times["entropy"]),
        "search_ratio": entropy[2] / times["entropy"],
        "float_accuracy": None if labels is None else float((expected.argmax(1) == labels).mean()),
        "worth": worth,
        "ranges": {
            name: {
                **{m: [c.ranges[name].low, c.ranges[name].high] for m, c in calibrations.items()},
                "onnxruntime entropy": list(entropy[0].get(name, (None, None))),
            }
            for name in observed.histograms
        },
        "bins_apart": apart,
    }


def show(found: dict[str, Any]) -> None:
    methods = [*METHODS, "onnxruntime entropy"]
    print(f"{found['network']}: {found['samples']} calls, {found['tensors']} tensors, "
          f"{found['values']:,} values; {found['machine']}\n")  # fmt: skip
    print(f"{'tensor':36}" + "".join(f"{method:>22}" for method in methods))
    for name, ranges in found["ranges"].items():
        cells = (
            f"{ranges[m][0]:9.3f} to {ranges[m][1]:8.3f}" if ranges[m][0] is not None else "-"
            for m in methods
        )
        print(f"{name[-35:]:36}" + "".join(f"{cell:>22}" for cell in cells))
    print("\nbins from ONNX Runtime's, of 2,048: median, largest")
    for method, apart in found["bins_apart"].items():
        print(f"  {method:10} {np.median(list(apart.values())):8.2f} {max(apart.values()):8.2f}")
    print("\nactivations alone in int8, on other samples")
    for method, worth in found["worth"].items():
        told = "  ".join(f"{key} {value:.4f}" for key, value in worth.items())
        print(f"  {method:10} {told}")
    if found["float_accuracy"] is not None:
        print(f"  {'float32':10} accuracy {found['float_accuracy']:.4f}")
    seconds, their = found["seconds"], found["onnxruntime_seconds"]
    print("\nseconds: " + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()))
    print(
        f"ONNX Runtime's entropy: {their['entropy']:.2f}, its search {their['entropy search']:.2f}"
    )
    print(f"ratio: {found['ratio']:.1f} in all, {found['search_ratio']:.1f} for the search")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=["digits", "mobile"], default="digits")
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.network, arguments.calls)
    show(found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
