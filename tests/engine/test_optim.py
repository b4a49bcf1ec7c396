# SPDX-License-Identifier: Apache-2.0
"""Optimizers, parameter groups, clipping and EMA against the original programs."""

import math

import numpy as np
import paddle
import pytest
from paddle import nn

import utils.device
from config import get_config
from engine.ema import ModelEma
from engine.optim import build_optimizer, clip_gradients, parameter_groups
from tests.conftest import assert_close, golden


@pytest.fixture(params=[False, True], ids=['CPU', 'GPU'])
def place(request, monkeypatch) -> bool:
    """Whether the branches of a GPU are taken."""
    monkeypatch.setattr(utils.device, 'on_gpu', lambda: request.param)
    return request.param


class Named(nn.Layer):
    """Parameters under given names, with what the optimizer needs of a model."""

    num_layers = 3
    decays_all = False

    def __init__(self, arrays, exempt=()):
        super().__init__()
        self.exempt = set(exempt)
        self.arrays = {}
        for name, value in arrays.items():
            parameter = self.create_parameter(value.shape)
            parameter.set_value(value)
            self.arrays[name] = parameter

    def named_parameters(self, *_args, **_kwargs):
        return iter(self.arrays.items())

    def parameters(self, *_args, **_kwargs):
        return list(self.arrays.values())

    def state_dict(self, *_args, **_kwargs):
        return dict(self.arrays)

    def no_weight_decay(self):
        return self.exempt

    def layer_id(self, name):
        return {'patch_embed': 0, 'blocks': 1, 'head': 3}.get(name.split('.')[0], 2)


def settings(*opts):
    return get_config(opts=list(opts))


def test_adamw_clipping_decay_groups_and_ema_follow_timm(place):
    reference = golden('evit-optim')
    hyper = reference.meta['hyper']
    model = Named(reference.group('sd'), exempt=('pos_embed', 'cls_token'))
    config = settings('TRAIN.WEIGHT_DECAY', hyper['weight_decay'], 'TRAIN.OPTIMIZER.EPS', hyper['eps'])
    decayed = {
        id(parameter): group['weight_decay'] for group in parameter_groups(model, 0.05) for parameter in group['params']
    }
    assert {name for name, p in model.named_parameters() if decayed[id(p)] == 0} == set(reference.meta['no_decay'])
    optimizer = build_optimizer(config, model)
    ema = ModelEma(model, hyper['ema_decay'])
    steps = sorted({key.split('/')[1] for key in reference if key.startswith('in/grad')})
    for step, group in enumerate(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = paddle.to_tensor(reference[f'in/{group}/{name}'])
        norm = clip_gradients(model.parameters(), hyper['clip_norm'])
        assert_close(norm.item(), np.ravel(reference['out/grad_norm'])[step], 1e-5)
        optimizer.set_lr(float(np.ravel(reference['in/lr'])[step]))
        optimizer.step()
        optimizer.clear_grad()
        ema.update()
    for name, parameter in model.named_parameters():
        assert_close(parameter.numpy(), reference[f'out/param/{name}'], 1e-5)
        assert_close(ema.average[name].numpy(), reference[f'out/ema/{name}'], 1e-5)


def tiny():
    rng = np.random.default_rng(0)
    return {
        'patch_embed.weight': rng.normal(size=(4, 3)).astype('float32'),
        'blocks.0.weight': rng.normal(size=(3, 3)).astype('float32'),
        'blocks.0.bias': rng.normal(size=(3,)).astype('float32'),
        'head.weight': rng.normal(size=(3, 2)).astype('float32'),
    }


def train(name, *opts, steps=3):
    """Three steps on fixed gradients; returns start, gradients and end."""
    start, rng = tiny(), np.random.default_rng(1)
    model = Named(start)
    optimizer = build_optimizer(settings('TRAIN.OPTIMIZER.NAME', name, *opts), model)
    optimizer.set_lr(0.1)
    gradients = []
    for _ in range(steps):
        gradients.append({key: rng.normal(size=value.shape).astype('float32') for key, value in start.items()})
        for key, parameter in model.named_parameters():
            parameter.grad = paddle.to_tensor(gradients[-1][key])
        optimizer.step()
        optimizer.clear_grad()
    return start, gradients, {key: p.numpy() for key, p in model.named_parameters()}


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_is_pytorchs(place, nesterov):
    """v <- m v + g, w <- w - lr (g + m v) with Nesterov, else w - lr v; g includes the L2 term of decayed tensors."""
    start, gradients, end = train('SGD', 'TRAIN.OPTIMIZER.NESTEROV', nesterov, 'TRAIN.WEIGHT_DECAY', 0.01)
    for key, weight in start.items():
        weight, velocity = weight.astype('float64'), 0.0
        for gradient in gradients:
            g = gradient[key] + (0.01 if weight.ndim > 1 else 0.0) * weight
            velocity = 0.9 * velocity + g
            weight = weight - 0.1 * (g + 0.9 * velocity if nesterov else velocity)
        assert_close(end[key], weight, 1e-5)


def test_lamb_is_the_papers():
    """Adam's direction plus decay, scaled to the norm of a decayed weight (arXiv 1904.00962, algorithm 2; timm)."""
    start, gradients, end = train('Lamb', 'TRAIN.WEIGHT_DECAY', 0.01, 'TRAIN.OPTIMIZER.EPS', 1e-6)
    for key, weight in start.items():
        weight, m, v = weight.astype('float64'), 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            m = 0.9 * m + 0.1 * gradient[key]
            v = 0.999 * v + 0.001 * gradient[key] ** 2
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
            if weight.ndim > 1:
                step = step + 0.01 * weight
                step = step * np.linalg.norm(weight) / np.linalg.norm(step)
            weight = weight - 0.1 * step
        assert_close(end[key], weight, 1e-4)


def test_layer_decay_scales_the_step_of_each_layer():
    _, _, plain = train('AdamW', 'TRAIN.WEIGHT_DECAY', 0.0, steps=1)
    start, _, scaled = train('AdamW', 'TRAIN.WEIGHT_DECAY', 0.0, 'TRAIN.LAYER_DECAY', 0.5, steps=1)
    for name, layer in {'patch_embed.weight': 0, 'blocks.0.weight': 1, 'head.weight': 3}.items():
        assert_close(scaled[name] - start[name], (plain[name] - start[name]) * 0.5 ** (3 - layer), 1e-4)


def test_frozen_parameters_are_in_no_group():
    model = Named(tiny())
    model.arrays['head.weight'].stop_gradient = True
    assert sum(len(group['params']) for group in parameter_groups(model, 0.1)) == 3


def test_clipping_leaves_small_gradients_and_reports_the_norm(place):
    parameter = Named({'w': np.zeros((2, 2), 'float32')}).parameters()[0]
    for limit, expected in ((None, 5.0), (0.0, 5.0), (10.0, 5.0), (1.0, 1.0)):
        parameter.grad = paddle.to_tensor([[3.0, 0.0], [0.0, 4.0]])
        assert clip_gradients([parameter], limit).item() == pytest.approx(5.0)
        assert paddle.linalg.norm(parameter.grad).item() == pytest.approx(expected, rel=1e-5)
    parameter.grad = paddle.to_tensor([[math.nan, 0.0], [0.0, 4.0]])
    assert math.isnan(clip_gradients([parameter], 1.0).item())


def on_both(monkeypatch, compute) -> list:
    """The results of both branches."""
    results = []
    for on_gpu in (False, True):
        monkeypatch.setattr(utils.device, 'on_gpu', lambda on_gpu=on_gpu: on_gpu)
        results.append(compute())
    return results


def test_averages_on_a_gpu_are_those_of_a_cpu(monkeypatch):
    """There one operation updates all of them, and the last bits differ. Checkpoints move between both."""
    rng = np.random.default_rng(0)
    shapes = {'patch_embed.weight': (9, 8), 'scale': (), 'head.bias': (5,)}
    steps = [{name: rng.normal(size=shape).astype('float32') for name, shape in shapes.items()} for _ in range(6)]

    def averages():
        model = Named(steps[0])
        ema = ModelEma(model, 0.9)
        for step in steps[1:]:
            for name, parameter in model.named_parameters():
                parameter.set_value(step[name])
            ema.update()
        other = ModelEma(Named(steps[0]), 0.9)
        other.set_state_dict({name: value.numpy() for name, value in ema.state_dict().items()})
        found = [{name: value.numpy() for name, value in average.state_dict().items()} for average in (ema, other)]
        assert list(found[0]) == list(shapes)
        for name, value in found[0].items():
            np.testing.assert_array_equal(found[1][name], value)
        return found[0]

    cpu, gpu = on_both(monkeypatch, averages)
    for name, value in cpu.items():
        np.testing.assert_allclose(gpu[name], value, rtol=2e-6, atol=1e-7)
    assert any(not np.array_equal(cpu[name], gpu[name]) for name in cpu), 'both took the same path'


@pytest.mark.parametrize('limit', [None, 2.0, 100.0])
def test_clipping_on_a_gpu_is_that_of_a_cpu(monkeypatch, limit):
    arrays = {f'w{number}': np.random.default_rng(number).normal(size=(7, number)) for number in (1, 2, 3)}

    def clipped():
        parameters = Named({name: array.astype('float32') for name, array in arrays.items()}).parameters()
        for parameter in parameters:
            parameter.grad = parameter * 1.5
        norm = clip_gradients(parameters, limit).item()
        return np.concatenate([[norm], *(parameter.grad.numpy().ravel() for parameter in parameters)])

    cpu, gpu = on_both(monkeypatch, clipped)
    np.testing.assert_allclose(gpu, cpu, rtol=1e-6)
    gradients = np.concatenate([1.5 * array.ravel() for array in arrays.values()])
    norm = np.linalg.norm(gradients)
    np.testing.assert_allclose(gpu, [norm, *gradients * min(1.0, (limit or math.inf) / norm)], rtol=1e-5)


def test_averages_are_applied_inside_the_block_only(place):
    model = Named({'w': np.ones((2, 2), 'float32')})
    ema = ModelEma(model, 0.5)
    model.parameters()[0].set_value(np.full((2, 2), 3.0, 'float32'))
    ema.update()
    with ema.applied():
        assert (model.parameters()[0].numpy() == 2.0).all()
    assert (model.parameters()[0].numpy() == 3.0).all()


def test_lars_is_mocos(place):
    """Three steps, with a weight of zero and a gradient of zero, as MAE-Lite's code takes them."""
    g = golden('mocov3-lars')
    model = Named(g.group('in/p'))
    model.decays_all = True
    optimizer = build_optimizer(
        settings('TRAIN.OPTIMIZER.NAME', 'LARS', 'TRAIN.WEIGHT_DECAY', g.meta['weight_decay']), model
    )
    optimizer.set_lr(g.meta['lr'])
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = paddle.to_tensor(g[f'in/grad{step}/{name}'])
        optimizer.step()
        optimizer.clear_grad()
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(parameter, g[f'out/p{step + 1}/{name}'], rtol=1e-5, atol=1e-6)


def test_a_model_may_have_all_its_parameters_decayed():
    model = Named(tiny())
    model.decays_all = True
    (group,) = parameter_groups(model, 0.1)
    assert group['weight_decay'] == 0.1 and len(group['params']) == 4


def test_a_model_may_have_all_but_some_parameters_decayed():
    model = Named(tiny(), exempt={'head.weight'})
    model.decays_all = True
    assert {group['weight_decay']: len(group['params']) for group in parameter_groups(model, 0.1)} == {0.1: 3, 0.0: 1}
