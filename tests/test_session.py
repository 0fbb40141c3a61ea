"""What a session keeps promising when its user interrupts it."""

from __future__ import annotations

import gc
import signal
import threading
import time
from typing import Any

import pytest

import unirt
from unirt.pool import Pool
from unirt.testing import NETWORKS


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="interrupts by timer need POSIX")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tflite", "reference"])
def test_ctrl_c_during_run_leaves_a_session_that_runs_and_closes(backend: str) -> None:
    case = NETWORKS["affine"]
    inputs = case.sample(2, 0)
    plugin = next(p for p in unirt.backends() if p.name == backend)
    assert plugin.backend is not None
    session = unirt.load(case.model(plugin.backend.formats), backend)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0007)
                # Not for ever: Python drops an interrupt that falls into a finalizer.
                while time.monotonic() < deadline:
                    session.run(inputs)
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    gc.collect()
    done = threading.Event()

    def finish() -> None:
        case.check(inputs, session.run(inputs))
        session.close()
        done.set()

    threading.Thread(target=finish, daemon=True).start()
    assert done.wait(30), "the session hangs after interrupts"


def test_a_pool_makes_another_for_one_that_was_lost() -> None:
    class Lane:
        pass

    pool = Pool(Lane, 1)
    lost = pool.take()
    del lost
    gc.collect()
    kept = pool.take()
    pool.give(kept)
    assert pool.take() is kept


def test_a_pool_whose_maker_fails_keeps_its_place() -> None:
    failing = [True]

    class Lane:
        def __init__(self) -> None:
            if failing[0]:
                raise OSError("not now")

    pool = Pool(Lane, 1)
    with pytest.raises(OSError, match="not now"):
        pool.take()
    failing.clear()
    failing.append(False)
    assert isinstance(pool.take(), Lane)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="interrupts by timer need POSIX")
def test_a_pool_interrupted_anywhere_neither_leaks_a_place_nor_hangs() -> None:
    class Lane:
        pass

    pool = Pool(Lane, 1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    deadline = time.monotonic() + 1
    try:
        while time.monotonic() < deadline:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00005)
                for _ in range(10_000):
                    pool.take()  # never given back: every take makes another
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    gc.collect()
    taken: list[Any] = []
    thread = threading.Thread(target=lambda: taken.append(pool.take()), daemon=True)
    thread.start()
    thread.join(10)
    assert taken, "the pool hangs after interrupts"


def test_a_pool_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="for ever"):
        Pool(object, 0)
