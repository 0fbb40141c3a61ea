"""The networks of benchmarks/precision.py, made with NumPy and onnx alone, and data for them.

`digits` and `photos` are the trained networks of examples/. The others have the shape and size of
published ones and random weights with a seed, initialized as PyTorch's own models are, which is
not what training leaves: see `describe` of each, and docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

import unirt

ROOT: Final = Path(__file__).resolve().parents[1]
FLOAT: Final = onnx.TensorProto.FLOAT

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]


@dataclass
class Network:
    """A float32 network for a fixed batch or any, what calibrates it, and what judges it."""

    name: str
    describe: str
    model: unirt.Model
    parameters: int
    calibration: list[Feed]
    test: list[Feed]
    timed: Feed
    labels: Array | None = None
    trained: unirt.Model | None = None
    """The same network trained for int8, with Q/DQ."""
    extra: dict[str, Any] = field(default_factory=dict)


class _Graph:
    """Nodes and weights in the order in which they are made."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}

    def normal(self, shape: tuple[int, ...], deviation: float) -> Array:
        values = self.random.standard_normal(shape, dtype=np.float32)
        return values * np.float32(deviation)

    def op(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """The name of the node's result, which is `name`."""
        self.nodes.append(helper.make_node(operator, inputs, [name], f"/{name}", **attributes))
        return name

    def weight(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.weights[name] = np.asarray(value, dtype)
        return name

    def conv(
        self,
        x: str,
        name: str,
        channels: int,
        out: int,
        kernel: int,
        stride: int = 1,
        group: int = 1,
    ) -> str:
        """A convolution without bias, normal with deviation sqrt(2 / fan_out)."""
        shape = (out, channels // group, kernel, kernel)
        fan_out = out * kernel * kernel  # as PyTorch counts it, groups or not
        weight = self.weight(f"{name}.weight", self.normal(shape, (2 / fan_out) ** 0.5))
        return self.op(
            "Conv",
            [x, weight],
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=group,
        )

    def norm(self, x: str, name: str, channels: int, gain: float = 1.0, shift: float = 0.0) -> str:
        """A BatchNormalization whose mean and variance `with_statistics` fills in."""
        values = {"weight": gain, "bias": shift, "running_mean": 0.0, "running_var": 1.0}
        given = [self.weight(f"{name}.{k}", np.full(channels, v)) for k, v in values.items()]
        return self.op("BatchNormalization", [x, *given], name)

    def model(self, inputs: list[Any], outputs: list[Any], opset: int = 17) -> onnx.ModelProto:
        stored = [numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "main", inputs, outputs, stored)
        return helper.make_model(
            graph, ir_version=9, opset_imports=[helper.make_opsetid("", opset)]
        )


def _parameters(proto: onnx.ModelProto) -> int:
    """Values that training would set; running statistics and shapes are none of them."""
    counted = (
        t
        for t in proto.graph.initializer
        if t.data_type == FLOAT and t.dims and ".running_" not in t.name
    )
    return sum(int(np.prod(t.dims)) for t in counted)


def _with_batch(proto: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return proto


def with_statistics(proto: onnx.ModelProto, images: Array) -> None:
    """Gives each BatchNormalization the mean and variance that it meets on `images`, in place.

    One forward pass in which all of them normalize by the batch itself, as in training.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _with_batch(copy, len(images))
    nodes: list[onnx.NodeProto] = []
    wanted: dict[str, str] = {}
    for node in copy.graph.node:
        if node.op_type != "BatchNormalization":
            nodes.append(node)
            continue
        x, scale, bias, mean, variance = node.input
        n = node.output[0]
        wanted |= {mean: f"{n}_mean", variance: f"{n}_var"}
        # Scale and shift are 1 value a channel and broadcast against [batch, channels, h, w].
        nodes += [
            helper.make_node("ReduceMean", [x], [f"{n}_mean"], axes=[0, 2, 3], keepdims=1),
            helper.make_node("Sub", [x, f"{n}_mean"], [f"{n}_centered"]),
            helper.make_node("Mul", [f"{n}_centered", f"{n}_centered"], [f"{n}_squares"]),
            helper.make_node("ReduceMean", [f"{n}_squares"], [f"{n}_var"], axes=[0, 2, 3]),
            helper.make_node("Add", [f"{n}_var", "epsilon"], [f"{n}_above"]),
            helper.make_node("Sqrt", [f"{n}_above"], [f"{n}_deviation"]),
            helper.make_node("Div", [f"{n}_centered", f"{n}_deviation"], [f"{n}_normal"]),
            helper.make_node("Unsqueeze", [scale, "behind"], [f"{n}_scale"]),
            helper.make_node("Unsqueeze", [bias, "behind"], [f"{n}_bias"]),
            helper.make_node("Mul", [f"{n}_normal", f"{n}_scale"], [f"{n}_scaled"]),
            helper.make_node("Add", [f"{n}_scaled", f"{n}_bias"], [n]),
        ]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    constants = {"epsilon": np.float32(1e-5), "behind": np.array([1, 2], np.int64)}
    copy.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()
    )
    del copy.graph.output[:]
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, FLOAT, None) for name in wanted.values()
    )
    with unirt.load(unirt.Model(copy.SerializeToString()), "onnxruntime@cpu") as session:
        found = session.run({copy.graph.input[0].name: images})
    for tensor in proto.graph.initializer:
        if tensor.name in wanted:
            value = found[wanted[tensor.name]].reshape(-1)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def images(count: int, seed: int, size: int = 224) -> Array:
    """Pictures with the spectrum of photographs, 1/f, in 256 steps, normalized as for ImageNet.

    Brightness and contrast differ from one to the next; colours vary less than light does.
    """
    random = np.random.default_rng(seed)
    across, down = np.fft.rfftfreq(size), np.fft.fftfreq(size)
    frequency = np.hypot(down[:, None], across[None, :])
    frequency[0, 0] = np.inf
    made = np.empty((count, 3, size, size), np.float32)
    for at in range(count):
        noise = random.standard_normal((4, size, size), dtype=np.float32)
        fields = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(size, size))
        fields /= fields.std(axis=(1, 2), keepdims=True)
        light = 0.45 + random.normal(0, 0.1) + random.uniform(0.1, 0.25) * fields[0]
        pixels = np.rint(255 * np.clip(light + 0.06 * fields[1:], 0, 1)) / 255
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        for channel in range(3):
            made[at, channel] = (pixels[channel] - mean[channel]) / deviation[channel]
    return made


BRANCH, SHIFT = 0.2, 1.0
"""The weight of the last normalization of a residual branch, and the bias of all in front of ReLU.

PyTorch begins with 1 and 0. Then each ReLU and the normalization behind it make any disturbance
grow (Yang et al., "A Mean Field Theory of Batch Normalization", 2019), int8's as well as others:
dozens of them turn noise 50 dB below the input into noise 22 dB below the output, in float32. The
trained digits.onnx makes 48 dB of it. With these values networks of random weights do not amplify
it either; `--amplification` measures each, and what int8 makes of PyTorch's own.
"""


def resnet50_onnx(batch: int, branch: float = BRANCH, shift: float = SHIFT) -> onnx.ModelProto:
    """ResNet-50 v1.5 (He et al. 2015): PyTorch's random weights, damped normalizations."""
    g = _Graph(50)
    x = g.norm(g.conv("x", "stem", 3, 64, 7, 2), "stem.bn", 64, shift=shift)
    x = g.op("Relu", [x], "stem.relu")
    x = g.op("MaxPool", [x], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            n = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = x
            for at, (ins, outs, kernel, step) in enumerate(
                ((channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)), 1
            ):
                y = g.conv(y, f"{n}.conv{at}", ins, outs, kernel, step)
                y = g.norm(y, f"{n}.bn{at}", outs, *((branch, 0.0) if at == 3 else (1.0, shift)))
                if at < 3:
                    y = g.op("Relu", [y], f"{n}.relu{at}")
            if block == 0:
                skip = g.conv(x, f"{n}.down", channels, 4 * width, 1, stride)
                x = g.norm(skip, f"{n}.down.bn", 4 * width)
            channels = 4 * width
            x = g.op("Relu", [g.op("Add", [y, x], f"{n}.add")], f"{n}.relu3")
    weight = g.random.uniform(-1, 1, (1000, channels)) / channels**0.5
    return _classifier(g, x, channels, batch, weight)


def mobilenet_onnx(batch: int, branch: float = BRANCH, shift: float = SHIFT) -> onnx.ModelProto:
    """MobileNetV2 (Sandler et al. 2018): PyTorch's random weights, damped normalizations."""
    g = _Graph(2)

    def block(x: str, name: str, ins: int, outs: int, kernel: int, stride: int, group: int) -> str:
        x = g.conv(x, name, ins, outs, kernel, stride, group)
        x = g.norm(x, f"{name}.bn", outs, shift=shift)
        return g.op("Clip", [x, "zero", "six"], f"{name}.relu6")

    g.weight("zero", 0.0)
    g.weight("six", 6.0)
    x = block("x", "stem", 3, 32, 3, 2, 1)
    channels = 32
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
    )
    for stage, (expand, outs, blocks, first) in enumerate((*settings, (6, 320, 1, 1)), 1):
        for at in range(blocks):
            n, stride, width = f"block{stage}.{at}", first if at == 0 else 1, channels * expand
            y = block(x, f"{n}.expand", channels, width, 1, 1, 1) if expand > 1 else x
            y = block(y, f"{n}.depth", width, width, 3, stride, width)
            residual = stride == 1 and channels == outs
            y = g.conv(y, f"{n}.project", width, outs, 1)
            y = g.norm(y, f"{n}.project.bn", outs, branch if residual else 1.0)
            x = g.op("Add", [x, y], f"{n}.add") if residual else y
            channels = outs
    x = block(x, "head", channels, 1280, 1, 1, 1)
    return _classifier(g, x, 1280, batch, g.normal((1000, 1280), 0.01))


def _classifier(g: _Graph, x: str, channels: int, batch: int, weight: Array) -> onnx.ModelProto:
    x = g.op("Flatten", [g.op("GlobalAveragePool", [x], "average")], "features", axis=1)
    given = [x, g.weight("fc.weight", weight), g.weight("fc.bias", np.zeros(1000))]
    g.op("Gemm", given, "logits", transB=1)
    info = helper.make_tensor_value_info
    return g.model([info("x", FLOAT, [batch, 3, 224, 224])], [info("logits", FLOAT, [batch, 1000])])


LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY = 6, 512, 8, 128, 30522


def transformer_onnx(batch: int) -> onnx.ModelProto:
    """An encoder as BERT has it (Devlin et al. 2018), but 6 layers of width 512, from token ids.

    Weights are normal with deviation 0.02, biases 0. Attention and GELU are what exporters write
    of them: MatMul, Add, Reshape, Transpose, Softmax; Div, Erf, Add, Mul, Mul.
    """
    g = _Graph(6)
    size = WIDTH // HEADS

    def linear(x: str, name: str, ins: int, outs: int) -> str:
        weight = g.weight(f"{name}.weight", g.normal((ins, outs), 0.02))
        product = g.op("MatMul", [x, weight], f"{name}.product")
        return g.op("Add", [product, g.weight(f"{name}.bias", np.zeros(outs))], name)

    def norm(x: str, name: str) -> str:
        scale = g.weight(f"{name}.weight", np.ones(WIDTH))
        given = [x, scale, g.weight(f"{name}.bias", np.zeros(WIDTH))]
        return g.op("LayerNormalization", given, name, axis=-1, epsilon=1e-12)

    g.weight("heads", [0, 0, HEADS, size], np.int64)
    g.weight("joined", [0, 0, WIDTH], np.int64)
    for name, value in (("root", size**0.5), ("sqrt2", 2**0.5), ("one", 1.0), ("half", 0.5)):
        g.weight(name, value)
    words = g.weight("words", g.normal((VOCABULARY, WIDTH), 0.02))
    places = g.weight("places", g.normal((1, LENGTH, WIDTH), 0.02))
    x = norm(g.op("Add", [g.op("Gather", [words, "ids"], "looked_up"), places], "embedded"), "norm")
    for layer in range(LAYERS):
        n = f"layer{layer}"
        heads = {}
        for part, order in (
            ("query", [0, 2, 1, 3]),
            ("key", [0, 2, 3, 1]),
            ("value", [0, 2, 1, 3]),
        ):
            split = g.op(
                "Reshape", [linear(x, f"{n}.{part}", WIDTH, WIDTH), "heads"], f"{n}.{part}.split"
            )
            heads[part] = g.op("Transpose", [split], f"{n}.{part}.heads", perm=order)
        scores = g.op("MatMul", [heads["query"], heads["key"]], f"{n}.scores")
        shares = g.op(
            "Softmax", [g.op("Div", [scores, "root"], f"{n}.scaled")], f"{n}.shares", axis=-1
        )
        mixed = g.op("MatMul", [shares, heads["value"]], f"{n}.mixed")
        back = g.op("Transpose", [mixed], f"{n}.back", perm=[0, 2, 1, 3])
        joined = g.op("Reshape", [back, "joined"], f"{n}.joined")
        y = linear(joined, f"{n}.attended", WIDTH, WIDTH)
        x = norm(g.op("Add", [y, x], f"{n}.attention.add"), f"{n}.attention.norm")
        y = linear(x, f"{n}.up", WIDTH, 4 * WIDTH)
        erf = g.op("Erf", [g.op("Div", [y, "sqrt2"], f"{n}.gelu.div")], f"{n}.gelu.erf")
        twice = g.op("Mul", [y, g.op("Add", [erf, "one"], f"{n}.gelu.add")], f"{n}.gelu.mul")
        y = linear(g.op("Mul", [twice, "half"], f"{n}.gelu"), f"{n}.down", 4 * WIDTH, WIDTH)
        x = norm(g.op("Add", [y, x], f"{n}.add"), f"{n}.out")
    info = helper.make_tensor_value_info
    return g.model(
        [info("ids", onnx.TensorProto.INT64, [batch, LENGTH])],
        [info(x, FLOAT, [batch, LENGTH, WIDTH])],
    )


def mlp_onnx(rows: int, width: int, depth: int = 4) -> onnx.ModelProto:
    """`depth` matrix products with ReLU between them, normal with deviation sqrt(2 / width)."""
    g = _Graph(4)
    x = "x"
    for at in range(depth):
        weight = g.weight(f"w{at}", g.normal((width, width), (2 / width) ** 0.5))
        x = g.op("MatMul", [x, weight], f"product{at}")
        if at + 1 < depth:
            x = g.op("Relu", [x], f"relu{at}")
    info = helper.make_tensor_value_info
    shape = [rows, width]
    return g.model([info("x", FLOAT, shape)], [info(x, FLOAT, shape)])


def _split(name: str, values: Array, batch: int) -> list[Feed]:
    return [{name: values[at : at + batch]} for at in range(0, len(values) - batch + 1, batch)]


def pictures(name: str, batch: int, samples: int, *normalizations: float) -> Network:
    """A classifier of pictures; `normalizations` are other values for BRANCH and SHIFT."""
    make = {"resnet50": resnet50_onnx, "mobilenetv2": mobilenet_onnx}[name]
    count = -(-samples // batch) * batch
    proto = make(batch, *normalizations)
    with_statistics(proto, images(8, seed=1))
    test = _split("x", images(count, seed=3), batch)
    return Network(
        name,
        str(make.__doc__).split("\n")[0],
        unirt.Model(proto.SerializeToString(), name=name),
        _parameters(proto),
        _split("x", images(count, seed=2), batch),
        test,
        test[0],
    )


def _transformer(name: str, batch: int, samples: int) -> Network:
    proto = transformer_onnx(batch)
    count = -(-samples // batch) * batch

    def tokens(seed: int) -> list[Feed]:
        # Words are as frequent as in text: the nth has a share of about 1/n.
        ids = np.random.default_rng(seed).zipf(1.1, (8 * count, LENGTH)) % VOCABULARY
        return _split("ids", ids.astype(np.int64), batch)[: count // batch]

    test = tokens(3)
    return Network(
        name,
        str(transformer_onnx.__doc__).split("\n")[0],
        unirt.Model(proto.SerializeToString(), name=name),
        _parameters(proto),
        tokens(2),
        test,
        test[0],
    )


def _mlp(name: str, batch: int, samples: int) -> Network:
    rows, width = (512 if name == "mlp-large" else 64) * batch, 4096
    proto = mlp_onnx(rows, width)
    calls = [
        {"x": np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)}
        for seed in range(2)
    ]
    return Network(
        name,
        str(mlp_onnx.__doc__).split("\n")[0],
        unirt.Model(proto.SerializeToString(), name=name),
        _parameters(proto),
        calls[:1],
        calls[1:],
        calls[1],
        extra={"rows": rows},
    )


def _digits(name: str, batch: int, samples: int) -> Network:
    folder = ROOT / "examples" / "digits"
    with np.load(folder / "test.npz") as arrays:
        pictures, labels = arrays["image"], arrays["labels"]
    file = folder / "digits.onnx"
    half = 200  # calibrate, the others judge
    return Network(
        name,
        "examples/digits: a small trained convolutional network for handwritten digits",
        unirt.Model(file, beside=True),
        _parameters(onnx.load(file)),
        _split("image", pictures[:half], 50),
        _split("image", pictures[half:], 50),
        {"image": pictures[half : half + 50]},
        labels[half:],
    )


def _photos(name: str, batch: int, samples: int) -> Network:
    folder = ROOT / "examples" / "qat"
    with np.load(folder / "test.npz") as arrays:
        pictures, labels = arrays["image"], arrays["labels"]
    with np.load(folder / "calibration.npz") as arrays:
        calibration = arrays["image"]
    return Network(
        name,
        "examples/qat: a small trained EfficientNet for digits in photographs",
        unirt.Model(folder / "fp32.onnx"),
        _parameters(onnx.load(folder / "fp32.onnx")),
        _split("image", calibration, 64),
        _split("image", pictures, 135),
        {"image": pictures[:135]},
        labels,
        unirt.Model(folder / "qat.onnx"),
    )


NETWORKS: Final[Mapping[str, Callable[[str, int, int], Network]]] = {
    "digits": _digits,
    "photos": _photos,
    "resnet50": pictures,
    "mobilenetv2": pictures,
    "transformer": _transformer,
    "mlp": _mlp,
    "mlp-large": _mlp,
}


def with_half_scales(model: unirt.Model) -> unirt.Model:
    """A quantized graph of one input and output as a cast of everything leaves it: scales too.

    For graphs of Q/DQ, MatMul and Relu, which take fp16 without more ado.
    """
    file = model.file(["onnx"])
    assert file is not None
    proto = onnx.load_from_string(file.read())
    half = onnx.TensorProto.FLOAT16
    for tensor in proto.graph.initializer:
        if tensor.data_type == FLOAT:
            value = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    (source,), (target,) = proto.graph.input, proto.graph.output
    inner = {source.name: f"{source.name}__half", target.name: f"{target.name}__half"}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [inner.get(name, name) for name in names]
    cast = helper.make_node
    begin = cast("Cast", [source.name], [inner[source.name]], "half", to=half)
    end = cast("Cast", [inner[target.name]], [target.name], "float", to=FLOAT)
    nodes = [begin, *proto.graph.node, end]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(nodes)
    for entry in proto.opset_import:  # since 19 Q/DQ take fp16; the other operators are the same
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, 19)
    return unirt.Model(proto.SerializeToString(), name=f"{model.name}, fp16 scales")


def size(model: unirt.Model, formats: Sequence[str] = ("onnx",)) -> int:
    """Bytes of the file that an engine takes."""
    file = model.file(formats)
    assert file is not None
    return len(file.read())
