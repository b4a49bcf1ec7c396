# SPDX-License-Identifier: Apache-2.0
"""Pictures of MAE reconstructions: the image, its visible patches, and the reconstruction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle

from models.mae import MaskedAutoencoder
from tasks.pictures import BACKGROUND, pixels


@paddle.no_grad()
def reconstruct(
    model: MaskedAutoencoder, images: paddle.Tensor, noise: paddle.Tensor, mean: Sequence[float], std: Sequence[float]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return for each image: the image, its visible patches on white, and the reconstruction.

    Args:
        model: in evaluation mode.
        images: normalized, [B, C, H, W].
        noise: [B, L]; the patches with the smallest values are visible.
        mean, std: normalization of the images, per channel.

    Returns:
        B triples of [H, W, C] uint8.
    """
    output = model(images, noise)
    _, reconstructed = model.to_images(images, output)
    visible, _ = model.to_images(paddle.ones_like(images), output)  # 1: visible pixel
    originals, reconstructed = pixels(images, mean, std), pixels(reconstructed, mean, std)
    visible = np.where(pixels(visible, [0.0], [1.0]) > 0, originals, BACKGROUND).astype('uint8')
    return list(zip(originals, visible, reconstructed))
