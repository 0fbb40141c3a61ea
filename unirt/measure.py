"""How long calls take, for several candidates side by side. No policy: numbers in, numbers out.

Engines in one process disturb each other: caches are cold after another's turn, and threads of one
pool go on spinning for a while. So candidates take turns in short blocks, in a new order every
round, and the first calls of each block do not count.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from unirt.data import Feed
from unirt.devices import host_devices
from unirt.errors import UnirtError

Run: TypeAlias = Callable[[Feed], object]
Stream: TypeAlias = Callable[[Iterable[Feed]], Iterable[object]]
Progress: TypeAlias = Callable[[float], None]

ROUNDS = 15
SETTLING = 0.15
"""The share of each block whose calls do not count; the first one never does."""

P95_CALLS = 20
PIPELINE_ROUNDS = 3
WARM_UP_SECONDS = 0.2
WARM_UP_CALLS = 50


@dataclass(frozen=True)
class Timing:
    """Latencies of single calls, in seconds: over all `calls`, and the median of each round.

    `p95` is None for fewer than 20 calls: none of them is the slowest in twenty.
    """

    calls: int
    median: float
    p95: float | None
    best: float
    mean: float
    round_medians: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Sequence[Sequence[int]]) -> Timing:
        """From the nanoseconds of every call, by rounds, of which each has at least one."""
        every = np.concatenate([np.asarray(r, dtype=np.int64) for r in rounds]) * 1e-9
        return cls(
            calls=len(every),
            median=float(np.median(every)),
            p95=float(np.percentile(every, 95)) if len(every) >= P95_CALLS else None,
            best=float(every.min()),
            mean=float(every.mean()),
            round_medians=tuple(float(np.median(r)) * 1e-9 for r in rounds),
        )

    @property
    def rounds(self) -> int:
        return len(self.round_medians)

    def to_dict(self) -> dict[str, Any]:
        return {
            "median_seconds": self.median,
            "p95_seconds": self.p95,
            "best_seconds": self.best,
            "mean_seconds": self.mean,
            "calls": self.calls,
            "rounds": self.rounds,
            "round_median_seconds": list(self.round_medians),
        }


@dataclass(frozen=True)
class Latencies:
    """What `measure` found: a Timing, or the error that ended a candidate's part."""

    timings: Mapping[str, Timing]
    failures: Mapping[str, UnirtError]


def measure(
    runs: Mapping[str, Run],
    feeds: Sequence[Feed],
    *,
    seconds: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> Latencies:
    """The latency of each of `runs`, called with `feeds` in turn for about `seconds` each.

    A slow one gets at least two rounds of two calls. One that raises a UnirtError is out, and the
    others go on. `progress` gets the share that is done, 0 to 1.
    """
    tell = progress or (lambda _: None)
    samples: dict[str, list[array[int]]] = {name: [] for name in runs}
    failures: dict[str, UnirtError] = {}
    inputs = {name: itertools.cycle(feeds) for name in runs}
    used = dict.fromkeys(runs, 0.0)
    shuffle = random.Random(seed).shuffle
    slot = seconds / ROUNDS

    def turn(name: str, work: Callable[[Run, Iterator[Feed]], None]) -> None:
        started = time.perf_counter()
        try:
            work(runs[name], inputs[name])
        except UnirtError as error:
            failures[name] = error
        used[name] += time.perf_counter() - started

    with garbage_kept():
        for name in runs:
            turn(name, _warm_up)
            used[name] = 0.0
        active = [name for name in runs if name not in failures]
        while active:
            shuffle(active)
            for name in active:
                block: array[int] = array("q")
                turn(name, lambda run, feed, block=block: _block(run, feed, slot, block))  # type: ignore[misc]
                if block:
                    samples[name].append(block)
                done = sum(min(used[n], seconds) if n not in failures else seconds for n in runs)
                tell(done / (seconds * len(runs)))
            active = [
                name
                for name in active
                if name not in failures
                and (used[name] < seconds - slot / 2 or len(samples[name]) < 2)
            ]
    timings = {name: Timing.of(samples[name]) for name in runs if name not in failures}
    return Latencies(timings, failures)


def _warm_up(run: Run, feeds: Iterator[Feed]) -> None:
    deadline = time.perf_counter() + WARM_UP_SECONDS
    for _ in range(WARM_UP_CALLS):
        run(next(feeds))
        if time.perf_counter() > deadline:
            break


def _block(run: Run, feeds: Iterator[Feed], slot: float, block: array[int]) -> None:
    clock = time.perf_counter_ns
    started = clock()
    settled, deadline = started + int(slot * SETTLING * 1e9), started + int(slot * 1e9)
    while True:
        run(next(feeds))
        if clock() >= settled:
            break
    while True:
        feed = next(feeds)
        begin = clock()
        run(feed)
        end = clock()
        block.append(end - begin)
        if end >= deadline:
            break


@dataclass(frozen=True)
class Throughputs:
    """What `measure_throughput` found: calls per second, or the error that ended a candidate's."""

    calls_per_second: Mapping[str, float]
    failures: Mapping[str, UnirtError]


def measure_throughput(
    streams: Mapping[str, Stream],
    feeds: Sequence[Feed],
    *,
    seconds: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> Throughputs:
    """How many calls per second each stream (such as `session.map`) answers when kept busy.

    The median of short rounds in which the streams take turns, for about `seconds` each in all.
    """
    tell = progress or (lambda _: None)
    rates: dict[str, list[float]] = {name: [] for name in streams}
    failures: dict[str, UnirtError] = {}
    used = dict.fromkeys(streams, 0.0)
    shuffle = random.Random(seed).shuffle
    slot = seconds / PIPELINE_ROUNDS
    active = list(streams)
    with garbage_kept():
        while active:
            shuffle(active)
            for name in active:
                started = time.perf_counter()
                try:
                    # The first answers start the worker threads and wake the engine's own.
                    _drain(streams[name], feeds, slot * SETTLING)
                    rates[name].append(_drain(streams[name], feeds, slot * (1 - SETTLING)))
                except UnirtError as error:
                    failures[name] = error
                used[name] += time.perf_counter() - started
                done = sum(min(used[n], seconds) if n not in failures else seconds for n in streams)
                tell(done / (seconds * len(streams)))
            active = [n for n in active if n not in failures and used[n] < seconds - slot / 2]
    medians = {n: float(np.median(rates[n])) for n in streams if n not in failures}
    return Throughputs(medians, failures)


def _drain(stream: Stream, feeds: Sequence[Feed], seconds: float) -> float:
    started = time.perf_counter()
    deadline = started + seconds

    def until_deadline() -> Iterator[Feed]:
        for feed in itertools.cycle(feeds):
            yield feed
            if time.perf_counter() >= deadline:
                return

    answered = sum(1 for _ in stream(until_deadline()))
    return answered / (time.perf_counter() - started)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """No garbage collection meanwhile: it would fall into some call and be counted as its."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def machine() -> dict[str, Any]:
    """The facts about this machine without which a latency means nothing. JSON-able."""
    import platform
    from importlib.metadata import version

    cpu, *gpus = host_devices()
    return {
        "cpu": cpu.name,
        "physical_cores": cpu.facts.get("usable_physical_cores"),
        "logical_cores": cpu.facts.get("usable_logical_cores"),
        "cpu_quota": cpu.facts.get("cpu_quota"),
        "memory_bytes": cpu.memory_bytes,
        "instruction_sets": list(cpu.facts.get("instruction_sets", ())),
        "gpus": [gpu.name for gpu in gpus],
        "driver": next((gpu.facts.get("driver") for gpu in gpus), None),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "unirt": version("unirt"),
    }
