"""Precision as model -> model transforms: the result is an ONNX graph that any engine can run."""

from unirt.precision.calibrate import Observations, calibrate, observe
from unirt.precision.cast import Cast, cast
from unirt.precision.dequantize import Dequantized, dequantize
from unirt.precision.quantize import Quantized, quantize
from unirt.precision.ranges import Calibration, Range
from unirt.precision.recipes import RECIPES, Recipe, recipe_for
from unirt.precision.sparsity import (
    LayerSparsity,
    Pruned,
    Sparsified,
    SparsityTable,
    check_sparsity,
    sparsify,
)

__all__ = [
    "RECIPES",
    "Calibration",
    "Cast",
    "Dequantized",
    "LayerSparsity",
    "Observations",
    "Pruned",
    "Quantized",
    "Range",
    "Recipe",
    "Sparsified",
    "SparsityTable",
    "calibrate",
    "cast",
    "check_sparsity",
    "dequantize",
    "observe",
    "quantize",
    "recipe_for",
    "sparsify",
]
