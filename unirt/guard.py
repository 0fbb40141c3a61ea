"""Calls into code that may raise anything, exit or hang."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Outcome(Generic[T]):
    """What a guarded call came to: a `value`, or a `failure` in words that follow its name."""

    value: T | None = None
    failure: str = ""


def guarded(call: Callable[[], T], seconds: float, name: str) -> Outcome[T]:
    """`call()`, waited for at most `seconds`. Never raises what `call` raises.

    It runs in a thread of its own: there a KeyboardInterrupt or SystemExit is the callee's, while a
    real Ctrl-C still reaches the main thread. A call that hangs is left behind.
    """
    outcome: Outcome[T] = Outcome()
    outcome.failure = f"took longer than {seconds:g} s"

    def work() -> None:
        try:
            outcome.value = call()
            outcome.failure = ""
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the callee's own failure
            outcome.failure = f"raised {type(error).__name__}: {error}"

    worker = threading.Thread(target=work, name=f"unirt-{name}", daemon=True)
    worker.start()
    worker.join(seconds)
    return outcome


def limit(variable: str, default: float) -> float:
    """A number of seconds from the environment."""
    try:
        return float(os.environ[variable])
    except (KeyError, ValueError):
        return default
