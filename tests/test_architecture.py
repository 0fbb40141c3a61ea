"""The shape of the code: what imports what, what an import costs, what the package shows."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import unirt

ROOT = Path(__file__).parent.parent

# Each may import those on its own line and on lines above; nothing below.
ORDER = [
    {"types", "errors"},
    {"options", "dlpack", "saving"},
    {"arrays", "formats", "shapes", "inspection"},
    {"model", "devices", "pool", "guard"},
    {"session", "data", "accuracy"},
    {"backend"},
    {"plugins"},
    {"selector"},
    {"precision"},
    {"derivation"},
    {"candidates"},
    {"loading"},
    {"measure"},
    {"comparison", "explanation"},
    {"cli", "testing"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts]


def imported(path: Path) -> set[str]:
    """Every `unirt.x` that a file imports, anywhere in it."""
    names = set()
    tree = ast.parse(path.read_text())
    for only_types in [n for n in ast.walk(tree) if isinstance(n, ast.If)]:
        # What only a type checker reads does not couple modules when they run.
        if isinstance(only_types.test, ast.Name) and only_types.test.id == "TYPE_CHECKING":
            only_types.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "unirt"}


@pytest.mark.parametrize("path", modules(ROOT / "unirt"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT / "unirt").parts[0].removesuffix(".py")
    if part == "__init__":
        return
    for name in imported(path):
        target = name.split(".")[1]
        assert target in LEVEL, f"{target} has no place in ORDER"
        assert LEVEL[target] <= LEVEL[part], f"{part} imports {target}"


@pytest.mark.parametrize("path", modules(ROOT / "backends"), ids=lambda p: str(p.relative_to(ROOT)))
def test_backends_use_public_names_only(path: Path) -> None:
    for name in imported(path):
        parts = name.split(".")
        assert len(parts) <= 2, f"{name} is not a public name"
        assert len(parts) == 1 or parts[1] in unirt.__all__, f"{name} is not a public name"


def test_every_module_has_a_place_in_the_order() -> None:
    parts = {
        path.name.removesuffix(".py")
        for path in (ROOT / "unirt").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.name != "__init__.py"
    }
    assert parts <= set(LEVEL)


def test_the_public_names_are_sorted_and_there() -> None:
    by_kind = sorted(unirt.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert by_kind == list(unirt.__all__)
    for name in unirt.__all__:
        assert getattr(unirt, name) is not None


def bare(code: str) -> list[str]:
    """Top-level modules of a fresh interpreter after `code`, less the standard library."""
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    known = set(sys.stdlib_module_names) | {"__main__", "sitecustomize", "usercustomize"}
    found = [name for name in json.loads(done.stdout.splitlines()[-1]) if name not in known]
    # Editable installs and coverage hook in here; they are the interpreter's, not ours.
    return [name for name in found if not name.startswith(("_", "a1_coverage", "distutils"))]


def test_importing_unirt_costs_numpy_and_pluggy() -> None:
    assert set(bare("import unirt")) - set(bare("")) == {"numpy", "pluggy", "unirt"}


def test_opening_a_model_and_naming_backends_loads_no_engine() -> None:
    model = ROOT / "examples" / "digits" / "digits.onnx"
    code = f"import unirt, unirt.plugins; unirt.Model({str(model)!r}).hash; unirt.plugins.names()"
    assert set(bare(code)) - set(bare("")) == {"numpy", "pluggy", "unirt"}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tflite", "reference", "tensorrt"])
def test_a_plugin_loads_its_vendor_library_only_when_used(name: str) -> None:
    loaded = set(bare(f"import unirt.plugins; assert unirt.plugins.plugin({name!r}).backend"))
    assert loaded - set(bare("")) == {"numpy", "pluggy", "unirt", f"unirt_{name}"}
