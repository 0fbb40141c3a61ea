"""What 2:4 pruning costs the trained networks of `examples`: each layer alone, and all together.

    python -m pip install -e ".[onnxruntime,precision]"
    python benchmarks/sparsity.py [--out results.json]

Pruned are the layers that qualify by themselves, once and without training afterwards. Measured is
against the same network in float32, on the test images that come with it. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import unirt
from unirt.precision import Sparsified, check_sparsity, sparsify
from unirt.precision.partial.trial import Trial

ROOT = Path(__file__).parent.parent
NETWORKS = {"digits": "examples/digits/digits.onnx", "photos": "examples/qat/fp32.onnx"}
COLUMNS = ("network", "pruned to 2:4", "L2 norm lost", "SNR", "accuracy (points)")


def measure(name: str) -> dict[str, Any]:
    """Of one network: what each qualifying layer costs alone, and all of them."""
    path = ROOT / NETWORKS[name]
    model = unirt.Model(path)
    fit = [layer.node for layer in check_sparsity(model) if layer.qualifies]
    with Trial(model, path.with_name("test.npz")) as trial:

        def cost(pruned: Sparsified) -> dict[str, Any]:
            found = trial.measure(pruned.model)
            assert found.accuracy is not None
            assert trial.accuracy is not None
            return {
                "snr_db": round(found.snr_db, 3),
                "accuracy": round(found.accuracy, 6),
                "points": round(100 * (found.accuracy - trial.accuracy), 3),
            }

        whole = sparsify(model)
        together = cost(whole)
        layers = []
        for node in fit:
            pruned = sparsify(model, only=[node])
            (row,) = pruned.nodes
            lost = {"l1_lost": round(row.l1_lost, 5), "l2_lost": round(row.l2_lost, 5)}
            facts = {"node": node, "operator": row.operator, "shape": row.shape}
            layers.append({**facts, **lost, **cost(pruned)})
        assert trial.accuracy is not None
        return {
            "model": NETWORKS[name],
            "model_hash": model.hash,
            "samples": trial.samples,
            "engine": trial.engine,
            "accuracy": round(trial.accuracy, 6),
            "all": together,
            "layers": layers,
            "kept": dict(whole.kept),
        }


def measure_all() -> dict[str, Any]:
    """Both networks, and by which versions: nothing of the machine, on which it does not depend."""
    packages = ("numpy", "onnx", "onnxruntime", "unirt")
    return {
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commands": ["python benchmarks/sparsity.py"],
        "networks": {name: measure(name) for name in NETWORKS},
    }


def table(found: dict[str, Any]) -> str:
    """As the documentation has it."""
    rows: list[tuple[str, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, network in found["networks"].items():
        title = f"{name}, {network['samples']:,} images"
        rows.append((title, "nothing", "", "", f"{100 * network['accuracy']:.2f} %"))
        for layer in network["layers"]:
            what = f"`{layer['node']}`, {'x'.join(map(str, layer['shape']))}"
            rows.append(("", what, f"{100 * layer['l2_lost']:.1f} %", *_cost(layer)))
        rows.append(("", f"**all {len(network['layers'])}**", "", *_cost(network["all"])))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cost(one: dict[str, Any]) -> tuple[str, str]:
    return f"{one['snr_db']:.1f} dB", f"{100 * one['accuracy']:.2f} % ({one['points']:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure_all()
    print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
