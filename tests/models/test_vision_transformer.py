# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer against timm's, DeiT's and MAE-Lite's numbers."""

import numpy as np
import paddle
import pytest

from models import create_model
from models.layers import resize_position_table
from models.vision_transformer import VisionTransformer
from tests.conftest import assert_close, golden
from tests.models.helpers import check_recompute, load, vision_transformer
from utils.errors import UserError


def build(ctor: dict, **changes) -> VisionTransformer:
    ctor = {name: value for name, value in ctor.items() if name not in ('ln_eps', 'norm_eps')}
    return vision_transformer(**{**ctor, **changes})


def tiny(**changes) -> VisionTransformer:
    sizes = {'img_size': 32, 'patch_size': 8, 'num_classes': 5, 'embed_dim': 24, 'depth': 3, 'num_heads': 3}
    return vision_transformer(**{**sizes, **changes})


def test_deit():
    g = golden('evit-deit')
    model = load(build(g.meta['ctor']), g.group('sd'))
    model.eval()
    outputs = []
    hooks = [block.register_forward_post_hook(lambda _, __, out: outputs.append(out[0])) for block in model.blocks]
    x = paddle.to_tensor(g['in/x'])
    assert_close(model.patch_embed(x), g['out/patch_embed'])
    assert_close(model(x), g['out/logits'])
    for i, output in enumerate(outputs):
        assert_close(output, g[f'out/block{i}'])
    for hook in hooks:
        hook.remove()
    assert_close(model.forward_head(model.forward_features(x), pre_logits=True), g['out/features'])


@pytest.mark.parametrize('size', [96, 48])
def test_other_image_sizes_interpolate_the_positions(size):
    g = golden('evit-deit')
    model = load(build(g.meta['ctor']), g.group('sd'))
    model.eval()
    table = resize_position_table(model.pos_embed, (4, 4), (size // 16, size // 16), 1)
    assert_close(table, g[f'out/pos_embed{size}'])
    logits = model(paddle.to_tensor(g[f'in/x{size}']))
    assert_close(logits, g[f'out/logits{size}'])
    table.sum().backward()
    assert model.pos_embed.grad.abs().min().item() > 0

    larger = build(g.meta['ctor'], img_size=size)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state['pos_embed'] = larger.weight_rules.resize(larger, 'pos_embed', state['pos_embed'])
    larger.set_state_dict(state)
    larger.eval()
    assert_close(larger(paddle.to_tensor(g[f'in/x{size}'])), logits, 1e-6)


def test_position_tables():
    g = golden('evit-posembed')
    for i, case in enumerate(g.meta['cases']):
        old, table = (case['old'],) * 2, paddle.to_tensor(g[f'in/pos{i}'])
        assert_close(resize_position_table(table, old, tuple(case['new']), case['prefix']), g[f'out/pos{i}'])


def test_only_position_tables_are_resized():
    model = tiny()
    other = np.ones([1, 5, 24], 'float32')
    assert model.weight_rules.resize(model, 'cls_token', other) is other
    assert model.weight_rules.resize(model, 'pos_embed', other).shape == (1, 17, 24)
    not_square = np.ones([1, 7, 24], 'float32')
    assert model.weight_rules.resize(model, 'pos_embed', not_square) is not_square


def test_wide_images():
    assert tiny()(paddle.randn([1, 3, 16, 64])).shape == [1, 5]
    with pytest.raises(UserError, match='32x36 pixels does not divide into patches of 8'):
        tiny()(paddle.randn([1, 3, 32, 36]))


def test_distillation_token():
    g = golden('evit-deit-distilled')
    model = load(build(g.meta['ctor']), g.group('sd'))
    x = paddle.to_tensor(g['in/x'])
    model.train()
    logits, logits_dist = model(x)
    assert_close(logits, g['out/logits_cls'])
    assert_close(logits_dist, g['out/logits_dist'])
    model.eval()
    assert_close(model(x), g['out/logits_eval'])
    features, features_dist = model.forward_head(model.forward_features(x), pre_logits=True)
    assert_close(features, g['out/feat_cls'])
    assert_close(features_dist, g['out/feat_dist'])


@pytest.mark.parametrize('name', ['vit_cls', 'vit_gap', 'vit_gap_eps', 'vit_gap_dist'])
def test_mae_lite_heads(name):
    g = golden(f'mae_lite-{name}')
    model = load(build(g.meta['ctor']), g.group('sd'))
    x = paddle.to_tensor(g['in/x'])
    model.eval()
    assert_close(model(x), g['out/logits'])
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    if model.distilled:
        features, features_dist = features
        assert_close(features_dist, g['out/features_dist'])
        model.train()
        logits, logits_dist = model(x)
        assert_close(logits, g['out/train_logits'])
        assert_close(logits_dist, g['out/train_logits_dist'])
    assert_close(features, g['out/features'])


def test_representation_layer():
    model = tiny(representation_size=7)
    x = paddle.randn([2, 3, 32, 32])
    assert {'pre_logits.fc.weight', 'pre_logits.fc.bias'} <= set(model.state_dict())
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == [2, 7]
    assert features.abs().max().item() < 1
    assert model(x).shape == [2, 5]
    model.reset_classifier(3)
    assert model(x).shape == [2, 3]


def test_initialization():
    paddle.seed(0)
    model = vision_transformer(embed_dim=192, depth=2, num_heads=3)
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        if name.startswith('patch_embed'):
            bound = (3 * 16 * 16) ** -0.5
            assert np.abs(values).max() <= bound, name
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.1), name
        elif values.ndim > 1:
            assert values.std() == pytest.approx(0.02, rel=0.15), name
            assert np.abs(values).max() < 0.2, name
        else:
            assert (values == (1 if 'norm' in name and name.endswith('weight') else 0)).all(), name


def test_stochastic_depth_grows_over_the_depth():
    assert [block.drop_path.rate for block in tiny(drop_path_rate=0.2).blocks] == [0.0, 0.1, 0.2]
    assert [b.drop_path.rate for b in tiny(drop_path_rate=0.2, drop_path_ramp=False).blocks] == [0.2, 0.2, 0.2]


def test_recompute_changes_nothing():
    x = paddle.randn([2, 3, 32, 32])
    model = tiny(keep_rate=0.7, fuse_token=True, drop_path_rate=0.4, drop_rate=0.1, attn_drop_rate=0.1)
    check_recompute(model, x)


def test_parameter_groups():
    model = tiny(distilled=True)
    ids = {name: model.layer_id(name) for name in model.state_dict()}
    assert {ids[name] for name in ('cls_token', 'dist_token', 'pos_embed', 'patch_embed.proj.bias')} == {0}
    assert ids['blocks.0.attn.qkv.weight'] == 1
    assert {ids[name] for name in ('norm.weight', 'head.bias', 'head_dist.weight')} == {model.num_layers} == {4}
    assert model.no_weight_decay() <= set(model.state_dict())
    heads = {name for name in model.state_dict() if name.startswith(model.weight_rules.head)}
    assert heads == {'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'}


def test_errors():
    with pytest.raises(UserError, match='25 channels'):
        tiny(embed_dim=25)
    with pytest.raises(UserError, match='blocks 0 to 2'):
        create_model('evit_small_patch16_224_k07_fuse', opts=['MODEL.TRANS.DEPTH', 3])
    assert create_model('deit_tiny_patch16_224', opts=['MODEL.TRANS.DEPTH', 3]).depth == 3  # nothing is dropped there
