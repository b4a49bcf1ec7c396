# SPDX-License-Identifier: Apache-2.0
"""Whole-image and sliding-window inference of segmentation models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from models.layers.resize import resize_maps
from utils.device import upload
from utils.sizes import Side, size_pair

Model = Callable[[Tensor], Tensor]


def whole_inference(model: Model, images: Tensor) -> Tensor:
    """Normalized images [B, C, H, W] of any size -> logits [B, K, H, W] float32, in one pass.

    Zero padding at the right and bottom extends images to multiples of the model's `patch_size`, or to its `image_size`
    if it has a `fixed_size`. The logits are resized to the padded size and cropped.
    """
    height, width = images.shape[2:]
    padded = _pad(images, _padded_size(model, height, width))
    logits = model(padded).astype('float32')
    return resize_maps(logits, padded.shape[2:])[:, :, :height, :width]


def slide_inference(model: Model, images: Tensor, window: Side, stride: Side) -> Tensor:
    """Normalized images [B, C, H, W] -> logits [B, K, H, W]: the mean over all windows at a pixel.

    Args:
        model: segmentation model, run by `whole_inference` on each window.
        images: a side smaller than the window has one window.
        window: (rows, columns) of a window, pixels; one number for both.
        stride: (rows, columns) between windows; one number for both.
    """
    height, width = images.shape[2:]
    rows, columns = (
        window_spans(length, *sizes)
        for length, sizes in zip((height, width), zip(size_pair(window), size_pair(stride)))
    )
    total = None
    for top, bottom in rows:
        for left, right in columns:
            logits = whole_inference(model, images[:, :, top:bottom, left:right])
            if total is None:
                total = paddle.zeros([*logits.shape[:2], height, width], logits.dtype)
            total[:, :, top:bottom, left:right] += logits
    counts = _coverage(rows, height).unsqueeze(-1) * _coverage(columns, width)
    return total / counts.astype(total.dtype)


def window_spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Return (start, end) of the windows of an axis; the last one ends at `length`. A shorter axis has one window."""
    starts = [*range(0, length - window, stride), max(length - window, 0)]
    return [(start, min(start + window, length)) for start in starts]


def _coverage(spans: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Return the number of windows at each position of an axis, [length] float32."""
    counts = [sum(start <= position < end for start, end in spans) for position in range(length)]
    return upload(np.array(counts, 'float32'))


def _padded_size(model: Model, height: int, width: int) -> tuple[int, int]:
    if getattr(model, 'fixed_size', False):
        least = size_pair(model.image_size)
        return max(height, least[0]), max(width, least[1])
    multiple = getattr(model, 'patch_size', 1)
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def _pad(images: Tensor, size: Sequence[int]) -> Tensor:
    height, width = images.shape[2:]
    missing = [0, size[1] - width, 0, size[0] - height]
    return F.pad(images, missing) if any(missing) else images
