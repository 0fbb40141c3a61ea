"""Convert `digits.onnx` to `digits.tflite`, and keep the result only if both answer alike.

The converter pins old versions of onnxruntime and ai-edge-litert, so it has an environment of
its own (Python 3.12, 660 MB, no TensorFlow), and this script calls it as a program:

    python3.12 -m venv converter
    converter/bin/pip install onnx2tf==2.6.9

The script itself runs where the engines are installed:

    pip install numpy onnxruntime==1.31.1 ai-edge-litert==2.3.0
    python examples/digits/convert.py converter/bin/onnx2tf
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

HERE = Path(__file__).parent
BATCHES = (1, 7, 32, 450)
TOLERANCE = 1e-5  # greatest difference, relative to the greatest logit

Array = NDArray[np.float32]


def convert(onnx2tf: Path, source: Path, folder: Path) -> Path:
    """The tflite file that onnx2tf makes of `source` in `folder`."""
    # onnx2tf renames the nodes of the file it is given in place: hand it a copy.
    copy = folder / source.name
    shutil.copyfile(source, copy)
    command: list[str | Path] = [onnx2tf, "-i", copy, "-o", folder / "out"]
    command += ["-kat", "image"]  # keep NCHW
    command += ["-nuo"]  # no onnxsim: nothing to simplify here, and it would have to be on PATH
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = folder / "out" / f"{source.stem}_float32.tflite"
    if done.returncode or not result.exists():
        raise SystemExit(f"{done.stdout}{done.stderr}\nonnx2tf failed (exit {done.returncode}).")
    return result


def check(tflite: Path, source: Path, image: Array, labels: NDArray[np.int64]) -> None:
    """Exit with the reason unless `tflite` has the interface and the answers of `source`."""
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    expected: Array = session.run(["logits"], {"image": image})[0]
    interpreter = Interpreter(str(tflite))
    _same("interface", interface(interpreter), [("image", -1, 1, 8, 8), ("logits", -1, 10)])
    signature = {"serving_default": {"inputs": ["image"], "outputs": ["logits"]}}
    _same("signatures", interpreter.get_signature_list(), signature)
    for batch in BATCHES:
        logits = run(interpreter, image[:batch])
        _same(f"output shape at batch {batch}", logits.shape, (batch, 10))
        error = float(np.abs(logits - expected[:batch]).max() / np.abs(expected).max())
        print(f"batch {batch:3d}  relative error {error:.1e}")
        if not error <= TOLERANCE:
            raise SystemExit(f"The answers differ by {error:.1e}; {TOLERANCE:.0e} is allowed.")
    for engine, answer in (("onnxruntime", expected), ("ai-edge-litert", logits)):
        print(f"{engine:14}  test accuracy {np.mean(answer.argmax(1) == labels):.4f}")


def interface(interpreter: Interpreter) -> list[tuple[str | int, ...]]:
    """Name and dimensions of every input and output; -1 is a dynamic dimension."""
    tensors = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    return [(tensor["name"], *map(int, tensor["shape_signature"])) for tensor in tensors]


def run(interpreter: Interpreter, image: Array) -> Array:
    """The logits for `image`, after resizing the interpreter to its batch."""
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]
    interpreter.resize_tensor_input(source, image.shape, strict=True)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source, image)
    interpreter.invoke()
    logits: Array = interpreter.get_tensor(target)
    return logits


def _same(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise SystemExit(f"The {what} of the converted file is {found}, not {wanted}.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert digits.onnx to digits.tflite.")
    parser.add_argument("onnx2tf", type=Path, help="the onnx2tf program of its own environment")
    onnx2tf: Path = parser.parse_args().onnx2tf
    source = HERE / "digits.onnx"
    with np.load(HERE / "test.npz") as test:
        image, labels = test["image"], test["labels"]
    with tempfile.TemporaryDirectory() as folder:
        tflite = convert(onnx2tf, source, Path(folder))
        check(tflite, source, image, labels)
        shutil.copyfile(tflite, HERE / "digits.tflite")


if __name__ == "__main__":
    main()
