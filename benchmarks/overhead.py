"""What UniRT adds to a call: `Session.run` and `bind` against the raw best practice, interleaved.

    python benchmarks/overhead.py [--out results.json]

For each engine, in one process of its own: a tiny network (one Add on 1x4 floats) and a
MobileNet-like one (depthwise-separable, 224x224, random weights). A round times every variant once,
in a new order; what is printed are medians over the rounds. `raw usual` is the documented call (a
dict of arrays in, new arrays out), `raw best` the fastest one an expert writes (fixed buffers).
Then the cost of `import unirt` over `import numpy`, in fresh interpreters.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], object]


def tiny_onnx() -> bytes:
    from onnx import helper, numpy_helper

    one = numpy_helper.from_array(np.ones((1, 4), np.float32), "one")
    x, y = (helper.make_tensor_value_info(name, 1, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], "g", [x], [y], [one])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, ir_version=8, opset_imports=opset)
    return bytes(model.SerializeToString())


def mobile_onnx() -> bytes:
    """A MobileNet-v1-like stack, about 3 million parameters and 0.5 G multiply-adds."""
    from onnx import helper, numpy_helper

    random_state = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []
    last, channels = "x", 3

    def conv(out: int, kernel: int, stride: int, group: int = 1) -> None:
        nonlocal last, channels
        k = len(nodes)
        shape = (out, channels // group, kernel, kernel)
        scale = np.sqrt(2 / (shape[1] * kernel * kernel))
        weights.append(
            numpy_helper.from_array(
                (random_state.standard_normal(shape) * scale).astype(np.float32), f"w{k}"
            )
        )
        weights.append(numpy_helper.from_array(np.zeros(out, np.float32), f"b{k}"))
        nodes.append(
            helper.make_node(
                "Conv",
                [last, f"w{k}", f"b{k}"],
                [f"c{k}"],
                kernel_shape=[kernel, kernel],
                strides=[stride, stride],
                pads=[kernel // 2] * 4,
                group=group,
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{k}"], [f"r{k}"]))
        last, channels = f"r{k}", out

    conv(32, 3, 2)
    for out, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]:
        conv(channels, 3, stride, channels)
        conv(out, 1, 1)
    for _ in range(5):
        conv(512, 3, 1, 512)
        conv(512, 1, 1)
    conv(512, 3, 2, 512)
    conv(1024, 1, 1)
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        "mobile",
        [helper.make_tensor_value_info("x", 1, [1, 3, 224, 224])],
        [helper.make_tensor_value_info("y", 1, [1, 1024, 1, 1])],
        weights,
    )
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, ir_version=8, opset_imports=opset).SerializeToString())


def tiny_tflite() -> bytes:
    from unirt.testing.tflite_networks import Graph

    graph = Graph()
    x, y = (graph.tensor(name, "float32", [1, 4]) for name in "xy")
    one = graph.constant("one", np.ones((1, 4), np.float32))
    graph.op("ADD", [x, one], [y], "AddOptions")
    return graph.write([x], [y])


def mobile_tflite() -> bytes:
    """The same stack, NHWC, as LiteRT wants it."""
    from unirt.testing.tflite_networks import Graph

    random_state = np.random.default_rng(0)
    graph = Graph()
    relu = graph.schema.ActivationFunctionType.RELU
    same = graph.schema.Padding.SAME
    first = last = graph.tensor("x", "float32", [1, 224, 224, 3])
    channels, size = 3, 224

    def conv(out: int, kernel: int, stride: int, depthwise: bool = False) -> None:
        nonlocal last, channels, size
        k = len(graph.tensors)
        shape = (1, kernel, kernel, out) if depthwise else (out, kernel, kernel, channels)
        scale = np.sqrt(2 / (kernel * kernel * (1 if depthwise else channels)))
        value = (random_state.standard_normal(shape) * scale).astype(np.float32)
        weight = graph.constant(f"w{k}", value)
        bias = graph.constant(f"b{k}", np.zeros(out, np.float32))
        size = -(-size // stride)
        result = graph.tensor(f"r{k}", "float32", [1, size, size, out])
        options = {"padding": same, "strideH": stride, "strideW": stride}
        more = {"depthMultiplier": 1} if depthwise else {}
        graph.op(
            "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D",
            [last, weight, bias],
            [result],
            "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions",
            fusedActivationFunction=relu,
            **options,
            **more,
        )
        last, channels = result, out

    conv(32, 3, 2)
    blocks = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2)]
    for out, stride in blocks:
        conv(channels, 3, stride, depthwise=True)
        conv(out, 1, 1)
    axes = graph.constant("axes", np.array([1, 2], np.int32))
    y = graph.tensor("y", "float32", [1, 1024])
    graph.op("MEAN", [last, axes], [y], "ReducerOptions")
    return graph.write([first], [y])


def raw_onnxruntime(model: bytes, x: Any, threads: int) -> dict[str, Step]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed, names = {"x": x}, ["y"]
    y = session.run(names, feed)[0]
    binding = session.io_binding()
    keep: Any = [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in (x, y)]
    binding.bind_ortvalue_input("x", keep[0])
    binding.bind_ortvalue_output("y", keep[1])
    return {
        "raw usual": lambda: session.run(names, feed),
        "raw best": lambda _=keep: session.run_with_iobinding(binding),  # a binding owns no memory
    }


def raw_openvino(model: bytes, x: Any, threads: int) -> dict[str, Step]:
    import openvino

    core = openvino.Core()
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(model), "CPU", config)
    feed = {"x": x}
    y = np.array(compiled(feed)[0])
    request = compiled.create_infer_request()
    keep = [openvino.Tensor(a, shared_memory=True) for a in (x, y)]
    request.set_input_tensor(0, keep[0])
    request.set_output_tensor(0, keep[1])
    usual = compiled.create_infer_request()

    def best(_: object = (keep, y)) -> object:  # neither does a request
        return request.infer()

    return {"raw usual": lambda: usual.infer(feed, share_inputs=True), "raw best": best}


def raw_tflite(model: bytes, x: Any, threads: int) -> dict[str, Step]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=model, num_threads=threads).get_signature_runner()
    interpreter = Interpreter(model_content=model, num_threads=threads)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]

    def best() -> object:
        interpreter.set_tensor(source, x)
        interpreter.invoke()
        return interpreter.get_tensor(target)

    return {"raw usual": lambda: runner(x=x), "raw best": best}


RAW = {"onnxruntime": raw_onnxruntime, "openvino": raw_openvino, "tflite": raw_tflite}


def measure(steps: dict[str, Step], calls: int, rounds: int) -> dict[str, float]:
    """Median microseconds a call, and the median over rounds of each pair's ratio."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for step in steps.values():
        for _ in range(max(10, calls // 10)):
            step()
    gc.disable()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            step = steps[name]
            step()
            started = time.perf_counter_ns()
            for _ in range(calls):
                step()
            times[name].append((time.perf_counter_ns() - started) / calls / 1000)
    gc.enable()
    found = {name: statistics.median(values) for name, values in times.items()}
    for mine, theirs in (("run", "raw usual"), ("bind", "raw best")):
        pairs = list(zip(times[mine], times[theirs], strict=True))
        found[f"{mine} - {theirs}"] = statistics.median(a - b for a, b in pairs)
        found[f"{mine} / {theirs}"] = statistics.median(a / b for a, b in pairs)
    return found


def engine(name: str) -> dict[str, dict[str, float]]:
    import unirt

    random.seed(0)
    results = {}
    for label, calls, rounds in (("tiny", 2000, 31), ("mobile", 6, 41)):
        in_tflite = name == "tflite"
        model = {
            ("tiny", False): tiny_onnx,
            ("tiny", True): tiny_tflite,
            ("mobile", False): mobile_onnx,
            ("mobile", True): mobile_tflite,
        }[label, in_tflite]()
        shape = (1, 4) if label == "tiny" else (1, 224, 224, 3) if in_tflite else (1, 3, 224, 224)
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        steps = RAW[name](model, x, 1)
        with unirt.load(model, f"{name}@cpu", options={"threads": 1}) as session:
            feed = {"x": x}
            binding = session.bind({"x": x})
            steps |= {"run": lambda s=session, f=feed: s.run(f), "bind": binding.run}  # type: ignore[misc]
            results[label] = measure(steps, calls, rounds)
            del binding, steps
    return results


def import_cost(rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of whole interpreters, interleaved."""
    times: dict[str, list[float]] = {"numpy": [], "unirt": []}
    for _ in range(rounds):
        for module, values in times.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            values.append(1000 * (time.perf_counter() - started))
    extra = [b - a for a, b in zip(times["numpy"], times["unirt"], strict=True)]
    found = {name: statistics.median(values) for name, values in times.items()}
    return {**found, "unirt - numpy": statistics.median(extra)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", choices=RAW, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(engine(args.engine)))
        return
    import unirt

    packages = ["numpy", "onnxruntime", "openvino", "ai-edge-litert"]
    results: dict[str, Any] = {
        "machine": {
            "cpu": unirt.devices()[0].name,
            "cores": unirt.devices()[0].facts["usable_cpus"],
            "python": platform.python_version(),
            "system": platform.system(),
        },
        "versions": {"unirt": unirt.__version__, **{name: version(name) for name in packages}},
        "command": "python benchmarks/overhead.py",
        "unit": "microseconds a call, medians; one thread",
        "engines": {},
    }
    for name in RAW:
        command = [sys.executable, __file__, "--engine", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results["engines"][name] = found = json.loads(done.stdout.splitlines()[-1])
        for label, row in found.items():
            text = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
            print(f"{name:12} {label:7} {text}")
    results["import_ms"] = import_cost()
    print("import ms   ", "  ".join(f"{k} {v:.1f}" for k, v in results["import_ms"].items()))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
