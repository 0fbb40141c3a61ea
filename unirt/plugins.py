"""Finds backends through `unirt.backends` entry points, ours and strangers' the same way.

Every entry point is loaded by itself, in a thread, against a clock: one that raises, exits, hangs
or doubles a name costs its own line in `unirt doctor` and nothing else. Asking for one backend by
name loads that one only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import pluggy

from unirt.backend import Backend
from unirt.types import Availability

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


_lock = threading.RLock()
_loaded: dict[str, Plugin] = {}


def timeout_seconds() -> float:
    """How long one plugin may take to import: 5 s, or `UNIRT_PLUGIN_TIMEOUT`."""
    try:
        return float(os.environ["UNIRT_PLUGIN_TIMEOUT"])
    except (KeyError, ValueError):
        return 5.0


def names() -> tuple[str, ...]:
    """The name of every backend that some installed distribution offers. Loads none."""
    return tuple(_entries()[0])


def plugin(name: str) -> Plugin | None:
    """The plugin of that name, loaded now if it was not; None where nothing offers it."""
    entry = _entries()[0].get(name)
    if entry is None:
        return None
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(entry)
        return _loaded[name]


def plugins() -> tuple[Plugin, ...]:
    """Every plugin, the failed and the refused ones too, in order of name."""
    chosen, refused = _entries()
    return tuple(found for name in chosen if (found := plugin(name))) + refused


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
    hint = f"fix it, or pip uninstall {source}"
    outcome: list[Backend | str] = []

    def attempt() -> None:
        # In a thread of its own a plugin's KeyboardInterrupt or SystemExit is the plugin's, and
        # a real Ctrl-C still reaches the main thread.
        try:
            outcome.append(_backend_of(entry.load(), entry.name))
        except BaseException as error:  # noqa: BLE001 - SystemExit at import is a plugin's failure too
            outcome.append(f"its import raised {type(error).__name__}: {error}")

    worker = threading.Thread(target=attempt, name=f"unirt-plugin-{entry.name}", daemon=True)
    worker.start()
    worker.join(timeout_seconds())
    if not outcome:
        failure = f"its import took longer than {timeout_seconds():g} s"
        return Plugin(entry.name, source, failure=failure, hint=hint)
    if isinstance(outcome[0], Backend):
        return Plugin(entry.name, source, outcome[0])
    return Plugin(entry.name, source, failure=outcome[0], hint=hint)


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
    if backend.name != name:
        raise ValueError(f"the entry point is {name!r}, the backend calls itself {backend.name!r}")
    return backend
