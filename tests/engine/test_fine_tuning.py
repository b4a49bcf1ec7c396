# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning against MAE-Lite: groups, rates, losses and whole steps."""

import numpy as np
import paddle
import pytest

from config import get_config
from engine.ema import ModelEma
from engine.learning_rate import lr_schedule
from engine.optim import build_optimizer, clip_gradients, parameter_groups
from engine.run import start_from_weights
from models import build_model
from models.mae import MaskedAutoencoder
from models.registry import config_file
from models.vision_transformer import VisionTransformer
from tasks.classification import smoothed_cross_entropy
from tasks.distillation import distillation_loss
from tests.conftest import assert_close, golden
from tests.models.helpers import linear_weights, load, small_config
from tests.models.test_relative_position import build as build_rpe
from tests.tasks.test_mae import without_keys
from utils.formats import write_pdparams
from utils.weights import METADATA

RECIPES = {
    'ft': 'vit_tiny_patch16_224_mae_finetune',
    'rpe': 'vit_tiny_patch16_224_mae_finetune_rpe',
    'ftdist': 'vit_tiny_patch16_224_mae_finetune',
    'transfer': 'vit_tiny_patch16_224_mae_transfer_cifar100',
    'mae': 'mae_tiny_patch16_224',
}


def build(ctor: dict, recipe: str):
    if recipe == 'rpe':
        return build_rpe({**ctor, 'use_mean_pooling': True})
    sizes = {'drop_path_rate': 0.0, **{name: value for name, value in ctor.items() if name != 'norm_eps'}}
    return (MaskedAutoencoder if recipe == 'mae' else VisionTransformer)(**sizes)


@pytest.mark.parametrize('fresh', [True, False])
def test_a_classifier_of_as_many_classes(tmp_path, fresh):
    """Transfer initializes it newly and takes all else; other recipes keep it."""
    path = str(tmp_path / 'weights.pdparams')
    config = small_config('vit_tiny_patch16_224_mae_transfer_aircraft', 'MODEL.PRETRAINED', path)
    assert config.MODEL.FRESH_HEAD
    config.defrost()
    config.MODEL.FRESH_HEAD = fresh
    given, model = build_model(config), build_model(config)
    write_pdparams({**given.state_dict(), METADATA: given.weight_rules.metadata(given)}, path)
    start_from_weights(config, model, print)
    for name, value in model.state_dict().items():
        assert np.array_equal(value, given.state_dict()[name]) == (not (fresh and name == 'head.weight')), name


@pytest.mark.parametrize('index', range(8))
def test_parameter_groups(index):
    g = golden('mae_lite-param_groups')
    case = g.meta['cases'][index]
    model, train = build(case['ctor'], case['recipe']), get_config(config_file(RECIPES[case['recipe']])).TRAIN
    layer_decay = case['overrides'].get('layer_decay', train.LAYER_DECAY)
    assert layer_decay == (case['layer_decay'] or 1.0)
    found = {}
    for group in parameter_groups(model, train.WEIGHT_DECAY, layer_decay):
        found.update({id(p): (group['learning_rate'], group['weight_decay']) for p in group['params']})
    parameters = dict(model.named_parameters())
    names = [name.removeprefix('model.') for name in case['names']]
    scales, decays = zip(*(found.pop(id(parameters[name])) for name in names))
    assert not found
    assert_close(scales, g[f'out/lr_scale{index}'], 1e-6)
    assert_close(decays, g[f'out/weight_decay{index}'], 1e-6)
    frozen = {name.removeprefix('model.') for name in case['not_optimised']}
    assert frozen == {name for name, parameter in parameters.items() if parameter.stop_gradient}
    scale = case['batch_size'] / train.LINEAR_SCALED_LR if train.LINEAR_SCALED_LR else 1.0
    assert case['overrides'].get('lr', train.BASE_LR * scale) == pytest.approx(
        g[f'out/base_lr{index}'].item(), rel=1e-6
    )


@pytest.mark.parametrize('index', [0, 1, 2, 3, 5])
def test_rates(index):
    """Row t of a table is the rate of iteration t; here an iteration is an epoch."""
    g = golden('mae_lite-lr_sched')
    case, table = g.meta['cases'][index], g[f'out/lr{index}']
    options = case['kw']
    config = get_config(opts=[
        *('TRAIN.LR_SCHEDULER.UPDATE', 'step', 'TRAIN.LINEAR_SCALED_LR', None, 'TRAIN.BASE_LR', case['lr']),
        *('TRAIN.NUM_EPOCHS', options['total_steps'], 'TRAIN.WARMUP_EPOCHS', options.get('warmup_steps', 0)),
        *('TRAIN.WARMUP_START_LR', options.get('warmup_lr_start', 0.0), 'TRAIN.END_LR', options.get('end_lr', 0.0)),
    ])  # fmt: skip
    lr = lr_schedule(config, 1)
    rates = np.array([lr(t + 1, 0.0) for t in range(len(table))])
    for column, scale in enumerate(
        case.get('lr_scales', [1.0])
    ):  # an optimizer's group multiplies the rate by its scale
        assert_close(rates * scale, table[:, column], 1e-6)


@pytest.mark.parametrize('index', range(6))
def test_distillation_losses(index):
    g = golden('mae_lite-ft_distill_loss')
    case, inputs = g.meta['cases'][index], {key: paddle.to_tensor(value) for key, value in g.group('in').items()}
    base = smoothed_cross_entropy(inputs['logits'], inputs['target'], g.meta['smoothing'])
    teaching = distillation_loss(inputs['logits_kd'], inputs['teacher_logits'], case['type'], case['tau'])
    loss = (1 - case['alpha']) * base + case['alpha'] * teaching
    assert loss.item() == pytest.approx(g[f'out/loss{index}'].item(), rel=1e-5)


@pytest.mark.parametrize('name', ['finetune', 'transfer'])
def test_steps(name):
    g = golden(f'mae_lite-{name}_steps')
    meta = g.meta
    model = load(build(meta['ctor'], 'ft'), g.group('sd'))
    config = get_config(config_file(RECIPES['ft' if name == 'finetune' else 'transfer']), [
        *('TRAIN.NUM_EPOCHS', meta['epochs'], 'TRAIN.WARMUP_EPOCHS', meta['warmup_epochs']),
        *('TRAIN.BASE_LR', meta['base_lr'], 'TRAIN.LINEAR_SCALED_LR', None, 'TRAIN.SMOOTHING', meta['smoothing']),
    ])  # fmt: skip
    train = config.TRAIN
    assert (meta['layer_decay'], meta['weight_decay']) == (train.LAYER_DECAY, train.WEIGHT_DECAY)
    assert (meta['clip_grad'], meta['min_lr']) == (train.GRAD_CLIP, train.END_LR)
    optimizer, lr, ema = build_optimizer(config, model), lr_schedule(config, 1), ModelEma(model, meta['ema_decay'])
    for step, (x, target) in enumerate(zip(g['in/x'], g['in/target'])):
        epoch, index = divmod(step, meta['iters_per_epoch'])
        rate = lr(epoch + 1, index / meta['iters_per_epoch'])
        assert rate == pytest.approx(g['out/lr_max_min'][step, 0], rel=1e-6)
        loss = smoothed_cross_entropy(model(paddle.to_tensor(x)), paddle.to_tensor(target), train.SMOOTHING)
        assert loss.item() == pytest.approx(g['out/loss'][step], rel=2e-5)
        loss.backward()
        norm = clip_gradients(model.parameters(), train.GRAD_CLIP)
        assert norm.item() == pytest.approx(g['out/grad_norm'][step], rel=1e-4)
        if step:  # the original averages before it updates, so its average lags one step
            ema.update()
        optimizer.set_lr(rate)
        optimizer.step()
        optimizer.clear_grad()
    linear = linear_weights(model)
    kinds = {'final': model.state_dict(), 'ema': ema.average} if meta['model_ema'] else {'final': model.state_dict()}
    for kind, state in kinds.items():
        for key, value in state.items():
            expected = g[f'out/{kind}/{key}']
            expected = without_keys(key, expected.T if key in linear else expected)
            np.testing.assert_allclose(without_keys(key, value.numpy()), expected, atol=2e-5)
