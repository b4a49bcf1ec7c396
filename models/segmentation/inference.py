# SPDX-License-Identifier: Apache-2.0
"""Logits of whole images, in one pass or in windows, from a segmentation model with logits at a coarser stride."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from models.layers.resize import resize_maps

Model = Callable[[Tensor], Tensor]


def whole_inference(model: Model, images: Tensor) -> Tensor:
    """Normalized images [B, C, H, W] of any size -> logits [B, K, H, W] float32, in one pass.

    Images are padded at the right and bottom by 0 to a multiple of the model's `patch_size`, or to its `image_size` where
    `fixed_size` says that it takes no other; the logits are resized to the padded size and cut.
    """
    height, width = images.shape[2:]
    padded = _pad(images, _padded_size(model, height, width))
    logits = model(padded).astype('float32')
    return resize_maps(logits, padded.shape[2:])[:, :, :height, :width]


def slide_inference(model: Model, images: Tensor, window: int | Sequence[int], stride: int | Sequence[int]) -> Tensor:
    """Normalized images [B, C, H, W] -> logits [B, K, H, W]: the mean over all windows that cover a pixel.

    Args:
        model: see `whole_inference`, which each window goes through.
        images: sides smaller than the window are covered by one window.
        window: (rows, columns) of a window, pixels; one number for both.
        stride: (rows, columns) between windows; one number for both.
    """
    height, width = images.shape[2:]
    rows, columns = (
        window_spans(length, *sizes) for length, sizes in zip((height, width), zip(_pair(window), _pair(stride)))
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
    """(start, end) of the windows along an axis; the last one ends at `length`. A shorter axis has one window."""
    starts = [*range(0, length - window, stride), max(length - window, 0)]
    return [(start, min(start + window, length)) for start in starts]


def _coverage(spans: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Number of windows over each position of an axis, [length] float32."""
    counts = [sum(start <= position < end for start, end in spans) for position in range(length)]
    return paddle.to_tensor(counts, 'float32')


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _padded_size(model: Model, height: int, width: int) -> tuple[int, int]:
    if getattr(model, 'fixed_size', False):
        return max(height, model.image_size), max(width, model.image_size)
    multiple = getattr(model, 'patch_size', 1)
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def _pad(images: Tensor, size: Sequence[int]) -> Tensor:
    height, width = images.shape[2:]
    missing = [0, size[1] - width, 0, size[0] - height]
    return F.pad(images, missing) if any(missing) else images
