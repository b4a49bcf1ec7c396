# SPDX-License-Identifier: Apache-2.0
"""Convolutional heads: UPerNet (https://arxiv.org/abs/1807.10221) and FCN; parameter names are mmsegmentation's."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from models.layers import SyncBatchNorm, resize_maps

POOL_SCALES = (1, 2, 3, 6)
LEVELS = 4


class ConvNormReLU(nn.Layer):
    """Convolution without bias that keeps the size, synchronized batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2D(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias_attr=False)
        initializer.Normal(std=(2.0 / (kernel_size**2 * out_channels)) ** 0.5)(self.conv.weight)
        self.bn = SyncBatchNorm(out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, O, H, W]."""
        return self.act(self.bn(self.conv(x)))


class PixelClassifier(nn.Layer):
    """Channel dropout and a 1x1 convolution, the last layers of a convolutional head.

    Args:
        channels: channels of the features.
        num_classes: K.
        drop_rate: channel dropout rate.
    """

    def __init__(self, channels: int, num_classes: int, drop_rate: float):
        super().__init__()
        self.channels = channels
        self.dropout = nn.Dropout2D(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """See `Classifier`."""
        self.conv_seg = nn.Conv2D(self.channels, num_classes, 1)
        initializer.Normal(std=0.01)(self.conv_seg.weight)

    def classify(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, K, H, W]."""
        return self.conv_seg(self.dropout(x))


class UPerHead(PixelClassifier):
    """UPerNet head: pyramid pooling of the coarsest map, then a feature pyramid.

    Args:
        in_channels: channels C of the four maps.
        channels: channels of the head.
        num_classes: K.
        drop_rate: see `PixelClassifier`.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, drop_rate: float = 0.0):
        super().__init__(channels, num_classes, drop_rate)
        self.psp_modules = nn.LayerList(
            nn.Sequential(nn.AdaptiveAvgPool2D(scale), ConvNormReLU(in_channels, channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvNormReLU(in_channels + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.LayerList(ConvNormReLU(in_channels, channels, 1) for _ in range(LEVELS - 1))
        self.fpn_convs = nn.LayerList(ConvNormReLU(channels, channels, 3) for _ in range(LEVELS - 1))
        self.fpn_bottleneck = ConvNormReLU(LEVELS * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps [B, C, h, w], fine to coarse -> logits [B, K, h, w] of the size of the first."""
        return self.classify(self.features(maps))

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the input of the classifier, [B, channels, h, w] of the size of the first map."""
        levels = [*(conv(x) for conv, x in zip(self.lateral_convs, maps)), self.pool(maps[-1])]
        for i in range(LEVELS - 2, -1, -1):
            levels[i] = levels[i] + resize_maps(levels[i + 1], levels[i].shape[2:])
        levels = [*(conv(x) for conv, x in zip(self.fpn_convs, levels)), levels[-1]]
        size = levels[0].shape[2:]
        return self.fpn_bottleneck(paddle.concat([resize_maps(x, size) for x in levels], axis=1))

    def pool(self, x: Tensor) -> Tensor:
        """Apply pyramid pooling: [B, C, h, w] -> [B, channels, h, w]."""
        branches = [resize_maps(branch(x), x.shape[2:]) for branch in self.psp_modules]
        return self.bottleneck(paddle.concat([x, *branches], axis=1))


class FCNHead(PixelClassifier):
    """Auxiliary head: one 3x3 convolution and the classifier on one feature map.

    Args:
        in_channels: channels C of the map.
        channels: channels of the head.
        num_classes: K.
        drop_rate: see `PixelClassifier`.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, drop_rate: float = 0.0):
        super().__init__(channels, num_classes, drop_rate)
        self.convs = nn.Sequential(ConvNormReLU(in_channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> logits [B, K, h, w]."""
        return self.classify(self.convs(x))
