"""How benchmarks/gpu.py measures: clocks for steps that take turns, device arrays, errors."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

DEVICE = "cuda"

Step = Callable[[], object]


def synchronize() -> None:
    torch.cuda.synchronize()


def bytes_in_use() -> int:
    """Bytes of the device that are not free."""
    from cuda.bindings import runtime as cudart

    synchronize()
    _, free, total = cudart.cudaMemGetInfo()
    return int(total) - int(free)


def on_device(feed: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(array).to(DEVICE) for name, array in feed.items()}
    synchronize()
    return tensors


def bound(session: Any, feed: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A binding of device tensors, which PyTorch owns, and its outputs."""
    tensors = on_device(feed)
    sample = session.run(tensors, device_outputs=True)
    outputs = {name: torch.empty_like(torch.from_dlpack(value)) for name, value in sample.items()}
    synchronize()
    return session.bind(tensors, outputs), outputs


def difference(found: Any, expected: Any) -> dict[str, Any]:
    """Absolute and relative error in float64; infinite where anything is not finite."""
    a, b = (np.asarray(value, dtype=np.float64) for value in (found, expected))
    if a.shape != b.shape:
        return {"max_abs": np.inf, "relative": np.inf, "problem": f"{a.shape} is not {b.shape}"}
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        return {"max_abs": np.inf, "relative": np.inf, "problem": "not finite"}
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    return {"max_abs": float(np.abs(a - b).max()), "relative": float(error)}


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclasses.dataclass
class Times:
    """Microseconds a call: for each step the medians of its blocks, and the errors of the rest."""

    blocks: dict[str, list[float]]
    failed: dict[str, str]

    def median(self, name: str) -> float:
        return statistics.median(self.blocks[name])

    def ratio(self, name: str, *others: str) -> float | None:
        """The median over rounds of a step's time over the best one's of the `others`."""
        others = tuple(other for other in others if other in self.blocks)
        if name not in self.blocks or not others:
            return None
        best = min(others, key=self.median)
        pairs = zip(self.blocks[name], self.blocks[best], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def to_dict(self) -> dict[str, Any]:
        rows = {
            name: {
                "us": round(statistics.median(values), 3),
                "rounds_us": [round(value, 3) for value in values],
            }
            for name, values in self.blocks.items()
        }
        return {"steps": rows, **({"failed": self.failed} if self.failed else {})}


def interleaved(steps: Mapping[str, Step], block: float = 0.04, rounds: int = 11) -> Times:
    """Times of synchronous steps that take turns: a block each a round, in a new order each round.

    Every step warms up first, long enough for clocks and for kernels compiled in the background;
    the first tenth of each block does not count.
    """
    warm: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, step in steps.items():
        try:
            warm[name] = _warm_up(step)
        except Exception as error:  # noqa: BLE001 - one competitor less, recorded
            failed[name] = f"{type(error).__name__}: {error}"[:600]
    blocks: dict[str, list[float]] = {name: [] for name in warm}
    order = list(warm)
    shuffle = random.Random(0).shuffle
    clock = time.perf_counter_ns
    with no_garbage_collection():
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                step = steps[name]
                calls = max(5, int(block / warm[name]))
                for _ in range(max(2, calls // 10)):
                    step()
                taken = []
                for _ in range(calls):
                    begin = clock()
                    step()
                    taken.append(clock() - begin)
                blocks[name].append(statistics.median(taken) / 1000)
    return Times(blocks, failed)


def _warm_up(step: Step, seconds: float = 0.35) -> float:
    """Runs for about `seconds`; returns the seconds of one call at the end."""
    started, calls = time.perf_counter(), 0
    while calls < 5 or time.perf_counter() - started < seconds:
        step()
        calls += 1
    taken = []
    for _ in range(9):
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
    return max(statistics.median(taken), 1e-7)


Loop = Callable[[float], int]
"""Runs for about these seconds and returns how many calls were answered."""


def throughputs(loops: Mapping[str, Loop], block: float = 0.4, rounds: int = 5) -> dict[str, Any]:
    """Calls per second of loops that take turns: medians and every round."""
    rates: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, loop in loops.items():
        try:
            loop(0.25)
            rates[name] = []
        except Exception as error:  # noqa: BLE001 - recorded
            failed[name] = f"{type(error).__name__}: {error}"[:600]
    order = list(rates)
    shuffle = random.Random(0).shuffle
    with no_garbage_collection():
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                started = time.perf_counter()
                calls = loops[name](block)
                rates[name].append(calls / (time.perf_counter() - started))
    rows = {
        name: {"per_second": statistics.median(values), "rounds": values}
        for name, values in rates.items()
    }
    return {"loops": rows, **({"failed": failed} if failed else {})}


def rate_ratio(found: Mapping[str, Any], name: str, other: str) -> float | None:
    loops = found["loops"]
    if name not in loops or other not in loops:
        return None
    pairs = zip(loops[name]["rounds"], loops[other]["rounds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def in_threads(steps: Sequence[Step]) -> Loop:
    """Each synchronous step in a loop in a thread of its own."""

    def loop(seconds: float) -> int:
        counts = [0] * len(steps)
        errors: list[BaseException] = []
        deadline = time.perf_counter() + seconds

        def work(index: int) -> None:
            try:
                step = steps[index]
                while time.perf_counter() < deadline:
                    step()
                    counts[index] += 1
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(steps))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return sum(counts)

    return loop


def mapped(session: Any, feeds: Sequence[Mapping[str, Any]], **options: Any) -> Loop:
    """`session.map` over `feeds` again and again."""

    def loop(seconds: float) -> int:
        deadline = time.perf_counter() + seconds

        def stream() -> Iterator[Mapping[str, Any]]:
            index = 0
            while time.perf_counter() < deadline:
                yield feeds[index % len(feeds)]
                index += 1

        return sum(1 for _ in session.map(stream(), **options))

    return loop
