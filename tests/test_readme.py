"""What the README shows, runs."""

from __future__ import annotations

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
