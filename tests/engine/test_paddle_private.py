# SPDX-License-Identifier: Apache-2.0
"""What LeanViT takes from Paddle's private API is still there and does what is expected of it."""

import numpy as np
import paddle
import pytest

from engine.checkpoint import optimizer_state, set_optimizer_state, to_arrays
from engine.paddle_private import (
    FusedAdamW,
    ScaledMomentum,
    accumulator_names,
    accumulators,
    create_accumulators,
    squared_norm,
)


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


def three_layers():
    paddle.seed(0)
    return paddle.nn.LayerList(paddle.nn.Linear(*shape) for shape in ((5, 7), (64, 33), (2, 2)))


def adamw_of(model, kind):
    groups = [
        {'params': [layer.weight for layer in model], 'weight_decay': 0.05, 'learning_rate': 0.5},
        {'params': [layer.bias for layer in model], 'weight_decay': 0.0},
    ]
    return kind(learning_rate=0.0, parameters=groups, beta1=0.9, beta2=0.99, epsilon=1e-6)


def adamw_steps(model, optimizer, steps) -> None:
    """Gradients are functions of the step; the second layer has none in odd steps."""
    for step in steps:
        rng = np.random.default_rng(step)
        for index, layer in enumerate(model):
            for parameter in layer.parameters():
                gradient = rng.standard_normal(parameter.shape).astype('float32')
                if not (index == 1 and step % 2):
                    parameter.grad = paddle.to_tensor(gradient)
        optimizer.set_lr(0.1 / (1 + step))
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)


def test_fused_adamw_has_the_bits_of_paddles(monkeypatch):
    """Also for parameters without a gradient in some steps, and after its state was loaded into another optimizer."""
    plain, fused = three_layers(), three_layers()
    adamw_steps(plain, adamw_of(plain, paddle.optimizer.AdamW), range(9))
    updates, update = [], FusedAdamW._update
    monkeypatch.setattr(FusedAdamW, '_update', lambda self, pairs: (updates.append(len(pairs)), update(self, pairs)))
    optimizer = adamw_of(fused, FusedAdamW)
    adamw_steps(fused, optimizer, range(5))
    assert updates == [3, 3, 2, 2, *[2, 1, 2, 1], 2, 2, *[2, 1, 2, 1]]
    state = to_arrays(optimizer_state(optimizer, fused))
    adamw_steps(fused, optimizer, range(5, 9))
    again = three_layers()
    optimizer = adamw_of(again, FusedAdamW)
    set_optimizer_state(optimizer, again, state)
    middle = three_layers()
    adamw_steps(middle, adamw_of(middle, FusedAdamW), range(5))
    again.set_state_dict(middle.state_dict())
    adamw_steps(again, optimizer, range(5, 9))
    for name, value in plain.state_dict().items():
        np.testing.assert_array_equal(fused.state_dict()[name], value)
        np.testing.assert_array_equal(again.state_dict()[name], value)


def test_fused_adamw_skips_a_step_with_overflow():
    model = three_layers()
    optimizer, before = adamw_of(model, FusedAdamW), [parameter.numpy() for parameter in model.parameters()]
    optimizer._set_auxiliary_var('found_inf', paddle.to_tensor([True]))
    adamw_steps(model, optimizer, [0])
    assert optimizer._get_auxiliary_var('found_inf') is True
    assert all(np.array_equal(old, new.numpy()) for old, new in zip(before, model.parameters()))
    optimizer._set_auxiliary_var('found_inf', paddle.to_tensor([False]))
    adamw_steps(model, optimizer, [0])
    assert optimizer._get_auxiliary_var('found_inf') is False
    assert not any(np.array_equal(old, new.numpy()) for old, new in zip(before, model.parameters()))


@pytest.mark.parametrize('shape', [[1], [7], [64, 3], [5, 1000]])
def test_squared_norms(shape):
    tensor = paddle.to_tensor(np.random.default_rng(0).standard_normal(shape).astype('float32'))
    assert squared_norm(tensor).item() == pytest.approx(tensor.square().sum().item(), rel=1e-6)
