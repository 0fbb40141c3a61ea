"""Accuracy of the float32 network, of PTQ and of QAT on each engine of this machine, as tables.

    python -m pip install -e ".[cpu,reference]"
    python examples/qat/measure.py [--out examples/qat/accuracy.json]

PTQ is UniRT's own: ranges calibrated on `calibration.npz`, Q/DQ placed by a recipe. The QAT network
stands in `qat.onnx`. Neither needs PyTorch. The README shows what `accuracy.json` holds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import unirt
from unirt.precision import calibrate, observe, quantize, sensitivity

HERE = Path(__file__).parent
ENGINES = ("reference", "onnxruntime, unfused", "onnxruntime", "openvino")
PTQ = (("max", "tensorrt"), ("entropy", "tensorrt"), ("mse", "tensorrt"), ("max", "cpu"))
UNFUSED = {"optimization": "disable"}
SENSITIVE = {
    "/blocks/blocks.0/depthwise/Conv": "the first depthwise convolution",
    "/stem/Conv": "the first convolution, which sees the photograph",
}
REST = "all but these two"


def networks() -> dict[str, unirt.Model]:
    """By what they are called in the table."""
    fp32 = unirt.Model(HERE / "fp32.onnx")
    found = {"fp32": fp32}
    observed = observe(fp32, HERE / "calibration.npz")
    for method, recipe in PTQ:
        calibration = observed.calibration(method)
        found[f"PTQ {method}, {recipe}"] = quantize(fp32, calibration, "int8", recipe).model
    found["QAT"] = unirt.Model(HERE / "qat.onnx")
    return found


def accuracy(model: unirt.Model, engine: str, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is the label's."""
    name, _, unfused = engine.partition(", ")
    with unirt.load(model, name, options=UNFUSED if unfused else None) as session:
        parts = [session.run({"image": part})["logits"] for part in np.array_split(images, 10)]
    return round(float((np.concatenate(parts).argmax(1) == labels).mean()), 6)


def on_engines(
    models: Mapping[str, unirt.Model], engines: Collection[str] = ENGINES
) -> dict[str, dict[str, float]]:
    """By network and engine."""
    test = np.load(HERE / "test.npz")
    return {
        name: {engine: accuracy(model, engine, test["image"], test["labels"]) for engine in engines}
        for name, model in models.items()
    }


def by_layer(nodes: Collection[str] | None = None) -> dict[str, float]:
    """Of the network with one layer in int8 (max, tensorrt), and with all but the sensitive two."""
    fp32, test = HERE / "fp32.onnx", HERE / "test.npz"
    calibration = calibrate(fp32, HERE / "calibration.npz", method="max")
    every = quantize(fp32, calibration, "int8", "tensorrt").nodes
    rest = [node for node in every if node not in SENSITIVE]
    found = sensitivity(
        fp32, calibration, test, recipe="tensorrt", nodes=nodes, subsets={REST: rest}
    )
    measured = {**found.alone, **found.subsets}
    return {name: round(one.accuracy or 0.0, 6) for name, one in measured.items()}


def measure() -> dict[str, Any]:
    """Both tables, and what they depend on: the versions and the CPU's instruction sets."""
    packages = ("numpy", "onnx", "onnxruntime", "openvino", "unirt")
    return {
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
        "instruction_sets": unirt.devices()[0].facts["instruction_sets"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commands": ["python examples/qat/measure.py"],
        "accuracy": on_engines(networks()),
        "layers": by_layer(),
    }


def table(found: dict[str, Any]) -> str:
    """Networks on engines, as the README has it."""
    lines = [f"| network | {' | '.join(ENGINES)} |", "|---|" + "---|" * len(ENGINES)]
    for name, shares in found["accuracy"].items():
        cells = [name, *(percent(shares[engine]) for engine in ENGINES)]
        bold = "**" if name == "QAT" else ""
        lines.append(f"| {' | '.join(f'{bold}{cell}{bold}' for cell in cells)} |")
    return "\n".join(lines)


def layer_table(found: dict[str, Any]) -> str:
    """Layers quantized alone, as the README has it."""
    layers = found["layers"]
    others = [share for node, share in layers.items() if node not in (*SENSITIVE, REST)]
    rows = [(f"only {told}", percent(layers[node])) for node, told in SENSITIVE.items()]
    rows.append(
        (f"only any one of the {len(others)} others",
         f"{percent(min(others))} to {percent(max(others))}")
    )  # fmt: skip
    rows.append((REST, percent(layers[REST])))
    header = ("quantized to int8 (max, tensorrt)", "accuracy")
    lines = [f"| {name} | {share} |" for name, share in (header, *rows)]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def won_back(found: dict[str, Any]) -> float:
    """The part of what max-calibrated PTQ lost that training wins back, Q/DQ as written."""
    fp32, ptq, qat = (
        found["accuracy"][name]["onnxruntime, unfused"]
        for name in ("fp32", "PTQ max, tensorrt", "QAT")
    )
    return (qat - ptq) / (fp32 - ptq)


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to save the figures, as JSON")
    arguments = parser.parse_args()
    found = measure()
    print(f"{table(found)}\n\nwon back: {100 * won_back(found):.1f} %\n\n{layer_table(found)}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
