"""Bounded, lazily made instances of what one thread at a time may use."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """Lazily made, bounded and reusable instances of what one thread at a time may use.

    For engines whose unit of work (an infer request, an interpreter) is not thread-safe: `take`
    one, use it, `give` it back. Taking an idle one costs a deque pop.
    """

    def __init__(self, make: Callable[[], T], limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a pool of {limit} would wait for ever")
        self._make, self._limit = make, limit
        self._idle: deque[T] = deque()
        self._made = 0
        self._waiting = 0
        self._changed = threading.Condition()

    def take(self) -> T:
        try:
            return self._idle.pop()
        except IndexError:
            return self._grow_or_wait()

    def give(self, item: T) -> None:
        self._idle.append(item)
        if self._waiting:
            with self._changed:
                self._changed.notify()

    def _grow_or_wait(self) -> T:
        with self._changed:
            self._waiting += 1
            try:
                while True:
                    # `give` looks at `_waiting` after its append, so nothing slips past this pop.
                    if self._idle:
                        try:
                            return self._idle.pop()
                        except IndexError:
                            continue
                    if self._made < self._limit:
                        self._made += 1
                        break
                    self._changed.wait()
            finally:
                self._waiting -= 1
        try:
            item = self._make()
        except BaseException:
            self._forget()
            raise
        # One that a Ctrl-C tears out of its user's hands never comes back: when it dies, another
        # may be made.
        with contextlib.suppress(TypeError):
            weakref.finalize(item, self._forget).atexit = False
        return item

    def _forget(self) -> None:
        with self._changed:
            self._made -= 1
            self._changed.notify()

    def drain(self) -> list[T]:
        """Takes every idle item out, for closing; nothing must be in use."""
        items = list(self._idle)
        self._idle.clear()
        return items
