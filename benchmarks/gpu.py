"""TensorRT through UniRT on one GPU: right answers, and times beside every other way to run it.

    python benchmarks/gpu.py --out FOLDER [--only accuracy,overhead] [--quick]

Needs an NVIDIA GPU, TensorRT (for RTX or not), cuda-bindings, PyTorch, torchvision, transformers,
onnx, pytest and pytest-timeout; Polygraphy and onnxruntime-gpu each for one competitor. Weights
are random with a seed.

All that is compared runs in one process, in turns; figures are medians over the rounds, ratios the
medians of the rounds' ratios. A section that fails is recorded with its traceback and the others
go on. FOLDER/gpu.json is written after every section, and a short table printed last.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_lab
import numpy as np
import torch
from gpu_lab import (
    bound,
    bytes_in_use,
    difference,
    in_threads,
    interleaved,
    mapped,
    on_device,
    rate_ratio,
    throughputs,
)
from gpu_networks import TENSORRT, Lab, quantized_mlp
from gpu_rivals import (
    Half,
    RawEngine,
    library,
    onnxruntime_has_cuda,
    onnxruntime_step,
    polygraphy_runner,
    raw_throughput,
    torch_step,
)

import unirt


class Report:
    """One section's findings: data for the file, and the checks that the table shows."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.checks: list[dict[str, Any]] = []
        self.errors: dict[str, str] = {}

    def check(
        self, what: str, value: float | None, *, most: float = math.inf, least: float = -math.inf
    ) -> None:
        """A figure and its target; without one it is for information. NaN meets no target."""
        target = None
        if most != math.inf:
            target = f"<= {most:g}"
        elif least != -math.inf:
            target = f">= {least:g}"
        met = None if target is None else value is not None and bool(least <= value <= most)
        self.checks.append({"what": what, "value": value, "target": target, "met": met})

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; None, and its error on record, where it fails."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - one part less, recorded
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            self.errors[name] = f"{type(error).__name__}: {error} ({place})"[:1500]
            return None


LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def accuracy(lab: Lab, report: Report) -> None:
    """Errors against PyTorch in fp32 without TF32; NaN and infinity never pass."""
    for name, sizes in (("resnet50", (8,)), ("bert", (8, 128))):
        for precision, limit in LIMITS.items():
            label = f"{name} {precision}"
            found = report.attempt(label, lambda a=(name, sizes, precision): _accuracy(lab, *a))
            report.data[label] = {**(found or {}), "limit_relative": limit}
            report.check(label, found["relative"] if found else None, most=limit)
    _quantized(lab, report)


def tf32(lab: Lab, report: Report) -> None:
    """fp32 where the environment lets RTX use TF32, which it reads once: in a fresh process."""
    if os.environ.get(TF32_OVERRIDE) == "1":
        for name, sizes in (("resnet50", (8,)), ("bert", (8, 128))):
            found = report.attempt(name, lambda a=(name, sizes, "fp32"): _accuracy(lab, *a))
            report.data[name] = found or {}
            report.check(f"{name} fp32 with TF32", found["relative"] if found else None)
        return
    folder = lab.folder / "tf32"
    command = [sys.executable, __file__, "--only", "tf32", "--out", str(folder)]
    done = subprocess.run(
        command + ["--quick"] * lab.quick,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, TF32_OVERRIDE: "1"},
    )
    if not (folder / "gpu.json").is_file():
        raise RuntimeError(f"the process with TF32 failed: {done.stderr[-1500:]}")
    section = json.loads((folder / "gpu.json").read_text())["sections"]["tf32"]
    report.checks.extend(section["checks"])
    report.errors.update(section["part_errors"])
    report.data.update(section["data"])


def _accuracy(lab: Lab, name: str, sizes: tuple[int, ...], precision: str) -> dict[str, Any]:
    network = lab.network(name)
    feed = network.make(*sizes, seed=7)
    tensors = tuple(on_device(feed).values())
    with torch.inference_mode():
        expected = network.module(*tensors).cpu().numpy()
    candidate = TENSORRT if precision == "fp32" else f"{TENSORRT}:{precision}"
    with (
        lab.build(network.model, candidate, profiles=[network.profile(*sizes)]) as engine,
        engine.session() as session,
    ):
        found = difference(next(iter(session.run(feed).values())), expected)
        found["build_seconds"] = engine.build_seconds
    if precision in AUTOCAST:
        with torch.inference_mode(), torch.autocast("cuda", AUTOCAST[precision]):
            theirs = network.module(*tensors).float().cpu().numpy()
        found["pytorch_autocast"] = difference(theirs, expected)
    return found


def _quantized(lab: Lab, report: Report) -> None:
    rows, width = (64, 512) if lab.quick else (512, 4096)
    with ExitStack() as stack:
        steps = {}
        for kind, scales, limit in (
            ("int8", "float32", 0.05),
            ("int8", "float16", 0.05),
            ("fp8", "float32", 0.12),
            ("fp8", "float16", 0.12),
        ):
            label = f"mlp {kind}, {scales} scales"

            def one(kind: str = kind, scales: str = scales, label: str = label) -> dict[str, Any]:
                model, x, plain, emulated = quantized_mlp(kind, scales, rows, width)
                engine = stack.enter_context(lab.build(model))
                session = stack.enter_context(engine.session())
                y = next(iter(session.run({"x": x}).values()))
                steps[label] = bound(session, {"x": x})[0].run
                return {
                    **difference(y, plain),
                    "against_emulated": difference(y, emulated),
                    "facts": dict(engine.facts),
                }

            found = report.attempt(label, one)
            report.data[label] = {**(found or {}), "limit_relative": limit}
            report.check(label, found["relative"] if found else None, most=limit)
        report.data["mlp times"] = interleaved(steps, rounds=5).to_dict()


def overhead(lab: Lab, report: Report) -> None:
    """Device memory in and out: UniRT against the bare loop, over the same plan."""
    for label, name, sizes, candidate in (
        ("resnet50 fp16 b1", "resnet50", (1,), f"{TENSORRT}:fp16"),
        ("resnet50 fp16 b8", "resnet50", (8,), f"{TENSORRT}:fp16"),
        ("tiny", "tiny", (), TENSORRT),
    ):
        report.attempt(label, lambda a=(label, name, sizes, candidate): _overhead(lab, report, *a))


def _overhead(
    lab: Lab, report: Report, label: str, name: str, sizes: tuple[int, ...], candidate: str
) -> None:
    network = lab.network(name)
    profiles = [network.profile(*sizes)] if sizes else []
    with ExitStack() as stack:
        engine = stack.enter_context(lab.build(network.model, candidate, profiles=profiles))
        session = stack.enter_context(engine.session())
        feed = network.make(*sizes, seed=3)
        tensors = on_device(feed)
        binding, outputs = bound(session, feed)
        native = {name: _device_array(tensor, engine) for name, tensor in tensors.items()}
        steps = {
            "bind": binding.run,
            "run, PyTorch tensor": lambda: session.run(tensors, device_outputs=True),
            "run, DeviceArray": lambda: session.run(native, device_outputs=True),
        }
        raw = RawEngine(engine.plan)
        agreement = {}
        for kind, graphs in (("raw", False), ("raw, its graphs", True)):
            loop = report.attempt(f"{label} {kind}", lambda g=graphs: raw.loop(tensors, graphs=g))
            if loop is not None:
                steps[kind] = loop.step
                binding.run()
                mine, theirs = next(iter(outputs.values())), next(iter(loop.outputs.values()))
                agreement[kind] = difference(mine.float().cpu(), theirs.float().cpu())
        plain = report.attempt(f"{label} capture", lambda: raw.loop(tensors, graphs=False))
        captured = report.attempt(f"{label} captured", plain.captured) if plain else None
        if captured is not None:
            steps["raw, captured by hand"] = captured
        times = interleaved(steps, rounds=7 if lab.quick else 21)
        report.data[label] = {
            **times.to_dict(),
            "agreement": agreement,
            "facts": dict(engine.facts),
            "build_seconds": engine.build_seconds,
        }
        usual = ("raw", "raw, its graphs")
        report.check(f"{label}: bind / raw", times.ratio("bind", *usual), most=1.02)
        # The target is for networks of real size; a call of a tiny one is all overhead. DLPack is
        # PyTorch's and Python's part of it.
        most = 1.02 if sizes else math.inf
        report.check(f"{label}: run / raw", times.ratio("run, DeviceArray", *usual), most=most)
        through = times.ratio("run, PyTorch tensor", *usual)
        report.check(f"{label}: run with PyTorch's DLPack / raw", through)
        best = times.ratio("bind", "raw, captured by hand")
        report.check(f"{label}: bind / captured by hand", best)
        binding.close()


def _device_array(tensor: Any, engine: Any) -> Any:
    """The tensor as UniRT's own array, which needs no DLPack at each call."""
    names = {torch.float32: "float32", torch.float16: "float16", torch.int64: "int64"}
    return unirt.DeviceArray(
        tensor.data_ptr(), tuple(tensor.shape), names[tensor.dtype], engine.device.index, tensor
    )


def host(lab: Lab, report: Report) -> None:
    """Host arrays in and out: UniRT against Polygraphy's runner, over the same plan."""
    network = lab.network("resnet50")
    with ExitStack() as stack:
        engine = stack.enter_context(
            lab.build(network.model, f"{TENSORRT}:fp16", profiles=[network.profile(1)])
        )
        session = stack.enter_context(engine.session())
        feed = network.make(1, seed=3)
        binding = session.bind({name: array.copy() for name, array in feed.items()})
        steps: dict[str, Any] = {"run": lambda: session.run(feed), "bind": binding.run}
        raw = report.attempt(
            "raw", lambda: RawEngine(engine.plan).loop(on_device(feed), graphs=True)
        )
        if raw is not None:
            steps["raw, pinned copies"] = raw.from_host(feed)
        runner = report.attempt("polygraphy", lambda: polygraphy_runner(engine.plan))
        if runner is not None:
            stack.callback(runner.deactivate)
            steps["Polygraphy"] = lambda: runner.infer(feed)
            steps["Polygraphy, unchecked"] = lambda: runner.infer(feed, check_inputs=False)
            y = next(iter(session.run(feed).values()))
            theirs = np.array(next(iter(runner.infer(feed).values())))
            report.data["agreement"] = difference(y, theirs)
        times = interleaved(steps, rounds=7 if lab.quick else 21)
        report.data |= {**times.to_dict(), "facts": dict(engine.facts)}
        theirs = ("Polygraphy", "Polygraphy, unchecked")
        report.check("run / Polygraphy", times.ratio("run", *theirs), most=0.6)
        report.check("bind / Polygraphy", times.ratio("bind", *theirs), most=0.6)
        report.check("run / raw with pinned copies", times.ratio("run", "raw, pinned copies"))


def engines(lab: Lab, report: Report, compile_seconds: float = 60.0) -> None:
    """Other engines on the device, each as a ratio to UniRT's bind: above 1, UniRT is faster."""
    torch.backends.cudnn.benchmark = True
    cases = [("resnet50", (1,)), ("resnet50", (8,)), ("resnet50", (64,))]
    cases += [("bert", (1, 128)), ("bert", (8, 128))]
    spent = 0.0
    if not onnxruntime_has_cuda():
        lab.note("no onnxruntime with the CUDA provider is installed; not compared")
    for name, sizes in cases:
        label = f"{name} fp16 {'x'.join(map(str, sizes))}"
        started = time.perf_counter()
        with_compile = not lab.quick and spent < compile_seconds
        took = report.attempt(
            label, lambda a=(name, sizes, label, with_compile): _engines(lab, report, *a)
        )
        spent += took if took is not None else time.perf_counter() - started


def _engines(
    lab: Lab, report: Report, name: str, sizes: tuple[int, ...], label: str, with_compile: bool
) -> float:
    """Returns the seconds that torch.compile took."""
    network = lab.network(name)
    seconds = 0.0
    with ExitStack() as stack:
        engine = stack.enter_context(
            lab.build(network.model, f"{TENSORRT}:fp16", profiles=[network.profile(*sizes)])
        )
        session = stack.enter_context(engine.session())
        feed = network.make(*sizes, seed=3)
        binding, outputs = bound(session, feed)
        output = next(iter(outputs.values()))
        steps: dict[str, Any] = {"unirt": binding.run}
        half = Half(network.module, name == "resnet50")
        others: dict[str, Callable[[], Any]] = {"PyTorch graph": lambda: torch_step(half, feed)}
        if with_compile:
            compiled = torch.compile(half, dynamic=False)
            others["torch.compile, graph"] = lambda: torch_step(compiled, feed)
        if onnxruntime_has_cuda():
            model = engine.file.read()  # what the engine was built from, cast as it is
            for graph in (False, True):
                others["ONNX Runtime" + ", graph" * graph] = lambda graph=graph: onnxruntime_step(
                    model, feed, output, graph=graph
                )
        for other, make in others.items():
            started = time.perf_counter()
            step = report.attempt(f"{label} {other}", make)
            if other.startswith("torch.compile"):
                seconds = time.perf_counter() - started
            if step is not None:
                steps[other] = step
        times = interleaved(steps, rounds=5 if lab.quick else 11)
        ratios = {other: times.ratio(other, "unirt") for other in steps if other != "unirt"}
        report.data[label] = {
            **times.to_dict(),
            "times_of_unirt": ratios,
            "compile_seconds": seconds or None,
        }
        best = min((r for r in ratios.values() if r is not None), default=None)
        report.check(f"{label}: fastest other / unirt", best)
        binding.close()
    if with_compile:
        torch.compiler.reset()
    return seconds


def map_(lab: Lab, report: Report) -> None:
    """A stream of host arrays against the same lanes kept busy without leaving the device."""
    lanes = 4
    network = lab.network("resnet50")
    for batch in (8, 1):
        label = f"resnet50 fp16 b{batch}"

        def one(batch: int = batch, label: str = label) -> None:
            with ExitStack() as stack:
                engine = stack.enter_context(
                    lab.build(
                        network.model,
                        f"{TENSORRT}:fp16",
                        profiles=[network.profile(batch)],
                        options={"lanes": lanes},
                    )
                )
                session = stack.enter_context(engine.session())
                feeds = [network.make(batch, seed=seed) for seed in range(3 * lanes)]
                resident = [on_device(feed) for feed in feeds]
                bindings = [bound(session, feeds[i])[0] for i in range(lanes)]
                loops = {
                    "map": mapped(session, feeds),
                    "map, twice as deep": mapped(session, feeds, in_flight=2 * lanes),
                    "map on the device": mapped(session, resident, device_outputs=True),
                    "bindings": in_threads([binding.run for binding in bindings]),
                    "one binding": in_threads([bindings[0].run]),
                    "run in a loop": in_threads([lambda: session.run(feeds[0])]),
                }
                raw = report.attempt(f"{label} raw", lambda: RawEngine(engine.plan))
                if raw is not None:
                    loops["raw streams"] = raw_throughput(
                        [raw.loop(resident[i], graphs=True) for i in range(lanes)]
                    )
                found = throughputs(loops, rounds=3 if lab.quick else 5)
                report.data[label] = {**found, "batch": batch, "lanes": session.lanes}
                report.check(
                    f"{label}: map / bindings", rate_ratio(found, "map", "bindings"), least=0.9
                )
                report.check(f"{label}: map / raw streams", rate_ratio(found, "map", "raw streams"))
                report.check(
                    f"{label}: map / run in a loop", rate_ratio(found, "map", "run in a loop")
                )
                _check_order(session, feeds, report, label)
                for binding in bindings:
                    binding.close()

        report.attempt(label, one)


def _check_order(session: Any, feeds: list[Any], report: Report, label: str) -> None:
    """`map` gives each input its own answer, in order."""
    expected = [session.run(feed) for feed in feeds]
    wrong = 0
    for found, wanted in zip(session.map(feeds), expected, strict=True):
        wrong += any(difference(found[n], wanted[n])["relative"] > 1e-2 for n in wanted)
    report.check(f"{label}: wrong answers of map", wrong, most=0)


def streams(lab: Lab, report: Report) -> None:
    """Images a second with 1, 2, 4 and 8 lanes, batch 1: on the device, and from host arrays."""
    network = lab.network("resnet50")
    with ExitStack() as stack:
        loops = {}
        feeds = [network.make(1, seed=seed) for seed in range(16)]
        for lanes in (1, 2, 4, 8):

            def one(lanes: int = lanes) -> None:
                engine = stack.enter_context(
                    lab.build(
                        network.model,
                        f"{TENSORRT}:fp16",
                        profiles=[network.profile(1)],
                        options={"lanes": lanes},
                    )
                )
                session = stack.enter_context(engine.session())
                bindings = [bound(session, feeds[i])[0] for i in range(lanes)]
                loops[f"device {lanes}"] = in_threads([binding.run for binding in bindings])
                loops[f"map {lanes}"] = mapped(session, feeds)

            report.attempt(f"lanes {lanes}", one)
        found = throughputs(loops, rounds=3 if lab.quick else 5)
        report.data |= found
        for kind in ("device", "map"):
            for lanes in (2, 4, 8):
                ratio = rate_ratio(found, f"{kind} {lanes}", f"{kind} 1")
                report.check(f"{kind}: {lanes} lanes / 1 lane", ratio)


START = """
import json, sys, time
begin = time.perf_counter()
import numpy as np, unirt
try:
    import tensorrt_rtx
except ImportError:
    import tensorrt
from cuda.bindings import runtime as cudart
imported = time.perf_counter()
cudart.cudaFree(0)
cuda = time.perf_counter()
path, cache = sys.argv[1:]
shape = (1, 3, 224, 224)
engine = unirt.build(path, "tensorrt@cuda:0:fp16", profiles=[unirt.ShapeProfile({"x": shape})],
                     options={"cache": cache})
built = time.perf_counter()
session = engine.session()
opened = time.perf_counter()
y = session.run({"x": np.ones(shape, np.float32)})
ran = time.perf_counter()
session.close(); engine.close()
closed = time.perf_counter()
print(json.dumps({"imports": imported - begin, "cuda": cuda - imported, "build": built - cuda,
                  "session": opened - built, "run": ran - opened, "close": closed - ran,
                  "start": ran - cuda, "all": ran - begin,
                  "sum": float(np.abs(next(iter(y.values()))).sum()),
                  "facts": json.loads(json.dumps(dict(engine.facts), default=str))}))
"""


def start(lab: Lab, report: Report) -> None:
    """Fresh processes: with an empty cache folder, then with the one that the first filled."""
    path = lab.folder / "resnet50.onnx"
    path.write_bytes(lab.network("resnet50").onnx)
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for attempt in range(1 if lab.quick else 3):
        cache = lab.folder / f"start{attempt}"
        for kind in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-c", START, str(path), str(cache)],
                capture_output=True,
                text=True,
                timeout=180,
                cwd=lab.folder,  # so that only what is installed is imported
            )
            if done.returncode:
                raise RuntimeError(f"the {kind} start failed: {done.stderr[-1500:]}")
            runs[kind].append(json.loads(done.stdout.splitlines()[-1]))

    def middle(kind: str, what: str) -> float:
        return float(np.median([run[what] for run in runs[kind]]))

    parts = ("imports", "cuda", "build", "session", "run", "close", "start", "all")
    report.data["seconds"] = {k: {part: middle(k, part) for part in parts} for k in runs}
    report.data["facts"] = {kind: found[-1]["facts"] for kind, found in runs.items()}
    report.data["same_answer"] = len({round(r["sum"], 2) for rs in runs.values() for r in rs}) == 1
    report.check("cold, seconds", middle("cold", "start"))
    report.check("warm / cold", middle("warm", "start") / middle("cold", "start"), most=0.15)
    with_imports = middle("warm", "all") / middle("cold", "all")
    report.check("warm / cold, imports and CUDA included", with_imports)


def hot(lab: Lab, report: Report) -> None:
    """Batch 1 and 8 of an engine for 1 to 64, with and without hot shapes for them."""
    network = lab.network("resnet50")
    ranged = network.ranged((1,), (8,), (64,))
    hot_shapes = [{"x": (1, 3, 224, 224)}, {"x": (8, 3, 224, 224)}]
    with ExitStack() as stack:
        steps = {}
        for kind, more in (("ranged", {}), ("hot", {"hot_shapes": hot_shapes})):
            engine = stack.enter_context(
                lab.build(network.model, f"{TENSORRT}:fp16", profiles=[ranged], **more)
            )
            session = stack.enter_context(engine.session())
            report.data[f"{kind} build_seconds"] = engine.build_seconds
            for batch in (1, 8, 64):
                bind = report.attempt(
                    f"{kind} {batch}", lambda s=session, b=batch: bound(s, network.make(b, seed=1))
                )
                if bind is not None:
                    steps[f"{kind} b{batch}"] = bind[0].run
        times = interleaved(steps, rounds=5 if lab.quick else 11)
        report.data |= times.to_dict()
        for batch in (1, 8, 64):
            report.check(
                f"b{batch}: hot / ranged", times.ratio(f"hot b{batch}", f"ranged b{batch}")
            )


def threads(lab: Lab, report: Report, workers: int = 16) -> None:
    """Many threads on one session, every call with its own input and batch: wrong answers."""
    calls = 50 if lab.quick else 500
    network = lab.network("mlp")
    random_state = np.random.default_rng(0)
    sizes = random_state.integers(1, 33, (workers, calls))
    every = network.make(int(sizes.sum()), seed=11)["x"]
    with torch.inference_mode():
        expected = network.module(torch.from_numpy(every).to(gpu_lab.DEVICE)).cpu().numpy()
    ends = sizes.ravel().cumsum()
    wrong, errors = [0] * workers, []
    with ExitStack() as stack:
        profile = network.ranged((1,), (16,), (32,))
        engine = stack.enter_context(
            lab.build(
                network.model,
                profiles=[profile],
                hot_shapes=[{"x": (1, 64)}],
                options={"lanes": 4},
            )
        )
        session = stack.enter_context(engine.session())
        barrier = threading.Barrier(workers)

        def answer(x: Any, call: int) -> Any:
            if call % 8 == 3:
                return session.submit({"x": x}).result()["y"]
            if call % 8 == 7:
                return session.run({"x": x}, device_outputs=True)["y"].numpy()
            return session.run({"x": x})["y"]

        def work(worker: int) -> None:
            barrier.wait()
            for call in range(calls):
                end = ends[worker * calls + call]
                rows = slice(end - sizes[worker, call], end)
                try:
                    y = answer(every[rows], call)
                    good = y.shape == expected[rows].shape and np.allclose(
                        y, expected[rows], rtol=1e-3, atol=1e-3
                    )
                    wrong[worker] += not good
                except Exception as error:  # noqa: BLE001 - counted
                    errors.append(f"{type(error).__name__}: {error}"[:500])

        pool = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
        started = time.perf_counter()
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        seconds = time.perf_counter() - started
    report.data |= {
        "threads": workers,
        "calls": workers * calls,
        "wrong": sum(wrong),
        "errors": len(errors),
        "first_errors": errors[:3],
        "calls_per_second": workers * calls / seconds,
    }
    report.check(f"wrong answers and errors of {workers * calls}", sum(wrong) + len(errors), most=0)


def memory(lab: Lab, report: Report) -> None:
    """Engines and sessions opened and closed again and again, from the cache."""
    import psutil

    process = psutil.Process()
    for name, sizes, limit in (("mlp", (8,), 70.0), ("resnet50", (1,), 70.0)):
        report.attempt(name, lambda a=(name, sizes, limit): _memory(lab, report, process, *a))


def _memory(
    lab: Lab, report: Report, process: Any, name: str, sizes: tuple[int, ...], limit: float
) -> None:
    wanted = 20 if lab.quick else 200
    network = lab.network(name)
    feed = network.make(*sizes, seed=1)
    profile = network.profile(*sizes)
    with lab.build(network.model, f"{TENSORRT}:fp16", profiles=[profile]) as engine:
        model, plan = engine.model, engine.plan  # cast already: a cycle opens, runs and closes

    def cycle() -> None:
        with (
            lab.build(model, TENSORRT, profiles=[profile]) as engine,
            engine.session() as session,
        ):
            session.run(feed)

    tensors = on_device(feed)

    def raw_cycle() -> None:
        raw = RawEngine(plan)
        raw.loop(tensors, graphs=False).close()
        del raw

    def repeat(cycle: Callable[[], None], wanted: int, limit: float) -> dict[str, Any]:
        for _ in range(5):
            cycle()
        gc.collect()
        before, resident = bytes_in_use(), process.memory_info().rss
        trail, cycles, started = [], 0, time.perf_counter()
        while cycles < wanted and time.perf_counter() - started < limit:
            cycle()
            cycles += 1
            if cycles % max(1, wanted // 10) == 0:
                trail.append((bytes_in_use() - before) / 2**20)
        seconds = (time.perf_counter() - started) / cycles
        gc.collect()
        return {
            "cycles": cycles,
            "seconds_a_cycle": seconds,
            "device_mib": (bytes_in_use() - before) / 2**20,
            "device_mib_on_the_way": trail,
            "host_mib": (process.memory_info().rss - resident) / 2**20,
        }

    found = report.data[name] = repeat(cycle, wanted, limit)
    cycles = found["cycles"]
    report.check(f"{name}: device MiB after {cycles} cycles", found["device_mib"], most=20)
    report.check(f"{name}: host MiB after {cycles} cycles", found["host_mib"])
    # What TensorRT itself keeps: the same without UniRT.
    bare = report.data[f"{name} raw"] = repeat(raw_cycle, wanted // 4, limit / 3)
    cycles = bare["cycles"]
    report.check(f"{name}: device MiB after {cycles} raw cycles", bare["device_mib"])
    report.check(f"{name}: host MiB after {cycles} raw cycles", bare["host_mib"])


def profile(lab: Lab, report: Report) -> None:
    """What the engine shows of itself: layers, and the slowest of them."""
    network = lab.network("resnet50")
    feed = network.make(1, seed=1)
    with (
        lab.build(network.model, f"{TENSORRT}:fp16", profiles=[network.profile(1)]) as engine,
        engine.session() as session,
    ):
        report.data["facts"] = dict(engine.facts)
        inspected = report.attempt("inspect", lambda: engine.inspect().to_dict())
        report.data["summary"] = report.attempt("summary", lambda: _shown(engine.inspect()))
        timed = report.attempt("profile", lambda: session.profile(feed).to_dict())
        for kind, found in (("inspect", inspected), ("profile", timed)):
            if found is not None:
                report.data[kind] = _summary(found)
        binding, _ = bound(session, feed)
        once = interleaved({"bind": binding.run}, rounds=5)
        report.data["bind_us"] = once.median("bind")
        layers = (timed or {}).get("layers", [])
        seconds = [row.get("seconds") or 0.0 for row in layers if isinstance(row, Mapping)]
        report.check("layers", len(layers))
        report.check("sum of layer times / bind", 1e6 * sum(seconds) / once.median("bind"))
        binding.close()


def _shown(inspected: Any) -> dict[str, Any]:
    return {
        "nodes": inspected.node_count,
        "layers": len(inspected.layers),
        "fused": len(inspected.fused),
        "reformats": len(inspected.reformats),
        "missing": len(inspected.missing),
        "precisions": dict(inspected.precisions),
        "text": inspected.summary(),
    }


def _summary(report: Mapping[str, Any], most: int = 15) -> dict[str, Any]:
    """Single values as they are; of a list its length and the slowest, or first, rows."""
    found: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, list | tuple):
            rows = sorted(
                value,
                key=lambda row: -(row.get("seconds") or 0.0) if isinstance(row, Mapping) else 0.0,
            )
            found[key] = {"count": len(rows), "rows": rows[:most]}
        elif isinstance(value, Mapping):
            found[key] = {"count": len(value)}
        else:
            found[key] = value
    return found


def conformance(lab: Lab, report: Report) -> None:
    """The backend's tests, the suite for every backend among them, in a process of their own."""
    root = Path(__file__).resolve().parents[1]
    options = ["-p", "unirt.testing", "--import-mode=importlib", "-q", "-rs", "--timeout", "60"]
    command = [sys.executable, "-m", "pytest", *options, "tests/backends/test_tensorrt.py"]
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "UNIRT_REQUIRE": "tensorrt"},
    )
    lines = done.stdout.strip().splitlines()
    report.data |= {
        "summary": lines[-1] if lines else "",
        "skipped": [line for line in lines if line.startswith("SKIPPED")],
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }
    report.check("exit of the backend's tests", done.returncode, most=0)


SECTIONS: dict[str, Callable[[Lab, Report], None]] = {
    "accuracy": accuracy,
    "tf32": tf32,
    "overhead": overhead,
    "host": host,
    "hot": hot,
    "map": map_,
    "streams": streams,
    "threads": threads,
    "memory": memory,
    "start": start,
    "profile": profile,
    "conformance": conformance,
    "engines": engines,
}


def machine() -> dict[str, Any]:
    """The hardware, without anything that names this one machine."""
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0)}
    gpu = next((device for device in unirt.devices() if device.kind == "cuda"), None)
    if gpu is not None:
        found |= {key: gpu.facts.get(key) for key in ("driver", "compute_capability")}
    cpu = next(device for device in unirt.devices() if device.kind == "cpu")
    found |= {"cpu": cpu.name, "cores": cpu.facts.get("usable_cpus")}
    found["cuda_runtime_of_pytorch"] = torch.version.cuda
    return found


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"unirt": unirt.__version__, "python": platform.python_version()}
    packages = "torch torchvision transformers onnx numpy cuda-bindings polygraphy onnxruntime"
    for name in (*packages.split(), "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    trt = library()
    if trt is not None:
        found[trt.__name__] = trt.__version__
    return found


def plain(value: Any) -> Any:
    """JSON without NaN or infinity, which are written as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def table(results: Mapping[str, Any], lines: int = 40) -> list[str]:
    """The checks; where there are too many, those with a target and those that failed first."""
    rows = []
    for name, section in results["sections"].items():
        if section["error"]:
            rows.append((0, f"{name:9} FAILED: {section['error'].strip().splitlines()[-1][:80]}"))
        for check in section["checks"]:
            value = check["value"]
            text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else value
            verdict = {True: "met", False: "MISSED", None: ""}[check["met"]]
            row = (
                f"{name:9} {check['what'][:52]:52} {text!s:>9}  {check['target'] or '':8} {verdict}"
            )
            rows.append((2 if check["met"] is None else 1, row))
    chosen = sorted(range(len(rows)), key=lambda i: rows[i][0])[:lines]
    return [rows[i][1] for i in sorted(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    parser.add_argument("--only", default="", help="sections: " + ", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a smaller BERT")
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds; no section starts later"
    )
    args = parser.parse_args()
    wanted = [name for name in args.only.split(",") if name] or list(SECTIONS)
    unknown = sorted(set(wanted) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are: {', '.join(SECTIONS)}")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    started = time.perf_counter()
    command = ["python benchmarks/gpu.py"]
    command += [f"--only {args.only}"] * bool(args.only) + ["--quick"] * args.quick
    results: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(command),
        "sections": {},
    }
    lab = Lab(args.quick)
    try:
        for name in wanted:
            report, error = Report(), None
            begin = time.perf_counter()
            if begin - started > args.budget:
                error = "skipped: out of time"
            else:
                try:
                    SECTIONS[name](lab, report)
                except Exception:  # noqa: BLE001 - recorded; the other sections go on
                    error = traceback.format_exc()[-4000:]
            seconds = time.perf_counter() - begin
            results["sections"][name] = plain(
                {
                    "seconds": round(seconds, 1),
                    "error": error,
                    "part_errors": report.errors,
                    "checks": report.checks,
                    "data": report.data,
                }
            )
            results["notes"] = lab.notes
            missed = sum(check["met"] is False for check in report.checks)
            partial = len(report.errors)
            state = "FAILED" if error else f"{len(report.checks)} checks, {missed} missed"
            print(f"{name}: {state}, {partial} parts with errors, {seconds:.0f} s", flush=True)
            if error:
                print(error, file=sys.stderr, flush=True)
            for part, problem in report.errors.items():
                print(f"  {part}: {problem[:300]}", file=sys.stderr, flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        lab.close()
    print("\n".join(table(results)))
    checks = [c for section in results["sections"].values() for c in section["checks"]]
    failed = any(section["error"] for section in results["sections"].values())
    sys.exit(bool(failed or any(check["met"] is False for check in checks)))


if __name__ == "__main__":
    main()
