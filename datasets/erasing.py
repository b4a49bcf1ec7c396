# SPDX-License-Identifier: Apache-2.0
"""Random erasing (https://arxiv.org/abs/1708.04896), as in timm: noise overwrites boxes of a normalized image."""

from __future__ import annotations

import math

import numpy as np


class RandomErasing:
    """Draws the boxes of random erasing and their values.

    With `probability` an image gets 1 to `count` boxes (uniform). The area of a box is uniform in [0.02, 1/3] of the image,
    divided by the number of boxes; its aspect ratio is log-uniform in [0.3, 1/0.3]. A box that does not fit into the image
    is drawn again, up to ten times.

    Args:
        mode: pixel: N(0, 1) per value; rand: one N(0, 1) color per box; const: 0, the mean of the data.
    """

    AREA = (0.02, 1 / 3)
    LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
    TRIES = 10

    def __init__(self, probability: float, mode: str = 'pixel', count: int = 1):
        self.probability = probability
        self.mode = mode
        self.count = count

    def __call__(self, shape: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
        """Return unique flat positions int32 [E] in an image of layout (C, H, W) and their values float32 [E], or None.

        Args:
            shape: (H, W, C) of the image.
        """
        if rng.random() >= self.probability:
            return None
        height, width, channels = shape
        boxes = 1 if self.count == 1 else int(rng.integers(1, self.count + 1))
        erased = np.zeros((channels, height, width), bool)
        values = np.zeros((channels, height, width), np.float32)
        for _ in range(boxes):
            box = self._box(height, width, boxes, rng)
            if box is not None:
                rows, columns = box
                erased[:, rows, columns] = True
                values[:, rows, columns] = self._fill(erased[:, rows, columns].shape, rng)
        return np.flatnonzero(erased).astype(np.int32), values[erased]

    def _box(self, height: int, width: int, boxes: int, rng: np.random.Generator) -> tuple[slice, slice] | None:
        for _ in range(self.TRIES):
            area = rng.uniform(*self.AREA) * height * width / boxes
            ratio = math.exp(rng.uniform(*self.LOG_RATIO))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                return slice(top, top + h), slice(left, left + w)
        return None

    def _fill(self, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray | float:
        if self.mode == 'pixel':
            return rng.standard_normal(shape, dtype=np.float32)
        if self.mode == 'rand':
            return rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
        return 0.0
