# SPDX-License-Identifier: Apache-2.0
"""Learned position tables at other resolutions."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor


def resize_position_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int
) -> Tensor:
    """Resizes the rows of the patches bicubically (a = -0.75, half-pixel centres, no antialiasing), differentiably.

    Args:
        table: [1, num_prefix + h * w, C]; the prefix rows, such as the class token's, are kept.
        old_grid: (h, w) of the table.
        new_grid: (h, w) wanted.
        num_prefix: rows before those of the patches.

    Returns:
        [1, num_prefix + new h * new w, C]
    """
    if old_grid == new_grid:
        return table
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    patches = patches.reshape([1, *old_grid, -1]).transpose([0, 3, 1, 2])
    patches = F.interpolate(patches, size=list(new_grid), mode='bicubic', align_corners=False)
    return paddle.concat([prefix, patches.flatten(2).transpose([0, 2, 1])], axis=1)
