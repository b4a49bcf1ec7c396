# SPDX-License-Identifier: Apache-2.0
"""A user's subclass of a layer that extends `forward` can be exported."""

import paddle
import pytest
from paddle import nn

from models.detection.pyramid import ConvNorm
from models.layers import LayerNorm, Linear
from models.layers.windowed_attention import WindowedAttention
from models.mocov3 import MoCoV3
from tests.conftest import assert_close


class DoubledAttention(WindowedAttention):
    def forward(self, x, **options):
        return super().forward(x, **options)[0] * 2


class OfGrid(nn.Layer):
    def __init__(self):
        super().__init__()
        self.attention = DoubledAttention(8, 2, 2)

    def forward(self, x):
        return self.attention(x, grid=(4, 4))


class DoubledConv(ConvNorm):
    def forward(self, x):
        return super().forward(x) * 2


class DoubledLinear(Linear):
    def forward(self, x):
        return super().forward(x) * 2


class DoubledNorm(LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


class DoubledMoCo(MoCoV3):
    def forward(self, x):
        return super().forward(x) * 2


def moco():
    return DoubledMoCo(8, 16, img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)


@pytest.mark.parametrize(
    ('make', 'shape'),
    [
        (OfGrid, [2, 16, 8]),
        (lambda: DoubledConv(4, 4, 3), [2, 4, 8, 8]),
        (lambda: DoubledLinear(8, 4), [2, 8]),
        (lambda: DoubledNorm(8), [2, 8]),
        (moco, [2, 3, 16, 16]),
    ],
)
def test_subclasses_are_exported(make, shape):
    layer = make()
    layer.eval()
    x = paddle.randn(shape)
    expected = layer(x)
    assert_close(paddle.jit.to_static(layer, full_graph=True)(x), expected, 1e-5)
