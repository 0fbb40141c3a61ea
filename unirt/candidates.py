"""What this machine offers for a model: backends, devices, and every candidate with its facts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from unirt import plugins
from unirt.backend import Backend
from unirt.derivation import problem
from unirt.devices import host_devices
from unirt.errors import BackendUnavailable, CandidateError, sentence
from unirt.model import Model, ModelSource
from unirt.plugins import Plugin
from unirt.selector import Facts, Selection, rank
from unirt.types import Candidate, Device

Candidates = str | Candidate | Sequence[str | Candidate]


def backends() -> tuple[Plugin, ...]:
    """Every backend plugin of this machine, those that failed to load too, in order of name.

    Each carries its `backend`, and an `availability` with version, devices or the reason for a no.
    """
    return plugins.plugins()


def devices() -> tuple[Device, ...]:
    """The CPU, NVIDIA GPUs, and what the engines report besides; `facts['engines']` says which
    engines see each. Never raises.
    """
    found = {str(device): device for device in host_devices()}
    engines: dict[str, list[str]] = {key: [] for key in found}
    for plugin in backends():
        for device in plugin.availability.devices:
            found.setdefault(str(device), device)
            engines.setdefault(str(device), []).append(plugin.name)
    return tuple(
        replace(device, facts={**device.facts, "engines": tuple(engines[key])})
        for key, device in found.items()
    )


def select(model: Model | ModelSource, candidates: Candidates | None = None) -> Selection:
    """Ranks the candidates of this machine for this model, with the reason why each is in or out.

    Compiles and measures nothing; the rules are `unirt.selector.RULES`. Without `candidates`, every
    backend on every device it offers. Raises ModelError and CandidateError only.
    """
    model = Model.open(model)
    wanted = _every() if candidates is None else listed(candidates)
    return rank(model.name, [_facts(model, candidate) for candidate in wanted])


def listed(candidates: Candidates) -> list[Candidate]:
    if isinstance(candidates, str | Candidate):
        candidates = [candidates]
    found = []
    if isinstance(candidates, Iterable):
        found = list(dict.fromkeys(Candidate.parse(text) for text in candidates))
    if not found:
        raise CandidateError(
            f"{candidates!r} names no candidate.",
            "Candidates are a string, or a list of at least one.",
            "Name one, or leave it out to have them ranked.",
        )
    return found


def _every() -> Iterable[Candidate]:
    for plugin in backends():
        found = plugin.availability.devices
        for device in found or (None,):
            yield Candidate(plugin.name, str(device) if device else None)


def backend_of(name: str) -> Backend:
    plugin = plugins.plugin(name)
    if plugin is None:
        known = plugins.names()
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise BackendUnavailable(
            f"There is no backend {name!r}.",
            f"Installed plugins bring: {', '.join(known) or 'none'}.",
            f"{guess}Install the package that brings it; `unirt doctor` lists what is here.",
            backend=name,
        )
    if plugin.backend is None:
        raise BackendUnavailable(
            f"The backend {name!r} of {plugin.distribution} cannot be loaded.",
            sentence(plugin.failure),
            plugin.hint,
            backend=name,
        )
    return plugin.backend


def _facts(model: Model, candidate: Candidate) -> Facts:
    """All that `rank` may know; every way for a candidate to be out becomes a reason here."""
    plugin = plugins.plugin(candidate.backend)
    if plugin is None or plugin.backend is None:
        reason = plugin.failure if plugin else "no plugin of that name is installed"
        return Facts(candidate, excluded=reason, hint=plugin.hint if plugin else "unirt doctor")
    availability = plugin.availability
    device = availability.target(candidate.device)
    if device in availability.targets:
        reason = f"engines are built for {device} here, and run elsewhere"
        return Facts(candidate, availability.version, excluded=reason, hint="unirt build saves one")
    if not availability.available:
        return Facts(candidate, excluded=availability.reason, hint=availability.hint)
    if device is None:
        kind = str(candidate.device).partition(":")[0]
        reason = availability.missing.get(kind, f"{candidate.backend} reports no such device here")
        return Facts(candidate, availability.version, excluded=reason)
    file = model.file(plugin.backend.formats)
    if file is None:
        reads = " and ".join(plugin.backend.formats)
        return Facts(
            candidate,
            availability.version,
            device,
            excluded=f"reads {reads}, and the model is there as {' and '.join(model.formats)} only",
            hint=f"pass the same network as {plugin.backend.formats[0]} too",
        )
    return Facts(
        candidate,
        availability.version,
        device,
        file.format,
        file is model.primary,
        excluded=problem(candidate.precision, file, plugin.backend, device),
        hint="leave the precision out",
    )
