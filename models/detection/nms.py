# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression within groups of boxes, and the choice of the final detections."""

from __future__ import annotations

from typing import NamedTuple

import paddle
from paddle import Tensor
from paddle.vision.ops import nms

from models.detection.boxes import clip_boxes


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
    boxes = boxes + (groups.astype('float64') * (boxes.max() - boxes.min() + 1.0)).unsqueeze(1)
    return paddle.gather(order, nms(paddle.gather(boxes, order), threshold))


class Chosen(NamedTuple):
    """Detections of an image.

    Attributes:
        boxes: [k, 4] float32, by descending score.
        scores: [k] float32.
        classes: [k] int64.
        rois: row of the region that each comes from, [k] int64.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    rois: Tensor


def choose_detections(
    boxes: Tensor, probabilities: Tensor, size: Tensor, min_score: float, threshold: float, limit: int
) -> Chosen:
    """The best detections of an image, after non-maximum suppression within each class.

    Args:
        boxes: of each class, [R, K * 4].
        probabilities: [R, K + 1], background last. Rows with numbers that are not finite are left out.
        size: (height, width) of the image, [2].
        min_score: probabilities up to this are no detections.
        threshold: see `grouped_nms`.
        limit: largest number of detections.
    """
    classes = probabilities.shape[1] - 1
    finite = paddle.logical_and(boxes.isfinite().all(1), probabilities.isfinite().all(1)).unsqueeze(1)
    scores = paddle.where(finite, probabilities[:, :-1], paddle.zeros_like(probabilities[:, :-1]))
    candidates = paddle.nonzero(scores > min_score)  # [n, 2] as (region, class)
    rows = candidates[:, 0] * classes + candidates[:, 1]
    boxes = clip_boxes(paddle.gather(boxes.reshape([-1, 4]), rows), size)
    scores = paddle.gather(scores.reshape([-1]), rows)
    if not rows.shape[0]:
        return Chosen(boxes.reshape([0, 4]), scores.reshape([0]), rows, rows)
    kept = grouped_nms(boxes, scores, candidates[:, 1], threshold)[:limit]
    boxes, scores, candidates = (paddle.gather(values, kept) for values in (boxes, scores, candidates))
    return Chosen(boxes, scores, candidates[:, 1], candidates[:, 0])
