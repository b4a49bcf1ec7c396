# SPDX-License-Identifier: Apache-2.0
"""Necks: resize four Vision Transformer feature maps [B, C, g, g] by the factors 4, 2, 1 and 1/2."""

from __future__ import annotations

from collections.abc import Sequence

import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn import initializer

from models.layers import SyncBatchNorm, scale_maps

SCALES = (4, 2, 1, 0.5)


class Pyramid(nn.Layer):
    """Pyramid of BEiT (https://arxiv.org/abs/2106.08254): transposed convolutions and a max pool, C channels.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fpn1 = nn.Sequential(_double(channels), SyncBatchNorm(channels), nn.GELU(), _double(channels))
        self.fpn2 = nn.Sequential(_double(channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps [B, C, g, g] -> sides 4 g, 2 g, g and floor(g / 2)."""
        first, second, third, fourth = maps
        return [self.fpn1(first), self.fpn2(second), third, F.max_pool2d(fourth, 2, 2)]


def _double(channels: int) -> nn.Conv2DTranspose:
    """Build a transposed convolution that doubles both sides, with the default initialization of PyTorch."""
    conv = nn.Conv2DTranspose(channels, channels, 2, 2)
    bound = (4 * channels) ** -0.5
    initializer.Uniform(-bound, bound)(conv.weight)
    initializer.Uniform(-bound, bound)(conv.bias)
    return conv


class MultiLevelNeck(nn.Layer):
    """A 1x1 convolution, bilinear resizing and a 3x3 convolution per map: mmsegmentation's `MultiLevelNeck`.

    Args:
        in_channels: C of each map.
        out_channels: channels O of each output map.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.lateral_convs = nn.LayerList(_Conv(in_channels, out_channels, 1) for _ in SCALES)
        self.convs = nn.LayerList(_Conv(out_channels, out_channels, 3) for _ in SCALES)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps [B, C, g, g] -> [B, O] with sides 4 g, 2 g, g and floor(g / 2)."""
        maps = [scale_maps(lateral(x), scale) for lateral, x, scale in zip(self.lateral_convs, maps, SCALES)]
        return [conv(x) for conv, x in zip(self.convs, maps)]


class _Conv(nn.Layer):
    """Convolution with bias that keeps the size, with mmsegmentation's parameter names."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2D(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        initializer.XavierUniform()(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
