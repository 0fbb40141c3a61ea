"""Operators that onnx's evaluator gets wrong, or lacks, in some opsets. It wants classes of their
names, whose `_run` takes the attributes of the newest schema, whatever the model's is.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def corrections(opset: int) -> list[type]:
    """What to pass to ReferenceEvaluator as `new_ops` for a model of that opset."""
    found = []
    if 7 <= opset < 14:
        found.append(_batch_normalization())
    if 10 <= opset < 19:
        found += _quantization()
    return found


def _batch_normalization() -> type:
    """From opset 7 until training_mode came with 14, one output meant inference; the evaluator
    mixes in the batch's own statistics all the same.
    """
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
            training_mode: int | None = None,
            spatial: int | None = None,
        ) -> tuple[Any]:
            if len([name for name in self.onnx_node.output if name]) > 1 or spatial == 0:
                raise ValueError("BatchNormalization is only evaluated in inference mode")
            per_channel = (-1, *[1] * (x.ndim - 2))
            factor = scale / np.sqrt(var + (1e-5 if epsilon is None else epsilon))
            shift = bias - mean * factor
            return ((x * factor.reshape(per_channel) + shift.reshape(per_channel)).astype(x.dtype),)

    return BatchNormalization


def _quantization() -> list[type]:
    """The evaluator has DequantizeLinear from opset 19 on only; before, both know 8-bit integers,
    and int32 for biases.
    """
    from onnx.reference.op_run import OpRun

    class QuantizeLinear(OpRun):
        op_domain = ""

        def _run(
            self,
            x: Any,
            scale: Any,
            zero: Any = None,
            axis: int | None = None,
            saturate: int | None = None,
            block_size: int | None = None,
            output_dtype: int | None = None,
            precision: int | None = None,
        ) -> tuple[Any]:
            zero = np.zeros_like(scale, np.uint8) if zero is None else zero
            limits = np.iinfo(zero.dtype)
            steps = np.rint(x.astype(np.float32) / _along(scale, x, axis))
            codes = np.clip(steps + _along(zero, x, axis), limits.min, limits.max)
            return (codes.astype(zero.dtype),)

    class DequantizeLinear(OpRun):
        op_domain = ""

        def _run(
            self,
            x: Any,
            scale: Any,
            zero: Any = None,
            axis: int | None = None,
            block_size: int | None = None,
            output_dtype: int | None = None,
        ) -> tuple[Any]:
            codes = x.astype(np.int32)
            if zero is not None:
                codes = codes - _along(zero, x, axis).astype(np.int32)
            return (codes.astype(np.float32) * _along(scale, x, axis),)

    return [QuantizeLinear, DequantizeLinear]


def _along(values: Any, x: Any, axis: int | None) -> Any:
    """A scale or zero point for each index along an axis of `x`, or one for all of it."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[1 if axis is None else axis] = -1
    return values.reshape(shape)
