# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a masked autoencoder makes of images: the image, the patches it sees, and the image it rebuilds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from PIL import Image

from models.mae import MaskedAutoencoder

GAP = 4  # pixels around the pictures
PAPER = 255


@paddle.no_grad()
def rebuild(
    model: MaskedAutoencoder, images: paddle.Tensor, noise: paddle.Tensor, mean: Sequence[float], std: Sequence[float]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each image the image itself, what is seen of it, the rest being white, and what becomes of it.

    Args:
        model: in evaluation mode.
        images: normalised, [B, C, H, W].
        noise: [B, L]; the patches with the smallest numbers are seen.
        mean, std: what the images are normalised with, per channel.

    Returns:
        B triples of [H, W, C] uint8.
    """
    output = model(images, noise)
    _, rebuilt = model.paint(images, output)
    seen, _ = model.paint(paddle.ones_like(images), output)  # 1 where a pixel was seen
    originals, rebuilt = _pixels(images, mean, std), _pixels(rebuilt, mean, std)
    seen = np.where(_pixels(seen, [0.0], [1.0]) > 0, originals, PAPER).astype('uint8')
    return list(zip(originals, seen, rebuilt))


def _pixels(x: paddle.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised [B, C, H, W] -> [B, H, W, C] uint8."""
    channels = x.shape[1]
    x = x.astype('float32').transpose([0, 2, 3, 1]).numpy() * np.asarray(std[:channels]) + np.asarray(mean[:channels])
    return np.clip(np.round(255 * x), 0, 255).astype('uint8')


def draw(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Pictures of one size [H, W, C] in rows and columns."""
    height, width, _ = rows[0][0].shape
    across, down = width + GAP, height + GAP
    sheet = Image.new('RGB', (len(rows[0]) * across + GAP, len(rows) * down + GAP), (PAPER,) * 3)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            tile = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
            sheet.paste(tile, (GAP + j * across, GAP + i * down))
    return sheet
