"""Precision as model -> model transforms: the result is an ONNX graph that any engine can run."""

from unirt.precision.calibrate import Observations, calibrate, observe
from unirt.precision.cast import Cast, cast
from unirt.precision.dequantize import Dequantized, dequantize
from unirt.precision.litert import QuantizedTFLite, quantize_tflite
from unirt.precision.quantize import Quantized, quantize
from unirt.precision.ranges import Calibration, Range
from unirt.precision.recipes import RECIPES, Recipe, recipe_for
from unirt.precision.search import Budget, Search, Step, search
from unirt.precision.sensitivity import Sensitivity, sensitivity
from unirt.precision.sparsity import (
    LayerSparsity,
    Pruned,
    Sparsified,
    SparsityTable,
    check_sparsity,
    sparsify,
)
from unirt.precision.trial import Measured

__all__ = [
    "RECIPES",
    "Budget",
    "Calibration",
    "Cast",
    "Dequantized",
    "LayerSparsity",
    "Measured",
    "Observations",
    "Pruned",
    "Quantized",
    "QuantizedTFLite",
    "Range",
    "Recipe",
    "Search",
    "Sensitivity",
    "Sparsified",
    "SparsityTable",
    "Step",
    "calibrate",
    "cast",
    "check_sparsity",
    "dequantize",
    "observe",
    "quantize",
    "quantize_tflite",
    "recipe_for",
    "search",
    "sensitivity",
    "sparsify",
]
