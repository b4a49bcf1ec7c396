# SPDX-License-Identifier: Apache-2.0
"""Relative position bias (BEiT, https://arxiv.org/abs/2106.08254), added to the attention logits.

The table has a number per head for each displacement between two patches, and three more rows for the class token.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from models.layers.positions import resize_bicubic

EXTRA_ROWS = 3  # class token to patches, patches to class token, class token to itself


def relative_position_index(rows: int, columns: int) -> np.ndarray:
    """Return the table row of each pair of tokens, the class token first: [N, N] int64 with N = 1 + rows * columns."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
    num_rows = table_rows(rows, columns)
    index = np.full([1 + rows * columns] * 2, num_rows - 1)
    index[0, 1:], index[1:, 0] = num_rows - 3, num_rows - 2
    index[1:, 1:] = down * (2 * columns - 1) + right
    return index


def table_rows(rows: int, columns: int) -> int:
    """Return T, the number of rows of the table of a grid."""
    return (2 * rows - 1) * (2 * columns - 1) + EXTRA_ROWS


class RelativePositionBias(nn.Layer):
    """Relative position bias with its table and the index into it; the index is not part of the state dict.

    Args:
        grid: (rows, columns) of patches.
        num_heads: H.
    """

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        add_relative_positions(self, grid, num_heads)

    def forward(self) -> Tensor:
        """[H, N, N]"""
        return relative_bias(self)


def add_relative_positions(layer: nn.Layer, grid: tuple[int, int], num_heads: int) -> None:
    """Add to `layer` a table of zeros [T, H] under upstream's name, for `relative_bias`."""
    layer.relative_position_bias_table = layer.create_parameter(
        [table_rows(*grid), num_heads], default_initializer=initializer.Constant(0.0)
    )
    index = paddle.to_tensor(relative_position_index(*grid))
    layer.register_buffer('relative_position_index', index, persistable=False)


def relative_bias(layer: nn.Layer) -> Tensor:
    """Return the bias of a layer with a table, [H, N, N]."""
    table, index = layer.relative_position_bias_table, layer.relative_position_index
    rows = index.flatten().astype('int64')  # Layer.to(dtype=...) converts buffers too
    return paddle.gather(table, rows).reshape([*index.shape, -1]).transpose([2, 0, 1])


MIN_SPLINE = 5  # sides of the smallest table with the four places that a cubic spline needs on each axis


def resize_relative_table(
    table: np.ndarray, grid: tuple[int, int], old_grid: tuple[int, int] | None = None, spline: bool = False
) -> np.ndarray:
    """Interpolate a table bicubically to another grid; return any other array unchanged.

    Args:
        table: [T, H].
        grid: (rows, columns) of patches of the result.
        old_grid: (rows, columns) of the table; None: square.
        spline: interpolate as BEiT does, see `_geometric_spline`.
    """
    old, new = _sides(len(table) - EXTRA_ROWS, old_grid), [2 * length - 1 for length in grid]
    if old is None or (spline and any(side % 2 == 0 or side < MIN_SPLINE for side in old)):
        return table
    count = old[0] * old[1]
    if spline:
        patches = _geometric_spline(table[:count].reshape([*old, -1]), new)
        return np.concatenate([patches.reshape([-1, table.shape[1]]).astype(table.dtype), table[count:]])
    patches = paddle.to_tensor(table[:count].astype('float32'), place=paddle.CPUPlace())
    patches = patches.reshape([1, *old, -1]).transpose([0, 3, 1, 2])
    resized = resize_bicubic(patches, new)
    return np.concatenate([resized.flatten(2)[0].transpose([1, 0]).numpy(), table[count:]])


def _sides(displacements: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return (vertical, horizontal) numbers of displacements of a table; None: they do not fit the grid, or form no square."""
    side = math.isqrt(max(displacements, 0))
    sides = (side, side) if grid is None else (2 * grid[0] - 1, 2 * grid[1] - 1)
    return sides if side and sides[0] * sides[1] == displacements else None


def _geometric_spline(table: np.ndarray, shape: list[int]) -> np.ndarray:
    """[S, S, H] -> [*shape, H] by bicubic splines over displacements in geometric progression (BEiT).

    The old displacements become 1, 1 + q, 1 + q + q^2, ... up to the largest of the new grid. Small displacements,
    where tables vary most, keep their resolution.
    """
    from scipy.interpolate import make_interp_spline  # optional, and slow to import

    for axis, length in enumerate(shape):
        old, new = table.shape[axis] // 2, length // 2
        if old == new:
            continue
        far = np.cumsum(_growth(old, new) ** np.arange(old))
        old_displacements = np.concatenate([-far[::-1], [0.0], far])
        new_displacements = np.clip(np.arange(-new, new + 1), old_displacements[0], old_displacements[-1])
        table = make_interp_spline(old_displacements, table.astype('float64'), k=3, axis=axis)(new_displacements)
    return table


def _growth(count: int, largest: int) -> float:
    """Return q with 1 + q + ... + q^(count - 1) = `largest`, by bisection in [1.01, 1.5] as upstream does."""
    low, high, middle = 1.01, 1.5, 1.255
    while high - low > 1e-6:
        middle = (low + high) / 2
        if (middle ** np.arange(count)).sum() > largest:
            high = middle
        else:
            low = middle
    return middle
