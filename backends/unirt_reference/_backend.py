from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unirt import Availability, Backend, Device, Engine, ModelFile, Options, Session


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
        # From opset 7 until training_mode came with 14, one output meant inference; the evaluator
        # mixes in the batch's own statistics all the same.
        corrected = [_batch_normalization()] if 7 <= file.opset.get("ai.onnx", 0) < 14 else []
        return ReferenceEngine(ReferenceEvaluator(model, new_ops=corrected))


def _batch_normalization() -> type:
    from onnx.reference.op_run import OpRun

    class BatchNormalization(OpRun):
        op_domain = ""

        def _run(
            self,
            x: Any,
            scale: Any,
            bias: Any,
            mean: Any,
            var: Any,
            epsilon: float | None = None,
            momentum: float | None = None,
            training_mode: int | None = None,  # of the newest schema, which is asked for it
            spatial: int | None = None,
        ) -> tuple[Any]:
            if len([name for name in self.onnx_node.output if name]) > 1 or spatial == 0:
                raise ValueError("BatchNormalization is only evaluated in inference mode")
            per_channel = (-1, *[1] * (x.ndim - 2))
            factor = scale / np.sqrt(var + (1e-5 if epsilon is None else epsilon))
            shift = bias - mean * factor
            return ((x * factor.reshape(per_channel) + shift.reshape(per_channel)).astype(x.dtype),)

    return BatchNormalization


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
