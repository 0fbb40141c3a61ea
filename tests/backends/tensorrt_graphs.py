"""Small networks as ONNX bytes for the TensorRT tests; needs the onnx package.

Weights come from a fixed seed. Tests load this file by path:

    graphs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tensorrt_graphs.py"))))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
from onnx import TensorProto, numpy_helper

ELEMENTS = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}


def text(
    signature: str,
    body: str,
    *weights: Any,
    opset: int = 17,
    domains: str = "",
    names: dict[str, str] | None = None,
) -> bytes:
    """A model from ONNX's text syntax; `names` names nodes by their first output."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}{domains}]> g {signature} {{ {body} }}'
    )
    model.graph.initializer.extend(weights)
    for node in model.graph.node:
        node.name = (names or {}).get(node.output[0], "")
    return bytes(model.SerializeToString())


def weight(name: str, *shape: int, dtype: str = "float32") -> Any:
    """A normally distributed tensor of scale 0.1, the same for equal names and shapes."""
    values = np.random.default_rng(len(name) + sum(shape)).standard_normal(shape) * 0.1
    if dtype == "bfloat16":
        import ml_dtypes

        return numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), name)
    return numpy_helper.from_array(values.astype(dtype), name)


def integers(name: str, *values: int, dtype: str = "int64", shape: tuple[int, ...] = ()) -> Any:
    return numpy_helper.from_array(np.array(values, dtype).reshape(shape or (len(values),)), name)


def cnn(dtype: str = "float32", batch: str = "n") -> bytes:
    """Conv, ReLU, a residual connection, pooling and a classifier: x[batch,3,16,16] -> y."""
    kind = ELEMENTS[dtype]
    return text(
        f"({kind}[{batch},3,16,16] x) => ({kind}[{batch},10] y)",
        """a = Conv<pads=[1,1,1,1]>(x, w1)
        b = Relu(a)
        c = Conv<pads=[1,1,1,1]>(b, w2)
        d = Add(b, c)
        e = Relu(d)
        f = GlobalAveragePool(e)
        h = Flatten(f)
        y = MatMul(h, w3)""",
        weight("w1", 16, 3, 3, 3, dtype=dtype),
        weight("w2", 16, 16, 3, 3, dtype=dtype),
        weight("w3", 16, 10, dtype=dtype),
        names={"a": "conv1", "b": "relu1", "c": "conv2", "d": "add", "y": "classifier"},
    )


def transformer(dtype: str = "float32") -> bytes:
    """One attention block with a residual connection and a norm: x[n,s,64] -> y[n,s,64]."""
    kind = ELEMENTS[dtype]
    return text(
        f"({kind}[n,s,64] x) => ({kind}[n,s,64] y)",
        """q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        kt = Transpose<perm=[0,2,1]>(k)
        scores = MatMul(q, kt)
        scaled = Mul(scores, scale)
        p = Softmax<axis=-1>(scaled)
        o = MatMul(p, v)
        r = Add(x, o)
        y = LayerNormalization(r, gain, shift)""",
        *(weight(name, 64, 64, dtype=dtype) for name in ("wq", "wk", "wv")),
        weight("scale", dtype=dtype),
        weight("gain", 64, dtype=dtype),
        weight("shift", 64, dtype=dtype),
    )


def int8_matmul() -> bytes:
    """A product in Q/DQ form, symmetric, weights per output channel: x[n,64] -> y[n,64]."""
    scales = np.full(64, 0.01, np.float32)
    return text(
        "(float[n,64] x) => (float[n,64] y)",
        """xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear<axis=1>(w, ws, wz)
        y = MatMul(xd, wd)""",
        numpy_helper.from_array(np.float32(0.05).reshape(()), "s"),
        numpy_helper.from_array(np.int8(0).reshape(()), "z"),
        numpy_helper.from_array(np.arange(-2048, 2048).astype(np.int8).reshape(64, 64), "w"),
        numpy_helper.from_array(scales, "ws"),
        numpy_helper.from_array(np.zeros(64, np.int8), "wz"),
    )


def int8_convolution() -> bytes:
    """A convolution in Q/DQ form: x[1,3,16,16] -> y[1,8,14,14]."""
    return text(
        "(float[1,3,16,16] x) => (float[1,8,14,14] y)",
        """xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear(w, s, z)
        y = Conv(xd, wd)""",
        numpy_helper.from_array(np.float32(0.05).reshape(()), "s"),
        numpy_helper.from_array(np.int8(0).reshape(()), "z"),
        numpy_helper.from_array(np.ones((8, 3, 3, 3), np.int8), "w"),
    )


def images() -> bytes:
    """ReLU of images of any size: x[n,3,h,w] -> y."""
    return text("(float[n,3,h,w] x) => (float[n,3,h,w] y)", "y = Relu(x)")


def reshape() -> bytes:
    """A shape as input: x[n,4], s[2] -> y of shape s."""
    return text("(float[n,4] x, int64[2] s) => (float[a,b] y)", "y = Reshape(x, s)")


def top_k() -> bytes:
    """A count as input: x[n,64], k[1] -> the k largest and where they are."""
    return text("(float[n,64] x, int64[1] k) => (float[n,m] y, int64[n,m] i)", "y, i = TopK(x, k)")


def resize() -> bytes:
    """Sizes as input: x[1,3,8,8], s[4] -> x at that size."""
    return text(
        "(float[1,3,8,8] x, int64[4] s) => (float[a,b,c,d] y)",
        'y = Resize<mode="nearest">(x, , , s)',
    )


def external(location: str) -> bytes:
    """x[2,4] + w, where w lies in a file beside the model: 8 float32."""
    model = onnx.load_from_string(text("(float[2,4] x) => (float[2,4] y)", "y = Add(x, w)"))
    tensor = model.graph.initializer.add()
    tensor.name, tensor.data_type = "w", TensorProto.FLOAT
    tensor.dims.extend((2, 4))
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return bytes(model.SerializeToString())
