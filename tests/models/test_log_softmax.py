# SPDX-License-Identifier: Apache-2.0
"""log_softmax has the bits of Paddle's operator, without its time in proportion to the square of the classes."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.layers import log_softmax
from utils import device


def results(function, logits: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """The output, and the gradient of its weighted sum."""
    x = paddle.to_tensor(logits, stop_gradient=False)
    y = function(x)
    (y * paddle.to_tensor(weights)).sum().backward()
    return [y.numpy(), x.grad.numpy()]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 300), st.sampled_from([1.0, 5.0]))
def test_bits_of_paddle(seed, rows, classes, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((rows, classes))).astype('float32')
    weights = rng.random((rows, classes), 'float32')
    for ours, expected in zip(results(log_softmax, logits, weights), results(F.log_softmax, logits, weights)):
        np.testing.assert_array_equal(ours, expected)


def test_many_classes(monkeypatch):
    monkeypatch.setattr(F, 'log_softmax', lambda *_, **__: pytest.fail('takes minutes'))
    logits = np.random.default_rng(0).standard_normal((2, 200_000)).astype('float32')
    y, gradient = results(log_softmax, logits, np.ones_like(logits))
    expected = logits - np.log(np.exp(logits.astype('float64')).sum(1, keepdims=True))
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, 1 - 200_000 * np.exp(expected), rtol=1e-4, atol=1e-4)


def test_large_differences():
    """Paddle's operator for the CPU returns at least -64; PyTorch and the GPU do not."""
    logits = np.array([[0.0, -100.0, 50.0], [-np.inf, 1.0, 1.0], [np.nan, 1.0, 2.0]], 'float32')
    with np.errstate(invalid='ignore'):
        expected = logits - np.log(np.exp(logits.astype('float64')).sum(1, keepdims=True))
    np.testing.assert_allclose(log_softmax(paddle.to_tensor(logits)), expected, rtol=1e-6)


def test_a_gpu_uses_the_operator_of_paddle(monkeypatch):
    monkeypatch.setattr(device, 'on_gpu', lambda: True)
    monkeypatch.setattr(F, 'log_softmax', lambda x, axis: (x, axis))
    assert log_softmax(3) == (3, -1)
