# SPDX-License-Identifier: Apache-2.0
"""Boxes (x1, y1, x2, y2) in continuous coordinates: a box from 0 to 1 covers one pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import paddle
from paddle import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)  # decoded boxes grow by at most this factor, so that exp does not overflow


def area(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Boxes [N, 4] and [M, 4] -> intersection over union [N, M]; 0 without intersection."""
    first = first.unsqueeze(1)
    sides = paddle.minimum(first[..., 2:], second[:, 2:]) - paddle.maximum(first[..., :2], second[:, :2])
    sides = sides.clip(min=0.0)
    shared = sides[..., 0] * sides[..., 1]
    union = area(first) + area(second) - shared
    return paddle.where(shared > 0, shared / union, paddle.zeros_like(shared))


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [..., N, 4], cut at images of `sizes` [..., 2] (height, width)."""
    limits = sizes.astype(boxes.dtype).flip(-1).unsqueeze(-2)  # [..., 1, 2] as (width, height)
    limits = paddle.concat([limits, limits], axis=-1)
    return paddle.minimum(boxes.clip(min=0.0), limits)


def is_nonempty(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] -> whether both sides are above 0, [...] bool."""
    return paddle.logical_and(boxes[..., 2] > boxes[..., 0], boxes[..., 3] > boxes[..., 1])


class BoxCoder:
    """The difference between two boxes as a network predicts it (R-CNN, https://arxiv.org/abs/1311.2524, appendix C).

    Args:
        weights: factors of the differences in x, y, width and height.
    """

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)):
        self.weights = tuple(weights)

    def encode(self, boxes: Tensor, targets: Tensor) -> Tensor:
        """Boxes and their targets [..., 4] -> deltas [..., 4] (x, y, width, height)."""
        (x, y, width, height), (tx, ty, twidth, theight) = _centers(boxes), _centers(targets)
        wx, wy, ww, wh = self.weights
        scales = paddle.log(twidth / width), paddle.log(theight / height)
        return paddle.stack([wx * (tx - x) / width, wy * (ty - y) / height, ww * scales[0], wh * scales[1]], axis=-1)

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Deltas [..., K * 4] and boxes [..., 4] -> boxes [..., K * 4], in float32."""
        boxes = boxes.astype('float32').unsqueeze(-2)
        x, y, width, height = _centers(boxes)
        deltas = deltas.astype('float32')
        deltas = deltas.reshape([*deltas.shape[:-1], -1, 4])
        dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(-1), self.weights))
        half_width = 0.5 * paddle.exp(dw.clip(max=MAX_LOG_SCALE)) * width
        half_height = 0.5 * paddle.exp(dh.clip(max=MAX_LOG_SCALE)) * height
        x, y = dx * width + x, dy * height + y
        decoded = paddle.stack([x - half_width, y - half_height, x + half_width, y + half_height], axis=-1)
        return decoded.flatten(-2)


def _centers(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y) of the center, width and height."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height
