# SPDX-License-Identifier: Apache-2.0
"""Layers alone, and subclasses that extend `forward`, are compiled and exported by Paddle."""

import paddle
import pytest
from paddle import nn

import ops
from models.detection.pyramid import ConvNorm
from models.layers import Attention, LayerNorm, Linear
from models.layers.windowed_attention import WindowedAttention
from models.mocov3 import MoCoV3
from models.ms_mlp import MixShiftBlock
from tests.conftest import assert_close


class DoubledAttention(WindowedAttention):
    def forward(self, x, **options):
        return super().forward(x, **options)[0] * 2


class OfGrid(nn.Layer):
    def __init__(self, attention=DoubledAttention):
        super().__init__()
        self.attention = attention(8, 2, 2)

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


def shifts():
    return MixShiftBlock(8, (0, 1), (3, 3))


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


@pytest.mark.parametrize('operators', [True, False])
@pytest.mark.parametrize(
    ('make', 'shape'),
    [(lambda: Attention(8, 2), [2, 9, 8]), (lambda: OfGrid(WindowedAttention), [2, 16, 8]), (shifts, [2, 6, 6, 8])],
)
def test_layers_alone_without_full_graph(make, shape, operators, monkeypatch):
    """Paddle's bytecode compiler fails on some methods of tensors."""
    if not operators:
        monkeypatch.setattr(ops, 'usable', lambda *_: False)
    layer = make()
    layer.eval()
    x = paddle.randn(shape)
    expected = layer(x)
    ours = paddle.jit.to_static(layer, full_graph=False)(x)
    ours, expected = (y[0] if isinstance(y, tuple) else y for y in (ours, expected))
    assert_close(ours, expected, 1e-5)
