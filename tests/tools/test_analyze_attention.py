# SPDX-License-Identifier: Apache-2.0
"""tools/analyze_attention.py: what it writes for every kind of Vision Transformer, and what it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from PIL import Image

from analysis.attention import measure_attention
from config import get_config
from datasets import build_dataset
from datasets.dataset import Dataset
from datasets.subset import first_images
from models import build_model
from tests.conftest import ROOT
from tests.models.helpers import images as random_images
from tests.tools.conftest import write_transformer
from tools import analyze_attention
from tools._analysis import load_transformer
from utils.errors import UserError

# Configurations, options, and the patch tokens that each block attends to.
KINDS = {
    'deit_tiny_patch16_224': ([], [16] * 4),
    'deit_tiny_distilled_patch16_224': ([], [16] * 4),
    'evit_small_patch16_224_k05_fuse': ([], [16, 16, 9, 6]),
    'lambda_base_01346_tome_r24': (['MODEL.TOME.R', 3, 'MODEL.TOME.START_IDX', 0], [None, None, 16, None]),
    'lambda_tiny_0246_tome_r14': (['MODEL.TOME.R', 3, 'MODEL.TOME.START_IDX', 0], [None, 16, None, 13]),
    'vit_tiny_patch16_224_mae_finetune_rpe': (['MODEL.PRETRAINED', 'none'], [16] * 4),
    'mae_tiny_patch16_224': ([], [16] * 2),
    'mocov3_tiny_patch16_224': ([], [16] * 2),
}


def analyze(folder, cfg: str, weights: str, *arguments: str) -> dict:
    target = str(folder / 'out')
    analyze_attention.main(['-cfg', cfg, '-pretrained', weights, '-output', target, *arguments])
    with Image.open(f'{target}.png') as picture:
        assert picture.width > 1000
    with open(f'{target}.json', encoding='utf-8') as file:
        return json.load(file)


@pytest.mark.parametrize('name', KINDS)
def test_every_kind(name, tmp_path, images):
    options, tokens = KINDS[name]
    cfg, weights = write_transformer(tmp_path, name, images, *options)
    result = analyze(tmp_path, cfg, weights)
    assert result['tokens'] == tokens
    assert result['images'] == 13 and result['patches'] == 16 and result['weights'] == weights
    for values in (result['entropy'], result['distance']):
        assert [heads and len(heads) for heads in values] == [number and 3 for number in tokens]
    assert set(os.listdir(tmp_path)) == {f'{name}.pdparams', f'{name}.yaml', 'out.json', 'out.png'}


def test_as_a_command(tmp_path, images):
    cfg, weights = write_transformer(tmp_path, 'deit_tiny_patch16_224', images)
    command = [sys.executable, 'tools/analyze_attention.py', '-cfg', cfg, '-pretrained', weights, '-images', '9']
    target = str(tmp_path / 'new' / 'folder' / 'x')
    done = subprocess.run([*command, '-output', target, '-batch_size', '4'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(f'{target}.json', encoding='utf-8') as file:
        result = json.load(file)
    assert result['images'] == 9
    assert f'{np.mean(result["entropy"][3]):.3f}' in done.stdout
    again = analyze(tmp_path, cfg, weights, '-images', '9', '-batch_size', '9')
    for name in ('entropy', 'distance'):  # however the images fall into batches
        np.testing.assert_allclose(again[name], result[name], rtol=1e-5)


def test_units_and_images(tmp_path, images):
    cfg, weights = write_transformer(tmp_path, 'deit_tiny_patch16_224', images)
    first = analyze(tmp_path, cfg, weights, '-images', '20', '-split', 'train')
    pixels = analyze(tmp_path, cfg, weights, '-images', '20', '-split', 'train', '-pixels')
    assert (first['patch_distance'], pixels['patch_distance']) == (14, 8)
    assert np.allclose(np.multiply(first['distance'], 8 / 14), pixels['distance'])
    assert first['images'] == 20 and not first['shuffled']
    drawn = analyze(tmp_path, cfg, weights, '-images', '20', '-split', 'train', '-shuffle')
    assert drawn['images'] == 20 and drawn['shuffled'] and drawn['entropy'] != first['entropy']
    data = build_dataset(get_config(cfg), 'train')
    assert set(first_images(data, 20).labels.tolist()) == {0}
    assert first_images(data, 500) is data and isinstance(first_images(data, 20), Dataset)


def test_random_weights_are_a_wish(tmp_path, images, capsys):
    cfg, _ = write_transformer(tmp_path, 'deit_tiny_patch16_224', images)
    result = analyze(tmp_path, cfg, 'none')
    assert result['weights'] is None and 'random weights are drawn by SEED 0' in capsys.readouterr().out
    assert analyze(tmp_path, cfg, 'none') == result
    assert analyze(tmp_path, cfg, 'none', '-opts', 'SEED', '1')['entropy'] != result['entropy']


def test_pretrained_weights_in_a_pooling_model(tmp_path, images):
    """Those of an MAE are taken as a fine-tuning would take them; the norm after pooling does nothing yet."""
    _, weights = write_transformer(tmp_path, 'mae_tiny_patch16_224', images)
    opts = ['MODEL.TRANS.DEPTH', 2, 'MODEL.PRETRAINED', weights]
    cfg, _ = write_transformer(tmp_path, 'vit_tiny_patch16_224_mae_finetune', images, *opts)
    model = load_transformer(get_config(cfg))
    assert (model.fc_norm.weight == 1).all() and (model.fc_norm.bias == 0).all()
    pretrained = load_transformer(
        get_config(str(tmp_path / 'mae_tiny_patch16_224.yaml'), ['MODEL.PRETRAINED', weights])
    )
    pixels = random_images(get_config(cfg), 5)
    assert measure_attention(model, [pixels]) == measure_attention(pretrained, [pixels])


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['-images', '0'], '-images is 0'),
        (['-opts', 'MODEL.TYPE', 'gmlp'], 'MODEL.TYPE is gmlp'),
        (['-opts', 'MODEL.LAMBDA.PRUNE_LAYERS', '(0,1,2,3)', 'MODEL.LAMBDA.REMOVED', 'True'], 'has no attention'),
        (['-pretrained', '/nowhere/x.pdparams'], "no weights: there is no '/nowhere/x.pdparams'"),
        (['-output', '/'], "-output is the folder '/'"),
        (['-output', '/proc/x/y'], "cannot write '/proc/x/y'"),
    ],
)
def test_mistakes(tmp_path, images, arguments, words):
    cfg, weights = write_transformer(tmp_path, 'deit_tiny_patch16_224', images)
    with pytest.raises(UserError, match=words):
        analyze(tmp_path, cfg, weights, *arguments)
    assert len(os.listdir(tmp_path)) == 2


def test_damaged_weights_and_images(tmp_path, images):
    cfg, weights = write_transformer(tmp_path, 'deit_tiny_patch16_224', images)
    os.makedirs(tmp_path / 'data' / 'val' / 'class0')
    for number in range(3):
        (tmp_path / 'data' / 'val' / 'class0' / f'{number}.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match='none of the 3 images'):
        analyze(tmp_path, cfg, weights, '-data_path', str(tmp_path / 'data'), '-opts', 'DATA.BAD_IMAGE', 'skip')
    model = build_model(get_config(cfg))
    model.blocks[2].attn.qkv.weight.set_value(paddle.full_like(model.blocks[2].attn.qkv.weight, float('nan')))
    with pytest.raises(UserError, match='block 2 is not finite'):
        measure_attention(model, [random_images(get_config(cfg))])
    assert not [name for name in os.listdir(tmp_path) if name.startswith(('out', '.'))]
