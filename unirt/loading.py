"""From a model and a wish to a running session: backends, devices, select, build, load."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from unirt import plugins
from unirt.arrays import admit
from unirt.backend import Backend, Engine, Progress
from unirt.devices import host_devices
from unirt.errors import (
    BackendError,
    BackendUnavailable,
    BuildCancelled,
    CandidateError,
    NoBackend,
    OptionError,
    ProfileError,
    UnirtError,
    sentence,
)
from unirt.model import Model, ModelFile, ModelSource
from unirt.options import Options
from unirt.plugins import Plugin
from unirt.selector import Facts, Selection, rank
from unirt.session import Session
from unirt.shapes import ShapeProfile, checked
from unirt.types import Candidate, Device

OptionValues = Mapping[str, object] | Options
Candidates = str | Candidate | Sequence[str | Candidate]

How = Literal["ranked", "listed", "named", "environment"]

# How a candidate's precision is called in the tensors of a graph.
PRECISIONS = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "int4": "int4",
    "fp4": "float4_e2m1fn",
}
CASTS = ("fp16", "bf16")
QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear"})
# What a graph with such nodes computes in, by the dtypes of its weights and zero points.
QUANTIZED = {
    "int8": "int8",
    "uint8": "int8",
    "float8_e4m3fn": "fp8",
    "int4": "int4",
    "uint4": "int4",
    "float4_e2m1fn": "fp4",
}


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
    wanted = _every_candidate() if candidates is None else _listed(candidates)
    return rank(model.name, [_facts(model, candidate) for candidate in wanted])


def build(
    model: Model | ModelSource,
    candidate: str | Candidate,
    *,
    options: OptionValues | None = None,
    profiles: Sequence[ShapeProfile] = (),
    hot_shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    samples: Iterable[Any] = (),
    progress: Progress | None = None,
) -> Engine:
    """The model compiled by exactly this candidate; it never falls back.

    A candidate's `fp16` or `bf16` casts a float32 graph first (`unirt.precision.cast`). Shapes
    matter to engines that compile for them, such as TensorRT: `profiles` are ranges of the dynamic
    inputs; each of `hot_shapes`, a shape by input, gets a profile of its own, which such engines
    run faster; `samples`, inputs as `run` takes them, become a profile where `profiles` is empty.
    `progress` hears of build steps and cancels by returning False.

    The engine belongs to the caller: close it, or use it in a `with` block. Raises CandidateError,
    BackendUnavailable, OptionError, ProfileError, InputError for a sample that does not suit the
    model, ModelError, BuildCancelled or BuildError.
    """
    candidate = Candidate.parse(candidate)
    model = Model.open(model)
    backend = _backend(candidate.backend)
    file = model.file(backend.formats)
    problem = _precision_problem(candidate, file) if file else ""
    if problem:
        raise BackendUnavailable(
            f"{candidate} cannot run {model.name!r}.",
            sentence(problem),
            f"To run the graph as it is, name {replace(candidate, precision=None)}.",
            backend=candidate.backend,
            precision=candidate.precision,
        )
    wanted = checked(profiles, model.inputs) or _from_samples(model, samples)
    hot = tuple(map(_hot, hot_shapes))
    if file is not None and _casts(candidate, file):
        model = _cast(model, file, candidate.precision)
    engine = backend.compile(
        model, candidate.device, options, profiles=wanted, hot=hot, progress=progress
    )
    engine.precision = candidate.precision
    return engine


def _cast(model: Model, file: ModelFile, precision: str | None) -> Model:
    """The model in that precision, cast once an engine reads it: one that finds itself compiled
    already never does.
    """

    def make() -> tuple[bytes, tuple[str, ...]]:
        from unirt.precision import cast

        done = cast(model, "fp16" if precision == "fp16" else "bf16")
        notes = list(done.notes)
        reasons: dict[str, list[str]] = {}
        for node, reason in done.kept.items():
            reasons.setdefault(reason, []).append(node)
        for reason, nodes in reasons.items():
            more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
            notes.append(f"in float32 stay {', '.join(nodes[:3])}{more}: {reason}")
        return done.model.primary.read(), tuple(notes)

    return Model.derived(file, make, f"cast to {precision}", model.name)


def _hot(shapes: Mapping[str, Sequence[int]]) -> ShapeProfile:
    profile = ShapeProfile(shapes)
    if profile.spread != 1:
        raise ProfileError(
            f"A hot shape is {profile}.",
            "It is a range, and a hot shape is one shape for each input.",
            "Give ranges as profiles=[ShapeProfile(...)].",
        )
    return profile


def _from_samples(model: Model, samples: Iterable[Any]) -> tuple[ShapeProfile, ...]:
    feeds = [admit(sample, model.inputs, "cuda") for sample in samples]
    tensors = [spec.name for spec in model.inputs if spec.kind == "tensor"]
    feeds = [{name: feed[name] for name in tensors} for feed in feeds]
    return (ShapeProfile.from_samples(feeds),) if feeds and tensors else ()


@dataclass(frozen=True)
class Attempt:
    """One candidate that `load` tried, and the error it met, None if it runs."""

    candidate: Candidate
    error: UnirtError | None = None


@dataclass(frozen=True)
class Decision:
    """How a session came to its engine. `how` is `ranked` by the rules, `listed` or `named` by the
    caller, or `environment` for UNIRT_BACKEND; `selection` keeps those never tried, with reasons.
    """

    candidate: Candidate
    how: How
    attempts: tuple[Attempt, ...]
    selection: Selection

    @property
    def fell_back(self) -> bool:
        return len(self.attempts) > 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "candidate": str(self.candidate),
            "how": self.how,
            "fell_back": self.fell_back,
            "attempts": [
                {"candidate": str(a.candidate), "error": str(a.error) if a.error else None}
                for a in self.attempts
            ],
            "selection": self.selection.to_dict(),
        }


def load(
    model: Model | ModelSource,
    candidate: Candidates | None = None,
    *,
    options: Mapping[str, object] | Options | None = None,
    profiles: Sequence[ShapeProfile] = (),
    hot_shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    samples: Iterable[Any] = (),
    progress: Progress | None = None,
) -> Session:
    """A session of the model on the best engine of this machine.

    Without a candidate the best of `select` is taken; if it fails to compile, the next, with a
    warning on the `unirt` log and a record in `session.decision`. A list of candidates is tried in
    its own order. A single named candidate, and the one in UNIRT_BACKEND, never falls back.

    `options` are those of the named candidate; otherwise a mapping of backend name to options.
    `profiles`, `hot_shapes`, `samples` and `progress` as for `build`.
    Closing the session frees the engine. Raises NoBackend with every reason when none is left.
    """
    model = Model.open(model)
    how, wanted = _wish(candidate)
    firm = how in ("named", "environment")
    nested = None if how == "named" else _nested_options(options)
    selection = select(model, wanted)
    how_built = {
        "profiles": profiles,
        "hot_shapes": hot_shapes,
        "samples": list(samples),
        "progress": progress,
    }
    order = selection.candidates
    if wanted is not None:
        # Their own order; what was named firmly is tried whatever the rules say.
        order = tuple(one for one in wanted if firm or one in selection.candidates)
    attempts: list[Attempt] = []
    for one in order:
        try:
            own = options if nested is None else nested.get(one.backend)
            session = _open(model, one, own, how_built)
        except BuildCancelled:
            raise
        except (BackendError, BackendUnavailable) as error:
            if firm:
                raise
            attempts.append(Attempt(one, error))
            _warn("%s falls out: %s", one, error)
            continue
        attempts.append(Attempt(one))
        session.decision = Decision(one, how, tuple(attempts), selection)
        return session
    reasons = {**selection.excluded, **{str(a.candidate): str(a.error) for a in attempts}}
    raise NoBackend(
        f"No engine of this machine runs {model.name!r}.",
        " ".join(f"{name}: {reason}." for name, reason in reasons.items()) or "None is installed.",
        "Install one, for example pip install 'unirt[cpu]'; `unirt doctor` shows what is here.",
        reasons=reasons,
    )


def _wish(candidate: Candidates | None) -> tuple[How, list[Candidate] | None]:
    """What the caller asks for, or the environment where the caller leaves it open."""
    environment = os.environ.get("UNIRT_BACKEND", "").strip()
    if candidate is None and environment:
        try:
            return "environment", [Candidate.parse(environment)]
        except CandidateError as error:
            raise CandidateError(
                f"UNIRT_BACKEND is {environment!r}.", error.why, error.remedy, text=environment
            ) from None
    if candidate is None:
        return "ranked", None
    return ("named" if isinstance(candidate, str | Candidate) else "listed"), _listed(candidate)


def _warn(text: str, *values: object) -> None:
    import logging  # only a program with something to say pays for it

    logging.getLogger("unirt").warning(text, *values)


def _open(
    model: Model, candidate: Candidate, options: OptionValues | None, how: Mapping[str, Any]
) -> Session:
    engine = build(model, candidate, options=options, **how)
    try:
        session = engine.session()
    except BaseException:
        engine.close()
        raise
    session._owns_engine = True
    return session


def _nested_options(
    options: Mapping[str, object] | Options | None,
) -> dict[str, OptionValues]:
    """Options by backend, each checked now: a mistake counts even where that backend loses."""
    if options is None:
        return {}
    known = plugins.names()
    if not isinstance(options, Mapping) or not all(
        key in known and isinstance(value, Mapping | Options) for key, value in options.items()
    ):
        raise OptionError(
            "The options do not say which backend they are for.",
            "No single candidate was named, and every backend has options of its own.",
            "Pass options={'onnxruntime': {'threads': 4}}, or name a candidate.",
        )
    nested = {
        name: value for name, value in options.items() if isinstance(value, Mapping | Options)
    }
    for name, values in nested.items():
        _backend(name).options.parse(values, owner=name)
    return nested


def _listed(candidates: Candidates) -> list[Candidate]:
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


def _every_candidate() -> Iterable[Candidate]:
    for plugin in backends():
        found = plugin.availability.devices
        for device in found or (None,):
            yield Candidate(plugin.name, str(device) if device else None)


def _backend(name: str) -> Backend:
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
        excluded=_precision_problem(candidate, file),
        hint="leave the precision out",
    )


def _dtype(file: ModelFile) -> str:
    """The dtype that most of the weights have; without weights, that of the first input."""
    counts = file.weight_dtypes or {spec.dtype: 1 for spec in (*file.inputs, *file.outputs)}
    return max(counts, key=lambda name: counts[name], default="undefined")


def _is_in(file: ModelFile, precision: str) -> bool:
    """Whether a graph is typed so: by its Q/DQ nodes, before which weights may be stored as floats,
    or by most of its weights.
    """
    if not QUANTIZING.isdisjoint(file.op_counts):
        # Zero points written into nodes are not told, and most often int8.
        told = {QUANTIZED[name] for name in file.weight_dtypes if name in QUANTIZED}
        if precision in (told or {"int8"}):
            return True
    return PRECISIONS[precision] == _dtype(file)


def _casts(candidate: Candidate, file: ModelFile) -> bool:
    """Whether this candidate's precision is a cast of the graph, which UniRT makes itself."""
    if file.format != "onnx" or candidate.precision not in CASTS:
        return False
    if _is_in(file, candidate.precision):
        return False
    floats = [spec.dtype for spec in (*file.inputs, *file.outputs)]
    return "float32" in (*file.weight_dtypes, *floats)


def _precision_problem(candidate: Candidate, file: ModelFile) -> str:
    """Precision lives in the graph: it has a candidate's already, or is cast to it."""
    if candidate.precision is None:
        return ""
    if candidate.precision not in PRECISIONS:
        return f"{candidate.precision!r} is no precision; they are {', '.join(PRECISIONS)}"
    if _is_in(file, candidate.precision) or _casts(candidate, file):
        return ""
    if candidate.precision in CASTS and file.format != "onnx":
        return f"only an ONNX graph can be cast to {candidate.precision}; this is {file.format}"
    return (
        f"the graph is in {_dtype(file)}, and a cast does not lead from there to "
        f"{candidate.precision}: it takes a graph that is typed so (QuantizeLinear and "
        "DequantizeLinear for int8 and fp8)"
    )
