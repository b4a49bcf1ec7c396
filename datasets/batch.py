# SPDX-License-Identifier: Apache-2.0
"""From the loader's uint8 batch to what a model takes. Imports Paddle: not for worker processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle

from datasets.loader import Batch


def to_tensor(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Normalises a batch on the current device and applies its random erasing.

    Args:
        batch: images [b, H, W, C] uint8.
        mean: per channel, of images scaled to [0, 1]; grey images take the first.
        std: likewise.

    Returns:
        Images [b, C, H, W] float32, (x / 255 - mean) / std, and labels [b] int64.
    """
    channels = batch.images.shape[-1]
    scale = 1.0 / (255.0 * np.asarray(std[:channels], 'float64'))
    shift = -np.asarray(mean[:channels], 'float64') / np.asarray(std[:channels], 'float64')
    images = paddle.to_tensor(batch.images).astype('float32').transpose([0, 3, 1, 2])
    images = images * _per_channel(scale) + _per_channel(shift)
    if batch.erase is not None:
        positions, values = (paddle.to_tensor(array) for array in batch.erase)
        images = paddle.scatter(images.flatten(), positions, values).reshape(images.shape)
    return images, paddle.to_tensor(batch.labels)


def _per_channel(values: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(values.astype('float32').reshape(1, -1, 1, 1))
