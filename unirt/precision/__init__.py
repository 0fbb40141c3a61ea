"""Precision as model -> model transforms: the result is an ONNX graph that any engine can run."""

from unirt.precision.cast import Cast, cast

__all__ = ["Cast", "cast"]
