"""Train a small CNN on scikit-learn's handwritten digits; write `digits.onnx` and `test.npz`.

    pip install torch==2.13.0 scikit-learn==1.9.1 onnx==1.23.2
    python examples/digits/train.py

Nothing is downloaded: the 1,797 images come with scikit-learn. A quarter of them is held out,
never seen in training, and saved as `test.npz`. Seeds, split and thread count are fixed, so a
second run on the same machine gives the same network.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
SEED = 20
EPOCHS = 60
BATCH = 64
PEAK_RATE = 4e-3


class DigitNet(nn.Module):
    """Ten logits for each 8x8 image: conv, two depthwise-separable blocks, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(1, 32, kernel=3),
            *_conv(32, 32, kernel=3, groups=32),
            *_conv(32, 64, kernel=1),
            nn.MaxPool2d(2),
            *_conv(64, 64, kernel=3, groups=64),
            *_conv(64, 128, kernel=1),
            nn.AvgPool2d(2),
        )
        self.classify = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 2 * 2, 10))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.features(image))
        return logits


def _conv(inputs: int, outputs: int, *, kernel: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, held-out images, training labels, held-out labels."""
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=SEED)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return train_images, test_images, train_labels, test_labels


def jitter(images: Tensor) -> Tensor:
    """The images, each slightly rotated, scaled and shifted at random."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.5
    scale = 1.0 + (torch.rand(count) - 0.5) * 0.3
    shift = (torch.rand(count, 2) - 0.5) * 0.5
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def fit(images: Tensor, labels: Tensor) -> DigitNet:
    """A trained network in evaluation mode."""
    torch.manual_seed(SEED)
    model = DigitNet()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))[: len(images) // BATCH * BATCH]
        total = 0.0
        for batch in torch.split(order, BATCH):
            logits = model(jitter(images[batch]))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item() * BATCH
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}  loss {total / len(order):.4f}")
    return model.eval()


def accuracy(model: DigitNet, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is the label's."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def export(model: DigitNet, path: Path) -> None:
    """Write `model` as one self-contained ONNX file with a batch dimension named `batch`."""
    with warnings.catch_warnings():
        # Deprecated, but its successor needs onnxscript and writes the paths of source files into
        # the model.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, 8, 8),),
            path,
            dynamo=False,
            opset_version=18,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    onnx.checker.check_model(path, full_check=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_images, test_images, train_labels, test_labels = load()
    model = fit(train_images, train_labels)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train_images)} training images")
    print(f"test accuracy {accuracy(model, test_images, test_labels):.4f} of {len(test_images)}")
    export(model, HERE / "digits.onnx")
    np.savez_compressed(HERE / "test.npz", image=test_images.numpy(), labels=test_labels.numpy())


if __name__ == "__main__":
    main()
