# SPDX-License-Identifier: Apache-2.0
"""What LeanViT takes from Paddle's private API is still there and does what is expected of it."""

import numpy as np
import paddle
import pytest

import utils.device
from engine.checkpoint import optimizer_state, set_optimizer_state, to_arrays
from engine.optim import LARS
from engine.paddle_private import (
    FusedAdamW,
    FusedLamb,
    FusedMomentum,
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
    class Doubled(FusedMomentum):
        def scaled(self, weight, gradient, group):
            assert group['factor'] == 2
            np.testing.assert_array_equal(weight.numpy(), 2.0)
            return gradient * group['factor']

    model = layer()
    optimizer = Doubled(learning_rate=0.1, parameters=[{'params': [model.weight], 'factor': 2}])
    model(paddle.ones([1, 2])).sum().backward()
    optimizer.step()
    np.testing.assert_allclose(model.weight.numpy(), 2.0 - 0.1 * 2, rtol=1e-6)


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('kind', [FusedMomentum, LARS])
def test_fused_momentum_has_the_numbers_of_paddles(monkeypatch, kind, nesterov):
    """Also for parameters without a gradient in some steps, and after its state was loaded into another optimizer."""
    results, updates, update = [], [], FusedMomentum._update
    monkeypatch.setattr(
        FusedMomentum, '_update', lambda self, own, *args: (updates.append(len(own)), update(self, own, *args))
    )
    for on_gpu in (False, True):
        monkeypatch.setattr(utils.device, 'on_gpu', lambda on_gpu=on_gpu: on_gpu)
        model, again = three_layers(), three_layers()
        optimizer, other = momentum_of(model, kind, nesterov), momentum_of(again, kind, nesterov)
        take_steps(model, optimizer, range(3))
        set_optimizer_state(other, again, to_arrays(optimizer_state(optimizer, model)))
        again.set_state_dict(model.state_dict())
        for each in ((model, optimizer), (again, other)):
            take_steps(*each, range(3, 6))
        state = [*model.state_dict().values(), *optimizer_state(optimizer, model)['velocity'].values()]
        results.append([value.numpy() for value in state])
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(again.state_dict()[name], value)
    assert len(results[0]) == 12 and updates == [3, 3, 2, 2, 3, 3, *2 * [2, 2, 3, 3, 2, 2]]
    for expected, found in zip(*results):
        np.testing.assert_allclose(found, expected, 1e-5, 1e-7)


def momentum_of(model, kind, nesterov):
    groups = [
        {
            'params': [layer.weight for layer in model],
            'weight_decay': paddle.regularizer.L2Decay(0.05),
            'learning_rate': 0.5,
        },
        {'params': [layer.bias for layer in model], 'weight_decay': None},
    ]
    if kind is LARS:
        groups = [
            {**group, 'weight_decay': None, 'lars_weight_decay': 0.05 * (not i)} for i, group in enumerate(groups)
        ]
    return kind(learning_rate=0.0, parameters=groups, momentum=0.9, use_nesterov=nesterov)


def test_fused_momentum_skips_a_step_with_overflow(monkeypatch):
    monkeypatch.setattr(utils.device, 'on_gpu', lambda: True)
    model = three_layers()
    optimizer, before = (
        momentum_of(model, FusedMomentum, False),
        [parameter.numpy() for parameter in model.parameters()],
    )
    for overflow in (True, False):
        optimizer._set_auxiliary_var('found_inf', paddle.to_tensor([overflow]))
        take_steps(model, optimizer, [0])
        assert optimizer._get_auxiliary_var('found_inf') is overflow
        same = [np.array_equal(old, new.numpy()) for old, new in zip(before, model.parameters())]
        assert all(same) if overflow else not any(same)


def three_layers():
    paddle.seed(0)
    return paddle.nn.LayerList(paddle.nn.Linear(*shape) for shape in ((5, 7), (64, 33), (2, 2)))


def adamw_of(model, kind):
    groups = [
        {'params': [layer.weight for layer in model], 'weight_decay': 0.05, 'learning_rate': 0.5},
        {'params': [layer.bias for layer in model], 'weight_decay': 0.0},
    ]
    return kind(learning_rate=0.0, parameters=groups, beta1=0.9, beta2=0.99, epsilon=1e-6)


def take_steps(model, optimizer, steps) -> None:
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
    take_steps(plain, adamw_of(plain, paddle.optimizer.AdamW), range(9))
    updates, update = [], FusedAdamW._update
    monkeypatch.setattr(
        FusedAdamW, '_update', lambda self, own, *args: (updates.append(len(own)), update(self, own, *args))
    )
    optimizer = adamw_of(fused, FusedAdamW)
    take_steps(fused, optimizer, range(5))
    assert updates == [3, 3, 2, 2, *[2, 1, 2, 1], 2, 2, *[2, 1, 2, 1]]
    state = to_arrays(optimizer_state(optimizer, fused))
    take_steps(fused, optimizer, range(5, 9))
    again = three_layers()
    optimizer = adamw_of(again, FusedAdamW)
    set_optimizer_state(optimizer, again, state)
    middle = three_layers()
    take_steps(middle, adamw_of(middle, FusedAdamW), range(5))
    again.set_state_dict(middle.state_dict())
    take_steps(again, optimizer, range(5, 9))
    for name, value in plain.state_dict().items():
        np.testing.assert_array_equal(fused.state_dict()[name], value)
        np.testing.assert_array_equal(again.state_dict()[name], value)


def test_fused_adamw_skips_a_step_with_overflow():
    model = three_layers()
    optimizer, before = adamw_of(model, FusedAdamW), [parameter.numpy() for parameter in model.parameters()]
    optimizer._set_auxiliary_var('found_inf', paddle.to_tensor([True]))
    take_steps(model, optimizer, [0])
    assert optimizer._get_auxiliary_var('found_inf') is True
    assert all(np.array_equal(old, new.numpy()) for old, new in zip(before, model.parameters()))
    optimizer._set_auxiliary_var('found_inf', paddle.to_tensor([False]))
    take_steps(model, optimizer, [0])
    assert optimizer._get_auxiliary_var('found_inf') is False
    assert not any(np.array_equal(old, new.numpy()) for old, new in zip(before, model.parameters()))


def lamb_of(model, kind):
    groups = [
        {'params': [layer.weight for layer in model], 'lamb_weight_decay': 0.05, 'learning_rate': 0.5},
        {'params': [layer.bias for layer in model], 'lamb_weight_decay': 0.0},
    ]
    return kind(learning_rate=0.0, parameters=groups, beta1=0.9, beta2=0.999, epsilon=1e-6)


def state_of(model, optimizer) -> list[np.ndarray]:
    kinds = optimizer_state(optimizer, model)
    return [value.numpy() for entries in (model.state_dict(), *kinds.values()) for value in entries.values()]


@pytest.mark.parametrize('on_gpu', [False, True])
def test_fused_lamb_has_the_numbers_of_paddles(monkeypatch, on_gpu):
    """Its bits on a CPU; also where gradients are missing in some steps or are zero, and after its state was loaded."""
    plain = three_layers()
    expected = lamb_of(plain, paddle.optimizer.Lamb)
    monkeypatch.setattr(utils.device, 'on_gpu', lambda: on_gpu)
    updates, update = [], FusedLamb._update
    monkeypatch.setattr(
        FusedLamb,
        '_update',
        lambda self, powers, own, *args: (updates.append(len(own)), update(self, powers, own, *args)),
    )
    fused, again = three_layers(), three_layers()
    optimizer, other = lamb_of(fused, FusedLamb), lamb_of(again, FusedLamb)
    take_steps(plain, expected, range(5))
    take_steps(fused, optimizer, range(5))
    set_optimizer_state(other, again, to_arrays(optimizer_state(optimizer, fused)))
    again.set_state_dict(fused.state_dict())
    for each in ((plain, expected), (fused, optimizer), (again, other)):
        take_steps(*each, range(5, 9))
        each[0][0].weight.grad = paddle.zeros_like(each[0][0].weight)
        each[1].step()
    assert updates[:12] == [3, 3, 2, 2, 2, 1, 2, 1, 2, 2, 2, 1][: 12 * on_gpu] and sum(updates) == 68 * on_gpu
    states = [state_of(*each) for each in ((plain, expected), (fused, optimizer), (again, other))]
    assert len(states[0]) == 6 + 4 * 6
    for one, two, three in zip(*states):
        np.testing.assert_allclose(two, one, 2e-5 * on_gpu, 1e-7 * on_gpu)
        np.testing.assert_array_equal(three, two)


def test_fused_lamb_skips_a_step_with_overflow(monkeypatch):
    monkeypatch.setattr(utils.device, 'on_gpu', lambda: True)
    model = three_layers()
    optimizer, before = lamb_of(model, FusedLamb), [parameter.numpy() for parameter in model.parameters()]
    for overflow in (True, False):
        optimizer._set_auxiliary_var('found_inf', paddle.to_tensor([overflow]))
        take_steps(model, optimizer, [0])
        same = [np.array_equal(old, new.numpy()) for old, new in zip(before, model.parameters())]
        assert all(same) if overflow else not any(same)
    powers = optimizer_state(optimizer, model)['beta1_pow_acc']
    assert {power.item() for power in powers.values()} == {float(np.float32(0.9) * np.float32(0.9))}


@pytest.mark.parametrize('shape', [[1], [7], [64, 3], [5, 1000]])
def test_squared_norms(shape):
    tensor = paddle.to_tensor(np.random.default_rng(0).standard_normal(shape).astype('float32'))
    assert squared_norm(tensor).item() == pytest.approx(tensor.square().sum().item(), rel=1e-6)
