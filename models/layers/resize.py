# SPDX-License-Identifier: Apache-2.0
"""Bilinear interpolation of feature maps and logits for dense heads."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import Tensor


def resize_maps(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, H, W] -> [B, C, *size]: bilinear, half-pixel centers, no antialiasing."""
    size = [int(side) for side in size]
    if list(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode='bilinear') if paddle.in_dynamic_mode() else _in_program(x, size=[1, *size])


def scale_maps(x: Tensor, scale: float) -> Tensor:
    """Resize by a factor, not to a size: the coordinates of odd sides then scale by exactly this factor."""
    if scale == 1:
        return x
    if paddle.in_dynamic_mode():
        return F.interpolate(x, scale_factor=scale, mode='bilinear')
    return _in_program(x, scale_factor=[1, scale, scale])


def _in_program(x: Tensor, **size) -> Tensor:
    """Compute the same by trilinear resizing at depth 1: oneDNN of Paddle 3.3 cannot run bilinear resizing in a program."""
    return F.interpolate(x.unsqueeze(2), mode='trilinear', data_format='NCDHW', **size).squeeze(2)
