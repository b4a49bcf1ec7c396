# SPDX-License-Identifier: Apache-2.0
"""Bilinear interpolation of feature maps and logits for dense heads."""

from __future__ import annotations

from collections.abc import Sequence

import paddle.nn.functional as F
from paddle import Tensor


def resize_maps(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, H, W] -> [B, C, *size]: bilinear, half-pixel centers, no antialiasing."""
    size = [int(side) for side in size]
    return x if list(x.shape[2:]) == size else F.interpolate(x, size, mode='bilinear', align_corners=False)
