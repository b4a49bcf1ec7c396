# SPDX-License-Identifier: Apache-2.0
"""ROIAlign (Mask R-CNN, https://arxiv.org/abs/1703.06870) of regions on the levels of a feature pyramid.

As in detectron2: coordinates are shifted by half a pixel, a bin has as many samples per side as it is cells long, and there is
no smallest region, so that a region without area gives 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.vision import ops

from models import paddle_private
from models.detection.boxes import area
from models.detection.nms import numbers_of
from models.layers.constants import constant
from utils.device import upload

CANONICAL_LEVEL = 4  # of regions of the canonical size: stride 16
PIECE_GRID = 2.0**-15  # cells; float32 has this precision up to 512 cells


def roi_align(
    x: Tensor,
    boxes: Tensor,
    images: Tensor | np.ndarray,
    output: int,
    scale: float,
    kinds: np.ndarray | None = None,
) -> Tensor:
    """Pool regions of feature maps; gradients flow to the maps only.

    The host waits for a GPU unless it has `images` and `kinds` already.

    Args:
        x: [B, C, H, W].
        boxes: [R, 4], pixels, sorted by image.
        images: number of the image of each, [R] int64, as a tensor or as an array.
        output: side of the result.
        scale: cells per pixel.
        kinds: `kinds_of` the boxes, as an array.

    Returns:
        [R, C, output, output]; 0 for regions without area.
    """
    boxes = boxes.detach()
    if x.stop_gradient or not paddle.in_dynamic_mode():
        pooled = _pool(x, boxes, images, (output, output), scale)
        return paddle.where(_has_area(boxes).reshape([-1, 1, 1, 1]), pooled, paddle.zeros_like(pooled))
    kinds = kinds_of(boxes, scale).numpy() if kinds is None else kinds
    images = images if isinstance(images, np.ndarray) else images.numpy()
    return _exact_gradients(x, boxes, images, output, scale, kinds)


def kinds_of(boxes: Tensor, scale: float | Tensor) -> Tensor:
    """Return which axes of regions are narrower than a cell: 1 for x, 2 for y, their sum; -1: without area. [R] int64.

    Args:
        boxes: [R, 4], pixels.
        scale: cells per pixel, a number or [R, 1].
    """
    sides = (boxes[:, 2:] - boxes[:, :2]) * scale  # (width, height) in cells
    narrow = paddle.logical_and(sides > 0, sides < 1).astype('int64')
    kinds = narrow[:, 0] + 2 * narrow[:, 1]
    return paddle.where(_has_area(boxes), kinds, paddle.full_like(kinds, -1))


def _has_area(boxes: Tensor) -> Tensor:
    return paddle.logical_and(boxes[:, 2] > boxes[:, 0], boxes[:, 3] > boxes[:, 1])


def _pool(x: Tensor, boxes: Tensor, images: Tensor | np.ndarray, output: tuple[int, int], scale: float) -> Tensor:
    if isinstance(images, np.ndarray):
        counts = np.bincount(images, minlength=x.shape[0])
        return paddle_private.roi_align(x, boxes, counts, output, scale)
    counts = (images.unsqueeze(0) == numbers_of(x).unsqueeze(1)).astype('int32').sum(1)
    return ops.roi_align(x, boxes, counts.astype('int32'), output, scale, sampling_ratio=-1, aligned=True)


def _exact_gradients(
    x: Tensor, boxes: Tensor, images: np.ndarray, output: int, scale: float, kinds: np.ndarray
) -> Tensor:
    """`roi_align` with the gradients of detectron2.

    Paddle's backward pass widens regions to one cell at least, unlike its forward pass. So a region that is narrower along an
    axis, whose bins have a single sample there, is cut into a region of one cell around each sample.
    """
    result = paddle.zeros([boxes.shape[0], x.shape[1], output, output], x.dtype)
    for thin in itertools.product((False, True), repeat=2):
        found = np.flatnonzero(kinds == thin[0] + 2 * thin[1])
        if len(found):
            rows = upload(found)
            part = _thin_pool(x, paddle.gather(boxes, rows), images[found], output, scale, thin)
            result = paddle.scatter(result, rows, part)
    return result


def _thin_pool(
    x: Tensor, boxes: Tensor, images: np.ndarray, output: int, scale: float, thin: tuple[bool, bool]
) -> Tensor:
    """Pool regions that are `thin` along (x, y), in pieces of one cell there."""
    x1, y1, x2, y2 = (boxes * scale).unbind(1)
    left, right = _pieces(x1, x2, output) if thin[0] else (x1.unsqueeze(1), x2.unsqueeze(1))
    top, bottom = _pieces(y1, y2, output) if thin[1] else (y1.unsqueeze(1), y2.unsqueeze(1))
    rows, columns = top.shape[1], left.shape[1]
    sides = [
        side.unsqueeze(axis).expand([-1, rows, columns])
        for side, axis in ((left, 1), (top, 2), (right, 1), (bottom, 2))
    ]
    pieces, owners = paddle.stack(sides, axis=-1).reshape([-1, 4]), images.repeat(rows * columns)
    size = (output // rows, output // columns)
    pooled = _pool(x, pieces, owners, size, 1.0).reshape([-1, rows, columns, x.shape[1], *size])
    return pooled.transpose([0, 3, 1, 4, 2, 5]).reshape([-1, x.shape[1], output, output])


def _pieces(start: Tensor, end: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Start and end of a cell around the middle of each of `count` bins, [R, count].

    They are rounded to `PIECE_GRID`, so that their difference is 1 exactly and gives a single sample.
    """
    middles = start.unsqueeze(1) + (end - start).unsqueeze(1) * ((paddle.arange(count, dtype='float32') + 0.5) / count)
    first = paddle.round((middles - 0.5) / PIECE_GRID) * PIECE_GRID
    return first, first + 1.0


def _scales(strides: tuple[float, ...]) -> np.ndarray:
    """Cells per pixel of each level, [levels, 1] float32."""
    return 1 / np.array(strides, 'float32').reshape(-1, 1)


class Places(NamedTuple):
    """What the host needs to know of regions, [R] each.

    Attributes:
        levels: see `PyramidPooler.levels`.
        kinds: `kinds_of` the regions at their levels.
        images: numbers of their images.
    """

    levels: np.ndarray
    kinds: np.ndarray
    images: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Places:
        return Places(*(numbers[rows] for numbers in tuple(self)))


class PyramidPooler(nn.Layer):
    """Pools each region from the level of the pyramid that fits its size (FPN, https://arxiv.org/abs/1612.03144, equation 1).

    Args:
        strides: pixels per cell of each level, fine to coarse, each twice the one before.
        output: side of the result.
        canonical_size: sqrt(area) of the regions that are pooled at stride 16, pixels.
    """

    def __init__(self, strides: Sequence[float], output: int, canonical_size: float = 224.0):
        super().__init__()
        self.strides, self.output, self.canonical_size = tuple(strides), output, canonical_size

    def levels(self, boxes: Tensor) -> Tensor:
        """Boxes [R, 4] -> index of the level, [R] int64."""
        ratio = paddle.sqrt(area(boxes).clip(min=0.0)) / self.canonical_size
        offset = CANONICAL_LEVEL - round(math.log2(self.strides[0]))
        levels = paddle.floor(offset + paddle.log2(ratio + 1e-8))
        return levels.clip(0, len(self.strides) - 1).astype('int64')

    def places(self, boxes: Tensor, images: Tensor) -> Tensor:
        """Return the rows of `Places` as a tensor [3, R] int64; arguments as in `forward`."""
        levels = self.levels(boxes)
        kinds = kinds_of(boxes, paddle.gather(constant(_scales, self.strides), levels))
        return paddle.stack([levels, kinds, images])

    def forward(self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor, places: Places | None = None) -> Tensor:
        """Pool regions.

        Args:
            maps: a feature map [B, C, H, W] per level.
            boxes: [R, 4], pixels, sorted by image.
            images: number of the image of each, [R] int64.
            places: of the regions; None: the host waits for them.

        Returns:
            [R, C, output, output]
        """
        if not paddle.in_dynamic_mode():
            return self._all_levels(maps, boxes, images)
        places = Places(*self.places(boxes, images).numpy()) if places is None else places
        result = paddle.zeros([boxes.shape[0], maps[0].shape[1], self.output, self.output], maps[0].dtype)
        for level, (x, stride) in enumerate(zip(maps, self.strides)):
            found = np.flatnonzero(places.levels == level)
            if len(found):
                rows, own = upload(found), (places.images[found], self.output, 1 / stride, places.kinds[found])
                result = paddle.scatter(result, rows, roi_align(x, paddle.gather(boxes, rows), *own))
        return result

    def _all_levels(self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
        """`forward` in a program, whose shapes are fixed: regions of other levels have no area, which gives 0."""
        levels, total = self.levels(boxes).unsqueeze(1), 0.0
        for level, (x, stride) in enumerate(zip(maps, self.strides)):
            own = boxes * (levels == level).astype(boxes.dtype)
            total = total + roi_align(x, own, images, self.output, 1 / stride)
        return total
