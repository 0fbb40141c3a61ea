"""Precision as model -> model transforms: the result is an ONNX graph that any engine can run."""

from unirt.precision.calibration.calibrate import Observations, calibrate, observe
from unirt.precision.calibration.moments import SecondMoments, second_moments
from unirt.precision.calibration.ranges import Calibration, Range
from unirt.precision.casting.cast import Cast, cast
from unirt.precision.partial.measure import Sensitivity, sensitivity
from unirt.precision.partial.search import Budget, Search, Step, search
from unirt.precision.partial.trial import Measured
from unirt.precision.quantization.dequantize import Dequantized, dequantize
from unirt.precision.quantization.litert import QuantizedTFLite, quantize_tflite
from unirt.precision.quantization.quantize import Quantized, quantize
from unirt.precision.quantization.recipes import RECIPES, Recipe, recipe_for
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
    "SecondMoments",
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
    "second_moments",
    "sensitivity",
    "sparsify",
]
