# SPDX-License-Identifier: Apache-2.0
"""Layers on inputs that the operators do not read as they are: bfloat16, and other biases of the attention."""

import numpy as np
import paddle
import pytest

import ops
from models.gmlp import GatedMlp
from models.layers import Attention, LayerNorm, Linear, Mlp
from tests.conftest import assert_close
from utils.environment import has_bfloat16

pytestmark = pytest.mark.skipif(not ops.load(), reason='no C++ compiler')


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype('float32')


def run(layer, x):
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.skipif(not has_bfloat16(), reason='no instructions for bfloat16')
@pytest.mark.parametrize(
    'make',
    [
        lambda: LayerNorm(8),
        lambda: Linear(8, 8),
        lambda: Mlp(8, 16),
        lambda: Attention(8, 2),
        lambda: GatedMlp(8, 16, 4),
    ],
)
def test_bfloat16_inputs(make):
    """Paddle itself has no layers for bfloat16 on the CPU."""
    layer, x = make(), paddle.to_tensor(numbers(2, 4, 8), stop_gradient=False)
    exact = run(layer, x)
    with ops.bfloat16():
        y = run(layer, x.astype('bfloat16'))
    assert y.dtype == paddle.float32
    assert_close(y, exact, 5e-2)
    y.sum().backward()
    assert x.grad.dtype == paddle.float32 and paddle.isfinite(x.grad).all()


@pytest.mark.skipif(not has_bfloat16(), reason='no instructions for bfloat16')
def test_bfloat16_map_of_shifted_convolutions():
    x, weight, bias = paddle.ones([1, 2, 2, 3]), paddle.ones([6]), paddle.zeros([3])
    with ops.bfloat16():
        y = ops.shifted_convs(x.astype('bfloat16'), weight, bias, [3], [1], [0])
    assert_close(y, np.full([1, 2, 2, 3], 2.0))


@pytest.mark.parametrize('shape', [(2, 1, 1, 3), (1, 1, 1, 3), (2, 4, 1, 3), (2, 1, 3, 3), (3,)])
def test_biases_of_other_shapes_than_of_the_keys(shape, monkeypatch):
    """They broadcast, as in the layers of Paddle."""
    attention, x = Attention(8, 4), paddle.to_tensor(numbers(2, 3, 8))
    bias = paddle.to_tensor(numbers(*shape))
    ours = attention(x, key_bias=bias)[0]
    monkeypatch.setattr(ops, 'usable', lambda *_: False)
    assert_close(ours, attention(x, key_bias=bias)[0], 1e-6)
