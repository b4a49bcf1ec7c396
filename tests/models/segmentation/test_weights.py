# SPDX-License-Identifier: Apache-2.0
"""Weights of segmentation models: published files, and starts from classifiers, MAE and MoCo-v3."""

import re

import numpy as np
import paddle
import pytest

from models.layers import MixerSpec, RemovalSpec, resize_relative_table
from models.segmentation import Segmenter, UPerNet
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict, port_with_report
from models.weights.load import load_state
from tests.conftest import assert_close, golden
from tests.models.helpers import linear_weights
from utils.errors import UserError

RELATIVE = {'mixer': MixerSpec('relative'), 'layer_scale': 1.0}
SIZES = {'img_size': 64, 'embed_dim': 16, 'depth': 3, 'num_heads': 2}


def upernet(**options) -> UPerNet:
    return UPerNet(4, out_indices=(0, 1, 2, 2), channels=8, aux_channels=4, **{**SIZES, **RELATIVE, **options})


def arrays(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def random_file(facts: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n.removeprefix('module.'): rng.normal(size=s).astype('float32') for n, s in facts['file_keys'].items()}


# ---------------------------------------------------------------------------------------------------- starts
@pytest.mark.parametrize('kind', ['deit', 'lambda_training', 'mae', 'moco', 'module'])
def test_files_of_an_encoder(kind):
    facts = golden('segmentation-ckptmap').meta['files'][kind]
    removed = (0, 2) if kind == 'lambda_training' else ()
    model, file, lines = upernet(removal=RemovalSpec(removed_layers=removed)), random_file(facts), []
    wanted = facts.get('wanted') or dict.fromkeys(facts['taken_by_upstream'])
    wanted = {name.removeprefix('module.'): ours or name for name, ours in wanted.items()}
    gone = tuple(f'blocks.{i}.{part}' for i in removed for part in ('norm1', 'attn'))
    wanted = {name: ours for name, ours in wanted.items() if not ours.startswith(gone or '-')}
    wanted.pop('base_encoder.head.0.weight', None)
    before, linear = arrays(model), linear_weights(model.backbone)
    layout = {n: a.T if n.removeprefix('base_encoder.') in linear else a for n, a in file.items()}
    load_state(model, layout, log=lines.append)
    after = arrays(model)
    for name, ours in wanted.items():
        if ours != 'pos_embed':
            np.testing.assert_array_equal(after[f'backbone.{ours}'], layout[name])
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {f'backbone.{ours}' for ours in wanted.values()}
    report = '\n'.join(lines)
    assert f'{len(wanted)} arrays of the state dict are used' in report
    assert 'the file has no neck' in report and 'the file has no decoder' in report and 'no LayerScale' in report
    if kind == 'deit':
        assert 'not used: the model has no such LayerNorm; the head is an image classifier' in report


def test_a_segmenter_takes_the_final_norm_and_prefix_tokens():
    encoder = VisionTransformer(num_classes=5, distilled=True, **SIZES)
    encoder.norm.bias.set_value(paddle.full([16], 3.0))
    model = Segmenter(4, distilled=True, **SIZES)
    load_state(model, arrays(encoder))
    for name in ('norm.bias', 'dist_token', 'pos_embed'):
        np.testing.assert_array_equal(arrays(model)[f'backbone.{name}'], arrays(encoder)[name])
    assert model(paddle.randn([1, 3, 64, 64])).shape == [1, 4, 4, 4]
    plain = Segmenter(4, **SIZES)
    with pytest.raises(UserError, match='set MODEL.TRANS.DISTILLED to True'):
        load_state(plain, arrays(encoder))


def test_weights_of_the_suite_come_back():
    model, other = upernet(), upernet()
    load_state(other, arrays(model), replace_head=False)
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(arrays(other)[name], value)
    five = UPerNet(5, out_indices=(0, 1, 2, 2), channels=8, aux_channels=4, **SIZES, **RELATIVE)
    load_state(five, arrays(model))
    np.testing.assert_array_equal(five.decode_head.bottleneck.conv.weight, model.decode_head.bottleneck.conv.weight)
    with pytest.raises(UserError, match='a classifier of 4 classes, but the model a classifier of 5 classes'):
        load_state(five, arrays(model), replace_head=False)
    without = UPerNet(4, out_indices=(0, 1, 2, 2), channels=8, aux_channels=0, **SIZES, **RELATIVE)
    load_state(without, arrays(model), replace_head=False)


@pytest.mark.parametrize(
    ('file', 'message'),
    [
        ({'layers.0.weight': np.zeros(3, 'float32')}, 'without a place in the model'),
        (
            {'head.weight': np.zeros([16, 3], 'float32'), 'head.bias': np.zeros(3, 'float32')},
            'without weights in the file',
        ),
        ({}, 'without weights in the file'),
    ],
)
def test_a_file_of_which_nothing_fits_is_an_error(file, message):
    model = upernet()
    before = arrays(model)
    with pytest.raises(UserError, match=message):
        load_state(model, file)
    assert all(np.array_equal(value, before[name]) for name, value in arrays(model).items())


# ---------------------------------------------------------------------------------------------------- other resolutions
def test_position_tables():
    g = golden('segmentation-posembed')
    assert_close(resize_relative_table(g['in/table'], (11, 11), spline=True), g['out/table'], 2e-4)
    model = UPerNet(2, img_size=11 * 16, embed_dim=8, num_heads=2, channels=4, aux_channels=0, **RELATIVE)
    resize = model.weight_rules.resize
    assert_close(resize(model, 'backbone.pos_embed', g['in/pos_embed']), g['out/pos_embed'])
    table = 'backbone.blocks.0.attn.relative_position_bias_table'
    assert_close(resize(model, table, g['in/table']), g['out/table'], 2e-4)
    encoder = VisionTransformer(img_size=224, embed_dim=4, num_heads=1, depth=1, num_classes=0)
    encoder.pos_embed.set_value(g['in/pos_embed_14'])
    for size in ((32, 32), (32, 43), (20, 9)):
        x = paddle.zeros([1, 3, 16 * size[0], 16 * size[1]])
        encoder.patch_embed.conv.bias.set_value(paddle.zeros([4]))
        encoder.cls_token.set_value(paddle.zeros([1, 1, 4]))
        assert_close(encoder.embed(x), g[f'out/pos_embed_{size[0]}x{size[1]}'])


# ---------------------------------------------------------------------------------------------------- published files
TO_MMSEGMENTATION = (
    (r'^(encoder)\.', 'backbone.'),
    (r'^decoder\.', 'decode_head.'),
    (r'^backbone\.fpn1', 'neck.upsample_4x'),
    (r'^backbone\.fpn2', 'neck.upsample_2x'),
    (r'\.blocks\.', '.layers.'),
    (r'\.norm([12])\.', r'.ln\1.'),
    (r'^backbone\.norm\.', 'backbone.ln1.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'proj_dec\.', 'dec_proj.'),
    (r'proj_patch$', 'patch_proj.weight'),
    (r'proj_classes$', 'classes_proj.weight'),
)


def in_mmsegmentation(arrays: dict, plain_attention: bool) -> dict:
    """The names of its releases from 0.17 on; MAE's encoder keeps those of the attention there."""
    pairs = TO_MMSEGMENTATION
    if plain_attention:
        pairs += ((r'\.attn\.qkv\.', '.attn.attn.in_proj_'), (r'\.attn\.proj\.', '.attn.attn.out_proj.'))
    result = {}
    for name, array in arrays.items():
        array = array.T if name.endswith(('proj_patch', 'proj_classes')) else array
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        result[name] = array
    return result


def same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


def test_mae_of_mmsegmentation():
    g = golden('segmentation-model')
    sizes = g.meta['model']
    model = UPerNet(
        sizes['ncls'], out_indices=range(4), channels=sizes['ch'], aux_channels=sizes['auxch'], img_size=64,
        embed_dim=sizes['E'], depth=4, num_heads=sizes['heads'], **RELATIVE,
    )  # fmt: skip
    published = in_mmsegmentation(g.group('sd'), plain_attention=False)
    assert 'neck.upsample_4x.0.weight' in published and 'backbone.layers.3.ffn.layers.0.0.weight' in published
    state, report = port_with_report(model, {**published, 'decode_head.bottleneck.bn.num_batches_tracked': np.array(1)})
    assert list(report.dropped) == ['decode_head.bottleneck.bn.num_batches_tracked']
    same(state, port_state_dict(model, g.group('sd')))


@pytest.mark.parametrize('decoder', ['mask', 'linear'])
def test_segmenter_of_mmsegmentation(decoder):
    g = golden('segmentation-segmenter')
    options = {'img_size': 64, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
    model = Segmenter(6, decoder, **options)
    original = {n: a for n, a in g.group('sd').items() if n.startswith('encoder.')}
    parts = {n: a for n, a in g.group('sd').items() if n.startswith(f'{decoder}.')}
    original.update({f'decoder.{n.partition(".")[2]}': a for n, a in parts.items()})
    state = port_state_dict(model, {**original, 'encoder.head.weight': np.zeros([10, 32], 'float32')})
    published = in_mmsegmentation(original, plain_attention=True)
    if decoder == 'linear':
        published['decode_head.conv_seg.weight'] = published.pop('decode_head.head.weight')[:, :, None, None]
        published['decode_head.conv_seg.bias'] = published.pop('decode_head.head.bias')
    else:
        assert {'decode_head.patch_proj.weight', 'decode_head.layers.1.attn.attn.in_proj_bias'} <= set(published)
    same(port_state_dict(model, published), state)
