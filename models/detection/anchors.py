# SPDX-License-Identifier: Apache-2.0
"""Anchor boxes of a region proposal network (Faster R-CNN, https://arxiv.org/abs/1506.01497)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cell_anchors(size: float, ratios: Sequence[float]) -> np.ndarray:
    """Anchors of one size around the origin, one per ratio (height / width), [ratios, 4] float32."""
    ratios = np.asarray(ratios, 'float64')
    width = np.sqrt(size**2 / ratios)
    height = ratios * width
    return (np.stack([-width, -height, width, height], axis=1) / 2).astype('float32')


def grid_anchors(grid: tuple[int, int], stride: float, cell: np.ndarray) -> np.ndarray:
    """Anchors of all cells of a feature map.

    Args:
        grid: (rows, columns) of the map.
        stride: pixels between cells; the first cell is centered at (0, 0).
        cell: anchors around the origin, [A, 4].

    Returns:
        [rows * columns * A, 4] float32: by row, column, then anchor.
    """
    y, x = np.meshgrid(*(np.arange(length, dtype='float32') * np.float32(stride) for length in grid), indexing='ij')
    shifts = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
    return (shifts + cell).reshape(-1, 4)
