"""Train a small EfficientNet, quantize it after training and in training, and compare the three.

    python -m pip install torch==2.13.0 scikit-learn==1.9.1 -e ".[onnxruntime,precision]"
    python examples/qat/train.py

Nothing is downloaded. Writes `fp32.onnx`, `qat.onnx`, `scales.json`, `test.npz` and
`calibration.npz`. Seeds, split and thread count are fixed, so a second run on the same machine
gives the same networks.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import measure
import numpy as np
import onnx
import torch
from network import Activations, PhotoNet, Weights, folded, frozen, quantization_aware
from photos import SEED, SIZE, digits, photograph
from torch import Generator, Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
EPOCHS, PEAK_RATE = 80, 4e-3
QAT_EPOCHS, QAT_RATE = 60, 4e-3
BATCH = 64
COPIES = 3  # photographs of each held-out digit
CALIBRATION = 512  # photographs that ranges are found on


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Fits the network to ever new photographs of the images, in place."""
    random = Generator().manual_seed(SEED)
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    net.train()
    begin = time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=random)[: steps * BATCH]
        total = 0.0
        for batch in torch.split(order, BATCH):
            loss = F.cross_entropy(net(photograph(images[batch], random)), labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            spent = time.monotonic() - begin
            print(f"epoch {epoch + 1:3d}  loss {total / steps:.4f}  {spent:.0f} s", flush=True)
    net.eval()


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is the label's."""
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def export(net: nn.Module, path: Path) -> None:
    """Write `net` as one self-contained ONNX file with a batch dimension named `batch`."""
    with warnings.catch_warnings():
        # Deprecated, but its successor needs onnxscript and writes the paths of source files into
        # the model.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            net,
            (torch.zeros(1, 1, SIZE, SIZE),),
            path,
            dynamo=False,
            opset_version=19,  # the first whose Q/DQ onnx's own evaluator computes
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    model = onnx.load(path)
    drop_aliases(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def drop_aliases(graph: onnx.GraphProto) -> None:
    """The exporter stores equal constants once, and the others as Identity of it."""
    aliases = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity"}
    for node in [node for node in graph.node if node.op_type == "Identity"]:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [aliases.get(name, name) for name in node.input]


def learned_scales(net: PhotoNet) -> dict[str, float | list[float]]:
    """By their names in the exported graph: one for activations, one per channel for weights."""
    found: dict[str, float | list[float]] = {}
    for name, quantizer in net.named_modules():
        if isinstance(quantizer, Activations):
            # Nine digits tell every float32 from every other.
            scales = [float(f"{scale:.9g}") for scale in quantizer.scale.flatten().tolist()]
            found[f"{name}.scale"] = scales if isinstance(quantizer, Weights) else scales[0]
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_images, test_images, train_labels, test_labels = digits()
    random = Generator().manual_seed(SEED + 1)
    samples = photograph(train_images, random)[:CALIBRATION]
    photos = torch.cat([photograph(test_images, random) for _ in range(COPIES)])
    labels = test_labels.repeat(COPIES)
    np.savez_compressed(HERE / "calibration.npz", image=samples.numpy())
    np.savez_compressed(HERE / "test.npz", image=photos.numpy(), labels=labels.numpy())

    torch.manual_seed(SEED)
    net = PhotoNet()
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(photos)} test images")
    train(net, train_images, train_labels, EPOCHS, PEAK_RATE)
    print(f"float32 {accuracy(net, photos, labels):.4f}")
    export(folded(net), HERE / "fp32.onnx")

    net = quantization_aware(net, samples)
    print(f"int8 before it is trained {accuracy(net, photos, labels):.4f}")
    train(net, train_images, train_labels, QAT_EPOCHS, QAT_RATE)
    print(f"int8 trained {accuracy(net, photos, labels):.4f}")
    scales = json.dumps(learned_scales(net), indent=0)
    (HERE / "scales.json").write_text(f"{scales}\n")
    export(frozen(net), HERE / "qat.onnx")

    networks = measure.networks()
    fp32, ptq, qat = (
        measure.accuracy(networks[name], "onnxruntime, unfused", photos.numpy(), labels.numpy())
        for name in ("fp32", "PTQ max, tensorrt", "QAT")
    )
    print(
        f"fp32 {fp32:.2%}  PTQ {ptq:.2%}  QAT {qat:.2%}: {(qat - ptq) / (fp32 - ptq):.1%} won back"
    )


if __name__ == "__main__":
    main()
