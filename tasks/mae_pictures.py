# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a masked autoencoder makes of images: the image, the patches it sees, and the image it rebuilds."""

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
    _, rebuilt = model.to_images(images, output)
    seen, _ = model.to_images(paddle.ones_like(images), output)  # 1 where a pixel was seen
    originals, rebuilt = pixels(images, mean, std), pixels(rebuilt, mean, std)
    seen = np.where(pixels(seen, [0.0], [1.0]) > 0, originals, BACKGROUND).astype('uint8')
    return list(zip(originals, seen, rebuilt))
