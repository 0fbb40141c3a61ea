"""ONNX's own node tests, run by each engine's own Python interface and through UniRT, side by side.

    python tests/onnx_node_tests.py                    all of them, both engines, with a summary
    python tests/onnx_node_tests.py --subset           the part that CI runs
    python tests/onnx_node_tests.py --case test_abs    one, with what each way says to it

`raw` is the engine as its manual says to call it; `unirt` is `unirt.build` and `Session.run`. Both
get the same model, the same inputs and the same comparison: that of onnx.backend.test. A case is
lost where raw passes and UniRT does not. Every way of every engine works in a process of its own,
so that a crash or a hang costs one case. Exits 1 if UniRT loses a case, or fails by anything but a
UnirtError where the engine itself survives.

`--record` keeps the raw results, by versions, in onnx_node_tests.json beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).with_suffix(".json")
ENGINES = ("onnxruntime", "openvino")
WAYS = ("raw", "unirt")
SECONDS_PER_CASE = 60
SUBSET_STRIDE = 8
# What NumPy and most networks know. Cases with anything else are all in the subset.
PLAIN = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class Case:
    """One node test. A data set is inputs and expected outputs, in the order of the graph."""

    name: str
    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    data_sets: tuple[tuple[list[Any], list[Any]], ...]
    rtol: float
    atol: float
    plain: bool


@dataclass(frozen=True)
class Result:
    """`outcome`: passed, differs, refused, crashed or hung. `error` is the class that was raised,
    `typed` whether UniRT raised it on purpose.
    """

    outcome: str
    error: str = ""
    typed: bool = False
    text: str = ""


def load_cases() -> list[Case]:
    """Every node test of the installed onnx, by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some expected outputs are infinite on purpose
        found = load_model_tests(kind="node")
    return sorted(map(_case, found), key=lambda case: case.name)


def _case(test: Any) -> Case:
    graph = test.model.graph
    inputs, outputs = (tuple(value.name for value in side) for side in (graph.input, graph.output))
    data_sets = tuple(
        ([_array(value) for value in given], [_array(value) for value in expected])
        for given, expected in test.data_sets
    )
    values = [value for data_set in data_sets for side in data_set for value in side]
    return Case(
        test.name,
        test.model.SerializeToString(),
        inputs,
        outputs,
        data_sets,
        test.rtol,
        test.atol,
        plain=all(isinstance(v, np.ndarray) and v.dtype.name in PLAIN for v in values),
    )


def _array(value: Any) -> Any:
    import onnx

    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, list):
        return [_array(item) for item in value]
    return np.asarray(value) if isinstance(value, np.generic) else value


def subset(cases: list[Case]) -> list[Case]:
    """Every case with a rare type, and a share of the others."""
    plain = [case for case in cases if case.plain]
    rare = [case for case in cases if not case.plain]
    return sorted(rare + plain[::SUBSET_STRIDE], key=lambda case: case.name)


# The ways to run a case. Each takes a model and gives a function from inputs to outputs by name.


def raw_onnxruntime(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def raw_openvino(model: bytes) -> Any:
    # Its import reports to Google Analytics where this is importable.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU")
    request = compiled.create_infer_request()
    takes = {name for port in compiled.inputs for name in port.names}

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        # Its reader drops inputs that nothing uses, and then refuses to be given them.
        results = request.infer({name: inputs[name] for name in inputs if name in takes})
        return {name: value for port, value in results.items() for name in port.names}

    return run


def through_unirt(model: bytes, engine: str) -> Any:
    import unirt

    return unirt.build(model, engine).session().run


def attempt(case: Case, engine: str, way: str) -> Result:
    """What one case comes to, in this process."""
    from onnx.backend.test.runner import Runner

    try:
        if way == "unirt":
            run = through_unirt(case.model, engine)
        else:
            run = {"onnxruntime": raw_onnxruntime, "openvino": raw_openvino}[engine](case.model)
        answers = []
        for given, _ in case.data_sets:
            found = run(dict(zip(case.inputs, given, strict=True)))
            answers.append([found[name] for name in case.outputs])
    except Exception as error:  # noqa: BLE001 - of which class is what this is about
        return Result("refused", type(error).__name__, _typed(error), str(error)[:500])
    for (_, expected), found in zip(case.data_sets, answers, strict=True):
        try:
            for wanted, value in zip(expected, found, strict=True):
                # The items of a sequence are compared as outputs are; left to itself, `Runner`
                # goes down to their rows, which scalars do not have.
                listed = isinstance(wanted, list) and isinstance(value, list)
                sides = (wanted, value) if listed else ([wanted], [value])
                Runner.assert_similar_outputs(*sides, case.rtol, case.atol)
        except Exception as error:  # noqa: BLE001 - values of odd types make it fail in odd ways
            return Result("differs", text=" ".join(str(error).split())[:500])
    return Result("passed")


def _typed(error: Exception) -> bool:
    import unirt

    return isinstance(error, unirt.UnirtError)


# Processes


def serve(engine: str, way: str, pipe: Connection) -> None:
    """Runs cases from the pipe until it ends; the engine's own chatter goes nowhere."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    while (case := pipe.recv()) is not None:
        pipe.send(attempt(case, engine, way))


class Worker:
    """A process for one way of one engine, started anew after a crash or a hang."""

    def __init__(self, engine: str, way: str) -> None:
        self._arguments = engine, way
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(*self._arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, case: Case) -> Result:
        try:
            self._pipe.send(case)
            if self._pipe.poll(SECONDS_PER_CASE):
                result: Result = self._pipe.recv()
                return result
            self._process.kill()
            self._process.join()
            result = Result("hung", text=f"no answer within {SECONDS_PER_CASE} s")
        except (EOFError, OSError):
            self._process.join()
            result = Result("crashed", text=f"exit code {self._process.exitcode}")
        self._start()
        return result

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def run_all(cases: list[Case], engine: str, way: str) -> dict[str, Result]:
    worker = Worker(engine, way)
    try:
        results: dict[str, Result] = {}
        for case in cases:
            result = worker.run(case)
            # Of several tries, one that fails counts.
            if case.name not in results or results[case.name].outcome == "passed":
                results[case.name] = result
        return results
    finally:
        worker.close()


def settle(
    cases: list[Case], engine: str, raw: dict[str, Result], unirt: Mapping[str, Result]
) -> None:
    """Looks at what seems lost once more: an engine that draws at random, or reads memory it never
    wrote, may pass by luck. Only raw gets the second try, so nothing is forgiven to UniRT.
    """
    lost = [
        case
        for case in cases
        if raw[case.name].outcome == "passed" and unirt[case.name].outcome != "passed"
    ]
    again = run_all(lost * 3, engine, "raw")
    raw.update({name: result for name, result in again.items() if result.outcome != "passed"})


# Judgement


@dataclass(frozen=True)
class Summary:
    """What UniRT made of one engine. `lost`, `untyped` and `gained` map cases to what happened."""

    engine: str
    versions: Mapping[str, str]
    cases: int
    raw_passed: int
    unirt_passed: int
    lost: Mapping[str, str]
    untyped: Mapping[str, str]
    gained: tuple[str, ...]
    typed_refusals: Mapping[str, int]
    raw_not_passed: tuple[str, ...]
    raw_crashed: tuple[str, ...]


def summarize(engine: str, raw: Mapping[str, Result], unirt: Mapping[str, Result]) -> Summary:
    def told(name: str) -> str:
        result = unirt[name]
        return " ".join(filter(None, (result.outcome, result.error, result.text)))

    passed = [name for name in raw if raw[name].outcome == "passed"]
    won = [name for name in unirt if unirt[name].outcome == "passed"]
    dead = ("crashed", "hung")
    return Summary(
        engine=engine,
        versions=versions(engine),
        cases=len(raw),
        raw_passed=len(passed),
        unirt_passed=len(won),
        lost={name: told(name) for name in passed if unirt[name].outcome != "passed"},
        untyped={
            name: told(name)
            for name, result in unirt.items()
            # What kills a process by itself, no library around it can turn into an error.
            if (result.outcome == "refused" and not result.typed)
            or (result.outcome in dead and raw[name].outcome not in dead)
        },
        gained=tuple(name for name in won if raw[name].outcome != "passed"),
        typed_refusals=dict(Counter(r.error for r in unirt.values() if r.typed)),
        raw_not_passed=tuple(name for name in raw if raw[name].outcome != "passed"),
        raw_crashed=tuple(name for name in raw if raw[name].outcome in dead),
    )


def versions(engine: str) -> dict[str, str]:
    """Of onnx and the engine, whichever distribution brings it."""
    brings = importlib.metadata.packages_distributions()
    return {name: importlib.metadata.version(brings[name][0]) for name in ("onnx", engine)}


def show(summaries: list[Summary]) -> None:
    columns = ("engine", "cases", "raw passed", "UniRT passed", "lost", "gained", "untyped")
    print("  ".join(f"{column:>14}" for column in columns))
    for s in summaries:
        counts = (s.cases, s.raw_passed, s.unirt_passed, *map(len, (s.lost, s.gained, s.untyped)))
        print("  ".join(f"{cell:>14}" for cell in (s.engine, *counts)))
    for s in summaries:
        refusals = ", ".join(f"{name} {count}" for name, count in s.typed_refusals.items())
        print(f"\n{s.engine}: typed refusals: {refusals or 'none'}")
        for title, cases in (("lost", s.lost), ("untyped", s.untyped)):
            for name, text in cases.items():
                print(f"  {title}: {name}: {text}")
        for name in s.raw_crashed:
            print(f"  the engine by itself dies of: {name}")


def record(summaries: list[Summary]) -> None:
    kept = {
        s.engine: {
            "versions": s.versions,
            "cases": s.cases,
            "raw_passed": s.raw_passed,
            "raw_not_passed": s.raw_not_passed,
        }
        for s in summaries
    }
    RECORD.write_text(json.dumps(kept, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="ONNX's node tests, raw and through UniRT.")
    parser.add_argument("--subset", action="store_true", help="only the part that CI runs")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: all here")
    parser.add_argument("--case", action="append", help="only this case, with details")
    parser.add_argument("--json", type=Path, help="also write the summaries to this file")
    parser.add_argument("--record", action="store_true", help=f"rewrite {RECORD.name}")
    given = parser.parse_args(arguments)
    engines = given.engine or [name for name in ENGINES if importlib.util.find_spec(name)]
    if given.record and (given.subset or given.case or given.engine):
        parser.error("--record takes a full run")
    started = time.perf_counter()
    cases = load_cases()
    if given.case:
        cases = [case for case in cases if case.name in given.case]
    elif given.subset:
        cases = subset(cases)
    jobs = [(engine, way) for engine in engines for way in WAYS]
    # Expensive engines first, so that the short jobs fill the gaps.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {job: pool.submit(run_all, cases, *job) for job in reversed(jobs)}
        results = {job: future.result() for job, future in futures.items()}
    for engine in engines:
        settle(cases, engine, results[engine, "raw"], results[engine, "unirt"])
    summaries = [
        summarize(engine, results[engine, "raw"], results[engine, "unirt"]) for engine in engines
    ]
    show(summaries)
    for job in jobs if given.case else ():
        for name, result in results[job].items():
            print(*job, name, result)
    print(f"\n{time.perf_counter() - started:.0f} s")
    if given.json:
        given.json.write_text(json.dumps([asdict(summary) for summary in summaries], indent=1))
    if given.record:
        record(summaries)
    return int(any(summary.lost or summary.untyped for summary in summaries))


if __name__ == "__main__":
    sys.exit(main())
