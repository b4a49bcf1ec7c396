# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression within groups of boxes, and the choice of the final detections."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor
from paddle.vision.ops import nms

from models.detection.boxes import area, clip_boxes


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression by descending score; boxes of different groups do not suppress each other.

    Args:
        boxes: [N, 4], finite.
        scores: [N].
        groups: number of the group, [N] int64.
        threshold: a box is dropped whose intersection over union with a better one exceeds it.

    Returns:
        Indices of the kept boxes by descending score, [k] int64.
    """
    order = paddle.argsort(scores, descending=True, stable=True)
    boxes = boxes.astype('float64')  # in which the displacement of groups rounds nothing away
    # `unsqueeze` stands first: oneDNN's passes of Paddle 3.3 lose one that follows a multiplication in float64.
    boxes = boxes + groups.astype('float64').unsqueeze(1) * (boxes.max() - boxes.min() + 1.0)
    return paddle.gather(order, nms(paddle.gather(boxes, order), threshold))


ROUNDS = 16  # of `greedy_on_device`; clusters of 2000 boxes need about 12
_PAIRS = 1 << 23  # pairs of boxes whose overlap is computed at a time


@paddle.no_grad()
def greedy_on_device(boxes: Tensor, usable: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression of sorted boxes; the host does not wait for a GPU, unlike with `grouped_nms`.

    A box is kept if no better box that is kept overlaps it too much. Each round applies this rule to the boxes that the round
    before kept. A round without a change has the result of the greedy algorithm.

    Args:
        boxes: [B, N, 4] by descending score, finite.
        usable: the other boxes are dropped, [B, N] bool.
        threshold: see `grouped_nms`.

    Returns:
        Whether a box is kept, [B, N] bool, and whether this is the result of the greedy algorithm, 0-D bool.
    """
    with paddle.amp.auto_cast(enable=False):
        boxes, images = boxes.astype('float64'), boxes.shape[0]
        step = max(_PAIRS // max(boxes.shape[1] ** 2, 1), 1)
        over = paddle.concat([_suppresses(boxes[i : i + step], threshold) for i in range(0, images, step)])
        usable = usable.astype('float32').unsqueeze(1)
        kept = before = usable
        for _ in range(ROUNDS):
            before, kept = kept, usable * (paddle.matmul(kept, over) == 0).astype('float32')
        return kept.squeeze(1) > 0, (kept == before).all()


def _suppresses(boxes: Tensor, threshold: float) -> Tensor:
    """Boxes [B, N, 4] -> 1 where a box suppresses a later one, as Paddle's operator computes it, [B, N, N] float32."""
    first, second = boxes.unsqueeze(2), boxes.unsqueeze(1)
    sides = paddle.minimum(first[..., 2:], second[..., 2:]) - paddle.maximum(first[..., :2], second[..., :2])
    sides = sides.clip(min=0.0)
    shared = sides[..., 0] * sides[..., 1]
    iou = shared / (area(first) + area(second) - shared)
    return paddle.triu((iou > float(np.float32(threshold))).astype('float32'), 1)


class Best(NamedTuple):
    """The best boxes of each image by descending score; after the last one come boxes of zeros.

    Attributes:
        boxes: [B, k, 4].
        scores: [B, k]; 0 behind the last box.
        index: place among all boxes, [B, k] int64.
        valid: [B, k] bool.
    """

    boxes: Tensor
    scores: Tensor
    index: Tensor
    valid: Tensor


def suppress(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    usable: Tensor,
    num_groups: int,
    threshold: float,
    limit: int,
    few: bool = False,
) -> Best:
    """Non-maximum suppression within the groups of each image. The host waits for a GPU once per image, with `few` twice.

    Args:
        boxes: [B, N, 4], finite.
        scores: [B, N].
        groups: number of the group, below `num_groups`, [B, N] int64.
        usable: the other boxes are dropped, [B, N] bool.
        threshold: see `grouped_nms`.
        limit: largest number of boxes per image.
        few: only few boxes are usable; the others are left out before.
    """
    count, images = boxes.shape[1], numbers_of(boxes)
    groups = (groups + (images.unsqueeze(1) + 1) * num_groups).flatten()
    total = paddle.ones_like(groups).sum(keepdim=True)
    # A box of a group of its own comes last, so that a program need not suppress among no boxes.
    flat_boxes = paddle.concat([boxes.reshape([-1, 4]), paddle.zeros_like(boxes[0, :1])])
    flat_scores = paddle.concat([scores.flatten(), paddle.zeros_like(scores[0, :1])])
    if not few:  # boxes that are not usable are of that group, too
        groups = groups * usable.flatten().astype(groups.dtype)
    groups = paddle.concat([groups, paddle.zeros_like(groups[:1])])
    kept = paddle.zeros_like(groups)
    if not paddle.in_dynamic_mode():  # a program has no loop over any number of images: the images are groups, too
        parts = [paddle.nonzero(usable.flatten()).flatten()]
    elif few:
        parts = [paddle.nonzero(image).flatten() + number * count for number, image in enumerate(usable)]
    else:
        parts = [paddle.arange(number * count, (number + 1) * count) for number in range(boxes.shape[0])]
    for part in parts:
        part = paddle.concat([part, total])
        rows = grouped_nms(*(paddle.gather(values, part) for values in (flat_boxes, flat_scores, groups)), threshold)
        rows = paddle.gather(part, rows)
        kept = paddle.scatter(kept, rows, paddle.ones_like(rows))
    kept = kept[:-1].reshape([-1, count]) * usable.astype(kept.dtype)
    return best_of(boxes, scores, kept, limit)


def best_of(boxes: Tensor, scores: Tensor, kept: Tensor, limit: int) -> Best:
    """Return the best boxes of each image.

    Args:
        boxes, scores, limit: see `suppress`.
        kept: 1 for boxes that may be chosen, else 0, [B, N] int64.
    """
    limit = min(limit, boxes.shape[1])
    lowest = paddle.full_like(scores, np.finfo('float32').min)
    scores, index = paddle.where(kept > 0, scores, lowest).topk(limit, axis=1)
    valid = paddle.take_along_axis(kept, index, axis=1) > 0
    boxes = paddle.take_along_axis(boxes, index.unsqueeze(-1), axis=1)
    boxes, scores = boxes * valid.unsqueeze(-1).astype(boxes.dtype), scores * valid.astype(scores.dtype)
    return Best(boxes, scores, index, valid)


def numbers_of(x: Tensor) -> Tensor:
    """0, 1, ... for each row of a tensor of two or more axes, [B] int64; also in a program of any batch size."""
    ones = paddle.ones_like(x.flatten(1)[:, 0], dtype='int64')
    return paddle.cumsum(ones, axis=0) - 1


def choose_detections(
    boxes: Tensor,
    probabilities: Tensor,
    valid: Tensor,
    sizes: Tensor,
    min_score: float = 0.05,
    threshold: float = 0.5,
    limit: int = 100,
) -> Best:
    """The best detections of each image, after non-maximum suppression within each class.

    Args:
        boxes: of each class, [B, R, K * 4].
        probabilities: [B, R, K + 1], background last. Rows with numbers that are not finite are left out.
        valid: the other regions are left out, [B, R] bool.
        sizes: (height, width) of the images, [B, 2].
        min_score: probabilities up to this are no detections.
        threshold: see `grouped_nms`.
        limit: largest number of detections per image.

    Returns:
        `Best`, whose index is region * K + class.
    """
    regions, num_classes = probabilities.shape[1], probabilities.shape[2] - 1
    finite = paddle.logical_and(boxes.isfinite().all(-1), probabilities.isfinite().all(-1))
    finite = paddle.logical_and(finite, valid).unsqueeze(-1)
    scores = paddle.where(finite, probabilities[:, :, :-1], paddle.zeros_like(probabilities[:, :, :-1]))
    boxes = paddle.where(finite, boxes, paddle.zeros_like(boxes))
    classes = paddle.ones_like(scores, dtype='int64') * paddle.arange(num_classes)
    boxes = clip_boxes(boxes.reshape([-1, regions * num_classes, 4]), sizes)
    scores, classes = scores.flatten(1), classes.flatten(1)
    return suppress(boxes, scores, classes, scores > min_score, num_classes, threshold, limit, few=True)
