"""Plugins are found the same way whoever wrote them, and a bad one costs only its own line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "backends" / "README.md").read_text()

GOOD = """
import unirt
class Good(unirt.Backend):
    name = "good"
    formats = ("onnx",)
    def _probe(self): return unirt.Availability.yes("1.0")
    def _compile(self, file, device, options): raise ValueError("compiles nothing")
@unirt.hookimpl
def unirt_backend(): return Good()
"""

LIST = """
import json, unirt
print(json.dumps([[p.name, p.distribution, p.backend is not None, p.failure, p.hint,
                   p.availability.available] for p in unirt.backends()]))
"""


def install(site: Path, distribution: str, module: str, code: str, name: str = "") -> None:
    """A distribution as pip leaves it: a module and its metadata."""
    (site / f"{module}.py").write_text(code)
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    entry = name or module.removeprefix("unirt_")
    (info / "entry_points.txt").write_text(f"[unirt.backends]\n{entry} = {module}\n")


def python(site: Path, code: str, **environment: str) -> str:
    import os

    env = {**os.environ, "PYTHONPATH": str(site), "UNIRT_PLUGIN_TIMEOUT": "2", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(site: Path) -> dict[str, list[tuple[bool, str]]]:
    rows: dict[str, list[tuple[bool, str]]] = {}
    for name, _, loaded, failure, hint, _ in json.loads(python(site, LIST)):
        assert loaded or (failure and hint)
        rows.setdefault(name, []).append((loaded, failure))
    return rows


BUILTIN = {"onnxruntime", "openvino", "tflite", "reference", "tensorrt"}


def test_a_strangers_plugin_stands_beside_the_built_in_ones(tmp_path: Path) -> None:
    install(tmp_path, "unirt-good", "unirt_good", GOOD)
    rows = listed(tmp_path)
    assert set(rows) == BUILTIN | {"good"}
    assert all(loaded for plugin in rows.values() for loaded, _ in plugin)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
        ("import no_such_vendor_library", "ModuleNotFoundError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "no hookimpl unirt_backend()"),
        ("import unirt\n@unirt.hookimpl\ndef unirt_backend(): return 7", "returns a Backend"),
        (GOOD.replace('"good"', '"other"'), "'other'"),
        (GOOD.replace("return Good()", "raise OSError('no device')"), "OSError: no device"),
    ],
)
def test_a_plugin_that_fails_costs_its_own_line(tmp_path: Path, code: str, told: str) -> None:
    install(tmp_path, "unirt-bad", "unirt_bad", code, "good" if "Good" in code else "bad")
    rows = listed(tmp_path)
    assert {name for name, plugin in rows.items() if plugin[0][0]} == BUILTIN
    (failure,) = [plugin[0][1] for name, plugin in rows.items() if name not in BUILTIN]
    assert told in failure


def test_a_plugin_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    install(tmp_path, "unirt-slow", "unirt_slow", "import time; time.sleep(30)")
    started = time.monotonic()
    rows = listed(tmp_path)
    assert time.monotonic() - started < 25
    assert "longer than 2 s" in rows["slow"][0][1]
    assert all(rows[name][0][0] for name in BUILTIN)


def test_a_named_backend_loads_without_touching_the_others(tmp_path: Path) -> None:
    install(tmp_path, "unirt-slow", "unirt_slow", "import time; time.sleep(30)")
    install(tmp_path, "unirt-good", "unirt_good", GOOD)
    code = "import sys, unirt.plugins as p; p.plugin('good'); print('unirt_slow' in sys.modules)"
    assert python(tmp_path, code).strip() == "False"


def test_a_second_plugin_of_a_name_is_refused_and_the_built_in_stays(tmp_path: Path) -> None:
    install(tmp_path, "aaa-impostor", "aaa", GOOD.replace('"good"', '"tflite"'), "tflite")
    first, second = listed(tmp_path)["tflite"]
    assert first == (True, "")
    assert second[0] is False
    assert "aaa-impostor" not in second[1]
    assert "unirt already brings one" in second[1]


def test_of_two_strangers_the_first_by_name_is_used(tmp_path: Path) -> None:
    install(tmp_path, "unirt-b", "b_good", GOOD, "good")
    install(tmp_path, "unirt-a", "a_good", GOOD, "good")
    first, second = listed(tmp_path)["good"]
    assert first[0]
    assert not second[0]
    assert "unirt-a already brings one" in second[1]


def test_a_probe_that_raises_is_a_reason(tmp_path: Path) -> None:
    code = GOOD.replace('return unirt.Availability.yes("1.0")', "raise OSError('driver too old')")
    install(tmp_path, "unirt-good", "unirt_good", code)
    found = python(tmp_path, "import unirt; print([p.availability for p in unirt.backends()])")
    assert "OSError: driver too old" in found


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise SystemExit(7)", "raised SystemExit: 7"),
        ("return None", "returned NoneType"),
        ("import time; time.sleep(30)", "took longer than 2 s"),
    ],
)
def test_a_probe_that_exits_hangs_or_says_nothing_is_a_reason(
    tmp_path: Path, body: str, told: str
) -> None:
    code = GOOD.replace('return unirt.Availability.yes("1.0")', body)
    install(tmp_path, "unirt-good", "unirt_good", code)
    show = "import unirt; print([p.availability.reason for p in unirt.backends()])"
    assert told in python(tmp_path, show, UNIRT_PROBE_TIMEOUT="2")


@pytest.mark.parametrize("body", ["raise SystemExit(9)", "return None"])
def test_a_compile_that_exits_or_returns_nothing_is_a_build_error(
    tmp_path: Path, body: str
) -> None:
    code = GOOD.replace('raise ValueError("compiles nothing")', body)
    install(tmp_path, "unirt-good", "unirt_good", code)
    ask = (
        f"import unirt\ntry: unirt.load({str(ROOT / 'examples/digits/digits.onnx')!r}, 'good')\n"
        "except unirt.BuildError as error: print('refused', error)"
    )
    assert "refused good could not compile" in python(tmp_path, ask)


def test_a_plugin_whose_name_no_candidate_can_spell_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "unirt-bad", "unirt_bad", GOOD.replace('"good"', '"Bad Name"'), "Bad Name")
    assert "is not a candidate" in listed(tmp_path)["Bad Name"][0][1]


def test_loading_a_broken_backend_by_name_says_what_broke(tmp_path: Path) -> None:
    install(tmp_path, "unirt-bad", "unirt_bad", "raise RuntimeError('half installed')")
    code = (
        "import unirt\n"
        "try: unirt.build('examples/digits/digits.onnx', 'bad')\n"
        "except unirt.BackendUnavailable as error: print(error, error.facts)"
    )
    assert "half installed" in python(tmp_path, code)


def block(language: str, after: str) -> str:
    found = re.search(rf"{re.escape(after)}.*?```{language}\n(.*?)```", GUIDE, re.S)
    assert found, after
    return found[1]


def test_the_guides_plugin_installs_into_a_venv_and_passes_the_suite(tmp_path: Path) -> None:
    code = block("python", "`unirt_toy.py`")
    assert len(code.splitlines()) <= 60
    package = tmp_path / "unirt-toy"
    package.mkdir()
    (package / "unirt_toy.py").write_text(code)
    (package / "pyproject.toml").write_text(block("toml", "`pyproject.toml`"))
    (package / "test_toy.py").write_text(block("python", "`test_toy.py`"))
    home = tmp_path / "venv"
    venv.create(home)
    scripts = home / ("Scripts" if sys.platform == "win32" else "bin")
    interpreter = str(scripts / "python")
    (site,) = home.glob("**/site-packages")
    # What this interpreter has, the new one sees too: no download in a test.
    parents = [path for path in sys.path if path.endswith("site-packages")]
    (site / "parent.pth").write_text(
        "\n".join(f"import site; site.addsitedir({path!r})" for path in parents)
    )
    install = ["-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps"]
    command = [sys.executable, *install, "--no-build-isolation", str(package)]
    subprocess.run(command, check=True, capture_output=True)
    code = "import unirt; print([p.distribution for p in unirt.backends() if p.backend])"
    found = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    assert "unirt-toy" in found.stdout
    command = [interpreter, "-m", "pytest", "-q", "-p", "unirt.testing", "-p", "no:cacheprovider"]
    suite = subprocess.run([*command, "test_toy.py"], capture_output=True, text=True, cwd=package)
    assert suite.returncode == 0, suite.stdout[-3000:]
    assert re.search(r"\d\d passed", suite.stdout)
    assert "skipped" not in suite.stdout
