"""Damaged models never bring the process down, and are never taken for one another.

`damaged_models.py` does it 500 times an engine, each engine in a process of its own. By hand it
takes other seeds, too: `python tests/damaged_models.py openvino --seed 1 --count 5000`.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import unirt

HARNESS = Path(__file__).with_name("damaged_models.py")
ENGINES = ("onnxruntime", "openvino", "tflite", "reference")
CASES, SEED = 500, 0
MOST_DEATHS = 5


@dataclass
class Report:
    """`deaths`: what ended the process, with the command that does it again."""

    outcomes: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)

    @property
    def cases(self):
        return sum(self.outcomes.values())


def fuzz(engine, folder):
    """All cases of one engine, going on behind each that ends the process."""
    report, first = Report(), 0
    progress, result = folder / f"{engine}.progress", folder / f"{engine}.json"
    while first < CASES and len(report.deaths) < MOST_DEATHS:
        again = [sys.executable, HARNESS, engine, "--seed", str(SEED)]
        part = ["--first", str(first), "--count", str(CASES - first)]
        done = subprocess.run(
            [*again, *part, "--progress", progress, "--json", result],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if result.exists():
            found = json.loads(result.read_text())
            report.outcomes, report.wrong = found["outcomes"], found["wrong"]
            break
        assert progress.exists(), done.stderr
        number = int(progress.read_text())
        command = f"{sys.executable} {HARNESS} {engine} --seed {SEED} --first {number} --count 1"
        report.deaths.append(f"exit {done.returncode}: {command}\n{done.stderr[-3000:]}")
        first = number + 1
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    usable = [plugin.name for plugin in unirt.backends() if plugin.availability.available]
    engines = [engine for engine in ENGINES if engine in usable]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda engine: fuzz(engine, folder), engines)
    return dict(zip(engines, found, strict=True))


@pytest.fixture(params=ENGINES)
def report(request, reports):
    if request.param not in reports:
        pytest.skip(f"{request.param} cannot be used here")
    return reports[request.param]


def test_no_damaged_model_crashes_or_hangs_an_engine(report):
    assert report.deaths == [], "\n\n".join(report.deaths)


def test_each_is_refused_by_a_unirt_error_or_runs_and_none_is_taken_for_another(report):
    assert report.wrong == []


def test_damage_reaches_the_checks_and_the_engine(report):
    assert report.cases == CASES
    assert report.outcomes["ModelError"] > 50
    assert report.outcomes["BuildError"] + report.outcomes.get("BackendError", 0) > 10
    assert report.outcomes["runs"] > 50
