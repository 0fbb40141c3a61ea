"""The command line as a shell sees it: what it prints where, and how it exits."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from unirt import cli
from unirt.cli import terminal
from unirt.cli.layers import document as layers_document
from unirt.cli.layers import show_report
from unirt.testing import NETWORKS

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
MODEL, TEST = str(DIGITS / "digits.onnx"), str(DIGITS / "test.npz")
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell or C library")
ENGINES = {"onnxruntime", "openvino", "tflite", "reference"}
"""Those that every machine of ours runs; TensorRT needs a GPU."""
LAYERS = DIGITS.parent.parent / "tests" / "data" / "layers" / "cnn.rtx-1.6.1.txt"
PROFILE = "image=1x1x8x8:8x1x8x8:64x1x8x8"

# An engine that writes to stdout by every way there is, the last one when the process ends.
CHATTY = """
import atexit, ctypes, os
import unirt

class Chatty(unirt.Backend):
    name = "chatty"
    formats = ("onnx",)
    def _probe(self): return unirt.Availability.yes("1.0")
    def _compile(self, file, device, options):
        print("chatter from print", flush=True)
        os.write(1, b"chatter from write\\n")
        ctypes.CDLL(None).printf(b"chatter from printf\\n")
        atexit.register(os.write, 1, b"chatter at exit\\n")
        raise ValueError("compiles nothing")

@unirt.hookimpl
def unirt_backend(): return Chatty()
"""


def unirt(*arguments: str, code: int = 0, **environment: str) -> str:
    """What one command prints on stdout; its exit code is checked."""
    done = process(*arguments, **environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("UNIRT_BACKEND", "COLUMNS")}
    return subprocess.run(
        [sys.executable, "-m", "unirt.cli", *arguments],
        capture_output=True,
        text=True,
        env={**env, **environment},
        timeout=120,
    )


def document(*arguments: str, code: int = 0, **environment: str) -> Any:
    return json.loads(unirt(*arguments, "--json", code=code, **environment))


def install(site: Path, name: str, code: str) -> str:
    """A plugin as pip leaves it; `site` is for PYTHONPATH."""
    info = site / f"my_{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"my_{name}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: my-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[unirt.backends]\n{name} = my_{name}\n")
    return str(site)


# --- the frame -----------------------------------------------------------------------------------


def test_help_and_version() -> None:
    runner = CliRunner()
    assert "unirt 0." in runner.invoke(cli.app, ["--version"]).output
    for command in (
        [],
        ["doctor"],
        ["inspect"],
        ["select"],
        ["build"],
        ["run"],
        ["compare"],
        ["explain"],
        ["calibrate"],
        ["sensitivity"],
        ["quantize"],
        ["cast"],
        ["sparsify"],
    ):
        shown = runner.invoke(cli.app, [*command, "--help"])
        assert shown.exit_code == 0
        assert "Exit codes: 0 done" in shown.output
    assert runner.invoke(cli.app, ["compare"]).exit_code == 2
    assert runner.invoke(cli.app, ["no-such-command"]).exit_code == 2


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("unirt")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("unirt ")


def test_it_starts_without_any_engine() -> None:
    code = "import unirt.cli, sys; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"onnxruntime", "openvino", "ai_edge_litert", "onnx"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("unirt compare m.onnx op", ["openvino"]),
        ("unirt run m.onnx -c ", sorted(ENGINES)),
        ("unirt run m.onnx -c openvino@c", ["openvino@cpu"]),
        ("unirt run m.onnx -o onnxruntime.thr", ["onnxruntime.threads="]),
        ("unirt ins", ["inspect"]),
    ],
)
def test_a_shell_completes_candidates_and_options(words: str, expected: list[str]) -> None:
    listed = words.split(" ")
    done = subprocess.run(
        [Path(sys.executable).with_name("unirt")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(listed) - 1),
            "_UNIRT_COMPLETE": "complete_bash",
        },
    )
    assert set(expected) <= set(done.stdout.split())
    if listed[-1]:
        assert done.stdout.split() == expected


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["inspect", "nosuch.onnx"], 3, "ModelNotFound"),
        (["select", TEST], 3, "ModelError"),
        (["run", MODEL, "-c", "openvino@npu"], 1, "BackendUnavailable"),
        (["run", MODEL, "-c", "NotOne"], 2, "CandidateError"),
        (["run", MODEL, "-c", "onnxruntime", "-o", "thread=1"], 2, "OptionError"),
        (["run", MODEL, "-o", "threads=1"], 2, "OptionError"),
        (["run", MODEL, "-c", "onnxruntime", "-o", "openvino.threads=1"], 2, "OptionError"),
        (["run", MODEL, "--shape", "batch=many"], 2, "OptionError"),
        (["run", MODEL, "--shape", "seq=4"], 3, "DataError"),
        (["run", MODEL, "--inputs", "nosuch.npz"], 3, "DataError"),
        (["run", MODEL, "--out", "outputs.txt"], 2, "OptionError"),
        (["run", MODEL, "--out", "/no/such/folder/outputs.npz"], 3, "DataError"),
        (["build", MODEL, "-c", "nosuch"], 1, "BackendUnavailable"),
        (["build", MODEL, "-c", "onnxruntime:int8"], 3, "DataError"),
        (["build", MODEL, "-c", "onnxruntime:fp8"], 1, "BackendUnavailable"),
        (["build", MODEL, "-c", "onnxruntime", "--out", "digits.bin"], 1, "BackendUnavailable"),
        (["build", MODEL, "-c", "onnxruntime", "--out", "."], 2, "OptionError"),
        (["build", MODEL, "-c", "onnxruntime", "--out", MODEL], 2, "OptionError"),
        (["build", MODEL, "-c", "tensorrt@aot", "--out", "new.onnx"], 2, "OptionError"),
        (["build", "nosuch.onnx", "-c", "onnxruntime"], 3, "ModelNotFound"),
        (["build", MODEL, "-c", "onnxruntime", "--profile", "image"], 2, "OptionError"),
        (["build", MODEL, "-c", "onnxruntime", "--profile", "image=1x1:2x1"], 2, "OptionError"),
        (["build", MODEL, "-c", "onnxruntime", "--profile", "x=2:1:3"], 2, "OptionError"),
        (["build", MODEL, "-c", "onnxruntime", "--profile", "x=2;x=3"], 2, "OptionError"),
        (["build", MODEL, "-c", "onnxruntime", "--profile", ";"], 2, "OptionError"),
        (["build", MODEL, "-c", "onnxruntime", "--profile", "img=1x1x8x8"], 2, "ProfileError"),
        (["build", MODEL, "-c", "onnxruntime", "--profile", "image=1x8x8"], 2, "ProfileError"),
        (["build", MODEL, "-c", "onnxruntime", "--hot", PROFILE], 2, "OptionError"),
        (["build", MODEL, "-c", "onnxruntime", "--hot", "img=1"], 2, "ProfileError"),
        (["inspect", MODEL, "--times"], 2, "OptionError"),
        (["inspect", MODEL, "--profile", PROFILE], 2, "OptionError"),
        (["inspect", MODEL, "--data", TEST], 2, "OptionError"),
        (["inspect", MODEL, "-c", "onnxruntime:int8"], 3, "DataError"),
        (["inspect", MODEL, "-c", "onnxruntime:int8", "--data", "nosuch.npz"], 3, "DataError"),
        (["inspect", "any.plan", "--calibration", "ranges.json"], 2, "OptionError"),
        (["run", MODEL, "-c", "onnxruntime:int8", "--data", "nosuch.npz"], 3, "DataError"),
        (["inspect", MODEL, "-c", "reference"], 1, "BackendUnavailable"),
        (["inspect", MODEL, "-c", "reference", "--times"], 1, "BackendUnavailable"),
        (["inspect", MODEL, "-c", "onnxruntime", "-o", "openvino.threads=1"], 2, "OptionError"),
        (["inspect", "nosuch.plan"], 3, "ModelNotFound"),
        (["inspect", "any.plan", "--times"], 2, "OptionError"),
        (["inspect", "any.plan", "-c", "tensorrt"], 2, "OptionError"),
        (["compare", MODEL, "--data", "nosuch.npz"], 3, "DataError"),
        (["compare", MODEL, "tflite", "--reference", "openvino@npu"], 1, "BackendUnavailable"),
    ],
)
def test_errors_are_three_lines_or_json(arguments: list[str], code: int, told: str) -> None:
    runner = CliRunner()
    shown = runner.invoke(cli.app, arguments)
    assert shown.exit_code == code
    assert shown.stdout == ""
    assert "error: " in shown.stderr
    assert "Traceback" not in shown.stderr
    asked = runner.invoke(cli.app, [*arguments, "--json"])
    assert asked.exit_code == code
    error = json.loads(asked.stdout)["error"]
    assert error["type"] == told
    assert error["what"]
    assert error["why"]
    assert error["remedy"]
    traced = runner.invoke(cli.app, [*arguments, "--debug"])
    assert traced.exit_code == code
    assert "Traceback" in traced.stderr


@posix_only
def test_an_engine_that_fails_exits_with_4_and_its_chatter_spoils_no_json(tmp_path: Path) -> None:
    site = install(tmp_path, "chatty", CHATTY)
    done = process("run", MODEL, "-c", "chatty", "--json", PYTHONPATH=site)
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "BuildError"
    assert "compiles nothing" in error["why"]
    for way in ("from print", "from write", "from printf", "at exit"):
        assert f"chatter {way}" in done.stderr


@posix_only
@pytest.mark.parametrize("command", ["doctor", "doctor --options", "doctor --json", "--help"])
def test_a_reader_that_has_enough_is_no_error(command: str) -> None:
    for reader in ("head -1", "true"):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m unirt.cli {command} | {reader}; "
             "echo ${PIPESTATUS[0]}"],
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "0"
        assert done.stderr == ""


def test_control_characters_of_strangers_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07 \x9b2J\r"
    site = install(tmp_path, "evil", f"print({evil!r})\nraise RuntimeError({evil!r})")
    done = process("doctor", PYTHONPATH=site)
    assert "owned" in done.stdout
    failed = process("run", f"{evil}.onnx")
    assert "owned" in failed.stderr
    for text in (done.stdout, failed.stderr):
        assert not set("\x1b\x07\x9b\r") & set(text)


def test_what_a_plugin_prints_is_no_output(tmp_path: Path) -> None:
    site = install(tmp_path, "chatty", f"print('chatter at import')\n{CHATTY}")
    for arguments in (["doctor"], ["select", MODEL], ["run", MODEL]):
        done = process(*arguments, PYTHONPATH=site)
        assert "chatter at import" not in done.stdout
        assert "chatter at import" in done.stderr


def test_while_building_a_spinner_turns_and_while_timing_nothing_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.0)
    shown = io.StringIO()
    teller = terminal.Teller(terminal.SafeConsole(file=shown, force_terminal=True), True)
    teller("building something", 0.0)
    time.sleep(0.5)
    assert "building something" in shown.getvalue()
    before = len(shown.getvalue())
    time.sleep(0.3)
    assert len(shown.getvalue()) > before
    teller("timing calls", 0.0)
    before = len(shown.getvalue())
    time.sleep(0.3)
    assert len(shown.getvalue()) == before
    teller.stop()


def test_progress_is_for_terminals_only() -> None:
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    arguments = [sys.executable, "-m", "unirt.cli", "compare", MODEL, "onnxruntime", "openvino"]
    arguments += ["--seconds", "1"]
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=terminal, env=environment
    ) as started:
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(main, 4096):
                shown += part
        except OSError:  # Linux says so that the other end of the terminal is gone
            pass
        out = started.communicate()[0]
    os.close(main)
    assert b"timing calls" in shown
    assert b"\x1b" in shown
    assert b"\x1b" not in out
    assert b"Winner: " in out
    done = process("compare", MODEL, "onnxruntime", "--seconds", "0.8")
    assert "timing" not in done.stderr


# --- doctor --------------------------------------------------------------------------------------


def test_doctor_shows_machine_and_engines() -> None:
    text = unirt("doctor")
    for word in ("UniRT 0.", "NumPy", "Devices", "cpu", "NVIDIA", *ENGINES):
        assert word in text
    told = document("doctor", "--options")
    assert told["ok"]
    assert told["devices"][0]["device"] == "cpu"
    assert {plugin["name"] for plugin in told["plugins"] if plugin["available"]} >= ENGINES
    (options,) = (plugin["options"] for plugin in told["plugins"] if plugin["name"] == "tflite")
    assert all(option["help"] and option["type"] for option in options)


def test_doctor_gives_every_bad_plugin_its_line(tmp_path: Path) -> None:
    site = install(tmp_path, "broken", "raise RuntimeError('half installed')")
    install(tmp_path, "hanging", "import time; time.sleep(30)")
    install(tmp_path, "tflite", CHATTY)
    environment = {"PYTHONPATH": site, "UNIRT_PLUGIN_TIMEOUT": "1", "COLUMNS": "200"}
    told = document("doctor", **environment)
    assert {plugin["name"] for plugin in told["plugins"] if plugin["available"]} >= ENGINES
    reasons = {plugin["name"]: plugin["reason"] for plugin in told["plugins"] if plugin["reason"]}
    assert "half installed" in reasons["broken"]
    assert "longer than 1 s" in reasons["hanging"]
    assert "a second plugin" in reasons["tflite"]
    text = unirt("doctor", **environment)
    assert "not usable: its import raised RuntimeError: half installed; fix it" in text
    assert "pip uninstall my-tflite" in text


def test_doctor_exits_with_1_where_nothing_works(tmp_path: Path) -> None:
    # What a machine without any vendor library is to the plugins.
    blocked = "".join(
        f"import sys; sys.modules[{name!r}] = None\n"
        for name in (
            *("onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime", "onnx"),
            *("tensorrt", "tensorrt_rtx"),
        )
    )
    (tmp_path / "sitecustomize.py").write_text(blocked)
    told = document("doctor", code=1, PYTHONPATH=str(tmp_path))
    assert not told["ok"]
    assert all("pip install" in plugin["hint"] for plugin in told["plugins"])
    text = unirt("select", MODEL, code=1, PYTHONPATH=str(tmp_path))
    assert "No engine of this machine can run this model." in text
    error = document("run", MODEL, code=1, PYTHONPATH=str(tmp_path))["error"]
    assert error["type"] == "NoBackend"
    assert set(error["facts"]["reasons"]) == {*ENGINES, "tensorrt"}


# --- inspect and select --------------------------------------------------------------------------


def test_inspect_describes_every_format() -> None:
    told = document("inspect", MODEL, "--beside")
    assert list(told["formats"]) == ["onnx", "tflite"]
    assert told["inputs"] == [
        {"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8], "kind": "tensor"}
    ]
    onnx = told["formats"]["onnx"]
    assert onnx["operators"]["Conv"] == 5
    assert onnx["size_bytes"] == Path(MODEL).stat().st_size
    text = unirt("inspect", MODEL)
    for word in ("digits", "image", "[batch, 1, 8, 8]", onnx["hash"], "Conv 5", "ai.onnx 18"):
        assert word in text


def test_select_ranks_and_gives_reasons() -> None:
    told = document("select", MODEL)
    assert told["best"] == told["candidates"][0]["candidate"]
    rows = {row["candidate"]: row for row in told["candidates"]}
    assert "the model is there as onnx only" in rows["tflite@cpu"]["excluded"]
    assert "add --beside, since digits.tflite is there" in rows["tflite@cpu"]["hint"]
    beside = {row["candidate"]: row for row in document("select", MODEL, "--beside")["candidates"]}
    assert all(beside[f"{name}@cpu"]["usable"] for name in ENGINES)
    assert (
        "add --beside" in document("run", MODEL, "-c", "tflite", code=4)["error"]["remedy"].lower()
    )
    text = unirt("select", MODEL, "-c", "openvino", "-c", "openvino@npu")
    assert "Best: openvino" in text
    assert "openvino@npu" in text
    assert "onnxruntime@cpu" not in text
    assert document("select", MODEL, "-c", "nosuch", code=1)["best"] is None


# --- build, and inspect with layers --------------------------------------------------------------


def needs_tensorrt() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx, which builds plans, is missing")


def test_build_says_what_came_of_it() -> None:
    told = document("build", MODEL, "-c", "onnxruntime:fp16", "-o", "threads=1")
    assert told["candidate"] == "onnxruntime@cpu:fp16"
    assert told["model"] == "digits"
    assert told["build_seconds"] > 0
    assert told["facts"]["provider"] == "CPUExecutionProvider"
    assert told["saved"] is None
    text = unirt("build", MODEL, "-c", "onnxruntime", "--profile", "image=1x1x8x8")
    assert text.startswith("onnxruntime@cpu, built in ")
    assert "CPUExecutionProvider" in text


def test_what_is_quantized_is_calibrated_on_data_or_by_a_file(tmp_path: Path) -> None:
    saved = tmp_path / "ranges.json"
    unirt("calibrate", MODEL, "--data", TEST, "-o", str(saved), "--method", "max")
    for command in ("inspect", "build", "run"):
        for given, method in (("--data", "mse"), ("--calibration", "max")):
            file = TEST if given == "--data" else str(saved)
            told = document(command, MODEL, "-c", "onnxruntime:int8", given, file)
            found = told["engine"]["facts"] if command == "inspect" else told.get("facts")
            quantization = (found or told.get("decision"))["quantization"]
            assert quantization["calibration"] == {"method": method, "samples": 450}, command
    assert "quantized to int8" in unirt("inspect", MODEL, "-c", "onnxruntime:int8", "--data", TEST)


def test_build_saves_what_inspect_shows(tmp_path: Path) -> None:
    needs_tensorrt()
    plan = tmp_path / "digits.plan"
    built = ["build", MODEL, "-c", "tensorrt@aot:fp16", "--profile", PROFILE]
    text = unirt(*built, "--hot", "image=1x1x8x8", "--out", str(plan), COLUMNS="200")
    assert "image [1, 1, 8, 8] to [64, 1, 8, 8], most often [8, 1, 8, 8]" in text
    assert f"Saved: {plan}" in text
    assert plan.stat().st_mode & 0o777 == 0o666 & ~_umask()
    told = document("inspect", str(plan))
    assert told["engine"] == str(plan)
    layers = told["layers"]
    assert layers["precisions"]["float16"] > 1
    assert layers["fused"]
    assert {layer["profile"] for layer in layers["layers"]} == {0, 1}
    text = unirt("inspect", str(plan), COLUMNS="140")
    for word in (
        "profile 1",
        "/features/features.0/Conv",
        "float16 NHWC",
        "Conv + Relu",
        "summary",
    ):
        assert word in text
    assert document(*built)["saved"] is None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_inspect_shows_the_layers_that_an_engine_makes(columns: int) -> None:
    needs_tensorrt()
    text = unirt("inspect", MODEL, "-c", "tensorrt@aot", COLUMNS=str(columns))
    assert max(len(line) for line in text.splitlines() if "onnx, " not in line) <= columns
    for word in ("[batch, 1, 8, 8]", "tensorrt@aot, built in ", "layer  ", "nodes", "summary"):
        assert word in text
    told = document("inspect", MODEL, "-c", "tensorrt@aot", "--shape", "batch=4")
    assert told["formats"]["onnx"]["operators"]["Conv"] == 5
    assert told["engine"]["facts"]["profiles"] == ["image [4, 1, 8, 8]"]
    assert told["layers"]["source"] == "builder log"
    named = document("inspect", MODEL, "-c", "tensorrt@aot", "-o", "verbosity=names")["layers"]
    assert "verbosity=detailed" in named["notes"][0]


def test_what_is_built_ahead_of_time_does_not_run() -> None:
    needs_tensorrt()
    for arguments in (["run", MODEL], ["inspect", MODEL, "--times"]):
        error = document(*arguments, "-c", "tensorrt@aot", code=1)["error"]
        assert error["type"] == "BackendUnavailable"
        assert "ahead of time" in error["what"]
    told = document("select", MODEL, "-c", "tensorrt@aot", "-c", "onnxruntime")
    assert told["best"] == "onnxruntime"
    assert "run elsewhere" in told["candidates"][-1]["excluded"]
    (row,) = (one for one in document("doctor")["plugins"] if one["name"] == "tensorrt")
    assert row["targets"] == ["aot"]


def test_a_damaged_engine_file_is_an_error_of_the_file(tmp_path: Path) -> None:
    needs_tensorrt()
    good = tmp_path / "good.plan"
    unirt("build", MODEL, "-c", "tensorrt@aot", "--out", str(good))
    plan, about = good.read_bytes(), (tmp_path / "good.plan.json").read_text()
    for number, (content, description) in enumerate(
        [
            (plan[:-1], about),
            (b"", about),
            (plan, about[:100]),
            (plan, "[]"),
            (plan, about.replace('"layers"', '"lairs"')),
        ]
    ):
        bad = tmp_path / f"{number}.plan"
        bad.write_bytes(content)
        bad.with_name(f"{bad.name}.json").write_text(description)
        error = document("inspect", str(bad), code=3)["error"]
        assert error["type"] == "ModelError"
        assert bad.name in error["what"]
    if document("doctor")["devices"][-1]["device"].startswith("cuda"):
        pytest.skip("there is a GPU here, which reads plans without their description")
    alone = tmp_path / "alone.plan"
    alone.write_bytes(plan)
    error = document("inspect", str(alone), code=1)["error"]
    assert "alone.plan.json" in error["remedy"]


def test_layers_that_were_timed_show_their_share() -> None:
    unirt_tensorrt = pytest.importorskip("unirt_tensorrt._layers")
    report = unirt_tensorrt.from_builder_log([LAYERS.read_text()], {})
    timed = report.with_times((layer.name, 1e-6 * k) for k, layer in enumerate(report.layers))
    for width in (60, 80, 160):
        out = io.StringIO()
        show_report(terminal.SafeConsole(file=out, width=width), timed)
        assert "time" in out.getvalue()
        assert "share" in out.getvalue()
        assert "15.0 µs in all layers" in out.getvalue()
        assert max(map(len, out.getvalue().splitlines())) <= width
    told = layers_document(timed)
    assert told["seconds"] == pytest.approx(15e-6)
    assert json.loads(json.dumps(told))["format"] == 1


def test_a_bar_shows_how_far_a_build_is_and_is_gone_afterwards() -> None:
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    code = (
        "import time\n"
        "from unirt.backend import BuildStep\n"
        "from unirt.cli import terminal\n"
        "terminal.PATIENCE_SECONDS = 0.05\n"
        "with terminal.building('digits', False) as tell:\n"
        "    for step in range(5):\n"
        "        time.sleep(0.1)\n"
        "        tell(BuildStep('all', '', step, 4))\n"
        "        tell(BuildStep('folding', 'all', step, 4))\n"
        "print('done')\n"
    )
    main, tty = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=tty, env=environment
    ) as started:
        os.close(tty)
        shown = b""
        try:
            while part := os.read(main, 4096):
                shown += part
        except OSError:  # Linux says so that the other end of the terminal is gone
            pass
        out = started.communicate()[0]
    os.close(main)
    assert b"building digits: folding" in shown
    assert shown.rstrip().endswith(b"\x1b[2K")
    assert out == b"done\n"


# --- run -----------------------------------------------------------------------------------------


def test_run_takes_files_and_saves_outputs(tmp_path: Path) -> None:
    with np.load(TEST) as arrays:
        image, labels = arrays["image"], arrays["labels"]
    out = tmp_path / "out.npz"
    told = document("run", MODEL, "--inputs", TEST, "--out", str(out), "-c", "openvino")
    assert told["candidate"] == "openvino"
    assert told["decision"]["how"] == "named"
    assert told["outputs"]["logits"]["shape"] == [450, 10]
    with np.load(out) as saved:
        logits = saved["logits"]
    assert np.mean(logits.argmax(1) == labels) >= 0.97
    assert told["outputs"]["logits"]["max"] == pytest.approx(float(logits.max()))
    np.save(tmp_path / "one.npy", image[:1])
    for given in (f"image={tmp_path / 'one.npy'}", str(tmp_path / "one.npy")):
        values = document("run", MODEL, "--input", given)["outputs"]["logits"]["values"]
        np.testing.assert_allclose(values, logits[:1], rtol=1e-4, atol=1e-4)
    np.save(tmp_path / "wrong.npy", image.astype(np.float64))
    error = document("run", MODEL, "-i", str(tmp_path / "wrong.npy"), code=3)["error"]
    assert error["type"] == "InputError"


def test_run_makes_up_inputs_by_seed_and_says_what_ran() -> None:
    text = unirt("run", MODEL, "--shape", "batch=2", "--seed", "7")
    assert "Inputs (random, seed 7): image: float32 [2, 1, 8, 8]" in text
    assert "float32 [2, 10]" in text
    assert "Engine: onnxruntime@cpu, first of the ranking: +" in text
    first, again, other = (document("run", MODEL, "--seed", s)["outputs"] for s in "112")
    assert first == again != other
    told = document("run", MODEL, "-o", "onnxruntime.threads=1", UNIRT_BACKEND="reference")
    assert told["decision"]["how"] == "environment"


def test_run_shows_what_fell_out(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import onnxruntime\n"
        "def refuse(*_, **__): raise MemoryError('out of \\x1b[2J fairy dust')\n"
        "onnxruntime.InferenceSession = refuse\n"
    )
    done = process("run", MODEL, PYTHONPATH=str(tmp_path), COLUMNS="300")
    text = done.stdout
    assert "Fell out: onnxruntime@cpu" in text
    assert "fairy dust" in done.stderr
    assert "\x1b" not in text + done.stderr
    assert "fairy dust" in text
    assert "Engine: openvino@cpu, next of the ranking" in text


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_run_sums_up_outputs_of_every_type(network: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(NETWORKS[network].model(("onnx",)).primary.read())
    out = tmp_path / "out.npz"
    runner = CliRunner()
    shown = runner.invoke(
        cli.app, ["run", str(path), "-c", "onnxruntime", "--json", "--out", str(out)]
    )
    assert shown.exit_code == 0, shown.stdout
    told = json.loads(shown.stdout)["outputs"]
    with np.load(out) as saved:
        assert set(saved.files) == set(told)
        for name, summary in told.items():
            assert list(saved[name].shape) == summary["shape"]
    assert runner.invoke(cli.app, ["run", str(path), "-c", "onnxruntime"]).exit_code == 0


# --- compare -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`compare` on the first samples: NumPy, the reference, is slow."""
    path = tmp_path_factory.mktemp("data") / "few.npz"
    with np.load(TEST) as arrays:
        np.savez(path, **{name: array[:40] for name, array in arrays.items()})
    return ["compare", MODEL, "--data", str(path), "--seconds", "0.2"]


def test_compare_runs_the_readme_command() -> None:
    compared = document("compare", MODEL, "--data", TEST, "--seconds", "0.2")
    rows = {row["candidate"]: row for row in compared["candidates"]}
    slow = rows["reference@cpu"]
    assert slow["eligible"] or "NumPy would take some" in slow["excluded"]
    for row in (rows[f"{name}@cpu"] for name in sorted(ENGINES - {"reference"})):
        assert row["eligible"]
        assert row["task_accuracy"] >= 0.97
        assert row["latency"]["median_seconds"] > 0
        assert (row["latency"]["p95_seconds"] is None) == (row["latency"]["calls"] < 20)
        assert row["throughput_per_second"] > 0
    assert compared["winner"] in rows
    assert compared["why"]
    assert compared["machine"]["cpu"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_compare_fits_the_terminal_and_breaks_no_number(few: list[str], columns: int) -> None:
    text = unirt(*few, "onnxruntime", "tflite", "openvino@npu", COLUMNS=str(columns))
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    assert "\x1b" not in text
    titles = [line.split() for line in lines if line.startswith("candidate")]
    shown = [title for line in titles for title in line]
    for title in ("median", "p95", "ratio", "samples/s", "error", "accuracy"):
        assert shown.count(title) == 1
    for engine in ("onnxruntime@cpu", "tflite@cpu"):
        cells = [line.split() for line in lines if line.startswith(engine)]
        assert len(cells) == len(titles)
        told = " ".join(cell for line in cells for cell in line)
        assert re.search(r" [\d.,]+ [µm]s ([\d.,]+ [µm]s|\u2013) [\d.,]+x ", f"{told} ")
        assert re.search(r"\d\.\de-\d\d", told)
        assert re.search(r"\d\d\.\d\d%", told)
    assert "Winner: " in text
    assert "machine" in text
    assert "openvino@npu" in text


def test_compare_says_who_is_out_and_exits_with_1_without_a_winner(few: list[str]) -> None:
    told = document(*few, "tflite", "--no-beside", code=1)
    assert told["winner"] is None
    assert "this model is there as onnx" in told["candidates"][0]["excluded"]
    assert told["candidates"][0]["error_type"] == "BuildError"
    strict = document(*few, "tflite", "--max-error", "1e-12", code=1)
    assert strict["candidates"][0]["excluded"].startswith("not eligible: error ")
    assert "No winner: " in unirt(*few, "tflite", "--max-error", "1e-12", code=1)


def test_compare_takes_options_references_and_batches(few: list[str]) -> None:
    told = document(
        *few, "onnxruntime", "openvino", "-o", "onnxruntime.threads=1",
        "--reference", "openvino", "--batch", "15",
    )  # fmt: skip
    assert told["reference"] == "openvino@cpu"
    assert told["batch"] == 15
    error = document(*few, "openvino", "-o", "onnxruntime.threads=1", code=2)["error"]
    assert error["type"] == "OptionError"
    assert document(*few, "onnxruntime", "-o", "threads=1")["winner"]


def test_compare_drops_a_neighbour_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(Path(MODEL).read_bytes())
    (tmp_path / "digits.tflite").write_bytes(b"not a model at all")
    told = document("compare", str(tmp_path / "digits.onnx"), "onnxruntime", "--seconds", "0.1")
    assert told["winner"] == "onnxruntime@cpu"
    assert any("digits.tflite" in note for note in told["notes"])
