"""Runs one model on several candidates side by side: how fast, how right, and which one wins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from unirt import plugins
from unirt.accuracy import (
    ErrorMeter,
    OutputError,
    classification_output,
    json_number,
    mismatch,
    top1,
)
from unirt.candidates import Candidates, select
from unirt.data import DataSource, Samples, Shapes, samples_for
from unirt.derivation import QUANTIZING, Ranges, told_ranges
from unirt.errors import BackendUnavailable, DataError, OptionError, UnirtError, sentence
from unirt.loading import compiled
from unirt.measure import Timing, machine, measure, measure_throughput
from unirt.model import Model, ModelSource
from unirt.options import Options
from unirt.session import Session
from unirt.types import Candidate

if TYPE_CHECKING:
    from unirt.precision.calibration.ranges import CalibrationSource

Progress: TypeAlias = Callable[[str, float], None]
"""Told what is being done (`building x`, `timing calls`), and the share of it that is, 0 to 1."""

JUDGED_ROWS = 64
"""Samples a call while judging answers, where the batch is free."""

TIMED_FEEDS = 16
"""How many different inputs the timed calls go through."""

TIE = 0.15
"""Below this lead two engines count as equally fast. A convention: the noise is not measured."""

LATENCY_SHARE = 0.75
# Weights, elements of a sample, operators and samples up to which NumPy may answer soon enough.
ORACLE_LIMITS = (1_000_000, 50_000, 1_000, 2_000)

ORACLE_SECONDS = 3.0
"""How long NumPy may take for all answers where nobody named it, as a few calls tell."""

ORACLE_HINT = "Name it to measure it all the same."

MAX_ERROR = 1e-2
"""The gate where none is given, for all that is not judged by accuracy."""

MAX_DROP = 0.005
"""The share of right answers that low precision may cost where data has labels."""


@dataclass(frozen=True)
class Result:
    """One candidate of a comparison. What was not measured is None, never a guess.

    `throughput` is in samples per second, by `stream` (`Session.map`, with several calls in flight)
    or by `calls` one after the other, whichever gave more. `ratio` is its median latency over that
    of the fastest eligible one. `task_accuracy` is top-1, 0 to 1. `excluded` says why it cannot
    win, and `error` is the exception behind that, if any. `notes` and `quantization` are those of
    its engine: what was done to the graph for the candidate's precision. `gate` is what decided
    whether it may win: its `error`, or its task `accuracy`; None for the reference, and for what
    was not measured.
    """

    candidate: Candidate
    version: str = ""
    device: str = ""
    latency: Timing | None = None
    throughput: float | None = None
    throughput_by: Literal["stream", "calls"] | None = None
    ratio: float | None = None
    errors: tuple[OutputError, ...] = ()
    is_reference: bool = False
    task_accuracy: float | None = None
    build_seconds: float | None = None
    excluded: str = ""
    hint: str = ""
    error: UnirtError | None = None
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, object] | None = None
    gate: Literal["error", "accuracy"] | None = None

    @property
    def output_error(self) -> float | None:
        """The largest error of any output against the reference; see `OutputError.error`."""
        return max((output.error for output in self.errors), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "candidate": str(self.candidate),
            "version": self.version or None,
            "device": self.device or None,
            "eligible": not self.excluded,
            "excluded": self.excluded or None,
            "hint": self.hint or None,
            "error_type": type(self.error).__name__ if self.error else None,
            "latency": self.latency.to_dict() if self.latency else None,
            "ratio_to_fastest": self.ratio,
            "throughput_per_second": self.throughput,
            "throughput_by": self.throughput_by,
            "output_error": json_number(self.output_error),
            "outputs": [output.to_dict() for output in self.errors],
            "is_reference": self.is_reference,
            "task_accuracy": self.task_accuracy,
            "gate": self.gate,
            "build_seconds": self.build_seconds,
            "quantization": None if self.quantization is None else dict(self.quantization),
            "notes": list(self.notes),
        }

    @property
    def recipe(self) -> str:
        """By which recipe its graph was quantized, from which ranges; empty if it was not."""
        if self.quantization is None:
            return ""
        told, source = str(self.quantization["recipe"]), self.quantization["calibration"]
        return f"{told}, {source['method']}" if isinstance(source, Mapping) else told


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, with the evidence. `rows` stand fastest first, those that are out last.

    `winner` is the fastest of the eligible ones, None if there is none; `why` says so in a
    sentence. `batch` is how many samples a timed call held. Errors may be up to `max_error`, and
    the task accuracy of rows whose `gate` it is `max_drop`, a share of all samples, below that of
    the reference; None where accuracy is nobody's gate.
    """

    model: str
    model_hash: str
    machine: Mapping[str, Any]
    data: str
    batch: int
    seconds: float
    max_error: float
    reference: Candidate | None
    rows: tuple[Result, ...]
    winner: Candidate | None
    why: str
    notes: tuple[str, ...] = ()
    max_drop: float | None = None
    reference_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_hash": self.model_hash,
            "machine": dict(self.machine),
            "data": self.data,
            "batch": self.batch,
            "seconds": self.seconds,
            "max_error": json_number(self.max_error),
            "max_drop": self.max_drop,
            "reference": str(self.reference) if self.reference else None,
            "reference_accuracy": self.reference_accuracy,
            "candidates": [row.to_dict() for row in self.rows],
            "winner": str(self.winner) if self.winner else None,
            "why": self.why,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.data}"]
        for row in self.rows:
            told = []
            if row.latency:
                told.append(f"median {row.latency.median * 1e3:.4g} ms")
                if row.latency.p95 is not None:
                    told.append(f"p95 {row.latency.p95 * 1e3:.4g} ms")
            if row.throughput is not None:
                told.append(f"{row.throughput:,.0f} samples/s")
            if row.is_reference:
                told.append("the reference")
            elif row.output_error is not None:
                told.append(f"error {row.output_error:.1e}")
            if row.task_accuracy is not None:
                gate = ", which is its gate" if row.gate == "accuracy" else ""
                told.append(f"accuracy {row.task_accuracy:.2%}{gate}")
            if row.recipe:
                told.append(f"quantized by {row.recipe}")
            if row.excluded:
                told.append(f"out: {row.excluded}")
            lines.append(f"  {row.candidate!s:24} {', '.join(told)}")
        return "\n".join([*lines, f"winner: {self.winner or 'none'}: {self.why}"])


@dataclass(eq=False)
class _Entrant:
    """A candidate while it is being compared."""

    candidate: Candidate
    version: str = ""
    low: bool = False
    """Whether it computes in less than float32, or the graph itself is quantized."""
    session: Session | None = None
    meter: ErrorMeter = field(default_factory=ErrorMeter)
    hits: int = 0
    asked: int = 0
    latency: Timing | None = None
    calls_per_second: float | None = None
    build_seconds: float | None = None
    excluded: str = ""
    hint: str = ""
    error: UnirtError | None = None
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, object] | None = None

    @property
    def accuracy(self) -> float | None:
        return self.hits / self.asked if self.session and self.asked else None

    @property
    def is_oracle(self) -> bool:
        return self.candidate.backend == "reference"

    def fail(self, error: UnirtError) -> None:
        self.error, self.hint = error, error.remedy
        self.excluded = " ".join(filter(None, (error.what, error.why)))


@dataclass(frozen=True)
class _Gate:
    """Who may win: see `compare`. With a `max_error` that was given nothing else decides."""

    max_error: float | None

    @property
    def error(self) -> float:
        return MAX_ERROR if self.max_error is None else self.max_error

    def of(self, entrant: _Entrant, judge: _Entrant) -> Literal["error", "accuracy"]:
        known = entrant.accuracy is not None and judge.accuracy is not None
        return "accuracy" if self.max_error is None and entrant.low and known else "error"

    def refusal(self, entrant: _Entrant, judge: _Entrant) -> str:
        """Why the entrant's answers cannot win; empty if they can."""
        errors = entrant.meter.result()
        if self.of(entrant, judge) == "error":
            return _too_far(errors, judge.candidate, self.error)
        assert entrant.accuracy is not None
        assert judge.accuracy is not None
        drop = judge.accuracy - entrant.accuracy
        if drop > MAX_DROP + 1e-9:
            return (
                f"not eligible: its accuracy is {100 * drop:.2f} points below the "
                f"{judge.accuracy:.2%} of {judge.candidate}, and {100 * MAX_DROP:g} are allowed"
            )
        return _too_far(errors, judge.candidate, math.inf)

    def hint(self, entrant: _Entrant) -> str:
        """What would judge the refused one otherwise."""
        if self.max_error is not None or not entrant.low or entrant.accuracy is not None:
            return ""
        return (
            "Low precision is judged by accuracy where the data has labels; or give a max_error "
            "(--max-error)."
        )


def compare(
    model: Model | ModelSource,
    candidates: Candidates | None = None,
    data: DataSource | None = None,
    *,
    reference: str | Candidate | None = None,
    max_error: float | None = None,
    batch: int | None = None,
    seconds: float = 3.0,
    seed: int = 0,
    shapes: Shapes | None = None,
    options: Mapping[str, object] | None = None,
    calibration: CalibrationSource | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """The model on each candidate: latency, throughput, error, task accuracy, and the winner.

    Without `candidates`, all that `select` finds usable, and why the others are out; otherwise
    these, and one that fails keeps its error as the reason while the others go on. `data` is a .npz
    file or a mapping, see `unirt.data.load_samples`; without it inputs are random, by `seed` and
    `shapes`. `options` maps backend names to options.

    A candidate's precision is made in the graph as `build` does it, and all are quantized from one
    calibration: the one given, else one made of the data that answers are judged on, with a note.

    All engines are open at once and take turns, for about `seconds` each, three quarters of them
    for latency. A call holds `batch` samples (default: 1, or what the model fixes). Answers are
    judged on every sample. Where no batch is named and the model's is free, up to 64 go into one
    call then, unless some answer is off: then they are judged as they are timed.

    Errors are against `reference`: by default the `reference` backend if it is here and answers for
    all samples within seconds, which a few calls of it tell, else onnxruntime@cpu, else the first
    candidate that runs.

    Who is too far off is measured, but cannot win. Too far is an error beyond `max_error` (see
    `OutputError.error`). Without one that limit is 0.01, except that where the data has labels what
    computes in less than float32 may win while its task accuracy is at most 0.5 points below the
    reference's. Values that are not finite where the reference's are never win.

    Raises ModelError, DataError, CandidateError, OptionError; and what a named reference raises.
    """
    model = Model.open(model)
    _check_arguments(max_error, batch, seconds, seed)
    named_reference = None if reference is None else Candidate.parse(reference)
    gate = _Gate(max_error)
    entrants = _entrants(model, candidates)
    for row in select(model, named_reference).rows if named_reference else ():
        if row.excluded:
            what = f"{row.candidate} cannot be the reference."
            raise BackendUnavailable(what, sentence(row.excluded), row.hint or "Name another.")
    _check_options(entrants, named_reference, options)
    tell = progress or (lambda _what, _share: None)
    ins, outs = model.inputs, model.outputs
    samples = samples_for(ins, outs, data, calls=TIMED_FEEDS, seed=seed, batch=batch, shapes=shapes)
    size = samples.call_size(batch)
    largest = _judged_size(samples, size, batch)
    suits = oracle_suits(model, samples)
    ranges = Ranges(model, calibration, samples)
    notes: list[str] = []
    for entrant in entrants if candidates is None and not suits else ():
        if entrant.is_oracle and not entrant.excluded:
            entrant.excluded = "NumPy takes too long for a model or data of this size"
            entrant.hint = ORACLE_HINT
    with ExitStack() as stack:
        # Engines that compile for shapes get those that will come, and one of their own for what
        # is timed.
        calls = samples.calls(size, largest)
        hot = {name: value.shape for name, value in calls[0].items()}

        def opened(candidate: Candidate) -> Session:
            own: Any = (options or {}).get(candidate.backend)
            engine = compiled(
                model, candidate, ranges, options=own, samples=calls, hot_shapes=[hot]
            )
            return stack.enter_context(engine).session()

        _open(entrants, opened, tell)
        judge = None
        if any(entrant.session for entrant in entrants):
            judges = _judges(model, suits, entrants, named_reference, opened, notes)
            sizes = (largest, size)
            patience = _patience(model, entrants, candidates, named_reference)
            alone = named_reference is not None
            judge = _judge(entrants, judges, alone, samples, sizes, gate, patience, notes, tell)
            _time(entrants, samples, size, seconds, seed, tell)
        notes += _told_of_ranges(ranges, samples, random=data is None)
        rows = _rows(entrants, judge, samples.rows * size, gate)
        accuracy = judge.accuracy if judge else None
    winner, why = _verdict(rows, judge.candidate if judge else None, accuracy, gate.error)
    by_accuracy = [str(row.candidate) for row in rows if row.gate == "accuracy"]
    if by_accuracy:
        notes.append(
            f"whether {' and '.join(by_accuracy)} may win was decided by accuracy, which may be "
            f"{100 * MAX_DROP:g} points below the reference's {accuracy:.2%}; a max_error "
            "(--max-error) would decide instead"
        )
    return Comparison(
        model=model.name,
        model_hash=model.hash,
        machine=machine(),
        data=samples.description,
        batch=samples.rows * size,
        seconds=seconds,
        max_error=gate.error,
        reference=judge.candidate if judge else None,
        rows=rows,
        winner=winner,
        why=why,
        notes=tuple(notes),
        max_drop=MAX_DROP if by_accuracy else None,
        reference_accuracy=accuracy,
    )


def _check_arguments(max_error: float | None, batch: int | None, seconds: float, seed: int) -> None:
    checks: tuple[tuple[str, Any, type, Callable[[Any], bool], str], ...] = (
        (
            "max_error",
            MAX_ERROR if max_error is None else max_error,
            Real,
            lambda it: it >= 0,
            "a number, at least 0",
        ),
        ("batch", 1 if batch is None else batch, Integral, lambda it: it >= 1, "a count, from 1"),
        ("seconds", seconds, Real, lambda it: 0 < it < math.inf, "more than 0, and finite"),
        ("seed", seed, Integral, lambda it: it >= 0, "a whole number, at least 0"),
    )
    for name, value, kind, fits, told in checks:
        if not isinstance(value, kind) or not fits(value):
            what = f"A comparison cannot have {name}={value!r}."
            raise OptionError(what, f"It is {told}.", "Change it or leave it out.", option=name)


def _entrants(model: Model, candidates: Candidates | None) -> list[_Entrant]:
    if candidates is not None and not isinstance(candidates, str | Candidate) and not candidates:
        what, remedy = "The list of candidates is empty.", "Name one, or leave the list out."
        raise OptionError(what, "A comparison needs at least one.", remedy)
    selection = select(model, candidates)
    quantized = not QUANTIZING.isdisjoint(model.primary.op_counts)
    entrants: dict[str, _Entrant] = {}
    for row in selection.rows:
        candidate, facts = row.candidate, row.facts
        if facts is not None and facts.device is not None:
            candidate = replace(candidate, device=str(facts.device))
        low = candidate.precision not in (None, "fp32") or quantized
        entrant = _Entrant(candidate, facts.version if facts else "", low)
        if candidates is None:
            entrant.excluded, entrant.hint = row.excluded, row.hint
        entrants.setdefault(str(candidate), entrant)
    return [*entrants.values()]


def _told_of_ranges(ranges: Ranges, samples: Samples, *, random: bool) -> list[str]:
    """Where the ranges of all that were quantized are from."""
    told = []
    for kind, used in ranges.used.items():
        what = "the .tflite is" if kind == "tflite" else "graphs are"
        if used is ranges.given:
            told.append(f"{what} quantized from the calibration given, by {told_ranges(used)}")
            continue
        data = f"{used.samples:,} random inputs" if random else samples.description
        told.append(f"{what} quantized from one calibration, by {used.method} on {data}")
    if any(used is not ranges.given for used in ranges.used.values()):
        told.append(
            "neither these ranges nor their errors are those of real data"
            if random
            else "answers are judged on what was calibrated on: on other data they may be worse"
        )
    return told


def _check_options(
    entrants: Sequence[_Entrant], reference: Candidate | None, options: Mapping[str, object] | None
) -> None:
    """A wrong option is the caller's mistake, not one candidate's failure."""
    taking_part = {entrant.candidate.backend for entrant in entrants}
    taking_part |= {reference.backend} if reference else set()
    for name, values in (options or {}).items():
        if name not in taking_part or not isinstance(values, Mapping | Options):
            listed = ", ".join(sorted(taking_part)) or "none"
            raise OptionError(
                f"There are options for {name!r}.",
                f"These backends take part: {listed}; each takes a mapping.",
                "Pass options={'onnxruntime': {'threads': 4}}, or -o onnxruntime.threads=4.",
                option=name,
            )
        plugin = plugins.plugin(name)
        if plugin is not None and plugin.backend is not None:
            plugin.backend.options.parse(values, owner=name)


def _open(
    entrants: Sequence[_Entrant], opened: Callable[[Candidate], Session], tell: Progress
) -> None:
    for done, entrant in enumerate(entrants):
        if entrant.excluded:
            continue
        tell(f"building {entrant.candidate}", done / len(entrants))
        try:
            entrant.session = opened(entrant.candidate)
        except UnirtError as error:
            entrant.fail(error)
        else:
            engine = entrant.session.engine
            entrant.build_seconds = engine.build_seconds
            entrant.notes, entrant.quantization = engine.notes, engine.quantization


# --- how right -----------------------------------------------------------------------------------


def oracle_suits(model: Model, samples: Samples) -> bool:
    """Whether the `reference` backend may answer for this model and data in reasonable time: how
    long it takes, only calls of it tell.
    """
    feed = samples.feeds(samples.call_size(None), 1)[0]
    sizes = (
        model.parameters,
        sum(value.size for value in feed.values()),
        sum(model.primary.op_counts.values()),
        samples.count,
    )
    return all(size <= limit for size, limit in zip(sizes, ORACLE_LIMITS, strict=True))


def _patience(
    model: Model,
    entrants: Sequence[_Entrant],
    candidates: Candidates | None,
    named: Candidate | None,
) -> float:
    """Seconds that NumPy may take for all answers: without end for who named it, and where there is
    no other judge to trust.
    """
    if candidates is not None and any(entrant.is_oracle for entrant in entrants):
        return math.inf
    if named is not None:
        return math.inf if named.backend == "reference" else ORACLE_SECONDS
    trusted = select(model, Candidate("onnxruntime", "cpu")).best
    return math.inf if trusted is None else ORACLE_SECONDS


def _judging_seconds(session: Session, samples: Samples, rows: int) -> float:
    """About how long a session answers for all samples, `rows` a call. It is timed on one sample
    and, where that would be too long, on some in one call.
    """
    size = samples.call_size(None)
    seconds = 0.0
    for taken in dict.fromkeys((size, min(8 * size, rows))):
        feed = samples.feeds(taken, 1)[0]
        started = time.perf_counter()
        try:
            session.run(feed)
        except UnirtError:
            return 0.0  # who judges meets it too, and says what it is
        call = time.perf_counter() - started
        seconds = call * math.ceil(samples.count / taken)
        if seconds < ORACLE_SECONDS / 10 or call > ORACLE_SECONDS / 10:
            break
    return seconds


def _judges(
    model: Model,
    suits: bool,
    entrants: Sequence[_Entrant],
    named: Candidate | None,
    opened: Callable[[Candidate], Session],
    notes: list[str],
) -> Iterator[_Entrant]:
    """Those who may be the reference, the most trusted first; a `named` one alone, or its error."""
    trusted = [Candidate("reference")] if suits else []
    trusted.append(Candidate("onnxruntime", "cpu"))
    for wanted in [named] if named else trusted:
        there = next((e for e in entrants if _same(e.candidate, wanted)), None)
        if there and (there.session or named is None):
            if there.session:
                yield there
            continue
        if named is None and select(model, wanted).best is None:
            continue
        try:
            session = opened(wanted)
        except UnirtError as error:
            if named:
                raise
            notes.append(f"{wanted} cannot be the reference: {error.what} {error.why}")
            continue
        yield _Entrant(session.engine.candidate, session=session)
    if named is None:
        yield from [entrant for entrant in entrants if entrant.session]


def _same(candidate: Candidate, wanted: Candidate) -> bool:
    """Whether a candidate is the wanted one; without a device, on any."""
    return replace(wanted, device=wanted.device or candidate.device) == candidate


def _judged_size(samples: Samples, size: int, batch: int | None) -> int:
    """How many samples a call may hold while answers are judged."""
    if batch is not None or samples.stacked or samples.fixed_batch is not None:
        return size
    elements = sum(value.size // samples.count for value in samples.inputs.values())
    return max(1, min(JUDGED_ROWS, samples.count, 2**24 // max(1, elements)))


def _judge(
    entrants: Sequence[_Entrant],
    judges: Iterator[_Entrant],
    alone: bool,
    samples: Samples,
    sizes: tuple[int, int],
    gate: _Gate,
    patience: float,
    notes: list[str],
    tell: Progress,
) -> _Entrant | None:
    """Meters every entrant's errors and hits against the first judge that answers; returns it.

    `sizes` are how many samples a call may hold while judging, and how many it holds when timed.
    NumPy takes no part if that takes longer than `patience`. None if no entrant answers at all.
    Raises DataError, and what a judge raises who is `alone`.
    """
    size = sizes[1]
    for judge in judges:
        failed: dict[_Entrant, UnirtError | str] = {}
        seconds = 0.0
        for rows in dict.fromkeys(sizes):
            numpy = next((e for e in (judge, *entrants) if e.is_oracle), None)
            if numpy is not None and numpy.session is not None and patience < math.inf:
                tell("timing NumPy", 0.0)
                seconds += _judging_seconds(numpy.session, samples, rows)
                if seconds > patience:
                    told = f"NumPy would take some {seconds:.0f} s for all answers"
                    numpy.hint = ORACLE_HINT
                    if numpy is judge:
                        failed = {judge: told}
                        break
                    _drop({numpy: told})
            try:
                failed = _judged_by(judge, entrants, samples, rows, tell)
            except DataError:
                if rows == size:
                    raise
                continue
            if judge in failed:
                continue
            clean = not failed and not any(
                gate.refusal(entrant, judge) for entrant in entrants if entrant.session
            )
            if rows == size or clean:
                _drop(failed)
                if rows != size:
                    notes.append(
                        f"answers are judged {rows} samples a call, and timed {size} a call"
                    )
                return judge
        reason = failed[judge]
        if alone and isinstance(reason, UnirtError):
            raise reason
        if judge not in entrants:
            waits = "; named, by --reference for one, it takes its time"
            waits = waits if judge.hint == ORACLE_HINT else ""
            notes.append(f"{judge.candidate} cannot be the reference: {reason}{waits}")
        _drop({judge: reason})
    return None


def _drop(failed: Mapping[_Entrant, UnirtError | str]) -> None:
    for entrant, reason in failed.items():
        entrant.session = None
        if isinstance(reason, UnirtError):
            entrant.fail(reason)
        else:
            entrant.excluded = reason


def _judged_by(
    judge: _Entrant, entrants: Sequence[_Entrant], samples: Samples, rows: int, tell: Progress
) -> dict[_Entrant, UnirtError | str]:
    """Runs every sample through all; the failed ones with their reasons. Raises DataError."""
    failed: dict[_Entrant, UnirtError | str] = {}
    running = [entrant for entrant in entrants if entrant.session]
    if judge not in running:  # its accuracy is what others are held against
        running.append(judge)
    for entrant in running:
        entrant.meter, entrant.hits, entrant.asked = ErrorMeter(), 0, 0
    classifier = ""
    done = 0
    for batch in samples.batches(rows):
        tell("judging answers", done / samples.count)
        assert judge.session is not None
        try:
            expected = judge.session.run(batch.inputs)
        except UnirtError as error:
            return {judge: error}
        if batch.labels is not None and not classifier:
            # In place of these, the largest of all: a bad one shows at once, not at the end.
            largest = np.full_like(batch.labels, np.max(np.asarray(samples.labels)))
            classifier = classification_output(expected, largest)
        for entrant in running:
            if entrant in failed or entrant.session is None:
                continue
            try:
                outputs = expected if entrant is judge else entrant.session.run(batch.inputs)
            except UnirtError as error:
                failed[entrant] = error
                continue
            if reason := mismatch(outputs, expected):
                failed[entrant] = reason
                continue
            entrant.meter.add(outputs, expected)
            if batch.labels is not None:
                right = np.atleast_1d(top1(outputs[classifier], batch.labels))
                counted = right if samples.stacked else right[: batch.count]
                entrant.hits += int(counted.sum())
                entrant.asked += counted.size
        done += batch.count
    return failed


# --- how fast ------------------------------------------------------------------------------------


def _time(
    entrants: Sequence[_Entrant],
    samples: Samples,
    size: int,
    seconds: float,
    seed: int,
    tell: Progress,
) -> None:
    running = {str(e.candidate): e for e in entrants if e.session}
    sessions = {name: e.session for name, e in running.items() if e.session}
    feeds = samples.feeds(size, TIMED_FEEDS)
    tell("timing calls", 0.0)
    latencies = measure(
        {name: session.run for name, session in sessions.items()},
        feeds,
        seconds=seconds * LATENCY_SHARE,
        seed=seed,
        progress=lambda share: tell("timing calls", share),
    )
    throughputs = measure_throughput(
        {n: session.map for n, session in sessions.items() if n not in latencies.failures},
        feeds,
        seconds=seconds * (1 - LATENCY_SHARE),
        seed=seed,
        progress=lambda share: tell("timing streams", share),
    )
    for name, error in {**latencies.failures, **throughputs.failures}.items():
        running[name].fail(error)
    for name, entrant in running.items():
        entrant.latency = latencies.timings.get(name)
        entrant.calls_per_second = throughputs.calls_per_second.get(name)


# --- who wins ------------------------------------------------------------------------------------


def _rows(
    entrants: Sequence[_Entrant], judge: _Entrant | None, rows_per_call: int, gate: _Gate
) -> tuple[Result, ...]:
    rows = []
    for entrant in entrants:
        judged = entrant.session is not None and judge is not None and entrant is not judge
        errors = entrant.meter.result() if judged else ()
        excluded, hint = entrant.excluded, entrant.hint
        if not excluded and judged and judge is not None:
            excluded = gate.refusal(entrant, judge)
            hint = gate.hint(entrant) if excluded else hint
        speed, way = _fastest_way(entrant)
        rows.append(
            Result(
                candidate=entrant.candidate,
                version=entrant.version,
                device=entrant.candidate.device or "",
                latency=entrant.latency,
                throughput=None if speed is None else speed * rows_per_call,
                throughput_by=way,
                errors=errors,
                is_reference=entrant is judge,
                task_accuracy=entrant.accuracy,
                build_seconds=entrant.build_seconds,
                excluded=excluded,
                hint=hint,
                error=entrant.error,
                notes=entrant.notes,
                quantization=entrant.quantization,
                gate=gate.of(entrant, judge) if judged and judge is not None else None,
            )
        )
    rows.sort(key=_place)
    fastest = next((row.latency.median for row in rows if row.latency and not row.excluded), None)
    return tuple(
        replace(row, ratio=row.latency.median / fastest) if row.latency and fastest else row
        for row in rows
    )


def _within(output: OutputError, max_error: float) -> bool:
    """No limit is wide enough where only one side is finite."""
    return output.error <= max_error and math.isfinite(output.max_abs or 0)


def _too_far(errors: Sequence[OutputError], judge: Candidate, max_error: float) -> str:
    beyond = [output for output in errors if not _within(output, max_error)]
    if not beyond:
        return ""
    worst = max(beyond, key=lambda output: output.error)
    if worst.error > max_error:
        told = f"error {worst.error:.1e} > {max_error:g} against {judge}, in the output"
    else:
        told = f"values are not finite where those of {judge} are, or the reverse, in the output"
    return f"not eligible: {told} {worst.name!r}"


def _place(row: Result) -> tuple[bool, bool, float, str]:
    median = row.latency.median if row.latency else 0.0
    return row.latency is None, bool(row.excluded), median, str(row.candidate)


def _fastest_way(entrant: _Entrant) -> tuple[float | None, Literal["stream", "calls"] | None]:
    """Calls per second. A stream costs a thread switch a call, more than a tiny network itself."""
    if entrant.latency is None:
        return None, None
    one_by_one, stream = 1 / entrant.latency.mean, entrant.calls_per_second
    return (stream, "stream") if stream and stream > one_by_one else (one_by_one, "calls")


def _verdict(
    rows: Sequence[Result],
    reference: Candidate | None,
    accuracy: float | None,
    max_error: float,
) -> tuple[Candidate | None, str]:
    eligible = [row for row in rows if not row.excluded and row.latency]
    if not eligible:
        out = f"none of the {len(rows)} candidates is eligible; each has its reason"
        return None, out if rows else "no backend is installed"
    first = eligible[0]
    assert first.latency is not None
    error = f"its error of {first.output_error or 0:.1e} against {reference}"
    right = f"{error} is within {max_error:g}"
    if first.gate == "accuracy" and accuracy is not None and first.task_accuracy is not None:
        right = (
            f"its accuracy of {first.task_accuracy:.2%} is at most {100 * MAX_DROP:g} points "
            f"below the {accuracy:.2%} of {reference}"
        )
    if first.is_reference:
        right = "it is the reference that errors are measured against"
    if len(eligible) == 1 or eligible[1].latency is None:
        calls = f"median of {first.latency.calls:,} calls in {first.latency.rounds} rounds"
        return first.candidate, f"the only eligible candidate ({calls}); {right}"
    second, latency = eligible[1].candidate, eligible[1].latency
    lead = latency.median / first.latency.median - 1
    rounds = min(first.latency.rounds, latency.rounds)
    calls = f"medians of {first.latency.calls:,} and {latency.calls:,} calls in {rounds} rounds"
    if lead < TIE:
        faster = f"{lead:.0%} faster than {second} ({calls}): a lead below {TIE:.0%} is a tie here"
    else:
        faster = f"{lead + 1:.1f}x faster than {second} ({calls})"
    return first.candidate, f"{faster}; {right}"
