"""What docs/precision.md shows is what was measured, and what it says runs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unirt.precision.calibration.histogram import METHODS
from unirt.precision.quantization.recipes import LITERT, RECIPES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "precision.md").read_text()
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("precision-*.json"))


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/precision.py as a module, which needs onnx."""
    pytest.importorskip("onnx")
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        path = ROOT / "benchmarks" / "precision.py"
        spec = importlib.util.spec_from_file_location("precision_benchmark", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)
        sys.modules.pop("precision_benchmark", None)


def test_there_are_results_of_a_cpu() -> None:
    assert "precision-epyc-2core.json" in [path.name for path in RESULTS]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_figures_are_those_of_the_results(path: Path, benchmark: Any) -> None:
    results = json.loads(path.read_text())
    assert benchmark.page(results) in PAGE
    assert benchmark.written(PAGE, path.name, results) == PAGE


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_checks_are_what_the_cells_say(path: Path, benchmark: Any) -> None:
    results = json.loads(path.read_text())
    found = benchmark.checks(results["cells"], results.get("searches", ()))
    assert benchmark.plain(found) == results["checks"]
    for cell in results["cells"]:
        assert cell["state"] in ("measured", "built", "failed", "skipped")
        assert bool(cell.get("error")) == (cell["state"] in ("failed", "skipped"))


def test_figures_in_the_text_are_those_of_the_results() -> None:
    text = " ".join(PAGE.split())
    results = json.loads((ROOT / "benchmarks/results/precision-epyc-2core.json").read_text())
    out = {(row["network"], row["start"]): row["noise_out_db"] for row in results["amplification"]}
    begun = out["mobilenetv2", "as PyTorch begins"]
    assert f"comes out {begun:.0f} dB below its output" in text
    assert f"digits network makes {out['digits', 'trained']:.0f} dB of it" in text
    cells = {
        (cell["network"], cell["engine"], cell["precision"], cell["method"]): cell
        for cell in results["cells"]
    }
    whole = cells["resnet50", "onnxruntime", "int8", "mse"]
    assert f"The ResNet-50 below has {whole['snr_db']:.1f} dB" in text
    (found,) = results["searches"]
    assert found["met"]
    wanted = f"Looking for {found['wanted_db']:.0f} dB on half of the test images"
    kept = f"leaves {len(found['kept'])} of {whole['nodes']} nodes in float32"
    assert f"{wanted}, the search {kept}, and the other half has {found['snr_db']:.1f} dB" in text
    assert f"still {1 / found['latency_ratio_onnxruntime']:.1f} times as fast" in text
    alone = cells["resnet50", "onnxruntime", "int8 rounded alone", "mse"]
    gain = whole["snr_db"] - alone["snr_db"]
    assert f"gives the ResNet-50 {gain:.1f} dB more in int8" in text
    whole, alone = (
        cells["transformer", "onnxruntime", f"int4-weights{how}", ""]
        for how in ("", " rounded alone")
    )
    gain = whole["snr_db"] - alone["snr_db"]
    assert f"the transformer {gain:.1f} dB with int4 weights" in text


def test_int8_keeps_what_was_promised_wherever_it_was_measured() -> None:
    """35 dB of both large convolutional networks, all nodes in int8, faster than float32."""
    for path in RESULTS:
        results = json.loads(path.read_text())
        promised = [row for row in results["checks"] if not row["what"].startswith("photos")]
        assert all(row["met"] for row in promised), path.name
        kept = [row for row in promised if row["what"].endswith("int8, dB")]
        assert len(kept) == (0 if "h200" in path.name else 4), path.name


def test_a_network_trained_for_int8_has_its_accuracy_on_every_engine() -> None:
    found = {}
    for path in RESULTS:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["precision"] == "qat" and cell["state"] == "measured":
                found[path.stem, cell["engine"]] = cell["accuracy"]
    assert {engine for _, engine in found} == {"onnxruntime", "openvino", "tensorrt"}
    assert len(found) == 5
    assert set(found.values()) == {found["precision-h200", "tensorrt"]}
    text = " ".join(PAGE.split())
    (share,) = set(found.values())
    assert f"that it has everywhere, {share:.2%}".replace("%", " %") in text


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    for name, told in (
        ("epyc-2core", "{:.1f} dB in {:.2f} (ONNX Runtime {}) and {:.2f} (OpenVINO {})"),
        ("xeon-amx", "{:.1f} dB in {:.2f} and {:.2f}"),
    ):
        results = json.loads((ROOT / f"benchmarks/results/precision-{name}.json").read_text())
        first, second = (
            next(
                cell
                for cell in results["cells"]
                if (cell["network"], cell["precision"], cell["method"])
                == ("resnet50", "int8", "mse")
                and cell["engine"] == engine
            )
            for engine in ("onnxruntime", "openvino")
        )
        figures = [first["snr_db"], first["latency_ratio"], second["latency_ratio"]]
        if name == "epyc-2core":
            figures.insert(2, results["versions"]["onnxruntime"])
            figures.append(results["versions"]["openvino"])
        assert told.format(*figures) in text


def test_the_speed_of_calibration_is_that_of_the_results() -> None:
    path = ROOT / "benchmarks" / "results" / "calibration-epyc-2core.json"
    ratios = {name: one["ratio"] for name, one in json.loads(path.read_text())["networks"].items()}
    assert min(ratios.values()) >= 20
    text = " ".join(PAGE.split())
    assert f"{ratios['digits']:.0f} times faster on the digits" in text
    assert f"{ratios['mobile']:.0f} times on a MobileNet-like network" in text


def test_the_example_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert code
    text = code[1].replace('"digits-ranges.json"', repr(str(tmp_path / "ranges.json")))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ranges.json").is_file()


def test_every_method_and_recipe_is_told() -> None:
    for method in METHODS:
        assert f"| `{method}` |" in PAGE
    for name in (*RECIPES, LITERT.name):
        assert f"| `{name}` |" in PAGE


def test_the_commands_have_these_options() -> None:
    for line in re.findall(r"^    unirt (.*)$", PAGE, re.M):
        verb, *words = line.split()
        done = subprocess.run(
            [sys.executable, "-m", "unirt.cli", verb, "--help"],
            capture_output=True,
            text=True,
            env={"COLUMNS": "200", "PATH": ""},
        )
        assert done.returncode == 0, done.stderr
        for word in words:
            assert not word.startswith("-") or word in done.stdout, f"{verb} {word}"
