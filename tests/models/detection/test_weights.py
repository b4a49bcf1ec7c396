# SPDX-License-Identifier: Apache-2.0
"""Weights of detectors: files of detectron2 and MAE-Lite, and starts from encoders."""

import os
import pickle

import numpy as np
import paddle
import pytest

from config import get_config
from models import build_model, create_model
from models.detection import MaskRCNN
from models.layers import MixerSpec, RemovalSpec
from models.segmentation.segmenter import Segmenter
from models.segmentation.upernet import UPerNet
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict, port_with_report
from models.weights.load import load_pretrained, load_state
from tests.conftest import assert_close, golden
from tests.models.detection.helpers import tiny_detector
from tests.models.helpers import linear_weights
from tools import port_weights
from utils.errors import UserError
from utils.formats import DETECTRON2, file_format, read_file

VIT = {'img_size': 64, 'patch_size': 8, 'embed_dim': 16, 'depth': 3, 'num_heads': 2}
SIZES = {
    **VIT, 'channels': 8, 'position_size': 32, 'heads': {'box_convs': 1, 'box_features': 8, 'mask_convs': 1},
    'mixer': [MixerSpec('windowed', options={'size': 3}), MixerSpec('decomposed'), MixerSpec('decomposed')],
}  # fmt: skip


def detector(**options) -> MaskRCNN:
    return MaskRCNN(4, **{**SIZES, **options})


def arrays(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def segmenter() -> Segmenter:
    return Segmenter(3, decoder='linear', **{**VIT, 'img_size': 32})


def upernet() -> UPerNet:
    return UPerNet(3, channels=8, out_indices=(0, 1, 2, 2), **{**VIT, 'img_size': 32})


# ---------------------------------------------------------------------------------------------------- starts
@pytest.mark.parametrize(
    'kind', ['deit_tiny (module.model.)', 'mae_tiny (module.model.)', 'mocov3_tiny (module.base_encoder.)']
)
def test_files_of_an_encoder(kind, zero_weights):
    """Of the published files exactly those arrays are used that detectron2 takes by their suffixes."""
    facts, rng, lines = golden('vitdet-ckptmap').meta['result'][kind], np.random.default_rng(0), []
    model = create_model('mask_rcnn_vitdet_tiny_640')
    before = arrays(model)
    left = facts['detector_backbone_keys_left_random']
    taken = [name for name in before if name.startswith('backbone.net.') and name not in left]
    block0 = [name for name in taken if name.startswith('backbone.net.blocks.0.')]
    assert facts['map_block0'].items() >= {name: name[len('backbone.net.') :] for name in block0}.items()
    assert len(taken) == facts['matched'] == 147
    prefix = 'base_encoder.' if 'base_encoder' in kind else ''
    file = {f'{prefix}{name[len("backbone.net.") :]}': rng.random(before[name].shape, 'float32') for name in taken}
    file.update({f'{prefix}{name}': np.ones(3, 'float32') for name in facts['unmatched_checkpoint_keys']})
    if prefix:  # what the conversion of upstream leaves out
        file.update({name.replace(prefix, 'momentum_encoder.'): array for name, array in file.items()})
    load_state(model, file, log=lines.append)
    after = arrays(model)
    for name in taken:
        np.testing.assert_array_equal(after[name], file[f'{prefix}{name[len("backbone.net.") :]}'])
    assert {name for name in after if not np.array_equal(after[name], before[name])} == set(taken)
    report = '\n'.join(lines)
    assert '147 arrays of the state dict are used' in report
    assert '24 arrays of the model keep their initial values, the file has no decomposed relative positions' in report
    for reason in ('the file has no pyramid', 'no region proposal network', 'no box and mask heads'):
        assert reason in report
    assert 'not used' in report and 'the model has no class token' in report


def test_encoders_of_the_suite():
    """A distilled classifier of another resolution without the attention of a block, and a class token less."""
    encoder = VisionTransformer(num_classes=5, distilled=True, removal=RemovalSpec(removed_layers=[0]), **VIT)
    model, lines = detector(removal=RemovalSpec(removed_layers=[0])), []
    load_state(model, arrays(encoder), log=lines.append)
    ours, theirs = arrays(model), arrays(encoder)
    for name in ('patch_embed.proj.weight', 'blocks.2.attn.qkv.weight', 'blocks.0.mlp.fc1.bias'):
        np.testing.assert_array_equal(ours[f'backbone.net.{name}'], theirs[name])
    assert ours['backbone.net.pos_embed'].shape == (1, 17, 16)
    np.testing.assert_array_equal(ours['backbone.net.pos_embed'][:, 0], theirs['pos_embed'][:, 0])
    assert any('pos_embed interpolated from [1, 66, 16] to [1, 17, 16]' in line for line in lines)
    resize = model.weight_rules.resize
    patches = np.random.default_rng(0).random((1, 16, 16), 'float32')
    np.testing.assert_array_equal(resize(model, 'backbone.net.pos_embed', patches)[:, 1:], patches)


@pytest.mark.parametrize('build', [segmenter, upernet])
def test_backbone_of_a_segmentation_model(build):
    """Its encoder is used completely, and its neck and decoders are not."""
    source, model, lines = build(), detector(), []
    load_state(model, arrays(source), log=lines.append)
    ours, theirs = arrays(model), arrays(source)
    taken = [name for name in theirs if name.startswith(('backbone.patch_embed.', 'backbone.blocks.'))]
    assert len(taken) == 2 + 12 * VIT['depth']
    for name in taken:
        np.testing.assert_array_equal(ours[name.replace('backbone.', 'backbone.net.')], theirs[name])
    np.testing.assert_array_equal(ours['backbone.net.pos_embed'], theirs['backbone.pos_embed'])
    report = '\n'.join(lines)
    assert f'{len(taken) + 1} arrays of the state dict are used' in report and 'the decoder is of label maps' in report


def test_attention_of_blocks_that_the_model_lacks_is_not_used():
    encoder, lines = VisionTransformer(num_classes=5, **{**VIT, 'img_size': 32}), []
    model = detector(removal=RemovalSpec(removed_layers=[1]))
    load_state(model, arrays(encoder), log=lines.append)
    assert 'block 1 has no attention' in '\n'.join(lines)
    with pytest.raises(UserError, match='NUM_HEADS'):
        load_state(model, {**arrays(encoder), 'Facts@@': {'MODEL.TRANS.NUM_HEADS': 4}})


@pytest.mark.parametrize(
    ('file', 'message'),
    [
        ({'layers.0.weight': np.zeros(3, 'float32')}, 'without a place in the model'),
        ({'cls_token': np.zeros([1, 1, 16], 'float32')}, 'without weights in the file'),
        ({'backbone.fpn.weight': np.zeros(3, 'float32')}, 'without a place in the model'),
        ({}, 'without weights in the file'),
    ],
)
def test_a_file_of_which_nothing_fits_is_an_error(file, message):
    model = detector()
    before = arrays(model)
    with pytest.raises(UserError, match=message):
        load_state(model, file)
    assert all(np.array_equal(value, before[name]) for name, value in arrays(model).items())


# ---------------------------------------------------------------------------------------------------- weights of detectors
def test_weights_of_the_suite_come_back():
    model, other = detector(), detector()
    load_state(other, arrays(model), replace_head=False)
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(arrays(other)[name], value)
    seven = MaskRCNN(7, **SIZES)
    load_state(seven, arrays(model))
    np.testing.assert_array_equal(seven.roi_heads.box_head.fc1.weight, model.roi_heads.box_head.fc1.weight)
    with pytest.raises(UserError, match='a classifier of 4 classes, but the model a classifier of 7 classes'):
        load_state(seven, arrays(model), replace_head=False)
    metadata = model.weight_rules.metadata(detector(rpn={'sizes': (8, 16, 32, 64, 128)}))
    with pytest.raises(UserError, match='ANCHOR_SIZES'):
        load_state(model, {**arrays(model), 'Facts@@': metadata})


def test_other_image_sizes():
    """The tables of blocks with attention among all patches follow the image size; those of windows do not."""
    model, larger, lines = detector(), detector(img_size=96), []
    load_state(larger, arrays(model), log=lines.append)
    resized = [line for line in lines if 'interpolated from [15, 8] to [23, 8]' in line]
    assert len(resized) == 4 == sum('interpolated' in line for line in lines)
    x = paddle.randn([1, 3, 96, 96])
    model.eval(), larger.eval()
    for ours, theirs in zip(model.forward_features(x), larger.forward_features(x)):
        assert_close(ours, theirs, 1e-5)  # detectron2 interpolates in each pass what is interpolated once here


# ---------------------------------------------------------------------------------------------------- published files
def published() -> dict:
    """A training checkpoint of detectron2, with arrays in place of tensors."""
    constants = {
        'pixel_mean': np.zeros([3, 1, 1], 'float32'),
        'proposal_generator.anchor_generator.cell_anchors.0': np.ones(3, 'float32'),
    }
    weights = {**golden('vitdet-detector').group('sd'), **constants}
    return {'model': weights, '__author__': 'third_party', 'iteration': 7}


TINY = [
    *['MODEL.TYPE', 'mask_rcnn', 'MODEL.NUM_CLASSES', 5, 'DATA.IMAGE_SIZE', 96, 'MODEL.TRANS.EMBED_DIM', 32],
    *['MODEL.TRANS.DEPTH', 4, 'MODEL.TRANS.NUM_HEADS', 4, 'MODEL.TRANS.MIXER', ['windowed', 'decomposed'] * 2],
    *['MODEL.WINDOWED.SIZE', 4, 'MODEL.DET.POSITION_SIZE', 64, 'MODEL.DET.CHANNELS', 16, 'MODEL.DET.BOX_CONVS', 2],
    *['MODEL.DET.BOX_FEATURES', 32, 'MODEL.DET.MASK_CONVS', 2, 'MODEL.DET.ANCHOR_SIZES', (16, 32, 48, 64, 96)],
]


def test_port_a_pickle_of_detectron2(tmp_path, capsys):
    source, target, cfg = (str(tmp_path / name) for name in ('model_final.pkl', 'model.pdparams', 'tiny.yaml'))
    with open(source, 'wb') as file:
        pickle.dump(published(), file)
    assert file_format(source) == DETECTRON2
    with open(cfg, 'w', encoding='utf-8') as file:
        file.write(get_config(opts=TINY).dump())
    port_weights.main(['-cfg', cfg, '-source', source, '-output', target])
    report = capsys.readouterr().out
    assert "detectron2 file, 123 arrays under 'model'" in report and '121 arrays used' in report
    assert 'dropped pixel_mean: MaskRCNN does not use it' in report
    model = build_model(get_config(cfg))
    load_pretrained(model, target, log=lambda line: None, replace_head=False)
    expected = arrays(tiny_detector(golden('vitdet-detector')))
    assert expected.keys() == arrays(model).keys()
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, expected[name])
    with pytest.raises(UserError, match='detectron2 file; convert it first'):
        load_pretrained(model, source)


def test_a_pickle_runs_nothing(tmp_path):
    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'made'),)

    path = str(tmp_path / 'evil.pkl')
    with open(path, 'wb') as file:
        pickle.dump({'model': Command()}, file)
    with pytest.raises(UserError, match='is refused'):
        read_file(path)
    assert not os.path.exists(tmp_path / 'made')


def test_what_does_not_fit_is_listed():
    model, weights = tiny_detector(golden('vitdet-detector')), published()['model']
    state, report = port_with_report(model, weights)
    linear = linear_weights(model)
    for name, array in state.items():
        np.testing.assert_array_equal(array, weights[name].T if name in linear else weights[name])
    assert len(report.dropped) == 2
    with pytest.raises(UserError, match=r'res2.conv1.weight \[3\]'):
        port_state_dict(model, {**weights, 'backbone.net.res2.conv1.weight': np.ones(3, 'float32')})
    del weights['roi_heads.box_head.fc1.bias']
    with pytest.raises(UserError, match='without weights in the file .*roi_heads.box_head.fc1.bias'):
        port_state_dict(model, weights)
