# SPDX-License-Identifier: Apache-2.0
"""Whole segmentation models against TinyMIM's with mmsegmentation, and against Segmenter."""

import re

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from config import get_config
from engine.optim import parameter_groups
from models import build_model, create_model, list_models
from models.layers import MixerSpec
from models.registry import config_file
from models.segmentation import Segmenter, UPerNet, inference
from models.segmentation.losses import segmentation_loss
from tests.conftest import assert_close, golden
from tests.models.helpers import check_recompute, images, port
from utils.errors import UserError

STATISTICS = {'running_mean': '_mean', 'running_var': '_variance'}


def ours(name: str) -> str:
    """Our name of one of TinyMIM's parameters and buffers."""
    path, _, last = UPerNet.weight_rules.rename(name).rpartition('.')
    return f'{path}.{STATISTICS.get(last, last)}'


def in_our_layout(model, arrays: dict) -> dict:
    """Arrays by our names, linear weights transposed."""
    linear = {f'{path}.weight' for path, layer in model.named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    return {ours(name): array.T if ours(name) in linear else array for name, array in arrays.items()}


def tiny_mim(g, **options) -> UPerNet:
    sizes = g.meta['model']
    model = UPerNet(
        num_classes=sizes['ncls'], img_size=sizes['img'][0], embed_dim=sizes['E'], depth=sizes['depth'],
        num_heads=sizes['heads'], channels=sizes['ch'], aux_channels=sizes['auxch'], out_indices=range(4),
        mixer=MixerSpec('relative'), layer_scale=1.0, drop_path_rate=0.0, **options,
    )  # fmt: skip
    return port(model, g.group('sd'))


# ---------------------------------------------------------------------------------------------------- UPerNet
def test_upernet():
    g = golden('segmentation-model')
    model, image = tiny_mim(g), paddle.to_tensor(g['in/image'])
    labels = paddle.to_tensor(g['in/labels'])
    assert (model.stride, model.fixed_size, model.image_size, model.patch_size) == (4, True, (64, 64), 16)
    model.eval()
    maps = model.forward_features(image)
    logits = model(image)
    assert_close(logits, g['out/eval/logits_stride4'])
    assert_close(model.auxiliary_head(maps[2]), g['out/eval/aux_logits_stride16'])
    resized = inference.whole_inference(model, image)
    assert_close(resized[:1], g['out/eval/logits'])
    assert (resized.argmax(1).numpy() == g['out/eval/prediction']).mean() > 0.9999
    model.train()
    loss = segmentation_loss(*model(image), labels)
    assert_close(loss.decode, g['out/train/decode.loss_seg'])
    assert_close(0.4 * loss.auxiliary, g['out/train/aux.loss_seg'])
    assert_close(loss.total, g['out/train/loss'])
    buffers = dict(model.named_buffers())
    for name, expected in g.group('out/train_stats').items():
        assert_close(buffers[ours(name)], expected)
    loss.total.backward()
    parameters = dict(model.named_parameters())
    noise = ('neck.fpn1.0.bias', 'neck.fpn1.3.bias', 'neck.fpn2.0.bias', 'attn.qkv.bias')
    for name, expected in in_our_layout(model, g.group('out/grad')).items():
        if not name.endswith(noise):
            assert_close(parameters[name].grad, expected, 1e-3)


def test_training_steps():
    g = golden('segmentation-train')
    model = tiny_mim(g)
    groups = parameter_groups(model, g.meta['weight_decay'], g.meta['layer_decay'])
    optimizer = paddle.optimizer.AdamW(0.0, *g.meta['betas'], g.meta['eps'], parameters=groups)
    model.train()
    for step, expected in enumerate(g['out/losses']):
        image = paddle.to_tensor(g[f'in/image{step}'].astype('float32'))
        loss = segmentation_loss(*model(image), paddle.to_tensor(g[f'in/labels{step}']))
        assert_close([loss.decode.item(), 0.4 * loss.auxiliary.item(), loss.total.item()], expected, 2e-4)
        loss.total.backward()
        optimizer.set_lr(float(g['out/lr'][step].max()))
        optimizer.step()
        optimizer.clear_grad()
    state = model.state_dict()
    noise = {ours(name) for name in g.meta['noise']['tensors']}
    for name, expected in in_our_layout(model, g.group('out/final')).items():
        value = state[name].numpy()
        if name.endswith('qkv.bias'):  # the biases of keys have no gradient but noise
            value, expected = (np.delete(x.reshape(3, -1), 1, axis=0) for x in (value, expected))
        if name.endswith(tuple(STATISTICS.values())) and name not in noise:
            assert_close(value, expected, 1e-3)
        elif name not in noise:
            assert np.abs(value - expected).max() <= 3e-4, name


def test_names_shapes_and_parameter_groups(zero_weights):
    reference = golden('segmentation-schedule').meta['models']['base']
    assert len(reference['parameters']) == 235 and len(reference['buffers']) == 28
    options = [
        'MODEL.NUM_CLASSES',
        150,
        'DATA.IMAGE_SIZE',
        512,
        'MODEL.TRANS.REL_POS',
        ['block'],
        'MODEL.TRANS.LAYER_SCALE',
        1.0,
    ]
    model = build_model(get_config(opts=['MODEL.TYPE', 'upernet', *options]))
    shapes = {**reference['parameters'], **reference['buffers']}
    port_shapes = in_our_layout(model, {name: np.empty(shape, 'bool') for name, shape in shapes.items()})
    assert {n: list(a.shape) for n, a in port_shapes.items()} == {
        n: list(v.shape) for n, v in model.state_dict().items()
    }
    names, groups = {p.name: name for name, p in model.named_parameters()}, {}
    for group in parameter_groups(model, 0.05, reference['layer_decay']):
        setting = round(group['learning_rate'], 9), group['weight_decay']
        groups.update({names[p.name]: setting for p in group['params']})
    settings = {group['name']: (round(group['lr_scale'], 9), group['weight_decay']) for group in reference['groups']}
    assert groups == {ours(name): settings[group] for name, group in reference['group_of'].items()}


def test_other_necks_have_the_recipe_of_mmsegmentation():
    model = UPerNet(
        2, neck='none', img_size=32, embed_dim=8, num_heads=2, depth=4, out_indices=(0, 1, 2, 3), channels=4
    )
    decayed = {p.name for group in parameter_groups(model, 0.1) if group['weight_decay'] for p in group['params']}
    rest = {name for name, p in model.named_parameters() if p.name not in decayed}
    assert rest == {'backbone.cls_token', 'backbone.pos_embed'}
    assert model.stride == 16 and not model.fixed_size


# ---------------------------------------------------------------------------------------------------- Segmenter
@pytest.mark.parametrize('decoder', ['linear', 'mask'])
def test_segmenter(decoder, monkeypatch):
    g = golden('segmentation-segmenter')
    sizes = g.meta['dims']
    model = Segmenter(
        sizes['classes'], decoder, sizes['decoder_layers'], 0.0, img_size=64, embed_dim=sizes['embed'],
        depth=sizes['depth'], num_heads=sizes['heads'], drop_path_rate=0.0,
    )  # fmt: skip
    arrays = g.group('sd')
    kept = {name: a for name, a in arrays.items() if name.startswith('encoder.')}
    kept.update(
        {name.replace(decoder, 'decoder', 1): a for name, a in arrays.items() if name.startswith(f'{decoder}.')}
    )
    port(model, kept)
    image, labels = paddle.to_tensor(g['in/image']), paddle.to_tensor(g['in/labels'])
    expected = g.group(f'out/{decoder}')
    assert_close(model.forward_features(image), g['out/tokens'])
    assert_close(model(image), expected['masks'])
    logits = inference.whole_inference(model, image)
    assert_close(logits[:, :, ::3, ::3], expected['logits'])
    loss = segmentation_loss(model(image), None, labels, avg_non_ignore=True).total
    assert_close(loss, expected['loss'])
    loss.backward()
    parameters = dict(model.decode_head.named_parameters())
    for name, gradient in expected.items():
        if name.startswith('grad/'):
            parameter = name.removeprefix('grad/')
            transposed = parameter.endswith('.weight') and gradient.ndim == 2
            assert_close(parameters[parameter].grad, gradient.T if transposed else gradient, 1e-3)
    interpolate = F.interpolate  # Segmenter resizes its positions bilinearly, its port and this suite bicubically
    monkeypatch.setattr(
        F, 'interpolate', lambda x, size, **options: interpolate(x, size, **{**options, 'mode': 'bilinear'})
    )
    odd = paddle.to_tensor(g['in/odd_image'])
    assert_close(inference.whole_inference(model, odd)[:, :, ::3, ::3], expected['odd_logits'])


# ---------------------------------------------------------------------------------------------------- contract
SMALL = ['DATA.IMAGE_SIZE', 32, 'MODEL.TRANS.PATCH_SIZE', 8, 'MODEL.TRANS.EMBED_DIM', 24, 'MODEL.TRANS.NUM_HEADS', 3]
SMALL += ['MODEL.TRANS.DEPTH', 4, 'MODEL.NUM_CLASSES', 5]
UPERNET = [*SMALL, 'MODEL.TYPE', 'upernet', 'MODEL.UPERNET.OUT_INDICES', [0, 1, 2, 3], 'MODEL.UPERNET.CHANNELS', 16]
SEGMENTER = [*SMALL, 'MODEL.TYPE', 'segmenter']


@pytest.mark.parametrize(
    'opts',
    [
        [*UPERNET, 'MODEL.TRANS.REL_POS', ['block'], 'MODEL.LAMBDA.REMOVED', True, 'MODEL.LAMBDA.PRUNE_LAYERS', [0, 2]],
        [*UPERNET, 'MODEL.UPERNET.NECK', 'mln', 'MODEL.UPERNET.LAST_NORM', True, 'MODEL.TRANS.DISTILLED', True],
        [*UPERNET, 'MODEL.UPERNET.NECK', 'none', 'MODEL.UPERNET.AUX_CHANNELS', 0],
        [*SEGMENTER, 'MODEL.TRANS.DISTILLED', True],
        [*SEGMENTER, 'MODEL.SEGMENTER.DECODER', 'linear'],
    ],
)
def test_contract(opts):
    config = get_config(opts=opts)
    model = build_model(config)
    x = images(config)
    side = int(32 / model.stride)
    logits = model(x)
    pair = logits if isinstance(logits, tuple) else (logits,)
    assert isinstance(logits, tuple) == (model.auxiliary_head is not None)
    assert [out.shape[:2] for out in pair] == [[2, 5]] * len(pair) and pair[0].shape[2:] == [side, side]
    sum(out.square().mean() for out in pair).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    state = model.state_dict()
    assert {model.layer_id(name) for name in state} == set(range(6)) and model.num_layers == 5
    assert model.no_weight_decay() <= set(state)
    assert model.weight_rules.count_classes(state) == 5
    model.reset_classifier(7)
    after = model.state_dict()
    assert {n for n, v in after.items() if list(v.shape) != list(state[n].shape)} <= set(
        filter(model.weight_rules.is_head, state)
    )
    model.eval()
    assert model(x).shape == [2, 7, side, side]
    assert model.weight_rules.count_classes(after) == model.num_classes == 7
    if not model.fixed_size:
        assert model(paddle.randn([1, 3, 48, 16])).shape[2:] == [int(48 / model.stride), int(16 / model.stride)]


@pytest.mark.parametrize(
    'opts', [[*UPERNET, 'MODEL.TRANS.REL_POS', ['block'], 'MODEL.UPERNET.OUT_INDICES', [0] * 4], SEGMENTER]
)
def test_export(opts, tmp_path):
    config = get_config(opts=[*opts, 'MODEL.TRANS.DEPTH', 1])
    model = build_model(config)
    model.eval()
    spec = paddle.static.InputSpec([None, 3, 32, 32], 'float32')
    static = paddle.jit.to_static(build_model(config), input_spec=[spec], full_graph=True)
    static.set_state_dict(model.state_dict())
    static.eval()
    paddle.jit.save(static, str(tmp_path / 'model'))
    loaded = paddle.jit.load(str(tmp_path / 'model'))
    for batch in (1, 3):
        x = images(config, batch)
        np.testing.assert_allclose(loaded(x), model(x), 1e-4, 1e-5)


@pytest.mark.parametrize('opts', [UPERNET, SEGMENTER])
def test_no_type_is_taken_for_granted(opts):
    config = get_config(opts=[*opts, 'MODEL.DROPPATH', 0.5])
    model = build_model(config).to(dtype='float64')
    outputs = model(images(config).astype('float64'))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert {out.dtype for out in outputs} == {paddle.float64}
    sum(out.sum() for out in outputs).backward()


COSTS = {  # of specifications: parameters of backbone, neck, decoder and auxiliary head; GMACs of 512 x 512 pixels
    'upernet_base_512': ([87_023_424, 7_081_728, 67_963_542, 1_808_534], 107.0 + 14.5 + 483.4),
    'upernet_base_01346_512': ([74_961_744, 7_081_728, 67_963_542, 1_808_534], 86.9 + 14.5 + 483.4),
    'upernet_tiny_0246_512': ([5_187_744, 443_328, 60_885_654, 481_430], 8.2 + 0.9 + 472.9),
    'upernet_mln_small_512': ([21_982_848, 5_901_312, 29_187_222, 923_798], 31.7 + 29.5 + 213.7),
    'segmenter_small_mask_512': ([21_983_616, 0, 4_050_348, 0], 31.7 + 6.7),
    'segmenter_tiny_linear_512': ([5_683_392, 0, 28_950, 0], 10.4 + 0.03),
}


# (parameters, GMACs) by size. 'rel': the encoder of the pyramid, with relative positions and LayerScale; 'plain': of others.
SIZES = {
    'base': {'C': 768, 'rel': 87_023_424, 'plain': 86_433_024, 'macs': 107.0, 'pyramid': (7_081_728, 14.5), 'mln': (23_599_104, 117.9),
             768: (67_963_542, 483.4), 512: (32_332_950, 218.4), 'aux': 1_808_534, 'linear': (115_350, 0.12),
             'mask': (16_063_020, 22.3), '01346': (74_961_744, 86.9), '013469': (72_549_408, 82.8)},
    'small': {'C': 384, 'rel': 22_278_048, 'plain': 21_982_848, 'macs': 31.7, 'pyramid': (1_771_392, 3.6), 'mln': (5_901_312, 29.5),
              768: (63_244_950, 476.4), 512: (29_187_222, 213.7), 'aux': 923_798, 'linear': (57_750, 0.06),
              'mask': (4_050_348, 6.7), '024': (20_429_016, 27.5), '0246': (19_812_672, 26.1)},
    'tiny': {'C': 192, 'rel': 5_830_608, 'plain': 5_683_008, 'macs': 10.4, 'pyramid': (443_328, 0.9), 'mln': (1_476_096, 7.4),
             768: (60_885_654, 472.9), 512: (27_614_358, 211.4), 'aux': 481_430, 'linear': (28_950, 0.03),
             'mask': (1_029_996, 2.2), '024': (5_348_460, 8.8), '0246': (5_187_744, 8.2)},
}  # fmt: skip


@pytest.mark.parametrize('name', [name for name in list_models() if name.startswith(('upernet', 'segmenter'))])
def test_stated_costs_are_those_of_the_specification(name):
    """Of every recipe: the sum of its parts. test_registry checks that the numbers of the file are those of the model."""
    costs = SIZES[re.search('base|small|tiny', name).group()]
    pyramid, width = name.startswith('upernet') and 'mln' not in name, costs['C']
    encoder, macs = costs['rel' if pyramid else 'plain'], costs['macs']
    if removed := re.search(r'_(0\d+)_', name):
        lean, macs = costs[removed.group(1)]
        relative = 0 if pyramid else len(removed.group(1)) * (3972 * width // 64 + width)  # tables and LayerScale
        encoder -= costs['rel'] - lean - relative
    if name.startswith('upernet'):
        neck, head = ('pyramid', 768) if pyramid else ('mln', 512)
        parts = [costs[neck], costs[head], (costs['aux'], 0)]
    else:
        parts = [costs['mask' if 'mask' in name else 'linear'], (2 * width, 0)]  # the final norm
    with open(config_file(name), encoding='utf-8') as file:
        stated = re.search(r'([\d,]+) parameters, ([\d,]+) MACs', file.read()).groups()
    params, stated_macs = (int(text.replace(',', '')) for text in stated)
    assert params == encoder + sum(part for part, _ in parts)
    assert stated_macs / 1e9 == pytest.approx(macs + sum(part for _, part in parts), abs=0.1)


@pytest.mark.parametrize('name', COSTS)
def test_costs(name, zero_weights):
    model = create_model(name)
    params, macs = COSTS[name]
    parts = ('backbone.', 'neck.', 'decode_head.', 'auxiliary_head.')
    assert [sum(p.size for n, p in model.named_parameters() if n.startswith(part)) for part in parts] == params
    with open(config_file(name), encoding='utf-8') as file:
        stated = re.search(r'([\d,]+) MACs', file.read()).group(1)
    assert int(stated.replace(',', '')) / 1e9 == pytest.approx(macs, abs=0.16)


def test_gradient_checkpointing():
    config = get_config(opts=[*SEGMENTER, 'MODEL.DROPPATH', 0.3])
    check_recompute(build_model(config), images(config))


def test_mistakes():
    for opts, message in (
        ([*UPERNET, 'MODEL.TOME.R', 2], 'MODEL.TOME.R is 2, but has no effect for MODEL.TYPE upernet'),
        (
            [*SEGMENTER, 'MODEL.EVIT.KEEP_RATE', 0.5],
            'MODEL.EVIT.KEEP_RATE is 0.5, but has no effect for MODEL.TYPE segmenter',
        ),
        (
            [*UPERNET, 'MODEL.UPERNET.OUT_INDICES', [0, 1, 2, 4]],
            'must be 4 blocks in ascending order of the blocks 0 to 3',
        ),
        ([*UPERNET, 'MODEL.UPERNET.OUT_INDICES', [0, 2, 1, 3]], 'must be 4 blocks in ascending order'),
        ([*UPERNET, 'MODEL.TRANS.DEPTH', 5, 'MODEL.UPERNET.LAST_NORM', True], 'LAST_NORM needs the last block, 4'),
        ([*UPERNET, 'MODEL.LAMBDA.PRUNE_LAYERS', [0]], 'set MODEL.LAMBDA.REMOVED to True'),
        ([*SEGMENTER, 'MODEL.NUM_CLASSES', 0], 'set MODEL.NUM_CLASSES'),
        ([*SEGMENTER, 'MODEL.SEGMENTER.DECODER', 'unet'], 'one of: mask, linear'),
    ):
        with pytest.raises(UserError, match=message):
            build_model(get_config(opts=opts))
    model = build_model(get_config(opts=[*UPERNET, 'MODEL.TRANS.REL_POS', ['block']]))
    with pytest.raises(UserError, match='relative positions of this model need images of 32 pixels'):
        model(paddle.randn([2, 3, 64, 64]))
    with pytest.raises(UserError, match='one value per channel.*set DATA.BATCH_SIZE to 2 or more'):
        model(paddle.randn([1, 3, 32, 32]))
    with pytest.raises(UserError, match='no features without classes'):
        model.reset_classifier(0)
