"""Accuracy of the float32 network, of PTQ and of QAT on each engine of this machine, as a table.

    python -m pip install -e ".[cpu,reference]"
    python examples/qat/measure.py

PTQ is UniRT's own: ranges calibrated on `calibration.npz`, Q/DQ placed by a recipe. The QAT network
stands in `qat.onnx`. Neither needs PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import unirt
from unirt.precision import observe, quantize

HERE = Path(__file__).parent
ENGINES = ("reference", "onnxruntime, unfused", "onnxruntime", "openvino")
PTQ = (("max", "tensorrt"), ("entropy", "tensorrt"), ("mse", "tensorrt"), ("max", "cpu"))
UNFUSED = {"optimization": "disable"}


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
    return float((np.concatenate(parts).argmax(1) == labels).mean())


def main() -> None:
    test = np.load(HERE / "test.npz")
    print(f"| network | {' | '.join(ENGINES)} |")
    print("|---|" + "---|" * len(ENGINES))
    for name, model in networks().items():
        shares = [accuracy(model, engine, test["image"], test["labels"]) for engine in ENGINES]
        print(f"| {name} | {' | '.join(f'{share:.2%}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
