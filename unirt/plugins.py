"""Finds backends through `unirt.backends` entry points, ours and strangers' the same way.

Every entry point is loaded by itself, in a thread, against a clock: one that raises, exits, hangs
or doubles a name costs its own line in `unirt doctor` and nothing else. Asking for one backend by
name loads that one only.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import pluggy

from unirt.backend import Backend
from unirt.guard import guarded, limit
from unirt.types import Availability, Candidate

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "unirt.backends"
hookspec = pluggy.HookspecMarker("unirt")
hookimpl = pluggy.HookimplMarker("unirt")


class _Spec:
    @hookspec
    def unirt_backend(self) -> Backend:  # type: ignore[empty-body]
        """The backend that this plugin brings."""


@dataclass(frozen=True)
class Plugin:
    """One entry point: where it came from, and its backend or the reason why there is none."""

    name: str
    distribution: str
    backend: Backend | None = None
    failure: str = ""
    hint: str = ""

    @property
    def availability(self) -> Availability:
        """What the backend's probe found; a no with the reason where the plugin did not load."""
        if self.backend is None:
            return Availability.no(self.failure, self.hint)
        return self.backend.probe()


IMPORT_SECONDS = 5.0
"""How long one plugin may take to import; UNIRT_PLUGIN_TIMEOUT says otherwise."""

_lock = threading.Lock()
_locks: dict[str, threading.RLock] = {}
_loaded: dict[str, Plugin] = {}


def names() -> tuple[str, ...]:
    """The name of every backend that some installed distribution offers. Loads none."""
    return tuple(_entries()[0])


def plugin(name: str) -> Plugin | None:
    """The plugin of that name, loaded now if it was not; None where nothing offers it."""
    if name in _loaded:
        return _loaded[name]
    entry = _entries()[0].get(name)
    return None if entry is None else _loaded_once(name, entry)


def _loaded_once(name: str, entry: EntryPoint) -> Plugin:
    with _lock:
        own = _locks.setdefault(name, threading.RLock())
    with own:  # one that hangs must not keep the others waiting
        if name not in _loaded:
            _loaded[name] = _load(entry)
        return _loaded[name]


def plugins() -> tuple[Plugin, ...]:
    """Every plugin, the failed and the refused ones too, in order of name."""
    chosen, refused = _entries()
    return tuple(_loaded_once(name, entry) for name, entry in chosen.items()) + refused


def _entries() -> tuple[Mapping[str, EntryPoint], tuple[Plugin, ...]]:
    """One entry point a name, and a refusal for each further one.

    Ours come first, then distributions by name, so that a stranger cannot take a built-in's place.
    """
    from importlib.metadata import entry_points  # costs more than all of this module

    found = {(e.name, e.value, _distribution(e)): e for e in entry_points(group=GROUP)}
    order = sorted(found.values(), key=lambda e: (_distribution(e) != "unirt", _distribution(e)))
    chosen: dict[str, EntryPoint] = {}
    refused = []
    for entry in order:
        first = chosen.setdefault(entry.name, entry)
        if first is not entry:
            refused.append(
                Plugin(
                    entry.name,
                    _distribution(entry),
                    failure=f"a second plugin named {entry.name!r}: {_distribution(first)} "
                    "already brings one, which is used",
                    hint=f"pip uninstall {_distribution(entry)}",
                )
            )
    return dict(sorted(chosen.items())), tuple(refused)


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown"


def _load(entry: EntryPoint) -> Plugin:
    source = _distribution(entry)
    seconds = limit("UNIRT_PLUGIN_TIMEOUT", IMPORT_SECONDS)
    found = guarded(lambda: _backend_of(entry.load(), entry.name), seconds, entry.name)
    if found.value is not None:
        return Plugin(entry.name, source, found.value)
    built_in = source == "unirt"
    hint = (
        f"pip install 'unirt[{entry.name}]'" if built_in else f"fix it, or pip uninstall {source}"
    )
    return Plugin(entry.name, source, failure=f"its import {found.failure}", hint=hint)


def _backend_of(module: object, name: str) -> Backend:
    if not isinstance(module, ModuleType):
        raise TypeError(f"the entry point must name a module, not {type(module).__name__}")
    manager = pluggy.PluginManager("unirt")
    manager.add_hookspecs(_Spec)
    manager.register(module, name=name)
    backends = manager.hook.unirt_backend()
    if len(backends) != 1 or not isinstance(backends[0], Backend):
        raise TypeError(f"{module.__name__} has no hookimpl unirt_backend() that returns a Backend")
    backend: Backend = backends[0]
    Candidate.parse(name)  # a name that no candidate can spell is of no use
    if backend.name != name:
        raise ValueError(f"the entry point is {name!r}, the backend calls itself {backend.name!r}")
    return backend
