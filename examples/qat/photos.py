"""Photographs of handwritten digits at every exposure, made from scikit-learn's images.

Each is an 8x8 digit, turned, scaled and shifted on a 16x16 canvas before a soft background, with
noise and half the time a bar across it; then the light changes: one image is 20 times as bright,
another a twentieth. Values are linear in light and whole 1024ths, as a sensor counts, and not
normalized: the network has to see the digit at any of these exposures.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Generator, Tensor
from torch.nn import functional as F

SIZE = 16
EXPOSURE = math.log(20)
COUNTS = 1024
SEED = 20


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, held-out images, float32 [N, 1, 8, 8] from 0 to 1, and their labels."""
    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=SEED)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return train_images, test_images, train_labels, test_labels


def photograph(images: Tensor, random: Generator, exposure: float = EXPOSURE) -> Tensor:
    """A new photograph of each, float32 [N, 1, SIZE, SIZE]; `exposure` bounds the log of the
    factor that multiplies all values of one image.
    """
    count = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=random)

    angle = (uniform() - 0.5) * 0.8
    scale = 1.1 + (uniform() - 0.5) * 0.4
    shift = (uniform(2) - 0.5) * 0.4
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    canvas = F.affine_grid(torch.stack(rows, 1), [count, 1, SIZE, SIZE], align_corners=False)
    photos = F.grid_sample(images, canvas, align_corners=False)

    soft = F.interpolate(uniform(1, 4, 4), (SIZE, SIZE), mode="bilinear", align_corners=False)
    photos = torch.maximum(photos, 0.3 * uniform(1, 1, 1) * soft)
    noise = torch.randn(photos.shape, generator=random)
    photos = photos + 0.08 * uniform(1, 1, 1) * noise

    place = (uniform(1, 1, 1) * SIZE).floor()
    along = torch.arange(SIZE).view(1, 1, 1, -1)
    bar = ((along >= place) & (along < place + 2)).expand_as(photos)
    bar = torch.where(uniform(1, 1, 1) < 0.5, bar, bar.transpose(2, 3))
    bar = bar & (uniform(1, 1, 1) < 0.5)
    photos = torch.where(bar, uniform(1, 1, 1), photos)
    photos = photos * torch.exp((2 * uniform(1, 1, 1) - 1) * exposure)
    return (photos.clamp_min(0) * COUNTS).round() / COUNTS
