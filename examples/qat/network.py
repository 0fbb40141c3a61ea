"""A small EfficientNet, and its layers with fake quantization for training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHT_LIMIT = 64
"""Weights take the levels -64 to 64: where a CPU has no VNNI, two products of a weight and an
activation are summed in 16 bits, which larger levels overflow."""

BLOCKS = ((8, 1, 1), (12, 4, 2), (12, 4, 1), (16, 4, 2), (16, 4, 1), (16, 4, 1))
"""Output channels, expansion and stride of each."""


class PhotoNet(nn.Module):
    """Ten logits for each image: mobile inverted bottlenecks with swish and squeeze-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Layer(conv(1, 16, 3), norm=16)
        channels, blocks = 16, []
        for outputs, expansion, stride in BLOCKS:
            blocks.append(Block(channels, outputs, expansion, stride))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Layer(conv(channels, 96, 1), norm=96)
        self.classify = Layer(nn.Linear(96, 10))

    def forward(self, image: Tensor) -> Tensor:
        features = self.blocks(F.silu(self.stem(image)))
        logits: Tensor = self.classify(F.silu(self.head(features)).mean((2, 3)))
        return logits


class Block(nn.Module):
    """Expand to more channels, convolve each by itself, weigh them, project to few again."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        # Its quantizer serves the skip branch too, so that both read the same integers.
        self.input: nn.Module = nn.Identity()
        first = Layer(conv(inputs, hidden, 1), norm=hidden, own_input=False)
        self.expand = first if expansion > 1 else None
        each = conv(hidden, hidden, 3, stride, groups=hidden)
        self.depthwise = Layer(each, norm=hidden, own_input=expansion > 1)
        self.squeeze = Layer(nn.Conv2d(hidden, max(4, inputs // 4), 1))
        self.excite = Layer(nn.Conv2d(max(4, inputs // 4), hidden, 1))
        self.project = Layer(conv(hidden, outputs, 1), norm=outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        features = self.input(features)
        hidden = features if self.expand is None else F.silu(self.expand(features))
        hidden = F.silu(self.depthwise(hidden))
        gate = self.excite(F.silu(self.squeeze(hidden.mean((2, 3), keepdim=True))))
        result: Tensor = self.project(hidden * torch.sigmoid(gate))
        return features + result if self.residual else result


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Layer(nn.Module):
    """A convolution or linear layer, its batch norm, and what quantizes its input and weight."""

    def __init__(self, inner: nn.Conv2d | nn.Linear, norm: int = 0, own_input: bool = True) -> None:
        super().__init__()
        self.inner = inner
        self.norm: nn.Module = nn.BatchNorm2d(norm) if norm else nn.Identity()
        self.own_input = own_input
        self.input: nn.Module = nn.Identity()
        self.weight: nn.Module = nn.Identity()

    def forward(self, values: Tensor) -> Tensor:
        values, weight = self.input(values), self.weight(self.inner.weight)
        result: Tensor
        if isinstance(self.inner, nn.Linear):
            result = F.linear(values, weight, self.inner.bias)
        else:
            result = self.inner._conv_forward(values, weight, self.inner.bias)
        return self.norm(result)


class Activations(nn.Module):
    """Rounds to int8 around zero, with one learned scale; gradients pass as if it did not round.

    Esser et al., "Learned Step Size Quantization" (2020). The logarithm is learned, so that a step
    changes a scale by a share of itself whatever its size.
    """

    low, high = -128, 127

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(scale.log())

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def forward(self, values: Tensor) -> Tensor:
        scale = self.scale
        level = (values / scale).clamp(self.low, self.high)
        return (level + (level.round() - level).detach()) * scale


class Weights(Activations):
    """The same for a weight, with a scale for each output channel."""

    low, high = -WEIGHT_LIMIT, WEIGHT_LIMIT


def folded(net: PhotoNet) -> PhotoNet:
    """A copy in evaluation mode whose batch norms are part of the weights."""
    net = copy.deepcopy(net).eval()
    for layer in net.modules():
        if isinstance(layer, Layer) and isinstance(layer.norm, nn.BatchNorm2d):
            layer.inner = nn.utils.fusion.fuse_conv_bn_eval(layer.inner, layer.norm)
            layer.norm = nn.Identity()
    return net


def quantization_aware(net: PhotoNet, samples: Tensor) -> PhotoNet:
    """A folded copy with fake quantization, whose scales start where they lose least on `samples`.

    Quantized are the inputs and weights of all convolutions and of the classifier, and by that the
    skip branch of each residual Add: TensorRT's rules. Biases, swish and gates stay float.
    """
    net = folded(net)
    inputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0].detach()

    wanted = [m for m in net.modules() if isinstance(m, Block) or getattr(m, "own_input", False)]
    hooks = [module.register_forward_pre_hook(note) for module in wanted]
    with torch.no_grad():
        net(samples)
        for module in wanted:
            module.input = Activations(_best_scale(inputs[module].reshape(1, -1), 127)[0])
        for layer in net.modules():
            if isinstance(layer, Layer):
                weight = layer.inner.weight
                scale = _best_scale(weight.flatten(1), WEIGHT_LIMIT)
                layer.weight = Weights(scale.view(-1, *[1] * (weight.dim() - 1)))
    for hook in hooks:
        hook.remove()
    return net


def _best_scale(rows: Tensor, limit: int) -> Tensor:
    """For each row the scale of least squared error, of 40 up to that of its largest value."""
    largest = rows.abs().amax(1).clamp_min(1e-9) / limit
    best, least = largest, torch.full_like(largest, float("inf"))
    for step in range(1, 41):
        scale = largest * step / 40
        levels = (rows / scale[:, None]).round().clamp(-limit, limit)
        error = (levels * scale[:, None] - rows).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


class _Quantize(torch.autograd.Function):
    """Values to int8 and back, as the two ONNX nodes; the scale stays the tensor it is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (values / scale).round().clamp(-128, 127) * scale

    @staticmethod
    def symbolic(graph: Any, values: Any, scale: Any, zero: Any) -> Any:
        levels = graph.op("QuantizeLinear", values, scale, zero)
        return graph.op("DequantizeLinear", levels, scale, zero).setType(values.type())


class _Dequantize(torch.autograd.Function):
    """An int8 weight to float, with one scale for each output channel."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return levels.float() * scale.view(-1, *[1] * (levels.dim() - 1))

    @staticmethod
    def symbolic(graph: Any, levels: Any, scale: Any, zero: Any) -> Any:
        made = graph.op("DequantizeLinear", levels, scale, zero, axis_i=0)
        return made.setType(levels.type().with_dtype(torch.float32))


class FrozenActivations(nn.Module):
    """Activations with a scale that is no longer learned, to be exported."""

    def __init__(self, learned: Activations) -> None:
        super().__init__()
        self.register_buffer("scale", learned.scale.detach().clone())
        self.register_buffer("zero", torch.zeros((), dtype=torch.int8))

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = _Quantize.apply(values, self.scale, self.zero)
        return result


class FrozenWeights(nn.Module):
    """An int8 weight, to be exported."""

    def __init__(self, learned: Weights, weight: Tensor) -> None:
        super().__init__()
        levels = (weight / learned.scale).round().clamp(learned.low, learned.high)
        self.register_buffer("levels", levels.detach().to(torch.int8))
        self.register_buffer("scale", learned.scale.detach().flatten().clone())
        self.register_buffer("zero", torch.zeros(len(weight), dtype=torch.int8))

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = _Dequantize.apply(self.levels, self.scale, self.zero)
        return result


def frozen(net: PhotoNet) -> PhotoNet:
    """A copy in evaluation mode with int8 weights and fixed scales, which exports to Q/DQ."""
    net = copy.deepcopy(net).eval()
    for module in list(net.modules()):
        if isinstance(module, Layer | Block) and isinstance(module.input, Activations):
            module.input = FrozenActivations(module.input)
        if isinstance(module, Layer):
            module.weight = FrozenWeights(module.weight, module.inner.weight)
    return net
