"""UniRT runs every node test of ONNX that the engine itself runs.

Here a subset: each case with a rare type and an eighth of the others, in about 40 s. All of them,
with a table of what differs: `python tests/onnx_node_tests.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("onnx_node_tests.py")
RECORD = json.loads(HARNESS.with_suffix(".json").read_text())
ENGINES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the harness says of the subset, by engine; those not installed are missing."""
    path = tmp_path_factory.mktemp("node_tests") / "report.json"
    command = [sys.executable, HARNESS, "--subset", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert path.exists(), done.stderr
    return {summary["engine"]: summary for summary in json.loads(path.read_text())}


@pytest.fixture(params=ENGINES)
def summary(request, report):
    if request.param not in report:
        pytest.skip(f"{request.param} is not installed")
    return report[request.param]


def test_unirt_loses_none_that_the_engine_passes(summary):
    assert summary["lost"] == {}


def test_a_refusal_is_a_unirt_error_and_never_a_crash_or_a_hang(summary):
    assert summary["untyped"] == {}
    assert summary["typed_refusals"]  # no engine knows every operator


def test_unirt_is_measured_against_an_engine_at_its_best(summary):
    # Other versions and CPUs pass a few more or less; far fewer means that `raw` is called wrongly.
    failed = set(RECORD[summary["engine"]]["raw_not_passed"])
    worse = sorted(set(summary["raw_not_passed"]) - failed)
    assert len(worse) <= 0.05 * summary["raw_passed"], worse


def test_the_record_covers_the_full_run():
    counts = {engine: (kept["cases"], kept["raw_passed"]) for engine, kept in RECORD.items()}
    assert counts.keys() == set(ENGINES)
    for engine, (cases, passed) in counts.items():
        assert cases - passed == len(RECORD[engine]["raw_not_passed"])
        assert passed > 1300
