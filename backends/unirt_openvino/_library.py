"""OpenVINO's package, imported without its telemetry."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any


@cache
def import_openvino() -> Any:
    """The module, without what its import does beside: asking no one, it writes a client id into
    the home folder and reports to Google Analytics, from a child process that it forks.
    """
    name = "openvino_telemetry"
    if "openvino" in sys.modules or name in sys.modules:
        import openvino
    else:
        sys.modules[name] = None  # type: ignore[assignment]  # which openvino takes as not installed
        try:
            import openvino
        finally:
            sys.modules.pop(name, None)
    return openvino
