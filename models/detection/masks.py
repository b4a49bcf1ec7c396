# SPDX-License-Identifier: Apache-2.0
"""Instance masks: polygons to bitmaps, targets of a mask head, and its predictions back in the image.

Polygons are rasterized by pycocotools (https://github.com/cocodataset/cocoapi), as in detectron2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Union

import numpy as np
import paddle

from models.detection.roi_align import roi_align

# An instance: polygons as x1 y1 x2 y2 ..., or a bitmap [H, W] of 0 and 1.
Instance = Union[Sequence[np.ndarray], np.ndarray]
PASTE_CELLS = 2**26  # pixels that are pasted at a time


class ImageDetections(NamedTuple):
    """Detections of one image, as arrays.

    Attributes:
        boxes: [k, 4] float32.
        scores: [k] float32.
        classes: [k] int64.
        masks: probabilities within the boxes [k, m, m] float32; after `postprocess` masks of the image [k, H, W] bool.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray


# ---------------------------------------------------------------------------------------------------- polygons
def rasterize(instances: Sequence[Sequence[np.ndarray]], height: int, width: int) -> np.ndarray:
    """Instances of one or more polygons each -> bitmaps [n, height, width] uint8 of 0 and 1."""
    from pycocotools import mask  # needed for training alone

    if not instances:
        return np.zeros([0, height, width], 'uint8')
    polygons = [np.asarray(polygon, 'float64').reshape(-1) for instance in instances for polygon in instance]
    codes = mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    ends = np.cumsum([len(instance) for instance in instances])
    merged = [mask.merge(codes[end - len(instance) : end]) for end, instance in zip(ends, instances)]
    return np.ascontiguousarray(mask.decode(merged).transpose(2, 0, 1))


def mask_targets(instances: Sequence[Instance], boxes: np.ndarray, side: int) -> np.ndarray:
    """The part of each instance within its box, resized to the resolution of the mask head.

    Args:
        instances: one per box.
        boxes: [n, 4].
        side: of the targets, pixels.

    Returns:
        [n, side, side] float32 of 0 and 1.
    """
    targets = np.zeros([len(instances), side, side], 'float32')
    bitmaps = np.array([isinstance(instance, np.ndarray) and instance.ndim == 2 for instance in instances], 'bool')
    for kind, convert in ((False, _polygon_targets), (True, _bitmap_targets)):
        rows = np.flatnonzero(bitmaps == kind)
        if len(rows):
            targets[rows] = convert([instances[row] for row in rows], boxes[rows], side)
    return targets


def _polygon_targets(instances: Sequence[Sequence[np.ndarray]], boxes: np.ndarray, side: int) -> np.ndarray:
    corners, sides = boxes[:, :2].astype('float64'), boxes[:, 2:].astype('float64') - boxes[:, :2]
    scales = side / np.maximum(sides, 0.1)
    moved = [
        [(np.asarray(polygon, 'float64').reshape(-1, 2) - corner) * scale for polygon in instance]
        for instance, corner, scale in zip(instances, corners, scales)
    ]
    return rasterize(moved, side, side)


def _bitmap_targets(instances: Sequence[np.ndarray], boxes: np.ndarray, side: int) -> np.ndarray:
    height, width = np.max([instance.shape for instance in instances], axis=0)
    maps = np.zeros([len(instances), 1, height, width], 'float32')
    for bitmap, instance in zip(maps, instances):
        bitmap[0, : instance.shape[0], : instance.shape[1]] = instance
    with paddle.no_grad():
        place = paddle.CPUPlace()
        maps, boxes = paddle.to_tensor(maps, place=place), paddle.to_tensor(boxes.astype('float32'), place=place)
        return roi_align(maps, boxes, np.arange(len(instances)), side, 1.0).squeeze(1).numpy() >= 0.5


# ---------------------------------------------------------------------------------------------------- predictions
def paste(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Probabilities of masks within their boxes -> probabilities of all pixels, bilinear, 0 outside.

    Args:
        masks: [n, m, m].
        boxes: [n, 4].

    Returns:
        [n, height, width] float32
    """
    side = masks.shape[-1]
    rows = _weights(boxes[:, 1], boxes[:, 3], height, side)
    columns = _weights(boxes[:, 0], boxes[:, 2], width, side)
    return rows @ masks.astype('float32') @ columns.transpose(0, 2, 1)


def _weights(start: np.ndarray, end: np.ndarray, length: int, side: int) -> np.ndarray:
    """Share of each cell of a mask in the center of each pixel along one axis, [n, length, side] float32."""
    pixels = np.arange(length, dtype='float32') + np.float32(0.5)
    start, end = start[:, None].astype('float32'), end[:, None].astype('float32')
    cells = (pixels - start) / (end - start) * np.float32(side) - np.float32(0.5)
    return np.maximum(1 - np.abs(cells[:, :, None] - np.arange(side, dtype='float32')), 0, dtype='float32')


def postprocess(
    detections: ImageDetections, size: tuple[int, int], original_size: tuple[int, int], threshold: float = 0.5
) -> ImageDetections:
    """Detections of a network input in its original image.

    Args:
        detections: boxes in pixels of the network input.
        size: (height, width) of the image in the network input, without padding.
        original_size: (height, width) of the original image.
        threshold: probability from which on a pixel belongs to a mask.

    Returns:
        Boxes scaled and clipped, without those that are empty then, and masks [k, H, W] bool.
    """
    height, width = original_size
    scale = np.array([width / size[1], height / size[0]] * 2, 'float32')
    limits = np.array([width, height] * 2, 'float32')
    boxes = np.clip(detections.boxes * scale, 0, limits)
    kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    boxes, probabilities = boxes[kept], detections.masks[kept]
    masks = np.zeros([len(kept), height, width], 'bool')
    step = max(PASTE_CELLS // max(height * width, 1), 1)
    for first in range(0, len(kept), step):
        part = slice(first, first + step)
        masks[part] = paste(probabilities[part], boxes[part], height, width) >= threshold
    return ImageDetections(boxes, detections.scores[kept], detections.classes[kept], masks)
