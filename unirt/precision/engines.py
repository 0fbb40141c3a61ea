"""Which engine a float32 or quantized graph is run on, where precision has to look at answers."""

from __future__ import annotations

from collections.abc import Iterable

from unirt import plugins
from unirt.backend import Backend
from unirt.errors import BackendUnavailable, NoBackend, OptionError, sentence
from unirt.types import Candidate


def named_engine(engine: str, cannot: str, why: str) -> tuple[Backend, str]:
    """The backend and device that a caller named, the device that it takes itself if there is
    none. `cannot` begins the error's sentence, `why` says
    what a precision has no place in. Raises CandidateError, OptionError, BackendUnavailable.
    """
    candidate = Candidate.parse(engine)
    if candidate.precision is not None:
        raise OptionError(
            f"{cannot} on {candidate}.",
            why,
            f"Name the engine without a precision: {candidate.backend}.",
            engine=str(candidate),
        )
    plugin = plugins.plugin(candidate.backend)
    if plugin is None or plugin.backend is None:
        raise BackendUnavailable(
            f"{cannot} on {candidate}.",
            sentence(plugin.failure)
            if plugin is not None
            else f"There is no such backend; plugins bring {', '.join(plugins.names())}.",
            "Leave `engine` out, and one that is here is taken.",
            backend=candidate.backend,
        )
    return plugin.backend, str(plugin.backend.find_device(candidate.device))


def first_engine(names: Iterable[str], what: str, remedy: str) -> tuple[Backend, str]:
    """The first of these backends that works here, on the CPU. Raises NoBackend: `what` is not."""
    reasons = {}
    for name in names:
        plugin = plugins.plugin(name)
        if plugin is None:
            reasons[name] = "no plugin brings it"
        elif plugin.backend is not None and plugin.availability.available:
            return plugin.backend, "cpu"
        else:
            reasons[name] = plugin.availability.reason
    raise NoBackend(
        what,
        "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ".",
        remedy,
        reasons=reasons,
    )
