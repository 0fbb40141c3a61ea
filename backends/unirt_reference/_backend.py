from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unirt import Availability, Backend, Device, Engine, ModelFile, Options, Session
from unirt_reference._operators import corrections

_MAIN = ("", "ai.onnx")


class ReferenceBackend(Backend):
    name = "reference"
    formats = ("onnx",)

    def _probe(self) -> Availability:
        try:
            import onnx
        except ModuleNotFoundError as error:
            if error.name != "onnx":
                raise
            return Availability.no(
                "the onnx package is not installed", "pip install 'unirt[reference]'"
            )
        return Availability.yes(onnx.__version__)

    def _compile(self, file: ModelFile, device: Device, options: Options) -> Engine:
        import onnx
        from onnx.reference import ReferenceEvaluator

        model = onnx.load(str(file.path)) if file.external else onnx.load_from_string(file.read())
        opset = next((one.version for one in model.opset_import if one.domain in _MAIN), 0)
        return ReferenceEngine(ReferenceEvaluator(model, new_ops=corrections(opset)))


class ReferenceEngine(Engine):
    def __init__(self, evaluator: Any) -> None:
        self._evaluator = evaluator

    def _new_session(self) -> Session:
        return ReferenceSession(self._evaluator)

    def _close(self) -> None:
        del self._evaluator


class ReferenceSession(Session):
    def __init__(self, evaluator: Any) -> None:
        self._evaluator = evaluator

    def _run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        # NaN and inf are answers here, not accidents worth a warning.
        with np.errstate(all="ignore"):
            outputs = self._evaluator.run(None, dict(inputs))
        names = self._evaluator.output_names
        return {name: _owned(value) for name, value in zip(names, outputs, strict=True)}

    def _close(self) -> None:
        del self._evaluator


def _owned(value: Any) -> Any:
    """The evaluator hands inputs and constants through; an output belongs to the caller."""
    if isinstance(value, list):
        return [_owned(item) for item in value]
    return np.array(value) if isinstance(value, np.ndarray | np.generic) else value
