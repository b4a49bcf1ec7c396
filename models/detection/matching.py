# SPDX-License-Identifier: Apache-2.0
"""Which box learns which object: matching by intersection over union, and a random sample of the matched boxes."""

from __future__ import annotations

import paddle
from paddle import Tensor

NEGATIVE, POSITIVE, IGNORED = 0, 1, -1


def match(iou: Tensor, low: float, high: float, low_quality: bool = False) -> tuple[Tensor, Tensor]:
    """Match each box to the object that it overlaps most; of equal ones, to the first.

    Args:
        iou: objects by boxes, [G, N]; G may be 0, which makes all boxes negative.
        low: boxes with less are negative.
        high: boxes with this or more are positive; those between are ignored.
        low_quality: for each object, the boxes that reach its maximum are positive, too. As in detectron2 they keep the object
            that they overlap most, and an object without any overlap makes all boxes without overlap positive.

    Returns:
        Index of the object [N] int64, and NEGATIVE, POSITIVE or IGNORED [N] int64.
    """
    if not iou.shape[0]:
        nothing = paddle.zeros([iou.shape[1]], 'int64')
        return nothing, nothing
    best = iou.max(axis=0)
    numbers = paddle.arange(iou.shape[0], dtype='int64').unsqueeze(1)
    index = paddle.where(iou == best, numbers, paddle.full_like(numbers, iou.shape[0])).min(axis=0)
    labels = (best >= high).astype('int64') - paddle.logical_and(best >= low, best < high).astype('int64')
    if low_quality:
        reached = (iou == iou.max(axis=1, keepdim=True)).any(axis=0)
        labels = paddle.where(reached, paddle.full_like(labels, POSITIVE), labels)
    return index, labels


def subsample(labels: Tensor, keys: Tensor, count: int, positive_share: float) -> Tensor:
    """Keep a random sample of the labels and ignore the rest.

    Args:
        labels: NEGATIVE, POSITIVE or IGNORED, [N].
        keys: random numbers [N] float64: those boxes are kept that have the smallest.
        count: boxes to keep; fewer where there are not so many.
        positive_share: largest share of positives; the rest is negative.

    Returns:
        Labels [N] int64.
    """
    positive, negative = (labels == value for value in (POSITIVE, NEGATIVE))
    kept = paddle.logical_and(positive, _rank(keys, positive) < int(count * positive_share))
    others = paddle.logical_and(negative, _rank(keys, negative) < count - kept.sum())
    return paddle.where(paddle.logical_or(kept, others), labels, paddle.full_like(labels, IGNORED))


def _rank(keys: Tensor, member: Tensor) -> Tensor:
    """Place of each key among those of the members in ascending order; the other keys come last. [N] int64."""
    keys = paddle.where(member, keys, keys + 2.0)  # keys are in [0, 1)
    return paddle.argsort(paddle.argsort(keys, stable=True), stable=True)
