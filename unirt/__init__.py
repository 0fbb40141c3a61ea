"""UniRT runs one neural network on whichever inference engine is best here, and shows why.

import unirt

session = unirt.load("model.onnx")
outputs = session.run({"x": array})
"""

from typing import TYPE_CHECKING, Any

from unirt.arrays import DeviceArray
from unirt.backend import (
    Backend,
    BuildRequest,
    BuildStep,
    Engine,
    SupportsBuildRequest,
    SupportsEngineFiles,
    SupportsInspection,
    SupportsSave,
)
from unirt.candidates import backends, devices, select
from unirt.devices import host_devices
from unirt.errors import (
    BackendError,
    BackendUnavailable,
    BuildCancelled,
    BuildError,
    CandidateError,
    ClosedError,
    DataError,
    InputError,
    ModelError,
    ModelNotFound,
    NoBackend,
    OptionError,
    ProfileError,
    UnirtError,
)
from unirt.inspection import EngineReport, Layer, LayerTensor
from unirt.loading import Attempt, Decision, build, load
from unirt.model import Model, ModelFile
from unirt.options import Options, option
from unirt.plugins import Plugin, hookimpl
from unirt.pool import Pool
from unirt.selector import Selection
from unirt.session import (
    Binding,
    Session,
    SupportsBind,
    SupportsDeviceArrays,
    SupportsProfiling,
)
from unirt.shapes import ShapeProfile
from unirt.types import CPU, Availability, Candidate, Device, TensorSpec

if TYPE_CHECKING:
    from unirt.comparison import Comparison, compare
    from unirt.explanation import Explanation, explain
    from unirt.explanation.diagnosis import Finding

__version__ = "0.1.0"

__all__ = [
    "CPU",
    "Attempt",
    "Availability",
    "Backend",
    "BackendError",
    "BackendUnavailable",
    "Binding",
    "BuildCancelled",
    "BuildError",
    "BuildRequest",
    "BuildStep",
    "Candidate",
    "CandidateError",
    "ClosedError",
    "Comparison",
    "DataError",
    "Decision",
    "Device",
    "DeviceArray",
    "Engine",
    "EngineReport",
    "Explanation",
    "Finding",
    "InputError",
    "Layer",
    "LayerTensor",
    "Model",
    "ModelError",
    "ModelFile",
    "ModelNotFound",
    "NoBackend",
    "OptionError",
    "Options",
    "Plugin",
    "Pool",
    "ProfileError",
    "Selection",
    "Session",
    "ShapeProfile",
    "SupportsBind",
    "SupportsBuildRequest",
    "SupportsDeviceArrays",
    "SupportsEngineFiles",
    "SupportsInspection",
    "SupportsProfiling",
    "SupportsSave",
    "TensorSpec",
    "UnirtError",
    "backends",
    "build",
    "compare",
    "devices",
    "explain",
    "hookimpl",
    "host_devices",
    "load",
    "option",
    "select",
]


def __getattr__(name: str) -> Any:
    # Who measures can wait for it; who only runs a model should not.
    if name in ("Comparison", "compare"):
        from unirt import comparison

        return getattr(comparison, name)
    if name in ("Explanation", "Finding", "explain"):
        from unirt import explanation

        return getattr(explanation, name)
    raise AttributeError(f"module 'unirt' has no attribute {name!r}")
