"""ONNX Runtime on a GPU: the conformance suite on cuda:0, refusals, and what UniRT costs there.

    python benchmarks/gpu_onnxruntime.py --out results.json

Needs onnxruntime-gpu, PyTorch, onnx, pytest and an NVIDIA GPU. Three parts, each a row of the
table: the suite with every skip turned into a failure; sessions asked for CUDA where CUDA cannot
load, which must fail (no visible GPU; the provider's library taken away); and ratios to raw calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from overhead import measure, mobile_onnx, tiny_onnx

ROOT = Path(__file__).parent.parent

ASK = """
import unirt, numpy as np
from unirt.testing import NETWORKS
from unirt_onnxruntime._backend import OnnxRuntimeBackend
backend = OnnxRuntimeBackend()
if {believe}:  # as if the probe had seen a GPU
    backend._availability = unirt.Availability.yes("1", unirt.Device("cuda", 0), unirt.CPU)
try:
    engine = backend.compile(NETWORKS["affine"].model(["onnx"]), "cuda:0")
    engine.session().run(NETWORKS["affine"].sample(1, 0))
    print("RAN", engine.facts)
except unirt.UnirtError as error:
    print("REFUSED", type(error).__name__, str(error)[:300].replace("\\n", " "))
"""


def suite() -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "unirt.testing",
    ]
    command += [
        "-k",
        "TestOnnxRuntimeCUDA",
        str(ROOT / "tests" / "backends" / "test_onnxruntime.py"),
    ]
    environment = {**os.environ, "UNIRT_REQUIRE": "onnxruntime@cuda:0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    return {"exit": done.returncode, **counts}


@contextlib.contextmanager
def without_provider_library() -> Iterator[None]:
    import onnxruntime

    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    hidden = library.with_suffix(".hidden")
    library.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(library)


def ask(believe: bool, **environment: str) -> str:
    code = ASK.replace("{believe}", str(believe))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("RAN", "REFUSED"))]
    return lines[-1] if lines else f"DIED {done.returncode}: {done.stderr[-500:]}"


def refusals() -> dict[str, str]:
    found = {
        "with CUDA": ask(False),
        "no visible GPU": ask(False, CUDA_VISIBLE_DEVICES=""),
        "no visible GPU, probe deceived": ask(True, CUDA_VISIBLE_DEVICES=""),
    }
    with without_provider_library():
        found["provider library missing"] = ask(False)
    return found


def ratios() -> dict[str, dict[str, float]]:
    """Microseconds and ratios: host arrays and arrays that stay on the device."""
    import onnxruntime
    import torch

    import unirt

    results = {}
    for label, model, shape, calls in (
        ("tiny", tiny_onnx(), (1, 4), 300),
        ("mobile", mobile_onnx(), (1, 3, 224, 224), 60),
    ):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        # float32 as typed on both sides: the provider's own default rounds to TF32.
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
        raw = onnxruntime.InferenceSession(model, providers=providers)
        with unirt.load(model, "onnxruntime@cuda:0") as session:
            feed = {"x": x}
            expected = raw.run(["y"], feed)[0]
            device_x = torch.from_numpy(x).cuda()
            device_y = torch.empty(tuple(expected.shape), device="cuda")
            binding = raw.io_binding()
            args = ("cuda", 0, np.float32)
            binding.bind_input("x", *args, shape, device_x.data_ptr())
            binding.bind_output("y", *args, expected.shape, device_y.data_ptr())

            def raw_device(binding: Any = binding, raw: Any = raw) -> None:
                raw.run_with_iobinding(binding)

            bound = session.bind({"x": device_x}, {"y": device_y})
            bound.run()
            np.testing.assert_allclose(device_y.cpu().numpy(), expected, rtol=1e-2, atol=1e-3)
            results[label] = measure(
                {
                    "raw usual": lambda raw=raw, feed=feed: raw.run(["y"], feed),
                    "run": lambda s=session, feed=feed: s.run(feed),
                    "raw best": raw_device,
                    "bind": bound.run,
                    "run on device": lambda s=session, x=device_x: s.run(
                        {"x": x}, device_outputs=True
                    ),
                },
                calls,
                21,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import unirt

    gpu = next(device for device in unirt.devices() if device.kind == "cuda")
    packages = ["numpy", "onnx", "onnxruntime-gpu", "torch"]
    results = {
        "machine": {"gpu": gpu.name, **{k: gpu.facts[k] for k in ("driver", "compute_capability")}},
        "versions": {
            "unirt": unirt.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "command": "python benchmarks/gpu_onnxruntime.py",
        "conformance": suite(),
        "refusals": refusals(),
        "microseconds": ratios(),
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    failed = results["conformance"]["exit"] or not all(
        text.startswith("RAN" if case == "with CUDA" else "REFUSED")
        for case, text in results["refusals"].items()
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
