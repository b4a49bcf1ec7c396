# SPDX-License-Identifier: Apache-2.0
"""Conversion of a uint8 batch to model inputs. It imports Paddle, so worker processes must not import it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import paddle

from datasets.device import on_gpu, upload
from datasets.loader import Batch
from datasets.sample import VALID


def to_device(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Batch:
    """Copy a batch to the current device, normalize its images and apply its random erasing.

    Args:
        batch: images [b, ..., H, W, C] uint8, or a list of b such images of different sizes.
        mean: per channel, of images scaled to [0, 1]; grayscale images use the first.
        std: per channel, like `mean`.

    Returns:
        A batch of tensors. Images are [b, ..., C, H, W] float32, (x / 255 - mean) / std, and 0 in the padding, which the
        target VALID defines. A list of images becomes a list of [C, H, W]; ragged targets stay lists of arrays.
    """
    if isinstance(batch.images, list):
        images = [_normalize(image[None], None, mean, std)[0] for image in batch.images]
    else:
        images = _normalize(batch.images, batch.erase, mean, std, batch.targets.get(VALID))
    targets = {name: target if isinstance(target, list) else upload(target) for name, target in batch.targets.items()}
    return dataclasses.replace(batch, images=images, targets=targets, erase=None)


def _normalize(images: np.ndarray, erase, mean: Sequence[float], std: Sequence[float], valid=None) -> paddle.Tensor:
    channels = images.shape[-1]
    statistics = tuple(mean[:channels]), tuple(std[:channels])
    if on_gpu():
        return _on_the_gpu(images, erase, *_on_device(*statistics, paddle.device.get_device()), valid)
    return _on_this_cpu(images, erase, *_scale_and_shift(*statistics), valid)


def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return [C, 1, 1] float32 factors with which x * scale + shift = (x / 255 - mean) / std."""
    deviation = np.asarray(std, 'float64')
    values = 1.0 / (255.0 * deviation), -np.asarray(mean, 'float64') / deviation
    return tuple(value.astype('float32').reshape(-1, 1, 1) for value in values)


@functools.lru_cache(maxsize=16)
def _on_device(mean: tuple[float, ...], std: tuple[float, ...], device: str) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return `_scale_and_shift` as tensors on the current device, `device`."""
    return tuple(upload(values) for values in _scale_and_shift(mean, std))


def _on_the_gpu(pixels: np.ndarray, erase, scale: paddle.Tensor, shift: paddle.Tensor, valid=None) -> paddle.Tensor:
    """Copy uint8 pixels to the GPU, a quarter of the size of float32, and compute there. The host does not wait."""
    images = upload(pixels).astype('float32').moveaxis(-1, -3) * scale + shift
    if valid is not None:
        images = images * upload(_mask(valid, pixels.shape[1:3]).astype('float32'))
    if erase is not None:
        positions, values = (upload(array) for array in erase)
        images = paddle.scatter(images.flatten(), positions, values).reshape(images.shape)
    return images


def _mask(valid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a mask [b, 1, H, W] bool of the pixels without padding, from their (height, width) [b, 2]."""
    rows, columns = (np.arange(side) < valid[:, [axis]] for axis, side in enumerate(size))
    return (rows[:, :, None] & columns[:, None])[:, None]


def _on_this_cpu(pixels: np.ndarray, erase, scale: np.ndarray, shift: np.ndarray, valid=None) -> paddle.Tensor:
    """Compute the same bits as `_on_the_gpu` with numpy, 20 times faster than Paddle on the CPU."""
    *many, height, width, channels = pixels.shape
    images = np.empty((*many, channels, height, width), 'float32')
    one_by_one = images.reshape(-1, channels, height, width), pixels.reshape(-1, height, width, channels)
    for image, source in zip(*one_by_one):  # one at a time, so that an image fits into the CPU cache
        image[:] = source.transpose(2, 0, 1)
        image *= scale
        image += shift
    if valid is not None:
        images *= _mask(valid, (height, width))
    if erase is not None:
        positions, values = erase
        images.reshape(-1)[positions] = values
    return upload(images)
