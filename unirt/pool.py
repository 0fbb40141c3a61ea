"""Bounded, lazily made instances of what one thread at a time may use."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Ticket:
    """Stands for an item while it is being made."""


class Pool(Generic[T]):
    """Lazily made, bounded and reusable instances of what one thread at a time may use.

    For engines whose unit of work (an infer request, an interpreter) is not thread-safe: `take`
    one, use it, `give` it back. Taking an idle one costs a deque pop. Items must allow weak
    references: those that live are counted, so one that a Ctrl-C tears out of its user's hands
    makes room for another as soon as it is dead, and no count can be wrong.
    """

    def __init__(self, make: Callable[[], T], limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a pool of {limit} would wait for ever")
        self._make, self._limit = make, limit
        self._idle: deque[T] = deque()
        self._made: list[weakref.ref[object]] = []
        self._waiting = 0
        # Entered by itself, never through the condition: that is Python code, which a Ctrl-C may
        # leave with the lock held.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def take(self) -> T:
        try:
            return self._idle.pop()
        except IndexError:
            return self._grow_or_wait()

    def give(self, item: T) -> None:
        self._idle.append(item)
        if self._waiting:
            self._announce()

    def _announce(self) -> None:
        with self._lock:
            self._changed.notify()

    def _grow_or_wait(self) -> T:
        ticket: _Ticket | None = _Ticket()
        try:
            with self._lock:
                self._waiting += 1
                try:
                    while True:
                        # `give` looks at `_waiting` after its append: nothing slips past this pop.
                        if self._idle:
                            try:
                                return self._idle.pop()
                            except IndexError:
                                continue
                        self._made = [made for made in self._made if made() is not None]
                        if len(self._made) < self._limit:
                            self._made.append(weakref.ref(ticket))
                            break
                        # One that was torn away announces nothing when it dies: look again.
                        self._changed.wait(0.05)
                finally:
                    self._waiting -= 1
            item = self._make()
            with self._lock:
                self._made.append(weakref.ref(item))
            return item
        finally:
            # A traceback that somebody keeps must not keep the place.
            ticket = None
            if self._waiting:
                self._announce()

    def drain(self) -> list[T]:
        """Takes every idle item out, for closing; nothing must be in use."""
        items = list(self._idle)
        self._idle.clear()
        return items
