"""The networks of the conformance suite, as ONNX and as TFLite, each with its answer in NumPy."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from unirt.model import Model
from unirt.testing.tflite_networks import tflite_network
from unirt.types import Array

Arrays = dict[str, Array]

OPSET, IR_VERSION = 17, 8  # old enough for every engine


@dataclass(frozen=True)
class Network:
    """A tiny model and what it must answer. `sample(n, seed)` gives inputs with batch size n;
    `graph` is the network whose graph it shares, if not one of its own. `scaled` measures errors by
    the largest value of an output.
    """

    name: str
    sample: Callable[[int, int], Arrays]
    answer: Callable[[Mapping[str, Array]], Arrays]
    rtol: float = 1e-5
    graph: str = ""
    scaled: bool = False

    def model(self, formats: Sequence[str]) -> Model:
        """The network in the first of these formats."""
        if "onnx" in formats:
            return Model(onnx_bytes(self.graph or self.name))
        return Model(tflite=tflite_network(self.graph or self.name, weights=WEIGHTS))

    def check(self, inputs: Mapping[str, Array], outputs: Mapping[str, Any]) -> None:
        expected = self.answer(inputs)
        assert set(outputs) == set(expected)
        for name, value in expected.items():
            got = outputs[name]
            assert isinstance(got, np.ndarray), f"{name} is {type(got).__name__}"
            assert got.dtype == value.dtype
            assert got.shape == value.shape
            # What cancels out to nearly nothing is no more exact than the largest value.
            atol = 1e-6 + (self.rtol * np.abs(value).max() if self.scaled and value.size else 0)
            np.testing.assert_allclose(got, value, rtol=self.rtol, atol=atol, err_msg=name)


def _floats(n: int, seed: int, width: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def _heavy_answer(inputs: Mapping[str, Array]) -> Arrays:
    x = inputs["x"]
    for weight in WEIGHTS:
        x = np.maximum(x @ weight, 0)
    return {"y": x}


WEIGHTS = [
    np.random.default_rng(layer).standard_normal((64, 64)).astype(np.float32) / 8
    for layer in range(4)
]

NETWORKS = {
    network.name: network
    for network in (
        Network(
            "affine",
            lambda n, seed: {"x": _floats(n, seed)},
            lambda i: {"y": i["x"] * np.float32(2) + np.float32(1)},
        ),
        Network(
            "pair",
            lambda n, seed: {"a": _floats(n, seed), "b": _floats(n, seed + 1)},
            lambda i: {"total": i["a"] + i["b"], "difference": i["a"] - i["b"]},
        ),
        Network("constant", lambda n, seed: {}, lambda i: {"y": np.array([1, 2, 3], np.float32)}),
        Network(
            "flip",
            lambda n, seed: {"x": _floats(n, seed) > 0},
            lambda i: {"y": np.logical_not(i["x"])},
        ),
        Network(
            "half",
            lambda n, seed: {"x": _floats(n, seed).astype(np.float16)},
            lambda i: {"y": i["x"] + i["x"]},
            rtol=1e-3,
        ),
        Network(
            "tiny",
            lambda n, seed: {"x": np.random.default_rng(seed).integers(-128, 128, (n, 3), np.int8)},
            lambda i: {"y": i["x"][:, ::-1]},
        ),
        Network(
            "long",
            lambda n, seed: {"x": np.random.default_rng(seed).integers(-(2**30), 2**30, (n, 3))},
            lambda i: {"y": i["x"] + i["x"]},
            rtol=0,
        ),
        Network(
            "wide",  # beyond 32 bits
            lambda n, seed: {"x": np.random.default_rng(seed).integers(-(2**60), 2**60, (n, 3))},
            lambda i: {"y": i["x"] + i["x"]},
            rtol=0,
            graph="long",
        ),
        Network(
            "scalar",
            lambda n, seed: {"x": np.array(seed + 0.5, np.float32)},
            lambda i: {"y": i["x"] * np.float32(2)},
        ),
        Network(
            "rows",
            lambda n, seed: {"x": _floats(3, seed, 4)},
            lambda i: {"y": i["x"] * np.float32(2)},
        ),
        Network(
            "heavy",
            lambda n, seed: {"x": _floats(n, seed, 64)},
            _heavy_answer,
            rtol=5e-3,  # some engines round float32 products to TF32, about three digits each
            scaled=True,
        ),
    )
}


@cache
def onnx_bytes(name: str) -> bytes:
    """The named network as the bytes of an .onnx file. Needs the onnx package."""
    from onnx import helper, numpy_helper
    from onnx.helper import make_node

    def constant(label: str, value: Array) -> Any:
        return numpy_helper.from_array(value, label)

    one, two = np.array(1, np.float32), np.array(2, np.float32)
    nodes: dict[str, tuple[list[Any], list[Any]]] = {
        "affine": (
            [make_node("Mul", ["x", "two"], ["t"]), make_node("Add", ["t", "one"], ["y"])],
            [constant("two", two), constant("one", one)],
        ),
        "pair": (
            [make_node("Add", ["a", "b"], ["total"]), make_node("Sub", ["a", "b"], ["difference"])],
            [],
        ),
        "constant": (
            [make_node("Add", ["value", "zero"], ["y"])],
            [
                constant("value", np.array([1, 2, 3], np.float32)),
                constant("zero", np.zeros(3, np.float32)),
            ],
        ),
        "flip": ([make_node("Not", ["x"], ["y"])], []),
        "half": ([make_node("Add", ["x", "x"], ["y"])], []),
        "tiny": (
            [make_node("Gather", ["x", "order"], ["y"], axis=1)],
            [constant("order", np.array([2, 1, 0]))],
        ),
        "long": ([make_node("Add", ["x", "x"], ["y"])], []),
        "scalar": ([make_node("Mul", ["x", "two"], ["y"])], [constant("two", two)]),
        "rows": ([make_node("Mul", ["x", "two"], ["y"])], [constant("two", two)]),
        "heavy": (
            [
                node
                for layer in range(len(WEIGHTS))
                for node in (
                    make_node(
                        "MatMul", [f"h{layer}" if layer else "x", f"w{layer}"], [f"m{layer}"]
                    ),
                    make_node(
                        "Relu",
                        [f"m{layer}"],
                        ["y" if layer == len(WEIGHTS) - 1 else f"h{layer + 1}"],
                    ),
                )
            ],
            [constant(f"w{layer}", weight) for layer, weight in enumerate(WEIGHTS)],
        ),
    }
    network = NETWORKS[name]
    inputs = network.sample(2, 0)
    outputs = network.answer(inputs)

    def declared(label: str, value: Array) -> Any:
        dynamic = value.ndim == 2 and name != "rows"
        shape = ["n", *value.shape[1:]] if dynamic else list(value.shape)
        dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
        return helper.make_tensor_value_info(label, dtype, shape)

    graph = helper.make_graph(
        nodes[name][0],
        name,
        [declared(*item) for item in inputs.items()],
        [declared(*item) for item in outputs.items()],
        nodes[name][1],
    )
    model = helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    return bytes(model.SerializeToString())


# The affine network as tflite_networks writes it, for suites that run without ai-edge-litert.
_AFFINE_TFLITE = (
    "c-nQ6Jx;?w5QU%ZBv^?RtjM4gJ^&>WEfN%nijsm3A}}FRl%NnGbQGL`nu3CYlTdL24nV~LXkeL{owXMWR(i5"
    "`cfR@E9KinW-bRK#GNedoAA?te_7L5XURfa!(KjHaV$&8PCfhdcn9WI>q-D}YF}oT~hKDD`>ELoa7tZ>(495"
    "v2lJ$9`U*5kMW8C=yHtr5-P4D0JK9M|bw<@*7cT4T;J+_@bzKjX9E}&ah%}iI%xrRs56X_WcU&Gnp{A}Ikd+"
    "-O}@pxLDRR1~F(YK8ms$7lCXVS}xw|&J*qW=%dIv%KI;C%6Fl0G%(vG$5%yiuRnEK&PJ`RSw(HWGSOs(|#tt"
    "tC2@C2Zia^XqBJ-h2MJmcGWJV-tCEb-6}5Tc62mOjBZvj*A*s<yp>^^8KCXe>p5_zCw)~OP?D0R(KBf?X$0*"
    "_1pUa=4wiu"
)

OTHER_FORMATS: dict[str, Callable[[], bytes]] = {
    "onnx": lambda: onnx_bytes("affine"),
    "tflite": lambda: zlib.decompress(base64.b85decode(_AFFINE_TFLITE)),
}
"""A model in each format, for engines that must refuse it."""
