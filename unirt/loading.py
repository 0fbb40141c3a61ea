"""From a model and a wish to a running session: build and load."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unirt import plugins
from unirt.arrays import admit
from unirt.backend import Engine, Progress
from unirt.candidates import Candidates, backend_of, listed, select
from unirt.data import DataSource, Samples, load_samples
from unirt.derivation import Ranges, derived
from unirt.errors import (
    BackendError,
    BackendUnavailable,
    BuildCancelled,
    CandidateError,
    NoBackend,
    OptionError,
    ProfileError,
    UnirtError,
)
from unirt.model import Model, ModelSource
from unirt.options import Options
from unirt.selector import Selection
from unirt.session import Session
from unirt.shapes import ShapeProfile, checked
from unirt.types import Candidate

if TYPE_CHECKING:
    from unirt.precision.calibration.ranges import CalibrationSource

OptionValues = Mapping[str, object] | Options

How = Literal["ranked", "listed", "named", "environment"]


def build(
    model: Model | ModelSource,
    candidate: str | Candidate,
    *,
    options: OptionValues | None = None,
    profiles: Sequence[ShapeProfile] = (),
    hot_shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    samples: Iterable[Any] | DataSource = (),
    calibration: CalibrationSource | None = None,
    progress: Progress | None = None,
) -> Engine:
    """The model compiled by exactly this candidate; it never falls back.

    A candidate's precision is made in a float32 graph first: `fp16` and `bf16` cast it, `int8` and
    `fp8` quantize it, `int8w` and `int4w` its weights alone (`unirt.precision`), all by the recipe
    of the target. `int8` and `fp8` need the ranges of activations: from `calibration`, which is
    what `unirt.precision.calibrate` found or a file that it was saved to, else by calibrating on
    `samples`: inputs of calls, as `run` takes them, or a .npz file, mapping of arrays or
    bare array with a sample for each entry of the first axis. `engine.notes` say what was done.

    Shapes matter to engines that compile for them, such as TensorRT: `profiles` are ranges of the
    dynamic inputs; each of `hot_shapes`, a shape by input, gets a profile of its own, which such
    engines run faster; `samples` become a profile where `profiles` is empty. `progress` hears of
    build steps and cancels by returning False.

    The engine belongs to the caller: close it, or use it in a `with` block. Raises CandidateError,
    BackendUnavailable, OptionError, ProfileError, InputError for a sample that does not suit the
    model, DataError where ranges are missing or cannot be found, ModelError, BuildCancelled or
    BuildError.
    """
    model = Model.open(model)
    data, calls = _calls(model, samples)
    return compiled(
        model,
        Candidate.parse(candidate),
        Ranges(model, calibration, data),
        options=options,
        profiles=profiles,
        hot_shapes=hot_shapes,
        samples=calls,
        progress=progress,
    )


def _calls(
    model: Model, samples: Iterable[Any] | DataSource
) -> tuple[Samples | list[Any], list[Any]]:
    """What to find ranges on, and the inputs of the calls in it."""
    if isinstance(samples, str | os.PathLike | Mapping | np.ndarray):
        data = load_samples(model.inputs, samples)
        return data, [batch.inputs for batch in data.batches(data.call_size(None))]
    calls = list(samples)
    return calls, calls


def compiled(
    model: Model,
    candidate: Candidate,
    ranges: Ranges,
    *,
    options: OptionValues | None = None,
    profiles: Sequence[ShapeProfile] = (),
    hot_shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    samples: Sequence[Any] = (),
    progress: Progress | None = None,
) -> Engine:
    """`build`, for one of several candidates that share their ranges."""
    backend = backend_of(candidate.backend)
    # What a caller can get wrong is found before anybody calibrates, which may take minutes.
    options = backend.options.parse(options, owner=backend.name)
    wanted = checked(profiles, model.inputs) or _from_samples(model, samples)
    hot = checked(tuple(map(_hot, hot_shapes)), model.inputs)
    model, quantization = derived(model, candidate, backend, ranges)
    engine = backend.compile(
        model, candidate.device, options, profiles=wanted, hot=hot, progress=progress
    )
    engine.precision = candidate.precision
    if quantization is not None:
        engine._quantization = quantization.to_dict
    return engine


def _hot(shapes: Mapping[str, Sequence[int]]) -> ShapeProfile:
    profile = ShapeProfile(shapes)
    if profile.spread != 1:
        raise ProfileError(
            f"A hot shape is {profile}.",
            "It is a range, and a hot shape is one shape for each input.",
            "Give ranges as profiles=[ShapeProfile(...)].",
        )
    return profile


def _from_samples(model: Model, samples: Sequence[Any]) -> tuple[ShapeProfile, ...]:
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
    `notes` are the engine's, and `quantization` what its facts say of how the graph was quantized.
    """

    candidate: Candidate
    how: How
    attempts: tuple[Attempt, ...]
    selection: Selection
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, object] | None = None

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
            "notes": list(self.notes),
            "quantization": None if self.quantization is None else dict(self.quantization),
        }


def load(
    model: Model | ModelSource,
    candidate: Candidates | None = None,
    *,
    options: Mapping[str, object] | Options | None = None,
    profiles: Sequence[ShapeProfile] = (),
    hot_shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    samples: Iterable[Any] | DataSource = (),
    calibration: CalibrationSource | None = None,
    progress: Progress | None = None,
) -> Session:
    """A session of the model on the best engine of this machine.

    Without a candidate the best of `select` is taken; if it fails to compile, the next, with a
    warning on the `unirt` log and a record in `session.decision`. A list of candidates is tried in
    its own order. A single named candidate, and the one in UNIRT_BACKEND, never falls back.

    `options` are those of the named candidate; otherwise a mapping of backend name to options.
    `profiles`, `hot_shapes`, `samples`, `calibration` and `progress` as for `build`; all candidates
    are quantized from one calibration. Closing the session frees the engine. Raises NoBackend with
    every reason when none is left.
    """
    model = Model.open(model)
    how, wanted = _wish(candidate)
    firm = how in ("named", "environment")
    nested = None if how == "named" else _nested_options(options)
    selection = select(model, wanted)
    data, calls = _calls(model, samples)
    ranges = Ranges(model, calibration, data)
    how_built = {
        "profiles": profiles,
        "hot_shapes": hot_shapes,
        "samples": calls,
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
            session = _open(model, one, ranges, own, how_built)
        except BuildCancelled:
            raise
        except (BackendError, BackendUnavailable) as error:
            if firm:
                raise
            attempts.append(Attempt(one, error))
            _warn("%s falls out: %s", one, error)
            continue
        attempts.append(Attempt(one))
        engine = session.engine
        session.decision = Decision(
            one, how, tuple(attempts), selection, engine.notes, engine.quantization
        )
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
    return ("named" if isinstance(candidate, str | Candidate) else "listed"), listed(candidate)


def _warn(text: str, *values: object) -> None:
    import logging  # only a program with something to say pays for it

    logging.getLogger("unirt").warning(text, *values)


def _open(
    model: Model,
    candidate: Candidate,
    ranges: Ranges,
    options: OptionValues | None,
    how: Mapping[str, Any],
) -> Session:
    engine = compiled(model, candidate, ranges, options=options, **how)
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
        backend_of(name).options.parse(values, owner=name)
    return nested
