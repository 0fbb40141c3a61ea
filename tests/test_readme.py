"""What the README shows, runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import unirt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_reads_digits() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code
    done = subprocess.run(
        [sys.executable, "-c", code[1]], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert str(unirt.select(ROOT / "examples/digits/digits.onnx").best) in done.stdout
    assert "[8 4 0]" in done.stdout


def test_every_backend_stands_in_the_table() -> None:
    for plugin in unirt.backends():
        assert plugin.distribution != "unirt" or f"| `{plugin.name}` |" in README


def test_the_setup_commands_are_those_of_the_design() -> None:
    assert (
        '    python -m pip install -e ".[cpu]" && unirt compare examples/digits/digits.onnx '
        "--data examples/digits/test.npz\n"
    ) in README
    assert '    python -m pip install -e ".[cpu,test]" && pytest\n' in README


def test_links_lead_somewhere() -> None:
    for guide in (ROOT / "README.md", ROOT / "backends" / "README.md"):
        for link in re.findall(r"\]\(([^)]+)\)", guide.read_text()):
            assert (guide.parent / link).exists(), link


def test_figures_are_those_of_the_results() -> None:
    results = ROOT / "benchmarks" / "results"
    compared = json.loads((results / "compare-digits-h200.json").read_text())
    median = {
        row["candidate"]: f"{row['latency']['median_seconds'] * 1e6:.0f} µs"
        for row in compared["candidates"]
        if row["latency"]
    }
    for text in (README, (ROOT / "docs" / "engines.md").read_text()):
        assert median["onnxruntime@cpu"] in text
        assert median["onnxruntime@cuda:0"] in text
    overhead = json.loads((results / "overhead-epyc-2core.json").read_text())
    for engine, rows in overhead["engines"].items():
        tiny, mobile = rows["tiny"], rows["mobile"]
        assert (
            f"| {engine} | {tiny['raw usual']:.1f} | {tiny['run - raw usual']:+.1f} "
            f"| {tiny['raw best']:.1f} | {tiny['bind - raw best']:+.1f} "
            f"| {mobile['run / raw usual']:.3f} |"
        ) in README
    assert f"costs {overhead['import_ms']['unirt - numpy']:.0f} ms more" in README
    gpu = json.loads((results / "onnxruntime-gpu-h200.json").read_text())
    tiny = gpu["microseconds"]["tiny"]
    flat = " ".join(README.split())
    assert f"adds {tiny['run - raw usual']:.1f} µs to the {tiny['raw usual']:.1f} µs" in flat
    assert f"arrays {tiny['bind - raw best']:.1f} µs to {tiny['raw best']:.1f}," in flat
    assert gpu["conformance"]["exit"] == 0
    assert "failed" not in gpu["conformance"]


def test_figures_of_tensorrt_are_those_of_the_results() -> None:
    results = ROOT / "benchmarks" / "results" / "tensorrt-rtx-h200.json"
    sections = json.loads(results.read_text())["sections"]
    checks = [check for section in sections.values() for check in section["checks"]]
    figure = {check["what"]: check["value"] for check in checks}
    assert not [check["what"] for check in checks if check["met"] is False]
    page = (ROOT / "docs" / "tensorrt.md").read_text()
    told = re.findall(r"^\| [^|]+ \| ([0-9.]+) \|$", page, re.M)
    assert len(told) == 16
    for value in told:
        assert any(f"{one:.3f}" == value for one in figure.values() if one is not None), value
    rivals = [
        {f"{ratio:.2f}" for ratio in found["times_of_unirt"].values()}
        for found in sections["engines"]["data"].values()
    ]
    rows = re.findall(r"^\| (?:ResNet-50|BERT-base), .*? \| ([0-9.| -]+) \|$", page, re.M)
    assert len(rows) == len(rivals)
    for row, ratios in zip(rows, rivals, strict=True):
        assert set(row.split(" | ")) - {"-"} == ratios
    assert f"takes {figure['run / Polygraphy']:.2f} of the time of Polygraphy" in README
    assert f"{figure['resnet50 fp16 b1: run / raw']:.3f} of a hand-written loop" in README


def test_the_options_of_tensorrt_stand_in_its_page() -> None:
    from unirt_tensorrt._options import TensorRTOptions

    page = (ROOT / "docs" / "tensorrt.md").read_text()
    for info in TensorRTOptions.describe():
        assert f"| `{info.name}` |" in page
        assert f"| {info.help} |" in page
