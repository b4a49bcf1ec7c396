# SPDX-License-Identifier: Apache-2.0
"""tools/compare_layers.py: what it writes for two models, how their flags are distinguished, and what it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.tools.conftest import write_transformer
from tools import compare_layers
from tools.compare_layers import of_second, parse, ticks
from utils.errors import UserError

OTHERS = {
    'evit_small_patch16_224_k05_drop': [],
    'lambda_tiny_0246_tome_r14': ['MODEL.TOME.R', 3],
    'mae_tiny_patch16_224': [],
    'vit_tiny_patch16_224_mae_finetune': [
        'MODEL.TRANS.DEPTH',
        3,
        'MODEL.TRANS.EMBED_DIM',
        12,
        'MODEL.PRETRAINED',
        None,
    ],
}


def compare(folder, *arguments: str) -> tuple[dict, np.ndarray]:
    target = str(folder / 'out')
    compare_layers.main(['-output', target, *arguments])
    with Image.open(f'{target}.png') as picture:
        assert picture.width > 600
    with open(f'{target}.json', encoding='utf-8') as file:
        result = json.load(file)
    return result, np.array(result['cka'], dtype=float)


@pytest.fixture(scope='module')
def deit(tmp_path_factory, images) -> tuple[str, str]:
    return write_transformer(tmp_path_factory.mktemp('deit'), 'deit_tiny_patch16_224', images)


def flags(cfg: str, weights: str, number: str = '') -> list[str]:
    return [f'-cfg{number}', cfg, f'-pretrained{number}', weights]


@pytest.mark.parametrize('name', OTHERS)
def test_two_models(name, deit, tmp_path, images):
    other = write_transformer(tmp_path, name, images, *OTHERS[name])
    result, cka = compare(tmp_path, *flags(*deit), *flags(*other, number='2'), '-batch_size', '5')
    layers = {'mae_tiny_patch16_224': 3, 'vit_tiny_patch16_224_mae_finetune': 4}.get(name, 5)
    assert cka.shape == (5, layers) and np.isfinite(cka).all() and np.abs(cka).max() < 1.2
    assert [model['weights'] for model in result['models']] == [deit[1], other[1]]
    assert result['images'] == 10 and result['batch_size'] == 5
    _, swapped = compare(tmp_path, *flags(*other), *flags(*deit, number='2'), '-batch_size', '5')
    np.testing.assert_allclose(swapped.T, cka, atol=1e-5)


def test_as_a_command(deit, tmp_path):
    """A model and itself: 1 on the diagonal. The last three images are no batch, which is said."""
    target = str(tmp_path / 'new' / 'x')
    command = [sys.executable, 'tools/compare_layers.py', *flags(*deit), '-pretrained2', deit[1], '-output', target]
    done = subprocess.run([*command, '-batch_size', '5'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '3 images are skipped' in done.stdout and '(10 images)' in done.stdout
    with open(f'{target}.json', encoding='utf-8') as file:
        cka = np.array(json.load(file)['cka'])
    np.testing.assert_allclose(np.diagonal(cka), 1, atol=1e-9)
    np.testing.assert_allclose(cka, cka.T, atol=1e-9)
    assert sorted(os.listdir(tmp_path / 'new')) == ['x.json', 'x.png']


def test_options_of_each_model(deit, tmp_path):
    """The second model is the first one, but that it merges tokens from block 1 on."""
    _, cka = compare(tmp_path, *flags(*deit), '-pretrained2', deit[1], '-opts2', 'MODEL.TOME.R', '3')
    np.testing.assert_allclose(np.diagonal(cka)[0], 1, atol=1e-9)
    assert np.diagonal(cka)[1:].max() < 0.9999
    result, _ = compare(tmp_path, *flags(*deit), '-pretrained2', 'none', '-opts2', 'SEED', '3')
    assert result['models'][1] == {'model': result['models'][0]['model'], 'weights': None}


def test_each_model_gets_pixels_as_it_was_trained(deit, tmp_path):
    """Other statistics show in the very first layer."""
    other = ['-opts2', 'DATA.IMAGENET_MEAN', '[0.1,0.2,0.3]', 'DATA.IMAGENET_STD', '[0.9,0.5,0.1]']
    _, same = compare(tmp_path, *flags(*deit), '-pretrained2', deit[1])
    _, different = compare(tmp_path, *flags(*deit), '-pretrained2', deit[1], *other)
    assert same[0, 0] == pytest.approx(1) and different[0, 0] < 0.9999


@pytest.mark.parametrize(
    'tail', [['-opts', 'A', '1', '-opts2', 'B', '-2'], ['-opts2', 'B', '-2', '-opts', 'A', '1']], ids=['12', '21']
)
def test_either_order_of_options(tail):
    args = parse(
        ['-cfg', 'a.yaml', '-pretrained', 'a', '-pretrained2', 'b', '-output', 'x', '-image_size', '64', *tail]
    )
    assert (args.opts, args.opts2) == (['A', '1'], ['B', '-2'])
    second = of_second(args)
    assert (second.cfg, second.pretrained, second.opts, second.image_size) == ('a.yaml', 'b', ['B', '-2'], 64)
    assert 'batch_size' not in second


def test_a_run_folder_brings_its_configuration(tmp_path):
    (tmp_path / 'config.yaml').write_text('')
    args = parse(['-cfg', 'a.yaml', '-pretrained', 'a', '-pretrained2', str(tmp_path), '-output', 'x'])
    assert of_second(args).cfg == str(tmp_path / 'config.yaml')


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['-opts2', 'DATA.IMAGE_SIZE', '64'], 'DATA.IMAGE_SIZE of the first model is 32, of the second 64'),
        (['-opts2', 'DATA.IMAGE_CHANNELS', '1'], 'DATA.IMAGE_CHANNELS of the first model is 3'),
        (['-opts2', 'MODEL.TYPE', 'gmlp'], 'MODEL.TYPE is gmlp'),
        (['-opts2', 'MODEL.TRANS.DEPTH'], "'MODEL.TRANS.DEPTH' is not part of a pair"),
        (['-opts2', 'MODEL.TRANS.DEPTH', '3'], 'does not fit VisionTransformer'),
        (['-batch_size', '3'], 'at least 4 images, but -batch_size is 3'),
        (['-images', '3'], 'a batch of at least 4 images, but there is none'),
    ],
)
def test_mistakes(deit, tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        compare(tmp_path, *flags(*deit), '-pretrained2', deit[1], *arguments)
    assert not os.listdir(tmp_path)


def test_layers_that_are_the_same_for_all_images(deit, tmp_path, capsys):
    """All of them, where the images do not differ."""
    os.makedirs(tmp_path / 'data' / 'val' / 'class0')
    for number in range(4):
        Image.new('RGB', (32, 32), (120, 20, 200)).save(tmp_path / 'data' / 'val' / 'class0' / f'{number}.png')
    result, _ = compare(tmp_path, *flags(*deit), '-pretrained2', deit[1], '-data_path', str(tmp_path / 'data'))
    assert result['cka'] == [[None] * 5] * 5
    assert '25 pairs of layers have no CKA' in capsys.readouterr().out


def test_ticks():
    assert ticks(13) == [0, 3, 6, 9, 12] and ticks(25) == [0, 6, 12, 18, 24] and ticks(2) == [0, 1]
