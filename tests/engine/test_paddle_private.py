# SPDX-License-Identifier: Apache-2.0
"""What LeanViT takes from Paddle's private API is still there and does what is expected of it."""

import numpy as np
import paddle
import pytest

from engine.paddle_private import ScaledMomentum, accumulator_names, accumulators, create_accumulators


def layer():
    layer = paddle.nn.Linear(2, 3)
    layer.weight.set_value(np.full((2, 3), 2.0, 'float32'))
    return layer


@pytest.mark.parametrize(
    'kind, expected',
    [
        (paddle.optimizer.AdamW, {'moment1', 'moment2', 'beta1_pow_acc', 'beta2_pow_acc'}),
        (paddle.optimizer.Momentum, {'velocity'}),
        (paddle.optimizer.Lamb, {'moment1', 'moment2', 'beta1_pow_acc', 'beta2_pow_acc'}),
    ],
)
def test_created_state_is_that_of_a_first_step(kind, expected):
    stepped, fresh = layer(), layer()
    optimizer = kind(learning_rate=0.1, parameters=[{'params': stepped.parameters()}])
    assert accumulators(optimizer) == {}
    stepped(paddle.ones([1, 2])).sum().backward()
    optimizer.step()
    other = kind(learning_rate=0.1, parameters=[{'params': fresh.parameters()}])
    create_accumulators(other, lambda parameter: parameter is fresh.weight)
    assert set(accumulators(other)) == set(accumulators(optimizer)) == expected <= accumulator_names(other)
    for name in expected:
        assert list(accumulators(other)[name]) == [fresh.weight.name]
        assert (
            accumulators(other)[name][fresh.weight.name].shape
            == accumulators(optimizer)[name][stepped.weight.name].shape
        )


def test_a_scaled_momentum_steps_with_the_gradient_that_it_is_given():
    class Doubled(ScaledMomentum):
        def scaled(self, weight, gradient, group):
            assert group['factor'] == 2
            np.testing.assert_array_equal(weight.numpy(), 2.0)
            return gradient * group['factor']

    model = layer()
    optimizer = Doubled(learning_rate=0.1, parameters=[{'params': [model.weight], 'factor': 2}])
    model(paddle.ones([1, 2])).sum().backward()
    optimizer.step()
    np.testing.assert_allclose(model.weight.numpy(), 2.0 - 0.1 * 2, rtol=1e-6)
