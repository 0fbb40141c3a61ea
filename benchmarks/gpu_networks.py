"""The networks of benchmarks/gpu.py: PyTorch modules with seeded weights, and the same as ONNX."""

from __future__ import annotations

import copy
import dataclasses
import io
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_lab import DEVICE

import unirt

TENSORRT = "tensorrt@cuda:0"


class Bert(torch.nn.Module):
    """`BertModel` from two inputs to its last hidden state."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.config = BertConfig(num_hidden_layers=layers)
        self.bert = BertModel(self.config, add_pooling_layer=False)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        found = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=torch.zeros_like(input_ids),
        )
        return found.last_hidden_state


@dataclasses.dataclass
class Network:
    """A PyTorch module on the device, in eval mode and fp32, and the same as ONNX."""

    name: str
    module: Any
    onnx: bytes
    model: Any
    make: Callable[..., dict[str, Any]]
    """`make(*sizes, seed)`: inputs as host arrays."""

    def profile(self, *sizes: int) -> unirt.ShapeProfile:
        return unirt.ShapeProfile({n: a.shape for n, a in self.make(*sizes, seed=0).items()})

    def ranged(self, low: Sequence[int], common: Sequence[int], high: Sequence[int]) -> Any:
        feeds = [self.make(*sizes, seed=0) for sizes in (low, common, high)]
        return unirt.ShapeProfile({n: tuple(f[n].shape for f in feeds) for n in feeds[0]})


def export(module: Any, example: Mapping[str, Any], axes: Sequence[str]) -> bytes:
    """The module as ONNX with float32 weights; `axes` name the leading dynamic dimensions."""
    buffer = io.BytesIO()
    dynamic = {name: dict(enumerate(axes)) for name in (*example, "y")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(torch.from_numpy(value) for value in example.values()),
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=list(example),
            output_names=["y"],
            dynamic_axes=dynamic,
        )
    return buffer.getvalue()


def images(batch: int, seed: int = 0) -> dict[str, Any]:
    random_state = np.random.default_rng(seed)
    return {"x": random_state.standard_normal((batch, 3, 224, 224), dtype=np.float32)}


def tokens(batch: int, length: int = 128, seed: int = 0) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(0, 30000, (batch, length))
    return {"input_ids": ids.astype(np.int64), "attention_mask": np.ones_like(ids, np.int64)}


class Lab:
    """Networks made once, a folder for caches, and what went differently than written."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.folder = Path(tempfile.mkdtemp(prefix="unirt-bench-"))
        self.notes: list[str] = []
        self._networks: dict[str, Network] = {}

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def network(self, name: str) -> Network:
        if name not in self._networks:
            self._networks[name] = getattr(self, f"_{name}")()
        return self._networks[name]

    def _resnet50(self) -> Network:
        """Seeded random weights; batch norm has seen a few batches, so activations stay sane.

        The residual branches are damped as training does, which begins them at zero: undamped
        random ones multiply a rounding error several hundredfold on its way through.
        """
        from torchvision.models import resnet50
        from torchvision.models.resnet import Bottleneck

        torch.manual_seed(0)
        module = resnet50(weights=None).to(DEVICE)
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None  # a plain average over the batches
            elif isinstance(layer, Bottleneck):
                torch.nn.init.constant_(layer.bn3.weight, 0.2)
        module.train()
        with torch.no_grad():
            for seed in range(4):
                module(torch.from_numpy(images(16, 1000 + seed)["x"]).to(DEVICE))
        module.eval()
        onnx = export(copy.deepcopy(module).cpu().eval(), images(2), ["batch"])
        return Network("resnet50", module, onnx, unirt.Model(onnx), images)

    def _bert(self) -> Network:
        torch.manual_seed(0)
        module = Bert(2 if self.quick else 12).eval()
        onnx = export(module, tokens(2, 16), ["batch", "length"])
        return Network("bert", module.to(DEVICE), onnx, unirt.Model(onnx), tokens)

    def _mlp(self) -> Network:
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Linear(64, 128),
            torch.nn.GELU(),
            torch.nn.Linear(128, 128),
            torch.nn.GELU(),
            torch.nn.Linear(128, 16),
        ).eval()

        def make(batch: int, seed: int = 0) -> dict[str, Any]:
            random_state = np.random.default_rng(seed)
            return {"x": random_state.standard_normal((batch, 64), dtype=np.float32)}

        onnx = export(module, make(2), ["batch"])
        return Network("mlp", module.to(DEVICE), onnx, unirt.Model(onnx), make)

    def _tiny(self) -> Network:
        from overhead import tiny_onnx

        def make(seed: int = 0) -> dict[str, Any]:
            return {"x": np.random.default_rng(seed).standard_normal((1, 4)).astype(np.float32)}

        onnx = tiny_onnx()
        return Network("tiny", lambda x: x + 1, onnx, unirt.Model(onnx), make)

    def build(self, model: Any, candidate: str = TENSORRT, **more: Any) -> Any:
        """`unirt.build` with the lab's cache, less the options that this version does not know."""
        options = {"cache": str(self.folder / "cache"), **more.pop("options", {})}
        plugin = unirt.plugins.plugin("tensorrt")
        known = {field.name for field in dataclasses.fields(plugin.backend.options)}
        for name in sorted(set(options) - known):
            self.note(f"the tensorrt backend has no option {name!r}; left out")
            del options[name]
        return unirt.build(model, candidate, options=options, **more)


def quantized_mlp(kind: str, scales: str, rows: int, width: int, depth: int = 4) -> tuple[Any, ...]:
    """`depth` GEMMs of `width` with Q/DQ around them, as ONNX; an input; and two answers.

    `kind` is `int8` or `fp8`, `scales` `float32` or `float16` (then the whole float part is). The
    answers are PyTorch's in fp32: without quantization, and with it emulated step by step.
    """
    from onnx import TensorProto, helper, numpy_helper

    largest = 127.0 if kind == "int8" else 448.0
    quantized = TensorProto.INT8 if kind == "int8" else TensorProto.FLOAT8E4M3FN
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    weights = [
        torch.randn(width, width, generator=generator) * (2 / width) ** 0.5 for _ in range(depth)
    ]

    def rounded(value: Any) -> Any:
        if kind == "int8":
            return torch.clamp(torch.round(value), -128, 127).to(torch.int8)
        return torch.clamp(value, -largest, largest).to(torch.float8_e4m3fn)

    def constant(name: str, value: Any) -> Any:
        return numpy_helper.from_array(np.asarray(value), name)

    def typed(value: Any) -> Any:
        return value.cpu().numpy().astype(scales)

    nodes: list[Any] = []
    initial: list[Any] = []
    plain, emulated = x.to(DEVICE), x.to(DEVICE)
    last = "x"
    if scales == "float16":
        nodes.append(helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16))
        last = "x16"
    zero = np.zeros(1, np.uint8).tobytes()
    for index, weight in enumerate(weights):
        weight = weight.to(DEVICE)
        scale = plain.abs().max() / largest
        columns = weight.abs().amax(dim=0) / largest
        inner = rounded(weight / columns)
        n = str(index)
        initial += [constant(f"s{n}", typed(scale)), constant(f"c{n}", typed(columns))]
        initial.append(helper.make_tensor(f"z{n}", quantized, [], zero, raw=True))
        data = inner.view(torch.uint8).cpu().numpy().tobytes()
        initial.append(helper.make_tensor(f"w{n}", quantized, [width, width], data, raw=True))
        nodes += [
            helper.make_node("QuantizeLinear", [last, f"s{n}", f"z{n}"], [f"q{n}"]),
            helper.make_node("DequantizeLinear", [f"q{n}", f"s{n}", f"z{n}"], [f"d{n}"]),
            helper.make_node("DequantizeLinear", [f"w{n}", f"c{n}"], [f"v{n}"], axis=1),
            helper.make_node("MatMul", [f"d{n}", f"v{n}"], [f"m{n}"]),
        ]
        plain = plain @ weight
        emulated = (rounded(emulated / scale).float() * scale) @ (inner.float() * columns)
        last = f"m{n}"
        if index + 1 < depth:
            nodes.append(helper.make_node("Relu", [last], [f"r{n}"]))
            plain, emulated, last = plain.relu(), emulated.relu(), f"r{n}"
    nodes.append(helper.make_node("Cast", [last], ["y"], to=TensorProto.FLOAT))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        f"mlp_{kind}",
        [info("x", TensorProto.FLOAT, [rows, width])],
        [info("y", TensorProto.FLOAT, [rows, width])],
        initial,
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 19)])
    answers = [value.cpu().numpy() for value in (plain, emulated)]
    return model.SerializeToString(), x.numpy(), *answers
