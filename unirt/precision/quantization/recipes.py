"""How each kind of target wants a graph quantized. Facts here, all rewriting elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from unirt.errors import OptionError
from unirt.precision.names import nearest


@dataclass(frozen=True)
class Recipe:
    """What a target computes fast and right: `why` says so in a sentence.

    `precisions` are those it has. `asymmetric` quantizes int8 activations to uint8 with a true zero
    point, else to int8 around 0. `pair_limit`: how much two int8 weights may add up to whose
    products the target adds in 16 bits.
    `operators` compute in the low precision where their second input is a constant.

    `residual` says which inputs of an Add behind a convolution are quantized: the "skip" branch,
    where the Add fuses into the convolution of the other one, or "both", where Add has a kernel of
    its own. `outputs`: results of convolutions, after their activation, are quantized too, with
    what pools, moves or joins them, since kernels take and give integers. `integer_bias`: the
    target turns biases into int32 of scale activation times weight, which must not overflow.
    `matrix_vector`: also products with a single row or column, which read more than they compute.
    `int8_operators`: where fewer operators than these have both operands in int8. `one_scale`:
    what comes behind a product is fused into it only where its weight has a single scale, so that
    matrices have one where this costs little. Not so convolutions: with one scale TensorRT for RTX
    1.6 computes fp8 ones wrongly. `rest` is what the target computes all else in, once the graph is
    quantized: a candidate's graph is cast to it.
    """

    name: str
    why: str
    precisions: tuple[str, ...]
    operators: tuple[str, ...]
    asymmetric: bool = False
    pair_limit: int | None = None
    residual: Literal["skip", "both", "none"] = "none"
    outputs: bool = False
    integer_bias: bool = False
    matrix_vector: bool = False
    int8_operators: tuple[str, ...] | None = None
    one_scale: bool = False
    rest: Literal["fp32", "fp16"] = "fp32"

    def of(self, precision: str) -> Recipe:
        """The recipe as it is for one precision."""
        if precision != "int8" or self.int8_operators is None:
            return self
        return replace(self, operators=self.int8_operators)


_WEIGHTS_ONLY: Final = ("int8-weights", "int4-weights")

TENSORRT: Final = Recipe(
    "tensorrt",
    "TensorRT takes int8 around zero only, fuses a convolution with its activation and the Add "
    "behind it, and an attention as a whole: Q/DQ in between would part them.",
    ("int8", "fp8", *_WEIGHTS_ONLY),
    ("Conv", "ConvTranspose", "Gemm", "MatMul"),
    residual="skip",
    rest="fp16",
)
TENSORRT_RTX: Final = replace(
    TENSORRT,
    name="tensorrt-rtx",
    why=f"{TENSORRT.why} TensorRT for RTX 1.6 has no int8 convolution, a product whose weights "
    "have a scale for each channel gives float32, to be rounded by another kernel.",
    int8_operators=("Gemm", "MatMul"),
    one_scale=True,
)
CPU: Final = Recipe(
    "cpu",
    "Without VNNI, two products of uint8 and int8 are added in int16, which saturates where their "
    "weights are beyond 128 together; kernels take uint8 activations and give them.",
    ("int8", *_WEIGHTS_ONLY),
    ("Conv", "Gemm", "MatMul"),
    asymmetric=True,
    pair_limit=128,
    residual="both",
    outputs=True,
    integer_bias=True,
    matrix_vector=True,
)
CPU_VNNI: Final = replace(
    CPU,
    name="cpu-vnni",
    why="VNNI, AMX and Arm's dot products add uint8 times int8 in int32, so weights have all 8 "
    "bits.",
    pair_limit=None,
)

LITERT: Final = Recipe(
    "litert",
    "A .tflite is quantized as such, by ai-edge-quantizer: `quantize_tflite`.",
    ("int8", "int8-weights"),
    (),
    asymmetric=True,
)

RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {recipe.name: recipe for recipe in (TENSORRT, TENSORRT_RTX, CPU, CPU_VNNI)}
)

_EXACT_SUMS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"})


def recipe_for(backend: str, features: Iterable[str] = ()) -> Recipe:
    """The recipe of the backend's own name, or one for a CPU with these instruction sets, as
    `Device.facts` names them. What a backend states itself, in `Backend.quantization`, comes first.

    Every backend that no recipe is named after is taken for one that computes on the CPU; without
    any known feature the careful recipe is chosen, since it is right everywhere. What reads .tflite
    files is not asked: for those there is LITERT.
    """
    if backend in RECIPES:
        return RECIPES[backend]
    return CPU if _EXACT_SUMS.isdisjoint(features) else CPU_VNNI


def find_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe itself, or the one of that name. Raises OptionError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str) and recipe in RECIPES:
        return RECIPES[recipe]
    raise OptionError(
        f"There is no recipe {recipe!r}.",
        f"A graph is quantized by one of {', '.join(RECIPES)}.",
        nearest(str(recipe), RECIPES, "Choose one of them, or pass a Recipe."),
        recipe=recipe,
    )
