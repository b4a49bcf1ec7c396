# SPDX-License-Identifier: Apache-2.0
"""gMLP against timm's numbers."""

import json
import math
import os
import zlib

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from models import create_model
from models.gmlp import GMLP, GatedMlp, SpatialGatingUnit
from models.layers import Linear
from models.profile import profile
from tests.conftest import HERE, assert_close, golden
from tests.models.helpers import check_recompute, load, to_ours
from utils.errors import UserError


def build(ctor: dict) -> GMLP:
    ctor = dict(ctor)
    return GMLP(depth=ctor.pop('num_blocks'), **{'drop_path_rate': 0.0, **ctor})


def tiny(**changes) -> GMLP:
    sizes = {'img_size': 32, 'patch_size': 8, 'num_classes': 5, 'embed_dim': 16, 'depth': 3, 'mlp_ratio': 4.0}
    return GMLP(**{'drop_path_rate': 0.0, **sizes, **changes})


@pytest.mark.parametrize('name', ['fwd_a', 'fwd_b', 'fwd_eps'])
def test_forward(name):
    g = golden(f'gmlp-{name}')
    model = load(build(g.meta['ctor']), g.group('sd'))
    model.eval()
    x = model.patch_embed(paddle.to_tensor(g['in/x']))
    assert_close(x, g['out/stem'])
    for i, block in enumerate(model.mixer_layers):
        x = block(x)
        assert_close(x, g[f'out/block{i}'])
    x = model.norm(x)
    assert_close(x, g['out/norm'])
    assert_close(model.forward_head(x, pre_logits=True), g['out/pooled'])
    assert_close(model(paddle.to_tensor(g['in/x'])), g['out/logits'])


def test_intermediates():
    g = golden('gmlp-fwd_a')
    model = load(build(g.meta['ctor']), g.group('sd'))
    x = paddle.to_tensor(g['in/x'])
    seen = model.forward_intermediates(x, [0, 2], ['tokens', 'maps'])
    assert list(seen.blocks) == [0, 2]
    for i, block in seen.blocks.items():
        assert_close(block.tokens, g[f'out/block{i}'])
        assert block.maps.shape == [2, 32, 4, 4]
        np.testing.assert_array_equal(block.maps.flatten(2).transpose([0, 2, 1]), block.tokens)
    assert_close(seen.features, g['out/norm'])


def test_spatial_gating_unit_and_its_gradients():
    g = golden('gmlp-sgu')
    unit = load(SpatialGatingUnit(24, 9), g.group('sd'))
    x = paddle.to_tensor(g['in/x'], stop_gradient=False)
    y = unit(x)
    assert_close(y, g['out/y'], 1e-5)
    y.backward(paddle.to_tensor(g['in/grad_y']))
    grads = to_ours(unit, g.group('grad'))
    assert_close(x.grad, grads.pop('x'))
    for name, parameter in unit.named_parameters():
        assert_close(parameter.grad, grads[name])


def test_gate_norm_epsilon():
    g = golden('gmlp-gate_eps')
    unit = load(SpatialGatingUnit(32, 16), g.group('sd'))
    y = unit(paddle.to_tensor(g['in/x']))
    assert_close(y, g['out/y_eps1e-5'])
    with pytest.raises(AssertionError):
        assert_close(y, g['out/y_eps1e-6'])


def test_two_training_steps():
    g = golden('gmlp-grads')
    model = load(build(g.meta['ctor']), g.group('sd'))
    model.train()
    decayed = {p.name for p in model.parameters() if p.ndim > 1}
    optimizer = paddle.optimizer.AdamW(
        0.01,
        0.9,
        0.999,
        1e-3,
        parameters=model.parameters(),
        weight_decay=0.1,
        apply_decay_param_fun=decayed.__contains__,
    )
    for step in range(2):
        target = F.one_hot(paddle.to_tensor(g['in/labels'][step]), 6)
        target = 0.7 * target + 0.3 * target.flip(0)
        target = 0.9 * target + 0.1 / 6
        loss = F.cross_entropy(model(paddle.to_tensor(g['in/x'][step])), target, soft_label=True)
        assert_close(loss, g['out/losses'][step], 1e-5)
        loss.backward()
        if step == 0:
            for name, expected in to_ours(model, g.group('grad')).items():
                np.testing.assert_allclose(
                    dict(model.named_parameters())[name].grad, expected, 1e-3, 1e-5, err_msg=name
                )
        optimizer.step()
        optimizer.clear_grad()
    for name, expected in to_ours(model, g.group('step2')).items():
        np.testing.assert_allclose(model.state_dict()[name], expected, 1e-4, 1e-5, err_msg=name)


def test_initialization():
    paddle.seed(0)
    model = create_model('gmlp_ti16_224')
    groups = {}
    for name, parameter in model.named_parameters():
        group = '.'.join('*' if part.isdigit() else part for part in name.split('.'))
        groups.setdefault(group, []).append(parameter.numpy().ravel())
    for name, (mean, std, low, high) in golden('gmlp-init').group('out').items():
        values = np.concatenate(groups.pop(GMLP.weight_rules.rename(name)))
        np.testing.assert_allclose([values.min(), values.max()], [low, high], rtol=0.2, atol=1e-6, err_msg=name)
        if values.size > 10000:
            assert values.std() == pytest.approx(std, rel=0.03), name
            assert values.mean() == pytest.approx(mean, abs=float(0.02 * std + 1e-9)), name
        elif std == 0:
            assert (values == mean).all(), name
        else:
            assert values.std() == pytest.approx(std, rel=0.2), name
    assert not groups


def test_logits_start_equal():
    x = paddle.randn([2, 3, 32, 32])
    assert (tiny()(x).numpy() == 0).all()
    assert tiny(head_bias=-math.log(5))(x).numpy() == pytest.approx(-math.log(5))


def test_full_size():
    g = golden('gmlp-ti16_full')

    def upstream(name, shape):
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) > 1:
            return (r / np.sqrt(np.prod(shape[1:]))).astype('float32')
        return ((1 if name.endswith(('norm.weight', 'gate.proj.bias')) else 0) + 0.1 * r).astype('float32')

    model = create_model('gmlp_ti16_224')
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    names = _upstream_names('gmlp_s16_224')
    shapes = {up: shape[::-1] if len(shape) == 2 else shape for up, name in names.items() for shape in [ours[name]]}
    load(model, {up: upstream(up, shape) for up, shape in shapes.items()})
    model.eval()
    x = np.random.RandomState(71).standard_normal((1, 3, 224, 224)).astype('float32')
    with paddle.no_grad():
        features = model.forward_features(paddle.to_tensor(x))
        assert_close(features[:, 0], g['out/features_token0'])
        assert_close(features.mean(1), g['out/features_mean'])
        assert_close(model.forward_head(features), g['out/logits'], 1e-3)


def _listing() -> dict:
    with open(os.path.join(HERE, 'goldens', 'gmlp-s16_224-keys.json'), encoding='utf-8') as file:
        return json.load(file)


def _upstream_names(model: str) -> dict:
    listing = _listing()
    assert listing['model'] == model
    return {entry['timm']: entry['paddle'] for entry in listing['entries']}


def test_names_and_shapes():
    listing = _listing()
    model = create_model('gmlp_s16_224')
    assert {e['paddle']: e['paddle_shape'] for e in listing['entries']} == {
        name: list(value.shape) for name, value in model.state_dict().items()
    }
    assert all(GMLP.weight_rules.rename(e['timm']) == e['paddle'] for e in listing['entries'])


@pytest.mark.parametrize(
    'name, params, macs, without_head',
    [
        ('gmlp_ti16_224', 5_867_328, 1_328_989_184, 5_738_328),
        ('gmlp_s16_224', 19_422_656, 4_392_060_928, 19_165_656),
        ('gmlp_b16_224', 73_075_392, 15_720_452_096, 72_562_392),
    ],
)
def test_size(name, params, macs, without_head, zero_weights):
    model = create_model(name)
    cost = profile(model)
    assert (cost.params, cost.macs) == (params, macs)
    model.reset_classifier(0)
    assert sum(p.size for p in model.parameters()) == without_head


def test_hidden_channels_are_truncated_and_even():
    assert tiny(embed_dim=20, mlp_ratio=2.5).mixer_layers[0].mlp_channels.fc1.weight.shape == [20, 50]
    with pytest.raises(UserError, match='45 is odd'):
        tiny(embed_dim=18, mlp_ratio=2.54)
    with pytest.raises(UserError, match='MLP_RATIO 0.01 leaves no hidden channels of 18'):
        tiny(embed_dim=18, mlp_ratio=0.01)


def test_other_image_sizes_are_refused():
    with pytest.raises(UserError, match='32x32 pixels, not 32x40'):
        tiny()(paddle.randn([1, 3, 32, 40]))
    with pytest.raises(UserError, match='does not divide'):
        tiny(img_size=36)


def test_recompute_changes_nothing():
    x = paddle.randn([2, 3, 32, 32])
    model = tiny(drop_path_rate=0.5, proj_drop_rate=0.1, head_bias=1.0)
    model.head.weight.set_value(paddle.randn(model.head.weight.shape))
    check_recompute(model, x)


def test_drop_path_rate_is_the_same_in_all_blocks_unless_ramped():
    rates = lambda model: [block.drop_path.rate for block in model.mixer_layers]  # noqa: E731
    assert rates(tiny(drop_path_rate=0.2)) == [0.2, 0.2, 0.2]
    assert rates(tiny(drop_path_rate=0.2, drop_path_ramp=True)) == [0.0, 0.1, 0.2]


def test_layer_ids():
    model = tiny()
    ids = {name: model.layer_id(name) for name in model.state_dict()}
    assert ids['patch_embed.patch_embed.weight'] == 0
    assert ids['mixer_layers.2.mlp_channels.fc1.weight'] == 3
    assert ids['norm.weight'] == ids['head.bias'] == model.num_layers == 4


@pytest.mark.parametrize('change', ['activation', 'class', 'hook', 'dropout'])
def test_programs_keep_layers_that_a_user_replaced(change):
    """The shortcut of exported programs reads the weights of the first layer alone."""

    class Adapted(Linear):
        def forward(self, x):
            return super().forward(x) + 1

    mlp = GatedMlp(8, 16, 4, drop_rate=1.0 if change == 'dropout' else 0.0)
    mlp.gate.proj.weight.set_value(paddle.randn([4, 4]))
    x = paddle.randn([2, 4, 8])
    if change == 'activation':
        mlp.act = nn.ReLU()
    elif change == 'class':
        mlp.fc1 = Adapted(8, 16)
    elif change == 'hook':
        mlp.fc1.register_forward_post_hook(lambda layer, inputs, output: output * 2)
    else:
        mlp.train()
    expected = mlp(x)
    program = paddle.jit.to_static(mlp, full_graph=True)
    assert_close(program(x), expected, 1e-5)
