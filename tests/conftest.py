"""What several test files watch for."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that anybody calibrates."""
    counted: list[int] = []
    calibrate: Any = importlib.import_module("unirt.precision.calibration.calibrate")
    real = calibrate.observe_with

    def count(*given: Any) -> Any:
        counted.append(1)
        return real(*given)

    monkeypatch.setattr(calibrate, "observe_with", count)
    return counted
