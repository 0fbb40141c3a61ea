"""Fake quantization by torch.ao or NVIDIA's modelopt, exported as Q/DQ that UniRT leaves untouched.

    python -m pip install torch==2.13.0 scikit-learn==1.9.1 -e ".[onnxruntime,precision]"
    python examples/qat/toolkits.py torch.ao

    python -m pip install nvidia-modelopt==0.47.0 requests huggingface_hub
    python examples/qat/toolkits.py modelopt

Trains a small network on scikit-learn's digits, again with fake quantization, exports it and checks
that the graph has the learned scales to the last bit, all zero points 0 as TensorRT wants them, and
answers as PyTorch does. A quarter of a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from photos import SEED, digits
from torch import Tensor, nn
from torch.nn import functional as F

import unirt

FUSED = [["1", "2", "3"], ["4", "5", "6"], ["7", "8", "9"]]
"""Each convolution of `digit_net`, its batch norm and its ReLU."""

Learn = Callable[[nn.Module], None]


def digit_net() -> nn.Sequential:
    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*layer(1, 16, 1), *layer(16, 32, 2), *layer(32, 32, 2)]
    return nn.Sequential(
        torch.ao.quantization.QuantStub(), *layers, nn.Flatten(), nn.Linear(128, 10)
    )


def torch_ao(net: nn.Sequential, learn: Learn) -> tuple[nn.Module, list[Tensor]]:
    """The network trained with torch.ao's fake quantization, and its scales in their order."""
    from torch.ao import quantization as ao

    int8 = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
    activation = ao.FakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, qscheme=torch.per_tensor_symmetric, **int8
    )
    weight = ao.FakeQuantize.with_args(
        observer=ao.MovingAveragePerChannelMinMaxObserver,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        **int8,
    )
    net = ao.fuse_modules(net.eval(), FUSED)  # batch norms become part of the weights
    net.qconfig = ao.QConfig(activation, weight)
    net[-1].qconfig = ao.QConfig(nn.Identity, weight)  # what the network returns stays as it is
    net = ao.prepare_qat(net.train())
    learn(net)
    net.eval().apply(ao.disable_observer)
    return net, [m.scale for m in net.modules() if isinstance(m, ao.FakeQuantize)]


def modelopt(net: nn.Sequential, learn: Learn) -> tuple[nn.Module, list[Tensor]]:
    """The network trained with modelopt's fake quantization, and its scales in their order."""
    import modelopt.torch.quantization as mtq

    images = digits()[0]
    net = torch.ao.quantization.fuse_modules(net.eval(), FUSED)  # plain convolutions again
    net = mtq.quantize(net, mtq.INT8_DEFAULT_CFG, lambda calibrated: calibrated(images[:512]))
    learn(net.train())
    net.eval()
    quantizers = [
        m for m in net.modules() if isinstance(m, mtq.nn.TensorQuantizer) and m.is_enabled
    ]
    return net, [quantizer.amax / 127 for quantizer in quantizers]


def export(net: nn.Module, image: Tensor, path: Path) -> None:
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(net, (image,), path, dynamo=False, opset_version=19, **names)


def stored_scales(model: onnx.ModelProto) -> list[np.ndarray]:
    """Of all QuantizeLinear, in their order. Each must come back by the same, from the level 0."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            stored[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" and node.input[0] in stored:  # equal constants are shared
            stored[node.output[0]] = stored[node.input[0]]
    forth = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    back = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in forth:
        zero = stored[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert back[node.output[0]].input[1:] == node.input[1:]
    return [stored[node.input[1]] for node in forth]


def right(answers: np.ndarray, labels: Tensor) -> float:
    return float((answers.argmax(1) == labels.numpy()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("toolkit", choices=["torch.ao", "modelopt"])
    toolkit = parser.parse_args().toolkit
    warnings.simplefilter("ignore")  # both are deprecated or trace Python values, and say so often
    torch.manual_seed(SEED)
    train_images, images, train_labels, labels = digits()

    def learn(net: nn.Module, epochs: int = 4, rate: float = 1e-4) -> None:
        optimizer = torch.optim.Adam(net.parameters(), rate)
        for _ in range(epochs):
            for batch in torch.randperm(len(train_images)).split(64):
                loss = F.cross_entropy(net(train_images[batch]), train_labels[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()

    net = digit_net()
    learn(net, 10, 1e-3)
    trained, learned = (torch_ao if toolkit == "torch.ao" else modelopt)(net, learn)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export(trained, images[:1], path)
        wanted = trained(images).numpy()
        model = unirt.Model(path)
        found = stored_scales(onnx.load_from_string(model.primary.read()))
        assert len(found) == len(learned)
        for scale, tensor in zip(found, learned, strict=True):
            np.testing.assert_array_equal(scale.ravel(), tensor.detach().numpy().ravel())
        print(f"{toolkit}: {len(found)} scales, all as learned; {right(wanted, labels):.2%} right")
        for options in ({"optimization": "disable"}, {}):
            with unirt.load(model, "onnxruntime", options=options) as session:
                answers = session.run({"image": images.numpy()})["logits"]
            same = (answers.argmax(1) == wanted.argmax(1)).mean()
            print(f"onnxruntime {options or ''}: {right(answers, labels):.2%}, {same:.2%} as there")


if __name__ == "__main__":
    main()
