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
                while True:
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


def test_a_pool_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="for ever"):
        Pool(object, 0)
