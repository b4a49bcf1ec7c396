# SPDX-License-Identifier: Apache-2.0
"""Position embeddings: fixed sine-cosine tables, and interpolation of learned tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from utils.errors import UserError
from utils.sizes import Side, size_pair


def sincos_position_table(dim: int, grid: Side, num_prefix: int = 0) -> np.ndarray:
    """Return the 2-D sine-cosine position embedding of MAE (arXiv 2111.06377), with frequencies from 1 to 1/10000.

    The first half of the channels encodes the column of a patch, the second half its row; each is [sines, cosines].

    Args:
        dim: channels C, divisible by 4.
        grid: (rows, columns) of patches; one number for a square grid.
        num_prefix: rows of zeros in front, such as the class token's.

    Returns:
        [1, num_prefix + rows * columns, C] float32, computed in float64.
    """
    height, width = size_pair(grid)
    angles = np.arange(max(height, width))[:, None] * _frequencies(dim)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [positions, C / 2]
    columns, rows = np.tile(waves[:width], (height, 1)), np.repeat(waves[:height], width, axis=0)
    patches = np.concatenate([columns, rows], axis=1)
    return np.concatenate([np.zeros([num_prefix, dim]), patches])[None].astype('float32')


def moco_position_table(dim: int, grid: tuple[int, int], num_prefix: int = 0) -> np.ndarray:
    """Return the position embedding of MoCo-v3 (arXiv 2104.02057): that of MAE with rows and columns swapped.

    Args:
        dim: channels C, divisible by 4.
        grid: (rows, columns) of patches. As upstream, the table is in column-major order, unlike the patches.
        num_prefix: rows of zeros in front, such as the class token's.

    Returns:
        [1, num_prefix + rows * columns, C] float32, computed in float32.
    """
    rows, columns = grid
    outer, inner = np.repeat(np.arange(columns), rows), np.tile(np.arange(rows), columns)
    angles = [
        positions[:, None].astype('float32') * _frequencies(dim).astype('float32') for positions in (outer, inner)
    ]
    patches = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros([num_prefix, dim], 'float32'), patches])[None]


def computed_table(ours: Tensor, theirs: np.ndarray) -> np.ndarray:
    """Return the model's sine-cosine table in place of a file's, or the file's if its channels differ."""
    return ours.numpy() if theirs.shape[2:] == tuple(ours.shape[2:]) else theirs


def _frequencies(dim: int) -> np.ndarray:
    """Return dim / 4 frequencies from 1 towards 1/10000."""
    if dim % 4:
        raise UserError(f'{dim} channels do not divide by 4, which sine-cosine positions need.')
    return 10000.0 ** (-np.arange(dim // 4) / (dim // 4))


def resize_position_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int
) -> Tensor:
    """Interpolate a position embedding bicubically (a = -0.75, half-pixel centers, no antialiasing), differentiably.

    Args:
        table: [1, num_prefix + h * w, C]; the prefix rows, such as the class token's, are copied.
        old_grid: (h, w) of the table.
        new_grid: (h, w) of the result.
        num_prefix: rows before those of the patches.

    Returns:
        [1, num_prefix + new h * new w, C]
    """
    if old_grid == new_grid:
        return table
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    patches = patches.reshape([1, *old_grid, -1]).transpose([0, 3, 1, 2])
    patches = resize_bicubic(patches, new_grid)
    return paddle.concat([prefix, patches.flatten(2).transpose([0, 2, 1])], axis=1)


def resize_bicubic(maps: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size]: bicubic, a = -0.75, half-pixel centers, no antialiasing.

    Paddle 3.3 samples the start of an axis, not its middle, if the result has length 1: such an axis is reduced first.
    """
    for axis, length in zip((2, 3), size):
        if length == 1:
            maps = _middle(maps, axis)
    if list(maps.shape[2:]) == list(size):
        return maps
    return F.interpolate(maps, size=list(size), mode='bicubic', align_corners=False)


def _middle(maps: Tensor, axis: int) -> Tensor:
    """Interpolate at the middle of an axis: between two places the cubic weights are -3/32, 19/32, 19/32, -3/32."""
    length = maps.shape[axis]
    half = length // 2
    if length % 2:
        return paddle.index_select(maps, paddle.to_tensor([half]), axis)
    inner = paddle.index_select(maps, paddle.to_tensor([half - 1, half]), axis)
    outer = paddle.index_select(maps, paddle.to_tensor([max(half - 2, 0), min(half + 1, length - 1)]), axis)
    return inner.sum(axis, keepdim=True) * (19 / 32) - outer.sum(axis, keepdim=True) * (3 / 32)
