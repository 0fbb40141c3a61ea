"""Ranks candidates without running anything: facts in, a `Selection` with every reason out.

All policy stands in `RULES`. Points add up; the sum orders the candidates, and ties go by name.
The order is a prior, not a measurement: `unirt compare` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unirt.types import Candidate, Device


@dataclass(frozen=True)
class Facts:
    """What is known about one candidate before anything is compiled.

    `excluded` says why it cannot be used; `format` is the model format it would read; `native` says
    whether that is the model's own (first) format.
    """

    candidate: Candidate
    version: str = ""
    device: Device | None = None
    format: str = ""
    native: bool = True
    excluded: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Rule:
    """`points` for every candidate to which `applies`, and the argument for it."""

    points: int
    applies: Callable[[Facts], bool]
    because: str


def _on(kind: str) -> Callable[[Facts], bool]:
    return lambda facts: facts.device is not None and facts.device.kind == kind


def _is(backend: str) -> Callable[[Facts], bool]:
    return lambda facts: facts.candidate.backend == backend


def _both(*tests: Callable[[Facts], bool]) -> Callable[[Facts], bool]:
    return lambda facts: all(test(facts) for test in tests)


def _intel(facts: Facts) -> bool:
    return facts.device is not None and "intel" in facts.device.name.lower()


def _untried(facts: Facts) -> bool:
    return facts.device is not None and facts.device.kind not in ("cpu", "cuda")


RULES = (
    Rule(60, _on("cuda"), "an NVIDIA GPU outruns the CPU on all but tiny networks"),
    Rule(30, _both(_on("cuda"), _is("tensorrt")), "compiled for this very GPU"),
    Rule(20, _on("gpu"), "a GPU, though often one that shares the CPU's memory and power"),
    Rule(5, _on("npu"), "an NPU saves power; few of its drivers cover every operator"),
    Rule(12, _is("onnxruntime"), "computes each type as the graph says; a call costs about 8 µs"),
    Rule(8, _is("openvino"), "as fast as onnxruntime on two CPU networks; a call costs 20 µs"),
    Rule(8, _both(_is("openvino"), _intel), "made by the vendor of this processor"),
    Rule(10, _is("tflite"), "fastest or equal on small CPU networks; float kernels by XNNPACK"),
    Rule(6, lambda facts: facts.native, "reads the model in its own format"),
    Rule(-20, _untried, "UniRT never ran on such a device; measure before you trust it"),
    Rule(-100, _is("reference"), "NumPy, operator by operator: an oracle, not an engine to ship"),
)


@dataclass(frozen=True)
class Row:
    """One candidate of a selection: its points and why, or why it is out."""

    candidate: Candidate
    points: int
    reasons: tuple[str, ...]
    excluded: str = ""
    hint: str = ""
    facts: Facts | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "candidate": str(self.candidate),
            "usable": not self.excluded,
            "points": self.points if not self.excluded else None,
            "reasons": list(self.reasons),
            "excluded": self.excluded or None,
            "hint": self.hint or None,
        }


@dataclass(frozen=True)
class Selection:
    """Candidates in order, the best first and those that are out last, each with its reasons."""

    model: str
    rows: tuple[Row, ...]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The usable ones, best first."""
        return tuple(row.candidate for row in self.rows if not row.excluded)

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None

    @property
    def excluded(self) -> Mapping[str, str]:
        """Candidate to the reason why it is out."""
        return {str(row.candidate): row.excluded for row in self.rows if row.excluded}

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "best": str(self.best) if self.best else None,
            "candidates": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            verdict = f"out: {row.excluded}" if row.excluded else "; ".join(row.reasons)
            lines.append(f"{row.candidate!s:28} {verdict}")
        return "\n".join(lines)


def rank(model: str, facts: Iterable[Facts]) -> Selection:
    """The selection that `RULES` gives. Pure: no plugin, no file, no clock."""
    rows = []
    for fact in facts:
        fired = [] if fact.excluded else [rule for rule in RULES if rule.applies(fact)]
        reasons = tuple(f"{rule.points:+d} {rule.because}" for rule in fired)
        points = sum(rule.points for rule in fired)
        rows.append(Row(fact.candidate, points, reasons, fact.excluded, fact.hint, fact))
    rows.sort(key=lambda row: (bool(row.excluded), -row.points, str(row.candidate)))
    return Selection(model, tuple(rows))
