# SPDX-License-Identifier: Apache-2.0
"""Encoder, necks and heads against TinyMIM's, mmsegmentation's and Segmenter's."""

import numpy as np
import paddle
import pytest
from paddle import nn

from models.layers import MixerSpec, RemovalSpec
from models.segmentation.base import Encoder
from models.segmentation.decoders import LinearDecoder
from models.segmentation.heads import FCNHead, UPerHead
from models.segmentation.necks import MultiLevelNeck, Pyramid
from models.segmentation.upernet import UPerNet
from tests.conftest import assert_close, golden
from tests.models.helpers import port


def tensor(array, **options):
    return paddle.to_tensor(np.asarray(array, 'float32'), **options)


def gradients_agree(layer: nn.Layer, g, transposed=()):
    parameters = dict(layer.named_parameters())
    for name, expected in g.group('out/grad').items():
        gradient = parameters[name].grad
        assert_close(gradient.T if name in transposed else gradient, expected, 1e-3)


def statistics_agree(layer: nn.Layer, expected):
    names = {'running_mean': '_mean', 'running_var': '_variance'}
    buffers = dict(layer.named_buffers())
    for name, value in expected.items():
        path, _, last = name.rpartition('.')
        assert_close(buffers[f'{path}.{names[last]}'], value)


# ---------------------------------------------------------------------------------------------------- encoder and necks
def encoder_with_pyramid(g, relative: bool, removed=()):
    options = {'mixer': MixerSpec('relative'), 'layer_scale': 1.0} if relative else {}
    encoder = Encoder(
        final_norm=False, img_size=112, embed_dim=32, depth=4, num_heads=4,
        removal=RemovalSpec(removed_layers=removed), **options,
    )  # fmt: skip
    neck = Pyramid(32)
    arrays = g.group('sd')
    port(neck, {name: arrays.pop(name) for name in list(arrays) if name.startswith('fpn')})
    extra = () if relative else ('gamma_', 'relative_position')
    return port(encoder, {n: a for n, a in arrays.items() if not any(part in n for part in extra)}), neck


@pytest.mark.parametrize(
    ('case', 'relative', 'removed'),
    [('rpe', True, ()), ('plain', False, ()), ('removed', False, (0, 2)), ('removed_rpe', True, (0, 2))],
)
def test_encoder_and_pyramid(case, relative, removed):
    g = golden('segmentation-backbone')
    encoder, neck = encoder_with_pyramid(g, relative, removed)
    encoder.eval()
    neck.eval()
    blocks = encoder.forward_intermediates(tensor(g['in/image']), range(4), ('maps',)).blocks
    maps = [blocks[i].maps for i in range(4)]
    expected = g.group(f'out/{case}')
    for i, value in enumerate([*maps, *neck(maps)]):
        name = f'block{i}' if i < 4 else f'f{i - 3}'
        if name in expected:
            every = 4 if case in ('plain', 'removed') and name in ('f1', 'f2') else 1
            assert_close(value[:, ::every], expected[name])
    neck.train()
    if case == 'rpe':
        assert_close(neck.fpn1(maps[0])[:, ::4], g['out/train/f1'])
        batch_norm = neck.fpn1[1]
        assert_close(batch_norm._mean, g['out/train/bn_running_mean'])
        assert_close(batch_norm._variance, g['out/train/bn_running_var'])


def multilevel(g, **options):
    model = UPerNet(
        img_size=64, embed_dim=24, depth=4, num_heads=3, out_indices=range(4), neck='none', num_classes=2, channels=2,
        **options,
    )  # fmt: skip
    arrays = {name.removeprefix('backbone.'): a for name, a in g.group('sd').items() if name.startswith('backbone.')}
    norm = 'last_norm' in options
    port(model.backbone, {name: a for name, a in arrays.items() if norm or not name.startswith('norm.')})
    model.eval()
    return model


@pytest.mark.parametrize('size', ['square', 'resized'])
def test_encoder_and_multi_level_neck(size):
    g = golden('segmentation-multilevel')
    image, expected = tensor(g[f'in/{size}']), g.group(f'out/{size}')
    maps = multilevel(g).backbone_maps(image)
    neck = MultiLevelNeck(24, 16)
    arrays = g.group('sd')
    port(neck, {name.removeprefix('neck.'): a for name, a in arrays.items() if name.startswith('neck.')})
    for i, (value, resized) in enumerate(zip(maps, neck(maps))):
        assert_close(value, expected[f'map{i}'])
        assert_close(resized[:, :: 2 if (size, i) == ('square', 0) else 1], expected[f'neck{i}'])
    *first, last = multilevel(g, last_norm=True).backbone_maps(image)
    assert_close(last, expected['map_last_final_norm'])
    assert_close(first[0], expected['map0'])


# ---------------------------------------------------------------------------------------------------- heads
def test_pyramid_pooling():
    g = golden('segmentation-ppm')
    branches = port(UPerHead(12, 8, 2).psp_modules, g.group('sd'))
    x = tensor(g['in/x'])
    for mode in ('eval', 'train'):
        getattr(branches, mode)()
        for i, branch in enumerate(branches):
            if mode == 'eval':
                assert_close(branch[0](x), g[f'out/pooled/{g.meta["pool_scales"][i]}'], 1e-5)
            resized = nn.functional.interpolate(branch(x), x.shape[2:], mode='bilinear')
            assert_close(resized, g[f'out/{mode}/{i}'])
    statistics_agree(branches, g.group('out/train_stats'))


def test_uper_head():
    g = golden('segmentation-uperhead')
    head = port(UPerHead(12, 8, 6), g.group('sd'))
    maps = [tensor(g[f'in/f{i}'], stop_gradient=False) for i in (1, 2, 3, 4)]
    head.eval()
    assert_close(head.pool(maps[-1]), g['out/eval/psp'])
    assert_close(head.features(maps), g['out/eval/feature'])
    assert_close(head(maps), g['out/eval/logits'])
    head.train()
    logits = head(maps)
    assert_close(logits, g['out/train/logits'])
    statistics_agree(head, g.group('out/train_stats'))
    (logits * tensor(g['in/weight'])).sum().backward()
    gradients_agree(head, g)
    for i, x in enumerate(maps, 1):
        assert_close(x.grad, g[f'out/grad_in/f{i}'], 1e-3)


def test_fcn_head():
    g = golden('segmentation-fcnhead')
    x, head = tensor(g['in/x']), port(FCNHead(12, 6, 5), g.group('sd/aux'))
    for mode in ('eval', 'train'):
        getattr(head, mode)()
        assert_close(head(x), g[f'out/aux/{mode}'])
    linear = LinearDecoder(12, 5)
    arrays = {name.replace('conv_seg', 'head'): a.squeeze() for name, a in g.group('sd/linear').items()}
    port(linear, arrays)
    assert_close(linear(x.flatten(2).transpose([0, 2, 1]), x.shape[2:]), g['out/linear/eval'])


def test_initialization():
    paddle.seed(0)
    head, pyramid, neck = UPerHead(40, 60, 50), Pyramid(40), MultiLevelNeck(40, 40)
    conv = head.bottleneck.conv.weight
    assert conv.std().item() == pytest.approx((2 / (9 * 60)) ** 0.5, rel=0.02)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05) and not head.conv_seg.bias.any()
    for values in (pyramid.fpn1[0].weight, pyramid.fpn2[0].bias):
        assert 0.8 / 160**0.5 < values.abs().max().item() <= 160**-0.5
    bound = (6 / (9 * 40 + 9 * 40)) ** 0.5
    assert 0.9 * bound < neck.convs[0].conv.weight.abs().max().item() <= bound and not neck.convs[0].conv.bias.any()
